"""What a case is, how it is made, and when its results are right."""

from __future__ import annotations

import contextlib
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sslfast

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rounding, relative to the largest entry; sums may be in another order than on the CPU.
ALLOWED = {torch.float64: 1e-12, torch.float32: 8e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Function = Callable[..., Any]


class Case(NamedTuple):
    """One call.

    Attributes:
        operators: names of the operators that it calls.
        prepare: of a device ("cpu", "cuda", "cuda:1"): puts the inputs there, and returns a call without arguments
            that gives results and gradients, as often as it is called. The call copies nothing from the host but for
            the first time.
        exact: floating-point results have the same bits on every device.
        floor: the size of a result's terms where they cancel, for the rounding that is allowed.
        level: what a result may be off by besides: a grey level, where PIL rounds to bytes on the way.
        share: of a result's entries, may differ by more: where a later operation makes more of a grey level.
    """

    name: str
    operators: tuple[str, ...]
    prepare: Callable[[str], Callable[[], list[Tensor]]]
    exact: bool = False
    floor: float = 0.0
    level: float = 0.0
    share: float = 0.0

    def run(self, device: str) -> list[Tensor]:
        return self.prepare(device)()


def case(name: str, operators: Sequence[str], make: Callable[[], tuple[Any, ...]], **options: Any) -> Case:
    """``make`` draws, on the CPU: a function and its arguments; gradients are taken for those that require one."""

    def prepare(device: str) -> Callable[[], list[Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(name.encode()))
            function, *drawn = make()
        leaves: list[Tensor] = []

        def there(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [there(part) for part in x]
            if not isinstance(x, Tensor):
                return x
            moved = x.detach().to(device, copy=True).requires_grad_(x.requires_grad)
            leaves.extend([moved] * x.requires_grad)
            return moved

        inputs = [there(x) for x in drawn]
        waves: list[Tensor] = []  # gradients of the results: not 1, and the same on every device

        def call() -> list[Tensor]:
            with filled_memory(), sslfast.use_backend(torch.device(device).type):
                found = flat(function(*inputs))
                if not leaves:
                    return found
                through = [t for t in found if t.requires_grad]
                if not waves:
                    for t in through:
                        wave = torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape) + 0.5
                        waves.append(wave.to(t))
                gradients = torch.autograd.grad(through, leaves, waves)
            return [*(t.detach() for t in found), *gradients]

        return call

    return Case(name, tuple(operators), prepare, **options)


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Memory from ``torch.empty`` and its like comes filled with NaN, or the largest number of its dtype."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, of a tuple or of a dataclass."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, (tuple, list)) else vars(result).values()
    return [t for part in parts if not isinstance(part, int) for t in flat(part)]


def difference(case: Case, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with ``actual``, or ``None``: whole numbers and NaN must be the same, the rest to rounding."""
    if len(actual) != len(expected):
        return f"{len(actual)} results, expected {len(expected)}"
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i}: {tuple(a.shape)} of {a.dtype}, expected {tuple(b.shape)} of {b.dtype}"
        a, b = a.detach().cpu(), b.detach().cpu()
        if a.numel() == 0:
            continue
        if case.exact or not a.dtype.is_floating_point:
            wrong = (a != b) & ~(a.isnan() & b.isnan())
        else:
            finite = b[b.isfinite()].double().abs()
            size = max(case.floor, float(finite.amax()) if finite.numel() else 0.0)
            atol = case.level + ALLOWED[a.dtype] * size
            wrong = ~torch.isclose(a.double(), b.double(), rtol=0, atol=atol, equal_nan=True)
        if float(wrong.double().mean()) > case.share:
            at = tuple(int(k) for k in wrong.nonzero()[0])
            return f"result {i}: {int(wrong.sum())} of {a.numel()} differ, first at {at}: {a[at]}, expected {b[at]}"
    return None


def number_wrong(cases: Sequence[Case], fault_of: Callable[[Case], str | None]) -> int:
    """How many cases have a fault, or raise; a line is printed for each."""
    wrong = 0
    for case in cases:
        try:
            fault = fault_of(case)
        except Exception:
            fault = traceback.format_exc()
        if fault is not None:
            wrong += 1
            print(f"WRONG {case.name}: {fault}", flush=True)
    return wrong


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.detach().cpu().contiguous().flatten().view(torch.uint8)

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(actual, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ inputs


def given(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input whose gradient is wanted."""
    return torch.randn(*shape).to(dtype).requires_grad_()


def some_ids(*shape: int, length: int, padded: bool = True) -> Tensor:
    """Distinct in each row; a few are −1."""
    ids = torch.rand(*shape[:-1], length).argsort(-1)[..., : shape[-1]].contiguous()
    return ids.masked_fill(torch.rand(ids.shape) < 0.1, -1) if padded else ids


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
