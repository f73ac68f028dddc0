"""Train a GPT: from scratch, from where a run stopped, or from pretrained weights.

On one device:      python train.py config/train_shakespeare_char.py --batch_size=32
On one node:        torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
On each of 2 nodes: torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py …
After any stop:     the same command and --init_from=resume; with --init_from=auto from the start, the same command
"""

import math
import signal
from functools import partial

import torch

from common import device as devices
from common.checkpoint import prepare_out_dir
from common.cpu import use_onednn_products
from common.device import autocast, compile_or_stay_eager, seed_all, set_up_device
from common.distributed import StopSignal, end, find_ranks, join_ranks
from common.errors import UserError, say
from common.saving import Saver
from common.tracking import NoTracking, chosen_trackers, evaluation_line, saved_trackers, start_trackers
from configurator import configure, require
from dataloader import DataSet, check_global_batch, dataset_name, eval_batches, text_checksum, training_batches
from evaluation import bytes_per_token, evaluate, training_benchmarks
from generation import sample_texts, tokenizer_of_samples
from loading import SHAPE, fill_weights, initial_model, initial_progress, model_entry, restore_optimizer, resume_or_not
from lora import check_lora, describe_trained, lora_settings
from model import GPTConfig
from optim import StepStats, check_optimizer, clip_gradients, learning_rate_at, make_optimizer, step_unless
from parallel import check_parallel, describe_mesh, device_mesh, modules_to_compile, parallelize, sync_gradients

# --- settings: the defaults train GPT-2 124M on OpenWebText on 8 GPUs -------------------------------------------------
# where and when to report
out_dir = 'out'  # folder for checkpoints and metrics.jsonl
eval_interval = 2000  # iterations between evaluations, each followed by a save
log_interval = 1  # iterations between lines of the log
eval_iters = 200  # batches of batch_size sequences per evaluation; 0: all of val
eval_train = False  # evaluate on as many batches of train too
eval_tasks = ''  # benchmarks at evaluations too, such as 'lambada_openai,hellaswag', see docs/evaluation.md; '': none
eval_tasks_every = 1  # at every so many evaluations, and at the last
eval_tasks_limit = 100  # examples per task; 0: all
eval_tasks_path = ''  # folder with tasks of your own, or with the bundle that the task 'core' needs
eval_only = False  # evaluate once and stop, changing nothing
always_save_checkpoint = True  # save after every evaluation; False: only after the best so far, and at the end
keep_saves = 1  # keep the last so many saves; the latest is resumed
async_save = False  # copy the state to the host's memory and write it while training goes on
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume if there is a run); or a model: hub name, folder, .gguf
sample_interval = 0  # iterations between samples of what the model writes; 0: none
trackers = ()  # --trackers=wandb, tensorboard or trackio also report there; each adds one
wandb_log = False  # the same as --trackers=wandb
wandb_project = 'owt'  # project in wandb and trackio
wandb_run_name = 'gpt2'  # run in wandb and trackio
# data
dataset = 'openwebtext'  # folder below data/
data_order = 'random'  # 'random': sequences start anywhere; 'shuffle': every sequence once per epoch, in a new order
align_documents = False  # start sequences where a document starts, if one does within the next block_size tokens
mask_documents = False  # attention and positions stay within a document, as if each were a sequence of its own
gradient_accumulation_steps = 5 * 8  # micro-batches per step, of all ranks together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence, the model's context length
batch_ramp_from = 0  # micro-batches of the first step, a divisor of gradient_accumulation_steps; 0: all of them
batch_ramp_iters = 0  # iterations over which their number grows from there to gradient_accumulation_steps
# model: all fields of GPTConfig are settings, these are nanoGPT's
n_layer = 12  # transformer layers
n_head = 12  # attention heads per layer
n_embd = 768  # width, divisible by n_head
dropout = 0.0  # share of activations dropped; 0 suits pretraining, 0.1 and more suits small data and fine-tuning
bias = False  # biases in linear and normalization layers; GPT-2 has them, without is a little better and faster
vocab_multiple = 1  # round a new model's vocabulary up to a multiple of this; 64 suits matrix units
lora_rank = 0  # fine-tune an adapter of this rank (LoRA) beside the weights of --init_from=; 0: the weights themselves
lora_alpha = 32  # the adapter's output is scaled by lora_alpha / lora_rank
lora_targets = 'attn,mlp'  # linear layers with an adapter: parts of their names, such as 'c_attn' or 'mlp.c_proj'
# optimizer
optimizer = 'adamw'  # 'adamw'; 'muon': Muon for the layers' matrices, AdamW for the rest
learning_rate = 6e-4  # the highest, of AdamW
muon_learning_rate = 0.02  # the highest, of Muon, on the same schedule
muon_momentum = 0.95  # decay rate of Muon's mean of gradients
max_iters = 600000  # iterations of the whole run
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # decay rate of AdamW's mean of gradients
beta2 = 0.95  # decay rate of AdamW's mean of squared gradients; closer to 1 for small batches
grad_clip = 1.0  # clip the gradient's norm to this; 0: never
max_skipped_iters = 20  # stop after this many iterations in a row with a NaN or infinite loss or gradient
patience = 0  # stop after this many evaluations without a lower validation loss; 0: never
target_val_loss = 0.0  # stop as soon as the validation loss is this low; 0: never
decay_lr = True  # follow the schedule below; False: learning_rate throughout
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # iterations until min_lr is reached, usually max_iters
cooldown_iters = 0  # linear decay over this many iterations before lr_decay_iters, constant until then; 0: cosine
min_lr = 6e-5  # the lowest after warm-up, usually learning_rate / 10
# machine
parallel = 'ddp'  # several ranks: 'ddp' copies the model, 'fsdp' shards it, 'hsdp' shards it within each node
shard_ranks = 0  # hsdp: ranks that share one copy of the model; 0: those of a node
cpu_offload = False  # fsdp, hsdp: weights and optimizer state in the host's memory, for a model larger than the GPU
activation_checkpointing = 'none'  # 'selective': recompute in the backward pass all but products; 'full': whole layers
uneven = False  # allow a number of ranks that does not divide the micro-batches: some then compute fewer
timeout = 600  # seconds after which a rank that died or hangs ends the job
seed = 1337  # of the initial weights, the data order and dropout
backend = 'auto'  # of communication between ranks: 'nccl', 'gloo'; 'auto': nccl on CUDA, gloo elsewhere
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best available
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = 'auto'  # compile the model: True, False; 'auto': if that saves more time than it takes
config = configure(globals(), fields=GPTConfig, paths=('out_dir', 'init_from', 'eval_tasks_path'))

