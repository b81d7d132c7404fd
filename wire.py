"""What crosses the wire: RFC 6455, HTTP/1.1, the message table, cryptography.

This module decides which bytes and which messages are legal. It knows nothing of SQL, sessions or
Claude Code, and keeps no state beyond one connection.

Theory of operation. Bytes become frames in `WebSocket`, which does no I/O and never raises for what a
peer sent: it queues the close frame that RFC 6455 asks for. `Connection` puts it on asyncio streams.
Text becomes a Python object in `decode`, and `check` holds the object against `MESSAGES`, the one
declaration of the protocol: the broker validates from it, clients build requests from it, and the
tables of SPEC.md are printed from it (`python wire.py --tables`). The cryptography is libsodium's, by
`nacl.bindings`; this module only fixes which bytes go in and which come out.

Two families of errors: `UsageError`, the caller's own mistake, and `ProtocolError`, the other side's, whose
subclasses carry the reaction. What the network does stays the `OSError` that it is.

Sections: 1 limits and errors, 2 numbers of RFC 6455, 3 masking and frames out, 4 the WebSocket without I/O,
5 HTTP/1.1 requests, 6 HTTP/1.1 answers and a GET, 7 opening handshake, 8 connections on asyncio streams, 9 text and
time, 10 the message table, 11 validation, 12 keys and signatures, 13 sealed bodies, 14 invites, 15 tables
for SPEC.md.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import functools
import hashlib
import json
import os
import re
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

import nacl.bindings as sodium
from nacl.exceptions import CryptoError

# --- 1. Limits and errors -------------------------------------------------------------------------

MAX_MESSAGE_BYTES = 2 * 1024 * 1024  #: one WebSocket message or JSON body; a 1 MiB file relays in one
HELLO_SKEW_MS = 60_000  #: largest difference between a signed time and the checker's clock, inclusive
MAX_DEPTH = 64  #: nesting of one frame; readers differ in what they can follow
PRIORITIES = ("now", "next", "low")
CAPABILITIES = ("client_ack", "session_proof", "sealed_multicast", "quiet", "inbox", "target", "events")


class UsageError(Exception):
    """The caller's own mistake: a bad argument, a call out of order, an unusable file."""


class ProtocolError(Exception):
    """The other side broke the protocol. Subclasses carry the reaction."""


class WebSocketError(ProtocolError):
    """A violation of RFC 6455; the reaction is a close frame with `code` and `reason`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{int(code)} {reason}")
        self.code, self.reason = code, reason


class HttpError(ProtocolError):
    """A request that cannot be served; the reaction is an HTTP answer with `status` and `message`."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Refused(ProtocolError):
    """A frame that is not accepted; the reaction is an `error` frame with `code` (SPEC Errors)."""

    def __init__(self, code: str, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.extra = code, message, extra


class InviteError(ProtocolError):
    """An invite that is not accepted. `code` is `malformed`, `expired` or `bad_signature`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- 2. WebSocket: numbers (RFC 6455 sections 5.2, 7.4, 11.8) -------------------------------------

class Opcode(IntEnum):
    """RFC 6455 section 5.2; every other value is reserved."""
    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(IntEnum):
    """RFC 6455 section 7.4.1 and the IANA registry; 4000 and up are claudemesh's own."""
    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005            # never on the wire: the close frame had no code
    ABNORMAL = 1006             # never on the wire: there was no close frame
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    TOO_BIG = 1009
    TRY_AGAIN_LATER = 1013
    SUPERSEDED = 4000
    REVOKED = 4001


class State(Enum):
    """Of a WebSocket. CLOSING: our close frame is out, theirs is awaited. CLOSED: nothing more is taken in."""
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


# Bits of a frame header (section 5.2)
FIN = 0x80
RSV_BITS = 0x70
OPCODE_BITS = 0x0F
CONTROL_BIT = 0x08              # set in the opcodes of control frames only
MASK_BIT = 0x80
LENGTH_16 = 126                 # the length follows in 2 bytes
LENGTH_64 = 127                 # the length follows in 8 bytes
MAX_SHORT_LENGTH = 125          # also the most a control frame may carry (section 5.5)
FIN_TEXT = FIN | Opcode.TEXT

# The first bytes that may begin a frame: between two messages, and inside a fragmented one.
_CONTROL_STARTS = {FIN | Opcode.CLOSE, FIN | Opcode.PING, FIN | Opcode.PONG}
BETWEEN_MESSAGES = frozenset({FIN_TEXT, FIN | Opcode.BINARY, int(Opcode.TEXT), int(Opcode.BINARY)} | _CONTROL_STARTS)
INSIDE_MESSAGE = frozenset({int(Opcode.CONTINUATION), FIN | Opcode.CONTINUATION} | _CONTROL_STARTS)

# Close codes a peer may send; 1004-1006 and 1015 are reserved, other ranges nobody's (section 7.4.2).
_WIRE_CLOSE_CODES = frozenset({*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)})

READ_BYTES = 65536              # one bulk read
CLOSE_TIMEOUT = 2.0             # seconds the peer has to finish a closing handshake
_MASK_POOL_BYTES = 1024         # random bytes drawn at a time for the masks of a client


# --- 3. WebSocket: masking and frames out (RFC 6455 sections 5.2, 5.3) ----------------------------

_MAX_INTEGER_WORDS = 512        # 2 KiB; above it the quadratic cost of big integers shows
_ONES = (1 << 32 * _MAX_INTEGER_WORDS) // 0xFFFFFFFF        # 0x1 00000001 ... 00000001
_XOR = tuple(bytes(a ^ b for b in range(256)) for a in range(256))


def apply_mask(payload: bytes, mask: bytes) -> bytes:
    """XOR `payload` with the 4 bytes of `mask` over and over (section 5.3); its own inverse."""
    length = len(payload)
    words = (length + 3) >> 2
    if words <= _MAX_INTEGER_WORDS:
        masks = int.from_bytes(mask, "little") * (_ONES >> 32 * (_MAX_INTEGER_WORDS - words))
        return (int.from_bytes(payload, "little") ^ masks).to_bytes(4 * words, "little")[:length]
    out = bytearray(length)
    for i in range(4):
        out[i::4] = payload[i::4].translate(_XOR[mask[i]])
    return bytes(out)


def frame(first: int, payload: bytes, mask: bytes = b"") -> bytes:
    """One frame with the first byte `first` (FIN and opcode); masked if `mask` has 4 bytes."""
    length = len(payload)
    bit = MASK_BIT if mask else 0
    if length <= MAX_SHORT_LENGTH:
        head = bytes((first, bit | length))
    elif length <= 0xFFFF:
        head = struct.pack("!BBH", first, bit | LENGTH_16, length)
    else:
        head = struct.pack("!BBQ", first, bit | LENGTH_64, length)
    if mask:
        return head + mask + apply_mask(payload, mask)
    return head + payload


def masks(random: Callable[[int], bytes] = os.urandom) -> Iterator[bytes]:
    """Endless fresh masks, "derived from a strong source of entropy" (section 5.3)."""
    while True:
        pool = random(_MASK_POOL_BYTES)
        for at in range(0, _MASK_POOL_BYTES, 4):
            yield pool[at:at + 4]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UsageError("a lone surrogate cannot be sent as text") from None


# --- 4. WebSocket: the connection without I/O (RFC 6455 sections 5 to 8) --------------------------

