"""CIFAR-10, CIFAR-100 and SVHN as their authors publish them and torchvision unpacks them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steppe.lab.data.pool import Constants, Pool
from steppe.lab.settings import LabError

# Mean and spread of the training pixels, a channel each: the sets' own values, to five digits.
CIFAR10: Constants = ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159))
CIFAR100: Constants = ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615))
SVHN: Constants = ((0.43768, 0.44377, 0.47280), (0.19803, 0.20102, 0.19704))

_ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "encode"}  # what the files' arrays are made with


def cifar10(folder: Path) -> Pool:
    """Read five training batches and one of tests: pickled dicts with `data` (n, 3072) and `labels`."""
    inner = folder / "cifar-10-batches-py"
    parts = [_batch(inner / f"data_batch_{i}", "labels") for i in range(1, 6)]
    images, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return Pool(images, labels, *_batch(inner / "test_batch", "labels"), 10, CIFAR10)


def cifar100(folder: Path) -> Pool:
    """Read the training and the test file: pickled dicts with `data` (n, 3072) and `fine_labels`."""
    inner = folder / "cifar-100-python"
    return Pool(*_batch(inner / "train", "fine_labels"), *_batch(inner / "test", "fine_labels"), 100, CIFAR100)


def svhn(folder: Path) -> Pool:
    """Read the cropped digits: MATLAB files with `X` (32, 32, 3, n) and `y` (n, 1), where 10 stands for the digit 0."""
    return Pool(*_matlab(folder / "train_32x32.mat"), *_matlab(folder / "test_32x32.mat"), 10, SVHN)


def _batch(path: Path, key: str) -> tuple[Tensor, Tensor]:
    found = _unpickled(path)
    try:
        data, labels = np.asarray(found["data"]), torch.tensor(found[key], dtype=torch.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise LabError(f"{path}: no 'data' and '{key}' in it: {error}") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise LabError(f"{path}: data must be bytes of shape (n, 3072), found {data.dtype} of shape {data.shape}")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), labels


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = _Arrays(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
    except FileNotFoundError:
        raise LabError(f"no {path.name} in {path.parent}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise LabError(f"{path}: cannot read it: {type(error).__name__}: {error}") from None


class _Arrays(pickle.Unpickler):
    """Reads plain values and numpy arrays; a file that names any other code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which no array needs")
        if module == "numpy.core.multiarray" and np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            module = "numpy._core.multiarray"  # renamed since the files were written
        return super().find_class(module, name)


def _matlab(path: Path) -> tuple[Tensor, Tensor]:
    from scipy.io import loadmat

    if not path.is_file():
        raise LabError(f"no {path.name} in {path.parent}")
    try:
        found = loadmat(path, variable_names=("X", "y"))
        images, labels = found["X"], found["y"]
    except Exception as error:  # damaged files raise nearly anything
        raise LabError(f"{path}: cannot read it: {type(error).__name__}: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise LabError(f"{path}: X must be bytes of shape (32, 32, 3, n), found {images.dtype} of shape {images.shape}")
    digits = torch.from_numpy(labels.astype(np.int64).reshape(-1)) % 10
    return torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1))), digits
