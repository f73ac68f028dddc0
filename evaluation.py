"""How good a model is: its mean loss on a data set, and bits per byte, by which tokenizers can be compared."""

import math
from dataclasses import dataclass

import torch

from common.device import autocast, uncompiled
from common.errors import UserError, say
from configurator import require
from tokenizer import gpt2_is_cached, load_tokenizer


@dataclass
class Evaluation:
    """Sums over the tokens that were predicted, all ranks together."""

    nats: float  # their cross-entropy
    tokens: int
    bytes: int  # of their text; 0 if not known

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def evaluate(model, batches, ranks, device, dtype, token_bytes=None, interrupted=lambda: False) -> Evaluation:
    """The loss of a model in eval mode over batches; its mode is restored. A collective: every rank calls it.

    batches: this rank's share, see dataloader.eval_batches.
    token_bytes: from bytes_per_token, or None.
    interrupted: called after each batch; True, on all ranks, stops early.
    The model is never compiled for this: compiling would take longer than most runs spend in evaluation.
    """
    # what inference_mode makes can never be trained on, and a sharded model keeps what it gathered
    with torch.no_grad() if hasattr(model, 'unshard') else torch.inference_mode():
        return mean_loss(model, batches, ranks, device, dtype, token_bytes, interrupted)


def mean_loss(model, batches, ranks, device, dtype, token_bytes, interrupted) -> Evaluation:
    """evaluate(), where no gradients are recorded."""
    was_training = model.training
    model.eval()
    known = token_bytes is not None
    lengths = torch.as_tensor(token_bytes if known else [0], device=device)
    complete = False
    losses, counts, sizes = [], [], []  # on the device until the end, so that the host does not wait for each batch
    for x, y, starts in batches:
        with autocast(device, dtype), uncompiled():
            losses.append(model(x, y, starts, with_logits=False)[1])
        predicted = y >= 0
        counts.append(predicted.sum())
        sizes.append((lengths[y * predicted] * predicted).sum() if known else predicted.sum() * 0)
        if interrupted():
            break
    else:
        complete = True
    model.train(was_training)
    nats = sum(loss.item() * count.item() for loss, count in zip(losses, counts))
    tokens, n_bytes = (float(sum(number.item() for number in numbers)) for numbers in (counts, sizes))
    nats, tokens, n_bytes, knowing = ranks.sum([nats, tokens, n_bytes, float(known)])
    if complete and not tokens:
        raise UserError('the sequences of this evaluation have no targets, all of it is masked: raise --eval_iters')
    return Evaluation(nats, int(tokens), int(n_bytes) if knowing == ranks.world_size else 0)


def bytes_per_token(spec: dict | None, download: bool = True):
    """The length in bytes of each token of a tokenizer, by its spec -> int array (vocab_size,). None if the tokens are
    not pieces of text, or, with a line that says so, if the tokenizer cannot be loaded. download=False: GPT-2's only
    from tiktoken's cache, as a download can hang behind a firewall."""
    try:
        if not download and spec and spec['kind'] == 'gpt2' and not gpt2_is_cached():
            raise UserError("GPT-2's vocabulary has not been downloaded; evaluate.py does it")
        return load_tokenizer(spec).token_bytes() if spec else None
    except UserError as error:
        say(f'no bits per byte: {error}')


def training_benchmarks(config, model, spec, ranks, device, dtype):
    """What train.py calls at an evaluation: f(iter_num, interrupted) -> entries for the record, such as
    {'lambada_openai/acc': 0.33}; {} where no benchmarks are due.

    config: train.py's settings. spec: the tokenizer's. The rest as in benchmarks.Benchmarks; interrupted as in
    evaluate(). UserError if a task is unknown or cannot be loaded, or the package lm_eval is missing.
    """
    require(config, 'eval_tasks_every', 'at least 1', lambda v: v >= 1)
    require(config, 'eval_tasks_limit', '0 or more', lambda v: v >= 0)
    tasks, path, limit = config['eval_tasks'], config['eval_tasks_path'], config['eval_tasks_limit']
    if not tasks and config.given & {'eval_tasks_path', 'eval_tasks_limit', 'eval_tasks_every'}:
        raise UserError('--eval_tasks=: which? the other settings of benchmarks need it')
    if not tasks:
        return lambda iter_num, interrupted: {}
    from benchmarks import Benchmarks

    suite = Benchmarks(tasks, model, spec, ranks, device, dtype, path, limit, key='eval_tasks')
    every = config['eval_interval'] * config['eval_tasks_every']

    def benchmark(iter_num, interrupted):
        due = iter_num % every == 0 or iter_num >= config['max_iters'] or config['eval_only']
        return suite.record(interrupted) if due else {}

    return benchmark
