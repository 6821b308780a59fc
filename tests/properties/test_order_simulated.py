"""The order of messages also holds for delayed ones, across stops, and when the clock is set back."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from world import PATIENT, crashes, open_broker, places, run_with, simulated, worlds

START = datetime(2026, 6, 1, tzinfo=timezone.utc)


@simulated
@given(places, st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=4), st.data())
def test_the_order_of_sending_holds_when_the_clock_is_set_back(place, plan, data):
    with open_broker(place) as broker:
        work = dramalite.actor(lambda number: None, actor_name="work", broker=broker)
        sent = []
        for part in plan:
            start = START + timedelta(days=data.draw(st.integers(-9, 9)))
            with dramalite.simulate(broker, start=start):
                for priority in part:
                    work.send_with_options(args=(len(sent),), priority=priority)
                    sent.append(priority)
        with dramalite.simulate(broker, start=START) as sim:
            sim.run_until_idle()
    ran = [event.message.args[0] for event in sim.events]

    assert ran == sorted(range(len(sent)), key=lambda number: (sent[number], number))


@simulated
@given(places, worlds, st.lists(st.integers(0, 1), min_size=3, max_size=9), st.integers(1, 12))
def test_what_stopping_workers_give_back_keeps_its_place(place, world, plan, steps):
    ran = []
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker)
        def work(number):
            ran.append(number)
            dramalite.simulated_work(100)

        with dramalite.simulate(broker, **world) as sim:
            for number, priority in enumerate(plan):
                work.send_with_options(args=(number,), priority=priority)
            for _ in range(steps):
                sim.step()
        done = [event.message.args[0] for event in sim.events]  # Also of what was still to be written.
        ran.clear()
        with dramalite.simulate(broker, start=sim.now) as sim:
            sim.run_until_idle()
    left = set(range(len(plan))) - set(done)

    assert ran == sorted(left, key=lambda number: (plan[number], number))


@simulated
@given(places, st.lists(st.integers(0, 1), min_size=2, max_size=9), crashes)
def test_what_crashed_keeps_its_place(place, plan, faults):
    """One thread does what is first of all that is left, also after crashes."""
    ran, expected = [], []
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, **PATIENT)
        def work(number):
            done = {event.message.args[0] for event in sim.events if event.outcome == "done"}
            left = set(range(len(plan))) - done
            ran.append(number)
            expected.append(min(left, key=lambda other: (plan[other], other)))

        with dramalite.simulate(broker) as sim:
            for number, priority in enumerate(plan):
                work.send_with_options(args=(number,), priority=priority)
            run_with(sim, {"workers": 1}, faults)

    assert ran == expected


@simulated
@given(places, st.lists(st.tuples(st.integers(0, 29), st.none() | st.integers(0, 99)), max_size=12))
def test_delayed_messages_line_up_by_their_times_behind_what_was_sent_before(place, plan):
    """All wait for a long job, and are due by its end."""
    ran = []
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker)
        def block():
            dramalite.simulated_work(1000)

        @dramalite.actor(broker=broker)
        def work(number):
            ran.append(number)

        ready = []  # (when, whether it was delayed, number)
        with dramalite.simulate(broker, threads=2) as sim:
            block.send()
            block.send()
            for number, (gap, delay) in enumerate(plan):
                sim.advance(gap)
                message = work.send_with_options(args=(number,), delay=delay)
                now = broker.clock.time_ms()
                ready.append((message.options.get("eta", now), delay is not None, number))
            sim.run_until_idle()
    fresh = [number for _when, is_delayed, number in ready if not is_delayed]
    delayed = [number for _when, is_delayed, number in sorted(ready) if is_delayed]

    assert [number for number in ran if number in fresh] == fresh
    assert [number for number in ran if number in delayed] == delayed
    for number in delayed:
        earlier = {other for other in fresh if ready[other][0] < ready[number][0]}
        assert earlier <= set(ran[: ran.index(number)])
