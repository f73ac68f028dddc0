"""What this machine can do, measured: products, memory, attention, exchange between ranks, training steps.

    machine = measure(config, model_config, device, dtype, ranks)     about half a minute -> a common.machines.Machine
    largest_batch(batch_trial(config, model_config, device, dtype), upper)

plan.py --measure=True calls both. What may run out of memory, and ranks, are child processes: this file as a script. It
reads a request as JSON from standard input and prints its answer as the last line. So a child that has too little
memory, or is killed for it, is an answer too.
"""

import dataclasses
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if __name__ == '__main__':  # a child, started by this file's path; what it imports is in the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from common.attention import attend
from common.cpu import use_onednn_products
from common.device import autocast, device_name, peak_memory, set_up_device, synchronize
from common.distributed import ALONE, Ranks, waiting_limit
from common.errors import UserError, install_error_handling, one_line, say, warn
from common.machines import MEASURED, Machine, card, own_card
from common.memory import available_memory, limit_memory, resident_bytes
from loading import empty_model
from lora import add_lora, freeze_base
from model import GPTConfig
from optim import clip_gradients, make_optimizer, step_unless
from parallel import parallelize

PRODUCT_SIZES = (64, 128, 256, 512, 1024, 2048)  # smallest dimensions
STREAM_BYTES = tuple(2**n for n in range(18, 29, 2))  # 256 KiB to 256 MiB, read and written together
CONTEXTS = (64, 256, 1024)  # keys of attention
EXCHANGE_BYTES = (2**20, 2**24, 2**26)
TOKENS = {'cuda': 8192, 'cpu': 2048, 'mps': 2048}  # rows of a product, as of a micro-batch
MAX_SCORES = 2**27  # queries times keys of all heads: attention that keeps them all has memory for so many
KERNELS = {'flash': 'FLASH_ATTENTION', 'efficient': 'EFFICIENT_ATTENTION', 'cudnn': 'CUDNN_ATTENTION', 'math': 'MATH'}
SPARE = 0.97  # of the available memory: a child takes no more, so that nothing else has to give way
CHILD_SECONDS = 180  # a child that takes longer is given up; ranks wait for three of them, at most 560 s
TRIAL_SECONDS = 900  # the same for a batch that is tried
KILLED = ('SIGKILL', 'SIGABRT', 'SIGSEGV', 'SIGBUS')  # how a process without memory ends if it cannot say so
NO_MEMORY = re.compile('memory|bad_alloc|could not create a primitive|start new thread', re.IGNORECASE)  # or can


def measure(
    config: dict,
    model_config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
    seconds: float = 30.0,
    with_compiling: bool | None = None,
    predict: Callable | None = None,
) -> Machine:
    """Measure what this machine does for a recipe's model -> a Machine, the same on all ranks. A collective.

    config: settings as in train.py. device, dtype: from set_up_device. ranks: after join_ranks; a single process on a
    CPU starts two ranks of its own for the exchange between them.
    seconds: about how long it takes, without the start of child processes.
    with_compiling: measure torch.compile too, which takes a minute; None: on CUDA.
    predict: see calibrated(); None: leave the machine as measured.
    """
    name, figure = str(dtype).removeprefix('torch.'), seconds / 60  # there are some 25 figures; the rest is for steps
    use_onednn_products(device, model_config.block_size)
    memory = min(ranks.gather(available_memory(device)))
    if device.type == 'cpu':
        memory *= SPARE / int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # ranks share it
    products = measure_products(device, dtype, figure)
    say(f'products in {name}, GFLOP/s: ' + ', '.join(f'{size:g}: {flops / 1e9:,.0f}' for size, flops in products))
    stream = measure_stream(device, figure)
    say('memory, GB/s: ' + ', '.join(f'{size / 2**20:g} MiB: {speed / 1e9:,.1f}' for size, speed in stream))
    attention = measure_attention(model_config, config['batch_size'], device, dtype, figure)
    say('attention, GFLOP/s: ' + ', '.join(f'{keys:g} keys: {flops / 1e9:,.0f}' for keys, flops in attention))
    kernels = compare_kernels(model_config, config['batch_size'], device, dtype, figure)
    say('its kernels, ms: ' + ', '.join(f'{kernel}: {1000 * each:.3g}' for kernel, each in kernels.items()))
    exchange = measure_exchange(device, ranks, figure)
    machine = Machine(
        name=device_name(device),
        kind=device.type,
        memory=memory,
        products={name: products},
        attention={name: attention},
        stream=stream,
        op_seconds=measure_op_seconds(device, figure),
        overlaps=device.type != 'cpu',
        correction=1.0,
        compiling={},
        source=f'plan.py --measure=True on {date.today()}, torch {torch.__version__}',
        kernels=kernels,
        **exchange,
    )
    exchanged = f'{machine.exchange_speed() / 1e9:.2f} GB/s after {1e6 * machine.exchange_seconds:.0f} microseconds'
    say(f'exchange: {exchanged}; an operation: {1e6 * machine.op_seconds:.1f} microseconds; {memory / 1e9:.1f} GB free')
    if ranks.is_main:
        with_compiling = device.type == 'cuda' if with_compiling is None else with_compiling
        machine = with_steps(machine, config, model_config, device, dtype, seconds / 8, with_compiling)
        machine = calibrated(machine, predict) if predict else machine
    return ranks.gather(machine)[0]


