"""Optimizers: parameter groups, AdamW, Muon, loading their state, and the learning rate's schedule."""

import math

import torch

from common.device import autocast
from common.distributed import ALONE, Ranks
from common.errors import UserError, warn
from common.exchange import all_gather, all_to_all
from common.sharded import copy_part, is_sharded, part, whole
from configurator import require

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
    are stacked and orthogonalized together, in a few batched products.

    Several ranks divide the matrices. Where each rank has whole parameters, the ranks exchange their results. Where
    parameters are sharded, so is the momentum, and a rank holds only its own share of the matrices whole, during the
    step. Under hsdp each copy of the model does all the work for itself, so the copies exchange nothing.
    """

    def __init__(self, groups, lr, betas, row_splits=None, ranks=ALONE, dtype=torch.float32):
        """The optimizer of several groups of parameters.

        groups: as for AdamW; those with 'momentum' hold matrices only.
        lr, betas: of all groups that do not set their own.
        row_splits: {matrix: [rows, rows, …]} for matrices that are treated as several, stacked on top of one another.
        ranks: Ranks that all have the same parameters and gradients. Sharded parameters know their ranks themselves.
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
        parameters = [p for p in group['params'] if p.grad is not None]
        if not parameters:
            return
        # ranks take them in turn: by size, as in the model's order one rank could get the large ones of all layers
        parameters.sort(key=lambda p: p.numel(), reverse=True)
        for p in parameters:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        weights = [part(p) for p in parameters]
        gradients = [part(p.grad) for p in parameters]
        momenta = [part(self.state[p]['momentum']) for p in parameters]
        decay = group['lr'] * group['weight_decay']
        keep = None if found_inf is None else (found_inf == 0).to(weights[0].device)
        if keep is not None:  # the momentum in place of the gradient leaves the momentum unchanged
            gradients = [torch.where(keep, g, m) for g, m in zip(gradients, momenta)]
        torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
        directions = list(torch._foreach_lerp(gradients, momenta, group['momentum']))  # Nesterov momentum
        if is_sharded(parameters[0]):
            self.orthogonalize_shards(parameters, directions)
        else:
            self.orthogonalize_copies(parameters, directions)
        if keep is not None:
            torch._foreach_mul_(directions, keep.float())
            decay = decay * keep
        if group['weight_decay']:
            torch._foreach_mul_(weights, 1 - decay)
        torch._foreach_add_(weights, directions, alpha=-group['lr'])

    def orthogonalize_copies(self, parameters: list, directions: list):
        """Orthogonalize directions that all ranks hold, in place. Each rank does a share and sends it to the others."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        self.orthogonalize_each(parameters[rank::world_size], directions[rank::world_size])
        if world_size > 1:
            all_gather([directions[r::world_size] for r in range(world_size)], rank)

    def orthogonalize_shards(self, parameters: list, directions: list):
        """Orthogonalize directions of which each rank holds some rows, in place.

        Each rank gathers the rows of its share of the matrices, and then sends the new rows back. With cpu_offload the
        rows are on the host, and are exchanged and worked on by the device of the mesh.
        """
        mesh = parameters[0].device_mesh
        group = mesh.get_group(mesh.ndim - 1)  # the ranks that hold one copy of the model together
        rank, world_size = group.rank(), group.size()
        parts = [d.to(mesh.device_type) for d in directions]
        matrices = [parts[0].new_empty(p.shape) for p in parameters[rank::world_size]]
        rows = [[*m.chunk(world_size), *[m[:0]] * world_size] for m in matrices]  # if few, the last ranks have none
        rows_from = [[blocks[r] for blocks in rows] for r in range(world_size)]  # rank r's rows of our matrices
        parts_for = [parts[r::world_size] for r in range(world_size)]  # our rows of rank r's matrices
        all_to_all(parts_for, rows_from, group)
        self.orthogonalize_each(parameters[rank::world_size], matrices)
        all_to_all(rows_from, parts_for, group)
        for direction, new in zip(directions, parts):
            direction.copy_(new)  # torch skips this unless it was moved

    def orthogonalize_each(self, parameters: list, directions: list):
        """Orthogonalize the directions of whole parameters, in place, and scale them by their shape."""
        by_shape = {}  # (m, n), m <= n -> the matrices of that shape or transposed
        for p, direction in zip(parameters, directions):
            for matrix in direction.split(self.row_splits.get(p, len(p))):
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        for shape, matrices in by_shape.items():
            stack = torch.stack([m if m.shape == shape else m.t() for m in matrices])  # (N, m, n)
            for matrix, result in zip(matrices, orthogonalize(stack, self.dtype)):
                result = result if matrix.shape == shape else result.t()
                torch.mul(result, max(1, len(matrix) / matrix.size(1)) ** 0.5, out=matrix)


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
    """One step of any torch optimizer, unless `skip`, a bool tensor on the device that computes gradients, is True.

    On CUDA, an optimizer whose kernel takes `found_inf` decides on the device, so that the host need not wait for
    `skip`. With all others the host waits, on MPS, whose kernel accepts found_inf but ignores it, and where cpu_offload
    keeps the parameters on the host: torch would copy found_inf there without waiting for it.
    """
    parameter = next(p for group in optimizer.param_groups for p in group['params'])
    if parameter.device.type == 'cuda' and getattr(optimizer, '_step_supports_amp_scaling', False):
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skip:
        optimizer.step()


def training_step(model, batch, optimizer, scaler, device: torch.device, dtype: torch.dtype, grad_clip: float = 0.0):
    """One whole step on one batch, as train.py makes it of a micro-batch -> the loss before the step, a 0-d tensor.

    For measuring and checking; train.py's loop has more to do. The step is skipped if loss or gradient is NaN or
    infinite. batch: x and y, (B, T) each, and starts (B, T) if documents are masked. scaler: a torch.amp.GradScaler.
    """
    with autocast(device, dtype):
        loss = model(*batch, with_logits=False)[1]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients([p for group in optimizer.param_groups for p in group['params']], grad_clip)
    step_unless(~(grad_norm.isfinite() & loss.detach().isfinite()), optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.detach()


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict):
    """Load the buffers of a saved state_dict from an untrusted file; the hyperparameters stay those of this run.

    Of a sharded parameter's buffers, whole ones are sharded likewise, and sharded ones taken as they are.
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
        state[number] = {name: shard_like(p, buffer) for name, buffer in buffers.items()}
    optimizer.load_state_dict({'state': state, 'param_groups': ours})


