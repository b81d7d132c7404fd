"""At home in Claude Code: its files before and after, the launch with a stand-in for `claude`, doctor, templates.

Every test has a home of its own. The stand-in notes what it was started with, starts the MCP server it is
given as Claude Code would, and waits to be told what to do next.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import claudemesh
import wire
from claude_world import CLAUDE, Terminal
from test_cli import LIMIT, PROGRAM, SCRUBBED, Person, broker, person, until  # noqa: F401 (fixtures)

claudemesh._load()

OURS = ["claudemesh"]


class Home:
    """A person's home directory, with `claude` on PATH if asked for."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.bin, self.patch = path, path / "bin", monkeypatch
        self.bin.mkdir(parents=True)
        monkeypatch.setenv("HOME", str(path))
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        for name in ("CLAUDE_CONFIG_DIR", "CLAUDEMESH_CONFIG_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(claudemesh, "own_command", lambda scope="user": OURS)
        monkeypatch.chdir(path)
        self.servers, self.settings = path / ".claude.json", path / ".claude" / "settings.json"

    def write(self, servers: str | None = None, settings: str | None = None) -> None:
        self.settings.parent.mkdir(exist_ok=True)
        for file, text in ((self.servers, servers), (self.settings, settings)):
            if text is not None:
                file.write_text(text)

    def files(self) -> dict[str, str]:
        """Every file below the home and its text."""
        return {str(file.relative_to(self.path)): file.read_text() for file in self.path.rglob("*") if file.is_file()}

    def backups(self) -> list[str]:
        return sorted(file.read_text() for file in (self.path / ".claude" / "backups").glob("*"))

    def stand_in(self, script: str) -> Path:
        """A `claude` that writes down how it was started, then does what the script says."""
        record = self.path / "started.json"
        program = self.bin / "claude"
        program.write_text(f"""#!{sys.executable}
import json, os, signal, subprocess, sys
if sys.argv[1:] == ["--version"]:
    print("9.9.9 (stand-in)")
    sys.exit()
private = os.environ["CLAUDEMESH_CONFIG_DIR"]
def note(**more):
    with open({str(record)!r} + ".new", "w") as file:
        json.dump(dict(argv=sys.argv[1:], env=dict(os.environ), pid=os.getpid(),
                       config=json.load(open(private + "/config.json")), **more), file)
    os.rename({str(record)!r} + ".new", {str(record)!r})
{script}
""")
        program.chmod(0o755)
        return record


@pytest.fixture(scope="module")
def members(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The configurations of Ada, who owns a mesh, and of Bob: each test has copies, since joining has a rate limit."""
    folder = tmp_path_factory.mktemp("members")
    slug = f"home-{os.getpid()}"
    claudemesh.create_mesh(slug, slug, broker, display_name="Ada", dir=folder / "ada")
    claudemesh.join_mesh(claudemesh.make_invite(slug, dir=folder / "ada"), "Bob", dir=folder / "bob")
    claudemesh.update_config(lambda config: config.update(displayName="Bob"), folder / "bob")
    return folder


@pytest.fixture
def ada(members: Path, person: Callable[[str], Person], tmp_path: Path) -> Person:  # noqa: F811
    shutil.copytree(members / "ada", tmp_path / "ada")
    return person("ada")


@pytest.fixture
def bob(members: Path, person: Callable[[str], Person], tmp_path: Path) -> Person:  # noqa: F811
    shutil.copytree(members / "bob", tmp_path / "bob")
    return person("bob")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path / "home", monkeypatch)


@pytest.fixture
def user(home: Home, person: Callable[[str], Person], monkeypatch: pytest.MonkeyPatch) -> Person:
    """Whoever sits at this home; the configuration is in its usual place."""
    someone = person("home/.claudemesh")
    return someone


SERVERS = """\
{
    "numStartups": 7,
    "mcpServers": {
        "other": {
            "command": "other",
            "args": []
        }
    },
    "projects": {
        "/work": {
            "hasTrustDialogAccepted": true
        }
    },
    "name": "zoë"
}
"""
SETTINGS = """\
{
  "permissions": {
    "allow": ["Bash(ls:*)"],
    "deny": ["Read(.env)"]
  },
  "hooks": {
    "Stop": [
      {"hooks": [{"type": "command", "command": "say done"}, {"type": "command", "command": "claudemesh hook idle"}]}
    ],
    "PreToolUse": []
  },
  "model": "opus"
}
"""
ENTRY = {"type": "stdio", "command": "claudemesh", "args": ["mcp"]}
WAKE = {"type": "command", "command": "claudemesh hook Wake", "asyncRewake": True, "timeout": 86400}


def one(word: str) -> dict[str, object]:
    return {"hooks": [{"type": "command", "command": f"claudemesh hook {word}", "timeout": 10}]}


# --- install, uninstall ----------------------------------------------------------------------------


@pytest.mark.spec("HOME-1", "HOME-3")
def test_install_adds_its_own_entries_and_leaves_everything_else_as_it_was(home, user):
    home.write(SERVERS, SETTINGS)
    out = user("install")
    assert home.servers.read_text() == SERVERS.replace("""
            "args": []
        }
    },""", """
            "args": []
        },
        "claudemesh": {
            "type": "stdio",
            "command": "claudemesh",
            "args": [
                "mcp"
            ]
        }
    },""")
    assert json.loads(home.settings.read_text()) == {
        "permissions": {"allow": ["Bash(ls:*)", "mcp__claudemesh"], "deny": ["Read(.env)"]},
        "hooks": {
            "Stop": [{"hooks": [{"type": "command", "command": "say done"}]}, one("Stop"), {"hooks": [WAKE]}],
            "PreToolUse": [], "SessionStart": [{"hooks": [WAKE]}], "UserPromptSubmit": [one("UserPromptSubmit")],
            "PostToolUse": [one("PostToolUse")], "SessionEnd": [one("SessionEnd")]},
        "model": "opus"}
    assert home.backups() == sorted([SERVERS, SETTINGS])
    assert out.splitlines()[-1].startswith(f"next: {claudemesh._command()} up ")


@pytest.mark.spec("HOME-1", "HOME-3")
def test_installing_again_changes_nothing_and_copies_nothing(home, user):
    home.write(SERVERS, SETTINGS)
    user("install")
    before = home.files()
    assert user("install").startswith("as it was  ")
    assert home.files() == before


@pytest.mark.spec("HOME-1")
def test_install_from_nothing_makes_files_that_only_the_owner_can_read(home, user):
    user("install", "--no-hooks")
    assert json.loads(home.servers.read_text()) == {"mcpServers": {"claudemesh": ENTRY}}
    assert json.loads(home.settings.read_text()) == {"permissions": {"allow": ["mcp__claudemesh"]}}
    assert stat.S_IMODE(home.servers.stat().st_mode) == 0o600
    guide = (user.home / "CLAUDEMESH.md").read_text()
    assert "send_message" in guide and len(guide) < 4 * 2000  # a token has about four characters


@pytest.mark.spec("HOME-4")
def test_uninstall_takes_back_what_install_did_and_nothing_else(home, user):
    plain = json.dumps({"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "say done"}]}]}}, indent=2)
    home.write(SERVERS, plain)
    user("install")
    user("uninstall")
    assert (home.servers.read_text(), home.settings.read_text()) == (SERVERS, plain)
    assert not (user.home / "CLAUDEMESH.md").exists()
    assert user("uninstall").count("as it was") == 2


@pytest.mark.spec("HOME-4")
def test_uninstall_where_nothing_is_installed_makes_no_file(home, user):
    user("uninstall")
    assert not home.servers.exists() and not home.settings.exists()


@pytest.mark.spec("HOME-2")
@pytest.mark.parametrize(("servers", "settings", "message"), [
    ('{"mcpServers": {', None, ".claude.json: line 1 column 17"),
    ("[]", None, ".claude.json: expected an object"),
    ('{"mcpServers": []}', None, ".claude.json: mcpServers: expected an object"),
    ('{"a": 1, "a": 2}', None, '.claude.json: the name "a" stands twice in one object'),
    ("{}", '{"permissions": {"allow": "all"}}', "settings.json: permissions.allow: expected a list"),
    ("{}", '{"hooks": {"Stop": {}}}', "settings.json: hooks.Stop: expected a list"),
    ("{}", "{,}", "settings.json: line 1 column 2"),
    ("\udcff", None, ".claude.json"),
])
def test_a_file_that_cannot_be_understood_is_refused_and_no_file_is_changed(home, user, servers, settings, message):
    home.write()
    for file, text in ((home.servers, servers), (home.settings, settings)):
        if text is not None:
            file.write_text(text, errors="surrogateescape")
    before = {file: file.read_bytes() for file in home.path.rglob("*") if file.is_file()}
    code, line = user.fails("install")
    assert (code, message in line) == (2, True), line
    assert {file: file.read_bytes() for file in home.path.rglob("*") if file.is_file()} == before


@pytest.mark.spec("HOME-2")
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_home_that_cannot_be_written_is_one_line(home, user):
    home.path.chmod(0o500)
    try:
        assert user.fails("install")[0] == 2
    finally:
        home.path.chmod(0o700)


@pytest.mark.spec("HOME-1")
def test_a_dry_run_prints_the_difference_and_writes_nothing(home, user):
    home.write(SERVERS)
    before = home.files()
    out = user("install", "--dry-run")
    assert '+        "claudemesh": {' in out and '+      "mcp__claudemesh"' in out
    assert home.files() == before
    user("install")
    assert user("install", "--dry-run") == "nothing would change\n"


@pytest.mark.spec("HOME-1", "HOME-3")
def test_a_project_has_files_of_its_own_and_a_link_stays_a_link(home, user, tmp_path):
    (tmp_path / "dotfiles.json").write_text("{}\n")
    home.settings.parent.mkdir()
    home.settings.symlink_to(tmp_path / "dotfiles.json")
    user("install")
    assert home.settings.is_symlink() and "mcp__claudemesh" in (tmp_path / "dotfiles.json").read_text()
    project = home.path / "project"
    project.mkdir()
    os.chdir(project)
    user("install", "--scope", "project")
    assert json.loads((project / ".mcp.json").read_text()) == {"mcpServers": {"claudemesh": ENTRY}}
    assert (project / ".claude" / "settings.json").exists()


@pytest.mark.spec("HOME-3")
def test_installs_at_the_same_time_lose_nothing(home, tmp_path):
    home.write('{"numStartups": 1}')
    env = {**os.environ, "CLAUDEMESH_CONFIG_DIR": str(tmp_path / "config")}
    runs = [subprocess.Popen([*PROGRAM, "install"], env=env, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [run.wait(LIMIT) for run in runs] == [0] * 4
    assert json.loads(home.servers.read_text()).keys() == {"numStartups", "mcpServers"}
    assert home.backups() == ['{"numStartups": 1}']


# --- the plugin ------------------------------------------------------------------------------------


@pytest.mark.spec("HOME-5")
def test_the_plugin_has_the_server_the_hooks_the_channel_and_commands(home, user):
    user("plugin", "mine")
    read = lambda name: json.loads((home.path / "mine" / name).read_text())  # noqa: E731
    assert read(".mcp.json") == {"mcpServers": {"claudemesh": ENTRY}}
    assert read(".claude-plugin/plugin.json")["channels"] == [{"server": "claudemesh"}]
    assert read("hooks/hooks.json")["hooks"]["Stop"] == [one("Stop"), {"hooks": [WAKE]}]
    assert {file.stem for file in (home.path / "mine" / "commands").iterdir()} == {"inbox", "peers", "send", "status"}
    user("plugin", "mine")  # again
    (home.path / "full").mkdir()
    (home.path / "full" / "thesis.txt").touch()
    assert user.fails("plugin", "full") == (2, f"{home.path / 'full'} exists and is no plugin folder of ours")


@pytest.mark.spec("HOME-5")
@pytest.mark.skipif(CLAUDE is None, reason="needs claude on PATH or CLAUDE_BIN")
def test_claude_itself_accepts_and_installs_the_plugin(home, user):
    user("plugin", "mine")
    for words in (["plugin", "validate", "mine"], ["plugin", "marketplace", "add", "./mine"],
                  ["plugin", "install", "claudemesh@claudemesh"]):
        done = subprocess.run([CLAUDE, *words], capture_output=True, text=True, timeout=60, cwd=home.path,
                              env={**SCRUBBED, "HOME": str(home.path), "DISABLE_AUTOUPDATER": "1"})
        assert done.returncode == 0, done.stdout + done.stderr


# --- launch ----------------------------------------------------------------------------------------

SERVE = """
config = json.load(open(os.path.expanduser("~/.claude.json")))["mcpServers"] if "--mcp-config" not in sys.argv else \\
    json.load(open(sys.argv[sys.argv.index("--mcp-config") + 1]))["mcpServers"]
