"""The store's rules (SPEC.md, STORE and AUDIT) told as stories on real files."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

import store as storage
from store import (
    DELIVERY_STATES, AuditRow, AuditVerdict, DeliveryRow, JoinRefused, Member, Saved, SessionKey, Store, StoreError,
    mesh_identity, verify_audit,
)

MESH_ID = "M" * 32
OWNER, ALICE, BOB, CAROL = "00" * 32, "a1" * 32, "b0" * 32, "c0" * 32  # member keys
PHONE, LAPTOP = "51" * 32, "52" * 32  # session keys
DAY = 86_400_000
NOW = 1_767_225_600_000  # 2026-01-01T00:00:00.000Z
ALL = ("now", "next", "low")
VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "team"


@pytest.fixture
def store(directory):
    made = found(directory)
    yield made
    made.close()


def found(directory: Path, mesh_id: str = MESH_ID) -> Store:
    """A mesh with one member, alice, whose id is `alice`."""
    made = Store.create(directory, mesh_id=mesh_id, slug="team", name="The team", owner_pubkey=OWNER, now=NOW)
    admit(made, ALICE, "alice")
    made.commit()
    return made


def admit(store: Store, pubkey: str, name: str) -> Member:
    """A member whose id is its name."""
    new_id, store._new_id = store._new_id, lambda: name
    try:
        return store.add_member(pubkey, name, "member", NOW)
    finally:
        store._new_id = new_id


def send(store: Store, id: str, *recipients: str, target: str = "*", priority: str = "next",
         client_id: str | None = None, held_for: str | None = None, now: int = NOW,
         expires_at: int = NOW + 7 * DAY) -> int:
    """A message from alice, queued for the recipients."""
    seq = store.accept(
        id=id, sender_member="alice", sender_key=PHONE, sender_name="Alice", target=target, priority=priority,
        nonce="n", ciphertext="c", subtype=None, client_id=client_id, digest="d", now=now, expires_at=expires_at,
        online=len(recipients), held=0)
    for recipient in recipients:
        store.add_delivery(seq, recipient, held_for, None)
    return seq


def queued(store: Store, recipient: str, priorities=ALL, now: int = NOW) -> list[str]:
    """Ids of what is pending for a key."""
    return [row.id for row in store.pending(recipient, priorities, now, 0, 100)]


def state_of(store: Store, message_id: str) -> dict[str, str]:
    """Recipient -> state."""
    _, rows = store.message_status(message_id)
    return {row.recipient: row.state for row in rows}


def sql(directory: Path, script: str) -> list[tuple]:
    """What somebody with a database tool does to the file."""
    with closing(sqlite3.connect(directory / "mesh.db", isolation_level=None)) as db:
        rows = []
        for statement in script.split(";\n"):
            rows = db.execute(statement).fetchall()
        return rows


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- A mesh is a directory --------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-1")
def test_a_mesh_is_one_private_directory(directory):
    store = found(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["lock", "mesh.db", "mesh.db-shm", "mesh.db-wal"]
    assert mode(directory) == 0o700
    assert {mode(path) for path in directory.iterdir()} == {0o600}
    assert store.mesh() == (MESH_ID, "team", "The team", OWNER,
                            {"displayName": True, "roleTag": True, "groups": True, "messageMode": True}, NOW, None)
    store.close()


@pytest.mark.spec("STORE-1")
def test_the_schema_has_no_place_for_the_owners_secret_nor_for_a_second_mesh(store, directory):
    columns = {name for (table,) in sql(directory, "SELECT name FROM sqlite_schema WHERE type = 'table'")
               for _, name, *_ in sql(directory, f"PRAGMA table_info({table})")}
    assert "owner_pubkey" in columns
    assert not {"mesh_id", "owner_secret", "owner_secret_key", "root_key", "mesh_root_key"} & columns
    with pytest.raises(sqlite3.IntegrityError):
        sql(directory, "INSERT INTO mesh(id, slug, name, owner_pubkey, created_at) VALUES ('x', 'x', 'x', 'x', 0)")


def test_the_identity_of_a_mesh_can_be_read_while_it_is_open_and_when_it_is_not(directory, tmp_path):
    assert mesh_identity(tmp_path / "nowhere") is None
    store = found(directory)
    assert mesh_identity(directory) == (MESH_ID, "team")
    store.close()
    assert mesh_identity(directory) == (MESH_ID, "team")
    (directory / "mesh.db").write_bytes(b"")
    assert mesh_identity(directory) is None
    (directory / "mesh.db").write_text("this is a text file, long enough to be read as a database header " * 20)
    with pytest.raises(StoreError, match="^team/mesh.db is not a database$"):
        mesh_identity(directory)


def test_a_mesh_cannot_be_founded_twice(store, directory):
    store.close()
    with pytest.raises(StoreError, match="^team holds a mesh already$"):
        found(directory)
    Store(directory).close()


# --- Durability and turns ---------------------------------------------------------------------------------------------

WRITER = """
import sys
from store import Store
store = Store(sys.argv[1])
for turn in range(100_000):
    for part in range(10):
        seq = store.accept(id=f"{turn}-{part}", sender_member="alice", sender_key="k", sender_name="Alice", target="*",
                           priority="next", nonce="n", ciphertext="c" * 500, subtype=None, client_id=None, digest=None,
                           now=0, expires_at=1)
        store.add_delivery(seq, "r", None, None)
        store.audit("message_sent", "alice", "Alice", {"n": turn}, 0)
    store.commit()
    print(turn, flush=True)
    if turn % 16 == 0:
        store.checkpoint()
"""


def python(code: str, *arguments: str) -> subprocess.Popen:
    """A child process that can import the modules."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
                            cwd=Path(storage.__file__).parent)


