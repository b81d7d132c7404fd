"""A small world for stories: a real broker on a real port with a real store, and raw peers to talk to it.

    @story
    async def test_something(world):
        ana = await world.peer("ana")
        ...

Time is the world's: `world.pass_seconds(90)` moves both clocks of the broker and runs its one timer, so no
test sleeps. A peer speaks frames, not the client API; what it expects it waits for, with a limit.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import inspect
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import wire
from broker import Broker

LIMIT = 5.0  # seconds to wait for anything that must come
ALL = ("client_ack", "session_proof", "target")


def story(test: Any = None, **settings: Any) -> Any:
    """Runs an async test with a `world` in a fresh directory; other fixtures are passed on.

    `@story(watch_allow_private=True)` gives its broker settings.
    """
    if test is None:
        return functools.partial(story, **settings)

    @functools.wraps(test)
    def run(tmp_path: Path, **fixtures: Any) -> None:
        async def tell() -> None:
            async with World(tmp_path, **settings) as world:
                await test(world, **fixtures)

        asyncio.run(tell())

    parameters = [p for name, p in inspect.signature(test).parameters.items() if name != "world"]
    tmp = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([tmp, *parameters])  # type: ignore[attr-defined]
    return run


def certificate(folder: Path, host: str) -> tuple[str, str]:
    """Files with a self-signed certificate for `host`, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificate, is not here")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}",
                    "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


