"""check.py: it finds what is planted, by its own check, and nothing else; it leaves no trace, also on several ranks."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHARS, REPO, TINY, copy_scripts, run_forked, run_forked_ok, run_forked_ranks, write_data

from configurator import configure, read_settings
from dataloader import DataSet
from model import GPTConfig
from preflight import datachecks
from preflight.checks import Batch, as_arguments, check_schedule, cut
from preflight.datachecks import check_documents, check_leak, find_passages, passages, spans, window_hashes

CHECKS = """
    ids splits tokenizer leak documents schedule epochs targets weights first_loss gradients optimizer learning_rate
    by_heart ranks loss causality clocks save disk
""".split()
LONG = ['--max_iters=100', '--warmup_iters=10', '--lr_decay_iters=100', '--eval_interval=50']


def check(folder, *arguments, script='check.py'):
    """Run check.py with --json -> its exit status, {check: (level, found, advice)} of what is not ok, names of all."""
    result = run_forked(script, *TINY, *LONG, '--json=True', *arguments, cwd=folder)
    assert result.returncode in (0, 2) and 'Traceback' not in result.stderr, result.stdout + result.stderr
    answer = json.loads(result.stdout)
    findings = {f['check']: (f['level'], f['found'], f['advice']) for f in answer['findings']}
    bad = {name: finding for name, finding in findings.items() if finding[0] != 'ok'}
    assert answer['errors'] == sum(level == 'error' for level, *_ in bad.values())
    assert result.returncode == (2 if answer['errors'] else 0)
    assert all(advice for name, (_, _, advice) in bad.items() if name != 'settings')
    return result.returncode, bad, list(findings)


def files_in(folder):
    """All files below a folder -> {path: (content, time of the last change)}."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


def test_a_sound_run(workspace):
    """Nothing is found, a line for each check, and nothing is left behind."""
    before = files_in(workspace)
    status, bad, names = check(workspace)
    assert (status, bad) == (0, {}) and [name.replace(' ', '_') for name in names] == CHECKS
    assert files_in(workspace) == before and not (workspace / 'out').exists()


def test_lines(workspace):
    """Without --json each finding is a line; an error is one of them, and the status is 2 after all of them."""
    result = run_forked('check.py', *TINY, *LONG, '--keep_saves=100000000000', cwd=workspace)
    *lines, last = result.stdout.splitlines()
    assert result.returncode == 2 and last == f'{len(CHECKS)} checks: 1 errors, 0 warnings'
    assert [line.split()[0] for line in lines] == ['ok'] * (len(CHECKS) - 1) + ['error']
    assert lines[-1].startswith('error    disk') and 'lower --keep_saves' in lines[-1]


# --- planted faults ---------------------------------------------------------------------------------------------------

# Edits of the code, as a person would make them: {check that must find it: [(file, old text, new text), …]}. Those that
# do not hide one another are planted together.
EDITS = {
    'labels not shifted, a frozen layer, weights rounded by a save': {
        'targets': [('dataloader.py', 'rows[:, :-1], rows[:, 1:], None', 'rows[:, :-1], rows[:, :-1], None')],
        'gradients': [('train.py', 'n_ids = min(', 'model.transformer.h[0].requires_grad_(False)\nn_ids = min(')],
        'save': [
            (
                'loading.py',
                'for name, weight in weights.items()}, assign=True)',
                """for name, weight in
            weights.items()}, assign=True)
        model.half().float()""",
            )
        ],
    },
    'labels that the model shifts again, an optimizer that is not resumed': {
        'loss': [('model.py', 'logits, max_rows = None', 'targets = targets.roll(-1, 1); logits, max_rows = None')],
        'save': [
            ('train.py', '    restore_optimizer(opt, scaler, checkpoint, out_dir)', "    checkpoint.pop('model')")
        ],
    },
    'a model that sees the future, data that starts again on resume': {
        'causality': [('common/attention.py', 'causal = mask is None and q.size(2) > 1', 'causal = False')],
        'save': [('train.py', "device, iter_num, progress['windows_taken'])", "device, 0, progress['windows_taken'])")],
    },
    'an optimizer that misses parameters': {
        'optimizer': [
            ('optim.py', 'if p.dim() < 2]', 'if p.dim() < 1]'),
            ('optim.py', "    assert once, 'every parameter must be in exactly one group'\n", ''),
        ]
    },
    'a parameter that nothing uses': {
        'gradients': [('model.py', 'return x + self.mlp(self.ln_2(x))', 'return x + self.mlp(x)')]
    },
    'weights that start as NaN': {'weights': [('model.py', 'nn.init.ones_(value)', 'value.fill_(math.nan)')]},
    'weights that start too large': {'first loss': [('model.py', '        std = 0.02\n', '        std = 2.0\n')]},
}


