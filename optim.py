"""How weights move: parameter groups, the optimizers, the learning rate's and the batch size's schedules."""

import math

import torch
import torch.distributed as dist

from common.distributed import Ranks
from common.errors import UserError

ALONE = Ranks()
# Newton-Schulz coefficients of Jordan et al. 2024: steep at zero, so that small singular values grow fast, and no closer to 1 than needed
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def without_compiler(method):
    """A method of torch's optimizers without the wrapper that imports torch's compiler, over a second of every start. The wrapper only
    matters to programs that compile the step itself; where a torch has none, the method is what it is."""
    return getattr(method, '__wrapped__', method)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), ready sooner (Loshchilov and Hutter 2019, algorithm 2): one kernel call per group. With a tensor
    `found_inf` set, step() changes nothing where that is 1; see step_unless."""

    buffer_names = {'step', 'exp_avg', 'exp_avg_sq'}
    add_param_group, zero_grad, state_dict, load_state_dict = map(
        without_compiler,
        (
            torch.optim.Optimizer.add_param_group,
            torch.optim.Optimizer.zero_grad,
            torch.optim.Optimizer.state_dict,
            torch.optim.Optimizer.load_state_dict,
        ),
    )
    step = torch.no_grad()(without_compiler(torch.optim.AdamW.step))

    def __init__(self, groups, lr, betas):
        """groups: dicts with 'params', float32 tensors of one device, and what differs from lr and betas, such as 'weight_decay'."""
        super().__init__(groups, lr=lr, betas=betas, fused=True)

    def buffers_of(self, group):
        """Names of what is remembered of each parameter of a group."""
        return self.buffer_names


class Muon(AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for groups with a 'momentum', AdamW for
    the rest.

    A matrix moves by the momentum of its gradient with all singular values made about 1. Matrices of one shape are stacked, so
    that their iterations are a few batched products; several ranks share a stack out and exchange what they computed.
    """

    def __init__(self, groups, lr, betas, rows=None, ranks=ALONE, dtype=torch.float32):
        """groups: as for AdamW, and some of matrices only with 'momentum'. rows: {matrix: the numbers of rows after which to cut it into
        matrices of their own}, for those that are to be cut. ranks: runtime.Ranks, of equal gradients. dtype: of the iteration."""
        self.rows, self.ranks, self.dtype = rows or {}, ranks, dtype
        super().__init__(groups, lr, betas)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own looks for buffers that matrices do not have

    def buffers_of(self, group):
        return {'momentum'} if 'momentum' in group else super().buffers_of(group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step from the gradients in .grad; parameters without one stay. closure: as in torch.optim, returns the loss."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if 'momentum' not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if 'momentum' in group:
                self.step_matrices(group, getattr(self, 'found_inf', None))
        return loss

    def step_matrices(self, group, found_inf):
        """Muon's step of a group. found_inf: a tensor, 1 to change nothing after all, or None."""
        shapes = {}  # (m, n), m <= n, to the matrices of that shape and their transposes: the iteration is the same
        for p in group['params']:
            if p.grad is not None:
                state, rows = self.state[p], self.rows.get(p, len(p))
                if not state:
                    state['momentum'] = torch.zeros_like(p)
                for matrix in zip(p.split(rows), p.grad.split(rows), state['momentum'].split(rows)):
                    shapes.setdefault(tuple(sorted(matrix[0].shape)), []).append(matrix)
        keep = None if found_inf is None else found_inf == 0
        for shape, matrices in shapes.items():
            weights, gradients, momenta = zip(*matrices)
            if keep is not None:
                gradients = [
                    torch.where(keep, g, m) for g, m in zip(gradients, momenta)
                ]  # which leaves the momentum as it is
            torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
            directions = torch._foreach_lerp(
                gradients, momenta, group['momentum']
            )  # Nesterov's: the gradient counts once more
            stack = self.orthogonalize(
                torch.stack([d if d.shape == shape else d.t() for d in directions])
            )  # (matrices, m, n)
            shrink = group['lr'] * group['weight_decay']
            if keep is not None:
                stack *= keep
                shrink = shrink * keep
            if group['weight_decay']:
                torch._foreach_mul_(weights, 1 - shrink)
            directions = [d if w.shape == shape else d.t() for w, d in zip(weights, stack)]
            torch._foreach_mul_(directions, [-group['lr'] * max(1, len(w) / w.size(1)) ** 0.5 for w in weights])
            torch._foreach_add_(weights, directions)

    def orthogonalize(self, stack):
        """orthogonalize() of a stack, of which each rank computes its share."""
        n, world_size = len(stack), self.ranks.world_size
        if world_size == 1:
            return orthogonalize(stack, self.dtype)
        share = -(-n // world_size)
        padded = torch.cat((stack, stack.new_zeros(world_size * share - n, *stack.shape[1:])))
        out = torch.empty_like(padded)
        dist.all_gather_into_tensor(out, orthogonalize(padded[self.ranks.rank * share :][:share], self.dtype))
        return out[:n]


def orthogonalize(stack, dtype=torch.float32, steps=5):
    """The nearest semi-orthogonal matrix of each in a stack (N, m, n), m <= n, roughly: singular values end between 0.7 and 1.2.

    The quintic Newton-Schulz iteration of Jordan et al. 2024, as products alone, in dtype.
    """
    a, b, c = NEWTON_SCHULZ
    x = (stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b x x' + c x x' x x') x
    return x.to(stack.dtype)


def step_unless(skip, optimizer):
    """One step of any torch.optim.Optimizer, unless `skip`, a tensor on the model's device, is True.

    An optimizer that can be told to come to nothing (those whose kernel takes `found_inf`) is, so that nobody waits for an accelerator
    to tell: on CUDA, as the kernel for MPS takes found_inf and makes nothing of it. All others are called only if there is something to do.
    """
    if skip.device.type == 'cuda' and getattr(optimizer, '_step_supports_amp_scaling', False):
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skip:
        optimizer.step()


def load_optimizer_state(optimizer, saved):
    """Give an optimizer the buffers of a saved state_dict, which may come from anyone; the hyperparameters stay as this run has set them.

    ValueError if the groups are others, or the buffers are not those of its parameters.
    """
    ours, theirs = (state['param_groups'] for state in (optimizer.state_dict(), saved))
    if [len(group['params']) for group in ours] != [len(group['params']) for group in theirs]:
        raise ValueError('it has other groups of parameters than the model')
    numbers = [number for group in theirs for number in group['params']]
    if not set(saved['state']) <= set(numbers) or len(set(numbers)) != len(numbers):
        raise ValueError('it has buffers of parameters that the model does not have')
    state = {}
    parameters = [(p, group) for group in optimizer.param_groups for p in group['params']]
    for number, (theirs_number, (p, group)) in enumerate(zip(numbers, parameters)):
        buffers = saved['state'].get(theirs_number)
        if buffers is None:
            continue  # it has not had a gradient yet
        names = (
            optimizer.buffers_of(group) if isinstance(optimizer, AdamW) else set()
        )  # those of others are only bounded in size
        if not isinstance(buffers, dict) or not names <= buffers.keys():
            raise ValueError(f'the buffers of parameter {number} are not those of {type(optimizer).__name__}')
        for name, buffer in buffers.items():
            shape = () if name == 'step' else p.shape
            if (
                name in names
                and not (torch.is_tensor(buffer) and buffer.shape == shape)
                or torch.is_tensor(buffer)
                and buffer.numel() > max(1, p.numel())
            ):
                raise ValueError(f'{name} of parameter {number} is not a tensor of {tuple(shape)}')
        state[number] = buffers
    optimizer.load_state_dict({'state': state, 'param_groups': ours})


def make_optimizer(model, config, ranks=ALONE, dtype=torch.float32):
    """The optimizer that a run's settings describe, of all parameters that are trained; each group has its highest rate as 'initial_lr'.

    config: settings as in train.py, of which optimizer is a key of OPTIMIZERS. ranks, dtype: the run's. UserError if there are none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # a tied matrix appears once
    if not trained:
        raise UserError('every parameter of the model has requires_grad=False: there is nothing to train')
    optimizer = OPTIMIZERS[config['optimizer']](trained, config, ranks, dtype)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    grouped = [p for group in optimizer.param_groups for p in group['params']]
    assert len(grouped) == len(trained) and set(grouped) == set(trained.values()), (
        'every parameter belongs into one group'
    )
    return optimizer


def decay_groups(parameters, weight_decay):
    """Parameters -> two groups: matrices and embeddings decay, biases and gains do not. The order of groups and parameters is nanoGPT's,
    so that the optimizer state in its checkpoints fits."""
    return [
        {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]


def adamw(named, config, ranks, dtype):
    """AdamW for everything. Arguments: those of all functions in OPTIMIZERS."""
    return AdamW(
        decay_groups(named.values(), config['weight_decay']),
        config['learning_rate'],
        (config['beta1'], config['beta2']),
    )


def muon(named, config, ranks, dtype):
    """Muon for the matrices of the layers, AdamW for the rest. The iteration runs in bfloat16 if the run does, in float32 otherwise."""
    hidden = {name: p for name, p in named.items() if p.dim() == 2 and name.startswith('transformer.h.')}
    groups = decay_groups([p for name, p in named.items() if name not in hidden], config['weight_decay'])
    groups.append(
        {
            'params': list(hidden.values()),
            'lr': config['muon_learning_rate'],
            'momentum': config['muon_momentum'],
            'weight_decay': config['weight_decay'],
        }
    )
    rows = {p: qkv_rows(p) for name, p in hidden.items() if name.endswith('c_attn.weight')}
    return Muon(
        groups,
        config['learning_rate'],
        (config['beta1'], config['beta2']),
        rows,
        ranks,
        torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )


# What --optimizer= may be: (named parameters, settings, ranks, dtype) -> a torch.optim.Optimizer. Any of torch's does; a new one is a line.
OPTIMIZERS = {'adamw': adamw, 'muon': muon}


def qkv_rows(weight):
    """Rows of c_attn's weight that make queries, keys and values. Each is a matrix to Muon, as it would be on its own."""
    q = weight.size(1)
    return [q, (len(weight) - q) // 2, (len(weight) - q) // 2]


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters, cooldown_iters=0):
    """Learning rate of update `step` (from 0): a linear warm-up, then half a cosine down to min_lr at lr_decay_iters
    (Loshchilov and Hutter 2017, eq. 5, without restarts), then min_lr. With cooldown_iters the rate stays the highest
    instead, and falls linearly to min_lr over so many updates up to lr_decay_iters (Hu et al. 2024, "MiniCPM", section 4)."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    if cooldown_iters:
        return min_lr + min(1, (lr_decay_iters - step) / cooldown_iters) * (learning_rate - min_lr)
    progress = (step - warmup_iters) / (
        lr_decay_iters - warmup_iters
    )  # in [0, 1): lr_decay_iters > step >= warmup_iters
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def update_ratio(weight, before):
    """Norm of an update over the norm of the weight that it changed, a float: about 1e-3 in a healthy run. A sync point."""
    return (torch.dist(weight.detach(), before) / before.norm()).item()
