"""Benchmarks: the answers of lm_eval's own model 'hf' for the same weights; the scripts as a user runs them."""

import importlib
import json
import logging
import os
import random
import signal
import sys
import time
import types

import pytest
import torch
from conftest import CHARS, TINY, Forked, metrics, run_forked, run_forked_ok, run_forked_ranks

from chat import ChatTemplate
from common.distributed import Ranks
from common.errors import UserError
from formats.huggingface import write_hf_model
from formats.tokenizer_files import to_library, write_tokenizer
from loading import open_model
from model import GPT, GPTConfig
from tokenizer import train_bpe

pytest.importorskip('lm_eval')
transformers = pytest.importorskip('transformers')
import benchmarks
from benchmarks import Benchmarks, HarnessModel, Instance

CPU = torch.device('cpu')
SHAPE = {'block_size': 48, 'vocab_size': 300, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}
LLAMA = {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'n_kv_head': 1, 'bias': False, 'tie_weights': False}
CHAT = (
    '{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}'
    '{% if add_generation_prompt %}[assistant] {% endif %}'
)
WORDS = 'the quick brown fox jumps over a lazy dog and eats bread with soup\n'.split(' ')


def text_of(n, seed):
    """n words."""
    return ' '.join(random.Random(seed).choices(WORDS, k=n))


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    """What lm_eval's data sets are cached in."""
    import datasets

    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    kept, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp('cache')
    yield
    datasets.config.HF_DATASETS_CACHE = kept


@pytest.fixture(scope='module')
def HFLM():
    """lm_eval's own model. It imports the package accelerate, of which a model that is loaded already needs nothing."""
    names = ('Accelerator', 'InitProcessGroupKwargs', 'find_executable_batch_size', 'get_max_memory')
    with pytest.MonkeyPatch.context() as patch:
        for name in ('accelerate', 'accelerate.utils'):
            fake = types.ModuleType(name)
            fake.__dict__.update(dict.fromkeys(names))
            patch.setitem(sys.modules, name, fake)
        return importlib.import_module('lm_eval.models.huggingface').HFLM


@pytest.fixture(scope='module', params=['gpt2', 'llama'])
def pair(request, HFLM, tmp_path_factory):
    """A random model here and in lm_eval's hands: (GPT, spec, HFLM). Llama's tokenizer begins every text with <s>."""
    from tokenizers import Tokenizer, processors

    spec, folder = train_bpe([text_of(5000, 0)], 299), str(tmp_path_factory.mktemp('model'))
    if request.param == 'llama':
        library = Tokenizer.from_str(to_library(spec).to_str())
        library.add_special_tokens(['<s>'])
        start = ('<s>', library.token_to_id('<s>'))
        library.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[start])
        spec = {'kind': 'tokenizers', 'json': library.to_str(), 'special_tokens': {'bos_token': '<s>'}}
        spec['chat_template'] = CHAT
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **(LLAMA if request.param == 'llama' else {}))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 5  # else all tokens are nearly as likely
    ids = write_tokenizer(spec, folder, SHAPE['block_size'])
    write_hf_model(model, folder, torch.float32, **ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, spec, HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1)


def ask(lm, kind, *requests):
    """What a model answers to requests."""
    with getattr(lm, 'ready', torch.no_grad)():
        return getattr(lm, kind)([Instance(kind, {}, arguments, 0) for arguments in requests])


def ours(pair, batch_tokens, ranks=None):
    return HarnessModel(pair[0], pair[1], ranks or Ranks(), CPU, torch.float32, batch_tokens)


def log_likelihood_requests(start):
    contexts = ['the quick brown', 'the quick brown ', 'a lazy dog and', text_of(12, 1), text_of(90, 2), start + ' fox']
    shared = text_of(20, 3)  # 16 tokens and more that all of these begin with
    choices = [' soup', ' bread with soup', ' the quick brown fox jumps', ' x']
    requests = [(shared + context, choice) for context in ['', *contexts] for choice in choices]
    requests += [(context, choice) for context in contexts for choice in [*choices, '\n\n']]
    return [*requests, ('', 'the quick brown'), ('', start + 'dog'), requests[0], (shared, text_of(9, 4)), ('d', 'og')]


