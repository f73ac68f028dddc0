"""Low-rank adapters: what is trained, saved, merged and resumed, on one rank and several."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, run_forked, run_forked_ok, train_on_ranks, write_data

from common.checkpoint import read_whole
from common.errors import UserError
from loading import load_checkpoint, open_model
from lora import add_lora, freeze_base, merge_lora
from model import GPT, GPTConfig
from optim import make_optimizer

MODERN = {'pos': 'rope', 'mlp': 'swiglu', 'n_kv_head': 1, 'norm': 'rmsnorm', 'tie_weights': False, 'bias': False}
LORA = {'rank': 3, 'alpha': 6, 'targets': 'attn,mlp', 'base': 'x', 'hash': 'x'}
RUN = [*TINY, '--learning_rate=3e-3', '--gradient_accumulation_steps=4', '--batch_size=2']
LORA_RUN = [*RUN, '--init_from=base', '--lora_rank=4']
LAYERS = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
FSDP = '--parallel=fsdp'
shards = pytest.mark.skipif(not hasattr(torch.cpu.Stream, 'record_event'), reason='torch 2.6 shards on GPUs only')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with data/tiny, the run `base`, and `whole`, an adapter that was trained beside it for 8 steps."""
    folder = tmp_path_factory.mktemp('lora')
    write_data(folder / 'data' / 'tiny')
    run_forked_ok('train.py', *TINY, '--out_dir=base', cwd=folder)
    output = run_forked_ok('train.py', *LORA_RUN, '--out_dir=whole', cwd=folder)
    assert '29,760 parameters (4,096 of them trained)' in output
    return folder


def checkpoint(path):
    return read_whole(load_checkpoint(str(path)))


def losses(path):
    """The losses of a run: of each iteration, then of each evaluation."""
    iterations, evaluations = metrics(path)
    return [r['loss'] for r in iterations] + [r['val/loss'] for r in evaluations]


def adapted(shape, targets='attn,mlp', seed=0):
    """A small GPT with an adapter that changes what it computes."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, **shape))
    add_lora(model, {**LORA, 'targets': targets})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('.lora_b'):
                parameter.normal_()
    return model.eval()


# --- the layer --------------------------------------------------------------------------------------------------------


def test_output_and_gradients_are_the_formula_s():
    """Hu et al., eq. 3, and its derivative by hand, in float64 numbers."""
    model = adapted({})
    layer = model.transformer.h[1].mlp.c_fc
    x, g = torch.randn(5, 16), torch.randn(5, 64)
    y = layer(x)
    y.backward(g)
    W, bias, A, B, x, g = (t.detach().double().numpy() for t in (*layer.parameters(), x, g))
    assert (A.shape, B.shape) == ((3, 16), (64, 3))
    np.testing.assert_allclose(y.detach(), x @ (W + 6 / 3 * B @ A).T + bias, atol=1e-5)
    np.testing.assert_allclose(layer.lora_a.grad, 2 * (g @ B).T @ x, atol=1e-4)
    np.testing.assert_allclose(layer.lora_b.grad, 2 * g.T @ (x @ A.T), atol=1e-4)


def test_training_starts_from_the_base():
    """B is zero, A within the bounds of kaiming_uniform(a=sqrt(5)), which are those of nn.Linear's own weight."""
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)), torch.arange(8)[None]
    before = model(idx)[0]
    add_lora(model, LORA)
    assert torch.equal(model(idx)[0], before)
    layer = model.transformer.h[0].mlp.c_proj
    assert not layer.lora_b.any() and 0.9 < layer.lora_a.abs().max() * 64**0.5 <= 1