class WebSocket:
    """Either end of one WebSocket after its opening handshake, without I/O.

    Bytes in: `receive`, `receive_eof`. Frames out: what `text`, `binary`, `ping` and `close` return, and
    what `take_output` holds (pongs, the close frame that answers or fails). Nothing a peer sends makes
    a method raise: the connection is failed (section 7.1.7), which leaves a close frame in the output,
    CLOSED in `state` and the reason in `error`.

    Frames are cut from whatever has arrived, each whole or not at all; the head of an incomplete frame is
    judged at once, so nothing is awaited that would be refused. After the end, `_take_in` is another
    function, that discards; once our close frame is handed out, `_data` is another, that builds nothing.

    state, close_code, close_reason: see State; 1005 and 1006 as in CloseCode; None while open
    close_received: the peer sent a close frame; error: what the peer did wrong; pongs: how many came in
    """

    def __init__(self, *, server: bool, max_message: int = MAX_MESSAGE_BYTES,
                 random: Callable[[int], bytes] = os.urandom) -> None:
        self.server = server
        self.max_message = max_message
        self.state = State.OPEN
        self.close_code: int | None = None
        self.close_reason = ""
        self.close_received = False
        self.error: WebSocketError | None = None
        self.pongs = 0
        self.output = bytearray()
        self._next_mask = masks(random).__next__
        self._frame: Callable[[int, bytes], bytes] = frame if server else self._masked_frame
        self._data: Callable[[int, bytes], bytes] = self._frame
        self._take_in = self._take_in_frames
        self._expected_mask_bit = MASK_BIT if server else 0     # WS-9
        self._mask_size = 4 if server else 0
        self._held = bytearray()            # an incomplete frame,
        self._need = 0                      # and how long it must be to go on
        self._decoder: codecs.IncrementalDecoder | None = None      # of a fragmented text message
        self._between_messages()

    @property
    def ended(self) -> bool:
        """Nothing more will be taken in."""
        return self.state is State.CLOSED

    # Bytes in

    def receive(self, data: bytes) -> list[str | bytes]:
        """Take in what the socket gave; the messages it completed, text as str and binary as bytes."""
        messages: list[str | bytes] = []
        self._take_in(data, messages)
        return messages

    def receive_eof(self) -> list[str | bytes]:
        """The stream ended. Without a close frame that is 1006 (WS-19)."""
        if not self.ended:
            self._end(CloseCode.ABNORMAL, "")
        return []

    def _take_in_frames(self, data: bytes, messages: list[str | bytes]) -> None:
        if self._held:
            self._held += data
            if len(self._held) < self._need:
                return
            data, self._held = bytes(self._held), bytearray()
        try:
            self._cut(data, messages)
        except WebSocketError as error:
            self._fail(error)
        except UnicodeDecodeError:
            self._fail(WebSocketError(CloseCode.INVALID_DATA, "text is not UTF-8"))      # WS-14

    def _discard(self, data: bytes, messages: list[str | bytes]) -> None:
        """After a failure or a close frame: section 7.1.7, no further input is looked at (WS-18)."""

    def _cut(self, buffer: bytes, messages: list[str | bytes]) -> None:
        """Cut every complete frame from `buffer`, keep the rest. The hot loop."""
        at, end = 0, len(buffer)
        while end - at >= 2:
            first, body = buffer[at], at + 2
            length = buffer[at + 1] ^ self._expected_mask_bit       # 128 or more: the MASK bit is wrong
            if first not in self._legal:
                raise self._bad_start(first)
            if length > MAX_SHORT_LENGTH:
                size = self._length_size(first, length)
                if end - body < size:
                    return self._keep(buffer[at:], 2 + size)
                length = self._long_length(int.from_bytes(buffer[body:body + size], "big"), size)
                body += size
            if length > self._room and not first & CONTROL_BIT:
                raise WebSocketError(CloseCode.TOO_BIG, f"more than {self.max_message} bytes")      # WS-13
            body += self._mask_size
            stop = body + length
            if stop > end:
                return self._keep(buffer[at:], stop - at)
            payload = buffer[body:stop]
            if self.server:
                payload = apply_mask(payload, buffer[body - 4:body])
            at = stop
            if first == FIN_TEXT:
                messages.append(payload.decode())
            elif self._take_frame(first, payload, messages):
                return None
        return self._keep(buffer[at:], 2)

    def _keep(self, rest: bytes, need: int) -> None:
        self._held, self._need = bytearray(rest), need

    def _bad_start(self, first: int) -> WebSocketError:
        opcode = first & OPCODE_BITS
        if first & RSV_BITS:
            why = "reserved bit set without an extension"           # WS-7
        elif opcode not in list(Opcode):
            why = f"reserved opcode {opcode}"                       # WS-8
        elif opcode & CONTROL_BIT:
            why = "fragmented control frame"                        # WS-10
        else:                                                       # WS-11
            why = "continuation of no message" if opcode == 0 else "new message inside a fragmented one"
        return WebSocketError(CloseCode.PROTOCOL_ERROR, why)

    def _length_size(self, first: int, length: int) -> int:
        if length > LENGTH_64:                                      # WS-9
            why = "client frame without mask" if self.server else "server frame with mask"
        elif first & CONTROL_BIT:                                   # WS-10
            why = "control frame longer than 125 bytes"
        else:
            return 2 if length == LENGTH_16 else 8
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, why)

    def _long_length(self, length: int, size: int) -> int:
        """Section 5.2: the minimal number of bytes MUST be used; the top bit of 8 MUST be 0 (WS-12)."""
        if length <= (MAX_SHORT_LENGTH if size == 2 else 0xFFFF):
            raise WebSocketError(CloseCode.PROTOCOL_ERROR, "length not in its shortest form")
        if length >> 63:
            raise WebSocketError(CloseCode.PROTOCOL_ERROR, "length with its top bit set")
        return length

    # Frames in, other than a whole text message

    def _take_frame(self, first: int, payload: bytes, messages: list[str | bytes]) -> bool:
        """Act on a complete frame; True when it was the last one that matters."""
        opcode = first & OPCODE_BITS
        if opcode == Opcode.CLOSE:
            self._take_close(payload)
            return True
        if opcode == Opcode.PING:
            self.output += self._frame(FIN | Opcode.PONG, payload)  # WS-15
        elif opcode == Opcode.PONG:
            self.pongs += 1
        elif first == FIN | Opcode.BINARY:
            messages.append(payload)
        else:
            self._take_fragment(first, payload, messages)
        return False

    def _take_fragment(self, first: int, payload: bytes, messages: list[str | bytes]) -> None:
        if first & OPCODE_BITS:
            self._legal = INSIDE_MESSAGE
            self._decoder = codecs.getincrementaldecoder("utf-8")() if first == Opcode.TEXT else None
        if self._decoder is not None:
            self._decoder.decode(payload)           # WS-14: fail at the first fragment that cannot be UTF-8
        self._message += payload
        self._room -= len(payload)
        if first & FIN:
            messages.append(bytes(self._message) if self._decoder is None else self._message.decode())
            self._between_messages()

    def _between_messages(self) -> None:
        self._legal = BETWEEN_MESSAGES
        self._message = bytearray()
        self._decoder = None
        self._room = self.max_message       # bytes the message may still have

    # Closing (section 7)

    def _take_close(self, payload: bytes) -> None:
        code, reason = read_close(payload)
        self.close_received = True
        if self.state is State.OPEN:
            self.output += self._frame(FIN | Opcode.CLOSE, payload[:2])     # WS-17: the code is echoed
        self._end(code, reason)

    def _fail(self, error: WebSocketError) -> None:
        """Fail the WebSocket connection (section 7.1.7)."""
        self.error = error
        if self.state is State.OPEN:
            self.output += self._close_frame(error.code, error.reason)
        self._end(CloseCode.ABNORMAL, "")

    def _end(self, code: int, reason: str) -> None:
        self.state = State.CLOSED
        self.close_code, self.close_reason = code, reason
        self._take_in = self._discard                                # WS-18
        self._held.clear()
        self._between_messages()

    # Frames out

    def text(self, payload: str | bytes) -> bytes:
        """A text message in one frame; b"" once our close frame is out. UsageError: lone surrogate."""
        return self._data(FIN_TEXT, _utf8(payload) if isinstance(payload, str) else payload)

    def binary(self, payload: bytes) -> bytes:
        """A binary message in one frame; b"" once our close frame is out."""
        return self._data(FIN | Opcode.BINARY, payload)

    def ping(self, payload: bytes = b"") -> bytes:
        """A ping with at most 125 bytes; b"" once our close frame is out. UsageError: longer."""
        if len(payload) > MAX_SHORT_LENGTH:
            raise UsageError("a ping carries at most 125 bytes")
        return self._data(FIN | Opcode.PING, payload)

    def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> bytes:
        """The close frame that starts the closing handshake; b"" if ours is already out.

        `reason` is cut to the 123 bytes that fit. UsageError: a code that may not be sent.
        """
        if code not in _WIRE_CLOSE_CODES:
            raise UsageError(f"{code} is not a close code that may be sent")
        if self.state is not State.OPEN:
            return b""
        self.state, self._data = State.CLOSING, _nothing             # WS-16
        return self._close_frame(code, reason)

    def limit(self, max_message: int) -> None:
        """Change how long a message may be, from the next one on; to be called between two messages."""
        self.max_message = self._room = max_message

    def take_output(self) -> bytes:
        """What the peer's frames call for, to be written now; leaves the output empty.

        When it ends with a close frame, nothing follows it: answers to earlier messages are built before this.
        """
        if self.ended:
            self._data = _nothing                                    # WS-16
        taken, self.output = bytes(self.output), bytearray()
        return taken

    def _close_frame(self, code: int, reason: str) -> bytes:
        short = _utf8(reason)[:MAX_SHORT_LENGTH - 2].decode(errors="ignore")
        return self._frame(FIN | Opcode.CLOSE, struct.pack("!H", code) + short.encode())

    def _masked_frame(self, first: int, payload: bytes) -> bytes:
        return frame(first, payload, self._next_mask())              # WS-6


def _nothing(*ignored: object) -> bytes:
    """What builds and writes frames after our close frame (section 5.5.1)."""
    return b""


def read_close(payload: bytes) -> tuple[int, str]:
    """Code (1005 without one) and reason of a close frame (section 5.5.1). WebSocketError, UnicodeDecodeError."""
    if not payload:
        return CloseCode.NO_STATUS, ""
    code = int.from_bytes(payload[:2], "big")
    if code not in _WIRE_CLOSE_CODES:                                # WS-17, also for a payload of one byte
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, "invalid close code")
    return code, payload[2:].decode()


# --- 5. HTTP/1.1: heads and bodies in (RFC 9112, RFC 9110) ----------------------------------------

MAX_REQUEST_LINE = 8192         # bytes
MAX_HEADER_BYTES = 65536        # all header lines together; the sealed keys of an upload travel in one
MAX_HEADERS = 100
HEAD_TIMEOUT = 10.0             # seconds for a whole head
BODY_TIMEOUT = 60.0             # seconds for a whole body
MAX_INTERIM = 5                 # 1xx answers before the one that counts
MAX_CHUNKS = 16384              # of one chunked answer

# No quantifier below competes with its neighbour for the same characters: matching takes linear time.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9]\.[0-9])")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
_HEADER_LINE = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_HOST = re.compile(r"(?:[0-9A-Za-z._~%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


@dataclass(slots=True)
class Request:
    """The head of a request, and its body once `read_body` has run.

    target is as sent; path is its part before `?`, not percent-decoded; of a repeated query name the first
    value counts. headers: names in lower case, repeated ones joined with ", " (RFC 9110 section 5.3).
    content_length is None without the header.
    """
    method: str
    target: str
    version: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    content_length: int | None
    body: bytes = b""


async def read_request(reader: asyncio.StreamReader, *, timeout: float = HEAD_TIMEOUT) -> Request | None:
    """Read the head of a request; None if the stream ended before one began, or broke.

    Raises HttpError with the status to answer, 408 after `timeout` seconds. Nothing of the body is read:
    the route decides how long that may be.
    """
    try:
        async with asyncio.timeout(timeout):
            lines = await _read_head(reader)
    except TimeoutError:
        raise HttpError(408, "the request head took too long") from None         # HTTP-3
    except OSError:
        return None
    return parse_request(lines) if lines else None


async def read_body(request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *,
                    max_body: int, timeout: float = BODY_TIMEOUT) -> bytes:
    """Read the body into `request.body` and return it. Raises what `body_chunks` raises."""
    request.body = b"".join([chunk async for chunk in body_chunks(request, reader, writer, max_body=max_body, timeout=timeout)])
    return request.body


async def body_chunks(request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *,
                      max_body: int, timeout: float) -> AsyncIterator[bytes]:
    """The body, piece by piece as it arrives: for one that is not held in memory.

    Raises HttpError: 413 (nothing was read), 408 after `timeout` seconds, 400 when the stream ends early.
    """
    left = request.content_length or 0
    if left > max_body:
        raise HttpError(413, f"the body may have at most {max_body} bytes")       # HTTP-10
    if left and request.headers.get("expect") and request.version != "1.0":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")                            # HTTP-11
    deadline = asyncio.get_running_loop().time() + timeout
    while left:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await reader.read(min(left, READ_BYTES))
        except TimeoutError:
            raise HttpError(408, "the body took too long") from None              # HTTP-3
        except OSError:
            chunk = b""
        if not chunk:
            raise HttpError(400, "the body ended early")                          # HTTP-4
        left -= len(chunk)
        yield chunk


async def _read_head(reader: asyncio.StreamReader) -> list[str]:
    """The lines of a head without their ends; [] if the stream ended before it. HttpError: 400, 414, 431."""
    lines: list[str] = []
    room = MAX_REQUEST_LINE
    while True:
        too_long = (431, "the header is too large") if lines else (414, "the request line is too long")
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise HttpError(*too_long) from None
        except asyncio.IncompleteReadError as end:
            if not end.partial and not lines:
                return []
            raise HttpError(400, "the head ended early") from None
        room -= len(line)
        if room < 0 or (len(lines) > MAX_HEADERS and line != b"\r\n"):           # HTTP-2
            raise HttpError(*too_long)
        if not line.endswith(b"\r\n"):
            raise HttpError(400, "a line must end with CR LF")                    # HTTP-4
        if line == b"\r\n" and lines:
            return lines
        if not lines:
            room = MAX_HEADER_BYTES
        lines.append(line[:-2].decode("latin-1"))


def parse_request(lines: list[str]) -> Request:
    """The request whose head has these lines. HttpError: 400, 411, 417, 505."""
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise HttpError(400, "malformed request line")                            # HTTP-4
    method, target, version = match.groups()
    if version not in ("1.0", "1.1"):
        raise HttpError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")        # HTTP-5
    headers = parse_headers(lines[1:])
    if not _HOST.fullmatch(headers.get("host", "" if version == "1.0" else "missing/")):
        raise HttpError(400, "missing or malformed Host")                         # HTTP-6
    path, query = _split_target(target)
    return Request(method, target, version, path, query, headers, _body_length(headers, version))


def parse_headers(lines: Iterable[str]) -> dict[str, str]:
    """Header lines to a dict (see Request). HttpError(400)."""
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)    # also refuses folded lines, NUL, and a blank before the colon
        if match is None:
            raise HttpError(400, "malformed header line")                         # HTTP-4
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers:
            if name in ("host", "content-length"):
                raise HttpError(400, f"more than one {name}")                     # HTTP-7
            value = f"{headers[name]}, {value}"                                   # HTTP-9
        headers[name] = value
    return headers


