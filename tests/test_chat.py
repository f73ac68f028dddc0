"""Conversations: templates as transformers renders them, hostile ones, the cache between turns, sample.py --chat."""

import os
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CHARS, run_forked, run_forked_ok, talk_and_interrupt

from chat import ChatTemplate
from common.errors import UserError
from formats.huggingface import to_hugging_face
from generation import Context, Sample, window_start
from loading import model_entry
from model import GPT, GPTConfig
from tokenizer import HuggingFaceTokenizer, load_tokenizer

# In the manner of the families; each written for these tests.
CHATML = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}
{% set system = messages[0]['content'] %}
{% else %}{% set turns = messages %}{% set system = false %}{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}
{% endif %}
{% if loop.index0 == 0 and system is not false %}
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- if strftime_now is defined %}{% set date = strftime_now("%d %b %Y") %}{% else %}
{%- set date = "no date" %}{% endif %}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
MISTRAL = """{%- set ns = namespace(last=-1, system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content ~ '\n\n' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ (ns.system if messages.index(message) == ns.last else '') ~ message.content ~ '[/INST]' }}
    {%- elif message['content'] is not none %}{{ ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}
{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] in ('user', 'system') %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GLM = """[gMASK]{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
OTHERS = """{%- for message in messages | rejectattr('role', 'equalto', 'tool') %}
{{- loop.index ~ {'role': message.role, 'é<': message.content} | tojson ~ dict(a=1).a ~ unknown_name }}
{%- set parts = message.content.split() %}{%- for part in parts %}{% if loop.index > 3 %}{% break %}{% endif %}
{{- part | upper }}{{ ', ' if not loop.last }}{%- endfor %}
{%- generation %}{{ message.content }}{{ eos_token }}{%- endgeneration %}
{%- endfor %}{{ pad_token }}"""
TEMPLATES = {
    'chatml': CHATML,
    'llama 2': LLAMA_2,
    'llama 3': LLAMA_3,
    'mistral': MISTRAL,
    'gemma': GEMMA,
    'zephyr': ZEPHYR,
    'glm': GLM,
    'others': OTHERS,
}
ENDS = {  # the token that ends a turn, beside </s>, which ends a text
    'chatml': '<|im_end|>',
    'llama 3': '<|eot_id|>',
    'gemma': '<end_of_turn>',
    'glm': '<|user|>',
}
SPECIAL = """<s> </s> <|im_start|> <|im_end|> [INST] [/INST] <|start_header_id|> <|end_header_id|> <|eot_id|>
    <start_of_turn> <end_of_turn> <|user|> <|assistant|>""".split()
NAMES = {'bos_token': '<s>', 'eos_token': '</s>'}
TEXT = 'You help a user. The assistant says hello, how are you? I am well and you are there. What is it, then?'


def user(content):
    return {'role': 'user', 'content': content}


def assistant(content):
    return {'role': 'assistant', 'content': content}


SYSTEM = {'role': 'system', 'content': 'You are a pirate. '}
CONVERSATIONS = [
    [user('Hello there')],
    [user('Hello'), assistant('How are you?'), user(' naïve \n\n  text <s> ')],
    [user(''), assistant(''), user('?'), assistant('  I am well\n'), user('Then'), assistant('…')],
    [SYSTEM, user('Hello, "you" & <you>')],
    [SYSTEM, user('one two three four five'), assistant('Well'), user('ü'), assistant('x')],
]


def make_tokenizer(kind):
    """A small BPE of the tokenizers library -> the content of its tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    if kind == 'bytes':  # as those of GPT-2, Llama 3, Qwen, SmolLM2
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as Llama 2's
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
        alphabet = sorted(set('▁ïü…\n' + TEXT))
    special = [*SPECIAL, '<unk>']
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer.to_str()


JSONS = {}


def make_spec(template, kind='bytes', **extra):
    JSONS[kind] = JSONS.get(kind) or make_tokenizer(kind)
    spec = {'kind': 'tokenizers', 'json': JSONS[kind], 'end_of_text': '</s>', 'special_tokens': NAMES, **extra}
    return {**spec, 'chat_template': template} if template else spec


def hugging_face_tokenizer(spec):
    """transformers' tokenizer of a spec."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer.from_str(spec['json'])
    names = spec['special_tokens']
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=spec['chat_template'], **names)


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['bytes', 'metaspace'])
@pytest.mark.parametrize('family', TEMPLATES)
def test_templates_equal_transformers(family, kind):
    spec = make_spec(TEMPLATES[family], kind)
    ours, theirs, tokenizer = ChatTemplate(spec), hugging_face_tokenizer(spec), load_tokenizer(spec)
    for messages in CONVERSATIONS:
        if family == 'gemma' and messages[0] is SYSTEM:
            with pytest.raises(UserError, match='System role not supported'):
                ours.render(messages)
            continue
        for prompt in (False, True):
            text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert ours.render(messages, prompt) == text and messages[-1]['content'].strip()[:1] in text
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(messages, tokenizer, prompt) == ids


