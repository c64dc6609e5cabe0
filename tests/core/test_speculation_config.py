"""Who is to draft: the options, the models that they name, and the drafters that plugins bring."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from penstock.core.contract.devices import Runner
from penstock.core.contract.drafters import drafter_for
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.contract.hookspecs import DrafterSpec
from penstock.core.processes.engine import Engine, runner_config
from penstock.core.processes.speculation import Drafters
from penstock.core.protocol.config import Config, build
from penstock.core.protocol.errors import ConfigError, UnsupportedFeature
from penstock.core.protocol.model_folder import demo_folder, with_model
from penstock.core.protocol.speculation import FIELDS, IDLE, NEUTRAL, DraftConfig, SpeculationConfig, method_of, parsed, tree_of
from penstock.plugins.policies.fcfs import FirstComeFirstServed


def asked(**options: Any) -> list[DraftConfig]:
    found = runner_config(with_model(build(options))).speculation
    return [] if found is None else found.methods


def test_nothing_asked_is_no_speculation() -> None:
    assert runner_config(with_model(build({}))).speculation is None
    assert asked(speculative_config=None) == []


def test_fields_of_vllm_are_read() -> None:
    config = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 5,
        "prompt_lookup_min": 2,
        "draft_tensor_parallel_size": 1,
    }
    assert asked(speculative_config=config) == [
        DraftConfig(method="ngram", num_speculative_tokens=4, prompt_lookup_max=5, prompt_lookup_min=2)
    ]
    assert asked(speculative_config={"model": "[ngram]"}) == asked(speculative_config={"method": "ngram"})
    assert asked(speculative_config={"method": "mine", "options": {"depth": 3}})[0].options == {"depth": 3}


@pytest.mark.parametrize("word", ["ngram", "[ngram]"])
def test_ngram_as_configurations_of_vllm_spell_it(word: str) -> None:
    plain = asked(speculative_config={"method": "ngram", "prompt_lookup_max": 4})
    for config in ({"model": word}, {"method": word}, {"method": "ngram", "model": word}, {"method": word, "model": word}):
        assert asked(speculative_config=config | {"prompt_lookup_max": 4}) == plain
    assert asked(speculative_model=word, speculative_config={"prompt_lookup_max": 4}) == plain
    both = asked(speculative_config={"methods": [{"method": "suffix"}, {"model": word}]})
    assert [(one.method, one.model) for one in both] == [("suffix", None), ("ngram", None)]


def test_the_short_options_and_the_long_one_are_one() -> None:
    draft = str(demo_folder().parent / "brook-draft")
    wanted = [DraftConfig(method="draft_model", model=draft, num_speculative_tokens=3)]
    assert asked(speculative_model="brook-draft", num_speculative_tokens=3) == wanted
    assert asked(speculative_config={"model": "brook-draft"}, num_speculative_tokens=3) == wanted
    assert asked(speculative_model=draft, speculative_config={"num_speculative_tokens": 3}) == wanted
    assert asked(spec_model=draft, spec_tokens=3) == wanted


def test_a_tree_is_as_many_drafts_as_it_has_paths() -> None:
    tree = "[(0, 0), (1,), (0,)]"
    assert asked(speculative_config={"method": "mine", "speculative_token_tree": tree}) == [
        DraftConfig(method="mine", num_speculative_tokens=3, speculative_token_tree=tree)
    ]
    assert tree_of(tree) == [(0,), (1,), (0, 0)]
    line = {"method": "mine", "speculative_token_tree": "[(0,), (0, 0), (0, 0, 0)]"}
    assert asked(speculative_config=line) == [DraftConfig(method="mine", num_speculative_tokens=3)]
    assert asked(speculative_config={"method": "mine", "speculative_token_tree": None}) == [DraftConfig(method="mine")]


def test_several_are_asked_in_order() -> None:
    methods = [{"method": "ngram", "num_speculative_tokens": 7}, {"model": "brook-draft"}]
    found = runner_config(with_model(build({"speculative_config": {"methods": methods}}))).speculation
    assert found is not None
    assert [one.method for one in found.methods] == ["ngram", "draft_model"]
    assert found.most == 7
    assert SpeculationConfig(methods=[DraftConfig(method="ngram")]).most is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"method": "ngram", "prompt_lookup_maxx": 2}, r"'prompt_lookup_maxx' is not a known field\. Did you mean 'prompt_lookup_max'\? Known: method, model,"),
        ({"method": 3}, r"'method' must be a text"),
        ({"method": "ngram", "num_speculative_tokens": 0}, r"'num_speculative_tokens' must be from 1 to 64, but is 0"),
        ({"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 2}, r"'prompt_lookup_min' is 3, more than"),
        ({"method": "ngram", "draft_tensor_parallel_size": 2}, r"'draft_tensor_parallel_size' cannot be 2: an engine has one device"),
        ({"method": "ngram", "rejection_sample_method": "probabilistic"}, r"the answer is always exactly what it is without"),
        ({"method": "ngram", "model": "/models/small"}, r"'model' is '/models/small', but the method 'ngram' has no model"),
        ({"methods": [{"method": "[ngram]", "model": "x"}]}, r"'methods\[0\]\.model' is 'x', but the method 'ngram'"),
        ({"method": "medusa", "model": "[ngram]"}, r"'model' is '\[ngram\]', which means the method 'ngram', but 'method' is 'medusa'"),
        ({"method": "medusa", "speculative_token_tree": "[(0,), (0, 0"}, r"'speculative_token_tree' must be a list of paths such as"),
        ({"method": "medusa", "speculative_token_tree": "[]"}, r"must be a list of paths"),
        ({"method": "medusa", "speculative_token_tree": "[(0,), (True,)]"}, r"numbers from 0 to 15"),
        ({"method": "medusa", "speculative_token_tree": "[(0,), (16,)]"}, r"numbers from 0 to 15"),
        ({"method": "medusa", "speculative_token_tree": "[(0,), (0,)]"}, r"names a path twice"),
        ({"method": "medusa", "speculative_token_tree": "[(0,), (1, 0)]"}, r"has \(1, 0\), but not \(1,\), which leads there"),
        ({"method": "medusa", "speculative_token_tree": str([(a, b) for a in range(8) for b in range(8)] + [(a,) for a in range(8)])}, r"at most 63"),
        ({"method": "medusa", "speculative_token_tree": "[(0,), (1,)]", "num_speculative_tokens": 3}, r"has 2 paths, but num_speculative_tokens is 3"),
        ({"method": "medusa", "speculative_token_tree": [[0], [1]]}, r"'speculative_token_tree' must be a text"),
        ({"methods": [{"method": "ngram"}, {"method": "medusa", "speculative_token_tree": "[(0,), (1,)]"}]}, r"is for a drafter that is alone"),
        ({}, r"'method' is missing"),
        ({"method": " "}, r"'method' must not be empty"),
        ({"methods": []}, r"'methods' must be a list"),
        ({"methods": [{"method": "ngram"}], "model": "x"}, r"'model' stands beside \"methods\""),
        ({"methods": [{"method": "ngram"}, {"metod": "x"}]}, r"'methods\[1\]\.metod' is not a known field"),
        ({"methods": [{"method": "ngram"}] * 9}, r"at most 8"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build({"speculative_config": config})
    assert caught.value.message.startswith("--speculative-config: ")
    assert caught.value.param == "speculative_config"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_speculative_tokens": 3}, "nothing says who drafts"),
        ({"num_speculative_tokens": 99, "speculative_model": "brook-draft"}, "from 1 to 64"),
        ({"speculative_model": "a", "speculative_config": {"model": "b"}}, "says 'b'"),
        ({"speculative_model": "a", "speculative_config": {"methods": [{"method": "ngram"}]}}, "of which"),
        ({"speculative_config": "[]"}, "JSON object"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(options)


def test_fields_without_effect_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert asked(speculative_config={"method": "ngram", "disable_by_batch_size": 8}) == [DraftConfig(method="ngram")]
    assert "'disable_by_batch_size' has no effect" in caplog.text


def test_every_field_of_vllms_is_known() -> None:
    """Those that a configuration may hold; what has an effect is a field here, too."""
    theirs = """enforce_eager num_speculative_tokens model method draft_tensor_parallel_size tensor_parallel_size quantization moe_backend attention_backend
        kv_cache_dtype max_model_len revision code_revision index_share_for_mtp_iteration disable_padded_drafter_batch disable_eagle_block_drop
        use_local_argmax_reduction use_heterogeneous_vocab prompt_lookup_max prompt_lookup_min parallel_drafting num_speculative_tokens_per_batch_size
        suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor suffix_decoding_min_token_prob
        draft_load_config rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length enable_adaptive_verification
        draft_sample_method dspark_draft_topk disable_by_batch_size speculative_token_tree posterior_threshold posterior_alpha disable_logprobs"""
    assert not set(theirs.split()) - {*FIELDS, *NEUTRAL, *IDLE}
    assert not {*FIELDS} & {*NEUTRAL, *IDLE}


def test_who_wants_no_answers_remembered_is_told_how() -> None:
    with pytest.raises(
        ConfigError, match=r"'suffix_decoding_max_cached_requests' is not obeyed here: say \"options\": \{\"past_tokens\": 0\}"
    ):
        build({"speculative_config": {"method": "suffix", "suffix_decoding_max_cached_requests": 0}})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"method": "ngram", "method": "suffix"}', "method"),
        ('{"method": "suffix", "options": {"tenants": 1, "past_tokens": 2, "tenants": 3}}', "tenants"),
        ('{"methods": [{"method": "ngram"}, {"model": "a", "model": "a"}]}', "model"),
    ],
)
def test_a_key_that_is_said_twice(text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"speculative_config.*it has the key '{key}' twice; leave one of them out"):
        build({"speculative_config": text})


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        (
            "words.txt",
            None,
            r"--speculative-model \S*words.txt \('model' in --speculative-config\): a file, and none whose name ends in .gguf",
        ),
        ("words.txt", {"method": "draft_model"}, "a drafter's folder or of a GGUF file"),
        ("words.txt", {"method": "eagle3"}, "the method 'eagle3' reads a folder with config.json and weights"),
        ("small.gguf", {"method": "medusa"}, "the method 'medusa' reads a folder"),
    ],
)
def test_a_file_as_a_drafters_model(name: str, config: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    model = str(tmp_path / name)
    with pytest.raises(ConfigError, match=said):
        asked(**({"speculative_config": config | {"model": model}} if config else {"speculative_model": model}))
    assert asked(speculative_config={"method": "phrases", "model": model})[0].model == model, "a plugin's method may read what it likes"
    (tmp_path / "draft.gguf").write_bytes(b"x")
    assert asked(speculative_model=str(tmp_path / "draft.gguf"))[0].method == "draft_model"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder.*come with it for the demo model: .*brook-draft"):
        asked(speculative_model="brook-drafts")
    with pytest.raises(ConfigError, match="holds no config"):
        asked(speculative_model=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "draft_model"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "eagle3"),
        ({"architectures": ["EagleLlamaForCausalLM"], "model_type": "eagle"}, "eagle"),
        ({"model_type": "medusa"}, "medusa"),
        ({"architectures": ["LlamaForCausalLMNextN"], "model_type": "llama"}, "mtp"),
        ({"architectures": ["DeepSeekMTPModel"]}, "mtp"),
        ({"speculators_model_type": "eagle3", "architectures": ["Speculator"]}, "eagle3"),
        ({}, "draft_model"),
    ],
)
def test_a_drafters_folder_says_what_it_is(config: dict[str, Any], method: str, tmp_path: Path) -> None:
    assert method_of(config) == method
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [one.method for one in asked(speculative_model=str(tmp_path))] == [method]
    assert asked(speculative_config={"method": "mine", "model": str(tmp_path)})[0].method == "mine"


def spec(name: str, priority: int = 0, methods: tuple[str, ...] = ("ngram",)) -> DrafterSpec:
    return DrafterSpec(name=name, api_level=1, methods=list(methods), where="device", factory=object, priority=priority)


def test_the_highest_priority_serves_a_method_of_equal_ones_the_last() -> None:
    specs = {one.name: one for one in (spec("a"), spec("b"), spec("c", priority=-1))}
    assert drafter_for("ngram", specs).name == "b"
    with pytest.raises(ConfigError, match=r"'method' 'ngrams'\. Did you mean 'ngram'\? Known: ngram\."):
        drafter_for("ngrams", specs)


def test_two_drafters_of_a_method_have_names_of_their_own() -> None:
    """Metrics have one series a name: of two with one name one would be lost."""
    methods = [DraftConfig(method=name) for name in ("draft_model", "ngram", "draft_model", "draft_model")]
    drafters = Drafters(SpeculationConfig(methods=methods), None)
    runner = types.SimpleNamespace(lookahead=4, drafters=tuple(one.method for one in methods))
    drafters.settle(FakeDevice(FakeOptions(lookahead=4)).capabilities, cast(Runner, runner))
    assert drafters.names == ("draft_model", "ngram", "draft_model-2", "draft_model-3")


def test_a_device_that_cannot_says_so() -> None:
    async def start(lookahead: int) -> int:
        config: Config = with_model(build({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}))
        device = FakeDevice(FakeOptions(lookahead=lookahead))
        if not lookahead:
            device.load = lambda config, progress, load=device.load: blind(load(config, progress))  # type: ignore[method-assign, misc]
        engine = Engine(config, output=lambda message: None, device=device, policy=FirstComeFirstServed())
        try:
            async with trio.open_nursery() as nursery:
                await engine.start(nursery)
                nursery.cancel_scope.cancel()
        finally:
            engine.close()
        assert device.runner is not None
        assert device.runner.drafters == ("ngram",)
        return device.runner.lookahead

    def blind(runner: Any) -> Any:
        runner.lookahead = 0
        return runner

    assert trio.run(start, 5) == 3
    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(start, 0)
    assert caught.group_contains(UnsupportedFeature, match="cannot speculate with ngram")


def test_the_parts_are_read_once_and_again() -> None:
    config = with_model(build({"speculative_model": "brook-draft", "num_speculative_tokens": 2}))
    assert parsed(config.speculative_config, config.speculative_model, config.num_speculative_tokens) == runner_config(config).speculation
    assert (config.speculative_model, config.num_speculative_tokens) == (None, None)
    assert with_model(config).speculative_config == config.speculative_config
