"""Functions of two variables, and the trajectories of the library's optimizers on them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import steppe

FAR = 100  # window diagonals
Method = Callable[[torch.optim.Optimizer, float], torch.optim.Optimizer]  # (base, rho) -> optimizer


class ToyError(ValueError):
    """An error for a wrong argument or function; the message names it."""


@dataclass(frozen=True)
class Landscape:
    """A function of two variables, a start, an optimizer's numbers, and the window of the figures.

    Args:
        loss: ``(point) -> value``, from a tensor of shape ``(2,)`` to one of shape ``()``, differentiable twice.
        start: start of every trajectory.
        lr: learning rate of SGD with ``momentum``.
        rho: radius of the perturbation.
        steps: number of steps.
        x, y: ranges of the variables in the window.
        momentum: torch's, without dampening.
        axes: names of the variables.
        zoom: ranges of both variables of a part of the window that the figure enlarges in an inset.

    Raises:
        ToyError: a number is out of its range, or the function is not a finite, differentiable scalar at the start.

    Example:
        >>> bowl = Landscape(lambda p: p @ p, start=(1.0, 1.0), lr=0.1, rho=0.05, steps=50, x=(-2, 2), y=(-2, 2))
    """

    loss: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    lr: float
    rho: float
    steps: int
    x: tuple[float, float]
    y: tuple[float, float]
    momentum: float = 0.9
    axes: tuple[str, str] = ("x", "y")
    zoom: tuple[tuple[float, float], tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("lr", 0 < self.lr < math.inf, "a finite number > 0"),
            ("rho", 0 < self.rho < math.inf, "a finite number > 0"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("steps", self.steps >= 1, "a positive integer"),
            ("x", -math.inf < self.x[0] < self.x[1] < math.inf, "two finite numbers, the smaller one first"),
            ("y", -math.inf < self.y[0] < self.y[1] < math.inf, "two finite numbers, the smaller one first"),
            ("start", all(map(math.isfinite, self.start)), "two finite numbers"),
        ):
            if not holds:
                raise ToyError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        point = torch.tensor(self.start, dtype=torch.float64, requires_grad=True)
        try:
            value = self.loss(point)
        except Exception as error:
            raise ToyError(f"the function failed at start {self.start}: {type(error).__name__}: {error}") from error
        if not isinstance(value, Tensor) or value.shape != ():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ToyError(f"the function must return a tensor of shape (), got {got} at start {self.start}")
        if not value.isfinite():
            raise ToyError(f"the function is {value.item()} at start {self.start}; choose a start where it is finite")
        if not value.requires_grad:
            raise ToyError("the function's value does not depend on its argument by torch operations: no gradient")
        if not torch.autograd.grad(value, point)[0].isfinite().all():
            raise ToyError(f"the function's gradient is not finite at start {self.start}; choose another start")

    @property
    def diagonal(self) -> float:
        """Return the length of the window's diagonal."""
        return math.hypot(self.x[1] - self.x[0], self.y[1] - self.y[0])

    def value(self, point: Tensor) -> float:
        """Return the loss at ``point``, shape ``(2,)``; NaN where it is not defined."""
        return float(self.loss(point))

    def gradient(self, point: Tensor) -> Tensor:
        """Return the gradient at ``point``, shape ``(2,)``."""
        point = point.detach().requires_grad_()
        return torch.autograd.grad(self.loss(point), point)[0]

    def hessian(self, point: Tensor) -> Tensor:
        """Return the Hessian at ``point``, shape ``(2, 2)``."""
        h: Tensor = torch.autograd.functional.hessian(self.loss, point.detach())
        return h


def kl_wells(point: Tensor) -> Tensor:
    """Return the loss of WSAM's Figure 2 (arXiv 2305.15817), two basins: a mixture of Kullback-Leibler wells.

    ``L(mu, sigma) = -log(0.7 exp(-K_1 / 1.8^2) + 0.3 exp(-K_2 / 1.2^2))`` with
    ``K_i = KL(N(mu, sigma^2), N(mu_i, sigma_i^2)) = log(sigma_i / sigma) + (sigma^2 + (mu - mu_i)^2) / (2 sigma_i^2)
    - 1/2``, ``(mu_1, sigma_1) = (20, 30)`` and ``(mu_2, sigma_2) = (-20, 10)``. The constants are
    recalled, not printed in the paper; the minima and the curves computed with them agree with the published ones.
    """
    mu, sigma = point

    def K(mu_i: float, sigma_i: float) -> Tensor:
        divergence: Tensor = torch.log(sigma_i / sigma) + (sigma**2 + (mu - mu_i) ** 2) / (2 * sigma_i**2) - 0.5
        return divergence

    return -torch.log(0.7 * torch.exp(-K(20, 30) / 1.8**2) + 0.3 * torch.exp(-K(-20, 10) / 1.2**2))


FIGURE_2 = Landscape(
    kl_wells, start=(-6.0, 10.0), lr=5.0, rho=2.0, steps=150, x=(-30.0, 32.0), y=(5.0, 40.0),
    axes=("mu", "sigma"), zoom=((-19.0, -4.5), (9.5, 18.0)),
)  # fmt: skip


def SGDM(base: torch.optim.Optimizer, rho: float) -> torch.optim.Optimizer:
    """Return the base alone."""
    return base


def methods(gammas: Sequence[float] = (0.6, 0.95)) -> dict[str, Method]:
    """Return SGD with momentum, SAM, and WSAM for each ``gamma``, coupled (algorithm 4) and decoupled (algorithm 2)."""
    coupled = {f"coupled WSAM {g:g}": lambda base, rho, g=g: steppe.CoupledWSAM(base, rho, g) for g in gammas}
    decoupled = {f"decoupled WSAM {g:g}": lambda base, rho, g=g: steppe.WSAM(base, rho, g) for g in gammas}
    return {"SGDM": SGDM, "SAM": steppe.SAM, **coupled, **decoupled}


def trajectory(landscape: Landscape, method: Method, name: str = "the method") -> Tensor:
    """Return the points from the start to the last step, shape ``(steps + 1, 2)``, in float64.

    Raise :class:`ToyError` where the loss is no longer finite, or the point ``FAR`` window diagonals from the start.
    """
    point = nn.Parameter(torch.tensor(landscape.start, dtype=torch.float64))
    optimizer = method(torch.optim.SGD([point], lr=landscape.lr, momentum=landscape.momentum), landscape.rho)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = landscape.loss(point)
        loss.backward()
        return loss

    start = point.detach().clone()
    path = [start]
    for step in range(1, landscape.steps + 1):
        optimizer.step(closure)  # type: ignore[arg-type] # torch's stub wants a closure that returns a float
        here = point.detach().clone()
        if not ((here - start).norm() < FAR * landscape.diagonal and torch.isfinite(landscape.loss(here))):
            x, y = path[-1].tolist()
            raise ToyError(
                f"{name} diverges: step {step} leads from ({x:.4g}, {y:.4g}) to no finite loss or far outside; "
                f"lower lr ({landscape.lr:g}) or rho ({landscape.rho:g})"
            )
        path.append(here)
    return torch.stack(path)
