"""Recipes: constructible without data at every scale, true to the protocols, runnable and resumable."""

import json
import re
from dataclasses import replace

import pytest

from steppe.lab import files, report, runs, spec
from steppe.lab.errors import LabError
from steppe.lab.recipes import RECIPES, SCALES, Recipe, Study, named, reproduce
from steppe.lab.recipes.shared import WSAM
from steppe.lab.sweep import space
from steppe.lab.sweep.space import Stage
from steppe.lab.train import Session, train

from .helpers import TINY, steppe_cli

EVERY = [(name, scale) for name in RECIPES for scale in SCALES]


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_recipe_is_whole_at_every_scale(name, scale):
    studies = named(name).studies(scale)
    assert len({study.name for study in studies}) == len(studies) > 0
    for study in studies:
        study.check()
        if study.stages:
            space.check(study.search())
        assert set(study.published) <= set(study.methods)
        assert (study.settings.data == "digits") == (scale == "laptop")


def test_every_table_of_the_papers_has_its_recipe():
    sources = " ".join(recipe.source for recipe in RECIPES.values())
    for words in ("Tables 2 and 3", "Table 4", "Tables 5 and 6", "Table 7", "Table 8", "Table 9", "Figure 3"):
        assert words in sources
    assert all(recipe.facts and recipe.question.endswith("?") for recipe in RECIPES.values())


def test_wsams_protocol_as_its_authors_tell_it():
    studies = {study.name: study for study in named("wsam_classification").studies("paper")}
    assert set(studies) == {f"{d}-{m}" for d in ("cifar10", "cifar100") for m in ("resnet18", "wrn28-10")}
    small, wide = studies["cifar10-resnet18"], studies["cifar100-wrn28-10"]
    assert (small.settings.batch_size, wide.settings.batch_size) == (128, 256)
    assert (small.settings.epochs, small.settings.momentum, small.seeds) == (200, 0.9, 5)
    assert spec.parse(small.methods[0]).epochs_of(200) == 400
    stages = {stage.name: stage for stage in small.stages}
    assert list(stages)[:2] == ["base", "radius"]
    assert stages["base"].grid == {"lr": (0.05, 0.1), "weight_decay": (1e-4, 5e-4, 1e-3)}
    assert stages["radius"].grid == {"rho": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)}
    assert stages["WSAM"].grid["gamma"][:4] == (0.5, 0.6, 0.7, 0.8)
    assert stages["WSAM"].grid["gamma"][4:] == tuple(round(0.82 + 0.02 * k, 2) for k in range(8))
    assert [name for name in stages if "gamma" in stages[name].grid] == ["WSAM"]  # rho is SAM's, for all


def test_published_numbers_are_errors_of_the_reported_accuracies():
    studies = {study.name: study for study in named("rwsam_classification").studies("paper")}
    assert list(studies["cifar10-resnet18"].published.values()) == [4.38, 4.01, 3.76]
    noisy = {study.name: study for study in named("rwsam_label_noise").studies("paper")}
    assert list(noisy["noise-0.8"].published.values()) == [53.47, 62.31, 46.83]
    assert all(not study.published for study in named("label_noise").studies("paper"))


EXAMPLE = Study(
    "s",
    replace(TINY, test_seed=0),
    ("SGD", "SAM(rho={rho})", WSAM),
    seeds=2,
    values={"gamma": 0.8},
    stages=(Stage("base", "SGD", {"lr": (0.05, 0.2)}), Stage("radius", "SAM(rho={rho})", {"rho": (0.05, 0.1)})),
    published={"SAM(rho={rho})": 4.01},
)
RECIPE = Recipe("example", "Does it?", "nobody", (("numbers", "not transcribed"),), (EXAMPLE,), (EXAMPLE,), "its own")


def test_a_recipe_from_search_to_report(tmp_path, monkeypatch):
    plan = reproduce.planned(RECIPE, "laptop", EXAMPLE, tmp_path)
    found = files.read_json(tmp_path / "search.json")
    lr, rho = (found["stages"][i]["chosen"][key] for i, key in enumerate(("lr", "rho")))
    assert plan.settings == replace(EXAMPLE.settings, lr=lr)  # and the validation split is gone
    assert list(map(str, plan.methods)) == ["SGD", f"SAM(rho={rho})", f"WSAM(rho={rho}, gamma=0.8)"]
    errors = {point["values"]["lr"]: point["error"] for point in found["stages"][0]["points"]}
    assert errors[lr] == min(errors.values())

    monkeypatch.setattr(reproduce, "search", lambda *a, **k: pytest.fail("searched again"))
    assert reproduce.planned(RECIPE, "laptop", EXAMPLE, tmp_path) == plan

    runs.open_for(tmp_path, plan)
    kept = runs.context(tmp_path)
    assert kept.published == {"SGD": None, f"SAM(rho={rho})": 4.01, f"WSAM(rho={rho}, gamma=0.8)": None}
    for run in plan.runs():
        files.save(runs.path_of(tmp_path, run), train(run))
    report.write(tmp_path)
    page = (tmp_path / "summary.md").read_text()
    assert "| paper % |" in page
    assert page.count("| 4.01 |") == 1
    assert "Paper: the published error, on its own." in page
    assert "- numbers: not transcribed" in page


