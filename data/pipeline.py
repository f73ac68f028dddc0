"""From text to token files: read, split, encode on all cores, write. Every prepare.py calls write_dataset.

Memory holds a few units of text (see sources.py), however large the input. An unfinished data set is kept in the folder
`preparing/` inside its own, where training does not look:
    setup.json                       the settings and the tokenizer
    progress.json                    how far it is; rewritten every few seconds, after the ids it counts are on the disk
    train_000.bin, …, val_000.bin    the ids so far; after a crash, those that progress.json does not count are cut off
    meta.json                        the description of the data set, once all text is encoded
After an interruption the same command continues there. At the end, the token files of an earlier data set are deleted
and the new files move to their place, meta.json first. If that is interrupted, some token files are missing and
training refuses to start, until the same command has moved the rest.
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
from data.sources import Documents, Files, Hub, pieces_of
from data.worker import Job, Workers, split_of
from formats.tokenizer_files import read_tokenizer
from tokenizer import CharTokenizer, load_tokenizer, spec_end_of_text, train_bpe

Source = Documents | Files | Hub
SPLITS = ('train', 'val')
KINDS = ('char', 'byte', 'gpt2', 'bpe')
SAVE_SECONDS = 2.0  # of work that a crash can lose
BPE_SAMPLE = 50_000_000  # characters to train a BPE on: the trainer stores every different word, 350 bytes per letter
LONG_RUN = re.compile(r'\w{16,}')  # text without spaces has no words that repeat,
LONG_RUN_COST = 50  # so each letter of a long run counts as this many characters


def write_dataset(
    out_dir: str,
    source: Source,
    kind: str,
    vocab_size: int = 0,
    shard_tokens: int = 100_000_000,
    max_tokens: int = 0,
    workers: int = 0,
):
    """Prepare a data set: token files and meta.json.

    The same text and settings give the same bytes, for any number of workers and interruptions. After each document
    comes the end-of-text token, for 'char' a line end; after a single text, nothing.

    out_dir: its folder.
    source: the text, see sources.py.
    kind: the tokenizer: 'char', 'byte', 'gpt2', 'bpe' (trained on the text), or the path of a model's tokenizer.
    vocab_size: for 'bpe'.
    shard_tokens: ids per file; 0: all in one file.
    max_tokens: stop after the unit that reaches this many train tokens; 0: take everything.
    workers: processes; 0: one per core.
    UserError for whatever a person can fix.
    """
    for name, value in (('shard_tokens', shard_tokens), ('max_tokens', max_tokens), ('workers', workers)):
        if value < 0:
            raise UserError(f'--{name}={value}: must be 0 or more')
    if max_tokens and source.cut is not None:
        raise UserError('--max_tokens: takes the first of many documents; shorten a single text, or a few, by hand')
    spec = None if kind in KINDS else read_foreign(kind, source)
    which = hashlib.sha256(json.dumps(spec).encode()).hexdigest() if spec else kind
    vocab_size = vocab_size if kind == 'bpe' else 0
    settings = [source.fingerprint, source.text_key, which, source.val_fraction, vocab_size, shard_tokens, max_tokens]
    with writing(out_dir):
        folder = os.path.join(out_dir, 'preparing')
        os.makedirs(folder, exist_ok=True)
        if not lock_folder(folder):
            raise UserError(f'{folder} is in use by another process: wait for it, or end it')
        try:
            meta = prepare(folder, source, kind, spec, settings, workers)
            check_shards(folder, out_dir, meta, shard_tokens)
            if not os.path.exists(os.path.join(folder, 'meta.json')):
                remove_tokens(out_dir)  # until the new files are in place, training finds none
                write_json(os.path.join(folder, 'meta.json'), meta)
            publish(folder, out_dir, meta, shard_tokens)
        except (UserError, KeyboardInterrupt) as error:
            if not os.path.exists(os.path.join(folder, 'progress.json')):  # there is nothing to continue
                discard(folder)
                with suppress(OSError):
                    os.rmdir(out_dir)  # unless it has other files
                if isinstance(error, KeyboardInterrupt):
                    print('\ninterrupted; nothing was encoded yet, the same command starts again', file=sys.stderr)
            raise
        finally:
            unlock_folder(folder)
    print(
        f'{shortest(out_dir)}: {meta["tokens"]["train"]:,} train and {meta["tokens"]["val"]:,} val tokens, '
        f'vocabulary of {meta["vocab_size"]:,}'
    )


def name_of_data_set(name: str, path: str, parent: str) -> str:
    """The name of a data set in the folder `parent`: that given, or that of the input at `path`. UserError if it is
    not a valid name for a folder."""
    if not name:
        name = os.path.basename(os.path.abspath(path))
        if os.path.isfile(path):
            name = name.removesuffix('.gz').removesuffix('.zst').rpartition('.')[0] or name
    if not name or os.path.basename(name) != name or name.startswith(('.', '-')) or not name.isprintable():
        raise UserError(f'--name={name!r}: must be a plain name, it becomes a folder in {parent}')
    return name


def read_foreign(path, source):
    """Read the tokenizer of a model at --tokenizer=path -> its spec. UserError if it cannot encode the source."""
    spec = model_tokenizer(path, f'{", ".join(KINDS)}, or ')
    if not source.single and spec_end_of_text(spec) is None:
        raise UserError(
            f'--tokenizer={path}: it does not say which token ends a document: name it as "eos_token" in a '
            'tokenizer_config.json beside the tokenizer'
        )
    return spec


def model_tokenizer(path: str, others: str = '') -> dict:
    """Read the tokenizer of a model at --tokenizer=path, or of that name on the hub -> its spec. others: what else may
    be given, for the message. UserError if there is none."""
    if not os.path.exists(path):
        from pretrained import downloaded, is_hub_name  # only here: it imports torch

        path = downloaded(path) if is_hub_name(path) else path
    if not os.path.exists(path):
        raise UserError(
            f'--tokenizer={path}: must be {others}the tokenizer.json of a Hugging Face model, or its '
            'folder or name on the hub, or a .gguf file, and there is no such file'
        )
    if path.endswith('.gguf') and os.path.isfile(path):
        from formats.gguf_model import gguf_tokenizer  # only here: most data sets need no GGUF

        spec, lacking = gguf_tokenizer(path), 'it holds no tokenizer'
    else:
        spec = read_tokenizer(path)
        lacking = "there is no tokenizer.json in it, nor GPT-2's kind of vocab.json and merges.txt"
    if not spec:
        raise UserError(f'--tokenizer={path}: {lacking}')
    return spec


def prepare(folder, source, kind, spec, settings, workers):
    """Encode a source into a folder, or the rest of it if it was started with the same settings -> the description."""
    *_, vocab_size, shard_tokens, max_tokens = settings
    setup = read_json(os.path.join(folder, 'setup.json'), {'settings': list, 'tokenizer': dict})
    if setup and setup['settings'] != settings:
        print(f'{folder} holds an unfinished preparation of other text or with other settings: starting over')
        setup = None
    if not setup:
        for entry in os.scandir(folder):
            if entry.name != LOCK:
                delete = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.remove
                with suppress(OSError):  # NFS keeps files that are open elsewhere; one in our way fails on writing
                    delete(entry.path)
        setup = {'settings': settings, 'tokenizer': spec or make_tokenizer(kind, source, vocab_size)}
        write_json(os.path.join(folder, 'setup.json'), setup)
    meta = read_json(os.path.join(folder, 'meta.json'), {'tokens': dict, 'vocab_size': int})
    return meta or encode_all(folder, source, setup['tokenizer'], shard_tokens, max_tokens, workers)


def make_tokenizer(kind, source, vocab_size):
    """Make the tokenizer for a source -> its spec. 'char' reads all of it, 'bpe' a sample of its training text."""
    if kind == 'char':
        characters = set() if source.single else {'\n'}
        for piece in pieces_with_progress(source, source.units(), 'reading'):
            characters.update(piece.text)
        return CharTokenizer.train(characters).spec()
    if kind == 'bpe':
        print(f'training a BPE with a vocabulary of {vocab_size:,} ...', flush=True)
        return train_bpe(bpe_sample(source), vocab_size)
    return {'kind': kind}


def bpe_sample(source):
    """Yield texts to train a BPE on: BPE_SAMPLE characters, taken from the beginning of each part of the source."""
    for part in range(source.parts):
        left = BPE_SAMPLE // source.parts
        for text in train_texts(source, part):
            if left <= 0:
                break
            yield text[:left]
            left -= len(text) + LONG_RUN_COST * sum(len(run) for run in LONG_RUN.findall(text))


def train_texts(source, part, length=10000):
    """Yield the training text of a part of a source in pieces of at most `length` characters."""
    for unit in source.units(part=part):
        for piece in pieces_of(unit, source.text_key):
            if split_of(piece, threshold_of(source))[0] == 'train':
                for start in range(0, len(piece.text), length):
                    yield piece.text[start : start + length]


def pieces_with_progress(source, units, what):
    """Yield the pieces of the units and show a progress bar."""
    with tqdm(total=source.total, unit='B', unit_scale=True, desc=what, delay=1) as bar:
        for unit in units:
            yield from pieces_of(unit, source.text_key)
            bar.update(unit.position['progress'] - bar.n)


def threshold_of(source):
    """Documents with a hash below this go to validation."""
    return int(source.val_fraction * 2**64)


def encode_all(folder, source, spec, shard_tokens, max_tokens, workers):
    """Encode a source into shards in a folder, continuing at its progress.json -> the description of the data set."""
    with user_errors(ValueError, where=f'{folder}/setup.json is damaged, delete {folder} to start over: '):
        tokenizer = load_tokenizer(spec)
    if source.single:
        separator = []
    else:
        separator = tokenizer.encode('\n').tolist() if spec['kind'] == 'char' else [tokenizer.end_of_text]
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
    threshold = threshold_of(source)
    while True:
        made = Made(folder, dtype.itemsize, shard_tokens, max_tokens, threshold)
        job = Job(spec, separator, dtype.str, made.state['threshold'], source.text_key)
        encode_rest(source, job, made, workers)
        source.check_unchanged()
        if all(split['tokens'] for split in made.state['splits'].values()):
            break
        # With few documents, one split may get none: start over with a threshold that moves the nearest one into it.
        smallest, largest = made.state['hashes'] or (0, 0)
        made.forget()
        if not any(split['tokens'] for split in made.state['splits'].values()):
            raise UserError('there is no text in the input')
        if smallest == largest:
            raise UserError(
                'the input holds fewer than two different documents, too few to split into training and validation '
                'text; give a single text as a text file, which can be split'
            )
        threshold = min(max(threshold, smallest + 1), largest)
    numbers = {
        name: {split: counts[name] for split, counts in made.state['splits'].items()}
        for name in ('tokens', 'documents', 'bytes')
    }
    return {'tokenizer': spec, 'vocab_size': tokenizer.vocab_size, 'dtype': dtype.name, **numbers}


def encode_rest(source, job, made, workers):
    """Encode the rest of a source and add it to what is already made."""
    started = saved = time.perf_counter()
    tokens_before, done = made.train_tokens, made.progress
    if done:
        print(f'continuing after {done / 1e6:,.1f} MB')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    bar = tqdm(total=source.total, initial=done, unit='B', unit_scale=True, desc='encoding', delay=1)
    try:
        with bar, Workers(job, workers or cores) as pool:
            for unit, encoded in pool.map(() if made.is_full else source.units(made.state['position'])):
                made.take(unit, encoded)
                now = time.perf_counter()
                if saved == started:  # the first unit of this process
                    made.check_disk(source.total)
                if now - saved > SAVE_SECONDS or saved == started:
                    made.save()
                    saved = now
                if made.max_tokens:
                    needed = made.progress * made.max_tokens // max(1, made.train_tokens)
                    bar.total = min(source.total or sys.maxsize, needed)
                tokens_per_second = (made.train_tokens - tokens_before) / (now - started)
                bar.set_postfix_str(f'{tokens_per_second / 1e6:.2f}M tokens/s', refresh=False)
                bar.update(made.progress - bar.n)
                if made.is_full:
                    break
        made.save()
    except KeyboardInterrupt:
        made.save()
        print('\ninterrupted; the same command continues from here', file=sys.stderr)
        raise
    finally:
        made.close()


class Made:
    """The shards made so far, and `state`, which progress.json keeps: how far they go."""

    def __init__(self, folder, itemsize, shard_tokens, max_tokens, threshold):
        """Continue at progress.json, or start with this threshold between the splits."""
        self.folder, self.itemsize, self.max_tokens = folder, itemsize, max_tokens
        self.path = os.path.join(folder, 'progress.json')
        types = {'position': (dict, type(None)), 'threshold': int, 'hashes': list, 'splits': dict}
        self.state = read_json(self.path, types) or {
            'position': None,  # of the source, after the last unit
            'threshold': threshold,
            'hashes': [],  # the smallest and the largest hash of the documents
            'splits': {split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in SPLITS},
        }
        with user_errors(KeyError, TypeError, where=f'{self.path} is damaged, delete {folder} to start over: '):
            self.shards = {
                split: Shards(folder, split, itemsize, shard_tokens, self.state['splits'][split]['tokens'])
                for split in SPLITS
            }

    @property
    def train_tokens(self):
        return self.state['splits']['train']['tokens']

    @property
    def progress(self):
        """Bytes of the source that are encoded."""
        return self.state['position']['progress'] if self.state['position'] else 0

    @property
    def is_full(self):
        """Is --max_tokens reached?"""
        return 0 < self.max_tokens <= self.train_tokens

    def take(self, unit, encoded):
        """Add an encoded unit. The state is replaced last, so that it never counts more than the shards hold."""
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
        """Flush the shards to the disk, then the state."""
        for shards in self.shards.values():
            shards.sync()
        write_json(self.path, self.state)

    def close(self):
        """Close the files: some systems cannot move or delete open ones."""
        for shards in self.shards.values():
            shards.close()

    def forget(self):
        """Start over, without progress.json."""
        os.remove(self.path)

    def check_disk(self, total):
        """Raise UserError if the rest, estimated from what is made so far, does not fit on the disk.

        total: bytes of the whole source, None if unknown.
        """
        written = sum(split['tokens'] for split in self.state['splits'].values()) * self.itemsize
        whole = (total or 0) * written / max(1, self.progress)
        if self.max_tokens:
            whole = min(whole, self.max_tokens * self.itemsize) if total else self.max_tokens * self.itemsize
        free = shutil.disk_usage(self.folder).free
        if whole - written > free:
            raise UserError(
                f'{self.folder}: about {(whole - written) / 1e9:,.2f} GB more will be needed, {free / 1e9:,.2f} GB are '
                'free: free some space and run the same command again'
            )


class Shards:
    """The files of one split, each with shard_tokens ids but the last, open for appending."""

    def __init__(self, folder, split, itemsize, shard_tokens, tokens):
        """tokens: the number of ids to keep; whatever the files hold after them is deleted."""
        self.folder, self.split, self.itemsize = folder, split, itemsize
        self.shard_bytes = shard_tokens * itemsize or sys.maxsize
        self.size = tokens * itemsize  # bytes, all files together
        keep = -(-self.size // self.shard_bytes)
        for n in itertools.count(keep):
            if not os.path.exists(self.path(n)):
                break
            os.remove(self.path(n))
        for n in range(keep):
            length = min(self.size - n * self.shard_bytes, self.shard_bytes)
            if not os.path.exists(self.path(n)) or os.path.getsize(self.path(n)) < length:
                raise UserError(
                    f'{self.path(n)} is missing or too short: delete {folder} and run the same command again'
                )
        self.file = None
        if keep:
            self.file = open(self.path(keep - 1), 'r+b')
            self.file.truncate(length)
            self.file.seek(length)

    def path(self, n):
        return os.path.join(self.folder, f'{self.split}_{n:03d}.bin')

    def append(self, ids):
        """Write the bytes of ids, starting a new file whenever one is full."""
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
        """Flush to the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
            self.file = None


