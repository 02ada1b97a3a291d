"""Fair comparisons: an equal search for each method, what it chooses, and the tables made of it."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from scipy import stats

from steppe.lab import compare, fair, files, notebook, presets, price, report, runs, spaces, spec, tasks
from steppe.lab.errors import LabError, PausedError
from steppe.lab.fair import Asked, Contestant
from steppe.lab.price import Price
from steppe.lab.report import fair as tables
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Range

from . import own_tasks
from .helpers import Process, steppe_cli

SMALL = Settings(model="mlp-16", train_size=240, batch_size=32, epochs=4, test_seed=0)
ASKED = Asked(SMALL, ("SAM", "SAM(m={m})"), seeds=3, trials=3, search_seeds=1)
COSTS = {"SGD": 1.0, "SGD(batch_size=8)": 1.0, "SAM": 2.0, "SAM(m={m})": 2.0, "SAM(m={m}, sampled=1)": 1.25}
PRICES = {name: Price(passes, 3 * passes) for name, passes in COSTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fair") / "c"
    assert fair.run(path, ASKED) == []
    return path


# ---- who takes part, and what is searched


def test_the_baselines_are_always_there():
    assert list(fair.everyone(ASKED)) == ["SGD", "SGD(batch_size=8)", "SAM", "SAM(m={m})"]
    equal = fair.everyone(replace(ASKED, equal="epochs", methods=("SGD", "SAM")))
    assert list(equal) == ["SGD", "SGD, twice the epochs", "SGD(batch_size=8)", "SAM"]
    adam = replace(ASKED, settings=replace(SMALL, optimizer="adamw"), methods=())
    assert list(fair.everyone(adam)) == ["AdamW", "AdamW(batch_size=8)"]


def test_what_a_spec_leaves_open_is_searched():
    asked = replace(ASKED, methods=("WSAM(rho=0.3)", "SAM(m={m}, lr=0.1)", "LookSAM(epochs=3)"), equal="epochs")
    found = {one.name: one for one in fair.contestants(asked, {})}
    assert found["WSAM(rho=0.3)"].method == "WSAM(rho=0.3, lr={lr}, epochs={epochs}, gamma={gamma})"
    assert found["SAM(m={m}, lr=0.1)"].method == "SAM(m={m}, lr=0.1, epochs={epochs}, rho={rho})"
    assert found["SAM(m={m}, lr=0.1)"].space["m"] == (4, 8, 16)  # parts of the batch of 32
    assert set(found["LookSAM(epochs=3)"].space) == {"lr", "rho", "k", "alpha"}
    assert found["SGD"].space == {"lr": Range(0.05 / 8, 0.4), "epochs": Range(1, 4, whole=True)}
    weighted = next(one for one in fair.contestants(replace(asked, methods=("XSAM",)), {}) if one.name == "XSAM")
    assert set(weighted.space) == {"lr", "epochs", "rho"}  # its alpha is None: the method finds it itself
    by_size = fair.contestants(replace(asked, methods=("ReweightedSharpness", "ReweightedSharpness(lam=0.5)")), {})[-2:]
    assert [one.space.get("size") for one in by_size] == [(8, 16, 32, 64), None]  # one of the two may be given
    assert by_size[0].fixed["size"] == 64
    assert found["SGD, twice the epochs"].fixed == {"lr": 0.05, "epochs": 8}


def test_spaces_may_be_given():
    asked = replace(ASKED, spaces={"rho": (0.1, 0.2), "lr": Range(0.01, 1.0), "epochs": (2,)})
    found = fair.contestants(asked, PRICES)
    assert all(one.space["lr"] == Range(0.01, 1.0) and one.space["epochs"] == (2,) for one in found)
    assert [one.space.get("rho") for one in found] == [None, None, (0.1, 0.2), (0.1, 0.2)]
    for epochs, ends in ((Range(3, 6, whole=True), [(3, 6), (3, 4)]), (Range(5, 6, whole=True), [(5, 6), (4, 4)])):
        wide = fair.contestants(replace(ASKED, spaces={"epochs": epochs}), PRICES)
        assert [(one.space["epochs"].low, one.space["epochs"].high) for one in wide[1:3]] == ends  # as equal as before
    listed = fair.contestants(replace(ASKED, spaces={"epochs": (3, 6, 20)}), PRICES)
    assert [one.space["epochs"] for one in listed] == [(3, 6), (3, 6), (3,), (3,)]
    with pytest.raises(LabError, match="space 'gamma' is searched of no method here; choose from epochs, lr, m, rho"):
        fair.contestants(replace(ASKED, spaces={"gamma": (0.5,)}), PRICES)


@pytest.mark.parametrize(
    ("equal", "most"), [("passes", [8, 8, 4, 6]), ("seconds", [8, 8, 4, 6]), ("epochs", [4, 8, 4, 4])]
)
def test_the_longest_runs_cost_alike(equal, most):
    asked = replace(ASKED, equal=equal, methods=("SAM", "SAM(m={m}, sampled=1)"))
    found = [one for one in fair.contestants(asked, PRICES) if "batch_size" not in one.name or equal != "epochs"]
    assert [one.space["epochs"].high for one in found] == most


def test_prices_are_those_of_the_definitions():
    methods = {
        text: spec.parse(text) for text in ("SGD", "SAM", "SAM(m=8, sampled=1)", "LookSAM(k=2)", "LateSAM(share=0.25)")
    }
    found = price.prices(SMALL, methods)
    assert [found[text].passes for text in methods] == [1, 2, 1 + 8 / 32, 1.5, 1.25]
    assert all(each.seconds > 0 for each in found.values())


def test_every_method_gets_the_same_number_of_different_trials():
    search = fair.Comparison(ASKED, fair.contestants(ASKED, PRICES)).search()
    points = [stage.points() for stage in search.stages]
    assert [len(each) for each in points] == [3] * 4
    assert all(len({str(point) for point in each}) == 3 for each in points)
    fixed = {"lr": 0.05, "epochs": 4, "rho": 0.05}
    assert points[2][0] == fixed  # the first trial is the fixed setting
    assert {tuple(point["lr"] for point in each) for each in points} == {tuple(p["lr"] for p in points[0])}
    assert (search.settings.validation, search.first, search.chained) == (0.25, 1000, False)


def test_trials_cover_their_spaces_evenly_and_do_not_depend_on_results():
    wide = {"lr": Range(0.001, 1.0), "m": (4, 8, 16, 32)}
    trials = spaces.design(wide, {"lr": 5.0, "m": 4}, 32)  # a fixed setting outside is left out
    assert trials == spaces.design(wide, {"lr": 5.0, "m": 4}, 40)[:32]
    for low in (0.001, 0.01, 0.1):
        assert 9 <= sum(low <= trial["lr"] < 10 * low for trial in trials) <= 12
    assert {m: sum(trial["m"] == m for trial in trials) for m in wide["m"]} == dict.fromkeys(wide["m"], 8)
    again = spaces.design(wide, {"lr": 0.5, "m": 4}, 3, draw=1)
    assert again[0] == {"lr": 0.5, "m": 4}
    assert not {str(trial) for trial in again[1:]} & {str(trial) for trial in trials}
    other = fair.Comparison(replace(ASKED, draw=2, search_seeds=3), fair.contestants(ASKED, PRICES)).search()
    assert other.first == 1006  # no seed of another draw
    one = spaces.design({"lr": (0.1,)}, {"lr": 0.1}, 5)
    assert one == ({"lr": 0.1},)  # nothing is tried twice


@pytest.mark.parametrize(
    ("value", "choices", "end"),
    [
        (0.011, Range(0.01, 1.0), "low"),
        (0.9, Range(0.01, 1.0), "high"),
        (0.1, Range(0.01, 1.0), ""),
        (0.1, Range(0.0, 1.0, log=False), ""),
        (0.95, Range(0.0, 1.0, log=False), "high"),
        (8, (16, 8, 32), "low"),
        (32, (16, 8, 32), "high"),
        (8, (8, 16), ""),
        (7, Range(7, 7, whole=True), ""),
    ],
)
def test_edges(value, choices, end):
    assert spaces.edge(value, choices) == end


# ---- from the search to the tables


def test_the_best_trial_of_each_method_is_trained_with_the_final_seeds(folder):
    search = files.read_json(folder / "search.json")
    plan = runs.read_plan(folder)
    assert plan.seeds == 3
    assert plan.settings.validation == 0
    for stage, method in zip(search["stages"], plan.methods, strict=True):
        errors = {str(point["values"]): point["error"] for point in stage["points"]}
        assert len(stage["points"]) == 3
        assert errors[str(stage["chosen"])] == min(errors.values())
        chosen = dict(method.options) | dict(method.settings) | {"epochs": method.epochs}
        assert {key: chosen[key] for key in stage["chosen"]} == stage["chosen"]
    assert [str(method) for method in runs.read_plan(folder / "fixed").methods][2] == "SAM(rho=0.05, lr=0.05, epochs=4)"
    assert not list((folder / "search").rglob("*.pt"))  # no checkpoint is left


def test_the_tables_are_what_the_records_say(folder):
    found = tables.read(folder)
    errors = {}
    for run, record in runs.finished(folder, runs.read_plan(folder))[0].items():
        errors.setdefault(str(run.method), []).append(100 * record.test_error)
    base = errors[str(found.each[0].row.method)]
    tests = {}
    for one in found.each[1:]:
        mine = errors[str(one.row.method)]
        expected = stats.ttest_rel(mine, base)
        low, high = expected.confidence_interval(0.95)
        assert one.row.mean == pytest.approx(sum(mine) / 3)
        assert (one.row.paired.low, one.row.paired.high) == pytest.approx((low, high))
        tests[one.name] = expected.pvalue
    ordered = sorted(tests, key=tests.get)
    holm = {}
    for rank, name in enumerate(ordered):
        holm[name] = min(1.0, max([*holm.values(), (len(tests) - rank) * tests[name]]))
    assert {one.name: one.row.p for one in found.each[1:]} == pytest.approx(holm)


def test_the_tables_say_what_was_chosen_and_what_fixed_parameters_say(folder):
    found = tables.read(folder)
    fixed = {str(run.method): 0.0 for run in runs.read_plan(folder / "fixed").runs()}
    for run, record in runs.finished(folder / "fixed", runs.read_plan(folder / "fixed"))[0].items():
        fixed[str(run.method)] += 100 * record.test_error / 3
    assert [one.fixed.mean for one in found.each] == pytest.approx(list(fixed.values()))
    headers, rows = tables.chosen(found)
    assert (headers[1], headers[-1], rows[0][-1]) == ("chosen", "fixed difference", "baseline")
    assert all(f"lr {one.chosen['lr']:g}" in row[1] for one, row in zip(found.each, rows, strict=True))
    assert {one.trials for one in found.each} == {3}
    words = " ".join(tables.notes(found))
    for said in (
        "3 trials of 1 seed,",
        "25 % of the training examples",
        "as noisy as the training labels",
        "same number of gradient passes",
    ):
        assert said in words


def test_a_search_begins_no_trial_after_its_minutes(tmp_path):
    asked = replace(ASKED, methods=("SAM",), search_minutes=1e-6, trials=4, seeds=1)
    assert fair.run(tmp_path / "c", asked) == []
    found = tables.read(tmp_path / "c")
    assert [one.trials for one in found.each] == [1, 1, 1]
    assert found.each[2].chosen == {"lr": 0.05, "epochs": 4, "rho": 0.05}  # the first trial is the fixed setting
    words = " ".join(tables.notes(found))
    assert (
        "no trial after 1e-06 minutes of training; fewer trials than asked for: SGD (1), SGD(batch_size=8) (1)" in words
    )
    assert "--search-minutes 1e-06" in " ".join(tables.command(found))
    with pytest.raises(LabError, match="search-minutes must be a positive number, not 0"):
        replace(ASKED, search_minutes=0)


def test_trials_near_the_best_one():
    wide = {"lr": Range(0.001, 1.0), "epochs": Range(1, 100, whole=True), "m": (32, 4, 8, 16)}
    best = {"lr": 0.0316, "epochs": 50, "m": 8}
    found = spaces.near(wide, best, 20, draw=0)
    assert len({str(point) for point in found}) == 20
    assert best not in found
    assert all(0.0133 <= point["lr"] <= 0.0751 for point in found)  # an eighth of three orders to both sides
    assert {point["m"] for point in found} == {4, 8, 16}
    at_the_end = spaces.near(wide, {"lr": 1.0, "epochs": 1, "m": 32}, 20, draw=0)
    assert all(0.42 <= point["lr"] <= 1 and point["epochs"] >= 1 and point["m"] in (16, 32) for point in at_the_end)


def test_the_last_trials_are_near_the_best_of_the_others(folder, tmp_path):
    asked = replace(ASKED, methods=("SAM",), trials=5, near=2, seeds=1)
    assert fair.run(tmp_path / "c", asked) == []
    before = {stage["name"]: stage for stage in files.read_json(folder / "search.json")["stages"]}
    for stage in files.read_json(tmp_path / "c" / "search.json")["stages"]:
        points, first = stage["points"], before[stage["name"]]
        assert [point["errors"] for point in points[:3]] == [point["errors"] for point in first["points"]]
        assert len(points) == 5
        assert all(0.5 < point["values"]["lr"] / first["chosen"]["lr"] < 2 for point in points[3:])
        assert stage["chosen"] == min(points, key=lambda point: point["error"])["values"]
    assert "the last 2 near the best of the others" in tables.notes(tables.read(tmp_path / "c"))[1]
    with pytest.raises(LabError, match="near must be a number of trials below all 3, not 3"):
        replace(ASKED, near=3)


def test_how_many_trials_are_as_good_as_the_best():
    errors = ([5.0, 7.0, 6.0], [5.5, 6.5, 6.3], [6.0, 8.0, 7.1], [9.0, 5.0, 8.5], [20.0, 20.0, 20.0])
    points = [{"errors": each, "error": sum(each) / 3} for each in errors] + [{"errors": [1.0], "error": None}]
    expected = 0
    for each in errors[1:]:
        test = stats.ttest_rel(each, errors[0])
        expected += test.statistic <= 2
    assert tables.as_good({"points": points}) == expected == 2
    assert tables.as_good({"points": [{"errors": [3.0], "error": 3.0}]}) is None


def test_where_a_search_ended_at_an_edge_a_wider_one_is_proposed(folder):
    found = tables.read(folder)
    ends = [["lr high"], ["epochs high"], ["rho low", "lr low"], ["rho high", "m low"]]
    at_edges = replace(found, each=[replace(one, edges=each) for one, each in zip(found.each, ends, strict=True)])
    assert tables.notes(at_edges)[-3] == (
        "To search wider, into another --out: --space lr=0.000781..3.2 --space rho=0.00125..8."
    )


def test_the_notes_begin_with_what_is_clear(folder):
    found = tables.read(folder)
    tested = [one for one in found.each if one.row.paired]
    assert len(tested) == 3
    for one, change, p in zip(tested, (-1.0, 2.0, -3.0), (0.04, 0.049, 0.05), strict=True):
        row = replace(one.row, p=p, paired=replace(one.row.paired, difference=change))
        found = replace(found, each=[replace(each, row=row) if each is one else each for each in found.each])
    better, worse, unclear = (one.name for one in tested)
    assert tables.notes(found)[0] == (
        f"Clearly better than SGD: {better}; clearly worse: {worse}; not clear: {unclear}. "
        "Clear is a Holm-corrected p below 0.05; lower is better."
    )
    higher = {run: replace(record, higher=True) for run, record in found.found.records.items()}
    turned = replace(found, found=replace(found.found, records=higher))
    assert tables.notes(turned)[0] == (
        f"Clearly better than SGD: {worse}; clearly worse: {better}; not clear: {unclear}. "
        "Clear is a Holm-corrected p below 0.05; higher is better."
    )
    (one,) = (each for each in found.each if each.name == better)
    row = replace(one.row, p=math.nan)
    untested = replace(found, each=[replace(each, row=row) if each is one else each for each in found.each])
    assert f"not tested, for want of two seeds that differ: {better}. " in tables.notes(untested)[0]


def test_runs_without_a_result_are_named(folder):
    found = tables.read(folder)
    assert not any("without a result" in note for note in tables.notes(found))
    rows = [found.each[0], replace(found.each[1], row=None), *found.each[2:]]
    rows[3] = replace(rows[3], row=replace(rows[3].row, n=1))
    lost = next(note for note in tables.notes(replace(found, each=rows)) if "without a result" in note)
    assert "SGD(batch_size=8) 3 of 3, SAM(m={m}) 2 of 3; they failed" in lost


def test_final_runs_above_the_budget_are_named(folder):
    found = tables.read(folder)
    most = found.each[0].fixed.passes
    told = f"The longest run of SGD cost {most:.3g} passes; final runs above that: "
    assert f"{told}none." in tables.notes(found)
    dear = replace(found.each[2], row=replace(found.each[2].row, passes=1.2 * most))
    found = replace(found, each=[*found.each[:2], dear, *found.each[3:]])
    assert f"{told}SAM {1.2 * most:.3g}." in tables.notes(found)


def test_the_notebook_says_where_the_other_runs_are_if_some_failed(tmp_path, monkeypatch):
    failure = compare.Failure(run=None, reason="no memory", details="")
    monkeypatch.setattr(fair, "run", lambda *arguments: [failure])
    with pytest.raises(LabError, match=r"1 of the runs failed, the first: no memory; .*c holds the others"):
        notebook.compare(["SAM"], "tests.lab.own_tasks:regression", folder=tmp_path / "c", batch_size=32)


def test_a_metric_that_should_be_high_is_searched_for_its_highest(tmp_path):
    asked = {"methods": ["SAM"], "seeds": 2, "trials": 3, "epochs": 3, "batch_size": 32}
    stages = {}
    for name in ("regression", "high"):
        out = notebook.compare(task=f"tests.lab.own_tasks:{name}", folder=tmp_path / name, **asked)
        stages[name], found = runs.stages(out), tables.read(out)
    for low, high in zip(*stages.values(), strict=True):
        assert low["chosen"] == high["chosen"]  # one metric is the other's negative
        for point, other in zip(low["points"], high["points"], strict=True):
            assert other["errors"] == pytest.approx([-error for error in point["errors"]])
        best = max(high["points"], key=lambda point: point["error"])
        assert high["chosen"] == best["values"]
        assert tables.as_good(low) == tables.as_good(high)
    page = report.render(found.found, fairly=found)
    assert "(higher is better)" in page
    assert "where the mean curve is highest" in page
    assert "validation minus error" in page
    verdict = tables.notes(found)[0]
    assert page.count(verdict) == 1
    assert page.index(verdict) < page.index("<table")  # what is clear stands before the numbers


def test_another_baseline(folder):
    found = tables.read(folder, "SAM")
    assert [one.name for one in found.each if one.row.baseline] == ["SAM"]
    assert [one.name for one in found.each if one.fixed.baseline] == ["SAM"]


def test_the_same_call_goes_on_and_another_question_is_refused(folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    monkeypatch.setattr(fair, "search", lambda *rest: pytest.fail("searched again"))
    assert fair.run(folder, replace(ASKED, seeds=2)) == []
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == before
    with pytest.raises(LabError, match=r"holds another comparison: trials was 3, now 4\. Choose another --out"):
        fair.run(folder, replace(ASKED, trials=4))
    assert fair.opened_again(folder).contestants == fair.contestants(ASKED, PRICES)


def test_slices_give_the_record_of_one_piece(folder, tmp_path, monkeypatch):
    out, slices = tmp_path / "c", 0
    clock = [0.0]

    def now():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(fair.time, "time", now)  # one clock for all modules: a call is a second
    while True:
        try:
            assert fair.run(out, ASKED, until=clock[0] + 400) == []
            break
        except PausedError:
            slices += 1
    assert slices > 1
    for kind in ("", "fixed"):
        plan = runs.read_plan(out / kind)
        ended, whole = runs.finished(out / kind, plan)[0], runs.finished(folder / kind, plan)[0]
        assert ended.keys() == whole.keys()
        assert all(ended[run].curves == whole[run].curves for run in whole)
    one, other = (files.read_json(path / "search.json")["stages"] for path in (out, folder))
    assert [[point["errors"] for point in stage["points"]] for stage in one] == [
        [point["errors"] for point in stage["points"]] for stage in other
    ]


def test_validation_labels_are_noisy_unless_asked():
    noisy = replace(SMALL, noise=0.5, validation=0.25)
    clean = replace(noisy, clean_validation=True)
    truth = tasks.load(replace(noisy, noise=0.0), 0)
    share = [float((tasks.load(each, 0).test_labels != truth.test_labels).float().mean()) for each in (noisy, clean)]
    assert share[0] > 0.3
    assert share[1] == 0
    assert (tasks.load(clean, 0).labels == tasks.load(noisy, 0).labels).all()


# ---- the command and the notebook


TINY = ["--train-size", 200, "--batch-size", 40, "--model", "mlp-8", "--epochs", 2, "--trials", 2, "--search-seeds", 1]


def test_the_command_prints_the_tables_and_reports_them(tmp_path):
    arguments = ["compare", *TINY, "--seeds", 2, "--method", "SAM", "--workers", 1, "--out", tmp_path / "c"]
    first = steppe_cli(*arguments)
    assert first.exit_code == 0, first.output
    for words in ("SGD(batch_size=10)", "fixed difference", "nothing was chosen by it", "- SAM: lr "):
        assert words in first.output
    again = steppe_cli(*arguments)
    assert "0 runs to do, 6 already in" in again.output
    assert "search:" not in again.output
    asks = steppe_cli("report", tmp_path / "c", "--json")
    assert '"comparison"' in asks.output
    other = steppe_cli(*arguments, "--noise", 0.2)
    assert other.exit_code == 2
    assert "holds another comparison" in other.stderr
    assert "unknown method 'SAMM'" in steppe_cli("compare", "--method", "SAMM", "--out", tmp_path / "c").stderr


def test_a_command_whose_time_is_over_exits_with_75(tmp_path):
    arguments = ["compare", *TINY, "--seeds", 1, "--method", "SAM", "--workers", 1, "--out", tmp_path / "c"]
    result = steppe_cli(*arguments, "--minutes", 0.0001)
    assert result.exit_code == 75, result.output
    assert "the same command continues" in result.output
    assert steppe_cli(*arguments).exit_code == 0


def test_interrupted_in_the_search_then_continued(tmp_path):
    arguments = ["compare", *TINY, "--epochs", 40, "--seeds", 1, "--method", "SAM", "--workers", 1]
    stopped = Process(*arguments, "--out", tmp_path / "c")
    stopped.until((tmp_path / "c" / "study.db").exists)
    stopped.interrupt()
    output, code = stopped.end()
    assert code == 130, output
    assert "Traceback" not in output
    assert steppe_cli(*arguments, "--out", tmp_path / "c").exit_code == 0


def test_a_notebooks_own_task(tmp_path):
    def mine():
        return own_tasks.regression()

    small = {"trials": 2, "seeds": 2, "epochs": 3, "batch_size": 32}
    folder = notebook.compare(["SAM"], mine, folder=tmp_path / "c", **small)
    rows = notebook.outcomes(folder)
    assert [row["name"] for row in rows] == ["SGD", "SGD(batch_size=8)", "SAM"]
    assert 0 < rows[2]["error"] < 5
    assert not any(math.isnan(row["seconds"]) for row in rows)
    assert tables.table(tables.read(folder))[0][2] == "absolute error"
    with pytest.raises(LabError, match="put it into a module, or leave workers out"):
        notebook.compare(["SAM"], mine, folder=tmp_path / "d", workers=2, **small)


SCRIPT = """
from steppe.lab import notebook
from tests.lab import own_tasks
def mine():
    return own_tasks.tokens()
