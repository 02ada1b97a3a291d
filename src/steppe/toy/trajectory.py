"""Trajectories by the library's own optimizers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import steppe
from steppe.toy.landscape import Landscape, ToyError

FAR = 100  # window diagonals
Method = Callable[[torch.optim.Optimizer, float], torch.optim.Optimizer]  # (base, rho) -> optimizer


def SGDM(base: torch.optim.Optimizer, rho: float) -> torch.optim.Optimizer:
    """The base alone."""
    return base


def methods(gammas: Sequence[float] = (0.6, 0.95)) -> dict[str, Method]:
    """SGD with momentum, SAM, and WSAM for each ``gamma``, coupled (algorithm 4) and decoupled (algorithm 2)."""
    coupled = {f"coupled WSAM {g:g}": lambda base, rho, g=g: steppe.CoupledWSAM(base, rho, g) for g in gammas}
    decoupled = {f"decoupled WSAM {g:g}": lambda base, rho, g=g: steppe.WSAM(base, rho, g) for g in gammas}
    return {"SGDM": SGDM, "SAM": steppe.SAM, **coupled, **decoupled}


def trajectory(landscape: Landscape, method: Method, name: str = "the method") -> Tensor:
    """The points from the start to the last step, shape ``(steps + 1, 2)``, in float64.

    Raises:
        ToyError: the loss is no longer finite, or the point is ``FAR`` of the window's diagonals from the start; the
            message names the step and where it came from.
    """
    model = _Point(landscape)
    base = torch.optim.SGD(model.parameters(), lr=landscape.lr, momentum=landscape.momentum)
    optimizer = method(base, landscape.rho)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model()
        loss.backward()
        return loss

    start = model.point.detach().clone()
    path = [start]
    for step in range(1, landscape.steps + 1):
        optimizer.step(closure)  # type: ignore[arg-type] # torch's stub wants a closure that returns a float
        here = model.point.detach().clone()
        if not ((here - start).norm() < FAR * landscape.diagonal and torch.isfinite(landscape.loss(here))):
            x, y = path[-1].tolist()
            raise ToyError(
                f"{name} diverges: step {step} leads from ({x:.4g}, {y:.4g}) to no finite loss or far outside; "
                f"lower lr ({landscape.lr:g}) or rho ({landscape.rho:g})"
            )
        path.append(here)
    return torch.stack(path)


class _Point(nn.Module):
    """Two parameters and a function of them."""

    def __init__(self, landscape: Landscape) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor(landscape.start, dtype=torch.float64))
        self.loss = landscape.loss

    def forward(self) -> Tensor:
        return self.loss(self.point)
