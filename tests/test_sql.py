"""Mesh SQL, told in stories: the guard around `sql.db`, its limits, its types, and who waits for whom."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

import claudemesh
import store as storage
from claudemesh import RESULT_CHARS
from store import StoreError, sql_execute, sql_query, sql_schema, sql_tables
from test_cli import ada, bob, broker, person  # noqa: F401  fixtures
from test_mcp import FakeClient, Fixture
from world import story

spec = pytest.mark.spec
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"


def failure(work, *args) -> str:
    with pytest.raises(StoreError) as raised:
        work(*args)
    return str(raised.value)


def rows(directory, sql: str) -> list[tuple]:
    return [tuple(row.values()) for row in sql_query(directory, sql).rows]


def bomb(levels: int) -> str:
    """A statement whose last WITH name stands for 2 ** levels copies of the first."""
    parts = [f"t{n} AS (SELECT a.x FROM t{n - 1} a, t{n - 1} b)" for n in range(1, levels + 1)]
    return f"WITH t0 AS (SELECT 1 x), {', '.join(parts)} SELECT count(*) FROM t{levels}"


# --- What a statement may do ----------------------------------------------------------------------


@spec("SQL-1")
def test_nothing_is_made_until_somebody_writes(tmp_path):
    assert rows(tmp_path, "SELECT 1 + 1") == [(2,)]
    assert (sql_schema(tmp_path), sql_tables(tmp_path), os.listdir(tmp_path)) == ([], [], [])
    sql_execute(tmp_path, "CREATE TABLE t(a)")
    assert os.listdir(tmp_path) == ["sql.db"] and (tmp_path / "sql.db").stat().st_mode & 0o777 == 0o600


@spec("SQL-2", "SQL-7")
@pytest.mark.parametrize("sql", [
    "INSERT INTO t VALUES (1)", "UPDATE t SET a = 1", "DELETE FROM t", "DROP TABLE t", "CREATE TABLE u(a)",
    "CREATE INDEX i ON t(a)", "ALTER TABLE t ADD COLUMN b", "REINDEX", "ANALYZE", "WITH x AS (SELECT 1) DELETE FROM t",
    "CREATE TEMP TABLE u(a)", "SAVEPOINT s"])
def test_a_query_cannot_write(tmp_path, sql):
    sql_execute(tmp_path, "CREATE TABLE t(a); CREATE INDEX x ON t(a); INSERT INTO t VALUES (7)")
    assert failure(sql_query, tmp_path, sql) == "mesh_query only reads; mesh_execute writes"
    assert rows(tmp_path, "SELECT * FROM t") == [(7,)]


REFUSED = {
    "ATTACH 'other.db' AS other": "ATTACH and VACUUM are not allowed here",
    "ATTACH ':memory:' AS other": "ATTACH and VACUUM are not allowed here",
    "DETACH main": "DETACH is not allowed here",
    "BEGIN": "BEGIN, COMMIT and ROLLBACK are not allowed here",
    "COMMIT": "BEGIN, COMMIT and ROLLBACK are not allowed here",
    "ROLLBACK": "BEGIN, COMMIT and ROLLBACK are not allowed here",
    "PRAGMA journal_mode = DELETE": "PRAGMA journal_mode is not allowed here",
    "PRAGMA query_only = 0": "PRAGMA query_only is not allowed here",
    "PRAGMA max_page_count = 100000000": "PRAGMA max_page_count is not allowed here",
    "PRAGMA writable_schema = 1": "PRAGMA writable_schema is not allowed here",
    "PRAGMA database_list": "PRAGMA database_list is not allowed here",
    "SELECT file FROM pragma_database_list": "PRAGMA database_list is not allowed here",
    "SELECT load_extension('x')": "load_extension() is not allowed here",
    "SELECT fts3_tokenizer('simple')": "fts3_tokenizer() is not allowed here",
    "CREATE VIEW v AS SELECT 1": "a view is not allowed here",
    "CREATE VIRTUAL TABLE f USING fts5(a)": "a virtual table is not allowed here",
    "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END": "a trigger is not allowed here",
}


@spec("SQL-3", "SQL-7")
@pytest.mark.parametrize("sql", REFUSED)
def test_no_request_leaves_the_database_or_changes_its_settings(tmp_path, sql):
    sql_execute(tmp_path, "CREATE TABLE t(a)")
    assert failure(sql_execute, tmp_path, sql) == REFUSED[sql]
    if not sql.startswith("CREATE"):
        assert failure(sql_query, tmp_path, sql) == REFUSED[sql]


@spec("SQL-3", "SQL-7")
@pytest.mark.parametrize(("work", "sql", "why"), [
    (sql_query, "VACUUM INTO 'copy.db'", "ATTACH and VACUUM are not allowed here"),
    (sql_execute, "VACUUM INTO 'copy.db'", "cannot VACUUM from within a transaction"),
    (sql_execute, "CREATE TEMP TABLE u(a)", "a temporary table is not allowed here"),
    (sql_execute, "INSERT INTO sqlite_schema VALUES ('table', 'u', 'u', 3, 'CREATE TABLE u(a)')",
     "table sqlite_master may not be modified"),
    (sql_query, "SELECT * FROM other.t", "no such table: other.t"),
    (sql_query, "SELEC 1", 'near "SELEC": syntax error'),
    (sql_query, "SELECT 'it", 'unrecognized token: "\'it"'),
    (sql_query, "SELECT 1\0", "the query contains a null character"),
    (sql_query, "", "mesh_query takes one statement, not 0"),
    (sql_query, "-- nothing\n;", "mesh_query takes one statement, not 0"),
    (sql_query, "SELECT 1; SELECT 2", "mesh_query takes one statement, not 2"),
    (sql_execute, " ;; /* nothing */", "there is no statement in it"),
], ids=str)
def test_what_cannot_be_run_is_refused_with_one_sentence(tmp_path, work, sql, why):
    sql_execute(tmp_path, "CREATE TABLE t(a)")
    assert failure(work, tmp_path, sql) == why
    assert [name for name in os.listdir(tmp_path) if not name.startswith("sql.db")] == []


@spec("SQL-3")
def test_what_only_looks_may_be_asked(tmp_path):
    sql_execute(tmp_path, "CREATE TABLE t(id INTEGER PRIMARY KEY, body TEXT)")
    assert rows(tmp_path, "PRAGMA table_info(t)")[1][:3] == (1, "body", "TEXT")
    assert rows(tmp_path, "SELECT name FROM pragma_table_info('t')") == [("id",), ("body",)]
    assert rows(tmp_path, "SELECT value FROM json_each('[1, 2]')") == [(1,), (2,)]
    assert rows(tmp_path, "SELECT 'GRANT', 'drop schema; immigrant'") == [("GRANT", "drop schema; immigrant")]


@spec("SQL-7")
def test_a_damaged_database_is_told_without_a_path(tmp_path):
    (tmp_path / "sql.db").write_bytes(b"no database" * 1000)
    for work, args in ((sql_query, ("SELECT 1 FROM t",)), (sql_execute, ("CREATE TABLE t(a)",)), (sql_schema, ())):
        assert failure(work, tmp_path, *args) == "the database is not a database"
    assert sql_tables(tmp_path) == []


# --- Values and transactions ----------------------------------------------------------------------


@spec("SQL-4")
def test_types_survive_the_way_to_json_and_back(tmp_path):
    sql_execute(tmp_path, "CREATE TABLE t(v); INSERT INTO t VALUES (1), (1.5), ('ü'), (NULL), (x'00ff'), "
                          "(9007199254740992), (9007199254740993), (-9223372036854775808), (9e999), (-9e999)")
    assert [value for value, in rows(tmp_path, "SELECT v FROM t")] == [
        1, 1.5, "ü", None, "AP8=", 9007199254740992, "9007199254740993", "-9223372036854775808", "Infinity", "-Infinity"]
    assert rows(tmp_path, "SELECT CAST(x'ff41' AS TEXT)") == [("\ufffdA",)]


@spec("SQL-4")
def test_columns_are_told_without_rows_and_each_has_a_name_of_its_own(tmp_path):
    assert sql_query(tmp_path, "SELECT 1 AS a, 2 AS b WHERE 0") == storage.SqlResult(["a", "b"], [], 0)
    result = sql_query(tmp_path, 'SELECT 1 AS a, 2 AS "a:3", 3 AS a')
    assert result.columns == ["a", "a:3", "a:3:3"] and result.rows == [{"a": 1, "a:3": 2, "a:3:3": 3}]


@spec("SQL-5")
def test_statements_are_one_transaction(tmp_path):
    result = sql_execute(tmp_path, """
        CREATE TABLE t(id INTEGER PRIMARY KEY, body TEXT); -- a; comment
        INSERT INTO t(body) VALUES ('a;b'), ("c"), ('it''s; --'); /* ; */
        UPDATE t SET body = upper(body) WHERE id < 3 RETURNING id, body AS [b;]""")
    assert result == storage.SqlResult(["id", "b;"], [{"id": 1, "b;": "A;B"}, {"id": 2, "b;": "C"}], 5, ["t"])
    for broken in ("INSERT INTO t(body) VALUES ('x'); INSERT INTO nowhere VALUES (1)",
                   "DELETE FROM t; SELECT nonsense(1)", "DROP TABLE t; COMMIT", "DELETE FROM t; INSERT OR ROLLBACK INTO t(id) "
                   "VALUES (1), (1)"):
        failure(sql_execute, tmp_path, broken)
        assert rows(tmp_path, "SELECT count(*) FROM t") == [(3,)]


@spec("SQL-5")
def test_foreign_keys_are_enforced(tmp_path):
    sql_execute(tmp_path, "CREATE TABLE p(id INTEGER PRIMARY KEY); CREATE TABLE c(p REFERENCES p(id))")
    assert failure(sql_execute, tmp_path, "INSERT INTO c VALUES (1)") == "FOREIGN KEY constraint failed"


@spec("SQL-8")
def test_the_schema_lists_tables_by_name_and_columns_by_position(tmp_path):
    sql_execute(tmp_path, "CREATE TABLE z(a, b TEXT NOT NULL); CREATE TABLE a(id INTEGER PRIMARY KEY AUTOINCREMENT)")
    assert sql_schema(tmp_path) == [
        {"name": "a", "columns": [{"name": "id", "type": "INTEGER", "nullable": False}]},
        {"name": "z", "columns": [{"name": "a", "type": "ANY", "nullable": True},
                                  {"name": "b", "type": "TEXT", "nullable": False}]}]
    assert sql_tables(tmp_path) == ["a", "z"]


# --- Limits ---------------------------------------------------------------------------------------


@spec("SQL-6")
def test_rows_bytes_and_values_have_limits_that_are_named(tmp_path):
    assert sql_query(tmp_path, f"{ENDLESS} SELECT x FROM n LIMIT 1000").count == 1000
    assert failure(sql_query, tmp_path, f"{ENDLESS} SELECT x FROM n") == "the result is over the limit of 1000 rows; use LIMIT"
    assert failure(sql_query, tmp_path, f"{ENDLESS} SELECT randomblob(200000) FROM n") == (
        "the result is over the limit of 768 KiB")
    for huge in ("SELECT zeroblob(262145)", "SELECT replace(hex(zeroblob(1000)), '0', hex(zeroblob(200)))"):
        assert failure(sql_query, tmp_path, huge) == "a value or row is over the limit of 256 KiB"
    assert failure(sql_query, tmp_path, f"SELECT {','.join('1' * 201)}") == "too many columns in result set"


@spec("SQL-6")
def test_time_is_limited_for_queries_and_changes_and_a_change_then_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SQL_SECONDS", 0.2)
    sql_execute(tmp_path, "CREATE TABLE t(a)")
    began = time.monotonic()
    assert failure(sql_query, tmp_path, f"{ENDLESS} SELECT count(*) FROM n") == "stopped after 0.2 s, the limit on time"
    assert failure(sql_execute, tmp_path, f"INSERT INTO t VALUES (1); {ENDLESS} SELECT count(*) FROM n") == (
        "stopped after 0.2 s, the limit on time")
    assert time.monotonic() - began < 3
    assert rows(tmp_path, "SELECT count(*) FROM t") == [(0,)]


@spec("SQL-6")
def test_the_size_of_the_database_is_limited_and_what_did_not_fit_is_undone(tmp_path):
    sql_execute(tmp_path, "CREATE TABLE t(a)")
    filling = f"{ENDLESS} INSERT INTO t SELECT zeroblob(200000) FROM n LIMIT 340"
    assert failure(sql_execute, tmp_path, filling) == "the database is at its limit of 64 MiB"
    assert rows(tmp_path, "SELECT count(*) FROM t") == [(0,)]
    assert (tmp_path / "sql.db").stat().st_size < 100_000


@spec("SQL-6")
def test_a_change_that_rewrites_the_same_rows_cannot_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SQL_DATABASE_BYTES", 2_000_000)
    sql_execute(tmp_path, f"CREATE TABLE t(a); {ENDLESS} INSERT INTO t SELECT zeroblob(200000) FROM n LIMIT 30")
    rewriting = ";".join(["UPDATE t SET a = randomblob(200000)"] * 50)
    monkeypatch.setattr(storage, "SQL_LOOK_EVERY", 1)
    assert failure(sql_execute, tmp_path, rewriting) == "the database is at its limit of 64 MiB"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000_000


@spec("SQL-6")
@pytest.mark.parametrize("disguise", [str, str.upper, lambda sql: sql.replace(" AS (", "/*x*/as--\n("),
                                      lambda sql: sql.replace("t1 AS", '"t1"(x) AS'),
                                      lambda sql: sql.replace("AS (", "AS NOT MATERIALIZED (")], ids=range(5))
def test_names_that_multiply_are_refused_before_sqlite_copies_them(tmp_path, disguise):
    began = time.monotonic()
    assert failure(sql_query, tmp_path, disguise(bomb(30))) == (
        "its WITH names are used so often that it might grow beyond the limit of 500000 words")
    assert time.monotonic() - began < 1


@spec("SQL-6")
def test_the_with_of_ordinary_statements_is_let_through(tmp_path):
    assert rows(tmp_path, bomb(8)) == [(1,)]
    names = [f"s{n} AS (SELECT s{n - 1}.x, s{n - 1}.y, s{n - 1}.z FROM s{n - 1})" for n in range(1, 30)]
    assert rows(tmp_path, f"WITH s0 AS (SELECT 1 x, 2 y, 3 z), {', '.join(names)} SELECT s29.x, s29.z FROM s29") == [(1, 3)]
    sql_execute(tmp_path, "CREATE TABLE t(a, b INT AS (a + a), c INT GENERATED ALWAYS AS (b + b))")


# --- On the wire ----------------------------------------------------------------------------------


@spec("SQL-2", "SQL-5", "SQL-8")
@story
async def test_peers_share_a_database(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    answer = await ana.request("mesh_execute", sql="CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (1.5)")
    assert answer == {"type": "mesh_query_result", "columns": [], "rows": [], "rowCount": 1, "_reqId": "r1"}
    answer = await bo.request("mesh_query", sql="SELECT * FROM t")
    assert answer == {"type": "mesh_query_result", "columns": ["id", "v"], "rows": [{"id": 1, "v": 1.5}], "rowCount": 1,
                      "_reqId": "r1"}
    [table] = (await bo.request("mesh_schema"))["tables"]
    assert table["name"] == "t" and table["columns"][1] == {"name": "v", "type": "ANY", "nullable": True}
    assert (await bo.request("mesh_info"))["tables"] == ["t"]
    await world.restart()
    assert (await (await world.peer("ana")).request("mesh_info"))["tables"] == ["t"]


@spec("SQL-1")
@story
async def test_one_mesh_reaches_nothing_of_another_nor_of_the_broker(world):
    ana = await world.peer("ana")
    await ana.request("mesh_execute", sql="CREATE TABLE secret(a)")
    other = world.broker.create_mesh("moor", "Moor", world.owner.public)
    world.broker.end_turn()
    world.mesh, world.keys = other, {}
    zoe = await world.peer("zoe")
    for sql in ("SELECT * FROM secret", "SELECT * FROM den.secret", "SELECT * FROM member", "SELECT * FROM message"):
        answer = await zoe.request("mesh_query", sql=sql)
        assert (answer["code"], answer["message"].partition(":")[0]) == ("query_error", "no such table")


@spec("SQL-7")
@pytest.mark.parametrize(("type", "sql", "code", "message"), [
    ("mesh_query", "SELECT * FROM nowhere", "query_error", "no such table: nowhere"),
    ("mesh_execute", "DELETE FROM nowhere", "execute_error", "no such table: nowhere"),
    ("mesh_query", "DROP TABLE t", "query_error", "no such table: t"),
    ("mesh_query", "", "query_error", "mesh_query takes one statement, not 0"),
    ("mesh_execute", "", "execute_error", "there is no statement in it"),
    ("mesh_query", 7, "malformed", "mesh_query.sql: expected string"),
    ("mesh_query", None, "malformed", "mesh_query.sql: expected string"),
    ("mesh_execute", "x" * 262_145, "too_large", "mesh_execute.sql: longer than 262144 characters"),
    ("mesh_execute", "ATTACH 'x' AS x", "execute_error", "ATTACH and VACUUM are not allowed here")])
@story
async def test_bad_sql_gets_a_code_and_a_sentence(world, type, sql, code, message):
    ana = await world.peer("ana")
    answer = await ana.request(type, sql=sql)
    assert (answer["type"], answer["code"], answer["message"]) == ("error", code, message)
    assert await ana.silence() == []


@spec("SQL-7")
@story
async def test_an_unreadable_schema_is_a_schema_error(world):
    ana = await world.peer("ana")
    (world.data / "den" / "sql.db").write_bytes(b"nonsense" * 1000)
    answer = await ana.request("mesh_schema")
    assert (answer["code"], answer["message"]) == ("schema_error", "the database is not a database")
    assert (await ana.request("mesh_info"))["tables"] == []


@spec("SQL-9")
@story
async def test_answers_come_in_the_order_of_the_requests_of_a_connection(world, monkeypatch):
    ana = await world.peer("ana")
    slow = f"SELECT count(*) FROM ({ENDLESS} SELECT x FROM n LIMIT 300000)"
    ana.say(type="mesh_query", sql=slow, _reqId="slow")
    ana.say(type="mesh_execute", sql="CREATE TABLE t(a)")  # as a stock client sends it: no _reqId
    ana.say(type="mesh_execute", sql="nonsense")
    ana.say(type="mesh_query", sql="SELECT count(*) AS n FROM t", _reqId="last")
    first, second, third = await ana.next(), await ana.next(), await ana.next()
    assert (first["_reqId"], first["rows"]) == ("slow", [{"count(*)": 300000}])
    assert second == {"type": "mesh_query_result", "columns": [], "rows": [], "rowCount": 0}
    assert (third["_reqId"], third["rows"]) == ("last", [{"n": 0}])  # and of the nonsense not a word


@spec("SQL-9")
@story
async def test_a_long_query_holds_up_nobody_else(world, monkeypatch):
    monkeypatch.setattr(storage, "SQL_SECONDS", 1.0)
    ana, bo = await world.peer("ana"), await world.peer("bo")
    ana.say(type="mesh_query", sql=f"{ENDLESS} SELECT count(*) FROM n", _reqId="endless")
    assert (await bo.request("mesh_execute", sql="CREATE TABLE t(a); INSERT INTO t VALUES (1)"))["rowCount"] == 1
    assert (await bo.request("mesh_query", sql="SELECT a FROM t"))["rows"] == [{"a": 1}]
    assert (await bo.send(ana.key))["queued"] is True
    assert (await ana.push())["senderPubkey"] == bo.key
    assert (await ana.answer(lambda frame: "code" in frame))["message"] == "stopped after 1 s, the limit on time"


@spec("SQL-9")
@story
async def test_two_who_change_the_same_row_both_succeed_one_after_the_other(world):
    peers = [await world.peer(name) for name in ("ana", "bo", "cy")]
    await peers[0].request("mesh_execute", sql="CREATE TABLE t(n); INSERT INTO t VALUES (0)")
    answers = await asyncio.gather(*(peer.request("mesh_execute", sql="UPDATE t SET n = n + 1 RETURNING n") for peer in peers))
    assert sorted(answer["rows"][0]["n"] for answer in answers) == [1, 2, 3]


@spec("SQL-9")
@story
async def test_too_much_at_once_is_refused_and_the_requests_of_the_gone_are_dropped(world, monkeypatch):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    asked: list[str] = []
    query = storage.sql_query
    monkeypatch.setattr(storage, "sql_query", lambda directory, sql: asked.append(sql) or query(directory, sql))
    slow = f"SELECT count(*) FROM ({ENDLESS} SELECT x FROM n LIMIT 300000)"
    for n in range(129):
        ana.say(type="mesh_query", sql=slow if n == 0 else "SELECT 1", _reqId=str(n))
    answer = await ana.answer(lambda frame: "code" in frame)
    assert (answer["code"], answer["_reqId"]) == ("rate_limited", "128")
    await ana.drop()
    await bo.request("mesh_execute", sql="SELECT 1")
    async with asyncio.timeout(5):
        while world.mesh.at_work:
            await asyncio.sleep(0.001)
    assert len(asked) < 128
    assert (await bo.request("mesh_query", sql="SELECT 2"))["rows"] == [{"2": 2}]


@spec("SQL-1")
@story
async def test_a_group_name_with_a_quote_is_only_a_name(world):
    """What upstream pastes into its SQL (a quote in a group's name) is bound here."""
    nasty = "x' OR '1'='1"
    ana, bo = await world.peer("ana"), await world.peer("bo", groups=[{"name": nasty}])
    assert (await ana.send(f"@{nasty}"))["recipients"] == {"online": 1, "held": 0}
    assert await bo.text() == "hello"
    assert (await ana.send("@x"))["code"] == "no_such_recipient"


# --- Tools and command ----------------------------------------------------------------------------


@spec("SQL-10")
def test_the_tools_show_rows_changes_and_tables():
    alpha = FakeClient("alpha")
    session = Fixture(alpha)
    alpha.answers["mesh_query"] = {"columns": ["a|b", "c"], "rowCount": 2,
                                   "rows": [{"a|b": "x|\ny\\", "c": None}, {"a|b": 1.5, "c": "z"}]}
    assert session.call("mesh_query", sql="SELECT") == (
        "2 rows\n| a\\|b | c |\n| --- | --- |\n| x\\|<br>y\\\\ |  |\n| 1.5 | z |")
    alpha.answers["mesh_query"] = {"columns": ["a"], "rows": [], "rowCount": 0}
    assert session.call("mesh_query", sql="SELECT") == "0 rows\n| a |\n| --- |"
    alpha.answers["mesh_execute"] = {"columns": [], "rows": [], "rowCount": 3}
    assert session.call("mesh_execute", sql="DELETE") == "Done; 3 rows changed."
    alpha.answers["mesh_schema"] = {"tables": [{"name": "t", "columns": [
        {"name": "id", "type": "INTEGER", "nullable": False}, {"name": "v", "type": "ANY", "nullable": True}]}]}
    assert session.call("mesh_schema") == "**t**: id INTEGER not null, v ANY"
    alpha.answers["mesh_schema"] = {"tables": []}
    assert session.call("mesh_schema") == "There is no table yet; mesh_execute makes one."


@spec("SQL-10")
def test_a_result_is_cut_where_a_host_would_drop_it_and_says_so():
    alpha = FakeClient("alpha")
    alpha.answers["mesh_query"] = {"columns": ["a"], "rowCount": 500, "rows": [{"a": "x" * 996}] * 500}
    text = Fixture(alpha).call("mesh_query", sql="SELECT")
    assert len(text) < RESULT_CHARS + 100 and text.endswith("(441 more lines; ask for less)")


@spec("SQL-10")
@pytest.mark.parametrize(("tool", "code"), [("mesh_query", "query_error"), ("mesh_execute", "execute_error")])
def test_a_refused_statement_is_an_error_with_its_reason(tool, code):
    alpha = FakeClient("alpha")
    alpha.answers[tool] = claudemesh.MeshError(code, "no such table: t")
    assert Fixture(alpha).fail(tool, sql="x") == f"no such table: t ({code})"


@spec("SQL-10")
def test_the_command_reads_changes_and_lists(ada, bob):
    assert ada("sql", "--write", "CREATE TABLE sqlt(id INTEGER PRIMARY KEY, v); INSERT INTO sqlt(v) VALUES ('a\x1bb')") == (
        "rows changed: 1\n")
    assert bob("sql", "SELECT id, v, NULL AS n FROM sqlt") == "id  v       n\n1   a\\x1bb\n"
    assert bob("sql", "-", stdin="SELECT 1.5 AS x\n") == "x\n1.5\n"
    assert bob.json("sql", "SELECT id FROM sqlt") == {"columns": ["id"], "rows": [{"id": 1}], "rowCount": 1}
    assert bob("sql").splitlines() == [
        "TABLE  COLUMN  TYPE     NULLABLE", "sqlt   id      INTEGER  false", "sqlt   v       ANY      true"]
    assert bob.json("sql")[0] == {"table": "sqlt", "name": "id", "type": "INTEGER", "nullable": False}
    assert bob.fails("sql", "DROP TABLE sqlt") == (1, "mesh_query only reads; mesh_execute writes")
    assert bob.fails("sql", "--write", "DROP TABLE sqlx") == (1, "no such table: sqlx")
