"""Saved runs can be loaded, here and in nanoGPT; damaged and forged files are refused."""

import os

import numpy as np
import pytest
import torch
from conftest import SHARED  # noqa: F401
from nanogpt_reference import ReferenceGPT

from common.checkpoint import BEST, LATEST, load_optimizer_buffers, save_checkpoint, set_aside
from common.errors import UserError
from loading import load_checkpoint, model_entry, restore_model
from model import GPT, GPTConfig

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)


def state_of(model, iter_num=5, **more):
    return {**model_entry(model), 'config': {'dataset': 'tiny'}, 'iter_num': iter_num, 'best_val_loss': 1.5, **more}


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize('options', [dict(bias=True), dict(bias=False), dict(mlp='gelu_tanh')])
def test_round_trip_and_nanogpt(tmp_path, options):
    model = GPT(GPTConfig(**SHAPE, **options))
    save_checkpoint(str(tmp_path), state_of(model), {'optimizer': {}}, is_best=True)
    for name in (LATEST, BEST):
        loaded = load_checkpoint(str(tmp_path / name))
        restored = restore_model(loaded, name)
        assert same(model, restored) and restored.config == model.config
        assert restored.lm_head.weight is restored.transformer.wte.weight and restored.lm_head.weight.requires_grad
    # as nanoGPT's sample.py does it: plain torch.load, the config from model_args alone, strict weights
    raw = torch.load(tmp_path / LATEST, map_location='cpu', weights_only=True)
    theirs = ReferenceGPT(**raw['model_args'])
    theirs.load_state_dict(raw['model'])
    ids = torch.arange(8).view(1, 8)
    atol = 1e-3 if options.get('mlp') else 1e-5
    torch.testing.assert_close(theirs(ids).float(), model(ids, ids)[0], rtol=1e-3, atol=atol)


def test_reads_nanogpts(tmp_path):
    """They may hold the compiler's prefix, the slow attention's mask, a loss as a tensor, and the optimizer."""
    model = GPT(GPTConfig(**SHAPE))
    weights = {'_orig_mod.' + name: weight for name, weight in model.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8)
    optimizer = {'state': {}, 'param_groups': []}
    theirs = {
        'model': weights,
        'optimizer': optimizer,
        'model_args': dict(SHAPE, bias=True, dropout=0.0),
        'iter_num': 7,
        'best_val_loss': torch.tensor(1.25),
        'config': {'dataset': 'shakespeare_char'},
    }
    torch.save(theirs, tmp_path / LATEST)
    loaded = load_checkpoint(str(tmp_path / LATEST))
    assert same(model, restore_model(loaded, 'x')) and loaded['best_val_loss'] == 1.25 and loaded['iter_num'] == 7
    assert load_optimizer_buffers(loaded, str(tmp_path))['optimizer'] == optimizer


def test_a_save_is_committed_by_its_last_rename(tmp_path, monkeypatch):
    """Crash after every file operation of a second save: ckpt.pt is one of the two, with its own optimizer file."""
    first, second = (GPT(GPTConfig(**SHAPE)) for _ in range(2))
    seen = set()
    for crash_at in range(12):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        save_checkpoint(str(folder), state_of(first, 1), {'optimizer': {'state': 1, 'param_groups': []}}, True)
        calls = 0

        def crashing(operation):
            def wrapped(*args, **keywords):
                nonlocal calls
                calls += 1
                if calls > crash_at:  # noqa: B023
                    raise KeyboardInterrupt
                return operation(*args, **keywords)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ('fsync', 'replace', 'remove'):
                patch.setattr(os, name, crashing(getattr(os, name)))
            try:
                save_checkpoint(str(folder), state_of(second, 2), {'optimizer': {'state': 2, 'param_groups': []}}, True)
            except KeyboardInterrupt:
                pass
        loaded = load_checkpoint(str(folder / LATEST))
        assert load_optimizer_buffers(loaded, str(folder))['optimizer']['state'] == loaded['iter_num']
        assert same(restore_model(loaded, 'x'), {1: first, 2: second}[loaded['iter_num']])
        load_checkpoint(str(folder / BEST))
        seen.add(loaded['iter_num'])
    assert seen == {1, 2}
    assert sorted(os.listdir(folder)) == [LATEST, BEST, 'ckpt_optimizer_00000002.pt']  # nothing stale is left


