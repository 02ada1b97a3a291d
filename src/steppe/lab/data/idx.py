"""The idx files of MNIST and its relatives, gzipped or not."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from steppe.lab.data.raw import RawData
from steppe.lab.errors import LabError

_UBYTE = 0x08


def mnist(folder: Path) -> RawData:
    """Read the training and the test files of a folder."""
    (train, labels), (test, test_labels) = read_pair(folder, "train"), read_pair(folder, "t10k")
    return RawData(train.unsqueeze(1), labels.long(), test.unsqueeze(1), test_labels.long(), int(test_labels.max()) + 1)


def read(path: Path, dims: int) -> Tensor:
    """Return an idx file of unsigned bytes with ``dims`` dimensions: magic 0 0 type dims, sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise LabError(f"{path}: cannot read it: {error}") from error
    magic, expected = raw[:4], bytes((0, 0, _UBYTE, dims))
    if magic != expected:
        raise LabError(f"{path}: magic number {magic.hex() or 'missing'} where {expected.hex()} belongs")
    head = 4 + 4 * dims
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, head, 4)]
    if len(raw) - head != math.prod(sizes):
        shape = " x ".join(map(str, sizes))
        raise LabError(f"{path}: the header announces {shape} bytes, the file holds {max(0, len(raw) - head)}")
    return torch.frombuffer(bytearray(raw[head:]), dtype=torch.uint8).reshape(sizes)


def read_pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels called ``prefix`` (train, t10k) in ``folder``."""
    images = read(_found(folder, f"{prefix}-images-idx3-ubyte"), dims=3)
    labels = read(_found(folder, f"{prefix}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels):
        raise LabError(f"{folder}: {len(images)} {prefix} images but {len(labels)} labels")
    return images, labels


def _found(folder: Path, stem: str) -> Path:
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise LabError(f"no {stem} or {stem}.gz in {folder}")
