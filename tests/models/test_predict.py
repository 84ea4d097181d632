"""Answers for image files, and an exported program that needs nothing of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from models import checkpoint, networks, predict
from tests.tolerance import assert_close

pytestmark = pytest.mark.gate("torch")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of a small network with running statistics of its own, fused."""
    torch.manual_seed(0)
    network: dict[str, Any] = {
        "kind": "cnn", "width": 4, "image_size": 8, "classes": ["cat", "dog", "bird"],
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    model = networks.build(network, fused=True)
    model(torch.randn(16, 3, 8, 8))
    state = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "val_acc": 0.5}
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "network": network})
    return tmp_path / "checkpoint.pt"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """An RGB image of another size, and a grey one of the network's."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.effect_noise((20, 12), 80).convert("RGB").save(paths[0])
    Image.effect_noise((8, 8), 80).save(paths[1])
    return paths


def test_answers(trained: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([str(trained), *map(str, pictures), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == list(map(str, pictures))
    answers = [part.rsplit(" ", 1) for part in lines[1].split(": ")[1].split(", ")]
    assert {name for name, _ in answers} == {"cat", "dog", "bird"}
    assert sum(float(value.rstrip("%")) for _, value in answers) == pytest.approx(100, abs=0.05)

    # by hand, for the image that needs no resizing
    state = checkpoint.load(trained)
    model = networks.build(state["network"], fused=False).eval()
    model.load_state_dict(state["model_state_dict"])
    grey = v2.functional.pil_to_tensor(Image.open(pictures[1])).view(1, 1, 8, 8) / 255
    mean, std = (torch.tensor(state["network"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((grey - mean) / std).softmax(1)[0]
    best = int(expected.argmax())
    assert answers[0] == [state["network"]["classes"][best], f"{expected[best]:.2%}"]
    assert predict.main([str(trained), str(pictures[1])]) == 0
    assert capsys.readouterr().out == f"{pictures[1]}: {' '.join(answers[0])}\n"


def test_export_loads_without_this_package(trained: Path, tmp_path: Path) -> None:
    """Two processes of their own: the command, and one that knows torch only."""
    command = [sys.executable, "-m", "models.predict", str(trained), "--export", str(tmp_path / "network.pt2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'network.pt2'}\n"
    images = torch.rand(5, 3, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch
files = {"classes.txt": ""}
program = torch.export.load("network.pt2", extra_files=files)
images = torch.load("images.pt")
torch.save([program.module()(images), program.module()(images[:1])], "answers.pt")
print(files["classes.txt"].split(), [name for name in sys.modules if name.split(".")[0] in ("models", "tkernels")])
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['cat', 'dog', 'bird'] []\n"
    model, _ = predict.load(trained)
    several, one = torch.load(tmp_path / "answers.pt")
    assert_close(several, model(images).double(), reduction=9 * 16, name="five images")
    assert_close(one, model(images[:1]).double(), reduction=9 * 16, name="one image")


def test_refused(trained: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.png"
    text.write_text("hello")
    table = tmp_path / "table.pt"
    state = checkpoint.load(trained)
    checkpoint.save(table, {**state, "network": {"kind": "mlp", "features": 3, "classes": ["a", "b"]}})
    other = tmp_path / "other.pt"
    checkpoint.save(other, {**state, "network": {**state["network"], "width": 5}})
    for arguments, message in (
        ([trained, text], "is no image that can be read"),
        ([trained, tmp_path / "absent.png"], "No such file"),
        ([tmp_path / "absent.pt", pictures[0]], "cannot be read as a checkpoint"),
        ([table, pictures[0]], "classifies rows of 3 numbers, no images"),
        ([other, pictures[0]], "does not hold the weights it describes"),
        ([trained, "--export", tmp_path / "x.onnx"], "the name must end in .pt2"),
    ):
        assert predict.main(list(map(str, arguments))) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert message in line
        assert out == ""
    with pytest.raises(SystemExit):
        predict.main([str(trained)])
    assert "nothing to do" in capsys.readouterr().err
