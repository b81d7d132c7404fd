"""Skills: shared at the broker, offered by the MCP server as prompts and resources, read by the real SDK client."""

from __future__ import annotations

import pytest

import wire
from world import ALL, story

spec = pytest.mark.spec
EVENTS = (*ALL, "events")
MANIFEST = {"when_to_use": 'when "tests" fail', "allowed_tools": ["Bash", "Read"], "anything": [1, None]}


async def names(peer, **query):
    """The names of the skills that are listed."""
    answer = await peer.request("list_skills", **query)
    wire.check(answer, "broker")
    return [skill["name"] for skill in answer["skills"]]


# --- at the broker --------------------------------------------------------------------------------


@spec("SKILL-1", "SKILL-3")
@story
async def test_a_skill_is_shared_loaded_replaced_and_removed(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    assert await bo.request("get_skill", name="debug") == {"type": "skill_data", "skill": None, "_reqId": "r1"}
    shared = await ana.request("share_skill", name="debug", description="Finds bugs", instructions="Look.\nThink.",
                               tags=["qa"], manifest=MANIFEST)
    assert shared == {"type": "skill_ack", "name": "debug", "action": "shared", "_reqId": "r1"}
    first = await bo.request("get_skill", name="debug")
    wire.check(first, "broker")
    assert first["skill"] == {
        "name": "debug", "description": "Finds bugs", "instructions": "Look.\nThink.", "tags": ["qa"], "author": "ana",
        "manifest": MANIFEST, "createdAt": first["skill"]["createdAt"]}
    world.pass_seconds(5)
    await bo.request("share_skill", name="debug", description="Finds more", instructions="Look twice.")
    second = (await ana.request("get_skill", name="debug"))["skill"]
    assert second == {
        "name": "debug", "description": "Finds more", "instructions": "Look twice.", "tags": [], "author": "bo",
        "manifest": None, "createdAt": first["skill"]["createdAt"]}
    assert (await ana.request("remove_skill", name="debug"))["action"] == "removed"
    assert (await ana.request("remove_skill", name="debug"))["action"] == "not_found"
    assert await names(bo) == []


@spec("SKILL-2")
@pytest.mark.parametrize("name", [
    "", ".", "..", "a/b", "../x", "a b", "a?b", "a#b", "a%2Fb", "x:y", "-x", ".x", "a\n", "a\x00", '"', "<b>", "x" * 65, "🦊"])
@story
async def test_a_name_that_would_break_a_command_or_a_uri_is_refused(world, name):
    ana = await world.peer("ana")
    refused = await ana.request("share_skill", name=name, description="d", instructions="i")
    assert refused["code"] == "invalid_name"
    assert await names(ana) == []


@spec("SKILL-2")
@story
async def test_names_of_any_script_are_good(world):
    ana = await world.peer("ana")
    for name in ("a", "x" * 64, "Über_v1.2-b", "9lives", "技能"):
        assert (await ana.request("share_skill", name=name, description="d", instructions="i"))["action"] == "shared"
    assert await names(ana) == ["9lives", "a", "x" * 64, "Über_v1.2-b", "技能"]


@spec("SKILL-4")
@story
async def test_a_query_looks_into_names_descriptions_and_tags_and_has_no_wildcards(world):
    ana = await world.peer("ana")
    for name, description, tags in [("debug", "Finds 100% of bugs", ["QA"]), ("write_docs", "Explains", ["Größe"]),
                                    ("deploy", "Ships it", [])]:
        await ana.request("share_skill", name=name, description=description, instructions="qa ships %", tags=tags)
    for query, found in [("", ["debug", "deploy", "write_docs"]), ("DE", ["debug", "deploy"]), ("qa", ["debug"]),
                         ("%", ["debug"]), ("_", ["write_docs"]), ("GRÖSSE", ["write_docs"]), ('","', []), ("ships", ["deploy"])]:
        assert await names(ana, query=query) == found, query


@spec("SKILL-5", "HELLO-14")
@story
async def test_whoever_offered_events_hears_of_a_change_and_a_stock_client_does_not(world):
    ana, bo = await world.peer("ana", EVENTS), await world.peer("bo", EVENTS)
    stock = await world.peer("stock", None)
    quiet = await world.peer("quiet", ("events", "quiet"), session=None)
    assert "events" in ana.greeting["capabilities"]
    for peer in (ana, bo, stock):
        await peer.silence()
    await ana.request("share_skill", name="debug", description="d", instructions="i")
    await stock.request("remove_skill", name="debug")
    await stock.request("remove_skill", name="debug")
    for peer in (ana, bo):
        push = await peer.expect("push", subtype="system", event="skills_changed", senderPubkey="system", priority="low")
        assert push["eventData"] == {"name": "debug", "action": "shared", "by": "ana"}
        assert await peer.event("skills_changed") == {"name": "debug", "action": "removed", "by": "stock"}
    for peer in (ana, bo, stock, quiet):
        assert await peer.silence() == []


@spec("MSG-15")
@story
async def test_a_mesh_that_is_full_of_skills_still_lets_one_be_replaced(world, monkeypatch):
    monkeypatch.setattr("broker.MOST", {"skill": 1})
    ana = await world.peer("ana")
    answers = [await ana.request("share_skill", name=name, description="d", instructions="i") for name in ("a", "b", "a")]
    assert [answer.get("code") for answer in answers] == [None, "limit", None]
