"""What a training run will take, before it starts: memory of each device, and seconds per step.

    counter = StepCounter(model_config, config, dtype, gpu)      counts a step's operations on tensors without memory
    plan = make_plan(counter, machine, Split(devices=8))         memory and seconds of a step, by part

Memory is counted: a step of the model with one layer runs, forward, backward and optimizer, on shapes alone, and what
the layer does is repeated n_layer times. Time is estimated: each operation takes as long as its arithmetic or its
bytes, whichever is more, on a machine of which common/machines.py knows what it can do ("roofline", Williams et al.
2009). What devices send one another follows from what parallel.py makes them do. docs/planning.md compares both with
measurements.
"""

import dataclasses
import math
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn as nn

from common.counting import Stretch, counting
from common.device import autocast
from common.dropout import Dropout
from common.machines import Machine
from lora import add_lora, freeze_base
from model import GPT, MAX_LOGITS, CausalSelfAttention, GPTConfig
from optim import clip_gradients, make_optimizer
from parallel import CHECKPOINTING, PARALLEL, checkpoint_activations
from preflight.measuring import largest_batch

CONTEXT_BYTES = 0.8e9  # of a GPU, for CUDA's context and its libraries' workspaces: no tensor gets it
USABLE = 0.95  # share of the rest that tensors can fill, since the allocator leaves gaps
FUSED = 1.6  # times the bytes of perfect fusion that the kernels of torch.compile move, see docs/planning.md
LIBRARY_BYTES = 18e6  # of a process on a CPU, when it first computes
COMPILER_BYTES = 85e6  # more, as torch's checkpointing, ddp and fsdp import the compiler
KEPT = 1.6  # times the bytes of tensors that a CPU's allocator takes at most, see keep_freed_memory
FUNCTION_SECONDS = 0.8e-9  # of a CPU, for a number by a function such as exp: two cores with AVX2
IN_PLACE = 2**26  # bytes; without a new tensor, more of them are no slower, as no page of memory is new
HOST_LINK = 20e9  # bytes/s between a GPU and the memory of its host, with cpu_offload; assumed
HOST_STREAM = 50e9  # bytes/s of the optimizer's step on the host; assumed
BUCKET_BYTES = 25 * 2**20  # that DistributedDataParallel exchanges at a time
MAX_CHUNKS = 32  # of the loss, that are counted one by one; with more, a step is extrapolated from smaller ones
MAX_BATCH = 2**16  # sequences; larger ones are not looked for
PARTS = ('weights', 'gradients', 'optimizer', 'activations', 'logits', 'sharding', 'temporary', 'libraries')


class Weights(NamedTuple):
    """What belongs to a whole model, in bytes, and its optimizer's step.

    layer, other: float32 weights of one layer, and of what is no layer. trained_layer, trained_other: of these, those
    that are trained. flops_per_token: of the model, see GPT. state: the optimizer's buffers. step: its step, a Stretch.
    """

    layer: int
    other: int
    trained_layer: int
    trained_other: int
    flops_per_token: int
    state: int
    step: Stretch


class Split(NamedTuple):
    """How a step is split: over devices, as --parallel= says, and in time, by --activation_checkpointing= and
    micro-batches of `batch` sequences, `rounds` of them on each device."""

    batch: int
    rounds: int = 1
    devices: int = 1
    parallel: str = 'ddp'
    shard_ranks: int = 0  # devices that share a copy of the model under hsdp
    checkpointing: str = 'none'
    cpu_offload: bool = False
    compiled: bool = False

    @property
    def shards(self) -> int:
        """In how many parts the weights are cut."""
        return {'ddp': 1, 'fsdp': self.devices, 'hsdp': self.shard_ranks}[self.parallel]

    @property
    def later(self) -> bool:
        """Do gradients have memory before a backward pass, of earlier micro-batches or as what ranks exchange?"""
        return self.rounds > 1 or self.devices > 1 or self.parallel != 'ddp'


