"""Messages that are sent later, and the mesh's simulated clock, told in virtual time; and a broker that is killed."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time

import pytest

import broker as hub
import claudemesh
import store as storage
import wire
from test_crash import BrokerProcess
from world import LIMIT, World, story

spec = pytest.mark.spec

MINUTE, HOUR, DAY, YEAR = 60, 3600, 86_400, 365 * 86_400


def in_ms(world: World, seconds: float) -> int:
    """The broker's time in so many seconds."""
    return world.broker.clock() + int(seconds * 1000)


async def remind(peer, seconds: float, text: str = "tea", to: str | None = None, **fields) -> dict:
    """Schedules a message by the stock form of the request; the answer."""
    return await peer.request("schedule", to=to or peer.key, message=text, deliverAt=in_ms(peer.world, seconds), **fields)


async def listed(peer) -> list[dict]:
    return (await peer.request("list_scheduled"))["messages"]


# --- once -----------------------------------------------------------------------------------------


@spec("SCHED-1", "SCHED-5")
@story
async def test_a_message_is_sent_when_it_is_due_and_not_before(world):
    ana, bo = await world.peer("ana"), await world.peer("bo", capabilities=("target",))
    at = in_ms(world, HOUR)
    answer = await ana.request("schedule", to=bo.key, message="Grüße", deliverAt=at, subtype="reminder")
    assert (answer["type"], answer["deliverAt"], "cron" in answer) == ("scheduled_ack", at, False)
    assert len(answer["scheduledId"]) == 36
    world.pass_seconds(HOUR - 10)
    assert [f for f in await bo.silence() if f.get("subtype") == "reminder"] == []
    world.pass_seconds(11)
    push = await bo.push()
    assert {name: push.get(name) for name in ("senderPubkey", "senderName", "priority", "nonce", "subtype", "target")} == {
        "senderPubkey": ana.pair.public, "senderName": "ana", "priority": "now", "nonce": "", "subtype": "reminder",
        "target": bo.key}
    assert wire.read_plain(push["ciphertext"]) == "Grüße"
    assert await listed(ana) == []
    world.pass_seconds(DAY)
    assert [f for f in await bo.silence() if f["type"] == "push"] == []
    assert [f["type"] for f in await ana.silence()] == ["push"]  # bo's arrival: no stray ack


