"""The site that make docs builds: every public name is on a page, no link is dead, nothing comes over the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mkdocs  # noqa: F401  (who lacks it skips this file)
import pytest

from tests.public import public_names

pytestmark = pytest.mark.gate("torch")

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page can be asked for, and what it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []  # as the page opens
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids |= {value for name, value in attributes if name in ("id", "name") and value}
        self.links += [value for name, value in attributes if name in ("href", "src") and value]
        self.loaded += [value for name in ("src", "href") if tag != "a" and (value := values.get(name))]

    def handle_data(self, data: str) -> None:
        self.text += data


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = "mkdocs", "build", "--strict", "--config-file", str(root / ".docs/mkdocs.yml"), "--site-dir", str(out)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)


def pages_in(folder: Path) -> dict[Path, Page]:
    # (404.html is for servers, and has their absolute paths)
    return {path: Page(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"}


def dead(pages: dict[Path, Page]) -> Iterator[str]:
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].ids if target in pages else set()
            there = target.is_file() and unquote(parts.fragment) in {"", *anchors}
            if not (parts.scheme or parts.netloc or there):
                yield f"{path.name}: {link}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return pages_in(out)


def test_every_public_name_is_on_a_page(site: dict[Path, Page]) -> None:
    anchors = {anchor for path, page in site.items() if path.parent.name == "reference" for anchor in page.ids}
    assert {name for name, _ in public_names()} - anchors == set()


def test_no_link_is_dead(site: dict[Path, Page]) -> None:
    assert list(dead(site)) == []
    assert {page.name for page in site} >= {"index.html", "ARCHITECTURE.html", "RESULTS.html", "linear.html"}


def test_nothing_comes_over_the_network(site: dict[Path, Page]) -> None:
    assert [loaded for page in site.values() for loaded in page.loaded if urlsplit(loaded).netloc] == []


def test_roles_in_docstrings_are_links(site: dict[Path, Page]) -> None:
    assert [path.name for path, page in site.items() if ":func:" in page.text or ":class:" in page.text] == []


README = """# Any

[page](ARCHITECTURE.md), [part](#some-part), [more](perf/more/deep.md#x), [source](perf/run.py), [folder](perf/),
[elsewhere](https://example.org), `code[a](perf)`

![picture](perf/picture.png) <img src="perf/other.png" alt="other">

## Some part

```python
kernel[grid](perf)
```
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Another one with this one's docs, a README with links of all kinds, and no other pages to speak of."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / ".docs", root / ".docs")
    shutil.copytree(ROOT / "tkernels", root / "tkernels", ignore=shutil.ignore_patterns("__pycache__"))
    pages = re.findall(r": (?!reference)([\w/]+\.md)$", (root / ".docs/mkdocs.yml").read_text(), re.MULTILINE)
    files = dict.fromkeys(pages, "# x\n") | dict.fromkeys(("perf/run.py", "perf/picture.png", "perf/other.png"), "")
    files |= {"README.md": README, "perf/more/deep.md": "# x\n\n[up](../../README.md)\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_links_of_a_readme(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = build(repository, out)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = pages_in(out)
    start = pages[out / "index.html"]
    assert list(dead(pages)) == []
    assert {"ARCHITECTURE.html", "#some-part", "perf/more/deep.html#x", "https://example.org"} <= {*start.links}
    assert {"perf/picture.png", "perf/other.png"} <= {*start.links}
    assert "source, folder," in start.text
    assert "code[a](perf)" in start.text
    assert "kernel[grid](perf)" in start.text


def test_a_link_to_nowhere_ends_the_build(repository: Path, tmp_path: Path) -> None:
    absent = "absent.md", "absent.png", "#absent", "ARCHITECTURE.md#absent"
    (repository / "README.md").write_text("# x\n\n" + "\n".join(f"[text]({link})" for link in absent))
    done = build(repository, tmp_path / "out")
    assert done.returncode != 0
    assert [link for link in absent if f"'{link}'" not in done.stderr] == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text('<a href="#y"></a><a href="y.html"></a><a id="z" href="x.html#z"></a>')
    assert list(dead(pages_in(tmp_path))) == ["x.html: #y", "x.html: y.html"]
