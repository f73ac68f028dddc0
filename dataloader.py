"""From token files to batches, in an order that depends only on (seed, step).

A split is one file of little-endian token ids, `train.bin`, or shards, `train_000.bin`, `train_001.bin`, …. Ids are
uint16, or uint32 if meta.json says so or the vocabulary needs it. A training sequence is a window of block_size + 1
consecutive tokens: the inputs, and the same tokens shifted by one as targets.

Beside a split may lie `train_mask.bin`, a byte per token: where it is 0, the token is not a target (its place in
the targets holds -1); and `train_documents.bin`, uint64 offsets of the first token of each document. If meta.json has a
"window", whole documents were packed into windows of so many tokens, and sequences start at these alone.

Windows are read from the files, not memory-mapped: mapped pages count as memory of the process, and a long run would
touch the whole data set. The system's file cache is the same either way; the price is a seek and a read per window.

The global batch of a step is a function of seed and step alone. So there is nothing to replay on resume, and every
number of ranks trains on the same tokens: each rank takes its own micro-batches of the same global batch.
"""

import bisect
import difflib
import functools
import glob
import io
import json
import os
import pickle
import pickletools
import zlib
from collections.abc import Iterator

import numpy as np
import torch

from common.distributed import Ranks
from common.errors import UserError, one_line, user_errors
from configurator import require
from tokenizer import spec_end_of_text, spec_from_meta, spec_vocab_size

MAX_IDS_CHECKED = 2**28  # when a split is opened; of a larger one, evenly spaced pieces. Every batch is checked again
CHECKED_AT_ONCE = 2**22  # ids
EVAL_TOKENS = 2048  # per batch of an evaluation on a CPU
MAX_OPEN_SHARDS = 256  # files; many systems allow 1024 per process


def dataset_name(dataset: str) -> str:
    """The name of a data set: its folder relative to data/, however it was given.

    Example: 'text/novel' for 'text/novel', 'text/novel/' and 'data/text/novel/'.
    """
    name = os.path.normpath(dataset) if dataset else dataset
    if not os.path.isdir(os.path.join('data', name)):
        name = name.removeprefix(os.path.join('data', ''))
    return name.replace(os.sep, '/')


class DataSet:
    """A prepared data set: its folder `path`, its description `meta` (see read_meta), its `tokenizer` and `vocab_size`.

    tokenizer is a spec (see tokenizer.py), or None if only the number of ids is known.
    """

    def __init__(self, name: str):
        """name: a folder in data/, see dataset_name. UserError if it is missing or its description is damaged."""
        self.path = os.path.join('data', dataset_name(name))
        self.meta = read_meta(self.path)
        self.tokenizer, self.vocab_size = read_vocabulary(self.meta, self.path)

    def tokens(self, split: str, vocab_size: int | None = None, mask_documents: bool = False) -> 'Tokens':
        """Open a split, 'train' or 'val', see Tokens. vocab_size: a smaller one, of a model that lacks the last ids.
        mask_documents: say where documents start. UserError if that is not known."""
        tokens = Tokens(self.path, split, self.meta, vocab_size or self.vocab_size)
        if mask_documents:
            n = self.meta.get('documents', {}).get(split) if tokens.window else None
            tokens.documents = read_documents(self.path, split, len(tokens), n)
            if tokens.documents is None:
                tokens.end_of_document = self.end_of_text('mask_documents')
        return tokens

    def end_of_text(self, setting: str) -> int:
        """The id that ends a document. UserError, naming the setting that needs it, if there is none."""
        end_of_text = spec_end_of_text(self.tokenizer) if self.tokenizer else None
        if end_of_text is None:
            raise UserError(f'--{setting}=True: {self.path} has no token that ends a document')
        return end_of_text


def how_to_prepare(data_dir):
    """The command that prepares a data set, for error messages."""
    kind = os.path.basename(os.path.dirname(data_dir))
    own = kind in ('text', 'chat')  # of these, each data set is made from an input of one's own
    return f'run python data/{kind}/prepare.py --input=FILE' if own else f'run python {data_dir}/prepare.py'


