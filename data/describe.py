"""What is in a data set: sizes, vocabulary, documents, bytes a token, and some of its text as training sees it.

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
from dataloader import CHECKED_AT_ONCE, Tokens, random_words, read_meta
from tokenizer import load_tokenizer, spec_from_meta

dataset = ''  # folder below data/; may be given without --dataset=
windows = 3  # pieces of text to show of each split
window_tokens = 64  # tokens in such a piece
seed = 1337  # of which pieces
config = configure(globals(), bare='dataset')

require(config, lambda v: v >= 0, '0 or more', 'windows', 'seed')
require(config, lambda v: v >= 1, 'at least 1', 'window_tokens')
if not dataset:
    raise UserError('which data set? python data/describe.py NAME, a folder below data/')
data_dir = os.path.join('data', dataset.removeprefix('data/'))
meta = read_meta(data_dir)
with user_errors(ValueError, where=f'{data_dir}/meta: '):
    spec = spec_from_meta(meta)
    tokenizer = load_tokenizer(spec) if spec else None
vocab_size = tokenizer.vocab_size if tokenizer else meta['nanogpt']['vocab_size']
token_bytes = tokenizer.token_bytes() if tokenizer else None
print(
    f'{data_dir}: tokenizer {spec["kind"] if spec else "unknown"}, vocabulary of {vocab_size:,}, stored as {meta.get("dtype", "uint16")}'
)

for split in ('train', 'val'):
    tokens = Tokens(data_dir, split, meta, vocab_size)
    counts = np.zeros(vocab_size, dtype=np.int64)
    with tqdm(total=len(tokens), unit='tokens', unit_scale=True, desc=f'reading {split}', delay=1) as bar:
        for start in range(0, len(tokens), CHECKED_AT_ONCE):
            found = np.bincount(tokens[start : min(start + CHECKED_AT_ONCE, len(tokens))], minlength=vocab_size)
            if len(found) > vocab_size:  # opening checks a part of a large split
                raise UserError(
                    f'{tokens.name} holds the id {len(found) - 1}, beyond the vocabulary: prepare the data again'
                )
            counts += found
            bar.update(int(found.sum()))
    facts = [
        f'{len(tokens):,} tokens in {len(tokens.paths)} file{"s" * (len(tokens.paths) > 1)}',
        f'{len(tokens) * tokens.dtype.itemsize / 1e6:,.1f} MB',
        f'{np.count_nonzero(counts):,} of the ids in use',
    ]
    if token_bytes is not None:
        facts.append(f'{(counts * token_bytes).sum() / len(tokens):.2f} bytes of text a token')
    if tokenizer and tokenizer.end_of_text is not None:
        facts.append(f'{counts[tokenizer.end_of_text]:,} ends of documents')
    print(f'\n{split}: {", ".join(facts)}')
    length = min(window_tokens, len(tokens))
    for word in random_words(windows, seed).tolist() if tokenizer else ():
        start = word % (len(tokens) - length + 1)
        print(f'  at {start:,}: {tokenizer.decode(tokens[start : start + length].tolist())!r}')
