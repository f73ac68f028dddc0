"""Time a training step, or text generation; or check all that a new device must do.

python bench.py                                          a step of GPT-2 124M, block 1024, batch 12, and its parts
python bench.py --profile=True                           also the most expensive operators, and a trace to look at
python bench.py --baseline=eager                         also, taking turns, the plain step: not compiled, no oneDNN
python bench.py config/train_shakespeare_char.py         a step of a recipe's model, of one micro-batch
python bench.py --mode=decode                            tokens per second of GPT-2 124M, one sample and ten at once
python bench.py --mode=decode --baseline=transformers    also, taking turns, Hugging Face's generate()
python bench.py --mode=decode --quantize=int8            with 8-bit weights; int4: 4-bit
python bench.py --mode=decode --init_from=gpt2 --prompt_tokens=900    of a model as in sample.py, after a long prompt
python bench.py --mode=accept                            losses, resuming, speed, memory: in 9 minutes, as a table
"""

import copy
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch

from common.cpu import pack, torch_products, use_onednn_products
from common.device import (
    autocast,
    compile_or_stay_eager,
    decoding_options,
    peak_flops,
    peak_memory,
    seed_all,
    set_up_device,
    synchronize,
)
from common.distributed import Ranks
from common.errors import NO_MEMORY, UserError, user_errors, warn
from common.replay import OwnWork, record_calls
from configurator import configure, require
from dataloader import DataSet, TrainBatches, dataset_name
from formats.huggingface import to_hugging_face
from generation import Context, Sample, Sampling, generate, window_start
from loading import model_vocab_size, open_model
from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig
from optim import OPTIMIZERS, clip_gradients, make_optimizer, step_unless, training_step
from parallel import CHECKPOINTING, checkpoint_activations
from preflight.acceptance import accept

PATHS = ('trace_file', 'json_file', 'init_from', 'report_dir')  # settings that are paths

mode = 'train'  # 'train': a training step; 'decode': generating text; 'accept': checks of a device
batch_size = 12  # sequences in a step
bias = False  # biases in linear and normalization layers
optimizer = 'adamw'  # 'adamw', 'muon'
activation_checkpointing = 'none'  # 'selective', 'full': see train.py
real_data = True  # train on the data set's tokens, if it is prepared; False: on random ids
dataset = 'openwebtext'  # folder below data/
warmup_steps = 3  # steps before the clock starts
steps = 20  # steps to time
max_seconds = 60.0  # stop timing after this time; at least one step is timed
breakdown = True  # also time each kind of work alone: products, attention, norms, loss, optimizer, as long again
profile = False  # also profile a few steps: print the most expensive operators, write a trace
trace_file = 'trace.json'  # the profile's trace, for ui.perfetto.dev or chrome://tracing
json_file = ''  # also write the figures to this file, as one JSON object
seed = 1337  # of weights and data
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best available
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = 'auto'  # compile the step: True, False; 'auto': a training step on CUDA
init_from = ''  # decode: a run or a pretrained model, as in sample.py; '': random weights
num_samples = 10  # decode: samples in the larger batch
prompt_tokens = 64  # decode: length of the prompt
max_new_tokens = 100  # decode: tokens to generate for each sample
rounds = 5  # decode: times to measure everything, taking turns
quantize = ''  # decode: 'int8', 'int4': weights of so many bits on a CPU
baseline = ''  # also time; train: 'eager', the plain step; decode: 'transformers', or 'recompute', without a cache
minutes = 8.5  # accept: for all checks together; what does not fit is left out
checks = ''  # accept: only these, such as 'resume,decoding'; '': all
report_dir = 'out-accept'  # accept: folder for accept.json and accept.md
config = configure(globals(), fields=GPTConfig, recipe='train.py', paths=PATHS)

