"""How a model is split over ranks, and what a layer keeps for the backward pass. Model and loop know nothing of either.

ddp    every rank has the whole model, and computes on other sequences; gradients are averaged once per step
fsdp   every rank has a part of each weight, gradient and optimizer buffer; a layer's weights are gathered just before
       it computes, and freed after (Zhao et al. 2023, "PyTorch FSDP")
hsdp   fsdp within groups of ranks, usually the GPUs of a node, whose connection is fast; ddp between the groups
"""

import os
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.distributed import join_alone, waiting_limit
from common.errors import UserError
from common.sharded import is_sharded
from configurator import require

PARALLEL = ('ddp', 'fsdp', 'hsdp')
CHECKPOINTING = ('none', 'selective', 'full')


def check_parallel(config, ranks):
    """UserError for settings of this file that are unknown, or do not fit together or the number of ranks."""
    require(config, 'parallel', ' or '.join(map(repr, PARALLEL)), lambda v: v in PARALLEL)
    require(config, 'activation_checkpointing', ' or '.join(map(repr, CHECKPOINTING)), lambda v: v in CHECKPOINTING)
    require(config, 'shard_ranks', 'at least 0', lambda v: v >= 0)
    require(config, 'timeout', 'at least 5', lambda v: v >= 5)
    parallel, size, n = config['parallel'], config['shard_ranks'], ranks.world_size
    if parallel == 'ddp' and config['cpu_offload']:
        raise UserError('--cpu_offload=True: needs --parallel=fsdp, on one device too, or hsdp')
    if size and parallel != 'hsdp':
        raise UserError(f'--shard_ranks={size}: belongs to --parallel=hsdp; leave it out')
    if parallel == 'hsdp' and n % shard_size(config, n):
        raise UserError(f'--shard_ranks={shard_size(config, n)}: must divide the number of ranks, {n}')
    if config['cpu_offload'] and config['sample_interval']:
        raise UserError('--sample_interval: not with --cpu_offload=True; leave it out, and use sample.py on a save')


def shard_size(config, n: int) -> int:
    """Of n ranks, how many share one copy of the model under hsdp: by default those of a node."""
    return config['shard_ranks'] or int(os.environ.get('LOCAL_WORLD_SIZE', n))


def device_mesh(config, ranks, device: torch.device):
    """The ranks as --parallel= arranges them -> a DeviceMesh, or None if the model is not sharded.

    Its last dimension shards; the first of two holds copies. config: settings as in train.py. A collective: every rank
    must call it, after join_ranks. UserError where torch cannot shard.
    """
    parallel, n = config['parallel'], ranks.world_size
    if parallel == 'ddp':
        return None
    if device.type == 'mps':
        raise UserError(f'--parallel={parallel}: not on MPS; use --parallel=ddp')
    if device.type == 'cpu' and not hasattr(torch.cpu.Stream, 'record_event'):  # torch 2.6; FSDP2 calls it
        raise UserError(
            f'--parallel={parallel}: torch {torch.__version__} shards on GPUs only; a newer one on CPUs too'
        )
    if n == 1:
        join_alone(device)
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if parallel == 'fsdp':
        return init_device_mesh(device.type, (n,), mesh_dim_names=('shard',))
    order = torch.arange(n).view(-1, shard_size(config, n))  # neighbors share a copy
    limit = waiting_limit(config['timeout'])
    shards, _ = dist.new_subgroups_by_enumeration(order.tolist(), timeout=limit)
    copies, _ = dist.new_subgroups_by_enumeration(order.t().tolist(), timeout=limit)
    return DeviceMesh.from_group([copies, shards], device.type, order, mesh_dim_names=('copy', 'shard'))


def describe_mesh(mesh) -> str:
    """What the line at the start says of a mesh: ', fsdp over 4', ', hsdp: 2 copies, each over 4', or nothing."""
    if mesh is None:
        return ''
    if mesh.ndim == 1:
        return f', fsdp over {mesh.size()}'
    return f', hsdp: {mesh.size(0)} copies, each over {mesh.size(1)}'


