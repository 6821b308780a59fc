"""Retries: how often, when, who is told, and what is written into the message."""

import contextlib
import datetime
import logging
import re
import sys

import pytest

import dramalite
from dramalite import Retries, Retry

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
DAY = 24 * 3_600_000


class Trace(dramalite.Middleware):
    """Keeps the delay of each retry and the options of each attempt."""

    def __init__(self):
        self.delays, self.attempts = [], []

    def before_enqueue(self, broker, message, delay):
        if "retries" in message.options:
            self.delays.append(delay)

    def before_process_message(self, broker, message):
        self.attempts.append(dict(message.options))


class Failing:
    """A job that fails its first `times` attempts."""

    def __init__(self, times=10**9, error=None):
        self.times, self.error, self.calls = times, error or ValueError("no"), 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error


def work_off(broker, worker):
    worker(broker)
    broker.join("default", timeout=PATIENCE)


def run(broker, worker, job, **options):
    """Send one message to an actor of `job` with `options` and wait until it has ended."""
    sent = dramalite.actor(job, actor_name="work", **options).send()
    work_off(broker, worker)
    return sent


@pytest.fixture
def trace(broker):
    """A Trace on `broker`."""
    trace = Trace()
    broker.add_middleware(trace)
    return trace


# How often


def test_a_job_that_fails_is_run_again_until_it_succeeds(broker, worker):
    job = Failing(times=3)
    run(broker, worker, job, min_backoff=0)

    assert job.calls == 4
    assert list(broker.dead_letters) == []


@pytest.mark.parametrize("max_retries", [0, 1, 4])
def test_there_is_one_attempt_more_than_retries(broker, worker, max_retries):
    job = Failing()
    run(broker, worker, job, max_retries=max_retries, min_backoff=0)

    assert job.calls == max_retries + 1
    assert len(broker.dead_letters) == 1


def test_there_are_twenty_retries_by_default(broker, worker):
    job = Failing()
    run(broker, worker, job, min_backoff=0)

    assert job.calls == 21


@pytest.mark.parametrize("place", ["middleware", "actor", "message"])
def test_no_limit_means_for_ever(make_broker, worker, place):
    options = {"max_retries": None}
    retries = Retries(min_backoff=1, max_backoff=1, **(options if place == "middleware" else {}))
    broker = make_broker(middleware=[retries])
    job = Failing(times=30)
    actor = dramalite.actor(job, actor_name="work", **(options if place == "actor" else {}))
    actor.send_with_options(**(options if place == "message" else {}))
    work_off(broker, worker)

    assert job.calls == 31


def test_message_then_actor_then_middleware_decide_how_often(make_broker, worker):
    broker = make_broker(middleware=[Retries(max_retries=1, min_backoff=1, max_backoff=1)])
    jobs = [Failing(), Failing(), Failing(), Failing()]
    dramalite.actor(jobs[0], actor_name="middleware").send()
    dramalite.actor(jobs[1], actor_name="actor", max_retries=2).send()
    dramalite.actor(jobs[2], actor_name="message", max_retries=2).send_with_options(max_retries=3)
    dramalite.actor(jobs[3], actor_name="zero", max_retries=2).send_with_options(max_retries=0)
    work_off(broker, worker)

    assert [job.calls for job in jobs] == [2, 3, 4, 1]


def test_a_message_keeps_its_id_and_its_time_through_retries(broker, worker):
    seen = set()

    class Peek(dramalite.Middleware):
        def before_process_message(self, broker, message):
            seen.add((message.message_id, message.message_timestamp))

    broker.add_middleware(Peek())
    sent = run(broker, worker, Failing(times=2), min_backoff=0)

    assert seen == {(sent.message_id, sent.message_timestamp)}


# retry_when


def test_retry_when_decides_with_the_count_so_far_and_the_exception(broker, worker):
    asked = []
    error = ValueError("no")
    job = Failing(error=error)

    def should_retry(retries_so_far, exception):
        asked.append((retries_so_far, exception))
        return retries_so_far < 5

    run(broker, worker, job, retry_when=should_retry, min_backoff=0)

    assert job.calls == 6
    assert asked == [(count, error) for count in range(6)]
    assert len(broker.dead_letters) == 1