def _split_target(target: str) -> tuple[str, dict[str, str]]:
    """Path and query of a target in origin, absolute or asterisk form (RFC 9112 section 3.2)."""
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        target = rest[rest.find("/"):] if "/" in rest else "/"
    if not (target.startswith("/") or target == "*") or "#" in target:
        raise HttpError(400, "malformed request target")                          # HTTP-4
    path, _, query = target.partition("?")
    return path, dict(reversed(parse_qsl(query, keep_blank_values=True)))         # HTTP-1


def _body_length(headers: dict[str, str], version: str) -> int | None:
    """The length of the body, from Content-Length alone: one framing, one reading (RFC 9112 section 6)."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers:                                            # HTTP-8
        if length is not None:
            raise HttpError(400, "Content-Length beside Transfer-Encoding")
        raise HttpError(411, "send the body with a Content-Length")
    if length is not None and not _LENGTH.fullmatch(length):
        raise HttpError(400, "malformed Content-Length")                          # HTTP-7
    if version != "1.0" and headers.get("expect", "100-continue").lower() != "100-continue":
        raise HttpError(417, "unknown expectation")                               # HTTP-11
    return None if length is None else int(length)


# --- 6. HTTP/1.1: answers out, and a GET of our own -----------------------------------------------

_FORBIDDEN_IN_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")


def response(status: int, body: bytes = b"", *, headers: Iterable[tuple[str, str]] = (), head: bool = False,
             close: bool = True, now: float | None = None) -> bytes:
    """A whole answer. `head` for HEAD: the header is that of GET, without the body.

    `Connection: close` by default: one request per connection is always correct, and enough here.
    `now` (seconds since 1970) is for the Date header. UsageError: a header that would break the framing.
    """
    start = response_head(status, len(body), headers=headers, close=close, now=now)
    return start + (b"" if head or status < 200 or status in (204, 304) else body)


def response_head(status: int, length: int, *, headers: Iterable[tuple[str, str]] = (), close: bool = True,
                  now: float | None = None) -> bytes:
    """An answer up to its body, which has `length` bytes. UsageError as `response`."""
    from email.utils import formatdate  # here, because only a server needs it

    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {formatdate(now, usegmt=True)}"]
    lines += [header_line(name, value) for name, value in headers]
    if status >= 200 and status not in (204, 304):                                # HTTP-12
        lines.append(f"Content-Length: {length}")
    if close:
        lines.append("Connection: close")                                         # HTTP-13
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def error_response(error: HttpError, *, headers: Iterable[tuple[str, str]] = (), head: bool = False) -> bytes:
    """The answer to a request that broke HTTP: its status, with the message as plain text."""
    fields = [("Content-Type", "text/plain; charset=utf-8"), *error.headers, *headers]
    return response(error.status, f"{error.message}\n".encode(), headers=fields, head=head)


def header_line(name: str, value: str) -> str:
    """One line of a header, without its end. UsageError for what would break the framing."""
    if _FORBIDDEN_IN_HEADER.search(value) or not re.fullmatch(_TOKEN, name):
        raise UsageError(f"header {name!r} cannot be sent")                       # HTTP-15
    return f"{name}: {value}"


class Url(NamedTuple):
    """The parts of an address that a connection needs: `authority` is the Host header, `target` path and query."""
    secure: bool
    host: str
    port: int
    authority: str
    target: str


class Answer(NamedTuple):
    """The final answer to a `get`: headers as in `Request`."""
    status: int
    headers: dict[str, str]
    body: bytes


async def get(url: Url, address: str, *, headers: Iterable[tuple[str, str]] = (), tls: ssl.SSLContext | None = None,
              max_body: int | None = None) -> Answer:
    """One GET on a connection to `address`, an IP address: no name is looked up here (WATCH-4).

    The certificate has to be that of `url.host` (`tls` replaces the default trust). Redirects are answers like
    others. Of the body at most `max_body` bytes are taken, none of it without `max_body`. Raises OSError,
    ProtocolError, and UsageError for a header that cannot be sent. It has no time limit of its own.
    """
    fields = {name.lower(): (name, value) for name, value in (
        ("Accept", "*/*"), ("User-Agent", "claudemesh"), *headers,
        ("Host", url.authority), ("Accept-Encoding", "identity"), ("Connection", "close"))}
    head = "\r\n".join([f"GET {url.target} HTTP/1.1", *(header_line(*field) for field in fields.values())])
    reader, writer = await asyncio.open_connection(
        address, url.port, limit=MAX_HEADER_BYTES, ssl=(tls or True) if url.secure else None,
        server_hostname=url.host if url.secure else None)                         # WATCH-5
    try:
        writer.write(f"{head}\r\n\r\n".encode("latin-1"))
        status, answered = await _answer_head(reader)
        body = await _answer_body(reader, status, answered, max_body) if max_body is not None else b""
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise ProtocolError("the answer ended early, or is no HTTP") from None
    finally:
        writer.transport.abort()
    return Answer(status, answered, body)


async def _answer_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and header of the final answer, past at most MAX_INTERIM interim ones (RFC 9110 section 15.2)."""
    for _ in range(MAX_INTERIM + 1):
        lines = await _read_head(reader)
        match = _STATUS_LINE.fullmatch(lines[0]) if lines else None
        if match is None:
            raise ProtocolError("no HTTP answer")
        if match[1] >= "200":
            return int(match[1]), parse_headers(lines[1:])
    raise ProtocolError("too many interim answers")


async def _answer_body(reader: asyncio.StreamReader, status: int, headers: dict[str, str], room: int) -> bytes:
    """The body by RFC 9112 section 6.3. ProtocolError beyond `room` bytes; no byte beyond is awaited (WATCH-6)."""
    if status in (204, 304):
        return b""
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked":
            raise ProtocolError("a transfer coding that nobody asked for")
        return await _read_chunks(reader, room)
    if "content-length" in headers:
        if not _LENGTH.fullmatch(headers["content-length"]):
            raise ProtocolError("malformed Content-Length")
        return await reader.readexactly(_within(int(headers["content-length"]), room))
    body = b""
    while data := await reader.read(READ_BYTES):
        body += data
        _within(len(body), room)
    return body


async def _read_chunks(reader: asyncio.StreamReader, room: int) -> bytes:
    """A chunked body (RFC 9112 section 7.1) without its trailers; in few chunks, since each costs a look."""
    body = b""
    for _ in range(MAX_CHUNKS):
        match = _CHUNK.fullmatch(await reader.readuntil(b"\r\n"))
        if match is None:
            raise ProtocolError("malformed chunk")
        size = int(match[1], 16)
        if not size:
            return body
        body += await reader.readexactly(_within(len(body) + size, room) - len(body))
        if await reader.readexactly(2) != b"\r\n":
            raise ProtocolError("malformed chunk")
    raise ProtocolError("the answer is cut into too many pieces")


def _within(length: int, room: int) -> int:
    if length > room:
        raise ProtocolError(f"the answer is longer than {room} bytes")
    return length


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, first: bool = True) -> None:
    """Close a stream so that what was written arrives, in at most CLOSE_TIMEOUT seconds; never raises OSError.

    A socket closed with unread input is reset, and the reset can overtake the last answer. So, as the
    one to close `first`, end our direction; then read until the other side has ended its own.
    """
    transport = writer.transport
    abort = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, transport.abort)
    with contextlib.suppress(OSError):
        if first and writer.can_write_eof() and not transport.is_closing():
            writer.write_eof()                      # HTTP-14
        if not first or writer.can_write_eof():     # TLS has no half-close, but its own goodbye
            while await reader.read(READ_BYTES):
                pass
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    abort.cancel()


# --- 7. WebSocket: opening handshake (RFC 6455 section 4) -----------------------------------------

WS_VERSION = "13"
WS_SCHEMES, HTTP_SCHEMES = {"ws": False, "wss": True}, {"http": False, "https": True}
_KEY = re.compile(r"[0-9A-Za-z+/]{22}==")       # 16 bytes in base64
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_UPGRADE_REQUIRED = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", WS_VERSION))


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest()).decode()


def wants_upgrade(request: Request) -> bool:
    """Whether the request asks for a WebSocket, rightly or not."""
    return "websocket" in _tokens(request.headers, "upgrade")


def upgrade_response(request: Request) -> bytes:
    """Section 4.2: the 101 answer to a client's opening handshake. HttpError if it is not a right one.

    No subprotocol and no extension is ever selected (WS-4). Origin is not looked at: a browser page has no
    authority of its own here, hello is signed.
    """
    _check_upgrade_request(request)
    return ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept_key(request.headers['sec-websocket-key'])}\r\n\r\n").encode()


def _check_upgrade_request(request: Request) -> None:
    """Section 4.2.1, item by item."""
    headers = request.headers
    if request.method != "GET":
        raise HttpError(405, "a WebSocket is opened with GET", [("Allow", "GET")])                  # WS-1
    if not wants_upgrade(request) or "upgrade" not in _tokens(headers, "connection"):
        raise HttpError(426, "this address speaks WebSocket", _UPGRADE_REQUIRED)                    # WS-1
    if request.version != "1.1":
        raise HttpError(400, "a WebSocket needs HTTP/1.1")                                          # WS-1
    if headers.get("sec-websocket-version") != WS_VERSION:
        raise HttpError(426, "only WebSocket version 13 is spoken here", _UPGRADE_REQUIRED)         # WS-3
    if not _KEY.fullmatch(headers.get("sec-websocket-key", "")):
        raise HttpError(400, "Sec-WebSocket-Key must be 16 bytes in base64")                        # WS-2
    if request.content_length:
        raise HttpError(400, "an opening handshake has no body")                                    # WS-1


def _tokens(headers: dict[str, str], name: str) -> set[str]:
    return {token.strip(" \t").lower() for token in headers.get(name, "").split(",")}


def upgrade_request(authority: str, target: str, key: str) -> bytes:
    """Section 4.1: a client's opening handshake."""
    return (f"GET {target} HTTP/1.1\r\nHost: {authority}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: {WS_VERSION}\r\n\r\n").encode()


