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
    memory       forgotten ones stay as rows and leave the search index.
    context      one row per (member, session id), at most CONTEXTS_KEPT.
    task         open -> claimed -> done, and back from claimed to open when the claimer is gone; claimer, the routing
                 key, is null exactly while it is open. seen_at: when the claimer was last known to be here. At most
                 TASKS_KEPT; the oldest done one makes room.
    stream       one row per name; subscribers and data are not kept.
    skill        one row per name.
    collection   a name as it was given; texts counts its vector rows, and the row goes with the last of them.
    vector       a stored text; terms holds the keys of its postings, so that it can be taken out again.
    term         in how many texts of a collection a term occurs: texts counts its postings. The key is the collection's
                 seq in the upper half, the hash of the term in the lower.
    posting      the share of a term in a text; the shares of one text, squared, add up to 1.
    file         a shared file; its content is the blob of that id. Every row has its blob, from before the commit that makes
                 the row until after the one that deletes it; a blob without a row is what a crash left, and goes when the
                 mesh is opened. target_member is the member whose key the target is.
    file_key     the key of an encrypted file, sealed for one peer; one row per (file, peer key).
    file_access  one row per download; complete once the last byte was written. The newest of each file are kept.
    audit        id is the position in the chain, from 1 without gaps, so two entries cannot follow the same one;
                 prev_hash is the hash of the row before, `genesis` for the first; rows can neither be changed nor
                 deleted. The payload is the very text that was hashed.
    schedule     one row per message that will still be sent; due_at is its next time. A one-shot's row goes in the
                 transaction that sends it, so it is sent once.
    watch        seen is the last value that was seen, null before the first.
    webhook      one row per name; of the secret only the SHA-256 is kept.

Blobs are the files in `files/` beside `mesh.db`, named by the ids of their rows, `.part` behind it while they arrive. The
members' own database, `sql.db` beside `mesh.db`, belongs to them: section 22 only guards it.

Sections: 1 constants and tables, 2 schema, 3 rows, 4 opening a database, 5 on a connection of one's own (audit chain,
search), 6 the store (opening and transactions), 7 members and invites, 8 sessions, 9 messages, 10 deliveries, 11 state,
12 memory and context, 13 tasks, 14 streams and skills, 15 audit log, 16 retention, 17 vectors, 18 schedules,
19 watches and webhooks, 20 files, 21 comparing texts,
22 the members' own database, 23 blobs.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import sqlite3
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import lru_cache
from heapq import nlargest
from itertools import takewhile
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

# --- 1. Constants and tables ------------------------------------------------------------------------------------------

DAY_MS = 24 * 60 * 60 * 1000
KEEP_SETTLED_MS = 7 * DAY_MS  # STORE-19: how long a message stays after its last delivery was settled
KEEP_SESSIONS_MS = 90 * DAY_MS  # STORE-19: how long an unused session key or saved state stays
AUDIT_PAGE_LIMIT = 200  # AUDIT-5
CONTEXTS_KEPT = 1000  # CTX-1
TASKS_KEPT = 10_000  # TASK-1
GENESIS = "genesis"  # AUDIT-3: what the first entry names as its predecessor
BUSY_TIMEOUT_S = 2.0  # for foreign tools that hold the file for a moment (backup, replication)
CACHE_KIB = 16 * 1024
WAL_KEEP_BYTES = 64 * 1024 * 1024
DATABASE, SQL_DATABASE, LOCK, FILES = "mesh.db", "sql.db", "lock", "files"
KEEP_FILE_MS = DAY_MS  # FILE-14: how long an ephemeral file stays
FILE_LIST = 100  # FILE-11
ACCESSES_KEPT = 100  # FILE-12: downloads remembered for each file
SYNCHRONOUS = ("FULL", "NORMAL", "OFF")

MAX_COLLECTIONS = 1000  # VEC-8
GRAM = 3  # VEC-3: characters of the pieces of a word
SEARCH_POSTINGS = 10_000  # VEC-5: how many postings the first pass of a search reads
SEARCH_CANDIDATES = 128  # VEC-5: how many texts the second pass compares

# SQL-6: what one request about the members' own database may take
SQL_SECONDS = 4.0  # a stock client gives up after five
SQL_ROWS = 1000
SQL_RESULT_BYTES = 768 * 1024
SQL_VALUE_BYTES = 256 * 1024
SQL_DATABASE_BYTES = 64 * 1024 * 1024
SQL_TOKENS = 500_000  # of a statement in which every WITH name is replaced by what it stands for
SQL_LOOK_EVERY = 1000  # SQLite's instructions between two looks at the clock
SQL_LIMITS = {sqlite3.SQLITE_LIMIT_LENGTH: SQL_VALUE_BYTES, sqlite3.SQLITE_LIMIT_COLUMN: 200,
              sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200, sqlite3.SQLITE_LIMIT_ATTACHED: 0,
              sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000}
SQL_PAGE_BYTES = 4096
SQL_READER = ("PRAGMA query_only = 1",)
SQL_WRITER = (f"PRAGMA page_size = {SQL_PAGE_BYTES}", "PRAGMA journal_mode = WAL",  # a long query holds up no change
              "PRAGMA foreign_keys = 1", f"PRAGMA max_page_count = {SQL_DATABASE_BYTES // SQL_PAGE_BYTES}",
              "BEGIN IMMEDIATE")
LARGEST_EXACT = 2**53  # SQL-4: integers beyond it do not survive a reader that has only doubles

#: What the authorizer admits, and how it names the rest (SQL-2, SQL-3).
SQL_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
SQL_WRITES = SQL_READS | {
    sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_REINDEX, sqlite3.SQLITE_ANALYZE, sqlite3.SQLITE_SAVEPOINT}
