"""What is a user's to mend: `train` and its siblings print its sentence and exit with 2."""


class UserError(Exception):
    """One clear sentence: what was wrong, where, and what would be right."""


class SharedError(UserError):
    """One that every rank raises, in the same words: one rank of a machine says it for all."""
