"""The lines of a store's manifest, wherever they stand: in the root, or in a part that it names."""

from coldtap.stores.format.canonical import sha256
from coldtap.stores.format.manifest import MANIFEST, MANIFEST_PARTS


def name_of(line):
    return line.split(" ", 2)[-1]


def lines_of(files):
    """Lines of the whole manifest but for those of its parts, by the file (name → bytes) that they stand in."""
    parts = {name: data for name, data in files.items() if name == MANIFEST or name.startswith(f"{MANIFEST_PARTS}/")}
    return {
        name: [line for line in data.decode().splitlines() if not name_of(line).startswith(f"{MANIFEST_PARTS}/")]
        for name, data in parts.items()
    }


def chained(files, change):
    """The files of a manifest in which `change(lines) → lines` was applied to each of its files.

    Parts have the names of their new digests (None: an old one is gone), and the root lists them.
    """
    new, listed = {}, []
    for name, lines in sorted(lines_of(files).items(), key=lambda item: item[0] == MANIFEST):
        if name == MANIFEST:
            continue
        data = "".join(f"{line}\n" for line in change(lines)).encode()
        part = f"{MANIFEST_PARTS}/{sha256(data)}"
        new |= {name: None} | {part: data}
        listed.append(f"{sha256(data)} {len(data)} {part}")
    root = sorted([*change(lines_of(files)[MANIFEST]), *listed], key=name_of)
    return new | {MANIFEST: "".join(f"{line}\n" for line in root).encode()}


def rewrite(store, change):
    """Change the lines of a store on a disk as `chained` does."""
    files = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for name, data in chained(files, change).items():
        if data is None:
            (store / name).unlink()
        else:
            (store / name).parent.mkdir(exist_ok=True)
            (store / name).write_bytes(data)


def all_lines(store):
    """Every line but those of parts."""
    files = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return [line for lines in lines_of(files).values() for line in lines]
