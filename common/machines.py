"""What machines can do: usual GPUs by their data sheets, and any machine as measured, kept in a JSON file.

card('h100')                 a card of the table below
own_card(200, 24, 900)       any other, by its TFLOP/s, GB of memory and GB/s of bandwidth
read_machine('machine.json') a machine that measuring.measure() has measured, here or elsewhere

A data sheet gives peaks. Machine.efficiency says what share of them training reaches: assumed, see EFFICIENCY. Where a
machine was measured, it is 1.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from common.errors import UserError, user_errors
from common.files import replace

KINDS = ('cuda', 'cpu', 'mps')
DTYPE_NAMES = ('float32', 'bfloat16', 'float16')
PARTS = ('products', 'attention', 'stream', 'exchange')  # keys of Machine.efficiency
COMPILING = ('takes', 'saves')  # keys of Machine.compiling, if there are any
MEASURED = dict.fromkeys(PARTS, 1.0)
MAX_FILE, MAX_LIST, MAX_TEXT = 2**20, 1000, 500  # bytes, entries and characters: more is not a machine file


@dataclass(frozen=True)
class Machine:
    """What one device can do, and how fast it talks to others."""

    name: str  # 'H100 SXM 80GB', 'AMD EPYC 7B13, 2 threads'
    kind: str  # 'cuda', 'cpu', 'mps'
    memory: float  # bytes per device that training may use; by a data sheet, with what the CUDA context takes
    products: dict  # dtype name -> ((smallest dimension of a matrix product, FLOP/s), …), ascending
    attention: dict  # dtype name -> ((keys, FLOP/s of causal attention), …), see attention_flops; {}: unknown
    stream: tuple  # ((bytes that one operation reads and writes, bytes/s), …), ascending
    op_seconds: float  # host time to issue one operation eagerly; on a CPU, what it takes beyond its work
    overlaps: bool  # the host runs ahead of the device, as with CUDA
    link: float  # bytes/s per device between devices of a node, one way: the bus bandwidth of an all-reduce
    network: float  # the same between nodes
    exchange_seconds: float  # latency of one collective
    per_node: int  # devices per node, usual
    watts: float  # of one device; 0: unknown
    efficiency: dict  # share of the figures above that training reaches, for each of PARTS
    correction: float  # measured over predicted seconds of real steps; 1: there were none
    compiling: dict  # {'takes': seconds, 'saves': share of a step} of torch.compile, measured; {}: not measured
    source: str  # address of the data sheet, or day and versions of the measurement
    steps: tuple = ()  # measured training steps, see measuring.measure_steps: dicts with 'seconds', 'batch_size', …
    kernels: dict = field(default_factory=dict)  # seconds of each attention kernel that was compared

    @property
    def measured(self) -> bool:
        """Was it measured? Then memory is what was free beside the CUDA context."""
        return self.efficiency == MEASURED

    def product_flops(self, dtype: str, size: int) -> float:
        """FLOP/s of matrix products in a dtype ('bfloat16', …) whose smallest dimension is `size`.

        UserError if the machine has no products in that dtype, or they were not measured.
        """
        self.require_dtype(dtype)
        return self.efficiency['products'] * interpolate(self.products[dtype], size)

    def attention_flops(self, dtype: str, keys: int = 1024) -> float:
        """FLOP/s of causal attention over so many keys, forward and backward together; unknown, as of products of 64.

        Counted as in the papers on FlashAttention: per channel of a head, query and key that it sees 4 operations
        forward and 10 backward, which computes the weights again.
        """
        self.require_dtype(dtype)
        if dtype not in self.attention:
            return self.product_flops(dtype, 64)
        return self.efficiency['attention'] * interpolate(self.attention[dtype], keys)

    def stream_speed(self, n_bytes: float) -> float:
        """Bytes/s of an element-wise operation that reads and writes so many bytes together."""
        return self.efficiency['stream'] * interpolate(self.stream, n_bytes)

    def exchange_speed(self, between_nodes: bool = False) -> float:
        """Bytes/s that a device sends in a large collective; in all-reduce among n, 2 (n - 1) / n times its bytes."""
        return self.efficiency['exchange'] * (self.network if between_nodes else self.link)

    def require_dtype(self, dtype: str):
        """UserError unless the machine has products in a dtype."""
        if dtype not in self.products:
            raise UserError(f'{self.name}: nothing is known of {dtype}; use --dtype={" or ".join(self.products)}')


def interpolate(curve: tuple, x: float) -> float:
    """The value at x of a curve ((x, value), …), ascending in x: linear in log(x), constant beyond its ends."""
    below = [point for point in curve if point[0] <= x]
    above = [point for point in curve if point[0] > x]
    if not below or not above:
        return (below[-1] if below else above[0])[1]
    (x0, y0), (x1, y1) = below[-1], above[0]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


# --- usual GPUs -------------------------------------------------------------------------------------------------------

# Shares of a data sheet's peaks that training is assumed to reach; nobody measured them one by one. Whole steps are the
# test: they reach 62% of the peak on A100 80GB (MPT 3B, sequences of 2048; 45% with 125M), 46% on H100 SXM (7B), by
# https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md; 58% on A100 and 33 to 39% on
# H100 at 500 W (Llama 3 8B), by https://github.com/pytorch/torchtitan/tree/main/docs/performance.md and benchmarks/.
# Attention: FlashAttention-2 reaches 50 to 73% of an A100's peak, forward (arXiv 2307.08691), and 35% of an H100's
# (arXiv 2407.08608).
# Exchange: all-reduce among 8 has a bus bandwidth of 230 to 250 GB/s where NVLink has 300 one way, and 35 to 45 where
# PCIe has 64 (https://docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests).
EFFICIENCY = {
    'volta': {'products': 0.6, 'attention': 0.2, 'stream': 0.8, 'exchange': 0.75},  # also Turing: no FlashAttention-2
    'ampere': {'products': 0.7, 'attention': 0.5, 'stream': 0.85, 'exchange': 0.75},  # also Ada, and unknown cards
    'hopper': {'products': 0.6, 'attention': 0.35, 'stream': 0.85, 'exchange': 0.75},  # also Blackwell, MI300X
}
# 5 to 25 microseconds: https://jiahuanglin.xyz/all_lessons/gpu_kernel_serving/18_pytorch_to_kernel.html
OP_SECONDS = 10e-6  # assumed
EXCHANGE_SECONDS = 20e-6  # assumed
PCIE3, PCIE4, PCIE5 = 16, 32, 64  # GB/s one way, 16 lanes
SHARED = 1.6  # GB/s per device between nodes where no data sheet names a network: a node's 100 Gb/s among 8, assumed


class Card(NamedTuple):
    """A row of the data sheets."""

    cuda: str  # what CUDA's name of the device contains, as whole words
    half: float  # peak dense TFLOP/s in bfloat16 and float16, summed in float32
    single: float  # the same in TF32; where the device or torch's build for it lacks that, in float32
    memory: float  # GB of 2^30 bytes, less the sixteenth that error correction takes of GDDR6 in data centers
    bandwidth: float  # GB/s of the memory
    link: float  # GB/s between devices of a node, one way; data sheets of NVLink name both ways together
    network: float  # GB/s per device between nodes, one way
    per_node: int  # devices per node
    watts: float
    family: str  # key of EFFICIENCY
    source: str  # data sheet


NVIDIA, SHEETS = 'https://www.nvidia.com/en-us/', 'https://images.nvidia.com/'
V100 = SHEETS + 'content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf'
A100, H100 = NVIDIA + 'data-center/a100/', NVIDIA + 'data-center/h100/'
A10G = 'https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf'
AMPERE = SHEETS + 'aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf'
ADA = SHEETS + 'aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf'
BLACKWELL = SHEETS + 'aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf'
MI300X = 'https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html'
# 'A100' alone means the first of that name. Cards that CUDA calls by one name have the same peaks.
CARDS = {
    'B200': Card('B200', 2250, 1125, 180, 8000, 900, 50, 8, 1000, 'hopper', NVIDIA + 'data-center/dgx-b200/'),
    'GH200 480GB': Card(
        'GH200', 989, 494, 96, 4000, 450, 50, 1, 1000, 'hopper', NVIDIA + 'data-center/grace-hopper-superchip/'
    ),
    'H200 SXM 141GB': Card('H200', 989, 494, 141, 4800, 450, 50, 8, 700, 'hopper', NVIDIA + 'data-center/h200/'),
    'H100 SXM 80GB': Card('H100', 989, 494, 80, 3350, 450, 50, 8, 700, 'hopper', H100),
    'H100 PCIe 80GB': Card('H100 PCIe', 756, 378, 80, 2000, PCIE5, SHARED, 8, 350, 'hopper', H100),
    'H100 NVL 94GB': Card('H100 NVL', 835, 417, 94, 3900, PCIE5, SHARED, 8, 400, 'hopper', H100),
    'A100 SXM 80GB': Card('A100', 312, 156, 80, 2039, 300, 25, 8, 400, 'ampere', A100),
    'A100 SXM 40GB': Card('A100', 312, 156, 40, 1555, 300, 25, 8, 400, 'ampere', A100),
    'A100 PCIe 80GB': Card('A100', 312, 156, 80, 1935, PCIE4, SHARED, 8, 300, 'ampere', A100),
    'A100 PCIe 40GB': Card('A100', 312, 156, 40, 1555, PCIE4, SHARED, 8, 250, 'ampere', A100),
    'A30 24GB': Card(
        'A30', 165, 82, 24, 933, PCIE4, SHARED, 8, 165, 'ampere', NVIDIA + 'data-center/products/a30-gpu/'
    ),
    'A10G 24GB': Card('A10G', 70, 35, 22.5, 600, PCIE4, SHARED, 8, 300, 'ampere', A10G),
    'A10 24GB': Card(
        'A10', 125, 62, 22.5, 600, PCIE4, SHARED, 8, 150, 'ampere', NVIDIA + 'data-center/products/a10-gpu/'
    ),
    'L40S 48GB': Card('L40S', 362, 183, 45, 864, PCIE4, SHARED, 8, 350, 'ampere', NVIDIA + 'data-center/l40s/'),
    'L40 48GB': Card('L40', 181, 90, 45, 864, PCIE4, SHARED, 8, 300, 'ampere', NVIDIA + 'data-center/l40/'),
    'L4 24GB': Card('L4', 121, 60, 22.5, 300, PCIE4, SHARED, 8, 72, 'ampere', NVIDIA + 'data-center/l4/'),
    'V100 SXM 16GB': Card('V100', 125, 15.7, 16, 900, 150, 6.25, 8, 300, 'volta', V100),
    'V100 SXM 32GB': Card('V100', 125, 15.7, 32, 900, 150, 6.25, 8, 300, 'volta', V100),
    'T4 16GB': Card('T4', 65, 8.1, 15, 320, PCIE3, SHARED, 4, 70, 'volta', NVIDIA + 'data-center/tesla-t4/'),
    'RTX 6000 Ada 48GB': Card(
        'RTX 6000 Ada', 364, 182, 48, 960, PCIE4, SHARED, 4, 300, 'ampere', NVIDIA + 'design-visualization/rtx-6000/'
    ),
    'RTX A6000 48GB': Card(
        'RTX A6000', 155, 77, 48, 768, PCIE4, SHARED, 4, 300, 'ampere', NVIDIA + 'design-visualization/rtx-a6000/'
    ),
    'RTX 5090 32GB': Card('RTX 5090', 209, 105, 32, 1792, PCIE5, SHARED, 2, 575, 'ampere', BLACKWELL),
    'RTX 4090 24GB': Card('RTX 4090', 165, 83, 24, 1008, PCIE4, SHARED, 2, 450, 'ampere', ADA),
    'RTX 3090 24GB': Card('RTX 3090', 71, 36, 24, 936, PCIE4, SHARED, 2, 350, 'ampere', AMPERE),
    'MI300X 192GB': Card('MI300X', 1307, 163, 192, 5300, 448, 50, 8, 750, 'hopper', MI300X),
}
EMULATED = ('V100', 'T4')  # these compute bfloat16 in other units, slowly: it counts as missing
VENDOR = {'nvidia', 'tesla', 'geforce', 'rtx', 'amd', 'instinct', 'generation'}  # words of a name that say nothing


def card(name: str) -> Machine:
    """A card of the table by its name, or what tells it apart: 'h100', 'H100 PCIe', 'a100-40', 'rtx4090', 'NVIDIA
    A100-SXM4-80GB'. UserError, naming the nearest and listing all, for any other."""
    wanted = name_words(name)
    for known, row in CARDS.items():
        words = name_words(known)
        if words[0] in wanted and set(wanted) <= set(words):
            return from_data_sheet(known, row)
    likeness = {known: max(map(partial(similar, name_words(known)[0]), wanted), default=0.0) for known in CARDS}
    raise UserError(
        f'{name!r} is not a known card; the nearest is {max(likeness, key=likeness.get)!r}. Known are '
        f'{", ".join(CARDS)}; for any other give --peak_tflops=, --memory_gb= and --bandwidth='
    )


