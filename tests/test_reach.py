"""Reaching the model: what goes by channel, hooks and wake, each message once, and what proves that it was seen.

Three stages: a `Reach` whose meshes are fakes and whose transcript is a file; the real server process and real
hook processes; and the real Claude Code where there is one, with a script for a model.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import claudemesh
from claude_world import CLAUDE, KEY, Model, Terminal, scratch_home
from claudemesh import MeshError
from test_cli import LIMIT, PROGRAM, SCRUBBED, Person, broker, person, until  # noqa: F401 (fixtures)
from test_mcp import ALICE, FakeClient, Fixture, Host, push, system
from world import World, story

claudemesh._load()


# --- A session that is told what happens -----------------------------------------------------------


class Client(FakeClient):
    """A fake mesh that also has a status and can hold messages back until the session is idle."""

    def __init__(self, slug: str) -> None:
        super().__init__(slug)
        self._remembered: dict[tuple[str, str], dict[str, Any]] = {}
        self.held: list[Any] = []

    async def request(self, type: str, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        self._remember({"type": type, **fields})
        return await super().request(type, timeout, **fields)

    def take(self) -> list[Any]:
        released = self.held if self.status == "idle" else []
        self.held = [] if released else self.held
        return released

    def told(self, type: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.asked if name == type]


class Told:
    """The session of one model: `sees` is what Claude Code has written to the transcript."""

    def __init__(self, folder: Path, mode: str = "push") -> None:
        self.mesh = Client("alpha")
        self.world = Fixture(self.mesh, mode=mode)
        self.session, self.reach = self.world.session, self.world.session.reach
        self.transcript = folder / "transcript.jsonl"
        self.count = 0

    def arrives(self, text: str = "hello", kind: str = "message", **fields: Any) -> str:
        self.count += 1
        one = push(kind, id=f"{self.count:032x}", text=text, **fields)
        self.session.arrived(self.world.links[0], one)
        return one.id

    def sees(self, text: str) -> None:
        with open(self.transcript, "a") as file:
            file.write(json.dumps({"content": text}) + "\n")

    async def hook(self, event: str, *, dies: bool = False, **about: Any) -> str:
        """What the hook hands over; Claude Code then writes it down, unless the hook dies before."""
        text, entries = await self.reach.hear(event, {"transcript_path": str(self.transcript), **about})
        self.reach.give_back(entries) if dies else self.reach.taken(entries)
        return text

    async def waits(self) -> asyncio.Future[str]:
        """A hook that waits to wake the session."""
        await self.reach.hear("Wake", {"transcript_path": str(self.transcript)})
        self.line = asyncio.StreamReader()

        async def wait(line: asyncio.StreamReader) -> str:
            text, entries = await self.reach.wait(line)
            self.reach.taken(entries)
            return text
        waiting = asyncio.ensure_future(wait(self.line))
        await asyncio.sleep(0)
        return waiting


def told(test: Any) -> Any:
    """Runs an async test with a `Told`; the time in which the channel must show is short."""
    @functools.wraps(test)
    def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fixtures = {"monkeypatch": monkeypatch} if "monkeypatch" in inspect.signature(test).parameters else {}
        monkeypatch.setattr(claudemesh, "PROBE_S", 0.05)
        monkeypatch.setattr(claudemesh, "PROOF_EVERY_S", 0.01)

        async def tell() -> None:
            model = Told(tmp_path)
            try:
                await test(model, **fixtures)
            finally:
                for _ in range(3):
                    await asyncio.sleep(0)  # what was begun is asked at least
                for task in model.reach.tasks:
                    task.cancel()
        asyncio.run(tell())
    del run.__wrapped__  # or pytest asks for the test's own parameters
    return run


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.spec("REACH-1", "REACH-2", "REACH-7")
@told
async def test_a_channel_that_works_is_recognised_and_hooks_stay_silent_about_it(model):
    await model.hook("Stop")
    first = model.arrives("one")
    assert len(model.world.notes) == 1 and await model.hook("UserPromptSubmit") == ""
    model.sees(f'<channel message_id="{first}">')
    await soon(lambda: model.reach.channel == "open")
    assert model.mesh.seen == [first]
    second = model.arrives("two")
    assert len(model.world.notes) == 2 and await model.hook("PostToolUse") == ""
    model.sees(second)
    assert await model.hook("Stop") == ""
    assert model.mesh.seen == [first, second]
    assert model.reach.ways() == ["channel", "hooks"]


@pytest.mark.spec("REACH-2", "REACH-3", "REACH-6", "REACH-7")
@told
async def test_a_channel_that_does_not_show_is_closed_and_the_message_goes_another_way_once(model):
    await model.hook("Stop")
    waiting = await model.waits()
    first = model.arrives("one")
    assert len(model.world.notes) == 1 and not waiting.done()
    text = await asyncio.wait_for(waiting, LIMIT)
    assert "1 new from other sessions" in text and "written by peers, not by your user" in text
    assert f'message_id="{first}"' in text and 'provenance="verified_peer"' in text and text.endswith("to you] one")
    assert model.reach.channel == "closed" and model.mesh.seen == []  # woken is not yet seen
    assert await model.hook("UserPromptSubmit") == ""
    model.sees(text)
    await soon(lambda: model.mesh.seen == [first])
    second = model.arrives("two")
    assert len(model.world.notes) == 1  # nothing more for the channel
    assert second in await model.hook("PostToolUse") and await model.hook("PostToolUse") == ""
    assert model.world.session.unread.count() == 1


@pytest.mark.spec("REACH-2")
@told
async def test_in_a_running_turn_a_message_is_not_tried_on_a_channel_nobody_knows(model):
    await model.hook("UserPromptSubmit")
    model.arrives("urgent", priority="now")
    assert model.world.notes == []
    assert "urgent" in await model.hook("PostToolUse")


@pytest.mark.spec("REACH-2")
@told
async def test_without_any_hook_everything_is_offered_to_the_channel(model):
    for number in range(3):
        model.arrives(str(number))
    await asyncio.sleep(0.1)
    assert len(model.world.notes) == 3 and model.reach.channel == "unknown"
    assert "(was offered to the channel)" in (await model.session.call("check_messages", {}))["content"][0]["text"]


@pytest.mark.spec("REACH-2")
@told
async def test_the_first_hook_judges_what_was_offered_long_before(model):
    model.arrives("long ago")
    await asyncio.sleep(0.06)
    assert "long ago" in await model.hook("UserPromptSubmit")


@pytest.mark.spec("REACH-5")
@told
async def test_what_a_dying_hook_took_is_handed_over_by_the_next(model):
    await model.hook("UserPromptSubmit")
    id = model.arrives("once", priority="now")
    assert id in await model.hook("PostToolUse", dies=True)
    assert id in await model.hook("PostToolUse") and await model.hook("PostToolUse") == ""


@pytest.mark.spec("REACH-4")
@told
async def test_what_is_in_no_hurry_neither_wakes_nor_holds_a_turn_open(model):
    model.reach.channel = "closed"
    waiting = await model.waits()
    low = model.arrives("whenever", priority="low")
    model.arrives(kind="system", event="peer_left", data={"name": "bob"})
    await asyncio.sleep(0)
    assert not waiting.done() and await model.hook("Stop") == ""
    text = await model.hook("UserPromptSubmit")
    assert low in text and '[system] "bob" left' in text


@pytest.mark.spec("REACH-4", "REACH-8")
@told
async def test_the_end_of_a_turn_lets_in_what_was_held_back_and_goes_on_with_it(model):
    model.reach.channel = "closed"
    await model.hook("UserPromptSubmit")
    await soon(lambda: model.mesh.told("set_status") == [{"status": "working"}])
    model.mesh.held = [push(id="h" * 32, text="held back")]
    assert "held back" in await model.hook("Stop")
    await soon(lambda: [told["status"] for told in model.mesh.told("set_status")] == ["working", "idle", "working"])
    assert await model.hook("Stop") == "" and model.mesh.status == "idle"


@pytest.mark.spec("REACH-4")
@told
async def test_a_chatty_peer_cannot_keep_a_turn_going_for_ever(model):
    model.reach.channel = "closed"
    await model.hook("UserPromptSubmit")
    waiting = await model.waits()
    for number in range(claudemesh.MAX_STOPS):
        model.arrives(f"again {number}")
        assert f"again {number}" in await model.hook("Stop")
    model.arrives("one too many")
    assert await model.hook("Stop") == ""
    assert "one too many" in await asyncio.wait_for(waiting, LIMIT)  # in a turn of its own


@pytest.mark.spec("REACH-3")
@told
async def test_inbox_mode_hands_over_a_note_and_off_mode_nothing(model):
    model.session.identity.mode, model.reach.channel = "inbox", "closed"
    await model.hook("UserPromptSubmit")
    for text in ("secret one", "secret two"):
        model.arrives(text, priority="now")
    text = await model.hook("PostToolUse")
    assert "[inbox] 2 waiting" in text and "secret" not in text and "message_id" not in text
    model.sees(text)
    assert await model.hook("Stop") == "" and model.mesh.seen == []
    assert "secret one" in (await model.session.call("check_messages", {}))["content"][0]["text"]
    assert len(model.mesh.seen) == 2
    model.session.identity.mode = "off"
    model.arrives("silent", priority="now")
    assert await model.hook("PostToolUse") == "" and await model.hook("UserPromptSubmit") == ""


@pytest.mark.spec("REACH-3")
@told
async def test_a_hook_hands_over_no_more_than_claude_code_takes(model):
    model.reach.channel = "closed"
    await model.hook("UserPromptSubmit")
    whole = [model.arrives("x" * 2000, priority="now") for _ in range(5)]
    long = model.arrives("y" * 50_000, priority="now")
    texts = [await model.hook("PostToolUse") for _ in range(4)]
    assert all(len(text) < 10_000 for text in texts) and texts[-1] == ""
    assert "(3 more: check_messages)" in texts[0]
    assert [sum(id in text for text in texts) for id in whole] == [1] * 5
    assert "more characters: check_messages shows all" in texts[2] and long not in texts[2]
    model.sees("".join(texts))
    await soon(lambda: sorted(model.mesh.seen) == whole)  # half a message was not seen
    assert model.session.unread.count() == 1


@pytest.mark.spec("REACH-9")
@told
async def test_a_sub_agent_is_not_the_one_who_is_addressed(model):
    await model.hook("UserPromptSubmit")
    model.arrives("for the main agent", priority="now")
    assert await model.hook("PostToolUse", agent_id="a1") == ""
    assert "for the main agent" in await model.hook("PostToolUse")


@pytest.mark.spec("REACH-6")
@told
async def test_one_hook_waits_and_the_one_before_is_sent_away(model):
    first = await model.waits()
    second = await model.waits()
    assert await first == "" and not second.done()
    model.line.feed_eof()  # the second was killed
    assert await second == "" and model.reach.waiter is None


@pytest.mark.spec("REACH-6")
@told
async def test_a_turn_of_which_nothing_is_heard_was_interrupted_and_does_not_keep_the_session_asleep(model, monkeypatch):
    model.reach.channel = "closed"
    waiting = await model.waits()
    await model.hook("UserPromptSubmit")
    monkeypatch.setattr(claudemesh, "TURN_SILENCE_S", 0.05)
    model.arrives("are you there?", priority="now")
    assert not waiting.done()
    assert "are you there?" in await asyncio.wait_for(waiting, LIMIT)


@pytest.mark.spec("REACH-8")
@told
async def test_hooks_report_the_status_but_leave_dnd_alone(model):
    await model.hook("UserPromptSubmit")
    await model.hook("PostToolUse")
    await model.hook("Stop")
    assert [told["status"] for told in model.mesh.told("set_status")] == ["working", "idle"]
    await model.session.call("set_status", {"status": "dnd"})
    await model.hook("UserPromptSubmit")
    await model.hook("Stop")
    assert model.mesh.status == "dnd"
    await model.reach.hear("idle", {})  # as upstream's hooks say it
    assert model.reach.ways() == ["hooks"]


@pytest.mark.spec("REACH-8")
@told
async def test_the_session_leaves_with_claude_code_but_not_when_that_goes_on(model):
    left = []

    async def leave() -> None:
        left.append(True)
    model.session.leave = leave
    await model.hook("SessionEnd", reason="clear")
    await model.hook("SessionEnd", reason="resume")
    await asyncio.sleep(0)
    assert left == []
    await model.hook("SessionEnd", reason="other")
    await soon(lambda: left)


@pytest.mark.spec("REACH-11", "PRES-16")
@story
async def test_the_ways_are_published_and_listed(world: World):
    ana, bob = await world.peer("ana"), await world.peer("bob")
    assert (await bob.request("set_reach", ways=["hooks", "wake"]))["type"] == "ack"
    assert (await bob.request("set_reach", ways=["pigeon"]))["code"] == "malformed"
    entries = {p["displayName"]: p for p in (await ana.request("list_peers"))["peers"]}
    assert entries["bob"]["reach"] == ["hooks", "wake"] and "reach" not in entries["ana"]
    assert "reached by hooks/wake" in claudemesh.peer_line(entries["bob"], "", "")
    assert "reached by hooks/wake" in claudemesh._peer_row(entries["bob"])[3]


# --- Real processes --------------------------------------------------------------------------------


def run_hook(config: Path, event: str, session: str = "one", stdin: Any = None, **env: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a hook process."""
    data = stdin if isinstance(stdin, bytes) else json.dumps(stdin or {}).encode()
    done = subprocess.run([*PROGRAM, "hook", event], input=data, capture_output=True, timeout=LIMIT, env={
        **SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(config), "CLAUDE_CODE_SESSION_ID": session, **env})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def waiting_hook(config: Path, session: str = "one") -> subprocess.Popen[str]:
    env = {**SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(config), "CLAUDE_CODE_SESSION_ID": session}
    return subprocess.Popen([*PROGRAM, "hook", "Wake"], env=env, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def state(config: Path, session: str = "one") -> dict[str, Any] | None:
    return next((s for s in claudemesh.session_states(config / "run") if s["session"] == session), None)


@pytest.fixture(scope="module")
def mates(broker: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:  # noqa: F811
    """The configuration directories of Ada and Bob, members of one mesh."""
    ada, bob = tmp_path_factory.mktemp("ada"), tmp_path_factory.mktemp("bob")
    slug = f"reach-{os.getpid()}"
    claudemesh.create_mesh(slug, slug, broker, display_name="Ada", dir=ada)
    claudemesh.join_mesh(claudemesh.make_invite(slug, dir=ada), "Bob", dir=bob)
    claudemesh.update_config(lambda config: config.update(displayName="Bob"), bob)
    return ada, bob


@pytest.fixture
def ada(mates: tuple[Path, Path], person: Callable[[str], Person]) -> Person:  # noqa: F811
    someone = person("ada")
    someone.home = mates[0]
    return someone


@pytest.fixture
def bob(mates: tuple[Path, Path]) -> Path:
    return mates[1]


@pytest.fixture
def session(bob: Path) -> Iterator[Host]:
    """Bob's session "one", with its socket open and its mesh joined."""
    with Host(bob, CLAUDE_CODE_SESSION_ID="one") as host:
        host.open()
        until(lambda: (s := state(bob)) and set(s["meshes"].values()) == {"open"}, "the session is connected")
        yield host
        host.process.stdin.close()
        host.gone()


def key(config: Path, session: str = "one") -> str:
    [file] = (config / "sessions").rglob(f"{session}.json")
    return json.loads(file.read_text())["pubkey"]


@pytest.mark.spec("REACH-3", "REACH-7", "REACH-10")
def test_a_message_goes_through_a_hook_process_once_and_its_sender_learns_that_it_was_seen(session, ada, bob, tmp_path):
    transcript = tmp_path / "t.jsonl"
    about = {"session_id": "one", "transcript_path": str(transcript), "cwd": "/", "hook_event_name": "UserPromptSubmit"}
    assert run_hook(bob, "UserPromptSubmit", stdin=about) == (0, "", "")
    id = ada.json("send", key(bob), "look at this", "--priority", "now")["messageId"]
    until(lambda: state(bob)["unread"] == 1, "it arrived")
    code, out, err = run_hook(bob, "PostToolUse", stdin=about)
    context = json.loads(out)["hookSpecificOutput"]
    assert (code, err, context["hookEventName"]) == (0, "", "PostToolUse")
    assert context["additionalContext"].endswith('[message from peer "Ada" to you] look at this')
    assert "has it since" in ada("explain", id)
    transcript.write_text(out)
    assert run_hook(bob, "Stop", stdin=about) == (0, "", "")
    until(lambda: "saw it" in ada("explain", id), "it was reported as shown")


@pytest.mark.spec("REACH-6")
def test_a_waiting_hook_wakes_with_status_2_and_is_gone_with_the_session(session, ada, bob):
    run_hook(bob, "UserPromptSubmit")
    first = waiting_hook(bob)
    until(lambda: "wake" in state(bob)["ways"], "it waits")
    second = waiting_hook(bob)
    assert (first.wait(LIMIT), *first.communicate()) == (0, "", "")
    ada("send", key(bob), "wake up", "--priority", "now")
    until(lambda: state(bob)["unread"] == 1, "it arrived")
    assert run_hook(bob, "Stop")[1].count("wake up") == 1
    ada("send", key(bob), "and again", "--priority", "now")
    until(lambda: state(bob)["unread"] == 2, "it arrived")
    assert "and again" in run_hook(bob, "PostToolUse")[1]
    assert run_hook(bob, "Stop") == (0, "", "")
    ada("send", key(bob), "sleeping?")
    code, (out, err) = second.wait(LIMIT), second.communicate()
    assert (code, out) == (2, "") and err.endswith("] sleeping?")
    third = waiting_hook(bob)
    until(lambda: state(bob)["waiting"], "it waits")
    session.process.send_signal(signal.SIGTERM)
    assert third.wait(LIMIT) == 0
    third.communicate()


@pytest.mark.spec("REACH-6")
def test_a_waiting_hook_does_not_wait_where_claude_code_would_wait_for_it(session, bob):
    assert run_hook(bob, "Wake", CLAUDE_CODE_ENTRYPOINT="sdk-cli") == (0, "", "")


@pytest.mark.spec("REACH-10")
def test_two_sessions_in_one_folder_stay_apart(session, ada, bob):
    with Host(bob, CLAUDE_CODE_SESSION_ID="two") as other:
        other.open()
        until(lambda: (s := state(bob, "two")) and set(s["meshes"].values()) == {"open"}, "it is connected")
        for name in ("one", "two"):
            run_hook(bob, "UserPromptSubmit", name)
        ada("send", key(bob, "two"), "only for two", "--priority", "now")
        until(lambda: state(bob, "two")["unread"] == 1, "it arrived")
        assert run_hook(bob, "PostToolUse", "one") == (0, "", "")
        assert "only for two" in run_hook(bob, "PostToolUse", "two")[1]


@pytest.mark.spec("REACH-10")
def test_after_clear_the_session_is_found_by_the_process_of_claude_code(session, bob):
    assert run_hook(bob, "UserPromptSubmit", "another-id") == (0, "", "")  # its parent is the server's parent, too
    assert state(bob)["ways"] == ["hooks"]


@pytest.mark.spec("REACH-10")
def test_the_socket_is_private_follows_the_session_and_is_swept_after_a_crash(bob):
    for crash in (True, False):
        with Host(bob, CLAUDE_CODE_SESSION_ID="three") as host:
            host.open()
            until(lambda: state(bob, "three"), "the socket is open")
            path = bob / "run" / "three.sock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            host.process.send_signal(signal.SIGKILL if crash else signal.SIGTERM)
            host.gone()
            assert path.exists() is crash
    with Host(bob, CLAUDE_CODE_SESSION_ID="four") as host:
        host.open()
        until(lambda: state(bob, "four"), "the socket is open")
        assert not path.exists()


@pytest.mark.spec("REACH-10")
@pytest.mark.parametrize("stdin", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', json.dumps({"x": "y" * 400_000}).encode()])
@pytest.mark.parametrize("event", ["UserPromptSubmit", "Stop", "SessionEnd", "Nonsense", "idle"])
def test_a_hook_is_silent_whatever_it_is_given_and_whether_or_not_there_is_a_session(tmp_path, stdin, event, capfd, monkeypatch):
    config = tmp_path / "config"
    monkeypatch.setenv("CLAUDEMESH_CONFIG_DIR", str(config))
    (tmp_path / "stdin").write_bytes(stdin)
    source = os.open(tmp_path / "stdin", os.O_RDONLY)
    kept, here = os.dup(0), os.getcwd()
    os.dup2(source, 0)
    try:
        assert claudemesh.main(["hook", event]) == 0
    finally:
        os.dup2(kept, 0)
        os.chdir(here)
    assert capfd.readouterr() == ("", "") and not config.exists()


@pytest.mark.spec("REACH-10", "CLI-15")
def test_a_hook_loads_nothing_that_talks_to_a_broker(session, bob):
    code = ("import sys, claudemesh; assert claudemesh.main(['hook', 'UserPromptSubmit']) == 0\n"
            "heavy = {'asyncio', 'wire', 'nacl', 'ssl', 'typing', 'argparse', 'dataclasses', 'subprocess', 'mcp', 'broker'}\n"
            "print(sorted(heavy & set(sys.modules)), 'hooks' in claudemesh.session_states(claudemesh.Path('.'))[0]['ways'])")
    done = subprocess.run([sys.executable, "-c", code], input=b"{}", capture_output=True, timeout=LIMIT, cwd=Path(
        claudemesh.__file__).parent, env={**SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(bob), "CLAUDE_CODE_SESSION_ID": "one"})
    assert (done.stdout, done.stderr) == (b"[] True\n", b"")


@pytest.mark.spec("REACH-10")
def test_a_hook_whose_session_hangs_gives_up(session, bob):
    session.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert run_hook(bob, "UserPromptSubmit") == (0, "", "")
    assert time.monotonic() - began < 5
    session.process.send_signal(signal.SIGCONT)


# --- The real Claude Code --------------------------------------------------------------------------


@pytest.mark.skipif(CLAUDE is None, reason="needs claude on PATH or CLAUDE_BIN")
@pytest.mark.spec("REACH-1", "REACH-3", "REACH-6", "REACH-7")
def test_the_real_claude_code_sees_each_message_once_whichever_way_it_comes(ada, bob, tmp_path):
    home, work, programs = tmp_path / "home", tmp_path / "work", tmp_path / "bin"
    scratch_home(home, work)
    programs.mkdir()
    (programs / "claude").symlink_to(CLAUDE)
    with Model() as model:
        env = {"HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LANG": "C.UTF-8",
               "TERM": "xterm-256color", "DISABLE_AUTOUPDATER": "1", "ANTHROPIC_API_KEY": KEY,
               "ANTHROPIC_BASE_URL": model.url, "CLAUDEMESH_CONFIG_DIR": str(bob)}
        with Terminal([*PROGRAM, "launch", "--quiet", "--name", "Scout"], env, work) as terminal:
            def send(text: str, *words: str) -> str:
                return ada.json("send", "Scout", text, *words)["messageId"]

            def becomes(status: str) -> None:
                until(lambda: terminal.pump(0.02) and any(
                    (peer["displayName"], peer["status"], peer.get("reach")) == ("Scout", status, ["hooks", "wake"])
                    for peer in ada.json("peers")), f"Scout is {status}")

            terminal.shows("shift+tab")
            becomes("idle")
            ids = [send("UNICORN-FIRST: the channel stays closed, so this wakes")]
            model.asked("UNICORN-FIRST")
            becomes("idle")
            ids.append(send("UNICORN-SECOND: at the next prompt", "--priority", "low"))
            tool, stop = model.next(tool="Bash", command="echo hi", description="x"), model.next(text="done")
            terminal.type("go on")
            model.asked("UNICORN-SECOND")
            ids.append(send("UNICORN-THIRD: after the next tool call", "--priority", "now"))
            tool.set()
            model.asked("UNICORN-THIRD")
            ids.append(send("UNICORN-FOURTH: at the end of the turn"))
            assert "Scout is working" in ada("explain", ids[-1])
            stop.set()
            model.asked("UNICORN-FOURTH")
            becomes("idle")
            ids.append(send("UNICORN-FIFTH: wakes at once"))
            model.asked("UNICORN-FIFTH")
            becomes("idle")
            for id in ids:
                until(lambda: terminal.pump(0.02) and "Scout's model or user saw it" in ada("explain", id), "it says shown")
            assert [model.last.count(word) for word in ("UNICORN-FIRST", "UNICORN-SECOND", "UNICORN-THIRD", "UNICORN-FOURTH", "UNICORN-FIFTH")] == [1] * 5
    assert list((bob / "launch").iterdir()) == []
