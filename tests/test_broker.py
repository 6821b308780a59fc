"""The broker base: declaring, looking up, enqueueing, the global broker."""

import logging
import sys
from unittest import mock

import pytest

import dramalite
from dramalite import Message, Middleware

from helpers import DEADLINE


class Declarations(Middleware):
    """Writes down what is declared: (hook, name)."""

    def __init__(self):
        self.calls = []

    def before_declare_actor(self, broker, actor):
        self.calls.append(("before_declare_actor", actor.actor_name))

    def after_declare_actor(self, broker, actor):
        self.calls.append(("after_declare_actor", actor.actor_name))

    def before_declare_queue(self, broker, queue_name):
        self.calls.append(("before_declare_queue", queue_name))

    def after_declare_queue(self, broker, queue_name):
        self.calls.append(("after_declare_queue", queue_name))

    def after_declare_delay_queue(self, broker, queue_name):
        self.calls.append(("after_declare_delay_queue", queue_name))


class Enqueued(Middleware):
    """Writes down what is enqueued: (hook, message, delay)."""

    def __init__(self):
        self.calls = []

    def before_enqueue(self, broker, message, delay):
        self.calls.append(("before", message, delay))

    def after_enqueue(self, broker, message, delay):
        self.calls.append(("after", message, delay))


# The global broker


def test_set_broker_replaces_the_global_broker():
    mine = dramalite.Broker()
    dramalite.set_broker(mine)

    assert dramalite.get_broker() is mine


def test_the_implicit_broker_is_a_file_broker_made_once(run_python):
    done = run_python(
        "import dramalite\n"
        "broker = dramalite.get_broker()\n"
        "print(type(broker).__name__, broker is dramalite.get_broker())\n"
    )

    assert (done.stdout.split(), done.stderr) == (["SQLiteBroker", "True"], "")


def test_the_implicit_broker_keeps_its_file_where_the_program_runs(run_python, tmp_path):
    done = run_python(
        "import dramalite\n"
        "@dramalite.actor\n"
        "def work(): pass\n"
        "work.send()\n"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "dramalite.db").exists()


def test_the_environment_names_the_file_of_the_implicit_broker(run_python, tmp_path):
    done = run_python(
        "import dramalite\n"
        "@dramalite.actor\n"
        "def work(): pass\n"
        "work.send()\n",
        DRAMALITE_DB=str(tmp_path / "elsewhere.db"),
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "elsewhere.db").exists()
    assert not (tmp_path / "dramalite.db").exists()


