"""Stochastic differential equations of SGD, USAM and SAM, and the regularisers in their drifts.

``docs/theory.md`` states the framework. The core never imports this package.
"""

from steppe.sde.compare import Estimate, Slope, estimate, fit, weak_error
from steppe.sde.equation import Equation
from steppe.sde.problem import Problem, SDEError, logistic, problem_of, quadratic
from steppe.sde.real import RealPaths, draw
from steppe.sde.regularisers import Regularisers, Term, regularisers
from steppe.sde.scheme import Scheme, scheme_of
from steppe.sde.simulate import simulate

__all__ = [
    "Equation",
    "Estimate",
    "Problem",
    "RealPaths",
    "Regularisers",
    "SDEError",
    "Scheme",
    "Slope",
    "Term",
    "draw",
    "estimate",
    "fit",
    "logistic",
    "problem_of",
    "quadratic",
    "regularisers",
    "scheme_of",
    "simulate",
    "weak_error",
]
