"""Results: storing what actors return, reading it back, and knowing when there will be none."""

import asyncio
import contextlib
import datetime
import hashlib
import logging
import re
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

import dramalite
from dramalite import Message, ResultBackend, Results, ResultUnavailable, StubResultBackend

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000


def result_of(message):
    """The result of `message`, waiting for it."""
    return message.get_result(block=True, timeout=PATIENCE)


def storing(function, **options):
    """An actor of `function` that stores its results."""
    return dramalite.actor(function, actor_name="work", store_results=True, **options)


@pytest.mark.parametrize(
    "value", [42, "text", None, False, 0, "", [], {}, [1, [2, {"a": None}]], {"a": 1.5}, "é😀"]
)
def test_a_stored_result_can_be_read(broker, worker, value):
    sent = storing(lambda: value).send()
    worker(broker)

    assert result_of(sent) == value


def test_a_result_has_the_form_json_gives_it(broker, worker):
    sent = storing(lambda: (1, (2,))).send()
    worker(broker)

    assert result_of(sent) == [1, [2]]


def test_a_result_can_be_read_again_and_again(broker, worker):
    sent = storing(lambda: 42).send()
    worker(broker)

    assert [result_of(sent) for _ in range(3)] == [42, 42, 42]


def test_a_result_that_is_not_there_yet_is_missing(broker):
    sent = storing(lambda: 42).send(1)
    with pytest.raises(dramalite.ResultMissing) as raised:
        sent.get_result()

    assert raised.value.message == sent


def test_waiting_for_a_result_times_out_exactly(broker):
    sent = storing(lambda: 42).send(1)
    before = time.monotonic()
    with pytest.raises(dramalite.ResultTimeout) as raised:
        sent.get_result(block=True, timeout=100)
    waited = time.monotonic() - before

    assert raised.value.message == sent
    assert 0.095 <= waited < DEADLINE


def test_a_waiting_caller_gets_the_result_when_it_comes(broker, worker):
    go_on, received = threading.Event(), []

    def work():
        go_on.wait(DEADLINE)
        return 42

    sent = storing(work).send()
    worker(broker)
    waiting = threading.Thread(target=lambda: received.append(result_of(sent)), daemon=True)
    waiting.start()
    go_on.set()
    waiting.join(DEADLINE)

    assert received == [42]


def test_a_result_of_a_delayed_message_is_found(broker, worker):
    sent = storing(lambda: 42).send_with_options(delay=1)
    worker(broker)

    assert result_of(sent) == 42


def test_a_result_is_found_by_an_equal_message(broker, worker):
    sent = storing(lambda: 42).send()
    worker(broker)
    result_of(sent)

    assert dramalite.Message.decode(sent.encode()).get_result() == 42


def test_a_result_can_be_read_through_the_backend(broker, worker):
    sent = storing(lambda: 42).send()
    worker(broker)

    assert broker.get_results_backend().get_result(sent, block=True, timeout=PATIENCE) == 42
    assert sent.get_result(backend=broker.get_results_backend()) == 42


def test_a_result_is_read_through_another_broker_on_the_file(make_file_broker, worker):
    first = make_file_broker()
    sent = storing(lambda: 42, broker=first).send()
    worker(first)
    second = make_file_broker()

    assert second.get_results_backend().get_result(sent, block=True, timeout=PATIENCE) == 42


def test_a_message_finds_its_result_where_it_was_sent_whatever_the_default_broker_is(broker, make_stub_broker):
    sent = storing(lambda: 42).send()
    broker.drain()
    make_stub_broker()

    assert sent.get_result() == 42


@pytest.mark.parametrize("place", ["actor", "message", "neither"])
def test_results_are_stored_if_actor_or_message_say_so(broker, worker, place):
    options = {"store_results": True}
    actor = dramalite.actor(
        lambda: 42, actor_name="work", **(options if place == "actor" else {})
    )
    sent = actor.send_with_options(**(options if place == "message" else {}))
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    try:
        found = sent.get_result()
    except dramalite.ResultError:
        found = "none"

    assert found == ("none" if place == "neither" else 42)


def test_a_message_may_decline_to_store_its_result(broker, worker):
    sent = storing(lambda: 42).send_with_options(store_results=False)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    with pytest.raises(dramalite.ResultError):
        sent.get_result()


