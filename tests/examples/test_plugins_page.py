"""Every module of docs/plugins.md does what the page says, in the real host, engine and edge."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from penstock import LLM, SamplingParams
from penstock.core.contract.drafters import drafter_for
from penstock.core.contract.families import FAMILIES
from penstock.core.contract.formats import CONTENT, REASONING, Opening
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import CheckpointError, InvalidRequest
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.protocol.speculation import DraftConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
MODULES: dict[str, str] = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
GREEDY = SamplingParams(temperature=0, max_tokens=12)
Write = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """write(name, ...) puts modules of the page where they can be imported, and gives their names."""
    place = tmp_path / "modules"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))

    def put(*names: str) -> list[str]:
        for name in names:
            (place / f"{name}.py").write_text(MODULES[name], encoding="utf-8")
        importlib.invalidate_caches()
        return list(names)

    yield put
    for name in MODULES:
        sys.modules.pop(name, None)


def hook_of(name: str) -> str:
    found = re.search(r"@hookimpl\ndef (\w+)\(", MODULES[name])
    assert found is not None
    return found.group(1)


ROLES = {one.hook: one.role for one in FAMILIES.values()} | {"register_commands": "root", "request_finished": "text"}


def test_the_page_has_a_module_of_each_family() -> None:
    assert {hook_of(name) for name in MODULES} == set(ROLES)


@pytest.mark.parametrize("name", MODULES)
def test_each_module_loads_in_its_process_with_nothing_broken(name: str, write: Write) -> None:
    host = PluginHost(ROLES[hook_of(name)], extra=write(name)).load().check()
    [row] = [row for row in host.report() if row[0] == name]
    assert row[4] == hook_of(name)


def test_the_package_of_the_page_names_a_module_of_the_page() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    package = tomllib.loads(text)
    assert package["project"]["entry-points"]["penstock.engine"] == {"my-policy": "my_policy"}
    assert package["tool"]["setuptools"]["py-modules"] == ["my_policy"]
    assert "my_policy" in MODULES


# ------------------------------------------------------------------ engine and text


def tokens(**options: Any) -> list[list[int]]:
    with LLM(kv_cache_memory_bytes=64 << 20, **options) as llm:
        return [list(r.outputs[0].token_ids) for r in llm.generate(["Penstock is", "Count from 1 to 9:"], GREEDY)]


@pytest.mark.slow
def test_policy_attention_and_weights_serve_the_demo_model(write: Write, tmp_path: Path) -> None:
    right = tokens()
    for file in demo_folder().iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, tmp_path)
    for name, value in load_file(demo_folder() / "model.safetensors").items():
        np.save(tmp_path / f"{name}.npy", value.float().numpy())
    mine = tokens(
        model=str(tmp_path),
        extra_plugins=write("my_policy", "my_attention", "my_weights"),
        scheduling_policy="shortest",
        attention_backend="mine",
        load_format="npy",
    )
    assert mine == right


@pytest.fixture
def byte_folder(tmp_path: Path) -> Path:
    """A folder for the page's tokenizer and renderer."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "bytes.txt").touch()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 257}))
    return folder


@pytest.mark.slow
def test_device_tokenizer_renderer_and_hooks(write: Write, byte_folder: Path) -> None:
    names = write("my_device", "my_tokenizer", "my_renderer", "my_hooks")
    with LLM(model=str(byte_folder), device="counting", extra_plugins=names) as llm:
        (one,) = llm.generate(["abc"], SamplingParams(max_tokens=5))
        assert one.outputs[0].text == "defgh"
        (both,) = llm.generate(["x"], SamplingParams(max_tokens=2, n=2))
        assert [o.text for o in both.outputs] == ["yz", "yz"]
        (chat,) = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=3))
        assert bytes(chat.prompt_token_ids or []) == b"user: Hi\nassistant:"
        assert chat.outputs[0].text == ";<="
        (last,) = llm.generate(prompt_token_ids=[[254]], sampling_params=SamplingParams(max_tokens=9))
        assert (last.outputs[0].token_ids[-1], last.outputs[0].finish_reason) == (256, "stop")
        with pytest.raises(InvalidRequest, match=r"messages\[0\] must have a role and a text"):
            llm.chat([{"role": "user", "content": ["x"]}])
        assert llm.get_tokenizer().eos_token == "<end>"
    assert sys.modules["my_hooks"].tokens.total() == 5 + 4 + 3 + 2
    (byte_folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="vocab_size"):
        LLM(model=str(byte_folder), device="counting", extra_plugins=names)