def calibrated(machine: Machine, predict: Callable) -> Machine:
    """The machine with its correction: the geometric mean of measured over predicted seconds of its steps.

    predict(machine, model_config, batch_size): seconds of a step, by a machine whose correction is 1.
    """
    plain = dataclasses.replace(machine, correction=1.0)
    fields = [field.name for field in dataclasses.fields(GPTConfig)]
    ratios = [
        step['seconds'] / predict(plain, GPTConfig(**{name: step[name] for name in fields}), step['batch_size'])
        for step in machine.steps
        if not step['compiled']
    ]
    return dataclasses.replace(plain, correction=statistics.geometric_mean(ratios) if ratios else 1.0)


# --- single figures ---------------------------------------------------------------------------------------------------


def seconds_of(work: Callable, device: torch.device, seconds: float, wait: bool = True) -> float:
    """Seconds of a call of work(): the median over about so many seconds, after one call that does not count. Several
    short ones are timed at once. wait: until the device has done its work; False: what the host takes."""
    work()
    calls, times, start = 1, [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        if wait:
            synchronize(device)
        elapsed = time.perf_counter() - begin
        if elapsed < seconds / 20:
            calls *= 2
        else:
            times.append(elapsed / calls)
    return statistics.median(times)


def measure_products(device, dtype, seconds: float, sizes=PRODUCT_SIZES) -> tuple:
    """FLOP/s of matrix products by their smallest dimension, ((size, FLOP/s), …): of the three of a linear layer,
    forward, and for the gradients of input and weight. seconds: for each size; what would take far longer is left out.
    """
    found = []
    for size in sizes:
        rows, columns = max(size, TOKENS[device.type]), 2 * size
        shapes = ((rows, size), (columns, size), (rows, columns))  # of input, weight, and the output's gradient
        each = seconds_of(
            partial(products, *(torch.randn(s, device=device).to(dtype) for s in shapes)), device, seconds
        )
        found.append((float(size), 6 * rows * size * columns / each))
        if 4 * each > max(1, 10 * seconds):
            break
    return tuple(found)


def products(x, weight, gradient):
    """The products of a linear layer without a bias, forward and backward."""
    F.linear(x, weight)
    torch.mm(gradient, weight)
    torch.mm(gradient.t(), x)


def measure_stream(device, seconds: float, sizes=STREAM_BYTES) -> tuple:
    """Bytes/s of an element-wise operation by the bytes that it reads and writes, ((bytes, bytes/s), …). Its result is
    new memory, as in training. seconds: for each size."""
    found = []
    for size in sizes:
        a, b = torch.rand(2, size // 12, device=device)  # in float32: two are read, one is written
        found.append((float(size), 12 * a.numel() / seconds_of(partial(torch.add, a, b), device, seconds)))
    return tuple(found)


def measure_op_seconds(device, seconds: float) -> float:
    """Seconds that the host takes for an operation, over forward and backward passes of tiny ones."""
    n, factor = 50, torch.ones(8, device=device)
    x = torch.ones(8, device=device, requires_grad=True)

    def work():
        y = x
        for _ in range(n):
            y = y * factor
        y.backward(factor)

    return seconds_of(work, device, seconds, wait=False) / (2 * n)


def measure_attention(model_config: GPTConfig, batch_size: int, device, dtype, seconds: float, contexts=CONTEXTS):
    """FLOP/s of causal attention with a model's heads, as Machine.attention_flops counts, by the number of keys: the
    model's, and others -> ((keys, FLOP/s), …). batch_size: sequences of the model's length; as many tokens for all.
    seconds: for each number."""
    heads, channels, T = model_config.n_head, model_config.head_dim, model_config.block_size
    found = []
    for keys in sorted({T, *contexts}):
        B = sequences_of(keys, batch_size * T, heads)
        use_onednn_products(device, keys)  # it decides on the kernel
        each = seconds_of(attention_of(B, heads, model_config.kv_heads, keys, channels, device, dtype), device, seconds)
        found.append((float(keys), 7 * B * heads * keys**2 * channels / each))
    use_onednn_products(device, T)
    return tuple(found)


def sequences_of(keys: int, tokens: int, heads: int) -> int:
    """How many sequences of so many keys to attend in: of about so many tokens, at least one."""
    return max(1, min(tokens // keys, MAX_SCORES // (heads * keys**2)))


def attention_of(B: int, heads: int, kv_heads: int, T: int, channels: int, device, dtype) -> Callable:
    """A function that computes causal attention as the model does, forward and backward."""
    q, k, v = (
        torch.randn(B, nh, T, channels, device=device).to(dtype).requires_grad_() for nh in (heads, kv_heads, kv_heads)
    )
    gradient = torch.randn_like(q)
    return lambda: torch.autograd.grad(attend(q, k, v, None), (q, k, v), gradient)


def compare_kernels(model_config: GPTConfig, batch_size: int, device, dtype, seconds: float) -> dict:
    """{'flash, 64 channels': seconds, …} of each kernel that torch has for attention on this device, the fastest first:
    at a model's shape, on CUDA with heads of 64 and 128 channels too. seconds: for each."""
    heads, T = model_config.n_head, model_config.block_size
    B, found = sequences_of(T, batch_size * T, heads), {}
    for channels in dict.fromkeys((model_config.head_dim, *((64, 128) if device.type == 'cuda' else ()))):
        work = attention_of(B, heads, model_config.kv_heads, T, channels, device, dtype)
        for kernel, backend in KERNELS.items():
            if kernel == 'math' and heads * T * T > MAX_SCORES or not hasattr(SDPBackend, backend):
                continue
            try:
                with sdpa_kernel([getattr(SDPBackend, backend)]), warnings.catch_warnings():
                    warnings.simplefilter('ignore')  # torch says at length why a kernel does not apply
                    found[f'{kernel}, {channels} channels'] = seconds_of(work, device, seconds)
            except RuntimeError:  # this device, shape or dtype has no such kernel, or no memory for it
                pass
    if device.type == 'cuda':
        found |= measure_flex(B, heads, T, model_config.head_dim, device, dtype, seconds)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def measure_flex(B: int, heads: int, T: int, channels: int, device, dtype, seconds: float) -> dict:
    """{'flex, … channels': seconds} of compiled flex attention, causal; {} where it does not work."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = torch.randn(3, B, heads, T, channels, device=device).to(dtype).unbind()
        leaves, gradient = [t.detach().requires_grad_() for t in (q, k, v)], torch.randn_like(q)
        mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, T, T, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)

        def work():
            torch.autograd.grad(compiled(*leaves, block_mask=mask), leaves, gradient)

        return {f'flex, {channels} channels': seconds_of(work, device, seconds)}
    except Exception as error:  # compilers, linkers and drivers raise anything
        warn(f'flex attention does not work here ({type(error).__name__}: {one_line(str(error), 100)})')
        return {}


# --- exchange between ranks -------------------------------------------------------------------------------------------


def measure_exchange(device, ranks: Ranks, seconds: float) -> dict:
    """The fields of Machine on the exchange between ranks: measured between those of torchrun, or two of our own on a
    CPU; else the data sheet's of a card that is known, and assumed. A collective. seconds: for each size."""
    local = int(os.environ.get('LOCAL_WORLD_SIZE', ranks.world_size))
    if ranks.world_size > 1:
        network, latency = bus_speed(device, seconds)
        link = network
        if 1 < local < ranks.world_size:
            node, _ = dist.new_subgroups(local, timeout=waiting_limit(600))
            link, _ = bus_speed(device, seconds, node)
        rest = {'per_node': local, 'watts': 0.0, 'efficiency': MEASURED}
        return {'link': link, 'network': network, 'exchange_seconds': latency, **rest}
    if device.type == 'cpu':
        with tempfile.TemporaryDirectory() as folder:
            request = {'task': 'exchange', 'store': os.path.join(folder, 'store'), 'seconds': seconds}
            answers = answers_of([{**request, 'rank': rank} for rank in range(2)])
        if answers[0] is not None:
            speed, latency = answers[0]
            rest = {'per_node': 1, 'watts': 0.0, 'efficiency': MEASURED}
            return {'link': speed, 'network': speed, 'exchange_seconds': latency, **rest}
        warn('the exchange between ranks could not be measured, and is assumed')
    try:
        known = card(device_name(device))
    except UserError:
        known = own_card(1, 1, 1)
    fields = ('link', 'network', 'exchange_seconds', 'watts')
    efficiency = {**MEASURED, 'exchange': known.efficiency['exchange']}
    per_node = max(1, torch.cuda.device_count())
    return {'per_node': per_node, 'efficiency': efficiency, **{name: getattr(known, name) for name in fields}}


def bus_speed(device, seconds: float, group=None, sizes=EXCHANGE_BYTES) -> tuple[float, float]:
    """Bytes/s that a rank sends in large all-reduces within a group, and seconds of a tiny one. A collective."""
    n = dist.get_world_size(group)
    latency = seconds_of_all_reduce(4, device, seconds, group)
    total = sum(seconds_of_all_reduce(size, device, seconds, group) for size in sizes)
    moving = max(total - len(sizes) * latency, total / 2)  # both are measured, and noise must not make it nothing
    return 2 * (n - 1) / n * sum(sizes) / moving, latency


def seconds_of_all_reduce(n_bytes: int, device, seconds: float, group=None) -> float:
    """Mean seconds of an all-reduce, over about so many seconds; the slowest rank's, on all. A collective."""
    tensor = torch.zeros(n_bytes // 4, device=device)

    def slowest(calls):
        dist.barrier(group)
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(tensor, group=group)
        synchronize(device)
        elapsed = torch.tensor((time.perf_counter() - start) / calls, device=device)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX, group)
        return elapsed.item()

    slowest(1)  # connects
    return slowest(int(min(1000, max(1, seconds / max(slowest(1), 1e-6)))))


def exchange(store: str, rank: int, seconds: float) -> list:
    """One of two ranks on this CPU, which find each other by a file -> bus_speed's answer, as a child's."""
    dist.init_process_group('gloo', store=dist.FileStore(store, 2), rank=rank, world_size=2)
    answer = bus_speed(torch.device('cpu'), seconds)
    dist.barrier()
    return answer


# --- training steps ---------------------------------------------------------------------------------------------------


def with_steps(machine, config, model_config, device, dtype, seconds: float, with_compiling: bool) -> Machine:
    """The machine with measured steps of the recipe's model at two batch sizes, and what torch.compile does for them.

    The larger batch is the recipe's, or what takes about `seconds`. A model that does not fit, or is far slower, leaves
    it as it is, with one line of warning.
    """
    flops = empty_model(model_config).flops_per_token() * model_config.block_size
    guess = flops / machine.product_flops(str(dtype).removeprefix('torch.'), min(model_config.n_embd, 512))
    largest = max(1, min(config['batch_size'], int(seconds / 4 / guess)))
    run = batch_runner(config, model_config, device, dtype)
    steps, compiling = [], {}
    try:
        for batch_size in dict.fromkeys((max(1, largest // 2), largest)):
            step = run(batch_size, seconds)
            if step is None:
                warn(f'a step with --batch_size={batch_size} does not fit into the memory that is free here')
                break
            steps.append(step)
            say(f'a step with --batch_size={batch_size}: {step["seconds"]:.3f} s, {step["peak_bytes"] / 1e9:.2f} GB')
        compiled = compiled_step(run, steps[-1]['batch_size'], seconds) if steps and with_compiling else None
        if compiled:
            takes, saves = compiled['first_seconds'], 1 - compiled['seconds'] / steps[-1]['seconds']
            say(f'torch.compile takes {takes:.0f} s and saves {100 * saves:.0f}% of it')
            compiling = {'takes': takes, 'saves': saves}
            steps.append(compiled)
    except TimeoutError as error:
        warn(f'training steps are not measured to their end: {error}')
    return dataclasses.replace(machine, steps=tuple(steps), compiling=compiling)


def compiled_step(run: Callable, batch_size: int, seconds: float) -> dict | None:
    """What run() finds of compiled steps, None where torch.compile does not work. run: from batch_runner."""
    say('compiling, this can take a minute ...')
    try:
        return run(batch_size, seconds, compiled=True)
    except RuntimeError as error:  # of the child: compilers, linkers and drivers raise anything
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = ([line for line in lines if 'Error' in line] or lines)[-1]
        warn(f'torch.compile does not work here ({one_line(reason, 150)})')
        return None


def batch_runner(
    config: dict, model_config: GPTConfig, device, dtype, limit: float | None = None, most: float = CHILD_SECONDS
) -> Callable:
    """A function (batch size, seconds, compiled=False) that makes training steps in a child process -> a dict with
    'seconds', 'peak_bytes' and the shape, None if the memory does not suffice.

    limit: bytes that a child may take; None: nearly all that is free at the time. most: seconds after which it is given
    up, with TimeoutError.
    """
    settings = {**config, 'parallel': 'ddp', 'cpu_offload': False}
    settings = {key: value for key, value in settings.items() if type(value) in (str, int, float, bool)}
    request = {
        'task': 'steps',
        'device': str(device),
        'dtype': str(dtype).removeprefix('torch.'),
        'threads': torch.get_num_threads(),
        'settings': settings,
        'shape': dataclasses.asdict(model_config),
    }

    def run(batch_size, seconds, compiled=False):
        if device.type == 'cuda':
            torch.cuda.empty_cache()
        least = available_memory(device) * SPARE if limit is None else limit
        rest = {'batch_size': batch_size, 'seconds': seconds, 'compiled': compiled, 'limit': least}
        return answers_of([{**request, **rest}], most)[0]

    return run


def make_steps(device, dtype, threads, settings, shape, batch_size, seconds, compiled, limit) -> dict:
    """Make at least two training steps, as a child, over about so many seconds after the first -> see batch_runner.

    A step is forward, backward, clipping and the optimizer, on random ids. The first step makes the optimizer's state,
    so the most memory is taken in the second.
    """
    if device == 'cpu':
        torch.set_num_threads(threads)
    device, dtype = set_up_device(device, dtype)
    model_config = GPTConfig(**shape)
    use_onednn_products(device, model_config.block_size)
    model = empty_model(model_config).train()
    if settings['lora_rank']:
        add_lora(model, {key: settings[f'lora_{key}'] for key in ('rank', 'alpha', 'targets')}, 'meta')
        freeze_base(model)
    limit_memory(device, limit)
    start = resident_bytes()
    parallelize(model, None, settings, ALONE, device, dtype, fill_with_anything)
    optimizer = make_optimizer(model, settings, dtype=dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    x, y = torch.randint(model_config.vocab_size, (2, batch_size, model_config.block_size), device=device)
    starts = torch.zeros_like(x) if settings['mask_documents'] else None
    never = torch.zeros((), dtype=torch.bool, device=device)
    if compiled:
        model.compile()

    def step():
        with autocast(device, dtype):
            loss = model(x, y, starts, with_logits=False)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_gradients(parameters, settings['grad_clip'])
        step_unless(never, optimizer)
        scaler.update()
        optimizer.zero_grad()
        synchronize(device)

    times = []
    while len(times) < 2 or sum(times[1:]) < seconds and len(times) < 20:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return {
        'seconds': statistics.median(times[1:]),
        'first_seconds': times[0],
        'batch_size': batch_size,
        'peak_bytes': peak_memory(device) if device.type == 'cuda' else resident_bytes(most=True) - start,
        'dtype': str(dtype).removeprefix('torch.'),
        'optimizer': settings['optimizer'],
        'activation_checkpointing': settings['activation_checkpointing'],
        'lora_rank': settings['lora_rank'],
        'compiled': compiled,
        **shape,
    }


@torch.no_grad()
def fill_with_anything(model):
    """Give weights without values some: time and memory do not depend on them."""
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)


# --- the largest batch ------------------------------------------------------------------------------------------------


def largest_batch(fits: Callable[[int], bool], upper: int, guess: int = 1, precision: float = 0.0) -> int:
    """The largest batch size of at most `upper` for which fits(size) is true, 0 if none is.

    Searched for around the guess, in strides that grow, then by bisection, until it is known to a share of
    `precision`; 0: exactly. Where a batch fits, smaller ones must fit too.
    """
    good, bad, stride = 0, upper + 1, 1.25  # what is known: good fits, bad does not
    size = max(1, min(guess, upper))
    while bad - good > max(1, precision * good):
        if fits(size):
            good = size
        else:
            bad = size
        if good and bad <= upper:
            size = (good + bad) // 2
        else:
            size = min(math.ceil(good * stride), upper) if good else max(1, int(bad / stride))
            stride = min(stride**2, 16)
    return good


def batch_trial(config: dict, model_config: GPTConfig, device, dtype, limit: float | None = None) -> Callable:
    """A function from a batch size to whether training with it fits into memory: two whole steps in a child process.

    limit: bytes that the child may take; None: nearly all that is free at the time.
    """
    run = batch_runner(config, model_config, device, dtype, limit, TRIAL_SECONDS)

    def fits(batch_size):
        try:
            step = run(batch_size, 0.0)
        except TimeoutError as error:
            raise UserError(f'--batch_size={batch_size} cannot be tried: {error}') from error
        used = f'{step["peak_bytes"] / 1e9:.2f} GB, {step["seconds"]:.2f} s' if step else 'does not fit'
        say(f'tried --batch_size={batch_size}: {used}')
        return step is not None

    return fits


# --- child processes --------------------------------------------------------------------------------------------------


def answers_of(requests: list[dict], seconds: float = CHILD_SECONDS) -> list:
    """Answer each request in a child process of its own, all at once -> their answers, None for want of memory.

    UserError for a mistake that a child reports, TimeoutError after so many seconds, RuntimeError for other failures.
    """
    # torchrun's variables make a process one of its ranks
    env = {
        key: value for key, value in os.environ.items() if not re.match('(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)', key)
    }
    if len(requests) > 1:
        env['OMP_NUM_THREADS'] = '1'
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    children = [subprocess.Popen([sys.executable, os.path.abspath(__file__)], env=env, **pipes) for _ in requests]
    inputs = [child.stdin for child in children]
    try:
        for child, request in zip(children, requests):
            child.stdin.write(json.dumps(request) + '\n')
            child.stdin.flush()
            child.stdin = None  # communicate() would close it, and the child ends with it, see die_with_parent
        deadline = time.monotonic() + seconds
        return [answer_of(child, deadline - time.monotonic()) for child in children]
    finally:
        for child, pipe in zip(children, inputs):
            child.kill()  # does nothing to one that has ended
            child.wait()
            with suppress(OSError):
                pipe.close()


def answer_of(child: subprocess.Popen, seconds: float):
    """Wait for a child's answer, at most so many seconds; see answers_of."""
    try:
        output, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError('it takes too long') from None
    if child.returncode == 0:
        return json.loads(output.splitlines()[-1])
    if child.returncode in [-getattr(signal, name, 0) for name in KILLED]:
        return None
    if child.returncode == 2:
        raise UserError(errors.strip().splitlines()[-1].removeprefix('error: '))
    raise RuntimeError(f'a child process failed with status {child.returncode}:\n{errors}')


def answer(request: dict):
    """Do what a request asks, in this process -> the answer, None if the memory does not suffice."""
    task = {'steps': make_steps, 'exchange': exchange}[request['task']]
    try:
        return task(**{key: value for key, value in request.items() if key != 'task'})
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        return None


def die_with_parent():
    """End this process as soon as standard input ends, that is when its parent is gone, however that ended."""
    sys.stdin.read()
    os._exit(1)


if __name__ == '__main__':
    install_error_handling()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=die_with_parent, daemon=True).start()
    print('\n' + json.dumps(answer(request)), flush=True)
    os._exit(0)  # threads of gloo sometimes abort the interpreter's end