@pytest.mark.parametrize('batch_tokens', [1, 150, 10**6])
def test_log_likelihoods(pair, batch_tokens):
    """One token and several, contexts that are shared, empty, too long or end in white space."""
    requests = log_likelihood_requests(pair[2].tok_decode([pair[2].prefix_token_id], skip_special_tokens=False))
    expected, found = (ask(lm, 'loglikelihood', *requests) for lm in (pair[2], ours(pair, batch_tokens)))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-4, abs=1e-4)


def test_what_is_common_is_read_once(pair, monkeypatch):
    """Equal answers are not enough: count the tokens that the model reads."""
    lm, counts = ours(pair, 10**6), []
    hidden = pair[0].hidden
    monkeypatch.setattr(pair[0], 'hidden', lambda idx, **cache: counts.append(idx.numel()) or hidden(idx, **cache))
    context = text_of(25, 5)
    n = len(lm.tok_encode(context))
    ask(lm, 'loglikelihood', *[(context, mark) for mark in '.!?;'])  # a token each
    assert counts == [n]
    counts.clear()
    ask(lm, 'loglikelihood', *[(context, f' {a} {b}') for a in 'qxz' for b in 'qxz'])
    assert sum(counts) < 2 * n


@pytest.mark.parametrize('batch_tokens', [1, 10**6])
def test_rolling_log_likelihoods(pair, batch_tokens):
    """Whole texts, up to several windows long."""
    requests = [(text_of(n, n),) for n in (0, 1, 30, 47, 48, 200)] + [('',), ('soup',)]
    expected, found = (ask(lm, 'loglikelihood_rolling', *requests) for lm in (pair[2], ours(pair, batch_tokens)))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('batch_tokens', [1, 10**6])
def test_generated_texts(pair, batch_tokens):
    """Until the most tokens or one of several texts, after contexts that are short or too long."""
    contexts, lm = ['the', 'a lazy dog', text_of(12, 1), text_of(90, 2)], ours(pair, batch_tokens)
    requests = [(context, {'until': ['\n\n'], 'max_gen_toks': 20}) for context in contexts]
    expected = ask(pair[2], 'generate_until', *requests)
    assert ask(lm, 'generate_until', *requests) == expected
    stops = [text[8:11] for text in expected if len(text) > 11]
    assert stops
    requests = [(context, {'until': stops, 'max_new_tokens': 20, 'do_sample': False}) for context in contexts]
    requests += [(context, {'max_gen_toks': 5, 'temperature': 0.0}) for context in contexts]
    shorter = ask(pair[2], 'generate_until', *requests)
    assert ask(lm, 'generate_until', *requests) == shorter and shorter[:4] != expected
    greedy = {'until': stops, 'max_gen_toks': 20, 'do_sample': True, 'temperature': 0.7, 'top_k': 1}
    assert ask(lm, 'generate_until', *[(context, greedy) for context in contexts]) == shorter[:4]
    sampled = [(context, {'max_gen_toks': 9, 'do_sample': True, 'temperature': 1.5}) for context in contexts * 2]
    assert ask(lm, 'generate_until', *sampled) == ask(ours(pair, 10**6), 'generate_until', *sampled)
    for refused in ({'num_beams': 4}, {'max_gen_toks': 48}):
        with pytest.raises(UserError, match='num_beams=4|up to 48 tokens'):
            ask(lm, 'generate_until', ('the', refused))


@pytest.mark.parametrize('pair', ['llama'], indirect=True)
def test_chat_template(pair):
    """Conversations, some of which begin an answer that the model continues."""
    lm = ours(pair, 1)
    lm.template = ChatTemplate(pair[1])
    question = [{'role': 'system', 'content': 'a dog'}, {'role': 'user', 'content': 'a fox'}]
    started = [*question, {'role': 'assistant', 'content': 'the fox '}]
    for messages, prompt in ((question, True), (started, False)):
        assert lm.apply_chat_template(messages, prompt) == pair[2].apply_chat_template(messages, prompt)


