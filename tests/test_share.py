"""Files as a program, a model and a person meet them: shared, encrypted, attached, fetched."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import claudemesh
import wire
from claudemesh import MeshClient, MeshError, fetch_file, grant_file, share_file
from test_mcp import Fixture, FakeClient
from test_peer_files import member_of
from world import story

spec = pytest.mark.spec
claudemesh._load()


@pytest.fixture
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the test's own, which is not the broker's."""
    return tmp_path_factory.mktemp("desk")


def client_of(world: Any, name: str, **options: Any) -> MeshClient:
    return MeshClient(member_of(world, name), name=name, **options)


def file_of(desk: Path, content: bytes = b"the plan", name: str = "plan.txt") -> Path:
    path = desk / "mine" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@spec("SHARE-1", "SHARE-3")
@story
async def test_a_plain_file_comes_out_as_it_went_in(world, desk):
    async with client_of(world, "ana") as ana, client_of(world, "bo", quiet=True) as bo:
        content, steps = os.urandom(3_000_000), []
        shared = await share_file(ana, file_of(desk, content, "naïve plan.bin"), tags=["ü", "log"],
                                  progress=lambda done, total: steps.append((done, total)))
        assert shared == {"fileId": shared["fileId"], "name": "naïve plan.bin", "size": 3_000_000, "encrypted": False}
        assert steps[-1] == (3_000_000, 3_000_000) and len(steps) > 20
        (entry,) = (await bo.request("list_files"))["files"]
        assert (entry["name"], entry["tags"], entry["uploadedBy"]) == ("naïve plan.bin", ["ü", "log"], "ana")
        got = await fetch_file(bo, shared["fileId"], desk / "new" / "folder" / "x.bin")
        assert got == {"fileId": shared["fileId"], "name": "naïve plan.bin", "path": str(desk / "new/folder/x.bin"),
                       "size": 3_000_000, "encrypted": False}
        assert (desk / "new/folder/x.bin").read_bytes() == content
        assert left(desk / "new/folder") == ["x.bin"]


@spec("SHARE-2", "SHARE-3", "SHARE-5")
@story
async def test_an_encrypted_file_opens_for_its_reader_in_later_sessions_and_for_its_owner(world, desk):
    async with client_of(world, "ana") as ana, client_of(world, "bo") as bo, client_of(world, "cy") as cy:
        peer = await ana.resolve("bo")
        id = (await share_file(ana, file_of(desk), to=peer["pubkey"]))["fileId"]
        assert b"the plan" not in (world.data / "den" / "files" / id).read_bytes()
        assert (world.data / "den" / "files" / id).stat().st_size == 8 + 40
        for reader, name in ((bo, "bo"), (ana, "ana")):
            assert (await fetch_file(reader, id, desk / name))["encrypted"] is True
            assert (desk / name).read_text() == "the plan"
        with pytest.raises(MeshError) as refused:
            await fetch_file(cy, id, desk / "cy")
        assert refused.value.code == "forbidden" and not (desk / "cy").exists()
        await cy.resolve("bo")
        with pytest.raises(MeshError) as refused:
            await grant_file(bo, id, cy.key)
        assert refused.value.code == "forbidden"
        await ana.resolve("cy")
        await grant_file(ana, id, cy.key)
        await fetch_file(cy, id, desk / "cy")
    async with client_of(world, "bo") as bo, client_of(world, "cy", quiet=True) as cy, client_of(world, "ana") as ana:
        for reader, name in ((bo, "bo"), (cy, "cy"), (ana, "ana")):  # new sessions, new session keys
            await fetch_file(reader, id, desk / f"{name} later")
            assert (desk / f"{name} later").read_text() == "the plan"
        with pytest.raises(MeshError, match="not encrypted"):
            await grant_file(ana, (await share_file(ana, file_of(desk)))["fileId"], bo.key)


