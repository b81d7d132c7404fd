"""The broker is killed under load, again and again; nothing acknowledged is lost, nothing is shown twice.

    python tests/test_crash.py 20     kills it twenty times and prints what happened
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import claudemesh  # noqa: E402

LIMIT = 30.0  # seconds for the receiver to have everything after the last restart
LOAD_SECONDS = 0.4  # under load before each kill


class BrokerProcess:
    """A broker in a process of its own, on one port and directory for all its lives."""

    def __init__(self, data: Path) -> None:
        self.data, self.port = data, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "broker.py"), "--port", str(self.port), "--data", str(self.data)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        record = json.loads(self.process.stderr.readline())
        self.url = record["url"]
        self.port = int(self.url.rpartition(":")[2].partition("/")[0])
        self.process.stderr.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


async def send_for_ever(client: claudemesh.MeshClient, target: str, acknowledged: list[str], lane: int) -> None:
    """Sends one message after another; notes the text of each that was acknowledged."""
    number = 0
    while True:
        number += 1
        text = f"{lane}-{number}"
        await client.send(target, text, timeout=LIMIT)
        acknowledged.append(text)


async def crash(directory: Path, times: int, lanes: int = 16) -> tuple[list[str], list[str]]:
    """The texts that were acknowledged to the senders, and those the receiving program was handed."""
    claudemesh._load()
    broker = BrokerProcess(directory / "data")
    config, other = directory / "ada", directory / "bob"
    try:
        await asyncio.to_thread(claudemesh.create_mesh, "crash", "Crash", broker.url, display_name="Ada", dir=config)
        link = await asyncio.to_thread(claudemesh.make_invite, "crash", dir=config)
        await asyncio.to_thread(claudemesh.join_mesh, link, "Bob", dir=other)
        acknowledged: list[str] = []
        shown: list[str] = []
        async with claudemesh.MeshClient.from_config("crash", dir=config, name="Ada") as ada, \
                claudemesh.MeshClient.from_config("crash", dir=other, name="Bob") as bob:

            async def receive() -> None:
                async for push in bob:
                    if push.kind == "message":
                        shown.append(push.text)

            receiving = asyncio.create_task(receive())
            sending = [asyncio.create_task(send_for_ever(ada, bob.key, acknowledged, lane)) for lane in range(lanes)]
            for _ in range(times):
                before, until = len(acknowledged), time.monotonic() + LIMIT
                while len(acknowledged) < before + 50 and time.monotonic() < until:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(LOAD_SECONDS * int.from_bytes(os.urandom(1)) / 255)
                broker.kill()
                broker.start()
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
            async with asyncio.timeout(LIMIT):
                while not set(acknowledged) <= set(shown):
                    await asyncio.sleep(0.02)
            receiving.cancel()
        return acknowledged, shown
    finally:
        broker.kill()


@pytest.mark.spec("TURN-1", "STORE-2", "CLIENT-9", "CLIENT-16")
def test_a_broker_killed_under_load_loses_nothing_it_acknowledged_and_repeats_nothing(tmp_path):
    acknowledged, shown = asyncio.run(crash(tmp_path, times=3))
    assert len(acknowledged) >= 150
    assert set(acknowledged) - set(shown) == set()
    assert len(shown) == len(set(shown))
    for lane in {text.partition("-")[0] for text in shown}:
        numbers = [int(text.partition("-")[2]) for text in shown if text.partition("-")[0] == lane]
        assert numbers == sorted(numbers)  # DELIV-15: in the order of each sender


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        got, seen = asyncio.run(crash(Path(place), times=int(sys.argv[1])))
        print(f"{sys.argv[1]} kills in {time.monotonic() - began:.0f} s: {len(got)} acknowledged, "
              f"{len(set(got) - set(seen))} lost, {len(seen) - len(set(seen))} shown twice")
