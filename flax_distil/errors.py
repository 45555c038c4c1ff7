"""The one exception that means «your input, not our bug»."""


class InputError(ValueError):
    """The user's input or configuration is wrong; the message says what, both numbers and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
