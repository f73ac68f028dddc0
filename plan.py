"""Before the run: will it fit, how long will it take, what does it cost? On any machine, in seconds, without a GPU.

python plan.py config/train_gpt2.py --on=h100 --devices=8                    the very recipe, all of train.py's settings
python plan.py config/train_gpt2.py --on=a100-40 --devices=8 --price=1.5 --hours=24     money; how far a day gets
python plan.py config/train_gpt2.py --on=4090 --n_layer=24 --plot=plan.png    memory against batch, time against devices
python plan.py config/train_gpt2.py --peak_tflops=200 --memory_gb=24 --bandwidth=900    a card that is not in the table
python plan.py config/quickstart.py --measure=True      measure this machine, which then plans by its own machine.json

Memory is counted operation by operation; time is estimated. docs/planning.md compares both with what was measured.
"""

import dataclasses
import json
import math
import os

import torch

from common.device import DTYPES, set_up_device
from common.distributed import end, find_ranks, join_ranks
from common.errors import UserError, say, user_errors
from common.figure import new_figure, save_figure
from common.machines import card, own_card, read_machine, write_machine
from configurator import configure, require
from dataloader import DataSet, check_global_batch, dataset_name
from loading import SHAPE, model_vocab_size, open_model
from lora import check_lora
from model import GPTConfig
from optim import check_optimizer
from parallel import CHECKPOINTING, PARALLEL
from preflight.planning import (
    MAX_BATCH,
    PARTS,
    Split,
    StepCounter,
    alternatives,
    available,
    largest_planned_batch,
    make_plan,
    peak_memory,
)

on = ''  # a card such as 'h100' or 'a100-40', or a machine file; '': machine.json, or the GPU here
devices = 1  # how many of them
price = 0.0  # of one of them per hour, in any currency; 0: unknown
hours = 0.0  # say how far the run gets in so many hours; 0: to the end
peak_tflops = 0.0  # of a card that is not in the table: dense TFLOP/s in bfloat16
memory_gb = 0.0  # its memory in GB
bandwidth = 0.0  # its memory's bandwidth in GB/s
train_tokens = 0  # tokens of the training split, if the data is not prepared here; 0: unknown
measure = False  # measure this machine for half a minute, and write machine.json, before planning
machine_file = 'machine.json'  # where to write it
json_output = False  # print one JSON object and nothing else
plot = ''  # PNG file: memory against batch size, time against devices
config = configure(globals(), fields=GPTConfig, recipe='train.py', recipe_flags=True, paths=('on', 'machine_file'))
settings = config.recipe  # those of train.py

require(config, 'devices', 'at least 1', lambda v: v >= 1)
require(config, 'price hours peak_tflops memory_gb bandwidth train_tokens', '0 or more', lambda v: 0 <= v < math.inf)
require(settings, 'batch_size gradient_accumulation_steps eval_interval keep_saves', 'at least 1', lambda v: v >= 1)
require(settings, 'eval_iters', '0 or more', lambda v: v >= 0)
require(settings, 'dropout', 'in [0, 1)', lambda v: 0 <= v < 1)
check_optimizer(settings)
check_lora(settings)
if plot:
    if not plot.endswith('.png'):
        raise UserError(f'--plot={plot}: must end in .png')
    new_figure('', '')  # fails now if matplotlib is missing

LONGEST_TRIAL = 30  # seconds of a step, when --measure=True looks for the largest batch


# --- what is planned --------------------------------------------------------------------------------------------------


def planned_machine():
    """The machine to plan for -> a Machine. UserError if none is named, and none is known here."""
    if peak_tflops or memory_gb or bandwidth:
        return own_card(peak_tflops, memory_gb, bandwidth)
    if on.endswith('.json'):
        return read_machine(on)
    if on:
        return card(on)
    if os.path.exists(machine_file):
        return read_machine(machine_file)
    if torch.cuda.is_available():
        return card(torch.cuda.get_device_name())
    raise UserError('--on=: name a card, such as --on=h100, or measure this machine once: --measure=True')


