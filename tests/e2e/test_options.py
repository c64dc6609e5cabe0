"""Options that only a whole server shows: keys that stand nowhere, several edges, defaults of sampling, what is logged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

CHAT = {"model": "brook", "messages": [{"role": "user", "content": "Count from 3 to 30."}]}


def test_keys_of_a_file_and_the_environment_stand_in_no_command_line_and_no_child(starter: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\nsk-of-the-file\n")
    file.chmod(0o644)
    server = starter("--api-key-file", str(file), "--api-server-count", "2", env={"VLLM_API_KEY": "sk-of-the-environment"})
    for key, status in (("sk-of-the-file", 200), ("sk-of-the-environment", 200), ("sk-other", 401), ("# the team's", 401)):
        assert server.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status
    children = server.children()
    assert {role: len(some) for role, some in children.items()} == {"edge": 2, "text": 1, "engine": 1}
    for process in [psutil.Process(server.process.pid), *(child for some in children.values() for child in some)]:
        assert not [word for word in process.cmdline() if "sk-" in word]
    for child in (child for some in children.values() for child in some):
        assert not [value for value in child.environ().values() if "sk-of" in value]
    log = server.log.read_text()
    assert "can be read by every user of this machine" in log
    assert "sk-of" not in log
    assert server.stop() == 0


def test_a_request_brings_its_template_and_no_unknown_field(starter: Any) -> None:
    server = starter("--trust-request-chat-template", "--strict-fields")
    ask = {"model": "brook", "temperature": 0, "max_tokens": 8, "return_token_ids": True}
    prompt = "user: What is 17 + 25?\nassistant:"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    chat = server.client.post("/v1/chat/completions", json={**ask, "messages": messages, "chat_template": template}).json()
    text = server.client.post("/v1/completions", json={**ask, "prompt": prompt, "add_special_tokens": False}).json()
    assert chat["prompt_token_ids"] == text["choices"][0]["prompt_token_ids"]
    assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"]
    ids = chat["prompt_token_ids"]
    tokens = server.client.post("/v1/completions", json={**ask, "max_tokens": 64, "prompt": ids}).json()
    (choice,) = tokens["choices"]
    assert (choice["prompt_token_ids"], choice["finish_reason"]) == (ids, "stop")
    assert len(choice["token_ids"]) == tokens["usage"]["completion_tokens"], "the end token too"
    assert server.client.post("/detokenize", json={"tokens": choice["token_ids"][:-1]}).json()["prompt"] == choice["text"]
    for fields, param in (({"chat_template": "{% if %}"}, "chat_template"), ({"zz": 1}, "zz")):
        reply = server.client.post("/v1/chat/completions", json={**ask, "messages": messages, **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    # Half of a surrogate pair, in the body's JSON and in the template's own spelling: a refusal, and the server goes on.
    for template in (r'"{{ raise_exception(\'\ud800\') }}"', r'"{{ raise_exception(\'\\ud800\') }}"', r'"{{ \'\\ud800\' }}"'):
        content = '{"model": "brook", "messages": [{"role": "user", "content": "a"}], "chat_template": ' + template + "}"
        reply = server.client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error"), reply.text
    endless = "{% set a = 'a' * 4000000 %}{% for b in a %}{% for c in a %}{% endfor %}{% endfor %}"
    threads = ThreadPoolExecutor()
    hostile = [
        threads.submit(
            server.client.post, "/v1/chat/completions", json={**ask, "messages": messages, "chat_template": template}, timeout=60
        )
        for template in (endless, endless, "{{ 'x'.center(10**9) }}", "{{ 'a' * 4000000 * 300 }}")
    ]
    best = server.client.post(
        "/v1/completions", json={"model": "brook", "prompt": "The", "temperature": 1, "seed": 1, "n": 2, "best_of": 8, "logprobs": 0}
    ).json()
    means = [sum(values) / len(values) for choice in best["choices"] if (values := choice["logprobs"]["token_logprobs"])]
    assert len(means) == 2
    assert means == sorted(means, reverse=True)
    assert not any(waiting.done() for waiting in hostile), "nobody waits for a request's template"
    for waiting in hostile:
        reply = waiting.result()
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template")
    assert server.stop() == 0


def test_repeated_keys_are_all_good_and_the_command_line_is_warned_about(starter: Any) -> None:
    server = starter("--api-key", "sk-a", "--api-key", "sk-b,sk-c", "-O3", "--uvicorn-log-level", "warning", "--disable-log-stats")
    for key, status in (("sk-a", 200), ("sk-b", 200), ("sk-c", 200), ("sk-b,sk-c", 401)):
        assert server.client.get("/v1/models", headers={"x-api-key": key}).status_code == status
    for some in server.children().values():
        for child in some:
            assert not [word for word in child.cmdline() if "sk-" in word]
    lines = server.log.read_text().splitlines()
    assert len([line for line in lines if "other users of this machine can read" in line]) == 1
    assert len([line for line in lines if "--optimization-level has no effect" in line]) == 1
    assert "sk-" not in "".join(lines)


def test_sampling_defaults_and_the_path_of_a_proxy(starter: Any) -> None:
    override = '{"temperature": 0.0, "max_new_tokens": 5}'
    server = starter("--override-generation-config", override, "--override-generation-config.max_new_tokens", "4", "--root-path", "/llm")
    for path in ("/llm/v1/chat/completions", "/v1/chat/completions"):
        answer = server.client.post(path, json=CHAT).json()
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (4, "length")
    answer = server.client.post("/llm/v1/chat/completions", json={**CHAT, "max_tokens": 6}).json()
    assert answer["usage"]["completion_tokens"] == 6
