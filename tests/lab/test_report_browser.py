"""The report as a reader sees it, in Debian's Chromium; skipped where there is none."""

import pytest

from steppe.lab import files, report
from steppe.lab.runs import RECIPE, SEARCH

from .browser import CHROMIUM, Browser
from .helpers import trained

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")

METHODS = (
    "SGD",
    "SAM(rho=0.1)",
    "SAM(rho=0.1, m=32)",
    *(f"WSAM(rho={rho}, gamma={gamma})" for rho in (0.05, 0.1) for gamma in (0.5, 0.8)),
)
ABOUT = {
    "recipe": "example",
    "study": "digits",
    "question": "Is it <drawn>?",
    "source": "a paper",
    "setting": "its own task",
    "facts": [["numbers", "not known"]],
    "values": {"rho": 0.1},
    "published": {"SGD": 4.38},
}
POINTS = [
    {"values": {"lr": lr, "wd": wd}, "errors": [lr * 100, wd], "error": 1.0, "dropped": lr > 0.1}
    for lr in (0.05, 0.1, 0.2)
    for wd in (1, 2)
]
STAGE = {"name": "base", "method": "SGD", "chosen": {"lr": 0.05, "wd": 1}, "points": POINTS}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    trained(folder, *METHODS, seeds=2)
    files.write_json(folder / RECIPE, ABOUT)
    files.write_json(folder / SEARCH, {"stages": [STAGE], "seeds": 2})
    report.write(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.ask("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(page)
    yield browser
    browser.close()


def first_column(browser):
    return browser.run("[...document.querySelectorAll('.sortable tbody th')].map(cell => cell.textContent)")


def test_every_figure_is_drawn_and_nothing_complains(browser):
    drawn = browser.run(
        "Object.fromEntries([...document.querySelectorAll('.figure')].map(box => "
        "[box.id, [box.querySelectorAll('.main-svg').length, box.querySelectorAll('path, image').length]]))"
    )
    assert {"errors", "test-error", "train-loss", "m-sweep", "cost", "pairs", "over-WSAM", "search-base"} == set(drawn)
    assert all(layers >= 1 and marks >= 3 for layers, marks in drawn.values()), drawn
    assert browser.errors == []


def test_the_page_fits_its_width(browser):
    assert browser.run("document.documentElement.scrollWidth") <= 1200


def test_the_table_sorts_by_number_and_by_name(browser):
    click = "document.querySelectorAll('.sortable thead button')[{}].click()"
    browser.run(click.format(2))
    errors = browser.run("[...document.querySelectorAll('.sortable tbody tr')].map(row => +row.cells[2].textContent)")
    assert errors == sorted(errors)
    assert sorted(first_column(browser)) == sorted(METHODS)
    browser.run(click.format(2))
    assert errors[::-1] == browser.run(
        "[...document.querySelectorAll('.sortable tbody tr')].map(row => +row.cells[2].textContent)"
    )
    assert browser.run("document.querySelectorAll('.sortable thead th')[2].getAttribute('aria-sort')") == "descending"
    browser.run(click.format(0))
    assert [name[0] for name in first_column(browser)] == ["S"] * 3 + ["W"] * 4
    browser.run(click.format(4))  # the paper's numbers: what is not known comes last
    assert first_column(browser)[0] == "SGD"
    assert browser.errors == []


def test_light_and_dark(browser):
    colours = {}
    for theme in ("light", "dark"):
        browser.theme(theme)
        browser.run("new Promise(done => setTimeout(done, 300))")
        colours[theme] = browser.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
            "document.querySelector('#errors .xtick text').style.fill]"
        )
    paper, ink, ticks = zip(colours["light"], colours["dark"], strict=True)
    assert (paper, ink) == (("rgb(246, 247, 249)", "rgb(18, 22, 28)"), ("rgb(28, 36, 48)", "rgb(228, 232, 238)"))
    assert ticks == ink
    assert browser.errors == []


def test_what_the_recipe_says_is_text(browser):
    text = browser.run("document.body.textContent")
    for words in ("Is it <drawn>?", "a paper", "not known", "4.38"):
        assert words in text


def test_a_page_that_complains_is_heard(browser, page):
    bad = page.with_name("bad.html")
    bad.write_text("<script>console.error('a'); nothing()</script><img src='http://localhost:9/x.png'>")
    browser.open(bad)
    assert len(browser.errors) >= 3
    browser.errors.clear()
    browser.open(page)
