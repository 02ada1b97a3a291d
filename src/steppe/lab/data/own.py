"""A user's own task or model: `module:function`, found as Python finds modules or in the current folder."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steppe.lab.data.pool import Pool
from steppe.lab.settings import LabError


def function(name: str) -> Callable[..., Any]:
    """Return the function that `module:function` names."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LabError(f"cannot find {name}: {error}") from None
    if not callable(found):
        raise LabError(f"{name} is no function")
    return found  # type: ignore[no-any-return]


def read(name: str) -> Pool:
    """Call the function: it returns (inputs, labels, test_inputs, test_labels), four tensors.

    Float inputs are used as they are; images as bytes, shape (n, channels, height, width), are standardised by the mean
    and spread of each channel of the training images.
    """
    made = function(name)()
    if not (isinstance(made, tuple) and len(made) == 4 and all(isinstance(part, Tensor) for part in made)):
        raise LabError(f"{name} must return four tensors: inputs, labels, test_inputs, test_labels")
    inputs, labels, test_inputs, test_labels = made
    if labels.is_floating_point() or labels.ndim != 1:
        raise LabError(f"{name}: labels must be whole numbers of shape (n,), not {labels.dtype} {tuple(labels.shape)}")
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise LabError(f"{name}: inputs must be floats, or images as bytes, not {inputs.dtype}")
    classes = int(max(labels.max(), test_labels.max())) + 1
    return Pool(inputs, labels.long(), test_inputs, test_labels.long(), classes)
