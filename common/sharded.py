"""Tensors of which each rank holds a part: DTensors, as torch.distributed.fsdp.fully_shard makes them."""

from contextlib import suppress

import torch
import torch.distributed as dist

from common.errors import leave

CONTENTS = '.metadata'  # what torch.distributed.checkpoint calls the table of contents in a folder of parts


def is_sharded(tensor: torch.Tensor) -> bool:
    """Is it a DTensor? Told by its attribute, as importing torch.distributed.tensor takes half a second."""
    return hasattr(tensor, 'device_mesh')


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: of a sharded one its rows, of any other all of it. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every rank. Of a sharded one a collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def copy_part(target: torch.Tensor, source: torch.Tensor):
    """Copy this rank's part of `source`, a whole tensor on any device, into `target`, sharded or not.

    fully_shard cuts rows as torch.chunk does, over the last dimension of the mesh; the first, if there are two, holds
    copies.
    """
    if not is_sharded(target):
        target.copy_(source)
        return
    mesh = target.device_mesh
    dim = mesh.ndim - 1
    chunks, place = source.chunk(mesh.size(dim)), mesh.get_local_rank(dim)
    if place < len(chunks):  # fewer rows than ranks: the last ranks have none
        target.to_local().copy_(chunks[place])


def same_memory(tensors: list[torch.Tensor]) -> list[int]:
    """For each tensor the index of the first one that has the same shape and memory on this rank: that of tied weights.

    Ranks may differ: one that holds no rows has no memory to compare.
    """
    first = {}
    keys = [(part(t).untyped_storage().data_ptr(), part(t).storage_offset(), t.shape) for t in tensors]
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


@torch.no_grad()
def host_copy(value):
    """Nested dicts, lists and tuples with each tensor copied to the host's memory, of a sharded one this rank's part.

    Tensors with the same memory are copied once. From CUDA the copies are pinned, so that all of them run in one queue
    and the host waits once.
    """
    copies, waits = {}, False

    def copied(value):
        nonlocal waits
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (tuple if isinstance(value, tuple) else list)(map(copied, value))
        if not torch.is_tensor(value):
            return value
        source = part(value).detach()
        key = source.untyped_storage().data_ptr(), source.storage_offset(), source.shape, source.stride(), source.dtype
        if key not in copies:
            copies[key] = torch.empty_like(source, device='cpu', pin_memory=source.is_cuda)
            copies[key].copy_(source, non_blocking=source.is_cuda)
            waits |= source.is_cuda
        return copies[key]

    result = copied(value)
    if waits:
        torch.cuda.synchronize()
    return result


def end_unless_main(rank: int):
    """End, on ranks other than the main one, after an error that all of them know and that the main one tells.

    They wait until that has ended, as torchrun ends all ranks when one has ended.
    """
    if rank:
        with suppress(RuntimeError):  # the lost connection
            dist.all_reduce(torch.zeros(1))
        leave(2)
