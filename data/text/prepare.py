"""Any text of yours, a file or a folder of files, as a data set of its own.

    python data/text/prepare.py --input=novel.txt --name=novel
    python train.py config/train_shakespeare_char_cpu.py --dataset=text/novel --out_dir=out-novel
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure
from data.pipeline import read_documents, write_dataset

input = ''  # a UTF-8 text file, or a folder of them (hidden files and files that are not text are passed over)
name = ''  # the data set becomes data/text/NAME; the input's own name unless given
tokenizer = 'char'  # 'char': one id a character; 'gpt2': GPT-2's BPE
val_fraction = 0.1  # share of the text, at its end, that is kept for validation
configure(globals())

if not input or not os.path.exists(input):
    raise UserError(f'--input={input}: there is no such file or folder' if input else 'which text? give --input=FILE_OR_FOLDER')
name = name or os.path.splitext(os.path.basename(os.path.abspath(input)))[0]
if os.path.basename(name) != name or name.startswith('.'):
    raise UserError(f'--name={name}: must be a plain name, it becomes a folder in data/text')
if os.path.exists(os.path.join(HERE, name, 'meta.json')):
    print(f'replacing the data set text/{name} that is there; another --name keeps both')
write_dataset(os.path.join(HERE, name), read_documents(input), tokenizer, val_fraction)
print(f'train on it with --dataset=text/{name}')
