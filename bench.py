"""Time a training step: milliseconds, tokens a second, the share of the device's peak, memory.

    python bench.py                                                    GPT-2 124M at block 1024, batch 12
    python bench.py --profile=True                                     and which operators cost most, with a trace to look at
    python bench.py --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --dataset=shakespeare_char
"""
import math
import os
import statistics
import time

import torch

from configurator import configure, require, user_errors
from dataloader import Tokens, TrainBatches, read_meta
from model import GPT, GPTConfig
from optim import make_optimizer
from runtime import (
    Ranks,
    autocast,
    compile_or_stay_eager,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
    seed_all,
    synchronize,
    use_fast_float32,
)

batch_size = 12  # windows in a step
block_size = 1024  # tokens in a window
n_layer = 12  # transformer layers
n_head = 12  # attention heads in a layer
n_embd = 768  # width
vocab_size = 50304  # ids in the vocabulary
dropout = 0.0  # share of activations dropped
bias = False  # biases in linear and normalisation layers
real_data = True  # read the data set's tokens, where it has been prepared; False: random ids
dataset = 'openwebtext'  # folder below data/
warmup_iters = 3  # steps before the clock starts
max_iters = 20  # steps to time
max_seconds = 60.0  # stop timing after so long, with at least one step
profile = False  # profile a few steps more: print the costliest operators, write a trace
trace_file = 'trace.json'  # the profile's trace, for ui.perfetto.dev or chrome://tracing
seed = 1337  # of weights and data
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = True  # compile the model
config = configure(globals())

require(config, lambda v: v >= 1, 'at least 1', 'batch_size', 'block_size', 'vocab_size', 'max_iters')
require(config, lambda v: 0 <= v < math.inf, '0 or more', 'warmup_iters', 'max_seconds', 'seed')

if profile:
    with user_errors(OSError, where=f'cannot write --trace_file={trace_file}: '), open(trace_file, 'a'):
        pass  # found out before the time is spent

device = pick_device(device)
dtype = pick_dtype(dtype, device)
use_fast_float32(device)
seed_all(seed)

# --- model, data, optimizer -------------------------------------------------------------------------------------------
with user_errors(ValueError):
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)).to(device)
optimizer = make_optimizer(model, 1e-4, 0.1, (0.9, 0.95))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
data_dir = os.path.join('data', dataset)
if real_data and not any(os.path.exists(os.path.join(data_dir, name)) for name in ('train.bin', 'train_000.bin')):
    print(f'{data_dir} is not prepared, timing on random ids')
    real_data = False
if real_data:
    tokens = Tokens(data_dir, 'train', read_meta(data_dir), vocab_size)
    next_batch = TrainBatches(tokens, block_size, batch_size, 1, seed, 'random', Ranks(), device).next
else:
    random_batch = torch.randint(vocab_size, (2, batch_size, block_size), device=device)

    def next_batch():
        """The same random ids every time: (B, T) inputs and (B, T) targets."""
        return random_batch[0], random_batch[1]


def step(batch):
    """One update on the batch, waited for -> its loss, a float."""
    with autocast(device, dtype):
        loss = model(*batch)[1]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.item()


# --- time -------------------------------------------------------------------------------------------------------------
print(f'{model.num_params():,} parameters, batch {batch_size} x {block_size}, {device.type}, {str(dtype).removeprefix("torch.")}',
      flush=True)
model.train()
if compile:
    print('compiling ...', flush=True)
    start = time.perf_counter()
    compile_or_stay_eager(model, lambda: step(next_batch()))
    print(f'compiled in {time.perf_counter() - start:.1f}s', flush=True)
for n in range(warmup_iters):
    print(f'warm-up {n + 1}/{warmup_iters}: loss {step(next_batch()):.4f}', flush=True)
synchronize(device)
times = []
while len(times) < max_iters and (not times or sum(times) < max_seconds):
    start = time.perf_counter()
    loss = step(next_batch())
    synchronize(device)
    times.append(time.perf_counter() - start)
    print(f'{len(times)}/{max_iters}: loss {loss:.4f}, time {1000 * times[-1]:.2f}ms', flush=True)

median = statistics.median(times)
peak = peak_flops(device, dtype)
flops = model.flops_per_token() * batch_size * block_size / median
print(f'time per step: median {1000 * median:.2f}ms, from {1000 * min(times):.2f} to {1000 * max(times):.2f} '
      f'over {len(times)} steps')
mfu = f'{100 * flops / peak:.1f}%' if peak else 'unknown'
print(f'{batch_size * block_size / median:,.0f} tokens/s, {flops / 1e12:.3f} TFLOP/s, mfu {mfu}, '
      f'peak memory {peak_memory(device) / 2**20:,.0f} MiB')

# --- profile ----------------------------------------------------------------------------------------------------------
if profile:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == 'cuda')
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(3):
            step(next_batch())
    column = f'self_{"device" if device.type == "cuda" else "cpu"}_time_total'
    print(profiler.key_averages().table(sort_by=column, row_limit=15, max_name_column_width=50))
    profiler.export_chrome_trace(trace_file)
    print(f'wrote {trace_file}, for ui.perfetto.dev or chrome://tracing')
