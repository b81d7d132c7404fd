"""Time and the outside world as a model and a person meet them: tools, notifications, `claudemesh remind`."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta

import pytest

import claudemesh
import wire
from test_cli import LIMIT, Person, ada, bob, broker, person  # noqa: F401  fixtures
from test_mcp import ALICE, BOB, NOW, OURS, FakeClient, Fixture, peer, push, system
from world import story

spec = pytest.mark.spec
MEMBER = "d" * 64


def fixture(slug: str = "alpha", **answers: object) -> tuple[Fixture, FakeClient]:
    client = FakeClient(slug, peer("alice", ALICE))
    client.member_key, client.answers = MEMBER, answers
    return Fixture(client), client


# --- tools ----------------------------------------------------------------------------------------


@spec("SCHED-10")
def test_a_reminder_is_for_the_member_unless_it_says_for_whom():
    world, client = fixture(schedule={"scheduledId": "id-1", "deliverAt": NOW})
    said = world.call("schedule_reminder", message="tea\nand cake", in_seconds=90)
    assert said == ("Scheduled on alpha; not encrypted: the broker can read it.\n"
                    '- id-1 to yourself at 2026-01-02T03:04:05.006Z: "tea and cake"')
    [(type, fields)] = client.asked
    assert abs(fields.pop("deliverAt") - (time.time() + 90) * 1000) < 5000
    assert (type, fields) == ("schedule", {"to": MEMBER, "message": "tea\nand cake", "subtype": "reminder"})
    for to, target in (("alice", ALICE), ("@team", "@team"), ("*", "*"), ("alpha:alice", ALICE), (BOB.upper(), BOB)):
        assert f" to {target} at " in world.call("schedule_reminder", message="m", deliver_at=NOW, to=to)
        assert client.asked[-1] == ("schedule", {"to": target, "message": "m", "subtype": "reminder", "deliverAt": NOW})


@spec("SCHED-10")
def test_a_recurring_reminder_says_its_expression_and_next_time():
    world, client = fixture(schedule={"scheduledId": "id-1", "deliverAt": NOW, "cron": "0 9 * * MON"})
    said = world.call("schedule_reminder", message="plan", cron="0 9 * * MON")
    assert said.endswith('- id-1 to yourself at 2026-01-02T03:04:05.006Z, cron "0 9 * * MON", sent 0 times: "plan"')
    assert client.asked[-1][1]["cron"] == "0 9 * * MON" and client.asked[-1][1]["deliverAt"] == 0


@spec("SCHED-10")
def test_what_a_reminder_is_refused_for():
    world, client = fixture(schedule=claudemesh.MeshError("invalid_cron", "minute: '61': is outside 0-59"))
    for when in ({}, {"in_seconds": 1, "cron": "* * * * *"}, {"in_seconds": 1, "deliver_at": 2, "cron": "* * * * *"}):
        assert world.fail("schedule_reminder", message="m", **when) == (
            "Say when: exactly one of in_seconds, deliver_at and cron. (bad_argument)")
    assert "Nobody called" in world.fail("schedule_reminder", message="m", in_seconds=1, to="zoe")
    assert client.asked == [("list_peers", {})]
    assert world.fail("schedule_reminder", message="m", cron="61 * * * *") == "minute: '61': is outside 0-59 (invalid_cron)"
    two = Fixture(FakeClient("alpha"), FakeClient("beta"))
    assert "name one with `mesh`" in two.fail("schedule_reminder", message="m", in_seconds=1)


@spec("SCHED-10")
def test_scheduled_messages_are_listed_with_whole_ids_and_cancelled_by_them():
    entries = [{"id": "i" * 36, "to": MEMBER, "message": "x" * 100, "deliverAt": NOW, "createdAt": NOW},
               {"id": "j", "to": OURS, "message": "<channel>", "deliverAt": NOW, "createdAt": NOW},
               {"id": "k", "to": "@team", "message": "stand-up", "deliverAt": NOW, "createdAt": NOW, "cron": "@daily",
                "firedCount": 3}]
    world, client = fixture(list_scheduled={"messages": entries}, cancel_scheduled={"scheduledId": "k", "ok": True})
    assert world.call("list_scheduled").splitlines() == [
        f'- {"i" * 36} to yourself at 2026-01-02T03:04:05.006Z: "{"x" * 59}…"',
        '- j to yourself at 2026-01-02T03:04:05.006Z: "&lt;channel>"',
        '- k to @team at 2026-01-02T03:04:05.006Z, cron "@daily", sent 3 times: "stand-up"']
    assert world.call("cancel_scheduled", id="k") == "Cancelled k."
    assert client.asked[-1] == ("cancel_scheduled", {"scheduledId": "k"})
    client.answers["cancel_scheduled"] = {"scheduledId": "k", "ok": False}
    assert world.fail("cancel_scheduled", id="k") == (
        'Nothing scheduled has the id "k": it was sent, or never yours. (not_found)')
    client.answers["list_scheduled"] = {"messages": []}
    assert world.call("list_scheduled") == "Nothing is scheduled."


@spec("CLOCK-1", "CLOCK-2")
def test_the_clock_tools_say_how_it_stands():
    reading = {"speed": 10, "paused": False, "tick": 3, "simTime": "2026-01-02T03:07:05.006Z",
               "startedAt": "2026-01-02T03:04:05.006Z"}
    world, client = fixture(set_clock=reading, pause_clock=reading | {"paused": True}, resume_clock=reading,
                            get_clock=reading | {"speed": 0, "paused": True})
    running = ("running at speed x10; tick 3, simulated time 2026-01-02T03:07:05.006Z, started 2026-01-02T03:04:05.006Z")
    assert world.call("mesh_set_clock", speed=10) == running
    assert world.call("mesh_pause_clock") == running.replace("running", "paused")
    assert world.call("mesh_resume_clock") == running
    assert world.call("mesh_clock") == "The mesh has no clock yet: mesh_set_clock starts it."
    for speed in (0, 101, 0.5):
        assert world.fail("mesh_set_clock", speed=speed) == '"speed" must be from 1 to 100. (bad_argument)'
    assert client.asked[0] == ("set_clock", {"speed": 10})


@spec("WATCH-1", "WATCH-9")
def test_the_watch_tools_are_the_wire_requests():
    world, client = fixture(
        watch={"watchId": "w_1", "url": "https://x/", "mode": "json", "interval": 30},
        unwatch={"watchId": "w_1", "url": "https://x/", "mode": "json", "interval": 0},
        watch_list={"watches": [{"id": "w_1", "url": "https://x/", "mode": "hash", "interval": 30, "lastHash": "",
                                 "lastValue": "", "createdAt": "2026-01-02T03:04:05.006Z", "error": "no HTTP answer"}]})
    args = {"url": "https://x/", "mode": "json", "extract": "a.b", "interval": 7, "notify_on": "match:1",
            "headers": {"X": "y"}, "label": "x"}
    assert world.call("mesh_watch", **args) == "Watching https://x/ (json) every 30 s; id w_1."
    assert world.call("mesh_unwatch", watch_id="w_1") == "w_1 is ended; it watched https://x/."
    assert client.asked == [("watch", args), ("unwatch", {"watchId": "w_1"})]
    assert world.call("mesh_watches") == ("- w_1 https://x/ (hash, every 30 s), label: none, last value: none, "
                                          "last look: none, error: no HTTP answer")


@spec("HOOK-2")
def test_the_webhook_tools_show_the_secret_once():
    world, client = fixture(
        create_webhook={"name": "ci", "url": "http://h/hook/m/s", "secret": "s"},
        list_webhooks={"webhooks": [{"name": "ci", "url": "http://h/hook/m/********", "active": True,
                                     "createdAt": "2026-01-02T03:04:05.006Z"}]},
        delete_webhook={"name": "ci", "url": "", "secret": ""})
    said = world.call("create_webhook", name="ci")
    assert "URL: http://h/hook/m/s\nsecret (part of the URL, shown only now): s\n" in said
    assert "not encrypted" in said
    assert world.call("list_webhooks") == "- ci: http://h/hook/m/********, since 2026-01-02T03:04:05.006Z"
    assert world.call("delete_webhook", name="ci") == "Webhook ci is closed."


# --- notifications --------------------------------------------------------------------------------


@spec("CLOCK-6")
def test_only_the_newest_tick_waits_to_be_listed():
    world, client = fixture()
    for tick in (1, 2, 3):
        world.session.arrived(world.links[0], system("tick", tick=tick, simTime="2026-01-02T03:07:05.006Z", speed=100))
    assert [content.partition(" |")[0] for content, _ in world.notes] == [
        "[heartbeat] tick 1", "[heartbeat] tick 2", "[heartbeat] tick 3"]
    listed = world.call("check_messages")
    assert listed.startswith("1 new\n") and "tick 3 | sim time: 2026-01-02 03:07:05 | speed: x100" in listed


@spec("WATCH-10")
def test_a_triggered_watch_counts_as_mail():
    world, client = fixture()
    notice = system("watch_triggered", watchId="w_1", url="https://x/", label="front", mode="hash", oldValue="a", newValue="b")
    notice.id = "m7"
    for number in range(claudemesh.MAX_EVENTS + 1):
        world.session.arrived(world.links[0], notice if number == 0 else system("peer_left", name=str(number)))
    assert world.notes[0][0] == "[WATCH] front: a → b"
    assert "[WATCH] front: a → b" in world.call("check_messages", limit=1)  # events have not pushed it out
    assert client.seen == ["m7"]


@spec("WATCH-10")
def test_in_mode_inbox_a_triggered_watch_is_announced_without_its_data():
    client = FakeClient("alpha")
    world = Fixture(client, mode="inbox")
    world.session.arrived(world.links[0], system("watch_triggered", watchId="w_1", url="https://x/", oldValue="a"))
    [(content, meta)] = world.notes
    assert content == '[inbox] 1 waiting, the newest from "system": read with check_messages'
    assert "eventData" not in meta


@spec("WATCH-10", "WATCH-8")
@story(watch_allow_private=True)
async def test_a_triggered_watch_is_not_acknowledged_as_shown_before_it_was(world):
    from test_outside import Site, checked, watch

    pair, member = world.member("ana")
    entry = {"meshId": world.mesh.id, "memberId": member, "slug": "den", "pubkey": pair.public, "secretKey": pair.secret,
             "brokerUrl": world.broker.url, "name": "Den"}
    async with Site() as site, claudemesh.MeshClient(entry, quiet=True, inbox=True, auto_shown=False) as ana:
        bo = await world.peer("bo")
        site.pages["/"] = "one"
        await ana.request("watch", url=site.url(), interval=5)
        await checked(world)
        site.pages["/"] = "two"
        await checked(world, 6)
        push = await anext(ana)
        assert (push.kind, push.event, push.mail) == ("system", "watch_triggered", True)
        assert json.loads(push.text)["newValue"] == "3fc4ccfe745870e2"
        await ana.peers()
        [row] = (await ana.request("message_status", messageId=push.id))["recipients"]
        assert row["state"] == "delivered"
        ana.shown(push)
        await ana.peers()
        [row] = (await ana.request("message_status", messageId=push.id))["recipients"]
        assert row["state"] == "shown"
        assert [f for f in await bo.silence() if f.get("event") == "watch_triggered"] == []


# --- the command ----------------------------------------------------------------------------------


@spec("SCHED-11")
def test_a_reminder_set_by_a_command_reaches_the_member(ada: Person):  # noqa: F811
    said = ada("remind", "tea", "--in", "1")
    assert said.startswith("to yourself at 20") and "; not encrypted: the broker can read it; id " in said
    assert ada("inbox", "--wait", str(LIMIT)).splitlines()[-1] == "    tea"
    assert ada("remind", "list").split() == ["ID", "AT", "TO", "CRON", "SENT", "TEXT"]


@spec("SCHED-11")
def test_reminders_are_set_for_others_listed_and_cancelled(ada: Person, bob: Person):  # noqa: F811
    with bob.online("Bob") as received:
        ada("remind", "--in", "1s", "--to", "bob", "look here")
        push = received.get(timeout=LIMIT)
        while push.kind == "system":
            push = received.get(timeout=LIMIT)
        assert (push.kind, push.text, push.sender_name, push.secured) == ("reminder", "look here", "Ada", "plain")
    ack = ada.json("remind", "--cron", "0 9 * * MON-FRI", "stand-up", "--to", "@team")
    assert {"scheduledId", "deliverAt", "cron", "mesh", "to"} == ack.keys()
    later = ada.json("remind", "later", "--in", "2d")
    rows = ada("remind", "list").splitlines()
    assert len(rows) == 3 and any("@team" in row and "0 9 * * MON-FRI" in row for row in rows)
    assert [entry["id"] for entry in ada.json("remind", "list")] != []
    assert bob.json("remind", "list") == []
    assert bob.fails("remind", "cancel", later["scheduledId"])[0] == 1
    assert ada("remind", "cancel", later["scheduledId"]) == f"{later['scheduledId']} will not be sent\n"
    code, message = ada.fails("remind", "cancel", later["scheduledId"])
    assert (code, message.startswith("nothing scheduled has the id ")) == (1, True)
    assert [entry["id"] for entry in ada.json("remind", "list")] == [ack["scheduledId"]]


@spec("SCHED-11")
@pytest.mark.parametrize(("words", "code", "part"), [
    (["remind", "tea"], 2, "say when"),
    (["remind", "tea", "--in", "1h", "--cron", "@daily"], 2, "say when"),
    (["remind", "--in", "1h"], 2, "required: MESSAGE"),
    (["remind", "tea", "--in", "soon"], 2, "not a time from now"),
    (["remind", "tea", "--in", "-5"], 2, ""),
    (["remind", "tea", "--in", "99999999d"], 2, "not a time from now"),
    (["remind", "tea", "--at", "25:00"], 2, "not a time"),
    (["remind", "tea", "--at", "whenever"], 2, "not a time"),
    (["remind", "tea", "--at", "2001-01-01"], 1, "is past"),
    (["remind", "tea", "--cron", "*/0 * * * *"], 1, "minute: '*/0': has a step of 0"),
    (["remind", "tea", "--in", "1h", "--to", "nobody"], 1, "nobody"),
    (["remind", "", "--in", "1h"], 1, "empty"),
])
def test_a_reminder_that_makes_no_sense_is_refused(ada: Person, words, code, part):  # noqa: F811
    answered, message = ada.fails(*words)
    assert (answered, part in message) == (code, True), message
    assert ada.json("remind", "list") == []


@spec("SCHED-11")
@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90), ("90s", 90), ("1.5h", 5400), ("20 min", 1200), ("2m", 120), ("1hr", 3600), ("3day", 259_200), ("1w", 604_800),
    ("10sec", 10)])
def test_a_delay_has_a_number_and_a_unit(text, seconds):
    assert claudemesh._delay(text) == seconds


@spec("SCHED-11")
def test_a_time_of_day_is_the_next_one_and_a_date_is_local_unless_it_says():
    now = datetime.now()
    for when in (now - timedelta(minutes=1), now + timedelta(hours=1)):
        at = datetime.fromtimestamp(claudemesh._moment(f"{when:%H:%M}") / 1000)
        assert (f"{at:%H:%M:%S}", timedelta() < at - now <= timedelta(days=1, hours=1)) == (f"{when:%H:%M}:00", True)
    assert claudemesh._moment("2027-01-31T09:00:00+02:00") == 1_801_378_800_000
    assert claudemesh._moment("2027-01-31T09:00") == int(datetime(2027, 1, 31, 9).timestamp() * 1000)


def test_the_tools_of_this_chapter_are_all_there():
    names = {tool.name for tool in claudemesh.TOOLS}
    assert {"schedule_reminder", "list_scheduled", "cancel_scheduled", "mesh_set_clock", "mesh_pause_clock",
            "mesh_resume_clock", "mesh_clock", "mesh_watch", "mesh_unwatch", "mesh_watches", "create_webhook", "list_webhooks",
            "delete_webhook"} <= names
    for tool in claudemesh.TOOLS:
        if tool.request:  # what a row sends without code is what the wire expects
            fields = {field.name for field in wire.MESSAGES[tool.request].fields}
            assert {tool.rename.get(name.rstrip("!"), name.rstrip("!")).partition(".")[0] for name in tool.params} <= fields


def test_a_push_that_is_no_event_is_mail_by_its_kind():
    assert [push(kind).mail for kind in ("message", "reminder", "webhook", "state", "stream")] == [True] * 3 + [False] * 2
