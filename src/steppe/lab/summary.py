"""Records to one table: the numbers that terminal, Markdown file and report all show."""

import math
from dataclasses import dataclass, field

from steppe.lab.context import Context
from steppe.lab.directory import Plan
from steppe.lab.record import Record
from steppe.lab.spec import Method
from steppe.lab.statistics import Paired, holm, mean, paired, spread
from steppe.lab.train import Run

HEADERS = (
    "method", "n", "error %", "sd", "paper %", "difference", "95 % CI", "p (Holm)", "passes", "seconds", "collapsed"
)  # fmt: skip
NOT_KNOWN = "not known"
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Row:
    """One method's line; errors are in per cent."""

    method: Method
    rule: str
    rho: float | None
    n: int
    mean: float
    sd: float
    baseline: bool
    paired: Paired | None  # against the baseline, over the seeds both have; None where there is nothing to compare
    p: float  # Holm-corrected
    passes: float
    seconds: float
    collapsed: int
    paper: float | None = None  # the paper's error, on its own task


@dataclass(frozen=True)
class Summary:
    """All there is to say about a directory's records."""

    plan: Plan
    records: dict[Run, Record]
    rows: list[Row]
    problems: list[str]
    context: Context = field(default_factory=Context)

    def of(self, method: Method) -> list[Record]:
        """Return a method's records in the order of their seeds."""
        return [record for run, record in self.records.items() if run.method == method]


def summarise(plan: Plan, records: dict[Run, Record], problems: list[str], context: Context | None = None) -> Summary:
    """Compute the table of a plan's finished runs."""
    errors, context = errors_of(plan, records), context or Context()
    present = [method for method in plan.methods if errors[method]]
    tests = [against(errors[method], errors[plan.reference], method == plan.reference) for method in present]
    adjusted = holm([math.nan if test is None else test.p for test in tests])
    groups = [[record for run, record in records.items() if run.method == method] for method in present]
    rows = [_row(*parts, plan.reference, context) for parts in zip(present, groups, tests, adjusted, strict=True)]
    return Summary(plan, records, rows, problems, context)


def errors_of(plan: Plan, records: dict[Run, Record]) -> dict[Method, dict[int, float]]:
    """Return each method's errors in per cent by seed."""
    errors: dict[Method, dict[int, float]] = {method: {} for method in plan.methods}
    for run, record in records.items():
        errors[run.method][run.seed] = 100 * record.test_error
    return errors


def against(errors: dict[int, float], baseline: dict[int, float], same: bool) -> Paired | None:
    """Compare two methods over the seeds both have; None for the `same` one and where they share none."""
    seeds = sorted(errors.keys() & baseline.keys())
    return None if same or not seeds else paired([errors[s] for s in seeds], [baseline[s] for s in seeds])


def _row(
    method: Method, records: list[Record], test: Paired | None, p: float, baseline: Method, context: Context
) -> Row:
    errors = [100 * record.test_error for record in records]
    return Row(
        method=method,
        rule=records[0].rule,
        rho=records[0].rho,
        n=len(records),
        mean=mean(errors),
        sd=spread(errors),
        baseline=method == baseline,
        paired=test,
        p=p,
        passes=mean([record.passes for record in records]),
        seconds=mean([record.seconds for record in records]),
        collapsed=sum(record.collapsed for record in records),
        paper=context.published.get(str(method)),
    )


def cells(row: Row) -> list[str]:
    """Return a row's texts, one for each of `HEADERS`."""
    test = row.paired
    compared = ["baseline" if row.baseline else NONE if test is None else number(test.difference, "+.2f")]
    compared += ["", ""] if test is None else [interval(test), number(row.p, ".2g")]
    paper = NOT_KNOWN if row.paper is None else number(row.paper, ".2f")
    middle = [str(row.n), number(row.mean, ".2f"), number(row.sd, ".2f"), paper]
    collapsed = f"{row.collapsed} of {row.n}" if row.collapsed else ""
    return [str(row.method), *middle, *compared, number(row.passes, ".0f"), number(row.seconds, ".1f"), collapsed]


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Return the table's headers and cells; those of collapsed runs and of the paper only where there are any."""
    absent = set() if any(row.collapsed for row in summary.rows) else {"collapsed"}
    absent |= set() if summary.context.published else {"paper %"}
    kept = [i for i, header in enumerate(HEADERS) if header not in absent]
    return [HEADERS[i] for i in kept], [[texts[i] for i in kept] for texts in map(cells, summary.rows)]


