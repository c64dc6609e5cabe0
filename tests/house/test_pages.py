"""The pages for users: nothing that exists is missing on them, and what they show runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec

from penstock.core.protocol import errors
from penstock.transports.fields import FIELDS
from penstock.transports.openai_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from penstock.transports.openapi_replies import REPLIES
from penstock.transports.refused import GENERATION

DOCS = Path(__file__).resolve().parents[2] / "docs"
REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def test_the_http_page_has_every_field_endpoint_and_code() -> None:
    page = (DOCS / "http.md").read_text(encoding="utf-8")
    fields = {field for kind in REQUESTS for field in kind.__struct_fields__}
    assert fields == set(FIELDS), "transports/fields.py has a line for each field and no other"
    for name in fields:
        assert f"| `{name}`" in page, name
    for name in GENERATION:
        assert f"`{name}`" in page, name
    for path in REPLIES:
        assert f"{path}`" in page, path
    codes = set(get_args(errors.ErrorCode))
    assert set(re.findall(r"^\| `(\w+)` \| (?:\d+|-) \|", page, re.MULTILINE)) == codes


def test_the_openapi_document_says_what_fields_do() -> None:
    from penstock.transports.openapi import described

    _, components = msgspec.json.schema_components(REQUESTS, ref_template="#/components/schemas/{name}")
    described(components)
    for kind in REQUESTS:
        for name, schema in components[kind.__name__]["properties"].items():
            assert schema["description"] == FIELDS[name]


def test_the_python_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), space)
