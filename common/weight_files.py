"""Tensors in the weight files of Hugging Face's format, by name: read without holding a file in memory, and written.

Formats: .safetensors (https://github.com/huggingface/safetensors, section "Format"), .bin (torch.save of a dict of
tensors), and for several files, the shards, an index: {'weight_map': {name of a tensor: file}}.
Files are untrusted: nothing that they say is used before it is checked, and no code in them runs.
"""

import json
import math
import os
import re
import zipfile

import torch

from common.checkpoint import load_data
from common.errors import UserError, one_line, user_errors
from common.files import written_whole

SAFETENSORS, PICKLED = 'model.safetensors', 'pytorch_model.bin'
INDEX = '.index.json'  # after the name of the single file, which the shards replace
DTYPES = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}  # names in a .safetensors
MAX_JSON = 2**24  # bytes; the index of a model of 600B parameters has half of that
MAPPED = 2**25  # bytes to read from a mapped file before it is mapped anew: what was read counts as memory until then
SHARD = 5 * 10**9  # bytes


def read_json(path: str, most: int = MAX_JSON) -> dict:
    """Read a JSON file that holds an object. UserError if it is missing, larger than `most` bytes or anything else."""
    kinds = (OSError, ValueError, RecursionError)
    with user_errors(*kinds, where=f'cannot read {path}: '), open(path, 'rb') as file:
        text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f'it has more than {most} bytes')
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError('it holds no JSON object')
        return content


# --- reading ----------------------------------------------------------------------------------------------------------


class WeightFiles:
    """The tensors of a folder: model.safetensors, else its shards, else pytorch_model.bin, else its shards."""

    def __init__(self, folder: str):
        """UserError if there are none, or a file is missing, damaged, or holds code."""
        self.path_of, self.shapes = {}, {}  # by name of a tensor
        self.path, self.tensors, self.n_read = None, {}, 0  # the file that is mapped now, and bytes read from it
        for path in weight_paths(folder):
            for name, tensor in mapped_tensors(path).items():
                if name in self.path_of:
                    raise UserError(f'{path}: the tensor {shown(name)} is in {self.path_of[name]} too')
                self.path_of[name], self.shapes[name] = path, tensor.shape

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the file's own dtype; part of the file, so copy it and let go. UserError unless it holds
        floating-point numbers."""
        path = self.path_of[name]
        if path != self.path or self.n_read > MAPPED and can_be_mapped(path):
            self.tensors = {}  # first, or both are in memory
            self.path, self.tensors, self.n_read = path, mapped_tensors(path), 0
        tensor = self.tensors[name]
        self.n_read += tensor.nbytes
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # 8 bits are of use only with scales
            raise UserError(f'{path}: the tensor {shown(name)} is of {tensor.dtype}, must be 16, 32 or 64-bit floats')
        return tensor


def shown(name: str) -> str:
    """The name of a tensor, for a message."""
    return one_line(name, 100)


def weight_paths(folder: str) -> list[str]:
    """Paths of the weight files in a folder, see WeightFiles. UserError if there are none, or one is missing."""
    for name in (SAFETENSORS, PICKLED):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return [path]
        if os.path.isfile(path + INDEX):
            return indexed_paths(folder, path + INDEX)
    raise UserError(f'{folder} has no {SAFETENSORS}, nor {PICKLED}, nor an index of several such files')


def indexed_paths(folder, index):
    """Paths of the files that an index names. UserError if one is missing, or outside the folder."""
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: it has no 'weight_map' with files by names of tensors")
    paths = []
    for name in dict.fromkeys(map(str, names.values())):
        if not re.fullmatch(r'[\w.-]+\.(safetensors|bin)', name):
            raise UserError(f'{index} names {shown(repr(name))}: not the plain name of a weight file in this folder')
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f'{index} names {shown(name)}, which is missing: copy it, or download the model again')
        paths.append(os.path.join(folder, name))
    return paths


def can_be_mapped(path):
    """Are tensors read from this file only when they are used? Not from what torch wrote before version 1.6."""
    return path.endswith('.safetensors') or zipfile.is_zipfile(path)


def mapped_tensors(path) -> dict[str, torch.Tensor]:
    """All tensors of a file, not read from the disk yet. UserError if it is damaged or holds code."""
    if path.endswith('.safetensors'):
        return mapped_safetensors(path)
    if zipfile.is_zipfile(path):
        with user_errors(zipfile.BadZipFile, OSError, where=f'cannot read {path}: '), zipfile.ZipFile(path) as file:
            if any(record.compress_type for record in file.infolist()):  # a little could become a lot of memory
                raise UserError(f'cannot read {path}: torch.save compresses nothing, but it is compressed')
    tensors = load_data(path, mmap=can_be_mapped(path))
    if not isinstance(tensors, dict) or not all(is_whole(name, tensor) for name, tensor in tensors.items()):
        raise UserError(f'{path} is not a dict of whole tensors by name')
    return tensors


def is_whole(name, tensor):
    """Is this a tensor's name and an ordinary tensor, no larger than what the file has of it?"""
    ordinary = isinstance(name, str) and torch.is_tensor(tensor) and tensor.layout == torch.strided
    return ordinary and not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.nbytes


