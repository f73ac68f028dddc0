"""How weights move: parameter groups, the optimizers, the learning rate's and the batch size's schedules."""
import math

import torch
import torch.distributed as dist

from runtime import Ranks

ALONE = Ranks()
# Newton-Schulz coefficients of Jordan et al. 2024: steep at zero, so that small singular values grow fast, and no closer to 1 than needed
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) by torch's fused kernel: one call a group, whatever the number of tensors.

    The arithmetic and the state_dict are those of torch.optim.AdamW(fused=True); what is left out is torch.optim.Optimizer around
    it, which imports the compiler whether it is used or not, over a second of every start. GradScaler takes this in its place.
    """

    def __init__(self, groups, lr, betas, eps=1e-8):
        """groups: dicts with 'params', float32 tensors of one device, and 'weight_decay'."""
        self.param_groups = [{'lr': lr, 'betas': betas, 'eps': eps, **group} for group in groups]
        self.state = {p: self.buffers_for(p, group) for group in self.param_groups for p in group['params']}

    def buffers_for(self, p, group):
        """What is remembered of a parameter in a group, before the first update."""
        return {'step': torch.zeros((), device=p.device), 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}

    def parameters(self):
        """All parameters, in the order of the groups."""
        return [p for group in self.param_groups for p in group['params']]

    @torch.no_grad()
    def step(self, skip=None):
        """One update from the gradients in .grad; parameters without one stay. skip: a tensor, True to change nothing after all,
        so that gradients which are not finite can be passed over without waiting for the device to tell."""
        if skip is not None and skip.device.type == 'cpu':  # where there is nothing to wait for
            if skip:
                return
            skip = None
        for group in self.param_groups:
            self.step_group(group, skip)

    def step_group(self, group, skip):
        parameters = [p for p in group['params'] if p.grad is not None]
        buffers = [self.state[p] for p in parameters]
        steps, means, squares = ([buffer[name] for buffer in buffers] for name in ('step', 'exp_avg', 'exp_avg_sq'))
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group['betas']
        found_inf = None if skip is None else skip.float()
        torch._fused_adamw_(parameters, [p.grad for p in parameters], means, squares, [], steps, lr=group['lr'],
                            beta1=beta1, beta2=beta2, weight_decay=group['weight_decay'], eps=group['eps'],
                            amsgrad=False, maximize=False, found_inf=found_inf)
        if skip is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def zero_grad(self):
        """Forget the gradients and give their memory back."""
        for p in self.parameters():
            p.grad = None

    def state_dict(self):
        """Buffers and hyperparameters, parameters by their number, as torch.optim writes them."""
        numbers = {p: number for number, p in enumerate(self.parameters())}
        return {'state': {numbers[p]: buffers for p, buffers in self.state.items()},
                'param_groups': [{**group, 'params': [numbers[p] for p in group['params']]} for group in self.param_groups]}

    def load_state_dict(self, saved):
        """Take over saved buffers; the hyperparameters stay as this run has set them.

        Raises ValueError if the buffers belong to other parameters, or are none of AdamW's.
        """
        state, groups = saved['state'], saved['param_groups']
        if not (isinstance(state, dict) and all(isinstance(group, dict) and isinstance(group.get('params'), list) for group in groups)):
            raise ValueError('it holds no state and groups of parameters')
        counts, ours = ([len(group['params']) for group in some] for some in (groups, self.param_groups))
        if counts != ours:
            raise ValueError(f'it is of groups of {counts} parameters, the model has {ours}')
        if not set(state) <= set(range(sum(counts))):
            raise ValueError('it has buffers of parameters that the model does not have')
        for number, p in enumerate(self.parameters()):
            buffers = state.get(number, {name: torch.zeros_like(ours) for name, ours in self.state[p].items()})
            if not isinstance(buffers, dict) or not self.state[p].keys() <= buffers.keys():
                raise ValueError(f'the buffers of parameter {number} are not those of {type(self).__name__}')
            for name, ours in self.state[p].items():
                if not torch.is_tensor(buffers[name]) or buffers[name].shape != ours.shape:
                    raise ValueError(f'{name} of parameter {number} is not a tensor of {tuple(ours.shape)}')
                ours.copy_(buffers[name])


class Muon(AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for groups with a 'momentum', AdamW for
    the rest.

    A matrix moves by the momentum of its gradient with all singular values made about 1. Matrices of one shape are stacked, so
    that their iterations are a few batched products; several ranks share a stack out and exchange what they computed.
    """

    def __init__(self, groups, lr, betas, ranks, dtype=torch.float32):
        """groups: as for AdamW, and some of matrices only with 'momentum' and 'rows': for each matrix the numbers of rows after
        which to cut it into matrices of their own. ranks: runtime.Ranks, of equal gradients. dtype: that the iteration runs in."""
        self.ranks, self.dtype = ranks, dtype
        super().__init__(groups, lr, betas)

    def buffers_for(self, p, group):
        return {'momentum': torch.zeros_like(p)} if 'momentum' in group else super().buffers_for(p, group)

    def step_group(self, group, skip):
        if 'momentum' not in group:
            return super().step_group(group, skip)
        shapes = {}  # (m, n), m <= n, to the matrices of that shape and their transposes: the iteration is the same
        for p, rows in zip(group['params'], group['rows']):
            if p.grad is not None:
                for matrix in zip(p.split(rows), p.grad.split(rows), self.state[p]['momentum'].split(rows)):
                    shapes.setdefault(tuple(sorted(matrix[0].shape)), []).append(matrix)
        for shape, matrices in shapes.items():
            weights, gradients, momenta = zip(*matrices)
            if skip is not None:
                gradients = [torch.where(skip, m, g) for g, m in zip(gradients, momenta)]  # which leaves the momentum as it is
            torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
            directions = torch._foreach_lerp(gradients, momenta, group['momentum'])  # Nesterov's: the gradient counts once more
            stack = self.orthogonalize(torch.stack([d if d.shape == shape else d.t() for d in directions]))  # (matrices, m, n)
            shrink = group['lr'] * group['weight_decay']
            if skip is not None:
                stack *= ~skip
                shrink = shrink * ~skip
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
        dist.all_gather_into_tensor(out, orthogonalize(padded[self.ranks.rank * share:][:share], self.dtype))
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


