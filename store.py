"""What a mesh keeps: one SQLite file, its schema, and every query on it.

This module decides what is kept, for how long, and which facts hold after a crash. It knows nothing of sockets,
frames or asyncio, and it is synchronous: each call is a few indexed look-ups.

Theory of operation
-------------------
A mesh is a directory; `mesh.db` in it is opened by one `Store`, and a lock file keeps every other broker out. That
makes the store the only writer, so it may look first and write afterwards, and keep the head of the audit chain and
the last sequence number in memory.

Every write method begins a transaction when none is open and never ends it. The broker handles many frames, calls
`commit` once, and only then speaks: what it says has been fsynced. If anything failed it calls `rollback`, and
nothing of the whole turn has happened. Messages, deliveries and audit entries are taken in memory and inserted
together, before the first statement that could see them or would follow them, at the latest by `commit`: under load
that halves their cost, and nothing can tell the difference. `OSError` and `sqlite3.Error` while opening become `StoreError`; from the
other methods `sqlite3.Error` passes through as it is, because the broker handles it in one place. SQLite may by
then have rolled back on its own (a full disk does that); the store refuses to write or commit until `rollback`.

Times are integer milliseconds since the epoch, UTC. Keys are lower-case hex. Columns that hold JSON take and return
Python objects; the text comes from one encoder, so the schema does not check it (SQLite's own limit on nesting would
let one member's value fail a turn). Text must be encodable as UTF-8: whoever decodes frames rejects lone surrogates.

Invariants of the schema
------------------------
    mesh         exactly one row; no table has a mesh_id column, so no query can reach another mesh.
    member       at most one live (not revoked) row per public key. Members are revoked, never deleted.
    invite       unique token; 0 <= used_count <= max_uses.
    session_key  a key proven by a member stays proven and stays that member's.
    saved        one row per (member, session id).
    message      seq is the order of acceptance; unique id; at most one per (sender member, client_id).
    delivery     one row per (message, recipient key). Its state only moves as SETTLES_BELOW says, and back to queued
                 when a connection ends. priority and expires_at repeat the message's, so that the gate and the
                 expiry are ranges of an index. held_for is the member key that gets the row when its session ends.
    state        one row per key; version counts its writes from 1.
    audit        id is the position in the chain, from 1 without gaps, so two entries cannot follow the same one;
                 prev_hash is the hash of the row before, `genesis` for the first; rows can neither be changed nor
                 deleted. The payload is the very text that was hashed.

Sections: 1 constants and tables, 2 schema, 3 rows, 4 opening a database, 5 the audit chain, 6 the store (opening and
transactions), 7 members and invites, 8 sessions, 9 messages, 10 deliveries, 11 state, 12 audit log, 13 retention.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

# --- 1. Constants and tables ------------------------------------------------------------------------------------------

DAY_MS = 24 * 60 * 60 * 1000
KEEP_SETTLED_MS = 7 * DAY_MS  # STORE-19: how long a message stays after its last delivery was settled
KEEP_SESSIONS_MS = 90 * DAY_MS  # STORE-19: how long an unused session key or saved state stays
AUDIT_PAGE_LIMIT = 200  # AUDIT-5
GENESIS = "genesis"  # AUDIT-3: what the first entry names as its predecessor
BUSY_TIMEOUT_S = 2.0  # for foreign tools that hold the file for a moment (backup, replication)
CACHE_KIB = 16 * 1024
WAL_KEEP_BYTES = 64 * 1024 * 1024
DATABASE, LOCK = "mesh.db", "lock"
SYNCHRONOUS = ("FULL", "NORMAL", "OFF")

#: Stored number of each delivery state (STORE-11). SQL texts below write the numbers.
#: delivered: acknowledged by a client that will also report shown; queued again when its connection ends.
#: final: delivered for good. shown and expired: terminal.
DELIVERY_STATES = {"queued": 0, "delivered": 1, "final": 2, "shown": 3, "expired": 4}
STATE_NAMES = tuple(DELIVERY_STATES)

#: A row may settle as the state on the left when the number of its present state is below the one on the right.
SETTLES_BELOW = {"delivered": 1, "final": 2, "shown": 3, "expired": 1}

#: What SQLite's primary result code means to the person who starts a broker.
REFUSALS = {
    sqlite3.SQLITE_NOTADB: "is not a database",
    sqlite3.SQLITE_CORRUPT: "is damaged",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_BUSY: "is locked by another program",
    sqlite3.SQLITE_LOCKED: "is locked by another program",
    sqlite3.SQLITE_FULL: "does not fit on the disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written (input/output error)",
}


class StoreError(Exception):
    """What the file system, SQLite or an invariant refused, in one sentence for a person."""


class JoinRefused(StoreError):
    """An invite does not admit this key (STORE-8); `code` is the reason on the wire."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


# --- 2. Schema --------------------------------------------------------------------------------------------------------

