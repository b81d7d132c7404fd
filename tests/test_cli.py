"""The command line as a person or a script meets it: real files, a real broker, real processes where it
matters (signals, pipes, background broker, demo), and `main` in this process for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import io
import json
import os
import pty
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import claudemesh
import wire

PROGRAM = claudemesh._program()
LIMIT = 20.0
SCRUBBED = {key: value for key, value in os.environ.items() if not key.startswith(("CLAUDE", "NO_COLOR"))}


class Person:
    """Somebody with a configuration directory, who runs commands in this process."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self._monkeypatch, self._capsys = home, monkeypatch, capsys

    def run(self, *words: str, stdin: str = "") -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        with self._monkeypatch.context() as patch:
            patch.setenv("CLAUDEMESH_CONFIG_DIR", str(self.home))
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            code = claudemesh.main(list(words))
        return code, *self._capsys.readouterr()

    def __call__(self, *words: str, stdin: str = "") -> str:
        """What a command that works prints."""
        code, out, err = self.run(*words, stdin=stdin)
        assert (code, err) == (0, ""), (words, code, out, err)
        return out

    def json(self, *words: str) -> object:
        return json.loads(self(*words, "--json"))

    def fails(self, *words: str) -> tuple[int, str]:
        """Exit code and message of a command that does not work: one line, nothing on stdout."""
        code, out, err = self.run(*words)
        assert out == "" and err.startswith("claudemesh: ") and err.count("\n") == 1, (words, code, out, err)
        return code, err.removeprefix("claudemesh: ").rstrip("\n")

    def process(self, *words: str, **how: object) -> subprocess.Popen[str]:
        """The same program as a process of its own."""
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **how}
        env = {**SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(self.home), **how.pop("env", {})}
        return subprocess.Popen([*PROGRAM, *words], text=True, env=env, **how)

    def membership(self) -> dict[str, object]:
        return claudemesh.find_mesh(claudemesh.load_config(self.home))

    @contextlib.contextmanager
    def online(self, name: str, **options: object) -> Iterator[queue.Queue[claudemesh.Push | None]]:
        """A session of this member that is connected meanwhile; yields what it receives, and None when it is
        shut out."""
        received: queue.Queue[claudemesh.Push | None] = queue.Queue()
        ready: queue.Queue[Callable[[], object] | BaseException] = queue.Queue()

        async def live() -> None:
            try:
                async with claudemesh.MeshClient(self.membership(), name=name, **options) as client:
                    task, loop = asyncio.current_task(), asyncio.get_running_loop()
                    ready.put(lambda: loop.call_soon_threadsafe(task.cancel))
                    async for push in client:
                        received.put(push)
                    received.put(None)
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=lambda: asyncio.run(live()))
        thread.start()
        stop = ready.get(timeout=LIMIT)
        assert not isinstance(stop, BaseException), stop
        try:
            yield received
        finally:
            with contextlib.suppress(RuntimeError):  # it ended by itself
                stop()
            thread.join(LIMIT)


