"""Dramatiq's module paths under our name: a move in either direction changes the root of an import."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import shutil
import sys
import textwrap
import typing
from pathlib import Path

import pytest

import dramalite

#: What Dramatiq's users import from where: its documented modules and their public names.
DOCUMENTED = {
    "": "Actor GenericActor actor Broker Consumer MessageProxy get_broker set_broker group pipeline Encoder "
    "JSONEncoder PickleEncoder DramatiqError BrokerError DecodeError ActorNotFound QueueNotFound QueueJoinTimeout "
    "BrokerConnectionError ConnectionClosed ConnectionFailed RateLimitExceeded Retry get_logger Message "
    "get_encoder set_encoder Middleware Worker",
    "actor": "Actor actor",
    "asyncio": "async_to_sync",
    "broker": "ActorNotFound Broker Consumer MessageProxy get_broker set_broker",
    "brokers": "",
    "brokers.stub": "QueueNotFound StubBroker",
    "composition": "group pipeline",
    "encoder": "Encoder JSONEncoder PickleEncoder",
    "errors": "ActorNotFound BrokerConnectionError BrokerError ConnectionClosed ConnectionFailed DecodeError "
    "DramatiqError QueueJoinTimeout QueueNotFound RateLimitExceeded Retry",
    "generic": "GenericActor",
    "logging": "get_logger",
    "message": "Message get_encoder set_encoder",
    "middleware": "Middleware MiddlewareError SkipMessage Interrupt raise_thread_exception AgeLimit AsyncIO "
    "Callbacks CurrentMessage GroupCallbacks Pipelines Retries Shutdown ShutdownNotifications TimeLimit "
    "TimeLimitExceeded default_middleware Prometheus",
    "middleware.age_limit": "AgeLimit",
    "middleware.asyncio": "AsyncIO",
    "middleware.callbacks": "Callbacks",
    "middleware.current_message": "CurrentMessage",
    "middleware.group_callbacks": "GroupCallbacks",
    "middleware.middleware": "Middleware MiddlewareError SkipMessage",
    "middleware.pipelines": "Pipelines",
    "middleware.prometheus": "Prometheus",
    "middleware.retries": "Retries",
    "middleware.shutdown": "Shutdown ShutdownNotifications",
    "middleware.threading": "Interrupt raise_thread_exception",
    "middleware.time_limit": "TimeLimit TimeLimitExceeded",
    "rate_limits": "Barrier BucketRateLimiter ConcurrentRateLimiter RateLimiter RateLimiterBackend "
    "RateLimitExceeded WindowRateLimiter",
    "rate_limits.backends": "",
    "rate_limits.barrier": "Barrier",
    "rate_limits.bucket": "BucketRateLimiter",
    "rate_limits.concurrent": "ConcurrentRateLimiter",
    "rate_limits.rate_limiter": "RateLimitExceeded RateLimiter",
    "rate_limits.window": "WindowRateLimiter",
    "results": "Missing ResultBackend ResultError ResultFailure ResultMissing ResultTimeout Results",
    "results.backend": "Missing ResultBackend ResultMissing ResultTimeout",
    "results.backends": "",
    "results.errors": "ResultError ResultFailure ResultMissing ResultTimeout",
    "results.middleware": "Results",
    "threading": "Interrupt raise_thread_exception",
    "worker": "Worker",
}

#: Names that stand for something of another name here, since one name can't be two things in one module.
RENAMED = {
    ("rate_limits.backends", "StubBackend"): "StubRateLimiterBackend",
    ("rate_limits.backends.stub", "StubBackend"): "StubRateLimiterBackend",
    ("results.backends", "StubBackend"): "StubResultBackend",
    ("results.backends.stub", "StubBackend"): "StubResultBackend",
}

#: Constants of Dramatiq that code imports to build on them, where they are and what they are.
CONSTANTS = {
    ("cli", "RET_OK"): 0,
    ("cli", "RET_KILLED"): 1,
    ("cli", "RET_IMPORT"): 2,
    ("cli", "RET_CONNECT"): 3,
    ("cli", "RET_PIDFILE"): 4,
    ("middleware.retries", "DEFAULT_MIN_BACKOFF"): 15_000,
    ("middleware.retries", "DEFAULT_MAX_BACKOFF"): 7 * 86_400_000,
    ("results.backend", "DEFAULT_TIMEOUT"): 10_000,
    ("results.middleware", "DEFAULT_RESULT_TTL"): 600_000,
}

#: Modules of Dramatiq that are left out, and why.
MODULES_LEFT_OUT = {
    "__main__": "`python -m dramalite worker` is the command",
    "brokers.rabbitmq": "another server's broker",
    "brokers.redis": "another server's broker",
    "canteen": "internal: how its processes share memory",
    "compat": "internal",
    "rate_limits.backends.memcached": "another server's backend",
    "rate_limits.backends.redis": "another server's backend",
    "results.backends.memcached": "another server's backend",
    "results.backends.redis": "another server's backend",
    "results.result": "internal: how it wraps stored results",
    "watcher": "internal: --watch by a third-party package",
}

#: Names of Dramatiq that are left out, and why.
NAMES_LEFT_OUT = {
    "ConsumerThread": "a worker here has no threads that feed others",
    "WorkerThread": "internal to a worker",
    "EventLoopThread": "the loop starts by itself",
    "set_event_loop_thread": "the loop starts by itself",
    "current_platform": "internal",
    "supported_platforms": "internal",
    "is_gevent_active": "gevent is not supported",
    "MemcachedBackend": "another server's backend",
    "RedisBackend": "another server's backend",
    "ActorDecorator": "internal: a type of its annotations",
    "generic_actor": "internal: the metaclass of GenericActor",
    "generate_unique_id": "internal",
    **dict.fromkeys(
        ["compute_backoff", "getenv", "getenv_int", "iter_queue", "join_all", "join_queue"], "internal helpers"
    ),
    **dict.fromkeys(
        [
            "folder_path", "fork_process", "import_broker", "import_object", "make_logging_setup", "remove_pidfile",
            "setup_fork_logging", "setup_parent_logging", "setup_pidfile", "setup_worker_logging", "try_block_signals",
            "try_unblock_signals", "watch_logs", "worker_fork_timeout_type", "worker_process",
        ],
        "internal to the command line",
    ),
}


def ours(path):
    return importlib.import_module(f"dramalite.{path}" if path else "dramalite")


# Names


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: path or "dramalite")
def test_a_module_of_dramatiq_has_its_names_and_they_are_our_own(path):
    module = ours(path)
    names = DOCUMENTED[path].split()

    assert {name: getattr(module, name, None) for name in names} == {
        name: getattr(dramalite, name) for name in names
    }


@pytest.mark.parametrize(("place", "name"), RENAMED.items(), ids=lambda value: "".join(value[:1]))
def test_names_that_would_collide_are_told_apart_in_the_flat_module(place, name):
    path, short = place

    assert getattr(ours(path), short) is getattr(dramalite, name)


def test_the_backends_on_the_brokers_file_are_beside_those_for_tests():
    from dramalite.rate_limits.backends import SQLiteBackend as RateLimiterBackend
    from dramalite.results.backends import SQLiteBackend as ResultBackend

    assert RateLimiterBackend is dramalite.SQLiteRateLimiterBackend
    assert ResultBackend is dramalite.SQLiteResultBackend


def test_constants_are_where_dramatiq_has_them_and_of_its_values():
    assert {place: getattr(ours(place[0]), place[1], None) for place in CONSTANTS} == CONSTANTS


def test_types_of_results_stand_in_annotations_of_custom_backends():
    from dramalite.results.backend import MResult, Result

    def get(message_key: str) -> MResult: ...

    def store(message_key: str, result: Result, ttl: int) -> None: ...

    assert typing.get_type_hints(get, localns=locals())["return"] is MResult
    assert typing.get_type_hints(store, localns=locals())["result"] is Result


def test_all_names_of_a_module_can_be_imported_with_a_star():
    namespace = {}
    exec("from dramalite.middleware import *", namespace)

    assert namespace["Retries"] is dramalite.Retries
    assert [name for name in namespace if name.startswith("_") and name != "__builtins__"] == []


def test_modules_are_attributes_of_those_that_they_are_in():
    import dramalite.brokers.stub
    import dramalite.middleware.time_limit
    import dramalite.results.backends

    assert dramalite.brokers.stub.StubBroker is dramalite.StubBroker
    assert dramalite.middleware.time_limit.TimeLimit is dramalite.TimeLimit
    assert dramalite.results.backends.StubBackend is dramalite.StubResultBackend


def test_the_decorator_is_not_hidden_by_the_module_of_its_name():
    import dramalite.actor  # noqa: F401

    assert dramalite.actor is sys.modules["dramalite.actor"].actor
    assert callable(dramalite.actor)


def test_a_module_that_dramatiq_has_not_is_none_of_ours():
    with pytest.raises(ImportError):
        importlib.import_module("dramalite.no_such_module")


def test_a_module_says_what_it_is():
    import dramalite.middleware

    assert dramalite.middleware.__name__ == "dramalite.middleware"
    assert "middleware" in dramalite.middleware.__doc__


@pytest.mark.parametrize("path", ["middleware", "results.backends.stub"])
def test_a_module_can_be_looked_for(path):
    found = importlib.util.find_spec(f"dramalite.{path}")

    assert found is not None
    assert found.name == f"dramalite.{path}"
    assert importlib.util.find_spec("dramalite.middleware.no_such_module") is None


def test_a_name_can_be_patched_by_its_path(monkeypatch):
    replacement = object()
    monkeypatch.setattr("dramalite.middleware.retries.Retries", replacement)

    assert ours("middleware.retries").Retries is replacement


# In a fresh interpreter

IMPORTS = """
    import {root}.middleware
    import {root}.brokers.stub as stub
    import {root} as dramatiq
    from {root} import middleware, results, rate_limits, errors
    from {root}.brokers.stub import StubBroker
    from {root}.errors import Retry, RateLimitExceeded
    from {root}.middleware import CurrentMessage, default_middleware
    from {root}.middleware.group_callbacks import GroupCallbacks
    from {root}.rate_limits import ConcurrentRateLimiter
    from {root}.rate_limits.backends import StubBackend as LimiterBackend
    from {root}.results import Results, ResultTimeout
    from {root}.results.backends.stub import StubBackend

    broker = StubBroker()
    broker.add_middleware(Results(backend=StubBackend()))
    broker.add_middleware(CurrentMessage())
    broker.add_middleware(GroupCallbacks(LimiterBackend()))
    dramatiq.set_broker(broker)
    mutex = ConcurrentRateLimiter(LimiterBackend(), "mutex")

    @dramatiq.actor(store_results=True, max_retries=0)
    def add(x, y):
        with mutex.acquire():
            assert CurrentMessage.get_current_message().args == (x, y)
        return x + y

    message = add.send(1, 2)
    with dramatiq.Worker(broker, worker_threads=1):
        broker.join("default", timeout=100_000)
    same = [stub.StubBroker is StubBroker is dramatiq.StubBroker, errors.Retry is Retry, middleware.Results is Results
            if hasattr(middleware, "Results") else True, results.Results is Results, rate_limits.Barrier is dramatiq.Barrier]
    print(message.get_result(), all(same), broker.__class__.__module__)
