"""A process that sends: `bench_producer.py PATH DURABILITY KIND COUNT`.

It prints `ready`, waits for a line on its standard input, sends, and prints the seconds taken.
KIND `noop` sends COUNT no-ops; `late` sends COUNT messages delayed by 0 to 5 s.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import bench_actors
import dramalite

#: Milliseconds that a delayed message is put off at most.
LONGEST_DELAY_MS = 5_000


def send_noop(actors: SimpleNamespace, count: int) -> None:
    """Send `count` no-ops one by one."""
    for _ in range(count):
        actors.noop.send()


def send_late(actors: SimpleNamespace, count: int) -> None:
    """Send `count` messages with random delays one by one, each told its own eta."""
    chance = random.Random(count)
    for index in range(count):
        delay_ms = chance.randint(0, LONGEST_DELAY_MS)
        eta_ms = int(time.time() * 1000) + delay_ms
        actors.late.send_with_options(args=(index, eta_ms), delay=delay_ms)


KINDS: dict[str, Callable[[SimpleNamespace, int], None]] = {"noop": send_noop, "late": send_late}


def main(path: str, durability: str, kind: str, count: str) -> None:
    """Open the broker with one message of no account, say so, and send when told to."""
    broker = dramalite.SQLiteBroker(path, durability=durability)
    actors = bench_actors.declare(broker)
    actors.noop.send()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    KINDS[kind](actors, int(count))
    print(time.perf_counter() - started, flush=True)
    broker.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
