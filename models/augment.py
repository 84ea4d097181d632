"""What happens to a batch of images on the device: resize, random flip and rotation, normalisation.

torchvision.transforms.v2 draws once a call, so its random transforms would treat a whole batch alike; the two here draw
for each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]


class FlipEach(v2.Transform):
    """Mirrors each image of a batch (N, C, H, W) left to right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        chosen = torch.rand(len(inpt), 1, 1, 1, device=inpt.device) < self.p
        return torch.where(chosen, v2.functional.horizontal_flip(inpt), inpt)


class RotateEach(v2.Transform):
    """Turns each image of a batch (N, C, H, W) of floats about its centre, by an angle drawn from [-degrees, degrees].

    Bilinear; what comes from outside the image is 0.
    """

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        angles = torch.empty(len(inpt), device=inpt.device).uniform_(-self.degrees, self.degrees)
        return rotate(inpt, angles)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (N, C, H, W) turned counter-clockwise by ``degrees`` (N), as v2.functional.rotate turns one of them."""
    height, width = images.shape[-2:]
    radians = degrees * (math.pi / 180)
    cos, sin, zero = torch.cos(radians), torch.sin(radians), torch.zeros_like(radians)
    # where each pixel comes from, in the coordinates of affine_grid: -1 to 1 along each side
    rows = (cos, -sin * (height / width), zero, sin * (width / height), cos, zero)
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid.to(images.dtype), padding_mode="zeros", align_corners=False)


def image_transforms(
    size: int, mean: Sequence[float], std: Sequence[float], *, flip: bool = False, rotation: float = 0.0
) -> tuple[Transform, Transform]:
    """(for training, for validation): batches of uint8 or [0, 1] images to normalised float32 ones, size x size."""
    first = [v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size), antialias=True)]
    random: list[v2.Transform] = []
    if flip:
        random.append(FlipEach())
    if rotation > 0:
        random.append(RotateEach(rotation))
    last = [v2.Normalize(list(mean), list(std))]
    return v2.Compose([*first, *random, *last]), v2.Compose([*first, *last])
