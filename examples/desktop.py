"""Work in the background of a desktop program: the window stays alive, nothing else is started.

    python3 examples/desktop.py [--auto]        # --auto: press the button, close when done
"""

import hashlib
import sys
import tempfile
import tkinter
from pathlib import Path
from queue import SimpleQueue
from tkinter import ttk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Finds dramalite.py in a bare clone.
import dramalite

JOBS = 60
finished = SimpleQueue()  # From the worker's threads to the window's, which alone touches widgets.


@dramalite.actor
def derive_key(number):
    finished.put(hashlib.pbkdf2_hmac("sha256", str(number).encode(), b"salt", 40_000))


def start():
    button.state(["disabled"])
    for number in range(JOBS):
        derive_key.send(number)


def look():
    """Show what the worker has finished; called 100 times a second."""
    global looks
    looks += 1
    while not finished.empty():
        keys.add(finished.get())
    bar["value"] = len(keys)
    if len(keys) == JOBS and "--auto" in sys.argv:
        window.destroy()
    else:
        window.after(10, look)


if __name__ == "__main__":
    keys, looks = set(), 0
    window = tkinter.Tk()
    bar = ttk.Progressbar(window, length=400, maximum=JOBS)
    button = ttk.Button(window, text="Derive keys", command=start)
    bar.pack(padx=20, pady=20)
    button.pack(pady=20)
    with tempfile.TemporaryDirectory() as folder:  # In earnest: a file in the user's data folder.
        dramalite.set_broker(dramalite.SQLiteBroker(Path(folder, "queue.db")))
        with dramalite.Worker(dramalite.get_broker(), worker_threads=2):
            look()
            if "--auto" in sys.argv:
                button.invoke()
            window.mainloop()
        dramalite.get_broker().close()
    print(f"{len(keys)} of {JOBS} keys derived; the window was looked after {looks} times meanwhile")
