"""What of a process a test could change for those behind it."""

from __future__ import annotations

import locale
import os
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def state() -> dict[str, Any]:
    """torch's switches and the process's. (Number of threads and float32 precision are set for each test.)"""
    return {
        # torch.set_default_device leaves a mode even for "cpu"; None takes it away
        "function modes": [type(mode).__name__ for mode in _get_current_function_mode_stack()],
        "dispatch modes": [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()],
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "flushes denormals": bool(torch.tensor(1e-39) * 1 == 0),
        "oneDNN": torch.backends.mkldnn.enabled,
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
    }
