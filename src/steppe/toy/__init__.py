"""Optimizers on functions of two variables: WSAM's Figure 2, and any function of the reader's own.

Trajectories come from the library's own optimizers on a model of two parameters. Needs the extra
`pip install "steppe[lab]"`; the core never imports this package.
"""

from steppe.toy.landscape import FIGURE_2, Landscape, ToyError, imported, kl_wells
from steppe.toy.stationary import Place, Stationary, place, stationary_points
from steppe.toy.trajectory import SGDM, Method, methods, trajectory

__all__ = [
    "FIGURE_2",
    "SGDM",
    "Landscape",
    "Method",
    "Place",
    "Stationary",
    "ToyError",
    "imported",
    "kl_wells",
    "methods",
    "place",
    "stationary_points",
    "trajectory",
]
