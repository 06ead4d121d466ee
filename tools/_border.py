"""The border of every command-line program: what the user can mend becomes one line and an exit code.

In: a program's ``main(arguments) -> exit code``. Out: the end of the process; bugs of ours keep their traceback
(code 1).
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ii_dist.config.errors import UserError

EXIT_INTERRUPTED = 130


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main` with the command line's arguments and leave with its exit code."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) went away: that is its right. Keep the interpreter's own flush at exit silent too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
