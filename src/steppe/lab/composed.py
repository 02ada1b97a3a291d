"""Methods that papers compare and the library does not name: WSAM's update with another geometry.

Source: Yue et al. 2023, arXiv 2305.15817, Table 7.
"""

from collections.abc import Callable

import torch

from steppe import Adaptive, Fisher, Rule, SharpnessAware, Weighted
from steppe.rule import micro


def adaptive_wsam(
    base: torch.optim.Optimizer, rho: float = 0.5, gamma: float = 0.88, eta: float = 0.01, *, m: int | None = None
) -> SharpnessAware:
    """Return ASAM's ``eps = rho T^2 g / norm(T g)`` with WSAM's update."""
    return SharpnessAware(base, micro(m, Rule(geometry=Adaptive(eta), combine=Weighted(gamma))), rho)


def fisher_wsam(
    base: torch.optim.Optimizer, rho: float = 0.1, gamma: float = 0.88, eta: float = 1.0, *, m: int | None = None
) -> SharpnessAware:
    """Return Fisher SAM's ``eps = rho F^-1 g / sqrt(g F^-1 g)`` with WSAM's update."""
    return SharpnessAware(base, micro(m, Rule(geometry=Fisher(eta), combine=Weighted(gamma))), rho)


COMPOSED: dict[str, Callable[..., SharpnessAware]] = {"AdaptiveWSAM": adaptive_wsam, "FisherWSAM": fisher_wsam}
