"""The web page in a headless browser, against a scripted server that keeps the API's contract."""

import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

import gptoss_lite as gl
from gptoss_lite.serve.app import create_app
from gptoss_lite.serve.run import warm_up
from gptoss_lite.serve.settings import Settings
from tests.scripted_api import HOLD, MODEL, Script, deltas, error, scripted
from tests.serving import served

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESK: dict[str, Any] = {"viewport": {"width": 1100, "height": 820}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 320, "height": 640},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}
REASONING = "The user asks about tides.\n\nThe Moon's pull comes first → then a table."

ANSWER = """## Tides

The sea rises and falls **twice a day**, because the *Moon* pulls on it. See [the tables](https://example.org/t).

1. High water
   - at new moon: spring tides
   - at half moon: neap tides
2. Low water

> The time between two high waters is 12 h 25 min.

| Harbour | Range | Note |
|---|--:|---|
| Saint-Malo | 12.0 m | a very long cell, so that the table is wider than a telephone's screen |
| Venice | 1.0 m | `calm` |

```python
def height(hours: float, amplitude: float = 6.0, offset: float = 6.5, period: float = 12.42) -> float:
    return offset + amplitude * cos(2 * pi * hours / period)
```

In formulas: \\(h(t) = a_0 + a_1 \\cos(\\omega t)\\).
"""

HOSTILE = """<script>alert(1)</script> <img src=x onerror="alert(2)"> <svg onload=alert(3)>

[one](javascript:alert(4)) [two](JaVaScRiPt:alert(5)) [three](data:text/html,<script>alert(6)</script>)
[four](\x01javascript:alert(7)) [five](vbscript:alert(8)) <javascript:alert(9)> [six](//evil.example/x)
![seven](https://evil.example/pixel.png) ![eight](x" onerror="alert(10))
[nine](https://evil.example/"onmouseover="alert(11))

<iframe src="https://evil.example/"></iframe><link rel=stylesheet href=https://evil.example/x.css>
<style>@import url(https://evil.example/y.css)</style><base href="https://evil.example/">

```html"><script>alert(12)</script>
</code></pre><script>alert(13)</script>
```

| <b onclick=alert(14)>cell</b> | [ten](javascript:alert(15)) |
|---|---|
| <form action=https://evil.example/><button>x</button></form> | &lt;script&gt;alert(16)&lt;/script&gt; |
"""

ABSURD = {
    "quotes": "> " * 50_000 + "end",
    "list marks on a line": "- " * 49_999 + "+ end",
    "indented lists": "\n".join("  " * depth + "- item" for depth in range(400)),
    "brackets": "[" * 19_900,
    "half links": "[a](" * 4_900,
    "images": "![" * 6_000 + "](" * 3_900,
    "stars": "*a " * 3_300 + "a* " * 3_300,
    "one star each": "a*" * 9_900,
    "nested stars": "*a **b " * 1_900 + "** * " * 1_200,
    "ticks": "".join("`" * (1 + n % 9) + "x" for n in range(3_300)),
    "blanks": "- a" + "\n" * 100_000 + "- b",
    "spaces in a rule": "- " + "-" + " " * 100_000 + "x",
    "spaces in a table": "a | b\n---" + " " * 100_000 + "| x",
    "formulas without an end": "\\[\n" * 20_000,
    "rows that may be tables": ("|-" * 900 + "x\n") * 100,
    "a long table": "a | b\n--|--\n" + "1 | 2\n" * 3_000,
    "formulas": "\\(" * 9_900,
    "addresses": "https://a" + ")" * 1_990 + " http://b" * 2_000,
    "one long line": "x" * 1_000_000,
    "many lines": "line\n" * 100_000,
    "many blocks": "a\n\n" * 20_000,
    "a long fence": "```\n" + "code\n" * 50_000,
}


@pytest.fixture(scope="module")
def stage() -> list[Script]:
    """Hold the script that the server follows."""
    return [Script()]


@pytest.fixture(scope="module")
def url(stage: list[Script]) -> Iterator[str]:
    with served(scripted(stage)) as base:
        yield base