@pytest.mark.spec("STORE-2")
def test_kill_9_in_the_middle_of_writing_loses_nothing_that_was_committed(directory):
    found(directory).close()
    with python(WRITER, str(directory)) as child:
        for line in child.stdout:
            if (told := int(line)) == 40:
                break
        child.send_signal(signal.SIGKILL)
        told = max([told, *map(int, child.stdout)])
    store = Store(directory)
    messages, = sql(directory, "SELECT count(*), count(DISTINCT seq) FROM message")
    deliveries, = sql(directory, "SELECT count(*) FROM delivery")
    assert messages[0] >= (told + 1) * 10
    assert messages[0] % 10 == 0  # turns are there whole or not at all
    assert deliveries[0] == messages[0] == verify_audit(directory).entries
    assert verify_audit(directory).valid
    store.close()


@pytest.mark.spec("STORE-2")
def test_commits_are_flushed_to_the_disk_unless_the_operator_says_otherwise(directory):
    def level(store):
        return store._db.execute("PRAGMA synchronous").fetchone()[0]

    found(directory).close()
    with closing(Store(directory)) as store:
        assert level(store) == 2  # FULL
        assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    with closing(Store(directory, synchronous="NORMAL")) as store:
        assert level(store) == 1
    with pytest.raises(StoreError, match="^synchronous is one of FULL, NORMAL, OFF$"):
        Store(directory, synchronous="SOMETIMES")


@pytest.mark.spec("STORE-3")
def test_a_turn_that_is_rolled_back_has_not_happened(store, directory):
    assert not store.changed
    send(store, "kept", BOB)
    store.audit("message_sent", "alice", "Alice", {}, NOW)
    assert store.changed
    store.commit()
    assert not store.changed
    head = store.audit_head

    send(store, "lost", BOB)
    store.audit("message_sent", "alice", "Alice", {}, NOW)
    store.set_state("k", 1, "alice", "Alice", NOW)
    assert store.audit_head != head
    store.rollback()

    assert (store.changed, store.audit_head) == (False, head)
    assert queued(store, BOB) == ["kept"]
    assert store.get_state("k") is None
    send(store, "later", BOB)
    store.audit("message_sent", "alice", "Alice", {}, NOW)
    store.commit()
    assert queued(store, BOB) == ["kept", "later"]
    assert verify_audit(directory) == (True, 2, None, store.audit_head)


@pytest.mark.spec("STORE-3")
def test_what_was_not_committed_is_gone_when_the_store_closes(store, directory):
    send(store, "lost", BOB)
    store.close()
    store.close()  # harmless
    with closing(Store(directory)) as again:
        assert queued(again, BOB) == []


@pytest.mark.spec("STORE-3")
def test_a_full_disk_undoes_the_whole_turn_and_writing_goes_on_when_there_is_room(store, directory):
    send(store, "before", BOB)
    store.audit("message_sent", "alice", "Alice", {}, NOW)
    store.commit()
    head = store.audit_head
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 20}")

    with pytest.raises(sqlite3.OperationalError, match="full"):
        for number in range(10_000):
            send(store, f"lost-{number}", BOB)
            store.audit("message_sent", "alice", "Alice", {"n": number}, NOW)
            store.queue_depth()  # reads, so what was taken goes in
    assert not store._db.in_transaction  # SQLite has undone the turn by itself ...
    with pytest.raises(sqlite3.OperationalError, match="rolled back"):
        store.touch_member("alice", NOW)  # ... so its last writes may not come true without its first
    with pytest.raises(sqlite3.OperationalError, match="rolled back"):
        store.settle([(1, BOB)], "final", NOW)
    with pytest.raises(sqlite3.OperationalError, match="rolled back"):
        store.commit()
    store.rollback()

    assert (queued(store, BOB), store.audit_head) == (["before"], head)
    store._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    send(store, "after", BOB)
    store.audit("message_sent", "alice", "Alice", {}, NOW)
    store.commit()
    assert queued(store, BOB) == ["before", "after"]
    assert verify_audit(directory) == (True, 2, None, store.audit_head)


def test_a_checkpoint_empties_the_log_and_says_when_a_reader_is_in_the_way(store, directory):
    def moved() -> int:
        """Messages in the database's own file, its log left aside."""
        with closing(sqlite3.connect(f"file:{directory / 'mesh.db'}?immutable=1", uri=True)) as database:
            return database.execute("SELECT count(*) FROM message").fetchone()[0]

    assert store.checkpoint()
    for number in range(100):
        send(store, str(number), BOB)
    store.commit()
    assert moved() == 0
    with closing(sqlite3.connect(directory / "mesh.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM message").fetchone()
        send(store, "100", BOB)
        store.commit()
        assert not store.checkpoint()
    assert store.checkpoint()
    assert moved() == 101
    size = os.path.getsize(directory / "mesh.db-wal")
    send(store, "101", BOB)
    store.commit()
    assert os.path.getsize(directory / "mesh.db-wal") == size  # overwritten, not longer


def test_a_log_that_has_grown_beyond_its_bound_is_cut(store, directory, monkeypatch):
    monkeypatch.setattr(storage, "WAL_KEEP_BYTES", 100_000)
    for number in range(300):
        send(store, str(number), BOB)
    store.commit()
    assert os.path.getsize(directory / "mesh.db-wal") > 100_000
    assert store.checkpoint()
    assert os.path.getsize(directory / "mesh.db-wal") == 0


# --- Opening ----------------------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-4")
def test_two_brokers_cannot_serve_one_directory(store, directory):
    with pytest.raises(StoreError, match="^team is in use by another broker$"):
        Store(directory)
    with python("import sys, store\ntry: store.Store(sys.argv[1])\nexcept store.StoreError as error: print(error)",
                str(directory)) as child:
        assert child.stdout.read() == "team is in use by another broker\n"
    store.close()
    Store(directory).close()


@pytest.mark.spec("STORE-4")
def test_a_broker_that_was_killed_leaves_no_lock_behind(directory):
    found(directory).close()
    with python("import sys, store\nkept = store.Store(sys.argv[1])\nprint('open', flush=True)\nsys.stdin.read()",
                str(directory)) as child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="in use"):
            Store(directory)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        Store(directory).close()


