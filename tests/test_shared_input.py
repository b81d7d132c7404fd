"""What bad input to the shared surfaces gets: a documented code and message, and nothing half-written."""

from __future__ import annotations

import json

import pytest

import store as storage
import wire
from store import Skill, Store
from world import story

spec = pytest.mark.spec
NOW = 1_800_000_000_000
SKILL = {"name": "s", "description": "d", "instructions": "i"}

#: (request, code, what the message names)
BAD = [
    ({"type": "set_state", "key": " ", "value": 1}, "malformed", "set_state.key: empty"),
    ({"type": "set_state", "key": "k" * 257, "value": 1}, "too_large", "set_state.key"),
    ({"type": "set_state", "key": "k", "value": "x" * 262_143}, "too_large", "set_state.value"),
    ({"type": "set_state", "key": "k", "value": 1, "ifVersion": "1"}, "malformed", "set_state.ifVersion"),
    ({"type": "remember", "content": ""}, "malformed", "remember.content: empty"),
    ({"type": "remember", "content": "\n\t "}, "malformed", "remember.content: empty"),
    ({"type": "remember", "content": 7}, "malformed", "remember.content"),
    ({"type": "remember", "content": "x", "tags": "t"}, "malformed", "remember.tags"),
    ({"type": "remember", "content": "x", "tags": ["t", 1]}, "malformed", "remember.tags[1]"),
    ({"type": "remember", "content": "x", "tags": ["t" * 65]}, "too_large", "remember.tags"),
    ({"type": "remember", "content": "x", "tags": ["t"] * 33}, "too_large", "remember.tags: more than 32 items"),
    ({"type": "remember", "content": "x" * 16_385}, "too_large", "remember.content"),
    ({"type": "recall", "query": " "}, "malformed", "recall.query: empty"),
    ({"type": "recall", "query": "x" * 513}, "too_large", "recall.query"),
    ({"type": "recall"}, "malformed", "recall.query: missing"),
    ({"type": "forget", "memoryId": "x"}, "not_found", "no such memory: x"),
    ({"type": "forget", "memoryId": "' OR 1=1 --"}, "not_found", "no such memory"),
    ({"type": "share_context", "summary": ""}, "malformed", "share_context.summary: empty"),
    ({"type": "share_context", "summary": "s", "filesRead": ["f"] * 129}, "too_large", "share_context.filesRead"),
    ({"type": "share_context", "summary": "s", "keyFindings": ["f" * 1025]}, "too_large", "share_context.keyFindings"),
    ({"type": "share_context", "summary": "s" * 4097}, "too_large", "share_context.summary"),
    ({"type": "get_context", "query": ""}, "malformed", "get_context.query: empty"),
    ({"type": "create_task", "title": " "}, "malformed", "create_task.title: empty"),
    ({"type": "create_task", "title": "t" * 1025}, "too_large", "create_task.title"),
    ({"type": "create_task", "title": "t", "priority": 3}, "malformed", "create_task.priority"),
    ({"type": "claim_task", "taskId": "x"}, "task_not_claimable", "no such task: x"),
    ({"type": "claim_task"}, "malformed", "claim_task.taskId: missing"),
    ({"type": "complete_task", "taskId": "x"}, "task_not_found", "no such task: x"),
    ({"type": "complete_task", "taskId": "x", "result": "r" * 16_385}, "too_large", "complete_task.result"),
    ({"type": "list_tasks", "status": "finished"}, "malformed", "list_tasks.status"),
    ({"type": "create_stream", "name": "s" * 129}, "too_large", "create_stream.name"),
    ({"type": "create_stream", "name": ""}, "invalid_name", "not a stream name"),
    ({"type": "publish", "stream": "s", "data": 1}, "not_found", "no such stream: 's'"),
    ({"type": "publish", "stream": "s"}, "malformed", "publish.data: missing"),
    ({"type": "subscribe", "stream": "s"}, "not_found", "no such stream: 's'"),
    ({"type": "share_skill", **SKILL, "name": "a/b"}, "invalid_name", "not a skill name: 'a/b'"),
    ({"type": "share_skill", **SKILL, "description": ""}, "malformed", "share_skill.description: empty"),
    ({"type": "share_skill", **SKILL, "instructions": " "}, "malformed", "share_skill.instructions: empty"),
    ({"type": "share_skill", **SKILL, "instructions": "x" * 262_145}, "too_large", "share_skill.instructions"),
    ({"type": "share_skill", **SKILL, "manifest": []}, "malformed", "share_skill.manifest"),
    ({"type": "share_skill", **SKILL, "manifest": {"x": "y" * 16_384}}, "too_large", "share_skill.manifest"),
    ({"type": "skill_deploy", "source": {"type": "zip", "file_id": "x"}}, "not_implemented", "skill_deploy"),
]


@spec("MSG-3", "MSG-8", "MSG-9", "MSG-13")
@pytest.mark.parametrize(("frame", "code", "names"), BAD, ids=lambda value: value["type"] if isinstance(value, dict) else None)
@story
async def test_bad_input_is_refused_with_a_documented_code_and_changes_nothing(world, frame, code, names):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await ana.silence()
    before = dump(world.mesh.store)
    refused = await ana.request(**frame)
    assert (refused["type"], refused["code"]) == ("error", code)
    assert names in refused["message"] and code in wire.ERRORS and len(refused["message"]) < 300
    ana.say(**frame)  # without an id there is nothing to answer to
    assert await ana.silence() == await bo.silence() == []
    assert dump(world.mesh.store) == before