def fail():
    raise ValueError("no such thing")


def test_a_final_failure_is_stored_with_its_type_and_text(broker, worker):
    sent = storing(fail, max_retries=0).send()
    worker(broker)
    with pytest.raises(dramalite.ResultFailure) as raised:
        result_of(sent)

    assert str(raised.value) == "actor raised ValueError: no such thing"
    assert raised.value.orig_exc_type == "ValueError"
    assert raised.value.orig_exc_msg == "no such thing"


def test_a_failure_whose_exception_is_false_is_stored_with_its_type_and_text(broker, worker):
    class Falsy(Exception):
        def __bool__(self):
            return False

    def fail_falsely():
        raise Falsy("no such thing")

    sent = storing(fail_falsely, max_retries=0).send()
    worker(broker)
    with pytest.raises(dramalite.ResultFailure) as raised:
        result_of(sent)

    assert (raised.value.orig_exc_type, raised.value.orig_exc_msg) == ("Falsy", "no such thing")


def test_while_retries_are_pending_the_result_is_missing(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    attempts = []

    def flaky():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("once")
        return 42

    sent = storing(flaky, min_backoff=60_000).send()
    first = worker(broker)
    wait_until(lambda: attempts)
    first.stop()
    with pytest.raises(dramalite.ResultMissing):
        sent.get_result()
    clock.advance(120_000)
    worker(broker)

    assert result_of(sent) == 42


def test_an_expected_exception_is_stored_as_a_failure(broker, worker):
    sent = storing(fail, throws=ValueError).send()
    worker(broker)

    with pytest.raises(dramalite.ResultFailure):
        result_of(sent)


def test_the_result_of_a_skipped_message_is_none(broker, worker):
    def skip():
        raise dramalite.SkipMessage("not today")

    sent = storing(skip).send()
    worker(broker)

    assert result_of(sent) is None


def test_a_result_that_cannot_be_stored_is_stored_as_a_failure(broker, worker):
    sent = storing(lambda: {1, 2}, max_retries=0).send()
    worker(broker)

    with pytest.raises(dramalite.ResultFailure):
        result_of(sent)


def test_a_value_that_is_not_stored_is_warned_about(broker, worker, caplog):
    dramalite.actor(lambda: 42, actor_name="work").send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    assert ["the value has been discarded" in text for text in warnings] == [True]


@pytest.mark.parametrize("value, stored", [(None, False), (42, True)])
def test_nothing_is_warned_about_if_nothing_is_lost(broker, worker, caplog, value, stored):
    dramalite.actor(lambda: value, actor_name="work", store_results=stored).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_result_expires_after_its_time(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    sent = storing(lambda: 42, result_ttl=900).send()
    worker(broker)
    fresh = result_of(sent)
    clock.advance(899)
    still = sent.get_result()
    clock.advance(2)

    with pytest.raises(dramalite.ResultError):
        sent.get_result()
    assert (fresh, still) == (42, 42)


def test_results_whose_time_is_over_leave_the_file(make_file_broker, clock, worker, tmp_path):
    def stored():
        with sqlite3.connect(tmp_path / "queue.db") as connection:
            count = connection.execute("SELECT count(*) FROM dramalite_results").fetchone()[0]
        connection.close()
        return count

    broker = make_file_broker(clock=clock)
    work = storing(lambda: 42, result_ttl=900)
    for _ in range(3):
        work.send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    before = stored()
    clock.advance(1000)

    assert before == 3
    wait_until(lambda: stored() == 0)


@pytest.mark.parametrize(
    ("middleware", "actor", "message", "expected"),
    [
        (None, None, None, 600_000),
        (5000, None, None, 5000),
        (5000, 4000, None, 4000),
        (5000, 4000, 3000, 3000),
        (None, datetime.timedelta(seconds=2), None, 2000),
    ],
)
def test_message_then_actor_then_middleware_decide_how_long_a_result_is_kept(
    make_broker, clock, middleware, actor, message, expected
):
    broker = make_broker(clock=clock)
    broker.add_middleware(Results(result_ttl=middleware))
    work = storing(lambda: 42, **({} if actor is None else {"result_ttl": actor}))
    sent = work.send_with_options(**({} if message is None else {"result_ttl": message}))
    broker.drain()
    clock.advance(expected - 1)
    still = sent.get_result()
    clock.advance(1)

    assert still == 42
    with pytest.raises(dramalite.ResultMissing):
        sent.get_result()


def test_what_a_hook_sent_before_the_job_is_sent_though_its_result_cannot_be_kept(make_broker, worker):
    audited = []

    class Audit(dramalite.Middleware):
        def before_process_message(self, broker, message):
            if message.actor_name == "work":
                audit.send(message.message_id)

    broker = make_broker()
    broker.add_middleware(Audit())
    audit = dramalite.actor(audited.append, actor_name="audit")
    message = storing(object, max_retries=0).send()
    worker(broker)
    wait_until(lambda: broker.dead_letters)
    broker.join("default", timeout=PATIENCE)

    assert audited == [message.message_id]


def test_a_result_whose_time_cannot_be_stored_keeps_no_other_message_from_being_done(broker, worker):
    work = dramalite.actor(lambda value: value, actor_name="work", store_results=True)
    before = work.send("before")
    broker.enqueue(work.message("strange").copy(options={"result_ttl": 10**30}))
    after = work.send("after")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert (before.get_result(), after.get_result()) == ("before", "after")


class Unwilling:
    """What can't be pickled, for a reason of its own."""

    def __reduce__(self):
        raise RuntimeError("not today")


def test_what_cannot_be_pickled_for_whatever_reason_fails_the_job(make_broker, worker):
    dramalite.set_encoder(dramalite.PickleEncoder())
    broker = make_broker()
    sent = storing(Unwilling, max_retries=0).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE, fail_fast=False)

    with pytest.raises(dramalite.ResultFailure, match="not today"):
        sent.get_result()
    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]


