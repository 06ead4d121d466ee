"""Stands in for a rank: does what its rank's entry of the plan says. Needs only Python.

Arguments: a JSON object rank -> behaviour, then whatever the supervisor appends. Behaviours:
exit:N | error (says one line, then 3) | die:SIGNAME | environ | tell:BEHAVIOUR (as environ first) |
sleep (no handlers) |
polite (a stop request ends it with 75) | deaf (to stop requests) |
parent (starts a child in its own group, then sleeps) | after:MARK:BEHAVIOUR (waits for the file MARK first) |
commit:FOLDER:N:BEHAVIOUR (a committed step N stands in FOLDER first) | steps:N:BEHAVIOUR (N signs of life first) |
hang:gil (a thread holds the interpreter) | hang:stop (SIGSTOP) | hang:read (a read that never ends) |
hang:wait (deaf, in a wait) | save:SECONDS:BEHAVIOUR (tells of a save that took so long).
A list of behaviours: one a start of the ranks (restarts and attempts added up), the last one for all
further ones.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ii_dist.runtime import Heartbeat, stacks_on_request

arrived: list[str] = []


def note(signum: int, frame: object) -> None:
    arrived.append(signal.Signals(signum).name)


def say(*words: object) -> None:
    print(os.environ["RANK"], *words, flush=True)


def hang(how: str) -> None:
    say("hangs", os.getpid())
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "gil":
        re.match("(a?){40}a{40}", "a" * 40)
    if how == "read":
        read_end, _ = os.pipe()
        os.read(read_end, 1)
    heart.sign("step", 1000)  # on its way: it waits for another
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    time.sleep(300)


def act(behaviour: str) -> int:
    name, _, rest = behaviour.partition(":")
    if name == "after":
        mark, _, then = rest.partition(":")
        while not Path(mark).exists():
            time.sleep(0.02)
        return act(then)
    if name == "commit":
        folder, step, then = rest.split(":", 2)
        Path(folder, f"step_{int(step):09d}").mkdir(parents=True, exist_ok=True)
        return act(then)
    if name in ("steps", "save"):
        number, _, then = rest.partition(":")
        if name == "save":
            heart.saved(float(number))
        for step in range(int(number) if name == "steps" else 3):
            heart.sign("data", step)
            heart.sign("step", step)
            time.sleep(0.02)
        return act(then)
    if name == "hang":
        hang(rest)
    if name == "exit":
        say("leaves with", rest)
        return int(rest)
    if name == "error":
        print("error: data/x.index: is not an index", flush=True)
        return 3
    if name == "die":
        os.kill(os.getpid(), signal.Signals[rest])
    if name in ("environ", "tell"):
        say(json.dumps({"environ": dict(os.environ), "arguments": sys.argv[2:], "umask": os.umask(0)}))
        return act(rest) if name == "tell" else 0
    if name == "parent":
        say("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]).pid)
    if name == "polite":
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(signum, note)
    if name == "deaf":
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
    say("ready", os.getpid())
    until_s = time.monotonic() + 300
    while time.monotonic() < until_s:
        if arrived:
            time.sleep(0.5)  # long enough for a second signal to be seen
            say("asked by", *arrived)
            return 75
        time.sleep(0.02)
    return 99


def this_start(behaviours: str | list[str]) -> str:
    if isinstance(behaviours, str):
        return behaviours
    attempt, restart = divmod(int(os.environ["II_DIST_ATTEMPT"]), 1000)
    return behaviours[min(attempt + restart, len(behaviours) - 1)]


if __name__ == "__main__":
    stacks_on_request(sys.stderr)
    heart = Heartbeat(os.environ.get("II_DIST_BEATS", ""))
    sys.exit(act(this_start(json.loads(sys.argv[1])[os.environ["RANK"]])))
