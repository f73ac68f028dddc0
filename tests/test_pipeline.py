"""From text to token files: every input format, any number of workers, any interruptions, against naive encodings."""

import csv
import errno
import glob
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, environment, run_forked, run_forked_ok

from common.errors import UserError
from common.files import LOCK, written_whole
from data import pipeline, sources
from data.pipeline import write_dataset
from data.sources import Documents, Files, pieces_of, safe_cut
from data.worker import Job, Workers, document_hash
from dataloader import Tokens, read_meta
from tokenizer import FAST_AFTER, ByteTokenizer, load_tokenizer, same_ids, train_bpe

WORDS = ['the', ' a', 'Größe', '中文', '\n', '\n\n', '  ', '1999', "'s", '...', 'naïve', '😀', '\t', 'code(x)']
WORDS += ['<|endoftext|>', '\u3000', '\x1c', 'e\u0301']


def random_text(rng, words):
    return ''.join(rng.choice(WORDS) + rng.choice(['', ' ', ' ']) for _ in range(words)).strip() or 'x'


def make_documents(n, seed=0, words=40):
    rng = random.Random(seed)
    return [f'{i} {random_text(rng, rng.randrange(1, words))}' for i in range(n)]


def write_input(folder, kind, documents):
    """Write documents as an input of some format -> its path."""
    folder.mkdir(exist_ok=True)
    lines = ''.join(
        json.dumps({'n': i, 'text': text}, ensure_ascii=i % 2 == 0) + '\n' for i, text in enumerate(documents)
    ).encode()
    if kind == 'txt':
        for i, text in enumerate(documents):
            (folder / f'{i:05d}.txt').write_bytes(text.encode())
    elif kind == 'jsonl':
        (folder / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + lines.rstrip(b'\n'))
    elif kind == 'jsonl.gz':
        (folder / 'a.jsonl.gz').write_bytes(gzip.compress(lines, mtime=0))
    elif kind == 'jsonl.zst':
        half = len(lines) // 2  # two frames, like two concatenated files
        compress = pytest.importorskip('zstandard').compress
        (folder / 'a.jsonl.zst').write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif kind == 'parquet':
        write_parquet(folder / 'a.parquet', documents)
    elif kind == 'txt.gz':
        for i, text in enumerate(documents):
            (folder / f'{i:05d}.txt.gz').write_bytes(gzip.compress(text.encode(), mtime=0))
    elif kind == 'json':
        rows = [text if i % 3 == 0 else {'n': [i], 'text': text} for i, text in enumerate(documents)]
        (folder / 'a.json').write_text('\ufeff' + json.dumps(rows, indent=1, ensure_ascii=False), encoding='utf-8')
    elif kind == 'csv':
        with open(folder / 'a.csv', 'w', encoding='utf-8-sig', newline='') as file:
            rows = csv.writer(file)
            rows.writerow(['n', 'text', 'source'])
            rows.writerows([i, text, 'a, "b"'] for i, text in enumerate(documents))
    else:  # mixed
        k = len(documents) // 3
        for i, text in enumerate(documents[:k]):
            (folder / f'a{i:05d}.txt').write_bytes(text.encode())
        for i, part in enumerate((documents[k : 2 * k], documents[2 * k :])):
            (folder / f'{"bc"[i]}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in part))
    return folder


def write_parquet(path, documents, row_group_size=50):
    """A file with the columns of FineWeb-Edu."""
    pa = pytest.importorskip('pyarrow')
    pytest.importorskip('datasets')
    import pyarrow.parquet

    n = len(documents)
    columns = {'text': documents, 'id': [f'<urn:uuid:{i}>' for i in range(n)], 'dump': ['CC-MAIN-2013-20'] * n}
    columns |= {'url': ['http://example.org/'] * n, 'file_path': ['s3://x'] * n, 'language': ['en'] * n}
    columns |= {'language_score': [0.97] * n, 'token_count': list(range(n)), 'score': [2.75] * n, 'int_score': [3] * n}
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


KINDS = ['txt', 'txt.gz', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'json', 'csv', 'parquet', 'mixed']


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def decoded(folder, split):
    """Decode the documents of a split."""
    meta = read_meta(str(folder))
    tokenizer = load_tokenizer(meta['tokenizer'])
    ids = Tokens(str(folder), split, meta)[0 : meta['tokens'][split]]
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_reading_continues_at_any_unit(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, 'UNIT', 500)
    monkeypatch.setattr(sources, 'ROWS', 16)
    documents = make_documents(200)
    source = Files(str(write_input(tmp_path / 'in', kind, documents)), 0.1)
    units = list(source.units())
    texts = [[piece for piece in pieces_of(unit, 'text')] for unit in units]
    assert len(units) > 10 and len({json.dumps(unit.position) for unit in units}) == len(units)
    joined = ''.join(piece.text + '\0' * piece.ends for pieces in texts for piece in pieces)
    assert joined == ''.join(text + '\0' for text in documents)
    progress = [unit.position['progress'] for unit in units]
    assert progress == sorted(progress) and 0.5 < progress[-1] / source.total < 1.5
    for n in range(len(units) - 1):
        position = json.loads(json.dumps(units[n].position))
        again = [list(pieces_of(unit, 'text')) for unit in Files(str(tmp_path / 'in'), 0.1).units(position)]
        assert sum(again, []) == sum(texts[n + 1 :], [])


@pytest.mark.parametrize('before', [0, 300, 700, 1100])
def test_reading_a_text_continues_at_any_unit(tmp_path, monkeypatch, before):
    """Also a text without spaces, and around the start of validation: the cuts are in the same places."""
    monkeypatch.setattr(sources, 'UNIT', 200)
    text = 'some words ' * (before // 11) + 'ä' * 1500 + '\r\nand\r\n' * 40
    (tmp_path / 'book.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    units = list(Files(str(tmp_path / 'book.txt'), 0.4).units())
    assert ''.join(piece.text for unit in units for piece in unit.pieces) == text.replace('\r\n', '\n')
    for n in range(len(units) - 1):
        again = list(Files(str(tmp_path / 'book.txt'), 0.4).units(units[n].position))
        assert [unit.pieces for unit in again] == [unit.pieces for unit in units[n + 1 :]]


@pytest.mark.parametrize('kind', ['jsonl.gz', 'jsonl.zst'])
def test_a_truncated_compressed_file_is_an_error(tmp_path, kind):
    """Truncated at the end, in the middle, and a few bytes into a second frame."""
    path = write_input(tmp_path / 'in', kind, make_documents(5000)) / f'a.{kind}'
    whole = path.read_bytes()

    def count():
        return sum(1 for unit in Files(str(path), 0.1).units() for _ in pieces_of(unit, 'text'))

    assert count() == 5000
    second = whole.rfind(whole[:4])
    for n in (len(whole) - 1, len(whole) - 20, len(whole) // 3, 20, *([second + 20] if second else [])):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match='cannot read .*cut short'):
            count()


def test_a_long_text_is_cut_between_tokens(monkeypatch, gpt2_vocabulary):
    """Encoding the pieces gives the ids of the whole."""
    rng = random.Random(5)
    for _ in range(300):
        text = random_text(rng, 60)
        k = safe_cut(text[: len(text) // 2])
        whole = gpt2_vocabulary.encode(text).tolist()
        if k < len(text) // 2:
            assert gpt2_vocabulary.encode(text[:k]).tolist() + gpt2_vocabulary.encode(text[k:]).tolist() == whole
    assert safe_cut('a' * 10) == 10 and safe_cut('ab c') == 2 and safe_cut('a\n\n') == 1 and safe_cut('  a') == 3


def test_a_text_larger_than_a_unit(tmp_path, monkeypatch, gpt2_vocabulary):
    monkeypatch.setattr(sources, 'UNIT', 100)
    text = random_text(random.Random(1), 3000).replace('\r', '')
    (tmp_path / 'book.txt').write_bytes(text.encode())
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'book.txt'), 0.1), 'gpt2')
    meta = read_meta(str(tmp_path / 'data'))
    k = int(0.9 * len(text))
    for split, part in (('train', text[:k]), ('val', text[k:])):
        ids = Tokens(str(tmp_path / 'data'), split, meta)[0 : meta['tokens'][split]].tolist()
        assert ids == gpt2_vocabulary.encode(part).tolist()


@pytest.mark.parametrize('size', [1, 2, 3, 7, 50, 10**6])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    texts = ['a', '', ' "b\\" ', '中文 \u2028', ']', '],[', '{}', 'é' * 99, '😀']
    path = tmp_path / 'a.json'
    for rows in (texts, [{'text': text, 'more': [texts, {'x': [1.5, None]}]} for text in texts], [], texts[:1]):
        for text in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False), f' \r\n{json.dumps(rows)}\n\n'):
            path.write_text(text, encoding='utf-8')
            source = Files(str(path), 0.1)
            monkeypatch.setattr(sources, 'UNIT', size)
            read = [piece.text for unit in source.units() for piece in unit.pieces]
            assert read == [text for text in texts[: len(rows)] if text]
            monkeypatch.undo()


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('a.json', '["x", "y"', 'it ends|neither a comma'),
        ('a.json', '["x" "y"]', 'after element 1 there is neither a comma'),
        ('a.json', '["x",]', 'not a JSON array'),
        ('a.json', '["x"] ["y"]', 'something follows'),
        ('a.json', '["x', 'not a JSON array'),
        ('a.json', '["x", 5]', "number 2: not a JSON object with a text 'text'"),
        ('a.json', '[{"content": "x"}]', "not a JSON object with a text 'text'"),
        ('a.json', '[' * 100000, 'not a JSON array'),
        ('a.json', '["x", null]', "not a JSON object with a text 'text'"),
        ('a.json', '{"text": "x"}\n{"text": \n', 'byte 14: this is not a line of JSON'),
        ('a.json', '{\n "text": "x"\n}\n', 'is neither an array of texts or objects nor one of them per line'),
        ('a.json', '{"data": ["x"]}', "not a JSON object with a text 'text'"),
        ('a.csv', 'n,content\n1,x\n', "must name one column 'text': --text_key= may be one of n, content"),
        ('a.csv', 'text,n,text\nx,1,y\n', "must name one column 'text'"),
        ('a.csv', 'n;text\n1;x\n', "must name one column 'text'"),
        ('a.csv', 'n,text\n1,Hello, world\n', 'line 2: 3 fields, where the first line names 2'),
        ('a.csv', 'n,text\n1,x\n2\n', 'line 3: 1 fields'),
        ('a.csv', 'n,text\n1,"x\0y"\n', 'line 2: (holds a zero byte|not valid .csv)'),
        ('a.csv', 'n,text\n1,"x\n2,y\n', 'not valid .csv: unexpected end of data'),
        ('a.csv', 'n,text\n1,"x" y\n', 'line 2: not valid .csv'),
    ],
)
def test_invalid_tables(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        for unit in Files(str(tmp_path / name), 0.1).units():
            list(pieces_of(unit, 'text'))
    assert str(tmp_path / name) in str(error.value)


def test_json_lines_may_be_called_json(tmp_path):
    """Also with a byte order mark and Windows line ends."""
    for name in ('a.json', 'a.jsonl'):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n"two"\r\n{"text": "three\\r\\n"}')
        units = Files(str(tmp_path / name), 0.1).units()
        assert [piece.text for unit in units for piece in pieces_of(unit, 'text')] == ['one', 'two', 'three\r\n']


@pytest.mark.parametrize(
    'name, content',
    [
        ('a.tsv', b'text\nx'),
        ('page.HTML', b'<p>x'),
        ('a.pdf', b'%PDF-1.4 x'),
        ('a.zip', b'PK'),
        ('a.ipynb', b'{}'),
        ('a.html.gz', b'x'),
        ('a.parquet.gz', b'x'),
        ('a.json', b'{\n"name": "x"}'),
        ('a.txt', 'x'.encode('utf-16')),
        ('a.txt', b'x\0'),
        ('a.md', b'caf\xe9'),
        ('a.txt.gz', gzip.compress(b'x\0', mtime=0)),
        ('a', gzip.compress(b'x', mtime=0)),
    ],
)
def test_files_that_are_not_text(tmp_path, capsys, name, content):
    """Alone, they are an error; in a folder, they are skipped. Either way the message names the file."""
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Files(str(folder / name), 0.1)
    assert str(folder / name) in str(error.value) and 'no text in' not in str(error.value)
    with pytest.raises(UserError, match='there is no text in .*: skipped 1 files, the first: ') as error:
        Files(str(folder), 0.1)
    assert str(folder / name) in str(error.value)
    (folder / 'b.txt').write_text('a novel')
    (folder / 'z.html').write_text('<p>a page')
    source = Files(str(folder), 0.1)
    assert [path for path, _ in source.files] == [str(folder / 'b.txt')]
    out = capsys.readouterr().out
    assert out.startswith(f'skipped 2 files, the first: {folder / name}') and len(out.splitlines()) == 1


def test_which_files_of_a_folder_are_read(tmp_path, capsys):
    """Next to tables only .txt files, otherwise all texts; no hidden files."""
    for name in ('a.txt', 'b.md', 'c.py', '.hidden.txt', '.git/config', 'deep/d.TXT', 'e.txt.gz'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b'some text', mtime=0) if name.endswith('gz') else b'some text')

    def taken():
        return [os.path.relpath(path, tmp_path) for path, _ in Files(str(tmp_path), 0.1).files]

    assert taken() == ['a.txt', 'b.md', 'c.py', 'e.txt.gz', 'deep/d.TXT']
    assert not capsys.readouterr().out
    (tmp_path / 'f.csv').write_text('text\nsome text\n')
    assert taken() == ['a.txt', 'e.txt.gz', 'f.csv', 'deep/d.TXT']
    assert f'skipped 2 files, the first: {tmp_path / "b.md"} is not a .txt file' in capsys.readouterr().out


