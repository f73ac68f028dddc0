"""Draw text from a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="To be, or" --num_samples=3
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --max_new_tokens=100
"""
import os

import torch

from checkpoint import load_checkpoint, load_pretrained, restore_model
from configurator import UserError, configure, one_line, require, user_errors
from dataloader import read_meta
from runtime import autocast, compile_or_stay_eager, pick_device, pick_dtype, seed_all, use_fast_float32
from tokenizer import GPT2_SPEC, load_tokenizer, spec_from_meta

init_from = 'resume'  # 'resume': the checkpoint in out_dir; 'gpt2', 'gpt2-medium', …; or a folder with a Hugging Face GPT-2
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt' is the latest, 'ckpt_best.pt' the one of the lowest validation loss
start = '\n'  # the prompt, or FILE:path of a UTF-8 file that holds it
num_samples = 10  # texts to draw
max_new_tokens = 500  # tokens in each, after the prompt
temperature = 0.8  # 1: as trained, lower is tamer, higher is wilder; 0: always the likeliest token
top_k = 200  # draw among so many likeliest tokens only; 0: all
seed = 1337  # same seed, same text
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = False  # compile the model: worth it for many samples only
config = configure(globals())

require(config, lambda v: v >= 1, 'at least 1', 'num_samples')
require(config, lambda v: v >= 0, '0 or more', 'max_new_tokens', 'temperature', 'top_k', 'seed')

device = pick_device(device)
dtype = pick_dtype(dtype, device)
use_fast_float32(device)

# --- model and tokenizer ----------------------------------------------------------------------------------------------
if init_from == 'resume':
    path = os.path.join(out_dir, ckpt)
    checkpoint = load_checkpoint(path)
    model, spec = restore_model(checkpoint, path), checkpoint.get('tokenizer')
    if spec is None:  # nanoGPT's checkpoints name the data set, whose meta.pkl has the characters; without one it is GPT-2's BPE
        data_dir = os.path.join('data', str(checkpoint['config'].get('dataset')))
        with user_errors(ValueError, where=f'{data_dir}/meta: '):
            spec = spec_from_meta(read_meta(data_dir) if os.path.isdir(data_dir) else {})
else:
    model, spec = load_pretrained(init_from)
if spec is None:
    raise UserError('the model comes with no tokenizer, and its vocabulary is not GPT-2\'s: there is no telling what its ids mean')
with user_errors(ValueError, where='the tokenizer of the model: '):
    tokenizer = load_tokenizer(spec)
if tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(f'the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: they do not belong together')
model.eval().to(device)

# --- prompt -----------------------------------------------------------------------------------------------------------
if 'start' not in config.given and spec['kind'] == 'char' and start not in spec['chars']:
    start = spec['chars'][0]  # a vocabulary without a line end: begin with some character that it has
if start.startswith('FILE:'):
    with user_errors(OSError, UnicodeDecodeError, where=f'cannot read the prompt {start[5:]}: '), open(start[5:], encoding='utf-8') as file:
        start = file.read()
with user_errors(ValueError, where=f'--start={one_line(start, 40)}: '):
    prompt = tokenizer.encode(start, special=True) if spec == GPT2_SPEC else tokenizer.encode(start)
    if not len(prompt):
        raise ValueError('the prompt must have at least one token; a line end will do')
idx = torch.tensor(prompt, dtype=torch.long, device=device).expand(num_samples, -1)  # (B, T)

# --- text -------------------------------------------------------------------------------------------------------------
if compile:
    with torch.no_grad(), autocast(device, dtype):
        compile_or_stay_eager(model, lambda: model(idx[:, -model.config.block_size:]))
seed_all(seed)
with autocast(device, dtype):
    samples = model.generate(idx, max_new_tokens, temperature, top_k, vocab_size=tokenizer.vocab_size)
for sample in samples.tolist():
    print(tokenizer.decode(sample))
    print('---------------')