@pytest.mark.parametrize('pair', ['llama'], indirect=True)
def test_examples_are_earlier_turns(pair, tmp_path, monkeypatch):
    tasks = write_tasks(tmp_path, ['choice'])
    suite = Benchmarks('choice', *pair[:2], Ranks(), CPU, torch.float32, str(tasks), limit=3, shots=2, chat=True)
    asked, apply = [], suite.lm.apply_chat_template
    monkeypatch.setattr(suite.lm, 'apply_chat_template', lambda *a, **k: asked.append(a[0]) or apply(*a, **k))
    dict(suite.run())
    turns = ['user', 'assistant'] * 2 + ['user']
    assert [[message['role'] for message in messages] for messages in asked] == [turns] * 3


# --- the scripts ------------------------------------------------------------------------------------------------------

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: '{{{{context}}}}'
"""
KINDS = {
    'choice': "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\nfewshot_split: test\nnum_fewshot: 1\n",
    'words': "doc_to_target: '{{choices[gold]}}'\n",
    'text': "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 5}\n"
    'metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n',
}
OUTPUTS = {'choice': 'multiple_choice', 'words': 'loglikelihood', 'text': 'generate_until'}


def write_tasks(folder, names=('choice', 'words', 'text'), n=30):
    """Tasks over a JSON file: alphabets to continue."""
    folder.mkdir(exist_ok=True)
    with open(folder / f'{n}.jsonl', 'w') as file:
        for i in range(n):
            k = i % 20
            context, choices = CHARS[2:][k : k + 4], [CHARS[2:][k + 4 : k + 6], CHARS[2:][k // 2 :][:2]]
            file.write(json.dumps({'context': context * (1 + i // 20), 'choices': choices, 'gold': i % 2 * 0}) + '\n')
    for name in names:
        yaml = CHOICE.format(name=name, path=folder / f'{n}.jsonl', kind=OUTPUTS[name]) + KINDS[name]
        (folder / f'{name}.yaml').write_text(yaml)
    return folder


SETTINGS = ['--device=cpu', '--task_path=tasks', '--tasks=choice,words,text']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a run in out/, that was judged as it went, and tasks/."""
    from conftest import write_data

    folder = tmp_path_factory.mktemp('trained')
    write_data(folder / 'data' / 'tiny')
    write_tasks(folder / 'tasks')
    tasks = ['--eval_tasks=choice,words', '--eval_tasks_path=tasks', '--eval_tasks_limit=5', '--eval_tasks_every=2']
    for arguments in (['--out_dir=plain'], ['--out_dir=out', *tasks]):
        (folder / f'{arguments[0][10:]}.txt').write_text(
            run_forked_ok('train.py', *TINY, '--dropout=0.1', *arguments, cwd=folder)
        )
    return folder


def test_training_is_judged_and_not_changed(trained):
    (plain, _), (steps, evaluations) = metrics(trained / 'plain'), metrics(trained / 'out')
    assert [step['loss'] for step in steps] == [step['loss'] for step in plain]
    assert [sorted(key for key in e if 'choice' in key or 'words' in key) for e in evaluations[:3]] == [
        ['choice/acc', 'choice/acc_norm', 'words/acc', 'words/perplexity'],
        [],  # --eval_tasks_every=2
        ['choice/acc', 'choice/acc_norm', 'words/acc', 'words/perplexity'],
    ]
    assert ', words/acc ' in (trained / 'out.txt').read_text()
    again = ['--eval_only=True', '--init_from=out', '--eval_tasks=words', '--eval_tasks_path=tasks']
    for settings in ([], ['--init_from=resume', '--out_dir=out', '--eval_interval=5', '--max_iters=9']):
        assert ', words/acc ' in run_forked_ok('train.py', *TINY, *again, *settings, cwd=trained)


