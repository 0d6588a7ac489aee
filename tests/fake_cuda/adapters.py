"""Calls of the adapters' classes and functions, a package at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from sslfast.adapters._serve import Package

from .inputs import PATCH, SIDE, B, Case, D, Inputs, L, N
from .losses import region_masks, vicregl_views


def _adapter(package: str) -> Any:
    peers._import_torchvision()  # whose wheel needs help beside a CPU torch
    return importlib.import_module(f"sslfast.adapters.{package}")


def _views(kind: Any, *options: Any, **named: Any) -> Case:
    return lambda x: x.made(lambda: kind(*options, **named))(x.z(), x.z())


def _momentum(x: Inputs) -> list[Tensor]:
    student, average = (x.made(lambda: nn.Linear(D, 3)) for _ in range(2))
    _adapter("lightly").update_momentum(student, average, 0.9)
    return [p.detach() for p in average.parameters()]


def lightly() -> tuple[dict[str, Case], Package]:
    adapter = _adapter("lightly")
    return {
        "NTXentLoss": _views(adapter.NTXentLoss, 0.3),
        "NTXentLoss/with a bank": _views(adapter.NTXentLoss, memory_bank_size=(40, D)),
        "DCLLoss": _views(adapter.DCLLoss),
        "DCLWLoss": _views(adapter.DCLWLoss),
        "MACLLoss": _views(adapter.MACLLoss),
        "DetConSLoss": lambda x: adapter.DetConSLoss()(x.z(N, 3, D), x.z(N, 3, D), *region_masks(x)),
        "DetConBLoss": lambda x: adapter.DetConBLoss()(*(x.z(N, 3, D) for _ in range(4)), *region_masks(x)),
        "CO2Regularizer": _views(adapter.CO2Regularizer),
        "HypersphereLoss": _views(adapter.HypersphereLoss),
        "BarlowTwinsLoss": _views(adapter.BarlowTwinsLoss),
        "VICRegLoss": _views(adapter.VICRegLoss),
        "VICRegLLoss": lambda x: adapter.VICRegLLoss()(*vicregl_views(x, 256, 512)),  # small ones are left to lightly
        "TiCoLoss": _views(adapter.TiCoLoss),
        "NegativeCosineSimilarity": _views(adapter.NegativeCosineSimilarity),
        "MMCRLoss": lambda x: adapter.MMCRLoss()(x.z(N, 3, D), x.z(N, 3, D)),
        "FroSSLLoss": lambda x: adapter.FroSSLLoss()([x.z(), x.z()]),
        "EMPSSLLoss": lambda x: adapter.EMPSSLLoss()([x.z(), x.z()]),
        "PatchKernelAlignmentLoss": lambda x: adapter.PatchKernelAlignmentLoss()(x.z(B, L, D), x.z(B, L, D)),
        "NNMemoryBankModule": lambda x: x.made(lambda: adapter.NNMemoryBankModule((40, D)).to(x.dtype))(x.z()),
        "update_momentum": _momentum,
        "KoLeoLoss": lambda x: adapter.KoLeoLoss()(x.z()),
        "Whitening2d": lambda x: x.made(lambda: adapter.Whitening2d(D))(x.z()),
        "WMSELoss": lambda x: x.made(lambda: adapter.WMSELoss(4, w_size=12))(x.z(2 * N, 4)),
        "SIGReg": lambda x: x.made(lambda: adapter.SIGReg(num_vectors=9))(x.z(2, N, D)),
        "SwaVLoss": lambda x: adapter.SwaVLoss(0.5, 3, 0.5)([x.z(), x.z()], [x.z()]),
        "DINOLoss": lambda x: x.made(lambda: adapter.DINOLoss(D).to(x.dtype))(
            [x.fixed(), x.fixed()], [x.z(), x.z(), x.z()]
        ),
        "IBOTPatchLoss": lambda x: x.made(lambda: adapter.IBOTPatchLoss(D))(
            x.fixed(B * L // 4, D), x.z(B * L // 4, D), x.mask().view(B, 4, 4)
        ),
        "IBOTPlusPlusPatchLoss": lambda x: x.made(lambda: adapter.IBOTPlusPlusPatchLoss(D))(
            x.fixed(B, L, D), x.z(B, L, D), x.mask()
        ),
        "CAPILoss": lambda x: adapter.CAPILoss()(x.fixed(N, 4, D), x.z(N, 3, D), x.ids(N, 3)),
        "sinkhorn": lambda x: adapter.sinkhorn(x.fixed()),
        "sinkhorn_knopp": lambda x: adapter.sinkhorn_knopp(x.fixed(N, 3, D)),
        "MSNLoss": lambda x: adapter.MSNLoss()(x.z(2 * N, D), x.fixed(), x.z(9, D)),
        "PMSNLoss": lambda x: adapter.PMSNLoss()(x.z(2 * N, D), x.fixed(), x.z(9, D)),
        "PMSNCustomLoss": lambda x: adapter.PMSNCustomLoss(lambda p: p.new_ones(9) / 9)(x.z(), x.fixed(), x.z(9, D)),
        "covariance_loss": lambda x: adapter.covariance_loss(x.z()),
        "get_at_index": lambda x: adapter.get_at_index(x.z(B, L, D), x.ids(B, 5)),
        "set_at_index": lambda x: adapter.set_at_index(x.z(B, L, D), x.ids(B, 5), x.z(B, 5, D)),
        "mask_at_index": lambda x: adapter.mask_at_index(x.z(B, L, D), x.ids(B, 5), x.z(1, 1, D)),
    }, adapter.contents()


def open_clip() -> tuple[dict[str, Case], Package]:
    adapter = _adapter("open_clip")
    return {
        "ClipLoss": lambda x: adapter.ClipLoss()(x.z(), x.z(), x.number(10.0), x.number(-1.0), output_dict=True),
        "CoCaLoss": lambda x: x.made(lambda: adapter.CoCaLoss(1.0, 1.0))(
            x.z(), x.z(), x.z(N, 5, 30), x.labels(N * 5).view(N, 5), x.number(10.0)
        ),
        "SigLipLoss": lambda x: adapter.SigLipLoss()(x.z(), x.z(), x.number(10.0), x.number(-10.0)),
    }, adapter.contents()


def sentence_transformers() -> tuple[dict[str, Case], Package]:
    adapter = _adapter("sentence_transformers")
    plain, cached = adapter.MultipleNegativesRankingLoss, adapter.CachedMultipleNegativesRankingLoss
    return {
        "MultipleNegativesRankingLoss": lambda x: plain(nn.Identity()).compute_loss_from_embeddings(
            [x.z(), x.z(), x.z()], None
        ),
        "CachedMultipleNegativesRankingLoss": lambda x: cached(nn.Sequential(nn.Identity())).calculate_loss(
            [list(x.z().split(7)) for _ in range(2)]
        ),
    }, adapter.contents()


def pytorch_metric_learning() -> tuple[dict[str, Case], Package]:
    adapter = _adapter("pytorch_metric_learning")
    memory = lambda x, loss: x.made(lambda: adapter.CrossBatchMemory(loss, D, memory_size=40))  # noqa: E731

    def same_labels(loss: Any, x: Inputs, labels: Tensor) -> Tensor:
        return loss(x.z(), labels, ref_emb=x.z(), ref_labels=labels)

    return {
        "SupConLoss": lambda x: adapter.SupConLoss()(x.z(), x.labels()),
        "SupConLoss/keys": lambda x: adapter.SupConLoss()(
            x.z(), x.labels(), ref_emb=x.fixed(40, D), ref_labels=x.labels(40)
        ),
        "SupConLoss/the same labels": lambda x: same_labels(adapter.SupConLoss(), x, x.labels()),
        "NTXentLoss": lambda x: adapter.NTXentLoss()(x.z(), x.labels()),
        "VICRegLoss": lambda x: adapter.VICRegLoss()(x.z(), ref_emb=x.z()),
        "CrossBatchMemory": lambda x: memory(x, adapter.SupConLoss())(x.z(), x.labels()),
    }, adapter.contents()


def solo() -> tuple[dict[str, Case], Package]:
    from solo_common import losses

    losses()
    adapter = _adapter("solo")
    contents = adapter.contents()
    served = {value.__name__: value for value in (*contents.classes, *contents.functions)}
    cases: dict[str, Case] = {
        "moco_loss_func": lambda x: served["moco_loss_func"](x.z(), x.fixed(), x.fixed(D, 40)),
        "swav_loss_func": lambda x: served["swav_loss_func"]([x.z(), x.z()], [x.fixed(), x.fixed()]),
        "DINOLoss": lambda x: x.made(lambda: served["DINOLoss"](D, 0.04, 0.07, 2, 5))(x.z(2 * N, D), x.fixed(2 * N, D)),
        "SinkhornKnopp": lambda x: served["SinkhornKnopp"]()(x.z()),
        "ressl_loss_func": lambda x: served["ressl_loss_func"](x.z(), x.fixed(), x.fixed(40, D)),
        "mae_loss_func": lambda x: served["mae_loss_func"](x.pixels(), x.z(B, L, 48), x.mask().float(), PATCH),
        **{
            name: lambda x, name=name: served[name](x.z(), x.z())  # type: ignore[misc]
            for name in (
                "barlow_loss_func",
                "byol_loss_func",
                "simsiam_loss_func",
                "mocov3_loss_func",
                "nnclr_loss_func",
                "simclr_loss_func",
            )
            + ("vibcreg_loss_func", "vicreg_loss_func", "mocov2plus_loss_func")
        },
    }
    return {name: case for name, case in cases.items() if name in served}, contents


def _served(package: str) -> tuple[dict[str, Any], Package]:
    contents = _adapter(package).contents()
    return {cls.__name__: cls for cls in contents.classes}, contents


def _tokens(served: dict[str, Any], x: Inputs) -> list[Tensor]:
    """A step of iBOT's loss as the trainers have it."""
    loss = x.made(lambda: served["iBOTPatchLoss"](D))
    loss.center.zero_()
    mask, count = x.mask(), B * L // 4
    target = loss.softmax_center_teacher(x.fixed(1, count, D), 0.07).squeeze(0)
    loss.update_center(x.fixed(1, count, D))
    return [loss.forward_masked(x.z(count, D), target, mask), loss(x.z(B, L, D), x.fixed(B, L, D), mask)]


