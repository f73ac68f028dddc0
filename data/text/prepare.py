"""Any text of yours, a file or a folder of files of any size, as a data set of its own.

    python data/text/prepare.py --input=novel.txt --name=novel
    python data/text/prepare.py --input=articles.jsonl.zst --tokenizer=bpe --vocab_size=8192
    python train.py config/train_shakespeare_char_cpu.py --dataset=text/novel --out_dir=out-novel
"""
import os
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure
from data.pipeline import write_dataset
from data.sources import Files

input = ''  # .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or a folder of them; a file of any other name is read as UTF-8 text
name = ''  # the data set becomes data/text/NAME; the input's own name unless given
tokenizer = 'char'  # 'char': one id a character; 'byte': one a byte; 'gpt2': GPT-2's BPE; 'bpe': a BPE trained on this text
vocab_size = 4096  # ids of a BPE trained here
val_fraction = 0.1  # share of the documents kept for validation; of few texts, share at the end
text_key = 'text'  # field of a JSON line, or column of a table, that holds the text
shard_tokens = 100_000_000  # ids in a file, 0: all in one
max_tokens = 0  # stop behind so many train tokens, or some more; 0: take all
workers = 0  # processes, 0: one a core
configure(globals(), bare='input')

if not input or not os.path.exists(input):
    raise UserError(f'--input={input}: there is no such file or folder' if input else 'which text? give --input=FILE_OR_FOLDER')
name = name or os.path.basename(os.path.abspath(input)).removesuffix('.gz').removesuffix('.zst').rpartition('.')[0] \
    or os.path.basename(os.path.abspath(input))
if not name or os.path.basename(name) != name or name.startswith(('.', '-')) or not name.isprintable():
    raise UserError(f'--name={name!r}: must be a plain name, it becomes a folder in data/text')
if os.path.exists(os.path.join(HERE, name, 'meta.json')):
    print(f'replacing the data set text/{name} that is there; another --name keeps both')
write_dataset(os.path.join(HERE, name), Files(input, val_fraction, text_key), tokenizer, vocab_size, shard_tokens, max_tokens, workers)
print(f'train on it with --dataset={shlex.quote(f"text/{name}")}')
