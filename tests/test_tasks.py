"""Tasks: who gets one, how long it stays theirs, who may complete it. And the compare-and-set of shared state."""

from __future__ import annotations

import asyncio

import pytest

import store as storage
import wire
from broker import TASK_LEASE_SECONDS
from world import World, story

spec = pytest.mark.spec


async def task(peer, **fields):
    """The one task there is."""
    answer = await peer.request("list_tasks", **fields)
    wire.check(answer, "broker")
    return answer["tasks"][0]


async def claimed(creator, claimer):
    """The id of a new task that `claimer` has claimed."""
    id = (await creator.request("create_task", title="t"))["id"]
    assert (await claimer.request("claim_task", taskId=id))["type"] == "task_list"
    return id


# --- state ----------------------------------------------------------------------------------------


@spec("STATE-5")
@story
async def test_every_result_carries_the_version(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    assert (await ana.request("get_state", key="plan"))["version"] == 0
    assert (await ana.request("set_state", key="plan", value=None))["version"] == 1
    assert (await ana.request("set_state", key="plan", value="b"))["version"] == 2
    assert [(frame["value"], frame["version"]) for frame in (await bo.next(), await bo.next())] == [(None, 1), ("b", 2)]
    assert (await bo.request("get_state", key="plan"))["version"] == 2
    assert [(e["key"], e["version"]) for e in (await bo.request("list_state"))["entries"]] == [("plan", 2)]


@spec("STATE-5")
@story
async def test_a_write_at_another_version_changes_nothing_and_says_what_is_there(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    refused = await ana.request("set_state", key="plan", value="x", ifVersion=1)
    assert (refused["code"], refused["version"], refused["value"]) == ("state_conflict", 0, None)
    assert (await ana.request("set_state", key="plan", value={"n": 1}, ifVersion=0))["version"] == 1
    refused = await ana.request("set_state", key="plan", value="x", ifVersion=0)
    assert refused | {"_reqId": ""} == {
        "type": "error", "code": "state_conflict", "message": "'plan' is at version 1: {\"n\":1}", "value": {"n": 1},
        "version": 1, "_reqId": ""}
    assert (await ana.request("set_state", key="plan", value="y", ifVersion=1.5))["code"] == "state_conflict"
    assert [frame["value"] for frame in await bo.silence()] == [{"n": 1}]  # nobody was told of a refused write


@spec("STATE-5")
@story
async def test_of_two_who_count_at_once_none_loses_a_step(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")

    async def count(peer):
        done = 0
        while done < 10:
            row = await peer.request("get_state", key="n")
            answer = await peer.request("set_state", key="n", value=(row["value"] or 0) + 1, ifVersion=row["version"])
            done += answer["type"] == "ack"

    await asyncio.gather(count(ana), count(bo))
    row = await ana.request("get_state", key="n")
    assert (row["value"], row["version"]) == (20, 20)


# --- life of a task -------------------------------------------------------------------------------


@spec("TASK-1", "TASK-2", "TASK-4", "TASK-5")
@story
async def test_a_task_is_created_claimed_and_completed(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    created = await ana.request("create_task", title="Fix the parser", assignee="bo", priority="high", tags=["bug"])
    assert created["type"] == "task_created"
    new = {"id": created["id"], "title": "Fix the parser", "assignee": "bo", "claimedBy": None, "status": "open",
           "priority": "high", "createdBy": "ana", "tags": ["bug"], "result": None, "completedAt": None}
    shown = await task(bo)
    assert shown == new | {"createdAt": shown["createdAt"]}
    claimed = await bo.request("claim_task", taskId=created["id"])
    assert claimed["type"] == "task_list" and claimed["tasks"] == [shown | {"status": "claimed", "claimedBy": "bo"}]
    done = await bo.request("complete_task", taskId=created["id"], result="it was the last token")
    assert done["tasks"][0]["completedAt"] and done["tasks"] == [
        shown | {"status": "done", "claimedBy": "bo", "result": "it was the last token",
                 "completedAt": done["tasks"][0]["completedAt"]}]
    assert (await ana.request("mesh_info"))["tasks"] == {"open": 0, "claimed": 0, "done": 1}


@spec("TASK-5")
@story
async def test_tasks_are_listed_newest_first_by_status_and_assignee(world):
    ana = await world.peer("ana")
    ids = [(await ana.request("create_task", title=title, assignee=assignee))["id"]
           for title, assignee in [("a", "bo"), ("b", None), ("c", "bo")]]
    await ana.request("claim_task", taskId=ids[1])
    await ana.request("complete_task", taskId=ids[2])

    async def titles(**filters):
        return "".join(entry["title"] for entry in (await ana.request("list_tasks", **filters))["tasks"])

    assert await titles() == "cba"
    assert (await titles(status="open"), await titles(status="claimed")) == ("a", "b")
    assert await titles(status="done") == await titles(status="completed") == "c"
    assert (await titles(assignee="bo"), await titles(assignee="bo", status="open")) == ("ca", "a")
    assert (await titles(assignee="B")) == ""
    for n in range(100):
        await ana.request("create_task", title="x")
    answer = await ana.request("list_tasks")
    assert (len(answer["tasks"]), answer["truncated"]) == (100, True)


@spec("TASK-2")
@story
async def test_of_two_who_claim_at_once_one_wins_and_the_other_is_told_who(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    for _ in range(5):
        id = (await ana.request("create_task", title="contested"))["id"]
        answers = dict(zip(("ana", "bo"), await asyncio.gather(
            ana.request("claim_task", taskId=id), bo.request("claim_task", taskId=id))))
        (winner,) = [name for name, answer in answers.items() if answer["type"] == "task_list"]
        (refused,) = [answer for answer in answers.values() if answer["type"] == "error"]
        assert (refused["code"], refused["claimedBy"]) == ("task_not_claimable", winner)
        assert (await task(ana))["claimedBy"] == winner


@spec("TASK-2")
@story
async def test_two_sessions_of_one_member_are_two_claimers(world):
    one, two = await world.peer("ana", sessionId="1"), await world.peer("ana", sessionId="2")
    id = await claimed(one, one)
    refused = await two.request("claim_task", taskId=id)
    assert (refused["code"], refused["message"]) == (
        "task_not_claimable", f"the task is claimed by ana (key {one.key[:16]})")
    assert (await two.request("complete_task", taskId=id))["code"] == "task_conflict"


@spec("TASK-2", "TASK-4")
@story
async def test_tasks_that_do_not_exist(world):
    ana = await world.peer("ana")
    refused = await ana.request("claim_task", taskId="'; DELETE FROM task; --")
    assert (refused["code"], refused.get("claimedBy")) == ("task_not_claimable", None)
    assert (await ana.request("complete_task", taskId="nothing"))["code"] == "task_not_found"


@spec("TASK-4")
@story
async def test_only_the_holder_completes_a_claimed_task_and_may_say_so_twice(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    id = await claimed(ana, bo)
    refused = await ana.request("complete_task", taskId=id, result="mine")
    assert (refused["code"], refused["claimedBy"]) == ("task_conflict", "bo")
    assert (await task(ana))["status"] == "claimed"
    await bo.request("complete_task", taskId=id, result="first")
    assert (await bo.request("complete_task", taskId=id, result="first"))["tasks"][0]["result"] == "first"
    assert (await ana.request("complete_task", taskId=id, result="late"))["code"] == "task_conflict"
    assert (await ana.request("claim_task", taskId=id))["claimedBy"] == "bo"
    assert (await task(ana))["result"] == "first"
    open_one = (await ana.request("create_task", title="open"))["id"]
    assert (await bo.request("complete_task", taskId=open_one))["tasks"][0]["claimedBy"] == "bo"


@spec("TASK-4")
@story
async def test_a_member_completes_what_its_session_claimed_and_the_other_way_round(world):
    session, member = await world.peer("ana"), await world.peer("ana", ("quiet",), session=None)
    for claimer, completer in ((session, member), (member, session)):
        id = await claimed(session, claimer)
        assert (await completer.request("complete_task", taskId=id))["tasks"][0]["status"] == "done"


# --- the lease ------------------------------------------------------------------------------------


@spec("TASK-3", "TASK-4")
@story
async def test_who_stays_away_longer_than_the_lease_loses_the_task(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    id = await claimed(ana, bo)
    world.pass_seconds(3 * TASK_LEASE_SECONDS)  # present, however long it takes
    assert (await task(ana))["status"] == "claimed"
    await bo.drop()
    world.pass_seconds(TASK_LEASE_SECONDS - 1)
    assert (await task(ana))["claimedBy"] == "bo"
    world.pass_seconds(2)
    assert (await task(ana))["status"] == "open"
    await ana.request("claim_task", taskId=id)
    bo = await world.peer("bo", session=bo.session)
    refused = await bo.request("complete_task", taskId=id, result="I was on it")
    assert (refused["code"], refused["claimedBy"]) == ("task_conflict", "ana")


@spec("TASK-3")
@story
async def test_who_comes_back_in_time_keeps_the_task(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await claimed(ana, bo)
    for _ in range(3):
        await bo.leave()
        await ana.answer(lambda frame: frame.get("event") == "peer_left")
        world.pass_seconds(TASK_LEASE_SECONDS - 10)
        bo = await world.peer("bo", session=bo.session)
        world.pass_seconds(20)
    assert (await task(ana))["claimedBy"] == "bo"


@spec("TASK-3")
@story
async def test_a_claim_by_the_member_lasts_while_any_of_its_sessions_is_there(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    member = await world.peer("bo", ("quiet",), session=None)
    await claimed(ana, member)
    await member.leave()
    world.pass_seconds(TASK_LEASE_SECONDS + 2)
    assert (await task(ana))["status"] == "claimed"
    await bo.leave()
    await ana.answer(lambda frame: frame.get("event") == "peer_left")
    world.pass_seconds(TASK_LEASE_SECONDS + 2)
    assert (await task(ana))["status"] == "open"


@spec("TASK-3")
@story
async def test_no_lease_runs_while_the_broker_is_down(world):
    bo = await world.peer("bo")
    await claimed(bo, bo)
    await world.stop()
    world.skipped += 10 * TASK_LEASE_SECONDS
    await world.start()
    world.mesh = world.broker.find_mesh(world.mesh.id)
    ana = await world.peer("ana")
    world.pass_seconds(TASK_LEASE_SECONDS - 5)
    assert (await task(ana))["status"] == "claimed"
    world.pass_seconds(10)
    assert (await task(ana))["status"] == "open"


@spec("TASK-3")
def test_the_lease_is_a_setting(tmp_path):
    async def tell():
        async with World(tmp_path, task_lease=5) as world:
            ana, bo = await world.peer("ana"), await world.peer("bo")
            await claimed(ana, bo)
            await bo.leave()
            await ana.answer(lambda frame: frame.get("event") == "peer_left")
            world.pass_seconds(7)
            assert (await task(ana))["status"] == "open"

    asyncio.run(tell())


@spec("TASK-1")
@story
async def test_the_oldest_done_task_makes_room_for_a_new_one(world, monkeypatch):
    monkeypatch.setattr(storage, "TASKS_KEPT", 3)
    ana = await world.peer("ana")
    ids = [(await ana.request("create_task", title=str(n)))["id"] for n in range(3)]
    assert (await ana.request("create_task", title="3"))["code"] == "limit"
    await ana.request("complete_task", taskId=ids[2])
    await ana.request("complete_task", taskId=ids[1])
    assert (await ana.request("create_task", title="3"))["type"] == "task_created"
    assert [entry["title"] for entry in (await ana.request("list_tasks"))["tasks"]] == ["3", "2", "0"]
