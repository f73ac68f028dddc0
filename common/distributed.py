"""The ranks that torchrun starts: connecting them, sums over them, stopping and ending together."""

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.errors import UserError, leave, user_errors

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
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks, in place and on its device. A collective: every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor


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


def join_ranks(backend: str, device: torch.device, ranks: Ranks):
    """Connect the ranks; a single process has nothing to connect.

    backend: 'auto' (nccl on CUDA, gloo elsewhere), 'nccl' or 'gloo'. UserError if it is unknown or fails to connect.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise UserError(f'--backend={backend}: unknown; use auto, nccl or gloo')
    if ranks.world_size == 1:
        return
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
    if backend == 'nccl' and device.type != 'cuda':
        raise UserError(f'--backend=nccl: works between CUDA devices only, not on {device.type}; use auto or gloo')
    hook = sys.excepthook
    with user_errors(ValueError, dist.DistError, where='cannot connect the ranks: '):
        options = {'store': agree_on_attempt(ranks), 'rank': ranks.rank, 'world_size': ranks.world_size}
        if backend == 'nccl':  # and gloo, for Ranks.sum
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device, **options)
        else:
            dist.init_process_group(backend, **options)
    sys.excepthook = hook  # torch wraps the hook and captures its output, which is lost when the hook ends the process


def agree_on_attempt(ranks: Ranks) -> dist.Store:
    """A store in which the ranks find one another, without the entries of earlier attempts.

    torchrun keeps one store across its restarts. The addresses of dead ranks stay in it, and a rank that connects to
    one of them fails (pytorch issue 135712). So rank 0 invents a prefix for the keys of this attempt. Each other rank
    asks for it with a random name of its own, so that it cannot read an answer from an earlier attempt.
    """
    store, _, _ = next(dist.rendezvous('env://', ranks.rank, ranks.world_size))
    name = uuid.uuid4().hex
    if ranks.rank > 0:
        store.set(f'asked by {ranks.rank}', name)
        attempt = store.get(f'answer to {name}').decode()  # waits until it is set
        store.set(f'{attempt} has {ranks.rank}', '')
        return dist.PrefixStore(attempt, store)
    missing = set(range(1, ranks.world_size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for rank in missing:
            if store.check([f'asked by {rank}']):  # perhaps a dead rank's question: nobody reads that answer
                store.set(f'answer to {store.get(f"asked by {rank}").decode()}', name)
        missing = {rank for rank in missing if not store.check([f'{name} has {rank}'])}
        if time.monotonic() > deadline:
            raise dist.DistError(f'rank {min(missing)} did not connect in time')
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def end(ranks: Ranks, status: int = 0):
    """Exit with this status, after all ranks have come here and disconnected. Close files and trackers before."""
    if ranks.world_size > 1:
        dist.barrier()
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
