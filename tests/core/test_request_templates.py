"""Templates of requests are rendered in a process of their own: whatever one does, it is that request's 400, and nobody waits for it."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from penstock.core.actors.text.worker import LONG, TokenizerWorker
from penstock.core.processes.templates import MOST_CHARS, FencedRenderer, TemplateSetup
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Encode, Encoded
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.runtime.clock import FakeClock
from penstock.plugins.renderers.jinja import JinjaRenderer
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

FOLDER = str(demo_folder())
SETUP = TemplateSetup([], False, "jinja", FOLDER)
ENDLESS = "{% set a = 'a' * 4000000 %}{% for b in a %}{% for c in a %}{% endfor %}{% endfor %}"
"""Without anything at which the sandbox looks at the clock."""


@pytest.fixture(scope="module")
def own() -> JinjaRenderer:
    return JinjaRenderer.load(FOLDER, None)


@pytest.fixture(scope="module")
def fenced(own: JinjaRenderer) -> Iterator[FencedRenderer]:
    renderer = FencedRenderer(own, SETUP, limit_s=2)
    yield renderer
    renderer.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def rendered(renderer: Any, template: str, text: str = "hi", **kwargs: Any) -> str:
    out = renderer.with_template(template).render(
        [{"role": "user", "content": text}], tools=None, add_generation_prompt=True, continue_final_message=False, kwargs=kwargs
    )
    assert isinstance(out, str)
    return out


def test_what_comes_out_is_what_the_renderer_itself_gives(fenced: FencedRenderer, own: JinjaRenderer) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }} {{ n }} {{ add_generation_prompt }}{% endfor %}"
    for text, n in (("hi", 1), ("Zürich 🙂 \x00", 10**40), ("x" * 300_000, [None, 1.5])):
        assert rendered(fenced, template, text, n=n) == rendered(own, template, text, n=n)
    assert fenced.templates == own.templates
    how: dict[str, Any] = {"tools": None, "add_generation_prompt": True, "continue_final_message": False, "kwargs": {}}
    assert fenced.render([{"role": "user", "content": "x"}], **how) == own.render([{"role": "user", "content": "x"}], **how)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x'.center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x'.rjust(10**10) }}",
        "{{ 'x'.zfill(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10**10) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x\ny' | indent(10000000000) }}",
        "{{ 'x ' * 1000 | wordwrap(1, wrapstring='y' * 4000000) }}",
        "{{ ('x ' * 100000) | wordwrap(1, wrapstring='y' * 4000000) }}",
        "{{ 'x'.expandtabs(10**9) ~ '\t'.expandtabs(10**9) }}",
        "{% set ns = namespace(a='a') %}{% for i in range(40) %}{% set ns.a = ns.a.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{{ (('a' * 4000000) | list | join('b' * 4000000)) }}",
        "{{ ('a' * 4000000).join(('a' * 4000000) | list) }}",
        "{{ 'a' * 10**10 }}",
        "{{ range(10**10) | list }}",
        "{{ [1] * 10**9 }}",
        "{{ 1 | batch(10**10, 1) | list }}",
        "{{ [1] | slice(10**8) | list }}",
        "{{ ('a' * 4000000).translate({97: 'b' * 4000000}) }}",
        "{{ " + "(" * 30_000 + ")" * 30_000 + " }}",
        "{{ lipsum(n=100000) }}",
        "{{ " + "1" * 65_000 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        f"{{{{ 'a' * 4000000 }}}}{{{{ 'a' * 4000000 }}}}{{{{ 'a' * {MOST_CHARS - 7_999_999} }}}}",
    ],
)
def test_a_template_that_takes_all_memory_is_refused(fenced: FencedRenderer, template: str) -> None:
    with pytest.raises(InvalidRequest, match=r"chat.template") as caught:
        rendered(fenced, template)
    assert caught.value.param == "chat_template"
    assert all(psutil.Process(pid).memory_info().rss < 1 << 30 for pid in children())
    assert rendered(fenced, "{{ messages[0].content }}") == "hi"


def test_a_template_that_takes_all_time_is_refused(own: JinjaRenderer) -> None:
    renderer = FencedRenderer(own, SETUP, limit_s=0.5)
    try:
        assert rendered(renderer, "{{ messages[0].content }}") == "hi"
        with pytest.raises(InvalidRequest, match=r"chat_template cannot be used: it takes more than 0\.5 seconds") as caught:
            rendered(renderer, ENDLESS)
        assert caught.value.param == "chat_template"
        assert rendered(renderer, "{{ messages[0].content }}!") == "hi!"
    finally:
        renderer.close()
    with pytest.raises(InvalidRequest):
        rendered(renderer, "{{ messages[0].content }}")


def test_who_breaks_a_child_waits_for_the_next(own: JinjaRenderer) -> None:
    """And nobody is blamed for the time that a first start takes."""
    before = children()
    renderer = FencedRenderer(own, SETUP, limit_s=0.5)
    try:
        assert renderer.starting_s() == 0
        assert rendered(renderer, "{{ messages[0].content }}") == "hi"
        assert renderer.starting_s() > 0
        assert rendered(renderer, "{{ messages[0].content }}") == "hi"
        assert renderer.starting_s() == 0
        [first] = children() - before
        with pytest.raises(InvalidRequest):
            rendered(renderer, ENDLESS)
        [second] = children() - before
        assert second != first
        assert renderer.starting_s() == 0, "it was its own fault"
    finally:
        renderer.close()


def test_who_is_at_fault_is_named(fenced: FencedRenderer) -> None:
    for template, param in (
        ("{{ raise_exception('no') }}", "messages"),
        ("{{ nothing.at.all }}", "chat_template"),
        ("{{ 1 + 'a' }}", "chat_template"),
        ("{% if %}", "chat_template"),
        ("{{ ''.__class__ .x }}", "chat_template"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            rendered(fenced, template)
        assert caught.value.param == param, template


def test_half_a_surrogate_pair_harms_nothing(fenced: FencedRenderer) -> None:
    assert rendered(fenced, "{{ messages[0].content }}") == "hi"
    before = children()
    assert rendered(fenced, "{{ '\\ud800' }}") == "\ud800", "the tokenizer's affair"
    assert rendered(fenced, "{{ messages[0].content }}\ud800", "\udfff") == "\udfff\ud800"
    for template in ("{{ raise_exception('\\ud800') }}", "{{ raise_exception('\ud800') }}", "{{ messages['\\ud800'].a }}", "{% \ud800 %}"):
        with pytest.raises(InvalidRequest, match=r"\?|ud800"):
            rendered(fenced, template)
    assert children() == before, "no child died of it"


def test_nobody_waits_for_somebodys_template(own: JinjaRenderer) -> None:
    before = children()
    renderer = FencedRenderer(own, SETUP, limit_s=20)
    done: queue.SimpleQueue[Encoded] = queue.SimpleQueue()
    worker = TokenizerWorker(HuggingFaceTokenizer.load(FOLDER), renderer, done.put)
    try:
        messages = [{"role": "user", "content": "hi"}]
        for job in range(5):
            worker.submit(Encode(job=job, kind="chat", messages=json.dumps(messages).encode(), chat_template=ENDLESS))
        time.sleep(0.5)
        started = time.monotonic()
        for job, size in ((100, 1), (101, LONG)):
            worker.submit(Encode(job=job, kind="completion", prompt="a " * size))
        assert {done.get(timeout=5).job for _ in range(2)} == {100, 101}
        assert time.monotonic() - started < 2, "of which a busy machine takes most"
    finally:
        renderer.close()
        worker.close()
    late = [done.get(timeout=5) for _ in range(5)]
    assert {encoded.error_param for encoded in late} == {"chat_template"}
    assert children() <= before


class Gate:
    """A renderer whose templates take as long as a test says."""

    templates = {"default": "own"}  # noqa: RUF012

    def __init__(self) -> None:
        self.began: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.gates: dict[str, threading.Event] = {}

    def render(self, messages: list[dict[str, Any]], **how: Any) -> str:
        return "own"

    def with_template(self, template: str) -> Any:
        self.began.put(template)
        if template.startswith("slow"):
            assert self.gates.setdefault(template, threading.Event()).wait(20)
        return self


def test_templates_take_turns() -> None:
    """One client's slow templates have one of the places; what is known to be quick has the other, and another client comes after the one that runs."""
    gate = Gate()
    for number in range(4):
        gate.gates[f"slow{number}"] = threading.Event()
    done: queue.SimpleQueue[Encoded] = queue.SimpleQueue()
    clock = FakeClock()
    worker = TokenizerWorker(HuggingFaceTokenizer.load(FOLDER), gate, done.put, clock=clock)
    jobs = 0

    def submit(template: str, owner: str) -> int:
        nonlocal jobs
        jobs += 1
        worker.submit(Encode(job=jobs, kind="chat", messages=b'[{"role":"user","content":"a"}]', chat_template=template, owner=owner))
        return jobs

    try:
        hot = submit("hot", "good")
        assert done.get(timeout=10).job == hot
        for number in range(3):
            submit(f"slow{number}", "bad")
        assert [gate.began.get(timeout=10) for _ in range(2)] == ["hot", "slow0"]
        for _ in range(3):
            hot = submit("hot", "good")
            assert done.get(timeout=10).job == hot
            assert gate.began.get(timeout=10) == "hot"
        own = submit("own", "good")
        assert done.get(timeout=10).job == own, "the model's own template waits for no turn"
        submit("new", "good")
        clock.advance(5)
        gate.gates["slow0"].set()
        assert gate.began.get(timeout=10) == "new"
        assert gate.began.get(timeout=10) == "slow1"
    finally:
        for event in gate.gates.values():
            event.set()
        worker.close()
    assert done.qsize() == 4, "what waits at the end is still answered"
