"""Run another project's tests with ``steppe.SAM(base, rho=0)`` in the place of every optimizer of torch.

It is a plugin of pytest: ``python -m pytest -p tools.in_place path/to/their/tests``. A base that steppe refuses stays
as it is, and is counted; so what fails here and not without the plugin differs. What torch's, accelerate's and
Lightning's tests give: docs/stacks/their-tests.md.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

import steppe

refused: collections.Counter[str] = collections.Counter()
made: collections.Counter[str] = collections.Counter()


class Through(type):
    """The class of the stand-ins: a steppe optimizer is an instance of its base's."""

    base: type

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(getattr(instance, "base", instance), cls.base)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.base)


def in_place_of(base: type[torch.optim.Optimizer]) -> Any:
    """Return a class that makes steppe optimizers around ``base``."""

    def made_by(cls: type, *args: Any, **options: Any) -> Any:
        if cls is not stand_in:  # a subclass of theirs
            return object.__new__(cls)
        plain = base(*args, **options)
        try:
            optimizer = steppe.SAM(plain, rho=0.0)
        except (TypeError, ValueError) as error:
            refused[str(error).split(":")[0]] += 1
            return plain
        made[base.__name__] += 1
        return optimizer

    stand_in = Through(base.__name__, (base,), {"__new__": made_by, "__doc__": base.__doc__, "base": base})
    return stand_in


for name, value in list(vars(torch.optim).items()):
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer:
        setattr(torch.optim, name, in_place_of(value))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many optimizers were made, and which were refused."""
    terminalreporter.write_line(f"steppe in the place of {sum(made.values())} optimizers: {dict(made)}")
    terminalreporter.write_line(f"refused, so left as they are: {dict(refused)}")
