"""Text, the message table, validation, and the cryptography against `vectors.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nacl.bindings as sodium
import pytest

import wire

spec = pytest.mark.spec
HERE = Path(__file__).resolve().parent
VECTORS = json.loads((HERE / "vectors.json").read_text())
ANA = next(k for k in VECTORS["keys"] if k["name"] == "ana")
BO = next(k for k in VECTORS["keys"] if k["name"] == "bruno")


def vectors(part: str) -> pytest.MarkDecorator:
    """One test for each entry of a part of the vectors."""
    entries = VECTORS[part]
    return pytest.mark.parametrize("v", entries, ids=[str(e.get("name", n)) for n, e in enumerate(entries)])


# --- text -----------------------------------------------------------------------------------------


@spec("MSG-1", "MSG-2")
@pytest.mark.parametrize("text", [
    "", "nonsense", "[]", "7", "null", '{"a":1', '{"a":NaN}', '{"a":-Infinity}', '{"a":1e999}', '{"a":"\\ud800"}',
    '{"\\udfff":1}', "[" * 100_000, '{"a":' * 100_000, b"\xff{}", '{"a":' + "9" * 5000 + "}"])
def test_what_is_no_json_object_of_utf8_text_is_malformed(text):
    with pytest.raises(wire.Refused) as error:
        wire.decode(text)
    assert error.value.code == "malformed"


@spec("MSG-1", "MSG-2")
def test_text_and_binary_are_read_alike_and_escapes_survive():
    assert wire.decode('{"a":"\\ud83d\\ude80"}') == wire.decode('{"a":"🚀"}'.encode()) == {"a": "🚀"}
    assert wire.encode({"ä": [1, None, 2.5], "b": "\n"}) == '{"ä":[1,null,2.5],"b":"\\n"}'
    for value in (float("nan"), {1, 2}, b"bytes"):
        with pytest.raises(wire.UsageError):
            wire.encode(value)


@spec("MSG-7")
def test_times_are_iso_8601_utc_with_milliseconds():
    assert wire.iso(0) == "1970-01-01T00:00:00.000Z"
    assert wire.iso(1_767_323_045_006) == "2026-01-02T03:04:05.006Z"
    assert wire.iso(1_767_323_045_999) == "2026-01-02T03:04:05.999Z"


@spec("HTTP-20")
@vectors("ws_to_http")
def test_the_http_address_follows_from_the_websocket_address(v):
    assert wire.http_base(v["ws_url"]) == v["http_base"]


@spec("HTTP-20")
@pytest.mark.parametrize("url", ["", "http://host/ws", "ws://", "ws:///ws", "ws://host:x/ws", "localhost:7900"])
def test_an_address_that_is_none_is_the_callers_mistake(url):
    with pytest.raises(wire.UsageError):
        wire.http_base(url)


# --- the table ------------------------------------------------------------------------------------


@spec("MSG-10")
def test_the_table_declares_every_message_and_every_reply_exists():
    client = [m for m in wire.MESSAGES.values() if m.direction == "client"]
    broker = [m for m in wire.MESSAGES.values() if m.direction == "broker"]
    assert (len(client), len(broker)) == (84 + 2, 62)  # client_ack and set_reach are ours
    for message in client:
        assert message.reply is None or wire.MESSAGES[message.reply].direction == "broker"
    assert {m.section for m in client} >= {"Handshake", "Delivery", "Presence", "State", "Audit"}


@spec("MSG-3", "MSG-4", "MSG-5")
@pytest.mark.parametrize(("frame", "fault"), [
    ({"type": "send", "targetSpec": "*", "nonce": "", "ciphertext": ""}, None),
    ({"type": "send", "targetSpec": "*", "nonce": "", "ciphertext": "", "priority": None, "id": None, "extra": 1}, None),
    ({"type": "send", "targetSpec": "*", "nonce": "", "ciphertext": "", "priority": "soon"}, "send.priority: expected now|next|low"),
    ({"type": "send", "targetSpec": "*", "nonce": ""}, "send.ciphertext: missing"),
    ({"type": "set_state", "key": "k", "value": None}, None),
    ({"type": "set_state", "key": "k"}, "set_state.value: missing"),
    ({"type": "set_state", "key": None, "value": 1}, "set_state.key: expected string"),
    ({"type": "set_visible", "visible": 1}, "set_visible.visible: expected boolean"),
    ({"type": "client_ack", "upTo": True}, "client_ack.upTo: expected number"),
    ({"type": "remember", "content": "x", "tags": ["a", 7]}, "remember.tags[1]: expected string"),
    ({"type": "mcp_register", "serverName": "s", "description": "d", "tools": [{"name": "t", "description": "d"}]},
     "mcp_register.tools[0].inputSchema: missing"),
    ({"type": "set_stats", "stats": {"uptime": "long"}}, "set_stats.stats.uptime: expected number"),
    ({"type": "mcp_deploy", "server_name": "s", "source": {"type": "ftp"}}, "mcp_deploy.source.type: expected zip|git|npx"),
    ({"type": "mcp_scope", "server_name": "s", "scope": ["anything", {}]}, None),
])
def test_a_frame_is_held_against_its_declaration(frame, fault):
    if fault is None:
        assert wire.check(frame).name == frame["type"]
        return
    with pytest.raises(wire.Refused) as error:
        wire.check(frame)
    assert (error.value.code, error.value.message) == ("malformed", fault)


@spec("MSG-6")
@pytest.mark.parametrize("name", [None, "", "nonsense", "hello_ack", ["send"], 7])
def test_an_unknown_type_is_said_to_be_unknown(name):
    with pytest.raises(wire.Refused) as error:
        wire.check({"type": name})
    assert error.value.code == "unknown_type"


@spec("MSG-10")
def test_nullable_and_nested_shapes_are_understood():
    entry = {"name": "bo", "pubkey": "k", "status": "held", "state": "queued", "at": None}
    frame = {"type": "message_status_result", "messageId": "m", "targetSpec": "*", "delivered": False, "deliveredAt": None,
             "recipients": [entry]}
    assert wire.check(frame, "broker").name == "message_status_result"
    with pytest.raises(wire.Refused, match=r"recipients\[0\]\.status: expected delivered\|held\|disconnected"):
        wire.check({**frame, "recipients": [{**entry, "status": "lost"}]}, "broker")


# --- keys and signatures --------------------------------------------------------------------------


@spec("CRYPTO-1", "CRYPTO-3")
@vectors("keys")
def test_a_seed_makes_the_ed25519_and_the_x25519_pair(v):
    pair = wire.KeyPair.from_seed(bytes.fromhex(v["seed_hex"]))
    assert pair == (v["pubkey_hex"], v["secret_key_hex"])
    assert wire._exchange_public(pair.public).hex() == v["x25519_pubkey_hex"]
    assert wire._exchange_secret(pair.secret).hex() == v["x25519_secret_hex"]


@spec("CRYPTO-1")
def test_keys_are_hex_of_either_case_and_nothing_else():
    assert wire.hex_key(ANA["pubkey_hex"].upper()) == ANA["pubkey_hex"]
    for text in (None, 7, "", "ab", ANA["pubkey_hex"] + "0", ANA["pubkey_hex"][:-1] + "g", ANA["pubkey_hex"] + "\n"):
        assert wire.hex_key(text) is None
    with pytest.raises(wire.UsageError):
        wire.KeyPair.from_seed(b"short")
    with pytest.raises(wire.UsageError):
        wire.sign("text", "not a secret")


@spec("HELLO-4", "CRYPTO-2")
@vectors("hello_signature")
def test_hello_signs_four_fields(v):
    text = wire.hello_text(v["mesh_id"], v["member_id"], v["pubkey_hex"], v["timestamp_ms"])
    assert (text, text.encode().hex()) == (v["canonical_utf8"], v["canonical_hex"])
    assert wire.sign(text, v["secret_key_hex"]) == v["signature_hex"]
    assert wire.verify(text, v["signature_hex"], v["pubkey_hex"])


@spec("HELLO-2", "HELLO-3", "HELLO-4")
@vectors("hello_verify")
def test_hello_is_verified_in_the_documented_order(v):
    assert (wire.verify_hello(v["hello"], v["now_ms"]) or "ok") == v["expect"]


@spec("HELLO-7")
def test_a_session_proof_signs_under_its_own_label():
    assert wire.session_text("m", "aa", "bb", 12) == "claudemesh-session|m|aa|bb|12"


@spec("HTTP-23")
def test_a_signed_request_covers_method_target_body_time_and_key():
    digest = hashlib.sha256(b'{"a":1}').hexdigest()
    assert wire.http_text("POST", "/mesh?x=1", b'{"a":1}', 5, "ab") == f"claudemesh-http|POST|/mesh?x=1|{digest}|5|ab"


# --- bodies ---------------------------------------------------------------------------------------


@spec("CRYPTO-4")
@vectors("direct_envelope")
def test_a_direct_body_is_sealed_and_opened(v):
    nonce, ciphertext = wire.seal_direct(v["plaintext_utf8"], v["recipient_pubkey_hex"], v["sender_secret_key_hex"],
                                         bytes.fromhex(v["nonce_hex"]))
    assert (nonce, ciphertext) == (v["nonce_b64"], v["ciphertext_b64"])
    opened = wire.open_direct(nonce, ciphertext, v["sender_pubkey_hex"], v["recipient_secret_key_hex"])
    assert opened == v["plaintext_utf8"]


@spec("CRYPTO-4")
@vectors("direct_envelope_reject")
def test_a_body_that_is_not_exactly_that_opens_to_nothing(v):
    assert wire.open_direct(v["nonce_b64"], v["ciphertext_b64"], v["sender_pubkey_hex"], v["recipient_secret_key_hex"]) is None


@spec("CRYPTO-1", "CRYPTO-4")
@vectors("direct_target")
def test_upper_case_hex_is_a_key_too_and_other_texts_are_not(v):
    is_key = wire.hex_key(v["spec"]) is not None
    assert is_key == (v["upstream_is_direct"] or v["spec"] == ANA["pubkey_hex"].upper())


@spec("CRYPTO-4")
def test_sealing_for_what_is_no_key_is_the_callers_mistake():
    for recipient in ("bo", "*", "0" * 64, "f" * 64):
        with pytest.raises(wire.UsageError):
            wire.seal_direct("x", recipient, ANA["secret_key_hex"])
    assert wire.open_direct("", "", "f" * 64, ANA["secret_key_hex"]) is None


@spec("CRYPTO-5")
@vectors("plain_body")
def test_a_plain_body_is_base64_of_its_text(v):
    nonce, ciphertext = wire.plain_body(v["plaintext_utf8"])
    assert ciphertext == v["ciphertext_b64"]
    assert len(nonce) == len(v["example_nonce_b64"])


@spec("CRYPTO-6")
@vectors("plain_fallback")
def test_plain_bodies_are_read_strictly(v):
    assert wire.read_plain(v["ciphertext_b64"]) == v["strict_text"]


@spec("CRYPTO-7")
@vectors("sealed_key")
def test_a_sealed_key_is_opened_and_made(v, monkeypatch):
    assert wire.open_sealed_key(v["sealed_b64"], v["recipient_secret_key_hex"]).hex() == v["key_hex"]
    again = wire.seal_key(bytes.fromhex(v["key_hex"]), v["recipient_pubkey_hex"])
    assert again != v["sealed_b64"] and len(again) == len(v["sealed_b64"])
    assert wire.open_sealed_key(again, v["recipient_secret_key_hex"]).hex() == v["key_hex"]
    public, secret = sodium.crypto_box_seed_keypair(bytes.fromhex(v["ephemeral_seed_hex"]))
    exchange = wire._exchange_public(v["recipient_pubkey_hex"])
    nonce = hashlib.blake2b(public + exchange, digest_size=24).digest()
    box = sodium.crypto_box(bytes.fromhex(v["key_hex"]), nonce, exchange, secret)
    assert (public + box).hex() == v["sealed_hex"]  # the bytes inside, as SPEC.md gives them


@spec("CRYPTO-7")
@vectors("sealed_key_reject")
def test_a_sealed_key_for_somebody_else_or_altered_opens_to_nothing(v):
    assert wire.open_sealed_key(v["sealed_b64"], v["secret_key_hex"]) is None


@spec("CRYPTO-8")
@vectors("file_encryption")
def test_an_encrypted_file_is_nonce_and_secretbox(v):
    key, nonce = bytes.fromhex(v["key_hex"]), bytes.fromhex(v["nonce_hex"])
    repeat = v.get("plaintext_repeat")
    plain = bytes.fromhex(repeat["byte_hex"]) * repeat["count"] if repeat else bytes.fromhex(v["plaintext_hex"])
    blob = wire.encrypt_blob(plain, key, nonce)
    assert (len(blob), hashlib.sha256(blob).hexdigest()) == (v["upload_blob_length"], v["upload_blob_sha256"])
    assert wire.decrypt_blob(blob, key) == plain
    assert wire.decrypt_blob(blob[:-1], key) is None and wire.decrypt_blob(b"", key) is None
    for entry in v["file_keys"]:
        owner = next((k for k in VECTORS["keys"] if k["pubkey_hex"] == entry["peerPubkey"]), None)
        assert wire.open_sealed_key(entry["sealedKey"], owner["secret_key_hex"]) == key


@spec("CRYPTO-10")
@vectors("vault_entry")
def test_a_vault_entry_opens_with_the_member_key(v):
    assert wire.open_vault(v["wire"], v["member_secret_key_hex"]).decode() == v["plaintext_utf8"]
    own = wire.seal_vault(b"s3cret", v["member_pubkey_hex"])
    assert wire.open_vault(own, v["member_secret_key_hex"]) == b"s3cret"
    assert wire.open_vault({**own, "nonce": "!"}, v["member_secret_key_hex"]) is None
    assert wire.open_vault(own, VECTORS["keys"][2]["secret_key_hex"]) is None


@spec("CRYPTO-11")
@vectors("vault_ref")
def test_a_vault_reference_is_recognised_at_the_start_of_a_value(v):
    found = wire.vault_reference(v["value"])
    assert (found._asdict() if found else None) == v["ref"]


@spec("CRYPTO-9")
def test_a_multicast_body_opens_with_each_sealed_key_and_is_bound_to_its_words():
    nonce, body, keys = wire.seal_multicast("the plan", [BO["pubkey_hex"]], ANA["secret_key_hex"])
    [sealed] = keys.values()
    assert wire.open_multicast(nonce, body, sealed, ANA["pubkey_hex"], BO["secret_key_hex"]) == "the plan"
    assert len(wire._unb64(sealed)) == 24 + 16 + 32 + 32  # nonce, tag, content key, digest of the body
    assert wire.open_multicast(nonce, body, sealed, BO["pubkey_hex"], BO["secret_key_hex"]) is None  # not by that sender
    assert wire.open_multicast(nonce, body, sealed, ANA["pubkey_hex"], VECTORS["keys"][2]["secret_key_hex"]) is None
    # whoever holds the content key cannot put other words under the sender's seal
    opened = wire._open_box(wire._unb64(sealed)[24:], wire._unb64(sealed)[:24], ANA["pubkey_hex"], BO["secret_key_hex"])
    forged = wire._b64(sodium.crypto_secretbox_easy(b"another plan", wire._unb64(nonce), opened[:32]))
    assert wire.open_multicast(nonce, forged, sealed, ANA["pubkey_hex"], BO["secret_key_hex"]) is None
    for broken in ("", "!", "AAAA"):
        assert wire.open_multicast(nonce, body, broken, ANA["pubkey_hex"], BO["secret_key_hex"]) is None


# --- invites --------------------------------------------------------------------------------------


@spec("INV-2", "INV-3")
@vectors("invite")
def test_an_invite_is_signed_written_and_linked(v):
    unsigned = {name: value for name, value in v["payload"].items() if name != "signature"}
    signed = wire.sign_invite(unsigned, v["owner_secret_key_hex"])
    assert signed == v["payload"] and wire.encode(signed) == v["json_utf8"]
    assert wire.invite_text(signed) == v["canonical_utf8"]
    assert wire.invite_token(signed) == v["token"]
    assert wire.invite_link(v["token"]) == "ic://join/" + v["token"]


@spec("INV-4")
@vectors("invite_token_extract")
def test_a_token_is_found_in_every_accepted_form_and_no_other(v):
    if "token" in v:
        assert wire.extract_token(v["input"]) == v["token"]
    else:
        with pytest.raises(wire.InviteError) as error:
            wire.extract_token(v["input"])
        assert error.value.code == "malformed"


@spec("INV-1", "INV-5")
@vectors("invite_verify")
def test_an_invite_is_checked_for_shape_expiry_and_signature(v):
    try:
        payload = wire.read_invite(v["token"], v["now_s"])
        verdict = "ok" if payload["v"] == 1 else "?"
    except wire.InviteError as error:
        verdict = error.code
    assert verdict == v["expect"]


@spec("INV-6")
def test_the_join_request_has_these_fields():
    assert set(VECTORS["join_request"]["body"]) == {"invite_token", "invite_payload", "peer_pubkey", "display_name"}
    payload = wire.decode_invite(VECTORS["join_request"]["body"]["invite_token"])
    assert payload == VECTORS["join_request"]["body"]["invite_payload"]
    assert VECTORS["join_request"]["url"] == wire.http_base(payload["broker_url"]) + "/join"
