"""Little programs that run on Dramatiq and on dramalite alike: test_programs.py runs them.

A program is a function of the module (dramatiq or dramalite) and of a World: its broker, its
worker, and record(topic, value), which keeps plain data under a topic.  Order counts within a
topic only, so what runs at the same time goes to different ones.  What is left in the queues
and the dead letters are recorded by themselves.

Where dramalite differs on purpose, the row says why and what happens on either side; K and S
are the numbers of the known sharp edges of Dramatiq and of the additions to it.
"""

from __future__ import annotations

import datetime
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Program(NamedTuple):
    run: Callable[[Any, Any], None]
    on_purpose: str  # Why dramalite differs, where it does.
    expected: dict[str, dict[str, list[Any]]]  # Then: what happens, by place.
    defect: str  # What is wrong with dramalite, where that is known.


PROGRAMS: dict[str, Program] = {}


def program(
    run=None,
    *,
    on_purpose="",
    dramatiq=None,
    dramalite=None,
    memory=None,
    file=None,
    defect="",
):
    """Add a program to the table.

    With `on_purpose`, `dramatiq` and `dramalite` are what happens there; `memory` and `file`
    go before `dramalite` where its two brokers differ from one another.
    """

    def add(run):
        expected = {}
        if on_purpose:
            places = [dramalite if place is None else place for place in (memory, file)]
            expected = dict(zip(("dramatiq", "memory", "file"), (dramatiq, *places), strict=True))
            assert None not in expected.values(), run.__name__
            assert places != [dramatiq, dramatiq], run.__name__
        assert run.__name__ not in PROGRAMS, run.__name__
        PROGRAMS[run.__name__] = Program(run, on_purpose, expected, defect)
        return run

    return add if run is None else add(run)


# What several programs use


def is_original(dramatiq):
    """Whether this is Dramatiq, which is waited for no longer than what it does not do takes to show."""
    return dramatiq.__name__ == "dramatiq"


def failing(dramatiq, world, *, times=10**9, error=None, name="work", **options):
    """An actor that records each call and fails the first `times` of them."""
    calls = []

    def work(*args):
        calls.append(args)
        world.record("calls", list(args))
        if len(calls) <= times:
            raise error or ValueError("no")
        return "done"

    return dramatiq.actor(work, actor_name=name, **options)


def noting(dramatiq, world, *, name="note", **options):
    """An actor that records its arguments under its name and returns their number."""

    def note(*args, **kwargs):
        world.record(name, [list(args), kwargs] if kwargs else list(args))
        return len(args)

    return dramatiq.actor(note, actor_name=name, **options)


PROCESS_HOOKS = [
    "before_process_message",
    "after_process_message",
    "after_skip_message",
    "before_ack",
    "after_ack",
    "before_nack",
    "after_nack",
]
ENQUEUE_HOOKS = ["before_enqueue", "after_enqueue"]


def hooks(dramatiq, names, action):
    """A middleware whose hooks of these names call `action(hook, message, *args, **kwargs)`."""

    def hook_named(name):
        def hook(self, broker, *args, **kwargs):
            action(name, *args, **kwargs)

        return hook

    return type("Hooks", (dramatiq.Middleware,), {name: hook_named(name) for name in names})()


def record_hooks(dramatiq, world, names=(), topic="hooks", **place):
    """Add a middleware that records which hooks of these names are called, and with what."""

    def action(name, message, *args, **kwargs):
        shown = [name, str(message), *args]
        shown += [f"{key}={value!r}" for key, value in kwargs.items() if value is not None]
        world.record(topic, shown)

    middleware = hooks(dramatiq, names or [*ENQUEUE_HOOKS, *PROCESS_HOOKS], action)
    world.broker.add_middleware(middleware, **place)
    return middleware


def current(dramatiq):
    """The message that is running."""
    return dramatiq.middleware.CurrentMessage.get_current_message()


def with_current_message(dramatiq, world):
    world.broker.add_middleware(dramatiq.middleware.CurrentMessage())


# Calls, order, arguments


@program
def messages_run_in_the_order_they_were_sent(dramatiq, world):
    note = noting(dramatiq, world)
    for number in range(7):
        note.send(number)
    world.work()


@program
def arguments_arrive_as_json_has_them(dramatiq, world):
    note = noting(dramatiq, world)
    note.send((1, (2, [3])), {"a": (None, True)}, "é\u2028😀", 2**70, -0.0, 1e-7)
    note.send(key={"nested": ("tuple",)}, ключ="значение")
    world.work()


@program
def send_returns_the_message_that_was_sent(dramatiq, world):
    note = noting(dramatiq, world, queue_name="other", priority=3, max_retries=5)
    message = note.send(1, two=2)
    world.record("message", message)
    world.record("type", type(message).__name__)
    world.record("id", isinstance(message.message_id, str) and len(message.message_id))
    world.work()


@program
def options_of_a_message_travel_with_it_and_those_of_its_actor_do_not(dramatiq, world):
    with_current_message(dramatiq, world)

    @dramatiq.actor(max_retries=7, time_limit=60_000)
    def work():
        world.record("options", dict(current(dramatiq).options))
        world.record("order", list(current(dramatiq).options))

    work.send_with_options(zeta=1, max_retries=2, alpha={"b": [1, None]}, queue="x")
    world.work()


@program
def an_actor_may_send_to_others_and_to_itself(dramatiq, world):
    note = noting(dramatiq, world)

    @dramatiq.actor
    def count(number):
        note.send(number)
        if number:
            count.send(number - 1)

    count.send(3)
    world.work()


@program
def actors_in_several_queues(dramatiq, world):
    actors = [noting(dramatiq, world, name=f"in_{q}", queue_name=q) for q in ("a", "b.c-d_1")]
    for actor in actors:
        world.record("sent", actor.send(1))
        actor.send(2)
    world.work()


@program
def a_worker_serves_only_the_queues_it_is_told(dramatiq, world):
    for queue in ("a", "b"):
        noting(dramatiq, world, name=f"in_{queue}", queue_name=queue).send()
    world.work(queues={"a"})
    world.record("waiting", world.waiting())
    world.work(queues=set())


@program
def a_direct_call_goes_around_everything(dramatiq, world):
    record_hooks(dramatiq, world)
    world.keep_results()
    work = failing(dramatiq, world, times=1, max_retries=5, store_results=True)
    world.record("first", world.attempt(work, 1))
    world.record("second", world.attempt(work, 2))


@program
def arguments_that_do_not_fit_are_an_error_of_the_run(dramatiq, world):
    @dramatiq.actor(max_retries=1, min_backoff=0)
    def work(one):
        world.record("calls", one)

    world.record("sent", world.attempt(work.send, 1, 2, three=3))
    world.work()


@program
def every_base_exception_is_a_failure(dramatiq, world):
    for error in (SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("bare")):
        name = f"raises_{type(error).__name__}"
        failing(dramatiq, world, error=error, name=name, max_retries=1, min_backoff=0).send(name)
        world.work()


@program
def what_json_cannot_hold_is_refused_by_send(dramatiq, world):
    note = noting(dramatiq, world)
    for value in ({1}, b"bytes", object(), datetime.datetime(2020, 1, 1), 1j):
        world.record("positional", world.attempt(note.send, value))
        world.record("keyword", world.attempt(note.send, key=[value]))
        world.record("option", world.attempt(note.send_with_options, tag=value))
    world.record("waiting", world.waiting())
    world.work()


@program(
    on_purpose="JSON would change these in silence, and other readers refuse NaN",
    dramatiq={
        "sent": ["nan()", "infinity()", "a number", "none"],
        "note": [[["nan"]], [["inf"]], [[{"1": 2}]], [[{"null": 2}]]],
    },
    dramalite={"sent": ["raises ValueError"] * 2 + ["raises TypeError"] * 2},
)
def what_json_would_change_is_refused(dramatiq, world):
    @dramatiq.actor
    def note(value):
        world.record("note", [[repr(value) if isinstance(value, float) else value]])

    values = {
        "nan()": float("nan"),
        "infinity()": float("inf"),
        "a number": {1: 2},
        "none": {None: 2},
    }
    for name, value in values.items():
        sent = world.attempt(note.send, value)
        world.record("sent", sent if isinstance(sent, str) else name)
    world.work()


@program
def a_value_that_nobody_takes_is_dropped(dramatiq, world):
    dramatiq.actor(lambda: {1, 2}, actor_name="work").send()
    world.work()
    world.record("waiting", world.waiting())


# Retries


@program
def there_is_one_attempt_more_than_retries(dramatiq, world):
    for max_retries in (0, 1, 3):
        name = f"retries_{max_retries}"
        failing(dramatiq, world, name=name, max_retries=max_retries, min_backoff=0).send(name)
        world.work()


@program
def there_are_twenty_retries_by_default(dramatiq, world):
    failing(dramatiq, world, min_backoff=0).send()
    world.work()


@program
def a_message_that_succeeds_at_last_leaves_no_dead_letter(dramatiq, world):
    failing(dramatiq, world, times=2, min_backoff=0).send("x")
    world.work()


@program
def no_backoff_at_most_means_no_backoff(dramatiq, world):
    failing(dramatiq, world, times=2, max_backoff=0).send("x")
    world.work()


@program
def what_retries_write_into_the_message(dramatiq, world):
    with_current_message(dramatiq, world)
    times = []

    @dramatiq.actor(max_retries=3, min_backoff=0)
    def work():
        message = current(dramatiq)
        world.record("options", dict(message.options))
        times.append(message.options.get("requeue_timestamp", message.message_timestamp))
        raise LookupError(f"no {len(times)}")

    work.send_with_options(tag="mine")
    world.work()
    world.record("times rise", times == sorted(times))


@program
def a_message_keeps_its_id_and_its_time_through_retries(dramatiq, world):
    with_current_message(dramatiq, world)
    seen = set()

    @dramatiq.actor(max_retries=2, min_backoff=0)
    def work():
        seen.add((current(dramatiq).message_id, current(dramatiq).message_timestamp))
        raise ValueError("no")

    sent = work.send()
    world.work()
    world.record("same", seen == {(sent.message_id, sent.message_timestamp)})


@program
def message_then_actor_then_middleware_decide_how_often(dramatiq, world):
    world.use([dramatiq.middleware.Retries(max_retries=1, min_backoff=1, max_backoff=1)])
    failing(dramatiq, world, name="middleware").send("middleware")
    failing(dramatiq, world, name="actor", max_retries=2).send("actor")
    both = failing(dramatiq, world, name="message", max_retries=2)
    both.send_with_options(args=("message: 3",), max_retries=3)
    both.send_with_options(args=("message: 0",), max_retries=0)
    world.work()
    world.sort("calls")


@program
def max_retries_of_none_is_for_ever(dramatiq, world):
    work = failing(dramatiq, world, times=25, max_retries=2, min_backoff=0)
    work.send_with_options(args=("on",), max_retries=None)
    world.work()


@program
def a_retry_may_be_asked_for(dramatiq, world):
    error = dramatiq.Retry("later")
    failing(dramatiq, world, error=error, max_retries=2, min_backoff=0).send()
    world.work()


@program
def a_retry_that_is_asked_for_may_bring_its_delay(dramatiq, world):
    delays = []
    watch = hooks(dramatiq, ["before_enqueue"], lambda _hook, _message, delay: delays.append(delay))
    world.broker.add_middleware(watch)
    failing(
        dramatiq, world, error=dramatiq.Retry(delay=3), max_retries=2, max_backoff=1
    ).send()
    world.work()
    world.record("delays", [delay for delay in delays if delay is not None])


@program
def retries_and_their_texts(dramatiq, world):
    for error in (dramatiq.Retry(), dramatiq.Retry("text"), dramatiq.Retry("text", delay=5)):
        world.record("str", str(error))
        world.record("attributes", [error.message, error.delay])


@program
def backoff_doubles_with_jitter_up_to_its_limit(dramatiq, world):
    cases = [
        (0, 1_000_000, {"min_backoff": 1_000_000}),
        (3, 8_000_000, {"min_backoff": 1_000_000}),
        (0, 15_000, {}),
        (2, 60_000, {}),
        (5, 50_000, {"min_backoff": 10_000, "max_backoff": 100_000}),
        (40, 302_400_000, {"min_backoff": 10_000}),
    ]
    for number, (retries, shortest, options) in enumerate(cases):
        enqueued = threading.Event()
        delays = []

        def note(_hook, _message, delay, delays=delays, enqueued=enqueued):
            if delay is not None:
                delays.append(delay)
                enqueued.set()

        watch = hooks(dramatiq, ["after_enqueue"], note)
        world.broker.add_middleware(watch)
        work = failing(dramatiq, world, name=f"work_{number}", max_retries=100, **options)
        work.send_with_options(retries=retries)
        world.work(until=enqueued)
        world.broker.flush_all()
        world.record("in range", [shortest <= delay <= 2 * shortest for delay in delays[:1]])


@program
def exceptions_in_throws_are_final(dramatiq, world):
    class Mine(LookupError):
        pass

    for number, throws in enumerate((LookupError, (KeyError, LookupError), Mine)):
        name = f"throws_{number}"
        failing(dramatiq, world, error=Mine("no"), name=name, throws=throws).send(name)
        world.work()


@program
def exceptions_outside_throws_are_not(dramatiq, world):
    failing(
        dramatiq, world, throws=(KeyError, OSError), max_retries=1, min_backoff=0
    ).send()
    world.work()


@program(
    on_purpose="K37: a list in throws ends the worker's thread and loses the message",
    dramatiq={"calls": [[]]},
    dramalite={"calls": [[]], "dead letters": [("work()", {})]},
)
def throws_may_be_a_list(dramatiq, world):
    failing(dramatiq, world, throws=[KeyError, ValueError]).send()
    world.work()


