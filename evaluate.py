"""The loss of a trained model on a data set: nats per token, perplexity, and bits per byte of the text.

python evaluate.py --out_dir=out-shakespeare-char                  the whole validation split, in whole windows
python evaluate.py --out_dir=out-shakespeare-char --quantize=int8  and what 8-bit weights cost
python evaluate.py --init_from=gpt2 --dataset=shakespeare --eval_iters=50
"""

import math

from common.cpu import pack
from common.device import set_up_device
from common.distributed import Ranks
from common.errors import UserError, user_errors
from configurator import configure, require
from dataloader import DataSet, eval_batches
from evaluation import bytes_per_token, evaluate
from loading import open_model
from tokenizer import same_ids

init_from = 'resume'  # 'resume': the checkpoint in out_dir; or a run, or a model: folder, .gguf file, name on the hub
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt', the latest, or 'ckpt_best.pt', the one with the lowest validation loss
dataset = ''  # folder below data/; '': the one that the model was trained on
split = 'val'  # 'val' or 'train'
block_size = 0  # tokens per window; each is predicted from those before it in the window; 0: the model's block_size
batch_size = 16  # windows per batch
eval_iters = 0  # batches, of windows spread evenly over the split; 0: all whole windows
quantize = ''  # 'int8': 8-bit weights on a CPU
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best available
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
config = configure(globals(), paths=('out_dir', 'init_from'))

require(config, 'split', 'train or val', lambda v: v in ('train', 'val'))
require(config, 'batch_size', 'from 1 to 65536', lambda v: 1 <= v <= 65536)
require(config, 'block_size eval_iters', '0 or more', lambda v: v >= 0)
device, dtype = set_up_device(device, dtype)

# --- model and data -------------------------------------------------------------------------------------------------
model, tokenizer, trained_with = open_model(init_from, out_dir, ckpt)
dataset = dataset or trained_with.get('dataset')
if not dataset or not isinstance(dataset, str):
    raise UserError('--dataset= is needed: the folder below data/ to evaluate on')
data = DataSet(dataset)
with user_errors(ValueError, where=f'the tokenizer of the model or {data.path}: '):
    if tokenizer and data.tokenizer and not same_ids(data.tokenizer, tokenizer):
        raise UserError(f'{data.path} was prepared with another tokenizer than the model was trained with')
longest = model.config.block_size
if block_size > longest:
    raise UserError(f'--block_size={block_size}: the model has {longest} positions')
n_ids = min(model.config.vocab_size, data.vocab_size)
tokens = data.tokens(split, n_ids, bool(trained_with.get('mask_documents')))
block_size = min(block_size or tokens.window or longest, len(tokens) - 1)
tokens.require_window(max(1, block_size))
batch_size = min(batch_size, (len(tokens) - 1) // block_size)
model.eval().to(device)
pack(model, device, dtype, quantize)

# --- loss -----------------------------------------------------------------------------------------------------------
batches = eval_batches(tokens, block_size, batch_size, eval_iters or len(tokens), Ranks(), device)
result = evaluate(model, batches, Ranks(), device, dtype, bytes_per_token(data.tokenizer))
if not math.isfinite(result.loss):
    raise UserError('the loss is NaN or infinite: the weights are broken, or --dtype overflows')
bits_per_byte = f'{result.bits_per_byte:.4f} bits per byte, ' if result.bits_per_byte else ''
print(
    f'{data.path}, {split}: loss {result.loss:.4f}, perplexity {math.exp(min(result.loss, 700)):.2f}, {bits_per_byte}'
    f'over {result.tokens:,} tokens in windows of {block_size}'
)
