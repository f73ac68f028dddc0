"""Time a training step, or the drawing of text.

python bench.py                                                    a step of GPT-2 124M at block 1024, batch 12
python bench.py --profile=True                                     and which operators cost most, with a trace to look at
python bench.py --baseline=eager                                   in turns with the plain step: neither compiled nor by oneDNN
python bench.py config/train_shakespeare_char.py                   a step of a recipe's model, of one micro-batch
python bench.py --mode=decode                                      tokens a second of GPT-2 124M, one text and ten at once
python bench.py --mode=decode --baseline=transformers              and in turns with Hugging Face's generate()
python bench.py --mode=decode --quantize=int8
"""

import copy
import dataclasses
import math
import os
import statistics
import time
from contextlib import nullcontext

import torch

from common.cpu import keep_memory, pack, torch_products, use_onednn_products
from common.device import (
    autocast,
    compile_or_stay_eager,
    decoding_options,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
    seed_all,
    synchronize,
    use_fast_float32,
)
from common.distributed import Ranks
from common.errors import UserError, user_errors
from configurator import configure, require
from dataloader import Tokens, TrainBatches, dataset_name, read_meta
from generation import Context, Sample, Sampling, generate, window_start
from loading import model_vocab_size
from model import GPT, GPTConfig
from optim import OPTIMIZERS, make_optimizer, step_unless
from pretrained import to_hugging_face
from tokenizer import spec_from_meta, spec_vocab_size

mode = 'train'  # 'train': a training step; 'decode': generating text
batch_size = 12  # sequences in a step
bias = False  # biases in linear and normalisation layers
optimizer = 'adamw'  # 'adamw', 'muon'
real_data = True  # read the data set's tokens, where it has been prepared; False: random ids
dataset = 'openwebtext'  # folder below data/
warmup_steps = 3  # steps before the clock starts
steps = 20  # steps to time
max_seconds = 60.0  # stop timing after so long, with at least one step
profile = False  # profile a few steps more: print the costliest operators, write a trace
trace_file = 'trace.json'  # the profile's trace, for ui.perfetto.dev or chrome://tracing
seed = 1337  # of weights and data
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = True  # compile the training step; for generating text the default is False
num_samples = 10  # decode: samples in the larger batch
prompt_tokens = 64  # decode: length of the prompt
max_new_tokens = 100  # decode: tokens to generate for each sample
rounds = 5  # decode: times that everything is measured, in turns
quantize = ''  # decode: 'int8': 8-bit weights on a CPU
baseline = ''  # also time, train: 'eager', the plain step; decode: 'transformers', Hugging Face's, or 'recompute', without a cache
config = configure(globals(), fields=GPTConfig, recipe='train.py', paths=('trace_file',))

require(
    config,
    lambda v: v in ('train', 'decode'),
    'train or decode; whole runs to a loss are timed by tools/compare.py',
    'mode',
)
require(
    config,
    lambda v: v in (('', 'eager') if mode == 'train' else ('', 'transformers', 'recompute')),
    'eager' if mode == 'train' else 'transformers or recompute',
    'baseline',
)
require(config, lambda v: v in OPTIMIZERS, ' or '.join(OPTIMIZERS), 'optimizer')
require(config, lambda v: v >= 1, 'at least 1', 'batch_size', 'block_size', 'steps', 'rounds')
require(config, lambda v: 1 <= v < 2**31, 'from 1 to 2,147,483,647', 'vocab_size')
require(config, lambda v: 1 <= v <= 65536, 'from 1 to 65536', 'num_samples')
require(config, lambda v: 1 <= v <= 10**7, 'from 1 to 10,000,000', 'prompt_tokens')
require(config, lambda v: 2 <= v <= 10**7, 'from 2 to 10,000,000', 'max_new_tokens')
for key in ('profile',) if mode == 'decode' else ('quantize',):
    if config[key]:
        raise UserError(f'--{key}={config[key]}: has no meaning with --mode={mode}')
if baseline == 'transformers' and prompt_tokens + max_new_tokens > config['block_size']:
    raise UserError(
        f'--baseline=transformers: has no room for {prompt_tokens} + {max_new_tokens} tokens in '
        f'--block_size={config["block_size"]}'
    )
require(config, lambda v: 0 <= v < math.inf, '0 or more', 'warmup_steps', 'max_seconds', 'seed')
if config.recipe['init_from'] not in ('scratch', 'resume', 'auto') and 'n_layer' not in config.given:
    raise UserError(
        f'the recipe starts from {config.recipe["init_from"]} and does not tell its shape: give it, by --n_layer=, --n_head= '
        'and --n_embd='
    )