def test_links(tmp_path, capsys):
    """A link to a file is followed, a link to a folder is skipped with a message, a broken link is an error."""
    folder, elsewhere = tmp_path / 'in', tmp_path / 'elsewhere'
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / 'a.txt').write_text('some text')
    os.symlink(elsewhere / 'a.txt', folder / 'a.txt')
    os.symlink(elsewhere, folder / 'b')
    assert [path for path, _ in Files(str(folder), 0.1).files] == [str(folder / 'a.txt')]
    assert f'skipped 1 files, the first: {folder / "b"} is a link to a folder' in capsys.readouterr().out
    os.symlink(elsewhere / 'gone.txt', folder / 'c.txt')
    with pytest.raises(UserError, match='c.txt is a broken link: fix it, or delete it'):
        Files(str(folder), 0.1)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_every_format_completely(tmp_path, kind):
    """Every document once, complete, in order, in the split of its hash; and the counts are right."""
    documents = make_documents(400)
    source = Files(str(write_input(tmp_path / 'in', kind, documents)), 0.1)
    write_dataset(str(tmp_path / 'data'), source, 'byte', shard_tokens=5000, workers=2)
    keys = documents
    if kind in ('txt', 'txt.gz', 'mixed'):
        names = sorted(path.name for path in (tmp_path / 'in').glob('*.txt*'))
        keys = names + documents[len(names) :]
    of_val = [document_hash(key) < 0.1 * 2**64 for key in keys]
    assert decoded(tmp_path / 'data', 'val') == [text for text, val in zip(documents, of_val) if val]
    assert decoded(tmp_path / 'data', 'train') == [text for text, val in zip(documents, of_val) if not val]
    meta = read_meta(str(tmp_path / 'data'))
    assert (
        meta['documents'] == {'train': of_val.count(False), 'val': of_val.count(True)}
        and 15 < meta['documents']['val'] < 70
    )
    assert sum(meta['bytes'].values()) == sum(len(text.encode()) for text in documents)
    sizes = [os.path.getsize(path) for path in sorted(glob.glob(str(tmp_path / 'data' / 'train_*.bin')))]
    assert len(sizes) > 2 and set(sizes[:-1]) == {10000} and sum(sizes) == 2 * meta['tokens']['train']
    assert not (tmp_path / 'data' / 'preparing').exists()


