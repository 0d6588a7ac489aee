"""The house: which part of the package may import which, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sslfast

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sslfast"

# Lowest first. What stands on one floor may import its own floor and those below.
FLOORS = (
    ("_version", "_library", "_checks", "_backends", "_native", "_random", "_warn"),
    ("reference",),
    ("ops",),
    ("distributed",),
    ("losses", "nn", "augment", "pretext", "masking", "clustering", "grad_cache"),
    ("adapters",),
    ("__init__", "__main__"),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def modules() -> dict[str, Path]:
    """Every module by its full name; a package by that of its ``__init__``."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, in functions too; the kernels belong to a folder of their own."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            bases: list[tuple[str, list[str]]] = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            bases = [(".".join([*start, *filter(None, [node.module])]), [alias.name for alias in node.names])]
        else:
            continue
        for base, names in bases:
            found = [m for item in names for m in (f"{base}.{item}", f"{base}.{item}.__init__") if m in MODULES]
            yield from found
            if len(found) < len(names) or not names:
                yield from (module for module in (base, f"{base}.__init__") if module in MODULES)


ARROWS = sorted({(name, target) for name in MODULES for target in imports(name) if target != name})


def part(name: str) -> str:
    return name.split(".")[1]


def test_imports_are_found() -> None:
    assert ("sslfast.losses.contrastive.nt_xent", "sslfast.ops.nt_xent") in ARROWS
    assert ("sslfast.distributed.choose", "sslfast.distributed.ring") in ARROWS  # inside a function
    assert ("sslfast.__init__", "sslfast.augment.__init__") in ARROWS
    assert {part(name) for name in MODULES} == set(FLOOR)


def test_no_arrow_leads_up() -> None:
    assert [(a, b) for a, b in ARROWS if FLOOR[part(a)] < FLOOR[part(b)]] == []


def test_no_module_imports_itself_on_the_way_round() -> None:
    targets: dict[str, list[str]] = {}
    for name, target in ARROWS:
        targets.setdefault(name, []).append(target)
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in targets.get(name, ()):
                walk(target, (*way, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


def test_families_of_losses_do_not_import_one_another() -> None:
    families = {path.parent.name for path in PACKAGE.glob("losses/*/__init__.py")}
    assert {"contrastive", "decorrelation", "distillation", "masked"} <= families
    found = [(a.split("."), b.split(".")) for a, b in ARROWS if part(a) == part(b) == "losses"]
    assert [(a, b) for a, b in found if {a[2], b[2]} <= families and a[2] != b[2]] == []


def test_no_part_imports_what_is_private_to_another() -> None:
    """``a.b._c`` is for what lies in ``a.b``."""
    wrong = []
    for name, target in ARROWS:
        words = target.split(".")
        private = [i for i, word in enumerate(words) if word.startswith("_") and word != "__init__"]
        if private and not name.startswith(".".join(words[: private[0]]) + "."):
            wrong.append((name, target))
    assert wrong == []


def test_public_names_are_born_above_the_reference() -> None:
    born = {name: getattr(sslfast, name).__module__ for name in sslfast.__all__}
    assert [name for name, module in born.items() if module.startswith("sslfast.reference")] == []