SQL_PRAGMAS = {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list"}
SQL_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer"}
SQL_REFUSED = {
    sqlite3.SQLITE_ATTACH: "ATTACH and VACUUM are", sqlite3.SQLITE_DETACH: "DETACH is",
    sqlite3.SQLITE_TRANSACTION: "BEGIN, COMMIT and ROLLBACK are", sqlite3.SQLITE_CREATE_VTABLE: "a virtual table is",
    sqlite3.SQLITE_CREATE_VIEW: "a view is", sqlite3.SQLITE_CREATE_TRIGGER: "a trigger is",
    sqlite3.SQLITE_CREATE_TEMP_TABLE: "a temporary table is", sqlite3.SQLITE_CREATE_TEMP_VIEW: "a temporary view is",
    sqlite3.SQLITE_CREATE_TEMP_TRIGGER: "a temporary trigger is"}

#: Stored number of each delivery state (STORE-11). SQL texts below write the numbers.
#: delivered: acknowledged by a client that will also report shown; queued again when its connection ends.
#: final: delivered for good. shown and expired: terminal.
DELIVERY_STATES = {"queued": 0, "delivered": 1, "final": 2, "shown": 3, "expired": 4}
STATE_NAMES = tuple(DELIVERY_STATES)

#: A row may settle as the state on the left when the number of its present state is below the one on the right.
SETTLES_BELOW = {"delivered": 1, "final": 2, "shown": 3, "expired": 1}

#: How what the broker limits in number is counted.
COUNTED = {
    "memory": "SELECT count(*) FROM memory WHERE forgotten_at IS NULL",
    "stream": "SELECT count(*) FROM stream",
    "skill": "SELECT count(*) FROM skill",
}

#: English words that say nothing about a text; a query does without them (MEM-2).
STOP_WORDS = frozenset("""
a about above after again against all am an and any are as at be because been before being below between both but by
can could did do does doing down during each few for from further had has have having he her here hers him his how i if
in into is it its itself just me more most my no nor not now of off on once only or other our ours out over own same she
should so some such than that the their theirs them then there these they this those through to too under until up very
was we were what when where which while who whom why will with would you your yours""".split())
_WORD = re.compile(r"[^\W_]+")

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

SCHEMA_VECTORS = """
CREATE TABLE collection (seq INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, texts INTEGER NOT NULL) STRICT;

CREATE TABLE vector (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, collection INTEGER NOT NULL REFERENCES collection(seq),
  text TEXT NOT NULL, metadata TEXT NOT NULL, terms BLOB NOT NULL, stored_by TEXT NOT NULL, stored_at INTEGER NOT NULL,
  embedder TEXT, embedding BLOB) STRICT;
CREATE INDEX vector_collection ON vector(collection, embedder);

CREATE TABLE term (key INTEGER PRIMARY KEY, texts INTEGER NOT NULL) STRICT;

CREATE TABLE posting (
  key INTEGER NOT NULL, vector INTEGER NOT NULL REFERENCES vector(seq), share REAL NOT NULL,
  PRIMARY KEY (key, vector)) STRICT, WITHOUT ROWID;
"""

SCHEMA_TIME = """
CREATE TABLE schedule (
  id TEXT PRIMARY KEY, member_id TEXT NOT NULL REFERENCES member(id), target TEXT NOT NULL, fallback TEXT,
  message TEXT NOT NULL, cron TEXT, due_at INTEGER NOT NULL, fired_count INTEGER NOT NULL, created_at INTEGER NOT NULL) STRICT;
CREATE INDEX schedule_due ON schedule(due_at);
CREATE INDEX schedule_member ON schedule(member_id, due_at);

CREATE TABLE watch (
  id TEXT PRIMARY KEY, member_id TEXT NOT NULL REFERENCES member(id), url TEXT NOT NULL, mode TEXT NOT NULL, extract TEXT,
  interval REAL NOT NULL, notify_on TEXT NOT NULL, headers TEXT NOT NULL, label TEXT, seen TEXT, checked_at INTEGER,
  created_at INTEGER NOT NULL) STRICT;

CREATE TABLE webhook (
  name TEXT PRIMARY KEY, secret_hash TEXT NOT NULL, member_id TEXT NOT NULL REFERENCES member(id),
  created_at INTEGER NOT NULL) STRICT;
"""

# The inserts of the hot path, in the order in which a turn's rows go in.
INSERT_MESSAGE = "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_DELIVERY = ("INSERT INTO delivery(message, recipient, held_for, sealed_key, priority, expires_at) "
                   "VALUES (?, ?, ?, ?, ?, ?)")
INSERT_AUDIT = "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)"

# FTS5 keeps the words, the table the text: triggers hold the two together. Nothing changes a text once it is in.
SCHEMA_SHARED = """
CREATE TABLE memory (
  rid INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, content TEXT NOT NULL, tags TEXT NOT NULL,
  author_id TEXT, author TEXT NOT NULL, created_at INTEGER NOT NULL, forgotten_at INTEGER) STRICT;
CREATE INDEX memory_live ON memory(rid) WHERE forgotten_at IS NULL;
CREATE VIRTUAL TABLE memory_text USING fts5(
  content, tags, content='memory', content_rowid='rid', tokenize='porter unicode61');
CREATE TRIGGER memory_kept AFTER INSERT ON memory BEGIN
  INSERT INTO memory_text(rowid, content, tags) VALUES (new.rid, new.content, new.tags); END;
CREATE TRIGGER memory_forgotten AFTER UPDATE OF forgotten_at ON memory BEGIN
  INSERT INTO memory_text(memory_text, rowid, content, tags) VALUES ('delete', old.rid, old.content, old.tags); END;

CREATE TABLE context (
  rid INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, member_id TEXT NOT NULL REFERENCES member(id),
  session_id TEXT NOT NULL, author TEXT NOT NULL, summary TEXT NOT NULL, files TEXT NOT NULL, findings TEXT NOT NULL,
  tags TEXT NOT NULL, updated_at INTEGER NOT NULL, UNIQUE (member_id, session_id)) STRICT;
CREATE INDEX context_age ON context(updated_at);
CREATE VIRTUAL TABLE context_text USING fts5(
  summary, files, findings, tags, content='context', content_rowid='rid', tokenize='porter unicode61');
CREATE TRIGGER context_kept AFTER INSERT ON context BEGIN
  INSERT INTO context_text(rowid, summary, files, findings, tags)
  VALUES (new.rid, new.summary, new.files, new.findings, new.tags); END;
CREATE TRIGGER context_replaced AFTER DELETE ON context BEGIN
  INSERT INTO context_text(context_text, rowid, summary, files, findings, tags)
  VALUES ('delete', old.rid, old.summary, old.files, old.findings, old.tags); END;

CREATE TABLE task (
  rid INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, assignee TEXT, priority TEXT NOT NULL,
  tags TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'claimed', 'done')),
  created_by TEXT NOT NULL, created_at INTEGER NOT NULL,
  claimer TEXT CHECK ((claimer IS NULL) = (status = 'open')), claimer_member TEXT, claimed_by TEXT,
  seen_at INTEGER, result TEXT, completed_at INTEGER) STRICT;
CREATE INDEX task_status ON task(status, rid);
CREATE INDEX task_assignee ON task(assignee, rid);
CREATE INDEX task_claimer ON task(claimer) WHERE status = 'claimed';
CREATE INDEX task_seen ON task(seen_at) WHERE status = 'claimed';

CREATE TABLE stream (
  name TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_by TEXT NOT NULL, created_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE skill (
  name TEXT PRIMARY KEY, description TEXT NOT NULL, instructions TEXT NOT NULL, tags TEXT NOT NULL, manifest TEXT NOT NULL,
  author_id TEXT, author TEXT NOT NULL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""

SCHEMA_FILES = """
CREATE TABLE file (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL, size INTEGER NOT NULL CHECK (size > 0),
  mime TEXT NOT NULL, sha256 TEXT NOT NULL, tags TEXT NOT NULL, target TEXT NOT NULL, target_member TEXT,
  owner_member TEXT REFERENCES member(id), owner_key TEXT, uploaded_by TEXT NOT NULL,
  encrypted INTEGER NOT NULL, uploaded_at INTEGER NOT NULL, expires_at INTEGER) STRICT;