baselines = {'train': ('eager',), 'decode': ('transformers', 'recompute'), 'accept': ()}
modes = 'train, decode or accept; tools/compare.py times whole runs to a loss'
require(config, 'mode', modes, lambda v: v in baselines)
require(config, 'baseline', ' or '.join(baselines[mode]), lambda v: v in ('', *baselines[mode]))
require(config, 'activation_checkpointing', ' or '.join(CHECKPOINTING), lambda v: v in CHECKPOINTING)
require(config, 'compile', 'True, False or auto', lambda v: v in ('True', 'False', 'auto'))
require(config, 'minutes', 'above 0', lambda v: 0 < v < math.inf)
if mode == 'accept':
    unused = min(config.given - {'mode', 'device', 'compile', 'minutes', 'checks', 'report_dir'}, default='')
    if unused:
        raise UserError(f'--{unused}={config[unused]}: has no meaning with --mode=accept; leave it out')
    sys.exit(accept(device, compile, minutes, report_dir, checks))
require(config, 'optimizer', ' or '.join(OPTIMIZERS), lambda v: v in OPTIMIZERS)
require(config, 'batch_size block_size steps rounds', 'at least 1', lambda v: v >= 1)
require(config, 'vocab_size', 'from 1 to 2,147,483,647', lambda v: 1 <= v < 2**31)
require(config, 'num_samples', 'from 1 to 65536', lambda v: 1 <= v <= 65536)
require(config, 'prompt_tokens', 'from 1 to 10,000,000', lambda v: 1 <= v <= 10**7)
require(config, 'max_new_tokens', 'from 2 to 10,000,000', lambda v: 2 <= v <= 10**7)
require(config, 'warmup_steps max_seconds seed', '0 or more', lambda v: 0 <= v < math.inf)
unused = 'profile' if mode == 'decode' else 'quantize'
if config[unused]:
    raise UserError(f'--{unused}={config[unused]}: has no meaning with --mode={mode}')
named = init_from not in ('', 'scratch', 'resume', 'auto')  # in a recipe: what it trains on from
if mode == 'train' and named and 'n_layer' not in config.given:
    raise UserError(
        f'the recipe starts from {init_from}, so it does not give the shape of its model: '
        'give it by --n_layer=, --n_head= and --n_embd='
    )

data_dir = os.path.join('data', dataset_name(dataset))
prepared = any(os.path.exists(os.path.join(data_dir, name)) for name in ('train.bin', 'train_000.bin'))
data = DataSet(dataset) if real_data and prepared else None
if data and 'vocab_size' not in config.given:  # as train.py would set it for this data
    config['vocab_size'] = model_vocab_size(data.tokenizer, data.vocab_size, config.recipe['vocab_multiple'])
fields = {field.name: config[field.name] for field in dataclasses.fields(GPTConfig) if field.name in config}
with user_errors(ValueError):
    model_config = GPTConfig(**fields)
pretrained = None
if mode == 'decode' and init_from not in ('', 'scratch', 'auto'):
    pretrained = open_model(init_from, config.recipe['out_dir'], 'ckpt.pt')[0]
    model_config = pretrained.config
if baseline == 'transformers' and prompt_tokens + max_new_tokens > model_config.block_size:
    raise UserError(
        f'--baseline=transformers: {prompt_tokens} + {max_new_tokens} tokens do not fit into '
        f'block_size={model_config.block_size}'
    )
block_size, vocab_size = model_config.block_size, model_config.vocab_size
device, dtype = set_up_device(device, dtype)
dtype_name = str(dtype).removeprefix('torch.')
figures = {'device': str(device), 'dtype': dtype_name}  # what --json_file= gets


def prefix(name):
    """What starts a line about a contender: the baseline's name and a space; nothing for our own."""
    return f'{name} ' if name else ''


def in_mib(n_bytes):
    """Bytes, or None if unknown -> text."""
    return 'unknown' if n_bytes is None else f'{n_bytes / 2**20:,.0f} MiB'