class World:
    """A broker with one mesh, `mesh`, owned by `owner`."""

    def __init__(self, data: Path, **settings: Any) -> None:
        self.data, self.settings = data, settings
        self.skipped = 0.0
        self.said_hello = 0
        self.log: list[dict[str, Any]] = []
        self.owner = wire.KeyPair.generate()
        self.keys: dict[str, tuple[wire.KeyPair, str]] = {}
        self.peers: list[Peer] = []

    async def __aenter__(self) -> World:
        await self.start()
        self.mesh = self.broker.create_mesh("den", "Den", self.owner.public)
        self.broker.end_turn()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts the broker; again after `stop`, on the same directory."""
        self.broker = Broker(
            data=self.data, port=0, clock=lambda: int((time.time() + self.skipped) * 1000),
            monotonic=lambda: time.monotonic() + self.skipped, log=self.log.append, **self.settings)
        await self.broker.start()

    async def stop(self) -> None:
        """Stops the broker in order, and drops the peers."""
        for peer in self.peers:
            peer.conn.abort()
        await asyncio.sleep(0)
        await self.broker.stop()

    async def restart(self) -> None:
        """Stops and starts; peers have to come again."""
        await self.stop()
        await self.start()
        self.mesh = self.broker.find_mesh(self.mesh.id)

    def pass_seconds(self, seconds: float, silent: tuple[Peer, ...] = ()) -> None:
        """Lets time pass, and the broker notice; all but the `silent` peers have answered its pings."""
        self.skipped += seconds
        quiet = {peer.key for peer in silent}
        for link in self.mesh.links:
            if link.peer.key not in quiet:
                link.heard = self.broker.monotonic()
        self.broker.tick()

    def member(self, name: str, role: str = "member", groups: tuple[dict[str, str], ...] = ()) -> tuple[wire.KeyPair, str]:
        """The key pair and id of a member, enrolled at first use."""
        if name not in self.keys:
            pair = wire.KeyPair.generate()
            member = self.mesh.store.add_member(pair.public, name, role, self.broker.clock(), groups=groups)
            self.mesh.enrolled(member)
            self.mesh.store.commit()
            self.keys[name] = (pair, member.id)
        return self.keys[name]

    async def dial(self) -> Peer:
        """A connection that has said nothing yet."""
        peer = Peer(self, await wire.connect(self.broker.url))
        self.peers.append(peer)
        return peer

    async def peer(self, name: str, capabilities: tuple[str, ...] | None = ALL, session: wire.KeyPair | None | str = "new",
                   **hello: Any) -> Peer:
        """A connection of the member `name` that has been greeted; `session` None speaks as the member key."""
        peer = await self.dial()
        peer.session = wire.KeyPair.generate() if session == "new" else session
        peer.pair, _ = self.member(name)
        peer.conn.send(json.dumps(self.hello(name, peer.session, capabilities, **hello)))
        peer.greeting = await peer.expect("hello_ack")
        return peer

    def hello(self, name: str, session: wire.KeyPair | None = None, capabilities: tuple[str, ...] | None = ALL,
              **fields: Any) -> dict[str, Any]:
        """A hello frame as a right client builds it; `fields` overwrite."""
        pair, member = self.member(name)
        now = self.said_hello = max(self.broker.clock(), self.said_hello + 1)  # else the signature repeats
        frame: dict[str, Any] = {
            "type": "hello", "meshId": self.mesh.id, "memberId": member, "pubkey": pair.public, "timestamp": now,
            "sessionId": f"{name}-session", "pid": 100, "cwd": f"/home/{name}"}
        frame["signature"] = wire.sign(wire.hello_text(self.mesh.id, member, pair.public, now), pair.secret)
        if capabilities is not None:
            frame["capabilities"] = list(capabilities)
        if session is not None:
            frame["sessionPubkey"] = session.public
            if capabilities is not None and "session_proof" in capabilities:
                text = wire.session_text(self.mesh.id, pair.public, session.public, now)
                frame["sessionSignature"] = wire.sign(text, session.secret)
        return frame | fields

    def invite(self, *, uses: int = 1, expires_in: int = 3600, role: str = "member", preset: dict[str, Any] | None = None,
               **changes: Any) -> tuple[str, dict[str, Any]]:
        """A registered invite: its token and payload."""
        payload = wire.sign_invite({
            "v": 1, "mesh_id": self.mesh.id, "mesh_slug": "den", "broker_url": self.broker.url, "mesh_root_key": "unused",
            "expires_at": self.broker.clock() // 1000 + expires_in, "role": role, "owner_pubkey": self.owner.public} | changes,
            self.owner.secret)
        token = wire.invite_token(payload)
        self.mesh.store.add_invite(token, role=role, max_uses=uses, expires_at=payload["expires_at"] * 1000,
                                   preset=preset or {}, created_by=None, now=self.broker.clock())
        self.mesh.store.commit()
        return token, payload

    async def http(self, method: str, target: str, body: Any = None, *, sign: wire.KeyPair | None = None,
                   headers: dict[str, str] | None = None, raw: bytes | None = None) -> tuple[int, Any]:
        """One HTTP request: status, and the JSON or text of the answer."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        fields = dict(headers or {})
        if sign is not None:
            now = self.broker.clock()
            fields |= {"X-Mesh-Key": sign.public, "X-Mesh-Time": str(now), "X-Mesh-Signature": wire.sign(
                wire.http_text(method, target, data, now, sign.public), sign.secret)} | fields
        return await asyncio.to_thread(self._request, method, target, data, fields)

    def _request(self, method: str, target: str, data: bytes, fields: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(wire.http_base(self.broker.url).removeprefix("http://"), timeout=LIMIT)
        try:
            connection.request(method, target, data, fields)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        self.answered = answer
        return answer.status, json.loads(text) if text.startswith("{") else text


class Peer:
    """One end of a connection to the broker, frame by frame."""

    def __init__(self, world: World, conn: wire.Connection) -> None:
        self.world, self.conn = world, conn
        self.session: wire.KeyPair | None = None
        self.pair: wire.KeyPair
        self.greeting: dict[str, Any] = {}
        self.waiting: list[dict[str, Any]] = []
        self.requests = 0

    @property
    def key(self) -> str:
        """The routing key."""
        return self.session.public if self.session else self.pair.public

    def say(self, **frame: Any) -> None:
        """Sends a frame and waits for nothing."""
        self.conn.send(json.dumps(frame))

    async def next(self) -> dict[str, Any]:
        """The next frame; `{"closed": code, "reason": text}` at the end."""
        while not self.waiting:
            messages = await asyncio.wait_for(self.conn.receive(), LIMIT)
            if messages is None:
                return {"closed": self.conn.ws.close_code, "reason": self.conn.ws.close_reason}
            self.waiting += [json.loads(message) for message in messages]
        return self.waiting.pop(0)

    async def expect(self, type: str, **fields: Any) -> dict[str, Any]:
        """The next frame, which has this type and these fields."""
        frame = await self.next()
        assert frame.get("type") == type, frame
        assert {name: frame.get(name) for name in fields} == fields, frame
        return frame

    async def request(self, type: str, **fields: Any) -> dict[str, Any]:
        """Sends a request and returns its answer; frames that come before it stay for `next`."""
        self.requests += 1
        self.say(type=type, _reqId=f"r{self.requests}", **fields)
        return await self.answer(lambda frame: frame.get("_reqId") == f"r{self.requests}")

    async def send(self, target: str, text: str = "hello", priority: str = "next", **fields: Any) -> dict[str, Any]:
        """Sends a message with a plain body; the ack or error."""
        self.requests += 1
        nonce, ciphertext = wire.plain_body(text)
        frame = {"type": "send", "id": f"s{self.requests}", "targetSpec": target, "priority": priority, "nonce": nonce,
                 "ciphertext": ciphertext} | fields
        self.conn.send(json.dumps(frame))
        return await self.answer(lambda answer: answer.get("id") == frame["id"] and answer["type"] in ("ack", "error"))

    async def answer(self, wanted: Any) -> dict[str, Any]:
        """The first frame that is `wanted`; others stay for `next`."""
        kept: list[dict[str, Any]] = []
        while True:
            frame = await self.next()
            if "closed" in frame or wanted(frame):
                self.waiting[:0] = kept
                return frame
            kept.append(frame)

    async def push(self) -> dict[str, Any]:
        """The next push that is a message, not a notice of the broker."""
        return await self._take(lambda f: f.get("type") == "push" and f.get("subtype") != "system")

    async def event(self, name: str) -> dict[str, Any]:
        """The next system push of that name: its data."""
        frame = await self._take(lambda f: f.get("type") == "push" and f.get("subtype") == "system")
        assert frame["event"] == name, frame
        return frame["eventData"]

    async def _take(self, wanted: Any) -> dict[str, Any]:
        return await self.answer(wanted)

    async def text(self) -> str:
        """The plain text of the next message."""
        frame = await self.push()
        return wire.read_plain(frame["ciphertext"])

    async def silence(self) -> list[dict[str, Any]]:
        """What has arrived and nobody took: a request goes around, so anything sent before it is here."""
        await self.request("get_state", key="nothing")
        waiting, self.waiting = self.waiting, []
        return waiting

    async def settle(self, message: dict[str, Any], stage: str = "delivered") -> None:
        """Acknowledges a push, and waits until the broker has taken it in."""
        answer = await self.request("client_ack", brokerMessageId=message["messageId"], stage=stage)
        assert answer["type"] == "ack", answer

    async def fate(self, message_id: str) -> list[str]:
        """The states of a message's recipients, by key."""
        status = await self.request("message_status", messageId=message_id)
        return [recipient["state"] for recipient in status["recipients"]]

    async def leave(self) -> None:
        """Closes in order."""
        await self.conn.close()

    async def drop(self) -> None:
        """Breaks the connection, and waits until the broker has noticed."""
        link = next(link for link in self.world.mesh.links if link.peer and link.peer.key == self.key)
        self.conn.abort()
        async with asyncio.timeout(LIMIT):
            while not link.closed:
                await asyncio.sleep(0.001)