CREATE INDEX file_newest ON file(uploaded_at);
CREATE INDEX file_due ON file(expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE file_key (
  file TEXT NOT NULL REFERENCES file(id) ON DELETE CASCADE, peer TEXT NOT NULL, sealed_key TEXT NOT NULL,
  PRIMARY KEY (file, peer)) STRICT, WITHOUT ROWID;
CREATE TABLE file_access (
  id INTEGER PRIMARY KEY, file TEXT NOT NULL REFERENCES file(id) ON DELETE CASCADE, key TEXT NOT NULL,
  name TEXT NOT NULL, at INTEGER NOT NULL, complete INTEGER NOT NULL) STRICT;
CREATE INDEX file_access_file ON file_access(file, id);
"""

#: MIGRATIONS[n] takes a database from user_version n to n + 1. To change the schema, append a script; never edit one.
MIGRATIONS = [SCHEMA_1, SCHEMA_VECTORS, SCHEMA_TIME, SCHEMA_SHARED, SCHEMA_FILES]


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


class Memory(NamedTuple):
    """Something remembered for good; `author` is the member's name at that time."""
    id: str
    content: str
    tags: list[str]
    author: str
    created_at: int


class Context(NamedTuple):
    """What one session has learned; `author` is its member's name."""
    id: str
    author: str
    summary: str
    files: list[str]
    findings: list[str]
    tags: list[str]
    updated_at: int


class Task(NamedTuple):
    """`status` is open, claimed or done. `claimer` is the routing key and `claimer_member` the member id of whoever
    claimed it or did it, `claimed_by` that member's name."""
    id: str
    title: str
    assignee: str | None
    priority: str
    tags: list[str]
    status: str
    created_by: str
    created_at: int
    claimer: str | None
    claimer_member: str | None
    claimed_by: str | None
    result: str | None
    completed_at: int | None


class Stream(NamedTuple):
    """A stream somebody has created."""
    name: str
    id: str
    created_by: str
    created_at: int


class Skill(NamedTuple):
    """An instruction text; `manifest` is whatever object its author gave, or None."""
    name: str
    description: str
    instructions: str
    tags: list[str]
    manifest: Any
    author: str
    created_at: int
    updated_at: int


class Schedule(NamedTuple):
    """A message that will be sent: at `due_at`, and if it has a `cron` expression again and again.

    `fallback` is the key to send to when the session `target` names is not there.
    """
    id: str
    member_id: str
    target: str
    fallback: str | None
    message: str
    cron: str | None
    due_at: int
    fired_count: int
    created_at: int


class Watch(NamedTuple):
    """A URL to be looked at every `interval` seconds; `seen` is the value of the check at `checked_at`."""
    id: str
    member_id: str
    url: str
    mode: str
    extract: str | None
    interval: float
    notify_on: str
    headers: dict[str, str]
    label: str | None
    seen: str | None
    checked_at: int | None
    created_at: int


class Webhook(NamedTuple):
    """A name under which the outside may speak; `secret_hash` is the SHA-256 of its secret, in hex."""
    name: str
    secret_hash: str
    member_id: str
    created_at: int


class File(NamedTuple):
    """A shared file. `target` is "" for everybody, a key or @group; ephemeral ones have `expires_at`; `owner_member` is
    None for what nobody proved to have uploaded, and then `owner_key` may name a key."""
    id: str
    name: str
    size: int
    mime: str
    sha256: str
    tags: list[str]
    target: str
    target_member: str | None
    owner_member: str | None
    owner_key: str | None
    uploaded_by: str
    encrypted: bool
    uploaded_at: int
    expires_at: int | None


class Reader(NamedTuple):
    """Who asks for files: the member, the keys it speaks with, and the targets that reach it."""
    member_id: str
    keys: list[str]
    targets: list[str]

    def values(self) -> tuple[str, ...]:
        """What `READABLE` asks for, in its order."""
        keys = compact(self.keys)
        return self.member_id, keys, keys, self.member_id, compact(self.targets)


class AccessRow(NamedTuple):
    """One download: by whom, when it began, and whether it came to its end."""
    name: str
    at: int
    complete: bool


class AuditRow(NamedTuple):
    """`actor` is the display name, else the member id, else `system`."""
    id: int
    event_type: str
    actor: str
    payload: dict[str, Any]
    hash: str
    created_at: int


class Vector(NamedTuple):
    """A stored text; `stored_by` is a member key."""
    id: str
    text: str
    metadata: dict[str, Any]
    stored_by: str
    stored_at: int


class SqlResult(NamedTuple):
    """What a request about `sql.db` gave: rows by column name, and how many were returned or changed."""
    columns: list[str]
    rows: list[dict[str, Any]]
    count: int
    tables: list[str] = []  # after a change: the tables there are now


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
SELECT_MESSAGE, SELECT_CONTEXT = _select(MessageRow, "message"), _select(Context, "context")
SELECT_TASK, SELECT_STREAM, SELECT_SKILL = _select(Task, "task"), _select(Stream, "stream"), _select(Skill, "skill")
SELECT_VECTOR = _select(Vector, "vector")
SELECT_SCHEDULE, SELECT_WATCH = _select(Schedule, "schedule"), _select(Watch, "watch")
SELECT_WEBHOOK = _select(Webhook, "webhook")
SELECT_FILE, SELECT_ACCESS = _select(File, "file"), _select(AccessRow, "file_access")
UNEXPIRED = "(expires_at IS NULL OR expires_at > ?)"
#: FILE-8: the owner; with a sealed key; or, what is not encrypted, whom the target reaches.
READABLE = ("(owner_member = ? OR owner_member IS NULL AND owner_key IN (SELECT value FROM json_each(?)) "
            "OR EXISTS (SELECT 1 FROM file_key WHERE file = file.id AND peer IN (SELECT value FROM json_each(?))) "
            "OR NOT encrypted AND (target_member = ? OR target IN (SELECT value FROM json_each(?))))")

JSON_FIELDS = {"self_editable", "groups", "preset", "profile", "stats", "value", "payload", "metadata", "headers", "tags",
               "files", "findings", "manifest"}
BOOL_FIELDS = {"proven", "sealed", "visible", "encrypted", "complete"}


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


def _read_only(directory: Path | str, name: str = DATABASE) -> sqlite3.Connection:
    """A connection of one's own that cannot write, for other threads and other processes."""
    path = Path(directory).resolve() / name
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


def has_appointments(directory: Path | str) -> bool:
    """Whether something in a mesh directory falls due without anybody connecting. Raises StoreError (SCHED-7)."""
    with _refusals(Path(directory) / DATABASE), closing(_read_only(directory)) as db:
        if _version(db) <= MIGRATIONS.index(SCHEMA_TIME):
            return False
        return bool(db.execute("SELECT EXISTS (SELECT 1 FROM schedule) OR EXISTS (SELECT 1 FROM watch)").fetchone()[0])


# --- 5. On a connection of one's own: the audit chain, search ---------------------------------------------------------

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


def match_text(query: str) -> str | None:
    """`query` as an FTS5 expression that asks for every word in it (MEM-2); None when nothing is left to ask for.

    Each word is quoted, so nothing in a query is an operator (MEM-3).
    """
    words = [word for word in _WORD.findall(query) if word.lower() not in STOP_WORDS]
    return " ".join(f'"{word}"' for word in words) or None


def search_memory(directory: Path | str, query: str, limit: int) -> list[Memory]:
    """The memories in which all words of `query` occur, best first (MEM-2); sees what is committed.

    Ranking looks at every match, up to 10 ms: run it in another thread. Raises StoreError.
    """
    return _search(directory, Memory, "memory", query, limit)


def search_contexts(directory: Path | str, query: str, limit: int) -> list[Context]:
    """The contexts in which all words of `query` occur, best first (CTX-3); otherwise like `search_memory`."""
    return _search(directory, Context, "context", query, limit)


def _search(directory: Path | str, kind: type, table: str, query: str, limit: int) -> list[Any]:
    expression = match_text(query)
    if expression is None:
        return []
    columns = ", ".join(f"{table}.{field}" for field in kind._fields)
    with _refusals(Path(directory) / DATABASE), closing(_read_only(directory)) as db:
        rows = db.execute(
            f"SELECT {columns} FROM {table}_text JOIN {table} ON rid = {table}_text.rowid WHERE {table}_text MATCH ? "
            "ORDER BY rank LIMIT ?", (expression, limit))  # rank is bm25
        return [_read(kind, row) for row in rows]


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
        self.directory = Path(directory)
        path = self.directory / DATABASE
        if not path.is_file():
            raise StoreError(f"{self.directory.name} holds no {DATABASE}")
        self._new_id = new_id
        self._wal = path.with_name(DATABASE + "-wal")
        with ExitStack() as undo:
            undo.callback(os.close, lock(self.directory))
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
        self._unwanted: list[str] = []  # blobs to remove once the deletion of their rows is committed
        mesh: Mesh | None = _read(Mesh, self._one(SELECT_MESH))
        if mesh is None:
            raise StoreError(f"{self.directory.name}/{DATABASE} holds no mesh")
        self._mesh = mesh
        self._seq: int = self._one("SELECT ifnull(max(seq), 0) FROM message")[0]
        self._accepted, self._prune_after, self._expired_to = (0, "", 0), 0, 0
        self._head = self._committed_head = self._one(
            "SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1") or (0, GENESIS)
        self.changed = False
        self._write("UPDATE delivery SET state = 0, at = NULL WHERE state < 2 AND state = 1")  # STORE-17
        self._release("held_for IS NOT NULL", ())
        self.commit()
        self._sweep()

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
        self.changed = False
        self._committed_head = self._head
        while self._unwanted:  # FILE-13: not before; a row without its blob is worse than a blob without its row
            _remove(self.blob(self._unwanted.pop()))

    def rollback(self) -> None:
        """Forget everything since the last commit, whether or not SQLite has already done so (STORE-3)."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        for rows in self._rows.values():
            rows.clear()
        self._recent.clear()
        self._unwanted.clear()
        self._spilled = True
        self.changed = False
        self._head = self._committed_head  # AUDIT-7
        self._expired_to = 0  # the next pass looks again

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
        return not busy and moved == logged

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

    def count(self, table: str) -> int:
        """How many live rows there are in one of the tables of COUNTED."""
        return self._one(COUNTED[table])[0]

    # --- 12. Memory and context ---------------------------------------------------------------------------------------

    def remember(self, content: str, tags: Sequence[str], author_id: str | None, author: str, now: int) -> str:
        """Keep a text for good and return its id; `search_memory` finds it once it is committed (MEM-1)."""
        id = self._new_id()
        self._write("INSERT INTO memory(id, content, tags, author_id, author, created_at) VALUES (?, ?, ?, ?, ?, ?)",
                    (id, content, compact(list(tags)), author_id, author, now))
        return id

    def forget(self, id: str, now: int) -> bool:
        """Take a memory out of every search; False when there is no such live one (MEM-4)."""
        sql = "UPDATE memory SET forgotten_at = ? WHERE id = ? AND forgotten_at IS NULL"
        return self._write(sql, (now, id)).rowcount > 0

    def share_context(self, member_id: str, session_id: str, author: str, summary: str, *, files: Sequence[str],
                      findings: Sequence[str], tags: Sequence[str], now: int) -> str:
        """Replace what a session has said it learned; returns the record's id, which stays (CTX-1)."""
        earlier = self._one("SELECT id FROM context WHERE member_id = ? AND session_id = ?", member_id, session_id)
        id = earlier[0] if earlier else self._new_id()
        self._write("DELETE FROM context WHERE id = ?", (id,))
        self._write("INSERT INTO context(id, member_id, session_id, author, summary, files, findings, tags, updated_at) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (id, member_id, session_id, author, summary, compact(list(files)),
                                                           compact(list(findings)), compact(list(tags)), now))
        self._write("DELETE FROM context WHERE rid IN "
                    "(SELECT rid FROM context ORDER BY updated_at DESC LIMIT -1 OFFSET ?)", (CONTEXTS_KEPT,))
        return id

    def list_contexts(self, limit: int) -> list[Context]:
        """The newest contexts."""
        return [_read(Context, row) for row in self._execute(SELECT_CONTEXT + " ORDER BY updated_at DESC LIMIT ?", (limit,))]

    # --- 13. Tasks ----------------------------------------------------------------------------------------------------

    def create_task(self, title: str, assignee: str | None, priority: str, tags: Sequence[str], author: str,
                    now: int) -> str | None:
        """Add an open task and return its id; None when TASKS_KEPT are there and none of them is done (TASK-1)."""
        if sum(self.task_counts().values()) >= TASKS_KEPT:
            oldest = self._one("SELECT rid FROM task WHERE status = 'done' ORDER BY rid LIMIT 1")
            if oldest is None:
                return None
            self._write("DELETE FROM task WHERE rid = ?", oldest)
        id = self._new_id()
        self._write("INSERT INTO task(id, title, assignee, priority, tags, created_by, created_at) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)", (id, title, assignee, priority, compact(list(tags)), author, now))
        return id

    def task(self, id: str) -> Task | None:
        """The task with that id."""
        return _read(Task, self._one(SELECT_TASK + " WHERE id = ?", id))

    def list_tasks(self, status: str | None, assignee: str | None, limit: int) -> list[Task]:
        """The newest tasks, of that status and assignee if given (TASK-5)."""
        given = {name: value for name, value in (("status", status), ("assignee", assignee)) if value is not None}
        where = " WHERE " + " AND ".join(f"{name} = ?" for name in given) if given else ""
        rows = self._execute(SELECT_TASK + where + " ORDER BY rid DESC LIMIT ?", (*given.values(), limit))
        return [_read(Task, row) for row in rows]

    def task_counts(self) -> dict[str, int]:
        """How many tasks there are of each status."""
        return {"open": 0, "claimed": 0, "done": 0} | dict(
            self._execute("SELECT status, count(*) FROM task GROUP BY status").fetchall())

    def claim_task(self, id: str, claimer: str, member_id: str, name: str, now: int) -> bool:
        """Give an open task to `claimer`, a routing key; False when it is not open (TASK-2)."""
        return self._write("UPDATE task SET status = 'claimed', claimer = ?, claimer_member = ?, claimed_by = ?, seen_at = ? "
                           "WHERE id = ? AND status = 'open'", (claimer, member_id, name, now, id)).rowcount > 0

    def complete_task(self, id: str, claimer: str, member_id: str, name: str, result: str | None, now: int) -> None:
        """Record that `claimer` has done the task; whether it may is the caller's to decide (TASK-4)."""
        self._write("UPDATE task SET status = 'done', claimer = ?, claimer_member = ?, claimed_by = ?, result = ?, "
                    "completed_at = ? WHERE id = ?", (claimer, member_id, name, result, now, id))

    def claimers_seen(self, claimers: Iterable[str], now: int) -> None:
        """These keys were here until `now`: the leases of their claims count from then (TASK-3)."""
        for claimer in claimers:
            self._write("UPDATE task SET seen_at = ? WHERE claimer = ? AND status = 'claimed'", (now, claimer))

    def renew_claims(self, now: int) -> None:
        """Have every lease count from `now`: the broker was away, perhaps the claimers were not (TASK-3)."""
        self._write("UPDATE task SET seen_at = ? WHERE seen_at < ? AND status = 'claimed'", (now, now))

    def unseen_claims(self, before: int, limit: int = 100) -> list[tuple[str, str]]:
        """(task id, claimer) of claims whose claimer was last known to be here before `before`, longest ago first."""
        return self._execute("SELECT id, claimer FROM task WHERE status = 'claimed' AND seen_at < ? "
                             "ORDER BY seen_at LIMIT ?", (before, limit)).fetchall()

    def reopen_task(self, id: str) -> None:
        """Take a claimed task back from whoever has it."""
        self._write("UPDATE task SET status = 'open', claimer = NULL, claimer_member = NULL, claimed_by = NULL "
                    "WHERE id = ? AND status = 'claimed'", (id,))

    # --- 14. Streams and skills ---------------------------------------------------------------------------------------

    def create_stream(self, name: str, author: str, now: int) -> Stream:
        """The stream of that name, new or not (STREAM-1)."""
        found = self.stream(name)
        if found is None:
            found = Stream(name, self._new_id(), author, now)
            self._write("INSERT INTO stream VALUES (?, ?, ?, ?)", found)
        return found

    def stream(self, name: str) -> Stream | None:
        """The stream of that name."""
        return _read(Stream, self._one(SELECT_STREAM + " WHERE name = ?", name))

    def list_streams(self) -> list[Stream]:
        """All streams, by name."""
        return [_read(Stream, row) for row in self._execute(SELECT_STREAM + " ORDER BY name")]

    def share_skill(self, skill: Skill, author_id: str | None) -> None:
        """Publish a skill, or replace the one of its name whole but for the time of its creation (SKILL-1)."""
        self._write(
            "INSERT INTO skill VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "description = excluded.description, instructions = excluded.instructions, tags = excluded.tags, "
            "manifest = excluded.manifest, author_id = excluded.author_id, author = excluded.author, "
            "updated_at = excluded.updated_at",
            (skill.name, skill.description, skill.instructions, compact(skill.tags), compact(skill.manifest), author_id,
             skill.author, skill.created_at, skill.updated_at))

    def skill(self, name: str) -> Skill | None:
        """The skill of that name."""
        return _read(Skill, self._one(SELECT_SKILL + " WHERE name = ?", name))

    def list_skills(self) -> list[Skill]:
        """All skills, by name, without their instructions."""
        columns = SELECT_SKILL.replace("instructions", "'' AS instructions")
        return [_read(Skill, row) for row in self._execute(columns + " ORDER BY name")]

    def remove_skill(self, name: str) -> bool:
        """Delete a skill; False when there is none."""
        return self._write("DELETE FROM skill WHERE name = ?", (name,)).rowcount > 0

    # --- 15. Audit log ------------------------------------------------------------------------------------------------

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

    # --- 16. Retention ------------------------------------------------------------------------------------------------

    def prune(self, now: int, *, limit: int = 500, keep_settled: int = KEEP_SETTLED_MS) -> int:
        """One bounded pass of retention (STORE-19); returns rows passed or deleted, 0 when there was nothing to do.

        Each step handles at most `limit` rows, so a backlog takes several passes.
        """
        return (self._expire_overdue(now, limit) + self._delete_settled(now - keep_settled, limit)
                + self._forget_sessions(now - KEEP_SESSIONS_MS, limit) + self._expire_files(now, limit))

    def _expire_overdue(self, now: int, limit: int) -> int:
        """Pass at most `limit` messages, oldest first, up to one that is still good, and expire what is queued of them.

        Messages live equally long, so the order of acceptance is the order of expiry; an index would cost every message
        a tenth of its price.
        """
        rows = self._execute("SELECT seq, expires_at FROM message WHERE seq > ? ORDER BY seq LIMIT ?",
                             (self._expired_to, limit)).fetchall()
        overdue = [seq for seq, _ in takewhile(lambda row: row[1] <= now, rows)]
        for seq in overdue:
            self._write("UPDATE delivery SET state = 4, at = ? WHERE message = ? AND state = 0", (now, seq))  # STORE-13
            self._expired_to = seq
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

    # --- 17. Vectors --------------------------------------------------------------------------------------------------

    def collections(self) -> list[str]:
        """The names of the collections that hold a text, in order (VEC-8)."""
        return [name for name, in self._execute("SELECT name FROM collection ORDER BY name")]

    def collection(self, name: str) -> int | None:
        """The number of a collection; None when no text is in it."""
        found = self._one("SELECT seq FROM collection WHERE name = ?", name)
        return found[0] if found else None

    def add_vector(self, collection: str, text: str, metadata: Mapping[str, Any], member_key: str, now: int) -> str:
        """Keep a text, indexed by its terms (VEC-3), and return its id. StoreError "limit": no room for a collection."""
        if self.collection(collection) is None and self._one("SELECT count(*) FROM collection")[0] >= MAX_COLLECTIONS:
            raise StoreError("limit")
        [(seq,)] = self._write("INSERT INTO collection(name, texts) VALUES (?, 1) ON CONFLICT (name) "
                               "DO UPDATE SET texts = texts + 1 RETURNING seq", (collection,)).fetchall()
        shares = {_key(seq, term): share for term, share in unit(sublinear(terms(text))).items()}
        id = self._new_id()
        vector = self._write("INSERT INTO vector(id, collection, text, metadata, terms, stored_by, stored_at) "
                             "VALUES (?, ?, ?, ?, ?, ?, ?)", (id, seq, text, compact(metadata),
                                                              array("q", shares).tobytes(), member_key, now)).lastrowid
        self._cursor.executemany("INSERT INTO posting VALUES (?, ?, ?)",
                                 [(key, vector, share) for key, share in shares.items()])
        self._cursor.executemany("INSERT INTO term VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET texts = texts + 1",
                                 [(key,) for key in shares])
        return id

    def delete_vector(self, collection: str, id: str) -> bool:
        """Take a text and all that was indexed of it out of a collection; False when it is not there."""
        seq = self.collection(collection)
        found = self._one("SELECT seq, terms FROM vector WHERE id = ? AND collection = ?", id, seq)
        if found is None:
            return False
        vector, keys = found[0], [(key,) for key in array("q", found[1])]
        self._write("UPDATE collection SET texts = texts - 1 WHERE seq = ?", (seq,))
        self._cursor.executemany("DELETE FROM posting WHERE key = ? AND vector = ?", [(*key, vector) for key in keys])
        self._cursor.executemany("UPDATE term SET texts = texts - 1 WHERE key = ?", keys)
        self._cursor.executemany("DELETE FROM term WHERE key = ? AND texts = 0", keys)
        self._write("DELETE FROM vector WHERE seq = ?", (vector,))
        self._write("DELETE FROM collection WHERE seq = ? AND texts = 0", (seq,))
        return True

    def not_embedded(self, collection: str, embedder: str, limit: int) -> list[tuple[int, str]]:
        """(number, text) of texts that this embedder has not seen (VEC-9), the first `limit`."""
        return self._execute("SELECT seq, text FROM vector WHERE collection = ? AND embedder IS NOT ? LIMIT ?",
                             (self.collection(collection), embedder, limit)).fetchall()

    def set_embeddings(self, embedder: str, rows: Iterable[tuple[int, bytes]]) -> None:
        """Keep what an embedder made of texts; (number, `pack`ed floats)."""
        for vector, embedding in rows:
            self._write("UPDATE vector SET embedder = ?, embedding = ? WHERE seq = ?", (embedder, embedding, vector))

    # --- 18. Schedules ------------------------------------------------------------------------------------------------

    def add_schedule(self, entry: Schedule) -> None:
        """Keep a message that is to be sent later."""
        self._write("INSERT INTO schedule VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", entry)

    def next_due(self) -> int | None:
        """When the next scheduled message is due, None if there is none."""
        return self._one("SELECT min(due_at) FROM schedule")[0]

    def due_schedules(self, now: int, limit: int) -> list[Schedule]:
        """The first `limit` of what is due by now, the longest overdue first."""
        return [_read(Schedule, row) for row in self._execute(
            SELECT_SCHEDULE + " WHERE due_at <= ? ORDER BY due_at LIMIT ?", (now, limit))]

    def fired(self, id: str, due_at: int | None) -> None:
        """The entry was sent: its next time, or None if that was all."""
        if due_at is None:
            self._write("DELETE FROM schedule WHERE id = ?", (id,))
        else:
            self._write("UPDATE schedule SET due_at = ?, fired_count = fired_count + 1 WHERE id = ?", (due_at, id))

    def schedules(self, member_id: str) -> Iterator[Schedule]:
        """A member's entries, the next one first, read as they are asked for."""
        return (_read(Schedule, row) for row in self._execute(
            SELECT_SCHEDULE + " WHERE member_id = ? ORDER BY due_at", (member_id,)))

    def count_schedules(self, member_id: str) -> int:
        """How many entries a member has."""
        return self._one("SELECT count(*) FROM schedule WHERE member_id = ?", member_id)[0]

    def cancel_schedule(self, id: str, member_id: str) -> bool:
        """Drop a member's entry; False when it has no such entry."""
        return self._write("DELETE FROM schedule WHERE id = ? AND member_id = ?", (id, member_id)).rowcount > 0

    # --- 19. Watches and webhooks -------------------------------------------------------------------------------------

    def add_watch(self, watch: Watch) -> None:
        """Keep a watch."""
        self._write("INSERT INTO watch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    watch._replace(headers=compact(watch.headers)))

    def watches(self) -> list[Watch]:
        """All watches of the mesh, oldest first."""
        return [_read(Watch, row) for row in self._execute(SELECT_WATCH + " ORDER BY created_at, rowid")]

    def saw(self, id: str, value: str, now: int) -> None:
        """Keep the value that a watch has seen."""
        self._write("UPDATE watch SET seen = ?, checked_at = ? WHERE id = ?", (value, now, id))

    def remove_watch(self, id: str) -> None:
        """End a watch."""
        self._write("DELETE FROM watch WHERE id = ?", (id,))

    def add_webhook(self, webhook: Webhook) -> None:
        """Keep a webhook; StoreError "exists" when there is one of that name."""
        if self._one("SELECT 1 FROM webhook WHERE name = ?", webhook.name):
            raise StoreError("exists")
        self._write("INSERT INTO webhook VALUES (?, ?, ?, ?)", webhook)

    def webhooks(self) -> list[Webhook]:
        """All webhooks of the mesh, by name."""
        return [_read(Webhook, row) for row in self._execute(SELECT_WEBHOOK + " ORDER BY name")]

    def remove_webhook(self, name: str) -> None:
        """End a webhook; its name is free again (HOOK-5)."""
        self._write("DELETE FROM webhook WHERE name = ?", (name,))

    def forget_plans(self, member_id: str) -> None:
        """Drop whatever a member has planned or opened: schedules, watches, webhooks (SCHED-9)."""
        for table in ("schedule", "watch", "webhook"):
            self._write(f"DELETE FROM {table} WHERE member_id = ?", (member_id,))

    # --- 20. Files ----------------------------------------------------------------------------------------------------

    def blob(self, id: str) -> Path:
        """Where the content of a file is."""
        return self.directory / FILES / id

    def add_file(self, file: File, keys: Mapping[str, str]) -> None:
        """Take in a file whose blob is in place, and its sealed keys by peer key (FILE-4)."""
        row = file._replace(tags=compact(file.tags))._asdict() | {"folded": file.name.casefold()}
        self._write(f"INSERT INTO file({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))
        for peer, sealed in keys.items():
            self.grant_file(file.id, peer, sealed)

    def grant_file(self, id: str, peer: str, sealed_key: str) -> None:
        """Keep the key of a file as it is sealed for one peer, in place of an older one."""
        self._write("INSERT OR REPLACE INTO file_key VALUES (?, ?, ?)", (id, peer, sealed_key))

    def file(self, id: str, now: int) -> File | None:
        """The file of that id; None when there is none, or it has expired."""
        return _read(File, self._one(SELECT_FILE + f" WHERE id = ? AND {UNEXPIRED}", id, now))

    def may_read(self, id: str, reader: Reader) -> bool:
        """Whether that file is for this reader (FILE-8)."""
        return self._one(f"SELECT 1 FROM file WHERE id = ? AND {READABLE}", id, *reader.values()) is not None

    def list_files(self, reader: Reader, now: int, query: str = "", uploaded_by: str = "") -> list[File]:
        """The newest files this reader may read, whose name has `query` in it and whose uploader is called so (FILE-11)."""
        return [_read(File, row) for row in self._execute(
            SELECT_FILE + f" WHERE {UNEXPIRED} AND {READABLE} AND instr(folded, ?) AND ? IN ('', uploaded_by) "
            f"ORDER BY uploaded_at DESC, rowid DESC LIMIT {FILE_LIST}",
            (now, *reader.values(), query.casefold(), uploaded_by))]

    def sealed_key(self, id: str, keys: Sequence[str]) -> str | None:
        """The key of a file as it is sealed for the first of `keys` for which it is."""
        found = dict(self._execute("SELECT peer, sealed_key FROM file_key WHERE file = ? AND peer IN "
                                   "(SELECT value FROM json_each(?))", (id, compact(keys))))
        return next((found[key] for key in keys if key in found), None)

    def file_key_count(self, id: str) -> int:
        """For how many peers the key of a file is sealed."""
        return self._one("SELECT count(*) FROM file_key WHERE file = ?", id)[0]

    def delete_file(self, id: str) -> None:
        """Delete a file; its blob goes with the commit."""
        self._write("DELETE FROM file WHERE id = ?", (id,))  # its keys and accesses go with it
        self._unwanted.append(id)

    def file_totals(self) -> tuple[int, int]:
        """How many files there are, and their bytes, expired ones included until they are swept."""
        return self._one("SELECT count(*), ifnull(sum(size), 0) FROM file")

    def add_access(self, id: str, key: str, name: str, now: int) -> int:
        """Note that a download began; the number of the note (FILE-12)."""
        access = self._write("INSERT INTO file_access(file, key, name, at, complete) VALUES (?, ?, ?, ?, 0)",
                             (id, key, name, now)).lastrowid
        self._write("DELETE FROM file_access WHERE file = ?1 AND id <= (SELECT id FROM file_access WHERE file = ?1 "
                    f"ORDER BY id DESC LIMIT 1 OFFSET {ACCESSES_KEPT})", (id,))
        return access

    def complete_access(self, access: int) -> None:
        """Note that the last byte of a download was written."""
        self._write("UPDATE file_access SET complete = 1 WHERE id = ?", (access,))

    def accesses(self, id: str) -> list[AccessRow]:
        """The newest downloads of a file, newest first."""
        return [_read(AccessRow, row) for row in self._execute(SELECT_ACCESS + " WHERE file = ? ORDER BY id DESC", (id,))]

    def _expire_files(self, now: int, limit: int) -> int:
        due = self._execute("SELECT id FROM file WHERE expires_at <= ? ORDER BY expires_at LIMIT ?", (now, limit)).fetchall()
        for id, in due:
            self.delete_file(id)  # FILE-14
        return len(due)

    def _sweep(self) -> None:
        """Remove the blobs that no row wants: what a crash left of uploads and deletions (FILE-13)."""
        found = list(self.blob("").iterdir()) if keeps_blobs(self.directory) else []
        wanted = {id for id, in self._execute("SELECT id FROM file")} if found else set()
        for path in found:
            if path.name not in wanted:
                _remove(path)


# --- 21. Comparing texts ----------------------------------------------------------------------------------------------
# A text is a vector over its terms: words, pairs of neighbouring words, and the pieces of three characters that words are
# made of, which stems and most of a misspelt word have in common (VEC-3). Each collection has an inverted index of them.

WORD = re.compile(r"[^\W_]{1,64}|[^\w\s]{1,64}")  # what is longer is cut, so that a word's pieces are few
MARKS = re.compile("[\u0300-\u036f]")  # the accents that NFKD takes off letters


def words(text: str) -> list[str]:
    """The words of a text as they are compared: without case, accents and compatibility forms (VEC-3)."""
    return WORD.findall(MARKS.sub("", unicodedata.normalize("NFKD", text).casefold()))


@lru_cache(maxsize=8192)
def _pieces(word: str) -> frozenset[int]:
    """The hashes of a word, between spaces, and of its pieces."""
    padded = f" {word} "
    return frozenset(zlib.crc32(piece.encode()) for piece in
                     [padded, *(padded[at:at + GRAM] for at in range(len(padded) - GRAM + 1))])


def terms(text: str) -> Counter[int]:
    """How often each term occurs, by its CRC-32 (VEC-3); empty for a text without any word."""
    found = words(text)
    counts: Counter[int] = Counter()
    for word in found:
        counts.update(_pieces(word))
    counts.update(zlib.crc32(f"{one} {next}".encode()) for one, next in zip(found, found[1:]))
    return counts


def sublinear(counts: Mapping[int, int]) -> dict[int, float]:
    """What a term counts when it occurs again and again: 1 + ln n (VEC-4)."""
    return {term: 1 + math.log(count) for term, count in counts.items()}


def unit(weights: Mapping[int, float]) -> dict[int, float]:
    """The weights, scaled to a vector of length 1."""
    length = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
    return {term: weight / length for term, weight in weights.items()}


def _key(collection: int, term: int) -> int:
    return collection << 32 | term


def rarity(texts: int, having: int) -> float:
    """The idf of a term that `having` of `texts` texts have: positive, and the smaller the commoner it is (VEC-4)."""
    return math.log(1 + (texts - having + 0.5) / (having + 0.5))


# The terms wanted are a JSON array of [key, weight]; the CROSS JOINs keep SQLite from turning the order of the loops around.
WANTED = "(SELECT value ->> 0 AS wanted, value ->> 1 AS weight FROM json_each(?))"
NEAR = (f"SELECT vector FROM {WANTED} CROSS JOIN posting ON posting.key = wanted "
        "GROUP BY vector ORDER BY sum(weight * share) DESC LIMIT ?")
SCORES = (f"SELECT near.value, sum(weight * share) FROM json_each(?) near CROSS JOIN {WANTED} "
          "CROSS JOIN posting ON posting.key = wanted AND vector = near.value GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?")


def search(directory: Path | str, collection: str, query: str, limit: int) -> list[tuple[Vector, float]]:
    """The texts of a collection that are most similar to `query`, with their cosine, best first (VEC-4, VEC-5).

    On a connection of its own, fit for another thread; sees what was committed. Raises StoreError.
    """
    with _refusals(Path(directory) / DATABASE), closing(_read_only(directory)) as db:
        db.execute("BEGIN")  # one snapshot for all the reads
        seq, texts = db.execute("SELECT seq, texts FROM collection WHERE name = ?", (collection,)).fetchone() or (0, 0)
        asked = {_key(seq, term): weight for term, weight in sublinear(terms(query)).items()}
        having = dict(db.execute("SELECT key, texts FROM term WHERE key IN (SELECT value FROM json_each(?))",
                                 (compact(list(asked)),)))
        wanted = unit({key: weight * rarity(texts, having.get(key, 0)) for key, weight in asked.items()})
        near = [vector for vector, in db.execute(NEAR, (
            compact([[key, wanted[key]] for key in _rarest(having, SEARCH_POSTINGS)]), max(limit, SEARCH_CANDIDATES)))]
        return _found(db, db.execute(SCORES, (compact(near), compact([[key, wanted[key]] for key in having]), limit)))


def _rarest(having: Mapping[int, int], budget: int) -> list[int]:
    """The rarest terms, as many as have `budget` postings together, at least one (VEC-5)."""
    chosen: list[int] = []
    for key in sorted(having, key=having.__getitem__):
        budget -= having[key]
        if chosen and budget < 0:
            break
        chosen.append(key)
    return chosen


def _found(db: sqlite3.Connection, scores: Iterable[tuple[int, float]]) -> list[tuple[Vector, float]]:
    """The rows of the best, with scores that rounding cannot carry out of 0..1."""
    return [(_read(Vector, db.execute(SELECT_VECTOR + " WHERE seq = ?", (vector,)).fetchone()), min(max(score, 0.0), 1.0))
            for vector, score in scores]


def pack(vector: Sequence[float]) -> bytes:
    """An embedding as it is kept: scaled to length 1, 32-bit floats. ValueError when it is none."""
    length = math.sqrt(math.fsum(float(x) * float(x) for x in vector))
    if not vector or not math.isfinite(length):
        raise ValueError("not a list of finite numbers")
    return array("f", [float(x) / (length or 1.0) for x in vector]).tobytes()


def nearest(directory: Path | str, collection: str, embedder: str, query: bytes,
            limit: int) -> list[tuple[Vector, float]]:
    """Like `search`, by the cosine of embeddings that `pack` made (VEC-9); every text of the collection is compared."""
    asked = array("f", query)
    with _refusals(Path(directory) / DATABASE), closing(_read_only(directory)) as db:
        scores = [(vector, sum(map(mul, asked, array("f", embedding)))) for vector, embedding in db.execute(
            "SELECT v.seq, embedding FROM vector v JOIN collection c ON c.seq = collection WHERE name = ? AND embedder = ?",
            (collection, embedder))]
        return _found(db, nlargest(limit, scores, key=lambda row: row[1]))


# --- 22. The members' own database ------------------------------------------------------------------------------------
# `sql.db` is the members' to fill and to ask. Each request has a connection of its own, so it leaves nothing behind but
# what it committed, and runs in a thread. SQLite guards it: an authorizer says what a statement may do at all, a progress
# handler looks at the clock, limits bound values, and max_page_count bounds the file. Two things SQLite does not bound
# are kept out: views and triggers, which make a statement larger than its text, and WITH names that multiply.

TOKEN = re.compile(r"""--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^]]*(?:\]|\Z)"""
                   r"""|\w+|[^\w\s]""", re.DOTALL)


class _Guard:
    """What one request may do, and the words for what stopped it. `log` is the write-ahead log it may fill."""

    def __init__(self, allowed: set[int], log: Path | None) -> None:
        self.allowed, self.log = allowed, log
        self.deadline = time.monotonic() + SQL_SECONDS
        self.stopped = ""

    def authorize(self, action: int, first: str | None, second: str | None, *place: str | None) -> int:
        """SQLite asks for each thing a statement would do (SQL-2, SQL-3)."""
        if (action, first) == (sqlite3.SQLITE_UPDATE, "sqlite_master") or (
                action == sqlite3.SQLITE_PRAGMA and first in SQL_PRAGMAS):
            return sqlite3.SQLITE_OK  # the former for json_each and the like; SQLite itself keeps members off that table
        if action in self.allowed and not (action == sqlite3.SQLITE_FUNCTION and second in SQL_FORBIDDEN_FUNCTIONS):
            return sqlite3.SQLITE_OK
        named = {sqlite3.SQLITE_PRAGMA: f"PRAGMA {first} is", sqlite3.SQLITE_FUNCTION: f"{second}() is"} | SQL_REFUSED
        if action in SQL_WRITES - SQL_READS and self.allowed is SQL_READS:
            self.stopped = self.stopped or "mesh_query only reads; mesh_execute writes"
        self.stopped = self.stopped or f"{named.get(action, 'that is')} not allowed here"
        return sqlite3.SQLITE_DENY

    def expired(self) -> bool:
        """Whether the statement has to end now (SQL-6)."""
        if time.monotonic() > self.deadline:
            self.stopped = f"stopped after {SQL_SECONDS:g} s, the limit on time"
        elif self.log is not None and self.log.exists() and self.log.stat().st_size > 2 * SQL_DATABASE_BYTES:
            self.stopped = SQL_FULL
        return bool(self.stopped)

    def reason(self, error: Exception) -> str:
        """One sentence, without a path, for what SQLite raised (SQL-7)."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        return self.stopped or SQL_REASONS.get(code) or str(error)


SQL_FULL = f"the database is at its limit of {SQL_DATABASE_BYTES >> 20} MiB"
SQL_REASONS = {
    sqlite3.SQLITE_FULL: SQL_FULL,
    sqlite3.SQLITE_TOOBIG: f"a value or row is over the limit of {SQL_VALUE_BYTES >> 10} KiB",
} | {code: f"the database {reason}" for code, reason in REFUSALS.items() if code != sqlite3.SQLITE_FULL}


def sql_query(directory: Path | str, sql: str) -> SqlResult:
    """The rows of one statement that only reads (SQL-2). Raises StoreError."""
    statements = _statements(sql)
    if len(statements) != 1:
        raise StoreError(f"mesh_query takes one statement, not {len(statements)}")
    with _guarded(directory, SQL_READS) as db:
        columns, rows = _rows(db.execute(statements[0]))
    return SqlResult(columns, rows, len(rows))


def sql_execute(directory: Path | str, sql: str) -> SqlResult:
    """Run statements as one transaction (SQL-5): how many rows they changed, the rows of the last. Raises StoreError."""
    statements = _statements(sql)
    if not statements:
        raise StoreError("there is no statement in it")
    count, columns, rows = 0, [], []
    with _guarded(directory, SQL_WRITES) as db:
        for statement in statements:
            cursor = db.execute(statement)
            columns, rows = _rows(cursor)
            count += max(cursor.rowcount, 0)
        tables = _tables(db)
        db.set_authorizer(None)
        db.execute("COMMIT")  # a failure closes the connection instead, which undoes everything
    return SqlResult(columns, rows, count, tables)


def sql_schema(directory: Path | str) -> list[dict[str, Any]]:
    """Tables by name with their columns by position, each {name, type, nullable} (SQL-8). Raises StoreError."""
    with _guarded(directory, SQL_READS) as db:
        _, rows = _rows(db.execute(
            "SELECT t.name AS name, c.name AS 'column', c.type AS type, c.\"notnull\" OR c.pk AS filled "
            "FROM sqlite_schema t JOIN pragma_table_info(t.name) c WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite\\_%' "
            "ESCAPE '\\' ORDER BY t.name, c.cid"), limit=sys.maxsize)
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["name"], []).append(
            {"name": row["column"], "type": row["type"] or "ANY", "nullable": not row["filled"]})
    return [{"name": name, "columns": columns} for name, columns in tables.items()]


def sql_tables(directory: Path | str) -> list[str]:
    """The names of the members' tables, at most SQL_ROWS; none when their database cannot be read."""
    try:
        with _guarded(directory, SQL_READS) as db:
            return _tables(db)
    except StoreError:
        return []


def _tables(db: sqlite3.Connection) -> list[str]:
    return [name for name, in db.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
        "ORDER BY name LIMIT ?", (SQL_ROWS,))]


@contextmanager
def _guarded(directory: Path | str, allowed: set[int]) -> Iterator[sqlite3.Connection]:
    """A guarded connection to `sql.db`, for SQL_WRITES with a transaction begun; sqlite3.Error becomes StoreError."""
    writes = allowed is SQL_WRITES
    path = Path(directory).resolve() / SQL_DATABASE
    guard = _Guard(allowed, path.with_name(SQL_DATABASE + "-wal") if writes else None)
    try:
        with closing(_connect_sql(path, writes)) as db:
            for pragma in SQL_WRITER if writes else SQL_READER:
                db.execute(pragma)
            for limit, value in SQL_LIMITS.items():
                db.setlimit(limit, value)
            db.text_factory = lambda text: text.decode(errors="replace")
            db.set_progress_handler(guard.expired, SQL_LOOK_EVERY)
            db.set_authorizer(guard.authorize)
            yield db
    except (sqlite3.Error, sqlite3.Warning, OSError) as error:
        reason = guard.reason(error) if not isinstance(error, OSError) else f"the database: {error.strerror}"
        raise StoreError(reason) from None


def _connect_sql(path: Path, writes: bool) -> sqlite3.Connection:
    if writes:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # STORE-1
        return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    if path.exists():
        return _read_only(path.parent, path.name)  # SQL-1, SQL-2
    return sqlite3.connect(":memory:", isolation_level=None)  # nobody has written yet


def _statements(sql: str) -> list[str]:
    """The statements in a text, cut at the semicolons that are in no string, name or comment (SQL-5)."""
    found: list[str] = []
    start, tokens = 0, []
    for match in TOKEN.finditer(sql):
        token = match[0]
        if token == ";":
            if tokens:
                found.append(_bounded(sql[start:match.start()], tokens))
            start, tokens = match.end(), []
        elif not token.startswith(("--", "/*")):
            tokens.append(token.strip("'\"`[]").lower() if len(token) > 1 else token)
    return found + [_bounded(sql[start:], tokens)] if tokens else found


def _bounded(statement: str, tokens: list[str]) -> str:
    """The statement, unless its WITH names stand for too much. Raises StoreError.

    SQLite copies what a name stands for to each place that uses it, before any limit of its own applies: twenty names
    that use the one before twice are a million copies. No name has more copies than the product of the uses of all
    names, which is what is bounded here (SQL-6).
    """
    named = Counter(_named(tokens, at) for at, token in enumerate(tokens[:-1])
                    if at and token == "as" and tokens[at + 1] in ("(", "not", "materialized"))
    uses = Counter(token for at, token in enumerate(tokens)
                   if token in named and "." not in (tokens[at - 1:at] + tokens[at + 1:at + 2]))
    copies = math.prod(max(1, uses[name] - times) ** times for name, times in named.items())
    if copies * len(tokens) > SQL_TOKENS:
        raise StoreError(f"its WITH names are used so often that it might grow beyond the limit of {SQL_TOKENS} words")
    return statement


def _named(tokens: list[str], at: int) -> str:
    """What the `as` at that place defines, if it is that of a WITH: `name as (` or `name(columns) as (`."""
    before = at - 1
    if tokens[before] == ")":
        while before > 0 and tokens[before] != "(":
            before -= 1
        before -= 1
    return tokens[before]


def _rows(cursor: sqlite3.Cursor, limit: int = SQL_ROWS) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows as JSON can carry them (SQL-4), both empty for a statement without any. Raises StoreError."""
    columns: list[str] = []
    for column, *_ in cursor.description or ():
        while column in columns:  # a row has each name once
            column += f":{len(columns) + 1}"
        columns.append(column)
    rows: list[dict[str, Any]] = []
    size = 0
    for row in cursor:
        rows.append(dict(zip(columns, map(_cell, row), strict=True)))
        size += len(compact(rows[-1]).encode())
        if len(rows) > limit:
            raise StoreError(f"the result is over the limit of {limit} rows; use LIMIT")
        if size > SQL_RESULT_BYTES:
            raise StoreError(f"the result is over the limit of {SQL_RESULT_BYTES >> 10} KiB")
    return columns, rows


def _cell(value: Any) -> Any:
    """A value of SQLite as JSON: exact, or text (SQL-4)."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    inexact = isinstance(value, int) and abs(value) > LARGEST_EXACT or isinstance(value, float) and math.isinf(value)
    return str(value).replace("inf", "Infinity") if inexact else value


# --- 23. Blobs --------------------------------------------------------------------------------------------------------

def keeps_blobs(directory: Path) -> bool:
    """Whether a mesh has had files, so that there may be something to sweep (FILE-13)."""
    return (directory / FILES).is_dir()


class Blob:
    """The content of a file while it arrives: nobody sees it before `keep`, and nothing is left after `discard`.

    The methods raise StoreError, and may run in any thread, one at a time.
    """

    def __init__(self, path: Path) -> None:
        """Begin the blob that will be at `path`."""
        self.path, self._part = path, path.with_name(f"{path.name}.part")
        self.size, self._hash = 0, hashlib.sha256()
        with _refusals(path):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = open(os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")

    def write(self, data: bytes) -> None:
        """Append a piece."""
        with _refusals(self.path):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """The digest of what was written, 64 hex digits."""
        return self._hash.hexdigest()

    def keep(self) -> None:
        """Put the whole blob into its place, durably (FILE-4)."""
        with _refusals(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._part, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def discard(self) -> None:
        """Leave nothing behind, kept or not."""
        _remove(self._part)
        _remove(self.path)
        with suppress(OSError):  # what could not be written is not wanted any more
            self._file.close()


def _remove(path: Path) -> None:
    with suppress(OSError):  # what stays is swept when the mesh is opened
        path.unlink(missing_ok=True)