class Plan(NamedTuple):
    """What a step takes on each device: {part: bytes} at the moment when memory is fullest, and {part: seconds}."""

    split: Split
    moment: str
    memory: dict[str, float]
    seconds: dict[str, float]
    fits: bool

    @property
    def peak(self) -> float:
        """Bytes of all tensors at that moment."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


# --- counting ---------------------------------------------------------------------------------------------------------


class StepCounter:
    """Counts what a step of a run does; remembers it, as plans ask for the same more than once."""

    def __init__(self, model_config: GPTConfig, config: dict, dtype: torch.dtype, gpu: bool):
        """config: settings as in train.py. dtype: of products. gpu: count as on a GPU, not as on a CPU."""
        self.model_config, self.config, self.dtype, self.gpu = model_config, config, dtype, gpu
        self.known = {}
        self.weights = self.count_weights()

    def stretches(self, batch: int, checkpointing: str, later: bool, exact: bool = True) -> dict[str, Stretch]:
        """The forward and backward pass of a micro-batch of the model with one layer -> {name: Stretch}, in this order:
        'embedding', 'layer', 'head' (with the loss), 'head backward', 'layer backward', 'embedding backward'.

        later: gradients have memory before, as those of an earlier micro-batch do. exact: count this batch itself, as
        long as that takes no seconds; else memory comes from two smaller ones, since it grows in a straight line.
        """
        key = batch, checkpointing, later
        if key in self.known:
            return self.known[key]
        at_once = MAX_LOGITS / (self.model_config.vocab_size * self.model_config.block_size)  # sequences of a chunk
        # a loss in chunks is another line; a short last chunk must not matter
        low = math.ceil(3 * at_once) if batch > at_once or at_once < 16 else 1
        if batch in (low, 2 * low) or exact and batch <= max(2 * low, MAX_CHUNKS * at_once):
            self.known[key] = self.count_micro_batch(*key)
            return self.known[key]
        a, b = (self.stretches(n, checkpointing, later) for n in (low, 2 * low))
        return {name: extrapolate(a[name], b[name], batch / low - 1) for name in a}

    def make_model(self, n_layer: int) -> GPT:
        """A model with so many layers, as train.py makes it from the settings."""
        model = GPT(dataclasses.replace(self.model_config, n_layer=n_layer)).train()
        if self.config['lora_rank']:
            add_lora(model, {key: self.config[f'lora_{key}'] for key in ('rank', 'alpha', 'targets')})
            freeze_base(model)
        for module in model.modules() if self.gpu else ():  # there attention's kernel drops, and a mask is one of bytes
            if isinstance(module, CausalSelfAttention):
                module.dropout = 0.0
            elif isinstance(module, Dropout):
                module.__class__ = nn.Dropout
        return model

    def count_micro_batch(self, batch: int, checkpointing: str, later: bool) -> dict[str, Stretch]:
        """What stretches() returns, counted."""
        found = {}
        with counting() as count:
            model = self.make_model(1)
            checkpoint_activations(model, checkpointing)
            for parameter in model.parameters() if later else ():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

            def cut(name):
                found[name] = count.cut()

            def begin(layer, args):
                cut('embedding')
                if args[0].requires_grad:  # not in front of an adapter's layers
                    args[0].register_hook(lambda gradient: cut('layer backward'))

            def end(layer, args, output):
                cut('layer')
                output.register_hook(lambda gradient: cut('head backward'))

            model.transformer.h[0].register_forward_pre_hook(begin)
            model.transformer.h[0].register_forward_hook(end)
            x = torch.zeros(batch, self.model_config.block_size, dtype=torch.long)
            starts = torch.zeros_like(x) if self.config['mask_documents'] and not self.gpu else None
            count.cut()
            with autocast(torch.device('cpu'), self.dtype):
                loss = model(x, x, starts, with_logits=False)[1]
                cut('head')  # the copies of weights that autocast keeps are still there
            loss.backward()
            del loss
            cut('embedding backward')
            if 'layer backward' not in found:
                rest = found['embedding backward']
                found |= {
                    'layer backward': rest,
                    'embedding backward': Stretch(rest.end, rest.end, rest.end, Counter()),
                }
        return found

    def count_weights(self) -> Weights:
        """The weights of the whole model, and its optimizer's state and step: what a second layer adds, each adds."""
        n_layer = self.model_config.n_layer
        (first, a, flops_a), (second, b, flops_b) = self.count_optimizer(1), self.count_optimizer(2)
        layer, trained_layer, state_of_layer = (y - x for x, y in zip(first, second))
        other, trained_other, state = (x - (y - x) for x, y in zip(first, second))
        flops = flops_a + (n_layer - 1) * (flops_b - flops_a)
        step = extrapolate(a, b, n_layer - 1)
        return Weights(layer, other, trained_layer, trained_other, flops, state + n_layer * state_of_layer, step)

    def count_optimizer(self, n_layer: int) -> tuple[tuple[int, int, int], Stretch, int]:
        """The bytes of a model's weights, of those trained, and of its optimizer's state; the optimizer's step, with
        clipping; and the FLOPs per token."""
        with counting() as count:
            model = self.make_model(n_layer)
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = make_optimizer(model, self.config, dtype=self.dtype)
            states = []
            for _ in range(2):  # the first step makes the state
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                count.cut()
                clip_gradients(parameters, self.config['grad_clip'])
                optimizer.step()
                step = count.cut()
                states.append(step.kept)
            sizes = (sum(p.nbytes for p in group) for group in (list(model.parameters()), parameters))
            return (*sizes, states[0]), step, model.flops_per_token()


