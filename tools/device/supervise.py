"""The parent of the stages: starts their processes, watches each step, and goes on whatever happens to them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .record import LOG, Record, Result
from .steps import NOT_RUN, RED, ROOT, TESTS

POLL = 0.5  # seconds between looks at whether the process is alive
TIME_UP = "the stage's time was up"
STARTS = 3  # processes in a row that may end without one more result, before the rest is given up


# Of its own, so that a worker can be ended with all it started; not a session, which would outlive this process's end.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


@dataclass(frozen=True)
class Group:
    """Steps that run in processes of one kind: ``target`` makes them, ``module:function``.

    ``processes`` share the steps; ``label`` is added to their names; ``environment`` is what their processes have
    beside this one's.
    """

    target: str
    processes: int = 1
    label: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Groups that run side by side, for ``seconds`` at most."""

    letter: str
    title: str
    seconds: float
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Settings:
    """What every process is told."""

    only: str = ""
    rehearse: bool = False


def run_stage(stage: Stage, record: Record, settings: Settings) -> None:
    """All groups of a stage, each in its processes; returns when they are done or the time is up."""
    end = time.monotonic() + stage.seconds
    jobs = [
        _Job(stage, group, shard, record, settings, end) for group in stage.groups for shard in range(group.processes)
    ]
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        for job in [pool.submit(job.run) for job in jobs]:
            job.result()


class _Job:
    """One share of a group's steps, in as many processes one after another as it takes."""

    def __init__(self, stage: Stage, group: Group, shard: int, record: Record, settings: Settings, end: float) -> None:
        self.stage, self.group, self.shard, self.record, self.settings = stage, group, shard, record, settings
        self.end = end
        self.plan: list[str] | None = None
        self.done: set[str] = set()
        self.running: tuple[str, float, float] | None = None  # name, begin, limit
        self.finished = False

    def run(self) -> None:
        idle = 0
        while not self.finished and time.monotonic() < self.end and idle < STARTS:
            before = len(self.done)
            why = self._one_process()
            if self.running is not None:
                name, begin, _ = self.running
                seconds, cut = time.monotonic() - begin, time.monotonic() >= self.end
                self._end(name, *((NOT_RUN, f"{TIME_UP} after {seconds:.0f} s of it") if cut else (RED, why)), seconds)
            elif not self.finished and self.plan is None:
                self._tell("start", RED, f"the process of this stage {why}")
                return
            idle = 0 if len(self.done) > before else idle + 1
        why = TIME_UP if time.monotonic() >= self.end else "its process ended again and again"
        for name in self.plan or ():
            if name not in self.done:
                self._tell(name, NOT_RUN, why)

    def _one_process(self) -> str:
        """Follow one process to its end; returns how it ended, and leaves the step it was in, if any, ``running``."""
        self.running = None
        with self._process() as (process, pipe):
            buffer = b""
            while True:
                limit = min(self.end, self.running[1] + self.running[2] if self.running else self.end)
                left = max(0.0, limit - time.monotonic())
                ended = process.poll() is not None  # a process that it has left behind may hold the pipe open
                ready, _, _ = select.select([pipe], [], [], 0.0 if ended else min(left, POLL))
                if not ready and not ended and left > 0:
                    continue
                if not ready and not ended:
                    return self._too_long()
                chunk = os.read(pipe, 1 << 16) if ready else b""
                if not chunk:
                    break
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
            status = process.wait()
        if status < 0:
            return f"ended by signal {-status} ({signal.Signals(-status).name}): see {LOG}"
        return f"ended with status {status}: see {LOG}"

    def _too_long(self) -> str:
        return f"hung: took more than {self.running[2]:g} s" if self.running else "did nothing"

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "plan":
            self.plan = event["steps"]
        elif kind == "start":
            self.running = (event["step"], time.monotonic(), event["limit"])
        elif kind == "end":
            if self.running and event["step"] == self.running[0]:
                self._end(event["step"], event["status"], event["detail"], event["seconds"])
            else:
                self._tell(event["step"], event["status"], event["detail"])
        elif kind == "row":
            self.record.row(event["row"])
        elif kind == "sweep":
            self.record.sweep(event["found"])
        elif kind == "finished":
            self.finished = True

    def _end(self, name: str, status: str, detail: str, seconds: float) -> None:
        self.done.add(name)
        self.running = None
        self._tell(name, status, detail, seconds)

    def _tell(self, name: str, status: str, detail: str, seconds: float = 0.0) -> None:
        result = Result(self.stage.letter, name + self.group.label, status, detail, round(seconds, 3))
        self.record.add(result)
        line = f"{result.stage} {status:7} {result.seconds:6.1f} s  {result.step}"
        print(f"{line}: {detail.strip().splitlines()[-1][:200]}" if detail.strip() else line, flush=True)

    @contextmanager
    def _process(self) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """A worker for what is left, and the pipe it writes events to; its output goes to the log."""
        reading, writing = os.pipe()
        request = {
            "target": self.group.target,
            "pipe": writing,
            "seconds": max(0.0, self.end - time.monotonic()),
            "output": str(self.record.output),
            "shard": self.shard,
            "shards": self.group.processes,
            "done": sorted(self.done),
            **vars(self.settings),
        }
        path = os.pathsep.join(filter(None, [str(ROOT), *map(str, TESTS), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **self.group.environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with (self.record.output / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.device.worker", json.dumps(request)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                **OWN_GROUP,
            )
        os.close(writing)
        try:
            yield process, reading
        finally:
            _stop(process)
            os.close(reading)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the worker and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
