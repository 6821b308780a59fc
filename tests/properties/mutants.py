"""Shows that the properties bite: each of these faults in a copy of dramalite.py must fail one of them.

    python tests/properties/mutants.py [NAME ...] [--list]

Runs the properties on an unchanged copy, which must pass, then on one copy for each fault, or only on
those of the faults named; two at a time.  A fault counts as found by the failure of a test, neither by
an error of the run nor by its lasting too long.  The exit code is 0 if all were found, 1 if one was
not, 2 where a fault can't be put in because the code has changed: then change it here as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

#: Seconds after which a run is ended.
LIMIT = 150


class Mutant(NamedTuple):
    """One fault: a text of dramalite.py, which must be there once, and what takes its place."""

    name: str
    why: str  # What is wrong with it.
    first: str  # The tests that should notice, to be run first: test_<first>.py.
    old: str
    new: str


MUTANTS = [
    # Order
    Mutant(
        "claim-in-any-order", "messages are claimed actor by actor", "order",
        "         ORDER BY m.priority, m.id LIMIT :limit)",
        "         LIMIT :limit)",
    ),
    Mutant(
        "claim-by-age-first", "age goes before priority", "order",
        "ORDER BY m.priority, m.id LIMIT :limit)",
        "ORDER BY m.id, m.priority LIMIT :limit)",
    ),
    Mutant(
        "claim-the-worst-first", "high numbers go first", "order",
        "ORDER BY m.priority, m.id LIMIT :limit)",
        "ORDER BY m.priority DESC, m.id LIMIT :limit)",
    ),
    Mutant(
        "claim-the-last-first", "of equal priority the youngest goes first", "order",
        "ORDER BY m.priority, m.id LIMIT :limit)",
        "ORDER BY m.priority, m.id DESC LIMIT :limit)",
    ),
    Mutant(
        "batches-unsorted", "what is claimed together is run in the order of its rows", "order",
        "        rows.sort()\n        return [_Row",
        "        return [_Row",
    ),
    Mutant(
        "priority-ignored", "a message's own priority is not stored", "order",
        '        priority = options.get("priority")\n',
        "        priority = None\n",
    ),
    Mutant(
        "order-by-the-clock-alone", "a clock that is set back lets later messages go first", "order_simulated",
        "    VALUES (max(?, (SELECT coalesce(max(id), 0) + 1 FROM dramalite_messages)),",
        "    VALUES (max(?1, (SELECT coalesce(max(id), 0) + 1 FROM dramalite_messages"
        "                      WHERE id < ?1 + 3600000000)),",
    ),
    Mutant(
        "delayed-keep-their-place", "a delayed message goes before those sent while it waited", "order_simulated",
        "SET state = 0, id = max(?, (SELECT max(id) + 1 FROM dramalite_messages))",
        "SET state = 0, id = id + 0 * ?",
    ),
    Mutant(
        "due-in-the-order-sent", "delayed messages do not run in the order of their times", "order_simulated",
        "WHERE state = 1 AND eta <= ? ORDER BY eta, id LIMIT 2000",
        "WHERE state = 1 AND eta <= ? ORDER BY id LIMIT 2000",
    ),
    Mutant(
        "handed-back-to-the-end", "what a stopping worker gives back loses its place", "order_simulated",
        "UPDATE dramalite_messages SET state = 0, owner = NULL\n     WHERE state = 2 AND owner = ? AND",
        "UPDATE dramalite_messages SET state = 0, owner = NULL,\n"
        "       id = (SELECT max(m.id) + 1 FROM dramalite_messages AS m WHERE m.id >= dramalite_messages.id)\n"
        "     WHERE state = 2 AND owner = ? AND",
    ),
    Mutant(
        "crashed-go-last", "what was running in a crash waits for all that was not", "engine",
        "ORDER BY m.priority, m.id LIMIT :limit)",
        "ORDER BY m.crashes, m.priority, m.id LIMIT :limit)",
    ),
    Mutant(
        "crashed-to-the-end", "what a dead worker had claimed loses its place", "engine",
        'UPDATE dramalite_messages SET state = 0, owner = NULL WHERE state = 2 AND owner IS :dead"""',
        "UPDATE dramalite_messages SET state = 0, owner = NULL,\n"
        "       id = (SELECT max(m.id) + 1 FROM dramalite_messages AS m WHERE m.id >= dramalite_messages.id)\n"
        '     WHERE state = 2 AND owner IS :dead"""',
    ),
    # Time
    Mutant(
        "eta-ignored", "delayed messages are ready at once", "engine",
        "_READY if eta is None else _DELAYED,",
        "_READY,",
    ),
    Mutant(
        "due-early", "delayed messages become ready before their time", "engine",
        "        now = self._clock().time_ms()\n        if next_due > now:\n",
        "        now = self._clock().time_ms() + 40\n        if next_due > now:\n",
    ),
    Mutant(
        "due-late", "delayed messages become ready after their time only", "chains",
        "WHERE state = 1 AND eta <= ? ORDER BY",
        "WHERE state = 1 AND eta < ? ORDER BY",
    ),
    Mutant(
        "age-the-wrong-way", "what is young becomes a dead letter", "deadlines",
        "if max_age and broker.clock.time_ms() - message.message_timestamp >= max_age:",
        "if max_age and broker.clock.time_ms() - message.message_timestamp < max_age:",
    ),
    Mutant(
        "age-off-by-one", "a message may start at the very age of its limit", "deadlines",
        "if max_age and broker.clock.time_ms() - message.message_timestamp >= max_age:",
        "if max_age and broker.clock.time_ms() - message.message_timestamp > max_age:",
    ),
    Mutant(
        "time-limit-doubled", "jobs have twice their time", "deadlines",
        "self._deadlines[runner] = broker.clock.monotonic() + limit / 1000\n",
        "self._deadlines[runner] = broker.clock.monotonic() + limit / 500\n",
    ),
    Mutant(
        "time-limit-of-the-actor-ignored", "only the middleware's limit holds", "deadlines",
        'limit = _truthy_option(message, "time_limit", self.time_limit)',
        'limit = message.options.get("time_limit") or self.time_limit',
    ),
    Mutant(
        "later-than-told", "one simulated thread goes on past the time up to which it is to go", "same_events",
        "self._sizes != (1, 1) or (end_ms is not None and due_ms > end_ms):",
        "self._sizes != (1, 1):",
    ),
    Mutant(
        "some-are-passed", "one simulated thread goes on to a moment after what is due", "same_events",
        "            self._jump(due_ms)\n            return True",
        "            self._jump(due_ms + 1)\n            return True",
    ),
    # Nothing is lost or done twice
    Mutant(
        "ack-before-run", "a message is deleted when it is claimed", "once",
        "                rows = connection.execute(_CLAIM, values).fetchall()\n",
        "                rows = connection.execute(_CLAIM, values).fetchall()\n"
        '                gone = "DELETE FROM dramalite_messages WHERE state = 2 AND id = ?"\n'
        "                connection.executemany(gone, [(row[1],) for row in rows])\n",
    ),
    Mutant(
        "lost-in-a-crash", "what a dead worker had claimed is deleted", "once",
        'UPDATE dramalite_messages SET state = 0, owner = NULL WHERE state = 2 AND owner IS :dead"""',
        'DELETE FROM dramalite_messages WHERE state = 2 AND owner IS :dead"""',
    ),
    Mutant(
        "left-in-a-crash", "what a dead worker had claimed is never taken back", "once",
        "        if set(self._read(_OWNERS)) <= {(slot.owner,)} and not dead:\n",
        "        if True:\n",
    ),
    Mutant(
        "taken-from-the-living", "a new worker takes what others are running", "once",
        "            if not self.hold(index):\n                return None\n",
        "            self.hold(index)\n",
    ),
    Mutant(
        "lost-in-a-stop", "what a stopping worker gives back is deleted", "once",
        "connection.executemany(_HAND_BACK, handed_back)",
        "connection.executemany(_ACK, [(owner, outcome.row.id) for outcome in outcomes])",
    ),
    Mutant(
        "fencing-dropped", "a worker taken for dead deletes what another one has by now", "fencing",
        '_ACK = "DELETE FROM dramalite_messages WHERE state = 2 AND owner = ? AND id = ?"',
        '_ACK = "DELETE FROM dramalite_messages WHERE state = 2 AND ? AND id = ?"',
    ),
    Mutant(
        "effects-without-ack", "a worker taken for dead still writes what came of its job", "fencing",
        "if connection.execute(_ACK, key).rowcount:",
        "if connection.execute(_ACK, key).rowcount is not None:",
    ),
    Mutant(
        "effects-without-acks", "... where it writes what came of several jobs at once", "fencing",
        "if connection.executemany(_ACK, keys).rowcount == len(keys):",
        "if connection.executemany(_ACK, keys).rowcount >= 0:",
    ),
    Mutant(
        "messages-before-the-ack", "what follows from a job is sent before the job is acknowledged", "once",
        "        outcome = self._collecting.outcome\n        if outcome is None:\n"
        "            self._engine.insert(rows)\n            return\n",
        "        outcome = self._collecting.outcome\n"
        "        if outcome is None or rows[0][8] != outcome.row.message_id:\n"
        "            self._engine.insert(rows)\n            return\n",
    ),
    Mutant(
        "callbacks-sent-twice", "a success is told of twice", "once",
        "    actor.send(message.asdict(), value)\n",
        "    actor.send(message.asdict(), value)\n    actor.send(message.asdict(), value)\n",
    ),
    Mutant(
        "on-failure-never-sent", "a failure is told to nobody", "once",
        'name = "on_success" if exception is None else "on_failure"\n        callback = _truthy_option(message, name)\n',
        'name = "on_success" if exception is None else "on_failure"\n'
        "        callback = _truthy_option(message, name) if exception is None else None\n",
    ),
    Mutant(
        "results-before-the-ack", "results and counts are written before the acknowledgement", "results_agree",
        "        if self._collecting.outcome is None:\n            self._engine.store(statement, values)",
        "        if True:\n            self._engine.store(statement, values)",
    ),
    # Crashes
    Mutant(
        "crash-not-counted", "a message may kill workers for ever", "dead_letters",
        "UPDATE dramalite_messages SET crashes = crashes + 1\n",
        "UPDATE dramalite_messages SET crashes = crashes\n",
    ),
    Mutant(
        "crash-counted-twice", "a message dies after half of its crashes", "dead_letters",
        "UPDATE dramalite_messages SET crashes = crashes + 1\n",
        "UPDATE dramalite_messages SET crashes = crashes + 2\n",
    ),
    Mutant(
        "buried-one-crash-late", "max_crashes is exceeded by one", "dead_letters",
        "owner IS :dead AND crashes >= crash_limit",
        "owner IS :dead AND crashes > crash_limit",
    ),
    Mutant(
        "never-buried", "max_crashes is ignored", "dead_letters",
        "owner IS :dead AND crashes >= crash_limit",
        "owner IS :dead AND crashes < 0",
    ),
    Mutant(
        "crash-limit-of-the-message-ignored", "its own max_crashes does not count", "dead_letters",
        '        crash_limit = options.get("max_crashes")\n',
        '        crash_limit = None\n',
    ),
    Mutant(
        "on-crash-ignored", 'on_crash="fail" does nothing', "dead_letters",
        '        if "fail" in (options.get("on_crash"), defaults.get("on_crash")):\n',
        '        if "fail" in (options.get("on_crash"),):\n',
    ),
    Mutant(
        "retry-forgets-crashes", "each retry may crash as often again", "once",
        "            crashes = outcome.row.crashes  #",
        "            crashes = 0  #",
    ),
    Mutant(
        "crash-counted-as-retry", "crashes use up retries", "dead_letters",
        "            message = job.message = MessageProxy(_decode_row(job.row, broker.max_message_size))\n",
        "            message = job.message = MessageProxy(_decode_row(job.row, broker.max_message_size))\n"
        "            if job.row.crashes:\n"
        '                message.options["retries"] = message.options.get("retries", 0) + 1\n',
    ),
    Mutant(
        "killers-without-results", "who waits for a message that killed its workers is not told", "results_agree",
        "                job.message.actor_options = actor.options\n",
        "                pass\n",
    ),
    Mutant(
        "hand-back-counted-as-crash", "graceful stops bury messages", "once",
        "UPDATE dramalite_messages SET state = 0, owner = NULL\n     WHERE state = 2 AND owner = ? AND",
        "UPDATE dramalite_messages SET state = 0, owner = NULL, crashes = crashes + 1\n"
        "     WHERE state = 2 AND owner = ? AND",
    ),
    Mutant(
        "suspects-together", "what ran in a crash runs beside others that did", "once",
        "WHERE s.state = 0 AND s.crashes > 0 AND :suspects\n",
        "WHERE s.state = 0 AND s.crashes > 0\n",
    ),
    # Retries and dead letters
    Mutant(
        "one-retry-more", "max_retries is exceeded by one", "dead_letters",
        "return max_retries is not None and attempt >= max_retries",
        "return max_retries is not None and attempt > max_retries",
    ),
    Mutant(
        "retries-not-counted", "retries have no end", "dead_letters",
        '        message.options["retries"] = attempt + 1\n',
        '        message.options["retries"] = attempt\n',
    ),
    Mutant(
        "max-retries-of-the-message-ignored", "only the actor's count", "dead_letters",
        'max_retries = _option(message, "max_retries", self.max_retries)',
        'max_retries = message.actor_options.get("max_retries", self.max_retries)',
    ),
    Mutant(
        "retry-when-ignored", "max_retries decides in its place", "dead_letters",
        "        if retry_when is not None:\n            return not retry_when(attempt, exception)\n",
        "",
    ),
    Mutant(
        "throws-ignored", "expected errors are retried", "dead_letters",
        "        if throws and isinstance(exception, throws):\n            self.logger.info(\"Aborting",
        "        if not throws and isinstance(exception, throws):\n            self.logger.info(\"Aborting",
    ),
    Mutant(
        "skips-retried", "SkipMessage is taken for a failure", "dead_letters",
        "        if isinstance(exception, SkipMessage):\n            self._logger.warning(\n",
        "        if isinstance(exception, SkipMessage) and message.failed:\n            self._logger.warning(\n",
    ),
    Mutant(
        "exhaustion-untold", "on_retry_exhausted is not sent", "dead_letters",
        '        if callback:\n            retries = {"retries": attempt',
        '        if not callback:\n            retries = {"retries": attempt',
    ),
    Mutant(
        "dead-letter-dropped", "a failed message is deleted", "dead_letters",
        "            job.outcome.effects.append(self._dead_letter(job, message))\n",
        "            self._dead_letter(job, message)\n",
    ),
    Mutant(
        "dead-letters-kept-for-a-day", "dead letters go after a day", "dead_letters",
        "_KEPT_MS = 7 * 24 * 3600 * 1000\n",
        "_KEPT_MS = 24 * 3600 * 1000\n",
    ),
    Mutant(
        "wanted-delay-ignored", "Retry(delay=...) waits as any failure", "backoff",
        "        if isinstance(exception, Retry) and exception.delay is not None:\n",
        "        if isinstance(exception, Retry) and exception.delay is None:\n",
    ),
    Mutant(
        "backoff-not-doubled", "each wait is like the first", "backoff",
        "delay = int(min_ms * 2 ** min(attempt, _MAX_BACKOFF_EXPONENT) * rng.uniform(1, 2))",
        "delay = int(min_ms * rng.uniform(1, 2))",
    ),
    Mutant(
        "max-backoff-ignored", "waits have no upper bound", "backoff",
        "return delay if delay <= max_ms else int(max_ms * rng.uniform(0.5, 1))",
        "return delay",
    ),
    Mutant(
        "jitter-too-wide", "a wait may be shorter than min_backoff", "backoff",
        "min(attempt, _MAX_BACKOFF_EXPONENT) * rng.uniform(1, 2))",
        "min(attempt, _MAX_BACKOFF_EXPONENT) * rng.uniform(0, 2))",
    ),
    Mutant(
        "list-of-waits-in-a-circle", "after the last wait of a list comes the first", "backoff",
        "backoff[min(attempt, len(backoff) - 1)]",
        "backoff[attempt % len(backoff)]",
    ),
    Mutant(
        "function-of-waits-off-by-one", "a backoff function is asked for the next wait", "backoff",
        "_milliseconds(backoff(attempt), ",
        "_milliseconds(backoff(attempt + 1), ",
    ),
    Mutant(
        "jitter-from-the-process", "the same seed gives other waits", "same_events",
        "            broker.random,\n        )",
        '            __import__("random"),\n        )',
    ),
    # Results
    Mutant(
        "failures-stored-as-results", "the result of a failure is None", "results_agree",
        "            self.backend.store_exception(message, exception, self._ttl(message))\n",
        "            self.backend.store_result(message, None, self._ttl(message))\n",
    ),
    Mutant(
        "results-of-attempts", "a result is stored while retries are to come", "results_agree",
        "if exception is None and not message.failed and self._stores(broker, message):",
        "if not message.failed and self._stores(broker, message):",
    ),
    Mutant(
        "results-outlive-their-time", "a result is kept for a millisecond too long", "results_agree",
        "        expires_at = self.broker.clock.time_ms() + ttl\n",
        "        expires_at = self.broker.clock.time_ms() + ttl + 1\n",
    ),
    # Pipelines
    Mutant(
        "successor-sent-twice", "each later step runs twice", "chains",
        '                broker.enqueue(successor, delay=successor.options.get("delay") or None)\n',
        "                for _ in range(2):\n"
        '                    broker.enqueue(successor, delay=successor.options.get("delay") or None)\n',
    ),
    Mutant(
        "successor-of-failures", "each failed attempt sends the next step", "chains",
        "        if exception is not None or message.failed:\n            return\n        if \"pipe_results\"",
        "        if \"pipe_results\"",
    ),
    Mutant(
        "successor-at-once", "delays of later steps are ignored", "chains",
        '                broker.enqueue(successor, delay=successor.options.get("delay") or None)\n',
        "                broker.enqueue(successor)\n",
    ),
    Mutant(
        "pipe-ignore-ignored", "a step gets a result that it does not want", "chains",
        '        if successor.options.get("pipe_ignore"):\n            return True\n',
        "",
    ),
    Mutant(
        "result-as-first-argument", "a step gets the result before its arguments", "chains",
        "        return step.copy(args=(*step.args, result))\n",
        "        return step.copy(args=(result, *step.args))\n",
    ),
    # Groups
    Mutant(
        "group-waits-for-one-more", "callbacks never come", "groups_once",
        "._write(_CREATE_GROUP, (uuid, count, count, described))",
        "._write(_CREATE_GROUP, (uuid, count + 1, count + 1, described))",
    ),
    Mutant(
        "group-waits-for-one-less", "callbacks come before the last member, and then never", "groups_once",
        "._write(_CREATE_GROUP, (uuid, count, count, described))",
        "._write(_CREATE_GROUP, (uuid, count - 1, count - 1, described))",
    ),
    Mutant(
        "callback-of-each-member", "callbacks do not wait for the other members", "groups_once",
        "WHERE EXISTS (SELECT 1 FROM dramalite_groups WHERE uuid = ? AND {})",
        "WHERE EXISTS (SELECT 1 FROM dramalite_groups WHERE uuid = ? AND ({} OR unended >= 0))",
    ),
    Mutant(
        "outer-groups-forgotten", "a member counts for the innermost group only", "groups_once",
        'return [options, *options.get("group_further", ())] if',
        "return [options] if",
    ),
    Mutant(
        "dead-members-not-counted", "a group with a dead member never ends", "groups_once",
        "    def after_nack(self, broker: Broker, message: MessageProxy) -> None:\n"
        "        self._end(broker, message.message_id, message.options)\n",
        "",
    ),
    Mutant(
        "skipped-members-not-counted", "a group with a skipped member never ends", "groups_once",
        "        if not message.failed:\n            self._end(broker, message.message_id, message.options)\n",
        "        if message.failed:\n            self._end(broker, message.message_id, message.options)\n",
    ),
    Mutant(
        "failed-members-counted-as-successes", "a group with failures succeeds", "groups_once",
        "self._count(broker, membership, message_id, False, failed_group)",
        "self._count(broker, membership, message_id, True, failed_group)",
    ),
    Mutant(
        "members-count-again", "a member that is sent again counts again", "groups_once",
        "           WHERE excluded.failed_at IS NULL AND dramalite_members.failed_at IS NOT NULL",
        "           WHERE excluded.failed_at IS NULL",
    ),
    Mutant(
        "late-successes-not-counted", "a group never succeeds whose dead member did so when sent again", "groups_once",
        "UPDATE dramalite_groups SET unsuccessful = unsuccessful - 1 WHERE uuid = new.uuid;",
        "UPDATE dramalite_groups SET unsuccessful = unsuccessful WHERE uuid = new.uuid;",
    ),
    Mutant(
        "ends-told-again", "the end of a group is told whenever a member of it ends once more", "groups_once",
        '_IS_OVER = "unended = 0 AND told < 1"',
        '_IS_OVER = "unended = 0"',
    ),
    Mutant(
        "failed-inner-groups-not-counted", "a group never ends where a group inside it fails", "groups_once",
        '                self._end(broker, data["message_id"], data["options"], uuid)\n',
        "                pass\n",
    ),
    Mutant(
        "inner-groups-counted-early", "a group ends before a group inside it has", "groups_once",
        "WHERE uuid = ? AND {_IS_OVER} AND unsuccessful > 0)",
        "WHERE uuid = ? AND unsuccessful > 0)",
    ),
    Mutant(
        "failed-pipelines-not-counted", "a group never ends where an early step fails", "groups_once",
        '            following = [target]\n',
        "            pass\n",
    ),
    Mutant(
        "group-results-in-reverse", "the step after a group gets its results in another order", "groups_once",
        "message.message_id] for message in last]",
        "message.message_id] for message in reversed(last)]",
    ),
    Mutant(
        "delays-in-groups-ignored", "members of a group start at once", "groups_once",
        "                self.broker.enqueue(child, delay=wait)\n",
        "                self.broker.enqueue(child)\n",
    ),
    Mutant(
        "the-shorter-delay", "the longer of two delays does not hold", "groups_once",
        "    return max(delays, default=0) or None\n",
        "    return min(delays, default=0) or None\n",
    ),
    # Rate limits
    Mutant(
        "one-place-more", "limits of concurrency and of buckets are exceeded by one", "limits",
        "lambda value: value <= maximum)",
        "lambda value: value <= maximum + 1)",
    ),
    Mutant(
        "one-place-less", "the last place is never given", "limits",
        "lambda value: value <= maximum)",
        "lambda value: value < maximum or maximum == 1)",
    ),
    Mutant(
        "places-kept", "a place is not given back", "limits",
        "            self.backend.decr(key, 1, 0, self.ttl)\n",
        "            pass\n",
    ),
    Mutant(
        "places-forgotten-early", "counts expire before their time", "limits",
        "connection.execute(_SET_LIMIT, (key, value, now + ttl))",
        "connection.execute(_SET_LIMIT, (key, value, now + ttl // 2))",
    ),
    Mutant(
        "bucket-misaligned", "each moment has a bucket of its own", "limits",
        'f"{self.key}@{now - now % self.bucket}"',
        'f"{self.key}@{now - now % self.bucket // 2}"',
    ),
    Mutant(
        "window-forgets-its-oldest-part", "a window is shorter than it says", "limits",
        "for age in range(-(-window // part) + 1)]",
        "for age in range(-(-window // part))]",
    ),
    Mutant(
        "window-one-more", "a window's limit is exceeded by one", "limits",
        "self.broker._engine.limits(keys())) + amount <= maximum",
        "self.broker._engine.limits(keys())) <= maximum",
    ),
    Mutant(
        "limits-forgotten-in-crashes", "a worker that dies leaves all places free", "limits",
        "    return connection.execute(_TAKE_BACK, values).rowcount, over\n",
        '    connection.execute("DELETE FROM dramalite_limits")\n'
        "    return connection.execute(_TAKE_BACK, values).rowcount, over\n",
    ),
    # Encoding
    Mutant(
        "keys-become-text", "a dict's key 1 is read back as \"1\"", "encoding",
        "                    if not isinstance(key, str):\n                        return False\n",
        "                    pass\n",
    ),
    Mutant(
        "surrogates-stored", "text that is none is accepted", "encoding",
        '                    if "\\\\ud" not in text:\n                        return text.encode("ascii")\n',
        '                    return text.encode("ascii")\n',
    ),
]  # fmt: skip


