"""The architecture: who may import whom, how long things may be, what is named once.

Each rule answers what breaks it. ``KNOWN`` lists what breaks it today: nothing new may join, and what no longer breaks
it must leave the list, so the list only shrinks.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "steppe"
OUTSIDE = ("lab", "measure", "sde", "toy", "integrations", "cli", "__main__")  # all the rest is the core
LONGEST_MODULE, LONGEST_FUNCTION = 300, 40
EXTRAS = ("numpy", "scipy", "sklearn", "typer", "rich", "jinja2", "matplotlib", "optuna", "sqlalchemy")
EXTRAS += ("accelerate", "transformers", "lightning")

KNOWN: dict[str, set[str]] = {}

Import = tuple[str, str]  # a module below ``steppe``, and the absolute name that it imports


# ------------------------------------------------------------------------------------------------------------- reading


@cache
def modules() -> dict[str, ast.Module]:
    """Parse every module of the package, by its name below ``steppe``; the package itself is ``steppe``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "steppe"] = ast.parse(path.read_text())
    return found


def is_package(name: str) -> bool:
    return name == "steppe" or (ROOT / Path(*name.split("."))).is_dir()


def in_the_core(name: str) -> bool:
    return name.split(".")[0] not in OUTSIDE


def below(name: str, *rooms: str) -> bool:
    """Return whether a module is one of the rooms, or in one."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def targets(importer: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the absolute names of what one statement imports; ``from x import y`` yields ``x.y``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    origin = (node.module or "").split(".") if node.module else []
    if node.level:
        here = ["steppe", *(importer.split(".") if importer != "steppe" else [])]
        climb = node.level - is_package(importer)
        origin = here[: len(here) - climb] + origin
    yield from (".".join([*origin, alias.name]) for alias in node.names)


def module_of(target: str) -> str | None:
    """Return the module of the package that an absolute name leads to, or None outside the package."""
    if target.split(".")[0] != "steppe":
        return None
    name = target.removeprefix("steppe").removeprefix(".")
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or "steppe"


@cache
def imports() -> list[Import]:
    """List every import: of modules, of functions, and for type checkers alone."""
    return [
        (importer, target)
        for importer, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in targets(importer, node)
    ]


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every function's dotted name and its lines from ``def`` to the end, without its docstring."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{getattr(child, 'name', '')}"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                first = child.body[0]
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                if ast.get_docstring(child) is not None:
                    lines -= (first.end_lineno or first.lineno) - first.lineno + 1
                yield name, lines
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, f"{name}." if named else prefix)

    yield from walk(tree, "")


def circles(edges: Iterable[tuple[str, str]]) -> set[str]:
    """Return the nodes from which a path leads back to them."""
    onward: dict[str, set[str]] = {}
    for start, end in edges:
        if start != end:
            onward.setdefault(start, set()).add(end)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(onward.get(start, ()))
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(onward.get(node, ()))
        return seen

    return {node for node in onward if node in reached(node)}


# --------------------------------------------------------------------------------------------------------------- rules


def core_imports_what_is_outside() -> set[str]:
    """The core knows nothing of the laboratory, the measurements, the equations, the figures and the frameworks."""
    return {
        f"{importer} imports {module}"
        for importer, target in imports()
        if in_the_core(importer) and (module := module_of(target)) and not in_the_core(module)
    }


def definitions_import_factored() -> set[str]:
    """Rules, pieces and the engine define; ``factored`` interprets them, and the optimizer hands it in.

    Outside the core, its face may be used: what ``factored/__init__.py`` offers.
    """
    return {
        f"{importer} imports {module}"
        for importer, target in imports()
        if not below(importer, "factored", "optimizer", "step", "steppe")
        and (module := module_of(target))
        and below(module, "factored")
        and (in_the_core(importer) or module != "factored")
    }


def engine_imports_upwards() -> set[str]:
    """The engine carries a step out; it knows neither the optimizer nor the rules and methods."""
    return {
        f"{importer} imports {module}"
        for importer, target in imports()
        if below(importer, "engine")
        and (module := module_of(target))
        and below(module, "optimizer", "facade", "step", "check_batch", "methods", "rule", "mean_batch", "factored")
    }


def modules_in_a_circle() -> set[str]:
    """Imports run one way, also those inside functions and those for type checkers alone."""
    return circles((importer, module) for importer, target in imports() if (module := module_of(target)))


def long_modules() -> set[str]:
    """A module has at most 300 lines; ``methods`` is a table."""
    lengths = {name: len(source(name).splitlines()) for name in modules()}
    return {name for name, lines in lengths.items() if lines > LONGEST_MODULE and name != "methods"}


def long_functions() -> set[str]:
    """A function has at most 40 lines, from ``def`` to its end, its docstring not counted."""
    return {
        f"{module}.{name}"
        for module, tree in modules().items()
        for name, lines in functions(tree)
        if lines > LONGEST_FUNCTION
    }


def public_classes_of_one_name() -> set[str]:
    """A public class's name means one thing in the whole package."""
    names = [n.name for tree in modules().values() for n in tree.body if isinstance(n, ast.ClassDef)]
    return {name for name, count in Counter(names).items() if count > 1 and not name.startswith("_")}


