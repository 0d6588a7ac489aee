"""Cross-entropy of a student against a teacher over K prototypes, from features: no logit is stored for long.

    s = h·wᵀ/τ_s,   p = softmax(g·uᵀ/τ_t + β),   H_n = log Σ_k exp s_nk − Σ_k p_nk s_nk
    G = weight/τ_s·(softmax(s) − p),   dh = G w,   dw = Gᵀ h          (summed over the teachers that a student meets)

The value is a number, so the forward computes its gradient as well and the backward only multiplies it by the incoming
one. The operators are in ``_prototype_operators.py``, the mathematics in ``docs/prototype_cross_entropy.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backends, _library, _native
from .._checks import FLOATS, accumulator, is_real, readable, warn_once, whole_numbers
from ._prototype_gpu import by_triton
from ._prototype_operators import Inputs, by_reference
from .types import NormalizedPrototypes

BACKENDS = ("cpu", "triton", "reference")
MOST_VIEWS = 192  # kMostViews of csrc/cpu/prototype_cross_entropy.h
Prototypes = Tensor | NormalizedPrototypes


def why_not(backend: str, student: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``student``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(student.device, "student")
    if backend == "triton":
        if student.dtype == torch.float64:
            return "the Triton kernels take float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(student.device)
    return f"prototype_cross_entropy has no {backend} implementation"


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Prototypes,
    teacher_prototypes: Prototypes | None = None,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    pairs: Sequence[tuple[int, int]] | None = None,
    teacher_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student's assignment to K prototypes against the teacher's, without logits in memory.

    ``H = −Σ_k softmax(g·uᵀ/τ_t + β)_k · log softmax(h·wᵀ/τ_s)_k`` of features h, g and prototypes w, u, weighted over
    the rows and averaged over pairs of views. The last layer belongs to the loss: give the bottleneck's features, not
    the logits. Time grows as rows·K·D; memory holds a bounded part of the logits and the prototypes' gradient.

    Args:
        student: [V_s, B, D] features of V_s views of the same B samples; or [N, D], rows that meet the teacher's rows
            one by one. float32, float64, bfloat16 or float16; any strides. Used as they are: normalise first
            (:func:`sslfast.l2_normalize`) where the method does.
        teacher: [V_t, B, D] or [N, D], likewise; receives no gradient.
        student_prototypes: w, [K, D], or :class:`sslfast.NormalizedPrototypes`; receive a gradient.
        teacher_prototypes: u, [K, D] or normalised; receive no gradient. Default: the student's.
        student_temperature, teacher_temperature: τ_s (default 0.1) and τ_t (default 0.04); finite, not zero.
        pairs: pairs (t, v): view t of the teacher is the target of view v of the student. Default: all with t ≠ v, as
            DINO; for rows [N, D] the only one.
        teacher_bias: β [K], added to the teacher's logits (after the division by τ_t); no gradient. ``−center/τ_t`` is
            DINO's centring, the result of :func:`sslfast.prototype_sinkhorn` Sinkhorn's. Default: none.
        row_weights: [B] (or [N]), the weight of each sample in the sum; no gradient. Default: 1/B each, which is the
            mean. A sample of weight 0 takes no part and costs nothing on a CPU, whatever its features hold: a static
            buffer of masked tokens needs no count on the host. iBOT: ``1/(tokens masked in its image · images)``.

    Returns:
        [] float32 (float64 for float64 ``student``). Differentiable in ``student`` and ``student_prototypes``, twice
        through the reference. Over ranks the value is of the local rows; where DistributedDataParallel averages the
        gradients they are those of the mean over ranks.

    Raises:
        TypeError: an argument is not a tensor of floating-point numbers.
        ValueError: shapes, devices or pairs do not fit; there is no pair (one view against itself); a temperature is
            zero or not finite.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", equations 1 to 4; Zhou et
    al. 2022, "iBOT", equation 3; values as facebookresearch/dino's and dinov2's losses on the logits.

    Example:
        >>> student = torch.eye(2).repeat(3, 1, 1)  # three views of two samples, and two of them by the teacher
        >>> loss = sslfast.prototype_cross_entropy(student, student[:2], torch.eye(2))
        >>> round(loss.item(), 4)  # log(1 + exp(−1/0.1))
        0.0
    """
    w, gain, normalize = _parts("student_prototypes", student_prototypes)
    if teacher_prototypes is None:
        u, teacher_gain, normalize_teacher = w, gain, normalize
    else:
        u, teacher_gain, normalize_teacher = _parts("teacher_prototypes", teacher_prototypes)
    _check_features(student, teacher, w, u)
    if teacher_prototypes is not None and _same_memory(w, u) and w.requires_grad:
        warn_once(
            "sslfast.prototype_cross_entropy: teacher_prototypes are the student's own memory, so the teacher is no "
            "average of it: copy them once, or leave teacher_prototypes out if they are to be shared"
        )
    kind = accumulator(student)
    if student.dim() == 2:
        student, teacher = student[None], teacher[None]
        pairs = [(0, 0)] if pairs is None else pairs
    teacher_views, student_views = _checked_pairs(pairs, len(teacher), len(student))
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        check_temperature(name, value)
    samples, k = student.shape[1], len(w)
    inputs = Inputs(
        student,
        teacher.detach(),
        w,
        vector_of("gain of student_prototypes", gain, k, student, kind),
        u.detach(),
        _without_gradient(vector_of("gain of teacher_prototypes", teacher_gain, k, student, kind)),
        _without_gradient(vector_of("teacher_bias", teacher_bias, k, student, kind)),
        _without_gradient(vector_of("row_weights", row_weights, samples, student, kind)),
        teacher_views,
        student_views,
        float(student_temperature),
        float(teacher_temperature),
        normalize,
        normalize_teacher,
        False,
        False,
    )
    learns = torch.is_grad_enabled()
    need_prototypes = learns and (w.requires_grad or (gain is not None and gain.requires_grad))
    inputs = inputs._replace(need_student=learns and student.requires_grad, need_prototypes=need_prototypes)
    backend = _backends.serve("prototype_cross_entropy", student, "triton", why_not)
    if backend == "reference":
        return by_reference(inputs)
    if backend == "triton":
        return by_triton(inputs)
    loss: Tensor = _library.run("prototype_cross_entropy", *inputs)[0]
    return loss


