"""The error of the laboratory and the command line for mistakes of the user."""


class LabError(Exception):
    """A mistake in what the user asked for; the command line prints its message without a traceback."""


class PausedError(Exception):
    """The time of this command is over; everything is kept, and the same command continues."""


class NotFiniteError(LabError):
    """A run ended with a metric that is not a finite number."""
