"""Make a data set from conversations, for fine-tuning: in the format of a model, and only its answers are learned.

python data/chat/prepare.py --input=conversations.jsonl --tokenizer=SmolLM2-135M-Instruct.Q4_1.gguf --block_size=1024
python data/chat/prepare.py --input=python --tokenizer=SmolLM2-135M-Instruct.Q4_1.gguf --block_size=512
python data/chat/audit.py conversations
"""

import json
import os
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # not HERE/../..: data/ may be a link
from tqdm import tqdm

from chat import ChatTemplate
from common.errors import UserError, user_errors, warn
from common.files import lock_folder
from configurator import configure, require
from data.chat.conversations import Conversation, messages_of, read_rows, write
from data.chat.python_docs import conversations as python_conversations
from data.pipeline import model_tokenizer, name_of_data_set, writing
from data.sources import check_fraction
from data.worker import document_hash
from tokenizer import MAX_TEMPLATE, load_tokenizer

EXAMPLES = 8  # conversations that meta.json keeps as messages, for audit.py

input = ''  # file or folder: .jsonl, .json, also as .gz, .zst, or .parquet; python: what Python itself ships
name = ''  # the data set becomes data/chat/NAME; '': named after the input
tokenizer = ''  # of the model to be fine-tuned: its folder, tokenizer.json, .gguf, or name on the hub
chat_template = ''  # a .jinja file in place of the model's chat template
block_size = 1024  # tokens per window, into which whole conversations are packed: train with the same --block_size
val_fraction = 0.1  # share of conversations for validation
skip_bad = False  # leave out what is not a conversation or is refused by the template, in place of stopping
config = configure(globals(), bare='input', paths=('input', 'tokenizer', 'chat_template'))

require(config, 'block_size', 'from 2 to 1,048,576', lambda v: 2 <= v <= 2**20)
check_fraction(val_fraction)
from_python = input == 'python' and not os.path.exists(input)
if not from_python and not os.path.exists(input):
    raise UserError(
        f'--input={input}: there is no such file or folder'
        if input
        else 'which conversations? give --input=FILE_OR_FOLDER, or --input=python for those that Python ships'
    )
if not tokenizer:
    raise UserError('which model is to be fine-tuned? give its folder or .gguf file as --tokenizer=')
name = name_of_data_set(name, input, 'data/chat')
out_dir = os.path.join(HERE, name)
spec = model_tokenizer(tokenizer)
if chat_template:
    with user_errors(OSError, ValueError, where=f'cannot read {chat_template}: '):
        with open(chat_template, encoding='utf-8') as file:
            spec['chat_template'] = file.read(MAX_TEMPLATE + 1)
if not spec.get('chat_template'):
    raise UserError(f'--tokenizer={tokenizer}: it has no chat template; give one, as --chat_template=FILE.jinja')
template = ChatTemplate(spec)
with user_errors(ValueError, where=f'--tokenizer={tokenizer}: '):
    encoder = load_tokenizer(spec)

if template.ending(encoder, is_last=True)[1] is None:
    warn('the chat template ends an answer with no special token of the tokenizer: the model will not learn to stop')
counts = {'truncated': 0, 'empty': 0, 'skipped': 0}
found, examples = [], {}  # (hash, Conversation) each; hash -> messages


def take(messages):
    """Encode a conversation and add it to those found."""
    ids, learned = template.encode_supervised(messages, encoder)
    is_long, ids, learned = len(ids) > block_size, ids[:block_size].astype(dtype), learned[:block_size]
    learned[:1] = False  # nothing comes before it
    if not learned.any():
        counts['empty'] += 1
        return
    counts['truncated'] += is_long
    number = document_hash(json.dumps(messages))
    found.append((number, Conversation(ids, learned)))
    examples[number] = messages
    if len(examples) > EXAMPLES:
        del examples[min(examples)]  # so that they are for training, as validation takes the lowest


dtype = 'uint16' if encoder.vocab_size <= 2**16 else 'uint32'
rows = (('what Python ships', {'messages': m}) for m in python_conversations()) if from_python else read_rows(input)
for where, row in tqdm(rows, unit=' conversations', desc='encoding', delay=1):
    try:
        with user_errors(ValueError, UserError, where=f'{where}: '):
            take(messages_of(row))
    except UserError as error:
        if not skip_bad:
            raise UserError(f'{error} (--skip_bad=True leaves such out)') from error
        if not counts['skipped']:
            warn(f'{error}; it is left out, as are others like it')
        counts['skipped'] += 1
if not found and not counts['empty']:
    raise UserError(f'{input} holds no conversations')
if not found:
    raise UserError(f'{input}: none of its conversations has an answer to learn from')
numbers = sorted({number for number, _ in found})
if len(numbers) == 1:
    raise UserError(f'{input}: fewer than two different conversations, too few for training and validation')
threshold = min(max(int(val_fraction * 2**64), numbers[0] + 1), numbers[-1])  # each split gets one at least
splits = {'train': [], 'val': []}
for number, conversation in found:
    conversation = conversation._replace(messages=examples.pop(number, None))
    splits['val' if number < threshold else 'train'].append(conversation)

meta = {'tokenizer': spec, 'vocab_size': encoder.vocab_size, 'dtype': dtype, **counts}
padding = 0 if encoder.end_of_text is None else encoder.end_of_text
with writing(out_dir):
    os.makedirs(out_dir, exist_ok=True)
    if not lock_folder(out_dir):
        raise UserError(f'{out_dir} is in use by another process: wait for it, or end it')
    if os.path.exists(os.path.join(out_dir, 'meta.json')):
        print(f'replacing the data set chat/{name}; give another --name to keep both')
    meta = write(out_dir, splits, block_size, padding, meta)
for split, n in meta['conversations'].items():
    tokens = meta['tokens'][split]
    print(
        f'{split}: {n:,} conversations, {tokens:,} tokens in windows of {block_size}, '
        f'{meta["supervised"][split] / tokens:.0%} learned, {meta["padding"][split] / tokens:.1%} padding'
    )
print(
    f'{counts["truncated"]:,} are longer than a window and lose their end, {counts["empty"]:,} without an answer and '
    f'{counts["skipped"]:,} unreadable ones are left out'
)
print(f'look at it with python data/chat/audit.py {shlex.quote(name)}')
print(f'train on it with --dataset={shlex.quote(f"chat/{name}")} --block_size={block_size}')
