"""Reasons a command ends, each with the exit code that tells a launcher what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager


class RunError(Exception):
    """A run that cannot go on; the message is for the user and needs no traceback."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """The configuration, or the layout asked for, cannot be run."""

    exit_code = 64


class DataError(RunError, ValueError):
    """The text, the tokenizer or the token file cannot be used; the message says what to do."""

    exit_code = 65


class CheckpointError(RunError):
    """No usable checkpoint, or one that does not belong to this model."""

    exit_code = 66


class NumericsError(RunError):
    """NaN or infinity in the loss or a gradient; no weight was changed."""

    exit_code = 70


class PeerLostError(RunError):
    """Another process of the run died or stopped answering."""

    exit_code = 71


class ReplicaError(RunError):
    """Processes that should hold the same weights hold different ones; nothing of it was saved."""

    exit_code = 72


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Around the first use of a model as configured: what its parts refuse, by ValueError, is a ConfigError."""
    try:
        yield
    except RunError:
        raise
    except ValueError as error:
        raise ConfigError(f"the model, as configured, does not run here: {error}") from error


FILES_EXIT_CODE = 74
"""OSError: the system does not let a file or folder be read or written."""
INTERRUPTED_EXIT_CODE = 130
"""Ctrl-C where nothing was to be saved."""
STOPPED_EXIT_CODE = 75
"""Interrupted by a signal, with a checkpoint saved: start again with --resume."""
