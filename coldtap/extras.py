"""What each extra of the package brings, which commands need it, and one line where it is missing."""

from importlib.util import find_spec

from coldtap.errors import MissingExtraError

# The modules of each extra in `pyproject.toml`; the bare package reads, verifies and converts stores.
EXTRAS = {
    "extract": ("torch", "timm", "PIL", "huggingface_hub"),
    "train": ("torch", "sklearn"),
    "cluster": ("dask", "distributed", "cloudpickle", "cryptography"),
    "onnx": ("onnx", "onnxscript"),
    "report": ("jinja2", "markupsafe", "matplotlib", "PIL"),
}

# By command; a public verb of Python needs what the command of its name needs. The others need none.
NEEDS = {
    "cache-features": ("extract",),
    "train-adaptor": ("train",),
    "quantize": ("extract",),
    "diagnose": ("extract", "report"),
    "benchmark": ("extract", "train", "report"),
    "evaluate": ("train",),
    "evaluate-adaptor": ("train",),
    "predict": ("extract", "train"),
    "report": ("train", "report"),
    "export": ("train", "onnx"),
    "export-backbone": ("extract", "onnx"),
}


def require_extra(*extras: str, for_: str) -> None:
    """Check that extras are installed, without importing anything of them.

    Args:
        extras: Names of extras.
        for_: What needs them, as the message begins: a command, or an argument.

    Raises:
        MissingExtraError: A module of one of them is not there.
    """
    lacking = [extra for extra in extras if any(find_spec(module) is None for module in EXTRAS[extra])]
    if lacking:
        gone = dict.fromkeys(name for extra in lacking for name in EXTRAS[extra] if find_spec(name) is None)
        raise MissingExtraError(f"{for_} needs {' and '.join(gone)}: pip install 'coldtap[{','.join(lacking)}]'")


def require_extras_of(command: str) -> None:
    """Check that what a command, or the public verb of its name, needs is installed.

    Raises:
        MissingExtraError: It is not.
    """
    require_extra(*NEEDS.get(command, ()), for_=command)