def check_upgrade_response(lines: list[str], key: str) -> None:
    """Section 4.1: whether the head with these lines accepts the handshake with `key`.

    Raises HttpError with the status received if that is not 101 (redirects are not followed), and
    WebSocketError for a 101 that is not right (WS-5).
    """
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, "malformed status line")
    if match[1] != "101":
        raise HttpError(int(match[1]), match[2] or "no WebSocket here")
    try:
        headers = parse_headers(lines[1:])
    except HttpError as error:
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, error.message) from None
    if _tokens(headers, "upgrade") != {"websocket"} or "upgrade" not in _tokens(headers, "connection"):
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, "101 without an upgrade to websocket")
    if headers.get("sec-websocket-accept") != accept_key(key):
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, "101 with the wrong Sec-WebSocket-Accept")
    if "sec-websocket-extensions" in headers or "sec-websocket-protocol" in headers:
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, "101 selects what was not offered")


# --- 8. WebSocket: the connection over asyncio streams --------------------------------------------

class Tap(asyncio.StreamReader):
    """A stream reader that can pass on what arrives from the transport's own callback.

    Waking a task for each read costs as much as all the work on a frame; a broker has two reads a message.
    """

    sink: Callable[[bytes], None] | None = None

    def divert(self, sink: Callable[[bytes], None]) -> None:
        """From now on call `sink` with what arrives, first with what is here already; b"" is the end."""
        here = bytes(self._buffer)
        self._buffer.clear()
        self._maybe_resume_transport()
        if here:
            sink(here)
        if self.at_eof():
            sink(b"")
        self.sink = sink

    def feed_data(self, data: bytes) -> None:
        """Called by the transport."""
        if self.sink is None:
            super().feed_data(data)
        else:
            self.sink(data)

    def feed_eof(self) -> None:
        """Called by the transport, at the end of the stream or when it broke."""
        super().feed_eof()
        if self.sink is not None:
            self.sink(b"")

    def set_exception(self, exc: Exception) -> None:
        """Called by the transport when it broke: the stream has ended."""
        super().set_exception(exc)
        if self.sink is not None:
            self.sink(b"")


async def serve(client: Callable[[Tap, asyncio.StreamWriter], Coroutine[Any, Any, None]], host: str, port: int, *,
                tls: ssl.SSLContext | None = None) -> asyncio.Server:
    """Listen, and run `client` as a task for each socket, as `asyncio.start_server` does, with a `Tap` to read from.

    Raises OSError.
    """
    loop = asyncio.get_running_loop()

    def protocol() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(Tap(limit=MAX_HEADER_BYTES, loop=loop), client, loop=loop)

    return await loop.create_server(protocol, host, port, ssl=tls)


def _below(writer: asyncio.StreamWriter) -> asyncio.WriteTransport | None:
    """TLS: asyncio's transport says only what waits for encryption; the socket's own buffer lies below."""
    return getattr(getattr(writer.transport, "_ssl_protocol", None), "_transport", None)


def unsent(writer: asyncio.StreamWriter) -> int:
    """Bytes written that the socket has not taken yet."""
    return sum(transport.get_write_buffer_size() for transport in (writer.transport, _below(writer)) if transport is not None)