class Interrupted:
    """A source that raises KeyboardInterrupt, like Ctrl-C, after some units."""

    def __init__(self, source, after):
        self.source, self.after = source, after

    def __getattr__(self, name):
        return getattr(self.source, name)

    def units(self, position=None, part=None):
        for n, unit in enumerate(self.source.units(position, part)):
            if n == self.after:
                raise KeyboardInterrupt
            yield unit


@pytest.mark.parametrize(
    'kind', [kind for kind in KINDS if kind not in ('txt.gz', 'csv')]
)  # these are read like others
def test_the_same_bytes_with_any_interruptions_and_workers(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, 'UNIT', 2000)
    monkeypatch.setattr(sources, 'ROWS', 16)
    path = str(write_input(tmp_path / 'in', kind, make_documents(500, seed=3)))
    arguments = dict(vocab_size=300, shard_tokens=3000)
    write_dataset(str(tmp_path / 'once'), Files(path, 0.1), 'bpe', workers=1, **arguments)
    for after in (9, 2, 6, 100000):
        try:
            write_dataset(str(tmp_path / 'often'), Interrupted(Files(path, 0.1), after), 'bpe', workers=3, **arguments)
        except KeyboardInterrupt:
            left = tmp_path / 'often' / 'preparing'
            if left.exists():  # as if more was written than counted, and half an id
                with open(sorted(left.glob('train_*.bin'))[-1], 'ab') as file:
                    file.write(b'abc')
            with pytest.raises(UserError, match='there is no data set|missing'):
                Tokens(str(tmp_path / 'often'), 'train', read_meta(str(tmp_path / 'often')))
    assert hashes(tmp_path / 'often') == hashes(tmp_path / 'once') and len(hashes(tmp_path / 'once')) > 4


@pytest.fixture
def data_folder(tmp_path):
    """A copy of the scripts and data/NAME/prepare.py, so that nothing is written into the repository."""
    for pattern in ('*.py', 'common/*.py', 'formats/*.py', 'data/*.py', 'data/*/prepare.py'):
        for path in REPO.glob(pattern):
            target = tmp_path / path.relative_to(REPO)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def test_killed_at_random_moments(data_folder):
    """kill -9 of the command that a user types, with smaller units.

    Each time the same command continues, no process is left behind, and the final bytes are the same.
    """
    path = write_input(data_folder / 'in', 'jsonl', make_documents(4000, words=100))
    made = data_folder / 'data' / 'text'
    arguments = [f'--input={path}', '--tokenizer=bpe', '--vocab_size=500', '--shard_tokens=100_000', '--workers=2']
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); from data import pipeline, sources; "
        'pipeline.SAVE_SECONDS, sources.UNIT = 0, 20000; '
        "sys.argv[0] = 'data/text/prepare.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    rng, kills = random.Random(11), int(os.environ.get('SAMGPT_TEST_KILLS', 3))

    def start(name):
        return subprocess.Popen(
            [sys.executable, '-c', code, *arguments, f'--name={name}'],
            cwd=data_folder,
            env=environment(),
            stdout=open(data_folder / 'output', 'w'),
            stderr=subprocess.DEVNULL,
        )

    def output():
        return (data_folder / 'output').read_text()

    assert start('once').wait() == 0
    progress = made / 'often' / 'preparing' / 'progress.json'
    for kill in range(kills):
        process = start('often')
        done = (kill + rng.random()) / kills * os.path.getsize(path / 'a.jsonl') * 0.95
        while not progress.exists() or json.loads(progress.read_text())['position']['progress'] < done:
            assert process.poll() is None
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and ('continuing after' in output()) == (kill > 0)
    assert start('often').wait() == 0 and 'continuing after' in output()
    assert hashes(made / 'often') == hashes(made / 'once') and len(hashes(made / 'once')) > 4
    for _ in range(50):
        left = processes_in(data_folder)
        if not left:
            break
        time.sleep(0.1)
    assert not left


def processes_in(folder):
    """The ids of the processes whose working directory is this folder; [] where there is no /proc."""
    ids = []
    for process in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):
            if (process / 'cwd').readlink() == folder:
                ids.append(process.name)
    return ids


def test_publishing_can_be_interrupted(tmp_path, monkeypatch):
    """The second data set has other shards than the first. Training refuses until all have been moved."""
    paths = [
        str(write_input(tmp_path / name, 'jsonl', make_documents(300, seed)))
        for seed, name in enumerate(('first', 'second'))
    ]
    write_dataset(str(tmp_path / 'data'), Files(paths[0], 0.1), 'byte', shard_tokens=1000)
    write_dataset(str(tmp_path / 'expected'), Files(paths[1], 0.1), 'byte', shard_tokens=3000)
    real, calls = os.replace, []

    def replace(source, target):
        if str(target).startswith(str(tmp_path / 'data' / 't')):
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(pipeline.os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Files(paths[1], 0.1), 'byte', shard_tokens=3000)
    meta = read_meta(str(tmp_path / 'data'))
    with pytest.raises(UserError, match='prepare the data again'):
        for split in ('train', 'val'):
            Tokens(str(tmp_path / 'data'), split, meta)
    write_dataset(str(tmp_path / 'data'), Files(paths[1], 0.1), 'byte', shard_tokens=3000)
    assert hashes(tmp_path / 'data') == hashes(tmp_path / 'expected')


