"""WSAM's Figure 2: constants and trajectories that were confirmed against the published picture."""

import pytest
import torch

from steppe.toy import FIGURE_2, methods, place, stationary_points, trajectory

STEPS = (1, 10, 40)
PATHS = {
    "SGDM": [(-6.077316, 10.105666), (-9.080843, 13.399699), (-17.70174, 12.136494)],
    "SAM": [(-6.078497, 10.159706), (-9.125262, 14.76514), (-17.575551, 12.675972)],
    "coupled WSAM 0.6": [(-6.079087, 10.186726), (-9.137272, 15.36939), (-17.585601, 13.070989)],
    "coupled WSAM 0.95": [(-6.099755, 11.132429), (-5.094556, 27.370962), (15.122264, 28.933867)],
    "decoupled WSAM 0.6": [(-6.079087, 10.186726), (-9.100327, 13.772099), (-17.526813, 12.411032)],
    "decoupled WSAM 0.95": [(-6.099755, 11.132429), (-8.853661, 16.06955), (-16.746422, 12.510114)],
}


@pytest.fixture(scope="module")
def points():
    return stationary_points(FIGURE_2)


def test_minima_and_saddle_are_the_published_ones(points):
    found = [(s.name, *s.point, s.loss, *s.eigenvalues) for s in points]
    expected = [
        ("sharp minimum", -16.804744, 12.802544, 0.275230, 0.002377, 0.004869),
        ("flat minimum", 19.810064, 29.936621, 0.356447, 0.000326, 0.000681),
        ("saddle", 0.310336, 22.499038, 0.397668, -0.000832, 0.001060),
    ]
    assert [row[0] for row in found] == [row[0] for row in expected]
    for row, numbers in zip(found, expected, strict=True):
        assert row[1:] == pytest.approx(numbers[1:], abs=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_the_first_40_steps_and_the_basin(name, points):
    path = trajectory(FIGURE_2, methods()[name])
    for step, expected in zip(STEPS, PATHS[name], strict=True):
        torch.testing.assert_close(path[step], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert len(path) == 151
    basin = "flat minimum" if name == "coupled WSAM 0.95" else "sharp minimum"
    assert place(FIGURE_2, path[-1], points) == basin


@pytest.mark.parametrize(
    ("form", "gamma", "where"),
    [
        ("coupled", 0.82, "sharp minimum"),
        ("coupled", 0.83, "saddle"),
        ("coupled", 0.93, "saddle"),
        ("coupled", 0.94, "flat minimum"),
        ("decoupled", 0.97, "sharp minimum"),
        ("decoupled", 0.99, "saddle"),
    ],
)
def test_where_the_basin_changes_with_gamma(form, gamma, where, points):
    name = f"{form} WSAM {gamma:g}"
    assert place(FIGURE_2, trajectory(FIGURE_2, methods([gamma])[name])[-1], points) == where
