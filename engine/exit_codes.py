"""Exit codes of every script."""

DONE = 0
BUG = 1  # an exception of the program, with its traceback
BAD_INPUT = 2  # one line says which option or file, and what to do
INTERRUPTED = 130  # Ctrl-C
