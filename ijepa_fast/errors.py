"""Errors that one module raises for another to handle."""


class UserError(Exception):
    """A mistake of the user's, in one sentence: what was wrong, where, and what would be right. Exit code 2."""


class SharedError(UserError):
    """One that every rank raises, in the same words: one rank of a machine says it for all."""


class DecodeError(Exception):
    """Image `position` of a batch cannot be decoded; `reason` is the decoder's."""

    def __init__(self, position: int, reason: str):
        super().__init__(f"image {position} of the batch: {reason}")
        self.position, self.reason = position, reason
