"""What machines can do: the table of cards, machine files from anywhere, measuring, limits of memory, and what
--compile=auto makes of a machine file. No test asserts a time."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import REPO, run_forked_ranks
from torch.utils.flop_counter import FlopCounterMode

import common.device as devices
from common import memory
from common.errors import UserError
from common.machines import CARDS, DTYPE_NAMES, Machine, card, interpolate, own_card, read_machine, write_machine
from configurator import read_settings
from model import GPTConfig
from preflight import measuring

CPU = torch.device('cpu')
SETTINGS = read_settings(REPO / 'train.py') | {'batch_size': 2}
SHAPE = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
# names as CUDA gives them -> the card
NAMES = {
    'NVIDIA H100 80GB HBM3': 'H100 SXM 80GB',
    'NVIDIA H100 PCIe': 'H100 PCIe 80GB',
    'NVIDIA H100 NVL': 'H100 NVL 94GB',
    'NVIDIA H200': 'H200 SXM 141GB',
    'NVIDIA GH200 480GB': 'GH200 480GB',
    'NVIDIA B200': 'B200',
    'NVIDIA A100-SXM4-80GB': 'A100 SXM 80GB',
    'NVIDIA A100-SXM4-40GB': 'A100 SXM 40GB',
    'NVIDIA A100-PCIE-40GB': 'A100 PCIe 40GB',
    'NVIDIA A100 80GB PCIe': 'A100 PCIe 80GB',
    'NVIDIA A10G': 'A10G 24GB',
    'NVIDIA A10': 'A10 24GB',
    'NVIDIA A30': 'A30 24GB',
    'NVIDIA L4': 'L4 24GB',
    'NVIDIA L40': 'L40 48GB',
    'NVIDIA L40S': 'L40S 48GB',
    'Tesla V100-SXM2-16GB': 'V100 SXM 16GB',
    'Tesla V100-SXM2-32GB': 'V100 SXM 32GB',
    'Tesla T4': 'T4 16GB',
    'NVIDIA RTX A6000': 'RTX A6000 48GB',
    'NVIDIA RTX 6000 Ada Generation': 'RTX 6000 Ada 48GB',
    'NVIDIA GeForce RTX 3090': 'RTX 3090 24GB',
    'NVIDIA GeForce RTX 4090': 'RTX 4090 24GB',
    'NVIDIA GeForce RTX 5090': 'RTX 5090 32GB',
    'AMD Instinct MI300X': 'MI300X 192GB',
}
SHORT = {'h100': 'H100 SXM 80GB', 'H100 sxm': 'H100 SXM 80GB', 'a100-80': 'A100 SXM 80GB', 'a100_40': 'A100 SXM 40GB'}
SHORT |= {
    'rtx4090': 'RTX 4090 24GB',
    '4090': 'RTX 4090 24GB',
    'a100 pcie': 'A100 PCIe 80GB',
    'V100-32': 'V100 SXM 32GB',
}
SHORT |= {'RTX6000 Ada': 'RTX 6000 Ada 48GB', 'a6000': 'RTX A6000 48GB', 'mi300x': 'MI300X 192GB', 'L4': 'L4 24GB'}


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, known', [*NAMES.items(), *SHORT.items(), *zip(CARDS, CARDS)])
def test_cards_by_name(name, known):
    assert card(name).name == known


def test_each_card_is_called_by_some_name():
    assert set(NAMES.values()) == set(CARDS)


@pytest.mark.parametrize('name, nearest', [('h1000', 'H100'), ('rtx 4080', '4090'), ('4090 Laptop', '4090')])
def test_unknown_cards(name, nearest):
    with pytest.raises(UserError) as error:
        card(name)
    text = str(error.value)
    assert nearest in text.partition('Known are')[0] and all(known in text for known in CARDS) and '\n' not in text


@pytest.mark.parametrize('name', ['', ' ', 'nvidia', '日本', 'a100 80 40', '-'])
def test_names_that_say_nothing(name):
    with pytest.raises(UserError):
        card(name)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', DTYPE_NAMES)
def test_mfu_and_plans_have_the_same_peaks(name, dtype):
    peak, products = devices.named_peak_flops(name, devices.DTYPES[dtype]), card(name).products
    assert peak == (products[dtype][0][1] if dtype in products else None)


def test_the_table_is_plausible():
    for row in CARDS.values():
        assert row.source.startswith('https://') and row.half > row.single > 0
        assert all(other.half == row.half for other in CARDS.values() if other.cuda == row.cuda)
        assert 50 < row.half * 1e12 / (row.bandwidth * 1e9) < 500  # operations per byte, of all cards of a decade
        assert row.bandwidth > row.link >= row.network > 0


def test_a_card_of_ones_own():
    machine = own_card(100, 24, 1000)
    assert machine.memory == 24 * 2**30 and machine.products['bfloat16'][0][1] == 100e12
    assert machine.stream_speed(1) == 1e12 * machine.efficiency['stream'] and not machine.measured
    for values in ((0, 24, 1), (1, -1, 1), (1, 1, math.nan), (math.inf, 1, 1)):
        with pytest.raises(UserError, match='above 0'):
            own_card(*values)


def test_interpolation():
    """Against numpy's, in log(size)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = np.unique(rng.integers(1, 5000, rng.integers(1, 8))).astype(float)
        speeds = rng.uniform(1, 1e12, len(sizes))
        curve = tuple(zip(sizes.tolist(), speeds.tolist()))
        for x in [*sizes, *rng.uniform(0.1, 6000, 20)]:
            assert interpolate(curve, x) == pytest.approx(np.interp(np.log(x), np.log(sizes), speeds))


