"""Everything that has to be seen on a GPU, in stages of a few minutes each.

    python -m tools.device [--stages A,B,C,D] [--only TEXT] [--seconds S] [--output DIR] [--rehearse]
    python -m tools.device.prebuild [--arch 9.0]

| stage | what |
|---|---|
| A | every CUDA operator, Triton launch and public loss against float64; bits, host waits, graphs; under two ptxas |
| B | times beside every opponent, peaks, memory; the sweep of configurations |
| C | the tests marked ``gpu`` |
| D | compute-sanitizer on small calls of every CUDA source |

A stage is steps in one process (A: in several), which the parent watches: a step that raises, runs out of memory,
hangs or takes its process along is red, and the run goes on with the next one. Results are written as they come.
``docs/gpu.md`` says how to run it on a machine without a network. Nothing here imports torch but the stages themselves.
"""
