"""RFC 6455 and HTTP/1.1 as wire.py speaks them, by topic; a client twin and a server twin for every frame rule.

Frames of the other end are written as raw bytes, unmasked. `End.receives` masks them on their way to a server,
with its own plain code, so that one test body judges both sides.
"""
from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct

import pytest

import wire
import world

spec = pytest.mark.spec
MASK = bytes.fromhex("37fa213d")        # the one of RFC 6455 section 5.7


def masked(raw: bytes, mask: bytes = MASK) -> bytes:
    """The frames in `raw`, as a client has to send them."""
    out = b""
    while raw:
        first, length = raw[0], raw[1] & 0x7F
        size = {126: 2, 127: 8}.get(length, 0)
        head, raw = raw[:2 + size], raw[2 + size:]
        length = int.from_bytes(head[2:], "big") if size else length
        payload, raw = raw[:length], raw[length:]
        out += bytes((first, head[1] | 0x80)) + head[2:] + mask
        out += bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return out


class End:
    """The end under test, and what the other end sees of it."""

    def __init__(self, server: bool, max_message: int = 1000) -> None:
        self.server = server
        self.ws = wire.WebSocket(server=server, max_message=max_message, random=lambda n: MASK * (n // 4))

    def receives(self, raw: bytes) -> list[str | bytes]:
        return self.ws.receive(masked(raw) if self.server else raw)

    def as_sent(self, raw: bytes) -> bytes:
        """What `raw` looks like when this end sends it."""
        return raw if self.server else masked(raw)

    def assert_sends(self, raw: bytes) -> None:
        assert self.ws.take_output() == self.as_sent(raw)

    def assert_fails_with(self, code: int) -> None:
        """RFC 6455 section 7.1.7: a close frame with that code goes out, and the connection is over."""
        sent = self.ws.take_output()
        sent = sent if self.server else masked_back(sent)
        assert sent[0] == 0x88 and int.from_bytes(sent[2:4], "big") == code
        assert self.ws.state is wire.State.CLOSED
        assert self.ws.error is not None and self.ws.error.code == code
        assert (self.ws.close_code, self.ws.close_received) == (1006, False)

    def assert_open(self) -> None:
        assert self.ws.state is wire.State.OPEN and self.ws.take_output() == b""


def masked_back(raw: bytes) -> bytes:
    """One short masked frame, unmasked."""
    return raw[:1] + bytes((raw[1] & 0x7F,)) + bytes(byte ^ raw[2 + i % 4] for i, byte in enumerate(raw[6:]))


@pytest.fixture(params=[False, True], ids=["client", "server"])
def end(request: pytest.FixtureRequest) -> End:
    return End(server=request.param)


# --- Frames (sections 5.2 and 5.7) ---------------------------------------------------------------

RFC_HELLO_MASKED = bytes.fromhex("818537fa213d7f9f4d5158")


def test_a_client_masks_the_rfc_example_as_the_rfc_does():
    assert End(server=False).ws.text("Hello") == RFC_HELLO_MASKED


def test_a_server_sends_the_rfc_example_unmasked():
    assert End(server=True).ws.text("Hello") == bytes.fromhex("810548656c6c6f")


def test_a_server_reads_the_rfc_example():
    assert End(server=True).ws.receive(RFC_HELLO_MASKED) == ["Hello"]


def test_a_client_reads_the_rfc_example():
    assert End(server=False).ws.receive(bytes.fromhex("810548656c6c6f")) == ["Hello"]


def test_text_comes_as_str_and_binary_as_bytes(end):
    assert end.receives(b"\x81\x03\xe2\x82\xac" b"\x82\x03\xe2\x82\xac" b"\x81\x00") == ["€", b"\xe2\x82\xac", ""]


def test_frames_are_built_for_text_binary_and_ping(end):
    assert end.ws.text("€") == end.as_sent(b"\x81\x03\xe2\x82\xac")
    assert end.ws.text(b"{}") == end.as_sent(b"\x81\x02{}")
    assert end.ws.binary(b"\x00\xff") == end.as_sent(b"\x82\x02\x00\xff")
    assert end.ws.ping() == end.as_sent(b"\x89\x00")


@spec("WS-12")
@pytest.mark.parametrize("length, head", [
    (125, "817d"), (126, "817e007e"), (65535, "817effff"), (65536, "817f0000000000010000")])
def test_a_length_takes_the_fewest_bytes(length, head):
    for server in (False, True):
        sender, receiver = End(server, 70_000), End(not server, 70_000)
        sent = sender.ws.text("x" * length)
        assert sent == sender.as_sent(bytes.fromhex(head) + b"x" * length)
        assert receiver.ws.receive(sent) == ["x" * length]


@spec("WS-12")
@pytest.mark.parametrize("raw", [
    b"\x82\x7e\x00\x7d", b"\x82\x7e\x00\x00", b"\x82\x7f" + bytes(6) + b"\xff\xff", b"\x82\x7f" + bytes(7) + b"\x05",
    b"\x82\x7f\x80" + bytes(7)])
def test_a_length_in_more_bytes_than_needed_or_with_its_top_bit_set_fails(end, raw):
    end.receives(raw)
    end.assert_fails_with(1002)


STREAM = (b"\x81\x05Hello" b"\x01\x03\xe2\x82\xac" b"\x89\x02hi" b"\x00\x00" b"\x80\x01!" b"\x8a\x00"
          b"\x82\x7e\x01\x00" + bytes(range(256)) + b"\x81\x7e\x00\x80" + b"\xc3\xa9" * 64 + b"\x88\x04\x03\xe8ok")
STREAM_MESSAGES = ["Hello", "€!", bytes(range(256)), "é" * 64]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100, 10_000])
def test_it_does_not_matter_how_the_stream_is_cut_into_reads(end, step):
    stream = masked(STREAM) if end.server else STREAM
    messages = []
    for at in range(0, len(stream), step):
        messages += end.ws.receive(stream[at:at + step])
    assert messages == STREAM_MESSAGES
    end.assert_sends(b"\x8a\x02hi" b"\x88\x02\x03\xe8")
    assert (end.ws.close_code, end.ws.close_reason, end.ws.pongs) == (1000, "ok", 1)


def test_no_bytes_at_all_make_it_raise(end):
    source = random.Random(6455)
    for _ in range(500):
        ws = wire.WebSocket(server=end.server, max_message=1000)
        mutant = bytearray(masked(STREAM) if end.server else STREAM)
        for _ in range(source.randrange(1, 6)):
            mutant[source.randrange(len(mutant))] = source.randrange(256)
        for at in range(0, len(mutant), 97):
            ws.receive(bytes(mutant[at:at + 97]))
        ws.receive_eof()
        assert ws.state is wire.State.CLOSED
        assert (ws.error is None) or ws.error.code in (1002, 1007, 1009)


