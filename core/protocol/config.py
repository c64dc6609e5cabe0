"""The configuration of a Penstock server, as one frozen struct.

What it is: every option with its type, default, documentation, groups and aliases (vLLM's and SGLang's spellings), and how values are
layered: command line over environment (`PENSTOCK_*`) over a TOML file over defaults. Unknown names are errors that name the nearest
known one; options of later capabilities are known and refused with "not supported yet", never ignored; so are vLLM's and SGLang's that
Penstock does not have (core/protocol/foreign.py).
What it does not know: click, processes, what an option does. It is long because every option stands here, once.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from penstock.core.protocol.errors import ConfigError, spelled
from penstock.core.protocol.foreign import BACKENDS, FOREIGN, judge, structured_outputs
from penstock.core.protocol.generation import override_of
from penstock.core.protocol.sampling import MAX_N
from penstock.core.protocol.service_links import is_service_link
from penstock.core.protocol.speculation import SPECULATIVE_FIELDS, parsed
from penstock.core.protocol.wording import type_words

MiB = 1 << 20
GiB = 1 << 30
MOST_INTERVAL = 1024
MOST_SMOOTHING_MS = 1000
"""Tokens an event of a stream: what waits for one counts as nobody's unsent bytes."""
LONGEST_S = 7 * 24 * 3600
"""Most seconds of an option that is a time: timers take no infinity."""
WATCHDOG_LEAST_S = 10
"""Below that a watchdog would end processes that are merely busy: they beat once a second."""
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1
"""What a message can carry."""
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~%!$&'()*+,;=:@-]+)+/?|/")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""What HTTP calls a token: names of methods and headers."""
RESERVED_KWARGS = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""What a chat template gets from the request itself."""
KERNELS = ("native", "avx2", "avx512", "avx512bf16", "reference")
"""Values of PENSTOCK_KERNELS."""


def opt(doc: str, group: str, *aliases: str, **extra: Any) -> msgspec.Meta:
    """Documentation of an option: `aliases` are other flag spellings (without dashes in front)."""
    return msgspec.Meta(description=doc, extra={"group": group, "aliases": aliases, **extra})


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    # --- model
    model: Annotated[
        str | None,
        opt("Folder of a Hugging Face checkpoint, or a GGUF file; without it the demo model Brook is served.", "model", "model-path"),
    ] = None
    served_model_name: Annotated[list[str], opt("Name(s) that requests may use; the first is reported.", "model")] = []
    tokenizer: Annotated[str | None, opt("Folder with the tokenizer, or a GGUF file, if not the model's.", "model", "tokenizer-path")] = (
        None
    )
    chat_template: Annotated[str | None, opt("Jinja file (or text) that replaces the model's chat template.", "model")] = None
    default_chat_template_kwargs: Annotated[
        str | None, opt("JSON object: chat_template_kwargs of requests that do not give them.", "model", json=True)
    ] = None
    tool_call_parser: Annotated[
        str | None, opt("How the model writes calls of tools: a format's name, or none. Default: found from the chat template.", "model")
    ] = None
    reasoning_parser: Annotated[
        str | None, opt("How it writes its reasoning: a format's name, or none. Default: found from the chat template.", "model")
    ] = None
    enable_auto_tool_choice: Annotated[bool, opt("No effect: requests may bring tools wherever the model's format is known.", "model")] = (
        False
    )
    dtype: Annotated[
        str,
        opt(
            "Weights and activations: auto (the checkpoint's), bfloat16, float16 (half), float32 (float), or another that the device knows.",
            "model",
        ),
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        opt("Longest sequence (prompt and output), in tokens; suffix k allowed.", "model", "context-length", size=True),
    ] = None
    load_format: Annotated[str, opt("How weights are read: auto, safetensors, gguf, dummy (random), or a plugin's.", "model")] = "auto"
    quantization: Annotated[
        str | None,
        opt(
            "Quantise wide weights while they load: int8, int8-w8a8, int4, fp8, nf4, mxfp4, or a plugin's. What a checkpoint is quantised with is read from its config.json or GGUF file.",
            "model",
            "quantize",
            short="-q",
        ),
    ] = None
    lm_head_quantization: Annotated[
        str | None,
        opt(
            "Quantise a wide output head while it loads, too, in one of the same forms: faster steps, and a loss that no record of the checkpoint covers. A tied embedding table"
            " stays wide beside it. A checkpoint's own quantised head needs no option.",
            "model",
        ),
    ] = None
    quality_gate: Annotated[
        Literal["off", "warn", "strict"],
        opt(
            "What 4-bit weights without a record of what they cost (`penstock quant report`) mean: nothing, a warning, or no start (strict).",
            "model",
        ),
    ] = "off"
    quality_max_kl: Annotated[
        float | None,
        opt("The same for a record whose mean KL divergence from the wide model is larger, in nats a token.", "model"),
    ] = None
    hf_overrides: Annotated[str | None, opt("JSON merged over config.json.", "model", "json-model-override-args", json=True)] = None
    generation_config: Annotated[
        str,
        opt(
            "Sampling defaults: auto or model (its generation_config.json), vllm or openai (none), or a folder.",
            "model",
            "sampling-defaults",
        ),
    ] = "auto"
    override_generation_config: Annotated[
        str | None,
        opt("JSON merged over those defaults, with generation_config.json's names; null: the server's own default.", "model", json=True),
    ] = None
    seed: Annotated[int, opt("Seed of dummy weights.", "model", "random-seed")] = 0

    # --- memory and batch
    block_size: Annotated[int, opt("Tokens per KV block.", "engine", "page-size")] = 16
    kv_cache_memory_bytes: Annotated[
        int | None, opt("Bytes of KV cache (suffixes K, M, G); on CPU the default is 1 GiB.", "engine", size=True)
    ] = None
    gpu_memory_utilization: Annotated[float, opt("Share of a GPU's memory that the engine may fill.", "engine", "mem-fraction-static")] = (
        0.9
    )
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "bfloat16", "float16", "float32"],
        opt(
            "Keys and values in the KV cache: in 8 bits (fp8 is fp8_e4m3) with a scale a token and head, or as the model computes. auto: what the checkpoint says of its"
            " cache, else the model's dtype (docs/quantisation.md).",
            "engine",
        ),
    ] = "auto"
    num_gpu_blocks_override: Annotated[int | None, opt("Exact number of KV blocks (tests).", "engine")] = None
    max_num_seqs: Annotated[int, opt("Most sequences in one step.", "engine", "max-running-requests", "max-batch-size")] = 64
    max_num_batched_tokens: Annotated[
        int, opt("Token budget of one step.", "engine", "chunked-prefill-size", "max-prefill-tokens", size=True)
    ] = 2048
    mixed_prefill_tokens: Annotated[
        int | None,
        opt(
            "Most prompt tokens in a step that also decodes, whatever waits; 0: what the budget leaves. Default: what --itl-target-ms says.",
            "engine",
            size=True,
        ),
    ] = None
    itl_target_ms: Annotated[
        float | None,
        opt(
            "What a step that decodes should take at most with prompts beside, in ms, nearly always (97 of 100 steps, so P95 of inter-token latency): their chunks are as large"
            " as measured step times allow. 0: no limit. Default: on a GPU 1.28 times the median of steps that decode, as far as nobody waits long for it; none on a CPU,"
            " in `penstock.LLM`, or with --mixed-prefill-tokens.",
            "engine",
        ),
    ] = None
    enable_chunked_prefill: Annotated[bool, opt("Split long prompts over steps.", "engine")] = True
    enable_prefix_caching: Annotated[bool, opt("Reuse the KV of equal prefixes.", "engine", no="disable-radix-cache")] = True
    admission_forecast: Annotated[
        bool,
        opt(
            "Start a prompt only if the KV cache will probably hold all that run until they end, by their limits and by how long answers have been; without, if it"
            " holds them now, and whoever later finds no room is computed again.",
            "engine",
        ),
    ] = True
    scheduling_policy: Annotated[str, opt("fcfs, priority, or a plugin's.", "engine", "schedule-policy")] = "fcfs"
    priority_ageing_s: Annotated[float, opt("Waiting this long is worth one priority level; 0: no ageing.", "engine")] = 30.0
    max_num_queued_reqs: Annotated[int, opt("Most requests waiting; more are refused with 429.", "engine", "max-queued-requests")] = 1024
    max_num_queued_tokens: Annotated[int, opt("Most prompt tokens waiting; more are refused with 429.", "engine", size=True)] = 4 * MiB
    deterministic: Annotated[
        bool, opt("Bit-equal results whatever the batch, chunking or cache, on one machine.", "engine", "enable-deterministic-inference")
    ] = False
    enforce_eager: Annotated[bool, opt("No captured graphs.", "engine", "disable-cuda-graph")] = False

    # --- plugins
    device: Annotated[str, opt("Device plugin: auto, cpu, ...", "plugins")] = "auto"
    attention_backend: Annotated[str | None, opt("Attention plugin; default: the best that fits.", "plugins")] = None
    grammar_backend: Annotated[
        str | None,
        opt(
            "Grammar plugin: llguidance, xgrammar where it is installed, or another's; default: llguidance.",
            "plugins",
            "guided-decoding-backend",
        ),
    ] = None
    skip_broken_plugins: Annotated[bool, opt("Start without plugins that fail to load, instead of stopping.", "plugins")] = False
    transports: Annotated[list[str], opt("Allowed transport plugins.", "plugins")] = msgspec.field(
        default_factory=lambda: ["openai", "anthropic", "responses", "tgi", "tokens", "websocket", "grpc", "playground"]
    )

    # --- server
    host: Annotated[str, opt("Address to listen on; loopback unless told otherwise.", "server")] = "127.0.0.1"
    port: Annotated[int, opt("Port to listen on; 0 picks a free one.", "server")] = 8000
    uds: Annotated[str | None, opt("Listen on this unix socket instead.", "server")] = None
    grpc_port: Annotated[
        int | None,
        opt("Port of --host on which gRPC is spoken, too (docs/grpc.md); 0 picks a free one. Default: none.", "server", listener="grpc"),
    ] = None
    strict_fields: Annotated[
        bool, opt("Refuse requests with fields that nobody knows (400), instead of naming them in a header of the reply.", "server")
    ] = False
    trust_request_chat_template: Annotated[
        bool,
        opt(
            "Take a chat template from a request (chat_template). It is rendered in a sandbox, two at a time in processes of their own, in at most 5 s and half a gigabyte. Keys (or addresses) take turns, and what was quick lately waits for no other.",
            "server",
        ),
    ] = False
    root_path: Annotated[
        str, opt("Path under which a reverse proxy shows this server; it may pass it on or cut it off.", "server", "fastapi-root-path")
    ] = ""
    edge_workers: Annotated[int, opt("HTTP processes.", "server", "api-server-count", short="-asc")] = 1
    api_key: Annotated[
        list[str],
        opt(
            "Key(s) that requests must bring; every path but health is protected. Others on this machine can read a command line: use"
            " --api-key-file, or PENSTOCK_API_KEY or VLLM_API_KEY in the environment.",
            "server",
            secret=True,
        ),
    ] = []
    api_key_file: Annotated[list[str], opt("File(s) with such keys, one a line; # begins a comment.", "server")] = []
    tables: Annotated[
        str | None, opt("TOML file of keys, of tenants and of what they may use; read again on SIGHUP (docs/tables.md).", "server")
    ] = None
    allowed_origins: Annotated[
        list[str], opt("Web origins whose pages may send requests (CORS): https://app.example; * is any. Default: none.", "server")
    ] = []
    allowed_methods: Annotated[list[str], opt("Methods that such pages may use.", "server")] = msgspec.field(default_factory=lambda: ["*"])
    allowed_headers: Annotated[list[str], opt("Headers that such pages may send.", "server")] = msgspec.field(default_factory=lambda: ["*"])
    allow_credentials: Annotated[bool, opt("Let such pages send cookies and keys of their own accord.", "server")] = False
    shutdown_timeout: Annotated[
        float, opt("Seconds to finish running requests after SIGTERM.", "server", "graceful-termination-timeout")
    ] = 30.0
    queue_full_status: Annotated[Literal[429, 503], opt("Status of a refused admission.", "server")] = 429
    metrics_compat: Annotated[Literal["vllm", "none"], opt("Also export vllm:* metric names.", "server")] = "vllm"
    enable_playground: Annotated[
        bool, opt("Serve a page to try the server in at / (docs/playground.md).", "server", no="no-playground")
    ] = True

    # --- what is kept between requests
    enable_store: Annotated[
        bool, opt("Keep what requests ask to be kept (store: true), files and batches (docs/storage.md).", "storage", no="no-store")
    ] = True
    store: Annotated[
        str | None, opt("SQLite file in which it is kept. Default: in memory, or until the end in a private folder.", "storage")
    ] = None
    store_ttl_s: Annotated[float, opt("Seconds that it is kept, at most; 0: until it is deleted. Default: 30 days.", "storage")] = (
        30 * 86400.0
    )
    store_max_bytes: Annotated[
        int,
        opt("Most bytes kept, but for files' contents; when full, the oldest of the tenant with most is dropped.", "storage", size=True),
    ] = 256 * MiB
    store_max_rows: Annotated[int, opt("Most things kept.", "storage", size=True)] = 100_000
    max_file_bytes: Annotated[int, opt("Largest file that may be handed in.", "storage", size=True)] = 200 * MiB
    max_files: Annotated[int, opt("Most files of a tenant, those that batches make among them.", "storage")] = 1000
    max_files_bytes: Annotated[int, opt("Beyond so many bytes in files no more are taken.", "storage", size=True)] = 4 * GiB
    max_batch_lines: Annotated[int, opt("Most requests of a batch.", "storage")] = 50_000
    batch_in_flight: Annotated[
        int | None,
        opt("Most requests of batches that run at once while nobody else asks. Default: a quarter of --max-num-seqs.", "storage"),
    ] = None

    # --- limits
    max_body_bytes: Annotated[int, opt("Largest request body, and message of a WebSocket or of gRPC.", "limits", size=True)] = 32 * MiB
    max_header_bytes: Annotated[int, opt("Largest request header block.", "limits", size=True)] = 64 << 10
    receive_timeout_s: Annotated[
        float,
        opt("Seconds for a request's head, and for a pause in its body (which must come at 1 KiB/s); then 408.", "limits"),
    ] = 30.0
    max_prompt_chars: Annotated[
        int | None,
        opt("Longest text of one prompt, in characters. Default: 16 for each token of the context, at least 1M.", "limits", size=True),
    ] = None
    max_messages: Annotated[int, opt("Most messages of one conversation.", "limits")] = 8192
    max_prompts: Annotated[int, opt("Most prompts in one completions request.", "limits")] = 128
    max_n: Annotated[int, opt("Largest n.", "limits")] = 64
    max_choices: Annotated[int, opt("Most answers of one request: prompts times n.", "limits")] = 512
    max_stop: Annotated[int, opt("Most stop strings.", "limits")] = 16
    max_logprobs: Annotated[int, opt("Largest logprobs and top_logprobs.", "limits")] = 20
    max_streams: Annotated[int, opt("Most requests in progress at one edge; more are refused with 429.", "limits")] = 4096
    max_socket_streams: Annotated[int, opt("Most streams of one WebSocket, or calls of one gRPC connection, at once.", "limits")] = 256
    stream_park_bytes: Annotated[int, opt("Unsent bytes of a stream at which its sequence is parked.", "limits", size=True)] = 256 << 10
    park_kv_s: Annotated[
        float, opt("A request that is parked for so long gives its KV cache to others, and is computed again when it goes on.", "limits")
    ] = 5.0
    stream_max_bytes: Annotated[int, opt("Unsent bytes at which a stream is cut.", "limits", size=True)] = 4 * MiB
    stream_stall_s: Annotated[float, opt("A parked stream whose client reads nothing for so long is cut.", "limits")] = 60.0
    keep_alive_s: Annotated[float, opt("SSE comment after this long without an event; a ping of WebSockets and of gRPC.", "limits")] = 10.0
    stream_interval: Annotated[int, opt("Tokens an event of a stream, after the first; a request may say another number.", "limits")] = 1
    stream_smoothing_ms: Annotated[
        float,
        opt(
            "Tokens of a stream that come together (speculation) leave one after the other, none more than so many milliseconds later; 0: as they come. A request may say"
            " another number.",
            "limits",
        ),
    ] = 0.0
    max_retain_s: Annotated[float, opt("Longest retain_s of a stream that can be resumed; 0: none can.", "limits")] = 600.0
    retained_stream_bytes: Annotated[int, opt("Most that is kept of one retained stream.", "limits", size=True)] = 8 * MiB
    retained_bytes: Annotated[int, opt("Most that is kept of all retained streams.", "limits", size=True)] = 256 * MiB

    # --- observability
    log_level: Annotated[Literal["debug", "info", "warning", "error"], opt("Least level that is logged.", "observability")] = "info"
    log_format: Annotated[Literal["auto", "console", "json"], opt("auto: console on a terminal, else JSON.", "observability")] = "auto"
    uvicorn_log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug", "trace"] | None,
        opt("Least level that the HTTP processes log; default: --log-level.", "observability", "log-level-http"),
    ] = None
    log_stats: Annotated[bool, opt("Log a line of figures every 10 s while requests run.", "observability", no="disable-log-stats")] = True
    otlp_traces_endpoint: Annotated[
        str | None, opt("OTLP/HTTP traces endpoint; the OTEL_* variables win.", "observability", "otlp-endpoint")
    ] = None

    # --- speculation
    speculative_config: Annotated[
        str | None,
        opt(
            'JSON object: who drafts tokens that a step then computes along, and how many. {"method": "ngram"}, {"model": FOLDER}, or several in order as'
            ' {"methods": [...]}. Fields of each: ' + SPECULATIVE_FIELDS + " (docs/speculation.md; vLLM's others are known).",
            "speculation",
            json=True,
            short="-sc",
        ),
    ] = None
    speculative_model: Annotated[
        str | None,
        opt(
            "Folder of the model that drafts, or the name of one that comes with the demo model (brook-draft); its config.json says the method.",
            "speculation",
            "spec-model",
            "speculative-draft-model-path",
        ),
    ] = None
    num_speculative_tokens: Annotated[
        int | None,
        opt(
            "The most drafts behind a token (how many a step has is chosen anew every step). Default: what the drafter makes.",
            "speculation",
            "spec-tokens",
            "speculative-num-steps",
        ),
    ] = None

    # --- machinery
    wiring: Annotated[Literal["cell", "tasks"], opt("tasks: every engine actor in its own task (debugging).", "machinery")] = "cell"
    threads: Annotated[
        int | None, opt("Compute threads of the CPU device; default: all cores, or what a container's quota leaves.", "machinery")
    ] = None
    engine_restarts: Annotated[int, opt("Restarts of a died process within 60 s before the server gives up.", "machinery")] = 3
    watchdog_timeout: Annotated[
        float,
        opt(
            "Seconds without a sign of life, or (GPU) with work and without a finished step, after which a process is ended and started again;"
            " if it still can, it writes its threads' stacks to stderr first. 0: never.",
            "machinery",
        ),
    ] = 300.0

    # --- known, not there yet: only the neutral value is accepted
    tensor_parallel_size: Annotated[int, opt("GPUs per model; only 1 so far.", "later", "tp", "tp-size", neutral=1, short="-tp")] = 1
    pipeline_parallel_size: Annotated[int, opt("Pipeline stages; only 1 so far.", "later", "pp", "pp-size", neutral=1, short="-pp")] = 1
    data_parallel_size: Annotated[int, opt("Engine replicas; only 1 so far.", "later", "dp", "dp-size", neutral=1, short="-dp")] = 1
    enable_expert_parallel: Annotated[bool, opt("Not supported yet.", "later", neutral=False, short="-ep")] = False
    enable_lora: Annotated[bool, opt("Not supported yet.", "later", neutral=False)] = False
    trust_remote_code: Annotated[bool, opt("Not supported: model code is never run.", "later", neutral=False)] = False
    download_dir: Annotated[str | None, opt("Not supported: nothing is downloaded.", "later", neutral=None)] = None
    revision: Annotated[str | None, opt("Not supported: nothing is downloaded; name the folder.", "later", neutral=None)] = None
    max_total_tokens: Annotated[int | None, opt("Not supported yet: use --kv-cache-memory-bytes.", "later", neutral=None)] = None
    enable_log_requests: Annotated[bool, opt("Not supported yet.", "later", "log-requests", neutral=False, no="disable-log-requests")] = (
        False
    )
    enable_log_outputs: Annotated[bool, opt("Not supported yet.", "later", neutral=False)] = False
    swap_space: Annotated[float, opt("Not supported yet.", "later", neutral=0.0)] = 0.0
    ssl_keyfile: Annotated[str | None, opt("Not supported yet: put a TLS proxy in front.", "later", neutral=None)] = None
    ssl_certfile: Annotated[str | None, opt("Not supported yet: put a TLS proxy in front.", "later", neutral=None)] = None


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option of Config, unfolded for whoever builds flags or documentation."""

    name: str
    type: Any
    default: Any
    doc: str
    group: str
    aliases: tuple[str, ...]
    extra: dict[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return "PENSTOCK_" + self.name.upper()

    @property
    def listener(self) -> str:
        """Of a port beside HTTP's: the transport that listens there, by whose name edges find the socket."""
        return str(self.extra.get("listener", ""))

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is list

    @property
    def is_bool(self) -> bool:
        return self.type is bool

    @property
    def is_size(self) -> bool:
        return bool(self.extra.get("size"))

    @property
    def is_json(self) -> bool:
        """A JSON object, kept as text; Python and TOML may give it as a mapping."""
        return bool(self.extra.get("json"))

    @property
    def choices(self) -> tuple[Any, ...]:
        kind = _one(self)
        return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _options() -> dict[str, Option]:
    hints = typing.get_type_hints(Config, include_extras=True)
    out: dict[str, Option] = {}
    for field in msgspec.structs.fields(Config):
        kind, meta = typing.get_args(hints[field.name])[:2]
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        extra = dict(meta.extra or {})
        out[field.name] = Option(
            name=field.name,
            type=kind,
            default=default,
            doc=meta.description or "",
            group=extra.pop("group"),
            aliases=extra.pop("aliases"),
            extra=extra,
        )
    return out


OPTIONS: dict[str, Option] = _options()
ALIASES: dict[str, tuple[str, bool]] = {
    **{alias.replace("-", "_"): (o.name, False) for o in OPTIONS.values() for alias in o.aliases},
    **{o.extra["no"].replace("-", "_"): (o.name, True) for o in OPTIONS.values() if o.extra.get("no")},
}
"""Other spellings in Python: the option, and whether true means false of it."""


def further_ports(config: Config) -> list[tuple[Option, int]]:
    """Ports that are asked for beside HTTP's, each with its option."""
    given = [(option, getattr(config, option.name)) for option in OPTIONS.values() if option.listener]
    return [(option, port) for option, port in given if port is not None]


_SUFFIX = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": MiB, "G": GiB, "KiB": 1024, "MiB": MiB, "GiB": GiB}


SIZE_WORDS = "allowed: a number, alone or with a suffix: k, m, g for thousands; K, M, G or KiB, MiB, GiB for 1024s"


def parse_size(text: str) -> int:
    """'4096', '32k' (thousands), '32K' (1024s), '1G', '512MiB' -> int. Raises ValueError."""
    digits = text.rstrip("BbiKkMmGg")
    suffix = text[len(digits) :].removesuffix("B") if text.endswith("iB") is False else text[len(digits) :]
    try:
        number = int(digits) if digits.isdecimal() else float(digits)
        return round(number * _SUFFIX[suffix])
    except (ValueError, KeyError, OverflowError):  # a float may be infinite, or no number
        raise ValueError(SIZE_WORDS) from None


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' Did you mean X?' or ''."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _one(option: Option) -> Any:
    """The scalar type of a list or optional option."""
    kind = option.type
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def from_text(option: Option, text: str, *, where: str) -> Any:
    """A value from the environment or the command line. Raises ConfigError naming `where`."""
    _check_unicode(option, text, where)
    try:
        if option.is_list:
            secret = bool(option.extra.get("secret"))  # a key is what it is, whatever it looks like
            parts = [part.strip() for part in (text.split(",") if secret else _parts(text))]
            if not all(parts):
                raise ValueError("an empty entry; leave the option out to have none")
            return parts
        kind = _one(option)
        if kind is bool:
            low = text.strip().lower()
            if low in ("1", "true", "yes", "on"):
                return True
            if low in ("0", "false", "no", "off"):
                return False
            raise ValueError("not a yes or no")
        if option.is_size:
            return parse_size(text.strip())
        if option.is_json:
            return _object_text(text)
        return msgspec.convert(text.strip(), kind, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{where} must be {type_words(kind)}, but is {_shown(option, text)}.", param=where) from None
    except ValueError as error:
        raise ConfigError(f"{where}: {_shown(option, text)} is not a valid value for {option.name} ({error}).", param=where) from None


def _parts(text: str) -> list[str]:
    """Of a list: between commas, or a JSON list of texts, as vLLM has some."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(text, type=list[str])
    return text.split(",")


def _object_text(text: str) -> str:
    """Raises ValueError if `text` is no JSON object, or names a key twice: of two values one would count without a word."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append(next(key for at, key in enumerate(keys) if key in keys[:at]))
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if twice:
        raise ValueError(f"it has the key '{spelled(twice[0]):.80}' twice; leave one of them out")
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!a}, half of a surrogate pair") from None
    return text


def _shown(option: Option, value: Any) -> str:
    return "(hidden)" if option.extra.get("secret") else f"{value!r:.200}"


def typed(option: Option, value: Any, *, where: str) -> Any:
    """A value that has a type already (TOML, Python). Raises ConfigError that begins with `where`."""
    if isinstance(value, str) and (option.is_size or option.is_list or option.is_json):
        return from_text(option, value, where=where)
    if isinstance(value, Mapping) and option.is_json:
        try:
            json.dumps(value, ensure_ascii=False).encode()
            return json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where} cannot be written as JSON: {error}.", param=option.name) from None
    for text in value if isinstance(value, list) else [value]:
        _check_unicode(option, text, where)
    try:
        return msgspec.convert(value, option.type)
    except msgspec.ValidationError:
        raise ConfigError(f"{where} must be {type_words(option.type)}, but is {_shown(option, value)}.", param=option.name) from None


