"""Generate text from a trained model.

python sample.py --out_dir=out-shakespeare-char --start="To be, or" --num_samples=3
python sample.py --init_from=gpt2 --start=FILE:prompt.txt --max_new_tokens=100 --stop="The end"
python sample.py --start=LINES:prompts.txt --json=True > samples.jsonl
python sample.py --interactive=True
python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --system="You are a pirate."
"""

import itertools
import os
import signal
import sys
from contextlib import suppress

from chat import ChatTemplate
from common.cpu import pack
from common.device import autocast, compile_or_stay_eager, decoding_options, set_up_device
from common.errors import UserError, one_line, user_errors, warn
from configurator import configure, require
from dataloader import DataSet, dataset_name
from generation import Context, Sample, Sampling, generate
from loading import open_model
from tokenizer import GPT2_SPEC, TextStream, check_known, load_tokenizer, text_vocab_size

init_from = 'resume'  # 'resume': the checkpoint in out_dir; or a run, or a model: folder, .gguf file, name on the hub
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt' is the latest, 'ckpt_best.pt' has the lowest validation loss
start = '\n'  # the prompt; or FILE:path of a UTF-8 file with it, FILES:path,path of several, LINES:path of one per line
num_samples = 10  # samples to generate for each prompt
max_new_tokens = 500  # tokens to generate for each sample
temperature = 0.8  # 1: the model's own probabilities, lower is tamer, higher is wilder; 0: always the most likely token
top_k = 200  # sample from the k most likely tokens; 0: from all
top_p = 1.0  # sample from the smallest set of most likely tokens whose probability is at least p; 1: from all
min_p = 0.0  # sample from tokens with p >= min_p * p_max; 0: from all
repetition_penalty = 1.0  # above 1: tokens that have occurred become less likely
stop = ()  # --stop=TEXT ends a sample before TEXT; may be given several times
ignore_eos = False  # continue past the end-of-text token
seed = 1337  # the same seed gives the same samples
batch_size = 32  # most samples to generate at once
stream = True  # print text while it is generated; False: each sample when it is finished
json = False  # print each sample as a JSON object on a line: prompt, text, token_ids, log_probs, finish_reason
interactive = False  # ask for text to continue, again and again, one sample at a time
chat = False  # converse with a model that was fine-tuned for it, by its chat template
system = ''  # with chat: tells the model how to answer, before the conversation
quantize = ''  # 'int8': 8-bit weights on an x86 CPU, 1.1 to 1.4 times as fast for nearly the same text; 'int4': 4-bit
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best available
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = False  # compile the decoding step, which takes half a minute: for long samples on a GPU
config = configure(globals(), paths=('out_dir', 'init_from'))

require(config, 'num_samples', 'at least 1', lambda v: v >= 1)
require(config, 'batch_size', 'from 1 to 65536', lambda v: 1 <= v <= 65536)
require(config, 'temperature top_k seed', '0 or more', lambda v: 0 <= v < float('inf'))
require(config, 'max_new_tokens', 'from 0 to 10,000,000', lambda v: 0 <= v <= 10**7)
require(config, 'top_p', 'above 0 and at most 1', lambda v: 0 < v <= 1)
require(config, 'min_p', 'from 0 to 1', lambda v: 0 <= v <= 1)
require(config, 'repetition_penalty', 'from 0.01 to 100', lambda v: 0.01 <= v <= 100)
talking = 'chat' if chat else 'interactive' if interactive else ''  # the setting that asks for turns
if interactive and (chat or json):
    raise UserError(f'--interactive=True and --{"chat" if chat else "json"}=True: choose one')
if chat and json:
    raise UserError('--chat=True and --json=True: choose one')
if chat and num_samples != 1 and 'num_samples' in config.given:
    raise UserError(f'--num_samples={num_samples}: --chat=True gives one answer to each message; leave it out')
if system and not chat:
    raise UserError('--system: is for conversations; add --chat=True')
