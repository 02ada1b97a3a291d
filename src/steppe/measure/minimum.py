"""The measurements of one minimum as one row of a table."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from steppe.batch import Loss
from steppe.engine.nested import Data
from steppe.measure.ball import WorstCase
from steppe.measure.noise import gradient_noise
from steppe.measure.operator import Hessian
from steppe.measure.problem import Problem
from steppe.measure.spectrum import eigenpairs
from steppe.measure.trace import hutch_pp


@dataclass(frozen=True)
class Minimum:
    """A row of a table of minima: plain numbers, fit for JSON.

    Of ``n`` examples, in evaluation mode and without weight decay: the mean ``loss``; ``error``, the share of wrong
    answers (``None`` if the loss is no criterion on class labels); ``g_norm``, the norm of the mean loss's gradient.
    Of the Hessian: ``top``, its largest eigenvalue, with ``top_residual``, ``norm(H v - top v)``; ``trace`` with its
    standard error. ``trace_V`` is the trace of the gradient covariance (population). ``sharpness`` is the mean rise of
    the loss in the ball of ``measure`` (an expression), with its standard error over the subsets (``None`` for one
    subset). ``converged`` says whether eigenvalue and trace met their tolerances, ``products`` how many Hessian-vector
    products they took.
    """

    n: int
    loss: float
    error: float | None
    g_norm: float
    top: float
    top_residual: float
    trace: float
    trace_error: float
    trace_V: float
    sharpness: float
    sharpness_error: float | None
    measure: str
    converged: bool
    products: int


def minimum(
    model: nn.Module,
    loss: nn.Module | Loss,
    data: Data | Iterable[Data],
    *,
    sharpness: WorstCase = WorstCase(rho=0.05),  # noqa: B008 - frozen
    batch_size: int | None = None,
    tol: float = 0.05,
    seed: int = 0,
) -> Minimum:
    """Return loss, error, top Hessian eigenvalue, Hessian trace, tr V and m-sharpness of a trained model on data.

    Args:
        model, loss, data, batch_size: as in :class:`Problem`; a criterion module on class labels gives the error too.
        sharpness: the measure of sharpness; the default is m-sharpness with ``m = 128`` and rho 0.05.
        tol: relative standard error of the trace. The eigenvalue's relative residual is at most 1e-3.
        seed: seed of all probes.

    Raises:
        ValueError: see :class:`Problem` and :func:`gradient_noise`.
        FloatingPointError: a measured number is not finite, as at weights that have diverged.

    Example:
        >>> row = measure.minimum(model, nn.CrossEntropyLoss(reduction="none"), (inputs, targets))
        >>> print(f"loss {row.loss:.3f}, top eigenvalue {row.top:.2f}, tr H {row.trace:.1f} +- {row.trace_error:.1f}")
    """
    problem = Problem(model, loss, data, batch_size=batch_size)
    H = Hessian(problem)
    top = eigenpairs(H, seed=seed)
    trace = hutch_pp(H, tol=tol, most=400, seed=seed)
    noise = gradient_noise(problem)
    ball = sharpness(problem)
    found = Minimum(
        n=problem.n,
        loss=float(problem.losses().double().mean()),
        error=_error(problem),
        g_norm=noise.g_norm,
        top=top.value,
        top_residual=top.residuals[0],
        trace=trace.value,
        trace_error=trace.error,
        trace_V=noise.trace,
        sharpness=ball.value,
        sharpness_error=ball.error if len(ball.rises) > 1 else None,
        measure=repr(sharpness),
        converged=top.converged and trace.converged,
        products=top.products + trace.products,
    )
    if bad := [name for name, value in vars(found).items() if isinstance(value, float) and not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(bad)} of the minimum: not finite")
    return found


def _error(problem: Problem) -> float | None:
    if not isinstance(problem.loss, nn.Module):
        return None
    wrong = 0
    with problem.untouched(), torch.no_grad():
        for batch in problem.batches():
            outputs, targets = problem.outputs(batch), batch.data[1]
            if outputs.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
                return None  # no class labels
            wrong += int((outputs.argmax(1) != targets).sum())
    return wrong / problem.n
