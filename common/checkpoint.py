"""Saving the state of a run so that a crash loses nothing, and loading it as data, never as code.

In out_dir:
    ckpt.pt                      the latest state, a dict of the caller's
    ckpt_best.pt                 the state at the lowest validation loss
    ckpt_optimizer_00001000.pt   the optimizer's state that belongs to ckpt.pt, which holds the name of this file
Each file is written under another name, flushed to the disk and renamed. Renaming ckpt.pt commits a save: until then
the previous save is complete, afterwards the new one. Random state is not saved: common.device.seed_all makes it again.
"""

import errno
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


def prepare_out_dir(out_dir: str):
    """Create out_dir and lock it until the process ends, before training rather than after.

    UserError if it cannot be written to, or another run has locked it.
    """
    with user_errors(OSError, where=f'cannot write to --out_dir={out_dir}: '):
        os.makedirs(out_dir, exist_ok=True)
        if not lock_folder(out_dir):
            reason = 'another run is writing there; wait for it, stop it, or choose another folder'
            raise UserError(f'--out_dir={out_dir}: {reason}')


def has_run(out_dir: str) -> bool:
    """Does out_dir hold a run that can be resumed?"""
    return os.path.exists(os.path.join(out_dir, LATEST))


def save_checkpoint(out_dir: str, state: dict, optimizer_state: dict, is_best: bool):
    """Save `state`, a dict with 'iter_num', as ckpt.pt and, with is_best, as ckpt_best.pt too.

    Order: the optimizer's file, ckpt_best.pt, ckpt.pt; then the old optimizer files are removed. UserError if the disk
    is full or the folder is gone; the previous save is still complete then.
    """
    optimizer_file = f'ckpt_optimizer_{state["iter_num"]:08d}.pt'
    contents = {optimizer_file: optimizer_state}
    if is_best:
        contents[BEST] = state
    contents[LATEST] = {**state, 'optimizer_file': optimizer_file}
    previous = 'the previous save is still complete' if has_run(out_dir) else 'there is no earlier save'
    with user_errors(OSError, RuntimeError, where=f'cannot save to {out_dir}, {previous}: '):
        for name, content in contents.items():
            with written_whole(os.path.join(out_dir, name)) as file:
                save(content, file)
        for path in glob.glob(os.path.join(glob.escape(out_dir), 'ckpt_optimizer_*')):
            if os.path.basename(path) != optimizer_file:
                with suppress(OSError):  # Windows cannot remove a file that is being read; the next save tries again
                    os.remove(path)


def save(content, file):
    """torch.save to an open file. Where a write fails for lack of space, torch raises an error that does not say so."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if 'unexpected pos' in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def set_aside(out_dir: str) -> str | None:
    """Move an earlier run's files from out_dir to out_dir/previous-N, so that a new run can start there.

    Returns the folder, or None if there was no run. Files are linked first and removed after, so that a crash in
    between leaves the run complete in one of the two places.
    """
    names = [name for name in os.listdir(out_dir) if os.path.isfile(os.path.join(out_dir, name))]
    names = [name for name in names if name in (LATEST, BEST, 'metrics.jsonl') or name.startswith('ckpt_optimizer_')]
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
        for name in sorted(names, key=lambda name: name != LATEST):  # ckpt.pt first: it needs its optimizer file
            os.remove(os.path.join(out_dir, name))
    with suppress(OSError):  # none there; or it is being read, on Windows: the new run then hides the earlier curves
        os.rename(os.path.join(out_dir, 'tensorboard'), os.path.join(target, 'tensorboard'))
    return target


# --- loading ----------------------------------------------------------------------------------------------------------

# The classes and functions in the pickle of a numpy number. Loading may call these: they make numbers and nothing else.
SCALAR = np.float64().__reduce__()[0]
NUMPY_NUMBERS = [
    (SCALAR, 'numpy.core.multiarray.scalar'),
    (SCALAR, 'numpy._core.multiarray.scalar'),
    np.dtype,
    *(type(np.dtype(kind)) for kind in '?bhilqBHILQefdg'),
]


def load_data(path: str):
    """torch.load of tensors and plain data into CPU memory. UserError if the file is missing, broken, or holds code."""
    if not os.path.exists(path):
        raise UserError(f'there is no {path}: train first, or check --out_dir')
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
            warnings.simplefilter('ignore')  # about old pickle formats: these load, or end in the error below
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip, pickle, key, index, memory: a broken file raises almost anything
        forbidden = 'weights_only' in str(error).lower()
        reason = 'it holds code or foreign classes' if forbidden else one_line(f'{type(error).__name__}: {error}', 120)
        hint = f', such as {BEST} beside it' if os.path.basename(path) == LATEST else ''
        raise UserError(f'{path} cannot be read as a checkpoint: {reason}; use another copy{hint}') from error


def plain(value):
    """A value from a checkpoint as plain Python data.

    Numbers of numpy and torch become Python's; dicts, lists and tuples stay and are converted inside; any other object
    becomes its repr.
    """
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):
        return value.item()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(plain, value))
    return value if isinstance(value, (int, float, str, type(None))) else one_line(repr(value), 100)


def load_optimizer_buffers(checkpoint: dict, out_dir: str) -> dict:
    """Load the optimizer's part of a checkpoint in out_dir -> {'optimizer': state_dict, 'scaler': state_dict or None}.

    It is in the checkpoint itself if nanoGPT wrote it, else in a file of its own. UserError if it is missing or broken.
    """
    if 'optimizer' in checkpoint:
        saved = {'optimizer': checkpoint['optimizer']}
    else:
        name = checkpoint.get('optimizer_file')
        if not isinstance(name, str) or os.path.basename(name) != name:
            reason = f'a copy of {BEST} cannot be resumed, nor can the file of another program'
            raise UserError(f'{out_dir}/{LATEST} names no optimizer file: {reason}')
        if not os.path.exists(os.path.join(out_dir, name)):
            hint = f'--init_from={out_dir} with another --out_dir starts a new run from its weights'
            raise UserError(f'{out_dir}/{name}, the state of the optimizer, is missing: {hint}')
        saved = load_data(os.path.join(out_dir, name))
    optimizer = saved.get('optimizer') if isinstance(saved, dict) else None
    if not isinstance(optimizer, dict) or not {'state', 'param_groups'} <= optimizer.keys():
        raise UserError(f'the optimizer state of {out_dir}/{LATEST} is broken; use another copy of the run')
    return saved
