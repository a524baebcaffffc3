"""Imports point one way, cli → pipeline, adaptors → stores; and what a part must not import stays out of it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "coldtap"

# For each part, the parts it may import besides itself.
ALLOWED_PARTS = {
    "cli": {"workflows", "pipeline", "adaptors", "stores"},
    "workflows": {"pipeline", "adaptors", "stores"},
    "pipeline": {"stores"},
    "adaptors": {"stores"},
    "stores": set(),
}
HALL = {"errors", "extras", "text", "version"}  # ground that every part may import
BANNED_LIBRARIES = {
    "cli": set(),
    "workflows": set(),
    "pipeline": set(),
    "adaptors": {"timm", "torchvision", "PIL"},
    "stores": {"torch", "timm", "torchvision"},
}


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of every import, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            # `from coldtap import stores` names the part only in the alias.
            names = [f"coldtap.{alias.name}" for alias in node.names] if origin == "coldtap" else [origin]
            yield from ((node.lineno, name) for name in names)


def violations(part: str, source: str) -> list[str]:
    """Return one line for each import of `source`, a module of `part`, that points the wrong way."""
    found = []
    for line, name in imported_names(ast.parse(source)):
        library, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if not library:
            found.append(f"line {line}: relative import {name}")
        elif library in BANNED_LIBRARIES[part]:
            found.append(f"line {line}: {part} imports {library}")
        elif library == "coldtap" and target not in {part} | HALL | ALLOWED_PARTS[part]:
            found.append(f"line {line}: {part} imports {name}")
    return found


def modules_after(code: str) -> set[str]:
    """Run `code` in a fresh interpreter and return the top-level modules that it loaded."""
    report = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


IMPORT_ALL = """
import importlib, pkgutil
import coldtap.{part} as part
for module in pkgutil.walk_packages(part.__path__, part.__name__ + "."):
    importlib.import_module(module.name)
"""


def test_top_level_is_exactly_the_parts_and_the_hall():
    found = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert found == {*ALLOWED_PARTS, *(f"{name}.py" for name in HALL), "__init__.py", "py.typed"}


@pytest.mark.parametrize("part", ALLOWED_PARTS)
def test_every_module_imports_in_the_allowed_direction(part):
    modules = sorted((PACKAGE / part).rglob("*.py"))
    assert modules, f"{part} has no modules"
    wrong = [
        f"{module.relative_to(PACKAGE)}: {violation}"
        for module in modules
        for violation in violations(part, module.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("stores", "import torch"),
        ("stores", "import torch.nn.functional as F"),
        ("stores", "def read():\n    from timm.data import create_transform"),
        ("stores", "from coldtap.pipeline.backbones.taps import Tap"),
        ("stores", "from coldtap import cache_features"),
        ("stores", "import coldtap"),
        ("pipeline", "from coldtap.adaptors import probes"),
        ("pipeline", "import coldtap.cli.main"),
        ("adaptors", "from coldtap import stores, pipeline"),
        ("adaptors", "if TYPE_CHECKING:\n    from PIL import Image"),
        ("adaptors", "import numpy, torchvision"),
        ("cli", "from . import demo"),
        ("cli", "from ..stores import errors"),
    ],
)
def test_a_planted_violation_is_caught(part, source):
    assert len(violations(part, source)) == 1


@pytest.mark.parametrize(
    ("part", "source"),
    [
        (
            "stores",
            "import numpy\nfrom coldtap.errors import StoreError\nfrom coldtap.version import __version__",
        ),
        ("pipeline", "import timm\nfrom PIL import Image\nfrom coldtap.stores import errors"),
        ("adaptors", "import torch\nfrom coldtap import adaptors, stores"),
        ("cli", "import timm\nfrom coldtap import adaptors, pipeline, stores"),
        ("stores", "import torchlike\nimport timmy"),
    ],
)
def test_an_allowed_import_is_not_reported(part, source):
    assert violations(part, source) == []


def test_stores_work_in_a_process_without_torch():
    loaded = modules_after(IMPORT_ALL.format(part="stores"))
    assert not loaded & {"torch", "timm", "torchvision"}


def test_adaptors_work_in_a_process_without_timm():
    loaded = modules_after(IMPORT_ALL.format(part="adaptors"))
    assert not loaded & {"timm", "torchvision"}
