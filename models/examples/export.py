"""Train fused, serve without tkernels: weights, torch.export and ONNX, loaded in a process that cannot import it.

python -m models.examples.export
"""

import copy
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def network() -> nn.Module:
    """Layers of torch.nn alone: whoever serves it needs nothing else."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 2 * 2, 10),
    )  # fmt: skip


def train(epochs: int) -> tuple[nn.Module, Tensor]:
    """A fused model, trained on the digits; the images to compare outputs on."""
    import tkernels
    from models.examples import modules

    torch.manual_seed(0)
    images, val_images, digits, val_digits = modules.load()
    model = tkernels.fuse(network().to(modules.DEVICE).to(memory_format=torch.channels_last))
    modules.train(model, images, digits, epochs)
    print(f"validation accuracy {modules.accuracy(model, val_images, val_digits):.2%}")
    return model, val_images


def write(model: nn.Module, images: Tensor, folder: Path) -> None:
    """The model in three forms. A copy is not fused (exporters see a fused model as it was written, too)."""
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    images = images.cpu()
    torch.save(images, folder / "images.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    batch: Any = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=(batch,)), folder / "model.pt2")
    if importlib.util.find_spec("onnxscript") is not None:
        torch.onnx.export(
            model, (images,), folder / "model.onnx", input_names=["images"], dynamic_shapes=(batch,), verbose=False
        )


def serve(folder: Path) -> None:
    """In a process of its own: load each form that is there, and write what it answers."""
    images = torch.load(folder / "images.pt")
    model = network()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    with torch.no_grad():
        outputs = {"weights.pt": model.eval()(images)}
        outputs["model.pt2"] = torch.export.load(folder / "model.pt2").module()(images)
    if (folder / "model.onnx").exists():
        from onnx.reference import ReferenceEvaluator  # stands for a runtime, and is slow

        (answer,) = ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"images": images.numpy()})
        outputs["model.onnx"] = torch.from_numpy(answer)
    torch.save(outputs, folder / "outputs.pt")
    loaded = [name for name, module in sys.modules.items() if name.partition(".")[0] == "tkernels" and module]
    print(f"a process without tkernels ({len(loaded)} of its modules loaded) answers by {', '.join(outputs)}")


def main(epochs: int = 3) -> dict[str, float]:
    """Train, write, serve elsewhere. Returns the largest difference of each form's outputs from the fused model's."""
    model, images = train(epochs)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        write(model.eval(), images, folder)
        # (-I: no folder but the installed packages')
        subprocess.run([sys.executable, "-I", __file__, "serve", name], check=True)
        wanted = model(images).cpu()
        outputs = torch.load(folder / "outputs.pt")
    differences = {form: (output - wanted).abs().max().item() for form, output in outputs.items()}
    for form, difference in differences.items():
        print(f"{form}: outputs differ from the fused model's by {difference:.1e} at most, of {wanted.abs().max():.1f}")
    return differences


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.modules["tkernels"] = None  # type: ignore[assignment]  # from here on importing it is an error
        serve(Path(sys.argv[2]))
    else:
        main()
