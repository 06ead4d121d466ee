"""Errors that a user can act on, each with the exit code of its class.

Every command of the project ends with one of these codes: 0 done, 1 a bug of ours (traceback), 2 wrong config or
arguments, 3 data, 4 checkpoint, 5 cluster or environment, 75 stopped as asked and resumable.
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_ENVIRONMENT = 5
EXIT_STOPPED = 75


class UserError(Exception):
    """Something the user can mend. The message is one line: what, which file or key, what to do."""

    exit_code = EXIT_BUG


class ConfigError(UserError):
    """A wrong key, value or combination in a config file or on the command line."""

    exit_code = EXIT_CONFIG


class DataError(UserError):
    """A data set, index or image that cannot be used."""

    exit_code = EXIT_DATA


class CheckpointError(UserError):
    """A checkpoint or run folder content that cannot be used or written."""

    exit_code = EXIT_CHECKPOINT


class ClusterError(UserError):
    """The machine, the scheduler, the network or a missing package."""

    exit_code = EXIT_ENVIRONMENT
