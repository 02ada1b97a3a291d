"""The documents say what the records hold, and the recipe and the benchmark measure what they say."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from benchmarks.models import resnet18
from benchmarks.top_eigenvalue import estimates

from steppe.measure import Hessian, Problem, eigenpairs

from .models import CRITERION

ROOT = Path(__file__).parents[2]


def test_the_table_of_minima_is_that_of_the_record():
    recipe = runpy.run_path(str(ROOT / "examples" / "loss_and_curvature_at_minima.py"))
    record = json.loads((ROOT / "docs" / "records" / "minima.json").read_text())
    assert recipe["table"](record) in (ROOT / "docs" / "measure.md").read_text()
    assert len(record["rows"]) == 50
    assert all(row["converged"] for row in record["rows"])


def test_the_timing_in_the_document_is_that_of_the_record():
    record = json.loads((ROOT / "benchmarks" / "records" / "top_eigenvalue_cpu.json").read_text())
    text = (ROOT / "docs" / "measure.md").read_text()
    for row in record["rows"]:
        cells = [row["phase"], row["products"], f"{row['value']:.3f}", f"{100 * row['off_by']:.2f} %"]
        assert "| " + " | ".join(map(str, cells)) + " |" in text
    assert record["settings"]["parameters"] > 11e6


def test_the_benchmark_finds_the_top_eigenvalue():
    torch.manual_seed(0)
    model, xy = resnet18(8), (torch.randn(6, 3, 8, 8), torch.arange(6))
    rows = estimates(model, xy, part=3, products=8)
    exact = eigenpairs(Hessian(Problem(model, CRITERION, xy)), tol=1e-4).value
    assert rows[-1]["value"] == pytest.approx(exact, rel=1e-3)
    assert [row["phase"] for row in rows[:2]] == ["3 images", "6 images"]
