"""Train a GPT, from scratch, from where a run stopped, or from pretrained GPT-2 weights.

On one device:      python train.py config/train_shakespeare_char.py --batch_size=32
On one node:        torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
On two nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py …   (on each)
After any stop:     the same command and --init_from=resume
"""
import math
import os
import signal
import sys
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    BEST,
    LATEST,
    load_checkpoint,
    load_optimizer_buffers,
    load_pretrained,
    model_entry,
    prepare_out_dir,
    restore_model,
    save_checkpoint,
    set_aside,
)
from configurator import UserError, configure, require, user_errors
from dataloader import Tokens, TrainBatches, eval_batches, read_meta
from metrics import NoLog, RunLog, start_wandb
from model import GPT, GPTConfig
from optim import learning_rate_at, make_optimizer, update_ratio
from runtime import (
    Ranks,
    StopSignal,
    Stopwatch,
    autocast,
    compile_or_stay_eager,
    find_ranks,
    join_ranks,
    leave_ranks,
    peak_flops,
    pick_device,
    pick_dtype,
    seed_all,
    use_fast_float32,
)
from tokenizer import GPT2_SPEC, spec_from_meta, spec_vocab_size

# --- settings: the defaults train GPT-2 124M on OpenWebText on 8 GPUs -----------------------------------------------------
# where and when to report
out_dir = 'out'  # folder for checkpoints and metrics.jsonl
eval_interval = 2000  # updates between evaluations, each followed by a save
log_interval = 1  # updates between lines of the log
eval_iters = 200  # batches in an evaluation, of train and of val
eval_only = False  # evaluate once and stop, changing nothing
always_save_checkpoint = True  # save after every evaluation; False: only when the validation loss has improved, and at the end
init_from = 'scratch'  # 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with a Hugging Face GPT-2
wandb_log = False  # also report to Weights & Biases
wandb_project = 'owt'  # wandb project
wandb_run_name = 'gpt2'  # wandb run
# data
dataset = 'openwebtext'  # folder below data/
data_order = 'random'  # 'random': windows start anywhere; 'shuffle': every window once an epoch, in a new order
gradient_accumulation_steps = 5 * 8  # micro-batches in an update, all ranks together
batch_size = 12  # windows in a micro-batch
block_size = 1024  # tokens in a window, the model's context
# model
n_layer = 12  # transformer layers
n_head = 12  # attention heads in a layer
n_embd = 768  # width, divisible by n_head
dropout = 0.0  # share of activations dropped; 0 suits pretraining, 0.1 and more small data and fine-tuning
bias = False  # biases in linear and normalisation layers; GPT-2 has them, without is a little better and faster
# optimizer
learning_rate = 6e-4  # the highest
max_iters = 600000  # updates in all
weight_decay = 1e-1  # AdamW's, on matrices and embeddings
beta1 = 0.9  # AdamW's mean of gradients
beta2 = 0.95  # AdamW's mean of squared gradients; closer to 1 for small batches
grad_clip = 1.0  # clip the gradient's norm to this; 0 for never
max_skipped_iters = 20  # stop after so many updates in a row whose loss or gradient was not finite
patience = 0  # stop after so many evaluations without a lower validation loss; 0 for never
decay_lr = True  # follow the schedule below; False: learning_rate throughout
warmup_iters = 2000  # updates of linear warm-up
lr_decay_iters = 600000  # updates until min_lr is reached, usually max_iters
min_lr = 6e-5  # the lowest after warm-up, usually learning_rate / 10
# machine
seed = 1337  # of the initial weights, the data order and dropout
backend = 'auto'  # between ranks: 'nccl', 'gloo'; 'auto': nccl on CUDA, gloo elsewhere
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = True  # compile the model: slow to start, faster to run
config = configure(globals())

require(config, lambda v: v >= 1, 'at least 1', 'eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps',
        'batch_size', 'block_size', 'max_skipped_iters')
require(config, lambda v: 0 <= v < math.inf, 'a number from 0 on', 'max_iters', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip',
        'warmup_iters', 'lr_decay_iters', 'patience', 'seed')
require(config, lambda v: 0 <= v < 1, 'in [0, 1)', 'dropout', 'beta1', 'beta2')
require(config, lambda v: v in ('random', 'shuffle'), "'random' or 'shuffle'", 'data_order')

