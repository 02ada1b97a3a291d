"""The benchmarks measure what they say; how long anything takes is never asserted."""

import json
import math
import platform
import resource
from pathlib import Path

import pytest
import torch
from benchmarks import m_sam, memory, near_sgd, record, rivals, step_cost, table
from benchmarks.models import CASES, classify
from benchmarks.timing import Timer
from benchmarks.vmap_sam import VmapSAM
from torch import nn

import steppe
from steppe.lab.models import mlp
from tests.cases import sgd
from tests.processes import Forked

ROOT = Path(__file__).parents[1]


def small(name: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    case = CASES[name]
    torch.manual_seed(0)
    return case.model(), case.data(4)


@pytest.mark.parametrize("name", ["digits_mlp", "cnn", "vit_small"])
def test_the_vmap_baseline_is_m_sam(name: str) -> None:
    after = []
    for way in ("vmap", "serial"):
        model, data = small(name)
        base = sgd(model)
        if way == "vmap":
            VmapSAM(base, model, classify, m=2).step(data)
        else:
            steppe.SAM(base, m=2, parallel=False).step(steppe.Batch(model, classify, data))
        after.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*after, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_m_sam_is_measured(tmp_path: Path) -> None:
    args = m_sam.arguments(["--ms", "2", "8", "--rounds", "2", "--time-limit", "5", "--batch-size", "8"])
    rows = m_sam.measure("digits_mlp", CASES["digits_mlp"], args)
    run = [row for row in rows if row["ratio"] is not None]
    assert {(row["way"], row["m"]) for row in run} >= {("sam", None), ("vmap", 2), ("serial", 8), ("parallel", 2)}
    for row in run:
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ms", "ratio", "low", "high", "peak_ratio"))
        assert row["low"] <= row["ratio"] <= row["high"]
    assert all(row["reason"] for row in rows if row["ratio"] is None)
    record.write(tmp_path / "a.json", "m_sam", torch.device("cpu"), {"rounds": 2}, rows)
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    assert "| digits_mlp | steppe, two passes |" in table.tables(tmp_path)


def test_steps_near_sgd_are_measured(tmp_path: Path) -> None:
    args = near_sgd.arguments(["--ms", "2", "--rounds", "1", "--time-limit", "1", "--batch-size", "4"])
    rows = [row for name in near_sgd.MODELS for row in near_sgd.measure(name, near_sgd.MODELS[name], args)]
    passes = {(row["model"], row["way"]): row["passes"] for row in rows}
    assert passes["mlp", "sampled"] == passes["cnn", "sampled"] == passes["gpt_small_lora", "sampled"] == 1.5
    assert passes["resnet18_w16_bn", "sampled"] == 2  # batch norm mixes examples
    assert {passes[name, "ascent"] for name in near_sgd.MODELS} == {1.5}
    record.write(tmp_path / "a.json", "near_sgd", torch.device("cpu"), {"rounds": 1}, rows)
    assert "| mlp | `ascent=m` |" in table.tables(tmp_path)


def touch_memory(keep: bool) -> None:
    torch.set_num_threads(1)
    if keep:
        record.steady_memory()

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(12):  # the heap takes a few to settle
        torch.ones(2**24)
    before = faults()
    for _ in range(8):
        torch.ones(2**24)
    print(record.KEPT, faults() - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_is_kept_where_it_is_asked_for() -> None:
    found = {}
    for keep in (True, False):
        output, _ = Forked(touch_memory, keep).end()
        kept, faults = output.split()
        assert kept == str(keep)
        found[keep] = int(faults)
    assert found[True] * 8 < found[False]  # 64 MiB eight times, page by page


def test_a_way_predicted_too_slow_is_left_out() -> None:
    args = m_sam.arguments(["--time-limit", "1"])
    bench = m_sam.Bench.of(CASES["digits_mlp"], torch.device("cpu"), batch_size=8)
    assert m_sam.refusal(bench, "serial", 1, 0.5, args) == "predicted 0.5 s a step"
    assert not m_sam.refusal(bench, "serial", 1, 0.1, args)
    assert "GiB" in m_sam.refusal(bench, "vmap", 1, 0.0, m_sam.arguments(["--memory-limit", "0.001"]))


def test_step_cost_counts_the_methods_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "SAMPLE", 0.0)
    rows = step_cost.measure(mlp([20, 30, 10]), rounds=1)
    by = {(row["method"], row["by"]): row for row in rows}
    assert {name for name, who in by if who == "steppe"} | {"FunctionalSAM"} == {m.__name__ for m in steppe.METHODS}
    assert by["SAM", "steppe"]["passes"] == 2
    assert by["LookSAM", "steppe"]["passes"] == pytest.approx(1.1)
    assert all(math.isfinite(row["ms"]) and row["copies"] >= 1 for row in rows)
    if rivals.NAME:
        assert {name for name, who in by if who == rivals.NAME} == set(rivals.RIVALS)


def test_peak_memory_counts_what_is_alive() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        kept.append(torch.zeros(1000))  # stays
        for _ in range(3):
            torch.zeros(500) + 1  # two at a time

    assert memory.peak(step, torch.device("cpu")) == 4 * (1000 + 2 * 500)


def test_a_timer_warms_up_and_keeps_to_its_limit() -> None:
    calls: list[int] = []
    timer = Timer(lambda: calls.append(1), torch.device("cpu"))
    timer.prepare(rounds=5, limit=1e-9)
    assert (timer.rounds, len(calls)) == (1, 2)


def test_the_page_says_in_short_what_the_record_holds() -> None:
    rows = record.read(table.RECORDS / "m_sam_cpu.json")["rows"]
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    said = {
        "parallel": "takes {} times SAM's step",
        "rw_exact": "takes {} with exact",
        "rw_difference": "{} with one finite",
    }
    for way, sentence in said.items():
        ratios = [row["ratio"] for row in rows if row["way"] == way and row["ratio"]]
        assert sentence.format(f"{min(ratios):.2f} to {max(ratios):.2f}") in text


def test_changing_lengths_cost_what_the_page_says() -> None:
    timed = {row["way"]: row for row in record.read(table.RECORDS / "shapes_cpu.json")["rows"] if "seconds" in row}
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    shared, loop = timed["m-SAM, m=4"], timed["m-SAM, m=4, parallel=False"]["ratio_of_a_step"]
    assert f"takes {timed['SAM']['ratio']:.2f} times its time with `parallel=False`" in text
    assert f"shares passes in {shared['steps_of_two_forwards']} of the 60 steps" in text
    assert f"a step takes {shared['ratio_of_a_step']:.2f} of SAM's in the median, and {loop:.2f} in the loop" in text
    assert f"the 60 steps take {shared['ratio']:.2f}" in text


def test_the_tables_of_the_committed_records() -> None:
    text = f"before\n{table.BEGIN}old\n{table.END}after\n"
    written = table.with_table(text)
    assert written.startswith(f"before\n{table.BEGIN}")
    assert written.endswith(f"{table.END}after\n")
    assert "old" not in written
    assert table.with_table(written) == written
    for path in table.RECORDS.glob("*.json"):
        data = record.read(path)
        for row in data["rows"]:
            named = row.get("model", row.get("shapes"))  # other records are cited where they belong
            assert data["benchmark"] not in ("m_sam", "step_cost") or named in written