def test_those_who_wait_for_results_leave_slots_for_workers(make_file_broker, worker, clean_state):
    def listeners():
        return sum(thread.name == "dramalite-listener" for thread in threading.enumerate())

    broker = make_file_broker()
    work = storing(lambda number: number)
    sent = [work.send(number) for number in range(130)]
    results = []

    def wait_in_a_process_of_its_own(message):
        other = dramalite.SQLiteBroker(broker.path)
        clean_state.callback(other.close)
        found = message.copy().get_result(
            backend=dramalite.SQLiteResultBackend(other), block=True, timeout=PATIENCE
        )
        results.append(found)

    waiting = [threading.Thread(target=wait_in_a_process_of_its_own, args=[each], daemon=True) for each in sent]
    for thread in waiting:
        thread.start()
    wait_until(lambda: listeners() > 90)
    worker(broker)
    for thread in waiting:
        thread.join(DEADLINE)

    assert sorted(results) == list(range(130))


# No result will come


def raises_at_once(get_result):
    """The error of a wait for a result that is known to be in vain."""
    before = time.monotonic()
    with pytest.raises(dramalite.ResultError) as raised:
        get_result(block=True, timeout=60_000)
    assert time.monotonic() - before < DEADLINE  # Of a minute.
    return raised.value


def test_waiting_ends_at_once_where_the_actor_stores_no_results(broker):
    sent = dramalite.actor(lambda: 42, actor_name="work").send()
    error = raises_at_once(sent.get_result)

    assert type(error) is ResultUnavailable
    assert "store_results" in error.reason


def test_waiting_ends_at_once_where_the_message_stores_no_result(broker):
    sent = storing(lambda: 42).send_with_options(store_results=False)

    assert "store_results" in raises_at_once(sent.get_result).reason


def test_waiting_ends_at_once_for_a_message_that_was_never_sent(broker):
    message = storing(lambda: 42).message()
    error = raises_at_once(message.get_result)

    assert type(error) is ResultUnavailable
    assert "never sent" in error.reason


def test_waiting_ends_at_once_for_a_message_that_was_dropped(broker):
    sent = storing(lambda: 42).send()
    broker.flush("default")

    assert "dropped" in raises_at_once(sent.get_result).reason


def test_waiting_ends_when_the_message_is_dropped_meanwhile(broker):
    sent = storing(lambda: 42).send()
    errors = []
    waiting = threading.Thread(target=lambda: errors.append(raises_at_once(sent.get_result)), daemon=True)
    waiting.start()
    broker.flush("default")
    waiting.join(DEADLINE)

    assert [type(error) for error in errors] == [ResultUnavailable]


