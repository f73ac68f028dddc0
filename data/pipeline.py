"""From text to token files: read, split, encode on all cores, write. Every data set's prepare.py is a call of write_dataset.

Memory holds a few units of text (see sources.py), whatever the size of the whole. While it is made, a data set lies in its folder's
`preparing/`, where training does not look:
    setup.json                       what is being prepared, and by which tokenizer
    progress.json                    up to where, replaced every few seconds, after what it counts is on the disk
    train_000.bin, …, val_000.bin    ids so far; what a crash left behind the counted ones is cut off
    meta.json                        the description, when all is encoded
The same command goes on from there. When all is done, an earlier preparation's files are deleted and the new ones move up, meta.json
first: until the last one has moved, some are missing, and training refuses; and the same command again moves the rest.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
from tqdm import tqdm

from common.errors import UserError, user_errors
from common.files import LOCK, lock_folder, unlock_folder, written_whole
from data.sources import pieces_of
from data.worker import Job, Workers, split_of
from tokenizer import CharTokenizer, load_tokenizer, read_tokenizer, spec_end_of_text, train_bpe

SPLITS = ('train', 'val')
KINDS = ('char', 'byte', 'gpt2', 'bpe')
SAVE_SECONDS = 2.0  # of work that a crash can cost
BPE_SAMPLE = 50_000_000  # characters that a BPE is learned from. Its different words are kept in memory, some 350 bytes a letter, and
LONG_RUN_COST = 50  # text without spaces has nothing but different words: each letter in a long run takes as much of the sample as so many
LONG_RUN = re.compile(r'\w{16,}')


def write_dataset(out_dir, source, kind, vocab_size=0, shard_tokens=100_000_000, max_tokens=0, workers=0):
    """Prepare a data set in out_dir: token files and meta.json. The same text and settings give the same bytes, whatever the number of
    workers, and however often it was interrupted.

    source: of sources.py. kind: 'char', a line end after each document; 'byte', 'gpt2', 'bpe' (trained on the text, vocab_size ids), or the
    path of a Hugging Face tokenizer, see tokenizer.read_tokenizer, the end-of-text token after each; a single text has nothing after it.
    shard_tokens: ids in a file, 0 for all in one. max_tokens: stop behind so many train tokens, or some more, 0 for all. workers:
    processes, 0 for one a core. UserError for what a person can mend.
    """
    for name, value in (('shard_tokens', shard_tokens), ('max_tokens', max_tokens), ('workers', workers)):
        if value < 0:
            raise UserError(f'--{name}={value}: must be 0 or more')
    if max_tokens and source.cut is not None:
        raise UserError(
            '--max_tokens: takes the first of many documents; of a single text, or a few, cut off what you do not want'
        )
    spec = None if kind in KINDS else read_foreign(kind, source)
    which = hashlib.sha256(json.dumps(spec).encode()).hexdigest() if spec else kind
    vocab_size = vocab_size if kind == 'bpe' else 0
    settings = [source.fingerprint, source.text_key, which, source.val_fraction, vocab_size, shard_tokens, max_tokens]
    with writing(out_dir):
        folder = os.path.join(out_dir, 'preparing')
        os.makedirs(folder, exist_ok=True)
        if not lock_folder(folder):
            raise UserError(f'{folder} is being worked on by another process: wait for it, or end it')
        try:
            meta = prepare(folder, source, kind, spec, settings, workers)
            check_shards(folder, out_dir, meta, shard_tokens)
            if not os.path.exists(os.path.join(folder, 'meta.json')):
                for name in os.listdir(out_dir):  # from here on, training finds nothing until all is in place
                    if re.fullmatch(r'(train|val)(_\d+)?\.bin', name):
                        os.remove(os.path.join(out_dir, name))
                write_json(os.path.join(folder, 'meta.json'), meta)
            publish(folder, out_dir, meta, shard_tokens)
        except (UserError, KeyboardInterrupt) as error:
            if not os.path.exists(os.path.join(folder, 'progress.json')):  # there is nothing to go on from
                discard(folder)
                with suppress(OSError):
                    os.rmdir(out_dir)  # if it was made for this
                if isinstance(error, KeyboardInterrupt):
                    print('\ninterrupted; nothing was encoded yet, the same command starts again', file=sys.stderr)
            raise
        finally:
            unlock_folder(folder)
    print(
        f'{shortest(out_dir)}: {meta["tokens"]["train"]:,} train and {meta["tokens"]["val"]:,} val tokens, '
        f'vocabulary of {meta["vocab_size"]:,}'
    )


def read_foreign(path, source):
    """The spec of a Hugging Face tokenizer, given by its folder or its tokenizer.json, that a source is to be encoded with."""
    if not os.path.exists(path):
        raise UserError(
            f'--tokenizer={path}: must be {", ".join(KINDS)}, or the tokenizer.json of a Hugging Face model, or its folder'
        )
    spec = read_tokenizer(path)
    if not spec:
        raise UserError(
            f"--tokenizer={path}: there is no tokenizer.json in it, nor GPT-2's kind of vocab.json and merges.txt"
        )
    if not source.single and spec_end_of_text(spec) is None:
        raise UserError(
            f'--tokenizer={path}: there is no telling which token ends a document: name it as "eos_token" in a '
            'tokenizer_config.json beside the tokenizer'
        )
    return spec


def prepare(folder, source, kind, spec, settings, workers):
    """Encode a source into a folder, or what is left of it, if the folder was begun with the same settings -> the description."""
    *_, vocab_size, shard_tokens, max_tokens = settings
    setup = read_json(os.path.join(folder, 'setup.json'), {'settings': list, 'tokenizer': dict})
    if setup and setup['settings'] != settings:
        print(f'{folder} holds an unfinished preparation of other text or with other settings: starting anew')
        setup = None
    if not setup:
        for entry in os.scandir(folder):
            if entry.name != LOCK:
                with suppress(
                    OSError
                ):  # NFS keeps what is open elsewhere; one that is in the way is told of when it is to be written
                    delete = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.remove
                    delete(entry.path)
        setup = {'settings': settings, 'tokenizer': spec or make_tokenizer(kind, source, vocab_size)}
        write_json(os.path.join(folder, 'setup.json'), setup)
    meta = read_json(os.path.join(folder, 'meta.json'), {'tokens': dict, 'vocab_size': int})
    return meta or encode_all(folder, source, setup['tokenizer'], shard_tokens, max_tokens, workers)


def make_tokenizer(kind, source, vocab_size):
    """The spec of the tokenizer for a source; 'char' reads all of it, 'bpe' learns from BPE_SAMPLE characters of the training text."""
    if kind == 'char':
        characters = set() if source.single else {'\n'}
        for piece in progress_over(source, source.units(), 'reading'):
            characters.update(piece.text)
        return CharTokenizer.train(characters).spec()
    if kind == 'bpe':
        print(f'learning a vocabulary of {vocab_size:,} ...', flush=True)
        return train_bpe(learning_texts(source), vocab_size)
    return {'kind': kind}


def learning_texts(source):
    """Yield texts to learn a BPE from: the beginning of the training text of each of the source's parts."""
    for part in range(source.parts):
        left = BPE_SAMPLE // source.parts
        for text in train_texts(source, part):
            if left <= 0:
                break
            yield text[:left]
            left -= len(text) + LONG_RUN_COST * sum(len(run) for run in LONG_RUN.findall(text))


