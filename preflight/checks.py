"""What check.py asks of a run: that it learns, from the right targets, and that what it saves can be resumed.

It asks train.py's own model, optimizer, batches and saves: set_up() runs train.py up to its loop. Everything happens on
small batches, and in a folder of its own; each check of the model is a collective, which every rank calls.
"""

import ast
import gc
import hashlib
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from common.checkpoint import BEST, BEST_PARTS, files_of_run, link_files
from common.device import autocast, seed_all, synchronize
from common.distributed import StopSignal
from common.errors import UserError
from common.sharded import host_copy, part
from configurator import ROOT
from dataloader import eval_batches, training_batches
from lora import lora_of
from optim import clip_gradients, learning_rate_at, make_optimizer, step_unless
from parallel import sync_gradients
from preflight.datachecks import Finding, entropy, judge

FLOPS = {'cpu': 5e10}  # of a step of the checks: a second or less
FLOPS_ELSEWHERE = 5e12
TRIAL_STEPS = 10  # at the run's own learning rate, after a warm-up over half of them
HEART_TOKENS = 64  # of the batch that is learned by heart, on each rank
HEART_STEPS = 100
HEART_RATES = (3e-3, 3e-4, 3e-2)  # tried in turn, where the one before does not do; what suits most models first
LOOKED_AT = 2  # sequences of which all logits are held in memory
LINK_BYTES = 2**22  # sent between ranks, several times


# --- train.py up to its loop ------------------------------------------------------------------------------------------


class Run:
    """The globals of train.py as attributes: what is set here is set there."""

    def __init__(self, namespace: dict):
        self.__dict__ = namespace


def set_up(config, **changes) -> Run:
    """Run train.py up to its loop, in this process, with these settings.

    config: its settings, a Config. changes: other values of some. Whatever train.py itself finds wrong, a UserError.
    """
    path = os.path.join(ROOT, 'train.py')
    with open(path, encoding='utf-8') as file:
        body = ast.parse(file.read()).body
    loop = next((i for i, node in enumerate(body) if isinstance(node, (ast.While, ast.For))), None)
    if loop is None:
        raise UserError(f'{path} has no loop at its top level, up to which check.py could run it')
    namespace = {'__name__': '__main__', '__file__': path}
    settings = {key: config[key] for key in config.given} | changes
    arguments, handlers = sys.argv, {signum: signal.getsignal(signum) for signum in StopSignal.SIGNALS}
    sys.argv = [path, *as_arguments(settings)]
    try:
        exec(compile(ast.Module(body[:loop], []), path, 'exec'), namespace)
    finally:
        sys.argv = arguments
        for signum, handler in handlers.items():  # a check is stopped at once, not after a save
            signal.signal(signum, handler)
    return Run(namespace)


def as_arguments(settings: dict) -> list[str]:
    """The command line that gives these settings."""
    arguments = []
    for key, value in settings.items():
        texts = ('', *value) if isinstance(value, tuple) else (value,)
        arguments += [f'--{key}={text}' for text in texts]
    return arguments


def folder_beside(out_dir: str) -> str:
    """Where the check may write: a new folder on the file system of out_dir, the same for all ranks."""
    parent = os.path.abspath(out_dir)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    return os.path.join(parent, f'.check-{os.environ["MASTER_PORT"] if "RANK" in os.environ else os.getpid()}')


def link_saves(out_dir: str, folder: str):
    """Let `folder` hold what resumes the run in out_dir, if there is one: as links, which can be replaced and removed
    without changing the run. Not its metrics.jsonl, to which a resumed run appends."""
    if os.path.isdir(out_dir):
        omitted = (BEST, BEST_PARTS, 'metrics.jsonl')
        link_files(out_dir, [name for name in files_of_run(out_dir) if name not in omitted], folder)


# --- small batches ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Inputs, targets and starts of documents, (B, T) each, as the model takes them."""

    x: torch.Tensor
    y: torch.Tensor
    starts: torch.Tensor | None


