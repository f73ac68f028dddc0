"""Any text of yours, a file or a folder of files of any size, as a data set of its own.

python data/text/prepare.py --input=novel.txt --name=novel
python data/text/prepare.py --input=articles.jsonl.zst --tokenizer=bpe --vocab_size=8192
python train.py config/train_shakespeare_char_cpu.py --dataset=text/novel --out_dir=out-novel
"""

import os
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # by name: HERE/../.. is elsewhere if data/ is a link
from common.errors import UserError
from configurator import configure
from data.pipeline import write_dataset
from data.sources import Files

input = ''  # .txt, .jsonl, .json, .csv, .parquet, also .gz and .zst of them, or a folder; most other names are read as UTF-8 text
name = ''  # the data set becomes data/text/NAME; the input's own name unless given
tokenizer = 'char'  # 'char': one id a character; 'byte': one a byte; 'gpt2': GPT-2's BPE; 'bpe': one trained here; or a tokenizer.json
vocab_size = 4096  # ids of a BPE trained here
val_fraction = 0.1  # share of the documents kept for validation; of few texts, share at the end
text_key = 'text'  # field of a JSON line, or column of a table, that holds the text
shard_tokens = 100_000_000  # ids in a file, 0: all in one
max_tokens = 0  # stop behind so many train tokens, or some more; 0: take all
workers = 0  # processes, 0: one a core
configure(globals(), bare='input', paths=('input', 'tokenizer'))

if not input or not os.path.exists(input):
    raise UserError(
        f'--input={input}: there is no such file or folder' if input else 'which text? give --input=FILE_OR_FOLDER'
    )
if not name:
    name = os.path.basename(os.path.abspath(input))
    if os.path.isfile(input):
        name = name.removesuffix('.gz').removesuffix('.zst').rpartition('.')[0] or name
if not name or os.path.basename(name) != name or name.startswith(('.', '-')) or not name.isprintable():
    raise UserError(f'--name={name!r}: must be a plain name, it becomes a folder in data/text')
out_dir = os.path.join(HERE, name)
if os.path.exists(os.path.join(out_dir, 'meta.json')):
    print(f'replacing the data set text/{name} that is there; another --name keeps both')
write_dataset(
    out_dir, Files(input, val_fraction, text_key, own=out_dir), tokenizer, vocab_size, shard_tokens, max_tokens, workers
)
print(f'train on it with --dataset={shlex.quote(f"text/{name}")}')
