"""The training order as a function of seed and step, on any number of ranks; windows, shards, checks of the files."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import CHARS, TINY, metrics, run_forked, run_forked_ok, train_on_ranks, write_data

import dataloader
from common.distributed import Ranks
from common.errors import UserError
from dataloader import DataSet, Tokens, TrainBatches, eval_batches, read_meta, text_checksum, unpickle
from evaluation import evaluate
from loading import load_checkpoint, restore_model
from model import GPT, GPTConfig
from tokenizer import spec_from_meta, spec_from_nanogpt

CPU = torch.device('cpu')


@pytest.fixture
def counting(tmp_path):
    """A split whose ids count up, so that a window shows its offset: 1003 train tokens."""
    np.arange(1003, dtype='<u2').tofile(tmp_path / 'train.bin')
    return Tokens(str(tmp_path), 'train', {}, 2000)


def global_batch(tokens, world_size, order, step=0, steps=1):
    """First tokens of the sequences that all ranks together train on -> a list per micro-batch, in order."""
    rows = {}
    for rank in range(world_size):
        batches = TrainBatches(tokens, 10, 3, 4, 7, order, Ranks(rank, rank, world_size), CPU, step)
        for s in range(steps):
            for micro in range(rank, 4, world_size):
                x, y, *_ = batches.next()
                assert x.shape == y.shape == (3, 10) and x.dtype == torch.int64
                assert torch.equal(y[:, :-1], x[:, 1:]) and torch.equal(y, x + 1)  # the ids count up
                rows[s, micro] = x[:, 0].tolist()
    return [rows[key] for key in sorted(rows)]


@pytest.mark.parametrize('order', ['random', 'shuffle'])
def test_any_number_of_ranks_trains_on_the_same_tokens(counting, order):
    alone = global_batch(counting, 1, order, steps=12)
    assert alone == global_batch(counting, 2, order, steps=12) == global_batch(counting, 4, order, steps=12)


@pytest.mark.parametrize('order', ['random', 'shuffle'])
def test_resuming_replays_nothing(counting, order):
    assert global_batch(counting, 1, order, steps=30)[4 * 19 :] == global_batch(counting, 2, order, step=19, steps=11)


@pytest.mark.parametrize('order', ['random', 'shuffle'])
def test_a_growing_batch(counting, order):
    """From 2 to 6 micro-batches over 5 steps.

    The sequences are the same on any number of ranks and after resuming, and an epoch leaves none out.
    """

    def rows(world_size, step, end):
        taken = {}
        for rank in range(world_size):
            batches = TrainBatches(counting, 10, 3, 6, 7, order, Ranks(rank, rank, world_size), CPU, step, ramp=(2, 5))
            for s in range(step, end):
                for micro in range(rank, batches.micro_batches_at(s), world_size):
                    taken[s, micro] = batches.next()[0][:, 0].tolist()
        return taken

    alone = rows(1, 0, 12)
    assert [sum(s == step for s, _ in alone) for step in range(12)] == [2, 2, 2, 4, 4, 6, 6, 6, 6, 6, 6, 6]
    assert alone == rows(2, 0, 12)
    for step in (1, 4, 5, 8):
        assert rows(1, step, 12) == {key: value for key, value in alone.items() if key[0] >= step}
    if order == 'shuffle':
        starts = [start for key in sorted(alone) for start in alone[key]]
        assert len(set(starts[:99])) == 99, 'an epoch has 99 windows'


def test_the_nearest_data_set_is_named(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    write_data(workspace / 'data' / 'text' / 'novel')
    for name in ('novle', 'novel', 'text/novle'):
        with pytest.raises(UserError, match=r'did you mean text/novel\?'):
            DataSet(name)
    with pytest.raises(UserError, match='data/text/prepare.py --input=FILE, or check --dataset$'):
        DataSet('text/other')


def test_seeds_and_steps_differ(counting):
    steps = global_batch(counting, 1, 'random', steps=3)
    assert len({tuple(rows) for rows in steps}) == len(steps)
    other = TrainBatches(counting, 10, 3, 4, 8, 'random', Ranks(), CPU)
    assert other.next()[0][:, 0].tolist() != steps[0]


def test_random_windows_reach_both_ends(tmp_path):
    np.arange(14, dtype='<u2').tofile(tmp_path / 'train.bin')
    starts = global_batch(Tokens(str(tmp_path), 'train', {}), 1, 'random', steps=20)
    assert {start for rows in starts for start in rows} == {0, 1, 2, 3}  # 3 + 11 = 14: the last ends with the file


def test_an_epoch_takes_every_window_once(counting):
    n_windows = 1003 // 10 - 1
    starts = [start for rows in global_batch(counting, 1, 'shuffle', steps=n_windows) for start in rows]  # 12 epochs
    for epoch in range(12):
        taken = starts[epoch * n_windows : (epoch + 1) * n_windows]
        offset = min(taken)
        assert sorted(taken) == [offset + 10 * i for i in range(n_windows)] and offset + 10 * n_windows < 1003
        assert taken != sorted(taken)
    assert len({min(starts[e * n_windows : (e + 1) * n_windows]) for e in range(12)}) > 3, 'each has its own offset'


def test_an_epoch_continues_with_batches_of_another_size(counting):
    """After resuming with larger, smaller or fewer batches, an epoch still takes every sequence once."""

    def batches(batch_size, micro_batches, step=0, taken=None, steps=1, ramp=(0, 0)):
        arguments = counting, 10, batch_size, micro_batches, 7, 'shuffle', Ranks(), CPU, step, ramp
        made, starts = TrainBatches(*arguments, taken=taken), []
        for s in range(step, step + steps):
            starts += [x[0].item() for _ in range(made.micro_batches_at(s)) for x in made.next()[0]]
        return starts, made.taken(step + steps)

    whole, _ = batches(3, 4, steps=9)
    first, taken = batches(3, 4, steps=2)
    assert taken == 24 and first == whole[:24]
    second, taken = batches(5, 2, step=2, taken=taken, steps=3)
    assert taken == 54 and second == whole[24:54]
    third, taken = batches(1, 6, step=5, taken=taken, steps=4, ramp=(2, 7))
    assert first + second + third == whole[:taken]
    assert batches(3, 4, step=2, taken=24)[0] == batches(3, 4, step=2)[0], 'taken=None means batches of this size'


def test_another_text_has_another_checksum(tmp_path, counting):
    ids = np.arange(1003, dtype='<u2')
    for n, change in enumerate((slice(0, 0), slice(0, 1), slice(1002, 1003), slice(500, 501))):
        folder = tmp_path / str(n)
        folder.mkdir()
        other = ids.copy()
        other[change] += 1
        other.tofile(folder / 'train.bin')
        assert (text_checksum(Tokens(str(folder), 'train', {})) == text_checksum(counting)) == (n == 0)
    ids[:-1].tofile(folder / 'train.bin')
    assert text_checksum(Tokens(str(folder), 'train', {})) != text_checksum(counting)


def test_shuffle_of_a_single_window(tmp_path):
    np.arange(11, dtype='<u2').tofile(tmp_path / 'train.bin')
    assert set(map(tuple, global_batch(Tokens(str(tmp_path), 'train', {}), 1, 'shuffle', steps=3))) == {(0, 0, 0)}


@pytest.mark.parametrize('order', ['random', 'shuffle'])
def test_sequences_that_start_with_a_document(tmp_path, order):
    """Each sequence of the order without alignment, moved to the next start of a document if it is near."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, 2000).astype('<u2')
    ids[rng.integers(0, 2000, 120)] = 0
    ids[1900:] = 7  # no document starts here
    ids.tofile(tmp_path / 'train.bin')
    beginnings = {0, *(np.flatnonzero(ids == 0) + 1).tolist()}
    tokens = Tokens(str(tmp_path), 'train', {}, 50)
    moved = 0
    for world_size in (1, 2):
        for rank in range(world_size):
            plain, aligned = (
                TrainBatches(tokens, 10, 3, 4, 7, order, Ranks(rank, rank, world_size), CPU, end_of_text=end)
                for end in (None, 0)
            )
            for step in range(40):
                for micro in range(rank, 4, world_size):
                    starts = plain.window_starts(step)[micro * 3 : micro * 3 + 3].astype(int).tolist()
                    expected = [
                        next((at for at in range(start, start + 10) if at in beginnings and at + 11 <= 2000), start)
                        for start in starts
                    ]
                    x, y, *_ = aligned.next()
                    assert x.tolist() == [ids[at : at + 10].tolist() for at in expected]
                    assert y.tolist() == [ids[at + 1 : at + 11].tolist() for at in expected]
                    moved += expected != starts
    assert moved > 50


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads resident memory from /proc')
def test_memory_does_not_grow_with_the_data_read(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(600_000_000)
    tokens = Tokens(str(tmp_path), 'train', {}, 10)
    batches = TrainBatches(tokens, 1024, 12, 4, 7, 'random', Ranks(), CPU)

    def resident():
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    batches.next()
    before = resident()
    for _ in range(2000):  # memory-mapped, they would touch 20,000 of the file's 146,000 pages
        batches.next()
    assert resident() - before < 20_000_000


def test_a_file_that_is_truncated_after_it_was_opened(tmp_path):
    np.arange(1003, dtype='<u2').tofile(tmp_path / 'train.bin')
    tokens = Tokens(str(tmp_path), 'train', {}, 2000)
    os.truncate(tmp_path / 'train.bin', 1000)
    with pytest.raises(UserError, match='has become shorter'):
        tokens.windows([0, 600], 100)


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr('dataloader.MAX_OPEN_SHARDS', 3)
    ids = np.arange(5000, dtype='<u2')
    for n in range(1005):
        ids[n * 4 : n * 4 + 4 if n < 1004 else 5000].tofile(tmp_path / f'train_{n:03d}.bin')
    tokens = Tokens(str(tmp_path), 'train', {})
    assert tokens.windows([0, 3990, 4009], 900).tolist() == [list(range(s, s + 900)) for s in (0, 3990, 4009)]
    assert tokens.open_shard.cache_info().currsize == 3


def test_shards_are_one_array(tmp_path, counting):
    ids = np.arange(1003, dtype='<u4')
    folder = tmp_path / 'shards'
    folder.mkdir()
    for n, (start, end) in enumerate([(0, 5), (5, 6), (6, 700), (700, 1003)]):
        ids[start:end].tofile(folder / f'train_{n:03}.bin')
    sharded = Tokens(str(folder), 'train', {'dtype': 'uint32'}, 2000)
    assert len(sharded) == 1003 and len(sharded.paths) == 4
    assert sharded.windows([0, 3, 695, 992], 11).tolist() == counting.windows([0, 3, 695, 992], 11).tolist()


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_evaluation_windows(counting, world_size, monkeypatch):
    """However many are batched together."""

    def windows(n_batches):
        rows, shapes = [], []
        for rank in range(world_size):
            batches = list(eval_batches(counting, 10, 8, n_batches, Ranks(rank, rank, world_size), CPU))
            shapes.append([x.shape for x, *_ in batches])
            for x, y, _ in batches:
                assert x.shape == y.shape and x.numel() <= dataloader.EVAL_TOKENS
                real = (y >= 0).all(1)
                assert (y[~real] == -1).all() and torch.equal(y[real], x[real] + 1)
                rows += x[real, 0].tolist()
        assert shapes == shapes[:1] * world_size  # ranks that compute a model together
        return sorted(rows)

    few = windows(3)
    for size in (10, 70, 80, 10**6):
        monkeypatch.setattr(dataloader, 'EVAL_TOKENS', size)
        assert windows(1000) == list(range(0, 1000, 10))  # more than the split has: all of it, once
        assert few == windows(3)
    assert len(few) == 24
    assert max(few) > 900 and {b - a for a, b in zip(few, few[1:])} <= {40, 50}  # spread evenly


def test_ids_are_checked_when_opened_and_when_read(tmp_path, monkeypatch):
    ids = np.zeros(1000, dtype='<u2')
    ids[700] = 65
    ids.tofile(tmp_path / 'train.bin')
    with pytest.raises(UserError, match='holds the id 65, the vocabulary ends at 64'):
        Tokens(str(tmp_path), 'train', {}, 65)
    tokens = Tokens(str(tmp_path), 'train', {}, 66)
    tokens.vocab_size = 65  # as if the first check had missed it, as in a very large file
    assert tokens.windows([0, 600], 100).shape == (2, 100)
    with pytest.raises(UserError, match='holds the id 65'):
        tokens.windows([0, 650], 100)
    monkeypatch.setattr('dataloader.CHECKED_AT_ONCE', 64)
    Tokens(str(tmp_path), 'train', {}, 66)
    with pytest.raises(UserError, match='holds the id 65'):
        Tokens(str(tmp_path), 'train', {}, 65)
    monkeypatch.setattr('dataloader.MAX_IDS_CHECKED', 64)  # one piece: the first
    Tokens(str(tmp_path), 'train', {}, 65)


def test_meta_json_and_nanogpt_meta_pkl(tmp_path):
    write_data(tmp_path / 'ours')
    assert read_meta(str(tmp_path / 'ours'))['tokenizer']['chars'] == CHARS
    theirs = tmp_path / 'theirs'
    theirs.mkdir()
    assert read_meta(str(theirs)) == {}
    meta = {'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'é'}, 'stoi': {'a': 0, 'b': 1, 'é': 2}}
    (theirs / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert spec_from_nanogpt(read_meta(str(theirs))['nanogpt']) == {'kind': 'char', 'chars': 'abé'}
    (theirs / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3}))
    assert spec_from_nanogpt(read_meta(str(theirs))['nanogpt']) is None


# --- descriptions written by others -----------------------------------------------------------------------------------


@pytest.mark.parametrize('protocol', [3, 4, 5])
@pytest.mark.parametrize(
    'number', [np.int64(70000), np.uint8(200), np.int16(-3), np.array(5, dtype='>i4')[()], np.uint64(2**63)]
)
def test_numpy_integers_in_a_pickle(number, protocol):
    """They have the values of numpy, as plain int, without running any code of numpy."""
    content = pickle.dumps({'vocab_size': number}, protocol)
    for module in (b'numpy._core', b'numpy.core'):  # of numpy 2 and of numpy 1
        theirs = content.replace(b'numpy._core', module) if protocol < 4 else content
        assert unpickle(theirs) == {'vocab_size': int(pickle.loads(content)['vocab_size'])}
        assert type(unpickle(theirs)['vocab_size']) is int


@pytest.mark.parametrize(
    'content',
    [
        pickle.dumps(np.float64(3)),
        pickle.dumps(np.arange(3)),
        pickle.dumps(np.dtype('O')),
        pickle.dumps(print),
        pickle.dumps(UserError('x')),
        b'\x80\x04N' + b'r\xff\xff\xff\x7f' + b'.',
        b'\x80\x05\x96' + (2**40).to_bytes(8, 'little') + b'.',
    ],
    ids=['float', 'array', 'objects', 'function', 'instance', 'memo of 16 GiB', 'array of 1 TiB'],
)
def test_anything_else_in_a_pickle_is_refused(tmp_path, content):
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match='is not a nanoGPT meta.pkl: it (asks|holds)|expected 1099511627776 bytes'):
        read_meta(str(tmp_path))


