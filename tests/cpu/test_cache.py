"""Where compiled passes are kept: for this machine's instructions, and safe from others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tkernels.core import _torch, settings
from tkernels.cpu import cache, compiler

INDUCTORS = settings.INDUCTOR_CACHE_DIR.name
pytestmark = pytest.mark.gate("torch")
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system's folders have no modes")


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (INDUCTORS, "TKERNELS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache._own.cache_clear()


def test_what_the_user_chose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert cache.chosen() == tmp_path / "home/.cache/tkernels"
    monkeypatch.setenv(INDUCTORS, default_cache_dir())  # as Inductor itself sets it
    assert cache.chosen() == tmp_path / "home/.cache/tkernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.chosen() == tmp_path / "home/.cache/tkernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.chosen() == tmp_path / "xdg/tkernels"
    monkeypatch.setenv(INDUCTORS, str(tmp_path / "inductor"))
    assert cache.chosen() == tmp_path / "inductor/tkernels"
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path / "ours"))
    assert cache.chosen() == tmp_path / "ours"


@posix
def test_a_folder_is_the_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path / "ours"))
    folder = cache.folder()
    assert folder.parent == tmp_path / "ours"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.folder() == folder


@posix
@pytest.mark.parametrize("part", ("itself", "parent", "link"))
def test_what_others_can_write_to_is_not_used(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = tmp_path / "ours"
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(chosen))
    folder = cache.folder()
    if part == "link":
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        folder.rmdir()
        folder.symlink_to(tmp_path / "open")
    else:
        (folder if part == "itself" else chosen).chmod(0o777)
    own = cache.folder()
    assert chosen not in own.parents
    assert own.stat().st_mode & 0o777 == 0o700
    assert cache.folder() == own  # one for the process


@posix
def test_a_umask_that_leaves_folders_to_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the group: what is made on the way to our folder is made for the user alone."""
    monkeypatch.setattr(cache, "_is_private", lambda group: False)
    before = os.umask(0o002)
    try:
        folder = cache.folder()
    finally:
        os.umask(before)
    assert folder.parent == tmp_path / "home/.cache/tkernels"
    assert {part.stat().st_mode & 0o777 for part in (folder, *folder.parents[:3])} == {0o700}


@posix
@pytest.mark.parametrize(
    ("name", "members", "safe"),
    (("me", [], True), ("me", ["me"], True), ("me", ["me", "you"], False), ("staff", [], False)),
)
def test_a_folder_of_the_users_private_group(
    name: str, members: list[str], safe: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """~/.cache as a umask of 002 makes it."""
    import grp
    import pwd

    (tmp_path / "home/.cache").mkdir(parents=True)
    (tmp_path / "home/.cache").chmod(0o775)
    os.chown(tmp_path / "home/.cache", -1, os.getgid())
    monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_name=name, gr_mem=members))
    assert (tmp_path in cache.folder().parents) == safe
    assert not cache._is_private(os.getgid() + 1)


@posix
def test_a_group_that_cannot_be_looked_up_is_not_private(monkeypatch: pytest.MonkeyPatch) -> None:
    import grp

    def unknown(group: int) -> None:
        raise KeyError(group)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert not cache._is_private(os.getgid())


def test_a_user_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container that runs under a number that its system does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    folder = cache.folder()
    assert folder.is_dir()
    assert cache.folder() == folder
    (record,) = caplog.records
    assert "compiled passes are not kept: Could not determine home" in record.getMessage()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg" in cache.folder().parents


@posix
def test_a_folder_in_a_sticky_one_is_safe(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert cache._unsafe(tmp_path / "ours") is None


@posix
@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    assert "another user" in str(cache._unsafe(tmp_path / "theirs"))
    assert cache._unsafe(tmp_path / "theirs" / "ours") is not None


def test_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cache._unsafe(tmp_path / "file" / "ours") is not None


@posix
def test_a_folder_of_a_process_goes_with_it(tmp_path: Path) -> None:
    program = """
import os
from tkernels.cpu import cache
folder = cache.folder()
if os.fork() == 0:
    raise SystemExit
os.wait()
assert folder.exists()
print(folder)
"""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    environment = {**os.environ, "TKERNELS_CACHE_DIR": str(tmp_path / "open"), "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "others may write" in done.stderr
    assert not Path(done.stdout.split()[-1]).exists()


@pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler")
@pytest.mark.parametrize("chosen", (None, "/chosen/by/the/user"))
def test_inductor_is_left_as_it_was(chosen: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the block fails; in it, each instruction set has a folder of its own."""
    from torch._inductor import codecache, cpu_vec_isa

    sets = cpu_vec_isa.valid_vec_isa_list() or [cpu_vec_isa.invalid_vec_isa]  # (which sets the variable itself)
    if chosen is None:
        monkeypatch.delenv(INDUCTORS, raising=False)
    else:
        monkeypatch.setenv(INDUCTORS, chosen)
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path))
    before = {name: getattr(codecache, name, None) for name in _torch.header_settings(tmp_path)}
    found = []
    for isa in sets:
        monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda isa=isa: isa)
        with contextlib.suppress(ZeroDivisionError), cache.used():
            found.append(os.environ[INDUCTORS])
            assert getattr(codecache, "_HEADER_DIR", found[-1]).startswith(found[-1])
            raise ZeroDivisionError
        assert os.environ.get(INDUCTORS) == chosen
        assert {name: getattr(codecache, name, None) for name in before} == before
    assert len(set(found)) == len(found) == len(sets)
    assert all(tmp_path in Path(place).parents for place in found)


@pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler")
@pytest.mark.parametrize("lacks", ("_HEADER_DIR", "_precompile_header", "__wrapped__"))
def test_an_inductor_of_other_names(lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled headers then lie where Inductor wants them, and passes are compiled all the same."""
    from torch._inductor import codecache

    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path))
    if lacks == "__wrapped__":
        monkeypatch.setattr(codecache, "_precompile_header", lambda: None, raising=False)
    else:
        monkeypatch.delattr(codecache, lacks, raising=False)
    _torch.header_settings.cache_clear()
    try:
        with cache.used():
            assert tmp_path in Path(os.environ[INDUCTORS]).parents
    finally:
        _torch.header_settings.cache_clear()


def test_the_name_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path))
    build, cpu = cache._digests()
    assert torch.__version__ in cache.folder().name
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: read(path).replace("flags\t", "flags\tother "))
    cache._digests.cache_clear()
    try:
        if Path("/proc/cpuinfo").exists():
            assert cache._digests()[0] == build
            assert "flags" not in read(Path("/proc/cpuinfo")) or cache._digests()[1] != cpu
    finally:
        cache._digests.cache_clear()