class Connection:
    """A WebSocket on a stream, either side. One task calls `receive` or `pump`; anything may write.

    `write` puts framed bytes on the socket, without waiting and without failing: to a peer
    that has gone, or after our close frame, it does nothing. `buffered` says how much has not left yet.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ws: WebSocket) -> None:
        self.reader = reader
        self.writer = writer
        self.ws = ws
        self.peername = writer.get_extra_info("peername")
        self.write: Callable[[bytes], object] = self._write
        self._owner: asyncio.Task[object] | None = None     # the task that receives
        self._deadline: asyncio.TimerHandle | None = None
        self._held: asyncio.Task[None] | None = None
        self._below = _below(writer)

    @classmethod
    def accept(cls, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *,
               max_message: int = MAX_MESSAGE_BYTES) -> Connection:
        """Answer the opening handshake read from `reader`. HttpError if it is not a right one."""
        writer.write(upgrade_response(request))
        return cls(reader, writer, WebSocket(server=True, max_message=max_message))

    def _write(self, data: bytes) -> None:
        if not self.writer.transport.is_closing():  # asyncio complains on stderr about writes to a broken socket
            self.writer.transport.write(data)

    @property
    def buffered(self) -> int:
        """Bytes written that the socket has not taken yet."""
        size = self.writer.transport.get_write_buffer_size()
        return size if self._below is None else size + self._below.get_write_buffer_size()

    @property
    def alive(self) -> bool:
        """Whether what is written still goes to an open socket, as far as is known."""
        return not (self.ws.ended or self.writer.transport.is_closing())

    async def receive(self) -> list[str | bytes] | None:
        """The messages one bulk read completes, possibly none; None once the connection is at its end.

        Pongs are written at once; the close frame that answers or fails only by the call that returns None,
        so that the answers to the messages before it still go first, even those written at the end of the turn.
        """
        ws = self.ws
        self._owner = asyncio.current_task()
        if not ws.ended:
            try:
                data = await self.reader.read(READ_BYTES)
            except OSError:                 # reset, broken TLS: the stream has ended
                data = b""
            messages = ws.receive(data) if data else ws.receive_eof()
            if ws.output and not ws.ended:
                self.writer.write(ws.take_output())
                await self.drain()          # WS-15: who pings and does not read is not read either
            if messages or not ws.ended:
                return messages
        await asyncio.sleep(0)              # WS-16: what this turn still writes comes first
        if ws.output:
            self.writer.write(ws.take_output())
        self.write = _nothing
        return None

    async def pump(self, handle: Callable[[list[str | bytes]], None]) -> None:
        """Call `handle` with the messages each read completes, until the connection is at its end; needs a `Tap`.

        `handle` runs in the transport's callback and must not raise. Call `close` afterwards: it writes the
        close frame that answers or fails, after whatever was still to be written (WS-16).
        """
        ended = asyncio.get_running_loop().create_future()

        def sink(data: bytes) -> None:
            ws = self.ws
            messages = ws.receive(data) if data else ws.receive_eof()
            if ws.output and not ws.ended:
                self.write(ws.take_output())
                self.hold(READ_BYTES)        # WS-15: who pings and does not read is not read either
            if data:
                handle(messages)             # also [], so that whoever counts silence hears pongs and fragments
            if ws.ended and not ended.done():
                ended.set_result(None)

        self._owner = asyncio.current_task()
        self.reader.divert(sink)
        await ended

    def hold(self, limit: int) -> None:
        """Stop reading while more than `limit` bytes wait for a peer that does not read."""
        if self._held is None and self.buffered > limit:
            self.writer.transport.pause_reading()
            self._held = asyncio.get_running_loop().create_task(self._resume())

    async def _resume(self) -> None:
        await self.drain()
        self._held = None
        self.writer.transport.resume_reading()

    def send(self, payload: str | bytes) -> None:
        """One text message, one write. UsageError: lone surrogate."""
        self.write(self.ws.text(payload))

    def ping(self, payload: bytes = b"") -> None:
        """Ask for a pong; `ws.pongs` counts those that come."""
        self.write(self.ws.ping(payload))

    async def drain(self) -> None:
        """Wait until the write buffer has room, or the peer has gone."""
        with contextlib.suppress(OSError):
            await self.writer.drain()

    def begin_close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send the close frame; CLOSE_TIMEOUT seconds later the socket is gone. For tasks that do not read."""
        if self._deadline is None:
            self.write(self.ws.close(code, reason))
            self.write = _nothing
            self._deadline = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort)

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Close in at most CLOSE_TIMEOUT seconds: close frame, the peer's, the socket. Never raises OSError.

        Messages that still arrive are discarded. Where another task receives, that one sees the end and
        should then call `close` too; here it is only awaited.
        """
        self.begin_close(code, reason)
        if self._owner not in (None, asyncio.current_task()) and not self._owner.done():
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()
            return
        while await self.receive() is not None:
            pass
        await hang_up(self.reader, self.writer, first=self.ws.server)   # WS-20: the server closes first
        if self._deadline is not None:
            self._deadline.cancel()

    def abort(self) -> None:
        """Drop the socket now, unsent bytes included."""
        self.write = _nothing
        self.writer.transport.abort()


async def connect(url: str, *, tls: ssl.SSLContext | None = None, timeout: float = 10.0,
                  max_message: int = MAX_MESSAGE_BYTES) -> Connection:
    """Open a WebSocket to `url` (ws:// or wss://; `tls` replaces the default trust of wss).

    Raises UsageError for a wrong URL; OSError when the network, TLS or `timeout` (seconds for all of it)
    fails; HttpError when the answer is not 101, with its status; WebSocketError when it breaks the protocol.
    """
    place = split_url(url, WS_SCHEMES)
    key = base64.b64encode(os.urandom(16)).decode()
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(
                place.host, place.port, ssl=(tls or True) if place.secure else None)
            try:
                writer.write(upgrade_request(place.authority, place.target, key))
                check_upgrade_response(await _read_answer(reader), key)
            except BaseException:
                writer.transport.abort()
                raise
    except TimeoutError:
        raise TimeoutError(f"no WebSocket at {place.authority} within {timeout} s") from None
    return Connection(reader, writer, WebSocket(server=False, max_message=max_message))


async def _read_answer(reader: asyncio.StreamReader) -> list[str]:
    try:
        lines = await _read_head(reader)
    except HttpError as error:
        raise WebSocketError(CloseCode.PROTOCOL_ERROR, error.message) from None
    if not lines:
        raise ConnectionAbortedError("the connection ended during the opening handshake")
    return lines


def split_url(url: str, schemes: dict[str, bool]) -> Url:
    """The parts of a URL (RFC 6455 section 3, RFC 9110 section 4.2) whose scheme is one of `schemes`, which say
    whether it is served over TLS. UsageError, also for a user name or a fragment in it."""
    expected = " or ".join(f"{scheme}://" for scheme in schemes)
    try:
        parts = urlsplit(url)
        secure = schemes[parts.scheme]
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        host.encode("idna")
    except (ValueError, KeyError):
        raise UsageError(f"not a {expected} URL: {url[:200]!r}") from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not host or "@" in parts.netloc or "#" in url or not re.fullmatch(r"[!-~]+", parts.netloc + target):
        raise UsageError(f"not a {expected} URL: {url[:200]!r}")
    return Url(secure, host, port, parts.netloc, target)


# --- 9. Text and time -----------------------------------------------------------------------------

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False,
                           check_circular=False).encode


def _finite(text: str) -> float:
    value = float(text)
    if value - value:  # an exponent beyond a double's range reads as infinity, which is no JSON
        raise ValueError(f"number out of range: {text[:20]}")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant).decode


def encode(frame: Any) -> str:
    """The compact JSON text of `frame`: no spaces, non-ASCII kept. Raises `UsageError` for what JSON
    cannot say (NaN, a set, a key that is no string)."""
    try:
        return _encode(frame)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"not representable as JSON: {error}") from None


def read_json(text: str | bytes, depth: int = MAX_DEPTH) -> Any:
    """The JSON value in `text`, nested at most `depth` levels. Raises `Refused("malformed")` (SPEC MSG-2)."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = _decode(text)
        if "\\u" in text:  # MSG-2: a lone surrogate could never be sent on
            _encode(value).encode()
        if text.count("[") + text.count("{") > depth and _depth(value) > depth:
            raise Refused("malformed", f"nested more than {depth} deep")
    except RecursionError:
        raise Refused("malformed", "nested too deeply") from None
    except ValueError as error:
        raise Refused("malformed", f"not JSON: {error}"[:200]) from None
    return value


def decode(text: str | bytes) -> dict[str, Any]:
    """The JSON object in one message, a binary one too (SPEC MSG-1). Raises `Refused("malformed")`."""
    frame = read_json(text)
    if type(frame) is not dict:
        raise Refused("malformed", "a frame is a JSON object")
    return frame


def _depth(value: Any) -> int:
    """How deep the containers in `value` are nested, level by level."""
    depth, level = 0, [value]
    while level := [item for item in level if type(item) in (dict, list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if type(item) is dict else item)]
    return depth


_second = (0, "1970-01-01T00:00:00")  # the last second formatted; most calls share it


def iso(ms: int) -> str:
    """`ms` (milliseconds since 1970) as ISO 8601 UTC with three decimals and `Z` (SPEC MSG-7)."""
    global _second
    seconds, rest = divmod(ms, 1000)
    if seconds != _second[0]:
        _second = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
    return f"{_second[1]}.{rest:03d}Z"


_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
MAX_FILE_NAME = 255  #: bytes


def file_name_fault(name: str) -> str | None:
    """What keeps `name` from being a file's on any system, or None (SPEC FILE-5)."""
    if not name.strip() or name in (".", ".."):
        return "is empty"
    if not name.isprintable():  # lone surrogates and line separators among them
        return "has characters that cannot be shown"
    if len(name.encode()) > MAX_FILE_NAME:
        return f"is longer than {MAX_FILE_NAME} bytes"
    if "/" in name or "\\" in name:
        return "has a separator"
    if name != name.strip() or name.endswith(".") or _RESERVED.fullmatch(name):
        return "is reserved"
    return None


def header_text(text: str) -> str:
    """`text` for a header, which can carry no more than Latin-1 (RFC 8187 without a language)."""
    return text if text.isascii() and not text.startswith("UTF-8''") else "UTF-8''" + quote(text, safe="")


def read_header_text(value: str) -> str | None:
    """What `header_text` wrote, or a stock client, which writes its bytes as they are; None if it is no text."""
    data = unquote_to_bytes(value[7:]) if value.startswith("UTF-8''") else value.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None if value.startswith("UTF-8''") else value


def http_base(ws_url: str) -> str:
    """The HTTP address of the broker behind `ws_url`: scheme changed, path and default port dropped
    (SPEC HTTP-20). Raises `UsageError` for anything but ws:// and wss://."""
    try:
        parts = urlsplit(ws_url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"not an address: {ws_url}: {error}") from None
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise UsageError(f"not a ws:// or wss:// address: {ws_url}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{scheme}://{host}" + (f":{port}" if port not in (None, {"http": 80, "https": 443}[scheme]) else "")


# --- 10. The message table ------------------------------------------------------------------------
# One line a message: name(fields) -> reply. Types are `string`, `number`, `boolean`, `object`, `any`,
# [items], {fields}, a named shape, or alternatives divided by |, where other words are literal
# strings and `null` allows null. `?` marks a field that may be absent. Any frame may also carry
# `type`, `_reqId` and fields that are not declared (MSG-5). A heading is a chapter of SPEC.md.

SHAPES = {
    "Group": "{name: string, role?: string}",
    "Tool": "{name: string, description: string, inputSchema: object}",
    "Stats": "{messagesIn?: number, messagesOut?: number, toolCalls?: number, uptime?: number, errors?: number}",
    "Profile": "{avatar?: string, title?: string, bio?: string, capabilities?: [string]}",
}

CLIENT_TABLE = """
# Handshake
hello(meshId: string, memberId: string, pubkey: string, sessionPubkey?: string, displayName?: string,
    sessionId?: string, pid?: number, cwd?: string, hostname?: string, peerType?: ai|human|connector, channel?:
    string, model?: string, groups?: [Group], timestamp: number, signature: string, capabilities?: [string],
    sessionSignature?: string, status?: idle|working|dnd) -> hello_ack
# Delivery
send(targetSpec: string, priority?: now|next|low, nonce: string, ciphertext: string, id?: string,
    client_message_id?: string, sealedKeys?: object) -> ack
client_ack(brokerMessageId?: string, upTo?: number, stage?: delivered|shown)
message_status(messageId: string) -> message_status_result
# Presence
set_status(status: idle|working|dnd)
set_summary(summary?: string)
set_stats(stats?: Stats)
set_visible(visible: boolean) -> ack
set_reach(ways: [channel|hooks|wake])
set_profile(avatar?: string, title?: string, bio?: string, capabilities?: [string]) -> ack
join_group(name: string, role?: string)
leave_group(name: string)
list_peers() -> peers_list
mesh_info() -> mesh_info_result
# State
set_state(key: string, value: any, ifVersion?: number)
get_state(key: string) -> state_result
list_state() -> state_list
# Audit
audit_query(limit?: number, offset?: number, eventType?: string) -> audit_result
audit_verify() -> audit_verify_result
# Memory and context
remember(content: string, tags?: [string]) -> memory_stored
recall(query: string) -> memory_results
forget(memoryId: string) -> ack
share_context(summary: string, filesRead?: [string], keyFindings?: [string], tags?: [string]) -> context_shared
get_context(query: string) -> context_results
list_contexts() -> context_list
# Tasks
create_task(title: string, assignee?: string, priority?: string, tags?: [string]) -> task_created
claim_task(taskId: string) -> task_list
complete_task(taskId: string, result?: string) -> task_list
list_tasks(status?: open|claimed|done|completed, assignee?: string) -> task_list
# Streams
create_stream(name: string) -> stream_created
publish(stream: string, data: any)
subscribe(stream: string) -> subscribed
unsubscribe(stream: string)
list_streams() -> stream_list
# Skills
share_skill(name: string, description: string, instructions: string, tags?: [string], manifest?: object) ->
    skill_ack
get_skill(name: string) -> skill_data
list_skills(query?: string) -> skill_list
remove_skill(name: string) -> skill_ack
skill_deploy(source: {type: zip|git, file_id?: string, url?: string, branch?: string, auth?: string}) ->
    skill_deploy_ack
# Search, SQL and graph
vector_store(collection: string, text: string, metadata?: object) -> vector_stored
vector_search(collection: string, query: string, limit?: number) -> vector_results
vector_delete(collection: string, id: string) -> ack
list_collections() -> collection_list
mesh_query(sql: string) -> mesh_query_result
mesh_execute(sql: string) -> mesh_query_result
mesh_schema() -> mesh_schema_result
graph_query(cypher: string) -> graph_result
graph_execute(cypher: string) -> graph_result
# Schedules and clock
schedule(to: string, message: string, deliverAt: number, subtype?: reminder, cron?: string, recurring?: boolean)
    -> scheduled_ack
list_scheduled() -> scheduled_list
cancel_scheduled(scheduledId: string) -> cancel_scheduled_ack
set_clock(speed: number) -> clock_status
pause_clock() -> clock_status
resume_clock() -> clock_status
get_clock() -> clock_status
# Watches and webhooks
watch(url: string, mode?: hash|json|status, extract?: string, interval?: number, notify_on?: string, headers?:
    object, label?: string) -> watch_ack
unwatch(watchId: string) -> watch_ack
watch_list() -> watch_list_result
create_webhook(name: string) -> webhook_ack
list_webhooks() -> webhook_list
delete_webhook(name: string) -> webhook_ack
# Files
get_file(fileId: string) -> file_url
list_files(query?: string, from?: string) -> file_list
file_status(fileId: string) -> file_status_result
delete_file(fileId: string) -> ack
grant_file_access(fileId: string, peerPubkey: string, sealedKey: string) -> grant_file_access_ok
peer_file_request(targetPubkey: string, filePath: string) -> peer_file_response_forward
peer_file_response(requesterPubkey: string, filePath: string, content?: string, error?: string)
peer_dir_request(targetPubkey: string, dirPath: string, pattern?: string) -> peer_dir_response_forward
peer_dir_response(requesterPubkey: string, dirPath: string, entries?: [string], error?: string)
# Tools, services and vault
mcp_register(serverName: string, description: string, tools: [Tool], persistent?: boolean) -> mcp_register_ack
mcp_unregister(serverName: string)
mcp_list() -> mcp_list_result
mcp_call(serverName: string, toolName: string, args?: object) -> mcp_call_result
mcp_call_response(callId: string, result?: any, error?: string)
mcp_deploy(server_name: string, source: {type: zip|git|npx, file_id?: string, url?: string, branch?: string,
    auth?: string, package?: string}, config?: {env?: object, memory_mb?: number, cpus?: number, network_allow?:
    [string], runtime?: node|python|bun}, scope?: any) -> mcp_deploy_status
mcp_undeploy(server_name: string) -> mcp_deploy_status
mcp_update(server_name: string) -> mcp_deploy_status
mcp_logs(server_name: string, lines?: number) -> mcp_logs_result
mcp_scope(server_name: string, scope?: any) -> mcp_scope_result
mcp_schema(server_name: string, tool_name?: string) -> mcp_schema_result
mcp_catalog() -> mcp_catalog_result
vault_set(key: string, ciphertext: string, nonce: string, sealed_key: string, entry_type: env|file, mount_path?:
    string, description?: string) -> vault_ack
vault_get(keys?: [string]) -> vault_get_result
vault_list() -> vault_list_result
vault_delete(key: string) -> vault_ack
"""

BROKER_TABLE = """
# Handshake
hello_ack(presenceId: string, memberDisplayName: string, memberProfile: {roleTag: string|null, groups: [Group],
    messageMode: push|inbox|off}, meshPolicy?: {selfEditable: {displayName: boolean, roleTag: boolean, groups:
    boolean, messageMode: boolean}}, restored?: boolean, lastSummary?: string, lastSeenAt?: string,
    restoredGroups?: [Group], restoredStats?: {messagesIn: number, messagesOut: number, toolCalls: number,
    errors: number}, capabilities?: [string], services?: [{name: string, description: string, status: string,
    tools: [Tool], deployed_by: string}])
error(code: string, message: string, id?: string, missing?: [{pubkey: string, sealable: boolean}], value?: any,
    version?: number, claimedBy?: string|null)
# Delivery
ack(id: string, messageId: string, queued: boolean, recipients?: {online: number, held: number}, version?:
    number)
push(messageId: string, meshId: string, senderPubkey: string, priority: now|next|low, nonce: string, ciphertext:
    string, createdAt: string, subtype?: reminder|system|webhook, event?: string, eventData?: any, seq?: number,
    target?: string, senderName?: string, senderMemberPubkey?: string, sealedKey?: string)
message_status_result(messageId: string, targetSpec: string, delivered: boolean, deliveredAt: string|null,
    recipients: [{name: string, pubkey: string, status: delivered|held|disconnected, state?:
    queued|pushed|delivered|shown|expired, at?: string|null}])
# Presence
peers_list(peers: [{pubkey: string, displayName: string, status: idle|working|dnd, summary: string|null, groups:
    [Group], sessionId: string, connectedAt: string, cwd: string, hostname?: string, peerType?:
    ai|human|connector, channel?: string, model?: string, stats?: Stats, visible?: boolean, memberPubkey?:
    string, reconnecting?: boolean, reach?: [string], profile?: Profile}])
mesh_info_result(mesh: string, peers: number, groups: [string], stateKeys: [string], memoryCount: number,
    fileCount: number, tasks: {open: number, claimed: number, done: number}, streams: [string], tables:
    [string], collections: [string], yourName: string, yourGroups: [Group])
# State
state_change(key: string, value: any, updatedBy: string, version?: number)
state_result(key: string, value: any, updatedAt: string, updatedBy: string, version?: number)
state_list(entries: [{key: string, value: any, updatedBy: string, updatedAt: string, version?: number}],
    truncated?: boolean)
# Audit
audit_result(entries: [{id: number, eventType: string, actor: string, payload: object, hash: string, createdAt:
    string}], total: number)
audit_verify_result(valid: boolean, entries: number, brokenAt?: number, head?: string)
# Memory and context
memory_stored(id: string)
memory_results(memories: [{id: string, content: string, tags: [string], rememberedBy: string, rememberedAt:
    string}], truncated?: boolean)
context_shared(id: string)
context_results(contexts: [{peerName: string, summary: string, filesRead: [string], keyFindings: [string], tags:
    [string], updatedAt: string}], truncated?: boolean)
context_list(contexts: [{peerName: string, summary: string, tags: [string], updatedAt: string}], truncated?:
    boolean)
# Tasks
task_created(id: string)
task_list(tasks: [{id: string, title: string, assignee: string|null, claimedBy: string|null, status:
    open|claimed|done, priority: string, createdBy: string|null, tags: [string], createdAt: string, result?:
    string|null, completedAt?: string|null}], truncated?: boolean)
# Streams
stream_created(id: string, name: string)
stream_data(stream: string, data: any, publishedBy: string)
subscribed(stream: string)
stream_list(streams: [{id: string, name: string, createdBy: string, createdAt: string, subscriberCount:
    number}], truncated?: boolean)
# Skills
skill_ack(name: string, action: shared|removed|not_found)
skill_data(skill: {name: string, description: string, instructions: string, tags: [string], author: string,
    manifest: any, createdAt: string}|null)
skill_list(skills: [{name: string, description: string, tags: [string], author: string, createdAt: string}],
    truncated?: boolean)
skill_deploy_ack(name: string, files: [string])
# Search, SQL and graph
vector_stored(id: string)
vector_results(results: [{id: string, text: string, score: number, metadata?: object}])
collection_list(collections: [string])
mesh_query_result(columns: [string], rows: [object], rowCount: number)
mesh_schema_result(tables: [{name: string, columns: [{name: string, type: string, nullable: boolean}]}])
graph_result(records: [object])
# Schedules and clock
scheduled_ack(scheduledId: string, deliverAt: number, cron?: string)
scheduled_list(messages: [{id: string, to: string, message: string, deliverAt: number, createdAt: number, cron?:
    string, firedCount?: number}])
cancel_scheduled_ack(scheduledId: string, ok: boolean)
clock_status(speed: number, paused: boolean, tick: number, simTime: string, startedAt: string)
# Watches and webhooks
watch_ack(watchId: string, url: string, mode: string, interval: number)
watch_list_result(watches: [{id: string, url: string, mode: string, label?: string, interval: number, lastHash:
    string, lastValue: string, lastCheck?: string, createdAt: string, error?: string}])
watch_triggered(watchId: string, url: string, label?: string, mode: string, oldValue: string, newValue: string,
    timestamp: string)
webhook_ack(name: string, url: string, secret: string)
webhook_list(webhooks: [{name: string, url: string, active: boolean, createdAt: string}])
# Files
file_url(fileId: string, url: string, name: string, encrypted?: boolean, sealedKey?: string, size?: number, sha256?:
    string, mimeType?: string)
file_list(files: [{id: string, name: string, size: number, tags: [string], uploadedBy: string, uploadedAt:
    string, persistent: boolean, encrypted: boolean, mimeType?: string, target?: string, expiresAt?: string}])
file_status_result(fileId: string, accesses: [{peerName: string, accessedAt: string, complete?: boolean}])
grant_file_access_ok(fileId: string, peerPubkey: string)
peer_file_request_forward(requesterPubkey: string, filePath: string)
peer_file_response_forward(filePath: string, content?: string, error?: string)
peer_dir_request_forward(requesterPubkey: string, dirPath: string, pattern?: string)
peer_dir_response_forward(dirPath: string, entries?: [string], error?: string)
# Tools, services and vault
mcp_register_ack(serverName: string, toolCount: number)
mcp_list_result(servers: [{name: string, description: string, hostedBy: string, tools: [{name: string,
    description: string}], online: boolean, offlineSince?: string}])
mcp_call_forward(callId: string, serverName: string, toolName: string, args: object, callerName: string)
mcp_call_result(result?: any, error?: string)
mcp_deploy_status(server_name: string, status: building|installing|running|failed|stopped, tools?: [Tool],
    error?: string)
mcp_logs_result(server_name: string, lines: [string])
mcp_scope_result(server_name: string, scope: any, deployed_by: string)
mcp_schema_result(server_name: string, tools: [Tool])
mcp_catalog_result(services: [{name: string, type: mcp|skill, description: string, status:
    building|installing|running|stopped|failed|crashed|restarting, tool_count: number, deployed_by: string,
    scope: any, source_type: string, runtime: string|null, created_at: string}])
vault_ack(key: string, action: stored|deleted|not_found)
vault_get_result(entries: [{key: string, ciphertext: string, nonce: string, sealed_key: string, entry_type:
    string, mount_path: string|null}])
vault_list_result(entries: [{key: string, entry_type: env|file, mount_path: string|null, description:
    string|null, updated_at: string}])
"""

#: Every error code a broker sends, with what it means.
ERRORS = {
    "capacity": "the mesh, or the broker, has no room for another connection",
    "timestamp_skew": "the time in hello is no number or more than 60 s away from the broker's clock",
    "malformed": "the frame, or a field of it, does not fit the message table",
    "bad_signature": "the hello signature does not verify",
    "replayed": "this very hello was accepted before",
    "unauthorized": "the key is no live member of that mesh",
    "bad_session_key": "the session key is not proven, or belongs to somebody else",
    "no_hello": "the connection is not authenticated yet",
    "already_authenticated": "hello was already accepted on this connection",
    "unknown_type": "no message has that type",
    "not_implemented": "this broker does not serve that message yet",
    "no_such_recipient": "the target matches nobody, neither online nor away",
    "id_conflict": "the client_message_id was used before for another content",
    "sealed_keys_missing": "the sealed body lacks the key of a recipient; `missing` names them",
    "rate_limited": "too many requests; try again later",
    "too_large": "a field is longer than its limit",
    "storage_error": "the broker could not store it; nothing was done",
    "internal": "the broker failed; nothing was done",
    "not_found": "no such object in this mesh",
    "forbidden": "the caller may not do that",
    "peer_not_found": "the addressed peer is not connected",
    "state_conflict": "the key is at another version; `value` and `version` are what it holds now",
    "task_not_claimable": "the task is not open or unknown; `claimedBy` names who has it",
    "task_not_found": "the task is unknown",
    "task_conflict": "somebody else has claimed or done the task; `claimedBy` names who",
    "vector_error": "the vector store refused",
    "graph_error": "the graph engine refused",
    "query_error": "the query was refused or failed",
    "execute_error": "the statement was refused or failed",
    "schema_error": "the schema could not be read",
    "invalid_cron": "the cron expression was rejected",
    "out_of_range": "a time or a number is outside what is allowed",
    "invalid_url": "the address is not one that can be watched",
    "audit_query_error": "the audit log could not be read",
    "audit_verify_error": "the audit log could not be verified",
    "no_clock": "the mesh has no simulation clock",
    "invalid_webhook": "the webhook's name is not acceptable",
    "webhook_exists": "a webhook of that name exists",
    "vault_error": "the vault refused",
    "invalid_name": "the name is not acceptable",
    "limit": "a limit on the number of objects is reached",
    "deploy_error": "the service could not be deployed",
    "undeploy_error": "the service could not be removed",
    "scope_error": "the scope could not be read or changed",
    "catalog_error": "the catalogue could not be read",
}


# --- 11. Validation -------------------------------------------------------------------------------

_SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "boolean": (bool,), "object": (dict,),
}


class Type:
    """One type of the table. `fault(value)` is None for a legal value, else the path to the first
    fault below it, with what was expected there."""

    def __init__(self, text: str, kinds: frozenset[type], literals: frozenset[str] = frozenset(),
                 fields: tuple[Field, ...] | None = None, items: Type | None = None) -> None:
        self.text, self.kinds, self.literals, self.fields, self.items = text, kinds, literals, fields, items

    def fault(self, value: Any) -> str | None:
        kind = type(value)
        if self.text == "any" or kind in self.kinds and not (kind is str and self.literals):
            return self._inner_fault(value, kind)
        if kind is str and value in self.literals:
            return None
        return f": expected {self.text}"

    def _inner_fault(self, value: Any, kind: type) -> str | None:
        if kind is list and self.items is not None:
            return next((f"[{i}]{fault}" for i, item in enumerate(value)
                         if (fault := self.items.fault(item)) is not None), None)
        if kind is dict and self.fields is not None:
            return next((f".{fault}" for field in self.fields
                         if (fault := field.fault(value)) is not None), None)
        return None


class Field:
    """One declared field: `name`, its `type`, and whether it is `required`."""

    def __init__(self, name: str, type: Type, required: bool) -> None:
        self.name, self.type, self.required = name, type, required
        #: the one exact Python type that needs no further look, or None
        self.quick = str if type.kinds == {str} and not type.literals else None

    def fault(self, frame: dict[str, Any]) -> str | None:
        value = frame.get(self.name)
        if value is None and not (self.required and self.name in frame):
            # MSG-4: null in an optional field counts as absent
            return f"{self.name}: missing" if self.required else None
        fault = self.type.fault(value)
        return None if fault is None else self.name + fault


class Message:
    """One message of the protocol: `name`, `direction` ("client" sends it or "broker" does), `fields`,
    the name of its `reply` or None, and the `section` of SPEC.md that explains it."""

    def __init__(self, name: str, direction: str, fields: tuple[Field, ...], reply: str | None,
                 section: str) -> None:
        self.name, self.direction, self.fields, self.reply, self.section = name, direction, fields, reply, section
        self._quick = tuple((field.name, field.quick, field) for field in fields)

    def check(self, frame: dict[str, Any]) -> None:
        """Raises `Refused("malformed")` naming the first field that does not fit (SPEC MSG-3)."""
        for name, quick, field in self._quick:
            if type(frame.get(name)) is not quick:
                fault = field.fault(frame)
                if fault is not None:
                    raise Refused("malformed", f"{self.name}.{fault}")


class _Parser:
    """Reads the notation of the tables by recursive descent."""

    def __init__(self, text: str) -> None:
        self.tokens = re.findall(r"\w+|->|[\[\]{}(),:?|]", text)
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if expected and token not in expected:
            raise AssertionError(f"table: expected {expected}, found {token!r} near {self.tokens[self.at - 5:self.at + 5]}")
        self.at += 1
        return token

    def fields(self, end: str) -> tuple[Field, ...]:
        found = []
        while self.peek() != end:
            name = self.take()
            optional = self.peek() == "?"
            if optional:
                self.take()
            self.take(":")
            found.append(Field(name, self.type(), not optional))
            if self.peek() != end:
                self.take(",")
        self.take(end)
        return tuple(found)

    def type(self) -> Type:
        start = self.at
        options = [self.option()]
        while self.peek() == "|":
            self.take()
            options.append(self.option())
        if len(options) == 1:
            return options[0]
        shaped = next((o for o in options if o.fields or o.items), options[0])
        return Type(_spell(self.tokens[start:self.at]), frozenset().union(*(o.kinds for o in options)),
                    frozenset().union(*(o.literals for o in options)), shaped.fields, shaped.items)

    def option(self) -> Type:
        start, token = self.at, self.take()
        if token == "[":
            items = self.type()
            self.take("]")
            return Type(_spell(self.tokens[start:self.at]), frozenset({list}), items=items)
        if token == "{":
            fields = self.fields("}")
            return Type(_spell(self.tokens[start:self.at]), frozenset({dict}), fields=fields)
        if token in SHAPES:
            return Type(token, frozenset({dict}), fields=_Parser(SHAPES[token]).option().fields)
        if token in _SCALARS:
            return Type(token, frozenset(_SCALARS[token]))
        if token in ("any", "null"):
            return Type(token, frozenset({type(None)}))
        return Type(token, frozenset(), frozenset({token}))


def _spell(tokens: list[str]) -> str:
    return "".join(tokens).replace(",", ", ").replace(":", ": ")


def read_type(text: str) -> Type:
    """A type in the notation of the table, for shapes that are no message."""
    return _Parser(text).type()


def _read_table(text: str, direction: str) -> dict[str, Message]:
    messages, section = {}, ""
    for block in re.split(r"\n(?=\S)", text.strip()):
        if block.startswith("#"):
            section = block[1:].strip()
            continue
        parser = _Parser(block)
        name = parser.take()
        parser.take("(")
        fields = parser.fields(")")
        reply = parser.take() if parser.peek() == "->" and parser.take() else None
        messages[name] = Message(name, direction, fields, reply, section)
    return messages


#: Every message of the protocol by name (SPEC MSG-10).
MESSAGES: dict[str, Message] = _read_table(CLIENT_TABLE, "client") | _read_table(BROKER_TABLE, "broker")


def check(frame: dict[str, Any], direction: str = "client") -> Message:
    """The declaration of `frame`, which it fits (SPEC MSG-3, MSG-6).

    `direction` says who sent it. Raises `Refused` with code `unknown_type` or `malformed`.
    """
    name = frame.get("type")
    message = MESSAGES.get(name) if type(name) is str else None
    if message is None or message.direction != direction:
        raise Refused("unknown_type", f"no such message: {str(name)[:40]}")  # MSG-6
    message.check(frame)
    return message


# --- 12. Keys and signatures ----------------------------------------------------------------------

_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}")
_HEX_SIGNATURE = re.compile(r"[0-9a-fA-F]{128}")