def test_retry_when_makes_max_retries_meaningless(broker, worker):
    job = Failing(times=4)
    run(
        broker,
        worker,
        job,
        retry_when=lambda retries_so_far, exception: True,
        max_retries=1,
        min_backoff=0,
    )

    assert job.calls == 5


def test_retry_when_may_be_set_for_all(make_broker, worker):
    broker = make_broker(
        middleware=[Retries(retry_when=lambda count, exception: count < 2, min_backoff=1)]
    )
    job = Failing()
    dramalite.actor(job, actor_name="work").send()
    work_off(broker, worker)

    assert job.calls == 3


def test_an_error_in_retry_when_ends_in_a_dead_letter_and_loses_nothing(broker, worker):
    def broken(retries_so_far, exception):
        raise RuntimeError("broken predicate")

    job = Failing()
    sent = run(broker, worker, job, retry_when=broken)

    assert job.calls == 1
    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]


# throws


@pytest.mark.parametrize("throws", [ValueError, (KeyError, ValueError), Exception])
def test_an_expected_exception_is_not_retried(broker, worker, throws):
    job = Failing()
    run(broker, worker, job, throws=throws, min_backoff=0)
    (letter,) = broker.dead_letters

    assert job.calls == 1
    assert {"retries", "traceback", "requeue_timestamp"} & set(letter.options) == set()


def test_an_unexpected_exception_is_retried_all_the_same(broker, worker):
    job = Failing(times=1)
    run(broker, worker, job, throws=KeyError, min_backoff=0)

    assert job.calls == 2


def test_a_list_of_expected_exceptions_works_like_a_tuple(broker, worker):
    job = Failing()
    run(broker, worker, job, throws=[KeyError, ValueError], min_backoff=0)

    assert job.calls == 1
    assert len(broker.dead_letters) == 1


def test_an_expected_exception_does_not_exhaust_retries(broker, worker):
    told = []
    exhausted = dramalite.actor(lambda *args: told.append(args), actor_name="exhausted")
    run(broker, worker, Failing(), throws=ValueError, on_retry_exhausted=exhausted)

    assert told == []


def test_an_expected_exception_is_said_to_end_the_message(broker, worker, caplog):
    caplog.set_level(logging.INFO)
    run(broker, worker, Failing(), throws=ValueError)

    assert any(r.getMessage().startswith("Aborting") for r in caplog.records)


# What is written into the message


def test_a_retry_carries_its_count_its_traceback_and_its_time(broker, worker, trace):
    clock = dramalite.Clock()
    before = clock.time_ms()
    run(broker, worker, Failing(times=2), min_backoff=0)
    first, second, third = trace.attempts

    assert first == {}
    assert (second["retries"], third["retries"]) == (1, 2)
    assert second["traceback"].startswith("Traceback (most recent call last):")
    assert second["traceback"].endswith("ValueError: no\n")
    assert (
        before
        <= second["requeue_timestamp"]
        <= third["requeue_timestamp"]
        <= clock.time_ms()
    )


def test_a_retrys_time_is_that_of_the_failure_it_comes_from(broker, trace):
    job = Failing(times=3)

    def work():
        dramalite.simulated_work(40)
        job()

    actor = dramalite.actor(work, backoff=[1000, 0, 5])
    with dramalite.simulate(broker) as sim:
        sent = actor.send()
        sim.run_until_idle()
    times = [options["requeue_timestamp"] for options in trace.attempts[1:]]

    assert times == [event.ended_ms for event in sim.events[:3]]
    assert sent.message_timestamp < times[0] < times[1] < times[2]