@pytest.mark.spec("STORE-5")
def test_what_cannot_be_opened_is_refused_in_one_sentence(tmp_path):
    def refusal(directory, action=Store):
        with pytest.raises(StoreError) as refused:
            action(directory)
        assert refused.value.__cause__ is None
        return str(refused.value)

    assert refusal(tmp_path / "nowhere") == "nowhere holds no mesh.db"

    text = tmp_path / "text"
    text.mkdir()
    (text / "mesh.db").write_text("this is a text file, long enough to be read as a database header " * 20)
    assert refusal(text) == "text/mesh.db is not a database"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    sql(foreign, "CREATE TABLE song (title TEXT)")
    before = (foreign / "mesh.db").read_bytes()
    assert refusal(foreign) == "foreign/mesh.db is not a mesh's database"
    assert refusal(foreign, found) == "foreign/mesh.db is not a mesh's database"
    assert (foreign / "mesh.db").read_bytes() == before

    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file" / "team", found) == "team/mesh.db cannot be used: Not a directory"

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "mesh.db").touch()
    assert refusal(empty) == "empty/mesh.db holds no mesh"


@pytest.mark.spec("STORE-5")
def test_a_directory_that_may_not_be_written_is_refused_in_one_sentence():
    with tempfile.TemporaryDirectory() as base:
        directory = Path(base) / "team"
        found(directory).close()
        for path, bits in ((Path(base), 0o755), (directory / "lock", 0o666), (directory / "mesh.db", 0o444),
                           (directory, 0o555)):
            path.chmod(bits)
        assert refusal_without_privileges(directory) == "team/mesh.db is read-only"
        (directory / "lock").chmod(0o444)
        assert refusal_without_privileges(directory) == "team/lock cannot be used: Permission denied"
        directory.chmod(0o755)


