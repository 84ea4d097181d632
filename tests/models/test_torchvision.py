"""torchvision's classifiers by name: fused unless that is not wanted, saved and built again, refused in one line."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from models import checkpoint, networks, train
from models.data import DataError
from models.networks import Network

pytestmark = pytest.mark.gate("torch")


def network(arch: str, size: int = 32) -> Network:
    return Network("torchvision", ("a", "b", "c"), 0, 0, size, (0.5,) * 3, (0.25,) * 3, size, arch)


@pytest.fixture
def run(few_digits: None, no_pictures: None, tmp_path: Path) -> Callable[..., Path]:
    def go(name: str, *arguments: str, status: int = 0) -> Path:
        line = ["--device", "cpu", "--batch-size", "16", "--epochs", "1", "--out", str(tmp_path / name)]
        assert train.main([*line, *arguments]) == status
        return tmp_path / name

    return go


def test_training_is_fused(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """By name; what is fused is counted and said; --no-fuse trains the same network as PyTorch runs it."""
    fused = run("fused", "--model", "resnet18")
    said = capsys.readouterr().out
    assert "fused resnet18 of 11,181,642 parameters" in said
    assert "fuse: 20 chains of layers, 2 layers are left to PyTorch" in said, "each of the 20 convolutions"
    plain = run("plain", "--model", "resnet18", "--no-fuse")
    said = capsys.readouterr().out
    assert "plain resnet18 of 11,181,642 parameters on cpu (torch.nn)" in said
    assert "chains" not in said
    states = [checkpoint.load(out / "checkpoint.pt") for out in (fused, plain)]
    for state in states:
        torchvision.models.resnet18(num_classes=10).load_state_dict(state["model_state_dict"])
        assert Network.from_dict(state["network"]).arch == "resnet18"
    losses = [state["history"][0][1] for state in states]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_going_on_with_or_without_fusion(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("out", "--model", "squeezenet1_1", "--no-fuse")
    run("out", "--model", "squeezenet1_1", "--epochs", "2", "--resume")
    run("out", "--model", "mobilenet_v2", "--epochs", "3", "--resume", status=2)
    assert "arch 'squeezenet1_1' instead of 'mobilenet_v2'" in capsys.readouterr().err


def test_same_weights_fused_or_not() -> None:
    states = []
    for fused in (False, True):
        torch.manual_seed(3)
        states.append(network("mobilenet_v3_small").build(fused).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_description_in_a_checkpoint() -> None:
    described = network("resnet18").to_dict()
    assert Network.from_dict(described) == network("resnet18")
    for wrong in ({"arch": "resnet19"}, {"arch": ["resnet18"]}, {"image_size": 0}, {"resize": -1}, {"resize": "8"}):
        with pytest.raises(checkpoint.CheckpointError, match=f"network: {next(iter(wrong))} must be"):
            Network.from_dict({**described, **wrong})
    del described["resize"]
    assert Network.from_dict(described).resize == 0, "of a checkpoint from before"


# one of each family, at about its smallest size
ONE_OF_EACH = {
    "alexnet": 63, "convnext_tiny": 32, "densenet121": 32, "efficientnet_v2_s": 32, "googlenet": 64, "inception_v3": 80,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "vgg11_bn": 32, "vit_b_32": 32, "wide_resnet50_2": 32,
}  # fmt: skip


@pytest.mark.parametrize("arch", ONE_OF_EACH)
def test_every_family(arch: str) -> None:
    """Takes images of the size it is built for and gives logits, training too; no memory is needed to find that out."""
    described = network(arch, ONE_OF_EACH[arch])
    described.check(2)
    layout = described.layout()
    assert all(p.is_meta for p in layout.parameters())
    size = described.image_size
    assert layout(torch.empty(2, 3, size, size, device="meta")).shape == (2, 3)


def test_families_are_complete() -> None:
    """A new family of torchvision's is to be tried."""
    known = {name.split("_")[0].rstrip("0123456789") for name in ONE_OF_EACH}
    known |= {"resnet", "efficientnet", "wide"}
    found = {name.split("_")[0].rstrip("0123456789") for name in networks.torchvision_names()}
    assert found - known == set()


@pytest.mark.parametrize(
    "arch, size, smallest, message",
    [
        ("alexnet", 32, 4, "alexnet cannot take --image-size 32: .*too small"),
        ("vit_b_16", 33, 4, "vit_b_16 cannot take --image-size 33"),
        ("maxvit_t", 64, 4, "maxvit_t cannot take --image-size 64: .*not divisible"),
        ("resnet18", 32, 1, "a batch of 1 is too small for the batch norms of resnet18 .*--drop-last"),
    ],
)
def test_sizes_that_cannot_be(arch: str, size: int, smallest: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        network(arch, size).check(smallest)
    assert "\n" not in str(caught.value)


def test_the_last_batch_counts(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """40 images: 39 and one."""
    run("out", "--model", "resnet18", "--batch-size", "39", status=2)
    assert "--drop-last" in capsys.readouterr().err
    run("out", "--model", "resnet18", "--batch-size", "39", "--drop-last")


def test_pretrained(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights but the last layer's are torchvision's, whose normalisation goes with them."""
    torch.manual_seed(5)
    theirs = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *args, **kwargs: theirs)
    out = run("out", "--model", "squeezenet1_1", "--pretrained", "--no-fuse", "--epochs", "0")
    assert "pretrained: torchvision's weights of squeezenet1_1; new: classifier.1.weight, classifier.1.bias" in (
        capsys.readouterr().out
    )
    state = checkpoint.load(out / "checkpoint.pt")
    for name, value in state["model_state_dict"].items():
        assert torch.equal(value, theirs[name]) if not name.startswith("classifier") else len(value) == 10, name
    assert state["network"]["mean"] == [0.485, 0.456, 0.406]
    assert state["network"]["std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize("found", [urllib.error.URLError("no route"), EOFError("Ran out of input"), ["no weights"]])
def test_pretrained_weights_that_cannot_be_had(
    run: Callable[..., Path], found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(*args: object, **kwargs: object) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", weights)
    run("out", "--model", "squeezenet1_1", "--pretrained", status=2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert len(err) < 500
    assert "https://download.pytorch.org/models/squeezenet1_1" in err


def test_more_classes_than_the_data_have(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run("out", "--width", "4", "--image-size", "8", "--classes", "12")
    state = checkpoint.load(out / "checkpoint.pt")
    assert state["network"]["classes"] == [*map(str, range(10)), "(none 1)", "(none 2)"]
    assert len(state["model_state_dict"]["classifier.fc3.bias"]) == 12
    run("out", "--classes", "9", status=2)
    assert "--classes 9 is less than the 10 classes of the data" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_images_as_their_weights_want_them(arch: str) -> None:
    """torchvision turns that on with the weights; here a checkpoint's network is built without."""
    assert network(arch, 80).layout().transform_input is True
