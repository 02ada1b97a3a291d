"""`steppe sde`: real optimizers against their equations."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steppe.sde.problem import SDEError
from steppe.sde.study import RULES, Line, Run, Settings, Store, lines, measure, runs, time_of

CLAIMS = {"lr": 1, "lr, corrected": 2, "rho": 2}


def sde(
    problem: Annotated[str, typer.Option(help="logistic or quadratic: six examples in two dimensions.")] = "logistic",
    rule: Annotated[list[str] | None, typer.Option(help=f"{', '.join(RULES)}; repeatable; all without it.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Repeatable.", show_default="0.2, 0.1, 0.05")] = None,
    rho: Annotated[list[float] | None, typer.Option(help="Repeatable.", show_default="0.2, 0.1, 0.05")] = None,
    size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 2,
    m: Annotated[int, typer.Option(min=1, help="Micro-batch of the m-forms.")] = 1,
    time: Annotated[float, typer.Option(help="Of the errors against lr, a multiple of each.")] = 1.0,
    paths: Annotated[int | None, typer.Option(help="Paths of optimizer and equation.", show_default="4000")] = None,
    seed: Annotated[int, typer.Option(help="Of batches and Brownian motion.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the record and the picture.")] = Path("runs/sde"),
    quick: Annotated[bool, typer.Option("--quick", help="Three rules, 500 paths, some 10 seconds.")] = False,
) -> None:
    """Run real optimizers against their stochastic differential equations, and fit the order of the weak error.

    Against lr at a small rho, for the equation without and with its correction; against rho at one lr. The same command
    continues a folder; rules, learning rates and radii may be added to it.
    """
    console = Console()
    rules = rule or (["SGD", "USAM", "m-SAM"] if quick else list(RULES))
    try:
        settings = Settings(problem, size, m, time, paths or (500 if quick else 4000), seed)
        asked = runs(settings, rules, lr or [0.2, 0.1, 0.05], rho or [0.2, 0.1, 0.05])
        folder = out.with_name(f"{out.name}-quick") if quick and out == Path("runs/sde") else out
        store = Store(folder / "errors.json", settings)
        stopped = _measure(settings, asked, store, console)
        _report(list(lines(store, asked)), folder, console)
    except (SDEError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if stopped:
        console.print("Stopped; what is done is kept, and the same command goes on.")
        raise typer.Exit(130)


def _measure(settings: Settings, asked: list[Run], store: Store, console: Console) -> bool:
    """Run what is missing; whether it was interrupted."""
    missing = store.missing(asked)
    console.print(f"{len(missing)} weak errors to measure, {len(asked) - len(missing)} known", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    whole = bars.add_task("all", total=sum(_work(settings, run) for run in missing), note="")
    try:
        with bars:
            for run in missing:

                def progress(step: int, of: int, run: Run = run) -> None:
                    bars.update(whole, advance=_work(settings, run) / of, note=run.key)

                store.keep(run, measure(settings, run, progress))
    except KeyboardInterrupt:
        return True
    return False


def _work(settings: Settings, run: Run) -> float:
    """What a run takes, relative to the others."""
    return time_of(settings, run) / run.lr * (3 if run.corrected else 1) * (1 if run.rule == "SGD" else 3)


def _report(found: list[Line], folder: Path, console: Console) -> None:
    from steppe.sde import figures

    for against, claim in CLAIMS.items():
        shown = [line for line in found if line.against == against and line.at]
        if not shown:
            continue
        beyond = ", beyond that at rho 0" if against == "rho" else ""
        title = f"Weak error against {against}{beyond}, in 1/1000; claim: {claim}"
        at = sorted({h for line in shown for h in line.at}, reverse=True)
        headers = ("rule", "of", *(f"{against[:3].strip(',')} {h:g}" for h in at), "order, 95 % CI")
        table = Table(*headers, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for line in shown:
            by_h = dict(zip(line.at, line.errors, strict=True))
            cells = [f"{1e3 * by_h[h].mean:.2f}±{1e3 * by_h[h].error:.2f}" if h in by_h else "" for h in at]
            o = line.order
            order = "not resolved" if o is None else f"{o.slope:.2f} [{o.low:.2f}, {o.high:.2f}]"
            table.add_row(line.rule, line.function, *cells, order)
        console.print(table)
    if found:
        figures.orders(found, folder / "orders.png")
        console.print(f"Errors and picture: {folder}", highlight=False, soft_wrap=True)
