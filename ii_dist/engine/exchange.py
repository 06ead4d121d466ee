"""When computing gradients ends and waiting for those of other ranks begins.

In: the logits of a step that is measured. Out: the phase "allreduce" begins in the middle of the backward pass.
"""

from typing import Any

import torch

from ii_dist.runtime.phases import Phases


def mark_exchange(logits_NC: torch.Tensor, phases: Phases) -> None:
    """Begin "allreduce" when the backward pass of `logits_NC` has computed its last gradient.

    DistributedDataParallel waits for its all-reduces in a function that autograd calls at the very end. Functions of
    that kind are called in the order in which they are handed in; ours is handed in with the first gradient, long
    before, hence it is called when all is computed and nothing is waited for. It changes no gradient.
    """
    autograd: Any = torch.autograd.Variable._execution_engine

    def at_first_gradient(_gradient: torch.Tensor) -> None:
        autograd.queue_callback(lambda: phases.begin("allreduce"))

    logits_NC.register_hook(at_first_gradient)  # type: ignore[no-untyped-call]
