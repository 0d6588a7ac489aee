"""Calls of everything public that takes tensors, on tensors of any device: ``{name: function of an Inputs}``.

A name is that of a public object, and behind a ``/`` what is particular about the call. Modules, too, are made inside
the call, under the inputs' device as PyTorch's default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sslfast
from sslfast import augment, losses, masking, ops
from sslfast.augment import pretext

N, D = 24, 16  # samples and features
B, L = 2, 16  # images and patches: 16 pixels a side in patches of 4
SIDE, PATCH = 16, 4


@dataclass
class Inputs:
    """Tensors of one kind on one device. With ``learn`` the floating-point ones ask for a gradient."""

    device: torch.device
    dtype: torch.dtype
    learn: bool

    def z(self, *shape: int) -> Tensor:
        shape = shape or (N, D)
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_(self.learn)

    def fixed(self, *shape: int) -> Tensor:
        return torch.randn(shape or (N, D), device=self.device, dtype=self.dtype)

    def number(self, value: float) -> Tensor:
        return torch.full((), value, device=self.device).requires_grad_(self.learn)

    def labels(self, count: int = N) -> Tensor:
        return torch.arange(count, device=self.device) % 7

    def ids(self, *shape: int) -> Tensor:
        """0, 1, … along the last dimension."""
        return torch.arange(shape[-1], device=self.device).expand(shape).contiguous()

    def images(self, *, side: int = SIDE, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randint(256, (B, 3, side, side), device=self.device, dtype=torch.uint8).to(dtype or torch.uint8)

    def pixels(self, side: int = SIDE) -> Tensor:
        return torch.rand(B, 3, side, side, device=self.device, dtype=self.dtype)

    def mask(self) -> Tensor:
        """[B, L] bool, a quarter of them True."""
        return (self.ids(B, L) % 4) == 0

    def made(self, module: Callable[[], nn.Module]) -> Any:
        """The module, made with the inputs' device as the default one."""
        with torch.device(self.device):
            return module().train()

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """An autocast region to bfloat16, if that is the dtype; ``torch.autocast`` itself wants a GPU to be there."""
        kind = self.device.type
        if self.dtype != torch.bfloat16:
            yield
            return
        before = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, True)
        torch.set_autocast_dtype(kind, torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled(kind, before)
            torch.clear_autocast_cache()


Case = Callable[[Inputs], Any]


def _module(kind: Any, *options: Any, **named: Any) -> Case:
    """A module of two matrices."""
    return lambda x: x.made(lambda: kind(*options, **named))(x.z(), x.z())


def _function(function: Any, **named: Any) -> Case:
    return lambda x: function(x.z(), x.z(), **named)


def _mixed(function: Any, *options: Any) -> Case:
    """Of two dtypes, as an autocast region makes them."""

    def call(x: Inputs) -> Any:
        with x.autocast():
            return function(x.z(), x.z().float(), *options)

    return call


def vicregl_views(x: Inputs, n: int = N, d: int = D) -> tuple[list[Any], list[Tensor]]:
    features = [(x.z(n, d), x.z(n, 3, 3, 8)) for _ in range(2)]
    return features, [x.fixed(n, 3, 3, 2) for _ in range(2)]


def _moments(x: Inputs, **options: Any) -> Any:
    return sslfast.second_moment(x.z(), x.z() if options.get("cross") else None, **options)


CONTRASTIVE: dict[str, Case] = {
    "nt_xent": _function(sslfast.nt_xent),
    "nt_xent/a learnt temperature": lambda x: sslfast.nt_xent(x.z(), x.z(), x.number(0.5), normalize=False),
    "nt_xent/diagnostics": _function(sslfast.nt_xent, diagnostics=True),
    "NTXentLoss": _module(losses.NTXentLoss, 0.3),
    "NTXentLoss/with a bank": _module(losses.NTXentLoss, memory_bank_size=(40, D)),
    "NTXentLoss/a learnt temperature": lambda x: x.made(lambda: losses.NTXentLoss(nn.Parameter(torch.tensor(0.3))))(
        x.z(), x.z()
    ),
    "info_nce": _function(sslfast.info_nce),
    "info_nce/fixed keys": lambda x: sslfast.info_nce(x.z(), x.fixed()),
    "info_nce/symmetric": _function(sslfast.info_nce, symmetric=True, diagnostics=True),
    "info_nce/smoothed and debiased": _function(sslfast.info_nce, label_smoothing=0.1, tau_plus=0.1),
    "info_nce/negatives": lambda x: sslfast.info_nce(
        x.z(), x.z(), x.number(0.1), negatives=x.z(9, D), hard_negatives=x.z(N, 3, D)
    ),
    "info_nce/several positives": lambda x: sslfast.info_nce(x.z(), x.z(), positives=x.ids(N, 2)),
    "info_nce/ids": lambda x: sslfast.info_nce(
        x.z(), x.z(), positives=x.ids(N), row_ids=x.labels(), col_ids=x.labels() + 1
    ),
    "InfoNCELoss": _module(losses.InfoNCELoss, label_smoothing=0.1),
    "moco": lambda x: sslfast.moco(x.z(), x.fixed(), x.fixed(40, D)),
    "moco/diagnostics": lambda x: sslfast.moco(x.z(), x.fixed(), x.fixed(40, D), x.number(0.1), diagnostics=True),
    "MoCoLoss": _module(losses.MoCoLoss, 40, D),
    "moco_v3": _function(sslfast.moco_v3),
    "MoCoV3Loss": _module(losses.MoCoV3Loss),
    "MemoryQueue": lambda x: _enqueued(x.made(lambda: losses.MemoryQueue(40, D)), x),
    "dcl": _function(sslfast.dcl),
    "dcl/weights": _function(sslfast.dcl, weight_fn=lambda a, b: (a * b).sum(1), diagnostics=True),
    "dclw": _function(sslfast.dclw),
    "DCLLoss": _module(losses.DCLLoss),
    "DCLWLoss": _module(losses.DCLWLoss),
    "clip": lambda x: sslfast.clip(x.z(), x.z(), x.number(10.0), x.number(-1.0)),
    "clip/a frozen tower": lambda x: sslfast.clip(x.fixed(), x.z(), 10.0, diagnostics=True),
    "ClipLoss": lambda x: losses.ClipLoss()(x.z(), x.z(), x.number(10.0), output_dict=True),
    "sig_lip": lambda x: sslfast.sig_lip(x.z(), x.z(), x.number(10.0), x.number(-10.0)),
    "SigLipLoss": lambda x: losses.SigLipLoss()(x.z(), x.z(), 10.0, x.number(-10.0)),
    "sup_con": lambda x: sslfast.sup_con(x.z(N, 2, D), x.labels()),
    "sup_con/a mask": lambda x: sslfast.sup_con(x.z(N, 2, D), mask=(x.labels()[:, None] == x.labels()).float()),
    "sup_con/no labels": lambda x: sslfast.sup_con(x.z(N, 2, D), normalize=True, diagnostics=True),
    "sup_con/one view": lambda x: sslfast.sup_con(
        x.z(N, 2, D), x.labels(), contrast_mode="one", reduction="mean_nonzero"
    ),
    "SupConLoss": lambda x: losses.SupConLoss()(x.z(N, 2, D), x.labels()),
    "sup_con_keys": lambda x: sslfast.sup_con_keys(x.z(), x.labels()),
    "sup_con_keys/keys": lambda x: sslfast.sup_con_keys(
        x.z(), x.labels(), x.fixed(40, D), x.labels(40), own=x.ids(N), temperature=x.number(0.1)
    ),
    "pair_nt_xent": lambda x: sslfast.pair_nt_xent(x.z(), x.labels()),
    "multiple_negatives_ranking": _function(sslfast.multiple_negatives_ranking),
    "multiple_negatives_ranking/all directions": lambda x: sslfast.multiple_negatives_ranking(
        x.z(), x.z(), x.z(N, 2, D), directions=("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
    ),
    "multiple_negatives_ranking/apart": _function(
        sslfast.multiple_negatives_ranking, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ),
    "MultipleNegativesRankingLoss": lambda x: losses.MultipleNegativesRankingLoss(x.number(20.0))(
        x.z(), x.z(), x.z(N, 2, D)
    ),
    "hypersphere": _function(sslfast.hypersphere),
    "HypersphereLoss": _module(losses.HypersphereLoss),
    "alignment": _function(sslfast.alignment, normalize=True),
    "uniformity": lambda x: sslfast.uniformity(x.z(), normalize=True),
    "uniformity/as they are": lambda x: sslfast.uniformity(x.z()),
    "similarity_lse": lambda x: sslfast.similarity_lse(x.z(), x.z(30, D), 5.0),
    "similarity_lse/fixed keys": lambda x: sslfast.similarity_lse(
        x.z(), x.fixed(30, D), x.number(5.0), bias=x.fixed(30), row_ids=x.labels(), col_ids=x.labels(30)
    ),
    "similarity_lse/columns": lambda x: sslfast.similarity_lse(
        x.z(), x.z(30, D), x.number(5.0), bias=x.z(30), columns=True
    ),
    "similarity_terms": lambda x: sslfast.similarity_terms(
        x.z(), x.z(30, D), 5.0, columns=True, positives=x.ids(N), hardest=True
    ),
    "similarity_terms/itself": lambda x: _terms_of_itself(x.z(), x.ids(N)),
    "similarity_logsigmoid": lambda x: sslfast.similarity_logsigmoid(
        x.z(), x.z(30, D), x.number(5.0), x.number(-5.0), row_ids=x.labels(), col_ids=x.labels(30)
    ),
    "l2_normalize": lambda x: sslfast.l2_normalize(x.z()),
    "ops.nt_xent": _function(ops.nt_xent),
    "nt_xent/in an autocast region": _mixed(sslfast.nt_xent),
    "info_nce/in an autocast region": _mixed(sslfast.info_nce),
    "clip/in an autocast region": _mixed(sslfast.clip, 10.0),
}

DECORRELATION: dict[str, Case] = {
    "barlow_twins": _function(sslfast.barlow_twins),
    "barlow_twins/in an autocast region": _mixed(sslfast.barlow_twins),
    "barlow_twins/primal": _function(sslfast.barlow_twins, form="primal"),
    "BarlowTwinsLoss": _module(losses.BarlowTwinsLoss),
    "cross_correlation_loss": _function(sslfast.cross_correlation_loss, form="dual"),
    "vicreg": _function(sslfast.vicreg),
    "vicreg/wide": lambda x: sslfast.vicreg(x.z(N, 128), x.z(N, 128), variance_reduction="sum"),
    "VICRegLoss": _module(losses.VICRegLoss),
    "vicregl/a local view": lambda x: sslfast.vicregl(*vicregl_views(x), *(part[:1] for part in vicregl_views(x))),
    "VICRegLLoss": lambda x: losses.VICRegLLoss()(*vicregl_views(x)),
    "vibcreg": _function(sslfast.vibcreg),
    "VIbCRegLoss": _module(losses.VIbCRegLoss),
    "covariance_loss": lambda x: sslfast.covariance_loss(x.z()),
    "variance_loss": lambda x: sslfast.variance_loss(x.z()),
    "invariance_loss": _function(sslfast.invariance_loss),
    "frossl": lambda x: sslfast.frossl([x.z(), x.z(), x.z()]),
    "frossl/wide": lambda x: sslfast.frossl([x.z(N, 128), x.z(N, 128)]),
    "FroSSLLoss": lambda x: losses.FroSSLLoss()([x.z(), x.z()]),
    "spectral_contrastive": _function(sslfast.spectral_contrastive),
    "SpectralContrastiveLoss": _module(losses.SpectralContrastiveLoss, mu=None),
    "tico": _function(sslfast.tico),
    "tico/covariance": lambda x: sslfast.tico(x.z(), x.z(), x.fixed(D, D)),
    "TiCoLoss": lambda x: _twice(x.made(losses.TiCoLoss), x),
    "mmcr": lambda x: sslfast.mmcr(x.z(N, 3, D), x.z(N, 3, D)),
    "mmcr/few": lambda x: sslfast.mmcr(x.z(4, 20, D), x.z(4, 20, D)),
    "MMCRLoss": lambda x: losses.MMCRLoss()(x.z(N, 3, D), x.z(N, 3, D)),
    "norm_mse_loss": _function(sslfast.norm_mse_loss),
    "Whitening2d": lambda x: x.made(lambda: losses.Whitening2d(D))(x.z()),
    "Whitening2d/evaluated": lambda x: x.made(lambda: losses.Whitening2d(D, eps=0.1)).eval()(x.z()),
    "WMSELoss": lambda x: x.made(lambda: losses.WMSELoss(4, w_size=12))(x.z(2 * N, 4)),
    "second_moment": lambda x: _moments(x, form="dual"),
    "second_moment/cross": lambda x: _moments(x, cross=True, scale="variance", form="primal"),
    "second_moment/wide": lambda x: sslfast.second_moment(x.z(N, 256), center=False),
}


def _enqueued(queue: Any, x: Inputs) -> list[Tensor]:
    queue.enqueue(x.z())
    queue.enqueue(x.z(50, D))
    return [queue.queue, queue.pointer]


def _twice(module: Any, x: Inputs) -> list[Tensor]:
    return [module(x.z(), x.z()), module(x.z(), x.z()), module.C]


def _terms_of_itself(z: Tensor, ids: Tensor) -> Any:
    return sslfast.similarity_terms(z, z, 5.0, row_ids=ids, col_ids=ids, positives=ids.roll(1), hardest=True)


def _masks(x: Inputs) -> masking.Masks:
    return masking.random_masks(x.ids(B), L)


def _weights(x: Inputs) -> dict[str, Any]:
    return {"weight": x.z(D, 3, PATCH, PATCH), "bias": x.z(D), "patch_size": PATCH}


def _token_losses(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.where(x.ids(B, L) % 4 == 0, x.ids(B, L), -100)
    return x.z(B, L, D), x.z(50, D), labels


MASKED: dict[str, Case] = {
    "masked_patch_loss": lambda x: sslfast.masked_patch_loss(
        x.images(), x.z(B, L, 48), _masks(x), patch_size=PATCH, target="mae"
    ),
    "masked_patch_loss/a mask": lambda x: sslfast.masked_patch_loss(
        x.pixels(), x.z(B, L, 48), x.mask(), patch_size=PATCH, mean=[0.5] * 3, std=[0.2] * 3
    ),
    "masked_patch_loss/ids": lambda x: sslfast.masked_patch_loss(
        x.pixels(), x.z(B, 5, 48), x.ids(B, 5), patch_size=PATCH
    ),
    "masked_patch_loss/numbers": lambda x: sslfast.masked_patch_loss(
        x.pixels(), x.z(B, L, 48), x.mask().float(), patch_size=PATCH
    ),
    "MaskedPatchLoss": lambda x: losses.MaskedPatchLoss(PATCH)(x.images(), x.z(B, L, 48), _masks(x)),
    "masking.forward_loss": lambda x: masking.forward_loss(
        x.pixels(), x.z(B, L, 48), x.mask().float(), patch_size=PATCH, norm_pix_loss=True
    ),
    "masked_feature_loss": lambda x: sslfast.masked_feature_loss(x.z(3, B, 5, D), x.fixed(B, L, D), x.ids(3, B, 5)),
    "masked_feature_loss/mse": lambda x: sslfast.masked_feature_loss(
        x.z(B, 5, D), x.fixed(B, L, D), x.ids(B, 5), loss="mse", layer_norm=False
    ),
    "MaskedFeatureLoss": lambda x: losses.MaskedFeatureLoss()(x.z(B, 5, D), x.fixed(B, L, D), x.ids(B, 5)),
    "masked_token_cross_entropy": lambda x: sslfast.masked_token_cross_entropy(*_token_losses(x), bias=x.z(50)),
    "masked_token_cross_entropy/capacity": lambda x: sslfast.masked_token_cross_entropy(*_token_losses(x), capacity=12),
    "MaskedTokenLoss": lambda x: losses.MaskedTokenLoss()(*_token_losses(x)),
}

TOKENS: dict[str, Case] = {
    "masking.gather_tokens": lambda x: masking.gather_tokens(
        x.z(B, L, D), x.ids(B, 5), position=x.z(L, D), prefix=x.z(1, D)
    ),
    "masking.gather_tokens/masks of the same": lambda x: masking.gather_tokens(x.z(B, L, D), x.ids(3, B, 5)),
    "masking.gather_tokens/a token": lambda x: masking.gather_tokens(
        None, x.ids(B, 5), token=x.z(1, 1, D), position=x.z(1, L, D)
    ),
    "masking.scatter_tokens": lambda x: masking.scatter_tokens(
        x.z(B, 6, D), x.ids(B, L), x.z(D), position=x.z(L + 1, D), passed=1
    ),
    "masking.replace_tokens": lambda x: masking.replace_tokens(
        x.z(B, L, D), x.mask(), x.z(D), position=x.z(L, D), prefix=x.z(1, D)
    ),
    "masking.gather_patches": lambda x: masking.gather_patches(x.images(), x.ids(B, 5), patch_size=PATCH, mean=0.5),
    "masking.gather_patches/a gradient": lambda x: masking.gather_patches(
        x.z(B, 3, SIDE, SIDE), patch_size=PATCH, std=[0.2] * 3
    ),
    "masking.scatter_patches": lambda x: masking.scatter_patches(
        x.z(B, 5, 48), x.ids(B, 5), size=(3, SIDE, SIDE), patch_size=PATCH
    ),
    "masking.embed_patches": lambda x: masking.embed_patches(
        x.z(B, 3, SIDE, SIDE), x.ids(B, 5), **_weights(x), position=x.z(L, D), prefix=x.z(1, D), mean=0.5
    ),
    "masking.embed_patches/all of bytes": lambda x: masking.embed_patches(x.images(), None, **_weights(x)),
    "masking.patchify": lambda x: masking.patchify(x.z(B, 3, SIDE, SIDE), PATCH),
    "masking.unpatchify": lambda x: masking.unpatchify(x.z(B, L, 48), PATCH),
    "masking.get_at_index": lambda x: masking.get_at_index(x.z(B, L, D), x.ids(B, 5)),
    "masking.set_at_index": lambda x: masking.set_at_index(x.z(B, L, D), x.ids(B, 5), x.z(B, 5, D)),
    "masking.set_at_index/a number": lambda x: masking.set_at_index(x.z(B, L, D), x.ids(B, 5), 1.0),
    "masking.mask_at_index": lambda x: masking.mask_at_index(x.z(B, L, D), x.ids(B, 5), x.z(1, 1, D)),
    "masking.repeat_token": lambda x: masking.repeat_token(x.z(1, 1, D), (B, L)),
    "masking.random_masking": lambda x: masking.random_masking(x.z(B, L, D), 0.75),
    "masking.random_masking/noise": lambda x: masking.random_masking(
        x.z(B, L, D), 0.75, torch.rand(B, L, device=x.device)
    ),
}

MASKS: dict[str, Case] = {
    "masking.random_masks": _masks,
    "masking.random_masks/a number of images": lambda x: masking.random_masks(B, (4, 4), device=x.device),
    "masking.random_masks/a list": lambda x: masking.random_masks([5, 7], (2, 2, 4), order="noise", device=x.device),
    "masking.random_masks/noise": lambda x: masking.random_masks(
        x.ids(B), L, noise=torch.rand(B, L, device=x.device), order="noise"
    ),
    "masking.tube_masks": lambda x: masking.tube_masks(x.ids(B), (3, 4, 4)),
    "masking.grid_masks": lambda x: masking.grid_masks(x.ids(B), (8, 8), unit=4),
    "masking.Masks": lambda x: _masks(x).mask,
    "masking.Masks/from a mask": lambda x: masking.Masks.from_mask(x.mask(), kept=12).to(x.device),
    "masking.block_masks": lambda x: masking.block_masks(x.ids(B), (14, 14), 75),
    "masking.block_masks/counts": lambda x: masking.block_masks(x.ids(B), (14, 14), x.ids(B) + 5, complete=True),
    "masking.block_masks/a list": lambda x: masking.block_masks([3, 4], (14, 14), [7, 8.5], device=x.device),
    "masking.beit_masks": lambda x: masking.beit_masks(x.ids(B), complete=True),
    "masking.ibot_masks": lambda x: masking.ibot_masks(x.ids(B), (14, 14), (0, 0.3), (0, 0.2)),
    "masking.ibot_masks/random": lambda x: masking.ibot_masks(x.ids(B), (14, 14), shape="random"),
    "masking.dinov2_masks": lambda x: masking.dinov2_masks(x.ids(8), (16, 16)),
    "masking.dinov3_masks": lambda x: masking.dinov3_masks(x.ids(8), (16, 16), circular_shift=True),
    "masking.multiblock_masks": lambda x: masking.multiblock_masks(x.ids(B), (14, 14), context_size=28),
    "masking.multiblock_masks/overlap": lambda x: masking.multiblock_masks(
        B, (14, 14), allow_overlap=True, device=x.device
    ),
    "masking.multiblock_masks/the shortest": lambda x: masking.multiblock_masks(x.ids(B), (14, 14)),
    "masking.random_token_mask": lambda x: masking.random_token_mask((B, L), device=x.device),
    "masking.mask_tokens": lambda x: masking.mask_tokens(
        x.ids(B, L), x.ids(B), mask_id=103, vocab_size=1000, special=x.mask(), word_ids=x.ids(B, L) // 2, exact=True
    ),
    "masking.mask_tokens/no samples": lambda x: masking.mask_tokens(x.ids(B, L), mask_id=103, vocab_size=1000),
    "ops.masked_rows": lambda x: ops.masked_rows(x.mask(), 8),
    "ops.partition_mask": lambda x: ops.partition_mask(x.mask(), 12),
    "ops.random_mask": lambda x: ops.random_mask(x.ids(B), (1, 4, 4), 4),
    "ops.block_mask": lambda x: ops.block_mask(
        x.ids(B), x.ids(B).double(), (14, 14), area=(4.0, 99.0), aspect=(0.3, 3.0)
    ),
    "ops.multiblock_mask": lambda x: ops.multiblock_mask(x.ids(B), (14, 14), 4, (5, 6), (13, 13), 28),
    "ops.mask_tokens": lambda x: ops.mask_tokens(
        x.ids(B, L), x.ids(B), None, None, (2**30, 2**31, 2**31), mask_id=103, vocab_size=1000
    ),
}


def _ragged(x: Inputs) -> list[Tensor]:
    return [x.images()[0], x.images(side=24)[1]]


def _views(x: Inputs, images: Any, name: str = "simclr") -> Any:
    views = augment.recipe(name, 12)
    params = augment.sample_params(images, views, x.ids(B))
    return augment.apply(images, params, views)


AUGMENTATION: dict[str, Case] = {
    "augment.apply": lambda x: _views(x, x.images()),
    "augment.apply/a list of sizes": lambda x: _views(x, _ragged(x)),
    "augment.apply/floats, channels last": lambda x: augment.apply(
        x.pixels(),
        augment.sample_params(x.pixels(), augment.recipe("dino", 12, 8), [0, 1]),
        augment.recipe("dino", 12, 8),
        dtype=torch.bfloat16,
        channels_last=True,
    ),
    "augment.sample_params": lambda x: augment.sample_params(x.images(), augment.recipe("dino")).table,
    "augment.sample_params/a list of sizes": lambda x: augment.sample_params(_ragged(x), augment.recipe("dino")).table,
    "augment.MultiViewTransform": lambda x: augment.MultiViewTransform(augment.recipe("simclr", 12))(
        x.images(), [0, 1]
    ),
    "augment.MultiViewTransform/stacked": lambda x: augment.MultiViewTransform(
        augment.recipe("simclr", 12), stacked=True
    )(x.images()),
    "augment.MultiViewTransform/a list of sizes": lambda x: augment.MultiViewTransform(augment.recipe("simclr", 12))(
        _ragged(x), x.ids(B)
    ),
    "augment.ViewParams": lambda x: [
        augment.sample_params(x.images(), augment.recipe("simclr"), [0, 1]).to(x.device)[0].clone().order,
    ],
    "ops.augment_views": lambda x: ops.augment_views(
        [x.images()], augment.sample_params(x.images(), augment.recipe("simclr")).table, size=(12, 12)
    ),
    "ops.view_params": lambda x: ops.view_params(x.ids(B), (16, 16), [augment.recipe("simclr")[0].numbers()]),
    "ops.view_params/sizes": lambda x: ops.view_params(
        x.ids(B), torch.full((B, 2), 16, device=x.device), [augment.recipe("simclr")[0].numbers()]
    ),
    "pretext.rotation": lambda x: pretext.rotation(x.images(), x.ids(B), all_four=False),
    "pretext.Rotation": lambda x: pretext.Rotation()(x.pixels()),
    "pretext.jigsaw": lambda x: pretext.jigsaw(x.images(), [0, 1], tile=4, cell=5),
    "pretext.Jigsaw": lambda x: pretext.Jigsaw(tile=4, cell=5, permutations=10)(x.pixels()),
    "pretext.Jigsaw/table": lambda x: pretext.Jigsaw(permutations=10).permutation_table(x.device),
    "pretext.relative_location": lambda x: pretext.relative_location(
        x.images(), patch=5, gap=2, jitter=1, least_pixels=4
    ),
    "pretext.RelativeLocation": lambda x: pretext.RelativeLocation(
        patch=5, gap=2, jitter=1, least_pixels=4, colour="projection"
    )(x.pixels(), x.ids(B)),
    "pretext.colorization": lambda x: pretext.colorization(x.images(), stride=2),
    "pretext.Colorization": lambda x: pretext.Colorization(neighbours=3)(x.pixels()),
    "pretext.color_bins": lambda x: pretext.color_bins(x.device),
    "pretext.dense_colors": lambda x: pretext.dense_colors(x.ids(B, 5, 4, 4), x.fixed(B, 5, 4, 4).float()),
    "pretext.decode_colors": lambda x: pretext.decode_colors(x.fixed(B, 313, 4, 4)),
    "pretext.rebalancing_weights": lambda x: pretext.rebalancing_weights(torch.ones(313, device=x.device)),
    "pretext.rgb_to_lab": lambda x: pretext.rgb_to_lab(x.images()),
    "pretext.lab_to_rgb": lambda x: pretext.lab_to_rgb(x.pixels().float()),
    "pretext.inpainting": lambda x: pretext.inpainting(x.images(), [0, 1]),
    "pretext.inpainting/blocks": lambda x: pretext.inpainting(x.images(), hole="blocks", overlap=1),
    "pretext.Inpainting": lambda x: pretext.Inpainting(hole="region")(x.pixels(), x.ids(B)),
}

# Calls that look at values, as their documentation says: on fake and meta tensors they raise PyTorch's own error.
WAITS = {
    "pair_nt_xent": "how many positives an anchor has decides how it is computed",
    "masking.multiblock_masks/the shortest": "the length of the result is that of the shortest context",
}
CASES: dict[str, Case] = {**CONTRASTIVE, **DECORRELATION, **MASKED, **TOKENS, **MASKS, **AUGMENTATION}
