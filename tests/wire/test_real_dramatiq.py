"""The wire format against Dramatiq itself: what one of the two writes, the other reads and runs."""

from __future__ import annotations

import datetime
import importlib
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given

import dramalite

from helpers import DEADLINE, json_values, messages, wait_until

dramatiq = pytest.importorskip("dramatiq", reason="compares with Dramatiq, which is not installed")

for path in ("brokers.stub", "rate_limits.backends.stub"):
    importlib.import_module(f"dramatiq.{path}")

PATIENCE = int(DEADLINE * 1000)
SAMPLES = sorted(Path(__file__).parent.glob("*.json"))
BOTH = [
    pytest.param(dramalite, dramatiq, id="ours"),
    pytest.param(dramatiq, dramalite, id="theirs"),
]


@pytest.fixture
def real_broker():
    """Dramatiq's StubBroker, the global broker of Dramatiq."""
    broker = dramatiq.brokers.stub.StubBroker()
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.set_broker(dramatiq.brokers.stub.StubBroker(middleware=[]))


@pytest.fixture
def file_broker(make_file_broker):
    """A SQLiteBroker, the global broker of dramalite."""
    return make_file_broker()


@pytest.fixture
def work_off():
    """A function that has Dramatiq's or dramalite's worker work until a queue is done."""

    def work_off(broker, queue_name="default"):
        module = dramalite if isinstance(broker, dramalite.Broker) else dramatiq
        worker = module.Worker(broker, worker_threads=1, worker_timeout=10)
        worker.start()
        try:
            broker.join(queue_name, timeout=PATIENCE, fail_fast=False)
        finally:
            worker.stop(timeout=PATIENCE)

    return work_off


def step(module, name, calls, **options):
    """An actor that notes its name and arguments, and returns its name."""

    def work(*args, **kwargs):
        calls.append((name, *args, *sorted(kwargs.items())))
        return name

    return module.actor(work, actor_name=name, **options)


def move(source, target, queue_name="default"):
    """Carry the bytes of all waiting messages from one broker's queue to the other's."""
    queue = source.queues[queue_name]
    for _ in range(queue.qsize()):
        target.queues[queue_name].put(queue.get(timeout=DEADLINE))


def same(one, other):
    """Whether two messages, each of either module, have the same fields of the same types."""
    return repr(one.asdict()) == repr(other.asdict())


class Sent:
    """A mixin of middleware that keeps what was enqueued."""

    def __init__(self):
        self.messages = []
        self.arrived = threading.Event()

    def after_enqueue(self, broker, message, delay):
        self.messages.append(message)
        self.arrived.set()


# Samples


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_both_read_a_sample_as_the_same_message_and_write_it_as_it_was(path):
    data = path.read_bytes()
    theirs, ours = dramatiq.Message.decode(data), dramalite.Message.decode(data)

    assert same(ours, theirs)
    assert str(ours) == str(theirs)
    assert repr(ours) == repr(theirs)
    assert ours.encode() == theirs.encode() == data


# What actors and compositions make


def send_all_kinds(module):
    """Send messages with options of all kinds; return what was enqueued."""
    sent = type("Keep", (Sent, module.Middleware), {})()
    broker = module.get_broker()
    broker.add_middleware(sent)
    if not any(isinstance(m, module.middleware.GroupCallbacks) for m in broker.middleware):
        counters = dramatiq.rate_limits.backends.stub.StubBackend()
        broker.add_middleware(module.middleware.GroupCallbacks(counters))
    plain = module.actor(lambda *args, **kwargs: None, actor_name="plain")
    other = module.actor(
        lambda *_args: None, actor_name="other", queue_name="other.queue-1", max_retries=3
    )

    class Generic(module.GenericActor):
        class Meta:
            queue_name = "generic"

        def perform(self, value):
            pass

    plain.send()
    plain.send(1, -0.0, 1e100, 2**70, None, True)
    plain.send("é\u2028😀\x00", [[], [{}]], {"ключ": (1, 2)})
    plain.send(first="x", second={"deep": [1, {"er": None}]})
    Generic.send(5)
    plain.send_with_options(args=(1,), delay=1000)
    plain.send_with_options(delay=datetime.timedelta(hours=1), max_retries=0, eta_like="x")
    plain.send_with_options(
        kwargs={"a": 1},
        max_retries=2,
        min_backoff=5,
        max_backoff=10,
        max_age=60_000,
        time_limit=1000,
        notify_shutdown=True,
        store_results=True,
        result_ttl=5000,
        broker_priority=3,
    )
    plain.send_with_options(on_success=other, on_failure="plain", on_retry_exhausted="other")
    plain.send_with_options(on_success=None, tag={"free": ["form", 1.5]})
    ignoring = other.message_with_options(args=(2,), pipe_ignore=True, delay=50)
    (plain.message(1) | ignoring | plain.message()).run()
    (plain.message_with_options(delay=70) | other.message()).run(delay=60)
    module.group([plain.message(1), plain.message(2) | other.message()]).run()
    group = module.group([plain.message(1), plain.message(2) | other.message()])
    group.add_completion_callback(plain.message_with_options(args=("done",), tag=1))
    group.run(delay=5)
    return sent.messages


