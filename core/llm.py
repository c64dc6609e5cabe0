"""The Python API: `LLM(...).generate`, `.chat`, and async streaming, over the same actors that the server runs.

What it is: a front for `LocalServer`: one background thread runs text and engine; this module turns calls into `Submit` messages and columns of
deltas into `RequestOutput`s. Names and shapes follow vLLM's offline API, so that scripts move over.
What it does not know: scheduling, tokens to text, devices.
It is long because each public method stands here with what it promises.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.core.actors.text.prompts import CONVERSATION, Prompt, conversation_json, json_of, need, prompt_part, prompt_parts
from penstock.core.actors.text.resolve import generation_defaults
from penstock.core.actors.text.structured import obeyed
from penstock.core.actors.text.tokenizing import LLMTokenizer
from penstock.core.processes.local import LOCAL_EDGE, LocalServer
from penstock.core.protocol.calling import Calling, calling_of, offered_of
from penstock.core.protocol.config import OPTIONS, Config, build, from_env
from penstock.core.protocol.control import EngineFacts, Message
from penstock.core.protocol.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    PenstockError,
    UnsupportedFeature,
)
from penstock.core.protocol.messages import Finished, Grammar, Rejected, Submit, TextDelta
from penstock.core.protocol.outputs import (
    CHANNELS,
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestOutput,
    StreamDelta,
    prompt_positions,
    verdict,
)
from penstock.core.protocol.sampling import (
    Beam,
    BeamSearchParams,
    GuidedDecodingParams,
    SamplingParams,
    StructuredOutputsParams,
    from_python,
)

__all__ = [
    "LLM",
    "Beam",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ChatMessage",
    "CompletionOutput",
    "GuidedDecodingParams",
    "LLMTokenizer",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamDelta",
    "StructuredOutputsParams",
]

ChatMessage = dict[str, Any]


SERVER_ONLY = frozenset(option.name for option in OPTIONS.values() if option.group == "server") | {
    *("max_body_bytes", "max_header_bytes", "receive_timeout_s", "max_prompts", "max_choices", "max_streams", "max_socket_streams"),
    *(
        "stream_park_bytes",
        "stream_max_bytes",
        "stream_stall_s",
        "park_kv_s",
        "keep_alive_s",
        "transports",
        "engine_restarts",
        "watchdog_timeout",
    ),
    *("max_num_queued_reqs", "max_num_queued_tokens", "log_level", "log_format", "uvicorn_log_level", "otlp_traces_endpoint"),
}
"""Options that mean nothing without HTTP, processes or a queue to protect."""


class _Call:
    """One request in flight: collects, and tells `wake` (on the server's thread) when something came."""

    def __init__(self, output: RequestOutput, wake: Callable[[StreamDelta | None], None]) -> None:
        self.output = output
        self.error: PenstockError | None = None
        self.codes: dict[int, str | None] = {}
        """Of choices that failed."""
        self.wake = wake


class _Choice(NamedTuple):
    """Of a conversation: which calls there may or must be."""

    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None

    def of(self, grammar: Grammar | None) -> Calling | None:
        try:
            offered = offered_of(self.tools or [])
        except InvalidRequest:
            if self.tool_choice in (None, "none", "auto") and grammar is None:
                return None  # of a shape that only the template knows
            raise
        return calling_of(offered, self.tool_choice, grammar.field if grammar is not None else "")


class LLM:
    """A model in this process.

    `LLM("folder", dtype="float32", max_num_seqs=8)` takes the options of `penstock serve` by their names, but for those of SERVER_ONLY; without
    a folder the demo model. Use it as a context manager, or call `close()`. All methods may be called from several threads.
    Raises ConfigError, CheckpointError or PluginError when the model cannot be served.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: Config | None = None,
        on_phase: Callable[[str, float], None] | None = None,
        extra_plugins: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if config is not None and (model is not None or options):
            raise TypeError("give either config, or model and options")
        if config is None:
            wrong = next((name for name in options if name in SERVER_ONLY), None)
            if wrong is not None:
                raise ConfigError(f"{wrong} is an option of `penstock serve`: it would do nothing here. Leave it out.", param=wrong)
            config = build(from_env(), {**({"model": model} if model is not None else {}), **options})
        # An offline caller hands over its whole list at once: the admission bounds that protect a server would only refuse it.
        # And it waits for the last token of all: even gaps between tokens would only cost it time.
        even = config.itl_target_ms or 0.0
        config = msgspec.structs.replace(config, max_num_queued_reqs=1 << 30, max_num_queued_tokens=1 << 40, itl_target_ms=even)
        self._calls: dict[int, _Call] = {}
        self._lock = threading.Lock()
        self._keys = itertools.count(1)
        self._server = LocalServer(config, self._deliver, on_failure=self._failed, on_phase=on_phase, extra_plugins=extra_plugins)
        self.facts: EngineFacts = self._server.start()
        self.model_name: str = self._server.config.served_model_name[0]
        self._tokenizer: LLMTokenizer | None = None

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own (--generation-config, --override-generation-config): what counts where no sampling_params are given."""
        config = self._server.config
        return msgspec.convert(generation_defaults(config, config.model or ""), SamplingParams)

    # ------------------------------------------------------------------ batch

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete one prompt or a list of them; results in the prompts' order. `use_tqdm` shows a progress bar.

        A prompt is a text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; these may have a `"cache_salt"`: cached prefixes, and what drafters remember
        of answers, are shared with prompts of the same salt alone.
        Raises InvalidRequest for the first prompt that cannot be served (the others are cancelled), EngineFailure when the engine dies.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise InvalidRequest("Give exactly one of prompts and prompt_token_ids.", param="prompts")
        if prompts is not None:
            parts = prompt_parts(prompts, "prompts")
        else:
            parts = prompt_parts(prompt_token_ids, "prompt_token_ids", only_ids=True)
        return self._run("completion", parts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        split: bool = False,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or many (a list of lists). `split` takes reasoning and calls of `tools` out of the texts,
        as a `tool_choice` beyond "auto", a strict function and structured_outputs do by themselves. Raises InvalidRequest if it is not known how the
        model writes calls."""
        one = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)
        shared = {
            "tools": _tools_json(tools, tool_choice),
            "parallel_calls": parallel_tool_calls,
            "template_kwargs": json_of(chat_template_kwargs, "chat_template_kwargs") if chat_template_kwargs else b"",
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "split": split,
        }
        if one:
            conversations = [conversation_json(messages, "messages")]
        else:
            need(isinstance(messages, Sequence) and not isinstance(messages, str), f"messages {CONVERSATION}.", "messages")
            conversations = [conversation_json(conversation, f"messages[{i}]") for i, conversation in enumerate(messages)]
        parts = [{"messages": conversation, **shared} for conversation in conversations]
        return self._run("chat", parts, sampling_params, use_tqdm, _Choice(tools, tool_choice))

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest continuations of each prompt that a beam search finds; prompts and errors as in `generate`."""
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest(f"params must be BeamSearchParams, but is {type(params).__name__}.", param="params")
        found = self._run("completion", prompt_parts(prompts, "prompts"), params.sampling(), use_tqdm)
        tokenizer = self.get_tokenizer()
        return [BeamSearchOutput(sequences=[_hypothesis(one, output, params, tokenizer) for output in one.outputs]) for one in found]

    def _run(
        self,
        kind: str,
        parts: list[dict[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        choice: _Choice | None = None,
    ) -> list[RequestOutput]:
        params = self._params(sampling_params, len(parts))
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        keys: list[int] = []
        calls: list[_Call] = []
        try:
            for part, wanted in zip(parts, params, strict=True):
                key, call = self._begin(kind, part, wanted, _on_end(ended, len(calls)), choice)
                keys.append(key)
                calls.append(call)
            for at in _bar(iter(ended.get, -1), len(calls), progress):
                error = calls[at].error
                if error is not None:
                    raise error
        finally:
            self._forget(keys)
        return [call.output for call in calls]

    # ------------------------------------------------------------------ tokens

    def get_tokenizer(self) -> LLMTokenizer:
        """The tokenizer that requests go through: encode, decode, apply_chat_template, eos_token_id and the like."""
        if self._tokenizer is None:
            self._tokenizer = LLMTokenizer(self._server.side.tokenizer, self._server.side.renderer)
        return self._tokenizer

    def encode(
        self,
        prompts: str | Sequence[str],
        pooling_params: Any = None,
        *,
        pooling_task: str | None = None,
        add_special_tokens: bool = True,
    ) -> Any:
        """Token ids of a text, or a list of them for a list of texts: the ids that `generate` would compute.

        vLLM's `encode` pools a model's states instead, which needs embedding models: asked for by its arguments, that is UnsupportedFeature.
        """
        if pooling_params is not None or pooling_task is not None:
            param = "pooling_params" if pooling_params is not None else "pooling_task"
            raise UnsupportedFeature(
                "Pooling (embeddings, classification, rewards) does not exist here yet. Leave it out for token ids.", param=param
            )
        return self.get_tokenizer()(prompts, add_special_tokens=add_special_tokens).input_ids

    # ------------------------------------------------------------------ streams

    async def stream(
        self,
        prompt: Prompt | Sequence[ChatMessage],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        split: bool = False,
    ) -> AsyncIterator[StreamDelta]:
        """Stream one request in asyncio: a text, token ids, or a conversation; `tools`, `tool_choice` and `split` as in chat. Leaving the loop early cancels the request."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[StreamDelta | None] = asyncio.Queue()

        def wake(delta: StreamDelta | None) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, delta)

        kind, part = _part_of(prompt, tools, tool_choice, split)
        key, call = self._begin(kind, part, self._params(sampling_params, 1)[0], wake, _Choice(tools, tool_choice))
        try:
            while (delta := await inbox.get()) is not None:
                yield delta
            if call.error is not None:
                raise call.error
        finally:
            self._forget([key])

    def stream_sync(
        self,
        prompt: Prompt | Sequence[ChatMessage],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        split: bool = False,
    ) -> Iterator[StreamDelta]:
        """Like `stream`, for code without a loop."""
        inbox: queue.SimpleQueue[StreamDelta | None] = queue.SimpleQueue()
        kind, part = _part_of(prompt, tools, tool_choice, split)
        key, call = self._begin(kind, part, self._params(sampling_params, 1)[0], inbox.put, _Choice(tools, tool_choice))
        try:
            while (delta := inbox.get()) is not None:
                yield delta
            if call.error is not None:
                raise call.error
        finally:
            self._forget([key])

    # ------------------------------------------------------------------ inside

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams | None]:
        if given is None:
            return [None] * count
        if not isinstance(given, (list, tuple)):
            return [self._checked(given)] * count  # type: ignore[arg-type]
        if len(given) != count:
            raise InvalidRequest(f"{count} prompts need one or {count} sampling_params, not {len(given)}.", param="sampling_params")
        return [self._checked(params) for params in given]

    def _checked(self, given: SamplingParams) -> SamplingParams:
        config = self._server.config
        return from_python(given).validate(max_logprobs=config.max_logprobs, max_stop=config.max_stop)

    def _begin(
        self,
        kind: str,
        part: dict[str, Any],
        given: SamplingParams | None,
        wake: Callable[[StreamDelta | None], None],
        choice: _Choice | None = None,
    ) -> tuple[int, _Call]:
        params, grammar = obeyed(given if given is not None else SamplingParams())
        calling = choice.of(grammar) if choice is not None and kind == "chat" else None
        if kind == "chat" and (grammar is not None or calling is not None):
            part = {**part, "split": True, "calling": calling}
        key = next(self._keys)
        rid = f"local-{key}"
        output = RequestOutput(
            request_id=rid, prompt=part.get("prompt"), outputs=[CompletionOutput(index=i, token_ids=[]) for i in range(params.n)]
        )
        call = _Call(output, wake)
        with self._lock:
            self._calls[key] = call
        submit = Submit(
            key=key,
            edge=LOCAL_EDGE,
            rid=rid,
            kind="chat" if kind == "chat" else "completion",
            model=self.model_name,
            sampling=params,
            explicit=list(params.__struct_fields__) if given is not None else [],
            stream=True,
            want_ids=True,
            grammar=grammar,
            add_special_tokens=kind != "chat",  # a template writes what it wants
            tells=0,
            **part,
        )
        try:
            self._server.submit(submit)
        except PenstockError:
            with self._lock:
                self._calls.pop(key, None)
            raise
        return key, call

    def _forget(self, keys: Sequence[int]) -> None:
        """Cancel what has not ended."""
        with self._lock:
            left = [key for key in keys if self._calls.pop(key, None) is not None]
        for key in left:
            try:
                self._server.cancel(key)
            except PenstockError:
                return

    def _end(self, key: int, error: PenstockError | None) -> None:
        with self._lock:
            call = self._calls.pop(key, None)
        if call is not None:
            call.error = error
            call.output.finished = error is None
            call.wake(None)

    def _failed(self, error: PenstockError) -> None:
        with self._lock:
            keys = list(self._calls)
        for key in keys:
            self._end(key, error)

    def _deliver(self, message: Message) -> None:
        """On the server's thread: spread one step's columns over the calls."""
        if isinstance(message, TextDelta):
            self._spread(message)
        elif isinstance(message, Finished):
            call = self._calls.get(message.key)
            if call is not None:
                output = call.output
                output.cached_tokens = message.cached_tokens
                times = (message.queue_ns, message.prefill_ns, message.decode_ns)
                output.queue_s, output.prefill_s, output.decode_s = (ns / 1e9 for ns in times)
                self._end(message.key, verdict(output, call.codes))
        elif isinstance(message, Rejected):
            kind = ContextLengthExceeded if message.code == ContextLengthExceeded.default_code else InvalidRequest
            error = kind(message.message, param=message.param, code=message.code)
            self._end(message.key, error if message.status < 500 and message.status != 429 else EngineFailure(message.message))

    def _spread(self, delta: TextDelta) -> None:
        extras = {extra.row: extra for extra in delta.extras}
        at = 0
        counts, tokens = delta.counts.tolist(), delta.tokens.tolist()
        channels = delta.channels.tolist() if len(delta.channels) else None
        calls = delta.calls.tolist()
        for row, (key, choice, text, count, reason) in enumerate(
            zip(delta.keys.tolist(), delta.choices.tolist(), delta.texts, counts, delta.reasons, strict=True)
        ):
            ids = tokens[at : at + count]
            at += count
            call = self._calls.get(key)
            if call is None:
                continue
            output = call.output.outputs[choice]
            extra = extras.get(row)
            if channels is None:
                output.text += text
            else:
                output.take(text, channels[row], extra.call_id if extra is not None else "")
            output.token_ids += ids
            if reason:
                output.finish_reason = reason
            if extra is not None:
                if extra.logprobs:
                    output.add_logprobs(extra.logprobs)
                if extra.stop_reason is not None:
                    output.stop_reason = extra.stop_reason
                if extra.error is not None:
                    output.stop_reason = extra.error
                    call.codes[choice] = extra.error_code
                if extra.prompt_token_ids is not None:
                    call.output.prompt_token_ids = extra.prompt_token_ids.tolist()
                if extra.prompt_logprobs is not None:
                    call.output.prompt_logprobs = prompt_positions(extra.prompt_logprobs)
            more = {} if channels is None else {"channel": CHANNELS[channels[row]], "call": calls[row]}
            call.wake(StreamDelta(index=choice, text=text, token_ids=ids, finish_reason=reason or None, **more))

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop the engine; requests that run end with an error. Idempotent."""
        self._server.close()
        self._failed(EngineFailure("The engine was closed."))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hypothesis(request: RequestOutput, output: CompletionOutput, params: BeamSearchParams, tokenizer: LLMTokenizer) -> BeamSearchSequence:
    own = output.token_ids
    if output.finish_reason == "stop" and not params.include_stop_str_in_output:
        own = own[:-1]
    tokens = [*request.prompt_token_ids, *own]
    return BeamSearchSequence(
        tokens=tokens,
        text=tokenizer.decode(tokens),
        cum_logprob=output.cumulative_logprob or 0.0,
        logprobs=output.logprobs or [],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
    )


def _on_end(ended: queue.SimpleQueue[int], index: int) -> Callable[[StreamDelta | None], None]:
    def wake(delta: StreamDelta | None) -> None:
        if delta is None:
            ended.put(index)

    return wake


def _part_of(
    prompt: Any, tools: list[dict[str, Any]] | None, tool_choice: str | dict[str, Any] | None, split: bool
) -> tuple[str, dict[str, Any]]:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
        return "chat", {"messages": conversation_json(prompt, "messages"), "tools": _tools_json(tools, tool_choice), "split": split}
    return "completion", prompt_part(prompt, "prompt")


def _tools_json(tools: list[dict[str, Any]] | None, tool_choice: str | dict[str, Any] | None) -> bytes:
    return json_of(tools, "tools") if tools and tool_choice != "none" else b""


def _bar(ends: Iterator[int], count: int, shown: bool) -> Iterator[int]:
    """The first `count` items of `ends`, with a progress bar if wanted."""
    first = itertools.islice(ends, count)
    if not shown:
        yield from first
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("requests", total=count)
        for item in first:
            bar.advance(task)
            yield item