@pytest.mark.parametrize('name', EDITS)
def test_planted_in_the_code(workspace, name):
    """Each fault is found by its own check, and the other checks find nothing."""
    copy_scripts(workspace / 'copy', [edit for edits in EDITS[name].values() for edit in edits])
    _, bad, _ = check(workspace, script=workspace / 'copy' / 'check.py')
    assert {check: level for check, (level, *_) in bad.items()} == dict.fromkeys(EDITS[name], 'error'), bad


def leak(folder):
    """The second half of val stands in train."""
    ids = np.fromfile(folder / 'train.bin', '<u2')
    val = np.fromfile(folder / 'val.bin', '<u2')
    val[500:] = ids[1000:1500]
    val.tofile(folder / 'val.bin')


def other_alphabet(folder):
    """val was encoded by another order of the characters."""
    skewed = np.fromfile(folder / 'train.bin', '<u2') // 3  # else all are equally frequent
    skewed.tofile(folder / 'train.bin')
    (skewed[-1000:] + 15).astype('<u2').tofile(folder / 'val.bin')


def other_tokenizer(folder):
    """The ids go beyond the vocabulary."""
    (np.fromfile(folder / 'train.bin', '<u2') + 10).astype('<u2').tofile(folder / 'train.bin')


def other_text(folder):
    """meta.json was made for another text."""
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'bytes': {'train': 9000, 'val': 1000}}))


def padding(folder):
    np.zeros(4000, '<u2').tofile(folder / 'train.bin')


DATA = {
    'leaked validation text': ('leak', leak),
    'validation text of another encoding': ('splits', other_alphabet),
    'ids of another tokenizer': ('settings', other_tokenizer),
    'ids of another text': ('tokenizer', other_text),
    'padding alone': ('ids', padding),
}


@pytest.mark.parametrize('name', DATA)
def test_planted_in_the_data(workspace, name):
    found_by, plant = DATA[name]
    plant(workspace / 'data' / 'tiny')
    _, bad, _ = check(workspace)
    assert bad.get(found_by, ('ok',))[0] == 'error', bad


FLAGS = {
    'learning_rate=10': 'learning rate',
    'optimizer=muon --muon_learning_rate=10': 'learning rate',
    'keep_saves=100000000000': 'disk',
}


@pytest.mark.parametrize('flags', FLAGS)
def test_planted_in_the_settings(workspace, flags):
    _, bad, _ = check(workspace, *f'--{flags}'.split())
    assert {name: level for name, (level, *_) in bad.items()} == {FLAGS[flags]: 'error'}


@pytest.mark.parametrize(
    'flags, words',
    [
        ('warmup_iters=80', 'lower --warmup_iters=80'),
        ('lr_decay_iters=10000', 'set --lr_decay_iters=100,'),
        ('lr_decay_iters=40', 'set --lr_decay_iters=100,'),
        ('eval_interval=101', 'lower --eval_interval=101'),
    ],
)
def test_schedule(tmp_path, flags, words):
    """Settings that hardly can be meant, on train.py's own set-up without the rest of the checks."""
    train = {'__file__': str(REPO / 'train.py'), **read_settings(REPO / 'train.py')}
    config = configure(train, [*TINY, *LONG, f'--{flags}'], fields=GPTConfig)
    finding = check_schedule(SimpleNamespace(**config, config=config, iter_num=0))
    assert finding.level == 'warning' and words in finding.advice


# --- runs that exist --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workspace with a run of 60 iterations."""
    folder = tmp_path_factory.mktemp('trained')
    write_data(folder / 'data' / 'tiny')
    run_forked_ok('train.py', *TINY, *LONG, '--max_iters=60', '--keep_saves=2', cwd=folder)
    return folder


@pytest.mark.parametrize('flags', ['init_from=resume', 'init_from=out --out_dir=new --lora_rank=2'])
def test_a_run_stays_as_it_is(trained, flags):
    """Its files, their times too; also where it is resumed, or gets an adapter."""
    before = files_in(trained)
    assert check(trained, *f'--{flags}'.split())[:2] == (0, {})
    assert files_in(trained) == before


def test_weights_of_another_tokenizer(trained, tmp_path):
    """The ids are valid, and mean other characters than those that the model was trained on."""
    folder = shutil.copytree(trained, tmp_path / 'copy')
    for path in (folder / 'data' / 'tiny').glob('*.bin'):
        (len(CHARS) - 1 - np.fromfile(path, '<u2')).astype('<u2').tofile(path)
    _, bad, _ = check(folder, '--init_from=out', '--out_dir=new')
    assert {name: level for name, (level, *_) in bad.items()} == {'first loss': 'error'}


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_ranks(workspace, parallel):
    """The main rank alone prints; as many checks as one process makes."""
    before = files_in(workspace)
    results = run_forked_ranks(2, 'check.py', *TINY, *LONG, f'--parallel={parallel}', cwd=workspace)
    lines = results[0].stdout.splitlines()
    bad = [line for line in lines[:-1] if not line.startswith('ok')]
    # one rank may look slow on a machine that does other things; that is not for a test
    assert all('ranks' in line and 'times the median' in line for line in bad), lines + [r.stderr for r in results]
    assert [result.returncode for result in results] == [2 if bad else 0] * 2
    assert len(lines) == len(CHECKS) + 1 and results[1].stdout == ''
    assert files_in(workspace) == before


