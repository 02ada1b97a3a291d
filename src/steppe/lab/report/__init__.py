"""One self-contained HTML page and tables in other formats, pure functions of a directory's records."""

import shlex
from dataclasses import replace
from importlib.resources import files as resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from steppe.lab import files, presets, runs, spec, summary, tables
from steppe.lab.report import curvature, fair, figures, sensitivity, svg
from steppe.lab.report.fair import Outcomes
from steppe.lab.report.figures import Figure
from steppe.lab.statistics import mean
from steppe.lab.summary import Summary


def write(folder: Path, baseline: str | None = None) -> Summary:
    """Write ``report.html``, ``summary.md`` and ``.csv``, ``figures/*.svg`` from the records; return the summary.

    Raises:
        LabError: the folder holds no comparison, or a file in it is damaged.
    """
    found, fairly = read(folder, baseline), fair.read(folder, baseline)
    table = curvature.section(folder, found)
    drawn = _figures(found, fairly, table)
    text = tables.markdown(found) + ("" if table is None else "\n" + curvature.markdown(table))
    files.write(folder / "summary.md", ("" if fairly is None else fair.markdown(fairly)) + text)
    files.write(folder / "summary.csv", tables.csv_text(found))
    for figure in drawn:
        files.write(folder / "figures" / f"{figure.id}.svg", svg.draw(figure, alone=True))
    files.write(folder / "report.html", render(found, table, fairly, drawn))
    return found


def read(folder: Path, baseline: str | None = None) -> Summary:
    """Return the summary of the records in ``folder``."""
    if (fairly := fair.read(folder, baseline)) is not None:
        return fairly.found
    plan = runs.read_plan(folder)
    if baseline is not None:
        plan = replace(plan, baseline=spec.parse(baseline))
    return summary.summarise(plan, *runs.finished(folder, plan), runs.context(folder))


def _figures(found: Summary, fairly: Outcomes | None, table: curvature.Curvature | None) -> list[Figure]:
    """Return every figure; curves of a fair comparison have the short names of its methods."""
    learned, measured = figures.learning(found), [] if table is None else table.figures
    if fairly is None:
        return [*learned, *sensitivity.sensitivities(found), *sensitivity.searches(found), *measured]
    names = _names(fairly)
    for figure in (*learned, *measured):
        for trace in figure.data:
            trace["name"] = names.get(trace["name"], trace["name"])
    return [*learned, *fair.figures(fairly), *measured]


def _names(fairly: Outcomes) -> dict[str, str]:
    """Return the short names of a fair comparison's methods by their specs."""
    return {str(one.row.method): one.name for one in reversed(fairly.each) if one.row}


def _without_bases(notes: list[str]) -> list[str]:
    """Return the notes without a line for every learning rate that was chosen."""
    return [note for note in notes if not note.startswith(("Base optimizer", "An epoch is"))]


def render(
    found: Summary,
    table: curvature.Curvature | None = None,
    fairly: Outcomes | None = None,
    drawn: list[Figure] | None = None,
) -> str:
    """Return the report as HTML."""
    headers, cells = tables.table(found)
    names = {} if fairly is None else _names(fairly)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    every = _figures(found, fairly, table) if drawn is None else drawn
    told = tables.notes(found) if fairly is None else fair.notes(fairly) + _without_bases(tables.notes(found))
    lead = told.pop(0) if fairly is not None and told[0].startswith("Clearly") else ""
    return page.from_string(_text("template.html")).render(
        title=tables.title(found),
        headers=headers,
        rows=list(zip(found.rows, cells, strict=True)),
        caption=tables.caption(found),
        lead=lead,
        notes=told,
        fair=None if fairly is None else [fair.table(fairly), fair.chosen(fairly)],
        metric=found.metric,
        extreme="highest" if found.higher else "lowest",
        best=[[names.get(cells[0], cells[0]), *cells[1:]] for cells in best_epochs(found)],
        pairs=[[names.get(cell, cell) for cell in _pair(pair)] for pair in summary.pairs(found)],
        minima=table,
        figures=[(one, svg.draw(one), logarithmic(one)) for one in every],
        recipe=found.context.recipe,
        command=command(found, fairly),
        environment=environment(found),
        settings=found.plan.settings.to_dict() | {"seeds": found.plan.seeds},
        style=_text("style.css") + svg.STYLE,
        script=_text("table.js"),
    )