@pytest.fixture
def script(stage: list[Script]) -> Iterator[Script]:
    """Put an empty script on the stage."""
    stage[0] = Script()
    yield stage[0]
    stage[0].go.set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        expect.set_options(timeout=15_000)  # a loaded machine is slow
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, url: str, script: Script) -> Iterator[Callable[..., Page]]:
    """Open the page in a fresh browser; whatever it does, it asks this server alone and breaks no policy."""
    contexts = []
    faults: list[str] = []
    allowed: list[str] = []

    def see_request(request: Request) -> None:
        if not request.url.startswith(tuple(allowed)):
            faults.append(request.url)

    def see_console(said: ConsoleMessage) -> None:
        if "Failed to load resource" not in said.text:  # the statuses that a test means
            faults.append(said.text)

    def open_page(at: str = url, **options: Any) -> Page:
        allowed.append(at)
        context = browser.new_context(**(DESK | options))
        contexts.append(context)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective))"
        )
        page = context.new_page()
        context.on("request", see_request)
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.on("console", see_console)
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


@pytest.fixture(scope="module")
def bare_page(browser: Browser, url: str) -> Iterator[Page]:
    """Open the page for its scripts alone."""
    page = browser.new_page()
    page.goto(url)
    yield page
    page.close()


@pytest.fixture
def keep(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Page, str], None]:
    """Keep a screenshot under the folder that GPTOSS_LITE_SCREENSHOTS names."""
    folder = Path(os.environ.get("GPTOSS_LITE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def keep(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return keep


def ask(page: Page, text: str = "Explain the tides.") -> Locator:
    """Send a message; returns the answer that begins."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    return page.locator("article.answer").last


def ask_to_end(page: Page, text: str = "Explain the tides.") -> Locator:
    answer = ask(page, text)
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer


DRAW = """([text, step]) => {
    const box = document.createElement('div');
    const view = new MarkdownView(box);
    for (let end = step; step && end < text.length; end += step) view.draw(text.slice(0, end), true);
    view.draw(text, false);
    return box.innerHTML;
}"""


def drawn(page: Page, text: str, step: int = 0) -> str:
    """Draw Markdown, with a step every so many characters too; returns its HTML, few attributes kept."""
    html: str = page.evaluate(DRAW, [text, step])
    return re.sub(r' (?:class|data-action|dir|rel|target|type)="[^"]*"', "", html)


# -- talking ----------------------------------------------------------------------------------------------


def test_an_answer_is_streamed_in_and_its_reasoning_can_be_opened(
    page: Page, script: Script, keep: Callable[[Page, str], None]
) -> None:
    script.pieces = [*deltas("", REASONING), HOLD, *deltas(ANSWER)]
    answer = ask(page)
    summary = answer.locator("summary")
    expect(summary).to_have_text("Thinking…")
    expect(answer.locator(".reasoning")).to_be_hidden()
    summary.click()
    expect(answer.locator(".reasoning")).to_have_text(REASONING)
    expect(answer).to_have_attribute("aria-busy", "true")
    keep(page, "thinking")
    script.go.set()
    expect(summary).to_have_text(re.compile(r"^Thought for \d+(\.\d+)? s$"))
    expect(answer.locator(".reasoning")).to_be_visible()
    expect(answer.get_by_role("heading", name="Tides")).to_be_visible()
    expect(answer.locator("td")).to_have_count(6)
    for figure in ("tok/s", "first after", "345 tokens, 45 of thought", "prompt 1,234, 1,200 cached"):
        expect(answer.locator(".stats")).to_contain_text(figure)
    keep(page, "answered")


def test_what_is_asked_is_the_conversation_without_its_reasoning(page: Page, script: Script) -> None:
    script.pieces = deltas("It is the Moon.", REASONING)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("High").check(force=True)
    ask_to_end(page, "  Why tides?\n")
    ask_to_end(page, "And the Sun?")
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Why tides?"},
        {"role": "assistant", "content": "It is the Moon."},
        {"role": "user", "content": "And the Sun?"},
    ]
    assert script.asked[1] == {
        "model": MODEL,
        "messages": said,
        "reasoning_effort": "high",
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert script.asked[0]["messages"] == said[:2]


def test_a_stopped_answer_keeps_what_has_come_and_frees_the_server(page: Page, script: Script) -> None:
    script.pieces = [*deltas("Half an answer"), HOLD, *deltas("never said")]
    answer = ask(page)
    expect(answer.locator(".markdown")).to_have_text("Half an answer")
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".note")).to_have_text("Stopped.")
    assert script.gone.wait(5)
    expect(answer.locator(".markdown")).to_have_text("Half an answer")
    script.go.set()
    ask_to_end(page, "Go on.")
    assert script.asked[1]["messages"][1] == {"role": "assistant", "content": "Half an answer"}


def test_the_last_turn_can_be_tried_again_and_edited(page: Page, script: Script) -> None:
    script.pieces = deltas("First.")
    ask_to_end(page, "Qestion")
    script.pieces = deltas("Second.")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("article.answer .markdown")).to_have_text(["Second."])
    expect(page.locator("article.answer")).to_have_attribute("aria-busy", "false")
    page.locator("article.question").hover()
    page.get_by_role("button", name="Edit").click()
    box = page.get_by_label("Message", exact=True)
    expect(box).to_have_value("Qestion")
    page.keyboard.press("Escape")
    expect(box).to_have_value("")
    page.get_by_role("button", name="Edit").click()
    ask_to_end(page, "Question")
    expect(page.locator("article")).to_have_count(2)
    assert [asked["messages"] for asked in script.asked] == [
        [{"role": "user", "content": text}] for text in ("Qestion", "Qestion", "Question")
    ]


def test_a_reload_keeps_the_conversation_and_a_new_one_forgets_it(page: Page, script: Script) -> None:
    script.pieces = [*deltas("**Kept** so far"), HOLD]
    answer = ask(page)
    expect(answer.locator("strong")).to_have_text("Kept")
    page.reload()
    expect(answer.locator("strong")).to_have_text("Kept")
    expect(answer.locator(".note")).to_have_text("Stopped.")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("What is on your mind?")).to_be_visible()


def test_a_new_conversation_leaves_the_answer_under_way_behind(page: Page, script: Script) -> None:
    script.pieces = [*deltas("Old"), HOLD]
    expect(ask(page).locator(".markdown")).to_have_text("Old")
    page.get_by_role("button", name="New conversation").click()
    assert script.gone.wait(5)
    expect(page.get_by_role("status")).to_have_text("A new conversation.")
    script.pieces = [*deltas("New"), HOLD]
    expect(ask(page, "Another").locator(".markdown")).to_have_text("New")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    assert script.asked[1]["messages"] == [{"role": "user", "content": "Another"}]


def test_code_and_answers_can_be_copied(open_page: Callable[..., Page], script: Script) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    script.pieces = deltas(ANSWER)
    answer = ask_to_end(page)
    answer.locator("figure").get_by_role("button").click()
    expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    code = page.evaluate("() => navigator.clipboard.readText()")
    assert code == ANSWER.split("```")[1].removeprefix("python\n").removesuffix("\n")
    answer.locator("footer").get_by_role("button", name="Copy").click()
    expect(answer.get_by_role("button", name="Copied")).to_have_count(2)
    assert page.evaluate("() => navigator.clipboard.readText()") == ANSWER


def test_the_demo_model_answers_through_the_real_server(
    open_page: Callable[..., Page], keep: Callable[[Page, str], None]
) -> None:
    model, tokenizer = gl.load("demo", device="cpu")
    engine = gl.Engine(model)
    warm_up(engine)
    settings = Settings(model="demo", api_keys=("a-key",), date="2026-01-01")
    with served(create_app(engine, tokenizer, settings)) as url:
        page = open_page(url)
        page.get_by_label("API key").fill("a-key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("demo")
        page.get_by_label("Low").check(force=True)
        for question in ("Hello!", "Tell me about the whale."):
            answer = ask_to_end(page, question)
            expect(answer.locator("summary")).to_contain_text("Thought for")
            expect(answer.locator(".markdown")).not_to_be_empty()
            expect(answer.locator(".note")).to_be_hidden()
        expect(answer.locator(".stats")).to_contain_text("tok/s")
        expect(answer.locator(".stats")).to_contain_text("cached")
        keep(page, "demo")


# -- errors and keys --------------------------------------------------------------------------------------


def test_a_refusal_is_shown_in_the_servers_words_and_can_be_tried_again(page: Page, script: Script) -> None:
    script.status, script.pieces = 429, [error("The queue is full: try again in 3 seconds.")]
    answer = ask_to_end(page)
    expect(answer.locator(".note")).to_have_text("The queue is full: try again in 3 seconds.")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("article")).to_have_count(2)
    expect(answer).to_have_attribute("aria-busy", "false")
    script.status, script.pieces = 200, deltas("Now it is not.")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .markdown")).to_have_text(["Now it is not."])
    expect(page.locator(".answer .note")).to_be_hidden()


def test_an_answer_without_text_is_not_sent_back(page: Page, script: Script) -> None:
    script.pieces = [error("The server is shutting down.")]
    ask_to_end(page, "one")
    ask_to_end(page, "two")
    assert script.asked[1]["messages"] == [{"role": "user", "content": text} for text in ("one", "two")]


def test_an_error_within_an_answer_is_shown_below_it(page: Page, script: Script) -> None:
    script.pieces = [*deltas("So far so good"), error("The server is shutting down.")]
    answer = ask_to_end(page)
    expect(answer.locator(".markdown")).to_have_text("So far so good")
    expect(answer.locator(".note")).to_have_text("The server is shutting down.")


def test_a_stream_without_its_end_is_not_taken_for_an_answer(page: Page, script: Script) -> None:
    script.pieces, script.is_whole = deltas("So far so good"), False
    note = ask_to_end(page).locator(".note")
    expect(note).to_have_text("The connection closed before the answer was complete.")


def test_a_server_that_is_gone_is_said_to_be(page: Page) -> None:
    expect(page.locator("#model")).to_have_text(MODEL)
    page.route("**/v1/**", lambda route: route.abort())
    expect(ask_to_end(page).locator(".note")).to_have_text("The server cannot be reached. Is it running?")


def test_a_key_is_asked_for_and_kept_in_the_tab(
    open_page: Callable[..., Page], script: Script, keep: Callable[[Page, str], None]
) -> None:
    script.key, script.pieces = "correct-key", deltas("Welcome.")
    page = open_page()
    field = page.get_by_label("API key")
    field.fill("wrong-key")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The key given was refused.")).to_be_visible()
    keep(page, "key")
    page.get_by_role("button", name="Not now").click()
    expect(page.locator("#model")).to_have_text("key needed")
    answer = ask(page)
    field.fill("correct-key")
    page.get_by_role("button", name="Continue").click()
    expect(answer.locator(".markdown")).to_have_text("Welcome.")
    expect(answer).to_have_attribute("aria-busy", "false")
    page.reload()
    expect(page.locator("#model")).to_have_text(MODEL)
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("() => localStorage.length + document.cookie.length") == 0


# -- reading and typing -----------------------------------------------------------------------------------


SHOWS_FOCUS = """(control) => {
    const outlined = (element) => getComputedStyle(element).outlineStyle === 'solid';
    const card = control.closest('.card');
    const accent = getComputedStyle(document.querySelector('#send')).backgroundColor;
    return outlined(control) || (control.type === 'radio' && outlined(control.nextElementSibling))
        || (control.id === 'message' && getComputedStyle(card).borderColor !== getComputedStyle(
            document.querySelector('header')).borderBottomColor);
}"""


def test_the_keyboard_is_enough(page: Page, script: Script) -> None:
    script.pieces = [*deltas("A", REASONING), HOLD]
    box = page.get_by_label("Message", exact=True)
    expect(box).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_label("Low")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".markdown")).to_have_text("A")
    assert script.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert script.asked[0]["reasoning_effort"] == "low"
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    page.locator("summary").focus()
    page.keyboard.press("Space")
    expect(page.locator(".reasoning")).to_be_visible()
    page.locator(".skip").focus()
    order: list[str] = []
    for _ in range(9):
        focused = page.locator(":focus")
        assert focused.evaluate(SHOWS_FOCUS), order
        order.append(
            focused.get_attribute("id") or focused.get_attribute("value") or focused.text_content() or ""
        )
        page.keyboard.press("Tab")
    assert order.pop(4).startswith("Thought for")
    first = ["Skip to the message", "open-settings", "start-over"]
    assert order == [*first, "Edit", "Copy", "Retry", "message", "low"]
    expect(page.get_by_role("button", name="Send")).to_be_focused()


def test_an_empty_message_is_not_sent(page: Page, script: Script) -> None:
    page.get_by_label("Message", exact=True).fill(" \n ")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").click(force=True)
    expect(page.locator("article")).to_have_count(0)
    assert script.asked == []


def test_a_listener_hears_of_starts_and_ends_and_not_of_tokens(page: Page, script: Script) -> None:
    script.pieces = deltas("word " * 200, REASONING, size=1)
    page.evaluate(
        """() => {
            window.heard = [];
            const region = document.querySelector('[aria-live]');
            new MutationObserver(() => heard.push(region.textContent)).observe(region, { childList: true });
        }"""
    )
    ask_to_end(page)
    assert page.evaluate("() => heard") == ["Waiting for the answer.", "The answer is complete."]


def test_the_end_is_followed_until_the_reader_scrolls_up(page: Page, script: Script) -> None:
    paragraphs = "A line that is read.\n\n" * 60
    script.pieces = [*deltas(paragraphs, size=50), HOLD, *deltas(paragraphs, size=50)]
    answer = ask(page)
    expect(answer.locator("p").nth(59)).to_be_in_viewport()
    page.mouse.move(500, 300)
    page.mouse.wheel(0, -600)
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    before = page.evaluate("() => scrollY")
    script.go.set()
    expect(answer).to_have_attribute("aria-busy", "false")
    assert page.evaluate("() => scrollY") == before
    latest.click()
    expect(answer.locator(".stats")).to_be_in_viewport()
    expect(latest).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_all_without_scrolling_sideways(
    open_page: Callable[..., Page], script: Script, keep: Callable[[Page, str], None], scheme: str
) -> None:
    page = open_page(**PHONE, color_scheme=scheme)
    keep(page, f"telephone-{scheme}-empty")
    long = "Donaudampfschifffahrtsgesellschaft" * 4
    script.pieces = deltas(
        f"{ANSWER}\n\n# {long}\n\n`{long}` {long} https://example.org/{long}\n\n> {long}", long
    )
    page.get_by_label("Message", exact=True).fill(f"Explain the tides and {long}")
    page.get_by_role("button", name="Send").tap()
    answer = page.locator("article.answer")
    expect(answer).to_have_attribute("aria-busy", "false")
    answer.locator("summary").tap()
    widths = "() => [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    assert page.evaluate(widths) == [320, 320, 320]
    pre = answer.locator("pre")
    assert pre.evaluate("(box) => box.scrollWidth > box.clientWidth")
    for control in page.locator("button:visible, summary, fieldset label").all():
        box = control.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 320
    pre.scroll_into_view_if_needed()
    keep(page, f"telephone-{scheme}-answered")
    page.get_by_role("button", name="Settings").tap()
    assert page.evaluate(widths) == [320, 320, 320]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_stands_out_from_what_is_behind_it(
    browser: Browser, url: str, scheme: str
) -> None:
    page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url)
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ['ink', 'muted', 'accent', 'fault', 'on-accent', 'paper', 'card', 'shade'];
            return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
        }"""
    )
    page.close()

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    pairs = [
        (text, back) for text in ("ink", "muted", "accent", "fault") for back in ("paper", "card", "shade")
    ]
    for text, back in [*pairs, ("on-accent", "accent")]:
        dark, light = sorted((luminance(colours[text]), luminance(colours[back])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back)


# -- Markdown ---------------------------------------------------------------------------------------------


def test_hostile_markdown_runs_nothing_and_asks_nobody(page: Page, script: Script) -> None:
    script.pieces = deltas(HOSTILE, HOSTILE)
    answer = ask_to_end(page, HOSTILE)
    answer.locator("summary").click()
    expect(answer.locator(".reasoning")).to_contain_text("<script>alert(1)</script>")
    expect(page.locator(".said")).to_contain_text("<script>alert(1)</script>")
    names = page.evaluate(
        "() => [...new Set([...document.querySelectorAll('article *')].map((e) => e.localName))].sort()"
    )
    text = "a br button code details div figcaption figure footer h2 p pre span summary"
    assert set(names) <= {*text.split(), "table", "tbody", "td", "th", "thead", "tr"}
    for link in answer.locator("a").all():
        assert re.match("https?://", link.get_attribute("href") or "")
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        assert link.get_attribute("target") == "_blank"
    expect(answer.locator("a").filter(has_not_text="https")).to_have_text(["seven", "nine"])
    attributes = page.evaluate(
        "() => [...document.querySelectorAll('.markdown *')].flatMap((e) => e.getAttributeNames())"
    )
    assert set(attributes) <= {"class", "data-action", "dir", "href", "rel", "target", "type"}
    expect(answer.locator("figcaption span")).to_have_text('html"><script>alert(12)</script>')


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_text_is_drawn_at_once(bare_page: Page, name: str) -> None:
    took, depth = bare_page.evaluate(
        """(text) => {
            const box = document.querySelector('#log').appendChild(document.createElement('div'));
            box.className = 'markdown';
            const view = new MarkdownView(box);
            const started = performance.now();
            view.draw(text.slice(0, text.length - 1), true);
            view.draw(text, false);
            box.getBoundingClientRect();
            const took = performance.now() - started;
            let depth = 0;
            for (const leaf of box.querySelectorAll(':not(:has(*))')) {
                let levels = 0;
                for (let at = leaf; at !== box; at = at.parentElement) levels += 1;
                depth = Math.max(depth, levels);
            }
            box.remove();
            return [took, depth];
        }""",
        ABSURD[name],
    )
    assert took < 5000  # milliseconds: what is quadratic takes longer
    assert depth < 80


MARKDOWN = {
    "# One\n#### Four\n#none": "<h3>One</h3><h6>Four</h6><p>#none</p>",
    "a\nb\\\nc<br>d\n\ne": "<p>a<br>b<br>c<br>d</p><p>e</p>",
    "*a* _b_ **c** __d__ ***e*** ~~f~~": (
        "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong>"
        " <em><strong>e</strong></em> <s>f</s></p>"
    ),
    "***a** b* **c *d***": ("<p><em><strong>a</strong> b</em> <strong>c <em>d</em></strong></p>"),
    "2 * 3 * 4, a_b_c, **open, *** x, ****y****": "<p>2 * 3 * 4, a_b_c, **open, *** x, ****y****</p>",
    "\\*a\\* &lt;b&gt; &nbsp; &copy;": "<p>*a* &lt;b&gt; &nbsp; &amp;copy;</p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    '[a *b*](https://x.org/p_(q) "t") [c](/d) [e] [f](javascript:g)': (
        '<p><a href="https://x.org/p_(q)">a <em>b</em></a> [c](/d) [e] [f](javascript:g)</p>'
    ),
    "See (https://x.org/a_b(c)). <mailto:a@b.org>": (
        '<p>See (<a href="https://x.org/a_b(c)">https://x.org/a_b(c)</a>). '
        '<a href="mailto:a@b.org">mailto:a@b.org</a></p>'
    ),
    "[![i](https://x.org/i.png)](https://x.org)": '<p>[<a href="https://x.org/i.png">i</a>](<a href="https://x.org/">https://x.org</a>)</p>',
    "\\(a_1 * b_2 * c\\) and \\[x\\]": "<p><code>\\(a_1 * b_2 * c\\)</code> and <code>\\[x\\]</code></p>",
    "So\n\\[\n- a_1\n\\]\n$$b$$": "<p>So</p><div>\\[\n- a_1\n\\]</div><div>$$b$$</div>",
    "- a\n  b\n- c\nlazy\n\nend": "<ul><li><p>a<br>b</p></li><li><p>c<br>lazy</p></li></ul><p>end</p>",
    "1. a\n  - b\n    - c\n2. d": (
        '<ol start="1"><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li>'
        "<li><p>d</p></li></ol>"
    ),
    "3) a\n\n   b\n\n4) c": '<ol start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>',
    "- [ ] a\n- [x] b\n\t- c": ("<ul><li><p>☐ a</p></li><li><p>☑ b</p><ul><li><p>c</p></li></ul></li></ul>"),
    "a\n1. b\nc 2024. d\n- - -\n***": ('<p>a</p><ol start="1"><li><p>b<br>c 2024. d</p></li></ol><hr><hr>'),
    "> a\n> > b\n>\n> - c\nd": (
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li><p>c</p></li></ul></blockquote><p>d</p>"
    ),
    "| a | b |\n|:-:|---|\n| `c\\|d` | e | f |\n| g |\nend": (
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
        "<tr><td><code>c|d</code></td><td>e</td></tr><tr><td>g</td></tr></tbody></table></div><p>end</p>"
    ),
    "1. a\n   ~~~py x\n   \tb\n\n   ```\n   ~~~\n   c": (
        '<ol start="1"><li><p>a</p><figure><figcaption><span>py</span><button>Copy</button></figcaption>'
        "<pre><code>\tb\n\n```</code></pre></figure><p>c</p></li></ol>"
    ),
    "```\r\na\r\n```\r\nb\r\n": (
        "<figure><figcaption><span>text</span><button>Copy</button></figcaption>"
        "<pre><code>a</code></pre></figure><p>b</p>"
    ),
}


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_is_drawn_as_it_is_meant(bare_page: Page, text: str) -> None:
    assert drawn(bare_page, text) == MARKDOWN[text]


def test_text_that_grows_ends_as_text_drawn_at_once(bare_page: Page) -> None:
    for text in (ANSWER, HOSTILE, "\n\n".join(MARKDOWN), *MARKDOWN):
        for step in (1, 5):
            assert drawn(bare_page, text, step) == drawn(bare_page, text)


def test_what_is_drawn_stays_while_more_comes(bare_page: Page) -> None:
    kept = bare_page.evaluate(
        """() => {
            const box = document.createElement('div');
            const view = new MarkdownView(box);
            const parts = ['a\\n\\n```\\nb', 'b\\nc', '\\n```\\nd **e', ' f'];
            let text = '';
            let before = null;
            const kept = [];
            for (const part of parts) {
                text += part;
                view.draw(text, true);
                const code = box.querySelector('code');
                const nodes = [box.querySelector('p'), code, code.firstChild];
                kept.push(before === null || nodes.every((node, index) => node === before[index]));
                before = nodes;
            }
            return [...kept, box.querySelector('strong').textContent];
        }"""
    )
    assert kept == [True, True, True, True, "e f"]


# -- what is served ---------------------------------------------------------------------------------------


def test_the_page_is_one_document_under_a_strict_policy(url: str) -> None:
    with urllib.request.urlopen(url + "/") as response:
        document, headers = response.read().decode(), response.headers
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "unsafe" not in headers["content-security-policy"]
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert len(policy["script-src"].split()) == document.count("<script>") == document.count("</script>")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert re.findall(r'(?:src|href)="(?!#|data:)', document) == []
    again = urllib.request.Request(url + "/", headers={"If-None-Match": headers["etag"]})
    with pytest.raises(HTTPError, match="304"):
        urllib.request.urlopen(again)
