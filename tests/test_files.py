"""Atomic file writing and folder locks, also on file systems and operating systems that lack features of Linux."""

import builtins
import errno
import os
import stat
import subprocess
import sys
import types

import pytest
from conftest import REPO, environment

from common import errors, files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / 'a.txt'
    for content in ('old\n', 'new\r\n'):
        with files.written_whole(str(path), 'w') as file:
            file.write(content)
        assert path.read_bytes() == content.encode()
    with pytest.raises(ZeroDivisionError), files.written_whole(str(path)) as file:
        file.write(b'half')
        raise ZeroDivisionError
    assert path.read_bytes() == b'new\r\n' and os.listdir(tmp_path) == ['a.txt']


@pytest.mark.parametrize('fails', ['open', 'fsync'])
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, fails):
    """As on Windows, which cannot open folders, and on CIFS and some FUSE file systems, which cannot flush them."""
    real_open, real_fsync = os.open, os.fsync

    def no_open(path, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return real_open(path, *rest, **more)

    def no_fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, 'Invalid argument')
        return real_fsync(handle)

    monkeypatch.setattr(os, fails, no_open if fails == 'open' else no_fsync)
    with files.written_whole(str(tmp_path / 'a')) as file:
        file.write(b'x')
    assert (tmp_path / 'a').read_bytes() == b'x'


def test_a_file_that_somebody_reads_on_windows(tmp_path, monkeypatch):
    """It cannot be replaced: the save waits for the reader, but not forever. Elsewhere it fails at once."""
    real, refusals = os.replace, iter([True, True, False])

    def replace(part, path):
        if next(refusals, True):
            raise PermissionError(errno.EACCES, 'Access is denied', path)
        return real(part, path)

    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr(files, 'sys', types.SimpleNamespace(platform='win32'))
    with files.written_whole(str(tmp_path / 'a')) as file:
        file.write(b'x')
    assert (tmp_path / 'a').read_bytes() == b'x'
    with pytest.raises(PermissionError):
        files.replace(str(tmp_path / 'a'), str(tmp_path / 'b'), seconds=0.1)
    monkeypatch.setattr(files, 'sys', types.SimpleNamespace(platform='linux'))
    with pytest.raises(PermissionError):
        files.replace(str(tmp_path / 'a'), str(tmp_path / 'b'))


HOLD = """
import sys, time
from common import errors, files
print(files.lock_folder(sys.argv[1]), files.lock_folder(sys.argv[1]), flush=True)
time.sleep(60)
"""


def test_one_process_holds_a_folder(tmp_path):
    """A killed process releases the lock, but leaves the file; a process that ends by itself removes the file too."""
    env = environment(PYTHONPATH=str(REPO))
    command = [sys.executable, '-c', HOLD, str(tmp_path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'True True\n'
    assert not files.lock_folder(str(tmp_path))
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path) == [files.LOCK]
    assert files.lock_folder(str(tmp_path))
    files.unlock_folder(str(tmp_path))
    assert files.lock_folder(str(tmp_path))
    files.remove_locks()
    assert os.listdir(tmp_path) == []
    files.held.clear()
    program = HOLD.replace('time.sleep(60)', 'sys.exit()')
    subprocess.run([sys.executable, '-c', program, str(tmp_path)], env=env, check=True, capture_output=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('world_size', ['1', '2'])
def test_leaving_removes_locks(tmp_path, world_size):
    """On one rank through the interpreter's clean-up, on several without it; in both cases the output is complete."""
    program = HOLD.replace('time.sleep(60)', 'print("end", end="")\nerrors.leave(3)')
    env = environment(PYTHONPATH=str(REPO), WORLD_SIZE=world_size)
    result = subprocess.run([sys.executable, '-c', program, str(tmp_path)], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (3, 'True True\nend', '')
    assert os.listdir(tmp_path) == []


def test_locks_of_windows(tmp_path, monkeypatch):
    """Another module, which raises another error if the lock is taken."""
    taken = set()

    def locking(handle, mode, n):
        key = os.fstat(handle).st_ino
        if key in taken:
            raise PermissionError(errno.EACCES, 'Permission denied')
        taken.add(key)

    monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(files, 'sys', types.SimpleNamespace(platform='win32'))
    monkeypatch.setattr(files, 'held', {})
    assert files.lock_folder(str(tmp_path))
    files.held.clear()  # as another process sees it
    assert not files.lock_folder(str(tmp_path))


def test_a_disk_that_numbers_files_anew(tmp_path, monkeypatch):
    """An open file looks like another one: the folder is locked all the same."""
    monkeypatch.setattr(files, 'held', {})
    monkeypatch.setattr(os.path, 'samestat', lambda *_: False)
    assert files.lock_folder(str(tmp_path)) and files.held


def test_a_disk_without_locks(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(files, 'held', {})
    monkeypatch.setattr(fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, 'No locks available')))
    assert files.lock_folder(str(tmp_path))


@pytest.mark.parametrize('number', [errno.EPIPE, errno.EIO])
def test_saying_something_to_nobody(number, monkeypatch, tmp_path):
    """To a pipe without a reader, or a closed terminal: the output is lost then and later, without an error."""
    real = builtins.print

    def broken(*words, **options):
        raise OSError(number, os.strerror(number))

    with open(tmp_path / 'out', 'w') as stream:
        monkeypatch.setattr(builtins, 'print', broken)
        errors.say('lost', file=stream)
        monkeypatch.setattr(builtins, 'print', real)
        errors.say('lost too', file=stream)
    assert (tmp_path / 'out').read_text() == ''
    monkeypatch.setattr(builtins, 'print', lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
    with pytest.raises(OSError, match='full'):
        errors.say('kept')


def test_without_what_windows_lacks(tmp_path):
    """Only two signals, no module resource, no sched_getaffinity: the modules load and do without."""
    program = (
        "import os, signal, sys\nfor name in ('SIGHUP', 'SIGUSR1', 'SIGKILL'):\n    delattr(signal, name)\n"
        "for name in ('fork', 'sched_getaffinity', 'getuid'):\n    delattr(os, name)\n"
        "sys.modules.update(dict.fromkeys(('resource', 'fcntl', 'termios'), None))\n"
        'import torch, data.worker, data.pipeline\n'
        'from common import checkpoint, device, distributed, files, tracking\n'
        'stop = distributed.StopSignal()\n'
        "print(device.peak_memory(torch.device('cpu')), [s.name for s in stop.SIGNALS])\n"
        'print(files.lock_folder(sys.argv[1]))\n'
    )
    env = environment(PYTHONPATH=str(REPO))
    result = subprocess.run([sys.executable, '-c', program, str(tmp_path)], env=env, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["None ['SIGINT', 'SIGTERM']", 'True'], result.stderr
