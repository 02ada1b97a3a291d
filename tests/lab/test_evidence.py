"""The studies of examples/evidence, their tasks, and the tables that are made of their records."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from steppe.lab import fair, own, presets
from steppe.lab.report import fair as tables
from steppe.lab.sweep.space import parse

from . import formats
from .helpers import steppe_cli

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "examples" / "evidence")]

import ablation_tables  # noqa: E402
import evidence  # noqa: E402
import studies  # noqa: E402
import tasks  # noqa: E402

PAGE, STUDIES = evidence.PAGE.read_text(), evidence.STUDIES.read_text()
SHOWN = list(evidence.titles(STUDIES))


def test_the_tables_of_the_page_are_those_of_the_records():
    assert evidence.with_tables(PAGE) == PAGE
    assert evidence.with_studies(STUDIES) == STUDIES
    assert evidence.short("digits-noise", evidence.README_ROWS) in evidence.README.read_text()
    assert {f"evidence_{name.replace('-', '_')}" for name in SHOWN} == {
        path.stem for path in evidence.RECORDS.glob("evidence_*.json")
    }
    assert set(SHOWN) <= set(studies.STUDIES)


def test_the_tables_of_the_ablations_are_those_of_the_record():
    page = ablation_tables.PAGE.read_text()
    assert ablation_tables.with_tables(page) == page
    arms = json.loads(ablation_tables.RECORD.read_text())[ablation_tables.DIGITS]
    first, other = (torch.tensor(arms[name]["errors"]).double() for name in ("SAM", "SGD"))
    low, high = stats.ttest_rel(first, other).confidence_interval(0.95)
    shown = next(line for line in page.splitlines() if line.startswith(f"| SAM | {first.mean():.1f} ± "))
    assert f"{low:.2f} to {high:.2f}".replace("-", "\N{MINUS SIGN}") in shown


@pytest.mark.parametrize("study", SHOWN[:2])
def test_a_table_computed_again_by_other_means(study):
    text = STUDIES.split(f"<!-- study {study}: begin -->\n")[1].split("<!-- study")[0]
    heads, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    shown = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    rows = evidence.record(study)["methods"]
    base = rows[0]["errors"]
    found = {}
    for row in rows:
        cells = shown[evidence.label(row["name"])]
        sample = torch.tensor(row["errors"], dtype=torch.float64)
        assert cells[heads[1]] == f"{sample.mean():.1f} ± {sample.std():.1f}"
        assert cells["fixed"] == f"{sum(row['fixed_errors']) / len(row['fixed_errors']):.1f}"
        if row is not rows[0]:
            found[row["name"]] = stats.ttest_rel(row["errors"], base)
    order = sorted(found, key=lambda name: found[name].pvalue)
    adjusted = 0.0
    for rank, name in enumerate(order):
        adjusted = max(adjusted, (len(order) - rank) * found[name].pvalue)
        low, high = found[name].confidence_interval(0.95)
        interval = f"{low:+.2f} to {high:+.2f}".replace("-", "\N{MINUS SIGN}")
        cell = shown[evidence.label(name)][heads[2]]
        assert cell == (f"**{interval}**" if adjusted < 0.05 else interval)


def test_a_record_says_how_each_method_was_searched():
    for study in SHOWN:
        found, asked = evidence.record(study), studies.STUDIES[study]
        assert [row["name"] for row in found["methods"]][2:] in (
            [*asked.methods],
            [*asked.methods, *asked.rest().methods],
        )
        assert {row["trials"] for row in found["methods"]} == {asked.trials}
        assert {len(row["errors"]) for row in found["methods"]} == {asked.seeds}
        assert asked.seeds >= 5
        assert all(math.isfinite(error) for row in found["methods"] for error in row["errors"])
        assert "/" not in str(found["environment"]["steppe"])


def test_a_record_holds_the_methods_that_were_trained_later(tmp_path, monkeypatch):
    (tmp_path / "few-rest").mkdir()

    def rows(milliseconds: list[float], *errors: list[float]) -> dict:
        return {"methods": [{"errors": e, "epoch_ms": ms} for ms, e in zip(milliseconds, errors, strict=True)]}

    base, smaller = [7.0, 8.0], [6.0, 6.5]
    found = {
        "few": rows([2.0, 5.0, 4.0], base, smaller, [5.0, 5.5]),
        "few-rest": rows([3.0, 7.0, 9.0], base, smaller, [4.0, 4.5]),
    }
    monkeypatch.setattr(evidence, "_collect", lambda folder: found[folder.name])
    joined = evidence.collect(tmp_path / "few")["methods"]
    assert [row["errors"] for row in joined] == [base, smaller, [5.0, 5.5], [4.0, 4.5]]
    assert [row["epoch_ms"] for row in joined] == [2.0, 5.0, 4.0, 6.0]  # three times the base's, as it was timed
    found["few-rest"]["methods"][1]["errors"] = [6.0, 6.6]
    with pytest.raises(SystemExit, match="few-rest has other baselines than"):
        evidence.collect(tmp_path / "few")


def test_the_tasks_are_what_the_commands_take(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPPE_TEXT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fortunes\.pt is not there: run encode_fortunes\.py"):
        tasks.texts()
    (tmp_path / "fortunes.txt").write_text("a stitch in time saves nine\n" * 2600)
    torch.save({"inputs": torch.randn(4500, 6).half(), "classes": torch.arange(4500) % 3}, tmp_path / "fortunes.pt")
    for make, shape in ((tasks.texts, (3,)), (tasks.letters, (32, 12)), (tasks.diabetes, (1,))):
        task = own.named(make(), make.__name__)
        task.check()
        assert task.model()(task.train[0][:2]).shape == (2, *shape)
    untrained = tasks.letters()
    inputs, targets = untrained["test"]
    assert (inputs[:, 1:] == targets[:, :-1]).all()  # every letter from those before it
    with torch.no_grad():
        changed = inputs[:1].clone()
        changed[0, 20:] = 0
        model = untrained["model"]()
        assert torch.equal(model(changed)[0, :20], model(inputs[:1])[0, :20])


def test_the_fortunes_of_each_file(tmp_path):
    import encode_fortunes

    (tmp_path / "short").write_text("no\n%\n" + "a" * 50 + "\n%\n" + "a" * 50 + "\n%\n" + "b" * 700)
    (tmp_path / "long").write_text("\n%\n".join(letter * 60 for letter in "abc"))
    for name in ("short", "long"):
        (tmp_path / f"{name}.dat").touch()
    found = encode_fortunes.fortunes(tmp_path)
    assert {name: len(texts) for name, texts in found.items()} == {"long": 3, "short": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    formats.cifar10(path, each=20)
    formats.cifar100(path)
    return path


@pytest.mark.parametrize("name", [name for name, study in studies.STUDIES.items() if "tasks:" not in study.data])
def test_a_study_is_a_command(name, images):
    study = studies.STUDIES[name]
    chosen = dict(parse(f"{key}={text}") for key, text in study.spaces.items())
    others = {"search_draw", "equal", "device", "precision"}
    given = {key: value for key, value in study.given.items() if key not in others}
    small = {} if study.data == "digits" else {"data_dir": str(images), "train_size": 40, "batch_size": 16}
    asked = presets.asked(study.data, given | small, list(study.methods), study.seeds, spaces=chosen)
    fair.contestants(replace(asked, equal="epochs"), {})  # refuses what cannot be searched
    words = study.words()
    assert words[:3] == ["compare", "--data", study.data]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--method"] == list(study.methods)


def test_the_rest_of_a_study_is_a_command_too():
    for study in studies.STUDIES.values():
        rest = study.rest()
        if rest.methods:
            chosen = dict(parse(f"{key}={text}") for key, text in rest.spaces.items())
            asked = presets.asked("digits", {}, list(rest.methods), 5, spaces=chosen)
            fair.contestants(replace(asked, equal="epochs"), {})
            assert {"lr", "rho"} & set(study.spaces) <= set(rest.spaces)


def test_the_gpu_study_runs_in_slices_and_ends(tmp_path, images):
    words = replace(studies.STUDIES["cifar10-resnet18"], methods=("SAM(m={m}, sampled=1)",)).words()
    small = ["--data-dir", images, "--train-size", 40, "--batch-size", 16]
    small += ["--epochs", 1, "--model", "resnet18-w8", "--trials", 1, "--seeds", 1, "--workers", 1]
    small += ["--device", "cpu", "--precision", "fp32"]
    slices = (0.01, 0.04, 60)  # minutes
    codes = [steppe_cli(*words, *small, "--minutes", each, "--out", tmp_path / "c").exit_code for each in slices]
    assert (codes[0], codes[-1]) == (75, 0)
    assert [one.row.n for one in tables.read(tmp_path / "c").each] == [1] * 3