if talking and (sys.stdin is None or sys.stdout is None):
    raise UserError(f'--{talking}=True: needs a terminal, or a pipe, to read from and to write to')

device, dtype = set_up_device(device, dtype)

# --- model and tokenizer ----------------------------------------------------------------------------------------------
model, spec, train_config = open_model(init_from, out_dir, ckpt)
if spec is None and (init_from == 'resume' or train_config):
    # nanoGPT's checkpoints only name the data set: its meta.pkl has the characters; without one, the ids are GPT-2's
    name = dataset_name(str(train_config.get('dataset')))
    folder = os.path.join('data', name)
    data = DataSet(name) if os.path.isdir(folder) else None
    spec = data.tokenizer if data else GPT2_SPEC
    if not (data and data.meta):
        warn(
            f"the checkpoint holds no tokenizer, and {folder} no meta.pkl: its ids are taken for GPT-2's, as in nanoGPT"
        )
if spec is None:
    raise UserError(
        'the model comes with no tokenizer, so its ids cannot be turned into text: '
        'put its tokenizer.json, or vocab.json and merges.txt, beside it'
    )
with user_errors(ValueError, where='the tokenizer of the model: '):
    tokenizer = load_tokenizer(spec)
vocab_size = model.config.vocab_size
if text_vocab_size(spec) > vocab_size:
    raise UserError(
        f'the tokenizer has {text_vocab_size(spec)} ids, the model {vocab_size}: they do not belong together'
    )
# Either may be larger: a model's vocabulary is often rounded up, a pretrained tokenizer may have had tokens added.
n_ids = min(tokenizer.vocab_size, vocab_size)
sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, vocab_size=n_ids)
prefix = tokenizer.prefix  # ids that start every text, such as <s>
with user_errors(ValueError, where='what the tokenizer puts before a text: '):
    check_known(prefix, n_ids, tokenizer)


# --- prompts ----------------------------------------------------------------------------------------------------------
def read_text(path):
    """The content of a UTF-8 file, without a byte order mark."""
    with user_errors(OSError, UnicodeDecodeError, where=f'cannot read the prompt {path or "(no path)"}: '):
        with open(os.path.expanduser(path), encoding='utf-8-sig') as file:
            return file.read()


def read_prompts(start):
    """--start= -> [(where the prompt comes from, for error messages; the prompt)], at least one."""
    kind, colon, paths = start.partition(':')
    if colon and kind == 'FILE':
        return [(paths, read_text(paths))]
    if colon and kind == 'FILES':
        return [(path.strip(), read_text(path.strip())) for path in paths.split(',')]
    if colon and kind == 'LINES':
        lines = enumerate(read_text(paths).split('\n'), 1)
        prompts = [(f'{paths}, line {n}', line) for n, line in lines if line]
        if not prompts:
            raise UserError(f'--start={start}: the file has no lines with anything in them')
        return prompts
    return [(f'--start={one_line(start, 40)}', start)]


def encode(text, where):
    """Text -> ids. UserError, starting with `where`, if there are none or the model does not know a character."""
    with user_errors(ValueError, where=f'{where}: '):
        ids = tokenizer.encode(text, special=True).tolist()
        if not ids and not prefix:
            raise ValueError('a prompt must have at least one token; a line end will do')
        check_known(ids, n_ids, tokenizer)
        return ids


def new_sample(prompt, *key):
    """A Sample that continues the prompt's ids. Each key gives it other random numbers."""
    return Sample(prompt, (seed, *key), tokenizer, stop, None if ignore_eos else tokenizer.end_of_text)


def first_sample(ids, *key):
    """A Sample of a text that starts with these ids; its prompt_text is theirs alone."""
    sample = new_sample(prefix + ids, *key)
    sample.prompt_text = tokenizer.decode(ids) if prefix else sample.prompt_text
    return sample


