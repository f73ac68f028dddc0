"""What acceptance.py computes on a device itself. Each probe runs in a process of its own, where a device that fails,
hangs or has no memory left can do no harm:

    python preflight/probes.py NAME ARGUMENTS RESULT     a function of PROBES, its keywords as JSON, a file

It prints what it is about to do, so that the last line tells where a probe hangs.
"""

import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch

if __name__ == '__main__':  # a child, started by this file's path; what it imports is in the folder above
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import model as model_file
from common.attention import attend
from common.device import (
    DTYPES,
    autocast,
    compile_or_stay_eager,
    peak_memory,
    pick_device,
    pick_dtype,
    seed_all,
    synchronize,
)
from common.dropout import Dropout
from common.errors import install_error_handling, one_line, say
from lora import add_lora, freeze_base
from model import ACTIVATIONS, GPT, NORMS, POSITIONS, GPTConfig
from optim import OPTIMIZERS, make_optimizer, training_step
from parallel import CHECKPOINTING, checkpoint_activations

SEED = 1337
STEPS = 20
BATCH_SIZE = 2
SHAPE = {
    'n_layer': 2,
    'n_head': 4,
    'n_embd': 64,
    'block_size': 32,
    'vocab_size': 29,
}  # of models whose losses are compared
TRAINING = {  # settings of make_optimizer, under which such a model learns within STEPS
    'learning_rate': 3e-3,
    'muon_learning_rate': 0.02,
    'muon_momentum': 0.95,
    'weight_decay': 0.1,
    'beta1': 0.9,
    'beta2': 0.95,
}


# --- data to learn from -----------------------------------------------------------------------------------------------

STRIDES, SHARES = (1, 2, 5), (0.7, 0.2, 0.1)
ENTROPY = -sum(p * math.log(p) for p in SHARES)  # nats per token, the lowest loss that a model can reach on chain()


def chain(n: int, n_ids: int, seed: int = 0) -> np.ndarray:
    """n ids below n_ids, int64, each a random stride after the one before: a text that is easy to learn, and whose
    entropy is known."""
    strides = np.random.default_rng(seed).choice(STRIDES, size=n, p=SHARES)
    return np.cumsum(strides) % n_ids


def batches(device, steps: int, batch_size: int, T: int, n_ids: int, documents: bool):
    """Batches of chain(), the same on every device: x and y, (B, T) each, and starts (B, T) with `documents`, which
    are about a third of a sequence long."""
    rng = np.random.default_rng(SEED)
    for step in range(steps):
        ids = torch.from_numpy(chain(batch_size * (T + 1), n_ids, seed=step)).view(batch_size, T + 1).to(device)
        batch = [ids[:, :-1].contiguous(), ids[:, 1:].contiguous()]
        if documents:
            begins = rng.random((batch_size, T)) < 3 / T
            batch.append(torch.from_numpy(np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)).to(device))
        yield batch


# --- the options of a model -------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One choice to train with, everything else as by default."""

    name: str
    fields: dict = {}  # of GPTConfig, beside SHAPE
    optimizer: str = 'adamw'
    kept: str = 'none'  # activation_checkpointing
    lora: bool = False
    documents: bool = False  # attention and positions stay within documents


CHOICES = {'mlp': tuple(ACTIVATIONS), 'pos': POSITIONS, 'norm': NORMS}
VALUES = {  # of fields that are not choices: values other than the default
    'n_kv_head': (1, 2),
    'head_size': (8, 32),
    'mlp_width': (96,),
    'norm_eps': (1e-3,),
    'rope_base': (100.0,),
    'rope_scaling': ('4,1,4,16',),
    'logit_softcap': (5.0,),
}
NEEDS = {
    'qkv_bias': {'bias': False},
    'qk_gain': {'qk_norm': True},
    'rope_base': {'pos': 'rope'},
    'rope_scaling': {'pos': 'rope'},
}
ELSEWHERE = (
    *SHAPE,
    'dropout',
)  # the shape of all; dropout, whose masks differ from device to device, is a probe itself
MODERN = {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'qk_norm': True, 'qk_gain': True, 'n_kv_head': 2}


def values_of(field: dataclasses.Field) -> tuple:
    """The values of a field of GPTConfig to train with, beside its default; none of a number that is not in VALUES."""
    values = (not field.default,) if type(field.default) is bool else CHOICES.get(field.name) or VALUES.get(field.name)
    return tuple(value for value in values or () if value != field.default)


def fields_left_out() -> list[str]:
    """Fields of GPTConfig, such as one that somebody has added, of which no value is known."""
    fields = dataclasses.fields(GPTConfig)
    return [field.name for field in fields if field.name not in ELSEWHERE and not values_of(field)]


