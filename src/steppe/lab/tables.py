"""The numbers of a summary as a table with its words, as Markdown, as CSV and as plain data for JSON."""

import csv
import html
import io
import math
import re
from typing import Any

from steppe.lab.files import finite
from steppe.lab.statistics import Paired
from steppe.lab.summary import Row, Summary, pairs

HEADERS = (
    "method", "n", "{metric}", "sd", "paper %", "difference", "95 % CI", "p (Holm)", "passes", "seconds", "collapsed"
)  # fmt: skip
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def number(value: float, form: str) -> str:
    """Return a formatted number, a dash for NaN."""
    return NONE if math.isnan(value) else format(value, form).replace("-", MINUS)


def value(one: float, sign: str = "", least: float = 0.1) -> str:
    """Return a number with two decimals, or with three digits below ``least``, where that says too little."""
    return number(one, f"{sign}.2f" if one == 0 or abs(one) >= least else f"{sign}.3g")


def mean_value(one: float) -> str:
    """Return a mean: of a loss below 1 two decimals say too little."""
    return value(one, least=1.0)


def interval(test: Paired) -> str:
    """Return a formatted confidence interval."""
    if math.isnan(test.low):
        return NONE
    if abs(test.high - test.low) >= 0.1:
        return f"{number(test.low, '+.2f')} to {number(test.high, '+.2f')}"
    return f"{value(test.low, '+')} to {value(test.high, '+')}"


def _cells(row: Row) -> list[str]:
    """Return the texts of a row, one for each of ``HEADERS``."""
    test = row.paired
    compared = ["baseline" if row.baseline else NONE if test is None else value(test.difference, "+")]
    compared += ["", ""] if test is None else [interval(test), number(row.p, ".2g")]
    paper = NONE if row.paper is None else number(row.paper, ".2f")
    middle = [str(row.n), mean_value(row.mean), value(row.sd), paper]
    collapsed = f"{row.collapsed} of {row.n}" if row.collapsed else ""
    return [str(row.method), *middle, *compared, number(row.passes, ".0f"), number(row.seconds, ".1f"), collapsed]


def table(found: Summary) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells, without the columns that say nothing: no collapsed run, no published numbers."""
    absent = set() if any(row.collapsed for row in found.rows) else {"collapsed"}
    absent |= set() if any(row.paper is not None for row in found.rows) else {"paper %"}
    kept = [i for i, header in enumerate(HEADERS) if header not in absent]
    headers = [HEADERS[i].format(metric=found.metric) for i in kept]
    return headers, [[texts[i] for i in kept] for texts in map(_cells, found.rows)]


def title(found: Summary) -> str:
    """Return the name of the experiment."""
    settings = found.plan.settings
    noise = f", {100 * settings.noise:g} % label noise" if settings.noise else ""
    return f"{settings.data}, {settings.train_size} training examples{noise}"


def caption(found: Summary) -> str:
    """Return what every column of the table is."""
    comparisons = sum(not math.isnan(row.p) for row in found.rows)
    known = any(number is not None for number in found.context.published.values())
    paper = f"Paper: the published error, on {found.context.recipe['setting']}. " if known else ""
    split = "Validation" if found.plan.settings.validation else "Test"
    return (
        f"{split} {found.metric} at the last epoch ({found.direction}): mean and standard deviation (sd) over n seeds. "
        f"{paper}"
        f"Difference: method minus {found.plan.reference}, paired by seed over the seeds "
        "both have, with the 95 % confidence interval of its mean (each interval on its own, not adjusted) and the "
        f"two-sided p-value of the paired t-test, Holm-corrected over the {comparisons} comparisons of this table. "
        "Passes: gradient passes over the training set per run. "
        "Seconds: training time of one run on one thread, evaluations excluded."
    )


def notes(found: Summary) -> list[str]:
    """Return what a reader of the numbers must know."""
    settings, records = found.plan.settings, found.records
    same = (
        "; the test set and the training examples are the same for all seeds" if settings.test_seed is not None else ""
    )
    lines = [
        f"Runs of one seed share split, label noise, initial weights and data order, whatever the method{same}.",
        f"An epoch is {settings.steps_per_epoch} batches of {settings.batch_size}; the short last batch is dropped.",
    ]
    lines += [f"Base optimizer of every method: {base}." for base in sorted({r.base for r in records.values()})]
    if settings.noise:
        lines.append(
            "Each training label is redrawn uniformly from all classes with probability "
            f"{100 * settings.noise:g} %; test labels are clean, training error and loss are those on the noisy labels."
        )
    if collapsed := [str(run) for run, record in records.items() if record.collapsed]:
        lines.append(
            "Collapsed (final training loss near log(#classes) or not finite), and counted in the means: "
            f"{', '.join(collapsed)}."
        )
    if skipped := [f"{run} ({record.skipped})" for run, record in records.items() if record.skipped]:
        lines.append(f"Steps skipped because a gradient was not finite: {', '.join(skipped)}.")
    every = len(found.plan.runs())
    if missing := every - len(records):
        lines.append(f"{missing} of {every} runs are missing; the same command continues.")
    return lines + found.problems


def markdown(found: Summary) -> str:
    """Return the summary as a Markdown page."""
    headers, rows = table(found)
    lines = [f"# {escaped(title(found))}", "", *grid(headers, rows), "", escaped(caption(found)), ""]
    lines += [*_recipe(found), "## Notes", "", *bullets(notes(found)), "", "## Methods", ""]
    for row in found.rows:
        lines.append(f"- {code(row.method)}: {code(row.rule)}{'' if row.rho is None else f', rho {row.rho}'}")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it as it is: no HTML, no marks, one line."""
    return re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def code(text: object) -> str:
    """Return a text as a Markdown code span."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def grid(headers: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table, its numbers to the right."""
    ruled = ["| --- |" + " ---: |" * (len(headers) - 1)]
    lines = ["| " + " | ".join(map(escaped, cells)) + " |" for cells in (headers, *rows)]
    return lines[:1] + ruled + lines[1:]


