"""The page at / in a real browser, against a real server: what it shows is what the API says, with every control, by keyboard, for everybody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_kit import Page, chromium
from conftest import Server, Starter
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

FLAGS = ("--edge-workers", "2", "--park-kv-s", "60")
"""What the page asks for comes to either HTTP process; what is paused keeps its place for as long as somebody looks."""
CHATS = "/v1/chat/completions"
CHECKS = (Path(__file__).parent / "browser_checks.js").read_text(encoding="utf-8")
LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 900}
"""A schema whose answers go on for seconds."""
TRANSPORTS = ("websocket", "sse")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser: Chrome, server: Server) -> Iterator[Page]:
    """Opened, and without a word of complaint in the console at the end: no error, no violation of its policy."""
    page = Page(browser, server.url).ready()
    yield page
    assert page.complaints() == []


def whole(server: Server, *turns: str, **fields: Any) -> str:
    """What the API answers in one piece to messages of the user and the assistant in turn."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
    reply = server.client.post(CHATS, json={"messages": messages, **fields})
    return str(reply.json()["choices"][0]["message"]["content"])


def idle(server: Server) -> bool:
    return server.metric("penstock_sequences", 'state="running"') == 0 == server.metric("penstock_sequences", 'state="parked"')


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_conversation_is_that_of_the_api(page: Page, server: Server, transport: str) -> None:
    page.set(transport=transport, temperature=0, seed=7, max_tokens=60)
    fields = {"temperature": 0, "seed": 7, "max_tokens": 60}
    first = page.ask("Count from 3 to 30.")
    assert first == whole(server, "Count from 3 to 30.", **fields)
    assert page.ask("What is 17 + 25?") == whole(server, "Count from 3 to 30.", first, "What is 17 + 25?", **fields)
    stats = page.texts(".turn.assistant:last-child .stats li")
    names = [stat.split(" ")[0] for stat in stats if not stat.startswith("speed")]  # which a reply has not that came in one go
    assert names == ["TTFT", "ITL", "P95", "tokens", "end"]
    assert stats[-1] == "end stop"
    assert "Answer: " + page.said() == page.js("return document.getElementById('announce').textContent")
    lanes = page.js("return [...document.querySelectorAll('#requests li:first-child .timeline [role=img]')].map(e => e.ariaLabel)")
    assert len(lanes) == 1
    for phase in ("received", "queued", "prefill", "decode", "finish", "the first token after"):
        assert phase in lanes[0]
    assert page.js("return document.querySelectorAll('#requests > li').length") == 2
    page.wait("document.getElementById('context').textContent.includes('of 4,096')", "no count of the context")


