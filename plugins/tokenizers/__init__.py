"""Tokenizers that come with Penstock."""

from __future__ import annotations

from pathlib import Path

from penstock.core.contract.hookspecs import API_LEVEL, TokenizerSpec, hookimpl
from penstock.plugins.gguf import is_gguf


def _hugging_face(model_path: str) -> object:
    from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer  # late: only the text process pays for it

    return HuggingFaceTokenizer.load(model_path)


def _gguf(model_path: str) -> object:
    from penstock.plugins.tokenizers.gguf import load  # late, as above

    return load(model_path)


@hookimpl(trylast=True)
def register_tokenizers() -> list[TokenizerSpec]:
    return [
        TokenizerSpec(
            name="hugging_face",
            api_level=API_LEVEL["tokenizers"],
            doc="tokenizer.json, by the tokenizers library.",
            matches=lambda model_path: (Path(model_path) / "tokenizer.json").is_file(),
            factory=_hugging_face,
        ),
        TokenizerSpec(
            name="gguf",
            api_level=API_LEVEL["tokenizers"],
            doc="The tokenizer in a GGUF file.",
            matches=is_gguf,
            factory=_gguf,
        ),
    ]
