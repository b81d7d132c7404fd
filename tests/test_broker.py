"""The hub, told in stories: hello, presence, status, delivery, groups, state, audit, HTTP, failures."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import ssl
import subprocess
import time

import pytest

import broker as hub
import store as storage
import wire
from broker import Broker
from world import ALL, LIMIT, Peer, World, story

spec = pytest.mark.spec


# --- hello ----------------------------------------------------------------------------------------


async def refused(world: World, frame: dict) -> tuple[str, int, str]:
    """The error code, close code and close reason a hello is refused with."""
    peer = await world.dial()
    peer.conn.send(json.dumps(frame))
    error = await peer.expect("error")
    end = await peer.next()
    return error["code"], end["closed"], end["reason"]


@spec("HELLO-9", "HELLO-14", "PRES-2")
@story
async def test_a_hello_is_answered_with_everything_the_session_needs(world):
    world.member("ana", groups=({"name": "dev", "role": "lead"},))
    ana = await world.peer("ana", capabilities=("client_ack", "target", "teleport"), displayName="Ana's laptop")
    presence = ana.greeting.pop("presenceId")
    assert len(presence) == 32
    assert ana.greeting == {
        "type": "hello_ack", "memberDisplayName": "Ana's laptop", "services": [],
        "memberProfile": {"roleTag": None, "groups": [{"name": "dev", "role": "lead"}], "messageMode": "push"},
        "meshPolicy": {"selfEditable": {"displayName": True, "roleTag": True, "groups": True, "messageMode": True}},
        "capabilities": ["client_ack", "target"]}
    [entry] = (await ana.request("list_peers"))["peers"]
    assert (entry["status"], entry["groups"], entry["cwd"]) == ("idle", [{"name": "dev", "role": "lead"}], "/home/ana")


@spec("HELLO-14")
@story
async def test_a_client_that_offers_nothing_gets_upstreams_frames(world):
    ana = await world.peer("ana", capabilities=None)
    bo = await world.peer("bo", capabilities=None)
    assert "capabilities" not in ana.greeting
    await ana.send(bo.key, "hi")
    push = await bo.push()
    assert set(push) == {"type", "messageId", "meshId", "senderPubkey", "priority", "nonce", "ciphertext", "createdAt"}


@spec("HELLO-3", "HELLO-9")
@story
async def test_pid_cwd_and_session_id_may_be_missing(world):
    frame = world.hello("ana")
    for name in ("pid", "cwd", "sessionId"):
        del frame[name]
    ana = await world.dial()
    ana.conn.send(json.dumps(frame))
    await ana.expect("hello_ack")
    assert (await ana.request("list_peers"))["peers"][0]["cwd"] == ""


@spec("HELLO-2", "HELLO-3", "HELLO-4", "HELLO-6", "HELLO-15")
@pytest.mark.parametrize(("code", "change"), [
    ("timestamp_skew", lambda f: f.update(timestamp=f["timestamp"] - 61_000)),
    ("timestamp_skew", lambda f: f.update(timestamp=f["timestamp"] + 61_000)),
    ("timestamp_skew", lambda f: f.update(timestamp="now")),
    ("timestamp_skew", lambda f: f.pop("timestamp")),
    ("malformed", lambda f: f.update(pubkey="abc")),
    ("malformed", lambda f: f.update(signature=f["signature"][:-1])),
    ("malformed", lambda f: f.update(signature=None)),
    ("malformed", lambda f: f.update(groups="dev")),
    ("malformed", lambda f: f.update(sessionPubkey="xyz")),
    ("too_large", lambda f: f.update(displayName="x" * 129)),
    ("bad_signature", lambda f: f.update(memberId="somebody else")),
    ("bad_signature", lambda f: f.update(timestamp=f["timestamp"] + 1)),
    ("bad_signature", lambda f: f.update(meshId="another mesh")),
], ids=lambda value: value if isinstance(value, str) else "")
@story
async def test_a_wrong_hello_is_refused_with_its_code_and_closed_with_1008(world, code, change):
    frame = world.hello("ana")
    change(frame)
    assert await refused(world, frame) == (code, 1008, code)
    assert [record["code"] for record in world.log if record["msg"] == "hello refused"] == [code]


@spec("HELLO-6")
@story
async def test_a_stranger_is_unauthorized(world):
    stranger, now = wire.KeyPair.generate(), world.broker.clock()
    frame = {"type": "hello", "meshId": world.mesh.id, "memberId": "m", "pubkey": stranger.public, "timestamp": now,
             "signature": wire.sign(wire.hello_text(world.mesh.id, "m", stranger.public, now), stranger.secret)}
    assert await refused(world, frame) == ("unauthorized", 1008, "unauthorized")


@spec("HELLO-5")
@story
async def test_a_hello_overheard_cannot_be_replayed(world):
    frame = world.hello("ana")
    ana = await world.dial()
    ana.conn.send(json.dumps(frame))
    await ana.expect("hello_ack")
    assert await refused(world, frame) == ("replayed", 1008, "replayed")
    assert await refused(world, frame | {"signature": frame["signature"].upper()}) == ("replayed", 1008, "replayed")


@spec("HELLO-7", "HELLO-8")
@story
async def test_a_session_key_belongs_to_who_proved_it(world):
    ana = await world.peer("ana")
    unproven = tuple(c for c in ALL if c != "session_proof")
    forged = world.hello("bo", ana.session) | {"sessionSignature": "0" * 128}
    assert (await refused(world, forged))[0] == "bad_session_key"
    assert (await refused(world, world.hello("bo", ana.session, unproven)))[0] == "bad_session_key"
    assert (await refused(world, world.hello("ana", ana.session, unproven)))[0] == "bad_session_key"
    member_key, _ = world.member("ana")
    assert (await refused(world, world.hello("bo", member_key, unproven)))[0] == "bad_session_key"
    assert await ana.silence() == []


@spec("HELLO-8")
@story
async def test_an_unproven_session_key_is_not_taken_over_by_another_member(world):
    ana = await world.peer("ana", capabilities=None)
    assert (await refused(world, world.hello("bo", ana.session, None)))[0] == "bad_session_key"
    cy = await world.peer("cy")
    owner = await world.peer("bo", session=ana.session)  # but who holds the secret proves it and gets it
    assert await ana.answer(lambda f: "closed" in f) == {"closed": 4000, "reason": "superseded"}
    assert (await cy.event("peer_left"))["name"] == "ana"
    assert (await cy.event("peer_joined"))["name"] == "bo"
    await cy.send(owner.key, "for bo alone")
    assert await owner.text() == "for bo alone"
    assert [p["memberPubkey"] for p in (await cy.request("list_peers"))["peers"]] == [cy.pair.public, owner.pair.public]


@spec("HELLO-1")
@story(max_connections=2)
async def test_a_full_mesh_says_capacity_before_anything_else(world):
    await world.peer("ana")
    await world.peer("bo")
    assert await refused(world, {"type": "hello", "meshId": world.mesh.id}) == ("capacity", 1008, "capacity")


@spec("HELLO-10")
@story
async def test_the_newcomer_hears_the_answer_then_its_mail_then_the_others_hear_of_it(world):
    ana = await world.peer("ana")
    key, _ = world.member("bo")
    await ana.send(key.public, "first thing")
    said = []
    say = hub.Link.say
    hub.Link.say = lambda link, text: (said.append((link.peer.name, json.loads(text).get("event") or json.loads(text)["type"])), say(link, text))
    try:
        bo = await world.peer("bo")
        assert await bo.text() == "first thing"
    finally:
        hub.Link.say = say
    assert said == [("bo", "hello_ack"), ("bo", "push"), ("ana", "peer_joined")]


@spec("HELLO-13", "MSG-8")
@story
async def test_before_hello_everything_is_no_hello_and_the_socket_stays(world):
    peer = await world.dial()
    peer.say(type="list_peers", _reqId="1")
    await peer.expect("error", code="no_hello")
    peer.conn.send(json.dumps(world.hello("ana")))
    await peer.expect("hello_ack")


@spec("HELLO-11")
@story
async def test_a_second_hello_is_refused_and_changes_nothing(world):
    ana = await world.peer("ana")
    ana.conn.send(json.dumps(world.hello("ana", wire.KeyPair.generate())))
    await ana.expect("error", code="already_authenticated")
    assert len((await ana.request("list_peers"))["peers"]) == 1
    await ana.leave()
    bo = await world.peer("bo")
    assert [p["displayName"] for p in (await bo.request("list_peers"))["peers"]] == ["bo"]


@spec("HELLO-12")
@story
async def test_a_socket_that_says_nothing_is_closed_after_ten_seconds(world):
    silent = await world.dial()
    async with asyncio.timeout(LIMIT):
        while not world.broker.waiting:
            await asyncio.sleep(0)
    world.pass_seconds(11)
    assert await silent.next() == {"closed": 1008, "reason": "no hello"}


@spec("HELLO-12")
@story
async def test_the_number_of_silent_sockets_is_bounded(world, monkeypatch):
    monkeypatch.setattr(hub, "MAX_UNAUTHENTICATED", 2)
    await world.dial()
    silent = await asyncio.open_connection("127.0.0.1", int(world.broker.url.rpartition(":")[2].partition("/")[0]))
    async with asyncio.timeout(LIMIT):
        while len(world.broker.strangers) < 2:
            await asyncio.sleep(0)
    with pytest.raises(OSError):
        await world.dial()
    silent[1].close()


# --- presence -------------------------------------------------------------------------------------


@spec("PRES-1")
@story
async def test_a_session_is_addressed_by_its_session_key_or_else_by_the_member_key(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", session=None)
    keys = {p["displayName"]: (p["pubkey"], p["memberPubkey"]) for p in (await ana.request("list_peers"))["peers"]}
    assert keys == {"ana": (ana.session.public, ana.pair.public), "bo": (bo.pair.public, bo.pair.public)}
    await bo.send(ana.key)
    assert (await ana.push())["senderPubkey"] == bo.pair.public


@spec("PRES-8", "PRES-4", "PRES-6")
@story
async def test_peers_are_told_who_comes_and_who_leaves(world):
    ana = await world.peer("ana")
    bo = await world.peer("bo", groups=[{"name": "dev"}])
    assert await ana.event("peer_joined") == {
        "name": "bo", "displayName": "bo", "pubkey": bo.key, "groups": [{"name": "dev"}]}
    await bo.leave()
    assert await ana.event("peer_left") == {"name": "bo", "displayName": "bo", "pubkey": bo.key}


@spec("PRES-5")
@story
async def test_a_dropped_connection_keeps_its_presence_for_ninety_seconds(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.event("peer_joined")
    await bo.request("set_summary", summary="reading")
    await bo.drop()
    world.pass_seconds(89)
    entry = next(p for p in (await ana.request("list_peers"))["peers"] if p["displayName"] == "bo")
    assert entry["reconnecting"] is True
    bo = await world.peer("bo", session=bo.session)  # back in time: nobody is told anything
    assert await ana.silence() == []
    assert next(p["summary"] for p in (await ana.request("list_peers"))["peers"] if p["displayName"] == "bo") == "reading"
    await bo.drop()
    world.pass_seconds(91)
    assert (await ana.event("peer_left"))["name"] == "bo"


@spec("PRES-3")
@story
async def test_the_newest_connection_of_a_session_supersedes_the_older(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.event("peer_joined")
    again = await world.peer("bo", session=bo.session)
    assert await bo.next() == {"closed": 4000, "reason": "superseded"}
    await ana.send(bo.key, "to whom?")
    assert await again.text() == "to whom?"
    assert [e for e in await ana.silence() if e["type"] == "push"] == []
    assert len((await ana.request("list_peers"))["peers"]) == 2


@spec("PRES-10", "PRES-8")
@story
async def test_a_member_finds_its_groups_profile_and_summary_again(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("join_group", name="dev", role="lead")
    await bo.request("set_profile", title="Reviewer", capabilities=["read"])
    await bo.request("set_summary", summary="on the parser")
    await bo.request("set_stats", stats={"messagesIn": 3, "messagesOut": 1, "uptime": 60})
    await bo.leave()
    await ana.event("peer_joined"), await ana.event("peer_left")
    bo = await world.peer("bo", sessionId="another session")
    greeting = bo.greeting
    assert (greeting["restored"], greeting["lastSummary"]) == (True, "on the parser")
    assert greeting["restoredGroups"] == [{"name": "dev", "role": "lead"}]
    assert greeting["restoredStats"] == {"messagesIn": 3, "messagesOut": 1, "toolCalls": 0, "errors": 0}
    returned = await ana.event("peer_returned")
    assert (returned["summary"], returned["groups"]) == ("on the parser", [{"name": "dev", "role": "lead"}])
    assert returned["lastSeenAt"] == greeting["lastSeenAt"]
    entry = next(p for p in (await ana.request("list_peers"))["peers"] if p["displayName"] == "bo")
    assert (entry["summary"], entry["profile"]) == ("on the parser", {"title": "Reviewer", "capabilities": ["read"]})


@spec("PRES-10")
@story
async def test_saved_state_is_per_session_and_falls_back_to_the_newest(world):
    first = await world.peer("ana", sessionId="one")
    await first.request("join_group", name="one")
    second = await world.peer("ana", sessionId="two", groups=[{"name": "two"}])
    await first.leave(), await second.leave()
    assert (await world.peer("ana", sessionId="one")).greeting["restoredGroups"] == [{"name": "one"}]
    assert (await world.peer("ana", sessionId="two")).greeting["restoredGroups"] == [{"name": "two"}]
    assert (await world.peer("ana", sessionId="new")).greeting["restoredGroups"] == [{"name": "two"}]


@spec("PRES-12", "PRES-10")
@story
async def test_counters_reported_by_a_client_that_seeds_itself_do_not_double(world):
    totals = []
    for _ in range(4):
        ana = await world.peer("ana")
        seed = ana.greeting.get("restoredStats", {}).get("messagesIn", 0)
        totals.append(seed)
        await ana.request("set_stats", stats={"messagesIn": seed + 1})
        await ana.leave()
        world.pass_seconds(1)
    assert totals == [0, 1, 2, 3]


@spec("PRES-11", "PRES-7")
@story
async def test_a_hidden_peer_is_missed_by_lists_and_multicasts_but_not_by_direct_messages(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.event("peer_joined")
    await bo.request("set_visible", visible=False)
    assert (await ana.event("peer_hidden"))["name"] == "bo"
    assert [p["displayName"] for p in (await ana.request("list_peers"))["peers"]] == ["ana"]
    assert [p["visible"] for p in (await bo.request("list_peers"))["peers"]] == [True, False]
    assert (await ana.send("*"))["code"] == "no_such_recipient"
    await ana.send(bo.key, "psst")
    assert await bo.text() == "psst"
    await bo.leave()
    bo = await world.peer("bo", session=bo.session)  # still hidden, so it comes and goes unannounced
    await bo.leave()
    assert await ana.silence() == []


@spec("PRES-14")
@story
async def test_a_quiet_connection_makes_no_noise_and_leaves_no_trace(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("join_group", name="dev")
    await ana.event("peer_joined")
    quiet = await world.peer("bo", capabilities=(*ALL, "quiet"), session=None, displayName="one-shot")
    await quiet.request("join_group", name="nowhere")
    assert [p["displayName"] for p in (await quiet.request("list_peers"))["peers"]] == ["ana", "bo"]
    await ana.send("*", "everybody")
    assert await bo.text() == "everybody"
    assert [f for f in await quiet.silence() if f["type"] == "push"] == []
    await quiet.send(ana.key, "by the member")
    assert (await ana.push())["senderPubkey"] == quiet.pair.public
    await quiet.leave()
    assert await ana.silence() == []
    await bo.leave()
    assert (await world.peer("bo")).greeting["restoredGroups"] == [{"name": "dev"}]


@spec("PRES-15")
@story
async def test_an_inbox_connection_takes_what_waits_for_the_member_and_nothing_else_does(world):
    ana = await world.peer("ana")
    key, _ = world.member("bo")
    first = await ana.send(key.public, "for bo")
    assert first["recipients"] == {"online": 0, "held": 1}
    quiet = await world.peer("bo", capabilities=(*ALL, "quiet"), session=None)
    assert await quiet.silence() == []
    inbox = await world.peer("bo", capabilities=(*ALL, "quiet", "inbox"), session=None)
    await inbox.settle(await inbox.push(), "shown")
    assert await ana.fate(first["messageId"]) == ["shown"]
    second = await ana.send(key.public, "live")
    assert second["recipients"] == {"online": 1, "held": 0}
    assert await inbox.text() == "live"
    await inbox.leave()  # not acknowledged, so it waits again
    bo = await world.peer("bo")
    assert await bo.text() == "live"


@spec("PRES-13")
@story
async def test_mesh_info_shows_the_mesh_at_a_glance(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", groups=[{"name": "dev"}, {"name": "dev/api"}])
    await ana.request("set_state", key="sprint", value=7)
    info = await bo.request("mesh_info")
    assert {name: info[name] for name in ("mesh", "peers", "groups", "stateKeys", "yourName", "yourGroups")} == {
        "mesh": world.mesh.id, "peers": 2, "groups": ["@dev", "@dev/api"], "stateKeys": ["sprint"], "yourName": "bo",
        "yourGroups": [{"name": "dev"}, {"name": "dev/api"}]}


@spec("PRES-9")
@story
async def test_a_profile_is_merged_and_bounded(world):
    ana = await world.peer("ana")
    await ana.request("set_profile", title="A", bio="B")
    await ana.request("set_profile", title="C")
    assert (await ana.request("list_peers"))["peers"][0]["profile"] == {"title": "C", "bio": "B"}
    answer = await ana.request("set_profile", capabilities=["x" * 20_000])
    assert answer["code"] == "too_large"


# --- status ---------------------------------------------------------------------------------------


@spec("STAT-1", "STAT-2")
def test_the_write_rule_takes_the_value_and_guards_the_attribution():
    peer = hub.Peer("k", None, "p", 0)
    table = [  # now, status, source -> source kept, whether more passes
        (0, "working", "hook", "hook", False),
        (10_000, "working", "jsonl", "hook", False),   # same status, lower rank, fresh: the source stays
        (45_000, "working", "manual", "manual", False),  # same status, lower rank, stale: it goes down
        (46_000, "working", "hook", "hook", False),    # same status, higher rank: it goes up
        (47_000, "idle", "jsonl", "jsonl", True),      # another status: stored whatever the rank
        (48_000, "dnd", "manual", "manual", False),
        (49_000, "working", "hook", "hook", False),    # dnd and working admit the same
    ]
    for now, status, source, kept, wider in table:
        assert peer.write_status(status, source, now) is wider
        assert (peer.status, peer.source, peer.status_at) == (status, kept, now)


@spec("STAT-3", "DELIV-3", "DELIV-4")
@story
async def test_messages_wait_for_a_busy_peer_and_come_in_order_when_it_is_idle(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    for status in ("working", "dnd"):
        await bo.request("set_status", status=status)
        for priority in ("low", "next", "now", "low"):
            await ana.send(bo.key, priority, priority)
        assert await bo.text() == "now"
        assert [f for f in await bo.silence() if f["type"] == "push"] == []
        await bo.request("set_status", status="idle")
        assert [await bo.text() for _ in range(3)] == ["low", "next", "low"]


@spec("DELIV-4")
@story
async def test_the_gate_holds_multicasts_as_well(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_status", status="working")
    sent = await ana.send("*", "later")
    assert await ana.fate(sent["messageId"]) == ["queued"]
    await bo.request("set_status", status="idle")
    assert await bo.text() == "later"


@spec("STAT-7")
@story
async def test_a_session_that_is_not_to_be_disturbed_says_so_in_hello(world):
    ana, (key, _) = await world.peer("ana"), world.member("bo")
    await ana.send(key.public, "not now")
    bo = await world.peer("bo", status="dnd")
    assert [f for f in await bo.silence() if f["type"] == "push"] == []
    await bo.request("set_status", status="idle")
    assert await bo.text() == "not now"
    assert (await refused(world, world.hello("cy", status="asleep")))[0] == "malformed"


@spec("STAT-4", "DELIV-3")
@story
async def test_a_status_hook_reaches_every_presence_of_its_session_and_drains(world):
    ana = await world.peer("ana")
    bo = await world.peer("bo", pid=7, cwd="/src", sessionId="S")
    other = await world.peer("bo", pid=9, cwd="/src", sessionId="T")
    status, body = await world.http("POST", "/hook/set-status", {"cwd": "/elsewhere", "status": "working", "session_id": "S"})
    assert (status, body) == (200, {"ok": True, "presence_id": bo.greeting["presenceId"]})
    sent = await ana.send(bo.key, "patience")
    assert await ana.fate(sent["messageId"]) == ["queued"]
    await world.http("POST", "/hook/set-status", {"cwd": "/src", "status": "idle", "pid": 7})
    assert await bo.text() == "patience"
    _, body = await world.http("POST", "/hook/set-status", {"cwd": "/src", "status": "working", "pid": 1234})
    assert body["presence_id"] == other.greeting["presenceId"]  # the newest there


@spec("STAT-4")
@story
async def test_a_hook_never_leaves_dnd(world):
    bo = await world.peer("bo")
    await bo.request("set_status", status="dnd")
    status, body = await world.http("POST", "/hook/set-status", {"cwd": "/home/bo", "status": "idle", "pid": 100})
    assert (status, body["ok"]) == (200, True)
    assert (await bo.request("list_peers"))["peers"][0]["status"] == "dnd"


@spec("STAT-5")
@story
async def test_a_hook_before_its_session_is_kept_ten_seconds(world):
    for pid, status in ((1, "idle"), (1, "working"), (2, "working")):
        assert (await world.http("POST", "/hook/set-status", {"cwd": "/new", "status": status, "pid": pid}))[1] == {"ok": True, "pending": True}
    ana = await world.peer("ana", cwd="/new", pid=1)
    assert (await ana.request("list_peers"))["peers"][0]["status"] == "working"  # the newest one
    world.pass_seconds(11)
    bo = await world.peer("bo", cwd="/new", pid=2)
    assert [p["status"] for p in (await bo.request("list_peers"))["peers"]] == ["working", "idle"]


@spec("STAT-4", "OPS-5")
@story
async def test_status_hooks_are_checked_and_limited(world):
    for body in ({}, {"cwd": "/x"}, {"cwd": "/x", "status": "asleep"}, {"cwd": "/x", "status": "dnd"},
                 {"cwd": 3, "status": "idle"}, {"cwd": "/" * 4097, "status": "idle"}):
        status, answer = await world.http("POST", "/hook/set-status", body)
        assert (status, answer["ok"]) == (200, False)
    codes = [(await world.http("POST", "/hook/set-status", {"cwd": "/y", "status": "idle"}))[0] for _ in range(31)]
    assert codes == [200] * 30 + [429]
    assert (await world.http("POST", "/hook/set-status", {"cwd": "/z", "status": "idle"}))[0] == 200
    assert (await world.http("POST", "/hook/set-status", raw=b"{nonsense"))[0] == 400


@spec("STAT-6", "DELIV-3")
@story
async def test_working_runs_out_after_a_minute_and_releases_what_waited(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_status", status="working")
    await ana.send(bo.key, "held")
    world.pass_seconds(59)
    assert [f for f in await bo.silence() if f["type"] == "push" and f.get("subtype") != "system"] == []
    world.pass_seconds(2)
    assert await bo.text() == "held"
    await bo.request("set_status", status="dnd")
    world.pass_seconds(70)
    assert next(p["status"] for p in (await ana.request("list_peers"))["peers"] if p["displayName"] == "bo") == "dnd"


# --- delivery -------------------------------------------------------------------------------------


@spec("DELIV-1", "DELIV-2", "DELIV-8", "DELIV-13", "DELIV-14")
@story
async def test_a_direct_message_is_accepted_pushed_acknowledged_and_shown(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    nonce, ciphertext = wire.seal_direct("hello bo", bo.key, ana.session.secret)
    ack = await ana.send(bo.key, nonce=nonce, ciphertext=ciphertext)
    assert ack == {"type": "ack", "id": ack["id"], "messageId": ack["messageId"], "queued": True,
                   "recipients": {"online": 1, "held": 0}}
    push = await bo.push()
    assert wire.open_direct(push["nonce"], push["ciphertext"], push["senderPubkey"], bo.session.secret) == "hello bo"
    assert {name: push[name] for name in ("messageId", "senderPubkey", "senderName", "senderMemberPubkey", "target", "priority", "seq")} == {
        "messageId": ack["messageId"], "senderPubkey": ana.key, "senderName": "ana", "senderMemberPubkey": ana.pair.public,
        "target": bo.key, "priority": "next", "seq": 1}
    assert await ana.fate(ack["messageId"]) == ["pushed"]
    await bo.settle(push)
    assert await ana.fate(ack["messageId"]) == ["delivered"]
    await bo.settle(push, "shown")
    status = await ana.request("message_status", messageId=ack["messageId"])
    [recipient] = status["recipients"]
    assert (status["delivered"], status["deliveredAt"], status["targetSpec"]) == (True, recipient["at"], bo.key)
    assert (recipient["name"], recipient["pubkey"], recipient["status"], recipient["state"]) == ("bo", bo.key, "delivered", "shown")


@spec("DELIV-2")
@story
async def test_for_a_client_without_receipts_written_to_the_socket_is_delivered_for_good(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", capabilities=None)
    sent = await ana.send(bo.key)
    await bo.push()
    assert await ana.fate(sent["messageId"]) == ["delivered"]
    await bo.drop()
    bo = await world.peer("bo", capabilities=None, session=bo.session)
    assert [f for f in await bo.silence() if f["type"] == "push"] == []


@spec("DELIV-5")
@story
async def test_a_member_key_reaches_all_live_sessions_of_the_member(world):
    ana = await world.peer("ana")
    one, two = await world.peer("bo", sessionId="1"), await world.peer("bo", sessionId="2")
    ack = await ana.send(one.pair.public, "both of you")
    assert ack["recipients"] == {"online": 2, "held": 0}
    assert [await one.text(), await two.text()] == ["both of you"] * 2


@spec("DELIV-5", "DELIV-6", "DELIV-9")
@story
async def test_an_absent_member_gets_its_mail_with_the_next_session(world):
    ana = await world.peer("ana")
    key, _ = world.member("bo")
    ack = await ana.send(key.public, "welcome")
    bo = await world.peer("bo")
    assert await bo.text() == "welcome"
    await bo.leave()  # without an acknowledgement
    bo = await world.peer("bo", sessionId="yet another")
    push = await bo.push()
    assert push["messageId"] == ack["messageId"]
    await bo.settle(push, "shown")
    await bo.leave()
    assert await (await world.peer("bo")).silence() == []


@spec("DELIV-5")
@story
async def test_a_session_that_is_away_is_kept_its_mail_and_only_it_gets_it(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.leave()
    ack = await ana.send(bo.key, "come back")
    assert ack["recipients"] == {"online": 0, "held": 1}
    other = await world.peer("bo", sessionId="other")
    assert [f for f in await other.silence() if f.get("subtype") != "system"] == []
    again = await world.peer("bo", session=bo.session)
    assert await again.text() == "come back"


@spec("DELIV-5")
@story
async def test_a_message_to_oneself_arrives(world):
    ana = await world.peer("ana")
    await ana.send(ana.key, "note to self")
    assert await ana.text() == "note to self"


@spec("DELIV-7", "MSG-8")
@pytest.mark.parametrize("target", ["0" * 64, "bo", "#general", "tag:x", "@", "@nobody", "", "@all"])
@story
async def test_a_target_that_matches_nobody_is_an_error_with_the_sends_id(world, target):
    ana = await world.peer("ana")
    answer = await ana.send(target)
    assert (answer["type"], answer["code"], answer["id"]) == ("error", "no_such_recipient", "s1")
    assert world.mesh.store.queue_depth() == 0


@spec("GROUP-3", "DELIV-5")
@story
async def test_a_group_reaches_itself_and_what_is_below_it_never_the_sender(world):
    ana = await world.peer("ana", groups=[{"name": "a"}])
    below = await world.peer("bo", groups=[{"name": "a/b"}])
    deeper = await world.peer("cy", groups=[{"name": "a/b/c"}])
    beside = await world.peer("di", groups=[{"name": "ab"}])
    ack = await ana.send("@a", "one")
    assert ack["recipients"] == {"online": 2, "held": 0}
    assert [await below.text(), await deeper.text()] == ["one", "one"]
    assert (await ana.send("@a/b/c", "two"))["recipients"] == {"online": 1, "held": 0}
    await ana.send("*", "all")
    assert await beside.text() == "all"
    assert [f for f in await ana.silence() if f.get("subtype") != "system"] == []


@spec("GROUP-1", "GROUP-2")
@story
async def test_groups_are_joined_left_and_named_with_care(world):
    ana = await world.peer("ana")
    await ana.request("join_group", name="dev", role="lead")
    await ana.request("join_group", name="dev")  # without a role clears it
    quote = "z') OR mesh_id <> ('"
    await ana.request("join_group", name=quote)
    assert (await ana.request("list_peers"))["peers"][0]["groups"] == [{"name": "dev"}, {"name": quote}]
    bo = await world.peer("bo")
    await bo.send("@" + quote, "by name")
    assert await ana.text() == "by name"
    assert (await ana.request("leave_group", name="never joined"))["type"] == "ack"
    for name in ("", " ", "all", "@dev", "line\nbreak"):
        assert (await ana.request("join_group", name=name))["code"] == "invalid_name"
    assert (await ana.request("join_group", name="x" * 65))["code"] == "too_large"
    for n in range(62):
        await ana.request("join_group", name=f"g{n}")
    assert (await ana.request("join_group", name="one too many"))["code"] == "limit"


@spec("DELIV-6")
@story
async def test_absent_members_in_the_group_are_held_their_copy_but_not_of_low_ones(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", groups=[{"name": "dev"}])
    await bo.leave()
    world.member("cy", groups=({"name": "dev/api"},))  # enrolled, never here
    world.member("di")
    assert (await ana.send("@dev", "meeting"))["recipients"] == {"online": 0, "held": 2}
    assert (await ana.send("*", "low noise", "low"))["code"] == "no_such_recipient"
    assert (await ana.send("*", "for all", "now"))["recipients"] == {"online": 0, "held": 3}
    bo, cy, di = await world.peer("bo"), await world.peer("cy"), await world.peer("di")
    assert [await bo.text(), await bo.text()] == ["meeting", "for all"]
    assert [await cy.text(), await cy.text()] == ["meeting", "for all"]
    assert await di.text() == "for all"


@spec("DELIV-6")
@story
async def test_two_hundred_multicasts_are_held_for_a_member_and_the_oldest_expire_first(world):
    ana = await world.peer("ana")
    world.member("bo")
    sent = [await ana.send("*", str(n)) for n in range(203)]
    assert await ana.fate(sent[2]["messageId"]) == ["expired"]
    bo = await world.peer("bo")
    assert [await bo.text() for _ in range(200)] == [str(n) for n in range(3, 203)]


@spec("DELIV-8", "DELIV-15")
@story
async def test_one_acknowledgement_settles_everything_up_to_its_seq(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    sent = [(await ana.send(bo.key, str(n)))["messageId"] for n in range(5)]
    pushes = [await bo.push() for _ in range(5)]
    assert [p["seq"] for p in pushes] == [1, 2, 3, 4, 5]
    assert [p["messageId"] for p in pushes] == sent
    await bo.request("client_ack", upTo=3)
    assert [(await ana.fate(id))[0] for id in sent] == ["delivered"] * 3 + ["pushed"] * 2
    await bo.request("client_ack", upTo=5, stage="shown")
    assert [(await ana.fate(id))[0] for id in sent] == ["shown"] * 5
    assert (await bo.request("client_ack"))["code"] == "malformed"
    assert (await bo.request("client_ack", upTo=1, brokerMessageId="x"))["code"] == "malformed"


@spec("DELIV-8")
@story
async def test_a_push_without_an_answer_is_repeated_after_thirty_seconds(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send(bo.key, "hello?")
    first = await bo.push()
    world.pass_seconds(20)
    assert [f for f in await bo.silence() if f["type"] == "push"] == []
    world.pass_seconds(11)
    second = await bo.push()
    assert (second["messageId"], second["seq"]) == (first["messageId"], 2)
    await bo.request("client_ack", upTo=2)
    world.pass_seconds(60)
    assert [f for f in await bo.silence() if f["type"] == "push"] == []


@spec("DELIV-9")
@story
async def test_what_was_not_shown_is_queued_again_when_the_connection_ends(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    sent = [(await ana.send(bo.key, text))["messageId"] for text in ("unanswered", "delivered", "shown")]
    pushes = [await bo.push() for _ in sent]
    await bo.settle(pushes[1])
    await bo.settle(pushes[2], "shown")
    await bo.drop()
    assert [(await ana.fate(id))[0] for id in sent] == ["queued", "queued", "shown"]
    bo = await world.peer("bo", session=bo.session)
    assert [await bo.text(), await bo.text()] == ["unanswered", "delivered"]
    assert [f for f in await bo.silence() if f["type"] == "push"] == []


@spec("DELIV-10")
@story
async def test_only_the_newest_unshown_deliveries_come_back(world, monkeypatch):
    monkeypatch.setattr(hub, "UNSHOWN_KEPT", 4)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    for n in range(9):
        await ana.send(bo.key, str(n))
        await bo.settle(await bo.push())
    await bo.drop()
    bo = await world.peer("bo", session=bo.session)
    assert [await bo.text() for _ in range(5)] == ["4", "5", "6", "7", "8"]
    assert [f for f in await bo.silence() if f["type"] == "push"] == []


@spec("DELIV-11")
@story
async def test_a_repeated_send_returns_the_first_result_and_is_delivered_once(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    nonce, body = wire.plain_body("once")
    first = await ana.send(bo.key, nonce=nonce, ciphertext=body, client_message_id="c1")
    await bo.leave()
    second = await ana.send(bo.key, nonce=nonce, ciphertext=body, client_message_id="c1")
    assert (second["messageId"], second["recipients"]) == (first["messageId"], {"online": 1, "held": 0})
    conflict = await ana.send(bo.key, "something else", client_message_id="c1")
    assert (conflict["type"], conflict["code"]) == ("error", "id_conflict")
    assert world.mesh.store.queue_depth() == 1
    await world.restart()
    ana = await world.peer("ana", session=ana.session)
    assert (await ana.send(bo.key, nonce=nonce, ciphertext=body, client_message_id="c1"))["messageId"] == first["messageId"]


@spec("DELIV-11", "OPS-5")
@story(send_rate=2)
async def test_a_repeat_is_answered_even_when_the_rate_is_used_up(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    nonce, body = wire.plain_body("x")
    first = await ana.send(bo.key, nonce=nonce, ciphertext=body, client_message_id="c1")
    await ana.send(bo.key)
    assert (await ana.send(bo.key))["code"] == "rate_limited"
    again = await ana.send(bo.key, nonce=nonce, ciphertext=body, client_message_id="c1")
    assert again["messageId"] == first["messageId"]


@spec("DELIV-12", "DELIV-15")
@story
async def test_beyond_the_window_messages_wait_in_the_store_and_keep_their_order(world, monkeypatch):
    monkeypatch.setattr(hub, "WINDOW", 3)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    for n in range(8):
        await ana.send(bo.key, str(n))
    got = [await bo.push() for _ in range(3)]
    assert [f for f in await bo.silence() if f["type"] == "push"] == []
    for _ in range(5):
        await bo.request("client_ack", upTo=got[-1]["seq"])
        while len(got) < 8:
            frame = await bo.push()
            got.append(frame)
            if len(got) % 3 == 0:
                break
    assert [wire.read_plain(p["ciphertext"]) for p in got] == [str(n) for n in range(8)]


@spec("DELIV-12", "OPS-6")
@story
async def test_a_receiver_that_does_not_read_loses_nothing_and_is_caught_up_later(world, monkeypatch):
    monkeypatch.setattr(hub, "OUTBOX_SOFT", 64 * 1024)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    body = "x" * 400_000
    for _ in range(20):
        assert (await ana.send(bo.key, body))["type"] == "ack"  # the sender is not slowed down
    link = next(link for link in world.mesh.links if link.peer.key == bo.key)
    assert link.conn.buffered < 2_000_000
    for _ in range(20):
        push = await bo.push()
        assert len(push["ciphertext"]) > 500_000
        await bo.settle(push)


@spec("OPS-6")
@story
async def test_a_reader_too_slow_for_what_is_not_stored_is_closed_with_1013(world, monkeypatch):
    monkeypatch.setattr(hub, "OUTBOX_HARD", 200_000)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    bo.conn.writer.transport.pause_reading()
    link = next(link for link in world.mesh.links if link.peer.key == bo.key)
    async with asyncio.timeout(LIMIT):
        n = 0
        while not link.closed:
            n += 1
            await ana.request("set_state", key="k", value="x" * 200_000 + str(n))
    assert link.conn.ws.close_code in (None, 1013)
    assert (await ana.request("get_state", key="k"))["updatedBy"] == "ana"


@spec("DELIV-16")
@story
async def test_a_sealed_multicast_gives_each_recipient_only_its_own_key(world):
    sealed = (*ALL, "sealed_multicast")
    ana, bo, cy = [await world.peer(name, capabilities=sealed) for name in ("ana", "bo", "cy")]
    nonce, body, keys = wire.seal_multicast("secret plan", [bo.key], ana.session.secret)
    answer = await ana.send("*", nonce=nonce, ciphertext=body, sealedKeys=keys)
    assert (answer["code"], answer["missing"]) == ("sealed_keys_missing", [{"pubkey": cy.key, "sealable": True}])
    nonce, body, keys = wire.seal_multicast("secret plan", [bo.key, cy.key], ana.session.secret)
    assert (await ana.send("*", nonce=nonce, ciphertext=body, sealedKeys=keys))["recipients"] == {"online": 2, "held": 0}
    for peer in (bo, cy):
        push = await peer.push()
        assert push["sealedKey"] == keys[peer.key]
        assert wire.open_multicast(push["nonce"], push["ciphertext"], push["sealedKey"], ana.key, peer.session.secret) == "secret plan"


@spec("DELIV-16")
@story
async def test_a_recipient_that_cannot_open_a_sealed_body_is_named(world):
    ana, stock = await world.peer("ana"), await world.peer("bo", capabilities=None)
    nonce, body, keys = wire.seal_multicast("x", [stock.key], ana.session.secret)
    answer = await ana.send("*", nonce=nonce, ciphertext=body, sealedKeys=keys)
    assert answer["missing"] == [{"pubkey": stock.key, "sealable": False}]


@spec("DELIV-17")
@story
async def test_after_seven_days_a_message_expires(world):
    ana = await world.peer("ana")
    key, _ = world.member("bo")
    sent = await ana.send(key.public, "stale")
    assert await ana.fate(sent["messageId"]) == ["queued"]
    world.skipped += 7 * 24 * 3600 + 1
    world.mesh.pruned_at = -1e9
    world.pass_seconds(0)
    assert await ana.fate(sent["messageId"]) == ["expired"]
    bo = await world.peer("bo")
    assert [f for f in await bo.silence() if f["type"] == "push"] == []


@spec("DELIV-13")
@story
async def test_only_sender_and_recipients_may_ask_after_a_message(world):
    ana, bo, cy = [await world.peer(name) for name in ("ana", "bo", "cy")]
    sent = await ana.send(bo.key)
    assert (await bo.request("message_status", messageId=sent["messageId"]))["type"] == "message_status_result"
    assert (await cy.request("message_status", messageId=sent["messageId"]))["code"] == "not_found"
    assert (await ana.request("message_status", messageId="unknown"))["code"] == "not_found"


@spec("DELIV-15", "TURN-1")
@story
async def test_frames_sent_in_one_go_are_handled_in_order(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    for n in range(50):
        nonce, body = wire.plain_body(str(n))
        ana.say(type="send", id=str(n), targetSpec=bo.key, nonce=nonce, ciphertext=body)
    ana.say(type="set_state", key="k", value=1)
    ana.say(type="get_state", key="k", _reqId="read")
    assert [await bo.text() for _ in range(50)] == [str(n) for n in range(50)]
    assert (await ana.answer(lambda f: f.get("_reqId") == "read"))["value"] == 1


# --- state, audit ---------------------------------------------------------------------------------


@spec("STATE-1", "STATE-2", "STATE-3")
@story
async def test_state_is_shared_null_is_a_value_and_absent_is_not_null(world):
    ana, bo = await world.peer("ana", displayName="laptop"), await world.peer("bo")
    await ana.request("set_state", key="plan", value={"b": 1, "a": [None, 2.5]})
    assert await bo.expect("state_change", key="plan", value={"b": 1, "a": [None, 2.5]}, updatedBy="ana")
    await ana.request("set_state", key="empty", value=None)
    await bo.expect("state_change")
    stored, absent = await bo.request("get_state", key="empty"), await bo.request("get_state", key="missing")
    assert (stored["value"], stored["updatedBy"]) == (None, "ana")
    assert {k: absent[k] for k in ("value", "updatedBy", "updatedAt")} == {"value": None, "updatedBy": "", "updatedAt": ""}
    assert [entry["key"] for entry in (await bo.request("list_state"))["entries"]] == ["empty", "plan"]
    assert (await ana.request("set_state", key="x"))["code"] == "malformed"
    assert (await ana.request("set_state", key="", value=1))["code"] == "malformed"
    assert (await ana.request("set_state", key="k", value="x" * 300_000))["code"] == "too_large"


@spec("STATE-1", "MSG-8")
@story
async def test_set_state_without_a_request_id_is_not_answered(world):
    ana = await world.peer("ana")
    ana.say(type="set_state", key="k", value=1)
    ana.say(type="set_status", status="nonsense")
    ana.say(type="no such type")
    ana.conn.send("not json at all")
    assert await ana.silence() == []


@spec("AUDIT-4", "AUDIT-5", "AUDIT-6")
@story
async def test_the_audit_log_tells_what_happened_and_verifies(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send(bo.key, "the content", "now")
    await ana.request("set_state", key="k", value="the value")
    page = await bo.request("audit_query", limit=2)
    assert [(e["eventType"], e["actor"], e["payload"]) for e in page["entries"]] == [
        ("state_set", "ana", {"key": "k"}), ("message_sent", "ana", {"priority": "now", "targetSpec": bo.key})]
    joins = await bo.request("audit_query", eventType="peer_joined")
    assert (joins["total"], [e["actor"] for e in joins["entries"]]) == (2, ["bo", "ana"])
    verdict = await bo.request("audit_verify")
    assert (verdict["valid"], verdict["head"]) == (True, page["entries"][0]["hash"])


# --- frames ---------------------------------------------------------------------------------------


@spec("MSG-3", "MSG-4", "MSG-6", "MSG-8", "MSG-9", "MSG-11")
@pytest.mark.parametrize(("frame", "code"), [
    ({"type": "send", "id": "i", "targetSpec": 7, "nonce": "", "ciphertext": ""}, "malformed"),
    ({"type": "send", "id": "i", "targetSpec": "*", "nonce": "", "ciphertext": "", "priority": "asap"}, "malformed"),
    ({"type": "send", "id": "i", "targetSpec": "*"}, "malformed"),
    ({"type": "send", "id": "i", "targetSpec": "x" * 257, "nonce": "", "ciphertext": ""}, "too_large"),
    ({"type": "set_status", "status": "busy"}, "malformed"),
    ({"type": "get_state"}, "malformed"),
    ({"type": "set_visible", "visible": "yes"}, "malformed"),
    ({"type": "join_group", "name": None}, "malformed"),
    ({"type": "hello_ack"}, "unknown_type"),
    ({"type": "launch_missiles"}, "unknown_type"),
    ({"type": None}, "unknown_type"),
    ({}, "unknown_type"),
    ({"type": "vault_list"}, "not_implemented"),
    ({"type": "audit_query", "limit": None}, None),
    ({"type": "list_peers", "surprise": [1, 2]}, None),
])
@story
async def test_every_rejected_request_is_answered(world, frame, code):
    ana = await world.peer("ana")
    ana.conn.send(json.dumps(frame | {"_reqId": "q"}))
    answer = await ana.next()
    assert (answer.get("code"), answer["_reqId"]) == (code, "q")
    assert (await ana.request("get_state", key="k"))["type"] == "state_result"


@spec("MSG-1")
@story
async def test_binary_messages_are_read_as_text(world):
    ana = await world.peer("ana")
    ana.conn.write(ana.conn.ws.binary(b'{"type":"get_state","key":"k","_reqId":"b"}'))
    await ana.expect("state_result", _reqId="b")


# --- the turn: durability and failures ------------------------------------------------------------


@spec("TURN-1")
@story
async def test_nothing_is_said_before_it_is_committed(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    order = []
    commit, write = world.mesh.store.commit, hub.Turn._write
    world.mesh.store.commit = lambda: (order.append("commit"), commit())[1]
    world.broker._write = lambda link: (order.append("write"), write(world.broker, link))[1]
    await ana.send(bo.key)
    await bo.push()
    assert order[:3] == ["commit", "write", "write"]


@spec("TURN-2")
@story
async def test_when_the_disk_is_full_every_request_is_answered_and_nothing_is_lost(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    kept = await ana.send(bo.key, "before")
    pages = world.mesh.store._db.execute("PRAGMA page_count").fetchone()[0]
    world.mesh.store._db.execute(f"PRAGMA max_page_count = {pages}")
    failed, n = None, 0
    while failed is None and n < 200:
        n += 1
        answer = await ana.send(bo.key, "x" * 100_000)
        failed = answer if answer["type"] == "error" else None
    assert failed["code"] == "storage_error"
    assert (await ana.request("set_state", key="k", value="y" * 100_000))["code"] == "storage_error"
    assert (await world.http("GET", "/health"))[0] == 503
    world.mesh.store._db.execute("PRAGMA max_page_count = 1000000")
    after = await ana.send(bo.key, "after")
    assert after["type"] == "ack"
    assert await bo.text() == "before"
    texts = [wire.read_plain((await bo.push())["ciphertext"]) for _ in range(n)]
    assert texts[-1] == "after" and len(texts) == n  # those acknowledged, and no other
    assert (await ana.request("audit_verify"))["valid"] is True
    assert await ana.fate(kept["messageId"]) == ["pushed"]
    assert (await world.http("GET", "/health"))[0] == 200


@spec("TURN-2")
@story
async def test_a_failing_handler_is_an_internal_error_and_never_a_traceback(world, monkeypatch):
    ana, bo = await world.peer("ana"), await world.peer("bo")

    def broken(hub, link, frame):
        link.mesh.store.set_state("half", 1, None, "x", 0)
        raise KeyError("a bug")

    monkeypatch.setitem(hub.HANDLERS, "list_state", broken)
    answer = await ana.request("list_state")
    assert (answer["type"], answer["code"]) == ("error", "internal")
    assert (await ana.request("get_state", key="half"))["updatedBy"] == ""
    assert (await bo.request("get_state", key="k"))["type"] == "state_result"
    [record] = [r for r in world.log if r["msg"] == "handler failed"]
    assert record["what"] == "list_state"
    assert record["error"] == "KeyError: 'a bug'" and record["at"].startswith("test_broker.py:")


@spec("PRES-3", "PRES-5")
@story
async def test_a_session_that_comes_back_elsewhere_is_described_anew(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", displayName="desk", cwd="/here")
    await bo.drop()
    await world.peer("bo", session=bo.session, displayName="sofa", cwd="/there")
    entry = (await ana.request("list_peers"))["peers"][1]
    assert (entry["displayName"], entry["cwd"], entry.get("reconnecting")) == ("sofa", "/there", None)


@spec("GROUP-1", "HELLO-3")
@story
async def test_groups_in_hello_are_named_with_the_same_care(world):
    assert (await refused(world, world.hello("ana", groups=[{"name": "all"}])))[0] == "invalid_name"


@spec("TURN-2", "DELIV-3")
@story
async def test_what_an_undone_turn_left_behind_is_delivered_within_a_second(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_status", status="working")
    sent = await ana.send(bo.key, "kept")
    commit = world.mesh.store.commit

    def broken():
        raise sqlite3.OperationalError("disk I/O error")

    world.mesh.store.commit = broken
    frames = ({"type": "set_status", "status": "idle"}, {"type": "set_state", "key": "k", "value": 1, "_reqId": "both"})
    bo.conn.write(b"".join(bo.conn.ws.text(json.dumps(frame)) for frame in frames))  # one turn, and it fails
    assert (await bo.answer(lambda f: f.get("_reqId") == "both"))["code"] == "storage_error"
    assert [f for f in await bo.silence() if f["type"] == "push"] == []
    world.mesh.store.commit = commit
    world.pass_seconds(1)
    assert await bo.text() == "kept"
    assert await ana.fate(sent["messageId"]) == ["pushed"]


@spec("OPS-4", "DELIV-9", "PRES-10")
@story
async def test_an_orderly_stop_says_goodbye_and_saves_everything(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("join_group", name="dev")
    await bo.request("set_status", status="working")
    sent = await ana.send(bo.key, "over the restart")
    stopping = asyncio.ensure_future(world.broker.stop())
    assert await ana.answer(lambda f: "closed" in f) == {"closed": 1001, "reason": "shutting down"}
    assert await bo.answer(lambda f: "closed" in f) == {"closed": 1001, "reason": "shutting down"}
    for peer in (ana, bo):
        await peer.conn.close()
    await asyncio.wait_for(stopping, LIMIT)
    await world.start()
    world.mesh = world.broker.find_mesh(world.mesh.id)
    bo = await world.peer("bo", session=bo.session)
    assert bo.greeting["restoredGroups"] == [{"name": "dev"}]
    assert await bo.text() == "over the restart"
    ana = await world.peer("ana", session=ana.session)
    assert (await ana.request("audit_query", eventType="peer_left"))["total"] == 2  # each left once
    assert await ana.fate(sent["messageId"]) == ["pushed"]


@spec("OPS-8")
@story
async def test_both_silence_and_pings_are_minded(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    link = next(link for link in world.mesh.links if link.peer.key == bo.key)
    heard = link.heard
    world.pass_seconds(31, silent=(bo,))
    await bo.silence()  # reads, and so answers the ping
    assert link.heard > heard
    world.pass_seconds(74, silent=(bo,))
    assert link in world.mesh.links
    world.pass_seconds(2, silent=(bo,))
    assert "closed" in await bo.answer(lambda frame: "closed" in frame)
    assert (await ana.request("get_state", key="k"))["type"] == "state_result"


@spec("OPS-3", "OPS-7")
@story
async def test_the_log_is_json_lines_without_secrets(world, capsys):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send(bo.key, "do not log me")
    hub.log_to_stderr(world.log[0])
    record = json.loads(capsys.readouterr().err)
    assert set(record) >= {"ts", "level", "component", "msg"} and record["component"] == "broker"
    text = json.dumps(world.log)
    assert "do not log me" not in text and ana.key not in text and ana.pair.secret not in text


# --- HTTP -----------------------------------------------------------------------------------------


@spec("HTTP-21", "HTTP-20", "HTTP-28")
@story
async def test_health_metrics_and_the_rest_of_the_surface(world):
    status, body = await world.http("GET", "/health?x=1")
    assert status == 200 and body["status"] == "ok" and body["db"] == "up" and body["version"] == "0.1.0"
    assert body["gitSha"] and body["uptime"] >= 0
    assert world.answered.headers["Access-Control-Allow-Origin"] == "*"
    assert await world.http("HEAD", "/health") == (200, "")
    assert await world.http("GET", "/nowhere") == (404, "not found")
    assert await world.http("DELETE", "/health") == (404, "not found")
    assert (await world.http("OPTIONS", "/join"))[0] == 204
    assert "PATCH" in world.answered.headers["Access-Control-Allow-Methods"]
    assert (await world.http("POST", "/join", raw=b"x" * 70_000))[0] == 413
    assert (await world.http("GET", "/ws"))[0] == 426


@spec("OPS-2")
@story
async def test_metrics_are_prometheus_text(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send(bo.key, priority="now")
    await refused(world, {"type": "hello"})
    status, text = await world.http("GET", "/metrics")
    lines = text.splitlines()
    assert "broker_connections_total 3" in lines
    assert 'broker_connections_rejected_total{reason="timestamp_skew"} 1' in lines
    assert 'broker_messages_routed_total{priority="now"} 1' in lines
    assert "broker_connections_active 2" in lines
    assert "# TYPE broker_queue_depth gauge" in lines and "broker_hook_requests_total 0" in lines


def join_body(token, payload, key=None, name="Neo"):
    return {"invite_token": token, "invite_payload": payload, "peer_pubkey": (key or wire.KeyPair.generate()).public, "display_name": name}


@spec("INV-6")
@story
async def test_an_invite_enrols_a_member_once_and_says_so_again(world):
    token, payload = world.invite(preset={"displayName": "Trinity", "groups": [{"name": "crew"}]})
    key = wire.KeyPair.generate()
    status, body = await world.http("POST", "/join", join_body(token, payload, key))
    assert (status, body["ok"], len(body["memberId"])) == (200, True, 32)
    assert await world.http("POST", "/join", join_body(token, payload, key)) == (200, {**body, "alreadyMember": True})
    world.keys["neo"] = (key, body["memberId"])
    neo = await world.peer("neo")
    assert neo.greeting["memberDisplayName"] == "Trinity"
    assert neo.greeting["memberProfile"]["groups"] == [{"name": "crew"}]
    assert (await world.http("POST", "/join", join_body(token, payload)))[1]["error"] == "invite_exhausted"


@spec("INV-6", "INV-7")
@story
async def test_a_bad_invite_is_refused_with_its_code(world):
    token, payload = world.invite(uses=9)
    other_owner = wire.KeyPair.generate()
    foreign = wire.sign_invite({**payload, "owner_pubkey": other_owner.public}, other_owner.secret)
    elsewhere = wire.sign_invite({**payload, "mesh_id": "gone"}, world.owner.secret)
    admin = wire.sign_invite({**payload, "role": "admin"}, world.owner.secret)
    unregistered = wire.sign_invite({**payload, "expires_at": payload["expires_at"] + 1}, world.owner.secret)
    expired, expired_payload = world.invite(expires_in=-1)
    revoked, revoked_payload = world.invite(expires_in=4000)
    world.mesh.store.revoke_invite(world.mesh.store.invites()[-1].id, world.broker.clock())
    cases = [
        (join_body(token, {**payload, "mesh_slug": "tampered"}), "invite_bad_signature"),
        (join_body(token, elsewhere), "mesh_not_found"),
        (join_body(token, foreign), "invite_owner_mismatch"),
        (join_body("x" * 30, payload), "invite_not_found"),
        (join_body(token, admin), "invite_payload_mismatch"),
        (join_body(wire.invite_token(unregistered), unregistered), "invite_not_found"),
        (join_body(expired, expired_payload), "invite_expired"),
        (join_body(revoked, revoked_payload), "invite_revoked"),
    ]
    for body, code in cases:
        status, answer = await world.http("POST", "/join", body)
        assert (status, answer["ok"], answer["error"]) == (400, False, code)
    for body in ({}, {**join_body(token, payload), "peer_pubkey": "short"}, {**join_body(token, payload), "display_name": " "}):
        assert (await world.http("POST", "/join", body))[0] == 400
    assert (await world.http("POST", "/join", raw=b"[1]"))[0] == 400


@spec("INV-9")
@story
async def test_five_joiners_on_a_one_use_invite_give_one_member(world):
    token, payload = world.invite()
    answers = await asyncio.gather(*(world.http("POST", "/join", join_body(token, payload)) for _ in range(5)))
    assert sorted(answer.get("error", "joined") for _, answer in answers) == ["invite_exhausted"] * 4 + ["joined"]


@spec("HTTP-25", "HTTP-23", "HTTP-22")
@story
async def test_a_mesh_is_created_by_the_owner_key_that_signs_for_it(world):
    owner = wire.KeyPair.generate()
    body = {"slug": "lab", "name": "The Lab", "owner_pubkey": owner.public}
    status, answer = await world.http("POST", "/mesh", body, sign=owner)
    assert (status, answer["ok"], answer["slug"], answer["brokerUrl"]) == (200, True, "lab", world.broker.url)
    assert (world.data / "lab" / "mesh.db").exists()
    assert (await world.http("POST", "/mesh", body, sign=owner)) == (200, answer)  # the answer may have been lost
    other = wire.KeyPair.generate()
    taken = {**body, "owner_pubkey": other.public}
    assert (await world.http("POST", "/mesh", taken, sign=other))[1]["error"] == "slug_taken"
    assert (await world.http("POST", "/mesh", body, sign=wire.KeyPair.generate()))[1]["error"] == "forbidden"
    for slug in ("", "../up", "UPPER", "a" * 64, 7):
        assert (await world.http("POST", "/mesh", {**body, "slug": slug}, sign=owner))[1]["error"] == "bad_slug"
    _, mesh = await world.http("GET", f"/mesh/{answer['meshId']}", sign=owner)
    assert mesh == {"ok": True, "meshId": answer["meshId"], "slug": "lab", "name": "The Lab", "ownerPubkey": owner.public}


@spec("HTTP-25")
def test_from_elsewhere_a_mesh_takes_the_admin_token(tmp_path):
    broker = Broker(data=tmp_path, admin_token="let-me-in")
    request = wire.Request("POST", "/mesh", "1.1", "/mesh", {}, {"authorization": "Bearer wrong"}, 2, b"{}")
    with pytest.raises(hub.Denied) as denied:
        hub.http_create_mesh(broker, hub.Call(request, (), loopback=False, address="192.0.2.1"))
    assert (denied.value.status, denied.value.code) == (403, "forbidden")
    request.headers["authorization"] = "Bearer let-me-in"
    with pytest.raises(hub.Denied) as denied:
        hub.http_create_mesh(broker, hub.Call(request, (), loopback=False, address="192.0.2.1"))
    assert denied.value.message == "the request is not signed by owner_pubkey"


@spec("HTTP-23", "HTTP-24", "HTTP-26")
@story
async def test_signed_requests_are_checked_and_not_replayed(world):
    target = f"/mesh/{world.mesh.id}/members"
    assert (await world.http("GET", target))[0] == 401
    assert (await world.http("GET", target, sign=wire.KeyPair.generate()))[1]["error"] == "unauthorized"
    now = str(world.broker.clock())
    signature = wire.sign(wire.http_text("GET", target, b"", int(now), world.owner.public), world.owner.secret)
    headers = {"X-Mesh-Key": world.owner.public, "X-Mesh-Time": now, "X-Mesh-Signature": signature}
    assert (await world.http("GET", target + "?x", headers=headers))[1]["error"] == "bad_signature"
    assert (await world.http("GET", target, headers={**headers, "X-Mesh-Time": str(int(now) + 1)}))[1]["error"] == "bad_signature"
    assert (await world.http("GET", target, headers={**headers, "X-Mesh-Time": str(int(now) - 61_000)}))[1]["error"] == "timestamp_skew"
    assert (await world.http("GET", target, headers=headers))[0] == 200
    assert (await world.http("GET", target, headers=headers))[1]["error"] == "replayed"


@spec("HTTP-26", "HTTP-27", "INV-8")
@story
async def test_admins_manage_members_and_invites_and_members_do_not(world):
    ana, _ = world.member("ana", "admin")
    bo = await world.peer("bo")
    base = f"/mesh/{world.mesh.id}"
    payload = wire.sign_invite({
        "v": 1, "mesh_id": world.mesh.id, "mesh_slug": "den", "broker_url": world.broker.url, "mesh_root_key": "x",
        "expires_at": world.broker.clock() // 1000 + 60, "role": "member", "owner_pubkey": world.owner.public}, world.owner.secret)
    body = {"token": wire.invite_token(payload), "maxUses": 3}
    assert (await world.http("POST", f"{base}/invites", body, sign=bo.pair))[1]["error"] == "forbidden"
    _, answer = await world.http("POST", f"{base}/invites", body, sign=ana)
    assert (await world.http("POST", f"{base}/invites", body, sign=ana))[1]["error"] == "invite_exists"
    assert (await world.http("POST", f"{base}/invites", {"token": "junk" * 9}, sign=ana))[1]["error"] == "invite_malformed"
    _, listed = await world.http("GET", f"{base}/invites", sign=world.owner)
    [invite] = listed["invites"]
    assert (invite["id"], invite["maxUses"], invite["usedCount"], invite["revokedAt"]) == (answer["inviteId"], 3, 0, None)
    assert "token" not in invite
    assert (await world.http("DELETE", f"{base}/invites/{invite['id']}", sign=ana))[0] == 200
    assert (await world.http("DELETE", f"{base}/invites/{invite['id']}", sign=ana))[0] == 404
    _, members = await world.http("GET", f"{base}/members", sign=bo.pair)
    assert [(m["displayName"], m["permission"], m["online"]) for m in members["members"]] == [("ana", "admin", False), ("bo", "member", True)]


@spec("HTTP-27")
@story
async def test_revoking_a_member_closes_its_connections_and_keeps_it_out(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.event("peer_joined")
    target = f"/mesh/{world.mesh.id}/members/{world.keys['bo'][1]}"
    assert (await world.http("DELETE", target, sign=ana.pair))[1]["error"] == "forbidden"
    assert (await world.http("DELETE", target, sign=world.owner))[0] == 200
    assert await bo.next() == {"closed": 4001, "reason": "revoked"}
    assert (await ana.event("peer_left"))["name"] == "bo"
    assert (await refused(world, world.hello("bo")))[0] == "unauthorized"
    assert (await ana.send(bo.key))["code"] == "no_such_recipient"
    token, payload = world.invite()
    assert (await world.http("POST", "/join", join_body(token, payload, bo.pair)))[1]["error"] == "member_revoked"


@spec("OPS-1")
def test_a_broker_is_embedded_in_two_lines(tmp_path):
    async def main():
        async with Broker(data=tmp_path / "new" / "place", port=0) as broker:
            assert broker.url.startswith("ws://127.0.0.1:")
            connection = await wire.connect(broker.url)
            await connection.close()

    asyncio.run(main())


@spec("OPS-1")
def test_the_command_refuses_a_port_in_use_and_settings_that_make_no_sense(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert hub.main(["--port", port, "--data", str(tmp_path)]) == 1
    assert hub.main(["--port", "0", "--data", str(tmp_path), "--tls-cert", "/nonexistent.pem"]) == 1
    assert hub.main(["--port", "99999", "--data", str(tmp_path)]) == 1
    (tmp_path / "file").write_text("")
    assert hub.main(["--port", "0", "--data", str(tmp_path / "file")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("claudemesh broker: ")]) == 4
    assert not any("Traceback" in line for line in lines)


@spec("OPS-1", "STORE-5")
@story
async def test_a_directory_that_is_no_mesh_is_skipped_and_said_so(world):
    (world.data / "junk").mkdir()
    (world.data / "junk" / "mesh.db").write_text("this is no database")
    (world.data / "stray file").write_text("")
    await world.restart()
    assert [r["mesh"] for r in world.log if r["msg"] == "mesh skipped"] == ["junk"]
    assert (await world.peer("ana")).greeting["type"] == "hello_ack"


@spec("OPS-9")
def test_the_broker_speaks_tls(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert,
                           "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], capture_output=True)
    if made.returncode != 0:
        pytest.skip("openssl cannot make a certificate here")

    async def main():
        async with Broker(data=tmp_path / "data", port=0, tls_cert=str(cert), tls_key=str(key)) as broker:
            assert broker.url.startswith("wss://")
            connection = await wire.connect(broker.url, tls=ssl.create_default_context(cafile=cert))
            connection.send('{"type":"list_peers"}')
            [text] = await connection.receive()
            assert json.loads(text)["code"] == "no_hello"
            await connection.close()

    asyncio.run(main())