def test_a_long_traceback_is_cut_to_thirty_frames(broker, worker, trace):
    def deep(level):
        if level == 0:
            raise ValueError("bottom")
        deep(level - 1) if level % 2 else deep(level - 1)

    def work():
        deep(100)

    run(broker, worker, work, max_retries=0)
    (letter,) = broker.dead_letters

    assert letter.options["traceback"].count('File "') <= 30


def told_of(broker, worker, caplog, work):
    """What is written of a job's error into its dead letter, and what into the log."""
    run(broker, worker, work, max_retries=0)
    (letter,) = broker.dead_letters
    (logged,) = [caplog.handler.format(record) for record in caplog.records if record.levelname == "ERROR"]
    return letter.options["traceback"], logged


def test_a_long_traceback_shows_where_it_ends_and_how_much_is_left_out(broker, worker, caplog):
    def deep(level):
        deep(level - 1) if level else end()

    def end():
        raise ValueError("bottom")

    def work():
        deep(40)  # With work(), and with end(), 43 frames.

    for text in told_of(broker, worker, caplog, work):
        shown = re.findall(r", in (\w+)$", text, re.MULTILINE)
        left_out = re.findall(r"(\d+) frames left out", text)

        assert (shown[0], shown[-1]) == ("work", "end")
        assert len(shown) + sum(map(int, left_out)) == 43
        assert text.rstrip().endswith("ValueError: bottom")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
@pytest.mark.parametrize("place", ["cause", "context"])
def test_a_group_of_exceptions_behind_another_one_is_told_with_its_members(broker, worker, caplog, place):
    def work():
        group = ExceptionGroup("two", [ValueError(f"member {number}") for number in (1, 2)])  # noqa: F821
        try:
            raise group
        except Exception:
            if place == "context":
                raise RuntimeError("wrapped")
            raise RuntimeError("wrapped") from group

    for text in told_of(broker, worker, caplog, work):
        assert "ValueError: member 1" in text and "ValueError: member 2" in text
        assert text.rstrip().endswith("RuntimeError: wrapped")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
@pytest.mark.parametrize("whose", ["group", "member"])
def test_a_long_traceback_of_a_group_shows_where_it_ends_too(broker, worker, caplog, whose):
    def deep(level, error):
        deep(level - 1, error) if level else end(error)

    def end(error):
        raise error

    def work():
        member = ValueError("bottom")
        if whose == "member":
            with contextlib.suppress(ValueError):
                deep(40, member)
            raise ExceptionGroup("one", [member])  # noqa: F821
        deep(40, ExceptionGroup("one", [member]))  # noqa: F821

    for text in told_of(broker, worker, caplog, work):
        assert re.search(r", in end$", text, re.MULTILINE)


# Giving up


def test_giving_up_is_warned_about(broker, worker, caplog):
    run(broker, worker, Failing(), max_retries=0)

    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"][0].startswith(
        "Retries exceeded"
    )


def test_on_retry_exhausted_is_told_once_when_all_is_over(broker, worker):
    told = []
    dramalite.actor(lambda *args: told.append(args), actor_name="exhausted")
    sent = run(
        broker, worker, Failing(), max_retries=2, min_backoff=0, on_retry_exhausted="exhausted"
    )
    ((message_data, retry_info),) = told

    assert message_data.message_id == sent.message_id
    assert message_data["options"]["retries"] == 3
    assert retry_info == {"retries": 2, "max_retries": 2}


def test_on_retry_exhausted_is_told_when_retry_when_says_no(broker, worker):
    told = []
    dramalite.actor(lambda *args: told.append(args), actor_name="exhausted")
    run(
        broker,
        worker,
        Failing(),
        retry_when=lambda retries_so_far, exception: False,
        on_retry_exhausted="exhausted",
    )

    assert len(told) == 1


def test_on_retry_exhausted_is_not_told_of_a_success(broker, worker):
    told = []
    dramalite.actor(lambda *args: told.append(args), actor_name="exhausted")
    run(
        broker,
        worker,
        Failing(times=2),
        max_retries=2,
        min_backoff=0,
        on_retry_exhausted="exhausted",
    )

    assert told == []


