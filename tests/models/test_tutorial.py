"""Checkpoints of the network as a well-known tutorial writes it, its layers numbered: they load as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from models import checkpoint, data, predict
from models.cifar_cnn import AttentionCNN, CNNClassifier, FusedCNNClassifier
from tests.tolerance import assert_close

pytestmark = pytest.mark.gate("torch")

NETWORKS = (CNNClassifier, FusedCNNClassifier)


class Tutorial(nn.Module):
    """The network of :class:`CNNClassifier`, in two Sequential."""

    def __init__(self, classes: int = 10, width: int = 32, size: int = 32) -> None:
        super().__init__()

        def block(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

        def end() -> list[nn.Module]:
            return [nn.MaxPool2d(2), nn.Dropout2d(0.25)]

        self.features = nn.Sequential(
            *block(3, width), *block(width, width), *end(),
            *block(width, 2 * width), *block(2 * width, 2 * width), *end(),
            *block(2 * width, 4 * width), *end(),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, 8 * width), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4 * width, classes),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


def _trained(**kwargs: int) -> Tutorial:
    """With running statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = Tutorial(**kwargs)
    size = kwargs.get("size", 32)
    for _ in range(3):
        model(torch.rand(8, 3, size, size) * 2 - 1)
    return model.eval()


@pytest.fixture(scope="module")
def tutorial() -> Tutorial:
    return _trained()


@pytest.mark.parametrize("network", NETWORKS)
def test_equal_outputs(tutorial: Tutorial, network: type[nn.Module]) -> None:
    images = torch.randn(4, 3, 32, 32)
    state = tutorial.state_dict()
    keys = list(state)
    with torch.no_grad():
        expected = tutorial(images).double()
        for wrap in (lambda model: model, lambda model: nn.ModuleDict({"net": nn.Sequential(model)})):
            model = network()
            prefix = "" if wrap(model) is model else "net.0."
            given = {prefix + key: value for key, value in state.items()}
            wrap(model).load_state_dict(given)
            assert_close(model.eval()(images), expected, reduction=128 * 9 * 16)
            wrap(copy.deepcopy(model)).load_state_dict(given, assign=True)
    assert list(state) == keys, "what was given is not written to"
    # what was saved here goes on to load, and what was loaded is saved by its own names
    model.load_state_dict(model.state_dict())
    assert list(model.state_dict()) == list(network().state_dict())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("prefix", ["", "0."])