def _parts(name: str, prototypes: Prototypes) -> tuple[Tensor, Tensor | None, bool]:
    """The matrix, its gain, and whether its rows are to be normalised."""
    if isinstance(prototypes, NormalizedPrototypes):
        return prototypes.direction, prototypes.gain, True
    if not isinstance(prototypes, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or NormalizedPrototypes, got {type(prototypes).__name__}")
    return prototypes, None, False


def _check_features(student: Tensor, teacher: Tensor, w: Tensor, u: Tensor) -> None:
    shapes = {"student": (2, 3), "teacher": (2, 3), "student_prototypes": (2,), "teacher_prototypes": (2,)}
    for (name, dims), x in zip(shapes.items(), (student, teacher, w, u), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() not in dims or 0 in x.shape:
            wanted = "[K, D]" if dims == (2,) else "[views, samples, features] or [rows, features]"
            raise ValueError(f"{name} must be {wanted}, none of them 0, got shape {tuple(x.shape)}")
        if x.device != student.device:
            raise ValueError(f"{name} must be on student's device {student.device}, got {x.device}")
        if x.shape[-1] != student.shape[-1]:
            raise ValueError(f"{name} must have student's {student.shape[-1]} features, got {x.shape[-1]}")
    if teacher.dim() != student.dim() or teacher.shape[-2] != student.shape[-2]:
        raise ValueError(
            "student and teacher must have the same samples, [views, samples, features] both or [rows, features] both, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if len(w) != len(u):
        raise ValueError(f"student_prototypes and teacher_prototypes must be equally many, got {len(w)} and {len(u)}")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return readable(a) and readable(b) and a.data_ptr() == b.data_ptr()


def _checked_pairs(
    pairs: Sequence[tuple[int, int]] | None, teacher_views: int, student_views: int
) -> tuple[list[int], list[int]]:
    """The teacher's and the student's views of the pairs."""
    if pairs is None:
        found = [(t, v) for t in range(teacher_views) for v in range(student_views) if t != v]
        if not found:
            raise ValueError(
                "there is no pair of two different views: student and teacher have one view, and by default a view is "
                "not compared with itself; pass pairs=[(0, 0)] if it is to be"
            )
    else:
        found = []
        for pair in pairs:
            views = whole_numbers("pairs", pair, "pairs (teacher's view, student's view)")
            if len(views) != 2:
                raise ValueError(f"pairs must be pairs (teacher's view, student's view), got {pair!r}")
            found.append((views[0], views[1]))
        if not found:
            raise ValueError("pairs must name at least one pair, got none")
    for t, v in found:
        if not 0 <= t < teacher_views or not 0 <= v < student_views:
            raise ValueError(
                f"pairs must be of the teacher's views 0 to {teacher_views - 1} and the student's 0 to "
                f"{student_views - 1}, got {(t, v)}"
            )
    if max(teacher_views, student_views) > MOST_VIEWS:
        raise ValueError(f"at most {MOST_VIEWS} views, got {max(teacher_views, student_views)}")
    return [t for t, _ in found], [v for _, v in found]


def check_temperature(name: str, value: float) -> None:
    if not is_real(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 1e-8 <= abs(value) <= 1e8:  # false for NaN too
        raise ValueError(f"{name} must be finite and not zero, 1e-8 to 1e8 in size, got {value}")


def vector_of(name: str, x: Tensor | None, length: int, like: Tensor, kind: torch.dtype) -> Tensor | None:
    """A vector of floating-point numbers in the accumulator's dtype; weight normalisation's [K, 1] and DINO's center
    [1, K] are vectors too."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.numel() != length or length not in (*x.shape, 1):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the features' device {like.device}, got {x.device}")
    return x.reshape(length).to(kind)


def _without_gradient(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
