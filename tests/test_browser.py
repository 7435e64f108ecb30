"""The page in a browser: no script error, no external request, no layout shift, contrast, keyboard, no JavaScript needed.

Needs Playwright and Chromium; `scripts/browser-test` brings both where it can and runs this.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.test_page import LISTENING, POLICY, address
from tests.test_service import RUN, Running, replicas, serving
from tinker_sync.sandbox import Fault, adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Site

pytestmark = pytest.mark.browser

CONTRAST = """() => {
  const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 4 && n[3] === 0 ? null : n.slice(0, 3); };
  const ground = (element) => { for (let e = element; e; e = e.parentElement) {
    const found = parse(getComputedStyle(e).backgroundColor); if (found) return found; }
    return parse(getComputedStyle(document.documentElement).backgroundColor) || [255, 255, 255]; };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.offsetParent || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    seen += 1;
    const a = light(parse(getComputedStyle(element).color)), b = light(ground(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([ratio.toFixed(2), element.className, element.textContent.slice(0, 40)]);
  }
  return { seen, bad };
}"""
SHIFT = """() => { window.shift = 0; new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shift += entry.value; }).observe({ type: "layout-shift", buffered: true }); }"""


@pytest.fixture
def site(outside: Site) -> Site:
    """The service is a process of its own."""
    return outside


@contextmanager
def shown(site: Site) -> Iterator[tuple[Running, str]]:
    """A service with something of everything on its page."""
    now = site.sandbox.account.now()
    for n in range(70):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n % 7), time=now - timedelta(days=8, minutes=-n))
    for n in range(20):
        site.sandbox.account.add(
            f"run-{n:02}:train:0", "final", "sampler", payload=adapter(n % 7), time=now - timedelta(days=n)
        )
    site.sandbox.account.add(RUN, "<b>broken", payload=adapter(0), ttl=timedelta(hours=4))
    site.sandbox.account.add(RUN, "slow", payload=adapter(0, pad_to=40_000_000), ttl=timedelta(hours=5))
    gone = site.sandbox.account.add("run-00:train:0", "gone", payload=adapter(0)).path
    site.sandbox.faults.append(Fault("archive", "status", status=500, match="broken"))
    site.sandbox.faults.append(Fault("storage", "slow", seconds=0.1, match="slow"))
    with serving(site, LISTENING + POLICY) as service:
        url = address(service)
        service.until(lambda: len(replicas(site)) >= 70 and site.directory(gone).exists(), 60)
        del site.sandbox.account.checkpoints[gone]
        service.until(lambda: "transfer.failed" in service.log, 60)
        yield service, url


@contextmanager
def browser(**options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page, and what went wrong on it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        page = chromium.new_context(**options).new_page()
        troubles: list[str] = []
        page.on(
            "console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if "127.0.0.1" in request.url or request.url.startswith("data:") else troubles.append(request.url)
            ),
        )
        yield page, troubles
        chromium.close()


def picture(page: Any, name: str) -> None:
    """A screenshot, where somebody wants to look."""
    directory = os.environ.get("SCREENSHOTS")
    if directory:
        page.screenshot(path=str(Path(directory) / f"{name}.png"), full_page=True)


@pytest.mark.timeout(300)
def test_the_page_in_a_browser(site: Site) -> None:
    """Light and dark, wide and narrow, with and without JavaScript, by mouse and by keyboard, while it changes."""
    with shown(site) as (service, url):
        for scheme in ("light", "dark"):
            for width in (1200, 390):
                with browser(color_scheme=scheme, viewport={"width": width, "height": 900}) as (page, troubles):
                    page.goto(url)
                    for path in ("", page.locator("h3 a").first.get_attribute("href")):
                        page.goto(url + path)
                        assert page.evaluate("document.documentElement.scrollWidth") <= width, (scheme, width, path)
                        found = page.evaluate(CONTRAST)
                        assert found["seen"] > 20
                        assert found["bad"] == [], (scheme, width, path)
                        picture(page, f"{scheme}-{width}-{'run' if path else 'page'}")
                assert troubles == []

        with browser(viewport={"width": 1200, "height": 900}) as (page, troubles):
            page.goto(url)
            page.evaluate(SHIFT)
            assert page.locator("h1").inner_text().endswith("Not well")
            assert page.locator("b").filter(has_text="<b>broken").count() >= 1  # text, and no element
            mark = page.locator(".line .mark").nth(2)
            tip = mark.locator(".tip")
            assert not tip.is_visible()
            mark.hover()
            assert tip.is_visible()
            page.mouse.move(0, 0)
            line = page.locator(".line").first
            line.locator("a[tabindex='0']").focus()
            page.keyboard.press("ArrowLeft")
            focused = page.evaluate("document.activeElement.querySelector('.tip').offsetParent !== null")
            assert focused
            picture(page, "keyboard")
            page.keyboard.press("Escape")
            # it renews itself, in place: what did not change keeps its very nodes
            page.evaluate("document.querySelector('#growth').firstElementChild.mine = true")
            before = page.locator("#numbers").inner_text()
            for n in range(3):
                site.sandbox.account.add("run-00:train:0", f"new-{n}", payload=adapter(n))
            page.wait_for_function(
                "(before) => document.querySelector('#numbers').innerText !== before", arg=before, timeout=20_000
            )
            time.sleep(6)
            assert page.evaluate("window.shift") < 0.1
            assert page.locator("#stale").is_hidden()
            service.end()
            page.wait_for_selector("#stale", state="visible", timeout=15_000)  # old news is not shown as news
            assert [trouble for trouble in troubles if "ERR_CONNECTION_REFUSED" not in trouble] == []


@pytest.mark.timeout(200)
def test_everything_is_there_without_javascript(site: Site) -> None:
    """The same text; older runs and checkpoints by links; hover and focus show the reasons."""
    with shown(site) as (service, url):
        with browser(java_script_enabled=False) as (page, troubles):
            page.goto(url)
            assert page.locator("meta[http-equiv=refresh]").count() == 1
            assert "70 of" in page.locator("#runs").inner_text() or "71 of" in page.locator("#runs").inner_text()
            page.locator(".line .mark").nth(1).hover()
            assert page.locator(".line .mark").nth(1).locator(".tip").is_visible()
            page.get_by_role("link", name="older").click()
            assert "page 2 of 2" in page.locator("#runs").inner_text()
            page.go_back()
            page.locator(".earlier").first.click()
            assert page.locator("tr[id]").count() >= 72
            assert troubles == []
        service.end()
