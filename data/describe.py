"""Describe a data set: sizes, vocabulary, documents, bytes per token, and some of its text as training sees it.

python data/describe.py shakespeare_char
python data/describe.py text/novel --windows=5 --seed=2
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
from tqdm import tqdm

from common.errors import UserError, user_errors
from configurator import configure, require
from dataloader import CHECKED_AT_ONCE, DataSet, random_words
from tokenizer import load_tokenizer

dataset = ''  # folder in data/; --dataset= may be omitted
windows = 3  # pieces of text to show per split
window_tokens = 64  # tokens per piece
seed = 1337  # of the choice of pieces
config = configure(globals(), bare='dataset')

require(config, 'windows seed', '0 or more', lambda v: v >= 0)
require(config, 'window_tokens', 'at least 1', lambda v: v >= 1)
if not dataset:
    raise UserError('which data set? python data/describe.py NAME, a folder in data/')
data = DataSet(dataset)
with user_errors(ValueError, where=f'{data.path}/meta: '):
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
token_bytes = tokenizer.token_bytes() if tokenizer else None
kind = data.tokenizer['kind'] if data.tokenizer else 'unknown'
dtype = data.meta.get('dtype', 'uint16')
print(f'{data.path}: tokenizer {kind}, vocabulary of {data.vocab_size:,}, stored as {dtype}')

for split in ('train', 'val'):
    tokens = data.tokens(split)
    counts = np.zeros(data.vocab_size, dtype=np.int64)
    with tqdm(total=len(tokens), unit='tokens', unit_scale=True, desc=f'reading {split}', delay=1) as bar:
        for start in range(0, len(tokens), CHECKED_AT_ONCE):
            ids = tokens[start : min(start + CHECKED_AT_ONCE, len(tokens))]
            found = np.bincount(ids, minlength=data.vocab_size)
            if len(found) > data.vocab_size:  # opening a large split checks only a part of it
                raise UserError(
                    f'{tokens.name} holds the id {len(found) - 1}, beyond the vocabulary: prepare the data again'
                )
            counts += found
            bar.update(len(ids))
    facts = [
        f'{len(tokens):,} tokens in {len(tokens.paths)} file{"s" * (len(tokens.paths) > 1)}',
        f'{len(tokens) * tokens.dtype.itemsize / 1e6:,.1f} MB',
        f'{np.count_nonzero(counts):,} of the ids in use',
    ]
    if token_bytes is not None:
        facts.append(f'{(counts * token_bytes).sum() / len(tokens):.2f} bytes of text per token')
    if tokens.mask:
        pieces = range(0, len(tokens), CHECKED_AT_ONCE)
        n = sum(np.count_nonzero(tokens.mask[start : min(start + CHECKED_AT_ONCE, len(tokens))]) for start in pieces)
        facts.append(f'{n / len(tokens):.1%} of the tokens are targets')
    if tokens.window:
        facts.append(f'packed into windows of {tokens.window}')
    if tokenizer and tokenizer.end_of_text is not None:
        facts.append(f'{counts[tokenizer.end_of_text]:,} ends of documents')
    print(f'\n{split}: {", ".join(facts)}')
    length = min(window_tokens, len(tokens))
    for word in random_words(windows, seed).tolist() if tokenizer else ():
        start = word % (len(tokens) - length + 1)
        print(f'  at {start:,}: {tokenizer.decode(tokens[start : start + length].tolist())!r}')
