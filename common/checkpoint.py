"""The saved states of a run in its out_dir: where they are, and loading them as data, never as code.

In out_dir, from one device or under ddp:
    ckpt.pt                      the latest state, a dict of the caller's
    ckpt_best.pt                 the state at the lowest validation loss
    ckpt_optimizer_00001000.pt   the optimizer's state that belongs to ckpt.pt, which holds the name of this file
    ckpt_00001000.pt             with --keep_saves=2 or more: an earlier state, whose optimizer file stays too
under fsdp or hsdp:
    ckpt.json                    {'folder': 'ckpt_00001000', 'iter_num': 1000, 'files': {name: bytes}}, the latest state
    ckpt_best.json               the same of the best state; its folder stays
    ckpt_00001000/               state.pt, which is ckpt.pt without its tensors; those, in parts, see common/parts.py;
                                 and a copy of its ckpt.json, so that the folder is a checkpoint by itself
common/saving.py writes them. Renaming ckpt.pt or ckpt.json commits a save: until then the previous save is complete,
afterwards the new one. Random state is not saved: common.device.seed_all makes it again.
"""

import json
import os
import re
import shutil
import warnings
from contextlib import suppress

import numpy as np
import torch

from common.errors import UserError, one_line, user_errors
from common.files import lock_folder
from common.sharded import CONTENTS

LATEST, BEST = 'ckpt.pt', 'ckpt_best.pt'
LATEST_PARTS, BEST_PARTS = 'ckpt.json', 'ckpt_best.json'
SINGLE = (LATEST, LATEST_PARTS, BEST, BEST_PARTS, 'metrics.jsonl')  # files of which a run has one each
STATE = 'state.pt'  # in a folder of parts
KEPT = re.compile(r'ckpt_\d{8,}(-\d+)?(\.pt)?(\.part)?')  # names of folders and of kept files


# --- the folder of a run ----------------------------------------------------------------------------------------------


def prepare_out_dir(out_dir: str):
    """Create out_dir and lock it until the process ends, before training rather than after.

    UserError if it cannot be written to, or another run has locked it.
    """
    with user_errors(OSError, where=f'cannot write to --out_dir={out_dir}: '):
        os.makedirs(out_dir, exist_ok=True)
        if not lock_folder(out_dir):
            reason = 'another run is writing there; wait for it, stop it, or choose another folder'
            raise UserError(f'--out_dir={out_dir}: {reason}')


def latest(out_dir: str, name: str = LATEST) -> str | None:
    """The path of a save in out_dir, to be given to load_data; None if there is none.

    name: ckpt.pt, the latest; ckpt_best.pt; or a kept one such as ckpt_00001000. Each may be in either form. A crash
    between committing one form and removing the other leaves both: the later one counts.
    """
    stem = os.path.join(out_dir, name.removesuffix('.pt').removesuffix('.json'))
    paths = [f'{stem}.pt', f'{stem}.json', os.path.join(stem, LATEST_PARTS), os.path.join(out_dir, name)]
    paths = [path for path in paths if os.path.isfile(path)]
    return max(paths, key=lambda path: os.stat(path).st_mtime_ns, default=None)


def has_run(out_dir: str) -> bool:
    """Does out_dir hold a run that can be resumed?"""
    return latest(out_dir) is not None


def files_of_run(out_dir: str) -> list[str]:
    """Names of the files and folders in out_dir that belong to its run."""
    return [
        name
        for name in os.listdir(out_dir)
        if KEPT.fullmatch(name)
        or (name in SINGLE or name.startswith('ckpt_optimizer_'))
        and os.path.isfile(os.path.join(out_dir, name))
    ]


def link_files(folder: str, names: list[str], target: str):
    """Give files and folders of `folder` a second place, in the folder `target`, see link."""
    for name in names:
        source, copy = os.path.join(folder, name), os.path.join(target, name)
        if os.path.isdir(source):
            shutil.copytree(source, copy, copy_function=link)
        else:
            link(source, copy)


