"""Train a GPT, from scratch, from where a run stopped, or from pretrained GPT-2 weights.

On one device:      python train.py config/train_shakespeare_char.py --batch_size=32
On one node:        torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
On two nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py …   (on each)
After any stop:     the same command and --init_from=resume; with --init_from=auto from the start, the same command
"""

import math
import os
import signal
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from common import errors
from common.checkpoint import has_run, load_optimizer_buffers, prepare_out_dir, save_checkpoint, set_aside
from common.cpu import keep_memory, use_onednn_products
from common.device import (
    Stopwatch,
    autocast,
    compile_or_stay_eager,
    peak_flops,
    pick_device,
    pick_dtype,
    seed_all,
    synchronize,
    use_fast_float32,
)
from common.distributed import StopSignal, end, find_ranks, join_ranks
from common.errors import UserError, user_errors
from common.tracking import NoLog, RunLog, start_wandb
from configurator import configure, require
from dataloader import Tokens, TrainBatches, dataset_name, eval_batches, read_meta, text_checksum
from loading import SHAPE, initial_model, model_entry
from model import GPTConfig
from optim import OPTIMIZERS, learning_rate_at, load_optimizer_state, make_optimizer, step_unless, update_ratio
from tokenizer import spec_end_of_text, spec_from_meta, spec_vocab_size

# --- settings: the defaults train GPT-2 124M on OpenWebText on 8 GPUs -----------------------------------------------------
# where and when to report
out_dir = 'out'  # folder for checkpoints and metrics.jsonl
eval_interval = 2000  # updates between evaluations, each followed by a save
log_interval = 1  # updates between lines of the log
eval_iters = 200  # batches in an evaluation, of train and of val; 0: as many as cover val, and as many of train
eval_only = False  # evaluate once and stop, changing nothing
always_save_checkpoint = True  # save after every evaluation; False: only after one that is the best, and at the end
init_from = 'scratch'  # 'scratch', 'resume', 'auto': resume if there is a run in out_dir; weights of 'gpt2', …, 'gpt2-xl' or a folder
wandb_log = False  # also report to Weights & Biases
wandb_project = 'owt'  # wandb project
wandb_run_name = 'gpt2'  # wandb run
# data
dataset = 'openwebtext'  # folder below data/
data_order = 'random'  # 'random': windows start anywhere; 'shuffle': every window once an epoch, in a new order
align_documents = False  # begin windows where a document begins, if one does within the next block_size tokens
gradient_accumulation_steps = 5 * 8  # micro-batches in an update, all ranks together
batch_size = 12  # windows in a micro-batch
block_size = 1024  # tokens in a window, the model's context
batch_ramp_from = 0  # micro-batches of the first step, a divisor of gradient_accumulation_steps; 0: all of them
batch_ramp_iters = 0  # updates over which their number grows from there to gradient_accumulation_steps
# model: all fields of GPTConfig are settings, these are nanoGPT's
n_layer = 12  # transformer layers
n_head = 12  # attention heads in a layer
n_embd = 768  # width, divisible by n_head
dropout = 0.0  # share of activations dropped; 0 suits pretraining, 0.1 and more small data and fine-tuning
bias = False  # biases in linear and normalisation layers; GPT-2 has them, without is a little better and faster
vocab_multiple = 1  # round a new model's vocabulary up to a multiple of this; 64 suits matrix units
# optimizer
optimizer = 'adamw'  # 'adamw'; 'muon': Muon for the layers' matrices, AdamW for the rest
learning_rate = 6e-4  # the highest, of AdamW
muon_learning_rate = 0.02  # Muon's, on the same schedule
muon_momentum = 0.95  # Muon's mean of gradients
max_iters = 600000  # updates in all
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # AdamW's mean of gradients
beta2 = 0.95  # AdamW's mean of squared gradients; closer to 1 for small batches
grad_clip = 1.0  # clip the gradient's norm to this; 0 for never
max_skipped_iters = 20  # stop after so many updates in a row whose loss or gradient was not finite
patience = 0  # stop after so many evaluations without a lower validation loss; 0 for never
target_val_loss = 0.0  # stop as soon as the validation loss is this low; 0 for never
decay_lr = True  # follow the schedule below; False: learning_rate throughout
warmup_iters = 2000  # updates of linear warm-up
lr_decay_iters = 600000  # updates until min_lr is reached, usually max_iters
cooldown_iters = 0  # of them, the last so many go down linearly from a constant rate; 0: all follow a cosine
min_lr = 6e-5  # the lowest after warm-up, usually learning_rate / 10
# machine
seed = 1337  # of the initial weights, the data order and dropout
backend = 'auto'  # between ranks: 'nccl', 'gloo'; 'auto': nccl on CUDA, gloo elsewhere
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = True  # compile the model: slow to start, faster to run
config = configure(globals(), fields=GPTConfig, paths=('out_dir', 'init_from'))

