"""Stands in for a rank: does what its rank's entry of the plan says. Needs only Python.

Arguments: a JSON object rank -> behaviour, then whatever the supervisor appends. Behaviours:
exit:N | error (says one line, then 3) | die:SIGNAME | environ | sleep (no handlers) |
polite (a stop request ends it with 75) | deaf (to stop requests) |
parent (starts a child in its own group, then sleeps) | after:MARK:BEHAVIOUR (waits for the file MARK first)
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

arrived: list[str] = []


def note(signum: int, frame: object) -> None:
    arrived.append(signal.Signals(signum).name)


def say(*words: object) -> None:
    print(os.environ["RANK"], *words, flush=True)


def act(behaviour: str) -> int:
    name, _, rest = behaviour.partition(":")
    if name == "after":
        mark, _, then = rest.partition(":")
        while not Path(mark).exists():
            time.sleep(0.02)
        return act(then)
    if name == "exit":
        say("leaves with", rest)
        return int(rest)
    if name == "error":
        print("error: data/x.index: is not an index", flush=True)
        return 3
    if name == "die":
        os.kill(os.getpid(), signal.Signals[rest])
    if name == "environ":
        say(json.dumps({"environ": dict(os.environ), "arguments": sys.argv[2:], "umask": os.umask(0)}))
        return 0
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


if __name__ == "__main__":
    sys.exit(act(json.loads(sys.argv[1])[os.environ["RANK"]]))
