"""Worker processes that turn units of text into ids, for pipeline.py.

Processes rather than threads, because tiktoken's threads wait for one another (docs/LOG.md, 2026-11-23).
"""

import hashlib
import os
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from threading import Thread
from types import ModuleType

import numpy as np

from common.errors import UserError, user_errors
from data.sources import pieces_of
from tokenizer import load_tokenizer

MAX_WORKERS = 61 if sys.platform == 'win32' else sys.maxsize  # Windows cannot wait for more at once


@dataclass(frozen=True)
class Job:
    """The settings that all units of a preparation share."""

    spec: dict  # of the tokenizer
    separator: list  # ids appended to each document
    dtype: str  # of the ids in the files
    threshold: int  # documents with a hash below it go to validation
    text_key: str  # field of a JSON line that holds the text


@dataclass
class Encoded:
    """The part of an encoded unit that goes to one split."""

    ids: bytes = b''
    documents: int = 0
    text_bytes: int = 0
    hashes: list = field(default_factory=list)  # the smallest and the largest hash of its documents


def document_hash(key):
    """A 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'big')


def split_of(piece, threshold):
    """The split of a piece -> 'train' or 'val', and the hash that decides it; None if the source has decided."""
    if piece.split:
        return piece.split, None
    number = document_hash(piece.key or piece.text)
    return 'val' if number < threshold else 'train', number


def encode(job, tokenizer, unit):
    """Encode the documents of a unit -> {'train': Encoded, 'val': Encoded}."""
    separator = np.array(job.separator, dtype=np.int32)
    rows, encoded = {'train': [], 'val': []}, {'train': Encoded(), 'val': Encoded()}
    for piece in pieces_of(unit, job.text_key):
        split, number = split_of(piece, job.threshold)
        rows[split].append(tokenizer.encode(piece.text))
        if piece.ends:
            rows[split].append(separator)
        encoded[split].documents += piece.ends
        encoded[split].text_bytes += len(piece.text.encode('utf-8', 'surrogatepass'))
        if number is not None:
            encoded[split].hashes.append(number)
    for split, part in encoded.items():
        part.ids = np.concatenate([np.array([], dtype=np.int32), *rows[split]]).astype(job.dtype).tobytes()
        part.hashes = [min(part.hashes), max(part.hashes)] if part.hashes else []
    return encoded


def start(job):
    """Set up a worker process, once: its job and its tokenizer."""
    global the_job, the_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose parent was killed would wait for its next unit forever: it holds both ends of the pool's pipe, so
    # it never sees the pipe closed. The cost is one thread that sleeps until the parent ends.
    Thread(target=end_with_parent, daemon=True).start()
    the_job, the_tokenizer = job, load_tokenizer(job.spec)


def end_with_parent():
    """Wait until the parent process has died, in whatever way, then end this one."""
    parent_process().join()
    os._exit(0)


def encode_here(unit):
    """Encode a unit in a worker process, see encode. UserError for a character that is not in the vocabulary."""
    try:
        return encode(the_job, the_tokenizer, unit)
    except ValueError as error:
        raise UserError(f'{unit.where}: {error}; the text has changed since the vocabulary was made') from error


@contextmanager
def without_ctrl_c():
    """Context manager: processes started in it never receive Ctrl-C. The parent does, and ends them."""
    if sys.platform == 'win32':  # no signal masks: a worker ignores SIGINT only once it has started
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers:
    """A pool of n worker processes, as a context manager."""

    def __init__(self, job: Job, n: int):
        self.job, self.n = job, min(n, MAX_WORKERS)

    def __enter__(self):
        with user_errors(OSError, where='cannot start worker processes: '):
            self.pool = ProcessPoolExecutor(self.n, get_context('spawn'), initializer=start, initargs=(self.job,))
        # A spawned process imports the main module. A prepare.py has no `if __name__ == '__main__'`, so each worker
        # would run it. Show it an empty main module; the cost is that this process has no other until __exit__.
        self.main, sys.modules['__main__'] = sys.modules['__main__'], ModuleType('__main__')
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)
        sys.modules['__main__'] = self.main

    def map(self, units):
        """Yield (unit, {'train': Encoded, 'val': Encoded}) for each unit, in order; at most 2n + 1 are in memory.

        UserError if a unit cannot be encoded or a worker process has died.
        """
        waiting = deque()
        try:
            for unit in units:
                with user_errors(OSError, where='cannot start a worker process: '), without_ctrl_c():
                    waiting.append((unit, self.pool.submit(encode_here, unit)))
                if len(waiting) > 2 * self.n:
                    unit, future = waiting.popleft()
                    yield unit, future.result()
            for unit, future in waiting:
                yield unit, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                'a worker process has died: run the same command again, it continues from here '
                '(with --workers=1 if memory is short)'
            ) from error