def test_what_does_not_fit_is_refused_by_name(tutorial: Tutorial, network: type[nn.Module], prefix: str) -> None:
    model = network() if not prefix else nn.Sequential(network())
    state = {prefix + key: value for key, value in tutorial.state_dict().items()}
    weight = state[f"{prefix}features.3.weight"]
    named = prefix.replace(".", r"\.")
    for change, message in (
        ({f"{prefix}features.2.weight": weight}, rf'Unexpected key\(s\) in state_dict: "{named}features\.2\.weight"'),
        ({f"{prefix}stage1.conv2.weight": weight}, rf'Unexpected key\(s\) .*: "{named}features\.3\.weight"'),
        ({f"{prefix}features.3.weight": weight[:5]}, rf"size mismatch for {named}stage1\.conv2\.weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**state, **change})
    del state[f"{prefix}classifier.4.bias"]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{named}classifier\.fc2\.bias"'):
        model.load_state_dict(state)
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def _saved(model: nn.Module, path: Path, how: str) -> None:
    """``tutorial``: as it saves its best epoch; the others as people save weights."""
    state: dict[str, Any] = {
        "epoch": 7, "model_state_dict": model.state_dict(), "val_acc": 87.5,
        "optimizer_state_dict": torch.optim.Adam(model.parameters()).state_dict(),
    }  # fmt: skip
    if how == "state_dict":
        state = model.state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=how != "old format")


@pytest.mark.parametrize("how", ["tutorial", "state_dict", "old format"])
def test_predict_answers_as_the_tutorials_network(
    tutorial: Tutorial, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    _saved(tutorial, tmp_path / "best.pt", how)
    picture = tmp_path / "a.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(picture)
    assert predict.main([str(tmp_path / "best.pt"), str(picture), "--top", "10"]) == 0
    answers = dict(part.rsplit(" ", 1) for part in capsys.readouterr().out.split(": ")[1].strip().split(", "))
    normalised = v2.Normalize(data.CIFAR10_MEAN, data.CIFAR10_STD)
    with torch.no_grad():
        image = v2.functional.pil_to_tensor(Image.open(picture)) / 255
        expected = tutorial(normalised(image)[None]).softmax(1)[0]
    assert answers == {name: f"{p:.2%}" for name, p in zip(data.CIFAR10_CLASSES, expected.tolist())}


def test_sizes_are_read_off_the_weights(tmp_path: Path) -> None:
    """Named layers too, and attention; other than ten classes are numbers."""
    for i, model in enumerate((
        _trained(classes=3, width=4, size=16), FusedCNNClassifier(3, width=4, image_size=16),
        AttentionCNN(3, width=4, image_size=16),
    )):  # fmt: skip
        torch.save(model.state_dict(), tmp_path / f"{i}.pt")
        loaded, network, _ = predict.load(tmp_path / f"{i}.pt")
        assert (network.classes, network.width, network.image_size) == (("0", "1", "2"), 4, 16)
        images = torch.rand(2, 3, 16, 16)
        normalised = v2.Normalize(data.CIFAR10_MEAN, data.CIFAR10_STD)(images)
        with torch.no_grad():
            assert_close(loaded(images), model.eval()(normalised).double().softmax(1), reduction=16 * 9 * 4)


def test_other_files_are_refused_in_a_line(
    tutorial: Tutorial, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no CNN's, does not fit or is no weights at all; damage that a checksum shows."""
    path, picture = tmp_path / "x.pt", tmp_path / "a.png"
    Image.effect_noise((32, 32), 80).save(picture)
    state = tutorial.state_dict()
    cases: list[tuple[Any, str]] = [
        (nn.Linear(3, 2).state_dict(), "holds no weights of the CNN: stage1.conv1.weight must be there"),
        ({**state, "features.3.weight": torch.zeros(3)}, "size mismatch for stage1.conv2.weight"),
        ({**state, "classifier.1.weight": torch.zeros(3)}, "classifier.fc1.weight must be there, of 2 axes"),
        ({**state, "classifier.1.weight": torch.zeros(256, 3)}, "does not hold the weights it describes"),
        ({**state, "features.0.weight": torch.tensor(1.0)}, "stage1.conv1.weight must be there, of 4 axes"),
        ({**state, "extra": torch.zeros(3)}, 'Unexpected key(s) in state_dict: "extra"'),
        ({key: value for key, value in state.items() if "7.bias" not in key}, "classifier.fc3.bias"),
        ({**state, "features.0.bias": torch.full((32,), torch.nan)}, "weights that are not finite"),
        ({"epoch": 1, "val_acc": 0.5}, "is no checkpoint of this program: it lacks model_state_dict"),
        ({}, "is no checkpoint of this program"),
        ({**state, 3: torch.zeros(3)}, "does not hold the weights it describes"),
        ({"model_state_dict": [1]}, "model_state_dict must be a dictionary"),
        ([1], "it holds a list"),
        (tutorial, "cannot be read as a checkpoint"),
    ]
    for content, message in cases:
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            assert predict.main([str(path), str(picture)]) == 2, message
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line
    _saved(tutorial, path, "tutorial")
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-100], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], whole[2:]):
        path.write_bytes(damaged)
        assert predict.main([str(path), str(picture)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path} cannot be read as a checkpoint" in line


def test_training_goes_on_from_its_own_only(tutorial: Tutorial, tmp_path: Path) -> None:
    _saved(tutorial, tmp_path / "checkpoint.pt", "tutorial")
    with pytest.raises(checkpoint.CheckpointError, match="is no checkpoint of this program: it lacks version, network"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    _saved(tutorial, tmp_path / "checkpoint.pt", "old format")
    with pytest.raises(checkpoint.CheckpointError, match="it is no file that torch"):
        checkpoint.load(tmp_path / "checkpoint.pt")
