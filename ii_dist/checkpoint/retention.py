"""Which steps may go. Pure: touches no disk.

In: committed steps. Out: those that no rule keeps.
"""

from collections.abc import Iterable


def steps_to_delete(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Steps that are neither among the newest `keep_last` nor a multiple of `keep_every_steps` (0 = no such rule).

    The newest step is always kept, whatever `keep_last` says.
    """
    rising = sorted(set(steps))
    newest = set(rising[-max(1, keep_last) :])
    return [s for s in rising if s not in newest and not (keep_every_steps > 0 and s % keep_every_steps == 0)]
