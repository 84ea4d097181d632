"""The environment variables that tkernels reads: each one's name, default, allowed values and meaning.

Nothing else in tkernels/ reads the environment. One rule for all: a variable that is empty is not set. One with a value
that is not allowed is a warning and its default where it is a switch; tkernels.backend's raises ValueError where it is
used, for results may depend on it. ``python -m tkernels`` prints the values in force.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

YES, NO = ("1", "true", "on", "yes"), ("0", "false", "off", "no")


class Setting(NamedTuple):
    """A variable: its name, what is taken where it is not set, the values it may have (a switch: YES and NO, in any
    case; none: any text), what it decides."""

    name: str
    default: str
    allowed: tuple[str, ...]
    meaning: str

    def text(self) -> str | None:
        """The value as it is in the environment now; None where it is not set."""
        return os.environ.get(self.name) or None

    def choice(self) -> str:
        """The value or the default; :meth:`checked` by whoever uses it."""
        return self.text() or self.default

    def checked(self, value: str, source: str | None = None) -> str:
        """The value itself. Raises ValueError for one not allowed; ``source``: where it comes from."""
        if value not in self.allowed:
            source = source or f"environment variable {self.name}"
            raise ValueError(f"{source} must be one of {', '.join(map(repr, self.allowed))}, got {value!r}")
        return value

    def is_on(self, default: str | None = None) -> bool:
        """A switch's value. Warns of one not allowed, and takes the default: ``default`` or the setting's own."""
        default = default or self.default
        value = (self.text() or default).lower()
        if value not in self.allowed:
            allowed = ", ".join(self.allowed)
            said = f"environment variable {self.name} must be one of {allowed}, got {self.text()!r}: {default} is taken"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
            value = default
        return value in YES

    def assign(self, value: str) -> None:
        """Set the variable for this process and its children."""
        os.environ[self.name] = value

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """After the block the variable is what it was before."""
        before = os.environ.get(self.name)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(self.name, None)
            else:
                os.environ[self.name] = before


BACKEND = Setting("TKERNELS_BACKEND", "auto", ("auto", "triton", "torch"), "how operators run: tkernels.backend")
COMPILE = Setting("TKERNELS_COMPILE", "1", YES + NO, "compile the passes on a CPU with Inductor")
AUTOTUNE = Setting("TKERNELS_AUTOTUNE", "0", YES + NO, "measure launch configurations on the GPU, and keep the choice")
TMA = Setting("TKERNELS_TMA", "0", YES + NO, "products by descriptors on sm_90 and newer: an experiment")
CACHE_DIR = Setting("TKERNELS_CACHE_DIR", "~/.cache/tkernels", (), "where compiled passes and measured choices lie")
# Of others, whose meaning is theirs
INTERPRET = Setting("TRITON_INTERPRET", "0", YES + NO, "Triton's interpreter: kernels run on CPU tensors, slowly")
INDUCTOR_CACHE_DIR = Setting(
    "TORCHINDUCTOR_CACHE_DIR", "Inductor's", (), "compiled passes are kept below it if TKERNELS_CACHE_DIR is not set"
)
CACHE_HOME = Setting("XDG_CACHE_HOME", "~/.cache", (), "compiled passes are kept below it if neither is set")

SETTINGS = (BACKEND, COMPILE, AUTOTUNE, TMA, CACHE_DIR, INTERPRET, INDUCTOR_CACHE_DIR, CACHE_HOME)


def tilde(text: str) -> str:
    """A text with ~ for the user's folder in its paths: what is shown to others need not tell the user's name."""
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", text) if home else text


def others(*prefixes: str) -> Iterator[tuple[str, str]]:
    """(name, value) of the variables with these prefixes that are no settings: other libraries', and misspelt ones."""
    known = {setting.name for setting in SETTINGS}
    for name in sorted(os.environ):
        if name.startswith(prefixes) and name not in known:
            yield name, os.environ[name]
