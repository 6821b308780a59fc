"""The middleware protocol: which hooks come when, in which order, and what an error in one does."""

import logging
import threading

import pytest

import dramalite
from dramalite import Middleware

from helpers import DEADLINE

MESSAGE_HOOKS = [
    "before_enqueue",
    "after_enqueue",
    "before_process_message",
    "after_process_message",
    "after_skip_message",
    "before_ack",
    "after_ack",
    "before_nack",
    "after_nack",
]
DECLARATION_HOOKS = [
    "before_declare_actor",
    "after_declare_actor",
    "before_declare_queue",
    "after_declare_queue",
    "after_declare_delay_queue",
]
WORKER_HOOKS = [
    "after_process_boot",
    "before_worker_boot",
    "after_worker_boot",
    "before_worker_shutdown",
    "after_worker_shutdown",
    "after_worker_thread_boot",
    "before_worker_thread_shutdown",
]
OTHER_HOOKS = [
    "before_delay_message",
    "after_consumer_thread_boot",
    "before_consumer_thread_shutdown",
]


class Recorder(Middleware):
    """Writes down the calls of hooks: (hook, arguments, keywords); watch() makes one."""

    def __init__(self):
        self.calls = []

    @property
    def hooks(self):
        return [hook for hook, _, _ in self.calls]


def watch(*hooks):
    """A middleware that records the calls of `hooks`."""

    def method(hook):
        def record(self, broker, *args, **kwargs):
            self.calls.append((hook, args, kwargs))

        return record

    return type("Watch", (Recorder,), {hook: method(hook) for hook in hooks})()


