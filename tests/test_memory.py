"""Memory and context: what is kept, what a query finds, in which order, and what a query cannot do."""

from __future__ import annotations

import time

import pytest

import store as storage
import wire
from store import Store
from world import story

spec = pytest.mark.spec
NOW = 1_800_000_000_000


async def recalled(peer, query):
    """The contents a query finds, best first."""
    answer = await peer.request("recall", query=query)
    assert answer["type"] == "memory_results", answer
    return [memory["content"] for memory in answer["memories"]]


# --- memory ---------------------------------------------------------------------------------------


@spec("MEM-1", "MEM-4")
@story
async def test_what_one_remembers_others_recall_until_it_is_forgotten(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    kept = await ana.request("remember", content="Deploys run at noon.", tags=["release", "ops"])
    assert kept["type"] == "memory_stored"
    answer = await bo.request("recall", query="noon")
    wire.check(answer, "broker")
    assert answer["memories"] == [{
        "id": kept["id"], "content": "Deploys run at noon.", "tags": ["release", "ops"], "rememberedBy": "ana",
        "rememberedAt": answer["memories"][0]["rememberedAt"]}]
    assert (await bo.request("mesh_info"))["memoryCount"] == 1
    assert await bo.request("forget", memoryId=kept["id"]) == {
        "type": "ack", "id": kept["id"], "messageId": kept["id"], "queued": False, "_reqId": "r3"}
    assert await recalled(ana, "noon") == []
    assert (await ana.request("mesh_info"))["memoryCount"] == 0
    assert (await ana.request("forget", memoryId=kept["id"]))["code"] == "not_found"
    await world.restart()
    ana = await world.peer("ana")
    assert await recalled(ana, "noon") == []


@spec("MEM-2")
@story
async def test_all_words_must_occur_in_any_form_and_the_best_match_comes_first(world):
    ana = await world.peer("ana")
    for content, tags in [("The parser drops the last token", []), ("Parsing is slow; what parses is parsed", ["speed"]),
                          ("Nothing to do with it, but much longer than the others and it parses once", []),
                          ("Café opening hours", ["naïve"])]:
        await ana.request("remember", content=content, tags=tags)
    assert await recalled(ana, "PARSED") == [
        "Parsing is slow; what parses is parsed", "Nothing to do with it, but much longer than the others and it parses once"]
    assert await recalled(ana, "where are the parsers with a TOKEN?") == ["The parser drops the last token"]
    assert await recalled(ana, "speed") == ["Parsing is slow; what parses is parsed"]
    assert await recalled(ana, "cafe NAIVE") == ["Café opening hours"]
    assert await recalled(ana, "parser elephant") == []
    assert await recalled(ana, "what is it") == []


@spec("MEM-2")
@story
async def test_a_query_finds_what_was_accepted_just_before_it(world):
    ana = await world.peer("ana")
    for n in range(5):
        ana.say(type="remember", content=f"fact {n}")
        ana.say(type="recall", query="fact", _reqId=f"q{n}")
    answers = [await ana.answer(lambda frame, n=n: frame.get("_reqId") == f"q{n}") for n in range(5)]
    assert [n for n in range(5) if f"fact {n}" not in [m["content"] for m in answers[n]["memories"]]] == []


@spec("MEM-3")
@pytest.mark.parametrize("query", [
    'kettle "', '"kettle', "kettle OR", "NOT kettle", "kettle*", "content: kettle", "(kettle", "kettle)", "^kettle",
    "kettle AND", "NEAR(kettle", "{content} : kettle", "kettle -nothing", "kettle' --", "a'; DROP TABLE memory; kettle",
    "kettle\x00", "kettle 🫖", "\u202ekettle", "+kettle", "kettle + kettle"])
@story
async def test_a_query_is_text_and_never_syntax(world, query):
    ana = await world.peer("ana")
    words = query.replace("AND", "").replace("OR", "")
    await ana.request("remember", content=f"The kettle is a nothing: NEAR, content, DROP TABLE memory. {words}")
    await ana.request("remember", content="Something else")
    assert len(await recalled(ana, query)) == 1
    assert len(await recalled(ana, "something")) == 1


@spec("MEM-3")
@pytest.mark.parametrize("query", ["***", '""', "🫖", "' OR 1=1 --", "%", "_"])
@story
async def test_a_query_without_a_word_that_is_there_finds_nothing(world, query):
    ana = await world.peer("ana")
    await ana.request("remember", content="plain text")
    assert await recalled(ana, query) == []


@spec("MSG-14")
@story
async def test_a_search_answers_the_twenty_best_and_says_that_there_are_more(world):
    ana = await world.peer("ana")
    for n in range(21):
        await ana.request("remember", content=f"item {n}")
    answer = await ana.request("recall", query="item")
    assert (len(answer["memories"]), answer["truncated"]) == (20, True)
    await ana.request("forget", memoryId=answer["memories"][0]["id"])
    answer = await ana.request("recall", query="item")
    assert (len(answer["memories"]), answer.get("truncated")) == (20, None)


@spec("MSG-14")
@story
async def test_a_list_ends_before_its_frame_would_be_too_long(world):
    ana = await world.peer("ana")
    for n in range(5):
        await ana.request("set_state", key=f"k{n}", value="x" * 250_000)
    answer = await ana.request("list_state")
    assert ([entry["key"] for entry in answer["entries"]], answer["truncated"]) == (["k0", "k1", "k2"], True)


@spec("MSG-15")
@story
async def test_a_mesh_that_is_full_of_memories_says_so(world, monkeypatch):
    monkeypatch.setattr("broker.MOST", {"memory": 2})
    ana = await world.peer("ana")
    first = await ana.request("remember", content="one")
    await ana.request("remember", content="two")
    assert (await ana.request("remember", content="three"))["code"] == "limit"
    await ana.request("forget", memoryId=first["id"])
    assert (await ana.request("remember", content="three"))["type"] == "memory_stored"


def test_ten_thousand_memories_are_searched_in_time(tmp_path):
    """Every one of them matches the first word, which is the slowest a query can be."""
    with_store = Store.create(tmp_path, mesh_id="m", slug="den", name="Den", owner_pubkey="a" * 64, now=NOW, synchronous="OFF")
    for n in range(10_000):
        with_store.remember(f"note {n} about topic {n % 97} and word{n}", [f"tag{n % 7}"], None, "ana", NOW)
    with_store.commit()
    took = {}
    for query, hits in (("note", 20), ("note topic tag3", 20), ("word4711", 1)):
        began = time.perf_counter()
        assert len(storage.search_memory(tmp_path, query, 20)) == hits
        took[query] = time.perf_counter() - began
    with_store.close()
    print({query: f"{seconds * 1000:.1f} ms" for query, seconds in took.items()})
    assert max(took.values()) < 0.25 and took["word4711"] < 0.1  # 10 and 1 ms on an idle machine


# --- context --------------------------------------------------------------------------------------


@spec("CTX-1", "CTX-2", "CTX-4")
@story
async def test_each_session_has_one_context_and_the_others_hear_of_it(world):
    ana, bo = await world.peer("ana", sessionId="one"), await world.peer("bo")
    first = await ana.request("share_context", summary="Read the lexer", filesRead=["src/lexer.py"],
                              keyFindings=["tokens are lazy"], tags=["parser"])
    assert first["type"] == "context_shared"
    assert await bo.expect("state_change") == {
        "type": "state_change", "key": "_context:ana", "value": "Read the lexer", "updatedBy": "ana"}
    world.pass_seconds(1)
    other = await world.peer("ana", sessionId="two")
    second = await other.request("share_context", summary="Read the tests")
    world.pass_seconds(1)
    again = await ana.request("share_context", summary="Read the grammar")
    assert again["id"] == first["id"] != second["id"]
    listed = await bo.request("list_contexts")
    wire.check(listed, "broker")
    assert [(entry["peerName"], entry["summary"], entry["tags"]) for entry in listed["contexts"]] == [
        ("ana", "Read the grammar", []), ("ana", "Read the tests", [])]
    assert (await bo.request("get_context", query="lexer"))["contexts"] == []
    assert (await bo.request("get_state", key="_context:ana"))["updatedAt"] == ""


@spec("CTX-3", "MEM-3")
@story
async def test_summary_findings_files_and_tags_are_searched(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.request("share_context", summary="Looked at authentication", filesRead=["src/login_form.py"],
                      keyFindings=['sessions expire after "an hour"'], tags=["security"])
    await bo.request("share_context", summary="Styled the login page")
    for query, names in [("authenticate", ["ana"]), ("login", ["bo", "ana"]), ("src/login_form.py", ["ana"]),
                         ("expired sessions", ["ana"]), ("security", ["ana"]), ('security OR styled"', []),
                         ("page*", ["bo"])]:
        answer = await bo.request("get_context", query=query)
        wire.check(answer, "broker")
        assert [context["peerName"] for context in answer["contexts"]] == names, query
    assert answer["contexts"][0]["filesRead"] == []


@spec("CTX-1")
def test_only_the_newest_contexts_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CONTEXTS_KEPT", 3)
    store = Store.create(tmp_path, mesh_id="m", slug="den", name="Den", owner_pubkey="a" * 64, now=NOW)
    member = store.add_member("b" * 64, "ana", "member", NOW)
    for n in range(5):
        store.share_context(member.id, f"s{n}", "ana", f"summary {n}", files=[], findings=[], tags=[], now=NOW + n)
    store.commit()
    assert [context.summary for context in store.list_contexts(10)] == ["summary 4", "summary 3", "summary 2"]
    assert len(storage.search_contexts(tmp_path, "summary", 10)) == 3
    store.close()
