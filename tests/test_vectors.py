"""Vectors, told in stories: what is found, in which order, with which score, and what bad input gets."""

from __future__ import annotations

import sqlite3
import zlib
from contextlib import closing
from math import log, sqrt

import pytest

import broker as hub
import claudemesh
import embedders
import store as storage
import wire
from broker import Broker
from store import Store, search, terms
from test_mcp import FakeClient, Fixture
from world import World, story

spec = pytest.mark.spec
NOW = 1_767_225_600_000  # 2026-01-01T00:00:00.000Z
KEY = "a1" * 32

#: A small set of texts, and queries labelled with the text they are about: other forms of its words, or misspelt ones.
TEXTS = {
    "auth": "The login service checks passwords against the user table and issues session tokens.",
    "deploy": "We deploy to production every Tuesday after the release branch is frozen.",
    "db": "Database migrations are run by the operator before the new version starts.",
    "parser": "The parser drops the last token when a line ends without a newline.",
    "cache": "Cached responses are invalidated when the underlying record changes.",
    "ui": "The settings page shows an empty list on small screens.",
    "mail": "Notification emails are queued and sent once an hour.",
    "price": "Invoices are rounded to two decimals, in the customer's currency.",
    "test": "Flaky tests are retried twice and reported on Friday.",
    "log": "Log lines are written as JSON, one object a line.",
    "backup": "Backups of every repository are copied to cold storage at night.",
    "lunch": "Lunch is at noon in the big kitchen; vegetarians please sign up.",
}
STEMS = [("how are users authenticated when logging in with a password", "auth"),
         ("deployment schedule for releases", "deploy"), ("deploying production releases", "deploy"),
         ("migrating the database", "db"), ("parsing tokens at line endings", "parser"), ("cache invalidation", "cache"), ("notifying by email", "mail"), ("rounding of invoice amounts", "price"),
         ("retry flaky testing", "test"), ("logging in JSON", "log"), ("backing up repositories", "backup"),
         ("vegetarian lunches", "lunch"), ("Where are the settings screen bugs?", "ui")]
MISSPELT = [("databse migratoins", "db"), ("pasrer drops tokn", "parser"), ("invalidating chached record", "cache"),
            ("notificaton emial", "mail"), ("vegeterians in the kichen", "lunch"), ("PASWORD CHEKS", "auth")]


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "team", mesh_id="M" * 32, slug="team", name="Team", owner_pubkey="00" * 32, now=NOW)
    yield made
    made.close()


def fill(store: Store, texts: list[str], collection: str = "notes") -> list[str]:
    ids = [store.add_vector(collection, text, {}, KEY, NOW) for text in texts]
    store.commit()
    return ids


def found(store: Store, query: str, collection: str = "notes", limit: int = 10) -> list[tuple[str, float]]:
    return [(row.text, score) for row, score in search(store.directory, collection, query, limit)]


def rows_left(store: Store) -> list[int]:
    """How many rows the index has, table by table."""
    with closing(sqlite3.connect(store.directory / "mesh.db")) as db:
        return [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("collection", "vector", "term", "posting")]


# --- Similarity -----------------------------------------------------------------------------------


@spec("VEC-4")
@pytest.mark.parametrize(("query", "wanted"), STEMS + MISSPELT)
def test_texts_with_the_same_stems_or_misspelt_words_rank_above_all_others(store, query, wanted):
    fill(store, list(TEXTS.values()))
    (best, score), (_, next_score), *_ = found(store, query)
    assert best == TEXTS[wanted] and score > next_score and 0 < score <= 1


@spec("VEC-4")
def test_the_score_is_1_for_the_only_text_and_falls_with_what_is_shared(store):
    fill(store, ["the quick brown fox"])
    assert found(store, "The QUICK brown fox!")[0][1] < 1
    assert found(store, "the quick brown fox") == [("the quick brown fox", pytest.approx(1.0))]
    fill(store, ["the quick brown dog", "a slow green turtle"])
    texts, scores = zip(*found(store, "the quick brown fox"), strict=True)
    assert texts == ("the quick brown fox", "the quick brown dog") and 1 >= scores[0] > scores[1] > 0


