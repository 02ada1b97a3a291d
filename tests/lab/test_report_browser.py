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
    "scale": "laptop",
    "study": "digits",
    "question": "Is it <drawn>?",
    "source": "a paper",
    "setting": "its own task",
    "facts": [["numbers", "not transcribed"]],
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
    browser.width(1200)
    browser.open(page)
    yield browser
    browser.close()


def test_every_figure_is_drawn_and_nothing_complains(browser):
    marks = browser.run(
        "Object.fromEntries([...document.querySelectorAll('section:has(svg)')].map(box => "
        "[box.id, box.querySelectorAll('.linear path').length]))"
    )
    assert set(marks) == {"test-error", "train-loss", "over-SAM", "over-WSAM", "search-base"}
    assert all(count >= 3 for count in marks.values()), marks
    assert browser.errors == []


def test_a_figure_has_a_log_scale(browser):
    def shown():
        return browser.run(
            "[...document.querySelectorAll('#test-error .figure')].map(box => getComputedStyle(box).display)"
        )

    assert shown() == ["block", "none"]
    browser.run("document.querySelector('#log-test-error').click()")
    assert shown() == ["none", "block"]
    browser.run("document.querySelector('#log-test-error').click()")


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_width(browser, width):
    browser.width(width)
    browser.run("new Promise(done => setTimeout(done, 500))")  # the figures follow
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_the_table_sorts_by_number_and_by_name(browser):
    def click(column):
        browser.run(f"document.querySelectorAll('.sortable thead button')[{column}].click()")

    def cells(column):
        row = f"row => row.cells[{column}].textContent"
        return browser.run(f"[...document.querySelectorAll('.sortable tbody tr')].map({row})")

    click(2)
    errors = list(map(float, cells(2)))
    assert errors == sorted(errors)
    assert sorted(cells(0)) == sorted(METHODS)
    click(2)
    assert list(map(float, cells(2))) == errors[::-1]
    assert browser.run("document.querySelectorAll('.sortable thead th')[2].getAttribute('aria-sort')") == "descending"
    click(0)
    assert [name[0] for name in cells(0)] == ["S"] * 3 + ["W"] * 4
    click(4)  # the paper's numbers: rows without one come last
    assert cells(0)[0] == "SGD"
    assert browser.errors == []


def test_light_and_dark(browser):
    colours = {}
    for theme in ("light", "dark"):
        browser.theme(theme)
        browser.run("new Promise(done => setTimeout(done, 300))")
        colours[theme] = browser.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
            "getComputedStyle(document.querySelector('#test-error svg text')).fill]"
        )
    paper, ink, ticks = zip(colours["light"], colours["dark"], strict=True)
    assert (paper, ink) == (("rgb(246, 247, 249)", "rgb(18, 22, 28)"), ("rgb(28, 36, 48)", "rgb(228, 232, 238)"))
    assert ticks == ink
    assert browser.errors == []


def test_what_the_recipe_says_is_text(browser):
    text = browser.run("document.body.textContent")
    for words in ("Is it <drawn>?", "a paper", "not transcribed", "4.38"):
        assert words in text


def test_a_page_that_complains_is_heard(browser, page):
    bad = page.with_name("bad.html")
    bad.write_text("<script>console.error('a'); nothing()</script><img src='http://localhost:9/x.png'>")
    browser.open(bad)
    assert len(browser.errors) >= 3
    browser.errors.clear()
    browser.open(page)
