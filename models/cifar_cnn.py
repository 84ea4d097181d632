"""The CIFAR image classifier, twice: of torch.nn modules and of fused ones, with one state_dict for both.

Three stages of 3x3 convolutions, each with batch norm and ReLU, each stage ended by 2x2 max pooling and Dropout2d;
then three linear layers. Layers are named, not numbered, because the fused network has no modules for ReLU and for
the linear layers' dropout: names keep every key of the state_dict the same. A state_dict whose layers are numbered, as
those of the tutorial's two nn.Sequential, loads all the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import tkernels.nn as tnn

POOLINGS = 3
# of the tutorial's network: features = Sequential(conv, bn, relu, ..., pool, dropout), classifier = Sequential(...)
NUMBERED = {
    "features.0": "stage1.conv1", "features.1": "stage1.bn1", "features.3": "stage1.conv2", "features.4": "stage1.bn2",
    "features.8": "stage2.conv1", "features.9": "stage2.bn1", "features.11": "stage2.conv2",
    "features.12": "stage2.bn2", "features.16": "stage3.conv1", "features.17": "stage3.bn1",
    "classifier.1": "classifier.fc1", "classifier.4": "classifier.fc2", "classifier.7": "classifier.fc3",
}  # fmt: skip


def name_layers(state_dict: dict[Any, Any], prefix: str = "") -> None:
    """Give the tutorial's layers in a state_dict the names that they have here; what else is there stays."""
    for key in list(state_dict):
        layer, _, parameter = str(key).removeprefix(prefix).rpartition(".")
        named = f"{prefix}{NUMBERED.get(layer)}.{parameter}"
        if str(key).startswith(prefix) and layer in NUMBERED and named not in state_dict:
            state_dict[named] = state_dict.pop(key)


def linear_layers(features: Sequence[int], dropout: float, fused: bool) -> nn.Sequential:
    """Linear layers from each number of features to the next, with ReLU and dropout between them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    *hidden, last = pairwise(features)
    for i, (before, after) in enumerate(hidden, start=1):
        if fused:
            layers[f"fc{i}"] = tnn.Linear(before, after, activation="relu", dropout=dropout)
        else:
            layers[f"fc{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"dropout{i}"] = nn.Dropout(dropout)
    layers[f"fc{len(hidden) + 1}"] = (tnn if fused else nn).Linear(*last)
    return nn.Sequential(layers)


def _stage(channels: Sequence[int], dropout: float, fused: bool) -> nn.Module:
    if fused:
        return tnn.ConvStage(channels, 3, padding=1, pool=2, dropout=dropout)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(pairwise(channels), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"bn{i}"] = nn.BatchNorm2d(after)
        layers[f"relu{i}"] = nn.ReLU()
    layers["pool"] = nn.MaxPool2d(2)
    layers["dropout"] = nn.Dropout2d(dropout)
    return nn.Sequential(layers)


class CNNClassifier(nn.Module):
    """Classifier for small RGB images, of plain torch.nn modules; 698,794 parameters at 10 classes.

    Args:
        num_classes: number of classes, the length of the output.
        width: channels of the first stage; the later layers scale with it.
        image_size: height and width of the images, at least 8.
        dropout2d: probability that a stage drops a whole channel.
        dropout: probability that a hidden linear layer drops a feature.

    Shape: (N, 3, image_size, image_size) -> logits (N, num_classes).
    Raises ValueError for a count below 1, an image smaller than 8 or a probability outside [0, 1].
    """

    fused = False

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: int = 32,
        image_size: int = 32,
        dropout2d: float = 0.25,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise ValueError(f"num_classes and width must be positive, got {num_classes} and {width}")
        if image_size < 2**POOLINGS:
            raise ValueError(f"image_size must be at least {2**POOLINGS}, got {image_size}")
        self.stage1 = _stage((3, width, width), dropout2d, self.fused)
        self.stage2 = _stage((width, 2 * width, 2 * width), dropout2d, self.fused)
        self.stage3 = _stage((2 * width, 4 * width), dropout2d, self.fused)
        features = 4 * width * (image_size // 2**POOLINGS) ** 2
        self.classifier = linear_layers((features, 8 * width, 4 * width, num_classes), dropout, self.fused)
        self.register_load_state_dict_pre_hook(_name_layers_of)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(images)))
        return self.classifier(torch.flatten(features, 1))


def _name_layers_of(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    name_layers(state_dict, prefix)


class FusedCNNClassifier(CNNClassifier):
    """The network of :class:`CNNClassifier` from fused modules: the same arguments, state_dict and initial weights.

    A stage is one call, its pooling and dropout included; linear layers apply ReLU and dropout.
    """

    fused = True


class AttentionCNN(FusedCNNClassifier):
    """:class:`FusedCNNClassifier` whose last feature map attends to itself before it is flattened: to each of its
    pixels is added what it gathers from all others.

    Args:
        heads: number of attention heads, a divisor of 4 * width.
        The others are those of :class:`CNNClassifier`; the state_dict has ``attention`` and ``position`` besides.

    Shape: (N, 3, image_size, image_size) -> logits (N, num_classes).
    Raises ValueError as CNNClassifier, and for a number of heads that does not divide the channels.
    """

    def __init__(self, num_classes: int = 10, *, heads: int = 4, width: int = 32, image_size: int = 32,
                 dropout2d: float = 0.25, dropout: float = 0.5) -> None:  # fmt: skip
        super().__init__(num_classes, width=width, image_size=image_size, dropout2d=dropout2d, dropout=dropout)
        channels = 4 * width
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide the {channels} channels of the last stage, got {heads}")
        self.attention = tnn.MultiheadAttention(channels, heads, batch_first=True)
        # attention alone does not see where a pixel is
        self.position = nn.Parameter(0.02 * torch.randn((image_size // 2**POOLINGS) ** 2, channels))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(images)))
        pixels = features.flatten(2).transpose(1, 2)
        placed = pixels + self.position
        gathered, _ = self.attention(placed, placed, placed, need_weights=False)
        return self.classifier((pixels + gathered).transpose(1, 2).flatten(1))
