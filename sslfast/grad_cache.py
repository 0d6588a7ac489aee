"""Gradient caching: the gradients of one large batch, with the encoder's activations of one chunk at a time.

With e_i = f(x_i; θ), dL/dθ = Σ_i (de_i/dθ)ᵀ dL/de_i: the embeddings' gradients are made once, on the whole batch, and
pulled through the encoder chunk by chunk. How much memory and time that takes is in ``docs/grad_cache.md``.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Encoder = Callable[..., Tensor]


class _Chunk(NamedTuple):
    """Some rows of one batch, with its encoder."""

    encoder: Encoder
    batch: int
    rows: Any
    length: int
    last: bool  # of all chunks of its encoder
    frozen: bool  # the encoder learns nothing

    def embeddings(self) -> Tensor:
        if isinstance(self.rows, Mapping):
            found = self.encoder(**self.rows)
        elif isinstance(self.rows, (tuple, list)):
            found = self.encoder(*self.rows)
        else:
            found = self.encoder(self.rows)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"an encoder must return a tensor, one embedding a row, got {type(found).__name__}: "
                "wrap it in a function that returns the embeddings"
            )
        if found.dim() == 0 or len(found) != self.length:
            raise ValueError(f"an encoder must return a row for each of {self.length}, got shape {tuple(found.shape)}")
        return found

    def without_reduction(self) -> contextlib.AbstractContextManager[Any]:
        """Where DDP leaves the gradients to be summed on this rank: in every chunk but its encoder's last."""
        no_sync = getattr(self.encoder, "no_sync", None)
        return contextlib.nullcontext() if self.last or no_sync is None else no_sync()


def grad_cache_step(
    encoders: Encoder | Sequence[Encoder],
    batches: Sequence[Any],
    loss: Callable[..., Tensor],
    chunk: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Forward and backward of ``loss(*embeddings)``, ``chunk`` rows at a time through the encoders.

    Every batch is encoded twice: without a graph, and, once the loss of all embeddings has given their gradients, chunk
    by chunk with one. Gradients are added to the parameters' ``grad``, as by ``loss.backward()``, and are those of one
    call on the whole batch, as long as an embedding depends on its own row alone (BatchNorm in training mode sees
    chunks). Both passes draw the same random numbers (dropout), of the CPU's generator and of each GPU's in use.

    Args:
        encoders: callable, or one for each batch. An encoder wrapped in ``DistributedDataParallel`` is passed as the
            wrapper: it then reduces its gradients once, in its last chunk.
        batches: a list of batches, such as two views, or images and texts. A batch is a tensor of rows [N, ...], or a
            dict (``encoder(**batch)``) or tuple (``encoder(*batch)``) of them; what else is in it is passed on.
        loss: gets the embeddings of each batch [N, D], in order, and returns a [] tensor. Its own parameters get their
            gradients too.
        chunk: rows a chunk.
        scaler: scales the loss before its gradients are made; ``scaler.step`` and ``scaler.update`` follow as usual.

    Returns:
        The loss, unscaled and without a graph.

    Raises:
        TypeError, ValueError: an argument, an embedding or the loss has the wrong type or shape.

    Inside ``torch.autocast`` the encoders and the loss run in its dtype, the backward passes outside, as they should.

    Example:
        >>> encoder = torch.nn.Linear(8, 4)
        >>> views = torch.randn(64, 8), torch.randn(64, 8)
        >>> loss = sslfast.grad_cache_step(encoder, views, sslfast.NTXentLoss(), chunk=16)
        >>> loss.shape, encoder.weight.grad.shape
        (torch.Size([]), torch.Size([4, 8]))

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive whole number, got {chunk!r}")
    chunks = _chunks(encoders, batches, chunk)
    devices = _devices(encoders, batches)
    states, leaves = [], []
    with torch.no_grad():
        for part in chunks:
            states.append(_RandomState(devices))
            leaves.append(part.embeddings().detach())
    torch.clear_autocast_cache()  # weights that were cast without a graph
    for part, leaf in zip(chunks, leaves, strict=True):
        leaf.requires_grad_(not part.frozen)
    value = loss(*_joined(chunks, leaves))
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a tensor without dimensions, got {got}")
    with _no_autocast(devices):
        (value if scaler is None else scaler.scale(value)).backward()
    after = _RandomState(devices)
    try:
        for part, state, leaf in zip(chunks, states, leaves, strict=True):
            if leaf.grad is not None:
                state.restore()
                _pull(part, leaf.grad, devices)
                leaf.grad = None  # its memory is free from here on
    finally:
        after.restore()
    return value.detach()


def _joined(chunks: Sequence[_Chunk], embeddings: Sequence[Tensor]) -> Iterator[Tensor]:
    """The embeddings of each batch."""
    for number in range(chunks[-1].batch + 1):
        yield torch.cat([x for part, x in zip(chunks, embeddings, strict=True) if part.batch == number])


def _pull(part: _Chunk, gradient: Tensor, devices: Iterable[torch.device]) -> None:
    """Adds the chunk's gradients, from that of its embeddings."""
    with part.without_reduction():
        again = part.embeddings()
        if again.requires_grad:
            with _no_autocast(devices):
                again.backward(gradient)


# ------------------------------------------------------------------------------------------------------------- batches


def _chunks(encoders: Encoder | Sequence[Encoder], batches: Sequence[Any], chunk: int) -> list[_Chunk]:
    if not isinstance(batches, (list, tuple)) or not batches:
        raise TypeError(f"batches must be a list of batches, one for each encoder, got {type(batches).__name__}")
    each: list[Any] = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders] * len(batches)
    if len(each) != len(batches):
        raise ValueError(f"encoders must be one callable or one for each batch, got {len(each)} for {len(batches)}")
    found = []
    for number, (encoder, batch) in enumerate(zip(each, batches, strict=True)):
        rows = _rows(number, batch)
        learns = not isinstance(encoder, nn.Module) or any(
            t.requires_grad for t in (*encoder.parameters(), *_tensors(batch))
        )
        for start in range(0, rows, chunk):
            end = min(start + chunk, rows)
            part = _map(batch, operator.itemgetter(slice(start, end)))
            found.append(_Chunk(encoder, number, part, end - start, False, not learns))
    last = {id(part.encoder): i for i, part in enumerate(found)}
    return [part._replace(last=last[id(part.encoder)] == i) for i, part in enumerate(found)]


