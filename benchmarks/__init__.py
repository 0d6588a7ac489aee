"""Microbenchmarks: time and peak memory of every operation beside plain PyTorch, ``torch.compile`` and peer packages.

    python -m benchmarks [op ...] [--quick] [--output DIR] [--device cpu|cuda] [--only TEXT] [--providers NAME,...]
                         [--seconds S] [--no-memory]
    python -m benchmarks.plot [--results DIR] [--readme README.md]
    python -m benchmarks.scripts [script ...]        whole training scripts, without and with sslfast.patch

One operation is one file ``bench_<op>.py``, found by its name. Such a file defines

=============================================  =================================================================
``PROVIDERS: tuple[str, ...]``                 implementations in table order; ``sslfast``, ``eager``, ``compile``, ...
``TINY: dict[str, int]``                       a shape that takes no memory, to warm up with
``cases(device, quick) -> list[Case]``         what is measured
``setup(case, provider) -> Work``              inputs and the closure that both time and memory are taken from;
                                               raises ``Unavailable`` where the provider cannot run
``truth(case) -> tuple[Tensor, ...]``          what the closure must return, in float64
``cost(case) -> tuple[float, float]``          (floating-point operations, bytes) that the task needs at least
``why_skip(case, provider, metric) -> str``    the reason not to measure this here, or ``None``
=============================================  =================================================================

and, where the speed-up is not over the best of eager and ``torch.compile``, ``BASELINES``: whose best it is over. An
operation without a gradient is measured in mode ``call``; where its calls draw random numbers, ``Work.proof`` is
compared with the truth instead.

Results go to ``results/<machine>.csv`` in one schema (``rows.COLUMNS``); tables and plots are drawn from that file
alone.
"""


class Unavailable(RuntimeError):
    """A provider cannot run here, for the reason in the message: a counted, named skip."""


class Failed(RuntimeError):
    """A measurement failed, for the reason in the message."""
