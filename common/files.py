"""Files that a crash cannot ruin, and folders that two processes do not write into at once. Knows nothing of what is in them."""

import atexit
import os
import sys
import time
from contextlib import contextmanager, suppress

LOCK = '.lock'  # a file of this name in a folder stands for the folder
held = {}  # path of each lock that this process holds -> its open file


@contextmanager
def written_whole(path, mode='wb'):
    """Open a file for writing that appears under `path` only when the block has ended, complete and on the disk.

    Whenever the process or the machine dies, `path` is either the old file or the new one. The unfinished one is called `path`.part; it
    goes if something else than the process fails. mode: 'wb', or 'w' for UTF-8 text with line ends as they are given. Raises what open,
    write and rename do: OSError.
    """
    part = path + '.part'
    try:
        with open(part, mode, **({} if 'b' in mode else {'encoding': 'utf-8', 'newline': ''})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise
    flush_folder(os.path.dirname(path))


def replace(part, path, seconds=10.0):
    """Rename a file in place of another. Windows refuses while somebody reads that: then again, for so many seconds. OSError in the end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.replace(part, path)
        except PermissionError:
            if sys.platform != 'win32' or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def flush_folder(folder):
    """Have renames in a folder on the disk, and in the order in which they were made, before going on.

    Windows does not open folders, and CIFS and some FUSE file systems do not flush them: there the order is up to the system.
    """
    try:
        handle = os.open(folder or '.', os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def lock_folder(folder):
    """Hold a folder until unlock_folder or the end of this process -> False if another process holds it.

    The system lets go of the lock when the process dies, however it dies, so that a file left behind locks nobody out. Locking twice is
    locking once. Where there are no locks (some network disks), every process gets the folder. OSError if the file cannot be written.
    """
    path = os.path.realpath(os.path.join(folder, LOCK))
    tries = 10  # bounded: a file system may number a file anew each time it is asked
    while path not in held:
        tries -= 1
        file = open(path, 'a+b')
        try:
            if sys.platform == 'win32':
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # as Linux and Windows say it
            file.close()
            return False
        except (OSError, ImportError):
            pass  # a disk, or a system, without locks
        if not tries or os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            held[path] = file
        else:
            file.close()  # its last holder has just removed it: once more
    return True


def unlock_folder(folder):
    """Let go of a folder. To be called before its files are removed: Windows does not remove open files, NFS renames them instead."""
    file = held.pop(os.path.realpath(os.path.join(folder, LOCK)), None)
    if file:
        file.close()


@atexit.register
def remove_locks():
    """At the end of the process: what is left of its locks goes, before the system lets go of them."""
    for path in held:
        with suppress(OSError):
            os.remove(path)