# --- device and ranks -----------------------------------------------------------------------------------------------------
watch = Stopwatch()
ranks = find_ranks()
if gradient_accumulation_steps % ranks.world_size and not eval_only:
    w = ranks.world_size
    lower = gradient_accumulation_steps // w * w
    raise UserError(f'--gradient_accumulation_steps={gradient_accumulation_steps} cannot be divided among {w} ranks: use '
                    f'{f"{lower} or " if lower else ""}{lower + w}')
local_accumulation_steps = gradient_accumulation_steps // ranks.world_size
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
device = pick_device(device, ranks)
dtype = pick_dtype(dtype, device)
join_ranks(backend, device, ranks)
use_fast_float32(device)


def say(*words):
    """Print, on one rank only."""
    if ranks.is_main:
        print(*words, flush=True)


# --- data -----------------------------------------------------------------------------------------------------------------
data_dir = os.path.join('data', dataset)
meta = read_meta(data_dir)
with user_errors(ValueError, where=f'{data_dir}/meta: '):
    tokenizer = spec_from_meta(meta)
    tokenizer_vocab_size = spec_vocab_size(tokenizer) if tokenizer else meta['nanogpt']['vocab_size']
train_tokens, val_tokens = (Tokens(data_dir, split, meta, tokenizer_vocab_size) for split in ('train', 'val'))

# --- model ----------------------------------------------------------------------------------------------------------------
iter_num, best_val_loss, best_iter, evaluated_at = 0, math.inf, 0, -1  # iter_num counts the updates made
resumed = None  # the checkpoint to go on from
SHAPE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')
seed_all(seed)
if init_from == 'scratch':
    vocab_size = GPTConfig.vocab_size if tokenizer == GPT2_SPEC else tokenizer_vocab_size
    with user_errors(ValueError):
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
elif init_from == 'resume':
    path = os.path.join(out_dir, LATEST)
    resumed = load_checkpoint(path)
    for key in SHAPE:  # unless asked for, the shape is the checkpoint's, as in nanoGPT
        if key in config.given and config[key] != resumed['model_args'].get(key):
            raise UserError(f'--{key}={config[key]}: the run in {path} has {key}={resumed["model_args"].get(key)}; leave it out to resume, '
                            'or start another run with another --out_dir')
    if resumed.get('tokenizer') not in (None, tokenizer):
        raise UserError(f'{path} was trained with another tokenizer than that of {data_dir}: choose the --dataset it was trained on')
    model = restore_model(resumed, path, dropout)
    iter_num, evaluated_at = resumed['iter_num'], resumed['evaluated_at']
    if os.path.exists(os.path.join(out_dir, BEST)):
        best_val_loss, best_iter = resumed['best_val_loss'], resumed['best_iter']
    else:
        best_iter = iter_num  # nanoGPT's runs have no such file: the best is what the next evaluation finds
else:
    model, pretrained_tokenizer = load_pretrained(init_from, dropout)
    if pretrained_tokenizer and tokenizer and tokenizer['kind'] == 'char':
        raise UserError(f'{data_dir} is in characters, {init_from} knows BPE tokens: choose a --dataset in its encoding')
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    elif block_size > model.config.block_size and 'block_size' in config.given:
        raise UserError(f'--block_size={block_size}: {init_from} has {model.config.block_size} positions, use at most that')
config.update({key: getattr(model.config, key) for key in SHAPE})
block_size = model.config.block_size
if resumed:
    changed = [f'{key} {old!r} -> {config[key]!r}' for key, old in resumed['config'].items()
               if key in config and key not in ('init_from', 'eval_only') and config[key] != old]
    say(f'resuming {path} after {iter_num} updates' + (f', with changed settings: {", ".join(changed)}' if changed else ''))
if tokenizer_vocab_size > model.config.vocab_size:
    raise UserError(f'{data_dir} has a vocabulary of {tokenizer_vocab_size}, the model of {model.config.vocab_size}: '
                    'choose another --dataset')
batches = TrainBatches(train_tokens, block_size, batch_size, gradient_accumulation_steps, seed, data_order, ranks, device, iter_num)
val_tokens.require_window(block_size)
x, y = batches.next()
model.to(device)

# --- optimizer ------------------------------------------------------------------------------------------------------------
optimizer = make_optimizer(model, learning_rate, weight_decay, (beta1, beta2))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 gradients vanish unless scaled up
if resumed and not eval_only:
    buffers = load_optimizer_buffers(resumed, out_dir)
    with user_errors(ValueError, TypeError, KeyError, RuntimeError, where=f'the optimizer state of {out_dir}/{LATEST}: '):
        optimizer.load_state_dict(buffers['optimizer'])
        if scaler.is_enabled() and buffers.get('scaler'):
            scaler.load_state_dict(buffers['scaler'])
    del buffers, resumed['model']  # else they stay in memory to the end
    resumed.pop('optimizer', None)
