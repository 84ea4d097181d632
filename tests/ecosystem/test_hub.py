"""What `make hub` writes, loaded by Hugging Face's package kernels from the folder: by itself, and beside tkernels."""

from __future__ import annotations

import ast
import copy
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tkernels
from tests.tolerance import assert_close
from tests.watch import AtenWatch

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the build reads TOML with Python 3.11"),
]
ROOT = Path(__file__).parents[2]


def build(out: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(root / ".hub" / "build.py"), str(out)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env={})


@pytest.fixture(scope="module")
def hub() -> types.ModuleType:
    return pytest.importorskip("kernels", reason="install the ecosystem group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "built"
    done = build(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def kernel(hub: Any, folder: Path) -> Any:
    return hub.get_local_kernel(folder)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All that the build reads, elsewhere."""
    for name in (".hub", "tkernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", tmp_path)
    return tmp_path


def variants(folder: Path) -> list[Path]:
    return sorted(folder.glob("build/torch-*"))


def test_layout(hub: Any, folder: Path) -> None:
    """By what the package kernels reads itself: build.toml, metadata, digests, and its checks before it loads."""
    from kernels import validate
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    backends = {str(backend).lower() for backend in Build.open(folder).general.backends}
    assert {path.name.removeprefix("torch-") for path in variants(folder)} == backends == {"cpu", "cuda", "rocm"}
    checks = validate.AllValidator([*validate.default_metadata_validators(), validate.ArchValidator()])
    for variant in variants(folder):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        checks.validate_metadata(metadata=metadata, variant=variant.name)
        assert re.fullmatch(rf"_tkernels_{variant.name.removeprefix('torch-')}_[0-9a-f]{{8}}", metadata.id)
        assert (variant / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (folder / "build" / "CARD.md").is_file()


def test_it_imports_itself_by_relative_names_alone(folder: Path) -> None:
    """And beside that Python's modules, torch's and Triton's, as the Hub asks."""
    files = [path for variant in variants(folder) for path in variant.rglob("*.py")]
    assert len(files) == len(variants(folder)) * (len(list((ROOT / "tkernels").rglob("*.py"))) - 1 + 2)
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "triton"}, f"{path}: {name}"


@pytest.mark.parametrize("line", [
    "import tkernels.nn",
    "import os, tkernels.nn as nn",
    "def f():\n    import tkernels",
    'late("tkernels.ops.linear.kernels")',
    "torch.ops.tkernels.linear_forward",
    'torch.library.register_fake("tkernels::linear")',
])  # fmt: skip
def test_what_cannot_be_renamed_ends_the_build(line: str, tree: Path) -> None:
    file = tree / "tkernels" / "core" / "config.py"
    file.write_text(f"{file.read_text()}\n{line}\n")
    done = build(tree / "out", tree)
    assert done.returncode == 1
    last = len(file.read_text().splitlines())
    assert done.stderr.startswith(f"core/config.py:{last}: "), done.stderr
    assert not (tree / "out").exists()


def test_the_build_overwrites_nothing(tree: Path) -> None:
    done = build(tree, tree)
    assert (done.returncode, done.stderr) == (1, f"{tree} is not empty\n")


# A process that cannot import tkernels nor reach a network does what the card shows, and calls of each kind
ALONE = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        os._exit(3)  # (an error could be caught)
sys.addaudithook(refuse)
sys.modules["tkernels"] = None  # "import tkernels" raises ModuleNotFoundError

CARD

layers = {type(module).__name__: module.forward.__func__.__module__ for module in model.children()}
own = {name for name in sys.modules if name.startswith("_tkernels_")}
(name,) = {module.partition(".")[0] for module in own}
assert layers == {"Conv2d": f"{name}.layers", "BatchNorm2d": f"{name}.layers"}, layers
assert [module for module in sys.modules if module.split(".")[0] == "tkernels"] == ["tkernels"]
assert tkernels.__name__ == name == tkernels._ops.add_op_namespace_prefix("")[:-2]
assert tkernels._ops.ops.linear_forward.default.name() == f"{name}::linear_forward"  # read late
fused = tkernels.fuse(Net())
torch.testing.assert_close(fused(x), fused._call_impl(x))
assert "1 chain " in str(tkernels.explain(fused)), tkernels.explain(fused)
compiled = torch.compile(tkernels.nn.Linear(24, 4), backend=name)
torch.testing.assert_close(compiled(x), compiled._orig_mod(x))
a = x.detach()
torch.testing.assert_close(tkernels.matmul(a, a), a @ a)
torch.testing.assert_close(tkernels.scaled_dot_product_attention(a, a, a),
                           torch.nn.functional.scaled_dot_product_attention(a, a, a))
print("done")
"""


def test_by_itself_as_the_card_says(hub: Any, folder: Path, tmp_path: Path) -> None:
    card = (folder / "build" / "CARD.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL))
    assert {"get_kernel(", "kernelize("} <= set(re.findall(r"\w+\(", code))
    (tmp_path / "program.py").write_text(ALONE.replace("CARD", code))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"OWNER/tkernels={folder}", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


class Block(nn.Module):
    """What ConvBNReLU2d takes the place of: torchvision's BasicConv2d is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class LinearThenReLU(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def maps(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


INDICES = torch.tensor([1, 2, 0, 3])
# layer: (module, its inputs, terms in a sum of forward or backward, who is called in kernel.layers)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int, str]] = {
    "Linear": (lambda: nn.Linear(24, 16), lambda: (maps(5, 24),), 24, "linear"),
    "LinearReLU": (lambda: LinearThenReLU(24, 16, bias=False), lambda: (maps(2, 5, 24),), 24, "linear"),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=2), lambda: (maps(3, 4, 9, 9),), 75, "conv2d"),
    "Conv2d, reflected": (
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), lambda: (maps(3, 4, 9, 9),), 243, "conv2d",
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6, momentum=None), lambda: (maps(9, 6),), 9, "normalized"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), lambda: (maps(3, 6, 5, 5),), 75, "normalized"),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), lambda: (maps(3, 6, 2, 5, 5),), 150, "normalized"),
    "ConvBNReLU2d": (Block, lambda: (maps(3, 3, 9, 9),), 147, "run_stage"),
    "CrossEntropyLoss": (
        lambda: nn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1), lambda: (maps(4, 5), INDICES), 20,
        "cross_entropy",
    ),
}  # fmt: skip


