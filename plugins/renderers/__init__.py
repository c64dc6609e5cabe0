"""Chat renderers that come with Penstock."""

from __future__ import annotations

from penstock.core.contract.hookspecs import API_LEVEL, ChatRendererSpec, hookimpl
from penstock.plugins.gguf import is_gguf


def _jinja(model_path: str, template: str | None) -> object:
    from penstock.plugins.renderers.jinja import JinjaRenderer  # late: only the text process pays for it

    return JinjaRenderer.load(model_path, template)


def _gguf(model_path: str, template: str | None) -> object:
    from penstock.plugins.renderers.gguf import load  # late, as above

    return load(model_path, template)


@hookimpl(trylast=True)
def register_chat_renderers() -> list[ChatRendererSpec]:
    return [
        ChatRendererSpec(
            name="jinja",
            api_level=API_LEVEL["chat_renderers"],
            doc="Hugging Face chat templates in a sandbox.",
            matches=lambda model_path: True,
            factory=_jinja,
        ),
        ChatRendererSpec(
            name="gguf",
            api_level=API_LEVEL["chat_renderers"],
            doc="The chat templates in a GGUF file, in the same sandbox.",
            matches=is_gguf,
            factory=_gguf,
        ),
    ]