def dinov2() -> tuple[dict[str, Case], Package]:
    served, contents = _served("dinov2")

    def rows(x: Inputs) -> Tensor:
        loss = x.made(lambda: served["DINOLoss"](D))
        centered = loss.softmax_center_teacher(x.fixed(), 0.07)
        loss.update_center(x.fixed())
        return loss([x.z(), x.z()], [centered, loss.sinkhorn_knopp_teacher(x.fixed(), 0.07)])

    def balanced(x: Inputs) -> Tensor:
        return served["iBOTPatchLoss"](D).sinkhorn_knopp_teacher(x.fixed(), 0.07, x.ids(1))

    return {
        "DINOLoss": rows,
        "iBOTPatchLoss": lambda x: _tokens(served, x),
        "iBOTPatchLoss/Sinkhorn": balanced,
        "KoLeoLoss": lambda x: served["KoLeoLoss"]()(x.z()),
    }, contents


def dinov3() -> tuple[dict[str, Case], Package]:
    served, contents = _served("dinov3")

    def rows(x: Inputs) -> Tensor:
        loss = x.made(lambda: served["DINOLoss"](D))
        targets = torch.stack([loss.sinkhorn_knopp_teacher(x.fixed(), 0.07) for _ in range(2)])
        return loss(x.z(3, N, D), targets, ignore_diagonal=True)

    return {
        "DINOLoss": rows,
        "iBOTPatchLoss": lambda x: _tokens(served, x),
        "SinkhornKnoppTeacher": lambda x: served["SinkhornKnoppTeacher"]()(x.fixed(), 0.07, x.ids(1)),
        "KoLeoLoss": lambda x: served["KoLeoLoss"]()(x.z()),
        "KoLeoLossDistributed": lambda x: served["KoLeoLossDistributed"](3)(x.z()),
        "GramLoss": lambda x: served["GramLoss"]()(x.z(B, L, D), x.fixed(B, L, D)),
    }, contents


def mae() -> tuple[dict[str, Case], Package]:
    """The class that the tests have of facebookresearch/mae's names; its methods are served where it stands."""
    from mae_model import MaskedAutoencoderViT

    contents = _adapter("mae").contents()
    cls = next(c for c in contents.classes if MaskedAutoencoderViT in c.__mro__)

    def step(x: Inputs) -> list[Tensor]:
        model = x.made(lambda: cls(img_size=SIDE, patch_size=PATCH))
        with x.autocast():
            return list(model(x.pixels().float()))

    return {cls.__name__: step}, contents


# The package's own code, which waits for the device. Kept apart: what is sslfast's must not wait.
WAITS = {
    ("lightly", "NTXentLoss/with a bank"): "lightly's bank reads its pointer",
    ("pytorch_metric_learning", "NTXentLoss"): "as pair_nt_xent",
}


PACKAGES: dict[str, Callable[[], tuple[dict[str, Case], Package]]] = {
    "dinov2": dinov2,
    "dinov3": dinov3,
    "lightly": lightly,
    "open_clip": open_clip,
    "sentence_transformers": sentence_transformers,
    "pytorch_metric_learning": pytorch_metric_learning,
    "solo": solo,
    "mae": mae,
}
