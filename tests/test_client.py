"""The peer: configuration, invites, and `MeshClient` against a broker of which each test bends one fact."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import socket
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import claudemesh
import wire
from broker import Broker
from claudemesh import MeshClient, MeshError, NameProblem

LIMIT = 5.0  # seconds any awaited event may take
ALICE = wire.KeyPair.from_seed(bytes(31) + b"\x01")
ALICE_SESSION = wire.KeyPair.from_seed(bytes(31) + b"\x02")
BOB = wire.KeyPair.from_seed(bytes(31) + b"\x03")
CAROL = wire.KeyPair.from_seed(bytes(31) + b"\x04")
OWNER = wire.KeyPair.from_seed(bytes(31) + b"\x05")
MESH_ID, MEMBER_ID = "m" * 32, "a" * 32
PROFILE = {"roleTag": None, "groups": [], "messageMode": "push"}


def run(story) -> Any:
    async def limited():
        async with asyncio.timeout(4 * LIMIT):
            return await story
    return asyncio.run(limited())


class FakeBroker:
    """Welcomes everybody, acknowledges what asks for it, and keeps every frame it gets.

    `refuse` is the code of the error that answers hello; `close_with` a close code sent after it.
    `answers[type]` replaces the answer to a message: a function from the frame to a list of frames.
    """

    def __init__(self) -> None:
        self.frames: list[dict] = []
        self.connections: list[wire.Connection] = []
        self.capabilities = ["client_ack", "session_proof", "sealed_multicast", "target", "events", "quiet", "inbox"]
        self.refuse: str | None = None
        self.silent = False
        self.answers: dict[str, Callable[[dict], list[dict]]] = {}
        self.changed = asyncio.Event()
        self.closes: list[int | None] = []

    async def __aenter__(self) -> FakeBroker:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/ws"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.server.close()
        for connection in self.connections:
            connection.abort()

    def membership(self, keys: wire.KeyPair = ALICE) -> dict:
        return {"meshId": MESH_ID, "memberId": MEMBER_ID, "slug": "harbor", "name": "harbor", "pubkey": keys.public,
                "secretKey": keys.secret, "brokerUrl": self.url, "joinedAt": "2026-01-02T03:04:05.006Z"}

    def client(self, **options: Any) -> MeshClient:
        options.setdefault("keys", ALICE_SESSION)
        return MeshClient(self.membership(), random=Steady(), **options)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await wire.read_request(reader)
        connection = wire.Connection.accept(request, reader, writer)
        self.connections.append(connection)
        while (messages := await connection.receive()) is not None:
            for frame in map(wire.decode, messages):
                wire.check(frame, "client")  # whatever the client says fits the table
                self.frames.append(frame)
                await self._answer(connection, frame)
            self.changed.set()
        await connection.close()
        self.closes.append(connection.ws.close_code)
        self.changed.set()

    async def _answer(self, connection: wire.Connection, frame: dict) -> None:
        kind = frame["type"]
        if kind in self.answers:
            for answer in self.answers[kind](frame):
                connection.send(wire.encode(answer))
        elif kind == "hello" and self.refuse:
            connection.send(wire.encode({"type": "error", "code": self.refuse, "message": "no"}))
            connection.begin_close(1008, self.refuse)
        elif kind == "hello" and not self.silent:
            honoured = [c for c in frame["capabilities"] if c in self.capabilities]
            connection.send(wire.encode({"type": "hello_ack", "presenceId": "p" * 32, "memberDisplayName": "alice",
                                         "memberProfile": PROFILE, "capabilities": honoured}))
        elif kind == "send":
            connection.send(wire.encode(ack(frame)))
        elif kind not in ("hello", "client_ack"):
            connection.send(wire.encode({"type": "ack", "id": frame["_reqId"], "messageId": "", "queued": False,
                                         "_reqId": frame["_reqId"]}))

    def push(self, frame: dict, *more: dict) -> None:
        """Push on the newest connection, in one write."""
        connection = self.connections[-1]
        connection.write(b"".join(connection.ws.text(wire.encode(f)) for f in (frame, *more)))

    def drop(self) -> None:
        """Cut the newest connection without a word."""
        self.connections[-1].abort()

    async def keep_out(self, client: Any) -> None:
        """Cut its connection and refuse it from now on; returns once it has been turned away."""
        self.refuse = "capacity"
        self.drop()
        await self.until(lambda: client.state == "reconnecting" and len(self.all("hello")) > 1)

    def all(self, kind: str) -> list[dict]:
        return [frame for frame in self.frames if frame["type"] == kind]

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until `condition` holds; checked after whatever arrives."""
        async with asyncio.timeout(LIMIT):
            while not (result := condition()):
                self.changed.clear()
                await self.changed.wait()
            return result


class Steady:
    """Randomness without surprises: no jitter, tokens that count."""

    def __init__(self) -> None:
        self.count = 0

    def random(self) -> float:
        return 0.5

    def randbytes(self, size: int) -> bytes:
        self.count += 1
        return self.count.to_bytes(size)


def ack(frame: dict, message_id: str = "x" * 32) -> dict:
    return {"type": "ack", "id": frame["id"], "messageId": message_id, "queued": True,
            "recipients": {"online": 1, "held": 0}}


def push(seq: int, id: str, text: str | None = None, *, to: wire.KeyPair = ALICE_SESSION, **fields: Any) -> dict:
    """A message from Bob, sealed to `to` unless the fields say otherwise."""
    nonce, ciphertext = wire.seal_direct(text or id, to.public, BOB.secret)
    return {"type": "push", "messageId": id, "meshId": MESH_ID, "senderPubkey": BOB.public, "priority": "next",
            "nonce": nonce, "ciphertext": ciphertext, "createdAt": "2026-01-02T03:04:05.006Z", "seq": seq,
            "target": to.public, "senderName": "bob", **fields}


def state_result(key: str) -> dict:
    return {"type": "state_result", "key": key, "value": key * 2, "updatedAt": "t", "updatedBy": "bob"}


def peer(name: str, key: str, **fields: Any) -> dict:
    return {"pubkey": key, "displayName": name, "status": "idle", "summary": None, "groups": [], "sessionId": "s",
            "connectedAt": "2026-01-02T03:04:05.006Z", "cwd": "/work", **fields}


def listing(*peers: dict) -> Callable[[dict], list[dict]]:
    return lambda frame: [{"type": "peers_list", "peers": list(peers), "_reqId": frame["_reqId"]}]


async def next_push(client: MeshClient) -> claudemesh.Push:
    async with asyncio.timeout(LIMIT):
        return await anext(client)


@pytest.fixture(autouse=True)
def quick_back_off(monkeypatch):
    """The delays are told apart by the tests that are about them; the others need not wait."""
    monkeypatch.setattr(claudemesh, "BACKOFF", (0.01,))


# --- Configuration --------------------------------------------------------------------------------


