"""The documentation: what it lists, where it links, and that what it shows runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sslfast
import sslfast.distributed
import sslfast.pretext
from adapter_common import peer
from sslfast.adapters import _patch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
PUBLIC = (
    *(sslfast, sslfast.augment, sslfast.pretext, sslfast.masking, sslfast.masking.compat, sslfast.nn),
    sslfast.distributed,
)
LISTED = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
FENCE = re.compile(r"^(```+)[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
# A Python block, and a comment just before it: "needs <package>", "not run: <why>", "script", "script on <W> ranks".
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^>]*?)\s*-->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules() -> Iterator[ModuleType]:
    """sslfast's Python modules, but for the adapters that need the package that they adapt."""
    yield sslfast
    for found in pkgutil.walk_packages(sslfast.__path__, "sslfast."):
        path, _, name = found.name.rpartition(".")
        compiled = path == "sslfast" and name in ("_C", "_C_cuda", "_host", "kernels")
        if not compiled and name != "__main__" and (path != "sslfast.adapters" or name in ("_patch", "_serve")):
            yield importlib.import_module(found.name)


# ------------------------------------------------------------------------------------------------------- what is listed


def test_api_pages_list_what_is_public() -> None:
    pages = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    listed = LISTED.findall(pages)
    public = {f"{module.__name__}.{name}" for module in PUBLIC for name in module.__all__}
    assert sorted(listed) == sorted(public)


def test_losses_at_a_glance_has_every_loss() -> None:
    page = (DOCS / "losses.md").read_text("utf-8")
    losses = [name for name in sslfast.__all__ if getattr(sslfast, name).__module__.startswith("sslfast.losses.")]
    types = {"CosineDiagnostics", "CrossCorrelation", "Diagnostics", "MemoryQueue", "PrototypeDiagnostics"}
    types |= {"Data2VecDiagnostics", "PrototypeUsage", "VISRegComponents"}
    assert len(losses) > 40
    assert [name for name in losses if name not in types and f"`{name}`" not in page] == []


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_what_is_public_exists_and_has_an_example(module: ModuleType) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) and ">>> " not in (value.__doc__ or ""):
            missing.append(name)
    assert missing == []


def test_the_install_lines_are_the_same_and_leave_nothing_out() -> None:
    """``--no-deps`` keeps pip from replacing PyTorch, so what else is needed, and what builds, is named before it."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = {
        re.split(r"[<>=]", name)[0]
        for lists in re.findall(r"^(?:requires|dependencies) = \[([^\]]*)\]", text, re.MULTILINE)
        for name in re.findall(r'"([^"]+)"', lists)
    } - {"torch"}
    assert {"numpy", "pybind11", "ninja", "setuptools"} <= needed
    found = {}
    for page in (ROOT / "README.md", DOCS / "getting-started.md", DOCS / "slow.md"):
        found[page.name] = re.findall(r"^(python -m pip install .*)$", page.read_text("utf-8"), re.MULTILINE)[:2]
    first, second = found["README.md"]
    assert all(lines == [first, second] for lines in found.values()), found
    assert second.endswith("--no-deps .")
    named = {re.split(r"[<>=]", word.strip('"'))[0] for word in first.split()[4:]}
    assert needed <= named


# ------------------------------------------------------------------------------------------------------------ the links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in titles}


def test_generated_tables_are_there() -> None:
    """A page whose table was never filled says nothing."""
    blocks = [
        (page.name, *found)
        for page in PAGES
        for found in re.findall(
            r"^<!-- benchmark:(\w+) -->\n(.*?)^<!-- /benchmark -->", page.read_text("utf-8"), re.M | re.S
        )
    ]
    assert {"README.md", "measured.md", "limits.md", "scripts.md"} <= {page for page, _, _ in blocks}
    assert [(page, op) for page, op, table in blocks if "|---" not in table] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        # The site has nothing but docs/ and the README and the pictures of docs/hooks.py.
        shown = DOCS in target.parents or (target.parent, target.suffix) == (ROOT / "benchmarks" / "results", ".png")
        inside = shown or DOCS not in page.parents
        if not target.exists() or not inside or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


# --------------------------------------------------------------------------------------------------- what is shown runs


@pytest.fixture
def unpatched() -> Iterator[None]:
    yield
    for package in list(_patch._active):
        sslfast.unpatch(package)


def with_blocks(page: Path) -> bool:
    return "```python\n" in page.read_text("utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if with_blocks(page)], ids=relative)
def test_code_blocks_run(page: Path, unpatched: None) -> None:
    """As a reader pastes them: in order, into one namespace that has nothing but what the page has shown.

    On the page of a package that can be patched, the package is needed. Scripts are run by the tests below.
    """
    text = page.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python\n")
    for name in {page.stem} & {name for name, known in _patch.PACKAGES.items() if known.distribution}:
        peer(name)
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks:
        kind, _, rest = (block["note"] or "").partition(" ")
        assert kind in ("", "needs", "not", "script"), f"{relative(page)}: {block['note']!r}"
        if kind == "not":
            assert rest.startswith("run: "), f"{relative(page)}: {block['note']!r}"
        if kind in ("not", "script"):
            continue
        if kind == "needs":
            peer(rest)
        line = text.count("\n", 0, block.start("code"))
        exec(compile("\n" * line + block["code"], relative(page), "exec"), namespace)


def scripts() -> dict[str, str]:
    """The blocks that are whole scripts, by page and note."""
    return {
        f"{relative(page)}: {block['note']}": block["code"]
        for page in PAGES
        for block in BLOCK.finditer(page.read_text("utf-8"))
        if (block["note"] or "").startswith("script")
    }


SCRIPTS = scripts()


def run_script(code: str, folder: Path, *launcher: str) -> str:
    """What the script prints, started in ``folder`` where it also leaves its files."""
    (folder / "train.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "train.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_scripts_are_known() -> None:
    assert list(SCRIPTS) == ["docs/scaling.md: script on 2 ranks", "docs/training.md: script"]


def test_the_training_script_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    """From the checkpoint of its last epoch but one, which a run keeps here when it goes on."""
    code = SCRIPTS["docs/training.md: script"]
    keeping = code.replace('"epoch": epoch}, CHECKPOINT)', '"epoch": epoch}, CHECKPOINT if epoch < 2 else "last.pt")')
    assert keeping != code
    whole = run_script(keeping, tmp_path).splitlines()
    assert [line.split(":")[0] for line in whole] == ["epoch 0", "epoch 1", "epoch 2"]
    assert whole[0].split("temperature")[1] != whole[2].split("temperature")[1]  # it learns
    assert run_script(code, tmp_path).splitlines() == whole[2:]


def test_the_temperature_of_the_script_for_ranks_stays_one(tmp_path: Path) -> None:
    """Every rank trains one model, the loss's own parameter included."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    said = run_script(SCRIPTS["docs/scaling.md: script on 2 ranks"], tmp_path, *launcher)
    found = dict(re.findall(r"rank (\d): temperature ([\d.]+)", said))
    assert set(found) == {"0", "1"} and found["0"] == found["1"] != "0.5000000"


