"""A small network for rows of numbers, twice: of torch.nn modules and of fused ones, with one state_dict for both."""

from __future__ import annotations

from torch import Tensor, nn

from models.cifar_cnn import CNNClassifier, FusedCNNClassifier

HIDDEN = (64, 32)


class MLPClassifier(nn.Module):
    """Linear layers with ReLU and dropout between them: rows (N, features) -> logits (N, num_classes).

    Raises ValueError for a count below 1 or a probability outside [0, 1].
    """

    _classifier = staticmethod(CNNClassifier._classifier)

    def __init__(
        self, features: int, num_classes: int, *, hidden: tuple[int, ...] = HIDDEN, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if features < 1 or num_classes < 1:
            raise ValueError(f"features and num_classes must be positive, got {features} and {num_classes}")
        self.classifier = self._classifier(features, *hidden, num_classes, dropout=dropout)

    def forward(self, rows: Tensor) -> Tensor:
        return self.classifier(rows)


class FusedMLPClassifier(MLPClassifier):
    """The network of :class:`MLPClassifier` of fused linear layers, ReLU and dropout in the same call."""

    _classifier = staticmethod(FusedCNNClassifier._classifier)
