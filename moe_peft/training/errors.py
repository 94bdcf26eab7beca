"""The error of a run that could not go on."""


class TrainingError(RuntimeError):
    """A run that was set up correctly failed on its way, say at a loss that is not finite.

    Its message stands for itself: the commands print it without a traceback and exit with 1.
    """