def test_equal_time_gives_epochs_in_proportion(monkeypatch):
    seconds = {"SGD": 1.0, "SAM(rho=0.1)": 2.0, "LookSAM(k=2)": 1.25}

    def advance(session, rows, examples):
        session.meter.seconds += seconds[str(session.run.method)]

    monkeypatch.setattr(Session, "advance", advance)
    found = reproduce.multiples(TINY, {text[:3]: spec.parse(text) for text in seconds})
    assert found == {"SGD": "2.00x", "SAM": "1.00x", "Loo": "1.60x"}
    assert str(space.filled("SAM(rho=0.1, epochs={SAM})", found)) == "SAM(rho=0.1, epochs=1.00x)"


def test_step_times_are_measured():
    found = reproduce.multiples(TINY, {"sgd": spec.parse("SGD"), "sam": spec.parse("SAM(rho=0.1)")})
    assert found["sgd"] == "2.00x"
    assert spec.parse(f"SGD(epochs={found['sam']})").epochs_of(100) >= 1


def test_a_hole_that_nothing_fills_is_told():
    with pytest.raises(LabError, match="study 's' gives no value for gamma"):
        replace(EXAMPLE, values={}).check()


def test_a_damaged_recipe_file_is_told(tmp_path):
    (tmp_path / "recipe.json").write_text('{"format": 1')
    with pytest.raises(LabError, match=r"recipe\.json is damaged"):
        reproduce.planned(RECIPE, "laptop", EXAMPLE, tmp_path)
    with pytest.raises(LabError, match=r"recipe\.json is damaged"):
        runs.context(tmp_path)


# ---- the commands


def test_recipes_are_listed_and_shown():
    brief = steppe_cli("recipes")
    assert brief.exit_code == 0
    assert all(name in brief.output for name in RECIPES)
    whole = steppe_cli("recipes", "rwsam_label_noise").output
    assert "not transcribed" in whole
    for line in ("paper: noise-0.8", "published for SAM(rho={rho}): 62.31 % error", "laptop: noise-0.4"):
        assert line in whole
    data = json.loads(steppe_cli("recipes", "--json").output)
    assert [each["name"] for each in data] == list(RECIPES)
    assert data[0]["paper"][0]["settings"]["model"] == "resnet18"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "tables"], "unknown recipe 'tables'; choose from wsam_classification"),
        (["reproduce", "cost", "--scale", "huge"], "unknown scale 'huge'; choose from paper, laptop"),
        (["reproduce", "cost", "--study", "x"], "cost has no study 'x' at scale laptop; choose from digits"),
        (["reproduce", "label_noise", "--scale", "paper"], "cifar10"),
        (["sweep", "wsam_finetune", "--scale", "paper"], "module 'large_images' cannot be imported"),
        (["sweep", "cost"], "cost searches nothing at scale laptop"),
        (["sweep", "decoupling", "--space", "rho"], "cannot read space 'rho'"),
        (["sweep", "decoupling", "--space", "alpha=1,2"], "space 'alpha' is not searched here"),
        (["sweep", "decoupling", "--space", "rho=-1,2"], "rho must be"),
        (["sweep", "decoupling", "--storage", "nonsense"], "cannot open storage nonsense"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    out = ["--out", tmp_path / "o"] if arguments[0] in ("reproduce", "sweep") else []
    result = steppe_cli(*arguments, *out)
    assert result.exit_code == 2
    (last,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert message in last
    assert "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["compare", "recipes", "reproduce", "report", "sweep"])
def test_help_has_examples(command):
    output = steppe_cli(command, "--help").output
    assert "Examples:" in output
    assert f"steppe {command}" in output


def test_sweep_then_reproduce_then_report_as_json(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "example", RECIPE)
    first = steppe_cli("sweep", "example", "--space", "rho=0.05,0.1,0.2", "--workers", 1, "--out", tmp_path)
    assert first.exit_code == 0, first.output
    assert "radius: 3 of 3 points" in first.output
    assert len(files.read_json(tmp_path / "s" / "search.json")["stages"][1]["points"]) == 3
    found = report.read(tmp_path / "s")
    assert report.command(found) == ""  # of a search alone
    assert {"search-base", "search-radius"} <= set(re.findall(r'id="(search-\w+)"', report.render(found)))

    narrow = steppe_cli("sweep", "example", "--space", "rho=0.3", "--workers", 1, "--out", tmp_path)
    assert "holds another search; choose another --out" in narrow.output
    (tmp_path / "s" / "search.json").unlink()

    whole = steppe_cli("reproduce", "example", "--workers", 1, "--out", tmp_path)
    assert whole.exit_code == 0, whole.output
    assert "base: 2 of 2 points" not in whole.output  # that stage was searched already
    again = steppe_cli("reproduce", "example", "--workers", 1, "--out", tmp_path)
    assert "0 runs to do, 6 already in" in again.output
    kept = (tmp_path / "s" / "search.json").read_bytes()
    other = steppe_cli("sweep", "example", "--space", "rho=0.3", "--workers", 1, "--out", tmp_path)
    assert "holds the search of a comparison" in other.output
    assert (tmp_path / "s" / "search.json").read_bytes() == kept

    data = json.loads(steppe_cli("report", tmp_path / "s", "--json").output)
    assert [row["n"] for row in data["methods"]] == [2, 2, 2]
    assert len(data["pairs"]) == 3
    assert data["recipe"]["recipe"] == "example"
    assert {path.name for path in (tmp_path / "s").glob("summary.*")} == {"summary.md", "summary.csv"}


def test_shell_completion_is_on():
    assert "--install-completion" in steppe_cli("--help").output
