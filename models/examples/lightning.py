"""Fused modules in Lightning: train, save a checkpoint, load it: python -m models.examples.lightning"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import tkernels.nn as tnn
from models.examples import modules


class Classifier(lightning.LightningModule):
    """Nothing but the layers is tkernels'. (Of a network of torch.nn's: self.network = tkernels.fuse(network).)"""

    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = modules.build()
        self.criterion = tnn.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, digits = batch
        return self.criterion(self(images), digits)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, digits = batch
        self.log("accuracy", (self(images).argmax(1) == digits).float().mean())

    def on_validation_epoch_end(self) -> None:
        print(f"epoch {self.current_epoch + 1}: validation accuracy {self.trainer.callback_metrics['accuracy']:.2%}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


def quiet() -> None:
    """Lightning tells which devices it found, and advises; here it would hide what the example prints."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def main(epochs: int = 4) -> float:
    quiet()
    lightning.seed_everything(0, verbose=False)
    train_images, val_images, train_digits, val_digits = modules.load()
    train = DataLoader(TensorDataset(train_images, train_digits), batch_size=128, shuffle=True)
    val = DataLoader(TensorDataset(val_images, val_digits), batch_size=len(val_images))

    trainer = lightning.Trainer(
        max_epochs=epochs, devices=1, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    classifier = Classifier()
    trainer.fit(classifier, train, val)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.ckpt")
        trainer.save_checkpoint(path)
        loaded = Classifier.load_from_checkpoint(path).to(modules.DEVICE)
    accuracy = modules.accuracy(loaded, val_images, val_digits)
    print(f"validation accuracy {accuracy:.2%} of the model loaded from the checkpoint")
    return accuracy


if __name__ == "__main__":
    main()
