"""Many independent paths at once, of a real optimizer and of an equation, and the weak error between them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from steppe.batch import Batch
from steppe.engine.nested import mapped
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.vector import TINY, Vector
from steppe.optimizer import SharpnessAware
from steppe.pieces.geometry import Euclidean
from steppe.rule import Micro, Rule
from steppe.sde.equation import Equation
from steppe.sde.finite_sum import FiniteSum, SDEError
from steppe.sde.scheme import Scheme

LEVELS = ((1, 1 / 3), (2, -2.0), (4, 8 / 3))  # the equation's steps to one of the optimizer, and their weights
GROUPS = 16  # groups of paths, for the standard error
Errors = dict[str, list[float]]  # by test function, one number for each group
Progress = Callable[[int, int], None]  # (steps done, steps in all)


class RealPaths:
    """Paths of the library's optimizer: ``step`` takes a batch for every path and returns the new points.

    All paths are rows of one parameter and the loss is the sum of theirs, so that one step of one optimizer is a step
    of each path. The rows' gradients are independent except in SAM's norm, which :class:`RowNorm` takes row by row.

    Args:
        problem: the finite sum.
        scheme: rule, learning rate and radius.
        x: the starts, shape ``(paths, d)``.

    Example:
        >>> paths = RealPaths(problem, scheme, x0.expand(100, -1))
        >>> for _ in range(20):
        ...     x = paths.step(draw(scheme, len(problem), 100, generator))
    """

    def __init__(self, problem: FiniteSum, scheme: Scheme, x: Tensor) -> None:
        self.problem, self.x = problem, nn.Parameter(x.clone())
        self._model = nn.ParameterList([self.x])
        base = torch.optim.SGD(self._model.parameters(), lr=scheme.lr)
        full = self._batch(torch.arange(len(problem)).expand(len(x), -1)) if scheme.full else None
        rule = by_row(scheme.rule, len(x))
        self.optimizer = SharpnessAware(base, rule, scheme.rho, full=full, parallel=False, check_finite=False)

    def step(self, index: Tensor) -> Tensor:
        """Take one step, path ``p`` on the examples ``index[p]``; return the new points, shape ``(paths, d)``.

        Raises:
            SDEError: a path is no longer finite.
        """
        self.optimizer.step(self._batch(index))
        x = self.x.detach().clone()
        require_finite(x, "the optimizer's paths")
        return x

    def _batch(self, index: Tensor) -> Batch:
        """Return row ``p`` on the examples ``index[p]``, ordered so that micro-batches hold examples of every path."""
        paths, size = index.shape
        rows = torch.arange(paths).repeat(size)
        return Batch(self._model, self._losses, {"row": rows, "example": index.T.flatten()})

    def _losses(self, model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        """Return the loss of every pair of row and example, times the number of rows: the mean is the sum over rows."""
        examples = mapped(lambda t: t[data["example"]], self.problem.data)
        losses: Tensor = vmap(self.problem.loss)(self.x[data["row"]], examples)
        return losses * len(self.x)


def draw(scheme: Scheme, n: int, paths: int, generator: torch.Generator) -> Tensor:
    """Return a random batch for every path, indices of shape ``(paths, size)``."""
    if scheme.replacement:
        return torch.randint(n, (paths, scheme.size), generator=generator)
    return largest(torch.rand(paths, n, generator=generator), scheme)


def largest(z: Tensor, scheme: Scheme) -> Tensor:
    """Return the ``size`` indices with the largest ``z``; for exchangeable entries all batches are equally likely."""
    return z.argsort(1, descending=True)[:, : scheme.size]


@dataclass(frozen=True)
class RowNorm:
    """``d / norm(d)`` in every row: the Euclidean geometry of many paths in one parameter."""

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        """Return ``d`` with rows of length 1."""
        return d.map(lambda t: t / (torch.linalg.vector_norm(t, dim=1, keepdim=True) + TINY))


def by_row(rule: AnyRule, paths: int) -> AnyRule:
    """Return the rule for ``paths`` rows at once: micro-batches hold ``m`` examples of each row, norms are by row."""
    if isinstance(rule, Micro):
        return Micro(rule.m * paths, by_row(rule.rule, paths))
    if isinstance(rule, Rule) and isinstance(rule.geometry, Euclidean):
        return replace(rule, geometry=RowNorm())
    return rule


def simulate(
    equation: Equation, x: Tensor, time: float, steps: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield the paths of an equation from ``x``, shape ``(paths, d)``, after every step of Euler-Maruyama.

    Args:
        equation: drift and diffusion.
        x: the starts.
        time: length of the paths; the scheme's step ``k`` is at time ``k lr``.
        steps: number of steps, each of ``time / steps``.
        generator: source of the Brownian increments.

    Raises:
        SDEError: a path is no longer finite; the message names the step.

    Example:
        >>> *_, end = simulate(equation, x0.expand(1000, -1), time=2.0, steps=100)
    """
    h, noise = time / steps, equation.sampling.factor.shape[1]
    for step in range(1, steps + 1):
        x = equation.step(x, h, h**0.5 * torch.randn(len(x), noise, dtype=x.dtype, generator=generator))
        require_finite(x, f"the equation's paths after step {step} of {h:g}")
        yield x


