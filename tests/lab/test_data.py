"""Readers against small sets in the real formats: contents, types, splits, constants, and what is said of damage."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from steppe.lab import data, tasks
from steppe.lab.data import cifar
from steppe.lab.errors import LabError
from steppe.lab.hardware import Process
from steppe.lab.presets import preset, settings_for
from steppe.lab.settings import Settings
from steppe.lab.train import train

from . import formats
from .helpers import run

IMAGES = Settings("cifar10", None, 60, 0.0, "cnn-4", epochs=1, batch_size=20, lr=0.01)


def on(name, folder, **changes):
    return replace(IMAGES, data=name, data_dir=str(folder), **changes)


def test_cifar10(tmp_path):
    pixels = formats.cifar10(tmp_path)
    pool = data.read(on("cifar10", tmp_path))
    assert pool.inputs.dtype == torch.uint8
    assert (pool.inputs.shape, pool.test_inputs.shape, pool.classes) == ((60, 3, 32, 32), (12, 3, 32, 32), 10)
    assert pool.labels.tolist() == [(3 * i + k) % 10 for i in range(5) for k in range(12)]
    # a row of data: 1024 red values, row by row, then green, then blue
    assert pool.inputs[13, 1, 2, 5] == pixels[1][1, 1024 + 2 * 32 + 5]
    assert np.array_equal(pool.test_inputs.reshape(12, -1).numpy(), pixels[5])
    inside = data.read(on("cifar10", tmp_path / "cifar-10-batches-py"))  # the archive's own folder will do
    assert torch.equal(inside.inputs, pool.inputs)


def test_cifar_is_standardised_by_the_published_constants(tmp_path):
    formats.cifar10(tmp_path)
    task = tasks.load(on("cifar10", tmp_path), 0)
    order = torch.randperm(60, generator=tasks.stream(0, "split"))
    pixels = data.read(on("cifar10", tmp_path)).inputs[order]
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)  # as everybody rounds them
    spread = torch.tensor([0.2470, 0.2435, 0.2616]).reshape(3, 1, 1)
    torch.testing.assert_close(task.inputs[:60], (pixels / 255 - mean) / spread, rtol=2e-3, atol=2e-3)
    assert task.inputs[torch.tensor([4, 2])].shape == (2, 3, 32, 32)
    assert torch.equal(task.inputs[3], task.inputs[:4][3])


def test_cifar100_takes_the_fine_labels(tmp_path):
    formats.cifar100(tmp_path)
    pool = data.read(on("cifar100", tmp_path))
    assert (len(pool.labels), len(pool.test_labels), pool.classes) == (120, 20, 100)
    assert pool.labels.tolist() == [i % 100 for i in range(120)]
    assert pool.constants == cifar.CIFAR100


@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_newer_pythons_and_arrays_stored_by_columns_are_read_too(tmp_path, order):
    formats.cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    pixels = formats.GENERATOR.integers(0, 256, (4, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({"data": np.array(pixels, order=order), "labels": [0, 1, 2, 3]}))
    pool = data.read(on("cifar10", tmp_path))
    assert pool.test_labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(pool.test_inputs.reshape(4, 3072).numpy(), pixels)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def written(raw):
    return lambda path: path.write_bytes(raw)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


# an array of objects over the file's own bytes: every use of it would follow a pointer that the file chose
FORGED = b"cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\n(U\x01OtRU\x08AAAAAAAAtR"
DIRECT = b"cnumpy\nndarray\n(K\x01\x85NU\x08AAAAAAAAtR"
STRUCTURED = np.zeros(3072, [("a", "u1")])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no data_batch_3 in"),
        (cut, "data_batch_3: cannot read it"),
        (written(b""), "data_batch_3: cannot read it"),
        (written(formats.pickled({b"data": np.zeros((2, 3072), np.uint8)})), "expected a pickled dict with 'labels'"),
        (written(formats.pickled({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]})), r"shape \(2, 9\)"),
        (written(formats.pickled({b"data": np.zeros((2, 3072)), b"labels": [1, 2]})), "of type 'f8'"),
        (written(formats.pickled({b"data": np.array([{}]), b"labels": [1]})), "of type 'O8'"),
        (written(formats.pickled({b"data": STRUCTURED, b"labels": [1]})), "of type 'V1'"),
        (written(pickle.dumps(Evil())), "wants to run 'builtins.print'"),
        (written(b"\x80\x02cnumpy.strings\nencode\n" + FORGED + b"\x85R."), "wants to run 'numpy.strings.encode'"),
        (written(b"\x80\x02}(U\x04dataK\x00U\x06labels]" + FORGED + b"au."), "of type b'O'"),
        (written(b"\x80\x02}(U\x04data" + DIRECT + b"U\x06labels]K\x01au."), "'str' object is not callable"),
        (lambda path: formats.batch(path, 3, {b"labels": [1, 2]}), "51 training examples but 50 labels"),
        (lambda path: formats.batch(path, 2, {b"labels": [1, 10]}), "labels must lie in 0 to 9, they go from 0 to 10"),
    ],
)
def test_damaged_cifar_is_told(tmp_path, damage, message, capsys):
    formats.cifar10(tmp_path)
    damage(tmp_path / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(LabError, match=message):
        data.read(on("cifar10", tmp_path))
    assert capsys.readouterr().out == ""


def test_where_data_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPPE_DATA", str(tmp_path))
    with pytest.raises(LabError, match=rf"no cifar100 in {tmp_path}/cifar100, {tmp_path}: unpack"):
        data.read(replace(IMAGES, data="cifar100"))
    formats.cifar100(tmp_path / "cifar100")
    assert data.find("cifar100") == tmp_path / "cifar100"
    with pytest.raises(LabError, match=r"no cifar-10-batches-py in"):
        data.find("cifar10", str(tmp_path))
    with pytest.raises(LabError, match="unknown data 'cifar'"):
        data.read(replace(IMAGES, data="cifar"))


# ---- a user's own


OWN = """
import torch
def task():
    x = torch.randn(420, 5, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    return x[:400], y[:400], x[400:], y[400:]
def pixels():
    x = torch.randint(256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    return x, torch.arange(20) % 4, x, torch.arange(20) % 4
def net(example, classes):
    return torch.nn.Linear(example.numel(), classes)
def wrong():
    return 3
def floats():
    return torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)
def saved(folder):
    from pathlib import Path
    from steppe.lab.data import RawData
    x, y = torch.full((4, 1, 2, 2), 255).byte(), torch.arange(4)
    return RawData(x, y, x, y, int((Path(folder) / "classes").read_text()), ((0.5,), (0.25,)))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
def test_a_users_own_task_and_model():
    settings = settings_for(preset("my_own:task"), {"epochs": 20, "batch_size": 20, "model": "my_own:net", "lr": 0.5})
    assert settings.train_size == 400
    record = train(run("SAM(rho=0.05)", settings=settings))
    assert record.classes == 2
    assert record.test_error <= 0.1
    assert torch.equal(tasks.load(settings, 0).test_inputs, data.read(settings).test_inputs)  # floats stay as they are


@pytest.mark.usefixtures("own")
def test_a_users_images_are_standardised_by_channel():
    settings = settings_for(preset("my_own:pixels"), {"batch_size": 10})
    seen = tasks.load(settings, 0).inputs[:20]
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.transpose(0, 1).reshape(3, -1).std(1), torch.ones(3))


