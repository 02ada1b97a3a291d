"""Trajectories of the library's optimizers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import steppe
from steppe.toy.landscape import Landscape, ToyError

FAR = 100  # window diagonals
Method = Callable[[torch.optim.Optimizer, float], torch.optim.Optimizer]  # (base, rho) -> optimizer


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

    Raises:
        ToyError: the loss is no longer finite, or the point is ``FAR`` window diagonals from the start; the message
            names the step and its start.
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
