"""Shared files at the broker: uploads and downloads over HTTP, who may read what, and what a crash leaves."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import broker as hub
import store as storage
import wire
from world import World, story

ROOT = Path(hub.__file__).parent
spec = pytest.mark.spec


def signed(world: World, pair: wire.KeyPair, headers: dict[str, str], now: int | None = None) -> dict[str, str]:
    """The headers of an upload, with the signature that a client would put."""
    now = world.broker.clock() if now is None else now
    body = wire.upload_text({name.lower(): value for name, value in headers.items()})
    text = wire.http_text("POST", "/upload", body, now, pair.public)
    return headers | {"X-Mesh-Key": pair.public, "X-Mesh-Time": str(now), "X-Mesh-Signature": wire.sign(text, pair.secret)}


def described(world: World, data: bytes, **headers: str) -> dict[str, str]:
    """The headers that describe an upload of `data`; `X_Tags` and the like overwrite."""
    return {"X-Mesh-Id": world.mesh.id, "X-File-Name": "notes.txt", "Content-Type": "text/plain",
            "X-Mesh-Content-SHA256": hashlib.sha256(data).hexdigest()} | {
        name.replace("_", "-"): value for name, value in headers.items()}


async def upload(world: World, member: str, data: bytes = b"hello", **headers: str) -> tuple[int, Any]:
    """Uploads `data` as that member."""
    pair, _ = world.member(member)
    return await world.http("POST", "/upload", raw=data, headers=signed(world, pair, described(world, data, **headers)))


async def shared(world: World, member: str, data: bytes = b"hello", **headers: str) -> str:
    """The id of a file that was shared."""
    status, answer = await upload(world, member, data, **headers)
    assert status == 200, answer
    return answer["fileId"]


async def download(world: World, url: str) -> tuple[int, bytes]:
    """GET of an absolute address, without any header."""
    def get() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(wire.http_base(world.broker.url).removeprefix("http://"), timeout=5)
        connection.request("GET", url.partition("/download/")[1] + url.partition("/download/")[2])
        world.answered = connection.getresponse()
        content = world.answered.read()
        connection.close()
        return world.answered.status, content
    return await asyncio.to_thread(get)


def blobs(world: World) -> list[str]:
    return sorted(path.name for path in (world.data / "den" / "files").iterdir())


@spec("FILE-1", "FILE-2", "FILE-4", "FILE-9")
@story
async def test_a_file_is_uploaded_listed_and_downloaded_as_it_was(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    id = await shared(world, "ana", b"\x00\xffdata", X_Tags='["build","log"]', X_File_Name="UTF-8''na%C3%AFve%20plan.txt")
    assert len(id) == 32 and blobs(world) == [id]
    assert (world.data / "den" / "files" / id).stat().st_mode & 0o777 == 0o600
    (entry,) = (await bo.request("list_files"))["files"]
    assert entry.pop("uploadedAt").endswith("Z")
    assert entry == {"id": id, "name": "naïve plan.txt", "size": 6, "tags": ["build", "log"], "uploadedBy": "ana",
                     "persistent": True, "encrypted": False, "mimeType": "text/plain"}
    answer = await bo.request("get_file", fileId=id)
    assert (answer["type"], answer["name"], answer["encrypted"], answer["size"]) == ("file_url", "naïve plan.txt", False, 6)
    assert answer["sha256"] == hashlib.sha256(b"\x00\xffdata").hexdigest()
    assert answer["url"].startswith(wire.http_base(world.broker.url) + f"/download/{id}?")
    assert await download(world, answer["url"]) == (200, b"\x00\xffdata")
    assert world.answered.headers["Content-Disposition"] == "attachment; filename*=UTF-8''na%C3%AFve%20plan.txt"
    assert world.answered.headers["X-Content-Type-Options"] == "nosniff"
    assert (await ana.request("mesh_info"))["fileCount"] == 1


@spec("FILE-1", "FILE-2")
@story
async def test_an_upload_without_a_right_proof_stores_nothing(world):
    data, (pair, _) = b"hello", world.member("ana")
    good = described(world, data)
    stranger = wire.KeyPair.generate()
    cases = [
        (good, 401, "unauthorized"),
        (signed(world, stranger, good), 401, "unauthorized"),
        (signed(world, world.owner, good), 403, "forbidden"),
        (signed(world, pair, good) | {"X-File-Name": "other.txt"}, 401, "bad_signature"),
        (signed(world, pair, good) | {"X-Target-Spec": "*"}, 401, "bad_signature"),
        (signed(world, pair, good, world.broker.clock() - 61_000), 401, "timestamp_skew"),
        (signed(world, pair, good | {"X-Mesh-Id": "another"}), 401, "unauthorized"),
        (signed(world, pair, good | {"X-Mesh-Content-SHA256": "none"}), 400, "bad_request"),
        (signed(world, pair, good | {"X-Mesh-Content-SHA256": "0" * 64}), 400, "checksum_mismatch"),
        (signed(world, pair, good | {"X-Owner-Pubkey": stranger.public}), 403, "forbidden"),
        (signed(world, pair, good | {"X-Target-Spec": stranger.public}), 400, "no_such_recipient"),
        (signed(world, pair, good | {"X-Target-Spec": "bo"}), 400, "no_such_recipient"),
        (signed(world, pair, good | {"X-Tags": "build"}), 400, "bad_request"),
        (signed(world, pair, good | {"X-Encrypted": "true", "X-File-Keys": '[{"peerPubkey": "x", "sealedKey": "y"}]'}), 400, "bad_request"),
    ]
    for headers, status, code in cases:
        got, answer = await world.http("POST", "/upload", raw=data, headers=headers)
        assert (got, answer["error"]) == (status, code), headers
    once = signed(world, pair, good)
    assert (await world.http("POST", "/upload", raw=data, headers=once))[0] == 200
    assert (await world.http("POST", "/upload", raw=data, headers=once))[1]["error"] == "replayed"
    assert world.mesh.store.file_totals() == (1, 5)
    assert len(blobs(world)) == 1


@spec("FILE-5")
@pytest.mark.parametrize(("name", "ok"), [
    ("a..b.txt", True), ("x" * 255, True), ("100%25.txt", True), (".gitignore", True), ("2026-01-01T10:00.log", True),
    ("", False), (".", False), ("..", False), ("a/b", False), ("a\\b", False), ("a\nb", False), ("a\x00b", False), ("x" * 256, False),
    ("CON", False), ("nul.txt", False), ("com1.log", False), ("end.", False), (" x", False), ("a\u202eb", False), ("\ud800", False)])
def test_a_name_that_no_system_could_take_is_refused(name, ok):
    assert (wire.file_name_fault(name) is None) == ok


@spec("FILE-5")
@story
async def test_a_file_with_such_a_name_is_not_stored(world):
    for name in ("../x", "UTF-8''a%2Fb", "UTF-8''a%00b", "UTF-8''%FF", "aux", ""):
        status, answer = await upload(world, "ana", X_File_Name=name)
        assert (status, answer["error"]) == (400, "bad_name"), name
    id = await shared(world, "ana", X_File_Name="caf\xe9.txt")
    assert world.mesh.store.file(id, 0).name == "café.txt"
    assert wire.read_header_text(wire.header_text("UTF-8''x é")) == "UTF-8''x é"


@spec("FILE-3", "FILE-6")
def test_what_is_empty_too_large_or_over_the_quota_is_refused_before_it_is_read(tmp_path):
    async def tell() -> None:
        async with World(tmp_path, max_file=1000, file_quota=1500) as world:
            assert (await upload(world, "ana", b""))[1]["error"] == "empty"
            status, answer = await upload(world, "ana", b"x" * 1001)
            assert (status, answer["error"]) == (413, "too_large")
            await shared(world, "ana", b"x" * 1000)
            status, answer = await upload(world, "ana", b"x" * 501)
            assert (status, answer["error"]) == (507, "limit")
            world.mesh.arriving = 500
            assert (await upload(world, "ana", b"x"))[1]["error"] == "limit"
            world.mesh.arriving = 0
            id = await shared(world, "ana", b"x" * 500)
            ana = await world.peer("ana")
            await ana.request("delete_file", fileId=id)
            await shared(world, "ana", b"y" * 500)
            world.broker.transfers = hub.MAX_TRANSFERS
            status, answer = await upload(world, "ana", b"x")
            assert answer["error"] == "limit"
    asyncio.run(tell())


@spec("FILE-3")
@story
async def test_no_more_than_64_files_are_under_way(world):
    world.broker.transfers = hub.MAX_TRANSFERS
    status, answer = await upload(world, "ana")
    assert (status, answer["error"], answer["message"]) == (503, "capacity", "64 files are under way; try again later")
    world.broker.transfers = 0
    await shared(world, "ana")
    assert (hub.MAX_FILE_BYTES, hub.TRANSFER_RATE, hub.FILE_QUOTA_BYTES, hub.MAX_FILES) == (52_428_800, 32_768, 2**30, 10_000)


@spec("FILE-4")
@story
async def test_an_upload_that_breaks_off_leaves_nothing(world):
    data, (pair, _) = b"x" * 1000, world.member("ana")
    headers = signed(world, pair, described(world, data))
    head = "POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items())
    reader, writer = await asyncio.open_connection(*wire.http_base(world.broker.url).removeprefix("http://").split(":"))
    writer.write(head.encode() + b"\r\n" + data[:500])
    await writer.drain()
    async with asyncio.timeout(5):
        while not (world.data / "den" / "files").is_dir() or not blobs(world):
            await asyncio.sleep(0.005)
        assert blobs(world)[0].endswith(".part")
        writer.write_eof()
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
    writer.close()
    assert blobs(world) == [] and world.mesh.store.file_totals() == (0, 0) and world.mesh.arriving == 0
    assert world.broker.transfers == 0


@spec("FILE-4", "TURN-2")
@story
async def test_a_full_disk_and_a_failing_commit_leave_nothing(world, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, answer = await upload(world, "ana")
    assert (status, answer["error"]) == (507, "storage_error")
    assert "No space left on device" in answer["message"] and str(world.data) not in answer["message"]
    assert blobs(world) == []
    with monkeypatch.context() as patch:
        def broken():
            raise storage.sqlite3.OperationalError("disk I/O error")
        patch.setattr(world.mesh.store, "commit", broken)
        status, answer = await upload(world, "ana")
    assert (status, answer["error"]) == (503, "storage_error")
    assert blobs(world) == [] and world.mesh.store.file_totals() == (0, 0)
    await shared(world, "ana")


@spec("FILE-7")
def test_stock_uploads_are_taken_only_if_the_operator_says_so(tmp_path):
    async def tell() -> None:
        stock = {"X-Member-Id": "den", "X-File-Name": "a.txt", "X-Tags": "[]", "X-Persistent": "true", "X-Target-Spec": "",
                 "Content-Type": "application/octet-stream"}
        async with World(tmp_path / "strict") as world:
            status, answer = await world.http("POST", "/upload", raw=b"x", headers=stock | {"X-Mesh-Id": world.mesh.id})
            assert (status, answer["error"]) == (401, "unauthorized")
            assert [line for line in world.log if line["level"] == "warn"] == []
        async with World(tmp_path / "legacy", legacy_http=True) as world:
            (warning,) = [line for line in world.log if line["level"] == "warn"]
            assert warning["msg"] == "legacy HTTP is on: whoever knows a mesh id can upload files to it"
            for lacking in ("X-Member-Id", "X-File-Name", "X-Mesh-Id"):
                headers = {k: v for k, v in (stock | {"X-Mesh-Id": world.mesh.id}).items() if k != lacking}
                assert (await world.http("POST", "/upload", raw=b"x", headers=headers))[0] == 400
            ana, bo = await world.peer("ana"), await world.peer("bo")
            keys = json.dumps([{"peerPubkey": bo.key, "sealedKey": "c2VhbGVk"}])
            status, answer = await world.http("POST", "/upload", raw=b"blob", headers=stock | {
                "X-Mesh-Id": world.mesh.id, "X-Encrypted": "true", "X-Owner-Pubkey": ana.key, "X-File-Keys": keys})
            assert (status, answer["ok"]) == (200, True)
            answer = await bo.request("get_file", fileId=answer["fileId"])
            assert answer["sealedKey"] == "c2VhbGVk"
            assert await download(world, answer["url"]) == (200, b"blob")
            (entry,) = (await ana.request("list_files", **{"from": "den"}))["files"]
            assert entry["uploadedBy"] == "den"
            assert (await ana.request("grant_file_access", fileId=entry["id"], peerPubkey=bo.key, sealedKey="c2")
                    )["type"] == "grant_file_access_ok"
            assert (await upload(world, "ana", X_Mesh_Signature="0" * 128, X_Mesh_Key=world.owner.public))[0] == 200
            headers = described(world, b"x") | {"X-Mesh-Key": "0" * 64, "X-Mesh-Time": "1", "X-Mesh-Signature": "0" * 128}
            assert (await world.http("POST", "/upload", raw=b"x", headers=headers))[0] == 401
    asyncio.run(tell())


@spec("FILE-8", "FILE-11")
@story
async def test_a_file_is_listed_and_given_to_those_it_is_for(world):
    ana, bo, cy = [await world.peer(name, groups=groups) for name, groups in (
        ("ana", []), ("bo", [{"name": "dev/web"}]), ("cy", [{"name": "ops"}]))]
    everyone = await shared(world, "ana", X_Target_Spec="*")
    for_dev = await shared(world, "ana", X_Target_Spec="@dev")
    for_bo = await shared(world, "ana", X_Target_Spec=bo.key)
    seen = {}
    for peer in (ana, bo, cy):
        seen[peer] = [entry["id"] for entry in (await peer.request("list_files"))["files"]]
        for id in (everyone, for_dev, for_bo):
            answer = await peer.request("get_file", fileId=id)
            assert (answer["type"] == "file_url") == (id in seen[peer]), answer
            assert answer.get("code", "forbidden") == "forbidden"
    assert seen == {ana: [for_bo, for_dev, everyone], bo: [for_bo, for_dev, everyone], cy: [everyone]}
    assert (await ana.request("get_file", fileId="nothing"))["code"] == "not_found"
    again = await world.peer("bo")  # another session of the same member
    assert (await again.request("get_file", fileId=for_bo))["type"] == "file_url"
    member = await shared(world, "ana", X_Target_Spec=world.member("cy")[0].public.upper())
    assert (await cy.request("get_file", fileId=member))["type"] == "file_url"
    assert (await bo.request("get_file", fileId=member))["code"] == "forbidden"


@spec("FILE-11")
@story
async def test_lists_are_searched_by_name_and_uploader(world):
    ana = await world.peer("ana")
    report = await shared(world, "ana", X_File_Name="UTF-8''BERICHT%20%C3%84RGER.pdf")
    await shared(world, "bo", X_File_Name="log.txt")
    async def ids(**wanted: str) -> list[str]:
        return [entry["id"] for entry in (await ana.request("list_files", **wanted))["files"]]
    assert await ids(query="ärger") == [report]
    assert await ids(**{"from": "ana"}) == [report]
    assert await ids(query="log", **{"from": "ana"}) == []
    assert await ids(query="%") == []
    for number in range(101):
        world.mesh.store.add_file(world.mesh.store.file(report, 0)._replace(id=f"f{number}"), {})
    assert len(await ids()) == 100


@spec("FILE-8", "FILE-10")
@story
async def test_an_encrypted_file_is_for_who_has_a_key_and_for_its_owner(world):
    ana, bo, cy = await world.peer("ana"), await world.peer("bo"), await world.peer("cy")
    members = {name: world.member(name)[0].public for name in ("ana", "bo", "cy")}
    keys = json.dumps([{"peerPubkey": bo.key, "sealedKey": "Ym8="}])
    status, answer = await upload(world, "ana", X_Encrypted="true", X_Target_Spec=bo.key, X_File_Keys=keys, X_Owner_Pubkey=ana.key)
    assert (status, answer["missing"]) == (200, [members["ana"], members["bo"]])  # who should have a key that lasts
    id = answer["fileId"]
    assert (await bo.request("get_file", fileId=id))["sealedKey"] == "Ym8="
    assert "sealedKey" not in await ana.request("get_file", fileId=id)
    assert (await cy.request("get_file", fileId=id))["code"] == "forbidden"
    assert (await cy.request("list_files"))["files"] == []
    grant = {"fileId": id, "peerPubkey": members["cy"], "sealedKey": "Y3k="}
    assert (await bo.request("grant_file_access", **grant))["code"] == "forbidden"
    assert (await ana.request("grant_file_access", **grant | {"peerPubkey": "0" * 64}))["code"] == "not_found"
    assert (await ana.request("grant_file_access", **grant | {"sealedKey": "x" * 257}))["code"] == "too_large"
    later = await world.peer("ana")  # a session that did not exist when the file was shared
    assert await later.request("grant_file_access", **grant) == {
        "type": "grant_file_access_ok", "fileId": id, "peerPubkey": members["cy"], "_reqId": "r1"}
    assert (await cy.request("get_file", fileId=id))["sealedKey"] == "Y3k="
    plain = await shared(world, "ana")
    assert (await ana.request("grant_file_access", **grant | {"fileId": plain}))["code"] == "forbidden"


@spec("FILE-10")
@story
async def test_an_encrypted_file_for_a_group_names_every_member_that_lacks_a_key(world):
    await world.peer("ana"), await world.peer("bo", groups=[{"name": "dev"}])
    world.member("away", groups=({"name": "dev"},)), world.member("cy")
    status, answer = await upload(world, "ana", X_Encrypted="true", X_Target_Spec="@dev")
    assert sorted(answer["missing"]) == sorted(world.member(name)[0].public for name in ("ana", "bo", "away"))
    status, answer = await upload(world, "ana", X_Encrypted="true")
    assert len(answer["missing"]) == 4


@spec("FILE-9")
@story
async def test_a_download_needs_a_token_for_that_file_in_time_or_a_signature(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    one, two = await shared(world, "ana", b"one"), await shared(world, "ana", b"two", X_Target_Spec=ana.key)
    url = (await bo.request("get_file", fileId=one))["url"]
    assert (await download(world, url.replace(one, two)))[0] == 401
    assert (await download(world, url[:-1] + ("0" if url[-1] != "0" else "1")))[0] == 401
    assert (await download(world, url.partition("&token")[0]))[0] == 401
    assert (await download(world, url.replace(bo.key, ana.key)))[0] == 401
    world.pass_seconds(119)
    assert await download(world, url) == (200, b"one")
    world.pass_seconds(2)
    status, content = await download(world, url)
    assert (status, json.loads(content)["error"]) == (401, "token_expired")
    for id, answers in ((one, {"ana": 200, "bo": 200}), (two, {"ana": 200, "bo": 403})):
        for name, status in answers.items():
            target = f"/download/{id}?mesh={world.mesh.id}"
            assert (await world.http("GET", target, sign=world.member(name)[0]))[0] == status
    assert (await world.http("GET", target, sign=wire.KeyPair.generate()))[0] == 401
    assert (await world.http("HEAD", target, sign=world.member("ana")[0])) == (200, "")
    assert world.answered.headers["Content-Length"] == "3"
    url = (await bo.request("get_file", fileId=one))["url"]
    admin, _ = world.member("root", role="admin")
    await world.http("DELETE", f"/mesh/{world.mesh.id}/members/{world.member('bo')[1]}", sign=admin)
    assert (await download(world, url))[0] == 401  # revoked members' addresses are worth nothing
    os.unlink(world.data / "den" / "files" / one)
    assert (await download(world, (await ana.request("get_file", fileId=one))["url"]))[0] == 404


@spec("FILE-9")
def test_an_operators_address_goes_into_download_addresses(tmp_path):
    async def tell() -> None:
        async with World(tmp_path, public_url="wss://mesh.example.org/ws") as world:
            ana = await world.peer("ana")
            answer = await ana.request("get_file", fileId=await shared(world, "ana"))
            assert answer["url"].startswith("https://mesh.example.org/download/")
    asyncio.run(tell())


@spec("FILE-12")
@story
async def test_the_status_of_a_file_says_who_fetched_it_and_when(world):
    ana, bo, cy = await world.peer("ana"), await world.peer("bo", displayName="Bo's laptop"), await world.peer("cy")
    id = await shared(world, "ana", X_Target_Spec=bo.key)
    url = (await bo.request("get_file", fileId=id))["url"]
    assert (await ana.request("file_status", fileId=id))["accesses"] == []  # an address is no download
    await download(world, url)
    async with asyncio.timeout(5):  # the last byte is out before that is noted
        while not (access := (await ana.request("file_status", fileId=id))["accesses"][0])["complete"]:
            await asyncio.sleep(0.005)
    assert (access["peerName"], access["complete"], access["accessedAt"][-1]) == ("Bo's laptop", True, "Z")
    assert (await cy.request("file_status", fileId=id))["code"] == "forbidden"
    assert (await cy.request("file_status", fileId="x"))["code"] == "not_found"
    for number in range(150):
        world.mesh.store.add_access(id, "key", f"reader {number}", number)
    accesses = (await ana.request("file_status", fileId=id))["accesses"]
    assert (len(accesses), accesses[0]["peerName"], accesses[0]["complete"]) == (100, "reader 149", False)


@spec("FILE-10")
@story
async def test_a_file_is_deleted_by_its_owner_or_an_admin_and_its_content_goes_with_the_commit(world):
    ana, bo, root = await world.peer("ana"), await world.peer("bo"), await world.peer("root")
    world.mesh.enrolled(world.mesh.members[world.member("root")[1]]._replace(role="admin"))
    root = await world.peer("root")
    one, two = await shared(world, "ana"), await shared(world, "ana")
    assert (await bo.request("delete_file", fileId=one))["code"] == "forbidden"
    assert len(blobs(world)) == 2
    answer = await ana.request("delete_file", fileId=one)
    assert (answer["type"], answer["id"]) == ("ack", one)
    assert blobs(world) == [two]
    assert (await root.request("delete_file", fileId=two))["type"] == "ack"
    assert blobs(world) == []
    assert (await ana.request("delete_file", fileId=one))["code"] == "not_found"
    events = [(e["eventType"], e["payload"].get("file")) for e in (await ana.request("audit_query", limit=4))["entries"]]
    assert events == [("file_deleted", two), ("file_deleted", one), ("file_shared", two), ("file_shared", one)]


@spec("FILE-13")
@story
async def test_a_deletion_that_is_not_committed_keeps_the_content(world):
    id = await shared(world, "ana")
    world.mesh.store.delete_file(id)
    world.mesh.store.rollback()
    world.mesh.store.set_state("x", 1, None, "", 0)
    world.mesh.store.commit()
    assert blobs(world) == [id] and world.mesh.store.file(id, 0).name == "notes.txt"


@spec("FILE-14")
@story
async def test_an_ephemeral_file_is_gone_after_a_day(world):
    ana = await world.peer("ana")
    id, other = await shared(world, "ana", X_Persistent="false"), await shared(world, "ana", X_Persistent="maybe")
    url = (await ana.request("get_file", fileId=id))["url"]
    entry = {e["id"]: e for e in (await ana.request("list_files"))["files"]}[id]
    assert entry["persistent"] is False and entry["expiresAt"] > entry["uploadedAt"]
    world.pass_seconds(86_390)
    assert (await ana.request("get_file", fileId=id))["type"] == "file_url"
    world.skipped += 20  # the time is over, and nothing has been swept yet
    assert (await ana.request("get_file", fileId=id))["code"] == "not_found"
    assert (await download(world, url))[0] == 401
    assert [e["id"] for e in (await ana.request("list_files"))["files"]] == [other]
    world.pass_seconds(hub.RETENTION_SECONDS + 1)
    world.broker.end_turn()
    assert blobs(world) == [other]


@spec("FILE-13")
@story
async def test_what_a_crash_left_is_swept_when_the_broker_starts(world):
    id = await shared(world, "ana", b"kept")
    for orphan in ("f" * 32, "e" * 32 + ".part"):
        (world.data / "den" / "files" / orphan).write_bytes(b"left")
    await world.restart()
    assert blobs(world) == [id]


class Process:
    """A broker process with one mesh and one member."""

    def __init__(self, data: Path) -> None:
        self.data, self.log, self.port = data, [], 0
        self.pair, self.owner = wire.KeyPair.generate(), wire.KeyPair.generate()
        if not data.exists():
            with_store = storage.Store.create(data / "den", mesh_id="m1", slug="den", name="Den", owner_pubkey=self.owner.public, now=1)
            with_store.add_member(self.pair.public, "ana", "member", 1)
            with_store.commit()
            with_store.close()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(ROOT / "broker.py"), "--port", "0", "--data", str(self.data)],
                                        stderr=subprocess.PIPE)
        self.port = int(json.loads(self.process.stderr.readline())["url"].rpartition(":")[2].partition("/")[0])
        self.base = f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stderr.close()

    def resident(self) -> int:
        """Bytes of memory, now and at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def headers(self, size: int, digest: str) -> dict[str, str]:
        headers = {"X-Mesh-Id": "m1", "X-File-Name": "big.bin", "X-Mesh-Content-SHA256": digest}
        now = int(time.time() * 1000)
        text = wire.http_text("POST", "/upload", wire.upload_text({k.lower(): v for k, v in headers.items()}), now, self.pair.public)
        return headers | {"Content-Length": str(size), "X-Mesh-Key": self.pair.public, "X-Mesh-Time": str(now),
                          "X-Mesh-Signature": wire.sign(text, self.pair.secret)}

    def blobs(self) -> list[str]:
        folder = self.data / "den" / "files"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@spec("FILE-4")
