"""The code blocks of the pages run as they stand, page by page. The site's build runs the notebooks."""

import importlib.util
import json
import re
import sys
from operator import attrgetter
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS.parent / "tools"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page: Path) -> None:
    """Run the blocks of a page, one after the other, in one namespace."""
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


PAGES = [p for p in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))) if p.parent.name != "stacks" and blocks(p)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_they_made(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    import settings_page

    text = settings_page.PAGE.read_text()
    assert settings_page.with_tables(text) == text


def test_the_page_of_the_command_line_is_its_help() -> None:
    pytest.importorskip("typer")
    import cli_page

    assert cli_page.PAGE.read_text() == cli_page.page()


def test_the_code_of_m_sam_is_where_its_page_says() -> None:
    section = (DOCS / "m-sam.md").read_text().partition("## From the formula to the code")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z]+)\.([A-Za-z][\w.]+)`", section)
    assert len(named) > 12
    for module, name in named:
        found = importlib.util.find_spec(f"steppe.factored.{module}")
        assert found is not None, module
        if name != "py":
            attrgetter(name)(importlib.import_module(found.name))


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    made = {"changelog.md", *(f"notebooks/{path.stem}.md" for path in DOCS.glob("notebooks/*.ipynb"))}
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | made