if resumed and evaluated_at == iter_num >= max_iters and not eval_only:
    say(f'nothing to do: this run has made its {iter_num} updates; to go on, raise --max_iters')
    leave_ranks(ranks)
    sys.exit(0)

# --- compile and wrap -----------------------------------------------------------------------------------------------------
say(f'{model.num_params():,} parameters, {tokens_per_iter:,} tokens an update, {len(train_tokens):,} to train on; '
    f'{ranks.world_size} x {device.type}, {str(dtype).removeprefix("torch.")}')
raw_model = model  # what is evaluated and saved: without the ranks' wrapper
if ranks.world_size > 1:
    model = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)


def try_once():
    """One forward and backward, and one evaluation, with nothing learned from them: makes the compiler do its work."""
    x, y = next(eval_batches(val_tokens, block_size, batch_size, 1, Ranks(), device))
    if not eval_only:
        raw_model.train()
        with model.no_sync() if ranks.world_size > 1 else nullcontext(), autocast(device, dtype):
            scaler.scale(model(x, y)[1] / local_accumulation_steps).backward()
        raw_model.zero_grad(set_to_none=True)
    raw_model.eval()
    with torch.no_grad(), autocast(device, dtype):
        raw_model(x, y)


watch.lap('start')
if compile:
    say('compiling the model, this can take a minute (--compile=False goes without) ...')
    compile_or_stay_eager(raw_model, try_once)  # in place, and tried inside the wrapper, which then overlaps backward and exchange
    watch.lap('compilation')

# --- output ---------------------------------------------------------------------------------------------------------------
stop = None if eval_only else StopSignal()  # an evaluation alone has nothing to save
log = NoLog()
if ranks.is_main and not eval_only:
    prepare_out_dir(out_dir)
    wandb_run = start_wandb(config, resumed.get('wandb_id') if resumed else None) if wandb_log else None
    aside = None if resumed else set_aside(out_dir)  # last, when little is left that could fail before the first update
    if aside:
        say(f'{out_dir} holds an earlier run, moved to {aside}')
    log = RunLog(out_dir, wandb_run, iter_num if resumed else None, evaluated_at)


@torch.no_grad()
def evaluate():
    """Mean loss in nats a token over fixed windows of each split, all ranks together -> {'train': …, 'val': …}."""
    raw_model.eval()
    means = {}
    for split, tokens in (('train', train_tokens), ('val', val_tokens)):
        losses, counts = [], []
        for x, y in eval_batches(tokens, block_size, batch_size, eval_iters, ranks, device):
            with autocast(device, dtype):
                losses.append(raw_model(x, y)[1])
            counts.append((y >= 0).sum())
            if stop and stop.received:
                break  # the numbers will not count
        total = sum(loss.item() * count.item() for loss, count in zip(losses, counts))
        total, count = ranks.sum([total, float(sum(count.item() for count in counts))], device)
        means[split] = total / max(count, 1)
    raw_model.train()
    return means


