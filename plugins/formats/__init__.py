"""Built-in output formats: how models write reasoning and calls. They enter by the same hook as a stranger's.

What it is: the plugin module `penstock.plugins.formats` of the group `penstock.text`.
What it does not know: which one a model has (core/actors/text/formats.py).
"""

from __future__ import annotations

from penstock.core.contract.hookspecs import FormatSpec, hookimpl
from penstock.plugins.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from penstock.plugins.formats.harmony import OPENAI
from penstock.plugins.formats.hermes import HERMES
from penstock.plugins.formats.kimi import KIMI_K2
from penstock.plugins.formats.lists import COHERE, GRANITE, INTERNLM, JAMBA, PHI4_MINI, XLAM
from penstock.plugins.formats.llama3 import LLAMA3_JSON
from penstock.plugins.formats.mistral import MISTRAL
from penstock.plugins.formats.pythonic import PYTHONIC
from penstock.plugins.formats.thinking import (
    DEEPSEEK_R1,
    ERNIE45_REASONING,
    GRANITE_REASONING,
    HUNYUAN,
    KIMI,
    KIMI_K2_REASONING,
    MISTRAL_REASONING,
    QWEN3,
    SEED_OSS_REASONING,
)
from penstock.plugins.formats.xml import DEEPSEEK_V32, GLM45, MINIMAX_M2, QWEN3_CODER, SEED_OSS, STEP3

CALLS = [
    XLAM,
    LLAMA3_JSON,
    PYTHONIC,
    HERMES,
    MISTRAL,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    DEEPSEEK_V32,
    INTERNLM,
    GRANITE,
    PHI4_MINI,
    JAMBA,
    QWEN3_CODER,
    SEED_OSS,
    MINIMAX_M2,
    GLM45,
    STEP3,
    KIMI_K2,
]
REASONING = [
    QWEN3,
    DEEPSEEK_R1,
    KIMI_K2_REASONING,
    KIMI,
    HUNYUAN,
    ERNIE45_REASONING,
    SEED_OSS_REASONING,
    MISTRAL_REASONING,
    GRANITE_REASONING,
]
BUILT_IN = [*CALLS, *REASONING, OPENAI, COHERE]
"""A later one is asked earlier whether it matches."""


@hookimpl
def register_output_formats() -> list[FormatSpec]:
    return BUILT_IN
