"""instructor against a server, by OpenAI's and Anthropic's API, in each of its modes: `python instructor_client.py URL`, in an environment with both."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import anthropic
import instructor
import openai
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel

Mode = instructor.Mode
ANN: Any = [{"role": "user", "content": "Who is Ann, 30 years old? Answer with JSON."}]
OSLO: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
WHOLE = (Mode.JSON, Mode.JSON_SCHEMA, Mode.JSON_O1, Mode.MD_JSON)
FORCED = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.FUNCTIONS)
"""They make the model call a tool, and are refused by name where the server cannot."""


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):  # the tool's name
    """Get the current weather in a city"""

    city: str


def forced(ask: Callable[[], Any]) -> None:
    try:
        said = ask()
    except InstructorRetryException as error:
        if "tool_choice" not in str(error):
            raise
    else:
        assert isinstance(said, Person), said


def by_openai(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ask: dict[str, Any] = {"model": "brook", "temperature": 0, "max_tokens": 100}
    for mode in WHOLE:
        made = instructor.from_openai(client, mode=mode).chat.completions.create(**ask, messages=ANN, response_model=Person, max_retries=1)
        assert (made.name, made.age) == ("Ann", 30), mode
    for mode in (Mode.JSON, Mode.JSON_SCHEMA):
        parts = list(instructor.from_openai(client, mode=mode).chat.completions.create_partial(**ask, messages=ANN, response_model=Person))
        assert (parts[-1].name, parts[-1].age) == ("Ann", 30), mode
    calls = instructor.from_openai(client, mode=Mode.PARALLEL_TOOLS).chat.completions.create(
        **ask, messages=OSLO, response_model=Iterable[get_weather]
    )
    assert [call.city for call in calls] == ["Oslo"]
    for mode in FORCED:
        create = instructor.from_openai(client, mode=mode).chat.completions.create
        forced(partial(create, **ask, messages=ANN, response_model=Person, max_retries=1))


def by_anthropic(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    ask: dict[str, Any] = {"model": "brook", "max_tokens": 1100, "extra_body": {"temperature": 0}}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    for mode, more in ((Mode.ANTHROPIC_JSON, {}), (Mode.ANTHROPIC_REASONING_TOOLS, thinking)):
        made = instructor.from_anthropic(client, mode=mode).messages.create(
            **ask, **more, messages=ANN, response_model=Person, max_retries=2
        )
        assert (made.name, made.age) == ("Ann", 30), mode
    calls = instructor.from_anthropic(client, mode=Mode.ANTHROPIC_PARALLEL_TOOLS).messages.create(
        **ask, messages=OSLO, response_model=Iterable[get_weather]
    )
    assert [call.city for call in calls] == ["Oslo"]
    create = instructor.from_anthropic(client, mode=Mode.ANTHROPIC_TOOLS).messages.create
    forced(partial(create, **ask, messages=ANN, response_model=Person, max_retries=1))


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # it says there what it raises, too
    by_openai(sys.argv[1])
    by_anthropic(sys.argv[1])
    print(f"instructor {instructor.__version__}: all is well")
