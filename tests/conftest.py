"""Settings of every test run: the Triton interpreter without a GPU, seeds, what was skipped, which backends ran.

With pytest-xdist (``-n``) tests run in several processes; what is counted here is then the sum over them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Threads that wait do not spin: several processes share the processor, and a kernel on tiny inputs is mostly waiting.
# Read when torch is first imported, like Triton's variable below; child processes inherit both.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# PyTorch 2.13 keeps compiled graphs in one place whatever this variable says, and compiles them as it says: what the
# processor's own level has left there does not compile for another.
if level := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{level}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

import numpy as np  # noqa: E402  (after the variable above)
import pytest  # noqa: E402
import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads it when it is first imported, which importing torch or sslfast does not do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter  # noqa: E402  (after the variables above)
import sslfast  # noqa: E402
from sslfast import _backends, ops  # noqa: E402

TESTS = Path(__file__).parent

# Every (operation, backend) pair that exists, and whether this machine can run it. A full run that leaves out a pair
# that it could have run is red: a green run must not mean that nothing but the reference was tested.
CAN_RUN = {
    "reference": True,
    "cpu": True,
    "cuda": HAS_GPU,
    "triton": importlib.util.find_spec("triton") is not None,
}
PAIRS = {(op, backend): CAN_RUN[backend] for op in ops.__all__ for backend in getattr(ops, op).BACKENDS}

_ran: collections.Counter[tuple[str, str]] = collections.Counter()
_choose, _use = _backends.select, sslfast.use_backend


def _choose_and_record(op: str, preferred: str, why_not: Callable[[str], str | None]) -> str:
    backend = _choose(op, preferred, why_not)
    if not torch.compiler.is_compiling():  # the tracer must not see the counter
        _ran[op, backend] += 1
    return backend


@functools.wraps(_use)
def _use_and_fill(name: str | None) -> contextlib.AbstractContextManager[None]:
    if name == "triton" and not HAS_GPU:  # for the rest of the test: a graph that was compiled beside it needs it too
        interpreter.fresh_memory_is_nan(True)
    return _use(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a process for each core, hyper-threads counted; each may take 2 GB, so no more than 8."""
    return min(cores(), 8)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to whichever process is free, those that share something expensive to make to one, and these first.

    In place of ``--dist load``, which is what ``-n`` alone means; any other ``--dist`` is left to pytest-xdist. Not by
    its mark ``xdist_group``: with pytest-xdist 3.8 and pytest 9.2, tests of one group were seen in several processes.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_by(nodeid) or nodeid

    return Scheduling(config, log)


def shared_by(test: str) -> str | None:
    """What the tests are called together that need one tree, wheel, process group, or compiling process."""
    file, _, name = test.rpartition("/")[2].partition("::")
    if file == "test_triton_aot.py":
        architecture = re.search(r"-(80|86|90|100)-", name)
        return f"{file}, {name.partition('[')[0]}, {architecture[1]}" if architecture else None
    if file == "test_cuda_emulated.py":  # each library is built once: the plain one, and one for each sanitizer
        sanitizer = re.search(r"\[(address|thread)\]", name)
        return f"{file}, {sanitizer[1]}" if sanitizer else file
    if file == "test_fake_cuda.py":
        return f"{file}, {name.partition('[')[0]}"
    return file if file in ("test_packaging.py", "test_cuda_compile.py", "test_distributed.py") else None


