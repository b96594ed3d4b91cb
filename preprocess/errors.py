"""The one error of builds that is no mistake in the request. Imports nothing."""


class BuildError(Exception):
    """A build that stopped or ended short of what was asked; the message says what to do."""
