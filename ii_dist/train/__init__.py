"""THE LOOP: from a config to a trained, evaluated, saved network.

In: a `RunConfig`, its `Plan`, a `World`. Out: an exit code and a run folder. `preflight` checks without torch;
`opening` opens all rooms, `session` is what they make together, `loop` is the loop, `evaluate`, `resume` and `agree`
are its verbs, `commands` the whole; `pictures`, `traces` and `in_words` show it to a person; `export_request` and
`export` turn what it made into one file, `recalibrate` measures the BatchNorm statistics of such a file. `fit`, `train`
and `evaluate_checkpoint` import torch when first asked for.
"""

from typing import TYPE_CHECKING

from ii_dist.train.preflight import preflight

if TYPE_CHECKING:
    from ii_dist.train.commands import evaluate_checkpoint, train
    from ii_dist.train.loop import fit

__all__ = ["evaluate_checkpoint", "fit", "preflight", "train"]


def __getattr__(name: str) -> object:
    if name == "fit":
        from ii_dist.train.loop import fit

        return fit
    if name in __all__:
        from ii_dist.train import commands

        return getattr(commands, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
