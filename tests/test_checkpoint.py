"""Saved runs can be loaded, here and in nanoGPT; damaged and forged files are refused."""

import json
import os
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_forked_ranks
from nanogpt_reference import ReferenceGPT

from common import parts, saving
from common.checkpoint import BEST, LATEST, latest, load_data, load_optimizer_buffers, read_whole, set_aside
from common.distributed import Ranks
from common.errors import UserError
from common.saving import Saver
from loading import load_checkpoint, model_entry, restore_model
from model import GPT, GPTConfig

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # deprecations in torch itself
    import save_ranks  # once, for all forks
    from torch.distributed.checkpoint import metadata as formats

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)


def state_of(model, iter_num=5, **more):
    return {**model_entry(model), 'config': {'dataset': 'tiny'}, 'iter_num': iter_num, 'best_val_loss': 1.5, **more}


def save_checkpoint(out_dir, state, optimizer, is_best, **options):
    Saver(out_dir, Ranks(), sharded=False, **options).save(state, optimizer, is_best)


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


# --- saves in parts ---------------------------------------------------------------------------------------------------


def on_ranks(world_size, function, *arguments, cwd):
    """Call a function of save_ranks.py on several ranks, which must succeed -> what they printed."""
    results = run_forked_ranks(world_size, 'tests/save_ranks.py', function, *arguments, cwd=cwd)
    output = ''.join(result.stdout + result.stderr for result in results)
    assert not any(result.returncode for result in results), output
    return output


def save_simply(out_dir, n, sharded, is_best=False, **options):
    """Save a state whose numbers are all n, on one rank."""
    buffers = {'exp_avg': torch.full((7, 2), float(n)), 'step': torch.tensor(float(n))}
    state = {'model': {'w': torch.full((7, 2), float(n))}, 'iter_num': n, 'config': {}}
    optimizer = {'optimizer': {'state': {0: buffers}, 'param_groups': [{'params': [0]}]}, 'scaler': None}
    saver = Saver(str(out_dir), Ranks(), sharded, **options)
    saver.save(state, optimizer, is_best)
    saver.finish()


def load_simply(out_dir, name=LATEST):
    """The n of a save, after a look at all of it."""
    checkpoint = read_whole(load_data(latest(str(out_dir), name)))
    n, found = checkpoint['iter_num'], [checkpoint['model']['w']]
    if name != BEST or 'parts' in checkpoint:
        found += load_optimizer_buffers(checkpoint, str(out_dir))['optimizer']['state'][0].values()
    assert all((tensor == n).all() for tensor in found)
    return n


def test_parts_are_read_by_any_number_of_ranks(tmp_path):
    out_dir = str(tmp_path)
    assert not on_ranks(4, 'save', out_dir, '4', '7', cwd=tmp_path)
    assert sorted(os.listdir(out_dir)) == ['ckpt.json', 'ckpt_00000007']
    checkpoint = load_data(latest(out_dir))
    assert all(tensor.is_meta for tensor in checkpoint['model'].values())
    read_whole(checkpoint)
    model, optimizer = save_ranks.expected(7)
    assert {**checkpoint['model']}.keys() == model.state_dict().keys()
    assert all(torch.equal(checkpoint['model'][name], weight) for name, weight in model.state_dict().items())
    assert checkpoint['model']['head.weight'] is checkpoint['model']['embedding.weight']  # tied, and stored once
    saved = load_optimizer_buffers(checkpoint, out_dir, optimizer)['optimizer']
    for number, buffers in optimizer.state_dict()['state'].items():
        assert buffers.keys() == saved['state'][number].keys()
        assert all(torch.equal(buffer, saved['state'][number][name]) for name, buffer in buffers.items())
    assert saved['param_groups'] == optimizer.state_dict()['param_groups']
    on_ranks(2, 'load', out_dir, '2', '7', cwd=tmp_path)
    on_ranks(4, 'load', out_dir, '2x2', '7', cwd=tmp_path)
    on_ranks(4, 'save', out_dir, '2x2', '8', cwd=tmp_path)  # each part by one of the two ranks that have it
    on_ranks(3, 'load', out_dir, '3', '8', cwd=tmp_path)
    assert sorted(os.listdir(out_dir)) == ['ckpt.json', 'ckpt_00000008']


