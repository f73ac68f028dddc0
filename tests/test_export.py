"""export.py: what it writes is opened by the other program, in a process that cannot see this repository."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, copy_scripts, environment, metrics, run, run_forked, run_forked_ok
from nanogpt_reference import ReferenceGPT

from data.pipeline import write_dataset
from data.sources import Documents, Files
from formats.certificate import plain_weights
from formats.huggingface import write_hf_model
from model import GPT, GPTConfig

LLAMA = '--pos=rope --norm=rmsnorm --mlp=swiglu --n_kv_head=1 --bias=False --tie_weights=False'.split()
EXPORT = ['--out_dir=out']
TEXT = 'alphabet soup and bread.\nthe quick brown fox jumps over a lazy dog.\nün día.\n'

GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
n, prompts, results = int(sys.argv[1]), json.loads(sys.argv[2]), {}
for folder, prompts in prompts.items():
    options = {'trust_remote_code': folder.startswith('own')}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    encoded = [tokenizer(prompt, return_tensors='pt') for prompt in prompts]
    texts = [model.generate(**inputs, max_new_tokens=n, do_sample=False)[0] for inputs in encoded]
    results[folder] = list(map(tokenizer.decode, texts))
print(json.dumps(results))
"""


@pytest.fixture(scope='module', autouse=True)
def transformers():
    """What export.py imports, once for all forks."""
    importlib.import_module('transformers.generation.utils')
    for family in ('gpt2', 'llama'):
        importlib.import_module(f'transformers.models.{family}.modeling_{family}')