@pytest.mark.parametrize('family', TEMPLATES)
def test_end_of_turn(family):
    spec = make_spec(TEMPLATES[family])
    tokenizer = load_tokenizer(spec)
    ids = {tokenizer.tokenizer.token_to_id(token) for token in ('</s>', ENDS.get(family, '</s>'))}
    assert ChatTemplate(spec).end_of_turn(tokenizer) == ids


def test_templates_without_an_end_of_turn():
    """The end of text always ends an answer. Other special tokens of a template need not."""
    plain = '{% for m in messages %}{{ m.role }}: {{ m.content }}#\n{% endfor %}'
    no_answers = '{{ messages[0].content }}<|im_end|>{{ messages[0].content }}'
    for spec, ends in (
        ({'kind': 'char', 'chars': CHARS, 'chat_template': plain}, set()),
        ({'kind': 'byte', 'chat_template': plain}, {256}),
        (make_spec(plain), {1}),
        (make_spec(no_answers), {1}),
    ):
        assert ChatTemplate(spec).end_of_turn(load_tokenizer(spec)) == ends


def test_spans_of_the_assistant():
    """What {% generation %} marks, which training on conversations asks for."""
    template = """{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}
{% generation %}[{{ m.content }}]{{ eos_token }}{% endgeneration %}
{% else %}: {{ m.content }}{% endif %}{% endfor %}end"""
    spec = make_spec(template)
    messages = [user('a'), assistant('Hello'), user('b'), assistant(''), assistant('ü')]
    text, spans = ChatTemplate(spec).render_with_spans(messages)
    assert [text[start:end] for start, end in spans] == ['[Hello]</s>', '[]</s>', '[ü]</s>']
    theirs = hugging_face_tokenizer(spec).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = load_tokenizer(spec)
    marked = [id for id, mark in zip(theirs['input_ids'], theirs['assistant_masks']) if mark]
    assert tokenizer.decode(marked) == '[Hello]</s>[]</s>[ü]</s>'
    assert ChatTemplate(spec).render_with_spans(messages)[1] == spans, 'nothing is left of the last rendering'


GROW = '{% set ns = namespace(x="aaaaaaaa") %}{% for i in range(99) %}{% set ns.x = '
HOSTILE = {
    'attributes': ("{{ ''.__class__.__mro__ }}", "'__class__'"),
    'attributes by filter': ("{{ (cycler | attr('__init__')).x }}", 'unsafe'),
    'attributes by format': ("{{ '{0.__class__.__mro__}'.format(1) }}", 'unsafe'),
    'globals': ('{{ raise_exception.__globals__.x }}', "'__globals__'"),
    'globals of a class': ('{{ namespace.__init__.__globals__ }}', "'__init__'"),
    'methods of dict': ('{{ dict.fromkeys.x }}', 'fromkeys'),
    'methods that Python calls': ('{{ namespace(__call__=range)() }}', 'may not have the attribute __call__'),
    'the same, set later': ('{% set ns = namespace() %}{% set ns._x = 1 %}', 'may not have the attribute _x'),
    'changes the conversation': ('{{ messages.clear() }}', "'clear'"),
    'changes a message': ("{{ messages[0].update(role='x') }}", "'update'"),
    'reads a file': ("{% include '/etc/passwd' %}", 'no loader'),
    'imports': ("{% import 'os' as os %}", 'no loader'),
    'syntax': ('{% if %}', 'Expected an expression'),
    'unknown tag': ('{% exec "x" %}', "unknown tag 'exec'"),
    'unknown filter': ('{{ 1 | nothing }}', "'nothing'"),
    'undefined': ('{{ nothing.at.all }}', "'nothing' is undefined"),
    'wrong types': ("{{ 1 + 'a' }}", 'unsupported operand'),
    'many lines': (r"{{ raise_exception('one\ntwo') }}", 'one two'),
    'division': ('{{ 1 // 0 }}', 'by zero'),
    'recursion': ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'recursion'),
    'nesting': ('{{ ' + '(' * 20000 + ' }}', 'recursion'),
    'powers': ('{{ 9 ** 9 ** 9 }}', 'powers are not allowed'),
    'large ranges': ('{% for i in range(1000000000) %}{% endfor %}', 'Range too big'),
    'long': ('x' * 1_000_001, 'a text of at most'),
    'writes much': ('{% for i in range(9999) %}' + 'x' * 10000 + '{% endfor %}', 'writes more than'),
    'not a text': ({'a': 1}, 'must be a text'),
}
LARGE = {
    'repeats': "{{ 'a' * 10000000000 }}",
    'doubles': GROW + 'ns.x ~ ns.x %}{% endfor %}{{ ns.x }}',
    'pads': "{{ 'x' | center(9999999999) }}",
    'formats': "{{ '%9999999999d' % 1 }}",
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_templates(name):
    template, expected = HOSTILE[name]
    with pytest.raises(UserError) as error:
        ChatTemplate({'chat_template': template}).render([user('Hello'), assistant('x')])
    assert expected in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='memory is limited on Linux alone')
