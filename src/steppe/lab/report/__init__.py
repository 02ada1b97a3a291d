"""One self-contained HTML page and tables in other formats, pure functions of a directory's records."""

import shlex
from dataclasses import replace
from importlib.resources import files as resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from steppe.lab import files, presets, runs, spec, summary, tables
from steppe.lab.report import curvature, fair, figures, sensitivity
from steppe.lab.summary import Summary


def write(folder: Path, baseline: str | None = None) -> Summary:
    """Write ``report.html``, ``summary.md`` and ``.csv`` from the records in ``folder``; return the summary.

    Raises:
        LabError: the folder holds no comparison, or a file in it is damaged.
    """
    found = read(folder, baseline)
    table = curvature.section(folder, found)
    text = tables.markdown(found) + ("" if table is None else "\n" + curvature.markdown(table))
    files.write(folder / "summary.md", text)
    files.write(folder / "summary.csv", tables.csv_text(found))
    files.write(folder / "report.html", render(found, table))
    return found


def read(folder: Path, baseline: str | None = None) -> Summary:
    """Return the summary of the records in ``folder``."""
    plan = runs.read_plan(folder)
    if (fairly := fair.read(folder, baseline)) is not None:
        return fairly.found
    if baseline is not None:
        plan = replace(plan, baseline=spec.parse(baseline))
    return summary.summarise(plan, *runs.finished(folder, plan), runs.context(folder))


def render(found: Summary, table: curvature.Curvature | None = None) -> str:
    """Return the report as HTML."""
    headers, cells = tables.table(found)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(_text("template.html")).render(
        title=tables.title(found),
        headers=headers,
        rows=list(zip(found.rows, cells, strict=True)),
        caption=tables.caption(found),
        notes=tables.notes(found),
        minima=table,
        figures=[
            *figures.learning(found),
            *sensitivity.sensitivities(found),
            *sensitivity.searches(found),
            *([] if table is None else table.figures),
        ],
        recipe=found.context.recipe,
        command=command(found),
        environment=environment(found),
        settings=found.plan.settings.to_dict() | {"seeds": found.plan.seeds},
        style=_text("style.css"),
        script=_text("figures.js") + _text("table.js"),
        plotly=get_plotlyjs(),
    )


def _text(name: str) -> str:
    return (resources("steppe.lab.report") / name).read_text(encoding="utf-8")


def command(found: Summary) -> str:
    """Return the command line that makes these runs, empty for a search alone and for what no command makes."""
    about, plan = found.context.recipe, found.plan
    if plan.settings.data not in presets.PRESETS and ":" not in plan.settings.data:
        return ""  # of 0.1, which had more data
    usual = presets.preset(plan.settings.data).settings.to_dict()
    given = {key: value for key, value in plan.settings.to_dict().items() if value != usual[key]}
    if about:
        words = ["reproduce", about["recipe"], "--scale", about["scale"], "--study", about["study"]]
        given = {"data_dir": plan.settings.data_dir, "seeds": plan.seeds}
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
