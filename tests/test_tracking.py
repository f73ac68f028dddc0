"""Trackers, against the real packages and what they store: a run that stops, resumes, is killed, resumes: one curve."""

import html
import importlib.util
import json
import os
import signal
import socket
import struct
import tempfile
import time

os.environ['TRACKIO_DIR'] = tempfile.mkdtemp(prefix='trackio-')  # before trackio is imported
os.environ['WANDB_ERROR_REPORTING'] = 'false'

import pytest
import torch
from conftest import TINY, Forked, metrics, run, run_forked, run_forked_ok, start, train_on_ranks, write_data

from common.errors import UserError
from common.trackers import TRACKERS, Tracker, Wandb
from common.tracking import chosen_trackers, read_metrics, saved_trackers
from loading import load_checkpoint

REAL = ['wandb', 'tensorboard', 'trackio']


def has(name):
    """Is the package installed? A folder of its name, such as the wandb/ of offline runs, is no package."""
    found = importlib.util.find_spec(name)
    return bool(found and found.origin)


ALL = [f'--trackers={name}' for name in REAL if has(name)]
needs_wandb, needs_tensorboard, needs_trackio = (pytest.mark.skipif(not has(n), reason=f'needs {n}') for n in REAL)


@pytest.fixture(scope='module', autouse=True)
def packages():
    """Imported once, for all forks."""
    for name, module in zip(REAL, ('wandb', 'torch.utils.tensorboard', 'trackio')):
        if has(name):
            importlib.import_module(module)


# --- what the packages have stored -> {key: [(step, value), …], as stored} -------------------------------------------


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / 'out' / 'tensorboard'), size_guidance={'scalars': 0, 'tensors': 0}).Reload()
    curves = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()['scalars']}
    if 'samples/text_summary' in events.Tags()['tensors']:
        texts = events.Tensors('samples/text_summary')
        curves['samples'] = [(e.step, e.tensor_proto.string_val[0].decode()) for e in texts]
    return curves


def read_trackio(folder, project=None):
    import trackio

    curves = {}
    for row in trackio.SQLiteStorage.get_logs(project or folder.name, run='r'):
        for key in row.keys() - {'step', 'timestamp', 'iter'}:
            value = row[key]['_value'] if key == 'samples' else row[key]
            curves.setdefault(key, []).append((row['step'], value))
    return curves