def stored_config(directory: Path, content: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "config.json"
    path.write_text(content)
    return path


def entry(**changes: Any) -> dict:
    return {"meshId": MESH_ID, "memberId": MEMBER_ID, "slug": "harbor", "name": "harbor", "pubkey": ALICE.public,
            "secretKey": ALICE.secret, "brokerUrl": "ws://127.0.0.1:7900/ws",
            "joinedAt": "2026-01-02T03:04:05.006Z", **changes}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.spec("CONF-1")
def test_the_directory_is_the_one_named_by_the_environment_else_in_the_home_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAUDEMESH_CONFIG_DIR", str(tmp_path / "mine"))
    assert claudemesh.config_dir() == tmp_path / "mine"
    claudemesh.save_config({"version": 1, "meshes": []})
    assert mode(tmp_path / "mine") == 0o700
    monkeypatch.setenv("CLAUDEMESH_CONFIG_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert claudemesh.config_dir() == tmp_path / ".claudemesh"


@pytest.mark.spec("CONF-2")
def test_files_are_private_whatever_the_umask_and_replaced_in_one_step(tmp_path, monkeypatch):
    old = os.umask(0)
    try:
        claudemesh.save_config({"version": 1, "meshes": [entry()]}, tmp_path)
    finally:
        os.umask(old)
    path = tmp_path / "config.json"
    assert mode(path) == 0o600
    before = path.read_text()

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(wire.UsageError, match="config.json: No space left on device"):
        claudemesh.save_config({"version": 1, "meshes": []}, tmp_path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.spec("CONF-3")
def test_a_missing_file_is_an_empty_configuration(tmp_path):
    assert claudemesh.load_config(tmp_path) == {"version": 1, "meshes": []}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("CONF-3")
def test_what_is_not_known_is_kept(tmp_path):
    stored = {"version": 1, "meshes": [entry(colour="blue")], "displayName": "desk", "theme": {"dark": True}}
    stored_config(tmp_path, json.dumps(stored))
    claudemesh.update_config(lambda config: config.update(role="lead"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {**stored, "role": "lead"}


@pytest.mark.spec("CONF-4")
@pytest.mark.parametrize("content, complaint", [
    ('{"version": 1,\n  "meshes": [}', "line 2 column 14: Expecting value"),
    ("[]", "expected an object"),
    ('{"version": 2}', "version: expected 1"),
    ('{"meshes": {}}', "meshes: expected a list"),
    ('{"meshes": [7]}', r"meshes\[0\]: expected an object"),
    (json.dumps({"meshes": [entry(), entry(pubkey="AB")]}), r"meshes\[1\].pubkey: expected 64 lower-case hex"),
    (json.dumps({"meshes": [entry(slug="../up")]}), r"meshes\[0\].slug: expected a slug"),
    ('{"groups": [{"role": "lead"}]}', "groups: expected a list of"),
    ('{"messageMode": "loud"}', "messageMode: expected push, inbox or off"),
    ("[" * 100_000, "nested too deeply"),
])
def test_a_file_that_cannot_be_used_is_named_with_the_place_and_left_alone(tmp_path, content, complaint):
    path = stored_config(tmp_path, content)
    for use in (claudemesh.load_config, lambda dir: claudemesh.update_config(lambda config: None, dir)):
        with pytest.raises(wire.UsageError, match=f"config.json: {complaint}") as refused:
            use(tmp_path)
        assert "\n" not in str(refused.value)
    assert path.read_text() == content


@pytest.mark.spec("CONF-2", "CONF-4")
def test_what_cannot_be_written_is_refused_in_one_line_and_leaves_nothing_behind(tmp_path):
    path = stored_config(tmp_path, '{"displayName": "\\ud800"}')
    with pytest.raises(wire.UsageError, match="config.json"):
        claudemesh.update_config(lambda config: config.update(role="lead"), tmp_path)
    assert path.read_text() == '{"displayName": "\\ud800"}'
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "lock"}


@pytest.mark.spec("CONF-1")
def test_every_directory_made_is_private(tmp_path):
    claudemesh.session_keys(MESH_ID, "s", tmp_path / "conf")
    assert {mode(tmp_path / "conf" / part) for part in (".", "sessions", f"sessions/{MESH_ID}")} == {0o700}


@pytest.mark.spec("CONF-4")
def test_no_secret_appears_in_a_complaint(tmp_path):
    stored_config(tmp_path, json.dumps({"meshes": [entry(secretKey="f00d" * 31)]}))
    with pytest.raises(wire.UsageError) as refused:
        claudemesh.load_config(tmp_path)
    assert "f00d" not in str(refused.value)


@pytest.mark.spec("CONF-5")
def test_two_writers_at_once_lose_nothing(tmp_path):
    def add(name: str) -> None:
        for number in range(10):
            claudemesh.update_config(lambda config: config.update({f"{name}{number}": True}), tmp_path)

    writers = [threading.Thread(target=add, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(claudemesh.load_config(tmp_path)) == 2 + 20


@pytest.mark.spec("CONF-5")
def test_a_change_that_fails_saves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        claudemesh.update_config(lambda config: config.update(half=1 / 0), tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.spec("CONF-6")
@pytest.mark.parametrize("slug", ["../x", "a/b", "", ".", "A", "a_b", "-a", "a" * 64, "a\n", "ä", "a\0"])
def test_a_name_that_is_no_safe_slug_names_no_file(tmp_path, slug):
    for name_file in (claudemesh.invite_file, claudemesh.owner_file):
        with pytest.raises(wire.UsageError, match="not a usable mesh name"):
            name_file(slug, tmp_path)
    assert claudemesh.invite_file("a" * 63, tmp_path).name == f"invite-{'a' * 63}.txt"


@pytest.mark.spec("CONF-7")
def test_a_session_that_is_resumed_keeps_its_keys_and_another_has_others(tmp_path):
    first = claudemesh.session_keys(MESH_ID, "2f6c-session", tmp_path)
    assert claudemesh.session_keys(MESH_ID, "2f6c-session", tmp_path) == first
    assert claudemesh.session_keys(MESH_ID, "other", tmp_path) != first
    assert claudemesh.session_keys("n" * 32, "2f6c-session", tmp_path) != first
    path = tmp_path / "sessions" / MESH_ID / "2f6c-session.json"
    assert mode(path) == 0o600 and mode(path.parent) == 0o700


@pytest.mark.spec("CONF-7")
def test_a_session_id_never_leads_out_of_the_directory(tmp_path):
    claudemesh.session_keys("../../mesh", "../../../etc/passwd", tmp_path / "config")
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


@pytest.mark.spec("CONF-7")
def test_session_keys_nobody_used_for_ninety_days_are_removed(tmp_path):
    claudemesh.session_keys(MESH_ID, "old", tmp_path)
    claudemesh.session_keys(MESH_ID, "recent", tmp_path)
    folder = tmp_path / "sessions" / MESH_ID
    now = (folder / "old.json").stat().st_mtime
    os.utime(folder / "old.json", (now, now - 91 * 86400))
    os.utime(folder / "recent.json", (now, now - 89 * 86400))
    claudemesh.session_keys(MESH_ID, "new", tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["new.json", "recent.json"]


@pytest.mark.spec("CONF-8")
def test_the_mesh_is_the_named_one_or_the_only_one():
    one, two = entry(), entry(slug="garden")
    assert claudemesh.find_mesh({"meshes": [one]}) is one
    assert claudemesh.find_mesh({"meshes": [one, two]}, "garden") is two
    for meshes, slug, complaint in [([], None, "no mesh joined yet"), ([one, two], None, "one of: harbor, garden"),
                                    ([one], "attic", "not a member of 'attic'")]:
        with pytest.raises(wire.UsageError, match=complaint):
            claudemesh.find_mesh({"meshes": meshes}, slug)


@pytest.mark.spec("CONF-9")
def test_the_name_comes_from_the_environment_then_the_configuration_then_the_host(monkeypatch):
    monkeypatch.setenv("CLAUDEMESH_DISPLAY_NAME", "from env")
    assert claudemesh.display_name({"displayName": "from config"}) == "from env"
    monkeypatch.delenv("CLAUDEMESH_DISPLAY_NAME")
    assert claudemesh.display_name({"displayName": "from config"}) == "from config"
    assert claudemesh.display_name({}).endswith(f"-{os.getpid()}")


# --- Invites, enrolment, signed HTTP --------------------------------------------------------------


class FakeHttp:
    """An HTTP server that keeps the requests and gives the answers it was told, one after the other."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict, bytes]] = []
        self.answers: list[tuple[int, Any]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.command, self.path, dict(self.headers), body))
                status, answer = outer.answers.pop(0)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = serve

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        self.ws_url = f"ws://127.0.0.1:{self.server.server_port}/ws"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> FakeHttp:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def broker():
    with FakeHttp() as server:
        yield server


NOW = 1_900_000_000  # seconds, the clock of whoever joins


def invite(ws_url: str, **changes: Any) -> str:
    payload = {"v": 1, "mesh_id": MESH_ID, "mesh_slug": "harbor", "broker_url": ws_url, "expires_at": NOW + 60,
               "mesh_root_key": "cm9vdA", "role": "member", "owner_pubkey": OWNER.public, **changes}
    return wire.invite_link(wire.invite_token(wire.sign_invite(payload, OWNER.secret)))


def join(link: str, directory: Path) -> dict:
    return claudemesh.join_mesh(link, "alice", dir=directory, now=lambda: NOW)


@pytest.mark.spec("INV-20", "INV-22", "CONF-2")
def test_joining_sends_a_new_key_and_keeps_membership_and_link_private(broker, tmp_path):
    broker.answers = [(200, {"ok": True, "memberId": MEMBER_ID})]
    link = invite(broker.ws_url)
    joined = join(link, tmp_path)
    [(method, path, _, body)] = broker.requests
    sent = json.loads(body)
    token = wire.extract_token(link)
    assert (method, path) == ("POST", "/join")
    assert sent == {"invite_token": token, "invite_payload": wire.decode_invite(token),
                    "peer_pubkey": joined["pubkey"], "display_name": "alice"}
    [saved] = claudemesh.load_config(tmp_path)["meshes"]
    assert joined == {**saved, "alreadyMember": False}
    assert {k: v for k, v in saved.items() if k not in ("pubkey", "secretKey")} == {
        "meshId": MESH_ID, "memberId": MEMBER_ID, "slug": "harbor", "name": "harbor", "brokerUrl": broker.ws_url,
        "joinedAt": "2030-03-17T17:46:40.000Z"}
    assert (tmp_path / "invite-harbor.txt").read_text() == link + "\n"
    assert mode(tmp_path / "config.json") == mode(tmp_path / "invite-harbor.txt") == 0o600


def altered(link: str) -> str:
    payload = wire.decode_invite(wire.extract_token(link))
    return wire.invite_link(wire.invite_token({**payload, "role": "admin"}))


@pytest.mark.spec("INV-20", "INV-21")
@pytest.mark.parametrize("make, error, complaint", [
    (lambda url: invite(url, expires_at=NOW - 1), wire.InviteError, "expired"),
    (lambda url: altered(invite(url)), wire.InviteError, "altered"),
    (lambda url: "ic://join/e30", wire.InviteError, "damaged"),
    (lambda url: "hello", wire.InviteError, "not an invite"),
    (lambda url: invite(url, mesh_slug="../../.ssh/x"), wire.UsageError, "not a usable mesh name"),
    (lambda url: invite("file:///etc/passwd"), wire.UsageError, "not a ws:// or wss:// address"),
])
def test_a_bad_invite_is_refused_before_anything_is_sent_or_written(broker, tmp_path, make, error, complaint):
    with pytest.raises(error, match=complaint):
        join(make(broker.ws_url), tmp_path)
    assert broker.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("INV-22")
def test_joining_the_same_mesh_again_keeps_this_machines_key(broker, tmp_path):
    broker.answers = [(200, {"ok": True, "memberId": MEMBER_ID}),
                      (200, {"ok": True, "memberId": MEMBER_ID, "alreadyMember": True})]
    first, second = (join(invite(broker.ws_url), tmp_path) for _ in range(2))
    assert second == {**first, "alreadyMember": True}
    assert len(claudemesh.load_config(tmp_path)["meshes"]) == 1


@pytest.mark.spec("CONF-3", "INV-22")
def test_joining_again_keeps_what_others_noted_in_the_entry(broker, tmp_path):
    broker.answers = [(200, {"ok": True, "memberId": MEMBER_ID}), (200, {"ok": True, "memberId": MEMBER_ID})]
    join(invite(broker.ws_url), tmp_path)
    claudemesh.update_config(lambda config: config["meshes"][0].update(note="mine"), tmp_path)
    join(invite(broker.ws_url), tmp_path)
    assert claudemesh.load_config(tmp_path)["meshes"][0]["note"] == "mine"


@pytest.mark.spec("INV-22")
def test_a_mesh_joined_meanwhile_is_not_replaced(broker, tmp_path, monkeypatch):
    broker.answers = [(200, {"ok": True, "memberId": MEMBER_ID})]
    real, other = claudemesh.http_call, entry(meshId="n" * 32)

    def call(*args, **options):
        claudemesh.save_config({"version": 1, "meshes": [other]}, tmp_path)  # another process does this
        return real(*args, **options)
    monkeypatch.setattr(claudemesh, "http_call", call)
    with pytest.raises(wire.UsageError, match="already a member of another mesh called harbor"):
        join(invite(broker.ws_url), tmp_path)
    assert claudemesh.load_config(tmp_path)["meshes"] == [other]


@pytest.mark.spec("INV-22")
def test_another_mesh_of_the_same_name_does_not_take_the_place_of_the_first(broker, tmp_path):
    claudemesh.save_config({"version": 1, "meshes": [entry()]}, tmp_path)
    with pytest.raises(wire.UsageError, match="already a member of another mesh called harbor"):
        join(invite(broker.ws_url, mesh_id="n" * 32), tmp_path)
    assert broker.requests == [] and claudemesh.load_config(tmp_path)["meshes"] == [entry()]


@pytest.mark.spec("INV-23")
@pytest.mark.parametrize("status, answer, code, text", [
    (400, {"ok": False, "error": "invite_exhausted"}, "invite_exhausted", "^the invite is used up: ask for another$"),
    (403, {"ok": False, "error": "forbidden", "message": "admins only"}, "forbidden", "admins only"),
    (400, {"ok": False, "error": "Peer key is missing"}, "http_400", "Peer key is missing"),
    (404, b"not found", "http_404", "no usable answer .HTTP 404."),
    (200, b"<html>", "http_200", "no usable answer"),
    (200, {"ok": True}, "malformed", "names no member"),
])
def test_what_the_broker_refuses_becomes_one_error_with_its_code(broker, tmp_path, status, answer, code, text):
    broker.answers = [(status, answer)]
    with pytest.raises(MeshError, match=text) as refused:
        join(invite(broker.ws_url), tmp_path)
    assert refused.value.code == code
    kept = [path.name for path in tmp_path.iterdir() if path.name != "lock"]
    assert kept == ([] if code in ("invite_exhausted", "forbidden") else [f"joining-{MESH_ID}.json"])  # INV-22


@pytest.mark.spec("INV-23")
def test_half_an_answer_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(MeshError) as cut:
            claudemesh.http_call(f"http://127.0.0.1:{server.getsockname()[1]}", "GET", "/download", raw=True)
        assert cut.value.code == "offline"


@pytest.mark.spec("INV-23")
def test_a_secret_that_http_cannot_carry_is_not_shown(broker):
    with pytest.raises(wire.UsageError) as refused:
        claudemesh.http_call(broker.base, "GET", "/health", headers={"Authorization": "Bearer s3cret\n"})
    assert "s3cret" not in str(refused.value)


@pytest.mark.spec("INV-23")
def test_bytes_are_answered_as_they_are_when_asked_for(broker):
    broker.answers = [(200, b"\x00\x01"), (403, {"ok": False, "error": "forbidden"})]
    assert claudemesh.http_call(broker.base, "POST", "/download", b"raw", raw=True) == b"\x00\x01"
    with pytest.raises(MeshError, match="forbidden"):
        claudemesh.http_call(broker.base, "GET", "/download", raw=True)
    assert broker.requests[0][3] == b"raw"


@pytest.mark.spec("INV-23")
def test_a_broker_that_is_not_there_is_offline(tmp_path):
    with FakeHttp() as server:
        link = invite(server.ws_url)
    with pytest.raises(MeshError, match="cannot be reached: nothing listens there; `claudemesh up`") as refused:
        join(link, tmp_path)
    assert refused.value.code == "offline"


@pytest.mark.spec("INV-24", "INV-25", "INV-26")
def test_creating_a_mesh_keeps_the_owner_key_here_and_joins_it_as_admin(broker, tmp_path, monkeypatch):
    monkeypatch.setattr(claudemesh.time, "time", lambda: float(NOW))
    broker.answers = [
        (200, {"ok": True, "meshId": MESH_ID, "slug": "harbor", "brokerUrl": broker.ws_url}),
        (200, {"ok": True, "inviteId": "i" * 32}),
        (200, {"ok": True, "memberId": MEMBER_ID}),
    ]
    membership = claudemesh.create_mesh("harbor", "The Harbor", broker.ws_url, display_name="alice",
                                        admin_token="letmein", dir=tmp_path)
    create, invite_, join_ = broker.requests
    owner = json.loads((tmp_path / "owner-harbor.json").read_text())
    assert mode(tmp_path / "owner-harbor.json") == 0o600
    assert (create[0], create[1]) == ("POST", "/mesh")
    assert json.loads(create[3]) == {"slug": "harbor", "name": "The Harbor", "owner_pubkey": owner["ownerPubkey"]}
    assert create[2]["Authorization"] == "Bearer letmein"
    for method, path, headers, body in (create, invite_):
        text = wire.http_text(method, path, body, NOW * 1000, owner["ownerPubkey"])
        assert (headers["X-Mesh-Key"], headers["X-Mesh-Time"]) == (owner["ownerPubkey"], "1900000000000")
        assert wire.verify(text, headers["X-Mesh-Signature"], owner["ownerPubkey"])
    assert (invite_[0], invite_[1]) == ("POST", f"/mesh/{MESH_ID}/invites")
    sent = json.loads(invite_[3])
    payload = wire.read_invite(sent["token"], NOW)
    assert sent["maxUses"] == 1
    assert payload["role"] == "admin" and payload["expires_at"] == NOW + 600
    assert payload["owner_pubkey"] == owner["ownerPubkey"] and payload["mesh_root_key"] == owner["rootKey"]
    assert json.loads(join_[3])["invite_token"] == sent["token"]
    assert membership["memberId"] == MEMBER_ID
    everything = b"".join(body for *_, body in broker.requests).decode()
    assert owner["ownerSecretKey"] not in everything and membership["secretKey"] not in everything


@pytest.mark.spec("INV-24")
def test_keys_of_an_earlier_mesh_are_never_overwritten(broker, tmp_path):
    claudemesh.write_private(tmp_path / "owner-harbor.json", "{}")
    with pytest.raises(wire.UsageError, match="move it away"):
        claudemesh.create_mesh("harbor", "Harbor", broker.ws_url, display_name="alice", dir=tmp_path)
    claudemesh.save_config({"version": 1, "meshes": [entry(slug="garden")]}, tmp_path)
    with pytest.raises(wire.UsageError, match="leave garden first"):
        claudemesh.create_mesh("garden", "Garden", broker.ws_url, display_name="alice", dir=tmp_path)
    assert broker.requests == []


def keep_owner(directory: Path, url: str) -> None:
    claudemesh.write_private(directory / "owner-harbor.json", json.dumps({
        "meshId": MESH_ID, "slug": "harbor", "brokerUrl": url, "ownerPubkey": OWNER.public,
        "ownerSecretKey": OWNER.secret, "rootKey": "cm9vdA"}))


@pytest.mark.spec("INV-25")
def test_an_invite_is_signed_here_and_its_limits_are_the_brokers_to_keep(broker, tmp_path, monkeypatch):
    keep_owner(tmp_path, broker.ws_url)
    broker.answers = [(200, {"ok": True, "inviteId": "i" * 32})]
    link = claudemesh.make_invite("harbor", max_uses=3, expires_s=60, preset={"roleTag": "lead"}, dir=tmp_path)
    sent = json.loads(broker.requests[0][3])
    assert sent == {"token": wire.extract_token(link), "maxUses": 3, "preset": {"roleTag": "lead"}}
    broker.answers = [(200, {"ok": True, "inviteId": "j" * 32})]
    assert claudemesh.make_invite("harbor", max_uses=3, expires_s=60, dir=tmp_path) != link  # in the same second, too
    monkeypatch.setattr(claudemesh.time, "time", lambda: float(NOW))
    broker.answers = [(200, {"ok": True, "inviteId": "k" * 32})]
    usual = wire.decode_invite(wire.extract_token(claudemesh.make_invite("harbor", dir=tmp_path)))
    assert (usual["role"], usual["expires_at"]) == ("member", NOW + 7 * 86400)
    assert json.loads(broker.requests[-1][3])["maxUses"] == 1
    for wrong in ({"role": "owner"}, {"max_uses": 0}, {"expires_s": 0}):
        with pytest.raises(wire.UsageError):
            claudemesh.make_invite("harbor", dir=tmp_path, **wrong)


@pytest.mark.spec("INV-25")
def test_a_machine_without_the_owner_key_cannot_invite(broker, tmp_path):
    claudemesh.save_config({"version": 1, "meshes": [entry(brokerUrl=broker.ws_url)]}, tmp_path)
    with pytest.raises(wire.UsageError, match="only the machine that created harbor can invite"):
        claudemesh.make_invite("harbor", dir=tmp_path)
    assert broker.requests == []


@pytest.mark.spec("INV-26")
@pytest.mark.parametrize("owner", [True, False])
def test_administration_is_signed_by_the_owner_key_if_it_is_here_else_by_the_member(broker, tmp_path, owner):
    claudemesh.save_config({"version": 1, "meshes": [entry(brokerUrl=broker.ws_url)]}, tmp_path)
    if owner:
        keep_owner(tmp_path, broker.ws_url)
    broker.answers = [(200, {"ok": True, "members": [{"id": "z"}]}), (200, {"ok": True, "invites": []}),
                      (200, {"ok": True}), (200, {"ok": True})]
    assert claudemesh.list_members("harbor", tmp_path) == [{"id": "z"}]
    assert claudemesh.list_invites("harbor", tmp_path) == []
    claudemesh.revoke_member("harbor", "b" * 32, tmp_path)
    claudemesh.revoke_invite("harbor", "i" * 32, tmp_path)
    assert [f"{method} {path}" for method, path, *_ in broker.requests] == [
        f"GET /mesh/{MESH_ID}/members", f"GET /mesh/{MESH_ID}/invites",
        f"DELETE /mesh/{MESH_ID}/members/{'b' * 32}", f"DELETE /mesh/{MESH_ID}/invites/{'i' * 32}"]
    assert {headers["X-Mesh-Key"] for *_, headers, _ in broker.requests} == {(OWNER if owner else ALICE).public}
    with pytest.raises(wire.UsageError, match="not an id"):
        claudemesh.revoke_member("harbor", "../../mesh", tmp_path)


@pytest.mark.spec("INV-27")
def test_leaving_forgets_membership_link_and_session_keys_but_not_the_owner(tmp_path):
    claudemesh.save_config({"version": 1, "meshes": [entry(), entry(slug="garden")]}, tmp_path)
    claudemesh.write_private(tmp_path / "invite-harbor.txt", "ic://join/x\n")
    claudemesh.session_keys(MESH_ID, "s", tmp_path)
    keep_owner(tmp_path, "ws://127.0.0.1:1/ws")
    assert claudemesh.leave_mesh("harbor", tmp_path) == 1
    assert [m["slug"] for m in claudemesh.load_config(tmp_path)["meshes"]] == ["garden"]
    assert not (tmp_path / "invite-harbor.txt").exists() and (tmp_path / "owner-harbor.json").exists()
    assert list((tmp_path / "sessions" / MESH_ID).iterdir()) == []
    with pytest.raises(wire.UsageError, match="not a member of 'harbor'"):
        claudemesh.leave_mesh("harbor", tmp_path)


# --- Connecting -----------------------------------------------------------------------------------


@pytest.mark.spec("CLIENT-1")
def test_hello_is_signed_afresh_by_the_member_and_proves_the_session_key():
    async def story():
        times = iter((1_900_000_000.25, 1_900_000_001.5, 1_900_000_099.5))
        async with FakeBroker() as broker:
            client = MeshClient(broker.membership(), name="alice", session_id=None, keys=ALICE_SESSION,
                                groups=["crew", {"name": "ops", "role": "lead"}], hello={"peerType": "ai"},
                                clock=lambda: next(times))
            async with client:
                [hello] = broker.all("hello")
        assert client.key == ALICE_SESSION.public and client.member_key == ALICE.public
        assert {name: hello[name] for name in ("meshId", "memberId", "pubkey", "sessionPubkey", "displayName",
                                               "groups", "timestamp", "peerType", "channel", "pid")} == {
            "meshId": MESH_ID, "memberId": MEMBER_ID, "pubkey": ALICE.public, "sessionPubkey": ALICE_SESSION.public,
            "displayName": "alice", "groups": [{"name": "crew"}, {"name": "ops", "role": "lead"}],
            "timestamp": 1_900_000_001_500, "peerType": "ai", "channel": "sdk", "pid": os.getpid()}
        assert hello["capabilities"] == ["client_ack", "session_proof", "sealed_multicast", "target", "events"]
        assert wire.verify_hello(hello, 1_900_000_001_500) is None
        proof = wire.session_text(MESH_ID, ALICE.public, ALICE_SESSION.public, 1_900_000_001_500)
        assert wire.verify(proof, hello["sessionSignature"], ALICE_SESSION.public)
    run(story())


@pytest.mark.spec("CLIENT-21")
def test_a_quiet_client_speaks_as_the_member_and_announces_no_session():
    async def story():
        async with FakeBroker() as broker, broker.client(quiet=True, inbox=True) as client:
            [hello] = broker.all("hello")
            assert "sessionPubkey" not in hello and "sessionSignature" not in hello
            assert hello["capabilities"][-2:] == ["quiet", "inbox"]
            assert client.key == ALICE.public
            await client.send(BOB.public, "from the member")
            [sent] = broker.all("send")
            assert wire.open_direct(sent["nonce"], sent["ciphertext"], ALICE.public, BOB.secret) == "from the member"
    run(story())


@pytest.mark.spec("CONF-7", "CLIENT-1")
def test_a_session_id_brings_back_the_same_address(tmp_path):
    async def story():
        async with FakeBroker() as broker:
            for _ in range(2):
                async with broker.client(session_id="s1", keys=None, config_dir=tmp_path):
                    pass
        first, second = broker.all("hello")
        assert first["sessionPubkey"] == second["sessionPubkey"] and first["sessionId"] == "s1"
    run(story())


@pytest.mark.spec("CLIENT-2")
def test_a_broker_that_cannot_be_reached_is_an_error_of_one_line():
    async def story():
        async with FakeBroker() as broker:
            pass
        await broker.server.wait_closed()
        client = broker.client()
        with pytest.raises(MeshError, match="cannot be reached") as refused:
            async with client:
                pass
        assert refused.value.code == "offline" and "\n" not in str(refused.value)
        assert client.state == "closed" and client.error is refused.value
    run(story())


@pytest.mark.spec("CLIENT-2")
def test_a_broker_that_never_welcomes_is_given_up(monkeypatch):
    monkeypatch.setattr(claudemesh, "HELLO_TIMEOUT", 0.05)

    async def story():
        async with FakeBroker() as broker:
            broker.silent = True
            with pytest.raises(MeshError, match="no answer in time"):
                await broker.client().start()
    run(story())


@pytest.mark.spec("CLIENT-2")
def test_an_address_that_is_none_is_refused_for_good():
    async def story():
        client = MeshClient(entry(brokerUrl="ftp://x"), keys=ALICE_SESSION)
        await client.start(wait=False)
        await client.opened()
        assert client.state == "closed" and client.error.code == "malformed"
    run(story())


@pytest.mark.spec("CLIENT-4")
@pytest.mark.parametrize("code", ["unauthorized", "malformed", "bad_signature", "bad_session_key"])
def test_a_refused_hello_ends_the_client_for_good(code):
    async def story():
        async with FakeBroker() as broker:
            broker.refuse = code
            client = await broker.client().start(wait=False)
            async with asyncio.timeout(LIMIT):
                assert [push async for push in client] == []
            assert client.state == "closed" and client.error.code == code
            with pytest.raises(MeshError) as refused:
                await client.send(BOB.public, "too late")
            assert refused.value.code == code
            assert len(broker.all("hello")) == 1
            await client.close()
            assert client.error.code == code
    run(story())


@pytest.mark.spec("CLIENT-3", "CLIENT-4")
@pytest.mark.parametrize("code", ["capacity", "timestamp_skew", "replayed"])
def test_a_passing_refusal_is_tried_again_but_a_start_that_waits_is_told(code):
    async def story():
        async with FakeBroker() as broker:
            broker.refuse = code
            client = await broker.client().start(wait=False)
            await broker.until(lambda: len(broker.all("hello")) >= 3)
            broker.refuse = None
            await client.opened()
            assert client.state == "open"
            await client.close()
            if code != "replayed":  # that one is a coincidence and not told
                broker.refuse = code
                with pytest.raises(MeshError) as refused:
                    await broker.client().start()
                assert refused.value.code == code
    run(story())


@pytest.mark.spec("CLIENT-3")
def test_an_error_before_the_welcome_is_forgotten_with_it():
    async def story():
        async with FakeBroker() as broker:
            welcome = {"type": "hello_ack", "presenceId": "p", "memberDisplayName": "a", "memberProfile": PROFILE}
            broker.answers["hello"] = lambda frame: [
                {"type": "error", "code": "unauthorized", "message": "or not"}, welcome]
            async with broker.client() as client:
                broker.drop()
                await broker.until(lambda: len(broker.all("hello")) == 2)
                await client.opened()
                assert client.state == "open"
    run(story())


@pytest.mark.spec("CLIENT-4")
@pytest.mark.parametrize("close_code, code", [(4000, "superseded"), (4001, "revoked")])
def test_a_superseded_or_revoked_client_does_not_come_back(close_code, code):
    async def story():
        async with FakeBroker() as broker:
            client = await broker.client().start()
            waiting = asyncio.ensure_future(client.request("mesh_info", timeout=LIMIT))
            broker.answers["mesh_info"] = lambda frame: []
            await broker.until(lambda: broker.all("mesh_info"))
            broker.connections[-1].begin_close(close_code, code)
            with pytest.raises(MeshError) as lost:
                await waiting
            assert lost.value.code == code
            assert [push async for push in client] == []
            assert client.state == "closed" and client.error.code == code
            assert len(broker.all("hello")) == 1
    run(story())


@pytest.mark.spec("CLIENT-3")
def test_the_delays_double_with_jitter_and_a_welcome_resets_them(monkeypatch):
    monkeypatch.setattr(claudemesh, "BACKOFF", (1, 2, 4, 8, 16, 30))
    delays: list[float] = []
    real_sleep = asyncio.sleep

    async def story():
        async with FakeBroker() as broker:
            broker.refuse = "capacity"

            async def sleep(delay: float) -> None:
                if delay:
                    delays.append(delay)
                    if len(delays) == 8:
                        broker.refuse = None
                await real_sleep(0)

            monkeypatch.setattr(asyncio, "sleep", sleep)
            client = broker.client()
            client._random = type("Edge", (Steady,), {"random": lambda self: 1.0 if len(delays) % 2 else 0.0})()
            await client.start(wait=False)
            await client.opened()
            broker.drop()
            await broker.until(lambda: len(delays) == 9)
            await client.close()
    run(story())
    assert delays == pytest.approx([0.8, 2.4, 3.2, 9.6, 12.8, 36.0, 24.0, 36.0, 0.8])


@pytest.mark.spec("CLIENT-5")
def test_a_silent_connection_is_pinged_and_then_given_up(monkeypatch):
    monkeypatch.setattr(claudemesh, "PING_EVERY", 0.02)
    monkeypatch.setattr(claudemesh, "SILENCE_LIMIT", 0.1)

    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            client._ping_at, client._heard = 0.0, client._loop.time()
            client._paced.cancel()
            client._keep_alive()
            await broker.until(lambda: broker.connections[0].ws.pongs or client._connection.ws.pongs >= 3)
            assert len(broker.connections) == 1  # pongs are life enough
            broker.connections[0].ws.ping = lambda payload=b"": b""
            broker.connections[0].reader.feed_data = lambda data: None  # the broker falls silent
            broker.connections[0].writer.transport.pause_reading()
            await broker.until(lambda: len(broker.all("hello")) == 2)
    run(story())


@pytest.mark.spec("CLIENT-20")
def test_closing_says_goodbye_and_takes_no_longer_than_allowed():
    async def story():
        async with FakeBroker() as broker:
            client = await broker.client().start()
            await client.close()
            await broker.until(lambda: broker.closes == [1000])
            assert client.state == "closed" and client.error is None
            stuck = await broker.client().start()
            broker.connections[-1].writer.transport.pause_reading()
            began = asyncio.get_running_loop().time()
            await stuck.close(grace=0.05)
            assert asyncio.get_running_loop().time() - began < 1.0  # the default would take two seconds
            with pytest.raises(MeshError, match="was closed"):
                await stuck.request("list_peers")
    run(story())


# --- Staying the same peer over a reconnect -------------------------------------------------------


@pytest.mark.spec("CLIENT-6")
def test_after_a_reconnect_groups_status_summary_and_the_rest_are_set_again_in_order():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["subscribe"] = lambda frame: [{"type": "subscribed", "stream": frame["stream"],
                                                          "_reqId": frame["_reqId"]}]
            broker.answers["mcp_register"] = lambda frame: [{"type": "mcp_register_ack", "serverName": "lint",
                                                             "toolCount": 0, "_reqId": frame["_reqId"]}]
            await client.request("mcp_register", serverName="lint", description="", tools=[])
            await client.request("subscribe", stream="builds")
            await client.request("subscribe", stream="noise")
            await client.request("unsubscribe", stream="noise")
            await client.set_summary("first words")
            await client.set_summary("fixing the build")
            await client.set_status("working")
            await client.request("set_profile", title="builder")
            await client.request("set_profile", bio="since 2020")
            await client.request("set_visible", visible=False)
            await client.join_group("crew", "lead")
            await client.join_group("ops")
            await client.leave_group("ops")
            broker.frames.clear()
            broker.drop()
            await broker.until(lambda: len(broker.frames) == 9)
            restored = [{k: v for k, v in f.items() if k != "_reqId"} for f in broker.frames[1:]]
            assert broker.frames[0]["type"] == "hello"
            assert restored == [
                {"type": "join_group", "name": "crew", "role": "lead"},
                {"type": "leave_group", "name": "ops"},
                {"type": "set_status", "status": "working"},
                {"type": "set_summary", "summary": "fixing the build"},
                {"type": "set_visible", "visible": False},
                {"type": "set_profile", "title": "builder", "bio": "since 2020"},
                {"type": "subscribe", "stream": "builds"},
                {"type": "mcp_register", "serverName": "lint", "description": "", "tools": []},
            ]
    run(story())


@pytest.mark.spec("CLIENT-7")
@pytest.mark.parametrize("frame", [
    {"type": ["x"]}, {"type": None}, {"type": "ack", "_reqId": [1]}, {"type": "ack", "id": {}},
    {"type": "error", "code": "x", "message": "m", "_reqId": {}}, {"type": "error", "code": 1}, {"type": "push"},
    push(1, "left", nonce="", ciphertext="", senderPubkey="system", event="peer_left", eventData={"pubkey": []}),
    {"type": "mcp_call_forward", "callId": []},
], ids=str)
def test_a_frame_of_nonsense_costs_nothing_else(frame):
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            calls: list[dict] = []
            client.handlers["mcp_call_forward"] = calls.append
            client._sealed_for["*"] = {"k": None}
            broker.push(frame)
            await client.set_status("idle")
            assert client.state == "open" and len(broker.all("hello")) == 1 and calls == []
    run(story())


@pytest.mark.spec("CLIENT-20")
def test_while_it_closes_requests_fail_and_the_timer_does_no_harm():
    async def story():
        async with FakeBroker() as broker:
            client = await broker.client().start()
            real = client._connection.close

            async def slow(code: int) -> None:
                await asyncio.sleep(0.05)
                await real(code)
            client._connection.close = slow
            closing = asyncio.ensure_future(client.close())
            await asyncio.sleep(0.01)
            client.post("set_status", status="idle")
            client._ping_at = 0
            client._keep_alive()
            with pytest.raises(MeshError, match="was closed"):
                await client.request("mesh_info")
            await closing
    run(story())


@pytest.mark.spec("CLIENT-6")
def test_a_late_refusal_does_not_undo_what_was_set_after_it():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            asked: list[dict] = []

            def answer(frame: dict) -> list[dict]:
                asked.append(frame)
                if len(asked) == 1:
                    return []
                first, second = (one["_reqId"] for one in asked)
                return [{"type": "ack", "id": second, "messageId": "", "queued": False, "_reqId": second},
                        {"type": "error", "code": "rate_limited", "message": "no", "_reqId": first}]
            broker.answers["set_status"] = answer
            await asyncio.gather(client.set_status("working"), client.set_status("dnd"), return_exceptions=True)
            del broker.answers["set_status"]
            broker.frames.clear()
            broker.drop()
            assert (await broker.until(lambda: broker.all("set_status")))[0]["status"] == "dnd"
    run(story())


@pytest.mark.spec("CLIENT-6")
def test_what_the_broker_refused_is_not_tried_again_and_what_was_before_it_stays():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            await client.set_summary("good")
            broker.answers["set_summary"] = lambda frame: [
                {"type": "error", "code": "too_large", "message": "too long", "_reqId": frame["_reqId"]}]
            with pytest.raises(MeshError, match="too long"):
                await client.set_summary("bad")
            broker.frames.clear()
            broker.drop()
            await broker.until(lambda: broker.all("set_summary"))
            assert broker.all("set_summary")[0]["summary"] == "good"
            await client.opened()
            await client.request("list_state", timeout=LIMIT)  # its answer comes after the refusal of that one as well,
            broker.frames.clear()
            broker.drop()
            await broker.until(lambda: broker.all("hello"))
            await client.opened()
            await client.request("list_state")
            assert broker.all("set_summary") == []  # which is therefore forgotten
    run(story())


@pytest.mark.spec("CLIENT-6")
def test_a_status_set_while_offline_is_an_error_now_and_true_after_the_reconnect():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            await broker.keep_out(client)
            with pytest.raises(MeshError, match="takes effect once connected again") as offline:
                await client.set_status("dnd")
            assert offline.value.code == "offline"
            broker.refuse = None
            await broker.until(lambda: broker.all("set_status"))
            with pytest.raises(wire.UsageError, match=r"set_status.status: expected idle\|working\|dnd"):
                await client.set_status("sleepy")
    run(story())


@pytest.mark.spec("CLIENT-9", "CLIENT-6")
def test_a_send_whose_ack_was_lost_is_repeated_under_the_same_client_message_id_after_what_is_restored():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            await client.set_status("working")
            broker.answers["send"] = lambda frame: []  # accepted, but the ack never gets through
            sending = asyncio.ensure_future(client.send(BOB.public, "once", timeout=LIMIT))
            await broker.until(lambda: broker.all("send"))
            del broker.answers["send"]
            broker.drop()
            result = await sending
            first, second = broker.all("send")
            assert first["id"] != second["id"] == result["id"]
            assert {k: v for k, v in first.items() if k != "id"} == {k: v for k, v in second.items() if k != "id"}
            kinds = [frame["type"] for frame in broker.frames]
            assert kinds == ["hello", "set_status", "send", "hello", "set_status", "send"]
    run(story())


@pytest.mark.spec("CLIENT-9")
def test_a_send_that_stays_unanswered_ends_with_timeout_and_is_not_sent_later():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["send"] = lambda frame: []
            with pytest.raises(MeshError) as late:
                await client.send(BOB.public, "?", timeout=0.05)
            assert late.value.code == "timeout"
            broker.drop()
            await broker.until(lambda: len(broker.all("hello")) == 2)
            await client.opened()
            await client.request("set_stats", stats={})
            assert len(broker.all("send")) == 1
    run(story())


@pytest.mark.spec("CLIENT-8")
def test_a_send_while_offline_waits_for_the_connection():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            await broker.keep_out(client)
            sending = asyncio.ensure_future(client.send(BOB.public, "patience", timeout=LIMIT))
            await broker.until(lambda: len(broker.all("hello")) > 3)
            assert not sending.done()
            broker.refuse = None
            assert (await sending)["messageId"] == "x" * 32
    run(story())


@pytest.mark.spec("CLIENT-8")
def test_a_send_that_found_no_connection_in_time_failed_and_is_never_sent():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            await broker.keep_out(client)
            with pytest.raises(MeshError, match="nothing was sent") as offline:
                await client.send(BOB.public, "gone", timeout=0.05)
            assert offline.value.code == "offline"
            broker.refuse = None
            await client.opened()
            await client.send(BOB.public, "here")
            texts = [wire.open_direct(f["nonce"], f["ciphertext"], client.key, BOB.secret)
                     for f in broker.all("send")]
            assert texts == ["here"]
    run(story())


@pytest.mark.spec("CLIENT-8")
def test_a_request_while_offline_fails_at_once():
    async def story():
        client = MeshClient(entry(), keys=ALICE_SESSION)
        with pytest.raises(MeshError) as offline:
            await client.request("list_peers")
        assert offline.value.code == "offline"
    run(story())


@pytest.mark.spec("CLIENT-9")
def test_a_message_too_large_for_the_broker_fails_instead_of_closing_the_connection_for_ever():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            with pytest.raises(MeshError) as large:
                await client.send(BOB.public, "x" * wire.MAX_MESSAGE_BYTES)
            assert large.value.code == "too_large" and client.state == "open"
            broker.answers["send"] = lambda frame: []
            sending = asyncio.ensure_future(client.send(BOB.public, "small", timeout=LIMIT))
            await broker.until(lambda: broker.all("send"))
            broker.connections[-1].begin_close(1009)  # an upstream broker takes 64 KiB
            with pytest.raises(MeshError) as large:
                await sending
            assert large.value.code == "too_large" and len(broker.all("send")) == 1
    run(story())


# --- Requests -------------------------------------------------------------------------------------


@pytest.mark.spec("CLIENT-7")
def test_an_error_reaches_exactly_its_caller_while_others_are_in_flight():
    async def story():
        held: list[dict] = []
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["get_state"] = lambda frame: held.append(frame) or []
            broker.answers["send"] = lambda frame: held.append(frame) or []
            asks = [asyncio.ensure_future(client.request("get_state", key=key)) for key in "abc"]
            sends = [asyncio.ensure_future(client.send(key, "hi")) for key in (BOB.public, CAROL.public)]
            await broker.until(lambda: len(held) == 5)
            by_key = {frame.get("key") or frame["targetSpec"]: frame for frame in held}
            broker.push(
                {"type": "error", "code": "no_such_recipient", "message": "nobody", "id": by_key[CAROL.public]["id"]},
                {"type": "error", "code": "not_found", "message": "no b", "_reqId": by_key["b"]["_reqId"], "hint": 7},
                {"type": "error", "code": "internal", "message": "not ours", "_reqId": "0" * 16},
                {"type": "error", "code": "internal", "message": "nobody's"},
                {**state_result("z"), "_reqId": "f" * 16},
                state_result("z"),
                *({**state_result(key), "_reqId": by_key[key]["_reqId"]} for key in "ca"),
                ack(by_key[BOB.public]))
            results = await asyncio.gather(*asks, *sends, return_exceptions=True)
            a, b, c, to_bob, to_carol = results
            assert (a["value"], c["value"]) == ("aa", "cc")
            assert (b.code, b.message, b.frame["hint"]) == ("not_found", "no b", 7)
            assert to_bob["messageId"] == "x" * 32
            assert to_carol.code == "no_such_recipient"
    run(story())


@pytest.mark.spec("CLIENT-7")
def test_correlation_ids_are_random_and_never_used_twice():
    async def story():
        async with FakeBroker() as broker, MeshClient(broker.membership(), keys=ALICE_SESSION) as client:
            await asyncio.gather(*(client.request("set_stats", stats={}) for _ in range(50)))
            ids = {frame["_reqId"] for frame in broker.all("set_stats")}
            assert len(ids) == 50 and all(len(id) == 16 and int(id, 16) >= 0 for id in ids)
    run(story())


@pytest.mark.spec("CLIENT-7")
def test_a_request_of_another_peer_is_not_taken_for_the_answer_to_ours():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            asked: list[dict] = []
            client.handlers["peer_file_request_forward"] = lambda frame: (asked.append(frame), client.post(
                "peer_file_response", requesterPubkey=frame["requesterPubkey"], filePath=frame["filePath"],
                error="no", _reqId=frame["_reqId"]))
            # asking oneself: the broker sends our own _reqId back, first as a request
            broker.answers["peer_file_request"] = lambda frame: [
                {"type": "peer_file_request_forward", "requesterPubkey": client.key, "filePath": frame["filePath"],
                 "_reqId": frame["_reqId"]}]
            broker.answers["peer_file_response"] = lambda frame: [
                {"type": "peer_file_response_forward", "filePath": frame["filePath"], "error": frame["error"],
                 "_reqId": frame["_reqId"]}]
            answer = await client.request("peer_file_request", targetPubkey=client.key, filePath="a.txt")
            assert answer["type"] == "peer_file_response_forward" and answer["error"] == "no"
            assert [frame["filePath"] for frame in asked] == ["a.txt"]
    run(story())


@pytest.mark.spec("CLIENT-7")
def test_nonsense_from_the_broker_disturbs_nobody_but_whom_it_answers():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["list_peers"] = lambda frame: [{"type": "peers_list", "peers": 7,
                                                           "_reqId": frame["_reqId"]}]
            for text in ("}{", "[]", '{"type":7}', '{"type":"push"}', '{"type":"error","code":1}', '{"_reqId":{}}'):
                broker.connections[-1].send(text)
            with pytest.raises(MeshError, match="malformed") as wrong:
                await client.peers()
            assert wrong.value.code == "malformed"
            with pytest.raises(wire.UsageError, match="no such message: list_pears"):
                await client.request("list_pears")
            assert client.state == "open" and len(broker.all("hello")) == 1
    run(story())


# --- Names and targets ----------------------------------------------------------------------------


@pytest.mark.spec("CLIENT-10", "CLIENT-12")
def test_a_key_in_capitals_is_the_same_key_and_never_a_reason_to_send_in_clear():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            result = await client.send(BOB.public.upper(), "für Bob")
            [sent] = broker.all("send")
            assert sent["targetSpec"] == BOB.public and result["encrypted"] is True
            assert len(sent["id"]) == 16 and len(sent["client_message_id"]) == 32
            assert wire.open_direct(sent["nonce"], sent["ciphertext"], client.key, BOB.secret) == "für Bob"
    run(story())


@pytest.mark.spec("CLIENT-10")
@pytest.mark.parametrize("target", ["bob", "#general", "@", "", BOB.public[:63], BOB.public + "0", " *", "tag:x"])
def test_what_is_no_target_is_refused_and_not_sent(target):
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            with pytest.raises(wire.UsageError, match="not a target"):
                await client.send(target, "x")
            with pytest.raises(wire.UsageError, match="no such priority"):
                await client.send("*", "x", "soon")
            assert broker.all("send") == []
    run(story())


@pytest.mark.spec("CLIENT-10")
def test_text_that_is_no_unicode_is_refused_and_never_kept():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            for attempt in (client.send(BOB.public, "\udcff"), client.send("*", "\udcff"),
                            client.set_summary("\udcff")):
                with pytest.raises(wire.UsageError):
                    await attempt
            broker.drop()
            await broker.until(lambda: len(broker.all("hello")) == 2)
            await client.opened()
            await client.send(BOB.public, "fine")
            assert [frame["type"] for frame in broker.frames] == ["hello", "hello", "send"]
    run(story())


@pytest.mark.spec("CLIENT-12")
def test_a_key_that_is_no_point_of_the_curve_fails_as_a_wrong_argument():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            with pytest.raises(wire.UsageError, match="not a point of the curve"):
                await client.send("0" * 64, "x")
            assert client.state == "open" and broker.all("send") == []
    run(story())


PEERS = [peer("Ada", "aa11223344" + "0" * 54, memberPubkey="dd" * 32), peer("ada-two", "ab" * 32),
         peer("Grace", "bb" * 32, status="dnd"), peer("grace", "bc" * 32),
         peer("me", ALICE_SESSION.public, memberPubkey=ALICE.public), peer("Ada", "ae" * 32, memberPubkey="dd" * 32)]


@pytest.mark.spec("CLIENT-11")
@pytest.mark.parametrize("peers, name, key", [
    (PEERS[:3], "ADA", PEERS[0]["pubkey"]),           # the same name, although it is also part of another
    (PEERS, "two", "ab" * 32),                        # a part of just one
    (PEERS, "AA112233", PEERS[0]["pubkey"]),          # eight digits of a session key
    (PEERS, "d" * 8, "dd" * 32),                      # of a member's key: all its sessions
    (PEERS, "F" * 64, "f" * 64),                      # a whole key, listed or not
])
def test_a_name_means_one_peer(peers, name, key):
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["list_peers"] = listing(*peers)
            assert (await client.resolve(name))["pubkey"] == key
            assert client.known == list(peers)
    run(story())


@pytest.mark.spec("CLIENT-11")
def test_an_ambiguous_name_is_reported_with_the_keys_of_all_it_could_mean():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["list_peers"] = listing(*PEERS)
            with pytest.raises(NameProblem, match="Grace .bbbbbbbbbbbbbbbb., grace .bcbcbcbcbcbcbcbc.") as problem:
                await client.resolve("grace")
            assert problem.value.code == "ambiguous_name"
            assert problem.value.candidates == [
                {"name": "Grace", "key": "bb" * 32, "mesh": "harbor", "status": "dnd"},
                {"name": "grace", "key": "bc" * 32, "mesh": "harbor", "status": "idle"}]
    run(story())


@pytest.mark.spec("CLIENT-11")
@pytest.mark.parametrize("name", ["nobody", "me", "", "bbbbbbb", ALICE_SESSION.public[:16]])
def test_an_unknown_name_is_refused_and_says_who_is_there_but_never_means_oneself(name):
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["list_peers"] = listing(*PEERS[2:5])
            with pytest.raises(NameProblem, match="there: Grace, grace$") as problem:
                await client.resolve(name)
            assert problem.value.code == "unknown_name"
    run(story())


# --- Multicast ------------------------------------------------------------------------------------


def needing(*entries: tuple[wire.KeyPair, bool]) -> Callable[[dict], list[dict]]:
    """A broker that asks for the sealed keys it lacks."""
    def answer(frame: dict) -> list[dict]:
        if "sealedKeys" not in frame:
            return [ack(frame)]
        missing = [{"pubkey": keys.public, "sealable": sealable} for keys, sealable in entries
                   if keys.public not in frame["sealedKeys"]]
        return [{"type": "error", "code": "sealed_keys_missing", "message": "some", "id": frame["id"],
                 "missing": missing} if missing else ack(frame)]
    return answer


@pytest.mark.spec("CLIENT-13")
def test_a_multicast_is_sealed_to_the_recipients_the_broker_names_and_they_are_remembered():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["send"] = needing((BOB, True), (CAROL, True))
            assert (await client.send("@crew", "all hands"))["encrypted"] is True
            first, second = broker.all("send")
            assert first["client_message_id"] == second["client_message_id"] and first["id"] != second["id"]
            assert set(second["sealedKeys"]) == {BOB.public, CAROL.public}
            for keys in (BOB, CAROL):
                assert wire.open_multicast(second["nonce"], second["ciphertext"], second["sealedKeys"][keys.public],
                                           client.key, keys.secret) == "all hands"
            await client.send("@crew", "again")
            assert len(broker.all("send")) == 3
            broker.push({"type": "push", "messageId": "left", "meshId": MESH_ID, "senderPubkey": "system",
                         "priority": "low", "nonce": "", "ciphertext": "", "createdAt": "t", "subtype": "system",
                         "event": "peer_left", "eventData": {"name": "carol", "pubkey": CAROL.public}})
            await next_push(client)
            broker.answers["send"] = needing((BOB, True))
            await client.send("@crew", "without Carol")
            assert set(broker.all("send")[-1]["sealedKeys"]) == {BOB.public}
    run(story())


@pytest.mark.spec("CLIENT-13")
def test_a_recipient_who_cannot_open_sealed_bodies_makes_it_plain_and_the_result_says_so():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["send"] = needing((BOB, True), (CAROL, False))
            assert (await client.send("*", "hello all"))["encrypted"] is False
            sealed, plain = broker.all("send")
            assert "sealedKeys" not in plain and wire.read_plain(plain["ciphertext"]) == "hello all"
            assert sealed["client_message_id"] == plain["client_message_id"]
            not_a_point = wire.KeyPair("0" * 64, "")
            broker.answers["send"] = needing((not_a_point, True))
            assert (await client.send("@crew", "hi"))["encrypted"] is False
    run(story())


@pytest.mark.spec("CLIENT-13")
def test_a_broker_without_the_capability_gets_plain_multicasts():
    async def story():
        async with FakeBroker() as broker:
            broker.capabilities.remove("sealed_multicast")
            async with broker.client() as client:
                assert (await client.send("@all", "hi"))["encrypted"] is False
                assert (await client.send(BOB.public, "hi"))["encrypted"] is True
                assert "sealedKeys" not in broker.all("send")[0]
    run(story())


@pytest.mark.spec("CLIENT-13")
def test_recipients_that_never_stop_coming_end_with_the_brokers_error():
    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.answers["send"] = lambda frame: needing((wire.KeyPair.generate(), True))(frame)
            with pytest.raises(MeshError) as refused:
                await client.send("*", "x")
            assert refused.value.code == "sealed_keys_missing" and len(broker.all("send")) == 4
    run(story())


# --- Receiving ------------------------------------------------------------------------------------


async def received(frame: dict, **options: Any) -> claudemesh.Push:
    async with FakeBroker() as broker, broker.client(**options) as client:
        broker.push(frame)
        return await next_push(client)


@pytest.mark.spec("CLIENT-14")
def test_a_message_is_opened_with_the_session_key_then_with_the_member_key():
    first = run(received(push(1, "m1", "to the session")))
    assert (first.kind, first.text, first.secured, first.addressed) == (
        "message", "to the session", "session", "direct")
    assert (first.sender, first.sender_name, first.mesh, first.own) == (BOB.public, "bob", "harbor", False)
    second = run(received(push(1, "m1", "to the member", to=ALICE)))
    assert (second.text, second.secured, second.addressed) == ("to the member", "member", "direct")
    untold = run(received({k: v for k, v in push(1, "m1", "no target").items() if k != "target"}))
    assert (untold.text, untold.secured, untold.addressed) == ("no target", "session", "direct")


@pytest.mark.spec("CLIENT-14")
@pytest.mark.parametrize("to, target, addressed", [(ALICE_SESSION, "@crew", "group"), (ALICE, "*", "broadcast")])
def test_a_sealed_multicast_is_opened_with_either_key(to, target, addressed):
    nonce, ciphertext, sealed = wire.seal_multicast("all hands", [to.public], BOB.secret)
    got = run(received(push(1, "m1", nonce=nonce, ciphertext=ciphertext, sealedKey=sealed[to.public], target=target)))
    assert (got.text, got.secured, got.addressed) == ("all hands", "sealed", addressed)


def plain(text: str) -> dict:
    return dict(zip(("nonce", "ciphertext"), wire.plain_body(text)))


@pytest.mark.spec("CLIENT-15")
@pytest.mark.parametrize("frame, text, secured, addressed", [
    (push(1, "m1", **plain("trust me")), None, "none", "unknown"),                       # claims to be direct
    (push(1, "m1", target=None, **plain("trust me")), "trust me", "plain", "unknown"),   # an old broker
    (push(1, "m1", target="@crew", **plain("hi")), "hi", "plain", "group"),
    (push(1, "m1", target="@all", **plain("hi")), "hi", "plain", "broadcast"),
    (push(1, "m1", target="*", **plain("\x1b[2J")), None, "none", "broadcast"),
    (push(1, "m1", to=CAROL, target=ALICE_SESSION.public), None, "none", "unknown"),     # sealed to somebody else
    (push(1, "m1", sealedKey="AAAA", target="*", **plain("hi")), None, "none", "broadcast"),
    (push(1, "m1", target=None, subtype="system", **plain("I am the broker")), "I am the broker", "plain", "unknown"),
])
def test_a_body_that_proves_nothing_is_never_called_direct(frame, text, secured, addressed):
    got = run(received({k: v for k, v in frame.items() if v is not None}))
    assert (got.text, got.secured, got.addressed, got.kind) == (text, secured, addressed, "message")


@pytest.mark.spec("CLIENT-14", "CLIENT-15")
def test_reminders_webhooks_events_streams_and_state_say_what_they_are():
    reminder = push(1, "m1", subtype="reminder", nonce="", ciphertext=base64.b64encode(b"stand up").decode())
    webhook = push(1, "m2", senderPubkey="webhook:ci", subtype="webhook", event="ci", eventData={"ok": True},
                   nonce="", ciphertext="")
    event = push(1, "m3", senderPubkey="system", subtype="system", event="tick", eventData={"tick": 1}, nonce="",
                 ciphertext="")
    stream = {"type": "stream_data", "stream": "builds", "data": [1, "ä"], "publishedBy": "bob"}
    state = {"type": "state_change", "key": "sprint", "value": 7, "updatedBy": "bob"}
    got = [run(received(frame)) for frame in (reminder, webhook, event, stream, state)]
    assert [(p.kind, p.text, p.secured, p.addressed, p.event, p.data) for p in got] == [
        ("reminder", "stand up", "plain", "unknown", None, None),
        ("webhook", '{"ok":true}', "plain", "unknown", "ci", {"ok": True}),
        ("system", None, "none", "unknown", "tick", {"tick": 1}),
        ("stream", '[1,"ä"]', "plain", "unknown", "builds", [1, "ä"]),
        ("state", "7", "plain", "unknown", "sprint", 7),
    ]
    assert [p.sender_name for p in got[3:]] == ["bob", "bob"]


@pytest.mark.spec("CLIENT-14")
def test_another_session_of_the_same_member_is_recognised():
    assert run(received(push(1, "m1", senderMemberPubkey=ALICE.public))).own is True
    assert run(received(push(1, "m1", senderMemberPubkey=CAROL.public))).own is False


@pytest.mark.spec("CLIENT-16", "CLIENT-17")
def test_pushes_keep_their_order_and_are_acknowledged_together():
    async def story():
        async with FakeBroker() as broker, broker.client(auto_shown=False) as client:
            broker.push(*(push(n, f"m{n}") for n in range(1, 101)))
            got = [(await next_push(client)).text for _ in range(100)]
            assert got == [f"m{n}" for n in range(1, 101)]
            await broker.until(lambda: broker.all("client_ack") and broker.all("client_ack")[-1]["upTo"] == 100)
            assert {frame["stage"] for frame in broker.all("client_ack")} == {"delivered"}
            assert len(broker.all("client_ack")) < 10
    run(story())


@pytest.mark.spec("CLIENT-16")
def test_a_redelivered_push_is_acknowledged_again_and_handed_out_once():
    async def story():
        async with FakeBroker() as broker, broker.client(auto_shown=False) as client:
            broker.push(push(1, "m1"), push(2, "m2"))
            first, second = [await next_push(client) for _ in range(2)]
            client.shown(first)
            await broker.until(lambda: {"type": "client_ack", "upTo": 1, "stage": "shown"} in broker.frames)
            broker.drop()
            await broker.until(lambda: len(broker.all("hello")) == 2)
            await client.opened()
            broker.frames.clear()
            broker.push(push(1, "m1"), push(2, "m2"), push(3, "m3"))
            assert (await next_push(client)).id == "m3"
            await broker.until(lambda: len(broker.frames) == 2)
            assert broker.frames == [{"type": "client_ack", "upTo": 1, "stage": "shown"},
                                     {"type": "client_ack", "upTo": 3, "stage": "delivered"}]
            broker.push(push(2, "m2"))  # and again on the same connection, under its old number
            await broker.until(lambda: len(broker.frames) == 3)
            assert broker.frames[-1] == {"type": "client_ack", "upTo": 3, "stage": "delivered"}
            assert client.take() == []
    run(story())


@pytest.mark.spec("CLIENT-16")
def test_ids_are_remembered_for_as_long_as_their_push_waits(monkeypatch):
    monkeypatch.setattr(claudemesh, "SEEN_LIMIT", 2)

    async def story():
        async with FakeBroker() as broker, broker.client(auto_shown=False) as client:
            broker.push(*(push(n, f"m{n}") for n in range(1, 6)))
            await broker.until(lambda: broker.all("client_ack"))
            broker.push(push(6, "m1"), push(7, "m6"))
            await broker.until(lambda: broker.all("client_ack")[-1]["upTo"] == 7)
            assert [p.id for p in client.take()] == ["m1", "m2", "m3", "m4", "m5", "m6"]
    run(story())


@pytest.mark.spec("CLIENT-18")
def test_asking_for_the_next_push_says_that_the_one_before_was_dealt_with():
    async def story():
        async with FakeBroker() as broker:
            async with broker.client() as client:
                broker.push(push(1, "m1"), push(2, "m2"), push(3, "m3"))
                await next_push(client)
                await broker.until(lambda: broker.all("client_ack"))
                assert broker.all("client_ack") == [{"type": "client_ack", "upTo": 3, "stage": "delivered"}]
                await next_push(client)
                await broker.until(lambda: len(broker.all("client_ack")) == 2)
                assert broker.all("client_ack")[-1] == {"type": "client_ack", "upTo": 1, "stage": "shown"}
            await broker.until(lambda: broker.closes)  # left without an exception: the second was dealt with, too
            assert broker.all("client_ack")[-1] == {"type": "client_ack", "upTo": 2, "stage": "shown"}
    run(story())


@pytest.mark.spec("CLIENT-18")
def test_a_program_that_fails_has_not_dealt_with_its_push():
    async def story():
        async with FakeBroker() as broker:
            with pytest.raises(ZeroDivisionError):
                async with broker.client() as client:
                    broker.push(push(1, "m1"))
                    await next_push(client)
                    1 / 0
            await broker.until(lambda: broker.closes)
            assert "shown" not in {frame["stage"] for frame in broker.all("client_ack")}
    run(story())


@pytest.mark.spec("CLIENT-17", "CLIENT-18")
def test_what_is_shown_out_of_turn_is_reported_by_id_and_the_rest_up_to_a_number():
    async def story():
        async with FakeBroker() as broker, broker.client(auto_shown=False) as client:
            broker.push(*(push(n, f"m{n}") for n in (1, 2, 3)))
            m1, m2, m3 = [await next_push(client) for _ in range(3)]
            await broker.until(lambda: broker.all("client_ack"))
            broker.frames.clear()
            client.shown(m3)
            client.shown(m3, "m1")
            await broker.until(lambda: len(broker.frames) == 2)
            client.shown(m2)
            await broker.until(lambda: len(broker.frames) == 3)
            assert broker.frames == [
                {"type": "client_ack", "upTo": 1, "stage": "shown"},
                {"type": "client_ack", "brokerMessageId": "m3", "stage": "shown"},
                {"type": "client_ack", "upTo": 3, "stage": "shown"}]
    run(story())


@pytest.mark.spec("CLIENT-18")
def test_what_is_shown_while_offline_is_reported_when_the_broker_repeats_it():
    async def story():
        async with FakeBroker() as broker, broker.client(auto_shown=False) as client:
            broker.push(push(1, "m1"))
            await next_push(client)
            await broker.keep_out(client)
            client.shown("m1")
            broker.refuse = None
            await client.opened()
            broker.push(push(1, "m1"))
            await broker.until(lambda: {"type": "client_ack", "upTo": 1, "stage": "shown"} in broker.frames)
            assert client.take() == []
    run(story())


@pytest.mark.spec("CLIENT-17")
def test_a_broker_that_does_not_honour_client_ack_gets_none():
    async def story():
        async with FakeBroker() as broker:
            broker.capabilities.remove("client_ack")
            async with broker.client() as client:
                frame = push(1, "m1")
                del frame["seq"]
                broker.push(frame)
                client.shown(await next_push(client))
                await client.request("set_stats", stats={})
                assert broker.all("client_ack") == []
    run(story())


@pytest.mark.spec("CLIENT-19")
def test_a_program_that_does_not_keep_up_stops_the_reading_but_not_the_answers(monkeypatch):
    monkeypatch.setattr(claudemesh, "QUEUE_LIMIT", 10)

    async def story():
        async with FakeBroker() as broker, broker.client(auto_shown=False) as client:
            broker.push(*(push(n, f"m{n}") for n in range(1, 11)))
            await broker.until(lambda: broker.all("client_ack"))
            broker.answers["mesh_info"] = lambda frame: []
            with pytest.raises(MeshError):  # while somebody waits for an answer there is reading
                broker.push(push(11, "m11"))
                await client.request("mesh_info", timeout=0.05)
            await broker.until(lambda: broker.all("client_ack")[-1]["upTo"] == 11)
            broker.push(push(12, "m12"))  # the read that was under way still takes what comes first
            await broker.until(lambda: broker.all("client_ack")[-1]["upTo"] == 12)
            broker.push(push(13, "m13"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await broker.until(lambda: broker.all("client_ack")[-1]["upTo"] == 13)
            assert [p.id for p in client.take()] == [f"m{n}" for n in range(1, 13)]
            assert (await next_push(client)).id == "m13"
    run(story())


@pytest.mark.spec("CLIENT-22")
def test_the_counters_are_reported_from_time_to_time(monkeypatch):
    monkeypatch.setattr(claudemesh, "STATS_EVERY", 0.0)
    monkeypatch.setattr(claudemesh, "PING_EVERY", 0.02)

    async def story():
        async with FakeBroker() as broker, broker.client() as client:
            broker.push(push(1, "m1"))
            await next_push(client)
            await client.send(BOB.public, "x")
            client.stats["toolCalls"] += 2
            await broker.until(lambda: broker.all("set_stats") and broker.all("set_stats")[-1]["stats"] == {
                "messagesIn": 1, "messagesOut": 1, "toolCalls": 2, "errors": 0, "uptime": 0})
    run(story())


# --- With the broker of this repository -----------------------------------------------------------


async def aside(call: Callable, *arguments: Any, **options: Any) -> Any:
    """A blocking call, off the loop that runs the broker."""
    return await asyncio.to_thread(call, *arguments, **options)


class Town:
    """A broker with the mesh `harbor`, created by Alice; Bob is a member too. Each has a config directory."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path, self.settings = path, {"data": path / "data", "port": 0, "log": lambda record: None, **settings}

    async def __aenter__(self) -> Town:
        self.broker = await self.open()
        await aside(claudemesh.create_mesh, "harbor", "The Harbor", self.broker.url, display_name="alice",
                    dir=self.path / "alice")
        await self.join("bob")
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.broker.stop()

    async def open(self) -> Broker:
        broker = Broker(**self.settings)
        await broker.start()
        return broker

    async def restart(self) -> None:
        self.settings["port"] = int(self.broker.url.rsplit(":", 1)[1].split("/")[0])
        await self.broker.stop()
        self.broker = await self.open()

    async def join(self, name: str) -> dict:
        link = await aside(claudemesh.make_invite, "harbor", dir=self.path / "alice")
        return await aside(claudemesh.join_mesh, link, name, dir=self.path / name)

    def client(self, name: str, **options: Any) -> MeshClient:
        return MeshClient.from_config("harbor", self.path / name, name=name, **options)

    async def states(self, client: MeshClient, id: str, *wanted: str) -> None:
        """Wait until the recipients of a message are in these states."""
        async with asyncio.timeout(LIMIT):
            while True:
                status = await client.request("message_status", messageId=id)
                if tuple(recipient["state"] for recipient in status["recipients"]) == wanted:
                    return


async def next_message(client: MeshClient) -> claudemesh.Push:
    while (push := await next_push(client)).kind in ("system", "state"):
        pass
    return push


@pytest.mark.spec("INV-22", "INV-23", "INV-24", "INV-25", "INV-26", "CLIENT-4")
def test_create_invite_join_list_revoke(tmp_path):
    async def story():
        async with Town(tmp_path) as town:
            alice, bob = tmp_path / "alice", tmp_path / "bob"
            link = await aside(claudemesh.make_invite, "harbor", max_uses=1, dir=alice)
            await aside(claudemesh.join_mesh, link, "carol", dir=tmp_path / "carol")
            with pytest.raises(MeshError) as exhausted:
                await aside(claudemesh.join_mesh, link, "dave", dir=tmp_path / "dave")
            assert exhausted.value.code == "invite_exhausted"
            again = await aside(claudemesh.join_mesh, link, "carol", dir=tmp_path / "carol")
            assert again["alreadyMember"] is True
            invites = await aside(claudemesh.list_invites, "harbor", alice)
            assert [(i["role"], i["usedCount"], i["maxUses"]) for i in invites] == [
                ("admin", 1, 1), ("member", 1, 1), ("member", 1, 1)]
            with pytest.raises(MeshError) as forbidden:
                await aside(claudemesh.list_invites, "harbor", bob)
            assert forbidden.value.code == "forbidden"
            async with town.client("bob") as client:
                members = {m["displayName"]: m for m in await aside(claudemesh.list_members, "harbor", bob)}
                assert {name: m["permission"] for name, m in members.items()} == {
                    "alice": "admin", "bob": "member", "carol": "member"}
                await aside(claudemesh.revoke_member, "harbor", members["bob"]["id"], alice)
                async with asyncio.timeout(LIMIT):
                    assert [p.event async for p in client if p.kind != "system"] == []
                assert client.error.code == "revoked"
            with pytest.raises(MeshError) as unauthorized:
                await town.client("bob").start()
            assert unauthorized.value.code == "unauthorized"
    run(story())


@pytest.mark.spec("CLIENT-12", "CLIENT-14", "CLIENT-17", "CLIENT-18")
def test_a_direct_message_is_delivered_and_then_shown(tmp_path):
    async def story():
        async with Town(tmp_path) as town, town.client("alice") as alice, town.client("bob") as bob:
            sent = await alice.send((await alice.resolve("BOB"))["pubkey"], "the tide is in")
            assert sent["encrypted"] is True and sent["recipients"] == {"online": 1, "held": 0}
            got = await next_message(bob)
            assert (got.text, got.secured, got.addressed, got.sender_name, got.sender, got.own) == (
                "the tide is in", "session", "direct", "alice", alice.key, False)
            await town.states(alice, sent["messageId"], "delivered")
            bob.shown(got)
            await town.states(alice, sent["messageId"], "shown")
            with pytest.raises(MeshError) as nobody:
                await alice.send(CAROL.public, "?")
            assert nobody.value.code == "no_such_recipient" and nobody.value.frame["type"] == "error"
    run(story())


@pytest.mark.spec("CLIENT-13", "CLIENT-14", "CLIENT-15")
def test_a_group_message_is_sealed_for_those_present_and_those_away(tmp_path):
    async def story():
        async with Town(tmp_path) as town, town.client("alice") as alice:
            await town.join("carol")
            async with town.client("bob", groups=["crew"], session_id="b1") as bob:
                async with town.client("carol", groups=["crew"], session_id="c1"):
                    pass  # and gone again: her next session will get it
                sent = await alice.send("@crew", "all hands")
                assert sent["encrypted"] is True and sent["recipients"] == {"online": 1, "held": 1}
                got = await next_message(bob)
                assert (got.text, got.secured, got.addressed, got.target) == ("all hands", "sealed", "group", "@crew")
            async with town.client("carol", session_id="c2") as carol:
                got = await next_message(carol)
                assert (got.text, got.secured) == ("all hands", "sealed")
    run(story())


@pytest.mark.spec("CLIENT-6", "CLIENT-8", "CLIENT-16")
def test_a_restart_of_the_broker_loses_and_doubles_nothing(tmp_path):
    async def story():
        async with Town(tmp_path) as town, town.client("alice") as alice, town.client("bob", session_id="b") as bob:
            await bob.set_summary("at the pier")
            await bob.join_group("crew", "lead")
            await alice.send(bob.key, "one")
            first = await next_message(bob)  # delivered, not yet shown: the broker will push it again
            await town.states(alice, first.id, "delivered")
            await town.restart()
            sent = await alice.send(bob.key, "two", timeout=LIMIT)
            assert (await next_message(bob)).text == "two"
            await town.states(alice, first.id, "shown")
            bob.shown(sent["messageId"])
            await town.states(alice, sent["messageId"], "shown")
            [me] = [p for p in await alice.peers() if p["pubkey"] == bob.key]
            assert me["summary"] == "at the pier" and me["groups"] == [{"name": "crew", "role": "lead"}]
    run(story())


@pytest.mark.spec("CONF-7", "CLIENT-4")
def test_a_resumed_session_reads_what_was_queued_for_it_and_supersedes_the_old_one(tmp_path):
    async def story():
        async with Town(tmp_path) as town, town.client("alice") as alice:
            async with town.client("bob", session_id="b") as bob:
                key = bob.key
            sent = await alice.send(key, "for later")
            assert sent["recipients"] == {"online": 0, "held": 1}
            async with town.client("bob", session_id="b") as bob:
                assert bob.key == key and (await next_message(bob)).text == "for later"
                async with town.client("bob", session_id="b"):
                    async with asyncio.timeout(LIMIT):
                        assert [p async for p in bob if p.kind == "message"] == []
                    assert bob.error.code == "superseded"
    run(story())


@pytest.mark.spec("CLIENT-21", "CLIENT-14")
def test_a_quiet_client_is_no_peer_and_can_empty_the_members_inbox(tmp_path):
    async def story():
        async with Town(tmp_path) as town, town.client("alice") as alice:
            [bob_member] = [m for m in await aside(claudemesh.list_members, "harbor", tmp_path / "alice")
                            if m["displayName"] == "bob"]
            sent = await alice.send(bob_member["pubkey"], "to the member")
            async with town.client("bob", quiet=True, inbox=True) as bob:
                got = await next_message(bob)
                assert (got.text, got.secured, got.addressed) == ("to the member", "member", "direct")
                assert [p["displayName"] for p in await alice.peers()] == ["alice"]
                bob.shown(got)
                await town.states(alice, sent["messageId"], "shown")
                answer = await bob.send(alice.key, "thanks")
                assert answer["encrypted"] is True
            got = await next_message(alice)
            assert (got.text, got.secured, got.sender) == ("thanks", "session", bob_member["pubkey"])
    run(story())