def extrapolate(a: Stretch, b: Stretch, t: float) -> Stretch:
    """The Stretch that lies t times as far from a as b does, on the straight line through both. Its work may count an
    operation a negative number of times: sums over it are on the line too."""
    numbers = (x + t * (y - x) for x, y in zip(a[:3], b[:3]))
    work = Counter({key: (1 - t) * a.work[key] + t * b.work[key] for key in a.work.keys() | b.work.keys()})
    return Stretch(*numbers, work)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_moments(counter: StepCounter, split: Split, exact: bool = True) -> dict[str, dict[str, float]]:
    """The moments of a step at which memory can be fullest -> {moment: {part of PARTS: bytes on each device}}.

    'sharding' is what fsdp gathers, and gradients on their way; 'temporary' what an operation needs besides. exact: see
    StepCounter.stretches.
    """
    weights, n_layer, shards = counter.weights, counter.model_config.n_layer, split.shards
    sharded = split.parallel != 'ddp'
    ranks_exchange = sharded or split.devices > 1
    stretches = counter.stretches(split.batch, split.checkpointing, split.later, exact)
    # autocast keeps copies of a layer's weights in low precision until the backward pass, or, where that makes them
    # again, until the end of the forward pass; sharded weights are gathered in low precision on a GPU
    low = weights.layer * counter.dtype.itemsize / 4 if counter.dtype != torch.float32 else 0
    gathered_low = sharded and counter.gpu and low > 0
    copies = 0 if gathered_low else low
    copies_end_early = split.checkpointing != 'none'
    gathered = (low if gathered_low else weights.layer) if sharded else 0
    on_the_way = weights.trained_layer * (1.5 if gathered_low else 2) if sharded else 0  # gradients: whole, and to send
    root = weights.other if sharded else 0  # gathered for the whole micro-batch
    # a tied matrix's first gradient is among the activations, until the second comes
    root_gradients = weights.trained_other / 2 if sharded and not counter.model_config.tie_weights else 0

    fixed = {'weights': (n_layer * weights.layer + weights.other) / shards, 'optimizer': weights.state / shards}
    if not counter.gpu:
        compiler = ranks_exchange or split.checkpointing != 'none'
        fixed['libraries'] = LIBRARY_BYTES + (COMPILER_BYTES if compiler else 0)
    all_gradients = (n_layer * weights.trained_layer + weights.trained_other) / shards
    gradients = all_gradients if split.rounds > 1 or ranks_exchange and not sharded else 0
    if ranks_exchange and not sharded and split.rounds > 1:
        gradients *= 2  # ddp sums micro-batches beside what it will exchange
    grow = gradients == 0
    if split.cpu_offload:
        fixed, all_gradients, gradients, grow = {}, 0, 0, False
    moments, live = {}, 0  # live: activations, and on one device the gradients that have come

    def moment(name, stretch, change=0.0, sharding=0.0, gradients_come=0.0, part='temporary'):
        nonlocal live, gradients
        memory = dict.fromkeys(PARTS, 0.0) | fixed | {'gradients': gradients, 'activations': live, 'sharding': sharding}
        memory[part] += stretch.peak - stretch.start
        if name not in moments or sum(memory.values()) > sum(moments[name].values()):
            moments[name] = memory
        live += stretch.kept + change
        if grow:
            gradients += gradients_come / shards
            live -= 0 if ranks_exchange else gradients_come

    moment('embedding', stretches['embedding'], sharding=root)
    for _ in range(n_layer):
        moment('forward pass', stretches['layer'], copies - low, root + 2 * gathered)
    moment('loss', stretches['head'], sharding=root + root_gradients, part='logits')
    end = low - n_layer * copies if copies_end_early else 0
    # a tied matrix gets its first gradient here, another later; it is counted at once
    moment('backward pass', stretches['head backward'], end, root + root_gradients, weights.trained_other)
    sharding = root + root_gradients + 2 * gathered + on_the_way
    for _ in range(n_layer):
        change = 0 if copies_end_early else low - copies
        moment('backward pass', stretches['layer backward'], change, sharding, weights.trained_layer)
    moment('embedding, backward', stretches['embedding backward'], sharding=root + root_gradients)
    live, gradients = 0, all_gradients
    step = weights.step._replace(peak=weights.step.start + (weights.step.peak - weights.step.start) / shards)
    moment('optimizer', step)
    return moments


