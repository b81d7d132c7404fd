"""The hub: who may do what, who receives what, and when.

This module decides. `wire` says which bytes and messages are legal, `store` keeps what must survive;
here are presence, routing, delivery and the HTTP routes. It knows nothing of the client's files or of MCP.

Theory of operation. One asyncio task reads each socket in bulk and hands every frame, in order and to
completion, to one handler out of `HANDLERS`. A handler checks first, writes to the mesh's open
transaction, and says what it has to say: frames are collected per link, not written. At the end of the
loop turn `Broker._end_turn` commits each mesh that changed and only then writes, one `write` a socket.
So an `ack` means durable, a crash loses only what nobody was told, and under load many frames share one
fsync (SPEC TURN-1).

Delivery has one row per recipient, and one function, `drain`, through which everything passes that can
make a row deliverable: hello, a more permissive status, a new send, the redelivery timer, room in the
window of a slow reader. Rows stay `queued` in the store until the recipient's client acknowledges them.

A mesh is a directory; `Mesh` keeps its roster in memory and its `Store` open. A `Peer` is a presence: it
outlives its socket by a grace. A `Link` is one socket. One timer (`Broker.tick`) does all that is periodic or due.

Sections: 1 settings and tables, 2 metrics, limits, log, 3 pushes and links, 4 peers and meshes,
5 delivery, 6 the turn, 7 life of a connection, 8 handlers: delivery, 9 handlers: presence,
10 handlers: state, audit, info, 11 handlers: memory, context, tasks, 12 handlers: streams, skills,
13 handlers: vectors and SQL, 14 schedules and clock, 15 watches, 16 webhooks, 17 handlers: files,
18 HTTP routes, 19 HTTP routes: files, 20 start, tick, stop, 21 command line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import errno
import functools
import hashlib
import hmac
import importlib
import ipaddress
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from json.encoder import encode_basestring as quote
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote as percent
from urllib.parse import urldefrag, urljoin

import cron
import store as storage
import wire
from store import Member, Pending, Saved, Store
from wire import CloseCode, HttpError, ProtocolError, Refused, UsageError, encode, hex_key, iso

# --- 1. Settings and tables -----------------------------------------------------------------------

VERSION = "0.1.0"  #: the protocol revision `/health` reports (SPEC HTTP-21)
PORT = 7900

HELLO_SECONDS = 10.0  #: an accepted socket says hello within this time
HELLO_BYTES = 64 * 1024  #: a frame before hello, and hello
MAX_UNAUTHENTICATED = 256  #: sockets that have not said hello, HTTP among them, over all meshes
REPLAY_SECONDS = 120  #: accepted hello and HTTP signatures are remembered this long
PING_SECONDS = 30.0
SILENCE_SECONDS = 75.0  #: nothing heard for this long ends a connection
GRACE_SECONDS = 90.0  #: a dropped presence waits this long for its session
TICK_SECONDS = 1.0
REDELIVER_SECONDS = 30.0  #: a push without an acknowledgement is repeated
RETENTION_SECONDS = 60.0  #: between two retention passes over a mesh
PENDING_HOOK_MS = 10_000
HOOK_FRESH_MS = 30_000
STATUS_TTL_MS = 60_000
TASK_LEASE_SECONDS = 900  #: a claimer gone for longer loses the task
MESSAGE_TTL_MS = 7 * 24 * 3600 * 1000  # DELIV-17
HELD_PER_MEMBER = 200
WINDOW = 512  #: pushes a client may leave unacknowledged before the rest waits in the store
UNSHOWN_KEPT = 1000  #: delivered but unshown messages that go back to the queue with the connection
DRAIN_BATCH = 128
TURN_FRAMES = 128  #: a turn ends at the latest with so many frames
OUTBOX_SOFT = 1024 * 1024  #: bytes; past it stored messages wait and the link's own requests are not read
OUTBOX_HARD = 8 * 1024 * 1024  #: bytes; past it the socket is closed with 1013
CHECKPOINT_COMMITS = 64  #: a log that is written over again costs half of one that grows
AUDIT_PAGE = (50, 200)  #: default and largest page of audit_query
MAX_OFFSET = 2**53  #: beyond it a JSON number is no exact integer
SCHEDULED_PER_MEMBER = 10_000
SCHEDULE_MAX_MS = 100 * 365 * 24 * 3600 * 1000  #: no message is scheduled for later than that
SCHEDULED_LIST_CHARS = 512 * 1024  #: texts in one scheduled_list, which has to fit into a frame
FIRE_BATCH = 256  #: scheduled messages sent in one turn
CLOCK_SPEEDS = (1, 100)
SIM_TICK_MS = 60_000  #: simulated time of a tick, and its real time at speed 1
WATCHES_PER_MEMBER, WEBHOOKS_PER_MESH = 20, 100
WATCH_INTERVAL = (5.0, 30.0, 86_400.0)  #: seconds: least, default, most
WATCH_BYTES = 1024 * 1024  #: of an answer that is looked at
WATCH_SECONDS, RESOLVE_SECONDS = 10.0, 5.0  #: for one check; for looking up the host when a watch is set
WATCH_REDIRECTS = 3
FETCHES, FETCHES_PER_MEMBER = 64, 4  #: checks that run at once
WATCH_HEADER_CHARS = 4096
VALUE_CHARS = 1000  #: a longer value is kept as its beginning and a digest
WEBHOOK_RATE = (60, 60.0)  #: posts per webhook, and the seconds over which they refill

#: Which priorities a status lets through (SPEC DELIV-4). Order within is acceptance order.
GATE = {"idle": ("now", "next", "low"), "working": ("now",), "dnd": ("now",)}
#: Who writes a status, by rank (SPEC STAT-1).
STATUS_RANK = {"hook": 3, "manual": 2, "jsonl": 1}
HOOK_STATUSES = ("idle", "working")  #: dnd is a person's decision
HELD_PRIORITIES = ("now", "next")
DELIVERED_STATES = ("delivered", "shown")
FATAL_HELLO = CloseCode.POLICY_VIOLATION
SUPERSEDED, REVOKED = 4000, 4001
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
STAT_NAMES = ("messagesIn", "messagesOut", "toolCalls", "errors")

SKILL_NAME = re.compile(r"\w[\w.-]{0,63}")  #: of any script; needs no escape in a command or a path (SPEC SKILL-2)

TAGS = (32, 64)
#: Longest text, in characters, of the fields that end up in rosters and lists; of a list, how many texts and how
#: long each (SPEC MSG-9).
LENGTHS: dict[str, dict[str, Any]] = {
    "hello": {"displayName": 128, "sessionId": 256, "cwd": 4096, "hostname": 256, "channel": 64, "model": 128},
    "send": {"targetSpec": 256, "id": 128, "client_message_id": 128, "nonce": 64},
    "set_summary": {"summary": 2048},
    "set_profile": {"avatar": 2048, "title": 256, "bio": 2048},
    "join_group": {"name": 64, "role": 64},
    "set_state": {"key": 256},
    "get_state": {"key": 256},
    "remember": {"content": 16_384, "tags": TAGS},
    "recall": {"query": 512},
    "share_context": {"summary": 4096, "filesRead": (128, 512), "keyFindings": (64, 1024), "tags": TAGS},
    "get_context": {"query": 512},
    "create_task": {"title": 1024, "assignee": 128, "priority": 32, "tags": TAGS},
    "complete_task": {"result": 16_384},
    "create_stream": {"name": 128},
    "share_skill": {"description": 2048, "instructions": 256 * 1024, "tags": TAGS},
    "list_skills": {"query": 256},
    "list_files": {"query": 256},
    "grant_file_access": {"sealedKey": 256},
    "peer_file_request": {"filePath": 4096},
    "peer_dir_request": {"dirPath": 4096, "pattern": 256},
    "vector_store": {"collection": 128, "text": 8192},
    "vector_search": {"collection": 128, "query": 1024},
    "vector_delete": {"collection": 128, "id": 64},
    "mesh_query": {"sql": 256 * 1024},
    "mesh_execute": {"sql": 256 * 1024},
    "schedule": {"to": 256, "message": 64 * 1024},
    "watch": {"url": 2048, "extract": 256, "notify_on": 1024, "label": 128},
}
NO_LENGTHS: dict[str, Any] = {}
STATE_VALUE_BYTES = STREAM_DATA_BYTES = 256 * 1024
STATE_TOTAL_BYTES = 1_500_000  #: all keys and values of a mesh, so that `state_list` fits into one message
PROFILE_BYTES, MANIFEST_BYTES = 8 * 1024, 16 * 1024
REPLY_CHARACTERS = wire.MAX_MESSAGE_BYTES // 2  #: of an answer; a character has two bytes on the average at most
PUSH_OVERHEAD = 4096  #: what a push adds to nonce and ciphertext: ids, keys, names, target
#: Texts that say something: neither empty nor blank (SPEC MSG-13).
FILLED = {
    "set_state": ("key",), "remember": ("content",), "recall": ("query",), "share_context": ("summary",),
    "get_context": ("query",), "create_task": ("title",), "share_skill": ("description", "instructions"),
    "vector_store": ("collection",),
}
MAX_GROUPS = 64
MAX_SUBSCRIPTIONS = 256  #: of one connection
MOST = {"memory": 10_000, "stream": 1000, "skill": 1000}  #: in one mesh (SPEC MSG-15)
FOUND = 20  #: entries a search answers at most
LISTED = 100  #: entries a list of tasks or contexts answers at most
PAGE_BYTES = 1_000_000  #: of JSON in a list; less than an answer may have
VECTOR_METADATA_BYTES = 16 * 1024
VECTOR_RESULTS = (10, 100)  #: default and largest number of texts vector_search finds
VECTOR_ANSWER_BYTES = 768 * 1024  #: what does not fit is left out, the least similar first (VEC-7)
EMBED_BATCH = 64  #: texts an embedder is given at once
READERS = 2  #: searches and queries of one mesh that run at the same time
AT_WORK = 128  #: requests of one mesh that run in threads or wait for one


MAX_FILE_BYTES = 52_428_800  # FILE-3
FILE_QUOTA_BYTES = 1024 * 1024 * 1024
MAX_FILES = 10_000  #: in a mesh
MAX_FILE_KEYS = 1000  #: peers for whom the key of one file is sealed
DISK_THREADS = 4  #: that read and write the content of files
MAX_TRANSFERS = 64  #: uploads and downloads under way, over all meshes
TRANSFER_CHUNK = 128 * 1024  #: bytes
TRANSFER_RATE = 32 * 1024  #: bytes a second; who is slower than that is not waited for (FILE-3)
LINGER_SECONDS = 0.05  #: between two looks whether a slow reader has taken the last of a download
TOKEN_MS = 120_000  #: how long a download address is good
MAX_RELAYS = 4  #: questions to other peers about their files that one connection may have open
RELAY_SECONDS = 15.0
RELAY_CHARACTERS = (1024 * 1024 + 2) // 3 * 4  #: 1 MiB in base64
RELAY_ENTRIES = 500
RELAY_ERROR = 500  #: characters


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may set. Times are in the unit their name says."""

    data: Path
    host: str = "127.0.0.1"
    port: int = PORT
    public_url: str = ""  #: the ws:// or wss:// address put into answers; default: where it listens
    tls_cert: str = ""
    tls_key: str = ""
    synchronous: str = "FULL"
    max_message: int = wire.MAX_MESSAGE_BYTES
    max_connections: int = 100  #: per mesh
    hook_rate: int = 30  #: status hooks per minute and (pid, cwd)
    send_rate: int = 0  #: sends per second and connection, 0 = unlimited
    status_ttl: int = STATUS_TTL_MS
    task_lease: int = TASK_LEASE_SECONDS
    watch_allow_private: bool = False  #: watches may look at addresses that are not public
    admin_token: str = ""  #: lets its bearer create meshes from elsewhere than loopback
    max_file: int = MAX_FILE_BYTES
    file_quota: int = FILE_QUOTA_BYTES  #: of all files of a mesh
    legacy_http: bool = False  #: takes uploads that nobody signed, as stock clients send them
    embedder: str = ""  #: module:function that vector_search asks, from a list of texts to lists of floats

    def check(self) -> None:
        """Raises `UsageError` for settings that make no sense."""
        if self.public_url:
            wire.http_base(self.public_url)
        wrong = {
            "a TLS key needs a TLS certificate": self.tls_key and not self.tls_cert,
            "the port is a number from 0 to 65535": not 0 <= self.port <= 65535,
            "a mesh has room for one connection at least": self.max_connections < 1,
            f"a message may have from 65536 to {wire.MAX_MESSAGE_BYTES} bytes: clients read no more":
                not 65536 <= self.max_message <= wire.MAX_MESSAGE_BYTES,
            "a file may have one byte at least, and the quota is not smaller": not 0 < self.max_file <= self.file_quota,
            "a rate is not negative": self.send_rate < 0 or self.hook_rate < 1,
            "a lease is not negative": self.task_lease < 0,
            f"{self.data} is not a directory": self.data.exists() and not self.data.is_dir(),
        }
        for sentence, so in wrong.items():
            if so:
                raise UsageError(sentence)


# --- 2. Metrics, limits, log ----------------------------------------------------------------------

#: name: (type, label or "", help). Names and types are upstream's, but for deliveries and commits (SPEC OPS-2).
METRICS = {
    "broker_connections_total": ("counter", "", "Accepted WebSockets, before hello."),
    "broker_connections_rejected_total": ("counter", "reason", "Refused hellos."),
    "broker_connections_active": ("gauge", "", "Authenticated connections."),
    "broker_messages_routed_total": ("counter", "priority", "Accepted messages."),
    "broker_messages_rejected_total": ("counter", "reason", "Frames that were not accepted."),
    "broker_deliveries_total": ("counter", "stage", "Acknowledged deliveries."),
    "broker_queue_depth": ("gauge", "", "Deliveries that wait for their recipient."),
    "broker_commits_total": ("counter", "", "Transactions committed."),
    "broker_ttl_sweeps_total": ("counter", "", "Presences whose working status ran out."),
    "broker_hook_requests_total": ("counter", "", "Status hooks."),
    "broker_hook_requests_rate_limited_total": ("counter", "", "Status hooks refused by the rate limit."),
    "broker_db_healthy": ("gauge", "", "1 while the last commit succeeded."),
}


class Metrics:
    """Counters and gauges, printed as Prometheus text 0.0.4 (SPEC OPS-2)."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, int]] = {name: {} for name in METRICS}

    def add(self, name: str, label: str = "", amount: int = 1) -> None:
        """Counts `amount` under `label`, the value of the metric's one label."""
        series = self.values[name]
        series[label] = series.get(label, 0) + amount

    def set(self, name: str, value: int) -> None:
        """Sets a gauge."""
        self.values[name][""] = value

    def text(self) -> str:
        """The exposition text; a series nobody touched prints 0."""
        lines = []
        for name, (kind, label, about) in METRICS.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for value, count in sorted(self.values[name].items()) or [("", 0)]:
                lines.append(f"{name}{{{label}={json.dumps(value)}}} {count}" if value else f"{name} {count}")
        return "\n".join(lines) + "\n"


class Buckets:
    """Token buckets by key: `capacity` at once, refilled continuously over `seconds` (SPEC OPS-5)."""

    LIMIT = 10_000  #: keys are the caller's choice, so their number is bounded

    def __init__(self, capacity: float, seconds: float) -> None:
        self.capacity, self.rate = capacity, capacity / seconds
        self.buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str, now: float) -> bool:
        """Whether `key` may pass at `now` (seconds)."""
        tokens, at = self.buckets.pop(key, (self.capacity, now))
        tokens = min(self.capacity, tokens + (now - at) * self.rate)
        if len(self.buckets) >= self.LIMIT:
            del self.buckets[next(iter(self.buckets))]  # the one least recently asked for
        self.buckets[key] = (tokens - (tokens >= 1), now)
        return tokens >= 1


class Recent:
    """Signatures seen within `REPLAY_SECONDS`, so that none is accepted twice (SPEC HELLO-5, HTTP-24)."""

    LIMIT = 100_000  #: anybody with a key can sign HTTP requests

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def add(self, signature: str, now: float) -> bool:
        """Remembers `signature`; False if it was seen before."""
        while self.seen and (next(iter(self.seen.values())) < now - REPLAY_SECONDS or len(self.seen) >= self.LIMIT):
            del self.seen[next(iter(self.seen))]
        signature = signature.lower()
        return signature not in self.seen and self.seen.setdefault(signature, now) == now


def log_to_stderr(record: dict[str, Any]) -> None:
    """The default log of the command: one JSON object a line (SPEC OPS-3). A log that nobody takes stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(encode(record) + "\n")


# --- 3. Pushes and links --------------------------------------------------------------------------


class Envelope:
    """One push, encoded once for all who get it; `seq` is None for what is not stored. `base` is its text
    without the closing brace: each link adds what is its own."""

    __slots__ = ("seq", "id", "priority", "base", "_row", "_more")

    def __init__(self, seq: int | None, id: str, priority: str, base: str, row: Pending | None = None) -> None:
        self.seq, self.id, self.priority, self.base = seq, id, priority, base
        self._row, self._more = row, None if row else ""

    @property
    def more(self) -> str:
        """The fields for clients that offered `target`, encoded when the first of them gets the push."""
        if self._more is None:
            row = self._row
            self._more = (f',"target":{quote(row.target)},"senderName":{quote(row.sender_name)},'
                          f'"senderMemberPubkey":"{row.sender_pubkey}"')
        return self._more


def stored_push(mesh_id: str, row: Pending) -> Envelope:
    """The push of an accepted message (SPEC DELIV-14). Written out: an encoder costs five times as much."""
    if row.subtype in NOTICES:
        return _stored_notice(mesh_id, row)
    subtype = f',"subtype":{quote(row.subtype)}' if row.subtype else ""
    return Envelope(row.seq, row.id, row.priority, (
        f'{{"type":"push","messageId":"{row.id}","meshId":"{mesh_id}","senderPubkey":"{row.sender_key}",'
        f'"priority":"{row.priority}","nonce":{quote(row.nonce)},"ciphertext":{quote(row.ciphertext)},'
        f'"createdAt":"{iso(row.created_at)}"{subtype}'), row)


#: Subtypes of stored messages in which no member speaks. They keep the event as sender_name and its data,
#: as JSON, for a body; whether the body is sent as well is the value here: stock clients show a webhook by it.
NOTICES = {"webhook": True, "system": False}


def _stored_notice(mesh_id: str, row: Pending) -> Envelope:
    """The push of a webhook's post or a triggered watch (SPEC HOOK-3, WATCH-8)."""
    body = row.ciphertext if NOTICES[row.subtype] else ""
    return Envelope(row.seq, row.id, row.priority, (
        f'{{"type":"push","messageId":"{row.id}","meshId":"{mesh_id}","senderPubkey":{quote(row.sender_key)},'
        f'"priority":"{row.priority}","nonce":"","ciphertext":"{body}","createdAt":"{iso(row.created_at)}",'
        f'"subtype":"{row.subtype}","event":{quote(row.sender_name)},'
        f'"eventData":{base64.b64decode(row.ciphertext).decode()}'))


def system_push(mesh_id: str, id: str, event: str, data: dict[str, Any], now: int) -> Envelope:
    """A notification by the broker itself: not stored, not gated (SPEC PRES-8)."""
    frame = {"type": "push", "messageId": id, "meshId": mesh_id, "senderPubkey": "system", "priority": "low", "nonce": "",
             "ciphertext": "", "createdAt": iso(now), "subtype": "system", "event": event, "eventData": data}
    return Envelope(None, id, "low", encode(frame)[:-1])


def random_tails(random: Callable[[int], bytes]) -> Iterator[str]:
    """Endless random texts of 20 hex digits; the source is asked once for a hundred of them."""
    while True:
        pool = random(1000).hex()
        yield from (pool[at:at + 20] for at in range(0, 2000, 20))


class Flight(NamedTuple):
    """A stored push on its way: the row it settles, its message, and when it was written (seconds)."""

    seq: int
    recipient: str
    id: str
    at: float


class Link:
    """One socket: what is to be written to it, and what it has not acknowledged yet."""

    __slots__ = ("hub", "conn", "task", "opened", "heard", "pinged", "mesh", "peer", "out", "out_bytes",
                 "speaking", "fresh", "pushed", "inflight", "unshown", "by_id", "written", "acks",
                 "shows_target", "hears_events", "streams", "resuming", "aside", "host", "closed", "closing", "sent", "acked")

    def __init__(self, hub: Broker, conn: wire.Connection, task: asyncio.Task[Any], now: float, host: str = "") -> None:
        self.hub, self.conn, self.task = hub, conn, task
        self.host = host  #: the broker's address as this client knows it
        self.opened = self.heard = self.pinged = now
        self.mesh: Mesh | None = None
        self.peer: Peer | None = None
        self.out: list[bytes] = []
        self.out_bytes = 0
        self.speaking = False  #: in the hub's list of links to write at the end of the turn
        self.fresh: list[int] = []  #: the turn's pushes, to be forgotten if it cannot be committed
        self.pushed = 0  #: pushes so far, the `seq` of the newest
        self.inflight: dict[int, Flight] = {}  #: by `seq`, not acknowledged
        self.unshown: dict[int, Flight] = {}  #: by `seq`, acknowledged as delivered but not as shown
        self.by_id: dict[str, int] = {}
        self.written: list[tuple[int, str]] = []  #: rows final once the socket has taken them
        self.acks = self.shows_target = self.hears_events = False
        self.streams: set[str] = set()  #: subscribed to; they end with the connection
        self.resuming: asyncio.Task[None] | None = None
        self.aside = asyncio.Lock()  #: held by the one request that is at work in a thread
        self.closed = False  #: nothing that arrives is handled any more
        self.closing: tuple[int, str] | None = None  #: the close frame that ends this turn's writing
        self.sent = 0  #: how many of `written` were written in earlier turns
        self.acked = now  #: when the last acknowledgement came

    def say(self, text: str) -> None:
        """Puts one frame into the outbox of this turn."""
        frame = self.conn.ws.text(text.encode())
        self.out.append(frame)
        self.out_bytes += len(frame)
        if not self.speaking:
            self.hub.speak(self)

    def unsay(self) -> None:
        """Takes back what this turn has said: it was not committed."""
        self.out.clear()
        self.out_bytes = 0
        for seq in self.fresh:
            flight = self.inflight.pop(seq, None)
            if flight is not None:
                self.by_id.pop(flight.id, None)
        self.fresh.clear()
        del self.written[self.sent:]
        if self.closing is not None:
            self.closed, self.closing = False, None

    def reply(self, frame: dict[str, Any], type: str, **fields: Any) -> None:
        """Answers `frame`, with its `_reqId` if it has one (SPEC MSG-8). Raises `Refused` for what no client reads."""
        answer = {"type": type, **fields}
        request = frame.get("_reqId")
        if request and isinstance(request, str):
            answer["_reqId"] = request
        text = encode(answer)
        if len(text) > REPLY_CHARACTERS:
            raise Refused("too_large", f"{type}: the answer is longer than a message may be")  # MSG-12
        self.say(text)

    def done(self, frame: dict[str, Any], **fields: Any) -> None:
        """Acknowledges a request that upstream leaves unanswered, if it asks by a `_reqId` (SPEC MSG-8)."""
        request = frame.get("_reqId")
        if request and isinstance(request, str):
            self.say(encode({"type": "ack", "id": request, "messageId": "", "queued": False, **fields, "_reqId": request}))

    def push(self, envelope: Envelope, recipient: str = "", sealed_key: str | None = None) -> None:
        """Sends a push; a stored one stays in flight until it is acknowledged (SPEC DELIV-8)."""
        self.pushed += 1
        text = envelope.base
        if self.shows_target:
            text += envelope.more
        if sealed_key is not None:
            text += f',"sealedKey":{encode(sealed_key)}'
        if self.acks:
            text += f',"seq":{self.pushed}'
        self.say(text + "}")
        if envelope.seq is None:
            return
        if self.acks:
            self.inflight[self.pushed] = Flight(envelope.seq, recipient, envelope.id, self.hub.now)
            self.by_id[envelope.id] = self.pushed
            self.fresh.append(self.pushed)
        else:
            self.written.append((envelope.seq, recipient))

    @property
    def room(self) -> bool:
        """Whether another stored message may be written (SPEC DELIV-12)."""
        return len(self.inflight) < WINDOW and self.out_bytes + self.conn.buffered < OUTBOX_SOFT

    def land(self, seqs: Iterable[int], stage: str) -> list[Flight]:
        """Takes the pushes `seqs` out of flight for `stage`; the rows to settle."""
        landed = []
        for seq in seqs:
            flight = self.inflight.pop(seq, None)
            if stage == "delivered":
                if flight is not None:
                    self.unshown[seq] = flight
            else:
                flight = flight or self.unshown.pop(seq, None)
                if flight is not None and self.by_id.get(flight.id) == seq:
                    del self.by_id[flight.id]
            if flight is not None:
                landed.append(flight)
        return landed