def until(condition: Callable[[], object], what: str, limit: float = LIMIT) -> object:
    """The first true value of `condition`, which is about another process and so can only be asked."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def mentioning(text: str) -> list[str]:
    """The processes on this machine, other than this one, that name `text` in arguments or environment."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            known = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
            ended = (directory / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if text.encode() in known and not ended and int(directory.name) != os.getpid():
            found.append(directory.name)
    return found


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a broker process that all tests of this file share."""
    data = tmp_path_factory.mktemp("broker")
    process = subprocess.Popen([*PROGRAM, "broker", "--port", "0", "--data", str(data)], env=SCRUBBED,
                               stderr=subprocess.PIPE, text=True)
    line = next(line for line in process.stderr if '"listening"' in line)
    drain = threading.Thread(target=process.stderr.read)
    drain.start()
    yield json.loads(line)["url"]
    process.terminate()
    assert process.wait(LIMIT) == 0
    drain.join(LIMIT)


@pytest.fixture
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
           capsys: pytest.CaptureFixture[str]) -> Callable[[str], Person]:
    """Makes people, each with a directory of their own and none of this process's settings."""
    for name in [name for name in os.environ if name.startswith("CLAUDE")]:
        monkeypatch.delenv(name)
    return lambda name: Person(tmp_path / name, monkeypatch, capsys)


meshes = iter(range(1, 1000))


@pytest.fixture
def ada(person: Callable[[str], Person], broker: str) -> Person:
    """The owner of a fresh mesh."""
    someone = person("ada")
    someone("create", f"mesh-{next(meshes)}", "--broker", broker, "--name", "Ada")
    return someone


@pytest.fixture
def bob(person: Callable[[str], Person], ada: Person) -> Person:
    """A member of Ada's mesh."""
    someone = person("bob")
    someone("join", ada("invite").strip(), "--name", "Bob")
    return someone


# --- Arguments, exit codes, messages ---------------------------------------------------------------

WRONG = [
    ("no mesh joined", ["peers"], 2, "no mesh joined yet"),
    ("no such command", ["sned"], 2, "no command 'sned'; did you mean send?"),
    ("nothing like a command", ["xyzzy"], 2, "no command 'xyzzy'; claudemesh --help lists them"),
    ("half a command", ["state"], 2, "state needs one of: get, set, list"),
    ("half a command, then a wrong word", ["state", "sett", "a", "1"], 2, "state needs one of: get, set, list"),
    ("arguments missing", ["send", "bob"], 2, "required: MESSAGE"),
    ("arguments beyond", ["peers", "now"], 2, "unrecognized arguments: now"),
    ("an unknown option", ["peers", "--colour"], 2, "--colour"),
    ("an abbreviated option", ["send", "a", "b", "--prio", "now"], 2, "--prio"),
    ("a wrong choice", ["send", "a", "b", "--priority", "soon"], 2, "'soon'"),
    ("a wrong time", ["invite", "--expires", "7"], 2, "not a time"),
    ("a time beyond all sense", ["invite", "--expires", "999999w"], 2, "not a time"),
    ("a wrong number", ["invite", "--uses", "0"], 2, "argument --uses: not a number of uses (1 to 100000): 0"),
    ("a wrong wait", ["inbox", "--wait", "-1"], 2, "argument --wait: not a number of seconds (0 to 1000000): -1"),
    ("an endless wait", ["inbox", "--wait", "inf"], 2, "argument --wait: not a number of seconds (0 to 1000000): inf"),
    ("a wrong port", ["up", "--port", "65536"], 2, "argument --port: not a port (1 to 65535): 65536"),
    ("a mesh name that names another directory", ["up", "../x"], 2, "not a usable mesh name"),
    ("an argument that is no UTF-8", ["send", "bob", "\udcff"], 2, "not UTF-8"),
    ("a text that looks like an option", ["send", "bob", "-x"], 2, "; put -- before a text that begins with -)"),
    ("an empty key", ["state", "set", "", "1"], 2, "the key is empty"),
    ("an empty message", ["send", "bob", ""], 2, "the message is empty"),
    ("an empty name", ["join", "ic://join/x", "--name", " "], 2, "--name is empty"),
    ("a name too long", ["join", "ic://join/x", "--name", "n" * 129], 2, "--name: at most 128 characters"),
    *((f"a name like {name!r}", ["up", "--name", name], 2, "--name begins with @, * or #, or has a colon")
      for name in ("@dev", "*", "#tag", "a:b", "a\x1bb", "a\nb")),
    ("no invite", ["join", "hello"], 2, "not an invite"),
    ("a damaged invite", ["join", "ic://join/" + "A" * 40], 2, "the invite is damaged: it does not decode; copy the whole link"),
    ("a mesh that is not joined", ["leave", "local"], 2, "no mesh joined yet"),
    ("no address", ["create", "x", "--broker", "http://localhost"], 2, "not a ws:// or wss:// address"),
    ("nobody there", ["create", "x", "--broker", "ws://127.0.0.1:1/ws"], 1, "cannot be reached"),
    ("an option of mcp", ["mcp", "--port", "1"], 2, "unrecognized arguments: --port 1"),
]


@pytest.mark.spec("CLI-1", "CLI-2")
@pytest.mark.parametrize(("words", "code", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_call_is_one_line_and_an_exit_code(person, words, code, message):
    got, line = person("nobody").fails(*words)
    assert (got, message in line) == (code, True), line


@pytest.mark.spec("CLI-1")
def test_a_failed_command_leaves_no_configuration_behind(person):
    nobody = person("nobody")
    nobody.fails("join", "ic://join/" + "A" * 40, "--name", "Nobody")
    nobody.fails("peers")
    nobody.fails("leave", "local")
    assert not nobody.home.exists()


@pytest.mark.spec("CLI-1", "CLI-2")
def test_help_lists_every_command_and_exit_code_and_works_for_each(person):
    nobody = person("nobody")
    text = nobody("--help")
    for name, command in claudemesh.COMMANDS.items():
        assert f"\n  {name:<14} {command.about}\n" in text
        if name not in claudemesh.OWN_PARSER:
            assert nobody(*name.split(), "--help").startswith(f"usage: claudemesh {name} [-h]")
    assert [line.split()[0] for line in text.partition("Exit codes\n")[2].splitlines()] == ["0", "1", "2", "130"]


def test_version_is_the_one_the_mcp_server_names_and_the_file_runs_as_a_script(person):
    version = f"claudemesh {claudemesh.SERVER_INFO['version']}\n"
    assert person("nobody")("--version") == version
    script = subprocess.run([sys.executable, claudemesh.__file__, "-v"], capture_output=True, text=True, timeout=LIMIT)
    assert (script.returncode, script.stdout, script.stderr) == (0, version, "")


def test_commands_that_need_no_mesh_work_without_a_configuration(person):
    nobody = person("nobody")
    assert nobody.json("list") == []
    assert nobody("list") == f"no mesh joined yet; configuration: {nobody.home / 'config.json'}\n"
    assert nobody.json("status") == {"config": str(nobody.home / "config.json"), "mode": None, "meshes": []}


@pytest.mark.spec("CLI-1")
@pytest.mark.parametrize(("content", "message"), [
    ("{", "config.json: line 1 column 2"),
    ('{"meshes": 7}', "config.json: meshes: expected a list"),
    ("\udcff", "config.json: byte 0 is not UTF-8"),
    (None, "config.json: Is a directory"),
])
def test_an_unreadable_configuration_is_named_and_left_alone(person, content, message):
    someone = person("someone")
    path = someone.home / "config.json"
    if content is None:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir()
        path.write_text(content, errors="surrogateescape")
    for words in (["list"], ["status"], ["send", "bob", "hi"], ["up"]):
        code, line = someone.fails(*words)
        assert code == 2 and message in line
    assert content is None or path.read_text(errors="surrogateescape") == content


@pytest.mark.spec("CLI-3")
def test_with_several_meshes_one_must_be_named(ada, broker):
    first, second = ada.membership()["slug"], f"mesh-{next(meshes)}"
    ada("create", second, "--broker", broker)
    assert ada.fails("peers") == (2, f"several meshes are joined, choose one with --mesh: {first}, {second}")
    assert ada.fails("peers", "--mesh", "third") == (2, f"not a member of 'third'; joined: {first}, {second}")
    assert ada("peers", "--mesh", second) == f"peers on {second}: 0\n"
    assert ada("leave", second).startswith(f"left {second}; meshes still joined: 1; ")
    assert ada("peers") == f"peers on {first}: 0\n"


@pytest.mark.spec("CLI-1")
def test_a_broker_that_talks_nonsense_is_reported_in_one_line(ada):
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ok": true, "members": [{"id": 7}], "invites": {}}')

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Nonsense) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = claudemesh.owner_file(ada.membership()["slug"], ada.home)
        elsewhere = {**json.loads(path.read_text()), "brokerUrl": f"ws://127.0.0.1:{server.server_port}/ws"}
        path.write_text(json.dumps(elsewhere))
        assert ada.fails("members") == (1, "the broker's answer is malformed")
        assert ada.fails("invite", "list") == (1, "the broker's answer is malformed")
        server.shutdown()


# --- Meshes and members ----------------------------------------------------------------------------


@pytest.mark.spec("CLI-18")
def test_create_invite_and_join_speak_json_without_secrets(person, broker):
    ada, bob, slug = person("ada"), person("bob"), f"mesh-{next(meshes)}"
    created = ada.json("create", slug, "--broker", broker, "--name", "Ada")
    assert (created["slug"], created["brokerUrl"]) == (slug, broker)
    assert created["ownerFile"] == str(claudemesh.owner_file(slug, ada.home))
    invite = ada.json("invite", "--uses", "2", "--role", "admin", "--expires", "90s")
    assert (invite["mesh"], invite["role"], invite["uses"]) == (slug, "admin", 2)
    joined = json.loads(bob("join", invite["link"], "--name", "Bob", "--json"))
    assert (joined["slug"], joined["alreadyMember"]) == (slug, False)
    assert json.loads(bob("join", invite["link"], "--json"))["alreadyMember"] is True
    [listed] = ada.json("list")
    assert (listed["slug"], listed["owner"]) == (slug, True)
    for record in (created, joined, listed):
        assert "secretKey" not in record
    assert {m["displayName"]: m["permission"] for m in ada.json("members")} == {"Ada": "admin", "Bob": "admin"}


@pytest.mark.spec("CLI-18")
def test_a_name_given_once_is_kept_for_the_sessions(ada):
    assert claudemesh.load_config(ada.home)["displayName"] == "Ada"
    assert ada.json("info")["displayName"] == "Ada"


def test_an_invite_link_is_alone_on_stdout_and_admits_as_often_as_said(ada, person):
    link = ada("invite")
    assert re.fullmatch(r"ic://join/[A-Za-z0-9_-]+\n", link)
    person("bob")("join", link, "--name", "Bob")
    code, line = person("carol").fails("join", link, "--name", "Carol")
    assert (code, line) == (1, "the invite is used up: ask for another")


def test_an_expired_invite_is_refused_with_its_date(ada, person):
    owner = json.loads(claudemesh.owner_file(ada.membership()["slug"], ada.home).read_text())
    token = wire.invite_token(wire.sign_invite({
        "v": 1, "mesh_id": owner["meshId"], "mesh_slug": owner["slug"], "broker_url": owner["brokerUrl"],
        "expires_at": 1767323045, "mesh_root_key": owner["rootKey"], "role": "member",
        "owner_pubkey": owner["ownerPubkey"]}, owner["ownerSecretKey"]))
    assert person("bob").fails("join", token) == (1, "the invite expired on 2026-01-02T03:04:05.000Z")


def test_a_revoked_invite_admits_nobody(ada, person):
    link = ada("invite")
    mine = next(invite for invite in ada.json("invite", "list") if invite["usedCount"] == 0)
    assert ada("invite", "revoke", mine["id"]) == f"invite {mine['id']} admits nobody any more\n"
    assert re.search(rf"{mine['id']}  member  0/1   revoked  ", ada("invite", "list"))
    code, line = person("bob").fails("join", link)
    assert (code, line) == (1, "the invite was revoked: ask for another")
    assert ada.fails("invite", "revoke", mine["id"])[0] == 1
    assert ada.fails("invite", "revoke", "../x") == (2, "not an id: '../x'")


@pytest.mark.spec("CLI-7")
def test_revoke_refuses_to_guess_and_to_act_without_a_yes(ada, bob, person):
    other = person("other")
    other("join", ada("invite"), "--name", "bob")
    keys = sorted(entry["pubkey"] for entry in ada.json("members") if entry["displayName"].casefold() == "bob")
    code, line = ada.fails("revoke", "BOB", "-y")
    assert code == 2 and line.startswith("'BOB' is not one member: ") and all(key[:16] in line for key in keys)
    assert ada.fails("revoke", "nobody", "-y")[0] == 1
    code, line = ada.fails("revoke", bob.membership()["pubkey"][:8])
    assert code == 2 and line.endswith("Say so with -y")
    assert len(ada.json("members")) == 3
    assert bob.fails("revoke", "Ada", "-y")[0] == 1  # not an admin

    with bob.online("Bob") as received:
        gone = ada("revoke", bob.membership()["memberId"], "-y")
        assert received.get(timeout=LIMIT) is None  # its connection was closed for good
    assert gone == f"Bob ({bob.membership()['pubkey'][:16]}) is no member of {ada.membership()['slug']} any more\n"
    slug = ada.membership()["slug"]
    assert bob.fails("peers") == (
        1, f"you are no member of {slug} any more: ask for an invite, or: claudemesh leave {slug}")
    assert other("status").endswith("ok\n")


@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize(("typed", "code", "left"), [
    ("n\n", 1, ["Ada", "Bob"]), ("\n", 1, ["Ada", "Bob"]), ("y\n", 0, ["Ada"])])
def test_revoke_asks_the_person_at_the_terminal(ada, bob, typed, code, left):
    terminal, end = pty.openpty()
    os.write(terminal, typed.encode())
    process = ada.process("revoke", "bob", stdin=end)
    out, err = process.communicate(timeout=LIMIT)
    os.close(terminal)
    os.close(end)
    assert (process.returncode, err) == (code, "")
    assert out.startswith("Shut Bob (") and "[y/N]" in out
    assert [entry["displayName"] for entry in ada.json("members")] == left


def test_members_shows_who_is_there_and_who_is_away(ada, bob):
    with bob.online("Bob"):
        rows = [line.split() for line in ada("members").splitlines()]
    assert rows[0] == ["NAME", "ROLE", "KEY", "SESSIONS", "LAST", "SEEN", "ID"]
    assert [row[:2] for row in rows[1:]] == [["Ada", "admin"], ["Bob", "member"]]
    assert (rows[1][3], rows[2][3:5]) == ("0", ["1", "now"])


# --- Talking ---------------------------------------------------------------------------------------


@pytest.mark.spec("CLI-4")
def test_a_command_is_no_peer_nobody_notices_it(ada, bob):
    with bob.online("Bob", groups=["review"]) as received:
        assert [peer["displayName"] for peer in ada.json("peers")] == ["Bob"]
        ada("info")
        ada("status")
        ada("inbox")
        ada("send", "*", "last")
        push = received.get(timeout=LIMIT)  # the first of all, so no arrival or leaving came before it
        assert (push.kind, push.text, push.sender_name) == ("message", "last", "Ada")
        members = {entry["displayName"]: entry for entry in bob.json("members")}
    assert "lastSeenAt" not in members["Ada"]  # what is saved of a member is untouched
    assert received.empty()


def test_peers_shows_one_line_each(ada, bob):
    with bob.online("Bob", groups=[{"name": "review", "role": "lead"}], hello={"cwd": "/work"}) as received:
        text = ada("peers")
        key = ada.json("peers")[0]["pubkey"]
    assert text == f"peers on {ada.membership()['slug']}: 1\nBob  {key[:16]}  idle  @review:lead  /work\n"
    assert received.empty()


@pytest.mark.spec("CLI-8")
def test_send_says_who_gets_it_and_whether_it_is_secret(ada, bob):
    with bob.online("Bob at work", groups=["review"]) as received:
        sent = json.loads(ada("send", "bob at", "hello", "--json"))
        assert (sent["to"], sent["recipients"], sent["encrypted"]) == ("Bob at work", {"online": 1, "held": 0}, True)
        push = received.get(timeout=LIMIT)
        assert (push.text, push.secured, push.addressed, push.id) == ("hello", "session", "direct", sent["messageId"])
        line = ada("send", "@review", "-", stdin="from\nstdin\n")
        assert line.startswith("sent to @review: 1 online; encrypted; message ")
        assert received.get(timeout=LIMIT).text == "from\nstdin"


@pytest.mark.spec("CLI-8")
def test_send_reaches_a_member_who_is_away_by_name(ada, bob):
    assert ada("send", "BOB", "later").startswith(
        f"sent to Bob ({bob.membership()['pubkey'][:16]}): held for 1 who is away; encrypted; message ")
    with bob.online("Bob") as received:
        assert received.get(timeout=LIMIT).text == "later"


@pytest.mark.spec("CLI-8")
def test_send_refuses_names_that_are_nobody_or_several(ada, bob):
    with bob.online("Twin one"), bob.online("Twin two"):
        keys = [peer["pubkey"][:16] for peer in ada.json("peers")]
        code, line = ada.fails("send", "twin", "hi")
        assert code == 2 and all(key in line for key in keys)
        code, line = ada.fails("send", "carol", "hi")
        assert code == 1 and "Twin one" in line and "Twin two" in line
    code, line = ada.fails("send", "@nobody", "hi")
    assert code == 1 and "matches nobody" in line
    assert ada.fails("send", wire.KeyPair.generate().public, "hi")[0] == 1
    assert ada.fails("send", "ab" * 32, "hi")[0] == 2  # no key at all


@pytest.mark.spec("CLI-8")
def test_send_can_follow_the_message_until_it_is_delivered(ada, bob):
    with bob.online("Bob"):
        code, out, err = ada.run("send", "Bob", "hello", "--wait", "20")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"Bob  [0-9a-f]{16}  (delivered|shown)  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", out.splitlines()[1])


@pytest.mark.spec("CLI-8")
def test_send_that_waits_in_vain_exits_with_1(ada, bob):
    code, out, err = ada.run("send", "Bob", "hello", "--wait", "0.1", "--json")
    assert (code, err) == (1, "") and [row["state"] for row in json.loads(out)["status"]] == ["queued"]


@pytest.mark.spec("CLI-9")
def test_inbox_prints_what_waits_once_and_the_sender_learns_that_it_was_shown(ada, bob):
    first = json.loads(ada("send", "Bob", "one\ntwo", "--json"))
    ada("send", "Bob", "three", "--priority", "now")
    key = ada.membership()["pubkey"][:16]
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"Ada \({key}\)  to you  {when}\n    one\n    two\n"
                        rf"Ada \({key}\)  to you  {when}  now\n    three\n", bob("inbox"))
    assert bob("inbox") == f"nothing is waiting on {bob.membership()['slug']}\n"

    async def status() -> list[str]:
        async with claudemesh.MeshClient(ada.membership(), quiet=True) as client:
            reply = await client.request("message_status", messageId=first["messageId"])
            return [row["state"] for row in reply["recipients"]]
    assert asyncio.run(status()) == ["shown"]