server = subprocess.Popen([config["claudemesh"]["command"], *config["claudemesh"]["args"]], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**os.environ, "CLAUDE_PROJECT_DIR": os.getcwd()})
def ask(id, method, params):
    server.stdin.write(json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\\n")
    server.stdin.flush()
    while True:
        answer = json.loads(server.stdout.readline())
        if answer.get("id") == id:
            return answer["result"]
ask(1, "initialize", {"protocolVersion": "2025-11-25"})
peers = ask(2, "tools/call", {"name": "list_peers", "arguments": {}})["content"][0]["text"]
note(peers=peers, listed=ask(3, "tools/call", {"name": "check_messages", "arguments": {}})["content"][0]["text"])
server.stdin.close()
server.wait()
sys.exit(7)
"""


@pytest.fixture
def bob_at_home(home: Home, user: Person, members: Path, monkeypatch: pytest.MonkeyPatch) -> Person:
    """Bob, a member of Ada's mesh, at this home; his `claude` starts this checkout's program."""
    shutil.copytree(members / "bob", user.home)
    monkeypatch.setattr(claudemesh, "own_command", lambda scope="user": PROGRAM)
    return user


def started(record: Path) -> dict[str, object]:
    until(record.exists, "claude was started")
    return json.loads(record.read_text())


@pytest.mark.spec("LAUNCH-1", "LAUNCH-3", "LAUNCH-4", "LAUNCH-5")
def test_a_launched_session_is_a_peer_and_leaves_nothing_behind(home, bob_at_home, monkeypatch):
    record = home.stand_in(SERVE)
    monkeypatch.setenv("CLAUDE_CODE_SESSION_ID", "of-an-outer-session")
    slug = bob_at_home.membership()["slug"]
    code, out, err = bob_at_home.run("launch", "--name", "Scout", "--role", "tester", "--groups", "dev:lead, qa",
                                     "--message-mode", "inbox", "--system-prompt", "Be brief.", "--", "-p", "go",
                                     "--dangerously-load-development-channels", "server:x", "--model", "opus")
    assert (code, err) == (7, "")  # the exit status of claude
    seen = started(record)
    session = seen["env"]["CLAUDEMESH_SESSION_ID"]
    assert str(uuid.UUID(session)) == session
    private = Path(seen["env"]["CLAUDEMESH_CONFIG_DIR"])
    assert seen["argv"] == [
        "--dangerously-load-development-channels", "server:claudemesh", "--session-id", session,
        "--system-prompt", "Be brief.", "--mcp-config", str(private / "mcp.json"), "--settings",
        str(private / "settings.json"), "-p", "go", "--model", "opus"]
    assert {name: seen["env"].get(name) for name in (
        "CLAUDEMESH_DISPLAY_NAME", "CLAUDEMESH_ROLE", "MCP_TIMEOUT", "MAX_MCP_OUTPUT_TOKENS", "CLAUDE_CODE_SESSION_ID")} == {
        "CLAUDEMESH_DISPLAY_NAME": "Scout", "CLAUDEMESH_ROLE": "tester", "MCP_TIMEOUT": "30000",
        "MAX_MCP_OUTPUT_TOKENS": "50000", "CLAUDE_CODE_SESSION_ID": None}
    config = seen["config"]
    assert [mesh["slug"] for mesh in config["meshes"]] == [slug]
    assert (config["displayName"], config["role"], config["messageMode"]) == ("Scout", "tester", "inbox")
    assert config["groups"] == [{"name": "dev", "role": "lead"}, {"name": "qa"}]
    assert "**Scout** [idle, you, @dev:lead, @qa]" in seen["peers"]
    assert "mode    inbox: " in out and not private.exists()
    assert claudemesh.load_config(bob_at_home.home)["displayName"] == "Bob"


@pytest.mark.spec("LAUNCH-3", "LAUNCH-4")
def test_a_resumed_session_has_its_address_groups_and_unread_messages_again(home, bob_at_home, ada):
    record = home.stand_in(SERVE)
    bob_at_home.run("launch", "--quiet", "--name", "Scout", "--groups", "dev:lead")
    first = started(record)
    record.unlink()
    [key_file] = (bob_at_home.home / "sessions").rglob("*.json")
    key = json.loads(key_file.read_text())["pubkey"]
    assert key_file.stem == first["env"]["CLAUDEMESH_SESSION_ID"]
    ada("send", key, "for when you are back")
    bob_at_home.run("launch", "--quiet", "--name", "Scout", "--resume", key_file.stem)
    second = started(record)
    assert second["argv"][2:4] == ["--resume", key_file.stem] and "--session-id" not in second["argv"]
    assert f"key {key[:16]}" in second["peers"] and "@dev:lead" in second["peers"]
    assert "for when you are back" in second["listed"]


@pytest.mark.spec("LAUNCH-3")
def test_continue_finds_the_session_in_the_newest_transcript_of_this_very_folder(home, bob_at_home):
    record = home.stand_in("note(); sys.exit(0)")
    projects = home.path / ".claude" / "projects"
    here = "".join(c if c.isalnum() else "-" for c in str(home.path))
    sessions = [str(uuid.uuid4()) for _ in range(3)]
    for index, (folder, name) in enumerate(((here, sessions[0]), (here, sessions[1]), (here + "-else", sessions[2]))):
        (projects / folder).mkdir(parents=True, exist_ok=True)
        (projects / folder / f"{name}.jsonl").touch()
        os.utime(projects / folder / f"{name}.jsonl", (index, index))
    bob_at_home.run("launch", "--quiet", "--continue")
    seen = started(record)
    assert seen["argv"][2:3] == ["--continue"] and seen["env"]["CLAUDEMESH_SESSION_ID"] == sessions[1]


@pytest.mark.spec("LAUNCH-3")
def test_an_installed_server_is_not_given_again_and_yes_makes_it_autonomous(home, bob_at_home):
    record = home.stand_in("note(); sys.exit(0)")
    bob_at_home("install")
    bob_at_home.run("launch", "--quiet", "-y", "--", "--dangerously-skip-permissions")
    seen = started(record)
    session = seen["env"]["CLAUDEMESH_SESSION_ID"]
    assert seen["argv"] == ["--dangerously-load-development-channels", "server:claudemesh", "--session-id", session,
                            "--dangerously-skip-permissions"]


@pytest.mark.spec("LAUNCH-5")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_claude_and_nothing_is_left(home, bob_at_home, signum):
    record = home.stand_in("signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); note(); signal.pause()")
    launcher = bob_at_home.process("launch", "--quiet", env={"HOME": str(home.path), "PATH": os.environ["PATH"]})
    seen = started(record)
    launcher.send_signal(signum)
    assert launcher.wait(LIMIT) == (5 if signum == signal.SIGTERM else 128 + signal.SIGHUP)
    launcher.communicate()
    assert list((bob_at_home.home / "launch").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(seen["pid"], 0)


@pytest.mark.spec("LAUNCH-4")
def test_what_a_killed_launcher_left_is_removed_once_its_session_is_gone_too(home, bob_at_home):
    record = home.stand_in("note(); signal.pause()")
    launcher = bob_at_home.process("launch", "--quiet", env={"HOME": str(home.path), "PATH": os.environ["PATH"]},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = started(record)
    private = Path(seen["env"]["CLAUDEMESH_CONFIG_DIR"])
    until(lambda: len(json.loads((private / "launch.json").read_text())["processes"]) == 2, "the child is noted")
    os.utime(private, (0, 0))  # age says nothing
    launcher.kill()
    launcher.wait()
    home.stand_in("sys.exit(0)")
    assert bob_at_home.run("launch", "--quiet")[0] == 0
    assert private.exists()  # claude still runs
    os.kill(seen["pid"], signal.SIGKILL)
    until(lambda: claudemesh._process(seen["pid"]) is None, "claude is gone")
    assert bob_at_home.run("launch", "--quiet")[0] == 0
    assert not private.exists()


@pytest.mark.spec("LAUNCH-6")
def test_entries_of_services_whose_launcher_is_gone_are_removed_and_others_are_not(home, bob_at_home):
    home.stand_in("sys.exit(0)")
    gone = subprocess.Popen(["true"])
    gone.wait()
    entries = {f"mesh:db:{gone.pid}": {"command": "x", "_meshSession": {"pid": gone.pid}},
               f"mesh:db:{os.getpid()}": {"command": "x", "_meshSession": {"pid": os.getpid()}},
               "mesh:mine": {"command": "x"}, "other": {"command": "y"}}
    home.write(json.dumps({"mcpServers": entries}))
    code, out, err = bob_at_home.run("doctor")
    assert "1 entries of services" in out
    bob_at_home.run("launch", "--quiet")
    assert list(json.loads(home.servers.read_text())["mcpServers"]) == [f"mesh:db:{os.getpid()}", "mesh:mine", "other"]


@pytest.mark.spec("LAUNCH-1", "LAUNCH-2", "LAUNCH-7")
@pytest.mark.parametrize(("words", "message"), [
    (["--resume"], "expected one argument"),
    (["--resume", "-y"], "expected one argument"),
    (["--resume", "x", "--continue"], "--resume and --continue exclude each other"),
    (["--colour"], "unrecognized arguments: --colour"),
    (["surplus"], "unrecognized arguments: surplus"),
    (["--groups", "dev,qa,dev:lead"], "--groups: twice or not a group name: dev:lead"),
    (["--groups", ":lead"], "--groups: no name: :lead"),
    (["--message-mode", "loud"], "'loud'"),
    (["--name", " "], "--name is empty"),
    (["--mesh", "nowhere"], "not a member of 'nowhere'"),
    (["--name", "ada"], "is called ada already: choose another --name"),
])
def test_a_launch_that_makes_no_sense_is_one_line_and_starts_nothing(home, bob_at_home, ada, words, message):
    record = home.stand_in("note(); sys.exit(0)")
    before = home.files()
    with ada.online("Ada"):
        code, line = bob_at_home.fails("launch", *words)
    assert (code, message in line) == (2, True), line
    assert not record.exists() and home.files() == before


@pytest.mark.spec("LAUNCH-1", "LAUNCH-2")
def test_without_claude_or_with_several_meshes_and_no_terminal_nothing_happens(home, bob_at_home, ada, broker, monkeypatch):
    home.stand_in("sys.exit(0)")
    ada("create", "second-for-bob", "--broker", broker)
    bob_at_home("join", ada("invite", "--mesh", "second-for-bob").strip())
    before = home.files()
    assert "several meshes are joined, choose one with --mesh" in bob_at_home.fails("launch")[1]
    home.write('{"mcpServers": ')
    assert "line 1 column" in bob_at_home.fails("launch", "--mesh", "second-for-bob")[1]
    home.servers.unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    assert bob_at_home.fails("launch")[1].startswith("no `claude` on PATH")
    assert home.files() == before


@pytest.mark.spec("LAUNCH-7")
def test_a_name_nobody_asked_for_is_made_free(home, bob_at_home, ada):
    record = home.stand_in("note(); sys.exit(0)")
    with ada.online("Bob"):
        bob_at_home.run("launch", "--quiet")
    assert started(record)["env"]["CLAUDEMESH_DISPLAY_NAME"] == "Bob-2"


def launch_on_terminal(home: Home, person: Person, *words: str) -> Terminal:
    env = {**SCRUBBED, "HOME": str(home.path), "PATH": os.environ["PATH"], "CLAUDEMESH_CONFIG_DIR": str(person.home)}
    return Terminal([*PROGRAM, "launch", *words], env, home.path)


@pytest.mark.spec("LAUNCH-2")
def test_the_wizard_asks_only_for_what_is_missing(home, bob_at_home, ada, broker):
    record = home.stand_in("note(); sys.exit(0)")
    ada("create", f"also-{os.getpid()}", "--broker", broker)
    bob_at_home("join", ada("invite", "--mesh", f"also-{os.getpid()}").strip())
    with launch_on_terminal(home, bob_at_home, "--role", "tester") as terminal:
        for question, answer in (("Which mesh? [1]", "2"), ("Groups, as name:role,name?", "dev:lead"),
                                 ("Messages: push, inbox or off? [push]", ""), ("Start Claude Code? [yes]", "")):
            terminal.shows(question)
            terminal.type(answer)
        assert terminal.wait() == 0
        assert "Role on the mesh?" not in terminal.text
    config = started(record)["config"]
    assert config["meshes"][0]["slug"] == f"also-{os.getpid()}"
    assert (config["role"], config["groups"], config["messageMode"]) == ("tester", [{"name": "dev", "role": "lead"}], "push")


@pytest.mark.spec("LAUNCH-2", "LAUNCH-4")
def test_whoever_declines_has_no_private_configuration_left(home, bob_at_home):
    record = home.stand_in("note(); sys.exit(0)")
    with launch_on_terminal(home, bob_at_home, "--role", "r", "--groups", "g", "--inbox") as terminal:
        terminal.shows("Start Claude Code? [yes]")
        terminal.type("n")
        assert terminal.wait() == 0
    assert not record.exists() and list((bob_at_home.home / "launch").iterdir()) == []


# --- templates, seed -------------------------------------------------------------------------------


@pytest.mark.spec("HOME-9")
@pytest.mark.parametrize("name", claudemesh.TEMPLATES)
def test_a_template_seeds_the_shared_state_and_prints_how_to_launch(person, broker, name):
    someone, slug = person(name), f"of-{name}-{os.getpid()}"
    out = someone("create", slug, "--broker", broker, "--name", "Ada", "--template", name)
    template = claudemesh.TEMPLATES[name]
    assert {entry["key"]: entry["value"] for entry in someone.json("state", "list")} == template.state
    launch = next(line for line in out.splitlines() if "claudemesh launch" in line)
    assert f"--mesh {slug}" in launch
    assert [group for group in template.groups if f"--groups {group}:" in launch] == list(template.groups)[:1]
    assert name in someone("templates")


@pytest.mark.spec("HOME-9")
def test_an_unknown_template_creates_nothing(person, broker):
    someone = person("someone")
    code, line = someone.fails("create", "x", "--broker", broker, "--template", "chaos")
    assert code == 2 and line == ("no template 'chaos'; there are: dev-team, research, ops-incident, simulation, personal")
    assert not someone.home.exists()


@pytest.mark.spec("HOME-10")
def test_a_seeded_mesh_can_be_listed_but_not_connected_to_and_never_replaces_a_real_one(person, ada):
    someone = person("someone")
    for mesh_id in ("m1", "m2"):
        someone("seed-test-mesh", "ws://127.0.0.1:1/ws", mesh_id, "member", "a" * 64, "test")
    [entry] = claudemesh.load_config(someone.home)["meshes"]
    assert (entry["meshId"], entry["name"], entry["secretKey"]) == ("m2", "Test: test", "dev-only-stub")
    assert someone.fails("peers") == (2, "test was made by seed-test-mesh: it has no key to connect with")
    assert someone.fails("seed-test-mesh", "ws://x", "m", "member", "abc", "test")[1].startswith("pubkey: expected 64")
    assert someone.fails("seed-test-mesh", "ws://x", "m")[0] == 2
    slug = ada.membership()["slug"]
    assert ada.fails("seed-test-mesh", "ws://x", "m", "member", "a" * 64, slug)[0] == 2


# --- doctor, welcome, explain ----------------------------------------------------------------------


@pytest.mark.spec("HOME-6")
def test_doctor_finds_nothing_wrong_after_install_and_sends_itself_a_message(home, bob_at_home):
    home.stand_in("sys.exit(0)")
    assert bob_at_home.run("doctor")[0] == 1  # not installed
    bob_at_home("install")
    slug = bob_at_home.membership()["slug"]
    found = {row["what"]: row for row in bob_at_home.json("doctor")}
    assert {what: row["state"] for what, row in found.items()} == {
        "Python": "ok", "claude": "ok", "MCP entry": "ok", "permission": "ok", "hooks": "ok", "configuration": "ok",
        "key files": "ok", "left over": "ok", f"{slug}: broker": "ok", f"{slug}: clock": "ok",
        f"{slug}: loop-back": "ok", "session": "note"}
    assert found["claude"]["detail"].startswith("9.9.9 (stand-in) at ")


@pytest.mark.spec("HOME-6")
@pytest.mark.parametrize(("bend", "what", "detail", "fix"), [
    (lambda home, bob: (home.bin / "claude").unlink(), "claude", "not on PATH", "npm install"),
    (lambda home, bob: home.write("{"), "entries", ".claude.json: line 1 column 2", "mend or remove that file"),
    (lambda home, bob: home.write('{"mcpServers": {"claudemesh": {"command": "/gone"}}}'), "MCP entry",
     "/gone cannot be run", "claudemesh install"),
    (lambda home, bob: (bob.home / "config.json").chmod(0o644), "key files", "can be read by others", "chmod 600"),
    (lambda home, bob: bob_turns(bob, secretKey="0" * 128), "key files", "do not belong together", "join again"),
    (lambda home, bob: bob_turns(bob, brokerUrl="ws://127.0.0.1:1/ws"), None, "cannot be reached", "claudemesh status"),
    (lambda home, bob: (bob.home / "config.json").write_text("{"), "config", "line 1 column 2", "mend or remove that file"),
])
def test_doctor_names_what_is_wrong_and_how_to_mend_it(home, bob_at_home, monkeypatch, bend, what, detail, fix):
    monkeypatch.setenv("PATH", f"{home.bin}{os.pathsep}/usr/bin{os.pathsep}/bin")
    home.stand_in("sys.exit(0)")
    bob_at_home("install")
    what = what or f"{bob_at_home.membership()['slug']}: broker"
    bend(home, bob_at_home)
    code, out, err = bob_at_home.run("doctor", "--json")
    wrong = [row for row in json.loads(out) if row["state"] == "wrong" and row["what"] == what]
    assert code == 1 and any(detail in row["detail"] and fix in row["fix"] for row in wrong), out


def bob_turns(bob: Person, **fields: str) -> None:
    claudemesh.update_config(lambda config: config["meshes"][0].update(fields), bob.home)


@pytest.mark.spec("HOME-7")
def test_a_bare_call_names_the_next_step_and_no_other_command_prints_that(home, user, members):
    step = lambda: user().partition(f"next: {claudemesh._command()} ")[2].split("#")[0].strip()  # noqa: E731
    assert step() == "up"
    shutil.copytree(members / "bob", user.home, dirs_exist_ok=True)
    assert step() == "install"
    user("install")
    assert step() == "launch"
    assert "next" not in user("list") and "connects AI coding sessions" not in user("--help")
    home.write("{")
    assert step() == "doctor"


@pytest.mark.spec("HOME-8")
def test_explain_says_where_a_message_is_and_why(ada, bob):
    sent = lambda *words: ada.json("send", "Bob", *words)["messageId"]  # noqa: E731
    away = sent("hello")
    assert ada("explain", away) == "It waits at the broker because Bob is not connected.\n"
    bob("inbox")
    assert ada("explain", away).startswith("Bob's model or user saw it (2")
    with bob.online("Bob", auto_shown=False) as received:
        there = sent("again")
        received.get(timeout=LIMIT)
        until(lambda: "Bob's session has it" in ada("explain", there), "it was acknowledged")
        assert "no way to the model is known to be open there" in ada("explain", there)
    assert ada.fails("explain", "0" * 32)[0] == 1


@pytest.mark.spec("HOME-8")
@pytest.mark.parametrize(("row", "peer", "sentence"), [
    ({"state": "queued"}, {"status": "working"},
     "It waits at the broker because Bob is working, which admits priority now only."),
    ({"state": "queued"}, {"status": "idle", "reconnecting": True},
     "It waits at the broker because Bob's connection was lost a moment ago."),
    ({"state": "pushed"}, {"status": "idle"}, "It was written to Bob's connection, which has not confirmed it yet."),
    ({"state": "delivered", "at": None}, {"status": "idle", "reach": ["hooks"]},
     "Bob's session has it since -, but the session has not proven yet that its model saw it."),
    ({"state": "delivered", "at": None}, None, "Bob's session has it since -, but that session is not connected now."),
    ({"state": "expired", "at": None}, None, "It expired before Bob could receive it (-)."),
])
def test_each_state_of_a_message_has_its_sentence(row, peer, sentence):
    assert claudemesh.whereabouts({"name": "Bob", **row}, peer) == sentence


def test_the_clock_skew_is_the_brokers_and_not_the_way_there():
    assert claudemesh._seconds_of("2026-01-02T03:04:05.006Z") == 1_767_323_045.006
    assert wire.iso(1_767_323_045_006) == "2026-01-02T03:04:05.006Z"
