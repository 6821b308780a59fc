"""The wait before a retry stays within the bounds of its formula, for all counts and limits."""

import random

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import FakeClock

SEVEN_DAYS = 7 * 24 * 3_600_000

durations = st.integers(min_value=1, max_value=SEVEN_DAYS)
counts = st.integers(min_value=0, max_value=60)


class Delays(dramalite.Middleware):
    """Keeps the delays with which messages are enqueued."""

    def __init__(self):
        self.delays = []

    def before_enqueue(self, broker, message, delay):
        self.delays.append(delay)


def retry_delays(number, retries, *, seed=0, error=None, middleware=(), **options):
    """The delays that Retries chooses, `number` times, for a message that was retried `retries` times."""
    delays = Delays()
    retry = dramalite.Retries(max_retries=None, **dict(middleware))
    broker = dramalite.MemoryBroker(
        middleware=[retry, delays], clock=FakeClock(), random=random.Random(seed)
    )
    try:
        work = dramalite.actor(lambda: None, actor_name="work", broker=broker)
        for _ in range(number):
            message = work.message_with_options(**options)
            if retries:
                message.options["retries"] = retries
            retry.after_process_message(
                broker, dramalite.MessageProxy(message), exception=error or ValueError("no")
            )
    finally:
        broker.close()
    return delays.delays


def retry_delay(retries, **options):
    """The delay that Retries chooses once."""
    (delay,) = retry_delays(1, retries, **options)
    return delay


def bounds(retries, min_backoff, max_backoff):
    """The least and the greatest wait: twice as long each time, with jitter, cut at the maximum."""
    most = min(max_backoff, SEVEN_DAYS)
    base = min_backoff * 2 ** min(retries, 32)
    if base > most:
        return int(most * 0.5), most
    if 2 * base <= most:
        return base, 2 * base
    return min(base, int(most * 0.5)), most


@given(counts, durations, durations, st.integers(0, 2**32))
def test_the_wait_stays_within_its_bounds(retries, min_backoff, max_backoff, seed):
    delay = retry_delay(
        retries, seed=seed, min_backoff=min_backoff, max_backoff=max_backoff
    )
    least, greatest = bounds(retries, min_backoff, max_backoff)

    assert type(delay) is int
    assert least <= delay <= greatest


@given(counts, durations, durations, st.integers(0, 2**32))
def test_the_middlewares_limits_hold_where_the_message_has_none(
    retries, min_backoff, max_backoff, seed
):
    limits = {"min_backoff": min_backoff, "max_backoff": max_backoff}
    delay = retry_delay(retries, seed=seed, middleware=limits)
    least, greatest = bounds(retries, min_backoff, max_backoff)

    assert least <= delay <= greatest


@given(counts, st.integers(min_value=SEVEN_DAYS, max_value=100 * SEVEN_DAYS), st.integers(0, 2**32))
def test_no_wait_is_longer_than_seven_days(retries, max_backoff, seed):
    delay = retry_delay(retries, seed=seed, max_backoff=max_backoff)

    assert 15_000 <= delay <= SEVEN_DAYS


@given(counts, st.integers(0, 2**32))
def test_the_same_random_numbers_give_the_same_wait(retries, seed):
    assert retry_delay(retries, seed=seed) == retry_delay(retries, seed=seed)


@given(counts, st.integers(0, 2**40), durations)
def test_a_wanted_delay_is_taken_as_it_is(retries, delay, max_backoff):
    wanted = dramalite.Retry(delay=delay)

    assert retry_delay(retries, error=wanted, max_backoff=max_backoff) == delay


@given(counts, durations)
def test_a_limit_of_zero_means_no_wait(retries, duration):
    assert retry_delay(retries, min_backoff=0, max_backoff=duration) == 0
    assert retry_delay(retries, min_backoff=duration, max_backoff=0) == 0


@given(st.integers(0, 2**32))
def test_waits_differ_so_that_retries_do_not_come_all_at_once(seed):
    assert len(set(retry_delays(20, 5, seed=seed))) > 10


@given(counts, st.lists(durations, min_size=1, max_size=5), durations)
def test_a_list_of_waits_is_gone_through_and_its_last_one_holds(retries, waits, max_backoff):
    expected = (waits + [waits[-1]] * 60)[retries]

    assert retry_delay(retries, middleware={"backoff": waits}, max_backoff=max_backoff) == expected


@given(counts, durations, durations)
def test_a_function_of_the_count_decides_on_the_wait(retries, wait, max_backoff):
    middleware = {"backoff": lambda count: wait + count}

    assert retry_delay(retries, middleware=middleware, max_backoff=max_backoff) == wait + retries
