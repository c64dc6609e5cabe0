"""Chat templates of a GGUF file.

What it is: the templates and special tokens in the file's fields, given to the renderer of jinja.py.
What it does not know: the container, tokenisation.
"""

from __future__ import annotations

from penstock.plugins.gguf.container import GgufFile
from penstock.plugins.gguf.vocabulary import Vocabulary
from penstock.plugins.renderers.jinja import JinjaRenderer, given_template


def load(model_path: str, template: str | None) -> JinjaRenderer:
    """`template` (a file, or the text itself) replaces the model's. Raises as JinjaRenderer.load."""
    file = GgufFile(model_path)
    vocabulary = Vocabulary(file)
    found = {"default": given_template(template)} if template else vocabulary.templates()
    return JinjaRenderer(found, vocabulary.special(), whose="option" if template else "model", origins=dict.fromkeys(found, file.path))