# --- Masking (section 5.3) -----------------------------------------------------------------------

@spec("WS-9")
def test_a_server_fails_a_frame_without_mask():
    end = End(server=True)
    assert end.ws.receive(b"\x81\x05Hello") == []
    end.assert_fails_with(1002)


@spec("WS-9")
def test_a_client_fails_a_frame_with_mask():
    end = End(server=False)
    assert end.ws.receive(RFC_HELLO_MASKED) == []
    end.assert_fails_with(1002)


@spec("WS-9")
@pytest.mark.parametrize("server, head", [(True, b"\x88\x00"), (False, b"\x88\x80"), (True, b"\x81\x7e"), (False, b"\x81\xff")])
def test_two_bytes_are_enough_to_see_a_wrong_mask_bit(server, head):
    end = End(server)
    end.ws.receive(head)
    end.assert_fails_with(1002)


@pytest.mark.parametrize("length", [*range(12), 2047, 2048, 2049, 2050, 2051, 2052, 5001])
def test_masking_is_the_exclusive_or_that_section_5_3_defines(length):
    payload = random.Random(length).randbytes(length)
    assert wire.apply_mask(payload, MASK) == bytes(byte ^ MASK[i % 4] for i, byte in enumerate(payload))
    assert wire.apply_mask(wire.apply_mask(payload, MASK), MASK) == payload


@spec("WS-6")
def test_every_frame_of_a_client_has_a_fresh_mask_from_the_random_source():
    drawn = []

    def source(size: int) -> bytes:
        drawn.append(size)
        return random.Random(len(drawn)).randbytes(size)

    client = wire.WebSocket(server=False, random=source)
    seen = [client.ping()[2:6] for _ in range(300)]
    assert len(set(seen)) == 300
    assert sum(drawn) >= 4 * 300


@spec("WS-6")
def test_without_a_given_source_two_clients_mask_differently():
    assert wire.WebSocket(server=False).ping() != wire.WebSocket(server=False).ping()


# --- Reserved bits and opcodes (section 5.2) -----------------------------------------------------

@spec("WS-7")
@pytest.mark.parametrize("bit", [0x40, 0x20, 0x10])
@pytest.mark.parametrize("start", [0x81, 0x82, 0x01, 0x88, 0x89, 0x8A])
def test_a_reserved_bit_fails(end, start, bit):
    end.receives(bytes((start | bit, 0)))
    end.assert_fails_with(1002)


@spec("WS-8")
@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_a_reserved_opcode_fails(end, opcode):
    end.receives(bytes((0x80 | opcode, 0)))
    end.assert_fails_with(1002)


# --- Fragmentation (section 5.4) -----------------------------------------------------------------

@spec("WS-11")
def test_fragments_become_one_message(end):
    assert end.receives(b"\x01\x03Hel") == []
    assert end.receives(b"\x00\x00") == []
    assert end.receives(b"\x80\x02lo" b"\x81\x01!") == ["Hello", "!"]
    assert end.receives(b"\x02\x01\xff" b"\x80\x01\xfe") == [b"\xff\xfe"]
    end.assert_open()


@spec("WS-11", "WS-15")
def test_control_frames_between_fragments_are_answered_before_the_message_is_whole(end):
    assert end.receives(b"\x01\x03Hel" b"\x89\x01p") == []
    end.assert_sends(b"\x8a\x01p")
    assert end.receives(b"\x80\x02lo") == ["Hello"]


@spec("WS-11")
@pytest.mark.parametrize("raw", [b"\x80\x01x", b"\x00\x01x", b"\x81\x01x\x80\x01x", b"\x01\x01x\x80\x01x\x00\x00"])
def test_a_continuation_of_nothing_fails(end, raw):
    end.receives(raw)
    end.assert_fails_with(1002)


@spec("WS-11")
@pytest.mark.parametrize("start", [0x81, 0x82, 0x01, 0x02])
def test_a_new_message_inside_a_fragmented_one_fails(end, start):
    end.receives(b"\x01\x01x" + bytes((start, 1)) + b"y")
    end.assert_fails_with(1002)


# --- Control frames (section 5.5) ----------------------------------------------------------------

@spec("WS-10")
@pytest.mark.parametrize("start", [0x08, 0x09, 0x0A])
def test_a_fragmented_control_frame_fails(end, start):
    end.receives(bytes((start, 0)))
    end.assert_fails_with(1002)


@spec("WS-10")
@pytest.mark.parametrize("start", [0x88, 0x89, 0x8A])
@pytest.mark.parametrize("length", [0x7E, 0x7F])
def test_a_long_control_frame_fails_as_soon_as_two_bytes_have_arrived(end, start, length):
    end.ws.receive(bytes((start, length | 0x80 if end.server else length)))
    end.assert_fails_with(1002)


@spec("WS-15")
def test_a_ping_is_answered_with_its_own_payload(end):
    end.receives(b"\x89\x00" b"\x89\x05Hello" b"\x89\x7d" + b"p" * 125)
    end.assert_sends(b"\x8a\x00" b"\x8a\x05Hello" b"\x8a\x7d" + b"p" * 125)


@spec("WS-15")
def test_a_pong_is_counted_and_not_answered(end):
    end.receives(b"\x8a\x00" b"\x8a\x7d" + b"p" * 125)
    assert end.ws.pongs == 2
    end.assert_open()


def test_a_ping_longer_than_a_control_frame_is_our_mistake(end):
    assert len(end.ws.ping(b"p" * 125)) == (127 if end.server else 131)
    with pytest.raises(wire.UsageError):
        end.ws.ping(b"p" * 126)


# --- Size of messages (section 10.4) -------------------------------------------------------------

@spec("WS-13")
def test_a_message_of_exactly_the_limit_passes(end):
    assert end.receives(b"\x81\x7e\x03\xe8" + b"x" * 1000) == ["x" * 1000]
    assert end.receives(b"\x02\x7e\x03\xe7" + b"x" * 999 + b"\x80\x01x") == [b"x" * 1000]


