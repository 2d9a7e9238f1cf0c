"""The served app in a real browser, as a person uses it, with the models that the clone carries."""

import contextlib
import json
import os
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

from app import printable
from generation import BASE, continue_prompt, load_model
from tokenizer import BPETokenizer

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models" / "shipped"  # also where a person has trained models
PAGES = {
    "start": "GPT from zero",
    "generate": "Generate",
    "chat": "Chat",
    "sentiment": "Sentiment",
    "how": "How it works",
    "training": "Training and evaluation",
}
WAIT_MS = 120_000  # a busy machine needs it

pytestmark = pytest.mark.browser


@contextlib.contextmanager
def serve(models: Path) -> Iterator[str]:
    """The app with the model sets of a folder; the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
    server = subprocess.Popen(
        [*command, "--server.port", str(port), "--browser.gatherUsageStats", "false"],
        cwd=ROOT,
        env={**os.environ, "GPT_MODELS_DIR": str(models)},
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


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the app is served with the models that come with the clone."""
    with serve(MODELS) as url:
        yield url


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
    """Where screenshots go: `pytest -m browser --screenshots=assets` renews those of the README."""
    return Path(request.config.getoption("--screenshots") or tmp_path)


def settle(page: Page) -> None:
    """Waits until the app has nothing more to do and its widgets and charts are drawn."""
    for pause in (800, 200):  # a run may start a moment after what caused it
        page.wait_for_timeout(pause)
        app = page.get_by_test_id("stApp")
        expect(app).to_have_attribute("data-test-script-state", "notRunning")
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)
    for chart in page.get_by_test_id("stVegaLiteChart").all():
        expect(chart.locator("canvas, svg").first).to_be_visible()


def go_to(page: Page, address: str, name: str) -> None:
    """Opens one of the app's pages; the first one has no path."""
    page.goto(address if name == "start" else f"{address}/{name}")
    expect(page.get_by_role("heading", name=PAGES[name], level=1)).to_be_visible()
    settle(page)


def click(page: Page, name: str) -> None:
    """Clicks a button of the page, not of Streamlit's own header."""
    page.get_by_test_id("stMain").get_by_role("button", name=name, exact=True).click()


def shoot(page: Page, path: Path) -> None:
    settle(page)
    assert page.get_by_test_id("stException").count() == 0
    page.screenshot(path=path)
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens(name: str, address: str, page: Page, pictures: Path):
    go_to(page, address, name)
    assert page.get_by_test_id("stAlertContentError").count() == 0
    shoot(page, pictures / f"page_{name}.png")


SPEED = re.compile(r"\d+ tokens, \d+ tokens per second")


def test_text_is_generated(address: str, page: Page, pictures: Path):
    go_to(page, address, "generate")
    click(page, "Generate")
    expect(page.get_by_text("200 tokens,")).to_be_visible()
    expect(page.get_by_test_id("stText")).to_contain_text(re.compile(r"ROMEO:[\s\S]{200}"))
    shoot(page, pictures / "llm_new_1.png")


