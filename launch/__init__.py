"""ASK FOR NODES: `python -m launch submit CONFIG` turns a config into a job on this machine or on SLURM. No torch.

In: a config, perhaps a cluster file (`launch:` settings laid over it), overrides. Out: a run folder with its resolved
`config.yaml`, the code that the job runs, a job (Submitit's local or SLURM executor), and one record a job in `jobs/`.
A run is a chain of jobs: `status`, `logs`, `cancel` and `why` speak of the run.

Asking for nodes:
    __main__    the command line
    submit      config > run folder > job
    sweep       several runs from one config; job_array: them as one job array
    planned     one run that is about to be submitted
    account     what it will cost (`--dry-run`); weights: the size of its checkpoints
    folder      what a submission writes into the run folder; snapshot: the code that its jobs run
    owner       one job a run folder; submitted: one line a submission
    slurm       sbatch text and submission; everything that reaches sbatch is checked here
    local       submission on this machine
    follow      shows a job's output until it ends
Looking after it:
    scheduler   what SLURM says of jobs
    history     a run as a chain of attempts, and what it does now
    numbers     what a run has written about itself
    status, logs, why, cancel    the commands
On the nodes:
    task        looks at what will be unpickled, then hands over to Submitit
    machine     cores of a node; processes: which is which
    job         what Submitit runs on each node: the supervisor
    ranks       starts, watches and ends the ranks of a node
    rendezvous  which node this is, where rank 0 listens
    records     one JSON a job: who, when, why it ended
"""

from launch.job import TrainJob
from launch.records import JobRecord, read_record

__all__ = ["JobRecord", "TrainJob", "read_record"]
