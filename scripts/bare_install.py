"""Install the package without extras in a clean environment, and do there what it promises: `make bare`.

    python scripts/bare_install.py            the wheel alone: fixture stores are read, verified and converted
    python scripts/bare_install.py --size all the size of the package with an extra, nothing else

It uses uv where it is installed, else venv and pip, as the Makefile does.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
ABSENT = ("torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "dask", "distributed", "PIL", "jinja2")
# Commands that need an extra, with words that say which; a missing extra ends with exit code 7.
REFUSED = {
    "train-adaptor STORE --adaptor linear --out RUN": "needs torch and sklearn: pip install 'coldtap[train]'",
    "cache-features PHOTOS STORE --workers 2": "pip install 'coldtap[extract]'",
    "predict RUN PHOTOS": "pip install 'coldtap[extract,train]'",
    "verify STORE --source PHOTOS": "verify --source needs torch and timm and PIL",
}


def run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


def install(folder: Path, extra: str) -> Path:
    """Build the wheel, install it in a new environment below `folder`, and return that environment's Python."""
    environment = folder / "environment"
    python = environment / "bin" / "python"
    if shutil.which("uv"):
        run("uv", "build", "--quiet", "--wheel", "--out-dir", folder)
        run("uv", "venv", "--quiet", "--python", sys.executable, environment)
        installer: list[str | Path] = ["uv", "pip", "install", "--quiet", "--python", python]
    else:
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
        run(sys.executable, "-m", "venv", environment)
        installer = [python, "-m", "pip", "install", "--quiet"]
    (wheel,) = folder.glob("coldtap-*.whl")
    run(*installer, f"{wheel}{f'[{extra}]' if extra else ''}")
    return python


def size_of(environment: Path) -> str:
    (packages,) = environment.glob("lib/python*/site-packages")
    n_bytes = sum(
        path.stat().st_size
        for path in packages.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        # An installer's own, and what the first import compiles.
        and path.relative_to(packages).parts[0].partition("-")[0] != "pip"
        and path.suffix != ".pyc"
    )
    return f"{n_bytes / 1e6:,.0f} MB"


def check_inside(folder: Path) -> None:
    """Run in the bare environment: libraries that are heavy are absent, and stores are read, verified, converted."""
    import coldtap

    assert Path(coldtap.__file__).is_relative_to(sys.prefix), coldtap.__file__
    assert not (there := [name for name in ABSENT if find_spec(name)]), f"in the bare package: {there}"
    read_fixtures()
    for name in ("float32", "int8-compact"):
        command("inspect", FIXTURES / name, "--json")  # their recipes name no preprocessing to show
        command("verify", FIXTURES / name)
    command("convert", FIXTURES / "float32", folder / "converted", "--tier", "int8")
    command("verify", folder / "converted")
    for words in ((), ("train-adaptor",), ("cache-features",)):
        command(*words, "--help")
    for words, told in REFUSED.items():
        result = coldtap_command(*words.split())
        assert result.returncode == 7, (words, result)
        assert told in result.stderr, (words, result)
        assert len(result.stderr.splitlines()) == 1, (words, result)
    try:
        from coldtap import train_adaptor

        raise AssertionError(f"{train_adaptor} is there without torch")
    except coldtap.errors.MissingExtraError:
        pass


def read_fixtures() -> None:
    """Every row of every fixture store reads as it did on the day it was made."""
    import numpy as np

    from coldtap import open_store

    for line in (FIXTURES / "DIGESTS").read_text().splitlines():
        digest, _, name = line.split()
        store = open_store(FIXTURES / name)
        assert store.digest == digest, name
        with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as expected:
            rows = expected["row"]
            for array in store.arrays.values():
                values = np.empty((len(rows), *array.row_shape), np.float32)
                array.read_into(values, rows)
                np.testing.assert_array_equal(values, expected[f"values:{array.name}"])


def coldtap_command(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run the installed `coldtap` script."""
    script = Path(sys.prefix) / "bin" / "coldtap"
    return subprocess.run([str(script), *map(str, words)], capture_output=True, text=True, check=False)


def command(*words: str | Path) -> None:
    result = coldtap_command(*words)
    assert result.returncode == 0, (words, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", metavar="EXTRA", help="only install this extra, and say how large it is")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        check_inside(asked.inside)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coldtap-bare-") as made:
        folder = Path(made)
        python = install(folder, asked.size or "")
        print(f"{f'coldtap[{asked.size}]' if asked.size else 'bare coldtap'}: {size_of(folder / 'environment')}")
        if not asked.size:
            run(python, "-I", __file__, "--inside", folder)
            print(f"the bare package reads, verifies and converts stores ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
