"""The one error of bad input."""


class InputError(ValueError):
    """An argument, file or model that cannot be used. The message is one sentence and names the remedy."""
