"""Losses over several processes: the same value and gradients as one process on the global batch.

The processes are real (gloo, on this machine). Starting them takes longer than the cases do, so one group of each size
runs all cases of distributed_worker.py, and each test here looks at the outcome of one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed_common import STRATEGIES
from distributed_worker import CASES
from sslfast.distributed import Scope, scope_of
from sslfast.distributed.blocks import Statistics, merge_statistics

TESTS = Path(__file__).parent
PATIENCE = 240  # seconds; a hang is a failure

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


class Group:
    """Processes of one group, started at once; their reports are read when they have ended."""

    def __init__(self, world: int, folder: Path, what: str = "cases") -> None:
        folder.mkdir()
        folders = (TESTS, TESTS.parent / "helpers", TESTS.parents[1])
        path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.files = [folder / f"{rank}.json" for rank in range(world)]
        self.logs = [folder / f"{rank}.log" for rank in range(world)]
        self.processes = []
        for rank, (file, log) in enumerate(zip(self.files, self.logs, strict=True)):
            command = [sys.executable, str(TESTS / "distributed_worker.py"), str(rank), str(world)]
            command += [str(folder / "meeting"), str(file), what]
            with log.open("w") as output:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    def reports(self) -> list[dict[str, list]]:
        for process in self.processes:
            process.wait(PATIENCE)
        return [json.loads(file.read_text()) if file.exists() else {} for file in self.files]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()[-3000:]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Group]]:
    folder = tmp_path_factory.mktemp("ranks")
    started = {world: Group(world, folder / str(world)) for world in (1, 2, 4)}
    yield started
    for group in started.values():
        group.end()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_case(groups: dict[int, Group], world: int, name: str) -> None:
    reports = groups[world].reports()
    for rank, report in enumerate(reports):
        assert name in report, f"rank {rank} did not get so far: {groups[world].log(rank)}"
        failure = report[name]["failure"]
        assert failure is None, f"rank {rank} of {world}: {failure}"
    reasons = {report[name]["skipped"] for report in reports} - {None}
    if reasons:
        pytest.skip("; ".join(sorted(reasons)))


def test_a_rank_that_is_missing_is_an_error_for_the_others(tmp_path: Path) -> None:
    group = Group(2, tmp_path / "two", "one_rank_away")
    try:
        report = group.reports()[0]
    finally:
        group.end()
    assert set(report) == {*(f"away, {strategy}" for strategy in STRATEGIES), "dead"}, group.log(0)
    for name, (seconds, told) in report.items():
        assert seconds < 10 and told, (name, seconds, told)


def test_merged_statistics_of_an_empty_block() -> None:
    """A block without a pair may call its maximum 0; the other's 2^-500 must not drown in it."""
    few = Statistics(torch.tensor([-500.0, -500.0, 0.0]), torch.tensor([3.0, 3.0, 0.0]))
    none = Statistics(torch.tensor([0.0, float("-inf"), 0.0]), torch.zeros(3))
    expected = torch.tensor([-500.0, -500.0, float("-inf")]) * math.log(2) + math.log(3)
    for merged in (merge_statistics(few, none), merge_statistics(none, few)):
        torch.testing.assert_close(merged.lse(), expected)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="gather_distributed=True needs an initialised process group"):
        scope_of(True)
    with pytest.raises(ValueError, match="strategy must be one of 'gather', 'ring', got 'star'"):
        scope_of(False, "star")
    scope = scope_of(False, "ring")
    assert type(scope) is Scope
    assert scope.shard(torch.randn(3, 2)).weight == 1 / 3
