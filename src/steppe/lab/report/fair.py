"""The tables of a fair comparison: what each method reached and chose, and what fixed parameters would have said."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steppe.lab import runs, summary, tables
from steppe.lab.errors import unknown
from steppe.lab.fair import FIXED, Comparison, opened_again
from steppe.lab.presets import preset
from steppe.lab.report.figures import Figure, axes, curve, look
from steppe.lab.runs import SEARCH
from steppe.lab.spaces import edge
from steppe.lab.spec import Method
from steppe.lab.statistics import mean, spread
from steppe.lab.summary import Row, Summary
from steppe.lab.sweep.space import Range, filled, shown
from steppe.lab.tables import NONE, interval, mean_value, number, value

HEADERS = ("method", "n", "{metric}", "sd", "difference", "95 % CI", "p (Holm)", "passes", "seconds")
CHOSEN = (
    "method", "chosen", "at an edge", "as good", "trials", "search passes", "search s", "fixed {metric}",
    "fixed difference",
)  # fmt: skip
ABOVE = 1.05  # times a budget: what a rounded number of epochs may cost more
CLEAR = 0.05  # a corrected p-value below it is called clear
WIDER = 8.0  # times the range that is proposed where a search ended at an edge
FIXED_KEYS = ("fixed_error", "fixed_sd", "fixed_difference", "fixed_low", "fixed_high", "fixed_p_holm")
_EQUAL = {
    "passes": "The longest run of every method may cost the same number of gradient passes",
    "seconds": "The longest run of every method may take the same time, measured here before the search",
    "epochs": "The longest run of every method has the same number of epochs",
}


@dataclass(frozen=True)
class Outcome:
    """One method: its final runs, what its search chose and cost, and the same method at fixed parameters."""

    name: str
    row: Row | None  # None before its first final run
    chosen: Mapping[str, Any]
    edges: list[str]  # such as ``lr high``
    as_good: int | None  # how many other trials are within two standard errors of the best; None with one seed a trial
    trials: int
    passes: float  # of the whole search
    seconds: float
    fixed: Row | None


@dataclass(frozen=True)
class Outcomes:
    """A fair comparison with its numbers."""

    asks: Comparison
    found: Summary
    each: list[Outcome]


def read(folder: Path, baseline: str | None = None) -> Outcomes | None:
    """Return the outcomes of a directory, ``None`` if it holds no fair comparison whose search has ended."""
    asks = opened_again(folder)
    if asks is None or not (folder / SEARCH).exists() or not (folder / "config.json").exists():
        return None
    stages = {stage["name"]: stage for stage in runs.stages(folder)}
    methods = {one.name: filled(one.method, stages[one.name]["chosen"]) for one in asks.contestants}
    fixed = {one.name: filled(one.method, one.fixed) for one in asks.contestants}
    named = [name for name, method in methods.items() if baseline in (None, name, str(method))]
    if not named:
        raise unknown(f"baseline {baseline!r} is none of the methods", str(baseline), methods)
    reference = named[0]
    found = _summary(folder, methods[reference])
    plain = _summary(folder / FIXED, fixed[reference]) if (folder / FIXED / "config.json").exists() else None
    each = []
    for one in asks.contestants:
        stage = stages[one.name]
        edges = [f"{key} {end}" for key, value in stage["chosen"].items() if (end := edge(value, one.space[key]))]
        passes, seconds = (sum(point[key] for point in stage["points"]) for key in ("passes", "seconds"))
        row, unsearched = _row(found, methods[one.name]), _row(plain, fixed[one.name])
        spent = (len(stage["points"]), passes, seconds)
        each.append(Outcome(one.name, row, stage["chosen"], edges, as_good(stage), *spent, unsearched))
    return Outcomes(asks, found, each)


def as_good(stage: Mapping[str, Any]) -> int | None:
    """Return how many trials are worse than the best by less than two standard errors of the paired difference."""
    ended = [point["errors"] for point in runs.best_first(stage["points"])]
    if not ended or len(best := ended[0]) < 2:
        return None
    others = [[a - b for a, b in zip(errors, best, strict=True)] for errors in ended[1:]]
    return sum(abs(mean(each)) <= 2 * spread(each) / math.sqrt(len(each)) for each in others)


def _summary(folder: Path, baseline: Method) -> Summary:
    plan = runs.read_plan(folder)
    plan = replace(plan, baseline=baseline if baseline in plan.methods else None)
    return summary.summarise(plan, *runs.finished(folder, plan), runs.context(folder))


def _row(found: Summary | None, method: Method) -> Row | None:
    return next((row for row in found.rows if row.method == method), None) if found else None


def _difference(row: Row | None) -> str:
    if row is None or (row.paired is None and not row.baseline):
        return NONE
    return "baseline" if row.paired is None else f"{value(row.paired.difference, '+')} [{interval(row.paired)}]"


def table(found: Outcomes) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of what each method reached."""
    rows = []
    for one in found.each:
        if one.row is not None:
            row = one.row
            difference = [value(row.paired.difference, "+"), interval(row.paired)] if row.paired else ["baseline", ""]
            p = number(row.p, ".2g") if row.paired else ""
            numbers = [str(row.n), mean_value(row.mean), value(row.sd), *difference, p]
            rows.append([one.name, *numbers, number(row.passes, ".0f"), number(row.seconds, ".1f")])
    return _named(HEADERS, found), rows


