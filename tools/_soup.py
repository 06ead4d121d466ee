"""Greedy soups: which of several networks to average, and how a candidate is scored by a command of the user."""

import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tried:
    """One scored average: which inputs were in it (numbers in the order given), its score, whether it was kept."""

    members: tuple[int, ...]
    score: float
    kept: bool


def greedy(count: int, score: Callable[[tuple[int, ...]], float]) -> tuple[tuple[int, ...], list[Tried]]:
    """The members of the soup, and all that was tried.

    The inputs are scored alone and taken best first (of equals the one given first); each stays if the uniform average
    with it scores at least as high as without it. Source: Wortsman et al. 2022, "Model soups", recipe 1.
    """
    alone = [score((k,)) for k in range(count)]
    order = sorted(range(count), key=lambda k: (-alone[k], k))
    soup: tuple[int, ...] = (order[0],)
    best = alone[order[0]]
    tried = [Tried((k,), alone[k], k == order[0]) for k in order]
    for k in order[1:]:
        candidate = (*soup, k)
        found = score(candidate)
        tried.append(Tried(candidate, found, found >= best))
        if found >= best:
            soup, best = candidate, found
    return soup, tried


def check_command(command: Sequence[str]) -> None:
    if not any("{file}" in word for word in command):
        raise ConfigError(
            "--mode greedy needs an evaluation command after --, with {file} where the file to score goes, such as: "
            "-- ii-dist eval {file} --config CONFIG --score"
        )


def score_file(command: Sequence[str], file: Path) -> float:
    """What the user's command says of `file`: the number that is the last line of its output; higher is better.

    The words go to the program as they are, through no shell. Raises ConfigError.
    """
    words = [word.replace("{file}", str(file)) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise ConfigError(f"evaluation command {words[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise ConfigError(f"evaluation command {words[0]} ended with exit code {done.returncode} for {file.name}")
    lines = done.stdout.strip().splitlines() or [""]
    try:
        found = float(lines[-1])
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise ConfigError(f"evaluation command {words[0]}: its last line is {lines[-1][:80]!r}, not a score")
    return found