def wandb_records(path):
    """The records in a .wandb file: 7 bytes, then LevelDB's log: pieces in blocks of 32 KiB, 7 bytes before each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, records = path.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from('<IHB', data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(record))
            record = b''
    return records


def read_wandb(path):
    curves = {}
    for record in wandb_records(path):
        if record.WhichOneof('record_type') == 'history':
            row = {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if 'samples/path' in row:
                page = (path.parent / 'files' / row['samples/path']).read_text(encoding='utf-8')
                row['samples'] = html.unescape(page.split('<pre>')[1].split('</pre>')[0])
            for key in row.keys() - {'iter'}:
                if not key.startswith(('_', 'samples/')):
                    curves.setdefault(key, []).append((row['_step'], row[key]))
    return curves


def wandb_files(folder):
    return sorted((folder / 'wandb').glob('offline-run-*/run-*.wandb'))  # the time is in the folder's name


def expected(folder):
    """The same, from metrics.jsonl."""
    curves = {}
    for record in read_metrics(str(folder / 'out' / 'metrics.jsonl')):
        for key, value in record.items():
            if key != 'iter' and value is not None:
                curves.setdefault(key, []).append((record['iter'], value))
    return curves


def assert_same_curves(curves, wanted):
    assert curves.keys() == wanted.keys()
    for key, points in wanted.items():
        steps, values = zip(*curves[key])
        assert steps == tuple(step for step, _ in points), key
        assert all(a < b for a, b in zip(steps, steps[1:])), key
        if key != 'samples':
            assert values == pytest.approx([value for _, value in points], rel=2e-6), key
            continue
        for shown, (_, texts) in zip(values, points):
            blocks = [block.split('\n') for block in shown.split('\n\n---\n\n')]
            assert ['\n'.join(line[4:] for line in block) for block in blocks] == texts


# --- stopped, resumed, killed, resumed ------------------------------------------------------------------------------


def wait_until(folder, iteration):
    """Wait for a record of this iteration or a later one."""
    path, deadline = folder / 'out' / 'metrics.jsonl', time.monotonic() + 60
    while not path.exists() or max([r['iter'] for r in read_metrics(str(path))], default=-1) < iteration:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope='module')
def story(tmp_path_factory):
    """Ctrl-C in a terminal, a second run that is killed, a third one that ends -> the folder, what was seen."""
    folder = tmp_path_factory.mktemp('story')
    write_data(folder / 'data' / 'tiny')
    common = [
        *TINY,
        *ALL,
        f'--wandb_project={folder.name}',
        '--wandb_run_name=r',
        '--decay_lr=False',
        '--eval_interval=10',
    ]
    common += ['--max_iters=1000000', '--sample_interval=20']
    process = start('train.py', *common, cwd=folder, start_new_session=True)
    wait_until(folder, 24)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that the run has started, too
    output, errors = process.communicate(timeout=60)
    stopped = load_checkpoint(str(folder / 'out' / 'ckpt.pt'))['iter_num']

    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def note(*address):
        with open(folder / 'network.txt', 'a') as file:
            print(*address, file=file)

    def noting_connect(self, address):
        if self.family != socket.AF_UNIX:
            note(address)
        return connect(self, address)

    def noting_getaddrinfo(host, *arguments, **options):
        note(host)
        return getaddrinfo(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, 'connect', noting_connect)
        patch.setattr(socket, 'getaddrinfo', noting_getaddrinfo)
        killed = Forked('train.py', *common, '--init_from=resume', cwd=folder)
        wait_until(folder, (stopped + 29) // 10 * 10 + 4)  # some iterations after a save
        os.kill(killed.pid, signal.SIGKILL)
        killed.result()
        reached = read_metrics(str(folder / 'out' / 'metrics.jsonl'))[-1]['iter']
        saved = load_checkpoint(str(folder / 'out' / 'ckpt.pt'))['iter_num']
        end = reached + 10
        run_forked_ok('train.py', *common, '--init_from=resume', f'--max_iters={end}', cwd=folder)
    return folder, {
        'status': process.returncode,
        'output': output,
        'errors': errors,
        'stopped': stopped,
        'saved': saved,
        'reached': reached,
        'end': end,
    }


def test_ctrl_c_ends_a_tracked_run_as_any_other(story):
    _, seen = story
    assert seen['status'] == 130 and f'stopped after {seen["stopped"]} iterations, all saved' in seen['output']
    assert all(line.startswith('wandb: ') for line in seen['errors'].splitlines())


def test_metrics_jsonl_is_one_curve(story):
    folder, seen = story
    assert seen['stopped'] < seen['saved'] <= seen['reached'] < seen['end']
    steps, evaluations = metrics(folder / 'out')
    assert [r['iter'] for r in steps] == list(range(seen['end']))
    assert [r['iter'] for r in evaluations] == sorted({*range(0, seen['end'], 10), seen['end']})
    records = read_metrics(str(folder / 'out' / 'metrics.jsonl'))
    samples = {r['iter']: r['samples'] for r in records if 'samples' in r}
    assert {*range(20, seen['end'] + 1, 20)} - {seen['stopped']} <= samples.keys()  # a signal may leave them out
    assert all(len(texts) == 3 and all(len(text) == 200 for text in texts) for texts in samples.values())
    assert f'step 20, a sample:\n{samples[20][0]}\n---------------\n' in seen['output']


@needs_tensorboard
def test_tensorboard_is_one_curve(story):
    assert_same_curves(read_tensorboard(story[0]), expected(story[0]))


@needs_trackio
def test_trackio_is_one_curve(story):
    assert_same_curves(read_trackio(story[0]), expected(story[0]))


@needs_wandb
def test_wandb_is_one_curve(story):
    """Offline: the newest file holds the whole run, as a kill costs what wandb has not written by then."""
    folder, _ = story
    files = wandb_files(folder)
    assert len(files) == 3
    assert_same_curves(read_wandb(files[-1]), expected(folder))
    runs = [record.run for record in wandb_records(files[-1]) if record.WhichOneof('record_type') == 'run']
    assert {(run.project, run.display_name, run.run_id) for run in runs} == {(folder.name, 'r', files[0].stem[4:])}
    exits = [r.exit.exit_code for r in wandb_records(files[-1]) if r.WhichOneof('record_type') == 'exit']
    assert exits == [0]
    settings = {item.key: item.value_json for item in runs[0].config.update}
    assert settings['batch_size'] == '4'


def test_no_tracker_uses_the_network(story):
    assert not (story[0] / 'network.txt').exists()


def test_plots_pass_over_samples(story, tmp_path):
    pytest.importorskip('matplotlib')
    png = tmp_path / 'loss.png'
    run_forked_ok('tools/plot.py', f'--runs={story[0] / "out"}', f'--output={png}', cwd=tmp_path)
    assert png.exists()


# --- one at a time ----------------------------------------------------------------------------------------------------


@needs_tensorboard
@needs_trackio
@needs_wandb
def test_a_tracker_that_was_left_out_for_a_while(workspace):
    """It is told from metrics.jsonl what it lacks. So is one that is chosen late."""
    names = [f'--wandb_project={workspace.name}', '--wandb_run_name=r']
    run_forked_ok('train.py', *TINY, *names, '--trackers=tensorboard', '--max_iters=3', cwd=workspace)
    run_forked_ok('train.py', *TINY, *names, '--init_from=resume', '--max_iters=5', cwd=workspace)
    run_forked_ok('train.py', *TINY, *names, *ALL, '--init_from=resume', cwd=workspace)
    assert_same_curves(read_tensorboard(workspace), expected(workspace))
    assert_same_curves(read_trackio(workspace), expected(workspace))
    assert_same_curves(read_wandb(*wandb_files(workspace)), expected(workspace))


@needs_tensorboard
@needs_trackio
def test_another_run_of_the_same_name(workspace):
    """Trackio finds runs by name, ours go on by id. A new run in an old one's folder has nothing of its curves."""
    import trackio

    common = [
        *TINY,
        '--trackers=trackio',
        '--trackers=tensorboard',
        f'--wandb_project={workspace.name}',
        '--wandb_run_name=r',
    ]
    run_forked_ok('train.py', *common, '--max_iters=4', cwd=workspace)
    first = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['trackers']['trackio']['id']
    run_forked_ok('train.py', *common, '--max_iters=4', '--out_dir=other', cwd=workspace)
    run_forked_ok('train.py', *common, '--init_from=resume', '--wandb_run_name=r2', cwd=workspace)
    steps = [row['step'] for row in trackio.SQLiteStorage.get_logs(workspace.name, run_id=first) if 'loss' in row]
    assert steps == list(range(8))
    output = run_forked_ok('train.py', *common, '--max_iters=2', cwd=workspace)
    assert 'moved to out/previous-1' in output and (workspace / 'out' / 'previous-1' / 'tensorboard').exists()
    assert_same_curves(read_tensorboard(workspace), expected(workspace))


