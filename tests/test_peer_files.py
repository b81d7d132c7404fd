"""Peers read each other's files: the relay in the broker, and what a session gives away, which is little."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import broker as hub
import claudemesh
import wire
from claudemesh import MeshError, SharedDirectories
from world import story

spec = pytest.mark.spec
claudemesh._load()


# --- The relay --------------------------------------------------------------------------------------

@spec("RELAY-1", "RELAY-2")
@story
async def test_a_question_goes_to_the_peer_and_its_answer_back(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    ana.say(type="peer_file_request", targetPubkey=bo.key, filePath="src/a.py", _reqId="mine")
    question = await bo.answer(lambda frame: frame["type"] == "peer_file_request_forward")
    assert (question["requesterPubkey"], question["filePath"]) == (ana.key, "src/a.py")
    assert question["_reqId"] != "mine"  # an id of the broker's, which only the asked peer has seen
    bo.say(type="peer_file_response", requesterPubkey="0" * 64, filePath="/etc/passwd", content="YQ==", _reqId=question["_reqId"])
    answer = await ana.answer(lambda frame: frame["type"] == "peer_file_response_forward")
    assert answer == {"type": "peer_file_response_forward", "filePath": "src/a.py", "content": "YQ==", "_reqId": "mine"}
    ana.say(type="peer_dir_request", targetPubkey=world.member("bo")[0].public, dirPath=".", pattern="*.py")
    question = await bo.answer(lambda frame: frame["type"] == "peer_dir_request_forward")
    assert question["pattern"] == "*.py"
    bo.say(type="peer_dir_response", requesterPubkey=ana.key, dirPath=".", entries=["a.py"], _reqId=question["_reqId"])
    answer = await ana.answer(lambda frame: frame["type"] == "peer_dir_response_forward")
    assert answer == {"type": "peer_dir_response_forward", "dirPath": ".", "entries": ["a.py"]}
    assert (await ana.request("peer_file_request", targetPubkey="0" * 64, filePath="a"))["code"] == "peer_not_found"
    assert world.mesh.relays == {}


@spec("RELAY-2")
@story
async def test_only_the_asked_peer_answers_once_and_with_what_was_asked(world):
    ana, bo, eve = await world.peer("ana"), await world.peer("bo"), await world.peer("eve")
    ana.say(type="peer_file_request", targetPubkey=bo.key, filePath="a", _reqId="mine")
    question = await bo.answer(lambda frame: frame["type"] == "peer_file_request_forward")
    forged = {"requesterPubkey": ana.key, "content": "ZXZpbA==", "filePath": "a"}
    for id in (question["_reqId"], "mine", "guess"):
        eve.say(type="peer_file_response", **forged, _reqId=id)
    eve.say(type="peer_file_response", **forged)
    assert await eve.silence() == []  # an error would be taken for the answer to some question of its own
    bo.say(type="peer_dir_response", requesterPubkey=ana.key, dirPath="a", entries=[], _reqId=question["_reqId"])
    await bo.silence()
    assert [f for f in await ana.silence() if f["type"] != "push"] == []
    for content in ("cmlnaHQ=", "dHdpY2U="):
        bo.say(type="peer_file_response", requesterPubkey=ana.key, filePath="a", content=content, _reqId=question["_reqId"])
    await bo.silence()
    assert [f["content"] for f in await ana.silence() if f["type"] != "push"] == ["cmlnaHQ="]


@spec("RELAY-2")
@story
async def test_an_answer_may_have_1_mib_and_500_names(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    full = base64.b64encode(bytes(1024 * 1024)).decode()
    for asked, answered, path, fields, gets in [
            ("peer_file_request", "peer_file_response", "filePath", {"content": full}, {"content": full}),
            ("peer_file_request", "peer_file_response", "filePath", {"content": full + "AAAA"}, {"error": "the peer's answer is empty or too large"}),
            ("peer_file_request", "peer_file_response", "filePath", {"content": "é"}, {"error": "the peer's answer is empty or too large"}),
            ("peer_file_request", "peer_file_response", "filePath", {"content": ""}, {"content": ""}),
            ("peer_dir_request", "peer_dir_response", "dirPath", {"entries": ["x"] * 500}, {"entries": ["x"] * 500}),
            ("peer_dir_request", "peer_dir_response", "dirPath", {"entries": ["x"] * 501}, {"error": "the peer's answer is empty or too large"}),
            ("peer_dir_request", "peer_dir_response", "dirPath", {"error": "e" * 501}, {"error": "e" * 500}),
            ("peer_dir_request", "peer_dir_response", "dirPath", {}, {"error": "the peer's answer is empty or too large"})]:
        ana.say(type=asked, targetPubkey=bo.key, **{path: "p"})
        question = await bo.answer(lambda frame: frame["type"] == f"{asked}_forward")
        bo.say(type=answered, requesterPubkey=ana.key, **{path: "p"}, **fields, _reqId=question["_reqId"])
        answer = await ana.answer(lambda frame: frame["type"] == f"{answered}_forward")
        assert {name: answer.get(name) for name in gets} == gets


@spec("RELAY-3")
@story
async def test_who_asks_learns_that_the_peer_has_left_or_says_nothing(world):
    ana, bo, cy = await world.peer("ana"), await world.peer("bo"), await world.peer("cy")
    ana.say(type="peer_file_request", targetPubkey=bo.key, filePath="a", _reqId="1")
    ana.say(type="peer_dir_request", targetPubkey=cy.key, dirPath="b", _reqId="2")
    await bo.answer(lambda frame: frame["type"] == "peer_file_request_forward")
    await bo.drop()
    answer = await ana.answer(lambda frame: frame.get("_reqId") == "1")
    assert answer == {"type": "peer_file_response_forward", "filePath": "a", "error": "bo left before it answered", "_reqId": "1"}
    world.pass_seconds(14)
    assert len(world.mesh.relays) == 1
    world.pass_seconds(1)
    answer = await ana.answer(lambda frame: frame.get("_reqId") == "2")
    assert (answer["dirPath"], answer["error"]) == ("b", "cy did not answer in 15 s")
    assert (await ana.request("peer_file_request", targetPubkey=bo.key, filePath="a"))["code"] == "peer_not_found"
    for _ in range(4):
        ana.say(type="peer_file_request", targetPubkey=cy.key, filePath="a")
    assert (await ana.request("peer_file_request", targetPubkey=cy.key, filePath="a"))["code"] == "limit"
    await ana.drop()
    assert world.mesh.relays == {}


@spec("RELAY-1")
@story
async def test_of_a_members_sessions_the_newest_is_asked(world):
    ana, old = await world.peer("ana"), await world.peer("bo")
    world.pass_seconds(1)
    new = await world.peer("bo")
    ana.say(type="peer_file_request", targetPubkey=world.member("bo")[0].public, filePath="a")
    await new.answer(lambda frame: frame["type"] == "peer_file_request_forward")
    assert hub.RELAY_SECONDS == 15.0 and hub.MAX_RELAYS == 4


# --- What is shared ---------------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to share, with secrets beside it and bait in it."""
    root = tmp_path / "project"
    for folder in ("src/deep/deeper/deepest", ".git", "config"):
        (root / folder).mkdir(parents=True)
    for file, text in {"readme.md": "hello", "src/a.py": "print()", "src/deep/b.py": "b", "src/deep/deeper/c.py": "c",
                       "src/deep/deeper/deepest/d.py": "d", ".env": "KEY=1", ".git/config": "x", "a..b.txt": "dots",
                       "empty.txt": "", "server.key": "k", "id_rsa": "k", "config/credentials.json": "k", "config/token.py": "t",
                       "notes.txt": "-----BEGIN OPENSSH PRIVATE KEY-----\nx"}.items():
        (root / file).write_text(text)
    (tmp_path / "plan.txt").write_text("outside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "plan.txt").write_text("outside")
    (root / "link.txt").symlink_to("../plan.txt")
    (root / "absolute.txt").symlink_to(tmp_path / "plan.txt")
    (root / "linked").symlink_to("../outside")
    (root / "inner.txt").symlink_to("readme.md")
    (root / "src" / "up").symlink_to("../..")
    os.mkfifo(root / "pipe")
    monkeypatch.setenv("CLAUDEMESH_CONFIG_DIR", str(root / "claudemesh-home"))
    (root / "claudemesh-home").mkdir()
    (root / "claudemesh-home" / "config.json").write_text('{"secretKey": "outside"}')
    return root


@spec("SERVE-2", "SERVE-5")
@pytest.mark.parametrize(("path", "content"), [
    ("readme.md", b"hello"), ("./src//a.py", b"print()"), ("src/deep/deeper/deepest/d.py", b"d"), ("a..b.txt", b"dots"),
    ("empty.txt", b""), ("config/token.py", b"t")])
def test_a_file_below_the_directory_is_read(place, path, content):
    assert SharedDirectories([place]).read(path) == content


@spec("SERVE-2", "SERVE-3", "SERVE-4")
@pytest.mark.parametrize("path", [
    "../plan.txt", "src/../../plan.txt", "src/../readme.md", "/etc/passwd", "//etc/passwd", "~/x", "~root", "..", ".", "", "/",
    "link.txt", "absolute.txt", "inner.txt", "linked/plan.txt", "src/up/plan.txt", "src/up/project/readme.md",
    "readme.md/", "readme.md/.", "readme.md/../../plan.txt", "readme.md/x", "src", "pipe", "README.md", "SRC/a.py", "readme.md\x00",
    "..\\plan.txt", "src\\a.py", "..%2fplan.txt", "%2e%2e/plan.txt", "\u2024\u2024/plan.txt", "src/a.py\n", "a\u202eb",
    ".env", ".git/config", "./.env", "src/../.env", ".ENV", "server.key", "SERVER.KEY", "id_rsa", "config/credentials.json",
    "notes.txt", "claudemesh-home/config.json", "claudemesh-home", "missing", "x" * 5000, "/".join(["src"] * 1000), "\ud800"])
def test_no_path_trick_reads_anything_else(place, path):
    """Each is answered with a reason, and no answer has a byte of what is outside or secret."""
    shared = SharedDirectories([place])
    for look, frame in ((shared._content, {"filePath": path}), (shared._names, {"dirPath": path})):
        answer = shared._looked(look, frame)
        inside = {"readme.md/", "readme.md/.", ".", "", "src", "missing"}  # other spellings of what may be seen
        if "content" in answer:
            assert path in inside and base64.b64decode(answer["content"]) == b"hello"
        elif "entries" in answer:
            assert path in inside
            assert not {"plan.txt", ".env", "link.txt", "server.key", "id_rsa", "claudemesh-home/config.json"} & set(answer["entries"])
        else:
            assert list(answer) == ["error"] and str(place) not in answer["error"]


@spec("SERVE-3")
def test_what_is_swapped_between_the_look_and_the_opening_leads_nowhere(place):
    """A directory and a file that keep turning into links to the outside, while they are read in a loop."""
    shared, stop = SharedDirectories([place]), threading.Event()
    (place / "flip").mkdir()
    (place / "flip" / "plan.txt").write_text("inside")

    def swap() -> None:
        while not stop.is_set():
            os.rename(place / "flip", place / "aside")
            os.symlink("../outside", place / "flip")
            os.unlink(place / "flip")
            os.rename(place / "aside", place / "flip")
            os.rename(place / "readme.md", place / "r")
            os.symlink("../plan.txt", place / "readme.md")
            os.unlink(place / "readme.md")
            os.rename(place / "r", place / "readme.md")

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        seen = {str(shared._looked(shared._content, {"filePath": path}))
                for _ in range(1500) for path in ("flip/plan.txt", "readme.md")}
    finally:
        stop.set()
        swapping.join()
    outside = base64.b64encode(b"outside").decode()
    assert not [answer for answer in seen if outside in answer]
    assert str({"content": base64.b64encode(b"inside").decode()}) in seen


@spec("SERVE-3")
def test_the_directory_is_the_one_that_was_there_at_the_start(place):
    shared = SharedDirectories([place])
    os.rename(place, place.with_name("moved"))
    os.symlink("outside", place)
    assert shared.read("readme.md") == b"hello"
    with pytest.raises(MeshError, match="not found"):
        shared.read("plan.txt")


@spec("SERVE-5")
def test_a_file_has_at_most_1_mib(place):
    (place / "full.bin").write_bytes(bytes(2**20))
    (place / "more.bin").write_bytes(bytes(2**20 + 1))
    shared = SharedDirectories([place])
    assert len(shared.read("full.bin")) == 2**20
    with pytest.raises(MeshError, match="^too large: 1048577 bytes, at most 1048576$"):
        shared.read("more.bin")


@spec("SERVE-4", "SERVE-5")
def test_a_listing_goes_two_levels_down_and_leaves_out_what_is_not_served(place):
    shared = SharedDirectories([place])
    assert shared.names(".") == [
        "a..b.txt", "claudemesh-home/", "config/", "config/token.py", "empty.txt", "notes.txt", "readme.md", "src/", "src/a.py",
        "src/deep/", "src/deep/b.py", "src/deep/deeper/"]
    assert shared.names("src/deep") == ["b.py", "deeper/", "deeper/c.py", "deeper/deepest/", "deeper/deepest/d.py"]
    assert shared.names(".", "*.PY") == ["config/token.py", "src/a.py", "src/deep/b.py"]
    assert shared.names(".", "src/*.py") == ["src/a.py", "src/deep/b.py"]
    assert shared.names(".", "?.py") == ["config/token.py", "src/a.py", "src/deep/b.py"]
    assert shared.names(".", "[a") == []
    for number in range(600):
        (place / "src" / f"{number:03}.txt").write_text("")
    assert len(shared.names(".")) == 500


@spec("SERVE-5")
@pytest.mark.parametrize(("pattern", "name", "fit"), [
    ("*", "x", True), ("a*c", "xABCx", True), ("a*c", "ca", False), ("a.c", "abc", False), ("??", "a", False), ("*a*b*", "ba", False),
    ("a*" * 120 + "b", "a" * 4000, False), ("(x+)+$", "xxx", False)])
def test_a_pattern_has_two_special_characters_and_takes_no_time(pattern, name, fit):
    assert claudemesh.fits(pattern, name) is fit


@spec("SERVE-1")
def test_nothing_is_shared_unless_named_and_never_the_keys(place, tmp_path):
    with pytest.raises(MeshError, match="this session shares no files"):
        SharedDirectories().read("readme.md")
    with pytest.raises(MeshError, match="this session shares no files"):
        SharedDirectories().names(".")
    for path in (place / "missing", place / "readme.md", place / "claudemesh-home"):
        with pytest.raises(wire.UsageError, match="cannot be shared"):
            SharedDirectories([path])
    with pytest.raises(MeshError, match="key material"):  # where a launched session's own configuration came from
        SharedDirectories([place], home=str(place / "src")).read("src/a.py")
    both = SharedDirectories([place, tmp_path / "outside"])
    assert both.read("plan.txt") == b"outside" and both.read("readme.md") == b"hello"
    assert {"plan.txt", "readme.md"} <= set(both.names("."))


def member_of(world: Any, name: str) -> dict[str, Any]:
    pair, id = world.member(name)
    return {"meshId": world.mesh.id, "memberId": id, "slug": "den", "name": name, "pubkey": pair.public,
            "secretKey": pair.secret, "brokerUrl": world.broker.url}


@spec("SERVE-6", "RELAY-1")
@story
async def test_a_client_serves_and_another_reads(world, place):
    async with claudemesh.MeshClient(member_of(world, "bo"), name="bo") as bo, \
            claudemesh.MeshClient(member_of(world, "ana"), quiet=True) as ana:
        SharedDirectories([place]).serve(bo)
        assert await claudemesh.read_peer_file(ana, bo.key, "src/a.py") == b"print()"
        assert await claudemesh.read_peer_file(ana, bo.member_key, "empty.txt") == b""
        assert await claudemesh.list_peer_files(ana, bo.key, "src", "*.py") == ["a.py", "deep/b.py", "deep/deeper/c.py"]
        for path, reason in {"missing": "not found", "../plan.txt": "only paths below the shared directory",
                             ".env": "hidden files and key material", "src": "not a file", "readme.md/x": "not a directory"}.items():
            with pytest.raises(MeshError, match=reason):
                await claudemesh.read_peer_file(ana, bo.key, path)
        (place / "full.bin").write_bytes(os.urandom(2**20))
        assert await claudemesh.read_peer_file(ana, bo.key, "full.bin") == (place / "full.bin").read_bytes()
        os.chmod(place / "full.bin", 0)
        if os.getuid():
            with pytest.raises(MeshError, match="cannot be read"):
                await claudemesh.read_peer_file(ana, bo.key, "full.bin")
