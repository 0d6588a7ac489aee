"""What a type checker tells a user of sslfast, and what importing sslfast loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Checked, never run. Each line marked "error" is one that a user should be told about.
CONSUMER = """
from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import sslfast
from sslfast import Diagnostics, masking
from sslfast.augment import MultiViewTransform, ViewParams, ViewSpec, apply, recipe, sample_params
from sslfast.distributed import Scope, scope_of

z = torch.randn(4, 8)
Both = tuple[Tensor, Diagnostics]
loss = torch.zeros(())


assert_type(sslfast.nt_xent(z, z), Tensor)
assert_type(sslfast.info_nce(z, z), Tensor)
assert_type(sslfast.info_nce(z, z, negatives=(z, z[:, None]), ids=(z, z)), Tensor)
assert_type(sslfast.moco(z, z, z), Tensor)
assert_type(sslfast.contrastive_diagnostics(z, z), Diagnostics)
assert_type(sslfast.contrastive_diagnostics(z, z).accuracy, Tensor)
assert_type(sslfast.moco_v3(z, z), Tensor)
assert_type(sslfast.sup_con(z[:, None], z), Tensor)
assert_type(sslfast.dcl(z, z), Tensor)
assert_type(sslfast.dclw(z, z), Tensor)
assert_type(sslfast.macl(z, z), Tensor)
assert_type(sslfast.co2(z, z), Tensor)
assert_type(sslfast.clip(z, z, 10.0), Tensor)
assert_type(sslfast.multiple_negatives_ranking(z, z), Tensor)
assert_type(sslfast.similarity_lse(z, z, 1.0), Tensor)
assert_type(sslfast.similarity_lse(z, z, 1.0, columns=True), tuple[Tensor, Tensor])
assert_type(sslfast.sig_lip(z, z, 10.0), Tensor)
assert_type(sslfast.barlow_twins(z, z), Tensor)
assert_type(sslfast.cross_correlation_loss(z, z).on_diagonal, Tensor)
assert_type(sslfast.second_moment(z).off_diagonal, Tensor)
assert_type(sslfast.similarity_terms(z, z, 1.0).col_lse, Tensor | None)
assert_type(sslfast.tico(z, z), tuple[Tensor, Tensor])
assert_type(sslfast.NTXentLoss().forward(z, z), Tensor | Both)
assert_type(sslfast.BarlowTwinsLoss().forward(z, z), Tensor)
with sslfast.use_backend("reference"):
    loss += sslfast.vicreg(z, z)
with sslfast.patch("lightly") as patched:
    assert_type(patched, sslfast.Patch)
    assert_type(patched.replaced, tuple[str, ...])

assert_type(masking.random_masks(4, (14, 14)), masking.Masks)
assert_type(masking.embed_patches(z, None, z, patch_size=16), Tensor)
assert_type(masking.compat.random_masking(z, 0.75), tuple[Tensor, Tensor, Tensor])
assert_type(recipe("dino"), list[ViewSpec])
assert_type(sample_params(z, recipe("dino")), ViewParams)
assert_type(apply(z, z, recipe("dino")), list[Tensor])
assert_type(apply(z, z, recipe("dino"), stacked=True), Tensor)
assert_type(MultiViewTransform(ViewSpec(size=32))(z), list[Tensor] | Tensor)
assert_type(scope_of(False), Scope)

sslfast.nt_xent(z, z, temprature=0.1)  # error: call-arg
sslfast.clip(z, z)  # error: call-arg
sslfast.barlow_twins(z, z, form=3)  # error: arg-type
sslfast.MoCoLoss("65536")  # error: arg-type
sslfast.nt_xend(z, z)  # error: attr-defined
"""


def test_a_consumer_under_strict_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy")
    page = tmp_path / "consumer.py"
    page.write_text(CONSUMER)
    # Kept between runs: most of the time goes into torch.
    cache = ROOT / ".mypy_cache" / "consumer"
    # As of an installed package: its annotations count, what strict mypy thinks of its bodies does not.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    command += [f"--cache-dir={cache}", str(page)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    lines = CONSUMER.splitlines()
    expected = {i: line.split("# error: ")[1] for i, line in enumerate(lines, 1) if "# error: " in line}
    found = {}
    for message in done.stdout.splitlines():
        if ": error: " in message:
            place, _, text = message.partition(": error: ")
            assert place.startswith("consumer.py:"), message
            found[int(place.split(":")[1])] = text.rpartition("[")[2].rstrip("]")
    assert found == expected, done.stdout + done.stderr


def test_importing_sslfast_is_light() -> None:
    """Neither the compiler, nor Triton, nor another package that only some calls need."""
    heavy = (
        *("torch._dynamo", "torch._inductor", "torch.distributed.nn", "torch.fx.experimental.symbolic_shapes"),
        *("triton", "scipy", "sklearn", "matplotlib", "PIL", "pandas", "torchvision", "kornia", "mkdocs"),
        *("lightly", "solo", "open_clip", "pytorch_metric_learning", "sentence_transformers", "transformers", "timm"),
    )
    code = "import sys, torch; before = set(sys.modules); import sslfast; print(*sorted(set(sys.modules) - before))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "sslfast.losses.contrastive.nt_xent" in loaded
    outside = [name for name in loaded if any(name == h or name.startswith(f"{h}.") for h in heavy)]
    assert outside == []
