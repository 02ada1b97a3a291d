"""The jobs for a GPU run, are left out when the time is short, and go on; what they find is the GPU's business."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.gpu import checks, speed
from benchmarks.gpu.jobs import Job, Setting, UnfinishedError, run_all

CPU = Setting(torch.device("cpu"), tiny=True)


def test_jobs_go_on_where_the_last_call_stopped(tmp_path: Path) -> None:
    ran: list[str] = []

    def job(name: str) -> Job:
        return Job(f"part/{name}", 60, lambda setting: ran.append(name) or {"right": True})  # type: ignore[func-returns-value]

    late = Setting(torch.device("cpu"), out=tmp_path, until=time.monotonic() + 30)
    free = replace(CPU, out=tmp_path)
    assert run_all([job("a"), job("b")], late) == 2  # each would take a minute
    assert ran == []
    assert run_all([job("a")], free) == 0
    assert run_all([job("a"), job("b")], free) == 0
    assert ran == ["a", "b"]
    assert json.loads((tmp_path / "part" / "b.json").read_text())["machine"]["torch"] == torch.__version__


def test_a_job_may_keep_what_it_did_and_go_on(tmp_path: Path) -> None:
    ran: list[int] = []

    def slow(setting: Setting) -> dict:
        ran.append(1)
        if len(ran) < 3:
            raise UnfinishedError
        return {}

    here = replace(CPU, out=tmp_path)
    assert [run_all([Job("slow", 1, slow)], here) for _ in range(4)] == [1, 1, 0, 0]
    assert len(ran) == 3


def test_an_error_is_written_down_and_the_others_run(tmp_path: Path) -> None:
    def fails(setting: Setting) -> dict:
        raise ValueError("too large")

    assert run_all([Job("bad", 1, fails), Job("good", 1, lambda setting: {})], replace(CPU, out=tmp_path)) == 0
    assert "too large" in json.loads((tmp_path / "bad.json").read_text())["error"]
    assert "error" not in json.loads((tmp_path / "good.json").read_text())


def test_checks_are_right_between_equal_devices_and_find_a_difference() -> None:
    jobs = {job.name: job for job in checks.JOBS}
    for name in ("agree-WSAM", "replay", "bf16"):
        assert jobs[f"checks/{name}"].run(CPU)["right"], name
    broken = checks.agreement(lambda base, **options: checks.steppe.SAM(base, rho=0.05 + 0.5 * next(turns), **options))
    turns = iter(range(100))
    assert not broken(CPU)["right"]


def test_step_times_are_ratios_to_the_base_in_one_run() -> None:
    found = {job.name: job for job in speed.JOBS}["speed/llama-1b-lora"].run(CPU)
    rows = {row["way"]: row for row in found["rows"]}
    assert {"base", "SAM, closure", "SAM", "sampled, m=1", "m-SAM, m=1", "m-SAM serially, m=1"} <= rows.keys()
    assert all(row["ratio"] > 0 and row["peak_mib"] >= 0 for row in rows.values())
