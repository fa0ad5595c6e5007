"""The two ways in which fedhead fails, and the exit status of each."""


class FedheadError(Exception):
    """A failure told in one sentence: what was wrong, where, what was expected, what to do."""

    exit_status = 1


class UserError(FedheadError, ValueError):
    """A mistake in what the user asked for or supplied; nothing was started because of it."""

    exit_status = 2


class UnreadableDataError(FedheadError):
    """Data of which no row can be read; the sentence may name a file, so it does not leave a site."""

    exit_status = 2
