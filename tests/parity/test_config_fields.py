"""Every field of config.json that changes what a model computes, in the spellings of transformers 4 and 5, absent, null and contradictory:
the log-probabilities are those of transformers for the same folder, or the field is refused by name.

Each case also says how the configuration would be read by somebody who gets it wrong (`instead`); transformers itself must answer otherwise
for that, or the case would show nothing. Weights are sharpened for it: attention is peaked and logits are spread. It is long because every field
stands here, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.devices.driver import Driver, Job

TOLERANCE = 3e-3
SHOWN = 0.2
"""Log-probabilities that differ by this much somewhere are another answer."""
DROP = object()
BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
UP = ["full_attention", "full_attention", "sliding_attention"]
DOWN = ["sliding_attention", "full_attention", "full_attention"]
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2, 3, 4, 6, 9], "long_factor": [2.0, 3, 4, 5, 6, 7, 8, 9]}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}


def without(rope: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key not in names}


Case = tuple[str, str, dict[str, Any], dict[str, Any] | None]
"""(name, family, fields, instead): `instead` None where a wrong reading has other shapes, which do not load."""

CASES: list[Case] = [
    # --- sizes: absent and null
    ("kv-heads absent", "llama", {"num_key_value_heads": DROP}, None),
    ("kv-heads null", "llama", {"num_key_value_heads": None}, None),
    ("kv-heads null", "qwen3", {"num_key_value_heads": None}, None),
    ("kv-heads absent: 8", "mistral", {"num_key_value_heads": DROP, "num_attention_heads": 16}, None),
    ("kv-heads absent: 32", "qwen2", {"num_key_value_heads": DROP, "num_attention_heads": 64}, None),
    ("kv-heads absent: 32", "qwen3", {"num_key_value_heads": DROP, "num_attention_heads": 64}, None),
    ("head_dim absent", "llama", {"head_dim": DROP}, None),
    ("head_dim null", "mistral", {"head_dim": None}, None),
    ("head_dim absent", "qwen2", {"head_dim": DROP}, None),
    ("head_dim absent: 128", "qwen3", {"head_dim": DROP}, None),
    ("head_dim beside the quotient", "llama", {"head_dim": 32}, None),
    ("head_dim in a qwen2", "qwen2", {"head_dim": 32}, None),
    # --- numbers and switches
    ("eps", "llama", {"rms_norm_eps": 0.3}, {"rms_norm_eps": 1e-6}),
    ("eps absent", "qwen2", {"rms_norm_eps": DROP}, {"rms_norm_eps": 0.3}),
    ("eps zero", "mistral", {"rms_norm_eps": 0.0}, {"rms_norm_eps": 0.3}),
    ("swish", "qwen3", {"hidden_act": "swish"}, {"hidden_act": "gelu"}),
    ("act absent", "llama", {"hidden_act": DROP}, {"hidden_act": "gelu"}),
    ("tied", "llama", {"tie_word_embeddings": True}, None),
    ("tied absent", "qwen2", {"tie_word_embeddings": DROP}, None),
    ("biases", "llama", {"attention_bias": True, "mlp_bias": True}, None),
    ("attention_bias", "qwen3", {"attention_bias": True}, None),
    ("biases that it has not", "mistral", {"attention_bias": True, "mlp_bias": True}, None),
    ("biases that it always has", "qwen2", {"attention_bias": False, "mlp_bias": True}, None),
    ("what only training and splitting read", "llama", {"pretraining_tp": 2, "attention_dropout": 0.5, "use_cache": False}, None),
    # --- windows
    ("window absent: 4096", "mistral", {"sliding_window": DROP}, {"sliding_window": 6}),
    ("window null", "mistral", {"sliding_window": None}, {"sliding_window": 6}),
    ("window", "mistral", {"sliding_window": 6}, {"sliding_window": None}),
    (
        "switch of another family",
        "mistral",
        {"sliding_window": 6, "use_sliding_window": False, "max_window_layers": 3},
        {"sliding_window": None},
    ),
    ("kinds of layers", "mistral", {"sliding_window": 6, "layer_types": UP}, {"layer_types": DOWN}),
    ("kinds of layers, all full", "mistral", {"sliding_window": 6, "layer_types": ["full_attention"] * 3}, {"layer_types": DROP}),
    ("kinds of layers null", "mistral", {"sliding_window": 6, "layer_types": None}, {"sliding_window": 12}),
    ("no window in a llama", "llama", {"sliding_window": 6, "use_sliding_window": True}, None),
    ("window off", "qwen2", {**WINDOW, "use_sliding_window": False, "max_window_layers": 0}, {"use_sliding_window": True}),
    ("window off by default", "qwen3", {"sliding_window": 6, "max_window_layers": 0}, {"use_sliding_window": True}),
    ("upper layers", "qwen2", {**WINDOW, "max_window_layers": 1}, {"max_window_layers": 2}),
    ("max_window_layers absent: 28", "qwen3", WINDOW, {"max_window_layers": 0}),
    ("window null in use", "qwen3", {**WINDOW, "sliding_window": None, "max_window_layers": 0}, {"sliding_window": 6}),
    ("kinds before max_window_layers", "qwen2", {**WINDOW, "max_window_layers": 2, "layer_types": DOWN}, {"layer_types": DROP}),
    ("kinds, older name", "qwen3", {**WINDOW, "layer_types": ["attention", "full_attention", "sliding_attention"]}, {"layer_types": DOWN}),
    # --- rope: where theta stands
    ("theta absent", "qwen2", {}, {"rope_theta": 50.0}),
    ("theta flat", "llama", {"rope_theta": 50.0, "rope_scaling": None}, {"rope_theta": DROP}),
    ("theta inside", "mistral", {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, {"rope_parameters": DROP}),
    ("theta twice", "qwen3", {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 50.0}}, {"rope_parameters": DROP}),
    ("theta beside rope_parameters", "llama", {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": DROP}),
    ("theta in rope_scaling", "llama", {"rope_theta": 10000.0, "rope_scaling": {**LINEAR, "rope_theta": 50.0}}, {"rope_scaling": LINEAR}),
    (
        "rope_scaling replaces rope_parameters, theta too",
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_scaling": {**LINEAR, "rope_theta": 50.0}},
    ),
    ("an empty rope_scaling replaces nothing", "qwen2", {"rope_scaling": {}, "rope_parameters": {**LINEAR}}, {"rope_parameters": DROP}),
    # --- rope: types
    ("type", "llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}, {"rope_scaling": None}),
    (
        "rope_type before type",
        "llama",
        {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 3.0}},
        {"rope_scaling": LINEAR},
    ),
    ("sections of another model", "qwen2", {"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, None),
    (
        "dynamic, within its length",
        "mistral",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": {**LINEAR, "factor": 4.0}},
    ),
    ("yarn", "qwen3", {"rope_parameters": YARN}, {"rope_parameters": DROP}),
    ("yarn, factor null", "llama", {"rope_scaling": {**YARN, "factor": None}}, {"rope_scaling": YARN}),
    (
        "yarn, length flat",
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 128},
        {"original_max_position_embeddings": DROP},
    ),
    ("yarn, length absent", "qwen2", {"rope_scaling": without(YARN, "original_max_position_embeddings")}, {"rope_scaling": YARN}),
    (
        "yarn, every length absent: 2048",
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 40.0}, "max_position_embeddings": DROP},
        {"max_position_embeddings": 64},
    ),
    (
        "yarn, every length absent: 131072",
        "mistral",
        {"rope_scaling": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 512}, "max_position_embeddings": DROP},
        {"max_position_embeddings": 32768},
    ),
    (
        "yarn, every length absent: 32768",
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 512}, "max_position_embeddings": DROP},
        {"max_position_embeddings": 131072},
    ),
    ("yarn, attention_factor", "llama", {"rope_scaling": {**YARN, "attention_factor": 0.4}}, {"rope_scaling": YARN}),
    ("yarn, mscale", "llama", {"rope_scaling": {**YARN, "mscale": 3.0, "mscale_all_dim": 0.5}}, {"rope_scaling": YARN}),
    ("yarn, half an mscale", "llama", {"rope_scaling": {**YARN, "mscale": 9.0}}, None),
    ("yarn, mscale zero", "llama", {"rope_scaling": {**YARN, "mscale": 9.0, "mscale_all_dim": 0}}, None),
    (
        "yarn, betas",
        "qwen2",
        {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.1, "factor": 16}},
        {"rope_scaling": {**YARN, "factor": 16}},
    ),
    ("yarn, betas null", "qwen2", {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": 0}}, None),
    ("yarn, truncate", "llama", {"rope_scaling": {**YARN, "factor": 32, "truncate": False}}, {"rope_scaling": {**YARN, "factor": 32}}),
    ("llama3", "llama", {"rope_scaling": LLAMA3, "rope_theta": 100.0}, {"rope_scaling": None}),
    (
        "llama3, type",
        "qwen3",
        {"rope_scaling": {**without(LLAMA3, "rope_type"), "type": "llama3"}, "rope_theta": 100.0},
        {"rope_scaling": None},
    ),
    (
        "llama3, length flat",
        "llama",
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256, "rope_theta": 100.0},
        {"original_max_position_embeddings": DROP},
    ),
    (
        "llama3, length absent",
        "llama",
        {"rope_scaling": without(LLAMA3, "original_max_position_embeddings"), "rope_theta": 100.0},
        {"rope_scaling": LLAMA3},
    ),
    (
        "longrope, factor from lengths",
        "llama",
        {"rope_scaling": LONG, "original_max_position_embeddings": 64},
        {"rope_scaling": {**LONG, "factor": 1.0}},
    ),
    (
        "longrope, factor",
        "mistral",
        {"rope_scaling": {**LONG, "factor": 900.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": LONG},
    ),
    ("longrope, attention_factor", "llama", {"rope_scaling": {**LONG, "attention_factor": 0.5}}, {"rope_scaling": LONG}),
    ("partial_rotary_factor one", "llama", {"partial_rotary_factor": 1.0, "rope_scaling": LINEAR}, {"rope_scaling": None}),
    (
        "partial_rotary_factor inside first",
        "llama",
        {"partial_rotary_factor": 0.5, "rope_scaling": {**LINEAR, "partial_rotary_factor": 1.0}},
        None,
    ),
    # --- what the model is
    ("architectures absent", "qwen2", {"architectures": DROP}, None),
    ("model_type absent", "qwen3", {"model_type": DROP}, None),
    ("dtype before torch_dtype", "llama", {"dtype": "float32", "torch_dtype": "float16"}, None),
    ("dtype, short name", "llama", {"torch_dtype": "float"}, None),
    ("nothing quantised", "llama", {"quantization_config": None, "text_config": None, "per_layer_config": None, "is_causal": True}, None),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mistral"}, "model_type"),
    ("qwen3", {"model_type": "qwen3_moe"}, "model_type"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ("qwen3", {"head_dim": None}, "head_dim"),
    ("qwen2", {"max_position_embeddings": None}, "max_position_embeddings"),
    ("llama", {"num_attention_heads": 4.0}, "num_attention_heads"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"hidden_act": None}, "hidden_act"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"attention_bias": "true"}, "attention_bias"),
    ("qwen2", {"layer_types": DOWN, "sliding_window": 6}, "layer_types"),
    ("qwen3", {"layer_types": DOWN, "sliding_window": None, "use_sliding_window": True}, "layer_types"),
    ("mistral", {"layer_types": DOWN, "sliding_window": None}, "layer_types"),
    ("mistral", {"layer_types": DOWN[:2]}, "layer_types"),
    ("mistral", {"layer_types": ["linear_attention"] * 3}, "layer_types"),
    ("llama", {"layer_types": DOWN, "sliding_window": 6}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("qwen2", {**WINDOW, "max_window_layers": None}, "max_window_layers"),
    ("llama", {"rope_theta": None}, "rope_theta"),
    ("llama", {"rope_theta": "10000"}, "rope_theta"),
    ("llama", {"rope_theta": 5.0, "rope_scaling": {**LINEAR, "rope_theta": None}}, "rope_theta"),
    ("llama", {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_scaling"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ("llama", {"rope_scaling": without(YARN, "factor")}, "factor"),
    ("llama", {"rope_scaling": without(LLAMA3, "low_freq_factor")}, "low_freq_factor"),
    ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": None}, "original_max_position_embeddings"),
    ("llama", {"rope_scaling": {**YARN, "truncate": None}}, "truncate"),
    ("llama", {"rope_scaling": {**YARN, "mscale": "1"}}, "mscale"),
    ("llama", {"rope_scaling": YARN, "rope_theta": 1.0}, "rope_parameters"),
    ("llama", {"rope_scaling": without(LONG, "long_factor")}, "long_factor"),
    ("llama", {"rope_scaling": {**LONG, "short_factor": [1.0]}}, "short_factor"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 9.0}}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "default", "full_attention": {"rope_theta": 9.0}}}, "rope_parameters"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"text_config": {"hidden_size": 32}}, "text_config"),
    ("llama", {"per_layer_config": {"0": {"intermediate_size": 48}}}, "per_layer_config"),
    ("llama", {"configuration_files": ["config.5.0.0.json"]}, "configuration_files"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"torch_dtype": "float8_e4m3fn"}, "dtype"),
    ("llama", {"dtype": {"": "float32"}}, "dtype"),
]


def config_of(family: str, *changes: dict[str, Any]) -> dict[str, Any]:
    config = {**BASE, "model_type": family, "architectures": [f"{NAMES[family]}ForCausalLM"]}
    for change in changes:
        config |= change
    return {name: value for name, value in config.items() if value is not DROP}


def sharpen(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.empty(value.shape).normal_(generator=generator)
        if name.endswith("norm.weight"):
            value.data = noise * 0.2 + (1.7 if "self_attn" in name else 1.0)
        elif name.endswith(".bias"):
            value.data = noise * 0.7
        elif "embed" in name or "lm_head" in name:
            value.data = noise * (0.5 if "lm_head" in name else 1.0)
        else:
            value.data = noise * (0.25 if "q_proj" in name or "k_proj" in name else 0.15)


def model_as_read(folder: Path, config: dict[str, Any]) -> Any:
    """The model that transformers makes of this config.json."""
    import transformers

    folder.mkdir(exist_ok=True)
    # only where transformers cannot tell the family from the file is it told
    (folder / "config.json").write_text(json.dumps(config))
    read = (
        transformers.AutoConfig
        if "model_type" in config
        else getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))
    )
    settings = read.from_pretrained(folder)
    settings._attn_implementation = "eager"
    settings.dtype = torch.float32
    return transformers.AutoModelForCausalLM.from_config(settings).eval()


def logprobs(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].float(), dim=-1)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize(("family", "fields", "instead"), [case[1:] for case in CASES], ids=[f"{case[1]}: {case[0]}" for case in CASES])
def test_every_field_as_transformers_reads_it(
    tmp_path: Path, load: Callable[..., Any], family: str, fields: dict[str, Any], instead: dict[str, Any] | None
) -> None:
    folder, seed = tmp_path / "model", sum(map(ord, family + repr(sorted(fields))))
    config = config_of(family, fields)
    model = model_as_read(folder, config)
    sharpen(model, seed)
    tied = model.config.tie_word_embeddings
    named = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(named, folder / "model.safetensors")
    tokens = np.random.default_rng(seed).integers(0, 131, 48).astype(np.int32)
    right = logprobs(model, tokens)
    if instead is not None:
        other = model_as_read(tmp_path / "instead", config_of(family, fields, instead))
        other.load_state_dict(model.state_dict())
        assert (logprobs(other, tokens) - right).abs().max() > SHOWN, "the case shows nothing"
    runner = load(folder, max_model_len=60, kv_cache_memory_bytes=1 << 26)
    job = Job(prompt=tokens, params=SamplingParams(temperature=0.0, prompt_logprobs=20), max_tokens=1)
    Driver(runner).run([job])
    for position, (ids, values) in job.prompt_logprobs.items():
        assert torch.allclose(torch.tensor(values), right[position - 1][ids], atol=TOLERANCE), f"position {position}"
    assert job.tokens == [int(right[-1].argmax())]


@pytest.mark.parametrize(("family", "fields", "param"), REFUSED, ids=[f"{family}: {param}" for family, _, param in REFUSED])
def test_what_is_not_read_like_that_is_refused_by_name(
    tmp_path: Path, load: Callable[..., Any], family: str, fields: dict[str, Any], param: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(family, fields)))
    with pytest.raises((CheckpointError, UnsupportedFeature)) as error:
        load(tmp_path, load_format="dummy", max_model_len=60)
    assert error.value.param == param
    assert param in error.value.message


def test_the_files_that_transformers_takes(tmp_path: Path, load: Callable[..., Any]) -> None:
    """Tied or not, whole or in shards, stale or not: the same tensors as `from_pretrained` of the folder."""
    import transformers

    tokens = np.random.default_rng(7).integers(0, 131, 48).astype(np.int32)
    folder = tmp_path / "model"
    models = []
    for seed in (1, 2):
        model = model_as_read(folder, config_of("qwen2", {"tie_word_embeddings": False}))
        sharpen(model, seed)
        models.append({name: value.contiguous() for name, value in model.state_dict().items()})
    new, old = models
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    stale = {"old.safetensors": old}
    cases: list[tuple[bool, dict[str, dict[str, torch.Tensor]], bool]] = [
        (True, {"model.safetensors": new}, False),
        (True, {"model.safetensors": {**new, head: new[table].clone()}}, False),
        (True, {"model.safetensors": {name: value for name, value in new.items() if name != head}}, False),
        (True, {"model.safetensors": {name: value for name, value in new.items() if name != table}}, False),
        (False, {"model.safetensors": new, **stale}, True),
        (False, {"model.safetensors": new, **stale}, False),
        (False, {"new.safetensors": new}, True),
        (False, {"a.safetensors": old, "b.safetensors": {name: new[name] for name in sorted(new)[:20]}}, True),
    ]
    seen = []
    for tied, files, index in cases:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "config.json").write_text(json.dumps(config_of("qwen2", {"tie_word_embeddings": tied})))
        for file_name, named in files.items():
            save_file(named, folder / file_name, metadata={"format": "pt"})
        if index:
            shards = [name for name in files if name != "model.safetensors"]
            where = {name: shard for shard in reversed(shards) for name in files[shard]}  # says the first shard: the last one's counts
            where = {name: shards[at % len(shards)] if len(shards) > 1 else shard for at, (name, shard) in enumerate(where.items())}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        truth = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        right = logprobs(truth, tokens)
        job = Job(prompt=tokens, params=SamplingParams(temperature=0.0, prompt_logprobs=20), max_tokens=1)
        Driver(load(folder, max_model_len=60)).run([job])
        for position, (ids, values) in job.prompt_logprobs.items():
            assert torch.allclose(torch.tensor(values), right[position - 1][ids], atol=TOLERANCE), (tied, list(files), position)
        seen.append(right)
    different = [(seen[a] - seen[b]).abs().max() > SHOWN for a, b in ((0, 1), (0, 3), (1, 3), (4, 7))]
    assert all(different)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_with_and_without_the_prefix_of_the_base_model(
    tmp_path: Path, load: Callable[..., Any], caplog: pytest.LogCaptureFixture, family: str, tied: bool
) -> None:
    """A base model saved alone has names without it; some tools add one too many. As `from_pretrained` takes them."""
    import transformers

    folder, tokens = tmp_path / "model", np.random.default_rng(7).integers(0, 131, 48).astype(np.int32)
    model = model_as_read(folder, config_of(family, {"tie_word_embeddings": tied}))
    sharpen(model, 5)
    named = {name: value.contiguous() for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    half = sorted(named)[::2]
    layouts = {
        "base": {name.removeprefix("model."): value for name, value in named.items()},
        "doubled": {f"model.{name}": value for name, value in named.items()},
        "mixed": {name.removeprefix("model.") if name in half else name: value for name, value in named.items()},
        "base with buffers": {name.removeprefix("model."): value for name, value in named.items()}
        | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    }
    for what, files in layouts.items():
        save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
        truth = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        right = logprobs(truth, tokens)
        assert torch.allclose(right, logprobs(model, tokens)), "transformers reads the same model"
        caplog.clear()
        job = Job(prompt=tokens, params=SamplingParams(temperature=0.0, prompt_logprobs=20), max_tokens=1)
        Driver(load(folder, max_model_len=60)).run([job])
        for position, (ids, values) in job.prompt_logprobs.items():
            assert torch.allclose(torch.tensor(values), right[position - 1][ids], atol=TOLERANCE), (what, position)
        said = [record.getMessage() for record in caplog.records if "the prefix 'model.'" in record.getMessage()]
        assert len(said) == 1, said


def test_a_tensor_too_many_is_still_refused_without_the_prefix(tmp_path: Path, load: Callable[..., Any]) -> None:
    folder = tmp_path / "model"
    model = model_as_read(folder, config_of("llama", {"tie_word_embeddings": False}))
    named = {name.removeprefix("model."): value.contiguous() for name, value in model.state_dict().items()}
    save_file({**named, "layers.0.self_attn.q_proj.bias": torch.ones(4)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
        load(folder, max_model_len=60)
    del named["norm.weight"]
    save_file(named, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing"):
        load(folder, max_model_len=60)


def test_an_absent_dtype_is_that_of_the_file(tmp_path: Path, load: Callable[..., Any]) -> None:
    import transformers

    folder = tmp_path / "model"
    model = model_as_read(folder, config_of("llama", {"torch_dtype": DROP}))
    for dtype in (torch.bfloat16, torch.float32):
        save_file(
            {name: value.to(dtype) for name, value in model.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
        assert load(folder).dtype == str(dtype).removeprefix("torch.")
