from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _export_can_read_the_switches() -> Iterator[None]:
    """torch.export reads cuDNN's float32 switch by its old name, which must agree with the new ones the suite sets."""
    # (the attribute is frozen once torch.testing was imported)
    torch._C._set_cudnn_allow_tf32(False)
    yield
    torch._dynamo.reset()