def test_a_system_prompt_stops_and_several_answers(page: Page, server: Server) -> None:
    page.set(system="You are terse.", stop="7|\\n\\n", n=2, temperature=1, seed=3)
    fields = {"n": 2, "temperature": 1, "seed": 3, "stop": ["7", "\n\n"]}
    messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Count from 3 to 30."}]
    reply = server.client.post(CHATS, json={"messages": messages, **fields}).json()
    assert page.ask("Count from 3 to 30.") == "|".join(choice["message"]["content"] for choice in reply["choices"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pause_resume_and_stop(page: Page, server: Server, transport: str) -> None:
    page.set(transport=transport, format="json_schema", schema=json.dumps(LONG), max_tokens=3000, temperature=0)
    page.type("Numbers, please.")
    page.wait("document.querySelector('.turn.assistant.streaming .text')?.textContent.length > 9", "nothing came")
    page.click("pause")
    page.wait("document.querySelector('.turn.assistant.paused')", "no pause")
    page.until(lambda: server.metric("penstock_sequences", 'state="parked"') == 1, "the server goes on")
    held = page.settled()
    assert page.js("return document.querySelector('.turn.assistant.paused') !== null"), "it was over before it was held"
    page.click("pause")
    page.wait(f"document.querySelector('.turn.assistant.streaming .text')?.textContent.length > {len(held)}", "it does not go on")
    page.click("stop-button")
    page.wait("document.querySelector('.turn.assistant.over')", "it does not stop")
    assert page.said().startswith(held)
    assert "end stopped" in page.texts(".stats li")
    assert "paused" in page.texts("#requests .legend")[0]
    assert page.complaints() == []
    page.set(format="", max_tokens=50)  # however much had come: that and this must fit the context
    assert page.ask("What is 17 + 25?").strip(), page.texts(".error:not([hidden])")
    page.until(lambda: idle(server), "something still runs")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_cancel(page: Page, server: Server, transport: str) -> None:
    page.set(transport=transport, format="json_schema", schema=json.dumps(LONG), max_tokens=3000)
    page.type("Numbers, please.")
    page.click("cancel")
    page.wait("document.querySelector('.turn.assistant.over')", "it does not end")
    assert "end cancelled" in page.texts(".stats li")
    page.until(lambda: idle(server), "something still runs")
    assert page.js("return document.getElementById('send').hidden") is False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_leaves_the_page_leaves_nothing_running(page: Page, server: Server, transport: str) -> None:
    page.set(transport=transport, format="json_schema", schema=json.dumps(LONG), max_tokens=3000)
    page.type("Numbers, please.")
    page.click("pause")
    page.wait("document.querySelector('.turn.assistant.paused')", "no pause")
    page.browser.get("about:blank")
    page.until(lambda: idle(server), "it waits for somebody")


def test_a_new_chat_knows_nothing_of_the_one_before(page: Page, server: Server) -> None:
    page.set(format="json_schema", schema=json.dumps(LONG), max_tokens=3000, temperature=0)
    page.type("Numbers, please.")
    page.wait("document.querySelector('.turn.assistant.streaming .text')?.textContent.length > 9", "nothing came")
    page.js("document.getElementById('new-chat').click()")
    page.wait("!document.getElementById('send').hidden", "it does not end")
    page.until(lambda: idle(server), "something still runs")
    page.set(format="", max_tokens="")
    assert page.ask("What is 17 + 25?") == whole(server, "What is 17 + 25?", temperature=0)
    assert page.js("return document.querySelectorAll('.turn').length") == 2


def test_a_schema(page: Page) -> None:
    page.set(format="json_schema", schema="{")
    assert "This is no JSON" in page.texts("#schema-error")[0]
    page.type("Invent a person.")
    page.wait("!document.getElementById('notice').hidden", "no word of the wrong schema")
    assert page.js("return document.activeElement.id") == "schema"
    assert page.js("return document.querySelectorAll('.turn.assistant').length") == 0, "nothing was sent"
    assert page.js("return document.getElementById('prompt').value") == "Invent a person."
    page.click("schema-example")
    assert page.texts("#schema-error") == [""]
    answer = json.loads(page.ask(""))
    assert answer.keys() == {"name", "age"}
    assert isinstance(answer["age"], int)


def test_a_tool_is_called_and_its_result_goes_back(page: Page) -> None:
    page.js("document.querySelector('[data-starter=tools]').click()")
    page.wait("document.querySelector('.turn.assistant.over .call')", "no call")
    assert page.texts(".call .name") == ["get_weather"]
    assert [json.loads(text) for text in page.texts(".call pre")] == [{"city": "Oslo"}]
    assert "end tool_calls" in page.texts(".stats li")
    page.js('document.querySelector(\'.results textarea\').value = \'{"temperature": 7, "condition": "rainy"}\'')
    page.js("document.querySelector('.results button').click()")
    page.wait("document.querySelectorAll('.turn.assistant.over').length === 2", "no answer to the result")
    assert "7" in page.said()
    assert "rainy" in page.said()


def test_an_error_is_shown_in_the_servers_words_and_leaves_the_conversation_as_it_was(page: Page, server: Server) -> None:
    page.set(temperature=-3)
    page.ask("What is 17 + 25?")
    refused = server.client.post(CHATS, json={"messages": [{"role": "user", "content": "hi"}], "temperature": -3}).json()["error"]
    [shown] = page.texts(".error:not([hidden])")
    assert refused["message"] in shown
    assert "(400, invalid_value, field temperature)" in shown
    assert page.js("return document.getElementById('announce').textContent").startswith("Error: temperature must be")
    assert page.js("return document.getElementById('prompt').value") == "What is 17 + 25?"
    page.set(temperature=0)
    assert page.ask("") == whole(server, "What is 17 + 25?", temperature=0)


def test_what_was_sent_can_be_sent_again_by_hand(page: Page, server: Server) -> None:
    answer = page.ask("What is 17 + 25?")
    page.js("document.querySelector('.raw').open = true")
    page.wait("document.querySelectorAll('.raw pre').length === 3", "no request is shown")
    curl, body, reply = page.texts(".raw pre")
    assert curl.startswith(f"curl -N '{server.url}{CHATS}'")
    sent = json.loads(body)
    assert json.dumps(sent, separators=(",", ":")) in curl
    chunks = [json.loads(line) for line in reply.splitlines()]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]) == answer
    again = server.client.post(CHATS, json={**sent, "stream": False, "stream_options": None}).json()
    assert again["choices"][0]["message"]["content"] == answer