if 'start' not in config.given and spec['kind'] == 'char' and start not in spec['chars']:
    start = spec['chars'][0]  # the vocabulary has no line end: start with a character that it has
places, prompts = zip(*read_prompts(start))
if talking and len(prompts) > 1:
    raise UserError(f'--{talking}=True: starts with one prompt, not {len(prompts)}')
if chat:
    template = ChatTemplate(spec)
    turn_ends = template.end_of_turn(tokenizer)
    system_message = [{'role': 'system', 'content': system}] if system else []
    if system:
        template.render([*system_message, {'role': 'user', 'content': 'Hello'}])  # some know no system message
else:
    prompt_ids = [encode(prompt, place) for place, prompt in zip(places, prompts)]

# --- weight layout and compilation ------------------------------------------------------------------------------------
batch_size = 1 if talking else min(batch_size, num_samples * len(prompts))
model.eval().to(device)
if quantize or not (compile and device.type == 'cpu'):  # torch.compile cannot trace packed layers
    pack(model, device, dtype, quantize)
static_context = None  # for a compiled model: one batch of a fixed size, at fixed addresses, used for all samples
if compile:
    with autocast(device, dtype):
        static_context = Context(model, batch_size, model.config.block_size, static=True)

    def trial():
        # A prompt of one token, as longer ones are read uncompiled; two new tokens, as CUDA records at the second call.
        samples = [Sample([0]) for _ in range(batch_size)]
        with autocast(device, dtype):
            for _ in generate(model, samples, 2, sampling, context=static_context, static=True):
                pass

    if not compile_or_stay_eager([model], trial, device, **decoding_options(device)):
        static_context = None


def generate_batch(samples, **options):
    """generate() for up to batch_size new samples. For a compiled model, extra samples fill up the batch."""
    if static_context is None:
        return generate(model, samples, max_new_tokens, sampling, **options)
    static_context.forget()
    padding = [Sample(samples[0].prompt) for _ in range(batch_size - len(samples))]
    samples = [*samples, *padding]
    return generate(model, samples, max_new_tokens, sampling, context=static_context, static=True, **options)


# --- output -----------------------------------------------------------------------------------------------------------
def write_text(samples):
    """Generate the samples in one batch and print them in order; with --stream, the next one while it grows."""
    current, printed = 0, 0  # the sample that is being printed, and how many of its characters have been

    def print_new():
        nonlocal current, printed
        while current < len(samples):
            sample = samples[current]
            if not (stream or sample.finish_reason):
                return
            text, end = sample.prompt_text + sample.text, len(sample.prompt_text) + sample.settled()
            print(text[printed:end], end='', flush=stream)
            printed = end
            if not sample.finish_reason:
                return
            print('\n---------------', flush=True)
            current, printed = current + 1, 0

    for _ in generate_batch(samples):
        print_new()
        if current == len(samples):
            break  # only padding is left
    for sample in samples:
        sample.finish('length')  # with --max_new_tokens=0
    print_new()


def write_json(samples, prompts):
    """Generate the samples in one batch and print a JSON object for each."""
    from json import dumps

    ascii_only = 'utf' not in (sys.stdout.encoding or '').lower()  # other encodings lack characters: write \uXXXX
    for _ in generate_batch(samples, log_probs=True):
        if all(sample.finish_reason for sample in samples):
            break
    for sample, prompt in zip(samples, prompts):
        sample.finish('length')
        record = {
            'prompt': prompt,
            'text': sample.text,
            'token_ids': sample.ids,
            'log_probs': sample.log_probs,
            'finish_reason': sample.finish_reason,
        }
        print(dumps(record, ensure_ascii=ascii_only), flush=True)