def test_waiting_ends_when_the_message_has_failed_for_good(broker, worker):
    sent = storing(fail, max_retries=1, min_backoff=0).send()
    worker(broker)
    error = raises_at_once(sent.get_result)

    assert (error.orig_exc_type, error.orig_exc_msg) == ("ValueError", "no such thing")


def test_waiting_ends_when_the_message_was_too_old(broker, worker):
    sent = storing(lambda: 42, max_age=1).send_with_options(delay=5)
    worker(broker)

    assert raises_at_once(sent.get_result).orig_exc_type == "SkipMessage"


def test_waiting_ends_where_the_result_has_expired(make_broker, clock):
    broker = make_broker(clock=clock)
    sent = storing(lambda: 42, result_ttl=1000).send()
    broker.drain()
    clock.advance(1000)

    assert "expired" in raises_at_once(sent.get_result).reason


def test_waiting_ends_where_nobody_here_knows_the_actor(stub_broker, worker):
    stub_broker.add_middleware(Results())
    stub_broker.declare_queue("default")
    sent = stub_broker.enqueue(Message("default", "stranger", (), {}, {}))
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert type(raises_at_once(sent.get_result)) is ResultUnavailable


def times_out(get_result):
    """Whether a wait, of a moment, ends for no better reason than that."""
    with pytest.raises(dramalite.ResultTimeout) as raised:
        get_result(block=True, timeout=1)
    return type(raised.value) is dramalite.ResultTimeout


def test_waiting_by_the_id_alone_heeds_what_the_message_itself_says_of_storing(broker):
    work = dramalite.actor(lambda: 42, actor_name="work")
    sent = work.send_with_options(store_results=True)
    by_id = work.message().copy(message_id=sent.message_id)

    assert times_out(by_id.get_result)
    broker.drain()
    assert by_id.get_result() == 42


@pytest.mark.parametrize("is_first", [True, False])
def test_waiting_goes_on_for_members_of_a_step_whose_actor_stores_none(broker, is_first):
    work = dramalite.actor(lambda *args: 42, actor_name="work")
    members = dramalite.group([work.message(), work.message()])
    steps = [members, storing_step()] if is_first else [work.message(), members, storing_step()]
    dramalite.pipeline(steps).run()

    assert times_out(lambda **options: list(members.get_results(**options)))
    broker.drain()
    assert list(members.get_results()) == [42, 42]


def storing_step():
    return dramalite.actor(lambda *args: "end", actor_name="step", store_results=True).message()


def test_waiting_goes_on_for_a_later_step_though_the_clock_was_set_back_before_it_was_sent(make_broker, clock):
    broker = make_broker(clock=clock)
    work = storing(lambda *args: 42)
    pipe = work.message() | work.message()
    clock.advance(-3_600_000)
    pipe.run()

    assert times_out(pipe.get_result)
    broker.drain()
    assert pipe.get_result() == 42


def test_waiting_goes_on_for_a_later_step_whose_id_is_written_otherwise_in_json(broker):
    work = storing(lambda *args: 42)
    pipe = work.message() | work.message().copy(message_id='job-"ü"')
    pipe.run()

    assert times_out(pipe.get_result)
    broker.drain()
    assert pipe.get_result() == 42


def test_waiting_goes_on_while_a_message_is_delayed_or_to_be_retried(make_broker, clock):
    broker = make_broker(clock=clock)
    delayed = storing(lambda: 42).send_with_options(delay=60_000)
    failing = dramalite.actor(fail, store_results=True).send()
    with pytest.raises(ValueError):
        broker.drain()
    errors = []
    for sent in (delayed, failing):
        with pytest.raises(dramalite.ResultTimeout) as raised:
            sent.get_result(block=True, timeout=10)
        errors.append(type(raised.value))

    assert errors == [dramalite.ResultTimeout] * 2


def test_waiting_goes_on_while_an_earlier_step_has_not_ended(broker, worker):
    go_on = threading.Event()
    first = dramalite.actor(lambda: go_on.wait(DEADLINE), actor_name="first", store_results=True)
    last = dramalite.actor(lambda value: value, actor_name="last", store_results=True)
    pipe = (first.message() | last.message()).run()
    worker(broker)
    with pytest.raises(dramalite.ResultTimeout) as raised:
        pipe.get_result(block=True, timeout=30)
    go_on.set()

    assert type(raised.value) is dramalite.ResultTimeout
    assert pipe.get_result(block=True, timeout=PATIENCE) is True


