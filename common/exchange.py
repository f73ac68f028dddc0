"""Tensors that go from rank to rank, many in one message: a message of its own for each would cost its latency."""

import torch
import torch.distributed as dist


def all_to_all(sent: list[list], received: list[list], group: dist.ProcessGroup):
    """Send tensors from each rank of a group to each other. A collective.

    sent: for each rank the tensors that it gets. received: for each rank the tensors to fill with what comes from it.
    """
    sent_sizes, received_sizes = ([count(tensors) for tensors in by_rank] for by_rank in (sent, received))
    nothing = sum(sent + received, [])[0].new_empty(0)  # a rank may have nothing to send, which torch.cat rejects
    message = torch.cat([nothing, *(t.flatten() for tensors in sent for t in tensors)])
    answer = message.new_empty(sum(received_sizes))
    dist.all_to_all_single(answer, message, received_sizes, sent_sizes, group=group)
    fill(sum(received, []), answer)


def all_gather(tensors: list[list], rank: int):
    """Send the tensors of each rank to all ranks. A collective.

    tensors: for each rank, the same shapes everywhere; those of this rank are sent, the others are filled.
    """
    longest = max(map(count, tensors))  # messages must have one length: the others are padded
    padding = sum(tensors, [])[0].new_zeros(longest - count(tensors[rank]))
    message = torch.cat([*(t.flatten() for t in tensors[rank]), padding])
    answers = message.new_empty(len(tensors) * longest)
    gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor  # the name before torch 2.13
    gather(answers, message)
    for of_rank, answer in zip(tensors, answers.split(longest)):
        fill(of_rank, answer)


def count(tensors: list) -> int:
    """Elements of all tensors together."""
    return sum(t.numel() for t in tensors)


def fill(tensors: list, flat: torch.Tensor):
    """Copy the first elements of a flat tensor into tensors, one after the other."""
    pieces = flat[: count(tensors)].split([t.numel() for t in tensors])
    for tensor, piece in zip(tensors, pieces):
        tensor.copy_(piece.view_as(tensor))