# --- turn by turn -----------------------------------------------------------------------------------------------------
def typed_lines():
    """What the user types, after --start, line by line; \\n in it is a line end. Ctrl-D ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    if 'start' in config.given:
        yield prompts[0]
    while True:
        try:
            typed = input('> ').replace('\\n', '\n')
        except KeyboardInterrupt:
            print('\n(Ctrl-D ends)')
            continue
        except EOFError:
            return print()
        yield typed


def growing_context():
    """An empty context of one row. It may become as long as the model allows, but few conversations do."""
    context = static_context or Context(model, 1, 1024)
    context.forget()
    return context


def continue_text():
    """Ask for text, continue it, ask again: all in one growing context."""
    print(
        'Type text for the model to continue; \\n in it is a line end, an empty line lets the model go on.\n'
        'Ctrl-C stops an answer, Ctrl-D ends.'
    )
    context = growing_context()
    unread, turn = prefix, 0  # ids that the context has not read yet; answers so far
    for typed in typed_lines():
        try:
            ids = unread + (encode(typed, 'this cannot be continued') if typed else [])
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        if ids:
            sample = new_sample(ids, turn)
            answer(sample, context)
            unread = [token for token in sample.ids[-1:] if token != tokenizer.end_of_text] if sample.ids else ids
            turn += 1


def converse():
    """Ask for a message, answer it, ask again. Each time the template renders the whole conversation, as the model has
    seen it in training; of that, the context reads what it has not read yet."""
    print('Type a message; \\n in it is a line end. Ctrl-C stops an answer, Ctrl-D ends.')
    context, turns, n_answers = growing_context(), [], 0
    for typed in typed_lines():
        if not typed.strip():
            continue
        try:
            asked, ids = fitting([*turns, {'role': 'user', 'content': typed}])
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        same = common_length(context.rows[0], ids[:-1])  # read the last one in any case: its logits are needed
        context.rewind(0, same)
        sample = Sample(ids[same:], (seed, n_answers), tokenizer, stop, None if ignore_eos else turn_ends)
        sample.stream = TextStream(tokenizer)  # an answer is a text of its own, as for transformers
        answer(sample, context)
        turns = [*asked, {'role': 'assistant', 'content': sample.text}]
        n_answers += 1


def fitting(turns):
    """Messages, the last of them the user's -> as many of the last as fit into the context together with an answer, and
    the ids of the conversation, system message included. UserError if the template refuses them, or the model does not
    know a character."""
    block_size = model.config.block_size
    space = block_size - min(max_new_tokens, block_size // 2)
    for first in [i for i, message in enumerate(turns) if message['role'] == 'user']:
        kept = turns[first:]
        with user_errors(ValueError, where='this cannot be answered: '):
            ids = template.encode([*system_message, *kept], tokenizer)
            check_known(ids, n_ids, tokenizer)
            if not ids:
                raise ValueError('the chat template writes nothing')
        if len(ids) <= space:
            break
    if first:
        warn(f'the conversation outgrew the context of {block_size} tokens: its first {first} messages are forgotten')
    if len(ids) > block_size:
        warn(f'this message outgrew the context of {block_size} tokens: the model sees only its end')
    return kept, ids


def common_length(a, b):
    """How many elements at their start two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def answer(sample, context):
    """Print the sample as it grows, until it is finished or Ctrl-C is pressed."""
    interrupted = []
    previous_handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    printed = 0
    try:
        for _ in generate(model, [sample], max_new_tokens, sampling, context=context, static=context.cache.static):
            if interrupted:
                sample.finish('interrupted')
            print(sample.text[printed : sample.settled()], end='', flush=True)
            printed = sample.settled()
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    print(flush=True)


with autocast(device, dtype):
    if chat:
        converse()
    elif interactive:
        continue_text()
    else:
        jobs = ((prompt, first_sample(ids, i)) for prompt, ids in zip(prompts, prompt_ids) for i in range(num_samples))
        while batch := list(itertools.islice(jobs, batch_size)):
            batch_prompts, samples = zip(*batch)
            if json:
                write_json(samples, batch_prompts)
            else:
                write_text(samples)