require(
    config,
    lambda v: v >= 1,
    'at least 1',
    'eval_interval',
    'log_interval',
    'gradient_accumulation_steps',
    'batch_size',
    'block_size',
    'max_skipped_iters',
    'vocab_multiple',
)
require(
    config,
    lambda v: 0 <= v < math.inf,
    'a number from 0 on',
    'max_iters',
    'learning_rate',
    'min_lr',
    'weight_decay',
    'grad_clip',
    'warmup_iters',
    'lr_decay_iters',
    'cooldown_iters',
    'patience',
    'seed',
    'target_val_loss',
    'muon_learning_rate',
    'batch_ramp_from',
    'batch_ramp_iters',
    'eval_iters',
)
require(config, lambda v: 0 <= v < 1, 'in [0, 1)', 'dropout', 'beta1', 'beta2', 'muon_momentum')
require(config, lambda v: v in OPTIMIZERS, ' or '.join(map(repr, OPTIMIZERS)), 'optimizer')
require(config, lambda v: v <= 10**7, 'at most 10,000,000', 'batch_ramp_iters')
if optimizer == 'muon' and not learning_rate:
    raise UserError('--learning_rate=0: Muon follows the schedule of AdamW, which must have one; choose a rate above 0')
require(config, lambda v: v in ('random', 'shuffle'), "'random' or 'shuffle'", 'data_order')
if 'vocab_size' in config.given:
    raise UserError(
        '--vocab_size: the data set decides how many ids there are; --vocab_multiple= rounds their number up'
    )
dataset = config['dataset'] = dataset_name(dataset)

# --- device and ranks -----------------------------------------------------------------------------------------------------
watch = Stopwatch()
ranks = find_ranks()
if bool(batch_ramp_from) != bool(batch_ramp_iters):
    raise UserError('--batch_ramp_from and --batch_ramp_iters: a growing batch needs both')
batch_ramp_from = batch_ramp_from or gradient_accumulation_steps
if gradient_accumulation_steps % batch_ramp_from:
    raise UserError(
        f'--batch_ramp_from={batch_ramp_from}: must divide --gradient_accumulation_steps={gradient_accumulation_steps}'
    )
for key in ('gradient_accumulation_steps', 'batch_ramp_from'):
    w = ranks.world_size
    if config[key] % w and not eval_only:
        lower = config[key] // w * w
        raise UserError(
            f'--{key}={config[key]} cannot be divided among {w} ranks: use {f"{lower} or " if lower else ""}{lower + w}'
        )
device = pick_device(device, ranks)
keep_memory(device)  # before there are threads
dtype = pick_dtype(dtype, device)
join_ranks(backend, device, ranks)
use_fast_float32(device)
use_onednn_products(device)


def say(*words):
    """Print, on one rank only."""
    if ranks.is_main:
        errors.say(*words)


def warn(text):
    """Print a line of warning, on one rank only."""
    if ranks.is_main:
        errors.warn(text)


if decay_lr and not eval_only and 0 < learning_rate < min_lr:
    warn(f'--learning_rate={learning_rate} is below --min_lr={min_lr}: it will grow where it should decay')
if decay_lr and not eval_only and 0 < max_iters < warmup_iters:
    warn(
        f'--warmup_iters={warmup_iters} is longer than the run of --max_iters={max_iters}: the learning rate will not be reached'
    )
if init_from == 'auto':
    init_from = config['init_from'] = (
        'resume' if ranks.sum([float(ranks.is_main and has_run(out_dir))])[0] else 'scratch'
    )
if init_from == 'resume' and has_run(out_dir) and ranks.is_main and not eval_only:
    prepare_out_dir(out_dir)  # nobody else writes there between reading and going on

# --- data -----------------------------------------------------------------------------------------------------------------
data_dir = os.path.join('data', dataset)
meta = read_meta(data_dir)
with user_errors(ValueError, where=f'{data_dir}/meta: '):
    tokenizer = spec_from_meta(meta)
    vocab_size = spec_vocab_size(tokenizer) if tokenizer else meta['nanogpt']['vocab_size']