def set_aside(out_dir: str) -> str | None:
    """Move an earlier run's files from out_dir to out_dir/previous-N, so that a new run can start there.

    Returns the folder, or None if there was no run. Files are linked first and removed after, so that a crash in
    between leaves the run complete in one of the two places.
    """
    names = files_of_run(out_dir)
    if not names:
        return None
    n = 1
    while os.path.exists(os.path.join(out_dir, f'previous-{n}')):
        n += 1
    target = os.path.join(out_dir, f'previous-{n}')
    with user_errors(OSError, where=f'cannot move the earlier run in {out_dir} to {target}: '):
        os.mkdir(target)
        link_files(out_dir, names, target)
        for name in sorted(names, key=lambda name: name not in SINGLE):  # ckpt.pt first: it needs its optimizer file
            remove(os.path.join(out_dir, name))
    with suppress(OSError):  # none there; or it is being read, on Windows: the new run then hides the earlier curves
        os.rename(os.path.join(out_dir, 'tensorboard'), os.path.join(target, 'tensorboard'))
    return target


def link(source: str, target: str):
    """Give a file a second name; a copy on file systems without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # with its time, by which saves are ordered


def remove(path: str):
    """Remove a file, or a folder of parts: its ckpt.json first, so that what a crash leaves does not look whole."""
    if os.path.isdir(path):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(path, LATEST_PARTS))
        shutil.rmtree(path)
    else:
        os.remove(path)


# --- loading ----------------------------------------------------------------------------------------------------------

# The classes and functions in the pickle of a numpy number. Loading may call these: they make numbers and nothing else.
SCALAR = np.float64().__reduce__()[0]
NUMPY_NUMBERS = [
    (SCALAR, 'numpy.core.multiarray.scalar'),
    (SCALAR, 'numpy._core.multiarray.scalar'),
    np.dtype,
    *(type(np.dtype(kind)) for kind in '?bhilqBHILQefdg'),
]


def load_data(path: str, mmap: bool = False):
    """torch.load of tensors and plain data into CPU memory. UserError if the file is missing, broken, or holds code.

    Of a save in parts, a .json file, 'model' holds tensors without memory, on the meta device, and 'parts' is the Parts
    to read them from, under 'model.' and their names: into whole tensors, see read_whole, or sharded ones.
    mmap: read tensors from the file only when they are used.
    """
    if path.endswith('.json'):
        return load_parts(path)
    if not os.path.exists(path):
        raise UserError(f'there is no {path}: train first, or check --out_dir')
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
            warnings.simplefilter('ignore')  # about old pickle formats: these load, or end in the error below
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
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


def load_parts(path: str) -> dict:
    """load_data of a save in parts by its ckpt.json."""
    from common.parts import Parts

    folder, record = read_record(path)
    for name, size in record['files'].items():
        part = os.path.join(folder, name)
        found = os.path.getsize(part) if os.path.isfile(part) else None
        if found != size:
            reason = 'is missing' if found is None else f'has {found} bytes in place of {size}, so it was cut short'
            raise UserError(f'{path}: {part} {reason}; use another save, such as {BEST_PARTS} or a kept one')
    checkpoint = load_data(os.path.join(folder, STATE))
    with user_errors(TypeError, ValueError, KeyError, AttributeError, where=f'{folder}/{STATE} is not sound: '):
        stored = {f'model.{name}': f'model.{other}' for name, other in checkpoint['model'].items()}
        parts = Parts(folder, record['files'], stored)
        shapes = parts.shapes()
        model = {name.removeprefix('model.'): shapes[name] for name in stored}
        return {**checkpoint, 'model': model, 'parts': parts}


def read_record(path: str) -> tuple[str, dict]:
    """A ckpt.json, of a run or inside a folder of parts -> (that folder, {'folder', 'iter_num', 'files'}).

    UserError if it is missing or not sound.
    """
    kinds = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError)
    with user_errors(*kinds, where=f'{path} cannot be read as a checkpoint: '):
        with open(path, encoding='utf-8') as file:
            record = json.load(file)
        if not isinstance(record, dict) or not {'folder', 'iter_num', 'files'} <= record.keys():
            raise ValueError('it is not what a save writes; the ckpt.json in a ckpt_… folder beside it may replace it')
        folder, files = record['folder'], record['files']
        names = [folder, *files]
        if not all(isinstance(name, str) and re.fullmatch(r'[\w.-]+', name) and name.strip('.') for name in names):
            raise ValueError('it names a file outside its folder')
        if not all(type(number) is int and number >= 0 for number in (record['iter_num'], *files.values())):
            raise ValueError('its sizes of files, or its iter_num, are not numbers')
        if not {STATE, CONTENTS} <= files.keys():
            raise ValueError(f'it names no {STATE} or no {CONTENTS}')
        here = os.path.dirname(path)
        return (here if os.path.exists(os.path.join(here, CONTENTS)) else os.path.join(here, folder)), record


def read_whole(checkpoint: dict) -> dict:
    """Replace the tensors without memory in 'model', of a save in parts, by whole ones on the CPU -> the checkpoint."""
    if 'parts' in checkpoint:
        parts, whole = checkpoint['parts'], {}
        for name in checkpoint['model']:
            stored = parts.same[f'model.{name}']  # one of tied weights
            if stored not in whole:
                whole[stored] = torch.empty_like(checkpoint['model'][name], device='cpu')
        parts.read(whole, alone=True)
        checkpoint['model'] = {name: whole[parts.same[f'model.{name}']] for name in checkpoint['model']}
    return checkpoint


def load_optimizer_buffers(checkpoint: dict, out_dir: str, optimizer=None, mmap: bool = False) -> dict:
    """Load the optimizer's part of a checkpoint in out_dir -> {'optimizer': state_dict, 'scaler': state_dict or None}.

    It is in the checkpoint itself if nanoGPT wrote it, in its parts, or in a file of its own.
    optimizer: the torch optimizer that will get it. Buffers in parts that have the shape of their parameter are then
    read in its form: if it is sharded, only what this rank needs. Reading parts is a collective, if there are ranks.
    mmap: as in load_data. UserError if it is missing or broken.
    """
    if 'parts' in checkpoint:
        saved = {'optimizer': read_buffers(checkpoint, optimizer), 'scaler': checkpoint.get('scaler')}
    elif 'optimizer' in checkpoint:
        saved = {'optimizer': checkpoint['optimizer']}
    else:
        name = checkpoint.get('optimizer_file')
        if not isinstance(name, str) or os.path.basename(name) != name:
            reason = f'a copy of {BEST} cannot be resumed, nor can the file of another program'
            raise UserError(f'{out_dir}/{LATEST} names no optimizer file: {reason}')
        if not os.path.exists(os.path.join(out_dir, name)):
            hint = f'--init_from={out_dir} with another --out_dir starts a new run from its weights'
            raise UserError(f'{out_dir}/{name}, the state of the optimizer, is missing: {hint}')
        saved = load_data(os.path.join(out_dir, name), mmap)
    optimizer = saved.get('optimizer') if isinstance(saved, dict) else None
    if not isinstance(optimizer, dict) or not {'state', 'param_groups'} <= optimizer.keys():
        raise UserError(f'the optimizer state of {out_dir}/{LATEST} is broken; use another copy of the run')
    return saved


def read_buffers(checkpoint: dict, optimizer=None) -> dict:
    """The state_dict of the optimizer in a save in parts, see load_optimizer_buffers. UserError if it is broken."""
    where = f'the optimizer state in {checkpoint["parts"].folder} is broken: '
    with user_errors(TypeError, ValueError, LookupError, AttributeError, where=where):
        saved = checkpoint['optimizer']
        state = {index: dict(buffers) for index, buffers in saved['state'].items()}
        parameters = [p for group in optimizer.param_groups for p in group['params']] if optimizer else []
        numbered = dict(zip((i for group in saved['param_groups'] for i in group['params']), parameters))
        targets = {}
        for name, shape in checkpoint['parts'].shapes().items():
            kind, *place = name.split('.', 2)
            if kind == 'optimizer':
                index, buffer = int(place[0]), place[1]
                like = numbered.get(index)
                if like is not None and like.shape == shape.shape:
                    targets[name] = torch.zeros_like(like, dtype=shape.dtype, requires_grad=False)
                else:
                    targets[name] = torch.zeros(shape.shape, dtype=shape.dtype)
                state.setdefault(index, {})[buffer] = targets[name]
        checkpoint['parts'].read(targets)
        return {'state': state, 'param_groups': saved['param_groups']}
