"""What happens when work fails: retries with a growing delay, giving up, dead letters.

    python3 examples/retries.py
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Finds dramalite.py in a bare clone.
import dramalite

broker = dramalite.MemoryBroker()
dramalite.set_broker(broker)
logging.getLogger("dramalite").setLevel(logging.CRITICAL)  # A service would log each traceback.


@dramalite.actor(max_retries=5, min_backoff=20)  # Waits 20 to 40 ms, then 40 to 80 ms, and so on.
def fetch(url):
    retries = dramalite.CurrentMessage.get_current_message().options.get("retries", 0)
    if retries < 2:
        print(f"fetch: try {retries + 1} of {url} failed")
        raise ConnectionError(f"No answer from {url}")
    print(f"fetch: {url} came with try {retries + 1}")


def may_work_later(retries_so_far, exception):
    return retries_so_far < 3 and not isinstance(exception, ValueError)


@dramalite.actor(retry_when=may_work_later, min_backoff=20, on_failure="note", on_retry_exhausted="give_up")
def parse(text):
    print(f"parse: {int(text)}")


@dramalite.actor
def note(message, error):
    """Called for each failure."""
    print(f"note: {message.actor_name} of {message.args[0]!r} failed with {error['type']}")


@dramalite.actor
def give_up(message, retries):
    """Called once, when there will be no further retry."""
    print(f"give_up: {message.actor_name} of {message.args[0]!r} after {retries['retries']} retries")


if __name__ == "__main__":
    fetch.send("example.org")
    parse.send("12")
    parse.send("twelve")
    with dramalite.Worker(broker, worker_threads=1):
        broker.join("default", timeout=10_000, fail_fast=False)
    for letter in broker.dead_letters:  # Kept for 7 days.
        print(f"dead letter: {letter.actor_name} of {letter.args[0]!r}: {letter.reason}")
