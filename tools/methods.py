"""Write what follows from ``steppe.METHODS`` and the pieces: ``python tools/methods.py``.

The table of docs/methods.md, and the names that ``steppe/api.py`` imports and lists.
"""

import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path

from marks import between

import steppe
import steppe.methods

ROOT = Path(__file__).parents[1]
PAGE, INIT = ROOT / "docs" / "methods.md", ROOT / "src" / "steppe" / "api.py"
SLOTS = ("combine", "eigen", "geometry", "rules", "sample", "select", "weights", "which")


def call(method: type[steppe.SharpnessAware]) -> str:
    """Return ``SAM(base, rho=0.05)``: the method's own parameters and their defaults."""
    parameters = inspect.signature(method).parameters.values()
    own = [p for p in parameters if p.name not in ("base", "on", "options")]
    shown = [p.name + ("=" if p.default is p.empty else f"={p.default!r}") for p in own]
    return f"{method.__name__}({', '.join(['base', *shown])})"


def row(method: type[steppe.SharpnessAware]) -> str:
    """Return one line of the table: the call, the docstring's first paragraph, its cost and its source."""
    doc = inspect.getdoc(method) or ""
    what = " ".join(doc.split("\n\n")[0].split()).replace("``", "`")
    cost = re.search(r"Costs ([^.:,]*)", " ".join(doc.split()).replace("``", "`"))
    source = re.search(r"Source: (.*)\.$", doc, re.MULTILINE)
    if cost is None or source is None:
        raise ValueError(f"the docstring of {method.__name__} must say 'Costs ...' and 'Source: ...'")
    return f"| `{call(method)}` | {what.rstrip('.')} | {cost.group(1)} | {source.group(1)} |\n"


def with_table(text: str) -> str:
    """Return the page's text with the table between its marks."""
    head = "| method | what it does | cost | source |\n|---|---|---|---|\n"
    return between(text, "methods", head + "".join(map(row, steppe.methods.METHODS)))


def public(module: str) -> list[str]:
    """Return the public classes that a module of the package defines, in the order of the linter."""
    found = vars(import_module(f"steppe.{module}"))
    names = [n for n, v in found.items() if inspect.isclass(v) and v.__module__ == f"steppe.{module}" and n[0] != "_"]
    return ordered([*names, *(["METHODS"] if module == "methods" else [])], imports=True)


def ordered(names: list[str], imports: bool = False) -> list[str]:
    """Return names in the linter's order: constants, classes, the rest; of imports without regard to case."""
    kind = lambda name: 0 if name.isupper() else 1 if name[0].isupper() else 2  # noqa: E731
    return sorted(set(names), key=lambda name: (kind(name), name.lower() if imports else name))


def with_names(text: str) -> str:
    """Return the text of ``api.py`` with the imports of methods and pieces, and ``__all__``, made anew."""
    for module in (*(f"pieces.{slot}" for slot in SLOTS), "methods"):
        names = public(module)
        line = f"from steppe.{module} import {', '.join(names)}\n"
        if len(line) > 121:
            line = f"from steppe.{module} import (\n" + "".join(f"    {name},\n" for name in names) + ")\n"
        text = re.sub(rf"^from steppe\.{re.escape(module)} import (\([^)]*\)|.*)\n", line, text, flags=re.MULTILINE)
    imported = re.findall(r"^from steppe\S* import (?:\(([^)]*)\)|(.*))$", text, re.MULTILINE)
    names = ordered([name.strip() for pair in imported for name in "".join(pair).split(",") if name.strip()])
    quoted = textwrap.fill(", ".join(f'"{name}"' for name in names) + ",", 116)
    listed = "__all__ = [\n" + textwrap.indent(quoted, "    ") + "\n]  # fmt: skip\n"
    return re.sub(r"^__all__ = \[[^\]]*\].*\n", listed, text, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
    INIT.write_text(with_names(INIT.read_text()))
