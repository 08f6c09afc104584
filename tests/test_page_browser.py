"""The page in headless Chromium: it renders, sorts, filters, opens details, prints, and complains of nothing."""

import csv
import io
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser, browser, chromium

from memory_bench.report.build import build
from memory_bench.report.libraries import find_libraries
from synthetic import TASKS, make_cell, make_record, make_store, text_samples

PROGRAM = chromium()
LIBRARIES = find_libraries()
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
    pytest.mark.skipif(not LIBRARIES, reason=LIBRARIES.said),
]
SHOWN = (
    "[...document.querySelectorAll('#results tbody tr')].map((line) => line.cells[0].querySelector('span').textContent)"
)
DRAWN = "document.querySelectorAll('#charts svg').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = make_store(tmp_path_factory.mktemp("runs") / "run")
    for record in store.records():
        facts = {**record.provenance, "curve": [[1000 * i, 5.0 - 0.01 * i] for i in range(100)],
                 "versions": {"torch": "2.13.0"}}  # fmt: skip
        store.write_record(replace(record, provenance=facts), store.samples(record.key))
    samples = text_samples(0, -0.05)
    store.write_record(make_record(make_cell("rmt", label="=1+1", memory=2), samples), samples)
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    path.write_text(build(store, TASKS, libraries=LIBRARIES).html(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(chrome: Browser, page: Path) -> Iterator[Browser]:
    """The page, ready and drawn; it has complained of nothing and asked for nothing when the test is done."""
    chrome.call("Page.navigate", url="about:blank")
    chrome.events.clear()
    chrome.open(page)
    chrome.wait("document.body.dataset.drawn")
    yield chrome
    assert chrome.problems() == []
    assert chrome.requested() == [page.as_uri()]


def choose(page: Browser, name: str, value: str) -> None:
    """A choice in a filter, as a reader makes it."""
    page.evaluate(
        f"(() => {{ const field = document.querySelector('[name={name}]'); field.value = {value!r};"
        "field.dispatchEvent(new Event('change')); field.dispatchEvent(new Event('input')); })()"
    )


def test_it_renders_sorts_and_filters(shown: Browser) -> None:
    everything = shown.evaluate(SHOWN)
    assert everything[:3] == ["xl-cache", "hmt", "rmt"]
    assert shown.evaluate(DRAWN) >= 3
    head = "[...document.querySelectorAll('#results thead th')].find((head) => head.textContent.startsWith('score'))"
    for _ in range(2):
        shown.evaluate(f"{head}.click()")
    values = shown.evaluate("[...document.querySelectorAll('#results tbody tr')].map((line) => "
                            "line.querySelector('td:has(button[data-row])').dataset.order)")  # fmt: skip
    known = [float(value) for value in values if value]
    assert known == sorted(known, reverse=True)
    assert values[len(known) :] == [""] * (len(values) - len(known))  # without a number: last, either way
    choose(shown, "task", "pubmedqa")
    some = shown.evaluate(SHOWN)
    assert 0 < len(some) < len(everything)
    assert set(shown.evaluate("[...document.querySelectorAll('#results tbody tr')].map((l) => l.cells[1].textContent)")
               ) == {"pubmedqa (stand-in: invented studies)"}  # fmt: skip
    shown.evaluate("document.querySelector('[name=controls]').click()")
    assert set(some) - set(shown.evaluate(SHOWN)) == {"truncation"}
    shown.evaluate("document.querySelector('form.filters').reset()")
    shown.wait(f"{SHOWN}.length === {len(everything)}")
    choose(shown, "status", "over_budget")
    assert shown.evaluate(SHOWN) == ["mplus"]
    shown.wait("document.querySelector('#charts .chosen select')?.value === '0'")


def test_charts_follow_the_choice(shown: Browser) -> None:
    names = "[...document.querySelectorAll('#charts figure')].at(-1).textContent"
    shown.evaluate("document.querySelector('input[aria-label=\"draw hmt\"]').click()")
    shown.wait("document.querySelector('#charts .chosen')?.textContent.includes('1 chosen rows')")
    shown.wait(f"{names}.includes('hmt') && !{names}.includes('rmt')")
    shown.wait("[...document.querySelectorAll('#charts figcaption')].some((title) => title.textContent === 'Training')")


def test_details_open_by_keyboard_and_by_address(shown: Browser, page: Path) -> None:
    shown.evaluate("document.querySelector('button[data-row*=\"--hmt\"]').focus()")
    shown.press("Enter", 13, "\r")
    shown.wait("document.querySelector('dialog').open")
    text = shown.evaluate("document.querySelector('dialog').textContent")
    for said in ("memory-bench run --models hmt --tasks pg19", "Compared with the other rows", "truncation", "better",
                 "10 worst of 24 documents", "book-", "torch", "n = 24"):  # fmt: skip
        assert said in text, said
    assert shown.evaluate("document.activeElement.closest('dialog') !== null")
    shown.press("Escape", 27)
    shown.wait("!document.querySelector('dialog').open")
    anchor = shown.evaluate("document.querySelector('tr[id*=\"--rmt\"] a.anchor').hash")
    shown.evaluate(f"location.hash = {anchor!r}")
    shown.wait("document.querySelector('dialog').open")
    assert shown.evaluate("document.querySelector('dialog h2').textContent") == "rmt"


def test_columns_are_chosen_and_saved(shown: Browser, tmp_path: Path) -> None:
    heads = "[...document.querySelectorAll('#results thead th')].map((head) => head.textContent)"
    buttons = "[...document.querySelectorAll('.dt-buttons button, .dt-button-collection button')]"
    assert "seed sd" not in shown.evaluate(heads)
    for name in ("Columns", "seed sd"):
        shown.evaluate(f"{buttons}.find((button) => button.textContent.startsWith({name!r})).click()")
    shown.wait(f"{heads}.includes('seed sd')")
    shown.press("Escape", 27)
    shown.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    shown.evaluate(f"{buttons}.find((button) => button.textContent === 'CSV').click()")
    saved = tmp_path / "leaderboard.csv"
    for _ in range(600):
        if saved.is_file() and saved.read_text(encoding="utf-8-sig"):
            break
        time.sleep(0.1)
    lines = list(csv.DictReader(io.StringIO(saved.read_text(encoding="utf-8-sig"))))
    assert [line["model"] for line in lines][:3] == ["xl-cache", "hmt", "rmt"]
    assert "'=1+1" in [line["model"] for line in lines]
    assert {"seed sd", "score [95 %]"} <= lines[0].keys()


def test_it_is_readable_on_a_phone_and_complete_on_paper(chrome: Browser, page: Path) -> None:
    chrome.events.clear()
    chrome.open(page, 390, 844, mobile=True, dark=True)
    chrome.wait("document.body.dataset.drawn")
    assert chrome.evaluate("document.documentElement.scrollWidth <= innerWidth")  # only tables scroll sideways
    pdf = chrome.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    chrome.call("Emulation.setEmulatedMedia", media="print")
    tables = "[...document.querySelectorAll('body > .scroll table, body > details table')]"
    seen = chrome.evaluate(f"{tables}.map((table) => table.checkVisibility())")
    assert seen
    assert all(seen)  # what is folded on a screen is unfolded on paper
    chrome.call("Emulation.setEmulatedMedia", media="")
    assert chrome.problems() == []
