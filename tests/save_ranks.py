"""What each of several ranks does in the tests of sharded saves: a function below, called with the arguments after it.

The model has five rows, which no number of ranks divides, and tied weights; its state after n steps is the same on any
ranks.
"""

import resource
import sys
import threading

import torch
import torch._dynamo  # fully_shard imports it: once, here, for all forks
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common import parts
from common.checkpoint import latest, load_data, load_optimizer_buffers
from common.distributed import find_ranks, join_ranks
from common.errors import install_error_handling
from common.saving import Saver
from common.sharded import copy_part, whole


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 5)
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def expected(n: int):
    """Model and optimizer of step n, whole."""
    torch.manual_seed(n)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def sharded(n: int, shape: tuple):
    """The same on this rank, sharded over the last dimension of a mesh of that shape."""
    reference, optimizer = expected(n)
    torch.manual_seed(0)
    model = Tied()
    names = ('copies', 'shards') if len(shape) == 2 else ('shards',)
    fully_shard(model, mesh=init_device_mesh('cpu', shape, mesh_dim_names=names))
    ours = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ours.step()  # makes its buffers
    with torch.no_grad():
        for target, source in zip(model.parameters(), reference.parameters()):
            copy_part(target, source)
            for name, buffer in optimizer.state[source].items():
                copy_part(ours.state[target][name], buffer)
    return model, ours


def state(model, n):
    return {'model': model.state_dict(), 'iter_num': n, 'config': {'dataset': 'tiny'}}


def save(out_dir, shape, *steps):
    """Save some steps. shape: of the mesh, such as 2x2."""
    saver = Saver(out_dir, ranks, sharded=True)
    for n in map(int, steps):
        model, optimizer = sharded(n, tuple(map(int, shape.split('x'))))
        saver.save(state(model, n), {'optimizer': optimizer.state_dict(), 'scaler': None}, is_best=False)
    saver.finish()


def fill_the_disk(out_dir, asynchronous):
    """Save step 1; step 2, for which the last rank has no space; and then, unless that has ended all ranks, step 3."""
    saver = Saver(out_dir, ranks, sharded=True, asynchronous=asynchronous == 'later', timeout=60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n in (1, 2, 3):
        model, optimizer = sharded(n, (ranks.world_size,))
        saver.wait()
        last = n == 2 and ranks.rank == ranks.world_size - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if last else limits[0], limits[1]))
        saver.save(state(model, n), {'optimizer': optimizer.state_dict(), 'scaler': None}, is_best=True)
    saver.finish()


def save_while_training(out_dir):
    """Save step 4, and go on training before anything is written."""
    model, optimizer = sharded(4, (ranks.world_size,))
    trained, write_parts = threading.Event(), parts.write_parts
    parts.write_parts = lambda *arguments: trained.wait() and write_parts(*arguments)
    saver = Saver(out_dir, ranks, sharded=True, asynchronous=True, timeout=60)
    saver.save(state(model, 4), {'optimizer': optimizer.state_dict(), 'scaler': None}, is_best=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trained.set()
    saver.finish()


def load(out_dir, shape, n):
    """Read what is there into other values; it must be step n."""
    model, optimizer = sharded(0, tuple(map(int, shape.split('x'))))
    checkpoint = load_data(latest(out_dir))
    checkpoint['parts'].read({f'model.{name}': tensor for name, tensor in model.state_dict().items()})
    saved = load_optimizer_buffers(checkpoint, out_dir, optimizer)['optimizer']
    optimizer.load_state_dict(saved)
    reference, buffers = expected(int(n))
    assert checkpoint['iter_num'] == int(n)
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values()):
        assert torch.equal(whole(ours), theirs), name
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        for name, buffer in buffers.state[theirs].items():
            assert torch.equal(whole(optimizer.state[ours][name]), buffer), name


if __name__ == '__main__':
    install_error_handling()
    ranks = find_ranks()
    join_ranks('gloo', torch.device('cpu'), ranks)
    function, *arguments = sys.argv[1:]
    globals()[function](*arguments)
    dist.barrier()
    dist.destroy_process_group()