@pytest.fixture
def sent(real_broker, file_broker):
    """What send_all_kinds() sends, by module."""
    return {module: send_all_kinds(module) for module in (dramatiq, dramalite)}


@pytest.mark.parametrize(("writer", "reader"), BOTH)
def test_the_other_one_reads_and_writes_what_actors_send(sent, writer, reader):
    assert len(sent[writer]) == 16
    for message in sent[writer]:
        data = message.encode()
        read = reader.Message.decode(data)

        assert read.encode() == data
        assert same(read, writer.Message.decode(data))
        assert type(read) is reader.Message


def test_both_send_the_same_but_for_ids_and_times(sent):
    def shape(message):
        fields = json.loads(message.encode())
        return json.dumps(fields, indent=1).splitlines()

    for theirs, ours in zip(sent[dramatiq], sent[dramalite], strict=True):
        pairs = zip(shape(theirs), shape(ours), strict=True)
        differing = [one.split('"')[1] for one, other in pairs if one != other]

        assert set(differing) <= {"message_id", "message_timestamp", "eta", "group_completion_uuid"}
        assert "message_id" in differing


# All messages


@given(messages)
def test_both_write_any_message_as_the_same_bytes(message):
    theirs = dramatiq.Message(**message.asdict())

    assert message.encode() == theirs.encode()


@given(messages)
def test_both_read_any_message_alike(message):
    data = message.encode()
    theirs, ours = dramatiq.Message.decode(data), dramalite.Message.decode(data)

    assert same(ours, theirs)
    assert same(ours, message)
    assert str(ours) == str(theirs)


@given(messages)
def test_any_message_survives_being_copied_and_delayed_by_the_other(message):
    theirs = dramatiq.Message.decode(message.encode())
    options = {"eta": 5, "retries": 1}
    delayed = [m.copy(queue_name="q.DQ", options=options) for m in (message, theirs)]

    assert delayed[0].encode() == delayed[1].encode()


@given(json_values)
def test_both_write_any_value_as_the_same_bytes_and_read_it_alike(value):
    data = dramatiq.JSONEncoder().encode({"value": value})

    assert dramalite.JSONEncoder().encode({"value": value}) == data
    assert repr(dramalite.JSONEncoder().decode(data)) == repr(dramatiq.JSONEncoder().decode(data))


@given(messages)
def test_both_read_pickled_messages_of_each_other(message):
    fields = message.asdict()
    ours, theirs = dramalite.PickleEncoder(), dramatiq.PickleEncoder()

    assert theirs.decode(ours.encode(fields)) == fields
    assert ours.decode(theirs.encode(fields)) == fields


# Results


class Stop(BaseException):
    """An error without text."""


class Kept:
    """A mixin of result backends that keeps what is stored, encoded."""

    def __init__(self, **options):
        super().__init__(**options)
        self.stored = {}

    def _store(self, message_key, result, ttl):
        self.stored[message_key] = (self.encoder.encode(result), ttl)

    def _get(self, message_key):
        if message_key not in self.stored:
            return super()._get(message_key)
        return self.encoder.decode(self.stored[message_key][0])


@pytest.fixture
def result_backends():
    """A result backend of each, by module."""
    return {
        module: type("Backend", (Kept, module.results.ResultBackend), {})()
        for module in (dramatiq, dramalite)
    }


@given(message=messages, value=json_values)
def test_results_are_stored_under_the_same_key_as_the_same_bytes(message, value):
    stored = []
    for module in (dramatiq, dramalite):
        backend = type("Backend", (Kept, module.results.ResultBackend), {})(namespace="mine")
        backend.store_result(module.Message(**message.asdict()), value, 5000)
        stored.append(backend.stored)

    assert stored[0] == stored[1]


@pytest.mark.parametrize(("writer", "reader"), BOTH)
@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), OSError(2, "gone"), Stop()])
def test_the_other_one_raises_a_stored_failure(result_backends, writer, reader, error):
    fields = ("default", "work", (), {}, {}, "the-id", 5)
    result_backends[writer].store_exception(writer.Message(*fields), error, 5000)
    result_backends[reader].stored = result_backends[writer].stored
    with pytest.raises(reader.results.ResultFailure) as raised:
        result_backends[reader].get_result(reader.Message(*fields))

    kind = type(error).__name__
    assert (raised.value.orig_exc_type, raised.value.orig_exc_msg) == (kind, str(error))
    assert str(raised.value) == f"actor raised {kind}: {error}"


# At work


def test_a_message_from_a_file_is_run_by_a_worker_of_dramatiq(
    file_broker, real_broker, work_off, make_file_broker
):
    calls = []
    step(dramalite, "work", calls).send_with_options(args=(1, [2]), kwargs={"three": 3}, tag="x")
    file_broker.close()
    step(dramatiq, "work", calls)
    reopened = make_file_broker()
    reopened.declare_queue("default")
    move(reopened, real_broker)
    work_off(real_broker)

    assert calls == [("work", 1, [2], ("three", 3))]
    assert reopened.queues["default"].qsize() == 0
    assert real_broker.dead_letters == []