@program
def retry_when_decides_alone(dramatiq, world):
    def should_retry(retries_so_far, exception):
        world.record("asked", [retries_so_far, exception])
        return retries_so_far < 3

    failing(dramatiq, world, retry_when=should_retry, max_retries=0, min_backoff=0).send()
    world.work()


@program
def retry_when_may_be_the_middlewares(dramatiq, world):
    retries = dramatiq.middleware.Retries(
        retry_when=lambda retries_so_far, _exception: retries_so_far < 1, min_backoff=1
    )
    world.use([retries])
    failing(dramatiq, world, name="middleware").send("middleware")
    mine = failing(dramatiq, world, name="actor", retry_when=lambda count, _error: count < 2)
    mine.send("actor")
    world.work()
    world.sort("calls")


@program(
    on_purpose="K9: an error in the decision loses the message",
    dramatiq={"calls": [[]]},
    dramalite={
        "calls": [[]],
        "dead letters": [
            ("work()", {"retries": 1, "traceback": "ValueError: no", "requeue_timestamp": "time"})
        ],
    },
)
def retry_when_may_fail(dramatiq, world):
    def should_retry(retries_so_far, exception):
        raise RuntimeError("no idea")

    failing(dramatiq, world, retry_when=should_retry).send()
    world.work()


@program
def on_retry_exhausted_is_told_once_and_of_what(dramatiq, world):
    noting(dramatiq, world, name="exhausted")
    work = failing(
        dramatiq, world, max_retries=2, min_backoff=0, on_retry_exhausted="exhausted"
    )
    work.send_with_options(args=("x",), kwargs={}, tag=1)
    world.work()


@program
def on_retry_exhausted_of_the_message_goes_before_the_actors(dramatiq, world):
    noting(dramatiq, world, name="of_the_actor")
    noting(dramatiq, world, name="of_the_message")
    work = failing(dramatiq, world, max_retries=0, on_retry_exhausted="of_the_actor")
    work.send_with_options(on_retry_exhausted="of_the_message")
    world.work()


@program
def on_retry_exhausted_is_not_told_of_success_or_throws(dramatiq, world):
    noting(dramatiq, world, name="exhausted")
    failing(
        dramatiq, world, name="good", times=1, min_backoff=0, on_retry_exhausted="exhausted"
    ).send()
    failing(
        dramatiq, world, name="thrown", throws=ValueError, on_retry_exhausted="exhausted"
    ).send()
    world.work()


@program
def on_retry_exhausted_is_told_when_retry_when_says_no(dramatiq, world):
    noting(dramatiq, world, name="exhausted")
    failing(
        dramatiq, world, retry_when=lambda *_: False, on_retry_exhausted="exhausted"
    ).send()
    world.work()


@program
def on_retry_exhausted_may_be_unknown(dramatiq, world):
    failing(dramatiq, world, max_retries=0, on_retry_exhausted="nobody").send()
    world.work()


@program
def without_retries_a_failing_message_is_gone(dramatiq, world):
    world.use([])
    failing(dramatiq, world).send("x")
    world.work()


@program(
    on_purpose="0 is 0 at every level, as it is for an actor and for a message",
    dramatiq={"immediate": [False]},
    dramalite={"immediate": [True]},
)
def no_backoff_for_all_actors(dramatiq, world):
    world.use([dramatiq.middleware.Retries(min_backoff=0, max_retries=1)])
    enqueued = threading.Event()

    def note(_hook, _message, delay):
        if delay is not None:
            world.record("immediate", delay == 0)
            enqueued.set()

    world.broker.add_middleware(hooks(dramatiq, ["after_enqueue"], note))
    failing(dramatiq, world).send()
    world.work(until=enqueued)
    world.broker.flush_all()
    world.forget("calls")


# Pipelines


def steps(dramatiq, world, *names, **options):
    """Actors that record their arguments and return their name and the arguments."""

    def step(name):
        def work(*args):
            world.record("steps", [name, *args])
            return f"{name} done"

        return dramatiq.actor(work, actor_name=name, **options)

    return [step(name) for name in names]


@program
def each_step_gets_the_result_before_it(dramatiq, world):
    a, b, c = steps(dramatiq, world, "a", "b", "c")
    (a.message(1, 2) | b.message() | c.message("mine")).run()
    world.work()


@program
def a_result_of_none_is_passed_on(dramatiq, world):
    nothing = dramatiq.actor(lambda: None, actor_name="nothing")
    (a,) = steps(dramatiq, world, "a")
    (nothing.message() | a.message("x")).run()
    world.work()


@program
def a_step_may_ignore_the_result_before_it(dramatiq, world):
    a, b, c = steps(dramatiq, world, "a", "b", "c")
    (a.message(1) | b.message_with_options(args=(2,), pipe_ignore=True) | c.message(3)).run()
    world.work()


@program(
    on_purpose="K16: an actor's pipe_ignore is about what it gets, as the guide says",
    dramatiq={"steps": [["a", 1], ["b", 2, "a done"], ["c", 3]]},
    dramalite={"steps": [["a", 1], ["b", 2], ["c", 3, "b done"]]},
)
def an_actor_may_ignore_results(dramatiq, world):
    a, c = steps(dramatiq, world, "a", "c")
    (b,) = steps(dramatiq, world, "b", pipe_ignore=True)
    (a.message(1) | b.message(2) | c.message(3)).run()
    world.work()


@program
def a_failing_step_ends_the_chain(dramatiq, world):
    a, c = steps(dramatiq, world, "a", "c")
    work = failing(dramatiq, world, max_retries=1, min_backoff=0)
    (a.message() | work.message() | c.message()).run()
    world.work()


@program
def a_step_that_succeeds_at_last_goes_on(dramatiq, world):
    (a,) = steps(dramatiq, world, "a")
    work = failing(dramatiq, world, times=2, min_backoff=0)
    (work.message("x") | a.message()).run()
    world.work()


@program
def a_skipped_step_ends_the_chain(dramatiq, world):
    (a,) = steps(dramatiq, world, "a")
    work = failing(dramatiq, world, error=dramatiq.middleware.SkipMessage("skip"))
    (work.message("x") | a.message()).run()
    world.work()


@program
def a_later_step_may_be_delayed(dramatiq, world):
    delays = []
    watch = hooks(
        dramatiq, ["before_enqueue"], lambda _hook, m, delay: delays.append([m.actor_name, delay])
    )
    world.broker.add_middleware(watch)
    a, b = steps(dramatiq, world, "a", "b")
    (a.message() | b.message_with_options(delay=4)).run()
    world.work()
    world.record("delays", delays[:2])


@program
def a_pipelines_delay_is_the_longer_one(dramatiq, world):
    delays = []
    watch = hooks(
        dramatiq, ["before_enqueue"], lambda _hook, _message, delay: delays.append(delay)
    )
    world.broker.add_middleware(watch)
    a, b = steps(dramatiq, world, "a", "b")
    for own, given in ((None, None), (0, 0), (7, None), (None, 8), (9, 3), (3, 9)):
        options = {} if own is None else {"delay": own}
        (a.message_with_options(**options) | b.message()).run(delay=given)
        world.record("delays", delays.pop())
    world.broker.flush_all()


@program
def pipelines_are_joined_into_one(dramatiq, world):
    a, b, c, d = steps(dramatiq, world, "a", "b", "c", "d")
    inner = a.message() | b.message()
    pipe = dramatiq.pipeline([inner, c.message()]) | (d.message() | a.message())
    world.record("length", len(pipe))
    world.record("str", str(pipe))
    pipe.run()
    world.work()


@program
def a_pipeline_takes_any_iterable(dramatiq, world):
    (a,) = steps(dramatiq, world, "a")
    dramatiq.pipeline(a.message(number) for number in range(3)).run()
    world.work()


@program
def a_pipeline_copies_its_messages_and_keeps_their_ids(dramatiq, world):
    a, b = steps(dramatiq, world, "a", "b")
    first, second = a.message(1), b.message(2)
    pipe = first | second
    world.record("original", first)
    world.record("messages", [*pipe.messages])
    ids = [message.message_id for message in pipe.messages]
    world.record("ids", ids == [first.message_id, second.message_id])
    world.record("target", pipe.messages[0].options["pipe_target"] == pipe.messages[1].asdict())
    world.record("type", type(pipe.messages).__name__)


@program
def run_returns_what_it_was_called_on(dramatiq, world):
    a, b = steps(dramatiq, world, "a", "b")
    pipe, group = a.message() | b.message(), dramatiq.group([a.message()])
    world.record("itself", [pipe.run() is pipe, group.run() is group])
    world.work()


@program
def results_of_a_pipeline(dramatiq, world):
    world.keep_results()
    a, b = steps(dramatiq, world, "a", "b", store_results=True)
    first = a.message()
    pipe = first | b.message()
    pipe.run()
    world.record("before", [pipe.completed, pipe.completed_count, world.attempt(pipe.get_result)])
    world.work()
    world.record("after", [pipe.completed, pipe.completed_count, pipe.get_result(block=True)])
    world.record("all", list(pipe.get_results(block=True, timeout=5000)))
    world.record("original", first.get_result())


@program
def a_pipelines_count_stops_at_the_first_missing_result(dramatiq, world):
    world.keep_results()
    a, b = steps(dramatiq, world, "a", "b", store_results=True)
    go = threading.Event()
    waits = dramatiq.actor(lambda _: go.wait(100), actor_name="waits", store_results=True)
    reached = threading.Event()
    world.broker.add_middleware(
        hooks(
            dramatiq,
            ["before_process_message"],
            lambda _hook, message: message.actor_name == "waits" and reached.set(),
        )
    )
    pipe = a.message() | waits.message() | b.message()
    with world.started():
        pipe.run()
        reached.wait(100)
        world.record("half way", [pipe.completed, pipe.completed_count, len(pipe)])
        go.set()
        world.join()
    world.record("after", [pipe.completed, pipe.completed_count])


@program
def a_pipeline_with_a_failed_step(dramatiq, world):
    world.keep_results()
    a, c = steps(dramatiq, world, "a", "c", store_results=True)
    work = failing(dramatiq, world, max_retries=0, store_results=True)
    pipe = a.message() | work.message() | c.message()
    pipe.run()
    world.work()
    results = pipe.get_results()
    world.record("first", next(results))
    world.record("second", world.attempt(next, results, text=True))
    world.record("completed_count", world.attempt(lambda: pipe.completed_count, text=True))
    failed = a.message() | work.message()
    failed.run()
    world.work()
    world.record("completed", world.attempt(lambda: failed.completed, text=True))
    world.record("result", world.attempt(failed.get_result, text=True))


@program(
    on_purpose="K17: the failure of an earlier step can be seen at the end of the chain",
    dramatiq={
        "calls": [[]],
        "result": ["raises ResultTimeout"],
        "dead letters": [
            ("work()", {"retries": 1, "traceback": "ValueError: no", "requeue_timestamp": "time"})
        ],
    },
    memory={
        "calls": [[]],
        "result": ["raises ResultTimeout"],
        "dead letters": [
            ("work()", {"retries": 1, "traceback": "ValueError: no", "requeue_timestamp": "time"})
        ],
    },
    file={
        "calls": [[]],
        "result": ["raises ResultFailure: actor raised ValueError: no"],
        "dead letters": [
            ("work()", {"retries": 1, "traceback": "ValueError: no", "requeue_timestamp": "time"})
        ],
    },
)
def the_result_of_a_pipeline_that_failed_early(dramatiq, world):
    world.keep_results()
    (c,) = steps(dramatiq, world, "c", store_results=True)
    work = failing(dramatiq, world, max_retries=0, store_results=True)
    pipe = work.message() | c.message()
    pipe.run()
    world.work()
    result = world.attempt(pipe.get_result, block=True, timeout=20, text=True)
    world.record("result", result.split(":")[0] if "Timeout" in result else result)
    world.hide_options("pipe_target")


@program(
    on_purpose="an empty pipeline is a pipeline that is done",
    dramatiq={
        "length": [0],
        "run": ["raises IndexError"],
        "completed": ["raises IndexError"],
        "count": ["raises UnboundLocalError"],
        "results": [[]],
        "result": ["raises IndexError"],
    },
    dramalite={
        "length": [0],
        "run": ["returns"],
        "completed": [True],
        "count": [0],
        "results": [[]],
        "result": ["raises ValueError"],
    },
)
def an_empty_pipeline(dramatiq, world):
    world.keep_results()
    pipe = dramatiq.pipeline([])
    world.record("length", len(pipe))
    ran = world.attempt(pipe.run)
    world.record("run", ran if isinstance(ran, str) else "returns")
    world.record("completed", world.attempt(lambda: pipe.completed))
    world.record("count", world.attempt(lambda: pipe.completed_count))
    world.record("results", list(pipe.get_results()))
    world.record("result", world.attempt(pipe.get_result))


@program(
    on_purpose="K23: a group may be a step of a pipeline",
    dramatiq={"made": ["raises AttributeError"]},
    dramalite={
        "made": ["returns"],
        "b": [["a done"]],
        "c": [["a done"]],
        "steps": [["a"], ["d", [1, 1]]],
    },
)
def a_group_in_a_pipeline(dramatiq, world):
    world.add_group_callbacks()
    world.keep_results()
    a, d = steps(dramatiq, world, "a", "d")
    b, c = noting(dramatiq, world, name="b"), noting(dramatiq, world, name="c")

    def make():
        return a.message() | dramatiq.group([b.message(), c.message()]) | d.message()

    pipe = world.attempt(make)
    world.record("made", pipe if isinstance(pipe, str) else "returns")
    if not isinstance(pipe, str):
        pipe.run()
        world.work()


