"""What happens to a batch of images on the device: resize, random flip and rotation, normalisation.

torchvision.transforms.v2 draws once a call, so its random transforms would treat a whole batch alike; the two here draw
for each image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]


def flip_each(images: Tensor) -> Tensor:
    """Images (N, C, H, W), each mirrored left to right or not, by a throw of a coin."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, v2.functional.horizontal_flip(images), images)


def rotate_each(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) of floats, each turned about its centre by an angle drawn from [-degrees, degrees].

    Bilinear; what comes from outside the image is 0.
    """
    return rotate(images, torch.empty(len(images), device=images.device).uniform_(-degrees, degrees))


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
    random: list[Transform] = [flip_each] if flip else []
    if rotation > 0:
        random.append(functools.partial(rotate_each, degrees=rotation))
    last = [v2.Normalize(list(mean), list(std))]
    return v2.Compose([*first, *random, *last]), v2.Compose([*first, *last])