def train_texts(source, part, length=10000):
    """Yield the training text of a part of a source in pieces of so many characters."""
    for unit in source.units(part=part):
        for piece in pieces_of(unit, source.text_key):
            if split_of(piece, threshold_of(source))[0] == 'train':
                for start in range(0, len(piece.text), length):
                    yield piece.text[start : start + length]


def progress_over(source, units, what):
    """Yield the pieces of the units under a progress bar."""
    with tqdm(total=source.total, unit='B', unit_scale=True, desc=what, delay=1) as bar:
        for unit in units:
            yield from pieces_of(unit, source.text_key)
            bar.update(unit.position['progress'] - bar.n)


def threshold_of(source):
    """Documents whose hash is below it are for validation."""
    return int(source.val_fraction * 2**64)


def encode_all(folder, source, spec, shard_tokens, max_tokens, workers):
    """Encode the whole source into shards in a folder, from where progress.json tells -> the data set's description."""
    with user_errors(ValueError, where=f'{folder}/setup.json is damaged, delete {folder} to start anew: '):
        tokenizer = load_tokenizer(spec)
    separator = (
        [] if source.single else tokenizer.encode('\n').tolist() if spec['kind'] == 'char' else [tokenizer.end_of_text]
    )
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
    threshold = threshold_of(source)
    while True:
        made = Made(folder, dtype.itemsize, shard_tokens, max_tokens, threshold)
        job = Job(spec, separator, dtype.str, made.state['threshold'], source.text_key)
        encode_rest(source, job, made, workers)
        source.check_unchanged()
        if all(split['tokens'] for split in made.state['splits'].values()):
            break
        # so few documents that one split got none: once more, with a threshold that gives it the one nearest to it
        smallest, largest = made.state['hashes'] or (0, 0)
        made.forget()
        if not any(split['tokens'] for split in made.state['splits'].values()):
            raise UserError('there is no text in the input')
        if smallest == largest:
            raise UserError(
                'the input holds fewer than two different documents, too few to split into training and validation text; '
                'a single text is split if it is given as a text file'
            )
        threshold = min(max(threshold, smallest + 1), largest)
    numbers = {
        name: {split: counts[name] for split, counts in made.state['splits'].items()}
        for name in ('tokens', 'documents', 'bytes')
    }
    return {'tokenizer': spec, 'vocab_size': tokenizer.vocab_size, 'dtype': dtype.name, **numbers}