def save(is_best=False):
    """Write the whole state of the run; see checkpoint.py for why a crash at any moment is harmless."""
    if not ranks.is_main:
        return
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise UserError(f'the weights are not finite after {iter_num} updates, nothing was saved: lower --learning_rate, and go on from '
                        'the last save with --init_from=resume')
    state = {**model_entry(raw_model), 'config': dict(config), 'tokenizer': tokenizer, 'iter_num': iter_num,
             'best_val_loss': best_val_loss, 'best_iter': best_iter, 'evaluated_at': evaluated_at, 'wandb_id': log.wandb_id}
    save_checkpoint(out_dir, state, {'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict()}, is_best)


if eval_only:
    losses = evaluate()
    say(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
    leave_ranks(ranks)
    sys.exit(0)

# --- the loop -------------------------------------------------------------------------------------------------------------
parameters = list(raw_model.parameters())
watched = raw_model.transformer.h[len(raw_model.transformer.h) // 2].attn.c_proj.weight  # one matrix, in the middle, stands for all
flops_per_iter = raw_model.flops_per_token() * tokens_per_iter
peak = peak_flops(device, dtype)
skipped = 0  # updates in a row that were not finite
unlogged, clipped, logged_seconds = 0, 0, 0.0  # since the last line of the log: updates, clipped ones; training time until then
first_iter = iter_num
raw_model.train()
watch.lap('start')

while True:
    # evaluate and save when due
    stopping = stop.on_any(ranks, device) and not skipped  # weights whose gradient is not finite are not worth saving
    due = (iter_num % eval_interval == 0 or iter_num >= max_iters) and evaluated_at != iter_num
    is_best = False
    if due and not stopping:
        losses = evaluate()
        watch.lap('evaluation')
        if stop.on_any(ranks, device):  # a signal cuts an evaluation short, and its numbers do not count
            due, stopping = False, not skipped
        else:
            if not math.isfinite(losses['val']):
                raise UserError(f'the validation loss is {losses["val"]} after {iter_num} updates: lower --learning_rate, or use '
                                '--dtype=float32; nothing was saved from here on')
            log.evaluation({'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val']})
            evaluated_at, is_best = iter_num, losses['val'] < best_val_loss
            if is_best:
                best_val_loss, best_iter = losses['val'], iter_num
    finished = iter_num >= max_iters or 0 < patience * eval_interval <= iter_num - best_iter
    if stopping or due and (is_best or always_save_checkpoint or finished):
        save(is_best)
        watch.lap('saving')
    if stopping or finished:
        break

    # forward and backward, over this rank's micro-batches
    lr = learning_rate_at(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr
    loss_sum = 0.0
    for micro in range(local_accumulation_steps):
        if ranks.world_size > 1:
            model.require_backward_grad_sync = micro == local_accumulation_steps - 1  # ranks exchange gradients once an update
        if dropout:
            seed_all(seed, iter_num, ranks.rank + micro * ranks.world_size)
        with autocast(device, dtype):
            loss = model(x, y)[1] / local_accumulation_steps
        watch.lap('forward')
        x, y = batches.next()  # the next batch is made while an accelerator still works on this one
        watch.lap('data')
        loss_sum = loss_sum + loss.detach()
        scaler.scale(loss).backward()
        watch.lap('backward')

    # clip and step; an update that is not finite is skipped
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()  # waits for the device: a sync point
    mean_loss = ranks.sum([loss_sum.item()], device)[0] / ranks.world_size
    finite = math.isfinite(norm) and math.isfinite(mean_loss)  # the same on all ranks
    log_due = iter_num % log_interval == 0
    before = watched.detach().clone() if log_due else None
    if finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    watch.lap('optimizer')

    # log
    skipped = 0 if finite else skipped + 1
    if skipped == max_skipped_iters:
        raise UserError(f'loss or gradient was not finite in {skipped} updates in a row, up to update {iter_num}: lower --learning_rate, '
                        'raise --warmup_iters, or use --dtype=float32, and go on from the last save with --init_from=resume')
    clipped += grad_clip > 0 and norm > grad_clip
    unlogged += 1
    iter_num += 1
    if log_due:
        seconds = watch.total('forward', 'data', 'backward', 'optimizer')  # evaluation, saving and logging stay out of it
        time_per_iter, logged_seconds = (seconds - logged_seconds) / unlogged, seconds
        log.update({
            'iter': iter_num - 1, 'loss': mean_loss, 'lr': lr,
            'time_ms': 1000 * time_per_iter, 'tokens_per_s': tokens_per_iter / time_per_iter,
            'mfu': flops_per_iter / time_per_iter / (peak * ranks.world_size) if peak else None,
            'grad_norm': norm, 'clipped': clipped / unlogged, 'update_ratio': update_ratio(watched, before), 'skipped': skipped,
            'left_s': (max_iters - iter_num) * (seconds / (iter_num - first_iter) + watch.mean('evaluation', 'saving') / eval_interval),
        })
        clipped = unlogged = 0
        watch.lap('logging')

# --- the end --------------------------------------------------------------------------------------------------------------
log.close()
say('time: ' + ', '.join(f'{name} {seconds:.1f}s' for name, seconds in watch.seconds.items()))
leave_ranks(ranks)
if stopping:
    say(f'stopped after {iter_num} updates, all saved; to go on: {stop.resume_command(ranks)}')
    sys.exit(128 + (stop.received or signal.SIGTERM))  # the shell's status for a program that a signal ended
say(f'done: {iter_num} updates, best validation loss {best_val_loss:.4f} after {best_iter}; saved in {out_dir}')
