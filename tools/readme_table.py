"""Write the README's table of methods from ``steppe.METHODS``: ``python tools/readme_table.py``."""

import inspect
import re
from pathlib import Path

import steppe

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"


def call(method: type[steppe.SharpnessAware]) -> str:
    """``SAM(base, rho=0.05)``: the method's own parameters and their defaults."""
    parameters = inspect.signature(method).parameters.values()
    own = [p for p in parameters if p.name not in ("base", "m", "on", "options")]
    shown = [p.name + ("=" if p.default is p.empty else f"={p.default!r}") for p in own]
    return f"{method.__name__}({', '.join(['base', *shown])})"


def row(method: type[steppe.SharpnessAware]) -> str:
    """One line of the table: the call, the docstring's first paragraph, its cost and its source."""
    doc = inspect.getdoc(method) or ""
    what = " ".join(doc.split("\n\n")[0].split()).replace("``", "`")
    cost = re.search(r"Costs ([^.:,]*)", " ".join(doc.split()).replace("``", "`"))
    source = re.search(r"Source: (.*)\.$", doc, re.MULTILINE)
    if cost is None or source is None:
        raise ValueError(f"the docstring of {method.__name__} must say 'Costs ...' and 'Source: ...'")
    return f"| `{call(method)}` | {what.rstrip('.')} | {cost.group(1)} | {source.group(1)} |\n"


def table() -> str:
    """The whole table as Markdown."""
    head = "| method | what it does | cost | source |\n|---|---|---|---|\n"
    return head + "".join(row(method) for method in steppe.METHODS)


def with_table(text: str) -> str:
    """The README's text with the table between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
