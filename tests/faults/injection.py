"""Faults put into a run: a limit on the size of one kind of file, as the kernel enforces it.

python -m tests.faults.injection NAME BYTES LEAST SCRIPT ARGUMENTS    # a script in a process of its own
"""

import contextlib
import fnmatch
import resource
import runpy
import sys
from pathlib import Path

import sparsity.files
from engine.launch import run


class Limit:
    """While a file of this name (a glob) is written, no file may grow beyond `size` bytes, from the `first` time on."""

    def __init__(self, name, size=0, first=1):
        self.name, self.size, self.first, self.times = name, size, first, 0
        self.real = sparsity.files.writing

    @contextlib.contextmanager
    def __call__(self, path):
        with self.real(path):
            if not fnmatch.fnmatch(Path(path).name, self.name):
                yield
                return
            self.times += 1
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if self.times >= self.first:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


if __name__ == "__main__":
    glob, at_most, from_time, script, *given = sys.argv[1:]
    sparsity.files.writing = Limit(glob, int(at_most), int(from_time))
    main = runpy.run_path(script)["main"]
    run(lambda: main(given))
