"""Token files to batches, in an order that is a function of (seed, step) alone.

A split is raw little-endian ids, `train.bin` or shards `train_000.bin, train_001.bin, …`. They are uint16 unless the data set's
meta.json says uint32, or says neither and the vocabulary needs it. A window is block_size + 1 consecutive tokens: the input and, one
further, the target.

Windows are read from the files, not mapped into memory: what a process has mapped counts as its memory, and over a long run that
would be the whole data set. The system keeps in its cache what it has room for either way.

Because the global batch of a step depends on nothing but the seed and the step, resuming has nothing to replay, and any
number of ranks trains on the same tokens: each takes its own micro-batches of the same global batch.
"""

import bisect
import functools
import glob
import io
import json
import os
import pickle
import pickletools
import zlib

import numpy as np
import torch

from common.errors import UserError, one_line, user_errors
from tokenizer import spec_from_meta, spec_vocab_size

MAX_IDS_CHECKED = 2**28  # on opening, a larger split is checked in evenly spread pieces; every batch is checked again
CHECKED_AT_ONCE = 2**22  # ids
MAX_OPEN_SHARDS = 256  # files; many systems allow a process 1024


def dataset_name(dataset):
    """How a data set is called: its folder below data/, whichever way the folder was written, data/text/novel/ or text/novel."""
    name = os.path.normpath(dataset) if dataset else dataset
    below = os.path.join('data', '')
    return (name.removeprefix(below) if not os.path.isdir(os.path.join('data', name)) else name).replace(os.sep, '/')


def read_meta(data_dir):
    """What a data set says of itself -> dict: its meta.json, and, unless that holds a tokenizer, under 'nanogpt' a nanoGPT meta.pkl, or the
    vocab_size of the meta.json; {} if there is neither file. 'dtype' is there whenever the vocabulary needs uint32. Raises UserError if
    the folder is missing or a file cannot be trusted. Runs no code from them."""
    if not os.path.isdir(data_dir):
        raise UserError(
            f'there is no data set {data_dir}: run python {data_dir}/prepare.py (data/*/readme.md describe those '
            'that come with SAMgpt), or check --dataset'
        )
    meta, path = {}, os.path.join(data_dir, 'meta.json')
    if os.path.exists(path):
        with user_errors(
            OSError,
            ValueError,
            RecursionError,
            where=f'{path} is not a data set description (prepare the data again): ',
        ):
            with open(path, encoding='utf-8-sig') as file:
                meta = json.load(file)
            check_meta(meta)
    path = os.path.join(data_dir, 'meta.pkl')
    if 'tokenizer' not in meta and os.path.exists(path):
        with user_errors(
            Exception, where=f'{path} is not a nanoGPT meta.pkl: '
        ):  # a broken pickle raises almost anything
            with open(path, 'rb') as file:
                meta['nanogpt'] = unpickle(file.read())
    elif 'tokenizer' not in meta and 'vocab_size' in meta:
        meta['nanogpt'] = {'vocab_size': meta['vocab_size']}
    if meta and 'dtype' not in meta:
        with user_errors(ValueError, where=f'{data_dir}/meta: '):
            spec = spec_from_meta(meta)
            if (spec_vocab_size(spec) if spec else meta['nanogpt']['vocab_size']) > 2**16:
                meta['dtype'] = 'uint32'
    return meta


def check_meta(meta):
    """Raise ValueError unless what a meta.json tells is of the kinds that it must be, as far as it is told."""
    if not isinstance(meta, dict):
        raise ValueError('it holds no JSON object')
    if 'vocab_size' in meta and not is_count(meta['vocab_size'], 1):
        raise ValueError(f"'vocab_size' must be a whole number from 1 on, not {one_line(repr(meta['vocab_size']), 40)}")
    tokens = meta.get('tokens', {})
    if not isinstance(tokens, dict) or not all(map(is_count, tokens.values())):
        raise ValueError(f"'tokens' must be a whole number for train and one for val, not {one_line(repr(tokens), 80)}")
    if meta.get('dtype') == 'uint16' and meta.get('vocab_size', 0) > 2**16:
        raise ValueError(f"'dtype' is 'uint16', which cannot hold the ids of a vocabulary of {meta['vocab_size']}")


def is_count(value, least=0):
    """Is this a whole number, and at least so much?"""
    return type(value) is int and value >= least