@program(
    on_purpose="K11: a result that can't be kept is a failure, and not the silent end of the chain",
    dramatiq={},
    dramalite={"dead letters": [("odd()", {})]},
)
def a_step_returns_what_json_cannot_hold(dramatiq, world):
    (a,) = steps(dramatiq, world, "a")
    odd = dramatiq.actor(lambda: {1, 2}, actor_name="odd")
    (odd.message() | a.message()).run()
    world.work()
    world.hide_options("pipe_target")


@program(
    on_purpose="S3: a step that can't take the result does without it",
    dramatiq={
        "first": ["x"],
        "dead letters": [
            (
                "second('y', 'first done')",
                {
                    "max_retries": 0,
                    "retries": 1,
                    "traceback": "TypeError",
                    "requeue_timestamp": "time",
                },
            )
        ],
    },
    dramalite={"first": ["x"], "second": ["y"]},
)
def a_step_has_no_room_for_the_result(dramatiq, world):
    @dramatiq.actor
    def first(value):
        world.record("first", value)
        return "first done"

    @dramatiq.actor
    def second(value):
        world.record("second", value)

    (first.message("x") | second.message_with_options(args=("y",), max_retries=0)).run()
    world.work()
    world.cut_tracebacks()


@program(
    on_purpose="K24: a pipeline asks its own broker for its results",
    dramatiq={
        "completed": ["raises RuntimeError"],
        "count": ["raises RuntimeError"],
        "result": ["a done"],
    },
    dramalite={"completed": [True], "count": [1], "result": ["a done"]},
)
def a_pipeline_of_another_broker(dramatiq, world):
    world.keep_results()
    (a,) = steps(dramatiq, world, "a", store_results=True)
    pipe = dramatiq.pipeline([a.message()], broker=world.broker)
    pipe.run()
    world.work()
    world.forget("steps")
    world.set_bystander()
    world.record("completed", world.attempt(lambda: pipe.completed))
    world.record("count", world.attempt(lambda: pipe.completed_count))
    world.record("result", pipe.get_result())


# Groups


def squares(dramatiq, world, **options):
    """An actor that squares a number and stores the result."""
    return dramatiq.actor(lambda x: x * x, actor_name="square", store_results=True, **options)


@program
def results_of_a_group_come_in_the_order_of_its_members(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    group = dramatiq.group(square.message(number) for number in range(4))
    world.record("length", len(group))
    world.record("str", str(group))
    group.run()
    world.work(threads=2)
    world.record("results", list(group.get_results()))
    world.record("completed", [group.completed, group.completed_count])


@program
def waiting_for_a_group(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    group = dramatiq.group([square.message(2), square.message(3)])
    with world.started():
        group.run()
        world.record("wait", group.wait(timeout=5000))
        world.record("results", list(group.get_results(block=True)))
        world.join()


@program
def waiting_for_a_group_that_nobody_runs(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    group = dramatiq.group([square.message(2)]).run()
    world.record("wait", world.attempt(group.wait, timeout=10))
    world.record("results", world.attempt(lambda: list(group.get_results())))
    world.record("completed", [group.completed, group.completed_count])
    world.work()


@program
def groups_and_pipelines_in_a_group(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    inner = dramatiq.group([square.message(2), square.message(3)])
    pipe = square.message(4) | square.message_with_options(args=(5,), pipe_ignore=True)
    group = dramatiq.group([square.message(1), inner, pipe])
    world.record("length", len(group))
    world.record("str", str(group))
    group.run()
    world.work()
    world.record("results", list(group.get_results()))


@program
def completed_members_are_counted_in_any_order(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    group = dramatiq.group([square.message(1), square.message(2), square.message(3)])
    for number in (2, 0, 1):
        world.record("count", [group.completed_count, group.completed])
        world.broker.enqueue(group.children[number])
        world.work()
    world.record("count", [group.completed_count, group.completed])


@program(
    on_purpose="K26: a group in a group counts when it is done",
    dramatiq={"before": [[2, True]], "after": [[2, True]]},
    dramalite={"before": [[0, False]], "after": [[2, True]]},
)
def completed_groups_in_a_group(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    inner = [dramatiq.group([square.message(number)]) for number in (1, 2)]
    group = dramatiq.group(inner).run()
    world.record("before", [group.completed_count, group.completed])
    world.work()
    world.record("after", [group.completed_count, group.completed])


@program
def an_empty_group(dramatiq, world):
    world.keep_results()
    group = dramatiq.group([]).run()
    world.record("empty", [len(group), str(group), group.completed, group.completed_count])
    world.record("results", [list(group.get_results()), group.wait()])


@program
def a_group_with_a_failed_member(dramatiq, world):
    world.keep_results()
    square = squares(dramatiq, world)
    work = failing(dramatiq, world, max_retries=0, store_results=True)
    group = dramatiq.group([square.message(3), work.message(), square.message(4)]).run()
    world.work()
    results = group.get_results()
    world.record("first", next(results))
    world.record("second", world.attempt(next, results, text=True))
    world.record("wait", world.attempt(group.wait, timeout=50, text=True))
    world.record("count", world.attempt(lambda: group.completed_count, text=True))


@program
def a_groups_callback_comes_when_all_have_succeeded(dramatiq, world):
    world.add_group_callbacks()
    a, b = steps(dramatiq, world, "a", "b")
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(1), b.message(2), a.message(3)])
    world.record("returns", group.add_completion_callback(done.message("first")))
    group.add_completion_callback(done.message_with_options(args=("second",), tag="x"))
    group.run()
    world.work()


@program
def a_groups_callback_waits_for_the_last_member(dramatiq, world):
    world.add_group_callbacks()
    order = []

    @dramatiq.actor
    def member(number):
        order.append("member")

    @dramatiq.actor
    def done():
        order.append("done")

    group = dramatiq.group([member.message(number) for number in range(5)])
    group.add_completion_callback(done.message())
    group.run()
    world.work(threads=3)
    world.record("order", order)


@program
def a_groups_members_know_what_comes_after(dramatiq, world):
    world.add_group_callbacks()
    a, b = steps(dramatiq, world, "a", "b")
    record = []
    watch = hooks(dramatiq, ["before_enqueue"], lambda _hook, m, _delay: record.append(m))
    world.broker.add_middleware(watch)
    group = dramatiq.group([a.message(1), a.message(2) | b.message()])
    group.add_completion_callback(b.message("callback"))
    group.run()
    world.record("enqueued", record)
    world.record("children", [str(child) for child in group.children])
    world.record("untouched", group.children[0])
    world.broker.flush_all()


@program
def a_groups_callback_after_pipelines(dramatiq, world):
    world.add_group_callbacks()
    a, b = steps(dramatiq, world, "a", "b")
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(1) | b.message(), a.message(2)])
    group.add_completion_callback(done.message())
    group.run()
    world.work()
    world.sort("steps")


@program
def a_groups_callback_does_not_come_if_a_member_failed(dramatiq, world):
    world.add_group_callbacks()
    (a,) = steps(dramatiq, world, "a")
    work = failing(dramatiq, world, max_retries=1, min_backoff=0)
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(1), work.message(), a.message(2)])
    group.add_completion_callback(done.message())
    group.run()
    world.work()
    world.hide_options("group_completion_uuid", "group_completion_callbacks")


@program
def a_groups_callback_comes_after_a_retry(dramatiq, world):
    world.add_group_callbacks()
    (a,) = steps(dramatiq, world, "a")
    work = failing(dramatiq, world, times=2, min_backoff=0)
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(1), work.message()])
    group.add_completion_callback(done.message())
    group.run()
    world.work()


@program
def a_groups_callback_does_not_come_if_a_member_was_skipped(dramatiq, world):
    world.add_group_callbacks()
    (a,) = steps(dramatiq, world, "a")
    work = failing(dramatiq, world, error=dramatiq.middleware.SkipMessage("skip"))
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(1), work.message()])
    group.add_completion_callback(done.message())
    group.run()
    world.work()


@program
def a_group_with_a_callback_may_run_again(dramatiq, world):
    world.add_group_callbacks()
    (a,) = steps(dramatiq, world, "a")
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(1), a.message(2)])
    group.add_completion_callback(done.message())
    for _ in range(2):
        group.run()
        world.work()


@program(
    on_purpose="S1: SQLiteBroker counts groups by itself",
    dramatiq={"run": ["raises RuntimeError"], "waiting": [0]},
    memory={"run": ["raises RuntimeError"], "waiting": [0]},
    file={"run": ["returns"], "waiting": [2], "steps": [["a"], ["a"]], "done": [[]]},
)
def a_group_with_a_callback_needs_a_middleware(dramatiq, world):
    (a,) = steps(dramatiq, world, "a")
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([a.message(), a.message()])
    group.add_completion_callback(done.message())
    ran = world.attempt(group.run)
    world.record("run", ran if isinstance(ran, str) else "returns")
    world.record("waiting", world.waiting())
    world.work()


@program(
    on_purpose="groups in groups may have callbacks",
    dramatiq={"run": ["raises NotImplementedError"]},
    dramalite={"run": ["returns"], "steps": [["a", 1], ["a", 2]], "done": [[]]},
)
def a_group_in_a_group_with_a_callback(dramatiq, world):
    world.add_group_callbacks()
    (a,) = steps(dramatiq, world, "a")
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([dramatiq.group([a.message(1), a.message(2)])])
    group.add_completion_callback(done.message())
    ran = world.attempt(group.run)
    world.record("run", ran if isinstance(ran, str) else "returns")
    world.work()


@program(
    on_purpose="all of nothing has succeeded",
    dramatiq={"run": ["raises AssertionError"]},
    dramalite={"run": ["returns"], "done": [[]]},
)
def an_empty_group_with_a_callback(dramatiq, world):
    world.add_group_callbacks()
    done = noting(dramatiq, world, name="done")
    group = dramatiq.group([])
    group.add_completion_callback(done.message())
    ran = world.attempt(group.run)
    world.record("run", ran if isinstance(ran, str) else "returns")
    world.work()


@program
def a_groups_delay_is_for_all_members(dramatiq, world):
    delays = []
    watch = hooks(
        dramatiq, ["before_enqueue"], lambda _hook, m, delay: delays.append([str(m), delay])
    )
    world.broker.add_middleware(watch)
    a, b = steps(dramatiq, world, "a", "b")
    inner = dramatiq.group([a.message(2)])
    dramatiq.group([a.message(1), inner, a.message(3) | b.message()]).run(delay=6)
    world.record("delays", list(delays))
    world.work()
    world.sort("steps")


@program(
    on_purpose="K25: a member's own delay counts",
    dramatiq={"delays": [[None, None]]},
    dramalite={"delays": [[None, 5]]},
)
def a_groups_member_may_be_delayed(dramatiq, world):
    delays = []
    watch = hooks(dramatiq, ["before_enqueue"], lambda _hook, _m, delay: delays.append(delay))
    world.broker.add_middleware(watch)
    (a,) = steps(dramatiq, world, "a")
    dramatiq.group([a.message(1), a.message_with_options(args=(2,), delay=5)]).run()
    world.record("delays", delays)
    world.broker.flush_all()


@program(
    on_purpose="K23: a group may be a step of a pipeline",
    dramatiq={"made": ["raises TypeError"]},
    dramalite={"made": ["pipeline([group([a(1)]), a(2)])"]},
)
def a_group_and_a_pipe_sign(dramatiq, world):
    (a,) = steps(dramatiq, world, "a")
    made = world.attempt(lambda: dramatiq.group([a.message(1)]) | a.message(2))
    world.record("made", made if isinstance(made, str) else str(made))


# Callbacks


@program
def on_success_gets_the_message_and_the_result(dramatiq, world):
    noting(dramatiq, world, name="done")
    (a,) = steps(dramatiq, world, "a", on_success="done")
    a.send_with_options(args=(1, [2]), tag={"x": None})
    world.work()


@program
def on_success_gets_a_result_of_none(dramatiq, world):
    noting(dramatiq, world, name="done")
    dramatiq.actor(lambda: None, actor_name="nothing", on_success="done").send()
    world.work()


@program
def on_failure_comes_for_each_attempt(dramatiq, world):
    noting(dramatiq, world, name="failed")
    failing(dramatiq, world, max_retries=2, min_backoff=0, on_failure="failed").send("x")
    world.work()


@program
def callbacks_of_a_message_go_before_its_actors(dramatiq, world):
    for name in ("of_the_actor", "of_the_message"):
        noting(dramatiq, world, name=name)
    (a,) = steps(dramatiq, world, "a", on_success="of_the_actor")
    world.record("message", a.message_with_options(on_success="of_the_message"))
    a.send_with_options(on_success="of_the_message")
    work = failing(dramatiq, world, max_retries=0, on_failure="of_the_actor")
    work.send_with_options(on_failure="of_the_message", on_success=None)
    world.work()
    world.sort("of_the_message")


@program
def callbacks_may_be_actors_and_are_kept_by_name(dramatiq, world):
    done = noting(dramatiq, world, name="done")
    (a,) = steps(dramatiq, world, "a")
    message = a.message_with_options(on_success=done, on_failure="failed")
    world.record("options", message.options)
    world.record("none", a.message_with_options(on_success=None).options)
    world.record("other", world.attempt(a.message_with_options, on_success=5))
    world.record("function", world.attempt(a.send_with_options, on_failure=len))
    world.broker.enqueue(message)
    world.work()


