"""Values over the steps of a training run, such as a teacher's momentum: as packages have them, to the last step."""

from __future__ import annotations

import math
from collections.abc import Callable

from .._checks import real_number, whole_number

# How much of the way is done at step k of n, by the code that has it. They differ in the last steps alone.
ENDINGS: dict[str, Callable[[int, int], float]] = {
    "dino": lambda k, n: k / n,
    "deepmind": lambda k, n: k / n,
    "lightly": lambda k, n: k / (n - 1) if n > 1 else 1.0,
    "dinov3": lambda k, n: k / (n - 1) if n > 1 else 1.0,
    "solo": lambda k, n: (k + 1) / n,
}


def cosine_schedule(step: int, steps: int, start: float, end: float, *, ending: str = "dino") -> float:
    """A value on half a cosine from ``start`` to ``end``.

        v_k = end − (end − start) · (1 + cos π p_k) / 2,        p_k: how much of the way is done, at most 1

    Args:
        step: k, from 0 on, counted before the update that uses the value; behind the last step it is ``end``.
        steps: n, of the whole run; at least 1.
        start, end: the two values, such as 0.996 and 1 of a teacher's momentum.
        ending: the code whose last steps it has:

            - ``"dino"`` (default), ``"deepmind"``: p = k/n. DINO, iBOT, DINOv2; BYOL, whose 1 − (1 − τ₀)(1 + cos)/2 is
              this with ``end=1``. The last of n updates is one step short of ``end``.
            - ``"lightly"``, ``"dinov3"``: p = k/(n − 1). The last update has ``end``.
            - ``"solo"``: p = (k + 1)/n. solo-learn counts after the optimizer's step.

    Returns:
        The value, a float.

    Raises:
        TypeError, ValueError: ``step`` is negative, ``steps`` below 1, a value no number, ``ending`` none of these.

    Source: Grill et al. 2020, "Bootstrap Your Own Latent", section 3.3; Caron et al. 2021, "Emerging Properties in
    Self-Supervised Vision Transformers", section 3.2.

    Example:
        >>> [round(sslfast.nn.cosine_schedule(k, 100, 0.996, 1.0), 4) for k in (0, 50, 99)]
        [0.996, 0.998, 1.0]
        >>> sslfast.nn.cosine_schedule(99, 100, 0.996, 1.0, ending="lightly")
        1.0
    """
    if ending not in ENDINGS:
        raise ValueError(f"ending must be one of {', '.join(ENDINGS)}, got {ending!r}")
    step, steps, start, end = _checked(step, steps, start, end)
    done = min(1.0, ENDINGS[ending](step, steps))
    return end if done == 1 else end - (end - start) * (1 + math.cos(math.pi * done)) / 2


def linear_schedule(step: int, steps: int, start: float, end: float) -> float:
    """A value on the line from ``start`` at step 0 to ``end`` at step n, where it stays: I-JEPA's, MSN's, data2vec's.

    Args:
        step: k, from 0 on, counted before the update that uses the value.
        steps: n, at least 1. MSN stretches it: 1.25 times as many as it trains, so that it ends at 0.9992.
        start, end: the two values.

    Returns:
        The value, a float.

    Raises:
        TypeError, ValueError: ``step`` is negative, ``steps`` below 1, or a value no number.

    Source: Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
    appendix A.

    Example:
        >>> [round(sslfast.nn.linear_schedule(k, 100, 0.996, 1.0), 5) for k in (0, 50, 100)]
        [0.996, 0.998, 1.0]
    """
    step, steps, start, end = _checked(step, steps, start, end)
    return end if step >= steps else start + (end - start) * step / steps


def _checked(step: int, steps: int, start: float, end: float) -> tuple[int, int, float, float]:
    return (
        whole_number("step", step, 0),
        whole_number("steps", steps, 1),
        real_number("start", start),
        real_number("end", end),
    )