@pytest.mark.spec("CLI-9")
def test_inbox_as_json_is_one_object_a_line(ada, bob):
    for text in ("one", "two"):
        ada("send", "Bob", text)
    lines = [json.loads(line) for line in bob("inbox", "--json").splitlines()]
    assert [(m["from"], m["text"], m["addressed"], m["secured"]) for m in lines] == [
        ("Ada", "one", "direct", "member"), ("Ada", "two", "direct", "member")]
    assert bob("inbox", "--json") == ""


@pytest.mark.spec("CLI-9")
def test_inbox_empties_any_amount_in_order(ada, bob):
    async def flood() -> None:
        async with claudemesh.MeshClient(ada.membership(), quiet=True) as client:
            for start in range(0, 700, 50):
                await asyncio.gather(*(client.send(bob.membership()["pubkey"], f"{n} " + "x" * 3000)
                                       for n in range(start, start + 50)))
    asyncio.run(flood())
    texts = [json.loads(line)["text"] for line in bob("inbox", "--json").splitlines()]
    assert [int(text.split()[0]) for text in texts] == list(range(700))
    assert bob("inbox", "--json") == ""


@pytest.mark.spec("CLI-9", "CLI-14")
def test_what_inbox_could_not_print_still_waits(ada, bob):
    ada("send", "Bob", "precious")
    reader, writer = os.pipe()
    os.close(reader)
    unread = bob.process("inbox", stdout=writer)
    os.close(writer)
    assert (unread.wait(LIMIT), unread.stderr.read()) == (1, "")

    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, "inbox"], stderr=subprocess.PIPE, text=True,
                            env={**SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(bob.home)}, timeout=LIMIT)
    assert (closed.returncode, closed.stderr) == (2, "claudemesh: standard output is closed\n")

    with open("/dev/full", "w") as full:
        unwritten = bob.process("inbox", stdout=full)
        assert (unwritten.wait(LIMIT), unwritten.stderr.read()) == (1, "claudemesh: standard output: No space left on device\n")
    assert "precious" in bob("inbox")


