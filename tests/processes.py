"""Processes in tests: what on their stderr is of the project, and signals that reach them at a known point."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

PLAIN = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PATIENCE = 600  # seconds until a process counts as stuck: many times what one takes on a slow machine that others share
HELD = "held here"
ROOT = Path(__file__).resolve().parent.parent

# SIGINT is ignored by what a shell starts in the background, and by what that starts.
_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.processes import hold
"""


# Scripts one after the other: processes take longer to start than small runs take.
_RUNS = """
import importlib, json, sys
from engine.ranks import peers
for script, arguments in json.loads(sys.argv[1]):
    importlib.import_module(script).main(arguments)
peers.leave(0)
"""


def on_two_ranks(runs: list[tuple[str, list[str]]]) -> str:
    """Run scripts, each with its arguments, in one pair of processes as torchrun starts them; returns what they said on
    stderr.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command = [sys.executable, *launcher, sys.executable, "-c", _RUNS]
    command.append(json.dumps([(name, [*arguments, "--devices", "2"]) for name, arguments in runs]))
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def error_line(heard: str) -> str:
    """The only line with an error; libraries may have said something, too, but there is no traceback."""
    lines = [line for line in re.split("[\r\n]", heard) if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in heard, heard
    return lines[0]


def only_bars(heard: str) -> bool:
    """Whether there is no error, no traceback and no warning from a file of the project.

    What a library says depends on its version and on the machine: it is not looked at.
    """
    ours = rf"{re.escape(str(ROOT))}/(?![^\n]*site-packages)[^\n]*\.py:\d+: \w*Warning"
    return not re.search(rf"(?m)^error|^Traceback|{ours}", heard.replace("\r", "\n"))


def hold() -> None:
    """In the process: say that this point is reached, and stay here, for a signal, as long as the test wants."""
    print(HELD, flush=True)
    sys.stdin.read()


@contextmanager
def held(code: str, *arguments: object, log: Path, env: dict[str, str] = PLAIN) -> Iterator[subprocess.Popen]:
    """A process that runs `code` and has come to where that calls `hold()`. stderr goes to `log`."""
    command = [sys.executable, "-c", _START + code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("w") as heard, subprocess.Popen(command, stderr=heard, env=env, **pipes) as process:
        stuck = Timer(PATIENCE, process.kill)
        stuck.start()
        try:
            assert any(line == f"{HELD}\n" for line in process.stdout), f"never held: {log.read_text()}"
            yield process
        finally:
            stuck.cancel()
            process.kill()
