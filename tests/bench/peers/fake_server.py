"""A tiny OpenAI-compatible server that behaves and misbehaves as it is told: `fake_server.py --port N [...]`.

What it is: streamed completions of exactly the tokens that were asked for; with --notes FILE it writes down its process, its words and each completion. Words that it does not
know are taken (it stands in for servers that have many). What it does not know: models, text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(allow_abbrev=False)
PARSER.add_argument("--port", type=int, default=0)
PARSER.add_argument("--name", default="fake")
PARSER.add_argument("--notes", type=Path, help="a line a fact")
PARSER.add_argument("--break-start", action="store_true", help="leave before being ready")
PARSER.add_argument("--never-ready", action="store_true")
PARSER.add_argument("--short-by", type=int, default=0, help="tokens fewer than asked")
PARSER.add_argument("--refuse-longer", type=int, default=1 << 30, help="400 for prompts of more tokens")
PARSER.add_argument("--die-at", type=int, default=1 << 30, help="the completion (from 1) in which the process ends")
PARSER.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
PARSER.add_argument("--child", action="store_true", help="start a process in a session of its own")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.completions = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", asked.port), Handler)

    def note(self, **fact: Any) -> None:
        if self.asked.notes is not None:
            with self.lock, self.asked.notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(fact) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, file=sys.stderr, flush=True)

    def _json(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        known = {"/health": {}, "/version": {"version": "1.2.3"}, "/v1/models": {"data": [{"id": "fake"}]}}
        if self.server.asked.never_ready:
            self._json(503, {})
        elif self.path in known:
            self._json(200, known[self.path])
        else:
            self._json(404, {"error": "no such route"})

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = self.server.asked
        with self.server.lock:
            self.server.completions += 1
            number = self.server.completions
        self.server.note(turn=asked.name, prompt=len(ask["prompt"]), output=ask["max_tokens"], first=ask["prompt"][:4])
        if number >= asked.die_at:
            print("the weights have run dry", file=sys.stderr, flush=True)
            os._exit(3)
        if len(ask["prompt"]) > asked.refuse_longer:
            self._json(400, {"error": {"message": "too long for me"}})
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for index in range(max(1, ask["max_tokens"] - asked.short_by)):
            event = {"choices": [{"text": "a", "token_ids": [index]}], "usage": {"prompt_tokens": len(ask["prompt"])}}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


def main() -> None:
    asked, _ = PARSER.parse_known_args()
    if asked.break_start:
        print("loading\nno such tensor: model.norm.weight", file=sys.stderr, flush=True)
        sys.exit(2)
    if asked.stubborn:
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = Server(asked)
    own = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    child = None
    if asked.child:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True).pid
    server.note(pid=os.getpid(), child=child, words=sys.argv[1:], env=own)
    if asked.port == 0:
        time.sleep(60)
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