SCHEMA_1 = """
CREATE TABLE mesh (
  id TEXT PRIMARY KEY, slug TEXT NOT NULL, name TEXT NOT NULL, owner_pubkey TEXT NOT NULL,
  self_editable TEXT NOT NULL DEFAULT '{"displayName":true,"roleTag":true,"groups":true,"messageMode":true}',
  created_at INTEGER NOT NULL, archived_at INTEGER) STRICT;
CREATE UNIQUE INDEX mesh_only_one ON mesh((1));

CREATE TABLE member (
  id TEXT PRIMARY KEY, pubkey TEXT NOT NULL CHECK (length(pubkey) = 64 AND pubkey = lower(pubkey)),
  name TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('admin', 'member')), role_tag TEXT,
  groups TEXT NOT NULL, message_mode TEXT NOT NULL CHECK (message_mode IN ('push', 'inbox', 'off')),
  joined_at INTEGER NOT NULL, last_seen_at INTEGER, revoked_at INTEGER) STRICT;
CREATE UNIQUE INDEX member_live ON member(pubkey) WHERE revoked_at IS NULL;
CREATE INDEX member_pubkey ON member(pubkey);

CREATE TABLE invite (
  id TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE, role TEXT NOT NULL CHECK (role IN ('admin', 'member')),
  max_uses INTEGER NOT NULL CHECK (max_uses > 0),
  used_count INTEGER NOT NULL DEFAULT 0 CHECK (used_count BETWEEN 0 AND max_uses),
  preset TEXT NOT NULL, expires_at INTEGER NOT NULL, created_by TEXT, created_at INTEGER NOT NULL,
  revoked_at INTEGER) STRICT;

CREATE TABLE session_key (
  key TEXT PRIMARY KEY, member_id TEXT NOT NULL REFERENCES member(id), session_id TEXT NOT NULL,
  proven INTEGER NOT NULL, sealed INTEGER NOT NULL, last_seen INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX session_key_age ON session_key(last_seen);

CREATE TABLE saved (
  member_id TEXT NOT NULL REFERENCES member(id), session_id TEXT NOT NULL,
  groups TEXT NOT NULL, profile TEXT NOT NULL, visible INTEGER NOT NULL, summary TEXT, name TEXT, stats TEXT NOT NULL,
  last_seen INTEGER NOT NULL, PRIMARY KEY (member_id, session_id)) STRICT, WITHOUT ROWID;
CREATE INDEX saved_age ON saved(last_seen);

CREATE TABLE message (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, sender_member TEXT NOT NULL REFERENCES member(id),
  sender_key TEXT NOT NULL, sender_name TEXT NOT NULL, target TEXT NOT NULL,
  priority TEXT NOT NULL CHECK (priority = 'next' OR priority = 'now' OR priority = 'low'),  -- IN is 2 us slower
  nonce TEXT NOT NULL, ciphertext TEXT NOT NULL, subtype TEXT, client_id TEXT, digest TEXT,
  online INTEGER NOT NULL, held INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL) STRICT;
CREATE UNIQUE INDEX message_client ON message(sender_member, client_id) WHERE client_id IS NOT NULL;

CREATE TABLE delivery (
  message INTEGER NOT NULL REFERENCES message(seq) ON DELETE CASCADE, recipient TEXT NOT NULL,
  held_for TEXT, sealed_key TEXT, priority TEXT NOT NULL, expires_at INTEGER NOT NULL,
  state INTEGER NOT NULL DEFAULT 0 CHECK (state BETWEEN 0 AND 4), at INTEGER,
  PRIMARY KEY (message, recipient)) STRICT, WITHOUT ROWID;
-- Only what may still be delivered is indexed, so the settled past costs nothing. A query uses such an index when it
-- repeats the index's condition word for word.
CREATE INDEX delivery_open ON delivery(recipient, state, priority, message) WHERE state < 2;
CREATE INDEX delivery_due ON delivery(expires_at) WHERE state = 0;

CREATE TABLE state (
  key TEXT PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL,
  updated_by_member TEXT, updated_by TEXT NOT NULL, updated_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
  id INTEGER PRIMARY KEY, event_type TEXT NOT NULL, actor_id TEXT, actor_name TEXT, payload TEXT NOT NULL,
  prev_hash TEXT NOT NULL, hash TEXT NOT NULL, created_at INTEGER NOT NULL) STRICT;
-- message_sent is most of the log and costs no index: what is not in here is of that type.
CREATE INDEX audit_event ON audit(event_type, id) WHERE event_type <> 'message_sent';
-- AUDIT-8
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END;
"""

# The inserts of the hot path, in the order in which a turn's rows go in.
INSERT_MESSAGE = "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_DELIVERY = ("INSERT INTO delivery(message, recipient, held_for, sealed_key, priority, expires_at) "
                   "VALUES (?, ?, ?, ?, ?, ?)")
INSERT_AUDIT = "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)"

#: MIGRATIONS[n] takes a database from user_version n to n + 1. To change the schema, append a script; never edit one.
MIGRATIONS = [SCHEMA_1]


# --- 3. Rows ----------------------------------------------------------------------------------------------------------

class Mesh(NamedTuple):
    """The one row about the mesh itself."""
    id: str
    slug: str
    name: str
    owner_pubkey: str
    self_editable: dict[str, bool]  # which profile fields a member may change about itself
    created_at: int
    archived_at: int | None


class Member(NamedTuple):
    """A key that may enter the mesh; `groups` is a list of {name, role?}."""
    id: str
    pubkey: str
    name: str
    role: str
    role_tag: str | None
    groups: list[dict[str, Any]]
    message_mode: str
    joined_at: int
    last_seen_at: int | None
    revoked_at: int | None


class Invite(NamedTuple):
    """`preset` may hold displayName, roleTag, groups, messageMode for whoever joins with it."""
    id: str
    token: str
    role: str
    max_uses: int
    used_count: int
    preset: dict[str, Any]
    expires_at: int
    created_by: str | None
    created_at: int
    revoked_at: int | None


class SessionKey(NamedTuple):
    """Whose a session key is; `sealed`: its client opens sealed multicast."""
    key: str
    member_id: str
    session_id: str
    proven: bool
    sealed: bool
    last_seen: int


class Saved(NamedTuple):
    """What a session gets back when it returns."""
    groups: list[dict[str, Any]]
    profile: dict[str, Any]
    visible: bool
    summary: str | None
    name: str | None
    stats: dict[str, Any]
    last_seen: int = 0  # set by save_state


