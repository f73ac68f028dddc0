"""Draw the loss curves of one or more runs, from their metrics.jsonl, into a PNG.

python tools/plot.py --runs=out-a,out-b --output=loss.png --title="Two learning rates"
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.errors import UserError, user_errors
from common.tracking import FILE, read_metrics
from configurator import configure, require

runs = 'out'  # the runs' folders, with commas between
output = ''  # the PNG to write; loss.png in the first run's folder unless given
title = ''  # above the plot
x = 'iter'  # along the horizontal axis: 'iter' for updates, 'seconds' for training time
config = configure(globals(), paths=('output',))

require(config, lambda v: v in ('iter', 'seconds'), "'iter' or 'seconds'", 'x')
try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws to files, needs no screen
    from matplotlib.figure import Figure
except ImportError as error:
    raise UserError('plotting needs the package matplotlib: pip install matplotlib') from error


def training_seconds(updates):
    """Seconds of training up to each logged update. A line of the log tells the mean time of the updates since the last."""
    seconds, total, previous = [], 0.0, -1
    for record in updates:
        total += (record['iter'] - previous) * record['time_ms'] / 1000
        previous = record['iter']
        seconds.append(total)
    return seconds


def seconds_at(iteration, updates, seconds):
    """Training seconds at an evaluation: those of the last update logged before it."""
    return max((s for record, s in zip(updates, seconds) if record['iter'] < iteration), default=0.0)


folders = [os.path.expanduser(folder.strip()) for folder in runs.split(',') if folder.strip()]
if not folders:
    raise UserError("--runs=: name at least one run's folder")
output = output or os.path.join(folders[0], 'loss.png')
if not output.endswith('.png'):
    raise UserError(f'--output={output}: must end in .png')
figure = Figure(figsize=(8, 5), dpi=120)
FigureCanvasAgg(figure)
axes = figure.add_subplot()
for n, folder in enumerate(folders):
    with user_errors(OSError, where=f'cannot read {os.path.join(folder, FILE)}, train first or check --runs: '):
        records = read_metrics(os.path.join(folder, FILE))
    updates = [r for r in records if None not in (r.get('loss'), r.get('time_ms'))]
    evaluations = [r for r in records if None not in (r.get('train/loss'), r.get('val/loss'))]
    if not updates and not evaluations:
        raise UserError(f'{os.path.join(folder, FILE)} holds no losses yet: train on')
    label, color = f', {os.path.basename(os.path.normpath(folder))}' if len(folders) > 1 else '', f'C{n}'
    if x == 'seconds':
        seconds = training_seconds(updates)
        update_x, evaluation_x = seconds, [seconds_at(r['iter'], updates, seconds) for r in evaluations]
    else:
        update_x, evaluation_x = [r['iter'] for r in updates], [r['iter'] for r in evaluations]
    axes.plot(
        update_x,
        [r['loss'] for r in updates],
        color=color,
        alpha=0.3,
        linewidth=0.8,
        label=f'batch of each logged update{label}',
    )
    if evaluations:
        best = min(r['val/loss'] for r in evaluations)
        axes.plot(
            evaluation_x, [r['train/loss'] for r in evaluations], color=color, linestyle='--', label=f'train{label}'
        )
        axes.plot(
            evaluation_x,
            [r['val/loss'] for r in evaluations],
            color=color,
            marker='o',
            markersize=3,
            label=f'val (lowest {best:.4f}){label}',
        )
axes.set_xlabel('updates' if x == 'iter' else 'training time (s)')
axes.set_ylabel('loss (nats a token)')
axes.set_title(title, parse_math=False)
axes.grid(alpha=0.3)
for text in axes.legend().get_texts():
    text.set_parse_math(
        False
    )  # a folder may have $ in its name; at the end of the label, as those that begin with _ are left out
figure.tight_layout()
with user_errors(OSError, ValueError, where=f'cannot write {output}: '):
    figure.savefig(output)
print(f'wrote {output}')
