"""The errors that modules raise for others to handle."""


class UserError(Exception):
    """A user's mistake in one sentence: what was wrong, where, and what would be right. Exit code 2."""


class SharedError(UserError):
    """An error that every rank raises with the same message, so the first rank of each machine prints it for all."""


class DecodeError(Exception):
    """Image `position` of a batch cannot be decoded; `reason` is the decoder's."""

    def __init__(self, position: int, reason: str):
        super().__init__(f"image {position} of the batch: {reason}")
        self.position, self.reason = position, reason