class SentMessage(NamedTuple):
    """The first result of a send that is being repeated."""
    id: str
    digest: str | None
    online: int
    held: int


class Pending(NamedTuple):
    """One message as one recipient gets it; `sender_pubkey` is the sender's member key."""
    seq: int
    id: str
    sender_key: str
    sender_name: str
    sender_pubkey: str
    target: str
    priority: str
    nonce: str
    ciphertext: str
    subtype: str | None
    created_at: int
    sealed_key: str | None


class MessageRow(NamedTuple):
    """A message without its content."""
    seq: int
    id: str
    sender_member: str
    target: str
    created_at: int
    expires_at: int


class DeliveryRow(NamedTuple):
    """One recipient; `state` is a name of DELIVERY_STATES, entered `at`; `name` is the member's, None if unknown."""
    recipient: str
    name: str | None
    state: str
    at: int | None


class StateRow(NamedTuple):
    """One shared value; `updated_by` is the writer's name at that time."""
    key: str
    value: Any
    version: int
    updated_by: str
    updated_at: int


class AuditRow(NamedTuple):
    """`actor` is the display name, else the member id, else `system`."""
    id: int
    event_type: str
    actor: str
    payload: dict[str, Any]
    hash: str
    created_at: int


class AuditVerdict(NamedTuple):
    """`entries` is the length of the chain, `broken_at` the id of the first bad entry, `head` the last stored hash."""
    valid: bool
    entries: int
    broken_at: int | None
    head: str


def _select(kind: type, table: str) -> str:
    """The SELECT whose columns are the fields of `kind`."""
    return f"SELECT {', '.join(kind._fields)} FROM {table}"


SELECT_MESH, SELECT_MEMBER = _select(Mesh, "mesh"), _select(Member, "member")
SELECT_INVITE, SELECT_SESSION_KEY = _select(Invite, "invite"), _select(SessionKey, "session_key")
SELECT_SAVED, SELECT_STATE = _select(Saved, "saved"), _select(StateRow, "state")
SELECT_MESSAGE = _select(MessageRow, "message")

JSON_FIELDS = {"self_editable", "groups", "preset", "profile", "stats", "value", "payload"}
BOOL_FIELDS = {"proven", "sealed", "visible"}


def _read(kind: type, row: Sequence | None) -> Any:
    """A row as `kind`, or None for none: JSON columns become objects, flags become booleans."""
    if row is None:
        return None
    return kind(*[json.loads(value) if field in JSON_FIELDS else bool(value) if field in BOOL_FIELDS else value
                  for field, value in zip(kind._fields, row, strict=True)])


# Canonical JSON: compact, non-ASCII kept, object keys sorted at every depth (AUDIT-2). NaN and infinities have none.
canonical: Callable[[Any], str] = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
compact: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


# --- 4. Opening a database --------------------------------------------------------------------------------------------

@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn what SQLite or the file system says about `path` into one sentence (STORE-5)."""
    where = f"{path.parent.name}/{path.name}"
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        raise StoreError(f"{where} {REFUSALS.get(code, f'was refused by SQLite: {error}')}") from None
    except OSError as error:
        raise StoreError(f"{where} cannot be used: {error.strerror}") from None


def lock(directory: Path) -> int:
    """Take the directory for this process; the descriptor holds the lock, and the kernel frees it with the process."""
    path = directory / LOCK
    with _refusals(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # STORE-4
    except OSError:
        os.close(descriptor)
        raise StoreError(f"{directory.name} is in use by another broker") from None
    return descriptor


def _connect(path: Path, synchronous: str) -> sqlite3.Connection:
    """A connection to an up-to-date schema. Nothing is written to a database that is not ours or too new."""
    if synchronous not in SYNCHRONOUS:
        raise StoreError(f"synchronous is one of {', '.join(SYNCHRONOUS)}")
    with _refusals(path), ExitStack() as undo:
        db = undo.enter_context(closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)))
        _check_version(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")  # STORE-2
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        _migrate(db)
        db.execute("PRAGMA foreign_keys = ON")
        undo.pop_all()  # it is the caller's to close
    return db


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a schema from a later program, and a database that some other program made (STORE-6)."""
    version = _version(db)
    if version > len(MIGRATIONS):
        raise StoreError(f"{path.parent.name}/{path.name} has schema {version}, newer than the {len(MIGRATIONS)} "
                         "this program knows: use the newer program")
    if version == 0 and db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise StoreError(f"{path.parent.name}/{path.name} is not a mesh's database")


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _migrate(db: sqlite3.Connection) -> None:
    """Apply the scripts that are missing, each with its version number in one transaction (STORE-6)."""
    for version in range(_version(db), len(MIGRATIONS)):
        try:
            db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[version]} PRAGMA user_version = {version + 1}; COMMIT;")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _read_only(directory: Path | str) -> sqlite3.Connection:
    """A connection of one's own that cannot write, for other threads and other processes."""
    path = Path(directory).resolve() / DATABASE
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)


def mesh_identity(directory: Path | str) -> tuple[str, str] | None:
    """(mesh id, slug) of a mesh directory, None when there is no mesh in it. Neither locks nor migrates.

    Raises StoreError when `mesh.db` is there but cannot be read.
    """
    path = Path(directory) / DATABASE
    if not path.is_file():
        return None
    with _refusals(path), closing(_read_only(directory)) as db:
        if _version(db) == 0:
            return None
        return db.execute("SELECT id, slug FROM mesh").fetchone()


# --- 5. The audit chain: hash and verification ------------------------------------------------------------------------