def test_tokens_are_shaded_and_the_text_stays(page: Page) -> None:
    plain = page.ask("What is Penstock?")
    page.js("document.getElementById('new-chat').click()")
    page.set(logprobs=True)
    assert page.ask("What is Penstock?") == plain
    assert "".join(page.texts(".lp")) == plain
    assert all(title.endswith("%") for title in page.js("return [...document.querySelectorAll('.lp')].map(e => e.title)"))


def test_what_a_model_says_is_text_and_its_reasoning_stands_apart(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> & <b>bold</b>"
    kinds = page.browser.execute_async_script(
        """const [evil, done] = arguments;
        import(new URL("playground/answer.js", document.baseURI)).then(({Fold, Shown}) => {
          const fold = new Fold(), shown = new Shown(1);
          const call = {index: 0, id: "c", function: {name: evil, arguments: evil}};
          for (const delta of [{reasoning_content: evil}, {content: evil}, {content: evil}, {tool_calls: [call]}])
            fold.take({choices: [{index: 0, delta}]}), shown.show(fold);
          document.getElementById("turns").append(shown.element);
          const at = (s) => shown.element.querySelector(s);
          done([at(".thought"), at(".text"), at(".name"), at(".call pre")].map((e) => [e.textContent, e.childElementCount]).concat([at(".reasoning").hidden]));
        })""",
        evil,
    )
    assert kinds == [[evil, 0], [evil + evil, 0], [evil, 0], [evil, 0], False]
    assert page.ask(evil)
    assert page.js("return document.querySelectorAll('.turn img, .turn script, .turn b:not(.stats b)').length") == 0
    assert page.texts(".user article") == [evil]


def test_the_browser_holds_the_page_to_its_policy(page: Page) -> None:
    """Else an empty console would say nothing."""
    page.js(
        "const s = document.createElement('script'); s.textContent = 'window.bad = 1'; document.body.append(s);"
        "const d = document.createElement('p'); d.setAttribute('style', 'color: red'); document.body.append(d);"
    )
    assert page.js("return window.bad") is None
    page.wait("true", "the policy")
    said = " ".join(page.complaints())
    assert "script-src 'self'" in said
    assert "style-src 'self'" in said


# ------------------------------------------------------------------ the connection


def test_a_broken_connection_is_mended_without_a_gap(page: Page, server: Server) -> None:
    """The page's own WebSocket is closed in the middle of an answer."""
    page.set(temperature=0)
    page.type("Count from 3 to 90.")
    broken = page.browser.execute_async_script(
        """const done = arguments[0];
        import(new URL("playground/wire.js", document.baseURI)).then(({socket}) => {
          const look = () => document.querySelector(".streaming .text")?.textContent.length > 5 ? (socket.ws.close(), done(socket.streams.size)) : setTimeout(look, 1);
          look();
        })"""
    )
    assert broken == 1
    page.wait("document.querySelector('.turn.assistant.over')", "the answer has no end")
    assert page.said() == whole(server, "Count from 3 to 90.", temperature=0)
    assert page.js("return document.getElementById('notice').hidden")
    assert "decode" in page.texts("#requests .legend")[0], "the timings come with what is resumed"


def test_the_browsers_own_websocket_speaks_the_whole_protocol(page: Page, server: Server) -> None:
    told = page.browser.execute_async_script(CHECKS + "\nprotocol(arguments[0]).then(arguments[1], (e) => arguments[1](String(e)))", LONG)
    assert isinstance(told, dict), told
    assert told["protocol"] == "penstock.v1"
    assert told["seqs"] == list(range(1, len(told["seqs"]) + 1)), "behind what the first connection had comes the next one"
    assert told["first"] < len(told["seqs"]), "the first connection was closed before the end"
    assert told["text"] == whole(server, "Count from 3 to 90.", temperature=0)
    assert told["acks"] == ["pause", "resume", "stop"]
    assert told["stopped"] == "length", "a stopped answer that cannot obey its schema any more"
    assert (told["cancelled"]["status"], told["cancelled"]["error"]["code"]) == (499, "cancelled")
    assert (told["wrong"]["op"], told["wrong"]["status"]) == ("pause", 404)


def test_where_the_websocket_is_not_let_through_answers_come_as_events(browser: Chrome, server: Server) -> None:
    """A page of a named host, over HTTP: its WebSocket is refused where no keys are needed, and half of a browser's interfaces are not there."""
    page = Page(browser, server.url.replace("127.0.0.1", "penstock.test")).ready()
    assert page.complaints() == []
    assert page.js("return isSecureContext") is False
    page.set(temperature=0)
    assert page.ask("What is 17 + 25?") == whole(server, "What is 17 + 25?", temperature=0)
    assert page.texts("#notice") == ["The WebSocket could not be opened here, so answers come as server-sent events."]
    assert page.js("return document.getElementById('transport').value") == "sse"
    [refused] = page.complaints()
    assert "403" in refused
    page.js("document.querySelector('.raw').open = true")
    page.wait("document.querySelectorAll('.raw pre').length === 3", "no request is shown")
    page.js("document.querySelector('.raw-head button').click()")
    page.wait("document.querySelector('.raw-head button').textContent === 'Selected'", "it can be copied by hand")
    assert page.js("return getSelection().toString()").startswith("curl -N")


def test_a_dead_server_is_shown_as_such_and_found_again(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.url).ready()
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.wait("document.getElementById('state').dataset.state === 'dead'", "nobody notices")
    assert page.texts("#state-text") == ["The server does not answer. Trying again"]
    assert set(page.texts(".gauge b")) == {"–"}
    page.ask("hello")
    assert page.texts(".error:not([hidden])") == ["The server does not answer."]
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    page.ready()
    page.js("document.getElementById('prompt').value = ''")
    assert page.ask("hello") == whole(server, "hello")
    assert all("ERR_INTERNET_DISCONNECTED" in complaint for complaint in page.complaints())


def test_keys_and_a_path(browser: Chrome, starter: Starter) -> None:
    """The page needs none, and asks for it; it is kept for the tab, and nowhere else."""
    server = starter("--deterministic", "--api-key", "sécret", "--root-path", "/llm", "--max-retain-s", "0")
    page = Page(browser, f"{server.url}/llm")
    page.wait("document.getElementById('state').dataset.state === 'locked'", "no word of a key")
    assert page.js("return document.activeElement.id") == "key"
    page.set(key="wrong")
    page.ask("hello")
    assert page.texts(".error:not([hidden])") == ["The API key is not valid. (401)"]
    page.set(key="sécret")
    page.ready()
    page.js("document.getElementById('prompt').value = ''")
    assert page.ask("What is 17 + 25?").strip()
    assert page.texts("#notice") == ["This server does not keep streams, so an answer ends with its connection."]
    page.set(transport="sse")
    assert page.ask("What is 17 + 25?").strip()
    page.js("document.querySelector('.turn:last-child .raw').open = true")
    page.wait("document.querySelectorAll('.turn:last-child .raw pre').length", "no request is shown")
    assert "sécret" not in " ".join(page.texts(".raw pre"))
    assert "$PENSTOCK_API_KEY" in page.texts(".turn:last-child .raw pre")[0]
    browser.refresh()
    assert page.ready().js("return document.getElementById('key').value") == "sécret"
    assert page.js("return [document.cookie, localStorage.length]") == ["", 0]
    page.set(key="")
    page.complaints()  # a 401 stands in the console


def test_gauges_follow_the_server(page: Page, server: Server) -> None:
    assert len(page.texts(".gauge")) == 4
    page.set(format="json_schema", schema=json.dumps(LONG), max_tokens=3000)
    page.type("Numbers, please.")
    page.wait("document.querySelector('.turn.assistant.streaming')", "nothing came")
    page.click("pause")
    page.wait(
        "[...document.querySelectorAll('.gauge')].some(e => /^Running1/.test(e.textContent) && /1 parked/.test(e.textContent))", "no gauge"
    )
    total = server.metric("penstock_kv_blocks", 'state="total"')
    page.wait(f"[...document.querySelectorAll('.gauge')].some(e => e.textContent.includes('of {total:,.0f} blocks'))", "no KV cache")
    page.click("cancel")
    page.wait("[...document.querySelectorAll('.gauge')].some(e => /^Running0/.test(e.textContent))", "it is not seen to end")


# ------------------------------------------------------------------ for everybody


def test_by_keyboard_alone(page: Page) -> None:
    keys = ActionChains(page.browser)
    assert page.js("return document.activeElement.id") == "prompt"
    keys.send_keys("What is Penstock?").send_keys(Keys.ENTER).perform()
    page.wait("document.querySelector('.turn.assistant.over')", "no answer")
    page.set(format="json_schema", schema=json.dumps(LONG), max_tokens=3000)
    page.js("document.getElementById('prompt').focus()")
    ActionChains(page.browser).send_keys("Numbers").key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).send_keys(
        "please.", Keys.ENTER
    ).perform()
    page.wait("document.querySelector('.turn.assistant.streaming')", "nothing came")
    assert page.texts(".user article")[-1] == "Numbers\nplease."
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.wait("document.querySelectorAll('.turn.assistant.over').length === 2", "Escape does not stop it")
    assert "end stopped" in page.texts(".stats li")

    # Tab leads to all that can be used, in the order of the document, and each place is seen.
    page.js("document.activeElement.blur(); document.querySelectorAll('details').forEach((e) => (e.open = true))")
    page.browser.execute_script(CHECKS + "\nwindow.focusable = focusable; window.seen = seen; window.scrollTo(0, 0)")
    wanted = page.js("return focusable().map((e) => (e.dataset.n = focusable().indexOf(e)))")
    assert len(wanted) > 30
    visited = []
    page.js("document.querySelector('.skip').focus()")
    for _ in wanted:
        number, visible = page.js("const e = document.activeElement; return [Number(e.dataset.n ?? -1), seen(e)]")
        assert visible, page.js("return document.activeElement.outerHTML")
        visited.append(number)
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
    assert visited == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(page: Page, scheme: str) -> None:
    page.look(scheme)
    page.js("document.querySelector('[data-starter=tools]').click()")
    page.wait("document.querySelector('.turn.assistant.over .results')", "no call")
    page.set(temperature=-1, logprobs=True)
    page.ask("hello")
    page.set(temperature="", tools="", schema="{")
    page.js("document.getElementById('prompt').value = ''")
    page.ask("What is Penstock?")
    page.js("document.querySelectorAll('details').forEach((e) => (e.open = true)); document.getElementById('schema-field').hidden = false")
    page.js("document.getElementById('notice').hidden = false; document.getElementById('notice').textContent = 'A word.'")
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {
        "button",
        "textbox",
        "combobox",
        "spinbutton",
        "checkbox",
        "link",
        "DisclosureTriangle",
        "image",
        "list",
        "form",
        "region",
        "article",
    }
    named = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in nodes if not node.get("ignored")]
    controls = [one for one in named if one[0] in roles - {"list", "form"}]
    assert len(controls) > 40
    assert [one for one in controls if not one[1]] == []
    assert page.js(CHECKS + "\nreturn faint()") == []