def test_a_save_while_training_goes_on_is_of_its_moment(tmp_path, monkeypatch):
    on_ranks(2, 'save_while_training', str(tmp_path), cwd=tmp_path)
    on_ranks(2, 'load', str(tmp_path), '2', '4', cwd=tmp_path)

    weight, trained, save = torch.ones(7, 2), threading.Event(), saving.save
    monkeypatch.setattr(saving, 'save', lambda *arguments: trained.wait() and save(*arguments))
    saver = Saver(str(tmp_path / 'one'), Ranks(), sharded=False, asynchronous=True)
    (tmp_path / 'one').mkdir()
    saver.save({'model': {'w': weight, 'tied': weight}, 'iter_num': 5}, {'optimizer': {}}, True)
    weight.zero_()
    trained.set()
    saver.finish()
    for name in (LATEST, BEST):
        model = load_data(latest(str(tmp_path / 'one'), name))['model']
        assert (model['w'] == 1).all() and model['w'].data_ptr() == model['tied'].data_ptr()


def test_a_rank_without_space_fails_all_with_one_line(tmp_path):
    results = run_forked_ranks(3, 'tests/save_ranks.py', 'fill_the_disk', str(tmp_path), 'now', cwd=tmp_path)
    assert [result.returncode for result in results] == [2, 2, 2]
    (line,) = ''.join(result.stdout + result.stderr for result in results).strip().splitlines()
    assert line.startswith('error: cannot save') and line.endswith('still complete: File too large (on rank 2)')
    assert sorted(os.listdir(tmp_path)) == ['ckpt.json', 'ckpt_00000001', 'ckpt_best.json']
    on_ranks(1, 'load', str(tmp_path), '1', '1', cwd=tmp_path)


def test_a_save_that_fails_later_is_told_and_the_next_works(tmp_path, capsys, monkeypatch):
    output = on_ranks(2, 'fill_the_disk', str(tmp_path), 'later', cwd=tmp_path)
    assert output.startswith('warning: cannot save') and len(output.strip().splitlines()) == 1
    on_ranks(1, 'load', str(tmp_path), '1', '3', cwd=tmp_path)

    (tmp_path / 'one').mkdir()
    saver = Saver(str(tmp_path / 'one'), Ranks(), sharded=False, asynchronous=True)
    state = {'model': {'w': torch.ones(3)}, 'iter_num': 1}
    shutil.rmtree(tmp_path / 'one')
    saver.save(state, {'optimizer': {}}, False)
    saver.wait()
    (tmp_path / 'one').mkdir()
    saver.save(state, {'optimizer': {}}, False)
    assert 'warning: cannot save' in capsys.readouterr().err
    saver.wait()
    assert load_data(latest(str(tmp_path / 'one')))['iter_num'] == 1
    shutil.rmtree(tmp_path / 'one')
    saver.save(state, {'optimizer': {}}, False)
    with pytest.raises(UserError, match='cannot save .* there is no earlier save: No such file'):
        saver.finish()


def die_after(n):
    """Let this process die when it has made so many changes of files that a crash could keep from the disk."""
    left = n

    def dying(operation):
        def wrapped(*args, **keywords):
            nonlocal left
            left -= 1
            return os._exit(9) if left < 0 else operation(*args, **keywords)

        return wrapped

    for name in ('fsync', 'replace', 'rename', 'remove', 'mkdir', 'unlink', 'rmdir'):
        setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize('before, after', [(True, True), (True, False), (False, True)])
def test_a_crash_at_any_moment_leaves_a_save(tmp_path, before, after):
    """The process dies at every file operation of a second save. sharded before, after: in parts or as ckpt.pt."""
    first = tmp_path / 'first'
    first.mkdir()
    save_simply(first, 1, before, is_best=True)
    seen = set()
    for crash_at in range(100):
        folder = tmp_path / str(crash_at)
        shutil.copytree(first, folder)
        pid = os.fork()
        if not pid:
            die_after(crash_at)
            save_simply(folder, 2, after, is_best=True)
            os._exit(0)
        crashed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen.add((load_simply(folder), load_simply(folder, BEST)))
        save_simply(folder, 3, after, is_best=True)  # whatever is left does not disturb it, and goes
        assert load_simply(folder) == load_simply(folder, BEST) == 3
        names = (
            ['ckpt.json', 'ckpt_00000003', 'ckpt_best.json'] if after else [LATEST, BEST, 'ckpt_optimizer_00000003.pt']
        )
        assert sorted(os.listdir(folder)) == names
        shutil.rmtree(folder)
        if not crashed:
            break
    assert crash_at > 8 and seen == {(1, 1), (1, 2), (2, 2)}


