"""A Chromium without a window, and what tests and the documentation's pictures do in the page at /.

What it is: `chromium()`, Debian's browser and its driver with a profile of its own, which ask nobody for anything; `Page`, one chat in it.
What it does not know: servers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP penstock.test 127.0.0.1",
)
WIDE = (1440, 900)


def need(program: str) -> str:
    """Its path. Where it is missing the test is skipped, but never in CI (.ci/run installs it)."""
    path = shutil.which(program)
    if path is None:
        assert os.environ.get("CI") != "true", f"{program} is missing: .ci/run installs it"
        pytest.skip(f"{program} is not installed")
    return path


@contextlib.contextmanager
def chromium() -> Iterator[Chrome]:
    program, driver = need("chromium"), need("chromedriver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = program
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options=options, service=Service(driver, env={**os.environ, "SE_OFFLINE": "true"}))
        browser.set_script_timeout(20)
        try:
            yield browser
        finally:
            browser.quit()


class Page:
    """The playground of a server, opened anew."""

    def __init__(self, browser: Chrome, url: str, *, scheme: str = "light", size: tuple[int, int] = WIDE, scale: float = 1) -> None:
        self.browser = browser
        self.look(scheme, size, scale)
        browser.get("about:blank")
        self.complaints()  # the page before may have had some
        browser.get(url)

    def look(self, scheme: str = "light", size: tuple[int, int] = WIDE, scale: float = 1, motion: str = "no-preference") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def wait(self, code: str, what: str, timeout_s: float = 15) -> Any:
        """The first true value of a JavaScript expression."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = self.js(f"return {code}")
            if value:
                return value
            assert time.monotonic() < deadline, f"{what}; the page says: {self.js('return document.body.innerText')[-1500:]}"
            time.sleep(0.02)

    def ready(self) -> Page:
        self.wait("document.getElementById('state').dataset.state === 'ready' && document.getElementById('model').value", "no server")
        return self

    def set(self, **fields: Any) -> None:
        """Fill in settings as a person would: the page sees an event."""
        for name, value in fields.items():
            key = "checked" if isinstance(value, bool) else "value"
            self.js(
                "const e = document.getElementById(arguments[0]); e[arguments[1]] = arguments[2];"
                "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true}));",
                *(name, key, value if key == "checked" else str(value)),
            )

    def type(self, text: str) -> None:
        """Into the message field, and Enter."""
        self.browser.find_element(By.ID, "prompt").send_keys(text, Keys.ENTER)

    def click(self, id: str) -> None:
        """As soon as it can be."""
        self.wait(f"(e => !e.hidden && !e.disabled && (e.click(), true))(document.getElementById({id!r}))", f"{id} cannot be clicked")

    def ask(self, text: str) -> str:
        """The text of the whole answer."""
        before = self.js("return document.querySelectorAll('.turn.assistant.over').length")
        self.type(text)
        self.wait(f"document.querySelectorAll('.turn.assistant.over').length > {before}", "no end of the answer")
        return self.said()

    def said(self) -> str:
        """Of the last answer, so far."""
        return str(self.js("return [...document.querySelectorAll('.turn.assistant:last-child .text')].map(e => e.textContent).join('|')"))

    def settled(self, seconds: float = 0.5) -> str:
        """Of the last answer, once nothing more of it has been drawn for `seconds`: what was on its way when somebody paused has come by then."""
        seen, since = self.said(), time.monotonic()
        deadline = since + 15
        while time.monotonic() - since < seconds:
            time.sleep(0.02)
            now = self.said()
            if now != seen:
                seen, since = now, time.monotonic()
            assert since < deadline, f"it goes on: {seen[-60:]!r}"
        return seen

    def texts(self, selector: str) -> list[str]:
        return list(self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """What the browser's console says, since it was last asked."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]  # type: ignore[no-untyped-call]