def test_older_checkpoints_know_their_wandb_run():
    assert saved_trackers({'wandb_id': 'abc'}) == {'wandb': {'id': 'abc'}}
    assert saved_trackers({'wandb_id': None}) == {} == saved_trackers({})
    assert saved_trackers({'wandb_id': 'abc', 'trackers': {'wandb': {'id': 'd'}}}) == {'wandb': {'id': 'd'}}


@needs_wandb
def test_wandb_online(monkeypatch):
    """Its service, which tests cannot reach, is played: it has the run up to step 5, which goes on at 7, or 4."""
    import wandb

    asked, rows = [], []

    class Run:
        starting_step = 6
        log = staticmethod(lambda row, step: rows.append((step, row)))
        finish = staticmethod(lambda exit_code=0: rows.append(exit_code))

    monkeypatch.setattr(wandb, 'init', lambda **options: asked.append(options) or Run())
    tracker = Wandb()
    config = {'wandb_project': 'p', 'wandb_run_name': 'r', 'batch_size': 4}
    assert tracker.start(config, 'out', {'id': 'abc'}, 7) == 6, 'what it lacks is told again'
    for n in range(4, 8):  # what it has and comes again is left out
        tracker.log({'iter': n, 'loss': float(n), 'mfu': None})
    tracker.finish()
    assert rows == [(6, {'iter': 6, 'loss': 6.0}), (7, {'iter': 7, 'loss': 7.0}), 0]
    assert asked == [{'project': 'p', 'name': 'r', 'config': config, 'id': 'abc', 'resume': 'allow'}]


@needs_wandb
def test_a_failed_run_is_told_as_such(workspace):
    """The same one line and exit status as without wandb, where the run is then listed as one that failed."""
    ruin = ['--learning_rate=1e39', '--decay_lr=False', '--grad_clip=0']
    result = run('train.py', *TINY, *ruin, '--wandb_log=True', cwd=workspace)
    mine = [line for line in result.stderr.splitlines() if not line.startswith('wandb: ')]
    assert result.returncode == 2 and len(mine) == 1 and mine[0].startswith('error: the validation loss is nan')
    exits = [r.exit.exit_code for r in wandb_records(*wandb_files(workspace)) if r.WhichOneof('record_type') == 'exit']
    assert exits and exits[-1] != 0


class Notes(Tracker):
    """A tracker as somebody may write one."""

    def log(self, record):
        with open('notes.txt', 'a') as file:
            file.write(json.dumps(record) + '\n')


class Fails(Notes):
    """One that fails after three records."""

    def log(self, record):
        if record['iter'] == 2:
            raise OSError(28, 'No space left\non device')
        super().log(record)


class CannotStart(Tracker):
    advice = 'pay the bill, '

    def start(self, config, out_dir, saved, resumed_at):
        raise RuntimeError('no account')


class Missing(Tracker):
    package = 'no_such_package'


