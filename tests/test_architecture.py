"""What the house rests on: which file may import which, whose private names are whose, and what one file alone may say.

Each rule reads the sources, imports nothing of them, and is shown a violation that it must find.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sources import imports
from tkernels.core import _torch, settings

pytestmark = pytest.mark.gate("torch")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tkernels"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
MODULES = {f"tkernels.{name[:-3].replace('/', '.')}".removesuffix(".__init__") for name in SOURCES}

# Which layers the files of a layer may import from. ops/ has three: choosers, kernels, and what calls them; and "door",
# its __init__.py, by which alone ops/ and fusion/ come to cpu/, which need not be there.
ALLOWED = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "config": {"core", "config"},
    "kernels": {"core", "config", "kernels"},
    "door": {"cpu"},
    "ops": {"core", "door", "config", "kernels", "ops"},
    "functional": {"ops"},
    "nn": {"core", "ops", "functional", "nn"},
    "fusion": {"core", "door", "config", "ops", "functional", "fusion"},
    "face": {"core", "door", "functional", "nn", "fusion", "face"},
}
CONFIG = ("config", "layout", "routing")
# What a file may not import though its layer could.
FORBIDDEN = {
    "config": ("tkernels.core.autograd", "tkernels.core.launch", "tkernels.core.device", "torch.autograd"),
    "kernels": ("tkernels.core.autograd", "tkernels.core.checks", "torch.autograd"),
}
TRITON = re.compile(r"core/(device|descriptors|launch|autotune|_torch)\.py|ops/\w+/kernels\w*\.py")

# (file, what it imports): arrows upwards that are known, and to be removed.
UPWARDS: set[tuple[str, str]] = set()
# Where torch's private names are said.
SAYS_PRIVATE = {"core/_torch.py"}
# What a NamedTuple offers under names with an underscore.
NAMEDTUPLE = ("_replace", "_fields", "_make", "_asdict")
PYTHONS = ("_operator",)  # a module of Python's
PRIVATE_TEXT = re.compile(r"\btorch(\.\w+)*\._[a-z_C]|\b_C\._|\btriton(\.\w+)*\._[a-z]")

Rule = Callable[[str, ast.Module], Iterator[tuple[int, str]]]


def layer(file: str) -> str:
    """Of a file of tkernels/, or of a module's name written as one."""
    parts = file.removesuffix(".py").split("/")
    if parts[0] in ("core", "cpu", "nn", "fusion", "functional"):
        return parts[0]
    if parts[0] != "ops":
        return "face"
    if parts[1:] in ([], ["__init__"]):
        return "door"
    if parts[-1].startswith("kernels"):
        return "kernels"
    return "config" if parts[-1] in CONFIG else "ops"


def module_of(name: str) -> str:
    """The module of tkernels/ that an imported name is or is in."""
    return name if name in MODULES else name.rpartition(".")[0]


def upwards(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree):
        if name.split(".")[0] == "tkernels":
            module = module_of(name)
            if layer("/".join(module.split(".")[1:])) not in ALLOWED[layer(file)]:
                yield line, module
        if name.startswith(FORBIDDEN.get(layer(file), ())):
            yield line, name


