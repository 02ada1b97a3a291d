"""The summary in other formats says what the table says."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from steppe.lab import tables
from steppe.lab.statistics import paired
from steppe.lab.summary import pairs, summarise

from .test_report import folder, found  # noqa: F401 - fixtures


def test_csv_has_every_number(found):  # noqa: F811
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(found))))
    assert [row["method"] for row in rows] == [str(row.method) for row in found.rows]
    assert float(rows[2]["difference"]) == found.rows[2].paired.difference
    assert float(rows[2]["p_holm"]) == found.rows[2].p
    assert rows[0]["difference"] == rows[0]["paper"] == ""


def test_pairs_are_all_of_them_corrected_together(found):  # noqa: F811
    every = pairs(found)
    assert len(every) == 10
    by = {(str(pair.method), str(pair.other)): pair for pair in every}
    pair = by["SAM(rho=0.1)", "SAM(rho=0.1, m=16)"]
    errors = [[100 * r.test_error for r in found.of(method)] for method in (pair.method, pair.other)]
    assert pair.paired == paired(*errors)
    smallest = min((each for each in every if not math.isnan(each.p)), key=lambda each: each.paired.p)
    tested = sum(not math.isnan(each.p) for each in every)
    assert smallest.p == pytest.approx(min(1.0, tested * smallest.paired.p))


def test_plain_data_is_json_and_whole(found):  # noqa: F811
    data = json.loads(json.dumps(tables.plain(found), allow_nan=False))
    assert [row["errors"]["2"] for row in data["methods"]] == [
        100 * found.of(row.method)[2].test_error for row in found.rows
    ]
    assert data["baseline"] == "SGD"


def test_a_metric_of_ones_own_is_named_and_is_no_share(found):  # noqa: F811
    records = {run: replace(record, metric="absolute error") for run, record in found.records.items()}
    text = tables.markdown(summarise(found.plan, records, []))
    assert "| absolute error |" in text
    assert "Test absolute error at the last epoch" in text
    assert "error %" not in text
    assert "per cent" not in text
    small = tables.interval(paired([0.011, 0.013, 0.012], [0.01, 0.01, 0.01]))
    assert small == "\N{MINUS SIGN}0.000484 to +0.00448"
