"""Extras: `pyproject.toml`, the table of what commands need, and the imports of the package say the same."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

import coldtap as package
from coldtap.cli.main import app
from coldtap.errors import MissingExtraError
from coldtap.extras import EXTRAS, NEEDS, require_extra
from tests.helpers.jobs import coldtap, error_line
from tests.test_import_direction import PACKAGE, imported_names

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]


def distributions(requirements):
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


BARE = distributions(PROJECT["dependencies"])
BY_EXTRA = {
    extra: distributions(requirements)
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra != "all"
}
# Used where it happens to be installed, and said so where it is not; pytest by the suite for adaptors.
OPTIONAL = {"onnxruntime", "pytest", "torchvision"}


DISTRIBUTIONS = packages_distributions()


def distribution_of(module):
    return DISTRIBUTIONS[module][0].lower()


def test_each_extra_is_known_by_the_modules_that_it_brings():
    assert {extra: {distribution_of(name) for name in modules} for extra, modules in EXTRAS.items()} == BY_EXTRA
    assert PROJECT["optional-dependencies"]["all"] == [f"coldtap[{','.join(EXTRAS)}]"]


def test_every_dependency_has_a_lower_bound():
    for requirement in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert ">=" in requirement or requirement.startswith("coldtap[")


def third_party(path):
    return libraries(ast.parse(path.read_text()))


def libraries(tree):
    names = {name.partition(".")[0] for _, name in imported_names(tree)}
    return {distribution_of(name) for name in names - set(sys.stdlib_module_names) - {"coldtap"} - OPTIONAL}


def test_every_library_that_is_imported_is_declared():
    imported = {name for path in PACKAGE.rglob("*.py") for name in third_party(path)}
    assert imported <= BARE | set().union(*BY_EXTRA.values())


class WithoutAsked(ast.NodeTransformer):
    """Drops what imports nothing before it has asked: functions that call `require_extra`, and imports for types."""

    def visit_FunctionDef(self, node):
        called = {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and hasattr(call.func, "id")}
        return None if "require_extra" in called else self.generic_visit(node)

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


@pytest.mark.parametrize("room", ["cli", "stores"])
def test_rooms_of_the_bare_package_import_no_extra_unasked(room):
    unasked = {path: WithoutAsked().visit(ast.parse(path.read_text())) for path in (PACKAGE / room).rglob("*.py")}
    found = {str(path): libraries(tree) - BARE for path, tree in unasked.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_an_import_before_the_question_is_found():
    tree = ast.parse(
        "def f():\n    import dask\n"
        "def g():\n    require_extra('cluster', for_='g')\n    import distributed\n"
        "if TYPE_CHECKING:\n    import torch\n"
    )
    assert libraries(WithoutAsked().visit(tree)) == {"dask"}


def test_the_table_names_commands_and_public_verbs_alone():
    commands = {command.name for command in app.registered_commands}
    assert set(NEEDS) <= commands | {name.replace("_", "-") for name in package.__all__}
    assert set(chain(*NEEDS.values())) <= set(EXTRAS)


def test_commands_that_need_no_extra_load_none():
    fixture = Path(__file__).parent / "fixtures" / "float32"
    modules = sorted(set(chain(*EXTRAS.values())) - {"cloudpickle"})  # pyarrow loads it where it finds it
    code = (
        "import sys; from coldtap.cli.main import app\n"
        f"for words in (['inspect', {str(fixture)!r}, '--json'], ['verify', {str(fixture)!r}]):\n"
        "    try: app(words)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded:', *(name for name in {modules} if name in sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("words", "gone", "message"),
    [
        (("train-adaptor", "s", "--adaptor", "mist", "--out=r"), "torch", "train-adaptor needs torch: coldtap[train]"),
        (("cache-features", "p", "s"), "timm", "cache-features needs timm: coldtap[extract]"),
        (("diagnose", "m", "--calibration", "p", "--out", "o"), "PIL", "diagnose needs PIL: coldtap[extract,report]"),
        (("evaluate", "r", "s"), "sklearn", "evaluate needs sklearn: coldtap[train]"),
        (("report", "r"), "jinja2", "report needs jinja2: coldtap[report]"),
        (("verify", "s", "--source", "p"), "PIL", "verify --source needs PIL: coldtap[extract]"),
    ],
)  # fmt: skip
def test_a_command_whose_extra_is_missing_says_which_in_one_line(monkeypatch, words, gone, message):
    monkeypatch.setitem(sys.modules, gone, None)  # as good as not installed
    result = coldtap(*words)
    needed, _, extra = message.rpartition(" ")
    assert (result.exit_code, error_line(result)) == (7, f"{needed} pip install '{extra}'")


def test_a_public_verb_whose_extra_is_missing_is_an_import_error_that_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"train-adaptor needs torch: pip install 'coldtap\[train\]'"):
        from coldtap import train_adaptor as train_adaptor
    assert package.open_store is not None


def test_several_extras_that_are_missing_are_one_command_to_install(monkeypatch):
    for name in ("torch", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"export needs torch and onnx: pip install 'coldtap\[train,onnx\]'"):
        require_extra("train", "onnx", for_="export")


def test_workers_need_the_cluster_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"`workers=2` needs distributed: pip install 'coldtap\[cluster\]'"):
        package.cache_features(tmp_path / "no-photos", tmp_path / "store", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_adaptors_without_torch_say_which_extra_brings_it():
    code = (
        "import sys; sys.modules['torch'] = None  # as good as not installed\n"
        "from coldtap.errors import MissingExtraError\n"
        "try: from coldtap.adaptors import train_trials\n"
        "except MissingExtraError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "coldtap.adaptors needs torch: pip install 'coldtap[train]'\n"