data_dir = os.path.join('data', dataset_name(dataset))
has_data = real_data and any(os.path.exists(os.path.join(data_dir, name)) for name in ('train.bin', 'train_000.bin'))
meta = read_meta(data_dir) if has_data else {}
if has_data and 'vocab_size' not in config.given:  # that of the model that train.py would make for it
    with user_errors(ValueError, where=f'{data_dir}/meta: '):
        spec = spec_from_meta(meta)
        n_ids = spec_vocab_size(spec) if spec else meta['nanogpt']['vocab_size']
        config['vocab_size'] = model_vocab_size(spec, n_ids, config.recipe['vocab_multiple'])
with user_errors(ValueError):
    model_config = GPTConfig(
        **{field.name: config[field.name] for field in dataclasses.fields(GPTConfig) if field.name in config}
    )
block_size, vocab_size = model_config.block_size, model_config.vocab_size


def bench_training(device, dtype):
    """Time training steps, print their median; profile some if asked to."""
    if profile:
        with user_errors(OSError, where=f'cannot write --trace_file={trace_file}: '), open(trace_file, 'a'):
            pass  # found out before the time is spent
    runs = {'': make_step(device, dtype, compile)}
    if baseline:
        with torch_products():
            runs[baseline] = make_step(device, dtype, False)
    next_batch = make_batches(device)

    def time_step(name):
        """One step on the next batch -> (its loss, seconds)."""
        with torch_products() if name else nullcontext():
            synchronize(device)
            start = time.perf_counter()
            loss = runs[name](next_batch())
            synchronize(device)
            return loss, time.perf_counter() - start

    for n in range(warmup_steps):
        for name in runs:
            print(
                f'warm-up {n + 1}/{warmup_steps}: {f"{name} " if name else ""}loss {time_step(name)[0]:.4f}', flush=True
            )
    times = {name: [] for name in runs}
    while len(times['']) < steps and (not times[''] or sum(map(sum, times.values())) < max_seconds):
        for name in runs:
            loss, seconds = time_step(name)
            times[name].append(seconds)
            print(
                f'{len(times[name])}/{steps}: {f"{name} " if name else ""}loss {loss:.4f}, time {1000 * seconds:.2f}ms',
                flush=True,
            )

    tokens, flops = batch_size * block_size, runs[''].flops
    device_peak = peak_flops(device, dtype)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f'{name + " " if name else ""}time per step: median {1000 * median:.2f}ms, from {1000 * min(seconds):.2f} to '
            f'{1000 * max(seconds):.2f} over {len(seconds)} steps'
        )
        mfu = f'{100 * flops / median / device_peak:.1f}%' if device_peak else 'unknown'
        print(
            f'{tokens / median:,.0f} tokens/s, {flops / median / 1e12:.3f} TFLOP/s, mfu {mfu}, '
            f'peak memory {in_mib(peak_memory(device))}{" of both" if baseline else ""}'
        )
    if baseline:
        ratios = sorted(a / b for a, b in zip(times[''], times[baseline]))
        print(
            f'{statistics.median(ratios):.2f} of the time of {baseline} (the middle half of the turns: {ratios[len(ratios) // 4]:.2f} to '
            f'{ratios[3 * len(ratios) // 4]:.2f})'
        )
    if (
        device.type == 'cpu'
    ):  # no data sheet tells its peak: a large product stands for it, by each library that multiplies
        with torch_products():
            peaks = {'torch itself': product_flops(device, dtype)}
        if by_onednn and dtype == torch.float32:  # all else is oneDNN's anyway
            peaks['oneDNN'] = product_flops(device, dtype)
        for name, seconds in times.items():
            shares = ', '.join(
                f'{100 * flops / statistics.median(seconds) / peak:.0f}% of the {peak / 1e9:.0f} by {library}'
                for library, peak in peaks.items()
            )
            print(f'{name + ": " if name else ""}of the GFLOP/s of a product of 2048 x 2048 matrices: {shares}')
    if profile:
        write_profile(device, lambda: runs[''](next_batch()))


