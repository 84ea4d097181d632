"""The CIFAR image classifier, twice: of torch.nn modules and of fused ones, with one state_dict for both.

Three stages of 3x3 convolutions, each with batch norm and ReLU, each stage ended by 2x2 max pooling and Dropout2d;
then three linear layers. Layers are named, not numbered, because the fused network has no modules for ReLU and for
the linear layers' dropout: names keep every key of the state_dict the same.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

import tkernels.nn as tnn

POOLINGS = 3


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
        self.stage1 = self._stage(3, width, width, dropout=dropout2d)
        self.stage2 = self._stage(width, 2 * width, 2 * width, dropout=dropout2d)
        self.stage3 = self._stage(2 * width, 4 * width, dropout=dropout2d)
        features = 4 * width * (image_size // 2**POOLINGS) ** 2
        self.classifier = self._classifier(features, 8 * width, 4 * width, num_classes, dropout=dropout)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(images)))
        return self.classifier(torch.flatten(features, 1))

    @staticmethod
    def _stage(*channels: int, dropout: float) -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (before, after) in enumerate(pairwise(channels), start=1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
            layers[f"bn{i}"] = nn.BatchNorm2d(after)
            layers[f"relu{i}"] = nn.ReLU()
        layers["pool"] = nn.MaxPool2d(2)
        layers["dropout"] = nn.Dropout2d(dropout)
        return nn.Sequential(layers)

    @staticmethod
    def _classifier(*features: int, dropout: float) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        *hidden, last = pairwise(features)
        for i, (before, after) in enumerate(hidden, start=1):
            layers[f"fc{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"dropout{i}"] = nn.Dropout(dropout)
        layers[f"fc{len(hidden) + 1}"] = nn.Linear(*last)
        return nn.Sequential(layers)


class FusedCNNClassifier(CNNClassifier):
    """The network of :class:`CNNClassifier` from fused modules: the same arguments, state_dict and initial weights.

    A stage is one call, its pooling and dropout included; linear layers apply ReLU and dropout.
    """

    @staticmethod
    def _stage(*channels: int, dropout: float) -> nn.Module:
        return tnn.ConvStage(channels, 3, padding=1, pool=2, dropout=dropout)

    @staticmethod
    def _classifier(*features: int, dropout: float) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        *hidden, last = pairwise(features)
        for i, (before, after) in enumerate(hidden, start=1):
            layers[f"fc{i}"] = tnn.Linear(before, after, activation="relu", dropout=dropout)
        layers[f"fc{len(hidden) + 1}"] = tnn.Linear(*last)
        return nn.Sequential(layers)


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
