"""Text and engine in one process: the wiring under the Python API."""

from __future__ import annotations

import queue
import threading
from typing import Any

import msgspec
import pytest

from penstock.core.actors.text import TextActor
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.processes.kernel import LocalServer
from penstock.core.processes.local import LOCAL_EDGE
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import CheckpointError, ConfigError, EngineFailure, PenstockError
from penstock.core.protocol.messages import Answer, Drain, Drained, Finished, Message, Query, Submit, TextDelta, Vitals
from penstock.core.protocol.sampling import SamplingParams


class Client:
    """Collects what comes out, by thread-safe queue."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Message] = queue.Queue()
        self.failures: queue.Queue[PenstockError] = queue.Queue()

    def next(self, kind: type[Any]) -> Any:
        while True:
            message = self.messages.get(timeout=20)
            if isinstance(message, kind):
                return message

    def finish(self, key: int) -> tuple[str, list[int], Finished]:
        """Text and tokens of one request up to its Finished."""
        text, tokens = "", []
        while True:
            message = self.messages.get(timeout=20)
            if isinstance(message, TextDelta):
                at = 0
                for row, owner in enumerate(message.keys.tolist()):
                    count = int(message.counts[row])
                    if owner == key:
                        text += message.texts[row]
                        tokens += message.tokens[at : at + count].tolist()
                    at += count
            elif isinstance(message, Finished) and message.key == key:
                return text, tokens, message


def submit(key: int, **params: Any) -> Submit:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params})
    return Submit(key=key, edge=LOCAL_EDGE, rid=str(key), kind="completion", model="brook", sampling=sampling, prompt="One two three")


def server(client: Client, options: FakeOptions | None = None, **config: Any) -> LocalServer:
    return LocalServer(
        build(config), client.messages.put, on_failure=client.failures.put, device=FakeDevice(options or FakeOptions(vocab_size=1000))
    )


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_requests_queries_and_an_orderly_end(wiring: str) -> None:
    client = Client()
    with server(client, wiring=wiring) as local:
        assert local.facts is not None
        assert local.facts.architecture == "FakeForCausalLM"
        local.submit(submit(1))
        text, tokens, finished = client.finish(1)
        assert len(tokens) == 12
        assert text
        assert finished.output_tokens == 12
        local.submit(submit(2))
        assert client.finish(2)[:2] == (text, tokens)
        local.query(Query(id=7, edge=LOCAL_EDGE, what="models"))
        answer = client.next(Answer)
        assert answer.id == 7
        assert b"brook" in answer.body
    assert not any(thread.name in ("penstock", "device-0", "penstock-tokenizer") for thread in threading.enumerate())
    with pytest.raises(EngineFailure, match="closed"):
        local.submit(submit(3))
    local.close()
    assert client.failures.empty()


def test_cancel_ends_a_request() -> None:
    client = Client()
    with server(client, FakeOptions(vocab_size=1000, step_s=0.005)) as local:
        local.submit(msgspec.structs.replace(submit(1, max_tokens=2000), stream=True))
        client.next(TextDelta)
        local.cancel(1)
        local.submit(submit(2, max_tokens=5))
        assert client.finish(2)[2].output_tokens == 5


def test_many_threads_submit() -> None:
    client = Client()
    with server(client) as local:
        threads = [threading.Thread(target=lambda k=k: local.submit(submit(k, max_tokens=3))) for k in range(1, 21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = {client.next(Finished).key for _ in range(20)}
    assert done == set(range(1, 21))


def test_a_start_that_fails_raises_what_is_wrong() -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        server(Client(), FakeOptions(fail_load="no tensors")).start()
    with pytest.raises(ConfigError, match="there is no such folder"):
        server(Client(), model="/no/such/folder")
    with pytest.raises(ConfigError, match="scheduling"):
        server(Client(), scheduling_policy="none-such").start()


def test_a_device_that_fails_is_told_to_the_owner() -> None:
    client = Client()
    local = server(client, FakeOptions(vocab_size=1000, fail_at_step=2))
    local.start()
    local.submit(submit(1))
    failure = client.failures.get(timeout=20)
    assert isinstance(failure, EngineFailure)
    assert "injected device fault" in failure.message
    with pytest.raises(EngineFailure, match="injected"):
        local.submit(submit(2))
    local.close()


def test_where_there_is_no_root_its_messages_are_not_in_the_wiring() -> None:
    with server(Client()) as local:
        routes = local.side.host.routes
        assert "root" not in routes
        assert Drained not in routes["text"]
        assert not local.side.actor.takes & {Drain, Vitals}
        assert {Drain, Vitals} < TextActor.takes


def test_several_tokens_a_step_make_the_same_text() -> None:
    def answer(**options: Any) -> tuple[str, list[int]]:
        client = Client()
        with server(client, FakeOptions(vocab_size=1000, **options)) as local:
            local.submit(submit(1, max_tokens=60, stop=["zz"], logprobs=1))
            text, tokens, _ = client.finish(1)
        return text, tokens

    assert answer(lookahead=5) == answer()
