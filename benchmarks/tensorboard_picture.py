"""Pictures of a run as TensorBoard shows it: ``python -m benchmarks.tensorboard_picture --out FOLDER``.

In: runs (`--runs`, a folder of run folders), or none: then two short runs on the digits are made, one of them killed
with SIGKILL on the way and resumed. Out: a PNG file for each tab, taken in a real browser (chromium, without a screen)
from a real TensorBoard on 127.0.0.1. `docs/tensorboard.png` is custom_scalars.png of it.
"""

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, SCALE = 1640, 1240, 1400 / 1640
TIMEOUT_S, SETTLE_S = 90.0, 6.0
FIRST, SECOND = "digits-fold3x3", "digits-none"
TABS = {
    "custom_scalars": "/#custom_scalars&_smoothingWeight=0",
    "time_series": "/#timeseries&_smoothingWeight=0",
    "scalars": "/#scalars&_smoothingWeight=0",
    "images": "/#images",
    "hparams": "/#hparams",
    "text": "/#text",
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensorboard_picture", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="run folders to show instead of new ones")
    parser.add_argument("--tabs", nargs="+", default=list(TABS), choices=TABS, metavar="TAB")
    parser.add_argument("--ranks", type=int, default=2, help="of the new runs (default 2)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs: Path = args.runs or make_runs(Path(scratch), args.ranks)
        with served(runs) as address, Browser(Path(scratch) / "browser") as browser:
            print(f"{check_steps(address)} numbers, each step of them once", flush=True)
            for tab in args.tabs:
                browser.open(address + TABS[tab])
                prepare(browser, tab, "" if args.runs else FIRST)
                (args.out / f"{tab}.png").write_bytes(browser.picture())
                print(args.out / f"{tab}.png", flush=True)


# Runs ----------------------------------------------------------------------------------------------------------------


def make_runs(folder: Path, ranks: int) -> Path:
    """Two short runs on the digits; the first was killed without warning on the way and went on."""
    data = ROOT / "data" / "digits"
    if not (data / "train.index").exists():
        data = folder / "digits"
        subprocess.run([sys.executable, "-m", "tools.import_dataset", "digits", "--out", data], cwd=ROOT, check=True)
    runs = folder / "runs"
    common = [f"runs_folder={runs}", f"data.root={data}", "engine.device=cpu", "checkpoint.every_steps=20"]
    common += ["metrics.log_every_steps=4", "metrics.inner_images_every_epochs=2", "train.epochs=6"]
    inner = [f"name={FIRST}", *common]
    first = start(ranks, inner)
    numbers = runs / FIRST / "metrics" / "rank_00000.jsonl"
    wait_until(lambda: numbers.exists() and '"step": 56,' in numbers.read_text(), "step 56", first)
    os.kill(json.loads((runs / FIRST / "lease.json").read_text())["pid"], signal.SIGKILL)
    first.wait()  # the launcher ends the other ranks
    for overrides in (inner, [f"name={SECOND}", "model.gate=none", "optim.lr=0.05", *common]):
        if start(ranks, overrides).wait():
            raise SystemExit(f"{overrides[0]}: the run failed")
    return runs


def start(ranks: int, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    """The demo's network on some ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, "-m", "ii_dist", "train", "configs/demo/digits.yaml", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_until(true: Any, what: str, process: "subprocess.Popen[bytes] | None" = None) -> None:
    deadline = time.monotonic() + 10 * TIMEOUT_S
    while not true():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit(f"waited in vain for {what}")
        time.sleep(0.1)


@contextlib.contextmanager
def served(runs: Path) -> Iterator[str]:
    """A TensorBoard over `runs`, which has read them: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs.name, "--host", "127.0.0.1"]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=runs.resolve().parent, stdout=said, stderr=said)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: len(_get(f"{address}/data/runs")) >= len(list(runs.glob("*/tb"))), "TensorBoard", server)
            time.sleep(6)  # its next look at the files
            yield address
        finally:
            server.terminate()
            server.wait()


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return []


# The browser ---------------------------------------------------------------------------------------------------------


class Browser:
    """A chromium that listens on a pipe (DevTools protocol: JSON with a zero byte after each message)."""

    def __init__(self, folder: Path) -> None:
        program = next(
            (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), ""
        )
        if not program:
            raise SystemExit("no chromium on this machine; install one")
        orders_in, self._orders = os.pipe()
        self._answers, answers_out = os.pipe()

        def lay_pipes() -> None:  # it reads from 3 and writes to 4
            high_in, high_out = os.dup(orders_in), os.dup(answers_out)
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        self._process = subprocess.Popen(
            [program, *flags, size, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=lay_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(orders_in)
        os.close(answers_out)
        self._number, self._rest, self._session = 0, b"", ""

    def __enter__(self) -> "Browser":
        pages = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.size(WIDTH, HEIGHT)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._orders)
        os.close(self._answers)

    def size(self, width: int, height: int) -> None:
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=SCALE, mobile=False
        )

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url="about:blank")  # another part of the same address would not load anew
        self._ask("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        wait_until(lambda: bool(self.run(script)), script)

    def picture(self) -> bytes:
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._orders, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            while b"\0" not in self._rest:
                if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise SystemExit(f"the browser does not answer {method}")
                part = os.read(self._answers, 1 << 20)
                if not part:
                    raise SystemExit("the browser ended")
                self._rest += part
            raw, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(raw)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']['message']}")
                return answer["result"]


# Every element of the page, also those that components keep to themselves.
ELEMENTS = """const elements = []; const walk = (root) => { for (const e of root.querySelectorAll('*')) {
elements.push(e); if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document);"""


def prepare(browser: Browser, tab: str, only: str = "") -> None:
    """Wait until the tab has drawn what it shows. CUSTOM SCALARS: of the runs whose name matches `only`."""
    browser.wait_for(f"(() => {{ {ELEMENTS} return elements.length > 300; }})()")
    time.sleep(SETTLE_S)
    if tab == "custom_scalars" and only:
        browser.run(f"(() => {{ {ELEMENTS} elements.find((e) => e.id === 'multiCheckbox').regex = '{only}'; }})()")
        time.sleep(SETTLE_S)


def check_steps(address: str) -> int:
    """How many numbers of all runs there are; ends the program where one shows a step twice or out of order."""
    count = 0
    for run, tags in _get(f"{address}/data/plugin/scalars/tags").items():
        for tag in tags:
            query = urllib.parse.urlencode({"run": run, "tag": tag})
            steps = [step for _, step, _ in _get(f"{address}/data/plugin/scalars/scalars?{query}")]
            if steps != sorted(set(steps)):
                raise SystemExit(f"{run}: {tag} shows the steps {steps}")
            count += 1
    return count


if __name__ == "__main__":
    main(sys.argv[1:])