def test_ranks_that_do_not_exchange_gradients(workspace):
    edit = ('parallel.py', 'model.require_backward_grad_sync = now', 'model.require_backward_grad_sync = False')
    copy_scripts(workspace / 'copy', [edit])
    results = run_forked_ranks(2, workspace / 'copy' / 'check.py', *TINY, *LONG, cwd=workspace)
    assert 2 in [result.returncode for result in results]
    assert any('error    ranks' in line and 'their weights differ' in line for line in results[0].stdout.splitlines())


# --- the parts, against plain ways of doing the same ------------------------------------------------------------------


def test_spans():
    """All of a split, each token once; of a larger one, pieces from its start to its end that do not overlap."""
    for length, most in ((1, 10), (10, 10), (3 * datachecks.PIECE + 5, 4 * datachecks.PIECE)):
        starts, ends = zip(*spans(length, most))
        assert (0, *ends) == (*starts, length)
    found = spans(10 * datachecks.PIECE, 3 * datachecks.PIECE)
    assert found[0][0] == 0 and found[-1][1] == 10 * datachecks.PIECE and len(found) == 3
    assert sum(end - start for start, end in found) == 3 * datachecks.PIECE


def test_passages_are_found_as_by_comparing_all(workspace, monkeypatch):
    """Against a set of all windows of train; pieces are small, so that windows lie across their ends."""
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 29, 3000), rng.integers(0, 29, 640)
    for n, (start, at) in enumerate(((70, 0), (95, 128), (2936, 256), (0, 320))):
        length = 64 - n % 2  # every second one lacks a token
        val[at : at + length] = train[start : start + length]
    for name, ids in (('train', train), ('val', val)):
        ids.astype('<u2').tofile(workspace / 'data' / 'tiny' / f'{name}.bin')
    (workspace / 'data' / 'tiny' / 'meta.json').write_text(json.dumps({'vocab_size': 29}))
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(datachecks, 'PIECE', 100)
    data = DataSet('tiny')
    rows = passages(data.tokens('val'), 1000)
    windows = {tuple(train[i : i + 64]) for i in range(len(train) - 63)}
    expected = [tuple(row) in windows for row in rows.tolist()]
    assert find_passages(rows, data.tokens('train'), 10**6).tolist() == expected and sum(expected) == 2
    assert len(set(window_hashes(train).tolist())) == len(windows)
    finding = check_leak(data.tokens('train'), data.tokens('val'), 1000, 10**6)
    assert finding.level == 'warning' and finding.found.startswith('20.0% of 10 passages')


def test_repeated_documents(tmp_path, monkeypatch):
    """Counted by hand: of 20 documents of train 4 are copies, of 10 of val 3 stand in train. The last is not ended."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, rng.integers(40, 90)).tolist()) for _ in range(40)]
    splits = {'train': texts[:16] + texts[:4], 'val': texts[5:8] + texts[20:27]}
    folder = tmp_path / 'data' / 'documents'
    folder.mkdir(parents=True)
    for split, documents in splits.items():
        np.array([id for text in documents for id in (*text, 256)], dtype='<u2').tofile(folder / f'{split}.bin')
    (folder / 'meta.json').write_text(json.dumps({'tokenizer': {'kind': 'byte'}, 'vocab_size': 257, 'dtype': 'uint16'}))
    monkeypatch.chdir(tmp_path)
    data = DataSet('documents')
    finding = check_documents(data, {split: data.tokens(split) for split in splits}, 10**6)
    assert finding.level == 'warning'
    assert finding.found.startswith('4 of 20 of train repeat an earlier one (20.0%), 3 of 10 of val stand in train')


def test_cut_keeps_targets():
    """The piece has as many targets as any of its length, and the same tokens in x, y and starts."""
    x = torch.arange(40).view(2, 20)
    y = torch.where((x % 20 > 11) & (x % 20 < 15), x + 1, -1)
    piece = cut(Batch(x, y, torch.full_like(x, 13)), 2, 4)
    assert (piece.y >= 0).sum() == 6 and piece.x.shape == (2, 4)
    assert torch.equal(piece.y[piece.y >= 0], piece.x[piece.y >= 0] + 1)
    assert torch.equal(piece.starts, (13 - piece.x[0, 0]).clamp_min(0).expand(2, 4))


def test_arguments_give_the_same_settings():
    """set_up() hands train.py its settings as a command line."""
    values = {'a': 1e-5, 'b': 3, 'c': "it's=--x", 'd': False, 'e': ('x', 'y z'), 'f': (), 'g': '', 'h': -2.0}
    defaults = {
        'a': 0.0,
        'b': 0,
        'c': '',
        'd': True,
        'e': ('q',),
        'f': ('q',),
        'g': 'q',
        'h': 0.0,
        '__file__': __file__,
    }
    assert configure(defaults, as_arguments(values)) == values