def peak_memory(counter: StepCounter, split: Split, exact: bool = True) -> float:
    """Bytes of all tensors of a device at the moment when memory is fullest. exact: see StepCounter.stretches."""
    return max(sum(memory.values()) for memory in memory_moments(counter, split, exact).values())


def available(machine: Machine) -> float:
    """Bytes of a device that tensors can fill."""
    if machine.kind == 'cpu':
        return machine.memory / KEPT
    if machine.measured:  # what was free
        return machine.memory
    return USABLE * (machine.memory - CONTEXT_BYTES)


def largest_planned_batch(counter: StepCounter, machine: Machine, split: Split) -> int:
    """The largest batch that fits, 0 if not even one sequence does."""

    def fits(batch):
        return peak_memory(counter, split._replace(batch=batch), exact=False) <= available(machine)

    return largest_batch(fits, MAX_BATCH)


# --- time -------------------------------------------------------------------------------------------------------------


def seconds_of(work: Counter, machine: Machine, dtype: str, compiled: bool) -> Counter:
    """Seconds that a machine takes for {Work: how often} -> {'products', 'attention', 'memory', 'calls': seconds}."""
    seconds = Counter()
    for item, times in work.items():
        if item.kind == ('stream' if compiled else 'fused'):
            continue
        nbytes = item.nbytes * (FUSED if item.kind == 'fused' else 1)
        speed = machine.stream_speed(nbytes if item.size or item.kind == 'fused' else min(nbytes, IN_PLACE))
        moved = nbytes / speed
        if item.kind == 'stream' and machine.kind == 'cpu':
            moved = max(moved, item.flops * FUNCTION_SECONDS)
        seconds['calls'] += times * machine.op_seconds
        precision = item.dtype if item.dtype in machine.products else dtype
        if item.kind == 'product':
            seconds['products'] += times * max(moved, item.flops / machine.product_flops(precision, item.size))
        elif item.kind == 'attention':
            seconds['attention'] += times * max(moved, item.flops / machine.attention_flops(precision, item.size))
        else:
            seconds['memory'] += times * moved
    return seconds


def step_seconds(counter: StepCounter, machine: Machine, split: Split, exact: bool = True) -> dict[str, float]:
    """What the time of a step goes to -> {kind of work: seconds}; 'calls' is what the host takes beyond the device."""
    n_layer, dtype = counter.model_config.n_layer, str(counter.dtype).removeprefix('torch.')
    stretches = counter.stretches(split.batch, split.checkpointing, split.later, exact)
    micro_batch = Counter()
    for name, stretch in stretches.items():
        for kind, seconds in seconds_of(stretch.work, machine, dtype, split.compiled).items():
            micro_batch[kind] += seconds * (n_layer if name.startswith('layer') else 1)
    shards = split.shards * (split.devices if split.parallel == 'ddp' and counter.config['optimizer'] == 'muon' else 1)
    optimizer = {k: v / shards for k, v in seconds_of(counter.weights.step.work, machine, dtype, False).items()}
    total = {kind: split.rounds * micro_batch[kind] for kind in ('products', 'attention', 'memory')}
    total['optimizer'] = sum(optimizer.values()) - optimizer['calls']
    if split.cpu_offload:  # it runs on the host
        nbytes = sum(item.nbytes * times for item, times in counter.weights.step.work.items() if item.kind == 'stream')
        total['optimizer'] = nbytes / shards / HOST_STREAM
    calls = split.rounds * micro_batch['calls'] + optimizer['calls']
    total['calls'] = max(0.0, calls - sum(total.values())) if machine.overlaps else calls
    total = {kind: machine.correction * seconds for kind, seconds in total.items()}
    exchange = exchange_seconds(counter, machine, split)
    if machine.overlaps:  # all but the first and the last piece of it, while layers are computed
        hidden = (1 - 1 / n_layer) * min(exchange, split.rounds * sum(micro_batch.values()))
        exchange -= hidden
    return total | {'exchange': exchange}