@program(
    on_purpose="K3: callbacks may be actors of either kind at all levels",
    dramatiq={
        "generic": ["raises TypeError"],
        "exhausted": ["raises TypeError"],
        "at the actor": [["x", None]],
    },
    dramalite={
        "generic": ["Done"],
        "exhausted": ["done"],
        "at the actor": [["x", None], ["done", "b done"]],
    },
)
def callbacks_may_be_actors_everywhere(dramatiq, world):
    called = []

    @dramatiq.actor
    def done(data, result):
        called.append(["done", result])

    class Done(dramatiq.GenericActor):
        def perform(self, data, result):
            pass

    (a,) = steps(dramatiq, world, "a")
    made = world.attempt(a.message_with_options, on_success=Done)
    world.record("generic", made if isinstance(made, str) else made.options["on_success"])
    sent = world.attempt(a.send_with_options, on_retry_exhausted=done)
    world.record("exhausted", sent if isinstance(sent, str) else sent.options["on_retry_exhausted"])
    (b,) = steps(dramatiq, world, "b", on_success=done)
    b.send()
    called.append(["x", None])
    world.work()
    world.forget("steps")
    for call in called:
        world.record("at the actor", call)


@program
def on_failure_comes_for_throws_too(dramatiq, world):
    noting(dramatiq, world, name="failed")
    failing(dramatiq, world, throws=ValueError, on_failure="failed").send()
    world.work()


@program
def no_callback_for_what_did_not_run(dramatiq, world):
    world.use_stub_broker()  # In a file, a message for an unknown actor waits.
    noting(dramatiq, world, name="called")
    callbacks = {"on_failure": "called", "on_success": "called", "on_retry_exhausted": "called"}
    skip = dramatiq.middleware.SkipMessage("skip")
    failing(dramatiq, world, name="skipped", error=skip, **callbacks).send("skipped")
    aged = failing(dramatiq, world, name="aged", max_age=1000, **callbacks)
    world.broker.enqueue(world.old(aged.message("aged"), 5000))
    unknown = aged.message("unknown").copy(actor_name="nobody", options=callbacks)
    world.broker.enqueue(unknown)
    world.work()


@program
def a_callback_may_be_unknown(dramatiq, world):
    (a,) = steps(dramatiq, world, "a", on_success="nobody")
    a.send()
    failing(dramatiq, world, max_retries=0, on_failure="nobody").send()
    world.work()


@program(
    on_purpose="K11: a result that can't be kept is a failure, and not a callback that never comes",
    dramatiq={},
    dramalite={"dead letters": [("odd()", {})]},
)
def a_callback_for_what_json_cannot_hold(dramatiq, world):
    noting(dramatiq, world, name="done")
    dramatiq.actor(lambda: {1, 2}, actor_name="odd", on_success="done").send()
    world.work()


@program(
    on_purpose="S2: a callback may read the message's fields as attributes",
    dramatiq={
        "dict": [True],
        "name": ["raises AttributeError"],
        "args": [[1]],
        "keys": [
            [
                "queue_name",
                "actor_name",
                "args",
                "kwargs",
                "options",
                "message_id",
                "message_timestamp",
            ]
        ],
    },
    dramalite={
        "dict": [True],
        "name": ["a"],
        "args": [[1]],
        "keys": [
            [
                "queue_name",
                "actor_name",
                "args",
                "kwargs",
                "options",
                "message_id",
                "message_timestamp",
            ]
        ],
    },
)
def what_a_callback_gets(dramatiq, world):
    @dramatiq.actor
    def done(data, result):
        world.record("dict", isinstance(data, dict))
        world.record("name", world.attempt(lambda: data.actor_name))
        world.record("args", data["args"])
        world.record("keys", list(data))

    (a,) = steps(dramatiq, world, "a", on_success="done")
    a.send(1)
    world.work()
    world.forget("steps")


# Results


@program
def a_result_is_stored_and_can_be_read_again(dramatiq, world):
    world.keep_results()
    work = dramatiq.actor(
        lambda: {"a": (1, None), "é": [True, 1.5]}, actor_name="work", store_results=True
    )
    message = work.send()
    world.work()
    for _ in range(2):
        world.record("result", message.get_result())
    world.record("blocking", message.get_result(block=True, timeout=100))


@program
def a_result_of_none_is_stored(dramatiq, world):
    world.keep_results()
    message = dramatiq.actor(lambda: None, actor_name="none", store_results=True).send()
    world.work()
    world.record("result", [message.get_result()])


@program
def results_may_be_stored_for_all_actors_but_one(dramatiq, world):
    world.keep_results(store_results=True)
    dramatiq.actor(lambda: 1, actor_name="plain")
    dramatiq.actor(lambda: 2, actor_name="none", store_results=False)
    sent = [world.broker.get_actor(name).send() for name in ("plain", "none")]
    sent.append(world.broker.get_actor("none").send_with_options(store_results=True))
    sent.append(world.broker.get_actor("plain").send_with_options(store_results=False))
    world.work()
    for message in sent:
        world.record("results", world.attempt(message.get_result))


@program
def a_failure_is_stored_when_it_is_final(dramatiq, world):
    backend = world.keep_results()
    with_current_message(dramatiq, world)

    @dramatiq.actor(store_results=True, max_retries=2, min_backoff=0)
    def work():
        message = current(dramatiq)._message
        world.record("meanwhile", world.attempt(backend.get_result, message))
        raise LookupError("no")

    message = work.send()
    world.work()
    world.record("result", world.attempt(message.get_result, text=True))
    error = world.caught(message.get_result)
    world.record("attributes", [error.orig_exc_type, error.orig_exc_msg])


@program
def a_failure_in_throws_is_stored(dramatiq, world):
    world.keep_results()
    work = failing(dramatiq, world, throws=ValueError, store_results=True)
    message = work.send()
    world.work()
    world.record("result", world.attempt(message.get_result, text=True))


@program
def the_result_of_a_message_that_succeeded_at_last(dramatiq, world):
    world.keep_results()
    message = failing(dramatiq, world, times=2, min_backoff=0, store_results=True).send()
    world.work()
    world.record("result", message.get_result())


@program
def the_result_of_a_skipped_message_is_none(dramatiq, world):
    world.keep_results()
    skip = dramatiq.middleware.SkipMessage("skip")
    message = failing(dramatiq, world, error=skip, store_results=True).send()
    world.work()
    world.record("result", [message.get_result()])


@program
def the_result_of_a_message_that_was_too_old(dramatiq, world):
    world.keep_results()
    (a,) = steps(dramatiq, world, "a", max_age=1000, store_results=True)
    message = world.old(a.message(), 5000)
    world.broker.enqueue(message)
    world.work()
    world.record("result", world.attempt(message.get_result, text=True))


@program
def an_unknown_actor_has_no_result(dramatiq, world):
    world.use_stub_broker()
    backend = world.keep_results(store_results=True)
    (a,) = steps(dramatiq, world, "a")
    message = a.message().copy(actor_name="nobody")
    world.broker.enqueue(message)
    world.work()
    world.record("result", world.attempt(message.get_result, backend=backend, block=False))


@program
def a_result_that_is_not_there_yet(dramatiq, world):
    world.keep_results()
    (a,) = steps(dramatiq, world, "a", store_results=True)
    message = a.send(1)
    for options in ({}, {"block": True, "timeout": 10}):
        world.record("result", world.attempt(message.get_result, **options))
        error = world.caught(message.get_result, **options)
        world.record("str", str(error))
        world.record("message", error.message == message)
    world.work()
    world.record("result", message.get_result())


@program(
    on_purpose="whoever asks for a result that never comes is told so, and does not wait",
    dramatiq={"at once": ["raises ResultMissing"], "blocking": ["raises ResultTimeout"]},
    memory={"at once": ["raises ResultMissing"], "blocking": ["raises ResultTimeout"]},
    file={"at once": ["raises ResultUnavailable"], "blocking": ["raises ResultUnavailable"]},
)
def a_result_that_nobody_stores(dramatiq, world):
    world.keep_results()
    (a,) = steps(dramatiq, world, "a")
    message = a.send()
    world.work()
    world.forget("steps")
    world.record("at once", world.attempt(message.get_result, exact=True))
    world.record("blocking", world.attempt(message.get_result, block=True, timeout=10, exact=True))


@program
def the_result_of_a_delayed_message(dramatiq, world):
    world.keep_results()
    (a,) = steps(dramatiq, world, "a", store_results=True)
    message = a.send_with_options(delay=2)
    world.record("queue", message.queue_name)
    world.work()
    world.record("result", message.get_result())


@program(
    on_purpose="K11: what can't be stored is a failure, which can be",
    dramatiq={"result": ["raises ResultMissing"]},
    dramalite={"result": ["raises ResultFailure"], "dead letters": [("odd()", {})]},
)
def a_result_that_json_cannot_hold(dramatiq, world):
    world.keep_results()
    message = dramatiq.actor(lambda: {1}, actor_name="odd", store_results=True).send()
    world.work()
    world.record("result", world.attempt(message.get_result))


@program(
    on_purpose="K28: a time to live is in milliseconds and not cut to seconds",
    dramatiq={"result": ["raises ResultMissing"]},
    dramalite={"result": [1]},
)
def a_result_that_lives_for_less_than_a_second(dramatiq, world):
    world.keep_results()
    work = dramatiq.actor(lambda: 1, actor_name="work", store_results=True, result_ttl=900)
    message = work.send()
    world.work()
    world.record("result", world.attempt(message.get_result))


@program
def results_need_a_backend(dramatiq, world):
    world.use([])
    (a,) = steps(dramatiq, world, "a")
    message = a.send()
    world.work()
    world.record("backend", world.attempt(world.broker.get_results_backend))
    world.record("result", world.attempt(message.get_result))


@program(
    on_purpose="S1: SQLiteBroker keeps results by itself",
    dramatiq={"declared": ["raises ValueError"]},
    memory={"declared": ["raises ValueError"]},
    file={"declared": ["returns"], "result": ["a done"], "steps": [["a"]]},
)
def store_results_without_results(dramatiq, world):
    made = world.attempt(steps, dramatiq, world, "a", store_results=True)
    world.record("declared", made if isinstance(made, str) else "returns")
    if not isinstance(made, str):
        message = made[0].send()
        world.work()
        world.record("result", message.get_result())


@program
def the_key_of_a_result(dramatiq, world):
    backend = world.result_backend()
    message = dramatiq.Message("a.queue", "actor", (), {}, {}, "the-id", 5)
    world.record("key", backend.build_message_key(message))
    world.record("key", backend.build_message_key(message.copy(queue_name="a.queue.DQ")))
    named = world.result_backend(namespace="mine", use_namespace_prefix_keys=True)
    world.record("named", named.build_message_key(message))


@program
def a_backend_may_be_used_by_hand(dramatiq, world):
    backend = world.result_backend()
    message = dramatiq.Message("default", "actor", (), {}, {}, "the-id", 5)
    backend.store_result(message, {"a": (1, 2)}, 60_000)
    world.record("result", backend.get_result(message))
    backend.store_exception(message, KeyError("x"), 60_000)
    world.record("failure", world.attempt(backend.get_result, message, text=True))


# Rate limits


@program
def a_concurrent_limiter_is_a_mutex(dramatiq, world):
    limits = dramatiq.rate_limits
    mutex = limits.ConcurrentRateLimiter(world.counters(), "key", limit=1)

    def enter(**options):
        with mutex.acquire(**options) as acquired:
            return acquired

    with mutex.acquire() as acquired:
        world.record("outer", acquired)
        world.record("inner", world.attempt(enter))
        world.record("inner, no error", enter(raise_on_failure=False))
    world.record("again", enter())

    def fail_inside():
        with mutex.acquire():
            raise LookupError("inside")

    world.record("error", world.attempt(fail_inside, text=True))
    world.record("after the error", enter())


@program
def a_concurrent_limiter_of_two(dramatiq, world):
    backend = world.counters()
    make = dramatiq.rate_limits.ConcurrentRateLimiter
    first, second = make(backend, "k", limit=2), make(backend, "k", limit=2)
    other = make(backend, "o")
    with first.acquire(), second.acquire(), other.acquire():
        for limiter in (first, second, other):
            with limiter.acquire(raise_on_failure=False) as acquired:
                world.record("acquired", acquired)
    with first.acquire() as acquired:
        world.record("after", acquired)


@program
def a_bucket_does_not_give_back(dramatiq, world):
    limiter = dramatiq.rate_limits.BucketRateLimiter(
        world.counters(), "key", limit=3, bucket=10**12
    )
    for _ in range(5):
        with limiter.acquire(raise_on_failure=False) as acquired:
            world.record("acquired", acquired)


@program
def a_window_does_not_give_back(dramatiq, world):
    limiter = dramatiq.rate_limits.WindowRateLimiter(
        world.counters(), "key", limit=3, window=600
    )
    for _ in range(5):
        with limiter.acquire(raise_on_failure=False) as acquired:
            world.record("acquired", acquired)


@program
def limits_below_one_are_refused(dramatiq, world):
    limits, backend = dramatiq.rate_limits, world.counters()
    for make in (limits.ConcurrentRateLimiter, limits.BucketRateLimiter, limits.WindowRateLimiter):
        world.record("limit", world.attempt(make, backend, "key", limit=0))
    world.record("window", world.attempt(limits.WindowRateLimiter, backend, "key", window=0))
    world.record("parties", world.attempt(limits.Barrier(backend, "key").create, 0))


@program
def a_barrier_opens_for_the_last(dramatiq, world):
    barrier = dramatiq.rate_limits.Barrier(world.counters(), "key")
    world.record("created", [barrier.create(3), barrier.create(3)])
    world.record("arrived", [barrier.wait(block=False) for _ in range(4)])


@program
def a_barrier_times_out(dramatiq, world):
    barrier = dramatiq.rate_limits.Barrier(world.counters(), "key")
    barrier.create(2)
    world.record("waited", barrier.wait(timeout=5))
    world.record("last", barrier.wait(timeout=5))


@program
def a_barrier_that_nobody_made_is_open(dramatiq, world):
    barrier = dramatiq.rate_limits.Barrier(world.counters(), "key")
    world.record("open", barrier.wait(block=False))


