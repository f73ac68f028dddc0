"""Scripts as child processes with a deadline: one that hangs, dies or runs out of memory harms no other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from common.errors import NO_MEMORY, ROOT, one_line


class OutOfTime(Exception):
    """A child was still running at the deadline; the message is its last line."""


class ChildFailed(Exception):
    """A child ended with another status than 0; the message is its last line."""


class NoMemory(ChildFailed):
    """A child ended for lack of memory."""


class Ended(NamedTuple):
    """A child process that has ended."""

    script: str
    status: int
    output: str

    def last_line(self) -> str:
        """What it said last, as a rule why it failed."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return one_line(lines[-1].removeprefix('error: '), 250) if lines else 'it printed nothing'

    def lacked_memory(self) -> bool:
        """Did it end for lack of memory: the device's, or the host's, for which the system kills?"""
        return self.status == -9 or bool(NO_MEMORY.search(self.output)) or 'STATUS_ALLOC_FAILED' in self.output

    def succeeded(self) -> str:
        """What it printed. ChildFailed, or NoMemory, unless it ended with status 0."""
        if self.status:
            kind = NoMemory if self.lacked_memory() else ChildFailed
            raise kind(f'{self.script} ended with status {self.status}: {self.last_line()}')
        return self.output


def run_script(
    script: str, arguments: list, folder: str, log: str, deadline: float, env=None, interrupt: Callable | None = None
) -> Ended:
    """Run a script of this repository in a folder. OutOfTime if it is not done by `deadline`; then it is killed.

    log: a file for its output. deadline: by time.monotonic(). env: the environment, by default this process's.
    interrupt: once this returns True, the script gets a SIGTERM.
    """
    command = [sys.executable, os.path.join(ROOT, script), *arguments]
    with open(log, 'w+', encoding='utf-8', errors='replace') as output:
        streams = {'stdin': subprocess.DEVNULL, 'stdout': output, 'stderr': subprocess.STDOUT}
        child = subprocess.Popen(command, cwd=folder, env=env, **streams)
        try:
            while child.poll() is None and time.monotonic() < deadline:
                if interrupt and interrupt():
                    child.send_signal(signal.SIGTERM)
                    interrupt = None
                time.sleep(0.02)
        finally:
            out_of_time = child.poll() is None
            if out_of_time:  # or this process is being stopped
                child.kill()
                child.wait()
        output.seek(0)
        ended = Ended(script, child.returncode, output.read())
    if out_of_time:
        raise OutOfTime(ended.last_line())
    return ended