@pytest.mark.parametrize("place", ["actor", "message"])
def test_on_retry_exhausted_may_be_an_actor_in_either_place(broker, worker, place):
    told = []
    exhausted = dramalite.actor(lambda *args: told.append(args), actor_name="exhausted")
    options = {"on_retry_exhausted": exhausted}
    actor = dramalite.actor(
        Failing(), actor_name="work", max_retries=0, **(options if place == "actor" else {})
    )
    actor.send_with_options(**(options if place == "message" else {}))
    work_off(broker, worker)

    assert len(told) == 1


def test_on_retry_exhausted_of_none_in_a_message_leaves_it_to_its_actor(broker, worker):
    told = []
    exhausted = dramalite.actor(lambda *args: told.append(args), actor_name="exhausted")
    actor = dramalite.actor(Failing(), actor_name="work", max_retries=0, on_retry_exhausted=exhausted)
    actor.send_with_options(on_retry_exhausted=None)
    work_off(broker, worker)

    assert len(told) == 1


# When


@pytest.mark.parametrize("option", ["min_backoff", "max_backoff"])
@pytest.mark.parametrize("place", ["middleware", "actor", "message"])
def test_a_backoff_of_zero_retries_at_once(make_broker, worker, option, place):
    trace = Trace()
    options = {option: 0}
    retries = Retries(max_retries=10, **(options if place == "middleware" else {}))
    broker = make_broker(middleware=[retries, trace])
    job = Failing()
    actor = dramalite.actor(job, actor_name="work", **(options if place == "actor" else {}))
    actor.send_with_options(**(options if place == "message" else {}))
    work_off(broker, worker)

    assert job.calls == 11
    assert trace.delays == [0] * 10


def test_the_first_retry_comes_after_fifteen_to_thirty_seconds_by_default(
    make_broker, clock, worker
):
    broker = make_broker(clock=clock)
    trace = Trace()
    broker.add_middleware(trace)
    dramalite.actor(Failing(), actor_name="work").send()
    worker(broker)
    wait_until(lambda: trace.delays)

    assert len(trace.delays) == 1
    assert 15_000 <= trace.delays[0] <= 30_000