def test_ranks_give_the_same(trained):
    """Two ranks share the requests, and the scores are the same to the bit; they are in the run's metrics."""
    before = len((trained / 'out' / 'metrics.jsonl').read_text().splitlines())
    alone = json.loads(run_forked_ok('evaluate.py', *SETTINGS, '--json=True', '--batch_tokens=60', cwd=trained))
    ranks = run_forked_ranks(2, 'evaluate.py', *SETTINGS, '--json=True', '--batch_tokens=60', cwd=trained)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert json.loads(ranks[0].stdout) == alone and ranks[1].stdout == ''
    assert alone['complete'] and alone['scores']['choice']['n'] == 30 and alone['scores']['choice']['shots'] == 1
    lines = (trained / 'out' / 'metrics.jsonl').read_text().splitlines()[before:]
    assert len(lines) == 2 and lines[0] == lines[1]
    record = json.loads(lines[0])
    assert record['iter'] == 8 and record['words/acc'] == pytest.approx(
        alone['scores']['words']['metrics']['acc']['value']
    )
    loss = run_forked_ok('evaluate.py', '--device=cpu', '--batch_size=3', cwd=trained)
    ranks = run_forked_ranks(2, 'evaluate.py', '--device=cpu', '--batch_size=3', cwd=trained)
    assert ranks[0].stdout == loss and 'loss' in loss


def test_sharded_training_is_judged(trained):
    """All ranks compute a sharded model together: the scores are those of one rank."""
    tasks = ['--eval_tasks=choice,text', '--eval_tasks_path=tasks', '--parallel=fsdp', '--out_dir=sharded']
    ranks = run_forked_ranks(2, 'train.py', *TINY, *tasks, '--max_iters=2', cwd=trained)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    last = metrics(trained / 'sharded')[1][-1]
    output = run_forked_ok('evaluate.py', *SETTINGS[:2], '--tasks=choice,text', '--out_dir=sharded', cwd=trained)
    rows = [line.split() for line in output.splitlines()[1:]]
    assert len(rows) == 3
    for name, metric, value, *_ in rows:
        assert last[f'{name}/{metric}'] == pytest.approx(float(value), abs=1e-4)


def test_interrupted(trained):
    """What is done is printed and kept; the status is the shell's after a signal."""
    write_tasks(trained / 'long', ['words'])
    write_tasks(trained / 'long', ['choice'], 400)
    tasks = ['--device=cpu', '--task_path=long', '--tasks=words,choice', '--batch_tokens=1']
    child = Forked('evaluate.py', *tasks, cwd=trained)
    printed = trained.parent / f'{trained.name}.out'
    while child.poll() is None and 'acc' not in printed.read_text():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGTERM)
    result = child.result()
    assert result.returncode == 143, result.stderr
    assert 'words' in result.stdout and 'choice' not in result.stdout
    assert 'interrupted' in result.stderr and 'done words; not done choice' in result.stderr


@pytest.fixture
def own_tasks(monkeypatch):
    """lm_eval without its 14,000 tasks, whose index takes seconds."""
    manager = benchmarks.TaskManager
    monkeypatch.setattr(benchmarks, 'TaskManager', lambda **options: manager(**{**options, 'include_defaults': False}))


