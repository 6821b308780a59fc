"""A pipeline's steps run one after the other, each once, each with the result of the one before."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import json_values
from world import PATIENT, count, crashes, open_broker, places, retries, run_with, simulated, worlds


class Step(NamedTuple):
    result: Any
    fails: int = 0
    takes_ms: int = 0
    delay: int | None = None
    ignores: bool = False


steps = st.builds(
    Step,
    result=st.none() | st.integers() | json_values,
    fails=st.sampled_from([0, 0, 0, 1, 2]),
    takes_ms=st.sampled_from([0, 0, 7, 40]),
    delay=st.sampled_from([None, None, 0, 25]),
    ignores=st.sampled_from([False, False, True]),
)
chains = st.lists(steps, min_size=1, max_size=4)
plans = st.lists(chains, min_size=1, max_size=3)


def declare(broker, plan, starts):
    """An actor that does a step of the plan, by the numbers of its chain and in it."""

    @dramalite.actor(broker=broker, max_retries=3, **PATIENT)
    def step(chain, number, *received):
        me = plan[chain][number]
        starts.append((chain, number, received))
        dramalite.simulated_work(me.takes_ms)
        if retries() < me.fails:
            raise ValueError("not yet")
        return me.result

    return step


def pipelines(step, plan):
    for number, chain in enumerate(plan):
        messages = [
            step.message_with_options(
                args=(number, place),
                **({} if me.delay is None else {"delay": me.delay}),
                **({"pipe_ignore": True} if me.ignores else {}),
            )
            for place, me in enumerate(chain)
        ]
        yield dramalite.pipeline(messages, broker=step.broker)


def run(place, world, plan, faults=()):
    """What started, in order, and the events of the simulation."""
    starts = []
    with open_broker(place) as broker:
        step = declare(broker, plan, starts)
        with dramalite.simulate(broker, **world) as sim:
            for pipeline in list(pipelines(step, plan)):
                pipeline.run()
            run_with(sim, world, faults)
            left = broker.pending()

    assert left == []
    return starts, sim.events


def place_of(event):
    """The numbers of an event's step: of its chain and in it."""
    return tuple(event.message.args[:2])


def all_places(plan):
    return [(chain, number) for chain, steps in enumerate(plan) for number in range(len(steps))]


def received(chain, number):
    """What a step gets of the one before."""
    return () if number == 0 or chain[number].ignores else (chain[number - 1].result,)


@simulated
@given(places, worlds, plans)
def test_the_steps_run_in_order_and_each_once(place, world, plan):
    starts, _events = run(place, world, plan)

    for number, chain in enumerate(plan):
        expected = [n for n, step in enumerate(chain) for _ in range(step.fails + 1)]
        assert [place for of, place, _ in starts if of == number] == expected


@simulated
@given(places, worlds, plans, crashes)
def test_each_step_succeeds_exactly_once_after_the_one_before_whatever_crashes(place, world, plan, faults):
    _starts, events = run(place, world, plan, faults)
    done = {place_of(event): event.ended_ms for event in events if event.outcome == "done"}

    assert count(events, "done", place_of) == dict.fromkeys(all_places(plan), 1)
    for event in events:
        chain, number = place_of(event)
        assert number == 0 or done[chain, number - 1] <= event.started_ms


@simulated
@given(places, worlds, plans, crashes)
def test_each_step_gets_the_result_of_the_one_before_unless_it_ignores_it(place, world, plan, faults):
    starts, _events = run(place, world, plan, faults)

    for chain, number, got in starts:
        assert got == received(plan[chain], number)


@simulated
@given(places, chains)
def test_each_step_starts_as_soon_as_its_delay_has_passed(place, chain):
    _starts, events = run(place, {}, [chain])
    done = [event.ended_ms for event in events if event.outcome == "done"]
    firsts = [event.started_ms for event in events if event.attempt == 1]
    delays = [step.delay or 0 for step in chain]

    sent = int(events[0].message.message_timestamp)
    assert firsts == [before + delay for before, delay in zip([sent, *done], delays)]


@simulated
@given(places, worlds, plans, st.data())
def test_nothing_comes_after_a_step_that_fails_or_is_skipped(place, world, plan, data):
    last = [data.draw(st.integers(0, len(chain) - 1)) for chain in plan]
    error = data.draw(st.sampled_from([ArithmeticError, dramalite.SkipMessage]))
    done = []
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, throws=ArithmeticError, **PATIENT)
        def step(chain, number, *_received):
            done.append((chain, number))
            if number == last[chain]:
                raise error
            return 0

        with dramalite.simulate(broker, **world) as sim:
            for pipeline in list(pipelines(step, plan)):
                pipeline.run()
            sim.run_until_idle()
            left = broker.pending()

    assert left == []
    assert sorted(done) == [(chain, n) for chain, of in enumerate(last) for n in range(of + 1)]


@simulated
@given(places, worlds, chains)
def test_the_results_of_a_pipeline_are_those_of_its_steps(place, world, chain):
    with open_broker(place) as broker:
        step = declare(broker, [chain], [])
        with dramalite.simulate(broker, **world) as sim:
            (pipeline,) = pipelines(step, [chain])
            pipeline.run()
            for done in range(len(chain) + 1):
                while count(sim.events, "done").total() < done:
                    assert pipeline.completed_count == done - 1
                    sim.step()
            results = [step.result for step in chain]

            assert list(pipeline.get_results()) == results
            assert pipeline.get_result() == results[-1]
            assert pipeline.completed


@simulated
@given(places, st.lists(chains, min_size=1, max_size=3))
def test_pipelines_of_pipelines_are_one_pipeline(place, plan):
    starts = []
    with open_broker(place) as broker:
        step = declare(broker, plan, starts)
        with dramalite.simulate(broker) as sim:
            joined, *others = pipelines(step, plan)
            for other in others:
                joined |= other
            joined.run()
            sim.run_until_idle()

    assert list(dict.fromkeys(start[:2] for start in starts)) == all_places(plan)