def similar(a: str, b: str) -> float:
    """How alike two words are, from 0 to 1."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def name_words(name: str) -> list[str]:
    """'NVIDIA A100-SXM4-80GB' -> ['a100', 'sxm', '80']: the words of a card's name that tell it apart."""
    text = re.sub(r'(?<=\d)\s*gi?b\b|\bhbm\w*|(?<=sxm)\d', ' ', name.lower()).replace('rtx', ' ')
    return [word for word in re.findall(r'[a-z0-9]+', text) if word not in VENDOR]


def from_data_sheet(name: str, row: Card) -> Machine:
    """The Machine that a row of the table describes."""
    peaks = {'float32': row.single, 'bfloat16': row.half, 'float16': row.half}
    if row.cuda in EMULATED:
        del peaks['bfloat16']
    flops = {dtype: 1e12 * peak for dtype, peak in peaks.items()}
    return Machine(
        name=name,
        kind='cuda',
        memory=row.memory * 2.0**30,
        products={dtype: ((64.0, peak),) for dtype, peak in flops.items()},
        attention={dtype: ((1024.0, peak),) for dtype, peak in flops.items() if dtype != 'float32'},
        stream=((1.0, 1e9 * row.bandwidth),),
        op_seconds=OP_SECONDS,
        overlaps=True,
        link=1e9 * row.link,
        network=1e9 * row.network,
        exchange_seconds=EXCHANGE_SECONDS,
        per_node=row.per_node,
        watts=float(row.watts),
        efficiency=EFFICIENCY[row.family],
        correction=1.0,
        compiling={},
        source=row.source,
    )