def make_step(device, dtype, compiled):
    """A function that makes one update of a new model on a batch -> its loss, a float. Its attribute `flops` tells how many."""
    seed_all(seed)
    model = GPT(model_config).to(device).train()
    updates = make_optimizer(model, {**config.recipe, **config}, dtype=dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(batch):
        with autocast(device, dtype):
            loss = model(*batch, with_logits=False)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(updates)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_unless(torch.zeros((), dtype=torch.bool, device=device), updates)
        scaler.update()
        updates.zero_grad()
        return loss.item()

    step.flops = model.flops_per_token() * batch_size * block_size
    print(
        f'{model.num_params():,} parameters, batch {batch_size} x {block_size}, {device.type}, {str(dtype).removeprefix("torch.")}',
        flush=True,
    )
    if compiled:
        print('compiling ...', flush=True)
        start = time.perf_counter()
        batch = torch.zeros(2, batch_size, block_size, dtype=torch.long, device=device)
        compile_or_stay_eager(model, lambda: step(batch))
        print(f'compiled in {time.perf_counter() - start:.1f}s', flush=True)
    return step


def in_mib(n_bytes):
    """Bytes in words, which may be None."""
    return 'unknown' if n_bytes is None else f'{n_bytes / 2**20:,.0f} MiB'


def product_flops(device, dtype):
    """FLOP/s that the product of two large matrices reaches, the best of as many as fit into half a second, and of two at least."""
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=dtype)

    def seconds():
        start = time.perf_counter()
        a @ b
        return time.perf_counter() - start

    times = []
    while len(times) < 2 or sum(times) < 0.5:
        times.append(seconds())
    return 2 * 2048**3 / min(times)


def make_batches(device):
    """A function that returns the next batch, (B, T) inputs and (B, T) targets: of the data set, or the same random ids."""
    if has_data:
        tokens = Tokens(data_dir, 'train', meta, vocab_size)
        return TrainBatches(tokens, block_size, batch_size, 1, seed, 'random', Ranks(), device).next
    if real_data:
        print(f'{data_dir} is not prepared, timing on random ids')
    batch = torch.randint(vocab_size, (2, batch_size, block_size), device=device)
    return lambda: (batch[0], batch[1])