def mapped_safetensors(path):
    """mapped_tensors of a .safetensors. The library checks that its header has at most 100 MB, and that the tensors
    fill the rest of the file one after the other."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f'reading {path} needs the package safetensors: pip install safetensors') from error
    try:
        with safe_open(path, framework='pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # the library's own, OSError, KeyError of a dtype, RuntimeError of torch
        raise UserError(
            f'{path} cannot be read, it is damaged or cut short: {one_line(str(error), 120)}; use another copy'
        ) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def write_weight_files(folder: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype, shard: int = SHARD):
    """Write tensors in a dtype of DTYPES to a folder as model.safetensors, or if they have more than `shard` bytes, as
    several files of at most so many and an index. One tensor at a time is converted, so they may be views.

    UserError if a number becomes infinite in that dtype, or there are weight files that these do not replace. OSError
    as open and write do.
    """
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        n = tensor.numel() * dtype.itemsize
        if shards[-1] and size + n > shard:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += n
    names = [SAFETENSORS]
    if len(shards) > 1:
        names = [f'model-{number:05}-of-{len(shards):05}.safetensors' for number in range(1, len(shards) + 1)]
    replaced = names if len(shards) == 1 else [*names, SAFETENSORS + INDEX]
    for name in os.listdir(folder):
        known = re.fullmatch(r'(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?', name)
        if known and name not in replaced:
            raise UserError(f'{os.path.join(folder, name)} is of another model: remove it, or choose another folder')
    for name, tensors_in_it in zip(names, shards):
        write_safetensors(os.path.join(folder, name), tensors_in_it, dtype)
    if len(shards) > 1:
        index = {
            'metadata': {'total_size': sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize},
            'weight_map': {name: file for file, tensors_in_it in zip(names, shards) for name in tensors_in_it},
        }
        with written_whole(os.path.join(folder, SAFETENSORS + INDEX), 'w') as file:
            json.dump(index, file, indent=2)


def write_safetensors(path: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype):
    """Write one .safetensors: the length of the header in 8 bytes, the header, the tensors. See write_weight_files."""
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {'dtype': DTYPES[dtype], 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # tensors start at a multiple of 8
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name, tensor in tensors.items():
            tensor = tensor.detach().to('cpu', dtype).contiguous().flatten()
            if not all_finite(tensor):
                raise UserError(f'{path}: {name} has NaN or infinite numbers in {dtype}; choose another dtype')
            file.write(tensor.view(torch.uint8).numpy().data)


def all_finite(tensor) -> bool:
    """Are all numbers neither NaN nor infinite? Takes no memory, as tensor.isfinite() does."""
    return all(map(math.isfinite, map(float, tensor.detach().aminmax())))
