"""drain(), pending() and assert_sent(): plain tests of code that sends, without a worker."""

from __future__ import annotations

from datetime import timedelta

import pytest

import dramalite


@pytest.fixture
def ran(broker):
    """What the actors of a test have noted."""
    return []


@pytest.fixture
def note(broker, ran):
    @dramalite.actor
    def note(*words, **named):
        ran.append(words[0] if words else named)

    return note


@pytest.fixture
def fail(broker):
    @dramalite.actor(max_retries=1)
    def fail(text):
        raise ValueError(text)

    return fail


# drain()


def test_drain_runs_what_is_ready_in_its_order_and_counts_it(broker, note, ran):
    note.send(1)
    note.send(2)
    note.send_with_options(args=(0,), priority=-1)

    assert broker.drain() == 3
    assert ran == [0, 1, 2]
    assert broker.pending() == []
    assert broker.drain() == 0


def test_drain_runs_what_the_messages_send(broker, note, ran):
    @dramalite.actor
    def parent(n):
        for child in range(n):
            note.send(child)

    parent.send(3)

    assert broker.drain() == 4
    assert ran == [0, 1, 2]


def test_drain_runs_in_the_calling_thread(broker):
    import threading

    threads = []

    @dramalite.actor
    def where():
        threads.append(threading.current_thread())

    where.send()
    broker.drain()

    assert threads == [threading.current_thread()]


def test_drain_leaves_what_is_delayed(broker, note, ran):
    note.send_with_options(args=(1,), delay=60_000)

    assert broker.drain() == 0
    assert len(broker.pending()) == 1


def test_drain_raises_what_failed_though_it_will_be_retried(broker, fail, note, ran):
    fail.send("no")
    note.send(1)
    with pytest.raises(ValueError, match="no"):
        broker.drain()

    assert ran == [1]
    assert [message.options["retries"] for message in broker.pending()] == [1]


def test_drain_raises_the_first_failure(broker, fail):
    fail.send("first")
    fail.send("second")
    with pytest.raises(ValueError, match="first"):
        broker.drain()


def test_drain_raises_nothing_where_a_retry_at_once_succeeded(broker):
    @dramalite.actor(min_backoff=0, max_backoff=0)
    def recovers():
        if "retries" not in dramalite.CurrentMessage.get_current_message().options:
            raise ValueError("once")

    recovers.send()
    broker.drain()
    while broker.pending():
        broker.drain()

    assert broker.dead_letters == []


def test_drain_raises_no_retry_that_was_asked_for(broker):
    @dramalite.actor
    def later():
        raise dramalite.Retry(delay=60_000)

    later.send()

    assert broker.drain() == 1
    assert len(broker.pending()) == 1


def test_drain_raises_for_dead_letters_as_well(broker):
    @dramalite.actor(throws=KeyError)
    def fatal():
        raise KeyError("gone")

    fatal.send()
    with pytest.raises(KeyError):
        broker.drain()

    assert len(broker.dead_letters) == 1


def an_unstorable_result(broker):
    dramalite.actor(lambda: {1}, actor_name="strange", store_results=True).send()


def a_retry_too_many(broker):
    def again():
        raise dramalite.Retry("once more")

    dramalite.actor(again, max_retries=0).send()


def a_message_too_old(broker):
    message = dramalite.actor(print, actor_name="late", max_age=1000).message()
    broker.enqueue(message._replace(message_timestamp=message.message_timestamp - 2000))


@pytest.mark.parametrize(
    ("send", "error"),
    [
        (an_unstorable_result, TypeError),
        (a_retry_too_many, dramalite.Retry),
        (a_message_too_old, dramalite.SkipMessage),
    ],
)
def test_drain_raises_what_became_a_dead_letter_though_no_job_failed(broker, send, error):
    send(broker)
    with pytest.raises(error):
        broker.drain()

    assert len(broker.dead_letters) == 1


def test_drain_stores_results(broker):
    @dramalite.actor(store_results=True)
    def add(x, y):
        return x + y

    message = add.send(1, 2)
    broker.drain()

    assert message.get_result() == 3


def test_drain_runs_coroutines(broker, ran):
    @dramalite.actor
    async def note_later(n):
        ran.append(n)

    note_later.send(1)
    broker.drain()

    assert ran == [1]


def test_drain_has_an_end_and_puts_the_next_message_back(broker):
    @dramalite.actor
    def again():
        again.send()

    again.send()
    with pytest.raises(RuntimeError, match="send itself"):
        broker.drain(max_messages=20)

    assert len(broker.pending()) == 1


@pytest.mark.parametrize("hook", ["before_process_message", "after_process_message"])
def test_ctrl_c_in_a_hook_comes_out_of_drain_and_the_message_waits(broker, note, ran, hook):
    class Interrupted(dramalite.Middleware):
        pass

    def interrupt(*_arguments, **_named):
        raise KeyboardInterrupt

    setattr(Interrupted, hook, interrupt)
    broker.add_middleware(Interrupted())
    note.send(1)
    with pytest.raises(KeyboardInterrupt):
        broker.drain()

    assert [message.args for message in broker.pending()] == [(1,)]
    assert broker.dead_letters == []


def test_a_job_that_ctrl_c_cuts_off_and_that_may_not_run_twice_is_a_dead_letter(broker):
    @dramalite.actor(on_crash="fail")
    def work():
        raise KeyboardInterrupt

    work.send()
    with pytest.raises(KeyboardInterrupt):
        broker.drain()

    assert broker.pending() == []
    assert [message.actor_name for message in broker.dead_letters] == ["work"]


