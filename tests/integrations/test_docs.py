"""The pages' code blocks and the examples run, as they stand, against the installed releases."""

import re
import runpy
from pathlib import Path

import pytest

from tests.test_docs import blocks, run

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("lightning")

ROOT = Path(__file__).parents[2]
STACKS = ("plain-loop", "accelerate", "huggingface", "lightning")
EXAMPLES = [example for stack in STACKS for example in ROOT.glob(f"examples/{stack.replace('-', '_')}*.py")]
PAGES = [ROOT / "docs" / "stacks" / f"{page}.md" for page in (*STACKS, "more")]

pytestmark = pytest.mark.filterwarnings(  # Lightning's own
    "ignore:.*does not have many workers", "ignore:.*LeafSpec.*", "ignore:.*smaller than the logging interval"
)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_on_the_page_runs(page: Path) -> None:
    assert blocks(page)
    run(page)


def test_every_stack_has_an_example() -> None:
    assert [e.stem.removesuffix("_digits").replace("_", "-") for e in EXAMPLES] == list(STACKS)


def test_the_table_of_costs_is_that_of_the_record() -> None:
    from benchmarks.stacks import with_table

    text = (ROOT / "docs" / "stacks" / "README.md").read_text()
    assert with_table(text) == text
    assert text.count("ratio: median") == 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_learns(example: Path, capsys) -> None:
    runpy.run_path(str(example), run_name="__main__")
    out = capsys.readouterr().out
    assert float(re.search(r"test accuracy (0\.\d+)", out)[1]) > 0.8
    if "forwards for" in out:
        forwards, batches = map(int, re.search(r"(\d+) forwards for (\d+) micro-batches", out).groups())
        assert forwards == 2 * batches
    if "resumed" in out:
        assert "resumed bit for bit: True" in out
