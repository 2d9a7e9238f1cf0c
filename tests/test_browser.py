"""The served app in a real browser, as a person uses it, with the models that the clone carries."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
PAGES = {
    "generate": "Generate",
    "sentiment": "Sentiment",
    "instructions": "Instructions",
    "tokenizer": "Tokenizer",
    "training": "Training and evaluation",
}
WAIT_MS = 60_000

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the app is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
    server = subprocess.Popen(
        [*command, "--server.port", str(port), "--browser.gatherUsageStats", "false"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            requests.get(f"{url}/_stcore/health", timeout=1).raise_for_status()
            break
        except requests.RequestException:
            time.sleep(0.1)
    yield url
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture
def page() -> Iterator[Page]:
    """A fresh page of Debian's Chromium."""
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        yield page
        browser.close()


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where screenshots go: `pytest -m browser --screenshots assets` renews those of the README."""
    return Path(request.config.getoption("--screenshots") or tmp_path)


def settle(page: Page) -> None:
    """Waits until the app has nothing more to do."""
    expect(page.get_by_test_id("stStatusWidget")).to_have_count(0)
    page.wait_for_timeout(800)


def shoot(page: Page, path: Path) -> None:
    settle(page)
    assert page.get_by_test_id("stException").count() == 0
    page.screenshot(path=path)
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens(name: str, address: str, page: Page, pictures: Path):
    page.goto(f"{address}/{name}")
    expect(page.get_by_role("heading", name=PAGES[name], level=1)).to_be_visible()
    settle(page)
    assert page.get_by_test_id("stAlertContentError").count() == 0
    shoot(page, pictures / f"page_{name}.png")


def test_text_is_generated_and_can_be_stopped(address: str, page: Page, pictures: Path):
    page.goto(address)
    page.get_by_role("button", name="Generate").click()
    text = page.get_by_test_id("stCode").first
    expect(text).to_contain_text(re.compile(r"ROMEO:[\s\S]{200}"))
    expect(page.get_by_text(re.compile(r"\d+ tokens, \d+ tokens per second"))).to_be_visible()
    shoot(page, pictures / "llm_new_1.png")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Stop").click()
    settle(page)
    expect(text).to_contain_text("ROMEO:")


def test_a_review_is_judged(address: str, page: Page, pictures: Path):
    page.goto(f"{address}/sentiment")
    box = page.get_by_label("Review")
    box.fill("I love it. The best purchase I have made in years, works great!")
    box.press("Control+Enter")
    expect(page.get_by_test_id("stMetricValue").first).to_have_text("positive")
    shoot(page, pictures / "llm_new_2.png")
    box.fill("Terrible. It broke after a week and they refused a refund. Waste of money.")
    box.press("Control+Enter")
    expect(page.get_by_test_id("stMetricValue").first).to_have_text("negative")


def test_a_file_is_judged(address: str, page: Page, tmp_path: Path):
    path = tmp_path / "reviews.csv"
    path.write_text("text\nI love it\nawful waste of money\n")
    page.goto(f"{address}/sentiment")
    page.locator("input[type=file]").set_input_files(path)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download with predictions").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "text,prediction,probability_positive" and len(lines) == 3


def test_an_instruction_is_answered(address: str, page: Page, pictures: Path):
    page.goto(f"{address}/instructions")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_text(re.compile(r"\d+ tokens, \d+ tokens per second"))).to_have_count(2)
    shoot(page, pictures / "llm_new_3.png")


def test_two_sessions_at_once_get_their_own_text(address: str, page: Page):
    other = page.context.browser.new_page()
    texts = []
    for tab, prompt in ((page, "KING:"), (other, "Nurse:")):
        tab.goto(address)
        tab.get_by_label("Prompt").fill(prompt)
        tab.get_by_label("Prompt").press("Control+Enter")
        settle(tab)
    for tab in (page, other):
        tab.get_by_role("button", name="Generate").click()
    for tab in (page, other):
        expect(tab.get_by_text(re.compile("200 tokens|tokens per second"))).to_be_visible()
        settle(tab)
        texts.append(tab.get_by_test_id("stCode").first.inner_text())
    assert texts[0].startswith("KING:") and texts[1].startswith("Nurse:")


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_dark_window_does_not_scroll_sideways(name: str, address: str, page: Page):
    page.set_viewport_size({"width": 420, "height": 900})
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/{name}")
    expect(page.get_by_role("heading", name=PAGES[name], level=1)).to_be_visible()
    settle(page)
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