@spec("VEC-4")
def test_the_method_is_the_one_that_is_written_down(store):
    """The scores of two texts, computed by hand from SPEC: words, pairs and 3-grams of `ab` and `ab cd`."""
    fill(store, ["ab", "ab cd"])
    rare, common = log(1 + (2 - 1 + 0.5) / (1 + 0.5)), log(1 + (2 - 2 + 0.5) / (2 + 0.5))
    # `ab` has the word " ab " and the pieces " ab" and "ab "; `ab cd` six such, and the pair
    query = {"common": 3 * [common], "rare": 4 * [rare]}
    length = sqrt(sum(w * w for w in query["common"] + query["rare"]))
    (first, one), (second, two) = found(store, "ab cd")
    assert (first, second) == ("ab cd", "ab")
    assert one == pytest.approx((3 * common + 4 * rare) / length / sqrt(7))
    assert two == pytest.approx(3 * common / length / sqrt(3))


@spec("VEC-3")
def test_case_accents_forms_and_punctuation_are_levelled():
    assert terms("Crème BRÛLÉE") == terms("creme brulee") and terms("ﬁne Straße") == terms("fine strasse")
    assert storage.words("snake_case, c++ (v2) 🎉") == ["snake", "case", ",", "c", "++", "(", "v2", ")", "🎉"]
    assert storage.words(" \n\t") == []
    assert storage.words("x" * 100) == ["x" * 64, "x" * 36]
    assert terms("東京都")[zlib.crc32(" 東京".encode())] == 1


@spec("VEC-4")
def test_a_word_that_is_repeated_counts_more_but_not_in_proportion(store):
    fill(store, ["error", "error " * 50 + "timeout", "timeout"])
    scores = dict(found(store, "error"))
    assert 0.3 < scores["error " * 50 + "timeout"] < scores["error"]


@spec("VEC-5")
def test_common_terms_are_left_to_the_second_pass(store, monkeypatch):
    texts = [f"the common words of entry {n}" for n in range(50)] + ["the common words of a zebra"]
    fill(store, texts)
    complete = found(store, "the common words of zebras", limit=3)
    monkeypatch.setattr(storage, "SEARCH_POSTINGS", 1)
    monkeypatch.setattr(storage, "SEARCH_CANDIDATES", 1)
    assert found(store, "the common words of zebras", limit=1) == complete[:1]  # the same score, from fewer postings
    assert complete[0][0] == "the common words of a zebra"


@spec("VEC-1", "VEC-8")
def test_collections_keep_their_names_and_their_texts_apart(store):
    fill(store, ["one"], "a-b")
    fill(store, ["one"], "a_b")
    fill(store, ["one"], "A-B")
    assert store.collections() == ["A-B", "a-b", "a_b"]
    assert len(found(store, "one", "a-b")) == 1
    assert found(store, "one", "a b") == []


@spec("VEC-1")
def test_a_deleted_text_leaves_nothing_behind(store):
    first, second = fill(store, ["alpha beta gamma", "beta gamma delta"])
    before = rows_left(store)
    [third] = fill(store, ["beta beta epsilon"])
    assert store.delete_vector("notes", third) is True
    store.commit()
    assert rows_left(store) == before
    assert store.delete_vector("notes", third) is False and store.delete_vector("other", first) is False
    for id in (first, second):
        store.delete_vector("notes", id)
    store.commit()
    assert rows_left(store) == [0, 0, 0, 0] and store.collections() == []


@spec("VEC-1")
def test_what_a_turn_stored_goes_with_the_turn(store):
    fill(store, ["kept"])
    before = rows_left(store)
    store.add_vector("notes", "lost", {}, KEY, NOW)
    store.add_vector("new", "lost", {}, KEY, NOW)
    store.rollback()
    assert rows_left(store) == before and found(store, "lost") == []


# --- On the wire ----------------------------------------------------------------------------------