def test_a_backoff_may_be_a_timedelta(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    trace = Trace()
    broker.add_middleware(trace)
    dramalite.actor(
        Failing(), actor_name="work", min_backoff=datetime.timedelta(minutes=10)
    ).send()
    worker(broker)
    wait_until(lambda: trace.delays)

    assert len(trace.delays) == 1
    assert 600_000 <= trace.delays[0] <= 1_200_000


def test_a_retry_is_announced_with_its_delay(broker, worker, caplog):
    caplog.set_level(logging.INFO)
    sent = run(broker, worker, Failing(times=1), min_backoff=0)
    text = f"Retrying message '{sent.message_id}' in 0 milliseconds."

    assert text in [record.getMessage() for record in caplog.records]


# Waits of one's own


def waits(broker, **options):
    """How long a message waits before each retry, in virtual milliseconds."""
    dramalite.actor(Failing(), actor_name="work", **options).send()
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()
    times = [(event.started_ms, event.ended_ms) for event in sim.events]
    return [start - end for (_, end), (start, _) in zip(times, times[1:])]


def test_backoff_may_be_a_list_whose_last_wait_holds_from_there_on(stub_broker):
    assert waits(stub_broker, backoff=[10, 0, 3000], max_retries=5) == [10, 0, 3000, 3000, 3000]


def test_backoff_may_be_a_tuple_of_timedeltas(stub_broker):
    minutes = tuple(datetime.timedelta(minutes=number) for number in (1, 2))

    assert waits(stub_broker, backoff=minutes, max_retries=2) == [60_000, 120_000]


def test_backoff_may_be_a_function_of_the_attempt(stub_broker):
    asked = []

    def backoff(attempt):
        asked.append(attempt)
        return attempt * 1000

    assert waits(stub_broker, backoff=backoff, max_retries=3) == [0, 1000, 2000]
    assert asked == [0, 1, 2]


def test_a_function_may_return_a_timedelta(stub_broker):
    assert waits(stub_broker, backoff=lambda attempt: datetime.timedelta(seconds=5), max_retries=1) == [5000]


def test_backoff_goes_before_both_of_its_limits(stub_broker):
    options = {"min_backoff": 50_000, "max_backoff": 60_000}

    assert waits(stub_broker, backoff=[7, 100 * DAY], max_retries=2, **options) == [7, 100 * DAY]


def test_backoff_may_be_set_for_all(make_stub_broker):
    stub_broker = make_stub_broker([Retries(backoff=[5, 6])])

    assert waits(stub_broker, max_retries=3) == [5, 6, 6]


def test_an_actors_backoff_overrides_that_of_the_middleware(make_stub_broker):
    stub_broker = make_stub_broker([Retries(backoff=[5, 6])])

    assert waits(stub_broker, max_retries=2, backoff=[1]) == [1, 1]


def test_a_messages_backoff_overrides_that_of_its_actor(broker, trace):
    dramalite.actor(Failing(), actor_name="work", max_retries=3, backoff=[1]).send_with_options(backoff=[2, 3])
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()

    assert trace.delays == [2, 3, 3]


def test_a_wanted_delay_goes_before_backoff(broker, trace):
    dramalite.actor(Failing(error=Retry(delay=9)), actor_name="work", max_retries=2, backoff=[1]).send()
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()

    assert trace.delays == [9, 9]


def test_retries_are_counted_as_usual_with_a_backoff_of_ones_own(broker, trace):
    dramalite.actor(Failing(), actor_name="work", max_retries=2, backoff=[1]).send()
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()

    assert [attempt.get("retries") for attempt in trace.attempts] == [None, 1, 2]
    assert [letter.options["retries"] for letter in broker.dead_letters] == [3]


@pytest.mark.parametrize("backoff", [lambda attempt: 1 / 0, lambda attempt: "soon", lambda attempt: -1])
def test_a_broken_backoff_ends_in_a_dead_letter_and_loses_nothing(broker, worker, backoff):
    job = Failing()
    sent = run(broker, worker, job, backoff=backoff)

    assert job.calls == 1
    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]


@pytest.mark.parametrize("place", ["actor", "middleware", "message"])
@pytest.mark.parametrize("backoff", [[], 5, "soon", ["soon"], [True]])
def test_a_backoff_that_is_none_is_refused_where_it_is_given(stub_broker, place, backoff):
    actor = dramalite.actor(print, actor_name="plain")
    with pytest.raises(TypeError, match="backoff"):
        if place == "actor":
            dramalite.actor(print, actor_name="work", backoff=backoff)
        elif place == "middleware":
            Retries(backoff=backoff)
        else:
            actor.send_with_options(backoff=backoff)

    assert stub_broker.pending() == []


def test_a_wait_that_is_negative_is_refused(stub_broker):
    with pytest.raises(ValueError, match="backoff"):
        dramalite.actor(print, actor_name="work", backoff=[5, -1])


def test_a_function_cannot_travel_in_a_message(stub_broker):
    with pytest.raises(TypeError, match="backoff"):
        dramalite.actor(print, actor_name="work").send_with_options(backoff=lambda attempt: 1)

    assert stub_broker.pending() == []


# Nothing is lost


def test_a_retry_that_a_middleware_refuses_ends_in_a_dead_letter(broker, worker):
    class Refuses(dramalite.Middleware):
        def before_enqueue(self, broker, message, delay):
            if "retries" in message.options:
                raise dramalite.MiddlewareError("no retries here")

    broker.add_middleware(Refuses())
    job = Failing()
    sent = run(broker, worker, job, min_backoff=0)

    assert job.calls == 1
    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]


