"""What the command line shows: completion, narrow terminals, other encodings, no colours."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from steppe.lab import data, fair, hardware, models, spec
from steppe.lab.commands import COMMANDS, group, names
from steppe.lab.recipes import RECIPES, SCALES
from steppe.lab.terminal import table

from .helpers import steppe_cli, trained


def test_the_names_that_shells_complete_are_those_of_the_laboratory():
    assert set(names.METHODS) == set(spec.choices())
    assert set(names.DATA) == {"digits", *data.SOURCES}
    assert (*names.MODELS, "module:function") == tuple(models.GRAMMAR)
    assert tuple(RECIPES) == names.RECIPES
    assert (names.SCALES, names.EQUAL, names.DEVICES) == (SCALES, fair.EQUAL, hardware.DEVICES)
    assert (names.STRATEGIES, names.PRECISIONS) == (hardware.STRATEGIES, hardware.PRECISIONS)


COMPLETED = {
    "steppe ": list(COMMANDS),
    "steppe rep": ["report", "reproduce"],
    "steppe run Look": ["LookSAM", "LookbehindSAM"],
    "steppe run SAM --data ": [*names.DATA],
    "steppe run SAM --model r": ["resnet18"],
    "steppe run SAM --optimizer ": ["sgd", "adamw"],
    "steppe compare --method W": ["WSAM"],
    "steppe compare --method SAM --method RW": ["RWSAM"],
    "steppe compare --equal ": ["passes", "seconds", "epochs"],
    "steppe compare --data fash": ["fashion-mnist"],
    "steppe compare --clean": ["--clean-validation"],
    "steppe recipes wsam": ["wsam_classification", "wsam_finetune"],
    "steppe reproduce cost --scale ": ["paper", "laptop"],
}


def completion(line):
    """Return what a shell asks by for the end of a line."""
    words = line.split(" ")
    return {"_STEPPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}


@pytest.mark.parametrize("line", COMPLETED)
def test_shells_complete_names(line):
    result = steppe_cli(env=completion(line))
    assert sorted(result.output.split()) == sorted(COMPLETED[line])


def test_help_version_and_completion_import_no_torch():
    code = """
import os, sys
from steppe.cli import main
for words, given in ((["--help"], {}), (["compare", "--help"], {}), (["--version"], {}), ([], %r), (["compar"], {})):
    os.environ.update(given)
    sys.argv = ["steppe", *words]
    try:
        main()
    except SystemExit:
        pass
    [os.environ.pop(name) for name in given]
print([name for name in ("torch", "numpy", "optuna") if name in sys.modules])
"""
    code %= completion("steppe compare --method S")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SSAM" in done.stdout
    assert done.stdout.endswith("\n[]\n")


HEADERS = ["method", "n", "error %", "sd", "diff.", "95 % CI", "p (Holm)", "passes", "s"]
ROWS = [["SAM(rho=0.2, m=16)", "10", "6.89", "0.31", "\N{MINUS SIGN}0.40", "\N{MINUS SIGN}0.71 to +0.02", "0.031"]]
ROWS[0] += ["120", "1234.5"]


@pytest.mark.parametrize("width", [20, 40, 55, 70, 80, 200])
def test_no_number_is_cut_however_narrow_the_terminal(width):
    out = io.StringIO()
    table(Console(file=out, width=width), HEADERS, ROWS, "digits", "What the columns are.")
    told = out.getvalue()
    assert max(map(len, told.splitlines())) <= width
    for word in [*HEADERS[1:], *ROWS[0]]:
        assert " ".join(word.split()) in " ".join(told.split())
    if width >= 80:
        assert any("error %" in line and "passes" in line for line in told.splitlines())


@pytest.mark.parametrize("width", ["40", "60"])
def test_a_report_in_a_narrow_terminal_has_every_number(tmp_path, monkeypatch, width):
    trained(tmp_path, "SGD", "SAM(rho=0.1)")
    monkeypatch.setenv("COLUMNS", width)
    wide = json.loads(steppe_cli("report", tmp_path, "--json").stdout)
    told = " ".join(steppe_cli("report", tmp_path).stdout.split())
    for row in wide["methods"]:
        assert f"error % {row['error']:.2f}" in told
        assert f"passes {row['passes']:.0f}" in told
    for words in (["recipes"], ["doctor"], ["compare", "--help"]):
        lines = steppe_cli(*words).stdout.splitlines()
        assert not any("…" in line for line in lines), lines
    assert all(name in steppe_cli("recipes").stdout for name in RECIPES)


def test_other_encodings_get_hyphens_and_question_marks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252")
    group._tolerate(stream)
    stream.write("\N{MINUS SIGN}0.40 \N{EN DASH} \N{GREEK SMALL LETTER RHO}")
    stream.flush()
    assert raw.getvalue().decode("cp1252") == "-0.40 \N{EN DASH} ?"


def test_a_report_in_cp1252(tmp_path):
    trained(tmp_path, "SGD", "SAM(rho=0.1)")
    for words in (["report", str(tmp_path)], ["--help"], ["compar"]):
        done = steppe_cli(*words, env={"COLUMNS": "100"}, charset="cp1252")
        assert done.exit_code == (2 if words == ["compar"] else 0), done.output
        assert "Difference: method minus SGD" in done.stdout or words[0] != "report"


def test_no_color(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in steppe_cli("compar").stderr
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[\d*m", steppe_cli("compar").stderr)