def ask(page: Page, question: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(question)
    box.press("Enter")


def ask_and_stop(page: Page, question: str) -> None:
    """Asks, and presses Stop as soon as there is text. The page itself does so, because an answer
    takes a second and Playwright may be late; if the answer has ended before, asks again."""
    for _ in range(5):
        page.evaluate("""() => {
            window.stopped = false
            const timer = setInterval(() => {
                const stop = document.querySelector('[data-testid="stChatInputStopButton"]')
                if (!stop || stop.disabled || !/\\d+ tokens, /.test(document.body.innerText)) return
                stop.click()
                window.stopped = true
                clearInterval(timer)
            }, 10)
        }""")
        ask(page, question)
        expect(page.get_by_text(SPEED).first).to_be_visible()
        settle(page)
        if page.evaluate("window.stopped"):
            return
        page.get_by_role("button", name="Clear").click()
        settle(page)
    pytest.fail("five answers ended before Stop could be pressed")


def test_a_chat_stops_keeps_what_was_streamed_and_goes_on(address: str, page: Page, pictures: Path):
    go_to(page, address, "chat")
    question = "Tell me a long story about a king. <b>x</b> *y* :red[z] $w$"
    ask_and_stop(page, question)
    texts = page.get_by_test_id("stText").all_inner_texts()
    assert len(texts) == 2 and texts[0] == question and texts[1]
    page.wait_for_timeout(1000)
    assert page.get_by_test_id("stText").all_inner_texts() == texts
    page.get_by_text("The untouched base beside it").click()
    settle(page)
    assert page.get_by_test_id("stText").all_inner_texts() == texts, "still there"
    ask(page, "Name three things to take to the beach.")
    settle(page)
    expect(page.get_by_text(SPEED)).to_have_count(3)
    shoot(page, pictures / "llm_new_3.png")
    page.get_by_role("button", name="Edit the last question").click()
    settle(page)
    expect(page.get_by_test_id("stChatInputTextArea")).to_have_value(re.compile("^Name three"))
    assert page.get_by_test_id("stText").all_inner_texts() == texts
    page.get_by_role("button", name="Clear").click()
    settle(page)
    assert page.get_by_test_id("stText").count() == 0


def test_generate_stops_and_keeps_the_text(address: str, page: Page):
    go_to(page, address, "generate")
    click(page, "Generate")
    expect(page.get_by_text(SPEED)).to_be_visible()
    click(page, "Stop")
    settle(page)
    shown = page.get_by_text(SPEED).inner_text()
    page.wait_for_timeout(1000)
    assert page.get_by_text(SPEED).inner_text() == shown


def test_the_first_page_opens_and_asks_nobody_else(address: str, page: Page):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    started = time.perf_counter()
    page.goto(address)
    links = page.get_by_test_id("stMain").get_by_test_id("stPageLink")
    expect(links).to_have_count(len(PAGES) - 1)
    print(f"ready in {time.perf_counter() - started:.1f} s")
    settle(page)
    assert page.get_by_test_id("stAppDeployButton").count() == 0, "for developers"
    links.get_by_text("Chat").click()
    expect(page.get_by_role("heading", name="Chat", level=1)).to_be_visible()
    settle(page)
    assert asked and all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in asked)


def test_a_review_is_judged(address: str, page: Page, pictures: Path):
    go_to(page, address, "sentiment")
    box = page.get_by_role("textbox", name="Review", exact=True)
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
    go_to(page, address, "sentiment")
    page.locator("input[type=file]").set_input_files(path)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download with predictions").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert (
        lines[0] == "text,prediction,probability_negative,probability_positive" and len(lines) == 3
    )
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": "I love it", "n": 1.23456789012345}\n{"text": "awful waste"}\n')
    page.locator("input[type=file]").set_input_files(path)
    expect(page.get_by_text("reviews.jsonl")).to_be_visible()
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download with predictions").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [row["n"] for row in rows] == [1.23456789012345, None]
    assert [row["prediction"] for row in rows] == ["positive", "negative"]


def test_two_sessions_at_once_get_their_own_text(address: str, page: Page):
    model, tokenizer, _ = load_model(MODELS / "model_weights.pth")
    other = page.context.browser.new_page()
    tabs = {"KING:": page, "Nurse:": other}
    for prompt, tab in tabs.items():
        go_to(tab, address, "generate")
        write(tab, "Prompt", prompt)
    for tab in tabs.values():
        click(tab, "Generate")
    for prompt, tab in tabs.items():
        expect(tab.get_by_text("200 tokens,")).to_be_visible()
        settle(tab)
        ids = continue_prompt(model, tokenizer, prompt, 200)
        expected = prompt + "".join(tokenizer.decode_stream(ids))
        shown = tab.get_by_test_id("stText").inner_text()
        assert shown.split() == expected.split()


