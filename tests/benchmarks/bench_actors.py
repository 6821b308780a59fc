"""The actors of the benchmark, declared on whatever broker a scenario uses."""

from __future__ import annotations

import os
import time
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import dramalite

if TYPE_CHECKING:
    from bench_samples import Samples


def noop() -> None:
    """Do nothing: what is left is the cost of the queue."""


def nap() -> None:
    """Take 20 ms, and no CPU."""
    time.sleep(0.02)


def kept() -> int:
    """Return what is to be stored, where the broker has results."""
    return 42


async def wait() -> None:
    """Await 100 ms."""
    import asyncio  # At first use: an idle worker's memory is measured without it.

    await asyncio.sleep(0.1)


def stamp(index: int, sent_ns: int) -> None:
    """Record the nanoseconds since `sent_ns`, a reading of the system-wide monotonic clock."""
    elapsed_ns = time.monotonic_ns() - sent_ns
    _samples().record(index, elapsed_ns)


def late(index: int, eta_ms: int) -> None:
    """Record by how many microseconds this starts after `eta_ms` (negative if before it)."""
    late_us = time.time() * 1e6 - eta_ms * 1e3
    _samples().record(index, round(late_us))


def declare(broker: Any) -> SimpleNamespace:
    """Declare the actors on `broker`; returns them under their names."""
    declared = dramalite.actor(broker=broker)
    options = {"store_results": True} if "store_results" in broker.actor_options else {}
    actors = {fn.__name__: declared(fn) for fn in (noop, nap, wait, stamp, late)}
    return SimpleNamespace(**actors, kept=dramalite.actor(kept, broker=broker, **options))


@cache
def _samples() -> Samples:
    # Imported at first use: an idle worker's memory is measured without it.
    from bench_samples import Samples

    return Samples(os.environ["BENCH_SAMPLES"])