@spec("SHARE-2")
@story
async def test_a_file_for_a_group_opens_for_each_of_its_members_also_the_absent(world, desk):
    world.member("away", groups=({"name": "dev"},))
    async with client_of(world, "ana") as ana, client_of(world, "bo", groups=["dev/web"]) as bo, client_of(world, "cy") as cy:
        id = (await share_file(ana, file_of(desk), to="@dev"))["fileId"]
        everyone = (await share_file(ana, file_of(desk), to="*"))["fileId"]
        await fetch_file(bo, id, desk / "bo")
        async with client_of(world, "away") as away:
            await fetch_file(away, id, desk / "away")
            await fetch_file(away, everyone, desk / "away too")
        with pytest.raises(MeshError) as refused:
            await fetch_file(cy, id, desk / "cy")
        assert refused.value.code == "forbidden"
        await fetch_file(cy, everyone, desk / "cy")
    assert (desk / "bo").read_text() == (desk / "away too").read_text() == "the plan"


@spec("SHARE-4")
@story
async def test_nothing_is_overwritten_or_written_where_a_name_leads(world, desk, monkeypatch):
    async with client_of(world, "ana") as ana:
        id = (await share_file(ana, file_of(desk), name=".bashrc"))["fileId"]
        folder = desk / "here"
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert (await fetch_file(ana, id))["path"] == "bashrc"  # what nobody named is not hidden
        (folder / "mine.txt").write_text("mine")
        (folder / "dangling").symlink_to("nowhere")
        for name in ("mine.txt", "dangling", "bashrc", "."):
            with pytest.raises(MeshError) as refused:
                await fetch_file(ana, id, name)
            assert refused.value.code == "exists"
        assert (folder / "mine.txt").read_text() == "mine" and left(folder) == ["bashrc", "dangling", "mine.txt"]
        await fetch_file(ana, id, "mine.txt", overwrite=True)
        assert (folder / "mine.txt").read_text() == "the plan"
        world.mesh.store._write("UPDATE file SET name = '../evil'")
        world.mesh.store.commit()
        with pytest.raises(MeshError, match="has a separator"):
            await fetch_file(ana, id, ".")
        with pytest.raises(MeshError) as refused:
            await fetch_file(ana, id, folder / "mine.txt" / "x")
        assert refused.value.code == "not_saved"
        assert left(folder) == ["bashrc", "dangling", "mine.txt"] and not (desk / "evil").exists()


@spec("SHARE-3", "SHARE-4")
@story
async def test_what_arrives_damaged_is_not_kept(world, desk, monkeypatch):
    async with client_of(world, "ana") as ana:
        plain = (await share_file(ana, file_of(desk)))["fileId"]
        sealed = (await share_file(ana, file_of(desk), to=ana.member_key))["fileId"]
        for id in (plain, sealed):
            blob = world.data / "den" / "files" / id
            blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
        for id, digest, code in ((plain, None, "checksum_mismatch"), (sealed, None, "checksum_mismatch"), (
                sealed, hashlib.sha256(blob.read_bytes()).hexdigest(), "decrypt_failed")):
            if digest:  # a broker that lies about the digest too
                world.mesh.store._write("UPDATE file SET sha256 = ?", (digest,))
                world.mesh.store.commit()
            with pytest.raises(MeshError) as refused:
                await fetch_file(ana, id, desk / "x")
            assert refused.value.code == code
        blob.write_bytes(b"short")
        with pytest.raises(MeshError) as refused:
            await fetch_file(ana, sealed, desk / "x")
        assert refused.value.code in ("truncated", "offline")

        def full(part, destination, overwrite):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(claudemesh, "_settle", full)
        good = (await share_file(ana, file_of(desk)))["fileId"]
        with pytest.raises(MeshError, match="No space left on device"):
            await fetch_file(ana, good, desk / "x")
    assert "x" not in left(desk) and not [name for name in left(desk) if name.endswith(".part")]