@pytest.mark.parametrize('name', LARGE)
def test_templates_that_take_memory(name):
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match='takes more than 128 MB'):
        ChatTemplate({'chat_template': LARGE[name]}).render([user('Hello')])
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_no_template(monkeypatch):
    for spec in ({'kind': 'byte'}, {'kind': 'byte', 'chat_template': ''}, {'kind': 'byte', 'chat_template': None}):
        with pytest.raises(UserError, match='no chat template.*--interactive=True'):
            ChatTemplate(spec)
    with pytest.raises(UserError, match='special_tokens'):
        ChatTemplate({'chat_template': 'x', 'special_tokens': {'bos_token': 1}})
    monkeypatch.setattr('importlib.metadata.version', lambda name: '3.1.5')
    with pytest.raises(UserError, match='pip install -U jinja2'):
        ChatTemplate({'chat_template': 'x'})
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(UserError, match='pip install jinja2'):
        ChatTemplate({'chat_template': 'x'})


# --- the context ------------------------------------------------------------------------------------------------------


def make_model(vocab_size, favourite=None, seed=0, **options):
    """A random model; its logit of the token `favourite` varies twice as much as others, so that it comes often."""
    torch.manual_seed(seed)
    shape = dict(block_size=512, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**shape, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        if favourite is not None:
            model.lm_head.weight[favourite] *= 2
    return model


LLAMA = dict(pos='rope', norm='rmsnorm', mlp='swiglu', n_kv_head=1, bias=False, tie_weights=False)


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('options', [{}, LLAMA, {'pos': 'alibi', 'block_size': 7}, {'block_size': 1}], ids=str)
@pytest.mark.parametrize('rows', [1, 3])
def test_rewinding_equals_a_fresh_context(options, static, rows):
    """However often tokens are forgotten and others read, before the window has moved and after; a row that is not
    rewound keeps its tokens."""
    model, rng = make_model(50, **{'block_size': 16, **options}).double(), random.Random(rows)
    block_size = model.config.block_size
    columns = block_size if static else 2  # the cache grows
    context, texts = Context(model, rows, columns, static), [[] for _ in range(rows)]
    with torch.inference_mode():
        for _ in range(25):
            for row in rng.sample(range(rows), rng.randint(0, rows)):
                n = rng.choice([0, rng.randint(0, len(texts[row])), max(0, len(texts[row]) - rng.randint(0, 6))])
                context.rewind(row, n)
                del texts[row][n:]
            new = [[rng.randrange(50) for _ in range(rng.choice([1, 1, 2, 5, 9, 20]))] for _ in range(rows)]
            for text, ids in zip(texts, new):
                text += ids
            logits = context.read(new)
            assert context.rows == texts
            for text, its in zip(texts, logits):
                expected = model(torch.tensor([text[window_start(len(text), block_size) :]]))[0][0, -1]
                torch.testing.assert_close(its, expected, rtol=1e-5, atol=1e-5)


def test_rewinding_reads_only_what_is_new(monkeypatch):
    model = make_model(50, block_size=16)
    context, read = Context(model, 1, 16), []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda idx, **cache: (read.append(idx[0].tolist()), hidden(idx, **cache))[1])
    with torch.inference_mode():
        for n, new in ((0, range(12)), (8, [20, 21]), (10, [22, 23, 24, 25, 26, 27, 28, 29]), (17, [30])):
            context.rewind(0, n)
            context.read([list(new)])
    first = [*range(8), 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    assert read == [list(range(12)), [20, 21], first[8:], [30]]


def test_a_sample_ends_at_any_of_several_tokens():
    for end, ids in ((1, [3, 1]), ({1, 2}, [3, 1]), ({2}, [3, 1, 2]), (set(), [3, 1, 2, 5]), (None, [3, 1, 2, 5])):
        sample = Sample([0], end_of_text=end)
        for token in (3, 1, 2, 5):
            if sample.finish_reason is None:
                sample.add(token)
        assert sample.ids == ids and (sample.finish_reason == 'end_of_text') == (len(ids) < 4)


# --- sample.py --chat -------------------------------------------------------------------------------------------------


HEADER = 'Type a message; \\n in it is a line end. Ctrl-C stops an answer, Ctrl-D ends.\n'
LINES = ['Hello there', 'How are\\nyou?', '', 'Then what is it']
GREEDY = ['--out_dir=out', '--chat=True', '--temperature=0', '--device=cpu']


def save(folder, model, spec):
    """Save a model as a run would."""
    (folder / 'out').mkdir(exist_ok=True)
    checkpoint = {**model_entry(model), 'iter_num': 0, 'config': {}, 'tokenizer': spec}
    torch.save(checkpoint, folder / 'out' / 'ckpt.pt')


def type_in(folder, monkeypatch, lines):
    """Let forked scripts read these lines."""
    typed = folder / 'typed.txt'
    typed.write_text(''.join(line + '\n' for line in lines), encoding='utf-8')
    monkeypatch.setattr(sys, 'stdin', open(typed, encoding='utf-8'))


@torch.no_grad()
def recompute(model, ids, n, ends):
    """Greedy decoding without a cache -> the new ids."""
    row = list(ids)
    while len(row) < len(ids) + n and row[-1] not in (ends if len(row) > len(ids) else ()):
        row.append(
            int(model(torch.tensor([row[window_start(len(row), model.config.block_size) :]]))[0][0, -1].argmax())
        )
    return row[len(ids) :]


def hugging_face_generate(hf_model):
    def generate(_, ids, n, ends):
        idx = torch.tensor([ids])
        options = dict(attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0)
        return hf_model.generate(idx, max_new_tokens=n, eos_token_id=sorted(ends), **options)[0, len(ids) :].tolist()

    return generate


def conversation(model, spec, lines, n, system='', generate=recompute, ends=('</s>', '<|im_end|>')):
    """The conversation by transformers' template and tokenizer -> the answers, the ids before and of each."""
    tokenizer = hugging_face_tokenizer(spec)
    ends = set(tokenizer.convert_tokens_to_ids(list(ends)))
    first = [{'role': 'system', 'content': system}] if system else []
    messages, block_size = [], model.config.block_size
    result = SimpleNamespace(answers=[], prompts=[], ids=[])
    for line in filter(None, lines):
        messages = [*messages, user(line.replace('\\n', '\n'))]
        while True:
            prompt = tokenizer.apply_chat_template([*first, *messages], add_generation_prompt=True, return_dict=False)
            if len(prompt) + min(n, block_size // 2) <= block_size or len(messages) == 1:
                break
            messages = messages[2:]  # the oldest message and its answer
        ids = generate(model, prompt, n, ends)
        text = tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, clean_up_tokenization_spaces=False)
        messages = [*messages, assistant(text)]
        result.answers.append(text)
        result.prompts.append(prompt)
        result.ids.append(ids)
    return result


def printed(lines, answers):
    """What sample.py prints, as Python reads it from a file. An empty line gets no answer."""
    answers = iter(answers)
    text = HEADER + ''.join(f'> {next(answers)}\n' if line else '> ' for line in lines) + '> \n'
    return text.replace('\r\n', '\n').replace('\r', '\n')


@pytest.mark.parametrize('family, options', [('chatml', LLAMA), ('chatml', {}), ('llama 2', {})], ids=str)
@pytest.mark.parametrize('system', ['', 'You are a pirate.'])
def test_turns_equal_those_generated_anew(tmp_path, monkeypatch, family, options, system):
    """Several turns over one cache: the ids before each answer are transformers', the answer is what its generate(), or
    our model without a cache, makes of them, and ends where the template says that an answer does."""
    kind = 'metaspace' if family == 'llama 2' else 'bytes'
    spec = make_spec(TEMPLATES[family], kind)
    tokenizer = load_tokenizer(spec)
    end = tokenizer.tokenizer.token_to_id('<|im_end|>' if family == 'chatml' else '</s>')
    ends = ('</s>', ENDS.get(family, '</s>'))
    for seed in range(30):  # until some answers end by themselves, and some after 24 tokens
        model = make_model(tokenizer.vocab_size, end, seed, **options)
        generate = recompute if options else hugging_face_generate(to_hugging_face(model))
        expected = conversation(model, spec, LINES, 24, system, generate, ends)
        if {ids[-1] == end for ids in expected.ids} == {True, False}:
            break
    else:
        pytest.fail('no model shows both')
    save(tmp_path, model, spec)
    type_in(tmp_path, monkeypatch, LINES)
    hidden = GPT.hidden

    def reporting(self, idx, starts=None, cache=None):
        if cache is not None:
            print(idx.size(1), file=sys.stderr)
        return hidden(self, idx, starts, cache)

    monkeypatch.setattr(GPT, 'hidden', reporting)
    result = run_forked('sample.py', *GREEDY, '--max_new_tokens=24', f'--system={system}', cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == printed(LINES, expected.answers)
    read, n = [], 0  # tokens in the cache, and how many were read into it
    for prompt, ids in zip(expected.prompts, expected.ids):
        same = len(os.path.commonprefix([read, prompt[:-1]]))
        read = prompt + ids[:-1]
        n += len(read) - same
    assert sum(map(int, result.stderr.split())) == n, 'what has been read is not read again'


def test_a_conversation_that_outgrows_the_context(tmp_path, monkeypatch):
    """The oldest messages are forgotten, the system message stays; of a message too long alone the end is seen."""
    spec = make_spec(CHATML)
    tokenizer = load_tokenizer(spec)
    model = make_model(tokenizer.vocab_size, block_size=128, **LLAMA)
    lines = ['Hello', 'How are you?', 'What is it, then?', 'there ' * 200, 'Hello']
    expected = conversation(model, spec, lines, 20, 'You help.')
    assert max(map(len, expected.prompts)) > 128
    save(tmp_path, model, spec)
    type_in(tmp_path, monkeypatch, lines)
    result = run_forked('sample.py', *GREEDY, '--max_new_tokens=20', '--system=You help.', cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == printed(lines, expected.answers)
    warnings = result.stderr.splitlines()
    assert all(line.startswith('warning: ') and 'outgrew the context of 128 tokens' in line for line in warnings)
    assert 'its first 2 messages are forgotten' in result.stderr and 'sees only its end' in result.stderr


def test_other_ways_to_compute(tmp_path, monkeypatch):
    """With 8-bit weights a conversation goes on as well; so it does for a sampled answer, from its own seed."""
    spec = make_spec(CHATML)
    save(tmp_path, make_model(load_tokenizer(spec).vocab_size, **LLAMA), spec)
    quantized = ['--quantize=int8'] if 'fbgemm' in torch.backends.quantized.supported_engines else []
    outputs = []
    for options in (quantized, ['--temperature=1'], ['--temperature=1'], ['--temperature=1', '--seed=2']):
        type_in(tmp_path, monkeypatch, LINES)
        outputs.append(run_forked_ok('sample.py', *GREEDY, '--max_new_tokens=9', *options, cwd=tmp_path))
    assert outputs[1] == outputs[2] != outputs[3] and all(output.endswith('\n> \n') for output in outputs)


def test_the_first_message_and_stop_texts(tmp_path, monkeypatch):
    """--start is a message as if it had been typed; --stop ends an answer, which goes into the conversation without
    it. The model is one of characters, whose template has no tokens of its own."""
    template = '{% for m in messages %}{{ m.content }}\n{% endfor %}'
    spec = {'kind': 'char', 'chars': CHARS, 'chat_template': template}
    model = make_model(len(CHARS), **LLAMA)
    save(tmp_path, model, spec)
    tokenizer, messages, answers, stop = load_tokenizer(spec), [], [], None
    for line in ('abc', 'def', 'xyz'):
        messages.append(user(line))
        ids = tokenizer.encode(''.join(message['content'] + '\n' for message in messages)).tolist()
        answer = tokenizer.decode(recompute(model, ids, 30, set()))
        stop = stop or answer[5]
        answers.append(answer.split(stop)[0])
        messages.append(assistant(answers[-1]))
    type_in(tmp_path, monkeypatch, ['def', 'X', 'xyz'])  # X is none of its characters
    result = run_forked('sample.py', *GREEDY, '--max_new_tokens=30', '--start=abc', f'--stop={stop}', cwd=tmp_path)
    assert result.returncode == 0 and result.stderr.startswith('this cannot be answered: the character ')
    assert result.stderr.count('\n') == 1
    assert result.stdout == HEADER + f'{answers[0]}\n> {answers[1]}\n> > {answers[2]}\n> \n'


def test_ctrl_c_stops_an_answer_and_keeps_it(tmp_path):
    template = '{% for m in messages %}{{ m.content }}.{% endfor %}'
    save(tmp_path, make_model(len(CHARS), **LLAMA), {'kind': 'char', 'chars': CHARS, 'chat_template': template})
    errors = talk_and_interrupt('sample.py', *GREEDY, '--max_new_tokens=1000000', cwd=tmp_path)
    assert all(line.startswith('warning: the conversation outgrew') for line in errors.splitlines())


@pytest.mark.parametrize(
    'template, arguments, expected',
    [
        ('', '', 'the model has no chat template'),
        ('{% if %}', '', "the model's chat template fails"),
        (GEMMA, '--system=x', 'System role not supported'),
        (CHATML, '--json=True', '--chat=True and --json=True: choose one'),
        (CHATML, '--interactive=True', '--interactive=True and --chat=True: choose one'),
        (CHATML, '--num_samples=3', '--num_samples=3: --chat=True gives one answer'),
        (CHATML, '--chat=False --system=x', '--system: is for conversations; add --chat=True'),
        (CHATML, '--start=LINES:lines.txt', '--chat=True: starts with one prompt, not 2'),
    ],
)
def test_mistakes(tmp_path, template, arguments, expected):
    save(tmp_path, make_model(340), make_spec(template))
    (tmp_path / 'lines.txt').write_text('a\nb\n')
    result = run_forked('sample.py', *GREEDY, *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    assert expected in result.stderr


# --- text that is not a conversation ----------------------------------------------------------------------------------


def test_a_prompt_starts_with_the_tokenizers_prefix(tmp_path, monkeypatch):
    """As in transformers, where a tokenizer puts <s> before every text; it is not printed."""
    import tokenizers

    spec = make_spec(LLAMA_2, 'metaspace')
    library = tokenizers.Tokenizer.from_str(spec['json'])
    library.post_processor = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    spec['json'] = library.to_str()
    monkeypatch.setattr(HuggingFaceTokenizer, 'prefix', [0], raising=False)
    model = make_model(load_tokenizer(spec).vocab_size)
    save(tmp_path, model, spec)
    theirs = hugging_face_tokenizer(spec)
    prompt = theirs('Hello there').input_ids
    assert prompt[0] == 0
    new = recompute(model, prompt, 20, {1})
    settings = ['--out_dir=out', '--device=cpu', '--temperature=0', '--max_new_tokens=20']
    output = run_forked_ok('sample.py', *settings, '--num_samples=2', '--start=Hello there', cwd=tmp_path)
    text = theirs.decode(prompt + new).removeprefix('<s>').lstrip(' ')
    assert output == 2 * f'{text}\n---------------\n'
    output = run_forked_ok('sample.py', *settings, '--num_samples=1', '--start=', cwd=tmp_path)
    assert output.startswith(theirs.decode([0, *recompute(model, [0], 20, {1})]).removeprefix('<s>'))
    type_in(tmp_path, monkeypatch, ['Hello there', ''])
    output = run_forked_ok('sample.py', *settings, '--interactive=True', cwd=tmp_path)
    more = recompute(model, prompt + new, 20, {1})
    assert output.split('> ')[1:3] == [
        theirs.decode(prompt + new)[len(theirs.decode(prompt)) :] + '\n',
        theirs.decode(new + more)[len(theirs.decode(new)) :] + '\n',
    ]
