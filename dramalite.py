"""dramalite: background tasks in one file.  Dramatiq's API on SQLite, nothing else to install.

    import dramalite

    @dramalite.actor(max_retries=3)
    def greet(name):
        print(f"Hello, {name}!")

    if __name__ == "__main__":
        greet.send("world")                 # on disk when send() returns

Save as tasks.py, run it, then `python -m dramalite worker tasks`.  Or, inside any program:
`with dramalite.Worker(dramalite.get_broker()): ...`.

Copy this file into your project, or `pip install` it.  Durations are milliseconds unless a name
says otherwise.  MIT licence, in full at the end of the file.

Contents
    Platform
    Errors
    Clock
    Logging
    Encoders
    Messages
    Middleware protocol
    Interrupts
    Broker base
    Event loop
    Actors
    Composition
    Bells
    Liveness and wake-ups
    SQL
    Database files
    Databases in use
    SQLite connections
    Write-ahead log
    Reads and writes
    Waking and watching
    Values
    Senders
    Forking
    SQLite engine
    Results
    Rate limits
    Age limit
    Time limit
    Shutdown notifications
    Callbacks
    Pipelines
    Group callbacks
    Retries
    Current message
    Prometheus
    Stored messages
    Consumers
    Sending and looking
    Brokers
    Message processing
    Targets
    Batches
    Exchanges
    Dispatching
    Worker
    Virtual workers
    Virtual time
    Simulated brokers
    Simulated events
    Simulation
    Beginning a simulation
    Process logs
    Child processes
    Source changes
    Pid files
    Supervisor
    Command line
    Module paths
    Hand-over
    Licence: MIT
"""

from __future__ import annotations

import abc
import atexit
import collections
import contextlib
import contextvars
import errno
import functools
import heapq
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import stat
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, NoReturn, ParamSpec, TypeVar, cast, overload

if TYPE_CHECKING:
    import argparse
    import asyncio
    import concurrent.futures
    import random
    import socket
    import sqlite3
    import subprocess
    from datetime import datetime, timedelta

__version__ = "0.1.0"

__all__ = [
    # Errors
    "ActorNotFound", "BrokerConnectionError", "BrokerError", "ConnectionClosed", "ConnectionFailed",
    "DecodeError", "DramaliteError", "DramatiqError", "QueueJoinTimeout", "QueueNotFound",
    "RateLimitExceeded", "ResultError", "ResultFailure", "ResultMissing", "ResultTimeout",
    "ResultUnavailable", "Retry", "WorkerCrashed",
    # Clock
    "Clock",
    # Logging
    "get_logger",
    # Encoders
    "Encoder", "JSONEncoder", "PickleEncoder", "get_encoder", "set_encoder",
    # Messages
    "QUEUE_NAME_PATTERN", "Message", "MessageData", "MessageProxy",
    # Middleware protocol
    "Middleware", "MiddlewareError", "SkipMessage",
    # Interrupts
    "Interrupt", "raise_thread_exception",
    # Broker base
    "Broker", "Consumer", "get_broker", "set_broker",
    # Event loop
    "async_to_sync",
    # Actors
    "Actor", "GenericActor", "actor",
    # Composition
    "group", "pipeline",
    # Results
    "Missing", "ResultBackend", "Results", "SQLiteResultBackend", "StubResultBackend",
    # Rate limits
    "Barrier", "BucketRateLimiter", "ConcurrentRateLimiter", "RateLimiter", "RateLimiterBackend",
    "SQLiteRateLimiterBackend", "StubRateLimiterBackend", "WindowRateLimiter",
    # Middleware
    "AgeLimit", "AsyncIO", "Callbacks", "CurrentMessage", "GroupCallbacks", "Pipelines", "Prometheus", "Retries", "Shutdown",
    "ShutdownNotifications", "TimeLimit", "TimeLimitExceeded", "default_middleware",
    # Brokers
    "MemoryBroker", "SQLiteBroker", "StubBroker",
    # Worker
    "Worker",
    # Simulation
    "SimulatedEvent", "SimulatedStep", "Simulation", "SimulationError", "drain", "simulate",
    "simulated_work",
    # Command line
    "main", "make_argument_parser",
]  # fmt: skip

_P = ParamSpec("_P")
_R = TypeVar("_R")


# ------------------------------------------------------------------------------------------
# Platform
#
# What differs between operating systems, each difference behind one small function.
# ------------------------------------------------------------------------------------------
_WINDOWS = sys.platform == "win32"

#: Locked bytes lie far behind the data of the side file, where no read or write ever meets
#: them: Windows refuses to read or write a byte that another process has locked.
_LOCK_OFFSET = 1 << 30

if sys.platform == "win32":
    import msvcrt

    def _try_lock_byte(descriptor: int, index: int) -> bool:
        """Lock byte `index` of an open file for this process; False if another one has it."""
        try:
            _lock_or_unlock(descriptor, msvcrt.LK_NBLCK, index)
        except PermissionError:
            return False
        return True

    def _unlock_byte(descriptor: int, index: int) -> None:
        """Give up the lock on byte `index`."""
        _lock_or_unlock(descriptor, msvcrt.LK_UNLCK, index)

    def _lock_or_unlock(descriptor: int, mode: int, index: int) -> None:
        """Windows locks at the file's position, which stays where it is."""
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _LOCK_OFFSET + index, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, mode, 1)
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)

else:
    import fcntl

    def _try_lock_byte(descriptor: int, index: int) -> bool:
        """Lock byte `index` of an open file for this process; False if another one has it."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCK_OFFSET + index)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock_byte(descriptor: int, index: int) -> None:
        """Give up the lock on byte `index`."""
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _LOCK_OFFSET + index)


def _flush_to_disk(descriptor: int) -> None:
    """Return when the disk keeps what was written to an open file; OSError where it may not."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # Not every file system there has it.
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
    getattr(os, "fdatasync", os.fsync)(descriptor)


def _file_system(path: str) -> str:
    """The type of the file system that a file is on; "" where the system doesn't tell."""
    if _WINDOWS:
        drive = os.path.splitdrive(os.path.realpath(path))[0]
        return "cifs" if re.match(r"\\\\[^?.]", drive) else ""
    try:
        number = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:  # On Linux.
            mounts = [line.split() for line in file]
    except OSError:
        return ""
    device = f"{os.major(number)}:{os.minor(number)}"
    return next((mount[mount.index("-") + 1] for mount in mounts if mount[2] == device), "")


def _descriptors(identity: _Identity) -> set[int]:
    """Those by which this process has that file open, deleted or not; none where the system doesn't tell."""
    descriptors: set[int] = set()
    with contextlib.suppress(OSError):  # On Linux and macOS, not on Windows.
        if identity is not None:
            descriptors = {fd for fd in map(int, os.listdir("/dev/fd")) if _file_identity(fd) == identity}
    return descriptors


#: Whether a part of a file can be locked for a descriptor instead of for the process.
_LOCKS_FOR_DESCRIPTORS = sys.platform == "linux" and sys.maxsize > 1 << 32 and hasattr(fcntl, "F_OFD_SETLK")


def _lock_for_descriptor(descriptor: int, start: int, length: int, *, is_locked: bool) -> None:
    """Lock a part of a file for reading, or unlock it, for a descriptor instead of for this process.

    Raises OSError where another one has locked it for writing, or the file system has no such locks.
    """
    if sys.platform == "linux":
        kind = (fcntl.F_RDLCK if is_locked else fcntl.F_UNLCK).to_bytes(2, sys.byteorder)
        part = start.to_bytes(8, sys.byteorder) + length.to_bytes(8, sys.byteorder)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, kind + bytes(6) + part + bytes(8))  # A struct flock.


def _is_open_to_all(folder: str) -> bool:
    """Tell whether every user of the machine may write in a folder; False if it is not there."""
    try:
        return not _WINDOWS and bool(os.stat(folder).st_mode & stat.S_IWOTH)
    except OSError:
        return False


def _is_strangers(status: os.stat_result) -> bool:
    """Tell whether a file belongs to another user than this process's one or root."""
    return not _WINDOWS and status.st_uid not in (0, os.geteuid())


def _is_held_here(lock: Any) -> bool:
    """Tell whether this very thread holds an RLock, or the one of a Condition; there is no public way to ask."""
    return bool(lock._is_owned())


def _import_for_sending() -> None:
    """Import what a send uses, before the first one, which may be in a signal handler.

    In CPython 3.10 and 3.11 an import there fails if it interrupts one of the same module.
    """
    import mmap
    import socket
    import sqlite3
    import zlib

    del mmap, socket, sqlite3, zlib


def _process_is_alive(pid: int) -> bool:
    """Tell whether a process of that id exists, also one that belongs to another user."""
    if _WINDOWS:
        import ctypes

        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
        handle = kernel32.OpenProcess(0x100000, False, ctypes.c_ulong(pid))  # SYNCHRONIZE
        if not handle:
            return bool(ctypes.get_last_error() == 5)  # type: ignore[attr-defined,unused-ignore]
        has_ended = kernel32.WaitForSingleObject(handle, 0) == 0  # Others may still hold what is left of it.
        kernel32.CloseHandle(handle)
        return not has_ended
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # The latter for what is no id of any process.
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------
# Errors
#
# The tree is Dramatiq's.  MiddlewareError and SkipMessage stand outside it (see Middleware
# protocol), and interrupts are no Exceptions (see Interrupts).
# ------------------------------------------------------------------------------------------
class DramaliteError(Exception):
    """Base of the errors that dramalite raises."""

    def __init__(self, message: Any) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return str(self.message) or repr(self.message)


#: The name that code written for Dramatiq catches.
DramatiqError = DramaliteError


def _hinted(error: Exception, hint: str) -> Exception:
    """The error with a hint that its traceback shows, from Python 3.11 on."""
    if hint and sys.version_info >= (3, 11):
        error.add_note(hint)
    return error


def _known(what: str, names: Iterable[str]) -> str:
    return f"{what} known here: {', '.join(sorted(names)) or 'none'}."


class DecodeError(DramaliteError):
    """Stored bytes are no message.  `data` is what was read, `error` the cause."""

    def __init__(self, message: str, data: Any, error: Exception) -> None:
        super().__init__(message)
        self.args = (message, data, error)
        self.data = data
        self.error = error


class BrokerError(DramaliteError):
    """The broker could not do what was asked; the text names the file and what to do."""


class ActorNotFound(BrokerError):
    """No actor of that name was declared on the broker."""


class QueueNotFound(BrokerError):
    """No actor declared that queue."""


class BrokerConnectionError(BrokerError):
    """The broker's database can't be used; see the two kinds below."""


class ConnectionFailed(BrokerConnectionError):
    """The database could not be opened: missing folder, permission, foreign or newer file."""


class ConnectionClosed(BrokerConnectionError):
    """The database went away under a broker that had it open: deleted or replaced."""


class QueueJoinTimeout(DramaliteError):
    """join() ran out of time; the text says what is left."""


class RateLimitExceeded(DramaliteError):
    """A rate limiter was at its limit."""


class Retry(DramaliteError):
    """Raised by an actor to be run again, after `delay` milliseconds if given."""

    delay: int | None = None  # Also of a subclass that makes itself otherwise.

    def __init__(self, message: str = "", delay: int | timedelta | None = None) -> None:
        super().__init__(message)
        self.delay = None if delay is None else _milliseconds(delay, "delay")


class ResultError(DramaliteError):
    """Base of the errors of results."""


class ResultTimeout(ResultError):
    """The result did not come in time.  `message` is the Message."""


class ResultMissing(ResultError):
    """There is no result (yet).  `message` is the Message."""


class ResultUnavailable(ResultMissing, ResultTimeout):
    """There is no result and there will be none; `reason` says why.

    Raised at once where Dramatiq waits for the timeout, hence a ResultTimeout too.
    """

    def __init__(self, message: Any, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.message} has no result: {self.reason}"


class ResultFailure(ResultError):
    """The actor failed for good.  The original exception is known by type name and text."""

    def __init__(self, message: str = "", orig_exc_type: str = "", orig_exc_msg: str = "") -> None:
        super().__init__(message)
        self.orig_exc_type = orig_exc_type
        self.orig_exc_msg = orig_exc_msg


class WorkerCrashed(DramaliteError):
    """The worker died, or stopped, while it ran the message, which is a dead letter now."""


#: Bounds of what is stored and logged of somebody else's exception.
_MAX_ERROR_CHARS = 8 * 1024
_MAX_TRACEBACK_CHARS = 32 * 1024
_MAX_FRAMES = 30
_MAX_CHAIN = 10


def _cut(text: str, limit: int) -> str:
    """Return `text`, its middle left out if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _error_text(exception: BaseException) -> str:
    """str(exception), bounded, storable, and also for exceptions whose str() fails."""
    try:
        text = str(exception)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Foreign code; what it raises is told in its place.
        text = f"<str() of this {type(exception).__name__} failed with {type(error).__name__}>"
    return _storable(_cut(text, _MAX_ERROR_CHARS))


def _as_refusal(error: Exception, text: str) -> Exception:
    """A TypeError with a text where the error is one, else a ValueError."""
    return TypeError(text) if isinstance(error, TypeError) else ValueError(text)


def _storable(text: str) -> str:
    """The text with control characters, but for line ends and tabs, and surrogates escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def _traceback_text(exception: BaseException) -> str:
    """The exception's traceback from where foreign code begins, bounded and storable."""
    try:
        text = "".join(_traceback_parts(exception))
    except KeyboardInterrupt:
        raise
    except BaseException:  # A hostile __str__, __repr__ or frame: fall back on the type and text.
        text = f"{type(exception).__name__}: {_error_text(exception)}"
    return _storable(_cut(text, _MAX_TRACEBACK_CHARS))


def _traceback_parts(exception: BaseException, depth: int = 0) -> Iterator[str]:
    """What traceback.format_exception() gives, at a tenth of its time."""
    import linecache

    if hasattr(exception, "exceptions"):  # A group: its members belong to the text.
        yield from traceback.format_exception(exception, limit=-_MAX_FRAMES)  # The innermost.
        return
    cause, context = exception.__cause__, exception.__context__
    if cause is not None and depth < _MAX_CHAIN:
        yield from _traceback_parts(cause, depth + 1)
        yield "\nThe above exception was the direct cause of the following exception:\n\n"
    elif context is not None and not exception.__suppress_context__ and depth < _MAX_CHAIN:
        yield from _traceback_parts(context, depth + 1)
        yield "\nDuring handling of the above exception, another exception occurred:\n\n"
    step = exception.__traceback__
    while step is not None and step.tb_next and step.tb_frame.f_code.co_filename == __file__:
        step = step.tb_next
    yield "Traceback (most recent call last):\n"
    frames = []
    while step is not None:
        frames.append(step)
        step = step.tb_next
    left_out = max(len(frames) - _MAX_FRAMES, 0)
    for index, step in enumerate(frames):
        if 0 <= index - _MAX_FRAMES // 2 < left_out:
            yield f"  [... {left_out} frames left out ...]\n" if index == _MAX_FRAMES // 2 else ""
            continue
        code = step.tb_frame.f_code
        line = linecache.getline(code.co_filename, step.tb_lineno, step.tb_frame.f_globals)
        yield f'  File "{code.co_filename}", line {step.tb_lineno}, in {code.co_name}\n'
        yield f"    {line.strip()}\n" if line.strip() else ""
    yield from traceback.format_exception_only(type(exception), exception)


# ------------------------------------------------------------------------------------------
# Clock
#
# The engine's only source of time, given to a broker as `clock=`; tests pass their own.
# Wall time decides when delayed work is due; waits and limits use monotonic time.
# ------------------------------------------------------------------------------------------
class Clock:
    """The system's time.  Subclass it to give a broker another one."""

    #: Time stands still until it is told to pass, and nobody can wait for it: see simulate().
    is_virtual = False

    #: Out of reach for those that freeze the `time` module, in tests: no wait would end.
    _monotonic = staticmethod(time.perf_counter if _WINDOWS else time.monotonic)  # In steps of 16 ms until 3.12.

    def time_ms(self) -> int:
        """Wall time, milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds since some moment, never going back."""
        return self._monotonic()

    def process_time(self) -> float:
        """Seconds that this process has spent on processors."""
        return time.process_time()

    def thread_time(self) -> float:
        """Seconds that this thread has spent on processors."""
        return time.thread_time()

    def sleep(self, seconds: float) -> None:
        """Let that many seconds pass."""
        time.sleep(seconds)

    def wait_for(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Where time is virtual: let it pass until is_done(); tell whether it came true in time."""
        raise NotImplementedError

    async def wait_for_async(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        """wait_for() for coroutines."""
        raise NotImplementedError


_SYSTEM_CLOCK = Clock()

#: Seconds that any system can wait for: three years, or less where it can't.
_LONGEST_WAIT_S = int(min(10**8, threading.TIMEOUT_MAX))

#: The longest duration that is accepted, the largest integer that all JSON readers keep.
_MAX_DURATION_MS = 1 << 53


def _milliseconds(value: Any, what: str) -> int:
    """Convert an int, a float or a timedelta to milliseconds, not negative."""
    number = round(value.total_seconds() * 1000, 3) if hasattr(value, "total_seconds") else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{what} is {value!r}; give milliseconds as an int, or a timedelta.")
    if not 0 <= number <= _MAX_DURATION_MS:
        raise ValueError(f"{what} is {value!r}; give 0 to {_MAX_DURATION_MS} milliseconds.")
    return int(number)


def _timeout_ms(timeout: float | timedelta | None) -> int | None:
    """A timeout in milliseconds, 0 where it has passed already; None stays None."""
    if timeout is None:
        return None
    number = timeout.total_seconds() * 1000 if hasattr(timeout, "total_seconds") else timeout
    if isinstance(number, (int, float)):
        number = min(max(number, 0), _MAX_DURATION_MS)
    return _milliseconds(number, "timeout")


# ------------------------------------------------------------------------------------------
# Logging
#
# Loggers have fixed names under "dramalite", whatever name this module was imported by.
# ------------------------------------------------------------------------------------------
_LOG_FORMAT = (
    "[%(asctime)s] [PID %(process)d] [%(threadName)s] [%(name)s] [%(levelname)s] %(message)s"
)


def get_logger(module: str, name: str | type | None = None) -> logging.Logger:
    """Return the logger `module`, or `module.name`; a class stands for its name."""
    return logging.getLogger(module if name is None else f"{module}.{getattr(name, '__name__', name)}")


# ------------------------------------------------------------------------------------------
# Encoders
#
# From message data to bytes and back.  Invariant of JSONEncoder: what it accepts comes back
# equal (tuples as lists); everything else is refused with the place of the culprit.
# ------------------------------------------------------------------------------------------
class Encoder(abc.ABC):
    """Turns message data into bytes and back.  Subclass it for another format."""

    @abc.abstractmethod
    def encode(self, data: Any) -> bytes:
        """Return the data as bytes; raise TypeError or ValueError if it can't be kept."""

    @abc.abstractmethod
    def decode(self, data: bytes) -> Any:
        """Return what encode() was given; raise DecodeError if these bytes can't be read."""


#: How deep lists and dicts may nest in the arguments of a message.
_MAX_DEPTH = 100

#: And how many messages may stand in one another: more than fit into any, unless it holds itself.
_MAX_MESSAGES = 100_000
_ATOMS = frozenset({str, int, float, bool, type(None)})
_CONTAINERS = frozenset({dict, list, tuple})
_json_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)

#: What JSONEncoder makes anew for each value; made once, it halves the cost.  On other
#: implementations of Python than CPython there is none.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_iterate_json = _make_encoder and _make_encoder(
    None, _json_encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",",
    False, False, False,
)  # fmt: skip


def _to_json(value: Any) -> str:
    """Encode a value that was seen to nest within bounds, so that it can't be circular."""
    if _iterate_json is None:
        return _json_encoder.encode(value)
    return "".join(_iterate_json(value, 0))


_json_decoder: Any = json.JSONDecoder()


def _from_json(text: str) -> Any:
    """Decode JSON; without a detour for the white space around it, where there is none."""
    try:
        value, end = _json_decoder.scan_once(text, 0)
    except StopIteration:
        end = -1
    return value if end == len(text) else _json_decoder.decode(text)


def _is_message_data(value: dict[Any, Any]) -> bool:
    """Tell whether a dict is a message's: it has the seven wire fields and no other."""
    return len(value) == 7 and value.keys() == _WIRE_FIELDS


def _is_plain(data: Any) -> bool:
    """Tell whether all of `data` is of JSON's types, keys are strings, and nesting is bounded.

    A message inside a message (pipe_target, callbacks) counts its own depth anew.
    """
    pending = [(data, 0)]
    messages = 0
    while pending:
        value, depth = pending.pop()
        items: Iterable[Any] = value
        below = depth + 1
        if isinstance(value, dict):
            items = value.values()
            if _is_message_data(value):
                below = 1
                messages += 1
            else:
                for key in value:
                    if not isinstance(key, str):
                        return False
        elif not isinstance(value, (list, tuple)):
            if isinstance(value, (str, int, float)) or value is None:
                continue
            return False
        if depth > _MAX_DEPTH or messages > _MAX_MESSAGES:
            return False
        for item in items:
            kind = type(item)
            if kind in _ATOMS or (kind in _CONTAINERS and not item and below <= _MAX_DEPTH):
                continue
            pending.append((item, below))
    return True


def _explain_refusal(value: Any, place: str, depth: int) -> None:
    """Raise the TypeError or ValueError that says what in `value` JSON can't keep, and where."""
    if depth > _MAX_DEPTH and isinstance(value, (dict, list, tuple)):
        raise ValueError(f"{place[:60]}... nests deeper than {_MAX_DEPTH} levels; flatten it.")
    if isinstance(value, dict):
        below = 1 if _is_message_data(value) else depth + 1
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{place or 'data'} has the key {key!r}, which is no string but of type "
                    f"{type(key).__name__}; JSON keys are strings: use str(key)."
                )
            _explain_refusal(key, f"{place or 'data'}, a key", below)
            _explain_refusal(item, f"{place}[{key!r}]" if place else key, below)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _explain_refusal(item, f"{place}[{index}]", depth + 1)
    elif isinstance(value, str):
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise ValueError(
                f"{place or 'it'} is {value[:200]!r}, with a lone surrogate, which is no text; "
                f"replace it, or send bytes as base64."
            )
    elif value is not None and not isinstance(value, (int, float)):
        raise TypeError(
            f"{place or 'it'} is a {type(value).__name__}, {_cut(repr(value), 200)}, which JSON can't "
            f"carry; convert it first."
        )
    else:
        try:
            _to_json(value)
        except ValueError as error:
            raise ValueError(f"{place or 'it'} is a number that JSON can't carry: {error}.") from None


class JSONEncoder(Encoder):
    """The default: Dramatiq's JSON, byte for byte, refusing what JSON would change in silence."""

    def encode(self, data: Any) -> bytes:
        """Return compact ASCII JSON.

        Raises TypeError or ValueError naming the place of what can't be kept: other types,
        keys that are no strings, NaN, infinities, lone surrogates, nesting over 100.
        """
        try:
            try:
                if _is_plain(data):
                    text = _to_json(data)
                    if "\\ud" not in text:
                        return text.encode("ascii")
            except ValueError:  # A number; it is found below.
                pass
            _explain_refusal(data, "", 0)
            return _to_json(data).encode("ascii")
        except RecursionError:
            raise ValueError(
                f"The data nests deeper than {_MAX_DEPTH} levels, or is a pipeline of more steps than Python "
                f"can encode (hundreds); flatten it."
            ) from None

    def decode(self, data: bytes) -> Any:
        """Return the value; raise DecodeError if the bytes are no UTF-8 or no JSON."""
        try:
            text = data.decode("utf-8")
            return _from_json(text)
        except UnicodeDecodeError as error:
            raise DecodeError("The data is not UTF-8.", data, error) from error
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"The data is not JSON: {error}.", text, error) from error


class PickleEncoder(Encoder):
    """pickle, by choice only: whoever can write to the database can run code in the worker."""

    def encode(self, data: Any) -> bytes:
        """Return the pickled data."""
        import pickle

        try:
            return pickle.dumps(data)
        except Exception as error:  # Pickling runs foreign code and may raise anything.
            raise TypeError(f"It can't be pickled: {_error_text(error)}") from error

    def decode(self, data: bytes) -> Any:
        """Return the unpickled data; raise DecodeError if pickle can't."""
        import pickle

        try:
            return pickle.loads(data)
        except Exception as error:  # Unpickling runs foreign code and may raise anything.
            raise DecodeError(f"The data can't be unpickled: {error}.", data, error) from error


_encoder: Encoder = JSONEncoder()


def get_encoder() -> Encoder:
    """Return the encoder that all messages of this process use."""
    return _encoder


def set_encoder(encoder: Encoder) -> None:
    """Use `encoder` for all messages of this process from now on."""
    global _encoder
    _encoder = encoder


# ------------------------------------------------------------------------------------------
# Messages
#
# A Message is what send() makes and what is stored; a MessageProxy is a message in a
# worker's hands.  The seven fields, their order and their encoding are Dramatiq's wire
# format: nothing is ever added at the top level, extras go into `options`.
# ------------------------------------------------------------------------------------------
#: What a queue may be called; matched against the whole name.  .DQ and .XQ endings are taken.
QUEUE_NAME_PATTERN = r"[a-zA-Z_][a-zA-Z0-9._-]*"

#: The fields of a message, in their order, and of what type each is in JSON.
_FIELD_TYPES: dict[str, type] = {
    "queue_name": str, "actor_name": str, "args": list, "kwargs": dict, "options": dict,
    "message_id": str, "message_timestamp": int,
}  # fmt: skip
_WIRE_FIELDS = frozenset(_FIELD_TYPES)


def _check_queue_name(name: Any) -> str:
    """Return `name` if a queue may be called that; raise ValueError with the rule if not."""
    if not isinstance(name, str) or not re.fullmatch(QUEUE_NAME_PATTERN, name):
        raise ValueError(
            f"Queue name {name!r} is not valid: it must start with a letter or an underscore, "
            f"followed by letters, digits, dots, dashes or underscores ({QUEUE_NAME_PATTERN})."
        )
    if name.endswith((".DQ", ".XQ")):
        raise ValueError(
            f"Queue name {name!r} is not valid: the endings .DQ and .XQ name the queues of "
            f"delayed messages and dead letters; choose another name."
        )
    return name


def _q_name(name: str) -> str:
    """The queue itself, also of its delay queue and dead letters."""
    return name[:-3] if name.endswith((".DQ", ".XQ")) else name


def _dq_name(name: str) -> str:
    """The queue's delay queue."""
    return _q_name(name) + ".DQ"


def _xq_name(name: str) -> str:
    """The queue's dead letters."""
    return _q_name(name) + ".XQ"


def _new_message_id(time_ms: int, entropy: bytes) -> str:
    """A UUID of version 7 (RFC 9562): 48 bits of time, then 74 of the 80 random bits given."""
    stamp = f"{time_ms & 0xFFFF_FFFF_FFFF:012x}"
    noise = entropy.hex()
    variant = "89ab"[entropy[2] >> 6]
    return f"{stamp[:8]}-{stamp[8:]}-7{noise[:3]}-{variant}{noise[5:8]}-{noise[8:]}"


def _time_of_message_id(message_id: str) -> int:
    """When a message was made, milliseconds since 1970, if its id is of version 7; or 0."""
    if len(message_id) == 36 and message_id[14] == "7":
        with contextlib.suppress(ValueError):
            return int(message_id[:8] + message_id[9:13], 16)
    return 0


def _fresh_message_id() -> str:
    return _new_message_id(_SYSTEM_CLOCK.time_ms(), os.urandom(10))


@functools.cache
def _message_as_dataclass() -> type:
    import dataclasses

    optional = [
        ("message_id", str, dataclasses.field(default_factory=_fresh_message_id)),
        ("message_timestamp", int, dataclasses.field(default_factory=_SYSTEM_CLOCK.time_ms)),
    ]
    return dataclasses.make_dataclass("Message", [*list(_FIELD_TYPES.items())[:5], *optional], frozen=True)


class _OfDataclass:
    """What dataclasses keeps of its classes, for Message: made when it asks, for its import takes long."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, _message: object, _owner: type) -> Any:
        return getattr(_message_as_dataclass(), self._name)


@functools.total_ordering
class Message(Generic[_R]):
    """A call that was, or will be, sent to an actor.

    Fields can't be assigned, but `options` is a live dict that middleware may change.
    `message_timestamp` is milliseconds since 1970.  Written out rather than made by
    dataclasses, whose import takes longer than that of all the rest.
    """

    queue_name: str
    actor_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    message_id: str
    message_timestamp: int

    #: The broker that made or sent this message, for get_result(); not part of its value.
    _broker: Broker | None = None
    #: It stands, as a dead letter, for bytes that are no message: it can't be sent again.
    is_damaged: ClassVar[bool] = False
    _field_defaults: ClassVar[dict[str, Any]] = {}
    __match_args__ = (
        "queue_name", "actor_name", "args", "kwargs", "options", "message_id", "message_timestamp",
    )  # fmt: skip
    _fields: ClassVar[tuple[str, ...]] = __match_args__

    def __init__(
        self,
        queue_name: str,
        actor_name: str,
        args: Iterable[Any],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        message_id: str | None = None,
        message_timestamp: int | None = None,
    ) -> None:
        self.__dict__.update(
            queue_name=queue_name, actor_name=actor_name, args=tuple(args), kwargs=kwargs, options=options,
            message_id=_fresh_message_id() if message_id is None else message_id,
            message_timestamp=_SYSTEM_CLOCK.time_ms() if message_timestamp is None else message_timestamp,
        )  # fmt: skip

    def __setattr__(self, name: str, _value: Any) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}; use copy({name}=...)")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self._astuple() == other._astuple()

    def __lt__(self, other: Message[Any]) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self._astuple() < other._astuple()

    __hash__ = None  # type: ignore[assignment]

    __dataclass_fields__ = _OfDataclass()
    __dataclass_params__ = _OfDataclass()

    def _astuple(self) -> tuple[Any, ...]:
        return tuple(self.asdict().values())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.asdict().items())
        return f"{type(self).__name__}({shown})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_broker"}

    def __copy__(self) -> Message[_R]:
        return self._replace()

    def __str__(self) -> str:
        shown = [repr(arg) for arg in self.args]
        shown += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"{self.actor_name}({', '.join(shown)})"

    def __or__(self, other: Message[Any] | pipeline | group) -> pipeline:
        return pipeline([self, other])

    @property
    def message_datetime(self) -> datetime:
        """The moment the message was made, in UTC."""
        from datetime import datetime, timezone

        return datetime.fromtimestamp(self.message_timestamp / 1000, tz=timezone.utc)

    def asdict(self) -> dict[str, Any]:
        """Return the seven fields as a dict; the values are not copied."""
        return {
            "queue_name": self.queue_name,
            "actor_name": self.actor_name,
            "args": self.args,
            "kwargs": self.kwargs,
            "options": self.options,
            "message_id": self.message_id,
            "message_timestamp": self.message_timestamp,
        }

    _asdict = asdict

    def _replace(self, **changes: Any) -> Message[_R]:
        """Return a message with these fields changed."""
        if type(self) is Message:
            changed: Message[_R] = Message(**{**self.asdict(), **changes})
        else:  # It may have fields of its own.
            import dataclasses

            changed = cast(Any, dataclasses).replace(self, **changes)
        changed.__dict__["_broker"] = self._broker
        return changed

    __replace__ = _replace

    def copy(self, **attributes: Any) -> Message[_R]:
        """Return a message with these fields changed; `options` are merged over its own."""
        options = {**self.options, **attributes.pop("options", {})}
        return self._replace(**attributes, options=options)

    def encode(self) -> bytes:
        """Return the message as bytes, by the encoder of this process."""
        return _encoder.encode(self.asdict())

    @classmethod
    def decode(cls, data: bytes) -> Message[Any]:
        """Return the message that encode() turned into these bytes.

        Raises DecodeError if they are anything else: other types, missing or unknown fields.
        """
        try:
            fields = _encoder.decode(data)
            if type(fields) is not dict or {k: type(v) for k, v in fields.items()} != _FIELD_TYPES:
                _check_fields(fields)
            fields["args"] = tuple(fields["args"])
        except Exception as error:  # An encoder is foreign code; any failure means the same.
            reason = _error_text(error) or type(error).__name__
            raise DecodeError(f"Could not decode message: {reason}", data, error) from error
        return _build_message(fields, None)

    def get_result(
        self,
        *,
        backend: ResultBackend | None = None,
        block: bool = False,
        timeout: int | timedelta | None = None,
    ) -> _R:
        """Return what the actor returned.

        With `block`, waits up to `timeout` milliseconds (10,000 if None) and raises
        ResultTimeout; without, raises ResultMissing where there is none yet.  Raises
        ResultFailure if the actor failed for good, RuntimeError if the broker keeps no results.
        """
        if backend is None:
            backend = _home_of([self], None).get_results_backend()
        return cast(_R, backend.get_result(self, block=block, timeout=timeout))

    async def get_result_async(
        self, *, backend: ResultBackend | None = None, timeout: int | timedelta | None = None
    ) -> _R:
        """get_result(block=True) for coroutines, in any event loop; it holds no thread."""
        if backend is None:
            backend = _home_of([self], None).get_results_backend()
        return cast(_R, await backend.get_result_async(self, timeout=timeout))


def _build_message(fields: dict[str, Any], broker: Broker | None) -> Message[Any]:
    """A Message of checked fields, without the cost of its constructor."""
    message: Message[Any] = object.__new__(Message)
    attributes = message.__dict__
    attributes.update(fields)
    attributes["_broker"] = broker
    return message


def _check_fields(fields: Any) -> None:
    """Add the fields that may be missing; raise TypeError for what else is not well-formed."""
    if not isinstance(fields, dict):
        raise TypeError(f"it is a {type(fields).__name__}, not an object")
    fields.setdefault("message_id", _fresh_message_id())
    fields.setdefault("message_timestamp", _SYSTEM_CLOCK.time_ms())
    if fields.keys() != _WIRE_FIELDS:
        wrong = sorted(fields.keys() ^ _WIRE_FIELDS)
        raise TypeError(f"these fields are missing or unknown: {', '.join(map(str, wrong))}")
    for name, kind in _FIELD_TYPES.items():
        value = fields[name]
        if name == "args" and isinstance(value, tuple):
            continue  # As pickle keeps them.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")


def _check_sendable(message: Message[Any]) -> None:
    """Raise TypeError for one that could not be read back, ValueError for one that stands for damaged bytes."""
    if not (
        type(message.kwargs) is type(message.options) is dict
        and type(message.queue_name) is type(message.actor_name) is str
        and type(message.message_timestamp) is int
    ):  # It was made by hand.
        try:
            _check_fields(message.asdict())
        except TypeError as error:
            raise TypeError(f"Message for actor {message.actor_name!r}: {error}") from None
    if message.is_damaged:
        raise ValueError(
            f"Message {message.message_id} for actor {message.actor_name!r} stands for bytes that can't be "
            f"decoded: what its arguments were is not known, so it can't be sent again."
        )


class MessageData(dict[str, Any]):
    """A message as callbacks get it: Dramatiq's dict, whose fields are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        if name in _WIRE_FIELDS and name in self:
            return self[name]
        raise AttributeError(f"Message data has no attribute {name!r}; its fields are {list(self)}.")


class MessageProxy:
    """A message in a worker's hands; every other attribute is read from the message."""

    failed = False
    reason: str | None = None  # Why it is a dead letter, where it is one.
    actor_options: Mapping[str, Any] = types.MappingProxyType({})  # Of its actor, where known.
    _exception: BaseException | None = None

    def __init__(self, message: Message[Any]) -> None:
        self._message = message
        # Its own fields, copied so that reading them costs no detour.
        self.queue_name = message.queue_name
        self.actor_name = message.actor_name
        self.args = message.args
        self.kwargs = message.kwargs
        self.options = message.options
        self.message_id = message.message_id
        self.message_timestamp = message.message_timestamp

    def fail(self) -> None:
        """Mark the message as failed for good: it becomes a dead letter."""
        self.failed = True

    def stuff_exception(self, exception: BaseException) -> None:
        """Remember why the message failed."""
        self._exception = exception

    def clear_exception(self) -> None:
        """Forget the exception, whose frames keep memory alive."""
        self._exception = None

    def __getattr__(self, name: str) -> Any:
        if name == "_message":  # Not yet initialised (copy, pickle): no detour for ever.
            raise AttributeError(name)
        return getattr(self._message, name)

    def __str__(self) -> str:
        return str(self._message)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._message!r}>"

    def __eq__(self, other: object) -> bool:
        return bool(self._message == (other._message if isinstance(other, MessageProxy) else other))

    def __lt__(self, other: Message[Any] | MessageProxy) -> bool:
        return self._message < (other._message if isinstance(other, MessageProxy) else other)

    __hash__ = None  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------
# Middleware protocol
#
# A middleware overrides the hooks it needs; the broker calls before_* hooks in the order of
# its list and after_* hooks in reverse.  A hook that nobody overrides costs nothing.
# What hooks enqueue while a worker processes a message is committed with its outcome; what those
# before its actor do, before that begins.
# ------------------------------------------------------------------------------------------
class MiddlewareError(Exception):
    """Raised by a before_* hook to refuse; it reaches the caller."""


class SkipMessage(MiddlewareError):
    """Raised by before_process_message, or by an actor, to leave the message undone."""


class Middleware:
    """Base of middleware: every hook, each doing nothing."""

    @property
    def actor_options(self) -> set[str]:
        """The actor options that this middleware understands."""
        return set()

    @property
    def forks(self) -> list[Callable[[], int]]:
        """Functions to run in processes of their own beside the workers."""
        return []

    def concerns(self, options: Mapping[str, Any]) -> bool:
        """Tell whether the process hooks have anything to do for a plain message of an actor.

        That is one without options of its own, of an actor with these options, that succeeds.
        Where this says False, brokers leave before_process_message and
        after_process_message out.  A worker asks once for each actor.
        """
        return True

    def before_declare_actor(self, broker: Broker, actor: Actor[Any, Any]) -> None:
        """Called before an actor is declared."""

    def after_declare_actor(self, broker: Broker, actor: Actor[Any, Any]) -> None:
        """Called after an actor was declared."""

    def before_declare_queue(self, broker: Broker, queue_name: str) -> None:
        """Called before a queue is declared."""

    def after_declare_queue(self, broker: Broker, queue_name: str) -> None:
        """Called after a queue was declared."""

    def after_declare_delay_queue(self, broker: Broker, queue_name: str) -> None:
        """Called after a queue's delay queue was declared."""

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        """Called before a message is encoded and stored; may change its options."""

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        """Called after a message was stored (or collected, inside a worker's hooks)."""

    def before_delay_message(self, broker: Broker, message: MessageProxy) -> None:
        """Never called here: delayed messages wait in the database, not in the worker."""

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        """Called before the actor runs; may raise SkipMessage."""

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """Called after the actor ran, with what it returned or raised."""

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        """Called instead of after_process_message when the message was skipped."""

    def before_ack(self, broker: Broker, message: MessageProxy) -> None:
        """Called before the message is acknowledged."""

    def after_ack(self, broker: Broker, message: MessageProxy) -> None:
        """Called when the acknowledgement is part of the next commit."""

    def before_nack(self, broker: Broker, message: MessageProxy) -> None:
        """Called before the message becomes a dead letter."""

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        """Called when the dead letter is part of the next commit."""

    def after_process_boot(self, broker: Broker) -> None:
        """Called in a worker process of the command line, before it imports the actors."""

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Called before a worker starts."""

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Called after a worker started."""

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        """Called before a worker stops."""

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        """Called after a worker stopped."""

    def after_consumer_thread_boot(self, broker: Broker, thread: threading.Thread) -> None:
        """Called in a worker's maintenance thread, there being no consumer threads, at its start."""

    def before_consumer_thread_shutdown(self, broker: Broker, thread: threading.Thread) -> None:
        """Called in a worker's maintenance thread before it ends."""

    def after_worker_thread_boot(self, broker: Broker, thread: threading.Thread) -> None:
        """Called in a worker thread at its start."""

    def before_worker_thread_shutdown(self, broker: Broker, thread: threading.Thread) -> None:
        """Called in a worker thread before it ends."""


_HOOKS = tuple(name for name in vars(Middleware) if name.startswith(("before_", "after_")))


def _overrides(middleware: Middleware, hook: str) -> bool:
    """Tell whether this middleware does something in a hook."""
    method = getattr(middleware, hook, None)
    return method is not None and getattr(method, "__func__", None) is not vars(Middleware)[hook]


def _is_concerned(middleware: Middleware, hook: str, options: Mapping[str, Any]) -> bool:
    """What the middleware's concerns() says; True where `hook` was overridden below it."""
    for kind in type(middleware).__mro__:
        if "concerns" in vars(kind):
            return middleware.concerns(options)
        if hook in vars(kind):
            break
    return True


# ------------------------------------------------------------------------------------------
# Interrupts
#
# Exceptions raised from outside in a thread that runs an actor.  Invariant: an interrupt is
# set only under _interrupt_lock and only while its thread is inside an actor's body, and none
# is left pending when the body has been left, so that it can't hit hooks or the worker.
# ------------------------------------------------------------------------------------------
class Interrupt(BaseException):
    """Base of what is raised in an actor from outside; no Exception, so that few catch it."""


_CAN_INTERRUPT = sys.implementation.name == "cpython"

_interrupt_lock = threading.RLock()  # Guards all below; a signal handler may come in between.
_interruptible: dict[int, bool] = {}  # Threads inside an actor's body: whether an interrupt was set.
#: What takes interrupts for a runner, in place of their being raised in its thread.
_stoppers: dict[int, Callable[[type[Interrupt]], None]] = {}


def raise_thread_exception(thread_id: int, exception: type[BaseException]) -> None:
    """Raise `exception` in a thread, at its next bytecode; it can't end a blocking C call.

    By PyThreadState_SetAsyncExc, so on CPython only.  Failures are logged, not raised.
    """
    import ctypes

    logger = get_logger("dramalite.threading")
    if not _CAN_INTERRUPT:
        logger.critical(
            "Setting thread exceptions (%s) is not supported for your current platform (%r).",
            exception.__name__, sys.implementation.name,
        )  # fmt: skip
    elif not ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(exception)):
        logger.critical("Failed to set exception (%s) in thread %r.", exception.__name__, thread_id)


def _warn_without_interrupts(what: str) -> None:
    """Warn, where Python has no way to interrupt a thread, of what does not work then."""
    if not _CAN_INTERRUPT:
        import warnings

        warnings.warn(
            f"{what} on your current platform ({sys.implementation.name!r}).",
            category=RuntimeWarning,
            stacklevel=3,
        )


class _Runner(threading.local):
    """What a thread calls hooks for: itself, a coroutine that needs no thread, or another thread."""

    other: int | None = None
    #: What runs this thread's coroutines in place of the event loop thread, in a simulation.
    run_coroutine: Callable[[Coroutine[Any, Any, Any]], Any] | None = None

    def id(self) -> int:
        """The thread's ident, or the negative number of a coroutine."""
        return threading.get_ident() if self.other is None else self.other

    def call_for(self, other: int, fn: Callable[..., _R], *args: Any) -> _R:
        """Call a function for another runner."""
        self.other = other
        try:
            return fn(*args)
        finally:
            self.other = None


_runner = _Runner()

#: Runners that are coroutines: each has a number of its own in this process.
_coroutine_runners = itertools.count(-1, -1)


def _interrupt(runner: int, exception: type[Interrupt]) -> bool:
    """Raise `exception` in an actor's body, in a coroutine as a cancellation; tell whether it ran.

    Whose body it is may be asked with _interrupt_lock held, without which it can't be left.
    """
    with _interrupt_lock:
        if runner in _stoppers:
            _stoppers[runner](exception)
            return True
        if runner not in _interruptible:
            return False
        _interruptible[runner] = True
        raise_thread_exception(runner, exception)
        return True


def _call_interruptibly(fn: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    """Call `fn` so that _interrupt() reaches it, and nothing after it."""
    thread_id = threading.get_ident()
    try:
        _interruptible[thread_id] = False
        return fn(*args, **kwargs)
    finally:
        while True:
            # One that is pending is raised here.  To clear it instead would leave the interpreter looking for one at
            # every step, and on 3.11 hang it where a debugger traces.
            try:
                with _interrupt_lock:
                    if _interruptible.pop(thread_id, False):
                        for _ in range(10):
                            pass
                break
            except Interrupt:  # The body has ended by itself; an interrupt that comes now is too late.
                pass
        while _is_held_here(_interrupt_lock):  # CPython 3.14 can leave `with` before it has begun (its issue 148874).
            _interrupt_lock.release()


def _uninterrupted(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function that keeps interrupts away from this thread while it runs; they come later."""

    @functools.wraps(fn)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        thread_id = threading.get_ident()
        if thread_id not in _interruptible or thread_id in _stoppers:
            return fn(*args, **kwargs)
        kept: list[type[Interrupt]] = []
        try:
            with _interrupt_lock:
                _stoppers[thread_id] = kept.append
            if _interruptible[thread_id]:
                for _ in range(10):  # One that is pending is raised here.
                    pass
            return fn(*args, **kwargs)
        finally:
            with _interrupt_lock:
                _stoppers.pop(thread_id, None)
                if kept:
                    _interrupt(thread_id, kept[-1])

    return call


# ------------------------------------------------------------------------------------------
# Broker base
#
# What every broker has: its actors, queues and middleware, and the calling of hooks.
# The process has one default broker, behind get_broker() and set_broker().
# ------------------------------------------------------------------------------------------
class Consumer:
    """Hands out the messages of one queue, one at a time; made by Broker.consume()."""

    def __iter__(self) -> Consumer:
        return self

    def __next__(self) -> MessageProxy | None:
        """Return the next message, or None if none came within the timeout."""
        raise NotImplementedError

    def ack(self, message: MessageProxy) -> None:
        """Acknowledge a message: it is done."""
        raise NotImplementedError

    def nack(self, message: MessageProxy) -> None:
        """Move a message to the dead letters."""
        raise NotImplementedError

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Give messages back, to be delivered again in their old place."""

    def close(self) -> None:
        """Give back what was not acknowledged."""


class Broker:
    """Base of brokers.

    `middleware` is a list of instances, in order; None means the default middleware, [] none.
    """

    #: Actor options that the broker itself understands, without any middleware.
    own_actor_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, middleware: list[Middleware] | None = None) -> None:
        self.logger = get_logger("dramalite.broker", type(self))
        self.actors: dict[str, Actor[Any, Any]] = {}
        self.queues: Any = {}
        self.delay_queues: set[str] = set()
        self.actor_options: set[str] = set()
        self.middleware: list[Middleware] = []
        from random import Random

        self.clock = _SYSTEM_CLOCK
        self.random = Random()
        self._entropy: Callable[[], bytes] = functools.partial(os.urandom, 10)  # For message ids.
        self._hooks: dict[str, tuple[Callable[..., None], ...]] = dict.fromkeys(_HOOKS, ())
        self._added: list[tuple[Middleware, dict[str, Any]]] = []  # By the user, after the broker was made; and where.
        for item in self._default_middleware() if middleware is None else middleware:
            self.add_middleware(item)
        self._added.clear()

    def _default_middleware(self) -> list[Middleware]:
        return [kind() for kind in default_middleware]

    # Middleware and hooks.

    def add_middleware(
        self,
        middleware: Middleware,
        *,
        before: type[Middleware] | None = None,
        after: type[Middleware] | None = None,
    ) -> None:
        """Add a middleware at the end, or before or after the first one of a class.

        It then hears of the actors and queues declared so far.  Raises TypeError for a class
        in place of an instance, ValueError if no middleware of the class given is there.
        """
        if isinstance(middleware, type):
            raise TypeError(f"{middleware!r} is a class; add an instance: {middleware.__name__}().")
        if not isinstance(middleware, Middleware) and _is_dramatiqs(middleware):
            raise TypeError(
                f"{middleware!r} is a middleware of the package dramatiq, whose errors mean nothing here: it, and "
                f"what it raises, must be imported from {__name__}."
            )
        if not hasattr(middleware, "actor_options"):
            raise TypeError(f"{middleware!r} is no middleware; add an instance of a subclass of Middleware.")
        if before is not None and after is not None:
            raise AssertionError("Give before or after, not both.")
        self._add_middleware_at(self._middleware_index(before, after), middleware)
        place = {"before": before, "after": after}
        self._added.append((middleware, {name: kind for name, kind in place.items() if kind is not None}))

    def _add_middleware_at(self, index: int, middleware: Middleware) -> None:
        if any(isinstance(item, type(middleware)) for item in self.middleware):
            self.logger.warning(
                "You're adding a middleware of the same type twice: %r.", type(middleware)
            )
        self.middleware.insert(index, middleware)
        self.actor_options |= middleware.actor_options
        self._hooks = {
            name: tuple(getattr(item, name) for item in self.middleware if _overrides(item, name))
            for name in _HOOKS
        }
        for actor in list(self.actors.values()):
            middleware.after_declare_actor(self, actor)
        for queue_name in sorted(self.get_declared_queues()):
            middleware.after_declare_queue(self, queue_name)
        for queue_name in sorted(self.get_declared_delay_queues()):
            middleware.after_declare_delay_queue(self, queue_name)

    def _adopt_middleware(self, middleware: Middleware, place: dict[str, Any], former: Broker) -> None:
        """Add what was added to another broker, at its place there, unless there is one of the same type."""
        if not self._was_given(type(middleware)):
            has_place = all(any(isinstance(item, kind) for item in self.middleware) for kind in place.values())
            self.add_middleware(middleware, **(place if has_place else {}))

    def _was_given(self, kind: type[Middleware]) -> bool:
        """Tell whether the user has added a middleware of just this type."""
        return kind in map(type, self.middleware)

    def _middleware_index(
        self, before: type[Middleware] | None, after: type[Middleware] | None
    ) -> int:
        """The place in the list that before= or after= ask for."""
        kind = before if before is not None else after
        if kind is None:
            return len(self.middleware)
        for index, item in enumerate(self.middleware):
            if isinstance(item, kind):
                return index if before is not None else index + 1
        raise ValueError(f"No middleware of type {kind.__name__} was added to this broker.")

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Call the hook before_<signal> of all middleware, in order.

        A MiddlewareError stops the chain and reaches the caller; other errors are logged.
        """
        name = "before_" + signal
        self._call_hooks(name, self._hooks_named(name), *args, **kwargs)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Call the hook after_<signal> of all middleware, in reverse; errors are logged."""
        name = "after_" + signal
        self._call_hooks(name, reversed(self._hooks_named(name)), *args, **kwargs)

    def _call_hooks(
        self, name: str, hooks: Iterable[Callable[..., None]], *args: Any, **kwargs: Any
    ) -> None:
        for hook in hooks:
            try:
                hook(self, *args, **kwargs)
            except Exception as error:  # The others may hold locks or timers to release.
                if isinstance(error, MiddlewareError) and name.startswith("before_"):
                    raise
                owner = getattr(hook, "__self__", hook)
                self.logger.critical("Hook %s of %r failed; going on.", name, owner, exc_info=True)

    def _hooks_named(self, name: str) -> tuple[Callable[..., None], ...]:
        """The methods of the middleware for a hook, also for one of the user's own."""
        hooks = self._hooks.get(name)
        if hooks is None:
            return tuple(getattr(item, name) for item in self.middleware if hasattr(item, name))
        return hooks

    def _hooks_for(self, name: str, options: Mapping[str, Any]) -> tuple[Callable[..., None], ...]:
        """The methods for a process hook that a plain message of an actor concerns."""
        return tuple(
            getattr(item, name)
            for item in self.middleware
            if _overrides(item, name) and _is_concerned(item, name, options)
        )

    # Actors and queues.

    def declare_actor(self, actor: Actor[Any, Any]) -> None:
        """Make an actor, and its queue, known to this broker."""
        self.emit_before("declare_actor", actor)
        self.declare_queue(actor.queue_name)
        self.actors[actor.actor_name] = actor
        self.emit_after("declare_actor", actor)

    def declare_queue(self, queue_name: str) -> None:
        """Make a queue known to this broker; again is no error."""
        if queue_name in self.queues:
            return
        self.emit_before("declare_queue", queue_name)
        self.queues[queue_name] = self._make_queue(queue_name)
        self.emit_after("declare_queue", queue_name)
        self.delay_queues.add(_dq_name(queue_name))
        self.emit_after("declare_delay_queue", _dq_name(queue_name))

    def _make_queue(self, queue_name: str) -> Any:
        """What self.queues[queue_name] is to be."""
        return None

    def get_actor(self, actor_name: str) -> Actor[Any, Any]:
        """Return the actor of that name; raise ActorNotFound if none was declared."""
        try:
            return self.actors[actor_name]
        except KeyError:
            raise _hinted(ActorNotFound(actor_name), _known("Actors", self.actors)) from None

    def get_declared_actors(self) -> set[str]:
        """The names of the actors."""
        return set(self.actors)

    def get_declared_queues(self) -> set[str]:
        """The names of the queues, without delay queues."""
        return set(self.queues)

    def get_declared_delay_queues(self) -> set[str]:
        """The names of the queues of delayed messages."""
        return set(self.delay_queues)

    def get_results_backend(self) -> ResultBackend:
        """Return the backend of the first Results middleware; RuntimeError if there is none."""
        for item in self.middleware:
            if isinstance(item, Results):
                return item.backend
        raise RuntimeError(
            "This broker keeps no results; add the middleware: broker.add_middleware(Results())."
        )

    # To be provided by brokers.

    def enqueue(self, message: Message[_R], *, delay: int | timedelta | None = None) -> Message[_R]:
        """Store a message, due after `delay` milliseconds; return it as it was stored."""
        raise NotImplementedError

    def enqueue_many(self, messages: Iterable[Message[Any]]) -> list[Message[Any]]:
        """Store messages; return them as they were stored."""
        return [self.enqueue(message) for message in messages]

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30_000) -> Consumer:
        """Return a consumer of a queue; __next__ waits up to `timeout` milliseconds."""
        raise NotImplementedError

    def join(self, queue_name: str, *, timeout: int | timedelta | None = None) -> None:
        """Wait until the queue is empty and its work done; QueueJoinTimeout after `timeout` ms."""
        raise NotImplementedError

    def flush(self, queue_name: str) -> None:
        """Drop the waiting and delayed messages of a queue."""
        raise NotImplementedError

    def flush_all(self) -> None:
        """Drop the waiting and delayed messages of all queues, and the dead letters."""
        raise NotImplementedError

    def pending(self) -> list[Message[Any]]:
        """Return the messages that are not finished."""
        raise NotImplementedError

    @property
    def dead_letters_by_queue(self) -> dict[str, list[MessageProxy]]:
        """The messages of each queue that failed for good, oldest first."""
        raise NotImplementedError

    @property
    def dead_letters(self) -> list[MessageProxy]:
        """The messages that failed for good; `reason` of each says why."""
        return [letter for letters in self.dead_letters_by_queue.values() for letter in letters]

    def drain(self, *, max_messages: int = 10_000) -> int:
        """Run what is ready in the calling thread, for tests: see drain()."""
        return drain(self, max_messages=max_messages)

    def assert_sent(self, actor: Any, **wanted: Any) -> list[Message[Any]]:
        """Check, in a test, that a message like this was sent and not run yet; return them."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of connections; the next use opens them again."""


def _is_dramatiqs(value: Any) -> bool:
    """Tell whether the class of a value comes from the package dramatiq, by inheritance perhaps."""
    tops = {str(kind.__module__).partition(".")[0] for kind in type(value).__mro__}
    return "dramatiq" in tops - {__name__.partition(".")[0]}


_broker_lock = threading.RLock()  # Guards the two below.
_global_broker: Broker | None = None
_global_broker_is_implicit = False


def get_broker() -> Broker:
    """Return the default broker of this process.

    With none set, that is SQLiteBroker(DRAMALITE_DB of the environment, or "dramalite.db").
    """
    global _global_broker, _global_broker_is_implicit
    with _broker_lock:
        if _global_broker is None:
            _global_broker = SQLiteBroker(os.environ.get("DRAMALITE_DB", "dramalite.db"))
            _global_broker_is_implicit = True
        return _global_broker


def set_broker(broker: Broker | None) -> None:
    """Make `broker` the default; it takes over actors and middleware added while none was set.

    Set it once, before all else: later, actors stay on the broker on which they were declared, and
    so does what was sent.  None is for tests: then get_broker() makes another one.  Raises ValueError
    if one of the actors does not fit the broker.
    """
    global _global_broker, _global_broker_is_implicit
    if broker is None:
        with _broker_lock:
            _global_broker, _global_broker_is_implicit = None, False
        return
    if not isinstance(broker, Broker):
        raise TypeError(f"{broker!r} is not a Broker; give an instance of one.")
    with _broker_lock:
        left_behind = _global_broker if _global_broker_is_implicit else None
        moving = []
        if left_behind is not None and left_behind is not broker:
            adopted = set().union(*(item.actor_options for item, _place in left_behind._added))
            moving = list(left_behind.actors.values())
            for actor in moving:  # All or none.
                _check_option_names(actor.options, actor.actor_name, broker, adopted)
                actor._check_name(broker)
            for item, place in left_behind._added:
                broker._adopt_middleware(item, place, left_behind)
        _global_broker, _global_broker_is_implicit = broker, False
        for actor in moving:
            broker.declare_actor(actor)
            actor.broker = broker


# ------------------------------------------------------------------------------------------
# Event loop
#
# One event loop per process, in a thread of its own, started by the first coroutine.
# ------------------------------------------------------------------------------------------
class _EventLoopThread:
    """Runs coroutines for threads that wait for them."""

    def __init__(self) -> None:
        import asyncio

        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="dramalite-event-loop", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        import asyncio

        asyncio.set_event_loop(self.loop)
        while True:  # A job's own task may stop the loop, or leave it by sys.exit().
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()

    def run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end and return its result; an Interrupt here cancels it."""
        if threading.current_thread() is self.thread:
            coroutine.close()
            raise RuntimeError(
                "An async actor can't be called on the event loop that is to run it: the loop would "
                "wait for itself. Await its coroutine_fn(...) there, or send it a message."
            )
        done = threading.Event()
        outcome: list[tuple[Any, BaseException | None]] = []

        def end(result: Any, exception: BaseException | None) -> None:
            outcome.append((result, exception))
            done.set()

        runner = next(_coroutine_runners)
        try:
            self.start(lambda: coroutine, contextvars.copy_context(), runner, end)
            while not done.wait(_INTERRUPT_CHECK_S):
                pass
        except Interrupt as interrupt:
            if _interrupt(runner, type(interrupt)) and not done.wait(_CANCEL_GRACE_S):
                raise RuntimeError("Timed out waiting for the cancelled coroutine to end.") from None
            coroutine.close()  # Where it never began.
            raise
        return _settle(*outcome.pop())

    @_uninterrupted
    def start(
        self,
        call: Callable[[], Coroutine[Any, Any, Any]],
        context: contextvars.Context,
        runner: int,
        on_end: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Run the coroutine that call() makes, and call on_end(result, exception) on the loop."""
        interrupts: list[type[Interrupt]] = []
        tasks: list[asyncio.Task[Any]] = []

        def start() -> None:
            tasks.append(context.run(self.loop.create_task, _contain(call)))
            tasks[0].add_done_callback(end)
            if interrupts:  # Before there was a task to cancel.
                tasks[0].cancel()

        def stop(exception: type[Interrupt]) -> None:
            interrupts.append(exception)
            self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

        def end(task: asyncio.Task[Any]) -> None:
            tasks.clear()  # Or this closure and the task would hold each other.
            with _interrupt_lock:
                _stoppers.pop(runner, None)
            if not task.cancelled():
                on_end(*_outcome_of(task))
            elif interrupts:
                on_end(None, interrupts[0]())
            else:
                on_end(None, RuntimeError("The coroutine was cancelled."))

        with _interrupt_lock:
            _stoppers[runner] = stop
        self.loop.call_soon_threadsafe(start)


async def _contain(call: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[Any, BaseException | None]:
    """Run the coroutine that call() makes; give what would end the loop's thread back beside the result."""
    pid = os.getpid()
    try:
        return await call(), None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error
    finally:
        if os.getpid() != pid:
            os._exit(0)  # It forked and its child returned here: there it ends.


def _outcome_of(task: asyncio.Task[tuple[Any, BaseException | None]]) -> tuple[Any, BaseException | None]:
    """The result or the exception of a coroutine that _contain() ran and nobody cancelled."""
    error = task.exception()
    return task.result() if error is None else (None, error)


def _settle(result: Any, exception: BaseException | None) -> Any:
    """Return a result, or raise the exception that came in its place."""
    try:
        if exception is not None:
            raise exception
        return result
    finally:
        del exception  # Its traceback has this frame: it would hold itself.


#: Seconds between looks for an interrupt while a thread waits for its coroutine.
_INTERRUPT_CHECK_S = 0.1

#: Seconds that a cancelled coroutine has for cleaning up.
_CANCEL_GRACE_S = 1.0

_event_loop_lock = threading.RLock()  # Guards _event_loop_thread; no fork while asyncio is imported.
_event_loop_thread: _EventLoopThread | None = None


def _get_event_loop_thread() -> _EventLoopThread:
    """Return this process's event loop thread, started at first need and anew after a fork."""
    global _event_loop_thread
    with _event_loop_lock:
        if _event_loop_thread is None or not _event_loop_thread.thread.is_alive():
            _event_loop_thread = _EventLoopThread()
        return _event_loop_thread


def async_to_sync(fn: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, _R]:
    """Make a plain function of a coroutine function; it runs on the event loop's thread."""

    @functools.wraps(fn)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        run_coroutine = _runner.run_coroutine or _get_event_loop_thread().run_coroutine
        return cast(_R, run_coroutine(fn(*args, **kwargs)))

    return run


#: Whether what runs was called, directly or not, by one of the threads below.
_is_in_thread: contextvars.ContextVar[bool] = contextvars.ContextVar("_is_in_thread", default=False)

#: Threads that wait for the database on behalf of coroutines, at most.
_MOST_THREADS = 8


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """These threads; asyncio's own may all be busy with what the program gives them."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_MOST_THREADS, "dramalite-thread")


async def _run_in_thread(fn: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a function in one of them, with the context of the coroutine that awaits it."""
    import asyncio

    if _is_in_thread.get():  # A hook's: all of these may be busy with what waits for this.
        from concurrent.futures import ThreadPoolExecutor

        threads, is_own = ThreadPoolExecutor(1, "dramalite-thread"), True
    else:
        threads, is_own = _threads(), False
    context = contextvars.copy_context()
    context.run(_is_in_thread.set, True)
    call = functools.partial(context.run, fn, *args, **kwargs)
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
    finally:
        if is_own:
            threads.shutdown(wait=False)


# ------------------------------------------------------------------------------------------
# Actors
#
# An actor is a function that can be sent messages.  Options are checked where they are
# given, at decoration or at send(), by the table _OPTION_CHECKS; to add an option, give it a
# row there and name it in the actor_options of the middleware that reads it.
# ------------------------------------------------------------------------------------------
def _check_time_limit(value: Any, what: str) -> int | float:
    return math.inf if value == math.inf else _milliseconds(value, what)


def _check_int(value: Any, what: str, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is {value!r}; give an int.")
    if not lowest <= value <= 1 << 62:
        raise ValueError(f"{what} is {value!r}; give an int from {lowest} to {1 << 62}.")
    return value


def _check_retries(value: Any, what: str) -> int:
    if isinstance(value, (int, float)) and (value == math.inf or value < 0):
        raise ValueError(f"{what} is {value!r}; give None to retry for ever, 0 for no retries.")
    return _check_int(value, what, lowest=0)


_check_count = functools.partial(_check_int, lowest=0)
_check_crash_limit = functools.partial(_check_int, lowest=1)  # What runs may crash.
_check_priority = functools.partial(_check_int, lowest=-(1 << 62))


def _check_flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{what} is {value!r}; give True or False.")
    return value


def _check_callback(value: Any, what: str) -> str:
    """An actor's name, also for the Actor or the generic actor itself."""
    actor = getattr(value, "__actor__", value)
    if isinstance(actor, Actor):
        return actor.actor_name
    if not isinstance(value, str):
        raise TypeError(f"{what} value must be an Actor or the name of one, not {value!r}.")
    return value


def _check_throws(value: Any, what: str) -> tuple[type[BaseException], ...]:
    kinds = tuple(value) if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise TypeError(f"{what} has {kind!r}; give exception classes.")
    return kinds


def _check_function(value: Any, what: str) -> Any:
    if not callable(value):
        raise TypeError(f"{what} is {value!r}; give a function.")
    return value


def _check_backoff(value: Any, what: str) -> Any:
    if callable(value):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{what} is {value!r}; give a list of milliseconds or a function of the attempt.")
    return [_milliseconds(item, what) for item in value]


def _check_on_crash(value: Any, what: str) -> Any:
    if value not in ("requeue", "fail"):
        raise ValueError(f'{what} is {value!r}; give "requeue" or "fail".')
    return value


#: What each standard option must be: a function that returns the value to keep, or raises.
_OPTION_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "max_age": _milliseconds,
    "time_limit": _check_time_limit,
    "min_backoff": _milliseconds,
    "max_backoff": _milliseconds,
    "backoff": _check_backoff,
    "result_ttl": _milliseconds,
    "delay": _milliseconds,
    "max_retries": _check_retries,
    "max_crashes": _check_crash_limit,
    "priority": _check_priority,
    "store_results": _check_flag,
    "notify_shutdown": _check_flag,
    "pipe_ignore": _check_flag,
    "on_success": _check_callback,
    "on_failure": _check_callback,
    "on_retry_exhausted": _check_callback,
    "throws": _check_throws,
    "retry_when": _check_function,
    "on_crash": _check_on_crash,
}


#: Options of messages that are like none of those known: the user's own.
_unusual_options: set[str] = set()


def _check_options(options: Mapping[str, Any], actor_name: str) -> dict[str, Any]:
    """Return the options with standard ones checked and normalised; the order is kept.

    Any may be None but the priority, of which each actor has one.
    """
    checked = {}
    for name, value in options.items():
        if name in _OPTION_CHECKS and (value is not None or name == "priority"):
            value = _OPTION_CHECKS[name](value, f"Actor {actor_name!r}: {name}")
        checked[name] = value
    return checked


class Actor(Generic[_P, _R]):
    """A function that can be sent messages; made by the decorator `actor`.

    Calling it runs the function here and now.  Raises ValueError if the broker already has
    an actor of that name.
    """

    def __init__(
        self,
        fn: Callable[_P, Any],
        *,
        broker: Broker,
        actor_name: str,
        queue_name: str,
        priority: int,
        options: dict[str, Any],
    ) -> None:
        function = fn.perform if isinstance(fn, GenericActor) else fn
        if _code_flags(function) & _CO_GENERATORS:
            raise TypeError(
                f"Actor {actor_name!r} is a generator function, whose body would never run."
            )
        module = getattr(fn, "__module__", None) or "_"
        self.logger = get_logger(module, actor_name)
        #: The function if it is `async def`; workers then run it without holding a thread.
        self.coroutine_fn: Callable[_P, Coroutine[Any, Any, _R]] | None = (
            function if _is_coroutine_function(function) else None
        )
        self.fn: Callable[_P, _R] = fn if self.coroutine_fn is None else async_to_sync(function)
        self._made_fn = self.fn  # Somebody may put another one in its place.
        self.broker = broker
        self.actor_name = actor_name
        self.queue_name = queue_name
        self.priority = _check_priority(priority, f"Actor {actor_name!r}: priority")
        self.options = _check_options(options, actor_name)
        self._check_name(broker)
        broker.declare_actor(self)

    def _check_name(self, broker: Broker) -> None:
        if not isinstance(self.actor_name, str):
            raise TypeError(f"actor_name is {self.actor_name!r}; give a str.")
        if "\0" in self.actor_name:  # SQLite would cut it off there.
            raise ValueError(f"actor_name is {self.actor_name!r}; give one without a null character.")
        if self.actor_name in broker.actors:
            raise ValueError(f"An actor named {self.actor_name!r} is already registered.")

    def message(self, *args: Any, **kwargs: Any) -> Message[_R]:
        """Make a message without sending it; what a step before it in a pipeline gives is not among the arguments."""
        return self.message_with_options(args=args, kwargs=kwargs)

    def message_with_options(
        self, *, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Message[_R]:
        """Make a message with options of its own, which go before the actor's.

        Raises TypeError or ValueError for an option of a wrong type or value.
        """
        if type(args) is not tuple and (isinstance(args, (str, bytes)) or not isinstance(args, Iterable)):
            raise TypeError(f"Actor {self.actor_name!r}: args is {args!r}; give a tuple or list.")
        if kwargs is not None and not isinstance(kwargs, dict):
            raise TypeError(f"Actor {self.actor_name!r}: kwargs is {kwargs!r}; give a dict.")
        broker = self.broker
        time_ms = broker.clock.time_ms()
        fields = {
            "queue_name": self.queue_name,
            "actor_name": self.actor_name,
            "args": tuple(args),
            "kwargs": {} if kwargs is None else kwargs,
            "options": self._check_own_options(options) if options else options,
            "message_id": _new_message_id(time_ms, broker._entropy()),
            "message_timestamp": time_ms,
        }
        return _build_message(fields, broker)

    def _check_own_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a message; of those that nothing here knows, misspelt ones are refused."""
        for name in options.keys() - _OPTION_CHECKS.keys() - self.broker.actor_options - _unusual_options:
            import difflib

            similar = difflib.get_close_matches(name, {*_OPTION_CHECKS, *self.broker.actor_options}, 1, 0.8)
            if similar:
                raise ValueError(
                    f"Actor {self.actor_name!r}: there is no option {name!r}; did you mean {similar[0]!r}? "
                    f"An option of your own is one that a middleware of yours has in its actor_options."
                )
            _unusual_options.add(name)
        return _check_options(options, self.actor_name)

    def send(self, *args: _P.args, **kwargs: _P.kwargs) -> Message[_R]:
        """Send a message: when this returns, it is stored and will be run.

        Raises TypeError or ValueError for arguments that JSON can't carry, BrokerError if the
        message can't be stored; then nothing was.
        """
        return self.send_with_options(args=args, kwargs=kwargs)

    def send_with_options(
        self,
        *,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        delay: int | timedelta | None = None,
        **options: Any,
    ) -> Message[_R]:
        """Send a message that is due after `delay` (milliseconds or timedelta), with options."""
        if delay is not None:
            delay = _milliseconds(delay, f"Actor {self.actor_name!r}: delay")
        message = self.message_with_options(args=args, kwargs=kwargs, **options)
        return self.broker.enqueue(message, delay=delay)

    async def send_async(self, *args: _P.args, **kwargs: _P.kwargs) -> Message[_R]:
        """send() for coroutines: the event loop goes on while the message is stored.

        Where it is cancelled meanwhile, the message may be sent all the same.
        """
        return await self._call_async(functools.partial(self.send, *args, **kwargs))

    async def send_with_options_async(
        self,
        *,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        delay: int | timedelta | None = None,
        **options: Any,
    ) -> Message[_R]:
        """send_with_options() for coroutines, as send_async() is send()."""
        return await self._call_async(
            functools.partial(self.send_with_options, args=args, kwargs=kwargs, delay=delay, **options)
        )

    async def _call_async(self, send: Callable[[], Message[_R]]) -> Message[_R]:
        if self.broker.clock.is_virtual:  # A thread's time is not that of the simulation.
            return send()
        return await _run_in_thread(send)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the function here and now: no message, no middleware, no retries."""
        if not self.logger.isEnabledFor(logging.DEBUG):
            return self.fn(*args, **kwargs)
        started = _SYSTEM_CLOCK.monotonic()
        self.logger.debug("Received args=%r kwargs=%r.", args, kwargs)
        try:
            return self.fn(*args, **kwargs)
        finally:
            taken_ms = (_SYSTEM_CLOCK.monotonic() - started) * 1000
            self.logger.debug("Completed after %.2f ms.", taken_ms)

    def __repr__(self) -> str:
        return f"Actor({self.fn!r}, queue_name={self.queue_name!r}, actor_name={self.actor_name!r})"

    def __str__(self) -> str:
        return f"Actor({self.actor_name})"


#: The flag of a code object that `async def` sets; inspect, which names it, is slow to import.
_CO_COROUTINE = 0x80

#: Those of generators, plain and async.
_CO_GENERATORS = 0x20 | 0x200


def _is_coroutine_function(fn: Any) -> bool:
    """Tell whether calling `fn` makes a coroutine, as inspect.iscoroutinefunction() does."""
    if _code_flags(fn) & _CO_COROUTINE or _code_flags(getattr(type(fn), "__call__", None)) & _CO_COROUTINE:
        return True
    inspect = sys.modules.get("inspect")  # Without it nobody can have marked a function.
    return inspect is not None and bool(inspect.iscoroutinefunction(fn))


def _code_flags(fn: Any) -> int:
    """The flags of a function's code, 0 where there is none."""
    while isinstance(fn, (functools.partial, types.MethodType)):
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    return cast(int, getattr(getattr(fn, "__code__", None), "co_flags", 0))


def _check_option_names(
    options: Mapping[str, Any], actor_name: str, broker: Broker, adopted: Iterable[str] = ()
) -> None:
    """Raise ValueError if no middleware of the broker understands one of these options."""
    known = {*broker.actor_options, *broker.own_actor_options, *adopted, "actor_name", "queue_name", "priority"}
    unknown = sorted(set(options) - known)
    if unknown:
        import difflib

        similar = difflib.get_close_matches(unknown[0], known, 1)
        raise ValueError(
            f"Actor {actor_name!r} has undefined options: {', '.join(unknown)}. Did you forget to "
            f"add a middleware to your broker{f', or mean {similar[0]}' if similar else ''}? It knows: "
            f"{', '.join(sorted(known))}."
        )


@overload
def actor(fn: Callable[_P, Coroutine[Any, Any, _R]], /) -> Actor[_P, _R]: ...
@overload
def actor(fn: Callable[_P, _R], /) -> Actor[_P, _R]: ...
@overload
def actor(
    fn: None = None,
    *,
    actor_class: Callable[..., Any] = ...,
    actor_name: str | None = None,
    queue_name: str = "default",
    priority: int = 0,
    broker: Broker | None = None,
    **options: Any,
) -> _ActorDecorator: ...
def actor(
    fn: Callable[..., Any] | None = None,
    *,
    actor_class: Callable[..., Any] = Actor,
    actor_name: str | None = None,
    queue_name: str = "default",
    priority: int = 0,
    broker: Broker | None = None,
    **options: Any,
) -> Any:
    """Make an actor of a function: @actor, or @actor(max_retries=3).

    `broker` is the default broker if None; lower `priority` numbers run first.  Options, which
    send_with_options() takes too where the message can carry them, in milliseconds or timedeltas:
    max_retries (20; None: for ever), min_backoff (15,000) and max_backoff (7 days), backoff (a list
    or a function of the attempt in place of those), retry_when, throws, on_retry_exhausted;
    time_limit (600,000), max_age (None), notify_shutdown (False); store_results (False) and
    result_ttl (600,000); on_success, on_failure; pipe_ignore (False); max_crashes (3) and on_crash
    ("requeue", or "fail").

    Raises ValueError for a bad queue name, an unknown option or a name that is taken, and
    TypeError for an option of a wrong type.
    """

    def declare(function: Callable[..., Any]) -> Any:
        if not callable(function):
            raise TypeError(f"{function!r} can't be an actor: give a function.")
        name = actor_name or getattr(function, "__name__", None)
        if name is None:
            raise AttributeError(f"{function!r} has no __name__ to call the actor by: give an actor_name.")
        _check_queue_name(queue_name)
        home = get_broker() if broker is None else broker
        if not isinstance(home, Broker):
            raise TypeError(f"Actor {name!r}: broker is {home!r}; give a Broker.")
        _check_option_names(options, name, home)
        return actor_class(
            function,
            actor_name=name,
            queue_name=queue_name,
            priority=priority,
            broker=home,
            options=dict(options),
        )

    return declare if fn is None else declare(fn)


if TYPE_CHECKING:

    class _ActorDecorator:
        """What @actor(...) returns, for type checkers: the signature is kept."""

        @overload
        def __call__(self, fn: Callable[_P, Coroutine[Any, Any, _R]], /) -> Actor[_P, _R]: ...
        @overload
        def __call__(self, fn: Callable[_P, _R], /) -> Actor[_P, _R]: ...
        def __call__(self, fn: Any, /) -> Any: ...


class _GenericActorMeta(type):
    """Makes an actor of each concrete subclass of GenericActor, and of its name an instance."""

    def __new__(
        mcs: type[_GenericActorMeta], name: str, bases: tuple[type, ...], namespace: dict[str, Any]
    ) -> Any:
        cls = super().__new__(mcs, name, bases, namespace)
        meta = cls._meta_options()
        if meta.pop("abstract"):
            return cls
        registry = meta.pop("actor", actor)
        instance = cast(Any, cls)()
        instance.__actor__ = registry(instance, **meta)
        return instance

    if TYPE_CHECKING:  # A subclass's name is bound to its instance, which has what an Actor has.

        def __getattr__(cls, name: str) -> Any: ...

    def _meta_options(cls) -> dict[str, Any]:
        """Meta's public attributes, inherited ones too; `abstract` counts only where it stands."""
        options: dict[str, Any] = {}
        for base in reversed(cls.Meta.__mro__):
            options.update({k: v for k, v in vars(base).items() if not k.startswith("_")})
        options["abstract"] = vars(vars(cls).get("Meta", object)).get("abstract", False)
        return options


class GenericActor(metaclass=_GenericActorMeta):
    """Base of class-based actors: subclass it, override perform(), configure in `class Meta`.

    The subclass's name is bound to its one instance, which has send() and all that an Actor
    has.  `Meta.abstract = True` makes a base class of it instead of an actor.
    """

    if TYPE_CHECKING:
        Meta: ClassVar[Any]  # Not a class, which those of subclasses would have to inherit from.
    else:

        class Meta:
            """Options of the actor, as keyword arguments of `actor`; None means the default."""

            abstract = True

    @property
    def __name__(self) -> Any:
        return type(self).__name__

    def __getattr__(self, name: str) -> Any:
        if name == "__actor__" or "__actor__" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["__actor__"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_coroutine_function(self.perform):
            return async_to_sync(self.perform)(*args, **kwargs)
        return self.perform(*args, **kwargs)

    def perform(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} does not implement perform()")


# ------------------------------------------------------------------------------------------
# Composition
#
# pipeline: messages that run one after the other, each getting the result of the one before.
# group: messages that run side by side.
# ------------------------------------------------------------------------------------------
def _home_of(children: Iterable[Any], broker: Broker | None) -> Broker:
    """The broker given, else that of the first child that has one, else the default broker."""
    if broker is not None:
        return broker
    own = (child._broker if isinstance(child, Message) else child.broker for child in children)
    return next((home for home in own if home is not None), None) or get_broker()


def _checked_children(children: Any, what: str) -> list[Any]:
    """The children of a pipeline or group; TypeError for what can't be one."""
    if not isinstance(children, Iterable):
        raise TypeError(f"{what}({children!r}): give a list of messages.")
    checked = [child._message if isinstance(child, MessageProxy) else child for child in children]
    for child in checked:
        if not isinstance(child, (Message, pipeline, group)):
            raise TypeError(
                f"{child!r} can't be part of a {what}; give messages, as made by actor.message(...), "
                f"pipelines or groups."
            )
        if isinstance(child, Message):
            _check_sendable(child)
    return checked


def _longer_delay(one: int | timedelta | None, other: int | timedelta | None) -> int | None:
    """The longer of two delays, in milliseconds; None for none at all."""
    delays = [_milliseconds(delay, "delay") for delay in (one, other) if delay is not None]
    return max(delays, default=0) or None


class pipeline:  # noqa: N801  (Dramatiq's name)
    """Messages to run one after the other; each result is the next one's last argument.

    Children may be pipelines, which are joined in, and groups of messages and pipelines: each
    member gets the result of the step before, the step after gets the list of theirs.
    `broker` is that of the first message if None.
    """

    def __init__(
        self, children: Iterable[Message[Any] | pipeline | group], *, broker: Broker | None = None
    ) -> None:
        children = _checked_children(children, "pipeline")
        self.broker = _home_of(children, broker)
        #: The steps, in order; a group is one.
        self.messages: list[Any] = []
        for child in children:
            steps = child.messages if isinstance(child, pipeline) else [child]
            self.messages += [step.copy() for step in steps]
        pairs = [*itertools.pairwise(self.messages)]
        for step, successor in reversed(pairs):  # What a step is told holds all that follows.
            if isinstance(step, Message):
                step.options.pop("pipe_group", None)
                step.options.pop("pipe_target", None)
                if isinstance(successor, group):
                    step.options["pipe_group"] = successor.describe()
                else:
                    step.options["pipe_target"] = successor.asdict()
            elif isinstance(successor, group):
                raise TypeError("A group can't follow a group in a pipeline; put a step between them.")
            else:
                step.successor = successor

    def __len__(self) -> int:
        return len(self.messages)

    def __or__(self, other: Message[Any] | pipeline | group) -> pipeline:
        return type(self)([*self.messages, other], broker=self.broker)

    def __str__(self) -> str:
        return f"pipeline([{', '.join(map(str, self.messages))}])"

    def run(self, *, delay: int | timedelta | None = None) -> pipeline:
        """Send the first step; the others follow as results come.

        Raises RuntimeError if a group is a step, and the broker lacks the middleware for that.
        """
        for step in self.messages:
            if isinstance(step, group):
                step._check()
        if self.messages:
            first = self.messages[0]
            if isinstance(first, group):
                first.run(delay=delay)
            else:
                self.broker.enqueue(first, delay=_longer_delay(delay, first.options.get("delay")))
        return self

    @property
    def completed(self) -> bool:
        """Whether the last message has a result; raises ResultFailure if it failed."""
        return not self.messages or _has_result(self.messages[-1], self.broker)

    @property
    def completed_count(self) -> int:
        """How many messages, from the first on, have results; raises ResultFailure."""
        have_results = (_has_result(step, self.broker) for step in self.messages)
        return sum(itertools.takewhile(bool, have_results))

    def get_result(self, *, block: bool = False, timeout: int | timedelta | None = None) -> Any:
        """Return the last step's result, a list if it is a group; see Message.get_result()."""
        if not self.messages:
            raise ValueError("An empty pipeline has no result.")
        try:
            (result,) = _results_in_order(self.messages[-1:], self.broker, block, timeout)
        except ResultUnavailable:
            for step in self.messages:  # Where a step failed, that is the error to raise.
                with contextlib.suppress(ResultMissing):
                    list(_results_in_order([step], self.broker, False, None))
            raise
        return result

    def get_results(self, *, block: bool = False, timeout: int | timedelta | None = None) -> Iterator[Any]:
        """Yield the result of each step, in order; `timeout` (ms) is for all of them together."""
        return _results_in_order(self.messages, self.broker, block, timeout)


class group:  # noqa: N801  (Dramatiq's name)
    """Messages, pipelines or groups to run side by side, on the first one's broker if `broker` is None."""

    def __init__(
        self,
        children: Iterable[Message[Any] | pipeline | group],
        *,
        broker: Broker | None = None,
    ) -> None:
        self.children = _checked_children(children, "group")
        self.broker = _home_of(self.children, broker)
        #: Message data of what to send when all have succeeded, and when all have ended.
        self.completion_callbacks: list[dict[str, Any]] = []
        self.end_callbacks: list[dict[str, Any]] = []
        #: The step after this one, in a pipeline.
        self.successor: Message[Any] | None = None

    def __len__(self) -> int:
        return len(self.children)

    def __or__(self, other: Message[Any] | pipeline | group) -> pipeline:
        return pipeline([self, other], broker=self.broker)

    def __str__(self) -> str:
        return f"group([{', '.join(map(str, self.children))}])"

    def copy(self) -> group:
        """Return a group of the same children, with the same callbacks."""
        copied = type(self)(self.children, broker=self.broker)
        copied.completion_callbacks = list(self.completion_callbacks)
        copied.end_callbacks = list(self.end_callbacks)
        return copied

    def add_completion_callback(self, message: Message[Any], *, whatever: bool = False) -> None:
        """Send a message once all members have succeeded; with `whatever`, when all have ended.

        A member that failed for good or was skipped has ended.  The count is committed with
        each member's acknowledgement: none is lost or counted twice, and it never expires.  Only
        that commit decides whether the message is sent, so no enqueue hook hears of it.
        """
        if not isinstance(message, (Message, MessageProxy)):
            raise TypeError(f"{message!r} is no message; make one by actor.message(...).")
        _check_sendable(message._message if isinstance(message, MessageProxy) else message)
        (self.end_callbacks if whatever else self.completion_callbacks).append(message.asdict())

    def run(self, *, delay: int | timedelta | None = None) -> group:
        """Send all children, in their order; messages next to each other in one transaction.

        Raises RuntimeError if the broker lacks the middleware that somebody waits by.
        """
        together: list[Message[Any]] = []
        for child in self._children_to_send():
            is_plain = isinstance(child, Message)
            wait = _longer_delay(delay, child.options.get("delay")) if is_plain else None
            if is_plain and wait is None:
                together.append(child)
                continue
            self.broker.enqueue_many(together)
            together = []
            if is_plain:
                self.broker.enqueue(child, delay=wait)
            else:
                child.run(delay=delay)
        self.broker.enqueue_many(together)
        return self

    def _check(self) -> GroupCallbacks | None:
        """What counts the members, if somebody waits for all of them.

        Raises RuntimeError if the broker can't count them, or keep results for the next step.
        """
        successor = self.successor
        if not (self.completion_callbacks or self.end_callbacks or successor is not None):
            return None
        counter = next((item for item in self.broker.middleware if isinstance(item, GroupCallbacks)), None)
        if counter is None:
            raise RuntimeError(
                "This broker counts no groups; add the middleware: broker.add_middleware(GroupCallbacks())."
            )
        if successor is not None:
            actor = self.broker.actors.get(successor.actor_name)
            options = {**(actor.options if actor else {}), **successor.options}
            if not options.get("pipe_ignore"):
                self.broker.get_results_backend()
        return counter

    def _children_to_send(self) -> list[Any]:
        """The children; where somebody waits for all of them, copies that count."""
        counter, successor = self._check(), self.successor
        if counter is None:
            return self.children
        callbacks = list(self.completion_callbacks)
        children, sources = self.children, None
        uuid = _new_message_id(self.broker.clock.time_ms(), self.broker._entropy())
        if successor is not None:
            self._check_chains()  # Before anything is sent.
            children = list(map(_storing_results, self.children))  # For it.
            last = [_chain(child)[-1] for child in children]
            sources = [[message.queue_name, message.actor_name, message.message_id] for message in last]
            callbacks.append(successor.copy(options={"pipe_results": uuid}).asdict())
        count = sum(map(_count_members, children))
        membership = {"group_completion_uuid": uuid, "group_completion_callbacks": callbacks}
        if self.end_callbacks:
            membership["group_end_callbacks"] = self.end_callbacks
        seen: collections.Counter[str] = collections.Counter()
        children = [_with_membership(child, membership, seen) for child in children]
        if count or sources is not None:
            counter.create(self.broker, uuid, count, sources)
        if not count:  # All of nothing has succeeded.
            for data in (*callbacks, *self.end_callbacks):
                message: Message[Any] = Message(**data)
                self.broker.enqueue(message, delay=_delay_after_group(message))
        return children

    def _check_chains(self) -> None:
        """Raise TypeError where a child of a step is more than a pipeline of messages."""
        for child in self.children:
            if not _chain(child) or not all(isinstance(step, Message) for step in _chain(child)):
                raise TypeError(
                    f"{child} can't be in a group that is a step of a pipeline; give messages, or "
                    f"pipelines of messages."
                )

    def describe(self) -> dict[str, Any]:
        """This group as data for the step before it; see restore()."""
        self._check_chains()
        successor = self.successor
        children = self.children if successor is None else map(_storing_results, self.children)
        return {
            "chains": [[step.asdict() for step in _chain(child)] for child in children],
            "completion_callbacks": self.completion_callbacks,
            "end_callbacks": self.end_callbacks,
            "successor": None if successor is None else successor.asdict(),
        }

    @classmethod
    def restore(cls, data: dict[str, Any], broker: Broker) -> group:
        """The group that describe() told of."""
        chains: list[list[Message[Any]]] = [
            [Message(**step) for step in chain] for chain in data["chains"]
        ]
        restored = cls(
            [pipeline(chain, broker=broker) if len(chain) > 1 else chain[0] for chain in chains],
            broker=broker,
        )
        restored.completion_callbacks = data["completion_callbacks"]
        restored.end_callbacks = data["end_callbacks"]
        if data["successor"] is not None:
            restored.successor = Message(**data["successor"])
        return restored

    @property
    def completed(self) -> bool:
        """Whether all children have results; raises ResultFailure if one failed."""
        return self.completed_count == len(self)

    @property
    def completed_count(self) -> int:
        """How many children have results, in any order; raises ResultFailure."""
        return sum(_has_result(child, self.broker) for child in self.children)

    def get_results(self, *, block: bool = False, timeout: int | timedelta | None = None) -> Iterator[Any]:
        """Yield each child's result, in order: a pipeline's last, a group's as a list."""
        return _results_in_order(self.children, self.broker, block, timeout)

    def wait(self, *, timeout: int | timedelta | None = None) -> None:
        """Wait up to `timeout` milliseconds, 10,000 for each child if None, until all have results.

        Raises ResultTimeout, or ResultFailure for one that failed.
        """
        for _result in self.get_results(block=True, timeout=timeout):
            pass


def _with_membership(child: Any, membership: dict[str, Any], seen: collections.Counter[str]) -> Any:
    """A copy of a group's child whose members count for the group; `seen` has the ids of those so far."""
    if isinstance(child, Message):
        seen[child.message_id] += 1
        if seen[child.message_id] > 1:
            membership = {**membership, "group_occurrence": seen[child.message_id]}
        if "group_completion_uuid" not in child.options:
            return child.copy(options=membership)
        further = [*child.options.get("group_further", []), membership]
        return child.copy(options={"group_further": further})
    if isinstance(child, pipeline):
        steps = [*child.messages]
        for index in reversed(range(len(steps))):  # The last one that is no empty group.
            if _count_members(steps[index]):
                steps[index] = _with_membership(steps[index], membership, seen)
                break
        return pipeline(steps, broker=child.broker)
    copied = child.copy()
    copied.children = [_with_membership(member, membership, seen) for member in child.children]
    return copied


def _count_members(child: Any) -> int:
    if isinstance(child, Message):
        return 1
    if isinstance(child, pipeline):
        return next(filter(None, map(_count_members, reversed(child.messages))), 0)
    return sum(map(_count_members, child.children))


def _chain(child: Any) -> list[Any]:
    """The messages of a child of a group that is a step."""
    return child.messages if isinstance(child, pipeline) else [child]


#: Milliseconds that results are kept for the step that waits for a group: 7 days.
_STEP_RESULT_TTL_MS = 7 * 24 * 3600 * 1000


def _storing_results(child: Any) -> Any:
    """A copy of a group's member that keeps its result for the step after the group."""
    if isinstance(child, pipeline):
        *steps, last = child.messages
        return pipeline([*steps, _storing_results(last)], broker=child.broker)
    return child.copy(options={"store_results": True, "result_ttl": _STEP_RESULT_TTL_MS})


def _delay_after_group(message: Message[Any]) -> int | None:
    """The delay of what a group is followed by: of a pipeline's step, not of callbacks."""
    return (message.options.get("delay") or None) if "pipe_results" in message.options else None


def _has_result(child: Message[Any] | pipeline | group, broker: Broker) -> bool:
    if not isinstance(child, Message):
        return child.completed
    backend = broker.get_results_backend()
    if backend._has_own_way():
        with contextlib.suppress(ResultMissing):
            backend.get_result(child)
            return True
        return False
    value = backend._get(backend._key(child))  # Whether one may still come takes long to find out.
    if value is not Missing:
        backend.unwrap_result(value)
    return value is not Missing


def _results_in_order(
    children: Iterable[Any], broker: Broker, block: bool, timeout: int | timedelta | None
) -> Iterator[Any]:
    """Yield results one by one; a timeout is one deadline for all, None 10 s for each."""
    timeout = _timeout_ms(timeout)
    deadline = None if timeout is None else broker.clock.monotonic() + timeout / 1000
    for child in children:
        if deadline is not None:
            timeout = max(0, round((deadline - broker.clock.monotonic()) * 1000))
        if isinstance(child, group):
            yield list(child.get_results(block=block, timeout=timeout))
        elif isinstance(child, pipeline):
            yield child.get_result(block=block, timeout=timeout)
        else:
            backend = broker.get_results_backend()
            yield child.get_result(backend=backend, block=block, timeout=timeout)


# ------------------------------------------------------------------------------------------
# Bells
#
# What a worker with nothing to do waits at: others ring it when there is work.
# ------------------------------------------------------------------------------------------
class _Bell:
    """Wakes the worker thread that waits for work, from this process only."""

    port = 0

    def __init__(self) -> None:
        # Free from a ring until somebody has heard it.  No Event: a signal handler that rings while it
        # interrupts a ring would wait for itself.
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # It rings already.
            self._silence.release()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a ring; tell whether there was one."""
        return self._silence.acquire(timeout=max(timeout, 0.0))

    def close(self) -> None:
        """Let go of what the bell holds."""


class _SocketBell(_Bell):
    """Wakes the waiting worker thread from any process of this machine, by an empty datagram."""

    def __init__(self) -> None:
        import socket

        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind(("127.0.0.1", 0))
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]

    def ring(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(b"", ("127.0.0.1", self.port))

    def wait(self, timeout: float) -> bool:
        try:
            self._socket.settimeout(max(timeout, 0.0))
            self._socket.recv(16)
        except OSError:  # Timed out, would block, or closed under us.
            return False
        with contextlib.suppress(OSError):  # Rings that queued up mean one look all the same.
            self._socket.settimeout(0.0)
            for _ in range(64):
                self._socket.recv(16)
        return True

    def close(self) -> None:
        self._socket.close()


# ------------------------------------------------------------------------------------------
# Liveness and wake-ups
#
# Each worker holds a slot, a row of 64-bit words that other processes of the same database
# read: who it is, where to ring, until when it sleeps, which messages it is running.  For a
# file the words are a shared mapping of `<path>-lock`, and a byte-range lock on the slot
# proves that the worker lives: the kernel drops it when the process dies, whatever clocks
# say.  In memory the words are an array.  Such locks don't exclude within one process and
# are lost when any descriptor of the file is closed, so all engines of a process (vendored
# copies of this module too) share one descriptor, kept in sys.modules.
# Lost-wake-up rule: a worker says that it sleeps before its last look at the queue.
# ------------------------------------------------------------------------------------------
_SLOTS = 128
_HEADER = 0  # No worker's slot: its lock is for checkpoints, its words are the highest slot ever used,
_HIGHEST, _FAILED_FLUSHES, _MENDED_FLUSHES = range(3)  # and how many flushes of the log failed, and are mended.
_SLOT_WORDS = 1024
_OWNER, _PORT, _WAKE_AT, _SERVES, _PID, _RUNNING = range(6)  # Words of a slot; the rest: running.
_MAX_TRACKED = _SLOT_WORDS - _RUNNING

_SIDE_FILE_SIZE = 8 * _SLOTS * _SLOT_WORDS
_BLANK_SLOT = memoryview(bytes(8 * _SLOT_WORDS)).cast("q")

#: Seconds between two looks whether another process has filled the side file up.
_FILL_NAP_S = 1e-4

#: A worker that sleeps until it is rung.
_FOREVER = 1 << 62

#: What a slot serves that belongs to no worker but to those that wait for outcomes.
_WATCHING = 1 << 62

#: Slots that processes which wait for results leave to workers; they look by themselves then.
_KEPT_FOR_WORKERS = 32


class _Slots:
    """The workers of a database in memory."""

    def __init__(self, guard: threading.RLock) -> None:
        self.words: Any = memoryview(bytearray(_SIDE_FILE_SIZE)).cast("q")
        self.held: dict[int, object] = {}  # Slots of this process, and who has them.  Guarded by both locks.
        self.bells: dict[int, _Bell] = {}  # Their bells.
        self.abandoned: set[int] = set()  # Owners in this process that died without their process.
        # The database's, taken first: a signal handler may send, through that broker, where lock is held.
        self.guard = guard
        self.lock: Any = threading.RLock()  # Of all the brokers of this process on the same file.

    def make_bell(self) -> _Bell:
        return _Bell()

    def acquire(self, bell: _Bell, serves: int, tracked: bool) -> _Slot:
        """Take a free slot; raise BrokerError if there is none."""

        def worth(index: int) -> tuple[bool, bool]:
            """Unused ones go first, then those that only watched: the others tell what they ran."""
            base = index * _SLOT_WORDS
            return self.words[base + _OWNER] != 0, self.words[base + _RUNNING] >= 0

        end = _SLOTS if serves != _WATCHING else _SLOTS - _KEPT_FOR_WORKERS
        with self.guard, self.lock:
            for index in sorted(range(1, end), key=worth):
                if self.hold(index):
                    break
            else:
                raise BrokerError(f"All {_SLOTS - 1} worker slots of this database are taken.")
            self.bells[index] = bell
            slot = _Slot(self, index, bell, serves, tracked)
            self.words[_HIGHEST] = max(self.words[_HIGHEST], index)
            return slot

    def hold(self, index: int, holder: object = None) -> bool:
        """Lock a slot for this process; False if it is locked, here or elsewhere."""
        with self.guard, self.lock:
            if index in self.held or not self._take(index):
                return False
            self.held[index] = holder
            return True

    def let_go(self, index: int, holder: object = None) -> None:
        """Undo hold() by the same holder, also where an exception has kept it from ending."""
        with self.guard, self.lock:
            if self.held.get(index, holder) is holder:
                self.held.pop(index, None)
                self._give_back(index)

    def abandon(self, index: int) -> None:
        """Leave a slot of this process as if the process had died."""
        with self.guard, self.lock:
            self.words[index * _SLOT_WORDS + _WAKE_AT] = 0
            self.abandoned.add(self.words[index * _SLOT_WORDS + _OWNER])
            self.bells.pop(index, None)
            self.let_go(index)

    def free(self, index: int) -> None:
        """Give a slot of this process back."""
        with self.guard, self.lock:
            base = index * _SLOT_WORDS
            self.words[base + _OWNER] = 0  # First, since it makes the rest valid.
            self.words[base : base + _SLOT_WORDS] = _BLANK_SLOT
            self.abandon(index)

    def seize(self, owner: int) -> _Remains | None:
        """Take what a worker left behind if it is dead; None while it lives."""
        index = owner & 0xFF if isinstance(owner, int) else 0  # Another program may have written it.
        base = index * _SLOT_WORDS
        with self.guard, self.lock:
            if not 0 < index < _SLOTS or self.words[base + _OWNER] != owner:
                return _Remains(self)
            if not self.hold(index):
                return None
            running = None
            if self.words[base + _RUNNING] >= 0:
                words = self.words[base + _RUNNING : base + _SLOT_WORDS]
                running = [word for word in words if word]
            return _Remains(self, index, running, self.words[base + _PID])

    def is_surely_dead(self, owner: int) -> bool:
        """Tell whether the owner of an unlocked slot is dead, not one that lives and whose job dropped the lock."""
        return True

    def clear(self, owner: int) -> None:
        """Free the slot of a dead worker that has left nothing behind."""
        remains = self.seize(owner)
        if remains is not None:
            remains.release()

    def wake(self, due_ms: int, bit: int) -> None:
        """Ring one worker that serves `bit` and sleeps beyond `due_ms`; all, if they are watching."""
        words = self.words
        for base in self._used():
            if words[base + _WAKE_AT] > due_ms and words[base + _SERVES] & bit:
                words[base + _WAKE_AT] = 0
                self._ring(base)
                if bit != _WATCHING:
                    return

    def _used(self) -> range:
        """Where the slots begin that were ever used."""
        highest = min(self.words[_HIGHEST], _SLOTS - 1)  # More, if the file holds something else.
        return range(_SLOT_WORDS, (highest + 1) * _SLOT_WORDS, _SLOT_WORDS)

    def count_failed_flushes(self, more: int) -> int:
        """How many flushes of the log have failed, in any process; so many more are told to the others."""
        self.words[_FAILED_FLUSHES] += more
        return cast(int, self.words[_FAILED_FLUSHES])

    def mend_flushes(self, failed: int) -> None:
        """Note that all was moved which was in the log when so many had failed."""
        self.words[_MENDED_FLUSHES] = failed

    def is_log_whole(self) -> bool:
        """Tell whether no flush has failed since the log was moved."""
        return bool(self.words[_FAILED_FLUSHES] == self.words[_MENDED_FLUSHES])

    def has_worker(self) -> bool:
        """Tell whether a worker lives, in any process."""
        with self.guard, self.lock:
            return any(
                self.words[base + _SERVES] not in (0, _WATCHING) and not self._is_dead(base)
                for base in self._used()
                if self.words[base + _OWNER]
            )

    def dead(self) -> list[int]:
        """The owners that have died and whose slots nobody has freed."""
        with self.guard, self.lock:
            owners = [(base, self.words[base + _OWNER]) for base in self._used()]
            return [owner for base, owner in owners if owner and self._is_dead(base)]

    def _is_dead(self, base: int) -> bool:
        """Tell whether the owner of a slot has died.  Call with both locks held."""
        index = base // _SLOT_WORDS
        if not self.hold(index):
            return False
        self.let_go(index)
        return True

    def _ring(self, base: int) -> None:
        bell = self.bells.get(base // _SLOT_WORDS)
        if bell is not None:
            bell.ring()

    def _take(self, index: int) -> bool:
        return True

    def _give_back(self, index: int) -> None:
        pass

    def is_current(self) -> bool:
        """Whether this is still what other processes see."""
        return True

    def is_held(self) -> bool:
        """Whether this process still has what holds its locks."""
        return True

    def renew(self, index: int) -> None:
        """Lock a slot of this process again, if a job has dropped its lock."""
        with self.guard, self.lock, contextlib.suppress(OSError):
            if index in self.held and self.is_held():  # A closed descriptor's number may be another file's.
                self._take(index)


class _Slot:
    """A worker's slot: its identity, its bell, and what it tells the others."""

    def __init__(self, slots: _Slots, index: int, bell: _Bell, serves: int, tracked: bool) -> None:
        self.slots = slots
        self._index = index
        self._base = index * _SLOT_WORDS
        self._words = slots.words
        self._is_ours = True  # Until it was left; a late thread must not write to it then.
        self.bell = bell
        self.owner = int.from_bytes(os.urandom(6), "big") << 8 | index
        self._words[self._base + _PORT] = self.bell.port
        self._words[self._base + _PID] = os.getpid()
        self._words[self._base + _WAKE_AT] = 0
        self._words[self._base + _RUNNING] = 0 if tracked else -1  # It does not tell what it runs.
        self.serve(serves)
        self._words[self._base + _OWNER] = self.owner  # The last, since it makes the rest valid.

    def serve(self, serves: int) -> None:
        """Say which work to ring for: see _Engine.bit()."""
        if self._is_ours:
            self._words[self._base + _SERVES] = serves

    def sleep_until(self, time_ms: int) -> None:
        """Ask to be rung for work due before `time_ms`; 0 asks for no ring at all."""
        if self._is_ours:
            self._words[self._base + _WAKE_AT] = time_ms

    def run(self, thread: int, row_id: int) -> None:
        """Say which row a thread of a tracked worker is running; 0 for none."""
        if self._is_ours:
            self._words[self._base + _RUNNING + thread] = row_id

    def renew(self) -> None:
        """Take the lock back if a job has dropped it, by opening and closing the side file."""
        self.slots.renew(self._index)

    def is_known(self) -> bool:
        """Tell whether nobody has cleared the slot, who took this worker for dead."""
        return bool(self._words[self._base + _OWNER] == self.owner)

    def abandon(self) -> None:
        """Die: the others find what this worker leaves behind."""
        self._is_ours = False
        self.slots.abandon(self._index)
        self.bell.close()

    def release(self) -> None:
        """Leave: from now on this worker is dead to the others."""
        self.give_up()
        self.bell.close()

    def give_up(self) -> None:
        """Leave, but keep the bell, which another slot has."""
        if self._is_ours:
            self._is_ours = False
            if self.is_known():
                self.slots.free(self._index)
            else:  # It may be another worker's by now.
                self.slots.let_go(self._index)


class _Remains(NamedTuple):
    """What a dead worker left: the rows that it was running, None if that is not known."""

    slots: _Slots
    slot: int = 0  # 0 where no slot knows the worker: its side file may be gone.
    running: list[int] | None = None
    pid: int = 0

    def release(self) -> None:
        """Free the slot for another worker, once everything was taken from it."""
        if self.slot:
            self.slots.free(self.slot)

    def leave(self) -> None:
        """Leave them as they were found, for another look."""
        if self.slot:
            self.slots.abandon(self.slot)


class _SideFile(_Slots):
    """The workers of a database file, by its side file `<path>-lock`."""

    def __init__(self, database: str, guard: threading.RLock, *, create: bool) -> None:
        import socket

        self._database = database
        self.path = _beside(database, "-lock")
        self.bells = {}
        self.guard = guard
        shared = sys.modules.setdefault(
            "_dramalite_side_files", types.ModuleType("_dramalite_side_files")
        ).__dict__
        self.lock = shared.setdefault("locks", {}).setdefault(self.path, threading.RLock())
        self._files: dict[Any, types.SimpleNamespace] = shared.setdefault("files", {})  # By identity.
        self._is_closed = False
        with self.guard, self.lock:
            file = self._files.get(_file_identity(self.path))
            self._file: types.SimpleNamespace = self._open(create) if file is None else file
            self._file.users += 1
        self._descriptor, self._identity = self._file.descriptor, self._file.identity
        self.words, self.held, self.abandoned = self._file.words, self._file.held, self._file.abandoned
        self._sender: socket.socket | None = None
        with contextlib.suppress(OSError):  # Without it those elsewhere poll.
            self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sender.setblocking(False)
            weakref.finalize(self, self._sender.close)

    def _open(self, create: bool) -> types.SimpleNamespace:
        import mmap

        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        is_new = create and not os.path.exists(self.path)
        descriptor = os.open(self.path, flags | (os.O_CREAT if create else 0), 0o600)
        if is_new:
            _open_to_users_of(self.path.removesuffix("-lock"), descriptor)
        try:
            _fill_up(descriptor, _SIDE_FILE_SIZE)
            mapping = mmap.mmap(descriptor, _SIDE_FILE_SIZE)
            identity = _file_identity(descriptor)
            if identity is None or not identity[1]:
                raise OSError(errno.ENOTSUP, "its file system has no numbers to tell files apart")
        except OSError:
            os.close(descriptor)  # Nothing of this process is locked through it yet.
            raise
        return self._files.setdefault(
            identity,
            types.SimpleNamespace(
                descriptor=descriptor, mapping=mapping, words=memoryview(mapping).cast("q"),
                identity=identity, held={}, abandoned=set(), users=0,
            ),
        )  # fmt: skip

    def make_bell(self) -> _Bell:
        try:
            return _SocketBell()
        except OSError as error:
            get_logger("dramalite.worker").warning(
                "No datagram socket on 127.0.0.1 (%s); new work is found by polling.", error
            )
            return _Bell()

    def is_current(self) -> bool:
        # Looked up anew: a link in the path may lead elsewhere by now.
        return bool(_file_identity(_beside(self._database, "-lock")) == self._identity)

    def is_held(self) -> bool:
        return bool(_file_identity(self._descriptor) == self._identity)  # If not, a job has closed it.

    def _ring(self, base: int) -> None:
        port = self.words[base + _PORT]
        if not port:
            super()._ring(base)
            return
        with contextlib.suppress(OSError, OverflowError):  # A lost ring costs a poll's time, no more.
            if self._sender is not None:
                self._sender.sendto(b"", ("127.0.0.1", port))

    def is_surely_dead(self, owner: int) -> bool:
        return owner in self.abandoned

    def _take(self, index: int) -> bool:
        return _try_lock_byte(self._descriptor, index)

    def _give_back(self, index: int) -> None:
        with contextlib.suppress(OSError):  # A job that closed the descriptor gave it back.
            _unlock_byte(self._descriptor, index)
        self._close_if_unused()

    def close(self) -> None:
        """Let go of what is not needed while no worker runs."""
        if self._sender is not None:
            self._sender.close()
        with self.guard, self.lock:
            self._file.users -= not self._is_closed
            self._is_closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        """Close the file once nobody uses it: any sooner, and the locks that we hold would go with it."""
        file = self._file
        if not file.users and not file.held and self._files.get(file.identity) is file:
            del self._files[file.identity]
            file.words.release()
            file.mapping.close()
            if self.is_held():  # Or a job has closed the descriptor, and the number may be another's.
                os.close(file.descriptor)

    @staticmethod
    def forget_all() -> None:
        """In a forked child: the parent's slots are not ours, nor are its locks."""
        sys.modules.pop("_dramalite_side_files", None)


def _open_to_users_of(path: str, descriptor: int) -> None:
    """Give a new file the mode and owner of the database, as SQLite does with its log."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if hasattr(os, "fchown"):
            os.fchmod(descriptor, status.st_mode & 0o666)
            if os.geteuid() == 0:
                os.fchown(descriptor, status.st_uid, status.st_gid)


def _fill_up(descriptor: int, size: int) -> None:
    """Fill a file up with zeros: written, for a hole could find the disk full when it is stored to.

    By one process at a time: another one's zeros would wipe out what is stored there already.
    """
    while os.fstat(descriptor).st_size < size:
        if not _try_lock_byte(descriptor, _SLOTS):
            _SYSTEM_CLOCK.sleep(_FILL_NAP_S)
            continue
        try:
            missing = size - os.lseek(descriptor, 0, os.SEEK_END)
            os.write(descriptor, bytes(missing))
        finally:
            _unlock_byte(descriptor, _SLOTS)


def _beside(path: str, suffix: str) -> str:
    """A file beside a database: where a link leads, as SQLite has it, one for all names."""
    return os.path.realpath(path) + suffix


#: Device and inode.
_Identity = tuple[int, int] | None


def _file_identity(file: str | int) -> _Identity:
    """Device and inode of the file at a path, or of an open one; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# ------------------------------------------------------------------------------------------
# SQL
#
# The tables and statements of the queue.  A message is one row of dramalite_messages, in one
# of three states; a finished one is deleted, a dead one moves to dramalite_dead.  A row's id
# is its place in the queue: microseconds of the clock, or one more than the highest there is,
# so it is never reused and FIFO holds when the clock is set back.  A delayed row gets a new
# id when it becomes due: retries line up behind the fresh work of their time.
# States are written as literals, which lets SQLite use the partial indexes.
# No index on message_id: nothing looks a message up by it, and each index is one more page
# that every send writes (measured: 50 us a send with it, 38 us without).
# ------------------------------------------------------------------------------------------
_SCHEMA_VERSION = 3
_READY, _DELAYED, _CLAIMED = 0, 1, 2

_RESULTS_SCHEMA = (
    """CREATE TABLE dramalite_results (
        message_id TEXT NOT NULL,      -- first: ids rise with time, so new rows stand together
        key TEXT NOT NULL,
        value BLOB NOT NULL,
        expires_at INTEGER NOT NULL,   -- milliseconds since 1970
        PRIMARY KEY (message_id, key)
    ) WITHOUT ROWID""",
    "CREATE INDEX dramalite_results_by_age ON dramalite_results (expires_at)",
)

_MEMBERS_SCHEMA = (
    """CREATE TABLE dramalite_members (   -- of groups, those that have ended: each counts once
        uuid TEXT NOT NULL,
        message_id TEXT NOT NULL,
        failed_at INTEGER,             -- milliseconds since 1970; NULL where it has succeeded
        PRIMARY KEY (uuid, message_id)
    ) WITHOUT ROWID""",
    """CREATE TRIGGER dramalite_member_ended AFTER INSERT ON dramalite_members BEGIN
        UPDATE dramalite_groups
           SET unsuccessful = unsuccessful - (new.failed_at IS NULL), unended = unended - 1
         WHERE uuid = new.uuid;
    END""",
    """CREATE TRIGGER dramalite_member_succeeded AFTER UPDATE ON dramalite_members BEGIN
        UPDATE dramalite_groups SET unsuccessful = unsuccessful - 1 WHERE uuid = new.uuid;
    END""",
    """CREATE TRIGGER dramalite_group_ended AFTER DELETE ON dramalite_groups BEGIN
        DELETE FROM dramalite_members WHERE uuid = old.uuid;
    END""",
)

_SCHEMA = (
    "CREATE TABLE dramalite_meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    """CREATE TABLE dramalite_messages (
        id INTEGER PRIMARY KEY,        -- its place in the queue, about microseconds since 1970
        state INTEGER NOT NULL,        -- 0 ready, 1 delayed, 2 claimed
        queue TEXT NOT NULL,
        actor TEXT NOT NULL,
        priority INTEGER NOT NULL,     -- lower numbers first
        eta INTEGER,                   -- due at, milliseconds since 1970, where delayed
        owner INTEGER,                 -- the worker, where claimed
        crashes INTEGER NOT NULL,      -- worker processes that died running it
        crash_limit INTEGER NOT NULL,  -- so many make a dead letter of it
        message_id TEXT NOT NULL,
        body BLOB NOT NULL             -- the encoded message
    )""",
    """CREATE INDEX dramalite_ready ON dramalite_messages (queue, actor, priority)
        WHERE state = 0""",
    """CREATE INDEX dramalite_delayed ON dramalite_messages (eta) WHERE state = 1""",
    """CREATE INDEX dramalite_claimed ON dramalite_messages (owner) WHERE state = 2""",
    """CREATE INDEX dramalite_suspects ON dramalite_messages (priority)
        WHERE state = 0 AND crashes > 0""",
    """CREATE TABLE dramalite_dead (
        id INTEGER PRIMARY KEY,
        queue TEXT NOT NULL,
        actor TEXT NOT NULL,
        message_id TEXT NOT NULL,
        died_at INTEGER NOT NULL,      -- milliseconds since 1970
        reason TEXT NOT NULL,
        body BLOB NOT NULL
    )""",
    "CREATE INDEX dramalite_dead_by_age ON dramalite_dead (died_at)",
    *_RESULTS_SCHEMA,
    """CREATE TABLE dramalite_limits (
        key TEXT PRIMARY KEY,
        value INTEGER NOT NULL,
        expires_at INTEGER NOT NULL    -- milliseconds since 1970
    ) WITHOUT ROWID""",
    "CREATE INDEX dramalite_limits_by_age ON dramalite_limits (expires_at)",
    """CREATE TABLE dramalite_groups (
        uuid TEXT PRIMARY KEY,
        unsuccessful INTEGER NOT NULL, -- members that have not succeeded yet
        unended INTEGER NOT NULL,      -- members that are still to be run
        ended_at INTEGER,              -- when one last ended, once all have; milliseconds since 1970
        told INTEGER NOT NULL DEFAULT 0,  -- to callbacks: 1 that all have ended, 2 that with success
        sources TEXT                   -- for the step after it: a JSON list of [queue, actor, message id]
    ) WITHOUT ROWID""",
    *_MEMBERS_SCHEMA,
    """CREATE TABLE dramalite_metrics (
        name TEXT NOT NULL,
        queue TEXT NOT NULL,
        actor TEXT NOT NULL,
        bucket REAL NOT NULL,          -- the upper bound, in a histogram
        amount REAL NOT NULL,
        PRIMARY KEY (name, queue, actor, bucket)
    ) WITHOUT ROWID""",
    f"INSERT INTO dramalite_meta VALUES ('schema_version', {_SCHEMA_VERSION})",
)

# From the versions before, each to the next.
_UPGRADES = {
    # Its results had other keys; they are kept for minutes only.
    1: ("DROP TABLE dramalite_results", *_RESULTS_SCHEMA),
    2: (
        "ALTER TABLE dramalite_groups RENAME COLUMN failed_at TO ended_at",
        "ALTER TABLE dramalite_groups ADD COLUMN told INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE dramalite_groups ADD COLUMN sources TEXT",
        *_MEMBERS_SCHEMA,
        f"UPDATE dramalite_meta SET value = {_SCHEMA_VERSION} WHERE key = 'schema_version'",
    ),
}

_INSERT = """
    INSERT INTO dramalite_messages (id, state, queue, actor, priority, eta, crashes, crash_limit,
                                    message_id, body)
    VALUES (max(?, (SELECT coalesce(max(id), 0) + 1 FROM dramalite_messages)),
            ?, ?, ?, ?, ?, ?, ?, ?, ?)"""

# The same for what waits for a group, where that has come so far: told of, unless it was before.
_INSERT_AFTER_GROUP = _INSERT.replace("VALUES (", "SELECT ").rstrip(")") + """
     WHERE EXISTS (SELECT 1 FROM dramalite_groups WHERE uuid = ? AND {})"""
_IS_COMPLETE = "unsuccessful = 0 AND told < 2"
_IS_OVER = "unended = 0 AND told < 1"

_CREATE_GROUP = """
    INSERT INTO dramalite_groups (uuid, unsuccessful, unended, sources) VALUES (?, ?, ?, ?)"""

# A member counts again only where it has failed and, sent once more, succeeds.
_COUNT_MEMBER_IF = """
    INSERT INTO dramalite_members (uuid, message_id, failed_at)
    SELECT uuid, ?, ? FROM dramalite_groups WHERE uuid = ? {}
        ON CONFLICT DO UPDATE SET failed_at = NULL
           WHERE excluded.failed_at IS NULL AND dramalite_members.failed_at IS NOT NULL"""

_COUNT_MEMBER = _COUNT_MEMBER_IF.format("")

# The same where a group inside, of the uuid given last, has ended without success just now.
_COUNT_MEMBER_AFTER_GROUP = _COUNT_MEMBER_IF.format(f"""
       AND EXISTS (SELECT 1 FROM dramalite_groups
                    WHERE uuid = ? AND {_IS_OVER} AND unsuccessful > 0)""")

_NOTE_TOLD = """
    UPDATE dramalite_groups SET told = 1 + (unsuccessful = 0), ended_at = ? WHERE uuid = ? AND unended = 0"""

# The step after it still needs the sources.
_END_GROUP = "DELETE FROM dramalite_groups WHERE uuid = ? AND unsuccessful = 0 AND sources IS NULL"

_SOURCES = "SELECT sources FROM dramalite_groups WHERE uuid = ?"

_FORGET_GROUP = "DELETE FROM dramalite_groups WHERE uuid = ?"

_DUE = """
    SELECT id FROM dramalite_messages WHERE state = 1 AND eta <= ? ORDER BY eta, id LIMIT 2000"""

_PROMOTE = """
    UPDATE dramalite_messages
       SET state = 0, id = max(?, (SELECT max(id) + 1 FROM dramalite_messages))
     WHERE id = ?"""

# Texts, which only another program can have put there, are more than any number.
_NEXT_DUE = f"""
    SELECT CAST(min(eta) AS INTEGER) FROM dramalite_messages WHERE state = 1 AND eta < {_FOREVER}"""

# Whether anything is ready, and when the next delayed message is due.
_LOOK = f"""
    SELECT EXISTS (SELECT 1 FROM dramalite_messages WHERE state = 0), ({_NEXT_DUE})"""

# The columns of a _Row, fit to be read whatever another program has written there.
_ROW = """CAST(priority AS INTEGER), id, queue, actor, CAST(crashes AS INTEGER),
              CAST(crash_limit AS INTEGER), CAST(message_id AS TEXT), body"""

# Targets are a JSON object of queue: actor pairs (a queue may come twice).  SQLite reads at
# most :limit rows of each pair before it goes on to the next.  A suspect, that is a message
# that was running when a process died, is claimed only where :suspects allows, and alone.
_CLAIM = """
    UPDATE dramalite_messages SET state = 2, owner = :owner
     WHERE id IN (
        SELECT m.id FROM json_each(:targets) AS t
          CROSS JOIN dramalite_messages AS m INDEXED BY dramalite_ready
            ON m.queue = t.key AND m.actor = t.value
         WHERE m.state = 0
           AND (m.crashes <= 0 OR m.id = (
                SELECT s.id FROM dramalite_messages AS s INDEXED BY dramalite_suspects
                 WHERE s.state = 0 AND s.crashes > 0 AND :suspects
                   AND EXISTS (SELECT 1 FROM json_each(:targets) AS u
                                WHERE u.key = s.queue AND u.value = s.actor)
                 ORDER BY s.priority, s.id LIMIT 1))
         ORDER BY m.priority, m.id LIMIT :limit)
    RETURNING """ + _ROW

# For one at a time: with a list of ids and RETURNING, one takes four times as long, and a
# hundred at once hardly less.
_ACK = "DELETE FROM dramalite_messages WHERE state = 2 AND owner = ? AND id = ?"

_HAND_BACK = """
    UPDATE dramalite_messages SET state = 0, owner = NULL
     WHERE state = 2 AND owner = ? AND id = ?"""

_BURY = """
    INSERT INTO dramalite_dead (queue, actor, message_id, died_at, reason, body)
    VALUES (?, ?, ?, ?, ?, ?)"""

_MESSAGE_IDS = "SELECT message_id FROM dramalite_messages UNION SELECT message_id FROM dramalite_dead"

_DEAD_LETTERS = """
    SELECT queue, actor, message_id, died_at, reason, body FROM dramalite_dead ORDER BY id"""

_CAUSE_OF_DEATH = "SELECT reason FROM dramalite_dead WHERE message_id = ? ORDER BY id DESC LIMIT 1"

_OWNERS = "SELECT DISTINCT owner FROM dramalite_messages WHERE state = 2"

_COUNT_CRASH = """
    UPDATE dramalite_messages SET crashes = crashes + 1
     WHERE state = 2 AND owner IS :dead
       AND (:running IS NULL OR id IN (SELECT value FROM json_each(:running)))"""

_TAKE_OVER_CRASHED = """
    UPDATE dramalite_messages SET owner = :owner
     WHERE state = 2 AND owner IS :dead AND crashes >= crash_limit
    RETURNING """ + _ROW

_TAKE_BACK = """
    UPDATE dramalite_messages SET state = 0, owner = NULL WHERE state = 2 AND owner IS :dead"""

_ADOPT = "UPDATE dramalite_messages SET owner = :owner WHERE state = 2 AND owner IS :dead"

# The distinct queue and actor pairs of what is ready, by index seeks only.  Comparing pairs as
# row values would seek the queue but scan its actors.
_PAIRS = """
    WITH RECURSIVE pairs(queue, actor) AS (
        SELECT * FROM (SELECT queue, actor {ready} ORDER BY queue, actor LIMIT 1)
        UNION ALL
        SELECT CASE WHEN EXISTS (SELECT 1 {ready} AND queue = pairs.queue AND actor > pairs.actor)
                    THEN pairs.queue
                    ELSE (SELECT queue {ready} AND queue > pairs.queue ORDER BY queue LIMIT 1) END,
               coalesce(
                   (SELECT actor {ready} AND queue = pairs.queue AND actor > pairs.actor
                     ORDER BY actor LIMIT 1),
                   (SELECT actor {ready} AND queue > pairs.queue ORDER BY queue, actor LIMIT 1))
          FROM pairs WHERE pairs.queue IS NOT NULL)
    SELECT queue, actor FROM pairs WHERE queue IS NOT NULL""".format(
    ready="FROM dramalite_messages INDEXED BY dramalite_ready WHERE state = 0"
)

# Of a queue, in the order in which they are taken.
_QUEUED = {
    _READY: "FROM dramalite_messages WHERE state = 0 AND queue = ? ORDER BY priority, id",
    _DELAYED: "FROM dramalite_messages WHERE state = 1 AND queue = ? ORDER BY eta, priority, id",
}
_TAKE = "DELETE FROM dramalite_messages WHERE id = (SELECT id {} LIMIT 1) RETURNING body"

_FLUSH = (
    "DELETE FROM dramalite_messages WHERE state = 0 AND (queue = :queue OR :queue IS NULL)",
    "DELETE FROM dramalite_messages WHERE state = 1 AND (queue = :queue OR :queue IS NULL)",
    "DELETE FROM dramalite_dead WHERE queue = :queue OR :queue IS NULL",
)

# What has been kept for long enough: table, primary key, condition.  A group's uuid tells when it
# began; with no message left, what it still counts on was flushed or never sent.
_OLD = (
    ("dramalite_dead", "id", "died_at < :long_ago"),
    ("dramalite_results", "message_id, key", "expires_at < :now"),
    (
        "dramalite_groups",
        "uuid",
        """uuid < :first_uuid AND (unended = 0 AND ended_at < :long_ago
            OR NOT EXISTS (SELECT 1 FROM dramalite_messages))""",
    ),
)

_COUNTS = "SELECT queue, state, count(*) FROM dramalite_messages GROUP BY queue, state"

_IS_BUSY = """
    SELECT EXISTS (SELECT 1 FROM dramalite_messages WHERE state = 0 AND queue = :queue)
        OR EXISTS (SELECT 1 FROM dramalite_messages WHERE state = 2 AND queue = :queue)
        OR EXISTS (SELECT 1 FROM dramalite_messages WHERE state = 1 AND queue = :queue)"""

_PRUNE_LIMITS = """
    DELETE FROM dramalite_limits WHERE key IN
        (SELECT key FROM dramalite_limits WHERE expires_at <= ? LIMIT 10)"""

_LIMIT = "SELECT value FROM dramalite_limits WHERE key = ? AND expires_at > ?"

_DROP_LIMIT = "DELETE FROM dramalite_limits WHERE key = ?"

_SET_LIMIT = "INSERT OR REPLACE INTO dramalite_limits (key, value, expires_at) VALUES (?, ?, ?)"

_STORE_RESULT = """
    INSERT OR REPLACE INTO dramalite_results (message_id, key, value, expires_at)
    VALUES (?, ?, ?, ?)"""

_RESULT = """
    SELECT value FROM dramalite_results WHERE message_id = ? AND key = ? AND expires_at > ?"""

_HAS_VALUES = """
    SELECT EXISTS (SELECT 1 FROM dramalite_results) OR EXISTS (SELECT 1 FROM dramalite_groups)"""

_FORGET_VALUES = (
    "DELETE FROM dramalite_results WHERE message_id = ?",
    _FORGET_GROUP,
)

_ADD_METRIC = """
    INSERT INTO dramalite_metrics (name, queue, actor, bucket, amount) VALUES (?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET amount = amount + excluded.amount"""

_METRICS = """
    SELECT name, queue, actor, bucket, amount FROM dramalite_metrics
     ORDER BY name, queue, actor, bucket"""

_COUNT_ACTORS = """
    SELECT queue, actor, count(*) FROM dramalite_messages WHERE state = {}
     GROUP BY queue, actor ORDER BY queue, actor"""


class _Row(NamedTuple):
    """A claimed message; rows sort in the order they are to run."""

    priority: int
    id: int
    queue: str
    actor: str
    crashes: int
    crash_limit: int
    message_id: str
    body: bytes


def _check_storable(values: tuple[Any, ...]) -> None:
    """Raise TypeError or ValueError for what SQLite can't take, before it stops other writes."""
    for value in values:
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, int):
            if not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"{value!r} can't be stored; it takes more than 64 bits.")
        elif value != value:
            raise ValueError(f"{value!r} can't be stored; SQLite takes it for no value.")
        elif value is not None and not isinstance(value, (bytes, bytearray, memoryview, float)):
            raise TypeError(f"{value!r} can't be stored; it is a {type(value).__name__}.")


class _Outcome:
    """What came of a claimed row, and all that is to be committed with it."""

    __slots__ = ("after_commit", "effects", "is_handed_back", "row", "wakes")

    def __init__(self, row: _Row, *, is_handed_back: bool = False) -> None:
        self.row = row
        self.effects: list[tuple[str, tuple[Any, ...]]] = []  # Statements and their values.
        self.wakes: list[tuple[int, int]] = []  # due_ms and bit of each message it enqueues.
        self.is_handed_back = is_handed_back  # It goes back to its place in the queue.
        self.after_commit: Callable[[], None] | None = None


# ------------------------------------------------------------------------------------------
# Database files
#
# Making a database's file, with what is wrong with its path or place told in time.
# ------------------------------------------------------------------------------------------
#: Bytes of a database of one page of the smallest size.
_SMALLEST_DATABASE = 512


def _prepare_file(path: str) -> None:
    """Create the database file for its owner only; say what is wrong with the path if it is."""
    folder = os.path.dirname(path)
    try:
        status, link_status = os.stat(path), os.lstat(path)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise ConnectionFailed(
                f"The folder {folder!r} of the database {path!r} does not exist; create it first."
            ) from None
        try:
            # Exclusive, so that no connection of this process can have the file open yet.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            if os.path.islink(path):
                raise ConnectionFailed(
                    f"The database {path!r} is a link to nowhere; remove it or mend its target."
                ) from None
        except OSError as error:
            raise ConnectionFailed(f"The database {path!r} can't be created: {error}.") from error
    except OSError as error:
        raise ConnectionFailed(f"The database {path!r} can't be used: {error}.") from error
    else:
        if not stat.S_ISREG(status.st_mode):
            raise ConnectionFailed(f"The database {path!r} is not a regular file; use another path.")
        if 0 < status.st_size < _SMALLEST_DATABASE:  # SQLite would take it for empty.
            raise ConnectionFailed(
                f"The database {path!r} is no SQLite database; it was left untouched. Use another path."
            )
        if _is_open_to_all(folder) and (_is_strangers(status) or _is_strangers(link_status)):
            raise ConnectionFailed(
                f"The database {path!r} belongs to another user, in a folder where every user may "
                f"write; it was left untouched. Use a folder of your own."
            )


#: File systems that other machines, or the host of a virtual one, may write to.
_SHARED_FILE_SYSTEMS = frozenset(
    "9p afs beegfs ceph cifs fuse.glusterfs fuse.s3fs fuse.sshfs gfs2 gpfs lustre ncpfs nfs nfs4 "
    "ocfs2 smb3 smbfs vboxsf virtiofs".split()
)


def _warn_of_place(path: str) -> None:
    """Log what makes the place of a database unfit."""
    logger = get_logger("dramalite.broker", "SQLiteBroker")
    file_system = _file_system(path)
    if file_system in _SHARED_FILE_SYSTEMS:
        logger.warning(
            "The database %r is on a file system of type %s, where SQLite's locks and shared memory "
            "may not hold: move it to a disk of this machine.", path, file_system,
        )  # fmt: skip
    with contextlib.suppress(FileNotFoundError):  # It is not there any more.
        if os.stat(path).st_nlink > 1:
            logger.warning(
                "The database %r has another name, a hard link: SQLite loses what is written by one name while "
                "another one is used. Remove that, or make it a symbolic link.", path,
            )  # fmt: skip
    if _is_open_to_all(os.path.dirname(path)):
        logger.warning(
            "The database %r is in a folder where every user of this machine may write, and so "
            "replace it: move it to a folder of your own.", path,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------
# Databases in use
#
# Who closes a database last deletes its log.  SQLite knows by a lock of each process that uses
# it, which a process loses when any part of it closes the file, opened as a plain one.  So each
# process locks the same for a descriptor of its own as well, while it uses the database.
# ------------------------------------------------------------------------------------------
#: Offset and length of what SQLite locks for reading of a database that it uses (SHARED_FIRST in its os.h).
_USED_PART = 0x40000002, 510


class _UsedFile:
    """A database file with a descriptor of ours, locked while there are users."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = _file_identity(self.descriptor)
        self.users = 0
        self.keeps_log = False  # It stays locked while others of this process may have lost SQLite's locks.

    def lock(self) -> bool:
        """Lock a database that has a log (its header tells); one with another journal could not be written to then."""
        try:
            has_log = os.pread(self.descriptor, 2, 18) == b"\2\2"
            if has_log:
                _lock_for_descriptor(self.descriptor, *_USED_PART, is_locked=True)
        except OSError:
            return False
        return has_log

    def is_open(self) -> bool:
        """Tell whether no job has closed the descriptor, whose number may be another file's by now."""
        return _file_identity(self.descriptor) == self.identity

    def unlock(self) -> None:
        if self.is_open():
            with contextlib.suppress(OSError):  # Where it can't be locked either.
                _lock_for_descriptor(self.descriptor, *_USED_PART, is_locked=False)

    def close(self) -> None:
        if self.is_open():
            os.close(self.descriptor)


_used_files: dict[_Identity, _UsedFile] = {}
_used_files_lock = threading.RLock()

#: Seconds to wait for that lock: a signal handler may have interrupted who holds it, and send by a database whose
#: lock this thread holds.
_PATIENCE_S = 1.0


def _mark_used(path: str) -> _Identity:
    """Have other processes see that this one uses a database; its identity, or None if they can't."""
    if not _LOCKS_FOR_DESCRIPTORS:
        return None
    if not _used_files_lock.acquire(timeout=_PATIENCE_S):
        return None  # The next connection does it.
    try:
        file = _used_files.get(_file_identity(path))
        if file is None or not file.is_open():
            file = _UsedFile(path)
            _used_files[file.identity] = file
        file.users += 1  # First: a finalizer that runs meanwhile lets go of what has no user.
        if file.users > 1 or file.lock():
            return file.identity
        file.users -= 1
    except OSError:
        pass
    finally:
        _used_files_lock.release()
    return None


def _unmark_used(identity: _Identity, *, keeps_log: bool) -> None:
    """Take one mark back; with `keeps_log` so that this process, too, deletes no log before it has left the file."""
    is_locked = _used_files_lock.acquire(timeout=_PATIENCE_S)  # If not, who holds it waits for this very thread.
    try:
        file = _used_files.get(identity)
        if file is None or not file.users:
            return  # A job that closed all descriptors had the count begin anew.
        file.users -= 1
        file.keeps_log |= keeps_log
        if not file.users and not file.keeps_log:
            file.unlock()
    finally:
        if is_locked:
            _used_files_lock.release()


def _let_go_of_unused() -> None:
    """Close the descriptors of ours that nobody uses, where SQLite has no locks that would go with them."""
    if not _used_files_lock.acquire(timeout=_PATIENCE_S):
        return  # The next one does it.
    try:
        for identity, file in list(_used_files.items()):
            is_free = not file.users and _descriptors(identity) == {file.descriptor}
            if is_free and _used_files.pop(identity, None) is not None:  # Or a finalizer was quicker.
                file.close()
                _mark_latecomers(identity)
    finally:
        _used_files_lock.release()


def _mark_latecomers(identity: _Identity) -> None:
    """Lock a file for those of this process that opened it while a descriptor of it was closed."""
    for descriptor in _descriptors(identity):
        with contextlib.suppress(OSError):  # It was closed again.
            file = _UsedFile(f"/dev/fd/{descriptor}")
            file.keeps_log = file.lock()
            _used_files[file.identity] = file
            return


@atexit.register
def _unmark_all() -> None:
    """At the end Python may close SQLite's connections and tell nobody before."""
    with _used_files_lock:
        for file in _used_files.values():
            file.unlock()


# ------------------------------------------------------------------------------------------
# SQLite connections
#
# One database, in a file or in memory, and this process's connections to it: one that sends,
# one that works, one that reads; in memory one for all.  They are opened at first use and
# guarded by `_lock`, under which every write is one transaction; only the locks of slots and of
# used files are taken under it.  Every error that reaches the user says which file, what, and
# what to do.
# To close a descriptor of the database or of its shared memory is to drop SQLite's locks there.
# ------------------------------------------------------------------------------------------
#: Of new files: a message touches few pages, and every touched one goes into the log whole.
_PAGE_SIZE = 2048

#: Seconds to wait for a lock that another program holds on the database.
_BUSY_TIMEOUT_S = 30.0

#: Between two tries to get that lock: as long as waited so far, within these bounds.  Shorter
#: ones cost throughput: workers would get their turns sooner, and write more, smaller batches.
_SHORTEST_NAP_S = 50e-6
_LONGEST_NAP_S = 2e-3

_databases: weakref.WeakSet[Any] = weakref.WeakSet()  # Of this process.
_inherited: list[Any] = []  # What is its parent's, and must not be closed: connections and slots.


def _all_databases() -> list[Any]:
    while True:
        try:
            return list(_databases)
        except RuntimeError:  # Another thread has just made one.
            continue


class _Connections:
    """This process's connections to a SQLite database with dramalite's tables."""

    def __init__(self, path: str | None, durability: str, clock: Callable[[], Clock]) -> None:
        self._connections: dict[str, sqlite3.Connection] = {}
        self._slots: _Slots | None = None
        self._log: _Log | None = None  # Where what is sent is flushed to the disk.
        self._marked: _Identity = None  # Of the file that others see to be in use.
        self._lock = threading.RLock()
        self.path = path
        from sqlite3 import Error  # Where there is none, those above let __del__() pass.

        self._errors = Error
        self._durability = durability
        self._clock = clock  # The broker's, which may get another one.
        self._identity: _Identity = None  # Of the file that is open,
        self._index_identity: _Identity = None  # and of the index of its log, which goes where the log goes.
        self._log_path = self._index_path = ""
        self._has_log = self._has_lost_log = False
        self._opened = 0  # How often a connection was.
        self._checkpoint_lock = threading.RLock()  # Held for a checkpoint; taken before _lock.
        self._moving_lock = threading.RLock()  # Held where SQLite works without _lock.
        self._is_writing = False  # A thread that holds _lock is inside a write.
        self._is_cut_off = False  # A fork came in between, whose child would wait for that write in vain.
        self._watchers: dict[str | None, set[Any]] = {}  # Who waits for changes: see _WatchedDatabase.
        self._is_place_checked = False
        self._page_size = _PAGE_SIZE

    # Opening and closing.

    def _connect(self, role: str) -> sqlite3.Connection:
        """Return this process's connection for a role: "send", "work", "read" or "checkpoint"."""
        if self.path is None:
            role = "memory"
        elif self._identity is not None:
            if _file_identity(self.path) != self._identity:
                self._report_lost_file()
            # Not the log's own, which takes 50 us to look at after each flush.
            if _file_identity(self._index_path) != self._index_identity:
                self._leave_lost_log()
        connection = self._connections.get(role)
        if connection is None:
            try:
                connection = self._connections[role] = self._open(role)
            finally:
                if not self._connections:
                    self._disconnect()
        return connection

    def _report_lost_file(self) -> None:
        """Let go of a file that was deleted or replaced, and say so."""
        path = cast(str, self.path)
        self.close()
        what = "replaced" if os.path.exists(path) else "deleted"
        raise ConnectionClosed(
            f"The database {path!r} was {what} while it was in use; what it held is gone with "
            f"it. The next use opens {'the file there now' if what == 'replaced' else 'a new file'}."
        )

    def _leave_lost_log(self) -> None:
        """Have the database opened anew, whose log was deleted, and say so.

        SQLite does that when it closes a database that nobody else seems to use: see _mark_used().
        """
        get_logger("dramalite.broker", "SQLiteBroker").error(
            "The log of the database %r was deleted while it was in use; it is opened anew. Never delete FILE-wal "
            "or FILE-shm; and don't open the database as a plain file in a process that uses it, but on 64-bit "
            "Linux: to close that drops SQLite's locks.", self.path,
        )  # fmt: skip
        self._disconnect()
        self._has_lost_log = True

    def _await_end_of_lost_log(self) -> None:
        """Raise BrokerError while this process still uses it: SQLite would mix it with the new one."""
        path, lost = cast(str, self.path), self._index_identity
        freed = [self]
        for other in _all_databases():
            if other is self or other.path is None or os.path.realpath(other.path) != os.path.realpath(path):
                continue
            if other._lock.acquire(blocking=False):
                try:
                    if other._index_identity in (None, lost) and not other._is_writing:
                        other._disconnect()
                        other._index_identity, other._has_lost_log = lost, True
                        freed.append(other)
                finally:
                    other._lock.release()
        # Where a new index has that number, nobody has the lost one open.
        if _file_identity(_beside(path, "-shm")) != lost and _descriptors(lost):
            self._refuse_lost_log()
        for database in freed:
            database._has_lost_log = False

    def _refuse_lost_log(self) -> NoReturn:
        raise BrokerError(
            f"The log of the database {self.path!r} was deleted, and another connection of this process "
            f"still uses it: close that, or start the process anew."
        )

    def _open(self, role: str) -> sqlite3.Connection:
        import sqlite3

        if sqlite3.sqlite_version_info < (3, 35):
            raise ConnectionFailed(
                f"SQLite is {sqlite3.sqlite_version}; dramalite needs 3.35 or newer: "
                f"use a newer Python build."
            )
        if self._is_cut_off:
            raise BrokerError(
                f"This process was forked by a signal handler in the middle of a write to {self.path!r}, which "
                f"is locked for it since then: use the database in a process that was started otherwise."
            )
        identity = None
        if self.path is not None:
            if self._has_lost_log:
                self._await_end_of_lost_log()
            _prepare_file(self.path)
            identity = _file_identity(self.path)
            if not os.path.exists(_beside(self.path, "-journal")):  # Which nobody could roll back then.
                self._mark()
        try:
            connection = sqlite3.connect(
                ":memory:" if self.path is None else os.path.realpath(self.path) if _WINDOWS else self.path,
                timeout=0,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
            )
            try:
                self._configure(connection)
            except BaseException:
                connection.close()
                raise
        except self._errors as error:
            raise ConnectionFailed(self._describe(error)) from error
        self._opened += 1
        if self.path is not None:
            if identity is None or _file_identity(self.path) != identity:
                connection.close()
                self._report_lost_file()
            self._identity = identity
            self._log_path = _beside(self.path, "-wal")
            self._index_path = _beside(self.path, "-shm")
            index_identity = _file_identity(self._index_path)
            self._mark()  # Where that could not be done before.
            if self._has_log and _descriptors(identity) and not _descriptors(index_identity):
                connection.close()
                self._refuse_lost_log()
            self._index_identity = index_identity
            if not self._is_place_checked:
                self._is_place_checked = True
                _warn_of_place(self.path)
        return connection

    def _mark(self) -> None:
        """Have other processes see that this one uses the file, if they don't yet."""
        if self._marked is None:
            self._marked = _mark_used(cast(str, self.path))

    def _configure(self, connection: sqlite3.Connection) -> None:
        """Set a new connection up and make or check the schema."""
        # What another program wrote may be no UTF-8; it must not stop the reading of the rest.
        connection.text_factory = operator.methodcaller("decode", "utf-8", "replace")
        if self.path is not None:
            # The schema first: a file that is refused stays as it is.
            self._check_schema(connection)
            connection.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
            ((mode,),) = self._patiently(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchall())
            self._has_log = mode == "wal"  # Not on every file system.
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            # What else is to be flushed, _log flushes, where there is one.
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if self._has_log else 'FULL'}")
            if sys.platform == "darwin":  # Whatever the durability: a power cut must not damage the database.
                connection.execute("PRAGMA checkpoint_fullfsync = 1")  # The log starts anew after it.
            connection.execute("PRAGMA mmap_size = 0")
        (self._page_size,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("PRAGMA cache_size = -2048")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA trusted_schema = OFF")
        if self._check_schema(connection) != _SCHEMA_VERSION:
            self._transact(connection, self._make_schema)

    def _make_schema(self, connection: sqlite3.Connection) -> None:
        version = self._check_schema(connection)
        upgrades = [_UPGRADES[old] for old in range(version, _SCHEMA_VERSION)] if version else [_SCHEMA]
        for statement in itertools.chain(*upgrades):
            connection.execute(statement)

    def _check_schema(self, connection: sqlite3.Connection) -> int:
        """The version of our tables, 0 if there are none; ConnectionFailed if they are too new."""
        tables = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'dramalite_meta'"
        if self._patiently(connection.execute, tables).fetchone() is None:
            return 0
        version = "SELECT value FROM dramalite_meta WHERE key = 'schema_version'"
        row = self._patiently(connection.execute, version).fetchone()
        if row is None or not isinstance(row[0], int) or not 0 < row[0] <= _SCHEMA_VERSION:
            raise ConnectionFailed(
                f"The database {self.path!r} has dramalite's schema version "
                f"{None if row is None else row[0]!r}; this dramalite {__version__} knows up to "
                f"{_SCHEMA_VERSION}. Use a newer dramalite, or another file."
            )
        return row[0]

    def _disconnect(self) -> None:
        """Close the connections; the next use opens them again.  Call with _lock held."""
        connections, self._connections = self._connections, {}  # A signal handler opens others.
        marked, self._marked = self._marked, None
        if marked is not None:  # The log there may be somebody's new one.
            is_ours = _file_identity(self._index_path) in (None, self._index_identity)
            _unmark_used(marked, keeps_log=not is_ours)
        self._identity = None
        if self._log is not None and self._log.failure is None:  # Else until all of it was moved.
            self._log = None
        self._close(connections)
        _let_go_of_unused()

    def _close(self, connections: dict[str, sqlite3.Connection]) -> None:
        for connection in connections.values():
            with contextlib.suppress(self._errors):  # A full disk must not keep us here.
                connection.close()

    def close(self) -> None:
        """Close the connections and what rings; the next use opens them again."""
        with self._lock:
            self._disconnect()
            if isinstance(self._slots, _SideFile):
                self._slots.close()
                self._slots = None

    def __del__(self) -> None:
        if "_connections" not in self.__dict__:  # It is half of a copy, which copy and pickle refuse.
            return
        if sys.is_finalizing():  # A frozen thread may hold a lock.
            self._close(self._connections)  # From 3.13 on, Python warns of those that are just dropped.
        else:
            self.close()

    @_uninterrupted
    def slots(self) -> _Slots:
        """The slots of this database's workers; makes the side file if need be."""
        with self._lock:
            if self._slots is None or not self._slots.is_current():
                if self.path is None:
                    self._slots = _Slots(self._lock)
                else:
                    self._connect("work")
                    if isinstance(self._slots, _SideFile):
                        self._slots.close()
                        self._slots = None
                    try:
                        self._slots = _SideFile(self.path, self._lock, create=True)
                    except OSError as error:
                        raise ConnectionFailed(
                            f"The side file {_beside(self.path, '-lock')!r} can't be used: {error}."
                        ) from error
            return self._slots

    def take_slot(self, serves: int, *, tracked: bool, bell: _Bell | None = None) -> _Slot:
        """Take a slot, with a bell of its own if none is given; BrokerError if there is none."""
        with self._lock:  # Or close() could come in between.
            slots = self.slots()
            own = bell or slots.make_bell()
            try:
                return slots.acquire(own, serves, tracked)
            except BaseException:
                if bell is None:  # One that was given is still another slot's.
                    own.close()
                raise

    def forget(self) -> None:
        """In a forked child: what was inherited is the parent's; keep it, never touch it."""
        _inherited.append((self._connections, self._slots))
        self._lock = threading.RLock()
        self._checkpoint_lock = threading.RLock()
        self._moving_lock = threading.RLock()
        if self.path is not None:
            self._connections = {}
            self._slots = None
            self._marked = None
            self._identity = self._log = None
            self._is_cut_off = self._is_cut_off or self._is_writing
        elif self._slots is not None:
            self._slots.guard = self._lock
        self._is_writing = False
        self._watchers = {}

    # Transactions.

    def _patiently(self, run: Callable[..., _R], *args: Any) -> _R:
        """Run a statement, again while another connection holds the lock, up to 30 s."""
        started = None
        while True:
            try:
                return run(*args)
            except self._errors as error:
                if "locked" not in str(error):
                    raise
                now = _SYSTEM_CLOCK.monotonic()
                if started is None:
                    started = now
                waited = now - started
                if waited > _BUSY_TIMEOUT_S or not (self._slots is None or self._slots.is_held()):
                    raise
            nap = min(max(_SHORTEST_NAP_S, waited), _LONGEST_NAP_S)
            jitter = now * 1e6 % 1  # Or all would come back in step.
            _SYSTEM_CLOCK.sleep(nap * (1 + jitter) / 2)

    def _transact(self, connection: sqlite3.Connection, run: Callable[[sqlite3.Connection], _R]) -> _R:
        """Call `run` in one write transaction: all of it, or after any exception nothing."""
        self._end_leftover(connection)
        try:
            self._patiently(connection.execute, "BEGIN IMMEDIATE")
            result = run(connection)
            self._patiently(connection.execute, "COMMIT")
            return result
        except BaseException:
            with contextlib.suppress(self._errors):  # The first error is the one to tell.
                self._end_leftover(connection)
            raise

    def _end_leftover(self, connection: sqlite3.Connection) -> None:
        """Roll back what a signal handler's exception kept from being ended.  Call with _lock held."""
        if connection.in_transaction:
            connection.execute("ROLLBACK")

    # Errors.

    def _failure(self, error: Exception) -> BrokerError:
        """The error to raise in place of SQLite's.  Call with _lock held.

        Where SQLite could not open a file for writing it may have opened it for reading, and all
        connections of this process share that until they are closed.
        """
        if self.path is not None and "readonly" in str(error):
            self._disconnect()
        return BrokerError(self._describe(error))

    def _describe(self, error: Exception) -> str:
        """What SQLite's error means for the user, and what to do."""
        text = str(error)
        advices: Iterable[tuple[str, str]] = _SQLITE_ADVICE
        with contextlib.suppress(OSError):  # It is gone.
            if self.path is not None and os.stat(self.path).st_size <= _PAGE_SIZE:
                advices = (_ADVICE_FOR_NEW, *_SQLITE_ADVICE)
        for sign, advice in advices:
            if sign in text:
                return f"The database {self.path!r} {advice} (SQLite says: {text})"
        return f"The database {self.path!r} can't be used: {text} ({type(error).__name__})."


#: A part of SQLite's error text, and what to tell the user.
_SQLITE_ADVICE = (
    ("locked", "was kept locked for 30 s, by another program or by a transaction of this one that is "
               "still open; end it before you send"),
    ("disk is full", "or its disk is full; nothing was stored. Free some space"),
    ("readonly", "is read-only; check the permissions of the file and its folder"),
    ("unable to open", "can't be opened; check the path and the permissions of file and folder"),
    ("not a database", "is no SQLite database; it was left untouched. Use another path"),
    ("malformed", "is damaged; stop all its users, keep a copy, and try "
                  "`sqlite3 FILE .recover`"),
    ("disk I/O error", "met an I/O error: a full disk, a quota, or failing hardware; nothing was "
                       "stored"),
)  # fmt: skip

#: And where all is in the log yet, or the file was deleted without its log: its size does not tell which.
_ADVICE_FOR_NEW = (
    "disk I/O error", "met an I/O error: a full disk, a quota, or failing hardware; or it was deleted while "
                      "FILE-wal and FILE-shm were in use: then restart all programs that use it. Don't "
                      "delete FILE-wal, which may hold messages"
)  # fmt: skip


# ------------------------------------------------------------------------------------------
# Write-ahead log
#
# Its flushes to the disk after commits, and its move into the database.
# ------------------------------------------------------------------------------------------
#: Bytes of the write-ahead log at which a worker moves it; the log starts anew at twice as many.
#: Where no worker runs, senders move it: earlier where each send waits for a flush, later where
#: none does and the moving is the only flush there is.
_LONG_LOG = 8 << 20

#: Passes of a checkpoint beside writers; one so short leaves little to the next.
_MOST_PASSES = 4
_SHORT_PASS_S = 0.01

#: Tries to move a log that could not be flushed, and the pause between them: another thread, or a
#: process, may be at it.
_MEND_TRIES = 20
_MEND_NAP_S = 0.01


class _Log:
    """A database's write-ahead log, which its senders flush to the disk after their commits.

    SQLite itself would flush it inside each commit, with the database locked to all others
    (measured: 2,020 messages a second through two producers and a worker, and 2,650 so; 2.3 ms
    from a send to the start elsewhere, and 1.65 ms so).  Numbers count the commits of this
    process.  Those that wait together share one flush.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        self.lock = threading.RLock()  # Held for a flush; a signal handler may send meanwhile.
        self.commits = 0
        self._flushed = 0
        self.failure: OSError | None = None  # Of a flush: what is committed later is not safe either.

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_descriptor"):
            close(self._descriptor)  # Not before all that flush have ended.

    def note_commit(self) -> int:
        """Count a commit of this process; gives what to flush up to."""
        self.commits += 1
        return self.commits

    def note_moved(self, commits: int) -> None:
        """Note that what was committed up to then is in the database, and on disk."""
        self._flushed = max(self._flushed, commits)

    def flush(self, commit: int) -> None:
        """Return when a commit is on disk; OSError if it may not be there.

        Once this has failed, nothing that is committed later is safe: it stands in the log behind
        what may not be there, and the system tells of such an error only once.
        """
        if sys.is_finalizing():  # A thread that was stopped for good may hold the lock.
            _flush_to_disk(self._descriptor)
            return
        with self.lock:
            if self._flushed >= commit:
                return
            if self.failure is not None:
                raise OSError(errno.EIO, f"a flush of its log has failed: {self.failure}")
            commits = self.commits
            try:
                _flush_to_disk(self._descriptor)
            except OSError as error:
                self.failure = error
                raise
            self._flushed = max(self._flushed, commits)


def _no_flush() -> None:
    """In place of a flush where there is nothing to flush."""


class _LoggedDatabase(_Connections):
    """A database whose write-ahead log is flushed and moved."""

    # Flushing.

    def _open_log(self) -> _Log | None:
        """The log, where what is sent is to outlast a power cut.  Call with _lock held, once connected."""
        if self._log is None and self._has_log and self._durability == "full":
            try:
                self._log = _Log(self._log_path)
            except OSError as error:
                raise BrokerError(f"The log of {self.path!r} can't be opened, to flush it: {error}.") from error
        return self._log

    def _note_commit(self, log: _Log | None) -> Callable[[], None]:
        """What to call without _lock, after a write, to return when it is on disk."""
        return _no_flush if log is None else functools.partial(self._flush, log, log.note_commit())

    def _flush(self, log: _Log, commit: int) -> None:
        """Return when a commit is on disk, if need be by moving the log, for which others may wait."""
        for left in reversed(range(_MEND_TRIES)):
            commits, failure = log.commits, log.failure
            try:
                log.flush(commit)
                if self._is_log_whole():
                    return
                raise OSError(errno.EIO, "a flush of its log by another process has failed")
            except OSError as error:
                # All that was written can still be read, so that it can be moved into the database.
                if self._mend(log, commits, is_news=log.failure is not failure):
                    return
                if not left:
                    raise BrokerError(
                        f"The database {self.path!r} was written to, but it may not be on its disk: {error}. "
                        f"What was written holds until a power cut, or longer."
                    ) from error
            _SYSTEM_CLOCK.sleep(_MEND_NAP_S)

    def _is_log_whole(self) -> bool:
        """Tell whether nobody, as far as can be seen, has failed to flush what is in the log."""
        try:
            return self._slots is None or self._slots.is_log_whole()
        except ValueError:  # Closed by another thread just now.
            return True

    def _mend(self, log: _Log, commits: int, *, is_news: bool) -> bool:
        """Move a log that may not be on disk; tell whether that was done."""
        failed = 0
        with contextlib.suppress(BrokerError, ValueError):  # Without them others are not told, no more.
            failed = self.slots().count_failed_flushes(is_news)
        if not self.checkpoint(-1, shrink=True):
            return False
        log.note_moved(commits)
        with self._lock:
            if self._log is log:
                self._log = None  # Another one begins where that one failed.
        with contextlib.suppress(BrokerError, ValueError):
            self.slots().mend_flushes(failed)
        return True

    # Moving.

    def checkpoint(self, limit: int, *, shrink: bool = False) -> bool:
        """If the write-ahead log takes more than `limit` bytes, move it; tell if all was moved and flushed.

        It then starts anew, over the old one: a flush of what was written in place of something
        takes half as long as one that makes the file longer.  With `shrink` its disk space is
        given back: for a long file that may take a tenth of a second, in which nobody can write.

        What can be moved beside writers goes first; then the write lock is held for the little
        that is left.  Never automatic, and by one process at a time: that keeps clear of the
        WAL-reset bug of SQLite 3.7.0 to 3.51.2 (sqlite.org/wal.html#walresetbug).
        """
        if self._wal_size() <= limit or _is_held_here(self._lock):
            return False  # Or a signal handler has come in between: it must not wait for what waits for it.
        is_moved = False
        with contextlib.suppress(self._errors, BrokerError, OSError):  # Not now then; the next will.
            slots, holder = None, object()
            try:
                with self._lock:  # For a signal handler that sends meanwhile: close() takes both.
                    slots = self.slots()
                    if not slots.hold(_HEADER, holder):
                        return False  # Another one is at it.
                with self._checkpoint_lock, self._checkpointing() as connection:
                    for _ in range(_MOST_PASSES):
                        started = _SYSTEM_CLOCK.monotonic()
                        with self._moving_lock:
                            moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                        if _SYSTEM_CLOCK.monotonic() < started + _SHORT_PASS_S:
                            break  # Little can have been written meanwhile.
                    if shrink or moved[1] > 2 * _LONG_LOG // self._page_size:
                        with self._lock:
                            mode = "TRUNCATE" if shrink else "RESTART"
                            moved = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                            is_moved = moved[0] == 0
            finally:
                if slots is not None:
                    try:
                        slots.let_go(_HEADER, holder)
                    except BaseException:  # Of a signal handler: kept, it would keep all processes from this.
                        slots.let_go(_HEADER, holder)
                        raise
        return is_moved

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[sqlite3.Connection]:
        """The connection for checkpoints, out of close()'s reach while it is used beside _lock."""
        with self._lock:
            connection = self._connect("checkpoint")
            identity = self._identity, self._index_identity
            del self._connections["checkpoint"]
        try:
            yield connection
        finally:
            with self._lock:
                if (self._identity, self._index_identity) == identity:
                    self._connections["checkpoint"] = connection
                else:
                    connection.close()

    def _wal_size(self) -> int:
        try:
            return os.stat(self._log_path).st_size  # Of none where there is none, or none is open.
        except OSError:
            return 0


# ------------------------------------------------------------------------------------------
# Reads and writes
#
# Every write is one transaction.  What a signal handler sends in the middle of one is left to it.
# ------------------------------------------------------------------------------------------
def _report_orphans(error: Exception) -> None:
    get_logger("dramalite.broker").critical("A send in a signal handler or finalizer failed: %s", error)


class _Database(_LoggedDatabase):
    """A SQLite database with dramalite's tables.  Safe for threads and forks."""

    # No context managers of our own: an exception that a signal handler raises while one is entered
    # would keep it from being left for as long as somebody holds that exception.

    def _write(self, role: str, run: Callable[[sqlite3.Connection], _R]) -> _R:
        """Call `run` with the connection for a write; SQLite's errors become BrokerErrors.

        What the role "send" writes is on disk, by the durability chosen, when this returns.
        """
        self._check_alive()
        before = self.changes() if self._watchers else -1
        flush = orphans = _no_flush
        interrupts_write = self._interrupts_write()
        try:
            with self._lock:
                if interrupts_write:
                    raise BrokerError(
                        f"A signal handler or finalizer interrupted this very thread while it wrote to "
                        f"{self.path!r}; there it can send messages, and nothing else."
                    )
                try:
                    self._is_writing = True
                    connection = self._connect(role)
                    log = self._open_log() if role == "send" else None
                    result = run(connection)
                    flush = self._note_commit(log)
                except self._errors as error:
                    raise self._failure(error) from error
                finally:
                    self._is_writing = False
                    orphans = self._finish_write()
        finally:
            try:
                orphans()
            except BrokerError as error:  # Those who sent them could not wait, and are told nothing.
                _report_orphans(error)
        if self._watchers and self.changes() != before:
            self.notify()
        flush()
        return result

    def _interrupts_write(self) -> bool:
        """Tell whether this very thread is inside a write: a signal handler has come in between."""
        return self._is_writing and _is_held_here(self._lock)

    def _commit(self, role: str, run: Callable[[sqlite3.Connection], _R]) -> _R:
        """Call `run` with the connection for a write, in one transaction."""
        return self._write(role, lambda connection: self._transact(connection, run))

    def _check_alive(self) -> None:
        """Raise BrokerError where a thread that writes was stopped for good, at the interpreter's end."""
        if not sys.is_finalizing():
            return
        if not self._lock.acquire(blocking=False):
            raise BrokerError(
                "The interpreter is ending, and it has stopped a thread that was writing: nothing more can "
                "be stored. Send before that, from atexit at the latest."
            )
        self._lock.release()

    def locks(self) -> list[Any]:
        """All that a thread may hold while it is at work here."""
        shared = [] if self._slots is None else [self._slots.lock]
        log = [] if self._log is None else [self._log.lock]
        return [self._lock, self._checkpoint_lock, *log, *shared]

    def is_busy_here(self) -> bool:
        """Tell whether this very thread is at work here: a signal handler has come in between."""
        return any(map(_is_held_here, self.locks()))

    def changes(self) -> int:
        """A number that changes when this process has changed the database."""
        with self._lock:
            return sum(connection.total_changes for connection in self._connections.values())

    def _finish_write(self) -> Callable[[], None]:
        """Called after each write, with the lock held; gives what to call once it is not."""
        return _no_flush

    def notify(self, ended: Collection[str] | None = ()) -> None:
        """Called after each write, while somebody watches."""

    @_uninterrupted
    def _read(self, sql: str, values: Any = (), role: str = "read") -> list[Any]:
        """Run a query, on the connection that reads if no other is asked for."""
        self._check_alive()
        with self._lock:
            try:
                connection = self._connect(role)
                return self._patiently(lambda: connection.execute(sql, values).fetchall())
            except self._errors as error:
                raise self._failure(error) from error


# ------------------------------------------------------------------------------------------
# Waking and watching
#
# What a commit tells others.  New work rings one worker that sleeps and serves it.  Outcomes
# and limits wake those that watch: threads and coroutines of this process at once, those of
# other processes by a ring to a listening thread there.
# ------------------------------------------------------------------------------------------
#: Seconds between looks for what is announced by rings, which may get lost; and between looks of each that waits
#: for a message, whose end it is told.
_WATCH_POLL_S = 0.25
_LONG_WATCH_POLL_S = 2.0

#: So many that wait look as often as one; more take turns, or looking would be all that is done.
_MANY_WATCHERS = 16

#: After so many looks, with nobody waiting and nothing heard, the listener ends.
_QUIET_LOOKS = 4

#: Parts of the time that go to looks at most, and to the question which messages can still end.
_LOOKING_PART = 0.2
_ASKING_PART = 0.1

#: Milliseconds that the clock may have been set back between making and sending a message.
_CLOCK_SLACK_MS = 1000

#: Of messages that are waited for, those that have results now; and, some at a time, what waits or runs.
_HAVE_RESULTS = """
    SELECT DISTINCT message_id FROM dramalite_results
     WHERE message_id IN (SELECT value FROM json_each(?)) AND expires_at > ?"""
_IDS_SINCE = "SELECT id, CAST(message_id AS TEXT) FROM dramalite_messages WHERE id >= ? ORDER BY id LIMIT 2000"


class _Watcher:
    """One that waits for changes; of messages only, if it can tell which."""

    def __init__(
        self, wake: Callable[[], object], timeout_s: float | None,
        find_messages: Callable[[], tuple[str, str | None]] | None,
    ) -> None:  # fmt: skip
        self.wake = wake
        self.deadline = _SYSTEM_CLOCK.monotonic() + (math.inf if timeout_s is None else timeout_s)
        self._find_messages = find_messages
        self.keys: tuple[str | None, ...] = ()  # In _watchers.
        self.carrier: str | None = None  # The message that is to end, or to send another one.

    def find_keys(self) -> tuple[str | None, ...]:
        """The ids of the messages whose ends concern it by now; (None,) for all changes."""
        if self._find_messages is None:
            return (None,)
        message_id, self.carrier = self._find_messages()
        return (message_id,) if self.carrier in (None, message_id) else (message_id, self.carrier)


def _timed(is_done: Callable[[], bool]) -> tuple[bool, float]:
    """What is_done() says, and the seconds that it took on a processor: without waits for locks."""
    begun = _SYSTEM_CLOCK.thread_time()
    return is_done(), _SYSTEM_CLOCK.thread_time() - begun


class _WatchedDatabase(_Database):
    """A database whose changes workers and watchers hear of."""

    def __init__(self, path: str | None, durability: str, clock: Callable[[], Clock]) -> None:
        super().__init__(path, durability, clock)
        self._bits: dict[tuple[str, str], int] = {}
        self._slots_looked_for_at = 0.0
        self.watch_lock = threading.RLock()  # Guards all below, and _watchers.
        self._listener: object = None  # Stands for the thread that hears of other processes' commits, if one does.

    def forget(self) -> None:
        super().forget()
        self.watch_lock = threading.RLock()
        self._listener = None

    def locks(self) -> list[Any]:
        return [*super().locks(), self.watch_lock]

    # Waking workers.

    def bit(self, queue: str, actor: str) -> int:
        """The bit that stands for a queue and actor in a worker's word of what it serves."""
        bit = self._bits.get((queue, actor))
        if bit is None:
            import zlib

            bit = 1 << zlib.crc32(f"{queue} {actor}".encode("utf-8", "replace")) % 62
            self._bits[queue, actor] = bit
        return bit

    def ring_all(self) -> None:
        """Have the workers of this process look for work."""
        if self._slots is not None:
            for bell in list(self._slots.bells.values()):
                bell.ring()

    def wake(self, due_ms: int, queue: str, actor: str) -> None:
        """Ring a worker that sleeps beyond `due_ms` and serves the actor."""
        self._wake(due_ms, self.bit(queue, actor))

    def _wake(self, due_ms: int, bit: int) -> None:
        """wake() by the actor's bit; with _WATCHING ring for all that wait elsewhere for outcomes."""
        slots = self._slots
        if slots is None:
            # No worker has run in this process; look now and then whether one runs elsewhere.
            now = _SYSTEM_CLOCK.monotonic()
            if self.path is None or now < self._slots_looked_for_at + 1.0:
                return
            if not self._lock.acquire(blocking=False):
                return  # Who has it may be at the same; the next send looks.
            try:
                self._slots_looked_for_at = now
                if self._slots is None:
                    self._slots = _SideFile(self.path, self._lock, create=False)
                slots = self._slots
            except OSError:  # None runs, or it can't be seen from here: it polls.
                return
            finally:
                self._lock.release()
        try:
            slots.wake(due_ms, bit)
        except ValueError:
            return  # Closed by another thread just now.

    # Watching.

    def notify(self, ended: Collection[str] | None = ()) -> None:
        """Wake those of this process that wait for any change, or for one of these messages; all if None."""
        with self.watch_lock:
            keys = list(self._watchers) if ended is None else (None, *ended)
            woken = {watcher for key in keys for watcher in self._watchers.get(key, ())}
        for watcher in woken:
            watcher.wake()

    def watch(
        self, is_done: Callable[[], bool], timeout_s: float | None, is_announced: bool = True,
        find_messages: Callable[[], tuple[str, str | None]] | None = None,
    ) -> bool:  # fmt: skip
        """Wait until is_done(), looked at again after each change; tell whether it came true.

        Changes by this process are noticed at once, and so are those of workers elsewhere: they
        ring for outcomes and limits.  What is not announced by a ring is seen within 20 ms.
        Only the end of one message is waited for with `find_messages`, which gives its id and
        that of the message which it may come from, the same or one before it, as last seen.
        """
        if (clock := self._clock()).is_virtual:
            return clock.wait_for(is_done, timeout_s)
        bell = _Bell()
        watcher = _Watcher(bell.ring, timeout_s, find_messages)
        try:
            self._follow(watcher)
            if is_announced:
                self._start_listening()
            for look in itertools.count():
                is_over, taken = _timed(is_done)
                if is_over:
                    return True
                if self._follow(watcher):
                    continue  # It may have ended meanwhile.
                left = self._pause_s(look, is_announced, watcher, taken)
                if left <= 0:
                    return False
                until = _SYSTEM_CLOCK.monotonic() + left
                while left > 0 and not bell.wait(min(left, _WATCH_POLL_S)):  # Between two it can be interrupted.
                    left = until - _SYSTEM_CLOCK.monotonic()
        finally:
            self._leave(watcher)
        raise AssertionError  # There is always another look.

    async def watch_async(
        self, is_done: Callable[[], bool], timeout_s: float | None,
        find_messages: Callable[[], tuple[str, str | None]] | None = None,
    ) -> bool:  # fmt: skip
        """watch() for a coroutine; is_done() runs in a thread of ours."""
        import asyncio

        if (clock := self._clock()).is_virtual:
            return await clock.wait_for_async(is_done, timeout_s)
        loop = asyncio.get_running_loop()
        event = asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # The event loop was closed: nobody waits any more.
                self._leave(watcher)

        watcher = _Watcher(wake, timeout_s, find_messages)
        try:
            self._follow(watcher)
            if self._must_listen():
                await _run_in_thread(self._start_listening)
            for look in itertools.count():
                event.clear()
                is_over, taken = await _run_in_thread(_timed, is_done)
                if is_over:
                    return True
                if self._follow(watcher):
                    continue
                left = self._pause_s(look, True, watcher, taken)
                if left <= 0:
                    return False
                timer = loop.call_later(left, event.set)  # wait_for() may lose a cancellation before Python 3.12.
                try:
                    await event.wait()
                finally:
                    timer.cancel()
        finally:
            self._leave(watcher)
        raise AssertionError

    def _follow(self, watcher: _Watcher) -> bool:
        """Have a watcher woken for what concerns it by now; tell whether that is more than before."""
        keys = watcher.find_keys()
        if keys == watcher.keys:
            return False
        with self.watch_lock:
            self._leave(watcher)
            watcher.keys = keys
            for key in keys:
                self._watchers.setdefault(key, set()).add(watcher)
        return True

    def _leave(self, watcher: _Watcher) -> None:
        with self.watch_lock:
            for key in watcher.keys:
                watchers = self._watchers.get(key, set())  # None of a forked child's.
                watchers.discard(watcher)
                if not watchers:
                    self._watchers.pop(key, None)
            watcher.keys = ()

    def _pause_s(self, look: int, is_announced: bool, watcher: _Watcher, taken: float) -> float:
        """Seconds until a watcher, whose last look took so much, looks again where nothing wakes it; 0 or less at its end."""
        waits_for_any = watcher.keys == (None,)
        if not is_announced or self._must_listen():
            pause_s = min(2e-3 * 1.5 ** min(look, 20), 0.02)
        else:
            pause_s = _WATCH_POLL_S if waits_for_any else _LONG_WATCH_POLL_S
        if not waits_for_any:
            pause_s = max(pause_s, min(taken / _ASKING_PART, _LONG_WATCH_POLL_S))
        count = len(self._watchers.get(None, ()) if waits_for_any else self._watchers)
        pause_s *= max(1.0, count / _MANY_WATCHERS)
        return min(pause_s, watcher.deadline - _SYSTEM_CLOCK.monotonic())

    def _must_listen(self) -> bool:
        return self.path is not None and self._listener is None

    def _start_listening(self) -> None:
        """Have a thread hear of what other processes write, if none does yet."""
        slot = None
        listener = object()
        try:
            with self.watch_lock:
                if not self._must_listen():
                    return
                self._listener = listener
            slot = self.take_slot(_WATCHING, tracked=False)
            threading.Thread(
                target=self._listen, args=(slot, listener), name="dramalite-listener", daemon=True
            ).start()
        except BaseException as error:
            self._end_listening(listener)
            if slot is not None:
                slot.release()
            if not isinstance(error, (BrokerError, OSError, RuntimeError)):
                raise  # Without a slot, a side file or a thread, those that watch look themselves.

    def _end_listening(self, listener: object) -> bool:
        """Note that it listens no more; tell whether it did, and no other one does in its place."""
        with self.watch_lock:
            was_listening = self._listener is listener
            if was_listening:
                self._listener = None
            return was_listening

    def _listen(self, slot: _Slot, listener: object) -> None:
        """Wake those that watch, while somebody does, for what workers in other processes ring for."""
        quiet = 0
        may_ask_at = 0.0
        is_lost = False
        try:
            while self._listener is listener:
                slot.renew()
                if not (slot.slots.is_held() and slot.slots.is_current() and slot.is_known()):
                    is_lost = True
                    break
                slot.sleep_until(_FOREVER)  # Said before the look.
                now, begun = _SYSTEM_CLOCK.monotonic(), _SYSTEM_CLOCK.thread_time()
                self.notify(self._with_results())
                taken = _SYSTEM_CLOCK.thread_time() - begun  # Without waits for locks.
                asks = now >= may_ask_at
                if asks:  # Braked by itself: results are told of meanwhile.
                    gone = self._gone()
                    if gone != []:
                        self.notify(gone)
                    may_ask_at = now + (_SYSTEM_CLOCK.thread_time() - begun) / _ASKING_PART
                # Or looking would be all that is done where others do much.
                _SYSTEM_CLOCK.sleep(taken / _LOOKING_PART - taken)
                left = _WATCH_POLL_S if asks else may_ask_at - _SYSTEM_CLOCK.monotonic()
                heard = slot.bell.wait(min(left, _WATCH_POLL_S))
                with self.watch_lock:
                    quiet = 0 if heard or self._watchers else quiet + 1
                    if quiet > _QUIET_LOOKS:
                        self._listener = None
                        break
        finally:
            has_failed = self._end_listening(listener)  # Else another one may listen by now.
            slot.release()
            if has_failed:
                if is_lost and self._watchers:
                    self._start_listening()  # By the side file there is now.
                self.notify(None)  # Or they would sleep on, as if somebody listened.

    def _with_results(self) -> list[str] | None:
        """Which of the messages that are waited for have results; None if that can't be told."""
        with self.watch_lock:
            ids = [key for key in self._watchers if key is not None]
        with contextlib.suppress(BrokerError):
            rows = self._read(_HAVE_RESULTS, (json.dumps(ids), self._clock().time_ms())) if ids else []
            return [message_id for (message_id,) in rows]
        return None

    def _gone(self) -> list[str] | None:
        """Which of those that are to end, or to send the ones waited for, have ended; None if that can't be told.

        Some at a time are looked at, with the lock that senders need.
        """
        with self.watch_lock:
            watchers = set().union(*self._watchers.values())
        carriers = {watcher.carrier for watcher in watchers if watcher.carrier is not None}
        since = (min(map(_time_of_message_id, carriers), default=0) - _CLOCK_SLACK_MS) * 1000
        with contextlib.suppress(BrokerError):  # Those that wait meet it as well, and tell of it.
            while carriers:
                rows = self._read(_IDS_SINCE, (since,))
                carriers.difference_update(message_id for _id, message_id in rows)
                if not rows:
                    break
                since = rows[-1][0] + 1  # None moves to before that.
            return list(carriers)
        return None


# ------------------------------------------------------------------------------------------
# Values
#
# What the database keeps beside messages: results, the numbers of rate limits, metrics.
# ------------------------------------------------------------------------------------------
class _ValueDatabase(_WatchedDatabase):
    """A database that keeps values, with the time by which they expire."""

    # Results.

    @_uninterrupted
    def store(self, statement: str, values: tuple[Any, ...]) -> None:
        """Run one write statement as a transaction of its own."""
        self._write("send", lambda connection: self._patiently(connection.execute, statement, values))
        if statement == _STORE_RESULT:
            self.notify(values[:1])
        self._wake(0, _WATCHING)

    def result(self, message_id: str, key: str) -> bytes | None:
        """The stored result of a message, None if there is none or its time has passed."""
        rows = self._read(_RESULT, (message_id, key, self._clock().time_ms()))
        return rows[0][0] if rows else None

    def sources(self, uuid: str) -> list[list[str]]:
        """Where the results of a group stand: queue, actor and message id of each; ResultMissing if forgotten."""
        rows = self._read(_SOURCES, (uuid,))
        if not rows:
            raise ResultMissing("the group was forgotten")
        return cast("list[list[str]]", json.loads(rows[0][0]))

    def message_ids(self) -> set[str]:
        """The ids of all messages, dead letters too."""
        return {message_id for (message_id,) in self._read(_MESSAGE_IDS)}

    def last_sent_ms(self) -> int:
        """When the last message was sent that is there, milliseconds since 1970, rounded up; or 0."""
        return -(-int(self._read("SELECT coalesce(max(id), 0) FROM dramalite_messages")[0][0]) // 1000)

    def has_values(self) -> bool:
        """Tell whether there are results or groups."""
        return bool(self._read(_HAS_VALUES)[0][0])

    @_uninterrupted
    def forget_values(self, uuid: str) -> None:
        """Drop the results of a message, or the count of a group, of this id."""

        def forget(connection: sqlite3.Connection) -> None:
            for statement in _FORGET_VALUES:
                connection.execute(statement, (uuid,))

        self._commit("work", forget)

    # Rate limits.

    def limits(self, keys: Iterable[str]) -> list[int | None]:
        """The numbers stored under keys, None where there is none or its time has passed."""
        now = self._clock().time_ms()
        rows = [self._read(_LIMIT, (key, now), role="work") for key in keys]
        return [row[0][0] if row else None for row in rows]

    @_uninterrupted
    def change_limit(
        self, key: str, change: Callable[[int | None], int | None], ttl: int, dropped: str | None = None
    ) -> bool:
        """Store change(the number there is), for `ttl` ms, and drop another one, unless it is None; atomic.

        Not flushed to the disk: a power cut may undo it, as it ends what was limited.
        """
        _check_storable((key,))
        now = self._clock().time_ms()

        def change_stored(connection: sqlite3.Connection) -> bool:
            row = connection.execute(_LIMIT, (key, now)).fetchone()
            value = change(row[0] if row else None)
            _check_storable((value, now + ttl))
            if value is not None:
                connection.execute(_SET_LIMIT, (key, value, now + ttl))
                if dropped is not None:
                    connection.execute(_DROP_LIMIT, (dropped,))
            connection.execute(_PRUNE_LIMITS, (now,))
            return value is not None

        is_changed = self._commit("work", change_stored)
        self._wake(0, _WATCHING)
        return is_changed

    # Metrics.

    def add_metrics(self, rows: list[tuple[Any, ...]]) -> None:
        """Add amounts to the sums: rows of (name, queue, actor, bucket, amount)."""
        self._commit("work", lambda connection: connection.executemany(_ADD_METRIC, rows))

    def metrics(self) -> list[tuple[Any, ...]]:
        """The sums, as rows like those that were added."""
        return self._read(_METRICS)


# ------------------------------------------------------------------------------------------
# Senders
#
# Messages on their way into the database: senders that arrive together share one commit, and one
# flush of the log.
# ------------------------------------------------------------------------------------------
class _Ticket:
    """Rows that a sender wants stored; whoever holds the lock stores them for all."""

    __slots__ = ("done", "error", "flush", "is_orphan", "rows")

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self.rows = rows
        self.flush = _no_flush
        self.done = False
        self.is_orphan = False  # Its sender could not wait: see insert().
        self.error: Exception | None = None


_INTERRUPTED_SEND = "The send was interrupted; it may not be stored."


class _SenderDatabase(_ValueDatabase):
    """A database that messages are sent to."""

    def __init__(self, path: str | None, durability: str, clock: Callable[[], Clock]) -> None:
        super().__init__(path, durability, clock)
        self._waiting: collections.deque[_Ticket] = collections.deque()  # Of senders.
        self._has_orphans = False
        self._logged = 0  # Bytes, about, that sends have put into the log since it was looked at.
        _import_for_sending()

    def forget(self) -> None:
        super().forget()
        self._waiting.clear()
        self._has_orphans = False

    def row(
        self, message: Message[Any], body: bytes, priority: int, eta: int | None,
        crashes: int, crash_limit: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The values of _INSERT for a message."""
        return (
            self._clock().time_ms() * 1000, _READY if eta is None else _DELAYED,
            _q_name(message.queue_name), message.actor_name, priority, eta, crashes, crash_limit,
            message.message_id, body,
        )  # fmt: skip

    @_uninterrupted
    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        """Store rows; they are on disk (by the durability chosen) when this returns.

        A call from a signal handler or finalizer that interrupts a write of this very thread
        can't wait for it: its rows are stored by that write, before it returns.  What fails then
        is logged.
        """
        self._check_alive()
        ticket = _Ticket(rows)
        self._waiting.append(ticket)
        interrupts_write = self._interrupts_write()
        with self._lock:
            if interrupts_write:
                self._has_orphans = ticket.is_orphan = True
                return
            if not ticket.done:
                ticket.flush = self._store_all()
        if not ticket.done:  # Taken by a thread that an exception from outside ended just then.
            raise BrokerError(_INTERRUPTED_SEND)
        if ticket.error is not None:
            raise ticket.error
        for queue, actor, due_ms in dict.fromkeys((row[2], row[3], row[5] or 0) for row in rows):
            self.wake(due_ms, queue, actor)  # One ring each is enough.
        if self._watchers:
            self.notify()
        ticket.flush()
        if self._logged > (_LONG_LOG // 8 if self._durability == "full" else _LONG_LOG * 4):
            self._logged = 0
            self.checkpoint(0)

    def _store_waiting(self) -> Callable[[], None]:
        """Store the rows of all senders that wait, in one commit.  Call with _lock held, flush without."""
        tickets: list[_Ticket] = []
        rows: list[tuple[Any, ...]] = []
        is_stored = False
        error: Exception | None = None
        flush = _no_flush
        try:
            while self._waiting:  # Nothing waits where a signal handler's send, just now, took all.
                tickets.append(self._waiting.popleft())
                rows = rows + tickets[-1].rows if rows else tickets[-1].rows
            connection = self._connect("send")
            log = self._open_log()
            if len(rows) == 1:
                # One statement, hence atomic by itself, also for a signal handler between two.
                self._end_leftover(connection)
                self._patiently(connection.execute, _INSERT, rows[0])
            elif rows:
                self._transact(connection, lambda connection: connection.executemany(_INSERT, rows))
            flush = self._note_commit(log)
            is_stored = True
        except self._errors as cause:
            error = self._failure(cause)
            error.__cause__ = cause
        except BrokerError as cause:
            error = cause
        finally:
            if not is_stored and error is None:
                error = BrokerError(_INTERRUPTED_SEND)
            for ticket in tickets:
                ticket.flush = flush
                ticket.error = error
                ticket.done = True
                if ticket.is_orphan and error is not None:
                    _report_orphans(error)
        self._logged += sum([len(row[-1]) for row in rows]) + 2 * self._page_size * len(rows)
        return flush

    def _store_all(self) -> Callable[[], None]:
        """Store what waits, and what is left behind meanwhile.  Call with _lock held, flush without."""
        flush = _no_flush
        while True:
            self._is_writing = True
            try:
                last = self._store_waiting()
            finally:
                self._is_writing = False
            flush = flush if last is _no_flush else last
            if not self._has_orphans:
                return flush
            self._has_orphans = False

    def _finish_write(self) -> Callable[[], None]:
        if not self._has_orphans:
            return _no_flush
        self._has_orphans = False
        return self._store_all()


# ------------------------------------------------------------------------------------------
# Forking
#
# No thread may be inside SQLite when the process forks, or its locks stay locked in the child
# for ever.  The child forgets what it inherited and opens anew at first use.
# ------------------------------------------------------------------------------------------
_forgetful: weakref.WeakSet[Any] = weakref.WeakSet()  # What else has a forget() for the child.


class _LockedForFork(threading.local):
    """What this thread has locked until it has forked."""

    def __init__(self) -> None:
        self.locks: list[Any] = []


_locked_for_fork = _LockedForFork()


@functools.cache  # They can't be taken back: once is enough.
def _register_fork_hooks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )


# A signal handler's exception does not keep Python from forking: it only ends these hooks.


def _before_fork() -> None:
    databases = _all_databases()
    # Closed, or SQLite would take the child's own connections for locked, as those it inherits were.
    # Not what a signal handler that forks has interrupted: that is still in use.
    idle = [item for item in databases if item.path is not None and not item.is_busy_here()]
    todo: list[Any] = []  # From the end.
    for item in databases:
        # What a signal handler that forks has interrupted may be waited for in a checkpoint.
        todo += [item._moving_lock] if _is_held_here(item._lock) else [item._lock, item._checkpoint_lock]
    todo.append(_event_loop_lock)
    while todo:
        try:
            _locked_for_fork.locks.append(todo[-1])  # Before it is locked: none stays so for ever.
            todo[-1].acquire()
            todo.pop()
        except BaseException:
            continue
    while idle:
        try:
            idle[-1]._disconnect()
            idle.pop()
        except BaseException:
            continue


def _after_fork_in_parent() -> None:
    while _locked_for_fork.locks:
        try:
            try:
                _locked_for_fork.locks[-1].release()
            finally:
                _locked_for_fork.locks.pop()
        except BaseException:  # Or it was not locked after all.
            continue


def _after_fork_in_child() -> None:
    global _interrupt_lock, _broker_lock, _event_loop_lock, _used_files_lock
    _used_files_lock = threading.RLock()
    while _used_files:  # Their locks are the parent's.
        _used_files.popitem()[1].close()
    _locked_for_fork.locks.clear()
    _threads.cache_clear()
    _SideFile.forget_all()
    _interrupt_lock, _event_loop_lock, _broker_lock = [threading.RLock() for _ in range(3)]
    _interruptible.clear()
    _stoppers.clear()
    for item in (*_databases, *_forgetful):
        item.forget()


# ------------------------------------------------------------------------------------------
# SQLite engine
#
# The queue's operations on a database: claiming, finishing, recovering.
# A worker's exchange writes what came of the messages it ran and claims the next ones in one
# transaction; an outcome counts only while its row is still the worker's.
# ------------------------------------------------------------------------------------------
#: Milliseconds that a dead letter is kept, and the count of a group that can't succeed: 7 days.
_KEPT_MS = 7 * 24 * 3600 * 1000

#: Seconds for which a worker must be unknown to count as dead, where it left no slot.
_UNKNOWN_S = 2.5

#: Transactions in which a worker deletes, each second, up to 1,000 rows of a table that have been kept
#: for long enough: more than it stores meanwhile.
_MOST_PRUNINGS = 25

#: In place of a data_version(), where another look is due in any case.
_NO_VERSION = -1


class _Engine(_SenderDatabase):
    """The queue in one database."""

    def __init__(self, path: str | None, durability: str, clock: Callable[[], Clock]) -> None:
        super().__init__(path, durability, clock)
        self._unknown_since: dict[Any, float] = {}  # Owners of rows that no slot knows.
        _databases.add(self)  # Last: a fork hook may meet it from now on.
        _register_fork_hooks()

    # Working.

    @_uninterrupted
    def exchange(
        self, slot: _Slot, outcomes: list[_Outcome], limit: int = 0, targets: str = "{}",
        suspects: bool = False, skip_to: Callable[[int], bool] = lambda _due_ms: False,
    ) -> tuple[list[_Row], int]:  # fmt: skip
        """In one transaction: write what came of earlier rows, and claim up to `limit` more.

        Returns the claimed rows, best first, and if there are none the data_version() of that
        look.  Outcomes of rows that are no longer this worker's change nothing.  `skip_to` is
        told, where nothing is ready, when the next message is due; virtual time can pass there.
        """
        rows: list[Any] = []
        version = _NO_VERSION

        def trade(connection: sqlite3.Connection) -> None:
            nonlocal rows, version
            if outcomes:
                self._apply(connection, slot.owner, outcomes)
            if limit and self._make_ready(connection, skip_to):
                values = {"owner": slot.owner, "targets": targets, "limit": limit, "suspects": suspects}
                rows = connection.execute(_CLAIM, values).fetchall()
            if limit and not rows:
                (version,) = connection.execute("PRAGMA data_version").fetchone()
                version = self._version(version, connection)

        def commit(connection: sqlite3.Connection) -> None:
            self._transact(connection, trade)
            for outcome in outcomes:
                try:
                    if outcome.after_commit is not None:
                        outcome.after_commit()
                except Exception:  # What is committed holds, whatever happens to those who hear of it.
                    get_logger("dramalite.worker").critical("Not all heard of a commit.", exc_info=True)

        self._write("work", commit)
        try:
            self._tell_of(outcomes)
        except Exception:
            get_logger("dramalite.worker").critical("Not all heard of a commit.", exc_info=True)
        rows.sort()
        return [_Row._make(row) for row in rows], version

    def _tell_of(self, outcomes: list[_Outcome]) -> None:
        """Wake those who wait for what came of messages."""
        for outcome in outcomes:
            for due_ms, bit in outcome.wakes:
                self._wake(due_ms, bit)
        if self._watchers:  # Who comes later sees what is committed.
            ended = [outcome.row.message_id for outcome in outcomes]
            effects = [effect for outcome in outcomes for effect in outcome.effects]
            self.notify(ended + [values[0] for statement, values in effects if statement == _STORE_RESULT])
        if outcomes:
            self._wake(0, _WATCHING)

    def _apply(self, connection: sqlite3.Connection, owner: int, outcomes: list[_Outcome]) -> None:
        """Write outcomes, each only if its row is still the worker's."""
        finished = [outcome for outcome in outcomes if not outcome.is_handed_back]
        acked = self._ack(connection, owner, finished)
        if len(finished) < len(outcomes):
            handed_back = [(owner, o.row.id) for o in outcomes if o.is_handed_back]
            connection.executemany(_HAND_BACK, handed_back)
        effects = [effect for outcome in acked for effect in outcome.effects]
        for statement, same in itertools.groupby(effects, key=operator.itemgetter(0)):
            connection.executemany(statement, [values for _statement, values in same])

    def _ack(self, connection: sqlite3.Connection, owner: int, outcomes: list[_Outcome]) -> list[_Outcome]:
        """Delete the rows of outcomes; return those whose row was still the worker's."""
        keys = [(owner, outcome.row.id) for outcome in outcomes]
        if len(keys) > 1:  # All at once takes two thirds of the time, and nearly always all are.
            connection.execute("SAVEPOINT acks")
            if connection.executemany(_ACK, keys).rowcount == len(keys):
                return outcomes
            connection.execute("ROLLBACK TO acks")
        acked = []
        for key, outcome in zip(keys, outcomes):
            if connection.execute(_ACK, key).rowcount:
                acked.append(outcome)
            elif outcome.effects:
                outcome.after_commit = None
                get_logger("dramalite.worker").warning(
                    "Message %s is no longer this worker's; its outcome is dropped.",
                    outcome.row.message_id,
                )
        return acked

    def _make_ready(self, connection: sqlite3.Connection, skip_to: Callable[[int], bool]) -> bool:
        """Make delayed messages ready that are due, by their eta; tell whether anything is ready."""
        is_ready, next_due = connection.execute(_LOOK).fetchone()
        if next_due is None:
            return bool(is_ready)
        now = self._clock().time_ms()
        if next_due > now:
            if is_ready or not skip_to(next_due):
                return bool(is_ready)
            now = next_due
        due = connection.execute(_DUE, (now,)).fetchall()
        connection.executemany(_PROMOTE, [(now * 1000, row_id) for (row_id,) in due])
        return True

    def hand_back(self, slot: _Slot, rows: list[_Row]) -> None:
        """Give claimed rows back in their old place, as if they had never been claimed."""
        self.exchange(slot, [_Outcome(row, is_handed_back=True) for row in rows])
        for queue, actor in {(row.queue, row.actor) for row in rows}:
            self.wake(0, queue, actor)

    def recover(self, slot: _Slot) -> tuple[list[tuple[_Row, int]], bool]:
        """Take back what dead workers had claimed, and free their slots.

        Counts a crash for each message that was running.  Returns those that have reached
        their limit, claimed by this worker, to be made dead letters of, each with the id of the
        process that died; and whether anybody was found dead.
        """
        dead = self.slots().dead()  # Before the look at what is claimed: they claim no more.
        if set(self._read(_OWNERS)) <= {(slot.owner,)} and not dead:
            self._unknown_since.clear()
            return [], False
        return self._write("work", lambda connection: self._recover(connection, slot.owner, dead))

    def _recover(
        self, connection: sqlite3.Connection, own: int, dead: list[int]
    ) -> tuple[list[tuple[_Row, int]], bool]:
        crashed: list[tuple[_Row, int]] = []
        is_news = False
        owners = [owner for (owner,) in connection.execute(_OWNERS).fetchall()]
        self._unknown_since = {o: at for o, at in self._unknown_since.items() if o in owners or o in dead}
        for owner in set(dead).difference(owners):
            if self.slots().is_surely_dead(owner) or self._is_long_unknown(owner):
                self.slots().clear(owner)
        for owner in owners:
            remains = None if owner == own else self.slots().seize(owner)
            if remains is None or not (remains.slot or self._is_long_unknown(owner)):
                continue
            try:
                taken, over = self._transact(
                    connection, functools.partial(_take_back, dead=owner, owner=own, running=remains.running)
                )
            except BaseException as error:
                remains.leave()
                if not crashed or not isinstance(error, self._errors):
                    raise
                break  # Those are this worker's by now; the next recover() meets the trouble.
            remains.release()
            crashed += [(_Row._make(row), remains.pid) for row in over]
            is_news = True
            get_logger("dramalite.worker").warning(
                "A worker died; %d of its messages go back to their queues, %d of them were "
                "running.", taken, len(remains.running or []),
            )  # fmt: skip
        return crashed, is_news

    def _is_long_unknown(self, owner: Any) -> bool:
        """Tell whether a worker that no slot knows, or whose slot is not locked, was first seen long ago.

        One that lives, and has lost its side file or its lock, makes itself known anew within a second.
        """
        now = _SYSTEM_CLOCK.monotonic()
        return now >= self._unknown_since.setdefault(owner, now) + _UNKNOWN_S

    def move_slot(self, old: _Slot, running: dict[int, int]) -> _Slot:
        """Take a slot in the place of one whose side file is gone, with its bell and its rows.

        `running` has the rows that run, by thread.  The caller gives the old one up.
        """
        new = self.take_slot(0, tracked=True, bell=old.bell)
        try:
            for thread, row_id in running.items():
                new.run(thread, row_id)
            values = {"owner": new.owner, "dead": old.owner}
            self._write("work", lambda connection: self._patiently(connection.execute, _ADOPT, values))
        except BaseException:
            new.give_up()
            raise
        return new

    # Looking.

    def has_worker(self) -> bool:
        """Tell whether a worker of this database lives; also True where that can't be known."""
        try:
            with self._lock:  # Or close() could come in between.
                return self.slots().has_worker()
        except BrokerError:
            return True

    @_uninterrupted
    def data_version(self) -> int:
        """A number that changes when the database has changed."""
        with self._lock:
            ((version,),) = self._read("PRAGMA data_version", role="work")
            return self._version(version, self._connections["memory" if self.path is None else "work"])

    def _version(self, version: int, connection: sqlite3.Connection) -> int:
        """A number for what a connection says is its data's version, and for what it has written itself."""
        return version + connection.total_changes + (self._opened << 32)  # Each connection counts anew.

    def has_ready(self) -> bool:
        """Tell, without waiting for whoever writes, whether anything is ready or due."""
        is_ready, due = self._read(_LOOK)[0]
        return bool(is_ready) or (due is not None and due <= self._clock().time_ms())

    def next_due(self) -> int | None:
        """When the next delayed message is due, milliseconds since 1970; None if there is none."""
        return cast("int | None", self._read(_NEXT_DUE)[0][0])

    def ready_pairs(self) -> list[tuple[str, str]]:
        """The distinct (queue, actor) pairs of what is ready."""
        return self._read(_PAIRS)

    def is_busy(self, queue: str) -> bool:
        """Tell whether messages of a queue wait, are delayed or run."""
        return bool(self._read(_IS_BUSY, {"queue": queue})[0][0])

    def carrier_of(self, message_id: str, sent_ms: int, *, in_all: bool) -> tuple[str | None, bytes]:
        """Id and body of the stored message that is this one, or holds it as a later step; None if there is none.

        One that was sent after a time (ms since 1970) is found without a look at the whole table, which
        comes last, and only for `in_all`.
        """
        texts = {message_id.encode("utf-8", "replace"), json.dumps(message_id)[1:-1].encode()}
        conditions = [("message_id = ?", message_id), *(("instr(body, ?)", text) for text in texts)]
        for since in (sent_ms * 1000, 0) if in_all else (sent_ms * 1000,):
            for condition, value in conditions:
                sql = f"FROM dramalite_messages WHERE id >= ? AND {condition} LIMIT 1"
                if rows := self._read(f"SELECT CAST(message_id AS TEXT), body {sql}", (since, value)):
                    return cast("tuple[str, bytes]", rows[0])
        return None, b""

    def bodies(self) -> list[tuple[bytes, int]]:
        """The messages that wait or run, in their order, then those that are delayed; each with
        the time when it was stored, or came due (ms since 1970)."""
        return self._read(
            """SELECT body, id / 1000 FROM dramalite_messages
                ORDER BY eta IS NOT NULL, coalesce(eta, priority), id"""
        )

    def counts(self) -> dict[str, dict[int, int]]:
        """How many messages each queue holds, by state."""
        counts: dict[str, dict[int, int]] = {}
        for queue, state, count in self._read(_COUNTS):
            counts.setdefault(queue, {})[state] = count
        return counts

    def count_actors(self, state: int) -> list[tuple[Any, ...]]:
        """(queue, actor, how many messages) in a state."""
        return self._read(_COUNT_ACTORS.format(state))

    def cause_of_death(self, message_id: str) -> str | None:
        """The reason of a dead letter, None if there is none of that id."""
        rows = self._read(_CAUSE_OF_DEATH, (message_id,))
        return rows[0][0] if rows else None

    def dead_letters(self) -> list[tuple[str, str, str, int, str, bytes]]:
        """(queue, actor, message_id, died_at, reason, body) of the dead letters, oldest first."""
        return self._read(_DEAD_LETTERS)

    def bodies_of(self, queue: str, *, delayed: bool) -> list[bytes]:
        """The messages of a queue that are ready, or delayed, in their order."""
        queued = _QUEUED[_DELAYED if delayed else _READY]
        return [body for (body,) in self._read(f"SELECT body {queued}", (queue,))]

    @_uninterrupted
    def take(self, queue: str, *, delayed: bool) -> list[bytes]:
        """Remove the first message of a queue that is ready, or delayed; its body, if there was one."""
        sql = _TAKE.format(_QUEUED[_DELAYED if delayed else _READY])
        rows = self._write(
            "send", lambda connection: self._patiently(connection.execute, sql, (queue,)).fetchall()
        )
        if rows:
            self.notify(None)
        return [body for (body,) in rows]

    # House-keeping.

    @_uninterrupted
    def flush(self, queue: str | None) -> None:
        """Drop what waits or is delayed in a queue; with None in all, and the dead letters."""

        def drop(connection: sqlite3.Connection) -> None:
            for statement in _FLUSH:
                connection.execute(statement, {"queue": queue})

        self._commit("send", drop)
        self.notify(None)

    def prune(self) -> None:
        """Delete, some at a time, what has been kept for long enough."""
        now = self._clock().time_ms()
        long_ago = now - _KEPT_MS
        values = {"now": now, "long_ago": long_ago, "first_uuid": _new_message_id(long_ago, bytes(10))}
        looks = [f"EXISTS (SELECT 1 FROM {table} WHERE {is_old})" for table, _key, is_old in _OLD]
        look = f"SELECT {' OR '.join(looks)}"

        def delete(connection: sqlite3.Connection) -> None:
            for table, key, is_old in _OLD:
                connection.execute(
                    f"""DELETE FROM {table} WHERE ({key}) IN
                        (SELECT {key} FROM {table} WHERE {is_old} LIMIT 1000)""",
                    values,
                )

        for _ in range(_MOST_PRUNINGS):
            if not self._read(look, values)[0][0]:
                return
            self._commit("work", delete)


def _take_back(
    connection: sqlite3.Connection, *, dead: int, owner: int, running: list[int] | None
) -> tuple[int, list[Any]]:
    """Take a dead worker's rows back; how many, and those that are not to be run again."""
    values = {"dead": dead, "owner": owner, "running": None if running is None else json.dumps(running)}
    connection.execute(_COUNT_CRASH, values)
    over = connection.execute(_TAKE_OVER_CRASHED, values).fetchall()
    return connection.execute(_TAKE_BACK, values).rowcount, over


# ------------------------------------------------------------------------------------------
# Results
#
# What actors return, kept for a time.  A result is committed together with the
# acknowledgement of its message; a failure is stored when the message has failed for good.
# To add a backend: subclass ResultBackend, override _get() and _store().
# ------------------------------------------------------------------------------------------
class _Missing:
    """Type of Missing."""

    def __repr__(self) -> str:
        return "Missing"


#: What a result backend's _get() returns where there is nothing.
Missing: Any = _Missing()

#: Milliseconds that get_result() waits where no timeout is given.
_DEFAULT_RESULT_TIMEOUT_MS = 10_000

#: Milliseconds a result is kept where no ttl is given: 10 minutes.
_DEFAULT_RESULT_TTL_MS = 600_000

#: How Dramatiq marks a stored failure.
_FAILURE_MARK = "dramatiq.results.Result"


class ResultBackend:
    """Base of stores of results."""

    def __init__(
        self,
        *,
        namespace: str = "dramatiq-results",
        encoder: Encoder | None = None,
        use_namespace_prefix_keys: bool = False,
    ) -> None:
        self.namespace = namespace
        self.encoder = get_encoder() if encoder is None else encoder
        self.use_namespace_prefix_keys = use_namespace_prefix_keys

    def get_result(
        self, message: Any, *, block: bool = False, timeout: int | timedelta | None = None
    ) -> Any:
        """Return a message's result; reading does not consume it.

        With `block`, waits up to `timeout` milliseconds (10,000 if None), then raises
        ResultTimeout; without, raises ResultMissing.  Raises ResultUnavailable, and waits no
        longer, when there can't be one any more.  A stored failure raises ResultFailure.
        """
        timeout_ms = _timeout_ms(_DEFAULT_RESULT_TIMEOUT_MS if timeout is None else timeout)
        search = _ResultSearch(self, message)
        if block:
            self._wait(search, cast(int, timeout_ms))
        return search.outcome(ResultTimeout if block else ResultMissing)

    async def get_result_async(self, message: Any, *, timeout: int | timedelta | None = None) -> Any:
        """get_result(block=True) for coroutines: waits without holding a thread."""
        timeout_ms = _timeout_ms(_DEFAULT_RESULT_TIMEOUT_MS if timeout is None else timeout)
        if self._has_own_way():
            import asyncio

            return await asyncio.to_thread(self.get_result, message, block=True, timeout=timeout_ms)
        search = _ResultSearch(self, message)
        await self._wait_async(search, cast(int, timeout_ms))
        return search.outcome(ResultTimeout)

    def _has_own_way(self) -> bool:
        """Tell whether a subclass gets results otherwise than by _get()."""
        return type(self)._get is ResultBackend._get

    def store_result(self, message: Any, result: Any, ttl: int) -> None:
        """Keep a result for `ttl` milliseconds."""
        self._store(self._key(message), result, ttl)

    def store_exception(self, message: Any, exception: BaseException, ttl: int) -> None:
        """Keep a failure for `ttl` milliseconds."""
        failure = {"type": type(exception).__name__, "msg": _error_text(exception)}
        self._store(self._key(message), {"__t": _FAILURE_MARK, "exn": failure}, ttl)

    def build_message_key(self, message: Any) -> str:
        """The key of a message's result: the MD5 of its names and id, or these themselves."""
        import hashlib

        queue_name = _q_name(message.queue_name)
        key = f"{self.namespace}:{queue_name}:{message.actor_name}:{message.message_id}"
        if self.use_namespace_prefix_keys:
            return key
        return hashlib.md5(key.encode("utf-8"), usedforsecurity=False).hexdigest()

    def unwrap_result(self, value: Any) -> Any:
        """Return a stored value; raise ResultFailure if it is a failure."""
        if isinstance(value, dict) and value.get("__t") == _FAILURE_MARK:
            if "exn" not in value:
                return value.get("res")
            kind, text = value["exn"]["type"], value["exn"]["msg"]
            raise ResultFailure(f"actor raised {kind}: {text}", kind, text)
        return value

    def _wait(self, search: _ResultSearch, timeout: int) -> None:
        """Look until the search is over or `timeout` milliseconds have passed."""
        deadline = _SYSTEM_CLOCK.monotonic() + timeout / 1000
        nap = 0.01
        while not search.is_over():
            left = deadline - _SYSTEM_CLOCK.monotonic()
            if left <= 0:
                break
            _SYSTEM_CLOCK.sleep(min(nap, left))
            nap = min(nap * 2, 0.5)

    async def _wait_async(self, search: _ResultSearch, timeout: int) -> None:
        import asyncio

        await asyncio.to_thread(self._wait, search, timeout)

    def _prospects(self, message: Any) -> tuple[str | None, str | None]:
        """Why there will never be a result that is not there now, or None; and else what it may come from, if known:
        the id of the message, or of an earlier step."""
        return None, None

    def _hint(self, message: Any) -> str:
        """What may be the reason where there is no result in time."""
        return ""

    def _key(self, message: Any) -> Any:
        """What _get() and _store() are called with for a message: build_message_key()."""
        return self.build_message_key(message)

    def _get(self, key: str) -> Any:
        """Return what was stored under a key, or Missing."""
        raise NotImplementedError

    def _store(self, key: str, value: Any, ttl: int) -> None:
        """Store a value under a key for `ttl` milliseconds."""
        raise NotImplementedError


class _ResultSearch:
    """Looks for one result until it is found or known never to come."""

    def __init__(self, backend: ResultBackend, message: Any) -> None:
        self._backend = backend
        self._message = message
        self._key = backend._key(message)
        self._value: Any = Missing
        self._why_never: str | None = None
        self._carrier: str | None = None  # The message that it may come from, by its id: this or an earlier step.

    def messages(self) -> tuple[str, str | None]:
        """The ids of the message and of its carrier, None if that is not known."""
        return self._message.message_id, self._carrier

    def is_over(self) -> bool:
        """Look for it, and ask whether it can still come."""
        self._value = self._backend._get(self._key)
        if self._value is not Missing:
            return True
        why, self._carrier = self._backend._prospects(self._message)
        if why is not None:  # It may have come between the two looks.
            self._value = self._backend._get(self._key)
            self._why_never = why
        return why is not None

    def outcome(self, error: type[ResultError]) -> Any:
        """Return the result; without one, say why there is none, or else raise `error`."""
        if self._value is Missing and self._why_never is None:
            self.is_over()
        if self._value is not Missing:
            return self._backend.unwrap_result(self._value)
        if self._why_never is not None:
            raise ResultUnavailable(self._message, self._why_never)
        raise _hinted(error(self._message), self._backend._hint(self._message))


def _checked_broker(broker: Any) -> _EngineBroker:
    """The broker whose database keeps results or limits; TypeError if it has none."""
    if not isinstance(broker, _EngineBroker):
        raise TypeError(f"{broker!r} keeps no results or limits; give a broker of dramalite.")
    return broker


class SQLiteResultBackend(ResultBackend):
    """Results in the database of a broker; what Results() uses if it is given no backend."""

    def __init__(self, broker: Broker, **options: Any) -> None:
        super().__init__(**options)
        self.broker = _checked_broker(broker)

    def _key(self, message: Any) -> tuple[str, str]:
        return message.message_id, self.build_message_key(message)

    def _get(self, key: Any) -> Any:
        value = self.broker._engine.result(*key)
        return Missing if value is None else self.encoder.decode(value)

    def _store(self, key: Any, value: Any, ttl: int) -> None:
        expires_at = self.broker.clock.time_ms() + ttl
        self.broker._write(_STORE_RESULT, (*key, self.encoder.encode(value), expires_at))

    def _wait(self, search: _ResultSearch, timeout: int) -> None:
        self.broker._engine.watch(search.is_over, timeout / 1000, find_messages=search.messages)

    async def _wait_async(self, search: _ResultSearch, timeout: int) -> None:
        await self.broker._engine.watch_async(search.is_over, timeout / 1000, search.messages)

    def _hint(self, message: Any) -> str:
        is_here = getattr(message, "_broker", None) is self.broker
        is_idle = is_here and not self.broker._engine.has_worker()
        return f"No worker is running on {self.broker!r}." if is_idle else ""

    def _keeps(self, options: Mapping[str, Any]) -> bool:
        """Tell whether the result of a message with these options is kept."""
        return any(item.concerns(options) for item in self.broker.middleware if isinstance(item, Results))

    def _prospects(self, message: Any) -> tuple[str | None, str | None]:
        broker = self.broker
        if getattr(message, "_broker", None) not in (None, broker):
            return None, None  # It is elsewhere; only its result is to come here.
        actor = broker.actors.get(message.actor_name)
        options = None if actor is None else {**actor.options, **message.options}
        must_store = options is None or self._keeps(options)
        sent_ms = _time_of_message_id(message.message_id) - _CLOCK_SLACK_MS
        # All is looked at for a clock that was set back meanwhile, which takes long.
        carrier, body = broker._engine.carrier_of(message.message_id, sent_ms, in_all=must_store)
        if carrier is not None and options is not None:
            must_store = self._keeps({**options, **_stored_options(body, message.message_id)})
        if not must_store:
            return "its actor stores none; give the actor store_results=True.", None
        if carrier is not None:
            return None, carrier
        death = broker._engine.cause_of_death(message.message_id)
        if death is not None:
            return f"it is a dead letter: {death}", None
        if type(get_encoder()) not in (JSONEncoder, PickleEncoder):
            return None, None  # As a later step, its id may stand in a message in another form.
        return (
            "it is not in the database. It has ended and its result was not kept or has expired, "
            "an earlier step of its pipeline failed, it was dropped from its queue, or it was "
            "never sent here."
        ), None


def _stored_options(body: bytes, message_id: str) -> dict[str, Any]:
    """The options of a message where it stands in a stored one: as that itself, or as a later step."""
    try:
        left: list[Any] = [Message.decode(body).asdict()]
    except DecodeError:
        return {}
    while left:
        data = left.pop()
        if isinstance(data, dict):
            if data.get("message_id") == message_id and isinstance(data.get("options"), dict):
                return cast("dict[str, Any]", data["options"])
            left += data.values()
        elif isinstance(data, (list, tuple)):
            left += data
    return {}


class StubResultBackend(SQLiteResultBackend):
    """Results in memory, for tests."""

    def __init__(self, **options: Any) -> None:
        super().__init__(MemoryBroker(middleware=[]), **options)

    def _prospects(self, message: Any) -> tuple[str | None, str | None]:
        return None, None  # The messages are elsewhere.


class Results(Middleware):
    """Stores what actors return, where store_results is on, for result_ttl milliseconds."""

    def __init__(
        self,
        *,
        backend: ResultBackend | None = None,
        store_results: bool = False,
        result_ttl: int | None = None,
    ) -> None:
        self.logger = get_logger("dramalite.results.middleware", type(self))
        self._backend = backend
        self.store_results = store_results
        self.result_ttl = _DEFAULT_RESULT_TTL_MS if result_ttl is None else _milliseconds(result_ttl, "result_ttl")

    @property
    def backend(self) -> ResultBackend:
        """The backend; one given to Results(), or the one of the broker it was added to."""
        if self._backend is None:
            raise RuntimeError("This Results middleware has no backend and was added to no broker.")
        return self._backend

    @property
    def actor_options(self) -> set[str]:
        return {"store_results", "result_ttl"}

    def concerns(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("store_results", self.store_results))

    def _stores(self, broker: Broker, message: MessageProxy) -> bool:
        is_known = message.actor_name in broker.actors
        return is_known and bool(_option(message, "store_results", self.store_results))

    def _ttl(self, message: MessageProxy) -> int:
        ttl = _option(message, "result_ttl")
        return self.result_ttl if ttl is None else cast(int, ttl)

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        if exception is None and not message.failed and self._stores(broker, message):
            try:
                self.backend.store_result(message, result, self._ttl(message))
            except (TypeError, ValueError) as error:
                _fail_for_result(broker, message, error)

    def warn_of_loss(self, broker: Broker, message: MessageProxy) -> None:
        """Log that a value is not kept, unless it is."""
        if not self._stores(broker, message):
            self.logger.warning(
                "Actor %r returned a value that is not None, but store_results is off: "
                "the value has been discarded.",
                message.actor_name,
            )

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        if self._stores(broker, message) and not message.failed:
            self.backend.store_result(message, None, self._ttl(message))

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        if self._stores(broker, message) and message.failed:
            exception = message._exception
            if exception is None:
                exception = RuntimeError("The message failed.")
            self.backend.store_exception(message, exception, self._ttl(message))


def _option(message: MessageProxy, name: str, default: Any = None) -> Any:
    """A message's option; where it has none its actor's, and where that has none `default`."""
    options = message.options
    if name in options:
        return options[name]
    return message.actor_options.get(name, default)


def _truthy_option(message: MessageProxy, name: str, default: Any = None) -> Any:
    """_option(), but a message's own option counts only if it is truthy."""
    return message.options.get(name) or message.actor_options.get(name, default)


def _hands_result_on(message: MessageProxy) -> bool:
    """Tell whether a pipeline or a callback gets the message's result."""
    is_step = message.options.get("pipe_target") or message.options.get("pipe_group")
    return bool(is_step or _truthy_option(message, "on_success"))


def _fail_for_result(broker: Broker, message: MessageProxy, error: Exception) -> None:
    """The actor has run, but what it returned can't be kept or passed on: fail and say why."""
    refusal = _as_refusal(error, f"The result of actor {message.actor_name!r} can't be kept: {error}")
    broker.logger.error("Message %s failed: %s", message.message_id, refusal)
    cast("_EngineBroker", broker)._forget_collected()
    message.fail()
    message.stuff_exception(refusal)


# ------------------------------------------------------------------------------------------
# Rate limits
#
# Counters with a time to live, shared by all processes that use the database.  Limiters never
# wait: they take what they want to take or raise RateLimitExceeded, which a worker retries.
# To add a limiter: subclass RateLimiter, override _acquire() and, if it gives back, _release(), as
# in Dramatiq; or _take(), if what is given back is to be told from others.
# ------------------------------------------------------------------------------------------
class RateLimiterBackend:
    """Base of stores of counters.  Every method is atomic; `ttl` is in milliseconds."""

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Store a number unless there is one; tell whether it was stored."""
        raise NotImplementedError

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        """Add to a number, 0 if there is none; False, and no change, beyond the maximum."""
        raise NotImplementedError

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Take from a number, 0 if there is none; False, and no change, below the minimum."""
        raise NotImplementedError

    def incr_and_sum(
        self, key: str, keys: Callable[[], list[str]], amount: int, maximum: int, ttl: int
    ) -> bool:
        """Add to a number if the sum of those under keys() stays within the maximum with it."""
        raise NotImplementedError

    def wait(self, key: str, timeout: int | None) -> bool:
        """Wait up to `timeout` milliseconds, None for ever, for wait_notify(); tell if it came."""
        raise NotImplementedError

    def wait_notify(self, key: str, ttl: int) -> None:
        """Wake those that wait for a key, and for `ttl` milliseconds those that come to wait."""
        raise NotImplementedError


#: After a barrier's key: whether all have arrived.
_EVENTS = "@events"


class SQLiteRateLimiterBackend(RateLimiterBackend):
    """Counters in the database of a broker; the default broker if None."""

    def __init__(self, broker: Broker | None = None) -> None:
        self.broker = _checked_broker(get_broker() if broker is None else broker)

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Store a number if there is none; what told those that waited at a barrier of that key before goes with it."""
        return self.broker._engine.change_limit(
            key, lambda old: value if old is None else None, ttl, dropped=key + _EVENTS
        )

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        return self._add(key, amount, ttl, lambda value: value <= maximum)

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        return self._add(key, -amount, ttl, lambda value: value >= minimum)

    def incr_and_sum(
        self, key: str, keys: Callable[[], list[str]], amount: int, maximum: int, ttl: int
    ) -> bool:
        def fits(_value: int) -> bool:
            return sum(value or 0 for value in self.broker._engine.limits(keys())) + amount <= maximum

        return self._add(key, amount, ttl, fits)

    def _add(self, key: str, amount: int, ttl: int, fits: Callable[[int], bool]) -> bool:
        """Add to a number, 0 if there is none, where the sum fits; tell whether it did."""

        def change(old: int | None) -> int | None:
            value = (old or 0) + amount
            return value if fits(value) else None

        return self.broker._engine.change_limit(key, change, ttl)

    def wait(self, key: str, timeout: int | None) -> bool:
        return self.broker._engine.watch(
            lambda: bool(self.broker._engine.limits([key])[0]),
            None if timeout is None else timeout / 1000,
        )

    def wait_notify(self, key: str, ttl: int) -> None:
        self.broker._engine.change_limit(key, lambda _old: 1, ttl)


class StubRateLimiterBackend(SQLiteRateLimiterBackend):
    """Counters in memory, for tests."""

    def __init__(self) -> None:
        super().__init__(MemoryBroker(middleware=[]))


def _count_up(backend: RateLimiterBackend, key: str, maximum: int, ttl: int) -> bool:
    """Add 1 to a number up to a maximum; those written for Dramatiq make one by add() alone."""
    if isinstance(backend, SQLiteRateLimiterBackend):
        return backend.incr(key, 1, maximum, ttl)
    return backend.add(key, 1, ttl) or backend.incr(key, 1, maximum, ttl)


def _untaken(backend: RateLimiterBackend, keys: list[str]) -> list[str]:
    """The keys whose numbers may be 0: all, where to look is no cheaper than to try."""
    if not isinstance(backend, SQLiteRateLimiterBackend):
        return keys
    return [key for key, number in zip(keys, backend.broker._engine.limits(keys), strict=True) if not number]


class RateLimiter:
    """Base of rate limiters; use one as `with limiter.acquire(): ...`."""

    def __init__(self, backend: RateLimiterBackend, key: str) -> None:
        if isinstance(backend, Broker):
            raise TypeError(f"{backend!r} is a broker; give SQLiteRateLimiterBackend(broker).")
        self.backend = backend
        self.key = key

    @contextlib.contextmanager
    def acquire(self, *, raise_on_failure: bool = True) -> Iterator[bool]:
        """Take a place for the time of the `with` block; never waits for one.

        Raises RateLimitExceeded if there is none, or yields False without raise_on_failure.
        """
        give_back: Callable[[], object] | None = None

        @_uninterrupted  # Or a time limit could leave a place that nobody gives back.
        def take() -> None:
            nonlocal give_back
            give_back = self._take()

        @_uninterrupted
        def release() -> None:
            nonlocal give_back
            call, give_back = give_back, None
            if call is not None:
                call()

        try:
            take()
            if raise_on_failure and give_back is None:
                raise RateLimitExceeded(f"rate limit exceeded for key {self.key!r}")
            yield give_back is not None
        finally:
            try:
                release()
            except Interrupt:  # One that came just before.
                release()
                raise

    def _take(self) -> Callable[[], object] | None:
        """Take a place; return what gives it back, None if there was none."""
        return self._release if self._acquire() else None

    def _acquire(self) -> bool:
        """Take a place; tell whether there was one."""
        raise NotImplementedError

    def _release(self) -> None:
        """Give the place back, where the limiter does that."""


def _check_limit(name: str, value: float) -> None:
    if value < 1:
        raise AssertionError(f"{name} is {value!r}; give at least 1.")


class ConcurrentRateLimiter(RateLimiter):
    """At most `limit` at a time; a place that nobody gave back is free after `ttl` ms.

    Each place is a counter of its own, so that its time does not depend on the others'.
    """

    def __init__(
        self, backend: RateLimiterBackend, key: str, *, limit: int = 1, ttl: int | timedelta = 900_000
    ) -> None:
        _check_limit("limit", limit)
        super().__init__(backend, key)
        self.limit = limit
        self.ttl = _milliseconds(ttl, "ttl")

    def _take(self) -> Callable[[], object] | None:
        keys = [self.key, *(f"{self.key}#{number}" for number in range(1, self.limit))]
        for key in _untaken(self.backend, keys):
            ends_at = _clock_of(self.backend).time_ms() + self.ttl
            if _count_up(self.backend, key, 1, self.ttl):
                return functools.partial(self._give_back, key, ends_at)
        return None

    def _give_back(self, key: str, ends_at: int) -> None:
        """Give back a place that is ours up to a time, by the wall clock."""
        if _clock_of(self.backend).time_ms() < ends_at:  # Later it may be somebody else's.
            self.backend.decr(key, 1, 0, self.ttl)


class BucketRateLimiter(RateLimiter):
    """At most `limit` in each `bucket` of milliseconds, counted from 1970 on.

    Twice as many may come around the border of two buckets; WindowRateLimiter knows none.
    """

    def __init__(
        self, backend: RateLimiterBackend, key: str, *, limit: int = 1, bucket: int | timedelta = 1000
    ) -> None:
        _check_limit("limit", limit)
        super().__init__(backend, key)
        self.limit = limit
        self.bucket = max(_milliseconds(bucket, "bucket"), 1)

    def _acquire(self) -> bool:
        now = _clock_of(self.backend).time_ms()
        return _count_up(self.backend, f"{self.key}@{now - now % self.bucket}", self.limit, self.bucket)


#: Parts of a window that are counted one by one: it is exact to one of them, and to no second.
_WINDOW_PARTS = 20


class WindowRateLimiter(RateLimiter):
    """At most `limit` in any `window` of seconds, whenever it begins."""

    def __init__(self, backend: RateLimiterBackend, key: str, *, limit: int = 1, window: float = 1) -> None:
        _check_limit("limit", limit)
        _check_limit("window", window)
        super().__init__(backend, key)
        self.limit = limit
        self.window = window

    def _acquire(self) -> bool:
        window = int(self.window * 1000)
        part = max(window // _WINDOW_PARTS, 1)
        now = _clock_of(self.backend).time_ms() // part

        def keys() -> list[str]:  # Up to the part in which the window has begun, all of it.
            return [f"{self.key}@{now - age}" for age in range(-(-window // part) + 1)]

        return self.backend.incr_and_sum(f"{self.key}@{now}", keys, 1, self.limit, window + 2 * part)


def _clock_of(backend: RateLimiterBackend) -> Clock:
    return backend.broker.clock if isinstance(backend, SQLiteRateLimiterBackend) else _SYSTEM_CLOCK


class Barrier:
    """Lets threads and processes wait until a number of them has arrived."""

    def __init__(self, backend: RateLimiterBackend, key: str, *, ttl: int | timedelta = 900_000) -> None:
        self.backend = backend
        self.key = key
        self.key_events = key + _EVENTS
        self.ttl = _milliseconds(ttl, "ttl")

    def create(self, parties: int) -> bool:
        """Set the barrier up for so many; False if it exists already."""
        _check_limit("parties", parties)
        return self.backend.add(self.key, parties, self.ttl)

    def wait(self, *, block: bool = True, timeout: int | timedelta | None = None) -> bool:
        """Arrive; True for the last one, which lets the others go.

        The others wait up to `timeout` milliseconds, None for ever, and then return True; with
        block=False or after the time they return False.  Where no barrier is, True at once.
        """
        if self.backend.decr(self.key, 1, 1, self.ttl):
            return block and self.backend.wait(self.key_events, _timeout_ms(timeout))
        self.backend.wait_notify(self.key_events, self.ttl)
        return True


# ------------------------------------------------------------------------------------------
# Age limit
# ------------------------------------------------------------------------------------------
class AgeLimit(Middleware):
    """Makes dead letters of messages that are older than max_age when their turn comes."""

    def __init__(self, *, max_age: int | timedelta | None = None) -> None:
        self.logger = get_logger("dramalite.middleware.age_limit", type(self))
        self.max_age = None if max_age is None else _milliseconds(max_age, "max_age")

    @property
    def actor_options(self) -> set[str]:
        return {"max_age"}

    def concerns(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("max_age", self.max_age))

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        max_age = _truthy_option(message, "max_age", self.max_age)
        if max_age and broker.clock.time_ms() - message.message_timestamp >= max_age:
            self.logger.warning(
                "Message %s of %s is older than %s ms; it becomes a dead letter.",
                message.message_id, message.actor_name, max_age,
            )  # fmt: skip
            message.fail()
            raise SkipMessage("Message age limit exceeded")


# ------------------------------------------------------------------------------------------
# Time limit
#
# Deadlines of running actors.  One watching thread per middleware, started by the first
# deadline, sleeps until the earliest and ends when there have been none at two looks in a row;
# it holds _lock for moments.
# ------------------------------------------------------------------------------------------
_LATE_LOOK_S = 0.005  # Between looks whether an actor has begun that is to be interrupted.


class TimeLimitExceeded(Interrupt):
    """Raised in an actor that runs for longer than its time_limit."""


class TimeLimit(Middleware):
    """Raises TimeLimitExceeded in actors that run longer than time_limit (10 minutes).

    The limit is in milliseconds or a timedelta; None or math.inf is none.  The exception is raised
    at the actor's next bytecode: a blocking C call (a sleep, a socket, a query) delays it until the
    call returns.  `interval` is the longest time in milliseconds between two looks at the deadlines.
    """

    def __init__(self, *, time_limit: float | timedelta | None = 600_000, interval: int = 1000) -> None:
        self.logger = get_logger("dramalite.middleware.time_limit", type(self))
        self.time_limit = None if time_limit is None else _check_time_limit(time_limit, "time_limit")
        self.interval_s = _milliseconds(interval, "interval") / 1000
        if not self.interval_s:
            raise ValueError("interval is 0; give 1 or more milliseconds.")
        self.forget()
        _forgetful.add(self)

    def forget(self) -> None:
        """Begin with nothing to watch, also in a forked child: its parent's threads are not here."""
        self._lock = threading.Condition(threading.Lock())  # Guards all below.
        self._deadlines: dict[int, float] = {}  # By runner, those not yet passed.
        self._passed: dict[int, float] = {}  # By runner: when the interrupt was raised.
        self._wakes_at = 0.0
        self._is_watched = False  # By a thread.

    @property
    def actor_options(self) -> set[str]:
        return {"time_limit"}

    def after_process_boot(self, broker: Broker) -> None:
        _warn_without_interrupts("TimeLimit cannot kill threads")

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        runner = _runner.id()
        self.leave(runner)  # Of one whose hooks were kept from it, or whose thread was given up.
        limit = _truthy_option(message, "time_limit", self.time_limit)
        if limit is None or not limit < math.inf:  # Nor NaN, which may be stored.
            return
        deadline = self._deadlines[runner] = broker.clock.monotonic() + limit / 1000
        if broker.clock.is_virtual:
            return  # Whoever lets its time pass looks at the deadline.
        if deadline < self._wakes_at or not self._is_watched:
            self._watch(broker.clock, deadline)

    def after_process_message(self, broker: Broker, message: MessageProxy, **_outcome: Any) -> None:
        self.leave(_runner.id())

    after_skip_message = after_process_message

    def leave(self, runner: int) -> None:
        """Forget what a runner's message was watched for: it is over, or no longer the worker's."""
        self._deadlines.pop(runner, None)
        self._passed.pop(runner, None)

    def stuck_runners(self, clock: Clock, grace_s: float) -> list[int]:
        """What was interrupted `grace_s` seconds ago and still runs its actor."""
        now = clock.monotonic()
        return [runner for runner, at in list(self._passed.items()) if now >= at + grace_s]

    def deadline(self, runner: int) -> float | None:
        """When a running actor is to be ended, by the broker's monotonic clock."""
        return self._deadlines.get(runner)

    def expire(self, runner: int, clock: Clock) -> None:
        """Note, for an actor that is ended otherwise, that its deadline has passed."""
        self._deadlines.pop(runner, None)
        self._passed[runner] = clock.monotonic()

    def _watch(self, clock: Clock, deadline: float) -> None:
        """Have the watching thread wake up for this deadline."""
        with self._lock:
            self._wakes_at = min(self._wakes_at, deadline)
            if not self._is_watched:
                self._wakes_at = deadline
                threading.Thread(
                    target=self._enforce, args=(clock,), name="dramalite-time-limit", daemon=True
                ).start()
                self._is_watched = True
            self._lock.notify()

    def _enforce(self, clock: Clock) -> None:
        """Raise the exception in each thread whose deadline passes, until there are none left."""
        was_idle = False
        while True:
            now = clock.monotonic()
            for runner in [r for r, deadline in list(self._deadlines.items()) if deadline <= now]:
                self._exceed(runner, now)
            with self._lock:
                self._is_watched = False  # Before the look: who comes after it starts another thread.
                is_idle = not self._deadlines
                if is_idle and was_idle:
                    return
                was_idle = is_idle
                self._is_watched = True
                earliest = min(list(self._deadlines.values()), default=math.inf)
                # What is late still runs hooks: to be looked at again when its actor has begun.
                self._wakes_at = min(max(earliest, now + _LATE_LOOK_S), now + self.interval_s)
                self._lock.wait(min(max(0.0, self._wakes_at - clock.monotonic()), _LONGEST_WAIT_S))

    def _exceed(self, runner: int, now: float) -> None:
        with _interrupt_lock:  # Which the body can't be left without.
            if self._deadlines.get(runner, math.inf) > now:
                return  # That body was left, and another one begun.
            if not _interrupt(runner, TimeLimitExceeded):
                return
            self._deadlines.pop(runner, None)
            self._passed[runner] = now
        with contextlib.suppress(Exception):  # A handler of the log must not end the watch.
            self.logger.warning("Time limit exceeded. Raising exception in worker thread %r.", runner)


# ------------------------------------------------------------------------------------------
# Shutdown notifications
# ------------------------------------------------------------------------------------------
class Shutdown(Interrupt):
    """Raised in an actor that asked for it when its worker stops; it is then run again later."""


class ShutdownNotifications(Middleware):
    """Raises Shutdown in the running actors that have notify_shutdown, when the worker stops."""

    def __init__(self, notify_shutdown: bool = False) -> None:
        self.logger = get_logger("dramalite.middleware.shutdown", type(self))
        self.notify_shutdown = notify_shutdown
        self.forget()
        _forgetful.add(self)

    def forget(self) -> None:
        """Begin with nobody to notify, also in a forked child: its parent's threads are not here."""
        self._notified: set[int] = set()  # Runners whose actor wants to know.
        self._stopping: set[int] = set()  # By id(): workers that stop.

    @property
    def actor_options(self) -> set[str]:
        return {"notify_shutdown"}

    def concerns(self, options: Mapping[str, Any]) -> bool:
        wanted = options.get("notify_shutdown")
        return bool(self.notify_shutdown if wanted is None else wanted)

    def after_process_boot(self, broker: Broker) -> None:
        _warn_without_interrupts("ShutdownNotifications cannot kill threads")

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self.logger.debug("Sending shutdown notification to worker threads...")
        self._stopping.add(id(worker))
        self._notify(worker)
        late = threading.Thread(  # For those that have been taken up, but whose actor is still to begin.
            target=self._notify_late_ones, args=(worker,), name="dramalite-shutdown", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # At the interpreter's exit there are no new threads.
            late.start()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._stopping.discard(id(worker))

    def _notify(self, worker: Worker) -> None:
        for runner in sorted(self._notified & worker.runners):
            with _interrupt_lock:  # Which a body can't be left without.
                if runner not in self._notified or not _interrupt(runner, Shutdown):
                    continue
                self._notified.discard(runner)
            self.logger.info("Worker shutdown notification. Raising exception in worker thread %r.", runner)

    def _notify_late_ones(self, worker: Worker) -> None:
        while id(worker) in self._stopping:
            if self._notified:
                self._notify(worker)
            _SYSTEM_CLOCK.sleep(_LATE_LOOK_S)

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        wanted = message.options.get("notify_shutdown")
        if wanted is None:
            wanted = message.actor_options.get("notify_shutdown")
        if self.notify_shutdown if wanted is None else wanted:
            self._notified.add(_runner.id())

    def after_process_message(self, broker: Broker, message: MessageProxy, **_outcome: Any) -> None:
        if self._notified:
            self.leave(_runner.id())

    after_skip_message = after_process_message

    def leave(self, runner: int) -> None:
        """Forget that a runner's message wants to know: it is over, or no longer the worker's."""
        self._notified.discard(runner)


# ------------------------------------------------------------------------------------------
# Callbacks
# ------------------------------------------------------------------------------------------
class Callbacks(Middleware):
    """Sends on_success(message_data, result) or on_failure(message_data, exception_data).

    on_failure comes for every failed attempt; see on_retry_exhausted of Retries for the last.
    """

    def __init__(self) -> None:
        self.logger = get_logger("dramalite.middleware.callbacks", type(self))

    @property
    def actor_options(self) -> set[str]:
        return {"on_failure", "on_success"}

    def concerns(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("on_success") or options.get("on_failure"))

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        exception = exception or message._exception  # Of a result that can't be kept or passed on.
        name = "on_success" if exception is None else "on_failure"
        callback = _truthy_option(message, name)
        if not callback:
            return
        if exception is not None:
            result = {"type": type(exception).__name__, "message": _error_text(exception)}
        try:
            _send_callback(broker, callback, message, result)
        except Exception as error:  # Also of a hook that refuses it.
            if exception is None:
                _fail_for_result(broker, message, error)
            else:
                raise


def _send_callback(broker: Broker, callback: str, message: MessageProxy, value: Any) -> None:
    """Send a callback actor the message's data and a value; an unknown one is logged."""
    try:
        actor = broker.get_actor(callback)
    except ActorNotFound:
        broker.logger.critical(
            "Callback actor %r of message %s is not declared; the callback is lost.",
            callback, message.message_id, exc_info=True,
        )  # fmt: skip
        return
    actor.send(message.asdict(), value)


# ------------------------------------------------------------------------------------------
# Pipelines
# ------------------------------------------------------------------------------------------
class Pipelines(Middleware):
    """Sends the next message of a pipeline, with the result as its last argument."""

    def __init__(self) -> None:
        self.logger = get_logger("dramalite.middleware.pipelines", type(self))
        self._told: set[str] = set()  # Actors whose signature was warned of.

    @property
    def actor_options(self) -> set[str]:
        return {"pipe_ignore", "pipe_target"}

    def concerns(self, options: Mapping[str, Any]) -> bool:
        return False  # A message in a pipeline has a pipe_target of its own.

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        target = message.options.get("pipe_target")
        group_data = message.options.get("pipe_group")
        if exception is not None or message.failed:
            return
        if "pipe_results" in message.options:
            self._forget_group(broker, message.options["pipe_results"])
        if not (target or group_data):
            return
        try:
            if group_data:
                step = group.restore(group_data, broker)
                step.children = [self._with_result(broker, child, result) for child in step.children]
                step.run()
            elif target:
                successor = self._with_result(broker, Message(**target), result)
                broker.enqueue(successor, delay=successor.options.get("delay") or None)
        except Exception as error:  # Also of a hook that refuses the next step.
            _fail_for_result(broker, message, error)

    def _with_result(self, broker: Broker, step: Any, result: Any) -> Any:
        """The next step with a result as its last argument, unless it does not take it."""
        if isinstance(step, pipeline):
            first, *others = step.messages
            return pipeline([self._with_result(broker, first, result), *others], broker=broker)
        if self._ignores_result(broker, step):
            return step
        return step.copy(args=(*step.args, result))

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        """Give the step after a group the results of its members, as its own argument from now on."""
        group = message.options.get("pipe_results")
        if group is None:
            return
        if not self._ignores_result(broker, message._message):
            message.args = (*message.args, self._results_of(broker, message, group))
        options = {name: value for name, value in message.options.items() if name != "pipe_results"}
        told = message._message._replace(args=message.args, options=options)
        if _fits(told, cast("_EngineBroker", broker).max_message_size):  # Else it asks again each time.
            del message.options["pipe_results"]
            message._message = told._replace(options=message.options)
            self._forget_group(broker, group)

    def _forget_group(self, broker: Broker, group: str | list[list[str]]) -> None:
        if isinstance(group, str):
            cast("_EngineBroker", broker)._write(_FORGET_GROUP, (group,))

    def _results_of(self, broker: Broker, message: MessageProxy, group: str | list[list[str]]) -> list[Any]:
        """The results of a group's members, which schema version 2 has listed in the message."""
        try:
            backend = broker.get_results_backend()
            sources = cast("_EngineBroker", broker)._engine.sources(group) if isinstance(group, str) else group
            return [
                backend.get_result(Message(queue, name, (), {}, {}, message_id))
                for queue, name, message_id in sources
            ]
        except (ResultError, RuntimeError) as error:  # The latter where the broker keeps none.
            message.fail()
            raise SkipMessage(f"The results of the group before can't be had: {error}") from error
        except Exception as error:  # A backend is foreign code.  Not to be run without them, but again.
            raise MiddlewareError(f"The results of the group before can't be read: {error}") from error

    def _ignores_result(self, broker: Broker, successor: Message[Any]) -> bool:
        """Tell whether the next actor does not get the result, by option or by its signature."""
        actor = broker.actors.get(successor.actor_name)
        if successor.options.get("pipe_ignore"):
            return True
        if actor is None:
            return False
        if "pipe_ignore" not in successor.options and actor.options.get("pipe_ignore"):
            return True
        fn = actor.fn.perform if isinstance(actor.fn, GenericActor) else actor.fn
        if not _only_fits_without(fn, successor):
            return False
        if actor.actor_name not in self._told:
            self._told.add(actor.actor_name)
            self.logger.warning(
                "Actor %r takes no further argument, so the pipeline's result is not passed to it. "
                "Say so with pipe_ignore=True: Dramatiq would fail here.",
                actor.actor_name,
            )
        return True


def _fits(message: Message[Any], max_size: int) -> bool:
    """Tell whether a message can be stored."""
    try:
        return len(message.encode()) <= max_size
    except (TypeError, ValueError):
        return False


def _only_fits_without(fn: Callable[..., Any], message: Message[Any]) -> bool:
    """Tell whether the message's arguments fit a function, but not with one more at the end."""
    from inspect import signature as signature_of

    try:
        signature = signature_of(fn)
        signature.bind(*message.args, **message.kwargs)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(*message.args, None, **message.kwargs)
    except TypeError:
        return True
    return False


# ------------------------------------------------------------------------------------------
# Group callbacks
#
# Counts the members of groups that have callbacks.  A member's count and, with the last one,
# the callbacks are part of the transaction that acknowledges it.
# ------------------------------------------------------------------------------------------
class GroupCallbacks(Middleware):
    """Sends the completion callbacks of groups; built into dramalite's brokers.

    The arguments are Dramatiq's and change nothing here: counts live with the messages.
    """

    def __init__(
        self,
        rate_limiter_backend: RateLimiterBackend | None = None,
        *,
        barrier_ttl: int = 86_400_000,
    ) -> None:
        self.logger = get_logger("dramalite.middleware.group_callbacks", type(self))
        self.rate_limiter_backend = rate_limiter_backend
        self.barrier_ttl = barrier_ttl

    def concerns(self, options: Mapping[str, Any]) -> bool:
        return False  # A member of a group has options of its own.

    def create(self, broker: Broker, uuid: str, count: int, sources: list[list[str]] | None = None) -> None:
        """Begin to count a group with so many members, whose results are for the step after it."""
        described = None if sources is None else _to_json(sources)
        cast("_EngineBroker", broker)._write(_CREATE_GROUP, (uuid, count, count, described))

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, exception: BaseException | None = None, **_result: Any
    ) -> None:
        if exception is None and not message.failed:
            for membership in _memberships(message.options):
                self._count(broker, membership, message.message_id, True)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        if not message.failed:
            self._end(broker, message.message_id, message.options)

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        self._end(broker, message.message_id, message.options)

    def _end(
        self, broker: Broker, message_id: str, options: dict[str, Any], failed_group: str | None = None
    ) -> None:
        """Count what ended without success: a member, and those after a step or group that failed."""
        for membership in _memberships(options):
            self._count(broker, membership, message_id, False, failed_group)
        following = []
        if target := options.get("pipe_target"):
            following = [target]
        elif group_data := options.get("pipe_group"):
            successor = group_data["successor"]
            following = [chain[0] for chain in group_data["chains"]] if successor is None else [successor]
        for data in following:
            self._end(broker, data["message_id"], data["options"], failed_group)

    def _count(
        self, broker: Any, membership: dict[str, Any], message_id: str, succeeded: bool,
        failed_group: str | None = None,
    ) -> None:  # fmt: skip
        """Count a member; where a group inside is given, only if that ended without success."""
        uuid = membership["group_completion_uuid"]
        member = f"{message_id} {membership['group_occurrence']}" if "group_occurrence" in membership else message_id
        values = member, None if succeeded else broker.clock.time_ms(), uuid
        if failed_group is None:
            broker._write(_COUNT_MEMBER, values)
        else:
            broker._write(_COUNT_MEMBER_AFTER_GROUP, (*values, failed_group))
        for data in membership["group_completion_callbacks"]:
            if succeeded:
                broker._write_after_group(Message(**data), uuid, _IS_COMPLETE)
            if "pipe_results" in data["options"]:  # The step after this group.
                self._end(broker, data["message_id"], data["options"], uuid)
        for data in membership.get("group_end_callbacks", ()):
            broker._write_after_group(Message(**data), uuid, _IS_OVER)
        broker._write(_NOTE_TOLD, (broker.clock.time_ms(), uuid))
        broker._write(_END_GROUP, (uuid,))


def _memberships(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a message tells of each group that it is a member of."""
    return [options, *options.get("group_further", ())] if "group_completion_uuid" in options else []


# ------------------------------------------------------------------------------------------
# Retries
#
# Exponential backoff with jitter from the broker's random source, as Dramatiq computes it.
# ------------------------------------------------------------------------------------------
_MIN_BACKOFF_MS = 15_000
_MAX_BACKOFF_MS = 7 * 24 * 3600 * 1000
_MAX_BACKOFF_EXPONENT = 32


def _backoff_ms(attempt: int, min_ms: int, max_ms: int, rng: random.Random) -> int:
    """Milliseconds before retry number `attempt` (from 0): doubling, jittered, bounded.

    min * 2^attempt, times 1 to 2; where that is over max, max times 0.5 to 1.
    """
    max_ms = min(max_ms, _MAX_BACKOFF_MS)
    delay = int(min_ms * 2 ** min(attempt, _MAX_BACKOFF_EXPONENT) * rng.uniform(1, 2))
    return delay if delay <= max_ms else int(max_ms * rng.uniform(0.5, 1))


class Retries(Middleware):
    """Runs failed messages again, with backoff, up to max_retries times; then dead letters.

    `retry_when(retries_so_far, exception)` decides in place of max_retries where it is given.
    `backoff` goes before min_backoff and max_backoff: a list of milliseconds, whose last one
    holds from there on, or a function of the attempt (from 0).
    """

    def __init__(
        self,
        *,
        max_retries: int | None = 20,
        min_backoff: int | timedelta | None = None,
        max_backoff: int | timedelta | None = None,
        retry_when: Callable[[int, BaseException], bool] | None = None,
        backoff: Callable[[int], int] | list[int] | None = None,
    ) -> None:
        self.logger = get_logger("dramalite.middleware.retries", type(self))
        self.backoff = None if backoff is None else _check_backoff(backoff, "backoff")
        self.max_retries = None if max_retries is None else _check_retries(max_retries, "max_retries")
        self.min_backoff = _MIN_BACKOFF_MS if min_backoff is None else _milliseconds(min_backoff, "min_backoff")
        self.max_backoff = _MAX_BACKOFF_MS if max_backoff is None else _milliseconds(max_backoff, "max_backoff")
        self.retry_when = retry_when

    @property
    def actor_options(self) -> set[str]:
        return {
            "backoff", "max_retries", "min_backoff", "max_backoff", "retry_when", "throws",
            "on_retry_exhausted",
        }  # fmt: skip

    def concerns(self, options: Mapping[str, Any]) -> bool:
        return False

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, exception: BaseException | None = None, **_result: Any
    ) -> None:
        if exception is None or message.failed:
            return
        try:
            self._decide(broker, message, exception)
        except Exception:  # retry_when is foreign code: whatever it does, nothing is lost.
            self.logger.critical(
                "The retry of message %s failed; it becomes a dead letter.",
                message.message_id, exc_info=True,
            )  # fmt: skip
            message.fail()

    def _decide(self, broker: Broker, message: MessageProxy, exception: BaseException) -> None:
        """Retry the message, or fail it for good."""
        throws = _truthy_option(message, "throws")
        if throws and isinstance(exception, throws):
            self.logger.info("Aborting message %r.", message.message_id)
            message.fail()
            return
        if isinstance(exception, Shutdown):  # Not the message's fault: no retry is counted.
            broker.enqueue(cast(Any, message))
            return
        attempt = max(0, message.options.get("retries") or 0)
        message.options["retries"] = attempt + 1
        message.options["traceback"] = _traceback_text(exception)
        message.options["requeue_timestamp"] = broker.clock.time_ms()
        max_retries = _option(message, "max_retries", self.max_retries)
        if self._is_exhausted(message, attempt, max_retries, exception):
            self._give_up(broker, message, attempt, max_retries)
        else:
            delay = self._delay_ms(broker, message, attempt, exception)
            self.logger.info("Retrying message %r in %d milliseconds.", message.message_id, delay)
            broker.enqueue(cast(Any, message), delay=delay)

    def _is_exhausted(
        self, message: MessageProxy, attempt: int, max_retries: int | None, exception: BaseException
    ) -> bool:
        retry_when = message.actor_options.get("retry_when", self.retry_when)
        if retry_when is not None:
            return not retry_when(attempt, exception)
        return max_retries is not None and attempt >= max_retries

    def _give_up(self, broker: Broker, message: MessageProxy, attempt: int, max_retries: int | None) -> None:
        self.logger.warning("Retries exceeded for message %r.", message.message_id)
        message.fail()
        callback = _truthy_option(message, "on_retry_exhausted")
        if callback:
            retries = {"retries": attempt, "max_retries": max_retries}
            _send_callback(broker, callback, message, retries)

    def _delay_ms(self, broker: Broker, message: MessageProxy, attempt: int, exception: BaseException) -> int:
        if isinstance(exception, Retry) and exception.delay is not None:
            return exception.delay
        backoff = _option(message, "backoff", self.backoff)
        if callable(backoff):
            return _milliseconds(backoff(attempt), "What backoff returned")
        if backoff:
            return _milliseconds(backoff[min(attempt, len(backoff) - 1)], "backoff")
        shortest = _option(message, "min_backoff")
        longest = _option(message, "max_backoff")
        return _backoff_ms(
            attempt,
            self.min_backoff if shortest is None else shortest,
            self.max_backoff if longest is None else longest,
            broker.random,
        )


# ------------------------------------------------------------------------------------------
# Current message
# ------------------------------------------------------------------------------------------
_current_message: contextvars.ContextVar[MessageProxy | None] = contextvars.ContextVar(
    "dramalite_current_message", default=None
)


class CurrentMessage(Middleware):
    """Lets an actor see the message that it is running for."""

    @classmethod
    def get_current_message(cls) -> MessageProxy | None:
        """Return the message that runs in this thread or task, None outside of actors."""
        return _current_message.get()

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        _current_message.set(message)

    def after_process_message(self, broker: Broker, message: MessageProxy, **_outcome: Any) -> None:
        _current_message.set(None)

    after_skip_message = after_process_message

    def leave(self, runner: int) -> None:
        """Forget the message of this runner, if it is the one that calls: no other one can."""
        if runner == _runner.id():
            _current_message.set(None)


class AsyncIO(Middleware):
    """Does nothing: `async def` actors need no set-up here.  For code that comes from Dramatiq."""


#: What a broker gets where no middleware is given, in this order.
default_middleware: list[type[Middleware]] = [
    AgeLimit, TimeLimit, ShutdownNotifications, Callbacks, Pipelines, Retries,
]  # fmt: skip


# ------------------------------------------------------------------------------------------
# Prometheus
#
# Dramatiq's metrics in Prometheus's text format.  Every process adds what it has counted to the
# sums in the database, once a second and only if there is something; one process, the first
# that gets the port, answers for all.  What is in progress or delayed is counted there and then.
# ------------------------------------------------------------------------------------------
#: Upper bounds of the buckets of the duration, in milliseconds.
_BUCKETS_MS = (
    5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10_000, 30_000, 60_000, 600_000,
    900_000, math.inf,
)  # fmt: skip

_COUNTERS = {
    "dramatiq_messages_total": "Messages processed.",
    "dramatiq_message_errors_total": "Runs that failed.",
    "dramatiq_message_retries_total": "Retries.",
    "dramatiq_message_rejects_total": "Dead letters.",
}
_DURATION = "dramatiq_message_duration_milliseconds"
_GAUGES = {
    "dramatiq_messages_inprogress": (_CLAIMED, "Messages in the hands of workers."),
    "dramatiq_delayed_messages_inprogress": (_DELAYED, "Messages that are not due yet."),
}

#: Seconds between two additions to the sums, and two tries to get the port.
_METRICS_TICK_S = 1.0


class Prometheus(Middleware):
    """Counts messages and serves the counts at http://HOST:PORT/ while a worker runs.

    Host and port are those given, else dramatiq_prom_host and dramatiq_prom_port of the
    environment, else 127.0.0.1 and 9191.
    """

    def __init__(self, *, http_host: str | None = None, http_port: int | None = None) -> None:
        self.logger = get_logger("dramalite.middleware.prometheus", type(self))
        self.http_host = http_host or os.environ.get("dramatiq_prom_host", "127.0.0.1")
        port: Any = os.environ.get("dramatiq_prom_port", 9191) if http_port is None else http_port
        if not (str(port).strip().isdecimal() and int(port) <= 65535):
            name = "dramatiq_prom_port of the environment" if http_port is None else "http_port"
            raise ValueError(f"{name} is {port!r}; give a port from 0 to 65535.")
        self.http_port = int(port)
        self.forget()
        _forgetful.add(self)

    _server: Any = None  # Which answers requests.

    def forget(self) -> None:
        """Begin with nothing counted, also in a forked child: what its parent has counted that one adds."""
        if self._server is not None:
            self._server.socket.close()  # The child's copy would keep the port.
            self._server = None
        self._started: dict[int, float] = {}  # By runner: monotonic seconds.
        self._lock = threading.Lock()  # Guards all below.
        self._counts: dict[tuple[str, str, str, float], float] = collections.defaultdict(float)
        self._serving: tuple[threading.Thread, threading.Event] | None = None  # And what stops it.
        self._workers: set[int] = set()  # By id(): those that run.

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        with self._lock:
            self._workers.add(id(worker))
            if self._serving is None:
                import encodings.idna
                import http.server  # noqa: F401  (Here: a child forked while a thread imports would wait for it for ever.)

                stop = threading.Event()
                thread = threading.Thread(
                    target=self._serve, args=(broker, stop), name="dramalite-prometheus", daemon=True
                )
                thread.start()
                self._serving = thread, stop

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(id(worker))
            if self._workers:
                return
            serving, self._serving = self._serving, None
        if serving is not None:
            thread, stop = serving
            stop.set()
            thread.join(_METRICS_TICK_S)  # No longer: a database that is locked must not keep the worker.

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        self._started[_runner.id()] = broker.clock.monotonic()

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, exception: BaseException | None = None, **_result: Any
    ) -> None:
        started = self._started.pop(_runner.id(), None)
        taken_ms = 0.0 if started is None else (broker.clock.monotonic() - started) * 1000
        bucket = next(bound for bound in _BUCKETS_MS if taken_ms <= bound)
        with self._lock:
            self._count(message, "dramatiq_messages_total")
            self._count(message, f"{_DURATION}_sum", taken_ms)
            self._count(message, f"{_DURATION}_bucket", 1, bucket)
            if exception is not None:
                self._count(message, "dramatiq_message_errors_total")

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        self.after_process_message(broker, message)

    def leave(self, runner: int) -> None:
        """Forget when a runner began: its message is no longer the worker's."""
        self._started.pop(runner, None)

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        if delay is not None and message.options.get("retries"):  # Without: handed back by a stop.
            with self._lock:
                self._count(message, "dramatiq_message_retries_total")

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        with self._lock:
            self._count(message, "dramatiq_message_rejects_total")

    def _count(self, message: Any, name: str, amount: float = 1, bucket: float = 0) -> None:
        self._counts[name, _q_name(message.queue_name), message.actor_name, bucket] += amount

    def flush(self, broker: Broker) -> None:
        """Add what was counted here to the sums in the database."""
        with self._lock:
            counts, self._counts = self._counts, collections.defaultdict(float)
        rows = [(*key, amount) for key, amount in counts.items()]
        try:
            if rows:
                cast("_EngineBroker", broker)._engine.add_metrics(rows)
        except BrokerError:
            with self._lock:
                for key, amount in counts.items():
                    self._counts[key] += amount
            raise

    def render(self, broker: Broker) -> str:
        """Return the metrics of all processes in Prometheus's text format."""
        self.flush(broker)
        engine = cast("_EngineBroker", broker)._engine
        lines: list[str] = []
        sums: dict[str, list[tuple[str, str, float, float]]] = collections.defaultdict(list)
        for name, queue, actor_name, bucket, amount in engine.metrics():
            sums[name].append((queue, actor_name, bucket, amount))
        for name, text in _COUNTERS.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} counter"]
            lines += [f"{name}{_labels(q, a)} {_number(amount)}" for q, a, _bucket, amount in sums[name]]
        for name, (state, text) in _GAUGES.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
            lines += [f"{name}{_labels(q, a)} {count}" for q, a, count in engine.count_actors(state)]
        lines += [f"# HELP {_DURATION} Time of a run.", f"# TYPE {_DURATION} histogram"]
        buckets = {(q, a, bound): amount for q, a, bound, amount in sums[f"{_DURATION}_bucket"]}
        for queue, actor_name, _bucket, amount in sums[f"{_DURATION}_sum"]:
            total = 0.0
            for bound in _BUCKETS_MS:
                total += buckets.get((queue, actor_name, bound), 0)
                le = "+Inf" if bound == math.inf else f"{bound:g}"
                lines.append(f"{_DURATION}_bucket{_labels(queue, actor_name, le=le)} {_number(total)}")
            lines.append(f"{_DURATION}_count{_labels(queue, actor_name)} {_number(total)}")
            lines.append(f"{_DURATION}_sum{_labels(queue, actor_name)} {amount:.3f}")
        return "\n".join(lines) + "\n"

    def _serve(self, broker: Broker, stop: threading.Event) -> None:
        """Flush once a second; answer requests as soon as the port is free."""
        import socket
        from http.server import ThreadingHTTPServer

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in self.http_host else socket.AF_INET
            allow_reuse_address = not _WINDOWS  # Where it lets several processes have one port.

        handler = _metrics_handler(lambda: self.render(broker))
        server: ThreadingHTTPServer | None = None
        has_failed = is_in_trouble = False
        while True:
            if server is None:
                try:
                    server = self._server = Server((self.http_host, self.http_port), handler)
                except (OSError, UnicodeError) as error:  # As a rule, another process of ours answers.
                    if not has_failed:
                        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
                        self.logger.log(
                            logging.INFO if is_taken else logging.ERROR,
                            "http://%s:%d can't be served here, which is tried again each second: %s.",
                            self.http_host, self.http_port, error,
                        )  # fmt: skip
                    has_failed = True
                else:
                    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            is_over = stop.wait(_METRICS_TICK_S)
            try:
                self.flush(broker)
                is_in_trouble = False
            except BrokerError as error:
                if not is_in_trouble:
                    self.logger.warning("The metrics are kept for later: %s", error)
                is_in_trouble = True
            if is_over:
                break
        if server is not None:
            server.shutdown()
            self._server = None  # First: another thread of ours may have the port next.
            server.server_close()


def _labels(queue: str, actor_name: str, **more: str) -> str:
    labels = {"queue_name": queue, "actor_name": actor_name, **more}
    shown = [f'{name}="{value.translate(_LABEL_ESCAPES)}"' for name, value in labels.items()]
    return "{" + ",".join(shown) + "}"


#: What Prometheus's text format escapes in the value of a label.
_LABEL_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def _number(amount: float) -> str:
    """A number in full: no count is rounded."""
    return repr(int(amount) if amount == int(amount) else amount)


def _metrics_handler(render: Callable[[], str]) -> Any:
    """The class that answers requests; made late, since http.server takes long to import."""
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # Seconds: who says nothing for so long holds a thread and a descriptor no longer.

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # Who asked has gone.
                super().handle()

        def do_GET(self) -> None:  # noqa: N802  (http.server's name)
            try:
                body, status = render().encode(), 200
            except BrokerError as error:
                body, status = f"{error}\n".encode(), 503
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: Any) -> None:
            """Not every scrape is worth a line."""

    return Handler


# ------------------------------------------------------------------------------------------
# Stored messages
#
# Between rows of the engine and messages.
# ------------------------------------------------------------------------------------------
#: Bytes that a retry may add to a message of max_message_size, or a callback that carries it.
_SIZE_SLACK = 1 << 19


class _StandIn(Message[Any]):
    """A message in place of bytes that are none."""

    is_damaged = True


def _stand_in(queue: str, actor: str, message_id: str, time_ms: int, reason: str) -> _StandIn:
    return _StandIn(queue, actor, (), {}, {"traceback": reason}, message_id, time_ms)


def _targets(pairs: Iterable[tuple[str, str]]) -> str:
    """The JSON of (queue, actor) pairs that _CLAIM wants."""
    return "{" + ",".join(f"{json.dumps(q)}:{json.dumps(a)}" for q, a in pairs) + "}"


def _bury(row: _Row, body: bytes, reason: str, clock: Clock) -> tuple[str, tuple[Any, ...]]:
    """The statement, and its values, that make a dead letter of a row."""
    now = clock.time_ms()
    return _BURY, (row.queue, row.actor, row.message_id, now, _cut(reason, _MAX_TRACEBACK_CHARS), body)


def _bury_as_stored(
    row: _Row, message: MessageProxy | None, reason: str, error: BaseException, clock: Clock
) -> tuple[tuple[str, tuple[Any, ...]], MessageProxy]:
    """_bury() of a row as it is, and the dead letter; with a stand-in where the row holds no message."""
    if message is None:
        message = MessageProxy(_stand_in(row.queue, row.actor, row.message_id, clock.time_ms(), reason))
    message.fail()
    message.reason = reason
    message.stuff_exception(error)
    return _bury(row, row.body, reason, clock), message


def _why_undecodable(error: BaseException) -> str:
    """The reason of a dead letter that holds no message."""
    return f"It can't be decoded: {_error_text(error)}"


def _decode_row(row: _Row, max_size: int) -> Message[Any]:
    """The message of a row, as an actor is to see it: in its own queue, without an eta."""
    if not isinstance(row.body, bytes):
        raise DecodeError("The stored body is not bytes.", row.body, TypeError(type(row.body)))
    if len(row.body) > max_size + _SIZE_SLACK:
        error = ValueError(f"It has {len(row.body)} bytes; max_message_size is {max_size}.")
        raise DecodeError(str(error), row.body[:100], error)
    message = Message.decode(row.body)
    message.options.pop("eta", None)
    if message.queue_name.endswith((".DQ", ".XQ")):
        message = message._replace(queue_name=_q_name(message.queue_name))
    return message


# ------------------------------------------------------------------------------------------
# Consumers
#
# Two further ways to a queue, for code that does without Worker: Dramatiq's consumers, and
# the queues of its StubBroker.
# ------------------------------------------------------------------------------------------
class _EngineConsumer(Consumer):
    """A consumer of one queue, for code that does without Worker."""

    def __init__(self, broker: _EngineBroker, queue_name: str, prefetch: int, timeout: int) -> None:
        self._broker = broker
        self._queue = _q_name(queue_name)
        self._prefetch = prefetch
        self._timeout_s = timeout / 1000
        self._slot = broker._engine.take_slot(0, tracked=False)
        self._pid = os.getpid()
        self._is_closed = False
        self._claimed: dict[int, tuple[MessageProxy, _Row]] = {}  # By id() of the proxy.

    def __next__(self) -> MessageProxy | None:
        self._check_open()
        if not self._broker._engine.watch(self._claim, self._timeout_s, is_announced=False):
            return None
        return next(reversed(self._claimed.values()))[0]

    def _claim(self) -> bool:
        if len(self._claimed) >= self._prefetch or not self._broker._engine.has_ready():
            return False
        pairs = [(self._queue, name) for name in (*self._broker.actors, "")]
        rows, _version = self._broker._engine.exchange(self._slot, [], 1, _targets(pairs), True)
        for row in rows:
            try:
                proxy = MessageProxy(_decode_row(row, self._broker.max_message_size))
            except DecodeError as error:
                buried, letter = _bury_as_stored(row, None, _why_undecodable(error), error, self._broker.clock)
                self._finish(row, (buried,))
                self._broker._remember_dead(row.queue, letter)
                return False
            self._claimed[id(proxy)] = proxy, row
        return bool(rows)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionClosed(f"The consumer of queue {self._queue!r} was closed.")
        if self._pid != os.getpid():
            raise ConnectionClosed(f"The consumer of queue {self._queue!r} is the parent's; make one after the fork.")

    def _finish(self, row: _Row, effects: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
        self._check_open()
        outcome = _Outcome(row)
        outcome.effects.extend(effects)
        self._broker._engine.exchange(self._slot, [outcome])

    def ack(self, message: MessageProxy) -> None:
        if id(message) in self._claimed:
            self._finish(self._claimed[id(message)][1], ())
            del self._claimed[id(message)]  # After the write: one that failed can be tried again.

    def nack(self, message: MessageProxy) -> None:
        if id(message) in self._claimed:
            row = self._claimed[id(message)][1]
            reason = message.reason = "It was rejected by a consumer."
            self._finish(row, (_bury(row, row.body, reason, self._broker.clock),))
            del self._claimed[id(message)]
            self._broker._remember_dead(self._queue, message)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self._check_open()
        keys = [id(message) for message in messages if id(message) in self._claimed]
        self._broker._engine.hand_back(self._slot, [self._claimed[key][1] for key in keys])
        for key in keys:
            del self._claimed[key]

    def close(self) -> None:
        if self._pid != os.getpid() or self._is_closed:  # In a forked child all is the parent's.
            return
        try:
            self.requeue([proxy for proxy, _row in self._claimed.values()])
        except BaseException:
            self._slot.abandon()  # What could not be given back is a dead worker's now.
            raise
        finally:
            self._is_closed = True
        self._slot.release()


class _QueueView:
    """A queue, or its delay queue, as Dramatiq's tests see it: a queue.Queue of encoded messages."""

    def __init__(self, broker: _EngineBroker, name: str) -> None:
        self._broker = broker
        self._name = _q_name(name)
        self._is_delayed = name != self._name

    def qsize(self) -> int:
        """How many messages wait."""
        counts = self._broker._engine.counts().get(self._name, {})
        return counts.get(_DELAYED if self._is_delayed else _READY, 0)

    def empty(self) -> bool:
        """Tell whether no message waits."""
        return not self.qsize()

    def full(self) -> bool:
        """Tell that there is always room."""
        return False

    @property
    def queue(self) -> collections.deque[bytes]:
        """The messages that wait, in their order; to take them is left to get()."""
        return collections.deque(self._broker._engine.bodies_of(self._name, delayed=self._is_delayed))

    @property
    def unfinished_tasks(self) -> int:
        """How many messages wait, are delayed or run."""
        return sum(self._broker._engine.counts().get(self._name, {}).values())

    def task_done(self) -> None:
        """Do nothing: what was taken is not counted."""

    def get(self, block: bool = True, timeout: float | None = None) -> bytes:
        """Take the first message that waits; queue.Empty after `timeout` seconds."""
        import queue

        taken: list[bytes] = []

        def take() -> bool:
            if self._is_delayed or self._broker._engine.has_ready():
                taken.extend(self._broker._engine.take(self._name, delayed=self._is_delayed))
            return bool(taken)

        if not self._broker._engine.watch(take, timeout if block else 0.0, is_announced=False):
            raise queue.Empty
        return taken[0]

    def get_nowait(self) -> bytes:
        """Take the first message that waits; queue.Empty if there is none."""
        return self.get(block=False)

    def put(self, body: bytes, block: bool = True, timeout: float | None = None) -> None:
        """Put an encoded message, or anything else, into the queue, which takes it at once."""
        engine = self._broker._engine
        try:
            values = self._broker._row(Message.decode(body), body)
            values = (*values[:2], self._name, *values[3:])
        except DecodeError:
            message: Message[Any] = Message(self._name, "", (), {}, {})
            values = engine.row(message, body, 0, None, 0, self._broker.max_crashes)
        engine.insert([values])

    put_nowait = put


class _QueueViews(dict[str, _QueueView]):
    """The declared queues by name; their delay queues are found, too, though not listed."""

    def __missing__(self, name: str) -> _QueueView:
        declared = self.get(_q_name(name))
        if declared is None or name != _dq_name(name):
            raise KeyError(name)
        return _QueueView(declared._broker, name)


# ------------------------------------------------------------------------------------------
# Sending and looking
#
# What all brokers on the engine share: sending, and looking at what there is.
# While a worker runs the hooks of a message, what its thread enqueues or stores is not
# written but collected in the message's outcome, to be committed with it.
# ------------------------------------------------------------------------------------------
#: Bytes that an encoded message may have, where the broker is given no other limit.
_MAX_MESSAGE_SIZE = 1 << 20

#: Dead letters of a queue that a broker in memory remembers with their exceptions.
_MAX_BURIED = 10_000

#: Dead letters of a queue whose exceptions keep their tracebacks, with the variables of what failed.
_MOST_WITH_TRACEBACKS = 100


class _Collecting(threading.local):
    """The outcome that this thread collects into, if it does."""

    outcome: _Outcome | None = None
    before = (0, 0)  # How many effects and wakes it had before the after hooks.


class _EngineBroker(Broker):
    """What the brokers on the SQLite engine share."""

    own_actor_options = frozenset({"max_crashes", "on_crash"})

    #: The only workers are in this process: a message for an actor unknown here can't wait.
    _is_private = True

    #: Whether join() raises the failure of a dead letter, where it is not told.
    fail_fast_default = False

    _is_simulated = False

    def __init__(
        self,
        middleware: list[Middleware] | None = None,
        *,
        max_message_size: int = _MAX_MESSAGE_SIZE,
        max_crashes: int = 3,
        clock: Clock | None = None,
        random: random.Random | None = None,
    ) -> None:
        self._engine = self._make_engine()
        self._collecting = _Collecting()
        self._built_in: list[Middleware] = []  # Replaced by what the user adds of their types.
        self.max_message_size = _check_count(max_message_size, "max_message_size")
        self.max_crashes = _check_crash_limit(max_crashes, "max_crashes")
        self._buried: dict[str, list[MessageProxy]] = collections.defaultdict(list)
        self._pairs: set[tuple[str, str]] = set()  # (queue, actor) of what was sent from here.
        super().__init__(middleware)
        self.queues = _QueueViews()
        if middleware is None:
            self._built_in = [item for item in self.middleware if type(item) not in default_middleware]
        if clock is not None:
            self.clock = clock
        if random is not None:
            self.random = random

    def _make_engine(self) -> _Engine:
        return _Engine(None, "full", lambda: self.clock)

    def _default_middleware(self) -> list[Middleware]:
        first = [GroupCallbacks()]  # Its after hooks come last: they see whether the others failed.
        return [*first, *(kind() for kind in (*default_middleware, CurrentMessage, Results))]

    def _add_middleware_at(self, index: int, middleware: Middleware) -> None:
        is_last = index == len(self.middleware)
        for item in self._built_in:
            if isinstance(middleware, type(item)):  # The user's own takes its place.
                index -= self.middleware.index(item) < index
                self.middleware.remove(item)
                self._built_in.remove(item)
                break
        if isinstance(middleware, Results) and middleware._backend is None:
            middleware._backend = SQLiteResultBackend(self)
        if isinstance(middleware, GroupCallbacks) and is_last:
            index = 0  # Its after hooks come last: see _default_middleware().
        super()._add_middleware_at(index, middleware)

    def _adopt_middleware(self, middleware: Middleware, place: dict[str, Any], former: Broker) -> None:
        if isinstance(middleware, Results) and getattr(middleware._backend, "broker", None) is former:
            middleware._backend = None  # Results go where the messages are.
        super()._adopt_middleware(middleware, place, former)

    def _was_given(self, kind: type[Middleware]) -> bool:
        return super()._was_given(kind) and kind not in map(type, self._built_in)

    def declare_actor(self, actor: Actor[Any, Any]) -> None:
        super().declare_actor(actor)
        self._engine.ring_all()  # Workers that run already serve it from now on.

    def _make_queue(self, queue_name: str) -> _QueueView:
        return _QueueView(self, queue_name)

    # Sending.

    def enqueue(self, message: Message[_R], *, delay: int | timedelta | None = None) -> Message[_R]:
        """Store a message, due after `delay` milliseconds; it is stored when this returns.

        Returns it as it was stored: with a delay, a copy in the delay queue with its `eta`.
        Raises TypeError or ValueError if it can't be encoded or is too large, QueueNotFound in
        memory for a queue that no actor declared, BrokerError if it can't be stored.
        """
        message, values = self._prepare(message, delay)
        self._write_rows([values])
        if self._hooks["after_enqueue"]:
            self.emit_after("enqueue", message, delay)
        return message

    def enqueue_many(self, messages: Iterable[Message[Any]]) -> list[Message[Any]]:
        """Store messages in one transaction, all or none; return them as they were stored.

        Where a subclass has an enqueue() of its own, or a test has put one there, that is called for each instead.
        """
        if getattr(self.enqueue, "__func__", None) is not _EngineBroker.enqueue:
            return [self.enqueue(message) for message in messages]
        prepared = [self._prepare(message, None) for message in messages]
        self._write_rows([values for _message, values in prepared])
        if self._hooks["after_enqueue"]:
            for message, _values in prepared:
                self.emit_after("enqueue", message, None)
        return [message for message, _values in prepared]

    def _prepare(
        self, message: Message[Any], delay: int | timedelta | None
    ) -> tuple[Message[Any], tuple[Any, ...]]:
        """Check and encode a message; return it, as it will be stored, with its row's values."""
        if isinstance(message, MessageProxy):
            message = message._message
        if not isinstance(message, Message):
            whose = f"; this one is the package dramatiq's, not {__name__}'s" if _is_dramatiqs(message) else ""
            raise TypeError(f"{message!r} is no message; make one by actor.message(...){whose}.")
        _check_sendable(message)
        if delay is not None:
            message = self._delayed(message, delay)
        self._check_queue(message.queue_name)
        if self._hooks["before_enqueue"]:
            self.emit_before("enqueue", message, delay)
        return message, self._row(message, self._encode(message))

    def _delayed(self, message: Message[_R], delay: int | timedelta) -> Message[_R]:
        """The message as it waits for its time."""
        wait = _milliseconds(delay, f"Actor {message.actor_name!r}: delay")
        eta = self.clock.time_ms() + wait
        return message.copy(queue_name=_dq_name(message.queue_name), options={"eta": eta})

    def _check_queue(self, queue_name: str) -> None:
        if self._is_private:
            self._known_queue(queue_name)

    def _known_queue(self, queue_name: str) -> str:
        """The queue that a name means; QueueNotFound if no actor declared it."""
        name = _q_name(queue_name)
        if name not in self.queues:
            raise _hinted(QueueNotFound(queue_name), _known("Queues", self.queues))
        return name

    def _encode(self, message: Message[Any]) -> bytes:
        try:
            body = _encoder.encode(message.asdict())
        except (TypeError, ValueError) as error:
            raise _as_refusal(error, f"Message for actor {message.actor_name!r}: {error}") from None
        if not isinstance(body, bytes):
            raise TypeError(f"{_encoder!r} makes {type(body).__name__} of messages; make it return bytes.")
        if len(body) > self.max_message_size + (_SIZE_SLACK if self._collecting.outcome else 0):
            raise ValueError(
                f"Message for actor {message.actor_name!r} has {len(body)} bytes; max_message_size is "
                f"{self.max_message_size}. Send a path or a key instead, or give the broker a larger limit."
            )
        return body

    def _row(self, message: Message[Any], body: bytes) -> tuple[Any, ...]:
        """The row of a message; its own options go before its actor's."""
        if not isinstance(message.message_id, str):
            raise TypeError(
                f"Message for actor {message.actor_name!r}: message_id is {message.message_id!r}; give a str."
            )
        options = message.options
        actor = self.actors.get(message.actor_name)
        defaults = {} if actor is None else actor.options
        priority = options.get("priority")
        if priority is None:
            priority = 0 if actor is None else actor.priority
        else:
            _check_priority(priority, f"Message for actor {message.actor_name!r}: priority")
        crash_limit = options.get("max_crashes")
        if crash_limit is None:
            crash_limit = defaults.get("max_crashes") or self.max_crashes
        else:
            _check_crash_limit(crash_limit, f"Message for actor {message.actor_name!r}: max_crashes")
        if "fail" in (options.get("on_crash"), defaults.get("on_crash")):
            crash_limit = 1
        crashes = 0
        outcome = self._collecting.outcome
        if outcome is not None and outcome.row.message_id == message.message_id:
            crashes = outcome.row.crashes  # A retry: it stays the same message.
        eta = self._eta(options)
        row = self._engine.row(message, body, priority, eta, crashes, crash_limit)
        if type(_encoder) is not JSONEncoder:  # That has refused what SQLite can't take.
            _check_storable(row)
        if actor is None and self._is_private:
            return (*row[:3], "", *row[4:])  # Any worker may have it, to bury it.
        if actor is None or actor.queue_name != row[2]:
            self._pairs.add((row[2], message.actor_name))
        return row

    def _eta(self, options: dict[str, Any]) -> int | None:
        """When a message is due, milliseconds since 1970; None for at once."""
        eta = options.get("eta")
        if eta is None:
            return None
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta < _FOREVER:
            self.logger.warning("Invalid eta value for message: %r; it is due at once.", eta)
            return None
        return int(eta)

    def _write_rows(self, rows: list[tuple[Any, ...]]) -> None:
        outcome = self._collecting.outcome
        if outcome is None:
            self._engine.insert(rows)
            return
        for row in rows:
            outcome.effects.append((_INSERT, row))
            outcome.wakes.append((0 if row[5] is None else row[5], self._engine.bit(row[2], row[3])))

    def _write_after_group(self, message: Message[Any], uuid: str, condition: str) -> None:
        """Store a message if a group fulfils an SQL condition by then."""
        delay = _delay_after_group(message)
        if delay is not None:
            message = self._delayed(message, delay)
        row = self._row(message, self._encode(message))
        self._write(_INSERT_AFTER_GROUP.format(condition), (*row, uuid))
        outcome = self._collecting.outcome
        if outcome is not None:
            outcome.wakes.append((row[5] or 0, self._engine.bit(row[2], row[3])))
        else:
            self._engine.wake(row[5] or 0, row[2], row[3])

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        """Run one statement: now, or with the outcome of the message being processed.

        Raises TypeError or ValueError for values that SQLite can't take.
        """
        _check_storable(values)
        if self._collecting.outcome is None:
            self._engine.store(statement, values)
        else:
            self._collecting.outcome.effects.append((statement, values))

    def _send_collected(self, outcome: _Outcome) -> None:
        """Store what hooks before an actor have sent: it must not wait for the actor, nor be lost with it.

        While the database is in trouble it does: then it is written with the outcome.
        """
        with contextlib.suppress(BrokerError):
            for effect in [effect for effect in outcome.effects if effect[0] == _CREATE_GROUP]:
                self._engine.store(*effect)
                outcome.effects.remove(effect)
            rows = [values for statement, values in outcome.effects if statement == _INSERT]
            if rows:
                self._engine.insert(rows)
                outcome.effects[:] = [effect for effect in outcome.effects if effect[0] != _INSERT]
                outcome.wakes.clear()

    def _forget_collected(self) -> None:
        """Drop what was collected of a success that is none after all."""
        outcome = self._collecting.outcome
        if outcome is not None:
            effects, wakes = self._collecting.before  # What hooks before the actor sent stays.
            del outcome.effects[effects:], outcome.wakes[wakes:]

    # Looking and emptying.

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30_000) -> Consumer:
        self._check_queue(queue_name)
        return _EngineConsumer(self, queue_name, prefetch, timeout)

    def join(
        self, queue_name: str, *, timeout: int | timedelta | None = None, fail_fast: bool | None = None
    ) -> None:
        """Wait until a queue holds nothing that waits, is delayed or runs.

        With `fail_fast` (the default of a StubBroker) then raises what the queue's first dead
        letter died of: the exception itself in memory, a ResultFailure on a file.  Raises
        QueueJoinTimeout after `timeout` milliseconds, QueueNotFound for a queue that no actor
        declared.
        """
        queue_name = self._known_queue(queue_name)
        timeout_ms = _timeout_ms(timeout)
        seconds = None if timeout_ms is None else timeout_ms / 1000
        if not self._engine.watch(lambda: not self._engine.is_busy(queue_name), seconds):
            counts = self._engine.counts().get(queue_name, {})
            raise QueueJoinTimeout(
                f"Queue {queue_name!r} is not done after {timeout_ms} ms: {counts.get(_READY, 0)} wait, "
                f"{counts.get(_DELAYED, 0)} are delayed, {counts.get(_CLAIMED, 0)} run."
                f"{'' if self._engine.has_worker() else ' No worker is running.'}"
            )
        if self.fail_fast_default if fail_fast is None else fail_fast:
            for letter in self.dead_letters_by_queue.get(queue_name, [])[:1]:
                if letter._exception is not None:
                    raise letter._exception
                raise ResultFailure(f"{letter} failed: {letter.reason}")

    def pending(self) -> list[Message[Any]]:
        """The messages that wait or run, in their order, then those that are delayed.

        Raises DecodeError if one of them can't be read.
        """
        return [Message.decode(body) for body, _stored_ms in self._engine.bodies()]

    def assert_sent(
        self,
        actor: Any,
        *,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        delay: int | timedelta | None = None,
        times: int | None = None,
        **options: Any,
    ) -> list[Message[Any]]:
        """Check, in a test, that a message like this was sent and not run yet; return them.

        `actor` is an actor or its name; `args`, `kwargs`, `delay` (milliseconds, to the second)
        and the options that are given must be those of the message; `times` is how many of them
        there must be, one or more if it is not given.  Raises AssertionError with what there is.
        """
        __tracebackhide__ = True  # For pytest: the caller's line is what counts.
        name = getattr(actor, "actor_name", actor)
        wait = None if delay is None else _milliseconds(delay, "delay")
        pending = [(Message.decode(body), stored_ms) for body, stored_ms in self._engine.bodies()]
        wanted = {
            "args": None if args is None else tuple(_as_stored(list(args))),
            "kwargs": None if kwargs is None else _as_stored(dict(kwargs)),
        }
        options = _as_stored(_check_options(options, name))
        found = [
            message
            for message, stored_ms in pending
            if message.actor_name == name
            and all(v is None or getattr(message, field) == v for field, v in wanted.items())
            and (wait is None or _was_delayed(message, stored_ms, wait))
            and options.items() <= message.options.items()
        ]
        if bool(found) if times is None else len(found) == times:
            return found
        asked = {**{k: v for k, v in wanted.items() if v is not None}, **options}
        if wait is not None:
            asked["delay"] = wait
        like = "".join(f", {k}={v!r}" for k, v in asked.items())
        there = "".join(f"\n    {message} {message.options}" for message, _stored_ms in pending[:20])
        raise AssertionError(
            f"There should be {'a message' if times in (None, 1) else f'{times} messages'} pending like {name!r}{like}; "
            f"{len(found)} of {len(pending)} are:{there or ' none is pending.'}"
        )

    def flush(self, queue_name: str) -> None:
        """Drop what waits or is delayed in a queue, and its dead letters; not what runs."""
        queue_name = self._known_queue(queue_name)
        self._engine.flush(queue_name)
        self._buried.pop(queue_name, None)

    def flush_all(self) -> None:
        """Drop what waits or is delayed in all queues, and all dead letters; not what runs."""
        self._engine.flush(None)
        self._buried.clear()

    def _remember_dead(self, queue: str, letter: MessageProxy) -> None:
        """In memory, keep the latest dead letters with their exceptions, for join() and tests."""
        if self._is_private:
            letters = self._buried[queue]
            letters.append(letter)
            del letters[:-_MAX_BURIED]
            if len(letters) > _MOST_WITH_TRACEBACKS:  # Not the first one's, which join() raises.
                _drop_tracebacks(letters[-_MOST_WITH_TRACEBACKS]._exception)
        else:
            letter.clear_exception()

    @property
    def dead_letters_by_queue(self) -> dict[str, list[MessageProxy]]:
        """The dead letters of each queue, oldest first, as they were last processed."""
        letters: dict[str, list[MessageProxy]] = collections.defaultdict(list)
        for queue, actor, message_id, died_at, reason, body in self._engine.dead_letters():
            try:
                message = Message.decode(body)
            except DecodeError:
                message = _stand_in(queue, actor, message_id, died_at, reason)
            letters[queue].append(MessageProxy(message))
            letters[queue][-1].reason = reason
        return letters

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        self._engine.close()


def _drop_tracebacks(exception: BaseException | None) -> None:
    """Drop an exception's tracebacks, and with them variables: files, connections, data."""
    pending, seen = [exception], set()
    while pending:
        error = pending.pop()
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            error.__traceback__ = None
            inner = getattr(error, "exceptions", ())  # Of a group; others may have anything there.
            pending += [error.__cause__, error.__context__, *(inner if isinstance(inner, (list, tuple)) else ())]


def _as_stored(value: Any) -> Any:
    """What an argument or option comes back as."""
    return _encoder.decode(_encoder.encode(value))


def _was_delayed(message: Message[Any], stored_ms: int, wait: int) -> bool:
    """Tell whether a message was sent with this delay in milliseconds, to the second.

    It may have been made long before it was stored, as a pipeline's step is, or be due by now.
    """
    eta = message.options.get("eta")
    return eta is not None and (
        0 <= eta - message.message_timestamp - wait < 1000 or -1000 < eta - stored_ms - wait <= 0
    )


# ------------------------------------------------------------------------------------------
# Brokers
#
# One engine in two places: SQLiteBroker keeps it in a file, MemoryBroker in memory;
# StubBroker is a MemoryBroker with exactly Dramatiq's default middleware.
# ------------------------------------------------------------------------------------------
class SQLiteBroker(_EngineBroker):
    """A broker in one SQLite file, which may be an application's own database.

    The file is opened at first use.  `durability` is "full" (a message survives a power cut
    once send() has returned; a worker may start it while its sender still waits for the disk) or
    "normal" (it survives the death of any process; a power cut may take the last moments).  A
    message is refused over `max_message_size` bytes, and becomes a dead letter when `max_crashes`
    worker processes have died while running it.  `clock` and `random` are the engine's sources
    of time and jitter.
    """

    _is_private = False

    def __init__(
        self,
        path: str | os.PathLike[str] = "dramalite.db",
        *,
        middleware: list[Middleware] | None = None,
        durability: Literal["full", "normal"] = "full",
        max_message_size: int = _MAX_MESSAGE_SIZE,
        max_crashes: int = 3,
        clock: Clock | None = None,
        random: random.Random | None = None,
    ) -> None:
        path = os.fsdecode(path)
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            raise ValueError(f"The path {path!r} names no file: {error}.") from None
        if not path or "\0" in path:
            raise ValueError(f"The path {path!r} names no file; give that of the database.")
        if path == ":memory:":
            raise ValueError("':memory:' is no file; use MemoryBroker().")
        if "://" in path:
            raise ValueError(f"{path!r} is a URL; give the path of a file.")
        if durability not in ("full", "normal"):
            raise ValueError(f'durability is {durability!r}; give "full" or "normal".')
        has_parents = os.pardir in path.split(os.sep)  # SQLite follows links first, abspath() does not.
        self.path = os.path.join(os.getcwd(), path) if has_parents else os.path.abspath(path)
        self._durability = durability
        super().__init__(
            middleware,
            max_message_size=max_message_size,
            max_crashes=max_crashes,
            clock=clock,
            random=random,
        )

    def _make_engine(self) -> _Engine:
        return _Engine(self.path, self._durability, lambda: self.clock)

    def __repr__(self) -> str:
        return f"SQLiteBroker({self.path!r})"


class MemoryBroker(_EngineBroker):
    """A broker in memory, for this process alone: the same engine, gone with the process."""

    @property
    def dead_letters_by_queue(self) -> dict[str, list[MessageProxy]]:
        """The dead letters of each queue, oldest first, with the exceptions that they died of."""
        return self._buried


class StubBroker(MemoryBroker):
    """A MemoryBroker with exactly Dramatiq's default middleware, whose join() raises failures."""

    def __init__(
        self,
        middleware: list[Middleware] | None = None,
        *,
        fail_fast_default: bool = True,
        max_message_size: int = _MAX_MESSAGE_SIZE,
        max_crashes: int = 3,
        clock: Clock | None = None,
        random: random.Random | None = None,
    ) -> None:
        super().__init__(
            middleware,
            max_message_size=max_message_size,
            max_crashes=max_crashes,
            clock=clock,
            random=random,
        )
        self.fail_fast_default = fail_fast_default

    def _default_middleware(self) -> list[Middleware]:
        return [kind() for kind in default_middleware]

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 100) -> Consumer:
        return super().consume(queue_name, prefetch, timeout)


# ------------------------------------------------------------------------------------------
# Message processing
#
# One message, from its claimed row to its outcome, in two steps: run() calls the actor,
# conclude() the after_* hooks.  Both collect; neither writes, waits or knows of threads, so
# that workers and simulations share them.
# ------------------------------------------------------------------------------------------
class _Job:
    """A claimed message on its way through a worker."""

    __slots__ = (
        "context", "exception", "has_begun", "has_ended", "is_concluding", "is_given_up", "key", "message",
        "outcome", "plan", "result", "row", "runner",
    )  # fmt: skip

    def __init__(self, row: _Row) -> None:
        self.row = row
        self.key = 0  # Among the running ones: its thread's index, or beyond those a coroutine's.
        self.runner = 0  # What it is to the middleware if it is to run as a coroutine,
        self.context: contextvars.Context | None = None  # and where it does, once begun.
        self.has_begun = False  # Its actor may have been called.
        self.has_ended = False  # Its coroutine has.
        self.is_concluding = False  # Its thread is past the actor.
        self.is_given_up = False  # Its thread's outcome no longer counts.
        self.outcome = _Outcome(row)
        self.message: MessageProxy | None = None  # None where the row can't be decoded.
        self.plan: _Plan | None = None  # Where the message has no options of its own.
        self.result: Any = None
        self.exception: BaseException | None = None

    def may_not_run_again(self) -> bool:
        """Tell whether it has begun and its actor, or the message itself, has on_crash="fail"."""
        message = self.message
        if message is None or not self.has_begun:
            return False
        return "fail" in (message.options.get("on_crash"), message.actor_options.get("on_crash"))


class _Plan:
    """The process hooks to call for an actor's plain messages: see Middleware.concerns()."""

    __slots__ = ("after", "before", "hooks", "is_kept", "options")

    def __init__(self, broker: Broker, options: dict[str, Any]) -> None:
        self.hooks = broker._hooks  # All, and those the plan was made of.
        self.options = dict(options)
        self.before, self.after = (
            broker._hooks_for(name, options)
            if all(hook.__module__ == __name__ for hook in self.hooks[name])
            else self.hooks[name]  # Foreign ones may set options.
            for name in ("before_process_message", "after_process_message")
        )
        #: Somebody keeps what the actor returns.
        self.is_kept = any(
            isinstance(item, (Results, Callbacks)) and item.concerns(options)
            for item in broker.middleware
        )


class _Processor:
    """Processes the messages of one broker."""

    def __init__(self, broker: _EngineBroker, logger: logging.Logger) -> None:
        self._broker = broker
        self._logger = logger
        self._plans: dict[str, _Plan] = {}  # By actor.

    def _plan(self, actor: Actor[Any, Any]) -> _Plan:
        """The process hooks that a plain message of this actor concerns."""
        plan = self._plans.get(actor.actor_name)
        if plan is None or plan.hooks is not self._broker._hooks or plan.options != actor.options:
            plan = self._plans[actor.actor_name] = _Plan(self._broker, actor.options)
        return plan

    def run(self, job: _Job) -> None:
        """Decode the message, call the before hooks and the actor; keep what comes of it."""
        call = self.begin(job)
        if call is None:
            return
        try:
            job.result = _call_interruptibly(*call)
        except BaseException as error:  # The actor is foreign code; sys.exit() is its failure too.
            job.exception = error

    def begin(self, job: _Job) -> tuple[Actor[Any, Any], tuple[Any, ...], dict[str, Any]] | None:
        """Decode the message and call the before hooks; return what to call, and with what, if anything."""
        broker = self._broker
        try:
            message = job.message = MessageProxy(_decode_row(job.row, broker.max_message_size))
        except DecodeError as error:
            job.exception = error
            return None
        try:
            actor = broker.get_actor(message.actor_name)
            message.actor_options = actor.options
            plan = self._plan(actor)
            if not message.options:
                job.plan = plan
            before = plan.hooks["before_process_message"] if message.options else plan.before
            if before:
                broker._collecting.outcome = job.outcome
                try:
                    broker._call_hooks("before_process_message", before, message)
                finally:
                    broker._collecting.outcome = None
        except ActorNotFound as error:
            message.fail()
            job.exception = error
        except BaseException as error:  # Hooks are foreign code as well.
            job.exception = error
        else:
            if actor.logger.isEnabledFor(logging.DEBUG):
                self._logger.debug("Received message %s with id %r.", message, message.message_id)
            if job.outcome.effects and not message.failed:
                broker._send_collected(job.outcome)
            job.has_begun = True  # First: who gives it up does so before he asks.
            if not message.failed and not job.is_given_up:
                args = message.args
                if args and type(args[0]) is dict and _is_message_data(args[0]):
                    args = (MessageData(args[0]), *args[1:])  # A callback's, with attributes.
                return actor, args, message.kwargs
        return None

    def crash(self, row: _Row, death: str) -> _Outcome:
        """The outcome of a message whose workers died as often as it allows, last by `death`."""
        times = "once" if row.crashes == 1 else f"{row.crashes} times"
        return self.fail(
            row,
            f"The worker process died {times} while running this message"
            f"{f', last with {death}' if death else ''}; it is not run again.",
        )

    def fail(self, row: _Row, reason: str) -> _Outcome:
        """The outcome of a message that was run for the last time and has no outcome of its own."""
        job = _Job(row)
        try:
            job.message = MessageProxy(_decode_row(row, self._broker.max_message_size))
            job.message.fail()
            actor = self._broker.actors.get(row.actor)
            if actor is not None:
                job.message.actor_options = actor.options
        except DecodeError as error:
            job.exception = error
        else:
            job.exception = WorkerCrashed(reason)
        return self.conclude_safely(job)

    def conclude(self, job: _Job) -> _Outcome:
        """Call the after hooks; return all that is to be committed for the message."""
        broker, outcome = self._broker, job.outcome
        broker._collecting.outcome = outcome
        broker._collecting.before = len(outcome.effects), len(outcome.wakes)
        try:
            if job.message is None:
                self._bury_undecodable(job, cast(BaseException, job.exception))
            else:
                self._process_result(job, job.message)
                self._acknowledge(job, job.message)
        finally:
            broker._collecting.outcome = None
        job.exception = None
        return outcome

    def conclude_safely(self, job: _Job, foreign: tuple[type[BaseException], ...] = ()) -> _Outcome:
        """conclude(), but a hook that raises no Exception costs the message, not the caller.

        What is `foreign` is none of the hook's own: it comes through.
        """
        try:
            self.conclude(job)
        except foreign:
            raise
        except BaseException:
            self.leave(_runner.id())
            self.drop(job)
            self._logger.critical("A hook failed on message %s.", job.row.message_id, exc_info=True)
        return job.outcome

    def leave(self, runner: int) -> None:
        """Tell those that watch what runs that it does not any more, where no after hook tells them."""
        for item in self._broker.middleware:
            if isinstance(item, (TimeLimit, ShutdownNotifications, CurrentMessage, Prometheus)):
                item.leave(runner or threading.get_ident())

    def drop(self, job: _Job) -> None:
        """Make a dead letter of a job that could not be processed."""
        reason = "A hook or the worker itself failed on it; see the log."
        job.outcome = _Outcome(job.row)
        self._bury_as_stored(job, reason, RuntimeError(reason))
        broker = self._broker
        broker._collecting.outcome = job.outcome
        try:
            groups = [item.after_nack for item in broker.middleware if isinstance(item, GroupCallbacks)]
            broker._call_hooks("after_nack", groups, job.message)  # Its group ends all the same.
        finally:
            broker._collecting.outcome = None

    def _bury_undecodable(self, job: _Job, error: BaseException) -> None:
        self._logger.error(
            "Message %s can't be decoded; it becomes a dead letter: %s", job.row.message_id, error
        )
        self._bury_as_stored(job, _why_undecodable(error), error)

    def _bury_as_stored(self, job: _Job, reason: str, error: BaseException) -> None:
        """Make a dead letter of a job's row as it is; with a stand-in where that holds no message."""
        buried, job.message = _bury_as_stored(job.row, job.message, reason, error, self._broker.clock)
        job.outcome.effects.append(buried)
        job.outcome.after_commit = functools.partial(self._broker._remember_dead, job.row.queue, job.message)

    def _acknowledge(self, job: _Job, message: MessageProxy) -> None:
        """Call the ack hooks, or for a failed message the nack hooks and make it a dead letter."""
        broker = self._broker
        if message.failed:
            broker.emit_before("nack", message)
            job.outcome.effects.append(self._dead_letter(job, message))
            broker.emit_after("nack", message)
            return
        if broker._hooks["before_ack"]:
            broker.emit_before("ack", message)
        if broker._hooks["after_ack"]:
            broker.emit_after("ack", message)
        message.clear_exception()

    def _process_result(self, job: _Job, message: MessageProxy) -> None:
        """Log what came of the message and tell the middleware."""
        broker, exception = self._broker, job.exception
        if exception is None:
            plan = job.plan if not message.options else None
            if job.result is not None and not (plan is not None and plan.is_kept):
                self._check_use(message)
            hooks = broker._hooks["after_process_message"] if plan is None else plan.after
            broker._call_hooks("after_process_message", reversed(hooks), message, result=job.result)
            return
        message.stuff_exception(exception)
        if isinstance(exception, SkipMessage):
            self._logger.warning(
                "Message %s of %s was skipped: %s", message.message_id, message.actor_name, exception
            )
            if not message.failed:
                message.clear_exception()
            broker.emit_after("skip_message", message)
        elif isinstance(exception, ActorNotFound) and message.failed:
            self._logger.error(
                "Message %s is for the unknown actor %r; it becomes a dead letter.",
                message.message_id, message.actor_name, exc_info=exception,
            )  # fmt: skip
        else:
            self._log_failure(message, exception)
            broker.emit_after("process_message", message, exception=exception)

    def _check_use(self, message: MessageProxy) -> None:
        if _hands_result_on(message):
            return
        results = [item for item in self._broker.middleware if isinstance(item, Results)]
        for item in results:
            item.warn_of_loss(self._broker, message)
        if not results:
            self._logger.warning(
                "Actor %r returned a value that is not None. Consider adding the Results middleware "
                "to your broker, or it is lost.",
                message.actor_name,
            )

    def _log_failure(self, message: MessageProxy, exception: BaseException) -> None:
        throws = _truthy_option(message, "throws")
        text = _error_text(exception)
        if isinstance(exception, RateLimitExceeded):
            self._logger.debug("Rate limit exceeded in message %s: %s.", message, text)
        elif throws and isinstance(exception, throws):
            name = f"{message.message_id} of {message.actor_name}"  # Arguments may be secret, and long.
            self._logger.info("Failed to process message %s with expected exception %s.", name, text)
        elif not isinstance(exception, Retry) and self._logger.isEnabledFor(logging.ERROR):
            record = self._logger.makeRecord(
                self._logger.name, logging.ERROR, __file__, sys._getframe().f_lineno,
                "Failed to process message %s of %s with unhandled exception:",
                (message.message_id, message.actor_name),
                (type(exception), exception, exception.__traceback__), "_log_failure",
            )  # fmt: skip
            # In place of what a formatter makes of it: indented, so that no line of it can pass for a
            # line of the log, and bounded.
            record.exc_text = f"    {_traceback_text(exception)}".replace("\n", "\n    ")
            self._logger.handle(record)

    def _dead_letter(self, job: _Job, message: MessageProxy) -> tuple[str, tuple[Any, ...]]:
        """Bury the message as it is now, with its last traceback; or its bytes as they were."""
        broker, row = self._broker, job.row
        exception = job.exception if message._exception is None else message._exception
        reason = "It was marked as failed."
        if exception is not None:
            text = _error_text(exception)
            if not text and isinstance(exception, Interrupt):
                text = type(exception).__doc__ or ""
            reason = f"{type(exception).__name__}: {text}"
        try:
            body = message._message.encode()
        except (TypeError, ValueError):
            body = row.body
        message.reason = reason
        job.outcome.after_commit = functools.partial(broker._remember_dead, row.queue, message)
        return _bury(row, body, reason, broker.clock)


# ------------------------------------------------------------------------------------------
# Targets
#
# Which messages a worker claims: those for actors and in queues that it knows.
# ------------------------------------------------------------------------------------------
def _needs_no_thread(actor: Actor[Any, Any] | None) -> bool:
    """Tell whether a worker runs an actor as a coroutine."""
    if actor is None or getattr(actor, "coroutine_fn", None) is None:
        return False
    return type(actor).__call__ is Actor.__call__ and actor.fn is actor._made_fn


class _Targets:
    """The (queue, actor) pairs that a worker claims for."""

    def __init__(self, broker: _EngineBroker, queues: frozenset[str]) -> None:
        self.has_async = False  # Whether actors among them run as coroutines.
        self._json = "{}"  # As _CLAIM wants them,
        self._json_without_async = "{}"  # and those for actors that need a thread.
        self._broker = broker
        self._queues = queues
        self._logger = get_logger("dramalite.worker", "Worker")
        self._declared: tuple[int, ...] = ()  # How much was declared when they were worked out.
        self._seen = (0, (0, 0, 0))  # The database's version and what was declared, at the last look.
        self._told: set[str] = set()  # Unknown actors that were logged,
        self._told_queues: set[str] = set()  # and queues.

    def are_coroutines(self, row: _Row) -> bool:
        """Tell whether the messages like this one run as coroutines."""
        return self.has_async and _needs_no_thread(self._broker.actors.get(row.actor))

    def json(self, with_async: bool) -> str:
        """The pairs as _CLAIM wants them, with those of coroutines or without."""
        return self._json if with_async else self._json_without_async

    def refresh(self, slot: _Slot, *, anew: bool = False) -> None:
        """Work them out again if anything was declared since, or in any case, and tell the slot."""
        broker = self._broker
        declared = self._count_declared()
        if declared == self._declared and not anew:
            return
        self._declared = declared
        pairs = {(actor.queue_name, name) for name, actor in list(broker.actors.items())}
        pairs |= {
            (queue, name)
            for queue, name in list(broker._pairs)
            if name in broker.actors and queue in broker.queues
        }
        pairs |= {(queue, "") for queue in list(broker.queues)}
        if self._queues:
            pairs = {pair for pair in pairs if pair[0] in self._queues}
        self._json = _targets(sorted(pairs))
        needing_threads = {pair for pair in pairs if not _needs_no_thread(broker.actors.get(pair[1]))}
        self._json_without_async = _targets(sorted(needing_threads))
        self.has_async = pairs != needing_threads
        bits = (broker._engine.bit(queue, name) for queue, name in pairs)
        slot.serve(functools.reduce(int.__or__, bits, 0))

    def look_for_strangers(self) -> bool:
        """Find ready messages outside of our targets: known actors in other queues, unknown ones.

        Tells whether there are more targets now.
        """
        broker = self._broker
        seen = (broker._engine.data_version(), self._count_declared())
        if seen == self._seen:
            return False
        pairs = broker._engine.ready_pairs()
        self._seen = seen
        for queue, name in pairs:
            if self._queues and queue not in self._queues:
                continue
            if queue not in broker.queues:
                if queue not in self._told_queues:
                    self._told_queues.add(queue)
                    self._logger.info("Queue %r holds messages, and no actor here declares it.", queue)
                continue
            if name in broker.actors:
                broker._pairs.add((queue, name))
            elif name and name not in self._told:
                self._told.add(name)
                self._logger.error(
                    "Queue %r holds messages for actor %r, which this worker does not know; they "
                    "are left for one that does.",
                    queue, name,
                )  # fmt: skip
        return self._count_declared() != self._declared

    def _count_declared(self) -> tuple[int, int, int]:
        broker = self._broker
        return len(broker.actors), len(broker.queues), len(broker._pairs)


# ------------------------------------------------------------------------------------------
# Batches
#
# How many messages a worker claims at once: what its threads took up in 5 ms of late, or one
# for each free thread where that is more.  Urgent new work waits no longer than that behind a
# batch; what turns out to take much longer is handed back.
# Where many jobs are short and keep the interpreter busy, one thread alone does them in less time
# than several that take turns at its lock (measured: 57 us a no-op, and 73 by eight threads).
# Whether they wait for something after all shows when it is alone.
# ------------------------------------------------------------------------------------------
_BATCH_S = 0.005  # In which a batch should be taken up.
_SHORT_S = 0.0002  # A short job.
_BUSY_SHARES = {False: 0.9, True: 0.7}  # Of the time, on a processor: of several threads, of one.
_SEVERAL_S = 0.5  # For how long several threads work once one was seen to wait.
_HELP_S = 0.001  # Work that makes it worth waking another thread.
_STALE_S = 0.02  # After which what is left of one is handed back.
_MAX_BATCH = 128
_GATHER_S = 0.001  # From one claim to the next where messages come one by one, each a ring else,
_CLAIMS_WITHOUT_PAUSE = 64  # and claims until the next try where that brings no two together.


class _Batch:
    """The messages that a worker claimed last."""

    def __init__(self) -> None:
        self.pace_s = 0.01  # What the threads take for a message of late; cautious at first.
        self.is_for_one = False  # One thread alone is fastest.
        self.rows: list[_Row] = []  # A heap: those not started.
        self._size = 0
        self._begun_at = 0.0
        self._cpu_begun_at = 0.0
        self._is_for_several_until = 0.0

    def begin(self, rows: list[_Row], limit: int) -> None:
        """Take rows in, sorted ones, where there are none; up to `limit` were asked for."""
        self.rows += rows
        self._size = len(rows)
        self.is_for_one = self.is_for_one and len(rows) == limit
        self._begun_at = _SYSTEM_CLOCK.monotonic()
        self._cpu_begun_at = _SYSTEM_CLOCK.process_time()

    def end(self) -> None:
        """Note, with no rows left, at which pace they were taken up."""
        if self._size:
            now = _SYSTEM_CLOCK.monotonic()
            taken_s = now - self._begun_at
            busy_s = _SYSTEM_CLOCK.process_time() - self._cpu_begun_at
            self.pace_s = (self.pace_s + taken_s / self._size) / 2
            is_fit = self.pace_s < _SHORT_S and busy_s > _BUSY_SHARES[self.is_for_one] * taken_s
            if self.is_for_one and not is_fit:
                self._is_for_several_until = now + _SEVERAL_S
            self.is_for_one = is_fit and now >= self._is_for_several_until
        self._size = 0

    def skip_rest(self) -> None:
        """Note nothing of rows that are not taken up after all."""
        self._size = 0

    def wants_help(self) -> bool:
        """Tell whether another thread should come."""
        return not self.is_for_one and len(self.rows) * self.pace_s > _HELP_S

    def age_s(self, now: float) -> float:
        return now - self._begun_at

    def limit(self, free: int) -> int:
        """How many to claim next, with so many threads free."""
        return max(free, min(_MAX_BATCH, int(_BATCH_S / max(self.pace_s, 1e-6))))


class _Gathering:
    """Pauses before claims where messages come one by one, and fast, so that some come together."""

    def __init__(self) -> None:
        self._claimed_at = 0.0  # When the last claim was, if it brought all that was ready.
        self._has_paused = False
        self._claims_without = 0  # So many more without a pause, for the last one was in vain.

    def pause(self, *, is_wanted: bool) -> None:
        """Before a claim: let messages gather, where that has been of use."""
        pause_s = self._claimed_at + _GATHER_S - _SYSTEM_CLOCK.monotonic()
        self._has_paused = is_wanted and pause_s > 0 and not self._claims_without
        if self._has_paused:
            _SYSTEM_CLOCK.sleep(pause_s)
        self._claims_without = max(0, self._claims_without - 1)

    def note(self, count: int, limit: int) -> None:
        """After a claim: it brought `count` messages, of up to `limit`."""
        self._claimed_at = _SYSTEM_CLOCK.monotonic() if count < limit else 0.0
        if self._has_paused and count < 2:
            self._claims_without = _CLAIMS_WITHOUT_PAUSE


# ------------------------------------------------------------------------------------------
# Exchanges
#
# What came of messages on its way to the engine, and claims on their way back.  An exchange that
# fails loses nothing: what it was to write is written by the next.
# ------------------------------------------------------------------------------------------
_NEWS_S = 60.0  # Between two log lines on the same trouble with the database.
_RETRY_S = 0.25  # Between two tries to write what must be written before anything else.


class _Exchanger:
    """Collects a worker's outcomes, and trades them with the engine for new claims."""

    def __init__(self, broker: _EngineBroker) -> None:
        self.logger = get_logger("dramalite.worker", "Worker")
        self._engine = broker._engine
        self._slot = self._engine.take_slot(0, tracked=True)
        self._exchange_lock = threading.RLock()  # Reentrant only to know their owner.
        self._lock = threading.RLock()  # Guards all below.
        self._finished: list[_Outcome] = []
        self._finished_at = 0.0  # When the oldest of them was.
        self._traded: list[_Outcome] = []  # Those that are being written.
        self._suspects = 0  # Claimed rows that were running when a process died.
        self._trouble_at: float | None = None  # When trouble was last logged; None after success.
        self._seen_version = 0  # Of the database, before the last look for work.

    def _keep(self, outcome: _Outcome, now: float) -> None:
        if not self._finished:
            self._finished_at = now
        self._finished.append(outcome)
        if outcome.row.crashes > 0:
            self._suspects -= 1

    def _trade(self, limit: int = 0, suspects: bool = False, targets: str = "{}") -> list[_Row]:
        """One transaction with the engine; if it fails, the outcomes are kept for the next."""
        try:
            with self._lock:
                self._traded, self._finished = self._finished, []
            if not self._traded and not limit:
                return []
            rows, version = self._engine.exchange(self._slot, self._traded, limit, targets, suspects)
        except BaseException as error:
            with self._lock:
                self._finished = self._traded + self._finished
            if not isinstance(error, BrokerError):  # No memory, say.
                raise
            self.complain(error)
            return []
        finally:
            self._traded = []
        self._trouble_at = None
        if limit:
            self._seen_version = version
        return rows

    def write_at_once(self, job: _Job) -> None:
        """Write a job's outcome while the slot still tells that it runs; nothing is left of it then."""
        outcome, job.outcome = job.outcome, _Outcome(job.row)
        with self._lock:
            self._finished.append(outcome)
        self.write()
        while self._is_unwritten(outcome) and not job.is_given_up:
            _SYSTEM_CLOCK.sleep(_RETRY_S)
            self.write()

    def _is_unwritten(self, outcome: _Outcome) -> bool:
        with self._lock:
            return outcome in self._finished or outcome in self._traded

    def write(self) -> None:
        """Write what is finished, now."""
        with self._exchange_lock:
            self._trade()

    def complain(self, error: Exception) -> None:
        """Log trouble with the database or the system, not more than once a minute until it is over."""
        self._seen_version = _NO_VERSION  # Look again in any case once it is over.
        now = _SYSTEM_CLOCK.monotonic()
        if self._trouble_at is None or now > self._trouble_at + _NEWS_S:
            self._trouble_at = now
            is_clear = isinstance(error, (BrokerError, OSError))
            self.logger.error("%s The worker goes on trying.", error, exc_info=not is_clear)

    def is_busy_here(self) -> bool:
        """Tell whether this very thread holds a lock: a signal handler has come in between."""
        return self._engine.is_busy_here() or _is_held_here(self._exchange_lock) or _is_held_here(self._lock)


# ------------------------------------------------------------------------------------------
# Dispatching
#
# What the threads of one worker share: the rows it has claimed, the outcomes not yet
# written, and the waiting.  There is no thread that feeds the others: whoever finds no
# rows left runs one exchange with the engine, which writes all that has been finished and claims
# the next batch.  If there is nothing, one thread waits at the bell, the others on _cond.
# Lock order: _exchange_lock, the engine's lock, _lock.
# ------------------------------------------------------------------------------------------
_LATE_S = 0.005  # So old an outcome is written without waiting for the next claim.
_POLL_S = 0.25  # Between looks for work that no bell announced,
_SHORT_POLL_S = 0.05  # and where bells were seen not to arrive.
_IDLE_S = 2.0  # Without a job: time to tidy up.


class _Dispatcher(_Exchanger):
    """Hands claimed messages to the threads of a worker and takes their outcomes."""

    def __init__(
        self, broker: _EngineBroker, queues: frozenset[str], threads: int, coroutines: int,
        poll_s: float, on_litter: Callable[[], object],
    ) -> None:  # fmt: skip
        super().__init__(broker)
        self.is_stopping = False
        self.running: dict[int, _Job] = {}  # By key.
        self._broker = broker
        self._threads = threads
        self._coroutines = coroutines  # How many may run at once.
        self._longest_poll_s = poll_s
        self._poll_s = min(_POLL_S, poll_s)
        self._cond = threading.Condition(self._lock)  # What idle threads wait on,
        self._settled = threading.Condition(self._lock)  # and those who wait until jobs have ended.
        self._ended: collections.deque[_Job] = collections.deque()  # Coroutines to be concluded.
        self._free_keys = list(range(threads + coroutines - 1, threads - 1, -1))  # For coroutines.
        self._batch = _Batch()
        self._gathering = _Gathering()
        self._popped_at = 0.0  # When a row was last taken from the batch.
        self._idle = 0  # Threads that wait on _cond for something to do.
        self._is_waited_for = False  # One thread waits at the bell,
        self._wait_ends_ms = 0  # until then, or a ring.
        self._is_paused = False
        self._has_recovered = False  # First what dead workers held, then what is new.
        self._was_polled = False  # That look was due to no ring.
        self._targets = _Targets(broker, queues)
        self._on_litter = on_litter  # Called when there is: see look_after().
        self._targets.refresh(self._slot)

    # What a worker thread calls.

    def next_job(self, index: int, done: _Job | None) -> _Job | None:
        """Keep the outcome of the job `done`, and wait for what thread `index` is to do next.

        That is a message to run, or one whose coroutine has ended, to conclude.  None means that
        the thread is to end: the worker stops, or the job was handed back.
        """
        while True:
            with self._lock:
                now = _SYSTEM_CLOCK.monotonic()
                if done is not None:
                    if done.is_given_up and done.context is None:
                        return None
                    self._finish(done, now)
                    done = None
                if self._ended:
                    return self._ended.popleft()
                if self._batch.rows and not self.is_stopping:
                    return self._pop(index, now)
                self._slot.run(index, 0)
                if self.is_stopping and not self.coroutines():
                    return None
            if not self.exchange():
                self._wait()

    def _pop(self, index: int, now: float) -> _Job:
        """Take the best row; with more to do than this thread can soon, call another one."""
        self._popped_at = now
        row = heapq.heappop(self._batch.rows)
        job = _Job(row)
        job.key = index
        if self._free_keys and self._targets.are_coroutines(row):
            job.key, job.runner = self._free_keys.pop(), next(_coroutine_runners)
            self._slot.run(index, 0)
        self.running[job.key] = job
        self._slot.run(job.key, row.id)
        # The bell may go without a waiter where this thread is soon back.
        wants_waiter = not (self._is_waited_for or (self._batch.is_for_one and self._finished))
        if self._idle and (self._batch.wants_help() if self._batch.rows else wants_waiter):
            self._cond.notify()
        return job

    def _finish(self, job: _Job, now: float) -> None:
        """Keep a job's outcome for the next exchange.  Call with _lock held."""
        if self.running.get(job.key) is not job:
            return  # It was handed back, or its outcome is kept already.
        del self.running[job.key]
        self._keep(job.outcome, now)
        if job.runner:
            self._slot.run(job.key, 0)
            self._free_keys.append(job.key)
        if not self.running and (self._is_paused or self.is_stopping or not self._batch.rows):
            self._settled.notify_all()
            if self.is_stopping:  # Threads may wait for coroutines.
                self._cond.notify_all()

    def coroutines(self) -> int:
        """How many jobs are about to run as coroutines, do so, or have ended and are not concluded."""
        return self._coroutines - len(self._free_keys)

    def detach(self, job: _Job) -> bool:
        """Free the thread of a job that is to run as a coroutine; False if it was handed back."""
        with self._lock:
            if not job.is_given_up:
                job.context = contextvars.copy_context()
            return not job.is_given_up

    def end(self, job: _Job) -> None:
        """Have a thread conclude a job whose coroutine has ended."""
        with self._lock:
            job.has_ended = True
            self._ended.append(job)
            if self.is_stopping:
                self._settled.notify_all()
                self._cond.notify_all()
            elif self._idle:
                self._cond.notify()
                return
        self._slot.bell.ring()

    def may_conclude(self, job: _Job) -> bool:
        """Tell whether a job's outcome still counts; from now on nobody takes it away."""
        with self._lock:
            job.is_concluding = True
            return not job.is_given_up

    # Exchanges with the engine.

    def exchange(self) -> bool:
        """Write what is finished and claim a batch; tell whether there is something to run."""
        with self._exchange_lock:
            self._targets.refresh(self._slot)
            with self._lock:
                if self._batch.rows:
                    return not self._batch.is_for_one
                self._batch.end()
                may_claim = self._has_recovered and not (self._is_paused or self.is_stopping)
                limit = self._limit() if may_claim else 0
                with_async = bool(self._free_keys)  # As the limit has it: more may be free soon.
                suspects = self._suspects == 0
                brings_work = any(outcome.wakes for outcome in self._finished)
            if not limit:
                self._trade()
                return False
            self._gathering.pause(is_wanted=not brings_work)
            self._slot.sleep_until(_FOREVER)  # Said before the look: no wake-up is lost.
            rows = self._trade(limit, suspects, self._targets.json(with_async))
            self._gathering.note(len(rows), limit)
            if not rows:
                return False  # It stays said: this thread is about to wait.
            return self._take_in(rows, limit)

    def _limit(self) -> int:
        """How many messages to claim.  Call with _lock held."""
        limit = self._batch.limit(self._threads - len(self.running) + self.coroutines())
        return min(limit, len(self._free_keys) or limit) if self._targets.has_async else limit

    def _take_in(self, rows: list[_Row], limit: int) -> bool:
        """Take claimed rows in, unless the worker was stopped or paused meanwhile."""
        if self._was_polled:  # No ring told of them, so bells don't arrive here.
            self._poll_s = min(_SHORT_POLL_S, self._longest_poll_s)
            self._was_polled = False
        with self._lock:
            self._suspects += sum(row.crashes > 0 for row in rows)
            self._slot.sleep_until(self._wait_ends_ms if self._is_waited_for else 0)
            self._batch.begin(rows, limit)
            if is_unwanted := self._is_paused or self.is_stopping:
                self._give_back()
        if is_unwanted:
            self._trade()
            return False
        if len(rows) > 1:
            self._on_litter()
        if len(rows) == limit:  # There may be more than this worker takes: pass the ring on.
            self._engine.wake(0, rows[-1].queue, rows[-1].actor)
        return True

    def _give_back(self) -> None:
        """Have the next write give back what was not started.  Call with _lock held."""
        returned = [self._handed_back(row) for row in self._batch.rows]
        suspects = self._suspects - sum(outcome.row.crashes > 0 for outcome in returned)
        finished = self._finished + returned
        self._batch.skip_rest()
        # At once, for a signal handler's exception to come before or after, and nothing to be lost.
        self._finished, self._batch.rows, self._suspects = finished, [], suspects

    def _handed_back(self, row: _Row) -> _Outcome:
        """The outcome of a row that goes back to its queue, with a ring for those that may take it."""
        outcome = _Outcome(row, is_handed_back=True)
        outcome.wakes.append((0, self._engine.bit(row.queue, row.actor)))
        return outcome

    # Waiting.

    def _wait(self) -> None:
        """Wait until there may be work: one thread at the bell, the others on the condition."""
        with self._lock:
            is_for_us = self._batch.rows and not self._batch.is_for_one
            if is_for_us or self._ended or (self.is_stopping and not self.coroutines()):
                return
            if self._batch.rows or self._is_waited_for or self._is_paused:
                self._idle += 1
                self._cond.wait()
                self._idle -= 1
                return
            self._is_waited_for = True
            self._wait_ends_ms = _FOREVER
        try:
            self._wait_at_the_bell()
        except BrokerError as error:
            self.complain(error)
            _SYSTEM_CLOCK.sleep(_POLL_S)
        finally:
            with self._lock:
                self._is_waited_for = False

    def _wait_at_the_bell(self) -> None:
        """Wait for a ring, the next delayed message, or a change that no ring announced."""
        clock = self._broker.clock
        due = self._engine.next_due()
        with self._lock:
            self._wait_ends_ms = _FOREVER if due is None else due
            self._slot.sleep_until(self._wait_ends_ms)
        while not (self._ended or (self.is_stopping and not self.coroutines())):
            wait_s = self._poll_s
            if due is not None:
                wait_s = min(wait_s, (due - clock.time_ms()) / 1000)
            if wait_s > 0 and self._slot.bell.wait(wait_s):
                self._poll_s = min(_POLL_S, self._longest_poll_s)
                self._was_polled = False
                return
            if self._finished or (due is not None and due <= clock.time_ms()):
                return
            if self._engine.data_version() != self._seen_version:
                self._was_polled = True
                return

    # What the worker calls.

    def pause(self) -> None:
        """Start no more messages; returns when those that run have ended."""
        self.claim_no_more()
        with self._lock:
            self._settled.wait_for(lambda: not self.running)
        self.write()

    def claim_no_more(self) -> None:
        """Start no more messages; what was claimed and not started goes back to its queue."""
        self.forbid_claims()
        self.return_unstarted()

    def forbid_claims(self) -> None:
        """Claim no more from now on; a signal handler may call this wherever it comes in between."""
        self._is_paused = True

    def return_unstarted(self) -> None:
        """Give back what was claimed and not started, unless resume() has come meanwhile."""
        with self._lock:
            if self._is_paused:
                self._give_back()
            if not self.running:
                self._settled.notify_all()
        self.write()

    def resume(self) -> None:
        with self._lock:
            self._is_paused = self.is_stopping
            self._cond.notify_all()
        self._slot.bell.ring()

    def join(self) -> None:
        """Wait until nothing claimed is waiting, running or unwritten."""
        with self._lock:
            self._settled.wait_for(lambda: not self._batch.rows and not self.running)
        self.write()

    def stop(self) -> None:
        """Send the threads home, after claim_no_more()."""
        with self._lock:
            self.is_stopping = True
            self._slot.sleep_until(0)  # Rings are for others now.
            self._give_back()  # What was claimed after that, for resume() came in between.
            if not self.running:
                self._settled.notify_all()
            self._cond.notify_all()
        self._slot.bell.ring()

    def give_up_running(self, fail: Callable[[_Row, str], _Outcome]) -> list[_Job]:
        """Hand back what still runs, and return it; from now on its outcomes don't count.

        What may not run twice gets the outcome that `fail` makes instead.
        """
        with self._lock:
            given_up = list(self.running.values())
            for job in given_up:
                job.is_given_up = True
            self.running.clear()
            self._free_keys = list(range(self._coroutines))  # Of no use any more; none counts.
        outcomes = []
        for job in given_up:
            if job.may_not_run_again():
                reason = "It was still running when its worker stopped; it is not run again."
                outcomes.append(fail(job.row, reason))
            else:
                outcomes.append(self._handed_back(job.row))
                self.logger.warning(
                    "Message %s of %s is still running; it is handed back and will run again.",
                    job.row.message_id, job.row.actor,
                )  # fmt: skip
        with self._lock:
            self._finished += outcomes
            self._settled.notify_all()
            self._cond.notify_all()
        self._slot.bell.ring()
        return given_up

    def await_ends(self, jobs: list[_Job], timeout_s: float) -> None:
        """Wait until these coroutines have ended, or so long."""
        with self._lock:
            self._settled.wait_for(lambda: all(job.has_ended for job in jobs), timeout_s)

    def close(self) -> None:
        """Write the last outcomes and leave; what can't be written is a dead worker's then."""
        self.write()
        if self._finished:
            self._slot.abandon()
        else:
            self._slot.release()

    def give_up(self, job: _Job) -> bool:
        """Take a job that can't be stopped away from its thread or coroutine, if it still runs."""
        with self._lock:
            is_over = self.running.get(job.key) is not job or job.is_concluding or job.has_ended
            if may_be := not (is_over or self.is_stopping):
                job.is_given_up = True
            return may_be

    def replace(self, job: _Job) -> None:
        """Write the outcome of a job that was given up, and go on without it."""
        self.write_at_once(job)
        with self._lock:
            self._slot.run(job.key, 0)
            self._finish(job, _SYSTEM_CLOCK.monotonic())

    # Looking after things.

    def has_lost_descriptors(self) -> bool:
        """Tell whether a job has closed what holds our locks; the process had better end."""
        if self._slot.slots.is_held():
            return False
        with self._lock:  # One of these did it, or one that still runs: all count as running in the crash.
            free = sorted(set(range(_MAX_TRACKED)) - self.running.keys())
            for index, outcome in zip(free, self._finished + self._traded):
                self._slot.run(index, outcome.row.id)
        return True

    def is_urgent(self) -> bool:
        """Tell whether claimed rows or outcomes lie about, and the last try to write or claim has not failed."""
        return self._trouble_at is None and bool(self._batch.rows or self._finished)

    def look_after(self) -> None:
        """Write late outcomes, call help, and hand back what nobody comes to run."""
        now = _SYSTEM_CLOCK.monotonic()
        with self._lock:
            is_late = bool(self._finished) and now > self._finished_at + _LATE_S
            if self._batch.rows and self._idle:
                if self._batch.age_s(now) > 2 * _BATCH_S:
                    self._cond.notify_all()
            elif is_late and self._idle and not self._is_waited_for:
                self._cond.notify()
            elif self._batch.rows and self._batch.age_s(now) > _STALE_S:
                self._give_back()
                is_late = True
                if not self.running:
                    self._settled.notify_all()
        if is_late:
            self.write()

    def keep_house(self, processor: _Processor, describe_death: Callable[[int], str]) -> None:
        """Take back what dead workers held, mend the slot, find strangers, tidy the file."""
        self._check_slot()
        crashed, is_news = self._engine.recover(self._slot)
        deaths = {pid: describe_death(pid) for pid in {pid for _row, pid in crashed}}
        for row, pid in crashed:
            outcome = processor.crash(row, deaths[pid])
            with self._lock:
                self._suspects += 1  # It was not among this worker's claims.
                self._keep(outcome, _SYSTEM_CLOCK.monotonic())
        if is_news or not self._has_recovered:
            self.write()
            self._has_recovered = True
            self._slot.bell.ring()
        if self._targets.look_for_strangers():
            self._slot.bell.ring()
        if not self.running and _SYSTEM_CLOCK.monotonic() > self._popped_at + _IDLE_S:
            self._engine.checkpoint(_LONG_LOG, shrink=True)
        self._engine.prune()
        with self._lock:
            if self._idle and not self._is_waited_for:
                self._cond.notify()

    def _check_slot(self) -> None:
        """If the others no longer see this worker, take a slot in the side file that they see."""
        self._slot.renew()
        if self._slot.slots.is_current() and self._slot.is_known():
            return
        self.logger.error(
            "The side file of %r was deleted or replaced, or this worker was stopped for so long that "
            "others took it for dead; making it known anew.", self._broker,
        )  # fmt: skip
        with self._exchange_lock:
            with self._lock:
                running = {job.key: job.row.id for job in self.running.values()}
            old, slot = self._slot, self._engine.move_slot(self._slot, running)
            with self._lock:
                self._slot = slot
                for key in running.keys() | self.running.keys():
                    slot.run(key, self.running[key].row.id if key in self.running else 0)
            old.give_up()
            self._targets.refresh(self._slot, anew=True)
        self._slot.bell.ring()


# ------------------------------------------------------------------------------------------
# Worker
#
# Threads that run messages, and one that maintains: it ticks every 5 ms while claimed rows
# or outcomes lie about, else every second.
# ------------------------------------------------------------------------------------------
_TICK_S = 0.005  # Between looks while claimed rows or outcomes lie about,
_IDLE_TICK_S = 1.0  # and else.
_LOG_TICK_S = 0.2  # Between looks, at least, at the size of the write-ahead log.
_STUCK_GRACE_S = 5.0  # After a time limit's interrupt, before the thread is given up.
_DEADLINE_LOOK_S = 0.1  # Between looks whether the deadline of a stop was brought forward.
_EXIT_GRACE_MS = 1000  # For running messages, when the interpreter exits under a worker.


class _Stop:
    """A stop of a worker under way."""

    def __init__(self, deadline: float) -> None:
        self.thread = threading.get_ident()
        self.deadline = deadline  # Which another call of stop() may bring forward.
        self._over = _Bell()

    def end(self) -> None:
        self._over.ring()

    def wait(self, timeout: float) -> None:
        if self._over.wait(timeout):
            self._over.ring()  # For the next that waits.


class Worker:
    """Runs the messages of a broker in threads of this process.

        with dramalite.Worker(broker, worker_threads=2):
            ...

    `queues` limits it to queues of these names.  It takes no signals and can be started and
    stopped in any thread; what was not started by then goes back to its queue.
    `worker_timeout` (milliseconds) bounds how long an idle thread waits between looks.  Up to
    `async_concurrency` messages of `async def` actors run at once, without holding a thread.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        queues: Iterable[str] | None = None,
        worker_timeout: int = 1000,
        worker_threads: int = 8,
        async_concurrency: int = 100,
    ) -> None:
        if not isinstance(broker, _EngineBroker):
            raise TypeError(f"{broker!r} can't be worked on here; give a broker of dramalite.")
        if isinstance(queues, str):
            raise TypeError(f"queues is {queues!r}; give a list of names.")
        _check_int(worker_threads, "worker_threads", lowest=1)
        _check_int(async_concurrency, "async_concurrency", lowest=1)
        if worker_timeout < 1:
            raise ValueError(f"worker_timeout is {worker_timeout!r}; give 1 or more.")
        if worker_threads + async_concurrency > _MAX_TRACKED:
            raise ValueError(
                f"worker_threads and async_concurrency are {worker_threads} and {async_concurrency}; "
                f"give {_MAX_TRACKED} at most together, and start more processes instead."
            )
        self.logger = get_logger("dramalite.worker", type(self))
        self.broker = broker
        self.worker_threads = worker_threads
        self.async_concurrency = async_concurrency
        self.worker_timeout = worker_timeout
        #: Called when a thread had to be given up; the command line then replaces the process
        #: when the other threads are done.
        self.on_stuck: Callable[[], None] = lambda: None
        #: How the process of an id died, "" if that is not known; the command line knows it.
        self.describe_death: Callable[[int], str] = lambda _pid: ""
        self._queues = frozenset(queues or ())
        self._processor = _Processor(broker, get_logger("dramalite.worker", "WorkerThread"))
        self._dispatcher: _Dispatcher | None = None  # None while the worker is not running.
        self._threads: dict[int, threading.Thread] = {}  # By index, those that count.
        self._maintainer = threading.Thread()
        self._tick = _Bell()
        self._pid = os.getpid()
        self._state_lock = threading.RLock()  # A signal handler may come in between.
        self._is_starting = False
        self._stopping: _Stop | None = None
        self._loop_missed_at = -math.inf  # When it was logged that there is no event loop.

    def start(self) -> None:
        """Start the threads; returns at once.

        Raises BrokerError if the database can't be used, RuntimeError if it runs already.
        """
        with self._state_lock:
            if self._is_starting or self._running() is not None:
                raise RuntimeError("The worker is running already.")
            if self.broker._is_simulated:
                raise RuntimeError("The broker is being simulated; take steps of the simulation.")
            try:
                self._is_starting = True
                self._start()
            finally:
                self._is_starting = False
        self.broker.emit_after("worker_boot", self)

    def _start(self) -> None:
        self.broker.emit_before("worker_boot", self)
        self._pid = os.getpid()
        dispatcher: _Dispatcher | None = None
        try:
            dispatcher = _Dispatcher(
                self.broker, self._queues, self.worker_threads, self.async_concurrency,
                self.worker_timeout / 1000, self._tick.ring,
            )  # fmt: skip
            for index in range(self.worker_threads):
                self._start_thread(index, dispatcher)
            self._maintainer = threading.Thread(
                target=self._maintain, args=(dispatcher,), name="dramalite-maintenance", daemon=True
            )
            self._maintainer.start()
            _live_workers.add(self)
            _register_exit_hook()
            self._dispatcher = dispatcher
        except BaseException:  # The system has no threads left, say.
            if dispatcher is not None:
                dispatcher.stop()
                for thread in self._threads.values():
                    thread.join()
                dispatcher.close()
            self._threads.clear()
            self._dispatcher = None
            raise

    def stop(self, timeout: int | timedelta = 600_000) -> None:
        """Stop: what runs may finish within `timeout` milliseconds, else it is handed back.

        What is handed back runs again later; its outcome here, if it still comes, is dropped.
        Where it can't wait, in one of its own jobs or in a signal handler that interrupts work with
        the database, the worker is stopped by a thread of its own, for which the interpreter waits.
        While another program keeps the database locked, up to 30 s more may pass, and 1 s where a
        coroutine ignores that it is cancelled.  Another call with an earlier deadline brings it forward.
        """
        timeout_s = min(cast(int, _timeout_ms(timeout)) / 1000, _LONGEST_WAIT_S)
        if self._is_ours(threading.current_thread()):
            self._elsewhere(self.stop, timeout)
            return
        deadline = _SYSTEM_CLOCK.monotonic() + timeout_s
        own: _Stop | None = None
        try:
            with self._state_lock:
                dispatcher, stopping = self._running(), self._stopping
                if stopping is not None:
                    stopping.deadline = min(stopping.deadline, deadline)
                elif dispatcher is None or dispatcher.is_busy_here():
                    if dispatcher is not None or self._is_starting:
                        self._elsewhere(self.stop, timeout)
                    return
                else:
                    own = self._stopping = _Stop(deadline)
            if own is not None:
                self._stop(cast(_Dispatcher, dispatcher), own)
            elif stopping is not None and not self._is_in_the_way(stopping):
                stopping.wait(timeout_s + _CANCEL_GRACE_S)
        finally:
            if own is not None:
                if self._stopping is own:
                    self._stopping = None
                own.end()

    def _is_in_the_way(self, stopping: _Stop) -> bool:
        """Tell whether a stop can't go on before this call returns: it is in a handler or hook of it."""
        dispatcher = self._dispatcher
        return stopping.thread == threading.get_ident() or (
            dispatcher is not None and dispatcher.is_busy_here()
        )

    def _elsewhere(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method that would wait in vain here, in a thread of its own."""
        name = f"dramalite-{method.__name__}"
        threading.Thread(target=method, args=args, name=name).start()

    def _stop(self, dispatcher: _Dispatcher, stopping: _Stop) -> None:
        self.logger.debug("Stopping.")
        dispatcher.claim_no_more()  # Before the hooks: what began after them would hear of nothing.
        try:
            self.broker.emit_before("worker_shutdown", self)
        finally:
            self._end(dispatcher, stopping)
            self.broker.emit_after("worker_shutdown", self)
            self.logger.debug("Stopped.")

    def _end(self, dispatcher: _Dispatcher, stopping: _Stop) -> None:
        """Wait for the threads until the deadline, and leave."""
        dispatcher.stop()
        for thread in list(self._threads.values()):
            while thread.is_alive() and (left := stopping.deadline - _SYSTEM_CLOCK.monotonic()) > 0:
                thread.join(min(left, _DEADLINE_LOOK_S))
        fail = self._processor.fail
        cancelled = [job for job in dispatcher.give_up_running(fail) if job.context is not None]
        for job in cancelled:
            _interrupt(job.runner, Shutdown)
        dispatcher.await_ends(cancelled, _CANCEL_GRACE_S)
        for job in cancelled:
            self._processor.leave(job.runner)
        self._tick.ring()
        self._maintainer.join()
        dispatcher.close()
        self._threads.clear()
        self._dispatcher = self._stopping = None
        _live_workers.discard(self)

    def _is_ours(self, thread: threading.Thread) -> bool:
        """Tell whether this worker, while it runs, waits for a thread to end what it does."""
        loop_thread = None if _event_loop_thread is None else _event_loop_thread.thread
        threads = [loop_thread, self._maintainer, *list(self._threads.values())]
        return (self._is_starting or self._dispatcher is not None) and thread in threads

    def pause(self) -> None:
        """Start no more messages; returns when those that run have ended.

        Where it can't wait, as stop() can't, it returns at once.
        """
        if (dispatcher := self._running()) is None:
            return
        if dispatcher.is_busy_here():
            dispatcher.forbid_claims()
            self._elsewhere(dispatcher.return_unstarted)
        elif self._is_ours(threading.current_thread()):
            dispatcher.claim_no_more()
        else:
            dispatcher.pause()

    def resume(self) -> None:
        """Go on after pause(); a stop is not undone."""
        if (dispatcher := self._running()) is not None and self._stopping is None:
            dispatcher.resume()

    def join(self) -> None:
        """Wait until nothing that this worker has claimed is waiting, running or unwritten.

        It does not look at what waits in the database: see Broker.join().  Raises RuntimeError where
        it would wait for its own caller, as in a job.
        """
        if (dispatcher := self._running()) is None:
            return
        if dispatcher.is_busy_here() or self._is_ours(threading.current_thread()):
            raise RuntimeError("The worker waits for what calls join() here, a job or a signal handler's work.")
        dispatcher.join()

    def _running(self) -> _Dispatcher | None:
        """The dispatcher, if the worker runs; in a forked child it does not."""
        if self._pid != os.getpid():
            self._dispatcher = self._stopping = None
        return self._dispatcher

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def has_lost_descriptors(self) -> bool:
        """Tell whether a job has closed files of dramalite's; such a process must be ended."""
        dispatcher = self._dispatcher
        return dispatcher is not None and dispatcher.has_lost_descriptors()

    def has_stopped(self) -> bool:
        """Tell whether it does not run: it was stopped, or not started yet."""
        return self._dispatcher is None

    @property
    def runners(self) -> set[int]:
        """What runs messages: the idents of the worker threads, negative numbers of coroutines."""
        threads = {thread.ident for thread in list(self._threads.values()) if thread.ident is not None}
        dispatcher = self._dispatcher  # Which stop() takes away.
        jobs = [] if dispatcher is None else list(dispatcher.running.values())
        return threads | {job.runner for job in jobs if job.context is not None}

    # Threads.

    def _start_thread(self, index: int, dispatcher: _Dispatcher) -> None:
        thread = threading.Thread(
            target=self._work, args=(index, dispatcher), name=f"dramalite-worker-{index}", daemon=True
        )
        self._threads[index] = thread  # First, for a hook that stops the worker at the thread's boot.
        try:
            thread.start()
        except BaseException:
            del self._threads[index]
            raise

    def _tell_of_boot(self, signal: str, thread: threading.Thread) -> None:
        try:
            self.broker.emit_after(signal, thread)
        except BaseException:  # Of a hook's sys.exit(): the thread is needed.
            self.logger.critical("A hook after_%s failed; the thread goes on.", signal, exc_info=True)

    def _work(self, index: int, dispatcher: _Dispatcher) -> None:
        """What worker thread `index` does until the worker stops, or the thread is given up."""
        thread = threading.current_thread()
        self._tell_of_boot("worker_thread_boot", thread)
        job: _Job | None = None
        while True:
            try:
                job = dispatcher.next_job(index, job)
                if job is None:
                    break
                if not self._process(job, dispatcher):
                    if job.is_given_up and job.context is None:
                        break
                    job = None
            except BaseException:  # From a hook or from here, not from a job: no thread is lost.
                if job is not None:
                    self._processor.leave(job.runner)
                    if not job.is_given_up:
                        self._processor.drop(job)
                with contextlib.suppress(Exception):  # The log itself may be what failed.
                    self.logger.critical("A worker thread failed; it goes on.", exc_info=True)
        self.broker.emit_before("worker_thread_shutdown", thread)

    def _process(self, job: _Job, dispatcher: _Dispatcher) -> bool:
        """Run a message, or conclude it once its coroutine has ended; False if it counts no more
        or goes on as a coroutine."""
        if job.context is None:
            if job.runner:
                return dispatcher.detach(job) and self._start_coroutine(job, dispatcher)
            self._processor.run(job)
            if os.getpid() != self._pid:
                os._exit(0)  # The job forked and its child returned here: there it ends.
        if not dispatcher.may_conclude(job):
            self._processor.leave(job.runner)
            return False
        if job.context is None:
            self._processor.conclude(job)
        else:
            job.context.run(_runner.call_for, job.runner, self._processor.conclude, job)
        if job.row.crash_limit == 1:  # It may not run again if the process dies now.
            dispatcher.write_at_once(job)
        return True

    def _start_coroutine(self, job: _Job, dispatcher: _Dispatcher) -> bool:
        """Call the before hooks here, the actor on the event loop, the rest in any thread.

        True if there is no such loop: the job is handed back.
        """
        try:
            loop = _get_event_loop_thread()
        except RuntimeError as error:  # No more threads, or the interpreter is about to end.
            now = _SYSTEM_CLOCK.monotonic()
            if now > self._loop_missed_at + _NEWS_S:
                self._loop_missed_at = now
                self.logger.error("The event loop can't be started: %s; its messages go back, to try again.", error)
            _SYSTEM_CLOCK.sleep(_POLL_S)  # Before it is claimed again.
            job.outcome = _Outcome(job.row, is_handed_back=True)
            return True
        context = cast(contextvars.Context, job.context)
        call = context.run(_runner.call_for, job.runner, self._processor.begin, job)
        if call is None:
            dispatcher.end(job)
            return False
        actor, args, kwargs = call
        fn = cast("Callable[..., Any]", actor.coroutine_fn)

        def end(result: Any, exception: BaseException | None) -> None:
            job.result, job.exception = result, exception
            dispatcher.end(job)

        loop.start(functools.partial(fn, *args, **kwargs), context, job.runner, end)
        return False

    def _maintain(self, dispatcher: _Dispatcher) -> None:
        """What the maintenance thread does until the worker has stopped."""
        thread = threading.current_thread()
        self._tell_of_boot("consumer_thread_boot", thread)
        house_kept_at = log_moved_at = 0.0
        while not (dispatcher.is_stopping and not dispatcher.running):
            try:
                dispatcher.look_after()
                now = _SYSTEM_CLOCK.monotonic()
                if now >= log_moved_at + _LOG_TICK_S:
                    log_moved_at = now
                    self.broker._engine.checkpoint(_LONG_LOG)
                if now >= house_kept_at + _IDLE_TICK_S:
                    house_kept_at = now
                    dispatcher.keep_house(self._processor, self.describe_death)
                    self._replace_stuck_threads(dispatcher)
            except Exception as error:  # An OSError, say: a job closed our descriptors.
                dispatcher.complain(error)
            self._tick.wait(_TICK_S if dispatcher.is_urgent() else _IDLE_TICK_S)
        self.broker.emit_before("consumer_thread_shutdown", thread)

    def _replace_stuck_threads(self, dispatcher: _Dispatcher) -> None:
        """Fail messages whose time limit can't end them, and start threads in place of theirs."""
        jobs = list(dispatcher.running.values())  # First: a thread may take another message meanwhile.
        limits = [item for item in self.broker.middleware if isinstance(item, TimeLimit)]
        stuck = {r for item in limits for r in item.stuck_runners(self.broker.clock, _STUCK_GRACE_S)}
        has_replaced = False
        for job in jobs if stuck else ():
            runner = job.runner or self._threads[job.key].ident
            if runner not in stuck or not dispatcher.give_up(job):
                continue
            self.logger.error(
                "Message %s of %s runs on %d s after its time limit, in a call that can't be "
                "interrupted: it is failed, and its thread replaced.",
                job.row.message_id, job.row.actor, _STUCK_GRACE_S,
            )  # fmt: skip
            job.exception = TimeLimitExceeded()
            _runner.call_for(runner, self._processor.conclude_safely, job)
            dispatcher.replace(job)
            self._threads.pop(job.key, None)
            has_replaced = True
        try:
            for index in set(range(self.worker_threads)) - self._threads.keys():
                self._start_thread(index, dispatcher)
        finally:
            if has_replaced:  # Told at the end: it stops the worker, which would wait for the others.
                self.on_stuck()


_live_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@functools.cache
def _register_exit_hook() -> None:
    """Have workers that still run stopped before the interpreter goes."""
    import atexit

    atexit.register(_stop_live_workers)


def _stop_live_workers() -> None:
    for worker in list(_live_workers):
        if worker._pid == os.getpid():
            worker.stop(timeout=_EXIT_GRACE_MS)


# ------------------------------------------------------------------------------------------
# Virtual workers
#
# The engine, the processing and the middleware of a worker without its threads: the caller
# takes the steps.  A virtual thread that must be able to pause in the middle of a job has a real
# thread behind it, which runs only while the caller waits for it.
# ------------------------------------------------------------------------------------------
#: Exceptions that the job of a dead worker gets until it counts as one that can't be ended.
_MOST_DEATHS = 1000


class _Crash(BaseException):
    """Unwinds a job whose virtual worker has died, or has given it up."""


class _JobThread:
    """A thread that runs only while somebody waits for it, in resume()."""

    def __init__(self) -> None:
        self.is_busy = False  # It has a task, under way or paused.
        self._has_turn = False  # Else whoever waits for it goes on.
        self._go, self._gone = _Bell(), _Bell()  # Both may ring in vain: _has_turn decides.
        self._task: Callable[[], None] | None = None  # To be begun.
        self._error: BaseException | None = None
        self._is_over = False
        run = functools.partial(contextvars.copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="dramalite-virtual", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._await_turn()
        while not self._is_over:
            task, self._task = self._task, None
            if task is not None:
                try:
                    task()
                except BaseException as error:  # It is raised where somebody waits.
                    self._error = error
                self.is_busy = False
            self.pause()
        self._end_turn()

    def start(self, task: Callable[[], None]) -> None:
        """Run a task until it ends or pauses."""
        self._task, self.is_busy = task, True
        self.resume()

    def resume(self) -> None:
        """Let the task go on until it ends or pauses; raises what comes out of it."""
        self._await_end_of_turn()  # For a call that an interrupt kept from it.
        self._has_turn = True
        self._await_end_of_turn()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def pause(self) -> None:
        """In the thread: let whoever waits go on, until resume()."""
        self._end_turn()
        self._await_turn()

    def end(self) -> None:
        """End the thread, between two tasks."""
        self._is_over = True
        self.resume()
        self._thread.join()

    def _await_end_of_turn(self) -> None:
        try:
            self._watch_turn()
        except BaseException:  # Ctrl+C, say: not before the task is where it can be resumed or left.
            self._watch_turn()
            raise

    def _watch_turn(self) -> None:
        while self._has_turn:
            self._go.ring()
            self._gone.wait(_POLL_S)

    def _end_turn(self) -> None:
        self._has_turn = False
        self._gone.ring()

    def _await_turn(self) -> None:
        while not self._has_turn:
            self._go.wait(_LONGEST_WAIT_S)


class _VirtualThread:
    """A thread of a virtual worker, and the job that it runs or has finished."""

    def __init__(self, worker: _VirtualWorker, index: int, can_pause: bool) -> None:
        self.worker = worker
        self.index = index
        self.real = _JobThread() if can_pause else None  # None: jobs run in the calling thread,
        self._context = contextvars.copy_context()  # with what context variables they set.
        self.job: _Job | None = None
        self.runner = 0  # What the job is to the middleware.
        self.retries = 0  # Of the job's message, before this attempt.
        self.started_ms = self.ended_ms = 0
        self.is_running = False  # The job has no outcome yet.
        self.wakes_at: int | None = None  # When it goes on, if it sleeps.
        self.is_dead = False  # The worker died under the job, which is being unwound,
        self.deaths = 0  # by so many exceptions.
        self.gives_up_at: int | None = None  # When the worker will, since the job ignored its time limit.
        self.is_given_up = False
        self.is_cut_off = False  # The run does not wait for its end.
        self.is_skipped = False
        self.error = ""

    def start(self, row: _Row, now_ms: int, run: Callable[[_VirtualThread], None]) -> None:
        """Run a job up to its outcome, or until it sleeps."""
        self.job = _Job(row)
        self.started_ms = now_ms
        self.is_running = True
        self.gives_up_at, self.deaths = None, 0
        self.is_given_up = self.is_cut_off = self.is_dead = False
        self.worker.slot.run(self.index, row.id)
        if self.real is None:
            self._context.run(run, self)
        else:
            self.real.start(functools.partial(run, self))

    def process(self) -> None:
        """What start() is to run: the processing, as in a worker's thread."""
        job, processor = cast(_Job, self.job), self.worker.processor
        self.runner = _runner.id()
        foreign = (_Crash, KeyboardInterrupt) if self.real is None else (_Crash,)  # None of the job's own.
        processor.run(job)
        if self.is_given_up and not self.is_dead:
            job.exception = TimeLimitExceeded()
        interrupt = job.exception if isinstance(job.exception, foreign) else None
        if not (self.is_dead or self.is_cut_off or interrupt):
            self._describe(job)
            try:
                processor.conclude_safely(job, foreign)
            except foreign as error:
                interrupt = error
        if self.is_dead:
            job.exception = None
            self.forget()
        elif self.is_cut_off or interrupt is not None:
            self.worker.give_back(job)
            self.worker.slot.run(self.index, 0)
            self.forget()
            if isinstance(interrupt, KeyboardInterrupt):
                raise interrupt
        else:
            self.is_running = False
            if job.row.crash_limit != 1:  # Else it runs, to the others, until its outcome is written.
                self.worker.slot.run(self.index, 0)

    def _describe(self, job: _Job) -> None:
        """Note what only the job's end tells, before the hooks."""
        exception = job.exception
        self.is_skipped = isinstance(exception, SkipMessage)
        self.error = "" if exception is None else f"{type(exception).__name__}: {_error_text(exception)}"
        self.retries = _retries(job.message)

    def sleep(self, wakes_at: int) -> None:
        """In a job of a thread that can pause: let the others go on until it is resumed."""
        self.wakes_at = wakes_at
        cast(_JobThread, self.real).pause()
        self.wakes_at = None
        if self.is_dead:
            self.die()

    def unwind(self) -> None:
        """End a job that sleeps, by an exception, as often as it takes.

        Raises RuntimeError if the job catches every one of them and goes on.
        """
        self.is_dead, self.deaths = True, 0
        while self.is_running and self.real is not None and self.real.is_busy:
            if self.deaths > _MOST_DEATHS:
                raise RuntimeError(
                    f"A job of {cast(_Job, self.job).row.actor} can't be ended: it catches every "
                    f"exception, also those that are none of its own, and goes on."
                )
            self.real.resume()
        self.forget()

    def end(self) -> None:
        """Unwind the job, and end the thread behind."""
        self.unwind()
        if self.real is not None:
            self.real.end()

    def die(self) -> None:
        """In a job whose worker has died, or given it up: end it, or leave it where it is for ever."""
        self.deaths += 1
        if self.deaths > _MOST_DEATHS and self.real is not None:
            self.real.pause()
        if self.deaths == _MOST_DEATHS and self.real is None:
            get_logger("dramalite.simulation").critical(
                "A job of %s catches every exception, also those that are none of its own, and goes on; "
                "with one virtual thread nothing else can end it.", cast(_Job, self.job).row.actor,
            )  # fmt: skip
        raise _Crash

    def forget(self) -> None:
        self.worker.processor.leave(self.runner)
        self.job = self.wakes_at = None
        self.is_running = self.is_dead = False


def _retries(message: Any) -> int:
    retries = 0 if message is None else message.options.get("retries", 0)
    return retries if isinstance(retries, int) else 0


class _VirtualWorker:
    """A worker whose steps are taken by the caller."""

    def __init__(self, broker: _EngineBroker, number: int, logger: logging.Logger) -> None:
        self.number = number
        self.processor = _Processor(broker, logger)
        self.threads: list[_VirtualThread] = []
        self._broker = broker
        self.boot()

    def boot(self) -> None:
        """Take a slot and begin, as a new process would."""
        self.slot = self._broker._engine.take_slot(0, tracked=True, bell=_Bell())
        self._targets = _Targets(self._broker, frozenset())
        self.is_paused = False
        self.must_recover = True
        self.seen: int | None = None  # The engine's changes() at the last look for work, in vain.
        self.may_hold_rows = False  # That no thread has, where an exception came in between.

    def recover(self) -> list[_Outcome]:
        """Take back what dead workers held; return what became dead letters by that."""
        self.must_recover = False
        engine = self._broker._engine
        slot = self.slot
        crashed, _is_news = engine.recover(slot)
        outcomes = [self.processor.crash(row, "") for row, _pid in crashed]
        if self.slot is not slot:  # A hook had this worker crash: all that is another one's now.
            return []
        if outcomes:
            engine.exchange(slot, outcomes)
        self._targets.look_for_strangers()
        engine.prune()
        return outcomes

    def exchange(
        self, outcomes: list[_Outcome], skip_to: Callable[[int], bool] = lambda _due_ms: False
    ) -> _Row | None:
        """Write outcomes and claim the next message, if there is one."""
        self._targets.refresh(self.slot)
        running = [thread.job for thread in self.threads if thread.job and thread.is_running]
        limit = 0 if self.is_paused else 1
        rows, _version = self._broker._engine.exchange(
            self.slot, outcomes, limit, self._targets.json(True), not any(job.row.crashes for job in running),
            skip_to,
        )  # fmt: skip
        return rows[0] if rows else None

    def cut_off(self, job: _Job) -> _Outcome:
        """The outcome of a job that is not waited for: its message goes back, if it may run again."""
        if not job.may_not_run_again():
            return _Outcome(job.row, is_handed_back=True)
        return self.processor.fail(job.row, "Its run was cut off; it is not run again.")

    def give_back(self, job: _Job) -> None:
        """Cut a job off, now."""
        self.processor.leave(_runner.id())
        self._broker._engine.exchange(self.slot, [self.cut_off(job)])
        self.seen = None


def drain(broker: Broker, *, max_messages: int = 10_000) -> int:
    """Run what is ready on a broker in the calling thread; return how many messages it ran.

    For tests.  Then raises the exception of the first message whose last attempt here failed,
    also where a retry waits for its time.  What is delayed stays; see simulate() for that.
    Raises RuntimeError where there is no end after `max_messages` messages.
    """
    if not isinstance(broker, _EngineBroker):
        raise TypeError(f"{broker!r} can't be drained here; give a broker of dramalite.")
    if broker._is_simulated:
        raise RuntimeError("This broker is being simulated; take steps of the simulation.")
    worker = _VirtualWorker(broker, 0, get_logger("dramalite.worker", "WorkerThread"))
    failures: dict[str, BaseException] = {}
    runs = 0
    try:
        worker.recover()
        row = worker.exchange([])
        while row is not None:
            if runs == max_messages:
                broker._engine.hand_back(worker.slot, [row])
                raise RuntimeError(
                    f"Still not drained after {max_messages} messages; does an actor send itself?"
                )
            job = _Job(row)
            worker.slot.run(0, row.id)
            worker.processor.run(job)
            failures.pop(row.message_id, None)
            failure = job.exception
            try:
                if isinstance(failure, KeyboardInterrupt):
                    raise failure
                worker.processor.conclude_safely(job, (KeyboardInterrupt,))
            except KeyboardInterrupt:  # None of the job's own.
                worker.give_back(job)
                raise
            if job.message is not None and job.message.failed:
                failures[row.message_id] = job.message._exception or RuntimeError(job.message.reason)
            elif failure is not None and not isinstance(failure, (Retry, SkipMessage)):
                failures[row.message_id] = failure
            runs += 1
            row = worker.exchange([job.outcome])
            worker.slot.run(0, 0)
    except BaseException:
        worker.slot.abandon()  # What it may still hold is a dead worker's.
        raise
    worker.slot.release()
    for failure in failures.values():
        raise failure
    return runs


# ------------------------------------------------------------------------------------------
# Virtual time
#
# A clock that stands still until its world lets time pass, and an event loop on that clock.
# ------------------------------------------------------------------------------------------
#: Milliseconds between two looks of a job that waits for something.
_VIRTUAL_POLL_MS = 10

#: How often a job may let time pass where no other one can run meanwhile.
_MOST_NAPS = 1_000_000


class _VirtualClock(Clock):
    """The time of a simulation."""

    is_virtual = True

    def __init__(self, world: Simulation, now_ms: int) -> None:
        self.world = world
        self.start(now_ms)

    def start(self, now_ms: int) -> None:
        """Begin at a time, in milliseconds since 1970."""
        self._start_ms = self.now_ms = now_ms

    def time_ms(self) -> int:
        return self.now_ms

    def monotonic(self) -> float:
        return (self.now_ms - self._start_ms) / 1000

    def when(self, monotonic_s: float) -> int:
        """The wall time of a moment of the monotonic time."""
        return self._start_ms + round(monotonic_s * 1000)

    def sleep(self, seconds: float) -> None:
        self.world.pass_time(_whole_ms(seconds))

    def wait_for(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        return self.world.wait_for(is_done, timeout_s)

    async def wait_for_async(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        import asyncio

        if _virtual.thread is None:  # No job waits: the world goes on until it has happened.
            return self.wait_for(is_done, timeout_s)
        end_ms = None if timeout_s is None else self.now_ms + _whole_ms(timeout_s)
        while not is_done():
            if end_ms is not None and self.now_ms >= end_ms:
                return False
            await asyncio.sleep(_VIRTUAL_POLL_MS / 1000)
        return True


def _whole_ms(seconds: float) -> int:
    """Milliseconds, rounded up, but not over what a float adds to a number."""
    return math.ceil(round(seconds * 1000, 6))


class _Virtual(threading.local):
    """What this thread is in a simulation."""

    world: Simulation | None = None
    thread: _VirtualThread | None = None  # None outside of jobs.


_virtual = _Virtual()


def simulated_work(duration: int | timedelta) -> None:
    """Let milliseconds of virtual time pass in a simulation; elsewhere, do nothing."""
    if _virtual.world is not None:
        _virtual.world.pass_time(_milliseconds(duration, "duration"))


#: What a loop's time is ahead after each wait: it takes a timer for due only when it is past.
_LOOP_NAP_S = 1e-7

#: Real seconds for which a thread, a process or a connection keeps virtual time from passing; and
#: for which it does so again where a timer has run since.
_REAL_WAIT_S = 2.0
_NEXT_REAL_WAIT_S = 0.5
_SLEEP_WAIT_S = 0.02  # Where the job only sleeps, beside what is open.


def _make_virtual_loop(clock: _VirtualClock) -> asyncio.AbstractEventLoop:
    """An event loop whose time is the clock's; its classes made late, since asyncio takes long to import."""
    import asyncio
    import selectors

    class Selector(selectors.DefaultSelector):
        """Where a loop would wait for its next timer, or for others, virtual time passes."""

        def select(self, timeout: float | None = None) -> Any:
            if timeout is not None and timeout <= 0:
                return super().select(timeout)
            # What real threads do takes no time, unless they wait for it to pass: then one wait shows.
            awaits_io = len(self.get_map()) > 1
            is_real = loop.calls > 0 or awaits_io or (timeout is None and _has_threads())
            patience_s = loop.patience_s if is_real else 0.0
            # A lone task that sleeps waits for no connection that is merely open, though it may look at it.
            timers = getattr(loop, "_scheduled", ())  # A heap.
            is_sleep = timers and timers[0]._callback is getattr(asyncio.futures, "_set_result_unless_cancelled", 0)
            if not loop.calls and is_sleep and len(asyncio.all_tasks(loop)) == 1:
                patience_s = min(patience_s, _SLEEP_WAIT_S)
            ready = super().select(patience_s)
            if ready:
                loop.patience_s = _REAL_WAIT_S
            elif timeout is None:
                loop.patience_s = 0.0  # Nothing runs here meanwhile.
                clock.world.wait_for_others()
            else:
                loop.patience_s = _NEXT_REAL_WAIT_S if is_real else _REAL_WAIT_S
                clock.sleep(timeout)
                loop.ahead_s += _LOOP_NAP_S
            return ready

    class Loop(asyncio.SelectorEventLoop):
        ahead_s = 0.0
        calls = 0  # Of run_in_executor(), as by asyncio.to_thread(), that have not ended.
        patience_s = _REAL_WAIT_S  # How long to wait for these, or other threads or connections.

        def time(self) -> float:
            return clock.monotonic() + self.ahead_s

        def run_in_executor(self, *args: Any) -> Any:  # type: ignore[override]
            future = super().run_in_executor(*args)
            self.calls += 1
            self.patience_s = _REAL_WAIT_S
            future.add_done_callback(self._end_call)
            return future

        def _end_call(self, _future: Any) -> None:
            self.calls -= 1

    loop = Loop(Selector())
    return loop


def _run_on_virtual_loop(clock: _VirtualClock, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on an event loop of its own, whose time is the clock's."""
    import asyncio

    loop = _make_virtual_loop(clock)
    tasks: dict[asyncio.Task[Any], None] = {}  # Those that have not ended, in their order.

    def make_task(_loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        tasks[task] = None
        task.add_done_callback(tasks.pop)
        return task

    def run(task: asyncio.Task[Any]) -> None:
        """Run the loop until a task has ended, whatever other ones do to the loop."""
        task.add_done_callback(lambda _task: loop.stop())
        while not task.done():
            with contextlib.suppress(SystemExit):
                loop.run_forever()

    loop.set_task_factory(make_task)
    task = loop.create_task(_contain(lambda: coroutine))
    try:
        try:
            run(task)
        except (Interrupt, _Crash) as interrupt:
            task.cancel()
            with contextlib.suppress(_Crash):
                run(task)
            if isinstance(interrupt, _Crash) or not task.done() or task.cancelled():
                raise
        if task.cancelled():
            raise RuntimeError("The coroutine was cancelled.")
        return _settle(*_outcome_of(task))
    finally:
        with contextlib.suppress(_Crash, Interrupt):  # What came of the coroutine stands.
            left = [*tasks, *(asyncio.all_tasks(loop) - tasks.keys())]  # Some may be made otherwise.
            for task in left:
                task.cancel()
            if left:
                run(loop.create_task(asyncio.wait(left, timeout=_CANCEL_GRACE_S)))  # For as long as they may take.
            run(loop.create_task(loop.shutdown_asyncgens()))
        loop.close()


def _has_threads() -> bool:
    """Tell whether there are threads that dramalite knows nothing of."""
    known = threading.current_thread(), threading.main_thread()
    return any(item not in known and not item.name.startswith("dramalite-") for item in threading.enumerate())


def _run_virtually(clock: _VirtualClock, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in virtual time; in another thread where this one runs a loop already."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    try:
        asyncio.get_running_loop()
        is_free = False
    except RuntimeError:
        is_free = True
    if is_free:
        return _run_on_virtual_loop(clock, coroutine)
    world, thread = _virtual.world, _virtual.thread

    def run() -> Any:
        _virtual.world, _virtual.thread = world, thread
        _runner.run_coroutine = functools.partial(_run_virtually, clock)
        return _run_on_virtual_loop(clock, coroutine)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, run).result()


# ------------------------------------------------------------------------------------------
# Simulated brokers
#
# A simulation's clock, randomness and, where it has one of its own, database take the place of
# a broker's while it lasts.
# ------------------------------------------------------------------------------------------
class _Takeover:
    """A broker in the hands of a simulation."""

    def __init__(
        self, broker: _EngineBroker, clock: _VirtualClock, seed: int, engine: _Engine | None,
        may_start_later: bool,
    ) -> None:  # fmt: skip
        from random import Random

        self._broker = broker
        self._clock = clock
        self.engine = engine  # In place of the broker's own.
        self._may_start_later = may_start_later
        self._jitter = Random(f"jitter {seed}")
        self._ids = Random(f"ids {seed}")
        self._has_past = False  # There is something, perhaps of a simulation with the same seed:
        self._taken: set[str] = set()  # messages of these ids, results or groups.

    def begin(self) -> None:
        """Take the broker over; raise BrokerError if its database can't be used."""
        broker = self._broker
        if broker._is_simulated:
            raise RuntimeError("This broker is worked on already, by a simulation.")
        broker._is_simulated = True  # First, for threads that try at the same time.
        try:
            if self.engine is None:
                self._look_at_past(broker._engine)
        except BaseException:
            broker._is_simulated = False
            raise
        self._saved = broker.clock, broker.random, broker._entropy, broker._engine, broker._buried
        broker.clock, broker.random, broker._entropy = self._clock, self._jitter, self._new_entropy
        if self.engine is not None:
            broker._engine, broker._buried = self.engine, collections.defaultdict(list)

    def _look_at_past(self, engine: _Engine) -> None:
        """Note what an engine holds, and begin no earlier than the last message in it was sent."""
        self._taken = engine.message_ids()
        self._has_past = bool(self._taken) or engine.has_values()
        if self._may_start_later:
            self._clock.start(max(self._clock.now_ms, engine.last_sent_ms()))

    def end(self) -> None:
        """Give the broker back as it was."""
        if self.engine is not None:
            self.engine.close()
        broker = self._broker
        broker.clock, broker.random, broker._entropy, broker._engine, broker._buried = self._saved
        broker._is_simulated = False

    @contextlib.contextmanager
    def set_aside_engine(self) -> Iterator[None]:
        """Have what unwound jobs still do go to a database that is thrown away."""
        engine = self._broker._engine
        self._broker._engine = _Engine(None, "full", lambda: self._clock)
        try:
            yield
        finally:
            self._broker._engine.close()
            self._broker._engine = engine

    def _new_entropy(self) -> bytes:
        """The random bits of an id, under which an earlier simulation may have left something."""
        while True:
            entropy = self._ids.getrandbits(80).to_bytes(10, "big")
            if not self._has_past:
                return entropy
            message_id = _new_message_id(self._clock.now_ms, entropy)
            if message_id not in self._taken:
                self._broker._engine.forget_values(message_id)
                return entropy


# ------------------------------------------------------------------------------------------
# Simulated events
#
# What a simulation tells of each attempt, and lets its caller choose from.
# ------------------------------------------------------------------------------------------
#: The error of an attempt that had ended when its worker crashed: it counts no crash.
_UNWRITTEN = "WorkerCrashed: the attempt had ended, but its outcome was not written"


class SimulatedEvent(NamedTuple):
    """One attempt at a message: what came of it, and when, in virtual time."""

    message_id: str
    actor: str
    attempt: int  # 1 for the first; those that crashed count.
    started_ms: int  # Since 1970, as are all of these.
    ended_ms: int
    worker: int
    thread: int
    outcome: str  # "done", "retry", "skipped", "dead" or "crashed".
    next_eta_ms: int | None  # Of the retry; None if there is none, or at once.
    result: Any
    error: str  # Type and text of the exception, "" if there was none.
    body: bytes  # The message as it was stored before this attempt.

    @property
    def message(self) -> Message[Any]:
        """The message as it was before this attempt; raises DecodeError if it is none."""
        return Message.decode(self.body)

    @property
    def started(self) -> datetime:
        """When the attempt began, in UTC."""
        return _datetime(self.started_ms)

    @property
    def ended(self) -> datetime:
        """When its outcome was known, in UTC."""
        return _datetime(self.ended_ms)

    @property
    def next_eta(self) -> datetime | None:
        """When the retry is due, in UTC; None if there is none, or at once."""
        return None if self.next_eta_ms is None else _datetime(self.next_eta_ms)

    def __str__(self) -> str:
        what = f"{self.ended.isoformat(' ', 'milliseconds')} worker {self.worker}: {self.actor} "
        what += f"({self.message_id}), attempt {self.attempt}: {self.outcome}"
        what += f" ({self.error})" if self.error else ""
        return what + (f", again at {self.next_eta.isoformat(' ')}" if self.next_eta else "")


def _what_came_of(job: _Job, is_skipped: bool) -> tuple[str, int | None]:
    """The outcome of an attempt, and when its retry is due."""
    if job.message is None or job.message.failed:
        return "dead", None
    for statement, values in job.outcome.effects:
        if statement == _INSERT and values[8] == job.row.message_id:
            return "retry", values[5]
    return "skipped" if is_skipped else "done", None


def _death(row: _Row, attempt: int, worker: int, now_ms: int) -> SimulatedEvent:
    """The event of a message that is a dead letter since its workers died."""
    error = f"WorkerCrashed: the last of {row.crashes} worker processes that ran it died"
    return SimulatedEvent(
        row.message_id, row.actor, attempt, now_ms, now_ms, worker, 0, "dead", None, None, error, row.body
    )


class SimulatedStep(NamedTuple):
    """Something that a virtual worker can do next; what choose() chooses from."""

    worker: int
    thread: int
    action: str  # "recover"; "exchange": write what is finished, begin a message; "resume" a job.


class SimulationError(DramaliteError):
    """A simulation went on for longer than it may; the text has its last events."""


def _time_ms(when: object, what: str) -> int:
    """Milliseconds since 1970 of a datetime; one without a time zone counts as UTC, everywhere."""
    from datetime import datetime, timedelta, timezone

    if not isinstance(when, datetime):
        raise TypeError(f"{what} is {when!r}; give a datetime.")
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return -((datetime(1970, 1, 1, tzinfo=timezone.utc) - when) // timedelta(milliseconds=1))


#: The last one that a datetime can hold.
_LAST_MS = 253_402_300_799_999


def _datetime(time_ms: int) -> datetime:
    """A time in UTC, from milliseconds since 1970."""
    from datetime import datetime, timedelta, timezone

    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=min(time_ms, _LAST_MS))


# ------------------------------------------------------------------------------------------
# Simulation
#
# Virtual workers on a virtual clock, which jumps to when something happens next.  What happens
# in which order is decided by a seed, or by the caller, step by step.
# ------------------------------------------------------------------------------------------
#: Steps and milliseconds after which run_until_idle() takes a simulation for endless.
_MOST_STEPS = 100_000
_MOST_MS = 366 * 86_400_000

#: Where a simulation begins, if it is not told: 2026-01-01 in UTC.
_SIMULATION_START_MS = 1_767_225_600_000


class Simulation:
    """A broker's work in virtual time; made by simulate()."""

    def __init__(
        self,
        broker: _EngineBroker,
        engine: _Engine | None,
        seed: int,
        start_ms: int | None,
        sizes: tuple[int, int],
        choose: Callable[[list[SimulatedStep]], SimulatedStep] | None,
    ) -> None:
        from random import Random

        self.broker = broker
        #: What has happened, in the order in which it was committed.
        self.events: list[SimulatedEvent] = []
        self._clock = _VirtualClock(self, _SIMULATION_START_MS if start_ms is None else start_ms)
        self._takeover = _Takeover(broker, self._clock, seed, engine, may_start_later=start_ms is None)
        self._choose = choose
        self._schedule = Random(f"schedule {seed}")
        self._sizes = sizes
        self._workers: list[_VirtualWorker] = []
        self._attempts: collections.Counter[str] = collections.Counter()  # By message id.
        self._undo: contextlib.ExitStack = contextlib.ExitStack()
        self._outer: tuple[Any, ...] = (None, None, None)  # What this thread is outside of this simulation.
        self._naps = 0  # How often jobs have let time pass, in this step.
        self._latest_ms = math.inf  # A job that lets it pass beyond this is ended.
        self._pid = 0  # Of the process in which it began.

    # Looking.

    @property
    def now(self) -> datetime:
        """The virtual time, in UTC."""
        return _datetime(self._clock.now_ms)

    def pending(self) -> list[Message[Any]]:
        """What is not finished, in its order: what waits or runs, then what is delayed."""
        if self._takeover.engine is not None:
            self._check_begun()
        return self.broker.pending()

    # Running.

    def step(self) -> bool:
        """Take one step, at the time when there is one; False if nothing is going to happen."""
        return self._step(None)

    def run_until_idle(
        self, *, max_steps: int = _MOST_STEPS, max_time: timedelta | int = _MOST_MS
    ) -> None:
        """Take steps until nothing is going to happen.

        Raises SimulationError after `max_steps` steps, or where it would take longer than
        `max_time` (milliseconds or a timedelta; 366 days).
        """
        most_ms = _milliseconds(max_time, "max_time")
        end_ms = self._clock.now_ms + most_ms
        for _ in range(max_steps):
            if not self._step(end_ms, may_skip=True, latest_ms=end_ms) or self._clock.now_ms > end_ms:
                break
        else:
            if self._steps() or self._next_time() is not None:
                self._fail(f"is not idle after {max_steps} steps")
        if self._next_time() is not None or self._clock.now_ms > end_ms:
            self._fail(f"is not idle after {most_ms} ms, {most_ms / 86_400_000:.1f} days")

    def run_until(self, when: datetime, *, max_steps: int = _MOST_STEPS) -> None:
        """Take all steps up to a time, which it then is.

        Where there is only one virtual thread, a job that takes time is not interrupted: then it
        may be later.  Raises SimulationError after `max_steps` steps.
        """
        end_ms = _time_ms(when, "when")
        for _ in range(max_steps):
            if not self._step(end_ms, may_skip=True):
                break
        else:
            self._fail(f"has not come to {when} after {max_steps} steps")
        self._jump(max(end_ms, self._clock.now_ms))

    def advance(self, duration: timedelta | int = 0, **units: float) -> None:
        """run_until() a duration from now: milliseconds, a timedelta, or as in minutes=5."""
        from datetime import timedelta

        ms = _milliseconds(duration, "duration") + _milliseconds(timedelta(**units), "duration")
        self.run_until(_datetime(self._clock.now_ms + ms))

    # Faults.

    def crash(self, worker: int = 0) -> None:
        """Have a virtual worker die as by kill -9, and another one take its place.

        What it had claimed goes back; messages that ran count a crash.  A job under way is
        unwound by an exception, but nothing that it does then reaches the broker.
        """
        dying, caller = self._worker(worker), _virtual.thread
        with self._takeover.set_aside_engine():
            for thread in dying.threads:
                if thread.job is not None:
                    self._note(thread, thread.job, "crashed", None)
                    if thread is not caller:
                        thread.unwind()
        dying.slot.abandon()
        dying.boot()
        for other in self._workers:
            other.must_recover = True
        if caller is not None and caller.worker is dying:
            self._undo.enter_context(self._takeover.set_aside_engine())  # Until the job has ended.
            caller.is_dead = True
            raise _Crash

    def pause(self, worker: int = 0) -> None:
        """Have a virtual worker take no more messages."""
        self._worker(worker).is_paused = True

    def resume(self, worker: int = 0) -> None:
        """Undo pause()."""
        self._worker(worker).is_paused = False
        self._worker(worker).seen = None

    def _worker(self, number: int) -> _VirtualWorker:
        self._check_begun()
        if type(number) is not int or number not in range(len(self._workers)):
            raise ValueError(f"worker is {number!r}; there are {len(self._workers)}, counted from 0.")
        return self._workers[number]

    # Set-up.

    def __enter__(self) -> Simulation:
        if self._workers:
            raise RuntimeError("This simulation has been used; make another one by simulate().")
        if any(worker.broker is self.broker and worker._running() for worker in _live_workers):
            raise RuntimeError("This broker is worked on already, by a worker.")
        self._takeover.begin()
        self._pid = os.getpid()
        self._outer = _virtual.world, _virtual.thread, _runner.run_coroutine
        try:
            _virtual.world = self
            self._start_workers()
        except BaseException:  # The database can't be opened, say.
            self._restore()
            raise
        return self

    def _start_workers(self) -> None:
        logger = get_logger("dramalite.simulation")
        if logger.level == logging.NOTSET:  # What jobs die of is in the events.
            logger.setLevel(logging.CRITICAL)
        workers, threads = self._sizes
        for number in range(workers):
            worker = _VirtualWorker(self.broker, number, logger)
            self._workers.append(worker)
            for index in range(threads):
                worker.threads.append(_VirtualThread(worker, index, workers * threads > 1))

    def __exit__(self, *_error: object) -> None:
        try:
            if self._pid == os.getpid():
                self._end_workers()
            else:
                self._workers.clear()  # They and their threads are the parent's.
        finally:
            self._restore()

    def _end_workers(self) -> None:
        with contextlib.ExitStack() as ends:  # All of them, whatever one of them raises.
            for worker in reversed(self._workers):
                ends.callback(self._end_worker, worker)

    def _end_worker(self, worker: _VirtualWorker) -> None:
        busy = [(thread, thread.job) for thread in worker.threads if thread.job is not None]
        running = [thread for thread, _job in busy if thread.is_running]
        outcomes = [worker.cut_off(job) if thread in running else job.outcome for thread, job in busy]
        with contextlib.ExitStack() as ends:
            ends.callback(self._write_last, worker, busy, running, outcomes)
            for thread in worker.threads:
                ends.callback(self._end_thread, thread)

    def _end_thread(self, thread: _VirtualThread) -> None:
        with self._takeover.set_aside_engine():
            thread.end()

    def _write_last(
        self, worker: _VirtualWorker, busy: list[tuple[_VirtualThread, _Job]],
        running: list[_VirtualThread], outcomes: list[_Outcome],
    ) -> None:  # fmt: skip
        held_rows, worker.may_hold_rows = worker.may_hold_rows, True
        self.broker._engine.exchange(worker.slot, outcomes)
        worker.may_hold_rows = held_rows
        for (thread, job), outcome in zip(busy, outcomes):
            if thread not in running:
                self._note_end(thread, job)
            elif not outcome.is_handed_back:
                thread.error, job.result = "WorkerCrashed: its run was cut off", None
                self._note(thread, job, "dead", None)

    def _restore(self) -> None:
        """Give the broker back as it was."""
        _virtual.world, _virtual.thread, _runner.run_coroutine = self._outer
        for worker in self._workers:
            if worker.may_hold_rows:
                worker.slot.abandon()  # What it may still hold is a dead worker's.
            else:
                worker.slot.release()
        self._takeover.end()

    # Steps.

    def _step(
        self, end_ms: int | None, may_skip: bool = False, latest_ms: float = math.inf
    ) -> bool:
        """Take a step that is due by a time, if there is one.

        If it may, it then goes on to the next message by itself: one transaction instead of two.
        """
        if _virtual.thread is not None:
            raise RuntimeError("A simulated job can't take steps of a simulation.")
        self._check_begun()
        self._naps, self._latest_ms = 0, latest_ms
        while not (steps := self._steps()):
            next_ms = self._next_time()
            if next_ms is None or (end_ms is not None and next_ms > end_ms):
                return False
            self._jump(next_ms)

        def skip_to(due_ms: int) -> bool:
            if not may_skip or self._sizes != (1, 1) or (end_ms is not None and due_ms > end_ms):
                return False
            self._jump(due_ms)
            return True

        step = self._pick(steps)
        if self._choose is None or step in self._steps():  # choose() may have had a worker crash.
            self._take(step, skip_to)
        if self._naps > _MOST_NAPS:
            self._fail("has a job that waits or lets time pass without end")
        return True

    def _check_begun(self) -> None:
        if self._pid not in (0, os.getpid()):
            raise RuntimeError("The simulation is that of the process from which this one was forked; make another one.")
        if _virtual.world is not self:
            raise RuntimeError(
                "The simulation has not begun, or is over, or another one is inside, or this is another thread "
                "than its own: use it in its `with`, and wait for nothing of it in threads that jobs start."
            )

    def _steps(self) -> list[SimulatedStep]:
        """What can be done at this moment."""
        steps = []
        for worker in self._workers:
            if worker.must_recover:
                steps.append(SimulatedStep(worker.number, 0, "recover"))
                continue
            has_idle = False
            for thread in worker.threads:
                if thread.job is None:
                    if not has_idle and self._has_news(worker):
                        steps.append(SimulatedStep(worker.number, thread.index, "exchange"))
                    has_idle = True  # Of those that have nothing to do, one is as good as another.
                elif not thread.is_running:
                    steps.append(SimulatedStep(worker.number, thread.index, "exchange"))
                elif thread.wakes_at is not None and thread.wakes_at <= self._clock.now_ms:
                    steps.append(SimulatedStep(worker.number, thread.index, "resume"))
        return steps

    def _has_news(self, worker: _VirtualWorker) -> bool:
        """Tell whether something has changed since a worker found nothing to do."""
        return not worker.is_paused and worker.seen != self.broker._engine.changes()

    def _pick(self, steps: list[SimulatedStep]) -> SimulatedStep:
        if len(steps) == 1:
            return steps[0]
        if self._choose is None:
            return steps[int(self._schedule.random() * len(steps))]
        step = self._choose(steps)
        if step not in steps:
            raise ValueError(f"choose() returned {step!r}; it must return one of {steps!r}.")
        return step

    def _next_time(self) -> int | None:
        """When, after now, there will be something to do; None if never."""
        times = [t.wakes_at for w in self._workers for t in w.threads if t.wakes_at is not None]
        if not all(worker.is_paused for worker in self._workers):
            due = self.broker._engine.next_due()
            if due is not None:
                times.append(due)
        return min((time for time in times if time > self._clock.now_ms), default=None)

    def _jump(self, time_ms: int) -> None:
        self._clock.now_ms = time_ms
        for worker in self._workers:
            worker.seen = None

    def _take(self, step: SimulatedStep, skip_to: Callable[[int], bool]) -> None:
        worker = self._workers[step.worker]
        thread = worker.threads[step.thread]
        if step.action == "recover":
            for outcome in worker.recover():
                attempt = max(self._attempts[outcome.row.message_id], outcome.row.crashes)
                self.events.append(_death(outcome.row, attempt, worker.number, self._clock.now_ms))
        elif step.action == "resume":
            cast(_JobThread, thread.real).resume()
        else:
            done = thread.job
            held_rows, worker.may_hold_rows = worker.may_hold_rows, True
            row = worker.exchange([] if done is None else [done.outcome], skip_to)
            thread.job = None
            if done is not None:
                worker.slot.run(thread.index, 0)
                self._note_end(thread, done)
            if row is None:
                worker.seen = self.broker._engine.changes()
            else:
                thread.start(row, self._clock.now_ms, self._run)
            worker.may_hold_rows = held_rows

    def _run(self, thread: _VirtualThread) -> None:
        """Run a job up to its outcome."""
        try:
            _virtual.world, _virtual.thread = self, thread
            _runner.run_coroutine = functools.partial(_run_virtually, self._clock)
            thread.process()
        finally:
            _virtual.thread = _runner.run_coroutine = None
            self._undo.close()
            thread.ended_ms = self._clock.now_ms

    # Time that passes in jobs.

    def pass_time(self, ms: int) -> None:
        """Let time pass: for the job that runs in this thread, or outside of jobs for all."""
        thread = _virtual.thread
        if thread is None:
            self.advance(ms)
            return
        now_ms = self._clock.now_ms
        wakes_at = now_ms + ms
        self._naps += 1
        if thread.real is None and (self._naps > _MOST_NAPS or now_ms > self._latest_ms):
            thread.is_cut_off = True
            raise _Crash
        if thread.runner not in _interruptible:  # In a hook, which nothing interrupts.
            self._sleep(thread, wakes_at)
            return
        if thread.gives_up_at is not None and wakes_at >= thread.gives_up_at:
            if not thread.is_given_up:
                self._sleep(thread, thread.gives_up_at)
            thread.is_given_up = True
            thread.die()
        limits = [item for item in self.broker.middleware if isinstance(item, TimeLimit)]
        deadlines = [(item.deadline(thread.runner), item) for item in limits]
        ends = [
            (self._clock.when(end_s), item) for end_s, item in deadlines if end_s is not None
        ]
        end_ms, limit = min(ends, key=lambda end: end[0], default=(wakes_at + 1, None))
        self._sleep(thread, min(wakes_at, end_ms))
        if limit is not None and end_ms <= wakes_at:
            limit.expire(thread.runner, self._clock)
            thread.gives_up_at = end_ms + _whole_ms(_STUCK_GRACE_S)
            raise TimeLimitExceeded

    def _sleep(self, thread: _VirtualThread, wakes_at: int) -> None:
        if thread.is_dead:
            thread.die()
        if thread.real is None:
            self._jump(max(wakes_at, self._clock.now_ms))
        else:
            thread.sleep(wakes_at)

    def wait_for(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Let time pass until something is true; tell whether it came true in time."""
        end_ms = None if timeout_s is None else self._clock.now_ms + _whole_ms(timeout_s)
        steps = 0
        while not is_done():
            if end_ms is not None and self._clock.now_ms > end_ms:
                return False  # A job took longer.
            if _virtual.thread is not None:
                if end_ms is not None and self._clock.now_ms >= end_ms:
                    return False
                self.pass_time(_VIRTUAL_POLL_MS)
                # That is no job without an end where its wait has one; else it is soon to be ended.
                self._naps += 9 if end_ms is None else -1
            elif not self._step(end_ms):
                if end_ms is not None:
                    self._jump(max(end_ms, self._clock.now_ms))
                return is_done()
            elif (steps := steps + 1) > _MOST_STEPS:
                self._fail(f"has not come to what is waited for after {_MOST_STEPS} steps")
        return True

    def wait_for_others(self) -> None:
        """Let time pass for a job that waits for what only others can bring."""
        thread = cast(_VirtualThread, _virtual.thread)
        if thread.real is not None:
            self.pass_time(_VIRTUAL_POLL_MS)
            return
        self.pass_time(_MOST_MS)  # No other one can run before its deadline.
        self._naps = _MOST_NAPS + 1
        thread.is_cut_off = True
        raise _Crash

    # Events.

    def _note_end(self, thread: _VirtualThread, job: _Job) -> None:
        """Add the event of an attempt whose outcome was written."""
        self._note(thread, job, *_what_came_of(job, thread.is_skipped))

    def _note(self, thread: _VirtualThread, job: _Job, outcome: str, next_eta: int | None) -> None:
        row = job.row
        result, error, ended_ms = job.result, thread.error, thread.ended_ms
        if outcome == "crashed":
            result, error = None, "" if thread.is_running else _UNWRITTEN
            ended_ms = self._clock.now_ms if thread.is_running else ended_ms
        if row.message_id not in self._attempts:  # There may have been some before the simulation.
            retries = _retries(job.message) if thread.is_running else thread.retries
            self._attempts[row.message_id] = retries + row.crashes
        self._attempts[row.message_id] += 1
        self.events.append(
            SimulatedEvent(
                row.message_id, row.actor or (job.message.actor_name if job.message else ""),
                self._attempts[row.message_id], thread.started_ms, ended_ms, thread.worker.number,
                thread.index, outcome, next_eta, result, error, row.body,
            )
        )  # fmt: skip

    def _fail(self, problem: str) -> None:
        last = "".join(f"\n    {event}" for event in self.events[-10:])
        raise SimulationError(
            f"The simulation {problem}; it is {self.now}, and {len(self.broker._engine.bodies())} messages are not "
            f"finished. The last events:{last or ' none.'}"
        )


# ------------------------------------------------------------------------------------------
# Beginning a simulation
#
# What simulate() takes, checked where it is given.
# ------------------------------------------------------------------------------------------
#: Workers, and threads of each, that a simulation may have.
_MOST_VIRTUAL = 64


def simulate(
    broker: Broker | None = None,
    *,
    seed: int = 0,
    start: datetime | None = None,
    workers: int = 1,
    threads: int = 1,
    choose: Callable[[list[SimulatedStep]], SimulatedStep] | None = None,
) -> Simulation:
    """Run a broker's work in virtual time, in the calling thread; a context manager.

        with dramalite.simulate(seed=7) as sim:
            charge.send(42)
            sim.run_until_idle()
            assert [event.outcome for event in sim.events] == ["retry", "done"]

    The engine, the middleware and the actors are the real ones; only time is not, nor the order
    in which the `workers`, of so many `threads` each, get their turns.  That comes from the seed,
    or from `choose`, which is given what can be done next and returns one of it.  The same seed
    gives the same events.

    Without a `broker` the default one's actors run on an empty database in memory; a broker that
    is given is worked on as it is, a file with what it holds.  Jobs take no time, but for
    simulated_work(), broker.clock.sleep() and what coroutines await of asyncio's timers; with
    more than one virtual thread others run meanwhile.  Time starts at `start`: 2026-01-01 UTC, or
    when the last message was sent that the broker holds; a datetime without a time zone counts as UTC.

    No hooks of a worker's start and stop are called, rate limits of an earlier simulation of the
    same broker hold on, and backends of another broker (StubResultBackend, say) keep real time.
    Each job's coroutine has an event loop of its own: asyncio's locks and queues can't be shared
    between jobs, and tasks that it leaves behind are cancelled.
    """
    world = get_broker() if broker is None else broker
    if not isinstance(world, _EngineBroker):
        raise TypeError(f"{world!r} can't be simulated; give a broker of dramalite.")
    for value, name in ((workers, "workers"), (threads, "threads")):
        if type(value) is not int or not 1 <= value <= _MOST_VIRTUAL:
            raise ValueError(f"{name} is {value!r}; give 1 to {_MOST_VIRTUAL}.")
    if choose is not None and not callable(choose):
        raise TypeError(f"choose is {choose!r}; give a function that returns one of the steps it is given.")
    engine = _Engine(None, "full", lambda: world.clock) if broker is None else None
    start_ms = None if start is None else _time_ms(start, "start")
    if start_ms is not None and start_ms < 0:
        raise ValueError(f"start is {start!r}; give a time after 1970.")
    return Simulation(world, engine, seed, start_ms, (workers, threads), choose)


# ------------------------------------------------------------------------------------------
# Process logs
#
# What the command line's processes log: to one descriptor, which they share.
# ------------------------------------------------------------------------------------------
#: Tries of a process to be alone in writing to the log, and the pause between them.
_TURN_TRIES = 200
_TURN_NAP_S = 0.005


class _SafeFormatter(logging.Formatter):
    """Control characters are escaped and further lines indented: none can pass for another line."""

    def format(self, record: logging.LogRecord) -> str:
        return _storable(super().format(record)).replace("\n", "\n    ")


class _SafeHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A log that can't be written does not stop the work; entries of several processes stay whole."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(
            open(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        )
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        has_turn = _take_turn(self._descriptor)
        try:
            super().emit(record)
        finally:
            if has_turn:
                with contextlib.suppress(OSError):
                    _unlock_byte(self._descriptor, 0)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        if not (self.stream.closed or isinstance(sys.exc_info()[1], OSError)):
            super().handleError(record)


def _take_turn(descriptor: int) -> bool:
    """Lock a pipe or socket, where the writes of several processes would be mixed; False if it can't be."""
    with contextlib.suppress(OSError):  # Of macOS, say, which locks files alone.
        mode = os.fstat(descriptor).st_mode
        if not _WINDOWS and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            for _ in range(_TURN_TRIES):
                if _try_lock_byte(descriptor, 0):
                    return True
                _SYSTEM_CLOCK.sleep(_TURN_NAP_S)  # Not for ever: a process may be stopped while it has it.
    return False


def _set_up_logging(verbose: int, descriptor: int) -> None:
    """Log to a descriptor."""
    handler = _SafeHandler(descriptor)
    handler.setFormatter(_SafeFormatter(_LOG_FORMAT))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])


def _redirect(target: int, *descriptors: int) -> None:
    """Have standard descriptors stand for the file that `target` does, and need that no longer."""
    for descriptor in descriptors:
        os.dup2(target, descriptor)
    if target > 2:
        os.close(target)


# ------------------------------------------------------------------------------------------
# Child processes
#
# What the command line's supervisor starts: worker processes, which import the user's modules
# and run a Worker, and processes for fork functions.  They obey the supervisor through their
# standard input, a pipe: a line "stop" or "kill", or the pipe's end, which means that the
# supervisor is gone.
# ------------------------------------------------------------------------------------------
#: The variable of its environment that tells a child process what it is.
_CHILD_VARIABLE = "_DRAMALITE_CHILD"

_EXIT_OK, _EXIT_KILLED, _EXIT_IMPORT, _EXIT_CONNECTION, _EXIT_PID_FILE = range(5)

#: Milliseconds that running messages get in a worker process whose supervisor is gone,
_ORPHAN_GRACE_MS = 1000
_IMPORT_GRACE_MS = 5000  # and the imports of one that is told to stop.

#: Seconds for the last word to the database, where a process is to end at once.
_STOP_SLACK_S = 1.0

#: Seconds between two looks whether this process is still fit for work.
_WATCH_S = 1.0

#: Seconds within which the supervisor has noticed how a process died.
_DEATH_NOTE_S = 2.0

#: Files in the supervisor's folder of notes: its children's process ids, with how they died, which
#: functions to fork, and the ids of processes that could not start.
_CHILDREN_NOTE, _FORKS_NOTE, _FAILURES_NOTE = "children", "forks", "failures"

#: And one that it keeps locked while it lives.
_ALIVE_NOTE = "alive"


_is_child_process = False


class _ChildProcess(abc.ABC):
    """A process that the supervisor has started, apart from what it is for."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        import queue

        self._namespace = namespace
        kind = type(self).__name__.lstrip("_")
        self._logger = get_logger("dramalite", f"{kind}({namespace.child})")
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._has_started = False
        self._is_importing = True  # Nothing runs that is to be handed back.

    def run(self) -> NoReturn:
        """Work until told to stop; ends the process, for threads left by jobs must not hold it."""
        global _is_child_process
        _is_child_process = True
        self._detach_from_terminal()
        if self._namespace.watch is not None:  # A .pyc file hides a second change within its second.
            sys.dont_write_bytecode = True
        if not self._namespace.skip_logging:
            # To a descriptor of our own, which a job can't close by closing sys.stderr.
            _set_up_logging(self._namespace.verbose, os.dup(2))
        for stream in (sys.stdout, sys.stderr):  # A process that dies takes what it has not written along.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        for path in self._namespace.path or ():
            sys.path.insert(0, os.path.abspath(path))
        try:
            code = self._work()
        except _Unusable as error:
            self._logger.critical("%s", error)
            code = self._fail_to_start(_EXIT_IMPORT)
        except BrokerError as error:
            if self._has_started:
                raise
            self._logger.critical("%s", error)
            may_pass = not isinstance(error, BrokerConnectionError)  # All slots are taken, say.
            code = _EXIT_KILLED if may_pass else self._fail_to_start(_EXIT_CONNECTION)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # Closed by a job.
                stream.flush()
        os._exit(code)

    @abc.abstractmethod
    def _work(self) -> int:
        """Do what the process is for; return its exit code.

        Raises BrokerError or _Unusable, whose texts say all, where it can't start.
        """

    def _fail_to_start(self, code: int) -> int:
        """Note that this process can't start; return `code`, with which the supervisor is to end as well."""
        with contextlib.suppress(OSError), open(self._note(_FAILURES_NOTE), "a") as file:
            # For any exit code may be a job's.  The parent may be a launcher, the one the supervisor knows:
            # a virtual environment's python.exe on Windows, or a program packed into one file.
            file.write(f"{os.getpid()}\n{os.getppid()}\n")
        return code

    def _detach_from_terminal(self) -> None:
        """Take our pipe from standard input, leave Ctrl+C to the supervisor, hear SIGTERM."""
        import signal

        control = os.dup(0)
        _redirect(os.open(os.devnull, os.O_RDONLY), 0)
        threading.Thread(
            target=self._listen, args=(control,), name="dramalite-control", daemon=True
        ).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._events.put("terminate"))
        if not _WINDOWS:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            _give_forks_default_signals()
        for name in ("SIGHUP", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)

    def _listen(self, control: int) -> None:
        """Turn the supervisor's orders into events."""
        with contextlib.suppress(OSError):  # Closed by a job: then we are cut off all the same.
            while order := os.read(control, 64):
                for word in order.decode("ascii").split():
                    if word == "kill" and self._is_importing:
                        os._exit(_EXIT_KILLED)
                    self._events.put(word)
                    if word == "stop":
                        timeout = min(self._namespace.worker_shutdown_timeout, _IMPORT_GRACE_MS)
                        threading.Thread(target=self._end_start, args=(timeout,), daemon=True).start()
        if len(self._namespace.log_file) > 1:  # What copied to them was in the supervisor.
            _redirect(os.open(os.devnull, os.O_WRONLY), 1, 2)
        self._events.put("orphaned")
        self._end_start(_ORPHAN_GRACE_MS)

    def _end_start(self, timeout_ms: float) -> None:
        """End the process if it is still importing after this time."""
        _SYSTEM_CLOCK.sleep(min(timeout_ms / 1000, _LONGEST_WAIT_S))
        if not self._has_started:
            os._exit(_EXIT_KILLED)

    def _note(self, name: str) -> str:
        """The path of a note that the supervisor reads or writes."""
        return os.path.join(self._namespace.notes, name)


class _WorkerProcess(_ChildProcess):
    """A worker process: imports the user's modules and runs a Worker."""

    _worker: Worker

    def _work(self) -> int:
        namespace = self._namespace
        try:
            broker = self._import()
            forks = [_path_of(function) for item in broker.middleware for function in item.forks]
        except (BrokerConnectionError, _Unusable):
            raise
        except BaseException:  # The user's modules are foreign code.
            names = " ".join([namespace.broker, *namespace.modules])
            self._logger.exception("%s can't be imported; fix this and start again.", names)
            return self._fail_to_start(_EXIT_IMPORT)
        worker = self._worker = Worker(
            broker,
            queues=namespace.queues,
            worker_threads=namespace.threads,
            async_concurrency=namespace.async_concurrency,
        )
        self._is_importing = False
        worker.describe_death = self._describe_death
        worker.on_stuck = lambda: self._events.put("retire")
        worker.start()
        self._has_started = True
        self._tell_forks(forks)
        if namespace.child == "0":
            self._tell_what_for(broker)
        self._logger.info("Worker process is ready for action.")
        timeout = namespace.worker_shutdown_timeout
        event = self._next_event()
        if event == "orphaned":
            self._logger.warning("The supervisor is gone; leaving.")
            timeout = min(timeout, _ORPHAN_GRACE_MS)
        self._logger.info("Stopping worker process...")
        threading.Thread(target=self._await_kill, args=(event,), daemon=True).start()
        worker.stop(timeout)
        return _EXIT_OK

    def _tell_what_for(self, broker: _EngineBroker) -> None:
        """Log what the worker processes are for, and what looks like a mistake."""
        declared = broker.get_declared_queues()
        wanted = set(self._namespace.queues or declared)
        actors = [actor for actor in broker.actors.values() if actor.queue_name in wanted]
        queues = ", ".join(sorted(wanted & declared)) or "none"
        self._logger.info("At work on %r: %d actors, queues: %s.", broker, len(actors), queues)
        if broker._engine.path is None:
            self._logger.warning("%r lives in each process alone: what others send does not come here.", broker)
        for name in sorted(wanted - declared):
            known = ", ".join(sorted(declared)) or "none"
            self._logger.warning("No actor declares the queue %r of --queues; declared are: %s.", name, known)
        if not actors and not wanted - declared:
            hint = "If they are on another one, name it: MODULE:BROKER."
            for name, _file in _other_copies():
                hint = f"{name!r} is another copy of dramalite; if they are its, start `python -m {name} worker ...`."
            self._logger.warning("There is nothing to do: no actor is declared on this broker. %s", hint)

    def _tell_forks(self, forks: list[str]) -> None:
        """Note the functions that middleware wants to run in processes of their own."""
        draft = self._note(f"draft-{self._namespace.child}")
        # The supervisor and its folder are gone, or its disk is full; or, on Windows, it just reads what another one told.
        with contextlib.suppress(OSError):
            with open(draft, "w", encoding="utf-8") as file:
                file.write("\n".join(forks))
            os.replace(draft, self._note(f"{_FORKS_NOTE}{self._namespace.reloads}"))

    def _describe_death(self, pid: int) -> str:
        """How a process died, as its supervisor writes down in these moments; "" for a stranger."""
        deadline = _SYSTEM_CLOCK.monotonic() + _DEATH_NOTE_S
        cause: str | None = ""
        while cause == "" and _SYSTEM_CLOCK.monotonic() < deadline:
            cause = None
            with contextlib.suppress(OSError), open(self._note(_CHILDREN_NOTE), encoding="utf-8") as file:
                cause = dict(line.rstrip().partition(" ")[::2] for line in file).get(str(pid))
            if cause == "":
                _SYSTEM_CLOCK.sleep(0.02)
        return cause or ""

    def _next_event(self) -> str:
        """Wait, once the worker has started, for an order or what else is to end it."""
        import queue

        while True:
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=_WATCH_S)
            if self._worker.has_stopped():
                return "retire"  # By a job or a hook.
            # Looked at from here, since SQLite may sleep for seconds over closed descriptors.
            if self._worker.has_lost_descriptors():
                os._exit(_EXIT_KILLED)

    def _await_kill(self, event: str) -> None:
        """While stopping: end the process on an order to do so at once, or soon without a supervisor.

        What runs is handed back: it did not kill its process.  A service manager may signal us beside
        the supervisor: that is not a second order.
        """
        while event not in ("kill", "orphaned"):
            event = self._next_event()
        self._worker.stop(_ORPHAN_GRACE_MS if event == "orphaned" else 0)  # Hastens the stop under way,
        _SYSTEM_CLOCK.sleep(_STOP_SLACK_S)  # after which the main thread ends the process, unless that hangs.
        os._exit(_EXIT_KILLED)

    def _import(self) -> _EngineBroker:
        """Import the modules; return the broker that the first argument names."""
        module_name, _, attribute = self._namespace.broker.partition(":")
        module = _import_module(module_name)
        broker = _find_broker(module, module_name, attribute) if attribute else get_broker()
        broker.emit_after("process_boot")
        _enable_loggers()
        for name in self._namespace.modules:
            _import_module(name)
        if not isinstance(broker, _EngineBroker):
            raise _Unusable(f"{broker!r} is not a broker that dramalite can work on.")
        return broker


#: Seconds between two looks whether a signal has come.
_SIGNAL_LOOK_S = 0.5


class _ForkProcess(_ChildProcess):
    """A process that calls one function, MODULE:FUNCTION; its result is the exit code."""

    _is_leaving = False

    def _work(self) -> int:
        import signal

        module_name, _, path = self._namespace.child.partition(":")
        try:
            function = _find_attribute(_import_module(module_name), module_name, path)
            if not callable(function):
                raise _Unusable(f"'{self._namespace.child}' is not a function: {function!r}.")
        except _Unusable:
            raise
        except BaseException:  # The user's modules are foreign code.
            self._logger.exception("%s can't be imported.", self._namespace.child)
            return self._fail_to_start(_EXIT_IMPORT)
        self._has_started, self._is_importing = True, False
        signal.signal(signal.SIGTERM, self._leave)
        threading.Thread(target=self._end_when_told, daemon=True).start()
        try:
            code = function()
        except SystemExit as error:
            code = error.code
            if code is not None and not isinstance(code, int):  # A text means failure, as in Python.
                self._logger.error("%s ended with: %s", self._namespace.child, code)
                return _EXIT_KILLED
        except BaseException:  # Foreign code.
            self._logger.exception("%s failed.", self._namespace.child)
            return _EXIT_KILLED
        return code & 0xFF if isinstance(code, int) else _EXIT_OK

    def _leave(self, *_: Any) -> None:
        self._is_leaving = True
        sys.exit(_EXIT_OK)

    def _end_when_told(self) -> None:
        """Send the function SIGTERM; end the process if that does not, or at once if so told."""
        import _thread
        import queue
        import signal

        timeout = self._namespace.worker_shutdown_timeout
        if self._events.get() == "orphaned":
            timeout = min(timeout, _ORPHAN_GRACE_MS)
        deadline = _SYSTEM_CLOCK.monotonic() + timeout / 1000
        order, is_told = "", False
        while order != "kill" and (left := deadline - _SYSTEM_CLOCK.monotonic()) > 0:
            # Again where ours was not called: a signal that comes just before an endless wait does not end that.
            if not is_told or not self._is_leaving and signal.getsignal(signal.SIGTERM) == self._leave:
                is_told = True
                if _WINDOWS:
                    _thread.interrupt_main(signal.SIGTERM)
                else:
                    signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGTERM)
            with contextlib.suppress(queue.Empty):
                order = self._events.get(timeout=min(left, _SIGNAL_LOOK_S))
        os._exit(_EXIT_KILLED)


def _give_forks_default_signals() -> None:
    """Let SIGTERM end a process that a job forks, from its first moment.

    Blocked until the child has the default action: CPython drops what arrives before.
    """
    import signal

    masks = threading.local()

    def block() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def reset() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


class _Unusable(ImportError):
    """What the command line names or needs is not there, or no use; the text says all."""


def _enable_loggers() -> None:
    """Undo what logging.config does to all loggers that are there, unless it is told not to."""
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.partition(".")[0] == "dramalite" and isinstance(logger, logging.Logger):
            logger.disabled = False


def _import_module(name: str) -> types.ModuleType:
    import importlib

    try:
        try:
            module = importlib.import_module(name)
        finally:
            _enable_loggers()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # The module is there, and imports what is not.
        raise _Unusable(
            f"There is no module {error.name!r} in {os.getcwd()!r}, nor where Python looks for others; "
            f"start the command in the folder that has it, or give that as --path."
        ) from None
    for alias, file in _other_copies():
        if file == sys.modules[__name__].__file__:
            raise _Unusable(
                f"Module {name!r} imports dramalite as {alias!r}, but the command runs it as "
                f"{__name__!r}; start it with `python -m {alias} worker ...`."
            )
    return module


def _other_copies() -> Iterator[tuple[str, str | None]]:
    """Name and file of each module that is a dramalite, and not this one."""
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):  # None is in the place of one that is forbidden.
            continue
        attributes = object.__getattribute__(module, "__dict__")  # Not to load one that is lazy.
        name = attributes.get("__name__", "")
        mark = attributes.get(_EngineBroker.__name__)
        is_copy = isinstance(mark, type) and mark.__module__ == name
        if is_copy and name not in (__name__, "__main__", "__mp_main__"):
            yield name, attributes.get("__file__")


def _find_attribute(module: types.ModuleType, module_name: str, path: str) -> Any:
    """Follow an attribute path."""
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        raise _Unusable(f"Module {module_name!r} does not define a {path!r} variable.") from None


def _find_broker(module: types.ModuleType, module_name: str, path: str) -> Broker:
    """Follow an attribute path to a broker, or to a function that sets the default one."""
    value = _find_attribute(module, module_name, path)
    if isinstance(value, Actor) or hasattr(value, "__actor__"):
        raise _Unusable(f"'{module_name}:{path}' is an actor, not a Broker; give the module alone.")
    if callable(value) and not isinstance(value, Broker):
        value()
        return get_broker()
    if not isinstance(value, Broker):
        raise _Unusable(f"'{module_name}:{path}' is not a Broker.")
    return value


def _path_of(function: Callable[[], Any]) -> str:
    """MODULE:FUNCTION, by which another process finds the function."""
    path = f"{getattr(function, '__module__', '<unknown>')}:{getattr(function, '__qualname__', repr(function))}"
    if "<" in path:
        raise _Unusable(f"The fork function {path} can't be found by its name; define it in a module.")
    return path


# ------------------------------------------------------------------------------------------
# Source changes
#
# For `worker --watch`: a thread that compares the times and sizes of source files, as a rule twice a second.
# ------------------------------------------------------------------------------------------
_WATCH_INTERVAL_S = 0.5
_LONGEST_WATCH_INTERVAL_S = 60.0


def _watch_sources(
    folder: str, include: list[str], exclude: list[str], on_change: Callable[[str], None]
) -> None:
    """From now on call `on_change(path)`, in a thread, when a watched file has changed, come or gone.

    Watched is what matches one of `include` and none of `exclude`: shell patterns, for the
    path below the folder or for the last parts of it; `*.py` is always included.
    """
    roots = os.path.join(folder, ""), os.path.join(os.path.abspath(folder), "")
    folder, include = os.path.abspath(folder), ["*.py", *include]
    include, exclude = _patterns_below(roots, include), _patterns_below(roots, exclude)
    seen = _watched_files(folder, include, exclude)

    def watch() -> None:
        nonlocal seen
        look_s = 0.0
        while True:
            # A large folder takes a tenth of a CPU.
            _SYSTEM_CLOCK.sleep(min(max(_WATCH_INTERVAL_S, 10 * look_s), _LONGEST_WATCH_INTERVAL_S))
            began = _SYSTEM_CLOCK.monotonic()
            files = _watched_files(folder, include, exclude)
            look_s = _SYSTEM_CLOCK.monotonic() - began
            changed = files.items() ^ seen.items()
            seen = files
            if changed:
                on_change(min(changed)[0])

    threading.Thread(target=watch, name="dramalite-watch", daemon=True).start()


def _patterns_below(roots: tuple[str, ...], patterns: list[str]) -> list[str]:
    """Patterns for paths below a folder, which may begin with its path, as it was given or whole."""
    normal = os.path.normcase
    below = [p[len(root) - 1 :] for p in patterns for root in roots if normal(p).startswith(normal(root))]
    return ["*/" + p.lstrip("/") for p in patterns] + below


def _watched_files(folder: str, include: list[str], exclude: list[str]) -> dict[str, tuple[int, int]]:
    """Modification time and size of each file to watch, by its path below the folder."""
    import fnmatch

    def matches(path: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(f"/{path}", pattern) for pattern in patterns)

    found = {}
    whole = [pattern for pattern in exclude if pattern.endswith("*")]  # Those that leave nothing of a folder.
    for parent, folders, names in os.walk(folder):
        below = os.path.join(os.path.relpath(parent, folder), "") if parent != folder else ""
        folders[:] = [n for n in folders if n != "__pycache__" and not matches(f"{below}{n}/", whole)]
        for path in (below + name for name in names):
            if matches(path, include) and not matches(path, exclude):
                with contextlib.suppress(OSError):  # Gone already.
                    status = os.stat(os.path.join(folder, path))
                    found[path] = (status.st_mtime_ns, status.st_size)
    return found


# ------------------------------------------------------------------------------------------
# Pid files
#
# A pid file is locked while its supervisor lives, and removed by it alone.
# ------------------------------------------------------------------------------------------
#: The byte of a pid file that is locked: one beyond its end, for all may read it.
_PID_FILE_LOCK = 4096


class _PidFileError(Exception):
    """The pid file can't be used; the text says why."""


@contextlib.contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    """Hold a file with our process id; raise _PidFileError if another process holds it."""
    if path is None:
        yield
        return
    path = os.path.realpath(path)  # A link stays one.
    descriptor = _open_pid_file(path)
    own = str(os.getpid()).encode("ascii")
    try:
        try:
            os.chmod(path, 0o644)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, own)
        except OSError as error:
            raise _PidFileError(f"The pid file {path!r} can't be written: {error}.") from error
        yield
    finally:
        is_ours = False
        with contextlib.suppress(OSError):
            os.lseek(descriptor, 0, os.SEEK_SET)
            is_ours = os.read(descriptor, 32) in (own, b"") and _file_identity(descriptor) == _file_identity(path)
        if _WINDOWS:  # Where no open file is removed; not one either that the next starter has open.
            os.close(descriptor)
        with contextlib.suppress(OSError):  # It may be another's by now, or may not be removed.
            if is_ours:
                os.remove(path)
        if not _WINDOWS:
            os.close(descriptor)


def _open_pid_file(path: str) -> int:
    """Open the file and lock it, for one supervisor at a time."""
    while True:
        _check_pid_file(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise _PidFileError(f"The pid file {path!r} can't be written: {error}.") from error
        if not _try_lock_byte(descriptor, _PID_FILE_LOCK):
            os.close(descriptor)
            raise _PidFileError(f"The pid file {path!r} belongs to a process that is just starting.")
        if _file_identity(descriptor) == _file_identity(path):
            return descriptor
        os.close(descriptor)  # Its former owner has removed it meanwhile.


def _check_pid_file(path: str) -> None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # Nothing to be written over, or removed.
            raise _PidFileError(f"The pid file {path!r} is not a regular file; give another path.")
        with open(path, encoding="ascii") as file:
            pid = int(file.read().strip() or 0)  # Empty where a starter died: its lock tells.
    except FileNotFoundError:
        return
    except ValueError:
        raise _PidFileError(f"The pid file {path!r} holds no process id; check and remove it.") from None
    except OSError as error:
        raise _PidFileError(f"The pid file {path!r} can't be read: {error}.") from error
    if pid != os.getpid() and pid > 0 and _process_is_alive(pid):
        raise _PidFileError(f"The pid file {path!r} belongs to process {pid}, which is running.")


# ------------------------------------------------------------------------------------------
# Supervisor
#
# What the command `worker` runs: it takes signals, starts the child processes, replaces those
# that die, and tells them to stop; it imports no user code.
# ------------------------------------------------------------------------------------------
#: Seconds before a dead child process is replaced, by the number of early deaths in a row.
_RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_STABLE_AFTER_S = 30.0  # A death before that is an early one.

#: Signals to stop that come within so many seconds are one request.
_SAME_STOP_S = 0.1

#: Seconds from the request to stop at once to SIGKILL; in them what runs is handed back.
_KILL_GRACE_S = 3.0
_STOP_GRACE_S = _BUSY_TIMEOUT_S + 5.0  # After the timeout of a stop, for the last word to the database.

#: Seconds for the last lines to get to several log files, which a job's process may hold open.
_LAST_LOG_S = 1.0

#: Seconds between two looks whether a worker process has noted its fork functions.
_FORKS_POLL_S = 0.05


class _Child:
    """A child process that the supervisor keeps running."""

    def __init__(self, name: str) -> None:
        self.name = name  # A worker process's number, or a fork function's MODULE:FUNCTION.
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.early_deaths = 0
        self.restart_at: float | None = None  # Infinite: when something changes.
        self.after_stop = ""  # "restart" or "stay away", where it was told to stop.
        self.kill_at = math.inf  # Where it was told to end.

    @property
    def is_fork(self) -> bool:
        return ":" in self.name

    def __str__(self) -> str:
        return f"{'Fork' if self.is_fork else 'Worker'} process {self.name}"

    def tell(self, order: str) -> None:
        """Send an order, if it runs."""
        if self.process is not None:
            with contextlib.suppress(OSError):  # It has ended by itself.
                cast("IO[bytes]", self.process.stdin).write(f"{order}\n".encode("ascii"))


class _Supervisor:
    """Keeps child processes running.  What is to be done comes in through one queue, from signal
    handlers, from a thread per child that waits for its end, and from the watch."""

    def __init__(self, namespace: argparse.Namespace, command: list[str], folder: str) -> None:
        import queue

        self._namespace = namespace
        self._command = command  # That starts this program again, as a child process,
        self._folder = folder  # and where.
        self._logger = get_logger("dramalite.MainProcess")
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._children = {str(i): _Child(str(i)) for i in range(namespace.processes)}
        self._notes = ""  # The folder of notes.
        self._copier: threading.Thread | None = None  # Where there are several log files.
        self._forks_due: float | None = None  # Until when to wait for the note of the forks.
        self._reloads = 0
        self._stops = 0  # How often a stop was asked for,
        self._stopped_at = 0.0  # and when last.
        self._exit_code = _EXIT_OK

    def run(self) -> int:
        """Supervise until stopped; return the exit code."""
        namespace = self._namespace
        _open_standard_descriptors()
        try:
            self._open_logs()
        except OSError as error:
            print(f"dramalite: the log file can't be opened: {error}", file=sys.stderr)
            return _EXIT_IMPORT
        if not namespace.skip_logging:
            _set_up_logging(namespace.verbose, 2)
        try:
            with self._catching_signals(), _pid_file(namespace.pid_file), _notes_folder() as self._notes:
                self._logger.info("dramalite %s is booting up.", __version__)
                if namespace.watch is not None:
                    self._watch()
                for child in list(self._children.values()):
                    self._start(child)
                self._await_forks()
                while self._has_children():
                    self._next_task()()
                self._logger.info("Bye.")
                return self._exit_code
        except (_PidFileError, _Unusable) as error:
            self._logger.critical("%s", error)
            return _EXIT_IMPORT if isinstance(error, _Unusable) else _EXIT_PID_FILE
        finally:
            self._close_logs()

    def _open_logs(self) -> None:
        """Send standard output and error to the log files, children's too."""
        paths = self._namespace.log_file
        files: list[int] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        if self._reloads:  # To wait for a FIFO's reader would keep all signals waiting.
            flags |= getattr(os, "O_NONBLOCK", 0)
        try:
            for path in paths:
                files.append(os.open(path, flags, 0o644))
                if _WINDOWS:  # Which appends in this process alone: the children write where it stands.
                    os.lseek(files[-1], 0, os.SEEK_END)
                else:
                    os.set_blocking(files[-1], True)
        except OSError:
            for descriptor in files:
                os.close(descriptor)
            raise
        if not files:
            return
        target, self._copier = files[0], None
        if len(files) > 1:
            source, target = os.pipe()
            self._copier = threading.Thread(target=_copy_to_all, args=(source, files), daemon=True)
            self._copier.start()
        _redirect(target, 1, 2)

    def _close_logs(self) -> None:
        """Have all that was logged in the files."""
        if self._copier is None:
            return
        _redirect(os.open(os.devnull, os.O_WRONLY), 1, 2)
        self._copier.join(_LAST_LOG_S)

    def _watch(self) -> None:
        def on_change(path: str) -> None:
            self._events.put(functools.partial(self._reload, f"a change of {path}"))

        namespace = self._namespace
        _watch_sources(namespace.watch, namespace.watch_include, namespace.watch_exclude, on_change)

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Queue what signals ask for meanwhile."""
        import signal

        def stop(number: int, _frame: Any) -> None:
            self._events.put(functools.partial(self._stop, signal.Signals(number).name))

        def reload(_number: int, _frame: Any) -> None:
            self._events.put(functools.partial(self._reload, "SIGHUP"))

        handlers: dict[str, Any] = {"SIGINT": stop, "SIGTERM": stop, "SIGBREAK": stop, "SIGHUP": reload}
        handlers["SIGCHLD"] = signal.SIG_DFL  # Inherited as ignored, it would hide how children end.
        before = {
            getattr(signal, name): signal.signal(getattr(signal, name), handler)
            for name, handler in handlers.items()
            if hasattr(signal, name)
        }
        blocked: Any = ()
        if hasattr(signal, "pthread_sigmask"):  # Inherited as blocked, they could not end it.
            blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        try:
            yield
        finally:
            if blocked:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for number, former in before.items():
                signal.signal(number, signal.SIG_DFL if former is None else former)

    def _has_children(self) -> bool:
        """Tell whether a child runs, or is to be started."""
        return any(
            child.process is not None or (child.restart_at is not None and not self._stops)
            for child in self._children.values()
        )

    def _next_task(self) -> Callable[[], None]:
        """What is to be done next: a restart or the start of the forks if it is due, or an event."""
        import queue

        while True:
            now = _SYSTEM_CLOCK.monotonic()
            # A signal does not end a wait where it comes just before it, or to another thread.
            wait_s = _SIGNAL_LOOK_S
            for child in self._children.values():
                if child.restart_at is not None:
                    if child.restart_at <= now:
                        return functools.partial(self._start, child)
                    wait_s = min(wait_s, child.restart_at - now)
                if child.kill_at <= now:
                    return functools.partial(self._kill, child)
                wait_s = min(wait_s, child.kill_at - now)
            if self._forks_due is not None:
                if self._has_booted() or now >= self._forks_due:
                    return self._start_forks
                wait_s = min(wait_s, _FORKS_POLL_S)
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=wait_s)

    def _start(self, child: _Child) -> None:
        import queue
        import subprocess

        child.restart_at = None
        child.after_stop = ""
        child.started_at = _SYSTEM_CLOCK.monotonic()
        told = {
            **vars(self._namespace), "child": child.name, "notes": self._notes, "reloads": self._reloads
        }  # fmt: skip
        environment = {**os.environ, _CHILD_VARIABLE: json.dumps(told, default=str)}
        started: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()

        def await_exit() -> None:
            if (process := started.get()) is not None:
                self._events.put(functools.partial(self._bury, child, process, process.wait()))

        try:
            os.makedirs(self._notes, 0o700, exist_ok=True)  # A cleaner of old files may have been there.
            waiter = threading.Thread(target=await_exit, daemon=True)
            waiter.start()
            with _without_stop_signals():  # Until the child is ready for them.
                child.process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, bufsize=0, env=environment, cwd=self._folder
                )
            started.put(child.process)
            self._note_child(child.process.pid, "")
        except (OSError, RuntimeError) as error:  # Too many processes, no memory: that may pass.
            self._logger.critical("%s can't be started: %s; trying again.", child, error)
            started.put(None)
            child.restart_at = child.started_at + _RESTART_DELAYS_S[-1]

    def _note_child(self, pid: int, death: str) -> None:
        with contextlib.suppress(OSError):  # A full disk costs the cause of a death, no more.
            with open(os.path.join(self._notes, _CHILDREN_NOTE), "a", encoding="utf-8") as file:
                file.write(f"{pid} {death}\n")

    def _await_forks(self) -> None:
        """Start the fork functions once a worker process runs, or the time for that is over."""
        timeout_s = self._namespace.worker_fork_timeout / 1000
        self._forks_due = _SYSTEM_CLOCK.monotonic() + timeout_s

    def _start_forks(self) -> None:
        self._forks_due = None
        functions = list(self._namespace.fork_function)
        note = self._forks_note()
        with contextlib.suppress(OSError), open(note, encoding="utf-8") as file:
            functions += file.read().split()
        for name in dict.fromkeys(functions) if not self._stops else ():
            child = self._children.setdefault(name, _Child(name))
            if child.process is None:
                self._start(child)
            elif child.after_stop:
                child.after_stop = "restart"

    def _bury(self, child: _Child, process: subprocess.Popen[bytes], code: int) -> None:
        """A child has ended: replace it, unless it was to end or can't start at all."""
        child.process = None
        child.kill_at = math.inf
        cast("IO[bytes]", process.stdin).close()
        self._note_child(process.pid, _describe_exit(code))
        now = _SYSTEM_CLOCK.monotonic()
        if self._could_not_start(process) and (child.is_fork or not self._has_booted()):
            if self._reloads and self._namespace.watch is not None and not self._stops:
                child.restart_at = now if child.after_stop == "restart" else math.inf
                self._logger.info("%s waits for the next change.", child)
                return
            self._exit_code = code
            if not self._stops:
                self._stop("")
            return
        if self._stops and code < 0 and self._exit_code == _EXIT_OK:
            self._logger.critical("%s was killed by %s while it stopped.", child, _describe_exit(code))
            self._exit_code = _EXIT_KILLED
        if self._stops or child.after_stop == "stay away":
            return
        if child.after_stop == "restart":
            child.early_deaths = 0
            child.restart_at = now
            return
        if child.is_fork and code == _EXIT_OK:
            self._logger.info("%s has ended.", child)
            return
        lived_s = now - child.started_at
        child.early_deaths = 0 if lived_s > _STABLE_AFTER_S else child.early_deaths + 1
        delay_s = _RESTART_DELAYS_S[min(max(child.early_deaths - 1, 0), len(_RESTART_DELAYS_S) - 1)]
        if code == _EXIT_OK:
            self._logger.info("%s left (PID %d); starting another.", child, process.pid)
        else:
            self._logger.critical(
                "%s (PID %d) died with %s; starting another in %.1f s.",
                child, process.pid, _describe_exit(code), delay_s,
            )  # fmt: skip
        child.restart_at = now + delay_s

    def _could_not_start(self, process: subprocess.Popen[bytes]) -> bool:
        with contextlib.suppress(OSError), open(os.path.join(self._notes, _FAILURES_NOTE)) as file:
            return str(process.pid) in file.read().split()
        return False

    def _has_booted(self) -> bool:
        """Tell whether a worker process has started to work, since the last reload if there was one."""
        return os.path.exists(self._forks_note())

    def _forks_note(self) -> str:
        """The note by worker processes that were started since the last reload: others have older code."""
        return os.path.join(self._notes, f"{_FORKS_NOTE}{self._reloads}")

    def _reload(self, reason: str) -> None:
        """Have the children stop, and others with the code as it is now take their places."""
        if self._stops:
            return
        self._logger.info("Reloading after %s.", reason)
        self._reloads += 1
        try:
            if not _WINDOWS:  # Where no open file is moved, and two that are opened would overwrite each other.
                self._open_logs()  # The files may have been moved away to start new ones.
        except OSError as error:
            self._logger.error("A log file can't be opened anew: %s.", error)
        for child in self._children.values():
            if child.process is not None:
                child.after_stop = "stay away" if child.is_fork else "restart"
                self._end(child)
            else:
                child.restart_at = None if child.is_fork else _SYSTEM_CLOCK.monotonic()
        self._await_forks()

    def _stop(self, cause: str) -> None:
        """Ask the children to stop; the second time, at once."""
        now = _SYSTEM_CLOCK.monotonic()
        if self._stops and now < self._stopped_at + _SAME_STOP_S:
            return  # One request that came twice: to us and to our process group.
        self._stops += 1
        self._stopped_at = now
        if cause:
            self._logger.info("Stopping on %s; once more to stop at once.", cause)
        if self._stops > 1:
            self._exit_code = _EXIT_KILLED
        for child in self._children.values():
            child.restart_at = None
            self._end(child)

    def _end(self, child: _Child) -> None:
        """Have a child stop, or end at once, if it runs; kill it where it does not."""
        if child.process is None:
            return
        is_first = self._stops <= 1
        child.tell("stop" if is_first else "kill")
        stop_s = self._namespace.worker_shutdown_timeout / 1000 + _STOP_GRACE_S
        kill_at = _SYSTEM_CLOCK.monotonic() + (stop_s if is_first else _KILL_GRACE_S)
        child.kill_at = min(child.kill_at, kill_at)

    def _kill(self, child: _Child) -> None:
        child.kill_at = math.inf
        if child.process is not None:
            child.process.kill()


def _open_standard_descriptors() -> None:
    """Open standard input, output and error on nothing where they were closed, or a file would be them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest number that is free.


@contextlib.contextmanager
def _notes_folder() -> Iterator[str]:
    """Make a folder for notes; remove those of supervisors that were killed."""
    import shutil
    import tempfile

    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if entry.name.startswith("dramalite-") and _is_left_behind(entry.path):
                shutil.rmtree(entry.path, ignore_errors=True)
    try:
        temporary = tempfile.TemporaryDirectory(prefix="dramalite-", ignore_cleanup_errors=True)
        descriptor = os.open(os.path.join(temporary.name, _ALIVE_NOTE), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise _Unusable(
            f"No temporary folder can be made: {error}; have the environment's TMPDIR name a writable one."
        ) from error
    with temporary as folder:
        try:
            with contextlib.suppress(OSError):
                _try_lock_byte(descriptor, 0)
            yield folder
        finally:
            os.close(descriptor)


def _is_left_behind(folder: str) -> bool:
    """Tell whether nobody holds the lock in a folder of notes; a new one's may not be locked yet."""
    try:
        descriptor = os.open(os.path.join(folder, _ALIVE_NOTE), os.O_RDWR)
    except OSError:
        return False
    try:
        age_s = _SYSTEM_CLOCK.time_ms() / 1000 - os.fstat(descriptor).st_mtime
        return age_s > 60 and _try_lock_byte(descriptor, 0)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _without_stop_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back meanwhile, in this thread and in processes that it starts."""
    import signal

    if _WINDOWS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _copy_to_all(source: int, files: list[int]) -> None:
    """Write to each of the files what comes through a pipe, until its end."""
    while data := os.read(source, 1 << 16):
        for file in files:
            with contextlib.suppress(OSError):  # A full disk costs that log, no more.
                os.write(file, data)
    for descriptor in (source, *files):
        os.close(descriptor)


def _describe_exit(code: int) -> str:
    """An exit code in words: the name of the signal where it was one."""
    if code < 0:
        import signal

        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


# ------------------------------------------------------------------------------------------
# Command line
#
# A child process is the same program once more; a variable of its environment tells it what it is.
# ------------------------------------------------------------------------------------------
#: Where this program was started, unless it has changed the folder before its imports.
try:
    _START_FOLDER = os.getcwd()
except OSError:  # It was deleted.
    _START_FOLDER = os.curdir


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="dramalite", description="Background tasks in one file: Dramatiq's API on SQLite."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    worker = make_argument_parser()
    commands.add_parser(
        "worker", help="run the actors of your modules", description=worker.description,
        parents=[worker], add_help=False,
    )  # fmt: skip
    return parser


def make_argument_parser() -> argparse.ArgumentParser:
    """Return the parser of what follows `worker`; main() accepts the namespaces it makes."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="dramalite worker",
        description="Run the actors of your modules until stopped by Ctrl+C or SIGTERM; SIGHUP starts "
        "the worker processes anew.",
    )
    add = parser.add_argument
    add("--version", action="version", version=__version__)
    add("broker", type=_module_name, metavar="MODULE[:BROKER]", help="a module of actors, and its broker")
    add(
        "modules", nargs="*", type=_module_name, default=[], metavar="MODULE",
        help="more modules to import",
    )  # fmt: skip
    add(
        "--processes", "-p", type=_count, default=os.cpu_count() or 1, metavar="N",
        help="worker processes (default: the number of CPUs, %(default)s)",
    )  # fmt: skip
    add(
        "--threads", "-t", type=_positive_count, default=8, metavar="N",
        help="threads per process (default: %(default)s)",
    )  # fmt: skip
    add(
        "--async-concurrency", type=_positive_count, default=100, metavar="N",
        help="messages of async actors that a process runs at once (default: %(default)s)",
    )  # fmt: skip
    add(
        "--queues", "-Q", nargs="*", metavar="Q",
        help="work on these queues only; after the modules, or before -- (default: all)",
    )  # fmt: skip
    add(
        "--path", "-P", nargs="*", default=["."], metavar="DIR",
        help="where to import modules from; after the modules, or before -- (default: the current folder)",
    )  # fmt: skip
    add("--pid-file", metavar="FILE", help="write the process id here")
    add(
        "--log-file", action="append", default=[], metavar="FILE",
        help="append the log and all output here, once more for another file (default: stderr)",
    )  # fmt: skip
    add("--skip-logging", action="store_true", help="leave the set-up of logging to your modules")
    add("--verbose", "-v", action="count", default=0, help="log debug messages too")
    add(
        "--worker-shutdown-timeout", type=_count, default=600_000, metavar="MS",
        help="how long running messages may take when stopping (default: %(default)s ms)",
    )  # fmt: skip
    add(
        "--fork-function", "-f", action="append", type=_function_path, default=[],
        metavar="MODULE:FUNCTION", help="call this in a process of its own, once the workers run",
    )  # fmt: skip
    add(
        "--worker-fork-timeout", type=_fork_timeout, default=30_000.0, metavar="MS",
        help="how long fork functions wait for a worker process to run (default: 30000 ms)",
    )  # fmt: skip
    add("--watch", type=_folder, metavar="DIR", help="reload when *.py files in this folder change")
    add(
        "--watch-include", "-i", action="append", default=[], metavar="PATTERN",
        help="watch the files that match this as well",
    )  # fmt: skip
    add(
        "--watch-exclude", "-x", action="append", default=[], metavar="PATTERN",
        help="do not watch the files that match this",
    )  # fmt: skip
    add("--watch-use-polling", action="store_true", help="accepted; watching always polls")
    add("--use-spawn", action="store_true", help="accepted; processes are always spawned")
    return parser


def _argument_error(text: str) -> Exception:
    """What argparse wants raised for an argument that it is to refuse with this text."""
    import argparse

    return argparse.ArgumentTypeError(text)


def _module_name(text: str) -> str:
    """An argument that is the name of a module, perhaps with an attribute after a colon."""
    name = text.partition(":")[0]
    if name.endswith(".py") or "/" in name or "\\" in name:
        raise _argument_error(
            f"{text!r} is a path; give the module's name as in an import, and its folder by --path"
        )
    if name == "__main__":
        raise _argument_error(
            "'__main__' is another module in each process; give the name under which it can be imported"
        )
    return text


def _count(text: str, least: int = 0) -> int:
    """An argument that is a whole number."""
    if not text.strip().isdecimal() or int(text) < least:
        raise _argument_error(f"{text!r} is not a whole number from {least} on")
    return int(text)


_positive_count = functools.partial(_count, least=1)


def _fork_timeout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _argument_error(f"{text!r} is no number") from None
    if not 10 <= value <= 1_800_000:
        raise _argument_error(f"{text} ms is not between 10 ms and 30 minutes")
    return value


def _function_path(text: str) -> str:
    module, _, function = text.partition(":")
    if not module or not function:
        raise _argument_error(f"{text!r} is not of the form MODULE:FUNCTION")
    return text


def _folder(text: str) -> str:
    if not os.path.isdir(text):
        raise _argument_error(f"{text!r} is not a folder")
    return text


def main(args: list[str] | argparse.Namespace | None = None) -> int:
    """Run the command line, or what make_argument_parser() made of one; return the exit code.

    Raises ImportError in a module that a worker process imports: it would start workers for ever.
    """
    import argparse

    if _is_child_process:
        raise ImportError(
            "This module starts workers when it is imported, as it is by each of them: put the call of "
            "main() under `if __name__ == \"__main__\":`."
        )
    told = os.environ.pop(_CHILD_VARIABLE, None)
    if told is not None:
        child = argparse.Namespace(**json.loads(told))
        (_ForkProcess if ":" in child.child else _WorkerProcess)(child).run()
    parser = _parser()
    namespace = args if isinstance(args, argparse.Namespace) else parser.parse_args(args)
    if namespace.threads + namespace.async_concurrency > _MAX_TRACKED:
        parser.error(
            f"--threads {namespace.threads} and --async-concurrency {namespace.async_concurrency} are more "
            f"than {_MAX_TRACKED} together; use more --processes instead."
        )
    if not sys.executable:
        parser.error("this Python does not know where it is (sys.executable is empty); start it by its path.")
    return _Supervisor(namespace, *_child_command(args is None)).run()


def _child_command(is_main: bool) -> tuple[list[str], str]:
    """The command that starts this very program again, and the folder for it.

    Where the program gives main() its arguments, what it does before is not done again.
    """
    import subprocess

    own = sys.argv[1:]
    if getattr(sys, "frozen", False):  # Its executable is no Python.
        return [sys.executable, *own], _START_FOLDER
    if is_main and own and sys.orig_argv[-len(own) :] == own:
        command = [sys.executable, *sys.orig_argv[1:]]
        main_module = sys.modules["__main__"]
        if main_module.__spec__ is None and getattr(main_module, "__file__", None):
            command[-len(own) - 1] = cast(str, main_module.__file__)
        return command, _START_FOLDER
    # With the path that this program has, whatever it was made of.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    program = f"import sys; sys.path[:] = {path!r}; from {__name__} import main; sys.exit(main())"
    flags = cast(Any, subprocess)._args_from_interpreter_flags()  # As multiprocessing does.
    return [sys.executable, *flags, "-c", program], os.curdir


# ------------------------------------------------------------------------------------------
# Module paths
#
# Dramatiq's modules under this module's name, so that a move in either direction changes the
# root of an import and nothing else.
# ------------------------------------------------------------------------------------------
_MODULES: dict[str, str] = {
    "actor": "Actor actor",
    "asyncio": "async_to_sync get_event_loop_thread=_get_event_loop_thread",
    "broker": "ActorNotFound Broker Consumer MessageProxy get_broker set_broker",
    "brokers": "",
    "brokers.rabbitmq": "",
    "brokers.redis": "",
    "brokers.stub": "QueueNotFound StubBroker",
    "cli": "RET_CONNECT=_EXIT_CONNECTION RET_IMPORT=_EXIT_IMPORT RET_KILLED=_EXIT_KILLED RET_OK=_EXIT_OK "
    "RET_PIDFILE=_EXIT_PID_FILE main make_argument_parser",
    "common": "current_millis=_current_millis dq_name=_dq_name q_name=_q_name xq_name=_xq_name",
    "composition": "group pipeline",
    "encoder": "Encoder JSONEncoder PickleEncoder",
    "errors": "ActorNotFound BrokerConnectionError BrokerError ConnectionClosed ConnectionFailed "
    "ConnectionError=BrokerConnectionError DecodeError DramaliteError DramatiqError QueueJoinTimeout "
    "QueueNotFound RateLimitExceeded Retry",
    "generic": "GenericActor",
    "logging": "get_logger",
    "message": "Message get_encoder set_encoder",
    "middleware": "AgeLimit AsyncIO Callbacks CurrentMessage GroupCallbacks Interrupt Middleware "
    "MiddlewareError Pipelines Prometheus Retries Shutdown ShutdownNotifications SkipMessage TimeLimit "
    "TimeLimitExceeded default_middleware raise_thread_exception",
    "middleware.age_limit": "AgeLimit",
    "middleware.asyncio": "AsyncIO",
    "middleware.callbacks": "Callbacks",
    "middleware.current_message": "CurrentMessage",
    "middleware.group_callbacks": "GroupCallbacks",
    "middleware.middleware": "Middleware MiddlewareError SkipMessage",
    "middleware.pipelines": "Pipelines",
    "middleware.prometheus": "Prometheus",
    "middleware.retries": "DEFAULT_MAX_BACKOFF=_MAX_BACKOFF_MS DEFAULT_MIN_BACKOFF=_MIN_BACKOFF_MS Retries",
    "middleware.shutdown": "Shutdown ShutdownNotifications",
    "middleware.threading": "Interrupt raise_thread_exception",
    "middleware.time_limit": "TimeLimit TimeLimitExceeded",
    "rate_limits": "Barrier BucketRateLimiter ConcurrentRateLimiter RateLimitExceeded RateLimiter "
    "RateLimiterBackend WindowRateLimiter",
    "rate_limits.backend": "RateLimiterBackend",
    "rate_limits.backends": "StubBackend=StubRateLimiterBackend SQLiteBackend=SQLiteRateLimiterBackend",
    "rate_limits.backends.memcached": "",
    "rate_limits.backends.redis": "",
    "rate_limits.backends.stub": "StubBackend=StubRateLimiterBackend",
    "rate_limits.barrier": "Barrier",
    "rate_limits.bucket": "BucketRateLimiter",
    "rate_limits.concurrent": "ConcurrentRateLimiter",
    "rate_limits.rate_limiter": "RateLimitExceeded RateLimiter",
    "rate_limits.window": "WindowRateLimiter",
    "results": "Missing ResultBackend ResultError ResultFailure ResultMissing ResultTimeout "
    "ResultUnavailable Results",
    "results.backend": "DEFAULT_TIMEOUT=_DEFAULT_RESULT_TIMEOUT_MS MResult=Any Missing Result=Any ResultBackend "
    "ResultMissing ResultTimeout",
    "results.backends": "StubBackend=StubResultBackend SQLiteBackend=SQLiteResultBackend",
    "results.backends.memcached": "",
    "results.backends.redis": "",
    "results.backends.stub": "StubBackend=StubResultBackend",
    "results.errors": "ResultError ResultFailure ResultMissing ResultTimeout ResultUnavailable",
    "results.middleware": "DEFAULT_RESULT_TTL=_DEFAULT_RESULT_TTL_MS Results",
    "threading": "Interrupt raise_thread_exception",
    "worker": "Worker",
}


_current_millis = _SYSTEM_CLOCK.time_ms


def _explain_missing(path: str, name: str) -> NoReturn:
    """What the module of this path does for a name that it doesn't have.

    An AttributeError would be for hasattr() as well, but an import does not show its text.
    """
    if name.startswith(("Rabbitmq", "Redis", "Memcached")):
        raise ImportError(
            f"{name} is not here, for nothing needs a server: use SQLiteBroker('jobs.db'); Results() and "
            f"SQLiteRateLimiterBackend(broker) keep what they need in it."
        )
    raise AttributeError(f"module {path!r} has no attribute {name!r}")


class _BrokerModule(types.ModuleType):
    """A module whose global_broker is the default one, None where there is none."""

    _is_deleted = False  # As mock.patch() does before it sets back what was there.

    @property
    def global_broker(self) -> Broker | None:
        if self._is_deleted:
            raise AttributeError("global_broker")
        return _global_broker

    @global_broker.setter
    def global_broker(self, broker: Broker | None) -> None:
        self._is_deleted = False
        set_broker(broker)

    @global_broker.deleter
    def global_broker(self) -> None:
        self._is_deleted = True


def _add_module_paths() -> None:
    """Make the modules of the table; one inside another is also its attribute."""
    for path, names in _MODULES.items():
        kind = _BrokerModule if path == "broker" else types.ModuleType
        module = kind(f"{__name__}.{path}", f"Dramatiq's module path: {path}.")
        module.__dict__["__path__"] = []
        module.__dict__["__getattr__"] = functools.partial(_explain_missing, module.__name__)
        module.__spec__ = type(os.__spec__)(module.__name__, None, is_package=True)
        for item in names.split():
            name, _, source = item.partition("=")
            module.__dict__[name] = globals()[source or name]
        sys.modules[module.__name__] = module
        parent, _, name = path.rpartition(".")
        if parent:
            sys.modules[f"{__name__}.{parent}"].__dict__[name] = module
        elif name not in globals():  # `actor` is the decorator, `logging` is Python's own.
            globals()[name] = module


if __name__ != "__main__":
    _add_module_paths()


# ------------------------------------------------------------------------------------------
# Hand-over
#
# `python -m dramalite` runs this file as __main__, while the user's modules import it under
# its real name (vendored: app.vendor.dramalite).  Only one copy may hold the actors, so
# __main__ imports the real one and hands over to it.
# ------------------------------------------------------------------------------------------
def _hand_over() -> int:
    """Run main() of the copy of this module that user code imports."""
    import importlib.machinery
    import importlib.util

    spec = globals()["__spec__"]
    if spec is not None:
        module = importlib.import_module(spec.name)
    else:  # Run by its path, perhaps with -I, where the folder is not searched.
        path = os.path.abspath(__file__)
        name = os.path.splitext(os.path.basename(path))[0]
        loader = importlib.machinery.SourceFileLoader(name, path)
        module = importlib.util.module_from_spec(cast(Any, importlib.util.spec_from_loader(name, loader)))
        sys.modules[name] = module
        loader.exec_module(module)
    return cast(int, module.main())


if __name__ == "__main__":
    sys.exit(_hand_over())

# ------------------------------------------------------------------------------------------
# Licence: MIT
#
# Copyright (c) 2026 the dramalite authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify, merge,
# publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons
# to whom the Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR
# PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE
# FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
# DEALINGS IN THE SOFTWARE.
# ------------------------------------------------------------------------------------------