@program(
    on_purpose="a barrier may be waited at without a timeout, in memory too",
    dramatiq={"last": [True], "first": ["raises TypeError"]},
    dramalite={"last": [True], "first": [True]},
)
def a_barrier_that_is_waited_at_for_ever(dramatiq, world):
    backend = world.counters()
    barrier = dramatiq.rate_limits.Barrier(backend, "key")
    barrier.create(2)
    first = threading.Thread(target=lambda: world.record("first", world.attempt(barrier.wait)))
    first.start()
    while backend.add("key", 1, 1000) or not backend.decr("key", 1, 0, 60_000):
        pass  # Not yet counted down.
    backend.incr("key", 1, 2, 60_000)
    world.record("last", barrier.wait(block=False))
    first.join(100)


@program
def counters_of_a_rate_limiter_backend(dramatiq, world):
    backend = world.counters()
    world.record("add", [bool(backend.add("a", 5, 60_000)), bool(backend.add("a", 6, 60_000))])
    world.record("incr", [bool(backend.incr("a", 2, 8, 60_000)) for _ in range(3)])
    world.record("decr", [bool(backend.decr("a", 3, 0, 60_000)) for _ in range(3)])
    world.record("too much", bool(backend.incr("b", 2, 1, 60_000)))
    world.record("too little", bool(backend.decr("c", 1, 0, 60_000)))
    sums = [backend.incr_and_sum("d", lambda: ["d", "a"], 1, 4, 60_000) for _ in range(5)]
    world.record("incr_and_sum", [bool(answer) for answer in sums])


@program
def a_rate_limit_uses_up_retries(dramatiq, world):
    mutex = dramatiq.rate_limits.ConcurrentRateLimiter(world.counters(), "key")

    @dramatiq.actor(max_retries=2, min_backoff=0)
    def work():
        world.record("calls", "called")
        with mutex.acquire():
            world.record("entered", "never")

    with mutex.acquire():
        work.send()
        world.work()
    world.cut_tracebacks()


@program
def a_rate_limit_in_actors_that_run_together(dramatiq, world):
    mutex = dramatiq.rate_limits.ConcurrentRateLimiter(world.counters(), "key")
    inside, left = threading.Event(), threading.Event()

    @dramatiq.actor
    def holder():
        with mutex.acquire():
            inside.set()
            world.record("holder", left.wait(100))

    @dramatiq.actor
    def visitor():
        inside.wait(100)
        with mutex.acquire(raise_on_failure=False) as acquired:
            world.record("visitor", acquired)
        left.set()

    holder.send()
    visitor.send()
    world.work(threads=2)


# Age limit


@program
def a_message_that_is_too_old_is_not_run(dramatiq, world):
    record_hooks(dramatiq, world, PROCESS_HOOKS)
    work = failing(dramatiq, world, max_age=60_000)
    world.broker.enqueue(world.old(work.message("old"), 120_000))
    world.work()


@program
def message_then_actor_then_middleware_decide_how_old(dramatiq, world):
    world.use([dramatiq.middleware.AgeLimit(max_age=60_000)])
    plain = noting(dramatiq, world, name="plain")
    patient = noting(dramatiq, world, name="patient", max_age=600_000)
    for actor in (plain, patient):
        for age in (0, 120_000, 1_200_000):
            world.broker.enqueue(world.old(actor.message(age), age))
    own = world.old(plain.message_with_options(args=("own",), max_age=10**9), 1_200_000)
    world.broker.enqueue(own)
    short = world.old(patient.message_with_options(args=("short",), max_age=5), 60_000)
    world.broker.enqueue(short)
    world.work()


@program
def no_age_limit_at_all(dramatiq, world):
    note = noting(dramatiq, world)
    for options in ({}, {"max_age": None}, {"max_age": 0}):
        world.broker.enqueue(world.old(note.message_with_options(args=(1,), **options), 10**11))
    world.work()


@program(
    on_purpose="K10: a timedelta is a limit, and not the end of all limits",
    dramatiq={"note": [[1]]},
    dramalite={"dead letters": [("note(1)", {})]},
)
def an_age_limit_may_be_a_timedelta(dramatiq, world):
    note = noting(dramatiq, world, max_age=datetime.timedelta(minutes=1))
    world.broker.enqueue(world.old(note.message(1), 120_000))
    world.work()


# Time limit


def spin(seconds=10.0):
    """Run Python code until interrupted."""
    tick = threading.Event()
    for _ in range(int(seconds * 500)):
        tick.wait(0.002)


@program
def a_message_that_takes_too_long_is_interrupted(dramatiq, world):
    world.use_time_limit(dramatiq.middleware.Retries())

    @dramatiq.actor(time_limit=500, max_retries=1, min_backoff=0)
    def work():
        try:
            spin()
        except Exception:  # noqa: BLE001
            world.record("caught", "by except Exception")
        except BaseException as error:
            world.record("error", type(error).__name__)
            raise

    work.send()
    world.work()


@program
def an_interrupted_message_may_clean_up_and_return(dramatiq, world):
    world.use_time_limit(dramatiq.middleware.Retries())

    @dramatiq.actor(max_retries=0)
    def work():
        try:
            spin()
        except dramatiq.middleware.TimeLimitExceeded:
            world.record("cleaned up", True)

    work.send_with_options(time_limit=500)
    world.work()


@program
def a_time_limit_passes_before_the_actor_runs(dramatiq, world):
    world.use_time_limit(dramatiq.middleware.Retries())
    wait = hooks(dramatiq, ["before_process_message"], lambda _hook, _message: spin(0.25))
    world.broker.add_middleware(wait)

    @dramatiq.actor(max_retries=0, time_limit=5)
    def work():
        spin(5)
        world.record("finished", True)

    work.send()
    world.work()


@program
def time_limits_in_time(dramatiq, world):
    world.use_time_limit()
    note = noting(dramatiq, world, time_limit=float("inf"))
    note.send("no limit")
    note.send_with_options(args=("far",), time_limit=10**6)
    world.work()


@program(
    on_purpose="K14: time limits hold in every worker, also in one that no command line started",
    dramatiq={"finished": [True]},
    dramalite={"interrupted": [True]},
)
def a_time_limit_in_a_worker_inside_the_program(dramatiq, world):
    @dramatiq.actor(time_limit=300, max_retries=0)
    def work():
        try:
            spin(0.6 if is_original(dramatiq) else 10)
            world.record("finished", True)
        except dramatiq.middleware.TimeLimitExceeded:
            world.record("interrupted", True)

    work.send()
    world.work()


# Shutdown notifications


@program(
    on_purpose="K15: a shutdown is not the message's fault and uses up no retry",
    dramatiq={
        "before": ["Shutdown"],
        "dead letters": [
            ("work()", {"retries": 1, "traceback": "Shutdown", "requeue_timestamp": "time"})
        ],
    },
    dramalite={"before": ["Shutdown"], "after": [{}]},
)
def a_message_is_told_of_the_shutdown(dramatiq, world):
    with_current_message(dramatiq, world)
    running, is_second = threading.Event(), threading.Event()

    @dramatiq.actor(notify_shutdown=True, max_retries=0)
    def work():
        if is_second.is_set():
            world.record("after", dict(current(dramatiq).options))
            return
        running.set()
        try:
            spin()
        except BaseException as error:
            world.record("before", type(error).__name__)
            raise

    work.send()
    world.work(until=running)
    is_second.set()
    world.work()
    world.cut_tracebacks()


@program
def a_message_is_not_told_of_the_shutdown_unless_it_asks(dramatiq, world):
    running = threading.Event()

    @dramatiq.actor(notify_shutdown=True)
    def work():
        running.set()
        spin(0.05)
        world.record("finished", True)

    work.send_with_options(notify_shutdown=False)
    world.work(until=running)
    world.work()


# Priorities


def prioritised(dramatiq, world, *priorities):
    """Actors that record their names, one for each priority, and a gate to hold the worker."""

    def work(name):
        return lambda number: world.record("order", [name, number])

    gate, reached = threading.Event(), threading.Event()

    @dramatiq.actor(queue_name="gate", priority=-100)
    def gatekeeper():
        reached.set()
        gate.wait(100)

    actors = [dramatiq.actor(work(p), actor_name=f"p{p}", priority=p) for p in priorities]
    return actors, gatekeeper, reached, gate


@program
def lower_numbers_go_first_among_what_a_worker_holds(dramatiq, world):
    actors, gatekeeper, reached, gate = prioritised(dramatiq, world, 10, 0, -5, 3)
    gatekeeper.send()
    with world.started(prefetch=100):
        reached.wait(100)
        for number in range(2):
            for actor in actors:
                actor.send(number)
        world.wait_for_prefetch(8)
        gate.set()
        world.join()


@program
def equal_priorities_go_in_the_order_of_sending(dramatiq, world):
    (actor,), gatekeeper, reached, gate = prioritised(dramatiq, world, 7)
    gatekeeper.send()
    with world.started(prefetch=100):
        reached.wait(100)
        for number in range(6):
            actor.send(number)
        world.wait_for_prefetch(6)
        gate.set()
        world.join()


@program(
    on_purpose="K36: priority counts in the queue, and not only in the worker's hands",
    dramatiq={"first": [["p10", 0]]},
    dramalite={"first": [["p0", 6]]},
)
def an_urgent_message_behind_many_others(dramatiq, world):
    (late, urgent), *_ = prioritised(dramatiq, world, 10, 0)
    for number in range(6):
        late.send(number)
    urgent.send(6)
    world.work()
    name, number = world.topics["order"][0]
    world.record("first", [f"p{name}", number])
    world.forget("order")


# Class-based actors


@program
def a_class_based_actor_is_one_instance(dramatiq, world):
    class Add(dramatiq.GenericActor):
        """Adds."""

        constant = 5

        def __init__(self):
            self.calls = 0

        def perform(self, x, y=2):
            self.calls += 1
            world.record("perform", [x, y, self.calls])
            return x + y

    world.record("call", Add(1, y=3))
    world.record("message", Add.send(4))
    world.record("names", [Add.actor_name, Add.queue_name, Add.priority, Add.constant])
    world.record("options", Add.options)
    world.record("actor", str(Add.__actor__))
    world.record("kind", [isinstance(Add, dramatiq.GenericActor), isinstance(Add, dramatiq.Actor)])
    world.record("missing", world.attempt(lambda: Add.no_such_thing))
    world.record("wrong call", world.attempt(Add, 1, 2, 3))
    world.work()


@program
def meta_has_the_options_of_a_class_based_actor(dramatiq, world):
    class Tuned(dramatiq.GenericActor):
        class Meta:
            actor_name = "tuned"
            queue_name = "tune"
            priority = 4
            max_retries = 1
            min_backoff = 0
            broker = None

        def perform(self):
            world.record("called", True)
            raise ValueError("no")

    world.record("names", [Tuned.actor_name, Tuned.queue_name, Tuned.priority])
    world.record("options", Tuned.options)
    Tuned.send()
    world.work()


@program
def an_abstract_class_is_no_actor_and_hands_its_meta_down(dramatiq, world):
    class Base(dramatiq.GenericActor):
        class Meta:
            abstract = True
            queue_name = "base"
            max_retries = 3

        def perform(self, value):
            return self.transform(value)

    class Child(Base):
        def transform(self, value):
            world.record("transform", value)

    world.record("class", [isinstance(Base, type), isinstance(Child, type)])
    world.record("declared", sorted(world.broker.get_declared_actors()))
    world.record("inherited", [Child.queue_name, Child.options])
    world.record("attributes", world.attempt(lambda: Base.send))
    Child.send(1)
    world.work()


@program(
    on_purpose="K2: a Meta that extends another one inherits its values",
    dramatiq={"child": [["default", {"max_retries": 1}]]},
    dramalite={"child": [["base", {"min_backoff": 7, "max_retries": 1}]]},
)
def a_meta_may_extend_another(dramatiq, world):
    class Base(dramatiq.GenericActor):
        class Meta:
            abstract = True
            queue_name = "base"
            min_backoff = 7

    class Child(Base):
        class Meta(Base.Meta):
            max_retries = 1
            abstract = False

        def perform(self):
            pass

    world.record("child", [Child.queue_name, Child.options])


@program
def a_class_based_actor_without_perform(dramatiq, world):
    class Lazy(dramatiq.GenericActor):
        pass

    world.record("call", world.attempt(Lazy, 1, a=2, text=True))
    Lazy.send_with_options(max_retries=0)
    world.work()


@program
def meta_may_bring_its_own_registry(dramatiq, world):
    class Registered(dramatiq.GenericActor):
        class Meta:
            @staticmethod
            def actor(instance, **options):
                world.record("registered", [type(instance).__name__, options])
                return "what the registry returned"

            max_retries = 5

        def perform(self):
            pass

    world.record("actor", Registered.__actor__)
    world.record("declared", sorted(world.broker.get_declared_actors()))


@program
def class_based_actors_that_cannot_be(dramatiq, world):
    class Fine(dramatiq.GenericActor):
        def perform(self):
            pass

    def extend_a_concrete_one():
        class Child(Fine):
            pass

    def need_arguments():
        class Needy(dramatiq.GenericActor):
            def __init__(self, argument):
                pass

    def have_unknown_options():
        class Odd(dramatiq.GenericActor):
            class Meta:
                no_such_option = 1

    def take_a_name():
        class Other(dramatiq.GenericActor):
            class Meta:
                actor_name = "Fine"

    for make in (extend_a_concrete_one, need_arguments, have_unknown_options, take_a_name):
        world.record(make.__name__, world.attempt(make))


# Middleware


@program
def hooks_of_a_success(dramatiq, world):
    record_hooks(dramatiq, world)
    (a,) = steps(dramatiq, world, "a")
    a.send(1)
    world.work()


@program
def hooks_of_a_final_failure(dramatiq, world):
    record_hooks(dramatiq, world)
    failing(dramatiq, world, max_retries=0).send(1)
    world.work()


