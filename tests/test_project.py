"""The project's own promises: the README, the CI script, the public names."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import steppe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import methods as method_tables  # noqa: E402


def test_the_table_of_methods_is_what_the_methods_say() -> None:
    text = method_tables.PAGE.read_text()
    assert method_tables.with_table(text) == text
    assert text.count("\n| `") == len(steppe.METHODS)


def test_every_method_and_piece_is_public() -> None:
    text = method_tables.INIT.read_text()
    assert method_tables.with_names(text) == text  # else run: python tools/methods.py


def test_help_shows_every_argument_of_a_method() -> None:
    options = [name for name in inspect.signature(steppe.SharpnessAware).parameters if name not in ("rule", "full")]
    for method in steppe.METHODS:
        own = [name for name in inspect.signature(method).parameters if name != "options"]
        for name in {*own, *options}:
            assert re.search(rf"^    {name} \(.+\): \w", method.__doc__, re.MULTILINE | re.DOTALL), (method, name)


def test_the_benchmark_tables_are_those_of_the_records() -> None:
    from benchmarks.table import with_table

    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert with_table(text) == text
    assert "two passes" in text


def test_the_tables_of_results_are_those_of_the_records() -> None:
    import results_table

    text = results_table.PAGE.read_text()
    assert results_table.with_tables(text) == text
    shown = re.findall(r"<!-- table: (\w+) -->", text)
    assert {f"{name}_laptop" for name in shown} == {path.stem for path in results_table.RECORDS.glob("*_laptop.json")}


def test_the_tables_of_the_comparison_are_those_of_the_record() -> None:
    import compare_table

    assert compare_table.with_table(page := compare_table.PAGE.read_text()) == page


def test_the_tables_of_radii_are_those_of_the_record() -> None:
    import radius_by_m

    text = radius_by_m.PAGE.read_text()
    assert radius_by_m.with_tables(text) == text


def test_ci_calls_the_readmes_commands() -> None:
    commands = re.findall(r"^python -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [c.split("/")[-1] for c in commands] == ["steppe compare", "pytest"]
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme_command 'steppe compare'" in script
    assert "readme_command 'pytest'" in script


def test_the_readme_of_the_package_has_no_link_that_leads_nowhere() -> None:
    pytest.importorskip("hatchling")
    from readme_hook import standing_alone

    text = (ROOT / "README.md").read_text()
    assert not re.search(r"\]\((?!https?:|#)", standing_alone(text, None))
    there = standing_alone(text, "https://forge.invalid/files/")
    assert "](https://forge.invalid/files/docs/faq.md)" in there
    assert not re.search(r"\]\((?!https?:|#)", there)


def test_every_file_that_the_readme_links_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    files = re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text)
    assert len(files) > 20
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert len(text.split()) <= 900


def test_every_public_name_says_what_it_is() -> None:
    assert sorted(set(steppe.__all__)) == sorted(steppe.__all__)
    for name in steppe.__all__:
        thing = getattr(steppe, name)
        if inspect.isclass(thing):
            assert thing.__doc__, name
            assert not thing.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_methods_have_nothing_but_init() -> None:
    for method in steppe.METHODS:
        own = {name for name in vars(method) if name not in ("__module__", "__doc__", "__annotations__", "step")}
        assert own - {"__firstlineno__", "__static_attributes__"} == {"__init__"}


def test_the_page_near_sgd_has_the_tables_of_its_records() -> None:
    import near_sgd

    text = near_sgd.PAGE.read_text()
    assert near_sgd.with_tables(text) == text
