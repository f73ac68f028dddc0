"""Draw the loss curves of one or more runs, from their metrics.jsonl, into a PNG.

python tools/plot.py --runs=out-a,out-b --output=loss.png --title="Two learning rates"
"""

import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.errors import UserError, user_errors
from common.figure import new_figure, save_figure
from common.tracking import FILE, read_metrics
from configurator import configure, require

runs = 'out'  # the runs' folders, separated by commas
output = ''  # PNG to write; '': loss.png in the first run's folder
title = ''  # printed above the plot
x = 'iter'  # horizontal axis: 'iter' for iterations, 'seconds' for training time
config = configure(globals(), paths=('output',))

require(config, 'x', "'iter' or 'seconds'", lambda v: v in ('iter', 'seconds'))
folders = [os.path.expanduser(folder.strip()) for folder in runs.split(',') if folder.strip()]
if not folders:
    raise UserError("--runs=: name at least one run's folder")
output = output or os.path.join(folders[0], 'loss.png')
if not output.endswith('.png'):
    raise UserError(f'--output={output}: must end in .png')


def read_run(folder):
    """A run's metrics -> (records of iterations, records of evaluations). UserError if there are none with a loss."""
    path = os.path.join(folder, FILE)
    with user_errors(OSError, where=f'cannot read {path}, train first or check --runs: '):
        records = read_metrics(path)
    iterations = [r for r in records if None not in (r.get('loss'), r.get('time_ms'))]
    evaluations = [r for r in records if r.get('val/loss') is not None]
    if not iterations and not evaluations:
        raise UserError(f'{path} holds no losses yet: train on')
    return iterations, evaluations


def training_seconds(iterations):
    """Seconds of training up to each logged iteration; its time_ms is the mean since the last one logged."""
    seconds, total, previous = [], 0.0, -1
    for record in iterations:
        total += (record['iter'] - previous) * record['time_ms'] / 1000
        previous = record['iter']
        seconds.append(total)
    return seconds


def seconds_at(iteration, iterations, seconds):
    """Seconds of training at an evaluation: those of the last iteration logged before it."""
    return max((s for record, s in zip(iterations, seconds) if record['iter'] < iteration), default=0.0)


axes = new_figure('iterations' if x == 'iter' else 'training time (s)', 'loss (nats per token)', title)
for n, folder in enumerate(folders):
    iterations, evaluations = read_run(folder)
    # The name goes to the end of a label: matplotlib leaves out labels that begin with an underscore.
    name = f', {os.path.basename(os.path.normpath(folder))}' if len(folders) > 1 else ''
    color = f'C{n}'
    if x == 'seconds':
        iteration_x = training_seconds(iterations)
        evaluation_x = [seconds_at(r['iter'], iterations, iteration_x) for r in evaluations]
    else:
        iteration_x = [r['iter'] for r in iterations]
        evaluation_x = [r['iter'] for r in evaluations]
    losses = [r['loss'] for r in iterations]
    axes.plot(iteration_x, losses, color=color, alpha=0.3, linewidth=0.8, label=f'batch of a logged iteration{name}')
    if evaluations:
        train, val = ([r.get(key) for r in evaluations] for key in ('train/loss', 'val/loss'))
        if any(loss is not None for loss in train):  # --eval_train=True
            train = [math.nan if loss is None else loss for loss in train]
            axes.plot(evaluation_x, train, color=color, linestyle='--', label=f'train{name}')
        label = f'val (lowest {min(val):.4f}){name}'
        axes.plot(evaluation_x, val, color=color, marker='o', markersize=3, label=label)
save_figure(axes, output)
