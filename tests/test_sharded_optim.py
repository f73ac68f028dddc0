"""Optimizers on several ranks: sharded parameters, and copies of whole ones, change as those of one device do.

The ranks are forks that run this file as a script.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import run_forked_ranks
from torch.distributed.device_mesh import init_device_mesh

from common.distributed import find_ranks, join_ranks
from common.sharded import copy_part, is_sharded, part, whole
from model import GPT, GPTConfig
from optim import OPTIMIZERS, StepStats, clip_gradients, load_optimizer_state, make_optimizer, step_unless

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95, muon_learning_rate=0.02, muon_momentum=0.9)
SKIPPED = {1: 'by the host', 2: 'on the device'}  # steps with a NaN gradient, and who decides that they are skipped
LAST = 4  # step in which one matrix alone has a gradient: most ranks have no matrix to work on


def test_ranks_compute_what_one_device_does(tmp_path):
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401  # once, for all forks

    results = run_forked_ranks(4, __file__, cwd=tmp_path)
    output = ''.join(result.stdout + result.stderr for result in results)
    assert not any(result.returncode for result in results), output
    assert results[0].stdout.count('as on one device') == 4 * len(OPTIMIZERS)


def main():
    torch.set_num_threads(1)
    ranks = find_ranks()
    join_ranks('gloo', torch.device('cpu'), ranks)
    fsdp = init_device_mesh('cpu', (4,))
    hsdp = init_device_mesh('cpu', (2, 2), mesh_dim_names=('copies', 'shards'))
    meshes = {'copies': None, 'fsdp': fsdp, 'hsdp': hsdp, 'two times fsdp on two ranks': hsdp['shards']}
    for kind in OPTIMIZERS:
        for name, mesh in meshes.items():
            compare(kind, mesh, ranks)
            print(kind, name, 'as on one device')
    for mesh in (fsdp, hsdp):
        scale_gradients(mesh, ranks)
    dist.barrier()
    dist.destroy_process_group()


def scale_gradients(mesh, ranks):
    """float16's scaler: an infinite gradient in the part of one rank lowers the scale on all of them."""
    model = small_model(mesh)
    optimizer = make_optimizer(model, {**SETTINGS, 'optimizer': 'adamw'}, ranks)
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    scaler.scale(torch.ones(()))
    for expected in (8.0, 4.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, 8.0)
        if expected < 8 and mesh.get_local_rank(mesh.ndim - 1) == 1:  # copies have the same gradients
            part(model.lm_head.weight.grad)[0] = torch.inf
        scaler.unscale_(optimizer)
        assert expected < 8 or all((part(p.grad) == 1).all() for p in model.parameters())
        scaler.update()
        assert scaler.get_scale() == expected


def compare(kind, mesh, ranks):
    """Some steps of a model on several ranks, and of one that this rank has for itself."""
    settings = {**SETTINGS, 'optimizer': kind}
    model, reference = small_model(mesh), small_model()
    optimizer, alone = make_optimizer(model, settings, ranks), make_optimizer(reference, settings)
    assert all(is_sharded(p) == bool(mesh) for p in model.parameters())
    for step in range(LAST + 1):
        before = copy.deepcopy(tensors(model, optimizer, part))
        expected = take_step(reference, alone, step)
        assert take_step(model, optimizer, step) == pytest.approx(expected, rel=1e-4, nan_ok=True)
        assert same_bits(before, tensors(model, optimizer, part)) == (step in SKIPPED)
    after = tensors(model, optimizer, whole)
    torch.testing.assert_close(after, tensors(reference, alone, whole), rtol=1e-4, atol=1e-5)
    flat = torch.cat([tensor.flatten() for tensor in after.values()])
    of_rank_0 = flat.clone()
    dist.broadcast(of_rank_0, 0)
    assert torch.equal(flat, of_rank_0)

    for saved, parameters in ((alone, reference), (optimizer, model)):  # whole buffers; those of this kind of model
        loaded = make_optimizer(model, settings, ranks)
        load_optimizer_state(loaded, copy.deepcopy(saved.state_dict()))
        assert all(
            is_sharded(tensor) == bool(mesh and key != 'step')
            for state in loaded.state.values()
            for key, tensor in state.items()
        )
        assert same_bits(buffers(model, loaded, whole), buffers(parameters, saved, whole))
    wrong = copy.deepcopy(alone.state_dict())
    wrong['state'][0] = {key: torch.zeros(3, 3) for key in wrong['state'][0]}
    with pytest.raises(ValueError, match='parameter 0 is not a tensor of'):
        load_optimizer_state(loaded, wrong)


def small_model(mesh=None):
    """A GPT whose matrices have numbers of rows that 2 and 4 do not divide, some fewer; queries are grouped.

    mesh: to shard it on.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=3, n_kv_head=1, n_embd=9, block_size=3, vocab_size=11))
    model.transformer.h[0].extra = torch.nn.ModuleList(torch.nn.Linear(5, rows, bias=False) for rows in (3, 1))
    if mesh:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.transformer.h[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def take_step(model, optimizer, step):
    """A step as in train.py, with given gradients -> norm of the gradients, update ratio."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator)
        if step in SKIPPED:
            gradient[0] = torch.nan
        p.grad = torch.zeros_like(p)
        copy_part(p.grad, gradient)
        if step == LAST and not name.endswith('c_attn.weight'):
            p.grad = None
    parameters = list(model.parameters())
    stats = StepStats(parameters, 'cpu')
    norm = clip_gradients(parameters, max_norm=1.0 if step else 0.0)
    assert type(norm) is torch.Tensor and norm.dim() == 0
    stats.before_step(True)
    if SKIPPED.get(step) == 'on the device':  # as step_unless does on CUDA
        optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    else:
        step_unless(~norm.isfinite(), optimizer)
    stats.after_step(~norm.isfinite(), norm > 1, 1)
    return norm.item(), stats.since_last_line(1.0)['update_ratio']


def tensors(model, optimizer, of):
    """Weights and buffers. of: part or whole, what to return of each."""
    return {name: of(p.detach()) for name, p in model.named_parameters()} | buffers(model, optimizer, of)


def buffers(model, optimizer, of):
    named = [(name, key, b) for name, p in model.named_parameters() for key, b in optimizer.state[p].items()]
    return {f'{key} of {name}': of(buffer) for name, key, buffer in named}


def same_bits(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


if __name__ == '__main__':
    main()
