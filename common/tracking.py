"""What a run reports. One record, a dict of numbers, goes to the console, to out_dir/metrics.jsonl and to wandb alike.

A record of an update has 'iter' and 'loss', one of an evaluation 'iter', 'train/loss' and 'val/loss', under the names that
nanoGPT gives them in wandb. 'iter' counts updates: record n of an update is the (n + 1)-th, an evaluation at n comes after n.
"""

import json
import math
import os

from common.errors import UserError, one_line, say, user_errors
from common.files import written_whole

FILE = 'metrics.jsonl'


class RunLog:
    """The log of the one rank that writes. `wandb_id` names the wandb run, so that a resumed run continues it."""

    def __init__(self, out_dir, wandb_run=None, resumed_at=None, evaluated_at=None):
        """wandb_run: from start_wandb, or None. resumed_at: the update at which a resumed run goes on, evaluated_at: its last
        evaluation; later records are dropped, they will come again. Raises UserError if the file cannot be written."""
        path = os.path.join(out_dir, FILE)
        with user_errors(OSError, where=f'cannot write {path}: '):
            if resumed_at is not None and os.path.exists(path):
                records = [
                    record
                    for record in read_metrics(path)
                    if (record['iter'] <= evaluated_at if 'val/loss' in record else record['iter'] < resumed_at)
                ]
                with written_whole(path, 'w') as file:
                    file.writelines(to_json(record) + '\n' for record in records)
            self.file = open(
                path, 'a', encoding='utf-8', newline='', buffering=1
            )  # every line reaches the file at once
        self.wandb = wandb_run
        self.wandb_id = wandb_run.id if wandb_run else None

    def update(self, record):
        """Report one update."""
        self.write(record)
        mfu = 'unknown' if record['mfu'] is None else f'{100 * record["mfu"]:.1f}%'
        say(
            f'iter {record["iter"]}: loss {record["loss"]:.4f}, time {record["time_ms"]:.2f}ms, mfu {mfu}, lr {record["lr"]:.2e}, '
            f'norm {record["grad_norm"]:.2f}, clipped {100 * record["clipped"]:.0f}%, update/weight {record["update_ratio"]:.1e}, '
            f'{record["tokens_per_s"]:,.0f} tok/s, {duration(record["left_s"])} left'
        )

    def evaluation(self, record):
        """Report one evaluation."""
        self.write(record)
        say(f'step {record["iter"]}: train loss {record["train/loss"]:.4f}, val loss {record["val/loss"]:.4f}')

    def write(self, record):
        self.file.write(to_json(record) + '\n')
        if self.wandb:
            self.wandb.log({key: value for key, value in record.items() if value is not None}, step=record['iter'])

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class NoLog:
    """The log of the ranks that only compute, and of a run that only evaluates."""

    wandb_id = None

    def update(self, record):
        pass

    def evaluation(self, record):
        pass

    def close(self):
        pass


def start_wandb(config, wandb_id):
    """Start, or continue, the wandb run that the settings describe. UserError if that cannot be done."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            '--wandb_log=True needs the package wandb: pip install wandb, or set --wandb_log=False'
        ) from error
    try:
        return wandb.init(
            project=config['wandb_project'],
            name=config['wandb_run_name'],
            config=dict(config),
            id=wandb_id,
            resume='allow' if wandb_id else None,
        )
    except Exception as error:  # no account, no network, no permission
        raise UserError(
            f'wandb cannot start ({one_line(str(error), 120)}): log in, set WANDB_MODE=offline, or set '
            '--wandb_log=False'
        ) from error


def to_json(record):
    """The record on one line, floats to 7 digits; JSON has no NaN and no infinity, they become null."""
    return json.dumps(
        {
            key: value if not isinstance(value, float) else float(f'{value:.7g}') if math.isfinite(value) else None
            for key, value in record.items()
        }
    )


def read_metrics(path):
    """The records in a metrics.jsonl, in order: dicts from text to numbers or None. Other lines are passed over, such as a last
    one that a crash cut short."""
    records = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if (
                isinstance(record, dict)
                and isinstance(record.get('iter'), int)
                and all(isinstance(value, (int, float, type(None))) for value in record.values())
            ):
                records.append(record)
    return records


def duration(seconds):
    """Seconds -> '42s', '3m07s', '2h05m', '4d03h'; '?' if not known."""
    if seconds is None or not math.isfinite(seconds):
        return '?'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f'{days}d{hours:02}h'
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'
