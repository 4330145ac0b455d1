"""Where preparing data says what it does."""

import sys


def log_line(line: str) -> None:
    """A line for the user, beside what the program puts out."""
    print(line, file=sys.stderr, flush=True)
