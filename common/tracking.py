"""The log of a run: each record, a dict of numbers, goes to the console, to metrics.jsonl and to the chosen trackers.

The record of an iteration has 'iter' and 'loss', that of an evaluation 'iter', 'val/loss' and, if asked for,
'train/loss', nanoGPT's names in wandb; a record of samples has 'iter' and 'samples', a list of texts. Iterations count
from 0; an evaluation or samples at n come after n iterations.
"""

import importlib.util
import json
import math
import os
import sys
from contextlib import suppress

from common.checkpoint import set_aside
from common.errors import UserError, one_line, say, user_errors, warn
from common.files import written_whole
from common.trackers import TRACKERS, Tracker

FILE = 'metrics.jsonl'


class Console(Tracker):
    """A line for each record, always."""

    def log(self, record):
        if 'loss' in record:
            mfu = 'unknown' if record['mfu'] is None else f'{100 * record["mfu"]:.1f}%'
            say(
                f'iter {record["iter"]}: loss {record["loss"]:.4f}, time {record["time_ms"]:.2f}ms, mfu {mfu}, '
                f'lr {record["lr"]:.2e}, norm {record["grad_norm"]:.2f}, clipped {100 * record["clipped"]:.0f}%, '
                f'update/weight {record["update_ratio"]:.1e}, {record["tokens_per_s"]:,.0f} tok/s, '
                f'{duration(record["left_s"])} left'
            )
        elif 'val/loss' in record:
            say(evaluation_line(record))
        elif 'samples' in record:
            for text in record['samples']:
                say(f'step {record["iter"]}, a sample:\n{text}\n---------------')
        else:
            say(f'step {record["iter"]}:', ', '.join(f'{k} {v}' for k, v in record.items() if k != 'iter'))


class JsonLines(Tracker):
    """out_dir/metrics.jsonl, always: the run's own record. The run ends if it cannot be written."""

    def start(self, config, out_dir, saved, resumed_at):
        path = os.path.join(out_dir, FILE)
        with user_errors(OSError, where=f'cannot write {path}: '):
            self.file = open(path, 'a', encoding='utf-8', newline='', buffering=1)  # each line reaches the file at once

    def log(self, record):
        self.file.write(to_json(record) + '\n')

    def finish(self):
        self.file.close()


def chosen_trackers(config: dict) -> list[str]:
    """The names of the trackers that the settings choose. UserError if one is unknown, or its package is missing."""
    names = list(dict.fromkeys((*config['trackers'], *(['wandb'] if config['wandb_log'] else []))))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f'--trackers={name}: unknown; use {", ".join(TRACKERS)}')
        package = TRACKERS[name].package
        found = importlib.util.find_spec(package) if package else None
        if package and not (found and found.origin):  # a folder of the same name, such as wandb/, has no origin
            setting = f'--trackers={name}' if name in config['trackers'] else '--wandb_log=True'
            raise UserError(f'{setting} needs the package {package}: pip install {package}, or leave it out')
    return names


def saved_trackers(checkpoint: dict) -> dict:
    """The states of the trackers in a checkpoint -> {name: state}. Older checkpoints have at most a wandb id."""
    older = {'wandb': {'id': checkpoint['wandb_id']}} if checkpoint.get('wandb_id') else {}
    return older | checkpoint.get('trackers', {})


def start_trackers(config: dict, out_dir: str, saved=None, resumed_at=None, evaluated_at=None) -> 'Tracking':
    """Start or continue the chosen trackers, on the main rank only. UserError if one cannot start.

    saved: from saved_trackers(). resumed_at: the iteration at which a resumed run continues, None for a new run.
    evaluated_at: its last evaluation. Later records are dropped from metrics.jsonl, as they will be repeated.
    """
    names, saved, hook = chosen_trackers(config), dict(saved or {}), sys.excepthook
    kept = [] if resumed_at is None else drop_later_records(out_dir, resumed_at, evaluated_at)
    always, chosen = [JsonLines(), Console()], {name: TRACKERS[name]() for name in names}
    files_set_aside = resumed_at is not None  # late: a tracker that cannot start leaves the earlier run in place
    for name, tracker in sorted(chosen.items(), key=lambda item: item[1].in_out_dir):
        if tracker.in_out_dir and not files_set_aside:
            files_set_aside = set_earlier_run_aside(out_dir)
        try:
            first = tracker.start(config, out_dir, saved.get(name), resumed_at)
            for record in kept:
                if first is not None and record['iter'] >= first:
                    tracker.log(record)
        except Exception as error:  # no account, no network, no permission, a broken package
            raise UserError(f'{name} cannot start ({reason(error)}): {tracker.advice}or leave it out') from error
        finally:
            sys.excepthook = hook  # wandb's own shows a user's mistake as a traceback
    if not files_set_aside:
        set_earlier_run_aside(out_dir)
    for tracker in always:
        tracker.start(config, out_dir, None, resumed_at)
    return Tracking(always, chosen, saved)


