"""A user's own data: a function named ``module:function`` that returns four tensors."""

import torch
from torch import Tensor

from steppe.lab.data.raw import RawData
from steppe.lab.errors import LabError
from steppe.lab.importing import imported


def read(name: str) -> RawData:
    """Call the function, which returns (inputs, labels, test_inputs, test_labels), four tensors.

    Float inputs are used as they are. Images as bytes, shape (n, channels, height, width), are standardised by the mean
    and standard deviation of each channel of the training images.
    """
    made = imported(name)()
    if not (isinstance(made, tuple) and len(made) == 4 and all(isinstance(part, Tensor) for part in made)):
        raise LabError(f"{name} must return four tensors: inputs, labels, test_inputs, test_labels")
    inputs, labels, test_inputs, test_labels = made
    if labels.is_floating_point() or labels.ndim != 1:
        raise LabError(f"{name}: labels must be whole numbers of shape (n,), not {labels.dtype} {tuple(labels.shape)}")
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise LabError(f"{name}: inputs must be floats, or images as bytes, not {inputs.dtype}")
    classes = int(max(labels.max(), test_labels.max())) + 1
    return RawData(inputs, labels.long(), test_inputs, test_labels.long(), classes)
