"""Whole batches at once, each image by its own draw: the same as torchvision's transforms image by image."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from models.augment import flip_each, image_transforms, mix_labels, rotate, rotate_each
from models.engine import Totals

pytestmark = pytest.mark.gate("torch")


@pytest.mark.parametrize("shape", [(16, 16), (9, 14)])
def test_rotation_is_torchvisions(shape: tuple[int, int]) -> None:
    images = torch.rand(5, 3, *shape)
    degrees = torch.tensor([0.0, 10.0, -10.0, 33.0, 90.0])
    turned = rotate(images, degrees)
    bilinear = v2.InterpolationMode.BILINEAR
    for image, angle, ours in zip(images, degrees.tolist(), turned):
        torch.testing.assert_close(ours, v2.functional.rotate(image, angle, bilinear), atol=1e-4, rtol=0)


def test_each_image_draws_its_own() -> None:
    images = torch.rand(1, 3, 8, 8).expand(400, -1, -1, -1)
    flipped = flip_each(images)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250
    turned = rotate_each(images, 10.0)
    assert len({image.numpy().tobytes() for image in turned}) == 400
    # no angle is larger than asked for
    limits = rotate(images[:2], torch.tensor([10.0, -10.0]))
    assert (turned - images).abs().amax() <= (limits - images[:2]).abs().amax() + 0.2


def test_draws_follow_the_seed() -> None:
    transform, _ = image_transforms(8, (0.5,) * 3, (0.5,) * 3, flip=True, rotation=10.0)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(transform(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_resize_and_normalisation() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    for images in (torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.rand(4, 3, 8, 8)):
        scaled = images / 255 if images.dtype == torch.uint8 else images
        expected = torch.nn.functional.interpolate(scaled, (12, 12), mode="bilinear", antialias=True)
        expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for transform in image_transforms(12, mean, std):
            torch.testing.assert_close(transform(images), expected)


def test_validation_is_not_augmented() -> None:
    train, val = image_transforms(8, (0.0,) * 3, (1.0,) * 3, flip=True, rotation=20.0)
    images = torch.rand(8, 3, 8, 8)
    torch.testing.assert_close(val(images), images)
    assert not torch.equal(train(images), images)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_images_are(mixup: float, cutmix: float) -> None:
    """Images whose pixels are their class: their mean is the mixed label's."""
    mix = mix_labels(mixup, cutmix, 5)
    assert mix is not None
    kinds = set()
    for seed in range(20):
        torch.manual_seed(seed)
        target = torch.randperm(5)
        images, labels = mix(target.float().view(5, 1, 1, 1).expand(-1, 3, 16, 16), target)
        torch.testing.assert_close(labels.sum(1), torch.ones(5))
        torch.testing.assert_close(images.mean((1, 2, 3)), labels @ torch.arange(5.0))
        kinds.add(len(images[0].unique()))
    # a mixed image is of one value, one with a piece of another of two
    assert kinds == ({1} if not cutmix else {1, 2})


def test_no_mixing() -> None:
    assert mix_labels(0.0, 0.0, 5) is None


def test_of_a_mixed_label_the_likeliest_class_is_right() -> None:
    totals = Totals("cpu")
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    totals.add(torch.tensor(0.5), logits, torch.tensor([[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]))
    assert totals.result() == (0.5, 0.5, 2)
