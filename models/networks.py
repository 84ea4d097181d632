"""From the description of a network, as a checkpoint keeps it, to the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tkernels.nn as tnn
from models.cifar_cnn import AttentionCNN, CNNClassifier, FusedCNNClassifier
from models.data import Data, tensors
from models.mlp import FusedMLPClassifier, MLPClassifier

# numbers, strings and lists: what torch.load reads with weights_only=True
Description = dict[str, Any]


def describe(data: Data, model: str, width: int, image_size: int) -> Description:
    """The network that fits the data, and what it must know of them: the classes' names, how images are normalised."""
    classes = list(data.classes)
    if data.mean is None or data.std is None:
        return {"kind": "mlp", "features": tensors(data.train)[0].shape[1], "classes": classes}
    normal = {"mean": list(data.mean), "std": list(data.std)}
    kind = "attention" if model == "attention" else "cnn"
    return {"kind": kind, "width": width, "image_size": image_size, "classes": classes, **normal}


def build(description: Description, fused: bool) -> nn.Module:
    """The network, with new weights."""
    classes = len(description["classes"])
    if description["kind"] == "mlp":
        return (FusedMLPClassifier if fused else MLPClassifier)(description["features"], classes)
    network = FusedCNNClassifier if fused else CNNClassifier
    if description["kind"] == "attention":  # has no plain twin
        network = AttentionCNN
    model: nn.Module = network(classes, width=description["width"], image_size=description["image_size"])
    # faster than NCHW on the CPU, and what the Triton kernels read without a transposition
    return model.to(memory_format=torch.channels_last)


def build_criterion(fused: bool, label_smoothing: float) -> nn.Module:
    return (tnn.CrossEntropyLoss if fused else nn.CrossEntropyLoss)(label_smoothing=label_smoothing)


def differences(saved: Description, wanted: Description) -> list[str]:
    """What keeps a checkpoint of the network ``saved`` from going on as ``wanted``; empty if nothing does."""
    return [
        f"{key} {saved.get(key)!r} instead of {wanted.get(key)!r}"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key) and key not in ("mean", "std")
    ]