def test_waiting_goes_on_while_an_earlier_step_has_not_ended_in_a_database_of_utf_16(make_file_broker, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
        connection.execute("PRAGMA encoding = 'UTF-16'")
        connection.execute("CREATE TABLE application (x)")
    make_file_broker()
    work = storing(lambda value=0: value)
    pipe = (work.message() | work.message()).run()
    with pytest.raises(dramalite.DramatiqError) as raised:
        pipe.get_result(block=True, timeout=30)

    assert type(raised.value) is dramalite.ResultTimeout


def test_the_result_of_a_pipeline_whose_step_failed_is_that_failure(broker, worker):
    last = dramalite.actor(lambda value: value, actor_name="last", store_results=True)
    pipe = (storing(fail, max_retries=0).message() | last.message()).run()
    worker(broker)
    error = raises_at_once(pipe.get_result)

    assert type(error) is dramalite.ResultFailure
    assert error.orig_exc_msg == "no such thing"


def test_a_step_after_a_failure_has_no_result_of_its_own(broker, worker):
    last = dramalite.actor(lambda value: value, actor_name="last", store_results=True)
    pipe = (storing(fail, max_retries=0).message() | last.message()).run()
    worker(broker)

    assert "an earlier step" in raises_at_once(pipe.messages[-1].get_result).reason


def test_without_waiting_the_reason_is_told_too(broker):
    message = storing(lambda: 42).message()
    with pytest.raises(ResultUnavailable):
        message.get_result()


def test_code_that_expects_dramatiqs_errors_catches_an_unavailable_result(broker):
    message = storing(lambda: 42).message(1)
    error = raises_at_once(message.get_result)

    assert isinstance(error, dramalite.ResultMissing)
    assert isinstance(error, dramalite.ResultTimeout)
    assert error.message == message
    assert str(error) == f"work(1) has no result: {error.reason}"


@pytest.mark.parametrize("turns", range(5))  # Of the event loop, in one of which both come together.
def test_a_cancellation_that_comes_together_with_a_wake_up_ends_a_wait_for_a_result(broker, turns):
    work, backend = storing(lambda: 42), broker.get_results_backend()

    async def wait():
        message = work.send()
        waiting = asyncio.ensure_future(message.get_result_async(timeout=PATIENCE))
        await asyncio.wait({waiting}, timeout=0.02)  # By then it has looked, and waits.
        backend.store_result(message, 42, 60_000)
        for _ in range(turns):
            await asyncio.sleep(0)
        is_asked_to_end = waiting.cancel()
        await asyncio.wait({waiting})
        return is_asked_to_end, waiting.cancelled()

    is_asked_to_end, is_cancelled = asyncio.run(wait())

    assert is_cancelled == is_asked_to_end


# Other processes


def test_a_caller_hears_at_once_of_a_result_that_another_process_stored(make_file_broker, tmp_path):
    broker = make_file_broker()
    work = storing(lambda: 42)
    script = f"""if True:
        import sys, threading, time
        sys.path.insert(0, {str(Path(dramalite.__file__).parent)!r})
        import dramalite
        broker = dramalite.SQLiteBroker({broker.path!r})
        @dramalite.actor(broker=broker, store_results=True)
        def work():
            threading.Event().wait(0.1)  # So long that a caller who naps would be deep in a nap.
            return time.time()
        with dramalite.Worker(broker, worker_threads=1):
            sys.stdin.read()
    """
    late_s = []
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdin=subprocess.PIPE) as process:
        while min(late_s, default=1) >= 0.3 and len(late_s) < 10:  # The best counts, for the machine may be busy.
            returned = work.send().get_result(block=True, timeout=PATIENCE)
            late_s.append(time.time() - returned)
        process.stdin.close()
        code = process.wait(120)

    assert code == 0
    assert min(late_s) < 0.3


# Backends


@pytest.fixture
def make_stub_backend(clean_state):
    """A function that makes a StubResultBackend, which is closed at the end."""

    def make(**options):
        backend = StubResultBackend(**options)
        clean_state.callback(backend.broker.close)
        return backend

    return make