def planned_model():
    """The model that train.py would make -> GPTConfig, the data set or None, where the vocabulary's size is from."""
    folder = os.path.join('data', dataset_name(settings['dataset']))
    prepared = any(os.path.exists(os.path.join(folder, name)) for name in ('train.bin', 'train_000.bin'))
    data = DataSet(settings['dataset']) if prepared else None
    if settings['init_from'] not in ('scratch', 'auto'):
        model_config = open_model(settings['init_from'], settings['out_dir'], 'ckpt.pt')[0].config
        changed = {'dropout': settings['dropout'], 'block_size': min(settings['block_size'], model_config.block_size)}
        return dataclasses.replace(model_config, **changed), data, settings['init_from']
    if 'vocab_size' in config.given:
        source = 'as given'
    elif data:
        settings['vocab_size'] = model_vocab_size(data.tokenizer, data.vocab_size, settings['vocab_multiple'])
        source = data.path
    else:
        source = f"GPT-2's, since {folder} is not prepared here; --vocab_size= says otherwise"
    fields = {key: settings[key] for key in (*SHAPE, 'vocab_size', 'dropout')}
    with user_errors(ValueError):
        return GPTConfig(**fields), data, source


def planned_split(machine):
    """How the settings split a step -> Split."""
    shard_ranks = settings['shard_ranks'] or min(machine.per_node, devices)
    if settings['parallel'] == 'hsdp' and devices % shard_ranks:
        raise UserError(f'--shard_ranks={shard_ranks}: must divide --devices={devices}')
    return Split(
        batch=settings['batch_size'],
        rounds=-(-settings['gradient_accumulation_steps'] // devices),
        devices=devices,
        parallel=settings['parallel'],
        shard_ranks=shard_ranks,
        checkpointing=settings['activation_checkpointing'],
        cpu_offload=settings['cpu_offload'],
        compiled=settings['compile'] == 'True' or settings['compile'] == 'auto' and machine.kind == 'cuda',
    )


def parameters_by_part(weights):
    """{part of the model: parameters}."""
    n_layer, layer, other = model_config.n_layer, weights.layer // 4, weights.other // 4
    embeddings = model_config.vocab_size * model_config.n_embd * (1 if model_config.tie_weights else 2)
    return {
        'all': n_layer * layer + other,
        'embedding and head': embeddings,
        'layers': n_layer * layer,
        'each layer': layer,
        'positions and last norm': other - embeddings,
        'trained': (n_layer * weights.trained_layer + weights.trained_other) // 4,
    }


def run_totals(plan):
    """What the whole run takes by a plan -> {figure: number}; None where something is unknown."""
    iterations, tokens = settings['max_iters'], model_config.block_size * plan.split.batch * plan.split.rounds * devices
    micro_batch = sum(plan.seconds[kind] for kind in ('products', 'attention', 'memory', 'calls')) / plan.split.rounds
    evaluated = 2 if settings['eval_train'] else 1
    batches = settings['eval_iters'] or (val_tokens or 0) // (model_config.block_size * plan.split.batch)
    evaluations = iterations // settings['eval_interval'] + 1
    evaluation = evaluations * evaluated * batches * micro_batch / 3 / devices  # a forward pass is a third
    training = iterations * plan.step_seconds
    seconds = training + evaluation
    done = min(iterations, int(3600 * hours / (seconds / max(iterations, 1)))) if hours else iterations
    n_parameters = parameters['all']
    save = 4 * n_parameters + counter.weights.state
    return {
        'iterations': done,
        'tokens': done * tokens,
        'tokens per parameter': done * tokens / n_parameters,
        'epochs': done * tokens / data_tokens if data_tokens else None,
        'seconds': seconds * done / max(iterations, 1),
        'evaluation seconds': evaluation * done / max(iterations, 1),
        'money': price * devices * seconds * done / max(iterations, 1) / 3600 if price else None,
        'energy kWh': machine.watts * devices * seconds * done / max(iterations, 1) / 3.6e6 if machine.watts else None,
        'disk of saves': save * (2 + max(1, settings['keep_saves'])),  # the best, and the one that is being written
        'disk of data': data_tokens * (2 if model_config.vocab_size <= 2**16 else 4) if data_tokens else None,
    }


def command_changes(plan):
    """The flags that turn the planned run into another plan's."""
    split, n = plan.split, plan.split.rounds * devices
    wanted = {
        'batch_size': split.batch,
        'gradient_accumulation_steps': n,
        'parallel': split.parallel,
        'activation_checkpointing': split.checkpointing,
        'cpu_offload': split.cpu_offload,
    }
    return ' '.join(f'--{key}={value}' for key, value in wanted.items() if settings[key] != value) or 'as it is'


# --- what is printed --------------------------------------------------------------------------------------------------


def gib(nbytes):
    """Bytes -> text."""
    return f'{nbytes / 2**30:,.2f} GiB' if nbytes >= 2**30 else f'{nbytes / 2**20:,.0f} MiB'


def duration(seconds):
    """Seconds -> text in the unit that suits them."""
    for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60), ('s', 1)):
        if seconds >= 2 * size:
            return f'{seconds / size:,.1f} {unit}'
    return f'{1000 * seconds:,.0f} ms'