def read_meta(data_dir: str) -> dict:
    """Read the description of a data set -> the content of its meta.json; {} if it has no description.

    If that names no tokenizer, the key 'nanogpt' holds the content of nanoGPT's meta.pkl, or the vocab_size of
    meta.json. 'dtype' is always set if the vocabulary needs uint32. No code from the files runs. UserError if the
    folder is missing or a file is damaged.
    """
    if not os.path.isdir(data_dir):
        others = sorted(path for folder in ('*', 'text/*', 'chat/*') for path in glob.glob(f'data/{folder}/train*.bin'))
        paths = {os.path.basename(os.path.dirname(path)): os.path.dirname(path) for path in others}
        nearest = difflib.get_close_matches(os.path.basename(data_dir), paths, n=1)
        hint = f' (did you mean {dataset_name(paths[nearest[0]])}?)' if nearest else ''
        raise UserError(f'there is no data set {data_dir}: {how_to_prepare(data_dir)}, or check --dataset{hint}')
    meta, path = {}, os.path.join(data_dir, 'meta.json')
    if os.path.exists(path):
        where = f'{path} is not a data set description (prepare the data again): '
        with user_errors(OSError, ValueError, RecursionError, where=where), open(path, encoding='utf-8-sig') as file:
            meta = json.load(file)
            check_meta(meta)
    path = os.path.join(data_dir, 'meta.pkl')
    if 'tokenizer' not in meta and os.path.exists(path):
        where = f'{path} is not a nanoGPT meta.pkl: '
        with user_errors(Exception, where=where), open(path, 'rb') as file:  # a damaged pickle raises almost anything
            meta['nanogpt'] = unpickle(file.read())
    elif 'tokenizer' not in meta and 'vocab_size' in meta:
        meta['nanogpt'] = {'vocab_size': meta['vocab_size']}
    if meta and 'dtype' not in meta and read_vocabulary(meta, data_dir)[1] > 2**16:
        meta['dtype'] = 'uint32'
    return meta


def read_vocabulary(meta: dict, data_dir: str) -> tuple[dict | None, int]:
    """The spec of a data set's tokenizer, None if it is unknown, and its vocabulary size. UserError for a bad spec."""
    with user_errors(ValueError, where=f'{data_dir}/meta: '):
        spec = spec_from_meta(meta)
        return spec, spec_vocab_size(spec) if spec else meta['nanogpt']['vocab_size']


def check_meta(meta):
    """Raise ValueError if the content of a meta.json has a field of the wrong type."""
    if not isinstance(meta, dict):
        raise ValueError('it holds no JSON object')
    if 'vocab_size' in meta and not is_count(meta['vocab_size'], 1):
        raise ValueError(f"'vocab_size' must be a positive integer, not {one_line(repr(meta['vocab_size']), 40)}")
    if not is_count(meta.get('window', 1), 1):
        raise ValueError(f"'window' must be a positive integer, not {one_line(repr(meta['window']), 40)}")
    for key in ('tokens', 'documents', 'supervised', 'conversations'):
        numbers = meta.get(key, {})
        if not isinstance(numbers, dict) or not all(map(is_count, numbers.values())):
            shown = one_line(repr(numbers), 80)
            raise ValueError(f'{key!r} must be a whole number for train and one for val, not {shown}')
    if meta.get('dtype') == 'uint16' and meta.get('vocab_size', 0) > 2**16:
        raise ValueError(f"'dtype' is 'uint16', which cannot hold the ids of a vocabulary of {meta['vocab_size']}")


def is_count(value, least=0):
    """Is this an integer (not a bool) of at least `least`?"""
    return type(value) is int and value >= least