"""


def test_a_program_of_dramatiqs_imports_runs_with_another_root(run_python):
    result = run_python(textwrap.dedent(IMPORTS.format(root="dramalite")))

    assert result.stdout == "3 True dramalite\n", result.stderr


def test_a_vendored_copy_has_the_module_paths_under_its_own_name(run_python, tmp_path):
    package = tmp_path / "app" / "vendor"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    shutil.copy(dramalite.__file__, package / "dramalite.py")
    result = run_python(textwrap.dedent(IMPORTS.format(root="app.vendor.dramalite")), PYTHONPATH=str(tmp_path))

    assert result.stdout == "3 True app.vendor.dramalite\n", result.stderr


def test_importing_a_module_path_first_works(run_python):
    result = run_python(
        "from dramalite.results.backends import StubBackend; import dramalite; "
        "print(StubBackend is dramalite.StubResultBackend)"
    )

    assert result.stdout == "True\n", result.stderr


# Beside the real package


@pytest.fixture(scope="module")
def dramatiq():
    return pytest.importorskip("dramatiq")


def modules_of(package):
    return sorted(
        module.name.removeprefix(f"{package.__name__}.")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _name: None)
    )


def public_names_of(module):
    """What `module` gives its users: its __all__, or without one the public classes and functions made there."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def has_module(path):
    try:
        ours(path)
    except ImportError:
        return False
    return True


