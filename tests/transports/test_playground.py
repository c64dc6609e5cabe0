"""The page at /: for browsers alone, below any path, without a key; and its files hold nothing that its own policy would have to stop."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from edge_kit import Edge, MakeEdge

from penstock.core.protocol.config import build
from penstock.transports.builtin import openai_routes
from penstock.transports.playground import routes
from penstock.transports.playground.routes import playground_routes, reads_pages

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FILES = sorted(path for path in routes.FOLDER.iterdir() if path.suffix in routes.KINDS)
PAGE = (routes.FOLDER / routes.PAGE).read_text(encoding="utf-8")


def test_a_browser_gets_the_page_with_its_guards(shared_edge: Edge) -> None:
    reply = shared_edge.kept.get("/", headers=BROWSER)
    assert reply.status_code == 200
    assert reply.text == PAGE
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["vary"] == "accept"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert (reply.headers["x-content-type-options"], reply.headers["referrer-policy"]) == ("nosniff", "no-referrer")


@pytest.mark.parametrize("path", ["/", *(f"/playground/{file.name}" for file in FILES if file.suffix != ".html")])
def test_every_file_has_its_kind_its_guards_and_a_tag_that_is_the_same_everywhere(
    shared_edge: Edge, make_edge: MakeEdge, path: str
) -> None:
    reply = shared_edge.kept.get(path, headers=BROWSER)
    head = shared_edge.kept.head(path, headers=BROWSER)
    assert (reply.status_code, head.status_code, head.content) == (200, 200, b"")
    for name, value in ((name.decode(), value.decode()) for name, value in routes.GUARDS):
        assert reply.headers[name] == head.headers[name] == value
    tag = reply.headers["etag"]
    assert (head.headers["etag"], head.headers["content-length"]) == (tag, str(len(reply.content)))
    assert reply.headers["cache-control"] == "no-cache"
    kind = ".html" if path == "/" else Path(path).suffix
    assert reply.headers["content-type"].split(";")[0].encode() == routes.KINDS[kind]
    for known in (tag, f'"x", W/{tag}', "*"):
        same = shared_edge.kept.get(path, headers={**BROWSER, "if-none-match": known})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
        assert same.headers["content-security-policy"] == routes.POLICY.decode()
    assert shared_edge.kept.get(path, headers={**BROWSER, "if-none-match": '"x"'}).status_code == 200
    assert make_edge().kept.get(path, headers={**BROWSER, "if-none-match": tag}).status_code == 304


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (None, False),
        (b"", False),
        (b"*/*", False),
        (b"application/json", False),
        (b"text/*", False),
        (b"text/html;q=0, */*", False),
        (b"text/html", True),
        (b"TEXT/HTML; q=0.1, application/json", True),
    ],
)
def test_who_reads_pages(accept: bytes | None, page: bool) -> None:
    assert reads_pages(accept) is page


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("accept", ["*/*", "application/json"])
def test_programs_are_told_what_they_were_told_without_a_page(make_edge: MakeEdge, method: str, accept: str) -> None:
    replies = [make_edge(enable_playground=on).kept.request(method, "/", headers={"accept": accept}) for on in (True, False)]
    assert replies[0].status_code == replies[1].status_code == 405
    assert replies[0].headers["allow"] == replies[1].headers["allow"] == "OPTIONS, POST"
    assert replies[0].text == replies[1].text
    assert "generated_text" in make_edge().kept.post("/", json={"inputs": "hi"}).text


def test_where_nothing_else_is_there_programs_find_nothing(make_edge: MakeEdge) -> None:
    without = make_edge(routes=[openai_routes]).kept.get("/")
    beside = make_edge(routes=[openai_routes, playground_routes])
    assert beside.kept.get("/", headers=BROWSER).status_code == 200
    assert beside.kept.get("/").status_code == without.status_code == 404
    assert beside.kept.get("/").json() == without.json()
    wrong = beside.kept.delete("/")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_the_page_can_be_turned_off(make_edge: MakeEdge) -> None:
    assert build({}).enable_playground
    assert not build({"no_playground": True}).enable_playground
    off = make_edge(no_playground=True).kept
    assert off.get("/", headers=BROWSER).status_code == 405
    assert off.get("/playground/app.js").status_code == 404


def test_the_page_needs_no_key_and_all_else_does(make_edge: MakeEdge) -> None:
    http = make_edge(api_key=["secret-1"]).kept
    assert http.get("/", headers=BROWSER).status_code == 200
    assert http.head("/", headers=BROWSER).status_code == 200
    for file in FILES:
        if file.suffix != ".html":
            assert http.get(f"/playground/{file.name}").status_code == 200
    assert "secret" not in http.get("/", headers=BROWSER).text
    for method, path in (
        ("POST", "/"),
        ("GET", "//"),
        ("GET", "/playground"),
        ("GET", "/playground/"),
        ("GET", "/playground/index.html"),
        ("GET", "/playground/routes.py"),
        ("GET", "/playground/../metrics"),
        ("GET", "/playground/app.js/"),
        ("GET", "/metrics"),
    ):
        assert http.request(method, f"http://{http.base_url.netloc.decode()}{path}", headers=BROWSER).status_code == 401, (method, path)
    assert http.post("/playground/app.js").status_code == 405


@pytest.mark.parametrize("prefix", ["/api/llm/", "/"])
def test_below_a_path_the_addresses_are_relative(make_edge: MakeEdge, prefix: str) -> None:
    http = make_edge(root_path="/api/llm").kept
    page = http.get(prefix, headers=BROWSER)
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text)
    assert {Path(address).name for address in linked} == {"app.js", "style.css", "icon.svg"}
    for address in linked:
        assert http.get(str(page.url.join(address))).status_code == 200
    bare = http.get("/api/llm", headers=BROWSER)
    assert (bare.status_code, bare.headers["location"]) == (308, "llm/")
    assert str(bare.url.join(bare.headers["location"])) == f"{http.base_url}/api/llm/".replace("//api", "/api")


# ------------------------------------------------------------------ what is in the files


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))


TAGS = Tags().all


def test_nothing_in_the_page_is_inline() -> None:
    assert len(TAGS) > 50
    for tag, attributes in TAGS:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag not in ("style", "base", "iframe", "object", "embed")
        assert tag != "script" or ((attributes.get("src") or "").startswith("playground/") and attributes.get("type") == "module")
        assert not (attributes.get("href") or "").startswith(("/", "javascript:", "data:"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_a_file_names_no_other_host_and_makes_no_markup(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:https?|wss?):?//[^\s\"'`)>]+", text)) <= {"http://www.w3.org/2000/svg"}  # a namespace, never asked for
    assert not re.search(r"(?<![:\w])//[a-z0-9-]+\.[a-z]{2,}", text)
    assert not re.search(
        r"(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|setHTML|@import|localStorage|\.cookie",
        text,
    )
    if file.suffix in (".js", ".css"):
        assert text.startswith(("// ", "/* ")), "each file opens with what it is"


def test_modules_import_files_that_are_there() -> None:
    for file in FILES:
        if file.suffix == ".js":
            for name in re.findall(r'from "([^"]+)"', file.read_text(encoding="utf-8")):
                assert (routes.FOLDER / name).is_file(), (file.name, name)


def test_the_page_is_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 70_000


def test_each_control_of_the_page_has_a_name() -> None:
    labelled = {attributes["for"] for tag, attributes in TAGS if tag == "label" and "for" in attributes}
    ids = [attributes["id"] for _, attributes in TAGS if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert labelled - {"stop"} <= set(ids)
    for tag, attributes in TAGS:
        if tag in ("input", "select", "textarea") and attributes.get("type") != "checkbox":
            assert attributes["id"] in labelled
        for name in ("aria-describedby", "aria-controls"):
            assert attributes.get(name) is None or attributes[name] in ids, attributes