def test_mistakes(trained, monkeypatch, own_tasks):
    def refused(*arguments):
        result = run_forked('evaluate.py', '--device=cpu', *arguments, cwd=trained)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    assert 'add --tasks=' in refused('--limit=3')
    assert 'needs a name' in refused('--tasks=,')
    assert 'no chat template' in refused('--tasks=words', '--task_path=tasks', '--chat=True')
    assert 'no such folder' in refused('--tasks=choice', '--task_path=nowhere')
    assert 'eval_bundle.zip' in refused('--tasks=core')
    (trained / 'bad').mkdir()
    (trained / 'bad' / 'words.yaml').write_text(
        CHOICE.format(name='words', path='missing.jsonl', kind='loglikelihood') + KINDS['words']
    )
    assert '--tasks=words: ' in refused('--tasks=words', '--task_path=bad')
    (trained / 'bad' / 'data.jsonl').write_text(json.dumps({'context': 'ABC', 'choices': ['D'], 'gold': 0}))
    (trained / 'bad' / 'words.yaml').write_text(
        CHOICE.format(name='words', path='bad/data.jsonl', kind='loglikelihood') + KINDS['words']
    )
    assert "the character 'A'" in refused('--tasks=words', '--task_path=bad')
    assert '--split=val: is for the loss' in refused('--tasks=words', '--split=val')
    metrics = 'metric_list: [{metric: accc, aggregation: mean, higher_is_better: true}]\n'
    description = CHOICE.format(name='words', path='tasks/30.jsonl', kind='loglikelihood') + KINDS['words'] + metrics
    (trained / 'bad' / 'words.yaml').write_text(description)
    assert "has the metric 'accc'" in refused('--tasks=words', '--task_path=bad')
    (trained / 'bad' / 'words.yaml').write_text('task:\n\t- words')
    assert 'words.yaml cannot be read: ' in refused('--tasks=words', '--task_path=bad')
    monkeypatch.delitem(sys.modules, 'benchmarks')
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    assert 'pip install lm_eval' in refused('--tasks=words')


def test_a_mistake_leaves_an_earlier_run_alone(trained, own_tasks):
    before = sorted(os.listdir(trained / 'plain'))
    settings = ['--out_dir=plain', '--eval_tasks=wrods', '--eval_tasks_path=tasks']
    result = run_forked('train.py', *TINY, *settings, cwd=trained)
    assert result.returncode == 2 and 'the nearest is words' in result.stderr, result.stderr
    assert sorted(os.listdir(trained / 'plain')) == before


def test_unknown_task_names_the_nearest(trained, own_tasks):
    model, spec, _ = open_model(str(trained / 'out'), '', '')
    with pytest.raises(UserError, match='--tasks=chocie: unknown task; the nearest is choice'):
        Benchmarks('words,chocie', model, spec, Ranks(), CPU, torch.float32, str(trained / 'tasks'))


# --- CORE -------------------------------------------------------------------------------------------------------------