def test_importing_declaring_and_asking_for_the_broker_open_no_file(run_python, tmp_path):
    done = run_python(
        "import dramalite\n"
        "@dramalite.actor(queue_name='a', max_retries=1)\n"
        "def work(): pass\n"
        "class Mail(dramalite.GenericActor):\n"
        "    def perform(self): pass\n"
        "dramalite.get_broker()\n"
        "work.message()\n"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_is_set_late_takes_over_the_actors_declared_before(run_python, tmp_path):
    done = run_python(
        "import dramalite\n"
        "@dramalite.actor(queue_name='a')\n"
        "def work(): print('worked')\n"
        "class Mail(dramalite.GenericActor):\n"
        "    def perform(self): print('mailed')\n"
        "broker = dramalite.MemoryBroker()\n"
        "dramalite.set_broker(broker)\n"
        "assert work.broker is broker and broker.get_actor('work') is work\n"
        "assert Mail.broker is broker\n"
        "assert broker.get_declared_queues() == {'a', 'default'}\n"
        "work.send()\n"
        "Mail.send()\n"
        "with dramalite.Worker(broker, worker_threads=1):\n"
        "    broker.join('a', timeout=100000)\n"
        "    broker.join('default', timeout=100000)\n"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == ["mailed", "worked"]
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_is_set_late_takes_over_the_middleware_added_before(run_python):
    done = run_python(
        "import dramalite\n"
        "class Note(dramalite.Middleware):\n"
        "    actor_options = {'colour'}\n"
        "    def before_enqueue(self, broker, message, delay): print('heard of', message.actor_name)\n"
        "dramalite.get_broker().add_middleware(Note())\n"
        "@dramalite.actor(colour='red')\n"
        "def work(): pass\n"
        "broker = dramalite.MemoryBroker()\n"
        "kinds = [type(item) for item in broker.middleware]\n"
        "dramalite.set_broker(broker)\n"
        "assert [type(item) for item in broker.middleware] == [*kinds, Note]\n"
        "work.send()\n"
    )

    assert (done.stdout, done.stderr) == ("heard of work\n", "")


def test_a_broker_that_does_not_fit_all_actors_declared_before_is_refused_and_nothing_changes(run_python):
    done = run_python(
        "import dramalite\n"
        "actors = [dramalite.actor(print, actor_name=name, **options) for name, options in \n"
        "          [('first', {}), ('second', {'store_results': True}), ('third', {})]]\n"
        "implicit, stub, broker = dramalite.get_broker(), dramalite.StubBroker(), dramalite.MemoryBroker()\n"
        "try:\n"
        "    dramalite.set_broker(stub)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "assert dramalite.get_broker() is implicit\n"
        "assert [actor.broker for actor in actors] == [implicit] * 3 and not stub.actors\n"
        "dramalite.set_broker(broker)\n"
        "assert [actor.broker for actor in actors] == [broker] * 3\n"
    )

    assert "store_results" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_results_stay_where_the_messages_are_when_another_broker_is_refused(run_python):
    done = run_python(
        "import dramalite\n"
        "implicit, other = dramalite.get_broker(), dramalite.SQLiteBroker('other.db')\n"
        "implicit.add_middleware(dramalite.Results(store_results=True))\n"
        "work = dramalite.actor(lambda: 42, actor_name='work')\n"
        "dramalite.actor(print, actor_name='work', broker=other)\n"
        "kinds = [type(item) for item in other.middleware]\n"
        "try:\n"
        "    dramalite.set_broker(other)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "assert dramalite.get_broker() is implicit\n"
        "assert [type(item) for item in other.middleware] == kinds\n"
        "sent = work.send()\n"
        "with dramalite.Worker(implicit, worker_threads=1):\n"
        "    implicit.join('default', timeout=100000)\n"
        "found = dramalite.SQLiteBroker(implicit.path).get_results_backend().get_result(sent)\n"
        "try:\n"
        "    other.get_results_backend().get_result(sent)\n"
        "except dramalite.ResultMissing:\n"
        "    print('found', found)\n"
    )

    assert done.stdout == "An actor named 'work' is already registered.\nfound 42\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_middleware_added_beside_another_one_is_beside_it_on_the_broker_that_is_set_late(run_python):
    done = run_python(
        "import dramalite\n"
        "from dramalite import AgeLimit, Middleware, Retries\n"
        "Before, After, Nowhere = [type(name, (Middleware,), {}) for name in ('Before', 'After', 'Nowhere')]\n"
        "implicit, broker = dramalite.get_broker(), dramalite.MemoryBroker(middleware=[AgeLimit(), Retries()])\n"
        "implicit.add_middleware(Before(), before=Retries)\n"
        "implicit.add_middleware(After(), after=AgeLimit)\n"
        "implicit.add_middleware(Nowhere(), before=dramalite.TimeLimit)\n"
        "dramalite.set_broker(broker)\n"
        "print(*[type(item).__name__ for item in broker.middleware])\n"
    )

    assert (done.stdout, done.stderr) == ("AgeLimit After Before Retries Nowhere\n", "")


def test_a_broker_whose_add_middleware_knows_no_places_can_be_set_late(run_python):
    done = run_python(
        "import dramalite\n"
        "class Plain(dramalite.MemoryBroker):\n"
        "    def add_middleware(self, middleware):\n"
        "        super().add_middleware(middleware)\n"
        "mine = type('Mine', (dramalite.Middleware,), {})()\n"
        "dramalite.get_broker().add_middleware(mine)\n"
        "dramalite.set_broker(Plain())\n"
        "assert mine in dramalite.get_broker().middleware\n"
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_middleware_of_a_built_in_kind_keeps_its_place_on_the_broker_that_is_set_late(run_python):
    done = run_python(
        "import dramalite\n"
        "implicit, broker = dramalite.get_broker(), dramalite.MemoryBroker()\n"
        "implicit.add_middleware(dramalite.Results(store_results=True), before=dramalite.AgeLimit)\n"
        "dramalite.set_broker(broker)\n"
        "assert [type(item) for item in broker.middleware] == [type(item) for item in implicit.middleware]\n"
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_after_none_was_set_another_broker_is_made():
    dramalite.set_broker(None)
    first = dramalite.get_broker()
    dramalite.set_broker(None)
    second = dramalite.get_broker()

    assert [type(broker) for broker in (first, second)] == [dramalite.SQLiteBroker] * 2
    assert first is not second
    assert dramalite.get_broker() is second


def test_the_default_broker_is_read_and_set_by_the_name_it_has_in_dramatiqs_module(stub_broker, monkeypatch):
    module, mine = sys.modules["dramalite.broker"], dramalite.MemoryBroker()
    before = module.global_broker
    with monkeypatch.context() as patch:
        patch.setattr("dramalite.broker.global_broker", mine)
        meanwhile = dramalite.get_broker()
    after = dramalite.get_broker()
    dramalite.set_broker(None)

    assert (before, meanwhile, after) == (stub_broker, mine, stub_broker)
    assert module.global_broker is None


def test_a_patch_of_the_default_broker_is_undone(stub_broker):
    mine = dramalite.MemoryBroker()
    with mock.patch("dramalite.broker.global_broker", mine):
        meanwhile = dramalite.get_broker()

    assert (meanwhile, dramalite.get_broker()) == (mine, stub_broker)


def test_a_broker_that_was_set_on_purpose_keeps_its_actors(make_stub_broker):
    first = make_stub_broker()

    @dramalite.actor
    def work():
        pass

    second = make_stub_broker()

    assert work.broker is first
    assert second.get_declared_actors() == set()


# Declaring


def test_a_broker_knows_what_was_declared_on_it(broker):
    work = dramalite.actor(lambda: None, actor_name="work", queue_name="q")

    assert broker.actors == {"work": work}
    assert broker.get_declared_actors() == {"work"}
    assert broker.get_declared_queues() == {"q"}
    assert broker.get_declared_delay_queues() == {"q.DQ"}


def test_declared_queues_are_canonical_names_only(broker):
    broker.declare_queue("a")
    broker.declare_queue("b")

    assert broker.get_declared_queues() == {"a", "b"}
    assert broker.get_declared_delay_queues() == {"a.DQ", "b.DQ"}


def test_what_was_declared_is_given_as_fresh_sets(broker):
    broker.declare_queue("a")
    broker.get_declared_queues().clear()
    broker.get_declared_delay_queues().clear()
    broker.get_declared_actors().add("ghost")

    assert broker.get_declared_queues() == {"a"}
    assert broker.get_declared_delay_queues() == {"a.DQ"}
    assert broker.get_declared_actors() == set()


def test_declaring_an_actor_declares_its_queue_in_between(make_broker):
    declarations = Declarations()
    make_broker(middleware=[declarations])
    dramalite.actor(lambda: None, actor_name="work", queue_name="q")

    assert declarations.calls == [
        ("before_declare_actor", "work"),
        ("before_declare_queue", "q"),
        ("after_declare_queue", "q"),
        ("after_declare_delay_queue", "q.DQ"),
        ("after_declare_actor", "work"),
    ]


def test_declaring_a_queue_again_does_nothing(make_broker):
    declarations = Declarations()
    broker = make_broker(middleware=[declarations])
    broker.declare_queue("q")
    declarations.calls.clear()
    broker.declare_queue("q")

    assert declarations.calls == []
    assert broker.get_declared_queues() == {"q"}


def test_an_actor_is_found_by_its_name(broker):
    work = dramalite.actor(lambda: None, actor_name="work")

    assert broker.get_actor("work") is work


def test_an_unknown_actor_is_an_error_that_is_just_its_name(broker):
    with pytest.raises(dramalite.ActorNotFound) as raised:
        broker.get_actor("nobody")

    assert str(raised.value) == "nobody"


def test_a_broker_without_results_says_so(stub_broker):
    with pytest.raises(RuntimeError):
        stub_broker.get_results_backend()


def test_a_broker_that_keeps_results_gives_its_backend(broker):
    work = dramalite.actor(lambda: None, actor_name="work", store_results=True)
    backend = broker.get_results_backend()

    with pytest.raises(dramalite.ResultMissing):
        backend.get_result(work.send())


def test_what_is_no_message_is_refused_with_what_to_do(broker):
    work = dramalite.actor(print, actor_name="work")
    with pytest.raises(TypeError, match=r"no message; make one by actor\.message"):
        broker.enqueue(work)

    assert broker.pending() == []


def test_a_name_cannot_be_used_for_two_actors_of_a_broker(broker):
    first = dramalite.actor(lambda: 1, actor_name="foo")
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: 2, actor_name="foo")

    assert str(raised.value) == "An actor named 'foo' is already registered."
    assert broker.get_actor("foo") is first


def test_a_name_can_be_used_on_two_brokers(stub_broker, make_stub_broker):
    first = dramalite.actor(lambda: 1, actor_name="foo", broker=stub_broker)
    second = dramalite.actor(lambda: 2, actor_name="foo", broker=make_stub_broker())

    assert (first.broker is second.broker) is False


@pytest.mark.parametrize("verb", ["consume", "flush", "join"])
def test_the_base_broker_leaves_storage_to_its_subclasses(verb):
    with pytest.raises(NotImplementedError):
        getattr(dramalite.Broker(), verb)("default")


def test_closing_the_base_broker_does_nothing():
    assert dramalite.Broker().close() is None


# Enqueueing


def test_enqueue_returns_the_message_that_was_enqueued(broker):
    work = dramalite.actor(lambda: None, actor_name="work")
    message = work.message(1)

    assert broker.enqueue(message) == message


def test_a_delayed_message_goes_to_the_delay_queue_with_its_time(make_broker, clock):
    broker = make_broker(clock=clock)
    work = dramalite.actor(lambda: None, actor_name="work", queue_name="q")
    message = work.message_with_options(max_retries=1)
    enqueued = broker.enqueue(message, delay=1500)

    assert enqueued == message.copy(
        queue_name="q.DQ", options={"max_retries": 1, "eta": clock.time_ms() + 1500}
    )
    assert list(enqueued.options) == ["max_retries", "eta"]
    assert message.queue_name == "q"
    assert message.options == {"max_retries": 1}


def test_a_delay_of_zero_goes_through_the_delay_queue_too(make_broker, clock):
    make_broker(clock=clock)
    work = dramalite.actor(lambda: None, actor_name="work")
    enqueued = work.send_with_options(delay=0)

    assert enqueued.queue_name == "default.DQ"
    assert enqueued.options == {"eta": clock.time_ms()}


def test_a_delay_that_is_only_an_option_does_not_delay(broker, worker):
    done = []
    work = dramalite.actor(lambda: done.append(1), actor_name="work")
    enqueued = broker.enqueue(work.message_with_options(delay=3_600_000))
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert enqueued.queue_name == "default"
    assert done == [1]


@pytest.mark.parametrize("delay", [None, 0, 700])
def test_enqueue_hooks_see_the_message_as_stored_and_the_callers_delay(make_broker, clock, delay):
    hooks = Enqueued()
    make_broker(middleware=[hooks], clock=clock)
    work = dramalite.actor(lambda: None, actor_name="work")
    enqueued = work.send_with_options(delay=delay)

    assert hooks.calls == [("before", enqueued, delay), ("after", enqueued, delay)]


def test_what_a_hook_adds_to_the_options_is_stored(make_broker, worker):
    received = []

    class Tag(Middleware):
        def before_enqueue(self, broker, message, delay):
            message.options["tag"] = "blue"

        def before_process_message(self, broker, message):
            received.append(message.options)

    broker = make_broker(middleware=[Tag()])
    dramalite.actor(lambda: None, actor_name="work").send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert received == [{"tag": "blue"}]


def test_a_middleware_can_refuse_a_message_before_it_is_stored(make_broker, worker):
    done = []

    class NoTwos(Middleware):
        def before_enqueue(self, broker, message, delay):
            if message.args == (2,):
                raise dramalite.MiddlewareError("No twos.")

    hooks = Enqueued()
    broker = make_broker(middleware=[hooks, NoTwos()])
    work = dramalite.actor(done.append, actor_name="work")
    work.send(1)
    with pytest.raises(dramalite.MiddlewareError):
        work.send(2)
    work.send(3)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == [1, 3]
    assert [message.args for hook, message, _ in hooks.calls if hook == "after"] == [(1,), (3,)]


def test_any_other_error_in_before_enqueue_does_not_stop_the_message(make_broker, worker, caplog):
    done = []

    class Broken(Middleware):
        def before_enqueue(self, broker, message, delay):
            raise ValueError("broken")

    broker = make_broker(middleware=[Broken()])
    dramalite.actor(done.append, actor_name="work").send(1)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == [1]
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


def test_a_message_that_cannot_be_encoded_is_not_enqueued(make_broker, worker):
    done = []
    hooks = Enqueued()
    broker = make_broker(middleware=[hooks])
    work = dramalite.actor(done.append, actor_name="work")
    with pytest.raises(TypeError):
        broker.enqueue(Message("default", "work", (object(),), {}, {}))
    work.send("good")
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == ["good"]
    assert [message.args for hook, message, _ in hooks.calls if hook == "after"] == [("good",)]


@pytest.mark.parametrize("is_copy", [False, True], ids=["made", "copied"])
@pytest.mark.parametrize(
    "option, value",
    [
        ("priority", [1]),
        ("priority", "high"),
        ("priority", 10**20),
        ("max_crashes", 0),
        ("max_crashes", "x"),
        ("max_crashes", 10**20),
    ],
    ids=repr,
)
def test_a_messages_own_option_that_cannot_be_stored_is_refused_by_name_and_not_sent(
    broker, option, value, is_copy
):
    work = dramalite.actor(print, actor_name="work")
    message = Message("default", "work", (), {}, {option: value})
    if is_copy:
        message = work.message().copy(options={option: value})

    with pytest.raises((TypeError, ValueError), match=f"'work'.*{option}"):
        broker.enqueue(message)
    assert broker.pending() == []


def test_a_stub_broker_refuses_a_queue_that_nobody_declared(make_stub_broker):
    hooks = Enqueued()
    broker = make_stub_broker(middleware=[hooks])
    with pytest.raises(dramalite.QueueNotFound):
        broker.enqueue(Message("nowhere", "work", (), {}, {}))

    assert hooks.calls == []


def test_a_file_broker_takes_messages_for_a_queue_that_only_others_declare(
    make_file_broker, worker
):
    sender, receiver = make_file_broker(), make_file_broker()
    done = []
    dramalite.actor(done.append, actor_name="work", queue_name="elsewhere", broker=receiver)
    sender.enqueue(Message("elsewhere", "work", (1,), {}, {}))
    worker(receiver)
    receiver.join("elsewhere", timeout=DEADLINE * 1000)

    assert done == [1]


def test_many_messages_are_enqueued_in_one_go_and_in_order(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    broker.enqueue_many(work.message(number) for number in range(100))
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == list(range(100))


def test_enqueueing_many_runs_the_hooks_of_each(make_broker):
    hooks = Enqueued()
    broker = make_broker(middleware=[hooks])
    work = dramalite.actor(print, actor_name="work")
    messages = [work.message(1), work.message(2)]
    broker.enqueue_many(messages)

    assert [message for hook, message, _ in hooks.calls if hook == "before"] == messages
    assert [message for hook, message, _ in hooks.calls if hook == "after"] == messages


def test_of_many_messages_none_is_stored_if_one_cannot_be(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    with pytest.raises(TypeError):
        broker.enqueue_many([work.message(1), work.message({1}), work.message(3)])
    work.send("good")
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == ["good"]