def by_transformers(workspace, prompts, n):
    """Texts by transformers, in a process that cannot see this repository. prompts: {folder: [prompt, …]}"""
    command = [sys.executable, '-I', '-c', GENERATE, str(n), json.dumps(prompts)]
    env = environment(HF_MODULES_CACHE=str(workspace / 'modules'))
    result = subprocess.run(command, cwd=workspace, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def by_sample(folder, prompt, n, *arguments):
    """The text that sample.py generates."""
    greedy = ['--temperature=0', '--num_samples=1', '--device=cpu', f'--max_new_tokens={n}', f'--start={prompt}']
    return run_forked_ok('sample.py', *greedy, *arguments, cwd=folder).removesuffix('\n---------------\n')


def train(workspace, *arguments):
    """A run in out/ on data/tiny, or on a data set in BPE."""
    run_forked_ok('train.py', *TINY, '--block_size=32', *arguments, cwd=workspace)


@pytest.fixture
def bpe(workspace):
    """data/tiny in BPE, of an English-like text with bytes beyond ASCII."""
    (workspace / 'text.txt').write_text(TEXT * 300, encoding='utf-8')
    write_dataset(str(workspace / 'data' / 'bpe'), Files(str(workspace / 'text.txt'), 0.1, 'text'), 'bpe', 300)
    return workspace


def test_transformers_opens_what_went_out(bpe):
    """The same text for the same prompt: characters and BPE, shapes that transformers knows, and with its code one that
    it does not. Padding of the vocabulary is cut."""
    own = ['--pos=alibi', '--mlp=relu2', '--qk_norm=True', '--logit_softcap=20']
    runs = {  # folder: data set, shape, prompts
        'characters-gpt2': ('tiny', ['--vocab_multiple=32'], ['abc', ' a\nb  c.', '\n']),
        'characters-llama': ('tiny', ['--vocab_multiple=32', *LLAMA], ['abc', ' a\nb  c.', '\n']),
        'bpe-gpt2': ('bpe', [], [' the quick  ün día\n']),
        'bpe-llama': ('bpe', LLAMA, [' the quick  ün día\n']),
        'own': ('tiny', own, ['abc']),
    }
    ours = {}
    for folder, (dataset, shape, prompts) in runs.items():
        train(bpe, f'--dataset={dataset}', *shape)
        if shape == own:
            refused = run_forked('export.py', *EXPORT, cwd=bpe)
            assert refused.returncode == 2 and 'alibi' in refused.stderr and '--remote_code=True' in refused.stderr
            assert not list(bpe.glob('out-hf*'))
        output = run_forked_ok('export.py', *EXPORT, f'--to={folder}', f'--remote_code={shape == own}', cwd=bpe)
        assert 'all of 24 tokens equal' in output and 'equal ids and text' in output
        ours[folder] = [by_sample(bpe, prompt, 15) for prompt in prompts]
        if shape != own:
            assert by_sample(bpe, prompts[0], 15, f'--init_from={folder}') == ours[folder][0]
    assert by_transformers(bpe, {folder: prompts for folder, (_, _, prompts) in runs.items()}, 15) == ours
    config = json.loads((bpe / 'characters-llama' / 'config.json').read_text())
    assert config['vocab_size'] == 29 and config['model_type'] == 'llama'


def test_certificate_and_card(exported):
    run_forked_ok('export.py', *EXPORT, '--dtype=bfloat16', '--to=there/model', cwd=exported)
    folder = exported / 'there' / 'model'
    proof = json.loads((folder / 'certificate.json').read_text())
    assert proof['problem'] == '' and proof['loss_here'] == pytest.approx(proof['loss_there'], abs=1e-2)
    assert proof['dtype'] == 'bfloat16' == json.loads((folder / 'config.json').read_text())['torch_dtype']
    card = (folder / 'README.md').read_text()
    assert 'n_embd = 32' in card and '`tiny`, 8 iterations' in card and 'AutoTokenizer' in card
    run_forked_ok('export.py', *EXPORT, '--to=there/model', cwd=exported)  # replaces it
    assert json.loads((folder / 'certificate.json').read_text())['dtype'] == 'float32'


def test_nanogpt_samples_and_resumes(workspace):
    """The file is nanoGPT's: names, shapes, optimizer; a resumed run has the losses of the original one."""
    more = ['--max_iters=16', '--data_order=random']
    train(workspace, *more[1:])
    run_forked_ok('export.py', *EXPORT, '--format=nanogpt', '--to=nano', cwd=workspace)
    raw = torch.load(workspace / 'nano' / 'ckpt.pt', weights_only=True)
    theirs = ReferenceGPT(**raw['model_args'])
    theirs.load_state_dict(raw['model'])
    groups = [[p for p in theirs.parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    tied = theirs.lm_head.weight
    groups[0] = [p for p in groups[0] if p is not tied]  # nanoGPT ties it to the embedding
    optimizer = torch.optim.AdamW([{'params': group} for group in groups], lr=1e-3)
    optimizer.load_state_dict(raw['optimizer'])
    assert all(state['exp_avg'].shape == p.shape for p, state in optimizer.state.items()) and len(
        optimizer.state
    ) == sum(map(len, groups))
    assert (workspace / 'nano' / 'meta.pkl').exists() and raw['iter_num'] == 8
    train(workspace, *more, '--init_from=resume')
    train(workspace, *more, '--init_from=resume', '--out_dir=nano')
    losses, again = ([r['loss'] for r in metrics(workspace / name)[0]][-8:] for name in ('out', 'nano'))
    assert losses == again


@pytest.mark.slow
def test_llama_cpp(bpe):
    """Text for text what llama.cpp generates."""
    llama_cpp = pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed')
    for dataset, shape in (('bpe', []), ('bpe', LLAMA), ('tiny', LLAMA)):
        train(bpe, f'--dataset={dataset}', *shape, '--init_from=scratch')
        output = run_forked_ok('export.py', *EXPORT, '--format=gguf', '--dtype=float32', cwd=bpe)
        assert 'llama.cpp' in output and 'equal ids and text' in output
        with plain_weights(llama_cpp.llama_cpp):
            llm = llama_cpp.Llama(str(bpe / 'out.gguf'), n_ctx=32, verbose=False)
        text = llm('the fox', max_tokens=20, temperature=0, repeat_penalty=1)['choices'][0]['text']
        assert 'the fox' + text == by_sample(bpe, 'the fox', 20)
        again = by_sample(bpe, 'the fox', 20, f'--init_from={bpe / "out.gguf"}')
        assert again == by_sample(bpe, 'the fox', 20)


WRONG = {  # formats/: what each format's writer does wrong, and what is said
    'hf': ('huggingface.py', '{theirs[0]: tensor.t()}', '{theirs[0]: 1.01 * tensor.t()}', 'its logits differ'),
    'gguf': ('gguf_model.py', 'return fill(place.shape)', 'return fill(place.shape) + 1e-3', 'written with an error'),
    'gguf eps': ('gguf_model.py', 'float(metadata[key]) for', '1e-6 for', 'norm_eps=1e-06 in place of 1e-05'),
}


@pytest.mark.parametrize('case', WRONG)
def test_nothing_goes_out_without_proof(exported, case):
    """A writer that changes a parameter is found out, and leaves nothing behind."""
    name, old, new, said = WRONG[case]
    copy = copy_scripts(exported, [(f'formats/{name}', old, new)])
    result = run(copy / 'export.py', *EXPORT, f'--format={case[:4].strip()}', '--dtype=float32', cwd=exported)
    assert result.returncode == 2 and said in result.stderr.splitlines()[-1], result.stderr
    assert not list(exported.glob('out-hf*')) and not list(exported.glob('out.gguf*'))


def test_what_may_be_replaced(exported):
    """An earlier export is; what somebody added to it, and the run itself, are not."""
    export = ['export.py', *EXPORT, '--check_tokens=32', '--to=mine']
    run_forked_ok(*export, cwd=exported)
    run_forked_ok(*export, cwd=exported)
    (exported / 'mine' / 'notes.txt').touch()
    for arguments in ([], ['--init_from=mine']):
        refused = run_forked(*export, *arguments, cwd=exported)
        assert refused.returncode == 2 and '--to=' in refused.stderr and 'would be lost' in refused.stderr
    (exported / 'mine' / 'notes.txt').unlink()
    refused = run_forked(*export, '--init_from=mine', cwd=exported)
    assert (
        refused.returncode == 2 and 'would be lost' in refused.stderr and (exported / 'mine' / 'config.json').exists()
    )
    (exported / 'mine.part').mkdir()
    refused = run_forked(*export, cwd=exported)
    assert refused.returncode == 2 and 'mine.part is there already' in refused.stderr


def test_openais_gelu_goes_to_nanogpt(exported):
    """With one line that says what differs; the same checkpoint is exact here."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'n_positions': 32, 'vocab_size': 257}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(exported / 'theirs')
    (exported / 'data' / 'bytes').mkdir()
    write_dataset(str(exported / 'data' / 'bytes'), Documents(['some text'] * 9 + ['other text'] * 9, 0.2), 'byte')
    arguments = ['--init_from=theirs', '--dataset=bytes', '--format=nanogpt', '--to=openai']
    result = run_forked('export.py', *arguments, cwd=exported)
    assert result.returncode == 0 and 'GELU' in result.stderr, result.stderr
    assert 'loss' in run_forked_ok('evaluate.py', '--out_dir=openai', '--dataset=bytes', '--device=cpu', cwd=exported)


@pytest.mark.parametrize(
    'arguments, part',
    [
        (['--format=onnx'], '--format=onnx: must be hf, gguf or nanogpt'),
        (['--dtype=q8_0'], '--dtype=q8_0: --format=hf takes float32'),
        (['--format=gguf', '--remote_code=True'], 'needs --format=hf'),
        (['--to=data'], 'is no earlier export'),
        (['--out_dir=nowhere'], 'train first'),
        (['--dataset=nothing'], 'there is no folder data/nothing'),
        (['--format=nanogpt', '--init_from=llama'], 'nanoGPT has no model with'),
        (['--init_from=untold', '--dataset=untold'], 'the tokenizer has 50257 ids, the model 97: they do not'),
    ],
)
def test_mistakes(exported, arguments, part):
    result = run_forked('export.py', *EXPORT, *arguments, cwd=exported)
    assert result.returncode == 2 and part in result.stderr and result.stderr.count('\n') == 1, result.stderr


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A run of GPT-2's shape in out/, one of Llama's in llama/."""
    from conftest import write_data

    folder = tmp_path_factory.mktemp('exported') / 'w'
    write_data(folder / 'data' / 'tiny')
    train(folder)
    train(folder, '--out_dir=llama', *LLAMA)
    (folder / 'untold').mkdir()
    (folder / 'data' / 'untold').mkdir()
    write_hf_model(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=97)), str(folder / 'untold'))
    for split in ('train', 'val'):  # a data set that does not say what its ids mean is taken for GPT-2's
        np.zeros(200, '<u2').tofile(folder / 'data' / 'untold' / f'{split}.bin')
    return folder


def test_a_field_that_somebody_added(exported):
    """Other programs know nothing of it, so a model that uses it goes out with its code alone."""
    edit = ('model.py', '    zero_init: bool', '    extra: int = 0  # new\n    zero_init: bool')
    copy = copy_scripts(exported, [edit])
    run_forked_ok(copy / 'train.py', *TINY, '--extra=3', '--out_dir=extra', cwd=exported)
    for format in ('hf', 'gguf'):
        result = run_forked(copy / 'export.py', '--out_dir=extra', f'--format={format}', cwd=exported)
        assert result.returncode == 2 and '--extra=3: is new in model.py' in result.stderr, result.stderr
    run_forked_ok(copy / 'export.py', '--out_dir=extra', '--remote_code=True', cwd=exported)
