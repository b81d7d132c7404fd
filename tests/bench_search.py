"""How long `vector_search` takes in a collection of 10,000 short texts.

    python tests/bench_search.py [--texts 10000] [--queries 200]

The texts are pieces of sentences from the language reference that comes with Python, joined at random to
have enough of them. Times are told for `store.search` alone, with its connection opened anew each time,
and over the wire, from a client's request to its answer. Prints median, 95th percentile and maximum in
milliseconds. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import store as storage  # noqa: E402
from world import World  # noqa: E402

STEPS = [("median", 50), ("95 %", 95)]


def corpus(count: int, chance: random.Random) -> list[str]:
    """Short texts of about 65 characters."""
    parts = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"[.:]\s", " ".join(topics.values()))]
    parts = [part for part in parts if 30 < len(part) < 160]
    while len(parts) < count:
        head, tail = chance.choice(parts).split(), chance.choice(parts).split()
        parts.append(" ".join(head[:7] + tail[-6:]))
    return parts[:count]


def asked(texts: list[str], count: int, chance: random.Random) -> list[str]:
    """Queries: the words of a text, some of them left out or misspelt."""
    queries = []
    for text in chance.sample(texts, count):
        words = text.split()
        words = chance.sample(words, min(len(words), chance.randint(2, 8)))
        queries.append(" ".join(word[1:] if chance.random() < 0.2 else word for word in words) + " x")
    return queries


def tell(what: str, seconds: list[float]) -> None:
    cuts = statistics.quantiles(seconds, n=100)
    shown = "  ".join(f"{name} {cuts[at - 1] * 1000:6.1f}" for name, at in STEPS)
    print(f"{what:<34} {shown}  max {max(seconds) * 1000:6.1f} ms")


async def run(count: int, queries: int) -> None:
    chance = random.Random(1)
    texts = corpus(count, chance)
    questions = asked(texts, queries, chance)
    with tempfile.TemporaryDirectory() as data:
        async with World(Path(data)) as world:
            store = world.mesh.store
            began = time.perf_counter()
            for text in texts:
                store.add_vector("notes", text, {}, "a1" * 32, 0)
            store.commit()
            took = time.perf_counter() - began
            store.checkpoint()
            size = os.path.getsize(store.directory / "mesh.db") / 1e6
            print(f"{count} texts of {statistics.mean(map(len, texts)):.0f} characters: "
                  f"{took / count * 1e6:.0f} us each to store, {size:.1f} MB in mesh.db")
            times = []
            for question in questions:
                began = time.perf_counter()
                storage.search(store.directory, "notes", question, 10)
                times.append(time.perf_counter() - began)
            tell("search, in this process", times)
            peer = await world.peer("ana")
            times.clear()
            for question in questions:
                began = time.perf_counter()
                answer = await peer.request("vector_search", collection="notes", query=question)
                times.append(time.perf_counter() - began)
                assert answer["results"], answer
            tell("vector_search, over the wire", times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    asyncio.run(run(options.texts, options.queries))