def entries_of_cpu(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What is asked of tkernels.ops.cpu, but is not offered by cpu/__init__.py: the folder behind it is its own."""
    offered = _imported(SOURCES["cpu/__init__.py"])
    if any(name == "tkernels.ops.cpu" for _, name in imports(tree)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cpu" and node.attr not in offered:
                yield node.lineno, ast.unparse(node)


def triton_anywhere(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if not TRITON.fullmatch(file):
        yield from ((line, name) for line, name in imports(tree) if name.split(".")[0] == "triton")


def _is_private(name: str) -> bool:
    return re.match(r"_[a-zA-Z]", name) is not None


def _defined(tree: ast.Module) -> set[str]:
    """The names that a file itself gives to functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def _imported(tree: ast.Module) -> set[str]:
    """The names that a file's imports give to modules, and to what is in them."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    return {alias.asname or alias.name.split(".")[0] for node in nodes for alias in node.names}


def _texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that are no docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def private_names(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A neighbour's, torch's or Triton's: imported, as an attribute, or in a string, as getattr takes it."""
    public = {*NAMEDTUPLE, *PYTHONS, *_torch.MODULE_ATTRIBUTES}
    own, imported = public | _defined(tree), _imported(tree)
    for line, name in imports(tree):
        if any(map(_is_private, name.split("."))) and not name.startswith("tkernels.core._torch"):
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            of = node.value.id if isinstance(node.value, ast.Name) else None
            if of not in ("self", "cls") and node.attr not in (public if of in imported else own):
                yield node.lineno, ast.unparse(node)
    for text in _texts(tree):
        names = text.value.split(".") if re.fullmatch(r"[\w.]+", text.value) else []
        if PRIVATE_TEXT.search(text.value) or any(_is_private(name) and name not in own for name in names):
            yield text.lineno, text.value


def environment(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv"):
            yield node.lineno, ast.unparse(node)
    yield from ((line, name) for line, name in imports(tree) if name.startswith(("os.environ", "os.getenv")))


def modules_of_tests(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports of what pytest collects: fixtures and patches of one file must not reach another."""
    yield from ((line, name) for line, name in imports(tree) if re.match(r"tests\.(\w+\.)?test_", name))


def found(rule: Rule, *, without: set[str] = frozenset()) -> dict[tuple[str, str], int]:  # type: ignore[assignment]
    """What a rule finds in tkernels/: (file, what) to a line."""
    return {
        (file, what): line for file, tree in SOURCES.items() if file not in without for line, what in rule(file, tree)
    }


def test_imports_go_down() -> None:
    assert found(upwards).keys() == UPWARDS, "an arrow upwards, or one of UPWARDS that is gone"


def test_no_circles() -> None:
    """At import: what stands in functions, or is for the type checker alone, comes later."""
    arrows = {}
    for file, tree in SOURCES.items():
        name = f"tkernels.{file[:-3].replace('/', '.')}".removesuffix(".__init__")
        top = ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])
        arrows[name] = {module_of(found) for _, found in imports(top) if found.startswith("tkernels.")} - {name}
    while arrows:
        leaves = {name for name, below in arrows.items() if not below & arrows.keys()}
        assert leaves, f"a circle in {sorted(arrows)}"
        arrows = {name: below for name, below in arrows.items() if name not in leaves}


def test_cpu_is_asked_by_its_entries() -> None:
    assert not found(entries_of_cpu)


def test_triton_is_imported_by_kernels_and_core() -> None:
    assert not found(triton_anywhere)


def test_private_names_stay_where_they_are() -> None:
    assert not found(private_names, without=SAYS_PRIVATE)
    still = {file for file in SAYS_PRIVATE if any(private_names(file, SOURCES[file]))}
    assert still == SAYS_PRIVATE, "a file that no longer says private names"


def test_private_names_of_torch_exist() -> None:
    """mypy does not know the names that are imported late, so a misspelt one would pass."""
    for file, tree in SOURCES.items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name) and node.value.id == "_torch"}  # fmt: skip
        used |= {name.split(".")[-1] for _, name in imports(tree) if name.startswith("tkernels.core._torch.")}
        for name in used:
            assert getattr(_torch, name) is not None, f"{file}: _torch.{name}"


def test_one_file_reads_the_environment() -> None:
    assert not found(environment, without={"core/settings.py"})


def test_settings_are_documented() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?(.+?)`? \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [(setting.name, setting.default, setting.meaning) for setting in settings.SETTINGS]


def test_no_module_of_tests_is_imported() -> None:
    files = {path: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    assert not [(path, what) for path, tree in files.items() for what in modules_of_tests(path.name, tree)]


PLANTED = (
    (upwards, "core/mode.py", "from tkernels.ops.linear.op import linear"),
    (upwards, "core/mode.py", "def late():\n    from tkernels.cpu import buffers"),
    (upwards, "core/config.py", "import tkernels.ops.linear.config"),
    (upwards, "cpu/norm.py", "from tkernels.ops.conv.config import Geometry"),
    (upwards, "cpu/norm.py", "from tkernels.fusion.chains import Chain"),
    (upwards, "ops/linear/op.py", "from tkernels.cpu import linear"),
    (upwards, "ops/linear/op.py", "def late():\n    from tkernels.cpu.product import linear"),
    (upwards, "ops/linear/op.py", "import tkernels.cpu as cpu"),
    (upwards, "ops/linear/kernels.py", "from tkernels.ops import cpu"),
    (upwards, "fusion/calls.py", "import tkernels.cpu.chain as cpu"),
    (upwards, "nn/linear.py", "from tkernels.ops import cpu"),
    (entries_of_cpu, "fusion/calls.py", "from tkernels.ops import cpu\ncpu.chain.plan(None)"),
    (upwards, "ops/linear/op.py", "from tkernels import functional as F"),
    (upwards, "ops/linear/op.py", "from tkernels.nn.linear import Linear"),
    (upwards, "ops/linear/op.py", "from tkernels.fusion import fuse"),
    (upwards, "ops/linear/op.py", "from tkernels import backend"),
    (upwards, "ops/linear/config.py", "from tkernels.ops.linear import kernels"),
    (upwards, "ops/linear/kernels.py", "from tkernels.ops.conv.op import conv2d"),
    (upwards, "ops/linear/kernels_backward.py", "from tkernels.core import autograd"),
    (upwards, "ops/linear/kernels.py", "from torch.autograd import Function"),
    (upwards, "nn/linear.py", "from tkernels.ops.linear import kernels"),
    (upwards, "fusion/calls.py", "from tkernels.ops.linear import kernels"),
    (upwards, "functional.py", "from tkernels.nn import Linear"),
    (triton_anywhere, "ops/linear/op.py", "import triton.language as tl"),
    (triton_anywhere, "ops/linear/config.py", "def late():\n    from triton import knobs"),
    (private_names, "ops/linear/op.py", "from tkernels.ops.conv.op import _check"),
    (private_names, "ops/linear/op.py", "from tkernels.ops.conv import op\nop._check()"),
    (private_names, "ops/linear/op.py", "from tkernels.ops.conv import op\ndef _check():\n    op._check()"),
    (private_names, "ops/linear/op.py", "import torch\ntorch._C._is_tracing()"),
    (private_names, "ops/linear/op.py", "import torch\nC = torch._C"),
    (private_names, "ops/linear/op.py", "import torch\ngetattr(torch, '_C')"),
    (private_names, "ops/linear/op.py", "from torch._inductor import config"),
    (private_names, "ops/linear/op.py", "from torch import _dynamo"),
    (private_names, "ops/linear/op.py", "import torch._functorch.config as config"),
    (private_names, "ops/linear/op.py", "import importlib\nimportlib.import_module('torch._dynamo')"),
    (private_names, "ops/linear/op.py", "import sys\nsys.modules['torch.utils._python_dispatch']"),
    (private_names, "ops/linear/op.py", "import torch\ntorch.autograd.forward_ad._current_level"),
    (private_names, "ops/linear/op.py", "import operator\noperator.attrgetter('autograd._profiler_enabled')"),
    (private_names, "ops/linear/op.py", "def of(t):\n    return t.untyped_storage()._cdata"),
    (private_names, "ops/linear/kernels.py", "from triton import runtime\nruntime.driver._obj"),
    (environment, "nn/linear.py", "import os\nos.environ.get('TKERNELS_BACKEND')"),
    (environment, "nn/linear.py", "from os import environ"),
    (environment, "nn/linear.py", "import os\nos.getenv('HOME')"),
    (modules_of_tests, "linear/test_values.py", "from tests.conv.test_values import CASES"),
    (modules_of_tests, "linear/test_values.py", "def late():\n    from tests import test_main"),
)  # fmt: skip


@pytest.mark.parametrize("rule, file, text", PLANTED)
def test_a_violation_is_found(rule: Rule, file: str, text: str) -> None:
    assert list(rule(file, ast.parse(text)))


INNOCENT = (
    (upwards, "ops/linear/op.py", "from tkernels.ops import cpu\nfrom tkernels.ops.linear import kernels"),
    (upwards, "ops/__init__.py", "import tkernels.cpu as cpu"),
    (entries_of_cpu, "ops/linear/op.py", "from tkernels.ops import cpu\ncpu.linear(None, None, None)"),
    (upwards, "nn/linear.py", "from tkernels.functional import linear"),
    (triton_anywhere, "ops/linear/kernels_backward.py", "import triton"),
    (private_names, "ops/linear/op.py", "from tkernels.core import _torch\n_torch.is_jit_tracing()"),
    (private_names, "ops/linear/op.py", "class A:\n    def _b(self):\n        return self._c\nA()._b()"),
    (private_names, "nn/linear.py", "def f(module):\n    return module._parameters"),
    (environment, "nn/linear.py", "import os\nos.path.join('a', 'b')"),
    (modules_of_tests, "linear/test_values.py", "from tests.conv.cases import test_of"),
)  # fmt: skip


@pytest.mark.parametrize("rule, file, text", INNOCENT)
def test_what_is_allowed_passes(rule: Rule, file: str, text: str) -> None:
    assert not list(rule(file, ast.parse(text)))
