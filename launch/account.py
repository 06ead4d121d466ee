"""The plan of a run in a few lines, before anything is paid for.

In: a config and a number of ranks. Out: text. Reads the headers of the data set's indexes, nothing else.
"""

from ii_dist.config import DataError, Plan, RunConfig, RunFolder, data_facts, make_plan


def plan_of(cfg: RunConfig, ranks: int) -> Plan:
    """Raises DataError where the data set is not readable here, ConfigError where the numbers do not fit."""
    return make_plan(cfg, ranks, data_facts(cfg.data))


def account_lines(cfg: RunConfig, folder: RunFolder, ranks_per_node: int) -> list[str]:
    """What this submission would be. Raises ConfigError where the batch does not fit the ranks."""
    ranks = cfg.launch.nodes * ranks_per_node
    lines = [
        f"run     {cfg.name} in {folder.root}",
        f"ranks   {ranks} = {cfg.launch.nodes} node(s) x {ranks_per_node}",
    ]
    try:
        plan = plan_of(cfg, ranks)
    except DataError as error:
        return [*lines, f"data    not readable here, so steps are unknown: {error}"]
    return [
        *lines,
        f"data    {plan.train_images} training and {plan.eval_images} evaluation images, {plan.num_classes} classes",
        f"batch   {plan.global_batch} = {ranks} ranks x {plan.images_per_rank} images ({_micro_batches(cfg, plan)})",
        f"steps   {plan.steps_per_epoch} an epoch, {plan.total_steps} in {cfg.train.epochs:g} epoch(s);"
        f" {plan.dropped_images_per_epoch} images of each epoch fill no batch",
    ]


def _micro_batches(cfg: RunConfig, plan: Plan) -> str:
    if cfg.train.max_images_per_rank == "auto":
        return "in micro-batches that fit, found when the run starts"
    return f"{plan.accumulate_steps} micro-batch(es) of {plan.micro_batch}"