def test_results_in_memory_can_be_kept_beside_any_broker(make_stub_backend, make_broker, worker):
    backend = make_stub_backend()
    broker = make_broker()
    broker.add_middleware(Results(backend=backend))
    sent = storing(lambda: 42).send()
    worker(broker)

    assert sent.get_result(block=True, timeout=PATIENCE) == 42
    assert broker.get_results_backend() is backend
    assert backend.get_result(sent) == 42


def test_a_stub_broker_keeps_results_when_it_is_told_to_as_in_dramatiq(make_stub_backend, stub_broker, worker):
    stub_broker.add_middleware(Results(backend=make_stub_backend()))
    sent = storing(lambda: 42).send()
    worker(stub_broker)

    assert sent.get_result(block=True, timeout=PATIENCE) == 42


@pytest.fixture
def elsewhere(make_file_broker, make_broker):
    """A broker that keeps its results in the database of another one."""
    backend = dramalite.SQLiteResultBackend(make_file_broker("results.db", middleware=[]))
    broker = make_broker()
    broker.add_middleware(Results(backend=backend))
    return broker


def test_waiting_for_a_result_that_another_database_keeps_ends_when_it_comes(elsewhere, worker):
    sent = storing(lambda: 42).send()
    received = []
    waiting = threading.Thread(target=lambda: received.append(result_of(sent)), daemon=True)
    waiting.start()
    waiting.join(0.03)
    worker(elsewhere)
    waiting.join(DEADLINE)

    assert received == [42]


def test_waiting_for_a_result_that_another_database_keeps_times_out(elsewhere):
    sent = storing(lambda: 42).send()
    with pytest.raises(dramalite.ResultTimeout) as raised:
        sent.get_result(block=True, timeout=30)

    assert type(raised.value) is dramalite.ResultTimeout


def test_results_without_a_backend_take_that_of_the_broker(stub_broker, worker):
    stub_broker.add_middleware(Results())
    sent = storing(lambda: 42).send()
    worker(stub_broker)

    assert sent.get_result(block=True, timeout=PATIENCE) == 42


def test_results_of_no_broker_have_no_backend():
    with pytest.raises(RuntimeError, match="backend"):
        Results().backend


def test_backends_for_tests_share_nothing(make_stub_backend):
    message = Message("default", "work", (), {}, {})
    one, other = make_stub_backend(), make_stub_backend()
    one.store_result(message, 42, 600_000)

    assert one.get_result(message) == 42
    with pytest.raises(dramalite.ResultMissing):
        other.get_result(message)


def test_a_time_of_less_than_a_second_is_kept(make_stub_backend):
    backend = make_stub_backend()
    message = Message("default", "work", (), {}, {})
    backend.store_result(message, 42, 900)

    assert backend.get_result(message) == 42


def test_a_backend_is_read_and_written_by_hand(broker):
    backend = broker.get_results_backend()
    done, failed = (Message("default", "work", (), {}, {}) for _ in range(2))
    backend.store_result(done, [1, 2], 60_000)
    backend.store_exception(failed, KeyError("k"), 60_000)
    with pytest.raises(dramalite.ResultFailure, match="actor raised KeyError: 'k'"):
        backend.get_result(failed)

    assert backend.get_result(done) == [1, 2]


def test_results_for_all_actors_may_be_stored(make_broker):
    broker = make_broker()
    broker.add_middleware(Results(store_results=True))
    stored = dramalite.actor(lambda: 1, actor_name="stored").send()
    declined = dramalite.actor(lambda: None, actor_name="declined", store_results=False).send()
    broker.drain()

    assert stored.get_result() == 1
    with pytest.raises(ResultUnavailable):
        declined.get_result()


class DictBackend(ResultBackend):
    """A backend of one's own: it overrides what ResultBackend says is to be overridden."""

    def __init__(self, **options):
        super().__init__(**options)
        self.values = {}

    def _get(self, key):
        return self.values.get(key, dramalite.Missing)

    def _store(self, key, value, ttl):
        self.values[key] = value


