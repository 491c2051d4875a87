"""The one exception that a user is meant to see.

Raise `UserError` for anything that the person at the terminal can put right: a wrong path, a broken file, sizes that do not
divide. The message is one line: what is wrong, which file or config key, and what to do. The command line prints it as
`error: …` without a traceback and leaves with exit code 2. Anything else that escapes is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Bad input or environment; `str(error)` is one complete line for the terminal."""