def test_the_last_saves_are_kept_in_either_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out_dir = Path('out')
    out_dir.mkdir()
    shutil.copy(__file__, out_dir / 'ckpt_00000009.pt')  # someone's: no optimizer belongs to it
    best = [BEST, 'ckpt_00000009.pt']
    for n, sharded in enumerate([False, False, True, True, False], 1):
        save_simply(out_dir, n, sharded, is_best=n == 1, keep=3)
        assert (load_simply(out_dir), load_simply(out_dir, BEST)) == (n, 1)
        for kept in range(max(1, n - 2), n):
            assert load_simply(out_dir, f'ckpt_0000000{kept}') == load_simply(out_dir, f'ckpt_0000000{kept}.pt') == kept
        assert not latest(str(out_dir), f'ckpt_0000000{n - 3}')
    names = [LATEST, 'ckpt_00000003', 'ckpt_00000004', 'ckpt_optimizer_00000005.pt', *best]
    assert sorted(os.listdir(out_dir)) == sorted(names)
    # back to a kept one, whose next iteration is then saved again
    shutil.copy(out_dir / 'ckpt_00000003' / 'ckpt.json', out_dir)
    assert load_simply(out_dir) == 3
    save_simply(out_dir, 4, True, keep=2)
    kept = ['ckpt_00000005.pt', 'ckpt_optimizer_00000005.pt']
    assert sorted(os.listdir(out_dir)) == sorted(['ckpt.json', 'ckpt_00000004-2', *kept, *best])
    shutil.copy(out_dir / 'ckpt_00000005.pt', out_dir / LATEST)
    assert load_simply(out_dir) == 5
    save_simply(out_dir, 6, False, keep=2)  # keeps the one it replaces
    assert sorted(os.listdir(out_dir)) == sorted([LATEST, 'ckpt_optimizer_00000006.pt', *kept, *best])
    shutil.copy(out_dir / 'ckpt_00000005.pt', out_dir / LATEST)
    assert (load_simply(out_dir), load_simply(out_dir, 'ckpt_00000005.pt')) == (5, 5)
    save_simply(out_dir, 7, False)
    assert sorted(os.listdir(out_dir)) == sorted([LATEST, 'ckpt_optimizer_00000007.pt', *best])


def test_the_best_save_in_parts_stays(tmp_path):
    for n in (1, 2, 3):
        save_simply(tmp_path, n, sharded=True, is_best=n == 1)
    assert sorted(os.listdir(tmp_path)) == ['ckpt.json', 'ckpt_00000001', 'ckpt_00000003', 'ckpt_best.json']
    assert (load_simply(tmp_path), load_simply(tmp_path, BEST)) == (3, 1)
    shutil.copytree(tmp_path / 'ckpt_00000001', tmp_path / 'elsewhere')  # a folder is a checkpoint by itself
    assert load_simply(tmp_path / 'elsewhere') == 1
    assert set_aside(str(tmp_path)) == str(tmp_path / 'previous-1')
    assert sorted(os.listdir(tmp_path)) == ['elsewhere', 'previous-1'] and latest(str(tmp_path)) is None
    assert (load_simply(tmp_path / 'previous-1'), load_simply(tmp_path / 'previous-1', BEST)) == (3, 1)


def forged(change):
    """Damage: change the metadata of a save in parts, which is consistent otherwise."""

    def damage(out_dir, folder):
        content = pickle.loads((folder / '.metadata').read_bytes())
        content = change(content) or content
        (folder / '.metadata').write_bytes(pickle.dumps(content))
        record = json.loads((out_dir / 'ckpt.json').read_text())
        record['files']['.metadata'] = os.path.getsize(folder / '.metadata')
        (out_dir / 'ckpt.json').write_text(json.dumps(record))

    return damage


def place(content, name='model.w'):
    return next(info for index, info in content.storage_data.items() if index.fqn == name)


def recorded(**changes):
    """Damage: change ckpt.json."""

    def damage(out_dir, folder):
        record = json.loads((out_dir / 'ckpt.json').read_text())
        (out_dir / 'ckpt.json').write_text(json.dumps({**record, **changes}))

    return damage


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def sized(content, name='model.w', size=(7, 2), **chunk):
    """Change what metadata says of a tensor, and of its only part."""
    tensor = content.state_dict_metadata[name]
    tensor.size = torch.Size(size)
    for key, value in chunk.items():
        setattr(tensor.chunks[0], key, torch.Size(value))