def test_an_earlier_data_set_is_deleted_before_publishing(tmp_path, monkeypatch):
    """Interrupted before the first file is moved: the sizes are the same, but the old files are gone."""
    for name, text in (('first', 'abc' * 200), ('second', 'xyz' * 200)):
        (tmp_path / f'{name}.txt').write_text(text)
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'first.txt'), 0.1), 'char')
    for name in ('train_mask', 'val_mask_000', 'train_documents', 'train_notes'):
        (tmp_path / 'data' / f'{name}.bin').write_bytes(b'1')
    removed, remove = [], os.remove
    with monkeypatch.context() as patch:
        patch.setattr(os, 'remove', lambda path: removed.append(os.path.basename(path)) or remove(path))
        pipeline.remove_tokens(str(tmp_path / 'data'))
    assert set(removed[:2]) == {'train.bin', 'val.bin'}, 'without these, training does not miss a mask'
    assert set(removed[2:]) == {'train_mask.bin', 'val_mask_000.bin', 'train_documents.bin'}
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'first.txt'), 0.1), 'char')
    monkeypatch.setattr(pipeline, 'publish', lambda *arguments: exec('raise KeyboardInterrupt'))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'second.txt'), 0.1), 'char')
    monkeypatch.undo()
    with pytest.raises(UserError, match='train.bin is missing'):
        Tokens(str(tmp_path / 'data'), 'train', read_meta(str(tmp_path / 'data')))
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'second.txt'), 0.1), 'char')
    meta = read_meta(str(tmp_path / 'data'))
    assert (
        load_tokenizer(meta['tokenizer']).decode(Tokens(str(tmp_path / 'data'), 'train', meta)[0:6].tolist())
        == 'xyzxyz'
    )


@pytest.mark.parametrize('left', [[], ['progress.json'], ['meta.json', 'progress.json'], ['train_000.bin', 'lock']])
def test_a_half_deleted_folder_does_no_harm(tmp_path, left):
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(50)))
    (tmp_path / 'data/preparing').mkdir(parents=True)
    for name in left:
        (tmp_path / 'data/preparing' / name).write_text('{"position": {"progress": 7}}')
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')
    write_dataset(str(tmp_path / 'expected'), Files(path, 0.1), 'byte')
    assert hashes(tmp_path / 'data') == hashes(tmp_path / 'expected')


@pytest.mark.parametrize('kind', KINDS)
def test_input_that_changes_while_it_is_read(tmp_path, monkeypatch, kind):
    """One error line, nothing is published, and the same command then prepares the new input."""
    monkeypatch.setattr(sources, 'UNIT', 2000)
    path = write_input(tmp_path / 'in', kind, make_documents(300))
    victim = sorted(path.iterdir())[-1]

    class Meddled(Interrupted):
        def units(self, position=None, part=None):
            for n, unit in enumerate(self.source.units(position, part)):
                yield unit
                if n == 1:
                    victim.write_bytes(victim.read_bytes() + b'\n')

    with pytest.raises(UserError, match='has changed while it was being read|cannot read'):
        write_dataset(str(tmp_path / 'data'), Meddled(Files(str(path), 0.1), 0), 'byte')
    assert not list((tmp_path / 'data').glob('*.bin'))
    if kind in ('txt', 'jsonl', 'mixed'):  # a byte after the end makes the others invalid
        write_dataset(str(tmp_path / 'data'), Files(str(path), 0.1), 'byte')
        write_dataset(str(tmp_path / 'expected'), Files(str(path), 0.1), 'byte')
        assert hashes(tmp_path / 'data') == hashes(tmp_path / 'expected')


@pytest.mark.parametrize(
    'name, content',
    [
        ('train_000.bin', None),
        ('val_000.bin', None),
        ('train_001.bin', b''),
        ('progress.json', b'5'),
        ('progress.json', b'{"position": {}}'),
        ('progress.json', b'{"position": {"progress": 1}, "threshold": 1, "hashes": [], "splits": {}}'),
        ('setup.json', b'["x"]'),
        ('setup.json', b'{'),
    ],
)
def test_a_damaged_preparation_is_one_error_line(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(sources, 'UNIT', 500)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(300)))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Interrupted(Files(path, 0.1), 30), 'byte', shard_tokens=1000)
    damaged = tmp_path / 'data' / 'preparing' / name
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    with pytest.raises(UserError, match='delete .*preparing'):
        write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte', shard_tokens=1000)
    shutil.rmtree(tmp_path / 'data' / 'preparing')
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte', shard_tokens=1000)


def test_a_lost_shard_is_noticed_before_anything_is_deleted(tmp_path, monkeypatch):
    for name in ('first', 'second'):
        (tmp_path / f'{name}.txt').write_text(name * 500)
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'first.txt'), 0.1), 'char')
    seen = hashes(tmp_path / 'data')
    real = pipeline.prepare

    def prepare_and_lose(folder, *arguments):
        meta = real(folder, *arguments)
        os.truncate(os.path.join(folder, 'train_000.bin'), 10)
        return meta

    monkeypatch.setattr(pipeline, 'prepare', prepare_and_lose)
    with pytest.raises(UserError, match='train_000.bin is missing or damaged'):
        write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'second.txt'), 0.1), 'char')
    shutil.rmtree(tmp_path / 'data' / 'preparing')
    assert hashes(tmp_path / 'data') == seen


def test_interrupted_before_anything_is_encoded(tmp_path, capsys):
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(30)))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Interrupted(Files(path, 0.1), 0), 'char')
    assert 'interrupted; nothing was encoded yet' in capsys.readouterr().err and not (tmp_path / 'data').exists()


def test_other_text_or_settings_start_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, 'UNIT', 500)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(100)))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Interrupted(Files(path, 0.1), 7), 'byte')
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte', shard_tokens=100)
    assert 'starting over' in capsys.readouterr().out
    write_dataset(str(tmp_path / 'expected'), Files(path, 0.1), 'byte', shard_tokens=100)
    assert hashes(tmp_path / 'data') == hashes(tmp_path / 'expected')


@pytest.mark.parametrize('fraction', [0.001, 0.999])
def test_few_documents_give_both_splits_something(tmp_path, fraction):
    documents = make_documents(7)
    write_dataset(
        str(tmp_path / 'data'), Files(str(write_input(tmp_path / 'in', 'jsonl', documents)), fraction), 'byte'
    )
    train, val = decoded(tmp_path / 'data', 'train'), decoded(tmp_path / 'data', 'val')
    assert sorted(train + val) == sorted(documents) and min(len(train), len(val)) == 1


