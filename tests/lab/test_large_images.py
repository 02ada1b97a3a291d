"""The example of large images: folders are decoded when needed, damage is told, a checkpoint is fine-tuned."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steppe.lab import data, models, tasks
from steppe.lab.errors import LabError
from steppe.lab.settings import Settings
from steppe.lab.train import train

from . import formats
from .helpers import run

IMAGES = Settings("large_images:small", None, 18, 0.0, "cnn-4", epochs=12, batch_size=6, lr=0.05, image_size=14)


@pytest.fixture
def large_images(monkeypatch, tmp_path):
    pytest.importorskip("PIL", reason="the optional package pillow is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.chdir(tmp_path)
    import large_images

    large_images.small = lambda folder: large_images.imagenet(folder, side=16)
    yield large_images
    del sys.modules["large_images"]


def test_an_image_tree_is_decoded_when_needed(large_images, tmp_path):
    formats.image_tree(tmp_path / "tree")
    settings = replace(IMAGES, data_dir=str(tmp_path / "tree"))
    pool = data.read(settings)
    assert (pool.classes, len(pool.labels), len(pool.test_labels)) == (3, 18, 18)
    assert pool.inputs.shape == (18, 3, 16, 16)
    red, green = pool.inputs[torch.tensor([0, 6])]
    assert abs(red.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 30.0])).max() <= 2  # JPEG's rounding
    assert abs(green.float().mean((1, 2)) - torch.tensor([30.0, 200.0, 30.0])).max() <= 2
    task = tasks.load(settings, 0)
    assert task.inputs[:2].shape == (2, 3, 14, 14)
    mean, spread = torch.tensor(large_images.IMAGENET)
    reds = task.inputs[(task.labels == 0).nonzero()[:, 0]]
    expected = (torch.tensor([200.0, 30.0, 30.0]) / 255 - mean) / spread
    torch.testing.assert_close(reds.mean((0, 2, 3)), expected, atol=0.05, rtol=0)
    assert train(run("SAM(rho=0.05)", settings=replace(settings, augment="resized-crop-flip"))).test_error == 0


def test_decoding_keeps_the_middle(large_images, tmp_path):
    from PIL import Image

    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    image.save(tmp_path / "colour.png")
    image.convert("L").save(tmp_path / "grey.png")
    assert large_images.opened(tmp_path / "colour.png", 20).min() == 255
    assert large_images.opened(tmp_path / "grey.png", 20).shape == (3, 20, 20)  # grey becomes three channels


def test_damaged_image_trees_are_told(large_images, tmp_path):
    folder = formats.image_tree(tmp_path / "t")
    (folder / "train" / "cat" / "0.JPEG").write_bytes(b"no image")
    with pytest.raises(LabError, match=r"cat/0\.JPEG: cannot read it"):
        data.read(replace(IMAGES, data_dir=str(folder))).inputs[torch.arange(18)]
    formats.image_tree(tmp_path / "empty", each=0)
    for name, message in (("empty", "no images in the class folders"), ("none", "no class folders in none/train")):
        with pytest.raises(LabError, match=message):
            large_images.imagenet(name)


def test_a_checkpoint_is_fine_tuned(large_images, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the optional package transformers is not installed")
    with pytest.raises(LabError, match=r"no config\.json in vit-b16"):
        large_images.vit(torch.zeros(3, 32, 32), 10)
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**size, image_size=32, patch_size=8)
    kept = transformers.ViTForImageClassification(config)
    kept.save_pretrained("vit-b16")
    formats.cifar10(tmp_path)
    settings = Settings("large_images:cifar10", str(tmp_path), 60, 0.0, "large_images:vit", 1, 20, lr=1e-3)
    task = tasks.load(settings, 0)
    assert task.inputs[:60].abs().max() <= 1  # the checkpoint's constants, not CIFAR's
    model = models.build(settings.model, task.inputs[0], 10)
    assert model(task.inputs[:2]).shape == (2, 10)
    own = {key.removeprefix("inner."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(own[key], value) for key, value in kept.state_dict().items() if "classifier" not in key)
    record = train(run("SAM(rho=0.05)", settings=replace(settings, optimizer="adamw", augment="crop-flip")))
    assert record.base.startswith("AdamW(lr=0.001, betas=(0.9, 0.999)")
