"""An edge with two doors: requests find the text process of the model that they name, and ids lead back to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_kit import Edge, FakeText, finished, silent

from penstock.core.protocol.messages import Cancel, EdgeStats, Query, Submit
from penstock.core.protocol.pools import PoolSpec
from penstock.transports.ids import SHARDS, public_id, shard_of

POOLS = [
    PoolSpec(name="brook", models=["brook"], text=0, engines=[0]),
    PoolSpec(name="river", models=["river", "stream"], text=11, engines=[1, 2]),
]


class TwoDoors(Edge):
    """Brook's text process is `text`, river's `other`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {})
        self.pools = POOLS
        self.other = FakeText(str(folder / "text-11.sock"))
        self.other.answers["server_info"] = lambda _: (200, b'{"model":"river","fingerprint":"fp_river"}')

    async def _serve(self) -> None:
        await self.other.listen()
        try:
            await super()._serve()
        finally:
            self.other._server.close()  # type: ignore[union-attr]
            for link in list(self.other._links):
                link.close()


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[TwoDoors]:
    one = TwoDoors(tmp_path)
    one.start()
    one.wait(lambda: one.server.gateway.door("river").fingerprint is not None, "the second door")
    yield one
    one.stop()


def chat(edge: Edge, model: str | None, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], **more} | ({"model": model} if model else {})
    answer = edge.kept.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def models(text: FakeText) -> list[str]:
    return [message.model for message in text.received if isinstance(message, Submit)]


def test_requests_go_to_the_text_process_of_their_model_and_ids_lead_back_there(edge: TwoDoors) -> None:
    answers = {model: chat(edge, model) for model in ("brook", "river", "stream", "nobody", None)}
    assert models(edge.text) == ["brook", "nobody", "brook"]  # text says that there is no such model
    assert models(edge.other) == ["river", "stream"]
    doors = {door.pool.text: name for name, door in edge.server.gateway.doors.items()}
    for model, pool in (("brook", "brook"), ("river", "river"), ("stream", "river"), (None, "brook")):
        shard = shard_of(answers[model]["id"])
        assert shard is not None
        assert doors[shard] == pool
        assert answers[model]["system_fingerprint"] == ("fp_river" if pool == "river" else "fp_test")
    events = edge.kept.post("/v1/completions", json={"model": "river", "prompt": "x", "stream": True}).text
    assert "fp_river" in events
    assert models(edge.other)[-1] == "river"


def test_what_concerns_a_request_goes_through_its_own_door(edge: TwoDoors) -> None:
    edge.other.script = silent
    with edge.http() as http, http.stream("POST", "/v1/completions", json={"model": "river", "prompt": "x", "stream": True}):
        key = edge.other.wait_for(Submit)[0].key
    assert edge.other.wait_for(Cancel) == [Cancel(key=key, cause="disconnect")]
    edge.other.send(finished(key))  # of a request that is forgotten
    edge.kept.post("/tokenize", json={"model": "brook", "prompt": "x"})
    edge.wait(lambda: not edge.server.gateway.active, "the place to be given back")
    assert "tokenize" in [query.what for query in edge.text.wait_for(Query)]
    assert not [message for message in edge.text.received if isinstance(message, Cancel)]
    edge.text.wait_for(EdgeStats)  # counted once in all
    assert not [message for message in edge.other.received if isinstance(message, EdgeStats)]


def test_the_loss_of_one_text_process_ends_its_own_requests_only(edge: TwoDoors) -> None:
    edge.other.close_door()
    edge.other.drop_links()
    edge.wait(lambda: not edge.server.gateway.door("river").connected, "the link's end")
    refused = edge.kept.post("/v1/completions", json={"model": "river", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert chat(edge, "brook")["model"] == "brook"
    ready = edge.kept.get("/health/ready")
    assert ready.status_code == 503
    assert set(ready.json()["ages_s"]) == {"text-0"}


@pytest.mark.parametrize("shard", range(36))
def test_an_id_ends_with_its_shard(shard: int) -> None:
    public = public_id("chatcmpl-", "job-7:z", shard)
    assert public == f"chatcmpl-job-7:z{SHARDS[shard]}"
    assert shard_of(public) == shard


@pytest.mark.parametrize("foreign", ["", "chatcmpl-X", "chatcmpl-", "chatcmpl-a=", "\u0661"])
def test_an_id_without_a_shard_leads_nowhere(foreign: str) -> None:
    assert shard_of(foreign) is None
