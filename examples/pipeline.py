"""A pipeline: each step gets the result of the one before; three of them run side by side.

    python3 examples/pipeline.py
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Finds dramalite.py in a bare clone.
import dramalite

dramalite.set_broker(dramalite.MemoryBroker())


@dramalite.actor
def read(name):
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@dramalite.actor
def count(text):
    return Counter(text.split())


@dramalite.actor(store_results=True)
def most_common(limit, counts):  # The result of the step before comes last.
    return Counter(counts).most_common(limit)


if __name__ == "__main__":
    names = ["class_based.py", "pipeline.py", "retries.py"]
    pipelines = [read.message(name) | count.message() | most_common.message(3) for name in names]
    group = dramalite.group(pipelines).run()
    with dramalite.Worker(dramalite.get_broker(), worker_threads=2):
        results = list(group.get_results(block=True, timeout=5000))
    for name, result in zip(names, results):
        print(f"{name}: " + ", ".join(f"{word} {times} times" for word, times in result))
