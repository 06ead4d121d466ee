"""What runs, as Markdown for TensorBoard's TEXT tab.

In: config, plan, device, the step that the attempt goes on from. Out: a text by title: the few lines that a person
looks for first, the whole config, the whole plan.
"""

import dataclasses
import platform

import torch

from ii_dist.config import Plan, RunConfig, dump_config


def run_in_words(cfg: RunConfig, plan: Plan, device: torch.device, resumed_step: int) -> dict[str, str]:
    """Title -> Markdown."""
    config = f"The whole config of this attempt, as in `config.yaml`.\n\n```\n{dump_config(cfg)}```\n"
    numbers = _table("plan", "", dataclasses.asdict(plan))
    return {"run/1_overview": _overview(cfg, plan, device, resumed_step), "run/2_config": config, "run/3_plan": numbers}


def _overview(cfg: RunConfig, plan: Plan, device: torch.device, resumed_step: int) -> str:
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    data, accumulated = cfg.data, f", in {plan.accumulate_steps} parts" if plan.accumulate_steps > 1 else ""
    where = "synthetic images" if data.source == "synthetic" else data.root
    return _table(
        f"{cfg.name}",
        f"goes on after step {resumed_step}" if resumed_step else "from the start",
        {
            "network": f"{cfg.model.network}, gate {cfg.model.gate}",
            "images": f"{where}: {plan.train_images:,} for training, {plan.eval_images:,} for evaluation, "
            f"{plan.num_classes} classes, {data.side_of_epoch(0)} pixels at first",
            "steps": f"{plan.total_steps:,}: {cfg.train.epochs:g} epochs of {plan.steps_per_epoch:,}",
            "batch": f"{plan.global_batch:,} images = {plan.world_size} ranks x {plan.images_per_rank}{accumulated}",
            "optimizer": f"{cfg.optim.optimizer}, learning rate {plan.peak_lr:g} at most, {cfg.optim.schedule}",
            "engine": f"{cfg.engine.kind}, {cfg.engine.precision}, on {on}",
            "torch": torch.__version__,
            "seed": str(cfg.seed),
        },
    )


def _table(left: str, right: str, rows: dict[str, object]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]) + "\n"
