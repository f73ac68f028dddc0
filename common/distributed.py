"""The ranks that torchrun starts: connecting them, sums over them, stopping and ending together."""

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common import errors
from common.errors import UserError, leave, user_errors
from common.heartbeat import Heartbeat

# --- ranks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that torchrun started; a single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum of a list of numbers over the ranks. A collective: every rank must call it.

        It runs on the hosts, by gloo, so that no rank waits for its accelerator.
        """
        if self.world_size == 1:
            return list(values)
        self.entering()
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks, in place and on its device. A collective: every rank must call it."""
        if self.world_size > 1:
            self.entering()
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def gather(self, value) -> list:
        """Each rank's value, any Python object, on all ranks. A collective: every rank must call it."""
        if self.world_size == 1:
            return [value]
        self.entering()
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @staticmethod
    def entering():
        """Count a collective, so that the heartbeat can tell which rank is behind."""
        if errors.heartbeat:
            errors.heartbeat.entered += 1


ALONE = Ranks()


def find_ranks() -> Ranks:
    """Read Ranks from the environment variables that torchrun sets."""
    if 'RANK' not in os.environ:
        return Ranks()
    where = 'RANK is set, but not all other variables of torchrun; start several ranks with torchrun: '
    with user_errors(ValueError, KeyError, where=where):
        ranks = Ranks(*(int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))
        if not (0 <= ranks.rank < ranks.world_size and ranks.local_rank >= 0):
            raise ValueError(f'RANK={ranks.rank} is not one of WORLD_SIZE={ranks.world_size} ranks')
    return ranks


def waiting_limit(timeout: float) -> timedelta:
    """How long a collective, or a watch for signs of life, waits for a rank, so that the job ends within `timeout` s.

    It is shorter by the 30 s from torchrun's SIGTERM to its SIGKILL, which alone ends a stopped process. Pass it to
    every new group, dist.new_group(timeout=waiting_limit(timeout)): groups do not inherit it.
    """
    return timedelta(seconds=max(timeout - 40, timeout / 3))


def join_ranks(backend: str, device: torch.device, ranks: Ranks, timeout: float = 600):
    """Connect the ranks and watch for their signs of life; a single process, or one that has done so before, has
    nothing to connect.

    backend: 'auto' (nccl on CUDA, gloo elsewhere), 'nccl' or 'gloo'. timeout: seconds after which the job ends when a
    rank dies or hangs. UserError if the backend is unknown or fails to connect.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise UserError(f'--backend={backend}: unknown; use auto, nccl or gloo')
    if ranks.world_size == 1 or dist.is_initialized():
        return
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
    if backend == 'nccl' and device.type != 'cuda':
        raise UserError(f'--backend=nccl: works between CUDA devices only, not on {device.type}; use auto or gloo')
    hook, limit = sys.excepthook, waiting_limit(timeout)
    with user_errors(ValueError, dist.DistError, where='cannot connect the ranks: '):
        store, own_store = agree_on_attempt(ranks, timeout)
        errors.heartbeat = Heartbeat(own_store, ranks.rank, ranks.world_size, limit.total_seconds(), hosted_by_rank_0())
        options = {'store': store, 'rank': ranks.rank, 'world_size': ranks.world_size, 'timeout': limit}
        if backend == 'nccl':  # and gloo, for Ranks.sum
            # A collective of nccl does not fail but hangs with the host that waits for it. Its own watchdog, a thread
            # too, then ends this process by SIGABRT after the same limit, with a report of its own. So a lost rank is
            # named only where its signs stop, or where gloo waits for it.
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device, **options)
        else:
            dist.init_process_group(backend, **options)
    sys.excepthook = hook  # torch wraps the hook and captures its output, which is lost when the hook ends the process


def join_alone(device: torch.device):
    """Make a process group of this process alone, which sharding needs on one device too."""
    hook = sys.excepthook
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    sys.excepthook = hook  # as in join_ranks


def agree_on_attempt(ranks: Ranks, timeout: float) -> list[dist.Store]:
    """Two stores in which the ranks find one another, without the entries of earlier attempts.

    The two have the same entries over connections of their own, for two threads. torchrun keeps one store across its
    restarts. The addresses of dead ranks stay in it, and a rank that connects to one of them fails (pytorch issue
    135712). So rank 0 invents a prefix for the keys of this attempt. Each other rank asks for it with a random name of
    its own, so that it cannot read an answer from an earlier attempt. All learn whether all have come.
    """
    store = connect_to_store(ranks, timeout)
    name = uuid.uuid4().hex
    if ranks.rank > 0:
        store.set(f'asked by {ranks.rank}', name)
        try:
            attempt = store.get(f'answer to {name}').decode()  # waits until it is set
            store.set(f'{attempt} has {ranks.rank}', '')
            problem = store.get(f'{attempt} ends').decode()
        except dist.DistStoreError as error:
            raise dist.DistError(f'rank 0 did not answer in {timeout} s') from error
    else:
        attempt, problem = name, call_ranks(ranks, store, name, waiting_limit(timeout).total_seconds())
    if problem:
        raise dist.DistError(problem)
    own = connect_to_store(ranks, timeout, host=False)
    return [dist.PrefixStore(attempt, each) for each in (store, own)]


def connect_to_store(ranks: Ranks, timeout: float, host: bool = True) -> dist.Store:
    """A connection to the store of all ranks. Rank 0 hosts it if `host` and torchrun's agent does not.

    Like dist.rendezvous('env://'), but the host does not wait for all ranks, as it could not say which one is missing.
    """
    if not ('MASTER_ADDR' in os.environ and 'MASTER_PORT' in os.environ):
        raise ValueError('MASTER_ADDR and MASTER_PORT are not set; start several ranks with torchrun')
    return dist.TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        is_master=host and ranks.is_main and hosted_by_rank_0(),
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        use_libuv=os.environ.get('USE_LIBUV', '1') == '1',  # the variable is torch's, for builds that lack libuv
    )


def hosted_by_rank_0() -> bool:
    """Does rank 0 host the store, rather than torchrun's agent?"""
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'