def test_a_backend_of_ones_own_needs_two_methods(make_broker, worker):
    backend = DictBackend()
    broker = make_broker()
    broker.add_middleware(Results(backend=backend))
    done = storing(lambda: 42).send()
    failed = dramalite.actor(fail, store_results=True, max_retries=0).send()
    worker(broker)

    assert done.get_result(block=True, timeout=PATIENCE) == 42
    with pytest.raises(dramalite.ResultFailure):
        failed.get_result(block=True, timeout=PATIENCE)
    assert len(backend.values) == 2


@pytest.mark.parametrize("timeout", [30, 100])
def test_a_backend_of_ones_own_times_out_exactly_too(timeout):
    message = Message("default", "work", (), {}, {})
    before = time.monotonic()
    with pytest.raises(dramalite.ResultTimeout):
        DictBackend().get_result(message, block=True, timeout=timeout)

    assert timeout / 1000 - 0.005 <= time.monotonic() - before < DEADLINE


def test_keys_are_those_of_dramatiq(make_stub_backend):
    message = Message("mail", "work", (), {}, {}, "the-id", 1)
    text = "dramatiq-results:mail:work:the-id"

    assert make_stub_backend().build_message_key(message) == hashlib.md5(text.encode()).hexdigest()
    assert make_stub_backend(use_namespace_prefix_keys=True).build_message_key(message) == text
    assert re.fullmatch("[0-9a-f]{32}", make_stub_backend(namespace="mine").build_message_key(message))
    assert DictBackend(namespace="mine", use_namespace_prefix_keys=True).build_message_key(message) == (
        "mine:mail:work:the-id"
    )


def test_a_delayed_message_has_the_key_of_its_queue(make_stub_backend):
    message = Message("mail", "work", (), {}, {}, "the-id", 1)
    backend = make_stub_backend()

    assert backend.build_message_key(message._replace(queue_name="mail.DQ")) == backend.build_message_key(message)


def test_backends_of_two_namespaces_on_one_broker_are_apart(broker):
    message = Message("default", "work", (), {}, {})
    one, other = (dramalite.SQLiteResultBackend(broker, namespace=name) for name in ("one", "other"))
    one.store_result(message, 1, 60_000)
    other.store_result(message, 2, 60_000)

    assert (one.get_result(message), other.get_result(message)) == (1, 2)


def test_a_backend_may_have_an_encoder_of_its_own(make_stub_backend):
    backend = make_stub_backend(encoder=dramalite.PickleEncoder())
    message = Message("default", "work", (), {}, {})
    backend.store_result(message, {(1, 2), 3}, 60_000)

    assert backend.get_result(message) == {(1, 2), 3}


def test_a_failure_is_stored_as_dramatiq_stores_it():
    backend = DictBackend()
    backend.store_exception(Message("default", "work", (), {}, {}), ValueError("no"), 60_000)

    assert list(backend.values.values()) == [
        {"__t": "dramatiq.results.Result", "exn": {"type": "ValueError", "msg": "no"}}
    ]


@pytest.mark.parametrize("value", [42, None, "text", {"exn": 1}, {"__t": "other"}])
def test_a_plain_stored_value_is_a_result(make_stub_backend, value):
    assert make_stub_backend().unwrap_result(value) == value


def test_a_failure_that_dramatiq_stored_is_a_failure(make_stub_backend):
    stored = {"__t": "dramatiq.results.Result", "exn": {"type": "ValueError", "msg": "no"}}
    with pytest.raises(dramalite.ResultFailure, match="actor raised ValueError: no"):
        make_stub_backend().unwrap_result(stored)


# Who is warned


class OwnResults(Results):
    """A subclass of the middleware."""


@pytest.mark.parametrize("when", ["before", "late"])
def test_no_value_is_reported_lost_that_another_kind_of_results_keeps(stub_broker, worker, caplog, when):
    if when == "before":
        stub_broker.add_middleware(OwnResults(store_results=True))
    work = dramalite.actor(lambda: 42, actor_name="work")
    worker(stub_broker)
    if when == "late":
        dramalite.actor(lambda: None, actor_name="earlier").send()
        stub_broker.join("default", timeout=PATIENCE)
        stub_broker.add_middleware(OwnResults(store_results=True))
    sent = work.send()

    assert sent.get_result(block=True, timeout=PATIENCE) == 42
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_message_for_an_unknown_actor_stores_no_failure_and_is_no_error(stub_broker, worker, caplog):
    stub_broker.add_middleware(Results(store_results=True))
    stub_broker.declare_queue("default")
    sent = stub_broker.enqueue(Message("default", "stranger", (), {}, {}))
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert [record for record in caplog.records if record.levelno >= logging.CRITICAL] == []
    with pytest.raises(dramalite.ResultMissing):
        sent.get_result()