def test_output_format(write: Write) -> None:
    """By register_output_formats; however the text is cut."""
    (spec,) = (one for one in PluginHost("text", extra=write("my_format")).load().output_formats().values() if one.name == "aside")
    assert spec.matches("{# asides #}{{ messages }} # asides")
    for text, want in (("# Hm\nYes\nNo", (" Hm", "Yes\nNo")), ("Yes # no", ("", "Yes # no")), ("#", ("", ""))):
        for pieces in ([text], list(text)):
            splitter = spec.factory(Opening("", False))
            out = [fragment for piece in pieces for fragment in splitter.feed(piece)] + splitter.flush(False)
            assert tuple("".join(f.text for f in out if f.channel == channel) for channel in (REASONING, CONTENT)) == want


@pytest.mark.slow
def test_model(write: Write, byte_folder: Path) -> None:
    """Each byte is followed by the one that the head says, through the real CPU device and a safetensors file."""
    config = {"architectures": ["BigramForCausalLM"], "vocab_size": 257, "hidden_size": 257, "max_position_embeddings": 64}
    (byte_folder / "config.json").write_text(json.dumps(config))
    follows = torch.roll(torch.eye(257), 1, dims=0)  # head[t + 1] matches the embedding of t
    save_file({"model.embed_tokens.weight": torch.eye(257), "lm_head.weight": follows}, byte_folder / "model.safetensors")
    names = write("my_model", "my_tokenizer", "my_renderer")
    with LLM(model=str(byte_folder), kv_cache_memory_bytes=1 << 20, extra_plugins=names) as llm:
        (one,) = llm.generate(["abc"], SamplingParams(temperature=0, max_tokens=5))
    assert one.outputs[0].text == "defgh"


def test_the_drafter_of_the_page_says_what_came_after(write: Write) -> None:
    drafter = drafter_for("again", PluginHost("engine", extra=write("my_drafter")).load().drafters()).factory(
        config=DraftConfig(method="again")
    )
    drafter.begin(7, np.array([1, 2, 3], np.int32), "")
    assert drafter.propose(7, 3).tolist() == []
    drafter.extend(7, np.array([2], np.int32))
    assert (drafter.propose(7, 3).tolist(), drafter.propose(7, 1).tolist()) == ([3, 2], [3])
    drafter.end(7)


def test_the_grammar_backend_of_the_page_makes_masks(write: Write) -> None:
    spec = PluginHost("engine", extra=write("my_grammar")).load().grammars()
    assert spec is not None
    assert (spec.name, spec.kinds) == ("choices", ["choice"])
    other = PluginHost("text", extra=["my_grammar"]).load().grammars("llguidance")
    assert other is not None
    assert other.name == "llguidance"
    grammars = spec.factory([b"a", b"b", b"ab", b"", b"<end>"], [4])
    with pytest.raises(InvalidRequest, match="too long"):
        grammars.compile("choice", "x" * 1001)
    place = grammars.matcher(grammars.compile("choice", '["ab", "b"]'))
    out = np.zeros(1, np.int32)
    place.mask(out)
    assert (out.tolist(), place.may_end()) == ([0b111], False)
    assert place.consume(0)
    place.mask(out)
    assert out.tolist() == [0b10]
    assert place.consume(1)
    assert place.may_end()
    assert not place.consume(1)


def test_the_weights_of_the_page_name_what_is_wrong(write: Write, tmp_path: Path) -> None:
    spec: Any = PluginHost("engine", extra=write("my_weights")).load().weight_sources()["npy"]
    with pytest.raises(CheckpointError, match=r"holds no \.npy files"):
        spec.factory(str(tmp_path), "npy", dtype=torch.float32, seed=0, std=0.02)
    np.save(tmp_path / "a.b.npy", np.ones((2, 2), np.float32))
    weights = spec.factory(str(tmp_path), "npy", dtype=torch.float32, seed=0, std=0.02)
    with pytest.raises(CheckpointError, match="shape"):
        weights.take("a.b", (4,))
    with pytest.raises(CheckpointError, match=r"does not use: \['a\.b'\]"):
        weights.finish()