def test_one_document_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match='fewer than two different documents'):
        write_dataset(
            str(tmp_path / 'data'), Files(str(write_input(tmp_path / 'in', 'jsonl', ['one text'])), 0.1), 'byte'
        )


def test_max_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'UNIT', 500)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(500)))
    write_dataset(str(tmp_path / 'all'), Files(path, 0.1), 'byte')
    write_dataset(str(tmp_path / 'part'), Files(path, 0.1), 'byte', max_tokens=7001)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'often'), Interrupted(Files(path, 0.1), 12), 'byte', max_tokens=7001)
    write_dataset(str(tmp_path / 'often'), Files(path, 0.1), 'byte', max_tokens=7001)
    assert hashes(tmp_path / 'often') == hashes(tmp_path / 'part')
    for split in ('train', 'val'):
        part = (tmp_path / 'part' / f'{split}.bin').read_bytes()
        assert part and (tmp_path / 'all' / f'{split}.bin').read_bytes().startswith(part)
    tokens = read_meta(str(tmp_path / 'part'))['tokens']['train']
    assert (
        7001 <= tokens < 8000
        and len(decoded(tmp_path / 'part', 'train')) == read_meta(str(tmp_path / 'part'))['documents']['train']
    )
    (tmp_path / 'book.txt').write_text('a text ' * 99)
    with pytest.raises(UserError, match='--max_tokens: takes the first of many documents'):
        write_dataset(str(tmp_path / 'book'), Files(str(tmp_path / 'book.txt'), 0.1), 'byte', max_tokens=100)


def test_disk_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'UNIT', 500)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(500)))
    monkeypatch.setattr(pipeline.shutil, 'disk_usage', lambda folder: type('', (), {'free': 10000}))
    with pytest.raises(UserError, match='GB more will be needed, 0.00 GB are free'):
        write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')
    monkeypatch.undo()
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')
    assert len(decoded(tmp_path / 'data', 'train')) > 400


def test_two_preparations_of_one_data_set(tmp_path):
    fcntl = pytest.importorskip('fcntl')
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(20)))
    (tmp_path / 'data/preparing').mkdir(parents=True)
    with open(tmp_path / 'data/preparing' / LOCK, 'w') as other:  # a second open file is like another process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='is in use by another process'):
            write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')


def unlink_like_nfs(real):
    """os.unlink as on NFS: a file that is open in this process is renamed, and deleted when it is closed."""

    def unlink(path, *, dir_fd=None):
        wanted = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        for number in os.listdir('/proc/self/fd'):
            with suppress(OSError):
                if os.path.samestat(os.fstat(int(number)), wanted):
                    return os.rename(
                        path, os.path.join(os.path.dirname(path), f'.nfs{number}'), src_dir_fd=dir_fd, dst_dir_fd=dir_fd
                    )
        return real(path, dir_fd=dir_fd)

    return unlink


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='lists open files from /proc')
def test_where_open_files_cannot_be_deleted(tmp_path, monkeypatch):
    """However the preparation ends, no file is open when its folder is deleted."""
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(50)))
    monkeypatch.setattr(os, 'unlink', unlink_like_nfs(os.unlink))
    monkeypatch.setattr(os, 'remove', os.unlink)
    with pytest.raises(UserError, match='two different documents'):
        write_dataset(
            str(tmp_path / 'one'), Files(str(write_input(tmp_path / 'few', 'jsonl', ['one text'])), 0.1), 'byte'
        )
    assert not (tmp_path / 'one').exists()
    with monkeypatch.context() as patch, pytest.raises(UserError, match='GB more will be needed'):
        patch.setattr(pipeline.shutil, 'disk_usage', lambda folder: type('', (), {'free': -1}))
        write_dataset(str(tmp_path / 'one'), Files(path, 0.1), 'byte')
    assert not (tmp_path / 'one').exists()
    for _ in range(2):
        write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte', shard_tokens=100)
        assert not (tmp_path / 'data/preparing').exists()


def test_a_file_that_the_system_keeps_does_no_harm(tmp_path, monkeypatch):
    """Such as .nfs00001, which exists as long as another machine has it open."""
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(50)))
    real = os.unlink

    def unlink(path, **arguments):
        if '.nfs' in str(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        real(path, **arguments)

    monkeypatch.setattr(os, 'unlink', unlink)
    monkeypatch.setattr(os, 'remove', unlink)
    (tmp_path / 'data/preparing').mkdir(parents=True)
    (tmp_path / 'data/preparing/.nfs00001').write_text('')
    for _ in range(2):
        write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')
        assert os.listdir(tmp_path / 'data/preparing') == ['.nfs00001']
        assert len(Tokens(str(tmp_path / 'data'), 'train', read_meta(str(tmp_path / 'data')))) > 100


def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    """As on CIFS: files are flushed, folders are not."""
    real, flushed = os.fsync, []

    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        if os.path.isdir(f'/proc/self/fd/{number}'):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flushed.append(number)
        real(number)

    monkeypatch.setattr(os, 'fsync', fsync)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(50)))
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), 'byte')
    assert len(flushed) >= 5 and len(decoded(tmp_path / 'data', 'train')) > 30


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    target = tmp_path / 'a.json'
    for content in ('one\r\nä', 'two\n'):
        with written_whole(str(target), 'w') as file:
            file.write(content)
        assert target.read_bytes() == content.encode()
    with pytest.raises(KeyboardInterrupt), written_whole(str(target)) as file:
        file.write(b'three')
        raise KeyboardInterrupt
    assert target.read_bytes() == b'two\n' and os.listdir(tmp_path) == ['a.json']


def test_a_worker_that_dies_is_one_error_line():
    unit = sources.Unit({}, 'x', lines=b'{"text": "abc"}\n')
    with Workers(Job({'kind': 'byte'}, [256], '<u2', 0, 'text'), 1) as workers:
        _, encoded = next(workers.map([unit]))
        assert encoded['train'].ids == np.array([97, 98, 99, 256], dtype='<u2').tobytes()
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(UserError, match='a worker process has died: run the same command again'):
            list(workers.map([unit]))


def test_a_million_spaces(tmp_path, gpt2_vocabulary):
    """More than tiktoken's pattern can match at once."""
    text = 'a' + ' ' * 2**20 + 'b'
    with pytest.raises(ValueError):
        gpt2_vocabulary.bpe.encode_to_numpy(text, disallowed_special=())
    assert gpt2_vocabulary.decode(gpt2_vocabulary.encode(text).tolist()) == text


def test_large_row_groups_and_empty_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'UNIT', 3000)
    documents = make_documents(1000)
    (tmp_path / 'in[1]').mkdir()  # a glob pattern, if not escaped
    write_parquet(tmp_path / 'in[1]' / 'a.parquet', [], row_group_size=10)
    write_parquet(tmp_path / 'in[1]' / 'b.parquet', documents, row_group_size=100000)
    (tmp_path / 'in[1]' / 'README.md').write_text('not a document beside tables')
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'in[1]'), 0.1), 'byte')
    assert sorted(decoded(tmp_path / 'data', 'train') + decoded(tmp_path / 'data', 'val')) == sorted(documents)


