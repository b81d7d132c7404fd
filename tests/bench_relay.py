"""How fast the broker relays, beside a naive relay on the `websockets` package that stores nothing.

    python tests/bench_relay.py [--seconds 3] [--rounds 3] [--only NAME] [--no-naive] [--history N] [--hello]

Starts each relay as a process of its own on loopback and loads it from this one. The broker runs with
`synchronous=FULL` and stores every message; its receivers acknowledge (`client_ack`, `upTo`), one
acknowledgement for each batch they read. The naive relay decodes a frame, looks up the receiver, forwards
it and acknowledges. Both see the same frames: 256 bytes of text in a base64 body. Rounds alternate between
the two. Prints the median, the range, and the ratio of the medians. Nothing is asserted.

Needs `pip install websockets`, for the benchmark only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import store  # noqa: E402
import wire  # noqa: E402

BODY = base64.b64encode(os.urandom(256)).decode()
NONCE = base64.b64encode(os.urandom(24)).decode()


class Shape(NamedTuple):
    """A pattern of load: so many senders, each to `fan` receivers of its own, with `window` in flight."""

    name: str
    senders: int
    fan: int
    window: int


SHAPES = [Shape("1 -> 1, 64 in flight", 1, 1, 64), Shape("10 -> 10, 64 in flight", 10, 1, 64),
          Shape("10 pairs, 1 in flight", 10, 1, 1), Shape("1 -> 50, 16 in flight", 1, 50, 16)]

NAIVE = '''
import asyncio, json, logging, sys
from websockets.asyncio.server import serve
peers, groups = {}, {}
async def handle(ws):
    me = None
    try:
        async for text in ws:
            frame = json.loads(text)
            kind = frame["type"]
            if kind == "hello":
                me = frame["pubkey"]; peers[me] = ws
                for group in frame.get("groups", ()): groups.setdefault(group["name"], {})[me] = ws
                await ws.send(json.dumps({"type": "hello_ack"}))
            elif kind == "send":
                target = frame["targetSpec"]
                push = json.dumps({"type": "push", "senderPubkey": me, "nonce": frame["nonce"], "ciphertext": frame["ciphertext"]})
                to = groups.get(target[1:], {}).values() if target[0] == "@" else [peers[target]]
                for peer in list(to): await peer.send(push)
                await ws.send(json.dumps({"type": "ack", "id": frame["id"]}))
    finally:
        peers.pop(me, None)
        for members in groups.values(): members.pop(me, None)
async def main():
    async with serve(handle, "127.0.0.1", 0, max_size=None, compression=None, ping_interval=None) as server:
        print(json.dumps({"url": "ws://127.0.0.1:%d" % server.sockets[0].getsockname()[1]}), flush=True)
        await asyncio.Future()
logging.disable(logging.CRITICAL)
asyncio.run(main())
'''


# --- the relays, each in a process of its own -----------------------------------------------------


class Relay:
    """A relay process; `url` once started."""

    def __init__(self, command: list[str], **popen: object) -> None:
        self.process = subprocess.Popen(command, cwd=ROOT, **popen)  # type: ignore[call-overload]
        self.url = ""
        self.members: Members | None = None

    def cpu(self) -> float:
        """Seconds of processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """Resident memory in MB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start_naive() -> Relay:
    relay = Relay([sys.executable, "-c", NAIVE], stdout=subprocess.PIPE, text=True)
    relay.url = json.loads(relay.process.stdout.readline())["url"]
    return relay


def start_broker(data: str) -> Relay:
    members = Members(data)
    # imported, so that it is compiled once: the compiler's memory is not the broker's
    command = [sys.executable, "-c", "import broker, sys; sys.exit(broker.main())"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    relay = Relay([*command, "--port", "0", "--data", data, "--max-connections", "1000"], stderr=subprocess.PIPE,
                  text=True, env=environment)
    relay.url = json.loads(relay.process.stderr.readline())["url"]
    threading.Thread(target=relay.process.stderr.read, daemon=True).start()  # or the pipe of its log fills
    relay.members = members
    return relay


class Members:
    """A mesh with many members, made before the broker starts; each connection is another member."""

    def __init__(self, data: str) -> None:
        now = int(time.time() * 1000)
        self.mesh = os.urandom(16).hex()
        mesh = store.Store.create(Path(data) / "bench", mesh_id=self.mesh, slug="bench", name="bench",
                                  owner_pubkey=wire.KeyPair.generate().public, now=now)
        pairs = [wire.KeyPair.generate() for _ in range(1000)]
        self.members = [(pair, mesh.add_member(pair.public, "bench", "member", now).id) for pair in pairs]
        mesh.commit()
        mesh.close()
        self.next = 0

    def hello(self, session: wire.KeyPair, group: str | None) -> dict:
        pair, member = self.members[self.next % len(self.members)]
        self.next += 1
        now = int(time.time() * 1000)
        return {"type": "hello", "meshId": self.mesh, "memberId": member, "pubkey": pair.public, "timestamp": now,
                "signature": wire.sign(wire.hello_text(self.mesh, member, pair.public, now), pair.secret),
                "sessionPubkey": session.public, "sessionId": session.public[:16],
                "sessionSignature": wire.sign(wire.session_text(self.mesh, pair.public, session.public, now), session.secret),
                "capabilities": ["client_ack", "session_proof"], **({"groups": [{"name": group}]} if group else {})}


# --- the load -------------------------------------------------------------------------------------
# The load must cost less than the relay, so frames are told apart by their length: an acknowledgement is
# shorter than a notice of the broker, and a notice shorter than a push with a body.

ACK_BELOW, PUSH_ABOVE = 250, 490


class End:
    """One connection of the load: frames are prepared once and cut without decoding their JSON."""

    def __init__(self, conn: wire.Connection) -> None:
        self.conn = conn
        self.ws = conn.ws
        self.got = 0

    async def receive(self) -> list[str]:
        messages = await self.conn.receive()
        if messages is None:
            raise ConnectionError("closed")
        return messages


def last_seq(texts: list[str]) -> int:
    """The `seq` that ends the last push."""
    text = texts[-1]
    return int(text[text.rindex(":") + 1:-1])


async def connect(relay: Relay, members: Members | None, group: str | None = None) -> tuple[End, str]:
    session = wire.KeyPair.generate()
    end = End(await wire.connect(relay.url))
    if members is None:
        hello = {"type": "hello", "pubkey": session.public, **({"groups": [{"name": group}]} if group else {})}
    else:
        hello = members.hello(session, group)
    end.conn.send(json.dumps(hello))
    while not any("hello_ack" in text for text in await end.receive()):
        pass
    return end, session.public


async def sender(end: End, target: str, window: int, until: float) -> int:
    template = json.dumps({"type": "send", "id": "IDIDIDIDIDIDIDID", "targetSpec": target, "priority": "next",
                           "nonce": NONCE, "ciphertext": BODY})
    before, after = template.split("IDIDIDIDIDIDIDID")
    sent = acked = 0
    while True:
        frames = []
        while sent - acked < window and time.perf_counter() < until:
            frames.append(end.ws.text(f"{before}{sent:016d}{after}"))
            sent += 1
        if frames:
            end.conn.write(b"".join(frames))
        if acked >= sent:
            return acked
        acked += sum(len(text) < ACK_BELOW for text in await end.receive())


async def receiver(end: End, ack: bool) -> None:
    try:
        while True:
            texts = await end.receive()
            end.got += sum(len(text) > PUSH_ABOVE for text in texts)
            if ack:
                end.conn.send(f'{{"type":"client_ack","upTo":{last_seq(texts)},"stage":"shown"}}')
    except ConnectionError:
        pass


async def load(relay: Relay, members: Members | None, shape: Shape, seconds: float) -> float:
    """Messages per second, or deliveries per second for a fan-out; the naive relay has no `members`."""
    lanes, tasks, ends = [], [], []
    for lane in range(shape.senders):
        group = os.urandom(4).hex() if shape.fan > 1 else None
        receivers = [await connect(relay, members, group) for _ in range(shape.fan)]
        source, _ = await connect(relay, members)
        lanes.append((source, f"@{group}" if group else receivers[0][1]))
        ends += [end for end, _ in receivers] + [source]
        tasks += [asyncio.ensure_future(receiver(end, members is not None)) for end, _ in receivers]
    receivers = [end for end in ends if all(end is not source for source, _ in lanes)]
    begin = time.perf_counter()
    counts = await asyncio.gather(*(sender(end, target, shape.window, begin + seconds) for end, target in lanes))
    expected = sum(counts) * shape.fan
    while sum(end.got for end in receivers) < expected and time.perf_counter() < begin + seconds + 10:
        await asyncio.sleep(0.005)
    took = time.perf_counter() - begin
    missing = expected - sum(end.got for end in receivers)
    for task in tasks:
        task.cancel()
    for end in ends:
        end.conn.begin_close()  # a leave, not a drop: the next round begins with an empty room
    await asyncio.gather(*(end.conn.close() for end in ends))
    if missing:
        print(f"  !! {missing} deliveries missing")
    return expected / took


# --- the report -----------------------------------------------------------------------------------


def report(name: str, values: dict[str, list[float]], unit: str) -> None:
    line = f"{name:28}"
    medians = {}
    for relay, rates in values.items():
        medians[relay] = statistics.median(rates)
        line += f"  {relay} {medians[relay]:8,.0f} {unit} ({min(rates):,.0f}-{max(rates):,.0f})"
    if len(medians) == 2:
        line += f"  ratio {medians['broker'] / medians['naive']:.2f}"
    print(line, flush=True)


async def throughput(relays: dict[str, Relay], options: argparse.Namespace) -> None:
    for shape in SHAPES:
        if options.only and options.only not in shape.name:
            continue
        values: dict[str, list[float]] = {name: [] for name in relays}
        for _ in range(options.rounds):
            for name, relay in relays.items():
                values[name].append(await load(relay, relay.members, shape, options.seconds))
        report(shape.name, values, "/s")


async def steady(relay: Relay, rate: int, count: int) -> None:
    """Latency from write to push at a steady rate, and the processor time it costs."""
    members = relay.members
    (target, key), (source, _) = await connect(relay, members), await connect(relay, members)
    latencies: list[float] = []
    template = json.dumps({"type": "send", "id": "x", "targetSpec": key, "priority": "next", "nonce": NONCE, "ciphertext": BODY})
    sent: list[float] = []
    drained = asyncio.ensure_future(receiver(source, False))

    async def receive() -> None:
        while len(latencies) < count:
            texts = await target.receive()
            now = time.perf_counter()
            for text in texts:
                if len(text) > PUSH_ABOVE:
                    latencies.append(now - sent[len(latencies)])
            if texts:
                target.conn.send(f'{{"type":"client_ack","upTo":{last_seq(texts)}}}')

    task, cpu, begin = asyncio.ensure_future(receive()), relay.cpu(), time.perf_counter()
    for n in range(count):
        await asyncio.sleep(max(0.0, begin + n / rate - time.perf_counter()))
        sent.append(time.perf_counter())
        source.conn.send(template)
    await asyncio.wait_for(task, 10)
    drained.cancel()
    used = relay.cpu() - cpu
    latencies.sort()
    print(f"{rate} messages/s: p50 {1000 * latencies[count // 2]:.2f} ms, p99 {1000 * latencies[count * 99 // 100]:.2f} ms; "
          f"{used / count * 10_000:.1f} CPU-seconds per 10,000 messages")


async def hellos(relay: Relay, count: int) -> None:
    """The time for `count` connections to be greeted, and the memory they take."""
    members = relay.members
    conns = [End(await wire.connect(relay.url)) for _ in range(count)]
    frames = [json.dumps(members.hello(wire.KeyPair.generate(), None)) for _ in conns]
    begin = time.perf_counter()
    for end, frame in zip(conns, frames):
        end.conn.send(frame)
    for end in conns:
        while not any("hello_ack" in text for text in await end.receive()):
            pass
    print(f"{count} hellos in {time.perf_counter() - begin:.2f} s; resident {relay.resident():.0f} MB with {count} peers")
    await asyncio.gather(*(end.conn.close() for end in conns))


async def history(relay: Relay, count: int) -> None:
    """Settles `count` messages, so that what follows runs on a store that has a past."""
    total = 0.0
    while total < count:
        total += 2 * await load(relay, relay.members, SHAPES[1], 2.0)


async def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.dir) as data:
        relays = {"broker": start_broker(data)}
        if not options.no_naive:
            relays["naive"] = start_naive()
        try:
            if options.hello or not options.only:
                await hellos(relays["broker"], 100)
                await steady(relays["broker"], 100, 500)
            await throughput(relays, options)
            if options.history:
                await history(relays["broker"], options.history)
                print(f"again, with {options.history:,} settled messages in the store:")
                await throughput(relays, options)
        finally:
            for relay in relays.values():
                relay.stop()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--no-naive", action="store_true")
    arguments.add_argument("--history", type=int, default=0)
    arguments.add_argument("--hello", action="store_true")
    arguments.add_argument("--dir", default=None, help="where the store goes (a real disk, not tmpfs)")
    asyncio.run(main(arguments.parse_args()))
