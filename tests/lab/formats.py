"""Small data sets in the very formats of the real ones."""

import pickle
import struct
from io import BytesIO
from pathlib import Path

import numpy as np

GENERATOR = np.random.default_rng(0)


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 did, which is what CIFAR's authors used."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, bytes):
            super().save(obj, save_persistent_id)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)


def pickled(data) -> bytes:
    file = BytesIO()
    Python2Pickler(file, protocol=2).dump(data)
    raw = file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # numpy's name for it then
    return raw.replace(b"X\x02\x00\x00\x00u1", b"U\x02u1")  # Python 2's type codes are byte strings too


def batch(path: Path, count: int, labels: dict[bytes, list[int]]) -> np.ndarray:
    data = GENERATOR.integers(0, 256, (count, 3072), dtype=np.uint8)
    path.write_bytes(pickled({b"batch_label": b"of tests", b"data": data, b"filenames": [b"a.png"] * count, **labels}))
    return data


def cifar10(folder: Path, each: int = 12) -> list[np.ndarray]:
    """Write five training batches and a test batch; return their pixels."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    labels = [[(3 * i + k) % 10 for k in range(each)] for i in range(6)]
    return [batch(inner / name, each, {b"labels": row}) for name, row in zip(names, labels, strict=True)]


def cifar100(folder: Path, train: int = 120, test: int = 20) -> None:
    inner = folder / "cifar-100-python"
    inner.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        fine = [i % 100 for i in range(count)]
        batch(inner / name, count, {b"fine_labels": fine, b"coarse_labels": [label // 5 for label in fine]})


def image_tree(folder: Path, classes=("cat", "dog", "owl"), each: int = 6, side: tuple[int, int] = (40, 30)) -> Path:
    """Write JPEG and PNG files whose colour tells their class."""
    from PIL import Image

    colours = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
    for split in ("train", "val"):
        for name, colour in zip(classes, colours, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                suffix = ("JPEG", "png")[i % 2]
                Image.new("RGB", side, colour).save(folder / split / name / f"{i}.{suffix}")
    return folder
