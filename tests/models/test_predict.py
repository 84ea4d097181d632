"""Answers for image files, and an exported program that needs nothing of this package."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from models import checkpoint, predict
from models.networks import Network
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
    model = Network.from_dict(network).build(fused=True)
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
    model = Network.from_dict(state["network"]).build(fused=False).eval()
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
    model, *_ = predict.load(trained)
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
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    whole = trained.read_bytes()
    for status, arguments, message in (
        (1, [trained, text], "is no image that can be read"),
        (1, [trained, tmp_path / "absent.png"], "No such file"),
        (1, [trained, tmp_path / "folder"], "folder is a directory without images"),
        (2, [tmp_path / "absent.pt", pictures[0]], "cannot be read as a checkpoint"),
        (2, [table, pictures[0]], "classifies rows of 3 numbers and does not say of which columns"),
        (2, [other, pictures[0]], "does not hold the weights it describes"),
        (2, [trained, "--export", tmp_path / "x.onnx"], "the name must end in .pt2"),
        # before anything is computed, and nothing is replaced that is no old result
        (2, [trained, text, "--out", tmp_path / "absent/x.csv"], f"there is no directory {tmp_path / 'absent'}"),
        (2, [trained, text, "--out", tmp_path / "folder", "--format", "csv"], "folder is no regular file"),
        (2, [trained, text, "--out", tmp_path / "pipe", "--format", "csv"], "pipe is no regular file"),
        (2, [trained, text, "--out", text, "--format", "csv"], "text.png is what is to be read"),
        (2, [trained, text, "--out", trained, "--format", "csv"], "checkpoint.pt is what is to be read"),
    ):
        assert predict.main(list(map(str, arguments))) == status, message
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert message in line
        assert out == ""
    assert (trained.read_bytes(), text.read_text()) == (whole, "hello")
    for options, message in (
        ([], "nothing to do"),
        (["x.png", "--out", "x.xls"], "x.xls must end in .csv, .json, .txt, or --format be given"),
        (["x.png", "--batch-size", "0"], "--batch-size"),
    ):
        with pytest.raises(SystemExit) as stop:
            predict.main([str(trained), *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_rest(
    trained: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each good one has its answer, in order, each bad one its line; status 1."""
    empty, cut = tmp_path / "empty.png", tmp_path / "cut.png"
    empty.write_bytes(b"")
    cut.write_bytes(pictures[0].read_bytes()[:-100])
    files = [empty, pictures[0], tmp_path / "absent.png", cut, pictures[1]]
    for batch_size in ("1", "2", "64"):
        assert predict.main([str(trained), *map(str, files), "--batch-size", batch_size]) == 1
        out, err = capsys.readouterr()
        assert [line.split(": ")[0] for line in out.splitlines()] == list(map(str, pictures))
        said = [line.removeprefix("python -m models.predict: error: ") for line in err.splitlines()]
        assert said == [
            f"{empty} is empty",
            f"{tmp_path / 'absent.png'} cannot be read: No such file or directory",
            f"{cut} cannot be read: image file is truncated",
        ]
    # without a single answer there is no file of answers; a good one beside makes it
    answers = tmp_path / "answers.csv"
    assert predict.main([str(trained), str(empty), "--out", str(answers)]) == 1
    assert not answers.exists()
    assert predict.main([str(trained), str(empty), str(pictures[0]), "--out", str(answers)]) == 1
    assert len(pandas.read_csv(answers)) == 1