def test_the_refusal_of_a_result_names_the_actor_and_what_is_wrong(broker):
    sent = storing(lambda: {1, 2}, max_retries=0).send()
    with pytest.raises(TypeError):
        broker.drain()
    with pytest.raises(dramalite.ResultFailure) as raised:
        sent.get_result()

    assert raised.value.orig_exc_type == "TypeError"
    assert re.fullmatch(r"The result of actor 'work' can't be kept: \w.* is a set, .*", raised.value.orig_exc_msg)


def test_a_result_that_will_never_come_is_told_with_the_reason_of_the_dead_letter(worker):
    broker = dramalite.MemoryBroker()
    work = dramalite.actor(print, actor_name="work", store_results=True, broker=broker)
    message = broker.enqueue(work.message().copy(actor_name="nobody"))
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    with pytest.raises(ResultUnavailable, match="dead letter: ActorNotFound: nobody"):
        message.get_result(block=True, timeout=PATIENCE)


class RedisLikeBackend(ResultBackend):
    """A backend that gets results in a way of its own, as Dramatiq's for Redis does."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def _store(self, key, value, ttl):
        self.values[key] = value

    def get_result(self, message, *, block=False, timeout=None):
        try:
            return self.unwrap_result(self.values[self.build_message_key(message)])
        except KeyError:
            raise dramalite.ResultMissing(message) from None


def test_a_backend_may_get_results_in_its_own_way(make_stub_broker, worker):
    broker = make_stub_broker(middleware=[Results(backend=RedisLikeBackend())])
    work = storing(lambda number: number)
    members = dramalite.group([work.message(1), work.message(2)])
    before = members.completed_count
    members.run()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert (before, members.completed_count, members.completed) == (0, 2, True)
    assert asyncio.run(members.children[0].get_result_async(timeout=PATIENCE)) == 1


def test_a_step_whose_results_cannot_be_read_just_now_is_run_again(make_stub_broker, worker):
    class Shaky(DictBackend):
        looks = 0

        def _get(self, key):
            Shaky.looks += 1
            if Shaky.looks == 1:
                raise ConnectionError("away")
            return super()._get(key)

    broker = make_stub_broker(
        middleware=[*[m() for m in dramalite.default_middleware], dramalite.GroupCallbacks(), Results(backend=Shaky())]
    )
    got = []
    work = dramalite.actor(lambda number: number, actor_name="work")
    step = dramalite.actor(lambda results=None: got.append(results), actor_name="step", min_backoff=0)
    (dramalite.group([work.message(1), work.message(2)]) | step.message()).run()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert got == [[1, 2]]


class Zipping(dramalite.JSONEncoder):
    def encode(self, data):
        return zlib.compress(super().encode(data))

    def decode(self, data):
        return super().decode(zlib.decompress(data))


def test_waiting_goes_on_for_a_later_step_whose_id_an_encoder_hides(make_broker):
    dramalite.set_encoder(Zipping())
    broker = make_broker()
    work = storing(lambda *args: 42)
    pipe = (work.message() | work.message()).run()

    assert times_out(pipe.get_result)
    broker.drain()
    assert pipe.get_result() == 42


def test_a_worker_forgets_more_results_at_once_than_it_stores_meanwhile(make_file_broker, clock):
    broker = make_file_broker(clock=clock)
    backend = dramalite.SQLiteResultBackend(broker=broker)
    actor = dramalite.actor(print, actor_name="work")
    for _ in range(2500):
        backend.store_result(actor.message(), 1, 1000)
    clock.advance(2000)
    with dramalite.simulate(broker, start=datetime.datetime(2030, 1, 1)) as sim:
        sim.step()  # In which it looks after the file.
    with contextlib.closing(sqlite3.connect(broker.path)) as connection:
        left = connection.execute("SELECT count(*) FROM dramalite_results").fetchone()

    assert left == (0,)