@spec("WS-13")
@pytest.mark.parametrize("head", [b"\x81\x7e\x03\xe9", b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00", b"\x01\x7f\x7f" + b"\xff" * 7])
def test_a_longer_message_fails_by_its_header_alone(end, head):
    end.ws.receive(head[:1] + bytes((head[1] | 0x80,)) + head[2:] if end.server else head)
    end.assert_fails_with(1009)


@spec("WS-13")
def test_the_limit_counts_all_fragments_of_a_message(end):
    assert end.receives(b"\x01\x7e\x01\xf4" + b"x" * 500 + b"\x00\x7e\x01\xf4" + b"x" * 500) == []
    end.assert_open()
    end.receives(b"\x80\x01")
    end.assert_fails_with(1009)


@spec("WS-13")
def test_the_limit_does_not_count_control_frames(end):
    end.receives(b"\x01\x7e\x03\xe8" + b"x" * 1000 + b"\x89\x02hi")
    end.assert_sends(b"\x8a\x02hi")
    assert end.receives(b"\x80\x00" b"\x81\x01x") == ["x" * 1000, "x"]


# --- UTF-8 (section 8.1) -------------------------------------------------------------------------

@spec("WS-14")
def test_a_character_may_be_split_between_fragments(end):
    assert end.receives(b"\x01\x01\xe2" b"\x00\x01\x82" b"\x80\x01\xac") == ["€"]


@spec("WS-14")
@pytest.mark.parametrize("payload", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"ok\x80"])
def test_text_that_is_not_utf_8_fails(end, payload):
    end.receives(bytes((0x81, len(payload))) + payload)
    end.assert_fails_with(1007)


@spec("WS-14")
def test_it_fails_at_the_first_fragment_that_cannot_become_utf_8(end):
    end.receives(b"\x01\x01\xe0")
    end.assert_open()
    end.receives(b"\x00\x01\x80")
    end.assert_fails_with(1007)


@spec("WS-14")
def test_a_character_cut_short_by_the_end_of_the_message_fails(end):
    end.receives(b"\x01\x02\xe2\x82" b"\x80\x00")
    end.assert_fails_with(1007)


def test_binary_need_not_be_utf_8(end):
    assert end.receives(b"\x82\x01\xff" b"\x02\x01\xff" b"\x80\x01\xfe") == [b"\xff", b"\xff\xfe"]


def test_a_lone_surrogate_is_our_mistake(end):
    with pytest.raises(wire.UsageError):
        end.ws.text("\ud800")


# --- Closing (sections 5.5.1 and 7) --------------------------------------------------------------

@spec("WS-17")
@pytest.mark.parametrize("payload, code, reason, answer", [
    (b"", 1005, "", b"\x88\x00"),
    (b"\x03\xe8", 1000, "", b"\x88\x02\x03\xe8"),
    (b"\x03\xe9bye", 1001, "bye", b"\x88\x02\x03\xe9"),
    (b"\x0f\xa0" + b"r" * 123, 4000, "r" * 123, b"\x88\x02\x0f\xa0")])
def test_a_close_frame_is_answered_with_its_code(end, payload, code, reason, answer):
    end.receives(bytes((0x88, len(payload))) + payload)
    end.assert_sends(answer)
    assert (end.ws.state, end.ws.close_code, end.ws.close_reason) == (wire.State.CLOSED, code, reason)
    assert end.ws.close_received and end.ws.error is None


@spec("WS-17")
@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999])
def test_these_close_codes_are_valid(end, code):
    end.receives(b"\x88\x02" + struct.pack("!H", code))
    end.assert_sends(b"\x88\x02" + struct.pack("!H", code))


@spec("WS-17")
@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_these_close_codes_fail_and_may_not_be_sent(end, code):
    with pytest.raises(wire.UsageError):
        end.ws.close(code)
    end.receives(b"\x88\x02" + struct.pack("!H", code))
    end.assert_fails_with(1002)


@spec("WS-17")
def test_a_close_frame_with_half_a_code_fails(end):
    end.receives(b"\x88\x01\x03")
    end.assert_fails_with(1002)


@spec("WS-14", "WS-17")
def test_a_close_reason_that_is_not_utf_8_fails(end):
    end.receives(b"\x88\x03\x03\xe8\xff")
    end.assert_fails_with(1007)


@spec("WS-16")
def test_closing_from_our_side(end):
    assert end.ws.close(1001, "shutting down") == end.as_sent(b"\x88\x0f\x03\xe9shutting down")
    assert end.ws.state is wire.State.CLOSING
    assert end.receives(b"\x81\x02hi" b"\x89\x00") == ["hi"]
    end.assert_sends(b"\x8a\x00")
    end.receives(b"\x88\x02\x03\xe9")
    assert end.ws.take_output() == b""
    assert (end.ws.state, end.ws.close_code) == (wire.State.CLOSED, 1001)


@spec("WS-16")
def test_nothing_but_pongs_follows_our_close_frame(end):
    end.ws.close()
    assert end.ws.text("x") == end.ws.binary(b"x") == end.ws.ping() == end.ws.close() == b""


@spec("WS-16")
def test_messages_before_a_close_frame_can_still_be_answered_before_the_close_frame_that_answers_it(end):
    assert end.receives(b"\x81\x02hi" b"\x88\x02\x03\xe8") == ["hi"]
    assert end.ws.text("ho") == end.as_sent(b"\x81\x02ho")
    end.assert_sends(b"\x88\x02\x03\xe8")
    assert end.ws.text("late") == b""


@spec("WS-16")
def test_messages_before_a_violation_are_handed_over_and_can_be_answered(end):
    assert end.receives(b"\x81\x02hi" b"\x83\x00" b"\x81\x02no") == ["hi"]
    assert end.ws.text("ho") == end.as_sent(b"\x81\x02ho")
    end.assert_fails_with(1002)
    assert end.ws.text("late") == b""


@spec("WS-16")
def test_a_violation_after_our_close_frame_sends_no_second_one(end):
    end.ws.close()
    end.receives(b"\x83\x00")
    assert end.ws.take_output() == b"" and end.ws.state is wire.State.CLOSED
    assert end.ws.error.code == 1002


@spec("WS-18")
@pytest.mark.parametrize("last", [b"\x88\x00", b"\x83\x00"])
def test_what_follows_the_end_is_discarded(end, last):
    end.receives(last + b"\x89\x00" b"\x81\x02no")
    end.ws.take_output()
    assert end.receives(b"\x81\x02no" b"\x89\x00" b"\x83\x00" b"\x88\x02\x03\xe9") == []
    assert end.ws.take_output() == b""
    assert end.ws.receive_eof() == []
    assert end.ws.close_code == (1005 if last == b"\x88\x00" else 1006)


@spec("WS-19")
@pytest.mark.parametrize("before", [b"", b"\x81", b"\x81\x05Hel", b"\x01\x03Hel"])
def test_a_stream_that_just_ends_is_1006(end, before):
    end.ws.receive(masked(before) if end.server and len(before) > 1 else before)
    end.ws.receive_eof()
    assert (end.ws.state, end.ws.close_code, end.ws.close_received) == (wire.State.CLOSED, 1006, False)
    assert end.ws.take_output() == end.ws.close() == b""


