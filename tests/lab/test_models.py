"""Models: published sizes, shapes, how they look at examples; augmentation: what is drawn and what is done."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import steppe
from steppe.lab import augment, models, tasks
from steppe.lab.errors import LabError
from steppe.lab.settings import Settings
from steppe.lab.train import Session, train

from . import formats
from .helpers import run

CIFAR, IMAGENET = torch.zeros(3, 32, 32), torch.zeros(3, 224, 224)


@pytest.mark.parametrize(
    ("name", "example", "classes", "count"),
    [
        ("resnet18", CIFAR, 10, 11_173_962),  # as of the widely used CIFAR implementations
        ("resnet50", CIFAR, 10, 23_520_842),
        ("resnet18", IMAGENET, 1000, 11_689_512),  # torchvision's documentation
        ("resnet50", IMAGENET, 1000, 25_557_032),
        ("wrn28-10", CIFAR, 10, 36_479_194),  # 36.5 M in the paper
        ("wrn16-8", CIFAR, 10, 10_961_370),  # 11.0 M in the paper
        ("vit-ti16", IMAGENET, 1000, 5_717_416),  # timm's and DeiT's
        ("vit-s16", IMAGENET, 1000, 22_050_664),
        ("vit-b16", IMAGENET, 1000, 86_567_656),
    ],
)
def test_published_sizes(name, example, classes, count):
    with torch.device("meta"):
        model = models.build(name, example, classes)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "name", ["resnet18-w8", "resnet18-w8-gn", "resnet50-w8-gn", "wrn10-1", "wrn10-1-gn", "vit-64x2-p8", "cnn-4"]
)
def test_a_step_trains_every_parameter(name):
    model = models.build(name, CIFAR, 7)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y)
    steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05).step(batch)
    assert model(x).shape == (4, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18-w8-gn", "wrn10-1-gn", "vit-64x2-p8"])
def test_examples_keep_apart_without_batch_norm(name):
    model, x = models.build(name, CIFAR, 5), torch.randn(6, 3, 32, 32)
    torch.testing.assert_close(model(x)[:2], model(x[:2]), atol=1e-5, rtol=1e-4)


def test_large_images_get_imagenets_stem():
    model = models.build("resnet18-w8", torch.zeros(3, 64, 64), 5)
    assert model[:4](torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16, 16)


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("resnet", CIFAR, "unknown model 'resnet'; did you mean resnet18\\?"),
        ("resnet34", CIFAR, "unknown model"),
        ("vit-x4", CIFAR, "unknown model"),
        ("vit-s5", CIFAR, "patches of 5 do not tile images of 32 x 32"),
        ("cnn-4", torch.zeros(64), "model cnn-4 takes images, and an example has shape"),
    ],
)
def test_models_that_do_not_fit_are_told(name, example, message):
    with pytest.raises(LabError, match=message):
        models.build(name, example, 10)


# ---- augmentation


def test_a_crop_is_a_shift_with_black_around():
    images = torch.arange(1, 2 * 3 * 36 + 1).reshape(2, 3, 6, 6).remainder(255).to(torch.uint8)
    cut = augment.crop(images, torch.tensor([4, 0]), torch.tensor([4, 7]))
    assert torch.equal(cut[0], images[0])  # corner 4 of a border of 4: nothing moves
    assert cut[1, :, :4].unique().tolist() == [0]  # moved down by 4 ...
    assert torch.equal(cut[1, :, 4:, :3], images[1, :, :2, 3:])  # ... and left by 3
    assert cut[1, :, :, 3:].unique().tolist() == [0]


def test_flips_and_corners_are_as_often_as_they_should_be():
    change = augment.draw("crop-flip", 20_000, (32, 32), torch.Generator().manual_seed(0))
    assert change["flip"].double().mean() == pytest.approx(0.5, abs=0.015)
    for name in ("top", "left"):
        counts = torch.bincount(change[name], minlength=9) / 20_000
        assert counts.tolist() == pytest.approx([1 / 9] * 9, abs=0.01)
    images = torch.rand(2, 3, 4, 4)
    flipped = augment.apply(images, {"flip": torch.tensor([True, False])})
    assert torch.equal(flipped[0], images[0].flip(2))
    assert torch.equal(flipped[1], images[1])


def test_a_resized_crop_is_the_box_scaled():
    images = torch.rand(2, 3, 8, 8)
    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 2)
    torch.testing.assert_close(augment.resized_crop(images, whole, 8), images)
    halved = augment.resized_crop(images, whole, 4)  # each sample falls between four pixels
    torch.testing.assert_close(halved, nn.functional.avg_pool2d(images, 2))
    inner = torch.tensor([[2.0, 4.0, 4.0, 4.0]] * 2)
    torch.testing.assert_close(augment.resized_crop(images, inner, 4), images[:, :, 2:6, 4:8])


def test_boxes_lie_inside_and_have_the_areas_of_the_protocol():
    box = augment.draw("resized-crop-flip", 20_000, (256, 256), torch.Generator().manual_seed(0))
    top, left, height, width = (box[f"box_{part}"] for part in ("top", "left", "height", "width"))
    area, ratio = height * width / 256**2, width / height
    for values, low, high in ((top, 0, 256), (left, 0, 256), (area, 0.08, 1), (ratio, 3 / 4, 4 / 3)):
        assert low - 1e-6 <= values.min()
        assert values.max() <= high + 1e-4
    assert max((top + height).max(), (left + width).max()) <= 256 + 1e-3
    # an area a fits with probability min(1, log(1 / a) / log(4 / 3)): the mass above 0.75 is the integral of that
    above = (0.25 + 0.75 * math.log(0.75)) / math.log(4 / 3)
    assert area.median() == pytest.approx(0.08 + (0.67 + above) / 2, abs=0.01)


@pytest.fixture
def cifar(tmp_path):
    formats.cifar10(tmp_path)
    return Settings("cifar10", str(tmp_path), 60, 0.0, "cnn-4", epochs=2, batch_size=20, lr=0.01)


def test_cifar_is_cropped_and_flipped_and_a_run_can_be_made_again(cifar):
    changed, plain = train(run("SGD", settings=cifar)), train(run("SGD", settings=replace(cifar, augment="none")))
    assert changed.curves == train(run("SGD", settings=cifar)).curves
    assert changed.curves["train_loss"] != plain.curves["train_loss"]
    session = Session(run("SGD", settings=cifar))
    state = deepcopy(session.state())  # as a checkpoint: not the live weights
    rows, examples = next(session.batches())
    session.advance(rows, examples)
    torch.rand(7)  # augmentation does not depend on the global stream
    again = Session(run("SGD", settings=cifar))
    again.restore(state)
    again.advance(*next(again.batches()))
    assert session.last_loss() == again.last_loss()


def test_only_images_are_augmented():
    with pytest.raises(LabError, match="augment crop is for images, and digits has none"):
        tasks.check(Settings(augment="crop"))
