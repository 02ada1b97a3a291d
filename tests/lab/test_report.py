"""The report: its numbers, figures and page, as functions of the records."""

import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from steppe.lab import files, report, runs, spec, summary, tables
from steppe.lab.report import svg
from steppe.lab.report.figures import COLOURS, learning, look
from steppe.lab.report.sensitivity import searches, sensitivities
from steppe.lab.statistics import mean, paired, spread

from .helpers import TINY, steppe_cli, trained

METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.1)", "SAM(rho=0.1, m=32)", "SAM(rho=0.1, m=16)")
CARDS = ("#ffffff", "#1a2028")  # what figures are drawn on, light and dark


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
    assert sensitivities(fallen)[0].data[0]["marker"]["symbol"] == ["diamond", "diamond", "x"]
    assert "1 of 3" in report.render(fallen)


def test_markdown_holds_the_table_and_how_to_read_it(found):
    page = tables.markdown(found)
    assert page.startswith("# digits, 256 training examples, 40 % label noise\n")
    for words in ("| SAM(rho=0.1, m=16) | 3 |", "Holm-corrected over the 4 comparisons", "paired t-test", "Micro(m=16"):
        assert words in page


def test_figures_are_valid_and_complete(found):
    drawn = {figure.id: figure for figure in learning(found) + sensitivities(found)}
    assert list(drawn) == ["test-error", "train-loss", "over-SAM"]
    for figure in drawn.values():
        assert len(ElementTree.fromstring(svg.draw(figure, alone=True))) > len(figure.data)
    assert drawn["test-error"].data[3]["x"] == list(range(1, 7))
    errors = [100 * r.curves["test_error"][-1] for r in found.of(spec.parse("SAM(rho=0.1)"))]
    band, line = drawn["test-error"].data[4:6]
    assert line["y"][-1] == pytest.approx(mean(errors))
    assert band["y"][2] == pytest.approx(mean(errors) + spread(errors))  # there and back
    assert band["y"][3] == pytest.approx(mean(errors) - spread(errors))


def test_the_looks_of_curves_differ_by_more_than_colour_and_are_seen_on_every_page():
    looks = [look(i) for i in range(60)]
    assert len({(colour, dash) for colour, dash, _ in looks}) == 60
    assert all(one[1] != other[1] and one[2] != other[2] for one, other in pairwise(looks))
    assert min(contrast(colour, card) for colour in COLOURS for card in CARDS) >= 3


def contrast(one, other):
    """WCAG's ratio of two colours."""
    light = []
    for text in (one, other):
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.05 + sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return max(light) / min(light)


# ---- figures over hyper-parameters


def with_errors(found, errors):
    """The same summary with methods of these errors in per cent, every run otherwise like the first one."""
    methods = tuple(spec.parse(text) for text in errors)
    plan = replace(found.plan, methods=methods, baseline=None)
    first = next(iter(found.records.values()))
    shares = {method: error / 100 for method, error in zip(methods, errors.values(), strict=True)}
    records = {run: replace(first, method=str(run.method), test_error=shares[run.method]) for run in plan.runs()}
    return summary.summarise(plan, records, [])


def drawn(figures):
    """Each figure's curves by name, as points."""
    return {f.id: {t["name"]: list(zip(t["x"], map(round, t["y"]), strict=True)) for t in f.data} for f in figures}


def test_sensitivity_is_over_one_option_with_all_others_fixed(found):
    errors = {
        "SAM(rho=0.2)": 9,
        "SAM(rho=0.5)": 8,
        "SAM(rho=0.2, m=8)": 5,
        "SAM(rho=0.2, m=16)": 6,
        "SAM(rho=0.1, m=4)": 4,
    }
    figures = sensitivities(with_errors(found, errors))
    assert drawn(figures) == {
        "over-SAM": {
            "rho 0.1": [("4", 4)],
            "rho 0.2": [("8", 5), ("16", 6), ("64", 9)],  # m left out is the whole batch
            "rho 0.5": [("64", 8)],
        }
    }
    assert figures[0].layout["xaxis"]["title"] == {"text": "m"}
    assert figures[0].layout["xaxis"]["categoryarray"] == ["4", "8", "16", "64"]


def test_a_grid_is_drawn_once_and_options_left_out_have_their_defaults(found):
    errors = {f"WSAM(rho={rho}, gamma={gamma})": 10 * rho + gamma for rho in (0.1, 0.2) for gamma in (0.5, 0.7, 0.8)}
    figures = drawn(sensitivities(with_errors(found, errors)))
    assert list(figures) == ["over-WSAM"]
    assert list(figures["over-WSAM"]) == ["rho 0.1", "rho 0.2"]
    default = drawn(sensitivities(with_errors(found, {"WSAM(rho=0.1)": 3, "WSAM(rho=0.1, gamma=0.5)": 5})))
    assert default["over-WSAM"] == {"": [("0.5", 5), ("0.9", 3)]}
    assert sensitivities(with_errors(found, {"SGD": 1, "SAM(rho=0.1)": 2, "USAM(rho=0.2)": 3})) == []
    assert sensitivities(with_errors(found, {"SAM(rho=0.1)": 2, "SAM(rho=0.2, m=8)": 3})) == []


