"""A network of fused modules, trained on scikit-learn's handwritten digits: python -m models.examples.modules"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import tkernels.nn as tnn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load() -> list[Tensor]:
    """Images (N, 1, 8, 8) to train on and to validate with, then the digit that each of them shows."""
    grey, digit = load_digits(return_X_y=True)
    images = torch.tensor(grey, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return [part.to(DEVICE) for part in train_test_split(images, torch.tensor(digit), random_state=0)]


def build() -> nn.Module:
    model = nn.Sequential(
        tnn.ConvStage([1, 32, 32], 3, padding=1, pool=2, dropout=0.1),  # (conv, batch norm, ReLU) twice, max pool
        tnn.ConvStage([32, 64], 3, padding=1, pool=2, dropout=0.1),
        nn.Flatten(),
        tnn.Linear(64 * 2 * 2, 128, activation="relu", dropout=0.3),
        tnn.Linear(128, 10),
    )
    return model.to(DEVICE).to(memory_format=torch.channels_last)


def train(model: nn.Module, images: Tensor, digits: Tensor, epochs: int, batch_size: int = 128) -> None:
    criterion = tnn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss = criterion(model(images[chosen]), digits[chosen])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    return (model.eval()(images).argmax(1) == digits).float().mean().item()


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    train_images, val_images, train_digits, val_digits = load()
    model = build()
    train(model, train_images, train_digits, epochs)
    result = accuracy(model, val_images, val_digits)
    print(f"validation accuracy {result:.2%}")
    return result


if __name__ == "__main__":
    main()