def chosen(found: Outcomes) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of what each search chose, and of the comparison at fixed parameters."""
    rows = []
    for one in found.each:
        values = ", ".join(f"{key} {each:g}" for key, each in one.chosen.items())
        spent = [str(one.trials), number(one.passes, ".0f"), number(one.seconds, ".1f")]
        fixed = [mean_value(one.fixed.mean) if one.fixed else NONE, _difference(one.fixed)]
        alike = NONE if one.as_good is None else str(one.as_good)
        rows.append([one.name, values, ", ".join(one.edges), alike, *spent, *fixed])
    return _named(CHOSEN, found), rows


def _named(headers: tuple[str, ...], found: Outcomes) -> list[str]:
    return [header.format(metric=found.found.metric) for header in headers]


def figures(found: Outcomes) -> list[Figure]:
    """Draw the validation error of every trial over each parameter that several methods search; a star was chosen."""
    stages = {stage["name"]: stage for stage in found.found.context.search["stages"]}
    keys = dict.fromkeys(key for one in found.asks.contestants for key in one.space)
    drawn = []
    for key in keys:
        data = []
        for index, (name, stage) in enumerate(stages.items()):
            points = [point for point in stage["points"] if key in point["values"] and point["error"] is not None]
            marks = ["star" if point["values"] == stage["chosen"] else look(index)[2] for point in points]
            x, y = [point["values"][key] for point in points], [point["error"] for point in points]
            more = {"mode": "markers", "marker": {"symbol": marks}}
            data += [curve(x, y, name, index, **more)] if points else []
        if len(data) > 1:
            ranges = [one.space[key] for one in found.asks.contestants if key in one.space]
            kind = "log" if any(isinstance(each, Range) and each.log for each in ranges) else "linear"
            layout = axes(key, f"validation {found.found.metric}", xaxis={"type": kind})
            caption = f"Every trial of every method; {found.found.direction}. A star: the setting of the final runs."
            drawn.append(Figure(f"search-{key}", f"The searches over {key}", caption, data, layout))
    return drawn


def command(found: Outcomes) -> list[str]:
    """Return the words of the command that makes this comparison again, after ``steppe``."""
    asked = found.asks.asked
    usual = preset(asked.settings.data, fair=True).settings.to_dict() | {"test_seed": asked.settings.test_seed}
    given = {key: value for key, value in asked.settings.to_dict().items() if value not in (None, usual[key])}
    if given.get("model") == asked.settings.data:  # a task brings its own
        del given["model"]
    words = ["compare", "--data", asked.settings.data]
    words += [word for text in asked.methods for word in ("--method", text)]
    words += [word for key, each in asked.spaces.items() for word in ("--space", f"{key}={shown(each)}")]
    options = given | {"trials": asked.trials, "search_seeds": asked.search_seeds, "seeds": found.found.plan.seeds}
    options |= {"equal": asked.equal, "validation": asked.validation}
    options |= {"near": asked.near} if asked.near else {}
    options |= {"search_draw": asked.draw} if asked.draw else {}
    options |= {} if asked.search_minutes is None else {"search_minutes": asked.search_minutes}
    words += [word for key, each in options.items() for word in (f"--{key.replace('_', '-')}", str(each))]
    return words + (["--clean-validation"] if asked.clean else [])


def notes(found: Outcomes) -> list[str]:
    """Return what a reader of the tables must know."""
    asked = found.asks.asked
    held = f"{100 * asked.validation:.3g} % of the training examples"
    lines = [
        *_verdict(found),
        *_lost(found),
        f"Every method had {asked.trials} trials of {asked.search_seeds} seed{'s' * (asked.search_seeds > 1)}, the "
        "first of them at fixed parameters, "
        f"{f'the last {asked.near} near the best of the others, ' if asked.near else ''}"
        f"judged by the last epoch on {held}, held out. The final runs train on all of them, with other seeds.",
        f"{_EQUAL[asked.equal]}; how long to train, up to that, is searched like the learning rate. No run is stopped "
        "early, and none reports its best epoch.",
        "The test set was used for the final runs alone; nothing was chosen by it. All seeds share it: an interval "
        "covers neither the choice of the test set nor the luck of a search.",
    ]
    if asked.settings.noise:
        kind = "clean" if asked.clean else "as noisy as the training labels"
        lines.append(f"The validation labels were {kind}.")
    return [
        *lines,
        *_longest(found),
        *_minutes(found),
        *_edges(found),
        "As good: how many other trials are within two standard errors of the best. Many: the validation examples and "
        "search seeds cannot tell them apart, and the choice is partly luck. None: the best stands alone, and trials "
        "near it (--near) may be better.",
        "Fixed: the same methods at the settings' learning rate, their default parameters and the longest training, "
        "as a comparison without a search has them.",
    ]


def _verdict(found: Outcomes) -> list[str]:
    """Return which methods are clearly better than the baseline, clearly worse, and neither."""
    tested = [(one.name, one.row.paired.difference, one.row.p) for one in found.each if one.row and one.row.paired]
    sign = -1 if found.found.higher else 1
    better = [name for name, difference, p in tested if p < CLEAR and sign * difference < 0]
    worse = [name for name, difference, p in tested if p < CLEAR and sign * difference > 0]
    untested = [name for name, _, p in tested if math.isnan(p)]
    unclear = [name for name, _, _ in tested if name not in better + worse + untested]
    base = next((one.name for one in found.each if one.row and one.row.baseline), "the baseline")
    parts = {f"Clearly better than {base}": better, "clearly worse": worse, "not clear": unclear}
    parts |= {"not tested, for want of two seeds that differ": untested} if untested else {}
    texts = "; ".join(f"{title}: {', '.join(names) or 'none'}" for title, names in parts.items())
    return [f"{texts}. Clear is a Holm-corrected p below {CLEAR}; {found.found.direction}."] if tested else []


def _lost(found: Outcomes) -> list[str]:
    """Return which final runs have no result: the means are over the others, and say too little of a method."""
    asked = found.found.plan.seeds
    ended = {one.name: one.row.n if one.row else 0 for one in found.each}
    lost = ", ".join(f"{name} {asked - n} of {asked}" for name, n in ended.items() if n < asked)
    why = "they failed, ended with a metric that is not finite, or are still to be trained"
    return [f"Final runs without a result, which no mean or test counts: {lost}; {why}."] if lost else []


def _longest(found: Outcomes) -> list[str]:
    """Return which final runs cost more than the baseline's longest one, which is that at fixed parameters.

    Prices are measured at a method's usual options before the search, which may choose dearer ones.
    """
    unit = found.asks.asked.equal
    if unit == "epochs" or not (base := found.each[0].fixed):
        return []
    most: float = getattr(base, unit)
    costs = {one.name: getattr(one.row, unit) for one in found.each if one.row}
    above = ", ".join(f"{name} {cost:.3g}" for name, cost in costs.items() if cost > ABOVE * most)
    return [
        f"The longest run of {found.each[0].name} cost {most:.3g} {unit}; final runs above that: {above or 'none'}."
    ]


def _minutes(found: Outcomes) -> list[str]:
    """Return which searches the limit of their time cut short."""
    asked = found.asks.asked
    if asked.search_minutes is None:
        return []
    short = ", ".join(f"{one.name} ({one.trials})" for one in found.each if one.trials < asked.trials)
    ended = f"fewer trials than asked for: {short}" if short else "all had all their trials"
    return [f"A search began no trial after {asked.search_minutes:g} minutes of training; {ended}."]


def _edges(found: Outcomes) -> list[str]:
    """Return which choices lie at an end of what was searched, and how to search wider."""
    ends = "; ".join(f"{one.name} ({', '.join(one.edges)})" for one in found.each if one.edges)
    lines = [f"At an edge of what was searched, so that a wider search may find better: {ends}."] if ends else []
    return lines + ([f"To search wider, into another --out: {wider}."] if (wider := _wider(found)) else [])


def _wider(found: Outcomes) -> str:
    """Return the options that widen what was searched where a choice lay at an end, as far as it may be widened."""
    ends: dict[str, list[Range]] = {}
    for one, contestant in zip(found.each, found.asks.contestants, strict=True):
        for key, end in (text.split() for text in one.edges):
            if isinstance(choices := contestant.space[key], Range) and choices.log and not choices.whole:
                low, high = (choices.low / WIDER, choices.high) if end == "low" else (choices.low, choices.high * WIDER)
                ends.setdefault(key, []).append(Range(low, high))
    spaces = {key: Range(min(each.low for each in all_), max(each.high for each in all_)) for key, all_ in ends.items()}
    return " ".join(f"--space {key}={space.low:.3g}..{space.high:.3g}" for key, space in spaces.items())


def plain(found: Outcomes) -> list[dict[str, Any]]:
    """Return one flat row for each method, as data for JSON."""
    rows = []
    for one in found.each:
        final = tables.plain_row(one.row) if one.row else {}
        cost = {"trials": one.trials, "search_passes": one.passes, "search_seconds": one.seconds}
        choice = {"name": one.name, "chosen": dict(one.chosen), "edges": one.edges, "as_good": one.as_good} | cost
        fixed = {f"fixed_{key}": each for key, each in tables.plain_row(one.fixed).items()} if one.fixed else {}
        rows.append(choice | final | {key: each for key, each in fixed.items() if key in FIXED_KEYS})
    return rows


def markdown(found: Outcomes) -> str:
    """Return both tables and the notes as Markdown."""
    lines = [f"# {tables.escaped(tables.title(found.found))}: a fair comparison", ""]
    for headers, rows in (table(found), chosen(found)):
        lines += [*tables.grid(headers, rows), ""]
    return "\n".join([*lines, *tables.bullets(notes(found)), "", ""])