def refusal_without_privileges(directory: Path) -> str:
    """What opening says to a process that is not the super-user."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            Store(directory)
        except StoreError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as pipe:
        return pipe.read()


# --- Schema versions --------------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-6")
def test_a_crash_while_founding_leaves_a_file_that_can_be_founded_again(directory):
    directory.mkdir()
    (directory / "mesh.db").touch()  # before the schema
    found(directory).close()
    sql(directory, "PRAGMA foreign_keys = OFF;\nDELETE FROM member;\nDELETE FROM mesh")  # before the mesh's row
    found(directory).close()
    assert sql(directory, "PRAGMA user_version") == [(len(storage.MIGRATIONS),)]


@pytest.mark.spec("STORE-6")
def test_every_older_schema_is_brought_up_to_date_with_its_data(directory, tmp_path, monkeypatch):
    found(directory).close()
    wanted = sql(directory, "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name")
    scripts = storage.MIGRATIONS
    for version in range(1, len(scripts) + 1):
        older = tmp_path / f"version-{version}"
        monkeypatch.setattr(storage, "MIGRATIONS", scripts[:version])
        found(older).close()
        assert sql(older, "PRAGMA user_version") == [(version,)]
        monkeypatch.setattr(storage, "MIGRATIONS", scripts)
        with closing(Store(older)) as store:
            assert [member.name for member in store.members()] == ["alice"]
        assert sql(older, "PRAGMA user_version") == [(len(scripts),)]
        assert sql(older, "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name") == wanted


@pytest.mark.spec("STORE-6")
def test_a_migration_happens_whole_or_not_at_all(directory, monkeypatch):
    found(directory).close()
    known = len(storage.MIGRATIONS)
    good, bad = "CREATE TABLE extra (a);", "CREATE TABLE more (a); CREATE TABLE extra (a);"
    monkeypatch.setattr(storage, "MIGRATIONS", [*storage.MIGRATIONS, good, bad])
    with pytest.raises(StoreError, match="^team/mesh.db was refused by SQLite: table extra already exists$"):
        Store(directory)
    assert sql(directory, "PRAGMA user_version") == [(known + 1,)]
    assert sql(directory, "SELECT name FROM sqlite_schema WHERE name IN ('extra', 'more')") == [("extra",)]
    monkeypatch.setattr(storage, "MIGRATIONS", storage.MIGRATIONS[:-1])
    with closing(Store(directory)) as store:
        assert [member.name for member in store.members()] == ["alice"]


@pytest.mark.spec("STORE-6")
def test_a_newer_schema_is_refused_and_left_as_it_is(directory):
    found(directory).close()
    newer = len(storage.MIGRATIONS) + 1
    sql(directory, f"PRAGMA user_version = {newer}")
    before = (directory / "mesh.db").read_bytes()
    with pytest.raises(StoreError) as refused:
        Store(directory)
    assert str(refused.value) == (f"team/mesh.db has schema {newer}, newer than the {newer - 1} this program knows: "
                                  "use the newer program")
    assert (directory / "mesh.db").read_bytes() == before
    assert mesh_identity(directory) == (MESH_ID, "team")


# --- Members and invites ----------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-7")
def test_a_key_has_one_live_membership_and_a_revoked_key_stays_known(store):
    store._new_id = lambda: "bob"
    bob = store.add_member(BOB, "Bob", "admin", NOW + 1, role_tag="ops", groups=[{"name": "eng", "role": "lead"}],
                           message_mode="inbox")
    assert bob == ("bob", BOB, "Bob", "admin", "ops", [{"name": "eng", "role": "lead"}], "inbox", NOW + 1, None, None)
    assert store.member_by_key(BOB) == store.member("bob") == bob
    with pytest.raises(StoreError, match="^exists$"):
        store.add_member(BOB, "Bob again", "member", NOW)

    store.touch_member("bob", NOW + 2)
    assert store.revoke_member("bob", NOW + 3) is True
    assert store.revoke_member("bob", NOW + 4) is False
    assert store.member_by_key(BOB) is None
    assert store.member("bob") == bob._replace(last_seen_at=NOW + 2, revoked_at=NOW + 3)
    assert [member.id for member in store.members()] == ["alice"]
    assert [member.id for member in store.members(revoked=True)] == ["alice", "bob"]
    assert store.member("nobody") is None


def test_ids_are_32_letters_and_digits(directory):
    with closing(Store.create(directory, mesh_id=MESH_ID, slug="team", name="T", owner_pubkey=OWNER, now=NOW)) as store:
        ids = {store.add_member(BOB, "Bob", "member", NOW).id, invite(store, "t").id}
        assert len(ids) == 2
        assert all(len(id) == 32 and id.isalnum() and id.isascii() for id in ids)


def reopened(store: Store, directory: Path, new_id=storage.random_id) -> Store:
    store.close()
    return Store(directory, new_id=new_id)


def invite(store: Store, token: str, *, max_uses: int = 1, expires_at: int = NOW + DAY, **preset) -> storage.Invite:
    return store.add_invite(token, role="member", max_uses=max_uses, expires_at=expires_at, preset=preset,
                            created_by="alice", now=NOW)


def refused(store: Store, token: str, pubkey: str, now: int = NOW) -> str:
    with pytest.raises(JoinRefused) as reason:
        store.enrol(token, pubkey, "somebody", now)
    return reason.value.code


def used(store: Store) -> dict[str, int]:
    return {row.token: row.used_count for row in store.invites()}


@pytest.mark.spec("STORE-8")
def test_an_invite_gives_its_role_and_its_preset(store, directory):
    store = reopened(store, directory, iter(["i1", "i2", "bob", "carol"]).__next__)
    assert invite(store, "plain") == ("i1", "plain", "member", 1, 0, {}, NOW + DAY, "alice", NOW, None)
    store.add_invite("rich", role="admin", max_uses=3, expires_at=NOW + DAY, created_by=None, now=NOW, preset={
        "displayName": "Ops", "roleTag": "ops", "groups": [{"name": "eng"}], "messageMode": "off"})
    assert store.enrol("plain", BOB, "Bob", NOW) == (
        ("bob", BOB, "Bob", "member", None, [], "push", NOW, None, None), False)
    assert store.enrol("rich", CAROL, "Carol", NOW) == (
        ("carol", CAROL, "Ops", "admin", "ops", [{"name": "eng"}], "off", NOW, None, None), False)
    assert used(store) == {"plain": 1, "rich": 1}
    with pytest.raises(StoreError, match="^exists$"):
        invite(store, "plain")
    store.close()


@pytest.mark.spec("STORE-8")
def test_five_joiners_of_a_one_use_invite_give_exactly_one_member(directory):
    store = found(directory)
    invite(store, "one")
    keys = [f"{n:02x}" * 32 for n in range(5)]
    outcomes = []
    for key in keys:
        try:
            outcomes.append(store.enrol("one", key, key[:2], NOW)[0].name)
        except JoinRefused as refusal:
            outcomes.append(refusal.code)
    assert outcomes == ["00", *["invite_exhausted"] * 4]
    store.commit()
    for key in keys[1:]:  # and again in turns of their own, with a restart between them
        assert refused(store, "one", key) == "invite_exhausted"
        store.commit()
        store = reopened(store, directory)
    assert store.enrol("one", keys[0], "again", NOW)[1] is True
    assert used(store) == {"one": 1}
    assert [member.pubkey for member in store.members()] == [ALICE, keys[0]]
    store.close()


@pytest.mark.spec("STORE-8")
def test_a_join_that_is_rolled_back_burns_no_use(store):
    invite(store, "one")
    store.commit()
    store.enrol("one", BOB, "Bob", NOW)
    store.rollback()
    assert used(store) == {"one": 0}
    assert store.enrol("one", CAROL, "Carol", NOW)[1] is False


@pytest.mark.spec("STORE-7", "STORE-8")
def test_a_join_is_refused_for_the_first_reason_in_order(store):
    revoked = invite(store, "revoked", expires_at=NOW - 1, max_uses=1)
    assert store.revoke_invite(revoked.id, NOW) is True
    assert store.revoke_invite(revoked.id, NOW) is False
    invite(store, "expired", expires_at=NOW - 1)
    invite(store, "just-good", expires_at=NOW)
    invite(store, "spent", max_uses=1)
    bob, _ = store.enrol("spent", BOB, "Bob", NOW)

    assert refused(store, "unknown", ALICE) == "invite_not_found"
    assert refused(store, "revoked", ALICE) == "invite_revoked"  # expired too
    assert refused(store, "expired", ALICE) == "invite_expired"  # though the key is a member's
    assert store.enrol("spent", ALICE, "other name", NOW) == (store.member("alice"), True)  # though it is used up
    store.revoke_member(bob.id, NOW)
    assert refused(store, "spent", BOB) == "member_revoked"  # used up too
    assert refused(store, "just-good", BOB) == "member_revoked"
    assert refused(store, "spent", CAROL) == "invite_exhausted"
    assert store.enrol("just-good", CAROL, "Carol", NOW)[1] is False
    assert used(store) == {"revoked": 0, "expired": 0, "just-good": 1, "spent": 1}


# --- Sessions ---------------------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-9")
def test_a_session_key_proven_by_a_member_stays_proven_and_stays_that_members(store):
    admit(store, BOB, "bob")
    assert store.session_owner(PHONE) is None
    store.record_session(PHONE, "alice", "s1", proven=False, sealed=True, now=NOW)
    assert store.session_owner(PHONE) == SessionKey(PHONE, "alice", "s1", False, True, NOW)
    store.record_session(PHONE, "bob", "s2", proven=True, sealed=False, now=NOW + 1)  # nobody had proven it
    store.record_session(PHONE, "bob", "s3", proven=False, sealed=False, now=NOW + 2)
    assert store.session_owner(PHONE) == SessionKey(PHONE, "bob", "s3", True, False, NOW + 2)
    with pytest.raises(StoreError, match="^the session key belongs to another member$"):
        store.record_session(PHONE, "alice", "s4", proven=True, sealed=False, now=NOW + 3)
    assert store.session_owner(PHONE).member_id == "bob"


@pytest.mark.spec("STORE-10")
def test_a_returning_session_finds_its_own_state_and_a_new_one_its_members_newest(store):
    admit(store, BOB, "bob")
    phone = Saved([{"name": "eng", "role": "lead"}], {"avatar": "☕"}, False, "testing", "Al", {"toolCalls": 3})
    laptop = Saved([], {}, True, None, None, {})
    assert store.load_state("alice", "phone") is None
    store.save_state("alice", "phone", laptop, NOW)
    store.save_state("alice", "phone", phone, NOW + 1)
    store.save_state("alice", "laptop", laptop, NOW + 2)
    store.save_state("bob", "phone", laptop, NOW + 3)
    assert store.load_state("alice", "phone") == phone._replace(last_seen=NOW + 1)
    assert store.load_state("alice", "laptop") == laptop._replace(last_seen=NOW + 2)
    assert store.load_state("alice", "tablet") == laptop._replace(last_seen=NOW + 2)
    assert store.newest_states() == {"alice": laptop._replace(last_seen=NOW + 2),
                                     "bob": laptop._replace(last_seen=NOW + 3)}


# --- Messages and deliveries ------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-11")
def test_each_recipient_has_one_row_with_its_own_state(store):
    admit(store, BOB, "bob")
    store.record_session(PHONE, "alice", "s1", proven=False, sealed=False, now=NOW)
    seq = send(store, "m1", PHONE, BOB, CAROL)
    store.commit()
    store.add_delivery(seq, BOB, None, None)
    with pytest.raises(sqlite3.IntegrityError):
        store.commit()
    store.rollback()
    store.settle([(seq, PHONE)], "shown", NOW + 5)
    message, recipients = store.message_status("m1")
    assert message == (seq, "m1", "alice", "*", NOW, NOW + 7 * DAY)
    assert recipients == [
        DeliveryRow(PHONE, "alice", "shown", NOW + 5),  # the name of the session's member
        DeliveryRow(BOB, "bob", "queued", None),
        DeliveryRow(CAROL, None, "queued", None),
    ]
    assert store.message_status("m2") is None
    assert store.queue_depth() == 2


@pytest.mark.spec("STORE-11")
def test_a_delivery_only_moves_forward(store):
    steps = {  # from -> state after being settled as delivered, final, shown, expired
        "queued": ["delivered", "final", "shown", "expired"],
        "delivered": ["delivered", "final", "shown", "delivered"],
        "final": ["final", "final", "shown", "final"],
        "shown": ["shown", "shown", "shown", "shown"],
        "expired": ["expired", "expired", "expired", "expired"],
    }
    assert list(steps) == list(DELIVERY_STATES)
    for start, ends in steps.items():
        for step, end in zip(["delivered", "final", "shown", "expired"], ends, strict=True):
            id = f"{start}-{step}"
            seq = send(store, id, BOB)
            if start != "queued":
                store.settle([(seq, BOB)], start, NOW + 1)
            store.settle([(seq, BOB)], step, NOW + 2)
            _, (row,) = store.message_status(id)
            at = NOW + 2 if end != start else None if start == "queued" else NOW + 1
            assert (id, row.state, row.at) == (id, end, at)


def test_settling_nothing_opens_no_transaction(store):
    store.settle([], "final", NOW)
    assert not store.changed


@pytest.mark.spec("STORE-11")
def test_when_a_connection_ends_what_it_had_not_shown_is_queued_again(store):
    seqs = [send(store, f"m{n}", BOB) for n in range(5)]
    store.settle([(seq, BOB) for seq in seqs[:4]], "delivered", NOW)
    store.settle([(seqs[3], BOB)], "shown", NOW)
    store.finish_delivered(BOB, seqs[1], NOW + 1)
    assert store.requeue_unshown(BOB) == 1
    assert queued(store, BOB) == ["m2", "m4"]
    assert [state_of(store, f"m{n}")[BOB] for n in range(5)] == ["final", "final", "queued", "shown", "queued"]


@pytest.mark.spec("STORE-12")
def test_pending_messages_come_in_the_order_of_acceptance_through_the_priority_gate(store):
    for number, priority in enumerate(["low", "now", "next", "now", "low", "next"]):
        send(store, f"m{number}-{priority}", BOB, priority=priority)
    send(store, "for-carol", CAROL)
    store.add_delivery(1, CAROL, None, None)  # a recipient of an earlier message
    assert queued(store, BOB) == ["m0-low", "m1-now", "m2-next", "m3-now", "m4-low", "m5-next"]
    assert queued(store, BOB, ["now"]) == ["m1-now", "m3-now"]
    assert queued(store, BOB, ["now", "next"]) == ["m1-now", "m2-next", "m3-now", "m5-next"]
    assert queued(store, BOB, []) == []
    assert queued(store, CAROL) == ["m0-low", "for-carol"]

    page = store.pending(BOB, ALL, NOW, 0, 4)
    assert [row.id for row in page] == ["m0-low", "m1-now", "m2-next", "m3-now"]
    assert [row.id for row in store.pending(BOB, ALL, NOW, page[-1].seq, 4)] == ["m4-low", "m5-next"]


@pytest.mark.spec("STORE-12")
def test_a_pending_row_says_everything_a_push_needs(store):
    store.accept(id="m", sender_member="alice", sender_key=PHONE, sender_name="Alice", target="@eng", priority="now",
                 nonce="nonce", ciphertext="body", subtype="reminder", client_id=None, digest=None, now=NOW,
                 expires_at=NOW + 1)
    store.add_delivery(1, BOB, None, "sealed")
    assert store.pending(BOB, ALL, NOW, 0, 10) == [
        (1, "m", PHONE, "Alice", ALICE, "@eng", "now", "nonce", "body", "reminder", NOW, "sealed")]


@pytest.mark.spec("STORE-13")
def test_a_message_that_nobody_fetched_in_seven_days_expires(store):
    send(store, "m1", BOB)
    last = NOW + 7 * DAY
    assert queued(store, BOB, now=last - 1) == ["m1"]
    assert queued(store, BOB, now=last) == []  # whether or not the retention pass has been here
    assert store.prune(last - 1) == 0
    assert store.prune(last) == 1
    assert store.message_status("m1")[1] == [DeliveryRow(BOB, None, "expired", last)]
    assert store.queue_depth() == 0


@pytest.mark.spec("STORE-14")
def test_a_session_claims_what_waits_for_its_member_and_gives_back_what_it_did_not_take(store):
    first, second = send(store, "m1", BOB), send(store, "m2", BOB)
    assert store.claim_held(BOB, PHONE) == 2
    assert (queued(store, BOB), queued(store, PHONE)) == ([], ["m1", "m2"])
    store.settle([(first, PHONE)], "shown", NOW)
    own = send(store, "m3", PHONE)  # addressed to the session itself: nobody inherits it
    send(store, "m4", PHONE, held_for=BOB)

    assert store.release_held(PHONE) == 2
    assert (queued(store, BOB), queued(store, PHONE)) == (["m2", "m4"], ["m3"])
    assert store.claim_held(BOB, LAPTOP) == 2
    assert queued(store, LAPTOP) == ["m2", "m4"]
    assert state_of(store, "m2") == {LAPTOP: "queued"}
    assert (first, second, own) == (1, 2, 3)


@pytest.mark.spec("STORE-14")
def test_a_message_that_a_session_has_already_is_not_delivered_to_it_again(store):
    seq = send(store, "m1", PHONE, LAPTOP, held_for=BOB)  # both sessions of one member
    store.settle([(seq, LAPTOP)], "shown", NOW)
    store.release_held(PHONE)
    assert state_of(store, "m1") == {BOB: "queued", LAPTOP: "shown"}
    assert store.claim_held(BOB, LAPTOP) == 0
    assert state_of(store, "m1") == {LAPTOP: "shown"}

    send(store, "m2", PHONE, LAPTOP, held_for=BOB)
    assert (store.release_held(PHONE), store.release_held(LAPTOP)) == (1, 0)
    assert state_of(store, "m2") == {BOB: "queued"}
    assert store.claim_held(BOB, BOB) == 0  # a session without a key of its own
    assert queued(store, BOB) == ["m2"]


@pytest.mark.spec("STORE-15")
def test_at_most_200_multicast_messages_wait_for_one_member_and_direct_ones_are_left_alone(store):
    send(store, "direct", BOB, target=BOB)
    for number in range(203):
        send(store, f"m{number}", BOB, target="@eng", priority="now" if number % 2 else "next")
        assert store.trim_held(BOB, 200, NOW + number) == (1 if number >= 200 else 0)
    assert store.queue_depth() == 201
    waiting = [row.id for row in store.pending(BOB, ALL, NOW, 0, 1000)]
    assert waiting == ["direct", *(f"m{number}" for number in range(3, 203))]
    assert store.message_status("m2")[1] == [DeliveryRow(BOB, None, "expired", NOW + 202)]


@pytest.mark.spec("STORE-16")
def test_a_repeated_send_finds_its_first_result(store, directory):
    admit(store, BOB, "bob")
    send(store, "m1", BOB, CAROL, client_id="c1")
    assert store.find_client_message("alice", "c1") == ("m1", "d", 2, 0)
    assert store.find_client_message("bob", "c1") is None
    assert store.find_client_message("alice", "c2") is None
    store.commit()
    assert store.find_client_message("alice", "c1") == ("m1", "d", 2, 0)
    send(store, "m2", BOB, client_id="c1")
    with pytest.raises(sqlite3.IntegrityError):
        store.commit()
    store.rollback()
    assert store.message_status("m2") is None
    send(store, "m3", BOB)
    send(store, "m4", BOB)  # no client id: nothing to compare
    store.commit()
    store.close()
    with closing(Store(directory)) as again:
        assert again.find_client_message("alice", "c1") == ("m1", "d", 2, 0)


@pytest.mark.spec("STORE-17")
def test_after_a_restart_what_was_on_its_way_is_queued_again(store, directory):
    seqs = [send(store, f"m{n}", PHONE) for n in range(4)]
    store.settle([(seqs[0], PHONE)], "final", NOW)
    store.settle([(seqs[1], PHONE)], "shown", NOW)
    store.settle([(seqs[2], PHONE)], "delivered", NOW)
    held = send(store, "held", BOB)
    store.claim_held(BOB, PHONE)
    store.settle([(held, PHONE)], "delivered", NOW)
    store.commit()
    store.close()
    with closing(Store(directory)) as again:
        assert queued(again, PHONE) == ["m2", "m3"]
        assert queued(again, BOB) == ["held"]  # whichever session of bob's comes first
        assert state_of(again, "m0") == {PHONE: "final"}
        assert state_of(again, "m1") == {PHONE: "shown"}
        assert send(again, "next", PHONE) == held + 1
        assert queued(again, PHONE) == ["m2", "m3", "next"]


# --- State ------------------------------------------------------------------------------------------------------------

@pytest.mark.spec("STORE-18")
def test_shared_state_keeps_the_last_write_and_counts_the_writes(store):
    assert store.get_state("plan") is None
    assert store.set_state("plan", {"b": [1, 2.5, None, "é"], "a": True}, "alice", "Alice", NOW) == 1
    assert store.set_state("plan", None, None, "Bob", NOW + 1) == 2
    assert store.get_state("plan") == ("plan", None, 2, "Bob", NOW + 1)
    assert store.set_state("a key", "v", "alice", "Alice", NOW) == 1
    assert [(row.key, row.value) for row in store.list_state()] == [("a key", "v"), ("plan", None)]


def test_a_value_that_could_be_decoded_can_be_kept_however_deep_it_is(store):
    for depth in (100, 5000):  # SQLite's own JSON functions stop at 1000
        try:
            value = json.loads("[" * depth + "]" * depth)
        except RecursionError:
            continue
        store.set_state("deep", value, "alice", "Alice", NOW)
        assert store.get_state("deep").value == value


# --- Retention --------------------------------------------------------------------------------------------------------

def count(store: Store, table: str) -> int:
    return store._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


@pytest.mark.spec("STORE-19")
def test_a_message_is_deleted_seven_days_after_its_last_delivery_was_settled(store):
    early, late = send(store, "early", BOB, CAROL), send(store, "late", BOB, CAROL)
    store.settle([(early, BOB), (early, CAROL), (late, BOB)], "final", NOW)
    store.settle([(late, CAROL)], "shown", NOW + 3 * DAY)
    assert store.prune(NOW + 7 * DAY - 1) == 0
    assert store.prune(NOW + 7 * DAY) > 0
    assert (store.message_status("early"), count(store, "message"), count(store, "delivery")) == (None, 1, 2)
    assert store.prune(NOW + 10 * DAY - 1) == 0
    assert store.prune(NOW + 10 * DAY) == 1
    assert (count(store, "message"), count(store, "delivery")) == (0, 0)


@pytest.mark.spec("STORE-19")
def test_each_retention_pass_is_bounded_and_gets_past_what_has_to_stay(store):
    for number in range(10):  # settled late: these stay a while
        store.settle([(send(store, f"stays{number}", BOB), BOB)], "final", NOW + 6 * DAY)
    for number in range(20):
        store.settle([(send(store, f"goes{number}", BOB), BOB)], "final", NOW)
    for number in range(7):
        send(store, f"overdue{number}", CAROL, expires_at=NOW + DAY)
    now = NOW + 8 * DAY
    touched = []
    while not touched or touched[-1]:
        touched.append(store.prune(now, limit=4))
    assert max(touched) <= 8  # 4 passed and 4 deleted
    assert count(store, "message") == 17
    assert store.queue_depth() == 0
    assert sum(store.prune(now + 7 * DAY) for _ in range(2)) == 17  # a walk may begin in the middle
    assert count(store, "message") == 0


@pytest.mark.spec("STORE-19", "STORE-9")
def test_session_keys_and_saved_states_are_forgotten_after_90_days_without_use(store):
    for number, key in enumerate([PHONE, LAPTOP, "53" * 32]):
        store.record_session(key, "alice", f"s{number}", proven=True, sealed=False, now=NOW + number)
        store.save_state("alice", f"s{number}", Saved([], {}, True, None, None, {}), NOW + number)
    send(store, "m1", LAPTOP, now=NOW + 89 * DAY, expires_at=NOW + 96 * DAY)
    assert store.prune(NOW + 90 * DAY) == 0
    assert store.prune(NOW + 90 * DAY + 2, limit=1) == 2  # one key, one state
    assert store.prune(NOW + 90 * DAY + 2) == 1
    assert store.session_owner(PHONE) is None
    assert store.session_owner(LAPTOP) is not None  # a message waits for it
    assert store.load_state("alice", "s0").last_seen == NOW + 2
    assert store.prune(NOW + 96 * DAY) == 4  # the message expires, so its key goes too; and the key and state of s2
    assert (store.session_owner(LAPTOP), store.load_state("alice", "s0")) == (None, None)


# --- Audit chain ------------------------------------------------------------------------------------------------------

def milliseconds(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


@pytest.mark.spec("AUDIT-1", "AUDIT-2", "AUDIT-3")
def test_the_chain_of_the_shared_vectors_comes_out_byte_for_byte(directory):
    chain = VECTORS["audit_chain_sorted_keys"]
    with closing(found(directory, chain["mesh_id"])) as store:
        assert store.audit_head == "genesis"
        for entry in chain["entries"]:
            store.audit(entry["event_type"], entry["actor_member_id"], None, entry["payload"],
                        milliseconds(entry["created_at"]))
            assert store.audit_head == entry["hash"]
        store.commit()
        assert verify_audit(directory) == AuditVerdict(True, 4, None, chain["entries"][-1]["hash"])
        rows = sql(directory, "SELECT id, prev_hash, hash, payload FROM audit ORDER BY id")
    assert [row[:3] for row in rows] == [
        (number, entry["prev_hash"], entry["hash"]) for number, entry in enumerate(chain["entries"], 1)]
    assert rows[2][3] == '{"key":"café","value":{"a":[true,null,1.5,"line\\nbreak \\"q\\" \\\\ / \\u0007"],"z":1}}'


@pytest.mark.spec("AUDIT-2")
def test_a_payload_without_a_canonical_form_is_not_logged(store):
    with pytest.raises(ValueError, match="JSON"):
        store.audit("x", None, None, {"n": float("nan")}, NOW)
    assert (store.audit_head, store.changed) == ("genesis", False)


@pytest.mark.spec("AUDIT-6")
def test_a_chain_brought_from_upstream_verifies_because_the_stored_text_is_the_hashed_text(directory):
    load_upstream_chain(directory)
    assert verify_audit(directory) == (True, 4, None, VECTORS["audit_chain"]["entries"][-1]["hash"])


def load_upstream_chain(directory: Path) -> None:
    chain = VECTORS["audit_chain"]
    found(directory, chain["mesh_id"]).close()
    with closing(sqlite3.connect(directory / "mesh.db")) as db, db:
        db.executemany("INSERT INTO audit VALUES (?, ?, ?, NULL, ?, ?, ?, ?)", [
            (number, entry["event_type"], entry["actor_member_id"], entry["payload_json"], entry["prev_hash"],
             entry["hash"], milliseconds(entry["created_at"])) for number, entry in enumerate(chain["entries"], 1)])


@pytest.mark.spec("AUDIT-6")
@pytest.mark.parametrize("case", VECTORS["audit_chain_broken"], ids=lambda case: case["name"])
def test_the_first_entry_that_was_tampered_with_is_found(directory, case):
    load_upstream_chain(directory)
    id = case["first_bad_index"] + 1
    tampering = (f"DELETE FROM audit WHERE id = {id}" if "remove_index" in case
                 else f"UPDATE audit SET hash = '{case['edit']['hash']}' WHERE id = {id}" if "hash" in case["edit"]
                 else f"UPDATE audit SET payload = '{json.dumps(case['edit']['payload'])}' WHERE id = {id}")
    sql(directory, f"DROP TRIGGER audit_no_update;\nDROP TRIGGER audit_no_delete;\n{tampering}")
    verdict = verify_audit(directory)
    assert (verdict.valid, verdict.entries) == ((False, 3) if "remove_index" in case else (False, 4))
    assert verdict.broken_at == (id + 1 if "remove_index" in case else id)  # the first that does not fit


@pytest.mark.spec("AUDIT-6")
def test_an_entry_with_an_impossible_time_is_found_too(directory):
    load_upstream_chain(directory)
    sql(directory, f"DROP TRIGGER audit_no_update;\nUPDATE audit SET created_at = {10**18} WHERE id = 3")
    assert verify_audit(directory)[:3] == (False, 4, 3)


@pytest.mark.spec("AUDIT-8")
def test_entries_can_be_neither_changed_nor_deleted(store, directory):
    store.audit("peer_left", "alice", "Alice", {}, NOW)
    store.commit()
    for tampering in ("UPDATE audit SET actor_name = 'Eve'", "DELETE FROM audit", "DELETE FROM audit WHERE id = 1"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            sql(directory, tampering)


@pytest.mark.spec("AUDIT-3")
def test_two_entries_cannot_follow_the_same_one(store):
    store.audit("peer_left", "alice", "Alice", {}, NOW)
    store._head = (0, "genesis")
    store.audit("peer_left", "bob", "Bob", {}, NOW)
    with pytest.raises(sqlite3.IntegrityError):
        store.commit()


@pytest.mark.spec("AUDIT-7")
def test_an_entry_shares_the_fate_of_what_it_records(store, directory):
    send(store, "m1", BOB)
    store.audit("message_sent", "alice", "Alice", {"priority": "next", "targetSpec": BOB}, NOW)
    head = store.audit_head
    store.commit()
    send(store, "m2", BOB)
    store.audit("message_sent", "alice", "Alice", {"priority": "next", "targetSpec": BOB}, NOW)
    store.rollback()
    assert (store.message_status("m2"), store.audit_head) == (None, head)
    store.audit("peer_left", "alice", "Alice", {}, NOW)
    store.commit()
    assert verify_audit(directory) == (True, 2, None, store.audit_head)
    store.close()
    with closing(Store(directory)) as again:
        again.audit("peer_joined", "alice", "Alice", {}, NOW)
        again.commit()
        assert verify_audit(directory) == (True, 3, None, again.audit_head)


@pytest.mark.spec("AUDIT-5")
def test_the_log_is_read_newest_first_in_bounded_pages(store):
    for number in range(250):
        store.audit("message_sent" if number % 5 else "state_set", "alice" if number else None,
                    "Alice" if number > 1 else None, {"n": number}, NOW + number)
    rows, total = store.audit_page(2, 0)
    assert total == 250
    assert rows == [AuditRow(250, "message_sent", "Alice", {"n": 249}, store.audit_head, NOW + 249),
                    AuditRow(249, "message_sent", "Alice", {"n": 248}, rows[1].hash, NOW + 248)]
    rows, total = store.audit_page(50, 248)
    assert [(row.id, row.actor) for row in rows] == [(2, "alice"), (1, "system")]
    rows, total = store.audit_page(3, 1, "state_set")
    assert ([row.payload["n"] for row in rows], total) == ([240, 235, 230], 50)
    assert store.audit_page(10, 0, "no_such_event") == ([], 0)
    assert len(store.audit_page(100_000, 0)[0]) == 200
    assert store.audit_page(-1, -1)[0] == []


def test_an_empty_log_is_valid(store, directory):
    assert verify_audit(directory) == (True, 0, None, "genesis")
    assert store.audit_page(50, 0) == ([], 0)


# --- Every query is bounded -------------------------------------------------------------------------------------------

def test_nothing_that_a_frame_can_cause_reads_a_whole_table(store):
    """Runs every method and asks SQLite how it would find the rows."""
    seen: set[str] = set()
    store._db.set_trace_callback(seen.add)
    invite(store, "t")
    store.enrol("t", BOB, "Bob", NOW)
    store.record_session(PHONE, "alice", "s1", proven=True, sealed=True, now=NOW)
    store.session_owner(PHONE)
    store.save_state("alice", "s1", Saved([], {}, True, None, None, {}), NOW)
    store.load_state("alice", "s1")
    seq = send(store, "m1", BOB, PHONE, client_id="c1")
    store.find_client_message("alice", "c1")
    store.pending(BOB, ALL, NOW, 0, 50)
    store.settle([(seq, PHONE)], "delivered", NOW)
    store.requeue_unshown(PHONE)
    store.finish_delivered(PHONE, seq, NOW)
    store.trim_held(BOB, 0, NOW)
    store.claim_held(BOB, PHONE)
    store.release_held(PHONE)
    store.message_status("m1")
    store.set_state("k", 1, "alice", "Alice", NOW)
    store.get_state("k")
    store.audit("state_set", "alice", "Alice", {}, NOW)
    store.audit_page(10, 0)
    store.audit_page(10, 0, "state_set")
    store.touch_member("alice", NOW)
    store.prune(NOW + 100 * DAY)
    store.revoke_invite("x", NOW)
    store.revoke_member("x", NOW)
    store._db.set_trace_callback(None)

    statements = [text for text in seen if text.split()[0] in ("SELECT", "UPDATE", "DELETE", "INSERT")]
    assert len(statements) > 30
    plans = {text: [row[3] for row in store._db.execute("EXPLAIN QUERY PLAN " + text)] for text in statements}
    scans = {(step, text) for text, steps in plans.items() for step in steps if step.startswith("SCAN")}
    assert {step for step, _ in scans} <= {"SCAN audit"}, scans  # with LIMIT, from the newest end
