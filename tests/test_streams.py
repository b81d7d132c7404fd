"""Streams: who gets what is published, and what a slow or lost subscriber means for the others."""

from __future__ import annotations

import asyncio

import pytest

import wire
from claudemesh import MeshClient
from world import LIMIT, story

spec = pytest.mark.spec


async def datum(peer):
    """The next stream data that arrives."""
    return await peer.answer(lambda frame: frame.get("type") == "stream_data")


@spec("STREAM-1", "STREAM-5")
@story
async def test_a_stream_is_created_once_and_listed_with_its_subscribers(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    first = await ana.request("create_stream", name="build logs")
    again = await bo.request("create_stream", name="build logs")
    assert (first["type"], again["id"]) == ("stream_created", first["id"])
    await ana.request("create_stream", name="alerts")
    for peer in (ana, bo, bo):
        assert (await peer.request("subscribe", stream="alerts"))["type"] == "subscribed"
    listed = await bo.request("list_streams")
    wire.check(listed, "broker")
    assert [(s["name"], s["createdBy"], s["subscriberCount"]) for s in listed["streams"]] == [
        ("alerts", "ana", 2), ("build logs", "ana", 0)]
    await bo.leave()
    await ana.answer(lambda frame: frame.get("event") == "peer_left")
    assert [s["subscriberCount"] for s in (await ana.request("list_streams"))["streams"]] == [1, 0]
    await world.restart()
    ana = await world.peer("ana")
    assert (await ana.request("mesh_info"))["streams"] == ["alerts", "build logs"]


@spec("STREAM-3", "STREAM-4")
@story
async def test_what_is_published_goes_to_the_other_subscribers_in_order(world):
    ana, bo, cy = await world.peer("ana"), await world.peer("bo"), await world.peer("cy")
    await ana.request("create_stream", name="s")
    await bo.request("set_visible", visible=False)
    for peer in (ana, bo):
        await peer.request("subscribe", stream="s")
    for value in ({"n": 1}, [2], None, "four"):
        assert (await ana.request("publish", stream="s", data=value))["type"] == "ack"
    assert [await datum(bo) for _ in range(4)] == [
        {"type": "stream_data", "stream": "s", "data": value, "publishedBy": "ana"} for value in ({"n": 1}, [2], None, "four")]
    assert [frame for frame in await ana.silence() + await cy.silence() if frame["type"] == "stream_data"] == []
    await bo.request("unsubscribe", stream="s")
    assert (await bo.request("unsubscribe", stream="never"))["type"] == "ack"
    await ana.request("publish", stream="s", data=5)
    assert [frame for frame in await bo.silence() if frame["type"] == "stream_data"] == []


@spec("STREAM-2", "STREAM-1")
@story
async def test_streams_nobody_created_and_names_that_are_none(world):
    ana = await world.peer("ana")
    assert (await ana.request("publish", stream="s", data=1))["code"] == "not_found"
    assert (await ana.request("subscribe", stream="s"))["code"] == "not_found"
    for name in ("", "  ", " s", "s\n", "a\tb", "\u202es"):
        assert (await ana.request("create_stream", name=name))["code"] == "invalid_name", name
    assert (await ana.request("list_streams"))["streams"] == []


@spec("STREAM-4", "MSG-15")
@story
async def test_subscriptions_and_streams_are_limited(world, monkeypatch):
    monkeypatch.setattr("broker.MAX_SUBSCRIPTIONS", 2)
    monkeypatch.setattr("broker.MOST", {"stream": 3})
    ana = await world.peer("ana")
    for name in "abc":
        await ana.request("create_stream", name=name)
    assert (await ana.request("create_stream", name="d"))["code"] == "limit"
    assert (await ana.request("create_stream", name="a"))["type"] == "stream_created"
    answers = [await ana.request("subscribe", stream=name) for name in "abca"]
    assert [answer.get("code") for answer in answers] == [None, None, "limit", None]


@spec("STREAM-6")
@story
async def test_a_subscriber_that_does_not_read_delays_nobody_and_is_closed(world):
    ana, bo, slow = await world.peer("ana"), await world.peer("bo"), await world.peer("slow")
    await ana.request("create_stream", name="s")
    for peer in (bo, slow):
        await peer.request("subscribe", stream="s")
    link = next(link for link in world.mesh.links if link.peer.key == slow.key)
    value = "x" * 200_000
    published = 0
    while not link.closed:  # what the system buffers for a socket differs
        assert (await ana.request("publish", stream="s", data=value))["type"] == "ack"
        assert (await datum(bo))["data"] == value
        published += 1
        assert published < 400
    assert published * 200_000 > 8 * 1024 * 1024
    while "closed" not in (frame := await slow.next()):
        assert frame["type"] in ("stream_data", "push")
    assert frame == {"closed": 1013, "reason": "slow reader"}


@spec("STREAM-4", "CLIENT-6")
@story
async def test_the_subscriptions_of_our_client_survive_a_reconnect(world):
    ana = await world.peer("ana")
    await ana.request("create_stream", name="s")
    pair, member = world.member("bo")
    membership = {"slug": "den", "meshId": world.mesh.id, "memberId": member, "pubkey": pair.public,
                  "secretKey": pair.secret, "brokerUrl": world.broker.url}
    async with MeshClient(membership, name="bo") as bo, asyncio.timeout(LIMIT):
        await bo.request("subscribe", stream="s")
        bo._connection.abort()
        while bo.state != "reconnecting":
            await asyncio.sleep(0)
        bo._open.clear()
        await bo.opened()
        assert (await bo.request("list_streams"))["streams"][0]["subscriberCount"] == 1
        await ana.request("publish", stream="s", data={"n": 1})
        push = await anext(push async for push in bo if push.kind == "stream")
        assert (push.event, push.data, push.sender_name) == ("s", {"n": 1}, "ana")
