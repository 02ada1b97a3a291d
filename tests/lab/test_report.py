import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from plotly.graph_objects import Figure

from steppe.lab import files, report, runs, spec, summary, tables
from steppe.lab.report.figures import figures
from steppe.lab.statistics import paired

from .helpers import TINY, trained

METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.1)", "SAM(rho=0.1, m=32)", "SAM(rho=0.1, m=16)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab")
    trained(path, *METHODS, seeds=3)
    return path


@pytest.fixture
def found(folder):
    plan = runs.read_plan(folder)
    records, problems = runs.finished(folder, plan)
    assert not problems
    upright = {run: replace(found, collapsed=False) for run, found in records.items()}  # three epochs learn little
    return summary.summarise(plan, upright, problems)


def changed(found, text, seed, **changes):
    """The same summary with one record altered."""
    records = {
        run: replace(r, **changes) if (str(run.method), run.seed) == (text, seed) else r
        for run, r in found.records.items()
    }
    return summary.summarise(found.plan, records, [])


def test_rows_are_what_the_records_say(found):
    by_name = {str(row.method): row for row in found.rows}
    assert list(by_name) == list(METHODS)
    sgd, sam = by_name["SGD"], by_name["SAM(rho=0.1)"]
    errors = {name: [100 * r.test_error for r in found.of(spec.parse(name))] for name in METHODS}
    assert sgd.mean == pytest.approx(sum(errors["SGD"]) / 3)
    assert sam.paired == paired(errors["SAM(rho=0.1)"], errors["SGD"])
    assert sgd.baseline
    assert sgd.paired is None
    assert (sgd.passes, sam.passes, by_name["SGD(epochs=2x)"].passes) == (3, 6, 6)


def test_pairs_are_the_seeds_both_have(found):
    records = {run: r for run, r in found.records.items() if (str(run.method), run.seed) != ("SGD", 1)}
    fewer = summary.summarise(found.plan, records, [])
    assert [row.n for row in fewer.rows] == [2, 3, 3, 3, 3]
    assert fewer.rows[2].paired.n == 2
    assert any(note.startswith("1 of 15 runs are missing") for note in tables.notes(fewer))


def test_without_the_baselines_runs_nothing_is_compared(found):
    records = {run: r for run, r in found.records.items() if str(run.method) != "SGD"}
    fewer = summary.summarise(found.plan, records, [])
    assert all(row.paired is None and math.isnan(row.p) for row in fewer.rows)
    assert "baseline" not in tables.markdown(fewer).split("Notes")[0].split("difference")[1].split("Test error")[0]


def test_collapsed_runs_are_flagged(found):
    assert "collapsed" not in tables.table(found)[0]
    fallen = changed(found, "SAM(rho=0.1)", 2, collapsed=True, skipped=4)
    headers, cells = tables.table(fallen)
    assert (headers[-1], cells[2][-1]) == ("collapsed", "1 of 3")
    notes = " ".join(tables.notes(fallen))
    assert "counted in the means: SAM(rho=0.1) seed 2." in notes
    assert "not finite: SAM(rho=0.1) seed 2 (4)." in notes
    assert "x" in figures(fallen)[0].data[4]["marker"]["symbol"]
    assert "1 of 3" in report.render(fallen)


def test_markdown_holds_the_table_and_how_to_read_it(found):
    page = tables.markdown(found)
    assert page.startswith("# digits, 256 training examples, 40 % label noise\n")
    for words in ("| SAM(rho=0.1, m=16) | 3 |", "Holm-corrected over the 4 comparisons", "paired t-test", "Micro(m=16"):
        assert words in page


def test_figures_are_valid_and_complete(found):
    drawn = {figure.id: figure for figure in figures(found)}
    assert list(drawn) == ["errors", "test-error", "train-loss", "m-sweep", "cost"]
    for figure in drawn.values():
        Figure(figure.data, figure.layout)  # raises on a property that plotly does not know
    assert drawn["m-sweep"].data[0]["x"] == [16, 32, 64]
    assert len(drawn["errors"].data[0]["x"]) == 3
    assert drawn["test-error"].data[3]["x"] == list(range(1, 7))


def test_no_sweep_without_m(found):
    plan = replace(found.plan, methods=found.plan.methods[:3])
    records = {run: r for run, r in found.records.items() if run.method in plan.methods}
    assert "m-sweep" not in [figure.id for figure in figures(summary.summarise(plan, records, []))]


def test_a_run_that_is_not_finite_can_be_drawn(found):
    curves = found.records[found.plan.runs()[0]].curves
    holes = {name: [None] * len(values) if name == "train_loss" else values for name, values in curves.items()}
    report.render(changed(found, "SGD", 0, curves=holes, train_loss=None, collapsed=True))


class Loads(HTMLParser):
    """Everything that a page would fetch, and its text."""

    def __init__(self):
        super().__init__()
        self.fetched, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_stands_alone_and_says_everything(folder):
    report.write(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    reader = Loads()
    reader.feed(page)
    assert reader.fetched == ["data:,"]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    text = " ".join(reader.text)
    for words in (*METHODS, "Holm-corrected", "Micro(m=16", "weight_decay", "torch", "short last batch is dropped"):
        assert words in text
    assert page.count("</script>") == 2


def test_the_report_comes_from_the_records_alone(folder, tmp_path):
    first = report.write(folder, baseline="SAM(rho=0.1)")
    assert [row.baseline for row in first.rows] == [False, False, True, False, False]
    assert files.read_json(folder / "config.json")["baseline"] == "SGD"
    written = (folder / "report.html").read_bytes()
    report.write(folder, baseline="SAM(rho=0.1)")
    assert (folder / "report.html").read_bytes() == written


def test_an_empty_directory_has_a_report(tmp_path):
    runs.open_for(tmp_path, runs.Plan(TINY, (spec.parse("SGD"),), 2))
    report.write(tmp_path)
    assert "No run is finished yet" in (tmp_path / "report.html").read_text(encoding="utf-8")