@pytest.mark.parametrize(
    'shape, targets, layers',
    [
        ({}, 'attn,mlp', 8),
        ({}, 'c_proj', 4),
        ({}, 'attn.c_proj, c_fc', 4),
        (MODERN, 'attn,mlp', 8),
        (MODERN, 'lm_head', 1),
        (MODERN, 'lm_head,h.0.mlp', 3),
    ],
)
def test_merged_equals_unmerged(shape, targets, layers):
    model, idx = adapted(shape, targets), torch.arange(8)[None]
    names = {name for name in model.state_dict() if '.lora_' in name}
    assert len(names) == 2 * layers
    logits = model(idx, idx)[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merge_lora(model)
    assert model.state_dict().keys() == before.keys() - names
    assert all(type(module) is torch.nn.Linear for module in model.modules() if isinstance(module, torch.nn.Linear))
    torch.testing.assert_close(model(idx, idx)[0], logits, atol=1e-5, rtol=0)
    for name, weight in model.state_dict().items():
        a, b = (before.get(name.replace('.weight', end)) for end in ('.lora_a', '.lora_b'))
        expected = before[name] if a is None else before[name].double() + 2 * b.double() @ a.double()
        torch.testing.assert_close(weight, expected.float(), atol=1e-6, rtol=0)


def test_only_the_adapter_moves():
    model = adapted({'dropout': 0.1})
    freeze_base(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = {'optimizer': 'adamw', 'weight_decay': 0.1, 'learning_rate': 0.1, 'beta1': 0.9, 'beta2': 0.9}
    optimizer = make_optimizer(model, config)
    decayed, others = optimizer.param_groups
    assert len(decayed['params']) == 16 and decayed['weight_decay'] == 0.1 and not others['params']
    for _ in range(2):
        model(torch.arange(8)[None], torch.arange(8)[None])[1].backward()
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) != ('.lora_' in name), name
    assert all(p.grad is None for name, p in model.named_parameters() if '.lora_' not in name)


def test_compiled():
    """As one graph."""
    model, idx, gradients = adapted({}), torch.arange(8)[None], []
    freeze_base(model)
    for function in (model, torch.compile(model, backend='eager', fullgraph=True)):
        model.zero_grad()
        function(idx, idx)[1].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 16
    torch.testing.assert_close(*gradients)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_save_is_the_adapter_and_the_name_of_its_base(folder):
    """The trained model, computed from the base's weights and the save in float64, has the loss of the log."""
    saved, base = checkpoint(folder / 'whole' / 'ckpt.pt'), checkpoint(folder / 'base' / 'ckpt.pt')
    layers = [f'transformer.h.{n}.{name}' for n in (0, 1) for name in LAYERS]
    assert saved['model'].keys() == {f'{layer}.lora_{end}' for layer in layers for end in 'ab'}
    model = open_model(str(folder / 'base'), '', '')[0]
    digests = b''
    for name, weight in model.named_parameters():
        content = f'{name} {list(weight.shape)} torch.float32'.encode() + weight.detach().numpy().tobytes()
        digests += hashlib.sha256(content).digest()
    lora = {'rank': 4, 'alpha': 32, 'targets': 'attn,mlp', 'base': 'base', 'hash': hashlib.sha256(digests).hexdigest()}
    assert saved['lora'] == lora
    assert {key: saved['config'][f'lora_{key}'] for key in ('rank', 'alpha', 'targets')}.items() <= lora.items()
    first, *_, last = metrics(folder / 'whole')[1]
    assert last['val/loss'] < first['val/loss'] - 0.01
    weights = {name: weight.double() for name, weight in base['model'].items()}
    for layer in layers:
        a, b = (saved['model'][f'{layer}.lora_{end}'].double() for end in 'ab')
        weights[f'{layer}.weight'] += 32 / 4 * b @ a
    model.load_state_dict(weights)
    model.eval().double()
    ids = torch.from_numpy(np.fromfile(folder / 'data' / 'tiny' / 'val.bin', '<u2').astype(np.int64))[: 62 * 16 + 1]
    loss = model(ids[:-1].view(-1, 16), ids[1:].view(-1, 16))[1].item()
    resume = ['--out_dir=whole', '--init_from=resume', '--eval_only=True', '--eval_iters=0']
    printed = run_forked_ok('train.py', *RUN, *resume, cwd=folder)
    assert f'val loss {loss:.4f}' in printed
    printed = run_forked_ok('evaluate.py', '--out_dir=whole', '--device=cpu', cwd=folder)
    assert f'val: loss {loss:.4f}' in printed


@pytest.mark.parametrize(
    'ranks, split',
    [
        (1, ['--activation_checkpointing=selective', '--sample_interval=8']),
        (2, ['--activation_checkpointing=full']),
        pytest.param(1, [FSDP, '--cpu_offload=True'], marks=shards),
        pytest.param(2, [FSDP], marks=shards),
    ],
)
def test_losses_are_those_of_one_device(folder, ranks, split):
    out = '_'.join(split).replace('=', '_')
    arguments = [*LORA_RUN, f'--out_dir={out}', *split]
    if ranks == 1:
        run_forked_ok('train.py', *arguments, cwd=folder)
    else:
        train_on_ranks(ranks, *arguments, cwd=folder)
    assert losses(folder / out) == pytest.approx(losses(folder / 'whole'), abs=1e-4)


def test_resuming_is_bit_exact(folder):
    """Also where the settings do not say that it is an adapter."""
    run_forked_ok(
        'train.py', *LORA_RUN, '--out_dir=run', '--max_iters=4', '--keep_saves=2', '--async_save=True', cwd=folder
    )
    output = run_forked_ok('train.py', *RUN, '--out_dir=run', '--init_from=resume', cwd=folder)
    assert 'after 4 iterations' in output and 'lora' not in output and '(4,096 of them trained)' in output
    whole, run = (checkpoint(folder / name / 'ckpt.pt') for name in ('whole', 'run'))
    assert losses(folder / 'run') == losses(folder / 'whole') and run['lora'] == whole['lora']
    assert all(torch.equal(weight, run['model'][name]) for name, weight in whole['model'].items())
    states = [torch.load(folder / name / whole['optimizer_file'])['optimizer']['state'] for name in ('whole', 'run')]
    assert len(states[0]) == 16
    for n, buffers in states[0].items():
        assert all(torch.equal(buffer, states[1][n][name]) for name, buffer in buffers.items())


@shards
def test_one_curve_through_all_splits(folder):
    path = ((2, [FSDP]), (1, []), (2, []), (1, [FSDP]))
    for n, (ranks, split) in enumerate(path):
        resume = ['--init_from=resume'] if n else []
        train_on_ranks(ranks, *LORA_RUN, '--out_dir=moved', *split, *resume, f'--max_iters={2 * n + 2}', cwd=folder)
    saved = checkpoint(folder / 'moved' / 'ckpt.json')
    assert saved['model'].keys() == checkpoint(folder / 'whole' / 'ckpt.pt')['model'].keys()
    stored = {name for name in saved['parts'].shapes() if name.startswith('model.')}
    assert stored == {f'model.{name}' for name in saved['model']}
    iterations = [r['loss'] for r in metrics(folder / 'moved')[0]]
    assert iterations == pytest.approx([r['loss'] for r in metrics(folder / 'whole')[0]], abs=1e-4)


def test_what_reads_an_adapter(folder):
    """sample.py and export.py; another run that starts from its weights, whole or again with an adapter."""
    one = ['--device=cpu', '--num_samples=1', '--max_new_tokens=30']
    text = run_forked_ok('sample.py', '--out_dir=whole', *one, cwd=folder)
    printed = run_forked_ok('export.py', '--out_dir=whole', '--format=nanogpt', '--to=nano', cwd=folder)
    assert 'nano' in printed
    assert text == run_forked_ok('sample.py', '--out_dir=nano', *one, cwd=folder)
    for n, lora in enumerate(([], ['--lora_rank=2', '--lora_targets=c_proj'])):
        arguments = [*TINY, f'--out_dir=next{n}', '--init_from=whole', *lora, '--learning_rate=0', '--max_iters=1']
        run_forked_ok('train.py', *arguments, cwd=folder)
        again = run_forked_ok('evaluate.py', f'--out_dir=next{n}', '--device=cpu', cwd=folder)
        assert again == run_forked_ok('evaluate.py', '--out_dir=whole', '--device=cpu', cwd=folder)
    names = checkpoint(folder / 'next1' / 'ckpt.pt')['model']
    assert len(names) == 8 and all('c_proj.lora_' in name for name in names)
    shutil.copytree(folder / 'next1', folder / 'copy')
    run_forked_ok('train.py', *TINY, '--out_dir=copy', '--init_from=resume', '--max_iters=2', cwd=folder)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--lora_rank=-1'], 'must be at least 0'),
        (['--lora_alpha=0'], 'must be at least 1'),
        ([f'--lora_alpha={10**400}'], 'at most 1,000,000'),
        (['--lora_rank=33'], 'must be at most 32'),
        (
            ['--lora_targets=attn,wte'],
            "called 'wte'; there are attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, lm_head",
        ),
        (['--lora_targets='], "no linear layer is called ''"),
        (['--lora_targets=lm_head'], 'lm_head shares its weight with another layer'),
        (['--optimizer=muon', '--muon_learning_rate=0.1'], 'not with --lora_rank=4'),
        (['--init_from=scratch'], 'belongs to a trained model'),
        (['--out_dir=base'], 'holds the model that the adapter needs'),
        (['--init_from=base/ckpt_best.pt', '--out_dir=base'], 'holds the model that the adapter needs'),
        (['--init_from=resume', '--out_dir=base'], 'has lora_rank=0; leave it out to resume'),
        (['--init_from=resume', '--out_dir=whole', '--lora_rank=8'], 'has lora_rank=4; leave it out to resume'),
        (['--init_from=resume', '--out_dir=whole', '--lora_targets=mlp'], 'has lora_targets=attn,mlp'),
    ],
)
def test_settings_that_do_not_fit(folder, arguments, words):
    result = run_forked('train.py', *LORA_RUN, '--out_dir=none', *arguments, cwd=folder)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count('\n') == 1, result.stderr


