"""The command line as vLLM's users write it: lists, switches, JSON in parts, words that stand alone."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from penstock.core import cli
from penstock.core.protocol.argv import SPELLINGS
from penstock.core.protocol.config import OPTIONS, Config
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.foreign import FOREIGN

FLAGS = (Path(__file__).parent / "vllm_flags.txt").read_text(encoding="utf-8").split()
SHORTS = [
    "-tp",
    "-pp",
    "-dp",
    "-q",
    "-ep",
    "-asc",
    "-sc",
    "-dc",
    "-cc",
    "-ac",
    "-O",
    "-n",
    "-r",
    "-dcp",
    "-pcp",
    "-dpn",
    "-dpr",
    "-dpl",
    "-dpa",
    "-dpp",
    "-dpb",
    "-dph",
    "-dpe",
    "-dpm",
]
LISTS = [option for option in OPTIONS.values() if option.is_list]
WORDS = [option for option in LISTS if option.name != "api_key_file"]
"""Those that take any word: that one's files are read, and have a test of their own (test_keys.py)."""


def parsed(line: str) -> Config:
    return cli.parse_serve_args(shlex.split(line))


def refused(line: str) -> str:
    with pytest.raises((click.UsageError, ConfigError)) as caught:
        parsed(line)
    return caught.value.message


# --- lists


def word_of(option: object, word: str) -> str:
    """A value that the option takes."""
    return f"https://{word}" if getattr(option, "name", "") == "allowed_origins" else word


@pytest.mark.parametrize("option", WORDS, ids=lambda option: option.name)
def test_a_list_option_that_is_repeated_adds(option: object) -> None:
    assert isinstance(option, type(LISTS[0]))
    a, b, c, d = (word_of(option, word) for word in "abcd")
    config = parsed(f"m {option.flag} {a} {option.flag} {b},{c} {option.flag}={d}")
    assert getattr(config, option.name) == [a, b, c, d]


@pytest.mark.parametrize("option", WORDS, ids=lambda option: option.name)
def test_a_list_option_takes_one_value_and_leaves_the_folder_alone(option: object, tmp_path: Path) -> None:
    assert isinstance(option, type(LISTS[0]))
    secret = word_of(option, "secret")
    config = parsed(f"{option.flag} {secret} {tmp_path}")
    assert (getattr(config, option.name), config.model) == ([secret], str(tmp_path))
    said = refused(f"{option.flag} secret other --port 1")
    assert f"{option.flag} takes one value a time" in said
    assert f"give {option.flag} again for each" in said
    assert ("other" in said) == (option.name != "api_key"), "a key must not be shown"
    assert f"{option.flag} takes one value a time" in refused(f"{tmp_path} {option.flag} a b")
    assert f"{option.flag} takes one value a time" in refused(f"--model m {option.flag} a {tmp_path}")


def test_the_error_writes_the_values_as_they_should_be() -> None:
    assert "write --served-model-name a,b, or give" in refused("--model m --served-model-name a b --port 1")


def test_only_one_model_can_be_served() -> None:
    assert "3 were given: 'm', 'a', 'b'" in refused("m a b")
    assert "given twice" in refused("m --model n")
    assert "given twice" in refused("m --model-path n")
    assert parsed("--port 1 -- m").model == "m"


@pytest.mark.parametrize(
    "line", ["m --api-key --port 1", "m --api-key --served_model_name x", "m --port", "--config --port 1", "m -tp --port 1"]
)
def test_a_missing_value_is_not_the_next_flag(line: str) -> None:
    runner = CliRunner().invoke(cli.cli, ["serve", *line.split()])
    assert runner.exit_code == 2
    assert "needs a value" in runner.output or "requires an argument" in runner.output


def test_a_value_may_begin_with_a_dash() -> None:
    assert parsed("m --api-key -abc --api-key=--port").api_key == ["-abc", "--port"]
    assert parsed("m --seed -5").seed == -5


def test_an_unknown_flag_is_named_before_anything_else_is_wrong() -> None:
    output = CliRunner().invoke(cli.cli, ["serve", "m", "--max-model-length", "5"]).output
    assert "No such option '--max-model-length'" in output
    assert "--max-model-len" in output


