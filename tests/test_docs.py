"""The code blocks of the pages run as they stand, page by page."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


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
