"""The loss of a trained model on a data set: nats per token, perplexity, and bits per byte of the text. Or its scores
on public benchmarks, see docs/evaluation.md.

python evaluate.py --out_dir=out-shakespeare-char                  the whole validation split, in whole windows
python evaluate.py --out_dir=out-shakespeare-char --quantize=int8  and what 8-bit weights cost
python evaluate.py --init_from=gpt2 --dataset=shakespeare --eval_iters=50
python evaluate.py --init_from=gpt2 --tasks=lambada_openai,hellaswag --limit=300
torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out --tasks=core --task_path=eval_bundle
"""

import json as json_format
import math
import os
import signal
import sys

from common.cpu import pack
from common.device import set_up_device
from common.distributed import StopSignal, end, find_ranks, join_ranks
from common.errors import UserError, say, user_errors
from common.tracking import append_record
from configurator import configure, require
from dataloader import DataSet, eval_batches
from evaluation import bytes_per_token, evaluate
from loading import checkpoint_path, load_checkpoint, open_model
from tokenizer import same_ids

init_from = 'resume'  # 'resume': the checkpoint in out_dir; or a run, or a model: folder, .gguf file, name on the hub
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt', the latest, or 'ckpt_best.pt', the one with the lowest validation loss
dataset = ''  # folder below data/; '': the one that the model was trained on
split = 'val'  # 'val' or 'train'
block_size = 0  # tokens per window; each is predicted from those before it in the window; 0: the model's block_size
mask_documents = False  # documents do not see each other; True in any case for a model that was trained so
batch_size = 16  # windows per batch; on a CPU always about 2,048 tokens
eval_iters = 0  # so many times batch_size windows, spread evenly over the split; 0: all whole windows
tasks = ''  # benchmarks instead of the loss: names of lm_eval's tasks, groups or your own, with commas between; 'core'
task_path = ''  # folder with tasks of your own, as YAML files; for 'core' the folder of the evaluation bundle
limit = 0  # examples per task; 0: all
num_fewshot = -1  # examples before each question; -1: as the task says
chat = False  # ask by the model's chat template
batch_tokens = 0  # most tokens per batch of requests, padding included; 0: 2,048 on a CPU, 16,384 elsewhere
json = False  # print the scores as one JSON object
quantize = ''  # 'int8', 'int4': weights of so many bits on a CPU, as in sample.py
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best available
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
config = configure(globals(), paths=('out_dir', 'init_from', 'task_path'))

require(config, 'split', 'train or val', lambda v: v in ('train', 'val'))
require(config, 'batch_size', 'from 1 to 65536', lambda v: 1 <= v <= 65536)
require(config, 'block_size eval_iters limit', '0 or more', lambda v: v >= 0)
require(config, 'num_fewshot', '-1 or more', lambda v: v >= -1)
require(config, 'batch_tokens', '0 or more', lambda v: v >= 0)
for key in ('task_path', 'limit', 'num_fewshot', 'chat', 'batch_tokens', 'json'):
    if key in config.given and not tasks:
        raise UserError(f'--{key}={config[key]}: is for benchmarks; add --tasks=')
for key in ('split', 'block_size', 'batch_size', 'mask_documents', 'eval_iters'):
    if key in config.given and tasks:
        raise UserError(f'--{key}={config[key]}: is for the loss on a data set, not with --tasks=; leave it out')
if tasks:
    from benchmarks import Benchmarks, Interrupted, log_entries  # a missing package is an error at once

ranks = find_ranks()
device, dtype = set_up_device(device, dtype, ranks)
join_ranks('auto', device, ranks)

# --- model ------------------------------------------------------------------------------------------------------------
model, tokenizer, trained_with = open_model(init_from, out_dir, ckpt)
model.eval().to(device)
dataset = dataset or trained_with.get('dataset')


# --- benchmarks -------------------------------------------------------------------------------------------------------
def print_scores(name, scores):
    """A line per metric."""
    for metric, found in scores['metrics'].items():
        value, stderr = ('' if number is None else f'{number:.4f}' for number in (found['value'], found['stderr']))
        say(f'{name:<40} {metric:<28} {value:>10} {stderr:>8} {scores["n"] or "":>7}')


def benchmark():
    """Run the tasks, print their scores, append them to the run's metrics -> the exit status."""
    spec, path = tokenizer, checkpoint_path(init_from, out_dir, ckpt)
    if spec is None and dataset and isinstance(dataset, str) and os.path.isdir(os.path.join('data', dataset)):
        spec = DataSet(dataset).tokenizer  # nanoGPT's checkpoints have none
    iter_num = load_checkpoint(path, mmap=True)['iter_num'] if path else None
    pack(model, device, dtype, quantize)
    suite = Benchmarks(tasks, model, spec, ranks, device, dtype, task_path, limit, num_fewshot, chat, batch_tokens)
    stop, found, status = StopSignal(), {}, 0
    if not json:
        say(f'{"task":<40} {"metric":<28} {"value":>10} {"stderr":>8} {"n":>7}')
    try:
        for name, scores in suite.run(lambda: stop.on_any(ranks), progress=True):
            found[name] = scores
            if not json:
                print_scores(name, scores)
    except Interrupted:
        status = 128 + (stop.received or signal.SIGTERM)  # the shell's status after a signal
        left = [name for name in suite.tasks if name not in found]
        say(f'interrupted: done {", ".join(found) or "nothing"}; not done {", ".join(left)}', file=sys.stderr)
    if json:
        say(json_format.dumps({'scores': found, 'limit': limit or None, 'complete': status == 0}))
    if path and found and ranks.is_main:
        entries = [log_entries(name, scores) for name, scores in found.items()]
        append_record(
            os.path.dirname(path), {'iter': iter_num, **{k: v for entry in entries for k, v in entry.items()}}
        )
    return status


if tasks:
    end(ranks, benchmark())

# --- loss -------------------------------------------------------------------------------------------------------------
if not dataset or not isinstance(dataset, str):
    raise UserError('--dataset= is needed: the folder below data/ to evaluate on')
data = DataSet(dataset)
with user_errors(ValueError, where=f'the tokenizer of the model or {data.path}: '):
    if tokenizer and data.tokenizer and not same_ids(data.tokenizer, tokenizer):
        raise UserError(f'{data.path} was prepared with another tokenizer than the model was trained with')
n_ids, longest = min(model.config.vocab_size, data.vocab_size), model.config.block_size
tokens = data.tokens(split, n_ids, mask_documents or bool(trained_with.get('mask_documents')))
block_size = block_size or tokens.window or longest
if block_size > longest:
    raise UserError(f'--block_size={block_size}: the model has {longest} positions')
block_size = min(block_size, len(tokens) - 1)
tokens.require_window(max(1, block_size))
batch_size = min(batch_size, (len(tokens) - 1) // block_size)
pack(model, device, dtype, quantize)
batches = eval_batches(tokens, block_size, batch_size, eval_iters or len(tokens), ranks, device)
result = evaluate(model, batches, ranks, device, dtype, bytes_per_token(data.tokenizer))
if not math.isfinite(result.loss):
    raise UserError('the loss is NaN or infinite: the weights are broken, or --dtype overflows')
bits_per_byte = f'{result.bits_per_byte:.4f} bits per byte, ' if result.bits_per_byte else ''
say(
    f'{data.path}, {split}: loss {result.loss:.4f}, perplexity {math.exp(min(result.loss, 700)):.2f}, {bits_per_byte}'
    f'over {result.tokens:,} tokens in windows of {block_size}'
)
end(ranks)