@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def audit_hash(previous: str, mesh_id: str, event: str, actor_id: str | None, payload: str, created_at: int) -> str:
    """SHA-256 in lower-case hex of the six parts of an entry joined by `|` (AUDIT-1)."""
    seconds, milliseconds = divmod(created_at, 1000)
    text = (f"{previous}|{mesh_id}|{event}|{'null' if actor_id is None else actor_id}|{payload}|"
            f"{_second(seconds)}.{milliseconds:03d}Z")
    return hashlib.sha256(text.encode()).hexdigest()


def verify_audit(directory: Path | str) -> AuditVerdict:
    """Compute the chain again from the stored rows (AUDIT-6), on a connection of its own: fit for another thread.

    Reads what was committed when it began. Raises StoreError when the database cannot be read.
    """
    with _refusals(Path(directory) / DATABASE), closing(_read_only(directory)) as db:
        db.execute("BEGIN")  # one snapshot for all the reads
        mesh_id = db.execute("SELECT id FROM mesh").fetchone()[0]
        entries = db.execute("SELECT count(*) FROM audit").fetchone()[0]
        broken_at = _first_broken(db, mesh_id)
        head = db.execute("SELECT hash FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    return AuditVerdict(broken_at is None, entries, broken_at, head[0] if head else GENESIS)


def _first_broken(db: sqlite3.Connection, mesh_id: str) -> int | None:
    expected = GENESIS
    for id, event, actor_id, payload, previous, stored, created_at in db.execute(
            "SELECT id, event_type, actor_id, payload, prev_hash, hash, created_at FROM audit ORDER BY id"):
        try:
            hashed = audit_hash(previous, mesh_id, event, actor_id, payload, created_at)
        except (ValueError, OverflowError, OSError):  # a time that no calendar has
            return id
        if previous != expected or stored != hashed:
            return id
        expected = stored
    return None


# --- 6. The store: opening and transactions ---------------------------------------------------------------------------

def random_id() -> str:
    """32 random characters of 0-9a-f."""
    return secrets.token_hex(16)


class Store:
    """The open database of one mesh. Use it from the thread that made it; see the module's text on transactions."""

    def __init__(self, directory: Path | str, *, synchronous: str = "FULL",
                 new_id: Callable[[], str] = random_id) -> None:
        """Open `<directory>/mesh.db`, bring its schema up to date and requeue what was on its way (STORE-17).

        `new_id` makes the ids of members and invites, 32 characters of 0-9A-Za-z. Raises StoreError.
        """
        self._directory = Path(directory)
        path = self._directory / DATABASE
        if not path.is_file():
            raise StoreError(f"{self._directory.name} holds no {DATABASE}")
        self._new_id = new_id
        self._wal = path.with_name(DATABASE + "-wal")
        with ExitStack() as undo:
            undo.callback(os.close, lock(self._directory))
            self._db = undo.enter_context(closing(_connect(path, synchronous)))
            with _refusals(path):
                self._begin_service()
            self._open = undo.pop_all()

    @classmethod
    def create(cls, directory: Path | str, *, mesh_id: str, slug: str, name: str, owner_pubkey: str, now: int,
               synchronous: str = "FULL", new_id: Callable[[], str] = random_id) -> Store:
        """Found a mesh in a new or empty directory and open it. Raises StoreError, also when one is there already.

        Only the owner's public key is kept (STORE-1). What a crash during creation leaves behind can be created again.
        """
        directory = Path(directory)
        path = directory / DATABASE
        with _refusals(path):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # STORE-1
        with ExitStack() as undo, _refusals(path):
            undo.callback(os.close, lock(directory))
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives -wal and -shm the same mode
            db = undo.enter_context(closing(_connect(path, synchronous)))
            if db.execute("SELECT 1 FROM mesh").fetchone():
                raise StoreError(f"{directory.name} holds a mesh already")
            db.execute("INSERT INTO mesh(id, slug, name, owner_pubkey, created_at) VALUES (?, ?, ?, ?, ?)",
                       (mesh_id, slug, name, owner_pubkey, now))
        return cls(directory, synchronous=synchronous, new_id=new_id)

    def _begin_service(self) -> None:
        """Read what is kept in memory, and undo what depended on connections, which no restart survives."""
        self._cursor = self._db.cursor()  # of all writes: a new one each time is a fifth of an insert's cost
        self._rows: dict[str, list[tuple]] = {INSERT_MESSAGE: [], INSERT_DELIVERY: [], INSERT_AUDIT: []}
        self._recent: dict[tuple[str, str], SentMessage] = {}  # by client id, those not spilled yet
        self._spilled = True
        mesh: Mesh | None = _read(Mesh, self._one(SELECT_MESH))
        if mesh is None:
            raise StoreError(f"{self._directory.name}/{DATABASE} holds no mesh")
        self._mesh = mesh
        self._page_size: int = self._one("PRAGMA page_size")[0]
        self._seq: int = self._one("SELECT ifnull(max(seq), 0) FROM message")[0]
        self._accepted, self._prune_after = (0, "", 0), 0
        self._head = self._committed_head = self._one(
            "SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1") or (0, GENESIS)
        self.changed = self._unmoved = False
        self._wal_mark = 0
        self._write("UPDATE delivery SET state = 0, at = NULL WHERE state < 2 AND state = 1")  # STORE-17
        self._release("held_for IS NOT NULL", ())
        self.commit()

    def close(self) -> None:
        """Undo what was not committed, and let another broker have the directory."""
        self._open.close()

    def _write(self, sql: str, values: Sequence = ()) -> sqlite3.Cursor:
        if not self._db.in_transaction:
            self._begin()
        self._spill()
        return self._cursor.execute(sql, values)

    def _append(self, sql: str, row: tuple) -> None:
        """Take a row of the hot path: the rows of a turn go in together, at half the cost of one after another."""
        if not self._db.in_transaction:
            self._begin()
        self._rows[sql].append(row)
        self._spilled = False

    def _spill(self) -> None:
        """Insert the rows taken, before anything looks at the tables or follows them."""
        if not self._spilled:
            self._spilled = True
            self._recent.clear()
            for sql, rows in self._rows.items():
                self._cursor.executemany(sql, rows)
                rows.clear()

    def _execute(self, sql: str, values: Sequence = ()) -> sqlite3.Cursor:
        """Every reading statement."""
        self._spill()
        return self._db.execute(sql, values)

    def _begin(self) -> None:
        """The one place where a transaction begins."""
        if self.changed:  # STORE-3: SQLite dropped the turn's first writes; the rest must not stand alone
            raise sqlite3.OperationalError("the transaction was rolled back by SQLite")
        self._db.execute("BEGIN IMMEDIATE")
        self.changed = True

    @property
    def written(self) -> int:
        """Rows written or taken since the store was opened: the same before and after means nothing was left behind."""
        return self._db.total_changes + sum(map(len, self._rows.values()))

    def probe(self) -> None:
        """Write something that changes nothing, to see whether a commit would succeed."""
        self._write("UPDATE mesh SET slug = slug")

    def commit(self) -> None:
        """Make everything since the last commit durable (STORE-2). After sqlite3.Error call `rollback`."""
        if not self.changed:
            return
        self._spill()
        if not self._db.in_transaction:
            raise sqlite3.OperationalError("the transaction was rolled back by SQLite")
        self._db.execute("COMMIT")
        self.changed, self._unmoved = False, True
        self._committed_head = self._head

    def rollback(self) -> None:
        """Forget everything since the last commit, whether or not SQLite has already done so (STORE-3)."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        for rows in self._rows.values():
            rows.clear()
        self._recent.clear()
        self._spilled = True
        self.changed = False
        self._head = self._committed_head  # AUDIT-7

    def checkpoint(self) -> bool:
        """Move the write-ahead log into the database; call it with nothing uncommitted.

        The log's file keeps its length and is overwritten from its start: a commit that makes it longer takes half as
        long again. Only a file beyond WAL_KEEP_BYTES is cut. False when a reader was in the way; call again later.
        """
        if self._wal_bytes() <= WAL_KEEP_BYTES:
            busy, logged, moved = self._one("PRAGMA wal_checkpoint(PASSIVE)")
        else:
            self._db.execute("PRAGMA busy_timeout = 0")  # the caller has a loop to serve: never wait here
            busy, logged, moved = self._one("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        self._unmoved, self._wal_mark = bool(busy) or moved < logged, self._wal_bytes()
        return not self._unmoved

    def wal_pages(self) -> int:
        """What `checkpoint` would find: 0 nothing, else the pages in the log; 1 while it overwrites its old length."""
        size = self._wal_bytes()
        return size // (self._page_size + 24) if size > self._wal_mark else int(self._unmoved)

    def _wal_bytes(self) -> int:
        return os.stat(self._wal).st_size if os.path.exists(self._wal) else 0

    def _one(self, sql: str, *values: Any) -> Any:
        """The first row, None when there is none."""
        return self._execute(sql, values).fetchone()

    # --- 7. Members and invites ---------------------------------------------------------------------------------------

    def mesh(self) -> Mesh:
        """The mesh as it was when the store was opened."""
        return self._mesh

    def members(self, *, revoked: bool = False) -> list[Member]:
        """Live members in the order they joined; with `revoked` the others too."""
        sql = SELECT_MEMBER + " WHERE revoked_at IS NULL OR ? ORDER BY joined_at, rowid"
        return [_read(Member, row) for row in self._execute(sql, (revoked,))]

    def member(self, id: str) -> Member | None:
        """The member with that id, revoked or not."""
        return _read(Member, self._one(SELECT_MEMBER + " WHERE id = ?", id))

    def member_by_key(self, pubkey: str) -> Member | None:
        """The live member with that public key."""
        return _read(Member, self._one(SELECT_MEMBER + " WHERE pubkey = ? AND revoked_at IS NULL", pubkey))

    def add_member(self, pubkey: str, name: str, role: str, now: int, *, role_tag: str | None = None,
                   groups: Sequence[Mapping[str, Any]] = (), message_mode: str = "push") -> Member:
        """Admit a key; StoreError "exists" when a live member has it (STORE-7)."""
        if self.member_by_key(pubkey):
            raise StoreError("exists")
        member = Member(self._new_id(), pubkey, name, role, role_tag, list(groups), message_mode, now, None, None)
        self._write("INSERT INTO member VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    member._replace(groups=compact(member.groups)))
        return member

    def revoke_member(self, id: str, now: int) -> bool:
        """End a membership; False when there is no such live member."""
        sql = "UPDATE member SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
        return self._write(sql, (now, id)).rowcount > 0

    def touch_member(self, id: str, now: int) -> None:
        """Remember when a member was last connected."""
        self._write("UPDATE member SET last_seen_at = ? WHERE id = ?", (now, id))

    def add_invite(self, token: str, *, role: str, max_uses: int, expires_at: int, preset: Mapping[str, Any],
                   created_by: str | None, now: int) -> Invite:
        """Register a token that admits `max_uses` keys; StoreError "exists" when it is registered."""
        if self._one("SELECT 1 FROM invite WHERE token = ?", token):
            raise StoreError("exists")
        invite = Invite(self._new_id(), token, role, max_uses, 0, dict(preset), expires_at, created_by, now, None)
        self._write("INSERT INTO invite VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    invite._replace(preset=compact(invite.preset)))
        return invite

    def invites(self) -> list[Invite]:
        """All invites, oldest first, used up, expired and revoked ones included."""
        return [_read(Invite, row) for row in self._execute(SELECT_INVITE + " ORDER BY created_at, rowid")]

    def revoke_invite(self, id: str, now: int) -> bool:
        """Close an invite to further use; False when there is no such open one."""
        sql = "UPDATE invite SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
        return self._write(sql, (now, id)).rowcount > 0

    def enrol(self, token: str, pubkey: str, name: str, now: int) -> tuple[Member, bool]:
        """Admit a key by invite: (member, False), or (member, True) when the key is a live member's already.

        Raises JoinRefused. The checks are in the order of STORE-8, and all come before the first write.
        """
        invite: Invite | None = _read(Invite, self._one(SELECT_INVITE + " WHERE token = ?", token))
        if invite is None:
            raise JoinRefused("invite_not_found")
        if invite.revoked_at is not None:
            raise JoinRefused("invite_revoked")
        if invite.expires_at < now:
            raise JoinRefused("invite_expired")
        if member := self.member_by_key(pubkey):
            return member, True  # STORE-8: burns no use
        if self._one("SELECT 1 FROM member WHERE pubkey = ?", pubkey):
            raise JoinRefused("member_revoked")  # STORE-7
        if invite.used_count >= invite.max_uses:
            raise JoinRefused("invite_exhausted")  # INV-9: one writer, one transaction
        preset = invite.preset
        member = self.add_member(
            pubkey, preset.get("displayName") or name, invite.role, now, role_tag=preset.get("roleTag"),
            groups=preset.get("groups") or (), message_mode=preset.get("messageMode") or "push")
        self._write("UPDATE invite SET used_count = used_count + 1 WHERE id = ?", (invite.id,))
        return member, False

    # --- 8. Sessions --------------------------------------------------------------------------------------------------

    def session_owner(self, session_key: str) -> SessionKey | None:
        """Whose that session key is, as far as remembered."""
        return _read(SessionKey, self._one(SELECT_SESSION_KEY + " WHERE key = ?", session_key))

    def record_session(self, session_key: str, member_id: str, session_id: str, *, proven: bool, sealed: bool,
                       now: int) -> None:
        """Remember who uses a session key. StoreError when another member has proven it (STORE-9)."""
        written = self._write(
            "INSERT INTO session_key VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "member_id = excluded.member_id, session_id = excluded.session_id, proven = max(proven, excluded.proven), "
            "sealed = excluded.sealed, last_seen = excluded.last_seen "
            "WHERE proven = 0 OR member_id = excluded.member_id",
            (session_key, member_id, session_id, proven, sealed, now))
        if written.rowcount == 0:
            raise StoreError("the session key belongs to another member")

    def save_state(self, member_id: str, session_id: str, saved: Saved, now: int) -> None:
        """Keep what the session will want back (STORE-10); `now` becomes its last_seen."""
        self._write("INSERT OR REPLACE INTO saved VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (member_id, session_id, compact(saved.groups), compact(saved.profile), saved.visible,
                     saved.summary, saved.name, compact(saved.stats), now))

    def load_state(self, member_id: str, session_id: str) -> Saved | None:
        """The session's saved state, else the newest of its member's, else None (STORE-10)."""
        sql = SELECT_SAVED + " WHERE member_id = ? ORDER BY session_id = ? DESC, last_seen DESC LIMIT 1"
        return _read(Saved, self._one(sql, member_id, session_id))

    def newest_states(self) -> dict[str, Saved]:
        """The newest saved state of each member that has any, by member id."""
        # SQLite takes the other columns from the row that has the maximum.
        sql = ("SELECT member_id, groups, profile, visible, summary, name, stats, max(last_seen) "
               "FROM saved GROUP BY member_id")
        return {member_id: _read(Saved, row) for member_id, *row in self._execute(sql)}

    # --- 9. Messages --------------------------------------------------------------------------------------------------

    def accept(self, *, id: str, sender_member: str, sender_key: str, sender_name: str, target: str, priority: str,
               nonce: str, ciphertext: str, subtype: str | None, client_id: str | None, digest: str | None, now: int,
               expires_at: int, online: int = 0, held: int = 0) -> int:
        """Keep a message and return its seq, the order of acceptance. Its recipients follow with `add_delivery`.

        `online` and `held` are the recipient counts that a repeated send will be told. A client_id that the sender
        has used before is sqlite3.IntegrityError when the turn's rows go in, at the latest by `commit`: look with
        `find_client_message` first (STORE-16).
        """
        self._seq = seq = self._seq + 1  # never reused while the store is open, rolled back or not
        self._append(INSERT_MESSAGE, (seq, id, sender_member, sender_key, sender_name, target, priority, nonce, ciphertext,
                                      subtype, client_id, digest, online, held, now, expires_at))
        self._accepted = seq, priority, expires_at
        if client_id is not None:
            self._recent[sender_member, client_id] = SentMessage(id, digest, online, held)
        return seq

    def find_client_message(self, member_id: str, client_id: str) -> SentMessage | None:
        """What became of the member's earlier send with that client_message_id (STORE-16)."""
        recent = self._recent.get((member_id, client_id))
        if recent is not None:
            return recent
        sql = "SELECT id, digest, online, held FROM message WHERE sender_member = ? AND client_id = ?"
        return _read(SentMessage, self._db.execute(sql, (member_id, client_id)).fetchone())  # on the hot path: no spill

    def message_status(self, message_id: str) -> tuple[MessageRow, list[DeliveryRow]] | None:
        """A message and its recorded recipients, ordered by key; None when it is unknown or no longer kept."""
        message: MessageRow | None = _read(MessageRow, self._one(SELECT_MESSAGE + " WHERE id = ?", message_id))
        if message is None:
            return None
        recipients = self._execute(
            "SELECT recipient, ifnull(owner.name, (SELECT name FROM member WHERE pubkey = recipient)), state, at "
            "FROM delivery LEFT JOIN session_key ON key = recipient LEFT JOIN member owner ON owner.id = member_id "
            "WHERE message = ? ORDER BY recipient", (message.seq,))
        return message, [DeliveryRow(key, name, STATE_NAMES[state], at) for key, name, state, at in recipients]

    # --- 10. Deliveries -----------------------------------------------------------------------------------------------

    def add_delivery(self, seq: int, recipient: str, held_for: str | None = None,
                     sealed_key: str | None = None) -> None:
        """Queue message `seq` for a session or member key; a second row for that key fails like a used client_id.

        `held_for` names the member key that inherits the row when the session ends without having it (STORE-14).
        """
        last, priority, expires_at = self._accepted  # nearly always this message
        if seq != last:
            priority, expires_at = self._one("SELECT priority, expires_at FROM message WHERE seq = ?", seq)
        self._append(INSERT_DELIVERY, (seq, recipient, held_for, sealed_key, priority, expires_at))  # STORE-11

    def pending(self, recipient: str, priorities: Sequence[str], now: int, after: int, limit: int) -> list[Pending]:
        """What is queued for a key (STORE-12): of these priorities, unexpired, seq above `after`, the first `limit`."""
        rows = [row for priority in priorities for row in self._execute(
            "SELECT seq, m.id, sender_key, sender_name, pubkey, target, d.priority, nonce, ciphertext, subtype, "
            "created_at, sealed_key FROM delivery d JOIN message m ON seq = d.message "
            "JOIN member ON member.id = sender_member WHERE recipient = ? AND state < 2 AND state = 0 "
            "AND d.priority = ? AND d.message > ? AND d.expires_at > ? ORDER BY d.message LIMIT ?",
            (recipient, priority, after, now, limit))]
        rows.sort(key=lambda row: row[0])  # acceptance order, whatever the priority
        return [Pending(*row) for row in rows[:limit]]

    def settle(self, rows: Iterable[tuple[int, str]], state: str, now: int) -> None:
        """Move (seq, recipient) rows forward to `state`; rows already there or beyond stay as they are (STORE-11)."""
        code, below = DELIVERY_STATES[state], SETTLES_BELOW[state]
        moves = [(code, now, seq, recipient, below) for seq, recipient in rows]
        if not moves:
            return
        if not self._db.in_transaction:
            self._begin()
        self._spill()
        self._cursor.executemany(
            "UPDATE delivery SET state = ?, at = ? WHERE message = ? AND recipient = ? AND state < ?", moves)

    def requeue_unshown(self, recipient: str) -> int:
        """The connection ended: what it acknowledged and did not show is queued again. Returns how many."""
        return self._write("UPDATE delivery SET state = 0, at = NULL WHERE recipient = ? AND state < 2 AND state = 1",
                           (recipient,)).rowcount

    def finish_delivered(self, recipient: str, up_to_seq: int, now: int) -> None:
        """Delivered rows of messages up to `up_to_seq` are final: they will not be queued again."""
        self._write("UPDATE delivery SET state = 2, at = ? WHERE recipient = ? AND state < 2 AND state = 1 "
                    "AND message <= ?", (now, recipient, up_to_seq))

    def claim_held(self, member_key: str, session_key: str) -> int:
        """A session takes what is queued for its member (STORE-14). Returns how many rows moved.

        A message that the session has already, in whatever state, is the same delivery: the member's row goes.
        """
        if session_key == member_key:  # it speaks as the member: what waits is addressed to it
            return 0
        moved = self._write("UPDATE OR IGNORE delivery SET recipient = ?, held_for = recipient "
                            "WHERE recipient = ? AND state < 2 AND state = 0", (session_key, member_key)).rowcount
        self._write("DELETE FROM delivery WHERE recipient = ? AND state < 2 AND state = 0", (member_key,))
        return moved

    def release_held(self, session_key: str) -> int:
        """A session is over: what it still had queued for its member goes back to the member key (STORE-14)."""
        return self._release("recipient = ? AND held_for IS NOT NULL", (session_key,))

    def _release(self, condition: str, values: Sequence) -> int:
        where = f"WHERE {condition} AND state < 2 AND state = 0"
        moved = self._write(
            f"UPDATE OR IGNORE delivery SET recipient = held_for, held_for = NULL {where}", values).rowcount
        self._write(f"DELETE FROM delivery {where}", values)  # the member key has that message already
        return moved

    def trim_held(self, member_key: str, keep: int, now: int) -> int:
        """Expire the oldest multicast messages that wait for a member beyond `keep` (STORE-15). Returns how many.

        Messages addressed to the key itself are not counted and not expired: a noisy group cannot push them out.
        """
        count = self._one("SELECT count(*) FROM delivery WHERE recipient = ? AND state < 2 AND state = 0", member_key)
        if count[0] <= keep:  # the usual case, answered by the index alone
            return 0
        return self._write(
            "UPDATE delivery SET state = 4, at = ? WHERE recipient = ? AND message IN (SELECT seq FROM delivery d "
            "JOIN message ON seq = d.message WHERE recipient = ? AND state < 2 AND state = 0 AND target <> recipient "
            "ORDER BY seq DESC LIMIT -1 OFFSET ?)", (now, member_key, member_key, keep)).rowcount

    def queue_depth(self) -> int:
        """How many rows are queued, expired or not."""
        return self._one("SELECT count(*) FROM delivery WHERE state < 2 AND state = 0")[0]

    # --- 11. State ----------------------------------------------------------------------------------------------------

    def set_state(self, key: str, value: Any, member_id: str | None, member_name: str, now: int) -> int:
        """Write a shared value, the last writer wins; returns its version, 1 for a new key (STORE-18)."""
        return self._write(
            "INSERT INTO state VALUES (?, ?, 1, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
            "version = version + 1, updated_by_member = excluded.updated_by_member, updated_by = excluded.updated_by, "
            "updated_at = excluded.updated_at RETURNING version",
            (key, compact(value), member_id, member_name, now)).fetchall()[0][0]

    def state_size(self, except_key: str) -> int:
        """Characters of all keys and values, but for one key that is about to be replaced."""
        return self._one("SELECT ifnull(sum(length(key) + length(value)), 0) FROM state WHERE key <> ?", except_key)[0]

    def get_state(self, key: str) -> StateRow | None:
        """The value under a key; None when nobody has written it (a stored null is a row)."""
        return _read(StateRow, self._one(SELECT_STATE + " WHERE key = ?", key))

    def list_state(self) -> list[StateRow]:
        """All shared values, by key."""
        return [_read(StateRow, row) for row in self._execute(SELECT_STATE + " ORDER BY key")]

    # --- 12. Audit log ------------------------------------------------------------------------------------------------

    @property
    def audit_head(self) -> str:
        """Hash of the newest entry, uncommitted ones included; `genesis` when there is none."""
        return self._head[1]

    def audit(self, event: str, actor_id: str | None, actor_name: str | None, payload: dict[str, Any],
              now: int) -> None:
        """Append an entry, in the transaction of the action that it records (AUDIT-7)."""
        (last, previous), text = self._head, canonical(payload)
        digest = audit_hash(previous, self._mesh.id, event, actor_id, text, now)
        # AUDIT-3: a fork would need one id twice
        self._append(INSERT_AUDIT, (last + 1, event, actor_id, actor_name, text, previous, digest, now))
        self._head = last + 1, digest

    def audit_page(self, limit: int, offset: int, event_type: str | None = None) -> tuple[list[AuditRow], int]:
        """Entries newest first, at most AUDIT_PAGE_LIMIT, of one event type if given; and how many there are in all."""
        limit, offset = min(max(limit, 0), AUDIT_PAGE_LIMIT), max(offset, 0)  # AUDIT-5
        columns = ("SELECT id, event_type, coalesce(actor_name, actor_id, 'system'), payload, hash, created_at "
                   "FROM audit ")
        if event_type is None:  # ids have no gaps: counting and skipping is arithmetic
            total = self._head[0]
            rows = self._execute(columns + "WHERE id <= ? ORDER BY id DESC LIMIT ?", (total - offset, limit))
        else:
            rare = "event_type <> 'message_sent'"
            if event_type == "message_sent":
                total = self._head[0] - self._one(f"SELECT count(*) FROM audit WHERE {rare}")[0]
                rare = "1"
            else:
                total = self._one(f"SELECT count(*) FROM audit WHERE {rare} AND event_type = ?", event_type)[0]
            rows = self._execute(columns + f"WHERE {rare} AND event_type = ? ORDER BY id DESC LIMIT ? OFFSET ?",
                                    (event_type, limit, offset))
        return [_read(AuditRow, row) for row in rows], total

    # --- 13. Retention ------------------------------------------------------------------------------------------------

    def prune(self, now: int, *, limit: int = 500, keep_settled: int = KEEP_SETTLED_MS) -> int:
        """One bounded pass of retention (STORE-19); returns rows changed or deleted, 0 when there was nothing to do.

        Each step handles at most `limit` rows, so a backlog takes several passes.
        """
        return (self._expire_overdue(now, limit) + self._delete_settled(now - keep_settled, limit)
                + self._forget_sessions(now - KEEP_SESSIONS_MS, limit))

    def _expire_overdue(self, now: int, limit: int) -> int:
        overdue = self._execute(
            "SELECT message, recipient FROM delivery WHERE state = 0 AND expires_at <= ? ORDER BY expires_at LIMIT ?",
            (now, limit)).fetchall()
        self.settle(overdue, "expired", now)  # STORE-13
        return len(overdue)

    def _delete_settled(self, before: int, limit: int) -> int:
        """Look at the next `limit` messages, oldest first, and delete those that nobody has waited for since `before`.

        The walk goes on where the last pass ended and starts again at the first young message, so messages that
        have to stay cannot hold up the others, and no pass looks at more than `limit`.
        """
        rows = self._execute(
            "SELECT seq, created_at > ?1, EXISTS (SELECT 1 FROM delivery WHERE message = seq "
            "AND (state < 2 OR at > ?1)) FROM message WHERE seq > ?2 ORDER BY seq LIMIT ?3",
            (before, self._prune_after, limit)).fetchall()
        young = next((index for index, row in enumerate(rows) if row[1]), len(rows))
        self._prune_after = rows[-1][0] if rows and young == limit else 0
        done = [seq for seq, _, wanted in rows[:young] if not wanted]
        for seq in done:
            self._write("DELETE FROM message WHERE seq = ?", (seq,))  # its deliveries go with it
        return len(done)

    def _forget_sessions(self, before: int, limit: int) -> int:
        """Forget unused session keys, unless something waits for them (STORE-9), and saved states."""
        keys = self._execute(
            "SELECT key FROM session_key WHERE last_seen < ? AND NOT EXISTS "
            "(SELECT 1 FROM delivery WHERE recipient = key AND state < 2) ORDER BY last_seen LIMIT ?",
            (before, limit)).fetchall()
        states = self._execute(
            "SELECT member_id, session_id FROM saved WHERE last_seen < ? ORDER BY last_seen LIMIT ?",
            (before, limit)).fetchall()
        for key in keys:
            self._write("DELETE FROM session_key WHERE key = ?", key)
        for state in states:
            self._write("DELETE FROM saved WHERE member_id = ? AND session_id = ?", state)
        return len(keys) + len(states)
