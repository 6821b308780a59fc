"""What the simulated properties share: a broker for one example, the size of its world, its faults."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

import dramalite

#: For tests that simulate: two of five examples that others have, for they take their time.
simulated = settings(max_examples=max(1, settings().max_examples * 2 // 5))

#: Options of actors whose time is not to be counted: retries come soon, results stay.
PATIENT = {
    "min_backoff": 10,
    "max_backoff": 80,
    "max_crashes": 1000,
    "time_limit": timedelta(days=1),
    "store_results": True,
    "result_ttl": timedelta(days=3650),
}

places = st.sampled_from(["memory", "memory", "file"])  # A file takes thrice as long.

#: Arguments of simulate().
worlds = st.fixed_dictionaries(
    {"workers": st.integers(1, 3), "threads": st.integers(1, 2), "seed": st.integers(0, 999)}
)

#: After so many steps, that worker dies.
crashes = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=4)


@contextlib.contextmanager
def open_broker(place, **options):
    """A broker in memory, or in a file that is gone at the end."""
    with contextlib.ExitStack() as closing:
        if place == "memory":
            broker = dramalite.MemoryBroker(**options)
        else:
            folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="dramalite-"))
            broker = dramalite.SQLiteBroker(Path(folder) / "queue.db", durability="normal", **options)
        closing.callback(broker.close)
        yield broker


def run_with(sim, world, faults=()):
    """Run a simulation to its end, with the crashes given on the way."""
    for steps, worker in faults:
        for _ in range(steps):
            sim.step()
        sim.crash(worker % world["workers"])
    sim.run_until_idle(max_steps=5000)  # Some hundred are enough.


def retries():
    """How often the message that runs was retried so far."""
    return dramalite.CurrentMessage.get_current_message().options.get("retries", 0)


def count(events, outcome, key=lambda event: event.message_id):
    """How many events have an outcome, by message or by another key."""
    return Counter(key(event) for event in events if event.outcome == outcome)


def by_message(events):
    """The events of each message, in their order."""
    found = {}
    for event in events:
        found.setdefault(event.message_id, []).append(event)
    return found
