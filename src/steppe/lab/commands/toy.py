"""``steppe toy``."""

from contextlib import suppress
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from steppe.lab.errors import LabError, need
from steppe.lab.terminal import Display, line, table

if TYPE_CHECKING:
    from torch import Tensor

    from steppe.toy import Landscape, Stationary

Two = tuple[float, float] | None
PUBLISHED = "WSAM's Figure 2"
SWEPT = (*(g / 100 for g in (*range(50, 80, 5), *range(80, 100))), 0.995)
FORMS = ("coupled WSAM", "decoupled WSAM")
SHOWN = (0.7, 0.8, 0.85)  # gammas in the figure of updates
OWN: dict[str, Any] = {"start": (1.0, 1.0), "lr": 0.05, "rho": 0.1, "steps": 150, "x": (-2.0, 2.0), "y": (-2.0, 2.0)}


def toy(
    function: Annotated[str | None, typer.Option(help="Your own function, as module:function.")] = None,
    start: Annotated[Two, typer.Option(help="Start.", show_default="-6 10; 1 1 for your own")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="5; 0.05 for your own")] = None,
    rho: Annotated[float | None, typer.Option(help="Radius.", show_default="2; 0.1 for your own")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.", show_default="150")] = None,
    x: Annotated[Two, typer.Option(help="Range of x.", show_default="-30 32; -2 2 for your own")] = None,
    y: Annotated[Two, typer.Option(help="Range of y.", show_default="5 40; -2 2 for your own")] = None,
    gamma: Annotated[list[float], typer.Option(help="WSAM's gamma; repeatable.")] = [0.6, 0.95],  # noqa: B006
    sweep: Annotated[bool, typer.Option(help="Sweep gamma, about 15 seconds.")] = True,
    out: Annotated[Path, typer.Option(help="Directory of the figures.")] = Path("runs/toy"),
) -> None:
    """Run SGD, SAM and both forms of WSAM on WSAM's Figure 2, or on your own function of two variables.

    Prints where each ends, also for other gammas, and draws the trajectories and the update as a function of gamma.
    """
    from steppe.lab.files import write
    from steppe.lab.importing import imported
    from steppe.toy import FIGURE_2, Landscape, ToyError, figures, stationary_points

    need("matplotlib", "measure")
    console = Console()
    asked = {"start": start, "lr": lr, "rho": rho, "steps": steps, "x": x, "y": y}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if bad := [g for g in gamma if not 0 <= g < 1]:
        raise LabError(f"gamma must be a number in [0, 1), got {bad[0]:g}")
    try:
        landscape = replace(FIGURE_2, **given) if function is None else Landscape(imported(function), **(OWN | given))
        points = stationary_points(landscape)
        paths = _finite_paths(landscape, gamma, console)
    except ToyError as error:
        raise LabError(str(error)) from error
    _print(landscape, points, paths, console)
    numbers = f"lr {landscape.lr:g}, momentum {landscape.momentum:g}, rho {landscape.rho:g}"
    title = f"{function or PUBLISHED}: {numbers}"
    write(out / "trajectories.png", figures.trajectories(landscape, paths, points, title).savefig)
    write(out / "update.png", figures.update(landscape, SHOWN).savefig)
    if sweep:
        _sweep(landscape, points, console)
    line(console, f"\nFigures: {out}")


def _finite_paths(landscape: "Landscape", gammas: list[float], console: Console) -> "dict[str, Tensor]":
    """Return the trajectories; print a line for each that diverges."""
    from steppe.toy import ToyError, methods, trajectory

    paths = {}
    for label, method in methods(gammas).items():
        try:
            paths[label] = trajectory(landscape, method, label)
        except ToyError as error:
            line(console, f"left out: {error}")
    if not paths:
        raise ToyError("no method stays finite from this start")
    return paths


def _print(landscape: "Landscape", points: "list[Stationary]", paths: "dict[str, Tensor]", console: Console) -> None:
    from steppe.toy.stationary import eigenvalues, place

    def cells(point: tuple[float, ...], loss: float, hessian: tuple[float, float]) -> list[str]:
        return [f"{point[0]:.2f}, {point[1]:.2f}", f"{loss:.4g}", f"{hessian[0]:.2g}, {hessian[1]:.2g}"]

    headers = [", ".join(landscape.axes), "loss", "eigenvalues of H"]
    found = [[s.name, *cells(s.point, s.loss, s.eigenvalues)] for s in points]
    table(console, ["stationary point", *headers], found, "In the window")
    ends = []
    for name, path in paths.items():
        end = path[-1]
        numbers = cells(tuple(end.tolist()), landscape.value(end), eigenvalues(landscape, end))
        ends.append([name, *numbers, place(landscape, end, points)])
    table(console, ["method", *headers, "where"], ends, f"After {landscape.steps} steps")


def _sweep(landscape: "Landscape", points: "list[Stationary]", console: Console) -> None:
    """Print where both forms of WSAM end, by gamma; an interruption ends the sweep."""
    from steppe.toy import ToyError, methods, place, trajectory

    places: dict[str, list[tuple[float, str]]] = {form: [] for form in FORMS}
    with Display(console, "sweeping gamma", len(FORMS) * len(SWEPT)) as display, suppress(KeyboardInterrupt):
        for done, (form, g) in enumerate(product(FORMS, SWEPT), 1):
            try:
                end = trajectory(landscape, methods([g])[f"{form} {g:g}"])[-1]
                places[form].append((g, place(landscape, end, points)))
            except ToyError:
                places[form].append((g, "diverges"))
            display.update(done)
    line(console, f"\nAfter {landscape.steps} steps, by gamma:")
    for form in FORMS:
        runs = [(where, [g for g, _ in run]) for where, run in groupby(places[form], key=lambda pair: pair[1])]
        spans = [f"{where} for {gs[0]:g}" + (f" to {gs[-1]:g}" if len(gs) > 1 else "") for where, gs in runs]
        line(console, f"- {form}: {'; '.join(spans)}")