def pytest_configure(config: pytest.Config) -> None:
    _backends.select, sslfast.use_backend = _choose_and_record, _use_and_fill
    if CAN_RUN["triton"] and not HAS_GPU:
        interpreter.install()
    processes = getattr(config.option, "numprocesses", None)
    if processes:  # before they start. Two threads at least: how a kernel divides its work is tested by every test.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(2, cores() // processes)))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "the inner loop: two cases of each test that is neither long nor compiles, interprets or starts a process"
    parser.addoption("--quick", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    if config.getoption("quick"):
        kept = quick(items, last_seconds(config))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


LONG = 1.0  # seconds, for a test of the inner loop
SECONDS = "sslfast/seconds"  # in pytest's cache: of every test that took longer when it last ran


def quick(items: list[pytest.Item], seconds: dict[str, float]) -> set[pytest.Item]:
    """The first and the last case of every test that is neither heavy nor was long when it last ran."""
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        marked = {"slow", "gpu"} & {mark.name for mark in item.iter_markers()}
        if not marked and not is_heavy(item) and seconds.get(item.nodeid, 0.0) <= LONG:
            cases[item.nodeid.partition("[")[0]].append(item)
    return {item for several in cases.values() for item in (several[0], several[-1])}


# What a test of the inner loop does without: other processes, compilers, Triton's interpreter.
HEAVY = ("subprocess", "run_with(", "compile_all(", "torch.compile(", "opcheck(", '"triton"')


def is_heavy(item: pytest.Item) -> bool:
    """By the words in the test, in its file's fixtures, and in the functions of that file which they call."""
    module = getattr(item, "module", None)
    names = (getattr(item, "originalname", ""), *getattr(item, "fixturenames", ()))
    found = any(word in written(module, name) for name in names for word in HEAVY)
    return found or "triton" in item.nodeid or shared_by(item.nodeid) is not None


@functools.cache
def written(module: Any, name: str) -> str:
    """The source of a function of a test's file, and of the functions of that file which it names."""
    function = inspect.unwrap(getattr(module, name, None) or (lambda: None))
    function = getattr(function, "_get_wrapped_function", lambda: function)()  # of a fixture
    if getattr(function, "__module__", None) != getattr(module, "__name__", ""):
        return ""
    others = [n for n in function.__code__.co_names if n != name and inspect.isfunction(getattr(module, n, None))]
    return "".join([inspect.getsource(function), *(written(module, n) for n in others)])


def last_seconds(config: pytest.Config) -> dict[str, float]:
    cache = getattr(config, "cache", None)
    return {} if cache is None else dict(cache.get(SECONDS, {}))


_seconds: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration


def remember_seconds(config: pytest.Config) -> None:
    """What took long is left out of the next quick run; what no longer does comes back."""
    cache = getattr(config, "cache", None)
    if cache is not None and _seconds:
        known = {test: took for test, took in last_seconds(config).items() if test not in _seconds}
        cache.set(SECONDS, known | {test: round(took, 1) for test, took in _seconds.items() if took > LONG})


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test draws the same numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def launches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test has its own orders of the programs of a launch."""
    interpreter.seed(request.node.nodeid)
    yield
    interpreter.fresh_memory_is_nan(False)


def is_full_run(config: pytest.Config) -> bool:
    """All of tests/ was selected: no -k, -m, --lf, --deselect, --ignore, single file or single test."""
    options = config.option
    narrowed = (
        options.keyword or options.markexpr or options.collectonly or getattr(options, "lf", False) or options.quick
    )
    left_out = options.deselect or options.ignore or options.ignore_glob
    whole = {TESTS.resolve(), TESTS.parent.resolve()}
    paths = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    return not narrowed and not left_out and all(path in whole for path in paths)


def missing_pairs() -> list[tuple[str, str]]:
    """Pairs that this machine can run and that no test has run so far."""
    return [pair for pair, runnable in PAIRS.items() if runnable and not _ran[pair]]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):  # one of several processes: the first one adds up and judges
        config.workeroutput["ran"] = [(*pair, calls) for pair, calls in _ran.items()]
        return
    remember_seconds(config)
    if exitstatus == pytest.ExitCode.OK and is_full_run(config) and missing_pairs():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended; one that crashed told nothing."""
    for op, backend, calls in getattr(node, "workeroutput", {}).get("ran", ()):
        _ran[op, backend] += calls


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    out = terminalreporter
    skipped: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for report in out.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        test = report.nodeid.rpartition("/")[2].partition("[")[0]  # all parameters of one test together
        skipped[reason.removeprefix("Skipped: ")][test] += 1
    out.section("skipped tests")
    for reason, tests in sorted(skipped.items()):
        out.write_line(f"{tests.total()} skipped: {reason}")
        for test, count in tests.items():
            out.write_line(f"    {count:>4} × {test}")
    if not skipped:
        out.write_line("none")
    out.section("calls by operation and backend")
    for pair, runnable in PAIRS.items():
        out.write_line(f"{pair[0]:<28}{pair[1]:<12}{_ran[pair] if runnable else 'cannot run on this machine'}")
    if is_full_run(config) and missing_pairs():
        names = ", ".join(f"{op} on {backend}" for op, backend in missing_pairs())
        out.write_line(f"FAILED: could have run here, but no test ran: {names}", red=True)
