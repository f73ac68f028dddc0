"""Saving a run so that nothing is ever lost, and loading it as data, never as code.

In out_dir:
    ckpt.pt                      the latest state: weights, shape, settings, tokenizer, progress; nanoGPT reads it
    ckpt_best.pt                 the same at the lowest validation loss
    ckpt_optimizer_00001000.pt   the optimizer's buffers that belong to ckpt.pt, which names this file
Each file is written under another name, flushed to the disk and renamed. Renaming ckpt.pt is what commits a save: before
it the previous save is whole, after it the new one is. Random state needs no saving, see runtime.seed_all.
"""

import glob
import os
import shutil
import warnings
from contextlib import suppress

import numpy as np
import torch

from common.errors import UserError, one_line, user_errors
from common.files import lock_folder, written_whole

LATEST, BEST = 'ckpt.pt', 'ckpt_best.pt'


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