def test_50_mib_go_through_a_broker_that_does_not_grow(tmp_path):
    broker = Process(tmp_path / "data")
    try:
        size, source = 52_428_800, tmp_path / "big.bin"
        with open(source, "wb") as file:
            for _ in range(50):
                file.write(os.urandom(1024) * 1024)
        digest = hashlib.file_digest(open(source, "rb"), "sha256").hexdigest()
        small = http.client.HTTPConnection(broker.base, timeout=30)
        small.request("POST", "/upload", b"warm up", broker.headers(7, hashlib.sha256(b"warm up").hexdigest()))
        assert small.getresponse().status == 200
        before = broker.resident()
        connection = http.client.HTTPConnection(broker.base, timeout=30, blocksize=2**17)
        with open(source, "rb") as file:
            connection.request("POST", "/upload", file, broker.headers(size, digest))
        answer = json.loads(connection.getresponse().read())
        target = f"/download/{answer['fileId']}?mesh=m1"
        now = int(time.time() * 1000)
        text = wire.http_text("GET", target, b"", now, broker.pair.public)
        connection = http.client.HTTPConnection(broker.base, timeout=30)
        connection.request("GET", target, headers={"X-Mesh-Key": broker.pair.public, "X-Mesh-Time": str(now),
                                                   "X-Mesh-Signature": wire.sign(text, broker.pair.secret)})
        response = connection.getresponse()
        assert hashlib.file_digest(response, "sha256").hexdigest() == digest
        grown = broker.resident() - before
        print(f"grown by {grown / 2**20:.1f} MiB")
        assert grown < 8 * 2**20
    finally:
        broker.kill()


