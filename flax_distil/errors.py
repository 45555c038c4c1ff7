"""The exceptions that mean «your input, not our bug»."""


class InputError(ValueError):
    """The user's input or configuration is wrong; the message says what, and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """

    status = 2


class SomeFailed(InputError):
    """Some of many inputs could not be used, the others are done; the message lists the failed.

    The command line exits with status 1.
    """

    status = 1
