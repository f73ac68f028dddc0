"""The ranks that torchrun started, how they find one another, stop together and end."""

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

from common.errors import UserError, leave, leave_at_once, user_errors

# --- ranks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, values):
        """Element-wise sum over the ranks of a list of floats -> list. A collective: every rank must call it. The ranks' hosts do
        it among themselves, so that no device has to be waited for."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, tensor):
        """Mean of a tensor over the ranks, made in place, on its device and in its queue. A collective."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor


def find_ranks():
    """The Ranks that torchrun's environment variables describe."""
    if 'RANK' not in os.environ:
        return Ranks()
    with user_errors(
        ValueError,
        KeyError,
        where='RANK is set, but not all that torchrun sets with it; start several ranks by torchrun: ',
    ):
        ranks = Ranks(*(int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))
        if not (0 <= ranks.rank < ranks.world_size and ranks.local_rank >= 0):
            raise ValueError(f'RANK={ranks.rank} is not one of WORLD_SIZE={ranks.world_size} ranks')
    return ranks


def join_ranks(backend, device, ranks):
    """Connect the ranks by backend 'auto' (nccl on CUDA, gloo elsewhere), 'nccl' or 'gloo'; for one process, nothing."""
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
        if backend == 'nccl':  # and gloo beside it, for what the hosts tell one another
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device, **options)
        else:
            dist.init_process_group(backend, **options)
    sys.excepthook = (
        hook  # torch puts one of its own before it, which keeps to itself what a hook that ends the process has printed
    )
    leave_at_once()  # in the interpreter's own clean-up one of gloo's threads now and then aborts a rank that is done


def agree_on_attempt(ranks):
    """A store, through which the ranks find one another, that has nothing in it from before torchrun restarted them.

    torchrun keeps one store for all its restarts, with the addresses of ranks that have died in it, and a rank that takes one for its
    neighbour's fails (pytorch issue 135712). So rank 0 makes up a name for this attempt, and tells it whoever asks until all have
    answered; what was asked in an earlier attempt stays without an answer.
    """
    store, _, _ = next(dist.rendezvous('env://', ranks.rank, ranks.world_size))
    name = uuid.uuid4().hex
    if ranks.rank > 0:
        store.set(f'asked by {ranks.rank}', name)
        attempt = store.get(f'answer to {name}').decode()  # waits for it
        store.set(f'{attempt} has {ranks.rank}', '')
        return dist.PrefixStore(attempt, store)
    missing, deadline = set(range(1, ranks.world_size)), time.monotonic() + store.timeout.total_seconds()
    while missing:
        for rank in missing:
            if store.check([f'asked by {rank}']):
                store.set(f'answer to {store.get(f"asked by {rank}").decode()}', name)
        missing = {rank for rank in missing if not store.check([f'{name} has {rank}'])}
        if time.monotonic() > deadline:
            raise dist.DistError(f'rank {min(missing)} has not come')
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def end(ranks, status=0):
    """Leave the program with this exit status; several ranks wait for one another first. All that matters must have been written."""
    if ranks.world_size == 1:
        sys.exit(status)
    dist.barrier()
    dist.destroy_process_group()
    leave(status)


# --- signals and time -------------------------------------------------------------------------------------------------


class StopSignal:
    """Turns signals that ask a process to end into a flag, so that a run can finish its step and save. A second one ends at once.

    SIGINT is Ctrl-C, SIGTERM what kill and schedulers send, SIGHUP comes when the terminal is closed, SIGUSR1 from schedulers that
    announce the end. A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    SIGNALS = [
        getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)
    ]  # not all on Windows

    def __init__(self):
        self.received = None
        for signum in self.SIGNALS:
            if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.handle)

    def resume_command(self, ranks):
        """The command that continues this run: the one that started it, with --init_from=resume unless it says auto already."""
        goes_on = '--init_from=auto' in sys.argv
        arguments = [
            sys.argv[0],
            *(argument for argument in sys.argv[1:] if goes_on or not argument.startswith('--init_from=')),
        ]
        arguments += [] if goes_on else ['--init_from=resume']
        join = subprocess.list2cmdline if sys.platform == 'win32' else shlex.join
        if ranks.world_size == 1:
            python = (
                os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else sys.executable
            )
            return join([python, *arguments])
        local = int(os.environ.get('LOCAL_WORLD_SIZE', ranks.world_size))
        nodes = '--standalone' if local == ranks.world_size else f'--nnodes={ranks.world_size // local} ...'
        return f'torchrun {nodes} --nproc_per_node={local} {join(arguments)}'

    def handle(self, signum, frame):
        self.received = signal.Signals(signum)
        if (
            'TORCHELASTIC_RUN_ID' not in os.environ
        ):  # torchrun repeats the signal: there, only its own SIGKILL ends at once
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def on_any(self, ranks):
        """Has any rank been told to stop? A collective: every rank must call it, and all get the same answer."""
        return ranks.sum([float(self.received is not None)])[0] > 0
