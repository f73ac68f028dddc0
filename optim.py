"""Optimizers: parameter groups, AdamW, Muon, loading their state, and the learning rate's schedule."""

import math

import torch
import torch.distributed as dist

from common.distributed import Ranks
from common.errors import UserError

ALONE = Ranks()
# Coefficients of Jordan et al. 2024: steep at 0, so small singular values grow fast; the cost: they end only near 1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


# --- optimizers -------------------------------------------------------------------------------------------------------


def without_compiler(method):
    """A method of a torch optimizer without the wrapper that imports torch's compiler, which takes over a second.

    Only programs that compile the step itself need the wrapper. Without one, the method is returned as it is.
    """
    return getattr(method, '__wrapped__', method)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), one kernel call per group, without its slow start.

    Loshchilov and Hutter 2019, algorithm 2.
    If the attribute `found_inf`, a tensor, is set and 1, step() changes nothing; see step_unless.
    """

    buffer_names = {'step', 'exp_avg', 'exp_avg_sq'}
    add_param_group = without_compiler(torch.optim.Optimizer.add_param_group)
    zero_grad = without_compiler(torch.optim.Optimizer.zero_grad)
    state_dict = without_compiler(torch.optim.Optimizer.state_dict)
    load_state_dict = without_compiler(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(without_compiler(torch.optim.AdamW.step))

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        """groups: dicts with 'params', float32 tensors on one device, and options that differ from lr and betas."""
        super().__init__(groups, lr=lr, betas=betas, fused=True)

    def buffers_of(self, group: dict) -> set[str]:
        """Names of the buffers that are kept for each parameter of a group."""
        return self.buffer_names


class Muon(AdamW):
    """Muon for the groups with a 'momentum', AdamW for the others.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") changes a matrix by its
    orthogonalized momentum: the momentum of the gradient with all singular values made about 1. Matrices of one shape
    are stacked and orthogonalized together, in a few batched products. Ranks divide each stack and exchange results.
    """

    def __init__(self, groups, lr, betas, row_splits=None, ranks=ALONE, dtype=torch.float32):
        """The optimizer of several groups of parameters.

        groups: as for AdamW; those with 'momentum' hold matrices only.
        lr, betas: of all groups that do not set their own.
        row_splits: {matrix: [rows, rows, …]} for matrices that are treated as several, stacked on top of one another.
        ranks: Ranks that all have the same gradients.
        dtype: of the Newton-Schulz iteration.
        """
        self.row_splits, self.ranks, self.dtype = row_splits or {}, ranks, dtype
        super().__init__(groups, lr, betas)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # not AdamW's: it expects AdamW's buffers of every parameter

    def buffers_of(self, group):
        return {'momentum'} if 'momentum' in group else super().buffers_of(group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step with the gradients in .grad; parameters without one stay. closure: as in torch.optim."""
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

    def step_matrices(self, group: dict, found_inf: torch.Tensor | None):
        """Muon's step for one group. found_inf: 1 to change nothing, 0 or None otherwise."""
        by_shape = {}  # (m, n), m <= n -> [(weight, gradient, momentum)] of that shape or transposed
        for p in group['params']:
            if p.grad is not None:
                state, rows = self.state[p], self.row_splits.get(p, len(p))
                if not state:
                    state['momentum'] = torch.zeros_like(p)
                for matrix in zip(p.split(rows), p.grad.split(rows), state['momentum'].split(rows)):
                    by_shape.setdefault(tuple(sorted(matrix[0].shape)), []).append(matrix)
        keep = None if found_inf is None else found_inf == 0
        for shape, matrices in by_shape.items():
            weights, gradients, momenta = zip(*matrices)
            if keep is not None:  # the momentum in place of the gradient leaves the momentum unchanged
                gradients = [torch.where(keep, g, m) for g, m in zip(gradients, momenta)]
            torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
            directions = torch._foreach_lerp(gradients, momenta, group['momentum'])  # Nesterov momentum
            stack = torch.stack([d if d.shape == shape else d.t() for d in directions])  # (N, m, n)
            stack = self.orthogonalize(stack)
            decay = group['lr'] * group['weight_decay']
            if keep is not None:
                stack *= keep
                decay = decay * keep
            if group['weight_decay']:
                torch._foreach_mul_(weights, 1 - decay)
            directions = [d if w.shape == shape else d.t() for w, d in zip(weights, stack)]
            torch._foreach_mul_(directions, [-group['lr'] * max(1, len(w) / w.size(1)) ** 0.5 for w in weights])
            torch._foreach_add_(weights, directions)

    def orthogonalize(self, stack: torch.Tensor) -> torch.Tensor:
        """orthogonalize() of a stack (N, m, n), where each rank computes its share of the N matrices."""
        n, world_size = len(stack), self.ranks.world_size
        if world_size == 1:
            return orthogonalize(stack, self.dtype)
        share = -(-n // world_size)
        padded = torch.cat((stack, stack.new_zeros(world_size * share - n, *stack.shape[1:])))
        out = torch.empty_like(padded)
        dist.all_gather_into_tensor(out, orthogonalize(padded[self.ranks.rank * share :][:share], self.dtype))
        return out[:n]


def orthogonalize(stack: torch.Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> torch.Tensor:
    """Set all singular values of each matrix in a stack to about 1 (0.7 to 1.2), and keep its singular vectors.

    The quintic Newton-Schulz iteration of Jordan et al. 2024: matrix products only, in dtype.
    stack: (N, m, n), m <= n.
    """
    a, b, c = NEWTON_SCHULZ
    x = (stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)  # singular values are at most 1
    for _ in range(steps):
        gram = x @ x.mT  # (N, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b x x' + c x x' x x') x
    return x.to(stack.dtype)


def step_unless(skip: torch.Tensor, optimizer: torch.optim.Optimizer):
    """One step of any torch optimizer, unless `skip`, a bool tensor on the model's device, is True.

    On CUDA, an optimizer whose kernel takes `found_inf` decides on the device, so that the host need not wait for
    `skip`. With all others the host waits, and on MPS, whose kernel accepts found_inf but ignores it.
    """
    if skip.device.type == 'cuda' and getattr(optimizer, '_step_supports_amp_scaling', False):
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skip:
        optimizer.step()


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict):
    """Load the buffers of a saved state_dict from an untrusted file; the hyperparameters stay those of this run.

    ValueError if its groups or buffers do not fit the optimizer's parameters.
    """
    ours, theirs = (state['param_groups'] for state in (optimizer.state_dict(), saved))
    if [len(group['params']) for group in ours] != [len(group['params']) for group in theirs]:
        raise ValueError("its groups of parameters differ from the model's")
    ids = [i for group in theirs for i in group['params']]  # the saved state's numbers of the parameters
    if not set(saved['state']) <= set(ids) or len(set(ids)) != len(ids):
        raise ValueError('it has buffers for parameters that the model does not have')
    state = {}
    parameters = [(p, group) for group in optimizer.param_groups for p in group['params']]
    for number, (saved_id, (p, group)) in enumerate(zip(ids, parameters)):
        buffers = saved['state'].get(saved_id)
        if buffers is None:
            continue  # the parameter has not had a gradient yet
        # the buffers of other optimizers are unknown: only their size is checked
        required = optimizer.buffers_of(group) if isinstance(optimizer, AdamW) else set()
        if not isinstance(buffers, dict) or not required <= buffers.keys():
            raise ValueError(f'the buffers of parameter {number} are not those of {type(optimizer).__name__}')
        for name, buffer in buffers.items():
            shape = () if name == 'step' else p.shape
            fits = torch.is_tensor(buffer) and buffer.shape == shape
            too_large = torch.is_tensor(buffer) and buffer.numel() > max(1, p.numel())
            if too_large or name in required and not fits:
                raise ValueError(f'{name} of parameter {number} is not a tensor of {tuple(shape)}')
        state[number] = buffers
    optimizer.load_state_dict({'state': state, 'param_groups': ours})


# --- parameter groups: what --optimizer= selects ----------------------------------------------------------------------


def make_optimizer(model, config: dict, ranks: Ranks = ALONE, dtype=torch.float32) -> torch.optim.Optimizer:
    """The optimizer of a run, over all trainable parameters; 'initial_lr' of each group is its highest learning rate.

    config: settings as in train.py; config['optimizer'] is a key of OPTIMIZERS.
    ranks, dtype: of the run.
    UserError if no parameter is trainable.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}  # tied weights appear once
    if not named:
        raise UserError('every parameter of the model has requires_grad=False: there is nothing to train')
    optimizer = OPTIMIZERS[config['optimizer']](named, config, ranks, dtype)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    grouped = [p for group in optimizer.param_groups for p in group['params']]
    once = len(grouped) == len(named) and set(grouped) == set(named.values())
    assert once, 'every parameter must be in exactly one group'
    return optimizer


def decay_groups(parameters, weight_decay: float) -> list[dict]:
    """Two groups: matrices and embeddings with weight decay, biases and gains without.

    The order of groups and parameters is nanoGPT's, so that the optimizer state in its checkpoints fits.
    """
    return [
        {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]


def adamw(named: dict, config: dict, ranks: Ranks, dtype: torch.dtype) -> AdamW:
    """AdamW for all parameters. The arguments are those of every function in OPTIMIZERS."""
    groups = decay_groups(named.values(), config['weight_decay'])
    return AdamW(groups, config['learning_rate'], (config['beta1'], config['beta2']))


def muon(named: dict, config: dict, ranks: Ranks, dtype: torch.dtype) -> Muon:
    """Muon for the layers' matrices, AdamW for the rest. The iteration is bfloat16 if the run is, else float32."""
    hidden = {name: p for name, p in named.items() if p.dim() == 2 and name.startswith('transformer.h.')}
    groups = decay_groups([p for name, p in named.items() if name not in hidden], config['weight_decay'])
    options = {'lr': config['muon_learning_rate'], 'momentum': config['muon_momentum']}
    groups.append({'params': list(hidden.values()), 'weight_decay': config['weight_decay'], **options})
    row_splits = {p: qkv_rows(p) for name, p in hidden.items() if name.endswith('c_attn.weight')}
    betas = (config['beta1'], config['beta2'])
    iteration_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return Muon(groups, config['learning_rate'], betas, row_splits, ranks, iteration_dtype)


# Choices of --optimizer=: (named parameters, settings, ranks, dtype) -> torch.optim.Optimizer. A new one is one line.
OPTIMIZERS = {'adamw': adamw, 'muon': muon}


def qkv_rows(weight: torch.Tensor) -> list[int]:
    """Rows of c_attn's weight for queries, keys and values: three matrices for Muon, which works on each alone."""
    q = weight.size(1)
    return [q, (len(weight) - q) // 2, (len(weight) - q) // 2]


# --- schedule and diagnostics -----------------------------------------------------------------------------------------


def learning_rate_at(
    step: int, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int, cooldown_iters: int = 0
) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then decay to min_lr at lr_decay_iters.

    The decay is half a cosine (Loshchilov and Hutter 2017, eq. 5, without restarts). With cooldown_iters, the rate is
    constant until the last cooldown_iters steps and then falls linearly (Hu et al. 2024, "MiniCPM", section 4).
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    if cooldown_iters:
        return min_lr + min(1, (lr_decay_iters - step) / cooldown_iters) * (learning_rate - min_lr)
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # in [0, 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def update_ratio(weight: torch.Tensor, before: torch.Tensor) -> float:
    """Norm of a weight's change in a step over the norm of the weight before; about 1e-3 in a healthy run.

    Waits for the device.
    """
    return (torch.dist(weight.detach(), before) / before.norm()).item()


class StepStats:
    """Statistics of the steps since the last line of the log. Counters stay on the device until then, so that the host
    does not wait for it."""

    def __init__(self, parameters, device):
        """parameters: the model's. update_ratio is measured on one matrix of the middle layer."""
        trained = [p for p in parameters if p.requires_grad]
        matrices = [p for p in trained if p.dim() == 2] or trained
        self.watched, self.before = matrices[len(matrices) // 2], None
        self.skipped = self.longest = torch.zeros((), device=device)  # NaN or infinite steps in a row; the most of them
        self.clipped = torch.zeros((), device=device)
        self.steps = self.tokens = self.seconds = 0

    def before_step(self, log_due):
        """Keep a copy of the watched matrix if this step gets a line of the log."""
        self.before = self.watched.detach().clone() if log_due else None

    def after_step(self, skipped, clipped, tokens):
        """skipped, clipped: bool tensors, whether the step was. tokens: of the step, all ranks together."""
        self.skipped = (self.skipped + 1) * skipped
        self.longest = torch.maximum(self.longest, self.skipped)
        self.clipped += clipped
        self.steps += 1
        self.tokens += tokens

    def since_last_line(self, seconds):
        """seconds: of training until now -> part of the log's record: means over the steps since the last call."""
        elapsed = seconds - self.seconds
        record = {
            'time_ms': 1000 * elapsed / self.steps,
            'tokens_per_s': self.tokens / elapsed,
            'clipped': self.clipped.item() / self.steps,
            'skipped': int(self.skipped),
            'update_ratio': update_ratio(self.watched, self.before),
        }
        self.clipped.zero_()
        self.steps, self.tokens, self.seconds = 0, 0, seconds
        return record