def test_json_with_lone_surrogates_and_empty_texts(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        '{"text": "x\\ud800y"}\n\n{"text": ""}\n{"text": null}\n{"text": "z\\ud83d\\ude00"}\n{"text": "a\\u0000b"}\n'
    )
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'a.jsonl'), 0.5), 'byte')
    documents = decoded(tmp_path / 'data', 'train') + decoded(tmp_path / 'data', 'val')
    assert sorted(documents) == ['a\0b', 'x\ufffdy', 'z😀']


def test_characters_of_many_documents(tmp_path):
    texts = ['one\ntwo', 'three', 'four five'] * 20
    write_dataset(str(tmp_path / 'data'), Documents(texts, 0.1), 'char')
    meta = read_meta(str(tmp_path / 'data'))
    tokenizer = load_tokenizer(meta['tokenizer'])
    splits = (Tokens(str(tmp_path / 'data'), split, meta) for split in ('train', 'val'))
    read = [tokenizer.decode(tokens[0 : len(tokens)].tolist()) for tokens in splits]
    assert ''.join(read) == ''.join(text + '\n' for text in texts)
    length = sum(len(text.replace('\n', '')) for text in texts)
    assert len(read[0].replace('\n', '')) == pytest.approx(0.9 * length, abs=6)


def test_uint32_where_the_vocabulary_needs_it(tmp_path, monkeypatch):
    """70,000 different characters."""
    text = ''.join(chr(code) for code in range(0x10000, 0x10000 + 70000)) * 2
    (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'a.txt'), 0.1), 'char')
    meta = read_meta(str(tmp_path / 'data'))
    assert meta['dtype'] == 'uint32' and os.path.getsize(tmp_path / 'data/train.bin') == 4 * 126000
    ids = Tokens(str(tmp_path / 'data'), 'train', meta, 70000)[0:126000]
    assert load_tokenizer(meta['tokenizer']).decode(ids.tolist()) == text[:126000]


# --- tokenizers of Hugging Face models --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    """A model's folder with a tokenizer that is not byte-level and asks for truncation."""
    tokenizers = pytest.importorskip('tokenizers')
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
    library.normalizer, library.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special = ['<unk>', '</s>', '<|endoftext|>']
    texts = [text.replace('<|endoftext|>', '') for text in make_documents(300)]
    library.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    library.enable_truncation(5)
    folder = tmp_path_factory.mktemp('model')
    library.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': '</s>'}, 'model_max_length': 5}))
    return folder


@pytest.mark.parametrize('name, workers', [('', 1), ('tokenizer.json', 3)])
def test_the_tokenizer_of_a_model(tmp_path, monkeypatch, model_folder, name, workers):
    """Each document has the library's ids and then the eos token, which no text produces, even if it spells it."""
    import tokenizers

    monkeypatch.setattr(sources, 'UNIT', 500)
    library = tokenizers.Tokenizer.from_file(str(model_folder / 'tokenizer.json'))
    library.no_truncation()
    library.encode_special_tokens = True
    documents = make_documents(120) + ['</s>', 'a </s> and <|endoftext|>', 3 * '</s>']
    path = str(write_input(tmp_path / 'in', 'jsonl', documents))
    given = os.path.join(model_folder, name)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Interrupted(Files(path, 0.1), 7), given, workers=workers)
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), given, workers=workers)
    meta = read_meta(str(tmp_path / 'data'))
    assert meta['vocab_size'] == 400 and meta['tokenizer']['json'] == (model_folder / 'tokenizer.json').read_text(
        encoding='utf-8'
    )
    end = library.token_to_id('</s>')
    for split in ('train', 'val'):
        chosen = [text for text in documents if (document_hash(text) < 0.1 * 2**64) == (split == 'val')]
        naive = [i for text in chosen for i in [*library.encode(text, add_special_tokens=False).ids, end]]
        assert Tokens(str(tmp_path / 'data'), split, meta)[0 : meta['tokens'][split]].tolist() == naive and naive.count(
            end
        ) == len(chosen)


def test_another_tokenizer_of_the_same_name_starts_over(tmp_path, monkeypatch, model_folder, capsys):
    monkeypatch.setattr(sources, 'UNIT', 500)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(100)))
    shutil.copytree(model_folder, tmp_path / 'm')
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / 'data'), Interrupted(Files(path, 0.1), 7), str(tmp_path / 'm'))
    (tmp_path / 'm/tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), str(tmp_path / 'm'))
    assert 'starting over' in capsys.readouterr().out
    meta = read_meta(str(tmp_path / 'data'))
    ids = Tokens(str(tmp_path / 'data'), 'train', meta)[0 : meta['tokens']['train']].tolist()
    assert ids.count(2) == meta['documents']['train'] and ids.count(1) == 0


def test_a_tokenizer_without_an_end_of_text(tmp_path, model_folder):
    """Enough for a single text, which needs no separator."""
    (tmp_path / 'm').mkdir()
    library = json.loads((model_folder / 'tokenizer.json').read_text())
    text = json.dumps(library).replace('<|endoftext|>', '<|other|>')
    (tmp_path / 'm/tokenizer.json').write_text(text)
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(20)))
    with pytest.raises(UserError, match='it does not say which token ends a document: name it as "eos_token"'):
        write_dataset(str(tmp_path / 'data'), Files(path, 0.1), str(tmp_path / 'm'))
    (tmp_path / 'book.txt').write_text('a novel ' * 99)
    write_dataset(str(tmp_path / 'data'), Files(str(tmp_path / 'book.txt'), 0.1), str(tmp_path / 'm'))
    assert not (tmp_path / 'data/preparing').exists()


@pytest.mark.parametrize(
    'name, words',
    [
        ('absent', 'must be char, byte, gpt2, bpe, or the tokenizer.json'),
        ('', 'there is no tokenizer.json in it'),
        ('a.jsonl', 'not a tokenizer.json'),
    ],
)
def test_invalid_tokenizers(tmp_path, name, words):
    path = write_input(tmp_path / 'in', 'jsonl', make_documents(20))
    with pytest.raises(UserError, match=words):
        write_dataset(str(tmp_path / 'data'), Files(str(path), 0.1), str(path / name))
    assert not (tmp_path / 'data').exists()


