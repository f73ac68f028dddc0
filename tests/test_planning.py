"""Plans: what is counted against torch's own saved tensors and a whole model, what is estimated against what others
have published, and plan.py as a person runs it."""

import dataclasses
import itertools
import json
import shlex

import pytest
import torch
from conftest import REPO, run_forked, run_forked_ok
from torch.autograd.graph import saved_tensors_hooks

from common.counting import Work, counting
from common.device import autocast
from common.machines import card, own_card
from configurator import read_settings
from loading import empty_model
from model import GPT, GPTConfig
from optim import clip_gradients, make_optimizer
from parallel import checkpoint_activations
from preflight.planning import (
    Split,
    StepCounter,
    alternatives,
    available,
    exchanged_bytes,
    largest_planned_batch,
    make_plan,
    peak_memory,
)

SETTINGS = read_settings(REPO / 'train.py')
SMALL = GPTConfig(block_size=32, vocab_size=96, n_layer=3, n_head=4, n_embd=64)
LLAMA = dict(mlp='swiglu', norm='rmsnorm', pos='rope', n_kv_head=2, tie_weights=False, bias=False)


def counter_of(shape, dtype=torch.float32, gpu=False, **settings):
    """A StepCounter of train.py's defaults and some settings."""
    return StepCounter(shape, {**SETTINGS, **settings}, dtype, gpu)


# --- counting ---------------------------------------------------------------------------------------------------------


def test_memory_is_counted_until_it_is_freed():
    with counting() as count:
        x = torch.zeros(10, 100)
        y = x.view(100, 10)  # the same memory
        assert count.live == 4000
        z = x + 1
        del x, y
        assert (count.live, count.peak) == (4000, 8000)
        stretch = count.cut()
        del z
    assert stretch[:3] == (0, 8000, 4000)


def test_work_is_what_operations_do():
    with counting() as count:
        a, b, bias = torch.zeros(6, 8), torch.zeros(8, 10), torch.zeros(10)
        q = torch.zeros(2, 3, 16, 4)
        count.cut()
        product = torch.addmm(bias, a, b)
        torch.relu_(product)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        work = count.cut().work
    assert work[Work('product', 'float32', 2 * 6 * 8 * 10, 4 * (10 + 48 + 80 + 60), 6)] == 1
    assert work[Work('stream', 'float32', 0, 2 * 240, 0)] == 1  # read and written in place, nothing new
    assert work[Work('fused', '', 0, 2 * 240, 0)] == 1
    attention = [(item, times) for item, times in work.items() if item.kind == 'attention']
    assert [(item.flops, item.size, times) for item, times in attention] == [(4 * q.numel() * 16 / 2, 16, 1)]


def test_fused_operations_move_only_what_enters_and_stays():
    with counting() as count:
        x, w = torch.zeros(100), torch.zeros(10, 10)
        count.cut()
        y = (x + 1) * 2 - 3
        work = count.cut().work
    assert work[Work('fused', '', 0, 800, 0)] == 1
    assert sum(times for item, times in work.items() if item.kind == 'stream') == 3
    del y, w


@pytest.mark.parametrize('options', [{}, LLAMA, {'dropout': 0.1, 'qk_norm': True, 'mlp': 'relu2'}], ids=str)
def test_a_layer_keeps_what_autograd_saves(options):
    """torch's own saved tensors, of a real model with two layers less one with one."""

    def saved_bytes(n_layer):
        model = GPT(dataclasses.replace(shape, n_layer=n_layer))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.zeros(2, shape.block_size, dtype=torch.long)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x, x, with_logits=False)[1]
        total = sum(found.values())
        del loss
        return total

    shape = dataclasses.replace(SMALL, **options)
    layer = counter_of(shape).stretches(2, 'none', False)['layer']
    numbers = shape.block_size * 2 * 4  # beside saved tensors: shapes of a few bytes, such as dropout's and seeds
    assert layer.kept == pytest.approx(saved_bytes(2) - saved_bytes(1), abs=numbers)