given = dict(seeds=1, trials=1, epochs=1, batch_size=32)
print("made", notebook.compare(["SAM"], mine, folder={alone!r}, **given))
notebook.compare(["SAM"], "tests.lab.own_tasks:tokens", folder={together!r}, workers=2, **given)
"""


def test_a_plain_script_without_a_guard_works_or_says_what_to_do(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(alone=str(tmp_path / "a"), together=str(tmp_path / "b")))
    root = str(runs.Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert f"made {tmp_path / 'a'}" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "around the call in a script; or leave workers out" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("steppe.lab.errors.LabError: a worker process was lost")


def test_the_defaults_can_be_trained():
    for name, preset in (presets.FAIR | {f"{name}-quick": one for name, one in presets.FAIR_QUICK.items()}).items():
        asked = Asked(preset.settings, preset.methods, preset.seeds, preset.trials, equal="epochs")
        assert all(isinstance(one, Contestant) for one in fair.contestants(asked, {})), name


def test_the_report_holds_tables_figures_and_the_command(folder):
    report.write(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in (
        "SAM(m={m})",
        "fixed difference",
        "The searches over lr",
        "nothing was chosen by it",
        "Early stopping",
    ):
        assert words in page
    assert "fixed difference" in (folder / "summary.md").read_text()
    words = report.command(report.read(folder), tables.read(folder))
    assert words == (
        "steppe compare --data digits --method SAM --method 'SAM(m={m})' --train-size 240 --model mlp-16 --epochs 4 "
        "--batch-size 32 --trials 3 --search-seeds 1 --seeds 3 --equal passes --validation 0.25"
    )
    stars = [trace["marker"]["symbol"].count("star") for trace in tables.figures(tables.read(folder))[0].data]
    assert stars == [1, 1, 1, 1]
