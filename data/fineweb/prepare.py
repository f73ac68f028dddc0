"""FineWeb-Edu, the 10-billion-token sample: educational web pages (Penedo et al. 2024), 10 billion GPT-2 tokens, 20 GB.

python data/fineweb/prepare.py                                      # stream it from the Hugging Face hub
python data/fineweb/prepare.py --max_tokens=1_000_000_000           # only the first part
python data/fineweb/prepare.py --input=FOLDER                       # from local files
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
sample = 'sample-10BT'  # configuration on the hub: 'sample-10BT', 'sample-100BT', 'sample-350BT'; 'default': all of it
tokenizer = 'gpt2'  # 'gpt2'; 'bpe': trained here; 'byte': an id per byte; or a tokenizer.json, or a model's folder
vocab_size = 50304  # size of a 'bpe' vocabulary
val_fraction = 0.001  # share of the documents for validation
shard_tokens = 100_000_000  # ids per file; 0: all in one file
max_tokens = 0  # stop soon after this many train tokens; 0: take everything
workers = 0  # processes; 0: one per core
configure(globals(), paths=('input', 'tokenizer'))

total = 47_000_000_000 if sample == 'sample-10BT' else None  # bytes of text, about
hub = {'name': 'HuggingFaceFW/fineweb-edu', 'config': sample, 'total': total}
source = Files(input, val_fraction, own=HERE) if input else Hub(val_fraction=val_fraction, **hub)
write_dataset(HERE, source, tokenizer, vocab_size, shard_tokens, max_tokens, workers)
leave()  # skip the interpreter's clean-up: threads of an unfinished stream can abort the process there