@spec("FILE-13")
def test_a_broker_killed_during_uploads_has_the_whole_ones_and_no_orphan(tmp_path):
    broker = Process(tmp_path / "data")
    try:
        connection = http.client.HTTPConnection(broker.base, timeout=5)
        connection.request("POST", "/upload", b"whole", broker.headers(5, hashlib.sha256(b"whole").hexdigest()))
        whole = json.loads(connection.getresponse().read())["fileId"]
        with socket.create_connection(("127.0.0.1", broker.port)) as half:
            headers = broker.headers(1_000_000, "0" * 64)
            half.sendall(("POST /upload HTTP/1.1\r\nHost: x\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items()) + "\r\n").encode())
            half.sendall(b"x" * 500_000)
            until = time.monotonic() + 5
            while len(broker.blobs()) < 2 and time.monotonic() < until:
                time.sleep(0.005)
            assert len(broker.blobs()) == 2
            broker.kill()
        assert len(broker.blobs()) == 2
        broker.start()
        assert broker.blobs() == [whole]
    finally:
        broker.kill()


@spec("FILE-4", "FILE-9")
@story
async def test_many_transfers_at_once_do_not_mix(world):
    contents = [os.urandom(200_000 + number) for number in range(12)]
    ids = await asyncio.gather(*(shared(world, "ana", data, X_File_Name=f"{n}.bin") for n, data in enumerate(contents)))
    ana = await world.peer("ana")
    urls = [(await ana.request("get_file", fileId=id))["url"] for id in ids]
    assert await asyncio.gather(*(download(world, url) for url in urls)) == [(200, data) for data in contents]
    assert threading.active_count() < 64


@spec("FILE-9", "OPS-9")
def test_downloads_come_whole_over_tls_too(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert,
                           "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], capture_output=True)
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")

    async def tell() -> None:
        async with World(tmp_path / "data", tls_cert=str(cert), tls_key=str(key)) as world:
            pair, _ = world.member("ana")
            data, trust = os.urandom(3_000_000), ssl.create_default_context(cafile=cert)

            def exchange(method: str, target: str, body: bytes, headers: dict[str, str]) -> bytes:
                connection = http.client.HTTPSConnection("127.0.0.1", world.broker.server.sockets[0].getsockname()[1],
                                                         timeout=5, context=trust)
                connection.request(method, target, body, headers)
                content = connection.getresponse().read()
                connection.close()
                return content
            answer = await asyncio.to_thread(exchange, "POST", "/upload", data, signed(world, pair, described(world, data)))
            target, now = f"/download/{json.loads(answer)['fileId']}?mesh={world.mesh.id}", world.broker.clock()
            text = wire.http_text("GET", target, b"", now, pair.public)
            assert await asyncio.to_thread(exchange, "GET", target, b"", {
                "X-Mesh-Key": pair.public, "X-Mesh-Time": str(now), "X-Mesh-Signature": wire.sign(text, pair.secret)}) == data
    asyncio.run(tell())
