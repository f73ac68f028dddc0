"""Crash-safe file writing, and folder locks that keep two processes from writing into one folder."""

import atexit
import os
import sys
import time
from contextlib import contextmanager, suppress

LOCK = '.lock'  # the file in a folder that is locked in place of the folder
held = {}  # path of each lock that this process holds -> its open file


@contextmanager
def written_whole(path: str, mode: str = 'wb'):
    """Write a file atomically: it appears under `path` after the block has ended, complete and flushed to the disk.

    If the process or the machine dies, `path` is either the old file or the new one. Until then the new one is called
    `path`.part; an exception in the block removes it.
    mode: 'wb', or 'w' for UTF-8 text without translation of line ends. Raises OSError as open, write and rename do.
    """
    part = path + '.part'
    options = {} if 'b' in mode else {'encoding': 'utf-8', 'newline': ''}
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise
    flush_folder(os.path.dirname(path))


def replace(part: str, path: str, seconds: float = 10.0):
    """os.replace; Windows refuses it while another process reads `path`, so there retry for `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.replace(part, path)
        except PermissionError:
            if sys.platform != 'win32' or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def flush_folder(folder: str):
    """Flush the renames in a folder to the disk, so that later ones cannot reach it first.

    Windows cannot open folders, CIFS and some FUSE file systems cannot flush them: there the system decides the order.
    """
    try:
        handle = os.open(folder or '.', os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def lock_folder(folder: str) -> bool:
    """Lock a folder until unlock_folder or the end of this process; False if another process has locked it.

    The operating system releases the lock when the process dies, so a leftover lock file blocks nobody. Locking a
    folder again does nothing. On file systems without locks (some network disks) every process succeeds. OSError if
    the lock file cannot be written.
    """
    path = os.path.realpath(os.path.join(folder, LOCK))
    tries = 10  # some file systems report a new inode number at every call, so the check below may never succeed
    while path not in held:
        tries -= 1
        file = open(path, 'a+b')
        try:
            lock_file(file)
        except (BlockingIOError, PermissionError):  # taken, as Linux and Windows report it
            file.close()
            return False
        except (OSError, ImportError):
            pass  # a file system, or an operating system, without locks
        if not tries or os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            held[path] = file
            atexit.register(remove_locks)
        else:
            file.close()  # the last owner removed the file after we opened it: lock a new one
    return True


def lock_file(file):
    """Lock an open file without waiting. OSError if that fails, ImportError where Python knows no locks."""
    if sys.platform == 'win32':
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock_folder(folder: str):
    """Unlock a folder. Call it before removing the folder: Windows cannot remove open files, NFS keeps them renamed."""
    file = held.pop(os.path.realpath(os.path.join(folder, LOCK)), None)
    if file:
        file.close()


def remove_locks():
    """Remove the lock files of this process at its end, while it holds the locks: so it removes nobody else's."""
    while held:
        path, file = held.popitem()
        with suppress(OSError):
            os.remove(path)
        file.close()
