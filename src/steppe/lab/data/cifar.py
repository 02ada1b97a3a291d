"""CIFAR-10 and CIFAR-100 as their authors publish them and torchvision unpacks them.

The files are pickles, which can run any code. The reader here takes dicts, lists, numbers, strings and arrays of
bytes; it imports nothing that a file names, and hands nothing from a file to torch but bytes and a shape.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from steppe.lab.data.raw import Constants, RawData
from steppe.lab.errors import LabError

# Mean and standard deviation of the training pixels, by channel: the sets' own values, to five digits.
CIFAR10: Constants = ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159))
CIFAR100: Constants = ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615))


def cifar10(folder: Path) -> RawData:
    """Read five training batches and one test batch: pickled dicts with ``data`` (n, 3072) and ``labels``."""
    inner = folder / "cifar-10-batches-py"
    images, labels = zip(*(_batch(inner / f"data_batch_{i}", "labels") for i in range(1, 6)), strict=True)
    return RawData(torch.cat(images), torch.cat(labels), *_batch(inner / "test_batch", "labels"), 10, CIFAR10)


def cifar100(folder: Path) -> RawData:
    """Read the training and the test file: pickled dicts with ``data`` (n, 3072) and ``fine_labels``."""
    inner = folder / "cifar-100-python"
    return RawData(*_batch(inner / "train", "fine_labels"), *_batch(inner / "test", "fine_labels"), 100, CIFAR100)


def _batch(path: Path, key: str) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise LabError(f"no {path.name} in {path.parent}")
    try:
        loaded = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        found = {name.decode() if isinstance(name, bytes) else name: value for name, value in loaded.items()}
        labels, images = torch.tensor(found[key], dtype=torch.int64), found["data"].values.reshape(-1, 3, 32, 32)
        if labels.dim() != 1:
            raise pickle.UnpicklingError(f"found labels of shape {tuple(labels.shape)}")
        return images, labels
    except Exception as error:  # damaged pickles raise nearly anything
        expected = f"expected a pickled dict with '{key}' and with 'data', bytes of shape (n, 3072)"
        raise LabError(f"{path}: cannot read it, {expected}: {type(error).__name__}: {error}") from None


class _Bytes:
    """Stands for an array in a pickle; ``values`` are its bytes, shape (n, 3072)."""

    values: Tensor

    def __init__(self, *arguments: object) -> None:
        """Ignore what ``_reconstruct`` takes: the class, an empty shape and a placeholder type."""

    def __setstate__(self, state: tuple[int, tuple[int, int], "_Type", bool, bytes]) -> None:
        _, shape, kind, by_columns, raw = state
        if not isinstance(kind, _Type) or not isinstance(raw, bytes) or shape[1:] != (3072,):
            raise pickle.UnpicklingError(f"found an array of shape {shape}")
        flat = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
        self.values = flat.reshape(shape[::-1]).T if by_columns else flat.reshape(shape)


class _Type:
    """Stands for the type of an array in a pickle: unsigned bytes."""

    def __init__(self, code: object, *flags: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"found an array of type {code!r}")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which bytes have none of."""


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that Python 3 wrote as text into a pickle of protocol 2."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Bytes,
    ("numpy._core.multiarray", "_reconstruct"): _Bytes,  # NumPy 2
    ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct, never called
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle._Unpickler):
    """Reads plain values and arrays of bytes; a file that names any other code is refused.

    This is pickle's reader in Python: the one in C reserves as much memory as a damaged file announces. Of a whole file
    in memory no part is longer than the file; the one value that is made before it is read, a bytearray, is left out.
    """

    dispatch: ClassVar = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it wants to run {f'{module}.{name}'!r}, which no array of bytes needs")
        return _STAND_INS[module, name]
