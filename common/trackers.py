"""Experiment trackers: wandb, TensorBoard, Trackio. A new one is a subclass of Tracker and a line in TRACKERS.

common/tracking.py describes the records.
"""

import atexit
import html
import os
import sqlite3
import textwrap
from contextlib import closing, suppress


class Tracker:
    """Receives every record on the main rank. A subclass needs no method but log()."""

    package = None  # the Python package that it needs
    advice = ''  # for the error line if it cannot start
    in_out_dir = False  # does it write into the run's folder?

    def start(self, config: dict, out_dir: str, saved: dict | None, resumed_at: int | None) -> int | None:
        """Start a run, or continue one.

        config: all settings.
        saved: the result of state() at the save that the run resumes from; None if the tracker was not in use then.
        resumed_at: the iteration at which the run continues, None for a new run.
        Returns the first iteration that the tracker does not have yet, or None if it has all: it then receives the
        later records of metrics.jsonl.
        """
        return 0

    def log(self, record: dict):
        """Report a record. After an exception the run continues without this tracker."""
        raise NotImplementedError

    def state(self) -> dict | None:
        """Plain data for the checkpoint, from which start() continues. Flushes the records logged so far."""

    def finish(self):
        """The run has ended; not called if it fails or is killed."""


class Wandb(Tracker):
    """Weights & Biases. A resumed run continues the same wandb run, by its id.

    Online, wandb knows its last step: later records are logged again, earlier ones skipped. wandb
    accepts nothing more for the last step of a finished run: if that run is extended, one iteration's loss is missing.
    Offline, each start writes a new folder in wandb/ that holds the whole run so far: sync the newest.
    """

    package = 'wandb'
    advice = 'log in, set WANDB_MODE=offline, '

    def start(self, config, out_dir, saved, resumed_at):
        import wandb

        self.html = wandb.Html
        self.run = wandb.init(
            project=config['wandb_project'],
            name=config['wandb_run_name'],
            config=dict(config),
            id=saved['id'] if saved else None,
            resume='allow' if saved else None,
        )
        atexit.register(self.fail)
        return self.run.starting_step  # 0 if it has none, as offline

    def log(self, record):
        if record['iter'] < self.run.starting_step:
            return
        row = known_values(record)
        if 'samples' in row:
            row['samples'] = self.html(f'<pre>{html.escape(row["samples"])}</pre>')
        self.run.log(row, step=record['iter'])

    def state(self):
        return {'id': self.run.id}

    def finish(self):
        atexit.unregister(self.fail)
        self.run.finish()

    def fail(self):
        """At exit without finish(): else wandb would list the run as successful."""
        with suppress(Exception):
            self.run.finish(exit_code=1)


class TensorBoard(Tracker):
    """Event files in out_dir/tensorboard. A resumed run adds a file that purges the steps after the save."""

    package = 'tensorboard'
    in_out_dir = True

    def start(self, config, out_dir, saved, resumed_at):
        from torch.utils.tensorboard import SummaryWriter

        folder = os.path.join(out_dir, 'tensorboard')
        self.newest = min(saved['newest'], resumed_at) if saved and os.path.isdir(folder) else 0
        self.writer = SummaryWriter(folder, purge_step=self.newest)
        return self.newest

    def log(self, record):
        self.newest = record['iter']
        for key, value in known_values(record).items():
            if key != 'iter':
                add = self.writer.add_text if key == 'samples' else self.writer.add_scalar
                add(key, value, self.newest)

    def state(self):
        self.writer.flush()
        return {'newest': self.newest}

    def finish(self):
        self.writer.close()


class Trackio(Tracker):
    """Trackio's database, in TRACKIO_DIR or ~/.cache/huggingface/trackio. A resumed run continues the same run.

    Steps after the save are deleted from the database. That is not possible in a Space, or where Trackio does not use
    SQLite, as on network disks: there a few steps are repeated or missing after a kill.
    """

    package = 'trackio'
    advice = 'set TRACKIO_DIR to a folder that can be written to, '

    def start(self, config, out_dir, saved, resumed_at):
        import trackio

        self.trackio = trackio
        self.place = saved or {'project': config['wandb_project'], 'name': config['wandb_run_name']}
        self.run = trackio.init(
            project=self.place['project'],
            name=self.place['name'],
            config=dict(config),
            resume='allow' if saved else 'never',
            embed=False,  # no dashboard
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        in_sqlite = not self.run.url and trackio.utils.get_storage_mode() == 'sqlite'
        if in_sqlite:
            trackio.SQLiteStorage.init_db(self.run.project)  # raises an error that log() would only warn of
        if not saved:
            self.place['id'] = self.run.id
            return 0
        self.run.id = saved['id']  # init() resumes the newest run of this name, maybe another one
        return self.forget(resumed_at) if in_sqlite else None

    def forget(self, resumed_at):
        """Delete the steps from resumed_at on; returns as start(). A kill may have lost the last half second too."""
        newest = self.trackio.SQLiteStorage.get_max_step_for_run(self.run.project, run_id=self.run.id)
        if newest is None:
            return 0
        path, first = self.trackio.SQLiteStorage.get_project_db_path(self.run.project), min(newest, resumed_at)
        with closing(sqlite3.connect(path)) as database, database:
            database.execute('DELETE FROM metrics WHERE run_id = ? AND step >= ?', (self.run.id, first))
        return first

    def log(self, record):
        row = known_values(record)
        if 'samples' in row:
            row['samples'] = self.trackio.Markdown(row['samples'])
        self.run.log(row, step=record['iter'])

    def state(self):
        return self.place

    def finish(self):
        self.trackio.finish()


def known_values(record):
    """The record without None, its samples as one Markdown text of indented blocks, which shows every character."""
    row = {key: value for key, value in record.items() if value is not None}
    if 'samples' in row:
        blocks = [textwrap.indent(text, '    ', lambda line: True) for text in row['samples']]
        row['samples'] = '\n\n---\n\n'.join(blocks)
    return row


TRACKERS = {'wandb': Wandb, 'tensorboard': TensorBoard, 'trackio': Trackio}  # values of --trackers=
