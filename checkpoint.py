"""Saving a run so that nothing is ever lost, and loading it as data, never as code.

In out_dir:
    ckpt.pt                      the latest state: weights, shape, settings, tokenizer, progress; nanoGPT reads it
    ckpt_best.pt                 the same at the lowest validation loss
    ckpt_optimizer_00001000.pt   the optimizer's buffers that belong to ckpt.pt, which names this file
Each file is written under another name, flushed to the disk and renamed. Renaming ckpt.pt is what commits a save: before
it the previous save is whole, after it the new one is. Random state needs no saving, see runtime.seed_all.
"""

import dataclasses
import glob
import math
import os
import shutil
import warnings
from contextlib import suppress

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from configurator import UserError, one_line, user_errors
from files import lock_folder, written_whole
from model import GPT, GPTConfig
from tokenizer import check_spec

LATEST, BEST = 'ckpt.pt', 'ckpt_best.pt'
NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


# --- saving -----------------------------------------------------------------------------------------------------------


def prepare_out_dir(out_dir):
    """Make out_dir, and hold it for this run until the process ends. UserError if it cannot be written to, or another run holds it: found
    out before training, not after."""
    with user_errors(OSError, where=f'cannot write to --out_dir={out_dir}: '):
        os.makedirs(out_dir, exist_ok=True)
        if not lock_folder(out_dir):
            raise UserError(
                f'--out_dir={out_dir}: another run is writing there; wait for it, stop it, or choose another folder'
            )


def has_run(out_dir):
    """Is there a run in out_dir that can be resumed?"""
    return os.path.exists(os.path.join(out_dir, LATEST))


def write_atomically(path, content):
    """torch.save(content) to path so that, whenever the power fails, path is either the old file or the new one."""
    with written_whole(path) as file:
        torch.save(content, file)


def save_checkpoint(out_dir, state, optimizer_state, is_best):
    """Save `state`, a dict with 'iter_num', as ckpt.pt, and with is_best as ckpt_best.pt too.

    Order: optimizer file, ckpt_best.pt, ckpt.pt, then the old optimizer files go. UserError if the disk is full or the
    folder is gone; the previous save is then untouched.
    """
    name = f'ckpt_optimizer_{state["iter_num"]:08d}.pt'
    with user_errors(
        OSError, RuntimeError, where=f'cannot save to {out_dir}, the save before this one is still whole: '
    ):
        write_atomically(os.path.join(out_dir, name), optimizer_state)
        if is_best:
            write_atomically(os.path.join(out_dir, BEST), state)
        write_atomically(os.path.join(out_dir, LATEST), {**state, 'optimizer_file': name})
        for path in glob.glob(os.path.join(glob.escape(out_dir), 'ckpt_optimizer_*')):
            if os.path.basename(path) != name:
                with suppress(OSError):  # Windows does not remove what somebody reads; the next save tries again
                    os.remove(path)


def set_aside(out_dir):
    """Move an earlier run's files from out_dir to out_dir/previous-N, so that a new run can start there.

    Returns the folder, or None if there was no run. Files are linked first and removed after, so that a crash in between
    leaves the run whole in one place or the other.
    """
    names = [
        name
        for name in os.listdir(out_dir)
        if os.path.isfile(os.path.join(out_dir, name))
        and (name in (LATEST, BEST, 'metrics.jsonl') or name.startswith('ckpt_optimizer_'))
    ]
    if not names:
        return None
    n = 1
    while os.path.exists(os.path.join(out_dir, f'previous-{n}')):
        n += 1
    target = os.path.join(out_dir, f'previous-{n}')
    with user_errors(OSError, where=f'cannot move the earlier run in {out_dir} to {target}: '):
        os.mkdir(target)
        for name in names:
            try:
                os.link(os.path.join(out_dir, name), os.path.join(target, name))
            except OSError:  # a file system without hard links
                shutil.copy2(os.path.join(out_dir, name), os.path.join(target, name))
        for name in sorted(names, key=lambda name: name != LATEST):  # ckpt.pt first: what it names must outlive it
            os.remove(os.path.join(out_dir, name))
    return target