def call_ranks(ranks: Ranks, store: dist.Store, attempt: str, limit: float) -> str:
    """Tell all other ranks the prefix of this attempt, which they ask for -> what went wrong, '' for nothing."""
    for rank in range(ranks.world_size):
        store.set(f'{attempt}/sign of {rank}', '')  # so that Heartbeat finds its keys; / is that of PrefixStore
    missing, problem = set(range(1, ranks.world_size)), ''
    deadline = time.monotonic() + limit
    while missing and not problem:
        for rank in missing:
            if store.check([f'asked by {rank}']):  # perhaps a dead rank's question: nobody reads that answer
                store.set(f'answer to {store.get(f"asked by {rank}").decode()}', attempt)
        missing = {rank for rank in missing if not store.check([f'{attempt} has {rank}'])}
        if missing and time.monotonic() > deadline:
            problem = f'rank {", ".join(map(str, sorted(missing)))} did not connect in {limit:.0f} s'
        time.sleep(0.01)
    store.set(f'{attempt} ends', problem)
    return problem


def end(ranks: Ranks, status: int = 0):
    """Exit with this status, after all ranks have come here and disconnected. Close files and trackers before."""
    if ranks.world_size > 1:
        dist.barrier()
        errors.heartbeat.stop()
        dist.barrier()  # rank 0 may host the store: it ends after the last thread that uses it
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(status)


# --- signals ----------------------------------------------------------------------------------------------------------


class StopSignal:
    """Turn signals that ask a process to end into a flag, so that a run can finish its step and save.

    SIGINT is Ctrl-C, SIGTERM comes from kill and schedulers, SIGHUP from a closed terminal, SIGUSR1 from schedulers
    before a time limit. A second signal ends the process at once. An ignored SIGHUP stays ignored, as under nohup.
    """

    NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
    SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows lacks some

    def __init__(self):
        self.received = None
        for signum in self.SIGNALS:
            if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.handle)

    def resume_command(self, ranks: Ranks) -> str:
        """The command that continues this run: the one that started it, with --init_from=resume unless it says auto."""
        arguments = sys.argv
        if '--init_from=auto' not in arguments:
            arguments = [argument for argument in arguments if not argument.startswith('--init_from=')]
            arguments.append('--init_from=resume')
        join = subprocess.list2cmdline if sys.platform == 'win32' else shlex.join
        if ranks.world_size == 1:
            python = sys.executable
            if python.startswith(os.getcwd() + os.sep):
                python = os.path.relpath(python)
            return join([python, *arguments])
        local = int(os.environ.get('LOCAL_WORLD_SIZE', ranks.world_size))
        nodes = '--standalone' if local == ranks.world_size else f'--nnodes={ranks.world_size // local} ...'
        return f'torchrun {nodes} --nproc_per_node={local} {join(arguments)}'

    def handle(self, signum, frame):
        self.received = signal.Signals(signum)
        if 'TORCHELASTIC_RUN_ID' not in os.environ:  # torchrun repeats signals; there only its SIGKILL ends at once
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def on_any(self, ranks: Ranks) -> bool:
        """Has any rank received a signal? A collective: every rank must call it, and all get the same answer."""
        return ranks.sum([float(self.received is not None)])[0] > 0