def unpickle(content: bytes):
    """Load a pickle of dicts, lists, strings and numbers without running any code from it.

    It cannot allocate more memory than its own size justifies. pickle.UnpicklingError, or almost any other exception,
    if it is damaged or holds anything else.
    """
    for opcode, argument, _ in pickletools.genops(content):  # raises if a length goes beyond the end
        if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and int(argument) > len(content):
            raise pickle.UnpicklingError('it asks for more memory than it can fill')
    return DataUnpickler(io.BytesIO(content)).load()


class DataUnpickler(pickle.Unpickler):
    """Unpickles plain data, including numpy integers; refuses to import any other name, which could run code."""

    def find_class(self, module, name):
        if (module, name) in SAFE_IMPORTS:
            return SAFE_IMPORTS[module, name]
        raise pickle.UnpicklingError(f'it asks to import {module}.{name}; only plain data is read')


class IntegerType:
    """Stands in for np.dtype in a pickle: integers only, such as 'i8'."""

    def __init__(self, code, align=False, copy=True):
        if code not in ('i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'):
            raise pickle.UnpicklingError(
                f'it holds numbers of numpy type {one_line(repr(code), 40)}; only plain data is read'
            )
        self.signed, self.byte_order = code[0] == 'i', 'little'

    def __setstate__(self, state):
        self.byte_order = 'big' if state[1] == '>' else 'little'


def integer_from_bytes(integer_type, content):
    """Stands in for the numpy function that makes a scalar from its bytes."""
    return int.from_bytes(content, integer_type.byte_order, signed=integer_type.signed)


# names that a pickle may import -> what it gets instead
SAFE_IMPORTS = {
    ('numpy', 'dtype'): IntegerType,
    ('numpy.core.multiarray', 'scalar'): integer_from_bytes,
    ('numpy._core.multiarray', 'scalar'): integer_from_bytes,
    ('collections', 'OrderedDict'): dict,
}


