"""The one error that a command shows to a person as a single line."""


class UserError(ValueError):
    """Something given by the user cannot work: `train.py` prints it as one line and exits with 2.

    The message says what was given, what is allowed and what to do.
    """


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