def model_options() -> list[Option]:
    """Every value of every field of GPTConfig, and what else changes a model's training: one Option each."""
    options = [Option('the defaults'), Option('many at once', {**MODERN, 'bias': False, 'tie_weights': False})]
    for field in dataclasses.fields(GPTConfig):
        for value in values_of(field) if field.name not in ELSEWHERE else ():
            options.append(Option(f'{field.name}={value}', {**NEEDS.get(field.name, {}), field.name: value}))
    options += [Option(f'optimizer={name}', optimizer=name) for name in OPTIMIZERS if name != 'adamw']
    options += [Option(f'activation_checkpointing={kept}', kept=kept) for kept in CHECKPOINTING if kept != 'none']
    options += [Option('lora', lora=True)]
    options += [Option(f'documents, pos={pos}', {'pos': pos}, documents=True) for pos in POSITIONS]
    return options


def option_named(name: str) -> Option:
    """The Option of model_options() that is called this."""
    return next(option for option in model_options() if option.name == name)


def make_model(option: Option, device, shape=None, **fields) -> GPT:
    """A model with an option, in training mode, with the same random weights on every device. They are larger than
    usual: with GPT-2's, attention is nearly uniform at first, so that a wrong position or head would hardly show."""
    seed_all(SEED)
    model = GPT(GPTConfig(**{**SHAPE, **(shape or {}), **option.fields, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    if option.lora:
        add_lora(model, {'rank': 4, 'alpha': 32, 'targets': 'attn,mlp'})
        freeze_base(model)
    model.to(device).train()
    checkpoint_activations(model, option.kept)
    return model


def train(model, option: Option, device, dtype, steps: int = STEPS, batch_size: int = BATCH_SIZE) -> list[float]:
    """Train a model for a few steps -> their losses."""
    optimizer = make_optimizer(model, {**TRAINING, 'optimizer': option.optimizer}, dtype=dtype)
    # a lower first scale than torch's: a step skipped for its overflow would make all later losses late by one
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=dtype == torch.float16)
    config, losses = model.config, []
    shape = (batch_size, config.block_size, config.vocab_size)
    for step, batch in enumerate(batches(device, steps, *shape, option.documents)):
        seed_all(SEED, step)  # of dropout
        losses.append(training_step(model, batch, optimizer, scaler, device, dtype, grad_clip=1.0))
    return torch.stack(losses).tolist()


# --- probes -----------------------------------------------------------------------------------------------------------


def describe(device: str) -> dict:
    """The device of --device= and what drives it. UserError as pick_device.

    -> {'device', 'type', 'name', 'memory': bytes or None, 'dtype': what --dtype=auto is there, 'bfloat16': whether it
    has that, and versions}.
    """
    device = pick_device(device)
    machine = {'device': str(device), 'type': device.type, 'name': processor_name(), 'memory': None, 'driver': None}
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        machine.update(name=properties.name, memory=properties.total_memory, driver=driver_version())
        machine['capability'] = '{}.{}'.format(*torch.cuda.get_device_capability(device))
    machine['dtype'] = str(pick_dtype('auto', device)).removeprefix('torch.')
    machine['bfloat16'] = device.type != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
    versions = {'torch': torch.__version__, 'cuda': torch.version.cuda, 'python': platform.python_version()}
    return {**machine, **versions, 'system': platform.platform(), 'cores': os.cpu_count()}


def processor_name() -> str:
    """What the processor calls itself."""
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def driver_version() -> str:
    """The version of NVIDIA's driver; 'unknown' without nvidia-smi."""
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    if not shutil.which(command[0]):
        return 'unknown'
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return one_line(result.stdout.partition('\n')[0]) or 'unknown'


def losses(device: str, dtype: str, float32: str = '') -> dict:
    """The losses of every option -> {option: {'losses': [...], 'expected': [...]}, or {'error': one line}}.

    float32 is compared with the CPU in float64, and computed without TF32; a lower precision with float32 on the same
    device. Activation checkpointing is compared with none.
    float32: a file with what this returned for float32, if it exists, so that those need not be computed again.
    """
    device, results, known = pick_device(device), {}, {}
    if float32 and os.path.exists(float32):
        with open(float32, encoding='utf-8') as file:
            known = {name: result['losses'] for name, result in json.load(file).items() if 'losses' in result}
    torch.set_float32_matmul_precision('highest')
    for option in model_options():
        say(f'{option.name} in {dtype}')
        plain = option._replace(kept='none')
        try:
            if dtype == 'float32':
                cpu = torch.device('cpu')
                expected = train(make_model(plain, cpu).double(), plain, cpu, torch.float32)
            else:
                expected = known.get(option.name) or train(make_model(plain, device), plain, device, torch.float32)
            got = train(make_model(option, device), option, device, DTYPES[dtype])
            results[option.name] = {'losses': got, 'expected': expected}
        except Exception as error:  # the other options may work
            results[option.name] = {'error': one_line(f'{type(error).__name__}: {error}', 200)}
    return results


def dropout(device: str, dtype: str) -> dict:
    """Dropout by its statistics, as its masks differ from device to device, and whether a seed makes it repeatable.

    -> {'means': [{'of': what, 'mean', 'expected', 'sigma': standard deviation of the mean}], 'scale': largest error of
    a factor that is not 0, 'losses', 'repeated': losses of the same seeds}.
    """
    device, dtype = pick_device(device), DTYPES[dtype]
    result = {'means': [], 'scale': 0.0}
    seed_all(SEED)
    for p in (0.1, 0.5):
        say(f'dropout of {p}')
        n, rows, T = 2**20, 32, 128
        y = Dropout(p).train()(torch.ones(n, device=device))
        dropped, sigma = (y == 0).cpu().double().mean().item(), math.sqrt(p * (1 - p) / n)
        result['means'].append({'of': f'dropout of {p}', 'mean': dropped, 'expected': p, 'sigma': sigma})
        result['scale'] = max(result['scale'], (y[y != 0] - 1 / (1 - p)).abs().max().item())
        # With keys of 0 the query at t weighs t + 1 values equally. Of values of 1 it returns the mean of their masks.
        zeros = torch.zeros(rows, 4, T, 32, device=device, dtype=dtype)
        late = attend(zeros, zeros, torch.ones_like(zeros), None, p)[..., T // 2 :, 0].cpu().double()
        variance = sum(p / (1 - p) / (t + 1) for t in range(T // 2, T)) / (T // 2)  # of one query's, on average
        sigma = math.sqrt(variance / late.numel())
        result['means'].append({'of': f'attention with {p}', 'mean': late.mean().item(), 'expected': 1, 'sigma': sigma})
    option = Option('dropout=0.2', {'dropout': 0.2})
    for key in ('losses', 'repeated'):
        say(f'{option.name}: {key}')
        result[key] = train(make_model(option, device), option, device, dtype)
    return result


def compiled(device: str, dtype: str) -> dict:
    """Losses of compiled models and of the same as written -> {name: {'losses': [...], 'expected': [...]}}.

    The second has everything that compiles to kernels of its own, among them flex attention, on CUDA. UserError if
    torch cannot compile here.
    """
    device, dtype, results = pick_device(device), DTYPES[dtype], {}
    shape = {'block_size': 256, 'n_embd': 128, 'vocab_size': 64}
    for option in (Option('the defaults'), Option('many at once, documents', MODERN, documents=True)):
        say(f'compiling: {option.name}')
        expected = train(make_model(option, device, shape), option, device, dtype)
        model = make_model(option, device, shape)
        batch = next(batches(device, 1, BATCH_SIZE, 256, 64, option.documents))

        def try_once(model=model, batch=batch):
            with autocast(device, dtype):
                model(*batch, with_logits=False)[1].backward()

        worked = compile_or_stay_eager([model], try_once, device, must=True)
        model.zero_grad(set_to_none=True)
        if worked:  # torch 2.6 on a CPU: not to be trusted
            results[option.name] = {'losses': train(model, option, device, dtype), 'expected': expected}
    return results


def chunked(device: str, rows: int, width: int, vocab_size: int) -> dict:
    """The loss computed in chunks and whole, of the same batch -> {'chunked', 'whole'}, each {'loss', 'gradient': its
    norm, 'peak': bytes or None}, and 'difference': norm of the gradients' difference.

    rows: targets of the batch. In float32. Only CUDA tells a peak of its own for each.
    """
    device = pick_device(device)
    torch.set_float32_matmul_precision('highest')
    model = make_model(Option('one layer'), device, n_layer=1, n_embd=width, vocab_size=vocab_size)
    x, y = next(batches(device, 1, rows // model.config.block_size, model.config.block_size, vocab_size, False))
    y[0, :5] = -1  # no targets
    result, gradients = {}, {}
    limit, model_file.MAX_LOGITS = model_file.MAX_LOGITS, rows * vocab_size // 5 - 1  # six chunks, the last one short
    try:
        for name in ('chunked', 'whole'):
            say(f'the loss, {name}')
            model.zero_grad(set_to_none=True)
            if device.type == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            loss = model(x, y, with_logits=name == 'whole')[1]
            loss.backward()
            synchronize(device)
            gradients[name] = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
            peak = peak_memory(device) if device.type == 'cuda' else None
            result[name] = {'loss': loss.item(), 'gradient': gradients[name].norm().item(), 'peak': peak}
            del loss
    finally:
        model_file.MAX_LOGITS = limit
    return {**result, 'difference': (gradients['chunked'] - gradients['whole']).norm().item()}


PROBES = {probe.__name__: probe for probe in (describe, losses, dropout, compiled, chunked)}


if __name__ == '__main__':
    install_error_handling()
    name, arguments, path = sys.argv[1:]
    result = PROBES[name](**json.loads(arguments))
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(result, file)
