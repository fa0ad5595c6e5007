"""The two ways in which fedhead fails, and the exit status of each."""


class FedheadError(Exception):
    """A failure in one sentence: the fault, its place, the expectation and the remedy."""

    exit_status = 1


class UserError(FedheadError, ValueError):
    """A mistake in the user's request or input; nothing was started because of it."""

    exit_status = 2


class UnreadableDataError(FedheadError):
    """Data of which no row can be read; the sentence may name a file, so it does not leave a site."""

    exit_status = 2