@pytest.mark.parametrize(
    'meta, chars',
    [
        ({'itos': {i: f'w{i}' for i in range(60)}, 'stoi': {f'w{i}': i for i in range(60)}}, None),  # words
        ({'itos': {i: (i, 0) for i in range(60)}}, None),  # notes, moves
        ({'itos': {i: CHARS[i % 29] * (1 + i // 29) for i in range(60)}}, None),
        ({'itos': {i: chr(65 + i) for i in range(59)}}, None),  # a gap
        ({'itos': [chr(65 + i) for i in range(60)]}, ''.join(chr(65 + i) for i in range(60))),
        ({'stoi': {chr(65 + i): i for i in range(60)}}, ''.join(chr(65 + i) for i in range(60))),
        ({'stoi': {chr(65 + i): 2 * i for i in range(30)}}, None),
    ],
)
def test_nanogpt_meta_without_a_character_per_id(tmp_path, meta, chars):
    """nanoGPT trains on it; the ids are decoded only if each is known to be a character."""
    (np.arange(500) % 60).astype('<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 60, **meta}))
    read = read_meta(str(tmp_path))
    assert spec_from_meta(read) == (chars and {'kind': 'char', 'chars': chars}) and read['nanogpt']['vocab_size'] == 60
    assert len(Tokens(str(tmp_path), 'train', read, 60)) == 500
    with pytest.raises(UserError, match='holds the id 59, the vocabulary ends at 58'):
        Tokens(str(tmp_path), 'train', read, 59)


def test_training_on_ids_that_are_words(workspace):
    os.remove(workspace / 'data/tiny/meta.json')
    (workspace / 'data/tiny/meta.pkl').write_bytes(
        pickle.dumps({'vocab_size': 60, 'itos': {i: f'w{i}' for i in range(60)}})
    )
    run_forked_ok('train.py', *TINY, '--max_iters=1', cwd=workspace)
    saved = torch.load(workspace / 'out/ckpt.pt', weights_only=True)
    assert saved['model']['transformer.wte.weight'].shape[0] == 60 and saved.get('tokenizer') is None
    result = run_forked('sample.py', '--device=cpu', cwd=workspace)
    assert result.returncode == 2 and 'its ids cannot be turned into text' in result.stderr


@pytest.mark.parametrize(
    'name, content',
    [
        ('meta.pkl', {'vocab_size': 100277}),
        ('meta.pkl', {'vocab_size': np.int64(65537)}),
        ('meta.json', {'vocab_size': 70000}),
        ('meta.json', {'tokenizer': {'kind': 'char', 'chars': ''.join(map(chr, range(2**16, 2**16 + 70000)))}}),
    ],
)
def test_a_vocabulary_that_needs_uint32(tmp_path, name, content):
    ids = np.random.default_rng(0).integers(0, 65537, 1000).astype('<u4')
    ids[500] = 65536
    ids.tofile(tmp_path / 'train.bin')
    (tmp_path / name).write_bytes(pickle.dumps(content) if name == 'meta.pkl' else json.dumps(content).encode())
    assert Tokens(str(tmp_path), 'train', read_meta(str(tmp_path)), 65537)[0:1000].tolist() == ids.tolist()


@pytest.mark.parametrize('vocab_size', [1, 60, 65536])
def test_a_vocabulary_that_fits_uint16(tmp_path, vocab_size):
    (np.arange(1000) % vocab_size).astype('<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.json').write_text(json.dumps({'vocab_size': vocab_size}))
    meta = read_meta(str(tmp_path))
    assert spec_from_meta(meta) is None and meta['nanogpt']['vocab_size'] == vocab_size  # and not GPT-2's
    assert len(Tokens(str(tmp_path), 'train', meta, vocab_size)) == 1000


@pytest.mark.parametrize('stored, dtype', [('<u4', None), ('<i8', None), ('<u4', 'uint16'), ('<i8', 'uint32')])
def test_ids_of_a_larger_type_than_expected(tmp_path, stored, dtype):
    ids = np.random.default_rng(0).integers(0, 50257, 1000)
    ids.astype(stored).tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.json').write_text(json.dumps({'dtype': dtype} if dtype else {'vocab_size': 50257}))
    with pytest.raises(UserError, match='every second id is 0'):
        Tokens(str(tmp_path), 'train', read_meta(str(tmp_path)))
    ids.astype('<u4').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.json').write_text(json.dumps({'dtype': 'uint32'}))
    assert Tokens(str(tmp_path), 'train', read_meta(str(tmp_path)), 50257)[0:1000].tolist() == ids.tolist()


def test_every_second_id_may_be_0_where_the_sizes_say_so(tmp_path):
    np.tile([5, 0], 500).astype('<u2').tofile(tmp_path / 'train.bin')
    meta = {'vocab_size': 6, 'dtype': 'uint16', 'tokens': {'train': 1000}}
    (tmp_path / 'meta.json').write_bytes(b'\xef\xbb\xbf' + json.dumps(meta).encode())  # as editors on Windows save it
    assert len(Tokens(str(tmp_path), 'train', read_meta(str(tmp_path)), 6)) == 1000


def test_meta_json_may_complete_a_meta_pkl(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'é'}}))
    (tmp_path / 'meta.json').write_text('{"dtype": "uint32"}')
    meta = read_meta(str(tmp_path))
    assert meta['dtype'] == 'uint32' and spec_from_meta(meta) == {'kind': 'char', 'chars': 'abé'}
    (tmp_path / 'meta.json').write_text('{"tokenizer": {"kind": "byte"}}')
    assert spec_from_meta(read_meta(str(tmp_path))) == {'kind': 'byte'}


@pytest.mark.parametrize(
    'text',
    [
        '{"vocab_size": NaN}',
        '{"vocab_size": 60.0}',
        '{"vocab_size": 0}',
        '{"vocab_size": -60}',
        '{"vocab_size": true}',
        '{"vocab_size": "60"}',
        '{"tokens": [1, 2]}',
        '{"tokens": {"train": -1}}',
        '{"tokens": {"train": NaN}}',
        '{"tokens": {"train": 1e3}}',
        '{"tokens": null}',
        '{"tokens": {"val": Infinity}}',
        '{"vocab_size": 70000, "dtype": "uint16"}',
    ],
)
def test_numbers_in_meta_json_are_checked(tmp_path, text):
    (tmp_path / 'meta.json').write_text(text)
    with pytest.raises(UserError, match="meta.json is not a data set description.*: '(vocab_size|tokens|dtype)'"):
        read_meta(str(tmp_path))


def test_a_npy_file_is_refused(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as file:
        np.save(file, np.arange(1000, dtype='<u2'))
    with pytest.raises(UserError, match='it is a .npy file'):
        Tokens(str(tmp_path), 'train', {}, 50257)


@pytest.fixture
def documents(tmp_path):
    """400 ids in documents that end with 0, with a mask and the offsets of the documents -> (DataSet, ids, mask,
    offsets)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, 400).astype('<u2')
    ids[rng.integers(0, 400, 40)] = 0
    mask = rng.integers(0, 2, 400).astype('u1')
    mask[:200] &= rng.integers(0, 2, 200).astype('u1')  # fewer targets in the first half
    ids.tofile(tmp_path / 'train.bin')
    mask.tofile(tmp_path / 'train_mask.bin')
    spec = {'kind': 'byte'}
    (tmp_path / 'meta.json').write_text(json.dumps({'tokenizer': spec, 'vocab_size': 257, 'dtype': 'uint16'}))
    return DataSet(str(tmp_path)), ids, mask, np.flatnonzero(np.append(True, ids[:-1] == 0))


def test_masked_tokens_are_no_targets(documents):
    data, ids, mask, _ = documents
    tokens = data.tokens('train')
    x, y, starts = tokens.sequences([0, 7, 379], 20)
    assert starts is None
    for row, targets, at in zip(x, y, (0, 7, 379)):
        assert row.tolist() == ids[at : at + 20].tolist()
        assert targets.tolist() == [int(ids[i]) if mask[i] else -1 for i in range(at + 1, at + 21)]
    found = sum((y >= 0).sum().item() for _, y, _ in eval_batches(tokens, 20, 4, 100, Ranks(), CPU))
    assert found == np.count_nonzero(mask[1:381])  # 19 windows


@pytest.mark.parametrize('listed', [False, True])
def test_where_documents_start(documents, listed):
    """Told by the token that ends each, or by the offsets beside the tokens."""
    data, ids, _, offsets = documents
    tokens = data.tokens('train')
    if listed:
        offsets[1:4] += 1  # where no token says so
        offsets.astype('<u8').tofile(os.path.join(data.path, 'train_documents.bin'))
        tokens = data.tokens('train', mask_documents=True)
    else:
        tokens.end_of_document = 0
    for at in (0, 3, 111, 379):
        starts = tokens.sequences([at], 20)[2][0].tolist()
        expected = [max(0, max(o for o in offsets.tolist() if o <= at + i) - at) for i in range(20)]
        assert starts == expected


def test_a_step_is_the_mean_over_its_targets(documents):
    """On any number of ranks, with padding too: weights times means of micro-batches give the mean of all."""
    tokens = documents[0].tokens('train')
    value = torch.arange(50.0) ** 2
    for world_size in (1, 2, 3):
        for step in range(5):
            total, targets = 0.0, []
            for rank in range(world_size):
                batches = TrainBatches(tokens, 10, 3, 4, 7, 'random', Ranks(rank, rank, world_size), CPU, step)
                for _ in range(batches.rounds_at(step)):
                    _, y, _, weight = batches.next()
                    targets.append(y[y >= 0])
                    total += weight / world_size * value[targets[-1]].sum() / max(1, len(targets[-1]))
            torch.testing.assert_close(total, value[torch.cat(targets)].mean())


@pytest.mark.parametrize('order', ['random', 'shuffle'])
def test_packed_windows(tmp_path, order):
    """Sequences are the windows alone, all of them in an epoch; another block_size is refused."""
    np.arange(401, dtype='<u2').tofile(tmp_path / 'train.bin')
    tokens = Tokens(str(tmp_path), 'train', {'window': 10}, 500)
    batches = TrainBatches(tokens, 10, 5, 4, 7, order, Ranks(), CPU)
    taken = [x[0].item() for _ in range(8) for x in batches.next()[0]]
    assert all(at % 10 == 0 for at in taken)
    assert order == 'random' or sorted(taken) == list(range(0, 400, 10))
    (x, *_), *none = eval_batches(tokens, 10, 1, 1000, Ranks(), CPU)
    assert x[:, 0].tolist() == list(range(0, 400, 10)) and not none
    with pytest.raises(UserError, match='is packed into windows of 10 tokens: use --block_size=10'):
        TrainBatches(tokens, 8, 5, 4, 7, order, Ranks(), CPU)
    np.arange(400, dtype='<u2').tofile(tmp_path / 'train.bin')  # the last window lacks its last target
    tokens = Tokens(str(tmp_path), 'train', {'window': 10}, 500)
    batches = TrainBatches(tokens, 10, 39, 1, 7, order, Ranks(), CPU)
    taken = [x[0].item() for _ in range(8) for x in batches.next()[0]]
    assert set(taken) == set(range(0, 390, 10))


def test_windows_longer_than_the_model(workspace):
    run_forked_ok('train.py', *TINY, '--max_iters=0', cwd=workspace)
    meta = workspace / 'data' / 'tiny' / 'meta.json'
    meta.write_text(json.dumps({**json.loads(meta.read_text()), 'window': 32}))
    result = run_forked('evaluate.py', '--device=cpu', cwd=workspace)
    assert result.returncode == 2 and '--block_size=32: the model has 16 positions' in result.stderr


def test_evaluation_without_targets(documents):
    """Its loss would be 0, the best of all."""
    data, _, mask, _ = documents
    (np.arange(400) == 399).astype('u1').tofile(os.path.join(data.path, 'train_mask.bin'))
    tokens, model = data.tokens('train'), GPT(GPTConfig(block_size=19, vocab_size=257, n_layer=1, n_head=1, n_embd=4))

    def loss(n_batches, interrupted=False):
        batches = eval_batches(tokens, 19, 3, n_batches, Ranks(), CPU)
        return evaluate(model, batches, Ranks(), CPU, torch.float32, interrupted=lambda: interrupted)

    assert loss(100).tokens == 1 and loss(1, interrupted=True).tokens == 0
    with pytest.raises(UserError, match='no targets'):
        loss(1)


def test_wrong_masks_and_documents(documents):
    data, ids, mask, offsets = documents

    def put(name, array):
        array.tofile(os.path.join(data.path, name))

    plain = text_checksum(data.tokens('train'))
    put('train_mask.bin', 1 - mask)
    assert text_checksum(data.tokens('train')) != plain
    put('train_mask.bin', mask[1:])
    with pytest.raises(UserError, match='is of 399 tokens, the split has 400'):
        data.tokens('train')
    put('train_mask.bin', mask * 0)
    with pytest.raises(UserError, match='no token of the split is a target'):
        data.tokens('train')
    put('train_mask.bin', (np.arange(400) % 2 == 0).astype('u1'))  # is no sign of wider ids
    assert len(data.tokens('train').mask) == 400
    put('train_mask.bin', mask)
    for wrong in (offsets[1:], offsets[::-1], np.append(offsets, 400), offsets[:0]):
        put('train_documents.bin', wrong.astype('<u8'))
        with pytest.raises(UserError, match='train_documents.bin'):
            data.tokens('train', mask_documents=True)


def test_training_within_documents_and_on_their_targets(documents, workspace):
    """Two ranks train as one does, and evaluate.py's loss is that of each document alone, over what is a target."""
    data, ids, mask, offsets = documents
    folder = workspace / 'data' / 'masked'
    shutil.copytree(data.path, folder, ignore=lambda path, names: {'data', 'masked'} & set(names))
    for name, array in ('documents', offsets.astype('<u8')), ('mask', mask):
        array.tofile(folder / f'train_{name}.bin')
        array.tofile(folder / f'val_{name}.bin')
    ids.tofile(folder / 'val.bin')
    arguments = [*TINY, '--dataset=masked', '--eval_iters=0', '--max_iters=4', '--mask_documents=True']
    run_forked_ok('train.py', *arguments, cwd=workspace)
    train_on_ranks(2, *arguments, '--out_dir=out2', cwd=workspace)
    one, two = (
        [record.get('val/loss', record.get('loss')) for record in sum(metrics(workspace / out), [])]
        for out in ('out', 'out2')
    )
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-5)
    said = run_forked_ok('evaluate.py', '--device=cpu', cwd=workspace)
    model = restore_model(load_checkpoint(str(workspace / 'out' / 'ckpt.pt')), '').eval()
    nats, n = 0.0, 0
    for window in range(0, 399 - 15, 16):
        inside = [at for at in offsets.tolist() if window < at < window + 16]
        for first, end in zip([window, *inside], [*inside, window + 16]):
            logits = model.logits(model.hidden(torch.from_numpy(ids[first:end].astype(np.int64))[None]))[0]
            for at in range(first, end):
                if mask[at + 1]:
                    nats, n = nats - logits[at - first].log_softmax(-1)[int(ids[at + 1])].item(), n + 1
    assert f'loss {nats / n:.4f}' in said and f'over {n} tokens' in said


def test_a_character_has_no_end_of_document(workspace):
    result = run_forked('train.py', *TINY, '--mask_documents=True', cwd=workspace)
    assert result.returncode == 2 and '--mask_documents=True: data/tiny has no token that ends a doc' in result.stderr