def shard_like(parameter: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Shard a whole buffer as its parameter is. Other buffers, such as AdamW's 'step', are returned as they are."""
    whole_ones = torch.is_tensor(buffer) and buffer.shape == parameter.shape and not is_sharded(buffer)
    if not (is_sharded(parameter) and whole_ones):
        return buffer
    sharded = torch.zeros_like(parameter)
    copy_part(sharded, buffer)
    return sharded


# --- parameter groups: what --optimizer= selects ----------------------------------------------------------------------


def check_optimizer(config: dict):
    """UserError if settings of the optimizer or its schedule cannot work; a warning if they can hardly be meant."""
    schedule = 'max_iters learning_rate muon_learning_rate min_lr warmup_iters lr_decay_iters cooldown_iters'
    require(config, f'{schedule} weight_decay grad_clip', 'a number of at least 0', lambda v: 0 <= v < math.inf)
    require(config, 'beta1 beta2 muon_momentum', 'in [0, 1)', lambda v: 0 <= v < 1)
    require(config, 'optimizer', ' or '.join(map(repr, OPTIMIZERS)), lambda v: v in OPTIMIZERS)
    learning_rate, min_lr = config['learning_rate'], config['min_lr']
    max_iters, warmup_iters = config['max_iters'], config['warmup_iters']
    if config['optimizer'] == 'muon' and not learning_rate:
        reason = 'Muon follows the schedule of AdamW, which must have one; choose a rate above 0'
        raise UserError(f'--learning_rate=0: {reason}')
    if config['eval_only'] or not config['decay_lr']:
        return
    if 0 < learning_rate < min_lr:
        warn(f'--learning_rate={learning_rate} is below --min_lr={min_lr}: it will grow where it should decay')
    if 0 < max_iters < warmup_iters:
        warn(f'{warmup_iters=} is longer than the run of {max_iters=}: the learning rate will not be reached')


def make_optimizer(model, config: dict, ranks: Ranks = ALONE, dtype=torch.float32) -> torch.optim.Optimizer:
    """The optimizer of a run, over all trainable parameters; 'initial_lr' of each group is its highest learning rate.

    model: already sharded, if it is to be, as fully_shard replaces the parameters.
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
    row_splits = {}  # c_attn's weight is three matrices, queries', keys' and values': Muon works on each alone
    for name, p in hidden.items():
        if name.endswith('c_attn.weight'):
            q = hidden[name.replace('c_attn', 'c_proj')].size(1)  # as many rows as heads have channels together
            row_splits[p] = [q, (len(p) - q) // 2, (len(p) - q) // 2]
    betas = (config['beta1'], config['beta2'])
    iteration_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return Muon(groups, config['learning_rate'], betas, row_splits, ranks, iteration_dtype)


# Choices of --optimizer=: (named parameters, settings, ranks, dtype) -> torch.optim.Optimizer. A new one is one line.
OPTIMIZERS = {'adamw': adamw, 'muon': muon}


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


def clip_gradients(parameters: list, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most max_norm; 0: leave them -> the norm before, a 0-d tensor.

    A collective where parameters are sharded: the norm is that of the whole gradients, the same on all ranks.
    """
    foreach = True if is_sharded(parameters[0]) else None  # torch would take sharded tensors one by one, which is slow
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf, foreach=foreach))


def update_ratio(weight: torch.Tensor, before: torch.Tensor) -> float:
    """Norm of a weight's change in a step over the norm of the weight before; about 1e-3 in a healthy run.

    Waits for the device. A collective where they are sharded.
    """
    return (whole((weight.detach() - before).norm()) / whole(before.norm())).item()


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

    def require_fewer_skipped(self, most):
        """UserError if there were `most` NaN or infinite steps in a row. The host waits for an accelerator here."""
        if self.longest >= most:
            raise UserError(
                f'loss or gradient was NaN or infinite in {int(self.longest)} iterations in a row: lower '
                '--learning_rate, raise --warmup_iters, or use --dtype=float32, and continue from the last save with '
                '--init_from=resume'
            )

    def since_last_line(self, seconds):
        """seconds: of training until now -> part of the log's record: means over the steps since the last call.

        Every rank must call it, see update_ratio.
        """
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