def test_what_is_unknown_of_a_machine():
    machine = card('t4')
    with pytest.raises(UserError, match='float32 or float16'):
        machine.product_flops('bfloat16', 64)
    assert machine.attention_flops('float32') == machine.product_flops('float32', 64)


# --- machine files ----------------------------------------------------------------------------------------------------


def example() -> Machine:
    """A machine with everything that a measurement may find."""
    step = {'seconds': 2.0, 'batch_size': 4, 'compiled': False, **dataclasses.asdict(SHAPE)}
    return dataclasses.replace(
        card('h100'),
        products={'float32': ((64.0, 1e9), (128.0, 2e9))},
        compiling={'takes': 50.0, 'saves': -0.1},
        steps=(step, {**step, 'seconds': 8.5, 'batch_size': 8}),
        kernels={'flash, 64 channels': 0.001},
        efficiency=dict.fromkeys(card('h100').efficiency, 1.0),
    )


@pytest.mark.parametrize('machine', [card('h100'), card('v100'), own_card(1, 2, 3), example()])
def test_a_machine_file_is_read_as_it_was_written(tmp_path, machine):
    write_machine(tmp_path / 'machine.json', machine)
    assert read_machine(tmp_path / 'machine.json') == machine
    assert os.listdir(tmp_path) == ['machine.json']


def test_the_shape_of_a_measured_step_is_a_model_again(tmp_path):
    write_machine(tmp_path / 'machine.json', example())
    step = read_machine(tmp_path / 'machine.json').steps[0]
    assert GPTConfig(**{field.name: step[field.name] for field in dataclasses.fields(GPTConfig)}) == SHAPE


BAD = [None, True, 'text\n', -1, 0, 1e300, math.nan, math.inf, [], {}, [[]], [[1, 2], [1, 3]], {'x': 1}, 'y' * 10**4]