def replaced(hub: Any, folder: Path, name: str, module: nn.Module) -> nn.Module:
    """The module kernelized: as an instance of a class of its own, since torch.nn's are everybody's."""
    kind: Any = type(module)
    module.__class__ = hub.use_kernel_forward_from_hub(name)(type(kind.__name__, (kind,), {"forward": kind.forward}))
    mapping = {name: {"cpu": hub.LocalLayerRepository(folder, layer_name=name)}}
    with hub.use_kernel_mapping(mapping, inherit_mapping=False):
        found: nn.Module = hub.kernelize(
            module, mode=hub.Mode.TRAINING | hub.Mode.TORCH_COMPILE, device="cpu", use_fallback=False
        )
    return found


def results(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The module's result, gradients of its sum by fixed weights, and buffers."""
    y = module(*inputs)
    leaves = {"input": inputs[0], **dict(module.named_parameters())}
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if y.dim() else torch.ones_like(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    buffers = {name: t.to(y.dtype) for name, t in module.named_buffers()}  # (num_batches_tracked counts)
    return {"y": y, **dict(zip((f"d{name}" for name in leaves), gradients)), **buffers}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str, hub: Any, folder: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torch's by kernelize, which checks that they are pure: values and gradients, and whose they are."""
    make, inputs_of, reduction, called = LAYERS[case]
    name = case.partition(",")[0]
    module, inputs = make(), inputs_of()
    double = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    expected = results(copy.deepcopy(module).double(), double)
    own = getattr(kernel.layers, called)
    counted = Mock(side_effect=own)
    monkeypatch.setattr(kernel.layers, called, counted)
    module = replaced(hub, folder, name, module)
    found = results(module, inputs)
    assert counted.call_count == 1
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key], reduction, name=key, scale=1.0)

    monkeypatch.setattr(kernel.layers, called, own)
    with torch.no_grad():
        module.eval()
        whole = torch.compile(module, backend="eager", fullgraph=True)  # as can_torch_compile says
        assert_close(whole(*inputs), module(*inputs), reduction)


@pytest.fixture
def forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators(namespace: str) -> set[str]:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.partition(".")[0] for owner, _, name in names if owner == namespace}


