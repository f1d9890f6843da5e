"""The exceptions that this library raises on purpose.

Every message is one sentence that names the offending value and says what to do. The command line
prints exactly these (and operating-system errors) without a traceback; anything else is a bug.
"""

import signal


class DiffadError(Exception):
    """Base class of all errors below."""


class InputError(DiffadError, ValueError):
    """Data or an option that the caller gave cannot be used: shape, dtype, values, files, names."""


class CheckpointError(DiffadError):
    """A checkpoint is damaged, incomplete, of another version, or another kind of file."""


class BackendError(DiffadError, RuntimeError):
    """A backend or device that was asked for is not there."""


class ProcessError(DiffadError, RuntimeError):
    """Another process of a distributed run has ended or does not answer."""


class Terminated(KeyboardInterrupt):
    """The KeyboardInterrupt of a training that SIGTERM has interrupted, or another ``signal``: the
    SIGHUP of a terminal that was closed."""

    signal: int = signal.SIGTERM


class SkippedInput(UserWarning):
    """A file among others could not be used and was left out."""
