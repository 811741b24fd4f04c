"""What is wrong with what was asked for."""


class InputError(ValueError):
    """Something is missing or cannot be; the message is one sentence that says what to do."""
