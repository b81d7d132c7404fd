"""The hub under attack and in trouble: failing commits, stolen keys, odd acknowledgements, floods, and the numbers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time

import pytest

import broker as hub
import store as storage
import wire
from test_broker import join_body, refused
from world import ALL, LIMIT, World, story

spec = pytest.mark.spec
QUIET = (*ALL, "quiet")


@contextlib.contextmanager
def failing_commits(world: World):
    """While this lasts, nothing can be committed."""
    store = world.mesh.store

    def commit() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    store.commit = commit
    try:
        yield
    finally:
        del store.commit


def pushes(frames: list[dict]) -> list[dict]:
    """The messages among `frames`."""
    return [f for f in frames if f.get("type") == "push" and f.get("subtype") != "system"]


def link_of(world: World, peer) -> hub.Link:
    """The broker's end of a connection."""
    return next(link for link in world.mesh.links if link.peer.key == peer.key)


async def until(condition) -> None:
    """Waits until `condition()` holds."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0)


# --- a turn that cannot be committed --------------------------------------------------------------


@spec("TURN-1", "TURN-2")
@story
async def test_no_ack_and_no_push_leaves_when_the_commit_fails(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.event("peer_joined")
    with failing_commits(world):
        answer = await ana.send(bo.key, "never accepted", client_message_id="c")
        assert (answer["type"], answer["code"], answer["id"]) == ("error", "storage_error", "s1")
        assert await bo.silence() == []
    assert (await ana.send(bo.key, "second try", client_message_id="c"))["type"] == "ack"
    assert await bo.text() == "second try"


@spec("TURN-2", "HTTP-21")
@story
async def test_health_comes_back_by_itself(world):
    ana = await world.peer("ana")
    with failing_commits(world):
        await ana.request("set_state", key="k", value=1)
        assert (await world.http("GET", "/health"))[0] == 503
        world.pass_seconds(1)
        assert (await world.http("GET", "/health"))[0] == 503
    world.pass_seconds(1)
    assert (await world.http("GET", "/health"))[0] == 200


@spec("TURN-2")
@story
async def test_a_change_of_presence_that_was_refused_did_not_happen(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_summary", summary="before")
    with failing_commits(world):
        for request in ({"type": "join_group", "name": "g"}, {"type": "set_visible", "visible": False},
                        {"type": "set_summary", "summary": "after"}, {"type": "set_profile", "title": "T"}):
            assert (await bo.request(**request))["code"] == "storage_error"
    entry = (await ana.request("list_peers"))["peers"][1]
    assert (entry["groups"], entry["visible"], entry["summary"], entry.get("profile")) == ([], True, "before", None)
    assert (await ana.send("@g"))["code"] == "no_such_recipient"


@spec("TURN-2", "INV-6")
@story
async def test_a_join_that_could_not_be_stored_leaves_no_ghost(world):
    ana = await world.peer("ana")
    token, payload = world.invite()
    body = join_body(token, payload)
    with failing_commits(world):
        assert (await world.http("POST", "/join", body))[1]["error"] == "storage_error"
    assert (await ana.send("*", "anybody?"))["code"] == "no_such_recipient"
    assert (await world.http("POST", "/join", body))[0] == 200


@spec("TURN-2", "HTTP-27")
@story
async def test_a_revocation_that_could_not_be_stored_closes_nobody_and_can_be_repeated(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    target = f"/mesh/{world.mesh.id}/members/{world.keys['bo'][1]}"
    with failing_commits(world):
        assert (await world.http("DELETE", target, sign=world.owner))[1]["error"] == "storage_error"
    await ana.send(bo.key, "still here")
    assert await bo.text() == "still here"
    assert (await world.http("DELETE", target, sign=world.owner))[0] == 200
    assert await bo.answer(lambda f: "closed" in f) == {"closed": 4001, "reason": "revoked"}


@spec("TURN-2", "PRES-6")
@story
async def test_a_leave_that_could_not_be_stored_is_made_up_for(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.event("peer_joined")
    await ana.send(bo.pair.public, "for the member")
    await bo.push()
    link = link_of(world, bo)
    with failing_commits(world):
        await bo.leave()
        await until(lambda: link not in world.mesh.links)
    world.pass_seconds(1)
    assert (await ana.event("peer_left"))["name"] == "bo"
    assert await (await world.peer("bo", sessionId="next")).text() == "for the member"


@spec("TURN-2", "DELIV-9")
@story
async def test_a_drop_that_could_not_be_stored_still_queues_again_what_was_not_shown(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send(bo.key, "unread")
    await bo.settle(await bo.push())
    world.pass_seconds(1)  # the acknowledgement is stored
    with failing_commits(world):
        await bo.drop()
        await asyncio.sleep(0)
    bo = await world.peer("bo", session=bo.session)
    assert await bo.text() == "unread"


@spec("TURN-2", "HELLO-15")
@story
async def test_a_hello_that_could_not_be_stored_never_was(world):
    ana, _ = await world.peer("ana"), world.member("bo")
    with failing_commits(world):
        assert await refused(world, world.hello("bo", wire.KeyPair.generate())) == ("storage_error", 1008, "storage_error")
    assert [p["displayName"] for p in (await ana.request("list_peers"))["peers"]] == ["ana"]
    assert await ana.silence() == []
    await world.peer("bo")
    assert (await ana.event("peer_joined"))["name"] == "bo"


@spec("TURN-2", "PRES-3")
@story
async def test_a_hello_that_could_not_be_stored_supersedes_nobody(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    with failing_commits(world):
        assert (await refused(world, world.hello("bo", bo.session)))[0] == "storage_error"
    await ana.send(bo.key, "the old connection lives")
    assert await bo.text() == "the old connection lives"


@spec("TURN-2", "PRES-14")
@story
async def test_an_undone_turn_takes_back_nothing_of_earlier_turns(world):
    ana = await world.peer("ana")
    quiet = await world.peer("ana", capabilities=QUIET, session=None)
    with failing_commits(world):
        assert (await ana.request("set_state", key="k", value=1))["code"] == "storage_error"
    assert (await quiet.request("get_state", key="k"))["type"] == "state_result"
    assert len(world.mesh.links) == 2


@spec("TURN-2")
@story
async def test_an_acknowledgement_in_an_undone_turn_is_not_forgotten(world):
    ana, bo, stock = await world.peer("ana"), await world.peer("bo"), await world.peer("cy", capabilities=None)
    first, second = await ana.send(bo.key, "one"), await ana.send(stock.key, "two")
    push = await bo.push()
    await stock.push()
    with failing_commits(world):
        bo.say(type="client_ack", brokerMessageId=push["messageId"], stage="shown")
        assert (await bo.request("set_state", key="k", value=1))["code"] == "storage_error"
    assert await ana.fate(first["messageId"]) == ["shown"]
    assert await ana.fate(second["messageId"]) == ["delivered"]


@spec("TURN-1")
@story
async def test_an_ack_does_not_slip_out_before_the_commit_when_the_connection_is_superseded(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    newer = await world.dial()
    await until(lambda: world.broker.waiting)
    [link] = world.broker.waiting
    nonce, body = wire.plain_body("x")
    with failing_commits(world):  # both frames in one turn
        world.broker.handle(link_of(world, ana), json.dumps(
            {"type": "send", "id": "s", "targetSpec": bo.key, "nonce": nonce, "ciphertext": body}))
        world.broker.handle(link, json.dumps(world.hello("ana", ana.session)))
        world.broker.end_turn()
        assert (await ana.answer(lambda f: f.get("id") == "s"))["code"] == "storage_error"
        assert (await newer.next())["code"] == "storage_error"


@spec("TURN-2", "MSG-8")
@story
async def test_a_handler_that_fails_before_it_writes_undoes_nobody_elses_work(world, monkeypatch):
    ana, bo = await world.peer("ana"), await world.peer("bo")

    def broken(hub, link, frame):
        raise OverflowError("too large")

    monkeypatch.setitem(hub.HANDLERS, "list_state", broken)
    nonce, body = wire.plain_body("fine")
    world.broker.handle(link_of(world, ana), json.dumps(
        {"type": "send", "id": "s", "targetSpec": bo.key, "nonce": nonce, "ciphertext": body}))
    world.broker.handle(link_of(world, bo), json.dumps({"type": "list_state", "_reqId": "q"}))
    world.broker.end_turn()
    assert (await ana.answer(lambda f: f.get("id") == "s"))["type"] == "ack"
    assert (await bo.answer(lambda f: f.get("_reqId") == "q"))["code"] == "internal"
    assert await bo.text() == "fine"


# --- keys and presences ---------------------------------------------------------------------------


@spec("INV-10")
@story
async def test_nobody_enrols_with_anothers_session_key(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    token, payload = world.invite()
    for key in (bo.session, ana.session):
        assert (await world.http("POST", "/join", join_body(token, payload, key)))[1]["error"] == "key_in_use"
    await ana.send("*", "undisturbed")
    assert await bo.text() == "undisturbed"


@spec("DELIV-5", "DELIV-6")
@story
async def test_mail_for_a_session_that_is_the_member_key_is_not_taken_by_another_session(world):
    ana = await world.peer("ana")
    keyless = await world.peer("bo", session=None)
    await keyless.request("set_status", status="working")
    await ana.send(keyless.key, "for the keyless one")
    other = await world.peer("bo", sessionId="other")
    assert pushes(await other.silence()) == []
    await keyless.request("set_status", status="idle")
    assert await keyless.text() == "for the keyless one"


@spec("PRES-14")
@story
async def test_a_quiet_connection_that_ends_touches_nobodys_mail(world):
    ana = await world.peer("ana")
    keyless = await world.peer("bo", session=None)
    sent = await ana.send(keyless.key)
    await keyless.settle(await keyless.push())
    quiet = await world.peer("bo", capabilities=QUIET, session=None)
    assert (await world.http("GET", "/health"))[0] == 200 and len(world.mesh.peers) == 2
    await quiet.leave()
    await until(lambda: len(world.mesh.links) == 2)
    assert await ana.fate(sent["messageId"]) == ["delivered"]
    await ana.send(keyless.key, "and it was not superseded")
    assert await keyless.text() == "and it was not superseded"


@spec("PRES-15")
@story
async def test_a_newer_inbox_takes_over_from_an_older_one(world):
    ana = await world.peer("ana")
    first = await world.peer("bo", capabilities=(*QUIET, "inbox"), session=None)
    second = await world.peer("bo", capabilities=(*QUIET, "inbox"), session=None)
    assert await first.next() == {"closed": 4000, "reason": "superseded"}
    await ana.send(second.key, "to the newer")
    assert await second.text() == "to the newer"


@spec("HELLO-1")
@story(max_connections=2)
async def test_in_a_full_mesh_a_session_may_still_replace_its_own_connection(world):
    ana, _ = await world.peer("ana"), await world.peer("bo")
    assert (await refused(world, world.hello("cy", wire.KeyPair.generate())))[0] == "capacity"
    assert (await world.peer("ana", session=ana.session)).greeting["type"] == "hello_ack"


@spec("PRES-5")
@story(max_connections=3)
async def test_presences_in_their_grace_are_bounded(world):
    for n in range(9):
        await (await world.peer("ana", sessionId=str(n))).drop()
    assert len(world.mesh.peers) == 6
    assert [peer.session_id for peer in world.mesh.peers.values()] == list("345678")


@spec("HELLO-11")
@story
async def test_even_a_malformed_second_hello_leaves_the_connection_alone(world):
    ana = await world.peer("ana")
    ana.say(type="hello", meshId=7)
    await ana.expect("error", code="already_authenticated")
    assert (await ana.request("get_state", key="k"))["type"] == "state_result"


@spec("PRES-10")
@story
async def test_counters_do_not_go_back_when_a_client_reconnects(world):
    ana = await world.peer("ana")
    await ana.request("set_stats", stats={"messagesIn": 50, "messagesOut": 20, "toolCalls": 3})
    await ana.drop()
    again = await world.peer("ana", session=ana.session)
    assert again.greeting["restoredStats"] == {"messagesIn": 50, "messagesOut": 20, "toolCalls": 3, "errors": 0}


@spec("OPS-4", "PRES-10")
@story
async def test_an_orderly_stop_also_saves_who_is_in_its_grace(world):
    ana = await world.peer("ana")
    await ana.drop()
    await world.restart()
    ana = await world.peer("ana")
    assert (await ana.request("audit_query", eventType="peer_left"))["total"] == 1
    assert world.mesh.store.member(world.keys["ana"][1]).last_seen_at is not None


# --- silence, slowness, floods --------------------------------------------------------------------


@spec("OPS-8")
@story
async def test_whoever_answers_pings_is_never_dropped(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    link = link_of(world, bo)
    for _ in range(4):
        heard = link.heard
        world.pass_seconds(31, silent=(bo,))
        reading = asyncio.ensure_future(bo.conn.receive())  # reads, which answers the ping, and says nothing
        await until(lambda: link.heard > heard)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert link in world.mesh.links


@spec("OPS-7", "OPS-8")
@story
async def test_pings_go_out_every_thirty_seconds(world):
    ana = await world.peer("ana")
    link = link_of(world, ana)
    pinged = []
    link.conn.ping = lambda: pinged.append(round(world.skipped))
    for _ in range(70):
        world.pass_seconds(1)
    assert pinged == [30, 60]


@spec("DELIV-18")
@story
async def test_a_body_whose_push_no_client_could_read_is_refused(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    most = wire.MAX_MESSAGE_BYTES - hub.PUSH_OVERHEAD
    assert (await ana.send(bo.key, ciphertext="x" * (most + 1)))["code"] == "too_large"
    assert (await ana.send(bo.key, ciphertext="x" * (most - 1) + "é"))["code"] == "too_large"
    assert (await ana.send(bo.key, ciphertext="x" * most))["type"] == "ack"
    assert len((await bo.push())["ciphertext"]) == most


@spec("MSG-12", "STATE-4")
@story
async def test_an_answer_that_no_client_could_read_is_refused_and_the_state_is_bounded(world, monkeypatch):
    ana = await world.peer("ana")
    for n in range(5):
        assert (await ana.request("set_state", key=f"k{n}", value="x" * 250_000))["type"] == "ack"
    assert (await ana.request("set_state", key="one more", value="x" * 250_000))["code"] == "limit"
    assert (await ana.request("set_state", key="k0", value="y" * 250_000))["type"] == "ack"  # takes the old one's place
    assert (await ana.request("list_state"))["truncated"] is True
    monkeypatch.setattr(hub, "REPLY_CHARACTERS", 200_000)
    assert (await ana.request("get_state", key="k0"))["code"] == "too_large"


@spec("DELIV-8")
@story
async def test_a_slow_reader_is_not_taken_for_a_lossy_one(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send(bo.key, "one")
    await ana.send(bo.key, "two")
    first, second = await bo.push(), await bo.push()
    world.pass_seconds(25)
    await bo.settle(first)
    world.pass_seconds(20)  # the second is 45 s old, but an acknowledgement came 20 s ago
    assert pushes(await bo.silence()) == []
    world.pass_seconds(15)
    assert (await bo.push())["messageId"] == second["messageId"]


@spec("DELIV-2", "DELIV-9")
@story
async def test_what_was_written_into_a_dead_socket_was_not_delivered(world):
    ana, stock = await world.peer("ana"), await world.peer("bo", capabilities=None)
    link = link_of(world, stock)
    link.conn.abort()
    sent = await ana.send(stock.key, "into the void")
    await until(lambda: link not in world.mesh.links)
    assert await ana.fate(sent["messageId"]) == ["queued"]
    stock = await world.peer("bo", capabilities=None, session=stock.session)
    assert await stock.text() == "into the void"


@spec("DELIV-8")
@story
async def test_up_to_covers_what_was_acknowledged_in_any_order(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    sent = [(await ana.send(bo.key, str(n)))["messageId"] for n in range(3)]
    got = [await bo.push() for _ in sent]
    for n in (2, 0, 1):
        await bo.settle(got[n])
    await bo.request("client_ack", upTo=2, stage="shown")
    assert [(await ana.fate(id))[0] for id in sent] == ["shown", "shown", "delivered"]
    for odd in (-1, 0.5, 1e300):
        assert (await bo.request("client_ack", upTo=odd))["type"] == "ack"
    assert [(await ana.fate(id))[0] for id in sent] == ["shown", "shown", "delivered"]


@spec("DELIV-10")
@story
async def test_what_counts_as_final_is_what_was_delivered_first_not_what_was_sent_first(world, monkeypatch):
    monkeypatch.setattr(hub, "UNSHOWN_KEPT", 4)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_status", status="working")
    for n in range(4):
        await ana.send(bo.key, f"next {n}")
    for n in range(2):
        await ana.send(bo.key, f"now {n}", "now")
        await bo.settle(await bo.push())
    await bo.request("set_status", status="idle")
    for _ in range(4):
        await bo.settle(await bo.push())
    await bo.drop()
    bo = await world.peer("bo", session=bo.session)
    assert {await bo.text() for _ in range(4)} >= {f"next {n}" for n in range(4)}


@spec("DELIV-6", "DELIV-9")
@story
async def test_a_group_message_a_session_left_unread_goes_to_the_members_next_session(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.send("*", "for whoever of you")
    await bo.push()
    await bo.leave()
    assert await (await world.peer("bo", sessionId="next")).text() == "for whoever of you"


@spec("DELIV-6")
@story
async def test_a_direct_message_addressed_in_capitals_is_direct(world):
    ana = await world.peer("ana")
    key, _ = world.member("bo")
    await ana.send(key.public.upper(), "shouted")
    for n in range(201):
        await ana.send("*", str(n))
    bo = await world.peer("bo")
    push = await bo.push()
    assert (wire.read_plain(push["ciphertext"]), push["target"]) == ("shouted", key.public)


@spec("OPS-5", "INV-6")
@story
async def test_enrolment_is_limited_by_address(world):
    answers = [(await world.http("POST", "/join", {}))[0] for _ in range(61)]
    assert answers == [400] * 60 + [429]


@spec("HELLO-12")
@story
async def test_before_hello_a_frame_is_short(world):
    stranger = await world.dial()
    stranger.conn.send("x" * (hub.HELLO_BYTES + 1))
    assert (await stranger.next())["closed"] == 1009


@spec("AUDIT-5", "AUDIT-6")
@story
async def test_audit_requests_are_bounded(world):
    ana = await world.peer("ana")
    for n in range(210):
        ana.say(type="set_state", key="k", value=n)
    assert len((await ana.request("audit_query"))["entries"]) == 50
    assert len((await ana.request("audit_query", limit=10_000))["entries"]) == 200
    assert (await ana.request("audit_query", offset=1e300))["entries"] == []
    assert (await ana.request("audit_query", limit=-5, offset=-1e300))["entries"] == []
    ana.say(type="audit_verify", _reqId="one")
    ana.say(type="audit_verify", _reqId="two")
    answers = {f["_reqId"]: f for f in [await ana.next(), await ana.next()]}
    assert (answers["one"]["valid"], answers["two"]["code"]) == (True, "rate_limited")


@spec("INV-8")
@story
async def test_presets_are_what_a_member_could_have_said_itself(world):
    payload = wire.sign_invite({
        "v": 1, "mesh_id": world.mesh.id, "mesh_slug": "den", "broker_url": world.broker.url, "mesh_root_key": "x",
        "expires_at": world.broker.clock() // 1000 + 60, "role": "member", "owner_pubkey": world.owner.public}, world.owner.secret)
    for preset, code in (({"groups": [{"name": "@backend"}]}, "invalid_name"), ({"displayName": "x" * 129}, "too_large"),
                         ({"messageMode": "loud"}, "bad_request"), ({"roleTag": 7}, "bad_request"), ([1], "bad_request")):
        body = {"token": wire.invite_token(payload), "maxUses": 1, "preset": preset}
        assert (await world.http("POST", f"/mesh/{world.mesh.id}/invites", body, sign=world.owner))[1]["error"] == code, preset
    far = wire.sign_invite({**payload, "expires_at": 1e300}, world.owner.secret)
    body = {"token": wire.invite_token(far), "maxUses": 1}
    assert (await world.http("POST", f"/mesh/{world.mesh.id}/invites", body, sign=world.owner))[1]["error"] == "invite_malformed"


@spec("HTTP-25")
@story
async def test_a_proxy_and_a_web_page_are_local_but_who_uses_them_is_not(world):
    owner = wire.KeyPair.generate()
    body = {"slug": "lab", "owner_pubkey": owner.public}
    for header in ("X-Forwarded-For", "Forwarded", "Origin"):
        assert (await world.http("POST", "/mesh", body, sign=owner, headers={header: "x"}))[1]["error"] == "forbidden"
    assert (await world.http("POST", "/mesh", body, sign=owner))[0] == 200


@spec("HTTP-25")
@story(admin_token="let-me-in")
async def test_the_admin_token_opens_the_door_from_elsewhere(world):
    owner = wire.KeyPair.generate()
    headers = {"X-Forwarded-For": "192.0.2.1", "Authorization": "Bearer let-me-in"}
    status, answer = await world.http("POST", "/mesh", {"slug": "lab", "owner_pubkey": owner.public}, sign=owner, headers=headers)
    assert (status, answer["slug"]) == (200, "lab")


@spec("TURN-2")
@story
async def test_a_route_that_fails_answers_and_leaves_nothing(world, monkeypatch):
    def broken(hub, call):
        world.mesh.store.set_state("half", 1, None, "x", 0)
        raise KeyError("a bug")

    monkeypatch.setattr(hub, "_PATTERNS", [("GET", hub.re.compile("/broken"), broken)])
    status, body = await world.http("GET", "/broken")
    assert (status, body["error"]) == (500, "internal")
    assert world.mesh.store.get_state("half") is None


# --- the numbers SPEC.md gives --------------------------------------------------------------------


@spec("HELLO-1", "HELLO-5", "HELLO-12", "PRES-5", "STAT-2", "STAT-5", "STAT-6", "GROUP-1", "DELIV-6", "DELIV-8", "DELIV-10",
      "DELIV-12", "DELIV-17", "AUDIT-5", "OPS-5", "OPS-6", "OPS-7", "OPS-8", "MSG-9", "VEC-1", "VEC-5", "VEC-7", "VEC-9", "SQL-6",
      "SQL-9")
def test_the_numbers_are_those_of_the_specification(tmp_path):
    settings = hub.Settings(data=tmp_path)
    assert (settings.max_connections, settings.hook_rate, settings.status_ttl, settings.port) == (100, 30, 60_000, 7900)
    assert (hub.REPLAY_SECONDS, hub.HELLO_SECONDS, hub.MAX_UNAUTHENTICATED, hub.HELLO_BYTES) == (120, 10, 256, 65_536)
    assert (hub.GRACE_SECONDS, hub.PING_SECONDS, hub.SILENCE_SECONDS, hub.TICK_SECONDS) == (90, 30, 75, 1)
    assert (hub.HOOK_FRESH_MS, hub.PENDING_HOOK_MS) == (30_000, 10_000)
    assert (hub.HELD_PER_MEMBER, hub.REDELIVER_SECONDS, hub.UNSHOWN_KEPT, hub.WINDOW) == (200, 30, 1000, 512)
    assert (hub.OUTBOX_SOFT, hub.OUTBOX_HARD, hub.MESSAGE_TTL_MS) == (2**20, 2**23, 7 * 86_400_000)
    assert (hub.AUDIT_PAGE, hub.JOIN_RATE, hub.MAX_GROUPS) == ((50, 200), (60, 60.0), 64)
    assert (hub.STATE_VALUE_BYTES, hub.STATE_TOTAL_BYTES, hub.PROFILE_BYTES) == (256 * 1024, 1_500_000, 8 * 1024)
    assert hub.LENGTHS.items() >= {
        "hello": {"displayName": 128, "sessionId": 256, "cwd": 4096, "hostname": 256, "channel": 64, "model": 128},
        "send": {"targetSpec": 256, "id": 128, "client_message_id": 128, "nonce": 64},
        "set_summary": {"summary": 2048}, "set_profile": {"avatar": 2048, "title": 256, "bio": 2048},
        "join_group": {"name": 64, "role": 64}, "set_state": {"key": 256}, "get_state": {"key": 256},
        "list_files": {"query": 256}, "grant_file_access": {"sealedKey": 256},
        "peer_file_request": {"filePath": 4096}, "peer_dir_request": {"dirPath": 4096, "pattern": 256},
        "vector_store": {"collection": 128, "text": 8192}, "vector_search": {"collection": 128, "query": 1024},
        "vector_delete": {"collection": 128, "id": 64}, "mesh_query": {"sql": 262_144}, "mesh_execute": {"sql": 262_144},
        "remember": {"content": 16_384, "tags": (32, 64)}, "recall": {"query": 512}, "get_context": {"query": 512},
        "share_context": {"summary": 4096, "filesRead": (128, 512), "keyFindings": (64, 1024), "tags": (32, 64)},
        "create_task": {"title": 1024, "assignee": 128, "priority": 32, "tags": (32, 64)},
        "complete_task": {"result": 16_384}, "create_stream": {"name": 128}, "list_skills": {"query": 256},
        "share_skill": {"description": 2048, "instructions": 262_144, "tags": (32, 64)}}.items()
    assert (hub.STREAM_DATA_BYTES, hub.MANIFEST_BYTES, hub.MAX_SUBSCRIPTIONS, hub.FOUND, hub.LISTED) == (
        262_144, 16_384, 256, 20, 100)
    assert (hub.MOST, hub.PAGE_BYTES) == ({"memory": 10_000, "stream": 1000, "skill": 1000}, 1_000_000)
    assert (settings.task_lease, storage.TASKS_KEPT, storage.CONTEXTS_KEPT) == (900, 10_000, 1000)


@spec("HTTP-28")
def test_the_cors_headers_name_every_header_a_route_reads():
    allowed = dict(hub.CORS)["Access-Control-Allow-Headers"].split(", ")
    assert allowed == ["Authorization", "Content-Type", "X-Mesh-Id", "X-Member-Id", "X-File-Name", "X-Tags", "X-Persistent",
                       "X-Target-Spec", "X-Encrypted", "X-Owner-Pubkey", "X-File-Keys", "X-Mesh-Content-SHA256", "X-Mesh-Key",
                       "X-Mesh-Time", "X-Mesh-Signature"]


@spec("OPS-2")
def test_large_counts_keep_their_digits():
    metrics = hub.Metrics()
    metrics.add("broker_connections_total", amount=1_234_567)
    assert "broker_connections_total 1234567" in metrics.text().splitlines()


@spec("PRES-13")
@story
async def test_mesh_info_does_not_count_whom_the_caller_may_not_see(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", groups=[{"name": "secret"}])
    await bo.request("set_visible", visible=False)
    info = await ana.request("mesh_info")
    assert (info["peers"], info["groups"]) == (1, [])