class Named(Middleware):
    """Writes its name into a shared list whenever a message is about to be processed or was."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def before_process_message(self, broker, message):
        self.log.append(("before", self.name))

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self.log.append(("after", self.name))


class First(Named):
    pass


class Second(Named):
    pass


def names(broker):
    return [type(item).__name__ for item in broker.middleware]


@pytest.mark.parametrize("hook", MESSAGE_HOOKS + DECLARATION_HOOKS + WORKER_HOOKS + OTHER_HOOKS)
def test_the_base_class_has_every_hook(hook):
    assert callable(getattr(Middleware(), hook))


def test_a_middleware_without_overrides_adds_no_options_and_no_forks():
    assert Middleware().actor_options == set()
    assert Middleware().forks == []


def test_the_default_middleware_are_dramatiqs_in_its_order():
    assert [cls.__name__ for cls in dramalite.default_middleware] == [
        "AgeLimit",
        "TimeLimit",
        "ShutdownNotifications",
        "Callbacks",
        "Pipelines",
        "Retries",
    ]


def test_a_broker_without_a_list_has_one_of_each_default_middleware(stub_broker):
    assert [type(item) for item in stub_broker.middleware] == dramalite.default_middleware


def test_a_broker_with_an_empty_list_has_no_middleware(make_stub_broker):
    assert make_stub_broker(middleware=[]).middleware == []


def test_a_broker_keeps_the_given_middleware_in_order(make_stub_broker):
    first, second = First("first", []), Second("second", [])

    assert make_stub_broker(middleware=[second, first]).middleware == [second, first]


def test_the_legal_actor_options_are_those_of_the_default_middleware(stub_broker):
    crash_options = {"on_crash", "max_crashes"}

    assert stub_broker.actor_options - crash_options == {
        "backoff",
        "max_age",
        "max_backoff",
        "max_retries",
        "min_backoff",
        "notify_shutdown",
        "on_failure",
        "on_retry_exhausted",
        "on_success",
        "pipe_ignore",
        "pipe_target",
        "retry_when",
        "throws",
        "time_limit",
    }


def test_brokers_that_keep_results_know_the_results_options(broker):
    assert {"store_results", "result_ttl"} <= broker.actor_options


# Adding


def test_added_middleware_goes_last(make_stub_broker):
    broker = make_stub_broker(middleware=[First("", [])])
    broker.add_middleware(Second("", []))

    assert names(broker) == ["First", "Second"]


def test_middleware_can_be_added_before_a_class(make_stub_broker):
    broker = make_stub_broker(middleware=[First("", []), dramalite.AgeLimit()])
    broker.add_middleware(Second("", []), before=dramalite.AgeLimit)

    assert names(broker) == ["First", "Second", "AgeLimit"]


def test_middleware_can_be_added_after_a_class(make_stub_broker):
    broker = make_stub_broker(middleware=[First("", []), dramalite.AgeLimit()])
    broker.add_middleware(Second("", []), after=First)

    assert names(broker) == ["First", "Second", "AgeLimit"]


def test_a_place_is_found_by_a_base_class_too(make_stub_broker):
    broker = make_stub_broker(middleware=[dramalite.AgeLimit(), First("", []), Second("", [])])
    broker.add_middleware(Middleware(), before=Named)

    assert names(broker) == ["AgeLimit", "Middleware", "First", "Second"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_place_beside_a_class_that_is_not_there_is_refused(make_stub_broker, place):
    broker = make_stub_broker(middleware=[First("", [])])
    with pytest.raises(ValueError):
        broker.add_middleware(Middleware(), **{place: Second})

    assert names(broker) == ["First"]


def test_a_bad_place_for_what_takes_the_place_of_a_built_in_one_changes_nothing(broker):
    class MyResults(dramalite.Results):
        pass

    before, backend = list(broker.middleware), broker.get_results_backend()
    with pytest.raises(ValueError):
        broker.add_middleware(MyResults(backend=dramalite.StubResultBackend()), before=First)

    assert broker.middleware == before
    assert broker.get_results_backend() is backend


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_takes_the_place_of_a_built_in_one_may_name_that_place(broker, place):
    class MyCurrentMessage(dramalite.CurrentMessage):
        pass

    before = names(broker)
    broker.add_middleware(MyCurrentMessage(), **{place: dramalite.CurrentMessage})

    assert names(broker) == [{"CurrentMessage": "MyCurrentMessage"}.get(name, name) for name in before]


def test_before_and_after_exclude_each_other(make_stub_broker):
    broker = make_stub_broker(middleware=[First("", [])])
    with pytest.raises(AssertionError):
        broker.add_middleware(Middleware(), before=First, after=First)

    assert names(broker) == ["First"]


def test_a_second_middleware_of_a_type_is_added_with_a_warning(make_stub_broker, caplog):
    broker = make_stub_broker(middleware=[First("", [])])
    caplog.clear()
    broker.add_middleware(First("", []))

    assert names(broker) == ["First", "First"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_is_made_for_the_package_dramatiq_is_refused(make_stub_broker):
    base = type("Middleware", (), {"__module__": "dramatiq.middleware.middleware"})
    broker = make_stub_broker()
    before = list(broker.middleware)

    with pytest.raises(TypeError, match="must be imported from dramalite"):
        broker.add_middleware(type("Guard", (base,), {})())
    with pytest.raises(TypeError, match="package dramatiq's"):
        broker.enqueue(type("Message", (), {"__module__": "dramatiq.message"})())
    assert broker.middleware == before


def test_a_class_in_place_of_an_instance_is_refused_and_not_added(make_stub_broker):
    broker = make_stub_broker(middleware=[])
    with pytest.raises(TypeError):
        broker.add_middleware(First)

    assert broker.middleware == []


@pytest.mark.parametrize("junk", ["Retries", object(), None], ids=["a name", "an object", "nothing"])
def test_what_is_no_middleware_is_refused_and_not_added(make_stub_broker, junk):
    broker = make_stub_broker(middleware=[First("", [])])
    with pytest.raises(TypeError, match="no middleware"):
        broker.add_middleware(junk)

    assert names(broker) == ["First"]


def test_a_middlewares_options_become_legal_when_it_is_added(make_stub_broker):
    class Colour(Middleware):
        @property
        def actor_options(self):
            return {"colour"}

    broker = make_stub_broker(middleware=[])
    before = set(broker.actor_options)
    broker.add_middleware(Colour())

    @dramalite.actor(colour="red")
    def paint():
        pass

    assert broker.actor_options - before == {"colour"}
    assert paint.options == {"colour": "red"}


def test_late_middleware_hears_of_what_was_declared_before(stub_broker):
    @dramalite.actor(queue_name="colours")
    def paint():
        pass

    late = watch(*DECLARATION_HOOKS)
    stub_broker.add_middleware(late)

    assert sorted((hook, args[0]) for hook, args, _ in late.calls if hook != "after_declare_actor") == [
        ("after_declare_delay_queue", "colours.DQ"),
        ("after_declare_queue", "colours"),
    ]
    assert [args for hook, args, _ in late.calls if hook == "after_declare_actor"] == [(paint,)]


# Emitting


def test_before_hooks_run_in_order_and_after_hooks_in_reverse(make_broker, worker):
    log = []
    broker = make_broker(middleware=[First("first", log), Second("second", log)])

    @dramalite.actor
    def work():
        log.append("work")

    work.send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert log == [
        ("before", "first"),
        ("before", "second"),
        "work",
        ("after", "second"),
        ("after", "first"),
    ]


def test_emit_before_and_emit_after_call_any_hook_by_name(make_stub_broker):
    class Bell(Middleware):
        def __init__(self):
            self.rung = []

        def before_bell(self, broker, *args, **kwargs):
            self.rung.append(("before", broker, args, kwargs))

        def after_bell(self, broker, *args, **kwargs):
            self.rung.append(("after", broker, args, kwargs))

    bell = Bell()
    broker = make_stub_broker(middleware=[bell])
    broker.emit_before("bell", 1, loud=True)
    broker.emit_after("bell", 2)

    assert bell.rung == [("before", broker, (1,), {"loud": True}), ("after", broker, (2,), {})]


def failing(hook, error):
    """A middleware whose `hook` raises `error`."""

    def fail(self, broker, *args, **kwargs):
        raise error

    return type("Failing", (Middleware,), {hook: fail})()


@pytest.mark.parametrize("hook", ["before_process_message", "after_process_message", "before_ack"])
def test_an_error_in_a_hook_is_logged_and_the_work_goes_on(make_broker, worker, caplog, hook):
    broker = make_broker(middleware=[failing(hook, ValueError("broken hook"))])
    done = []

    @dramalite.actor
    def work(number):
        done.append(number)

    work.send(1)
    work.send(2)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)
    critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]

    assert done == [1, 2]
    assert len(critical) == 2
    assert all(record.exc_info for record in critical)


def test_an_error_in_a_before_hook_does_not_keep_the_others_from_theirs(make_stub_broker):
    later = watch("before_worker_boot")
    broker = make_stub_broker(middleware=[failing("before_worker_boot", ValueError()), later])
    broker.emit_before("worker_boot", None)

    assert later.hooks == ["before_worker_boot"]


def test_a_middleware_error_in_a_before_hook_propagates_and_stops_the_chain(make_stub_broker):
    later = watch("before_worker_boot")
    refusal = dramalite.MiddlewareError("no")
    broker = make_stub_broker(middleware=[failing("before_worker_boot", refusal), later])
    with pytest.raises(dramalite.MiddlewareError) as raised:
        broker.emit_before("worker_boot", None)

    assert raised.value is refusal
    assert later.hooks == []


@pytest.mark.parametrize("error", [ValueError("v"), dramalite.MiddlewareError("m")])
def test_every_exception_in_an_after_hook_is_logged_and_swallowed(make_stub_broker, caplog, error):
    earlier = watch("after_worker_boot")
    broker = make_stub_broker(middleware=[earlier, failing("after_worker_boot", error)])
    broker.emit_after("worker_boot", None)

    assert earlier.hooks == ["after_worker_boot"]
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_in_a_hook_propagates(make_stub_broker, moment):
    broker = make_stub_broker(middleware=[failing(f"{moment}_worker_boot", KeyboardInterrupt())])
    emit = broker.emit_before if moment == "before" else broker.emit_after
    with pytest.raises(KeyboardInterrupt):
        emit("worker_boot", None)

    assert names(broker) == ["Failing"]


# What a message goes through


PROCESSING = MESSAGE_HOOKS[2:]


def run_one(make_broker, worker, body, middleware):
    """Send one message to an actor with `body` on a broker with `middleware`; wait until it ended."""
    broker = make_broker(middleware=middleware)
    work = dramalite.actor(body, actor_name="work")
    sent = work.send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)
    return sent


def test_the_hooks_of_a_success(make_broker, worker):
    recorder = watch(*MESSAGE_HOOKS)
    sent = run_one(make_broker, worker, lambda: 42, [recorder])

    assert recorder.hooks == [
        "before_enqueue",
        "after_enqueue",
        "before_process_message",
        "after_process_message",
        "before_ack",
        "after_ack",
    ]
    assert recorder.calls[1] == ("after_enqueue", (sent, None), {})
    assert {args[0].message_id for _, args, _ in recorder.calls} == {sent.message_id}
    assert recorder.calls[3][2]["result"] == 42
    assert recorder.calls[3][2].get("exception") is None


def test_the_hooks_of_a_failure_that_is_retried(make_broker, worker):
    recorder = watch(*PROCESSING)
    error = ValueError("once")
    failures = [error]

    def work():
        if failures:
            raise failures.pop()
        return "done"

    retries = dramalite.Retries(max_retries=1, min_backoff=1, max_backoff=1)
    run_one(make_broker, worker, work, [recorder, retries])
    once = ["before_process_message", "after_process_message", "before_ack", "after_ack"]

    assert recorder.hooks == once + once
    assert recorder.calls[1][2]["exception"] is error
    assert recorder.calls[1][2].get("result") is None
    assert recorder.calls[5][2]["result"] == "done"
    assert recorder.calls[5][2].get("exception") is None


def test_a_retry_is_enqueued_with_its_delay_before_the_ack(make_broker, worker):
    recorder = watch("before_enqueue", "after_enqueue", "after_process_message", "before_ack")
    failures = [ValueError("once")]

    def work():
        if failures:
            raise failures.pop()

    retries = dramalite.Retries(max_retries=1, min_backoff=2, max_backoff=2)
    run_one(make_broker, worker, work, [recorder, retries])

    # Retries comes last in the list, so that its after hook runs before the recorder's.
    assert recorder.hooks[:6] == [
        "before_enqueue",
        "after_enqueue",
        "before_enqueue",
        "after_enqueue",
        "after_process_message",
        "before_ack",
    ]
    assert recorder.calls[0][1][1] is None
    assert 1 <= recorder.calls[2][1][1] <= 2


def test_the_hooks_of_a_final_failure(make_broker, worker):
    recorder = watch(*PROCESSING)

    def work():
        raise ValueError("always")

    run_one(make_broker, worker, work, [recorder, dramalite.Retries(max_retries=0)])

    assert recorder.hooks == [
        "before_process_message",
        "after_process_message",
        "before_nack",
        "after_nack",
    ]
    assert isinstance(recorder.calls[1][2]["exception"], ValueError)


def test_the_hooks_of_a_skipped_message(make_broker, worker):
    first, last = watch(*PROCESSING), watch(*PROCESSING)
    skip = failing("before_process_message", dramalite.SkipMessage("not now"))
    run_one(make_broker, worker, lambda: None, [first, skip, last])

    assert first.hooks == [
        "before_process_message",
        "after_skip_message",
        "before_ack",
        "after_ack",
    ]
    assert last.hooks == ["after_skip_message", "before_ack", "after_ack"]


def test_a_skipped_message_that_was_failed_is_rejected(make_broker, worker):
    class Refuse(Middleware):
        def before_process_message(self, broker, message):
            message.fail()
            raise dramalite.SkipMessage("never")

    recorder = watch(*PROCESSING)
    run_one(make_broker, worker, lambda: None, [recorder, Refuse()])

    assert recorder.hooks == [
        "before_process_message",
        "after_skip_message",
        "before_nack",
        "after_nack",
    ]


def test_a_message_failed_before_its_turn_is_not_run(make_broker, worker):
    class Fail(Middleware):
        def before_process_message(self, broker, message):
            message.fail()

    ran = []
    recorder = watch(*PROCESSING)
    run_one(make_broker, worker, lambda: ran.append(1), [recorder, Fail()])

    assert ran == []
    assert recorder.hooks == [
        "before_process_message",
        "after_process_message",
        "before_nack",
        "after_nack",
    ]


def test_a_middleware_error_before_processing_counts_as_the_jobs_failure(make_broker, worker):
    ran = []
    recorder = watch("after_process_message")
    refuse = failing("before_process_message", dramalite.MiddlewareError("no"))
    run_one(
        make_broker,
        worker,
        lambda: ran.append(1),
        [recorder, refuse, dramalite.Retries(max_retries=0)],
    )

    assert ran == []
    assert isinstance(recorder.calls[0][2]["exception"], dramalite.MiddlewareError)


def test_a_message_for_an_unknown_actor_is_only_rejected(make_stub_broker, worker):
    recorder = watch(*PROCESSING)
    broker = make_stub_broker(middleware=[recorder])
    broker.declare_queue("default")
    broker.enqueue(dramalite.Message("default", "nobody", (), {}, {}))
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000, fail_fast=False)

    assert recorder.hooks == ["before_nack", "after_nack"]


def test_processing_hooks_get_a_proxy_that_can_be_failed(make_broker, worker):
    seen = []

    class Peek(Middleware):
        def before_process_message(self, broker, message):
            seen.append((isinstance(message, dramalite.MessageProxy), message.failed))

    run_one(make_broker, worker, lambda: None, [Peek()])

    assert seen == [(True, False)]


def test_hooks_run_on_the_thread_that_does_the_work(make_broker, worker):
    threads = []

    class Where(Middleware):
        def before_process_message(self, broker, message):
            threads.append(threading.get_ident())

        def after_process_message(self, broker, message, *, result=None, exception=None):
            threads.append(threading.get_ident())

    run_one(make_broker, worker, lambda: threads.append(threading.get_ident()), [Where()])

    assert len(threads) == 3
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


def test_what_an_after_hook_enqueues_is_sent(make_broker, worker):
    received = []

    class Echo(Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if message.actor_name == "work":
                broker.get_actor("echo").send(result)

    broker = make_broker(middleware=[Echo()])

    @dramalite.actor
    def work():
        return "result"

    @dramalite.actor
    def echo(value):
        received.append(value)

    work.send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert received == ["result"]


# What a worker goes through


def test_the_hooks_of_a_workers_life(make_broker):
    recorder = watch(*WORKER_HOOKS)
    broker = make_broker(middleware=[recorder])
    worker = dramalite.Worker(broker, worker_threads=2)
    worker.start()
    worker.stop()
    hooks = recorder.hooks

    assert hooks[0] == "before_worker_boot"
    assert hooks[-1] == "after_worker_shutdown"
    assert hooks.count("after_worker_boot") == 1
    assert hooks.count("after_worker_thread_boot") == 2
    assert hooks.count("before_worker_thread_shutdown") == 2
    assert hooks.index("after_worker_boot") < hooks.index("before_worker_shutdown")
    assert hooks.index("before_worker_shutdown") < hooks.index("before_worker_thread_shutdown")
    assert "after_process_boot" not in hooks


def test_worker_hooks_get_the_worker(make_broker):
    hooks = ["before_worker_boot", "after_worker_boot", "before_worker_shutdown"]
    recorder = watch(*hooks, "after_worker_shutdown")
    worker = dramalite.Worker(make_broker(middleware=[recorder]), worker_threads=1)
    worker.start()
    worker.stop()

    assert [args for _, args, _ in recorder.calls] == [(worker,)] * 4


def test_worker_thread_hooks_run_on_that_thread(make_broker):
    seen = []

    class Threads(Middleware):
        def after_worker_thread_boot(self, broker, thread):
            seen.append(("boot", thread, threading.get_ident()))

        def before_worker_thread_shutdown(self, broker, thread):
            seen.append(("shutdown", thread, threading.get_ident()))

    worker = dramalite.Worker(make_broker(middleware=[Threads()]), worker_threads=1)
    worker.start()
    worker.stop()

    assert [moment for moment, _, _ in seen] == ["boot", "shutdown"]
    assert [thread.ident for _, thread, _ in seen] == [ident for _, _, ident in seen]
    assert threading.get_ident() not in {ident for _, _, ident in seen}


class Announces(dramalite.Middleware):
    """Sends a message before each job of an actor."""

    def __init__(self, announced, notice):
        self.announced, self.notice = announced, notice

    def before_process_message(self, broker, message):
        if message.actor_name == self.announced.actor_name:
            self.notice.send(message.message_id)


def test_what_a_hook_sends_before_a_job_need_not_wait_for_its_end(broker, worker):
    told = threading.Event()
    job = dramalite.actor(lambda: told.wait(DEADLINE) or 1 / 0, actor_name="job", max_retries=0)
    notice = dramalite.actor(lambda _id: told.set(), actor_name="notice")
    broker.add_middleware(Announces(job, notice))
    job.send()
    worker(broker, worker_threads=2)
    broker.join("default", timeout=DEADLINE * 1000, fail_fast=False)

    assert broker.dead_letters == []


def test_a_group_that_a_hook_sends_before_a_job_is_whole_before_its_end(broker, worker):
    told = threading.Event()
    job = dramalite.actor(lambda: told.wait(DEADLINE) or 1 / 0, actor_name="job", max_retries=0)
    part = dramalite.actor(lambda: 1, actor_name="part")
    end = dramalite.actor(lambda results: results == [1] and told.set(), actor_name="end", max_retries=0)

    class FansOut(dramalite.Middleware):
        def before_process_message(self, broker, message):
            if message.actor_name == "job":
                (dramalite.group([part.message()]) | end.message()).run()

    broker.add_middleware(FansOut())
    job.send()
    worker(broker, worker_threads=2)
    broker.join("default", timeout=DEADLINE * 1000, fail_fast=False)

    assert broker.dead_letters == []


def test_what_a_hook_sends_before_a_job_is_not_lost_with_it(make_broker):
    broker = make_broker()
    job = dramalite.actor(lambda: sim.crash(), actor_name="job", on_crash="fail")
    notices = []
    notice = dramalite.actor(notices.append, actor_name="notice")
    broker.add_middleware(Announces(job, notice))
    with dramalite.simulate(broker) as sim:
        sent = job.send()
        sim.run_until_idle()
        outcomes = [event.outcome for event in sim.events if event.actor == "job"]

    assert outcomes[-1] == "dead"
    assert notices == [sent.message_id]


def test_a_hook_after_the_actor_may_set_what_built_in_middleware_heeds(broker, worker):
    got = []
    job = dramalite.actor(lambda: 42, actor_name="job")
    following = dramalite.actor(got.append, actor_name="following")

    class Chains(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if message.actor_name == "job":
                message.options["pipe_target"] = following.message().asdict()

    broker.add_middleware(Chains())
    job.send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert got == [42]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_a_hook_has_wrapped_is_the_one_that_runs(broker, worker, is_async):
    ran = []

    class Wraps(dramalite.Middleware):
        def before_declare_actor(self, broker, actor):
            inner = actor.fn
            actor.fn = lambda *args: ran.append("outside") or inner(*args)

    async def coroutine():
        ran.append("inside")

    broker.add_middleware(Wraps())
    dramalite.actor(coroutine if is_async else lambda: ran.append("inside"), actor_name="job").send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert ran == ["outside", "inside"]
