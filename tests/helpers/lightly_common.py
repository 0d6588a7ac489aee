"""What the tests of lightly's adapter share: inputs, and an instance of each class that is served."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from adapter_common import peer


def lightly_loss(name: str):
    """A module of ``lightly.loss`` by name."""
    peer("lightly.loss")
    return importlib.import_module(f"lightly.loss.{name}")


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, *shape, dtype=torch.float64).to(dtype).unbind())


def uniform_of_nine(mean: torch.Tensor) -> torch.Tensor:
    """A distribution that pickle finds by its name."""
    return mean.new_ones(9) / 9


def all_losses() -> dict[str, tuple]:
    """Each class that is served: an instance, and inputs for it."""
    loss = peer("lightly.loss")
    torch.manual_seed(2)
    a, b = pair((24, 6))
    regions = [x.view(8, 3, 6) for x in (a, b, b, a)]
    masks = [torch.arange(24).view(8, 3) % n for n in (2, 5)]
    regularizer = peer("lightly.loss.regularizer").CO2Regularizer
    return {
        "NTXentLoss": (loss.NTXentLoss(0.3), (a, b)),
        "with a bank": (loss.NTXentLoss(memory_bank_size=(16, 6)), (a, b)),
        "DirectCLRLoss": (loss.DirectCLRLoss(4), (a, b)),
        "DCLLoss": (loss.DCLLoss(), (a, b)),
        "DCLWLoss": (loss.DCLWLoss(), (a, b)),
        "MACLLoss": (loss.MACLLoss(0.3), (a, b)),
        "DetConSLoss": (loss.DetConSLoss(), (*regions[:2], *masks)),
        "DetConBLoss": (loss.DetConBLoss(), (*regions, *masks)),
        "CO2Regularizer": (regularizer(2.0, 0.3), (a, b)),
        "CO2 with a bank": (regularizer(2.0, 0.3, (16, 6)), (a, b)),
        "HypersphereLoss": (lightly_loss("hypersphere_loss").HypersphereLoss(), (a, b)),
        "BarlowTwinsLoss": (loss.BarlowTwinsLoss(), (a, b)),
        "VICRegLoss": (loss.VICRegLoss(), (a, b)),
        "TiCoLoss": (loss.TiCoLoss(), (a, b)),
        "MMCRLoss": (loss.MMCRLoss(), (a.view(8, 3, 6), b.view(8, 3, 6))),
        "FroSSLLoss": (loss.FroSSLLoss(), ([a, b],)),
        "EMPSSLLoss": (loss.EMPSSLLoss(), ([a, b],)),
        "PatchKernelAlignmentLoss": (loss.PatchKernelAlignmentLoss(), (a.view(2, 12, 6), b.view(2, 12, 6))),
        "KoLeoLoss": (loss.KoLeoLoss(), (a,)),
        "Whitening2d": (loss.Whitening2d(6), (a,)),
        "WMSELoss": (loss.WMSELoss(6, w_size=12), (a,)),
        "SwaVLoss": (loss.SwaVLoss(), ([a / 9, b / 9], [b / 5, a / 7])),
        "DINOLoss": (loss.DINOLoss(6), ([a, b], [b, a, b])),
        "MSNLoss": (loss.MSNLoss(), (a, b[:12], b[:9])),
        "PMSNLoss": (loss.PMSNLoss(), (a, b[:12], b[:9])),
        "PMSNCustomLoss": (loss.PMSNCustomLoss(uniform_of_nine), (a, b[:12], b[:9])),
        "IBOTPatchLoss": (loss.IBOTPatchLoss(6), (a, b, torch.arange(48).view(3, 4, 4) % 2 == 0)),
        "IBOTPlusPlusPatchLoss": (loss.IBOTPlusPlusPatchLoss(6), (a, b, torch.arange(24).view(4, 6) % 5 == 0)),
        "CAPILoss": (loss.CAPILoss(), (a.view(4, 6, 6), b.view(4, 6, 6)[:, 1:4], torch.tensor([[3, 1, 5]] * 4))),
    }