def logarithmic(figure: Figure) -> str:
    """Return the figure with a logarithmic axis, empty where it has one or a value is not positive."""
    values = [y for trace in figure.data if not trace.get("fill") for y in trace["y"] if y is not None]
    if figure.layout["yaxis"].get("type") == "log" or not values or min(values) <= 0:
        return ""
    return svg.draw(figure, log=True)


def best_epochs(found: Summary) -> list[list[str]]:
    """Return each method with its mean test metric at the last epoch, its best epoch and the mean there.

    The best epoch is that of the mean curve over the seeds, known in hindsight from the test set.
    """
    rows = []
    for row in found.rows:
        records = found.of(row.method)
        curves = [record.curves["test_error"] for record in records]
        if len({len(curve) for curve in curves}) > 1 or any(None in curve for curve in curves):
            continue
        scale = 100.0 if records[0].metric.endswith("%") else 1.0
        means = [scale * mean([float(v or 0.0) for v in column]) for column in zip(*curves, strict=True)]
        best = (max if found.higher else min)(range(len(means)), key=means.__getitem__)
        rows.append([str(row.method), tables.mean_value(means[-1]), f"{records[0].curves['epoch'][best]:.0f}"])
        rows[-1] += [f"{records[0].epochs}", tables.mean_value(means[best])]
    return rows


def _pair(pair: summary.Pair) -> list[str]:
    test = pair.paired
    numbers = [tables.value(test.difference, "+"), tables.interval(test), tables.number(pair.p, ".2g")]
    return [str(pair.method), str(pair.other), *numbers]


def _text(name: str) -> str:
    return (resources("steppe.lab.report") / name).read_text(encoding="utf-8")


def command(found: Summary, fairly: Outcomes | None = None) -> str:
    """Return the command line that makes these runs, empty for a search alone and for what no command makes."""
    about, plan = found.context.recipe, found.plan
    if plan.settings.data not in presets.PRESETS and ":" not in plan.settings.data:
        return ""  # of 0.1, which had more data
    usual = presets.preset(plan.settings.data).settings.to_dict()
    given = {key: value for key, value in plan.settings.to_dict().items() if value != usual[key]}
    if about:
        words = ["reproduce", about["recipe"], "--scale", about["scale"], "--study", about["study"]]
        given = {"data_dir": plan.settings.data_dir, "seeds": plan.seeds}
    elif fairly is not None:
        return shlex.join(["steppe", *fair.command(fairly)])
    elif not plan.seeds or given.keys() & {"validation", "test_seed", "start", "start_lr"}:
        return ""
    elif len(plan.runs()) == 1:
        words = ["run", str(plan.methods[0]), "--data", plan.settings.data]
        given["seed"] = plan.first
    else:
        words = ["compare", "--fixed", "--data", plan.settings.data]
        words += [word for method in plan.methods for word in ("--method", str(method))]
        given["seeds"] = plan.seeds
    options = {f"--{key.replace('_', '-')}": str(value) for key, value in given.items() if value is not None}
    return shlex.join(["steppe", *words, *(word for option in options.items() for word in option)])


def environment(found: Summary) -> dict[str, str]:
    """Return versions, machine and dates of the runs; where runs differ, every value."""
    records = list(found.records.values())
    if not records:
        return {}
    values = {key: sorted({r.environment.get(key, "unknown") for r in records}) for key in records[0].environment}
    dates = values.pop("date", ["unknown"])
    told = {"finished": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"}
    return told | {key: ", ".join(value) for key, value in values.items()}