def dump(store: Store) -> list[str]:
    """Every row of every table but the log of arrivals."""
    tables = [name for (name,) in store._execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND sql LIKE '%STRICT%'")]
    return [repr(row) for name in sorted(tables) for row in store._execute(f"SELECT * FROM {name}")]


@spec("GROUP-3", "DELIV-3")
@pytest.mark.parametrize("group", ["o'brien", "x') OR 1=1 --", 'a"b', "'; DROP TABLE delivery; --", "100%_"])
@story
async def test_a_group_name_is_never_part_of_a_statement(world, group):
    """Upstream pastes group names into the SQL of its drain: a quote breaks delivery, or injects."""
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("join_group", name=group)
    await bo.request("set_status", status="dnd")
    ack = await ana.send(f"@{group}", "hello")
    assert ack["recipients"] == {"online": 1, "held": 0}
    assert (await ana.send("@x", "not for bo"))["code"] == "no_such_recipient"
    await bo.request("set_status", status="idle")  # drained from the store
    assert await bo.text() == "hello"
    assert await ana.fate(ack["messageId"]) == ["pushed"]


@spec("MEM-3", "TASK-5", "SKILL-4")
@story
async def test_what_looks_like_sql_is_kept_and_found_as_it_is(world):
    ana = await world.peer("ana")
    text = "Robert'); DROP TABLE memory; -- \"x\" \\ % _"
    await ana.request("remember", content=text, tags=[text])
    await ana.request("create_task", title=text, assignee=text)
    await ana.request("set_state", key=text, value=text)
    await ana.request("share_skill", name="s", description=text, instructions=text, tags=[text], manifest={text: text})
    assert (await ana.request("recall", query=text))["memories"][0]["tags"] == [text]
    assert (await ana.request("list_tasks", assignee=text))["tasks"][0]["title"] == text
    assert (await ana.request("get_state", key=text))["value"] == text
    assert [skill["name"] for skill in (await ana.request("list_skills", query=text))["skills"]] == ["s"]
    assert (await ana.request("get_skill", name="s"))["skill"]["manifest"] == {text: text}


def test_nothing_that_these_requests_cause_reads_more_than_a_bounded_table(tmp_path):
    """Runs every method and asks SQLite how it finds the rows. What is scanned has a limit on its rows."""
    store = Store.create(tmp_path, mesh_id="m", slug="den", name="Den", owner_pubkey="a" * 64, now=NOW)
    member = store.add_member("b" * 64, "ana", "member", NOW)
    seen: set[str] = set()
    store._db.set_trace_callback(seen.add)
    store.forget(store.remember("text", ["tag"], member.id, "ana", NOW), NOW)
    store.share_context(member.id, "s", "ana", "summary", files=[], findings=[], tags=[], now=NOW)
    store.list_contexts(10)
    id = store.create_task("t", None, "normal", [], "ana", NOW)
    store.claim_task(id, "k", member.id, "ana", NOW)
    store.claimers_seen(["k"], NOW)
    store.renew_claims(NOW)
    store.unseen_claims(NOW + 1)
    store.reopen_task(id)
    store.complete_task(id, "k", member.id, "ana", None, NOW)
    store.task(id)
    for status in (None, "open"):
        for assignee in (None, "ana"):
            store.list_tasks(status, assignee, 10)
    store.create_stream("s", "ana", NOW)
    store.list_streams()
    store.share_skill(Skill("s", "d", "i", [], None, "ana", NOW, NOW), member.id)
    store.skill("s"), store.list_skills(), store.remove_skill("s")
    for table in storage.COUNTED:
        store.count(table)
    store._db.set_trace_callback(None)
    statements = [text for text in seen if text.split()[0] in ("SELECT", "UPDATE", "DELETE", "INSERT")
                  and "_text_" not in text]  # FTS5's own
    assert len(statements) > 25
    scans = {row[3].split(" USING")[0] for text in statements for row in store._db.execute("EXPLAIN QUERY PLAN " + text)
             if row[3].startswith("SCAN")}
    assert scans <= {"SCAN memory", "SCAN context", "SCAN task", "SCAN stream", "SCAN skill"}
    store.close()


def test_a_mesh_from_before_the_shared_surfaces_is_brought_up_to_date(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "MIGRATIONS", [storage.SCHEMA_1])
        old = Store.create(tmp_path, mesh_id="m", slug="den", name="Den", owner_pubkey="a" * 64, now=NOW)
        old.set_state("plan", json.loads('{"n": 1}'), None, "ana", NOW)
        old.commit()
        old.close()
    store = Store(tmp_path)
    store.remember("kept", [], None, "ana", NOW)
    store.commit()
    assert [memory.content for memory in storage.search_memory(tmp_path, "kept", 5)] == ["kept"]
    assert store.get_state("plan").value == {"n": 1}
    store.close()
