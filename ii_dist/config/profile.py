"""Which steps leave a profiler trace.

In: nothing. Out: a part of the config tree.
"""

import re
from typing import Annotated, Self

from pydantic import Field, Strict, model_validator

from ii_dist.config.slices import Count, Slice

_SPAN = re.compile(r"(\d{1,9}):(\d{1,9})")

Ranks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False)]


class ProfileConfig(Slice):
    """Traces of single steps in `runs/NAME/profile/`, for Perfetto or chrome://tracing.

    Whatever stands here, a file `profile_now` in the run folder asks for a trace of a run that is under way: it begins
    after the next line of numbers, and the file is gone when the trace is there.
    """

    steps: str = ""
    """START:END = trace the steps START to END, both of them too; a run's first step is 1. "" = none."""
    steps_on_request: Count = 3
    """Steps that a `profile_now` without a number in it asks for."""
    ranks: Ranks = (0,)
    """Ranks that trace; [] = all of them."""
    memory: bool = False
    """Also the shapes that operators saw and every allocation: slower, and a file several times as large."""

    @model_validator(mode="after")
    def _steps_can_be(self) -> Self:
        if self.steps and self.span is None:
            raise ValueError(
                f"steps {self.steps!r}: needs START:END, whole numbers with 1 <= START <= END, such as 100:104"
            )
        return self

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last step of `steps`."""
        match = _SPAN.fullmatch(self.steps)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        return (first, last) if 1 <= first <= last else None

    def traces_on(self, rank: int) -> bool:
        return not self.ranks or rank in self.ranks