def test_a_simulated_broker_is_not_drained(broker):
    with dramalite.simulate(broker), pytest.raises(RuntimeError, match="simulat"):
        broker.drain()


def test_only_brokers_of_the_engine_can_be_drained():
    with pytest.raises(TypeError, match="drained"):
        dramalite.drain(dramalite.Broker(middleware=[]))


# pending() and assert_sent()


def test_pending_messages_are_as_they_were_sent(broker, note):
    sent = note.send(1, key="value")

    assert broker.pending() == [sent]


def test_a_message_that_was_sent_is_found_by_all_that_it_is(broker, note):
    sent = note.send_with_options(args=(1, 2), kwargs={"key": "value"}, max_retries=7)
    other = note.send(3)

    assert broker.assert_sent(note) == [sent, other]
    assert broker.assert_sent("note", args=(1, 2)) == [sent]
    assert broker.assert_sent(note, args=[1, 2], kwargs={"key": "value"}, max_retries=7, times=1) == [sent]
    assert broker.assert_sent(note, args=(5,), times=0) == []
    bare = note.send()
    assert broker.assert_sent(note, args=[], kwargs={}) == [bare]


def test_a_delayed_message_is_found_by_its_delay(broker, note):
    note.send(1)
    note.send_with_options(args=(1,), delay=timedelta(minutes=5))

    assert len(broker.assert_sent(note, delay=300_000)) == 1
    assert len(broker.assert_sent(note, delay=timedelta(minutes=5))) == 1
    with pytest.raises(AssertionError):
        broker.assert_sent(note, delay=200_000)


@pytest.mark.parametrize(
    "wanted",
    [
        {"args": (2,)},
        {"args": ()},
        {"kwargs": {"key": "value"}},
        {"delay": 1000},
        {"times": 2},
        {"times": 0},
        {"max_retries": 3},
    ],
    ids=str,
)
def test_a_message_that_was_not_sent_like_this_fails_with_what_was(broker, note, wanted):
    note.send(1)
    with pytest.raises(AssertionError, match=r"note\(1\)"):
        broker.assert_sent(note, **wanted)


@pytest.mark.parametrize("option", ["args", "kwargs", "on_success", "max_age"])
def test_what_is_asked_for_may_be_given_as_it_was_sent(broker, note, option):
    given = {
        "args": ((1, 2),),
        "kwargs": {"key": {"a": (3,)}},
        "on_success": note,
        "max_age": timedelta(seconds=5),
    }
    sent = note.send_with_options(**given)
    note.send(1)
    [found] = broker.assert_sent(note, **{option: given[option]})

    assert found.message_id == sent.message_id


def test_a_message_that_was_not_to_be_sent_fails_with_how_many_were_wanted(broker, note):
    note.send(1)
    with pytest.raises(AssertionError, match="0 messages pending like 'note'; 1 of 1 are"):
        broker.assert_sent(note, times=0)


def test_the_failure_says_what_was_asked_for_and_what_there_is(broker, note):
    note.send(1, key="value")
    with pytest.raises(AssertionError) as failed:
        broker.assert_sent(note, args=(2,), delay=60_000, max_retries=3)

    assert str(failed.value) == (
        "There should be a message pending like 'note', args=(2,), max_retries=3, delay=60000; 0 of 1 are:"
        "\n    note(1, key='value') {}"
    )


def test_nothing_sent_fails_as_well(broker, note):
    with pytest.raises(AssertionError, match="none"):
        broker.assert_sent(note)


def test_a_step_of_a_pipeline_was_sent_with_its_delay_though_it_was_made_long_before(broker, note):
    @dramalite.actor
    def work():
        dramalite.simulated_work(5000)

    with dramalite.simulate(broker) as sim:
        (work.message() | note.message_with_options(args=(1,), pipe_ignore=True, delay=60_000)).run()
        sim.advance(30_000)

        broker.assert_sent(note, args=(1,), delay=60_000)
        with pytest.raises(AssertionError, match="delay=90000"):
            broker.assert_sent(note, delay=90_000)


def test_drain_leaves_nothing_to_watch_where_ctrl_c_ended_it(broker):
    import threading

    @dramalite.actor
    def interrupted():
        raise KeyboardInterrupt

    (limit,) = [item for item in broker.middleware if isinstance(item, dramalite.TimeLimit)]
    interrupted.send()
    with pytest.raises(KeyboardInterrupt):
        broker.drain()

    assert limit.deadline(threading.get_ident()) is None


def test_a_delay_is_told_from_others_that_are_a_second_apart(broker, note):
    with dramalite.simulate(broker):
        for delay in (0, 1000, 2000, 3000):
            note.send_with_options(args=(delay,), delay=delay)

        for delay in (0, 1000, 2000, 3000):
            [found] = broker.assert_sent(note, delay=delay, times=1)
            assert found.args == (delay,)


def test_drain_leaves_nothing_to_watch_where_a_hook_left(broker, note):
    import threading

    class Leave(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            raise SystemExit

    broker.add_middleware(Leave())
    (limit,) = [item for item in broker.middleware if isinstance(item, dramalite.TimeLimit)]
    note.send(1)
    with pytest.raises(RuntimeError, match="A hook"):
        broker.drain()

    assert limit.deadline(threading.get_ident()) is None
