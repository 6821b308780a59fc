"""Actors as classes: what they share sits in an abstract base, with options in Meta.

    python3 examples/class_based.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Finds dramalite.py in a bare clone.
import dramalite

broker = dramalite.MemoryBroker()
dramalite.set_broker(broker)
sent = []


class Notice(dramalite.GenericActor):
    """Base of the notices: subclasses say how the text looks and on which way it goes."""

    class Meta:
        abstract = True  # Not an actor itself; its subclasses are, with the options below.
        queue_name = "notices"
        max_retries = 5
        store_results = True

    def perform(self, name):
        sent.append(self.text(name))
        return len(sent[-1])

    def text(self, name):
        raise NotImplementedError


class Welcome(Notice):
    def text(self, name):
        return f"mail: Welcome, {name}!"


class PasswordChanged(Notice):
    class Meta(Notice.Meta):
        priority = -10  # Lower numbers go first.

    def text(self, name):
        return f"phone: {name}, your password was changed."


if __name__ == "__main__":
    messages = [Welcome.send("Ada"), Welcome.send("Grace"), PasswordChanged.send("Ada")]
    with dramalite.Worker(broker, worker_threads=1):
        lengths = [message.get_result(block=True, timeout=5000) for message in messages]
    print(*sent, sep="\n")
    print(f"{sum(lengths)} characters sent by {Welcome.actor_name} and {PasswordChanged.actor_name}")
