"""What leaves the laboratory: records without names of this machine, pages without marks of others; and the seed."""

import getpass
import html
import random
import socket

import numpy as np
import pytest
from markdown_it import MarkdownIt

from steppe.lab import runs, tables, tasks
from steppe.lab.train import initial_model, seed_all

from . import formats
from .helpers import run, steppe_cli, trained

SMALL = ["--train-size", 40, "--batch-size", 20, "--epochs", 1, "--model", "resnet18-w4-gn", "--noise", 0]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder of a user, with data in it."""
    folder = tmp_path / "home-of-a-user"
    formats.cifar10(folder / "cifar")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def test_records_name_no_folder_user_or_machine(home):
    given = ["--data", "cifar10", "--data-dir", home / "cifar", *SMALL]
    search = ["--trials", 1, "--search-seeds", 1, "--seeds", 1, "--method", "SAM", "--workers", 1]
    for words in (["run", "SGD", *given, "--out", "one"], ["compare", *given, *search, "--out", "many"]):
        assert (result := steppe_cli(*words)).exit_code == 0, result.output
    names = {
        home.name,
        *(name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5),
    }
    for path in (path for folder in ("one", "many") for path in (home / folder).rglob("*") if path.is_file()):
        text = path.read_bytes()
        assert not [name for name in names if name.encode() in text], path
    moved = (home / "cifar").rename(home / "elsewhere")  # the same command goes on with data that have moved
    assert steppe_cli("run", "SGD", "--data", "cifar10", "--data-dir", moved, *SMALL, "--out", "one").exit_code == 0


NASTY = [
    "<script>alert(1)</script>",
    "a | b",
    "`code` and ``more``",
    "*bold* _thin_ __all__ ~~gone~~",
    "[text](javascript:alert(1)) ![image](x)",
    "back\\slash \\* &amp; &#42;",
    "a_b (m=16) <!-- x -->",
]


@pytest.mark.parametrize("text", NASTY)
def test_markdown_shows_a_text_as_it_is(text):
    told = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = f"<p>{html.escape(text, quote=False)}</p>"
    assert html.unescape(told.render(tables.escaped(text)).strip()) == html.unescape(shown)
    assert "<" not in tables.escaped(text)
    (row,) = tables.grid(["x", "y"], [[text, "1"]])[2:]
    page = told.render("\n".join(tables.grid(["x", "y"], [[text, "1"]])))
    assert page.count("<td") == 2, row
    span = told.render(tables.code(text)).strip()
    assert span.startswith("<p><code>")
    assert span.endswith("</code></p>")


def test_a_summary_has_no_marks_of_a_user(tmp_path):
    plan = trained(tmp_path, "SGD", seeds=1)
    path = runs.path_of(tmp_path, plan.runs()[0])
    path.write_text(path.read_text().replace('"base": "SGD', '"base": "<img src=x onerror=alert(1)> [a](b)'))
    assert steppe_cli("report", tmp_path).exit_code == 0
    text = (tmp_path / "summary.md").read_text()
    assert "<img" not in text + (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=x" in text
    assert "\\[a\\](b)" in text


def test_the_seed_seeds_every_global_generator():
    def draws(seed):
        asked = run("SGD", seed)
        seed_all(99 + random.getrandbits(8))
        initial_model(asked, tasks.load(asked.settings, seed))
        return random.random(), float(np.random.rand())

    assert draws(3) == draws(3)
    assert not set(draws(3)) & set(draws(4))
