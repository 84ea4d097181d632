"""What the PyTorch bodies of linear and conv2d leave out on a CPU: memory of its own for ReLU's result."""

from __future__ import annotations

import pytest
import torch

import tkernels.functional as TF

pytestmark = pytest.mark.gate("torch")


def test_relu_takes_the_memory_of_the_product() -> None:
    x, w, b = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True), torch.randn(3)
    image, filters = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    for step in (lambda: TF.linear(x, w, b, "relu"), lambda: TF.conv2d(image, filters, activation="relu")):
        y = step()
        assert y._version == 1  # written once more after it was made
        assert not y._is_view()
    # views keep theirs: their base's history would have to be written again
    assert TF.linear(x.view(1, 5, 4), w, b, "relu")._version == 0
    assert TF.conv2d(image[0], filters, activation="relu")._version == 0