def examples() -> list[doctest.DocTest]:
    """Of every docstring in sslfast; those of private names too."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for module in modules():
        for test in finder.find(module, extraglobs={"torch": torch, "sslfast": sslfast}):
            if test.examples:
                found[test.name] = test
    return list(found.values())


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring_examples(example: doctest.DocTest, unpatched: None) -> None:
    if example.name.startswith("sslfast.adapters."):
        peer("lightly")
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


def test_every_documented_example_was_found() -> None:
    """None is lost to how doctest walks through modules: a name that is imported elsewhere, a decorated function."""
    found = {test.docstring for test in examples()}
    for module in PUBLIC:
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                assert value.__doc__ in found, f"{module.__name__}.{name}"


# ------------------------------------------------------------------------------------------------------------- the site


def markdown(docstring: str, **links: str) -> str:
    pytest.importorskip("griffe", reason="needs requirements-docs.txt")
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("docstrings").markdown(inspect.cleandoc(docstring), links)
    finally:
        sys.path.remove(str(DOCS))


def test_docstrings_become_markdown() -> None:
    made = markdown(
        """Head of :func:`moco` and :mod:`sslfast.moco`::

            formula

        Args:
            a, b: one [N, D],
                and more.
            The others are those of :func:`sslfast.losses.contrastive.moco.moco`.

        Raises:
            As :func:`nothing`.

        Example:
            >>> 1 + 1
            2

        Source: a paper.
        """,
        moco="sslfast.moco",
    )
    assert "Head of [`moco`][sslfast.moco] and `sslfast.moco`:\n\n    formula\n" in made
    assert "**Arguments**\n\n\n- `a`, `b`: one [N, D],\n    and more.\n\nThe others are those of [`moco`]" in made
    assert "**Raises**\n\nAs `nothing`." in made
    assert "```pycon\n>>> 1 + 1\n2\n```\n" in made
    assert "**Source.** a paper." in made


def test_site_builds(tmp_path: Path) -> None:
    """Strictly (so not --quiet): a dead link or anchor, a page that the navigation lacks, an unknown name fails."""
    pytest.importorskip("mkdocs", reason="needs requirements-docs.txt")
    pytest.importorskip("mkdocstrings", reason="needs requirements-docs.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: path.read_text("utf-8") for path in (tmp_path / "site").rglob("*.html")}
    for path, page in pages.items():
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?:[^\"]*)", page)
        assert not [address for address in loaded if "canonical" not in address], path.name
    front = pages[tmp_path / "site" / "index.html"]
    headings = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(headings) > 5 and [title for title in [*headings, "Where to look"] if f">{title}<" not in front] == []
    reference = "".join(page for path, page in pages.items() if path.parent.name == "api")
    for module in PUBLIC:
        for name in module.__all__:
            if name != "pretext":
                assert f'id="{module.__name__}.{name}"' in reference, name
    assert not re.search(r":(func|class|mod):", reference) and "<p>Args:" not in reference
    assert "doc-symbol-module" not in reference  # a function whose module has its name
    assert "::: sslfast" not in reference
