"""The errors of a run that could not go on, or not to the end."""


class TrainingError(RuntimeError):
    """A run that was set up correctly failed on its way, say on a full disk.

    Its message stands for itself: the commands print it without a traceback and exit with ``exit_code``.
    """

    exit_code = 1


class UnfinishedError(TrainingError):
    """A run came to its end, but not with every adapter: some failed, or were stopped or refused."""

    exit_code = 3