@program
def hooks_of_a_retry(dramatiq, world):
    def action(hook, message, *args, **kwargs):
        # What Dramatiq does with the message while it is delayed is another program.
        is_on_its_way = "enqueue" in hook and args == (None,) and "retries" in message.options
        is_parked = "enqueue" not in hook and message.queue_name.endswith(".DQ")
        if not is_on_its_way and not is_parked:
            world.record("hooks", [hook, message.options.get("retries", 0), *args, *kwargs])

    world.broker.add_middleware(hooks(dramatiq, [*ENQUEUE_HOOKS, *PROCESS_HOOKS], action))
    failing(dramatiq, world, times=2, min_backoff=0).send(1)
    world.work()
    failing(dramatiq, world, name="other", max_retries=1, min_backoff=0).send(2)
    world.work()


@program(
    on_purpose="K34: a delayed message stays where it is until it is due",
    dramatiq={
        "a": [[]],
        "on its way": [
            ["before_enqueue", "default.DQ", 3],
            ["before_delay_message", "default.DQ"],
            ["before_enqueue", "default", None],
            ["before_ack", "default.DQ"],
        ],
        "at work": [["before_process_message", "default"], ["before_ack", "default"]],
    },
    dramalite={
        "a": [[]],
        "on its way": [["before_enqueue", "default.DQ", 3]],
        "at work": [["before_process_message", "default"], ["before_ack", "default"]],
    },
)
def hooks_of_a_delayed_message(dramatiq, world):
    def action(hook, message, *args):
        at_work = message.queue_name == "default" and hook != "before_enqueue"
        topic = "at work" if at_work else "on its way"
        world.record(topic, [hook, message.queue_name, *args])

    names = ["before_enqueue", "before_delay_message", "before_process_message", "before_ack"]
    world.broker.add_middleware(hooks(dramatiq, names, action))
    noting(dramatiq, world, name="a").send_with_options(delay=3)
    world.work()


@program
def hooks_of_a_skip_in_a_hook(dramatiq, world):
    record_hooks(dramatiq, world, PROCESS_HOOKS, topic="earlier and later")

    def skip(hook, message):
        raise dramatiq.middleware.SkipMessage("skip")

    world.broker.add_middleware(hooks(dramatiq, ["before_process_message"], skip))

    class Later(dramatiq.Middleware):
        def before_process_message(self, broker, message):
            world.record("later", "before")

        def after_skip_message(self, broker, message):
            world.record("later", "skipped")

    world.broker.add_middleware(Later())
    noting(dramatiq, world).send(1)
    world.work()


@program
def hooks_of_a_skip_in_an_actor(dramatiq, world):
    record_hooks(dramatiq, world)
    failing(dramatiq, world, error=dramatiq.middleware.SkipMessage("skip")).send(1)
    world.work()


@program
def hooks_of_a_skip_that_failed(dramatiq, world):
    record_hooks(dramatiq, world)

    def skip(hook, message):
        message.fail()
        raise dramatiq.middleware.SkipMessage("skip")

    world.broker.add_middleware(hooks(dramatiq, ["before_process_message"], skip))
    noting(dramatiq, world).send(1)
    world.work()


@program
def hooks_of_an_unknown_actor(dramatiq, world):
    world.use_stub_broker()
    record_hooks(dramatiq, world)
    note = noting(dramatiq, world)
    world.broker.enqueue(note.message(1).copy(actor_name="nobody"))
    world.work()


@program
def a_message_that_a_hook_failed_does_not_run(dramatiq, world):
    record_hooks(dramatiq, world)
    watch = hooks(dramatiq, ["before_process_message"], lambda _hook, message: message.fail())
    world.broker.add_middleware(watch)
    noting(dramatiq, world, name="done")
    noting(dramatiq, world, on_success="done").send(1)
    world.work()
    world.sort("hooks")


@program
def before_hooks_run_in_order_and_after_hooks_in_reverse(dramatiq, world):
    for number in (1, 2, 3):
        world.broker.add_middleware(
            hooks(
                dramatiq,
                [*ENQUEUE_HOOKS, "before_process_message", "after_process_message"],
                lambda name, *_args, number=number, **_kw: world.record("order", [name, number]),
            )
        )
    noting(dramatiq, world).send()
    world.work()


@program
def an_error_in_a_hook_stops_nothing(dramatiq, world):
    def fail(name, *args, **kwargs):
        raise LookupError(name)

    record_hooks(dramatiq, world)
    world.broker.add_middleware(hooks(dramatiq, [*ENQUEUE_HOOKS, *PROCESS_HOOKS], fail))
    record_hooks(dramatiq, world)
    noting(dramatiq, world).send(1)
    failing(dramatiq, world, max_retries=0).send(2)
    world.work()


@program
def a_middleware_error_before_enqueueing_reaches_the_sender(dramatiq, world):
    def refuse(name, message, delay):
        raise dramatiq.middleware.MiddlewareError("refused")

    world.broker.add_middleware(hooks(dramatiq, ["before_enqueue"], refuse))
    record_hooks(dramatiq, world, ["after_enqueue"])
    note = noting(dramatiq, world)
    world.record("sent", world.attempt(note.send, 1, text=True))
    world.record("waiting", world.waiting())
    world.work()


@program
def a_middleware_error_before_processing_is_a_failure(dramatiq, world):
    calls = []

    def refuse(name, message):
        calls.append(message)
        raise dramatiq.middleware.MiddlewareError("refused")

    world.broker.add_middleware(hooks(dramatiq, ["before_process_message"], refuse))
    noting(dramatiq, world, max_retries=1, min_backoff=0).send(1)
    world.work()
    world.record("calls", len(calls))


@program
def a_middleware_error_after_processing_is_swallowed(dramatiq, world):
    def refuse(name, message, **_kwargs):
        raise dramatiq.middleware.MiddlewareError("refused")

    world.broker.add_middleware(hooks(dramatiq, ["after_process_message"], refuse))
    noting(dramatiq, world).send(1)
    world.work()


@program
def a_hook_may_change_the_options_on_their_way(dramatiq, world):
    with_current_message(dramatiq, world)
    watch = hooks(
        dramatiq, ["before_enqueue"], lambda _hook, message, _delay: message.options.update(added=1)
    )
    world.broker.add_middleware(watch)

    @dramatiq.actor
    def work():
        world.record("options", dict(current(dramatiq).options))

    world.record("sent", work.send_with_options(own=2).options)
    world.work()


@program
def where_a_middleware_is_put(dramatiq, world):
    kinds = [type(name, (dramatiq.Middleware,), {}) for name in ("A", "B", "C", "D", "E")]
    a, b, c, d, e = kinds
    world.use([a(), b()])
    broker = world.broker
    broker.add_middleware(c(), before=b)
    broker.add_middleware(d(), after=a)
    world.record("list", [type(m).__name__ for m in broker.middleware])
    world.record("both", world.attempt(broker.add_middleware, e(), before=a, after=b))
    world.record("unknown", world.attempt(broker.add_middleware, e(), before=e))
    broker.add_middleware(a())
    world.record("list", [type(m).__name__ for m in broker.middleware])


@program(
    on_purpose="a class in place of an instance is refused before it does harm",
    dramatiq={"added": ["raises TypeError"], "left": [1]},
    dramalite={"added": ["raises TypeError"], "left": [0]},
)
def a_middleware_class_is_no_middleware(dramatiq, world):
    world.use([])

    class Mine(dramatiq.Middleware):
        pass

    world.record("added", world.attempt(world.broker.add_middleware, Mine))
    world.record("left", len(world.broker.middleware))


@program
def declarations_are_announced_and_repeated_to_who_comes_late(dramatiq, world):
    def recorder(topic):
        class Recorder(dramatiq.Middleware):
            @property
            def actor_options(self):
                return {f"option_of_{topic}"}

            def before_declare_actor(self, broker, actor):
                world.record(topic, ["before actor", actor.actor_name])

            def after_declare_actor(self, broker, actor):
                world.record(topic, ["after actor", actor.actor_name])

            def before_declare_queue(self, broker, queue_name):
                world.record(topic, ["before queue", queue_name])

            def after_declare_queue(self, broker, queue_name):
                world.record(topic, ["after queue", queue_name])

            def after_declare_delay_queue(self, broker, queue_name):
                world.record(topic, ["after delay queue", queue_name])

        return Recorder()

    world.use([recorder("early")])
    dramatiq.actor(lambda: 1, actor_name="first", option_of_early=1)
    dramatiq.actor(lambda: 1, actor_name="second")
    world.broker.declare_queue("third")
    world.broker.declare_queue("third")
    world.record("options", world.attempt(noting, dramatiq, world, option_of_late=1))
    world.broker.add_middleware(recorder("late"))
    noting(dramatiq, world, name="last", option_of_late=1)
    # K20: to Dramatiq's stub, a delay queue is a queue as well.
    world.topics["late"] = [
        [what, name]
        for what, name in world.topics["late"]
        if what != "after queue" or not name.endswith(".DQ")
    ]
    world.sort("late")


@program
def a_workers_start_and_end_are_announced(dramatiq, world):
    class Recorder(dramatiq.Middleware):
        def before_worker_boot(self, broker, worker):
            world.record("worker", "before boot")

        def after_worker_boot(self, broker, worker):
            world.record("worker", "after boot")

        def before_worker_shutdown(self, broker, worker):
            world.record("worker", "before shutdown")

        def after_worker_shutdown(self, broker, worker):
            world.record("worker", "after shutdown")

        def after_worker_thread_boot(self, broker, thread):
            world.record("booted threads", isinstance(thread, threading.Thread))

        def before_worker_thread_shutdown(self, broker, thread):
            world.record("ended threads", isinstance(thread, threading.Thread))

        def after_process_boot(self, broker):
            world.record("worker", "never without a command line")

    world.broker.add_middleware(Recorder())
    noting(dramatiq, world).send()
    world.work(threads=3)


# CurrentMessage, SkipMessage


@program
def the_current_message_is_there_while_an_actor_runs(dramatiq, world):
    with_current_message(dramatiq, world)

    @dramatiq.actor
    def work(value):
        message = current(dramatiq)
        world.record("inside", [str(message), message.message_id == sent.message_id])
        world.record("failed", message.failed)

    world.record("outside", current(dramatiq))
    sent = work.message(1)
    world.broker.enqueue(sent)
    world.work()
    world.record("outside", current(dramatiq))


@program
def the_current_message_is_gone_when_an_actor_has_failed(dramatiq, world):
    with_current_message(dramatiq, world)
    seen = []
    watch = hooks(
        dramatiq, ["after_ack", "after_nack"], lambda _hook, _m: seen.append(current(dramatiq))
    )
    world.broker.add_middleware(watch)
    failing(dramatiq, world, max_retries=0).send()
    noting(dramatiq, world).send()
    world.work()
    world.record("after", seen)


@program(
    on_purpose="K19: a skipped message is not current any more",
    dramatiq={"calls": [[]], "is there": [True]},
    dramalite={"calls": [[]], "is there": [False]},
)
def the_current_message_after_a_skip(dramatiq, world):
    with_current_message(dramatiq, world)
    watch = hooks(
        dramatiq,
        ["after_ack"],
        lambda _hook, _m: world.record("is there", current(dramatiq) is not None),
    )
    world.broker.add_middleware(watch)
    failing(dramatiq, world, error=dramatiq.middleware.SkipMessage("skip")).send()
    world.work()


@program
def a_skipped_message_is_done(dramatiq, world):
    skip = dramatiq.middleware.SkipMessage("skip")
    failing(dramatiq, world, error=skip, max_retries=3, min_backoff=0).send("x")
    world.work()
    world.record("join", world.attempt(world.broker.join, "default", timeout=5000))


# Messages and their encoding


def sample(dramatiq, **changes):
    fields = {
        "queue_name": "default",
        "actor_name": "add",
        "args": (1, "é"),
        "kwargs": {"y": None},
        "options": {"max_retries": 2},
        "message_id": "the-id",
        "message_timestamp": 1_795_379_900_148,
    }
    return dramatiq.Message(**{**fields, **changes})


@program
def how_a_message_is_written(dramatiq, world):
    message = sample(dramatiq)
    world.record("str", [str(message), str(sample(dramatiq, args=(), kwargs={}))])
    world.record("repr", repr(message))
    world.record("format", f"{message}")
    world.record("encoded", message.encode())
    world.record("time", message.message_datetime.isoformat())
    proxy = dramatiq.MessageProxy(message)
    world.record("proxy", [str(proxy), repr(message) in repr(proxy), proxy == message])


@program
def fields_of_a_message(dramatiq, world):
    message = sample(dramatiq, args=[1, 2])
    world.record("asdict", list(message.asdict().items()))
    world.record("args", message.args)
    world.record("live", message.asdict()["options"] is message.options)
    world.record("alias", message._asdict() == message.asdict())
    world.record("fields", [message._fields, message._field_defaults])
    world.record("replaced", message._replace(queue_name="q", options={}))
    world.record("assigned", world.attempt(setattr, message, "queue_name", "q"))
    world.record("hash", world.attempt(hash, message))
    world.record("missing", world.attempt(dramatiq.Message, "q", "a", ()))
    world.record("kept", message.kwargs is message.copy().kwargs)


@program
def a_field_cannot_be_deleted(dramatiq, world):
    world.record("deleted", world.attempt(delattr, sample(dramatiq), "args"))


@program
def copies_of_a_message(dramatiq, world):
    message = sample(dramatiq)
    world.record("merged", message.copy(options={"tag": 1, "max_retries": 9}))
    world.record("changed", message.copy(args=[3], actor_name="other"))
    world.record("original", message)
    world.record("unknown", world.attempt(message.copy, no_such_field=1))