def test_a_base_that_has_changed_or_is_gone(folder, tmp_path):
    """One weight in its last bit, another shape of the same weights, a base of that name that is the adapter itself."""
    write_data(tmp_path / 'data' / 'tiny')
    shutil.copytree(folder / 'whole', tmp_path / 'whole')
    resume = ['train.py', *TINY, '--out_dir=whole', '--init_from=resume', '--max_iters=9']
    state = torch.load(folder / 'base' / 'ckpt.pt')

    def refused(words, *command):
        result = run_forked(*command, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
        assert 'whole/ckpt.pt holds an adapter' in result.stderr and words in result.stderr, result.stderr

    refused('its base cannot be opened: --init_from=base: there is no such file', *resume)
    (tmp_path / 'base').mkdir()
    for change in ('bit', 'heads', 'none'):
        changed = {**state, 'model': dict(state['model']), 'model_args': dict(state['model_args'])}
        if change == 'bit':
            weight = changed['model']['transformer.h.1.ln_2.weight'].clone()
            weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
            changed['model']['transformer.h.1.ln_2.weight'] = weight
        if change == 'heads':
            changed['model_args']['n_head'] = 4
        torch.save(changed, tmp_path / 'base' / 'ckpt.pt')
        if change == 'none':
            run_forked_ok(*resume, cwd=tmp_path)
        else:
            refused('an adapter of base, which has changed since', *resume)
            refused('an adapter of base, which has changed since', 'sample.py', '--out_dir=whole', '--device=cpu')
    shutil.rmtree(tmp_path / 'base')
    (tmp_path / 'base').symlink_to('whole')
    refused('names itself as its base', *resume)


def forged(path, **changes):
    """A checkpoint with an adapter that somebody changed: weights by a function, parts of 'lora' by value."""
    state = torch.load(path)
    if 'model' in changes:
        state['model'] = changes.pop('model')(state['model'])
    state['lora'] = {**state['lora'], **changes}
    return state


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'rank': 10**12}, 'must be at most 32'),
        ({'rank': 8}, 'size mismatch'),
        ({'rank': '4'}, 'its lora is'),
        ({'alpha': float('nan')}, 'its lora is'),
        ({'alpha': 10**400}, 'its lora is'),
        ({'targets': 'attn'}, 'other layers have one'),
        ({'model': lambda weights: dict(list(weights.items())[1:])}, 'other layers have one'),
        ({'model': lambda weights: {**weights, 'lm_head.weight': torch.zeros(28, 32)}}, 'other layers have one'),
        (
            {'model': lambda weights: {name: torch.zeros(1).expand(w.shape) for name, w in weights.items()}},
            'larger than',
        ),
        ({'model': lambda weights: {name: 'text' for name in weights}}, 'not tensors of numbers'),
        ({'model': lambda weights: {name: w * float('nan') for name, w in weights.items()}}, 'NaN or infinite'),
    ],
)
def test_forged_adapters(folder, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(folder)
    torch.save(forged(folder / 'whole' / 'ckpt.pt', **changes), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=words):
        open_model(str(tmp_path), '', '')
