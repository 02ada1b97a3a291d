"""Functions of a user, and the mistakes they may hold."""

import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from steppe.lab.commands.group import app
from steppe.toy import SGDM, Landscape, ToyError, methods, place, stationary_points, trajectory

WINDOW = {"start": (1.0, 0.5), "lr": 0.05, "rho": 0.1, "steps": 100, "x": (-2.0, 2.0), "y": (-2.0, 2.0)}


def double_well(p):
    return (p[0] ** 2 - 1) ** 2 + p[1] ** 2


def test_stationary_points_of_a_double_well():
    points = stationary_points(Landscape(double_well, **WINDOW))
    assert sorted((s.kind, round(s.point[0], 6) + 0.0, round(s.point[1], 6) + 0.0) for s in points) == [
        ("minimum", -1.0, 0.0),
        ("minimum", 1.0, 0.0),
        ("saddle", 0.0, 0.0),
    ]
    saddle = points[-1]
    assert saddle.eigenvalues == pytest.approx((-4.0, 2.0))
    assert saddle.loss == pytest.approx(1.0)


@pytest.mark.parametrize(("sign", "kind"), [(1, "minimum"), (-1, "maximum")])
def test_one_extremum_keeps_its_plain_name(sign, kind):
    (only,) = stationary_points(Landscape(lambda p: sign * (p @ p), **WINDOW))
    assert (only.name, only.kind) == (kind, kind)
    assert only.eigenvalues == pytest.approx((2.0 * sign, 2.0 * sign))


def test_a_line_of_minima_is_degenerate():
    points = stationary_points(Landscape(lambda p: p[0] ** 2, **WINDOW))
    assert {s.kind for s in points} == {"degenerate point"}


@pytest.mark.parametrize(("end", "expected"), [((0.95, 0.0), "minimum"), ((0.3, 1.0), "basin of the minimum")])
def test_a_place_is_a_point_within_rho_or_the_basin_of_the_flow(end, expected):
    landscape = Landscape(double_well, **WINDOW)
    points = stationary_points(landscape)
    (right,) = (s.name for s in points if s.point == pytest.approx((1.0, 0.0), abs=1e-6))
    found = place(landscape, torch.tensor(end, dtype=torch.float64), points)
    assert found == expected.replace("minimum", right)


def test_downhill_without_a_minimum_is_told():
    landscape = Landscape(lambda p: p[0] + p[1] ** 2, **WINDOW)
    end = torch.tensor([0.0, 0.0], dtype=torch.float64)
    assert place(landscape, end, stationary_points(landscape)) == "no minimum in the window"


def test_a_trajectory_is_the_textbooks():
    landscape = Landscape(lambda p: 0.5 * (p @ p), **WINDOW | {"steps": 3})
    w, v, path = torch.tensor([1.0, 0.5], dtype=torch.float64), 0.0, []
    for _ in range(4):
        path.append(w)
        v = 0.9 * v + w
        w = w - 0.05 * v
    torch.testing.assert_close(trajectory(landscape, SGDM), torch.stack(path))


def test_a_trajectory_that_diverges_names_method_and_step():
    landscape = Landscape(lambda p: (p @ p) ** 2, **WINDOW | {"lr": 5.0})
    with pytest.raises(ToyError, match=r"^SAM diverges: step 2 leads from \(-31.33, -15.66\)"):
        trajectory(landscape, methods()["SAM"], "SAM")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p: p, r"must return a tensor of shape \(\), got shape \(2,\)"),
        (lambda p: 1.0, r"must return a tensor of shape \(\), got 1.0"),
        (lambda p: torch.log(p[0] - 2), r"the function is nan at start \(1.0, 0.5\)"),
        (lambda p: torch.tensor(p.sum().item()), "does not depend on its argument"),
        (lambda p: p[2], "failed at start .*IndexError"),
        (lambda p: torch.sqrt((p[0] - 1).abs()) + p[1], "gradient is not finite"),
    ],
)
def test_a_bad_function_is_refused(function, message):
    with pytest.raises(ToyError, match=message):
        Landscape(function, **WINDOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"rho": float("nan")}, "rho must be"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"x": (1.0, -1.0)}, "x must be two finite numbers, the smaller one first"),
        ({"start": (0.0, float("inf"))}, "start must be two finite numbers"),
    ],
)
def test_a_bad_number_is_named(change, message):
    with pytest.raises(ToyError, match=re.escape(message)):
        replace(Landscape(double_well, **WINDOW), **change)


def command(*arguments):
    return CliRunner().invoke(app, ["toy", *map(str, arguments)], terminal_width=200)


def test_the_command_prints_the_table_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("steppe.lab.commands.toy.SWEPT", (0.5, 0.95))
    result = command("--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trajectories.png", "update.png"]
    rows = [line.split() for line in result.output.splitlines()]
    assert ["coupled", "WSAM", "0.95", "19.82,", "29.77", "0.3565", "0.00033,", "0.00069", "flat", "minimum"] in rows
    assert "- coupled WSAM: sharp minimum for 0.5; flat minimum for 0.95" in result.output
    assert "- decoupled WSAM: sharp minimum for 0.5 to 0.95" in result.output


def test_the_command_runs_on_a_users_function(tmp_path):
    options = ("--function", "tests.toy.test_landscape:double_well", "--no-sweep", "--out", tmp_path)
    result = command(*options, "--start", 0.4, 0.5, "--lr", 0.2, "--rho", 0.5, "--gamma", 0.999)
    assert "left out: coupled WSAM 0.999 diverges" in result.output
    assert "SGDM" in result.output.split("After 150 steps")[1]
    assert result.exit_code == 0
    assert (tmp_path / "trajectories.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--function", "absent"), "error: the function must be named as module:function, got 'absent'"),
        (("--function", "no.such.module:f"), "module 'no.such.module' cannot be imported: ModuleNotFoundError"),
        (("--function", "tests.toy.test_landscape:absent"), "module 'tests.toy.test_landscape' has no function"),
        (("--function", "tests.toy.test_landscape:WINDOW"), "module 'tests.toy.test_landscape' has no function"),
        (("--gamma", 1.0), "error: gamma must be a number in [0, 1), got 1"),
        (("--rho", -1.0), "error: rho must be a finite number > 0"),
        (("--function", "tests.toy.test_landscape:double_well", "--lr", 50.0), "no method stays finite"),
    ],
)
def test_the_command_tells_mistakes_without_a_traceback(arguments, message, tmp_path):
    result = command(*arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
