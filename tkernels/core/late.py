"""Modules that run when something in them is first asked for: kernels, whose decorators read their sources, a tenth of
what importing torch takes, and which a CPU never needs."""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_lock = threading.RLock()
_running: set[str] = set()
_waiting: list[ModuleType] = []


def late(name: str, package: str | None = None) -> Any:
    """The module of a name, relative names in ``package``, as an import statement gives it: one for all who import it.
    (importlib.util.LazyLoader's are not for threads before Python 3.12.)"""
    name = importlib.util.resolve_name(name, package)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    module.__class__ = _Late
    parent, _, own = name.rpartition(".")
    setattr(sys.modules[parent], own, module)
    _waiting.append(module)
    return module


def run_all() -> None:
    """Run the modules that are waiting."""
    for module in _waiting.copy():
        vars(module)


class _Late(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        # importing and inspecting a module is not to run it
        if name == "__dict__" or not (name.startswith("__") and name.endswith("__")):
            _run(self)
        return ModuleType.__getattribute__(self, name)  # (the class may be another by now)


def _run(module: ModuleType) -> None:
    name = module.__name__
    with _lock:  # whoever has it runs the module, the others wait for it
        if module not in _waiting or name in _running:
            return
        _running.add(name)
        try:
            spec: Any = module.__spec__
            spec.loader.exec_module(module)
        finally:
            _running.discard(name)
        _waiting.remove(module)
        module.__class__ = ModuleType