def test_a_message_of_nearly_the_allowed_size_is_retried(make_broker, worker):
    broker = make_broker(max_message_size=1000)
    job = Failing(times=2)
    work = dramalite.actor(job, actor_name="work", min_backoff=0)
    work.send("x" * (995 - len(work.message("").encode())))
    work_off(broker, worker)

    assert job.calls == 3
    assert list(broker.dead_letters) == []


# Who is told in the end


def test_on_retry_exhausted_may_be_a_class_based_actor(broker, worker):
    told = []

    class Exhausted(dramalite.GenericActor):
        def perform(self, message_data, retry_info):
            told.append(retry_info)

    run(broker, worker, Failing(), max_retries=0, on_retry_exhausted=Exhausted)

    assert told == [{"retries": 0, "max_retries": 0}]


def test_the_messages_on_retry_exhausted_overrides_its_actors(broker, worker):
    told = []
    for name in ("actors", "messages"):
        dramalite.actor(lambda *args, name=name: told.append(name), actor_name=name)
    dramalite.actor(
        Failing(), actor_name="work", max_retries=0, on_retry_exhausted="actors"
    ).send_with_options(on_retry_exhausted="messages")
    work_off(broker, worker)

    assert told == ["messages"]


def test_on_retry_exhausted_that_is_unknown_does_not_harm_the_dead_letter(broker, worker):
    sent = run(broker, worker, Failing(), max_retries=0, on_retry_exhausted="nobody")

    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]


def test_on_retry_exhausted_knows_the_limit_that_was_set_for_all(make_broker, worker):
    broker = make_broker(middleware=[Retries(max_retries=1, backoff=[0])])
    told = []
    exhausted = dramalite.actor(lambda data, info: told.append(info), actor_name="exhausted")
    run(broker, worker, Failing(), on_retry_exhausted=exhausted)

    assert told == [{"retries": 1, "max_retries": 1}]


# Retry


@pytest.mark.parametrize("delay", [0, 7])
def test_a_wanted_retry_comes_after_its_own_delay(broker, worker, trace, delay):
    job = Failing(times=1, error=Retry("later", delay=delay))
    run(broker, worker, job, min_backoff=DAY)

    assert job.calls == 2
    assert trace.delays == [delay]


def test_a_wanted_delay_is_not_capped(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    trace = Trace()
    broker.add_middleware(trace)
    job = Failing(error=Retry(delay=30 * DAY))
    dramalite.actor(job, actor_name="work", max_backoff=1000).send()
    worker(broker)
    wait_until(lambda: trace.delays)

    assert trace.delays == [30 * DAY]


def test_a_kind_of_retry_that_makes_itself_backs_off_as_usual(broker, worker, trace):
    class Later(Retry):
        def __init__(self):
            """Without a word to Retry."""

    job = Failing(times=1, error=Later())
    run(broker, worker, job, min_backoff=4, max_backoff=100)

    assert job.calls == 2
    assert 4 <= trace.delays[0] <= 8


def test_a_wanted_retry_without_delay_backs_off_as_usual(broker, worker, trace):
    job = Failing(times=1, error=Retry())
    run(broker, worker, job, min_backoff=4, max_backoff=100)

    assert job.calls == 2
    assert 4 <= trace.delays[0] <= 8


def test_wanted_retries_count_like_others(broker, worker):
    job = Failing(error=Retry(delay=0))
    run(broker, worker, job, max_retries=2)

    assert job.calls == 3
    assert len(broker.dead_letters) == 1


def test_a_wanted_delay_may_be_a_timedelta(broker, worker, trace):
    job = Failing(times=1, error=Retry(delay=datetime.timedelta(milliseconds=3)))
    run(broker, worker, job, min_backoff=DAY)

    assert job.calls == 2
    assert trace.delays == [3]


def test_a_stub_broker_raises_the_last_error_from_join(stub_broker, worker):
    error = ValueError("no")
    dramalite.actor(Failing(error=error), actor_name="work", max_retries=2, min_backoff=0).send()
    worker(stub_broker)
    with pytest.raises(ValueError) as raised:
        stub_broker.join("default", timeout=PATIENCE)

    assert raised.value is error
