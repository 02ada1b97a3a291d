"""The summary for programs and papers: CSV, LaTeX, plain data."""

import csv
import io
import math
from typing import Any

from steppe.lab import summary as words
from steppe.lab.pairs import pairs
from steppe.lab.record import finite
from steppe.lab.statistics import Paired
from steppe.lab.summary import Summary

_LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "\N{EN DASH}": "--", "\N{MINUS SIGN}": "$-$"}


def csv_text(found: Summary) -> str:
    """Return one line a method, numbers unrounded, nothing where there is none."""
    rows = [_row(found, i) for i in range(len(found.rows))]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(found: Summary, index: int) -> dict[str, Any]:
    row = found.rows[index]
    data = {"method": str(row.method), "n": row.n, "error": row.mean, "sd": finite(row.sd), "paper": row.paper}
    data |= {"baseline": row.baseline, **_test(row.paired), "p_holm": finite(row.p)}
    return data | {"passes": row.passes, "seconds": row.seconds, "collapsed": row.collapsed, "rho": row.rho}


def _test(test: Paired | None) -> dict[str, float | None]:
    if test is None:
        return dict.fromkeys(("difference", "low", "high", "p"))
    return {"difference": test.difference, "low": finite(test.low), "high": finite(test.high), "p": finite(test.p)}


def latex(found: Summary) -> str:
    """Return the table as a LaTeX `tabular` (needs booktabs); the best mean is bold, the baseline has no difference."""
    headers, lines = words.table(found)
    best = min((row.mean for row in found.rows), default=math.nan)
    body = []
    for row, cells in zip(found.rows, lines, strict=True):
        texts = [_escaped(cell) for cell in cells]
        texts[2] = f"\\textbf{{{texts[2]}}}" if row.mean == best else texts[2]
        body.append(" & ".join(texts) + r" \\")
    columns = "l" + "r" * (len(headers) - 1)
    head = " & ".join(map(_escaped, headers)) + r" \\"
    lines_ = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    note = [f"% {line}" for line in (words.title(found), words.caption(found))]
    return "\n".join([*note, *lines_]) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def plain(found: Summary) -> dict[str, Any]:
    """Return everything the tables say, as data for JSON."""
    rows = [_row(found, i) | {"rule": row.rule, "errors": _errors(found, i)} for i, row in enumerate(found.rows)]
    couples = [
        {"method": str(pair.method), "other": str(pair.other), "n": pair.paired.n, **_test(pair.paired)}
        | {"p_holm": finite(pair.p)}
        for pair in pairs(found)
    ]
    about = {"title": words.title(found), "baseline": str(found.plan.reference), "seeds": found.plan.seeds}
    rest = {"settings": found.plan.settings.to_dict(), "notes": words.notes(found)}
    context = {"recipe": dict(found.context.recipe), "search": dict(found.context.search)}
    return about | {"methods": rows, "pairs": couples} | rest | context


def _errors(found: Summary, index: int) -> dict[str, float]:
    """Return a method's error by seed in per cent."""
    method = found.rows[index].method
    return {str(run.seed): 100 * record.test_error for run, record in found.records.items() if run.method == method}