class Tracking:
    """All trackers of a run: those that are always on, and those chosen, without which the run can continue."""

    def __init__(self, always, chosen, saved):
        self.always, self.chosen, self.saved = always, chosen, saved

    def log(self, record: dict):
        """Report a record; the top of this file says what is in it."""
        for tracker in self.always:
            tracker.log(record)
        for name in list(self.chosen):
            self.attempt(name, 'log', record)

    def state(self) -> dict:
        """{name: plain data} for the checkpoint, including trackers that failed or were not chosen this time."""
        for name in list(self.chosen):
            self.saved[name] = self.attempt(name, 'state') or self.saved.get(name)
        return dict(self.saved)

    def finish(self):
        """The run has ended."""
        for tracker in self.always:
            tracker.finish()
        for name in list(self.chosen):
            self.attempt(name, 'finish')

    def attempt(self, name, method, *arguments):
        """Call a method of a chosen tracker and return its result. One that fails, as on a full disk, is dropped."""
        try:
            return getattr(self.chosen[name], method)(*arguments)
        except Exception as error:
            del self.chosen[name]
            warn(f'{name} failed, the run continues without it: {reason(error)}')


class NoTracking(Tracking):
    """For ranks other than the main one, and for --eval_only."""

    def __init__(self):
        super().__init__([], {}, {})


def set_earlier_run_aside(out_dir):
    """Move the files of an earlier run in out_dir to a folder of their own, and say where -> True."""
    folder = set_aside(out_dir)
    if folder:
        say(f'{out_dir} holds an earlier run, moved to {folder}')
    return True


def drop_later_records(out_dir, resumed_at, evaluated_at):
    """Drop the records of metrics.jsonl that a resumed run will repeat -> the records that remain."""
    path = os.path.join(out_dir, FILE)
    if not os.path.exists(path):
        return []

    def stays(record):  # an evaluation, samples or benchmarks at the very iteration of the save came before it
        reported = evaluated_at == resumed_at if 'val/loss' in record else 'loss' not in record
        return record['iter'] < resumed_at + reported

    with user_errors(OSError, where=f'cannot write {path}: '):
        records = [record for record in read_metrics(path) if stays(record)]
        with written_whole(path, 'w') as file:
            file.writelines(to_json(record) + '\n' for record in records)
    return records


def append_record(out_dir: str, record: dict):
    """Append a record to the metrics.jsonl of a run that may be under way. UserError if it cannot be written."""
    path = os.path.join(out_dir, FILE)
    with user_errors(OSError, where=f'cannot write {path}: '), open(path, 'a', encoding='utf-8', newline='') as file:
        file.write(to_json(record) + '\n')


def to_json(record):
    """The record on one line, floats to 7 digits; JSON has no NaN and no infinity, they become null."""
    return json.dumps(
        {
            key: value if not isinstance(value, float) else float(f'{value:.7g}') if math.isfinite(value) else None
            for key, value in record.items()
        }
    )


def read_metrics(path: str) -> list[dict]:
    """The records in a metrics.jsonl, in order. Invalid lines, such as one cut short by a crash, are skipped."""
    records = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if is_record(record):
                    records.append(record)
    return records


def is_record(value):
    """Is this a dict of numbers or None, with an 'iter', and with a list of texts if it has 'samples'?"""
    if not isinstance(value, dict) or not isinstance(value.get('iter'), int):
        return False
    numbers, texts = [value[key] for key in value if key != 'samples'], value.get('samples', [])
    return (
        all(isinstance(number, (int, float, type(None))) for number in numbers)
        and isinstance(texts, list)
        and all(isinstance(text, str) for text in texts)
    )


def evaluation_line(record: dict) -> str:
    """The line of an evaluation, with the bits per byte and the scores on benchmarks if they are known."""
    bits = record.get('val/bits_per_byte')
    scores = {key: value for key, value in record.items() if '/' in key and not key.startswith(('train/', 'val/'))}
    train = f'train loss {record["train/loss"]:.4f}, ' if 'train/loss' in record else ''
    return (
        f'step {record["iter"]}: {train}val loss {record["val/loss"]:.4f}'
        f'{"" if bits is None else f", {bits:.4f} bits per byte"}'
        + ''.join(f', {key} {"?" if value is None else f"{value:.4f}"}' for key, value in scores.items())
    )


def reason(error):
    """Why something failed, on one line."""
    return one_line(str(error) or type(error).__name__, 120)


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