def test_a_small_screen(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.url, size=(360, 700)).ready()
    page.js("document.querySelector('[data-starter=tools]').click()")
    page.wait("document.querySelector('.turn.assistant.over')", "no answer")
    for name in ("settings", "live"):
        page.click(f"show-{name}")
        assert page.js(f"return document.getElementById('show-{name}').ariaExpanded") == "true"
        assert page.js(f"return document.getElementById('{name}').getBoundingClientRect().width") <= 360
        assert page.js("return document.documentElement.scrollWidth") == 360
        ActionChains(browser).send_keys(Keys.ESCAPE).perform()
        assert page.js("return document.activeElement.id") == f"show-{name}"
        assert page.js(f"return getComputedStyle(document.getElementById('{name}')).display") == "none"
    assert page.js("return document.querySelector('#scroll').scrollWidth <= document.querySelector('#scroll').clientWidth")
    page.type("Count from 3 to 90.")
    page.wait("!document.getElementById('pause').hidden", "no controls")
    assert page.js("return document.documentElement.scrollWidth") == 360
    page.wait("document.querySelectorAll('.turn.assistant.over').length === 2", "no answer")
    assert page.complaints() == []


def test_who_wants_no_motion_gets_none(page: Page) -> None:
    blink = "return getComputedStyle(document.querySelector('.waiting article'), '::before').animationName"
    page.js("document.getElementById('turns').append(Object.assign(document.createElement('li'), {className: 'waiting'}));")
    page.js("document.querySelector('.waiting').append(document.createElement('article'))")
    assert page.js(blink) == "breathe"
    page.look(motion="reduce")
    assert page.js(blink) == "none"
