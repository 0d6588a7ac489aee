"""The three ways in which a row with several labelled positives is scored, under one name."""

from __future__ import annotations

from torch import Tensor

from ..._checks import check_matrix
from ._labels import class_ids
from .group_nt_xent import group_nt_xent
from .pair_nt_xent import pair_nt_xent
from .sup_con_keys import sup_con_keys

POSITIVES = ("mean", "each", "sum")


def labelled_nt_xent(
    z: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    positives: str = "mean",
    own: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
) -> Tensor:
    """NT-Xent of labelled rows, which may have several positives: P(i), the other rows of row i's class.

        "mean"  ℓ_i  = −(1/|P(i)|) Σ_{p∈P(i)} log( e^{s_ip} / Σ_{a≠i} e^{s_ia} )          mean over i: SupCon's L_out
        "each"  ℓ_ip = −log( e^{s_ip} / (e^{s_ip} + Σ_{n: other class} e^{s_in}) )       mean over the pairs (i, p)
        "sum"   ℓ_i  = −log( Σ_{p∈P(i)} e^{s_ip} / Σ_{a≠i} e^{s_ia} )                    mean over i: SupCon's L_in

    with ``s = z·keysᵀ/τ``. Where every class has two rows, the three are SimCLR's NT-Xent. What is particular to one of
    them is an option of its own function: :func:`sslfast.sup_con_keys` is ``"mean"``, :func:`sslfast.pair_nt_xent` is
    ``"each"``. Several views of a sample, a mask, and many processes: :func:`sslfast.sup_con`.

    Args:
        z: [M, D] anchors; float32, float64, bfloat16 or float16.
        labels: [M] classes, as integers, floats or truth values.
        keys, key_labels: [N, D] and [N], what the anchors are contrasted with. Default: each other, and no row with
            itself. Not for ``"sum"``.
        positives: ``"mean"`` (default), ``"each"`` or ``"sum"``, as above. An anchor without a positive counts as 0 in
            ``"mean"``, not at all in ``"each"``, and makes ``"sum"`` infinite.
        own: [M] integers, the key that an anchor itself stands in; −1 for none. Default: none. Only with keys.
        temperature: τ, finite and not zero (default 0.1); or a one-element tensor, which receives its gradient.
        normalize: divide each row by its norm first (default).

    Returns:
        [] float32 (float64 for float64 inputs). Of this process's rows.

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit; ``positives`` is none of the three; keys
            with ``"sum"``; the temperature is zero or not finite.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning", equations 2 and 3; for ``"each"`` the loss of
    pytorch-metric-learning 2.9.0, ``NTXentLoss``.

    Example:
        >>> z, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)  # four classes of two
        >>> [round(sslfast.labelled_nt_xent(z, labels, positives=p).item(), 4) for p in ("mean", "each", "sum")]
        [0.0003, 0.0003, 0.0003]
    """
    if positives not in POSITIVES:
        raise ValueError(f"positives must be 'mean', 'each' or 'sum', got {positives!r}")
    if positives == "sum":
        if keys is not None or key_labels is not None or own is not None:
            raise ValueError("positives='sum' contrasts rows with each other: keys, key_labels and own must be None")
        check_matrix("z", z)
        return group_nt_xent(z, class_ids("labels", labels, len(z), z.device), temperature, normalize=normalize)
    if positives == "each":
        return pair_nt_xent(z, labels, keys, key_labels, own=own, temperature=temperature, normalize=normalize)
    return sup_con_keys(
        z, labels, keys, key_labels, own=own, temperature=temperature, normalize=normalize, reduction="mean"
    )
