"""Reasons a run ends, each with the exit code that tells a launcher what to do next."""


class RunError(Exception):
    """A run that cannot go on; the message is for the user and needs no traceback."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """The configuration, or the layout asked for, cannot be run."""

    exit_code = 64


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


DATA_EXIT_CODE = 65
"""lasp.data.errors.DataError: the text or the token file cannot be used."""
STOPPED_EXIT_CODE = 75
"""Interrupted by a signal, with a checkpoint saved: start again with --resume."""
