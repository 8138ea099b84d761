"""The ways in which a run ends early, each with one line for the user and an exit code."""

from __future__ import annotations


class Failure(Exception):
    """A mistake or a full disk: the message names the thing and the fix."""

    exit_code = 1


class BadInput(Failure):
    """What the user passed cannot be used (data, options, a checkpoint of another run)."""

    exit_code = 2


class Diverged(Failure):
    """The loss, its gradient or a hidden state is not finite."""


class Interrupted(Failure):
    """A signal: the step in hand was finished and saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
