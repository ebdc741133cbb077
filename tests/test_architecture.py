"""The rules of the house, read off the source: who may import whom, the seams, what stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import qlora

PACKAGE = Path(qlora.__file__).parent
ROOT = PACKAGE.parent

# A file may import what stands below its own line. What shares a line does not import each other.
LAYERS = (
    ("cli",),
    ("slurm", "infer", "report", "train"),
    ("plan", "checkpoint"),
    ("adapter", "objective"),
    ("lora", "data"),
    ("quant",),
    ("distributed",),
    ("ops",),
    ("config", "model_files"),
    ("errors", "files", "secrets", "version"),  # each stands alone
)
LEVEL = {name: len(LAYERS) - depth for depth, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS) + 1  # qlora/__init__.py and qlora/__main__.py stand above everything
ASSETS_USERS = {"quant", "data", "cli", "infer"}
SEAMS = {
    "bitsandbytes": "qlora.ops.nf4",
    "accelerate": "qlora.distributed.runtime",
    "deepspeed": "qlora.distributed.zero",
}
TORCH_FREE = (
    "qlora.plan",
    "qlora.slurm",
    "qlora.config",
    "qlora.lora.target",
    "qlora.errors",
    "qlora.files",
    "qlora.model_files",
    "qlora.secrets",
    "qlora.version",
)
HEAVY = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets", "peft")


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    names: tuple[str, ...]
    place: str


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands: in functions and under TYPE_CHECKING too, relative ones, by name too."""
    importer = module_name(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, (), place)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names = tuple(alias.name for alias in node.names)
            if base == "qlora":  # `from qlora import errors` names modules
                for name in names:
                    yield Import(importer, f"qlora.{name}", (), place)
            else:
                yield Import(importer, base, names, place)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(importer, node.args[0].value, (), place)


def violations_of_direction(found: Import) -> str | None:
    parts, target = found.importer.split("."), found.imported.split(".")
    if target[0] != "qlora" or len(target) < 2:
        return None
    here, there = parts[1] if len(parts) > 1 else "", target[1]
    if here in ("", "__main__") or here == there:
        return None
    if there == "assets":
        if here not in ASSETS_USERS or len(target) > 2:
            return "the embedded base is reached through qlora.assets alone, by quant, data, cli and infer"
        return None
    if there not in LEVEL:
        return f"{there} has no place in the order"
    if here == "assets":  # what others import from it must stay light; its scripts may run the whole of infer
        lowest = LEVEL["config"] if found.importer == "qlora.assets" else LEVEL["infer"]
        return None if LEVEL[there] <= lowest else f"assets may not import {there}"
    if here not in LEVEL:
        return f"{here} has no place in the order"
    return None if LEVEL[there] < LEVEL[here] else f"{here} may not import {there}"


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in FILES for found in imports_of(path)]


def test_imports_go_one_way() -> None:
    wrong = [f"{i.place}: {reason}: {i.imported}" for i in IMPORTS if (reason := violations_of_direction(i))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("library", "owner"), SEAMS.items())
def test_each_seam_has_one_importer(library: str, owner: str) -> None:
    wrong = [i.place for i in IMPORTS if i.imported.split(".")[0] == library and i.importer != owner]
    assert not wrong, f"only {owner} imports {library}:\n" + "\n".join(wrong)


def test_torch_free_modules_do_not_name_torch() -> None:
    wrong = [
        f"{i.place}: {i.imported}"
        for i in IMPORTS
        if i.importer.startswith(TORCH_FREE) and i.imported.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_free_modules_import_without_torch() -> None:
    """The names alone do not show what an import drags in, so a fresh interpreter tries it."""
    modules = [module_name(path) for path in FILES if module_name(path).startswith((*TORCH_FREE, "qlora.cli"))]
    code = (
        "import importlib, sys\n"
        f"for name in {['qlora', *modules]!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "    if loaded: sys.exit(f'importing {name} loads {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "helper", "common", "misc")]


def test_no_exception_is_swallowed() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"bare except"}
            silent = all(
                isinstance(line, ast.Pass | ast.Continue)
                or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            if node.type is None or (silent and names & {"Exception", "BaseException"}):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {', '.join(sorted(names))}")
    assert not wrong, "\n".join(wrong)


def test_every_file_opens_with_its_idea() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None and path.name != "version.py"
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("qlora.cli.main", "qlora.train.setup", True),
        ("qlora.train.setup", "qlora.checkpoint.save", True),
        ("qlora.train.setup", "qlora.infer.evaluate", False),  # siblings
        ("qlora.lora.layer", "qlora.data.batch", False),  # siblings
        ("qlora.lora.layer", "qlora.ops.nf4", True),
        ("qlora.ops.nf4", "qlora.lora.layer", False),
        ("qlora.config.load", "qlora.errors", True),
        ("qlora.errors", "qlora.config.load", False),
        ("qlora.quant.load", "qlora.assets", True),
        ("qlora.quant.load", "qlora.assets.make_tiny", False),
        ("qlora.lora.layer", "qlora.assets", False),
        ("qlora.assets.quickstart", "qlora.infer.generate", True),
        ("qlora.assets", "qlora.infer.generate", False),
        ("qlora", "qlora.train.setup", True),
        ("qlora.ops.nf4", "qlora.drawer", False),
    ],
)
def test_the_order_itself(importer: str, imported: str, allowed: bool) -> None:
    assert (violations_of_direction(Import(importer, imported, (), "")) is None) == allowed
