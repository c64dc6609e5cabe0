"""Photographs the playground: `python docs/playground_pictures.py [URL]`, of a server with the demo model (`make run`).

What it is: two chats in a real browser, one in light and one in dark, while others ask the server too, and docs/playground-{light,dark}.png of them.
What it does not know: what the page is made of (transports/playground/), how a browser is started (tests/e2e/browser_kit.py).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "e2e"))
from browser_kit import Page, chromium  # noqa: E402  # beside the tests, which are no package

SIZE = (1440, 880)
READERS = 20
LIVELY = 'Number(document.querySelector(".spark polyline:not(.base)").getAttribute("points").split(" ").length) >= 16'


@contextmanager
def others(url: str) -> Iterator[None]:
    """Somebody else's requests, one after the other, so that the figures move."""
    over = threading.Event()

    def read(number: int) -> None:
        question = ("Tell me a story about a fox.", "Count from 3 to 60.", "Tell me a story about a clock.", "Name five birds.")[number % 4]
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.wait(number % 5 / 3):
                body = {"messages": [{"role": "user", "content": question}], "temperature": 1.1, "max_tokens": 160}
                client.post("/v1/chat/completions", json=body)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def main(url: str) -> None:
    with chromium() as browser, others(url):
        page = Page(browser, url, scheme="light", size=SIZE).ready()
        page.set(temperature=0.7, seed=4)
        page.ask("What is Penstock?")
        page.js("document.querySelector('[data-starter=tools]').click()")
        page.wait("document.querySelector('.turn.assistant.over .results')", "no call")
        page.js('document.querySelector(".results textarea").value = \'{"temperature": 7, "condition": "rainy"}\'')
        page.js("document.querySelector('.results button').click()")
        page.wait("document.querySelectorAll('.turn.assistant.over').length === 3", "no answer to the result")
        page.wait(LIVELY, "no figures", 40)
        page.js("for (const id of ['tools-group', 'format-group']) document.getElementById(id).open = false")
        browser.save_screenshot(str(HERE / "playground-light.png"))

        page = Page(browser, url, scheme="dark", size=SIZE).ready()
        page.set(system="You tell short stories.", temperature=1, seed=8, logprobs=True)
        page.ask("Tell me a story about a river.")
        page.set(logprobs=False)
        page.ask("What is 17 + 25?")
        page.wait(LIVELY, "no figures", 40)
        page.type("Count from 3 to 90.")
        page.wait("document.querySelector('.turn.assistant.streaming .text')?.textContent.length > 20", "nothing came")
        page.click("pause")
        page.wait("document.querySelector('.turn.assistant.paused')", "no pause")
        browser.save_screenshot(str(HERE / "playground-dark.png"))
        page.click("cancel")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
