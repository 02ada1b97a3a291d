"""Curvature, sharpness, gradient noise and landscape of a model's loss on data."""

from steppe.measure.ball import AverageCase, Sharpness, WorstCase, published
from steppe.measure.landscape import Line, Plane, filter_normalised, line, plane, towards
from steppe.measure.minimum import Minimum, minimum
from steppe.measure.noise import GradientNoise, gradient_noise
from steppe.measure.operator import (
    CentralDifference,
    EmpiricalFisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    Operator,
)
from steppe.measure.problem import Problem
from steppe.measure.spectrum import Density, Eigenpairs, NotConverged, eigenpairs, power_iteration, spectral_density
from steppe.measure.trace import Estimate, alignment, hutch_pp, hutchinson

__all__ = [
    "AverageCase", "CentralDifference", "Density", "Eigenpairs", "EmpiricalFisher", "Estimate",
    "GaussNewton", "GradientCovariance", "GradientNoise", "Hessian", "Line", "Minimum", "NotConverged", "Operator",
    "Plane", "Problem", "Sharpness", "WorstCase", "alignment", "eigenpairs", "filter_normalised", "gradient_noise",
    "hutch_pp", "hutchinson", "line", "minimum", "plane", "power_iteration", "published", "spectral_density", "towards",
]  # fmt: skip