# --- 4. Peers and meshes --------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Peer:
    """A presence: one session of a member, connected (`link`) or within its grace (`left_at`, seconds)."""

    key: str  #: routing key: the session key, else the member key (PRES-1)
    member: Member
    presence_id: str
    connected_at: int
    session_id: str = ""
    name: str = ""
    quiet: bool = False
    sealable: bool = False  #: its client opens sealed multicast bodies
    link: Link | None = None
    left_at: float = 0.0
    status: str = "idle"  # PRES-2
    source: str = "jsonl"
    status_at: int = 0
    summary: str | None = None
    groups: dict[str, str | None] = field(default_factory=dict)
    visible: bool = True
    profile: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    saved_stats: dict[str, Any] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)  #: pid, cwd, hostname, peerType, channel, model
    backlog: bool = True  #: the store may hold queued rows that are not in flight

    def group_list(self) -> list[dict[str, str]]:
        """The groups in the form frames carry."""
        return [{"name": name, "role": role} if role else {"name": name} for name, role in self.groups.items()]

    def take_groups(self, groups: Iterable[dict[str, Any]]) -> None:
        """Replaces the groups."""
        self.groups = {group["name"]: group.get("role") or None for group in list(groups)[:MAX_GROUPS]}

    def restore(self, saved: Saved) -> None:
        """Takes back what was saved (SPEC PRES-10)."""
        self.visible, self.profile, self.summary = saved.visible, dict(saved.profile), saved.summary
        self.take_groups(saved.groups)

    def write_status(self, status: str, source: str, now: int) -> bool:
        """The write rule (SPEC STAT-2); whether more priorities pass than before.

        The value is always taken; its attribution stays with a higher-ranked source that said the
        same within the fresh window.
        """
        fresh = now - self.status_at <= HOOK_FRESH_MS
        if status != self.status or STATUS_RANK[source] >= STATUS_RANK[self.source] or not fresh:
            self.source = source
        wider = len(GATE[status]) > len(GATE[self.status])
        self.status, self.status_at = status, now
        return wider

    def saved(self, now: int) -> Saved:
        """What the next session of this member finds again (SPEC PRES-10)."""
        stats = {name: max(self.saved_stats.get(name, 0), self.stats.get(name, 0)) for name in STAT_NAMES}
        return Saved(self.group_list(), self.profile, self.visible, self.summary, self.name, stats, now)


class Recipient(NamedTuple):
    """One recipient fixed at acceptance: the key its row is under, the presence if there is one, and the
    member key for which the row is held when that presence is gone."""

    key: str
    peer: Peer | None
    held_for: str | None


class Relay(NamedTuple):
    """A question of one peer about another's files, until it is answered (SPEC RELAY-1)."""

    link: Link
    frame: dict[str, Any]
    asked: Link
    until: float


def check_group(name: str) -> str:
    """`name`, which can be a group's (SPEC GROUP-1). Raises `Refused`."""
    if not name.strip() or name == "all" or name.startswith("@") or not name.isprintable():  # @all is everyone
        raise Refused("invalid_name", f"not a group name: {name[:64]!r}")
    if len(name) > LENGTHS["join_group"]["name"]:
        raise Refused("too_large", "a group name is longer than 64 characters")
    return name


def in_group(target: str, group: str) -> bool:
    """Whether `@target` reaches a member of `group`: itself or one above it (SPEC GROUP-3)."""
    return group == target or group.startswith(target + "/")


FAR = float("inf")


@dataclass(slots=True)
class SimClock:
    """A mesh's simulated time. Ticks are counted from the moment it last began to run, so they do not drift."""

    started_at: int  #: ms
    speed: float = 1.0
    tick: int = 0
    paused: bool = False
    anchor: float = 0.0  #: seconds, monotonic: when it last began to run
    beats: int = 0  #: ticks since then

    def run(self, now: float) -> None:
        """Begins to run at `now`; the first tick is one interval away (SPEC CLOCK-3)."""
        self.anchor, self.beats = now, 0

    @property
    def due(self) -> float:
        """When the next tick is due, in seconds."""
        return FAR if self.paused else self.anchor + (self.beats + 1) * SIM_TICK_MS / 1000 / self.speed  # CLOCK-4

    def reading(self) -> dict[str, Any]:
        """What `clock_status` says."""
        return {"speed": self.speed, "paused": self.paused, "tick": self.tick,
                "simTime": iso(self.started_at + self.tick * SIM_TICK_MS), "startedAt": iso(self.started_at)}


@dataclass(eq=False, slots=True)
class Watching:
    """A watch and how it is going."""

    row: storage.Watch
    due: float = 0.0  #: seconds, monotonic
    busy: bool = False
    error: str = ""  #: why the last check saw nothing


class Mesh:
    """One mesh: its store, its members, and who is present."""

    def __init__(self, store: Store) -> None:
        row = store.mesh()
        self.store, self.id, self.slug, self.row = store, row.id, row.slug, row
        self.members: dict[str, Member] = {}
        self.by_pubkey: dict[str, Member] = {}
        for member in store.members():
            self.enrolled(member)
        self.saved = store.newest_states()
        self.peers: dict[str, Peer] = {}  #: by routing key, in the order of arrival
        self.undo: list[Callable[[], object]] = []  #: what takes back this turn's changes to the roster
        self.inboxes: dict[str, Peer] = {}  #: quiet connections that take what is queued for a member key
        self.links: set[Link] = set()
        self.settled: list[tuple[str, list[tuple[int, str]]]] = []  #: states and rows, noted but not written
        self.writing: list[tuple[str, list[tuple[int, str]]]] = []  #: written, but not committed
        self.due_at: float = store.next_due() or FAR  #: ms; no scheduled message is due before
        self.sim: SimClock | None = None
        self.watches = {watch.id: Watching(watch) for watch in store.watches()}
        self.pruned_at = 0.0
        self.unmoved = 0  #: commits since the last checkpoint
        self.verifying = False  #: an audit verification is under way
        self.arriving = 0  #: bytes of the uploads under way, which the quota counts too
        self.relays: dict[str, Relay] = {}  #: questions to peers about their files, by the id they were forwarded with
        self.tables = storage.sql_tables(store.directory)  #: of the members' own database
        self.readers, self.writer = asyncio.Semaphore(READERS), asyncio.Lock()  #: of `sql.db`, and of searches
        self.at_work = 0

    def enrolled(self, member: Member) -> None:
        """Takes a member into the roster."""
        self.members[member.id] = self.by_pubkey[member.pubkey] = member

    def revoked(self, member: Member) -> None:
        """Drops a member from the roster."""
        self.members.pop(member.id, None)
        self.by_pubkey.pop(member.pubkey, None)

    def recall(self) -> None:
        """Brings memory back to what the store says, after a turn that was undone (SPEC TURN-2)."""
        self.settled[:0], self.writing = self.writing, []
        for step in reversed(self.undo):
            step()
        self.undo.clear()
        self.saved = self.store.newest_states()
        for peer in self.peers.values():
            saved = self.store.load_state(peer.member.id, peer.session_id)
            if saved is not None:
                peer.restore(saved)
            peer.backlog = True

    def sessions(self, member: Member) -> list[Peer]:
        """The presences of one member."""
        return [peer for peer in self.peers.values() if peer.member.id == member.id]

    def is_here(self, key: str) -> bool:
        """Whether a session key, or any session of a member key, is connected right now."""
        member = self.by_pubkey.get(key)
        peers = self.sessions(member) if member is not None else filter(None, [self.peers.get(key)])
        return any(peer.link is not None for peer in peers)

    def save(self, peer: Peer, now: int) -> None:
        """Keeps a peer's saved state; a quiet peer leaves it alone (SPEC PRES-10)."""
        if not peer.quiet:
            self.saved[peer.member.id] = saved = peer.saved(now)
            self.store.save_state(peer.member.id, peer.session_id, saved, now)

    def saved_groups(self, member: Member) -> list[str]:
        """The groups that decide whether an absent member gets a held row."""
        saved = self.saved.get(member.id)
        return [group["name"] for group in (saved.groups if saved else member.groups)]

    # Routing (SPEC DELIV-5). Recipients are fixed here, once, when the message is accepted.

    def route(self, sender: Peer | None, target: str, priority: str) -> list[Recipient]:
        """The recipients of `target`; empty if it matches nobody. Without a `sender` no session is left out."""
        key = hex_key(target)
        if key is not None:
            return self._direct(key)
        if target in ("*", "@all"):
            return self._multicast(sender, priority, lambda groups: True)
        if target.startswith("@") and len(target) > 1:
            name = target[1:]
            return self._multicast(sender, priority, lambda groups: any(in_group(name, g) for g in groups))
        return []  # names, tags and channels are resolved by clients, never here

    def _direct(self, key: str) -> list[Recipient]:
        member = self.by_pubkey.get(key)
        if member is not None:
            sessions = [Recipient(peer.key, peer, key) for peer in self.sessions(member)]
            return sessions or [Recipient(key, self.inboxes.get(key), None)]
        return [Recipient(key, self.peers.get(key), None)] if self.owner(key) else []

    def owner(self, key: str) -> Member | None:
        """The member whose member key or session key that is."""
        if key in self.by_pubkey:
            return self.by_pubkey[key]
        if key in self.peers:
            return self.peers[key].member
        remembered = self.store.session_owner(key)
        return self.members.get(remembered.member_id) if remembered is not None else None

    def everybody(self, priority: str) -> list[Recipient]:
        """Every presence, hidden ones too, and every absent member: whom the mesh itself speaks to."""
        return self._multicast(None, priority, lambda groups: True, hidden=True)

    def _multicast(self, sender: Peer | None, priority: str, wanted: Callable[[Iterable[str]], bool],
                   hidden: bool = False) -> list[Recipient]:
        found = [Recipient(peer.key, peer, peer.member.pubkey) for peer in self.peers.values()
                 if (peer.visible or hidden) and peer is not sender and wanted(peer.groups)]
        if priority not in HELD_PRIORITIES:
            return found
        present = {peer.member.id for peer in self.peers.values()} | ({sender.member.id} if sender else set())
        return found + [Recipient(member.pubkey, self.inboxes.get(member.pubkey), None) for member in self.members.values()
                        if member.id not in present and wanted(self.saved_groups(member))]

    # Settling: acknowledgements ride in the next commit; they are not worth an fsync of their own.

    def settle(self, rows: Iterable[tuple[int, str]], state: str) -> None:
        """Notes rows as settled; written with the next commit, or before anything reads them."""
        if self.settled and self.settled[-1][0] == state:
            self.settled[-1][1].extend(rows)
        else:
            self.settled.append((state, list(rows)))

    def write_settled(self, now: int) -> None:
        """Writes the noted rows into the open transaction."""
        if self.settled:
            settled, self.settled = self.settled, []
            self.writing += settled
            for state, rows in settled:
                self.store.settle(rows, state, now)

    def commit(self, now: int) -> bool:
        """Commits what is open; whether there was anything. Raises `sqlite3.Error`."""
        self.write_settled(now)
        changed = self.store.changed
        self.store.commit()
        self.undo.clear()
        self.writing.clear()
        if not changed:
            return False
        self.unmoved += 1
        if self.unmoved >= CHECKPOINT_COMMITS:
            self.checkpoint()
        return True

    def checkpoint(self) -> None:
        """Moves the write-ahead log into the database, so that the next commit begins it anew."""
        self.unmoved = 0
        self.store.checkpoint()


# --- 5. Delivery ----------------------------------------------------------------------------------


def drain(hub: Broker, mesh: Mesh, peer: Peer, fresh: Envelope | None = None, sealed_key: str | None = None) -> None:
    """Pushes to `peer` whatever is deliverable now (SPEC DELIV-3).

    `fresh` is a message accepted this instant; it goes out without a look into the store when nothing
    older waits, its priority passes and the window has room. Everything else is read from the store in
    acceptance order.
    """
    link = peer.link
    if link is None or link.closed:
        peer.backlog = True
        return
    admitted = GATE[peer.status]
    if fresh is not None:
        if not peer.backlog and fresh.priority in admitted and link.room:
            link.push(fresh, peer.key, sealed_key)
            return
        peer.backlog = True
    if peer.backlog:
        _drain_store(hub, mesh, peer, link, admitted)


def _drain_store(hub: Broker, mesh: Mesh, peer: Peer, link: Link, admitted: tuple[str, ...]) -> None:
    now = hub.clock()
    mesh.write_settled(now)
    aloft = {flight.seq for flight in link.inflight.values()} | {seq for seq, _ in link.written}
    after = 0
    while link.room:
        rows = mesh.store.pending(peer.key, admitted, now, after, DRAIN_BATCH)
        for row in rows:
            if not link.room:
                break
            after = row.seq
            if row.seq not in aloft:
                link.push(stored_push(mesh.id, row), peer.key, row.sealed_key)
        else:
            if len(rows) < DRAIN_BATCH:
                peer.backlog = len(admitted) < len(GATE["idle"])  # what the gate holds back stays
                return
    hub.when_room(link)


def refuse_unsealed(recipients: list[Recipient], sealed: dict[str, str]) -> None:
    """Raises `sealed_keys_missing` unless each recipient's key is there (SPEC DELIV-16)."""
    missing = [{"pubkey": r.key, "sealable": r.peer is None or r.peer.sealable} for r in recipients
               if not _is_sealed_key(sealed.get(r.key)) or r.peer is not None and not r.peer.sealable]
    if missing:
        raise Refused("sealed_keys_missing", f"{len(missing)} recipients cannot open this body", missing=missing)