def test_every_module_of_dramatiq_is_there_or_left_out_on_purpose(dramatiq):
    missing = [path for path in modules_of(dramatiq) if not has_module(path) and path not in MODULES_LEFT_OUT]

    assert missing == []


def test_no_module_that_is_there_is_said_to_be_left_out():
    there = [path for path in MODULES_LEFT_OUT if has_module(path) and path != "__main__"]

    # Those of other servers say what is there in their place.
    assert [path for path in there if "another server's" not in MODULES_LEFT_OUT[path]] == []


def test_every_public_name_of_a_module_is_there_or_left_out_on_purpose(dramatiq):
    missing = {}
    for path in ["", *modules_of(dramatiq)]:
        if path in MODULES_LEFT_OUT or not has_module(path):
            continue
        try:
            theirs = importlib.import_module(f"dramatiq.{path}" if path else "dramatiq")
        except ImportError:  # One that needs a third-party package.
            continue
        missing[path] = {
            name for name in public_names_of(theirs) if name not in vars(ours(path)) and name not in NAMES_LEFT_OUT
        }

    assert {path: sorted(names) for path, names in missing.items() if names} == {}


def test_constants_are_those_of_dramatiq(dramatiq):
    theirs = {(path, name): getattr(importlib.import_module(f"dramatiq.{path}"), name) for path, name in CONSTANTS}

    assert {place: getattr(ours(place[0]), place[1], None) for place in CONSTANTS} == theirs