def encode_rest(source, job, made, workers):
    """Encode what is left of a source and add it to what has been made."""
    started = saved = time.perf_counter()
    tokens_before, done = made.train_tokens, made.progress
    if done:
        print(f'going on after {done / 1e6:,.1f} MB')
    n_workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    bar = tqdm(total=source.total, initial=done, unit='B', unit_scale=True, desc='encoding', delay=1)
    try:
        with bar, Workers(job, n_workers) as crew:
            for unit, encoded in crew.map(() if made.is_full else source.units(made.state['position'])):
                made.take(unit, encoded)
                now = time.perf_counter()
                if saved == started:  # the first in this process
                    made.check_disk(source.total)
                if now - saved > SAVE_SECONDS or saved == started:
                    made.save()
                    saved = now
                if made.max_tokens:
                    bar.total = min(
                        source.total or sys.maxsize, made.progress * made.max_tokens // max(1, made.train_tokens)
                    )
                bar.set_postfix_str(
                    f'{(made.train_tokens - tokens_before) / (now - started) / 1e6:.2f}M tokens/s', refresh=False
                )
                bar.update(made.progress - bar.n)
                if made.is_full:
                    break
        made.save()
    except KeyboardInterrupt:
        made.save()
        print('\ninterrupted; the same command goes on from here', file=sys.stderr)
        raise
    finally:
        made.close()


class Made:
    """What has been encoded so far: the shards, and in `state`, which progress.json keeps, how far they go."""

    def __init__(self, folder, itemsize, shard_tokens, max_tokens, threshold):
        """Where progress.json tells, or else at the start, with this threshold between the splits."""
        self.folder, self.itemsize, self.max_tokens = folder, itemsize, max_tokens
        self.path = os.path.join(folder, 'progress.json')
        self.state = read_json(
            self.path, {'position': (dict, type(None)), 'threshold': int, 'hashes': list, 'splits': dict}
        ) or {
            'position': None,
            'threshold': threshold,
            'hashes': [],  # the smallest and the largest of the documents' hashes
            'splits': {split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in SPLITS},
        }
        with user_errors(KeyError, TypeError, where=f'{self.path} is damaged, delete {folder} to start anew: '):
            self.shards = {
                split: Shards(folder, split, itemsize, shard_tokens, self.state['splits'][split]['tokens'])
                for split in SPLITS
            }

    @property
    def train_tokens(self):
        return self.state['splits']['train']['tokens']

    @property
    def progress(self):
        """Bytes of the source that are done."""
        return self.state['position']['progress'] if self.state['position'] else 0

    @property
    def is_full(self):
        """Are there as many train tokens as were asked for?"""
        return 0 < self.max_tokens <= self.train_tokens

    def take(self, unit, encoded):
        """Add what became of a unit. The state changes last, and at once: it never counts more than the shards hold."""
        splits, hashes = {}, list(self.state['hashes'])
        for split, part in encoded.items():
            counts = self.state['splits'][split]
            self.shards[split].append(part.ids)
            splits[split] = {
                'tokens': counts['tokens'] + len(part.ids) // self.itemsize,
                'documents': counts['documents'] + part.documents,
                'bytes': counts['bytes'] + part.text_bytes,
            }
            hashes += part.hashes
        self.state = {
            **self.state,
            'position': unit.position,
            'splits': splits,
            'hashes': [min(hashes), max(hashes)] if hashes else [],
        }

    def save(self):
        """Have the shards on the disk, then the state."""
        for shards in self.shards.values():
            shards.sync()
        write_json(self.path, self.state)

    def close(self):
        """Close the files: some systems do not move or delete open ones."""
        for shards in self.shards.values():
            shards.close()

    def forget(self):
        """Be at the start again."""
        os.remove(self.path)

    def check_disk(self, total):
        """Raise UserError if what is still to be written, going by what the text gave so far, does not fit on the disk. total: bytes of
        the whole source, None if nobody knows."""
        written = sum(split['tokens'] for split in self.state['splits'].values()) * self.itemsize
        whole = (total or 0) * written / max(1, self.progress)
        if self.max_tokens:
            whole = min(whole, self.max_tokens * self.itemsize) if total else self.max_tokens * self.itemsize
        free = shutil.disk_usage(self.folder).free
        if whole - written > free:
            raise UserError(
                f'{self.folder}: about {(whole - written) / 1e9:,.2f} GB more will be needed, {free / 1e9:,.2f} GB are free: '
                'make room, and run the same command again'
            )