counts = 'keep_saves eval_interval log_interval max_skipped_iters block_size vocab_multiple'
require(config, counts, 'at least 1', lambda v: v >= 1)
require(config, 'patience target_val_loss eval_iters sample_interval seed', '0 or more', lambda v: 0 <= v < math.inf)
require(config, 'dropout', 'in [0, 1)', lambda v: 0 <= v < 1)
require(config, 'compile', 'True, False or auto', lambda v: v in ('True', 'False', 'auto'))
check_optimizer(config)
check_lora(config)
if 'vocab_size' in config.given:
    raise UserError('--vocab_size: the data set decides it; --vocab_multiple= rounds it up')
dataset = config['dataset'] = dataset_name(dataset)
if not eval_only:
    chosen_trackers(config)  # a missing package is an error before anything is loaded

# --- device and ranks -------------------------------------------------------------------------------------------------
watch = devices.Stopwatch()
ranks = find_ranks()
check_parallel(config, ranks)
check_global_batch(config, ranks.world_size)
device, dtype = set_up_device(device, dtype, ranks)
join_ranks(backend, device, ranks, timeout)
mesh = device_mesh(config, ranks, device)
init_from = config['init_from'] = resume_or_not(config, ranks)

# --- data and model ---------------------------------------------------------------------------------------------------
data = DataSet(dataset)
seed_all(seed)
model, checkpoint = initial_model(config, data)
n_ids = min(data.vocab_size, model.config.vocab_size)  # a tokenizer may know ids that its model lacks
splits = {split: data.tokens(split, n_ids, mask_documents) for split in ('train', 'val')}
if not data.meta:
    say(f"{data.path} does not say what its ids mean: they are taken for GPT-2's, as in nanoGPT")
text = {split: text_checksum(tokens) for split, tokens in splits.items()}
config.update({key: getattr(model.config, key) for key in (*SHAPE, 'vocab_size')} | lora_settings(model))
block_size = model.config.block_size
use_onednn_products(device, block_size)
progress = initial_progress(checkpoint, config, text)
iter_num, first_iter, best_val_loss = progress['iter_num'], progress['iter_num'], progress['best_val_loss']
best_iter, evaluated_at = progress['best_iter'], progress['evaluated_at']
batches = training_batches(data, splits['train'], config, ranks, device, iter_num, progress['windows_taken'])
if not eval_only:
    x, y, starts, weight = batches.next()