def test_the_actor_of_the_page_is_asked_by_text(write: Write) -> None:
    import queue

    from penstock.core.contract.actors import ActorContext, Seat
    from penstock.core.contract.fake_device import FakeDevice
    from penstock.core.contract.hookspecs import ActorSpec, hookimpl
    from penstock.core.processes.local import LocalServer
    from penstock.core.protocol.config import build
    from penstock.core.protocol.messages import Extension

    heard: queue.Queue[bytes] = queue.Queue()
    contexts: list[ActorContext] = []

    class Port:
        name = "asker"
        takes = gives = frozenset()

        def deliver(self, message: Any, index: int | None) -> None:
            heard.put(message.data)

    def asker(context: ActorContext) -> Seat:
        contexts.append(context)
        return Seat(party=Port(), takes_kinds=frozenset({"my_actor.fine"}), gives_kinds=frozenset({"my_actor.how"}))

    module = ModuleType("asking")
    specs = [ActorSpec(name="asker", api_level=1, where="text", factory=asker)]
    module.register_actors = hookimpl(lambda: specs)  # type: ignore[attr-defined]
    sys.modules["asking"] = module
    try:
        with LocalServer(build({}), lambda message: None, device=FakeDevice(), extra_plugins=[*write("my_actor"), "asking"]):
            contexts[0].post(Extension(kind="my_actor.how", data=b""))
            assert heard.get(timeout=20) == b"fake has 1024 blocks"
    finally:
        del sys.modules["asking"]


# ------------------------------------------------------------------ root and edge


def test_command(write: Write) -> None:
    group = click.Group("penstock")
    PluginHost("root", extra=write("my_command")).load().hook.register_commands(group=group)
    result = CliRunner().invoke(group, ["hello", "--name", "reader"])
    assert (result.exit_code, result.output) == (0, "Hello, reader.\n")


def edge_kit() -> ModuleType:
    path = ROOT / "tests" / "transports" / "edge_kit.py"
    spec = importlib.util.spec_from_file_location("edge_kit_for_plugins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_transport(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = PluginHost("edge", extra=write("my_transport")).load()
    kit = edge_kit()
    monkeypatch.setattr(kit, "register_transports", lambda: [host.transports()["plain"]])
    edge = kit.Edge(tmp_path, {"api_key": ["secret"]}).start()
    try:
        with edge.http(headers={"authorization": "Bearer secret"}) as client:
            answer = client.post("/plain", json={"prompt": "Say hello", "max_tokens": 7})
            assert (answer.status_code, answer.text) == (200, "Hello world")
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            (submit,) = edge.text.wait_for(kit.Submit)
            assert (submit.prompt, submit.sampling.max_tokens, submit.rid) == ("Say hello", 7, answer.headers["x-request-id"])
            wrong = client.post("/plain", json={"prompt": 3})
            assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
            edge.text.script = lambda submit: [
                kit.delta({"key": submit.key, "reason": "error", "extra": {"error": "It broke."}}),
                kit.finished(submit.key),
            ]
            failed = client.post("/plain", json={"prompt": "x"})
            assert (failed.status_code, failed.json()["error"]["message"]) == (500, "It broke.")
        with edge.http() as stranger:
            assert stranger.post("/plain", json={"prompt": "x"}).status_code == 401
        edge.wait(lambda: edge.server.gateway.active == 0, "every place is given back")
    finally:
        edge.stop()


def test_the_quantizer_rounds_while_a_model_loads(write: Write) -> None:
    with LLM(extra_plugins=write("my_quantizer"), quantization="int8-whole") as llm, LLM() as wide:
        rounded, whole = (each.generate("The harbour", SamplingParams(temperature=0, max_tokens=1, logprobs=1))[0] for each in (llm, wide))
    assert rounded.outputs[0].logprobs != whole.outputs[0].logprobs
