"""Device set-up, precision, seeds, compilation, a stopwatch, and peak FLOPS by device name."""

import ctypes
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from common.distributed import ALONE, Ranks
from common.errors import UserError, one_line, say, warn
from common.machines import CARDS, EMULATED, read_machine

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# A device with one of these words in its name is slower or faster than the card of that name: its peak is unknown
VARIANTS = re.compile(r'Laptop|Max-Q|MIG|\bTi\b|SUPER|GRID')
# Seconds that torch.compile takes, and the share of a step's time that it saves: what one expects before it is tried
COMPILING = {'cuda': (60, 0.2), 'cpu': (60, 0.05)}
MACHINE_FILE = 'machine.json'  # written by plan.py --measure=True, read in the current folder
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt(3)


# --- device and precision ---------------------------------------------------------------------------------------------


def set_up_device(device: str, dtype: str, ranks: Ranks | None = None) -> tuple[torch.device, torch.dtype]:
    """Prepare the device of --device= and the dtype of --dtype= -> both as torch has them.

    Selects the GPU and allows TF32 for the whole process; on a CPU keeps freed memory. UserError as pick_device and
    pick_dtype.
    """
    device = pick_device(device, ranks)
    use_fast_float32(device)
    if device.type == 'cpu':
        keep_freed_memory()
    return device, pick_dtype(dtype, device)


def pick_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The torch.device for 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'; plain 'cuda' is the GPU of this rank.

    Makes a CUDA device the current one. UserError for a device that torch does not know or this machine does not have.
    """
    several = ranks is not None and ranks.world_size > 1
    if name == 'auto':
        mps = torch.backends.mps.is_available() and not several  # torch.distributed has no backend for MPS
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device={name}: unknown device; use auto, cpu, cuda, cuda:N or mps') from error
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device={name}: not supported; use auto, cpu, cuda, cuda:N or mps')
    if several and (device.type == 'mps' or device.index is not None):
        raise UserError(f'--device={name}: cannot be shared by several ranks; use auto, cpu or cuda')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps: torch sees no Apple GPU here; use --device=auto or --device=cpu')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            seen = f'torch {torch.__version__} sees no CUDA device here'
            raise UserError(f'--device={name}: {seen}; use --device=auto or --device=cpu')
        index = device.index if device.index is not None else ranks.local_rank if ranks else 0
        if index >= torch.cuda.device_count():
            raise UserError(f'--device={name}: there is no GPU {index}, this machine has {torch.cuda.device_count()}')
        device = torch.device('cuda', index)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for 'auto', 'float32', 'bfloat16' or 'float16'. UserError for any other name.

    'auto' is bfloat16 on CUDA devices with hardware support for it, float16 on older ones, float32 elsewhere.
    """
    if name == 'auto':
        if device.type != 'cuda':
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in DTYPES:
        raise UserError(f'--dtype={name}: unknown; use auto, {", ".join(DTYPES)}')
    if name == 'float16' and device.type != 'cuda':
        raise UserError('--dtype=float16: needs a CUDA device; here use float32 or bfloat16')
    return DTYPES[name]


def use_fast_float32(device: torch.device):
    """Allow TF32 in float32 matrix products on CUDA: several times faster, but the factors keep 10 bits of mantissa."""
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')


def keep_freed_memory():
    """Keep the memory that tensors free for the tensors to come, in glibc's allocator, for the whole process.

    By default it goes back to the system, which hands out new pages, filled with zeros, at the next step: up to a
    fifth of a small model's step. Where environment variables configure the allocator, they decide.
    """
    if sys.platform != 'linux' or any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:  # other C libraries lack it
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc accepts: larger tensors still take new pages


def autocast(device: torch.device, dtype: torch.dtype):
    """A context in which matrix products run in dtype; weights and sums stay in float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.amp.autocast(device_type=device.type, dtype=dtype)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the device in dense matrix products of this dtype; None if unknown."""
    if device.type != 'cuda':
        return None
    return named_peak_flops(torch.cuda.get_device_name(device), dtype)


def named_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """peak_flops of a device that CUDA calls `name`, such as 'NVIDIA H100 80GB HBM3'."""
    matches = [row for row in CARDS.values() if re.search(rf'(?<![A-Za-z0-9]){row.cuda}(?![A-Za-z0-9])', name)]
    if not matches or VARIANTS.search(name):
        return None
    row = max(matches, key=lambda row: len(row.cuda))  # 'H100 PCIe' rather than 'H100'
    if row.cuda in EMULATED and dtype == torch.bfloat16:
        return None
    return 1e12 * (row.single if dtype == torch.float32 else row.half)


def device_name(device: torch.device) -> str:
    """What a device is called: by CUDA, by the system for a processor, with the number of threads that torch uses."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:  # Linux on x86
            name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
    except OSError:
        pass
    return f'{name}, GPU' if device.type == 'mps' else f'{name}, {torch.get_num_threads()} threads'


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes: allocated on a CUDA device, else resident on the host; None on Windows."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device):
    """Wait until the device has finished all queued work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


# --- seeds ------------------------------------------------------------------------------------------------------------