CASES = [
    (options, checkpointing, dtype, later)
    for options, checkpointing, dtype, later in itertools.product(
        ({}, LLAMA), ('none', 'selective', 'full'), (torch.float32, torch.bfloat16), (False, True)
    )
]


@pytest.mark.parametrize('options, checkpointing, dtype, later', CASES)
def test_one_layer_repeated_is_the_whole_model(options, checkpointing, dtype, later):
    """The peak of a plan is that of the model with all its layers, counted at once."""
    shape = dataclasses.replace(SMALL, vocab_size=512, **options)
    with counting() as count:
        model = GPT(shape).train()
        checkpoint_activations(model, checkpointing)
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, SETTINGS, dtype=dtype)
        x = torch.zeros(4, shape.block_size, dtype=torch.long)
        for _ in range(2):  # the first step makes the optimizer's state
            count.cut()
            for _ in range(2 if later else 1):
                with autocast(torch.device('cpu'), dtype):
                    loss = model(x, x, with_logits=False)[1]
                loss.backward()
                del loss
            clip_gradients(parameters, 1.0)
            optimizer.step()
            peak = count.peak
            optimizer.zero_grad()
    split = Split(4, rounds=2 if later else 1, checkpointing=checkpointing)
    memory = make_plan(counter_of(shape, dtype), own_card(1, 1, 1), split).memory
    assert sum(memory.values()) - memory['libraries'] == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize('vocab_size', [96, 2**20])  # with the loss at once, and in chunks
def test_memory_grows_in_a_straight_line(vocab_size):
    counter = counter_of(dataclasses.replace(SMALL, vocab_size=vocab_size, n_embd=16))
    split = Split(11)
    straight = peak_memory(counter_of(counter.model_config), split, exact=False)
    assert straight == pytest.approx(peak_memory(counter, split), rel=0.01)


def test_the_weights_are_all_there():
    for options in ({}, LLAMA):
        shape = dataclasses.replace(SMALL, **options)
        model = empty_model(shape)
        for optimizer, state_numbers in (('adamw', 2), ('muon', 1)):
            weights = counter_of(shape, optimizer=optimizer).weights
            assert weights.layer * shape.n_layer + weights.other == 4 * model.num_params(non_embedding=False)
            matrices = 4 * sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
            state = 8 * model.num_params(non_embedding=False) - (2 - state_numbers) * matrices
            assert weights.state == pytest.approx(state, abs=4 * len(list(model.parameters())))  # steps are counted
    lora = counter_of(SMALL, lora_rank=4)
    assert lora.weights.trained_other == 0 and 0 < lora.weights.trained_layer < lora.weights.layer / 2
    assert peak_memory(lora, Split(4)) < peak_memory(counter_of(SMALL), Split(4))


# --- splitting --------------------------------------------------------------------------------------------------------


def test_sharding_divides_and_checkpointing_saves():
    shape = GPTConfig(block_size=256, n_layer=24, n_embd=1024, n_head=16)
    counter = counter_of(shape, torch.bfloat16, gpu=True)
    for n in (2, 4, 8):
        memory = make_plan(counter, card('h100'), Split(1, devices=n, parallel='fsdp')).memory
        total = shape.n_layer * counter.weights.layer + counter.weights.other
        assert memory['weights'] == pytest.approx(total / n)
    peaks = [peak_memory(counter, Split(8, checkpointing=mode)) for mode in ('none', 'selective', 'full')]
    assert peaks == sorted(peaks, reverse=True)
    halves = Split(8, devices=8, parallel='hsdp', shard_ranks=4)
    assert peak_memory(counter, halves) > peak_memory(counter, halves._replace(parallel='fsdp'))
    offloaded = peak_memory(counter, Split(1, parallel='fsdp', cpu_offload=True))
    assert offloaded < peak_memory(counter, Split(1))


