"""Mistakes at the command line: one line that names what is wrong and what to write, and nothing left behind."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from steppe.lab import files

from .helpers import steppe_cli, trained, write_images

TINY = ["--epochs", 2, "--train-size", 256, "--batch-size", 64, "--model", "mlp-16"]
FIXED = ["compare", "--fixed", *TINY, "--seeds", 1, "--workers", 1, "--method", "SGD"]
TASKS = """
import torch
from torch import nn
x = torch.zeros(256, 2)
def cars():
    loss = lambda a, b: (a - b).square().mean(1)
    return {"train": (x, x), "test": (x, x), "model": lambda: nn.Linear(2, 2), "loss": loss}
def raises():
    raise KeyError("no such\\ncolumn")
def half():
    return {"train": (x, x)}
def number():
    return 3
def model_raises():
    return cars() | {"model": lambda: 1 / 0}
def one_loss():
    return cars() | {"loss": lambda a, b: (a - b).square().mean()}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; a module of tasks and damaged data beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "my_tasks.py").write_text(TASKS)
    (tmp_path / "my_broken.py").write_text("import not_installed")
    (tmp_path / "my_exit.py").write_text("import sys; sys.exit(3)")
    (write_images(tmp_path / "damaged") / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(folder)
    return folder


def told(result, *words):
    """Hold a result against what every mistake gives: exit code 2, one line on the standard error, no traceback."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in line


MISTAKES = {
    # commands and their arguments
    "compar": ["no such command 'compar'", "'compare'", "steppe --help"],
    "COMPARE": ["no such command 'COMPARE'", "steppe --help"],
    "nothing": ["no such command 'nothing'"],
    "--verison": ["--verison", "did you mean --version?"],
    "run": ["missing argument", "method", "steppe run --help"],
    "report": ["missing argument", "steppe report --help"],
    "report a b": ["unexpected extra argument", "(b)"],
    "compare SAM WSAM": ["unexpected extra argument", "SAM WSAM", "--method"],
    "reproduce": ["missing argument"],
    # options
    "compare --nois 0.1": ["no such option", "did you mean --noise?", "steppe compare --help"],
    "compare --learning-rate 1": ["no such option", "--learning-rate"],
    "run SAM --epoch 3": ["did you mean --epochs?"],
    "compare --seeds": ["--seeds", "requires an argument"],
    "compare --seeds many": ["--seeds", "integer", "'many'"],
    "compare --seeds 1.5": ["--seeds", "'1.5'"],
    "compare --seeds 0": ["--seeds", "greater than or equal to 1", "'0'"],
    "compare --minutes -1": ["--minutes", "'-1'"],
    "compare --quick=3": ["--quick", "does not take a value"],
    "run SAM --lr high": ["--lr", "number", "'high'"],
    "toy --start 1": ["--start", "2 arguments"],
    # methods
    "run sam": ["unknown method 'sam'", "did you mean SAM?"],
    "run WASM": ["unknown method 'WASM'", "did you mean WSAM?"],
    "run Adam": ["unknown method 'Adam'", "AdamW"],
    "run xyz": ["choose from SGD, AdamW, SAM"],
    "run SAM(roh=0.1)": ["SAM has no option 'roh'", "did you mean rho?"],
    "run WSAM(rho=0.1,Gamma=0.9)": ["no option 'Gamma'", "did you mean gamma?"],
    "run SAM(rho=0.1": ["cannot read method", "NAME(key=value"],
    "run SAM(0.1)": ["cannot read method", "SAM(rho=0.2, m=16)"],
    "run SAM(rho=big)": ["rho in 'SAM(rho=big)' must be a plain value"],
    "run SAM(rho=-1)": ["rho must be"],
    "run SAM(rho=nan)": ["rho", "must be a plain value"],
    "run SAM(m=0)": ["SAM(m=0)", "m must be"],
    "run SAM(rho=0.1,rho=0.2)": ["SAM(rho=0.1,rho=0.2)"],
    "run SAM(epochs=0)": ["epochs", "2x"],
    "run SAM(lr=-1)": ["lr must be a positive number"],
    "compare --method samm": ["unknown method 'samm'", "did you mean SAM?"],
    "compare --method SAM(m={m)": ["cannot read method"],
    "compare --method SAM(m={n})": ["cannot search {n}"],
    "compare --fixed --method SAM(m={m})": ["SAM(m={m})"],
    # what is searched
    "compare --space rho": ["cannot read space 'rho'", "KEY=LOW..HIGH"],
    "compare --space roh=0.1,0.2": ["space 'roh' is searched of no method", "did you mean rho?"],
    "compare --space rho=1..0.1": ["from low to high"],
    "compare --space rho=a,b": ["cannot read space"],
    "compare --fixed --trials 3": ["--fixed makes no search", "--trials"],
    "compare --fixed --space rho=1,2": ["--fixed makes no search", "--space"],
    "compare --equal steps": ["equal must be one of passes, seconds, epochs"],
    "compare --validation 1": ["validation must be a share"],
    "compare --fixed --baseline ASAM": ["baseline ASAM is none of the methods"],
    "compare --baseline SAMM": ["baseline 'SAMM' is none of the methods", "did you mean SAM?"],
    "compare --storage nonsense --method SAM --quick": ["cannot open storage nonsense"],
    "compare --storage postgresql://me:secret@host/db": ["STEPPE_STORAGE", "~/.pgpass"],
    # data, models, numbers
    "compare --data cifar": ["unknown data 'cifar'", "did you mean cifar10?"],
    "compare --data fashion_mnist": ["unknown data", "did you mean fashion-mnist?"],
    "compare --data cifar10": ["no cifar10 in data/cifar10, data: unpack", "--data-dir"],
    "compare --data-dir nowhere": ["data-dir goes with --data fashion-mnist"],
    "compare --data fashion-mnist --data-dir nowhere": ["no fashion-mnist in", "nowhere", "--data-dir"],
    "compare --data fashion-mnist --data-dir ../damaged": ["no t10k-labels-idx1-ubyte"],
    "compare --data cifar10 --quick": ["--quick is for digits"],
    "run SAM --model resnet-18": ["unknown model 'resnet-18'", "did you mean resnet18?"],
    "run SAM --model resnet18": ["model resnet18 takes images"],
    "run SAM --optimizer lion": ["optimizer must be one of sgd, adamw"],
    "run SAM --batch-size 0": ["batch-size must be a positive integer"],
    "run SAM --batch-size 5000": ["batch-size 5000 exceeds"],
    "compare --train-size 1797": ["train-size 1797 exceeds the 1796 examples"],
    "run SAM --train-size 99999": ["train-size 99999 exceeds"],
    "run SAM --lr nan": ["lr must be a positive number"],
    "run SAM --momentum -1": ["momentum must be"],
    "run SAM --augment crop": ["augment crop is for images"],
    "run SAM --warmup -1": ["warmup must be a number of steps"],
    "run SAM --noise 40": ["noise must be a number in [0, 1]"],
    "run SAM --device gpu": ["device must be one of auto, cpu, cuda, mps"],
    "run SAM --precision fp16": ["precision must be one of fp32, bf16"],
    "run SAM --strategy zero": ["strategy must be one of ddp, fsdp"],
    # a task of one's own
    "compare --task cars": ["--task", "module:function", "'cars'"],
    "compare --task my_tusks:cars": ["module 'my_tusks' cannot be imported", "ModuleNotFoundError"],
    "compare --task my_tasks:car": ["no function 'car'", "did you mean cars?"],
    "compare --task my_broken:cars": ["module 'my_broken' cannot be imported", "not_installed"],
    "compare --task my_exit:cars": ["module 'my_exit' cannot be imported", "SystemExit: 3"],
    "compare --task my_tasks:raises": ["my_tasks:raises failed: KeyError", "my_tasks.py:9"],
    "compare --task my_tasks:half": ["my_tasks:half must return train, test and model"],
    "compare --task my_tasks:number": ["my_tasks:number must return"],
    "compare --task my_tasks:model_raises": ["ZeroDivisionError", "my_tasks.py"],
    "compare --task my_tasks:one_loss": ["loss must return one value an example"],
    "compare --task my_tasks:cars --data cifar10": ["leave one out"],
    "run SAM --task my_tasks:cars --model mlp-16": ["leave --model out"],
    "toy --function my_tasks": ["module:function"],
    # recipes
    "recipes label-noise": ["unknown recipe 'label-noise'", "did you mean label_noise?"],
    "reproduce label_noise --study noise-0.5": ["no study 'noise-0.5'", "did you mean noise-0."],
    "reproduce label_noise --scale papre": ["unknown scale 'papre'", "did you mean paper?"],
    "sweep label_noise --space gama=1,2": ["space 'gama' is not searched here", "gamma"],
    # directories
    "report nowhere": ["nowhere holds no runs"],
    "measure .": ["holds no runs"],
    "run SAM --out ../my_tasks.py": ["my_tasks.py is a file", "--out"],
    "run SAM --out ..": ["holds no runs", "--out"],
    "run SAM --out /proc/steppe": ["cannot write in /proc/steppe", "--out"],
    "compare --out /proc/steppe": ["cannot write in /proc/steppe"],
    "compare --fixed --out /dev/null": ["/dev/null is a file"],
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_write(here, words):
    before = sorted(here.parent.rglob("*"))
    told(steppe_cli(*words.split()), *MISTAKES[words])
    assert [path for path in sorted(here.parent.rglob("*")) if "__pycache__" not in path.parts] == before


# ---- the system says no


def test_a_full_disk_is_one_line(tmp_path):
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, free[1]))  # bytes; a full disk says it with another number
    try:
        done = steppe_cli(*FIXED, "--out", tmp_path / "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    run, report = done.stderr.strip().splitlines()
    assert run.startswith("SGD seed 0 failed: cannot write ")
    assert report.startswith("error: cannot write ")
    assert run.endswith("File too large")
    assert done.exit_code == 2
    assert not list((tmp_path / "r").rglob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_an_output_that_cannot_be_written_to_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "steppe", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


# ---- files that are damaged or of something else


def test_damaged_files_of_a_directory_are_named(tmp_path):
    trained(tmp_path, "SGD")
    out = ["--out", tmp_path]
    (tmp_path / "config.json").write_text("{")
    for words in (["report", tmp_path], [*FIXED, *out], ["measure", tmp_path]):
        told(steppe_cli(*words), "config.json is damaged")
    (tmp_path / "config.json").write_text('{"format": 1, "settings": [], "methods": 3}')
    told(steppe_cli("report", tmp_path), "config.json is damaged")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": 1}', '{"format": 1, "asked": 3, "stages": [3]}'])
@pytest.mark.parametrize("name", ["comparison.json", "search.json"])
def test_damaged_files_of_a_search_are_named(tmp_path, name, text):
    done = steppe_cli("compare", *TINY, "--trials", 1, "--search-seeds", 1, "--seeds", 1, "--method", "SAM",
                      "--workers", 1, "--out", tmp_path, "--minutes", 0)  # fmt: skip
    assert done.exit_code == 75, done.output
    search = {"stages": [{"name": "SGD", "chosen": {}, "points": []}], "seeds": 1}
    files.write_json(tmp_path / "search.json", search)
    (tmp_path / name).write_text(text)
    again = ["compare", *TINY, "--trials", 1, "--search-seeds", 1, "--method", "SAM", "--out", tmp_path]
    told(steppe_cli(*again), f"{name} is damaged")


def test_a_newer_format_is_called_by_its_name(tmp_path):
    plan = trained(tmp_path, "SGD", seeds=1)
    path = tmp_path / "runs" / f"{plan.runs()[0].name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    told(steppe_cli("report", tmp_path), f"{path.name} has format 7, of a newer steppe")


def test_metrics_and_checkpoints_of_something_else(tmp_path):
    out = tmp_path / "r"
    for folder, text in (
        ("metrics", b"\xff\x00[[[\n" + b"[" * 100_000 + b'\n{"step": "x"}\n3\n'),
        ("checkpoints", b"PK"),
    ):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / f"sgd-s0.{'jsonl' if folder == 'metrics' else 'pt'}").write_bytes(text)
    run = ["run", "SGD", *TINY, "--out", out]
    told(steppe_cli(*run), "holds no runs")
    done = steppe_cli("run", "SGD", *TINY, "--out", tmp_path / "other")
    assert done.exit_code == 0
    (tmp_path / "other" / "config.json").rename(out / "config.json")
    told(steppe_cli(*run), "sgd-s0.pt is damaged", "delete it")
    other = {"format": 1, "step": 1, "model": {"1.weight": torch.zeros(3, 3)}, "optimizer": {}, "random": []}
    torch.save(other, out / "checkpoints" / "sgd-s0.pt")
    told(steppe_cli(*run), "sgd-s0.pt does not fit this run", "delete it")
    (out / "checkpoints" / "sgd-s0.pt").unlink()
    assert steppe_cli(*run).exit_code == 0  # the garbage of the metrics is dropped
    lines = (out / "metrics" / "sgd-s0.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] > 0 for line in lines)


def test_a_search_database_of_something_else_is_told(tmp_path):
    (tmp_path / "study.db").write_bytes(b"no database" * 200)
    words = ["compare", *TINY, "--trials", 1, "--search-seeds", 1, "--method", "SAM", "--workers", 1, "--out", tmp_path]
    result = steppe_cli(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot open storage sqlite:///")
    assert result.stderr.endswith("study.db: (sqlite3.DatabaseError) file is not a database\n")


# ---- unexpected errors


def test_an_unexpected_error_is_one_line_unless_it_is_asked_for(monkeypatch):
    def broken():
        raise RuntimeError("a defect\nof two lines")

    monkeypatch.setattr("steppe.lab.doctor.checks", broken)
    result = steppe_cli("doctor")
    (line,) = result.stderr.strip().splitlines()
    assert result.exit_code == 1
    assert line.startswith("unexpected error: RuntimeError: a defect of two lines (at test_mistakes.py:")
    assert "STEPPE_DEBUG=1" in line
    monkeypatch.setenv("STEPPE_DEBUG", "1")
    assert isinstance(steppe_cli("doctor").exception, RuntimeError)


def test_errors_have_no_control_letters_and_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = steppe_cli("report", tmp_path / "a\x1b[2Jb")
    told(result, "~/a?[2Jb holds no runs")
    assert str(tmp_path) not in result.stderr