def _is_sealed_key(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 256


# --- 6. The turn ----------------------------------------------------------------------------------


class Turn:
    """Commit, then speak (SPEC TURN-1): the part of the broker that ends each turn of the loop."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], int]

    def __init__(self) -> None:
        self.speaking: list[Link] = []
        self.asked: list[tuple[Link, dict[str, Any]]] = []  #: the turn's frames, refused if it cannot be committed
        self.changed: dict[str, Mesh] = {}
        self.sick: set[Mesh] = set()  #: meshes whose last turn could not be stored
        self.scheduled = False

    def speak(self, link: Link) -> None:
        """Has `link` written at the end of this turn."""
        link.speaking = True
        self.speaking.append(link)
        self.schedule()

    def schedule(self) -> None:
        """Has the turn ended as soon as no further frame is at hand."""
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self._ripen, 0)

    def _ripen(self, before: int) -> None:
        """Looks once more for frames while they keep coming: a look costs a tenth of the commit it may save."""
        frames = len(self.asked)
        if before < frames < TURN_FRAMES:
            self.loop.call_soon(self._ripen, frames)
        elif self.scheduled:
            self.end_turn()

    def end_turn(self) -> None:
        """Commits every mesh that changed, then writes what was said."""
        self.scheduled = False
        changed, self.changed = self.changed, {}
        for mesh in changed.values():
            self._commit(mesh)
        self.asked.clear()
        speaking, self.speaking = self.speaking, []
        for link in speaking:
            self._write(link)

    def _commit(self, mesh: Mesh) -> None:
        try:
            if mesh.commit(self.clock()):
                self.metrics.add("broker_commits_total")
                self.sick.discard(mesh)
        except sqlite3.Error as error:
            self.fail_turn(mesh, "storage_error", f"not stored: {error}")

    def fail_turn(self, mesh: Mesh, code: str, message: str) -> None:
        """Undoes the turn of one mesh: nothing was told to anybody yet, so nothing is lost (TURN-2)."""
        self.log("error", "turn undone", mesh=mesh.slug, code=code, reason=message)
        self.sick.add(mesh)
        mesh.store.rollback()
        for link in [link for link in self.speaking if link.mesh is mesh]:
            link.unsay()
        mesh.recall()
        mesh.due_at = self.clock() + 1000 * TICK_SECONDS  # what it sent was not sent: look again then
        asked, self.asked = self.asked, []
        for link, frame in asked:
            if link.mesh is mesh or frame.get("meshId") == mesh.id:
                self.refuse(link, frame, Refused(code, message))
            else:
                self.asked.append((link, frame))

    def _write(self, link: Link) -> None:
        link.speaking = False
        if link.fresh:
            link.fresh.clear()
        if link.out:
            data, link.out, link.out_bytes = b"".join(link.out), [], 0
            link.conn.write(data)
        link.sent = len(link.written)
        if link.closing is not None:
            link.conn.begin_close(*link.closing)
        elif link.conn.buffered > OUTBOX_HARD:  # OPS-6: frames that are not stored cannot wait without bound
            link.closed = True
            link.conn.begin_close(CloseCode.TRY_AGAIN_LATER, "slow reader")
        elif link.written:
            self.settle_written(link)

    def settle_written(self, link: Link) -> None:
        """A client without `client_ack` has received what an open socket has taken (SPEC DELIV-2)."""
        if link.conn.alive and not link.conn.buffered:
            link.mesh.settle(link.written, "final")
            self.metrics.add("broker_deliveries_total", "written", len(link.written))
            link.written, link.sent = [], 0


# --- 7. Life of a connection ----------------------------------------------------------------------


def admit(hub: Broker, hello: dict[str, Any]) -> tuple[Mesh, Member, str, bool]:
    """The checks of hello in their order (SPEC HELLO-1 to HELLO-9): the mesh, the member, the routing key,
    and whether the session key was proven. Raises `Refused`."""
    mesh = hub.find_mesh(hello.get("meshId"))
    known = hex_key(hello.get("sessionPubkey") or hello.get("pubkey")) if mesh is not None else None
    if mesh is not None and len(mesh.links) >= hub.settings.max_connections and known not in mesh.peers:
        raise Refused("capacity", "the mesh has no room for another connection")  # HELLO-1
    code = wire.verify_hello(hello, hub.clock())
    if code is not None:
        raise Refused(code, wire.ERRORS[code])  # HELLO-2, HELLO-3, HELLO-4
    if hello["signature"].lower() in hub.hellos.seen:
        raise Refused("replayed", wire.ERRORS["replayed"])  # HELLO-5
    pubkey = hex_key(hello["pubkey"])
    member = mesh.by_pubkey.get(pubkey) if mesh is not None and mesh.row.archived_at is None else None
    if member is None:
        raise Refused("unauthorized", wire.ERRORS["unauthorized"])  # HELLO-6
    wire.check(hello)  # HELLO-3: the remaining fields
    check_texts(hello)
    for group in hello.get("groups") or ():
        check_group(group["name"])
    key, proven = _session_key(mesh, member, hello)
    if not hub.hellos.add(hello["signature"], hub.monotonic()):
        raise AssertionError("looked up above, and frames are handled one at a time")
    return mesh, member, key, proven


def _session_key(mesh: Mesh, member: Member, hello: dict[str, Any]) -> tuple[str, bool]:
    """The routing key a hello may use, and whether it proved to hold it (SPEC HELLO-7, HELLO-8)."""
    session = hello.get("sessionPubkey")
    if session is None or session.lower() == member.pubkey:
        return member.pubkey, True
    key = hex_key(session)
    if key is None:
        raise Refused("malformed", "hello.sessionPubkey: expected 64 hex digits")
    proof = hello.get("sessionSignature")
    text = wire.session_text(hello["meshId"], hello["pubkey"], session, hello["timestamp"])
    if proof is not None and not wire.verify(text, proof, key):
        raise Refused("bad_session_key", "the session proof does not verify")  # HELLO-7
    owner = mesh.store.session_owner(key)
    foreign = owner is not None and owner.member_id != member.id
    claimed = owner is not None and owner.proven
    # HELLO-8: a proven key needs a proof by its member; an unproven one is not taken over without one
    if key in mesh.by_pubkey or foreign and (claimed or proof is None) or claimed and proof is None:
        raise Refused("bad_session_key", wire.ERRORS["bad_session_key"])
    return key, proof is not None


def on_hello(hub: Broker, link: Link, hello: dict[str, Any]) -> None:
    """hello: authenticates the link and makes, or takes up again, a presence (SPEC HELLO)."""
    mesh, member, key, proven = admit(hub, hello)
    now = hub.clock()
    offered = [c for c in hello.get("capabilities") or () if c in wire.CAPABILITIES]  # HELLO-14
    saved = mesh.store.load_state(member.id, hello.get("sessionId") or "")
    earlier = None if "quiet" in offered else _earlier(hub, mesh, member, key)
    peer = earlier or _new_peer(hub, member, key, hello, saved, now)
    _describe(peer, hello, offered)
    if not peer.quiet:
        _enter(hub, mesh, peer)
    _attach(hub, mesh, peer, link, offered)
    if not peer.quiet:
        _keep(mesh, peer, proven, now)
    elif "inbox" in offered and key == member.pubkey:
        _open_inbox(hub, mesh, peer)
    if earlier is None and not peer.quiet:
        mesh.store.audit("peer_joined", member.id, peer.name,
                         {"pubkey": key, "groups": peer.group_list(), "restored": saved is not None}, now)
    link.say(encode(_hello_ack(mesh, peer, hello, saved, offered)))
    peer.backlog = True
    if takes_mail(mesh, peer):
        drain(hub, mesh, peer)  # HELLO-10: hello_ack, then what waited, then the announcement
    if earlier is None:
        announce_arrival(hub, mesh, peer, saved)
    hub.log("info", "hello", mesh=mesh.slug, peer=peer.name, key=key[:12], resumed=earlier is not None)


def _earlier(hub: Broker, mesh: Mesh, member: Member, key: str) -> Peer | None:
    """The presence that this session takes up again, if there is one (SPEC PRES-3, PRES-5)."""
    peer = mesh.peers.get(key)
    if peer is None or peer.member.id == member.id:
        return peer
    if peer.link is not None:  # HELLO-8: who claimed the key without a proof loses it to who proved it
        hub.close_link(peer.link, SUPERSEDED, "superseded")
        peer.link = None
    end_presence(hub, mesh, peer)
    return None


def _new_peer(hub: Broker, member: Member, key: str, hello: dict[str, Any], saved: Saved | None, now: int) -> Peer:
    peer = Peer(key, member, hub.new_id(), now, status_at=now)
    if saved is not None:
        peer.restore(saved)
        peer.saved_stats = dict(saved.stats)
    if not peer.groups:
        peer.take_groups(member.groups)
    stash = hub.take_pending_hook(hello, now)
    if stash is not None:
        peer.write_status(stash, "hook", now)  # STAT-5
    if hello.get("status"):
        peer.write_status(hello["status"], "manual", now)  # STAT-7
    return peer


def _describe(peer: Peer, hello: dict[str, Any], offered: list[str]) -> None:
    """Takes over what this connection says of itself; a resumed session may run elsewhere now."""
    peer.name, peer.session_id = hello.get("displayName") or peer.member.name, hello.get("sessionId") or ""
    peer.quiet, peer.sealable = "quiet" in offered, "sealed_multicast" in offered
    peer.where = {"pid": int(hello.get("pid") or 0), "cwd": hello.get("cwd") or ""}
    peer.where |= {name: hello[name] for name in ("hostname", "peerType", "channel", "model") if hello.get(name)}
    if hello.get("groups"):
        peer.take_groups(hello["groups"])


def _attach(hub: Broker, mesh: Mesh, peer: Peer, link: Link, offered: list[str]) -> None:
    """Makes `link` the presence's one socket; an older one is superseded (SPEC PRES-3)."""
    if not peer.quiet:
        _requeue(hub, mesh, peer)
    older, peer.link = peer.link, link
    if older is not None:
        hub.close_link(older, SUPERSEDED, "superseded")
    link.mesh, link.peer = mesh, peer
    link.conn.ws.limit(hub.settings.max_message)
    mesh.undo.append(lambda: _detach_again(mesh, peer, link, older))
    hub.touch(mesh)
    link.acks, link.shows_target = "client_ack" in offered, "target" in offered
    link.hears_events = "events" in offered
    mesh.links.add(link)
    hub.waiting.discard(link)
    hub.strangers.discard(link.task)


def _detach_again(mesh: Mesh, peer: Peer, link: Link, older: Link | None) -> None:
    """Takes `_attach` back."""
    mesh.links.discard(link)
    peer.link, link.mesh, link.peer = older, None, None


def _enter(hub: Broker, mesh: Mesh, peer: Peer) -> None:
    """Puts a presence into the roster, whose size is bounded by ending the one that was dropped first."""
    if peer.key in mesh.peers:
        return
    absent = [p for p in mesh.peers.values() if p.link is None]
    if absent and len(mesh.peers) >= 2 * hub.settings.max_connections:
        end_presence(hub, mesh, min(absent, key=lambda p: p.left_at))
    mesh.peers[peer.key] = peer
    mesh.undo.append(lambda: mesh.peers.pop(peer.key, None))


def _open_inbox(hub: Broker, mesh: Mesh, peer: Peer) -> None:
    """Makes a quiet connection the member's inbox, in place of an older one (SPEC PRES-15)."""
    older = mesh.inboxes.get(peer.key)
    if older is not None:
        hub.close_link(older.link, SUPERSEDED, "superseded")
    mesh.inboxes[peer.key] = peer


def _requeue(hub: Broker, mesh: Mesh, peer: Peer) -> None:
    """A connection is over: what it has not shown waits for the next one of this session (SPEC DELIV-9)."""
    mesh.write_settled(hub.clock())
    mesh.store.requeue_unshown(peer.key)
    peer.backlog = True


def _keep(mesh: Mesh, peer: Peer, proven: bool, now: int) -> None:
    """Remembers the session, and gives it what is held for its member (SPEC DELIV-6)."""
    mesh.save(peer, now)
    if peer.key != peer.member.pubkey:
        mesh.store.record_session(peer.key, peer.member.id, peer.session_id, proven=proven, sealed=peer.sealable, now=now)
        claim_held(mesh, peer)


def claim_held(mesh: Mesh, peer: Peer) -> None:
    """Moves what is queued for the member key to this session, unless somebody is present under that very key."""
    own = peer.member.pubkey
    if own not in mesh.peers and own not in mesh.inboxes:
        mesh.store.claim_held(own, peer.key)


def _hello_ack(mesh: Mesh, peer: Peer, hello: dict[str, Any], saved: Saved | None, offered: list[str]) -> dict[str, Any]:
    member = peer.member
    answer: dict[str, Any] = {
        "type": "hello_ack", "presenceId": peer.presence_id, "memberDisplayName": peer.name,
        "memberProfile": {"roleTag": member.role_tag, "groups": list(member.groups), "messageMode": member.message_mode},
        "meshPolicy": {"selfEditable": mesh.row.self_editable}, "services": []}
    if saved is not None:
        answer |= {"restored": True, "lastSeenAt": iso(saved.last_seen), "restoredStats": dict(saved.stats)}
        if saved.summary:
            answer["lastSummary"] = saved.summary
        if saved.groups and not hello.get("groups"):
            answer["restoredGroups"] = list(saved.groups)
    if "capabilities" in hello:
        answer["capabilities"] = offered
    return answer


def announce(hub: Broker, mesh: Mesh, peer: Peer, event: str, **data: Any) -> None:
    """Tells every other connection of the mesh, but the quiet ones, about `peer` (SPEC PRES-8)."""
    data = {"name": peer.name, "displayName": peer.name, "pubkey": peer.key, **data}
    push = system_push(mesh.id, hub.uuid(), event, data, hub.clock())
    for link in mesh.links:
        if link.peer is not peer and not link.peer.quiet:
            link.push(push)


def announce_arrival(hub: Broker, mesh: Mesh, peer: Peer, saved: Saved | None) -> None:
    """`peer_joined`, or `peer_returned` for a member seen before; hidden and quiet peers come unannounced."""
    if peer.quiet or not peer.visible:
        return
    if saved is None:
        announce(hub, mesh, peer, "peer_joined", groups=peer.group_list())
        return
    summary = {"summary": saved.summary} if saved.summary else {}
    announce(hub, mesh, peer, "peer_returned", groups=peer.group_list(), lastSeenAt=iso(saved.last_seen), **summary)


def detach(hub: Broker, link: Link) -> None:
    """The link is over: its presence ends, or waits for its session (SPEC PRES-4, PRES-5)."""
    hub.waiting.discard(link)
    link.closed = True
    mesh, peer = link.mesh, link.peer
    if mesh is None or peer is None or link not in mesh.links:
        return
    mesh.links.discard(link)
    forget_relays(mesh, link)
    if peer.link is not link:
        return  # superseded: the presence lives on another link
    leaves = link.conn.ws.close_received and link.conn.ws.close_code in (1000, 1001, 1005)
    peer.link, peer.left_at = None, -GRACE_SECONDS if leaves else hub.monotonic()
    if takes_mail(mesh, peer):
        _requeue(hub, mesh, peer)
    mesh.store.claimers_seen({peer.key, peer.member.pubkey}, hub.clock())  # TASK-3
    if peer.quiet or leaves:
        end_presence(hub, mesh, peer)
    hub.touch(mesh)


def takes_mail(mesh: Mesh, peer: Peer) -> bool:
    """Whether stored messages are pushed to this connection: not to a quiet one, unless it is an inbox."""
    return not peer.quiet or mesh.inboxes.get(peer.key) is peer  # PRES-14, PRES-15


def _record_leave(mesh: Mesh, peer: Peer, now: int) -> None:
    mesh.save(peer, now)
    mesh.store.touch_member(peer.member.id, now)
    mesh.store.audit("peer_left", peer.member.id, peer.name, {}, now)
    mesh.store.release_held(peer.key)


def end_presence(hub: Broker, mesh: Mesh, peer: Peer) -> None:
    """The session has left for good: saves it, releases what was held, tells the others (SPEC PRES-6)."""
    now = hub.clock()
    if peer.quiet:
        if mesh.inboxes.get(peer.key) is peer:
            del mesh.inboxes[peer.key]
        return
    if mesh.peers.get(peer.key) is not peer:
        return  # it has ended already
    del mesh.peers[peer.key]
    mesh.undo.append(lambda: mesh.peers.setdefault(peer.key, peer))  # the tick will end it again
    if mesh.sim is not None and not mesh.peers:
        mesh.sim.paused = True  # CLOCK-5
    _record_leave(mesh, peer, now)
    for other in mesh.sessions(peer.member):
        claim_held(mesh, other)
        other.backlog = True
        drain(hub, mesh, other)
    if peer.visible:
        announce(hub, mesh, peer, "peer_left")
    hub.touch(mesh)


# --- 8. Handlers: delivery ------------------------------------------------------------------------
# Each takes (hub, link, frame). The frame fits the table, the link is authenticated. Order within:
# check (raise Refused), store, reply, notify.


def check_texts(frame: dict[str, Any]) -> None:
    """Raises `too_large` for a text longer than its limit (SPEC MSG-9), `malformed` for a blank one (MSG-13)."""
    kind = frame["type"]
    for name, most in LENGTHS.get(kind, NO_LENGTHS).items():
        value = frame.get(name)
        if value is not None and not (type(value) is str and len(value) <= most):
            _check_length(f"{kind}.{name}", value, most)
    for name in FILLED.get(kind, ()):
        if not frame[name].strip():
            raise Refused("malformed", f"{kind}.{name}: empty")


def _check_length(where: str, value: str | list[str], most: Any) -> None:
    if isinstance(value, list):
        many, most = most
        if len(value) > many:
            raise Refused("too_large", f"{where}: more than {many} items")
    if any(len(text) > most for text in (value if isinstance(value, list) else [value])):
        raise Refused("too_large", f"{where}: longer than {most} characters")


def check_json(frame: dict[str, Any], name: str, value: Any, most: int) -> int:
    """The bytes of a JSON value. Raises `too_large` when they are more than `most` (SPEC MSG-9)."""
    size = len(encode(value).encode())
    if size > most:
        raise Refused("too_large", f"{frame['type']}.{name}: longer than {most} bytes")
    return size


def check_room(mesh: Mesh, table: str) -> None:
    """Raises `limit` when the mesh has as many rows in `table` as it may (SPEC MSG-15)."""
    if mesh.store.count(table) >= MOST[table]:
        raise Refused("limit", f"{table}: a mesh keeps {MOST[table]} at most")


def page(name: str, entries: list[dict[str, Any]], most: int | None = None) -> dict[str, Any]:
    """The fields of a list reply: the first `most` entries as far as they fit into a frame, and whether these are
    not all (SPEC MSG-14)."""
    kept: list[dict[str, Any]] = []
    size = 0
    for entry in entries[:most]:
        size += len(encode(entry).encode())
        if size > PAGE_BYTES:
            break
        kept.append(entry)
    return {name: kept} | ({"truncated": True} if len(kept) < len(entries) else {})


def on_send(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """send: accepts a message for everyone its target names, or says why not (SPEC DELIV-1)."""
    mesh, peer = link.mesh, link.peer
    target, priority = hex_key(frame["targetSpec"]) or frame["targetSpec"], frame.get("priority") or "next"
    client_id, sealed = frame.get("client_message_id") or None, frame.get("sealedKeys")
    digest = None
    if client_id is not None:
        digest = hashlib.sha256("\0".join((target, priority, frame["nonce"], frame["ciphertext"])).encode()).hexdigest()
        first = mesh.store.find_client_message(peer.member.id, client_id)
        if first is not None:  # DELIV-11, before the rate limit
            _repeat_ack(link, frame, first, digest)
            return
    if len(frame["ciphertext"].encode()) > wire.MAX_MESSAGE_BYTES - PUSH_OVERHEAD:
        raise Refused("too_large", "send.ciphertext: the push would be longer than a message may be")  # DELIV-18
    if hub.send_buckets is not None and not hub.send_buckets.take(peer.presence_id, hub.monotonic()):
        raise Refused("rate_limited", wire.ERRORS["rate_limited"])
    recipients = mesh.route(peer, target, priority)
    if not recipients:
        raise Refused("no_such_recipient", f"{target[:70]}: {wire.ERRORS['no_such_recipient']}")  # DELIV-7
    if sealed is not None:
        refuse_unsealed(recipients, sealed)
    now = hub.clock()
    online = _online(recipients)
    row = _accept(hub, mesh, peer, frame, target, priority, recipients, sealed or {}, digest, online, now)
    hub.metrics.add("broker_messages_routed_total", priority)
    _ack_send(link, frame, row.id, online, len(recipients) - online)
    hand_out(hub, mesh, row, recipients, sealed)


def hand_out(hub: Broker, mesh: Mesh, row: Pending, recipients: list[Recipient], sealed: dict[str, str] | None = None) -> None:
    """Gives a message accepted this instant to those of its recipients who are here."""
    push = stored_push(mesh.id, row)
    for recipient in recipients:
        if recipient.peer is not None:
            drain(hub, mesh, recipient.peer, push, sealed and sealed[recipient.key])


def post(hub: Broker, mesh: Mesh, sender: Peer, target: str, text: str, recipients: list[Recipient], subtype: str,
         priority: str = "now") -> tuple[int, int]:
    """Accepts a message that no frame has sent, in the open transaction; how many are online and held.

    The body is readable by the broker: base64 of `text`, with an empty nonce.
    """
    body = {"nonce": "", "ciphertext": base64.b64encode(text.encode()).decode()}
    online = _online(recipients)
    row = _accept(hub, mesh, sender, body, target, priority, recipients, {}, None, online, hub.clock(), subtype)
    hub.metrics.add("broker_messages_routed_total", priority)
    hand_out(hub, mesh, row, recipients)
    hub.touch(mesh)
    return online, len(recipients) - online


def _online(recipients: list[Recipient]) -> int:
    return sum(1 for r in recipients if r.peer is not None and r.peer.link is not None)


def _accept(hub: Broker, mesh: Mesh, sender: Peer, frame: dict[str, Any], target: str, priority: str, recipients: list[Recipient],
            sealed: dict[str, str], digest: str | None, online: int, now: int, subtype: str | None = None) -> Pending:
    """Stores a message, its deliveries and its audit entry in the open transaction (SPEC DELIV-1)."""
    store, id = mesh.store, hub.message_id(now)
    seq = store.accept(
        id=id, sender_member=sender.member.id, sender_key=sender.key, sender_name=sender.name, target=target,
        priority=priority, nonce=frame["nonce"], ciphertext=frame["ciphertext"], subtype=subtype,
        client_id=frame.get("client_message_id") or None, digest=digest, now=now, expires_at=now + MESSAGE_TTL_MS,
        online=online, held=len(recipients) - online)
    for key, peer, held_for in recipients:
        store.add_delivery(seq, key, None if sealed else held_for, sealed.get(key))  # a sealed one opens with that key only
        if key in mesh.by_pubkey and (peer is None or peer.quiet):
            store.trim_held(key, HELD_PER_MEMBER, now)  # DELIV-6
    store.audit("message_sent", sender.member.id, sender.name, {"priority": priority, "targetSpec": target}, now)
    return Pending(seq, id, sender.key, sender.name, sender.member.pubkey, target, priority, frame["nonce"],
                   frame["ciphertext"], subtype, now, None)


def _repeat_ack(link: Link, frame: dict[str, Any], first: storage.SentMessage, digest: str) -> None:
    """Answers a repeated send with its first result (SPEC DELIV-11)."""
    if first.digest != digest:
        raise Refused("id_conflict", wire.ERRORS["id_conflict"])
    _ack_send(link, frame, first.id, first.online, first.held)


def _ack_send(link: Link, frame: dict[str, Any], message: str, online: int, held: int) -> None:
    """The `ack` of a send, which says what will happen (SPEC DELIV-1)."""
    request = frame.get("_reqId")
    echo = f',"_reqId":{quote(request)}' if request and isinstance(request, str) else ""
    link.say(f'{{"type":"ack","id":{quote(frame.get("id") or "")},"messageId":"{message}","queued":true,'
             f'"recipients":{{"online":{online},"held":{held}}}{echo}}}')


def on_client_ack(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """client_ack: settles one push, or all up to a `seq` (SPEC DELIV-8)."""
    stage, up_to, message = frame.get("stage") or "delivered", frame.get("upTo"), frame.get("brokerMessageId")
    if not link.acks or (up_to is None) == (message is None):
        raise Refused("malformed", "client_ack: expected upTo or brokerMessageId, after offering client_ack")
    if message is not None:
        seqs = [link.by_id[message]] if message in link.by_id else []
    else:
        seqs = _up_to(link.inflight, up_to)
        if stage == "shown":
            seqs += [seq for seq in link.unshown if seq <= up_to]  # in the order of acknowledgement, so no early end
    link.acked = hub.now
    landed = link.land(seqs, stage)
    if landed:
        link.mesh.settle([(flight.seq, flight.recipient) for flight in landed], stage)
        hub.metrics.add("broker_deliveries_total", stage, len(landed))
        _forget_oldest_unshown(hub, link)
        if link.peer.backlog:
            drain(hub, link.mesh, link.peer)
    link.done(frame)


def _up_to(pool: dict[int, Flight], up_to: float) -> list[int]:
    seqs = []
    for seq in pool:  # in the order of pushing, so the first beyond ends it
        if seq > up_to:
            break
        seqs.append(seq)
    return seqs


def _forget_oldest_unshown(hub: Broker, link: Link) -> None:
    """Beyond the newest, a delivery that is never shown counts as final (SPEC DELIV-10)."""
    if len(link.unshown) < UNSHOWN_KEPT * 3 // 2:
        return
    oldest = list(link.unshown)[:len(link.unshown) - UNSHOWN_KEPT]
    for seq in oldest:
        link.by_id.pop(link.unshown.pop(seq).id, None)
    link.mesh.write_settled(hub.clock())
    link.mesh.store.finish_delivered(link.peer.key, min(f.seq for f in link.unshown.values()) - 1, hub.clock())
    hub.touch(link.mesh)


def on_message_status(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """message_status: what became of a message, recipient by recipient (SPEC DELIV-13)."""
    mesh, peer = link.mesh, link.peer
    mesh.write_settled(hub.clock())
    found = mesh.store.message_status(frame["messageId"])
    if found is None or not _may_ask(mesh, peer.member, *found):
        raise Refused("not_found", "no such message")
    message, deliveries = found
    recipients = [_recipient_status(mesh, message, delivery) for delivery in deliveries]
    done = bool(recipients) and all(r["state"] in DELIVERED_STATES for r in recipients)
    link.reply(frame, "message_status_result", messageId=message.id, targetSpec=message.target, delivered=done,
               deliveredAt=max(r["at"] for r in recipients) if done else None, recipients=recipients)


def _may_ask(mesh: Mesh, member: Member, message: storage.MessageRow, deliveries: list[storage.DeliveryRow]) -> bool:
    if message.sender_member == member.id or any(d.recipient == member.pubkey for d in deliveries):
        return True
    owners = (mesh.store.session_owner(d.recipient) for d in deliveries)
    return any(owner is not None and owner.member_id == member.id for owner in owners)


def _recipient_status(mesh: Mesh, message: storage.MessageRow, delivery: storage.DeliveryRow) -> dict[str, Any]:
    peer = mesh.peers.get(delivery.recipient)
    state = "delivered" if delivery.state == "final" else delivery.state
    online = peer is not None and peer.link is not None
    if state == "queued" and online and message.id in peer.link.by_id:
        state = "pushed"
    status = "delivered" if state in DELIVERED_STATES else "held" if online else "disconnected"
    return {"name": peer.name if peer else delivery.name or "unknown", "pubkey": delivery.recipient,
            "status": status, "state": state, "at": iso(delivery.at) if delivery.at else None}


# --- 9. Handlers: presence ------------------------------------------------------------------------


def on_set_status(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_status: the manual writer of the status machine, the only way into and out of dnd (SPEC STAT-3)."""
    hub.write_status(link.mesh, link.peer, frame["status"], "manual")
    link.done(frame)


def on_set_summary(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_summary: one line about the session's work (SPEC PRES-9)."""
    link.peer.summary = frame.get("summary") or ""
    link.mesh.save(link.peer, hub.clock())
    link.done(frame)


def on_set_stats(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_stats: the session's own counters, replaced whole (SPEC PRES-12)."""
    stats = frame.get("stats") or {}
    link.peer.stats = {name: stats[name] for name in (*STAT_NAMES, "uptime") if stats.get(name) is not None}
    link.mesh.save(link.peer, hub.clock())
    link.done(frame)


def on_set_visible(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_visible: hides from or shows to lists and multicasts (SPEC PRES-11)."""
    peer, visible = link.peer, frame["visible"]
    changed, peer.visible = peer.visible != visible, visible
    link.mesh.save(peer, hub.clock())
    link.reply(frame, "ack", id=frame.get("_reqId") or "", messageId="", queued=False)
    if changed and not peer.quiet:
        announce(hub, link.mesh, peer, "peer_visible" if visible else "peer_hidden")


def on_set_reach(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_reach: by which ways messages reach the session's model by themselves (SPEC PRES-16)."""
    link.peer.where["reach"] = frame["ways"]
    link.done(frame)


def on_set_profile(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_profile: merges the fields that are given (SPEC PRES-9)."""
    given = {name: frame[name] for name in ("avatar", "title", "bio", "capabilities") if frame.get(name) is not None}
    profile = {**link.peer.profile, **given}
    check_json(frame, "profile", profile, PROFILE_BYTES)
    link.peer.profile = profile
    link.mesh.save(link.peer, hub.clock())
    link.reply(frame, "ack", id=frame.get("_reqId") or "", messageId="", queued=False)


def on_join_group(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """join_group: joins, or changes the role there (SPEC GROUP-1, GROUP-2)."""
    name, groups = check_group(frame["name"]), link.peer.groups
    if name not in groups and len(groups) >= MAX_GROUPS:
        raise Refused("limit", f"a session is in {MAX_GROUPS} groups at most")
    groups[name] = frame.get("role") or None
    link.mesh.save(link.peer, hub.clock())
    link.done(frame)


def on_leave_group(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """leave_group: leaves; a group one is not in is left already (SPEC GROUP-2)."""
    link.peer.groups.pop(frame["name"], None)
    link.mesh.save(link.peer, hub.clock())
    link.done(frame)


def on_list_peers(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_peers: who is present, oldest connection first (SPEC PRES-7)."""
    own = link.peer.member.id
    link.reply(frame, "peers_list", peers=[
        _peer_entry(peer) for peer in sorted(link.mesh.peers.values(), key=lambda p: p.connected_at)
        if peer.visible or peer.member.id == own])


def _peer_entry(peer: Peer) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "pubkey": peer.key, "displayName": peer.name, "status": peer.status, "summary": peer.summary,
        "groups": peer.group_list(), "sessionId": peer.session_id, "connectedAt": iso(peer.connected_at),
        "visible": peer.visible, "memberPubkey": peer.member.pubkey}
    entry |= {name: value for name, value in peer.where.items() if name != "pid"}
    if peer.stats:
        entry["stats"] = peer.stats
    if peer.profile:
        entry["profile"] = peer.profile
    if peer.link is None:
        entry["reconnecting"] = True
    return entry


# --- 10. Handlers: state, audit, info -------------------------------------------------------------


def on_set_state(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_state: writes one shared key, if it is at the version expected, and tells the others (SPEC STATE-1)."""
    mesh, peer, key, value, expected = link.mesh, link.peer, frame["key"], frame["value"], frame.get("ifVersion")
    size = check_json(frame, "value", value, STATE_VALUE_BYTES)
    if mesh.store.state_size(key) + len(key) + size > STATE_TOTAL_BYTES:
        raise Refused("limit", f"the state of a mesh is {STATE_TOTAL_BYTES} bytes at most")  # STATE-4
    if expected is not None:
        _check_version(key, mesh.store.get_state(key), expected)
    now = hub.clock()
    version = mesh.store.set_state(key, value, peer.member.id, peer.member.name, now)
    mesh.store.audit("state_set", peer.member.id, peer.name, {"key": key}, now)  # AUDIT-4: never the value
    link.done(frame, version=version)
    tell_others(link, "state_change", key=key, value=value, updatedBy=peer.member.name, version=version)


def _check_version(key: str, row: storage.StateRow | None, expected: float) -> None:
    version, value = (row.version, row.value) if row else (0, None)
    if version != expected:  # STATE-5
        raise Refused("state_conflict", f"{key!r} is at version {version}: {encode(value)[:200]}", value=value,
                      version=version)


def tell_others(link: Link, type: str, **fields: Any) -> None:
    """Writes a frame to every other connection of the mesh but the quiet ones."""
    text = encode({"type": type, **fields})
    for other in link.mesh.links:
        if other is not link and not other.peer.quiet:
            other.say(text)


def _state_entry(row: storage.StateRow) -> dict[str, Any]:
    return {"key": row.key, "value": row.value, "updatedBy": row.updated_by, "updatedAt": iso(row.updated_at),
            "version": row.version}


def on_get_state(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """get_state: one shared key; an absent one has empty `updatedBy` and `updatedAt` (SPEC STATE-2)."""
    row = link.mesh.store.get_state(frame["key"])
    entry = _state_entry(row) if row else {
        "key": frame["key"], "value": None, "updatedBy": "", "updatedAt": "", "version": 0}
    link.reply(frame, "state_result", **entry)


def on_list_state(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_state: every shared key, by key (SPEC STATE-3)."""
    link.reply(frame, "state_list", **page("entries", [_state_entry(row) for row in link.mesh.store.list_state()]))


def on_mesh_info(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """mesh_info: the mesh at a glance (SPEC PRES-13)."""
    mesh, peer = link.mesh, link.peer
    shown = [p for p in mesh.peers.values() if p.visible or p.member.id == peer.member.id]
    link.reply(
        frame, "mesh_info_result", mesh=mesh.id, peers=len(shown),
        groups=sorted({f"@{name}" for p in shown for name in p.groups}),
        stateKeys=[row.key for row in mesh.store.list_state()], memoryCount=mesh.store.count("memory"), fileCount=mesh.store.file_totals()[0],
        tasks=mesh.store.task_counts(), streams=[row.name for row in mesh.store.list_streams()], tables=mesh.tables,
        collections=mesh.store.collections(),
        yourName=peer.name, yourGroups=peer.group_list())


def on_audit_query(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """audit_query: the log, newest first (SPEC AUDIT-5)."""
    default, most = AUDIT_PAGE
    limit = int(max(0, min(frame.get("limit") or default, most)))
    offset = int(max(0, min(frame.get("offset") or 0, MAX_OFFSET)))
    rows, total = link.mesh.store.audit_page(limit, offset, frame.get("eventType"))
    link.reply(frame, "audit_result", total=total, entries=[
        {"id": row.id, "eventType": row.event_type, "actor": row.actor or "system", "payload": row.payload,
         "hash": row.hash, "createdAt": iso(row.created_at)} for row in rows])


def on_audit_verify(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """audit_verify: recomputes the chain, in a thread of its own (SPEC AUDIT-6)."""
    mesh, directory = link.mesh, hub.directory(link.mesh.slug)
    if mesh.verifying:
        raise Refused("rate_limited", "a verification is running already")
    mesh.verifying = True

    async def verify() -> None:
        try:
            verdict = await asyncio.to_thread(storage.verify_audit, directory)
        finally:
            mesh.verifying = False
        broken = {} if verdict.valid else {"brokenAt": verdict.broken_at}
        link.reply(frame, "audit_verify_result", valid=verdict.valid, entries=verdict.entries, head=verdict.head, **broken)

    hub.later(link, frame, verify(), "audit_verify_error")


# --- 11. Handlers: memory, context, tasks ---------------------------------------------------------


def on_remember(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """remember: keeps a text for the whole mesh (SPEC MEM-1)."""
    check_room(link.mesh, "memory")
    member = link.peer.member
    id = link.mesh.store.remember(frame["content"], frame.get("tags") or (), member.id, member.name, hub.clock())
    link.reply(frame, "memory_stored", id=id)


def on_recall(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """recall: the memories with all words of the query, best first (SPEC MEM-2)."""
    search(hub, link, frame, storage.search_memory, "memory_results", "memories", lambda row: {
        "id": row.id, "content": row.content, "tags": row.tags, "rememberedBy": row.author,
        "rememberedAt": iso(row.created_at)})


def search(hub: Broker, link: Link, frame: dict[str, Any], find: Callable[[Path, str, int], list[Any]], type: str,
           name: str, entry: Callable[[Any], dict[str, Any]]) -> None:
    """Answers `frame` with what `find` finds for its query, from a thread: ranking looks at every match."""
    directory = hub.directory(link.mesh.slug)

    async def work() -> None:
        async with hub.aside(link, link.mesh.readers):  # MEM-2: what was accepted before the query is found by it
            rows = await asyncio.to_thread(find, directory, frame["query"], FOUND + 1)
        link.reply(frame, type, **page(name, [entry(row) for row in rows], FOUND))

    hub.later(link, frame, work(), "storage_error")


def on_forget(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """forget: takes a memory out of every search (SPEC MEM-4)."""
    id = frame["memoryId"]
    if not link.mesh.store.forget(id, hub.clock()):
        raise Refused("not_found", f"no such memory: {id[:70]}")
    link.reply(frame, "ack", id=id, messageId=id, queued=False)


def on_share_context(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """share_context: replaces what this session says it has learned, and tells the others (SPEC CTX-1, CTX-2)."""
    peer, summary = link.peer, frame["summary"]
    id = link.mesh.store.share_context(
        peer.member.id, peer.session_id, peer.member.name, summary, files=frame.get("filesRead") or (),
        findings=frame.get("keyFindings") or (), tags=frame.get("tags") or (), now=hub.clock())
    link.reply(frame, "context_shared", id=id)
    tell_others(link, "state_change", key=f"_context:{peer.member.name}", value=summary, updatedBy=peer.member.name)


def on_get_context(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """get_context: the contexts with all words of the query, best first (SPEC CTX-3)."""
    search(hub, link, frame, storage.search_contexts, "context_results", "contexts", lambda row: {
        **_context_entry(row), "filesRead": row.files, "keyFindings": row.findings})


def on_list_contexts(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_contexts: the newest contexts, without files and findings (SPEC CTX-4)."""
    rows = link.mesh.store.list_contexts(LISTED + 1)
    link.reply(frame, "context_list", **page("contexts", [_context_entry(row) for row in rows], LISTED))


def _context_entry(row: storage.Context) -> dict[str, Any]:
    return {"peerName": row.author, "summary": row.summary, "tags": row.tags, "updatedAt": iso(row.updated_at)}


def on_create_task(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """create_task: adds an open task (SPEC TASK-1)."""
    id = link.mesh.store.create_task(frame["title"], frame.get("assignee"), frame.get("priority") or "normal",
                                     frame.get("tags") or (), link.peer.member.name, hub.clock())
    if id is None:
        raise Refused("limit", f"a mesh keeps {storage.TASKS_KEPT} tasks at most, and none of them is done")
    link.reply(frame, "task_created", id=id)


def on_claim_task(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """claim_task: takes an open task; of several who try, one gets it (SPEC TASK-2)."""
    store, peer, id = link.mesh.store, link.peer, frame["taskId"]
    if not store.claim_task(id, peer.key, peer.member.id, peer.member.name, hub.clock()):
        task = store.task(id)
        if task is None:
            raise Refused("task_not_claimable", f"no such task: {id[:70]}")
        raise _taken("task_not_claimable", task)
    _reply_tasks(link, frame)


def _taken(code: str, task: storage.Task) -> Refused:
    """Who has a task, for whoever comes too late; the key tells one session of a member from another."""
    who = f"{task.claimed_by} (key {task.claimer[:16]})"
    return Refused(code, f"the task is {task.status} by {who}", claimedBy=task.claimed_by)


def on_complete_task(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """complete_task: marks a task done that nobody else has (SPEC TASK-4)."""
    store, peer, id = link.mesh.store, link.peer, frame["taskId"]
    task = store.task(id)
    if task is None:
        raise Refused("task_not_found", f"no such task: {id[:70]}")
    if task.status != "open" and not _has_task(peer, task):
        raise _taken("task_conflict", task)
    store.complete_task(id, peer.key, peer.member.id, peer.member.name, frame.get("result"), hub.clock())
    _reply_tasks(link, frame)


def _has_task(peer: Peer, task: storage.Task) -> bool:
    """Whether a claim is the peer's: its session's, or, where either side speaks as the member, its member's."""
    same_member = task.claimer_member == peer.member.id
    return task.claimer == peer.key or same_member and peer.member.pubkey in (peer.key, task.claimer)


def on_list_tasks(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_tasks: the newest tasks, of one status or assignee if asked for (SPEC TASK-5)."""
    status = frame.get("status")
    _reply_tasks(link, frame, "done" if status == "completed" else status, frame.get("assignee"))


def _reply_tasks(link: Link, frame: dict[str, Any], status: str | None = None, assignee: str | None = None) -> None:
    rows = link.mesh.store.list_tasks(status, assignee, LISTED + 1)
    link.reply(frame, "task_list", **page("tasks", [_task_entry(row) for row in rows], LISTED))


def _task_entry(row: storage.Task) -> dict[str, Any]:
    return {"id": row.id, "title": row.title, "assignee": row.assignee, "claimedBy": row.claimed_by, "status": row.status,
            "priority": row.priority, "createdBy": row.created_by, "tags": row.tags, "createdAt": iso(row.created_at),
            "result": row.result, "completedAt": iso(row.completed_at) if row.completed_at else None}


# --- 12. Handlers: streams, skills ----------------------------------------------------------------


def on_create_stream(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """create_stream: makes a stream; one that is there already is as good (SPEC STREAM-1)."""
    store, name = link.mesh.store, frame["name"]
    if not name or name != name.strip() or not name.isprintable():
        raise Refused("invalid_name", f"not a stream name: {name[:64]!r}")
    if store.stream(name) is None:
        check_room(link.mesh, "stream")
    stream = store.create_stream(name, link.peer.member.name, hub.clock())
    link.reply(frame, "stream_created", id=stream.id, name=name)


def _check_stream(link: Link, name: str) -> None:
    if link.mesh.store.stream(name) is None:  # STREAM-2
        raise Refused("not_found", f"no such stream: {name[:70]!r}; create_stream makes it")


def on_publish(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """publish: hands a value to the stream's other subscribers, now or never (SPEC STREAM-3)."""
    name, data = frame["stream"], frame["data"]
    _check_stream(link, name)
    check_json(frame, "data", data, STREAM_DATA_BYTES)
    link.done(frame)
    hub.metrics.add("broker_messages_routed_total", "stream")
    text = encode({"type": "stream_data", "stream": name, "data": data, "publishedBy": link.peer.member.name})
    for other in link.mesh.links:
        if other is not link and name in other.streams:
            other.say(text)  # STREAM-6: one that does not read is closed, and delays nobody


def on_subscribe(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """subscribe: this connection gets what is published from now on (SPEC STREAM-4)."""
    name = frame["stream"]
    _check_stream(link, name)
    if name not in link.streams and len(link.streams) >= MAX_SUBSCRIPTIONS:
        raise Refused("limit", f"a connection subscribes to {MAX_SUBSCRIPTIONS} streams at most")
    link.streams.add(name)
    link.reply(frame, "subscribed", stream=name)


def on_unsubscribe(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """unsubscribe: ends a subscription, if there is one (SPEC STREAM-4)."""
    link.streams.discard(frame["stream"])
    link.done(frame)


def on_list_streams(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_streams: every stream by name, with how many connections are subscribed (SPEC STREAM-5)."""
    live = [other.streams for other in link.mesh.links if not other.closed]
    link.reply(frame, "stream_list", **page("streams", [
        {"id": row.id, "name": row.name, "createdBy": row.created_by, "createdAt": iso(row.created_at),
         "subscriberCount": sum(row.name in streams for streams in live)} for row in link.mesh.store.list_streams()]))


def on_share_skill(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """share_skill: publishes a skill, or replaces the one of that name (SPEC SKILL-1)."""
    store, member, name, now = link.mesh.store, link.peer.member, frame["name"], hub.clock()
    if not SKILL_NAME.fullmatch(name):  # SKILL-2
        raise Refused("invalid_name", f"not a skill name: {name[:64]!r}; expected letters, digits, _ . and -, at most 64")
    check_json(frame, "manifest", frame.get("manifest"), MANIFEST_BYTES)
    if store.skill(name) is None:
        check_room(link.mesh, "skill")
    store.share_skill(storage.Skill(name, frame["description"], frame["instructions"], frame.get("tags") or [],
                                    frame.get("manifest"), member.name, now, now), member.id)
    _skill_changed(hub, link, frame, "shared")


def _skill_changed(hub: Broker, link: Link, frame: dict[str, Any], action: str) -> None:
    """Answers, and tells every connection that wants to know, the caller's included (SPEC SKILL-5)."""
    link.reply(frame, "skill_ack", name=frame["name"], action=action)
    data = {"name": frame["name"], "action": action, "by": link.peer.member.name}
    push = system_push(link.mesh.id, hub.uuid(), "skills_changed", data, hub.clock())
    for other in link.mesh.links:
        if other.hears_events and not other.peer.quiet:
            other.push(push)


def on_get_skill(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """get_skill: one skill whole, or null (SPEC SKILL-3)."""
    row = link.mesh.store.skill(frame["name"])
    link.reply(frame, "skill_data", skill=row and {
        **_skill_entry(row), "instructions": row.instructions, "manifest": row.manifest})


def _skill_entry(row: storage.Skill) -> dict[str, Any]:
    return {"name": row.name, "description": row.description, "tags": row.tags, "author": row.author,
            "createdAt": iso(row.created_at)}


def on_list_skills(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_skills: by name, those whose name, description or a tag contains the query (SPEC SKILL-4)."""
    query = (frame.get("query") or "").casefold()
    link.reply(frame, "skill_list", **page("skills", [
        _skill_entry(row) for row in link.mesh.store.list_skills()
        if any(query in text.casefold() for text in (row.name, row.description, *row.tags))]))


def on_remove_skill(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """remove_skill: deletes a skill, or says that there is none (SPEC SKILL-1)."""
    if link.mesh.store.remove_skill(frame["name"]):
        _skill_changed(hub, link, frame, "removed")
    else:
        link.reply(frame, "skill_ack", name=frame["name"], action="not_found")


# --- 13. Handlers: vectors and SQL ----------------------------------------------------------------
# What a member can make long runs in a thread, on a connection of its own, after what was asked before.


def on_vector_store(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """vector_store: keeps a text in a collection, where it can be found by similarity (SPEC VEC-1)."""
    mesh, metadata = link.mesh, frame.get("metadata") or {}
    if not storage.words(frame["text"]):
        raise Refused("vector_error", "the text has no word to find it by")
    check_json(frame, "metadata", metadata, VECTOR_METADATA_BYTES)
    try:
        id = mesh.store.add_vector(frame["collection"], frame["text"], metadata, link.peer.member.pubkey, hub.clock())
    except storage.StoreError:
        raise Refused("limit", f"a mesh has at most {storage.MAX_COLLECTIONS} collections") from None  # VEC-8
    link.reply(frame, "vector_stored", id=id)


def on_vector_search(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """vector_search: the most similar texts of a collection, best first (SPEC VEC-4 to VEC-7)."""
    mesh, name, query = link.mesh, frame["collection"], frame["query"]
    _require_collection(mesh, name)
    if not storage.words(query):
        raise Refused("vector_error", "the query has no word to search for")
    default, most = VECTOR_RESULTS
    limit = max(1, min(int(frame.get("limit") or default), most))

    async def find() -> None:
        async with hub.aside(link, mesh.readers):
            if hub.embedder is not None:
                hits = await _nearest(hub, mesh, name, query, limit)
            else:
                hits = await asyncio.to_thread(storage.search, hub.directory(mesh.slug), name, query, limit)
        link.reply(frame, "vector_results", results=_vector_results(mesh, hits))

    hub.later(link, frame, find(), "vector_error")


def _require_collection(mesh: Mesh, name: str) -> None:
    if mesh.store.collection(name) is None:
        raise Refused("not_found", f"no collection {name[:70]!r}")


def _vector_results(mesh: Mesh, hits: Iterable[tuple[storage.Vector, float]]) -> list[dict[str, Any]]:
    """The entries of an answer, as many as fit into it (SPEC VEC-7)."""
    results: list[dict[str, Any]] = []
    size = 0
    for row, score in hits:
        reserved = {"text": row.text, "mesh_id": mesh.id, "stored_by": row.stored_by, "stored_at": iso(row.stored_at)}
        entry = {"id": row.id, "text": row.text, "score": score, "metadata": row.metadata | reserved}  # VEC-2
        size += len(encode(entry).encode())
        if size > VECTOR_ANSWER_BYTES:
            break
        results.append(entry)
    return results


def on_vector_delete(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """vector_delete: takes one text out of a collection (SPEC VEC-1)."""
    _require_collection(link.mesh, frame["collection"])
    if not link.mesh.store.delete_vector(frame["collection"], frame["id"]):
        raise Refused("not_found", f"no text {frame['id']!r} in collection {frame['collection'][:70]!r}")
    link.reply(frame, "ack", id=frame["id"], messageId="", queued=False)


def on_list_collections(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_collections: the collections that hold a text (SPEC VEC-8)."""
    link.reply(frame, "collection_list", collections=link.mesh.store.collections())


def load_embedder(spec: str) -> Callable[[list[str]], Any]:
    """The function that `module:function` names. Raises `UsageError`."""
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of somebody else's does when it is imported
        raise UsageError(f"embedder {spec}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UsageError(f"embedder {spec}: not a function")
    return function


def embed(function: Callable[[list[str]], Any], texts: list[str]) -> list[bytes]:
    """What the embedder makes of texts, packed. Raises `StoreError` when it fails or makes no sense."""
    try:
        packed = [storage.pack(list(vector)) for vector in function(texts)]
    except Exception as error:
        raise storage.StoreError(f"the embedder failed: {type(error).__name__}") from None
    if len(packed) != len(texts) or len({len(vector) for vector in packed}) != 1:
        raise storage.StoreError(f"the embedder did not return {len(texts)} lists of one length")
    return packed


async def _nearest(hub: Broker, mesh: Mesh, name: str, query: str, limit: int) -> list[tuple[storage.Vector, float]]:
    """The best of a collection by the operator's embedder, which is first shown what it has not seen (SPEC VEC-9)."""
    async with hub.embedding:
        [asked] = await asyncio.to_thread(embed, hub.embedder, [query])
        label = f"{hub.settings.embedder}/{len(asked)}"
        while rows := mesh.store.not_embedded(name, label, EMBED_BATCH):
            packed = await asyncio.to_thread(embed, hub.embedder, [text for _, text in rows])
            if len(packed[0]) != len(asked):
                raise storage.StoreError("the embedder returns lists of different lengths")
            mesh.store.set_embeddings(label, zip((vector for vector, _ in rows), packed, strict=True))
            hub.touch(mesh)
            hub.end_turn()
            if mesh in hub.sick:
                raise Refused("storage_error", wire.ERRORS["storage_error"])
    return await asyncio.to_thread(storage.nearest, hub.directory(mesh.slug), name, label, asked, limit)


def on_mesh_query(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """mesh_query: the rows of one statement that reads `sql.db` (SPEC SQL-2)."""
    mesh = link.mesh

    async def query() -> None:
        async with hub.aside(link, mesh.readers):
            _reply_rows(link, frame, await asyncio.to_thread(storage.sql_query, hub.directory(mesh.slug), frame["sql"]))

    hub.later(link, frame, query(), "query_error")


def on_mesh_execute(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """mesh_execute: runs statements on `sql.db` as one transaction (SPEC SQL-5)."""
    mesh = link.mesh

    async def execute() -> None:
        async with hub.aside(link, mesh.writer):
            result = await asyncio.to_thread(storage.sql_execute, hub.directory(mesh.slug), frame["sql"])
            mesh.tables = result.tables
            _reply_rows(link, frame, result)

    hub.later(link, frame, execute(), "execute_error")


def _reply_rows(link: Link, frame: dict[str, Any], result: storage.SqlResult) -> None:
    link.reply(frame, "mesh_query_result", columns=result.columns, rows=result.rows, rowCount=result.count)


def on_mesh_schema(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """mesh_schema: the tables of `sql.db` and their columns (SPEC SQL-8)."""
    mesh = link.mesh

    async def describe() -> None:
        async with hub.aside(link, mesh.readers):
            tables = await asyncio.to_thread(storage.sql_schema, hub.directory(mesh.slug))
        link.reply(frame, "mesh_schema_result", tables=tables)

    hub.later(link, frame, describe(), "schema_error")


# --- 14. Schedules and clock ----------------------------------------------------------------------
# Nothing here waits. What is due is in the store or in `SimClock`; the broker's one timer asks.


def stand_in(member: Member, key: str = "", name: str = "") -> Peer:
    """A sender for what no session sends: the member itself, connected or not, or what speaks on its behalf."""
    return Peer(key or member.pubkey, member, "", 0, name=name or member.name)


def next_run(expression: str, now: int) -> int:
    """When a cron expression fires next after `now`; both in ms. Raises `CronError`."""
    return int(cron.Cron(expression).next(datetime.fromtimestamp(now / 1000, timezone.utc)).timestamp()) * 1000


def on_schedule(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """schedule: keeps a message to be sent later, once or again and again (SPEC SCHED-1 to SCHED-4)."""
    mesh, member, now = link.mesh, link.peer.member, hub.clock()
    expression = frame.get("cron") or None
    due = _first_time(frame["deliverAt"], expression, now)
    target, fallback = _later_target(mesh, member, frame["to"])
    if wire.read_plain(wire.plain_body(frame["message"])[1]) is None:
        raise Refused("malformed", "schedule.message: empty, or with control characters")
    if mesh.store.count_schedules(member.id) >= SCHEDULED_PER_MEMBER:
        raise Refused("limit", f"a member has at most {SCHEDULED_PER_MEMBER} scheduled messages")
    entry = storage.Schedule(hub.uuid(), member.id, target, fallback, frame["message"], expression, due, 0, now)
    mesh.store.add_schedule(entry)
    link.reply(frame, "scheduled_ack", scheduledId=entry.id, deliverAt=due, **({"cron": expression} if expression else {}))
    mesh.due_at = min(mesh.due_at, due)
    hub.hurry()


def _first_time(deliver_at: float, expression: str | None, now: int) -> int:
    """When a new entry is due, in ms. Raises `Refused`."""
    if expression is not None:
        try:
            return next_run(expression, now)
        except cron.CronError as error:
            raise Refused("invalid_cron", str(error)) from None  # SCHED-2
    if not now <= deliver_at <= now + SCHEDULE_MAX_MS:  # SCHED-3
        where = "past" if deliver_at < now else "more than a hundred years away"
        raise Refused("out_of_range", f"schedule.deliverAt: {str(deliver_at)[:40]} is {where}; it is {now} now")
    return int(deliver_at)


def _later_target(mesh: Mesh, member: Member, to: str) -> tuple[str, str | None]:
    """Whom `to` will mean: sessions end, so a session key has its member's key to fall back on (SPEC SCHED-4)."""
    key = hex_key(to)
    if key is None and (to == "*" or to.startswith("@") and len(to) > 1):
        return to, None
    owner = mesh.owner(key) if key is not None else None
    if owner is None:
        raise Refused("no_such_recipient", f"{to[:70]}: {wire.ERRORS['no_such_recipient']}")
    return (owner.pubkey, None) if owner.id == member.id or key == owner.pubkey else (key, owner.pubkey)


def on_list_scheduled(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_scheduled: what the member has scheduled, the next one first (SPEC SCHED-8)."""
    messages, room = [], SCHEDULED_LIST_CHARS
    for entry in link.mesh.store.schedules(link.peer.member.id):
        room -= len(encode(entry.message)) + 256
        if room < 0:
            break
        recurring = {"cron": entry.cron, "firedCount": entry.fired_count} if entry.cron else {}
        messages.append({"id": entry.id, "to": entry.target, "message": entry.message, "deliverAt": entry.due_at,
                         "createdAt": entry.created_at, **recurring})
    link.reply(frame, "scheduled_list", messages=messages)


def on_cancel_scheduled(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """cancel_scheduled: drops one of the member's own entries (SPEC SCHED-8)."""
    gone = link.mesh.store.cancel_schedule(frame["scheduledId"], link.peer.member.id)
    link.reply(frame, "cancel_scheduled_ack", scheduledId=frame["scheduledId"], ok=gone)


def fire_due(hub: Broker, mesh: Mesh) -> None:
    """Sends what is due, a bounded number at a time (SPEC SCHED-5)."""
    if hub.clock() < mesh.due_at:
        return
    for entry in mesh.store.due_schedules(hub.clock(), FIRE_BATCH):
        _fire(hub, mesh, entry)
    mesh.due_at = mesh.store.next_due() or FAR
    hub.touch(mesh)


def _fire(hub: Broker, mesh: Mesh, entry: storage.Schedule) -> None:
    """Sends one entry as its creator and re-arms it, or drops it, in one transaction."""
    creator = stand_in(mesh.members[entry.member_id])
    target = entry.target if entry.fallback is None or entry.target in mesh.peers else entry.fallback
    recipients = mesh.route(None, target, "now")
    if not recipients and entry.cron is None:  # SCHED-6: it is not lost
        target = creator.key
        recipients = mesh.route(None, target, "now")
    if recipients:
        post(hub, mesh, creator, target, entry.message, recipients, "reminder")
    try:
        again = next_run(entry.cron, hub.clock()) if entry.cron is not None else None  # SCHED-7: missed runs are one
    except cron.CronError:
        again = None
    mesh.store.fired(entry.id, again)


def on_set_clock(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """set_clock: makes the mesh's clock, or changes its speed (SPEC CLOCK-1, CLOCK-2)."""
    slowest, fastest = CLOCK_SPEEDS
    if not slowest <= frame["speed"] <= fastest:
        raise Refused("out_of_range", f"set_clock.speed: expected {slowest} to {fastest}")
    link.mesh.sim = link.mesh.sim or SimClock(hub.clock())
    link.mesh.sim.speed = frame["speed"]
    link.mesh.sim.run(hub.monotonic())
    on_get_clock(hub, link, frame)
    hub.hurry()


def on_pause_clock(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """pause_clock: time stands still (SPEC CLOCK-3)."""
    _clock(link).paused = True
    on_get_clock(hub, link, frame)


def on_resume_clock(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """resume_clock: time goes on (SPEC CLOCK-3)."""
    sim = _clock(link)
    if sim.paused:
        sim.paused = False
        sim.run(hub.monotonic())
    on_get_clock(hub, link, frame)
    hub.hurry()


def _clock(link: Link) -> SimClock:
    if link.mesh.sim is None:
        raise Refused("no_clock", wire.ERRORS["no_clock"])
    return link.mesh.sim


def on_get_clock(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """get_clock: the clock's reading; without one, speed 0 and the time of day (SPEC CLOCK-1)."""
    none = {"speed": 0, "paused": True, "tick": 0, "simTime": iso(hub.clock()), "startedAt": iso(hub.clock())}
    link.reply(frame, "clock_status", **(link.mesh.sim.reading() if link.mesh.sim is not None else none))


def beat(hub: Broker, mesh: Mesh, now: float) -> None:
    """Tells every connection of each tick that is due (SPEC CLOCK-4)."""
    sim = mesh.sim
    while sim is not None and sim.due <= now:
        sim.tick, sim.beats = sim.tick + 1, sim.beats + 1
        reading = sim.reading()
        push = system_push(mesh.id, hub.uuid(), "tick", {name: reading[name] for name in ("tick", "simTime", "speed")}, hub.clock())
        for link in mesh.links:
            if not link.peer.quiet:
                link.push(push)


# --- 15. Watches ----------------------------------------------------------------------------------
# The broker fetches what members name, so it must not become their way into its own network: a host is
# looked up once for each request, and the connection goes to an address that was checked, never to the name.

REDIRECTS = (301, 302, 303, 307, 308)
UNICAST = ipaddress.IPv6Network("2000::/3")  #: the part of IPv6 that is routed in public
OWN_HEADERS = re.compile(r"(?i)host|connection|keep-alive|te|trailer|transfer-encoding|content-length|upgrade|expect|proxy-.*")


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody can reach, and no other way of writing a private one (SPEC WATCH-4)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in UNICAST or ip.sixtofour is not None):
        return False  # mapped, translated and tunnelled IPv4 among them
    return ip.is_global and not ip.is_multicast


def watched_url(url: str) -> wire.Url:
    """The parts of an address to be watched. Raises `Refused`."""
    try:
        return wire.split_url(urldefrag(url)[0], wire.HTTP_SCHEMES)
    except (UsageError, ValueError) as error:
        raise Refused("invalid_url", str(error)) from None  # WATCH-2


def on_watch(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """watch: looks at a URL again and again for its member (SPEC WATCH-1, WATCH-2)."""
    mesh, watch = link.mesh, Watching(_new_watch(link, frame, hub.clock()), FAR)
    url = watched_url(watch.row.url)
    if sum(other.row.member_id == watch.row.member_id for other in mesh.watches.values()) >= WATCHES_PER_MEMBER:
        raise Refused("limit", f"a member has at most {WATCHES_PER_MEMBER} watches")
    mesh.watches[watch.row.id] = watch  # it counts from now on

    async def begin() -> None:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                await hub.addresses(url)
            if mesh.watches.get(watch.row.id) is not watch:
                raise Refused("forbidden", "the member was revoked")
        except (OSError, ValueError, Refused) as error:
            mesh.watches.pop(watch.row.id, None)
            raise error if isinstance(error, Refused) else Refused("invalid_url", f"{url.host} cannot be found") from None
        hub.asked.append((link, frame))
        mesh.undo.append(lambda: mesh.watches.pop(watch.row.id, None))
        if hub.attempt(mesh, mesh.store.add_watch, watch.row):
            watch.due = hub.monotonic()
            link.reply(frame, "watch_ack", watchId=watch.row.id, url=watch.row.url, mode=watch.row.mode,
                       interval=watch.row.interval)
            hub.touch(mesh)

    hub.later(link, frame, begin(), "storage_error")


def _new_watch(link: Link, frame: dict[str, Any], now: int) -> storage.Watch:
    """The watch that a frame asks for. Raises `Refused`."""
    rule, headers = frame.get("notify_on") or "change", frame.get("headers") or {}
    if rule != "change" and not rule.startswith(("match:", "not_match:")):
        raise Refused("malformed", "watch.notify_on: expected change, match:VALUE or not_match:VALUE")
    _check_headers(headers)
    least, default, most = WATCH_INTERVAL
    interval = min(max(default if frame.get("interval") is None else frame["interval"], least), most)
    while (id := "w_" + link.hub.random(4).hex()) in link.mesh.watches:
        pass
    return storage.Watch(id, link.peer.member.id, frame["url"], frame.get("mode") or "hash", frame.get("extract") or None,
                         interval, rule, headers, frame.get("label") or None, None, None, now)


def _check_headers(headers: dict[str, Any]) -> None:
    """Raises `Refused` for what a member may not send along (SPEC WATCH-2)."""
    if len(encode(headers)) > WATCH_HEADER_CHARS:
        raise Refused("too_large", f"watch.headers: longer than {WATCH_HEADER_CHARS} characters")
    for name, value in headers.items():
        try:
            good = isinstance(value, str) and wire.header_line(name, value) and not OWN_HEADERS.fullmatch(name)
        except UsageError:
            good = False
        if not good:
            raise Refused("malformed", f"watch.headers: {name[:40]!r} cannot be sent")


def on_unwatch(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """unwatch: ends one of the member's own watches (SPEC WATCH-9)."""
    watch = link.mesh.watches.get(frame["watchId"])
    if watch is None or watch.row.member_id != link.peer.member.id:
        raise Refused("not_found", "no such watch of yours")
    del link.mesh.watches[watch.row.id]
    link.mesh.undo.append(lambda: link.mesh.watches.setdefault(watch.row.id, watch))
    link.mesh.store.remove_watch(watch.row.id)
    link.reply(frame, "watch_ack", watchId=watch.row.id, url=watch.row.url, mode=watch.row.mode, interval=0)


def on_watch_list(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """watch_list: the member's own watches, and why one sees nothing (SPEC WATCH-9)."""
    link.reply(frame, "watch_list_result", watches=[
        _watch_entry(watch) for watch in link.mesh.watches.values() if watch.row.member_id == link.peer.member.id])


def _watch_entry(watch: Watching) -> dict[str, Any]:
    row = watch.row
    entry = {"id": row.id, "url": row.url, "mode": row.mode, "interval": row.interval, "lastHash": row.seen or "",
             "lastValue": row.seen or "", "createdAt": iso(row.created_at)}
    more = {"label": row.label, "lastCheck": row.checked_at and iso(row.checked_at), "error": watch.error}
    return entry | {name: value for name, value in more.items() if value}


def start_checks(hub: Broker, mesh: Mesh, now: float) -> None:
    """Begins the checks that are due, as far as there is room for them (SPEC WATCH-3)."""
    for watch in mesh.watches.values():
        if watch.due > now or watch.busy or len(hub.fetches) >= FETCHES:
            continue
        if sum(w.busy for w in mesh.watches.values() if w.row.member_id == watch.row.member_id) < FETCHES_PER_MEMBER:
            watch.busy = True
            task = hub.loop.create_task(_check(hub, mesh, watch))
            hub.fetches.add(task)
            task.add_done_callback(hub.fetches.discard)


async def _check(hub: Broker, mesh: Mesh, watch: Watching) -> None:
    """One look at a watched URL; what goes wrong is kept for `watch_list`."""
    try:
        async with asyncio.timeout(WATCH_SECONDS):  # WATCH-6
            value = read_value(watch.row, await fetch(hub, watch.row))
        watch.error = ""
        if mesh.watches.get(watch.row.id) is watch:
            hub.attempt(mesh, _saw, hub, mesh, watch, value)
    except TimeoutError:
        watch.error = f"no answer in {WATCH_SECONDS:g} s"
    except (OSError, ValueError, ProtocolError, UsageError) as error:
        watch.error = str(error)[:200]
    finally:
        watch.busy, watch.due = False, hub.monotonic() + watch.row.interval


async def fetch(hub: Broker, watch: storage.Watch) -> wire.Answer:
    """What is at the watched URL, after at most three redirects (SPEC WATCH-4, WATCH-6). Raises OSError, ProtocolError."""
    address, headers = watch.url, list(watch.headers.items())
    for _ in range(WATCH_REDIRECTS + 1):
        url = watched_url(address)
        answer = await _fetch_one(hub, url, headers, None if watch.mode == "status" else WATCH_BYTES)
        location = answer.headers.get("location")
        if answer.status not in REDIRECTS or not location:
            return answer
        address = urljoin(address, location)
        if watched_url(address)[:3] != url[:3]:
            headers = []  # they were meant for that server alone
    raise ProtocolError(f"more than {WATCH_REDIRECTS} redirects")


async def _fetch_one(hub: Broker, url: wire.Url, headers: list[tuple[str, str]], most: int | None) -> wire.Answer:
    problem: OSError = OSError("no address")
    for address in await hub.addresses(url):
        try:
            return await wire.get(url, address, headers=headers, max_body=most, tls=hub.trust if url.secure else None)
        except OSError as error:
            problem = error
    raise problem


def read_value(watch: storage.Watch, answer: wire.Answer) -> str:
    """What a watch sees in an answer (SPEC WATCH-7)."""
    if watch.mode == "status":
        return str(answer.status)
    if watch.mode == "hash" or watch.extract is None:
        return hashlib.sha256(answer.body).hexdigest()[:16]
    try:
        value = json.loads(answer.body)
        for step in watch.extract.removeprefix("$").removeprefix(".").split("."):
            value = _inner(value, step) if step else value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = answer.body.decode(errors="replace")[:200]
    text = text.encode(errors="replace").decode()
    return text if len(text) <= VALUE_CHARS else f"{text[:VALUE_CHARS]}… {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _inner(value: Any, step: str) -> Any:
    """What is under one step of a dot path, None for nothing."""
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and re.fullmatch(r"\d{1,9}", step, re.ASCII):
        return value[int(step)] if int(step) < len(value) else None
    return None


def _saw(hub: Broker, mesh: Mesh, watch: Watching, value: str) -> None:
    """Keeps what a watch has seen, and queues a notice for its owner if that is due (SPEC WATCH-8)."""
    row, now = watch.row, hub.clock()
    watch.row = row._replace(seen=value, checked_at=now)
    if value == row.seen:
        return  # nothing worth a commit
    mesh.undo.append(lambda: setattr(watch, "row", row))  # then nobody was told
    hub.touch(mesh)
    mesh.store.saw(row.id, value, now)
    if row.seen is not None and _worth_telling(row.notify_on, row.seen, value):
        data = {"watchId": row.id, "url": row.url, "mode": row.mode, "oldValue": row.seen, "newValue": value}
        owner = mesh.members[row.member_id]
        post(hub, mesh, stand_in(owner, "system", "watch_triggered"), owner.pubkey,
             encode(data | ({"label": row.label} if row.label else {})), mesh.route(None, owner.pubkey, "now"), "system")


def _worth_telling(rule: str, old: str, new: str) -> bool:
    """Whether the change from `old` to `new` is one that the rule names."""
    kind, _, wanted = rule.partition(":")
    return {"change": True, "match": new == wanted, "not_match": old == wanted}[kind]


# --- 16. Webhooks ---------------------------------------------------------------------------------


def on_create_webhook(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """create_webhook: an address at which the outside may speak to the mesh (SPEC HOOK-1, HOOK-2)."""
    mesh, member, name, now = link.mesh, link.peer.member, frame["name"], hub.clock()
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        raise Refused("invalid_webhook", "a webhook's name is 1 to 64 printable characters")
    if len(mesh.store.webhooks()) >= WEBHOOKS_PER_MESH:
        raise Refused("limit", f"a mesh has at most {WEBHOOKS_PER_MESH} webhooks")
    secret = hub.random(32).hex()
    try:
        mesh.store.add_webhook(storage.Webhook(name, _digest(secret), member.id, now))  # HOOK-2: only the digest is kept
    except storage.StoreError:
        raise Refused("webhook_exists", wire.ERRORS["webhook_exists"]) from None
    mesh.store.audit("webhook_created", member.id, link.peer.name, {"name": name}, now)
    link.reply(frame, "webhook_ack", name=name, url=_webhook_url(hub, mesh, secret), secret=secret)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _webhook_url(hub: Broker, mesh: Mesh, secret: str) -> str:
    return f"{wire.http_base(hub.public_url)}/hook/{mesh.id}/{secret}"


def on_list_webhooks(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_webhooks: the mesh's webhooks, their secrets masked (SPEC HOOK-2)."""
    link.reply(frame, "webhook_list", webhooks=[
        {"name": webhook.name, "url": _webhook_url(hub, link.mesh, "********"), "active": True,
         "createdAt": iso(webhook.created_at)} for webhook in link.mesh.store.webhooks()])


def on_delete_webhook(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """delete_webhook: closes one, for its creator or an admin (SPEC HOOK-5)."""
    mesh, member = link.mesh, link.peer.member
    webhook = next((webhook for webhook in mesh.store.webhooks() if webhook.name == frame["name"]), None)
    if webhook is None:
        raise Refused("not_found", "no such webhook")
    if webhook.member_id != member.id and member.role != "admin":
        raise Refused("forbidden", "only its creator or an admin may delete a webhook")
    mesh.store.remove_webhook(webhook.name)
    mesh.store.audit("webhook_deleted", member.id, link.peer.name, {"name": webhook.name}, hub.clock())
    link.reply(frame, "webhook_ack", name=webhook.name, url="", secret="")


def find_webhook(mesh: Mesh, secret: str) -> storage.Webhook | None:
    """The webhook with that secret, found in a time that tells nothing of how much of it was right (SPEC HOOK-4)."""
    digest = _digest(secret)
    found = [webhook for webhook in mesh.store.webhooks() if hmac.compare_digest(webhook.secret_hash, digest)]
    return found[0] if found else None


# --- 17. Handlers: files --------------------------------------------------------------------------


def file_reader(member: Member, groups: Iterable[str], *keys: str) -> storage.Reader:
    """What decides which files a member may read, in these groups and with these keys (SPEC FILE-8)."""
    targets = {"", "*", "@all", *keys}
    for group in groups:
        parts = group.split("/")
        targets |= {"@" + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return storage.Reader(member.id, list(keys), sorted(targets))


def _reader(peer: Peer) -> storage.Reader:
    return file_reader(peer.member, peer.groups, peer.key, peer.member.pubkey)


def _file(hub: Broker, link: Link, frame: dict[str, Any]) -> storage.File:
    """The file that a request names, for one who may read it. Raises `Refused`."""
    row = link.mesh.store.file(frame["fileId"], hub.clock())
    if row is None:
        raise Refused("not_found", "no such file; it may have expired or been deleted")
    if not link.mesh.store.may_read(row.id, _reader(link.peer)):
        raise Refused("forbidden", "the file is for others, or its key was not sealed for you")
    return row


def owns(row: storage.File, peer: Peer) -> bool:
    """Whether a file is this member's, by whichever of its sessions it was shared (SPEC FILE-10)."""
    return peer.member.id == row.owner_member or row.owner_member is None and row.owner_key in (peer.key, peer.member.pubkey)


def on_get_file(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """get_file: where the content is for the next two minutes, and the key, sealed for this reader (SPEC FILE-9)."""
    row, peer = _file(hub, link, frame), link.peer
    sealed = link.mesh.store.sealed_key(row.id, (peer.key, peer.member.pubkey)) if row.encrypted else None
    link.reply(frame, "file_url", fileId=row.id, url=hub.download_url(link, row.id), name=row.name, encrypted=row.encrypted,
               size=row.size, sha256=row.sha256, mimeType=row.mime, **({"sealedKey": sealed} if sealed else {}))


def on_list_files(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """list_files: the newest files that the asker may read (SPEC FILE-11)."""
    rows = link.mesh.store.list_files(_reader(link.peer), hub.clock(), frame.get("query") or "", frame.get("from") or "")
    link.reply(frame, "file_list", files=[_file_entry(row) for row in rows])


def _file_entry(row: storage.File) -> dict[str, Any]:
    entry = {"id": row.id, "name": row.name, "size": row.size, "tags": row.tags, "uploadedBy": row.uploaded_by,
             "uploadedAt": iso(row.uploaded_at), "persistent": row.expires_at is None, "encrypted": row.encrypted,
             "mimeType": row.mime}
    if row.target:
        entry["target"] = row.target
    return entry if row.expires_at is None else {**entry, "expiresAt": iso(row.expires_at)}


def on_file_status(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """file_status: who downloaded a file, newest first (SPEC FILE-12)."""
    row = _file(hub, link, frame)
    link.reply(frame, "file_status_result", fileId=row.id, accesses=[
        {"peerName": access.name, "accessedAt": iso(access.at), "complete": access.complete}
        for access in link.mesh.store.accesses(row.id)])


def on_delete_file(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """delete_file: ends the sharing of a file, for its owner or an admin (SPEC FILE-10)."""
    mesh, peer = link.mesh, link.peer
    row = mesh.store.file(frame["fileId"], hub.clock())
    if row is None:
        raise Refused("not_found", "no such file; it may have expired or been deleted")
    if not owns(row, peer) and peer.member.role != "admin":
        raise Refused("forbidden", "a file is deleted by its owner or an admin")
    mesh.store.delete_file(row.id)
    mesh.store.audit("file_deleted", peer.member.id, peer.name, {"file": row.id}, hub.clock())
    link.reply(frame, "ack", id=row.id, messageId="", queued=False)


def on_grant_file_access(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """grant_file_access: keeps the key of an encrypted file as its owner has sealed it for one more peer (SPEC FILE-10)."""
    mesh, row, key = link.mesh, _file(hub, link, frame), hex_key(frame["peerPubkey"])
    if not owns(row, link.peer) or not row.encrypted:
        raise Refused("forbidden", "access is granted by a file's owner" if row.encrypted else "the file is not encrypted")
    if key is None or mesh.owner(key) is None:
        raise Refused("not_found", "grant_file_access.peerPubkey: no key of this mesh")
    if mesh.store.file_key_count(row.id) >= MAX_FILE_KEYS:
        raise Refused("limit", f"the key of a file is sealed for {MAX_FILE_KEYS} peers at most")
    mesh.store.grant_file(row.id, key, frame["sealedKey"])
    mesh.store.audit("file_granted", link.peer.member.id, link.peer.name, {"file": row.id, "key": key}, hub.clock())
    link.reply(frame, "grant_file_access_ok", fileId=row.id, peerPubkey=key)


#: Of a question to another peer: the field that names what is wanted, and how it is forwarded and answered.
RELAYED = {
    "peer_file_request": ("filePath", "peer_file_request_forward", "peer_file_response", "peer_file_response_forward"),
    "peer_dir_request": ("dirPath", "peer_dir_request_forward", "peer_dir_response", "peer_dir_response_forward"),
}


def on_peer_request(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """peer_file_request, peer_dir_request: forwards a question about a peer's own files (SPEC RELAY-1)."""
    mesh, key, id = link.mesh, hex_key(frame["targetPubkey"]), hub.new_id()
    member = mesh.by_pubkey.get(key or "")
    live = [peer for peer in mesh.peers.values() if peer.link is not None and (peer.key == key or peer.member is member)]
    if not live:
        raise Refused("peer_not_found", wire.ERRORS["peer_not_found"])
    if sum(relay.link is link for relay in mesh.relays.values()) >= MAX_RELAYS:
        raise Refused("limit", f"{MAX_RELAYS} questions to other peers are open already")
    asked = max(live, key=lambda peer: peer.connected_at).link  # of a member's sessions the newest
    path, forward, _, _ = RELAYED[frame["type"]]
    pattern = {"pattern": frame["pattern"]} if frame.get("pattern") else {}
    mesh.relays[id] = Relay(link, frame, asked, hub.monotonic() + RELAY_SECONDS)
    mesh.undo.append(lambda: mesh.relays.pop(id, None))
    hub.touch(mesh)
    asked.say(encode({"type": forward, "requesterPubkey": link.peer.key, path: frame[path], **pattern, "_reqId": id}))


def on_peer_response(hub: Broker, link: Link, frame: dict[str, Any]) -> None:
    """peer_file_response, peer_dir_response: passes on the answer to a question that was really put to this peer
    (SPEC RELAY-2). Neither acknowledged nor refused: `_reqId` is the question's, and a stock client would take an
    error for the answer to some question of its own."""
    mesh, id = link.mesh, frame.get("_reqId")
    relay = mesh.relays.get(id) if isinstance(id, str) else None
    if relay is None or relay.asked is not link or RELAYED[relay.frame["type"]][2] != frame["type"]:
        hub.metrics.add("broker_messages_rejected_total", "not_found")
        return
    del mesh.relays[id]
    content, entries, error = frame.get("content"), frame.get("entries"), frame.get("error")
    if error:
        _answer_relay(relay, error=error[:RELAY_ERROR])
    elif content is not None and len(content) <= RELAY_CHARACTERS and content.isascii():
        _answer_relay(relay, content=content)
    elif entries is not None and len(entries) <= RELAY_ENTRIES and sum(map(len, entries)) < REPLY_CHARACTERS // 2:
        _answer_relay(relay, entries=entries)
    else:
        _answer_relay(relay, error="the peer's answer is empty or too large")


def _answer_relay(relay: Relay, **answer: Any) -> None:
    """Answers the peer that asked. Not by `reply`: 1 MiB in base64 is what a message may have, and more than an answer."""
    path, _, _, type = RELAYED[relay.frame["type"]]
    echo = {"_reqId": relay.frame["_reqId"]} if relay.frame.get("_reqId") else {}
    relay.link.say(encode({"type": type, path: relay.frame[path], **answer, **echo}))


def forget_relays(mesh: Mesh, link: Link) -> None:
    """A link has ended: who waits for its answer is told so, and what it asked is not wanted any more (SPEC RELAY-3)."""
    for id, relay in list(mesh.relays.items()):
        if link in (relay.link, relay.asked):
            del mesh.relays[id]
            if relay.asked is link:
                _answer_relay(relay, error=f"{link.peer.name} left before it answered")


def _expire_relays(mesh: Mesh, now: float) -> None:
    for id, relay in list(mesh.relays.items()):
        if relay.until <= now:
            del mesh.relays[id]
            _answer_relay(relay, error=f"{relay.asked.peer.name} did not answer in {RELAY_SECONDS:g} s")


#: message type: its handler. What the table knows and this does not is `not_implemented`.
HANDLERS: dict[str, Callable[[Broker, Link, dict[str, Any]], None]] = {
    "send": on_send, "client_ack": on_client_ack, "message_status": on_message_status,
    "set_status": on_set_status, "set_summary": on_set_summary, "set_stats": on_set_stats,
    "set_visible": on_set_visible, "set_reach": on_set_reach, "set_profile": on_set_profile,
    "join_group": on_join_group, "leave_group": on_leave_group, "list_peers": on_list_peers,
    "set_state": on_set_state, "get_state": on_get_state, "list_state": on_list_state,
    "mesh_info": on_mesh_info, "audit_query": on_audit_query, "audit_verify": on_audit_verify,
    "remember": on_remember, "recall": on_recall, "forget": on_forget,
    "share_context": on_share_context, "get_context": on_get_context, "list_contexts": on_list_contexts,
    "create_task": on_create_task, "claim_task": on_claim_task, "complete_task": on_complete_task,
    "list_tasks": on_list_tasks,
    "create_stream": on_create_stream, "publish": on_publish, "subscribe": on_subscribe,
    "unsubscribe": on_unsubscribe, "list_streams": on_list_streams,
    "share_skill": on_share_skill, "get_skill": on_get_skill, "list_skills": on_list_skills,
    "remove_skill": on_remove_skill,
    "vector_store": on_vector_store, "vector_search": on_vector_search, "vector_delete": on_vector_delete,
    "list_collections": on_list_collections,
    "mesh_query": on_mesh_query, "mesh_execute": on_mesh_execute, "mesh_schema": on_mesh_schema,
    "schedule": on_schedule, "list_scheduled": on_list_scheduled, "cancel_scheduled": on_cancel_scheduled,
    "set_clock": on_set_clock, "pause_clock": on_pause_clock, "resume_clock": on_resume_clock, "get_clock": on_get_clock,
    "watch": on_watch, "unwatch": on_unwatch, "watch_list": on_watch_list,
    "create_webhook": on_create_webhook, "list_webhooks": on_list_webhooks, "delete_webhook": on_delete_webhook,
    "get_file": on_get_file, "list_files": on_list_files, "file_status": on_file_status, "delete_file": on_delete_file,
    "grant_file_access": on_grant_file_access,
    "peer_file_request": on_peer_request, "peer_dir_request": on_peer_request,
    "peer_file_response": on_peer_response, "peer_dir_response": on_peer_response,
}


# --- 18. HTTP routes ------------------------------------------------------------------------------

#: On every answer (SPEC HTTP-28).
CORS = (("Access-Control-Allow-Origin", "*"), ("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE, OPTIONS"),
        ("Access-Control-Allow-Headers",
         "Authorization, Content-Type, X-Mesh-Id, X-Member-Id, X-File-Name, X-Tags, X-Persistent, X-Target-Spec, "
         "X-Encrypted, X-Owner-Pubkey, X-File-Keys, X-Mesh-Content-SHA256, X-Mesh-Key, X-Mesh-Time, X-Mesh-Signature"))
JSON_BODY_BYTES = 64 * 1024
PRESET = wire.read_type("{displayName?: string, roleTag?: string, groups?: [Group], messageMode?: push|inbox|off}")
TAG_LIST, FILE_KEYS = wire.read_type("[string]"), wire.read_type("[{peerPubkey: string, sealedKey: string}]")
TOKEN = re.compile(r"([0-9a-f]{64})\.(\d{1,16})\.([0-9a-f]{64})")
MIME, MIME_DEFAULT = re.compile(r"[\w.+-]{1,64}/[\w.+-]{1,64}(; ?charset=[\w-]{1,32})?", re.ASCII), "application/octet-stream"
JOIN_RATE = (60, 60.0)  #: enrolments per address, and the seconds over which they refill


Result = dict[str, Any] | str | bytes  #: what a route returns; see `answer`
Route = Callable[["Broker", "Call"], Result | Coroutine[Any, Any, Result]]


class Denied(HttpError):
    """A request that is refused with a code: `{"ok": false, "error": code, "message": ...}` (SPEC HTTP-22)."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(status, message or code)
        self.code = code


class Call(NamedTuple):
    """One HTTP request on its way through a route: `ids` are the variable parts of its path."""

    request: wire.Request
    ids: tuple[str, ...]
    loopback: bool
    address: str
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None

    def body(self) -> dict[str, Any]:
        """The JSON object in the body. Raises `Denied`."""
        try:
            return wire.decode(self.request.body)
        except Refused as error:
            raise Denied(400, "bad_request", error.message) from None


@functools.cache
def git_sha() -> str:
    """`GIT_SHA`, else the commit of the checkout this file stands in, else `unknown`."""
    if os.environ.get("GIT_SHA"):
        return os.environ["GIT_SHA"]
    git = Path(__file__).resolve().parent / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        return (git / head.removeprefix("ref: ")).read_text()[:7] if head.startswith("ref: ") else head[:7]
    except OSError:
        return "unknown"


def http_health(hub: Broker, call: Call) -> dict[str, Any]:
    """GET /health: 200 while the store can commit (SPEC HTTP-21)."""
    up = not hub.sick
    body = {"status": "ok" if up else "degraded", "db": "up" if up else "down", "version": VERSION,
            "gitSha": git_sha(), "uptime": int(hub.monotonic() - hub.started)}
    return body if up else {"": 503, **body}


def http_metrics(hub: Broker, call: Call) -> str:
    """GET /metrics: Prometheus text (SPEC OPS-2)."""
    hub.metrics.set("broker_connections_active", sum(len(mesh.links) for mesh in hub.meshes.values()))
    hub.metrics.set("broker_db_healthy", 0 if hub.sick else 1)
    hub.metrics.set("broker_queue_depth", sum(mesh.store.queue_depth() for mesh in hub.meshes.values()))
    return hub.metrics.text()


def http_set_status(hub: Broker, call: Call) -> dict[str, Any]:
    """POST /hook/set-status: the hook writer of the status machine (SPEC STAT-4, STAT-5)."""
    body = call.body()
    cwd, status, pid, session = (body.get(name) for name in ("cwd", "status", "pid", "session_id"))
    hub.metrics.add("broker_hook_requests_total")
    if not isinstance(cwd, str) or not 0 < len(cwd) <= LENGTHS["hello"]["cwd"] or status not in HOOK_STATUSES:
        return {"ok": False, "error": f"expected cwd and a status out of {', '.join(HOOK_STATUSES)}"}
    pid = pid if type(pid) is int else 0
    if not hub.hook_buckets.take(hashlib.sha256(f"{pid}:{cwd}".encode()).hexdigest(), hub.monotonic()):
        hub.metrics.add("broker_hook_requests_rate_limited_total")
        raise Denied(429, "rate_limited")
    matched = hub.match_hook(cwd, pid, session if isinstance(session, str) else "")
    if not matched:
        hub.stash_hook(cwd, pid, session if isinstance(session, str) else "", status)
        return {"ok": True, "pending": True}
    for mesh, peer in matched:
        if peer.status != "dnd":  # STAT-4: a hook never leaves dnd
            hub.write_status(mesh, peer, status, "hook")
    return {"ok": True, "presence_id": matched[0][1].presence_id}


def http_join(hub: Broker, call: Call) -> dict[str, Any]:
    """POST /join: enrols a member with an invite; the checks of SPEC INV-6 in their order."""
    if not hub.join_buckets.take(call.address, hub.monotonic()):
        raise Denied(429, "rate_limited")
    body = call.body()
    token, payload, pubkey, name = (body.get(k) for k in ("invite_token", "invite_payload", "peer_pubkey", "display_name"))
    if not (isinstance(token, str) and token and isinstance(payload, dict) and isinstance(name, str) and name.strip()):
        raise Denied(400, "bad_request", "expected invite_token, invite_payload, peer_pubkey and display_name")
    pubkey = hex_key(pubkey)
    if pubkey is None or len(name) > 128:
        raise Denied(400, "bad_request", "peer_pubkey: expected 64 hex digits, display_name: at most 128 characters")
    mesh = _invite_mesh(hub, token, payload)
    if pubkey in mesh.peers and pubkey not in mesh.by_pubkey or mesh.store.session_owner(pubkey) is not None:
        raise Denied(400, "key_in_use", "peer_pubkey is a session key of this mesh")  # INV-10
    try:
        member, already = mesh.store.enrol(token, pubkey, name.strip(), hub.clock())
    except storage.JoinRefused as error:
        raise Denied(400, error.code) from None
    if already:
        return {"ok": True, "memberId": member.id, "alreadyMember": True}
    mesh.store.audit("member_joined", member.id, member.name, {"pubkey": pubkey, "role": member.role}, hub.clock())
    hub.commit_now(mesh)
    mesh.enrolled(member)
    return {"ok": True, "memberId": member.id}


def _invite_mesh(hub: Broker, token: str, payload: dict[str, Any]) -> Mesh:
    try:
        good = wire.verify_invite(payload)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise Denied(400, "invite_bad_signature")
    mesh = hub.find_mesh(payload.get("mesh_id"))
    if mesh is None or mesh.row.archived_at is not None:
        raise Denied(400, "mesh_not_found")
    if hex_key(payload["owner_pubkey"]) != mesh.row.owner_pubkey:
        raise Denied(400, "invite_owner_mismatch")
    try:
        same = wire.decode_invite(token) == payload
    except wire.InviteError:
        raise Denied(400, "invite_not_found") from None
    if not same:  # INV-7: an old payload does not lend its role to a newer token
        raise Denied(400, "invite_payload_mismatch")
    return mesh


def http_webhook(hub: Broker, call: Call) -> dict[str, Any]:
    """POST /hook/<mesh>/<secret>: says the JSON in the body to the mesh, as the webhook with that secret (SPEC HOOK-3)."""
    try:
        data = wire.read_json(call.request.body, wire.MAX_DEPTH - 1)  # one level less: it travels inside a frame
    except Refused as error:
        raise Denied(400, "bad_request", error.message) from None
    mesh = hub.find_mesh(call.ids[0])
    webhook = find_webhook(mesh, call.ids[1]) if mesh is not None and mesh.row.archived_at is None else None
    if webhook is None:
        raise Denied(401, "unauthorized", "no webhook has that address")  # HOOK-4
    if type(data) not in (dict, list):
        raise Denied(400, "bad_request", "expected a JSON object or array")
    if not hub.webhook_buckets.take(f"{mesh.id} {webhook.name}", hub.monotonic()):
        raise Denied(429, "rate_limited")  # HOOK-6
    speaker = stand_in(mesh.members[webhook.member_id], f"webhook:{webhook.name}", webhook.name)
    online, held = post(hub, mesh, speaker, "*", encode(data), mesh.everybody("next"), "webhook", "next")
    return {"ok": True, "delivered": online, "held": held}


def http_create_mesh(hub: Broker, call: Call) -> dict[str, Any]:
    """POST /mesh: a new mesh for the owner key that signs the request (SPEC HTTP-25)."""
    bearer = call.request.headers.get("authorization", "").removeprefix("Bearer ")
    token = hub.settings.admin_token
    if not call.loopback and not (token and hmac.compare_digest(bearer.encode(), token.encode())):
        raise Denied(403, "forbidden", "meshes are created from this machine, or with the admin token")
    body = call.body()
    slug, name, owner = body.get("slug"), body.get("name"), hex_key(body.get("owner_pubkey"))
    if owner is None or owner != hub.signer(call):
        raise Denied(403, "forbidden", "the request is not signed by owner_pubkey")
    if not isinstance(slug, str) or not SLUG.fullmatch(slug):
        raise Denied(400, "bad_slug", "a slug is a-z, 0-9 and -, at most 63 characters")
    mesh = hub.find_mesh(next((id for id, known in hub.slugs.items() if known == slug), None))
    if mesh is not None and mesh.row.owner_pubkey == owner:  # HTTP-25: its answer was lost
        return {"ok": True, "meshId": mesh.id, "slug": slug, "brokerUrl": hub.public_url}
    if slug in hub.slugs.values() or hub.directory(slug).exists():
        raise Denied(409, "slug_taken", f"there is a mesh called {slug}")
    mesh = hub.create_mesh(slug, name if isinstance(name, str) and name else slug, owner)
    return {"ok": True, "meshId": mesh.id, "slug": slug, "brokerUrl": hub.public_url}


def http_mesh(hub: Broker, call: Call) -> dict[str, Any]:
    """GET /mesh/<id>: what the mesh is called and who owns it, for its members (SPEC HTTP-26)."""
    mesh, _ = hub.authorise(call, admin=False)
    return {"ok": True, "meshId": mesh.id, "slug": mesh.slug, "name": mesh.row.name, "ownerPubkey": mesh.row.owner_pubkey}


def http_add_invite(hub: Broker, call: Call) -> dict[str, Any]:
    """POST /mesh/<id>/invites: registers an invite the owner has signed (SPEC INV-8)."""
    mesh, actor = hub.authorise(call, admin=True)
    body = call.body()
    token, uses, preset = body.get("token"), body.get("maxUses", 1), body.get("preset") or {}
    try:
        payload = wire.read_invite(token if isinstance(token, str) else "", hub.clock() // 1000)
    except wire.InviteError as error:
        raise Denied(400, f"invite_{error.code}", str(error)) from None
    if hex_key(payload["owner_pubkey"]) != mesh.row.owner_pubkey or payload["mesh_id"] != mesh.id:
        raise Denied(400, "invite_owner_mismatch")
    if type(uses) is not int or not 1 <= uses <= 100_000:
        raise Denied(400, "bad_request", "maxUses: expected 1 to 100000")
    _check_preset(preset)
    try:
        invite = mesh.store.add_invite(token, role=payload["role"], max_uses=uses, preset=preset,
                                       expires_at=int(payload["expires_at"] * 1000), created_by=actor, now=hub.clock())
    except storage.StoreError:
        raise Denied(409, "invite_exists") from None
    mesh.store.audit("invite_created", actor, None, {"invite": invite.id, "maxUses": uses, "role": invite.role}, hub.clock())
    return {"ok": True, "inviteId": invite.id}


def _check_preset(preset: Any) -> None:
    """What a preset gives a member must be what the member could have said itself. Raises `Denied`."""
    fault = PRESET.fault(preset)
    if fault is not None:
        raise Denied(400, "bad_request", f"preset{fault}")
    try:
        check_texts({**preset, "type": "hello"})
        for group in preset.get("groups") or ():
            check_group(group["name"])
    except Refused as error:
        raise Denied(400, error.code, f"preset: {error.message}") from None


def http_invites(hub: Broker, call: Call) -> dict[str, Any]:
    """GET /mesh/<id>/invites: every invite, without its token (SPEC INV-8)."""
    mesh, _ = hub.authorise(call, admin=True)
    return {"ok": True, "invites": [
        {"id": i.id, "role": i.role, "maxUses": i.max_uses, "usedCount": i.used_count, "expiresAt": i.expires_at,
         "createdAt": i.created_at, "revokedAt": i.revoked_at} for i in mesh.store.invites()]}


def http_revoke_invite(hub: Broker, call: Call) -> dict[str, Any]:
    """DELETE /mesh/<id>/invites/<invite>: nobody joins with it any more (SPEC INV-8)."""
    mesh, actor = hub.authorise(call, admin=True)
    id = next((invite.id for invite in mesh.store.invites() if call.ids[1] in (invite.id, invite.token)), "")
    if not mesh.store.revoke_invite(id, hub.clock()):
        raise Denied(404, "not_found", "no such invite, or already revoked")
    mesh.store.audit("invite_revoked", actor, None, {"invite": id}, hub.clock())
    return {"ok": True}


def http_members(hub: Broker, call: Call) -> dict[str, Any]:
    """GET /mesh/<id>/members: who may enter the mesh (SPEC HTTP-27)."""
    mesh, _ = hub.authorise(call, admin=False)
    return {"ok": True, "members": [_member_entry(mesh, member) for member in mesh.store.members()]}


def _member_entry(mesh: Mesh, member: Member) -> dict[str, Any]:
    online = sum(1 for peer in mesh.sessions(member) if peer.link is not None)
    entry = {"id": member.id, "pubkey": member.pubkey, "displayName": member.name, "permission": member.role,
             "roleTag": member.role_tag, "groups": list(member.groups), "messageMode": member.message_mode,
             "joinedAt": iso(member.joined_at), "online": online > 0, "sessionCount": online}
    return entry if member.last_seen_at is None else {**entry, "lastSeenAt": iso(member.last_seen_at)}


def http_revoke_member(hub: Broker, call: Call) -> dict[str, Any]:
    """DELETE /mesh/<id>/members/<member>: revokes, and closes its connections with 4001 (SPEC HTTP-27)."""
    mesh, actor = hub.authorise(call, admin=True)
    member = mesh.members.get(call.ids[1])
    if member is None or not mesh.store.revoke_member(member.id, hub.clock()):
        raise Denied(404, "not_found", "no such member")
    mesh.store.audit("member_revoked", actor, None, {"member": member.id}, hub.clock())
    mesh.store.forget_plans(member.id)  # SCHED-9
    hub.commit_now(mesh)
    for link in [link for link in mesh.links if link.peer.member.id == member.id]:
        hub.close_link(link, REVOKED, "revoked")
    for peer in mesh.sessions(member):
        peer.link = None
        end_presence(hub, mesh, peer)
    mesh.revoked(member)
    mesh.watches = {id: watch for id, watch in mesh.watches.items() if watch.row.member_id != member.id}
    return {"ok": True}


# --- 19. HTTP routes: files -----------------------------------------------------------------------


def http_upload(hub: Broker, call: Call) -> Coroutine[Any, Any, Result]:
    """POST /upload: takes a file in. Everything but its content is checked before that is read (SPEC FILE-1 to FILE-7)."""
    mesh, row, keys = _announced_file(hub, call)
    return _receive_file(hub, call, mesh, row, keys)


def _announced_file(hub: Broker, call: Call) -> tuple[Mesh, storage.File, dict[str, str]]:
    """What the headers of an upload say: where, what, and the sealed keys. Raises `Denied`."""
    headers, size, now = call.request.headers, call.request.content_length or 0, hub.clock()
    mesh, member, uploader = _uploader(hub, call)
    if not size:
        raise Denied(400, "empty", "a file has one byte at least, and a Content-Length")
    if size > hub.settings.max_file:
        raise Denied(413, "too_large", f"a file may have at most {hub.settings.max_file} bytes")
    name = wire.read_header_text(headers.get("x-file-name", ""))
    fault = "is no text" if name is None else wire.file_name_fault(name)
    if fault is not None:
        raise Denied(400, "bad_name", f"the name of the file {fault}")  # FILE-5
    count, total = mesh.store.file_totals()
    if count >= MAX_FILES or total + mesh.arriving + size > hub.settings.file_quota:
        raise Denied(507, "limit", "the files of this mesh have no room for another")  # FILE-6
    target, target_member = _file_target(mesh, headers.get("x-target-spec", ""))
    owner_key = _owner_key(mesh, member, headers.get("x-owner-pubkey", ""))
    owner = member or (mesh.owner(owner_key) if owner_key else None)
    mime = headers.get("content-type", "")
    row = storage.File(
        hub.new_id(), name, size, mime if MIME.fullmatch(mime) else MIME_DEFAULT, headers.get("x-mesh-content-sha256", ""),
        _tags(headers), target, target_member, owner.id if owner else None, owner_key, uploader,
        headers.get("x-encrypted") == "true", now,
        now + storage.KEEP_FILE_MS if headers.get("x-persistent") == "false" else None)
    return mesh, row, _file_keys(headers) if row.encrypted else {}


def _uploader(hub: Broker, call: Call) -> tuple[Mesh, Member | None, str]:
    """The mesh, the member who signed, if anybody did, and the uploader's name. Raises `Denied`."""
    headers = call.request.headers
    mesh_id = headers.get("x-mesh-id", "")
    if hub.settings.legacy_http and "x-mesh-signature" not in headers:  # FILE-7
        mesh, label = hub.find_mesh(mesh_id), wire.read_header_text(headers.get("x-member-id", ""))
        if mesh is None or not label:
            raise Denied(400, "bad_request", "expected X-Mesh-Id, X-Member-Id and X-File-Name")
        return mesh, None, label[:128]
    mesh, member_id = hub.authorise(call, admin=False, mesh_id=mesh_id, body=wire.upload_text(headers))  # FILE-2
    if member_id is None:
        raise Denied(403, "forbidden", "files are shared by members; the owner's key is none")
    if not re.fullmatch("[0-9a-f]{64}", headers.get("x-mesh-content-sha256", "")):
        raise Denied(400, "bad_request", "X-Mesh-Content-SHA256: expected 64 lower-case hex digits")
    return mesh, mesh.members[member_id], mesh.members[member_id].name


def _file_target(mesh: Mesh, target: str) -> tuple[str, str | None]:
    """For whom a file is, and the member if that is a key's: it outlives the session (SPEC FILE-8). Raises `Denied`."""
    key = hex_key(target)
    if key is not None:
        member = mesh.owner(key)
        if member is None:
            raise Denied(400, "no_such_recipient", "X-Target-Spec: no key of this mesh")
        return key, member.id
    target = wire.read_header_text(target)
    if not target or target in ("*", "@all"):
        return "", None
    if not target.startswith("@") or len(target) > LENGTHS["send"]["targetSpec"]:
        raise Denied(400, "no_such_recipient", "X-Target-Spec: expected a key, @group, * or nothing")
    return target, None


def _owner_key(mesh: Mesh, member: Member | None, text: str) -> str | None:
    """The routing key of the uploader, which in a signed request is one of the member's own. Raises `Denied`."""
    key = hex_key(text)
    if text and key is None:
        raise Denied(400, "bad_request", "X-Owner-Pubkey: expected 64 hex digits")
    if member is not None and key is not None and mesh.owner(key) is not member:
        raise Denied(403, "forbidden", "X-Owner-Pubkey: the key of somebody else")
    return key


def _tags(headers: dict[str, str]) -> list[str]:
    tags, (most, longest) = _json_header(headers, "x-tags", TAG_LIST), TAGS
    if len(tags) > most or any(len(tag) > longest for tag in tags):
        raise Denied(400, "too_large", f"X-Tags: at most {most} tags of {longest} characters")
    return tags


def _file_keys(headers: dict[str, str]) -> dict[str, str]:
    """The sealed keys that come with an encrypted file, by peer key. Raises `Denied`."""
    keys = {hex_key(entry["peerPubkey"]): entry["sealedKey"] for entry in _json_header(headers, "x-file-keys", FILE_KEYS)}
    if len(keys) > MAX_FILE_KEYS or not all(key and _is_sealed_key(sealed) for key, sealed in keys.items()):
        raise Denied(400, "bad_request", "X-File-Keys: expected keys of 64 hex digits and sealed keys")
    return keys


def _json_header(headers: dict[str, str], name: str, shape: wire.Type) -> Any:
    try:
        value = json.loads(wire.read_header_text(headers.get(name) or "[]") or "")
    except (ValueError, RecursionError):
        value = None
    if shape.fault(value) is not None:
        raise Denied(400, "bad_request", f"{name}: not what it should be")
    return value


async def _receive_file(hub: Broker, call: Call, mesh: Mesh, row: storage.File, keys: dict[str, str]) -> Result:
    """Streams the content to the disk; file, row and audit entry are there together, or nothing is (SPEC FILE-4)."""
    mesh.arriving += row.size
    blob = None
    try:
        with hub.transfer():
            blob = await hub.disk(storage.Blob, mesh.store.blob(row.id))
            limit = wire.BODY_TIMEOUT + row.size / TRANSFER_RATE
            async for chunk in wire.body_chunks(call.request, call.reader, call.writer, max_body=row.size, timeout=limit):
                await hub.disk(blob.write, chunk)
            if row.sha256 not in ("", blob.sha256):
                raise Denied(400, "checksum_mismatch", "what arrived has another SHA-256 than was announced")
            await hub.disk(blob.keep)
        return _share(hub, mesh, row._replace(sha256=blob.sha256), keys)
    except BaseException as error:
        if blob is not None:
            blob.discard()
        if isinstance(error, storage.StoreError):
            hub.log("error", "file not stored", mesh=mesh.slug, reason=str(error))
            raise Denied(507, "storage_error", str(error)) from None
        raise
    finally:
        mesh.arriving -= row.size


def _share(hub: Broker, mesh: Mesh, row: storage.File, keys: dict[str, str]) -> Result:
    """Makes a file whose content is in place a shared one; who of those it is for still lacks a key (SPEC FILE-4, FILE-10)."""
    owner = mesh.members.get(row.owner_member or "")
    if row.owner_member is not None and owner is None:
        raise Denied(401, "unauthorized", "the member was revoked meanwhile")
    mesh.store.add_file(row, keys)
    mesh.store.audit("file_shared", row.owner_member, row.uploaded_by, {
        "file": row.id, "size": row.size, "encrypted": row.encrypted, "target": row.target}, hub.clock())
    missing = [member.pubkey for member in _reached(mesh, row) if member.pubkey not in keys] if row.encrypted else []
    hub.commit_now(mesh)
    return {"ok": True, "fileId": row.id, **({"missing": missing} if missing else {})}


def _reached(mesh: Mesh, row: storage.File) -> list[Member]:
    """The members whom the target of a file reaches now, and its owner."""
    def groups(member: Member) -> list[str]:
        return [group for peer in mesh.sessions(member) for group in peer.groups] or mesh.saved_groups(member)

    return [member for member in mesh.members.values()
            if member.id in (row.owner_member, row.target_member) or not row.target
            or row.target.startswith("@") and any(in_group(row.target[1:], group) for group in groups(member))]


async def http_download(hub: Broker, call: Call) -> Result:
    """GET /download/<file>?mesh=<mesh>: the stored bytes, for a token or a signature (SPEC FILE-9)."""
    mesh, row, key, name = _wanted_file(hub, call)
    try:
        content = open(mesh.store.blob(row.id), "rb")
    except OSError as error:
        hub.log("error", "file not readable", mesh=mesh.slug, file=row.id, reason=str(error.strerror))
        raise Denied(404, "not_found", "the content of that file is gone") from None
    head = wire.response_head(200, row.size, headers=[
        ("Content-Type", row.mime), ("Content-Disposition", f"attachment; filename*=UTF-8''{percent(row.name, safe='')}"),
        ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"), *CORS])
    with content, hub.transfer():
        if call.request.method == "HEAD":
            return head
        access = mesh.store.add_access(row.id, key, name, hub.clock())  # FILE-12
        hub.commit_now(mesh)
        try:
            await _send_file(hub, call.writer, head, content, row.size)
            mesh.store.complete_access(access)
        except OSError:  # the reader has gone or is too slow
            call.writer.transport.abort()
    return b""


def _wanted_file(hub: Broker, call: Call) -> tuple[Mesh, storage.File, str, str]:
    """The mesh, the file, and the key and name of who may have it. Raises `Denied`."""
    query, id = call.request.query, call.ids[0]
    token, mesh_id = query.get("token"), query.get("mesh", "")
    if token is None:
        mesh, member_id = hub.authorise(call, admin=False, mesh_id=mesh_id)
        member = mesh.members.get(member_id or "")
        key, name = ("", "") if member is None else (member.pubkey, member.name)
    else:
        key = _token_key(hub, mesh_id, id, token)
        mesh = hub.find_mesh(mesh_id)
        member = mesh.owner(key) if mesh else None
        name = mesh.peers[key].name if mesh and key in mesh.peers else member.name if member else ""
    if member is None:
        raise Denied(401, "unauthorized", "no live member of that mesh asks")
    row = mesh.store.file(id, hub.clock())
    if row is None:
        raise Denied(404, "not_found", "no such file; it may have expired or been deleted")
    if token is None and not mesh.store.may_read(id, file_reader(member, mesh.saved_groups(member), member.pubkey)):
        raise Denied(403, "forbidden", "the file is for others, or its key was not sealed for you")
    return mesh, row, key, name


def _token_key(hub: Broker, mesh_id: str, file: str, token: str) -> str:
    """The key of the peer for whom a token was made. Raises `Denied`."""
    match = TOKEN.fullmatch(token)
    if match is None or not hmac.compare_digest(hub.token(mesh_id, file, match[1], int(match[2])), match[3]):
        raise Denied(401, "bad_token", "the token is not for this file")
    if int(match[2]) < hub.clock():
        raise Denied(401, "token_expired", "the address has expired; ask for it again")
    return match[1]


async def _send_file(hub: Broker, writer: asyncio.StreamWriter, head: bytes, content: BinaryIO, size: int) -> None:
    """Writes the head and `size` bytes of `content`, as fast as they are taken. Raises `OSError`."""
    async with asyncio.timeout(wire.BODY_TIMEOUT + size / TRANSFER_RATE):
        writer.write(head)
        while chunk := await hub.disk(content.read, TRANSFER_CHUNK):
            writer.write(chunk)
            await writer.drain()
        while wire.unsent(writer):  # the hanging up that follows does not wait as long
            await asyncio.sleep(LINGER_SECONDS)


#: (method, path with <variable> parts): handler. Routing ignores the query (SPEC HTTP-20).
ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/health"): http_health,
    ("GET", "/metrics"): http_metrics,
    ("POST", "/hook/set-status"): http_set_status,
    ("POST", "/hook/<mesh>/<secret>"): http_webhook,
    ("POST", "/join"): http_join,
    ("POST", "/mesh"): http_create_mesh,
    ("GET", "/mesh/<mesh>"): http_mesh,
    ("POST", "/mesh/<mesh>/invites"): http_add_invite,
    ("GET", "/mesh/<mesh>/invites"): http_invites,
    ("DELETE", "/mesh/<mesh>/invites/<invite>"): http_revoke_invite,
    ("GET", "/mesh/<mesh>/members"): http_members,
    ("DELETE", "/mesh/<mesh>/members/<member>"): http_revoke_member,
    ("POST", "/upload"): http_upload,
    ("GET", "/download/<file>"): http_download,
}
STREAMED = {http_upload}  #: read the body of the request themselves
_PATTERNS = [(method, re.compile(re.sub(r"<\w+>", "([^/]+)", path)), handler)
             for (method, path), handler in ROUTES.items()]


def find_route(method: str, path: str) -> tuple[Route, tuple[str, ...]]:
    """The handler of a request and the variable parts of its path. Raises `HttpError` 404."""
    wanted = "GET" if method == "HEAD" else method
    for route_method, pattern, handler in _PATTERNS:
        match = pattern.fullmatch(path)
        if match is not None and route_method == wanted:
            return handler, match.groups()
    raise HttpError(404, "not found")


def answer(result: Result, *, head: bool) -> bytes:
    """The HTTP answer for what a route returned; the key "" is a status other than 200, bytes are an answer already."""
    if isinstance(result, bytes):
        return result
    if isinstance(result, str):
        return wire.response(200, result.encode(), head=head, headers=[("Content-Type", "text/plain; version=0.0.4"), *CORS])
    status = result.pop("", 200)
    return wire.response(status, encode(result).encode(), head=head, headers=[("Content-Type", "application/json"), *CORS])


def refusal(error: HttpError, *, head: bool) -> bytes:
    """The HTTP answer for a refused request: JSON where a route refused, plain text where HTTP did."""
    if isinstance(error, Denied):
        return answer({"": error.status, "ok": False, "error": error.code, "message": error.message}, head=head)
    if error.status == 413:
        return answer({"": 413, "ok": False, "error": "too_large", "message": error.message}, head=head)
    if error.status == 404:
        return wire.response(404, b"not found", head=head, headers=CORS)
    return wire.error_response(error, headers=CORS, head=head)


# --- 20. Start, tick, stop ------------------------------------------------------------------------


class Broker(Turn):
    """A running hub: `async with Broker(data=path, port=0) as broker: broker.url` (SPEC OPS-1).

    Keyword arguments are the fields of `Settings`; besides, for tests and embedding: `clock` (wall time in
    ms), `monotonic` (seconds), `random` (bytes for ids), `log`, called with one record a line, and `resolve`, which
    awaits the addresses of (host, port). Starting raises `OSError` when the
    port cannot be had and `UsageError` for settings that make no sense.
    """

    def __init__(self, *, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
                 monotonic: Callable[[], float] = time.monotonic, random: Callable[[int], bytes] = os.urandom,
                 log: Callable[[dict[str, Any]], None] | None = None,
                 resolve: Callable[[str, int], Awaitable[list[str]]] | None = None, **settings: Any) -> None:
        super().__init__()
        settings["data"] = Path(settings["data"])
        self.settings = Settings(**settings)
        self.settings.check()
        self.clock, self.monotonic, self._log = clock, monotonic, log
        self.random = random
        self._tail = random_tails(random).__next__
        self.now = self.started = monotonic()
        self.metrics = Metrics()
        self.slugs: dict[str, str] = {}  #: mesh id: slug, for every directory under `data`
        self.meshes: dict[str, Mesh] = {}  #: the open ones
        self.waiting: set[Link] = set()  #: WebSockets that have not said hello
        self.strangers: set[asyncio.Task[Any]] = set()  #: the tasks of all sockets that have not
        self.hellos, self.http_signatures = Recent(), Recent()
        self.pending_hooks: dict[tuple[str, int], tuple[str, str, int]] = {}
        self.hook_buckets = Buckets(self.settings.hook_rate, 60.0)
        self.join_buckets = Buckets(*JOIN_RATE)
        rate = self.settings.send_rate
        self.send_buckets = Buckets(rate, 1.0) if rate else None
        self.embedder = load_embedder(self.settings.embedder) if self.settings.embedder else None
        self.embedding = asyncio.Lock()  #: the embedder is somebody else's: it is called once at a time
        self.webhook_buckets = Buckets(*WEBHOOK_RATE)
        self.token_secret = random(32)
        self.threads = ThreadPoolExecutor(DISK_THREADS, "files")  #: of their own: a long query holds up no transfer
        self.transfers = 0
        self.tasks: set[asyncio.Task[Any]] = set()
        self.fetches: set[asyncio.Task[Any]] = set()  #: checks of watches
        self.resolve = resolve or self._resolve
        self.resolvers = ThreadPoolExecutor(4, "resolve")  #: of their own: a slow name server delays nothing else
        self.url = ""

    @property
    def public_url(self) -> str:
        """The address put into answers: the configured one, else where the broker listens."""
        return self.settings.public_url or self.url

    # Starting and stopping

    async def __aenter__(self) -> Broker:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Reads the index of meshes, then listens."""
        self.loop = asyncio.get_running_loop()
        self.settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.data_lock = storage.lock(self.settings.data)  # STORE-4: also before there is a mesh to lock
        try:
            await self._listen()
        except BaseException:
            os.close(self.data_lock)
            raise

    async def _listen(self) -> None:
        for path in sorted(self.settings.data.iterdir()):
            self._index(path)
        for mesh_id, slug in self.slugs.items():
            if storage.keeps_blobs(self.directory(slug)):
                with contextlib.suppress(Refused):  # which is in the log
                    self.find_mesh(mesh_id)  # FILE-13: opening sweeps
        if self.settings.legacy_http:
            self.log("warn", "legacy HTTP is on: whoever knows a mesh id can upload files to it")  # FILE-7
        tls = self._tls()
        self.server = await wire.serve(self._accept, self.settings.host, self.settings.port, tls=tls)
        port = self.server.sockets[0].getsockname()[1]
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        self.url = f"{'wss' if tls else 'ws'}://{host}:{port}/ws"
        self.timer = self.loop.call_later(self._until_due(), self._ticked)
        self.log("info", "listening", url=self.url, meshes=len(self.slugs))

    def _index(self, path: Path) -> None:
        try:
            identity = storage.mesh_identity(path) if path.is_dir() else None
            waiting = identity is not None and storage.has_appointments(path)
        except storage.StoreError as error:
            self.log("error", "mesh skipped", mesh=path.name, reason=str(error))
            return
        if identity is not None:
            self.slugs[identity[0]] = path.name
        if waiting:
            with contextlib.suppress(Refused):  # logged
                self.find_mesh(identity[0])  # SCHED-7: it has to be open for what falls due

    def _tls(self) -> ssl.SSLContext | None:
        cert, key = self.settings.tls_cert, self.settings.tls_key
        if not cert:
            return None  # OPS-9
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(cert, key or None)
        except ssl.SSLError as error:
            raise UsageError(f"{cert}{f' and {key}' if key else ''}: not a certificate with its key ({error.reason})") from None
        except OSError as error:
            raise UsageError(f"{cert}{f' or {key}' if key else ''}: {error.strerror}") from None
        return context

    async def stop(self) -> None:
        """Closes every connection with 1001, saves every presence, commits, and closes the files (SPEC OPS-4)."""
        self.timer.cancel()
        self.server.close()
        for task in self.fetches:
            task.cancel()
        self.resolvers.shutdown(wait=False, cancel_futures=True)
        self.end_turn()
        for link in [*self.waiting, *(link for mesh in self.meshes.values() for link in mesh.links)]:
            self.close_link(link, CloseCode.GOING_AWAY, "shutting down")
        for mesh in self.meshes.values():
            self.attempt(mesh, self._save_all, mesh)
            self.touch(mesh)
        self.end_turn()
        await self._settle_tasks()
        for mesh in self.meshes.values():
            mesh.store.close()
        self.threads.shutdown(wait=False)
        os.close(self.data_lock)
        self.log("info", "stopped")

    def _save_all(self, mesh: Mesh) -> None:
        now = self.clock()
        for peer in list(mesh.peers.values()):
            mesh.store.requeue_unshown(peer.key)
            _record_leave(mesh, peer, now)
        mesh.peers.clear()

    async def _settle_tasks(self) -> None:
        if self.tasks:
            _, late = await asyncio.wait(self.tasks, timeout=3.0)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def log(self, level: str, message: str, **context: Any) -> None:
        """One record of the log; never a secret, a whole key or the content of a message (SPEC OPS-3)."""
        if self._log is not None:
            self._log({"ts": iso(self.clock()), "level": level, "component": "broker", "msg": message, **context})

    def log_fault(self, what: str, error: Exception) -> None:
        """Logs a defect of the broker: what was being done, the exception, and the line."""
        at = error.__traceback__
        while at.tb_next is not None:
            at = at.tb_next
        self.log("error", "handler failed", what=what, error=f"{type(error).__name__}: {error}"[:200],
                 at=f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}")

    # Ids

    def new_id(self) -> str:
        """A fresh id, 32 characters of 0-9A-Za-z."""
        return self.random(16).hex()

    def message_id(self, now: int) -> str:
        """A fresh id of that form that sorts by time: the store's index grows at its end."""
        return f"{now:012x}{self._tail()}"

    def uuid(self) -> str:
        """A fresh UUID v4."""
        return str(uuid.UUID(bytes=self.random(16), version=4))

    # Meshes

    def directory(self, slug: str) -> Path:
        """Where a mesh lives."""
        return self.settings.data / slug

    def find_mesh(self, mesh_id: Any) -> Mesh | None:
        """The open mesh of that id, opening its directory at first use; None if there is none."""
        mesh = self.meshes.get(mesh_id) if isinstance(mesh_id, str) else None
        if mesh is not None or not isinstance(mesh_id, str) or mesh_id not in self.slugs:
            return mesh
        try:
            with contextlib.ExitStack() as undo:
                store = Store(self.directory(self.slugs[mesh_id]), synchronous=self.settings.synchronous, new_id=self.new_id)
                undo.callback(store.close)
                opened = Mesh(store)
                undo.pop_all()
        except (storage.StoreError, sqlite3.Error) as error:
            self.log("error", "mesh not opened", mesh=self.slugs[mesh_id], reason=str(error))
            raise Refused("storage_error", "the mesh cannot be opened; the broker's log says why") from None
        opened.store.renew_claims(self.clock())  # TASK-3
        self.meshes[mesh_id] = opened
        self.touch(opened)
        return opened

    def create_mesh(self, slug: str, name: str, owner_pubkey: str) -> Mesh:
        """Makes the directory of a new mesh and opens it."""
        store = Store.create(self.directory(slug), mesh_id=self.new_id(), slug=slug, name=name,
                             owner_pubkey=owner_pubkey, now=self.clock(), synchronous=self.settings.synchronous,
                             new_id=self.new_id)
        mesh = Mesh(store)
        store.audit("mesh_created", None, None, {"slug": slug}, self.clock())
        self.slugs[mesh.id], self.meshes[mesh.id] = slug, mesh
        self.touch(mesh)
        return mesh

    # Sockets

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One accepted socket: an HTTP request, or a WebSocket until it ends."""
        if len(self.strangers) >= MAX_UNAUTHENTICATED:  # HELLO-12
            writer.transport.abort()
            return
        task = asyncio.current_task()
        self.tasks.add(task)
        self.strangers.add(task)
        try:
            await self._serve(reader, writer)
        except OSError:
            pass  # the peer has gone; whatever it was owed is in the store
        except Exception as error:
            self.log_fault("connection", error)
        finally:
            self.tasks.discard(task)
            self.strangers.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = False
        try:
            request = await wire.read_request(reader, timeout=HELLO_SECONDS)
            if request is None:
                return
            head = request.method == "HEAD"
            if request.path == "/ws":
                await self._serve_websocket(request, reader, writer)
                return
            writer.write(await self._serve_http(request, reader, writer))
        except HttpError as error:
            writer.write(refusal(error, head=head))
        except Refused as error:
            writer.write(refusal(Denied(503, error.code, error.message), head=head))
        await wire.hang_up(reader, writer)

    async def _serve_http(self, request: wire.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        if request.method == "OPTIONS":
            return wire.response(204, headers=CORS)
        handler, ids = find_route(request.method, request.path)
        if handler not in STREAMED:
            await wire.read_body(request, reader, writer, max_body=JSON_BODY_BYTES)
        address = str((writer.get_extra_info("peername") or ("",))[0])
        forwarded = self.settings.public_url or {"forwarded", "x-forwarded-for", "origin"} & request.headers.keys()
        call = Call(request, ids, _is_loopback(address) and not forwarded, address, reader, writer)  # HTTP-25: proxies and browsers are local, who uses them is not
        try:
            result = handler(self, call)
            if asyncio.iscoroutine(result):
                result = await result
        except (sqlite3.Error, storage.StoreError) as error:
            self.undo_all("storage_error", f"not stored: {error}")
            raise Denied(503, "storage_error", wire.ERRORS["storage_error"]) from None
        except ProtocolError:
            raise
        except Exception as error:
            self.log_fault(f"{request.method} {request.path[:40]}", error)
            self.undo_all("internal", wire.ERRORS["internal"])
            raise Denied(500, "internal", wire.ERRORS["internal"]) from None
        for mesh in self.meshes.values():
            if mesh.store.changed:
                self.commit_now(mesh)
        return answer(result, head=request.method == "HEAD")

    async def _serve_websocket(self, request: wire.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = wire.Connection.accept(request, reader, writer, max_message=HELLO_BYTES)
        link = Link(self, connection, asyncio.current_task(), self.monotonic(), request.headers["host"])
        self.metrics.add("broker_connections_total")
        self.waiting.add(link)
        try:
            await connection.pump(lambda messages: self.read(link, messages))
        finally:
            self.attempt(link.mesh, detach, self, link)
            self.end_turn()
        await connection.close()

    # Frames

    def read(self, link: Link, messages: list[str | bytes]) -> None:
        """What one read has brought, frame by frame."""
        link.heard = self.now = self.monotonic()
        for message in messages:  # DELIV-15: in order, each to completion
            self.handle(link, message)
            if len(self.asked) >= TURN_FRAMES:
                self.end_turn()
        link.conn.hold(OUTBOX_SOFT)  # OPS-6: who does not read is not read

    def handle(self, link: Link, text: str | bytes) -> None:
        """One inbound frame, to completion (SPEC MSG-1 to MSG-8)."""
        if link.closed:
            return
        try:
            frame = wire.decode(text)
        except Refused:
            self.metrics.add("broker_messages_rejected_total", "malformed")
            return  # MSG-8: it carries no id to answer to
        self.asked.append((link, frame))
        self.schedule()
        written = None if link.mesh is None else link.mesh.store.written
        try:
            self._dispatch(link, frame)
        except Refused as error:
            self.refuse(link, frame, error)
        except sqlite3.Error as error:
            self._failed(link, frame, written, "storage_error", f"not stored: {error}")
        except Exception as error:  # our own mistake: the peer learns that it failed, the log learns where
            self.log_fault(str(frame.get("type"))[:40], error)
            self._failed(link, frame, written, "internal", wire.ERRORS["internal"])

    def _dispatch(self, link: Link, frame: dict[str, Any]) -> None:
        if link.mesh is None:
            if frame.get("type") != "hello":
                raise Refused("no_hello", wire.ERRORS["no_hello"])  # HELLO-13
            on_hello(self, link, frame)
        else:
            if frame.get("type") == "hello":
                raise Refused("already_authenticated", wire.ERRORS["already_authenticated"])  # HELLO-11
            message = wire.check(frame)
            check_texts(frame)
            handler = HANDLERS.get(message.name)
            if handler is None:
                raise Refused("not_implemented", f"{message.name}: {wire.ERRORS['not_implemented']}")  # MSG-11
            handler(self, link, frame)
        if link.mesh.store.changed:
            self.touch(link.mesh)

    def _failed(self, link: Link, frame: dict[str, Any], written: int | None, code: str, message: str) -> None:
        """Undoes the turn if the frame left something half-written, else only the frame has failed (TURN-2)."""
        if link.mesh is not None and link.mesh.store.written != written:
            self.fail_turn(link.mesh, code, message)
        else:
            self.refuse(link, frame, Refused(code, message))

    def refuse(self, link: Link, frame: dict[str, Any], error: Refused) -> None:
        """Answers with an `error`, if there is an id to answer to; a refused hello ends the connection."""
        self.metrics.add("broker_messages_rejected_total", error.code)
        kind, request, send_id = frame.get("type"), frame.get("_reqId"), frame.get("id")
        answer = {"type": "error", "code": error.code, "message": error.message, **error.extra}
        if request and isinstance(request, str):
            answer["_reqId"] = request
        if kind == "send" and send_id and isinstance(send_id, str):
            answer["id"] = send_id
        if "_reqId" in answer or "id" in answer or kind == "hello" or error.code == "no_hello":
            link.say(encode(answer))  # MSG-8
        if kind == "hello" and link.mesh is None:  # HELLO-15
            self.metrics.add("broker_connections_rejected_total", error.code)
            self.log("info", "hello refused", code=error.code, address=str(link.conn.peername))
            self.close_link(link, FATAL_HELLO, error.code)

    def touch(self, mesh: Mesh) -> None:
        """Has `mesh` committed at the end of this turn."""
        self.changed[mesh.id] = mesh
        self.schedule()

    def commit_now(self, mesh: Mesh) -> None:
        """Ends the turn, for a route that goes on only with what is stored. Raises `Denied` 503."""
        self.touch(mesh)
        self.end_turn()
        if mesh in self.sick:
            raise Denied(503, "storage_error", wire.ERRORS["storage_error"])

    def undo_all(self, code: str, reason: str) -> None:
        """Undoes the turn of every mesh with an open transaction."""
        for mesh in self.meshes.values():
            if mesh.store.changed:
                self.fail_turn(mesh, code, reason)

    def attempt(self, mesh: Mesh | None, step: Callable[..., None], *args: Any) -> bool:
        """Runs a step that belongs to no frame; a store that refuses undoes the turn, nothing else."""
        try:
            step(*args)
        except sqlite3.Error as error:
            self.fail_turn(mesh, "storage_error", f"not stored: {error}")
            return False
        return True

    def later(self, link: Link, frame: dict[str, Any], work: Coroutine[Any, Any, None], code: str) -> None:
        """Runs `work`, which answers `frame` itself, beside the connection; a failure becomes an `error`, `code`
        if it is a `StoreError`. Raises `Refused` when the mesh has too much at work (SPEC SQL-9)."""
        mesh = link.mesh
        if mesh.at_work >= AT_WORK:
            work.close()
            raise Refused("rate_limited", f"{AT_WORK} requests of this mesh are at work or waiting")

        async def run() -> None:
            try:
                await work
            except storage.StoreError as error:
                self.refuse(link, frame, Refused(code, str(error)))
            except Refused as error:
                self.refuse(link, frame, error)
            except sqlite3.Error as error:
                self.fail_turn(mesh, "storage_error", f"not stored: {error}")
                self.refuse(link, frame, Refused("storage_error", wire.ERRORS["storage_error"]))
            except Exception as error:
                self.log_fault(str(frame.get("type")), error)
                self.refuse(link, frame, Refused("internal", wire.ERRORS["internal"]))
            finally:
                mesh.at_work -= 1

        mesh.at_work += 1
        self._start(run())

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    @contextlib.asynccontextmanager
    async def aside(self, link: Link, gate: asyncio.Lock | asyncio.Semaphore) -> AsyncIterator[None]:
        """The time in which a request may be at work in a thread: after those that its connection asked for before, so
        that the answers keep their order, and when `gate` has room. What the turn has written is committed, for
        the thread to see (SPEC VEC-6). A reader whose connection has ended is not served (SPEC SQL-9)."""
        async with link.aside, gate:
            if link.closed and gate is link.mesh.readers:
                raise storage.StoreError("the connection has ended")
            if link.mesh.store.changed:
                self.end_turn()
            yield

    def when_room(self, link: Link) -> None:
        """Drains the link's peer again once its socket has taken what is buffered (SPEC DELIV-12)."""
        if link.resuming is not None or link.closed or len(link.inflight) >= WINDOW:
            return  # an acknowledgement will open the window

        async def resume() -> None:
            await asyncio.sleep(0)  # after the end of this turn
            await link.conn.drain()
            link.resuming = None
            if link.peer.link is link:
                self.attempt(link.mesh, drain, self, link.mesh, link.peer)

        link.resuming = self._start(resume())

    def close_link(self, link: Link, code: int, reason: str) -> None:
        """Ends a connection at the end of the turn, behind what it is still told; its reader sees the end."""
        if not link.closed:
            link.closed, link.closing = True, (code, reason)
            self.speak(link)

    # Signed HTTP

    def signer(self, call: Call, body: bytes | None = None) -> str:
        """The key that signed a request just now and for the first time (SPEC HTTP-23, HTTP-24). Raises `Denied`.

        `body` is what is signed in place of the body, where that has not been read yet.
        """
        headers, request = call.request.headers, call.request
        key, stamp, signature = (headers.get(f"x-mesh-{name}", "") for name in ("key", "time", "signature"))
        if hex_key(key) is None or not re.fullmatch(r"\d{1,16}", stamp):
            raise Denied(401, "unauthorized", "expected the headers X-Mesh-Key, X-Mesh-Time and X-Mesh-Signature")
        if abs(self.clock() - int(stamp)) > wire.HELLO_SKEW_MS:
            raise Denied(401, "timestamp_skew", wire.ERRORS["timestamp_skew"])
        text = wire.http_text(request.method, request.target, request.body if body is None else body, int(stamp), key)
        if not wire.verify(text, signature, key):
            raise Denied(401, "bad_signature", "the signature does not verify")
        if not self.http_signatures.add(signature, self.monotonic()):
            raise Denied(401, "replayed", "this very request was accepted before")
        return key.lower()

    def authorise(self, call: Call, *, admin: bool, mesh_id: str | None = None,
                  body: bytes | None = None) -> tuple[Mesh, str | None]:
        """The mesh a request is about, and the id of the member who signed it, None for the owner.

        `admin` asks for the owner or an admin, else any member will do (SPEC HTTP-26). `mesh_id` is the mesh's, if
        it does not stand in the path. Raises `Denied`.
        """
        key = self.signer(call, body)
        mesh = self.find_mesh(call.ids[0] if mesh_id is None else mesh_id)
        if mesh is not None and key == mesh.row.owner_pubkey:
            return mesh, None
        member = mesh.by_pubkey.get(key) if mesh is not None else None
        if member is None:
            raise Denied(401, "unauthorized", "the key is no live member of that mesh")
        if admin and member.role != "admin":
            raise Denied(403, "forbidden", "only the owner or an admin may do that")
        return mesh, member.id

    # Watches

    async def _resolve(self, host: str, port: int) -> list[str]:
        """The addresses of a host, as the system knows them. Raises OSError."""
        found = await self.loop.run_in_executor(
            self.resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    @functools.cached_property
    def trust(self) -> ssl.SSLContext:
        """Whose certificates are believed: the system's; reading them takes long, so once."""
        return ssl.create_default_context()

    async def addresses(self, url: wire.Url) -> list[str]:
        """Where a watch may connect for `url` (SPEC WATCH-4). Raises OSError, `Refused`."""
        found = await self.resolve(url.host, url.port)
        allowed = found if self.settings.watch_allow_private else [a for a in found if is_public(a)]
        if not allowed:
            raise Refused("forbidden", f"{url.host} is at no public address")
        return allowed

    # Files

    def download_url(self, link: Link, file: str) -> str:
        """The address where the peer of `link`, whoever asks with it, gets a file for `TOKEN_MS` (SPEC FILE-9)."""
        try:
            base = wire.http_base(self.settings.public_url or f"{self.url.partition(':')[0]}://{link.host}")
        except UsageError:  # the client's own Host header, which need not make sense
            base = wire.http_base(self.url)
        until = self.clock() + TOKEN_MS
        proof = self.token(link.mesh.id, file, link.peer.key, until)
        return f"{base}/download/{file}?mesh={link.mesh.id}&token={link.peer.key}.{until}.{proof}"

    def token(self, mesh_id: str, file: str, key: str, until: int) -> str:
        """The unguessable part of a download address."""
        return hmac.new(self.token_secret, f"{mesh_id}|{file}|{key}|{until}".encode(), "sha256").hexdigest()

    async def disk(self, work: Callable[..., Any], *args: Any) -> Any:
        """What `work` returns, from a thread: a slow disk holds up nobody else."""
        return await self.loop.run_in_executor(self.threads, work, *args)

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """The time in which a file comes or goes: then the socket is no stranger's any more. Raises `Denied`."""
        if self.transfers >= MAX_TRANSFERS:
            raise Denied(503, "capacity", f"{MAX_TRANSFERS} files are under way; try again later")
        self.strangers.discard(asyncio.current_task())
        self.transfers += 1
        try:
            yield
        finally:
            self.transfers -= 1

    # Status hooks

    def write_status(self, mesh: Mesh, peer: Peer, status: str, source: str) -> None:
        """One write to the status machine; what it newly admits is delivered (SPEC STAT-2, DELIV-3)."""
        if peer.write_status(status, source, self.clock()):
            drain(self, mesh, peer)

    def match_hook(self, cwd: str, pid: int, session: str) -> list[tuple[Mesh, Peer]]:
        """The presences a status hook is about: by session id, else pid and cwd, else the newest in cwd, and
        that session's presences in the other meshes (SPEC STAT-4)."""
        present = [(mesh, peer) for mesh in self.meshes.values() for peer in mesh.peers.values() if peer.link is not None]
        found = [pair for pair in present if session and pair[1].session_id == session]
        here = [pair for pair in present if pair[1].where["cwd"] == cwd]
        found = found or [pair for pair in here if pair[1].where["pid"] == pid]
        if found or not here:
            return found
        newest = max(here, key=lambda pair: pair[1].connected_at)[1]
        return [pair for pair in here if (pair[1].session_id, pair[1].where["pid"]) == (newest.session_id, newest.where["pid"])]

    def stash_hook(self, cwd: str, pid: int, session: str, status: str) -> None:
        """Keeps a status for a session that has not connected yet (SPEC STAT-5)."""
        if len(self.pending_hooks) >= 1000:
            del self.pending_hooks[next(iter(self.pending_hooks))]
        self.pending_hooks.pop((cwd, pid), None)
        self.pending_hooks[cwd, pid] = (status, session, self.clock())

    def take_pending_hook(self, hello: dict[str, Any], now: int) -> str | None:
        """The status stashed for a session, by pid and cwd or by session id; it is used once (SPEC STAT-5)."""
        here = (hello.get("cwd") or "", hello.get("pid") or 0)
        for (cwd, pid), (status, session, at) in reversed(list(self.pending_hooks.items())):
            named = session and session == hello.get("sessionId")
            if now - at <= PENDING_HOOK_MS and (named or (cwd, pid) == here):
                del self.pending_hooks[cwd, pid]
                return status
        return None

    # Time

    def _ticked(self) -> None:
        try:
            self.tick()
        finally:
            self.timer = self.loop.call_later(self._until_due(), self._ticked)

    def _until_due(self) -> float:
        """Seconds until the timer has something to do, at most `TICK_SECONDS` (SPEC OPS-7)."""
        wall, now = self.clock(), self.monotonic()
        due = [(mesh.due_at - wall) / 1000 for mesh in self.meshes.values()]
        due += [mesh.sim.due - now for mesh in self.meshes.values() if mesh.sim is not None]
        return max(0.001, min(TICK_SECONDS, *due)) if due else TICK_SECONDS

    def hurry(self) -> None:
        """Has the timer go off earlier if something is due before."""
        at = self.loop.time() + self._until_due()
        if at < self.timer.when():
            self.timer.cancel()
            self.timer = self.loop.call_at(at, self._ticked)

    def tick(self) -> None:
        """All that is periodic, once a second, and all that is due (SPEC OPS-7)."""
        now = self.now = self.monotonic()
        for link in [link for link in self.waiting if now - link.opened > HELLO_SECONDS]:
            self.close_link(link, FATAL_HELLO, "no hello")  # HELLO-12
        self._forget_hooks()
        for mesh in self.meshes.values():
            self.attempt(mesh, self._tick_mesh, mesh, now)
            self.attempt(mesh, fire_due, self, mesh)
            beat(self, mesh, now)
            start_checks(self, mesh, now)

    def _forget_hooks(self) -> None:
        limit = self.clock() - PENDING_HOOK_MS
        while self.pending_hooks and next(iter(self.pending_hooks.values()))[2] < limit:
            del self.pending_hooks[next(iter(self.pending_hooks))]

    def _tick_mesh(self, mesh: Mesh, now: float) -> None:
        for link in list(mesh.links):
            self._tick_link(mesh, link, now)
        self._tick_status(mesh)
        _expire_relays(mesh, now)
        for peer in [p for p in mesh.peers.values() if p.link is None and now - p.left_at > GRACE_SECONDS]:
            end_presence(self, mesh, peer)  # PRES-5
        self._tick_claims(mesh)
        if now - mesh.pruned_at > RETENTION_SECONDS and not mesh.store.prune(self.clock()):
            mesh.pruned_at = now  # STORE-19: bounded passes, one a second until nothing is left to do
        if mesh in self.sick:
            mesh.store.probe()  # /health comes back by itself when the disk does
        if mesh.settled or mesh.store.changed:
            self.touch(mesh)
        elif mesh.unmoved:
            mesh.checkpoint()  # idle: the moment when it delays nobody

    def _tick_link(self, mesh: Mesh, link: Link, now: float) -> None:
        if now - link.heard > SILENCE_SECONDS:  # OPS-8
            link.conn.abort()
            return
        if now - link.pinged >= PING_SECONDS:
            link.pinged = now
            link.conn.ping()
        if link.written and not link.closed:
            self.settle_written(link)
        if link.peer.backlog and link.peer.link is link and takes_mail(mesh, link.peer):
            drain(self, mesh, link.peer)  # what an undone turn left behind waits no longer than this
        oldest = next(iter(link.inflight.values()), None)
        waiting = link.conn.buffered or now - link.acked < REDELIVER_SECONDS  # slow, not lost
        if oldest is not None and now - oldest.at > REDELIVER_SECONDS and not waiting and link.peer.link is link:
            late = [seq for seq, flight in link.inflight.items() if now - flight.at > REDELIVER_SECONDS]
            for seq in late:  # DELIV-8: back to the store, and out again under a new seq
                del link.by_id[link.inflight.pop(seq).id]
            link.peer.backlog = True
            drain(self, mesh, link.peer)

    def _tick_claims(self, mesh: Mesh) -> None:
        """Takes tasks back from claimers who are gone for longer than the lease (SPEC TASK-3)."""
        now = self.clock()
        for task, claimer in mesh.store.unseen_claims(now - self.settings.task_lease * 1000):
            if mesh.is_here(claimer):
                mesh.store.claimers_seen([claimer], now)
            else:
                mesh.store.reopen_task(task)

    def _tick_status(self, mesh: Mesh) -> None:
        late = self.clock() - self.settings.status_ttl
        stuck = [p for p in mesh.peers.values() if p.status == "working" and p.status_at < late]
        for peer in stuck:
            self.write_status(mesh, peer, "idle", "jsonl")  # STAT-6
        if stuck:
            self.metrics.add("broker_ttl_sweeps_total", "", len(stuck))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


# --- 21. Command line -----------------------------------------------------------------------------


def default_data() -> Path:
    """Where `claudemesh broker` keeps its meshes unless told otherwise."""
    base = os.environ.get("CLAUDEMESH_CONFIG_DIR") or str(Path.home() / ".claudemesh")
    return Path(base) / "broker"


class Options(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The options of `claudemesh broker`."""
    options = Options(prog="claudemesh broker", description="Run a broker in the foreground.")
    options.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    options.add_argument("--port", type=int, default=PORT, help="port, 0 for any free one (default: %(default)s)")
    options.add_argument("--data", type=Path, default=None, help="directory of the meshes (default: ~/.claudemesh/broker)")
    options.add_argument("--public-url", default="", metavar="URL", help="ws:// or wss:// address put into invites")
    options.add_argument("--tls-cert", default="", metavar="FILE", help="PEM certificate chain; serves wss and https")
    options.add_argument("--tls-key", default="", metavar="FILE", help="PEM key, if not in the certificate file")
    options.add_argument("--synchronous", choices=["FULL", "NORMAL", "OFF"], default="FULL",
                         help="SQLite durability; below FULL an acknowledged message can be lost with the power")
    options.add_argument("--max-message", type=int, default=wire.MAX_MESSAGE_BYTES, metavar="BYTES",
                         help="longest message (default and most: %(default)s)")
    options.add_argument("--max-connections", type=int, default=100, metavar="N", help="per mesh (default: %(default)s)")
    options.add_argument("--send-rate", type=int, default=0, metavar="N", help="messages per second and connection (default: no limit)")
    options.add_argument("--task-lease", type=int, default=TASK_LEASE_SECONDS, metavar="SECONDS",
                         help="a claimer gone for longer loses its tasks (default: %(default)s)")
    options.add_argument("--max-file", type=int, default=MAX_FILE_BYTES, metavar="BYTES", help="largest file (default: %(default)s)")
    options.add_argument("--file-quota", type=int, default=FILE_QUOTA_BYTES, metavar="BYTES",
                         help="all files of a mesh (default: %(default)s)")
    options.add_argument("--legacy-http", action="store_true",
                         help="take uploads without a signature, as stock clients send them: no proof of membership")
    options.add_argument("--embedder", default="", metavar="MODULE:FUNCTION",
                         help="compares texts by this importable function, from a list of texts to lists of floats")
    options.add_argument("--watch-allow-private", action="store_true",
                         help="members may watch URLs on private, loopback and link-local addresses")
    options.add_argument("--admin-token", default=os.environ.get("CLAUDEMESH_ADMIN_TOKEN", ""), metavar="TOKEN",
                         help="lets its bearer create meshes from other machines (or CLAUDEMESH_ADMIN_TOKEN)")
    return options


def main(argv: list[str] | None = None) -> int:
    """`claudemesh broker`: serves until SIGTERM or SIGINT. 0 after an orderly stop, 1 if it cannot serve."""
    options = vars(parser().parse_args(argv))
    options["data"] = options["data"] or default_data()
    try:
        asyncio.run(_run(Broker(log=log_to_stderr, **options)))
    except OSError as error:
        reasons = {errno.EADDRINUSE: f"port {options['port']} is taken; choose another with --port",
                   errno.EADDRNOTAVAIL: f"{options['host']} is no address of this machine"}
        print(f"claudemesh broker: {reasons.get(error.errno, error)}", file=sys.stderr)
    except (UsageError, storage.StoreError) as error:
        print(f"claudemesh broker: {error}", file=sys.stderr)
    else:
        return 0
    return 1


async def _run(broker: Broker) -> None:
    ended = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: broker.log("error", "event loop", reason=f"{context['message']}: {context.get('exception')}"[:200]))
    async with broker:
        await ended.wait()


if __name__ == "__main__":
    sys.exit(main())
