"""The real Claude Code without network or login: a scratch home, a pseudo-terminal, and a model made of a script.

    with Model() as model, Terminal(home, model, ["claude", ...]) as terminal:
        held = model.next(text="done")          # what the model will say next, once `held.set()` allows it
        terminal.type("hello")
        request = model.asked()                  # the conversation as it was sent, flattened to text
"""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import os
import pty
import queue
import re
import select
import shutil
import signal
import struct
import termios
import threading
import time
from pathlib import Path
from typing import Any

CLAUDE = os.environ.get("CLAUDE_BIN") or shutil.which("claude")
KEY = "dummy-not-a-real-key"
LIMIT = 30.0


def flatten(content: Any) -> str:
    """All text of a message's content, tool results included."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return "\n".join(filter(None, (flatten(content.get(key)) for key in ("text", "content"))))
    return "\n".join(map(flatten, content)) if isinstance(content, list) else ""


class Model:
    """Answers the Messages API from a script; everything it was asked is kept."""

    def __init__(self) -> None:
        self.script: queue.Queue[tuple[list[dict[str, Any]], threading.Event]] = queue.Queue()
        self.requests: queue.Queue[str] = queue.Queue()
        self.last = ""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(404, {})

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
                if not self.path.split("?")[0].endswith("/v1/messages"):
                    return self.answer(200, {"input_tokens": 1})
                blocks = outer.decide(body)
                message = {"id": f"msg_{time.monotonic_ns()}", "type": "message", "role": "assistant", "model": "mock",
                           "content": blocks, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
                           "stop_reason": "tool_use" if blocks[-1]["type"] == "tool_use" else "end_turn"}
                return self.stream(message) if body.get("stream") else self.answer(200, message)

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self, message: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.event("message_start", message={**message, "content": [], "stop_reason": None})
                    for index, block in enumerate(message["content"]):
                        text = block["type"] == "text"
                        self.event("content_block_start", index=index,
                                   content_block={**block, **({"text": ""} if text else {"input": {}})})
                        self.event("content_block_delta", index=index, delta=(
                            {"type": "text_delta", "text": block["text"]} if text else
                            {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}))
                        self.event("content_block_stop", index=index)
                    self.event("message_delta", delta={"stop_reason": message["stop_reason"], "stop_sequence": None},
                               usage={"output_tokens": 1})
                    self.event("message_stop")

            def event(self, kind: str, **fields: Any) -> None:
                self.wfile.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode())

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.handle_error = True, lambda *of: None  # Claude Code just hangs up
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Model:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def next(self, text: str = "ok", tool: str | None = None, **arguments: Any) -> threading.Event:
        """Script the next answer: a text, or the call of a tool. It is given when the returned event is set."""
        block = {"type": "text", "text": text} if tool is None else {
            "type": "tool_use", "id": f"toolu_{time.monotonic_ns()}", "name": tool, "input": arguments}
        may = threading.Event()
        self.script.put(([block], may))
        return may

    def decide(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        offered = [tool.get("name") for tool in body.get("tools") or ()]
        if not offered:  # a title, a probe
            return [{"type": "text", "text": "mock"}]
        self.last = "\n".join(flatten(message.get("content")) for message in body.get("messages", ()))
        self.requests.put(self.last)
        try:
            blocks, may = self.script.get_nowait()
        except queue.Empty:
            return [{"type": "text", "text": "nothing more to say"}]
        may.wait(LIMIT)
        return blocks

    def asked(self, containing: str = "") -> str:
        """The next conversation sent that contains the text; those before it are skipped."""
        deadline = time.monotonic() + LIMIT
        while True:
            request = self.requests.get(timeout=max(0.01, deadline - time.monotonic()))
            if containing in request:
                return request


def scratch_home(home: Path, work: Path) -> None:
    """Answer in advance what Claude Code asks a new user."""
    home.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (home / ".claude.json").write_text(json.dumps({
        "hasCompletedOnboarding": True, "theme": "dark", "customApiKeyResponses": {"approved": [KEY[-20:]], "rejected": []},
        "projects": {str(work): {"hasTrustDialogAccepted": True}}}))


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
        self.screen, self.status = b"", None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(cwd)
                os.execve(command[0], command, env)
            finally:
                os._exit(127)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 45, 140, 0, 0))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signum)
                self.wait(4.0)
        os.close(self.fd)

    def pump(self, seconds: float = 0.05) -> bool:
        """Take in what is written; False once the other end is closed."""
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                return False
            self.screen += data
            return bool(data)
        return True

    def shows(self, text: str, limit: float = LIMIT) -> None:
        """Wait until the text was written; blanks do not count."""
        wanted = re.sub(r"\s", "", text)
        deadline = time.monotonic() + limit
        while wanted not in re.sub(r"\s", "", self.text):
            assert time.monotonic() < deadline and self.pump(), f"never shown: {text!r} in {self.text[-2000:]}"

    @property
    def text(self) -> str:
        return re.sub(rb"\x1b\[[0-9;?<>=]*[a-zA-Z]|\x1b\][^\x07]*\x07", b"", self.screen).decode(errors="replace")

    def type(self, text: str) -> None:
        """Type a line and Enter, as two keystrokes: Claude Code takes a burst for a paste."""
        os.write(self.fd, text.encode())
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            self.pump()
        os.write(self.fd, b"\r")

    def wait(self, limit: float = LIMIT) -> int | None:
        """The exit status, once it has ended."""
        deadline = time.monotonic() + limit
        while self.status is None and time.monotonic() < deadline:
            self.pump(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status