@pytest.mark.parametrize('field', [field.name for field in dataclasses.fields(Machine)])
def test_damaged_fields(tmp_path, field):
    """Each field missing, or with another value: one line that says so, or a machine that can be used and written."""
    path, good = tmp_path / 'machine.json', json.loads(json.dumps(dataclasses.asdict(example())))
    refused = 0
    for value in [KeyError, *BAD]:
        values = {key: each for key, each in good.items() if key != field} | (
            {} if value is KeyError else {field: value}
        )
        path.write_text(json.dumps(values))
        try:
            machine = read_machine(path)
            assert type(getattr(machine, field)) is type(getattr(example(), field))
            write_machine(path, machine)
            assert read_machine(path) == machine
        except UserError as error:
            refused += 1
            assert 'is not a machine file' in str(error) and len(str(error)) < 500
    assert refused >= 9


def test_damaged_files(tmp_path):
    """Bytes changed anywhere, and files that are none."""
    path, random_numbers = tmp_path / 'machine.json', random.Random(0)
    write_machine(path, example())
    good = path.read_bytes()
    deep = b'[' * 10**5
    others = [b'', b'null', b'[]', b'{}', b'\xff\xfe', deep, b'{"name": ' + deep, b'1' * 10**5, b' ' * 2**21]
    for _ in range(300):
        start = random_numbers.randrange(len(good))
        junk = bytes(random_numbers.randrange(256) for _ in range(random_numbers.randrange(4)))
        others.append(good[:start] + junk + good[start + random_numbers.randrange(20) :])
    for data in others:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            assert isinstance(read_machine(path), Machine)
    with pytest.raises(UserError, match='cannot read'):
        read_machine(tmp_path / 'none.json')
    with pytest.raises(UserError, match='cannot write'):
        write_machine(tmp_path / 'none' / 'machine.json', example())


def test_a_file_is_whole_at_any_time(tmp_path):
    """Several write and read one file at once."""
    path, machines = tmp_path / 'machine.json', [example(), card('a100')]
    write_machine(path, machines[0])

    def write(machine):
        for _ in range(20):
            write_machine(path, machine)

    writers = [threading.Thread(target=write, args=(machine,)) for machine in machines * 2]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert read_machine(path) in machines
    assert os.listdir(tmp_path) == ['machine.json']


# --- measuring --------------------------------------------------------------------------------------------------------


def answer(request, pipe):
    """Answer a request of measuring in this process, a fork, and send the answer through a pipe."""
    pipe.send(measuring.answer(request))
    os._exit(0)


@pytest.fixture
def forked_children(monkeypatch):
    """Answer measuring's requests in forks rather than in processes of their own -> the requests."""
    requests = []

    def answers_of(new, seconds=0):
        requests.extend(new)
        children, fork = [], multiprocessing.get_context('fork')
        for request in new:
            pipe, other = fork.Pipe()
            children.append((fork.Process(target=answer, args=(json.loads(json.dumps(request)), other)), pipe))
            children[-1][0].start()
        answers = [pipe.recv() for _, pipe in children]
        for child, _ in children:
            child.join()
        return json.loads(json.dumps(answers))

    monkeypatch.setattr(measuring, 'answers_of', answers_of)
    return requests


@pytest.fixture
def small(monkeypatch):
    """Measure a few small sizes."""
    monkeypatch.setattr(measuring, 'TOKENS', {'cpu': 32})
    for name in ('measure_products', 'measure_stream', 'bus_speed'):
        function = getattr(measuring, name)
        sizes = {'measure_products': (8, 16), 'measure_stream': (4800, 96000), 'bus_speed': (2**12, 2**14)}[name]
        monkeypatch.setattr(function, '__defaults__', (*function.__defaults__[:-1], sizes))
    monkeypatch.setattr(measuring.measure_attention, '__defaults__', ((8, 32),))