def require_finite(x: Tensor, what: str) -> None:
    """Raise :class:`SDEError` if any path is not finite."""
    if bad := int((~x.isfinite().all(-1)).sum()):
        raise SDEError(f"{what} are not finite in {bad} of {len(x)}: lower lr or rho, or begin elsewhere")


def whole_steps(time: float, lr: float) -> int:
    """Return ``time / lr``; raise :class:`SDEError` if it is no positive integer."""
    steps = round(time / lr)
    if steps < 1 or abs(steps * lr - time) > 1e-9 * time:
        raise SDEError(f"time must be a positive multiple of lr, got {time:g} and {lr:g}")
    return steps


def weak_error(
    equation: Equation,
    start: Tensor,
    time: float,
    paths: int = 4000,
    seed: int = 0,
    progress: Progress = lambda step, steps: None,
) -> Errors:
    """Return estimates of ``E phi(x_k) - E phi(X(time))``, ``k = time / lr``, from each of 16 groups of paths.

    Extrapolation removes the error of Euler-Maruyama to third order: paths of the equation with 1, 2 and 4 steps to one
    of the optimizer's, along one Brownian motion, weighted 1/3, -2 and 8/3 (Talay and Tubaro 1990). Without replacement
    the optimizer's batch holds the examples along which the Brownian motion has moved most: batches stay equally
    likely, and the paths closer. Equal seeds have equal batches and Brownian motion for every radius.

    Args:
        equation: the equation of the scheme that is compared.
        start: start of every path, shape ``(d,)``.
        time: a multiple of ``lr``.
        paths: number of paths, at least 32.
        seed: seed of batches and Brownian motion.
        progress: called after every step of the optimizer, ``(done, of)``.

    Raises:
        SDEError: ``time`` is no multiple of ``lr``, there are too few paths, or one is no longer finite.
    """
    scheme, problem = equation.scheme, equation.problem
    steps = whole_steps(time, scheme.lr)
    if paths < 2 * GROUPS:
        raise SDEError(f"paths must be at least {2 * GROUPS}, got {paths}")
    problem.check(start)
    generator, n = torch.Generator().manual_seed(seed), len(problem)
    x, noise = start.expand(paths, -1), equation.sampling.factor.shape[1]
    optimizer, levels = RealPaths(problem, scheme, x), [x] * len(LEVELS)
    for step in range(1, steps + 1):
        dW = (scheme.lr / 4) ** 0.5 * torch.randn(4, paths, noise, dtype=x.dtype, generator=generator)
        with_examples = dW.sum(0)[:, :n]
        batch = draw(scheme, n, paths, generator) if scheme.replacement else largest(with_examples, scheme)
        real = optimizer.step(batch)
        for i, (parts, _) in enumerate(LEVELS):
            for increment in dW.unflatten(0, (parts, -1)).sum(1):
                levels[i] = equation.step(levels[i], scheme.lr / parts, increment)
        require_finite(levels[-1], f"the equation's paths at time {step * scheme.lr:g}")
        progress(step, steps)

    def error(phi: Callable[[Tensor], Tensor]) -> list[float]:
        weighted = [weight * phi(level) for level, (_, weight) in zip(levels, LEVELS, strict=True)]
        return [float(part.mean()) for part in (phi(real) - sum(weighted)).chunk(GROUPS)]

    return {"f": error(vmap(lambda x: problem.losses(x).mean())), "|x|^2": error(lambda x: x.square().sum(1))}
