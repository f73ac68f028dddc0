"""Tensors in a folder of parts, by torch.distributed.checkpoint: each rank writes its own, and reads what it needs.

Folders are untrusted: their table of contents, .metadata, is a pickle, read here without running code, and nothing that
it says is used before it is checked. Importing this module takes a while, so import it where a folder is opened.
"""

import errno
import io
import math
import os
import pickle
import pickletools
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as formats
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from common.errors import UserError, one_line
from common.sharded import CONTENTS, end_unless_main


def failure(error: CheckpointException) -> str:
    """Why DCP failed to write, on one line. Exceptions of other kinds, such as a bug or Ctrl-C, are raised."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    if not isinstance(cause, (OSError, RuntimeError)):
        raise cause from error
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause) or type(cause).__name__
    if 'unexpected pos' in text:  # torch's words for a write that failed, see common.checkpoint.save
        text = os.strerror(errno.ENOSPC)
    return one_line(f'{text} (on rank {rank})' if rank else text, 200)


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer(dcp.FileSystemWriter):
    """Writes a folder and then calls `finish_with` on the main rank, where an exception becomes one of all ranks."""

    def __init__(self, folder: str, finish_with, **options):
        super().__init__(folder, single_file_per_rank=True, sync_files=True, **options)
        self.finish_with = finish_with

    def storage_meta(self):
        return None  # it would hold the folder's path as an object of pathlib, whose classes move between Pythons

    def prepare_local_plan(self, plan):
        if not self.path.parent.is_dir():  # DCP would make it, on each node
            raise OSError(f'{self.path.parent} is gone; all nodes need it, on a disk that they share')
        return super().prepare_local_plan(plan)

    def finish(self, metadata, results):
        super().finish(metadata, results)
        sizes = {}
        for place in metadata.storage_data.values():
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
        self.finish_with(sizes)


class Planner(dcp.DefaultSavePlanner):
    """Plans with the tensors themselves, and writes copies of this rank's parts, if there are any, in their place."""

    def __init__(self, copies: dict[str, torch.Tensor] | None):
        super().__init__(flatten_state_dict=False)
        self.copies = copies

    def lookup_object(self, index):
        return self.copies[index.fqn] if self.copies else super().lookup_object(index)


def write_parts(folder: str, tensors: dict, finish_with, group=None, copies: dict | None = None):
    """Write tensors, sharded or not, to a folder; each rank its part, and of equal parts one rank. A collective.

    finish_with(sizes): called on the main rank once all is on the disk; sizes: {name of a part's file: bytes}.
    group: of the ranks, None for all of them. copies: see Planner.
    OSError, the same on every rank, if one of them cannot write or finish_with fails.
    """
    options = {'per_thread_copy_ahead': 0} if copies else {}  # else DCP waits for the device
    writer = Writer(folder, finish_with, **options)
    try:
        with nullcontext() if dist.is_initialized() else warnings.catch_warnings():
            if not dist.is_initialized():
                warnings.filterwarnings('ignore', message='torch.distributed is')  # not in use: on purpose
            dcp.save(tensors, storage_writer=writer, planner=Planner(copies), process_group=group)
    except CheckpointException as error:
        raise OSError(failure(error)) from error


# --- reading ----------------------------------------------------------------------------------------------------------


