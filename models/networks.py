"""Which network it is, as a checkpoint says it: what fits the data, and from that description to the network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tkernels
import tkernels.nn as tnn
from models import data
from models.arguments import one_line
from models.cifar_cnn import POOLINGS, AttentionCNN, CNNClassifier, FusedCNNClassifier, linear_layers
from models.contents import CheckpointError, mapping, must

KINDS = ("mlp", "cnn", "attention", "torchvision")
# of --model; what else there is are torchvision's
OURS = ("fused", "plain", "attention")
HIDDEN = (64, 32)


class MLPClassifier(nn.Module):
    """Linear layers with ReLU and dropout between them: rows (N, features) -> logits (N, num_classes).

    Raises ValueError for a count below 1 or a probability outside [0, 1].
    """

    fused = False

    def __init__(
        self, features: int, num_classes: int, *, hidden: tuple[int, ...] = HIDDEN, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if features < 1 or num_classes < 1:
            raise ValueError(f"features and num_classes must be positive, got {features} and {num_classes}")
        self.classifier = linear_layers((features, *hidden, num_classes), dropout, self.fused)

    def forward(self, rows: Tensor) -> Tensor:
        return self.classifier(rows)


class FusedMLPClassifier(MLPClassifier):
    """The network of :class:`MLPClassifier` of fused linear layers, ReLU and dropout in the same call."""

    fused = True


@dataclass(frozen=True)
class Network:
    """A network of one of ``KINDS``, and what it must know of the data: the classes' names, how images are normalised.

    An MLP has ``features``; the others have ``image_size``, ``mean``, ``std`` and ``resize``, to how many pixels an
    image's shorter side is brought before its middle is cut out (0: the image is stretched); ours have a ``width``,
    torchvision's an ``arch``, its name.
    """

    kind: str
    classes: tuple[str, ...]
    features: int = 0
    width: int = 0
    image_size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int = 0
    arch: str = ""

    @classmethod
    def of_data(cls, found: data.Data, model: str, width: int, image_size: int, resize: int = 0) -> Network:
        """What fits the data; ``model`` and the numbers are the options of these names, for images."""
        if found.mean is None or found.std is None:
            return cls("mlp", found.classes, features=data.tensors(found.train)[0].shape[1])
        if model not in OURS:
            return cls("torchvision", found.classes, 0, 0, image_size, found.mean, found.std, resize, model)
        kind = "attention" if model == "attention" else "cnn"
        return cls(kind, found.classes, 0, width, image_size, found.mean, found.std, resize)

    @classmethod
    def of_weights(cls, weights: dict[str, Tensor]) -> Network:
        """The CNN of a state_dict that comes without a description: its sizes from the shapes, CIFAR-10's
        normalisation, and its classes' names where there are ten. Raises CheckpointError where they cannot be told."""
        for name, axes in (("stage1.conv1.weight", 4), ("classifier.fc1.weight", 2), ("classifier.fc3.bias", 1)):
            if name not in weights or weights[name].dim() != axes or weights[name].numel() == 0:
                raise CheckpointError(f"holds no weights of the CNN: {name} must be there, of {axes} axes")
        width, classes = len(weights["stage1.conv1.weight"]), len(weights["classifier.fc3.bias"])
        image_size = 2**POOLINGS * math.isqrt(weights["classifier.fc1.weight"].shape[1] // (4 * width))
        names = data.CIFAR10_CLASSES if classes == 10 else tuple(map(str, range(classes)))
        kind = "attention" if "position" in weights else "cnn"
        return cls(kind, names, 0, width, image_size, data.CIFAR10_MEAN, data.CIFAR10_STD)

    @classmethod
    def from_dict(cls, saved: Any) -> Network:
        """Of what :meth:`to_dict` gave. Raises CheckpointError for anything else."""
        kind: Any = mapping(saved, "network").get("kind")
        must(isinstance(kind, str) and kind in KINDS, "network: kind", f"one of {', '.join(KINDS)}", kind)
        found: dict[str, Any] = {name: saved.get(name) for name in ("classes", *_FIELDS[kind])}
        if "resize" in saved:
            found["resize"] = saved["resize"]
        for name, value in found.items():
            good, what = _CHECKS[name]
            must(good(value), f"network: {name}", what, value)
            found[name] = tuple(value) if isinstance(value, list) else value
        return cls(kind, **found)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for checkpoints."""
        fields = dataclasses.asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields if v}

    @property
    def takes_rows(self) -> bool:
        return self.kind == "mlp"

    @property
    def name(self) -> str:
        return self.arch or ("MLP" if self.takes_rows else "CNN")

    def build(self, fused: bool) -> nn.Module:
        """The network, with new weights; an attention network is always fused. Raises ValueError where torchvision's
        is not for images of this size."""
        classes = len(self.classes)
        if self.takes_rows:
            return (FusedMLPClassifier if fused else MLPClassifier)(self.features, classes)
        if self.arch:
            model = _of_torchvision(self.arch, classes, self.image_size).to(memory_format=torch.channels_last)
            return tkernels.fuse(model) if fused else model
        network: Callable[..., nn.Module] = FusedCNNClassifier if fused else CNNClassifier
        if self.kind == "attention":
            network = AttentionCNN
        # faster than NCHW on the CPU, and what the Triton kernels read without a transposition
        return network(classes, width=self.width, image_size=self.image_size).to(memory_format=torch.channels_last)

    def layout(self) -> nn.Module:
        """The network on the meta device: without memory for its weights."""
        try:
            with torch.device("meta"):
                return self.build(fused=False)
        except NotImplementedError:  # torchvision's RegNet finds its widths by tensors
            return self.build(fused=False).to("meta")

    def check(self, smallest: int) -> None:
        """Raise DataError where the network cannot train on batches of so few images of its size."""
        try:
            self.layout()(torch.empty(smallest, 3, self.image_size, self.image_size, device="meta"))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = one_line(error)
            if "more than 1 value per channel" in reason:
                raise data.DataError(
                    f"a batch of {smallest} is too small for the batch norms of {self.name} at --image-size "
                    f"{self.image_size}: give another --batch-size, or --drop-last for an epoch's last one"
                ) from error
            raise data.DataError(f"{self.name} cannot take --image-size {self.image_size}: {reason}") from error

    def differences(self, wanted: Network) -> list[str]:
        """What keeps a checkpoint of this network from going on as ``wanted``; empty if nothing does."""
        ours, theirs = self.to_dict(), wanted.to_dict()
        return [
            f"{name} {ours.get(name)!r} instead of {theirs.get(name)!r}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name) and name not in ("mean", "std")
        ]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(name) is str for name in value)


def _are_shares(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(x) is float and 0 <= x <= 1 for x in value)


def torchvision_names() -> list[str]:
    """The classifiers of torchvision, by the names that torchvision.models.get_model takes."""
    from torchvision import models

    return models.list_models(module=models)


def _of_torchvision(name: str, classes: int, size: int) -> nn.Module:
    from torchvision import models

    sizes: dict[str, Any] = {}
    if name.startswith("vit_"):
        sizes = {"image_size": size}
    elif name.startswith("maxvit"):
        sizes = {"input_size": (size, size)}
    elif name in ("googlenet", "inception_v3"):  # further classifiers for training, which return tuples
        # (and images as their weights want them, which torchvision turns on with the weights alone)
        sizes = {"aux_logits": False, "init_weights": True, "transform_input": True}
    return models.get_model(name, num_classes=classes, **sizes)


def load_pretrained(model: nn.Module, name: str) -> list[str]:
    """Give ``model`` torchvision's best weights of its classifier ``name``, where their shapes are the same; returns
    the names of the others, which stay as they were. Raises DataError where they cannot be had."""
    from torchvision import models

    try:
        weights = models.get_model(name, weights="DEFAULT").state_dict()
    except Exception as error:  # of the network, or of whatever is in a file of that name
        raise data.DataError(
            f"--pretrained: the weights of {name} cannot be had ({one_line(error)[:150]}): fetch "
            f"{models.get_model_weights(name).DEFAULT.url} to {torch.hub.get_dir()}/checkpoints, and remove a file of "
            f"that name that is damaged"
        ) from error
    own = model.state_dict()
    same = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict({**own, **same})
    return [key for key in own if key not in same]


def colours_of_pretrained(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each colour, as those weights want images normalised."""
    from torchvision import models

    wanted = models.get_model_weights(name).DEFAULT.transforms()
    return tuple(wanted.mean), tuple(wanted.std)


_IMAGES = ("image_size", "mean", "std")
_FIELDS = {
    "mlp": ("features",), "cnn": ("width", *_IMAGES), "attention": ("width", *_IMAGES),
    "torchvision": ("arch", *_IMAGES),
}  # fmt: skip
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "classes": (_are_names, "a list of names"),
    **dict.fromkeys(("features", "width", "image_size"), (_is_size, "a whole number, 1 or more")),
    "resize": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
    "arch": (lambda value: type(value) is str and value in torchvision_names(), "a classifier of torchvision"),
    "mean": (_are_shares, "three numbers from 0 to 1"),
    "std": (lambda value: _are_shares(value) and min(value) >= 1e-6, "three numbers above 0, at most 1"),
}


def build_criterion(fused: bool, label_smoothing: float) -> nn.Module:
    return (tnn if fused else nn).CrossEntropyLoss(label_smoothing=label_smoothing)
