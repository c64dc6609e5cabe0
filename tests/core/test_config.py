"""Configuration: layers, errors that name things, sizes, "not supported yet"."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

from penstock.core import cli
from penstock.core.protocol import config as cfg
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.model_folder import with_model
from penstock.core.protocol.service_links import is_service_link


def test_layers_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.toml"
    file.write_text('port = 1\nmax-num-seqs = 3\n[engine]\nmax_num_batched_tokens = "1K"\nkv_cache_memory_bytes = "2M"\n')
    monkeypatch.setenv("PENSTOCK_PORT", "2")
    monkeypatch.setenv("PENSTOCK_MAX_NUM_SEQS", "4")
    config = cli.load_config(str(file), {"port": 3, "host": None})
    assert (config.port, config.max_num_seqs, config.max_num_batched_tokens, config.kv_cache_memory_bytes) == (3, 4, 1024, 2 << 20)
    assert config.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("layer", "param", "hint"),
    [
        ({"max_model_length": 3}, "max_model_length", "max_model_len"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size", "not supported yet"),
        ({"max_num_seqs": 0}, "max_num_seqs", "at least 1"),
        ({"max_num_seqs": "x"}, "max_num_seqs", "max_num_seqs must be a whole number, but is 'x'"),
        ({"enforce_eager": 1}, "enforce_eager", "true or false"),
        ({"served_model_name": [1]}, "served_model_name", "a list of texts"),
        ({"max_num_batched_tokens": 63}, "max_num_batched_tokens", "to at least 64, or lower --max-num-seqs to at most 63"),
        ({"max_num_batched_tokens": 512, "max_num_seqs": 513}, "max_num_batched_tokens", "to at least 513"),
        ({"max_n": 65}, "max_n", "64"),
        ({"num_gpu_blocks_override": 4, "max_model_len": 65}, "num_gpu_blocks_override", "at least 5"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override", "at least 1"),
        ({"max_logprobs": -1}, "max_logprobs", "0 or more"),
        ({"receive_timeout_s": 0}, "receive_timeout_s", "above 0"),
        ({"keep_alive_s": float("nan")}, "keep_alive_s", "above 0"),
        ({"engine_restarts": -1}, "engine_restarts", "0 or more"),
        ({"watchdog_timeout": 9.9}, "watchdog_timeout", "0 (never) or at least 10"),
        ({"watchdog_timeout": float("nan")}, "watchdog_timeout", "0 or more"),
        ({"shutdown_timeout": float("inf")}, "shutdown_timeout", "at most 604800 seconds"),
        ({"keep_alive_s": float("inf")}, "keep_alive_s", "at most 604800 seconds"),
        ({"priority_ageing_s": float("inf")}, "priority_ageing_s", "finite"),
        ({"grpc_port": 70000}, "grpc_port", "between 0 and 65535"),
        ({"grpc_port": 8000}, "grpc_port", "the port of HTTP, too"),
        ({"grpc_port": 0, "transports": ["openai"]}, "grpc_port", "needs the transport 'grpc'"),
        ({"seed": 99999999999999999999999}, "seed", "--seed must be between -9223372036854775808 and 9223372036854775807"),
        ({"max_num_seqs": 1 << 63}, "max_num_seqs", "9223372036854775807"),
        ({"served_model_name": ["a", " "]}, "served_model_name", "empty"),
        ({"transports": []}, "transports", "openai"),
        ({"enable_chunked_prefill": False, "max_model_len": 4096}, "max_num_batched_tokens", "long prompts"),
        ({"mixed_prefill_tokens": -1}, "mixed_prefill_tokens", "0 or more"),
        ({"itl_target_ms": -1.0}, "itl_target_ms", "must be 0, or from"),
        ({"itl_target_ms": float("nan")}, "itl_target_ms", "must be 0, or from"),
        ({"itl_target_ms": float("inf")}, "itl_target_ms", "must be 0, or from"),
        ({"enable_chunked_prefill": False, "itl_target_ms": 8.0}, "itl_target_ms", "forbids"),
        ({"enable_chunked_prefill": False, "mixed_prefill_tokens": 8}, "mixed_prefill_tokens", "forbids"),
        ({"stream_park_bytes": 5 << 20}, "stream_park_bytes", "must not exceed"),
        ({"dtype": 3}, "dtype", "a text"),
        ({"block_size": 24}, "block_size", "power of two"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "at most 1"),
        ({"port": 70000}, "port", "65535"),
        ({"api_key": [""]}, "api_key", "open to everybody"),
        ({"trust_remote_code": True}, "trust_remote_code", "is not supported. Model code is never run. Leave it out."),
        ({"override_generation_config": {"temprature": 1}}, "override_generation_config", "Did you mean 'temperature'?"),
        (
            {"override_generation_config": {"eos_token_id": 3}},
            "override_generation_config",
            "'eos_token_id' cannot be set there. Known: temp",
        ),
        ({"override_generation_config": {"top_p": 5}}, "override_generation_config", "top_p must be above 0"),
        ({"override_generation_config": {"max_new_tokens": 0}}, "override_generation_config", "at least 1"),
        ({"override_generation_config": {"do_sample": 1}}, "override_generation_config", "do_sample must be true or false"),
        ({"override_generation_config": "[1]"}, "override_generation_config", "JSON object"),
        ({"default_chat_template_kwargs": {"messages": []}}, "default_chat_template_kwargs", "'messages'"),
        ({"hf_overrides": {"x": {1, 2}}}, "hf_overrides", "cannot be written as JSON"),
        ({"root_path": "api"}, "root_path", "like /api/llm"),
        ({"root_path": "/a?b"}, "root_path", "like /api/llm"),
        ({"root_path": "//evil.example"}, "root_path", "like /api/llm"),
        ({"stream_interval": 1025}, "stream_interval", "from 1 to 1024"),
    ],
)
def test_wrong_values_name_the_option(layer: dict[str, object], param: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.build(layer)
    assert caught.value.param == param
    assert hint in caught.value.message


def test_variables_that_others_read_are_not_options() -> None:
    assert (
        cfg.from_env(
            {"PENSTOCK_CC": "clang", "PENSTOCK_KERNELS": "reference", "PENSTOCK_CACHE": "/x", "PENSTOCK_TILES": "/t", "HOME": "/h"}
        )
        == {}
    )


LINKS = {  # as the Kubernetes documentation has them, for services named penstock and penstock-api
    "PENSTOCK_SERVICE_HOST": "10.0.0.11",
    "PENSTOCK_SERVICE_PORT": "8000",
    "PENSTOCK_SERVICE_PORT_HTTP": "8000",
    "PENSTOCK_PORT": "tcp://10.0.0.11:8000",
    "PENSTOCK_PORT_8000_TCP": "tcp://10.0.0.11:8000",
    "PENSTOCK_PORT_8000_TCP_PROTO": "tcp",
    "PENSTOCK_PORT_8000_TCP_PORT": "8000",
    "PENSTOCK_PORT_8000_TCP_ADDR": "10.0.0.11",
    "PENSTOCK_PORT_53_UDP": "udp://[fd00::1]:53",
    "PENSTOCK_API_SERVICE_HOST": "10.0.0.12",
    "PENSTOCK_API_PORT": "tcp://10.0.0.12:80",
    "PENSTOCK_API_PORT_80_TCP_ADDR": "10.0.0.12",
}


def test_what_kubernetes_sets_for_a_service_of_this_name_is_skipped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    notes: list[str] = []
    found = cfg.from_env(LINKS | {"PENSTOCK_HOST": "0.0.0.0"}, notes.append)
    assert found == {"host": "0.0.0.0"}
    [note] = notes
    assert "PENSTOCK_API_PORT" in note
    assert f"and {len(LINKS) - 3} more" in note
    assert cfg.from_env(LINKS) == {}
    assert "enableServiceLinks" in caplog.text
    notes.clear()
    assert cfg.from_env({"PENSTOCK_PORT": "9000", "PENSTOCK_API_KEY": "tcp://x"}, notes.append) == {"port": 9000, "api_key": ["tcp://x"]}
    assert not notes
    for name, value in (("PENSTOCK_PROT", "tcp://10.0.0.1:1"), ("PENSTOCK_HOST_PORT", "80"), ("PENSTOCK_SERVICE", "tcp://x")):
        with pytest.raises(ConfigError):
            cfg.from_env({name: value})


def test_no_option_is_taken_for_a_service_link() -> None:
    for option in cfg.OPTIONS.values():
        assert not is_service_link(option.env, "1")


def test_unknown_names_in_environment_and_file_point_to_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_PORT"):
        cfg.from_env({"PENSTOCK_PROT": "1"})
    file = tmp_path / "p.toml"
    file.write_text("[server]\nprot = 1\n")
    with pytest.raises(ConfigError, match="'port'"):
        cfg.from_toml(file)
    file.write_text("[serverr]\nport = 1\n")
    with pytest.raises(ConfigError, match="'server'"):
        cfg.from_toml(file)
    file.write_text("[limits]\nport = 1\n")
    with pytest.raises(ConfigError, match=r"\[server\]"):
        cfg.from_toml(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        cfg.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('port = "x"', "port must be a whole number, but is 'x'"),
        ("[engine]\nmax-num-seqs = 1.5", "max-num-seqs must be a whole number, but is 1.5"),
        ('enforce_eager = "yes"', "enforce_eager must be true or false, but is 'yes'"),
        ("wiring = 16", "wiring must be one of 'cell', 'tasks', but is 16"),
        ("served_model_name = [1]", "served_model_name must be a list of texts, but is [1]"),
        ("max_model_len = []", "max_model_len must be a whole number, but is []"),
        ('max_body_bytes = "big"', "max_body_bytes: 'big' is not a valid value"),
        ("api_key = [123]", "api_key must be a list of texts, but is (hidden)"),
    ],
)
def test_a_wrong_type_in_a_file_names_the_file_and_the_key(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        cfg.from_toml(file)
    assert f"{file}: {said}" in caught.value.message
    assert "`" not in caught.value.message


def test_a_wrong_type_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_PORT must be a whole number, but is 'http'"):
        cfg.from_env({"PENSTOCK_PORT": "http"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("32k", 32000), ("32K", 32768), ("1G", 1 << 30), ("512MiB", 512 << 20), ("1.5M", 3 << 19), ("2GB", 2 << 30)],
)
def test_sizes(text: str, value: int) -> None:
    assert cfg.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "x", "1Q", "k", "1 2", "5X", "inf", "nan", "1e400"])
def test_bad_sizes_say_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="K, M, G or KiB, MiB, GiB for 1024s"):
        cfg.parse_size(text)


def test_a_value_out_of_range_names_where_it_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.toml"

    def said(**given: object) -> str:
        with pytest.raises(ConfigError) as caught:
            cli.load_config(str(file), given)
        return caught.value.message

    file.write_text("max-num-seqs = 0\n")
    assert said() == f"--max-num-seqs must be at least 1. --max-num-seqs is set in {file}."
    assert said(max_num_seqs=-1) == "--max-num-seqs must be at least 1."  # the command line won
    monkeypatch.setenv("PENSTOCK_MAX_NUM_SEQS", "0")
    assert said().endswith("--max-num-seqs is set by PENSTOCK_MAX_NUM_SEQS.")
    monkeypatch.delenv("PENSTOCK_MAX_NUM_SEQS")
    file.write_text("tensor_parallel_size = 2\n")
    assert said().endswith(f"--tensor-parallel-size is set in {file}.")
    file.write_text("max_num_seqs = 512\n")  # the other of the pair is named too
    assert said(max_num_batched_tokens=100).endswith(f"--max-num-seqs is set in {file}.")


@pytest.mark.parametrize("text", ["port = 1\n[server]\nport = 2\n", "max-num-seqs = 1\nmax_num_seqs = 2\n"])
def test_an_option_twice_in_a_file_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"p\.toml: '(port|max_num_seqs)' stands there more than once"):
        cfg.from_toml(file)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_bytes(b'host = "\xe9"\n')
    with pytest.raises(ConfigError, match=r"p\.toml is not valid TOML: byte 9 is not UTF-8"):
        cfg.from_toml(file)


def test_unknown_kernels_are_an_error() -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_KERNELS must be one of native, avx2, avx512, avx512bf16, reference, but is 'foo'"):
        cfg.from_env({"PENSTOCK_KERNELS": "foo"})


def test_every_option_is_documented_and_parses_its_own_default() -> None:
    for option in cfg.OPTIONS.values():
        assert option.doc
        assert option.group in cli.GROUP_TITLES
        if isinstance(option.default, (int, float, str)):
            assert cfg.from_text(option, str(option.default), where="x") == option.default


def capture(monkeypatch: pytest.MonkeyPatch) -> list[cfg.Config]:
    import penstock.core.processes.kernel as kernel

    seen: list[cfg.Config] = []

    def fake(config: cfg.Config) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(kernel, "serve", fake)
    return seen


def test_the_usual_vllm_start_line_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture(monkeypatch)
    line = (
        "serve --model m --tensor-parallel-size 1 --gpu-memory-utilization 0.9 --max-model-len 8192 --max-num-seqs 64"
        " --enable-prefix-caching --enable-chunked-prefill --port 8000 --served-model-name a,b --api-key k1 --api-key k2"
    )
    result = CliRunner().invoke(cli.cli, line.split())
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.model, config.max_model_len, config.max_num_seqs, config.port) == ("m", 8192, 64, 8000)
    assert config.served_model_name == ["a", "b"]
    assert config.api_key == ["k1", "k2"]


def test_aliases_and_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture(monkeypatch)
    result = CliRunner().invoke(
        cli.cli,
        ["serve", "m", "--disable-radix-cache", "--context-length", "4k", "--mem-fraction-static", "0.5", "--max_running_requests", "7"],
    )
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert config.enable_prefix_caching is False
    assert (config.max_model_len, config.gpu_memory_utilization, config.max_num_seqs) == (4000, 0.5, 7)


@pytest.mark.parametrize(
    ("words", "name"),
    [("-tp 2", "--tensor-parallel-size"), ("--log-requests", "--enable-log-requests")],
)
def test_flags_of_later_capabilities_are_known_and_refused(words: str, name: str) -> None:
    result = CliRunner().invoke(cli.cli, ["serve", "m", *words.split()])
    assert isinstance(result.exception, ConfigError)
    assert f"{name} " in result.exception.message
    assert "not supported yet" in result.exception.message


def test_an_empty_key_is_refused_not_taken_for_none() -> None:
    with pytest.raises(ConfigError, match="empty"):
        cfg.from_env({"PENSTOCK_API_KEY": ""})
    assert CliRunner().invoke(cli.cli, ["serve", "--api-key", ""]).exit_code != 0


def test_unknown_flag_is_refused_with_a_hint() -> None:
    result = CliRunner().invoke(cli.cli, ["serve", "--max-model-length", "5"])
    assert result.exit_code == 2
    assert "--max-model-len" in result.output


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ('["a", "b,c"]', ["a", "b,c"]),
        (' ["*"] ', ["*"]),
        ("[a", ["[a"]),
        ("[1]", ["[1]"]),
        ("[::1],b", ["[::1]", "b"]),
    ],
)
def test_a_list_is_written_with_commas_or_as_json(text: str, parts: list[str]) -> None:
    assert cfg.from_text(cfg.OPTIONS["served_model_name"], text, where="x") == parts
    assert cfg.from_env({"PENSTOCK_SERVED_MODEL_NAME": text}) == {"served_model_name": parts}


@pytest.mark.parametrize("text", ["", '[""]', "a,,b", '["a", " "]'])
def test_a_list_with_an_empty_entry_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_SERVED_MODEL_NAME"):
        cfg.from_env({"PENSTOCK_SERVED_MODEL_NAME": text})


def test_config_travels_as_json() -> None:
    config = cfg.build({"port": 1, "api_key": ["x"]})
    assert msgspec.json.decode(msgspec.json.encode(config), type=cfg.Config) == config


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://app.example", ["https://app.example"]),
        ("https://app.example, http://localhost:3000", ["https://app.example", "http://localhost:3000"]),
        (' ["https://app.example", "http://[::1]:3000"] ', ["https://app.example", "http://[::1]:3000"]),
        ('["*"]', ["*"]),
        ("[]", []),
        ("null", ["null"]),
        ("tauri://localhost", ["tauri://localhost"]),
    ],
)
def test_origins_come_alone_by_commas_or_as_json(text: str, wanted: list[str]) -> None:
    assert cfg.build(cfg.from_env({"PENSTOCK_ALLOWED_ORIGINS": text})).allowed_origins == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("allowed_origins", value)
            for value in ("https://app.example/", "app.example", "https://App.example", "https://a.example/x", "[1]")
        ),
        *(("allowed_origins", value) for value in ("https://a.example:443", "http://a.example:80", "http://[::1]:80")),
        *(("allowed_origins", value) for value in ("https://*.example", "https://a.example\r\nx-evil: 1", "//a.example", '["a"')),
        *(("allowed_methods", value) for value in ("GE T", "GET\r\nx: y")),
        *(("allowed_headers", value) for value in ("x-a:", "x a", "é")),
    ],
)
def test_what_no_browser_would_send_is_no_origin(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.build({name: [value]})
    assert caught.value.param == name
    assert "--" + name.replace("_", "-") in caught.value.message


def test_a_key_that_looks_like_a_list_is_a_key() -> None:
    for key in ("[]", '["a"]'):
        assert cfg.build(cfg.from_env({"PENSTOCK_API_KEY": key})).api_key == [key]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("model", "/m/a\udcff", r"'/m/a\xff' is not valid UTF-8. Rename that file or folder, or give a symbolic link to it."),
        ("tokenizer", "/m/a\udcff", r"'/m/a\xff' is not valid UTF-8. Rename"),
        ("chat_template", "/m/a\udcff", r"'/m/a\xff' is not valid UTF-8. Rename"),
        ("tables", "/m/a\udcff", r"'/m/a\xff' is not valid UTF-8. Rename"),
        ("api_key_file", "/m/a\udcff", r"'/m/a\xff' is not valid UTF-8. Rename"),
        ("uds", "/m/a\udcff", r"'/m/a\xff' is not valid UTF-8. Rename"),
        ("api_key", "a\udcff/", "(hidden) is not valid UTF-8. Write it in UTF-8."),
        ("served_model_name", "a\udcff", r"'a\xff' is not valid UTF-8. Write it in UTF-8."),
        ("default_chat_template_kwargs", '{"a": "\udcff"}', "is not valid UTF-8"),
        ("default_chat_template_kwargs", r'{"a": "\ud800"}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_utf_8_is_refused_from_wherever_it_comes(name: str, text: str, said: str) -> None:
    """The other processes are told every value, in UTF-8."""
    option = cfg.OPTIONS[name]
    for refused, where in (
        (lambda: cli.parse_serve_args([option.flag, text]), option.flag),
        (lambda: cfg.build(cfg.from_env({option.env: text})), option.env),
        (lambda: cfg.build({name: [text] if option.is_list else text}), name),
    ):
        with pytest.raises((ConfigError, click.UsageError)) as caught:
            refused()  # type: ignore[no-untyped-call]
        assert said in caught.value.message
        assert where in caught.value.message
        caught.value.message.encode()


def test_a_folder_below_one_that_is_no_utf_8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a\udcff" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConfigError, match=r"a\\xff/m' is not valid UTF-8. Rename"):
        with_model(cfg.build({"model": "m"}))
    (tmp_path / "link").symlink_to(folder)
    assert with_model(cfg.build({"model": str(tmp_path / "link")})).model == str(tmp_path / "link")