@spec("SHARE-1")
@story
async def test_what_cannot_be_shared_is_refused_in_a_sentence(world, desk):
    os.mkfifo(desk / "pipe")
    async with client_of(world, "ana") as ana:
        for path, name, reason in [
                (desk / "missing", None, "is no file"), (desk, None, "is no file"), (desk / "pipe", None, "is no file"),
                (file_of(desk, b"", "empty"), None, "is empty"), (file_of(desk), "a/b", "has a separator"),
                (file_of(desk), "aux", "is reserved"), (file_of(desk), "x\n", "cannot be shown")]:
            with pytest.raises(wire.UsageError, match=reason):
                await share_file(ana, path, name=name)
        with open(desk / "large", "wb") as large:
            large.truncate(52_428_801)
        with pytest.raises(MeshError) as refused:
            await share_file(ana, desk / "large")
        assert (refused.value.code, refused.value.message) == (
            "too_large", "the broker refused: a file may have at most 52428800 bytes (HTTP 413)")
        with pytest.raises(MeshError, match="52428760 bytes"):
            await share_file(ana, desk / "large", to="*")
        with pytest.raises(wire.UsageError, match="a name must be resolved first"):
            await share_file(ana, file_of(desk), to="bo")


# --- The tools --------------------------------------------------------------------------------------

class Told:
    """A session whose tools are called, on a mesh of its own."""

    def __init__(self, world: Any, name: str, home: Path, shared: claudemesh.SharedDirectories | None = None) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        (home / "config.json").write_text(json.dumps({"version": 1, "displayName": name, "meshes": [member_of(world, name)]}))
        os.chmod(home / "config.json", 0o600)
        os.environ["CLAUDEMESH_CONFIG_DIR"] = str(home)
        identity = claudemesh.Identity(claudemesh.load_config(home), {"CLAUDE_PROJECT_DIR": str(home)}, shared=shared)
        self.session = claudemesh.Session(lambda method, params: True, identity)

    async def call(self, tool: str, **args: Any) -> str:
        os.environ["CLAUDEMESH_CONFIG_DIR"] = str(self.home)
        result = await self.session.call(tool, args)
        text = result["content"][0]["text"]
        return f"ERROR {text}" if result.get("isError") else text


@contextlib.asynccontextmanager
async def told(world: Any, desk: Path, monkeypatch: pytest.MonkeyPatch, *names: str, share: str = "") -> Any:
    monkeypatch.setenv("CLAUDEMESH_CONFIG_DIR", str(desk))
    sessions = []
    for name in names:
        (desk / name).mkdir()
        shared = claudemesh.SharedDirectories([desk / name]) if name == share else None
        sessions.append(Told(world, name, desk / f"{name}-home", shared))
    try:
        for session in sessions:
            await session.call("list_peers")
        yield sessions
    finally:
        for session in sessions:
            await session.session.leave()


@spec("MCP-70", "SHARE-5")
@story
async def test_the_file_tools_say_what_they_did(world, desk, monkeypatch):
    async with told(world, desk, monkeypatch, "ann", "bob") as (ann, bob):
        (ann.home / "plan.txt").write_text("the plan")
        text = await ann.call("share_file", path="plan.txt", tags=["a"])
        id = text.partition("id ")[2][:32]
        assert text == f"Shared plan.txt on den: id {id}, 8 bytes, not encrypted: every peer and the broker can read it."
        listing = await bob.call("list_files", query="PLAN", **{"from": "ann"})
        assert listing.startswith(f"- **plan.txt** id {id}, 8 bytes, by ann at 20")
        assert listing.endswith(", tags: a, encrypted: no, kept: yes")
        (bob.home / "got").mkdir()
        assert await bob.call("get_file", id=id, save_to="got") == f"plan.txt → {bob.home}/got/plan.txt, 8 bytes."
        assert (await bob.call("get_file", id=id, save_to="got")).startswith("ERROR ") and "(exists)" in await bob.call(
            "get_file", id=id, save_to="got")
        assert (await bob.call("get_file", id=id, save_to="got", overwrite=True)).endswith("8 bytes.")
        assert (await ann.call("file_status", id=id)).startswith("- bob at 20")
        assert (await bob.call("delete_file", id=id)).startswith("ERROR ")
        assert await ann.call("delete_file", id=id) == f'Deleted "{id}".'
        assert await bob.call("list_files") == "There is no such file."
        sealed = (await ann.call("share_file", path="plan.txt", to="ann-nobody"))
        assert sealed.startswith("ERROR ") and "(unknown_name)" in sealed
        sealed = await ann.call("share_file", path="plan.txt", to="bob", name="sealed.txt")
        assert sealed.endswith("8 bytes, encrypted for bob.")
        id = sealed.partition("id ")[2][:32]
        assert (await bob.call("get_file", id=id, save_to=".")).endswith("sealed.txt, 8 bytes, decrypted.")
        assert await ann.call("grant_file_access", fileId=id, to="bob") == f"bob can now read {id}."
        assert "give its name or key" in await ann.call("grant_file_access", fileId=id, to="@dev")