def require_writable(key):
    """UserError, before the time is spent, if the file of this setting cannot be written."""
    with user_errors(OSError, where=f'cannot write --{key}={config[key]}: '), open(config[key], 'a'):
        pass


# --- a training step --------------------------------------------------------------------------------------------------
KINDS = {  # what a module computes itself; any other goes by the name of its class
    torch.nn.Linear: 'linear layers',
    torch.nn.Embedding: 'embeddings',
    torch.nn.LayerNorm: 'norms',
    torch.nn.RMSNorm: 'norms',
    torch.nn.Dropout: 'dropout',
    CausalSelfAttention: 'attention',
    MLP: 'activation',
    Block: 'residual sums',
}


def bench_training():
    """Time training steps and print their median, and what they are made of; profile a few if asked to."""
    onednn = use_onednn_products(device, block_size)
    if profile:
        require_writable('trace_file')
    model, opt, step = make_step(compile == 'True' or compile == 'auto' and device.type == 'cuda')
    figures.update(parameters=model.num_params(), batch_size=batch_size, block_size=block_size, losses=[])
    figures['compiled'] = model._compiled_call_impl is not None
    contenders = {'': (step, nullcontext)}  # name -> step, and the context to run it in
    if baseline:
        with torch_products():
            contenders[baseline] = make_step(compiled=False)[-1], torch_products
    next_batch = make_batches()

    for n in range(warmup_steps):
        for name, contender in contenders.items():
            loss, _ = time_step(*contender, next_batch)
            print(f'warm-up {n + 1}/{warmup_steps}: {prefix(name)}loss {loss:.4f}', flush=True)
    times = {name: [] for name in contenders}  # seconds
    for n in range(steps):
        if n and sum(map(sum, times.values())) >= max_seconds:
            break
        for name, contender in contenders.items():
            loss, seconds = time_step(*contender, next_batch)
            times[name].append(seconds)
            if not name:
                figures['losses'].append(loss)
            print(f'{n + 1}/{steps}: {prefix(name)}loss {loss:.4f}, time {1000 * seconds:.2f}ms', flush=True)

    peak = report_training(times, model.flops_per_token() * batch_size * block_size, contenders, onednn)
    if breakdown:
        try:
            report_parts(model, opt, step, next_batch, peak)
        except RuntimeError as error:  # it keeps the activations of one step while others run
            if not NO_MEMORY.search(str(error)):
                raise
            warn('the memory does not suffice for the parts of a step; --breakdown=False leaves them out')
    if profile:
        write_profile(lambda: step(next_batch()))


