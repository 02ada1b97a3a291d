"""``steppe sde``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from steppe.lab.errors import LabError, need
from steppe.lab.terminal import Display, line, table

if TYPE_CHECKING:
    from steppe.sde.paths import Errors
    from steppe.sde.study import Case, ErrorCurve, ErrorStudy

QUICK = ["SGD", "USAM", "m-SAM"]


def sde(
    problem: Annotated[str, typer.Option(help="logistic or quadratic: six examples in two dimensions.")] = "logistic",
    rule: Annotated[
        list[str] | None, typer.Option(help="SGD, USAM, SAM, n-USAM, m-USAM, n-SAM, m-SAM.", show_default="all")
    ] = None,
    lr: Annotated[list[float], typer.Option(help="Learning rate.")] = [0.2, 0.1, 0.05],  # noqa: B006
    rho: Annotated[list[float], typer.Option(help="Radius.")] = [0.2, 0.1, 0.05],  # noqa: B006
    size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 2,
    m: Annotated[int, typer.Option(min=1, help="Micro-batch of the m-forms.")] = 1,
    time: Annotated[float, typer.Option(help="Length of paths against lr, a multiple of each lr.")] = 1.0,
    paths: Annotated[int | None, typer.Option(help="Paths of optimizer and equation.", show_default="4000")] = None,
    seed: Annotated[int, typer.Option(help="Seed of batches and Brownian motion.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory of the record and the figure.")] = Path("runs/sde"),
    quick: Annotated[bool, typer.Option("--quick", help="Three rules, 500 paths, about 10 seconds.")] = False,
) -> None:
    """Test real optimizers against their stochastic differential equations, and fit the orders of the weak error.

    Against lr at a small rho, for the equation without and with its correction; against rho at one lr. The options
    --rule, --lr and --rho are repeatable. The same command continues a directory, also with more of these.
    """
    from steppe.sde.study import RULES, ErrorStudy

    need("matplotlib", "measure")
    console = Console()
    folder = out.with_name(f"{out.name}-quick") if quick and out == Path("runs/sde") else out
    try:
        study = ErrorStudy(problem, size, m, time, paths or (500 if quick else 4000), seed)
        cases = study.cases(rule or (QUICK if quick else list(RULES)), lr, rho)
        errors = _recorded(folder / "errors.json", study)
        try:
            _measure(study, cases, errors, folder / "errors.json", console)
        finally:
            _report(errors, cases, folder, console)
    except ValueError as error:
        raise LabError(str(error)) from error


def _recorded(file: Path, study: "ErrorStudy") -> "dict[str, Errors]":
    """Return the errors that are measured already, by the key of their case."""
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text())
        settings, errors = kept["settings"], dict(kept["errors"])
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{file} is damaged: {error}. Remove it, or choose another --out") from error
    if settings != asdict(study):
        raise LabError(f"{file} holds a study with other settings: {settings}. Choose another --out")
    return errors


def _measure(
    study: "ErrorStudy", cases: "list[Case]", errors: "dict[str, Errors]", file: Path, console: Console
) -> None:
    """Measure the cases without errors, and write the record after each."""
    from steppe.lab.files import write

    missing = [case for case in cases if case.key not in errors]
    line(console, f"{len(missing)} weak errors to measure, {len(cases) - len(missing)} known")
    work = {
        case: study.time_of(case) / case.lr * (3 if case.corrected else 1) * (1 if case.rule == "SGD" else 3)
        for case in missing
    }  # relative
    with Display(console, "all", sum(work.values())) as display:
        for case in missing:

            def progress(step: int, of: int, case: "Case" = case) -> None:
                display.part(case.key, work[case] * step / of, work[case])

            errors[case.key] = study.measure(case, progress)
            write(file, json.dumps({"settings": asdict(study), "errors": errors}, indent=1) + "\n")


def _report(errors: "dict[str, Errors]", cases: "list[Case]", folder: Path, console: Console) -> None:
    from steppe.lab.files import write
    from steppe.sde.study import CLAIMS, curves, orders

    found = list(curves(errors, cases))
    for against, claim in CLAIMS.items():
        if shown := [curve for curve in found if curve.against == against]:
            at = sorted({h for curve in shown for h in curve.at}, reverse=True)
            name, beyond = against.split(",")[0], ", beyond that at rho 0" if against == "rho" else ""
            title = f"Weak error against {against}{beyond}, in 1/1000; claim: {claim}"
            headers = ["rule", "of", *(f"{name} {h:g}" for h in at), "order, 95 % CI"]
            table(console, headers, [_row(curve, at) for curve in shown], title)
    if found:
        write(folder / "orders.png", orders(found).savefig)
        line(console, f"Errors and figure: {folder}")


def _row(curve: "ErrorCurve", at: list[float]) -> list[str]:
    by_h, order = dict(zip(curve.at, curve.errors, strict=True)), curve.order
    cells = [f"{1e3 * by_h[h].mean:.2f}±{1e3 * by_h[h].error:.2f}" if h in by_h else "" for h in at]
    slope = "not resolved" if order is None else f"{order.slope:.2f} [{order.low:.2f}, {order.high:.2f}]"
    return [curve.rule, curve.function, *cells, slope]
