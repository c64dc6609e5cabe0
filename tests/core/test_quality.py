"""The record of what a quantised model costs, and the gate that asks for it: before any process starts, with the command that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.processes.kernel import serve
from penstock.core.processes.local import LocalServer
from penstock.core.protocol.config import Config, check
from penstock.core.protocol.control import Quality
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.quality import FIGURES, four_bits, gate, quality_of, read_record, record_file, sealed

RECORD: dict[str, Any] = {
    "scheme": "w4a16", "kl_mean": 0.02, "kl_p99": 0.2, "top1": 0.9, "ppl": 2.1, "ppl_full": 2.0, "tokens": 10, "text_sha256": "00",
    "layers": [{"name": "a", "error": 0.1}],
}  # fmt: skip
FOUR = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "compressed-tensors": (FOUR, True),
    "gptq": ({"quant_method": "gptq", "bits": 4}, True),
    "awq": ({"quant_method": "awq", "w_bit": 4}, True),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, True),
    "bitsandbytes, as transformers wrote it": ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, True),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}}, True),
    "torchao, a word": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, True),
    "torchao, a type": ({"quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_data": "int3"}}}}}, True),
    "torchao, 8 bits": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"type": "int16"}}}}, False),
    "modelopt": ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, True),
    "8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 4}, False),
    "fp8": ({"quant_method": "fp8"}, False),
    "wide": ({}, False),
}


def folder_of(tmp_path: Path, quantised: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantised} if quantised else {}))
    (tmp_path / "model.safetensors").write_bytes(b"w" * 100)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder_of(tmp_path, FOUR)


def keep(model: Path, record: dict[str, Any] = RECORD) -> None:
    record_file(model).write_text(json.dumps(sealed(record, model)))


def asked(model: Path, **options: Any) -> Config:
    return Config(model=str(model), **{"quality_gate": "strict", **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_which_checkpoints_have_four_bits(name: str, tmp_path: Path) -> None:
    quantised, four = CONFIGS[name]
    assert four_bits(folder_of(tmp_path, quantised), None) is four


def test_a_record_has_its_keys_and_counts(model: Path) -> None:
    keep(model)
    record, why = read_record(model)
    assert record is not None
    assert why == ""
    assert set(record) == {*FIGURES, "record_sha256"}
    assert {name: record[name] for name in FIGURES} == RECORD


@pytest.mark.parametrize("name", FIGURES)
def test_a_changed_record_is_no_record(name: str, model: Path) -> None:
    keep(model)
    record = json.loads(record_file(model).read_text())
    record[name] = 0.001
    record_file(model).write_text(json.dumps(record))
    assert read_record(model)[0] is None
    with pytest.raises(ConfigError, match=r"quality\.json was changed.*penstock quant report .* --against FULL"):
        gate(asked(model))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kl_mean": 0}', "\xff"])
def test_what_is_no_record_does_not_count(text: str, model: Path) -> None:
    record_file(model).write_bytes(text.encode("latin-1"))
    assert read_record(model)[0] is None
    with pytest.raises(ConfigError, match="penstock quant report"):
        gate(asked(model))


def test_a_record_counts_beside_its_own_weights_only(model: Path) -> None:
    keep(model)
    (model / "model.safetensors").write_bytes(b"v" * 100)
    assert read_record(model)[0] is None


def test_strict_asks_for_a_record_and_takes_it(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no quality\.json.*penstock quant report") as raised:
        gate(asked(model))
    assert raised.value.param == "quality_gate"
    keep(model)
    assert gate(asked(model)) is None


def test_the_bound_is_on_the_mean(model: Path) -> None:
    keep(model)
    assert gate(asked(model, quality_max_kl=0.02)) is None
    with pytest.raises(ConfigError, match=r"0\.02 a token.*--quality-max-kl 0\.01"):
        gate(asked(model, quality_max_kl=0.01))


def test_warn_starts_with_a_sentence_and_off_looks_at_nothing(model: Path) -> None:
    said = gate(asked(model, quality_gate="warn"))
    assert said is not None
    assert "penstock quant report" in said
    record_file(model).mkdir()
    assert gate(asked(model, quality_gate="off")) is None
    assert "cannot be read" in str(gate(asked(model, quality_gate="warn")))


def test_rounding_while_loading_has_no_record(tmp_path: Path) -> None:
    wide = folder_of(tmp_path, {})
    assert gate(asked(wide)) is None
    assert gate(asked(wide, quantization="int8")) is None
    keep(wide)
    with pytest.raises(ConfigError, match=r"--quantization int4 rounds.*penstock quantize .* --scheme w4a16"):
        gate(asked(wide, quantization="int4"))


def test_a_gguf_file_has_its_record_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" * 10)
    with pytest.raises(ConfigError, match=r"model\.gguf\.quality\.json"):
        gate(asked(file))
    keep(file)
    assert gate(asked(file)) is None


def test_a_bound_without_a_gate_is_an_error() -> None:
    check(Config(quality_gate="warn", quality_max_kl=0.1))
    with pytest.raises(ConfigError, match="--quality-gate warn or strict"):
        check(Config(quality_max_kl=0.1))
    with pytest.raises(ConfigError, match="0 or more"):
        check(msgspec.structs.replace(Config(quality_gate="warn"), quality_max_kl=-1.0))


def test_no_process_starts_past_a_strict_gate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(asked(model)) == 1
    assert "penstock quant report" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="penstock quant report"):
        LocalServer(asked(model), lambda message: None)


def test_a_warning_is_logged(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    LocalServer(asked(model, quality_gate="warn"), lambda message: None)
    assert "--quality-gate warn" in caplog.text


def test_a_server_tells_a_record_only_of_what_it_measured(model: Path) -> None:
    keep(model)
    seal = json.loads(record_file(model).read_text())["record_sha256"]
    told = quality_of(Config(model=str(model)))
    assert told == Quality(scheme="w4a16", status="measured", kl_mean=0.02, top1=0.9, record=seal)
    rounded = quality_of(Config(model=str(model), lm_head_quantization="int8"))
    assert rounded == Quality(scheme="compressed-tensors, lm_head int8", status="unmeasured")
    (model / "model.safetensors").write_bytes(b"v" * 100)
    assert quality_of(Config(model=str(model))) == Quality(scheme="compressed-tensors", status="unmeasured")


def test_what_is_wide_or_rounded_while_it_loads(tmp_path: Path) -> None:
    model = folder_of(tmp_path, {})
    assert quality_of(Config(model=str(model))) == Quality(scheme="wide", status="wide")
    assert quality_of(Config(model=str(model), quantization="int8")) == Quality(scheme="int8", status="unmeasured")
    both = quality_of(Config(model=str(model), quantization="int4", lm_head_quantization="int8"))
    assert both == Quality(scheme="int4, lm_head int8", status="unmeasured")
    assert quality_of(Config(model=None)) is None
    (tmp_path / "a.gguf").write_bytes(b"g")
    assert quality_of(Config(model=str(tmp_path / "a.gguf"))) == Quality(scheme="gguf", status="unmeasured")


def test_no_record_speaks_of_a_kv_cache_that_an_option_rounds(model: Path, tmp_path: Path) -> None:
    keep(model)
    rounded = Config(model=str(model), kv_cache_dtype="fp8")
    assert quality_of(rounded, "fp8_e4m3") == Quality(scheme="compressed-tensors, KV cache fp8_e4m3", status="unmeasured")
    both = Config(model=str(model), kv_cache_dtype="int8", lm_head_quantization="int8")
    assert quality_of(both, "int8") == Quality(scheme="compressed-tensors, lm_head int8, KV cache int8", status="unmeasured")
    for config, kv in ((Config(model=str(model)), "fp8_e4m3"), (Config(model=str(model), kv_cache_dtype="bfloat16"), "")):
        told = quality_of(config, kv)  # the checkpoint's own cache, with which it was measured; none
        assert told is not None
        assert (told.scheme, told.status, told.kl_mean) == ("w4a16", "measured", 0.02)
    wide = tmp_path / "wide"
    wide.mkdir()
    folder_of(wide, {})
    asked_for = Config(model=str(wide), kv_cache_dtype="int8")
    assert quality_of(asked_for, "int8") == Quality(scheme="wide, KV cache int8", status="unmeasured")


def test_a_head_of_four_bits_needs_a_record_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lm-head-quantization int4 rounds to 4 bits"):
        gate(asked(folder_of(tmp_path, {}), lm_head_quantization="int4"))
    assert gate(asked(tmp_path, lm_head_quantization="int8")) is None


def test_the_record_of_a_gguf_file_is_not_that_of_what_is_rounded_from_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" * 10)
    keep(file)
    with pytest.raises(ConfigError, match="--quantization int4 rounds"):
        gate(asked(file, quantization="int4"))
    assert quality_of(asked(file, quantization="int4")) == Quality(scheme="int4", status="unmeasured")