def test_inbox_waits_for_the_first_message_to_come(ada, bob):
    waiting = bob.process("inbox", "--wait", "20", "--json")
    until(lambda: connections(ada) == 1, "bob's command is connected")
    ada("send", "Bob", "now you know")
    out, err = waiting.communicate(timeout=LIMIT)
    assert (waiting.returncode, json.loads(out)["text"], err) == (0, "now you know", "")


def connections(person: Person) -> int:
    """How many connections the broker holds; of quiet ones only its metrics tell."""
    base = wire.http_base(person.membership()["brokerUrl"])
    text = claudemesh.http_call(base, "GET", "/metrics", raw=True).decode()
    return int(float(re.search(r"^broker_connections_active (\S+)$", text, re.MULTILINE)[1]))


@pytest.mark.spec("CLI-1")
def test_ctrl_c_ends_a_waiting_inbox_quietly(bob):
    waiting = bob.process("inbox", "--wait", "60")
    until(lambda: connections(bob) == 1, "the command is connected")
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=5)
    assert (waiting.returncode, out, err) == (130, "", "")


@pytest.mark.spec("CLI-6")
def test_what_peers_write_cannot_command_the_terminal(ada, bob):
    ada("send", "Bob", "a\x1b[2Jb\u202ec\x9b1m\nBob (0000)  to you")
    text = bob("inbox")
    assert "    a\\x1b[2Jb\\u202ec\\x9b1m\n    Bob (0000)  to you\n" in text
    with bob.online("Eve\n\x1b]0;x\x07"):
        assert "Eve\\n\\x1b]0;x\\x07  " in ada("peers")
    ada("state", "set", "k\x1b", "v\x1b")
    assert ada("state", "list").splitlines()[1].split()[:2] == ["k\\x1b", '"v\\u001b"']
    assert not re.search("[\x1b\x9b\x07\u202e]", text)