@spec("VEC-1", "VEC-2")
@story
async def test_a_text_is_stored_found_and_deleted_by_anybody(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    metadata = {"topic": "pets", "n": 2**60, "deep": [{"x": None}], "stored_by": "mallory", "text": "forged"}
    id = (await ana.request("vector_store", collection="notes", text="The dog barks.", metadata=metadata))["id"]
    assert len(id) == 32
    [hit] = (await bo.request("vector_search", collection="notes", query="barking dogs"))["results"]
    stored_at = hit["metadata"].pop("stored_at")
    assert wire.iso(world.broker.clock())[:16] >= stored_at[:16] and stored_at.endswith("Z")
    assert hit == {"id": id, "text": "The dog barks.", "score": hit["score"], "metadata": {
        "topic": "pets", "n": 2**60, "deep": [{"x": None}], "text": "The dog barks.", "mesh_id": world.mesh.id,
        "stored_by": ana.pair.public}}
    assert 0 < hit["score"] < 1
    assert (await bo.request("list_collections"))["collections"] == ["notes"]
    assert (await bo.request("mesh_info"))["collections"] == ["notes"]
    answer = await bo.request("vector_delete", collection="notes", id=id)
    assert (answer["type"], answer["id"]) == ("ack", id)
    assert (await ana.request("list_collections"))["collections"] == []


@spec("VEC-6")
@story
async def test_a_search_sees_what_the_same_connection_stored_just_before(world):
    ana = await world.peer("ana")
    for n in range(3):
        ana.say(type="vector_store", collection="notes", text=f"entry {n}")
        ana.say(type="vector_search", collection="notes", query="entry", _reqId=str(n))
    for n in range(3):
        assert (await ana.next())["type"] == "vector_stored"
    assert [len((await ana.expect("vector_results", _reqId=str(n)))["results"]) for n in range(3)] == [3, 3, 3]


@spec("VEC-7")
@story
async def test_an_answer_has_as_many_texts_as_are_asked_for_and_fit(world):
    ana = await world.peer("ana")
    for n in range(15):
        await ana.request("vector_store", collection="notes", text=f"entry number {n}")
    for limit, count in ((None, 10), (3, 3), (0, 10), (-5, 1), (2.9, 2), (1000, 15)):
        answer = await ana.request("vector_search", collection="notes", query="entry", limit=limit)
        scores = [hit["score"] for hit in answer["results"]]
        assert (len(scores), scores) == (count, sorted(scores, reverse=True))
    for n in range(70):
        await ana.request("vector_store", collection="long", text="€uro " * 1600, metadata={"n": n})
    answer = await ana.request("vector_search", collection="long", query="€uro", limit=100)
    assert 0 < len(answer["results"]) < 70 and len(wire.encode(answer).encode()) < 1_100_000


@spec("VEC-1", "VEC-8")
@pytest.mark.parametrize(("frame", "code", "message"), [
    ({"type": "vector_store", "collection": "", "text": "x"}, "malformed", "vector_store.collection: empty"),
    ({"type": "vector_store", "collection": "notes", "text": " \n"}, "vector_error", "the text has no word to find it by"),
    ({"type": "vector_store", "collection": "notes", "text": "x" * 8193}, "too_large",
     "vector_store.text: longer than 8192 characters"),
    ({"type": "vector_store", "collection": "x" * 129, "text": "x"}, "too_large",
     "vector_store.collection: longer than 128 characters"),
    ({"type": "vector_store", "collection": "notes", "text": "x", "metadata": {"x": "y" * 16_384}}, "too_large",
     "vector_store.metadata: longer than 16384 bytes"),
    ({"type": "vector_store", "collection": "notes", "text": "x", "metadata": []}, "malformed",
     "vector_store.metadata: expected object"),
    ({"type": "vector_store", "collection": "notes", "text": 7}, "malformed", "vector_store.text: expected string"),
    ({"type": "vector_search", "collection": "notes", "query": ""}, "vector_error", "the query has no word to search for"),
    ({"type": "vector_search", "collection": "other", "query": "x"}, "not_found", "no collection 'other'"),
    ({"type": "vector_search", "collection": "notes", "query": "x" * 1025}, "too_large",
     "vector_search.query: longer than 1024 characters"),
    ({"type": "vector_search", "collection": "notes", "query": "x", "limit": "all"}, "malformed",
     "vector_search.limit: expected number"),
    ({"type": "vector_delete", "collection": "notes", "id": "nothing"}, "not_found",
     "no text 'nothing' in collection 'notes'"),
    ({"type": "vector_delete", "collection": "other", "id": "nothing"}, "not_found", "no collection 'other'"),
])
@story
async def test_bad_input_gets_a_code_and_a_sentence_and_changes_nothing(world, frame, code, message):
    ana = await world.peer("ana")
    await ana.request("vector_store", collection="notes", text="the only one")
    answer = await ana.request(**frame)
    assert (answer["type"], answer["code"], answer["message"]) == ("error", code, message)
    assert rows_left(world.mesh.store)[:2] == [1, 1]


@spec("VEC-8")
@story
async def test_the_number_of_collections_is_limited(world, monkeypatch):
    monkeypatch.setattr(storage, "MAX_COLLECTIONS", 2)
    ana = await world.peer("ana")
    for name in ("one", "two", "one"):
        await ana.request("vector_store", collection=name, text="x")
    answer = await ana.request("vector_store", collection="three", text="x")
    assert (answer["code"], answer["message"]) == ("limit", "a mesh has at most 2 collections")
    assert (await ana.request("list_collections"))["collections"] == ["one", "two"]


# --- Embedders ------------------------------------------------------------------------------------

@spec("VEC-9")
@story(embedder="embedders:by_subject")
async def test_an_embedder_finds_what_is_spelt_otherwise(world):
    embedders.calls.clear()
    ana = await world.peer("ana")
    for text in ("A puppy sleeps.", "An automobile passes.", "A storm comes up."):
        await ana.request("vector_store", collection="notes", text=text)
    hits = (await ana.request("vector_search", collection="notes", query="dog"))["results"]
    assert [(hit["text"], hit["score"]) for hit in hits][:2] == [("A puppy sleeps.", 1.0), ("An automobile passes.", 0.0)]
    assert [len(texts) for texts in embedders.calls] == [1, 3]
    await ana.request("vector_search", collection="notes", query="lorry", limit=1)
    assert [len(texts) for texts in embedders.calls] == [1, 3, 1]  # what it has made of texts is kept


@spec("VEC-9")
@story(embedder="embedders:by_length")
async def test_another_embedder_is_shown_everything_again(world):
    ana = await world.peer("ana")
    for n in range(100):
        await ana.request("vector_store", collection="notes", text="x" * (n + 1))
    assert (await ana.request("vector_search", collection="notes", query="x" * 50, limit=1))["results"][0]["text"] == "x" * 50
    world.settings["embedder"] = "embedders:by_subject"
    await world.restart()
    embedders.calls.clear()
    ana = await world.peer("ana")
    assert len((await ana.request("vector_search", collection="notes", query="dog", limit=100))["results"]) == 100
    assert [len(texts) for texts in embedders.calls] == [1, 64, 36]


@spec("VEC-9")
@pytest.mark.parametrize(("name", "message"), [
    ("broken", "the embedder failed: RuntimeError"),
    ("endless", "the embedder failed: ValueError"),
    ("too_few", "the embedder did not return 1 lists of one length"),
    ("uneven", "the embedder returns lists of different lengths")])
def test_an_embedder_that_fails_is_a_vector_error(tmp_path, name, message):
    @story(embedder=f"embedders:{name}")
    async def tell(world):
        ana = await world.peer("ana")
        await ana.request("vector_store", collection="notes", text="the text")
        answer = await ana.request("vector_search", collection="notes", query="text")
        assert (answer["code"], answer["message"]) == ("vector_error", message)
        assert (await ana.request("list_collections"))["collections"] == ["notes"]
    tell(tmp_path=tmp_path)


@spec("VEC-9")
@pytest.mark.parametrize(("name", "why"), [
    ("embedders:nothing", "AttributeError"), ("no_such_module:f", "ModuleNotFoundError"), ("embedders", "AttributeError"),
    ("embedders:not_a_function", "not a function"), (":f", "ValueError")])
def test_an_embedder_that_cannot_be_had_ends_the_broker_with_one_line(tmp_path, capsys, name, why):
    with pytest.raises(wire.UsageError, match=why):
        Broker(data=tmp_path, port=0, embedder=name)
    assert hub.main(["--port", "0", "--data", str(tmp_path), "--embedder", name]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"claudemesh broker: embedder {name}: ") and err.count("\n") == 1


# --- Tools ----------------------------------------------------------------------------------------


@spec("VEC-10")
def test_the_tools_show_whole_ids_scores_and_the_callers_metadata():
    alpha = FakeClient("alpha")
    session = Fixture(alpha)
    alpha.answers["vector_store"] = {"id": "i" * 32}
    assert session.call("vector_store", collection="no tes", text="x") == f'Stored in "no tes": {"i" * 32}.'
    stored = {"text": "a\nb", "mesh_id": "m", "stored_by": "k", "stored_at": "T"}
    alpha.answers["vector_search"] = {"results": [
        {"id": "i" * 32, "text": "a\nb", "score": 0.98765, "metadata": {"topic": "x", **stored}},
        {"id": "j" * 32, "text": "c", "score": 0, "metadata": stored}]}
    assert session.call("vector_search", collection="notes", query="a") == (
        f'2 of "notes":\n- {"i" * 32} 0.988 a b {{"topic":"x"}}\n- {"j" * 32} 0.000 c')
    assert session.call("vector_delete", collection="notes", id="i") == 'Deleted i from "notes".'
    alpha.answers["list_collections"] = {"collections": ["a", "b"]}
    assert session.call("list_collections") == '- "a"\n- "b"'
    alpha.answers["list_collections"] = {"collections": []}
    assert session.call("list_collections") == "There is no collection yet."
    alpha.answers["vector_search"] = claudemesh.MeshError("not_found", "no collection 'x'")
    assert session.fail("vector_search", collection="x", query="a") == "no collection 'x' (not_found)"