def test_measuring_this_machine(forked_children, small, tmp_path, capsys):
    """All of it, on a small scale: a machine that can be written and read, with two steps of the recipe's model."""
    machine = measuring.measure(SETTINGS, SHAPE, CPU, torch.float32, seconds=0.1)
    write_machine(tmp_path / 'machine.json', machine)
    assert read_machine(tmp_path / 'machine.json') == machine
    assert (machine.kind, machine.name) == ('cpu', devices.device_name(CPU)) and machine.measured
    assert [size for size, _ in machine.products['float32']] == [8, 16]
    assert [keys for keys, _ in machine.attention['float32']] == [8, 16, 32]
    assert [size for size, _ in machine.stream] == [4800, 96000]
    assert [step['batch_size'] for step in machine.steps] in ([1, 2], [1])  # one, where a step takes long
    assert all('channels' in kernel for kernel in machine.kernels) and machine.correction == 1
    assert [request['task'] for request in forked_children] == ['exchange'] * 2 + ['steps'] * len(machine.steps)
    said = capsys.readouterr()
    assert said.err == '' and len(said.out.splitlines()) == 5 + len(machine.steps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device here')
def test_measuring_a_gpu(tmp_path):
    """All of it; and a batch that does not fit leaves this process as it was."""
    device, dtype = devices.set_up_device('cuda', 'auto')
    machine = measuring.measure(SETTINGS, SHAPE, device, dtype, seconds=6.0, with_compiling=True)
    write_machine(tmp_path / 'machine.json', machine)
    assert read_machine(tmp_path / 'machine.json') == machine and machine.overlaps and machine.compiling
    assert any(kernel.startswith('flash') for kernel in machine.kernels) and len(machine.steps) == 3
    assert 0 < machine.memory <= torch.cuda.get_device_properties(device).total_memory
    fits = measuring.batch_trial(SETTINGS, SHAPE, device, dtype)
    assert fits(1) and not fits(2**24)
    assert torch.ones(10, device=device).sum() == 10


def test_several_ranks_measure_one_machine(tmp_path):
    """Two ranks measure their exchange together, and get the same machine."""
    script = tmp_path / 'ranks.py'
    script.write_text(
        f'import sys\nsys.path.insert(0, {str(REPO)!r})\n'
        'import torch\nfrom preflight import measuring\n'
        'from common.distributed import end, find_ranks, join_ranks\n'
        'from configurator import read_settings\n'
        'from model import GPTConfig\n'
        "ranks, cpu = find_ranks(), torch.device('cpu')\n"
        "join_ranks('gloo', cpu, ranks)\n"
        "measuring.TOKENS['cpu'], measuring.MAX_SCORES = 16, 2**12\n"
        'measuring.measure_products.__defaults__ = ((8,),)\n'
        'measuring.measure_stream.__defaults__ = ((4800,),)\n'
        'measuring.answers_of = lambda *_: [None]\n'
        f'config = read_settings({str(REPO / "train.py")!r})\n'
        f'shape = GPTConfig(**{dataclasses.asdict(SHAPE)!r})\n'
        'machine = measuring.measure(config, shape, cpu, torch.float32, ranks, seconds=0.1)\n'
        "print('same', len(set(map(str, ranks.gather(machine)))), machine.per_node, flush=True)\n"
        'end(ranks)\n'
    )
    results = run_forked_ranks(2, script, cwd=tmp_path)
    for result in results:
        assert result.returncode == 0 and 'same 1 2' in result.stdout, result.stderr
    assert results[0].stderr.count('does not fit into the memory') == 1 and results[1].stderr == ''


def test_the_median_call(monkeypatch):
    """By a clock of its own: one call does not count, short calls are timed together, and the median counts."""
    clock, durations = [0.0], iter([100.0, 1.0, 15.0, 2.0, 3.0, 50.0])

    def work():
        clock[0] += next(durations)

    monkeypatch.setattr(measuring.time, 'perf_counter', lambda: clock[0])
    assert measuring.seconds_of(work, CPU, 19.9) == 2.5 and clock[0] == 100 + 21
    durations = iter([0.25] * 1000)
    assert measuring.seconds_of(work, CPU, 100.0) == 0.25
    durations = iter([7.0, 3.0])
    assert measuring.seconds_of(work, CPU, 0.0) == 3.0  # at least one


@pytest.mark.parametrize('size', [8, 24])
def test_operations_of_products(size, monkeypatch):
    """As many as torch counts."""
    counted = []

    def count(work, device, seconds):
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(measuring, 'seconds_of', count)
    monkeypatch.setattr(measuring, 'TOKENS', {'cpu': 40})
    assert measuring.measure_products(CPU, torch.float32, 1.0, (size,)) == ((size, counted[0]),)


@pytest.mark.parametrize('keys', [16, 64])
def test_operations_of_attention(keys, monkeypatch):
    """4 forward and 10 backward per query, key that it sees and channel: of about half of them."""
    monkeypatch.setattr(measuring, 'seconds_of', lambda work, device, seconds: work() and 1.0)
    found = dict(measuring.measure_attention(SHAPE, 8, CPU, torch.float32, 1.0, (keys,)))
    sequences, channels = 8 * 16 // keys, SHAPE.n_embd
    assert found[keys] == sequences * channels * (4 + 10) * (keys**2 / 2) and SHAPE.block_size in found


def test_correction(tmp_path):
    """The geometric mean of what the steps took over what was predicted, by the uncorrected machine."""
    asked = []

    def predict(machine, model_config, batch_size):
        asked.append((machine.correction, model_config, batch_size))
        return {4: 1.0, 8: 17.0}[batch_size]

    machine = dataclasses.replace(example(), correction=3.0)
    compiled = {**machine.steps[0], 'compiled': True, 'seconds': 1e6}
    machine = dataclasses.replace(machine, steps=(*machine.steps, compiled))
    assert measuring.calibrated(machine, predict).correction == pytest.approx(math.sqrt(2 / 1 * 8.5 / 17))
    assert asked == [(1.0, SHAPE, 4), (1.0, SHAPE, 8)]
    assert measuring.calibrated(dataclasses.replace(machine, steps=()), predict).correction == 1


@pytest.mark.parametrize(
    'outcomes, sizes, compiling, warning',
    [
        ([2.0, 4.0, 3.0], [4, 8, 8], {'takes': 30.0, 'saves': 0.25}, ''),
        (
            [2.0, 4.0, RuntimeError('Traceback\nno compiler')],
            [4, 8],
            {},
            'torch.compile does not work here (no compiler)',
        ),
        ([2.0, None, 3.0], [4, 4], {'takes': 30.0, 'saves': -0.5}, '--batch_size=8 does not fit'),
        ([None], [], {}, '--batch_size=4 does not fit'),
        ([2.0, TimeoutError('too slow')], [4], {}, 'not measured to their end: too slow'),
    ],
)
def test_whatever_steps_do(outcomes, sizes, compiling, warning, monkeypatch, capsys):
    """Steps that fit or do not, that take too long, and compilers that do not work."""
    results = iter(outcomes)

    def run(batch_size, seconds, compiled=False):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        step = {
            'seconds': result,
            'first_seconds': 30.0,
            'batch_size': batch_size,
            'peak_bytes': 1,
            'compiled': compiled,
        }
        return result and step

    monkeypatch.setattr(measuring, 'batch_runner', lambda *_: run)
    config = {**SETTINGS, 'batch_size': 8}
    machine = measuring.with_steps(example(), config, SHAPE, CPU, torch.float32, 1e9, with_compiling=True)
    assert [step['batch_size'] for step in machine.steps] == sizes and machine.compiling == compiling
    warned = capsys.readouterr().err
    assert warned.count('\n') == bool(warning) and warning in warned


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'optimizer': 'muon', 'mask_documents': True},
        {'lora_rank': 2, 'lora_targets': 'attn'},
        {'activation_checkpointing': 'full', 'parallel': 'fsdp', 'cpu_offload': True, 'grad_clip': 0.0},
    ],
)
def test_steps_of_all_recipes(forked_children, options):
    run = measuring.batch_runner({**SETTINGS, **options}, SHAPE, CPU, torch.float32)
    step = run(3, 0.0)
    assert step['batch_size'] == 3 and step['seconds'] > 0 and not step['compiled']
    assert {name: step[name] for name in dataclasses.asdict(SHAPE)} == dataclasses.asdict(SHAPE)