def _check_unicode(option: Option, value: Any, where: str) -> None:
    """The other processes are told every value, and names of files need not be text. Raises ConfigError."""
    if not isinstance(value, str) or value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        secret = bool(option.extra.get("secret"))
        shown = "(hidden)" if secret else f"'{spelled(value):.200}'"
        remedy = LINK_IT if not secret and ("/" in value or os.path.lexists(value)) else "Write it in UTF-8."
        raise ConfigError(f"{where}: {shown} is not valid UTF-8. {remedy}", param=where) from None


LINK_IT = "Rename that file or folder, or give a symbolic link to it."


class Values(dict[str, Any]):
    """Option values of one layer; `source` says in words where they were set."""

    def __init__(self) -> None:
        super().__init__()
        self.source: dict[str, str] = {}


def from_env(environ: Mapping[str, str] | None = None, note: Callable[[str], None] | None = None) -> Values:
    """PENSTOCK_* variables as option values; an unknown one is an error. Those of RESERVED_ENV are not options. VLLM_API_KEY is one key, for
    where PENSTOCK_API_KEY says nothing. `note` gets a sentence if variables are skipped (service_links.py); by default it is logged."""
    out = Values()
    environ = os.environ if environ is None else environ
    if VLLM_KEY in environ and "PENSTOCK_API_KEY" not in environ:
        _check_unicode(OPTIONS["api_key"], environ[VLLM_KEY], VLLM_KEY)
        out["api_key"], out.source["api_key"] = [environ[VLLM_KEY]], f"by {VLLM_KEY}"
    links = [key for key, text in environ.items() if key.startswith("PENSTOCK_") and is_service_link(key, text)]
    if links:
        (note or logging.getLogger("penstock.config").warning)(
            f"Environment variables that Kubernetes sets for a service named penstock are no options, and skipped: {', '.join(sorted(links)[:3])}"
            f"{f' and {len(links) - 3} more' if len(links) > 3 else ''}. enableServiceLinks: false in the pod leaves them out."
        )
    for key, text in environ.items():
        if key == "PENSTOCK_KERNELS" and text and text not in KERNELS:
            raise ConfigError(f"PENSTOCK_KERNELS must be one of {', '.join(KERNELS)}, but is {text!r}.{nearest(text, KERNELS)}", param=key)
        if not key.startswith("PENSTOCK_") or key in RESERVED_ENV or key in links:
            continue
        name = key.removeprefix("PENSTOCK_").lower()
        if name in OPTIONS:
            out[name] = from_text(OPTIONS[name], text, where=key)
        elif name in FOREIGN:
            out[name] = text
        else:
            raise ConfigError(f"Environment variable {key} is not known.{nearest(key, (o.env for o in OPTIONS.values()))}", param=key)
        out.source[name] = f"by {key}"
    return out


