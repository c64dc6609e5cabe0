"""Built-in output formats: how models write reasoning and calls. They enter by the same hook as a stranger's.

What it is: the plugin module `penstock.plugins.formats` of the group `penstock.text`.
What it does not know: which one a model has (core/actors/text/formats.py).
"""

from __future__ import annotations

from penstock.core.contract.hookspecs import FormatSpec, hookimpl
from penstock.plugins.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from penstock.plugins.formats.harmony import OPENAI
from penstock.plugins.formats.hermes import HERMES
from penstock.plugins.formats.llama3 import LLAMA3_JSON
from penstock.plugins.formats.mistral import MISTRAL
from penstock.plugins.formats.pythonic import PYTHONIC
from penstock.plugins.formats.thinking import DEEPSEEK_R1, QWEN3

BUILT_IN = [LLAMA3_JSON, PYTHONIC, HERMES, MISTRAL, DEEPSEEK_V3, DEEPSEEK_V31, QWEN3, DEEPSEEK_R1, OPENAI]
"""A later one is asked earlier whether it matches."""


@hookimpl
def register_output_formats() -> list[FormatSpec]:
    return BUILT_IN
