"""`steppe sde` from end to end."""

import json

import pytest
from typer.testing import CliRunner

from steppe.lab.commands.group import app
from steppe.sde.study import Case, ErrorStudy, curves

TINY = ("--rule", "SGD", "--rule", "m-SAM", "--paths", 64, "--lr", 0.5, "--lr", 0.25, "--rho", 0.2, "--rho", 0.1)


def command(*arguments):
    return CliRunner().invoke(app, ["sde", *map(str, arguments)], terminal_width=200)


def test_it_prints_draws_and_continues(tmp_path):
    first = command(*TINY, "--out", tmp_path)
    assert first.exit_code == 0, first.output
    assert "11 weak errors to measure, 0 known" in first.output
    for title in ("against lr, in", "against lr, corrected, in", "against rho, beyond that at rho 0"):
        assert f"Weak error {title}" in first.output
    assert (tmp_path / "orders.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "errors.json").read_text())["errors"]
    assert len(kept) == 11
    again = command(*TINY, "--out", tmp_path)
    assert "0 weak errors to measure, 11 known" in again.output
    assert again.output.split("known")[1] == first.output.split("known")[1]
    assert "other settings" in command(*TINY, "--seed", 1, "--out", tmp_path).output


def test_an_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    real, calls = ErrorStudy.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(ErrorStudy, "measure", interrupted)
    result = command(*TINY, "--out", tmp_path)
    assert result.exit_code == 130
    assert "What is finished is kept" in result.output
    assert "Weak error against lr, in" in result.output
    monkeypatch.undo()
    assert "9 weak errors to measure, 2 known" in command(*TINY, "--out", tmp_path).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "ASAM"), "unknown rule 'ASAM'; choose from SGD, n-USAM"),
        (("--problem", "cubic"), "unknown problem 'cubic'; choose from logistic, quadratic"),
        (("--rule", "SGD", "--lr", 0.3), "time must be a positive multiple of lr, got 1 and 0.3"),
        (("--rule", "SAM", "--rho", -1.0), "rho must be a finite number >= 0"),
        (("--rule", "m-SAM", "--m", 2, "--size", 3), "size must be a multiple of m"),
        (("--rule", "SGD", "--size", 9), "batches of 9 out of 6"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, message, tmp_path):
    result = command(*arguments, "--paths", 32, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "errors.json").write_text('{"settings"')
    assert "errors.json is damaged" in command(*TINY, "--out", tmp_path).output


def test_curves_against_rho_are_differences_from_rho_0():
    study = ErrorStudy()
    cases = study.cases(["SAM"], [0.05], [0.2])
    assert cases == [
        Case("lr", "SAM", 0.05, study.small_rho),
        Case("lr, corrected", "SAM", 0.05, study.small_rho),
        Case("rho", "SAM", 0.05, 0.0),
        Case("rho", "SAM", 0.05, 0.2),
    ]
    errors = {case.key: {"f": [case.rho, case.rho + 2]} for case in cases}
    by_kind = {curve.against: curve for curve in curves(errors, cases)}
    assert by_kind["rho"].at == [0.2]
    assert by_kind["rho"].errors[0].mean == pytest.approx(0.2)
    assert by_kind["rho"].errors[0].error == pytest.approx(0.0)
    assert by_kind["lr"].errors[0].mean == pytest.approx(1 + study.small_rho)