def test_a_message_of_dramatiq_is_run_by_a_worker_on_a_file(file_broker, real_broker, work_off):
    calls = []
    step(dramatiq, "work", calls).send_with_options(args=(1, [2]), kwargs={"three": 3}, tag="x")
    step(dramalite, "work", calls)
    move(real_broker, file_broker)
    work_off(file_broker)

    assert calls == [("work", 1, [2], ("three", 3))]
    assert file_broker.dead_letters == []


def test_a_delayed_message_of_dramatiq_is_run_when_it_is_due(file_broker, real_broker, work_off):
    calls = []
    step(dramatiq, "work", calls).send_with_options(args=(1,), delay=20)
    step(dramalite, "work", calls)
    file_broker.queues["default"].put(real_broker.queues["default.DQ"].get(timeout=DEADLINE))
    work_off(file_broker)

    assert calls == [("work", 1)]


def test_a_delayed_message_of_ours_is_run_by_dramatiq_when_it_is_due(
    file_broker, real_broker, work_off
):
    calls = []
    message = step(dramalite, "work", calls).send_with_options(args=(1,), delay=20)
    step(dramatiq, "work", calls)
    real_broker.queues[message.queue_name].put(message.encode())
    work_off(real_broker)

    assert message.queue_name == "default.DQ"
    assert calls == [("work", 1)]


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_a_pipeline_that_one_began_is_continued_by_the_other(
    file_broker, real_broker, work_off, first, second
):
    calls = []
    brokers = {dramatiq: real_broker, dramalite: file_broker}
    steps = [step(first, name, calls, queue_name=name) for name in ("a", "b", "c")]
    for name in ("a", "b", "c"):
        step(second, name, calls, queue_name=name)
    last = steps[2].message_with_options(args=("c's own",), pipe_ignore=True)
    (steps[0].message(1) | steps[1].message(2) | last).run()
    one = first.Worker(brokers[first], queues={"a"}, worker_threads=1, worker_timeout=10)
    one.start()
    try:
        wait_until(lambda: brokers[first].queues["b"].qsize() == 1)
    finally:
        one.stop(timeout=PATIENCE)
    move(brokers[first], brokers[second], "b")
    work_off(brokers[second], "b")
    work_off(brokers[second], "c")

    assert calls == [("a", 1), ("b", 2, "a"), ("c", "c's own")]


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_the_other_one_goes_on_counting_retries(file_broker, real_broker, work_off, first, second):
    attempts = []
    brokers = {dramatiq: real_broker, dramalite: file_broker}

    def work(module):
        def work():
            attempts.append(module)
            raise ValueError("no")

        return module.actor(work, max_retries=2, min_backoff=20_000 if module is first else 0)

    work(first).send()
    work(second)
    kept = type("Keep", (Sent, first.Middleware), {})()
    brokers[first].add_middleware(kept)
    worker = first.Worker(brokers[first], worker_threads=1, worker_timeout=10)
    worker.start()
    try:
        assert kept.arrived.wait(DEADLINE)
    finally:
        worker.stop(timeout=PATIENCE)
    retry = kept.messages[0].copy(queue_name="default", options={"eta": 5})
    brokers[second].queues["default"].put(retry.encode())
    work_off(brokers[second])
    (letter,) = brokers[second].dead_letters

    assert attempts == [first, second, second]
    assert letter.options["retries"] == 3
    assert letter.message_id == retry.message_id
    assert letter.options["traceback"].rstrip().endswith("ValueError: no")


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_a_dead_letter_of_one_can_be_repeated_on_the_other(
    file_broker, real_broker, work_off, first, second
):
    calls = []
    brokers = {dramatiq: real_broker, dramalite: file_broker}

    def work(value):
        raise ValueError("no")

    first.actor(work, max_retries=0).send("x")
    work_off(brokers[first])
    step(second, "work", calls)
    (letter,) = brokers[first].dead_letters
    brokers[second].queues["default"].put(letter.encode())
    work_off(brokers[second])

    assert calls == [("work", "x")]


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_a_callback_named_in_a_message_is_called_by_the_other(
    file_broker, real_broker, work_off, first, second
):
    called = []
    brokers = {dramatiq: real_broker, dramalite: file_broker}
    sent = step(first, "work", called).send_with_options(args=(1,), on_success="done")
    step(second, "work", called)
    step(second, "done", called)
    move(brokers[first], brokers[second])
    work_off(brokers[second])
    (_work, (_done, data, result)) = called

    assert result == "work"
    assert {**data, "args": tuple(data["args"])} == sent.asdict()


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_messages_keep_their_order_on_the_way(file_broker, real_broker, work_off, first, second):
    calls = []
    brokers = {dramatiq: real_broker, dramalite: file_broker}
    work = step(first, "work", calls)
    step(second, "work", calls)
    for number in range(10):
        work.send(number)
    move(brokers[first], brokers[second])
    work_off(brokers[second])

    assert calls == [("work", number) for number in range(10)]