@pytest.mark.spec("CLI-5", "CLI-6")
def test_colours_are_for_terminals_that_want_them(ada):
    def on_a_terminal(*words: str, **env: str) -> str:
        terminal, end = pty.openpty()
        process = ada.process(*words, stdout=end, env={"TERM": "xterm", **env})
        os.close(end)
        text = b""
        with contextlib.suppress(OSError):  # how a pty says that nobody writes any more
            while data := os.read(terminal, 4096):
                text += data
        os.close(terminal)
        assert process.wait(LIMIT) == 0
        return text.decode()
    assert "\x1b[32mok\x1b[0m" in on_a_terminal("status")
    assert "\x1b" not in on_a_terminal("status", NO_COLOR="1") + on_a_terminal("status", TERM="dumb") + ada("status")
    ada("state", "set", "k", '"\x9bé"')
    assert '"value": "\\u009b\\u00e9"' in on_a_terminal("state", "get", "k", "--json")
    assert '"value": "\x9bé"' in ada("state", "get", "k", "--json")


def test_state_is_shared_and_values_are_json_or_text(ada, bob):
    for typed, value in [('{"a": [1, null]}', {"a": [1, None]}), ("plain words", "plain words"), ("NaN", "NaN"),
                         ("null", None), ("", "")]:
        ada("state", "set", "key", typed)
        entry = bob.json("state", "get", "key")
        assert (entry["value"], entry["updatedBy"]) == (value, "Ada")
    ada("state", "set", "key", '"text"')
    assert bob("state", "get", "key") == "text\n"
    assert bob.fails("state", "get", "other") == (1, f"'other' is not set on {bob.membership()['slug']}")
    assert [(entry["key"], entry["value"]) for entry in bob.json("state", "list")] == [("key", "text")]
    assert bob("state", "list").splitlines()[1].startswith('key  "text"  Ada     ')