# --- spellings


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--enable_prefix_caching", "enable_prefix_caching", True),
        ("--no-enable-prefix-caching", "enable_prefix_caching", False),
        ("--enable-prefix-caching=False", "enable_prefix_caching", False),
        ("--enable-prefix-caching false", "enable_prefix_caching", False),
        ("--no-enable-prefix-caching=false", "enable_prefix_caching", True),
        ("--disable-radix-cache", "enable_prefix_caching", False),
        ("--no-disable-radix-cache", "enable_prefix_caching", True),
        ("--disable-log-stats", "log_stats", False),
        ("--api-server-count 3", "edge_workers", 3),
        ("-asc 2", "edge_workers", 2),
        ("-asc=2", "edge_workers", 2),
        ("-tp 1", "tensor_parallel_size", 1),
        ("-tp=1", "tensor_parallel_size", 1),
        ("--max_num_seqs=7", "max_num_seqs", 7),
        ("--uvicorn-log-level critical", "uvicorn_log_level", "critical"),
        ("--log-level-http error", "uvicorn_log_level", "error"),
        ("--fastapi-root-path /x", "root_path", "/x"),
        ("--random-seed 4", "seed", 4),
    ],
)
def test_spellings(words: str, name: str, value: object) -> None:
    assert getattr(parsed(f"{words} m"), name) == value
    assert parsed(f"{words} m").model == "m"


def test_a_switch_takes_true_or_false_only() -> None:
    assert "--enforce-eager is a switch" in refused("m --enforce-eager=maybe")


@pytest.mark.parametrize("flag", ["--help", "--help=all", "-h"])
def test_help_is_shown_in_vllms_form_too(flag: str) -> None:
    result = CliRunner().invoke(cli.cli, ["serve", flag])
    assert (result.exit_code, "--max-num-seqs" in result.output) == (0, True)


# --- JSON options


def test_json_options_take_parts() -> None:
    config = parsed(
        "m --override-generation-config.temperature 0.1 --override_generation_config.top_k=5 --hf-overrides.rope_scaling.factor 2.0"
    )
    assert json.loads(config.override_generation_config or "") == {"temperature": 0.1, "top_k": 5}
    assert json.loads(config.hf_overrides or "") == {"rope_scaling": {"factor": 2.0}}
    config = parsed(
        """m --hf-overrides '{"a": {"b": 1, "c": 2}}' --hf-overrides.a.b 3 --hf-overrides.d text --hf-overrides.e+ 1 --hf-overrides.e+ x"""
    )
    assert json.loads(config.hf_overrides or "") == {"a": {"b": 3, "c": 2}, "d": "text", "e": [1, "x"]}


@pytest.mark.parametrize(
    "line",
    [
        "m --hf-overrides.a",
        "m --hf-overrides {",
        "m --hf-overrides [] --hf-overrides.a 1",
        "m --hf-overrides.a 1 --hf-overrides.a.b 2",
        "m --port.x 1",
    ],
)
def test_wrong_parts_are_refused(line: str) -> None:
    assert CliRunner().invoke(cli.cli, ["serve", *line.split()]).exit_code == 2


# --- options of others


@pytest.mark.parametrize("flag", FLAGS)
def test_every_option_of_vllm_is_known(flag: str) -> None:
    assert f"--{flag}" in SPELLINGS
    assert f"--{flag.replace('-', '_')}".replace("_", "-") in SPELLINGS


@pytest.mark.parametrize("short", SHORTS)
def test_every_short_form_of_vllm_is_known(short: str) -> None:
    assert short in SPELLINGS


def test_no_option_is_ours_and_foreign() -> None:
    ours = {name.replace("-", "_") for o in OPTIONS.values() for name in (o.name, *o.aliases, *filter(None, [o.extra.get("no")]))}
    assert not ours & FOREIGN.keys()


@pytest.mark.parametrize("row", FOREIGN.values(), ids=lambda row: row.name)
def test_each_foreign_option_is_refused_or_noted_with_a_reason(row: object, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(row, type(next(iter(FOREIGN.values()))))
    unwanted = {"switch": "false" if "true" in row.neutral else "true", "value": "zz", "numbers": "7"}[row.kind]
    with caplog.at_level(logging.WARNING, "penstock.config"):
        if row.refused:
            said = refused(f"{row.flag}={unwanted} m")
            assert said.startswith(row.flag)
            assert row.reason in said
        else:
            assert parsed(f"{row.flag}={unwanted} m").model == "m"
            wanted = [] if row.neutral == ("*",) else [f"{row.flag} has no effect: {row.reason}"]
            assert [record.message for record in caplog.records] == wanted
        caplog.clear()
        for neutral in row.neutral:
            assert parsed(f"{row.flag}='{neutral}' m").model == "m"
        assert not caplog.records
    assert row.reason.endswith((".", ")."))


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        ("--structured-outputs-config.backend xgrammar", "xgrammar"),
        ('--structured-outputs-config \'{"backend": "xgrammar", "disable_fallback": false}\'', "xgrammar"),
        ('--structured-outputs-config \'{"backend": "guidance"}\'', "llguidance"),
        ("--structured-outputs-config.backend auto", None),
        ("--structured-outputs-config '{}'", None),
        ("--guided-decoding-backend xgrammar", "xgrammar"),
        ("--guided-decoding-backend auto", None),
        ("--grammar-backend guidance", "llguidance"),
        ("--grammar-backend llguidance --structured-outputs-config.backend xgrammar", "llguidance"),
    ],
)
def test_the_grammar_backend_by_other_names(words: str, backend: str | None) -> None:
    assert parsed(f"m {words}").grammar_backend == backend


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tokenizer-mode slow", "--tokenizer-mode slow is not supported"),
        ("--device-ids 2,3", "CUDA_VISIBLE_DEVICES"),
        ("--logprobs-mode=processed_logprobs", "raw logits"),
        ("--structured-outputs-config.disable_any_whitespace=true", "requests say what an answer obeys"),
        ("-n 2", "one engine on one device"),
        ("-dpn 1", "one engine on one device"),
        ("--lora-modules a=b", "LoRA"),
        ("--rope-theta 1e6", "--hf-overrides"),
    ],
)
def test_what_would_change_an_answer_is_refused(words: str, said: str) -> None:
    message = refused(f"m {words}")
    assert said in message


