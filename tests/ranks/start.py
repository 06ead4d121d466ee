"""Start real ranks: processes that meet over gloo, as a launcher would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_ranks(
    arguments: Sequence[str], world_size: int, folder: Path, port: int | None = None, **more_env: str
) -> list[subprocess.Popen[str]]:
    """`python <arguments>` once a rank; output goes to <folder>/rank_<n>.out."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **more_env,
        }
        with (folder / f"rank_{rank}.out").open("w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments], env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True
                )
            )
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 120) -> list[int]:
    """Exit codes in rank order; kills all of them when the time is up."""
    try:
        return [p.wait(timeout_s) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()


def output(folder: Path) -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text()}" for f in sorted(folder.glob("rank_*.out")))


def run_ranks(arguments: Sequence[str], world_size: int, folder: Path, timeout_s: float = 120, **env: str) -> list[int]:
    """Start, wait, and show what they said when one failed."""
    codes = finish(start_ranks(arguments, world_size, folder, **env), timeout_s)
    if any(codes):
        print(output(folder))
    return codes
