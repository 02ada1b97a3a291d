import gzip

import pytest
import torch

from steppe.lab.data import idx
from steppe.lab.settings import LabError

from .helpers import write_idx, write_images

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_round_trip(tmp_path, name):
    write_idx(tmp_path / name, IMAGES)
    assert torch.equal(idx.read(idx.find(tmp_path, "images"), dims=3), IMAGES)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(LabError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz in"):
        idx.read_pair(tmp_path, "train")


@pytest.mark.parametrize(("raw", "shown"), [(b"", "missing"), (b"\x89PNG....", "89504e47")])
def test_wrong_magic_number(tmp_path, raw, shown):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(LabError, match=rf"magic number {shown} where 00000803 belongs"):
        idx.read(tmp_path / "f", dims=3)


def test_labels_where_images_belong(tmp_path):
    write_idx(tmp_path / "f", IMAGES.flatten())
    with pytest.raises(LabError, match="magic number 00000801 where 00000803 belongs"):
        idx.read(tmp_path / "f", dims=3)


@pytest.mark.parametrize(("change", "held"), [(lambda raw: raw[:-1], 23), (lambda raw: raw + b"\0", 25)])
def test_sizes_that_do_not_agree(tmp_path, change, held):
    write_idx(tmp_path / "f", IMAGES)
    (tmp_path / "f").write_bytes(change((tmp_path / "f").read_bytes()))
    with pytest.raises(LabError, match=rf"announces 2 x 3 x 4 bytes, the file holds {held}"):
        idx.read(tmp_path / "f", dims=3)


def test_header_cut_short(tmp_path):
    (tmp_path / "f").write_bytes(bytes((0, 0, 8, 3, 0)))
    with pytest.raises(LabError, match="holds 0"):
        idx.read(tmp_path / "f", dims=3)


@pytest.mark.parametrize("raw", [b"no gzip at all", gzip.compress(b"abc" * 1000)[:20]], ids=["none", "cut"])
def test_damaged_gzip(tmp_path, raw):
    (tmp_path / "f.gz").write_bytes(raw)
    with pytest.raises(LabError, match="cannot read it"):
        idx.read(tmp_path / "f.gz", dims=3)


def test_images_and_labels_must_be_as_many(tmp_path):
    folder = write_images(tmp_path / "d")
    write_idx(folder / "train-labels-idx1-ubyte.gz", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(LabError, match="96 train images but 3 labels"):
        idx.read_pair(folder, "train")
