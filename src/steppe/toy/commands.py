"""`steppe toy`: trajectories on a function of two variables, the table of their ends, pictures."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from steppe.toy.landscape import FIGURE_2, Landscape, ToyError, imported
from steppe.toy.stationary import Stationary, eigenvalues, place, stationary_points
from steppe.toy.trajectory import Method, methods, trajectory

SWEPT = (*(g / 100 for g in (*range(50, 80, 5), *range(80, 100))), 0.995)
FORMS = ("coupled WSAM", "decoupled WSAM")
SHOWN = (0.7, 0.8, 0.85)  # gammas of the picture of updates


def toy(
    function: Annotated[str | None, typer.Option(help="A function of your own, as module:function.")] = None,
    start: Annotated[
        tuple[float, float] | None, typer.Option(help="Where to begin.", show_default="-6 10; 1 1 for your own")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="5; 0.05 for your own")] = None,
    rho: Annotated[float | None, typer.Option(help="Radius.", show_default="2; 0.1 for your own")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.", show_default="150")] = None,
    x: Annotated[
        tuple[float, float] | None, typer.Option(help="Range drawn.", show_default="-30 32; -2 2 for your own")
    ] = None,
    y: Annotated[
        tuple[float, float] | None, typer.Option(help="Range drawn.", show_default="5 40; -2 2 for your own")
    ] = None,
    gamma: Annotated[
        list[float] | None, typer.Option(help="WSAM's gamma; repeatable.", show_default="0.6, 0.95")
    ] = None,
    sweep: Annotated[bool, typer.Option(help="Sweep gamma, some 15 seconds.")] = True,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("runs/toy"),
) -> None:
    """Walk on WSAM's Figure 2, or on a function of your own, with SGD, SAM and both forms of WSAM.

    Prints where each ends and writes pictures: the trajectories, the update as a function of gamma, and the end as a
    function of gamma.
    """
    console = Console()
    given = {"start": start, "lr": lr, "rho": rho, "steps": steps, "x": x, "y": y}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        gammas = tuple(gamma or (0.6, 0.95))
        if bad := [g for g in gammas if not 0 <= g < 1]:
            raise ToyError(f"gamma must be a number in [0, 1), got {bad[0]:g}")
        landscape = replace(FIGURE_2, **given) if function is None else _own(function, given)  # type: ignore[arg-type]
        _walk(landscape, function or "WSAM's Figure 2", gammas, out, console)
        if sweep:
            _sweep(landscape, out, console)
    except ToyError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(f"\nPictures: {out}", highlight=False, soft_wrap=True)


def _own(function: str, given: dict[str, object]) -> Landscape:
    defaults = {"start": (1.0, 1.0), "lr": 0.05, "rho": 0.1, "steps": 150, "x": (-2.0, 2.0), "y": (-2.0, 2.0)}
    return Landscape(imported(function), **(defaults | given))  # type: ignore[arg-type]


def _walk(landscape: Landscape, name: str, gammas: Sequence[float], out: Path, console: Console) -> None:
    from steppe.toy import figures

    chosen = methods(gammas)
    with console.status("looking for minima and saddles"):
        points = stationary_points(landscape)
    paths = _finite_paths(landscape, chosen, console)
    if not paths:
        raise ToyError("no method stays finite from this start")
    console.print(_table_of_points(landscape, points))
    console.print(_table_of_ends(landscape, points, paths))
    out.mkdir(parents=True, exist_ok=True)
    numbers = f"lr {landscape.lr:g}, momentum {landscape.momentum:g}, rho {landscape.rho:g}"
    with console.status("drawing"):
        figures.trajectories(landscape, paths, points, f"{name}: {numbers}", out / "trajectories.png")
        figures.update(landscape, SHOWN, out / "update.png")


def _finite_paths(landscape: Landscape, chosen: dict[str, Method], console: Console) -> dict[str, Tensor]:
    """The trajectories, without those that leave the finite numbers, which are told."""
    paths = {}
    for label, method in chosen.items():
        try:
            paths[label] = trajectory(landscape, method, label)
        except ToyError as error:
            console.print(f"left out: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return paths


def _sweep(landscape: Landscape, out: Path, console: Console) -> None:
    from steppe.toy import figures

    points = stationary_points(landscape)
    ends: dict[str, dict[float, Tensor]] = {form: {} for form in FORMS}
    places: dict[str, list[tuple[float, str]]] = {form: [] for form in FORMS}
    jobs = [(form, g) for form in FORMS for g in SWEPT]
    try:
        for form, g in track(jobs, "sweeping gamma", console=console, transient=True, disable=not console.is_terminal):
            name = f"{form} {g:g}"
            try:
                ends[form][g] = trajectory(landscape, methods([g])[name], name)[-1]
                places[form].append((g, str(place(landscape, ends[form][g], points))))
            except ToyError:
                places[form].append((g, "diverges"))
    except KeyboardInterrupt:
        console.print("Stopped; what is done of the sweep follows.")
    console.print(f"\nAfter {landscape.steps} steps, by gamma:")
    for form in FORMS:
        runs = [(where, [g for g, _ in run]) for where, run in groupby(places[form], key=lambda pair: pair[1])]
        spans = [f"{where} for {gs[0]:g}" + (f" to {gs[-1]:g}" if len(gs) > 1 else "") for where, gs in runs]
        console.print(f"- {form}: {'; '.join(spans)}", markup=False, highlight=False)
    figures.sweep(landscape, ends, points, out / "sweep.png")


def _table_of_points(landscape: Landscape, points: Sequence[Stationary]) -> Table:
    table = _table("In the window", "stationary point", *_headers(landscape))
    for s in points:
        table.add_row(s.name, *_cells(s.point, s.loss, s.eigenvalues))
    return table


def _table_of_ends(landscape: Landscape, points: Sequence[Stationary], paths: dict[str, Tensor]) -> Table:
    table = _table(f"After {landscape.steps} steps", "method", *_headers(landscape), "where")
    for name, path in paths.items():
        end = path[-1]
        x, y = end.tolist()
        where = str(place(landscape, end, points))
        table.add_row(name, *_cells((x, y), landscape.value(end), eigenvalues(landscape, end)), where)
    return table


def _table(title: str, *headers: str) -> Table:
    return Table(*headers, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _headers(landscape: Landscape) -> list[str]:
    return [", ".join(landscape.axes), "loss", "eigenvalues of H"]


def _cells(point: tuple[float, float], loss: float, hessian: tuple[float, float]) -> list[str]:
    return [f"{point[0]:.2f}, {point[1]:.2f}", f"{loss:.4g}", f"{hessian[0]:.2g}, {hessian[1]:.2g}"]
