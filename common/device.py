"""Where a run happens: device, precision, ranks, seeds, compilation, signals, and what the device could do at best."""

import re
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch

from common.errors import UserError, one_line, warn

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Peak dense TFLOP/s by device name, from the makers' data sheets: (bfloat16 or float16, float32 by way of TF32 where the
# device has it). A name counts where it stands as whole words in the device's own name, and the longest such does; a device of
# a VARIANT that is not in the table is another one.
PEAK_TFLOPS = {
    'B200': (2250, 1125),
    'GH200': (989, 494),
    'H200': (989, 494),
    'H100 NVL': (835, 417),
    'H100 PCIe': (756, 378),
    'H100': (989, 494),
    'A100': (312, 156),
    'A30': (165, 82),
    'A10G': (70, 35),
    'A10': (125, 62),
    'L40S': (362, 183),
    'L40': (181, 90),
    'L4': (121, 60),
    'V100': (125, 15.7),
    'T4': (65, 8.1),
    'RTX 6000 Ada': (364, 182),
    'RTX A6000': (155, 77),
    'RTX 5090': (209, 105),
    'RTX 4090': (165, 83),
    'RTX 3090': (71, 36),
}
VARIANTS = re.compile(r'Laptop|Max-Q|MIG|\bTi\b|SUPER|GRID')


# --- device and precision ---------------------------------------------------------------------------------------------


def pick_device(name, ranks=None):
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' -> torch.device; plain 'cuda' is this rank's own GPU.

    Raises UserError for a device that torch does not know or that this machine does not have.
    """
    several = ranks is not None and ranks.world_size > 1
    if name == 'auto':
        mps = torch.backends.mps.is_available() and not several  # no backend connects ranks on it
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device={name}: unknown device; use auto, cpu, cuda, cuda:N or mps') from error
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device={name}: not supported; use auto, cpu, cuda, cuda:N or mps')
    if several and (device.type == 'mps' or device.index is not None):
        raise UserError(f'--device={name}: cannot be shared by several ranks; use auto, cpu or cuda')
    if device.type == 'cuda':
        index = device.index if device.index is not None else ranks.local_rank if ranks else 0
        if not torch.cuda.is_available():
            raise UserError(
                f'--device={name}: torch {torch.__version__} sees no CUDA device here; use --device=auto or --device=cpu'
            )
        if index >= torch.cuda.device_count():
            raise UserError(f'--device={name}: there is no GPU {index}, this machine has {torch.cuda.device_count()}')
        device = torch.device('cuda', index)
        torch.cuda.set_device(device)
    elif device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps: torch sees no Apple GPU here; use --device=auto or --device=cpu')
    return device


def pick_dtype(name, device):
    """'auto', 'float32', 'bfloat16' or 'float16' -> the torch.dtype that matrix products run in. UserError for any other.

    'auto' is bfloat16 on CUDA devices that have it in hardware, float16 on older ones, float32 elsewhere.
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


def autocast(device, dtype):
    """A context in which matrix products run in dtype while weights and sums stay in float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.amp.autocast(device_type=device.type, dtype=dtype)


def peak_flops(device, dtype):
    """FLOP/s that the device reaches at best in dense matrix products of this dtype; None where it is not in the table."""
    if device.type != 'cuda':
        return None
    return named_peak_flops(torch.cuda.get_device_name(device), dtype)


def named_peak_flops(name, dtype):
    """peak_flops by the name that CUDA gives a device, such as 'NVIDIA H100 80GB HBM3'."""
    matches = [known for known in PEAK_TFLOPS if re.search(rf'(?<![A-Za-z0-9]){known}(?![A-Za-z0-9])', name)]
    known = max(matches, key=len, default=None)
    if (
        known is None or VARIANTS.search(name) or (known in ('V100', 'T4') and dtype == torch.bfloat16)
    ):  # those emulate bfloat16
        return None
    half, single = PEAK_TFLOPS[known]
    return 1e12 * (single if dtype == torch.float32 else half)


def use_fast_float32(device):
    """Let float32 matrix products on CUDA use TF32: several times faster, with 10 bits of mantissa in the factors."""
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')


def peak_memory(device):
    """Most memory this process has held, bytes: allocated on a CUDA device, resident on the host otherwise; None if nobody knows."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device):
    """Wait until the device has done all it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


# --- seeds ------------------------------------------------------------------------------------------------------------


def seed_all(*key):
    """Seed torch's generators on every device from a key of integers, such as (seed, step, micro-batch).

    What is drawn after it is a function of the key alone: a run that seeds so at every micro-batch has no random state to
    save, continues exactly wherever it is resumed, and draws the same on any number of ranks.
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# --- compilation ------------------------------------------------------------------------------------------------------


def compile_or_stay_eager(model, trial, **options):
    """Compile the model in place if a trial run then works, else leave it as it is, after one line of warning -> did it work?

    Compilation is lazy: only a trial shows whether this machine has what it needs (a C++ compiler, Triton, a new enough
    Python). trial() must call the model as it is going to be used. Compiled in place, the model keeps its parameters' names.
    """
    if torch.__version__.startswith('2.6.') and model.training and next(model.parameters()).device.type == 'cpu':
        warn(
            'torch 2.6 compiles a wrong gradient of the embedding on CPUs, going on without; a newer torch does it right'
        )
        return False
    try:
        model.compile(**options)
        trial()
        return True
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # of any kind: it comes from compilers, linkers, drivers
        warn(
            f'torch.compile does not work here, going on without ({type(error).__name__}: {one_line(str(error), 150)})'
        )
        model._compiled_call_impl = (
            None  # where Module.compile() keeps its work; there is no public way to take it back
        )
        model.zero_grad(set_to_none=True)
        return False


def decoding_options(device):
    """Options of torch.compile for drawing a token at a time: nothing changes shape, so on CUDA the whole step becomes one graph."""
    return {'dynamic': False, 'mode': 'reduce-overhead' if device.type == 'cuda' else 'default'}


class Stopwatch:
    """Where the time goes: lap(name) adds the time since the last lap to `name`. Wall-clock seconds in `seconds`.

    On an accelerator work is queued, so that a lap shows what the host waited for, not what the device did meanwhile.
    """

    def __init__(self):
        self.seconds, self.laps = {}, {}
        self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self.laps[name] = self.laps.get(name, 0) + 1

    def total(self, *names):
        """Seconds of all the named laps together."""
        return sum(self.seconds.get(name, 0.0) for name in names)

    def mean(self, *names):
        """Seconds that a lap of each of these takes on average, together."""
        return sum(self.seconds[name] / self.laps[name] for name in names if name in self.laps)
