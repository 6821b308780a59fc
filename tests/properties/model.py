"""What a queue is, in plain Python: the reference that the engine is compared with.

Each message carries a script: what its actor does at each attempt, the last entry from there on.
The model is told what was sent and what happened, and says what it finds wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_BACKOFF, MAX_BACKOFF, MAX_CRASHES = 100, 1000, 3

#: What an actor may do: return, fail, ask for a retry in so many ms, skip, or fail as expected.
OK, FAIL, RETRY, SKIP, ABORT = "ok", "fail", "retry", "skip", "abort"


@dataclass
class Entry:
    message_id: str
    number: int  # In the order of sending.
    sent: int
    priority: int
    eta: int | None
    script: list[tuple[str, int]]
    max_retries: int
    state: str = "waiting"  # Or "running", "done", "dead".
    retries: int = 0
    crashes: int = 0
    starts: int = 0

    def act(self) -> tuple[str, int]:
        """What the next attempt does, and its argument in milliseconds."""
        return self.script[min(self.retries, len(self.script) - 1)]

    def is_ready(self, now: int) -> bool:
        return self.state == "waiting" and (self.eta is None or self.eta <= now)

    def goes_before(self, other: Entry) -> bool:
        """Whether this one, if ready, must start first; False where both orders are right."""
        if self.priority != other.priority:
            return self.priority < other.priority
        if self.eta is None and other.eta is None:
            return self.number < other.number
        if self.eta is None:
            return other.eta > self.sent
        return other.eta is not None and self.eta < other.eta


@dataclass
class Model:
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    attempts: dict[str, list[str]] = field(default_factory=dict)  # Outcomes by message.

    def send(self, message_id, sent, priority, eta, script, max_retries):
        entry = Entry(message_id, len(self.entries), sent, priority, eta, script, max_retries)
        self.entries[message_id] = entry
        self.attempts[message_id] = []

    def begin(self, message_id, now):
        """An attempt starts.  What crashed keeps its place, but may wait while another such one runs."""
        entry = self.entries[message_id]
        self._check(entry.state == "waiting", f"{entry} started while it was {entry.state}")
        self._check(entry.is_ready(now), f"{entry} started at {now}, before its eta")
        is_alone = entry.crashes or not any(e.crashes and e.state == "running" for e in self.entries.values())
        claimable = [e for e in self.entries.values() if e.is_ready(now) and (is_alone or not e.crashes)]
        first = [e for e in claimable if e.goes_before(entry)]
        self._check(not first, f"{entry} started before {first[:1]}")
        entry.state = "running"
        entry.starts += 1

    def end(self, event):
        """An attempt has ended, or its worker has died."""
        entry = self.entries[event.message_id]
        self.attempts[event.message_id].append(event.outcome)
        if event.outcome == "crashed":
            entry.crashes += not event.error  # None where the attempt had ended, but was not written.
            self._check(entry.crashes <= MAX_CRASHES, f"{entry} crashed too often")
            entry.state = "waiting"
            return
        expected = self._expected(entry)
        self._check(event.outcome == expected, f"{entry} is {event.outcome}, not {expected}")
        if event.outcome == "retry":
            self._check_delay(entry, event)
            entry.retries += 1
            entry.eta = event.next_eta_ms
            entry.state = "waiting"
        else:
            self._check(event.next_eta_ms is None, f"{entry} has ended and is to be run again")
            entry.state = "dead" if event.outcome == "dead" else "done"

    def _expected(self, entry):
        if entry.crashes == MAX_CRASHES and entry.state == "waiting":
            return "dead"
        self._check(entry.state == "running", f"{entry} ended while it was {entry.state}")
        action, _ms = entry.act()
        if action in (OK, SKIP):
            return "done" if action == OK else "skipped"
        if action == ABORT or entry.retries >= entry.max_retries:
            return "dead"
        return "retry"

    def _check_delay(self, entry, event):
        action, ms = entry.act()
        delay = event.next_eta_ms - event.ended_ms
        if action == RETRY:
            self._check(delay == ms, f"{entry} is retried after {delay} ms, not {ms}")
            return
        shortest = MIN_BACKOFF * 2**entry.retries
        low, high = min(shortest, MAX_BACKOFF // 2), min(2 * shortest, MAX_BACKOFF)
        self._check(low <= delay <= high, f"{entry} is retried after {delay} ms: {low} to {high}")

    def _check(self, is_right, problem):
        if not is_right:
            self.problems.append(problem)

    # What must hold at any moment.

    def unfinished(self):
        return {e.message_id for e in self.entries.values() if e.state in ("waiting", "running")}

    def is_busy(self):
        return any(e.state == "running" for e in self.entries.values())

    def dead(self):
        return {e.message_id for e in self.entries.values() if e.state == "dead"}

    def done(self):
        return {e.message_id for e in self.entries.values() if e.state == "done"}

    def ran_as_often_as_it_should(self):
        """Whether each message was started once for each attempt that is told of."""
        told = {id_: [o for o in outcomes] for id_, outcomes in self.attempts.items()}
        for entry in self.entries.values():
            count = len(told[entry.message_id]) + (entry.state == "running")
            if entry.state == "dead" and entry.crashes == MAX_CRASHES:
                count -= 1  # It was buried without being run.
            if entry.starts != count:
                return False
        return True