DAMAGES = {
    'a part is missing': lambda out, folder: (folder / '__0_0.distcp').unlink(),
    'has .* bytes in place of': lambda out, folder: os.truncate(folder / '__0_0.distcp', 700),
    'state.pt is missing': lambda out, folder: (folder / 'state.pt').unlink(),
    '.metadata is missing': lambda out, folder: (folder / '.metadata').unlink(),
    'cannot be read: .*use another save': lambda out, folder: (folder / '__0_0.distcp').write_bytes(
        bytes(os.path.getsize(folder / '__0_0.distcp'))
    ),
    'cannot be read as a checkpoint': lambda out, folder: (out / 'ckpt.json').write_text('{"folder": '),
    'cannot be read as a checkpoint: ': lambda out, folder: (out / 'ckpt.json').write_text('[1]'),
    'outside its folder': recorded(folder='../' * 9 + 'etc'),
    'outside its folder ': recorded(folder='..'),
    'outside its folder  ': recorded(files={'state.pt': 1, '../ckpt.json': 1}),
    'are not numbers': recorded(iter_num='5'),
    'names no state.pt or no .metadata': recorded(files={}),
    'asks to import': forged(lambda content: Code()),
    'asks to import ': forged(lambda content: setattr(content, 'planner_data', Code())),
    'not a tensor': forged(
        lambda content: content.state_dict_metadata.update({'model.w': formats.BytesStorageMetadata()})
    ),
    'not in a file of this save': forged(lambda content: setattr(place(content), 'relative_path', '../../secret')),
    'not in a file of this save ': forged(lambda content: setattr(place(content), 'length', 10**9)),
    'not in a file of this save  ': forged(lambda content: setattr(place(content), 'offset', -1)),
    'unknown way': forged(lambda content: setattr(place(content), 'transform_descriptors', ['zstd'])),
    'are missing': forged(lambda content: sized(content, size=(8, 2))),
    'claims more bytes': forged(lambda content: sized(content, size=(10**6, 2), sizes=(10**6, 2))),
    'do not make it up': forged(lambda content: sized(content, offsets=(1, 0))),
    'do not fit it': forged(lambda content: sized(content, sizes=(7, 1))),
    'cannot be read: ': forged(lambda content: sized(content, size=(2**40, 2**40))),
    'it has no': forged(lambda content: content.state_dict_metadata.pop('model.w') and None),
}


def test_parts_on_another_disk_are_missed(tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    save_simply(tmp_path / 'run', 1, sharded=False)
    finish = parts.Writer.finish

    def without_a_part(writer, **results):
        os.remove(writer.path / '__0_0.distcp')
        finish(writer, **results)

    with monkeypatch.context() as patch:
        patch.setattr(parts.Writer, 'finish', without_a_part)
        with pytest.raises(UserError, match='still complete: .* all nodes need a disk that they share'):
            save_simply(tmp_path / 'run', 2, sharded=True)
    assert load_simply(tmp_path / 'run') == 1 and not (tmp_path / 'run' / 'ckpt_00000002').exists()
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(UserError, match='there is no earlier save: .*run is gone'):
        save_simply(tmp_path / 'run', 2, sharded=True)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('words', DAMAGES)
def test_damaged_and_forged_parts_are_refused(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    save_simply(tmp_path, 5, sharded=True)
    (tmp_path / 'secret').write_bytes((tmp_path / 'ckpt_00000005' / '__0_0.distcp').read_bytes())
    DAMAGES[words](tmp_path, tmp_path / 'ckpt_00000005')
    with pytest.raises(UserError, match=words.strip().removeprefix('a part ')) as error:
        read_whole(load_data(latest(str(tmp_path))))
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / 'executed').exists()


def test_code_beside_the_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_simply(tmp_path, 5, sharded=True)
    path = tmp_path / 'ckpt_00000005' / 'state.pt'
    torch.save({'model': Code()}, path)
    record = json.loads((tmp_path / 'ckpt.json').read_text())
    record['files']['state.pt'] = os.path.getsize(path)
    (tmp_path / 'ckpt.json').write_text(json.dumps(record))
    with pytest.raises(UserError, match='it holds code'):
        load_data(latest(str(tmp_path)))
    assert not (tmp_path / 'executed').exists()


def test_ranks_refuse_a_damaged_part_together(tmp_path):
    on_ranks(2, 'save', str(tmp_path), '2', '7', cwd=tmp_path)
    part = tmp_path / 'ckpt_00000007' / '__1_0.distcp'
    part.write_bytes(bytes(os.path.getsize(part)))
    results = run_forked_ranks(2, 'tests/save_ranks.py', 'load', str(tmp_path), '2', '7', cwd=tmp_path)
    assert [result.returncode for result in results] == [2, 2]
    (line,) = ''.join(result.stdout + result.stderr for result in results).strip().splitlines()
    assert line.startswith('error: ') and '(on rank 1); use another save' in line
