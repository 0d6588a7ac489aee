"""solo-learn for tests: the installed release's losses, and stand-ins with the formulas of 1.0.6.

1.0.6 is in no package index; its functions are written out here in plain PyTorch, with its names and arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bare_package import bare
from benchmarks import peers


def losses() -> Any:
    """``solo.losses``. ``import solo`` wants a trainer and more; the losses, and ``SinkhornKnopp``, need none of it.

    Raises:
        Unavailable: solo-learn is not installed.
    """
    peers._import_torchvision()
    try:
        return importlib.import_module("solo.losses")
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "solo"]:
            del sys.modules[name]
    found = bare("solo.losses")
    utils = types.ModuleType("solo.utils")
    utils.__path__ = [f"{path}/utils" for path in sys.modules["solo"].__path__]
    sys.modules["solo.utils"] = utils
    importlib.import_module("solo.utils.sinkhorn_knopp")
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        if not dist.is_initialized():
            return (x,)
        parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if not dist.is_initialized():
            return grads[0]
        total = torch.stack(grads)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    return torch.cat(_Gather.apply(x))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def simclr_loss_func(z, indexes, temperature=0.1):
    z = F.normalize(z, dim=-1)
    similar = torch.exp(z @ gather(z).T / temperature)
    same = indexes[:, None] == gather(indexes)[None]
    rows = torch.arange(len(z), device=z.device)
    itself = torch.zeros_like(same)
    itself[rows, len(z) * _rank() + rows] = True
    positives, negatives = (similar * (same & ~itself)).sum(1), (similar * ~same).sum(1)
    return -torch.log(positives / (positives + negatives)).mean()


def nnclr_loss_func(nn, p, temperature=0.1):
    logits = F.normalize(nn, dim=-1) @ gather(F.normalize(p, dim=-1)).T / temperature
    return F.cross_entropy(logits, torch.arange(len(nn), device=p.device) + len(nn) * _rank())


def mocov2plus_loss_func(query, key, queue, temperature=0.1):
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def mocov3_loss_func(query, key, temperature=0.2):
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    if dist.is_initialized():
        key = gather(key.detach())
    labels = torch.arange(len(query), device=query.device) + len(query) * _rank()
    return F.cross_entropy(query @ key.T / temperature, labels) * (2 * temperature)


def _variance(z):
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def _off_diagonal(m):
    return m - torch.diag(m.diagonal())


def vicreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0):
    similarity = F.mse_loss(z1, z2)
    z1, z2 = gather(z1), gather(z2)
    centred = (z - z.mean(0) for z in (z1, z2))
    covariance = sum(_off_diagonal(z.T @ z / (len(z) - 1)).square().sum() / z.shape[1] for z in centred)
    variance = _variance(z1) + _variance(z2)
    return sim_loss_weight * similarity + var_loss_weight * variance + cov_loss_weight * covariance


def vibcreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=200.0):
    similarity = F.mse_loss(z1, z2)
    z1, z2 = gather(z1), gather(z2)
    units = (F.normalize(z - z.mean(0), dim=0) for z in (z1, z2))
    correlation = sum(_off_diagonal(u.T @ u).square().mean() for u in units)
    return (
        sim_loss_weight * similarity + var_loss_weight * (_variance(z1) + _variance(z2)) + cov_loss_weight * correlation
    )


def mae_loss_func(imgs, pred, mask, patch_size, norm_pix_loss=True):
    p = patch_size
    target = F.unfold(imgs, p, stride=p).unflatten(1, (3, p * p)).permute(0, 3, 2, 1).flatten(2)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


NEWER = (
    mae_loss_func,
    mocov2plus_loss_func,
    mocov3_loss_func,
    nnclr_loss_func,
    simclr_loss_func,
    vibcreg_loss_func,
    vicreg_loss_func,
)


class Newer:
    """While its block runs, the modules of 1.0.6 are in the places of the installed ones; ``with`` gives ``losses``."""

    def __enter__(self) -> Any:
        self.package = losses()
        self.before: list[tuple[Any, str, Any]] = []
        for function in NEWER:
            name = function.__name__.removesuffix("_loss_func")
            module = types.ModuleType(f"solo.losses.{name}")
            module.gather = gather
            setattr(module, function.__name__, function)
            self._put(sys.modules, module.__name__, module)
            self._put(vars(self.package), function.__name__, function)
        return self.package

    def _put(self, names: Any, name: str, value: Any) -> None:
        self.before.append((names, name, names.get(name)))
        names[name] = value

    def __exit__(self, *_: object) -> None:
        for names, name, value in reversed(self.before):
            if value is None:
                del names[name]
            else:
                names[name] = value
