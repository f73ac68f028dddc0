"""A process that turns units of text into ids, for pipeline.py: a job and then units come in on standard input, results go out.

Processes, because tiktoken's threads wait for one another (BENCHMARKS.md); of this kind, because they end when their parent dies,
however it dies, and need nothing of the script that started them.
"""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import local

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from common.errors import UserError, user_errors
from data.sources import pieces_of
from tokenizer import load_tokenizer

# how a process is started that Ctrl-C, which is for its parent alone, does not reach
APART = (
    {'creationflags': subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == 'win32' else {'start_new_session': True}
)


@dataclass(frozen=True)
class Job:
    """What all the units of a preparation have in common."""

    spec: dict  # of the tokenizer
    separator: list  # ids that follow a document
    dtype: str  # of ids
    threshold: int  # documents whose hash is below it are for validation
    text_key: str  # of JSON lines


@dataclass
class Encoded:
    """What became of a unit, for one split."""

    ids: bytes = b''
    documents: int = 0
    text_bytes: int = 0
    hashes: list = field(default_factory=list)


def document_hash(key):
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'big')


def split_of(piece, threshold):
    """'train' or 'val', and the hash that decided it, None if it was settled before."""
    if piece.split:
        return piece.split, None
    number = document_hash(piece.key or piece.text)
    return 'val' if number < threshold else 'train', number


def encode(job, tokenizer, unit):
    """A unit's documents as ids -> {'train': Encoded, 'val': Encoded}."""
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


class Worker:
    """A worker process, seen from the pipeline."""

    def __init__(self, job):
        self.job = job  # sent with the first unit
        with user_errors(OSError, where='cannot start a worker process: '):
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **APART
            )

    def send(self, content):
        pickle.dump(content, self.process.stdin, pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def encode(self, unit):
        """encode(job, tokenizer, unit), over there. UserError if it raised one, or the process has died."""
        try:
            if self.job:
                self.send(self.job)
                self.job = None
            self.send(unit)
            result = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f'a worker process has ended, with status {self.process.wait()}: run the same command again, it goes on from '
                'there (with --workers=1 if memory is short)'
            ) from error
        if isinstance(result, UserError):
            raise result
        return result

    def kill(self):
        self.process.kill()
        self.process.wait()


class Workers:
    """Worker processes, as a context: they end with it."""

    def __init__(self, job, n):
        self.job, self.n = job, n
        self.started, self.own = [], local()

    def __enter__(self):
        self.pool = ThreadPoolExecutor(self.n)  # a thread for each process, to talk with it
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in self.started:
            worker.kill()
        self.pool.shutdown()

    def encode(self, unit):
        if not hasattr(self.own, 'worker'):
            self.own.worker = Worker(self.job)
            self.started.append(self.own.worker)
        return self.own.worker.encode(unit)

    def map(self, units):
        """Yield (unit, what became of it) in the order of the units; no more than a few are under way at a time."""
        waiting = deque()
        for unit in units:
            waiting.append((unit, self.pool.submit(self.encode, unit)))
            if len(waiting) > 2 * self.n:
                unit, future = waiting.popleft()
                yield unit, future.result()
        for unit, future in waiting:
            yield unit, future.result()


def work():
    """Serve until standard input ends."""
    results = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # whatever else prints must not get in between
    try:
        job = pickle.load(sys.stdin.buffer)
        tokenizer = load_tokenizer(job.spec)
        while True:
            unit = pickle.load(sys.stdin.buffer)
            try:
                result = encode(job, tokenizer, unit)
            except UserError as error:
                result = error
            except ValueError as error:  # a character that is not in the vocabulary
                result = UserError(f'{unit.where}: {error}; the text has changed since the vocabulary was made')
            pickle.dump(result, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # the parent has ended, maybe in the middle of a message


if __name__ == '__main__':
    from data import worker

    worker.work()  # under its own name, which the pickles know its classes by
