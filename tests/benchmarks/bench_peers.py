"""The same no-ops on the peers that are installed, in turns with dramalite's, as ratios."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from bench_scenarios import send_rate, timed_rate, worker_drain_rate
from bench_support import (
    HERE,
    Figure,
    Run,
    Skipped,
    drain_rate,
    free_port,
    ratios,
    started,
    wait_until,
    workplace,
)


def dramatiq_redis(run: Run) -> Iterator[Figure]:
    """Dramatiq with a Redis server of the benchmark's own, without persistence."""
    _need("dramatiq", "redis")
    server = shutil.which("redis-server")
    if server is None:
        raise Skipped("redis-server is not installed")
    with workplace() as folder, _redis(server, folder) as url:
        peer = _imported("peer_dramatiq", BENCH_REDIS_URL=url)

        def send(count: int) -> float:
            peer.broker.flush_all()
            return timed_rate(count, lambda: [peer.noop.send() for _ in range(count)])

        def drain(count: int) -> float:
            send(count)
            command = [sys.executable, "-m", "dramatiq", "peer_dramatiq", "--processes", "1"]
            command += ["--threads", "8", "--path", str(HERE)]
            with started(command, folder, "dramatiq", BENCH_REDIS_URL=url):
                return drain_rate(lambda: count - _redis_left(peer.broker), count)

        yield from _compare(run, "Dramatiq with Redis", "normal", send, drain)
        peer.broker.close()


def huey_sqlite(run: Run) -> Iterator[Figure]:
    """huey's SqliteHuey with its default options, which make a send durable."""
    _need("huey")
    with workplace() as folder:
        path = folder / "huey.db"
        peer = _imported("peer_huey", BENCH_DB=str(path))

        def send(count: int) -> float:
            peer.huey.flush()
            return timed_rate(count, lambda: [peer.noop() for _ in range(count)])

        def drain(count: int) -> float:
            send(count)
            command = [sys.executable, "-m", "huey.bin.huey_consumer", "peer_huey.huey"]
            command += ["--workers", "8", "--worker-type", "thread"]
            with started(command, folder, "huey", BENCH_DB=str(path)):
                return drain_rate(lambda: count - int(peer.huey.pending_count()), count)

        yield from _compare(run, "huey's SqliteHuey", "full", send, drain)
        peer.huey.storage.close()


def _compare(
    run: Run,
    name: str,
    durability: str,
    send: Callable[[int], float],
    drain: Callable[[int], float],
) -> Iterator[Figure]:
    """Sends and drains of a peer and of dramalite in turns."""
    sizes = run.sizes
    rates: dict[str, list[float]] = {key: [] for key in ("sent", "we sent", "done", "we did")}
    for _ in run.repeats():
        rates["sent"].append(send(sizes.peer_sends))
        rates["we sent"].append(send_rate(durability, sizes.peer_sends))
        rates["done"].append(drain(sizes.peer_drain))
        rates["we did"].append(worker_drain_rate(sizes.drain, processes=1))
    label = {"full": "durable", "normal": "normal"}[durability]
    yield Figure(f"send one by one, {name}", "/s", rates["sent"])
    sent = ratios(rates["we sent"], rates["sent"])
    yield Figure(f"send one by one, dramalite ({label}) over {name}", "x", sent)
    yield Figure(f"drain, 1 process of 8 threads, {name}", "/s", rates["done"])
    yield Figure(f"drain, dramalite over {name}", "x", ratios(rates["we did"], rates["done"]))


def _need(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise Skipped(f"{module} is not installed")


def _imported(module: str, **environment: str) -> ModuleType:
    """Import a module of this folder that reads its settings from the environment."""
    os.environ.update(environment)
    return importlib.import_module(module)


@contextlib.contextmanager
def _redis(server: str, folder: Path) -> Iterator[str]:
    """A Redis server on a free loopback port; yields its address."""
    port = free_port()
    command = [server, "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    with started(command, folder, "redis-server") as running:
        wait_until(lambda: _answers(port), "redis-server to answer", limit_s=10)
        running.check()
        yield f"redis://127.0.0.1:{port}/0"


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _redis_left(broker: Any) -> int:
    """Messages of the queue that no worker has acknowledged."""
    return int(broker.client.hlen("dramatiq:default.msgs"))
