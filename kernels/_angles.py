"""Cosines and sines in plain arithmetic, as ``csrc/cpu/engine/angles.h`` has them.

Angles are in quarter turns: the nearest whole number of them is then exact to subtract, whatever the angle.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHIFTER = tl.constexpr(12582912.0)  # 1.5·2^23: adding it rounds to a whole number, up to 2^22
LARGE = tl.constexpr(137438953472.0)  # 2^37, a multiple of four, as all floats from 2^26 on are
MANY = tl.constexpr(824633720832.0)  # 1.5·2^39: adding it rounds to a multiple of 2^16, up to 2^38


@triton.jit
def within_few_turns(x):
    """The same angle below 2^16 quarter turns, exactly: whole turns are left out. Infinity becomes NaN."""
    y = tl.where(x > LARGE, LARGE, tl.where(x < -LARGE, -LARGE, x))
    return (y - ((y + MANY) - MANY)) + (x - x)


@triton.jit
def angle_of(x):
    """Cosine and sine of x quarter turns, |x| ≤ 2^21: to a rounding of x and one unit in the last place."""
    shifted = x + SHIFTER
    f = x - (shifted - SHIFTER)
    g = f * f
    s = f * (((-0.00459210708991183 * g + 0.0796758344315887) * g - 0.6459629309952697) * g + 1.570796304905852)
    c = 0.0009039892448719617 * g - 0.020860274838110617
    c = ((c * g + 0.25366924233510324) * g - 1.2337005432964971) * g + 1.0
    quarter = shifted.to(tl.int32, bitcast=True)
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    return cos, sin