@program
def messages_compare_by_their_fields(dramatiq, world):
    message = sample(dramatiq)
    world.record("same", [message == sample(dramatiq), message != sample(dramatiq)])
    world.record("other", message == sample(dramatiq, message_id="other"))
    world.record("foreign", [message == message.asdict(), message == 1])
    proxy = dramatiq.MessageProxy(message)
    world.record("proxy", proxy == dramatiq.MessageProxy(sample(dramatiq)))
    world.record("copied", proxy.copy() == message)
    world.record("proxy hash", world.attempt(hash, proxy))


@program
def a_fresh_message_has_an_id_and_a_time(dramatiq, world):
    one, two = (dramatiq.Message("q", "a", (), {}, {}) for _ in range(2))
    world.record("ids", [one.message_id != two.message_id, len(one.message_id)])
    world.record("message", one)


@program
def bytes_that_are_no_message(dramatiq, world):
    good = b'"queue_name":"q","actor_name":"a","args":[],"kwargs":{},"options":{}'
    bad = [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"5",
        b"{}",
        b"{" + good.replace(b'"args":[],', b"") + b"}",
        b"{" + good.replace(b'"args":[]', b'"args":null') + b"}",
        b"{" + good + b',"extra":1}',
        b"{" + good + b"} trailing",
    ]
    for data in bad:
        world.record("bad", world.attempt(dramatiq.Message.decode, data))
        error = world.caught(dramatiq.Message.decode, data)
        world.record("cause", [error.data == data, error.__cause__ is error.error])
    world.record("good", dramatiq.Message.decode(b"{" + good + b"}"))
    spaced = b'{ "options": {"a": 1}, ' + good.replace(b',"options":{}', b"") + b"\n}"
    world.record("spaced", dramatiq.Message.decode(spaced))


@program(
    on_purpose="bytes whose fields have other types are no message, before they reach an actor",
    dramatiq={"decoded": [True, True, True, True]},
    dramalite={"decoded": [False, False, False, False]},
)
def fields_of_other_types(dramatiq, world):
    for field, value in (
        ("queue_name", b"5"),
        ("args", b'"text"'),
        ("kwargs", b"[]"),
        ("options", b"null"),
    ):
        fields = {
            "queue_name": b'"q"',
            "actor_name": b'"a"',
            "args": b"[]",
            "kwargs": b"{}",
            "options": b"{}",
            field: value,
        }
        data = b",".join(b'"%s":%s' % (name.encode(), text) for name, text in fields.items())
        decoded = world.attempt(dramatiq.Message.decode, b"{" + data + b"}")
        world.record("decoded", decoded != "raises DecodeError")


@program
def messages_may_be_pickled(dramatiq, world):
    dramatiq.set_encoder(dramatiq.PickleEncoder())
    note = noting(dramatiq, world)
    note.send((1, {2}), b"bytes", {3: None})
    world.record("encoder", type(dramatiq.get_encoder()).__name__)
    world.work()


@program
def encoders_by_hand(dramatiq, world):
    encoder = dramatiq.JSONEncoder()
    world.record("encoded", encoder.encode({"a": (1, 0.1, "é"), "b": {}}))
    world.record("decoded", encoder.decode(b'{"a": [1, 2e3]}'))
    for data in (b'{"a":"\xff"}', b'{"a":}'):
        world.record("error", world.attempt(encoder.decode, data))
        error = world.caught(encoder.decode, data)
        world.record("of", [error.data, type(error.error).__name__])
    world.record("abstract", world.attempt(dramatiq.Encoder))


@program
def how_messages_are_made(dramatiq, world):
    note = noting(dramatiq, world)
    world.record("iterable", note.message_with_options(args=(n for n in (1, 2))).args)
    world.record("no kwargs", note.message_with_options(kwargs=None).kwargs)
    world.record("no args", world.attempt(note.message_with_options, args=None))
    world.record("positional", world.attempt(note.send_with_options, (1,)))
    world.record("empty", note.message())
    world.record("pipe", type(note.message() | note.message()).__name__)
    world.record("waiting", world.waiting())


# Declarations


@program
def names_are_taken_once(dramatiq, world):
    note = noting(dramatiq, world)
    world.record("again", world.attempt(noting, dramatiq, world, text=True))
    by_hand = {"broker": world.broker, "queue_name": "default", "priority": 0, "options": {}}
    again = world.attempt(dramatiq.Actor, len, actor_name="note", **by_hand, text=True)
    world.record("by hand", again)
    world.record("still", world.broker.get_actor("note") is note)


@program
def names_of_queues(dramatiq, world):
    for number, name in enumerate(("a", "_", "a.b-c_1", "A9")):
        noting(dramatiq, world, name=f"good_{number}", queue_name=name)
    for name in ("", "a\n", "é", "1q", "my queue", "queue@domain", "$2@!@#", "-a", ".a"):
        world.record("bad", world.attempt(noting, dramatiq, world, queue_name=name))
    world.record("declared", sorted(world.broker.get_declared_actors()))


@program(
    on_purpose="K45: these endings belong to delayed messages and dead letters",
    dramatiq={"declared": ["returns", "returns"]},
    dramalite={"declared": ["raises ValueError", "raises ValueError"]},
)
def names_of_queues_that_are_taken(dramatiq, world):
    for ending in ("DQ", "XQ"):
        made = world.attempt(noting, dramatiq, world, name=ending, queue_name=f"mine.{ending}")
        world.record("declared", made if isinstance(made, str) else "returns")


@program
def unknown_options_are_refused(dramatiq, world):
    world.record("one", world.attempt(noting, dramatiq, world, no_such_option=1))
    world.record("queue first", world.attempt(noting, dramatiq, world, queue_name="1", no_such=1))
    world.use([])
    world.record("no middleware", world.attempt(noting, dramatiq, world, max_retries=1))
    world.record("declared", sorted(world.broker.get_declared_actors()))


@program
def options_that_the_default_middleware_knows(dramatiq, world):
    values = {
        "max_age": 10**6,
        "max_backoff": 5,
        "max_retries": 1,
        "min_backoff": 1,
        "notify_shutdown": True,
        "on_failure": "x",
        "on_retry_exhausted": "x",
        "on_success": "x",
        "pipe_ignore": True,
        "retry_when": None,
        "throws": ValueError,
        "time_limit": 1000,
    }
    note = noting(dramatiq, world, **values)
    world.record("names", sorted(note.options))
    world.record("known", set(values) <= world.broker.actor_options)


@program(
    on_purpose="K10: options are checked where they are given",
    dramatiq={"declared": ["returns"] * 6},
    dramalite={"declared": ["raises ValueError"] + ["raises TypeError"] * 5},
)
def options_of_wrong_types(dramatiq, world):
    for number, options in enumerate(
        (
            {"time_limit": -1},
            {"max_retries": "3"},
            {"min_backoff": "1s"},
            {"max_age": object()},
            {"throws": "ValueError"},
            {"retry_when": 5},
        )
    ):
        made = world.attempt(noting, dramatiq, world, name=f"a{number}", **options)
        world.record("declared", made if isinstance(made, str) else "returns")


@program
def names_of_actors(dramatiq, world):
    made = dramatiq.actor(lambda: 1)
    world.record("lambda", made.actor_name)
    world.record("empty", dramatiq.actor(noting, actor_name="").actor_name)
    partial = functools.partial(len, "abc")
    world.record("partial", world.attempt(dramatiq.actor, partial))
    named = dramatiq.actor(partial, actor_name="named")
    world.record("named", [named.actor_name, named()])
    world.record("loggers", [made.logger.name.rpartition(".")[2], named.logger.name])


@program(
    on_purpose="K1: a decorator may be used for several functions",
    dramatiq={"names": [["one"]], "second": ["raises ValueError"]},
    dramalite={"names": [["one", "two"]], "second": ["returns"]},
)
def one_decorator_for_two_functions(dramatiq, world):
    decorate = dramatiq.actor(max_retries=1)

    def one():
        pass

    def two():
        pass

    decorate(one)
    made = world.attempt(decorate, two)
    world.record("names", sorted(world.broker.get_declared_actors()))
    world.record("second", made if isinstance(made, str) else "returns")


@program
def forms_of_the_decorator(dramatiq, world):
    def plain():
        """Its text."""
        return 1

    made = [
        dramatiq.actor(plain),
        dramatiq.actor()(lambda: 2),
        dramatiq.actor(fn=lambda: 3, actor_name="three"),
        dramatiq.actor(actor_name="four", priority=-2, queue_name="q")(lambda: 4),
    ]
    world.record("results", [actor() for actor in made])
    world.record("names", [actor.actor_name for actor in made])
    world.record("attributes", [made[3].priority, made[3].queue_name, made[3].options])
    world.record("broker", [actor.broker is world.broker for actor in made])
    world.record("str", str(made[0]))
    shown = f"Actor({plain!r}, queue_name='default', actor_name='plain')"
    world.record("repr", repr(made[0]) == shown)
    world.record("generic", str(dramatiq.Actor[[int], str]).rpartition(".")[2])


@program
def another_class_of_actors(dramatiq, world):
    class Mine(dramatiq.Actor):
        def __call__(self, *args, **kwargs):
            return ["mine", super().__call__(*args, **kwargs)]

    world.keep_results()
    actor = dramatiq.actor(
        lambda x: x, actor_name="mine", actor_class=Mine, store_results=True
    )
    world.record("type", type(actor).__name__)
    world.record("call", actor(1))
    message = actor.send(2)
    world.work()
    world.record("result", message.get_result())
    made = []
    dramatiq.actor(len, actor_class=lambda fn, **options: made.append(sorted(options)))
    world.record("any callable", made)


@program
def what_is_declared(dramatiq, world):
    noting(dramatiq, world, name="a")
    noting(dramatiq, world, name="b", queue_name="other")
    broker = world.broker
    world.record("actors", sorted(broker.get_declared_actors()))
    world.record("delay queues", sorted(broker.get_declared_delay_queues()))
    world.record("unknown", world.attempt(broker.get_actor, "c", text=True))
    broker.get_declared_actors().clear()
    world.record("fresh", len(broker.get_declared_actors()))


@program(
    on_purpose="K20: a delay queue is no queue of its own",
    dramatiq={"queues": [["default", "default.DQ"]]},
    dramalite={"queues": [["default"]]},
)
def declared_queues(dramatiq, world):
    noting(dramatiq, world)
    world.record("queues", sorted(world.broker.get_declared_queues()))


@program
def the_family_of_errors(dramatiq, world):
    errors = dramatiq.errors
    pairs = [
        (errors.DecodeError, errors.DramatiqError),
        (errors.BrokerError, errors.DramatiqError),
        (errors.ActorNotFound, errors.BrokerError),
        (errors.QueueNotFound, errors.BrokerError),
        (errors.BrokerConnectionError, errors.BrokerError),
        (errors.ConnectionFailed, errors.BrokerConnectionError),
        (errors.ConnectionClosed, errors.BrokerConnectionError),
        (errors.QueueJoinTimeout, errors.DramatiqError),
        (errors.RateLimitExceeded, errors.DramatiqError),
        (errors.Retry, errors.DramatiqError),
        (dramatiq.results.ResultError, errors.DramatiqError),
        (dramatiq.results.ResultTimeout, dramatiq.results.ResultError),
        (dramatiq.results.ResultMissing, dramatiq.results.ResultError),
        (dramatiq.results.ResultFailure, dramatiq.results.ResultError),
        (dramatiq.middleware.SkipMessage, dramatiq.middleware.MiddlewareError),
        (dramatiq.middleware.MiddlewareError, errors.DramatiqError),
        (dramatiq.middleware.TimeLimitExceeded, dramatiq.middleware.Interrupt),
        (dramatiq.middleware.Shutdown, dramatiq.middleware.Interrupt),
        (dramatiq.middleware.Interrupt, Exception),
    ]
    world.record("is a", [issubclass(child, parent) for child, parent in pairs])
    world.record("same", dramatiq.rate_limits.RateLimitExceeded is errors.RateLimitExceeded)
    world.record("needs a message", world.attempt(errors.BrokerError))
    world.record("str", [str(errors.BrokerError("x")), errors.QueueNotFound("y").message])
    failure = dramatiq.results.ResultFailure("text", "KeyError", "k")
    world.record("failure", [str(failure), failure.orig_exc_type, failure.orig_exc_msg])


# Delay and eta


@program
def a_delayed_message_is_told_apart_by_its_queue(dramatiq, world):
    with_current_message(dramatiq, world)

    @dramatiq.actor
    def work():
        message = current(dramatiq)
        world.record("inside", [message.queue_name, dict(message.options)])

    sent = work.send_with_options(delay=5, tag=1)
    world.record("sent", sent)
    world.record("order", list(sent.options))
    early = sent.options["eta"] - sent.message_timestamp
    world.record("eta", 5 <= early < 1000)
    world.work()


@program
def delays_of_all_kinds(dramatiq, world):
    note = noting(dramatiq, world)
    delays = []
    watch = hooks(dramatiq, ["after_enqueue"], lambda _hook, _message, delay: delays.append(delay))
    world.broker.add_middleware(watch)
    for delay in (0, 2, datetime.timedelta(milliseconds=3), datetime.timedelta(microseconds=2900)):
        world.record("sent", note.send_with_options(args=("x",), delay=delay))
        world.record("delay", delays[-1])
    world.record("text", world.attempt(note.send_with_options, delay="soon"))
    world.work()


@program(
    on_purpose="a delay before now, or that is no whole number, is a mistake or is cut",
    dramatiq={"negative": ["runs"], "float": ["float"], "note": [[1], [2]]},
    dramalite={"negative": ["raises ValueError"], "float": ["int"], "note": [[2]]},
)
def odd_delays(dramatiq, world):
    note = noting(dramatiq, world)
    sent = world.attempt(note.send_with_options, args=(1,), delay=-1000)
    world.record("negative", sent if isinstance(sent, str) else "runs")
    world.work()
    sent = note.send_with_options(args=(2,), delay=1.5)
    world.record("float", type(sent.options["eta"]).__name__)
    world.work()