def test_forms(trained: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV, JSON and text say the same, on the screen and in a file; what pandas reads has a row an image."""
    files = list(map(str, pictures))
    arguments = [str(trained), *files, "--top", "2"]
    assert predict.main([*arguments, "--format", "csv"]) == 0
    frame = pandas.read_csv(io.StringIO(text := capsys.readouterr().out))
    assert list(frame) == ["file", "class", "probability", "class_2", "probability_2"]
    assert list(frame["file"]) == files
    assert (frame["probability"] >= frame["probability_2"]).all()
    for name, expected in (("x.csv", text), ("x.JSON", None), ("x.txt", None)):
        assert predict.main([*arguments, "--out", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"wrote {tmp_path / name}\n"
        assert expected in (None, (tmp_path / name).read_text())
    assert json.loads((tmp_path / "x.JSON").read_text()) == frame.to_dict("records")
    lines = [
        f"{row['file']}: {row['class']} {row['probability']:.2%}, {row['class_2']} {row['probability_2']:.2%}"
        for row in frame.to_dict("records")
    ]
    assert (tmp_path / "x.txt").read_text().splitlines() == lines
    assert predict.main([str(trained), str(tmp_path / "absent.png"), "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_a_directory_stands_for_its_images(
    trained: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those below it too, by their names' endings; HEIC, which Pillow lacks, is not passed over in silence."""
    folder = tmp_path / "folder"
    (folder / "cats").mkdir(parents=True)
    for place in ("b.PNG", "cats/a.png"):
        shutil.copy(pictures[0], folder / place)
    for place, content in (("notes.txt", b"hello"), (".hidden.png", b""), ("c.heic", b"\0\0\0\x18ftypheic")):
        (folder / place).write_bytes(content)
    assert predict.main([str(trained), str(folder)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [f"{folder}/b.PNG", f"{folder}/cats/a.png"]
    assert f"{folder}/c.heic is a HEIC image that Pillow does not read: save it as PNG or JPEG" in err
    assert len(err.splitlines()) == 1


def test_answers_do_not_depend_on_the_batch(trained: Path, tmp_path: Path) -> None:
    for i in range(7):
        Image.effect_noise((9 + i, 14 - i), 90).convert("RGB").save(tmp_path / f"{i}.png")
    found = []
    for batch_size in (1, 3, 64):
        answers = tmp_path / f"{batch_size}.csv"
        arguments = [str(trained), str(tmp_path), "--top", "3", "--batch-size", str(batch_size)]
        assert predict.main([*arguments, "--out", str(answers)]) == 0
        found.append(pandas.read_csv(answers))
    for other in found[1:]:
        pandas.testing.assert_frame_equal(found[0], other, rtol=1e-5)


def test_batches_are_batches(
    trained: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def counted(self: predict.Probabilities, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return torch.full((len(images), 3), 1 / 3)

    monkeypatch.setattr(predict.Probabilities, "forward", counted)
    assert predict.main([str(trained), *map(str, pictures * 35), "--batch-size", "32"]) == 0
    assert sizes == [32, 32, 6]


VALUES = [None, "x", b"x", [], {}, -1, 0, 10**30, True, 1.5, float("nan"), ["a", 1, None], [0.5, 0.5], [0.0, 0.0, 0.0],
          [1e-320] * 3, [10**400] * 3, ["a\nb", "c", "d"], ["a"], (3,), 2**20, "mlp", torch.zeros(2)]  # fmt: skip


def _one_line_or_an_answer(path: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> int:
    status = predict.main([str(path), str(picture)])
    out, err = capsys.readouterr()
    if status == 0:
        assert "%" in out
        assert "nan" not in out
        assert err == ""
    else:
        assert status == 2
        assert out == ""
        (line,) = err.splitlines()
        assert str(path) in line
    return status


@pytest.mark.parametrize("name", ["kind", "width", "image_size", "classes", "mean", "std"])
def test_a_description_of_a_wrong_kind(
    trained: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Each value for each part, or the part missing: one line. Sizes that do not fit are never allocated."""
    state = checkpoint.load(trained)
    whole = state["network"]
    for value in VALUES:
        torch.save({**state, "network": {**whole, name: value}}, trained)
        black_is_zero = name == "mean" and value in ([0.0] * 3, [1e-320] * 3)  # which is what a mean can be
        assert _one_line_or_an_answer(trained, pictures[0], capsys) == (0 if black_is_zero else 2), value
    torch.save({**state, "network": {key: value for key, value in whole.items() if key != name}}, trained)
    assert _one_line_or_an_answer(trained, pictures[0], capsys) == 2


@pytest.mark.parametrize("name", ["network", "model_state_dict", "epoch", "val_acc", "optimizer_state_dict"])
def test_a_checkpoint_of_wrong_parts(
    trained: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """One line, or the answer where prediction does without the part."""
    state = checkpoint.load(trained)
    for value in VALUES:
        torch.save({**state, name: value}, trained)
        status = _one_line_or_an_answer(trained, pictures[0], capsys)
        assert status == 2 or name not in ("network", "model_state_dict")


def test_weights_of_a_wrong_kind(trained: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    state = checkpoint.load(trained)
    weights = state["model_state_dict"]
    for name in ("stage1.conv1.weight", "stage1.bn1.running_var", "classifier.fc3.bias"):
        good = weights[name]
        for bad in (
            *(None, 1.0, [good], good.double(), good.half(), good.int(), good.cfloat(), good.flatten()[:-1]),
            *(good * float("nan"), good / 0, torch.empty(good.shape, device="meta")),
        ):
            torch.save({**state, "model_state_dict": {**weights, name: bad}}, trained)
            assert _one_line_or_an_answer(trained, pictures[0], capsys) == 2
    for other in ({"other": good}, {3: good}):
        torch.save({**state, "model_state_dict": {**weights, **other}}, trained)
        assert _one_line_or_an_answer(trained, pictures[0], capsys) == 2
    # a variance below 0 is a number, its root is none
    negative = {**weights, "stage1.bn1.running_var": torch.full((4,), -1.0)}
    torch.save({**state, "model_state_dict": negative}, trained)
    assert _one_line_or_an_answer(trained, pictures[0], capsys) == 2


def test_export_that_cannot_be_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and what was there stays: torch itself ends the process where the disk is full."""
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "old.pt2").write_text("old")

    # the program itself is made in a process of its own above: the suite's settings are not for torch.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file, **kwargs: file.write(b"program" * 10))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, message in (("absent/x.pt2", "No such file"), ("folder.pt2", "directory"), ("old.pt2", "No space left")):
        if name == "old.pt2":
            monkeypatch.setattr(os, "fsync", full)
        assert predict.main([str(trained), "--export", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert (tmp_path / "old.pt2").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_a_file_name_of_any_bytes(trained: Path, pictures: list[Path], capfdbinary: Any) -> None:
    path = pictures[0].with_name(os.fsdecode(b"\xff.png"))
    try:
        pictures[0].rename(path)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert predict.main([str(trained), str(path)]) == 0
    assert b"\\udcff.png: " in capfdbinary.readouterr().out


def test_an_image_of_a_directory_is_not_written_over(
    trained: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below = tmp_path / "all" / "of them"
    below.mkdir(parents=True)
    image = below / "image.png"
    image.write_bytes(pictures[0].read_bytes())
    assert predict.main([str(trained), str(tmp_path / "all"), "--out", str(image), "--format", "csv"]) == 2
    assert "is what is to be read" in capsys.readouterr().err
    assert image.read_bytes() == pictures[0].read_bytes()