def seed_all(*key: int):
    """Seed torch's generators on all devices from several integers, such as (seed, step, micro-batch).

    Seeding at every micro-batch makes its random numbers a function of the integers alone: there is no random state to
    save, a resumed run continues exactly, and the number of ranks does not matter.
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# --- compilation ------------------------------------------------------------------------------------------------------


def compile_or_stay_eager(
    modules: list, trial: Callable[[], object], device: torch.device, calls=None, ranks=ALONE, must=False, **options
) -> bool:
    """Compile modules in place and run trial(); if that fails, warn and undo the compilation. True if it worked.

    trial: calls the modules as they will be used. torch.compile is lazy, so only a call shows whether this machine has
        what it needs: a C++ compiler, Triton, a supported Python.
    calls: how many calls are to come. Given, the modules are compiled only if that will save more time than it takes,
        and stay compiled only if they are faster then; one line says what was decided. A collective over `ranks`.
    must: raise UserError if it fails, as ranks that compute a model together cannot each decide for themselves.
    options: of torch.compile.
    """
    if torch.__version__.startswith('2.6.') and modules[0].training and device.type == 'cpu':
        warn(
            'torch 2.6 compiles a wrong embedding gradient on CPUs, continuing without compilation; newer versions work'
        )
        return False
    if calls is not None:
        # the ranks' mean, since they must decide alike, and may read different files
        takes, saves = (total / ranks.world_size for total in ranks.sum(list(expected_of_compiling(device))))
        least = takes / saves / max(calls, 1) if saves > 0 else math.inf  # seconds per call from which on it pays
        eager = seconds_per_call(trial, device, ranks, least) if calls else 0
        if eager <= least:
            say(f'not compiling the model, as this takes longer than it saves in {calls * eager:,.0f} s of training')
            return False
    if modules[0].training:  # a program that generates prints nothing else
        say('compiling the model, this can take a minute (--compile=False skips it) ...')
    failure = None
    try:
        for module in modules:
            module.compile(**options)
        trial()
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # compilers, linkers and drivers raise anything
        failure = f'{type(error).__name__}: {one_line(str(error), 150)}'
        if must:
            raise UserError(f'torch.compile does not work here, use --compile=False ({failure})') from error
        warn(f'torch.compile does not work here, continuing without ({failure})')
    worked = failure is None
    if calls is not None:
        worked = not ranks.sum([float(not worked)])[0]  # on all ranks, as they time it together
    if worked and calls is not None:
        compiled = seconds_per_call(trial, device, ranks)
        say(f'compiled, it takes {compiled / eager:.2f} of the time')
        worked = compiled <= eager
    if not worked:
        for module in modules:
            module._compiled_call_impl = None  # set by Module.compile(), which has no public inverse
            module.zero_grad(set_to_none=True)
    return worked


def expected_of_compiling(device: torch.device) -> tuple[float, float]:
    """Seconds that torch.compile takes, and the share of a step that it saves: as MACHINE_FILE has it measured on this
    device, otherwise what is usual. A file that is damaged, or of another machine, does not count."""
    if os.path.exists(MACHINE_FILE):
        try:
            machine = read_machine(MACHINE_FILE)
            if machine.compiling and (machine.kind, machine.name) == (device.type, device_name(device)):
                return machine.compiling['takes'], machine.compiling['saves']
        except UserError as error:
            warn(f'--compile=auto goes by what is usual: {error}')
    return COMPILING['cuda' if device.type == 'cuda' else 'cpu']


def seconds_per_call(trial: Callable[[], object], device: torch.device, ranks: Ranks, enough: float = 0.0) -> float:
    """Seconds that a call of trial() takes, the least of a few, or the first that is below `enough`; the mean over the
    ranks, the same on all of them; infinite if the memory does not suffice. A collective."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        try:
            trial()
            synchronize(device)
            seconds = time.perf_counter() - start
        except torch.OutOfMemoryError:  # compiled, it may suffice
            seconds = math.inf
        times.append(ranks.sum([seconds])[0] / ranks.world_size)
        if sum(times) > 10 or times[-1] <= enough:
            break
    return min(times)


def uncompiled():
    """A context in which compiled modules run as written, for calls too few to pay for another compilation."""
    if 'torch._dynamo' not in sys.modules:  # nothing is compiled, and to import the compiler takes over a second
        return nullcontext()
    return torch.compiler.set_stance('force_eager')


def decoding_options(device: torch.device) -> dict:
    """Options of torch.compile for decoding one token at a time: shapes are fixed, so CUDA runs a step as one graph."""
    return {'dynamic': False, 'mode': 'reduce-overhead' if device.type == 'cuda' else 'default'}


# --- time -------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Wall-clock seconds by kind of work: lap(name) adds the time since the last lap to seconds[name].

    Accelerators queue their work, so a lap shows how long the host waited, not what the device did meanwhile.
    """

    def __init__(self):
        self.seconds = {}
        self.laps = {}
        self.last = time.perf_counter()

    def lap(self, name: str):
        """Add the time since the last lap to `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.laps[name] = self.laps.get(name, 0) + 1
        self.last = now

    def total(self, *names: str) -> float:
        """Seconds of all laps of these names together."""
        return sum(self.seconds.get(name, 0.0) for name in names)

    def mean(self, *names: str) -> float:
        """Mean seconds of a lap, summed over these names."""
        return sum(self.seconds[name] / self.laps[name] for name in names if name in self.laps)

    def summary(self, device: torch.device) -> str:
        """Seconds by kind of work and this process's peak memory, on one line."""
        peak = peak_memory(device)
        memory = f'; peak memory {peak / 2**20:,.0f} MiB' if peak else ''
        return 'time: ' + ', '.join(f'{name} {seconds:.1f}s' for name, seconds in self.seconds.items()) + memory
