"""The idx reader: what it reads, and what it says of damage."""

import gzip

import pytest
import torch

from steppe.lab.data import idx
from steppe.lab.errors import LabError

from .helpers import write_idx, write_images

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
HEAD = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in IMAGES.shape)
WHOLE = HEAD + bytes(range(24))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_and_labels_are_read_gzipped_or_not(tmp_path, suffix):
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", IMAGES)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", torch.tensor([3, 7], dtype=torch.uint8))
    images, labels = idx.read_pair(tmp_path, "train")
    assert torch.equal(images, IMAGES)
    assert labels.tolist() == [3, 7]


def test_a_missing_file_and_unequal_numbers_are_told(tmp_path):
    with pytest.raises(LabError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz in"):
        idx.read_pair(tmp_path, "train")
    folder = write_images(tmp_path / "d")
    write_idx(folder / "train-labels-idx1-ubyte.gz", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(LabError, match="96 train images but 3 labels"):
        idx.read_pair(folder, "train")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("f", b"", "magic number missing where 00000803 belongs"),
        ("f", b"\x89PNG....", "magic number 89504e47 where 00000803 belongs"),
        ("f", bytes((0, 0, 8, 1)) + WHOLE[4:], "magic number 00000801 where 00000803 belongs"),
        ("f", WHOLE[:-1], "announces 2 x 3 x 4 bytes, the file holds 23"),
        ("f", WHOLE + b"\0", "announces 2 x 3 x 4 bytes, the file holds 25"),
        ("f", WHOLE[:5], "holds 0"),
        ("f.gz", b"no gzip at all", "cannot read it"),
        ("f.gz", gzip.compress(b"abc" * 1000, mtime=0)[:20], "cannot read it"),
    ],
)
def test_damage_is_told(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(LabError, match=message):
        idx.read(tmp_path / name, dims=3)
