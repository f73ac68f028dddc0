"""Errors and output: a user's mistake is one line and exit status 2, a bug keeps its traceback, one rank prints."""

import atexit
import errno
import os
import re
import sys
from contextlib import contextmanager
from traceback import walk_tb

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Error numbers of writing to a pipe that nobody reads, or to a closed terminal
READER_GONE = {errno.EPIPE, errno.EIO} | ({errno.EINVAL} if sys.platform == 'win32' else set())
OUTSIDE = ('errors.py', 'configurator.py')  # turn exceptions into errors, and are never the place of a mistake
NO_MEMORY = re.compile('out of memory|DefaultCPUAllocator')  # in the messages of CUDA and of torch on the CPU
heartbeat = None  # the common.heartbeat.Heartbeat of a process that is one of several ranks; join_ranks sets it


class UserError(Exception):
    """A user's mistake. Uncaught, it ends the script with one line on standard error and exit status 2.

    The message says what is wrong, where, and what to do. A bug raises any other exception and keeps its traceback.
    """


@contextmanager
def user_errors(*kinds: type[Exception], where: str = ''):
    """Turn exceptions of the given kinds, raised in the block, into UserError; `where` starts the message."""
    try:
        yield
    except kinds as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(where + one_line(text)) from error


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, cut to `limit` characters."""
    text = ' '.join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + '...'


# --- output -----------------------------------------------------------------------------------------------------------


def is_main_rank() -> bool:
    """True on rank 0, and in a process that torchrun did not start."""
    return os.environ.get('RANK', '0') == '0'


def say(*words, file=None):
    """Print a line at once, on the main rank only. Ignores a closed pipe or terminal."""
    if not is_main_rank():
        return
    file = file or sys.stdout
    try:
        print(*words, file=file, flush=True)
    except OSError as error:
        if error.errno not in READER_GONE:
            raise
        silence(file)


def warn(text: str):
    """Print one line of warning on standard error, on the main rank only."""
    say(f'warning: {one_line(text, 500)}', file=sys.stderr)


def silence(stream):
    """Redirect a stream to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_output():
    """Flush standard output. A reader that has gone is ignored; a full disk is one line and exit status 2."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)  # the interpreter flushes again at exit
        if error.errno == errno.ENOSPC:
            print('error: cannot write the output: No space left on device', file=sys.stderr)
            os._exit(2)


# --- the end of the process -------------------------------------------------------------------------------------------


def install_error_handling():
    """Report uncaught exceptions with report_uncaught, and let no output error end the process with a traceback."""
    sys.excepthook = report_uncaught
    atexit.register(flush_output)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # a character that the terminal lacks is shown as \u1234


def leave(status: int = 0):
    """End the process with this exit status.

    With several ranks, or after streaming with the `datasets` library, this calls the atexit handlers but skips the
    rest of the interpreter's clean-up: threads of gloo, or of a stream that was not read to its end, sometimes abort
    the process there. A rank that leaves before its heartbeat has been stopped tells the others that it failed.
    """
    if heartbeat:
        heartbeat.stop(failed=True)
    if os.environ.get('WORLD_SIZE', '1') == '1' and 'datasets' not in sys.modules:
        sys.exit(status)
    atexit._run_exitfuncs()  # has no public name; multiprocessing calls it for the same purpose
    if sys.stderr:
        sys.stderr.flush()
    os._exit(status)


def report_uncaught(kind, error, traceback):
    """sys.excepthook: a user's mistake, a lack of memory or disk and a lost rank are one line; a bug is a traceback.

    A line that stands for another exception ends with the place in this project that raised it, such as [model.py:120]:
    people edit this code, so the cause may be an edit, not a file or a setting. SAMGPT_TRACEBACK=1 adds the traceback.
    """
    if kind is KeyboardInterrupt:
        leave(130)  # 128 + SIGINT, as the shell reports it
    if kind is BrokenPipeError:  # the reader of our output has closed it, as `head` does
        silence(sys.stdout)
        leave(141)  # 128 + SIGPIPE
    text, raised = str(error), error  # raised: the exception whose place is shown, None for no place
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f'{error.filename or "the output"}: {error.strerror}; free some space and try again'
        raised = None
    elif isinstance(error, MemoryError) or isinstance(error, RuntimeError) and NO_MEMORY.search(text):
        text = (
            'out of memory: lower --batch_size (and raise --gradient_accumulation_steps to keep the global batch), '
            f'--num_samples, --max_new_tokens, --block_size or the size of the model ({one_line(text, 120)})'
        )
    elif kind.__name__.startswith('Dist') or isinstance(error, RuntimeError) and 'gloo' in text:
        lost = heartbeat.lost_rank() if heartbeat else ''
        text = f'the connection to another rank was lost{": " if lost else ""}{lost} ({one_line(text, 120)})'
    elif isinstance(error, UserError):
        raised = error.__cause__
        if isinstance(raised, (OSError, UnicodeError, ImportError)):
            raised = None  # the message names the file or the package
    else:
        sys.__excepthook__(kind, error, traceback)
        leave(1)
    if os.environ.get('SAMGPT_TRACEBACK', '0') not in ('', '0'):
        sys.__excepthook__(kind, error, traceback)
    place = place_in_project(walk_tb(raised.__traceback__)) if raised else ''
    print(error_line(text) + place, file=sys.stderr, flush=True)
    leave(2)  # sys.exit inside the hook sets the exit status


def error_line(text: str) -> str:
    """The one line that reports an error, with the number of the rank unless it is the main one."""
    prefix = 'error: ' if is_main_rank() else f'error (rank {os.environ["RANK"]}): '
    return prefix + one_line(text, limit=2000)


def place_in_project(frames) -> str:
    """The innermost file and line of this project, as ' [model.py:120]'; '' if there is none.

    frames: (frame, line number) from the outermost to the innermost, as traceback.walk_tb gives them.
    """
    place = ''
    for frame, line in frames:
        path = frame.f_code.co_filename
        if path.startswith(ROOT + os.sep) and os.path.basename(path) not in OUTSIDE and 'site-packages' not in path:
            place = f' [{os.path.relpath(path, ROOT)}:{line}]'
    return place
