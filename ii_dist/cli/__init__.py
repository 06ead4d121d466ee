"""The `ii-dist` command.

In: arguments. Out: an exit code and text for a person.
"""

from ii_dist.cli.main import main

__all__ = ["main"]