@pytest.mark.parametrize(
    "words",
    [
        "-O3",
        "-O 3",
        "-O=3",
        "-O.level 3",
        "--compilation-config 3",
        "--compilation-config.mode 3",
        "--compilation_config.cudagraph_mode=FULL",
        "-cc.mode=3",
        """--compilation-config '{"mode": 3}'""",
        "--no-async-scheduling",
        "--cudagraph-capture-sizes 1 2 4",
        "--watermark=0.1",
    ],
)
def test_hints_are_noted_once_and_swallow_nothing(words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "penstock.config"):
        assert parsed(f"{words} m").model == "m"
    assert [("has no effect" in record.message) for record in caplog.records] == [True]


def test_what_penstock_does_anyway_is_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    line = (
        "m --tokenizer-mode auto --async-scheduling --nnodes 1 -r 0 --limit-mm-per-prompt {} --cpu-offload-gb 0.0 --pooler-config None"
        " --no-enable-dbo --disable-uvicorn-access-log --runner generate --kv-transfer-config null"
    )
    with caplog.at_level(logging.WARNING, "penstock.config"):
        parsed(line)
    assert not caplog.records


def test_secrets_of_others_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "penstock.config"):
        parsed("m --hf-token hf_secret --admin-api-key admin_secret")
    assert len(caplog.records) == 2
    assert "_secret" not in caplog.text


def test_foreign_options_are_known_in_python_in_files_and_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    config = cli.cfg.build(
        {"async_scheduling": False, "cudagraph_capture_sizes": [1, 2], "disable_custom_all_reduce": True}, note=notes.append
    )
    assert config == Config()
    assert [note.split()[0] for note in notes] == ["--async-scheduling", "--cudagraph-capture-sizes"]
    assert cli.cfg.build({"pooler_config": None, "limit_mm_per_prompt": {}, "cpu_offload_gb": 0}, note=notes.append) == Config()
    assert len(notes) == 2
    with pytest.raises(ConfigError) as caught:
        cli.cfg.build({"tokenizer_mode": "slow"})
    assert (caught.value.param, caught.value.code) == ("tokenizer_mode", "unsupported_feature")
    file = tmp_path / "p.toml"
    file.write_text('[model]\ntokenizer-mode = "slow"\n')
    with pytest.raises(ConfigError, match="tokenizer-mode slow is not supported"):
        cli.load_config(str(file), {})
    monkeypatch.setenv("PENSTOCK_TOKENIZER_MODE", "mistral")
    with pytest.raises(ConfigError, match="tokenizer-mode mistral is not supported"):
        cli.load_config(None, {})


def test_other_spellings_of_our_own_options_are_known_in_python() -> None:
    config = cli.cfg.build(
        {"port": 1, "model": "a"}, {"disable_log_stats": True, "model_path": "b", "api_server_count": 2, "disable_radix_cache": False}
    )
    assert (config.log_stats, config.model, config.edge_workers, config.enable_prefix_caching) == (False, "b", 2, True)
    with pytest.raises(ConfigError, match="log_stats must be true or false"):
        cli.cfg.build({"disable_log_stats": "x"})


def test_notes_come_out_as_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.core.processes.kernel.serve", lambda config: 0)
    result = CliRunner().invoke(cli.cli, ["serve", "m", "-O3", "--log-format", "json"])
    (line,) = [json.loads(line) for line in result.output.splitlines()]
    assert (line["level"], line["process"]) == ("warning", "root")
    assert line["event"].startswith("--optimization-level has no effect: ")
