"""Mistakes of the user, told apart from mistakes of the program. Needs no torch: every package may import this."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input that the user can mend: an option, a file, a combination. The message is one line that says how.

    Scripts print it without a traceback and exit with code 2; any other exception is a bug and keeps its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that the project expects, is not there."""


class ResourceError(OSError):
    """A resource of the run is used up or gone: disk, quota, memory, a process that reads data or another rank.

    The message is one line. Scripts print it without a traceback and exit with code 4; the same command goes on once
    there is room again.
    """


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first of these names for a message, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