def make_optimizer(model, learning_rate, weight_decay, betas, kind='adamw', muon_learning_rate=0.02, muon_momentum=0.95,
                   ranks=ALONE, dtype=torch.float32):
    """The optimizer of a model. kind 'adamw': AdamW; 'muon': Muon for the matrices of the layers, AdamW for the rest.

    Matrices and embeddings decay, biases and gains do not. A group's learning rate is its 'lr_scale' times the run's. ranks and
    dtype: as for Muon, whose iteration runs in bfloat16 if that is the dtype of the run, in float32 otherwise.
    For AdamW, the order of groups and parameters is nanoGPT's, so that the optimizer state in its checkpoints fits.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a tied matrix appears once
    hidden = {p: name for name, p in named if kind == 'muon' and p.dim() == 2 and name.startswith('transformer.h.')}
    groups = [
        {'params': [p for _, p in named if p.dim() >= 2 and p not in hidden], 'weight_decay': weight_decay, 'lr_scale': 1.0},
        {'params': [p for _, p in named if p.dim() < 2], 'weight_decay': 0.0, 'lr_scale': 1.0},
    ]
    if kind == 'muon':
        rows = [qkv_rows(p) if name.endswith('c_attn.weight') else [len(p)] for p, name in hidden.items()]
        groups.append({'params': list(hidden), 'rows': rows, 'weight_decay': weight_decay, 'momentum': muon_momentum,
                       'lr_scale': muon_learning_rate / learning_rate})
    everything = [p for group in groups for p in group['params']]
    assert len(everything) == len(set(everything)) and set(everything) == {p for _, p in named}
    if kind == 'muon':
        return Muon(groups, learning_rate, betas, ranks, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return AdamW(groups, learning_rate, betas)


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
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # in [0, 1): lr_decay_iters > step >= warmup_iters
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def update_ratio(weight, before):
    """Norm of an update over the norm of the weight that it changed, a float: about 1e-3 in a healthy run. A sync point."""
    return (torch.dist(weight.detach(), before) / before.norm()).item()