if not meta:
    say(f"{data_dir} does not say what its ids mean: they are taken for GPT-2's, as in nanoGPT")
end_of_text = spec_end_of_text(tokenizer) if align_documents and tokenizer else None
if align_documents and end_of_text is None:
    raise UserError(f'--align_documents=True: {data_dir} has no token that ends a document')
train_tokens, val_tokens = (Tokens(data_dir, split, meta, vocab_size) for split in ('train', 'val'))

# --- model ----------------------------------------------------------------------------------------------------------------
seed_all(seed)
model, resumed = initial_model(config, data_dir, tokenizer, vocab_size)
if model.config.vocab_size < vocab_size:  # a tokenizer may know ids that its model lacks: none of them may occur
    train_tokens, val_tokens = (Tokens(data_dir, split, meta, model.config.vocab_size) for split in ('train', 'val'))
progress = resumed or {
    'iter_num': 0,
    'best_val_loss': math.inf,
    'best_iter': 0,
    'evaluated_at': -1,
    'seconds': 0.0,
    'windows_taken': 0,
}
iter_num, best_val_loss, best_iter, evaluated_at, seconds_before, windows_taken = (  # iter_num counts the steps made
    progress[key] for key in ('iter_num', 'best_val_loss', 'best_iter', 'evaluated_at', 'seconds', 'windows_taken')
)
config.update({key: getattr(model.config, key) for key in (*SHAPE, 'vocab_size')})
block_size = model.config.block_size
text = {'train': text_checksum(train_tokens), 'val': text_checksum(val_tokens)}
if resumed:
    before = resumed['config']
    changed = [
        f'{key} {old!r} -> {config[key]!r}'
        for key, old in before.items()
        if key in config and key not in ('init_from', 'eval_only') and config[key] != old
    ]
    say(
        f'resuming the run in {out_dir} after {iter_num} updates'
        + (f', with changed settings: {", ".join(changed)}' if changed else '')
    )
    if before.get('optimizer', 'adamw') != optimizer and not eval_only:
        raise UserError(
            f'--optimizer={optimizer}: the run in {out_dir} has the state of {before.get("optimizer", "adamw")}; --init_from='
            f'{out_dir} with another --out_dir starts a new run from its weights'
        )
    if resumed.get('text', text) != text or dataset_name(str(before.get('dataset', dataset))) != dataset:
        say(
            f'{data_dir} is not the text that the run in {out_dir} was trained on until here: the best loss is searched anew'
        )
        best_val_loss, best_iter, evaluated_at, windows_taken = math.inf, iter_num, -1, 0
    elif (
        windows_taken is None
        and data_order == 'shuffle'
        and any(before.get(key, config[key]) != config[key] for key in ('batch_size', 'gradient_accumulation_steps'))
    ):
        warn(
            f'the run in {out_dir} does not say how far it has read its text, and its batches had another size: some of it may come twice'
        )
batches = TrainBatches(
    train_tokens,
    block_size,
    batch_size,
    gradient_accumulation_steps,
    seed,
    data_order,
    ranks,
    device,
    iter_num,
    (batch_ramp_from, batch_ramp_iters),
    end_of_text,
    windows_taken,
)
if not eval_only:
    x, y = batches.next()
