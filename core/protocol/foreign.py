"""What becomes of the options of vLLM and SGLang that Penstock does not have.

What it is: one table of their options, so that a start line or a script that moves over meets no "no such option": each is either asked for what
Penstock does anyway (taken in silence), or cannot change an answer (taken, with a note that says why it has no effect), or would change
what the user gets (refused, with what to do instead). `judge` says which. Options that Penstock does have are in core/protocol/config.py, and
win. It is long because the table is.
What it does not know: command lines, files, who prints the notes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from penstock.core.protocol.errors import ConfigError

Kind = Literal["switch", "value", "numbers"]
ANY = "*"
"""As a neutral value: whatever is given, Penstock does it already."""


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """One option of theirs. `neutral` are the values (as lower-case text) that ask for nothing that Penstock does not do anyway."""

    name: str
    kind: Kind
    neutral: tuple[str, ...]
    refused: bool
    reason: str
    shorts: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


# An entry is a name, perhaps with short forms, and what it takes: `name` and `name!` are switches (off, or on, is what Penstock does anyway),
# `name=a|b` takes a value, of which a and b are neutral, `name=*` any value of which is, and `name#` one or more numbers.
# A reason ends a sentence that begins with "--name has no effect: " or "--name is not supported: ".
_LATER_DEVICES = "one engine on one device is what there is so far. Leave it out."
_ONE_DEVICE = "it tunes work on several devices or hosts, and one engine on one device is what there is so far."
_TEXT_ONLY = "Penstock serves text; images, audio and video are refused by name."
_KERNELS = "Penstock has kernels of its own; --attention-backend chooses among its attention plugins."
_GRAPHS = "Penstock captures graphs for the batch sizes that --max-num-seqs allows; --enforce-eager captures none."
_NO_COMPILER = "nothing goes through torch.compile. --enforce-eager turns captured graphs off."
_LOADING = "safetensors files are mapped and read as fast as the disk gives them."
_NO_MAMBA = "the model families that Penstock reads have attention only."
_NO_LORA = "it is for LoRA adapters, which do not exist here yet."
_NO_MOE = "the model families that Penstock reads have no experts."
_SPEC = "--speculative-config says who drafts and how, --num-speculative-tokens how many."
_POOLING = "embeddings, classification and reward models do not exist here yet."
_TIERS = "tiers of KV cache beyond the device's memory do not exist here yet."
_TLS = "put a TLS proxy in front."
_LOGGING = "--log-level and --log-format say what is logged and how."
_METRICS = "GET /metrics has every number that Penstock knows."
_SCHEDULER = (
    "Penstock has a scheduler of its own; --scheduling-policy, --max-num-batched-tokens and --mixed-prefill-tokens are its settings."
)
_REQUESTS_SAY = "it would change what every client gets. A request can ask for it itself."

_NOTES: tuple[tuple[str, str], ...] = (
    # --- the HTTP server
    ("disable-uvicorn-access-log! disable-access-log-for-endpoints=* uvicorn-access-log-exclude-prefixes=*", "no access log is written."),
    ("log-config-file= max-log-len= enable-log-deltas! log-requests-level= log-requests-format= log-requests-target=", _LOGGING),
    ("log-error-stack!", "an error of the server itself is always logged with its stack."),
    ("aggregate-engine-logging show-time-cost decode-log-interval= enable-request-time-stats-logging gc-warning-threshold-secs=", _LOGGING),
    ("enable-prompt-tokens-details! enable-cache-report!", "usage always holds prompt_tokens_details."),
    ("enable-server-load-tracking", _METRICS),
    ("enable-tokenizer-info-endpoint!", "/tokenizer_info is always there."),
    ("enable-request-id-headers!", "every answer carries x-request-id."),
    ("disable-fastapi-docs", "/schema stays; with a key set it needs the key like everything but health."),
    ("enable-offline-docs!", "/schema loads nothing from anywhere else."),
    ("h11-max-incomplete-event-size= h11-max-header-count=", "--max-header-bytes bounds a request's head."),
    ("cohere-is-reasoning-model cohere-format=", "there is no surface of Cohere's."),
    ("enable-flash-late-interaction", _POOLING),
    ("disable-frontend-multiprocessing", "HTTP, text and engine are always processes of their own."),
    ("skip-server-warmup! warmups=", "the server says that it is ready when it is."),
    ("file-storage-path= weight-version=", "no endpoint would show it."),
    ("admin-api-key=", "there are no endpoints for administrators: every path but health needs a key of --api-key or --api-key-file."),
    # --- the model and its loading
    ("hf-token=", "nothing is downloaded."),
    ("allowed-local-media-path= allowed-media-domains=", _TEXT_ONLY),
    ("disable-cascade-attn!", "there is no cascade attention to turn off."),
    ("enable-cumem-allocator enable-nccl-comm-suspend", "memory is taken once, at the start."),
    (
        "renderer-num-workers=1 tokenizer-worker-num=1 tokenizer-pool-size=0 tokenizer-pool-type= tokenizer-pool-extra-config=",
        "text has its own threads.",
    ),
    (
        "enable-tokenizer-batch-encode! enable-dynamic-batch-tokenizer! disable-tokenizer-batch-decode",
        "prompts that wait are always tokenised together.",
    ),
    ("dynamic-batch-tokenizer-batch-size= dynamic-batch-tokenizer-batch-timeout=", "prompts that wait are always tokenised together."),
    ("allow-deprecated-quantization", "what a checkpoint is quantised with is read from its config.json."),
    ("safetensors-load-strategy= safetensors-prefetch-num-threads= safetensors-prefetch-block-size=", _LOADING),
    ("model-loader-extra-config={} use-tqdm-on-load! pt-load-map-location= max-parallel-loading-workers=", _LOADING),
    ("weight-loader-disable-mmap weight-loader-prefetch-checkpoints weight-loader-prefetch-num-threads=", _LOADING),
    ("ignore-patterns=", "nothing is downloaded, and only the safetensors files that the checkpoint names are read."),
    # --- kernels, graphs, compilation
    ("compilation-config,-cc={} optimization-level,-O= enable-torch-compile torch-compile-max-bs= performance-mode=balanced", _NO_COMPILER),
    ("cudagraph-capture-sizes# cuda-graph-sizes# max-cudagraph-capture-size= max-seq-len-to-capture= cuda-graph-max-bs=", _GRAPHS),
    (
        "cuda-graph-bs# disable-cuda-graph-padding enable-cudagraph-gc disable-piecewise-cuda-graph piecewise-cuda-graph-max-tokens=",
        _GRAPHS,
    ),
    ("attention-config,-ac={} kernel-config={} ir-op-priority= moe-backend=auto linear-backend=auto sampling-backend=", _KERNELS),
    ("enable-flashinfer-autotune disable-flashinfer-autotune enable-bf16x3-router-gemm prefill-attention-backend=", _KERNELS),
    ("decode-attention-backend= fp8-gemm-backend= fp4-gemm-backend= triton-attention-num-kv-splits=", _KERNELS),
    ("triton-attention-reduce-in-fp32 enable-fused-qk-norm-rope", _KERNELS),
    ("gdn-prefill-backend= kda-prefill-backend= mamba-backend= mamba-ssu-algorithm= enable-mamba-cache-stochastic-rounding", _NO_MAMBA),
    (
        "mamba-cache-philox-rounds= mamba-cache-dtype= mamba-ssm-cache-dtype= mamba-block-size= mamba-cache-mode= mamba-ssm-dtype=",
        _NO_MAMBA,
    ),
    ("replayssm-buffer-len= use-replayssm max-mamba-cache-size= mamba-full-memory-ratio= mamba-scheduler-strategy=", _NO_MAMBA),
    # --- several devices
    ("distributed-executor-backend= master-addr= master-port= distributed-timeout-seconds= cpu-distributed-timeout-seconds=", _ONE_DEVICE),
    (
        "disable-custom-all-reduce! dcp-comm-backend= dcp-q-replicate dcp-kv-cache-interleave-size= cp-kv-cache-interleave-size=",
        _ONE_DEVICE,
    ),
    ("data-parallel-size-local,-dpl=1 data-parallel-address,-dpa= data-parallel-rpc-port,-dpp= data-parallel-backend,-dpb=", _ONE_DEVICE),
    ("data-parallel-supervisor-port= dp-supervisor-probe-interval-s= dp-supervisor-probe-timeout-s= load-balance-method=", _ONE_DEVICE),
    ("dp-supervisor-probe-failure-threshold= dp-sync-interval= disable-nccl-for-dp-synchronization ray-workers-use-nsight", _ONE_DEVICE),
    ("enable-dbo ubatch-size=0 dbo-decode-token-threshold= dbo-prefill-token-threshold= enable-batch-sharded-sampling", _ONE_DEVICE),
    ("nccl-port= dist-init-addr= nccl-init-addr= dist-timeout= enable-p2p-check gpu-id-step=1 enable-mscclpp enable-symm-mem", _ONE_DEVICE),
    ("enable-nccl-nvls enable-two-batch-overlap enable-single-batch-overlap worker-use-ray engine-use-ray", _ONE_DEVICE),
    ("enable-ep-weight-filter all2all-backend= enable-eplb eplb-config={} expert-placement-strategy= moe-a2a-backend=", _NO_MOE),
    ("moe-runner-backend= deepep-mode= ep-num-redundant-experts=0 disable-shared-experts-fusion", _NO_MOE),
    (
        "enable-fault-tolerance! fault-tolerance-config={}",
        "processes are always watched and started again (--engine-restarts, --watchdog-timeout).",
    ),
    (
        "numa-bind numa-bind-nodes# numa-bind-cpus= numa-node#",
        "start the server under numactl to bind it; --threads sets the CPU device's threads.",
    ),
    # --- the KV cache and memory
    (
        "prefix-caching-hash-algo= prefix-cache-retention-interval= prefix-match-unit= radix-eviction-policy=lru",
        "the prefix cache is keyed and emptied in one way.",
    ),
    ("kv-sharing-fast-prefill calculate-kv-scales", "there is no KV cache of that kind."),
    ("kv-offloading-size= kv-offloading-backend= enable-hierarchical-cache hicache-ratio= hicache-size= hicache-write-policy=", _TIERS),
    ("hicache-io-backend= hicache-mem-layout= hicache-storage-backend= hicache-storage-prefetch-policy= enable-lmcache", _TIERS),
    (
        "offload-backend=auto cpu-offload-params= offload-group-size= offload-num-in-group= offload-prefetch-step= offload-params=",
        "weights stay on the device.",
    ),
    # --- the scheduler
    ("async-scheduling!", "Penstock always plans the next step while the device works on this one."),
    ("disable-overlap-schedule disable-async-output-proc", "Penstock always plans the next step while the device works on this one."),
    ("max-num-scheduled-tokens= long-prefill-token-threshold=0 max-num-partial-prefills=1 max-long-partial-prefills=1", _SCHEDULER),
    ("scheduler-reserve-full-isl watermark= prefill-schedule-interval= disable-hybrid-kv-cache-manager num-scheduler-steps=1", _SCHEDULER),
    ("multi-step-stream-outputs num-lookahead-slots= scheduler-delay-factor=0 preemption-mode=recompute use-v2-block-manager!", _SCHEDULER),
    (
        "enable-mixed-chunk! enable-dynamic-chunking num-continuous-decode-steps=1 schedule-conservativeness= prefill-max-requests=",
        _SCHEDULER,
    ),
    ("scheduler-recv-interval= num-reserved-decode-tokens= schedule-low-priority-values-first!", _SCHEDULER),
    ("sleep-on-idle!", "an idle engine sleeps."),
    # --- what is observed
    ("show-hidden-metrics-for-version= kv-cache-metrics kv-cache-metrics-sample= cudagraph-metrics enable-mfu-metrics", _METRICS),
    ("enable-metrics! enable-metrics-for-all-schedulers collect-tokens-histogram bucket-time-to-first-token#", _METRICS),
    ("bucket-inter-token-latency# bucket-e2e-request-latency# per-request-spec-decode-metrics enable-logging-iteration-details", _METRICS),
    (
        "collect-detailed-traces=* enable-trace!",
        "every trace has all spans; --otlp-traces-endpoint or OTEL_EXPORTER_OTLP_ENDPOINT turns tracing on.",
    ),
    (
        "enable-layerwise-nvtx-tracing enable-layerwise-nvtx-marker jit-monitor-mode= jit-monitor-verbose profiler-config={}",
        "there is no profiler inside.",
    ),
    ("soft-watchdog-timeout=", "--watchdog-timeout writes the stacks of a process that hangs before it ends it."),
    ("enable-nan-detection!", "a step whose logits are not numbers is always an error."),
    ("fail-on-environ-validation", "unknown PENSTOCK_* variables are always an error; VLLM_* ones other than VLLM_API_KEY are not read."),
    # --- media
    (
        "language-model-only! limit-mm-per-prompt={} enable-mm-embeds media-io-kwargs={} mm-processor-kwargs={} mm-processor-cache-gb=",
        _TEXT_ONLY,
    ),
    ("mm-processor-cache-type= mm-hasher-algorithm= mm-shm-cache-max-object-size-mb= mm-encoder-only mm-encoder-tp-mode=", _TEXT_ONLY),
    ("mm-encoder-attn-backend= mm-encoder-attn-dtype= mm-encoder-fp8-scale-path= mm-encoder-fp8-scale-save-path=", _TEXT_ONLY),
    ("mm-encoder-fp8-scale-save-margin= interleave-mm-strings skip-mm-profiling video-pruning-rate= video-pruning-method=", _TEXT_ONLY),
    ("mm-tensor-ipc= mm-processor-device= mm-ipc-gpu-memory-gb= mm-device-do-normalize disable-mm-preprocessor-cache", _TEXT_ONLY),
    ("disable-chunked-mm-input enable-multimodal mm-attention-backend= limit-mm-data-per-request={}", _TEXT_ONLY),
    ("ec-manager-config={}", _TEXT_ONLY),
    # --- what goes with something that is refused where it is turned on
    ("max-loras= max-lora-rank= lora-dtype= enable-tower-connector-lora max-cpu-loras= fully-sharded-loras lora-target-modules=", _NO_LORA),
    ("default-mm-loras={} specialize-active-lora enable-mixed-moe-lora-format enable-moe-shared-loras lora-extra-vocab-size=", _NO_LORA),
    ("enable-lora-bias max-loras-per-batch= max-loaded-loras= lora-eviction-policy= lora-backend= long-lora-scaling-factors=", _NO_LORA),
    ("additional-config={} override-neuron-config={}", "it is for hardware that Penstock does not drive."),
)

_REFUSED: tuple[tuple[str, str], ...] = (
    # --- the HTTP server
    ("ssl-ca-certs= enable-ssl-refresh ssl-cert-reqs=0 ssl-ciphers=", _TLS),
    ("middleware=", "nothing is imported by name. Write a transport plugin (docs/hooks.md)."),
    ("grpc grpc-mode", "gRPC is spoken beside HTTP, on a port of its own. Use --grpc-port (docs/grpc.md)."),
    ("tokens-only skip-tokenizer-init", "text is always tokenised here. Leave it out; clients may send and ask for token ids."),
    ("enable-force-include-usage", f"{_REQUESTS_SAY} Send stream_options.include_usage."),
    ("return-tokens-as-token-ids", f"{_REQUESTS_SAY} Send return_tokens_as_token_ids."),
    ("allow-auto-truncate", f"{_REQUESTS_SAY} Send truncate_prompt_tokens: -1."),
    ("enable-per-request-metrics", "answers carry no metrics yet. Leave it out; GET /metrics has them for the whole server."),
    ("fingerprint-mode=full|hash fingerprint-value=", "system_fingerprint says what may change numbers. Leave it out."),
    # --- prompts and answers
    ("chat-template-content-format=auto", "Penstock finds out what a template takes. Leave it out."),
    ("response-role=assistant", "answers have the role assistant. Leave it out."),
    ("hf-chat-template-name= completion-template=", "name the file with --chat-template instead."),
    (
        "exclude-tools-when-tool-choice-none tool-parser-plugin= tool-server=",
        "formats are plugins of penstock.text here (docs/plugins.md). Leave it out.",
    ),
    ("reasoning-parser-plugin= reasoning-config={}", "formats are plugins of penstock.text here (docs/plugins.md). Leave it out."),
    ("structured-outputs-config={}", "of it only the backend can be chosen; requests say what an answer obeys."),
    (
        "constrained-json-whitespace-pattern= constrained-json-disable-any-whitespace",
        "requests say what an answer obeys, and the backend is a plugin. Leave it out.",
    ),
    (
        "logits-processors= logits-processor-pattern= enable-custom-logit-processor",
        "there are no logits processors; requests have logit_bias and allowed_token_ids.",
    ),
    ("logprobs-mode=raw_logprobs", "log-probabilities are those of the raw logits. Leave it out."),
    ("use-fp64-gumbel enable-fp32-lm-head", "how precisely a token is drawn cannot be chosen. Leave it out."),
    (
        "enable-return-routed-experts return-sampling-mask enable-return-hidden-states enable-trace-replay",
        "answers do not carry it. Leave it out.",
    ),
    ("enable-prompt-embeds", "prompts are text or token ids. Leave it out."),
    ("preferred-sampling-params={}", "use --override-generation-config for defaults."),
    # --- the model and its loading
    (
        "tokenizer-mode=auto|hf|fast",
        "there is one way to tokenise: the checkpoint's tokenizer.json. Leave it out, or write a tokenizer plugin (docs/hooks.md).",
    ),
    (
        "runner=auto|generate convert=auto|none task=auto|generate pooler-config= override-pooler-config= is-embedding",
        f"{_POOLING} Leave it out.",
    ),
    ("hf-config-path=", "config.json is read from the model's folder. Use --hf-overrides to change fields."),
    ("config-format=auto|hf", "config.json is the one format. Leave it out."),
    ("rope-scaling= rope-theta=", "use --hf-overrides '{\"rope_scaling\": ...}' (or rope_theta)."),
    ("code-revision= tokenizer-revision=", "nothing is downloaded; name the folder."),
    (
        "model-class-overrides={} model-impl=auto|vllm|sglang|penstock",
        "the family that config.json names is used. Leave it out, or write a model plugin (docs/hooks.md).",
    ),
    (
        "quantization-config= quantization-param-path= torchao-config= modelopt-quant=",
        "what a checkpoint is quantised with is read from its config.json. Leave it out, or see --quantization.",
    ),
    ("kv-cache-dtype-skip-layers=", "the KV cache has one type. Leave it out."),
    ("disable-sliding-window", "what a model attends to is as its config.json says. Use --max-model-len to stay below the window."),
    (
        "custom-weight-loader= io-processor-plugin= worker-cls=auto worker-extension-cls= scheduler-cls=",
        "nothing is imported by name. Write a plugin (docs/hooks.md).",
    ),
    ("cpu-offload-gb=0", "weights that do not fit the device cannot be served yet. Leave it out."),
    ("delete-ckpt-after-loading", "Penstock deletes nobody's checkpoints."),
    # --- scheduling
    ("enable-priority-scheduling", "use --scheduling-policy priority (a lower number is earlier)."),
    # --- several devices
    ("nnodes,-n=1 node-rank,-r=0 headless data-parallel-rank,-dpn=0 data-parallel-start-rank,-dpr=0 enable-elastic-ep", _LATER_DEVICES),
    (
        "decode-context-parallel-size,-dcp=1 prefill-context-parallel-size,-pcp=1 attention-context-parallel-size=1 attn-cp-size=1",
        _LATER_DEVICES,
    ),
    ("data-parallel-hybrid-lb,-dph data-parallel-external-lb,-dpe data-parallel-multi-port-external-lb,-dpm", _LATER_DEVICES),
    ("expert-parallel-size=1 ep-size=1 ep=1 enable-dp-attention disaggregation-mode=null encoder-only", _LATER_DEVICES),
    ("device-ids= base-gpu-id=0", "choose devices with CUDA_VISIBLE_DEVICES."),
    # --- speculation, LoRA, moving KV and weights
    ("spec-method= speculative-algorithm= speculative-num-draft-tokens= speculative-eagle-topk=1", _SPEC),
    ("lora-modules= lora-paths= enable-prompt-adapter", "LoRA adapters do not exist here yet. Leave it out."),
    (
        "kv-transfer-config= kv-events-config= ec-transfer-config= weight-transfer-config=",
        "KV and weights stay in their engine so far. Leave it out.",
    ),
    ("enable-sleep-mode enable-memory-saver", "an engine cannot give its memory back while it runs. Leave it out."),
    ("diffusion-config,-dc= dllm-algorithm=", "the model families that Penstock reads write one token after the other. Leave it out."),
)


def _rows(groups: Iterable[tuple[str, str]], refused: bool) -> Iterator[Foreign]:
    for names, reason in groups:
        for entry in names.split():
            head, takes, neutral = entry.partition("=")
            name, *shorts = head.rstrip("!#").split(",")
            kind: Kind = "value" if takes else "numbers" if head.endswith("#") else "switch"
            plain = (str(head.endswith("!")).lower(),) if kind == "switch" else tuple(neutral.split("|")) if neutral else ()
            yield Foreign(name=name.replace("-", "_"), kind=kind, neutral=plain, refused=refused, reason=reason, shorts=tuple(shorts))


FOREIGN: dict[str, Foreign] = {row.name: row for rows in (_rows(_NOTES, False), _rows(_REFUSED, True)) for row in rows}


BACKENDS: dict[str, str | None] = {"auto": None, "guidance": "llguidance"}
"""Grammar backends that have another name there."""


def structured_outputs(value: Any) -> tuple[str | None, Any]:
    """Of --structured-outputs-config the backend, if it names one, and what is left that asks for something."""
    try:
        told = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None, value
    if not isinstance(told, dict) or not isinstance(told.get("backend", ""), str):
        return None, value
    return told.get("backend"), {name: one for name, one in told.items() if name != "backend" and one not in (None, False, "")}


def judge(name: str, value: Any) -> str | None:
    """A note that the option has no effect, or None if that goes without saying. Raises ConfigError when it must not be ignored."""
    row = FOREIGN[name]
    text = _text(value)
    if text in ("", "none", "null") or row.neutral == (ANY,) or any(_same(text, neutral) for neutral in row.neutral):
        return None
    if row.refused:
        shown = f" {value}" if isinstance(value, (str, int, float)) and row.kind == "value" and len(text) <= 40 else ""
        raise ConfigError(f"{row.flag}{shown} is not supported: {row.reason}", param=name, code="unsupported_feature")
    return f"{row.flag} has no effect: {row.reason}"


def _text(value: Any) -> str:
    """As a command line would have it: what Python and TOML give has types."""
    if isinstance(value, str):
        return value.strip().lower()
    return json.dumps(value, default=str).lower() if value is not None else ""


def _same(text: str, neutral: str) -> bool:
    if text == neutral:
        return True
    try:
        return float(text) == float(neutral)
    except ValueError:
        return False
