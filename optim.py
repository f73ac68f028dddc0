"""How weights move: parameter groups, the optimizer, the learning rate's schedule."""
import math

import torch


def make_optimizer(model, learning_rate, weight_decay, betas, device_type):
    """AdamW (Loshchilov and Hutter 2019) over two groups: matrices and embeddings decay, biases and gains do not.

    The order of groups and parameters is nanoGPT's, so that the optimizer state in its checkpoints fits.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied matrix appears once
    groups = [
        {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]
    assert sum(len(group['params']) for group in groups) == len(parameters)
    fused = device_type in ('cuda', 'cpu')  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """Learning rate of update `step` (from 0): a linear warm-up, then half a cosine down to min_lr at lr_decay_iters
    (Loshchilov and Hutter 2017, eq. 5, without restarts), then min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # in [0, 1): lr_decay_iters > step >= warmup_iters
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def load_optimizer_state(optimizer, saved):
    """Put the buffers of a saved state_dict into the optimizer; its hyperparameters stay as this run has set them.

    Raises ValueError if the buffers belong to other parameters, or are none of AdamW's.
    """
    if not (isinstance(saved['state'], dict) and all(isinstance(group, dict) and 'params' in group for group in saved['param_groups'])):
        raise ValueError('it holds no state and groups of parameters')
    fresh = optimizer.state_dict()
    counts = [[len(group['params']) for group in state['param_groups']] for state in (fresh, saved)]
    if counts[0] != counts[1]:
        raise ValueError(f'the saved optimizer has groups of {counts[1]} parameters, the model of {counts[0]}')
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    for index, buffers in saved['state'].items():
        if index not in range(len(parameters)) or not isinstance(buffers, dict) or buffers.keys() != {'step', 'exp_avg', 'exp_avg_sq'}:
            raise ValueError(f'the buffers of parameter {index} are not those of AdamW')
        for name, shape in (('step', ()), ('exp_avg', parameters[index].shape), ('exp_avg_sq', parameters[index].shape)):
            if not torch.is_tensor(buffers[name]) or buffers[name].shape != shape:
                raise ValueError(f'{name} of parameter {index} is not a tensor of {tuple(shape)}')
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': fresh['param_groups']})


def update_ratio(weight, before):
    """Norm of an update over the norm of the weight that it changed, a float: about 1e-3 in a healthy run. A sync point."""
    return (torch.dist(weight.detach(), before) / before.norm()).item()
