"""Views in data loaders and their workers, for clips, and whatever PyTorch's default device is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import sslfast
from augment_common import noise
from sslfast.augment import MultiViewTransform, ViewParams, ViewSpec

COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey_p": 0.2, "solarize_p": 0.2}
GLOBAL = ViewSpec(32, scale=(0.4, 1.0), blur_p=0.5, blur_kernel=9, **COLOURS)
LOCAL = ViewSpec(20, scale=(0.05, 0.4), blur_p=0.5, blur_kernel=9, interpolation="bicubic", **COLOURS)
VIEWS = [GLOBAL, LOCAL, GLOBAL]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Augmented(Dataset):
    """Images by their index, augmented one by one where the worker is."""

    def __init__(self, images: Tensor, epoch: int) -> None:
        self.images = images
        self.epoch = epoch
        self.transform = MultiViewTransform(VIEWS, seed=8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index], index, epoch=self.epoch)


@pytest.mark.parametrize(
    ("start", "backend"),
    [("fork", "reference"), ("fork", "cpu"), pytest.param("spawn", "cpu", marks=pytest.mark.slow)],
)
def test_workers_give_what_the_main_process_gives(start: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLFAST_BACKEND", backend)  # read where a spawned worker imports the package
    dataset = Augmented(noise(10, 3, 40, 50), epoch=6)
    with sslfast.use_backend(backend):
        expected = dataset.transform(dataset.images, range(10), epoch=6)
        loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=start)
        batches = list(loader)
    assert same([torch.cat(parts) for parts in zip(*batches, strict=True)], expected)


class WithParams(Augmented):
    """Items that hold what was drawn for them, too."""

    def __getitem__(self, index: int) -> tuple[list[Tensor], ViewParams]:  # type: ignore[override]
        params = self.transform.sample_params(self.images[index], index, epoch=self.epoch)
        return self.transform.apply(self.images[index], params), params  # type: ignore[return-value]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_of_a_data_loader_hold_parameters(workers: int) -> None:
    dataset = WithParams(noise(7, 3, 40, 50), epoch=2)
    begin = 0
    for views, params in DataLoader(dataset, batch_size=3, num_workers=workers):
        end = begin + len(views[0])
        images = dataset.images[begin:end]
        expected = dataset.transform.sample_params(images, range(begin, end), epoch=2)
        assert isinstance(params, ViewParams) and torch.equal(params.table, expected.table)
        assert same(dataset.transform.apply(images, params), views)
        begin = end
    assert begin == 7


@pytest.mark.gpu
def test_parameters_of_a_data_loader_are_pinned() -> None:
    loader = DataLoader(WithParams(noise(4, 3, 40, 50), epoch=2), batch_size=2, pin_memory=True)
    assert next(iter(loader))[1].table.is_pinned()


def test_whatever_the_default_device_is() -> None:
    transform = MultiViewTransform(VIEWS)
    for images in (noise(2, 3, 40, 50), [noise(3, 30, 40), noise(3, 50, 20)], noise(2, 40, 50, 3).numpy()):
        for ids in ([3, 4], torch.tensor([3, 4])):
            expected = transform(images, ids, epoch=1)
            with torch.device("meta"):
                assert same(transform(images, ids, epoch=1), expected)


def test_clips_have_one_draw_where_frames_share_an_id() -> None:
    clips, ids = noise(2, 5, 3, 40, 50), torch.tensor([7, 9])
    transform = MultiViewTransform(VIEWS)
    frames = transform(clips.flatten(0, 1), ids.repeat_interleave(5), epoch=1)
    params = transform.sample_params(clips.flatten(0, 1), ids.repeat_interleave(5), epoch=1)
    drawn = params.table.unflatten(1, (2, 5))
    assert torch.equal(drawn, drawn[:, :, :1].expand_as(drawn)) and not torch.equal(drawn[:, 0], drawn[:, 1])
    assert same([view.unflatten(0, (2, 5))[:, 2] for view in frames], transform(clips[:, 2], ids, epoch=1))