def report(plan, totals, table, advice):
    """Print a plan for people."""
    split, tokens = plan.split, plan.split.batch * plan.split.rounds * model_config.block_size
    flops = counter.weights.flops_per_token
    rate = tokens / plan.step_seconds
    peak = machine.products[dtype_name][-1][1]
    print(f'on {devices} x {machine.name} ({machine.source})')
    parts = ', '.join(f'{name} {n:,}' for name, n in parameters.items() if name not in ('all', 'trained'))
    trained = '' if parameters['trained'] == parameters['all'] else f', {parameters["trained"]:,} of them trained'
    print(f'{parameters["all"]:,} parameters{trained}: {parts}; vocabulary of {model_config.vocab_size:,} ({source})')
    epochs = f', {totals["epochs"]:,.2f} epochs' if totals['epochs'] is not None else ''
    limited = f'in {hours:g} hours ' if hours and totals['iterations'] < settings['max_iters'] else ''
    print(
        f'{limited}{totals["iterations"]:,} iterations of {tokens * devices:,} tokens: {totals["tokens"]:,} tokens, '
        f'{totals["tokens per parameter"]:,.1f} per parameter{epochs}'
    )
    print(
        f'\nmemory of each device, at its fullest ({plan.moment}): {gib(plan.peak)} of the {gib(available(machine))} '
        f'that tensors can fill: {"it fits" if plan.fits else "it does NOT fit"}'
    )
    print('  ' + ', '.join(f'{part} {gib(plan.memory[part])}' for part in PARTS if plan.memory[part] >= 2**20))
    print('\nbytes with this batch, and the largest batch that fits:')
    for name, row in table.items():
        print('  ' + f'{name:<6}' + ', '.join(f'{c}: {gib(peak)}, {most}' for c, (peak, most) in row.items()))
    spent = ', '.join(f'{kind} {100 * s / plan.step_seconds:.0f}%' for kind, s in plan.seconds.items() if s)
    efficiency = (
        '' if machine.efficiency['products'] == 1 else ' (shares of the peaks are assumed, see common/machines.py)'
    )
    print(
        f'\na step: {duration(plan.step_seconds)}: {spent}{efficiency}\n  {rate * devices:,.0f} tokens/s, '
        f'{100 * rate * flops / peak:.0f}% of the peak; {"compiled" if split.compiled else "not compiled"}'
    )
    print(
        f'the run: {duration(totals["seconds"])}, of which evaluation {duration(totals["evaluation seconds"])}', end=''
    )
    print(f'; {totals["money"]:,.2f} at {price:g} per hour and device' if price else '', end='')
    print(f'; {totals["energy kWh"]:,.1f} kWh' if totals['energy kWh'] else '')
    data_bytes = f', of the data {gib(totals["disk of data"])}' if totals['disk of data'] else ''
    print(f'disk: of saves {gib(totals["disk of saves"])}{data_bytes}')
    print('\nadvice:' if advice else '\nadvice: none, this is as good as the settings here allow')
    for line in advice:
        print(f'  {line}')