def hex_key(text: Any) -> str | None:
    """`text` as a key, 64 lower-case hex digits, or None if it is none (SPEC CRYPTO-1)."""
    return text.lower() if isinstance(text, str) and _HEX_KEY.fullmatch(text) else None


class KeyPair(NamedTuple):
    """An Ed25519 pair in hex: `public` 64 digits, `secret` 128 (seed, then public key)."""

    public: str
    secret: str

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair from the system's randomness."""
        return cls.from_seed(os.urandom(32))

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """The pair that belongs to a seed of 32 bytes. Raises `UsageError` for another length."""
        if len(seed) != 32:
            raise UsageError("a seed has 32 bytes")
        public, secret = sodium.crypto_sign_seed_keypair(seed)
        return cls(public.hex(), secret.hex())


def sign(text: str, secret: str) -> str:
    """The detached Ed25519 signature of `text` (UTF-8), 128 hex digits (SPEC CRYPTO-2)."""
    return sodium.crypto_sign(text.encode(), _secret_bytes(secret))[:64].hex()


def verify(text: str, signature: str, public: str) -> bool:
    """Whether `signature` (hex, either case) over `text` is by the holder of `public` (CRYPTO-2)."""
    if not _HEX_SIGNATURE.fullmatch(signature) or not _HEX_KEY.fullmatch(public):
        return False
    try:
        sodium.crypto_sign_open(bytes.fromhex(signature) + text.encode(), bytes.fromhex(public))
    except (CryptoError, UnicodeEncodeError):
        return False
    return True


