"""Optimizers on functions of two variables: WSAM's Figure 2, and any other function.

Trajectories come from the library's optimizers. Stationary points need SciPy, figures
matplotlib: the extras ``lab`` and ``measure``.
"""

from steppe.toy.landscape import FIGURE_2, SGDM, Landscape, Method, ToyError, kl_wells, methods, trajectory
from steppe.toy.stationary import Stationary, place, stationary_points

__all__ = [
    "FIGURE_2", "SGDM", "Landscape", "Method", "Stationary", "ToyError", "kl_wells", "methods", "place",
    "stationary_points", "trajectory",
]  # fmt: skip
