"""Files that are whole or not there, folders that one process holds; also on file systems and systems that lack what Linux has."""

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
    """As on Windows, which does not open folders, and on CIFS and some FUSE, which do not flush them."""
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
    """It cannot be replaced just then: the save waits for the reader, and fails only if that never ends. Elsewhere it fails at once."""
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


HOLD = 'import sys, time; from common import files; print(files.lock_folder(sys.argv[1]), files.lock_folder(sys.argv[1]), flush=True); time.sleep(60)'


def test_one_process_holds_a_folder(tmp_path):
    """Killed, it holds it no more, though its file is left; at a proper end that goes too."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path)],
        env=environment(PYTHONPATH=str(REPO)),
        stdout=subprocess.PIPE,
        text=True,
    )
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
    subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)],
        env=environment(PYTHONPATH=str(REPO)),
        check=True,
        capture_output=True,
    )
    assert os.listdir(tmp_path) == []


def test_locks_of_windows(tmp_path, monkeypatch):
    """By its own module, whose error for a lock that is taken is another."""
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
    """Which makes an open file look like another one: the folder is held all the same."""
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
    """A reader that has gone, and a terminal that was closed: what is said then and later goes nowhere."""
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
    """No signals but two, no module resource, no sched_getaffinity: the modules load, and do without."""
    program = (
        "import os, signal, sys\nfor name in ('SIGHUP', 'SIGUSR1', 'SIGKILL'):\n    delattr(signal, name)\n"
        "for name in ('fork', 'sched_getaffinity', 'getuid'):\n    delattr(os, name)\n"
        "sys.modules.update(dict.fromkeys(('resource', 'fcntl', 'termios'), None))\n"
        'import torch, data.worker, data.pipeline\n'
        'from common import checkpoint, device, distributed, files, tracking\n'
        "stop = distributed.StopSignal()\nprint(device.peak_memory(torch.device('cpu')), [s.name for s in stop.SIGNALS])\n"
        'print(files.lock_folder(sys.argv[1]))\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)],
        env=environment(PYTHONPATH=str(REPO)),
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines() == ["None ['SIGINT', 'SIGTERM']", 'True'], result.stderr