def moves(folder, out_dir, meta, shard_tokens):
    """Yield (path while preparing, final path, bytes) of each token file of a data set."""
    itemsize = np.dtype(meta['dtype']).itemsize
    for split, tokens in meta['tokens'].items():
        n_shards = -(-tokens // shard_tokens) if shard_tokens else 1
        for n in range(n_shards):
            name = f'{split}.bin' if n_shards == 1 else f'{split}_{n:03d}.bin'
            length = min(shard_tokens, tokens - n * shard_tokens) if shard_tokens else tokens
            yield os.path.join(folder, f'{split}_{n:03d}.bin'), os.path.join(out_dir, name), length * itemsize


def check_shards(folder, out_dir, meta, shard_tokens):
    """Raise UserError unless each token file is complete, whether it has been moved or not."""
    for prepared, final, n_bytes in moves(folder, out_dir, meta, shard_tokens):
        path = prepared if os.path.exists(prepared) else final
        if not os.path.exists(path) or os.path.getsize(path) != n_bytes:
            raise UserError(f'{prepared} is missing or damaged: delete {folder} and run the same command again')


def publish(folder, out_dir, meta, shard_tokens):
    """Move the token files to where training reads them. After an interruption, a second call moves the rest."""
    write_json(os.path.join(out_dir, 'meta.json'), meta)
    for prepared, final, _ in moves(folder, out_dir, meta, shard_tokens):
        if os.path.exists(prepared):
            os.replace(prepared, final)
    os.remove(os.path.join(folder, 'setup.json'))  # without it, the rest does not count as a preparation
    discard(folder)


def remove_tokens(folder):
    """Delete the token files of a data set, then their masks and lists of documents: in this order, so that after an
    interruption training does not start without a mask."""
    parts = {'': [], '_mask': [], '_documents': []}
    for name in os.listdir(folder):
        found = re.fullmatch(r'(?:train|val)(_mask|_documents|)(?:_\d+)?\.bin', name)
        if found:
            parts[found[1]].append(name)
    for name in sum(parts.values(), []):
        os.remove(os.path.join(folder, name))


def discard(folder):
    """Unlock a folder and delete it; files that the system keeps do no harm."""
    unlock_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def shortest(path):
    """A path relative to the current folder if possible."""
    with suppress(ValueError):  # on another drive of Windows
        return os.path.relpath(path)
    return path


@contextmanager
def writing(out_dir):
    """Context manager: an OSError becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'cannot write {error.filename or out_dir}: {error.strerror or error}; fix that and run '
            'the same command again'
        ) from error


def read_json(path, types):
    """Read a JSON file, None if there is none. UserError unless it is an object with these keys: {key: type}."""
    if not os.path.exists(path):
        return None
    where = f'{path} is damaged, delete {os.path.dirname(path)} to start over: '
    with user_errors(OSError, ValueError, RecursionError, where=where):
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in types.items()):
            raise ValueError(f'it must hold {", ".join(types)}')
        return content


def write_json(path, content):
    """Write a JSON file; after a crash it is either the old one or the new one."""
    with written_whole(path, 'w') as file:
        json.dump(content, file, indent=1)
        file.write('\n')
