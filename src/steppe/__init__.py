"""Sharpness-aware training for PyTorch: every method one composable optimizer around your own.

The public names are those of :mod:`steppe.api`. They are imported on first use, so that the command line answers
``--help`` and completions without importing torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from steppe.api import *  # noqa: F403 - the names of __all__
    from steppe.api import __all__ as __all__
else:

    def __getattr__(name):
        """Import every public name, and return one of them."""
        from importlib import import_module

        api = import_module("steppe.api")
        globals().update({each: getattr(api, each) for each in api.__all__}, __all__=api.__all__)
        if name not in globals():
            raise AttributeError(f"module 'steppe' has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        """Return the public names."""
        return [*__getattr__("__all__"), *globals()]