def test_a_full_disk_leaves_the_last_save_whole(tmp_path):
    resource = pytest.importorskip('resource', reason='limits on the size of files are a Unix matter')
    model = GPT(GPTConfig(**SHAPE))
    save_checkpoint(str(tmp_path), state_of(model, 1), {'optimizer': {}}, False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        buffers = {'optimizer': {'exp_avg': torch.zeros(10_000)}}  # torch's own error does not say what is wrong
        with pytest.raises(UserError, match='cannot save .* the previous save is still complete: No space left'):
            save_checkpoint(str(tmp_path), state_of(model, 2), buffers, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(str(tmp_path / LATEST))['iter_num'] == 1


def test_setting_an_earlier_run_aside(tmp_path):
    assert set_aside(str(tmp_path)) is None
    for n in (1, 2):
        optimizer_state = {'optimizer': {'state': n, 'param_groups': []}}
        save_checkpoint(str(tmp_path), state_of(GPT(GPTConfig(**SHAPE)), n), optimizer_state, True)
        (tmp_path / 'mine.txt').write_text('stays')
        assert set_aside(str(tmp_path)) == str(tmp_path / f'previous-{n}')
    for n in (1, 2):
        moved = str(tmp_path / f'previous-{n}')
        assert load_optimizer_buffers(load_checkpoint(os.path.join(moved, LATEST)), moved)['optimizer']['state'] == n
    assert sorted(os.listdir(tmp_path)) == ['mine.txt', 'previous-1', 'previous-2']


@pytest.mark.parametrize(
    'change',
    [
        dict(n_layer=3),
        dict(n_layer=10**9),
        dict(n_embd=32),
        dict(vocab_size=10**12),
        dict(n_head=3),
        dict(colour='red'),
        dict(n_embd='16'),
        dict(block_size=9),
        dict(bias=False),
    ],
)
def test_forged_shapes_are_refused(tmp_path, change):
    state = state_of(GPT(GPTConfig(**SHAPE)))
    state['model_args'].update(change)
    save_checkpoint(str(tmp_path), state, {}, False)
    with pytest.raises(UserError):
        restore_model(load_checkpoint(str(tmp_path / LATEST)), 'x')


@pytest.mark.parametrize('missing', ['lm_head.weight', 'transformer.wte.weight', None])
def test_a_tied_matrix_is_stored_once_or_twice(missing):
    model = GPT(GPTConfig(**SHAPE))
    state = state_of(model)
    state['model'] = {name: weight.clone() for name, weight in state['model'].items() if name != missing}
    restored = restore_model(state, 'x')
    assert same(model, restored) and restored.lm_head.weight is restored.transformer.wte.weight


def test_a_head_that_is_another_matrix_is_not_dropped():
    model = GPT(GPTConfig(**SHAPE))
    state = state_of(model)
    head = torch.randn_like(model.lm_head.weight)
    state['model'] = {**state['model'], 'lm_head.weight': head}
    with pytest.raises(UserError, match='the head differs from the embedding'):
        restore_model(state, 'x')
    restored = restore_model({**state, 'model_args': {**state['model_args'], 'tie_weights': False}}, 'x')
    assert torch.equal(restored.lm_head.weight, head) and not torch.equal(restored.transformer.wte.weight, head)
    del state['model']['lm_head.weight']
    with pytest.raises(UserError, match='lm_head.weight'):
        restore_model({**state, 'model_args': {**state['model_args'], 'tie_weights': False}}, 'x')


def test_numbers_of_numpy_and_lists_are_data(tmp_path):
    """As other training loops save them: numpy scalars, under the module name of any version; lists and dicts."""
    model = GPT(GPTConfig(**SHAPE))
    state = state_of(model, np.int64(5), best_iter=np.int32(3))
    state['best_val_loss'] = np.float64(1.5)
    for key, value in state['model_args'].items():
        state['model_args'][key] = np.int64(value) if type(value) is int else value
    state['model_args']['dropout'] = np.float32(0.5)
    state['config'] = {
        'betas': [0.9, np.float32(0.5)],
        'schedule': {'steps': (1, 2)},
        'flag': np.bool_(True),
        'dataset': 'tiny',
        'device': torch.device('cpu'),
        'dtype': torch.float16,
    }
    torch.save(state, tmp_path / LATEST)
    loaded = load_checkpoint(str(tmp_path / LATEST))
    assert (loaded['iter_num'], loaded['best_iter'], loaded['best_val_loss']) == (5, 3, 1.5)
    assert loaded['config'] == {
        'betas': [0.9, 0.5],
        'schedule': {'steps': (1, 2)},
        'flag': True,
        'dataset': 'tiny',
        'device': "device(type='cpu')",
        'dtype': 'torch.float16',
    }
    assert {type(value) for value in loaded['model_args'].values()} <= {int, float, bool, str}
    restored = restore_model(loaded, 'x')
    assert same(model, restored) and restored.config.dropout == 0.5
