"""Imports point one way, cli → workflows → pipeline, adaptors → stores, and so do those between the folders of a room.

What a room, or a folder of one, must not import stays out of it: torch out of `stores`, timm and images out of
`adaptors`, input and output out of `stores/format`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scripts.import_graph import LEVELS, graph, sources_of_folder
from tests.helpers.places import ROOT

PACKAGE = ROOT / "coldtap"

# For each part, the parts it may import besides itself.
ALLOWED_PARTS = {
    "cli": {"workflows", "pipeline", "adaptors", "stores"},
    "workflows": {"pipeline", "adaptors", "stores"},
    "pipeline": {"stores"},
    "adaptors": {"stores"},
    "stores": set(),
}
HALL = {"device", "errors", "extras", "text", "version"}  # ground that every part may import
BANNED_LIBRARIES = {
    "cli": set(),
    "workflows": set(),
    "pipeline": set(),
    "adaptors": {"timm", "torchvision", "PIL"},
    "stores": {"torch", "timm", "torchvision"},
}


# What reads or writes, or finds out where it runs: `stores/format` turns bytes into meaning and back, and no more.
IO_MODULES = {"os", "pathlib", "shutil", "mmap", "fcntl", "tempfile", "socket", "subprocess", "glob", "stat", "urllib"}


def io_of_format(source: str) -> list[str]:
    """Return one line for each import or call of a module of `stores/format` that does input or output."""
    tree = ast.parse(source)
    found = [
        f"line {line}: imports {name}"
        for line, name in imported_names(tree)
        if name.partition(".")[0] in IO_MODULES
        or (name.startswith("coldtap.stores.") and name.split(".")[2] != "format")
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {"open", "print", "input"}
    return found + [
        f"line {call.lineno}: calls {call.func.id}"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in names
    ]


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


@pytest.mark.parametrize("level", LEVELS)
def test_no_folder_imports_in_a_circle(level):
    whole = graph(sources_of_folder(ROOT), level)
    assert len(whole.boxes) > 5
    assert whole.circles() == []


@pytest.mark.parametrize(
    ("level", "module", "source", "circle"),
    [
        (1, "coldtap.stores.reading.new", "from coldtap.workflows.predict import Predictor", ["stores", "workflows"]),
        (2, "coldtap.stores.format.new", "import coldtap.stores.reading.store", ["stores/format", "stores/reading"]),
        (
            2,
            "coldtap.stores.storage.new",
            "def f():\n    from coldtap.stores.writing import writer",
            ["stores/storage"],
        ),
        (2, "coldtap.adaptors.data.new", "from coldtap.adaptors.training import loop", ["adaptors/data"]),
    ],
)
def test_a_planted_circle_is_found(level, module, source, circle):
    found = graph({**sources_of_folder(ROOT), module: source}, level).circles()
    assert len(found) == 1
    assert {*circle} <= {*found[0]}


def test_the_hall_imports_no_room():
    whole = graph(sources_of_folder(ROOT), 1)
    assert not [arrow for arrow in whole.arrows if arrow[0] in HALL and arrow[1] not in HALL]


def test_of_the_library_only_workflows_joins_pipeline_and_adaptors():
    arrows = graph(sources_of_folder(ROOT), 1).arrows
    joins = {start for start, end in arrows if end == "pipeline"} & {
        start for start, end in arrows if end == "adaptors"
    }
    assert joins == {"workflows", "cli", "__init__"}  # the face names the verbs of all rooms, and loads none
    assert not [start for start, end in arrows if end == "cli"]


def test_the_format_does_no_input_or_output():
    modules = sorted((PACKAGE / "stores" / "format").glob("*.py"))
    assert len(modules) > 10
    found = {path.name: io_of_format(path.read_text(encoding="utf-8")) for path in modules}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "from pathlib import Path",
        "from coldtap.stores.storage.local import LocalStorage",
        "from coldtap.stores.reading.store import open_store",
        "def f():\n    return open('x')",
    ],
)
def test_planted_input_and_output_is_caught(source):
    assert len(io_of_format(source)) == 1
    assert io_of_format("import io, zarr, numpy\nfrom coldtap.stores.format.codes import encode") == []