def own_card(peak_tflops: float, memory_gb: float, bandwidth: float) -> Machine:
    """A GPU that is not in the table. peak_tflops: dense, in bfloat16; float32 is taken for half of it, as TF32 is.
    memory_gb: GB of memory. bandwidth: its GB/s. UserError unless all three are above 0."""
    given = {'peak_tflops': peak_tflops, 'memory_gb': memory_gb, 'bandwidth': bandwidth}
    for key, value in given.items():
        if not 0 < value < math.inf:
            raise UserError(
                f'--{key}={value}: must be above 0; a card that is not in the table needs {", ".join(given)}'
            )
    name = f'{peak_tflops:g} TFLOP/s, {memory_gb:g} GB, {bandwidth:g} GB/s'
    row = Card(
        '', peak_tflops, peak_tflops / 2, memory_gb, bandwidth, PCIE4, SHARED, 8, 0, 'ampere', 'the command line'
    )
    return from_data_sheet(name, row)


# --- machine files ----------------------------------------------------------------------------------------------------


def write_machine(path: str, machine: Machine):
    """Write a machine file, whole or not at all; several processes may. UserError if it cannot be written."""
    part = f'{path}.{secrets.token_hex(4)}.part'  # a name of its own for each process
    with user_errors(OSError, where=f'cannot write {path}: '):
        try:
            with open(part, 'w', encoding='utf-8') as file:
                json.dump(dataclasses.asdict(machine), file, indent=1, allow_nan=False)
                file.write('\n')
            replace(part, path)
        finally:
            if os.path.exists(part):
                os.remove(part)


