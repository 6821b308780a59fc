"""What Dramatiq's worker imports: the same no-op on a Redis server of the benchmark's own."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=os.environ["BENCH_REDIS_URL"])
dramatiq.set_broker(broker)


@dramatiq.actor
def noop() -> None:
    """Do nothing."""