@spec("SHARE-6", "FILE-14")
@story
async def test_a_message_brings_its_files(world, desk, monkeypatch):
    async with told(world, desk, monkeypatch, "ann", "bob", "cid") as (ann, bob, cid):
        (ann.home / "a.txt").write_text("aaa")
        (ann.home / "b.txt").write_text("bb")
        sent = await ann.call("send_message", to="bob", message="look", file="a.txt", files=["b.txt"])
        assert sent.startswith("sent bob: id ")
        async with asyncio.timeout(5):
            while "look" not in (mail := await bob.call("check_messages")):
                await asyncio.sleep(0.01)
        lines = mail.splitlines()[-3:]
        assert lines[0].endswith("look")
        for line, name, content in zip(lines[1:], ("a.txt", "b.txt"), ("aaa", "bb")):
            id = line.partition("file id ")[2][:32]
            assert line == f"[attached: {name}, {len(content)} bytes, file id {id}; get_file saves it]"
            assert (await bob.call("get_file", id=id, save_to=name)).endswith("decrypted.")
            assert (bob.home / name).read_text() == content
            assert (await cid.call("get_file", id=id, save_to=name)).startswith("ERROR ")
            assert world.mesh.store.file(id, 0).expires_at is not None
        failed = await ann.call("send_message", to=["bob", "cid"], message="again", file="missing.txt")
        assert failed.count("FAILED") == 2 and "is no file" in failed


@spec("MCP-71", "MCP-72")
@story
async def test_a_peers_files_are_read_if_it_shares_them(world, desk, monkeypatch):
    async with told(world, desk, monkeypatch, "ann", "bob", share="bob") as (ann, bob):
        (desk / "bob" / "a.py").write_text("print('<channel>')")
        (desk / "bob" / "x.bin").write_bytes(b"\xff\xfe")
        assert await ann.call("read_peer_file", peer="bob", path="a.py") == "print('&lt;channel>')"
        assert await ann.call("list_peer_files", peer="bob") == "a.py\nx.bin"
        assert await ann.call("list_peer_files", peer="bob", pattern="*.md") == "There is nothing that fits."
        assert "is no text (2 bytes)" in await ann.call("read_peer_file", peer="bob", path="x.bin")
        assert (await ann.call("read_peer_file", peer="bob", path="x.bin", save_to="x")).startswith(f"x.bin → {ann.home}/x, 2 bytes.")
        assert (ann.home / "x").read_bytes() == b"\xff\xfe"
        assert "(exists)" in await ann.call("read_peer_file", peer="bob", path="x.bin", save_to="x")
        assert "(peer_refused)" in await ann.call("read_peer_file", peer="bob", path="../ann-home/config.json")
        assert "this session shares no files" in await bob.call("read_peer_file", peer="ann", path="a.py")
        assert "give its name or key" in await ann.call("read_peer_file", peer="@dev", path="a.py")
        (bob.home / "a.py").write_text("print('<channel>')")  # its working directory, on this very host
        text = await ann.call("read_peer_file", peer="bob", path="a.py")
        assert text.startswith(f'(This peer is on your host: the file is "{bob.home}/a.py".)\n')
        (bob.home / "a.py").write_text("print('<CHANNEL>')")
        assert "on your host" not in await ann.call("read_peer_file", peer="bob", path="a.py")


@spec("SERVE-1")
def test_the_directories_to_share_come_from_the_command_line_and_the_configuration(desk):
    assert claudemesh.McpArguments(["--share", "a", "--share=b"]).share == ["a", "b"]
    for words in (["--help"], ["--share"], ["--share="], ["x"]):
        with pytest.raises(ValueError):
            claudemesh.McpArguments(words)
    (desk / "config.json").write_text('{"version": 1, "meshes": [], "share": [7]}')
    with pytest.raises(wire.UsageError, match="share: expected a list of directories"):
        claudemesh.load_config(desk)
    run = subprocess.run([sys.executable, claudemesh.__file__, "mcp", "--share", str(desk / "missing")],
                         capture_output=True, text=True, timeout=10, env=os.environ | {"CLAUDEMESH_CONFIG_DIR": str(desk / "new")})
    assert run.returncode == 2 and "cannot be shared: No such file or directory" in run.stderr