def hello_text(mesh_id: str, member_id: str, pubkey: str, timestamp: int) -> str:
    """What a hello signs with the member key (SPEC HELLO-4); `timestamp` in ms."""
    return f"{mesh_id}|{member_id}|{pubkey}|{timestamp}"


def session_text(mesh_id: str, pubkey: str, session_pubkey: str, timestamp: int) -> str:
    """What a session proof signs with the session key (SPEC HELLO-7); `timestamp` in ms."""
    return f"claudemesh-session|{mesh_id}|{pubkey}|{session_pubkey}|{timestamp}"


def http_text(method: str, target: str, body: bytes, timestamp: int, pubkey: str) -> str:
    """What a signed HTTP request signs (SPEC HTTP-23); `target` is the path with its query."""
    return f"claudemesh-http|{method}|{target}|{hashlib.sha256(body).hexdigest()}|{timestamp}|{pubkey}"


#: The headers that describe an upload, in the order in which they are signed (SPEC FILE-2).
UPLOAD_HEADERS = ("content-type", "x-encrypted", "x-file-keys", "x-file-name", "x-mesh-content-sha256", "x-mesh-id",
                  "x-owner-pubkey", "x-persistent", "x-tags", "x-target-spec")


def upload_text(headers: Mapping[str, str]) -> bytes:
    """What stands for the body where an upload is signed (SPEC FILE-2): the headers that describe it, the
    digest of its content among them. `headers` has names in lower case."""
    return "".join(f"{name}:{headers.get(name, '')}\n" for name in UPLOAD_HEADERS).encode("latin-1")


def verify_hello(hello: dict[str, Any], now: int) -> str | None:
    """The error code that refuses `hello` at `now` (ms), or None (SPEC HELLO-2 to HELLO-4).

    Not checked here: that the key is a member, that this hello is new, the session key.
    """
    timestamp, pubkey, signature = hello.get("timestamp"), hello.get("pubkey"), hello.get("signature")
    if type(timestamp) not in (int, float) or abs(now - timestamp) > HELLO_SKEW_MS:
        return "timestamp_skew"  # HELLO-2, before any look at the keys
    if (hex_key(pubkey) is None or not isinstance(signature, str) or not _HEX_SIGNATURE.fullmatch(signature)
            or not isinstance(hello.get("meshId"), str) or not isinstance(hello.get("memberId"), str)):
        return "malformed"  # HELLO-3
    # JavaScript writes 1.0 as 1, and so must whoever checks its signature
    stamp = int(timestamp) if timestamp == int(timestamp) else timestamp
    text = hello_text(hello["meshId"], hello["memberId"], pubkey, stamp)
    return None if verify(text, signature, pubkey) else "bad_signature"  # HELLO-4


def _secret_bytes(secret: str) -> bytes:
    if not _HEX_SIGNATURE.fullmatch(secret):
        raise UsageError("a secret key is 128 hex digits")
    return bytes.fromhex(secret)


# --- 13. Sealed bodies ----------------------------------------------------------------------------

NONCE_BYTES = sodium.crypto_box_NONCEBYTES  # 24, for boxes and secretboxes alike
KEY_BYTES = 32
BLOB_OVERHEAD = NONCE_BYTES + 16  #: bytes by which an encrypted file is longer than its content
_PRINTABLE = re.compile("[^\x00-\x08\x0e-\x1f\x7f-\x9f]+")  # strict reading of plain bodies, CRYPTO-6


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


@functools.lru_cache(maxsize=4096)  # CRYPTO-3: Ed25519 keys as X25519 keys
def _exchange_public(public: str) -> bytes:
    return sodium.crypto_sign_ed25519_pk_to_curve25519(bytes.fromhex(public))


@functools.lru_cache(maxsize=64)
def _exchange_secret(secret: str) -> bytes:
    return sodium.crypto_sign_ed25519_sk_to_curve25519(_secret_bytes(secret))


@functools.lru_cache(maxsize=4096)
def _shared(public: str, secret: str) -> bytes:
    # the X25519 agreement costs fifty times the box itself: once a pair
    return sodium.crypto_box_beforenm(_exchange_public(public), _exchange_secret(secret))


def _shared_for_sealing(recipient: str, secret: str) -> bytes:
    key = hex_key(recipient)
    if key is None:
        raise UsageError(f"not a key: {recipient[:70]}")
    try:
        return _shared(key, secret)
    except (CryptoError, RuntimeError):
        raise UsageError(f"not a point of the curve: {key}") from None


def _box(data: bytes, recipient: str, secret: str, nonce: bytes) -> bytes:
    return sodium.crypto_box_easy_afternm(data, nonce, _shared_for_sealing(recipient, secret))


def _open_box(data: bytes, nonce: bytes, sender: str, secret: str) -> bytes | None:
    try:
        return sodium.crypto_box_open_easy_afternm(data, nonce, _shared(sender.lower(), secret))
    except (CryptoError, RuntimeError, ValueError, TypeError):
        return None


def seal_direct(text: str, recipient: str, secret: str, nonce: bytes | None = None) -> tuple[str, str]:
    """`(nonce, ciphertext)` in base64 of `text` for the holder of the key `recipient` (SPEC CRYPTO-4).

    `nonce` is 24 random bytes unless given. Raises `UsageError` if `recipient` is no usable key.
    """
    nonce = os.urandom(NONCE_BYTES) if nonce is None else nonce
    return _b64(nonce), _b64(_box(text.encode(), recipient, secret, nonce))