def test_what_does_not_fit_harms_nothing(forked_children, capsys):
    """With 64 MB a small batch fits, and one that needs gigabytes does not."""
    fits = measuring.batch_trial(SETTINGS, SHAPE, CPU, torch.float32, limit=64e6)
    assert fits(1) and not fits(2**20) and fits(2)
    assert [line.rpartition(' ')[2] for line in capsys.readouterr().out.splitlines()] == ['s', 'fit', 's']


def test_a_child_process():
    """A real one, not a fork."""
    step = measuring.batch_runner(SETTINGS, SHAPE, CPU, torch.float32)(2, 0.0)
    assert step['batch_size'] == 2 and step['seconds'] > 0 and step['peak_bytes'] > 0


def test_a_child_ends_with_its_parent():
    """Whatever it is doing, when standard input ends."""
    source, sink = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(sink)
        sys.stdin = open(source)
        threading.Thread(target=measuring.die_with_parent).start()
        time.sleep(60)
        os._exit(0)
    os.close(source)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(sink)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize('seed', range(5))
def test_the_largest_batch(seed):
    """For every limit and guess, in about as many trials as it has binary digits; fewer after a good guess, or if it
    need not be exact."""
    rng = random.Random(seed)
    for _ in range(200):
        upper = rng.choice([0, 1, 2, 3, rng.randrange(1, 3000), 2**16])
        most = min(rng.randrange(0, 3000), upper)
        guess = rng.choice([1, rng.randrange(-1, 4000), round(most * rng.uniform(0.85, 1.15))])
        precision = rng.choice([0, 0.05])
        tried = []
        found = measuring.largest_batch(lambda n: tried.append(n) or n <= most, upper, guess, precision)  # noqa: B023
        assert found == most or 0 < most * (1 - precision) <= found <= most
        assert len(tried) == len(set(tried)) <= math.log2(upper + 1) + 10
        assert all(1 <= n <= upper for n in tried)
        if precision and 0.85 * most <= guess <= 1.15 * most:
            assert len(tried) <= 7


