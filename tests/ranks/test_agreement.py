"""What real ranks agree on: votes, texts, bytes, and a taken port."""

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.ranks.start import ROOT, finish, free_port, output, run_ranks, start_ranks

pytestmark = pytest.mark.ranks

SCRIPT = """
import json, os, signal, sys, torch
from pathlib import Path
from ii_dist.runtime import this_process
from ii_dist.runtime.group import all_gather_bytes, any_rank, broadcast_text, close_group, new_cpu_group, open_group
from ii_dist.runtime.stop import StopRequest, StopVote

world = this_process()
open_group(world, torch.device("cpu"), timeout_s=60)
said = broadcast_text("Größe 7" if world.rank == 0 else "something else")
empty = broadcast_text("")
rows = all_gather_bytes(bytes([world.rank] * 3), new_cpu_group())
votes = [any_rank(False), any_rank(world.rank == 1)]
request = StopRequest()
request.listen()
vote = StopVote(request)
stopped_at = None
for step in range(1, 11):
    if step == 4 and world.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    if vote.cast():
        stopped_at = step
        break
vote.close()
close_group()
result = dict(said=said, empty=empty, rows=[r.hex() for r in rows], votes=votes, stopped_at=stopped_at)
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(result))
"""


def test_ranks_agree(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert run_ranks([str(script), str(tmp_path)], 2, tmp_path) == [0, 0]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0]["said"] == "Größe 7"
    assert results[0]["empty"] == ""
    assert results[0]["rows"] == ["000000", "010101"]
    assert results[0]["votes"] == [False, True]
    assert results[0]["stopped_at"] == 5  # asked at step 4 on rank 1, agreed one step later on both


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import torch; from ii_dist.runtime import this_process; from ii_dist.runtime.group import open_group; "
        "from ii_dist.config import ClusterError\n"
        "try: open_group(this_process(), torch.device('cpu'), timeout_s=5)\n"
        "except ClusterError as e: print('SAID', e)"
    )
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", port))
        taken.listen()
        processes = start_ranks(["-c", code], 2, tmp_path, port=port)
        other = processes.pop()  # not needed: rank 0 cannot open the port
        other.kill()
        other.wait()
        assert finish(processes) == [0]
    said = f"SAID rendezvous: port {port} on {socket.gethostname()} is in use; set launch.master_port"
    assert said in output(tmp_path)


def test_ranks_of_torchrun_meet(tmp_path: Path) -> None:
    """torchrun serves the store itself, at the port where rank 0 would."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: run\nruns_folder: {tmp_path}/runs\n"
        "data: {source: synthetic, synthetic_images: 32, synthetic_classes: 4, image_size: 16, eval_image_size: 16,"
        " eval_resize: 16}\n"
        "model: {network: ini_resnet20}\nengine: {device: cpu}\n"
        "train: {epochs: 1, global_batch: 8}\noptim: {warmup_epochs: 0}\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "ii_dist", "train", str(config)], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["world_size"] == 2
