"""Make a data set from your own text: a file, or a folder of files, of any size.

python data/text/prepare.py --input=novel.txt --name=novel
python data/text/prepare.py --input=articles.jsonl.zst --tokenizer=bpe --vocab_size=8192
python train.py config/train_shakespeare_char_cpu.py --dataset=text/novel --out_dir=out-novel
"""

import os
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # not HERE/../..: data/ may be a link
from common.errors import UserError
from configurator import configure
from data.pipeline import name_of_data_set, write_dataset
from data.sources import Files

input = ''  # file or folder: .txt, .jsonl, .json, .csv, .parquet, also as .gz, .zst; most others as UTF-8 text
name = ''  # the data set becomes data/text/NAME; '': named after the input
tokenizer = 'char'  # 'char'; 'byte'; 'gpt2'; 'bpe': trained on this text; or a model: folder, .gguf, name on the hub
vocab_size = 4096  # size of a 'bpe' vocabulary
val_fraction = 0.1  # share of documents for validation; with a few text files, the end of the last one
text_key = 'text'  # JSON field or table column that holds the text
shard_tokens = 100_000_000  # ids per file; 0: all in one file
max_tokens = 0  # stop soon after this many train tokens; 0: take everything
workers = 0  # processes; 0: one per core
configure(globals(), bare='input', paths=('input', 'tokenizer'))

if not input or not os.path.exists(input):
    raise UserError(
        f'--input={input}: there is no such file or folder' if input else 'which text? give --input=FILE_OR_FOLDER'
    )
name = name_of_data_set(name, input, 'data/text')
out_dir = os.path.join(HERE, name)
if os.path.exists(os.path.join(out_dir, 'meta.json')):
    print(f'replacing the data set text/{name}; give another --name to keep both')
write_dataset(
    out_dir, Files(input, val_fraction, text_key, own=out_dir), tokenizer, vocab_size, shard_tokens, max_tokens, workers
)
print(f'train on it with --dataset={shlex.quote(f"text/{name}")}')
