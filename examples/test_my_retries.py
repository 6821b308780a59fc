"""Property tests of your own actors' retry and priority rules, in virtual time: no sleeps, no server.

    pytest examples/test_my_retries.py
"""

import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Finds dramalite.py in a bare clone.
import dramalite

HOUR = 3_600_000
failures = []  # Whether the next attempts fail.


@dramalite.actor(max_retries=5, min_backoff=1000, max_backoff=HOUR)
def charge(customer):
    if failures and failures.pop():
        raise ConnectionError("The bank does not answer.")


@given(fails=st.integers(0, 8), seed=st.integers(0, 99))
def test_a_charge_is_tried_six_times_with_growing_pauses(fails, seed):
    failures[:] = [True] * fails
    with dramalite.simulate(seed=seed) as sim:  # On an empty database in memory, each time.
        charge.send("ada")
        sim.run_until_idle()

    outcomes = [event.outcome for event in sim.events]
    assert outcomes == ["retry"] * min(fails, 5) + ["done" if fails < 6 else "dead"]
    for attempt, event in enumerate(sim.events[:-1]):
        pause = event.next_eta_ms - event.ended_ms
        assert 1000 * 2**attempt <= pause <= 2000 * 2**attempt


@given(priorities=st.lists(st.integers(-5, 5), max_size=10))
def test_urgent_charges_go_first(priorities):
    failures.clear()
    with dramalite.simulate() as sim:
        for priority in priorities:
            charge.send_with_options(args=(priority,), priority=priority)
        sim.run_until_idle()

    assert [event.message.options["priority"] for event in sim.events] == sorted(priorities)