def cut(batch: Batch, rows: int, T: int) -> Batch:
    """The first `rows` sequences of a batch, and of these the T tokens with the most targets."""
    x, y, starts = (None if one is None else one[:rows] for one in batch)
    T = min(T, x.size(1))
    targets = torch.nn.functional.pad((y >= 0).sum(0).cumsum(0), (1, 0))
    first = int((targets[T:] - targets[:-T]).argmax())
    if starts is not None:
        starts = (starts[:, first : first + T] - first).clamp_min(0)
    return Batch(x[:, first : first + T], y[:, first : first + T], starts)


def small(run: Run, batch: Batch) -> Batch:
    """As much of a batch as a step on this device does in a second or less."""
    tokens = FLOPS.get(run.device.type, FLOPS_ELSEWHERE) / run.raw_model.flops_per_token()
    T = max(HEART_TOKENS, int(tokens))
    return cut(batch, max(1, int(tokens) // run.block_size), T)


def held_out(run: Run) -> Batch:
    """A batch of val, of this rank."""
    batches = eval_batches(run.splits['val'], run.block_size, run.batch_size, 1, run.ranks, run.device)
    return Batch(*next(batches))


@contextmanager
def no_training(run: Run, dropout: bool = False):
    """A context in which the model is looked at, not trained."""
    run.raw_model.train(dropout)
    with torch.no_grad():
        yield
    run.raw_model.train()
    if hasattr(run.raw_model, 'reshard'):  # it keeps whole weights, whose names then hide the sharded ones
        run.raw_model.reshard()


def loss_of(run: Run, batch: Batch) -> float:
    """The loss in eval mode, as the run computes it; the mean over the ranks."""
    with no_training(run), autocast(run.device, run.dtype):
        loss = run.raw_model(*batch, with_logits=False)[1].float()
    return run.ranks.mean(loss).item()


def training_step(run: Run, opt, batch: Batch, rate: float) -> float:
    """One step of an optimizer; the gradients stay -> the loss before it, the mean over the ranks.

    rate: by which the highest learning rate of each group is multiplied.
    """
    for group in opt.param_groups:
        group['lr'] = group['initial_lr'] * rate
    opt.zero_grad()
    sync_gradients(run.model, True)
    with autocast(run.device, run.dtype):
        loss = run.model(*batch, with_logits=False)[1]
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(opt)
    norm = clip_gradients([p for group in opt.param_groups for p in group['params']], run.grad_clip)
    step_unless(~norm.isfinite(), opt)
    run.scaler.update()
    return run.ranks.mean(loss.detach().float()).item()


@torch.no_grad()
def restore(parameters: list, copies: list):
    """Give parameters the values that host_copy() took."""
    for parameter, copy in zip(parameters, copies):
        part(parameter).copy_(copy)


def anywhere(run: Run, names: list[str], found: list[bool]) -> list[str]:
    """The names for which any rank found something. A collective."""
    return [name for name, n in zip(names, run.ranks.sum([float(value) for value in found])) if n]


def listed(names: list[str], most: int = 3) -> str:
    """'3 (a, b, …)'."""
    return f'{len(names)} ({", ".join(names[:most])}{", …" if len(names) > most else ""})'


# --- settings ---------------------------------------------------------------------------------------------------------


def check_schedule(run: Run) -> Finding:
    """Do the settings that count iterations fit together?"""
    n, decays, peak = run.max_iters, run.decay_lr and run.max_iters > 0, peak_rate(run)
    last = rate_at(run, n - 1) if decays else peak
    rules = {
        'raise --learning_rate: nothing is learned at 0': not run.learning_rate,
        f'lower --warmup_iters={run.warmup_iters}: it takes most of the run': decays and n / 2 < run.warmup_iters <= n,
        f'set --lr_decay_iters={n}, as --max_iters: the run ends before the rate has come down': (
            decays and last > 0.5 * peak > run.min_lr and n > run.warmup_iters
        ),
        f'set --lr_decay_iters={n}, as --max_iters: the rate is at its lowest for half of the run': (
            decays and 2 * run.lr_decay_iters < n and run.min_lr < 0.5 * peak
        ),
        f'lower --cooldown_iters={run.cooldown_iters}: it begins before the warm-up has ended': (
            decays and run.cooldown_iters > max(0, run.lr_decay_iters - run.warmup_iters)
        ),
        f'lower --eval_interval={run.eval_interval}: nothing is evaluated or saved between the start and the end': (
            run.eval_interval > n
        ),
        f'lower --log_interval={run.log_interval}: the log has one line': run.log_interval > n,
    }
    advice = '; '.join(text for text, applies in rules.items() if applies)
    found = f'{n:,} iterations, the learning rate up to {peak:.1e}, {last:.1e} at the end'
    return judge('schedule', found, (advice, 'warning', advice))


def rate_at(run: Run, step: int) -> float:
    """The learning rate of a step, as train.py sets it."""
    if not run.decay_lr:
        return run.learning_rate
    return learning_rate_at(
        step, run.learning_rate, run.min_lr, run.warmup_iters, run.lr_decay_iters, run.cooldown_iters
    )


def peak_rate(run: Run) -> float:
    """The highest learning rate that is still to come, looked for at a thousand steps and at the end of the warm-up."""
    steps = torch.linspace(run.iter_num, max(run.iter_num, run.max_iters - 1), 1000).long().tolist()
    steps += [run.warmup_iters] * (run.iter_num <= run.warmup_iters < run.max_iters)
    return max(rate_at(run, step) for step in steps)


def check_epochs(run: Run) -> Finding:
    """How often does the run read the text?"""
    tokens, text = run.batches.taken(run.max_iters) * run.block_size, len(run.splits['train'])
    trained = sum(p.numel() for p in run.raw_model.parameters() if p.requires_grad)
    epochs = tokens / text
    found = f'{tokens:,} tokens, {epochs:.3g} times the {text:,} of train, {tokens / trained:.3g} for each weight'
    advice = (
        'more weights than tokens, read many times without --dropout, are learned by heart: keep the best save, set '
        '--dropout=0.1 or more, lower --max_iters'
    )
    overfits = epochs > 10 and trained > text and not run.dropout and run.always_save_checkpoint
    return judge('epochs', found, (overfits, 'warning', advice))


# --- targets, and what the model may see ------------------------------------------------------------------------------


def check_targets(run: Run, batches: list[Batch]) -> Finding:
    """Is the target of each token the token after it?"""
    right = all(((y[:, :-1] == x[:, 1:]) | (y[:, :-1] < 0)).all() for x, y, _ in batches)
    targets, n = (sum(sizes) for sizes in zip(*(((y >= 0).sum().item(), y.numel()) for _, y, _ in batches)))
    wrong, targets, n = run.ranks.sum([float(not right), targets, n])
    found = f'each is the token after its input; {targets / n:.0%} of {n:,.0f} tokens are targets'
    if wrong:
        found = 'the batches have targets other than the token after each input'
    advice = 'x must be tokens[i:i+T] and y tokens[i+1:i+T+1], see Tokens.sequences in dataloader.py'
    return judge('targets', found, (wrong, 'error', advice), (not targets, 'error', 'the mask hides all of them'))


def check_loss(run: Run, batch: Batch) -> Finding:
    """Is the model's loss what its logits say of the targets? With one target in each sequence, so that a loss that
    takes the logits of another position, or another target, shows; of a model that has learned something."""
    x, y, starts = cut(small(run, batch), LOOKED_AT, run.block_size)
    seen = (y >= 0).cumsum(1)
    columns = (seen > seen[:, -1:] // 2).int().argmax(1, keepdim=True)  # the target in the middle
    one = torch.full_like(y, -1).scatter(1, columns, y.gather(1, columns))
    with no_training(run):
        logits, loss = run.raw_model(x, y, starts)[0].float(), run.raw_model(x, one, starts)[1]
    of_all = torch.nn.functional.cross_entropy(logits.mT, y.clamp_min(0), reduction='none')  # (B, T)
    expected = (of_all * (one >= 0)).sum() / (one >= 0).sum().clamp_min(1)
    losses = run.ranks.gather((loss.item(), expected.item()))
    loss, expected = max(losses, key=lambda pair: abs(pair[0] - pair[1]))
    found = f'{loss:.3f} for a target to which its position gives -log p = {expected:.3f}'
    wrong = not abs(loss - expected) <= 0.02 * max(1, expected)
    advice = 'targets are shifted by the loader, and must not be again: see GPT.forward in model.py'
    return judge('loss', found, (wrong, 'error', advice))


def check_causality(run: Run, batch: Batch) -> Finding:
    """Do the logits at a position change with a later token? With --mask_documents, with one of another document?"""
    x, y, starts = cut(small(run, batch), LOOKED_AT, run.block_size)
    half = x.size(1) // 2
    other = (x + torch.randint(1, max(2, run.n_ids), x.shape, device=x.device)) % run.n_ids

    def change(early: bool, starts) -> tuple[float, float]:
        """The largest change of logits, in the first half and in the second, if the early or late half is another."""
        changed = torch.cat((other[:, :half], x[:, half:]) if early else (x[:, :half], other[:, half:]), dim=1)
        with no_training(run):
            moved = (run.raw_model(changed, y, starts)[0] - run.raw_model(x, y, starts)[0]).abs()
        return moved[:, :half].max().item(), moved[:, half:].max().item()

    leak, effect = change(False, starts)
    between = 0.0
    if starts is not None:
        columns = torch.arange(x.size(1), device=x.device).expand_as(x)
        between = change(True, torch.where(columns < half, 0, half))[1]
    leak, effect, between = run.ranks.sum([leak, effect, between])
    limit = 1e-3 * effect
    found = f'other tokens in the second half change the logits before them by {leak:.1g}, theirs by {effect:.2g}'
    if starts is not None:
        found += f', those of another document by {between:.1g}'
    advice = (
        'a position may attend to itself and earlier ones alone: see attention_mask in model.py, common/attention.py'
    )
    blind = 'the logits do not depend on the tokens: see GPT.hidden in model.py'
    return judge(
        'causality', found, (not effect > 0, 'error', blind), (not max(leak, between) <= limit, 'error', advice)
    )


# --- does it learn? ---------------------------------------------------------------------------------------------------


def check_weights(run: Run) -> Finding:
    """Are all weights numbers?"""
    broken = [name for name, p in run.raw_model.named_parameters() if not part(p).isfinite().all()]
    names = [name for name, _ in run.raw_model.named_parameters()]
    broken = anywhere(run, names, [name in broken for name in names])
    found = f'{run.raw_model.num_params(False):,} numbers in {len(names)} parameters'
    if broken:
        found = f'NaN or infinite values in {listed(broken)} of {len(names)} parameters'
    return judge('weights', found, (broken, 'error', 'see init_weights in model.py, or what --init_from= names'))


def check_first_loss(run: Run, batch: Batch) -> Finding:
    """Is the first loss that of a model that knows nothing, or, of weights that were trained, of one that does?"""
    loss, nothing = loss_of(run, small(run, batch)), math.log(run.n_ids)
    found = f'{loss:.3f} nats per token of train; a guess among {run.n_ids:,} ids costs {nothing:.3f}'
    if not math.isfinite(loss):
        return Finding('first loss', 'error', found, 'use --dtype=float32, and look at forward() in model.py')
    if run.checkpoint is None and run.init_from == 'scratch':
        return judge(
            'first loss',
            found,
            (loss < 0.8 * nothing, 'error', 'new weights cannot know that much: the targets leak into the inputs'),
            (loss > 3 * nothing + 3, 'error', 'the initial weights are too large: see init_weights in model.py'),
            (loss > 2 * nothing + 1, 'warning', 'the initial weights are rather large: see init_weights in model.py'),
        )
    advice = 'the weights know nothing of this text: another tokenizer, or a format that they were not trained on'
    knows_little = run.checkpoint is None and loss > 0.95 * nothing  # a run may be resumed when it has learned little
    return judge('first loss', found, (loss > nothing + 0.5, 'error', advice), (knows_little, 'warning', advice))


class Trial(NamedTuple):
    """What a few steps at the run's own learning rate did."""

    unused: list[str]  # parameters that no gradient reaches
    broken: list[str]  # those whose gradient was NaN or infinite in the last step
    zero: list[str]  # those whose gradient was zero in all steps
    still: list[str]  # those that no step changed
    before: float  # the loss on a batch of val
    after: float
    change: float  # of the weight matrices, relative to their norm: the median


def try_steps(run: Run, batches: list[Batch]) -> Trial:
    """Make TRIAL_STEPS steps of train.py's optimizer, and restore the weights.

    A warm-up over the first half of them stands for the run's.
    """
    named = {name: p for name, p in run.raw_model.named_parameters() if p.requires_grad}
    names, parameters = list(named), list(named.values())
    copies, val = host_copy(parameters), small(run, held_out(run))
    batches = [small(run, batch) for batch in batches]
    before = loss_of(run, val)
    run.raw_model.zero_grad(set_to_none=True)
    with autocast(run.device, run.dtype):
        run.raw_model(*batches[0], with_logits=False)[1].backward()  # alone: ranks that wait for a gradient would hang
    unused = anywhere(run, names, [p.grad is None and part(p).numel() > 0 for p in parameters])
    if unused:
        run.raw_model.zero_grad(set_to_none=True)
        return Trial(unused, [], [], [], before, before, 0.0)
    rate = peak_rate(run) / run.learning_rate if run.learning_rate else 0.0
    reached = [False] * len(names)
    for step in range(TRIAL_STEPS):
        training_step(run, run.opt, batches[step % len(batches)], rate * min(1, 2 * (step + 1) / TRIAL_STEPS))
        gradients = [part(p)[:0] if p.grad is None else part(p.grad) for p in parameters]  # None: a part without rows
        reached = [before or bool(gradient.any()) for before, gradient in zip(reached, gradients)]
    # of the last step: in float16 the first ones are to overflow, until the scaler has found its scale
    broken = anywhere(run, names, [not gradient.isfinite().all() for gradient in gradients])
    after = loss_of(run, val)
    squares = [
        ((part(p).detach().cpu() - copy).square().sum().item(), copy.square().sum().item())
        for p, copy in zip(parameters, copies)
    ]
    changes, sizes = (run.ranks.sum(values) for values in zip(*squares))
    ratios = [math.sqrt(change / size) for p, change, size in zip(parameters, changes, sizes) if size and p.dim() > 1]
    somewhere = set(anywhere(run, names, reached))
    run.raw_model.zero_grad(set_to_none=True)
    restore(parameters, copies)
    zero = [name for name in names if name not in somewhere]
    still = [name for name, change in zip(names, changes) if not change]
    return Trial(unused, broken, zero, still, before, after, statistics.median(ratios) if ratios else 0.0)


def check_gradients(run: Run, trial: Trial) -> Finding:
    """Does the loss have a gradient with respect to every parameter?"""
    n = sum(p.requires_grad for p in run.raw_model.parameters())
    frozen = [name for name, p in run.raw_model.named_parameters() if not p.requires_grad]
    if lora_of(run.raw_model):
        frozen = []  # all but the adapter, on purpose
    found = f'they reach all {n} parameters'
    if trial.unused:
        found = f'no gradient reaches {listed(trial.unused)} of {n} parameters'
    elif trial.broken:
        found = f'{listed(trial.broken)} of {n} parameters had a NaN or infinite gradient'
    elif trial.zero:
        found = f'the gradient of {listed(trial.zero)} of {n} parameters was zero in {TRIAL_STEPS} steps'
    elif frozen:
        found = f'{listed(frozen)} parameters have requires_grad=False'
    use = 'let the forward pass use them, or remove them: see model.py'
    numbers = 'lower --learning_rate, raise --warmup_iters, or use --dtype=float32'
    learn = 'they keep their first values: let them learn, or leave them out'
    return judge(
        'gradients',
        found,
        (trial.unused or trial.zero and run.learning_rate, 'error', use),
        (trial.broken, 'error', numbers),
        (frozen, 'error' if run.init_from == 'scratch' else 'warning', learn),
    )


def check_optimizer_groups(run: Run, trial: Trial) -> Finding:
    """Is every trainable parameter in one group of the optimizer, and does a step change it?"""
    grouped = [p for group in run.opt.param_groups for p in group['params']]
    named = {name: p for name, p in run.raw_model.named_parameters() if p.requires_grad}
    missing = [name for name, p in named.items() if not any(p is other for other in grouped)]
    twice = len(grouped) - len({id(p) for p in grouped})
    still = trial.still if not trial.unused and run.learning_rate else []
    found = f'{type(run.opt).__name__}, each of {len(named)} parameters in one group, and changed by its steps'
    if missing or twice:
        found = f'{listed(missing)} of {len(named)} parameters are in no group, {twice} in several'
    elif still:
        found = f'{listed(still)} of {len(named)} parameters were not changed by {TRIAL_STEPS} steps'
    elif trial.unused:
        found = f'{type(run.opt).__name__}, each of {len(named)} parameters in one group'
    advice = 'see make_optimizer and decay_groups in optim.py'
    return judge('optimizer', found, (missing or twice or still, 'error', advice))


def check_learning_rate(run: Run, trial: Trial) -> Finding:
    """Do the loss and the scale of the weights survive the highest learning rate of the schedule?"""
    found = (
        f'val loss {trial.before:.3f} -> {trial.after:.3f} in {TRIAL_STEPS} steps up to {peak_rate(run):.1e}, which '
        f'change the matrices by {trial.change:.2g} of their size'
    )
    if trial.unused:
        found = 'not tried: no steps without all gradients'
    key = '--learning_rate' + ' or --muon_learning_rate' * (run.optimizer == 'muon')
    advice = f'lower {key}: a tenth is a good next try'
    limit = max(trial.before, math.log(run.n_ids))  # what a model that knows nothing loses
    return judge(
        'learning rate',
        found,
        (not (trial.after <= 1.25 * limit + 1 and trial.change <= 20), 'error', advice),
        (not (trial.after <= 1.1 * limit + 0.2 and trial.change <= 5), 'warning', advice),
    )


def check_by_heart(run: Run, batch: Batch) -> Finding:
    """Can the model learn a few tokens by heart, at a learning rate that suits most models?

    It has if they cost half of what they do by their frequencies alone, or little of what they did at first. The
    weights stay as they are then: those of a model that has learned something.
    """
    batch = cut(batch, 1, HEART_TOKENS)
    parameters = [p for p in run.raw_model.parameters() if p.requires_grad]
    copies = host_copy(parameters)
    counts = batch.y[batch.y >= 0].unique(return_counts=True)[1].cpu().numpy()
    by_frequency = sum(run.ranks.gather(entropy(counts / max(1, counts.sum())))) / run.ranks.world_size
    run.raw_model.eval()  # no dropout
    for highest in HEART_RATES:
        restore(parameters, copies)
        opt = make_optimizer(run.raw_model, run.config, run.ranks, run.dtype)
        for group in opt.param_groups:
            group['initial_lr'] = highest * (7 if 'momentum' in group else 1)  # Muon's steps are smaller
        losses, learned = [], False
        while len(losses) < HEART_STEPS and not learned:
            losses.append(training_step(run, opt, batch, min(1, (len(losses) + 1) / 5)))
            learned = losses[-1] <= max(0.5 * by_frequency, 0.3 * losses[0])
            if not math.isfinite(losses[-1]):
                break
        if learned:
            break
    run.raw_model.train()
    run.raw_model.zero_grad(set_to_none=True)
    found = f'loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps on {batch.x.numel()} tokens'
    advice = 'the model cannot learn even these: look at the loss, the gradients and the optimizer'
    return judge('by heart', found, (not learned, 'error', advice))


# --- saves ------------------------------------------------------------------------------------------------------------


def digests(run: Run) -> dict[str, str]:
    """A hash of each tensor that a save holds, as far as this rank has it: weights, and the optimizer's state."""
    tensors = {f'weight {name}': tensor for name, tensor in run.raw_model.state_dict().items()}
    for index, buffers in run.opt.state_dict()['state'].items():
        tensors |= {f'{name} of parameter {index}': value for name, value in buffers.items()}
    return {name: digest(value) for name, value in tensors.items()}


def digest(value) -> str:
    """A hash of a tensor's bytes, or of the text of any other value."""
    if not torch.is_tensor(value):
        return repr(value)
    flat = part(value).detach().cpu().contiguous().view(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy(), digest_size=16).hexdigest()


def next_loss(run: Run, batch: Batch) -> float:
    """The loss of the coming step on a small part of its first batch, with dropout as in the run."""
    seed_all(run.seed, run.iter_num)
    with no_training(run, dropout=True), autocast(run.device, run.dtype):
        return run.raw_model(*small(run, batch), with_logits=False)[1].item()


def check_save(run: Run, resume: Callable[[], Run], folder: str) -> tuple[Finding, int]:
    """Save as train.py does, resume as train.py does: the same weights, optimizer, batch and loss, to the bit?

    Frees the run -> the finding, and the bytes of the save. resume: sets the run up again, from its save in `folder`.
    """
    run.iter_num += 1
    run.save()
    run.saver.finish()
    run.log.finish()
    taken = run.batches.taken(run.iter_num)
    batches = training_batches(run.data, run.splits['train'], run.config, run.ranks, run.device, run.iter_num, taken)
    batch = Batch(*batches.next()[:3])
    before, loss, ranks, iter_num = digests(run), next_loss(run, batch), run.ranks, run.iter_num
    run.__dict__.clear()  # two models may not fit into memory
    gc.collect()

    again = resume()
    size = save_size(folder)
    after = digests(again)
    wrong = [name for name in before | after if before.get(name) != after.get(name)]
    if again.iter_num != iter_num:
        wrong.append(f'iteration {again.iter_num} in place of {iter_num}')
    if not (torch.equal(again.x, batch.x) and torch.equal(again.y, batch.y)):
        wrong.append('the next batch')
    if next_loss(again, batch) != loss:
        wrong.append('the next loss')
    again.log.finish()
    wrong = list(dict.fromkeys(name for names in ranks.gather(wrong) for name in names))
    found = f'{size / 1e6:,.1f} MB written, read and resumed: weights, optimizer, next batch and loss are the same'
    if wrong:
        found = f'resumed, the run differs in {listed(wrong)}'
    advice = 'a run that is stopped would continue as another: see save() in train.py, model_entry and restore_model'
    return judge('save', found, (wrong, 'error', advice)), size


def save_size(folder: str) -> int:
    """Bytes of the saves in a folder."""
    other = ('.lock', 'metrics.jsonl')
    paths = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names if name not in other]
    return sum(map(os.path.getsize, paths))


def check_disk(config, out_dir: str, folder: str, size: int) -> Finding:
    """Is there room for all saves of the run?

    size: bytes of one save, weights and optimizer. At most there are the kept ones, the best, and one being written.
    """
    records = config['max_iters'] / config['log_interval'] * 400  # bytes of metrics.jsonl
    needed = (config['keep_saves'] + 2) * size + records
    free = shutil.disk_usage(folder).free + size  # the check's own save will be gone
    if config['init_from'] in ('resume', 'auto') and os.path.isdir(out_dir):
        free += save_size_of_run(out_dir)
    found = f'{needed / 1e9:,.2f} GB for {config["keep_saves"] + 2} saves at most, {free / 1e9:,.2f} GB are free'
    advice = 'free some space, choose another --out_dir, or lower --keep_saves'
    return judge('disk', found, (free < needed, 'error', advice), (free < 1.1 * needed, 'warning', advice))


def save_size_of_run(out_dir: str) -> int:
    """Bytes of the saves of the run in out_dir, which a resumed run replaces."""
    paths = [os.path.join(out_dir, name) for name in files_of_run(out_dir)]
    return sum(save_size(path) if os.path.isdir(path) else os.path.getsize(path) for path in paths)


# --- the ranks --------------------------------------------------------------------------------------------------------


def check_clocks(run: Run, folder: str) -> Finding:
    """Do the clocks of all ranks and of the disk agree? By them saves are ordered."""
    offsets = []
    for _ in range(9):
        run.ranks.sum([0.0])  # all leave it at about the same time
        times = run.ranks.gather(time.time())
        offsets.append([here - times[0] for here in times])
    clocks = [statistics.median(column) for column in zip(*offsets)]
    worst = max(range(len(clocks)), key=lambda rank: abs(clocks[rank]))
    disk = 0.0
    if run.ranks.is_main:
        path = os.path.join(folder, 'clock')
        before = time.time()
        with open(path, 'w') as file:
            file.write('now')
        disk = os.stat(path).st_mtime - (before + time.time()) / 2
        os.remove(path)
    disk = run.ranks.gather(disk)[0]
    found = f"that of out_dir's disk is {disk:+.2f} s off"
    if len(clocks) > 1:
        found = f'that of rank {worst} is {clocks[worst]:+.2f} s off, {found}'
    apart = max(abs(disk), abs(clocks[worst]))
    advice = 'set the clocks by NTP: the later of two saves is told by its time'
    return judge('clocks', found, (apart > 60, 'error', advice), (apart > 2, 'warning', advice))


def check_links(run: Run) -> Finding:
    """How fast do the ranks exchange numbers and compute, and is one of them much slower than the others?"""
    ranks = run.ranks
    if ranks.world_size == 1:
        return judge('ranks', 'one process, nothing to exchange')
    numbers = torch.zeros(LINK_BYTES // 4, device=run.device)
    matrix = torch.randn(512, 512, device=run.device)

    def seconds(work) -> float:
        """The least of several times."""
        best = math.inf
        for _ in range(5):
            ranks.sum([0.0])
            start = time.perf_counter()
            work()
            synchronize(run.device)
            best = min(best, time.perf_counter() - start)
        return best

    def products():
        for _ in range(4):
            matrix @ matrix

    reduce = max(ranks.gather(seconds(lambda: dist.all_reduce(numbers))))
    sending = [max(ranks.gather(seconds(partial(dist.broadcast, numbers, src)))) for src in range(ranks.world_size)]
    computing = ranks.gather(seconds(products))
    found = f'{ranks.world_size} of them sum {LINK_BYTES / 1e6:.0f} MB at {LINK_BYTES / reduce / 1e9:.2f} GB/s'
    slow = []
    for what, times in (('sending', sending), ('computing', computing)):
        worst = max(range(len(times)), key=times.__getitem__)
        ratio = times[worst] / statistics.median_low(times)  # of two ranks, the faster one's
        found += f', slowest in {what}: rank {worst}, {ratio:.1f} times the median'
        slow += [f'rank {worst}'] * (ratio > 3)
    same = ranks.gather(digest_of_weights(run)) if run.mesh is None else [0]
    if len(set(same)) > 1:
        return Finding('ranks', 'error', f'{found}; their weights differ', 'each rank must start from the same --seed')
    advice = f'{", ".join(slow)}: look for another job, heat, or a slow network there; all ranks wait for the slowest'
    return judge('ranks', found, (slow, 'error', advice))


def digest_of_weights(run: Run) -> str:
    """One hash of all weights."""
    return hashlib.blake2b(''.join(map(digest, run.raw_model.parameters())).encode(), digest_size=16).hexdigest()
