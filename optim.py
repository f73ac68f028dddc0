"""How weights move: parameter groups, the optimizer, the learning rate's schedule."""
import math

import torch


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) by torch's fused kernel: one call a group, whatever the number of tensors.

    The arithmetic and the state_dict are those of torch.optim.AdamW(fused=True); what is left out is torch.optim.Optimizer around
    it, which imports the compiler whether it is used or not, over a second of every start. GradScaler takes this in its place.
    """

    def __init__(self, groups, lr, betas, eps=1e-8):
        """groups: dicts with 'params', float32 tensors of one device, and 'weight_decay'."""
        self.param_groups = [{'lr': lr, 'betas': betas, 'eps': eps, **group} for group in groups]
        self.state = {p: {'step': torch.zeros((), device=p.device), 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
                      for p in self.parameters()}

    def parameters(self):
        """All parameters, in the order of the groups."""
        return [p for group in self.param_groups for p in group['params']]

    @torch.no_grad()
    def step(self):
        """One update from the gradients in .grad; parameters without one stay."""
        for group in self.param_groups:
            parameters = [p for p in group['params'] if p.grad is not None]
            buffers = [self.state[p] for p in parameters]
            steps, means, squares = ([buffer[name] for buffer in buffers] for name in ('step', 'exp_avg', 'exp_avg_sq'))
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group['betas']
            torch._fused_adamw_(parameters, [p.grad for p in parameters], means, squares, [], steps, lr=group['lr'],
                                beta1=beta1, beta2=beta2, weight_decay=group['weight_decay'], eps=group['eps'],
                                amsgrad=False, maximize=False)

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
            buffers = state.get(number, {'step': torch.tensor(0.0), 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)})
            if not isinstance(buffers, dict) or not self.state[p].keys() <= buffers.keys():
                raise ValueError(f'the buffers of parameter {number} are not those of AdamW')
            for name, ours in self.state[p].items():
                if not torch.is_tensor(buffers[name]) or buffers[name].shape != ours.shape:
                    raise ValueError(f'{name} of parameter {number} is not a tensor of {tuple(ours.shape)}')
                ours.copy_(buffers[name])


def make_optimizer(model, learning_rate, weight_decay, betas):
    """AdamW over two groups: matrices and embeddings decay, biases and gains do not.

    The order of groups and parameters is nanoGPT's, so that the optimizer state in its checkpoints fits.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied matrix appears once
    groups = [
        {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]
    assert sum(len(group['params']) for group in groups) == len(parameters)
    return AdamW(groups, lr=learning_rate, betas=betas)


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """Learning rate of update `step` (from 0): a linear warm-up, then half a cosine down to min_lr at lr_decay_iters
    (Loshchilov and Hutter 2017, eq. 5, without restarts), then min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # in [0, 1): lr_decay_iters > step >= warmup_iters
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def update_ratio(weight, before):
    """Norm of an update over the norm of the weight that it changed, a float: about 1e-3 in a healthy run. A sync point."""
    return (torch.dist(weight.detach(), before) / before.norm()).item()
