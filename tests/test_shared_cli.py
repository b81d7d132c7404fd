"""The commands about what peers share, against a real broker."""

from __future__ import annotations

import json
import re

import pytest

from test_cli import Person
from test_cli import ada as ada  # fixtures
from test_cli import bob as bob
from test_cli import broker as broker
from test_cli import person as person

spec = pytest.mark.spec


def only_id(text: str) -> str:
    (id,) = re.findall(r"[0-9a-f]{32}", text)
    return id


@spec("CLI-19", "CLI-6")
def test_what_is_remembered_is_found_and_forgotten(ada: Person, bob: Person) -> None:
    id = only_id(ada("remember", "Deploys run\nat noon \x1b[31m", "--tags", "ops,release"))
    found = bob("recall", "deployed", "noon").splitlines()
    assert found[0].startswith(f"{id}  Ada  2") and found[0].endswith("  #ops #release")
    assert found[1:] == ["    Deploys run", "    at noon \\x1b[31m"]
    (record,) = bob.json("recall", 'noon OR "')
    assert (record["id"], record["tags"], record["rememberedBy"]) == (id, ["ops", "release"], "Ada")
    assert bob("recall", "midnight") == ""
    assert bob("forget", id) == f"forgotten: {id}\n"
    assert bob.fails("forget", id) == (1, f"no such memory: {id}")
    assert ada("remember", "-", stdin="from a pipe\n").startswith("remembered as ")
    assert [memory["content"] for memory in ada.json("recall", "pipe")] == ["from a pipe"]
    assert ada.fails("remember", " ") == (1, "remember.content: empty")


@spec("CLI-19", "TASK-4")
def test_tasks_are_added_claimed_by_one_and_done(ada: Person, bob: Person) -> None:
    id = only_id(ada("tasks", "add", "Fix the parser", "--assignee", "Bob", "--priority", "high", "--tag", "bug"))
    assert ada("tasks").splitlines() == [
        f"ID{' ' * 30}  STATUS  PRIORITY  FOR  HELD BY  TITLE           TAGS",
        f"{id}  open    high      Bob  -        Fix the parser  #bug"]
    assert bob("tasks", "claim", id) == f"task {id} is yours\n"
    key = bob.membership()["pubkey"][:16]
    assert ada.fails("tasks", "claim", id) == (1, f"the task is claimed by Bob (key {key})")
    assert ada.fails("tasks", "done", id) == (1, f"the task is claimed by Bob (key {key})")
    assert bob.json("tasks", "done", id, "it was the last token") == {"id": id, "status": "done"}
    (task,) = ada.json("tasks", "--status", "done", "--assignee", "Bob")
    assert (task["result"], task["claimedBy"]) == ("it was the last token", "Bob")
    assert ada.json("tasks", "--status", "open") == []
    assert ada.fails("tasks", "done", "nothing") == (1, "no such task: nothing")


@spec("CLI-19", "MCP-61")
def test_skills_are_listed_and_shown_as_files(ada: Person, bob: Person) -> None:
    assert ada.fails("skills", "show", "debug") == (1, "there is no skill 'debug'")
    with ada.online("Ada's session") as received:
        share(ada, name="debug", description='Finds "bugs"', instructions="Look.\nThink.", tags=["qa"],
              manifest={"model": "opus", "user_invocable": False})
        push = next(push for push in iter(received.get, None) if push.event == "skills_changed")
        assert push.data == {"name": "debug", "action": "shared", "by": "Ada"}
    assert bob("skills").splitlines() == ["NAME   BY   DESCRIPTION   TAGS", 'debug  Ada  Finds "bugs"  #qa']
    assert bob.json("skills", "nothing") == []
    assert bob("skills", "show", "debug") == (
        '---\nname: "debug"\ndescription: "Finds \\"bugs\\""\ntags: ["qa"]\nmodel: "opus"\nuser-invocable: false\n---\n\n'
        "Look.\nThink.\n")
    assert bob.json("skills", "show", "debug")["manifest"] == {"model": "opus", "user_invocable": False}


def share(person: Person, **skill: object) -> None:
    """Shares a skill as another program would."""
    import asyncio

    import claudemesh

    async def tell() -> None:
        async with claudemesh.MeshClient(person.membership(), quiet=True) as client:
            await client.request("share_skill", **skill)

    asyncio.run(tell())


@spec("CLI-19", "STATE-5")
def test_a_key_is_written_only_at_the_version_expected(ada: Person, bob: Person) -> None:
    assert ada.json("state", "set", "plan", "1", "--if-version", "0")["version"] == 1
    assert bob.fails("state", "set", "plan", "2", "--if-version", "0") == (1, "'plan' is at version 1: 1")
    assert bob.json("state", "set", "plan", "2", "--if-version", "1")["version"] == 2
    assert json.loads(ada("state", "get", "plan")) == 2
    assert ada.fails("state", "set", "plan", "3", "--if-version", "-1")[0] == 2


@spec("CLI-19")
def test_an_answer_that_was_cut_short_is_mentioned(ada: Person) -> None:
    for n in range(21):
        ada("remember", f"item {n}")
    code, out, err = ada.run("recall", "item")
    assert (code, out.count("    item "), err) == (0, 20, "claudemesh: this is not all, the answer would be too long\n")
