"""A process that renders chat templates of requests, and may die of it.

What it is: the main of FencedRenderer's children (core/processes/templates.py): takes TemplateSetup and then Renderings, and answers each with a
Rendered (core/processes/fenced.py).
What it does not know: requests, time limits (who started it kills it), pipes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from penstock.core.contract.host import PluginHost
from penstock.core.contract.text import TemplatedRenderer
from penstock.core.processes.fenced import serve
from penstock.core.processes.templates import MOST_CHARS, Rendered, Rendering, TemplateSetup
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature, described

ROOM = 512 << 20
NICE = 5
"""The text process and the engines come first."""


def load(setup: TemplateSetup) -> Callable[[Rendering], Rendered]:
    os.nice(NICE)
    plugins = PluginHost("text", extra=setup.extra, skip_broken=setup.skip_broken).load()
    renderer = plugins.chat_renderers()[setup.renderer].factory(setup.source, setup.chat_template)
    return lambda rendering: render(renderer, rendering)


def render(renderer: TemplatedRenderer, rendering: Rendering) -> Rendered:
    """Never raises for a bad template."""
    try:
        text = renderer.with_template(json.loads(rendering.template)).render(**json.loads(rendering.arguments))
        if len(text) > MOST_CHARS:
            raise InvalidRequest(f"chat_template cannot be used: the prompt is longer than {MOST_CHARS} characters.", param="chat_template")
        return Rendered(text=text.encode("utf-8", "surrogatepass"))
    except PenstockError as error:
        return Rendered(error=_sendable(error.message), param=error.param, unsupported=isinstance(error, UnsupportedFeature))
    except MemoryError:
        return Rendered(error="chat_template cannot be used: it takes too much memory.", param="chat_template")
    except BaseException as error:
        said = _sendable(f"chat_template cannot be used: {described(error)}"[:500])
        return Rendered(error=said, param="chat_template")


def _sendable(text: str) -> str:
    """Half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def main() -> None:
    serve(TemplateSetup, Rendering, load, Rendered(), room=ROOM)


if __name__ == "__main__":
    main()