def advise(plan):
    """Lines of advice: what makes it fit, or faster. Each names the flags to add."""
    options = alternatives(counter, machine, plan.split)
    lines = []
    if plan.fits:
        better = [option for option in options if option.step_seconds < 0.97 * plan.step_seconds]
    else:
        better = options
        if not options:
            lines.append(more_devices(plan.split))
    for option in better[:3]:
        faster = plan.step_seconds / option.step_seconds
        lines.append(
            f'{command_changes(option)}: {gib(option.peak)}, {duration(option.step_seconds)} per step'
            + (f', {faster:.2f} times as fast' if plan.fits else '')
        )
    best = next((option for option in (*better, plan) if option.fits), None)
    micro_batches = best.split.rounds * devices if best else 0
    more = next((n for n in range(2 * devices, micro_batches + 1) if micro_batches % n == 0), None)
    if more:
        twice = make_plan(counter, machine, best.split._replace(devices=more, rounds=micro_batches // more), exact)
        changes = f'{command_changes(best)} and ' if best is not plan else ''
        lines.append(
            f'{changes}--devices={more}: {duration(twice.step_seconds)} per step, '
            f'{plan.step_seconds / twice.step_seconds:.2f} times as fast as now'
        )
    return lines


def more_devices(split):
    """A line for a model that fits on no setting of these devices: on how many it would."""
    sequences = split.batch * split.rounds * devices
    for n in (devices * 2**k for k in range(1, 11)):
        other = split._replace(
            devices=n, parallel='fsdp', cpu_offload=False, rounds=max(1, sequences // n // split.batch)
        )
        for checkpointing in CHECKPOINTING:
            if largest_planned_batch(counter, machine, other._replace(checkpointing=checkpointing)) >= 1:
                return (
                    f'on {devices} x {machine.name} nothing fits; on {n} it does: --devices={n} --parallel=fsdp '
                    f'--activation_checkpointing={checkpointing} --batch_size=1; or take a smaller model'
                )
    return f'not even one sequence of {model_config.block_size} tokens fits: take a smaller --block_size'


def draw(path):
    """Draw memory against batch size, and the run's time against devices, into a PNG file."""
    axes = new_figure('sequences in a micro-batch', 'memory of each device (GiB)')
    figure = axes.figure
    figure.set_size_inches(11, 4.5)
    grid = figure.add_gridspec(1, 2)
    axes.set_subplotspec(grid[0])
    most = 2 * max(plan.split.batch, *(row[1] for rows in table.values() for row in rows.values()))
    batches = sorted({round(most ** (n / 12)) for n in range(13)})
    for checkpointing in CHECKPOINTING:
        splits = [plan.split._replace(batch=batch, checkpointing=checkpointing) for batch in batches]
        peaks = [peak_memory(counter, split, exact=False) for split in splits]
        axes.loglog(batches, [peak / 2**30 for peak in peaks], label=f'activation_checkpointing={checkpointing}')
    axes.axhline(available(machine) / 2**30, color='black', linestyle='--', label=f'of {machine.name}')
    axes.plot([plan.split.batch], [plan.peak / 2**30], 'o', color='black', label='as planned')
    axes.legend()
    other = figure.add_subplot(grid[1])
    other.grid(alpha=0.3)
    sequences = plan.split.rounds * devices
    counts = [n for n in (2**k for k in range(11)) if sequences % n == 0]
    times = []  # hours
    for n in counts:
        split = plan.split._replace(devices=n, rounds=sequences // n)
        times.append(settings['max_iters'] * make_plan(counter, machine, split, exact).step_seconds / 3600)
    other.loglog(counts, times, 'o-', label=f'{plan.split.parallel}, the same batches')
    other.loglog(
        counts, [times[0] * counts[0] / n for n in counts], ':', color='gray', label='if exchange took no time'
    )
    other.set_xlabel('devices')
    other.set_ylabel('time of training (hours)')
    other.set_xticks(counts)
    other.set_yticks(times)
    for axis in (axes.xaxis, axes.yaxis, other.xaxis, other.yaxis):  # numbers as people write them
        axis.set_major_formatter('{x:,.4g}')
        axis.set_minor_formatter('')
    other.legend()
    save_figure(axes, path)


def measure_here():
    """Measure this machine, and the largest batch of the recipe on it; write machine.json. A collective."""
    from preflight.measuring import batch_trial, largest_batch, measure

    device, dtype = set_up_device(settings['device'], settings['dtype'], ranks)
    join_ranks(settings['backend'], device, ranks, settings['timeout'])
    gpu = device.type == 'cuda'

    def predict(machine, shape, batch):
        split = Split(batch, checkpointing=settings['activation_checkpointing'])
        return make_plan(StepCounter(shape, settings, dtype, gpu), machine, split).step_seconds

    found = measure(settings, model_config, device, dtype, ranks, predict=predict)
    if ranks.is_main:
        write_machine(machine_file, found)
        say(f'a real step takes {found.correction:.2f} of what these figures predict; wrote {machine_file}')
        counted = StepCounter(model_config, settings, dtype, gpu)
        split = Split(1, checkpointing=settings['activation_checkpointing'])
        guess = largest_planned_batch(counted, found, split)
        # a larger one would take too long to try
        most_tried = min(MAX_BATCH, int(LONGEST_TRIAL / make_plan(counted, found, split).step_seconds) or 1)
        fits = batch_trial(settings, model_config, device, dtype)
        most = largest_batch(fits, most_tried, guess, precision=0.05)
        at_least = 'at least ' if most == most_tried else ''
        say(f'the largest --batch_size that fits is {at_least}{most} (to 5%); {guess} was predicted')
    if not ranks.is_main:
        end(ranks)
    return found


# --- the plan ---------------------------------------------------------------------------------------------------------
model_config, data, source = planned_model()
data_tokens = len(data.tokens('train')) if data else train_tokens or None
val_tokens = len(data.tokens('val')) if data else None
ranks = find_ranks()
machine = measure_here() if measure else planned_machine()
check_global_batch({**settings, 'eval_only': False}, devices)
dtype_name = settings['dtype']
if dtype_name == 'auto':
    dtype_name = 'float32' if machine.kind != 'cuda' else 'bfloat16' if 'bfloat16' in machine.products else 'float16'
require({'dtype': dtype_name}, 'dtype', f'auto, {", ".join(DTYPES)}', lambda v: v in DTYPES)
machine.require_dtype(dtype_name)
split = planned_split(machine)
counter = StepCounter(model_config, settings, DTYPES[dtype_name], gpu=machine.kind == 'cuda')
parameters = parameters_by_part(counter.weights)
exact = machine.kind == 'cpu'  # there small operations are faster, as they stay in the cache; the memory is the same
plan = make_plan(counter, machine, split, exact)
totals = run_totals(plan)
table = {}
for parallel in PARALLEL if devices > 1 else ('ddp',):
    if parallel != 'hsdp' or 1 < split.shard_ranks < devices:
        table[parallel] = {}
        for checkpointing in CHECKPOINTING:
            other = split._replace(parallel=parallel, checkpointing=checkpointing, cpu_offload=False)
            most = largest_planned_batch(counter, machine, other)
            table[parallel][checkpointing] = peak_memory(counter, other, exact), most
advice = advise(plan)
if json_output:
    result = {'machine': machine.name, 'parameters': parameters, 'fits': plan.fits, 'moment': plan.moment}
    result |= {'available_bytes': available(machine), 'memory_bytes': plan.memory, 'seconds_per_step': plan.seconds}
    result |= {'run': totals, 'batches': table, 'advice': advice}
    print(json.dumps(result))
else:
    report(plan, totals, table, advice)
if plot:
    draw(plot)
end(ranks)
