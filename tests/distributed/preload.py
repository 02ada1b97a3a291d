"""What every rank needs, imported once before ranks are forked."""

import torch

import steppe

__all__ = ["steppe", "torch"]