RESERVED_ENV = frozenset({"PENSTOCK_TRACE_HOOKS", "PENSTOCK_CONFIG", "PENSTOCK_CACHE", "PENSTOCK_CC", "PENSTOCK_KERNELS", "PENSTOCK_TILES"})
"""Read elsewhere: hooks' trace, the configuration file, the kernels' cache, the CPU kernels' compiler and choice, and the GPU's table of tiles."""
VLLM_KEY = "VLLM_API_KEY"
KEY_ENV = (VLLM_KEY, "PENSTOCK_API_KEY")


def from_toml(path: str | Path) -> Values:
    """A TOML file: options at the top level or in tables named like the groups; dashes may stand for underscores. Each stands once."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.", param="config") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.", param="config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The configuration file {path} is not valid TOML: byte {error.start + 1} is not UTF-8. Save it as UTF-8.", param="config"
        ) from None
    groups = {option.group for option in OPTIONS.values()}
    flat = Values()
    for key, value in raw.items():
        inner = value if isinstance(value, dict) and key in groups else {key: value}
        for name, item in inner.items():
            field = name.replace("-", "_")
            if field in FOREIGN and field not in OPTIONS:
                flat[field], flat.source[field] = item, f"in {path}"
                continue
            if field not in OPTIONS:
                raise ConfigError(f"{path}: {name!r} is not a known option.{nearest(field, [*groups, *OPTIONS])}", param=name)
            option = OPTIONS[field]
            if inner is value and option.group != key:
                raise ConfigError(f"{path}: {name!r} belongs into the table [{option.group}], not [{key}].", param=name)
            if field in flat:
                raise ConfigError(
                    f"{path}: {name!r} stands there more than once (an option may stand in its table or above all).", param=name
                )
            flat[field] = typed(option, item, where=f"{path}: {name}")
            flat.source[field] = f"in {path}"
    return flat


def build(*layers: Mapping[str, Any], note: Callable[[str], None] | None = None) -> Config:
    """Merge layers (later ones win) over the defaults, validate types and ranges, refuse what is not there yet. `note` gets a sentence for
    each option of others that has no effect; by default it is logged."""
    merged: dict[str, Any] = {}
    source: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.items():
            own, inverted = ALIASES.get(name, (name, False))
            merged[own] = not value if inverted and isinstance(value, bool) else value
            source.pop(own, None)
        source |= layer.source if isinstance(layer, Values) else {}
    for name in list(merged):
        if name in OPTIONS:
            merged[name] = typed(OPTIONS[name], merged[name], where=name)
        elif name in FOREIGN:
            value = merged.pop(name)
            if name == "structured_outputs_config":
                backend, value = structured_outputs(value)
                if backend is not None:
                    merged.setdefault("grammar_backend", backend)
            said = judge(name, value)
            if said is not None:
                (note or logging.getLogger("penstock.config").warning)(said)
        else:
            raise ConfigError(f"{name!r} is not a known option.{nearest(name, OPTIONS)}", param=name)
    if merged.get("grammar_backend") in BACKENDS:
        merged["grammar_backend"] = BACKENDS[merged["grammar_backend"]]
    config = Config(**merged)
    try:
        check(config)
    except ConfigError as error:
        told = [name for name in source if name == error.param or re.search(rf"(?<!\S){OPTIONS[name].flag}(?![\w-])", error.message)]
        origin = "".join(f" {OPTIONS[name].flag} is set {source[name]}." for name in told)
        raise ConfigError(error.message + origin, param=error.param, code=error.code) from None
    return config


def check(config: Config) -> None:
    """Ranges and "not supported yet". Raises ConfigError naming the flag."""
    for option in OPTIONS.values():
        if "neutral" in option.extra and getattr(config, option.name) != option.extra["neutral"]:
            neutral = option.extra["neutral"]
            known = f" (only {neutral} is accepted so far)" if neutral not in (None, False) else ""
            word = "is not supported" if option.doc.startswith("Not supported:") else "is not supported yet"
            why = option.doc.partition(": ")[2] if option.doc.startswith("Not supported") else ""
            raise ConfigError(
                f"{option.flag} {getattr(config, option.name)} {word}. {why[:1].upper()}{why[1:]}{' ' if why else ''}Leave it out{known}.",
                param=option.name,
                code="unsupported_feature",
            )
        value = getattr(config, option.name)
        if isinstance(value, int) and not INT_MIN <= value <= INT_MAX:
            raise ConfigError(f"{option.flag} must be between {INT_MIN} and {INT_MAX}.", param=option.name)
    for name in (
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "edge_workers",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_body_bytes",
        "max_header_bytes",
        "max_messages",
        "max_prompts",
        "max_n",
        "max_choices",
        "max_streams",
        "max_socket_streams",
        "stream_park_bytes",
        "stream_max_bytes",
        "retained_stream_bytes",
        "retained_bytes",
        "store_max_bytes",
        "store_max_rows",
        "max_file_bytes",
        "max_files",
        "max_files_bytes",
        "max_batch_lines",
    ):
        if getattr(config, name) < 1:
            raise ConfigError(f"{OPTIONS[name].flag} must be at least 1.", param=name)
    if config.max_prompt_chars is not None and config.max_prompt_chars < 1:
        raise ConfigError("--max-prompt-chars must be at least 1.", param="max_prompt_chars")
    for name in (
        "max_stop",
        "max_logprobs",
        "engine_restarts",
        "shutdown_timeout",
        "priority_ageing_s",
        "watchdog_timeout",
        "store_ttl_s",
        "max_retain_s",
        "park_kv_s",
    ):
        if not getattr(config, name) >= 0:  # "not": what is no number fails too
            raise ConfigError(f"{OPTIONS[name].flag} must be 0 or more.", param=name)
    for name in ("receive_timeout_s", "stream_stall_s", "keep_alive_s"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{OPTIONS[name].flag} must be above 0.", param=name)
    if 0 < config.watchdog_timeout < WATCHDOG_LEAST_S:
        raise ConfigError(
            f"--watchdog-timeout must be 0 (never) or at least {WATCHDOG_LEAST_S}: processes give a sign of life every second.",
            param="watchdog_timeout",
        )
    for name in (
        "shutdown_timeout",
        "receive_timeout_s",
        "stream_stall_s",
        "keep_alive_s",
        "watchdog_timeout",
        "max_retain_s",
        "park_kv_s",
    ):
        if not getattr(config, name) <= LONGEST_S:
            raise ConfigError(f"{OPTIONS[name].flag} must be at most {LONGEST_S} seconds (a week).", param=name)
    if config.quality_max_kl is not None and not config.quality_max_kl >= 0:
        raise ConfigError("--quality-max-kl must be 0 or more.", param="quality_max_kl")
    if config.quality_max_kl is not None and config.quality_gate == "off":
        raise ConfigError(
            "--quality-max-kl has no effect with --quality-gate off. Give --quality-gate warn or strict.", param="quality_max_kl"
        )
    if config.priority_ageing_s == float("inf"):
        raise ConfigError("--priority-ageing-s must be finite; 0 is no ageing.", param="priority_ageing_s")
    for name in ("threads", "num_gpu_blocks_override", "batch_in_flight"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{OPTIONS[name].flag} must be at least 1.", param=name)
    if not 1 <= config.stream_interval <= MOST_INTERVAL:
        raise ConfigError(f"--stream-interval must be from 1 to {MOST_INTERVAL}.", param="stream_interval")
    if not 0 <= config.stream_smoothing_ms <= MOST_SMOOTHING_MS:
        raise ConfigError(f"--stream-smoothing-ms must be from 0 to {MOST_SMOOTHING_MS}.", param="stream_smoothing_ms")
    if config.store is not None and not config.store.strip():
        raise ConfigError("--store must name a file.", param="store")
    _check_pairs(config)
    parsed(config.speculative_config, config.speculative_model, config.num_speculative_tokens)
    _check_cors(config)
    if not all(name.strip() for name in config.served_model_name):
        raise ConfigError("--served-model-name must not be empty.", param="served_model_name")
    if not config.transports:
        raise ConfigError("--transports must name at least one transport (openai), or nothing would be served.", param="transports")
    if not all(key.strip() for key in config.api_key):
        raise ConfigError("--api-key must not be empty: the server would be open to everybody.", param="api_key")
    if config.override_generation_config is not None:
        override_of(config.override_generation_config)
    for name in json.loads(config.default_chat_template_kwargs or "{}"):
        if name in RESERVED_KWARGS:
            raise ConfigError(f"--default-chat-template-kwargs may not set {name!r}.", param="default_chat_template_kwargs")
    if config.root_path and not ROOT_PATH.fullmatch(config.root_path):
        raise ConfigError(f"--root-path must be a path like /api/llm, but is {config.root_path!r:.200}.", param="root_path")
    if config.block_size & (config.block_size - 1):
        raise ConfigError("--block-size must be a power of two.", param="block_size")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ConfigError("--gpu-memory-utilization must be above 0 and at most 1.", param="gpu_memory_utilization")
    if not 0 <= config.port <= 65535:
        raise ConfigError("--port must be between 0 and 65535.", param="port")
    for option, port in further_ports(config):
        if not 0 <= port <= 65535:
            raise ConfigError(f"{option.flag} must be between 0 and 65535.", param=option.name)
        if port and port == config.port and config.uds is None:
            raise ConfigError(f"{option.flag} {port} is the port of HTTP, too (--port). Give it another one.", param=option.name)
        if option.listener not in config.transports:
            raise ConfigError(
                f"{option.flag} needs the transport {option.listener!r}, which --transports leaves out. Name it there, or leave {option.flag} out.",
                param=option.name,
            )
    if config.max_model_len is not None and config.max_model_len < 1:
        raise ConfigError("--max-model-len must be at least 1.", param="max_model_len")
    if config.mixed_prefill_tokens is not None and config.mixed_prefill_tokens < 0:
        raise ConfigError("--mixed-prefill-tokens must be 0 or more.", param="mixed_prefill_tokens")
    if config.itl_target_ms is not None and not (config.itl_target_ms == 0 or 0.001 <= config.itl_target_ms <= 3_600_000):
        raise ConfigError("--itl-target-ms must be 0, or from 0.001 to 3600000.", param="itl_target_ms")
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes < 1:
        raise ConfigError("--kv-cache-memory-bytes must be at least 1.", param="kv_cache_memory_bytes")


def _check_cors(config: Config) -> None:
    """Origins as browsers send them, else they would never match; the rest as it may stand in a header."""
    for origin in config.allowed_origins:
        if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allowed-origins {origin!r:.200} is not an origin: it must be *, null, or scheme, host and port without anything after them, in"
                " lower case, such as https://app.example or http://localhost:3000.",
                param="allowed_origins",
            )
        if origin.endswith((":443", ":80")) and origin.startswith("https://" if origin.endswith(":443") else "http://"):
            raise ConfigError(
                f"--allowed-origins {origin!r:.200} would never match: browsers leave out a scheme's own port. Write {origin.rpartition(':')[0]}.",
                param="allowed_origins",
            )
    for name in ("allowed_methods", "allowed_headers"):
        for value in getattr(config, name):
            if not TOKEN.fullmatch(value):
                raise ConfigError(f"{OPTIONS[name].flag} {value!r:.200} is not a name that HTTP allows.", param=name)


def _check_pairs(config: Config) -> None:
    """Options that cannot both be as they are. Each error says which to change, and to what."""
    if config.store is not None and not config.enable_store:
        raise ConfigError("--store names a file, but --no-store says that nothing is to be kept. Leave one of them out.", param="store")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {config.max_num_batched_tokens} is less than --max-num-seqs {config.max_num_seqs}: not every running"
            f" sequence could take a token in a step. Raise --max-num-batched-tokens to at least {config.max_num_seqs}, or lower"
            f" --max-num-seqs to at most {config.max_num_batched_tokens}.",
            param="max_num_batched_tokens",
        )
    if config.max_n > MAX_N:
        raise ConfigError(f"--max-n {config.max_n} is more than the {MAX_N} choices that a request can have. Lower it.", param="max_n")
    held = (config.num_gpu_blocks_override or 0) * config.block_size
    if config.max_model_len and 0 < held < config.max_model_len:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} does not fit into --num-gpu-blocks-override {config.num_gpu_blocks_override} blocks of"
            f" {config.block_size} tokens ({held}). Raise the blocks to at least {-(-config.max_model_len // config.block_size)}, or lower"
            f" --max-model-len to at most {held}.",
            param="num_gpu_blocks_override",
        )
    if not config.enable_chunked_prefill and config.max_model_len and config.max_num_batched_tokens < config.max_model_len:
        raise ConfigError(
            "--no-enable-chunked-prefill needs --max-num-batched-tokens of at least --max-model-len, or long prompts could never run.",
            param="max_num_batched_tokens",
        )
    if not config.enable_chunked_prefill and config.mixed_prefill_tokens:
        raise ConfigError(
            "--mixed-prefill-tokens cuts prompts, which --no-enable-chunked-prefill forbids. Leave one of them out.",
            param="mixed_prefill_tokens",
        )
    if not config.enable_chunked_prefill and config.itl_target_ms:
        raise ConfigError(
            "--itl-target-ms cuts prompts, which --no-enable-chunked-prefill forbids. Leave one of them out.",
            param="itl_target_ms",
        )
    if config.stream_park_bytes > config.stream_max_bytes:
        raise ConfigError("--stream-park-bytes must not exceed --stream-max-bytes.", param="stream_park_bytes")