def write_bundle(folder):
    """A bundle of three tasks in nanochat's format."""
    alphabet = CHARS[2:28]
    data = {'mc': [], 'schema': [], 'lm': []}
    for i in range(8):
        a, b = alphabet[i : i + 5], alphabet[i + 5 : i + 8]
        shared = 'zz' if i % 2 else ''  # tokens that all answers begin with, or all contexts end with
        data['mc'].append({'query': a, 'choices': [shared + b, shared + a, 'zz'], 'gold': i % 3})
        options = [a + shared, b + shared]
        data['schema'].append({'context_options': options, 'continuation': alphabet[i + 8 : i + 10], 'gold': i % 2})
        data['lm'].append({'context': f'{a} ', 'continuation': b})
    (folder / 'eval_data' / 'x').mkdir(parents=True)
    kinds = {'mc': ('multiple_choice', 2, 0.25), 'schema': ('schema', 1, 0.5), 'lm': ('language_modeling', 3, 0.0)}
    core, rows = {'icl_tasks': []}, ['Eval Task,Random baseline']
    for name, items in data.items():
        (folder / 'eval_data' / 'x' / f'{name}.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
        kind, shots, baseline = kinds[name]
        task = {'label': name, 'dataset_uri': f'x/{name}.jsonl', 'num_fewshot': [shots], 'icl_task_type': kind}
        core['icl_tasks'].append(task | ({'continuation_delimiter': '\n: '} if name == 'none' else {}))
        rows.append(f'{name},{100 * baseline}')
    (folder / 'core.yaml').write_text(json.dumps(core))  # JSON is YAML
    (folder / 'eval_meta_data.csv').write_text('\n'.join(rows) + '\n')
    return data, kinds


def nanochat_prompts(kind, item, examples):
    """(before, after) of what is scored, as nanochat's templates put them together and its core_eval.py cuts them."""
    if kind == 'multiple_choice':
        solved = [f'{e["query"]} {e["choices"][e["gold"]]}\n\n' for e in examples]
        texts = [f'{"".join(solved)}{item["query"]} {choice}' for choice in item['choices']]
        cuts = [min(len(os.path.commonprefix(texts)), len(text) - 1) for text in texts]  # something is scored
        return [(text[:n], text[n:]) for text, n in zip(texts, cuts)]
    if kind == 'schema':
        solved = [f'{e["context_options"][e["gold"]]} {e["continuation"]}\n\n' for e in examples]
        texts = [f'{"".join(solved)}{option} {item["continuation"]}' for option in item['context_options']]
        n = len(os.path.commonprefix([text[::-1] for text in texts]))
        return [(text[:-n], text[-n:]) for text in texts]
    solved = [f'{e["context"].strip()} {e["continuation"]}\n\n' for e in examples]
    return [(''.join(solved) + item['context'].strip(), ' ' + item['continuation'])]


def test_core(trained):
    """Against the plain way: nanochat's order and examples, each prompt alone through the model, in float64."""
    folder = trained / 'bundle'
    folder.mkdir()
    data, kinds = write_bundle(folder)
    model, spec, _ = open_model(str(trained / 'out'), '', '')
    suite = Benchmarks('core', model.eval(), spec, Ranks(), CPU, torch.float32, str(folder))
    found, exact, ids = dict(suite.run()), model.double(), {char: i for i, char in enumerate(CHARS)}
    centered = []
    for name, (kind, shots, baseline) in kinds.items():
        items, right = list(data[name]), []
        random.Random(1337).shuffle(items)
        for n, item in enumerate(items):
            others = [i for i in range(len(items)) if i != n]
            examples = [items[i] for i in random.Random(1234 + n).sample(others, shots)]
            losses, greedy = [], []
            for before, after in nanochat_prompts(kind, item, examples):
                tokens = torch.tensor([[ids[char] for char in before + after]])[:, -model.config.block_size :]
                logits = exact.logits(exact.hidden(tokens[:, :-1]))[0, -len(after) :]
                targets = tokens[0, -len(after) :]
                losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
                greedy.append(torch.equal(logits.argmax(-1), targets))
            right.append(greedy[0] if kind == 'language_modeling' else losses.index(min(losses)) == item['gold'])
        accuracy = sum(right) / len(right)
        centered.append((accuracy - baseline) / (1 - baseline))
        metrics_of_part = found[f'core/{name}']['metrics']
        assert found[f'core/{name}']['shots'] == shots
        assert metrics_of_part['acc']['value'] == pytest.approx(accuracy)
        assert metrics_of_part['centered']['value'] == pytest.approx(centered[-1])
    assert found['core']['metrics']['centered']['value'] == pytest.approx(sum(centered) / 3)
    assert found['core']['n'] == 3
    for settings in ({'chat': True}, {'shots': 1}):
        with pytest.raises(UserError, match='leave out --chat= and --num_fewshot='):
            Benchmarks(
                'core', model, {**spec, 'chat_template': CHAT}, Ranks(), CPU, torch.float32, str(folder), **settings
            )
    for file, before, after in (
        ('core.yaml', '"num_fewshot": [2]', '"num_fewshot": []'),
        ('core.yaml', '"num_fewshot": [2]', '"num_fewshot": [8]'),
        ('core.yaml', '"icl_tasks"', '"tasks"'),
        ('eval_meta_data.csv', '50.0', '100.0'),
        ('eval_data/x/mc.jsonl', '"gold": 1', '"gold": 9'),
    ):
        content = (folder / file).read_text()
        assert before in content
        (folder / file).write_text(content.replace(before, after))
        with pytest.raises(UserError, match='bundle'):
            Benchmarks('core', model, spec, Ranks(), CPU, torch.float32, str(folder))
        (folder / file).write_text(content)
