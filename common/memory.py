"""Memory of this process and its machine: how much is there to take, how much was taken, and a limit on it."""

import math
import os

import torch

from common.errors import UserError

CGROUPS = '/sys/fs/cgroup'
# version of control groups -> where they are, and the files of a limit, of what is used, and the line of it that the
# system frees when it needs to: files that it keeps in memory
FILES = {
    1: (f'{CGROUPS}/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
    2: (CGROUPS, 'memory.max', 'memory.current', 'inactive_file'),
}


def available_memory(device: torch.device) -> float:
    """Bytes of memory that this process can still take on a device, without pushing others out.

    On CUDA what is free, and what torch holds but does not use. On a CPU the least of what the system has available,
    its control groups (containers) leave, and `ulimit -v` allows. UserError where the system does not tell.
    """
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == 'mps':
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(system_memory(), group_memory(), allowed_memory())


def system_memory() -> float:
    """Bytes that the system can hand out; where it does not say, as on macOS, all that the machine has."""
    try:
        with open('/proc/meminfo', encoding='ascii') as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        pass
    try:
        return float(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    except (AttributeError, ValueError, OSError):  # Windows
        raise UserError('the system does not say how much memory there is: give --memory_gb=') from None


def group_memory() -> float:
    """Bytes that the control groups of this process leave it, infinite without a limit: its own and those around it."""
    free = math.inf
    for line in read('/proc/self/cgroup').splitlines():
        number, controllers, path = line.split(':', 2)
        version = 2 if number == '0' else 1 if controllers == 'memory' else None
        while version:
            free = min(free, left_in_group(version, path))
            if path in ('', '/'):
                break
            path = os.path.dirname(path)
    return free


def left_in_group(version: int, path: str) -> float:
    """Bytes that one control group leaves, infinite if it has no limit or does not exist. version: key of FILES."""
    root, limit, usage, reclaimable = FILES[version]
    folder = os.path.join(root, path.lstrip('/'))
    limit, usage = (read(os.path.join(folder, name)).strip() for name in (limit, usage))
    if not (limit.isdecimal() and usage.isdecimal()):  # version 2 says 'max' if there is none
        return math.inf
    statistics = dict(line.split(' ', 1) for line in read(os.path.join(folder, 'memory.stat')).splitlines())
    return max(0.0, float(limit) - int(usage) + int(statistics.get(reclaimable, 0)))


def allowed_memory() -> float:
    """Bytes that this process may still take by its resource limits, such as `ulimit -v` sets; infinite if by none."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    allowed = math.inf
    for limit, name in ((resource.RLIMIT_AS, 'VmSize'), (resource.RLIMIT_DATA, 'VmData')):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            allowed = min(allowed, max(0.0, soft - status_bytes(name)))
    return allowed


def limit_memory(device: torch.device, n_bytes: float):
    """Let this process take only so many more bytes on a device, for the rest of its life; more is torch's error of no
    memory. On a CPU only Linux knows how; there the process is also the first that a system out of memory kills."""
    if device.type == 'cuda':
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total), device)
    elif device.type == 'cpu' and os.path.exists('/proc/self/status'):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = status_bytes('VmData') + int(n_bytes)
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        try:
            with open('/proc/self/oom_score_adj', 'w') as file:
                file.write('1000')
        except OSError:
            pass  # the limit is there anyway


def resident_bytes(most: bool = False) -> int:
    """Memory of this process that is in use now, or at most so far, in bytes; 0 where the system does not say.

    getrusage() would not do: a process starts with the peak of the one that started it.
    """
    return status_bytes('VmHWM' if most else 'VmRSS')


def status_bytes(name: str) -> int:
    """A size in this process's status on Linux, such as 'VmRSS', in bytes; 0 elsewhere."""
    for line in read('/proc/self/status').splitlines():
        if line.startswith(f'{name}:'):
            return 1024 * int(line.split()[1])
    return 0


def read(path: str) -> str:
    """The text of a small file; '' if it cannot be read."""
    try:
        with open(path, encoding='utf-8') as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ''