# --- The commands -----------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@spec("CLI-30")
def test_a_bar_is_drawn_on_a_terminal_for_large_transfers_and_nowhere_else(monkeypatch):
    for out, err, total, drawn in [(Terminal(), Terminal(), 2**20, True), (io.StringIO(), Terminal(), 2**20, False),
                                   (Terminal(), io.StringIO(), 2**20, False), (Terminal(), Terminal(), 2**20 - 1, False)]:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with claudemesh._Bar("plan\x1b[2J.txt") as bar:
            for done in range(0, total + 1, total // 64):
                bar(done, total)
        assert (err.getvalue() != "") is drawn and out.getvalue() == ""
        if drawn:
            assert "\rplan\\x1b[2J.txt  [############             ]  50% of 1.0 MiB" in err.getvalue()
            assert err.getvalue().endswith("\r\x1b[K")


@spec("CLI-31", "SHARE-6")
@story
async def test_share_get_and_files_on_the_command_line(world, desk):
    homes = {name: desk / name for name in ("ann", "bob")}
    for name, home in homes.items():
        home.mkdir()
        (home / "config.json").write_text(json.dumps({"version": 1, "displayName": name, "meshes": [member_of(world, name)]}))
        os.chmod(home / "config.json", 0o600)

    async def run(name: str, *words: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, claudemesh.__file__, *words, cwd=homes[name], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"CLAUDEMESH_CONFIG_DIR": str(homes[name])})
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    (homes["ann"] / "plan.txt").write_text("the plan")
    code, out, err = await run("ann", "share", "plan.txt", "--tag", "a", "--ephemeral")
    assert (code, err) == (0, "")
    head, get = out.splitlines()
    assert head == "shared plan.txt on den: 8 bytes; not encrypted: every member and the broker can read it"
    assert get.startswith("claudemesh get ")
    code, out, err = await run("ann", "share", "plan.txt", "--to", "bob", "--name", "sealed.txt", "--json")
    assert (code, err) == (0, "")
    sealed = json.loads(out)
    assert sealed == {"fileId": sealed["fileId"], "name": "sealed.txt", "size": 8, "encrypted": True, "mesh": "den", "to": "bob"}
    code, out, err = await run("bob", "files")
    assert (code, err) == (0, "")
    assert [line.split()[1:4] for line in out.splitlines()[1:]] == [["sealed.txt", "48", "ann"], ["plan.txt", "8", "ann"]]
    assert "encrypted" in out.splitlines()[1] and out.splitlines()[2].endswith("a")
    assert [file["name"] for file in json.loads((await run("bob", "files", "sealed", "--from", "ann", "--json"))[1])] == ["sealed.txt"]
    assert await run("bob", "get", sealed["fileId"]) == (0, "saved sealed.txt: 8 bytes, decrypted\n", "")
    assert await run("bob", "get", sealed["fileId"]) == (
        1, "", "claudemesh: sealed.txt is there already, and was not overwritten\n")
    assert (await run("bob", "get", sealed["fileId"], "sealed.txt", "--force"))[0] == 0
    assert (homes["bob"] / "sealed.txt").read_text() == "the plan"
    assert (await run("bob", "get", "nothing"))[0] == 1
    assert await run("ann", "share", "missing") == (2, "", "claudemesh: missing is no file\n")
    assert (await run("ann", "send", "bob", "look", "--file", "plan.txt"))[0] == 0
    text = json.loads((await run("bob", "inbox", "--json"))[1])["text"]
    assert text.startswith("look\n[attached: plan.txt, 8 bytes, file id ")


@spec("MCP-21")
def test_of_several_meshes_one_must_be_named_to_share_in():
    fixture = Fixture(FakeClient("alpha"), FakeClient("beta"))
    assert "name one with `mesh`" in fixture.fail("share_file", path="x")