def exchanged_bytes(counter: StepCounter, split: Split) -> dict[str, float]:
    """Bytes of a step that pass each device, by what sends them -> {'gather', 'scatter', 'average', …: bytes}.

    The formulas are in docs/distributed.md. 'average' is between copies of the model.
    """
    weights, n_layer, n, shards = counter.weights, counter.model_config.n_layer, split.devices, split.shards
    trained = n_layer * weights.trained_layer + weights.trained_other
    low = counter.gpu and counter.dtype != torch.float32
    layers = n_layer * weights.layer * (counter.dtype.itemsize / 4 if low else 1)
    share, copies, offloaded = (shards - 1) / shards, n / shards, int(split.cpu_offload)
    return {
        'gather': split.rounds * share * (2 * layers + weights.other),
        'scatter': split.rounds * share * trained,
        'average': 2 * (copies - 1) / copies * trained / shards,
        'from the host': offloaded * split.rounds * (2 * layers + weights.other) / shards,
        'to the host': offloaded * split.rounds * trained / shards,
    }


def exchange_seconds(counter: StepCounter, machine: Machine, split: Split) -> float:
    """Seconds of a step's exchange between devices, if nothing else happens meanwhile."""
    sent = exchanged_bytes(counter, split)
    within = machine.exchange_speed(between_nodes=split.shards > machine.per_node)
    between = machine.exchange_speed(between_nodes=split.devices > machine.per_node)
    collectives = 3 * split.rounds * counter.model_config.n_layer if split.shards > 1 else 0
    collectives += sent['average'] / BUCKET_BYTES
    moved = (sent['gather'] + sent['scatter']) / within + sent['average'] / between
    if split.cpu_offload:
        moved += (sent['from the host'] + sent['to the host']) / HOST_LINK
    return moved + collectives * machine.exchange_seconds


# --- plans ------------------------------------------------------------------------------------------------------------


def make_plan(counter: StepCounter, machine: Machine, split: Split, exact: bool = True) -> Plan:
    """The plan of a step on a machine. exact: see StepCounter.stretches."""
    moments = memory_moments(counter, split, exact)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    fits = sum(moments[moment].values()) <= available(machine)
    return Plan(split, moment, moments[moment], step_seconds(counter, machine, split, exact), fits)


def alternatives(counter: StepCounter, machine: Machine, split: Split) -> list[Plan]:
    """Plans with the same sequences per step that fit, the fastest first: each --parallel= and
    --activation_checkpointing=, with the largest micro-batch that fits."""
    sequences = split.batch * split.rounds  # of each device
    exact = machine.kind == 'cpu'  # there small operations are faster, since they stay in the cache
    found = []
    several = split.devices > 1
    for parallel in PARALLEL if several else ('ddp', 'fsdp') if machine.kind == 'cuda' else ('ddp',):
        if parallel == 'hsdp' and not (1 < split.shard_ranks < split.devices):
            continue
        for checkpointing in CHECKPOINTING:
            other = split._replace(parallel=parallel, checkpointing=checkpointing)
            if parallel == 'ddp':
                other = other._replace(cpu_offload=False)
            elif split.devices == 1:  # fsdp on one device pays only if the host keeps the weights
                other = other._replace(cpu_offload=True)
            most = largest_planned_batch(counter, machine, other._replace(rounds=2 if sequences > 1 else 1))
            batch = max((b for b in range(1, min(most, sequences) + 1) if sequences % b == 0), default=0)
            if batch:
                found.append(make_plan(counter, machine, other._replace(batch=batch, rounds=sequences // batch), exact))
    return sorted((plan for plan in found if plan.fits), key=lambda plan: plan.step_seconds)