def bullets(texts: list[str]) -> list[str]:
    """Return texts as the items of a Markdown list."""
    return [f"- {escaped(text)}" for text in texts]


def _recipe(found: Summary) -> list[str]:
    """Return the recipe's protocol as a section of the Markdown page."""
    recipe = found.context.recipe
    if not recipe:
        return []
    chosen = ", ".join(f"{key} {value}" for key, value in recipe["values"].items())
    lines = [f"## {escaped(recipe['recipe'])}", "", escaped(recipe["question"]), ""]
    lines += [escaped(f"Source: {recipe['source']}."), ""]
    lines += [*bullets([f"{topic}: {fact}" for topic, fact in recipe["facts"]]), ""]
    return [*lines, chosen and escaped(f"Values searched, timed or given: {chosen}."), ""]


def csv_text(found: Summary) -> str:
    """Return one line a method, numbers unrounded, nothing for those that are missing."""
    rows = [plain_row(row) for row in found.rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def plain(found: Summary) -> dict[str, Any]:
    """Return everything that the tables say, as data for JSON."""
    methods = [
        plain_row(row)
        | {"rule": row.rule, "errors": {str(seed): error for seed, error in found.errors(row.method).items()}}
        for row in found.rows
    ]
    couples = [
        {"method": str(pair.method), "other": str(pair.other), "n": pair.paired.n, **_test(pair.paired, pair.p)}
        for pair in pairs(found)
    ]
    about = {"title": title(found), "baseline": str(found.plan.reference), "seeds": found.plan.seeds}
    rest = {"settings": found.plan.settings.to_dict(), "notes": notes(found)}
    context = {"recipe": dict(found.context.recipe), "search": dict(found.context.search)}
    return about | {"methods": methods, "pairs": couples} | rest | context


def plain_row(row: Row) -> dict[str, Any]:
    """Return the numbers of a row as data for JSON."""
    data = {"method": str(row.method), "n": row.n, "error": row.mean, "sd": finite(row.sd), "paper": row.paper}
    data |= {"baseline": row.baseline, **_test(row.paired, row.p)}
    return data | {"passes": row.passes, "seconds": row.seconds, "collapsed": row.collapsed, "rho": row.rho}


def _test(test: Paired | None, p: float) -> dict[str, float | None]:
    if test is None:
        return dict.fromkeys(("difference", "low", "high", "p", "p_holm"))
    numbers = {"difference": test.difference, "low": test.low, "high": test.high, "p": test.p, "p_holm": p}
    return {name: finite(value) for name, value in numbers.items()}