class Parts:
    """The tensors in a folder. UserError if its table of contents is damaged, forged, or does not fit its files."""

    def __init__(self, folder: str, files: dict[str, int], same: dict[str, str] | None = None):
        """files: name -> bytes, of files known to exist. same: further names of tensors -> the stored name."""
        self.folder, self.same = folder, same or {}
        path = os.path.join(folder, CONTENTS)
        try:
            with open(path, 'rb') as file:
                self.metadata = sound_metadata(unpickled(file.read()), files)
            for name in self.same.values():
                if name not in self.metadata.state_dict_metadata:
                    raise ValueError(f'it has no {name!r}')
        except Exception as error:  # a broken pickle raises almost anything
            reason = one_line(str(error) or type(error).__name__, 160)
            raise UserError(f'{path} cannot be read: {reason}; use another save') from error

    def shapes(self) -> dict[str, torch.Tensor]:
        """All tensors, as tensors of their shape and dtype on the meta device; one for all names of tied weights."""
        known = self.metadata.state_dict_metadata
        shapes = {name: empty(tensor.size, tensor.properties.dtype) for name, tensor in known.items()}
        return shapes | {name: shapes[stored] for name, stored in self.same.items()}

    @torch.no_grad()
    def read(self, targets: dict[str, torch.Tensor], alone: bool = False):
        """Fill tensors of the saved shapes, sharded in any way or not at all, with what was saved under their names.

        alone: this process needs no other; otherwise a collective of all ranks, if there are several, which fail
        together. UserError if a tensor is missing, has another shape, or cannot be read.
        """
        cause = None
        try:
            self.read_mine(targets)
        except Exception as error:  # a damaged file raises almost anything
            cause = error
        reasons = [cause and one_line(str(cause) or type(cause).__name__, 160)]
        if not alone and dist.is_initialized():
            reasons *= dist.get_world_size()
            dist.all_gather_object(reasons, reasons[0])
        failed = [reason + (f' (on rank {rank})' if rank else '') for rank, reason in enumerate(reasons) if reason]
        if failed:
            if len(reasons) > 1:
                end_unless_main(dist.get_rank())
            raise UserError(f'{self.folder} cannot be read: {failed[0]}; use another save') from cause

    def read_mine(self, targets: dict[str, torch.Tensor]):
        """What `read` does on each rank: DCP's planner finds the parts that overlap with what this rank holds.

        These are the steps of dcp.load without its messages between ranks. That reads .metadata again, by pickle.
        """
        shapes, wanted, copies = self.shapes(), {}, []
        for name, target in targets.items():
            if name not in shapes or shapes[name].shape != target.shape:
                saved = tuple(shapes[name].shape) if name in shapes else 'no such tensor'
                raise ValueError(f'{name} should be {tuple(target.shape)}, and there is {saved}')
            first = wanted.setdefault(self.same.get(name, name), target)
            if first is not target:
                copies.append((target, first))
        reader, planner = dcp.FileSystemReader(self.folder), dcp.DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(wanted, self.metadata, is_coordinator=True)
        reader.set_up_storage_reader(self.metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()
        for target, first in copies:
            target.copy_(first)


def empty(shape, dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device='meta')


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP's table of tensors; refuses to import any other name, which could run code."""

    CLASSES = (
        formats.Metadata,
        formats.TensorStorageMetadata,
        formats.BytesStorageMetadata,
        formats.TensorProperties,
        formats.ChunkStorageMetadata,
        formats.MetadataIndex,
        formats._MEM_FORMAT_ENCODING,
        formats.StorageMeta,
        _StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
    NAMES = {(item.__module__, item.__name__): item for item in CLASSES}

    def find_class(self, module, name):
        if (module, name) in self.NAMES:
            return self.NAMES[module, name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f'it asks to import {module}.{name}, which could run code')


def unpickled(content: bytes):
    """Unpickle a table of tensors. It cannot allocate more memory than its own size justifies."""
    for opcode, argument, _ in pickletools.genops(content):  # raises if a length goes beyond the end
        if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and int(argument) > len(content):
            raise pickle.UnpicklingError('it asks for more memory than it can fill')
    return MetadataUnpickler(io.BytesIO(content)).load()


def sound_metadata(claimed, files: dict[str, int]) -> formats.Metadata:
    """The metadata, made anew of what can be true: tensors, cut by rows, each part in a file that is large enough.

    ValueError, or almost any other exception, if a claim cannot be true.
    """
    sound, total = formats.Metadata(state_dict_metadata={}, storage_data={}), 0
    for name, tensor in claimed.state_dict_metadata.items():
        if type(name) is not str or type(tensor) is not formats.TensorStorageMetadata:
            raise ValueError(f'{one_line(repr(name), 60)} is not a tensor')
        shape, dtype = torch.Size(tensor.size), tensor.properties.dtype
        total += empty(shape, dtype).nbytes  # raises if the shape is absurd
        chunks, row = [], 0
        for chunk in tensor.chunks:
            chunks.append(formats.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        for chunk in sorted(chunks, key=lambda chunk: (chunk.offsets, chunk.sizes)):
            if chunk.offsets != (row, *[0] * (len(shape) - 1))[: len(shape)] or min(chunk.sizes, default=0) < 0:
                raise ValueError(f'the parts of {name} do not make it up')
            if len(chunk.sizes) != len(shape) or chunk.sizes[1:] != shape[1:]:
                raise ValueError(f'the parts of {name} do not fit it')
            row += chunk.sizes[0] if shape else 1
            index = formats.MetadataIndex(name, chunk.offsets)
            place = claimed.storage_data[index]
            start, length = place.offset, place.length
            if type(start) is not int or type(length) is not int or getattr(place, 'transform_descriptors', None):
                raise ValueError(f'a part of {name} is stored in an unknown way')
            if place.relative_path not in files or not 0 <= start < start + length <= files[place.relative_path]:
                raise ValueError(f'a part of {name} is not in a file of this save')
            if math.prod(chunk.sizes) * dtype.itemsize > length:
                raise ValueError(f'{name} claims more bytes than its file has')
            sound.storage_data[index] = _StorageInfo(place.relative_path, start, length)
        if row != (shape[0] if shape else 1):
            raise ValueError(f'parts of {name} are missing')
        properties = formats.TensorProperties(dtype=dtype)
        sound.state_dict_metadata[name] = formats.TensorStorageMetadata(properties, shape, chunks)
    if total > sum(files.values()):
        raise ValueError('its tensors claim more bytes than its files have together')
    return sound
