"""The search page in Chromium, as somebody uses it."""

import shutil
import urllib.parse

import pytest
from helpers.served_page import served
from helpers.small_index import EVIL, IMAGES, write_small_index
from helpers.tiny_gallery import jpeg

QUERY = "a small red circle above a blue square"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_typing_switching_and_dropping(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (tmp_path / "mine.jpg").write_bytes(jpeg(7))
    with served(write_small_index(tmp_path)) as page, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view, hosts = browser.new_page(), set()
        view.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).hostname))
        view.goto(page.url)
        view.get_by_label("Query").fill(QUERY)
        view.keyboard.press("Enter")
        figures = view.locator(".loopitr figure:visible")
        figures.nth(IMAGES - 1).wait_for()
        reranked = [each.get_attribute("title") for each in figures.all()]
        assert view.locator(".loopitr .up").count() > 0
        assert EVIL in view.locator(".loopitr").inner_text() and view.title() == "loopitr"  # No markup, no template.
        view.get_by_label("Rerank").uncheck()
        view.locator(".loopitr .up").first.wait_for(state="detached")
        assert reranked != [each.get_attribute("title") for each in figures.all()]
        assert figures.first.locator("img").evaluate("image => image.naturalWidth") > 0
        view.get_by_role("tab", name="By image").click()
        view.locator("input[type=file]").first.set_input_files(tmp_path / "mine.jpg")
        figures.first.wait_for()
        assert figures.first.get_attribute("title").endswith("/7.jpg") and view.locator("ol:visible li").count() == 10
        own = view.locator("img.loopitr-own")  # What was dropped, on the page.
        assert own.evaluate("image => image.naturalWidth") > 0 and own.get_attribute("src").startswith("data:")
        assert hosts <= {"127.0.0.1", None, ""}
        browser.close()
