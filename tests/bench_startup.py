"""What starting this program costs: `mcp` to its answer to `initialize`, `hook` and `--help` to their end.

    python tests/bench_startup.py            # medians of 20 in ms against their budgets; exit code 1 beyond one
    python tests/bench_startup.py -n 5

Each is measured as Claude Code and a person start it: a fresh process, by `claudemesh` beside this interpreter
if it is installed there. The hook is measured without a session, with one whose broker answers, and with one
whose broker does not exist. The best run is shown too: on a busy machine the median says less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import claudemesh  # noqa: E402

BUDGETS_MS = {"mcp": 100, "hook": 100, "--help": 150}
INITIALIZE = b'{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{}}}\n'
PAYLOAD = b'{"session_id":"bench","hook_event_name":"PostToolUse","tool_response":"' + b"x" * 4000 + b'"}'


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CLAUDE", "PYTHONDONTWRITE"))}
    return kept | {"CLAUDEMESH_CONFIG_DIR": str(home), "CLAUDE_CODE_SESSION_ID": "bench"}


def start(home: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*claudemesh.own_command(), *words], env=environment(home), stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def to_initialize(home: Path) -> float:
    began = time.perf_counter()
    with start(home, "mcp") as process:
        process.stdin.write(INITIALIZE)
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        took = time.perf_counter() - began
        assert answer["id"] == 0 and "result" in answer
        process.stdin.close()
    return took


def to_end(home: Path, *words: str, stdin: bytes = b"") -> float:
    began = time.perf_counter()
    with start(home, *words) as process:
        process.communicate(stdin)
    assert process.returncode == 0
    return time.perf_counter() - began


@contextmanager
def session(home: Path) -> Iterator[None]:
    """A running `claudemesh mcp` whose socket is open."""
    with start(home, "mcp") as process:
        process.stdin.write(INITIALIZE)
        process.stdin.flush()
        while not claudemesh.session_states(home / "run"):
            time.sleep(0.02)
        yield
        process.stdin.close()


@contextmanager
def mesh(home: Path) -> Iterator[None]:
    """A broker process, and this home a member of a mesh on it."""
    command = [*claudemesh.own_command(), "broker", "--port", "0", "--data", str(home / "broker")]
    with subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE) as broker:
        url = next(json.loads(line)["url"] for line in broker.stderr if b'"listening"' in line)
        claudemesh.create_mesh("bench", "bench", url, display_name="bench", dir=home)
        yield
        broker.terminate()
        broker.communicate()


def report(what: str, budget: str, runs: int, measure: Callable[[], float]) -> bool:
    """Print a row; whether the median is within the budget."""
    measure()  # whatever has to be compiled or read from the disk
    times = [measure() * 1000 for _ in range(runs)]
    median, limit = statistics.median(times), BUDGETS_MS[budget]
    print(f"{what:<42} {median:6.0f} ms   best {min(times):5.0f}   budget {limit}{'' if median < limit else '   OVER'}")
    return median < limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20, help="runs of each (default: 20)")
    runs = parser.parse_args().n
    with tempfile.TemporaryDirectory(prefix="claudemesh-bench-") as name:
        home, good = Path(name), []
        good.append(report("--help", "--help", runs, lambda: to_end(home, "--help")))
        good.append(report("mcp to initialize, no mesh", "mcp", runs, lambda: to_initialize(home)))
        good.append(report("hook, no session", "hook", runs, lambda: to_end(home, "hook", "PostToolUse", stdin=PAYLOAD)))
        with mesh(home):
            good.append(report("mcp to initialize, a mesh", "mcp", runs, lambda: to_initialize(home)))
            with session(home):
                for event in ("UserPromptSubmit", "PostToolUse", "Stop"):
                    good.append(report(f"hook {event}, a session and a broker", "hook", runs,
                                       lambda event=event: to_end(home, "hook", event, stdin=PAYLOAD)))
        with session(home):
            good.append(report("hook Stop, a session without its broker", "hook", runs,
                               lambda: to_end(home, "hook", "Stop", stdin=PAYLOAD)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
