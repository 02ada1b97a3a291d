"""Curvature, sharpness and gradient noise of a model's loss on data."""

from steppe.measure.density import Density, spectral_density
from steppe.measure.operator import EmpiricalFisher, GaussNewton, GradientCovariance, Hessian, Operator
from steppe.measure.problem import Problem
from steppe.measure.product import CentralDifference, DoubleBackward
from steppe.measure.spectrum import Eigenpairs, NotConverged, eigenpairs, power_iteration
from steppe.measure.trace import Estimate, hutch_pp, hutchinson

__all__ = [
    "CentralDifference",
    "Density",
    "DoubleBackward",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "NotConverged",
    "Operator",
    "Problem",
    "eigenpairs",
    "hutch_pp",
    "hutchinson",
    "power_iteration",
    "spectral_density",
]