def test_no_public_name_of_a_class_of_dramatiq_is_missing_in_ours(dramatiq):
    kinds = "Actor Message Broker Consumer MessageProxy Middleware group pipeline Encoder JSONEncoder".split()
    missing = [
        f"{kind}.{name}"
        for kind in kinds
        for name in vars(getattr(dramatiq, kind))
        if not name.startswith("_") and not hasattr(getattr(dramalite, kind), name)
    ]

    assert missing == []


def test_what_is_said_to_be_left_out_is_in_dramatiq(dramatiq):
    text = "".join(path.read_text("utf-8") for path in Path(dramatiq.__file__).parent.rglob("*.py"))

    assert set(MODULES_LEFT_OUT) - set(modules_of(dramatiq)) == set()
    assert [name for name in NAMES_LEFT_OUT if name not in text] == []


@pytest.mark.parametrize(
    "line",
    [
        "from dramalite.brokers.redis import RedisBroker",
        "from dramalite.brokers.rabbitmq import RabbitmqBroker",
        "from dramalite.results.backends import RedisBackend",
        "from dramalite.results.backends.redis import RedisBackend",
        "from dramalite.results.backends import MemcachedBackend",
        "from dramalite.rate_limits.backends import RedisBackend",
    ],
)
def test_what_needs_a_server_is_answered_with_what_is_there_in_its_place(line):
    with pytest.raises(ImportError, match="use SQLiteBroker"):
        exec(line)


def test_other_names_that_are_missing_are_missing():
    assert not hasattr(importlib.import_module("dramalite.results"), "Nothing")
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from dramalite.results import Nothing")


def test_the_names_of_queues_and_the_time_are_told_as_dramatiqs_common_module_does():
    common = importlib.import_module("dramalite.common")

    assert [common.dq_name(name) for name in ("a", "a.DQ", "a.XQ")] == ["a.DQ"] * 3
    assert [common.xq_name(name) for name in ("a", "a.DQ", "a.XQ")] == ["a.XQ"] * 3
    assert [common.q_name(name) for name in ("a", "a.DQ", "a.XQ")] == ["a"] * 3
    assert common.current_millis() >= 1_764_000_000_000


def test_the_event_loop_thread_runs_coroutines():
    async def answer():
        return 42

    assert importlib.import_module("dramalite.asyncio").get_event_loop_thread().run_coroutine(answer()) == 42