@pytest.fixture(scope='module')
def byte_level_folder(tmp_path_factory):
    """A model's folder with a byte-level BPE that splits as SmolLM2's does, and a chat template."""
    tokenizers = pytest.importorskip('tokenizers')
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    library.decoder = decoders.ByteLevel()
    special, alphabet = ['<|endoftext|>', '<|im_end|>'], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(make_documents(300), trainer)
    folder = tmp_path_factory.mktemp('model')
    library.save(str(folder / 'tokenizer.json'))
    settings = {'eos_token': '<|im_end|>', 'bos_token': '<|endoftext|>', 'chat_template': '{{ messages }}'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


def test_a_byte_level_tokenizer_of_a_model(tmp_path, byte_level_folder):
    """A text long enough for tiktoken: the ids are the library's. The data set keeps all that the folder says."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(byte_level_folder / 'tokenizer.json'))
    library.encode_special_tokens = True
    documents = [4 * text + ' 2026 <|im_end|>' for text in make_documents(900)]
    assert len(''.join(documents)) > 2 * FAST_AFTER
    path = str(write_input(tmp_path / 'in', 'jsonl', documents))
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), str(byte_level_folder), workers=1)
    meta = read_meta(str(tmp_path / 'data'))
    chosen = [text for text in documents if document_hash(text) >= 0.1 * 2**64]
    expected = [i for text in chosen for i in [*library.encode(text, add_special_tokens=False).ids, 1]]
    assert Tokens(str(tmp_path / 'data'), 'train', meta)[0 : meta['tokens']['train']].tolist() == expected
    spec = meta['tokenizer']
    assert (spec['end_of_text'], spec['chat_template']) == ('<|im_end|>', '{{ messages }}')
    assert spec['special_tokens'] == {'bos_token': '<|endoftext|>', 'eos_token': '<|im_end|>'}


def test_the_tokenizer_of_a_gguf_file(tmp_path):
    """A tokenizer that went out with a model comes back for its data."""
    from formats.gguf_model import write_gguf
    from model import GPT, GPTConfig

    spec = {'kind': 'bpe', 'json': train_bpe(['some text, some more text'] * 20, 260)['json'], 'chat_template': 'x'}
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=260))
    for name, spec_or_none in (('m.gguf', spec), ('none.gguf', None)):
        write_gguf(model, spec_or_none, str(tmp_path / name))
    path = str(write_input(tmp_path / 'in', 'jsonl', make_documents(30)))
    write_dataset(str(tmp_path / 'data'), Files(path, 0.1), str(tmp_path / 'm.gguf'), workers=1)
    again = read_meta(str(tmp_path / 'data'))['tokenizer']
    assert same_ids(spec, again) and again['chat_template'] == 'x'
    with pytest.raises(UserError, match='none.gguf: it holds no tokenizer'):
        write_dataset(str(tmp_path / 'data'), Files(path, 0.1), str(tmp_path / 'none.gguf'))


def test_hostile_tokenizer_files(tmp_path):
    """A tokenizer.json of 1 GB, or of nothing but brackets, is one line and exit status 2."""
    pytest.importorskip('tokenizers')
    (tmp_path / 'a.txt').write_text('a novel ' * 99)
    (tmp_path / 'huge.json').touch()
    os.truncate(tmp_path / 'huge.json', 2**30)  # takes no space on the disk
    (tmp_path / 'deep.json').write_text('{"model": ' * 500_000)
    for name, words in (('huge.json', 'it has 1,073,741,824 bytes'), ('deep.json', 'not a tokenizer.json')):
        result = run_forked('data/text/prepare.py', '--input=a.txt', '--name=a', f'--tokenizer={name}', cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, '')
        assert result.stderr.startswith('error: cannot read ') and words in result.stderr
        assert result.stderr.count('\n') == 1


# --- the scripts ------------------------------------------------------------------------------------------------------


def prepare(folder, name, *arguments, **extra):
    command = [sys.executable, str(folder / 'data' / name / 'prepare.py'), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**extra), timeout=120)


@pytest.mark.parametrize('way', ['input', 'hub'])
@pytest.mark.parametrize('name', ['openwebtext', 'fineweb'])
def test_web_data_from_parquet_of_the_real_schema(data_folder, gpt2_vocabulary, name, way):
    """From a local folder with --input=, and by the code that streams from the hub.

    A local folder of the data set's name stands in for the hub: the library prefers it. Both give tiktoken's ids.
    """
    documents = make_documents(500, seed=9)
    hub = data_folder / ('Skylion007/openwebtext' if name == 'openwebtext' else 'HuggingFaceFW/fineweb-edu')
    folder = hub / 'sample' / '10BT'
    folder.mkdir(parents=True)
    card = {'configs': [{'config_name': 'sample-10BT', 'data_files': [{'split': 'train', 'path': 'sample/10BT/*'}]}]}
    (hub / 'README.md').write_text(f'---\n{json.dumps(card)}\n---\n')
    for n in range(2):
        write_parquet(folder / f'00{n}_00000.parquet', documents[250 * n : 250 * n + 250])
    result = prepare(data_folder, name, '--val_fraction=0.05', *([f'--input={hub}'] if way == 'input' else []))
    assert result.returncode == 0, result.stderr
    assert ('streaming' in result.stdout) == (way == 'hub')
    meta = read_meta(str(data_folder / 'data' / name))
    assert meta['tokenizer'] == {'kind': 'gpt2'}
    for split in ('train', 'val'):
        chosen = [text for text in documents if (document_hash(text) < 0.05 * 2**64) == (split == 'val')]
        naive = [i for text in chosen for i in [*gpt2_vocabulary.bpe.encode_ordinary(text), 50256]]
        assert Tokens(str(data_folder / 'data' / name), split, meta)[0 : meta['tokens'][split]].tolist() == naive


@pytest.mark.parametrize(
    'name, hub', [('openwebtext', 'Skylion007/openwebtext'), ('fineweb', 'HuggingFaceFW/fineweb-edu')]
)
def test_without_the_hub_there_is_one_error_line(data_folder, name, hub):
    pytest.importorskip('datasets')
    result = prepare(data_folder, name, '--tokenizer=byte', HF_HUB_OFFLINE='1')
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert (
        f'error: cannot load {hub} (is the network reachable?' in result.stderr
        and '--input= takes local files' in result.stderr
    )
    assert not (data_folder / 'data' / name / 'preparing').exists()


def test_streaming_as_from_the_hub(tmp_path, monkeypatch):
    """The class that reads from the hub, with a local folder that the library finds instead."""
    documents = make_documents(700, seed=2)
    (tmp_path / 'hub').mkdir()
    for n in range(2):
        write_parquet(tmp_path / 'hub' / f'00{n}_00000.parquet', documents[350 * n : 350 * n + 350])
    monkeypatch.setattr(sources, 'UNIT', 3000)
    monkeypatch.setattr(sources, 'ROWS', 16)
    source = sources.Hub(str(tmp_path / 'hub'), 0.1)
    write_dataset(str(tmp_path / 'once'), source, 'byte', workers=1)
    assert decoded(tmp_path / 'once', 'train') == [text for text in documents if document_hash(text) >= 0.1 * 2**64]
    for after in (3, 1, 100000):
        try:
            write_dataset(str(tmp_path / 'often'), Interrupted(sources.Hub(str(tmp_path / 'hub'), 0.1), after), 'byte')
        except KeyboardInterrupt:
            assert (tmp_path / 'often/preparing/progress.json').exists()
    assert hashes(tmp_path / 'often') == hashes(tmp_path / 'once')


def test_the_data_folder_may_be_a_link(data_folder, tmp_path_factory):
    """To another disk; the data set is written there."""
    elsewhere = tmp_path_factory.mktemp('disk') / 'sets' / 'data'
    shutil.move(data_folder / 'data', elsewhere)
    os.symlink(elsewhere, data_folder / 'data')
    (data_folder / 'a.txt').write_text('some text ' * 99)
    result = prepare(data_folder, 'text', '--input=a.txt')
    assert result.returncode == 0, result.stderr
    assert (elsewhere / 'text/a/train.bin').exists()


def test_another_package_called_data_does_no_harm(data_folder):
    (data_folder / 'others/data').mkdir(parents=True)
    (data_folder / 'others/data/__init__.py').write_text('raise ImportError("the wrong one")')
    (data_folder / 'a.txt').write_text('some text ' * 99)
    result = prepare(data_folder, 'text', '--input=a.txt', PYTHONPATH=str(data_folder / 'others'))
    assert result.returncode == 0, result.stderr


def test_text_in_the_data_sets_own_folder(data_folder):
    """Files that the script writes are not input: a second run, also after an interruption, gives the same data set."""
    own = data_folder / 'data/text/m'
    own.mkdir()
    (own / 'input.txt').write_text('some text ' * 99)
    runs = []
    for _ in range(2):
        run_forked_ok(data_folder / 'data/text/prepare.py', '--input=data/text/m', cwd=data_folder)
        runs.append(hashes(own))
        (own / 'preparing').mkdir()
        (own / 'preparing/notes.txt').write_text('left by an interruption')
        (own / 'meta.json.part').write_text('and this')
    assert runs[0] == {name: runs[1][name] for name in runs[0]}
    assert set(runs[0]) == {'input.txt', 'train.bin', 'val.bin', 'meta.json'}
    assert json.loads((own / 'meta.json').read_text())['tokens'] == {'train': 891, 'val': 99}
    (data_folder / 'books').symlink_to(data_folder / 'data/text')
    source = Files(str(data_folder / 'books'), 0.1, own=str(own))
    assert sorted(os.path.basename(path) for path, _ in source.files) == ['input.txt', 'prepare.py']


SHAPE = (
    '--device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 '
    '--gradient_accumulation_steps=2 --eval_iters=2 --eval_interval=4 --warmup_iters=2 --lr_decay_iters=8 '
    '--learning_rate=1e-2 --min_lr=1e-3 --align_documents=True'
).split()


@pytest.mark.parametrize('order', ['random', 'shuffle'])
def test_training_on_three_shards_with_a_trained_bpe_resumes_exactly(data_folder, order):
    import torch

    documents = make_documents(600, seed=4)
    (data_folder / 'web.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    result = prepare(
        data_folder, 'text', '--input=web.jsonl', '--tokenizer=bpe', '--vocab_size=400', '--shard_tokens=6000'
    )
    assert result.returncode == 0, result.stderr
    shards = sorted(path.name for path in (data_folder / 'data/text/web').glob('train*'))
    assert shards == ['train_000.bin', 'train_001.bin', 'train_002.bin']
    arguments = ['--dataset=text/web', *SHAPE, f'--data_order={order}']
    run_forked_ok('train.py', *arguments, '--out_dir=once', '--max_iters=8', cwd=data_folder)
    run_forked_ok('train.py', *arguments, '--out_dir=twice', '--max_iters=3', cwd=data_folder)
    run_forked_ok('train.py', *arguments, '--out_dir=twice', '--max_iters=8', '--init_from=resume', cwd=data_folder)
    once, twice = (torch.load(data_folder / name / 'ckpt.pt', weights_only=True)['model'] for name in ('once', 'twice'))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    arguments = '--out_dir=once --num_samples=1 --max_new_tokens=20 --device=cpu --json=True'.split()
    out = run_forked_ok('sample.py', *arguments, cwd=data_folder)
    assert len(json.loads(out)['token_ids']) <= 20 and once['transformer.wte.weight'].shape == (400, 32)


def test_describe(data_folder):
    texts = make_documents(200)
    (data_folder / 'web.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    assert prepare(data_folder, 'text', '--input=web.jsonl', '--tokenizer=byte').returncode == 0
    out = run_forked_ok('data/describe.py', 'text/web', '--windows=2', '--window_tokens=9', cwd=data_folder)
    meta = read_meta(str(data_folder / 'data/text/web'))
    assert 'tokenizer byte, vocabulary of 257' in out
    assert (
        f'{meta["tokens"]["train"]:,} tokens in 1 file' in out
        and f'{meta["documents"]["train"]:,} ends of documents' in out
    )
    part = meta['bytes']['train'] / meta['tokens']['train']
    assert f'{part:.2f} bytes of text per token' in out
    shown = [line.split(': ', 1) for line in out.splitlines() if line.startswith('  at ')]
    assert len(shown) == 4
    train = Tokens(str(data_folder / 'data/text/web'), 'train', meta)
    start = int(shown[0][0].removeprefix('  at ').replace(',', ''))
    assert ByteTokenizer().decode(train[start : start + 9].tolist()) == eval(shown[0][1])
    for mistake in ([], ['absent'], ['text/web', '--windows=-1']):
        result = run_forked('data/describe.py', *mistake, cwd=data_folder)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_evaluation_in_bits_per_byte(data_folder):
    """The same as computed from the loss and the lengths of the predicted tokens."""
    import torch

    (data_folder / 'web.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in make_documents(300)))
    assert prepare(data_folder, 'text', '--input=web.jsonl', '--tokenizer=bpe', '--vocab_size=300').returncode == 0
    run_forked_ok('train.py', '--dataset=text/web', *SHAPE, '--max_iters=2', cwd=data_folder)
    out = run_forked_ok('evaluate.py', '--device=cpu', cwd=data_folder)
    meta = read_meta(str(data_folder / 'data/text/web'))
    row = Tokens(str(data_folder / 'data/text/web'), 'val', meta)[0 : meta['tokens']['val']]
    tokenizer = load_tokenizer(meta['tokenizer'])
    n = (len(row) - 1) // 16 * 16
    text_bytes = len(
        b''.join(
            tokenizer.bpe.decode_single_token_bytes(i) for i in row[1 : n + 1].tolist() if i != tokenizer.end_of_text
        )
    )
    loss, bits = (float(out.split(word)[1].split()[0].rstrip(',')) for word in ('loss', 'perplexity '))
    bits = float(out.split(' bits per byte')[0].split()[-1])
    assert bits == pytest.approx(loss * n / torch.tensor(2.0).log().item() / text_bytes, rel=2e-4)


def test_evaluation_without_the_vocabulary(data_folder):
    """nanoGPT's GPT-2 bins without tiktoken's vocabulary: the loss is still printed, without bits per byte."""
    (data_folder / 'data/bins').mkdir()
    for split, n in (('train', 400), ('val', 100)):
        (np.arange(n) * 7 % 50257).astype('<u2').tofile(data_folder / f'data/bins/{split}.bin')
    run_forked_ok('train.py', '--dataset=bins', *SHAPE, '--max_iters=1', cwd=data_folder)
    out = run_forked_ok('evaluate.py', '--device=cpu', cwd=data_folder, TIKTOKEN_CACHE_DIR=str(data_folder / 'none'))
    assert 'data/bins, val: loss ' in out and ('no bits per byte: ' in out) != (' bits per byte, ' in out)