def test_a_sentence_is_followed_through_the_model(address: str, page: Page):
    go_to(page, address, "how")
    write(page, "Sentence", "O Romeo, Romeo! wherefore art")
    charts = page.get_by_test_id("stVegaLiteChart")
    expect(page.get_by_test_id("stDataFrame")).to_have_count(3)
    expect(charts).to_have_count(8)
    before = charts.nth(1).screenshot()
    page.get_by_role("combobox", name="Layer").first.click()
    page.get_by_role("option", name="4", exact=True).click()
    settle(page)
    assert charts.nth(1).screenshot() != before, "another layer"
    page.get_by_role("slider", name="Top-k").press("ArrowRight")
    expect(page.get_by_text("1 of 2,048 tokens can be sampled.")).to_be_visible()
    before = charts.nth(5).screenshot()
    page.get_by_role("slider", name="Row of").press("ArrowRight")
    settle(page)
    assert charts.nth(5).screenshot() != before, "another row"


def write(page: Page, name: str, text: str) -> None:
    """Fills in a text box and waits for what follows."""
    box = page.get_by_role("textbox", name=name, exact=True)
    box.fill(text)
    box.press("Control+Enter")
    settle(page)


def test_tokens_are_shown_as_they_are(address: str, page: Page):
    go_to(page, address, "how")
    text = "a[0] -- :red[x] $y$ **b** <script>c</script> -> `d`"
    write(page, "Sentence", text)
    tokenizer = BPETokenizer.load(MODELS / "tokenizer.json")
    names = [f"{printable(tokenizer.vocab[i])} {i}" for i in tokenizer.encode(text)]
    badges = page.get_by_test_id("stMain").locator(".stMarkdownBadge").all_inner_texts()
    assert [badge.replace("\u2060", "") for badge in badges] == names
    main = page.get_by_test_id("stMain")
    assert main.locator(".katex, strong, script").count() == 0


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_dark_window_does_not_scroll_sideways(
    name: str, address: str, page: Page, pictures: Path
):
    page.set_viewport_size({"width": 420, "height": 900})
    page.emulate_media(color_scheme="dark")
    go_to(page, address, name)
    main = page.get_by_test_id("stMainBlockContainer").locator("..")
    assert main.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    shoot(page, pictures / f"narrow_{name}.png")


def public_set() -> Path:
    """The folder of the public set, if its base has been fetched; gives large models their time."""
    models = ROOT / "models" / "smollm2-135m-instruct"
    if not (models / BASE).is_file():
        pytest.skip("needs `python main.py --pretrained smollm2-135m-instruct`")
    expect.set_options(timeout=180_000)
    return models


def test_a_sentence_is_followed_through_a_public_model(page: Page):
    models = public_set()
    with serve(models) as url:
        go_to(page, url, "how")
        assert page.get_by_test_id("stDataFrame").count() == 1, "only the tokenizer is loaded"
        page.get_by_text("Load the model").click()
        expect(page.get_by_text("8. Adapters")).to_be_visible()
        settle(page)
        expect(page.get_by_text(re.compile(r"\d+ of 49,152 tokens can be sampled"))).to_be_visible()
        expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(8)
        assert page.get_by_test_id("stAlertContentError").count() == 0


def test_a_person_talks_to_a_public_model(page: Page, pictures: Path):
    models = public_set()
    with serve(models) as url:
        go_to(page, url, "chat")
        for i, question in enumerate(("What is the capital of France?", "Name a dish from there.")):
            ask(page, question)
            expect(page.get_by_text(SPEED)).to_have_count(i + 1)
            settle(page)
        texts = page.get_by_test_id("stText").all_inner_texts()
        assert len(texts) == 4 and "Paris" in texts[1] and texts[3]
        shoot(page, pictures / "llm_chat.png")