def unpickle(content):
    """The dicts, lists, texts and whole numbers in a pickle; pickle.UnpicklingError, or almost any other, if it is broken or holds anything
    else. Nothing of it is run, and it gets no more memory than its size can fill."""
    for opcode, argument, _ in pickletools.genops(content):  # lengths beyond the end are errors here
        if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and int(argument) > len(content):
            raise pickle.UnpicklingError('it asks for more memory than it can fill')
    return DataUnpickler(io.BytesIO(content)).load()


class DataUnpickler(pickle.Unpickler):
    """Reads pickled dicts, lists, texts and numbers, whole numbers of numpy's too; refuses whatever else would import a name, and with it
    run code."""

    def find_class(self, module, name):
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        raise pickle.UnpicklingError(f'it asks to import {module}.{name}; only plain data is read')


class WholeNumberType:
    """Stands for np.dtype in a pickle: of which type of whole numbers, such as 'i8', and in which order of bytes."""

    def __init__(self, code, align=False, copy=True):
        if code not in ('i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'):
            raise pickle.UnpicklingError(
                f'it holds numbers of numpy type {one_line(repr(code), 40)}; only plain data is read'
            )
        self.signed, self.order = code[0] == 'i', 'little'

    def __setstate__(self, state):
        self.order = 'big' if state[1] == '>' else 'little'


def whole_number(kind, content):
    """Stands for numpy's function that makes a scalar from its bytes."""
    return int.from_bytes(content, kind.order, signed=kind.signed)


# what a pickle may ask to import, and what it gets instead
PLAIN = {
    ('numpy', 'dtype'): WholeNumberType,
    ('numpy.core.multiarray', 'scalar'): whole_number,
    ('numpy._core.multiarray', 'scalar'): whole_number,
    ('collections', 'OrderedDict'): dict,
}