def test_bytes_sent_are_those_of_the_formulas():
    """docs/distributed.md, where they are held against what ranks really send."""
    counter = counter_of(SMALL)
    P = 4 * empty_model(SMALL).num_params(non_embedding=False)
    sent = exchanged_bytes(counter, Split(1, devices=4))
    assert (sent['gather'], sent['scatter'], sent['average']) == (0, 0, pytest.approx(2 * 3 / 4 * P))
    sent = exchanged_bytes(counter, Split(1, rounds=3, devices=4, parallel='fsdp'))
    assert sent['average'] == 0 and sent['scatter'] == pytest.approx(3 * 3 / 4 * P)
    sent = exchanged_bytes(counter, Split(1, devices=4, parallel='hsdp', shard_ranks=2))
    assert sent['scatter'] == pytest.approx(P / 2) and sent['average'] == pytest.approx(P / 2)


def test_the_largest_batch_is_the_largest():
    counter = counter_of(GPTConfig(), torch.bfloat16, gpu=True)
    machine = card('rtx4090')
    for mode in ('none', 'full'):
        most = largest_planned_batch(counter, machine, Split(1, checkpointing=mode))
        peaks = [peak_memory(counter, Split(n, checkpointing=mode), exact=False) for n in (most, most + 1)]
        assert peaks[0] <= available(machine) < peaks[1]


def test_alternatives_fit_and_keep_the_batch():
    counter = counter_of(GPTConfig(n_layer=48, n_embd=1600, n_head=25), torch.bfloat16, gpu=True)
    machine, split = card('a100-40'), Split(16, rounds=4, devices=8, shard_ranks=8)
    assert not make_plan(counter, machine, split).fits
    found = alternatives(counter, machine, split)
    assert found and all(plan.fits and plan.split.batch * plan.split.rounds == 64 for plan in found)
    assert [plan.step_seconds for plan in found] == sorted(plan.step_seconds for plan in found)


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_follows_the_machine():
    """Twice the arithmetic, or twice the bandwidth, cannot be slower, nor more than twice as fast."""
    counter, machine, split = counter_of(GPTConfig(n_layer=2), torch.bfloat16, gpu=True), card('a100'), Split(8)
    once = make_plan(counter, machine, split).step_seconds
    faster = dataclasses.replace(machine, products={'bfloat16': ((64, 2 * 312e12),), 'float32': ((64, 312e12),)})
    assert once / 2 < make_plan(counter, faster, split).step_seconds < once
    faster = dataclasses.replace(machine, stream=((1.0, 2 * 2039e9),))
    assert once / 2 < make_plan(counter, faster, split).step_seconds < once
    full = make_plan(counter, machine, split._replace(checkpointing='full')).step_seconds
    assert once < full < 1.5 * once
    assert make_plan(counter, machine, split._replace(compiled=True)).step_seconds < once
    assert make_plan(counter, machine, split._replace(rounds=4)).step_seconds < 4 * once


def gpt(n_layer, n_embd, n_head, block_size=1024, **options):
    """The shape of a published run."""
    defaults = dict(vocab_size=50304, bias=False)
    return GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, block_size=block_size, **defaults | options)


