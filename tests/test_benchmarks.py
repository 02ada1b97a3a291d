"""The benchmarks measure what they say; how long anything takes is never asserted."""

import json
import math
import mmap
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import cost_rule, floor, m_sam, memory, rates, record, rivals, step_cost, table
from benchmarks.calls import Call, Calls
from benchmarks.flops import flops
from benchmarks.models import CASES, classify, mlp
from benchmarks.timing import Timer
from benchmarks.vmap_sam import VmapSAM
from torch import nn

import steppe
from steppe.factored import plan

CPU = torch.device("cpu")
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
        base = torch.optim.SGD(model.parameters(), lr=0.1)
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


KEEPING = """
import resource, sys, torch
from benchmarks import record
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    record.steady_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.ones(2**24)
before = faults()
for _ in range(8):
    torch.ones(2**24)
print(record.KEPT, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_is_kept_where_it_is_asked_for() -> None:
    found = {}
    for how in ("keep", "leave"):
        ran = subprocess.run([sys.executable, "-c", KEEPING, how], capture_output=True, text=True, check=True, cwd=ROOT)
        kept, faults = ran.stdout.split()
        assert kept == str(how == "keep")
        found[how] = int(faults)
    assert found["keep"] * 8 < found["leave"]  # 64 MiB eight times, page by page


def test_a_way_predicted_too_slow_is_left_out() -> None:
    args = m_sam.arguments(["--time-limit", "1"])
    bench = m_sam.Bench.of(CASES["digits_mlp"], torch.device("cpu"), batch_size=8)
    assert m_sam.refusal(bench, "serial", 1, 0.5, args) == "predicted 0.5 s a step"
    assert not m_sam.refusal(bench, "serial", 1, 0.1, args)
    assert "GiB" in m_sam.refusal(bench, "vmap", 1, 0.0, m_sam.arguments(["--memory-limit", "0.001"]))


def test_step_cost_counts_the_methods_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "SAMPLE", 0.0)
    rows = step_cost.measure(mlp(20, 30, 10), rounds=1)
    by = {(row["method"], row["by"]): row for row in rows}
    assert {name for name, who in by if who == "steppe"} == {method.__name__ for method in steppe.METHODS}
    assert by["SAM", "steppe"]["passes"] == 2
    assert by["LookSAM", "steppe"]["passes"] == pytest.approx(1.1)
    assert all(math.isfinite(row["ms"]) and row["copies"] >= 1 for row in rows)
    if rivals.NAME:
        assert {name for name, who in by if who == rivals.NAME} == set(rivals.RIVALS)


@pytest.mark.parametrize("rows", [4, 64])
def test_both_ways_of_the_cost_rule_do_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_rule, "TOTAL", 128)
    torch.manual_seed(0)
    both = cost_rule.ways(6, 9, rows, torch.device("cpu"))
    torch.testing.assert_close(both["held"](), both["factored"]())
    row = cost_rule.measure(6, 9, rows, torch.device("cpu"), rounds=1)
    assert row["regret"] >= 0
    assert row["chosen"] in both


def test_peak_memory_counts_what_is_alive() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        kept.append(torch.zeros(1000))  # stays
        for _ in range(3):
            torch.zeros(500) + 1  # two at a time

    assert memory.peak(step, torch.device("cpu")) == 4 * (1000 + 2 * 500)


def test_counted_work_of_grouped_convolutions() -> None:
    def step(groups: int):
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        return lambda: conv(x).sum().backward()

    forward = 2 * 2 * 8 * 8 * 9 * 25  # 2 n C_out C_in kernel positions
    assert flops(step(1)) == 3 * forward
    assert flops(step(4)) == 3 * forward // 4


def test_counted_work_of_attention() -> None:
    n, heads, length, d = 2, 3, 16, 8
    q, k, v = (torch.randn(n, heads, length, d, requires_grad=True) for _ in range(3))
    fused = lambda: nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
    forward = 2 * 2 * n * heads * length**2 * d  # the scores, and the values weighted by them
    assert flops(lambda: (q @ k.mT).softmax(-1) @ v) == forward
    assert flops(fused) == forward
    assert flops(lambda: fused().sum().backward()) == forward + 5 * forward // 2  # the scores are computed again


def calls_of(step: Callable[[], object]) -> list[Call]:
    with Calls(CPU) as calls:
        step()
    return calls.made


def test_bytes_that_calls_move() -> None:
    a, b, row, few = torch.ones(8, 8), torch.ones(8, 8), torch.ones(8), [torch.ones(5), torch.ones(3)]
    size = 4 * 64

    def bytes_of(step: Callable[[], object]) -> list[int]:
        return [call.bytes for call in calls_of(step)]

    assert bytes_of(lambda: a + b) == [3 * size]
    assert bytes_of(lambda: a.add_(b)) == [3 * size]
    assert bytes_of(lambda: a.copy_(b)) == [2 * size]
    assert bytes_of(lambda: a.zero_()) == [size]
    assert bytes_of(lambda: torch.add(a, b, out=a)) == [3 * size]  # a is read as the first argument
    assert bytes_of(lambda: a + row) == [2 * size + 4 * 8]
    assert bytes_of(lambda: a + row.expand(8, 8)) == [0, 2 * size + 4 * 8]
    assert bytes_of(lambda: (a.t(), a[0], a.view(64), torch.empty(9))) == [0] * 4
    assert bytes_of(lambda: a.sum()) == [size + 4]
    assert bytes_of(lambda: torch._foreach_mul_(few, 2.0)) == [2 * 4 * 8]
    assert bytes_of(lambda: a @ b) == [3 * size]


@pytest.mark.parametrize("name", ["cnn", "vit_small"])
def test_calls_add_up_to_the_counted_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Entry, "due", lambda self: False)
    step = m_sam.Bench.of(CASES[name], CPU, batch_size=4).step("parallel", 2)
    step()  # the rehearsal
    made = calls_of(step)
    assert sum(call.flops for call in made) == flops(step) > 0
    assert {call.kind for call in made} == {"matrix", "convolution", "other"}
    assert not any(call.flops for call in made if not call.product)
    assert all(call.seconds > 0 for call in made)


def test_the_floor_of_a_call_is_the_slower_of_work_and_traffic() -> None:
    attained = rates.Rates({"matrix": 100.0, "convolution": 200.0}, {10: 50.0, 1000: 5.0}, call=0.0, fault=0.0)
    assert attained.floor(Call("matrix", 300, 10, ())) == 3
    assert attained.floor(Call("convolution", 300, 10, ())) == 1.5
    assert attained.floor(Call("matrix", 300, 100, ())) == 20  # beyond the first cache
    assert attained.floor(Call("other", 0, 5000, ())) == 1000


def test_where_the_time_goes_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Entry, "due", lambda self: False)
    monkeypatch.setattr(rates, "COPIES", [2**16, 2**20])
    monkeypatch.setattr(rates, "SIZES", {"cpu": (64,)})
    monkeypatch.setattr(rates, "CHANNELS", ((8, 8),))
    args = floor.arguments(["--ms", "2", "3", "--rounds", "2", "--batch-size", "8"])
    attained, rows = floor.measure("digits_mlp", args)
    assert [(row["way"], row["m"]) for row in rows] == [
        *(("sam", None), ("parallel", 2), ("parallel", 8), ("rw_exact", None))
    ]
    bench = m_sam.Bench.of(CASES["digits_mlp"], CPU, batch_size=8)
    for row in rows:
        step = bench.step(row["way"], row["m"])
        step()
        assert row["flops"] == flops(step)
        keys = ("ms", *(f"{kind}_{of}" for kind in ("product", "other") for of in ("ms", "floor_ms", "bytes", "calls")))
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in keys)
        assert sum(table.extra(row, rows[0])[:-1]) == pytest.approx(row["ms"] / rows[0]["ms"] - 1)
    settings = {"rounds": 2, "rates": {"digits_mlp": attained.as_record()}}
    record.write(tmp_path / "a.json", "floor", CPU, settings, rows)
    assert "| digits_mlp | m-SAM, m = 2 |" in table.tables(tmp_path)


def test_fresh_memory_faults_once_a_page() -> None:
    before = rates.faults()
    fresh = mmap.mmap(-1, 64 * mmap.PAGESIZE)
    fresh.write(bytes(64 * mmap.PAGESIZE))
    assert rates.faults() - before >= 64
    assert rates.page_fault() >= 0


def test_a_timer_warms_up_and_keeps_to_its_limit() -> None:
    calls: list[int] = []
    timer = Timer(lambda: calls.append(1), torch.device("cpu"))
    timer.prepare(rounds=5, limit=1e-9)
    assert (timer.rounds, len(calls)) == (1, 2)


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
            assert data["benchmark"] not in ("m_sam", "floor", "step_cost") or named in written