def _rows(number: int, batch: Any) -> int:
    """How many rows a batch has, the same in every tensor of it."""
    sizes = sorted({len(t) for t in _tensors(batch)})
    if not sizes:
        raise TypeError(f"batches[{number}] must hold a tensor of rows [N, ...], got {type(batch).__name__}")
    if len(sizes) > 1 or sizes[0] == 0:
        raise ValueError(
            f"the tensors of batches[{number}] must have the same number of rows, at least one, "
            f"got {', '.join(map(str, sizes))}"
        )
    return sizes[0]


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """``batch`` with ``function`` of every tensor of rows in it."""
    if isinstance(batch, Tensor):
        return function(batch) if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: _map(value, function) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_map(value, function) for value in batch]
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(batch, found.append)
    return found


# ------------------------------------------------------------------------------------- random numbers, and the autocast


def _devices(encoders: Encoder | Sequence[Encoder], batches: Sequence[Any]) -> list[torch.device]:
    """Where the rows and the encoders' parameters are; each device once, one at least."""
    each = encoders if isinstance(encoders, (list, tuple)) else [encoders]
    parameters = [t for encoder in each if isinstance(encoder, nn.Module) for t in encoder.parameters()]
    return list(dict.fromkeys(t.device for t in (*_tensors(batches), *parameters)))


class _RandomState:
    """The generators of the CPU and of some devices, as they are now."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = []
        for device in devices:
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                self.others.append((module, device, module.get_rng_state(device)))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for module, device, state in self.others:
            module.set_rng_state(state, device)


@contextlib.contextmanager
def _no_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    with contextlib.ExitStack() as regions:
        for kind in {device.type for device in devices} - {"meta"}:
            regions.enter_context(torch.autocast(kind, enabled=False))
        yield