def read_machine(path: str) -> Machine:
    """The machine in a file that write_machine wrote, perhaps elsewhere: every value is checked. UserError if it is
    missing or damaged."""
    with user_errors(OSError, where=f'cannot read {path}: '), open(path, 'rb') as file:
        data = file.read(MAX_FILE + 1)
    try:
        if len(data) > MAX_FILE:
            raise ValueError('it is too large')
        return machine_from(json.loads(data.decode('utf-8'), parse_int=float, parse_constant=refuse))
    except (ValueError, RecursionError) as error:
        reason = 'it is not JSON' if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else error
        raise UserError(f'{path} is not a machine file ({reason}); measure again: plan.py --measure=True') from error


def refuse(constant: str):
    """NaN and Infinity, which Python's JSON knows, are no measurements. ValueError."""
    raise ValueError(f'it contains {constant}')


def machine_from(values) -> Machine:
    """The Machine of decoded JSON. ValueError that names the first field that is missing, unknown or impossible."""
    if not isinstance(values, dict):
        raise ValueError('it is not an object')
    fields = {field.name for field in dataclasses.fields(Machine)}
    for name in sorted(fields ^ values.keys()):
        raise ValueError(f'{"there is no" if name in fields else "it has an unknown"} {name[:50]!r}')
    return Machine(**{name: checked(name, CHECKS[name], values[name]) for name in values})