class Tokens:
    """One split on disk, as one long row of ids. `tokens[start:end]` is a row across shards; len(tokens) counts them."""

    def __init__(self, data_dir, split, meta, vocab_size=None):
        """meta: from read_meta. vocab_size: ids must lie below it. Raises UserError for files that are missing, empty,
        cut short, of another size than meta tells, or hold ids out of range."""
        dtype = meta.get('dtype', 'uint16')
        if dtype not in ('uint16', 'uint32'):
            raise UserError(f"{data_dir}/meta.json: 'dtype' is {one_line(repr(dtype), 40)}, must be uint16 or uint32")
        self.vocab_size = vocab_size
        self.name = os.path.join(data_dir, f'{split}.bin')
        self.paths = (
            [self.name]
            if os.path.exists(self.name)
            else sorted(
                glob.glob(os.path.join(glob.escape(data_dir), f'{split}_*.bin')), key=lambda path: (len(path), path)
            )
        )  # 1000 after 999
        if not self.paths:
            if os.path.isdir(os.path.join(data_dir, 'preparing')):
                raise UserError(
                    f'{self.name} is missing: its preparation is not finished, the command that began it goes on with it'
                )
            raise UserError(f'{self.name} is missing: run python {data_dir}/prepare.py')
        self.dtype = np.dtype(dtype).newbyteorder('<')
        self.ends = np.cumsum(
            [shard_length(path, self.dtype) for path in self.paths]
        ).tolist()  # of the shards, in the row
        self.open_shard = functools.lru_cache(MAX_OPEN_SHARDS)(open_shard)
        expected = meta.get('tokens', {}).get(split)
        if expected is None:
            self.check_width()
        elif expected != len(self):
            raise UserError(f'{self.name} holds {len(self)} tokens, meta.json says {expected}: prepare the data again')
        if vocab_size is not None:
            self.check_ids()

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, span):
        row = np.empty(span.stop - span.start, dtype=self.dtype)
        self.read(span.start, row)
        return row

    def read(self, start, row):
        """Fill a row with the ids from `start` on, across shards."""
        while len(row):
            n = bisect.bisect_right(self.ends, start)
            first = self.ends[n - 1] if n else 0
            piece = row[: self.ends[n] - start]
            file = self.open_shard(self.paths[n])
            file.seek((start - first) * row.itemsize)
            try:
                n_bytes = file.readinto(piece)
            except OSError as error:
                raise UserError(f'cannot read {file.name}: {error.strerror}') from error
            if n_bytes != piece.nbytes:
                raise UserError(f'{file.name} has become shorter since it was opened: prepare the data again')
            start, row = start + len(piece), row[len(piece) :]

    def check_width(self):
        """Raise UserError if every second id is 0, as in a file of wider ids than it was taken for. For where no sizes are told."""
        ids = self[0 : min(CHECKED_AT_ONCE, len(self))]
        if np.count_nonzero(ids) >= 64 and not ids[1::2].any():
            raise UserError(
                f'{self.name}: every second id is 0, so they seem to be stored in more bytes than {self.dtype.name}: tell the '
                'right "dtype", uint16 or uint32, in meta.json, or, if this is right, "tokens": {"train": …, "val": …}, too'
            )

    def check_ids(self):
        """Raise UserError if an id at or above vocab_size is found: in all of a split, or in MAX_IDS_CHECKED of a larger one."""
        stride = CHECKED_AT_ONCE * max(1, -(-len(self) // MAX_IDS_CHECKED))
        for start in range(0, len(self), stride):
            largest = int(self[start : min(start + CHECKED_AT_ONCE, len(self))].max())
            if largest >= self.vocab_size:
                path = self.paths[bisect.bisect_right(self.ends, start)]
                raise UserError(
                    f'{path} holds the id {largest}, the vocabulary ends at {self.vocab_size - 1}: '
                    'it was prepared with another tokenizer; prepare the data again'
                )

    def windows(self, starts, length):
        """Windows at the given offsets -> int64 array (len(starts), length). UserError for an id out of range."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for start, row in zip(np.asarray(starts, dtype=np.int64).tolist(), rows):
            self.read(start, row)
        rows = rows.astype(np.int64)
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            raise UserError(
                f'{self.name} holds the id {rows.max()}, the vocabulary ends at {self.vocab_size - 1}: prepare the data again'
            )
        return rows

    def require_window(self, block_size):
        """Raise UserError unless at least one window fits."""
        if len(self) <= block_size:
            raise UserError(
                f'{self.name} holds {len(self)} tokens, too few for one window of block_size + 1 = {block_size + 1}: '
                f'lower --block_size or prepare more text'
            )


def open_shard(path):
    """A file for reading at any place; without a buffer, which would read more than a window."""
    with user_errors(OSError, where=f'cannot read {path}: '):
        return open(path, 'rb', buffering=0)


def shard_length(path, dtype):
    """How many ids a file holds. UserError if none, not a whole number of them, or it cannot be read."""
    with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
        size = os.path.getsize(path)
        if size == 0:
            raise ValueError('it is empty; prepare the data again')
        with open_shard(path) as file:
            if file.read(6) == b'\x93NUMPY':
                raise ValueError("it is a .npy file, not bare ids: write it by numpy's tofile")
        if size % dtype.itemsize:
            raise ValueError(
                f'{size} bytes are not a whole number of {dtype.name} ids, so it was cut short; prepare the data again'
            )
    return size // dtype.itemsize


def random_words(n, *key):
    """n pseudo-random 64-bit words, a function of the key alone: numpy promises that these bit streams never change."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


class TrainBatches:
    """The training order of one rank.

    A step's global batch is `micro_batches` micro-batches of `batch_size` windows. ramp, (first, steps): it begins with `first`
    of them and grows linearly over so many steps, in multiples of `first`. order 'random': windows start anywhere,
    as in nanoGPT. order 'shuffle': an epoch cuts the split into windows side by side, at an offset of its own, and takes
    each once in an order of its own. Of the global batch, rank r of w takes every w-th micro-batch, beginning with the r-th.
    end_of_text: with the id that ends documents, a window moves on to where one begins, if one does within block_size tokens.
    taken: windows that the run has taken before `step`, for one that had other batches until then; None: as these batches would have.
    """

    def __init__(
        self,
        tokens,
        block_size,
        batch_size,
        micro_batches,
        seed,
        order,
        ranks,
        device,
        step=0,
        ramp=(0, 0),
        end_of_text=None,
        taken=None,
    ):
        tokens.require_window(block_size)
        self.end_of_text = end_of_text
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed, self.order, self.ranks, self.device = seed, order, ranks, device
        first, steps = ramp
        self.ramp = [
            first + (micro_batches - first) * s // steps // first * first for s in range(steps)
        ]  # micro-batches of each step
        self.ramp.append(micro_batches)  # and of all further ones
        self.ramp_starts = np.cumsum([0, *self.ramp])  # micro-batches before each step
        self.step, self.micro = step, ranks.rank  # what next() takes next
        self.lead = 0  # windows that were taken beside those which these batches would have
        if taken is not None:
            self.lead = taken - self.taken(step)
        self.cached_step, self.cached_starts = None, None
        self.epochs = {}  # the orders of the last two epochs: a step may end one and begin the next

    def next(self):
        """The next micro-batch of this rank -> x, y: int64 (batch_size, block_size) on the device, y one token further."""
        if self.step != self.cached_step:
            self.cached_step, self.cached_starts = self.step, self.window_starts(self.step)
        starts = self.cached_starts[self.micro * self.batch_size :][: self.batch_size]
        self.micro += self.ranks.world_size
        if self.micro >= self.micro_batches_at(self.step):
            self.step, self.micro = self.step + 1, self.ranks.rank
        if self.end_of_text is not None:
            starts = self.document_starts(starts)
        return to_device(self.tokens.windows(starts, self.block_size + 1), self.device)

    def document_starts(self, starts):
        """Offsets of windows, moved on to the first beginning of a document within block_size tokens, where there is one and a window
        fits behind it."""
        starts = starts.astype(np.int64)
        before = self.tokens.windows(
            np.maximum(starts - 1, 0), self.block_size
        )  # a document begins behind another's end
        moved = starts + ((before == self.end_of_text) & (starts > 0)[:, None]).argmax(axis=1)
        return np.where(moved < len(self.tokens) - self.block_size, moved, starts)

    def micro_batches_at(self, step):
        """Micro-batches in the global batch of a step."""
        return self.ramp[min(step, len(self.ramp) - 1)]

    def taken(self, step):
        """Windows that the run has taken before a step: the place of the step in the order 'shuffle'."""
        ramp_end = len(self.ramp) - 1
        micro_batches = self.ramp_starts[min(step, ramp_end)] + max(0, step - ramp_end) * self.ramp[-1]
        return int(micro_batches) * self.batch_size + self.lead

    def window_starts(self, step):
        """Offsets of the windows in the global batch of a step -> int array (micro_batches_at(step) * batch_size,)."""
        size = self.micro_batches_at(step) * self.batch_size
        if self.order == 'random':
            return random_words(size, self.seed, step) % np.uint64(len(self.tokens) - self.block_size)
        n_windows = max(1, len(self.tokens) // self.block_size - 1)  # fit at any offset up to a window's length
        starts, position = [], self.taken(step)
        end = position + size
        while position < end:
            epoch, first = divmod(position, n_windows)
            starts.append(self.shuffled_starts(epoch, n_windows)[first : first + end - position])
            position += len(starts[-1])
        return np.concatenate(starts)

    def shuffled_starts(self, epoch, n_windows):
        """Offsets of an epoch's windows in its order -> int array (n_windows,)."""
        if epoch not in self.epochs:
            words = random_words(n_windows + 1, self.seed, epoch, 1)
            offset = int(words[-1]) % min(self.block_size, len(self.tokens) - n_windows * self.block_size)
            starts = np.argsort(words[:-1], kind='stable') * self.block_size + offset
            self.epochs = {e: order for e, order in self.epochs.items() if e == epoch - 1} | {epoch: starts}
        return self.epochs[epoch]


def text_checksum(tokens, pieces=64, length=2048):
    """A number that tells one text from another: CRC-32 of how many tokens there are, and of so many pieces spread over them."""
    crc = zlib.crc32(str(len(tokens)).encode())
    for start in np.linspace(0, max(0, len(tokens) - length), pieces, dtype=np.int64).tolist():
        crc = zlib.crc32(tokens[start : min(start + length, len(tokens))].tobytes(), crc)
    return crc


def eval_batches(tokens, block_size, batch_size, n_batches, ranks, device):
    """Yield this rank's share of the evaluation: x, y as in training, y = -1 in rows that only fill up the last batch.

    The windows are the same at every call: up to n_batches * batch_size of them, side by side where that covers the split,
    evenly spread over it otherwise. Batch j belongs to rank j mod world_size.
    """
    tokens.require_window(block_size)
    available = (len(tokens) - 1) // block_size
    count = min(n_batches * batch_size, available)
    starts = np.arange(count) * available // count * block_size
    for first in range(ranks.rank * batch_size, count, ranks.world_size * batch_size):
        rows = tokens.windows(starts[first : first + batch_size], block_size + 1)
        padding = np.full((batch_size - len(rows), block_size + 1), -1)  # one shape for all, so that nothing recompiles
        x, y = to_device(np.concatenate((rows, padding)), device)
        yield x.clamp_min(0), y


def to_device(rows, device):
    """Windows (B, T + 1) -> inputs and targets, (B, T) each, on the device."""
    x, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))
    if device.type == 'cuda':  # pinned memory lets the copy run while the host goes on
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)