def open_direct(nonce: str, ciphertext: str, sender: str, secret: str) -> str | None:
    """The text `sender` sealed for the owner of `secret`, or None if it is not exactly that (CRYPTO-4)."""
    try:
        data = _open_box(_unb64(ciphertext), _unb64(nonce), sender, secret)
        return None if data is None else data.decode()
    except ValueError:  # bad base64, bad UTF-8
        return None


def plain_body(text: str) -> tuple[str, str]:
    """`(nonce, ciphertext)` of a body that is not encrypted: the nonce means nothing (CRYPTO-5)."""
    return _b64(os.urandom(NONCE_BYTES)), _b64(text.encode())


def read_plain(ciphertext: str) -> str | None:
    """The text of a body that is not encrypted, or None if it is no plain text (SPEC CRYPTO-6)."""
    try:
        text = _unb64(ciphertext).decode()
    except ValueError:
        return None
    return text if _PRINTABLE.fullmatch(text) else None


def seal_multicast(text: str, recipients: Iterable[str], secret: str) -> tuple[str, str, dict[str, str]]:
    """`(nonce, ciphertext, sealedKeys)` of `text` for several keys (SPEC CRYPTO-9).

    Raises `UsageError` if one of `recipients` is no usable key.
    """
    key, nonce = os.urandom(KEY_BYTES), os.urandom(NONCE_BYTES)
    body = sodium.crypto_secretbox_easy(text.encode(), nonce, key)
    bound = key + _digest(nonce, body)
    return _b64(nonce), _b64(body), {r: _seal_content_key(bound, r, secret) for r in recipients}


def _digest(nonce: bytes, body: bytes) -> bytes:
    """Binds a content key to its body: another holder of the key cannot put other words under it (CRYPTO-9)."""
    return hashlib.blake2b(nonce + body, digest_size=32).digest()


def _seal_content_key(bound: bytes, recipient: str, secret: str) -> str:
    own = os.urandom(NONCE_BYTES)
    return _b64(own + _box(bound, recipient, secret, own))


def open_multicast(nonce: str, ciphertext: str, sealed_key: str, sender: str, secret: str) -> str | None:
    """The text `sender` sealed for several keys, opened with one of them, or None (CRYPTO-9)."""
    try:
        sealed, own, body = _unb64(sealed_key), _unb64(nonce), _unb64(ciphertext)
        bound = _open_box(sealed[NONCE_BYTES:], sealed[:NONCE_BYTES], sender, secret)
        if bound is None or bound[KEY_BYTES:] != _digest(own, body):
            return None
        return sodium.crypto_secretbox_open_easy(body, own, bound[:KEY_BYTES]).decode()
    except (CryptoError, RuntimeError, ValueError, TypeError):
        return None


def seal_key(key: bytes, recipient: str) -> str:
    """`key` in an anonymous sealed box for `recipient`, base64 (SPEC CRYPTO-7). Raises `UsageError`."""
    public = hex_key(recipient)
    if public is None:
        raise UsageError(f"not a key: {recipient[:70]}")
    try:
        return _b64(sodium.crypto_box_seal(key, _exchange_public(public)))
    except (CryptoError, RuntimeError):
        raise UsageError(f"not a point of the curve: {public}") from None


def open_sealed_key(sealed: str, secret: str) -> bytes | None:
    """The key in a sealed box addressed to the owner of `secret`, or None (CRYPTO-7)."""
    try:
        own = _exchange_secret(secret)
        return sodium.crypto_box_seal_open(_unb64(sealed), sodium.crypto_scalarmult_base(own), own)
    except (CryptoError, RuntimeError, ValueError, TypeError):
        return None


def encrypt_blob(data: bytes, key: bytes, nonce: bytes | None = None) -> bytes:
    """The bytes stored for an encrypted file: nonce, then secretbox, 40 bytes more than `data` (CRYPTO-8)."""
    nonce = os.urandom(NONCE_BYTES) if nonce is None else nonce
    return nonce + sodium.crypto_secretbox_easy(data, nonce, key)


def decrypt_blob(blob: bytes, key: bytes) -> bytes | None:
    """The content of an encrypted file, or None if it was altered or the key is another (CRYPTO-8)."""
    try:
        return sodium.crypto_secretbox_open_easy(blob[NONCE_BYTES:], blob[:NONCE_BYTES], key)
    except (CryptoError, RuntimeError, ValueError, TypeError):
        return None


def seal_vault(value: bytes, member: str) -> dict[str, str]:
    """`ciphertext`, `nonce` and `sealed_key` of a vault entry that only the key `member` opens (CRYPTO-10)."""
    key = os.urandom(KEY_BYTES)
    blob = encrypt_blob(value, key)
    return {"ciphertext": _b64(blob[NONCE_BYTES:]), "nonce": _b64(blob[:NONCE_BYTES]), "sealed_key": seal_key(key, member)}


def open_vault(entry: dict[str, Any], secret: str) -> bytes | None:
    """The value of a vault entry, opened with the member's secret key, or None (CRYPTO-10)."""
    key = open_sealed_key(entry["sealed_key"], secret)
    try:
        return None if key is None else decrypt_blob(_unb64(entry["nonce"]) + _unb64(entry["ciphertext"]), key)
    except ValueError:
        return None


class VaultReference(NamedTuple):
    """A `$vault:` reference: the entry's `key`, whether it is a `file`, and where to `mount` it."""

    key: str
    file: bool
    mount: str | None


def vault_reference(value: str) -> VaultReference | None:
    """The reference in an environment value, or None for an ordinary value (SPEC CRYPTO-11)."""
    if not value.startswith("$vault:"):
        return None
    key, *rest = value.removeprefix("$vault:").split(":")
    file = rest[:1] == ["file"]
    return VaultReference(key, file, ":".join(rest[1:]) if file else None)


# --- 14. Invites ----------------------------------------------------------------------------------

LINK_PREFIX = "ic://join/"
_WEB_LINK = re.compile(r"https?://[^/\s?#]+(?:/[a-z]{2})?/join/([A-Za-z0-9_-]+)/?")
_BARE_TOKEN = re.compile(r"[A-Za-z0-9_-]{21,}")
_INVITE_FIELDS: dict[str, Callable[[Any], bool]] = {  # INV-1
    "v": lambda v: type(v) is int and v == 1,
    "mesh_id": lambda v: isinstance(v, str) and v != "",
    "mesh_slug": lambda v: isinstance(v, str) and v != "",
    "broker_url": lambda v: isinstance(v, str) and v != "",
    "expires_at": lambda v: type(v) in (int, float) and 0 < v < 2**40,  # before the year 36812
    "mesh_root_key": lambda v: isinstance(v, str) and v != "",
    "role": lambda v: v in ("admin", "member"),
    "owner_pubkey": lambda v: hex_key(v) is not None,
    "signature": lambda v: isinstance(v, str) and _HEX_SIGNATURE.fullmatch(v) is not None,
}


def invite_text(payload: dict[str, Any]) -> str:
    """What the mesh owner signs in an invite: the fields but the last, as they stand (SPEC INV-2)."""
    return "|".join(str(payload[name]) for name in _INVITE_FIELDS if name != "signature")


def sign_invite(payload: dict[str, Any], owner_secret: str) -> dict[str, Any]:
    """`payload` with the owner's `signature`, fields in their order (INV-2)."""
    signed = {name: payload[name] for name in _INVITE_FIELDS if name != "signature"}
    return {**signed, "signature": sign(invite_text(signed), owner_secret)}


def invite_token(payload: dict[str, Any]) -> str:
    """The text of an invite: base64url without padding of its compact JSON (SPEC INV-3)."""
    return base64.urlsafe_b64encode(encode(payload).encode()).decode("ascii").rstrip("=")


def invite_link(token: str) -> str:
    """The link a person passes on (INV-3)."""
    return LINK_PREFIX + token


def extract_token(text: str) -> str:
    """The token in a link, a web address or a bare token (SPEC INV-4). Raises `InviteError("malformed")`."""
    text = text.strip()
    if text.startswith(LINK_PREFIX):
        token = text.removeprefix(LINK_PREFIX).removesuffix("/")
        if not token:
            raise InviteError("malformed", "the invite link carries no invite")
        return token
    if (web := _WEB_LINK.fullmatch(text)) is not None:
        return web[1]
    if _BARE_TOKEN.fullmatch(text):
        return text
    raise InviteError("malformed", "not an invite: expected ic://join/..., https://HOST/join/... or the bare token")


def decode_invite(token: str) -> dict[str, Any]:
    """The payload in `token`, its shape checked (INV-1). Raises `InviteError("malformed")`."""
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        payload = decode(data)
    except (ValueError, Refused):
        raise InviteError("malformed", "the invite is damaged: it does not decode; copy the whole link") from None
    wrong = next((name for name, fits in _INVITE_FIELDS.items() if not fits(payload.get(name))), None)
    if wrong is not None:
        raise InviteError("malformed", f"the invite is damaged: field {wrong}; copy the whole link")
    return payload


def verify_invite(payload: dict[str, Any]) -> bool:
    """Whether the invite is signed by the owner key it names (INV-2)."""
    return verify(invite_text(payload), payload["signature"], payload["owner_pubkey"])


def read_invite(token: str, now_s: int) -> dict[str, Any]:
    """The payload of a good invite: shape, expiry (`now_s` in seconds), signature, in that order (INV-5).

    Raises `InviteError`.
    """
    payload = decode_invite(token)
    if payload["expires_at"] < now_s:
        raise InviteError("expired", f"the invite expired on {iso(int(payload['expires_at'] * 1000))}")
    if not verify_invite(payload):
        raise InviteError("bad_signature", "the invite was altered: its signature does not verify")
    return payload


# --- 15. Tables for SPEC.md -----------------------------------------------------------------------


def tables() -> str:
    """The protocol reference of SPEC.md in Markdown, made from `MESSAGES` and `ERRORS`."""
    lines = []
    for section in dict.fromkeys(message.section for message in MESSAGES.values()):
        lines += [f"### {section}", "", "| sent by | message | fields | reply |", "|---|---|---|---|"]
        lines += [_row(message) for message in MESSAGES.values() if message.section == section]
        lines.append("")
    lines += ["### Shapes", "", "| shape | fields |", "|---|---|"]
    lines += [f"| `{name}` | `{_escape(shape)}` |" for name, shape in SHAPES.items()]
    lines += ["", "### Errors", "", "| code | meaning |", "|---|---|"]
    lines += [f"| `{code}` | {meaning} |" for code, meaning in ERRORS.items()]
    return "\n".join(lines) + "\n"


def _row(message: Message) -> str:
    fields = ", ".join(f"`{field.name}{'' if field.required else '?'}: {_escape(field.type.text)}`"
                       for field in message.fields)
    reply = f"`{message.reply}`" if message.reply else ""
    return f"| {message.direction} | `{message.name}` | {fields} | {reply} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] != ["--tables"]:
        sys.exit("usage: python wire.py --tables")
    sys.stdout.write(tables())
