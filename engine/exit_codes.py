"""Exit codes of every script."""

from sparsity.errors import ResourceError, UserError
from sparsity.files import used_up

DONE = 0
BUG = 1  # an exception of the program, with its traceback
BAD_INPUT = 2  # one line says which option or file, and what to do
STOPPED = 3  # SIGTERM or SIGUSR1: what was done is saved, and the same command goes on
RESOURCES = 4  # disk or quota full, memory used up, a process killed: the same command goes on once there is room
INTERRUPTED = 130  # Ctrl-C

# In the RuntimeErrors of torch: something is used up, or a process is gone -> what the user is told.
SIGNS = {
    "can't allocate memory": "not enough memory",
    "out of memory": "the device has not enough memory: try smaller batches",
    "DataLoader worker (pid": "a process that reads data was killed, perhaps for lack of memory: try fewer workers",
    "onnection closed by peer": "another process of this run is gone",
    "onnection reset by peer": "another process of this run is gone",
}


def exit_code(error: BaseException) -> int:
    """Return the exit code with which a script ends on this error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, UserError):
        return BAD_INPUT
    return BUG if told(error) is None else RESOURCES


def told(error: BaseException) -> str | None:
    """Return what the user is told of an error, in one line; None for a bug, which has a traceback."""
    if isinstance(error, UserError | ResourceError) or used_up(error) is not None:
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = str(error) if isinstance(error, RuntimeError) else ""
    found = next((line for sign, line in SIGNS.items() if sign in text), None)
    return found and f"{found} ({text.strip().splitlines()[0][:200]})"
