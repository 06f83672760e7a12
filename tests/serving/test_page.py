"""The page in a real browser: a picture is dropped, a clip is made and plays, another is cancelled.

TRIP_SCREENSHOTS names a folder to put pictures of it in. Where there is no Chromium, the tests are skipped.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from pathlib import Path

import pytest
from server import picture, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run", "--disable-quic"]
DROP = """([name, data]) => {
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name, {type: 'image/png'}));
    document.getElementById('drop').dispatchEvent(new DragEvent('drop', {bubbles: true, dataTransfer: files}));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    bundle = os.environ.get("TRIP_SCREENSHOT_BUNDLE", str(tiny_bundle))
    with running(bundle, tmp_path_factory.mktemp("page") / "data", "--max-steps", "1000") as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page, which asks nobody but its server and has no errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    yield page
    assert errors == []
    assert all(url.startswith((server.url, "blob:", "data:")) for url in asked), asked
    context.close()


def screenshot(page, name):
    if folder := os.environ.get("TRIP_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=name == "serving-clip")


def drop(page, file=None):
    data = base64.b64encode(Path(file).read_bytes() if file else picture()).decode()
    page.evaluate(DROP, ["photo.png", data])
    page.locator("#preview").wait_for()


def test_a_picture_becomes_a_clip(page):
    drop(page, os.environ.get("TRIP_SCREENSHOT_PICTURE"))
    page.fill("#prompt", "a red ball rolls to the left")
    page.fill("#seed", "7")
    page.click("details summary")
    page.fill("#steps", "200")
    page.click("#make")
    seen = set()
    page.locator("#cancel").wait_for()
    while page.locator("#stage[data-state=clip]").count() == 0:
        seen.add(float(page.locator("#progress").get_attribute("value") or 0))
        if 30 < max(seen) < 70:
            screenshot(page, "serving-progress")
        page.wait_for_timeout(20)
    assert len(seen) > 3, seen  # it moved
    clip = page.locator("#clip")
    for _ in range(500):
        if clip.evaluate("video => video.currentTime > 0 && !video.paused && video.videoWidth > 0"):
            break
        page.wait_for_timeout(20)
    else:
        pytest.fail("the video does not play")
    assert "7" in page.locator("#facts").inner_text()
    page.locator("#wall li").first.wait_for()
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    page.wait_for_timeout(300)
    screenshot(page, "serving-clip")


def test_a_clip_is_cancelled(page, server):
    drop(page)
    page.fill("#prompt", "a red ball rolls")
    page.click("details summary")
    page.fill("#steps", "1000")
    page.click("#make")
    page.locator("#cancel").click()
    page.locator("#cancel").wait_for(state="hidden")
    assert re.search("cancel", page.locator("#status").inner_text(), re.I)
    assert server.ask("GET", "/v1/videos?limit=1")[1]["data"][0]["status"] == "cancelled"


def test_a_clip_keeps_going(page, server):
    """It plays on beyond its own frames, by another sentence once there is one, and leaves nothing behind."""
    before = [job["id"] for job in server.ask("GET", "/v1/videos?limit=100")[1]["data"]]
    drop(page)
    page.fill("#prompt", "a red ball rolls")
    page.select_option("#speed", "fast")
    page.click("#make")
    page.locator("#stage[data-state=clip]").wait_for()
    (made, *others) = [job["id"] for job in server.ask("GET", "/v1/videos?limit=100")[1]["data"]]
    assert others == before
    asked, shown = [], set()
    page.on("request", lambda request: asked.append(request) if request.url.endswith("/extensions") else None)
    page.click("#live")
    page.locator("#stage[data-state=frames]").wait_for()

    def watch(until):
        for _ in range(1500):
            shown.add(page.evaluate("document.getElementById('frames').toDataURL()"))
            if until():
                return
            page.wait_for_timeout(20)
        pytest.fail(f"{len(asked)} extensions, {len(shown)} frames: {page.locator('#status').inner_text()}")

    watch(lambda: len(asked) > 3 and len(shown) > 3 * 5)  # of 5 frames a clip
    first = asked[0].post_data_json
    assert (first["video"], first["from_frame"], first["prompt"]) == ({"id": made}, 4, "a red ball rolls")
    assert len({request.post_data_json["video"]["id"] for request in asked}) > 2
    page.fill("#prompt", "a red ball grows")
    page.keyboard.press("Enter")
    watch(lambda: asked[-1].post_data_json["prompt"] == "a red ball grows")
    said, count = len(asked), len(shown)
    watch(lambda: len(asked) > said + 1 and len(shown) > count + 5)
    assert page.locator("#wall li").count() == len([made, *before])
    page.click("#live")
    page.locator("#stage[data-state=clip]").wait_for()
    watch(lambda: [job["id"] for job in server.ask("GET", "/v1/videos?limit=100")[1]["data"]] == [made, *before])


def test_an_error_ends_a_clip_that_keeps_going(page, server):
    drop(page)
    page.fill("#prompt", "a red ball rolls")
    page.click("#make")
    page.locator("#stage[data-state=clip]").wait_for()
    page.click("details summary")
    page.fill("#guidance", "1000")
    page.click("#live")
    page.locator(".wrong #guidance").wait_for()
    page.locator("#stage[data-state=clip]").wait_for()
    assert page.locator("#live").inner_text() == "Keep going"
    assert "expected" in page.locator("#guidance-hint").inner_text()


def test_a_mistake_is_told_beside_its_field(page):
    drop(page)
    page.fill("#prompt", "a red ball rolls")
    page.fill("#seed", "-5")
    page.keyboard.press("Enter")
    page.locator(".wrong #seed").wait_for()
    assert "expected a whole number" in page.locator("#seed-hint").inner_text()


def test_by_keyboard_on_a_phone(browser, server):
    """An example, a sentence and Enter, without a mouse; nothing is wider than the screen."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", reduced_motion="reduce")
    page = context.new_page()
    page.goto(server.url)
    page.locator(".example").first.wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className").startswith("example"):
            break
    page.keyboard.press("Enter")
    page.locator("#preview").wait_for()
    assert page.input_value("#prompt")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.locator("#stage[data-state=clip]").wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#view").scroll_into_view_if_needed()
    screenshot(page, "serving-phone")
    context.close()
