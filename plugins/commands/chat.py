"""`penstock chat`: a conversation in the terminal, streamed, with Penstock or any other OpenAI server.

What it is: a small SSE client over httpx with a prompt loop. What it does not know: anything of a server beyond the OpenAI API.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click


def stream_chat(url: str, key: str | None, body: dict[str, Any]) -> Iterator[str]:
    """Yield the content deltas of one chat completion. Raises click.ClickException with the server's own message."""
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.stream(
            "POST", url + "/v1/chat/completions", json={**body, "stream": True}, headers=headers, timeout=httpx.Timeout(600, connect=5)
        ) as response:
            if response.status_code != 200:
                response.read()
                raise click.ClickException(error_text(response.status_code, response.text))
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                data = line[6:]
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise click.ClickException(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", []):
                    content = choice.get("delta", {}).get("content")
                    if content:
                        yield content
        raise click.ClickException("The stream ended before its end mark: the answer is incomplete.")
    except httpx.ConnectError:
        raise click.ClickException(f"No server answers at {url}. Start one with `penstock serve`, or name another with --url.") from None
    except httpx.HTTPError as error:
        raise click.ClickException(f"The connection to {url} broke: {error}.") from None
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _unsayable(url, error) from None


def _unsayable(url: str, error: Exception) -> click.ClickException:
    """The terminal may give what is no address, and no UTF-8."""
    return click.ClickException(f"{url!a} cannot be asked: {error}. See --url, --model and --api-key.")


def error_text(status: int, body: str) -> str:
    try:
        return f"{json.loads(body)['error']['message']} (status {status})"
    except (ValueError, KeyError, TypeError):
        return f"The server answered with status {status}: {body[:200]}"


def first_model(url: str, key: str | None) -> str:
    import httpx

    try:
        response = httpx.get(url + "/v1/models", headers={"authorization": f"Bearer {key}"} if key else {}, timeout=5)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _unsayable(url, error) from None
    except httpx.HTTPError:
        raise click.ClickException(f"No server answers at {url}. Start one with `penstock serve`, or name another with --url.") from None
    if response.status_code != 200:
        raise click.ClickException(error_text(response.status_code, response.text))
    return str(response.json()["data"][0]["id"])


@click.command()
@click.argument("question", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Base URL of an OpenAI server (without /v1).")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Key for the server; others can read a command line.")
@click.option("--model", help="Model name; default: the server's first.")
@click.option("--system", help="System message.")
@click.option("--temperature", type=float, help="Sampling temperature; default: the server's.")
@click.option("--max-tokens", type=int, help="Longest answer, in tokens.")
def chat(
    question: str | None,
    url: str,
    api_key: str | None,
    model: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
) -> None:
    """Chat in the terminal. With QUESTION: one answer, then leave. /new forgets the conversation, /exit leaves."""
    url = url.rstrip("/").removesuffix("/v1")
    settings: dict[str, Any] = {"model": model or first_model(url, api_key)}
    if temperature is not None:
        settings["temperature"] = temperature
    if max_tokens is not None:
        settings["max_tokens"] = max_tokens
    start: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if question is None and sys.stdin.isatty():
        click.secho(f"{settings['model']} at {url}   (/new: forget, /exit: leave)", dim=True)
    while True:
        try:
            text = question if question is not None else _read()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            messages = list(start)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        parts = []
        try:
            for part in stream_chat(url, api_key, {**settings, "messages": messages}):
                parts.append(part)
                click.echo(part, nl=False)
                sys.stdout.flush()
            click.echo()
        except KeyboardInterrupt:
            click.secho(" [stopped]", dim=True)
        except click.ClickException as error:
            if question is not None:
                raise
            messages.pop()
            click.secho(f"\n{error.message}", err=True, fg="red")
            continue
        messages.append({"role": "assistant", "content": "".join(parts)})
        if question is not None:
            return


def _read() -> str:
    return input("> " if sys.stdin.isatty() else "")
