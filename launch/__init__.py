"""ASK FOR NODES: `python -m launch submit CONFIG` turns a config into a job on this machine or on SLURM. No torch.

In: a config, perhaps a cluster file (`launch:` settings laid over it), overrides. Out: a run folder with its resolved
`config.yaml`, a job (Submitit's local or SLURM executor), and one record a job in `jobs/`.

    __main__    the command line
    submit      config > run folder > job
    folder      what a submission writes into the run folder
    account     the plan of a run in a few lines (`--dry-run`)
    machine     how many ranks and cores a node gives
    slurm       sbatch text and submission; everything that reaches sbatch is checked here
    local       submission on this machine
    follow      shows a job's output until it ends
    job         what Submitit runs on each node: the supervisor
    ranks       starts, watches and ends the ranks of a node
    rendezvous  which node this is, where rank 0 listens
    records     one JSON a job: who, when, why it ended
"""

from launch.job import TrainJob
from launch.records import JobRecord, read_record

__all__ = ["JobRecord", "TrainJob", "read_record"]