MODERN = dict(pos='rope', mlp='relu2', qk_norm=True, norm='rmsnorm')
LLAMA_8B = gpt(32, 4096, 32, 8192, **{**LLAMA, 'n_kv_head': 8}, mlp_width=14336, vocab_size=128256)
MPT = dict(vocab_size=50368)
# torchtitan's H100s have slower memory and more of it, and run at 500 W: benchmarks/llama3_h100_202412_torchtitan.md
SLOWER_H100 = dict(stream=((1.0, 2.4e12),), memory=95 * 2**30)
FSDP8 = dict(devices=8, parallel='fsdp')
SELECTIVE = dict(FSDP8, checkpointing='selective')
# what, shape, card, changes of it, split -> published tokens/s per GPU, and GiB of memory reserved or None. Sources:
# MPT: llm-foundry scripts/train/benchmarking/README.md. modded-nanogpt: records/track_1_short/2024-10-29_Optimizers and
# 2024-10-20_ScaleUp1B. Llama 3 8B: torchtitan benchmarks/llama3_h100_202412_torchtitan.md, its pull requests 1287
# (batch 1) and 355 (A100). GPT-2 on an A100, compiled: notes on Karpathy's build-nanogpt
PUBLISHED = {
    'MPT 125M A100': (gpt(12, 768, 12, **MPT), 'a100', {}, Split(64, 2, **FSDP8), 156468, None),
    'MPT 350M A100': (gpt(24, 1024, 16, **MPT), 'a100', {}, Split(64, 2, **FSDP8), 64813, None),
    'MPT 1B A100': (gpt(24, 2048, 16, 2048, **MPT), 'a100', {}, Split(14, 4, **FSDP8), 20513, None),
    'MPT 3B A100': (gpt(32, 2560, 20, 2048, **MPT), 'a100', {}, Split(10, 2, **FSDP8), 10811, None),
    'MPT 7B A100': (gpt(32, 4096, 32, 2048, **MPT), 'a100', {}, Split(6, 2, **FSDP8), 4641, None),
    'MPT 760M H100': (gpt(24, 1536, 12, **MPT), 'h100', {}, Split(48, 2, **FSDP8), 78581, None),
    'MPT 1B H100': (gpt(24, 2048, 16, 2048, **MPT), 'h100', {}, Split(14, 1, **FSDP8), 45455, None),
    'MPT 3B H100': (gpt(32, 2560, 20, **MPT), 'h100', {}, Split(20, 6, **FSDP8), 27046, None),
    'MPT 7B H100': (gpt(32, 4096, 32, 2048, **MPT), 'h100', {}, Split(6, 1, **FSDP8), 10643, None),
    'GPT-2 124M A100, compiled': (gpt(12, 768, 12, bias=True), 'a100', {}, Split(16, compiled=True), 175000, None),
    '124M H100, compiled': (gpt(12, 768, 6, **MODERN), 'h100', {}, Split(64, 1, 8, compiled=True), 473000, None),
    '1.5B H100, compiled': (gpt(52, 1536, 12, **MODERN), 'h100', {}, Split(10, 6, 8, compiled=True), 36100, None),
    'Llama 3 8B H100': (LLAMA_8B, 'h100', SLOWER_H100, Split(2, **SELECTIVE), 5762, 82.4),
    'Llama 3 8B H100, compiled': (LLAMA_8B, 'h100', SLOWER_H100, Split(2, compiled=True, **SELECTIVE), 6667, 77.0),
    'Llama 3 8B H100, batch 1': (LLAMA_8B, 'h100', SLOWER_H100, Split(1, **SELECTIVE), 5917, 49.66),
    'Llama 3 8B A100': (LLAMA_8B, 'a100', {}, Split(1, **SELECTIVE), 2717, 59.48),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_figures_are_met(name):
    """Within 15%. docs/planning.md also has the figures that are not."""
    shape, machine, changes, split, rate, reserved = PUBLISHED[name]
    plan = make_plan(counter_of(shape, torch.bfloat16, gpu=True), dataclasses.replace(card(machine), **changes), split)
    assert split.batch * split.rounds * shape.block_size / plan.step_seconds == pytest.approx(rate, rel=0.15)
    assert plan.peak < card(machine).memory or reserved  # they did fit
    if reserved:
        assert plan.peak / 2**30 == pytest.approx(reserved, rel=0.15)


# --- plan.py ----------------------------------------------------------------------------------------------------------


def planned(*arguments, cwd):
    """What plan.py prints as JSON."""
    return json.loads(run_forked_ok('plan.py', '--json_output=True', *arguments, cwd=cwd))


def test_a_recipe_is_planned(workspace):
    recipe, card = str(REPO / 'config/train_gpt2.py'), '--on=h100'
    found = planned(recipe, card, '--devices=8', '--price=2', '--train_tokens=9035582489', cwd=workspace)
    assert found['parameters']['all'] == 124_373_760 and found['fits']
    run = found['run']
    assert run['tokens'] == 600000 * 40 * 12 * 1024
    assert run['epochs'] == pytest.approx(run['tokens'] / 9035582489)
    assert run['money'] == pytest.approx(2 * 8 * run['seconds'] / 3600)
    assert found['batches'].keys() == {'ddp', 'fsdp'}
    day = planned(recipe, card, '--devices=8', '--hours=2', cwd=workspace)['run']
    assert day['seconds'] <= 7200 and day['iterations'] < 600000
    text = run_forked_ok('plan.py', recipe, card, '--plot=plan.png', cwd=workspace)
    assert 'it fits' in text and 'advice' in text
    assert (workspace / 'plan.png').stat().st_size > 10000


def test_the_data_decides_the_vocabulary(workspace):
    found = planned('--dataset=tiny', '--on=t4', '--n_layer=2', '--n_embd=64', '--n_head=2', cwd=workspace)
    head = found['parameters']['embedding and head']
    assert head == 29 * 64 and found['run']['epochs'] > 0


TOO_LARGE = [
    ('a larger batch', '--on=rtx4090 --batch_size=256 --gradient_accumulation_steps=8'),
    ('a larger model', '--on=a100-40 --n_layer=48 --n_embd=1600 --n_head=25'),
    ('a long context', '--on=h100 --block_size=16384 --batch_size=8 --n_layer=24 --n_embd=2048 --n_head=16'),
    ('a model for several devices', '--on=h100 --devices=8 --n_layer=32 --n_embd=4096 --n_head=32 --batch_size=4'),
    ('weights in the host', '--on=rtx3090 --n_layer=32 --n_embd=2560 --n_head=32 --batch_size=2'),
]


@pytest.mark.parametrize('arguments', [case[1] for case in TOO_LARGE], ids=[case[0] for case in TOO_LARGE])
def test_the_advice_makes_it_fit(arguments, workspace):
    first = planned(*arguments.split(), cwd=workspace)
    assert not first['fits']
    flags = first['advice'][0].split(': ')[0]
    second = planned(*arguments.split(), *shlex.split(flags), cwd=workspace)
    assert second['fits'], flags
    assert second['run']['tokens'] == first['run']['tokens']


def test_what_fits_nowhere_gets_more_devices(workspace):
    arguments = '--on=rtx3090 --n_layer=64 --n_embd=4096 --n_head=32 --block_size=2048'.split()
    found = planned(*arguments, '--gradient_accumulation_steps=1024', cwd=workspace)
    assert not found['fits'] and '--parallel=fsdp' in found['advice'][0]


@pytest.mark.parametrize(
    'arguments, what',
    [
        ('', '--measure=True'),
        ('--on=h1000', 'nearest'),
        ('--peak_tflops=100', 'memory_gb'),
        ('--on=h100 --plot=plan.pdf', '.png'),
        ('--on=h100 --devices=7', 'cannot be divided among 7'),
        ('--on=h100 --devices=8 --parallel=hsdp --shard_ranks=3', '--shard_ranks=3'),
        ('--on=v100 --dtype=bfloat16', 'bfloat16'),
        ('--on=missing.json', 'missing.json'),
        ('--on=h100 --n_head=7', 'n_embd'),
        ('--on=h100 --batch_szie=7', 'batch_size'),
    ],
)
def test_mistakes_are_one_line(arguments, what, workspace):
    done = run_forked('plan.py', *arguments.split(), cwd=workspace)
    assert done.returncode == 2 and what in done.stderr and done.stderr.count('\n') == 1
    assert not done.stdout