@spec("SCHED-5")
@story
async def test_what_is_scheduled_is_gated_counted_and_audited_like_any_message(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_status", status="dnd")
    await remind(ana, 5, to=bo.key)
    world.pass_seconds(6)
    push = await bo.push()  # priority now passes
    await bo.settle(push, "shown")
    assert await ana.fate(push["messageId"]) == ["shown"]
    [entry] = (await ana.request("audit_query", eventType="message_sent"))["entries"]
    assert entry["payload"] == {"priority": "now", "targetSpec": bo.key}


@spec("SCHED-4", "SCHED-5")
@story
async def test_a_reminder_to_oneself_reaches_the_members_next_session(world):
    ana = await world.peer("ana")
    await remind(ana, 5)  # its own session key, as stock clients send it
    assert [entry["to"] for entry in await listed(ana)] == [ana.pair.public]
    await ana.leave()
    world.pass_seconds(6)
    again = await world.peer("ana", sessionId="another")
    push = await again.push()
    assert (wire.read_plain(push["ciphertext"]), push["subtype"]) == ("tea", "reminder")


@spec("SCHED-4")
@story
async def test_a_reminder_to_oneself_reaches_every_session_that_is_there(world):
    ana = await world.peer("ana")
    other = await world.peer("ana", sessionId="other")
    await remind(ana, 5)
    world.pass_seconds(6)
    assert [await ana.text(), await other.text()] == ["tea", "tea"]


@spec("SCHED-4")
@story
async def test_a_reminder_to_a_session_that_is_gone_reaches_its_member(world):
    ana, bo, other = await world.peer("ana"), await world.peer("bo"), await world.peer("bo", sessionId="other")
    await remind(ana, 5, "to the session", to=bo.key.upper())
    world.pass_seconds(6)
    assert await bo.text() == "to the session"
    await remind(ana, 5, "to the member", to=bo.key)
    await bo.leave()
    assert (await other.event("peer_left"))["pubkey"] == bo.key
    world.pass_seconds(6)
    assert await other.text() == "to the member"


@spec("SCHED-4", "SCHED-6")
@story
async def test_a_reminder_to_a_group_reaches_whoever_is_in_it_then(world):
    ana = await world.peer("ana", groups=[{"name": "team"}])
    await remind(ana, 5, "stand-up", to="@team")
    bo = await world.peer("bo", groups=[{"name": "team"}])
    world.member("cleo", groups=({"name": "team"},))
    world.pass_seconds(6)
    assert [await ana.text(), await bo.text()] == ["stand-up", "stand-up"]  # no session is the sending one
    cleo = await world.peer("cleo")
    push = await cleo.push()
    assert (wire.read_plain(push["ciphertext"]), push["subtype"], push["target"]) == ("stand-up", "reminder", "@team")


@spec("SCHED-6")
@story
async def test_a_message_whose_target_has_emptied_comes_back_to_its_creator(world):
    ana = await world.peer("ana")
    await remind(ana, 5, "nobody hears this", to="@nobody")
    await ana.request("schedule", to="@nobody", message="nor this", deliverAt=0, cron="* * * * *")
    world.pass_seconds(61)
    assert await ana.text() == "nobody hears this"
    assert [f for f in await ana.silence() if f["type"] == "push"] == []  # a recurring one is only skipped
    assert [entry["firedCount"] for entry in await listed(ana)] == [1]


@spec("SCHED-3")
@story
async def test_delays_of_years_work(world):
    ana = await world.peer("ana")
    for years in (1, 30, 100):
        await remind(ana, years * YEAR, f"{years} years")
    world.pass_seconds(25 * DAY)  # more than 2 ** 31 ms
    assert [f for f in await ana.silence() if f["type"] == "push"] == []
    assert len(await listed(ana)) == 3
    world.pass_seconds(30 * YEAR - 25 * DAY + 1)
    assert [await ana.text(), await ana.text()] == ["1 years", "30 years"]


# --- again and again ------------------------------------------------------------------------------


@spec("SCHED-2", "SCHED-5", "SCHED-8")
@story
async def test_a_cron_expression_fires_again_and_again_and_counts(world):
    ana = await world.peer("ana", capabilities=("target",))
    answer = await ana.request("schedule", to=ana.key, message="hourly", deliverAt=0, cron="0 * * * *", recurring=True)
    assert answer["cron"] == "0 * * * *"
    assert answer["deliverAt"] % (HOUR * 1000) == 0 and 0 < answer["deliverAt"] - world.broker.clock() <= HOUR * 1000
    for count in (1, 2, 3):
        [entry] = await listed(ana)
        world.pass_seconds((entry["deliverAt"] - world.broker.clock()) / 1000 + 0.01)
        assert await ana.text() == "hourly"
        [again] = await listed(ana)
        assert (again["deliverAt"] - entry["deliverAt"], again["firedCount"]) == (HOUR * 1000, count)
    assert (await ana.request("cancel_scheduled", scheduledId=answer["scheduledId"]))["ok"] is True
    world.pass_seconds(DAY)
    assert [f for f in await ana.silence() if f["type"] == "push"] == []


@spec("SCHED-7")
@story
async def test_runs_that_were_missed_are_one_run(world):
    ana = await world.peer("ana")
    await ana.request("schedule", to=ana.key, message="each minute", deliverAt=0, cron="* * * * *")
    world.pass_seconds(10 * MINUTE)
    assert await ana.text() == "each minute"
    assert [f for f in await ana.silence() if f["type"] == "push"] == []
    [entry] = await listed(ana)
    assert 0 < entry["deliverAt"] - world.broker.clock() <= MINUTE * 1000


# --- what is refused ------------------------------------------------------------------------------


@spec("SCHED-2", "SCHED-3", "SCHED-4")
@pytest.mark.parametrize(("code", "fields"), [
    ("invalid_cron", {"cron": "*/0 * * * *"}),
    ("invalid_cron", {"cron": "61 * * * *"}),
    ("invalid_cron", {"cron": "* * * *"}),
    ("invalid_cron", {"cron": "* * * * * *"}),
    ("invalid_cron", {"cron": "0 0 31 2 *"}),
    ("invalid_cron", {"cron": "CRON_TZ=Mars/Olympus 0 0 * * *"}),
    ("invalid_cron", {"cron": "CRON_TZ=Europe/Riga * 3 25-31 3 */7"}),  # legal, but falls only into gaps
    ("invalid_cron", {"cron": "1," * 1000}),
    ("out_of_range", {"deliverAt": 0}),
    ("out_of_range", {"deliverAt": -1e300}),
    ("out_of_range", {"deliverAt": 1e300}),
    ("out_of_range", {"deliverAt": 10**400}),
    ("malformed", {"deliverAt": "tomorrow"}),
    ("malformed", {"deliverAt": None}),
    ("malformed", {"subtype": "system"}),
    ("malformed", {"message": ""}),
    ("malformed", {"message": "bell \x07"}),
    ("malformed", {"message": 7}),
    ("too_large", {"message": "x" * 65_537}),
    ("no_such_recipient", {"to": "bo"}),
    ("no_such_recipient", {"to": "@"}),
    ("no_such_recipient", {"to": "ab" * 32}),
])
@story
async def test_bad_input_gets_its_error_and_leaves_nothing(world, code, fields):
    ana = await world.peer("ana")
    frame = {"to": ana.key, "message": "tea", "deliverAt": in_ms(world, 60)} | fields
    assert (await ana.request("schedule", **frame))["code"] == code
    assert await listed(ana) == []


@spec("SCHED-3")
@story
async def test_a_second_ago_is_past(world):
    ana = await world.peer("ana")
    answer = await ana.request("schedule", to=ana.key, message="tea", deliverAt=in_ms(world, -1))
    assert (answer["code"], "is past; it is" in answer["message"]) == ("out_of_range", True)


@spec("SCHED-2")
@story
async def test_ten_thousand_random_expressions_neither_hang_nor_break_the_broker(world):
    ana, chance, began = await world.peer("ana"), random.Random(5), time.monotonic()
    asked = 0
    for _ in range(100):
        for _ in range(100):
            asked += 1
            expression = "".join(chance.choice("0123456789 */-,@MONjan") for _ in range(chance.randrange(1, 24)))
            ana.say(type="schedule", _reqId=f"c{asked}", to="@x", message="m", deliverAt=0, cron=expression or "*")
        for _ in range(100):
            frame = await ana.next()
            assert frame["type"] == "scheduled_ack" or frame["code"] in ("invalid_cron", "limit"), frame
    assert time.monotonic() - began < 20
    assert (await ana.request("get_state", key="alive"))["type"] == "state_result"


@spec("SCHED-3", "SCHED-8")
@story
async def test_a_member_has_so_many_scheduled_messages_and_no_more(world, monkeypatch):
    monkeypatch.setattr(hub, "SCHEDULED_PER_MEMBER", 2)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await remind(ana, 5)
    await remind(ana, 6)
    assert (await remind(ana, 7))["code"] == "limit"
    assert (await remind(bo, 7))["type"] == "scheduled_ack"


@spec("SCHED-8")
@story
async def test_only_ones_own_messages_are_listed_and_cancelled(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    later, sooner = await remind(ana, 90, "later"), await remind(ana, 60, "sooner", to=bo.key)
    [first, second] = await listed(ana)
    assert first == {"id": sooner["scheduledId"], "to": bo.key, "message": "sooner", "deliverAt": sooner["deliverAt"],
                     "createdAt": first["createdAt"]}
    assert second["id"] == later["scheduledId"]
    assert await listed(bo) == []
    assert (await bo.request("cancel_scheduled", scheduledId=first["id"]))["ok"] is False
    assert (await ana.request("cancel_scheduled", scheduledId="nothing"))["ok"] is False
    other = await world.peer("ana", sessionId="other")  # a member's sessions share them
    assert (await other.request("cancel_scheduled", scheduledId=first["id"]))["ok"] is True
    assert [entry["id"] for entry in await listed(ana)] == [second["id"]]


@spec("SCHED-8")
@story
async def test_a_list_fits_into_a_frame(world):
    ana = await world.peer("ana")
    for minute in range(12):
        await remind(ana, 60 + minute, str(minute % 10) * 60_000)
    entries = await listed(ana)
    assert [entry["message"][0] for entry in entries] == list("01234567")


@spec("SCHED-9")
@story
async def test_a_revoked_member_leaves_no_plans_behind(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await remind(ana, 5, to=bo.key)
    await ana.request("create_webhook", name="ci")
    member = world.keys["ana"][1]
    status, _ = await world.http("DELETE", f"/mesh/{world.mesh.id}/members/{member}", sign=world.owner)
    assert status == 200
    world.pass_seconds(60)
    assert [f.get("event") for f in await bo.silence() if f["type"] == "push"] == ["peer_left"]
    assert (world.mesh.store.next_due(), world.mesh.store.webhooks()) == (None, [])


# --- cost and accuracy ----------------------------------------------------------------------------


@spec("SCHED-5", "OPS-7")
@story
async def test_the_one_timer_goes_off_when_the_next_entry_is_due(world):
    ana = await world.peer("ana")
    timer = world.broker.timer.when()
    await remind(ana, 3600)
    assert world.broker.timer.when() >= timer  # nothing to hurry for
    await remind(ana, 0.2)
    assert world.broker.timer.when() - world.broker.loop.time() < 0.2
    assert await ana.text() == "tea"  # in real time


@spec("SCHED-5")
@story
async def test_ten_thousand_entries_cost_nothing_while_they_wait(world):
    ana = await world.peer("ana")
    store, now = world.mesh.store, world.broker.clock()
    for number in range(10_000):
        store.add_schedule(storage.Schedule(str(number), world.keys["ana"][1], ana.pair.public, None, "later", None,
                                            now + DAY * 1000 + number, 0, now))
    store.commit()
    await remind(ana, DAY - 1)
    world.pass_seconds(1)
    tasks, asked = len(asyncio.all_tasks()), []
    store._db.set_trace_callback(asked.append)
    for _ in range(1000):
        world.broker.tick()
    store._db.set_trace_callback(None)
    assert [sql for sql in asked if "schedule" in sql] == []
    assert len(asyncio.all_tasks()) == tasks


@spec("SCHED-5")
@story
async def test_many_due_at_once_go_out_in_batches_and_each_once(world):
    ana = await world.peer("ana")
    at = in_ms(world, 60)
    for number in range(600):
        ana.say(type="schedule", to=ana.pair.public, message=str(number), deliverAt=at)
    await ana.silence()
    world.pass_seconds(61)
    assert len(world.mesh.store.due_schedules(in_ms(world, 0), 1000)) == 600 - hub.FIRE_BATCH
    texts = []
    while len(texts) < 600:
        push = await ana.push()
        texts.append(wire.read_plain(push["ciphertext"]))
        ana.say(type="client_ack", brokerMessageId=push["messageId"])
    assert sorted(map(int, texts)) == list(range(600))


@spec("SCHED-5", "TURN-2")
@story
async def test_what_could_not_be_stored_is_sent_a_second_later_and_once(world, monkeypatch):
    ana = await world.peer("ana", capabilities=("target",))
    await remind(ana, 5)
    with monkeypatch.context() as patch:
        patch.setattr(storage.Store, "fired", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk full")))
        world.pass_seconds(6)
    assert [f for f in await ana.silence() if f["type"] == "push"] == []
    world.pass_seconds(1.1)
    assert await ana.text() == "tea"
    world.pass_seconds(60)
    assert [f for f in await ana.silence() if f["type"] == "push"] == []


# --- restarts -------------------------------------------------------------------------------------


@spec("SCHED-7")
@story
async def test_what_fell_due_while_the_broker_was_down_is_sent_when_it_starts(world):
    ana = await world.peer("ana")
    await remind(ana, 60, "once")
    await ana.request("schedule", to=ana.key, message="each minute", deliverAt=0, cron="* * * * *")
    await remind(ana, DAY, "not yet")
    await world.stop()
    world.skipped += HOUR
    await world.start()
    assert set(world.broker.meshes) == {world.mesh.id}  # opened although nobody has come
    world.mesh = world.broker.meshes[world.mesh.id]
    async with asyncio.timeout(LIMIT):
        while world.mesh.due_at <= world.broker.clock():
            await asyncio.sleep(0.01)
    again = await world.peer("ana", sessionId="next")
    assert {await again.text(), await again.text()} == {"once", "each minute"}
    assert [f for f in await again.silence() if f["type"] == "push"] == []
    assert [(e["message"], e.get("firedCount")) for e in await listed(again)] == [("each minute", 1), ("not yet", None)]


@spec("SCHED-7")
@story
async def test_a_mesh_without_appointments_is_not_opened_at_the_start(world):
    await world.peer("ana")
    await world.stop()
    await world.start()
    assert world.broker.meshes == {}


async def killed(directory, late: bool) -> list[tuple[str, str]]:
    """Kinds and texts that Ada gets after a broker with three reminders of hers was killed, before they were due; with
    `late` it comes back after that."""
    claudemesh._load()
    broker, config = BrokerProcess(directory / "data"), directory / "ada"
    try:
        await asyncio.to_thread(claudemesh.create_mesh, "den", "Den", broker.url, display_name="Ada", dir=config)
        entry = claudemesh.find_mesh(claudemesh.load_config(config))
        due = time.time() + 2
        async with claudemesh.MeshClient(entry, quiet=True) as ada:
            for text in ("one", "two"):
                await ada.request("schedule", to=ada.key, message=text, deliverAt=int(due * 1000))
            await ada.request("schedule", to="*", message="all", deliverAt=int(due * 1000))
        broker.kill()
        if late:
            await asyncio.sleep(due - time.time() + 0.1)
        broker.start()
        got = []
        async with claudemesh.MeshClient(entry, name="Ada") as ada, asyncio.timeout(LIMIT + 5):
            async for push in ada:
                got.append((push.kind, push.text))
                if len(got) == 3:
                    break
            assert (await ada.request("list_scheduled"))["messages"] == []
            assert [push for push in ada.take() if push.kind == "reminder"] == []
        assert time.time() >= due
        return sorted(got)
    finally:
        broker.kill()


@spec("SCHED-1", "SCHED-7")
@pytest.mark.parametrize("late", [False, True], ids=["back before they are due", "back after they were due"])
def test_a_broker_killed_between_schedule_and_fire_sends_everything_once(tmp_path, late):
    assert asyncio.run(killed(tmp_path, late)) == [("reminder", "all"), ("reminder", "one"), ("reminder", "two")]


# --- the simulated clock --------------------------------------------------------------------------


@spec("CLOCK-1", "CLOCK-2")
@story
async def test_a_clock_is_set_read_paused_and_resumed(world):
    ana = await world.peer("ana")
    none = await ana.request("get_clock")
    assert (none["speed"], none["paused"], none["tick"], none["simTime"]) == (0, True, 0, none["startedAt"])
    assert (await ana.request("pause_clock"))["code"] == "no_clock"
    assert (await ana.request("resume_clock"))["code"] == "no_clock"
    clock = await ana.request("set_clock", speed=10)
    assert (clock["type"], clock["speed"], clock["paused"], clock["tick"]) == ("clock_status", 10, False, 0)
    assert clock["simTime"] == clock["startedAt"]
    assert (await ana.request("pause_clock"))["paused"] is True
    world.pass_seconds(DAY)
    assert (await ana.request("get_clock"))["tick"] == 0
    assert (await ana.request("set_clock", speed=20))["paused"] is True  # a paused clock only takes the speed
    assert (await ana.request("resume_clock"))["paused"] is False
    world.pass_seconds(3.1)
    assert (await ana.event("tick"))["speed"] == 20


@spec("CLOCK-2")
@pytest.mark.parametrize(("speed", "code"), [
    (0, "out_of_range"), (0.99, "out_of_range"), (101, "out_of_range"), (-5, "out_of_range"), (10**400, "out_of_range"),
    ("fast", "malformed"), (None, "malformed")])
@story
async def test_a_speed_out_of_range_is_refused(world, speed, code):
    ana = await world.peer("ana")
    assert (await ana.request("set_clock", speed=speed))["code"] == code
    assert (await ana.request("get_clock"))["speed"] == 0


@spec("CLOCK-4")
@pytest.mark.parametrize(("speed", "seconds"), [(1, 60), (2.5, 24), (100, 0.6)])
@story
async def test_a_tick_is_a_minute_and_comes_every_60_seconds_divided_by_the_speed(world, speed, seconds):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    clock = await ana.request("set_clock", speed=speed)
    assert world.mesh.sim.due - world.mesh.sim.anchor == pytest.approx(seconds)
    world.pass_seconds(seconds)
    began = wire.iso(_ms(clock["startedAt"]) + MINUTE * 1000)
    assert await bo.event("tick") == {"tick": 1, "simTime": began, "speed": speed}


def _ms(text: str) -> int:
    from datetime import datetime
    return round(datetime.fromisoformat(text).timestamp() * 1000)


@spec("CLOCK-4")
@story
async def test_a_thousand_ticks_do_not_drift(world):
    ana = await world.peer("ana")
    clock = await ana.request("set_clock", speed=100)
    for _ in range(1000):
        world.pass_seconds(0.6)
    ticks = [await ana.event("tick") for _ in range(1000)]
    assert [tick["tick"] for tick in ticks] == list(range(1, 1001))
    assert ticks[-1]["simTime"] == wire.iso(_ms(clock["startedAt"]) + 1000 * MINUTE * 1000)
    sim = world.mesh.sim
    assert abs(sim.due - (sim.anchor + 1001 * 0.6)) < 1e-6  # each tick is due where it was from the start


@spec("CLOCK-4", "OPS-7")
@story
async def test_ticks_come_in_real_time_faster_than_once_a_second(world):
    ana = await world.peer("ana")
    await ana.request("set_clock", speed=100)
    assert world.broker.timer.when() - world.broker.loop.time() < 0.61
    assert (await ana.event("tick"))["tick"] == 1


@spec("CLOCK-5")
@story
async def test_the_clock_pauses_when_the_last_peer_leaves(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.request("set_clock", speed=10)
    await ana.leave()
    await bo.event("peer_left")
    world.pass_seconds(6.1)
    assert (await bo.event("tick"))["tick"] == 1
    await bo.leave()
    again = await world.peer("ana")
    assert (await again.request("get_clock"))["paused"] is True
    world.pass_seconds(HOUR)
    assert (await again.request("get_clock"))["tick"] == 1
    assert (await again.request("resume_clock"))["paused"] is False


@spec("CLOCK-3")
@story
async def test_a_new_speed_begins_a_new_interval(world):
    ana = await world.peer("ana")
    await ana.request("set_clock", speed=1)
    world.pass_seconds(50)
    await ana.request("set_clock", speed=2)
    world.pass_seconds(29)
    assert (await ana.request("get_clock"))["tick"] == 0
    world.pass_seconds(2)
    assert (await ana.request("get_clock"))["tick"] == 1