def model_args_of(config):
    """A GPTConfig as the dict that a checkpoint stores: nanoGPT's fields, and others only where they are not the default,
    so that nanoGPT opens every model that it can represent and refuses the rest."""
    defaults = GPTConfig()
    args = dataclasses.asdict(config)
    return {name: value for name, value in args.items() if name in NANOGPT_FIELDS or value != getattr(defaults, name)}


def model_entry(model):
    """The part of a checkpoint that describes the model: {'model': weights, 'model_args': shape, …}.

    OpenAI's GPT-2 computes GELU by tanh, nanoGPT runs it with erf and is hardly off. So that nanoGPT opens a fine-tuned
    GPT-2 of ours, this one choice is written beside model_args rather than into it.
    """
    model_args = model_args_of(model.config)
    entry = {'model': model.state_dict(), 'model_args': model_args}
    if model_args.get('mlp') == 'gelu_tanh':
        entry['mlp'] = model_args.pop('mlp')
    return entry


# --- loading ----------------------------------------------------------------------------------------------------------

# What a pickled numpy number, such as a best loss of numpy's, is made of: names that make numbers and nothing else
SCALAR = np.float64().__reduce__()[0]
NUMPY_NUMBERS = [
    (SCALAR, 'numpy.core.multiarray.scalar'),
    (SCALAR, 'numpy._core.multiarray.scalar'),
    np.dtype,
    *(type(np.dtype(kind)) for kind in '?bhilqBHILQefdg'),
]


def load_data(path):
    """torch.load of tensors and plain data into CPU memory. UserError if the file is missing, broken, or holds code."""
    if not os.path.exists(path):
        raise UserError(f'there is no {path}: train first, or check --out_dir')
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
            warnings.simplefilter('ignore')  # of foreign pickles; what cannot be read ends in an error all the same
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip, pickle, key, index, memory: a broken file raises almost anything
        reason = (
            'it holds code or foreign classes' if 'weights_only' in str(error).lower() else one_line(str(error), 120)
        )
        raise UserError(f'{path} cannot be read as a checkpoint: {reason}; use another copy of it') from error


def plain(value):
    """A value of a checkpoint as plain data: numbers of numpy's or torch's become Python's, dicts and lists keep their shape, and of what
    is anything else remains how it is written."""
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):
        return value.item()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(plain, value))
    return value if isinstance(value, (int, float, str, type(None))) else one_line(repr(value), 100)


def load_checkpoint(path):
    """A checkpoint of SAMgpt's or nanoGPT's -> dict, its weights under plain names. UserError if it is anything else."""
    checkpoint = load_data(path)
    wanted = {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}
    if isinstance(checkpoint, dict):
        checkpoint.update(
            {key: plain(value) for key, value in checkpoint.items() if key not in ('model', 'optimizer', 'tokenizer')}
        )
    for key, kind in wanted.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise UserError(f'{path} is not a checkpoint of SAMgpt or nanoGPT: it has no {key!r}')
    with user_errors(ValueError, TypeError, where=f'{path} is not a sound checkpoint: '):
        checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', 'inf'))
        if math.isnan(checkpoint['best_val_loss']):
            raise ValueError('its best_val_loss is not a number')
        checkpoint['seconds'] = float(checkpoint.get('seconds', 0.0))  # of training so far
        if not 0 <= checkpoint['seconds'] < math.inf:
            raise ValueError('its seconds are no time')
        checkpoint.setdefault('best_iter', checkpoint['iter_num'])
        checkpoint.setdefault('evaluated_at', -1)  # the step at which it was last evaluated; -1: not known
        checkpoint.setdefault('windows_taken', None)  # see dataloader.TrainBatches; None: not known
        if type(checkpoint['best_iter']) is not int or not 0 <= checkpoint['best_iter'] <= checkpoint['iter_num']:
            raise ValueError('its iter_num or best_iter counts no updates')
        if type(checkpoint['evaluated_at']) is not int:
            raise ValueError('its evaluated_at counts no updates')
        if checkpoint['windows_taken'] is not None and not (
            type(checkpoint['windows_taken']) is int and 0 <= checkpoint['windows_taken']
        ):
            raise ValueError('its windows_taken counts no windows')
        if not all(isinstance(name, str) for name in checkpoint['model']):
            raise ValueError('its weights have no names')
        if checkpoint.get('tokenizer') is not None:
            check_spec(checkpoint['tokenizer'])
    weights = {
        name.replace('_orig_mod.', '').removeprefix('module.'): weight for name, weight in checkpoint['model'].items()
    }
    # nanoGPT's attention without flash keeps its causal mask as a buffer; here it needs none
    checkpoint['model'] = {
        name: weight for name, weight in weights.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))
    }
    if 'mlp' in checkpoint:
        checkpoint['model_args']['mlp'] = checkpoint['mlp']
    return checkpoint


