"""A person's mistakes as one line and exit status 2, a bug with its traceback; and output that nobody reads any more."""

import atexit
import errno
import os
import sys
from contextlib import contextmanager

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


READER_GONE = {errno.EPIPE, errno.EIO} | (
    {errno.EINVAL} if sys.platform == 'win32' else set()
)  # of a pipe or of a closed terminal

ends_at_once = False  # see leave_at_once


class UserError(Exception):
    """A person's mistake. Uncaught, it ends the script with one line on standard error and exit status 2.

    The message says what is wrong, where, and what to do. A bug raises anything else and keeps its traceback.
    """


@contextmanager
def user_errors(*kinds, where=''):
    """Turn exceptions of the given kinds, raised in the block, into UserError; `where` leads the message."""
    try:
        yield
    except kinds as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(where + one_line(text)) from error


def one_line(text, limit=300):
    """The text on one line, cut to `limit` characters."""
    text = ' '.join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + '...'


def say(*words, file=None):
    """Print a line at once. That nobody reads it any more, as when the terminal was closed, is no reason to stop."""
    file = file or sys.stdout
    try:
        print(*words, file=file, flush=True)
    except OSError as error:
        if error.errno not in READER_GONE:
            raise
        silence(file)


def warn(text):
    """Print one line of warning on standard error."""
    say(f'warning: {one_line(text, 500)}', file=sys.stderr)


def silence(stream):
    """Let what is still written to a stream go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_output():
    """At exit: write out what is left for standard output; that nobody reads it, or there is no room for it, is no crash."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)  # the interpreter tries again
        if error.errno == errno.ENOSPC:
            print('error: cannot write the output: No space left on device', file=sys.stderr)
            os._exit(2)


def leave_at_once():
    """From now on, end without the interpreter's clean-up: threads that a library has left behind can hang or abort in it."""
    global ends_at_once
    if not ends_at_once:
        ends_at_once = True
        atexit.register(leave, 0)


def leave(status):
    """End with this exit status; see leave_at_once."""
    if ends_at_once:
        flush_output()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def report_uncaught(kind, error, traceback):
    """sys.excepthook: a UserError, no more memory, or a lost rank is one line and exit status 2; the rest keeps its traceback.

    A line that another exception was turned into ends with its place in the project: people change this code, and what looks like a
    mistake in a file or a setting may be one in theirs. SAMGPT_TRACEBACK=1 shows all of it.
    """
    if kind is KeyboardInterrupt:
        leave(130)  # the shell's status for a program that Ctrl-C ended
    if kind is BrokenPipeError:  # who reads our output has read enough
        silence(sys.stdout)
        leave(141)
    text, place = str(error), ''
    if issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        text = f'{error.filename or "the output"}: {error.strerror}; free some and try again'
    elif (
        issubclass(kind, MemoryError)
        or issubclass(kind, RuntimeError)
        and ('out of memory' in text or 'DefaultCPUAllocator' in text)
    ):
        text = (
            f'out of memory: lower --batch_size (and raise --gradient_accumulation_steps to keep the global batch), '
            f'--num_samples, --max_new_tokens, --block_size or the size of the model ({one_line(text, 120)})'
        )
        place = place_in_project(traceback)
    elif kind.__name__.startswith('Dist') or 'gloo' in text and issubclass(kind, RuntimeError):
        text = f'the connection to another rank was lost; if that one has ended, its own line says why ({one_line(text, 120)})'
        place = place_in_project(traceback)
    elif not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, traceback)
        if ends_at_once:
            leave(1)
        return
    elif error.__cause__ and not isinstance(error.__cause__, (OSError, UnicodeError, ImportError)):
        place = place_in_project(error.__cause__.__traceback__)
    if os.environ.get('SAMGPT_TRACEBACK', '0') not in ('', '0'):
        sys.__excepthook__(kind, error, traceback)
    rank = os.environ.get('RANK', '0')
    print(
        'error: ' if rank == '0' else f'error (rank {rank}): ',
        one_line(text, limit=2000),
        place,
        sep='',
        file=sys.stderr,
        flush=True,
    )
    leave(2)  # raised inside the hook, this sets the exit status and still runs the atexit handlers


def place_in_project(traceback):
    """The last file and line of the project that a traceback goes through -> ' [model.py:120]', or '' if there is none."""
    place = ''
    while traceback:
        path = traceback.tb_frame.f_code.co_filename
        if path.startswith(ROOT + os.sep) and path != __file__ and 'site-packages' not in path:
            place = f' [{os.path.relpath(path, ROOT)}:{traceback.tb_lineno}]'
        traceback = traceback.tb_next
    return place
