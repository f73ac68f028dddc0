"""OpenWebText, 8 million web pages that Reddit users linked to: about 9 billion GPT-2 tokens, 18 GB.

python data/openwebtext/prepare.py                                  # streams it from the Hugging Face hub
python data/openwebtext/prepare.py --max_tokens=1_000_000_000       # a part of it
python data/openwebtext/prepare.py --input=FOLDER                   # from files that are here already
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # by name: HERE/../.. is elsewhere if data/ is a link
from configurator import configure
from data.pipeline import write_dataset
from data.sources import Files, Hub

input = ''  # a copy in place of the hub's: .parquet, .jsonl, .json, .csv, .txt, also .gz and .zst of them, or a folder
tokenizer = 'gpt2'  # 'gpt2': GPT-2's BPE; 'bpe': one trained here; 'byte': one id a byte; or a tokenizer.json, or a model's folder
vocab_size = 50304  # ids of a BPE trained here
val_fraction = 0.0005  # share of the documents kept for validation
shard_tokens = 100_000_000  # ids in a file, 0: all in one
max_tokens = 0  # stop behind so many train tokens, or some more; 0: take all
workers = 0  # processes, 0: one a core
configure(globals(), paths=('input', 'tokenizer'))

# the hub's own conversion to parquet: the data set itself is, or was, a script
hub = {'name': 'Skylion007/openwebtext', 'revision': 'refs/convert/parquet', 'total': 39_770_000_000}
source = Files(input, val_fraction, own=HERE) if input else Hub(val_fraction=val_fraction, **hub)
write_dataset(HERE, source, tokenizer, vocab_size, shard_tokens, max_tokens, workers)
