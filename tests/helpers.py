"""What several test modules share: a clock that is moved by hand, a wait with a deadline, strategies."""

from __future__ import annotations

import string
import threading
import time
from typing import Callable

from hypothesis import strategies as st

import dramalite

#: Seconds after which a test that waits for something has failed.
DEADLINE = 50.0


class FakeClock(dramalite.Clock):
    """A clock whose wall time stands still until advance() moves it.

    The stopwatch, monotonic(), runs on, so that deadlines of waits still pass; it jumps along with advance().
    """

    def __init__(self, start_ms: int = 1_750_000_000_000) -> None:
        self.now_ms = start_ms
        self.slept: list[float] = []
        self._ahead = 0.0

    def time_ms(self) -> int:
        return self.now_ms

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds * 1000)

    def advance(self, milliseconds: float) -> None:
        """Move the wall time and the stopwatch forward."""
        self.now_ms += int(milliseconds)
        self._ahead += milliseconds / 1000


def wait_until(condition: Callable[[], object], timeout: float = DEADLINE) -> None:
    """Return as soon as `condition()` is true; fail the test if it is not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    tick = threading.Event()
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(f"Not reached within {timeout} s: {condition}.")
        tick.wait(0.002)


# Text that UTF-8 can hold: all of Unicode but lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)

json_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
)

#: Values that JSON stores faithfully: what is read back equals what was written.
json_values = st.recursive(
    json_scalars,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(texts, children, max_size=4),
    max_leaves=12,
)

json_objects = st.dictionaries(texts, json_values, max_size=4)

_first_letters = string.ascii_letters + "_"
_other_letters = string.ascii_letters + string.digits + "._-"


def _is_plain(name: str) -> bool:
    """Whether `name` is free of the endings that Dramatiq keeps for delayed and dead messages."""
    return not name.endswith((".DQ", ".XQ"))


queue_names = st.builds(
    str.__add__, st.sampled_from(_first_letters), st.text(_other_letters, max_size=20)
).filter(_is_plain)

messages = st.builds(
    dramalite.Message,
    queue_name=queue_names,
    actor_name=st.text(string.ascii_letters + "_.<>", min_size=1, max_size=20),
    args=st.lists(json_values, max_size=4).map(tuple),
    kwargs=json_objects,
    options=json_objects,
    message_id=st.uuids().map(str),
    message_timestamp=st.integers(min_value=0, max_value=2**53),
)
