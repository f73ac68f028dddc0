"""What check.py asks of the data: valid ids, two splits of the same kind of text, nothing repeated, nothing leaked.

Large splits are looked at in part, and each line says how much of them was looked at.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from dataloader import DataSet, Tokens, read_documents
from tokenizer import gpt2_is_cached, load_tokenizer, spec_end_of_text

PIECE = 2**20  # ids read at once
WINDOW = 64  # tokens of a passage that is looked for in train; a power of two
BASE = 0x9E3779B97F4A7C15  # of the hashes of passages: odd, without structure (2**64 over the golden ratio)
DISTINCT = 8  # a passage with fewer different ids is padding or a ruler, which says nothing
SHORTEST = 32  # tokens; shorter documents, such as 'Thank you.', repeat by chance


class Finding(NamedTuple):
    """One line of check.py."""

    check: str  # its name
    level: str  # 'ok', 'warning', 'error'
    found: str
    advice: str = ''  # what to do about it; '' if it is ok


def judge(check: str, found: str, *rules: tuple) -> Finding:
    """A Finding by the first rule that applies; ok if none does.

    rules: (does it apply?, 'warning' or 'error', advice).
    """
    for applies, level, advice in rules:
        if applies:
            return Finding(check, level, found, advice)
    return Finding(check, 'ok', found)


# --- ids --------------------------------------------------------------------------------------------------------------


def spans(length: int, most: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of a split of `length` tokens: all of it, or evenly spaced ones of `most` in all."""
    size = min(PIECE, most)
    if length <= most:
        return [(start, min(start + size, length)) for start in range(0, length, size)]
    n = most // size
    return [(start, start + size) for start in (np.arange(n) * (length - size) // max(1, n - 1)).tolist()]


def count_ids(tokens: Tokens, n_ids: int, most: int) -> np.ndarray:
    """How often each id occurs in the pieces of spans() -> int64 (n_ids,). UserError for an id beyond these."""
    counts = np.zeros(n_ids, dtype=np.int64)
    for start, end in spans(len(tokens), most):
        found = np.bincount(tokens[start:end], minlength=n_ids)
        if len(found) > n_ids:  # opening a large split looks at a part of it
            raise UserError(f'{tokens.name} holds the id {len(found) - 1}, the vocabulary ends at {n_ids - 1}')
        counts += found
    return counts


def entropy(p: np.ndarray) -> float:
    """Entropy in nats of probabilities."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def check_ids(counts: dict[str, np.ndarray]) -> Finding:
    """Are the ids those of text? counts: {split: from count_ids}."""
    train = counts['train']
    n, used, most = train.sum(), np.count_nonzero(train), train.max()
    found = (
        f'{n:,} ids of train and {counts["val"].sum():,} of val below {len(train):,}, {used:,} of them in use; '
        f'the most frequent, {train.argmax()}, is {most / n:.1%} of train'
    )
    padding = 'is it padding? Prepare the data again, or mask it (docs/data.md)'
    return judge('ids', found, (most > 0.99 * n, 'error', padding), (most > 0.5 * n, 'warning', padding))


def check_splits(counts: dict[str, np.ndarray]) -> Finding:
    """Are train and val the same kind of text, in the same encoding? By the frequencies of their ids: the cross-entropy
    of val under those of train, against train's own entropy. The first is a mean over val's tokens, so that a small val
    does not make it larger."""
    train, val = counts['train'], counts['val']
    p = (train + 0.5) / (train + 0.5).sum()  # ids that train lacks are not impossible
    cross, own = float(-(val * np.log(p)).sum() / val.sum()), entropy(train / train.sum())
    unknown = val[train == 0].sum() / val.sum()
    found = (
        f'by how often train has each id, a token of val costs {cross:.2f} nats and one of train {own:.2f}; '
        f'{unknown:.1%} of val has ids that train lacks'
    )
    advice = 'prepare both splits from one text with one tokenizer'
    return judge('splits', found, (cross > own + 2, 'error', advice), (cross > own + 0.7, 'warning', advice))


def check_tokenizer(data: DataSet, splits: dict[str, Tokens], counts: dict[str, np.ndarray]) -> Finding:
    """Were these ids made by the tokenizer that lies beside them? By the length of the text that they stand for, if
    meta.json has it, and by whether they decode to text."""
    name, spec = 'tokenizer', data.tokenizer
    if not spec:
        return judge(name, f"{data.path} names none: its ids are taken for GPT-2's, or have no text")
    if spec['kind'] == 'gpt2' and not gpt2_is_cached():
        return judge(name, "GPT-2's, whose vocabulary is not on this machine: not looked at")
    tokenizer = load_tokenizer(spec)
    token_bytes, known = tokenizer.token_bytes(), data.meta.get('bytes', {})
    ids = splits['train'][0 : min(PIECE // 64, len(splits['train']))]
    text = tokenizer.decode(ids.tolist())
    broken = text.count('\ufffd') / max(1, len(text))
    found = f'{spec["kind"]}, {broken:.2%} of a piece of train is no text'
    whole = [split for split, n in counts.items() if n.sum() == len(splits[split])]  # others were looked at in part
    wrong = []
    if token_bytes is not None and isinstance(known, dict):
        for split in whole:
            size = int((counts[split][: len(token_bytes)] * token_bytes[: len(counts[split])]).sum())
            # not to the byte: prepare.py may write line ends between documents, which it does not count
            if isinstance(known.get(split), int) and abs(size - known[split]) > 0.05 * known[split]:
                wrong.append(f'{split} stands for {size:,} bytes of text, meta.json says {known[split]:,}')
        found = '; '.join([found, *wrong])
    advice = 'the ids were made by another tokenizer than that of meta.json; prepare the data again'
    return judge(name, found, (wrong or broken > 0.2, 'error', advice), (broken > 0.02, 'warning', advice))


# --- passages of val in train -----------------------------------------------------------------------------------------


def window_hashes(ids: np.ndarray, length: int = WINDOW) -> np.ndarray:
    """A hash of each window of `length` (a power of two) ids -> uint64 (..., n - length + 1).

    It is the polynomial h = sum of (id + 1) BASE**k modulo 2**64, doubled in length at each turn: the hash of a window
    is that of its left half, shifted, plus that of its right half.
    """
    hashes, factor, width = ids.astype(np.uint64) + np.uint64(1), BASE, 1
    while width < length:
        hashes = hashes[..., :-width] * np.uint64(factor) + hashes[..., width:]
        factor, width = factor * factor % 2**64, 2 * width
    return hashes


def passages(val: Tokens, most: int) -> np.ndarray:
    """Windows of val to look for: adjacent ones, or evenly spaced -> int64 (N, WINDOW), without padding, and without
    those that are mostly no targets."""
    available = len(val) // WINDOW
    n = min(available, most)
    starts = np.arange(n) * available // max(1, n) * WINDOW
    rows = val.windows(starts, WINDOW)
    telling = 1 + (np.diff(np.sort(rows), axis=1) != 0).sum(axis=1) >= DISTINCT
    if val.mask:
        telling &= np.count_nonzero(val.mask.windows(starts, WINDOW), axis=1) >= WINDOW // 2
    return rows[telling]


def find_passages(rows: np.ndarray, train: Tokens, most: int) -> np.ndarray:
    """Which of these windows occur in train? -> bool (N,). By their hashes; what is found is compared token by token.

    It reads `most` tokens of train at most. Memory: some 50 bytes per id of a piece, and 16 per window.
    """
    wanted, row_of = np.unique(window_hashes(rows)[:, 0], return_index=True)
    place = np.full(len(wanted), -1)  # where in train a window was found
    possible = np.zeros(2**20, dtype=bool)  # by the first 20 bits: rules out most places of train, cheaply
    possible[wanted >> np.uint64(44)] = True
    for start, end in spans(len(train), most):
        ids = train[start : min(end + WINDOW - 1, len(train))]  # a window may begin in one piece and end in the next
        if len(ids) < WINDOW:
            continue
        hashes = window_hashes(ids)
        at = np.flatnonzero(possible[hashes >> np.uint64(44)])
        nearest = np.minimum(np.searchsorted(wanted, hashes[at]), len(wanted) - 1)
        hit = wanted[nearest] == hashes[at]
        place[nearest[hit]] = start + at[hit]
    found = np.flatnonzero(place >= 0)
    same = (train.windows(place[found], WINDOW) == rows[row_of[found]]).all(axis=1)
    return np.isin(window_hashes(rows)[:, 0], wanted[found[same]])


def check_leak(train: Tokens, val: Tokens, most_passages: int, most_tokens: int) -> Finding:
    """How much of val stands in train, word for word? A validation loss says nothing about text that was trained on."""
    rows = passages(val, most_passages)
    if not len(rows):
        return judge('leak', f'val has no passage of {WINDOW} tokens to look for')
    share = find_passages(rows, train, most_tokens).mean()
    looked = min(1.0, most_tokens / len(train))
    found = f'{share:.1%} of {len(rows):,} passages of {WINDOW} tokens of val stand in train'
    if looked < 1:
        found += f', of which {looked:.1%} was looked at'
    advice = 'split by whole documents, and remove duplicates first; what val measures is partly memory'
    leaked = min(1.0, share / looked)
    return judge('leak', found, (leaked > 0.3, 'error', advice), (leaked > 0.1, 'warning', advice))


# --- documents --------------------------------------------------------------------------------------------------------


def documents(data: DataSet, tokens: Tokens, split: str, most: int) -> Iterator[np.ndarray] | None:
    """The documents in the first `most` tokens of a split, as arrays of ids; None if nothing says where they start."""
    end = min(most, len(tokens))
    bounds = read_documents(data.path, split, len(tokens))
    mark = None
    if bounds is None:
        gpt2 = data.tokenizer is None or data.tokenizer['kind'] == 'gpt2'
        mark = 50256 if gpt2 and data.vocab_size > 50256 else data.tokenizer and spec_end_of_text(data.tokenizer)
        if mark is None:
            return None
        pieces = spans(end, end)
        bounds = np.concatenate([start + 1 + np.flatnonzero(tokens[start:stop] == mark) for start, stop in pieces])
        bounds = np.concatenate([[0], bounds])
    bounds = np.append(bounds, len(tokens))
    bounds = bounds[bounds <= end]
    return (tokens[a:b] for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist()))


def document_hashes(texts: Iterator[np.ndarray]) -> np.ndarray:
    """A hash of each document of at least SHORTEST tokens -> uint64 (N,)."""
    digests = (hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids in texts if len(ids) >= SHORTEST)
    return np.frombuffer(b''.join(digests), dtype='<u8')


def check_documents(data: DataSet, splits: dict[str, Tokens], most: int) -> Finding:
    """Are documents repeated within train, or between train and val? By a hash of their ids."""
    texts = {split: documents(data, tokens, split, most) for split, tokens in splits.items()}
    if texts['train'] is None:
        return judge('documents', f'{data.path} does not say where they start: repeated ones were not looked for')
    train = document_hashes(texts['train'])
    val = document_hashes(texts['val']) if texts['val'] is not None else train[:0]
    again = len(train) - len(np.unique(train))
    shared = int(np.isin(val, train).sum())
    repeated, leaked = again / max(1, len(train)), shared / max(1, len(val))
    found = (
        f'{again:,} of {len(train):,} of train repeat an earlier one ({repeated:.1%}), {shared:,} of {len(val):,} of '
        f'val stand in train ({leaked:.1%})'
    )
    if len(splits['train']) > most:
        found += f', of the first {most:,} tokens'
    leak, copies = 'remove from train what val has', 'remove duplicates: each copy is one more epoch of that text'
    return judge(
        'documents',
        found,
        (leaked > 0.3, 'error', leak),
        (leaked > 0.05, 'warning', leak),
        (repeated > 0.5, 'error', copies),
        (repeated > 0.1, 'warning', copies),
    )
