"""What mkdocs is missing: pages from where they are in the repository, and links in docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (".md", ".png", ".svg", ".jpg", ".gif")
LINK_OR_SOURCE = re.compile(r'\]\(([^()\s#]+)|(?:src|srcset)="([^"\s]+)"')
CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]+`|\[([^\[\]]*)\]\(([^()\s#]+)[^()\s]*\)", re.DOTALL)
ROLE = re.compile(r":\w+:`(?:(tkernels\.[\w.]+)|([\w.]+))`")


class Roles(Extension):
    """A docstring's :func:`tkernels.fuse` becomes a link; a name that is not ours, code."""

    class Lines(Preprocessor):
        def run(self, lines: list[str]) -> list[str]:
            return [ROLE.sub(lambda m: f"[`{m[1]}`][]" if m[1] else f"`{m[2]}`", line) for line in lines]

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(self.Lines(md), "roles", 20)


def on_config(config: Any) -> None:
    config.markdown_extensions.append(Roles())


def on_files(files: Files, config: Any) -> None:
    """Add the repository's pages that the navigation names, the pages and pictures that these show, and so on."""
    wanted = re.findall(r"[\w./]+\.md", str(config.nav))
    while wanted:
        uri = wanted.pop()
        source = ROOT / uri
        if files.get_file_from_path(uri) or not uri.endswith(SHOWN) or not source.is_file():
            continue
        files.append(File.generated(config, uri, abs_src_path=str(source)))
        if uri.endswith(".md"):
            wanted += [beside(uri, link or src) for link, src in LINK_OR_SOURCE.findall(source.read_text())]


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Links to what is in the repository but no page (sources, folders) become text."""

    def kept(match: re.Match[str]) -> str:
        text, link = match.groups()
        target = beside(page.file.src_uri, link) if link else ""
        is_source = link and files.get_file_from_path(target) is None and (ROOT / target).exists()
        return text if is_source else match[0]

    return CODE_OR_LINK.sub(kept, markdown)


def beside(uri: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(uri), link))
