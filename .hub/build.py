"""Writes what Hugging Face's package ``kernels`` loads, in the layout of its kernel-builder. Nothing is uploaded.

    python .hub/build.py FOLDER

``build/torch-<backend>/`` is the package for PyTorch of that backend: tkernels/ of this tree, with .hub/package/ at its
top, its licence, and metadata.json. They differ in metadata alone. The Hub loads them under the name ("id") that the
metadata say, so that versions stand beside each other: imports of tkernels are made relative here.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import tomllib  # Python 3.11

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGE = "tkernels"
NOT_OURS = ("__init__.py", "__main__.py")  # of the top alone: .hub/package has its own, a command it cannot have
LEAST_KERNELS = "0.17.0"  # the oldest release of the package kernels that reads this layout in the tests


def relative(source: str, file: Path) -> str:
    """The source of ``file``, a path below the package, with relative imports in place of those of the package."""
    up = "." * len(file.parts)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            old, new = f"from {node.module} import", f"from {up}{_below(node.module)} import"
        elif isinstance(node, ast.Import) and _is_ours(node.names[0].name):
            module = node.names[0].name
            parent, _, name = module.rpartition(".")
            old, new = f"import {module} as", f"from {up}{_below(parent)} import {name} as"
        else:
            continue
        line = lines[node.lineno - 1].encode()  # (the syntax tree counts bytes)
        start, rest = line[: node.col_offset].decode(), line[node.col_offset :].decode()
        if not rest.startswith(old):
            raise SystemExit(f"{file}:{node.lineno}: cannot be made a relative import: {rest.strip()}")
        lines[node.lineno - 1] = start + new + rest.removeprefix(old)
    changed = "".join(lines)
    for line_number, what in names_left(changed):
        raise SystemExit(f"{file}:{line_number}: a module or operator by a name that the Hub does not load: {what}")
    return changed


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] == PACKAGE


def _below(module: str | None) -> str:
    return (module or "").removeprefix(PACKAGE).removeprefix(".")


def names_left(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of all but docstrings and comments that says a module of the package, or an operator, by the name
    that it has in this tree."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wrong = any(_is_ours(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            wrong = node.level == 0 and _is_ours(node.module)
        elif isinstance(node, ast.Attribute):
            wrong = ast.unparse(node) == f"torch.ops.{PACKAGE}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            wrong = re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?|{PACKAGE}::\w+", node.value) is not None
        else:
            continue
        if wrong:
            yield node.lineno, ast.unparse(node)


def sources() -> dict[str, bytes]:
    """The files of a variant, by their paths in it."""
    found = {}
    for folder in (ROOT / PACKAGE, HERE / "package"):
        for path in sorted(folder.rglob("*.py")):
            file = path.relative_to(folder)
            if folder == HERE / "package" or str(file) not in NOT_OURS:
                found[file.as_posix()] = relative(path.read_text(encoding="utf-8"), file).encode()
    return {**found, "LICENSE": (ROOT / "LICENSE").read_bytes()}


def metadata(general: dict[str, object], backend: str, files: dict[str, bytes]) -> dict[str, object]:
    contents = hashlib.sha256()
    for name, data in sorted(files.items()):
        contents.update(f"{name}\0{len(data)}\0".encode() + data)
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    return {
        "name": general["name"],
        "id": f"_{general['name']}_{backend}_{contents.hexdigest()[:8]}",  # other sources, another id
        "version": general["version"],
        "kernels-minver": LEAST_KERNELS,
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def build(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    files = sources()
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        about = metadata(general, backend, files)
        text = json.dumps(about, indent=2) + "\n"
        for name, data in {**files, "metadata.json": text.encode()}.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_bytes(data)
        print(f"{variant}: {len(files)} files, loaded as {about['id']}")
    shutil.copy(HERE / "build.toml", out)
    shutil.copy(HERE / "CARD.md", out / "build")  # where kernel-builder upload looks for it
    shutil.copytree(HERE / "benchmarks", out / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    print(f"load it: kernels.get_local_kernel(pathlib.Path({str(out)!r}))")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where it is written; must be empty or not there")
    build(parser.parse_args().folder)