splits['val'].require_window(block_size)
eval_iters = eval_iters or -(-((len(splits['val']) - 1) // block_size) // batch_size)
if checkpoint and evaluated_at == iter_num >= max_iters and not eval_only:
    say(f'nothing to do: this run has made its {iter_num} iterations; to continue, raise --max_iters')
    end(ranks)

# --- split over the ranks ---------------------------------------------------------------------------------------------
tokens_per_micro_batch = batch_size * block_size
global_batch, train_size = gradient_accumulation_steps * tokens_per_micro_batch, len(splits['train'])
say(
    f'{model.num_params():,} parameters{describe_trained(model)}, {global_batch:,} tokens per iteration, '
    f'{train_size:,} to train on; {ranks.world_size} x {device.type}, {str(dtype)[6:]}{describe_mesh(mesh)}'
)
raw_model = model  # without the wrapper of DistributedDataParallel: this one is evaluated and saved
fill = partial(fill_weights, checkpoint=checkpoint, seed=seed)
model = parallelize(raw_model, mesh, config, ranks, device, dtype, fill)
raw_model.train()
benchmark = training_benchmarks(config, raw_model, data.tokenizer, ranks, device, dtype)

# --- optimizer --------------------------------------------------------------------------------------------------------
opt = make_optimizer(raw_model, config, ranks, dtype)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 gradients vanish unless scaled up
if checkpoint and not eval_only:
    restore_optimizer(opt, scaler, checkpoint, out_dir)
watch.lap('start')


def try_once():
    """One forward and backward pass without a step, so that compilation happens now."""
    sync_gradients(model, mesh is not None)  # what hsdp would keep for a later exchange, zero_grad does not clear
    with autocast(device, dtype):
        loss = model(x, y, starts, with_logits=False)[1]
    loss.backward()


if compile != 'False' and not eval_only:
    calls = max(0, max_iters - iter_num) * batches.rounds_at(iter_num) if compile == 'auto' else None
    compile_or_stay_eager(modules_to_compile(raw_model, mesh), try_once, device, calls, ranks, must=mesh is not None)
    raw_model.zero_grad(set_to_none=True)
    watch.lap('compilation')

# --- output -----------------------------------------------------------------------------------------------------------
stop = None if eval_only else StopSignal()  # an evaluation alone has nothing to save
log, tokenizer = NoTracking(), tokenizer_of_samples(data) if sample_interval else None
saver = Saver(out_dir, ranks, mesh is not None, async_save, keep_saves, timeout, iter_num)
if ranks.is_main and not eval_only:
    prepare_out_dir(out_dir)
    resumed_at = iter_num if checkpoint else None
    log = start_trackers(config, out_dir, saved_trackers(checkpoint or {}), resumed_at, evaluated_at)
token_bytes = bytes_per_token(data.tokenizer, download=False)  # training needs no network


def evaluate_splits():
    """Evaluate on fixed windows, and on benchmarks when due -> a record for the log."""
    record = {'iter': iter_num}
    for split in ('train', 'val') if eval_train else ('val',):
        share = eval_batches(splits[split], block_size, batch_size, eval_iters, ranks, device)
        result = evaluate(raw_model, share, ranks, device, dtype, token_bytes, lambda: stop and stop.on_any(ranks))
        record[f'{split}/loss'] = result.loss
    if result.bits_per_byte:
        record['val/bits_per_byte'] = result.bits_per_byte
    return record | benchmark(iter_num, lambda: stop and stop.on_any(ranks))


def training_seconds():
    """Seconds of training in the whole run, without evaluation, saving and logging."""
    return progress['seconds'] + watch.total('forward', 'data', 'backward', 'optimizer')


def save(is_best=False):
    """Write the whole state of the run; common/checkpoint.py says why a crash at any moment is harmless."""
    state = {**model_entry(raw_model, ranks), 'config': dict(config), 'tokenizer': data.tokenizer, 'text': text}
    state |= {'iter_num': iter_num, 'best_val_loss': best_val_loss, 'best_iter': best_iter}
    state |= {'evaluated_at': evaluated_at, 'windows_taken': batches.taken(iter_num), 'seconds': training_seconds()}
    state['trackers'] = log.state()
    saver.save(state, {'optimizer': opt.state_dict(), 'scaler': scaler.state_dict()}, is_best)


if eval_only:
    say(evaluation_line(evaluate_splits()))
    end(ranks)

# --- the loop ---------------------------------------------------------------------------------------------------------
parameters = [p for group in opt.param_groups for p in group['params']]
stats = StepStats(parameters, device)
watch.lap('start')

while True:
    # once in a while: evaluate and save
    stopping = stop.on_any(ranks) and not stats.skipped  # weights after a NaN gradient are not worth saving
    due = (iter_num % eval_interval == 0 or iter_num >= max_iters) and evaluated_at != iter_num
    is_best = False
    if due and not stopping:
        devices.synchronize(device)  # what is still queued is training
        watch.lap('optimizer')
        record = evaluate_splits()
        watch.lap('evaluation')
        if stop.on_any(ranks):  # a signal cuts an evaluation short: its loss does not count
            due, stopping = False, not stats.skipped
        else:
            if not math.isfinite(record['val/loss']):
                raise UserError(
                    f'the validation loss is {record["val/loss"]} after {iter_num} iterations: lower --learning_rate, '
                    'or use --dtype=float32; nothing was saved from here on'
                )
            log.log({**record, 'seconds': training_seconds()})
            evaluated_at, is_best = iter_num, record['val/loss'] < best_val_loss
            if is_best:
                best_val_loss, best_iter = record['val/loss'], iter_num
    early = ''
    if 0 < patience * eval_interval <= iter_num - best_iter:
        early = 'no lower validation loss in as many evaluations as --patience says'
    elif best_val_loss <= target_val_loss > 0:
        early = f'the validation loss is down to --target_val_loss={target_val_loss}'
    finished = iter_num >= max_iters or bool(early)
    if stopping or due and (is_best or always_save_checkpoint or finished):
        save(is_best)
        watch.lap('saving')
    if stopping or finished:
        break

    # forward and backward, over this rank's micro-batches
    lr = learning_rate
    if decay_lr:
        lr = learning_rate_at(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters, cooldown_iters)
    for group in opt.param_groups:
        group['lr'] = group['initial_lr'] * (lr / learning_rate if learning_rate else 0.0)
    micro_batches = batches.micro_batches_at(iter_num)  # of all ranks
    mean_loss = torch.zeros((), device=device)
    rounds = batches.rounds_at(iter_num)  # the same on all ranks; with --uneven=True some end with padding
    for micro in range(ranks.rank, rounds * ranks.world_size, ranks.world_size):
        sync_gradients(model, micro >= (rounds - 1) * ranks.world_size)
        if dropout:
            seed_all(seed, iter_num, micro)  # no random state to save: masks depend on the iteration alone
        with autocast(device, dtype):
            loss = model(x, y, starts, with_logits=False)[1] * weight
        watch.lap('forward')
        x, y, starts, weight = batches.next()  # the next batch is prepared while an accelerator still works on this one
        watch.lap('data')
        mean_loss += loss.detach()
        scaler.scale(loss).backward()
        watch.lap('backward')

    # clip and step; a step with a NaN or infinite loss or gradient is skipped
    scaler.unscale_(opt)
    grad_norm = clip_gradients(parameters, grad_clip)
    ranks.mean(mean_loss)
    skip = ~(grad_norm.isfinite() & mean_loss.isfinite())  # the same on all ranks
    log_due = iter_num % log_interval == 0
    stats.before_step(log_due)
    step_unless(skip, opt)
    scaler.update()
    opt.zero_grad()
    stats.after_step(skip, (grad_norm > grad_clip) & (grad_clip > 0), micro_batches * tokens_per_micro_batch)
    iter_num += 1
    if log_due or iter_num % max_skipped_iters == 0:
        stats.require_fewer_skipped(max_skipped_iters)
    watch.lap('optimizer')

    # log: the one place where the host waits for an accelerator
    if log_due:
        mean_loss, grad_norm = mean_loss.item(), grad_norm.item()
        watch.lap('optimizer')
        seconds = training_seconds() - progress['seconds']
        seconds_per_iter = seconds / (iter_num - first_iter) + watch.mean('evaluation', 'saving') / eval_interval
        record = {'iter': iter_num - 1, 'loss': mean_loss, 'grad_norm': grad_norm}
        record['lr'] = opt.param_groups[0]['lr']
        record |= stats.since_last_line(seconds)
        flops, peak = raw_model.flops_per_token() * record['tokens_per_s'], devices.peak_flops(device, dtype)
        record['mfu'] = flops / (peak * ranks.world_size) if peak else None
        record['left_s'] = (max_iters - iter_num) * seconds_per_iter
        log.log(record)
        watch.lap('logging')

    # once in a while: what the model writes by now
    if tokenizer and iter_num % sample_interval == 0 and not stop.on_any(ranks):
        devices.synchronize(device)  # what is still queued is training
        watch.lap('optimizer')
        with autocast(device, dtype):
            log.log({'iter': iter_num, 'samples': sample_texts(raw_model, tokenizer)})
        watch.lap('samples')

# --- the end ----------------------------------------------------------------------------------------------------------
saver.finish()
log.finish()
say(watch.summary(device))
status = 128 + (stop.received or signal.SIGTERM) if stopping else 0  # the shell's status after a signal
if stopping:
    say(f'stopped after {iter_num} iterations, all saved; to continue: {stop.resume_command(ranks)}')
else:
    if early and iter_num < max_iters:
        say(f'stopped before --max_iters={max_iters}: {early}')
    say(f'done: {iter_num} iterations, best validation loss {best_val_loss:.4f} after {best_iter}; saved in {out_dir}')
end(ranks, status)