def parallelize(model, mesh, config, ranks, device: torch.device, dtype: torch.dtype, fill):
    """Put a model on the device, split as the settings say -> what the loop calls in its place.

    model: a GPT, in memory or on the meta device. mesh: from device_mesh. config: settings as in train.py.
    fill(model): gives the weights of a model that came from the meta device their values.

    The order is fixed: first what a layer keeps, then what is sharded, as one wraps the other; then memory and values,
    so that no rank ever holds a sharded model all at once. What modules_to_compile() names is compiled in place after.
    """
    checkpoint_activations(model, config['activation_checkpointing'])
    if mesh is not None:
        # CPUs normalize no mixed types: there weights are gathered in float32, and autocast rounds them
        shard(model, mesh, dtype if device.type == 'cuda' else torch.float32, config['cpu_offload'])
    if any(parameter.is_meta for parameter in model.parameters()):
        buffers = [(m, name, b) for m in model.modules() for name, b in m.named_buffers(recurse=False) if not b.is_meta]
        give_memory(model, torch.device('cpu') if config['cpu_offload'] else device)
        model.tie_weights()
        for module, name, buffer in buffers:  # these have values, and are needed where the model computes
            setattr(module, name, buffer.to(device))
        fill(model)
    elif mesh is None:
        model.to(device)
    if mesh is None and ranks.world_size > 1:
        devices = [device.index] if device.type == 'cuda' else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)  # else it keeps gradients twice
    return model


def give_memory(model, device: torch.device):
    """Give parameters that are on the meta device memory, which nothing fills yet."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        model.to_empty(device=device)
        return
    for module in model.modules():  # as to_empty() would, which imports sympy for it: most of a second
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, torch.nn.Parameter(memory, parameter.requires_grad))


def modules_to_compile(model, mesh) -> list:
    """The whole model; of a sharded one each layer, since the ranks exchange weights in between. All are compiled in
    place, so that backward pass and communication still overlap."""
    return [model] if mesh is None else list(model.transformer.h)


def checkpoint_activations(model, mode: str):
    """Let each layer keep less for the backward pass, which then computes it again (Chen et al. 2016, "Training deep
    nets with sublinear memory cost").

    mode: 'full' keeps only a layer's input: a third more computation. 'selective' keeps also the results of products
    and, without dropout, of attention (Korthikanti et al. 2022, section 5). 'none' keeps everything.
    """
    if mode == 'none':
        return
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        name = op.name().removeprefix('aten::')
        # attention makes its dropout mask inside: were it not computed again, the masks after it would be others
        kept = name in ('mm', 'addmm') or not model.config.dropout and name.startswith('_scaled_dot_product')
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options = {'use_reentrant': False}
    if mode == 'selective':
        options['context_fn'] = partial(create_selective_checkpoint_contexts, policy)
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, **options)


def shard(model, mesh, dtype: torch.dtype, cpu_offload: bool = False):
    """Shard a GPT in place by FSDP2: each layer is a unit, gathered and freed as one; the rest is the root's unit.

    Layers are gathered in dtype and their gradients summed in float32. The rest is gathered in float32, since the
    embedding's output is the residual stream, which autocast keeps in float32 on one device too.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options = {'mesh': mesh}
    if cpu_offload:
        options['offload_policy'] = CPUOffloadPolicy(pin_memory=mesh.device_type == 'cuda')
    low, exact = (  # inputs are not cast: angles of positions need more digits than bfloat16 has
        MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False) for gathered in (dtype, torch.float32)
    )
    for block in model.transformer.h:
        fully_shard(block, mp_policy=low, **options)
    if not model.config.tie_weights:  # tied, it is needed again for the logits
        fully_shard(model.transformer.wte, mp_policy=exact, **options)
    fully_shard(model, mp_policy=exact, **options)


def sync_gradients(model, now: bool):
    """Say whether the next backward pass of what parallelize() returned is the step's last: the one after which copies
    of the model exchange gradients. Parts of a sharded model sum theirs in each pass, as they have no memory for whole
    gradients."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif hasattr(model, 'set_requires_all_reduce'):
        model.set_requires_all_reduce(now)
