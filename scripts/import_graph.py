"""The import graph of the package, folder by folder: boxes, arrows, and the circles that should not be there.

    python scripts/import_graph.py                    # this checkout
    python scripts/import_graph.py --rev 3c720fd      # another commit, such as the one before the rooms were made
    python scripts/import_graph.py --arrows           # every arrow, and the imports behind it

A box is a folder or a file of one level: at level 1 the rooms and the files beside them, at level 2 what is in a room.
An arrow is one or more imports from a box to another, wherever in a module they stand: at its top, in a function, or
under `TYPE_CHECKING`. A circle is a set of boxes each of which can be reached from every other.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "coldtap"
LEVELS = (1, 2)

type Sources = Mapping[str, str]  # a module's dotted name → its text
type Arrows = dict[tuple[str, str], list[str]]  # (from, to) → the imports behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Boxes and arrows at one level of folders."""

    boxes: frozenset[str]
    arrows: Arrows

    def circles(self) -> list[list[str]]:
        """Return the sets of boxes that reach each other, each sorted; none where imports point one way."""
        reached = {box: self._reachable(box) for box in self.boxes}
        circles = {frozenset(other for other in reached[box] if box in reached[other]) for box in self.boxes}
        return sorted(sorted(circle) for circle in circles if len(circle) > 1)

    def _reachable(self, box: str) -> set[str]:
        found: set[str] = set()
        todo = [box]
        while todo:
            new = {to for start, to in self.arrows if start == todo[-1]} - found
            todo.pop()
            found |= new
            todo += new
        return found


def sources_of_folder(root: Path) -> dict[str, str]:
    """Read every module of the package below `root`."""
    return {
        _module(path.relative_to(root)): path.read_text(encoding="utf-8") for path in (root / PACKAGE).rglob("*.py")
    }


def sources_of_commit(rev: str) -> dict[str, str]:
    """Read every module of the package at a commit of this repository."""
    data = subprocess.run(["git", "-C", str(ROOT), "archive", rev, PACKAGE], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            _module(Path(member.name)): archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and member.name.endswith(".py")
        }


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def imports_of(name: str, source: str, modules: frozenset[str]) -> Iterator[str]:
    """Yield the modules of the package that a module imports; a package's face is its `__init__`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [
                f"{node.module}.{alias.name}" if _find(f"{node.module}.{alias.name}", modules) else node.module
                for alias in node.names
            ]
        else:
            continue
        yield from (found for name in names if (found := _find(name, modules)))


def _find(name: str, modules: frozenset[str]) -> str | None:
    return next((module for module in (name, f"{name}.__init__") if module in modules), None)


def graph(sources: Sources, level: int) -> Graph:
    """Return the graph whose boxes are the folders and files at a level below the package."""
    modules = frozenset(sources)
    arrows: Arrows = {}
    for name, source in sources.items():
        for target in imports_of(name, source, modules):
            if (start := _box(name, level)) != (end := _box(target, level)):
                arrows.setdefault((start, end), []).append(f"{name} → {target}")
    return Graph(boxes=frozenset(_box(name, level) for name in sources), arrows=arrows)


def _box(module: str, level: int) -> str:
    return "/".join(module.split(".")[1 : level + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rev", help="a commit in place of the working tree")
    parser.add_argument("--arrows", action="store_true", help="print every arrow and the imports behind it")
    asked = parser.parse_args()
    sources = sources_of_commit(asked.rev) if asked.rev else sources_of_folder(ROOT)
    print(f"{len(sources)} modules, {sum(source.count('\n') for source in sources.values())} lines")
    for level in LEVELS:
        whole = graph(sources, level)
        print(f"\nlevel {level}: {len(whole.boxes)} boxes, {len(whole.arrows)} arrows, {len(whole.circles())} circles")
        for circle in whole.circles():
            print(f"  circle of {len(circle)}: {', '.join(circle)}")
        if level == 2:
            for room in sorted({box.partition("/")[0] for box in whole.boxes if "/" in box}):
                inside = [arrow for arrow in whole.arrows if all(box.startswith(f"{room}/") for box in arrow)]
                boxes = [box for box in whole.boxes if box.startswith(f"{room}/")]
                print(f"  {room}: {len(boxes)} boxes, {len(inside)} arrows among them")
        if asked.arrows:
            for (start, end), imports in sorted(whole.arrows.items()):
                print(f"  {start} → {end}: {len(imports)}")
                print(*(f"      {line}" for line in sorted(set(imports))), sep="\n")


if __name__ == "__main__":
    main()
