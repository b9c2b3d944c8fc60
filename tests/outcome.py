"""What a command line left behind, for tests that run one."""
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a user's error, without its "error: "."""
        assert self.code == 2, self
        prefix, _, sentence = self.err.partition(" ")
        assert prefix == "error:", self.err
        assert sentence.count("\n") == 1, f"more than one line: {self.err}"
        return sentence.rstrip("\n")