@pytest.mark.parametrize("reason, sent", [("r" * 200, b"r" * 123), ("é" * 100, "é".encode() * 61), ("", b"")])
def test_a_reason_is_cut_to_what_fits_between_two_characters(end, reason, sent):
    assert end.ws.close(1013, reason) == end.as_sent(bytes((0x88, 2 + len(sent))) + b"\x03\xf5" + sent)


# --- Opening handshake, server (section 4.2) -----------------------------------------------------

HANDSHAKE = """GET /chat HTTP/1.1
Host: server.example.com
Upgrade: websocket
Connection: Upgrade
Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==
Sec-WebSocket-Protocol: chat, superchat
Sec-WebSocket-Extensions: permessage-deflate
Sec-WebSocket-Version: 13"""
ACCEPTED = (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")


def request(text: str) -> wire.Request:
    return wire.parse_request(text.split("\n"))


@spec("WS-4")
def test_the_handshake_of_the_rfc_is_accepted_selecting_no_subprotocol_and_no_extension():
    assert wire.wants_upgrade(request(HANDSHAKE))
    assert wire.upgrade_response(request(HANDSHAKE)) == ACCEPTED


@spec("WS-1")
@pytest.mark.parametrize("old, new", [
    ("Upgrade: websocket", "upgrade: h2c , WebSocket"), ("Connection: Upgrade", "CONNECTION: keep-alive, upgrade"),
    ("Connection: Upgrade", "Connection: keep-alive\nConnection: UPGRADE"), ("Sec-WebSocket-Version", "sec-websocket-version"),
    ("Connection: Upgrade", "Connection: Upgrade\nContent-Length: 0")])
def test_header_names_and_the_tokens_of_upgrade_and_connection_have_no_case_and_no_place(old, new):
    assert wire.upgrade_response(request(HANDSHAKE.replace(old, new))) == ACCEPTED


@pytest.mark.parametrize("old, new, status", [
    pytest.param("GET", "POST", 405, marks=spec("WS-1")),
    pytest.param("HTTP/1.1", "HTTP/1.0", 400, marks=spec("WS-1")),
    pytest.param("Upgrade: websocket", "Upgrade: h2c", 426, marks=spec("WS-1")),
    pytest.param("Upgrade: websocket\n", "", 426, marks=spec("WS-1")),
    pytest.param("Connection: Upgrade", "Connection: close", 426, marks=spec("WS-1")),
    pytest.param("Connection: Upgrade", "Connection: Upgrade\nContent-Length: 5", 400, marks=spec("WS-1")),
    pytest.param("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25j", 400, marks=spec("WS-2")),
    pytest.param("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ", 400, marks=spec("WS-2")),
    pytest.param("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBs!SBub25jZQ==", 400, marks=spec("WS-2")),
    pytest.param("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n", "", 400, marks=spec("WS-2")),
    pytest.param("Connection", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nConnection", 400, marks=spec("WS-2")),
    pytest.param("Version: 13", "Version: 8", 426, marks=spec("WS-3")),
    pytest.param("Version: 13", "Version: 13, 8", 426, marks=spec("WS-3")),
    pytest.param("\nSec-WebSocket-Version: 13", "", 426, marks=spec("WS-3"))])
def test_a_wrong_handshake_is_refused(old, new, status):
    assert old in HANDSHAKE
    with pytest.raises(wire.HttpError) as refusal:
        wire.upgrade_response(request(HANDSHAKE.replace(old, new)))
    assert refusal.value.status == status


@spec("WS-3")
def test_the_refusal_of_a_version_names_the_right_one():
    with pytest.raises(wire.HttpError) as refusal:
        wire.upgrade_response(request(HANDSHAKE.replace("Version: 13", "Version: 8")))
    answer = wire.error_response(refusal.value)
    assert answer.startswith(b"HTTP/1.1 426 Upgrade Required\r\n")
    assert b"\r\nSec-WebSocket-Version: 13\r\n" in answer and b"\r\nUpgrade: websocket\r\n" in answer


# --- Opening handshake, client (section 4.1) -----------------------------------------------------

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPTED_LINES = ACCEPTED.decode().split("\r\n")[:-2]


@spec("WS-4")
def test_the_request_of_a_client_offers_no_subprotocol_and_no_extension():
    assert wire.upgrade_request("example.com:7900", "/ws", KEY) == (
        b"GET /ws HTTP/1.1\r\nHost: example.com:7900\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")


@spec("WS-1", "WS-5")
def test_the_two_ends_of_the_opening_handshake_fit():
    asked = wire.parse_request(wire.upgrade_request("h", "/ws", KEY).decode().split("\r\n")[:-2])
    wire.check_upgrade_response(wire.upgrade_response(asked).decode().split("\r\n")[:-2], KEY)


@spec("WS-5")
@pytest.mark.parametrize("old, new", [
    ("HTTP/1.1 101", "HTTP/2 101"), ("HTTP/1.1 101 Switching Protocols", "hello"),
    ("Upgrade: websocket", "Upgrade: h2c"), ("Upgrade: websocket", "X: y"),
    ("Connection: Upgrade", "Connection: close"), ("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "s3pPLMBiTxaQ9kYGzzhZRbK+xOO="),
    ("Sec-WebSocket-Accept", "X"), ("Upgrade: websocket", "Upgrade: websocket\nSec-WebSocket-Protocol: chat"),
    ("Upgrade: websocket", "Upgrade: websocket\nSec-WebSocket-Extensions: permessage-deflate"),
    ("Upgrade: websocket", "Upgrade : websocket")])
def test_a_client_refuses_a_wrong_101(old, new):
    lines = "\n".join(ACCEPTED_LINES).replace(old, new, 1).split("\n")
    assert lines != ACCEPTED_LINES
    with pytest.raises(wire.WebSocketError) as refusal:
        wire.check_upgrade_response(lines, KEY)
    assert refusal.value.code == 1002


@spec("WS-5")
def test_a_client_reports_any_other_status_and_follows_no_redirect():
    for line, status in [("HTTP/1.1 302 Found", 302), ("HTTP/1.1 401 Unauthorized", 401), ("HTTP/1.0 503", 503)]:
        with pytest.raises(wire.HttpError) as refusal:
            wire.check_upgrade_response([line, "Location: ws://elsewhere/"], KEY)
        assert refusal.value.status == status


# --- HTTP: heads ---------------------------------------------------------------------------------

def read(data: bytes, *, eof: bool = True, limit: int = 65536, timeout: float = 5.0) -> wire.Request | None:
    """What `read_request` makes of a stream with these bytes."""
    async def main() -> wire.Request | None:
        reader = asyncio.StreamReader(limit)
        reader.feed_data(data)
        if eof:
            reader.feed_eof()
        return await wire.read_request(reader, timeout=timeout)
    return asyncio.run(main())


def status_of(data: bytes, **options: object) -> int:
    with pytest.raises(wire.HttpError) as refusal:
        read(data, **options)
    return refusal.value.status


@spec("HTTP-1", "HTTP-9")
def test_a_request_is_taken_apart():
    got = read(b"POST /hook/a%20b?x=1&y=&x=2&z=%C3%A9 HTTP/1.1\r\nHost: localhost:7900\r\nX-Tag: a\r\n"
               b"content-LENGTH: 2 \r\nx-tag:\tb\r\nEmpty:\r\n\r\n{}")
    assert (got.method, got.version, got.target) == ("POST", "1.1", "/hook/a%20b?x=1&y=&x=2&z=%C3%A9")
    assert (got.path, got.query) == ("/hook/a%20b", {"x": "1", "y": "", "z": "é"})
    assert got.headers == {"host": "localhost:7900", "x-tag": "a, b", "content-length": "2", "empty": ""}
    assert (got.content_length, got.body) == (2, b"")


@spec("HTTP-1")
@pytest.mark.parametrize("target, path", [("http://h:1/a?b", "/a"), ("HTTPS://h", "/"), ("*", "*"), ("/?u=http://x", "/"), ("//a", "//a")])
def test_a_target_may_have_these_forms(target, path):
    assert read(f"OPTIONS {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode()).path == path


@spec("HTTP-6")
@pytest.mark.parametrize("host", ["h", "h.example:7900", "127.0.0.1", "[::1]:7900", ""])
def test_a_host_may_have_these_forms(host):
    assert read(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).headers["host"] == host


@spec("HTTP-5", "HTTP-6")
def test_http_1_0_needs_no_host():
    assert read(b"GET / HTTP/1.0\r\n\r\n").version == "1.0"


def test_a_stream_that_ends_before_a_request_or_breaks_is_no_request():
    assert read(b"") is None

    async def main() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"GET /")
        reader.set_exception(ConnectionResetError())
        assert await wire.read_request(reader) is None
    asyncio.run(main())


def head(*lines: str, line: str = "GET / HTTP/1.1", host: str = "Host: h") -> bytes:
    return "\r\n".join([line, *([host] if host else []), *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize("data, status", [
    pytest.param(data, status, marks=spec(rule), id=f"{rule}-{name}") for rule, status, name, data in [
        ("HTTP-4", 400, "bare-lf", b"GET / HTTP/1.1\nHost: h\n\n"),
        ("HTTP-4", 400, "bare-lf-in-header", b"GET / HTTP/1.1\r\nHost: h\n\r\n"),
        ("HTTP-4", 400, "bare-cr", head("X: a\rY: b")),
        ("HTTP-4", 400, "nul", head("X: a\0b")),
        ("HTTP-4", 400, "folded", head("X: a", " b")),
        ("HTTP-4", 400, "folded-by-tab", head("X: a", "\tb")),
        ("HTTP-4", 400, "blank-before-colon", head("X : a")),
        ("HTTP-4", 400, "no-colon", head("X")),
        ("HTTP-4", 400, "no-name", head(": a")),
        ("HTTP-4", 400, "name-is-no-token", head("X(: a")),
        ("HTTP-4", 400, "name-not-ascii", head("é: a")),
        ("HTTP-4", 400, "first-line-empty", b"\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
        ("HTTP-4", 400, "first-line-short", head(line="GET /")),
        ("HTTP-4", 400, "first-line-two-blanks", head(line="GET  / HTTP/1.1")),
        ("HTTP-4", 400, "first-line-tail", head(line="GET / HTTP/1.1 ")),
        ("HTTP-4", 400, "first-line-control", head(line="GET /\x01 HTTP/1.1")),
        ("HTTP-4", 400, "first-line-not-ascii", head(line="GET /é HTTP/1.1")),
        ("HTTP-4", 400, "method-is-no-token", head(line="G@T / HTTP/1.1")),
        ("HTTP-4", 400, "version-lower-case", head(line="GET / http/1.1")),
        ("HTTP-4", 400, "target-relative", head(line="GET x HTTP/1.1")),
        ("HTTP-4", 400, "target-authority", head(line="CONNECT h:80 HTTP/1.1")),
        ("HTTP-4", 400, "target-fragment", head(line="GET /#a HTTP/1.1")),
        ("HTTP-4", 400, "ends-early", b"GET / HTTP/1.1\r\nHost: h\r\n"),
        ("HTTP-4", 400, "ends-in-a-line", b"GET / HT"),
        ("HTTP-5", 505, "http-2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("HTTP-5", 505, "http-0.9", head(line="GET / HTTP/0.9")),
        ("HTTP-5", 505, "http-1.2", head(line="GET / HTTP/1.2")),
        ("HTTP-6", 400, "no-host", head(host="")),
        ("HTTP-6", 400, "two-hosts", head("host: h")),
        ("HTTP-6", 400, "host-with-path", head(host="Host: h/x")),
        ("HTTP-6", 400, "host-with-user", head(host="Host: a@h")),
        ("HTTP-7", 400, "two-lengths", head("Content-Length: 5", "content-length: 6")),
        ("HTTP-7", 400, "same-length-twice", head("Content-Length: 5", "Content-Length: 5")),
        ("HTTP-7", 400, "length-list", head("Content-Length: 5, 5")),
        ("HTTP-7", 400, "length-signed", head("Content-Length: +5")),
        ("HTTP-7", 400, "length-negative", head("Content-Length: -5")),
        ("HTTP-7", 400, "length-hex", head("Content-Length: 0x5")),
        ("HTTP-7", 400, "length-empty", head("Content-Length:")),
        ("HTTP-7", 400, "length-other-digits", head("Content-Length: \xb2")),
        ("HTTP-7", 400, "length-absurd", head("Content-Length: " + "9" * 30)),
        ("HTTP-8", 411, "chunked", head("Transfer-Encoding: chunked")),
        ("HTTP-8", 411, "other-coding", head("Transfer-Encoding: identity")),
        ("HTTP-8", 400, "chunked-and-length", head("Transfer-Encoding: chunked", "Content-Length: 5")),
        ("HTTP-11", 417, "expectation", head("Expect: the-unexpected")),
    ]])
def test_such_a_head_is_refused(data, status):
    assert status_of(data, eof=not data.endswith(b"\n\n") and b"\r\n\r\n" not in data) == status


@spec("HTTP-2")
@pytest.mark.parametrize("data, status", [
    (head(line=f"GET /{'a' * 8177} HTTP/1.1"), 414),
    (b"GET /" + b"a" * 70_000, 414),
    (head("X: " + "a" * 65521), 431),
    (head("X: " + "a" * 70_000), 431),
    (head(*["X: " + "a" * 1000] * 66), 431),
    (head(*["X: y"] * 100), 431)])
def test_a_head_over_a_limit_is_refused(data, status):
    assert status_of(data, eof=False) == status


@spec("HTTP-2")
def test_a_head_at_its_limits_passes():
    assert len(read(head(line=f"GET /{'a' * 8176} HTTP/1.1")).path) == 8177
    assert len(read(head("X: " + "a" * 65520)).headers["x"]) == 65520
    assert read(head(*["X: y"] * 99)).headers["x"] == ", ".join(["y"] * 99)


@spec("HTTP-3")
def test_a_head_that_never_comes_is_408():
    assert status_of(b"GET / HTTP/1.1\r\n", eof=False, timeout=0.05) == 408


def test_a_long_line_of_blanks_costs_linear_time():
    assert status_of(head("X: " + " " * 60_000 + "\0")) == 400


# --- HTTP: bodies --------------------------------------------------------------------------------

class Sink:
    """As much of a StreamWriter as `read_body` uses."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


def body(data: bytes, *, max_body: int = 10, eof: bool = True, timeout: float = 5.0) -> tuple[bytes, bytes, bytes]:
    """The body read from a stream with these bytes, what was written meanwhile, and what was left."""
    async def main() -> tuple[bytes, bytes, bytes]:
        reader, sink = asyncio.StreamReader(), Sink()
        reader.feed_data(data)
        if eof:
            reader.feed_eof()
        asked = await wire.read_request(reader)
        got = await wire.read_body(asked, reader, sink, max_body=max_body, timeout=timeout)
        assert asked.body is got
        return got, sink.written, await reader.read()
    return asyncio.run(main())


@spec("HTTP-10")
def test_a_body_is_read_by_its_length_and_no_further():
    assert body(head("Content-Length: 10") + b"0123456789GET") == (b"0123456789", b"", b"GET")
    assert body(head() + b"GET") == (b"", b"", b"GET")


@spec("HTTP-10")
def test_a_body_over_the_limit_of_its_route_is_refused_before_it_is_sent():
    with pytest.raises(wire.HttpError) as refusal:
        body(head("Content-Length: 11"), eof=False)
    assert refusal.value.status == 413


@spec("HTTP-4")
def test_a_body_that_ends_early_is_400():
    with pytest.raises(wire.HttpError) as refusal:
        body(head("Content-Length: 10") + b"012345678")
    assert refusal.value.status == 400


@spec("HTTP-3")
def test_a_body_that_never_comes_is_408():
    with pytest.raises(wire.HttpError) as refusal:
        body(head("Content-Length: 10"), eof=False, timeout=0.05)
    assert refusal.value.status == 408


@spec("HTTP-11")
@pytest.mark.parametrize("line, length, written", [
    ("POST / HTTP/1.1", 2, b"HTTP/1.1 100 Continue\r\n\r\n"), ("POST / HTTP/1.0", 2, b""), ("POST / HTTP/1.1", 0, b"")])
def test_100_continue_comes_before_a_body_that_will_be_read(line, length, written):
    asked = head("Expect: 100-Continue", f"Content-Length: {length}", line=line) + b"x" * length
    assert body(asked)[:2] == (b"x" * length, written)


@spec("HTTP-11")
def test_an_expectation_in_http_1_0_is_ignored():
    assert read(head("Expect: anything", line="GET / HTTP/1.0")).version == "1.0"


# --- HTTP: answers -------------------------------------------------------------------------------

@spec("HTTP-12", "HTTP-13")
def test_an_answer_in_full():
    assert wire.response(200, b"{}", headers=[("Content-Type", "application/json")], now=784111777) == (
        b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")


@spec("HTTP-12")
@pytest.mark.parametrize("status, options, tail", [
    (200, {"head": True}, b"\r\nContent-Length: 4\r\n\r\n"), (404, {}, b"\r\nContent-Length: 4\r\n\r\nbody"),
    (204, {}, b" GMT\r\n\r\n"), (304, {}, b" GMT\r\n\r\n")])
def test_an_answer_has_the_body_its_status_and_method_allow(status, options, tail):
    answer = wire.response(status, b"body", close=False, **options)
    assert answer.endswith(tail) and (b"Content-Length" in answer) == (b"Content-Length" in tail)


@spec("HTTP-15")
@pytest.mark.parametrize("name, value", [("X", "a\r\nB: c"), ("X", "a\nb"), ("X", "a\0"), ("X", "€"), ("X Y", "a"), ("X:", "a"), ("", "a")])
def test_a_header_that_would_break_an_answer_is_our_mistake(name, value):
    with pytest.raises(wire.UsageError):
        wire.response(200, headers=[(name, value)])


def test_the_answer_to_a_broken_request_says_why():
    answer = wire.error_response(wire.HttpError(405, "use GET", [("Allow", "GET")]), headers=[("X", "y")])
    assert answer.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n") and answer.endswith(b"\r\n\r\nuse GET\n")
    assert b"\r\nAllow: GET\r\n" in answer and b"\r\nX: y\r\n" in answer


# --- Real sockets --------------------------------------------------------------------------------

LIMIT = 10.0        # seconds any of these stories may take


class Server:
    """Listens on loopback, runs `serve(reader, writer)` for every socket, and fails where that failed."""

    def __init__(self, serve, *, tls: ssl.SSLContext | None = None) -> None:
        self.serve, self.tls = serve, tls
        self.tasks: list[asyncio.Task] = []

    async def __aenter__(self) -> Server:
        self.listener = await asyncio.start_server(self.accepted, "127.0.0.1", 0, ssl=self.tls)
        self.port = self.listener.sockets[0].getsockname()[1]
        self.url = f"{'wss' if self.tls else 'ws'}://localhost:{self.port}/ws"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.listener.close()
        await asyncio.gather(*self.tasks)

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.current_task())
        await self.serve(reader, writer)


def websockets(talk):
    """A `serve` that upgrades the socket and runs `talk(connection)`."""
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await wire.read_request(reader)
        if asked is not None:
            await talk(wire.Connection.accept(asked, reader, writer, max_message=1000))
    return serve


def story(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, LIMIT))


async def echo(connection: wire.Connection) -> None:
    while (messages := await connection.receive()) is not None:
        for message in messages:
            connection.send(message)
    await connection.close()


async def next_message(connection: wire.Connection) -> str | bytes | None:
    while (messages := await connection.receive()) == []:
        pass
    return messages[0] if messages else None


def test_a_client_and_a_server_talk_and_part():
    async def main():
        async with Server(websockets(echo)) as server:
            client = await wire.connect(server.url)
            assert client.peername[1] == server.port and client.buffered == 0
            for text in ("hi", "é" * 500, ""):
                client.send(text)
                assert await next_message(client) == text
            client.ping()
            while not client.ws.pongs:
                assert await client.receive() == []
            await client.close()
            assert (client.ws.close_code, client.ws.close_received) == (1000, True)
            assert await client.receive() is None
            client.send("late")
            await client.drain()
    story(main())


@spec("WS-13")
def test_a_message_over_the_limit_closes_the_socket_with_1009_even_while_it_is_still_being_sent():
    async def main():
        async with Server(websockets(echo)) as server:
            client = await wire.connect(server.url)
            client.write(client.ws.text("x" * 1_000_000))
            assert await next_message(client) is None
            assert client.ws.close_code == 1009
            await client.close()
    story(main())


@spec("WS-16")
def test_what_is_written_at_the_end_of_the_turn_goes_before_the_close_frame():
    async def answer_later(connection: wire.Connection) -> None:
        while (messages := await connection.receive()) is not None:
            for message in messages:
                asyncio.get_running_loop().call_soon(connection.send, message)
        await connection.close()

    async def main():
        async with Server(websockets(answer_later)) as server:
            client = await wire.connect(server.url)
            client.write(client.ws.text("last") + client.ws.close(1000))
            assert await next_message(client) == "last"
            await client.close()
            assert client.ws.close_code == 1000
    story(main())


@spec("WS-20")
def test_the_server_closes_the_socket_first(monkeypatch):
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT", 60.0)    # so that nobody is saved by it

    async def main():
        async with Server(websockets(echo)) as server:
            client = await wire.connect(server.url)
            client.write(client.ws.close(1000))
            assert await client.receive() is None
            assert client.ws.close_received and await client.reader.read() == b""
            assert not client.writer.transport.is_closing()
            await client.close()
            assert client.writer.transport.is_closing()
    story(main())


@spec("WS-20")
def test_a_client_leaves_closing_the_socket_to_the_server():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.upgrade_response(await wire.read_request(reader)) + b"\x88\x02\x03\xe8")
        assert len(await reader.readexactly(8)) == 8        # the masked close frame that answers
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read()
        writer.close()

    async def main():
        async with Server(serve) as server:
            await echo(await wire.connect(server.url))
    story(main())


@spec("WS-20")
@pytest.mark.parametrize("noise", [b"", masked(b"\x81\x02hi") * 1000], ids=["silent", "noisy"])
def test_a_peer_that_ignores_our_close_frame_is_dropped(monkeypatch, noise):
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT", 0.1)

    async def main():
        async with Server(websockets(lambda connection: connection.close(1001, "bye"))) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(wire.upgrade_request("h", "/ws", KEY))
            with contextlib.suppress(ConnectionError):
                while not (server.tasks and server.tasks[0].done()):
                    writer.write(noise)
                    await writer.drain()
                    await asyncio.sleep(0.001)
                assert (await reader.read()).endswith(b"\x88\x05\x03\xe9bye")
            writer.close()
    story(main())


@spec("WS-19")
def test_a_peer_that_just_vanishes_is_a_drop_and_not_an_error():
    seen = []

    async def watch(connection: wire.Connection) -> None:
        await echo(connection)
        seen.append((connection.ws.close_code, connection.ws.close_received))

    async def main():
        async with Server(websockets(watch)) as server:
            (await wire.connect(server.url)).abort()
            client = await wire.connect(server.url)
            linger = struct.pack("ii", 1, 0)        # close with a reset
            client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.abort()
            while len(seen) < 2:
                await asyncio.sleep(0.01)
    story(main())
    assert seen == [(1006, False), (1006, False)]


def test_another_task_can_close_while_one_receives():
    async def main():
        async def supersede(connection: wire.Connection) -> None:
            closing = asyncio.get_running_loop().create_task(connection.close(4000, "superseded"))
            await echo(connection)
            await closing

        async with Server(websockets(supersede)) as server:
            client = await wire.connect(server.url)
            assert await next_message(client) is None
            assert (client.ws.close_code, client.ws.close_reason) == (4000, "superseded")
            await client.close()
    story(main())


def test_begin_close_needs_no_waiting():
    async def main():
        async def refuse(connection: wire.Connection) -> None:
            connection.begin_close(1008, "no")
            connection.send("never")
            await echo(connection)

        async with Server(websockets(refuse)) as server:
            client = await wire.connect(server.url)
            assert await next_message(client) is None
            assert (client.ws.close_code, client.ws.close_reason) == (1008, "no")
            await client.close()
    story(main())


@spec("WS-15")
def test_a_peer_that_pings_and_does_not_read_is_not_read_either():
    async def main():
        async with Server(websockets(echo)) as server:
            client = await wire.connect(server.url)
            pings = client.ws.ping(b"p" * 125) * 1000
            with pytest.raises(TimeoutError):
                for _ in range(1000):           # 130 MB, more than fits between the two
                    client.write(pings)
                    async with asyncio.timeout(0.5):
                        await client.drain()
            client.abort()
    story(main())


@spec("HTTP-14")
def test_the_refusal_of_an_upload_arrives_although_nobody_reads_the_upload():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await wire.read_request(reader)
        try:
            await wire.read_body(asked, reader, writer, max_body=1000)
        except wire.HttpError as error:
            writer.write(wire.error_response(error))
        await wire.hang_up(reader, writer)

    async def main():
        async with Server(serve) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head("Content-Length: 3000000", line="POST /upload HTTP/1.1") + bytes(3_000_000))
            writer.transport.set_write_buffer_limits(0)
            await writer.drain()        # all of it left: no reset
            assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
            writer.close()
    story(main())


@spec("HTTP-14")
def test_hanging_up_does_not_wait_long_for_the_other_side(monkeypatch):
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT", 0.1)

    async def main():
        async with Server(wire.hang_up) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            while not (server.tasks and server.tasks[0].done()):
                await asyncio.sleep(0.01)
            writer.close()
    story(main())


async def answered_with(answer: bytes, **options: object) -> wire.Connection:
    """`connect` to a server that answers with these bytes, whatever it is asked, and then waits."""
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    async with Server(serve) as server:
        return await wire.connect(server.url, **options)


@pytest.mark.parametrize("answer, error", [
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", wire.HttpError),
    (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", wire.WebSocketError),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", wire.WebSocketError),
    (b"HTTP/1.1 101 " + b"a" * 9000 + b"\r\n\r\n", wire.WebSocketError),
    (b"HTTP/1.1 101\n\n", wire.WebSocketError)])
@spec("WS-5")
def test_connect_says_what_was_wrong_with_the_answer(answer, error):
    with pytest.raises(error):
        asyncio.run(answered_with(answer))


def test_connect_gives_up_after_its_timeout():
    with pytest.raises(TimeoutError, match="within 0.1 s"):
        asyncio.run(answered_with(b"", timeout=0.1))


def test_connect_passes_on_what_the_network_says():
    async def hang_up_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def main():
        async with Server(hang_up_at_once) as server:
            with pytest.raises(ConnectionAbortedError, match="opening handshake"):
                await wire.connect(server.url)
    story(main())

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            asyncio.run(wire.connect(f"ws://127.0.0.1:{unused.getsockname()[1]}/"))


@pytest.mark.parametrize("url", [
    "", "localhost", "http://localhost/", "ws://", "ws:///ws", "ws://h:99999/", "ws://h:x/", "ws://u:p@h/", "ws://h/#f",
    "ws://h/a b", "ws://h/é", "ws://a..b/", "ws://[::1/", "ws://h/\r\nX: y"])
def test_a_wrong_url_is_our_mistake(url):
    with pytest.raises(wire.UsageError):
        asyncio.run(wire.connect(url))


def test_a_url_is_split_into_what_the_handshake_needs():
    assert wire.split_url("ws://Host.example/ws?a=b", wire.WS_SCHEMES) == (False, "host.example", 80, "Host.example", "/ws?a=b")
    assert wire.split_url("wss://[::1]:7900", wire.WS_SCHEMES) == (True, "::1", 7900, "[::1]:7900", "/")


# --- TLS -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return world.certificate(tmp_path_factory.mktemp("tls"), "localhost")


def server_tls(certificate: tuple[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_wss_works_with_a_trusted_certificate(certificate):
    async def main():
        async with Server(websockets(echo), tls=server_tls(certificate)) as server:
            client = await wire.connect(server.url, tls=ssl.create_default_context(cafile=certificate[0]))
            client.send("secret")
            assert await next_message(client) == "secret"
            await client.close()
            assert client.ws.close_code == 1000
    story(main())


def test_wss_refuses_a_certificate_nobody_trusts(certificate):
    async def main():
        async with Server(websockets(echo), tls=server_tls(certificate)) as server:
            with pytest.raises(ssl.SSLCertVerificationError):
                await wire.connect(server.url)
    story(main())


@spec("WS-13")
def test_a_failure_over_tls_reaches_the_peer(certificate):
    async def main():
        async with Server(websockets(echo), tls=server_tls(certificate)) as server:
            client = await wire.connect(server.url, tls=ssl.create_default_context(cafile=certificate[0]))
            client.send("x" * 2000)
            assert await next_message(client) is None
            assert client.ws.close_code == 1009
            await client.close()
    story(main())


# --- reading from the transport's callback (Connection.pump), as the broker does -------------------


def pumped(talk, *, answer=lambda connection, messages: [connection.send(m) for m in messages]):
    """Runs `talk(reader, writer)` as a raw client against a server that pumps; what it returns."""

    async def main():
        served = []

        async def one(reader, writer):
            request = await wire.read_request(reader)
            connection = wire.Connection.accept(request, reader, writer, max_message=1 << 20)
            await connection.pump(lambda messages: answer(connection, messages))
            await connection.close()
            served.append(connection.ws)

        async with await wire.serve(one, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                async with asyncio.timeout(5):
                    result = await talk(reader, writer)
                    writer.close()
                    while not served:
                        await asyncio.sleep(0)
            finally:
                writer.close()
        return result, served[0]

    return asyncio.run(main())


OPENING = wire.upgrade_request("127.0.0.1", "/", "dGhlIHNhbXBsZSBub25jZQ==")


@spec("WS-15", "WS-11")
def test_pumped_pongs_go_before_the_echo_of_what_came_around_the_ping():
    async def talk(reader, writer):
        writer.write(OPENING)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(masked(b"\x01\x02He" + b"\x89\x01p" + b"\x80\x03llo"))
        return await reader.readexactly(3 + 7)

    assert pumped(talk)[0] == b"\x8a\x01p" + b"\x81\x05Hello"


@spec("WS-16")
def test_pumped_what_came_with_the_handshake_is_not_lost_and_answers_go_before_the_close():
    async def talk(reader, writer):
        writer.write(OPENING + masked(b"\x81\x02hi" + b"\x88\x02\x03\xe8"))
        await reader.readuntil(b"\r\n\r\n")
        return await reader.read()

    got, ws = pumped(talk)
    assert got == b"\x81\x02hi" + b"\x88\x02\x03\xe8"
    assert (ws.close_received, ws.close_code) == (True, 1000)


@spec("WS-19")
def test_pumped_a_stream_that_just_ends_counts_as_1006():
    async def talk(reader, writer):
        writer.write(OPENING)
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    assert pumped(talk)[1].close_code == 1006


@spec("WS-18")
def test_pumped_nothing_after_a_violation_is_handled():
    async def talk(reader, writer):
        writer.write(OPENING)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(masked(b"\x81\x02hi") + b"\x81\x02no" + masked(b"\x81\x02ho"))
        return await reader.read()

    assert pumped(talk)[0][:8] == b"\x81\x02hi" + b"\x88" + pumped(talk)[0][5:6] + b"\x03\xea"


@spec("OPS-6")
def test_pumped_a_peer_that_does_not_read_is_not_read_until_it_does():
    seen, paused = [], []

    def answer(connection, messages):
        seen.extend(messages)
        for _ in messages:
            connection.send("x" * 500_000)
        connection.hold(wire.READ_BYTES)
        paused.append(not connection.writer.transport.is_reading())

    async def talk(reader, writer):
        writer.write(OPENING)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(40):
            writer.write(masked(b"\x81\x01m"))
            await asyncio.sleep(0)
        total = 0
        while total < 40 * 500_000:
            total += len(await reader.read(1 << 20))

    pumped(talk, answer=answer)
    assert len(seen) == 40  # none was lost
    assert True in paused