def test_a_search_marks_what_it_chose_and_what_it_dropped(found):
    points = [
        {"values": {"lr": lr, "wd": wd}, "errors": [] if wd == 3 else [lr, wd], "dropped": lr == 0.2}
        for lr in (0.05, 0.1, 0.2)
        for wd in (1, 2, 3)
    ]
    stage = {"name": "base", "method": "SGD", "chosen": {"lr": 0.05, "wd": 2}, "points": points}
    context = replace(found.context, search={"stages": [stage], "seeds": 2})
    (figure,) = searches(replace(found, context=context))
    assert [trace["name"] for trace in figure.data] == ["wd 1", "wd 2"]  # points that failed have no error to draw
    assert [trace["marker"]["symbol"][2] for trace in figure.data] == ["x", "x"]
    assert [trace["marker"]["symbol"][0] for trace in figure.data] == ["diamond", "star"]
    assert "lr 0.05 (at the edge of the grid), wd 2. A cross" in figure.caption


# ---- the page


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
        links = () if tag == "a" else ("href",)  # a link is not followed by itself
        self.fetched += [value for name, value in attrs if name in ("src", "data", "action", "srcset", *links)]

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
    assert page.count("</script>") == 1
    assert len(page) < 2e6
    drawn = ElementTree.parse(folder / "figures" / "test-error.svg").getroot()
    assert "SAM(rho=0.1, m=16)" in "".join(drawn.itertext())


def test_the_report_comes_from_the_records_alone(folder, tmp_path):
    first = report.write(folder, baseline="SAM(rho=0.1)")
    assert [row.baseline for row in first.rows] == [False, False, True, False, False]
    assert files.read_json(folder / "config.json")["baseline"] == "SGD"
    written = (folder / "report.html").read_bytes()
    report.write(folder, baseline="SAM(rho=0.1)")
    assert (folder / "report.html").read_bytes() == written


@pytest.mark.parametrize("recipe", [None, {"recipe": "r", "scale": "laptop", "study": "s"}])
def test_the_page_says_how_to_make_it_again(folder, recipe):
    found = report.read(folder)
    if recipe:
        made = report.command(replace(found, context=replace(found.context, recipe=recipe)))
        assert made == "steppe reproduce r --scale laptop --study s --seeds 3"
        return
    words = shlex.split(report.command(found))
    out = steppe_cli(*words[1:], "--out", folder)
    assert "0 runs to do, 15 already in" in out.output
    single = replace(found, plan=replace(found.plan, methods=(spec.parse("SGD"),), seeds=1, first=2))
    assert report.command(single).startswith("steppe run SGD --data digits ")
    assert report.command(single).endswith(" --seed 2")
    unusual = replace(found.plan, settings=replace(TINY, test_seed=0))
    assert report.command(replace(found, plan=unusual)) == ""


def test_an_empty_directory_has_a_report(tmp_path):
    runs.open_for(tmp_path, runs.Plan(TINY, (spec.parse("SGD"),), 2))
    report.write(tmp_path)
    assert "No run is finished yet" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_best_epoch_is_that_of_the_mean_curve(found):
    (sgd, *_) = report.best_epochs(found)
    curves = [record.curves["test_error"] for record in found.of(spec.parse("SGD"))]
    means = [100 * mean(column) for column in zip(*curves, strict=True)]
    assert sgd == ["SGD", f"{means[-1]:.2f}", str(1 + means.index(min(means))), "3", f"{min(means):.2f}"]
    assert "known in hindsight" in report.render(found)


def test_curves_end_in_their_names_and_marks_say_what_they_are(found):
    fallen = changed(found, "SAM(rho=0.1)", 2, collapsed=True)
    (figure,) = sensitivities(fallen)
    drawn = svg.draw(figure)
    assert 'stroke-width="2.5"' in drawn  # the cross of a collapsed run
    assert "64: " in drawn  # what a mark says when it is pointed at
    lines = svg.draw(learning(found)[0])
    assert 'stroke-dasharray="9 5"' in lines
    assert lines.count('class="name"') == len(METHODS)


def test_a_log_scale_is_offered_where_every_value_is_positive(found):
    error, loss = learning(found)
    assert report.logarithmic(loss)
    error.data[1]["y"] = [0.0] * len(error.data[1]["y"])
    assert report.logarithmic(error) == ""
    short = [{**trace, "x": trace["x"][:1], "y": trace["y"][:1]} for trace in loss.data if not trace.get("fill")]
    assert svg.draw(replace(loss, data=short)).count("<circle") == len(short)  # a curve of one point is seen
    lost = svg.draw(replace(loss, data=[{**trace, "y": [None] * len(trace["y"])} for trace in loss.data]))
    assert ElementTree.fromstring(lost) is not None
