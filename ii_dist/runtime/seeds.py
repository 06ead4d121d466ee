"""Random numbers without hidden state: each step's generators are set from (seed, step, rank).

In: three integers. Out: torch's generators of this rank. A resumed run needs no saved generator state and draws what
the uninterrupted run would have drawn; nothing that another library draws in between can shift it.
"""

import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One well-spread 64-bit number from several (the splitmix64 finalizer over a running sum)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + (number & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Set the generators that dropout and stochastic depth draw from in this step on this rank."""
    number = mix(seed, step, rank)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


def seed_init(seed: int) -> None:
    """Set the generators that the weights are drawn from: the same on every rank."""
    torch.manual_seed(mix(seed, 0x1217))