@pytest.mark.usefixtures("own")
def test_a_users_function_may_take_the_folder_and_give_constants(tmp_path):
    (tmp_path / "classes").write_text("7")
    settings = Settings("my_own:saved", str(tmp_path), 4, 0.0, "cnn-4", batch_size=2)
    task = tasks.load(settings, 0)
    assert task.classes == 7
    assert task.inputs[:4].unique().tolist() == [2.0]  # (1 - 0.5) / 0.25


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:task", "module 'nowhere' cannot be imported: ModuleNotFoundError: No module"),
        ("my_own:nothing", "module 'my_own' has no function 'nothing'"),
        ("my_own:torch", "module 'my_own' has no function 'torch'"),
        ("my_own:wrong", "must return a dict of train, test and model, or four tensors"),
        ("my_own:floats", "labels must be whole numbers"),
    ],
)
def test_mistakes_in_a_users_task_are_told(name, message):
    with pytest.raises(LabError, match=message):
        data.read(replace(IMAGES, data=name))


# ---- noise, for every source alike


def test_noise_is_on_training_labels_alone_and_seeded(tmp_path):
    formats.cifar100(tmp_path)
    settings = on("cifar100", tmp_path, train_size=120, noise=0.4)
    clean, noisy, other = (tasks.load(replace(settings, noise=share), s) for share, s in ((0.0, 3), (0.4, 3), (0.4, 4)))
    assert torch.equal(noisy.labels, tasks.load(settings, 3).labels)
    assert not torch.equal(noisy.labels, clean.labels)
    assert not torch.equal(noisy.labels, other.labels)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(clean.inputs[:5], noisy.inputs[:5])


def test_moving_a_task_changes_no_number(tmp_path):
    formats.cifar10(tmp_path)
    task = tasks.load(on("cifar10", tmp_path), 0)
    moved = task.to(Process().device)
    assert torch.equal(task.inputs[:9], moved.inputs[torch.arange(9)])
    assert moved.inputs.shape == (60, 3, 32, 32)


def test_small_images_are_scaled_up_where_a_model_needs_it(tmp_path):
    formats.cifar10(tmp_path)
    plain = tasks.load(on("cifar10", tmp_path), 0).inputs[:2]
    large = tasks.load(on("cifar10", tmp_path, image_size=64), 0).inputs
    assert large.shape[-1] == 64
    torch.testing.assert_close(large[:2], torch.nn.functional.interpolate(plain, (64, 64), mode="bilinear"))
