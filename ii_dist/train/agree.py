"""Acts of rank 0 that all ranks must know the outcome of.

In: a function for rank 0. Out: its text on every rank, or its UserError on every rank, so that all end with one code.
"""

from collections.abc import Callable

from ii_dist.config import UserError
from ii_dist.runtime import World
from ii_dist.runtime.group import broadcast_text


def on_rank0(world: World, act: Callable[[], str]) -> str:
    """Run `act` on rank 0. Collective."""
    outcome = ""
    if world.rank == 0:
        try:
            outcome = f"0 {act()}"
        except UserError as error:
            outcome = f"{error.exit_code} {error}"
    code, _, text = broadcast_text(outcome).partition(" ")
    if code == "0":
        return text
    refused = UserError(text)
    refused.exit_code = int(code)
    raise refused
