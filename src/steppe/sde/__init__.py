"""Stochastic differential equations of SGD, USAM and SAM, and the regularisers in their drifts.

``docs/theory.md`` states the framework.
"""

from steppe.sde.equation import Equation
from steppe.sde.finite_sum import FiniteSum, SDEError, logistic, problem_of, quadratic
from steppe.sde.paths import RealPaths, draw, simulate, weak_error
from steppe.sde.regularisers import Regularisers, Term, regularisers
from steppe.sde.scheme import Scheme
from steppe.sde.study import GroupMean, Slope, estimate, fit

__all__ = [
    "Equation", "FiniteSum", "GroupMean", "RealPaths", "Regularisers", "SDEError", "Scheme", "Slope", "Term", "draw",
    "estimate", "fit", "logistic", "problem_of", "quadratic", "regularisers", "simulate", "weak_error",
]  # fmt: skip