def test_a_new_tracker_is_one_class(workspace, monkeypatch):
    monkeypatch.setitem(TRACKERS, 'notes', Notes)
    output = run_forked_ok('train.py', *TINY, '--trackers=notes', '--sample_interval=3', cwd=workspace)
    notes = [json.loads(line) for line in (workspace / 'notes.txt').read_text().splitlines()]
    records = read_metrics(str(workspace / 'out' / 'metrics.jsonl'))
    assert [list(note) for note in notes] == [list(record) for record in records]
    assert [note.get('samples') for note in notes] == [record.get('samples') for record in records]
    assert sum(line.startswith(('iter ', 'step ')) for line in output.splitlines()) == 8 + 3 + 2 * 3


def test_a_tracker_that_fails_is_left_out(workspace, monkeypatch):
    monkeypatch.setitem(TRACKERS, 'fails', Fails)
    result = run_forked('train.py', *TINY, '--trackers=fails', cwd=workspace)
    assert result.returncode == 0 and 'done: 8 iterations' in result.stdout
    assert result.stderr == 'warning: fails failed, the run continues without it: [Errno 28] No space left on device\n'
    assert len((workspace / 'notes.txt').read_text().splitlines()) == 3 and len(metrics(workspace / 'out')[0]) == 8


@needs_wandb
@needs_trackio
def test_mistakes_are_told_before_training(workspace, monkeypatch):
    monkeypatch.setitem(TRACKERS, 'cannot', CannotStart)
    monkeypatch.setitem(TRACKERS, 'missing', Missing)
    for arguments, words in (
        (['--trackers=wandbb'], '--trackers=wandbb: unknown; use wandb, tensorboard, trackio'),
        (['--trackers=missing'], 'needs the package no_such_package: pip install no_such_package'),
        (['--trackers=cannot'], 'cannot cannot start (no account): pay the bill, or leave it out'),
        (['--trackers=wandb', '--wandb_project=a/b'], 'wandb cannot start ('),
        (['--trackers=trackio', '--wandb_project=registry-a'], 'trackio cannot start ('),
        (['--sample_interval=-1'], '--sample_interval=-1: must be'),
    ):
        result = run_forked('train.py', *TINY, *arguments, cwd=workspace)
        lines = [line for line in result.stderr.splitlines() if not line.startswith('wandb: ')]
        assert result.returncode == 2 and len(lines) == 1 and words in lines[0], result.stderr
        assert 'iter 0' not in result.stdout
    run_forked_ok('train.py', *TINY, '--trackers=missing', '--eval_only=True', cwd=workspace)
    (workspace / 'no_such_package').mkdir()
    monkeypatch.syspath_prepend(str(workspace))  # a folder of that name, as offline runs of wandb leave one
    with pytest.raises(UserError, match='pip install no_such_package'):
        chosen_trackers({'trackers': ('missing',), 'wandb_log': False})


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_samples_change_nothing_in_a_run(workspace, pos):
    common = [*TINY, '--dropout=0.2', f'--pos={pos}']
    run_forked_ok('train.py', *common, '--out_dir=without', cwd=workspace)
    run_forked_ok('train.py', *common, '--out_dir=with', '--sample_interval=3', cwd=workspace)
    for a, b in zip(metrics(workspace / 'without'), metrics(workspace / 'with')):
        assert [(r.get('loss'), r.get('val/loss')) for r in a] == [(r.get('loss'), r.get('val/loss')) for r in b]
    a, b = (load_checkpoint(str(workspace / name / 'ckpt.pt'))['model'] for name in ('without', 'with'))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_samples_on_two_ranks(workspace):
    output = train_on_ranks(2, *TINY, '--sample_interval=4', cwd=workspace)
    assert output.count('a sample:') == 6


def test_samples_need_a_tokenizer(workspace):
    (workspace / 'data' / 'tiny' / 'meta.json').unlink()
    import pickle

    (workspace / 'data' / 'tiny' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 29}))
    result = run_forked('train.py', *TINY, '--sample_interval=1', cwd=workspace)
    assert result.returncode == 0 and result.stderr.count('no samples, as data/tiny does not say') == 1
    assert 'a sample' not in result.stdout


class Offline(Tracker):
    """A tracker that cannot start, as without a login."""

    def start(self, *arguments):
        raise ConnectionError('no login')


def test_a_tracker_that_cannot_start_leaves_the_earlier_run_in_place(workspace, monkeypatch):
    """Trackers that write elsewhere start before an earlier run is moved: else a missing login would hide it."""
    pytest.importorskip('tensorboard')
    run_forked_ok('train.py', *TINY, '--max_iters=1', cwd=workspace)
    before = sorted(path.name for path in (workspace / 'out').iterdir())
    monkeypatch.setitem(TRACKERS, 'offline', Offline)
    result = run_forked('train.py', *TINY, '--trackers=offline', '--trackers=tensorboard', cwd=workspace)
    assert result.returncode == 2 and 'offline cannot start (no login)' in result.stderr
    assert sorted(path.name for path in (workspace / 'out').iterdir()) == before
