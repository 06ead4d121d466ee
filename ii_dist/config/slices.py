"""What the parts of the config tree are made of: their base class and the kinds of values.

In: nothing. Out: names for `schema` and its neighbours.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Pair = Annotated[tuple[float, float], Strict(False)]
Triple = Annotated[tuple[float, float, float], Strict(False)]
Points = Annotated[tuple[Annotated[tuple[int, int], Strict(False)], ...], Strict(False)]
Names = Annotated[tuple[str, ...], Strict(False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Epochs = Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Strict(False)]
Count = Annotated[int, Field(ge=1)]
# Reaches file names and sbatch lines: nothing that a shell or SLURM could read as more than a word.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Slice(BaseModel):
    """Base of every part of the tree: unknown keys, wrong types and later writes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