def number(value: float, form: str) -> str:
    """Format a number, with a dash where there is none."""
    return NONE if math.isnan(value) else format(value, form).replace("-", MINUS)


def interval(test: Paired) -> str:
    """Format a confidence interval."""
    return NONE if math.isnan(test.low) else f"{number(test.low, '+.2f')} to {number(test.high, '+.2f')}"


def caption(summary: Summary) -> str:
    """Say what every column of the table is."""
    comparisons = sum(not math.isnan(row.p) for row in summary.rows)
    known = any(number is not None for number in summary.context.published.values())
    paper = f"Paper: the published error, on {summary.context.recipe['setting']}. " if known else ""
    split = "Validation" if summary.plan.settings.validation else "Test"
    return (
        f"{split} error at the last epoch in per cent: mean and standard deviation (sd) over n seeds. {paper}"
        f"Difference: method minus {summary.plan.reference} in percentage points, paired by seed over the seeds "
        "both have, with the 95 % confidence interval of its mean (each interval on its own, not adjusted) and the "
        f"two-sided p-value of the paired t-test, Holm-corrected over the {comparisons} comparisons of this table. "
        "Passes: gradient passes over the training set per run. "
        "Seconds: training time of one run on one thread, evaluations excluded."
    )


def title(summary: Summary) -> str:
    """Name the experiment."""
    settings = summary.plan.settings
    noise = f", {100 * settings.noise:g} % label noise" if settings.noise else ""
    return f"{settings.data}, {settings.train_size} training examples{noise}"


def notes(summary: Summary) -> list[str]:
    """Say what a reader of the numbers must know."""
    plan = summary.plan
    same = (
        "the test set and the training examples are the same for all seeds"
        if plan.settings.test_seed is not None
        else ""
    )
    lines = [
        "Runs of one seed share split, label noise, initial weights and data order, whatever the method"
        + (f"; {same}." if same else "."),
        f"An epoch is {plan.settings.steps_per_epoch} batches of {plan.settings.batch_size}; "
        "the short last batch is dropped.",
    ]
    lines += [f"Base optimizer of every method: {base}." for base in sorted({r.base for r in summary.records.values()})]
    if plan.settings.noise:
        share = f"{100 * plan.settings.noise:g} %"
        lines.append(
            f"Each training label is redrawn uniformly from all classes with probability {share}; "
            "test labels are clean, training error and loss are those on the noisy labels."
        )
    collapsed = [f"{run.method} seed {run.seed}" for run, record in summary.records.items() if record.collapsed]
    if collapsed:
        lines.append(
            "Collapsed (final training loss near log(#classes) or not finite), and counted in the means: "
            f"{', '.join(collapsed)}."
        )
    skipped = [f"{run.method} seed {run.seed} ({r.skipped})" for run, r in summary.records.items() if r.skipped]
    if skipped:
        lines.append(f"Steps skipped because a gradient was not finite: {', '.join(skipped)}.")
    missing = len(plan.runs()) - len(summary.records)
    if missing:
        lines.append(f"{missing} of {len(plan.runs())} runs are missing; the same command continues.")
    return lines + summary.problems


def markdown(summary: Summary) -> str:
    """Return the summary as a Markdown page."""
    headers, rows = table(summary)
    lines = [f"# {title(summary)}", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (headers, ["---"] + ["---:"] * (len(headers) - 1), *rows)]
    lines += [
        "",
        caption(summary),
        "",
        *_recipe(summary),
        "## Notes",
        "",
        *(f"- {note}" for note in notes(summary)),
        "",
    ]
    lines += [
        "## Methods",
        "",
        *(f"- `{row.method}`: `{row.rule}`{'' if row.rho is None else f', rho {row.rho}'}" for row in summary.rows),
    ]
    return "\n".join(lines) + "\n"


def _recipe(summary: Summary) -> list[str]:
    """Return the recipe's protocol as a section of the Markdown page."""
    recipe = summary.context.recipe
    if not recipe:
        return []
    facts = [f"- {topic}: {fact}" for topic, fact in recipe["facts"]]
    chosen = ", ".join(f"{key} {value}" for key, value in recipe["values"].items())
    chosen = chosen and f"Values searched, timed or given: {chosen}."
    return [
        f"## {recipe['recipe']}",
        "",
        recipe["question"],
        "",
        f"Source: {recipe['source']}.",
        "",
        *facts,
        "",
        chosen,
        "",
    ]
