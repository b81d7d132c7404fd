"""What a newcomer does first, and what goes wrong then: a full disk, a lost answer, a wrong address, two people
of one name, a busy one, Ctrl-C. Whoever reads the answer must know what to do next."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import (  # noqa: F401: some are fixtures
    LIMIT, PROGRAM, SCRUBBED, Person, ada, bob, broker, free_port, home, mentioning, meshes, person, until)
from test_client import ALICE, FakeBroker, FakeHttp, Town, aside, run
from test_mcp import BOB, CAROL, FakeClient, Fixture, Host, peer, push

import claudemesh
import wire
from broker import Broker
from claudemesh import MeshClient, MeshError
from world import World, story

MESH_ID, OWNER = "m" * 32, wire.KeyPair.generate()


def invite(url: str) -> str:
    return wire.invite_link(wire.invite_token(wire.sign_invite({
        "v": 1, "mesh_id": MESH_ID, "mesh_slug": "harbor", "broker_url": url, "expires_at": int(time.time()) + 60,
        "mesh_root_key": "x", "role": "member", "owner_pubkey": OWNER.public}, OWNER.secret)))


@pytest.fixture
def http() -> Any:
    with FakeHttp() as server:
        yield server


# --- Creating and joining ---------------------------------------------------------------------------


@pytest.mark.spec("INV-22", "INV-24")
def test_what_could_not_be_kept_is_not_asked_for(http: FakeHttp, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "mesh"  # as root everything can be written, but not below a file
    with pytest.raises(wire.UsageError, match="Not a directory"):
        claudemesh.create_mesh("harbor", "Harbor", http.ws_url, display_name="ada", dir=nowhere)
    with pytest.raises(wire.UsageError, match="Not a directory"):
        claudemesh.join_mesh(invite(http.ws_url), "bob", dir=nowhere)
    assert http.requests == []


@pytest.mark.spec("INV-22")
def test_a_join_whose_answer_was_lost_is_repeated_with_the_same_key(http: FakeHttp, tmp_path: Path) -> None:
    http.answers = [(502, b"bad gateway"), (400, {"ok": False, "error": "invite_expired"}),
                    (200, {"ok": True, "memberId": "b" * 32})]
    link = invite(http.ws_url)
    with pytest.raises(MeshError):
        claudemesh.join_mesh(link, "bob", dir=tmp_path)
    with pytest.raises(MeshError, match="^the invite has expired: ask for another$"):
        claudemesh.join_mesh(link, "bob", dir=tmp_path)
    joined = claudemesh.join_mesh(link, "bob", dir=tmp_path)
    assert {json.loads(body)["peer_pubkey"] for *_, body in http.requests} == {joined["pubkey"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "invite-harbor.txt", "lock"]


@pytest.mark.spec("INV-24", "HTTP-25")
def test_a_mesh_whose_creation_was_cut_short_is_finished_by_the_next_attempt(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell() -> None:
        async with Town(tmp_path) as town:
            home, real = tmp_path / "cleo", claudemesh.http_call

            def call(base: str, method: str, path: str, *rest: Any, **options: Any) -> Any:
                answer = real(base, method, path, *rest, **options)
                if re.fullmatch(call.lost, path):
                    raise MeshError("offline", "the answer was lost")
                return answer

            monkeypatch.setattr(claudemesh, "http_call", call)
            for call.lost in ("/mesh", "/mesh/[^/]+/invites", "/join"):
                with pytest.raises(MeshError, match="lost"):
                    await aside(claudemesh.create_mesh, "quay", "Quay", town.broker.url, display_name="cleo", dir=home)
            call.lost = "none"
            entry = await aside(claudemesh.create_mesh, "quay", "Quay", town.broker.url, display_name="cleo", dir=home)
            owner = json.loads((home / "owner-quay.json").read_text())
            assert owner["meshId"] == entry["meshId"] and "inviteUrl" not in owner
            assert [m["displayName"] for m in await aside(claudemesh.list_members, "quay", home)] == ["cleo"]
            with pytest.raises(MeshError) as taken:  # another owner's keys do not open it
                await aside(claudemesh.create_mesh, "quay", "Quay", town.broker.url, display_name="dan",
                            dir=tmp_path / "dan")
            assert taken.value.code == "slug_taken" and not (tmp_path / "dan" / "owner-quay.json").exists()
    run(tell())


@pytest.mark.spec("INV-24")
def test_the_creator_uses_the_address_that_answered_and_invites_carry_the_public_one(tmp_path: Path) -> None:
    async def tell() -> None:
        async with Broker(data=tmp_path / "data", port=0, log=lambda record: None, public_url="wss://mesh.invalid/ws",
                          admin_token="t0ken") as hub:
            local = hub.url
            entry = await aside(claudemesh.create_mesh, "quay", "Quay", local, display_name="cleo", admin_token="t0ken",
                                dir=tmp_path / "cleo")
            link = await aside(claudemesh.make_invite, "quay", dir=tmp_path / "cleo")
            assert entry["brokerUrl"] == local
            assert wire.read_invite(wire.extract_token(link), int(time.time()))["broker_url"] == "wss://mesh.invalid/ws"
    run(tell())


def test_an_invite_is_revoked_by_its_link_and_its_json_tells_id_and_times(ada: Person, person: Any) -> None:
    made = ada.json("invite")
    [listed] = [row for row in ada.json("invite", "list") if row["id"] == made["id"]]
    assert (listed["expiresAt"][:17], listed["createdAt"][-1]) == (made["expiresAt"][:17], "Z")
    assert ada("invite", "revoke", made["link"]) == f"invite {made['link'][:24]}... admits nobody any more\n"
    assert person("bob").fails("join", made["link"]) == (1, "the invite was revoked: ask for another")


@pytest.mark.spec("CLI-18")
def test_a_name_for_a_mesh_joined_before_is_for_the_sessions_and_is_said(ada: Person, bob: Person) -> None:
    link = claudemesh.invite_file(ada.membership()["slug"], bob.home).read_text().strip()
    out = bob("join", link, "--name", "Bert")
    assert "; new sessions are called Bert, the member keeps its name\n" in out
    assert claudemesh.load_config(bob.home)["displayName"] == "Bert"
    assert bob.json("info")["displayName"] == "Bob"


# --- Names ------------------------------------------------------------------------------------------


@pytest.mark.spec("CLI-8", "CLIENT-11")
def test_a_name_that_two_members_have_is_refused_also_when_one_is_away(ada: Person, bob: Person, person: Any) -> None:
    other = person("other")
    other("join", ada("invite").strip(), "--name", "bob")
    with bob.online("Bob"):
        code, line = ada.fails("send", "bob", "hi")
        assert code == 2 and other.membership()["pubkey"][:16] in line
        key = other.membership()["pubkey"]
        assert ada("send", key, "hi").startswith(f"sent to bob ({key[:16]}): held for 1 who is away; ")
        code, line = ada.fails("send", "nob", "hi")
        assert (code, line) == (1, f"no peer called 'nob' in {bob.membership()['slug']}; there: Bob; away: Ada, bob")
    sent = ada.json("send", other.membership()["pubkey"].upper(), "hi")
    assert (sent["to"], sent["target"]) == ("bob", other.membership()["pubkey"])


@pytest.mark.spec("MCP-31", "CLIENT-11")
def test_a_model_reaches_members_who_are_away_by_name() -> None:
    alpha = FakeClient("alpha", peer("Bob", BOB, memberPubkey="1" * 64))
    alpha.away = [{"pubkey": CAROL, "displayName": "Carol", "memberPubkey": CAROL, "status": "away"},
                  {"pubkey": "1" * 64, "displayName": "Bob", "memberPubkey": "1" * 64, "status": "online"}]
    world = Fixture(alpha)
    world.call("send_message", to=["carol", "bob"], message="hi")
    assert [to for to, _, _ in alpha.sent] == [CAROL, BOB]
    alpha.away.append({"pubkey": "2" * 64, "displayName": "bob", "memberPubkey": "2" * 64, "status": "away"})
    assert "(ambiguous_name)" in world.fail("send_message", to="bob", message="hi")


@story
@pytest.mark.spec("CLIENT-11")
async def test_the_members_are_asked_for_once_in_a_while_and_one_can_do_without(world: World) -> None:
    pair, id = world.member("ana")
    world.member("bea")
    entry = {"meshId": world.mesh.id, "memberId": id, "slug": "den", "pubkey": pair.public, "secretKey": pair.secret,
             "brokerUrl": world.broker.url}
    async with MeshClient(entry, name="ana") as client:
        assert (await client.resolve("BE"))["pubkey"] == world.member("bea")[0].public
        world.member("cleo")
        with pytest.raises(claudemesh.NameProblem, match="there: nobody else; away: bea$"):
            await client.resolve("cleo")
        client._members_at -= claudemesh.MEMBERS_FRESH
        assert (await client.resolve("cleo"))["displayName"] == "cleo"
        with pytest.raises(claudemesh.NameProblem):
            await client.resolve("ana")  # this very session


@pytest.mark.spec("MCP-31")
def test_while_no_mesh_can_be_asked_nobody_is_called_unknown() -> None:
    async def tell() -> None:
        async with FakeBroker() as broker:
            client = broker.client()
            problem = await unanswered(client)
            assert problem == ("not connected to harbor, which is tried again by itself; nothing was done: repeat this "
                               "in a moment")
    async def unanswered(client: MeshClient) -> str:
        with pytest.raises(MeshError) as offline:
            await client.request("list_peers")
        assert offline.value.code == "offline"
        return offline.value.message
    run(tell())
    assert Fixture(FakeClient("alpha", state="reconnecting")).fail("send_message", to="ada", message="hi") == (
        "FAILED ada: not connected to alpha (offline)")


# --- Delivery ---------------------------------------------------------------------------------------


@pytest.mark.spec("CLI-8", "MCP-30")
def test_a_busy_recipient_is_told_of(ada: Person, bob: Person) -> None:
    with bob.online("Bob", hello={"status": "dnd"}) as received:
        assert "1 online, 1 of them busy (working or dnd): it waits at the broker until" in ada("send", "bob", "later")
        assert ada.json("send", "bob", "later")["busy"] == 1
        assert "busy" not in ada("send", "bob", "at once", "--priority", "now")
        assert received.get(timeout=LIMIT).text == "at once"
    alpha = FakeClient("alpha", peer("bob", BOB))
    alpha.answers["message_status"] = {"recipients": [{"state": "queued"}]}
    assert Fixture(alpha).call("send_message", to="bob", message="x").endswith("recipients: 1 online, 0 held; " + (
        "1 of them busy (working or dnd): it waits at the broker until they are idle, priority now gets through"))


@pytest.mark.spec("CLI-8")
def test_a_message_that_cannot_be_followed_is_said_to_be_sent(
        ada: Person, bob: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*arguments: Any) -> None:
        raise MeshError("timeout", "message_status: no answer in time")
    monkeypatch.setattr(claudemesh, "_follow", fails)
    code, out, err = ada.run("send", "bob", "hi", "--wait", "1")
    assert (code, err) == (1, "claudemesh: message_status: no answer in time\n") and out.startswith("sent to Bob (")


@pytest.mark.spec("CLIENT-6", "STAT-7")
def test_after_a_restart_of_the_broker_nothing_slips_past_a_status(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claudemesh, "BACKOFF", (0.01,))
    monkeypatch.setattr(MeshClient, "_replay", lambda self: None)  # hello alone must keep it away

    async def tell() -> None:
        async with Town(tmp_path) as town, town.client("bob") as bob, town.client("alice", quiet=True) as alice:
            await bob.set_status("dnd")
            await alice.send(bob.key, "later")
            bob._open.clear()
            await town.restart()
            await asyncio.wait_for(asyncio.gather(bob._open.wait(), alice.opened()), LIMIT)
            await alice._until_open(asyncio.get_running_loop().time() + LIMIT)
            await alice.send(bob.key, "at once", "now")
            texts = [push.text async for push in first(bob)]
            assert texts == ["at once"]

    async def first(client: MeshClient) -> Any:
        async for push in client:
            if push.kind == "message":
                yield push
                return
    run(tell())


@pytest.mark.spec("CLIENT-9")
def test_a_connection_that_ends_between_two_tries_of_a_sealed_message_is_no_defect() -> None:
    async def tell() -> None:
        async with FakeBroker() as broker, broker.client() as client:
            client.state, connection = "reconnecting", client._connection
            deadline = asyncio.get_running_loop().time() + LIMIT
            call = asyncio.ensure_future(client._exchange({"type": "send"}, deadline, repeat=True))
            await asyncio.sleep(0)
            assert [waiting.frame for waiting in client._repeats] == [{"type": "send"}]
            call.cancel()
            client.state, client._connection = "open", connection
    run(tell())


@pytest.mark.spec("CLIENT-9")
def test_a_message_beyond_the_limit_is_told_with_both_sizes(ada: Person, bob: Person) -> None:
    code, _, err = ada.run("send", "bob", "-", stdin="x" * 3_000_000)
    assert code == 1 and re.search(r"the message is 40\d{5} bytes on the wire, at most 2097152 may be", err)


@pytest.mark.spec("MCP-12")
def test_what_the_broker_pushes_again_is_not_kept_from_the_link_before() -> None:
    unread, old, new = claudemesh.Unread(), *(claudemesh.Link({"slug": "a", "meshId": "m"}, None) for _ in range(2))
    unread.add(old, push(id="m1"))
    unread.add(new, push(id="m2"))
    unread.forget(old)
    assert [entry.push.id for entry in unread.entries] == ["m2"]


@pytest.mark.spec("CLI-9")
def test_inbox_reads_all_meshes_and_says_which(ada: Person, bob: Person, broker: str) -> None:
    first, second = bob.membership()["slug"], f"mesh-{next(meshes)}"
    ada("send", "bob", "from the first")
    ada("create", second, "--broker", broker)
    bob("join", ada("invite", "--mesh", second).strip())
    ada("send", bob.json("list")[1]["pubkey"], "from the second", "--mesh", second)
    out = bob("inbox")
    assert f") on {first}  to you  " in out and f") on {second}  to you  " in out
    assert bob("inbox") == f"nothing is waiting on {first}, {second}\n"
    assert bob("inbox", "--mesh", first) == f"nothing is waiting on {first}\n"
    waiting = bob.process("inbox", "--wait", "20", "--json")
    until(lambda: len(mentioning(str(bob.home))) > 0, "it runs")
    ada("send", bob.json("list")[1]["pubkey"], "awaited", "--mesh", second)
    assert json.loads(waiting.communicate(timeout=LIMIT)[0])["text"] == "awaited"
    claudemesh.update_config(lambda config: config["meshes"][0].update(brokerUrl="ws://127.0.0.1:1/ws"), bob.home)
    code, out, err = bob.run("inbox")
    assert (code, out) == (1, f"nothing is waiting on {second}\n")
    assert err == (f"claudemesh: {first}: 127.0.0.1:1 cannot be reached: nothing listens there; "
                   "`claudemesh up` starts a broker\n")


# --- Errors that say what to do ---------------------------------------------------------------------


@pytest.mark.spec("CLI-1", "INV-23")
def test_an_address_that_does_not_work_is_told_in_the_same_words_everywhere(person: Any, http: FakeHttp) -> None:
    ada, gone = person("ada"), f"127.0.0.1:{free_port()}"
    down = (1, f"{gone} cannot be reached: nothing listens there; `claudemesh up` starts a broker")
    assert ada.fails("create", "x", "--broker", f"ws://{gone}/ws") == down
    claudemesh.save_config({"version": 1, "meshes": [{
        "meshId": MESH_ID, "memberId": "x", "slug": "x", "pubkey": ALICE.public, "secretKey": ALICE.secret,
        "brokerUrl": f"ws://{gone}/ws"}]}, ada.home)
    assert ada.fails("peers") == ada.fails("members") == down
    http.answers = [(404, b"not found"), (404, b"not found")]
    where = http.ws_url[5:-3]
    assert person("eve").fails("create", "x", "--broker", http.ws_url) == (
        1, f"{where} is no claudemesh broker: no usable answer (HTTP 404)")
    error = claudemesh._unreachable_at("wss://x/ws", OSError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"))
    assert error.message.endswith("; a certificate authority of your own is named by SSL_CERT_FILE")


@pytest.mark.spec("CLI-1")
def test_a_broker_that_does_not_know_the_owner_is_no_reason_to_ask_for_an_invite(ada: Person) -> None:
    path = claudemesh.owner_file(ada.membership()["slug"], ada.home)
    path.write_text(json.dumps({**json.loads(path.read_text()), "meshId": "f" * 32}))
    code, line = ada.fails("members")
    assert code == 1 and line.endswith(f"does not know the mesh of {path}: if its data are gone, move that file away")


@pytest.mark.spec("CLI-1")
@pytest.mark.parametrize("words", [["--help"], ["list"]])
def test_a_full_standard_output_is_named(person: Any, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = person("ada").process(*words, stdout=full)
        assert (process.wait(LIMIT), process.stderr.read()) == (1, "claudemesh: standard output: No space left on device\n")


@pytest.mark.spec("CLI-2")
def test_help_for_half_a_command_and_by_the_word_help(person: Any) -> None:
    ada = person("ada")
    assert ada("state", "--help") == ada("help", "state") == (
        "  claudemesh state get      read a shared key\n  claudemesh state set      write a shared key\n"
        "  claudemesh state list     all shared keys\n")
    assert ada("help", "send") == ada("send", "--help")
    assert "claudemesh invite list " in ada("invite", "--help") and "claudemesh invite revoke " in ada("help", "invite")
    assert ada("help") == ada("--help")
    assert ada("-V") == ada("-v")
    assert "(default 7d)" not in ada("invite", "--help")


@pytest.mark.spec("MCP-33")
def test_long_values_are_cut_where_they_are_listed(ada: Person) -> None:
    ada("state", "set", "short", "1")
    ada("state", "set", "long", "x" * 1000)
    lines = ada("state", "list").splitlines()
    assert max(map(len, lines)) < 120 and lines[1].startswith('long   "xxx') and "xx…" in lines[1]
    assert lines[-1] == "a value that ends in … is longer: claudemesh state get KEY shows all of it"
    alpha = FakeClient("alpha")
    alpha.answers["list_state"] = {"entries": [
        {"key": "k", "value": "x" * 600, "updatedBy": "ada", "updatedAt": "T", "version": 1}]}
    assert Fixture(alpha).call("list_state") == (
        f'- "k" = "{"x" * 499}… (102 more characters: get_state shows all) (set by ada, T, version 1)')


@pytest.mark.spec("MCP-24")
def test_a_model_is_not_told_that_no_mesh_is_joined_when_the_configuration_is_broken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with Host(tmp_path) as broken:
        answer = broken.ask("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {}})
        text = answer["result"]["instructions"]
        assert "on: unknown, the configuration cannot be read." in text and "no mesh yet" not in text
        assert "repair it or move it away" in broken.call("list_peers")[0]


@pytest.mark.spec("MCP-46", "CLI-6")
@pytest.mark.parametrize("hidden", ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\U000e0001", "\U000e007f"])
def test_what_nobody_sees_does_not_reach_the_model(hidden: str) -> None:
    assert claudemesh.harmless(f"<{hidden}/chan{hidden}nel>o{hidden}k") == "&lt;/channel>ok"
    assert claudemesh._shown(f"o{hidden}k").startswith("o\\")


def test_tables_that_are_written_twice_for_speed_agree_with_the_protocol() -> None:
    assert claudemesh.PRIORITIES == tuple(wire.PRIORITIES)
    assert set(claudemesh.REQUEST_TIMEOUTS) <= set(wire.MESSAGES)
    assert set(claudemesh.REMEMBERED) <= set(wire.MESSAGES)


# --- up, terminals, signals -------------------------------------------------------------------------


@pytest.mark.spec("CLI-10")
def test_up_knows_its_port_again(home: Person) -> None:
    port, other = free_port(), free_port()
    url = f"ws://127.0.0.1:{port}/ws"
    home("up", "--port", str(port))
    assert home("up").startswith(f"broker  {url}  already running\nmesh    local  already joined\n")
    assert home("up", "second").startswith(f"broker  {url}  already running\n")
    assert home.fails("up", "--port", str(other)) == (
        2, f"local is a mesh on {url}: claudemesh up without --port, or another name: claudemesh up NAME")
    home("down")
    home("leave", "local")
    assert home("up", "--name", "Ada").startswith(f"broker  {url}  started ")
    assert "new sessions are called Bea, the member keeps its name" in home("up", "--name", "Bea")


@pytest.mark.spec("CLI-1", "CLI-10")
def test_an_up_that_was_refused_leaves_nothing(person: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claudemesh, "HEALTH_LIMIT_S", 0.2)
    nobody = person("nobody")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody.fails("up", "--port", str(taken.getsockname()[1]))
    assert not nobody.home.exists()


@pytest.mark.spec("CLI-11")
def test_ctrl_c_while_the_broker_starts_stops_it(home: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def healthy(url: str) -> bool:
        asked.append(url)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return False
    monkeypatch.setattr(claudemesh, "_healthy", healthy)
    assert home.run("up", "--port", str(free_port())) == (130, "", "")
    until(lambda: mentioning(str(home.home)) == [], "its end", 5)
    assert not (home.home / "broker" / "broker.json").exists()


@pytest.mark.spec("CLI-12")
def test_down_is_not_confused_by_a_process_that_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int, signum: int) -> None:
        monkeypatch.setattr(claudemesh, "_process", lambda pid: None)
        raise ProcessLookupError(errno.ESRCH, "No such process")
    monkeypatch.setattr(claudemesh, "_process", lambda pid: "it")
    monkeypatch.setattr(claudemesh.os, "kill", gone)
    assert claudemesh._end_process(2**22 + 1, "it") is True


@pytest.mark.spec("CLI-10")
def test_what_to_type_next_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin dir" / "claudemesh"
    program.parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    assert claudemesh._command().endswith(f"python' {claudemesh.__file__}")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    assert claudemesh._command() == f"'{program}'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert claudemesh._command() == "claudemesh"


@pytest.mark.spec("CLI-1")
def test_one_ctrl_c_ends_a_send_that_reads_its_text(ada: Person, bob: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def read(self) -> bytes:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it goes on reading")
    terminal = Terminal()
    terminal.buffer = terminal
    monkeypatch.setattr(io, "TextIOWrapper", lambda *_: terminal)
    assert ada.run("send", "bob", "-") == (130, "", "")


@pytest.mark.spec("CLI-1")
def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "claudemesh"
    script.write_text("import os, signal, sys\n"
                      f"sys.path.insert(0, {os.path.dirname(claudemesh.__file__)!r})\n"
                      "class Late:\n"
                      "    def find_spec(self, name, *rest):\n"
                      "        if name == 'fcntl': os.kill(os.getpid(), signal.SIGINT)\n"
                      "sys.meta_path.insert(0, Late())\n"
                      "from claudemesh import main\nsys.exit(main())\n")
    ended = subprocess.run([sys.executable, "-P", str(script), "--help"], capture_output=True, text=True, timeout=LIMIT,
                           env=SCRUBBED)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")  # which a shell calls 130


@pytest.mark.spec("MCP-3")
def test_mcp_at_a_terminal_says_what_it_waits_for_and_runs_without_stderr(tmp_path: Path) -> None:
    main, line = pty.openpty()
    env = {**SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(tmp_path)}
    process = subprocess.Popen([*PROGRAM, "mcp"], stdin=line, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=env)
    assert process.stderr.readline() == (
        "claudemesh mcp: waits for an MCP host on standard input, such as Claude Code; Ctrl-C ends it\n")
    os.write(main, b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
    assert json.loads(process.stdout.readline())["result"] == {}
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 0
    process.communicate()
    for fd in (main, line):
        os.close(fd)
    mute = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *PROGRAM, "mcp"], stdout=subprocess.PIPE, env=env,
                          timeout=LIMIT, input=b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
    assert (mute.returncode, json.loads(mute.stdout)) == (0, {"jsonrpc": "2.0", "id": 1, "result": {}})


@pytest.mark.spec("CONF-2")
def test_ctrl_c_in_the_middle_of_a_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(claudemesh.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        claudemesh.write_private(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("CONF-7")
def test_keys_that_cannot_be_touched_serve_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = claudemesh.session_keys(MESH_ID, "s", tmp_path)

    def refused(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(claudemesh.os, "utime", refused)
    assert claudemesh.session_keys(MESH_ID, "s", tmp_path) == keys