def write_profile(device, step):
    """Profile three calls of step: print the costliest operators, write the trace."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
        device.type == 'cuda'
    )
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(3):
            step()
    column = f'self_{"device" if device.type == "cuda" else "cpu"}_time_total'
    print(profiler.key_averages().table(sort_by=column, row_limit=15, max_name_column_width=50))
    profiler.export_chrome_trace(trace_file)
    print(f'wrote {trace_file}, for ui.perfetto.dev or chrome://tracing')


def bench_decoding(device, dtype):
    """Time drawing one text and num_samples texts after one prompt, in turns with the baseline and with bare reading of memory.

    Random weights, the likeliest token each time. The memory-bound limit: drawing a token reads every matrix once, and the keys
    and values of every text in the batch; at the speed at which the device sums up as many bytes, that takes so long.
    """
    seed_all(seed)
    model = GPT(model_config).eval()
    prompt = torch.randint(vocab_size, (prompt_tokens,)).tolist()
    rivals = {'': None}
    if baseline:
        rivals[baseline] = make_rival(model, device, dtype)
    parameters = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    width = 1 if quantize else dtype.itemsize  # bytes
    model.to(device)
    static = compile and 'compile' in config.given
    if quantize or not (static and device.type == 'cpu'):  # as in sample.py
        pack(model, device, dtype, quantize)
    else:
        width = 4
    keep_memory(device)
    print(
        f'{parameters:,} parameters in matrices of {width} bytes each, prompt {prompt_tokens}, {max_new_tokens} new tokens, '
        f'{device.type}, {quantize or str(dtype).removeprefix("torch.")}',
        flush=True,
    )

    contexts = {}  # by batch size: what is compiled keeps its addresses from round to round

    def draw(n):
        """n texts -> (seconds to the first token, seconds in all, ids of the first text)."""
        start = time.perf_counter()
        samples = [Sample(prompt, (seed, i)) for i in range(n)]
        with autocast(device, dtype):
            if static and n not in contexts:
                contexts[n] = Context(model, n, block_size, static=True)
            elif static:
                contexts[n].forget()
            tokens = generate(
                model, samples, max_new_tokens, Sampling(temperature=0), context=contexts.get(n), static=static
            )
            next(tokens)
            first = time.perf_counter() - start
            for _ in tokens:
                pass
        return first, time.perf_counter() - start, samples[0].ids

    if static:
        print('compiling ...', flush=True)
        static = compile_or_stay_eager(model, lambda: (draw(1), draw(num_samples)), **decoding_options(device))
        if not static:
            contexts.clear()
    draw(1), draw(num_samples)
    memory = None if baseline else peak_memory(device)
    source = torch.ones(parameters * width // 4, device=device)

    def read():
        """Seconds to read as many bytes as the matrices have."""
        start = time.perf_counter()
        source.sum().item()
        return time.perf_counter() - start

    runs, bandwidths, ids = {}, [], {}
    for n in range(-1, rounds):  # the first round warms up
        bandwidth = source.nbytes / statistics.median(read() for _ in range(5))
        for name, rival in rivals.items():
            for size in dict.fromkeys((1, num_samples)):
                first, total, ids[name, size] = rival(prompt, size) if rival else draw(size)
                if n >= 0:
                    runs.setdefault((name, size), []).append((first, total))
        if n < 0:
            continue
        bandwidths.append(bandwidth)
        print(
            f'round {n + 1}/{rounds}: '
            + ', '.join(
                f'{name + " " if name else ""}batch {size} {size * max_new_tokens / times[-1][1]:.1f} tokens/s'
                for (name, size), times in runs.items()
            )
            + f', memory {bandwidth / 1e9:.1f} GB/s',
            flush=True,
        )

    bandwidth = statistics.median(bandwidths)
    for (name, size), times in runs.items():
        first, total = (statistics.median(column) for column in zip(*times))
        rates = sorted(size * max_new_tokens / t for _, t in times)
        line = f'{name or "here"}, batch {size}: {size * max_new_tokens / total:.1f} tokens/s in all ({rates[0]:.1f} to {rates[-1]:.1f})'
        if name != 'transformers':
            after = size * (max_new_tokens - 1) / (total - first)
            line += f', {after:.1f} after the first, which comes after {1000 * first:.0f}ms ({prompt_tokens / first:,.0f} prompt tokens/s)'
        if not name:
            lengths = [
                n - window_start(n, block_size) for n in range(prompt_tokens + 1, prompt_tokens + max_new_tokens)
            ]
            width_kv = model_config.n_embd // model_config.n_head * model_config.kv_heads
            cached = (
                2 * model_config.n_layer * width_kv * dtype.itemsize * sum(lengths) / len(lengths)
            )  # bytes a text, on average
            limit = size * bandwidth / (parameters * width + size * cached)
            line += f', {100 * after / limit:.0f}% of the {limit:.1f} that memory allows'
        print(line)
    for size in dict.fromkeys((1, num_samples)):
        ours, theirs = (statistics.median(total for _, total in runs[name, size]) for name in ('', baseline))
        if baseline:
            print(
                f'batch {size}: {theirs / ours:.2f} times as fast as {baseline}, '
                f'{"the same tokens" if ids["", size] == ids[baseline, size] else "other tokens"}'
            )
    print(
        f'memory reads {bandwidth / 1e9:.1f} GB/s ({min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f})'
        + (f', peak memory {in_mib(memory)}' if memory else '')
    )


def make_rival(model, device, dtype):
    """A function (prompt, n) -> (seconds, seconds, ids) that draws n texts from the same weights in the way of the baseline."""
    if baseline == 'recompute':
        plain = copy.deepcopy(model).to(device)

        def draw(prompt, n):
            start, firsts = time.perf_counter(), []
            for _ in range(n):
                idx = torch.tensor([prompt], device=device)
                with torch.no_grad(), autocast(device, dtype):
                    for _ in range(max_new_tokens):
                        logits = plain.logits(
                            plain.hidden(idx[:, -block_size:])[:, -1]
                        )  # all of every layer, as nanoGPT does
                        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
                        firsts.append(time.perf_counter() - start)
            ids = idx[0, len(prompt) :].tolist()
            return firsts[0], time.perf_counter() - start, ids

        return draw
    hf_model = to_hugging_face(model).to(device, dtype)

    def draw_hf(prompt, n):
        start = time.perf_counter()
        idx = torch.tensor([prompt] * n, device=device)
        with torch.no_grad():
            out = hf_model.generate(
                idx,
                attention_mask=torch.ones_like(idx),
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ids = out[0, len(prompt) :].tolist()
        return math.nan, time.perf_counter() - start, ids

    return draw_hf


device = pick_device(device)
dtype = pick_dtype(dtype, device)
use_fast_float32(device)
if mode == 'train':
    keep_memory(device)
    by_onednn = use_onednn_products(device)
bench_training(device, dtype) if mode == 'train' else bench_decoding(device, dtype)