def core_imports_more_than_torch() -> set[str]:
    """Everybody who has torch can use the core."""
    allowed = {"torch", "steppe", *sys.stdlib_module_names}
    return {
        f"{importer} imports {target}"
        for importer, target in imports()
        if in_the_core(importer) and target.split(".")[0] not in allowed
    }


def looks_behind_the_scenes() -> set[str]:
    """Nothing scans memory, counts the references of a storage, or walks the stack.

    Shared passes read one frame: the place in the code that calls a torch function, to tell what has been verified.
    """
    allowed = {("factored.sites", "_getframe")}
    forbidden = {"get_objects", "get_referrers", "_getframe", "currentframe"}
    return {
        f"{module} uses {node.attr}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in forbidden and (module, node.attr) not in allowed
    }


def uses_dot_data() -> set[str]:
    """Weights move in place: ``p.data`` goes round autograd. The laboratory's ``data`` are settings."""
    owners = {"self", "batch", "other", "part", "problem"}  # whose data are examples

    def owner(node: ast.expr) -> str:
        return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")

    return {
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if not below(module, "lab") and isinstance(node, ast.Attribute)
        if node.attr == "data" and owner(node.value) not in owners
    }


def source(name: str) -> str:
    path = ROOT if name == "steppe" else ROOT / Path(*name.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


RULES = (
    core_imports_what_is_outside,
    definitions_import_factored,
    engine_imports_upwards,
    modules_in_a_circle,
    long_modules,
    long_functions,
    public_classes_of_one_name,
    core_imports_more_than_torch,
    looks_behind_the_scenes,
    uses_dot_data,
)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house(rule) -> None:
    found, known = rule(), KNOWN.get(rule.__name__, set())
    assert not found - known, f"{rule.__doc__} New: {sorted(found - known)}"
    assert not known - found, f"no longer so; take them off KNOWN: {sorted(known - found)}"


def test_known_exceptions_belong_to_a_rule() -> None:
    assert KNOWN.keys() <= {rule.__name__ for rule in RULES}


def test_every_import_statement_is_seen() -> None:
    seen = {(importer, module_of(target)) for importer, target in imports()}
    assert {("api", "methods"), ("optimizer", "engine.oracle"), ("pieces.geometry", "engine.vector")} <= seen
    assert ("cli", "lab.commands") in seen  # inside a function
    assert list(targets("lab.data.own", ast.parse("from ..settings import x").body[0])) == ["steppe.lab.settings.x"]
    assert list(targets("lab.data", ast.parse("from . import own").body[0])) == ["steppe.lab.data.own"]


def test_circles_are_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e")]) == {"a", "b", "c"}
    assert circles([("a", "b"), ("a", "c"), ("b", "c"), ("c", "c")]) == set()


def test_lines_are_counted_without_the_docstring() -> None:
    tree = ast.parse('class A:\n    def f(self):\n        """One.\n\n        Two.\n        """\n        return 1\n')
    assert list(functions(tree)) == [("A.f", 2)]


def test_the_core_measuring_and_theory_need_torch_alone() -> None:
    code = f"import sys; [sys.modules.__setitem__(m, None) for m in {EXTRAS}]; import steppe; steppe.SAM"
    code += "; assert not {'steppe.measure', 'steppe.sde', 'steppe.toy'} & {*sys.modules}"  # the core knows none
    code += "; from steppe import measure, sde, toy; measure.minimum; assert 'steppe.lab' not in sys.modules"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
