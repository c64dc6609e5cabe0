"""Plugins' actors in real processes: they find each other over the links, also after a process was replaced."""

from __future__ import annotations

from typing import Any


def test_actors_of_text_and_engine_talk_and_go_on_talking_to_the_next_engine(begin: Any) -> None:
    server = begin(plugin="echo_actors").ready()
    server.wait_event("heard hello far 0.1")
    server.children()["engine"].kill()
    server.wait_event("heard hello far 0.2")
    assert server.complete().status_code == 200
    warnings = [e for e in server.events() if "'echo.nobody' is dropped" in e.get("event", "")]
    assert [(e["event"].split(":")[0], e["process"]) for e in warnings] == [
        ("an extension of the kind 'echo.nobody' is dropped", "engine-0")  # one for each life of an engine
    ] * 2