@program
def delayed_messages_run_in_the_order_of_their_times(dramatiq, world):
    note = noting(dramatiq, world)
    start = note.message().message_timestamp + 300
    for later in (3, 1, 2, 0):
        world.broker.enqueue(note.message(later).copy(options={"eta": start + later}))
    with world.started(prefetch=100):
        world.join()


@program(
    on_purpose="K33: messages that are due are not hidden by others that are not",
    dramatiq={"ran": [False]},
    dramalite={"ran": [True]},
)
def a_delayed_message_behind_many_others(dramatiq, world):
    ran = threading.Event()
    work = dramatiq.actor(ran.set, actor_name="work")
    for delay in (3_600_000, 3_600_000, 1):
        work.send_with_options(delay=delay)
    with world.started():
        world.record("ran", ran.wait(0.4 if is_original(dramatiq) else 10))
    world.broker.flush_all()


@program
def an_eta_in_the_options(dramatiq, world):
    note = noting(dramatiq, world)
    for value in (None, "soon", 5, 1e12):
        world.broker.enqueue(note.message(value).copy(options={"eta": value}))
        world.work()


@program
def a_delay_in_a_messages_options_does_nothing_by_itself(dramatiq, world):
    note = noting(dramatiq, world)
    message = note.message_with_options(args=(1,), delay=3_600_000)
    world.record("sent", world.broker.enqueue(message))
    world.work()


@program
def enqueueing_by_hand(dramatiq, world):
    note = noting(dramatiq, world)
    message = note.message(1)
    world.record("itself", world.broker.enqueue(message) is message)
    world.record("delayed", world.broker.enqueue(message.copy(args=(2,)), delay=1))
    proxy = dramatiq.MessageProxy(message.copy(args=(3,)))
    world.record("proxy", world.broker.enqueue(proxy) == proxy)
    world.work()
    world.sort("note")


# Coroutines


@program
def a_coroutine_is_an_actor(dramatiq, world):
    world.run_coroutines()
    world.keep_results()
    with_current_message(dramatiq, world)

    @dramatiq.actor(store_results=True)
    async def work(value):
        world.record("inside", [value, str(current(dramatiq))])
        return {"got": value}

    message = work.send(1)
    world.record("before", world.attempt(message.get_result))
    world.work()
    world.record("result", message.get_result())


@program
def a_coroutine_that_fails_is_retried(dramatiq, world):
    world.run_coroutines()

    @dramatiq.actor(max_retries=2, min_backoff=0)
    async def work():
        world.record("calls", "called")
        raise LookupError("no")

    work.send()
    world.work()


@program
def coroutines_in_pipelines_and_callbacks(dramatiq, world):
    world.run_coroutines()

    @dramatiq.actor
    async def double(value):
        return 2 * value

    @dramatiq.actor
    async def done(data, result):
        world.record("done", [data["actor_name"], result])

    note = noting(dramatiq, world)
    (double.message(4) | double.message_with_options(on_success="done") | note.message("end")).run()
    world.work()


@program
def a_coroutine_runs_into_its_time_limit(dramatiq, world):
    world.use_time_limit(dramatiq.middleware.Retries())
    world.run_coroutines()
    import asyncio

    @dramatiq.actor(max_retries=0, time_limit=500)
    async def work():
        try:
            await asyncio.sleep(10)
        finally:
            world.record("cleaned up", True)

    work.send()
    world.work()


@program(
    on_purpose="K44, S5: coroutines need no set-up",
    dramatiq={
        "direct call": ["raises RuntimeError"],
        "dead letters": [
            (
                "work()",
                {
                    "max_retries": 0,
                    "retries": 1,
                    "traceback": "RuntimeError",
                    "requeue_timestamp": "time",
                },
            )
        ],
    },
    dramalite={"direct call": [1], "calls": ["called", "called"]},
)
def a_coroutine_without_asyncio(dramatiq, world):
    @dramatiq.actor
    async def work():
        world.record("calls", "called")
        return 1

    with world.no_unawaited_warnings():
        world.record("direct call", world.attempt(work))
        work.send_with_options(max_retries=0)
        world.work()
    world.cut_tracebacks()


# The stub broker's join, flush, queues


@program(
    on_purpose="a file keeps no exceptions: there join raises a ResultFailure that tells of it",
    dramatiq={
        "join": ["raises LookupError: no", "raises LookupError: no", None, None],
        "waiting": [0],
    },
    memory={
        "join": ["raises LookupError: no", "raises LookupError: no", None, None],
        "waiting": [0],
    },
    file={
        "join": [
            "raises ResultFailure: work() failed: LookupError: no",
            "raises ResultFailure: work() failed: LookupError: no",
            None,
            None,
        ],
        "waiting": [0],
    },
)
def join_raises_what_a_dead_letter_died_of(dramatiq, world):
    failing(dramatiq, world, error=LookupError("no"), max_retries=0).send()
    world.work()
    world.forget("calls")
    join = functools.partial(world.attempt, world.broker.join, "default", timeout=5000, text=True)
    world.record("join", join(fail_fast=True))
    world.record("join", join(fail_fast=True))
    world.record("join", join(fail_fast=False))
    world.broker.flush_all()
    world.record("join", join(fail_fast=True))
    world.record("waiting", world.waiting())


@program(
    on_purpose="only a StubBroker's join raises by itself",
    dramatiq={"default": ["raises ValueError: no"], "stub": ["raises ValueError: no", None]},
    memory={"default": ["raises ValueError: no"], "stub": ["raises ValueError: no", None]},
    file={"default": [None], "stub": ["raises ValueError: no", None]},
)
def join_raises_by_default(dramatiq, world):
    failing(dramatiq, world, max_retries=0).send()
    world.work()
    join = functools.partial(world.attempt, text=True)
    world.record("default", join(world.broker.join, "default", timeout=5000))
    world.broker.flush_all()
    for fail_fast in (True, False):
        broker = world.use_stub_broker(fail_fast_default=fail_fast)
        failing(dramatiq, world, max_retries=0).send()
        world.work()
        world.record("stub", join(broker.join, "default", timeout=5000))
        broker.flush_all()
    world.forget("calls")


@program
def join_raises_all_kinds_of_ends(dramatiq, world):
    world.use_stub_broker()
    aged = noting(dramatiq, world, name="aged", queue_name="aged", max_age=1000)
    world.broker.enqueue(world.old(aged.message(), 5000))
    nobody = noting(dramatiq, world, name="x", queue_name="x").message().copy(actor_name="nobody")
    world.broker.enqueue(nobody)
    failing(dramatiq, world, queue_name="exit", error=SystemExit(2), max_retries=0).send()
    world.work()
    for queue in ("aged", "x", "exit"):
        world.record(queue, world.attempt(world.broker.join, queue, timeout=5000, text=True))


@program
def join_times_out(dramatiq, world):
    note = noting(dramatiq, world)
    note.send()
    world.record("join", world.attempt(world.broker.join, "default", timeout=5))
    note.send_with_options(delay=3_600_000)
    world.record("join", world.attempt(world.broker.join, "default", timeout=5))
    world.broker.flush_all()
    world.record("join", world.attempt(world.broker.join, "default", timeout=5000))


@program(
    on_purpose="a file may hold the queues of other programs",
    dramatiq={"join": ["raises QueueNotFound"], "enqueued": ["raises QueueNotFound"]},
    memory={"join": ["raises QueueNotFound"], "enqueued": ["raises QueueNotFound"]},
    file={"join": ["raises QueueNotFound"], "enqueued": ["stored"]},
)
def queues_that_nobody_declared(dramatiq, world):
    note = noting(dramatiq, world)
    world.record("join", world.attempt(world.broker.join, "nowhere", timeout=5000))
    enqueued = world.attempt(world.broker.enqueue, note.message().copy(queue_name="nowhere"))
    world.record("enqueued", enqueued if isinstance(enqueued, str) else "stored")
    world.broker.flush_all()


@program
def flushing_a_queue(dramatiq, world):
    a = noting(dramatiq, world, name="a", queue_name="a")
    b = noting(dramatiq, world, name="b", queue_name="b")
    for actor in (a, b):
        actor.send(1)
        actor.send(2)
    world.record("before", [world.broker.queues[q].qsize() for q in ("a", "b")])
    world.broker.flush("a")
    world.record("after", [world.broker.queues[q].qsize() for q in ("a", "b")])
    world.record("unfinished", world.broker.queues["a"].unfinished_tasks)
    a.send(3)
    world.work()


@program(
    on_purpose="a queue that nobody declared has one error everywhere",
    dramatiq={"flush": ["raises KeyError"]},
    dramalite={"flush": ["raises QueueNotFound"]},
)
def flushing_a_queue_that_nobody_declared(dramatiq, world):
    world.record("flush", world.attempt(world.broker.flush, "nowhere"))


@program
def flushing_everything(dramatiq, world):
    note = noting(dramatiq, world)
    failing(dramatiq, world, max_retries=0, queue_name="other").send()
    world.work()
    note.send(1)
    note.send_with_options(delay=3_600_000)
    world.record("dead", len(world.broker.dead_letters))
    world.broker.flush_all()
    world.record("flushed", [len(world.broker.dead_letters), world.waiting()])
    failing(dramatiq, world, max_retries=0, name="again", queue_name="other").send()
    world.work()


@program
def a_stub_brokers_queues(dramatiq, world):
    world.use_stub_broker()
    note = noting(dramatiq, world)
    message = note.send(1)
    queue = world.broker.queues["default"]
    world.record("size", [queue.qsize(), queue.unfinished_tasks])
    body = queue.get(timeout=5)
    world.record("body", body == message.encode())
    queue.put(message.copy(args=(2,)).encode())
    world.record("size", queue.qsize())
    world.broker.flush_all()


@program
def dead_letters_are_what_ended(dramatiq, world):
    work = failing(dramatiq, world, max_retries=0, name="work")
    other = failing(dramatiq, world, throws=ValueError, name="other", queue_name="other")
    sent = [work.send(1), other.send(2)]
    world.work()
    letters = world.broker.dead_letters
    world.record("ids", sorted(m.message_id for m in letters) == sorted(m.message_id for m in sent))
    by_queue = world.broker.dead_letters_by_queue
    for queue in ("default", "other"):
        world.record(queue, [str(letter) for letter in by_queue[queue]])
    world.record("equal", by_queue["other"][0] == sent[1])
    world.sort("calls")


@program(
    on_purpose="K5: what a stopped worker held goes back to its queue",
    dramatiq={"all ran once": [False]},
    dramalite={"all ran once": [True]},
)
def what_a_stopped_worker_held(dramatiq, world):
    count = 300
    running, go, ran = threading.Event(), threading.Event(), []

    class Release(dramatiq.Middleware):
        def before_worker_shutdown(self, broker, worker):
            go.set()

    world.broker.add_middleware(Release())

    @dramatiq.actor
    def work(number):
        running.set()
        go.wait(100)
        ran.append(number)

    for number in range(count):
        work.send(number)
    with world.started(prefetch=count):
        running.wait(100)
        world.wait_for_prefetch(count - 1)
    world.work(join=False)
    world.record("all ran once", sorted(ran) == list(range(count)))


@program(
    on_purpose="K4: bytes that are no message are put aside, and the rest goes on",
    dramatiq={"note": [[1]], "join": ["raises QueueJoinTimeout"]},
    dramalite={
        "note": [[1]],
        "join": [None],
        "dead letters": [("()", {"traceback": "It can't be decoded"})],
    },
)
def bytes_in_the_queue_that_are_no_message(dramatiq, world):
    note = noting(dramatiq, world)
    note.send(1)
    world.broker.queues["default"].put(b"no message")
    timeout = 300 if is_original(dramatiq) else 10_000
    join = functools.partial(world.broker.join, "default", timeout=timeout, fail_fast=False)
    with world.started():
        world.record("join", world.attempt(join))
    world.cut_tracebacks()


@program(
    on_purpose="in a file, a message for an unknown actor waits for a worker that knows it",
    dramatiq={"last": ["ran"], "dead letters": [("nobody(1)", {"max_retries": 5})]},
    memory={"last": ["ran"], "dead letters": [("nobody(1)", {"max_retries": 5})]},
    file={"last": ["ran"], "left over": [1]},
)
def a_message_for_an_actor_that_nobody_knows(dramatiq, world):
    over = threading.Event()
    last = dramatiq.actor(over.set, actor_name="last")
    message = last.message(1).copy(actor_name="nobody", options={"max_retries": 5})
    world.broker.enqueue(message)
    last.send()
    world.work(until=over)
    world.record("last", "ran")


@program
def two_workers_one_after_the_other(dramatiq, world):
    note = noting(dramatiq, world)
    note.send(1)
    world.work()
    note.send(2)
    world.record("waiting", world.waiting())
    world.work()


@program
def a_worker_may_be_stopped_twice(dramatiq, world):
    noting(dramatiq, world).send(1)
    with world.started() as worker:
        world.join()
        world.record("joined", worker.join())
        world.record("stopped", [worker.stop(), worker.stop()])


@program
def a_paused_worker_runs_nothing(dramatiq, world):
    note = noting(dramatiq, world)
    with world.started() as worker:
        note.send(1)
        world.join()
        worker.pause()
        note.send(2)
        world.record("waiting", world.waiting())
        worker.resume()
        world.join()


@program
def an_actor_declared_while_a_worker_runs(dramatiq, world):
    with world.started():
        noting(dramatiq, world, name="late", queue_name="late").send(1)
        world.join()
