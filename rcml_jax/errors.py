"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A wrong configuration, file or environment: one sentence with the remedy.

    The commands print the sentence and exit with status 2; library users can catch it.
    """


class ProcessLost(UserError):
    """Another process of the same job has ended, so that this one cannot go on."""