def make_step(compiled):
    """A new model's training step -> the model, its optimizer, and a function from a batch (x, y) to its loss, a float,
    that makes one step."""
    seed_all(seed)
    model = GPT(model_config).to(device).train()
    checkpoint_activations(model, activation_checkpointing)
    opt = make_optimizer(model, {**config.recipe, **config}, dtype=dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(batch):
        return training_step(model, batch, opt, scaler, device, dtype, config.recipe['grad_clip']).item()

    shape = f'batch {batch_size} x {block_size}'
    print(f'{model.num_params():,} parameters, {shape}, {device.type}, {dtype_name}', flush=True)
    if compiled:
        start = time.perf_counter()
        batch = torch.zeros(2, batch_size, block_size, dtype=torch.long, device=device)
        compile_or_stay_eager([model], lambda: step(batch), device)
        figures['compile_seconds'] = time.perf_counter() - start
        print(f'compiled in {figures["compile_seconds"]:.1f}s', flush=True)
    return model, opt, step


def make_batches():
    """A function that returns the next batch, x and y, (B, T) each: of the data set, or always the same random ids."""
    if data:
        tokens = data.tokens('train', vocab_size)
        batches = TrainBatches(tokens, block_size, batch_size, 1, seed, 'random', Ranks(), device)
        return lambda: batches.next()[:2]
    if real_data:
        print(f'{data_dir} is not prepared, timing on random ids')
    x, y = torch.randint(vocab_size, (2, batch_size, block_size), device=device)
    return lambda: (x, y)


def time_step(step, products, next_batch):
    """One training step on the next batch, in the context products() -> (its loss, seconds)."""
    with products():
        return timed(lambda: step(next_batch()))


def timed(work):
    """Call work() -> (what it returned, seconds until the device had finished it)."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start


def report_training(times, flops, contenders, onednn):
    """Print what the steps took -> the peak FLOP/s that our own is compared with, None if unknown.

    times: {contender: seconds of each step}
    flops: of one step
    contenders: {contender: (step, products)}
    onednn: whether oneDNN computes our float32 products
    """
    peaks = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        with contenders[name][1]():
            peaks[name] = product_flops() if device.type == 'cpu' else peak_flops(device, dtype)
        library = 'oneDNN' if onednn and not name else 'torch'
        source = f"of {library}'s product of 2048 x 2048" if device.type == 'cpu' else 'by the data sheet'
        print(
            f'{prefix(name)}time per step: median {1000 * median:.2f}ms, '
            f'from {1000 * min(seconds):.2f} to {1000 * max(seconds):.2f} over {len(seconds)} steps'
        )
        print(
            f'{batch_size * block_size / median:,.0f} tokens/s, {flops / median / 1e12:.3f} TFLOP/s, '
            f'{share_of(peaks[name], flops / median, source)}, '
            f'peak memory {in_mib(peak_memory(device))}{" of both" if baseline else ""}'
        )
    median = statistics.median(times[''])
    figures.update(seconds_per_step=median, tokens_per_s=batch_size * block_size / median, flops_per_s=flops / median)
    figures['share_of_peak'] = flops / median / peaks[''] if peaks[''] else None
    figures['peak_memory'] = peak_memory(device)
    if baseline:
        ratios = sorted(a / b for a, b in zip(times[''], times[baseline]))
        figures['time_over_baseline'] = statistics.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        middle = f'the middle half of the pairs: {low:.2f} to {high:.2f}'
        print(f'{figures["time_over_baseline"]:.2f} of the time of {baseline} ({middle})')
    return peaks['']


def share_of(peak, flops, source=''):
    """'57.1% of peak (0.455 TFLOP/s …)' for FLOP/s and the peak, which may be None."""
    if not peak:
        return 'share of peak unknown'
    return f'{100 * flops / peak:.1f}% of peak' + (f' ({peak / 1e12:.3f} TFLOP/s {source})' if source else '')


def product_flops():
    """FLOP/s of the product of two large matrices, in the run's dtype or in float32, which is faster on a CPU without
    instructions for the other: the best of half a second each."""
    fastest = math.inf
    for product_dtype in {dtype, torch.float32}:
        a, b = torch.randn(2, 2048, 2048, device=device, dtype=product_dtype)
        spent = 0.0
        while spent < 0.5:
            _, seconds = timed(partial(torch.matmul, a, b))
            spent, fastest = spent + seconds, min(fastest, seconds)
    return 2 * 2048**3 / fastest


def parts_of_step(model, opt, batch):
    """The work of a step by kind -> {kind: function that does all of it once}, {kind: its FLOPs in matrix products}.

    Call them while the parameters have gradients.
    """
    x, y = batch
    precision = partial(autocast, device, dtype)
    with precision():
        calls = record_calls(model, lambda: model.forward(x, y, with_logits=False))  # as written: not compiled
    kinds, flops = {}, {}
    for call in calls:
        known = (kind for cls, kind in KINDS.items() if isinstance(call.module, cls))
        kind = 'head' if call.module is model.lm_head else next(known, type(call.module).__name__)
        kinds.setdefault(kind, []).append(call)
        if isinstance(call.module, torch.nn.Linear):  # forward, and the gradients of input and weight
            flops[kind] = flops.get(kind, 0) + 6 * call.args[0].numel() * call.module.out_features
    shapes = [call.args[0].shape for call in kinds['head']]  # (..., C); several if the loss is computed in chunks
    logits = {shape: torch.randn(*shape[:-1], vocab_size, device=device, dtype=dtype) for shape in shapes}

    def loss():
        for shape in shapes:
            leaf = logits[shape].requires_grad_()
            with precision():
                value = model.summed_loss(leaf, y.flatten()[: shape[:-1].numel()])
            torch.autograd.grad(value, leaf)

    parameters, never = list(model.parameters()), torch.zeros((), dtype=torch.bool, device=device)
    parts = {kind: OwnWork(calls, precision) for kind, calls in kinds.items()}
    parts['loss'] = loss
    parts['clipping'] = lambda: clip_gradients(parameters, config.recipe['grad_clip'])
    parts['optimizer'] = lambda: step_unless(never, opt)
    return parts, flops


def report_parts(model, opt, step, next_batch, peak):
    """Time each kind of work alone, in turns with whole steps, and print its share of them. peak: FLOP/s or None."""
    parts, flops = parts_of_step(model, opt, next_batch())
    gradients = [(parameter, torch.randn_like(parameter)) for parameter in model.parameters()]
    times = {kind: [] for kind in ('step', *parts)}  # seconds
    for n in range(1 + steps):
        if n > 1 and sum(map(sum, times.values())) >= max_seconds:
            break
        opt.zero_grad()
        times['step'].append(timed(lambda: step(next_batch()))[1])
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for kind, work in parts.items():
            times[kind].append(timed(work)[1])

    medians = {kind: statistics.median(seconds[1:]) for kind, seconds in times.items()}  # the first round warms up
    whole = medians.pop('step')
    print(
        f'parts of a step of {1000 * whole:.2f}ms: each kind of work done alone, forward and backward, as model.py has '
        f'it, in turns with whole steps (medians of {len(times["step"]) - 1})'
    )
    medians = dict(sorted(medians.items(), key=lambda item: -item[1]))
    medians['everything else, such as the host'] = whole - sum(medians.values())
    for kind, median in medians.items():
        rate = flops.get(kind, 0) / median
        speed = f', {rate / 1e9:,.0f} GFLOP/s, {share_of(peak, rate)}' if rate else ''
        print(f'  {kind:<34}{1000 * median:>10.2f}ms {100 * median / whole:>6.1f}%{speed}')
    if model._compiled_call_impl:
        print('  compiled, the step fuses kinds of work: what that saves lowers everything else, even below 0')


def write_profile(step):
    """Profile three calls of step(): print the most expensive operators, write the trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(3):
            step()
    column = f'self_{"device" if device.type == "cuda" else "cpu"}_time_total'
    print(profiler.key_averages().table(sort_by=column, row_limit=15, max_name_column_width=50))
    profiler.export_chrome_trace(trace_file)
    print(f'wrote {trace_file}, for ui.perfetto.dev or chrome://tracing')


# --- text generation --------------------------------------------------------------------------------------------------
batch_sizes = tuple(dict.fromkeys((1, num_samples)))


class Decoded(NamedTuple):
    """One batch that was generated."""

    first: float  # seconds to the first token, nan if unknown
    total: float  # seconds in all
    ids: list  # the new tokens of the first sample


def bench_decoding():
    """Time one sample and num_samples at once, taking turns with the baseline and with plain reading of memory.

    Weights are random unless --init_from= names some, all samples have the same random prompt, and each token is the
    most likely one.
    """
    seed_all(seed)
    model = (pretrained or GPT(model_config)).eval()
    prompt = torch.randint(vocab_size, (prompt_tokens,)).tolist()
    n_parameters = model.num_params()  # before packing replaces them
    matrices = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    make_rival = {'': None, 'recompute': make_recomputing_decoder, 'transformers': make_hugging_face_decoder}[baseline]
    rivals = {baseline: make_rival(model, prompt)} if baseline else {}  # made first: packing cannot be undone
    model.to(device)
    compiled = compile == 'True'
    if quantize or not (compiled and device.type == 'cpu'):  # as in sample.py
        pack(model, device, dtype, quantize)
        bytes_per_weight = {'int8': 1, 'int4': 5 / 8}.get(quantize, dtype.itemsize)  # int4: with its scales
    else:
        bytes_per_weight = 4
    print(
        f'{matrices:,} parameters in matrices of {bytes_per_weight} bytes each, prompt {prompt_tokens}, '
        f'{max_new_tokens} new tokens, {device.type}, {quantize or dtype_name}',
        flush=True,
    )
    contenders = {'': make_decoder(model, prompt, compiled), **rivals}
    for n in batch_sizes:
        contenders[''](n)  # allocates what peak_memory reports
    memory = None if baseline else peak_memory(device)
    figures.update(parameters=n_parameters, peak_memory=memory)
    source = torch.ones(int(matrices * bytes_per_weight) // 4, device=device)  # as many bytes as the matrices have
    decode_in_turns(contenders, source)  # warm-up
    results, bandwidths = {}, []
    for n in range(rounds):
        bandwidth, decoded = decode_in_turns(contenders, source)
        bandwidths.append(bandwidth)
        for key, result in decoded.items():
            results.setdefault(key, []).append(result)
        rates = ', '.join(
            f'{prefix(name)}batch {size} {size * max_new_tokens / result.total:.1f} tokens/s'
            for (name, size), result in decoded.items()
        )
        print(f'round {n + 1}/{rounds}: {rates}, memory {bandwidth / 1e9:.1f} GB/s', flush=True)

    report_decoding(results, source.nbytes, statistics.median(bandwidths))
    low, middle, high = (f(bandwidths) / 1e9 for f in (min, statistics.median, max))
    peak = f', peak memory {in_mib(memory)}' if memory else ''
    tokens = min(prompt_tokens + max_new_tokens, block_size)
    cache = in_mib(cache_bytes_per_token() * tokens)
    print(f'memory reads {middle:.1f} GB/s ({low:.1f} to {high:.1f}), cache of {tokens} tokens {cache}{peak}')


def make_decoder(model, prompt, compiled):
    """Our own generate() -> a function (number of samples) -> Decoded."""
    contexts = {}  # by batch size: a compiled model reads the same addresses in every round

    def decode(n, static):
        start = time.perf_counter()
        samples = [Sample(prompt, (seed, i)) for i in range(n)]
        with autocast(device, dtype):
            if static and n not in contexts:
                contexts[n] = Context(model, n, block_size, static=True)
            context = contexts[n] if static else None
            if static:
                context.forget()
            tokens = generate(model, samples, max_new_tokens, Sampling(temperature=0), context=context, static=static)
            next(tokens)
            first = time.perf_counter() - start
            for _ in tokens:
                pass
        return Decoded(first, time.perf_counter() - start, samples[0].ids)

    if compiled:
        print('compiling ...', flush=True)
        options = decoding_options(device)

        def trial():
            for n in batch_sizes:
                decode(n, static=True)

        compiled = compile_or_stay_eager([model], trial, device, **options)
        figures['compiled'] = compiled
        if not compiled:
            contexts.clear()
    return lambda n: decode(n, static=compiled)


def make_recomputing_decoder(model, prompt):
    """nanoGPT's way, without a cache and one sample after the other -> a function (number of samples) -> Decoded."""
    model = copy.deepcopy(model).to(device)

    @torch.no_grad()
    def decode(n):
        start, first = time.perf_counter(), None
        with autocast(device, dtype):
            for _ in range(n):
                idx = torch.tensor([prompt], device=device)
                for _ in range(max_new_tokens):
                    logits = model.logits(model.hidden(idx[:, -block_size:])[:, -1])
                    idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
                    first = first or time.perf_counter() - start
        ids = idx[0, len(prompt) :].tolist()
        return Decoded(first, time.perf_counter() - start, ids)

    return decode


def make_hugging_face_decoder(model, prompt):
    """Hugging Face's generate() with the same weights -> a function (number of samples) -> Decoded."""
    model = to_hugging_face(model).to(device, dtype)

    @torch.no_grad()
    def decode(n):
        start = time.perf_counter()
        idx = torch.tensor([prompt] * n, device=device)
        lengths = dict(max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
        out = model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0, **lengths)
        ids = out[0, len(prompt) :].tolist()
        return Decoded(math.nan, time.perf_counter() - start, ids)

    return decode


def decode_in_turns(contenders, source):
    """One round of everything -> (bytes per second that the memory reads, {(contender, batch size): Decoded})."""
    bandwidth = source.nbytes / statistics.median(seconds_to_read(source) for _ in range(5))
    return bandwidth, {(name, n): decode(n) for name, decode in contenders.items() for n in batch_sizes}


def seconds_to_read(tensor):
    """Seconds to read a tensor once."""
    start = time.perf_counter()
    tensor.sum().item()
    return time.perf_counter() - start


def report_decoding(results, matrix_bytes, bandwidth):
    """Print what generation took.

    results: {(contender, batch size): [Decoded]}
    matrix_bytes: size of the model's matrices
    bandwidth: bytes per second that the memory reads
    """
    for (name, n), decoded in results.items():
        first = statistics.median(result.first for result in decoded)
        total = statistics.median(result.total for result in decoded)
        rates = [n * max_new_tokens / result.total for result in decoded]
        if not name:
            figures[f'batch_{n}'] = {
                'tokens_per_s': n * max_new_tokens / total,
                'first_s': first,
                'ids': decoded[-1].ids,
            }
        line = f'{name or "here"}, batch {n}: {n * max_new_tokens / total:.1f} tokens/s'
        line += f' ({min(rates):.1f} to {max(rates):.1f})'
        if not math.isnan(first):
            rate = n * (max_new_tokens - 1) / (total - first)
            line += f'; first after {1000 * first:.0f}ms ({prompt_tokens / first:,.0f} prompt tokens/s)'
            line += f', then {rate:.1f} tokens/s, {1000 * n / rate:.1f}ms per step'
        if not name:
            limit = memory_bound(n, matrix_bytes, bandwidth)
            line += f', {100 * rate / limit:.0f}% of the {limit:.1f} that memory allows'
        print(line)
    for n in batch_sizes if baseline else ():
        ours, theirs = results['', n], results[baseline, n]
        ratio = statistics.median(r.total for r in theirs) / statistics.median(r.total for r in ours)
        same = 'the same tokens' if ours[-1].ids == theirs[-1].ids else 'other tokens'
        print(f'batch {n}: {ratio:.2f} times as fast as {baseline}, {same}')


def memory_bound(n, matrix_bytes, bandwidth):
    """Tokens per second of n samples if nothing but reading memory took time.

    A step of decoding reads every matrix once, and the cached keys and values of every sample.
    """
    totals = range(prompt_tokens + 1, prompt_tokens + max_new_tokens)
    cached_tokens = statistics.fmean(total - window_start(total, block_size) for total in totals)
    return n * bandwidth / (matrix_bytes + n * cached_tokens * cache_bytes_per_token())


def cache_bytes_per_token():
    """Size of the keys and values of one token."""
    return 2 * model_config.n_layer * model_config.head_dim * model_config.kv_heads * dtype.itemsize


if json_file:
    require_writable('json_file')
if mode == 'train':
    bench_training()
else:
    bench_decoding()
if json_file:
    with user_errors(OSError, where=f'cannot write --json_file={json_file}: '), open(json_file, 'w') as file:
        json.dump(figures, file)