def checked(name: str, check, value):
    """check(value), with the field's name in its ValueError."""
    try:
        return check(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'its {name!r} is wrong') from error


# Checks: decoded JSON -> the field's value. They raise ValueError, TypeError or AttributeError for anything else.


def number(least: float, most: float, whole: bool = False):
    """A check for a number from least to most."""

    def check(value):
        if type(value) is not float or not least <= value <= most or whole and not value.is_integer():
            raise ValueError(value)
        return int(value) if whole else value

    return check


def text(value):
    """A check for a short text without line breaks and control characters, since it is printed."""
    if not (isinstance(value, str) and value.isprintable() and len(value) <= MAX_TEXT):
        raise ValueError
    return value


def one_of(*known):
    """A check for one of some values, of the same type."""

    def check(value):
        if not any(value == other and type(value) is type(other) for other in known):
            raise ValueError
        return value

    return check


def curve(value):
    """A check for a curve: pairs of a size and a speed, ascending in size."""
    if not (isinstance(value, list) and 0 < len(value) <= MAX_LIST):
        raise ValueError
    pairs = tuple((positive(size), positive(speed)) for size, speed in value)
    if any(a[0] >= b[0] for a, b in zip(pairs, pairs[1:])):
        raise ValueError
    return pairs


def table(key, value, required=()):
    """A check for an object whose keys and values pass checks of their own, with all required keys."""

    def check(content):
        if not len(content) <= MAX_LIST or not set(required) <= content.keys():
            raise ValueError
        return {key(name): value(each) for name, each in content.items()}

    return check


def measured_steps(value):
    """A check for a list of measured steps: flat objects of texts, numbers and truth values, with 'seconds'."""
    plain = table(text, lambda v: v if isinstance(v, bool) else number(-1e18, 1e18)(v) if type(v) is float else text(v))
    if not (isinstance(value, list) and len(value) <= MAX_LIST and all(positive(step['seconds']) for step in value)):
        raise ValueError
    return tuple(whole_numbers(plain(step)) for step in value)


def whole_numbers(step: dict) -> dict:
    """The same with int where a number is whole: JSON does not tell 12.0 from 12, and a model's shape needs 12."""
    return {key: int(v) if type(v) is float and v.is_integer() else v for key, v in step.items()}


def compiling(value):
    """A check for what torch.compile takes and saves, or an empty object."""
    return {} if value == {} else table(one_of(*COMPILING), number(-1e6, 1e6), required=COMPILING)(value)


positive = number(1e-12, 1e24)
share = number(1e-6, 1)
CHECKS = {
    'name': text,
    'kind': one_of(*KINDS),
    'memory': positive,
    'products': table(one_of(*DTYPE_NAMES), curve),
    'attention': table(one_of(*DTYPE_NAMES), curve),
    'stream': curve,
    'op_seconds': number(0, 1),
    'overlaps': one_of(True, False),
    'link': positive,
    'network': positive,
    'exchange_seconds': number(0, 60),
    'per_node': number(1, 10000, whole=True),
    'watts': number(0, 1e6),
    'efficiency': table(one_of(*PARTS), share, required=PARTS),
    'correction': number(1e-3, 1e3),
    'compiling': compiling,
    'source': text,
    'steps': measured_steps,
    'kernels': table(text, positive),
}
