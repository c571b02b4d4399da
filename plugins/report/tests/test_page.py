"""The page, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from tcplat_report.commands import report

from .captures import Traffic, joint, write

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromium-driver are not installed",
)
EVIL = "</script><img src=x onerror=document.title='owned'>"
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1600",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: Chrome, tmp_path_factory: pytest.TempPathFactory) -> Chrome:
    folder = tmp_path_factory.mktemp("page")
    rows = [
        *joint(Traffic(connections=120, exchanges=4, slow={(7, 2): 30_000})),
        *joint(Traffic(connections=3, comm=EVIL, seed=5, began_ns=1_001_000_000_000)),
    ]
    capture, out = write(folder / "capture.jsonl", iter(rows)), folder / "report.html"
    CliRunner().invoke(report, [str(capture), "-o", str(out)], catch_exceptions=False)
    browser.get(out.as_uri())
    return browser


def console(page: Chrome) -> list[Any]:
    """Return the messages since the last call."""
    said: list[Any] = page.get_log("browser")  # type: ignore[no-untyped-call] # selenium's
    return said


def one(page: Chrome, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def all_of(page: Chrome, selector: str) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, selector)


def rows(page: Chrome) -> list[str]:
    return [row.text for row in all_of(page, "#connections tbody tr")]


def search(page: Chrome, words: str) -> None:
    box = one(page, "#search")
    box.clear()
    box.send_keys(words or " ")


def test_page_is_drawn_without_console_messages(page: Chrome) -> None:
    assert one(page, "h1").text.endswith("capture.jsonl")
    assert len(all_of(page, "#lines path")) == 3
    assert len(all_of(page, "#heat rect")) > 20
    assert len(all_of(page, "#stages tbody tr")) == 13
    assert console(page) == []


def test_page_loads_no_other_resource(page: Chrome) -> None:
    loaded: list[Any] = page.execute_script("return performance.getEntriesByType('resource')")
    assert loaded == []


def test_markup_in_a_name_is_shown_as_text(page: Chrome) -> None:
    search(page, "onerror")
    assert rows(page)
    assert all(EVIL in row for row in rows(page))
    assert not all_of(page, "img")
    assert "owned" not in page.title
    search(page, "")


def test_search_matches_every_word(page: Chrome) -> None:
    search(page, "10007 curl")
    assert len(rows(page)) == 1
    assert "10.0.0.1:10007" in rows(page)[0]
    search(page, "no such thing")
    assert rows(page) == []
    assert one(page, "#count").text == "0 of 0 shown"
    search(page, "")
    assert one(page, "#count").text == "50 of 123 shown"
    one(page, "#more").click()
    assert len(rows(page)) == 123


def test_table_sorts_in_both_directions(page: Chrome) -> None:
    search(page, "curl")
    heads = all_of(page, "#connections th button")
    names = [head.text.strip("↑↓ ") for head in heads]
    head = heads[names.index("client")]
    head.click()
    first = rows(page)[0]
    assert "10.0.0.1:10000" in first
    head.send_keys(Keys.ENTER)  # by keyboard, too
    assert "10.0.0.1:10119" in rows(page)[0]
    assert all_of(page, "th[aria-sort=descending]")


def test_waterfall_opens_on_click(page: Chrome) -> None:
    request = all_of(page, "details.request")[0]
    parts = request.find_elements(By.CSS_SELECTOR, ".fall .bar")
    assert not parts[0].is_displayed()
    request.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
    assert parts[0].is_displayed()
    assert "server" in request.text
    assert "10.0.0.1:10007" in request.text


def test_connection_graph_draws_both_directions_and_zooms(page: Chrome) -> None:
    search(page, "10008")
    one(page, "#connections tbody button").click()
    marks = all_of(page, "#course rect.mark")
    assert len(marks) == 4 * 6
    chosen = page.execute_script("return document.querySelector('#which').selectedOptions[0].text")
    assert "10.0.0.1:10008" in chosen
    page.execute_script(
        "const way = document.querySelector('#way'); way.value = 1;"
        "way.dispatchEvent(new Event('change'))"
    )
    assert len(all_of(page, "#course rect.mark")) == 4 * 6
    one(page, "#course").send_keys("+")
    assert 0 < len(all_of(page, "#course rect.mark")) < 4 * 6
    one(page, "#course").send_keys("0")
    assert len(all_of(page, "#course rect.mark")) == 4 * 6


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_page_follows_the_preferred_colour_scheme(page: Chrome, scheme: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    script = "return getComputedStyle(document.body).backgroundColor"
    wanted = {"dark": "rgb(18, 21, 28)", "light": "rgb(247, 248, 250)"}[scheme]
    WebDriverWait(page, 60).until(lambda _: page.execute_script(script) == wanted)


def test_console_is_still_empty_after_all_interactions(page: Chrome) -> None:
    assert console(page) == []


def test_empty_capture_is_drawn(browser: Chrome, tmp_path: Path) -> None:
    capture, out = write(tmp_path / "capture.jsonl", iter(())), tmp_path / "report.html"
    CliRunner().invoke(report, [str(capture), "-o", str(out)], catch_exceptions=False)
    browser.get(out.as_uri())
    assert "Nothing of a connection" in one(browser, "header").text
    assert console(browser) == []


def test_unanswered_request_is_first_among_the_slowest(browser: Chrome, tmp_path: Path) -> None:
    traffic = Traffic(connections=20, slow={(7, 2): 30_000}, hung={3: 9_000})
    capture, out = write(tmp_path / "capture.jsonl", joint(traffic)), tmp_path / "report.html"
    CliRunner().invoke(report, [str(capture), "-o", str(out)], catch_exceptions=False)
    browser.get(out.as_uri())
    tiles = {
        tile.text.split("\n")[1]: tile.text.split("\n")[0] for tile in all_of(browser, ".tile")
    }
    assert (tiles["answered"], tiles["unanswered"]) == ("200", "1")
    first = all_of(browser, "details.request")[0]
    assert "unanswered" in first.text
    first.find_element(By.CSS_SELECTOR, "summary").click()
    assert "waiting" in first.text
    assert "closed" in first.text
    assert "10.0.0.1:10003" in rows(browser)[0]
    assert console(browser) == []