class Shards:
    """The files of one split, a row of ids cut every shard_tokens; open for appending."""

    def __init__(self, folder, split, itemsize, shard_tokens, tokens):
        """tokens: how many are there already; whatever the files hold behind them goes."""
        self.folder, self.split, self.itemsize = folder, split, itemsize
        self.shard_bytes = shard_tokens * itemsize or sys.maxsize
        self.size = tokens * itemsize  # bytes in all files
        keep = -(-self.size // self.shard_bytes)
        for n in itertools.count(keep):
            if not os.path.exists(self.path(n)):
                break
            os.remove(self.path(n))
        for n in range(keep):
            length = min(self.size - n * self.shard_bytes, self.shard_bytes)
            if not os.path.exists(self.path(n)) or os.path.getsize(self.path(n)) < length:
                raise UserError(
                    f'{self.path(n)} is missing or was cut short: delete {folder}, and run the same command again'
                )
        self.file = None
        if keep:
            self.file = open(self.path(keep - 1), 'r+b')
            self.file.truncate(length)
            self.file.seek(length)

    def path(self, n):
        return os.path.join(self.folder, f'{self.split}_{n:03d}.bin')

    def append(self, ids):
        """Add the bytes of ids, going on to a new file where one is full."""
        while ids:
            n, at = divmod(self.size, self.shard_bytes)
            if at == 0:
                self.close()
                self.file = open(self.path(n), 'wb')
            piece = ids[: self.shard_bytes - at]
            self.file.write(piece)
            self.size += len(piece)
            ids = ids[len(piece) :]

    def sync(self):
        """Have all that was appended on the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
            self.file = None


def moves(folder, out_dir, meta, shard_tokens):
    """Yield (path while it is prepared, path for training, bytes) of each token file of a description."""
    itemsize = np.dtype(meta['dtype']).itemsize
    for split, tokens in meta['tokens'].items():
        n_shards = -(-tokens // shard_tokens) if shard_tokens else 1
        for n in range(n_shards):
            name = f'{split}.bin' if n_shards == 1 else f'{split}_{n:03d}.bin'
            length = min(shard_tokens, tokens - n * shard_tokens) if shard_tokens else tokens
            yield os.path.join(folder, f'{split}_{n:03d}.bin'), os.path.join(out_dir, name), length * itemsize


def check_shards(folder, out_dir, meta, shard_tokens):
    """Raise UserError unless each token file is there, whole: prepared, or moved up already."""
    for prepared, final, n_bytes in moves(folder, out_dir, meta, shard_tokens):
        path = prepared if os.path.exists(prepared) else final
        if not os.path.exists(path) or os.path.getsize(path) != n_bytes:
            raise UserError(f'{prepared} is missing or damaged: delete {folder}, and run the same command again')


def publish(folder, out_dir, meta, shard_tokens):
    """Move a finished preparation up to where training looks for it. It can be interrupted and repeated."""
    write_json(os.path.join(out_dir, 'meta.json'), meta)
    for prepared, final, _ in moves(folder, out_dir, meta, shard_tokens):
        if os.path.exists(prepared):
            os.replace(prepared, final)
    os.remove(os.path.join(folder, 'setup.json'))  # without it, the rest is nothing to go on from
    discard(folder)


def discard(folder):
    """Give up a folder that this process holds, and delete it as far as the system does that: what is left of it is no obstacle."""
    unlock_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def shortest(path):
    """A path as it is seen from here, if it can be."""
    with suppress(ValueError):  # another drive of Windows
        return os.path.relpath(path)
    return path


@contextmanager
def writing(out_dir):
    """A context in which what goes wrong with the disk is one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'cannot write {error.filename or out_dir}: {error.strerror or error}; mend that, and run the same command '
            'again'
        ) from error


def read_json(path, wanted):
    """The content of a JSON file of ours, None if there is none. UserError unless it is a dict with the wanted keys, of these types."""
    if not os.path.exists(path):
        return None
    with user_errors(
        OSError, ValueError, RecursionError, where=f'{path} is damaged, delete {os.path.dirname(path)} to start anew: '
    ):
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in wanted.items()):
            raise ValueError(f'it must hold {", ".join(wanted)}')
        return content


def write_json(path, content):
    """Write a JSON file so that, whenever the power fails, it is the old one or the new one."""
    with written_whole(path, 'w') as file:
        json.dump(content, file, indent=1)
        file.write('\n')