class Tokens:
    """The token ids of a split on disk, as one array across its shards: tokens[start:end] and len(tokens) work.

    mask: the same of its mask, or None. window: of meta.json, or 0. documents, end_of_document: how to tell where
    documents start: by their offsets, or by the id that ends each; see DataSet.tokens.
    """

    def __init__(self, data_dir: str, split: str, meta: dict, vocab_size: int | None = None):
        """Open a split and check it.

        data_dir: the folder of the data set.
        split: 'train' or 'val'.
        meta: from read_meta.
        vocab_size: ids at or above it are an error; None: ids are not checked.
        UserError if files are missing, empty, truncated, not as long as meta says, or hold invalid ids.
        """
        dtype = meta.get('dtype', 'uint16')
        if dtype not in ('uint16', 'uint32') and not split.endswith('_mask'):
            raise UserError(f"{data_dir}/meta.json: 'dtype' is {one_line(repr(dtype), 40)}, must be uint16 or uint32")
        self.vocab_size, self.window = vocab_size, meta.get('window', 0)
        self.documents, self.end_of_document = None, None
        self.name = os.path.join(data_dir, f'{split}.bin')
        self.paths = [self.name] if os.path.exists(self.name) else shard_paths(data_dir, split)
        if not self.paths:
            if os.path.isdir(os.path.join(data_dir, 'preparing')):
                raise UserError(
                    f'{self.name} is missing: its preparation is not finished; run the command that started it again'
                )
            raise UserError(f'{self.name} is missing: {how_to_prepare(data_dir)}')
        self.dtype = np.dtype(dtype).newbyteorder('<')
        lengths = [shard_length(path, self.dtype) for path in self.paths]
        self.ends = np.cumsum(lengths).tolist()  # the offset at which each shard ends
        self.open_shard = functools.lru_cache(MAX_OPEN_SHARDS)(open_shard)
        expected = meta.get('tokens', {}).get(split)
        if expected is None and self.dtype.itemsize > 1:
            self.check_width()
        if expected not in (None, len(self)):
            raise UserError(f'{self.name} holds {len(self)} tokens, meta.json says {expected}: prepare the data again')
        if vocab_size is not None:
            self.check_ids()
        self.mask = (
            None
            if split.endswith('_mask')
            else read_mask(data_dir, split, len(self), meta.get('supervised', {}).get(split))
        )

    def __len__(self):
        return self.ends[-1]

    @property
    def marks_documents(self) -> bool:
        """Does sequences() say where documents start?"""
        return self.documents is not None or self.end_of_document is not None

    def __getitem__(self, span: slice) -> np.ndarray:
        ids = np.empty(span.stop - span.start, dtype=self.dtype)
        self.read(span.start, ids)
        return ids

    def read(self, start, ids):
        """Fill the array `ids` with the ids at the offset `start`, across shards."""
        while len(ids):
            n = bisect.bisect_right(self.ends, start)
            shard_start = self.ends[n - 1] if n else 0
            piece = ids[: self.ends[n] - start]
            file = self.open_shard(self.paths[n])
            file.seek((start - shard_start) * ids.itemsize)
            try:
                n_bytes = file.readinto(piece)
            except OSError as error:  # not user_errors: this runs for every sequence of every batch
                raise UserError(f'cannot read {file.name}: {error.strerror}') from error
            if n_bytes != piece.nbytes:
                raise UserError(f'{file.name} has become shorter since it was opened: prepare the data again')
            start, ids = start + len(piece), ids[len(piece) :]

    def check_width(self):
        """Raise UserError if every second id is 0, as when uint32 is read as uint16. For data sets that lack sizes."""
        ids = self[0 : min(CHECKED_AT_ONCE, len(self))]
        if np.count_nonzero(ids) >= 64 and not ids[1::2].any():
            raise UserError(
                f'{self.name}: every second id is 0, so they seem to be stored in more bytes than {self.dtype.name}: '
                'set "dtype" in meta.json to uint16 or uint32, or, if it is right, add "tokens": {"train": …, "val": …}'
            )

    def check_ids(self):
        """Raise UserError if an id is at or above vocab_size; a split over MAX_IDS_CHECKED is checked in pieces."""
        stride = CHECKED_AT_ONCE * max(1, -(-len(self) // MAX_IDS_CHECKED))
        for start in range(0, len(self), stride):
            largest = int(self[start : min(start + CHECKED_AT_ONCE, len(self))].max())
            if largest >= self.vocab_size:
                path = self.paths[bisect.bisect_right(self.ends, start)]
                raise UserError(
                    f'{path} holds the id {largest}, the vocabulary ends at {self.vocab_size - 1}: '
                    'it was prepared with another tokenizer; prepare the data again'
                )

    def windows(self, starts, length: int) -> np.ndarray:
        """Read a window of tokens at each offset -> int64 (len(starts), length). UserError for an invalid id."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for start, row in zip(np.asarray(starts, dtype=np.int64).tolist(), rows):
            self.read(start, row)
        rows = rows.astype(np.int64)
        if self.vocab_size is not None and rows.max(initial=0) >= self.vocab_size:
            raise UserError(
                f'{self.name} holds the id {rows.max()}, the vocabulary ends at {self.vocab_size - 1}: '
                'prepare the data again'
            )
        return rows

    def sequences(self, offsets, T: int):
        """Sequences of T tokens at offsets, each with its targets -> x, y (n, T), the inputs and the same shifted by
        one, -1 where the mask says so; and starts (n, T), the column where each token's document starts, or None.
        All int64. UserError for an invalid id."""
        rows = self.windows(offsets, T + 1)
        x, y, starts = rows[:, :-1], rows[:, 1:], None
        if self.mask:
            y = np.where(self.mask.windows(offsets, T + 1)[:, 1:] == 0, -1, y)
        if self.documents is not None:
            places = np.asarray(offsets, dtype=np.int64)[:, None] + np.arange(T)
            last = np.searchsorted(self.documents, places, side='right') - 1
            starts = np.maximum(self.documents[last] - places[:, :1], 0)  # the first may have started before
        elif self.end_of_document is not None:
            begins = np.pad(x[:, :-1] == self.end_of_document, ((0, 0), (1, 0)))
            starts = np.maximum.accumulate(begins * np.arange(T), axis=1)
        return x, y, starts

    def targets(self, offsets, T: int) -> int:
        """How many targets sequences() would find at these offsets."""
        if self.mask is None:
            return len(offsets) * T
        return int(np.count_nonzero(self.mask.windows(offsets, T + 1)[:, 1:]))

    def require_window(self, block_size: int):
        """Raise UserError if the split is shorter than one sequence, or packed for sequences of another length."""
        if self.window and block_size != self.window:
            raise UserError(
                f'--block_size={block_size}: {self.name} is packed into windows of {self.window} tokens: use '
                f'--block_size={self.window}, or prepare it again with --block_size={block_size}'
            )
        if len(self) <= block_size:
            raise UserError(
                f'{self.name} holds {len(self)} tokens, too few for one sequence of block_size + 1 = {block_size + 1}: '
                f'lower --block_size or prepare more text'
            )


def read_mask(data_dir, split, length, targets=None) -> Tokens | None:
    """The mask of a split of `length` tokens, None if it has none. targets: how many it marks, if that is known.
    UserError if it does not fit, or hides all."""
    path = os.path.join(data_dir, f'{split}_mask.bin')
    if not os.path.exists(path) and not shard_paths(data_dir, f'{split}_mask'):
        if targets is not None:
            raise UserError(f'{path} is missing, without which questions would be learned too: prepare the data again')
        return None
    mask = Tokens(data_dir, f'{split}_mask', {'dtype': 'uint8'})
    if len(mask) != length:
        raise UserError(f'{mask.name} is of {len(mask)} tokens, the split has {length}: prepare the data again')
    pieces = range(0, length, CHECKED_AT_ONCE)
    found = sum(np.count_nonzero(mask[start : min(start + CHECKED_AT_ONCE, length)]) for start in pieces)
    if not found:
        raise UserError(f'{mask.name} is all zeros: no token of the split is a target')
    if targets not in (None, found):
        raise UserError(f'{mask.name} marks {found} targets, meta.json says {targets}: prepare the data again')
    return mask


def read_documents(data_dir, split, length, n=None) -> np.ndarray | None:
    """The offsets of the first token of each document in a split of `length` tokens, int64; None if none are listed.
    n: how many there are, if that is known. UserError if they are not increasing from 0."""
    path = os.path.join(data_dir, f'{split}_documents.bin')
    if n is None and not os.path.exists(path):
        return None
    with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
        if os.path.getsize(path) % 8 or n not in (None, os.path.getsize(path) // 8):
            raise ValueError(f'it must hold {n or "only"} offsets of 8 bytes; prepare the data again')
        offsets = np.fromfile(path, dtype='<u8')
        if not len(offsets) or offsets[0] or offsets[-1] >= length or (offsets[1:] <= offsets[:-1]).any():
            raise ValueError('it does not list increasing offsets from 0 into the tokens; prepare the data again')
    return offsets.astype(np.int64)


def shard_paths(data_dir, split):
    """The shards of a split in order: train_000.bin, train_001.bin, …; 1000 comes after 999."""
    paths = glob.glob(os.path.join(glob.escape(data_dir), f'{split}_[0-9]*.bin'))
    return sorted(paths, key=lambda path: (len(path), path))


def open_shard(path):
    """Open a file for random access, unbuffered: a buffer would read more than a window each time."""
    with user_errors(OSError, where=f'cannot read {path}: '):
        return open(path, 'rb', buffering=0)


def shard_length(path, dtype):
    """Number of ids in a file. UserError if it is empty, truncated or cannot be read."""
    with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
        size = os.path.getsize(path)
        if size == 0:
            raise ValueError('it is empty; prepare the data again')
        with open_shard(path) as file:
            if file.read(6) == b'\x93NUMPY':
                raise ValueError("it is a .npy file, not raw ids: write it with numpy's tofile")
        if size % dtype.itemsize:
            raise ValueError(
                f'{size} bytes are not a whole number of {dtype.name} ids, so it was cut short; prepare the data again'
            )
    return size // dtype.itemsize


def random_words(n: int, *key: int) -> np.ndarray:
    """n pseudo-random 64-bit integers, a function of the key alone: numpy guarantees these streams never change."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


class TrainBatches:
    """The training batches of one rank, step after step."""

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        batch_size: int,
        micro_batches: int,
        seed: int,
        order: str,
        ranks: Ranks,
        device: torch.device,
        step: int = 0,
        ramp: tuple[int, int] = (0, 0),
        end_of_text: int | None = None,
        taken: int | None = None,
    ):
        """Start at a step; nothing before it is read.

        tokens: the training split.
        block_size: tokens per sequence.
        batch_size: sequences per micro-batch.
        micro_batches: micro-batches per step, all ranks together.
        seed: of the order.
        order: 'random': sequences start anywhere, as in nanoGPT. 'shuffle': every epoch takes every sequence once; it
            cuts the split into adjacent sequences, at an offset and in an order of its own.
        ranks: of w ranks, rank r takes the micro-batches r, r + w, r + 2w, … of each step. If these do not come out
            even, some ranks end a step with a batch of padding.
        device: where to put the batches.
        step: the first step.
        ramp: (first, steps): the number of micro-batches grows linearly from `first` over `steps` steps, in multiples
            of it.
        end_of_text: the id that ends a document; a sequence then moves forward to the start of the next document if
            that is less than block_size tokens away. None: sequences stay where they are.
        taken: sequences that the run took before `step`; None: computed from the present batch settings.
        """
        tokens.require_window(block_size)
        self.end_of_text = end_of_text
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed, self.order, self.ranks, self.device = seed, order, ranks, device
        first, steps = ramp
        self.ramp = [first + (micro_batches - first) * s // steps // first * first for s in range(steps)]
        self.ramp.append(micro_batches)  # micro-batches of each step of the ramp, then of all further steps
        self.ramp_starts = np.cumsum([0, *self.ramp])  # micro-batches before each step
        self.step, self.micro = step, ranks.rank  # what next() returns next
        self.lead = 0  # sequences taken before `step` beyond those of batches of the present size
        if taken is not None:
            self.lead = taken - self.taken(step)
        self.cached_step, self.cached_starts, self.cached_targets = None, None, 0
        self.epochs = {}  # epoch -> its shuffled starts, of the last two: a step may end one and start the next

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
        """The next micro-batch of this rank, on the device -> x, y, starts as of Tokens.sequences, int64 (batch_size,
        block_size); and the weight by which its mean loss counts in the mean of all ranks' sums: the step's loss is
        the mean over its targets, and with a mask some micro-batches have more of them.

        Padding is x of zeros and y of -1: its loss and its gradient are 0, and nothing is read for it.
        """
        if self.step != self.cached_step:
            self.cached_step, self.cached_starts = self.step, self.window_starts(self.step)
            self.cached_targets = self.tokens.targets(self.cached_starts, self.block_size)
        starts = self.cached_starts[self.micro * self.batch_size :][: self.batch_size]
        self.micro += self.ranks.world_size
        if self.micro >= self.rounds_at(self.step) * self.ranks.world_size:
            self.step, self.micro = self.step + 1, self.ranks.rank
        if not len(starts):
            return *padding((self.batch_size, self.block_size), self.tokens.marks_documents, self.device), 0.0
        if self.end_of_text is not None:
            starts = self.move_to_documents(starts)
        x, y, starts = self.tokens.sequences(starts, self.block_size)
        weight = self.ranks.world_size * np.count_nonzero(y >= 0) / max(1, self.cached_targets)
        return *to_device(self.device, x, y, starts), weight

    def move_to_documents(self, starts):
        """Move offsets forward to the next start of a document, where it is near and a full sequence follows it."""
        starts = starts.astype(np.int64)
        previous = self.tokens.windows(np.maximum(starts - 1, 0), self.block_size)  # a document follows an end_of_text
        moved = starts + ((previous == self.end_of_text) & (starts > 0)[:, None]).argmax(axis=1)
        return np.where(moved < len(self.tokens) - self.block_size, moved, starts)

    def micro_batches_at(self, step: int) -> int:
        """Micro-batches of a step, all ranks together."""
        return self.ramp[min(step, len(self.ramp) - 1)]

    def rounds_at(self, step: int) -> int:
        """Micro-batches of every single rank in a step, padding included: ranks that share a model step together."""
        return -(-self.micro_batches_at(step) // self.ranks.world_size)

    def taken(self, step: int) -> int:
        """Sequences that the run takes before a step; with order 'shuffle', its position in the epochs."""
        ramp_end = len(self.ramp) - 1
        micro_batches = self.ramp_starts[min(step, ramp_end)] + max(0, step - ramp_end) * self.ramp[-1]
        return int(micro_batches) * self.batch_size + self.lead

    def window_starts(self, step):
        """Offsets of the sequences in the global batch of a step -> int (micro_batches_at(step) * batch_size,)."""
        size, window = self.micro_batches_at(step) * self.batch_size, self.tokens.window
        if self.order == 'random' and window:
            n = (len(self.tokens) - 1) // window
            return random_words(size, self.seed, step) % np.uint64(n) * np.uint64(window)
        if self.order == 'random':
            return random_words(size, self.seed, step) % np.uint64(len(self.tokens) - self.block_size)
        per_epoch = (len(self.tokens) - 1) // self.block_size
        if not window:
            per_epoch = max(1, len(self.tokens) // self.block_size - 1)  # so that they fit at any offset
        starts, position = [], self.taken(step)
        end = position + size
        while position < end:
            epoch, i = divmod(position, per_epoch)
            starts.append(self.shuffled_starts(epoch, per_epoch)[i : i + end - position])
            position += len(starts[-1])
        return np.concatenate(starts)

    def shuffled_starts(self, epoch, n):
        """Offsets of an epoch's n sequences, shuffled -> int (n,)."""
        if epoch not in self.epochs:
            words = random_words(n + 1, self.seed, epoch, 1)
            offset = int(words[-1]) % min(self.block_size, len(self.tokens) - n * self.block_size)
            offset = 0 if self.tokens.window else offset
            starts = np.argsort(words[:-1], kind='stable') * self.block_size + offset
            self.epochs = {e: kept for e, kept in self.epochs.items() if e == epoch - 1} | {epoch: starts}
        return self.epochs[epoch]


def text_checksum(tokens: Tokens, pieces: int = 64, length: int = 2048) -> int:
    """CRC-32 of a split's length and of evenly spaced pieces of it and its mask, to notice that a data set has
    changed."""
    crc = text_checksum(tokens.mask) if tokens.mask else zlib.crc32(str(len(tokens)).encode())
    crc = crc if tokens.documents is None else zlib.crc32(tokens.documents.tobytes(), crc)
    for start in np.linspace(0, max(0, len(tokens) - length), pieces, dtype=np.int64).tolist():
        crc = zlib.crc32(tokens[start : min(start + length, len(tokens))].tobytes(), crc)
    return crc


def eval_batches(
    tokens: Tokens, block_size: int, batch_size: int, n_batches: int, ranks: Ranks, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield this rank's evaluation batches: x, y, starts as in training; y is -1 in the rows that pad the last batch.

    The sequences are the same at every call: at most n_batches * batch_size, adjacent if they cover the split, else
    evenly spaced. They come in batches of batch_size, on a CPU of EVAL_TOKENS tokens. Of w ranks, rank r takes the
    batches r, r + w, r + 2w, …, and all of them equally many, as sharded models are computed by all ranks together:
    some get a batch of padding at the end.
    """
    tokens.require_window(block_size)
    available = (len(tokens) - 1) // block_size
    count = min(n_batches * batch_size, available)
    if device.type == 'cpu':  # fastest while activations stay in its cache
        batch_size = max(1, EVAL_TOKENS // block_size)
    batch_size = min(batch_size, -(-count // ranks.world_size))
    starts = np.arange(count) * available // count * block_size
    together = ranks.world_size * batch_size
    for first in range(ranks.rank * batch_size, -(-count // together) * together, together):
        rows = starts[first : first + batch_size]
        missing = padding((batch_size - len(rows), block_size), tokens.marks_documents, device)
        batch = to_device(device, *tokens.sequences(rows, block_size))
        yield tuple(None if part is None else torch.cat((part, pad)) for part, pad in zip(batch, missing))


def padding(shape, marks_documents: bool, device):
    """x, y, starts of sequences without targets: int64 of this shape, starts None if documents are not marked."""
    x, y = (torch.full(shape, value, device=device) for value in (0, -1))
    return x, y, torch.zeros_like(x) if marks_documents else None


def to_device(device, *arrays):
    """Arrays (None for one that is missing) -> tensors on the device."""
    tensors = [None if array is None else torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == 'cuda':  # pinned memory: the copy overlaps with what the host does next
        return [None if one is None else one.pin_memory().to(device, non_blocking=True) for one in tensors]
    return [None if one is None else one.to(device) for one in tensors]


def training_batches(data, tokens, config, ranks, device, step, taken) -> TrainBatches:
    """The TrainBatches that a run's settings describe.

    data: the DataSet. tokens: its training split. config: settings as in train.py. step, taken: as in TrainBatches.
    UserError if --align_documents=True finds no token that ends a document.
    """
    require(config, 'data_order', "'random' or 'shuffle'", lambda v: v in ('random', 'shuffle'))
    end_of_text = None
    if config['align_documents']:
        if tokens.window or tokens.mask:
            raise UserError(f'--align_documents=True: not with {data.path}, which is packed or masked; leave it out')
        end_of_text = data.end_of_text('align_documents')
    micro_batches, first = config['gradient_accumulation_steps'], config['batch_ramp_from']
    return TrainBatches(
        tokens,
        config['block_size'],
        config['batch_size'],
        micro_batches,
        config['seed'],
        config['data_order'],
        ranks,
        device,
        step,
        ramp=(first or micro_batches, config['batch_ramp_iters']),
        end_of_text=end_of_text,
        taken=taken,
    )


def check_global_batch(config, world_size: int):
    """UserError for batches that cannot be; and, for training, unless the micro-batches of every step can be divided
    among the ranks, while they grow too.

    With --uneven=True any number of ranks will do.
    """
    require(config, 'gradient_accumulation_steps batch_size', 'at least 1', lambda v: v >= 1)
    require(config, 'batch_ramp_from batch_ramp_iters', 'a number from 0 to 10,000,000', lambda v: 0 <= v <= 10**7)
    if config['eval_only']:
        return
    micro_batches, first = config['gradient_accumulation_steps'], config['batch_ramp_from']
    if bool(first) != bool(config['batch_ramp_iters']):
        raise UserError('--batch_ramp_from and --batch_ramp_iters: a growing batch needs both')
    if first and micro_batches % first:
        raise UserError(f'--batch_ramp_from={first}: must divide --gradient_accumulation_steps={micro_batches}')
    for key in ('gradient_accumulation_steps', 'batch_ramp_from'):
        if config[key] % world_size and not config['uneven']:
            lower = config[key] // world_size * world_size
            use = f'{lower} or {lower + world_size}' if lower else world_size
            raise UserError(
                f'--{key}={config[key]} cannot be divided among {world_size} ranks: use {use}, or --uneven=True'
            )