@pytest.mark.parametrize(
    'program, outcome',
    [
        ("print('a line'); print('[1, 2]')", [1, 2]),
        ("print('null')", None),
        ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', None),
        ('import os; os.abort()', None),
        ("import sys; print('warning: x\\nerror: of the user', file=sys.stderr); sys.exit(2)", UserError),
        ('1 / 0', RuntimeError),
        ('import time; time.sleep(60)', TimeoutError),
    ],
)
def test_children_end_in_many_ways(program, outcome):
    with subprocess.Popen(
        [sys.executable, '-c', program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            if isinstance(outcome, type):
                with pytest.raises(outcome) as error:
                    measuring.answer_of(child, 0.2 if outcome is TimeoutError else 30)
                assert outcome is not UserError or str(error.value) == 'of the user'
            else:
                assert measuring.answer_of(child, 30) == outcome
        finally:
            child.kill()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('version, entry', [(1, '7:memory:/jobs/mine'), (2, '0::/jobs/mine')])
def test_control_groups(tmp_path, monkeypatch, version, entry):
    """The tightest of the groups around a process counts; what the system can free is not used."""
    root, limit, usage, reclaimable = memory.FILES[version]
    files = {'/proc/self/cgroup': f'3:cpu:/other\n{entry}\n'}

    def group(path, most, used, free):
        folder = os.path.join(root, path)
        statistics = f'cache 5\n{reclaimable} {free}\n'
        files.update({f'{folder}/{limit}': most, f'{folder}/{usage}': used, f'{folder}/memory.stat': statistics})

    monkeypatch.setattr(memory, 'read', lambda path: files.get(path.replace('//', '/'), ''))
    assert memory.group_memory() == math.inf
    group('jobs/mine', '1000\n', '300\n', 50)
    assert memory.group_memory() == 750
    group('jobs', '2000\n', '1800\n', 100)
    assert memory.group_memory() == 300
    group('jobs/mine', 'max\n', '300\n', 50)
    assert memory.group_memory() == 300


def in_fork(function) -> int:
    """The exit status of function() in a fork of this process."""
    pid = os.fork()
    if not pid:
        status = 70
        try:
            status = int(function() or 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


linux = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='limits of memory are for Linux')


@linux
@pytest.mark.parametrize('n_bytes, status', [(50e6, 0), (300e6, 1)])
def test_a_limit_of_memory(n_bytes, status):
    def allocate():
        memory.limit_memory(CPU, 200e6)
        assert memory.available_memory(CPU) <= 200e6
        try:
            torch.ones(int(n_bytes) // 4)
        except RuntimeError as error:
            return bool(measuring.NO_MEMORY.search(str(error)))

    assert in_fork(allocate) == status


@linux
def test_memory_that_ulimit_leaves():
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (memory.status_bytes('VmSize') + 10**8,) * 2)
        return not 9e7 < memory.available_memory(CPU) <= 1e8

    assert in_fork(limited) == 0 and memory.available_memory(CPU) > 1e8


@linux
def test_resident_memory():
    """It grows by what is filled, and its peak stays."""
    before = memory.resident_bytes()
    block = torch.ones(10**8 // 4)
    assert memory.resident_bytes() - before == pytest.approx(1e8, rel=0.05)
    del block
    assert memory.resident_bytes(most=True) >= before + 0.95e8


# --- --compile=auto ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'file, expected',
    [
        (None, devices.COMPILING['cpu']),
        ({'takes': 7.0, 'saves': 0.4}, (7.0, 0.4)),
        ({}, devices.COMPILING['cpu']),
        ('of another machine', devices.COMPILING['cpu']),
        ('damaged', devices.COMPILING['cpu']),
    ],
)
def test_what_is_expected_of_compiling(file, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    machine = dataclasses.replace(example(), kind='cpu', name=devices.device_name(CPU))
    if isinstance(file, dict):
        machine = dataclasses.replace(machine, compiling=file)
    if file == 'of another machine':
        machine = dataclasses.replace(machine, name='another')
    if file is not None:
        write_machine('machine.json', machine)
    if file == 'damaged':
        (tmp_path / 'machine.json').write_text('{')
    assert devices.expected_of_compiling(CPU) == expected
    warned = capsys.readouterr().err
    assert warned.count('\n') == (file == 'damaged') and ('machine.json is not a machine file' in warned) == bool(
        warned
    )


@pytest.mark.parametrize('saves, compiles', [(0.9, True), (0.1, False), (0.0, False), (-0.5, False)])
def test_compiling_pays_as_measured(saves, compiles, tmp_path, monkeypatch):
    """100 calls of 2 s, of which compiling in 50 s must save more than a quarter."""
    monkeypatch.chdir(tmp_path)
    machine = dataclasses.replace(example(), kind='cpu', name=devices.device_name(CPU))
    write_machine('machine.json', dataclasses.replace(machine, compiling={'takes': 50.0, 'saves': saves}))
    layer, clock = torch.nn.Linear(2, 2).eval(), iter(range(0, 10**6, 2))
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: setattr(self, '_compiled_call_impl', object()))
    monkeypatch.setattr(devices.time, 'perf_counter', lambda: next(clock))
    assert devices.compile_or_stay_eager([layer], lambda: None, CPU, 100) == compiles
