"""The loss of a trained model on a data set: nats a token, perplexity, and bits per byte of the text.

python evaluate.py --out_dir=out-shakespeare-char                  the whole validation split, in whole windows
python evaluate.py --out_dir=out-shakespeare-char --quantize=int8  and what 8-bit weights cost
python evaluate.py --init_from=gpt2 --dataset=shakespeare --eval_iters=50
"""

import math
import os

import torch

from common.cpu import pack
from common.device import autocast, pick_device, pick_dtype, use_fast_float32
from common.distributed import Ranks
from common.errors import UserError, user_errors
from configurator import configure, require
from dataloader import Tokens, dataset_name, eval_batches, read_meta
from loading import open_model
from tokenizer import load_tokenizer, same_ids, spec_from_meta, spec_vocab_size

init_from = 'resume'  # 'resume': the checkpoint in out_dir; 'gpt2', 'gpt2-medium', …; or the folder of a run or of a Hugging Face GPT-2
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt' is the latest, 'ckpt_best.pt' the one of the lowest validation loss
dataset = ''  # folder below data/; '': the one that the model was trained on
split = 'val'  # 'val' or 'train'
block_size = 0  # tokens in a window, each predicted from those before it in it; 0: the model's longest
batch_size = 16  # windows at once
eval_iters = 0  # batches, of windows spread evenly over the split; 0: all whole windows
quantize = ''  # 'int8': 8-bit weights on a CPU
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
config = configure(globals(), paths=('out_dir', 'init_from'))

require(config, lambda v: v in ('train', 'val'), 'train or val', 'split')
require(config, lambda v: 1 <= v <= 65536, 'from 1 to 65536', 'batch_size')
require(config, lambda v: v >= 0, '0 or more', 'block_size', 'eval_iters')
device = pick_device(device)
dtype = pick_dtype(dtype, device)
use_fast_float32(device)

# --- model and data ---------------------------------------------------------------------------------------------------
model, tokenizer, trained_with = open_model(init_from, out_dir, ckpt)
dataset = dataset or trained_with.get('dataset')
if not dataset or not isinstance(dataset, str):
    raise UserError('--dataset= is needed: the folder below data/ to evaluate on')
data_dir = os.path.join('data', dataset_name(dataset))
meta = read_meta(data_dir)
with user_errors(ValueError, where=f'{data_dir}/meta: '):
    spec = spec_from_meta(meta)
    if tokenizer and spec and not same_ids(spec, tokenizer):
        raise UserError(
            f'{data_dir} was prepared with another tokenizer than the model was trained with: the loss would mean nothing'
        )
    n_ids = min(model.config.vocab_size, spec_vocab_size(spec) if spec else model.config.vocab_size)
tokens = Tokens(data_dir, split, meta, n_ids)
if block_size > model.config.block_size:
    raise UserError(f'--block_size={block_size}: the model has {model.config.block_size} positions')
tokens.require_window(1)
block_size = min(block_size or model.config.block_size, len(tokens) - 1)
batch_size = min(batch_size, (len(tokens) - 1) // block_size)
model.eval().to(device)
pack(model, device, dtype, quantize)

# --- loss -------------------------------------------------------------------------------------------------------------
try:
    token_bytes = load_tokenizer(spec).token_bytes() if spec else None
except UserError as error:  # without the vocabulary there is still a loss
    token_bytes = None
    print(f'no bits per byte: {error}')
total, count, n_bytes = 0.0, 0, 0
with torch.inference_mode(), autocast(device, dtype):
    for x, y in eval_batches(tokens, block_size, batch_size, eval_iters or len(tokens), Ranks(), device):
        n = int((y >= 0).sum())
        total, count = total + model(x, y, with_logits=False)[1].item() * n, count + n
        if token_bytes is not None:
            n_bytes += int(token_bytes[y[y >= 0].cpu().numpy()].sum())
loss = total / count
if not math.isfinite(loss):
    raise UserError(
        'the model computes numbers that are not finite: its weights are broken, or --dtype is too narrow for them'
    )
bits_per_byte = (
    f'{total / math.log(2) / n_bytes:.4f} bits per byte, ' if n_bytes else ''
)  # what tokenizers can be compared by
print(
    f'{data_dir}, {split}: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}, {bits_per_byte}'
    f'over {count:,} tokens in windows of {block_size}'
)
