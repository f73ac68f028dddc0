"""OpenWebText, 8 million web pages that Reddit users linked to: about 9 billion GPT-2 tokens, 18 GB.

python data/openwebtext/prepare.py                                  # stream it from the Hugging Face hub
python data/openwebtext/prepare.py --max_tokens=1_000_000_000       # only the first part
python data/openwebtext/prepare.py --input=FOLDER                   # from local files
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # not HERE/../..: data/ may be a link
from common.errors import leave
from configurator import configure
from data.pipeline import write_dataset
from data.sources import Files, Hub

input = ''  # local file or folder in place of the hub: .parquet, .jsonl, .json, .csv, .txt, also as .gz, .zst
tokenizer = 'gpt2'  # 'gpt2'; 'bpe': trained here; 'byte': an id per byte; or a tokenizer.json, or a model's folder
vocab_size = 50304  # size of a 'bpe' vocabulary
val_fraction = 0.0005  # share of the documents for validation
shard_tokens = 100_000_000  # ids per file; 0: all in one file
max_tokens = 0  # stop soon after this many train tokens; 0: take everything
workers = 0  # processes; 0: one per core
configure(globals(), paths=('input', 'tokenizer'))

# the hub's conversion to parquet: the data set itself is a script, which would be code to run
hub = {'name': 'Skylion007/openwebtext', 'revision': 'refs/convert/parquet', 'total': 39_770_000_000}
source = Files(input, val_fraction, own=HERE) if input else Hub(val_fraction=val_fraction, **hub)
write_dataset(HERE, source, tokenizer, vocab_size, shard_tokens, max_tokens, workers)
leave()  # skip the interpreter's clean-up: threads of an unfinished stream can abort the process there