def source_with(mutant: Mutant, source: str) -> str:
    """The source with a fault; ValueError where its text is not there, or more than once."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: its text is in dramalite.py {count} times, not once:\n{mutant.old}")
    return source.replace(mutant.old, mutant.new)


class Verdict(NamedTuple):
    is_failed: bool  # A test has failed; False for all else.
    text: str  # The test, or what else came of it.
    seconds: float
    output: str


#: What a fault must not lead to: it would be found by any test that runs the line.
_NO_FAILURE = re.compile(r"^E +\S*(NameError|SyntaxError|UnboundLocalError|OperationalError|ImportError)\b", re.M)


def run_tests(source: str, tests: list[str]) -> Verdict:
    """Run test files on a dramalite.py with this source, in a folder of its own, up to the first failure."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dramalite-mutant-", ignore_cleanup_errors=True) as folder:
        tree, scratch = Path(folder, "tree"), Path(folder, "tmp")
        scratch.mkdir()
        (tree / "tests").mkdir(parents=True)
        (tree / "dramalite.py").write_text(source, encoding="utf-8")
        shutil.copy(ROOT / "pyproject.toml", tree)
        for path in ROOT.glob("tests/*.py"):
            if not path.name.startswith("test_"):
                shutil.copy(path, tree / "tests")
        ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
        shutil.copytree(HERE, tree / "tests" / HERE.name, ignore=ignore)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=short", "--show-capture=no"]
        command += ["-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
        command += [f"tests/{HERE.name}/{test}" for test in tests]
        environment = {**os.environ, "PYTHONPATH": str(tree), "TMPDIR": str(scratch), "COLUMNS": "250"}
        process = subprocess.Popen(
            command, cwd=tree, env=environment, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            end(process)
            output, _ = process.communicate()
            return Verdict(False, f"it has not ended after {LIMIT} s", time.monotonic() - started, output)
        except BaseException:
            end(process)
            raise
    return judge(process.returncode, output, time.monotonic() - started)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a run and what it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def judge(code: int, output: str, seconds: float) -> Verdict:
    failed = re.search(rf"^FAILED tests/{HERE.name}/(\S+)", output, re.M)
    if code == 0:
        return Verdict(False, "all tests pass", seconds, output)
    if code != 1 or failed is None or re.search("^ERROR ", output, re.M):
        return Verdict(False, f"pytest ended with code {code}, without a test that failed", seconds, output)
    error = _NO_FAILURE.search(output)
    if error is not None:
        return Verdict(False, f"the fault is no fault but an error: {error[0]}", seconds, output)
    return Verdict(True, failed[1], seconds, output)


def check_unchanged(pool: ThreadPoolExecutor, source: str, tests: list[str]) -> bool:
    """Run everything on an unchanged copy, in two parts at a time; tell whether it passes."""
    parts = list(pool.map(lambda part: run_tests(source, part), [tests[::2], tests[1::2]]))
    for verdict in parts:
        if verdict.text != "all tests pass":
            print(f"An unchanged copy does not pass: {verdict.text}\n{verdict.output}")
            return False
    print(f"passes    {'(an unchanged copy)':36}{max(part.seconds for part in parts):6.1f} s", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; without an unchanged copy")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    args = parser.parse_args()
    if unknown := set(args.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no such mutants: {', '.join(sorted(unknown))}; see --list")
    if args.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:36}{mutant.why}")
        return 0

    started = time.monotonic()
    source = (ROOT / "dramalite.py").read_text(encoding="utf-8")
    mutants = [mutant for mutant in MUTANTS if not args.names or mutant.name in args.names]
    try:
        sources = {mutant.name: source_with(mutant, source) for mutant in mutants}
    except ValueError as error:
        print(error)
        return 2
    # The state machines find the most, and take the most time.
    tests = sorted((path.name for path in HERE.glob("test_*.py")), key=lambda name: ("engine" in name, name))
    survivors = []
    with ThreadPoolExecutor(2) as pool:
        if not args.names and not check_unchanged(pool, source, tests):
            return 1
        runs = {}
        for mutant in mutants:
            first = f"test_{mutant.first}.py"
            order = [first] + [test for test in tests if test != first]
            runs[pool.submit(run_tests, sources[mutant.name], order)] = mutant
        for run in as_completed(runs):
            mutant, verdict = runs[run], run.result()
            word = "killed" if verdict.is_failed else "SURVIVES"
            print(f"{word:10}{mutant.name:36}{verdict.seconds:6.1f} s  {verdict.text}", flush=True)
            if not verdict.is_failed:
                survivors.append(mutant)
                if args.names:
                    print(verdict.output)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed in {time.monotonic() - started:.0f} s.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