def test_info_names_the_mesh_and_this_member_in_it(ada):
    info = ada.json("info")
    entry = ada.membership()
    assert {key: info[key] for key in ("slug", "meshId", "memberId", "brokerUrl", "displayName", "peerCount")} == {
        "slug": entry["slug"], "meshId": entry["meshId"], "memberId": entry["memberId"],
        "brokerUrl": entry["brokerUrl"], "displayName": "Ada", "peerCount": 0}
    assert not info.keys() & {"type", "_reqId", "secretKey"}
    assert f"displayName  Ada\n" in ada("info")


@pytest.mark.spec("CLI-13")
def test_status_says_for_each_mesh_whether_it_is_reachable(ada, monkeypatch):
    slug, url, path = ada.membership()["slug"], ada.membership()["brokerUrl"], ada.home / "config.json"
    assert ada("status") == f"configuration  {path}  mode 0600\n{slug}  {url}  ok\n"
    path.chmod(0o644)
    monkeypatch.setattr(claudemesh, "STATUS_LIMIT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, and never says a word
        silent = f"ws://127.0.0.1:{deaf.getsockname()[1]}/ws"
        claudemesh.update_config(lambda config: config["meshes"].extend([
            {**config["meshes"][0], "slug": "gone", "brokerUrl": "ws://127.0.0.1:1/ws"},
            {**config["meshes"][0], "slug": "silent", "brokerUrl": silent},
            {**config["meshes"][0], "slug": "other", "meshId": "f" * 32}]), ada.home)
        path.chmod(0o644)
        code, out, err = ada.run("status", "--json")
    report = json.loads(out)
    reasons = {mesh["slug"]: mesh["reason"] for mesh in report["meshes"]}
    assert (code, err, report["mode"]) == (1, "", "0644")
    assert reasons[slug] is None and reasons["silent"] == "no answer in 0.3 s"
    assert reasons["gone"].startswith("cannot be reached: ")
    assert reasons["other"] == "you are no member of other any more: ask for an invite, or: claudemesh leave other"
    assert "mode 0644: others may read your keys, chmod 600 it" in ada.run("status")[1]


@pytest.mark.spec("CLI-14")
def test_a_reader_who_has_seen_enough_is_no_error_message(person):
    reader, writer = os.pipe()
    os.close(reader)
    for words in (["--help"], ["list"]):
        process = person("nobody").process(*words, stdout=writer)
        assert (process.wait(LIMIT), process.stderr.read()) == (1, "")
    os.close(writer)


@pytest.mark.spec("CLI-15")
def test_mcp_imports_nothing_heavy_before_it_answers(person):
    process = subprocess.run([sys.executable, "-X", "importtime", *PROGRAM[1:], "mcp"], stdin=subprocess.DEVNULL,
                             env={**SCRUBBED, "CLAUDEMESH_CONFIG_DIR": str(person("nobody").home)},
                             capture_output=True, text=True, timeout=LIMIT)
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time:" in line}
    assert process.returncode == 0 and "json" in imported
    assert not imported & {"argparse", "asyncio", "wire", "nacl", "ssl", "subprocess", "dataclasses", "typing",
                           "inspect", "logging", "difflib", "datetime", "tempfile", "broker", "store", "sqlite3"}


# --- Up and down -----------------------------------------------------------------------------------


@pytest.fixture
def home(person) -> Iterator[Person]:
    """Somebody whose local broker is stopped afterwards."""
    someone = person("home")
    yield someone
    someone.process("down").communicate(timeout=LIMIT)
    assert mentioning(str(someone.home)) == []


def test_up_needs_nothing_but_a_home(tmp_path):
    env = {**SCRUBBED, "HOME": str(tmp_path)}
    port = str(free_port())

    def run(*words: str) -> str:
        return subprocess.run([*PROGRAM, *words], env=env, check=True, stdout=subprocess.PIPE, text=True,
                              timeout=LIMIT).stdout
    try:
        assert run("up", "--port", port).splitlines()[1] == f"mesh    local  joined as {socket.gethostname()}"
        assert run("peers") == "peers on local: 0\n"
    finally:
        run("down")
    assert (tmp_path / ".claudemesh").stat().st_mode & 0o777 == 0o700
    assert mentioning(str(tmp_path)) == []


@pytest.mark.spec("CLI-10", "CLI-11", "CLI-12")
def test_up_and_down_can_be_repeated(home):
    port = str(free_port())
    url = f"ws://127.0.0.1:{port}/ws"
    assert home("down") == "no broker started by `claudemesh up` is running\n"
    first = home("up", "--port", port, "--name", "Ada").splitlines()
    data = home.home / "broker"
    record = json.loads((data / "broker.json").read_text())
    assert first == [f"broker  {url}  started (process {record['pid']}), data in {data}",
                     "mesh    local  joined as Ada",
                     f"next    {claudemesh._command()} install   # connects Claude Code"]
    assert record["url"] == url and record.keys() == {"pid", "url", "startedAt", "process"}
    assert os.getsid(record["pid"]) == record["pid"]  # no terminal takes it down
    for name in ("broker.json", "broker.log"):
        assert (data / name).stat().st_mode & 0o777 == 0o600

    home("state", "set", "kept", "1")
    again = home("up", "--port", port).splitlines()
    assert again[:2] == [f"broker  {url}  already running", "mesh    local  already joined"]
    assert re.fullmatch(rf"broker  {url}  stopped \(process {record['pid']}\) after \d\.\d s\n", home("down"))
    assert not (data / "broker.json").exists()
    assert home.fails("peers")[0] == 1
    assert home("down") == "no broker started by `claudemesh up` is running\n"

    assert home("up", "--port", port).splitlines()[1] == "mesh    local  already joined"
    assert home.json("state", "get", "kept")["value"] == 1
    assert home("leave", "local").startswith("left local; meshes still joined: 0; ")
    assert home("up", "--port", port).splitlines()[1] == "mesh    local  joined as Ada"
    assert home("up", "second", "--port", port).splitlines()[1] == "mesh    second  joined as Ada"
    assert home.fails("up", "--port", str(free_port()))[0] == 2  # local is elsewhere
    assert home.fails("up", "third", "--port", str(free_port()))[0] == 2  # these data are in use


@pytest.mark.spec("CLI-10")
def test_two_ups_at_once_start_one_broker(home):
    port = str(free_port())
    both = [home.process("up", slug, "--port", port) for slug in ("one", "two")]
    outputs = [process.communicate(timeout=LIMIT) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("already running" in out for out, _ in outputs) == [False, True]
    assert {entry["slug"] for entry in home.json("list")} == {"one", "two"}
    assert len(mentioning(str(home.home / "broker"))) == 1


@pytest.mark.spec("CLI-10")
def test_up_says_when_something_else_has_the_port(home, monkeypatch):
    monkeypatch.setattr(claudemesh, "HEALTH_LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.1)
        port = other.getsockname()[1]
        assert home.fails("up", "--port", str(port)) == (
            1, f"port {port} is taken, and not by a claudemesh broker: choose another --port")
    assert not (home.home / "broker" / "broker.json").exists()


@pytest.mark.spec("CLI-10")
def test_up_repeats_what_a_broker_that_cannot_start_said(home):
    (home.home / "broker").mkdir(parents=True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # in use, yet nobody listens
        code, line = home.fails("up", "--port", str(other.getsockname()[1]))
    assert code == 1 and line.startswith("the broker did not start: ") and "is taken" in line


@pytest.mark.spec("CLI-12")
def test_down_never_ends_a_process_that_only_has_the_same_id(home):
    data = home.home / "broker"
    data.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        for process in ("0 0", None, 7):
            (data / "broker.json").write_text(json.dumps({"pid": stranger.pid, "url": "ws://x", "process": process}))
            assert home("down") == "no broker started by `claudemesh up` is running\n"
        for pid in (0, -1, 1, True, "x", None, 2**31):
            (data / "broker.json").write_text(json.dumps({"pid": pid, "process": claudemesh._process(stranger.pid)}))
            assert home("down") == "no broker started by `claudemesh up` is running\n"
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.spec("CLI-12")
def test_down_insists_when_the_broker_does_not_listen(home, monkeypatch):
    monkeypatch.setattr(claudemesh, "BROKER_STOP_S", 0.2)
    home("up", "--port", str(free_port()))
    pid = json.loads((home.home / "broker" / "broker.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert f"killed (process {pid})" in home("down")


# --- The demo --------------------------------------------------------------------------------------

SCENES = ["broker", "mesh", "sessions", "online", "direct", "direct", "group", "state", "crash", "restart", "recovery",
          "once", "audit"]


def demo(person: Person, tmp: Path) -> subprocess.Popen[str]:
    tmp.mkdir()
    return person.process("demo", env={"TMPDIR": str(tmp)})


@pytest.mark.spec("CLI-16", "CLI-17")
def test_the_demo_shows_everything_and_leaves_nothing(person, tmp_path):
    began = time.monotonic()
    process = demo(person("nobody"), tmp_path / "tmp")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, ""), out
    assert time.monotonic() - began < 10
    lines = out.splitlines()
    assert [line.split()[2] for line in lines if re.match(r" *\d+\.\d\d s  ", line)] == SCENES
    for expected in [
        '[message from peer "Ada" to you] Can you review the parser? It drops the last token.',
        'kind="direct" from_name="Ada" secured="session" provenance="verified_peer"',
        'kind="group" from_name="Ada" secured="sealed" provenance="verified_peer"',
        '[state] release = {"frozen":true} (set by Ada)',
    ]:
        assert f"                     {expected}" in lines
    assert re.fullmatch(r"ok: everything arrived, exactly once, across a killed broker; \d\.\d s in all", lines[-1])
    assert list((tmp_path / "tmp").iterdir()) == [] and mentioning(str(tmp_path / "tmp")) == []
    assert not person("nobody").home.exists()


@pytest.mark.spec("CLI-17")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("scene", ["broker", "crash"])
def test_an_interrupted_demo_leaves_nothing(person, tmp_path, number, scene):
    process = demo(person("nobody"), tmp_path / "tmp")
    until(lambda: f" {scene} " in process.stdout.readline(), scene)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (130, "")
    assert list((tmp_path / "tmp").iterdir()) == [] and mentioning(str(tmp_path / "tmp")) == []


@pytest.mark.spec("CLI-16", "CLI-17")
def test_a_demo_in_which_something_does_not_arrive_names_it(person, tmp_path, monkeypatch):
    real = claudemesh._program
    deaf = [sys.executable, "-c", "import sys; print('out of order', file=sys.stderr, flush=True); sys.stdin.read()"]
    monkeypatch.setattr(claudemesh, "_program", lambda *words: deaf if words == ("mcp",) else real(*words))
    monkeypatch.setattr(claudemesh, "DEMO_LIMIT_S", 1.0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code, out, err = person("nobody").run("demo")
    assert (code, err) == (1, "")
    why = r"^failed: (Ada|Bob)'s session answers server/discover: nothing within 1 s; .*out of order"
    assert re.search(why, out, re.MULTILINE)
    assert list(tmp_path.glob("claudemesh-demo-*")) == [] and mentioning(str(tmp_path / "claudemesh-demo-")) == []