def restore_model(checkpoint, path, dropout=None):
    """The model of a loaded checkpoint, on the CPU in float32. dropout replaces the one it was trained with.

    UserError if model_args describes no model or another one than the weights. Nothing large is allocated before that is
    known, so that a forged shape cannot exhaust the memory.
    """
    args, weights = dict(checkpoint['model_args']), checkpoint['model']
    if dropout is not None:
        args['dropout'] = dropout
    layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    with user_errors(ValueError, TypeError, RuntimeError, where=f'{path}: the weights do not fit the model_args: '):
        if args.get('n_layer') != len(layers):
            raise ValueError(f'n_layer={args.get("n_layer")!r}, but there are weights of {len(layers)} layers')
        if not all(torch.is_tensor(weight) and weight.is_floating_point() for weight in weights.values()):
            raise ValueError('some of them are not tensors of numbers')
        if any(weight.untyped_storage().nbytes() < weight.nbytes for weight in weights.values()):
            raise ValueError('some of them claim to be larger than they are')
        embedding, head = 'transformer.wte.weight', 'lm_head.weight'
        if args.get('tie_weights', True):  # a file may hold the one matrix once or twice
            if (head in weights) != (embedding in weights):
                weights = {
                    **weights,
                    head: weights.get(head, weights.get(embedding)),
                    embedding: weights.get(embedding, weights.get(head)),
                }
            elif head in weights and not torch.equal(weights[head].nan_to_num(), weights[embedding].nan_to_num()):
                raise ValueError(
                    'the head differs from the embedding, so they are not the one matrix that tie_weights=True makes them'
                )
        model = skeleton(GPTConfig(**args))
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f'{path}: some of its weights are not finite numbers; use another checkpoint')
    return model


class NoInit(TorchFunctionMode):
    """Where torch.nn.init would fill a tensor, leaves it: on the meta device that costs an import of the compiler, 1.5 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return function(*args, **kwargs)


def skeleton(config):
    """A GPT whose parameters have shapes but no memory, to be given weights by load_state_dict(..., assign=True)."""
    with torch.device('meta'), NoInit():
        return GPT(config)


def load_optimizer_buffers(checkpoint, out_dir):
    """{'optimizer': state_dict, 'scaler': state_dict or None} that belongs to a checkpoint in out_dir. nanoGPT keeps the
    optimizer in ckpt.pt itself. UserError if it is missing or broken."""
    if 'optimizer' in checkpoint:
        saved = {'optimizer': checkpoint['optimizer']}
    else:
        name = checkpoint.get('optimizer_file')
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise UserError(
                f'{out_dir}/{LATEST} names no optimizer file, so it cannot be resumed: it is a {BEST}, or no {LATEST} of ours'
            )
        saved = load_data(os.path.join(out_dir, name))
    optimizer = saved.get('optimizer') if isinstance(saved, dict) else None
    if not isinstance(optimizer, dict) or not {'state', 'param_groups'} <= optimizer.keys():
        raise UserError(f'the optimizer state that {out_dir}/{LATEST} names is not one')
    return saved
