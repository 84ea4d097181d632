"""Folders of images: what is read, how it is split, what stays in memory, and what is said of a stranger's mistakes."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import augment, checkpoint, data, folder, images, options, predict, train
from models.folder import Files, Reading
from models.networks import Network

pytestmark = pytest.mark.gate("torch")

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (210, 20, 10)}
READING = Reading(8, 8)


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 9), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten images of each of three colours, of several sizes, modes and formats; and files that are no images."""
    base = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        for i in range(10):
            mode, suffix = (("RGB", "jpg"), ("P", "png"), ("RGBA", "PNG"), ("RGB", "webp"), ("P", "gif"))[i % 5]
            draw(base / name / f"{i}.{suffix}", colour, (8 + i, 20 - i), mode)
        (base / name / "notes.txt").write_text("no image")
        (base / name / "._0.jpg").write_bytes(b"another system's notes")
    (base / ".thumbnails").mkdir()
    return base


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Four images a class to train on and two to validate with."""
    for part, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            for i in range(count):
                draw(tmp_path / "halves" / part / name / f"{i}.png", colour)
    return tmp_path / "halves"


def classes_of(dataset: Any) -> torch.Tensor:
    return data.tensors(dataset)[1].bincount()


def test_split_by_seed_and_class(pictures: Path) -> None:
    found = folder.load(pictures, READING, seed=0)
    assert found.classes == ("blue", "green", "red")
    assert classes_of(found.train).tolist() == [8, 8, 8]
    assert classes_of(found.val).tolist() == [2, 2, 2]
    pixels, label = data.tensors(found.train)
    assert (pixels.shape, pixels.dtype) == ((24, 3, 8, 8), torch.uint8)
    colours = torch.tensor(list(COLOURS.values()))
    error = (pixels.float().mean((2, 3)) - colours[label]).abs()
    assert error.max() < 6, "as a JPEG and a palette show it"
    std, mean = torch.std_mean(pixels.double() / 255, (0, 2, 3), correction=0)
    torch.testing.assert_close((found.mean, found.std), (tuple(mean.tolist()), tuple(std.tolist())))

    def held_out(seed: int, part: float | None = None) -> list[Path]:
        dataset = folder.load(pictures, READING._replace(memory=0), seed, part).val
        assert isinstance(dataset, Files)
        return dataset.listing.files

    assert held_out(0) == held_out(0) != held_out(1)
    assert len(held_out(0, 0.5)) == 15


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test"), ("train", "valid")])
def test_two_parts(halves: Path, names: tuple[str, str]) -> None:
    for old, new in zip(("train", "val"), names):
        (halves / old).rename(halves / new)
    found = folder.load(halves, READING, seed=0)
    assert found.classes == ("blue", "green", "red")
    assert (classes_of(found.train).tolist(), classes_of(found.val).tolist()) == ([4] * 3, [2] * 3)
    held_out = folder.load(halves, READING, 0, 0.25)
    assert (classes_of(held_out.train).tolist(), classes_of(held_out.val).tolist()) == ([3] * 3, [1] * 3)


def test_a_training_part_alone_and_classes_called_like_parts(halves: Path) -> None:
    (halves / "val").rename(halves.parent / "val")
    assert classes_of(folder.load(halves, READING, 0).train).tolist() == [3, 3, 3]
    draw(halves / "bus" / "1.png", (1, 2, 3))
    draw(halves / "bus" / "2.png", (1, 2, 3))
    assert folder.load(halves, READING, 0).classes == ("bus", "train")


def test_the_fingerprint_is_of_both_parts(halves: Path) -> None:
    before = folder.fingerprint(halves)
    assert before.startswith("18 images")
    for name in ("green", "red"):
        for path in (halves / "val" / name).iterdir():
            path.unlink()
        (halves / "val" / name).rmdir()
    assert folder.fingerprint(halves).startswith("14 images")
    draw(halves / "val" / "blue" / "0.png", (1, 2, 3), (40, 50))
    assert folder.fingerprint(halves).startswith("14 images")
    assert folder.fingerprint(halves) != before
    assert folder.fingerprint(halves / "nowhere") == ""


def test_a_class_that_is_not_validated(halves: Path) -> None:
    for path in (halves / "val" / "green").iterdir():
        path.unlink()
    (halves / "val" / "green").rmdir()
    assert classes_of(folder.load(halves, READING, 0).val).tolist() == [2, 0, 2]


def test_unreadable_files_are_named_and_counted(pictures: Path) -> None:
    whole = (pictures / "red" / "0.jpg").read_bytes()
    (pictures / "red" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "blue" / "1.png").write_text("no image either")
    (pictures / "blue" / "empty.png").touch()
    lines: list[str] = []
    found = folder.load(pictures, READING._replace(log=lines.append), seed=0)
    assert len(found.train) + len(found.val) == 28  # type: ignore[arg-type]
    assert lines[0] == "note: 3 of 31 images cannot be read and are left out:"
    assert [re.findall(r"(red/0.jpg|blue/1.png|blue/empty.png)", line) for line in lines[1:]] == [
        ["blue/1.png"], ["blue/empty.png"], ["red/0.jpg"]
    ]  # fmt: skip
    assert folder.load(pictures, READING._replace(log=lines.append, workers=2), seed=0).mean == found.mean
    with pytest.raises(data.DataError, match=r"blue/1.png .*3 of 31 images cannot be read"):
        folder.load(pictures, READING._replace(strict=True), seed=0)


def test_many_unreadable_files_are_not_all_named(pictures: Path) -> None:
    for i in range(50):
        (pictures / "red" / f"bad{i}.png").touch()
    lines: list[str] = []
    folder.load(pictures, READING._replace(log=lines.append), seed=0)
    assert len(lines) == folder.NAMED + 2
    assert lines[-1] == "  and 30 more"


def test_a_class_that_cannot_be_read(halves: Path) -> None:
    for path in (halves / "train" / "red").iterdir():
        path.write_text("x")
    with pytest.raises(data.DataError, match="of the images of class 'red' none can be read to train on"):
        folder.load(halves, READING._replace(log=lambda line: None), seed=0)


def test_a_third_folder_beside_the_parts(halves: Path) -> None:
    draw(halves / "unlabelled" / "1.png", (0, 0, 0))
    lines: list[str] = []
    assert folder.load(halves, READING._replace(log=lines.append), seed=0).classes == ("blue", "green", "red")
    assert lines == [f"note: {halves} has folders for training and validation; left out: unlabelled"]


def test_links_and_hidden_folders(pictures: Path) -> None:
    """A folder that lies in itself by a link is entered once, what a notebook keeps beside the files not at all."""
    (pictures / "red" / "self").symlink_to(pictures / "red")
    draw(pictures / "red" / ".ipynb_checkpoints" / "1-checkpoint.png", COLOURS["red"])
    draw(pictures.parent / "elsewhere" / "1.png", COLOURS["red"])
    (pictures / "red" / "more").symlink_to(pictures.parent / "elsewhere")
    found = folder.load(pictures, READING, seed=0)
    assert (classes_of(found.train) + classes_of(found.val)).tolist() == [10, 10, 11]


def _mistake(name: str, base: Path) -> Path:
    draw(base / "cat" / "1.png", (0, 0, 0))
    if name == "no such folder":
        return base / "nowhere"
    if name == "a file":
        return base / "cat" / "1.png"
    if name == "empty":
        (base / "new").mkdir()
        return base / "new"
    if name == "no class folders":
        return base / "cat"
    if name in ("a class with one image", "a class without images", "all unreadable"):
        draw(base / "dog" / "1.png", (9, 9, 9))
        draw(base / "cat" / "2.png", (9, 9, 9))
    if name == "all unreadable":
        draw(base / "dog" / "2.png", (9, 9, 9))
    if name == "a class without images":
        (base / "fox").mkdir()
    if name == "all unreadable":
        for path in base.rglob("*.png"):
            path.write_text("x")
    if name == "a class that is not trained on":
        for part, other in (("train", "dog"), ("val", "fox")):
            draw(base / "parts" / part / "cat" / "1.png", (0, 0, 0))
            draw(base / "parts" / part / other / "1.png", (0, 0, 0))
        return base / "parts"
    return base


MISTAKES = {
    "no such folder": "nowhere is not there",
    "a file": "is a file: give the folder it lies in",
    "empty": "needs a folder of images for each class, .*: it is empty",
    "no class folders": "needs a folder of images for each class, .*: its 1 images lie in no folder",
    "one class": "one class only, 'cat': at least two folders are needed",
    "a class with one image": "class 'dog' has 1 image, two are needed.*: add images or remove the folder",
    "a class without images": "no images in .*fox: put some there or remove it",
    "all unreadable": r"4 of 4 images cannot be read",
    "a class that is not trained on": "val/fox is a class without training images, which are of cat, dog",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_first_mistakes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, that says what to do, and status 2."""
    path = _mistake(name, tmp_path / "mine")
    assert train.main(["--data", f"folder:{path}", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("python -m models.train: error: ")
    assert re.search(MISTAKES[name], err)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that this process reads."""
    found: list[Path] = []
    original = images.read

    def spy(path: Path, *rest: Any) -> torch.Tensor:
        found.append(path)
        return original(path, *rest)

    monkeypatch.setattr(images, "read", spy)
    return found


@pytest.fixture
def run(tmp_path: Path, no_pictures: None) -> Callable[..., Path]:
    """Runs the command with a small network and gives where it wrote."""

    def go(name: str, *arguments: str, status: int = 0) -> Path:
        line = ("--device", "cpu", "--width", "4", "--image-size", "8", "--batch-size", "8", "--workers", "0")
        assert train.main([*line, "--out", str(tmp_path / name), *arguments]) == status
        return tmp_path / name

    return go


def history(out: Path) -> str:
    return (out / "history.csv").read_text()


def test_memory_or_disk(run: Callable[..., Path], pictures: Path, reads: list[Path]) -> None:
    """Where they fit into memory the files are read once; else in every epoch, with the same results."""
    one = ("--data", f"folder:{pictures}", "--epochs", "2", "--flip")
    kept = run("kept", *one)
    assert len(reads) == 30
    del reads[:]
    streamed = run("streamed", *one, "--loader", "workers")
    assert len(reads) == 30 + 2 * 30, "once to see that they can be, then in each epoch"
    assert history(kept) == history(streamed)
    state = checkpoint.load(kept / "checkpoint.pt")
    assert Network.from_dict(state["network"]).classes == ("blue", "green", "red")
    assert state["network"]["resize"] == 8


def test_both_parts_stay_in_memory_or_none(halves: Path) -> None:
    """12 images to train on and 6 to validate with, 192 bytes each: that one of the parts would fit is not enough."""
    for memory, kind in ((18 * 192, torch.utils.data.TensorDataset), (18 * 192 - 1, Files)):
        found = folder.load(halves, READING._replace(memory=memory), seed=0)
        assert type(found.train) is type(found.val) is kind


def test_what_does_not_fit_stays_on_disk(
    run: Callable[..., Path], pictures: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 30 * 3 * 8 * 8
    for free, count in ((needed / folder.SHARE, 30), (needed / folder.SHARE - 1, 60)):
        monkeypatch.setattr(folder, "free_memory", lambda device, free=free: free)
        del reads[:]
        run(f"out{count}", "--data", f"folder:{pictures}", "--epochs", "1")
        assert len(reads) == count


def test_free_memory() -> None:
    assert 2**20 < folder.free_memory(torch.device("cpu")) < 2**50


def test_each_image_draws_by_seed_epoch_and_number(run: Callable[..., Path], pictures: Path, reads: list[Path]) -> None:
    """The same by any number of workers and after a stop; other images in another epoch and by another seed."""
    line = ("--data", f"folder:{pictures}", "--random-crop", "0.3", "--augment", "trivial")
    whole = run("whole", *line, "--epochs", "2")
    assert len(reads) == 30 + 2 * 30
    assert history(run("workers", *line, "--epochs", "2", "--workers", "2")) == history(whole)
    chosen = options.parse(["--device", "cpu", "--image-size", "8", "--batch-size", "8", "--workers", "0", *line])
    batches = train.loaders(chosen, train.load(chosen)).train
    before = torch.get_rng_state()
    first, second = (torch.cat([x for x, _ in batches.epoch(epoch)]) for epoch in (1, 2))
    assert torch.equal(torch.get_rng_state(), before), "training's random numbers are where they were"
    late = torch.cat([x for x, _ in batches.epoch(2, 2)])
    assert torch.equal(late, second[16:])
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    other = train.loaders(
        options.parse([*line, "--image-size", "8", "--seed", "1", "--workers", "0"]), train.load(chosen)
    )
    assert not torch.equal(next(iter(other.train.epoch(1)))[0].sort(0).values[:8], first[:8].sort(0).values)


def test_validation_is_not_drawn(pictures: Path) -> None:
    line = ["--device", "cpu", "--data", f"folder:{pictures}", "--image-size", "8", "--batch-size", "8"]
    plain, drawn = (
        train.loaders(chosen, train.load(chosen)).val
        for chosen in (options.parse([*line, *more]) for more in ([], ["--random-crop", "0.3", "--workers", "0"]))
    )
    for (one, label), (other, same) in zip(plain, drawn):
        assert torch.equal(one, other)
        assert torch.equal(label, same)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_that_goes_away(
    run: Callable[..., Path], pictures: Path, workers: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    original = folder.load

    def load(*args: Any) -> data.Data:
        found = original(*args)
        for path in (pictures / "red").glob("*.*"):
            path.unlink()
        return found

    monkeypatch.setattr(folder, "load", load)
    run("out", "--data", f"folder:{pictures}", "--loader", "workers", "--workers", workers, status=2)
    err = capsys.readouterr().err
    assert re.fullmatch(r"python -m models.train: error: \S+/red/\S+ cannot be read: No such file or directory\n", err)


def test_other_files_are_another_run(
    run: Callable[..., Path], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--data", f"folder:{pictures}", "--epochs", "1")
    run("out", *line)
    run("out", *line, "--resume")
    draw(pictures / "red" / "new.png", (200, 20, 10))
    capsys.readouterr()
    run("out", *line, "--resume", status=2)
    assert re.search("were 30 images with digest .* and are 31 images", capsys.readouterr().err)


def test_a_link_to_nowhere(run: Callable[..., Path], pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "red" / "gone.jpg").symlink_to(pictures / "nowhere.jpg")
    run("out", "--data", f"folder:{pictures}", "--epochs", "1")
    assert "note: 1 of 31 images cannot be read and are left out:" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["", "runs/first", "red/runs"])
def test_results_among_the_images(
    run: Callable[..., Path], pictures: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures that a run draws are no examples, nor is the folder they are in a class."""
    line = ("--data", f"folder:{pictures}", "--out", str(pictures / where))
    run("unused", *line, "--epochs", "1")
    draw(pictures / where / "curves.png", (0, 0, 0))
    run("unused", *line, "--epochs", "2", "--resume")
    assert capsys.readouterr().out.count("24 images to train on, 6 to validate") == 2


def test_shape(tmp_path: Path) -> None:
    """Stretched, or the middle of the shorter side's square; a margin before it is cut."""
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 200
    assert (augment.each_image(10, 10)(image)[:, :, 1:-1] == 200).all()
    stretched = augment.each_image(10, 0)(image)
    assert stretched.shape == (3, 10, 10)
    assert (stretched[:, :, 0] == 0).all()
    assert (stretched[:, :, 5] == 200).all()
    assert augment.trim(torch.zeros(3, 1, 5000)).shape == (3, 1, 4), "not 224 x 1,120,000 before it is cut"
    assert augment.trim(image) is image
    assert augment.each_image(224, 256)(torch.full((3, 5000, 1), 7, dtype=torch.uint8)).unique().tolist() == [7]
    framed = torch.full((3, 16, 16), 50, dtype=torch.uint8)
    framed[:, 4:12, 4:12] = 250
    assert augment.each_image(8, 16)(framed).min() == 250


def test_digits_as_files(tmp_path: Path, no_pictures: None) -> None:
    """scikit-learn's digits, written out as PNG files in folders, are learnt."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (grey, digit) in enumerate(zip(digits.images, digits.target)):
        path = tmp_path / "digits" / str(digit) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((grey * 255 / 16).round().astype("uint8")).save(path)
    out = tmp_path / "out"
    line = ["--data", f"folder:{tmp_path / 'digits'}", "--device", "cpu", "--out", str(out), "--epochs", "5"]
    assert train.main(line) == 0
    assert checkpoint.load(out / "checkpoint.pt")["val_acc"] >= 0.97


def test_large_photographs_are_reduced_as_they_are_read(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But whole where parts of them are to be taken at random."""
    for name, colour in COLOURS.items():
        for i in range(2):
            draw(tmp_path / "photos" / name / f"{i}.jpg", colour, (640, 480))
    sizes: list[tuple[int, ...]] = []
    original = images.read
    monkeypatch.setattr(images, "read", lambda *args: (sizes.append((read := original(*args)).shape), read)[1])
    line = ("--data", f"folder:{tmp_path / 'photos'}", "--epochs", "1")
    run("kept", *line)
    assert set(sizes) == {(3, 60, 80)}
    del sizes[:]
    run("parts", *line, "--random-crop", "0.2")
    assert sizes.count((3, 60, 80)) == 3 + 3, "to validate with: tried, then read"
    assert sizes.count((3, 480, 640)) == 3 + 3


def test_answers_are_those_of_the_validation(
    run: Callable[..., Path], halves: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the margin that training cut off."""
    for name in COLOURS:
        for i in range(8):
            path = halves / "val" / name / f"more{i}.png"
            draw(path, COLOURS[name], (24, 16))
            with Image.open(path) as image:
                image.paste((250, 250, 250), (0, 0, 24, 5))
                image.save(path)
    out = run("out", "--data", f"folder:{halves}", "--epochs", "2", "--resize", "12")
    capsys.readouterr()
    assert predict.main([str(out / "checkpoint.pt"), str(halves / "val"), "--format", "csv"]) == 0
    answers = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    right = [Path(answer["file"]).parent.name == answer["class"] for answer in answers]
    assert len(right) == 30
    assert sum(right) / 30 == pytest.approx(checkpoint.load(out / "checkpoint.pt")["val_acc"])