@pytest.mark.usefixtures("forgets_what_was_compiled")
def test_builds_beside_each_other(hub: Any, folder: Path, kernel: Any, tree: Path) -> None:
    """Two builds and the package that was imported, in one process: names, operators, backends, switches and values.
    A copy of a build is the build."""
    assert hub.get_local_kernel(shutil.copytree(folder, tree / "copy")).linear is kernel.linear
    file = tree / "tkernels" / "core" / "config.py"
    file.write_text(f"{file.read_text()}\n# another version\n")
    assert build(tree / "out", tree).returncode == 0
    packages: list[Any] = [tkernels, kernel, hub.get_local_kernel(tree / "out")]
    names = [package.__name__ for package in packages]
    assert len(set(names)) == 3
    assert names[0] == "tkernels"
    for name in names:
        sys.modules[f"{name}.core.late"].run_all()
        assert operators(name) == operators("tkernels")
    assert len(operators("tkernels")) > 10
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    for package in packages:
        with package.backend("torch"):
            assert [other.get_backend() for other in packages].count("torch") == 1
        assert torch.equal(package.functional.linear(x, w, None, "relu"), F.linear(x, w).relu())
        assert package.fuse.__module__.startswith(f"{package.__name__}.")
        assert torch._dynamo.lookup_backend(package.__name__).__module__ == f"{package.__name__}.fusion.backend"


def test_benchmarks(hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command's own runner, which verifies what they compute, told that this PyTorch is one for CPUs."""
    from kernels import backends
    from kernels.cli import benchmark

    monkeypatch.setattr(benchmark, "_backend", backends.CPU)
    (script,) = benchmark.discover_benchmark_scripts(str(folder), folder)
    timings, build_id = benchmark.run_benchmark_script(
        script, iterations=1, warmup=0, cwd=folder, repo_id=str(folder), is_local=True, revision="local"
    )
    names = ("BatchNormReLU", "ConvStage", "CrossEntropy", "LinearReLU")
    assert timings.keys() == {f"{name}.{what}" for name in names for what in ("forward", "training")}
    assert all(timing.verified for timing in timings.values())
    assert build_id == hub.get_local_kernel(folder).__name__.split("_")[-1]


@pytest.mark.gate("interp")
def test_kernels_of_a_build_run(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter on CPU tensors, forward and backward, and nothing of it by torch."""
    from triton.runtime.interpreter import GridExecutor

    launched: set[tuple[str, str]] = set()
    run = GridExecutor.__call__

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add((self.fn.__module__.partition(".")[0], self.fn.__name__))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", seen)
    shapes = [(2, 4, 6, 6), (8, 4, 3, 3), (8,), (8,), (4, 72)]
    leaves = [torch.randn(shape).mul_(0.5).requires_grad_() for shape in shapes]
    target = torch.tensor([0, 2])
    with kernel.backend("triton"), AtenWatch() as watch:
        x, conv, norm, bias, weight = leaves
        layer = kernel.functional.ConvBNLayer(conv, None, norm, bias, padding=1)
        y = kernel.conv_stage(x, [layer], 2, training=True)
        y = kernel.batch_norm(y, None, None, norm, bias, training=True, activation="silu")
        loss = kernel.cross_entropy(kernel.linear(y.flatten(1), weight, None, "gelu"), target)
        found = torch.autograd.grad(loss, leaves)
    assert not watch.replaced()
    forward = {"conv_stage_kernel", "normalize_kernel", "linear_forward_kernel", "cross_entropy_forward"}
    backward = {"conv_wgrad_kernel", "input_gradient_kernel", "linear_wgrad_kernel", "cross_entropy_backward"}
    assert {(kernel.__name__, name) for name in forward | backward} <= launched, sorted(launched)
    assert {owner for owner, _ in launched} == {kernel.__name__}

    doubles = x, conv, norm, bias, weight = [t.detach().double().requires_grad_() for t in leaves]
    y = F.max_pool2d(F.batch_norm(F.conv2d(x, conv, padding=1), None, None, norm, bias, True).relu(), 2)
    y = F.silu(F.batch_norm(y, None, None, norm, bias, True))
    expected = F.cross_entropy(F.gelu(F.linear(y.flatten(1), weight)), target)
    assert_close(loss, expected, 72)
    for value, reference in zip(found, torch.autograd.grad(expected, doubles)):
        assert_close(value, reference, 72, scale=1.0)


@pytest.mark.gate("interp")
@pytest.mark.usefixtures("forgets_what_was_compiled")
def test_a_trace_names_operators_of_the_build(kernel: Any) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    layer = kernel.nn.ConvStage([3, 8], pool=2)
    x = torch.randn(2, 3, 6, 6)
    with kernel.backend("triton"):
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        assert_close(compiled(x), layer.forward(x), 27)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert f"{kernel.__name__}.conv_stage_forward.default" in targets, targets
    assert not any(target.startswith("tkernels.") for target in targets)
