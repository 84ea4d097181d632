"""What a wheel holds, and that the files around it tell the same version."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import tkernels

pytestmark = pytest.mark.gate("torch")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    assert path.name == f"tkernels-{tkernels.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_a_wheel_holds_the_library_alone(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "tkernels").rglob("*.py")}
    assert files == sources | {"tkernels/py.typed"}


def test_what_a_wheel_says(wheel: zipfile.ZipFile) -> None:
    said = PathDistribution(zipfile.Path(wheel, f"tkernels-{tkernels.__version__}.dist-info/"))
    assert {(entry.group, entry.name) for entry in said.entry_points} == {
        ("console_scripts", "tkernels"),
        ("torch_dynamo_backends", "tkernels"),
    }
    needs = [re.split(r"[^\w-]", each)[0] for each in said.requires or () if "extra ==" not in each]
    assert sorted(needs) == ["torch", "triton"]
    assert said.metadata.get_all("Provides-Extra") == ["tested"]


def test_one_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[(\d.*)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)[0]
    assert newest == tkernels.__version__
    assert f"tkernels-{newest}-py3-none-any.whl" in (ROOT / "README.md").read_text()


def test_the_readme_is_a_page() -> None:
    """And its links, and those of the pages that it leads to, lead somewhere."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140
    pages = [*ROOT.glob("*.md"), *(ROOT / "tests").glob("*.md"), *(ROOT / "perf").rglob("*.md")]
    pages += [*(ROOT / "models").glob("*.md"), *(ROOT / "tkernels").glob("*.md")]
    dead = []
    for page in pages:
        for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                dead.append((page.name, link))
    assert not dead


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