val_tokens.require_window(block_size)
eval_iters = eval_iters or -(-((len(val_tokens) - 1) // block_size) // batch_size)
model.to(device)

# --- optimizer ------------------------------------------------------------------------------------------------------------
optimizer = make_optimizer(model, config, ranks, dtype)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 gradients vanish unless scaled up
if resumed and not eval_only:
    buffers = load_optimizer_buffers(resumed, out_dir)
    with user_errors(
        ValueError, TypeError, KeyError, RuntimeError, where=f'the optimizer state of the run in {out_dir}: '
    ):
        load_optimizer_state(optimizer, buffers['optimizer'])
        if scaler.is_enabled() and buffers.get('scaler'):
            scaler.load_state_dict(buffers['scaler'])
    del buffers, resumed['model']  # else they stay in memory to the end
    resumed.pop('optimizer', None)
if resumed and evaluated_at == iter_num >= max_iters and not eval_only:
    say(f'nothing to do: this run has made its {iter_num} updates; to go on, raise --max_iters')
    end(ranks)

# --- compile and wrap -----------------------------------------------------------------------------------------------------
tokens_per_micro_batch = batch_size * block_size
say(
    f'{model.num_params():,} parameters, {gradient_accumulation_steps * tokens_per_micro_batch:,} tokens an update, '
    f'{len(train_tokens):,} to train on; '
    f'{ranks.world_size} x {device.type}, {str(dtype).removeprefix("torch.")}'
)
raw_model = model  # what is evaluated and saved: without the ranks' wrapper
if ranks.world_size > 1:
    model = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None)


def try_once():
    """One forward and backward with nothing learned from them: makes the compiler do its work."""
    with model.no_sync() if ranks.world_size > 1 else nullcontext(), autocast(device, dtype):
        scaler.scale(model(x, y, with_logits=False)[1] / gradient_accumulation_steps).backward()
    raw_model.zero_grad(set_to_none=True)


watch.lap('start')
raw_model.train()
if compile and not eval_only:
    say('compiling the model, this can take a minute (--compile=False goes without) ...')
    compile_or_stay_eager(
        raw_model, try_once
    )  # in place, and tried inside the wrapper, which then overlaps backward and exchange
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
    """Mean loss in nats a token over fixed windows of each split, all ranks together -> {'train': …, 'val': …}. Never compiled: the
    compiler would take longer over it than most runs evaluate."""
    raw_model.eval()
    means = {}
    for split, tokens in (('train', train_tokens), ('val', val_tokens)):
        losses, counts = [], []
        for x, y in eval_batches(tokens, block_size, batch_size, eval_iters, ranks, device):
            with autocast(device, dtype):
                losses.append(raw_model.forward(x, y, with_logits=False)[1])
            counts.append((y >= 0).sum())
            if stop and stop.received:
                break  # the numbers will not count
        total = sum(loss.item() * count.item() for loss, count in zip(losses, counts))
        total, count = ranks.sum([total, float(sum(count.item() for count in counts))])
        means[split] = total / max(count, 1)
    raw_model.train()
    return means


def training_seconds():
    """What the whole run has trained for: evaluation, saving and logging stay out of it."""
    return seconds_before + watch.total('forward', 'data', 'backward', 'optimizer')


def save(is_best=False):
    """Write the whole state of the run; see checkpoint.py for why a crash at any moment is harmless."""
    if not ranks.is_main:
        return
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise UserError(
            f'the weights are not finite after {iter_num} updates, nothing was saved: lower --learning_rate, and go on from '
            'the last save with --init_from=resume'
        )
    state = {
        **model_entry(raw_model),
        'config': dict(config),
        'tokenizer': tokenizer,
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'best_iter': best_iter,
        'evaluated_at': evaluated_at,
        'seconds': training_seconds(),
        'windows_taken': batches.taken(iter_num),
        'text': text,
        'wandb_id': log.wandb_id,
    }
    save_checkpoint(out_dir, state, {'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict()}, is_best)


if eval_only:
    losses = evaluate()
    say(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
    end(ranks)

# --- the loop -------------------------------------------------------------------------------------------------------------
parameters = list(raw_model.parameters())
trained = [p for p in parameters if p.requires_grad]
watched = [p for p in trained if p.dim() == 2] or trained
watched = watched[len(watched) // 2]  # one matrix, in the middle, stands for all
flops_per_token, peak = raw_model.flops_per_token(), peak_flops(device, dtype)
skipped = longest = torch.zeros(
    (), device=device
)  # updates in a row that were not finite: on the device, so that no one waits for it
clipped, unlogged, tokens = (
    torch.zeros((), device=device),
    0,
    0,
)  # updates, all updates and tokens since the last line of the log
logged_seconds = 0.0  # training time until that line
first_iter = iter_num
watch.lap('start')

while True:
    # evaluate and save when due
    stopping = stop.on_any(ranks) and not skipped  # weights whose gradient is not finite are not worth saving
    due = (iter_num % eval_interval == 0 or iter_num >= max_iters) and evaluated_at != iter_num
    is_best = False
    if due and not stopping:
        synchronize(device)  # what is still queued is training
        watch.lap('optimizer')
        losses = evaluate()
        watch.lap('evaluation')
        if stop.on_any(ranks):  # a signal cuts an evaluation short, and its numbers do not count
            due, stopping = False, not skipped
        else:
            if not math.isfinite(losses['val']):
                raise UserError(
                    f'the validation loss is {losses["val"]} after {iter_num} updates: lower --learning_rate, or use '
                    '--dtype=float32; nothing was saved from here on'
                )
            log.evaluation(
                {
                    'iter': iter_num,
                    'train/loss': losses['train'],
                    'val/loss': losses['val'],
                    'seconds': training_seconds(),
                }
            )
            evaluated_at, is_best = iter_num, losses['val'] < best_val_loss
            if is_best:
                best_val_loss, best_iter = losses['val'], iter_num
    early = (
        'no lower validation loss in as many evaluations as --patience says'
        if 0 < patience * eval_interval <= iter_num - best_iter
        else f'the validation loss is down to --target_val_loss={target_val_loss}'
        if best_val_loss <= target_val_loss > 0
        else ''
    )
    finished = iter_num >= max_iters or bool(early)
    if stopping or due and (is_best or always_save_checkpoint or finished):
        save(is_best)
        watch.lap('saving')
    if stopping or finished:
        break

    # forward and backward, over this rank's micro-batches
    lr = (
        learning_rate_at(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters, cooldown_iters)
        if decay_lr
        else learning_rate
    )
    for group in optimizer.param_groups:
        group['lr'] = group['initial_lr'] * (lr / learning_rate if learning_rate else 0.0)
    micro_batches = batches.micro_batches_at(iter_num)  # of all ranks
    mean_loss = torch.zeros((), device=device)
    for micro in range(ranks.rank, micro_batches, ranks.world_size):
        if ranks.world_size > 1:
            model.require_backward_grad_sync = (
                micro + ranks.world_size >= micro_batches
            )  # ranks exchange gradients once an update
        if dropout:
            seed_all(seed, iter_num, micro)
        with autocast(device, dtype):
            loss = model(x, y, with_logits=False)[1] / (micro_batches // ranks.world_size)
        watch.lap('forward')
        x, y = batches.next()  # the next batch is made while an accelerator still works on this one
        watch.lap('data')
        mean_loss += loss.detach()
        scaler.scale(loss).backward()
        watch.lap('backward')

    # clip and step; an update that is not finite is skipped
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    ranks.mean(mean_loss)
    skip = ~(grad_norm.isfinite() & mean_loss.isfinite())  # the same on all ranks
    log_due = iter_num % log_interval == 0
    before = watched.detach().clone() if log_due else None
    step_unless(skip, optimizer)
    scaler.update()
    optimizer.zero_grad()
    skipped = (skipped + 1) * skip
    longest = torch.maximum(longest, skipped)
    clipped += (grad_norm > grad_clip) & (grad_clip > 0)
    unlogged += 1
    tokens += micro_batches * tokens_per_micro_batch
    iter_num += 1
    if (log_due or iter_num % max_skipped_iters == 0) and longest >= max_skipped_iters:
        raise UserError(
            f'loss or gradient was not finite in {int(longest)} updates in a row, by update {iter_num - 1}: lower '
            '--learning_rate, raise --warmup_iters, or use --dtype=float32, and go on from the last save by '
            '--init_from=resume'
        )
    watch.lap('optimizer')

    # log: the one place where the host waits for an accelerator
    if log_due:
        mean_loss, grad_norm = mean_loss.item(), grad_norm.item()
        watch.lap('optimizer')
        seconds = training_seconds() - seconds_before
        elapsed, logged_seconds = seconds - logged_seconds, seconds
        log.update(
            {
                'iter': iter_num - 1,
                'loss': mean_loss,
                'lr': optimizer.param_groups[0]['lr'],
                'time_ms': 1000 * elapsed / unlogged,
                'tokens_per_s': tokens / elapsed,
                'mfu': flops_per_token * tokens / elapsed / (peak * ranks.world_size) if peak else None,
                'grad_norm': grad_norm,
                'clipped': clipped.item() / unlogged,
                'update_ratio': update_ratio(watched, before),
                'skipped': int(skipped),
                'left_s': (max_iters - iter_num)
                * (seconds / (iter_num - first_iter) + watch.mean('evaluation', 'saving') / eval_interval),
            }
        )
        clipped.zero_()
        unlogged = tokens = 0
        watch.lap('logging')

# --- the end --------------------------------------------------------------------------------------------------------------
log.close()
say('time: ' + ', '.join(f'{name} {seconds:.1f}s' for name, seconds in watch.seconds.items()))
status = (
    128 + (stop.received or signal.SIGTERM) if stopping else 0
)  # the shell's status for a program that a signal ended
if stopping:
    say(f'stopped after {iter_num} updates, all saved; to go on: {stop.resume_command(ranks)}')
else:
    if early and iter_num < max_iters:
        say(f'stopped before --max_iters={max_iters}: {early}')
    say(f'done: {iter_num} updates, best validation loss {best_val_loss:.4f} after {best_iter}; saved in {out_dir}')
end(ranks, status)
