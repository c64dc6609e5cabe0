"""Other APIs' own clients against a real server. Each official client has an environment of its own, which `make test-clients` makes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import InferenceClient

if TYPE_CHECKING:
    from conftest import Server

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).parent / "clients"


@pytest.mark.parametrize("name", sorted(path.stem for path in CLIENTS.glob("*.txt")))
def test_an_official_client(server: Server, name: str) -> None:
    run_client(name, server.url)


@pytest.mark.slow
def test_anthropics_client_with_a_model_that_thinks(starter: Any) -> None:
    """The demo model does not, but its prompts may end with the mark that makes all that follows thoughts."""
    thinks = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content or '' }}\n{% endfor %}<think>\n"
    server = starter("--reasoning-parser", "qwen3", "--chat-template", thinks)
    run_client("anthropic", server.url, "thinking")


def run_client(name: str, *arguments: str) -> None:
    python = ROOT / ".venv-clients" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python.relative_to(ROOT)} is not there: `make test-clients` makes it")
    command = [python, CLIENTS / f"{name}_client.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout


def test_hugging_faces_client_generates(server: Server) -> None:
    """TGI's API, by the client that transformers brings along."""
    client = InferenceClient(model=server.url)
    ask = {"prompt": "The water runs", "max_new_tokens": 12}
    text = client.text_generation(**ask)  # type: ignore[call-overload]
    assert text
    told = client.text_generation(**ask, details=True)  # type: ignore[call-overload]
    assert told.generated_text == text
    reason, count = told.details.finish_reason, told.details.generated_tokens
    assert [token.special for token in told.details.tokens] == [False] * (count - 1) + [reason == "eos_token"]
    end = (
        told.details.tokens[-1].text if reason == "eos_token" else ""
    )  # without details this client shows special tokens, as it does with TGI
    assert "".join(client.text_generation(**ask, stream=True)) == text + end  # type: ignore[call-overload]
    events = list(client.text_generation(**ask, stream=True, details=True))  # type: ignore[call-overload]
    assert "".join(event.token.text for event in events if not event.token.special) == text
    assert (events[-1].generated_text, events[-1].details.generated_tokens) == (text, count)
    stop = text[2:5]
    assert client.text_generation(**ask, stop=[stop]) == text[: text.index(stop) + 3]  # type: ignore[call-overload]
    full = client.text_generation(**ask, return_full_text=True, decoder_input_details=True, details=True)  # type: ignore[call-overload]
    assert full.generated_text == ask["prompt"] + text
    assert full.details.prefill[0].logprob is None
    drawn = [client.text_generation(**ask, do_sample=True, seed=7) for _ in range(2)]  # type: ignore[call-overload]
    assert drawn[0] == drawn[1]


def test_a_running_request_is_cancelled_from_outside(server: Server) -> None:
    ask = {"model": "brook", "prompt": "The water", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=ask, headers={"x-request-id": "to-be-cancelled"}) as reply:
        rest = reply.iter_lines()
        next(rest)
        assert server.client.delete("/v1/requests/to-be-cancelled").status_code == 200
        said = [line for line in rest if line]
    assert '"code":"cancelled"' in said[-1]
    assert server.client.delete("/v1/requests/to-be-cancelled").status_code == 404
    assert server.until(lambda: server.metric("penstock_requests") == 0)


def test_server_info_of_a_real_server(server: Server) -> None:
    told = server.client.get("/server_info").json()
    assert told["pools"][0]["engine"]["max_model_len"] == server.client.get("/info").json()["max_total_tokens"]
