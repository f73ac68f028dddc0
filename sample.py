"""Draw text from a trained model.

python sample.py --out_dir=out-shakespeare-char --start="To be, or" --num_samples=3
python sample.py --init_from=gpt2 --start=FILE:prompt.txt --max_new_tokens=100 --stop="The end"
python sample.py --start=LINES:prompts.txt --json=True > texts.jsonl
python sample.py --interactive=True
"""

import itertools
import os
import signal
import sys
from contextlib import suppress

from common.cpu import keep_memory, pack
from common.device import autocast, compile_or_stay_eager, decoding_options, pick_device, pick_dtype, use_fast_float32
from common.errors import UserError, one_line, user_errors, warn
from configurator import configure, require
from dataloader import dataset_name, read_meta
from generation import Context, Sample, Sampling, generate
from loading import open_model
from tokenizer import check_known, load_tokenizer, spec_from_meta, text_vocab_size

init_from = 'resume'  # 'resume': the checkpoint in out_dir; 'gpt2', 'gpt2-medium', …; or the folder of a run or of a Hugging Face GPT-2
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt' is the latest, 'ckpt_best.pt' the one of the lowest validation loss
start = '\n'  # the prompt; or FILE:path of a UTF-8 file with it, FILES:path,path of several, LINES:path of one per line
num_samples = 10  # texts to draw for each prompt
max_new_tokens = 500  # tokens in each, after the prompt
temperature = 0.8  # 1: as trained, lower is tamer, higher is wilder; 0: always the likeliest token
top_k = 200  # draw among so many likeliest tokens only; 0: all
top_p = 1.0  # draw among the likeliest tokens that together have this probability; 1: all
min_p = 0.0  # draw among tokens at least so many times as probable as the likeliest; 0: all
repetition_penalty = 1.0  # above 1: tokens that occurred become less likely
stop = ()  # --stop=TEXT ends a text before TEXT; may be given several times
ignore_eos = False  # go on after the end-of-text token
seed = 1337  # same seed, same text
batch_size = 32  # texts drawn at once, at most
stream = True  # show the text while it is drawn; False: each when it is finished
json = False  # write a JSON object a line for each text: prompt, text, token_ids, log_probs, finish_reason
interactive = False  # ask for text to continue, again and again, one text at a time
quantize = ''  # 'int8': 8-bit weights on an x86 CPU, 1.5 to 2.5 times as fast, for a little quality
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': the best there is
dtype = 'auto'  # of matrix products: 'float32', 'bfloat16', 'float16'; 'auto': what suits the device
compile = False  # compile the drawing of a token: for long texts on a GPU, after half a minute of compiling
config = configure(globals(), paths=('out_dir', 'init_from'))

require(config, lambda v: v >= 1, 'at least 1', 'num_samples')
require(config, lambda v: 1 <= v <= 65536, 'from 1 to 65536', 'batch_size')
require(config, lambda v: 0 <= v < float('inf'), '0 or more', 'temperature', 'top_k', 'seed')
require(config, lambda v: 0 <= v <= 10**7, 'from 0 to 10,000,000', 'max_new_tokens')
require(config, lambda v: 0 < v <= 1, 'above 0 and at most 1', 'top_p')
require(config, lambda v: 0 <= v <= 1, 'from 0 to 1', 'min_p')
require(config, lambda v: 0.01 <= v <= 100, 'from 0.01 to 100', 'repetition_penalty')
if interactive and json:
    raise UserError('--interactive=True and --json=True: choose one')
if interactive and (sys.stdin is None or sys.stdout is None):
    raise UserError('--interactive=True: needs a terminal, or a pipe, to read from and to write to')

device = pick_device(device)
dtype = pick_dtype(dtype, device)
use_fast_float32(device)

# --- model and tokenizer ----------------------------------------------------------------------------------------------
model, spec, trained_with = open_model(init_from, out_dir, ckpt)
if (
    spec is None and init_from == 'resume'
):  # nanoGPT's name the data set, whose meta.pkl has the characters; without it, GPT-2's BPE
    data_dir = os.path.join('data', dataset_name(str(trained_with.get('dataset'))))
    meta = read_meta(data_dir) if os.path.isdir(data_dir) else {}
    if not meta:
        warn(
            f"the checkpoint holds no tokenizer, and {data_dir} has no meta.pkl: its ids are taken for GPT-2's, as nanoGPT does"
        )
    with user_errors(ValueError, where=f'{data_dir}/meta: '):
        spec = spec_from_meta(meta)
if spec is None:
    raise UserError(
        'the model comes with no tokenizer, so there is no telling what its ids mean: put its tokenizer.json, or vocab.json '
        'and merges.txt, beside it'
    )
with user_errors(ValueError, where='the tokenizer of the model: '):
    tokenizer = load_tokenizer(spec)
if text_vocab_size(spec) > model.config.vocab_size:
    raise UserError(
        f'the tokenizer has {text_vocab_size(spec)} ids, the model {model.config.vocab_size}: they do not belong together'
    )
n_ids = min(
    tokenizer.vocab_size, model.config.vocab_size
)  # either may know more: rounded up; tokens added to a pretrained model's
sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, vocab_size=n_ids)


# --- prompts ----------------------------------------------------------------------------------------------------------
def read_text(path):
    """The content of a UTF-8 file, without its byte order mark."""
    where = f'cannot read the prompt {path or "(no path)"}: '
    with (
        user_errors(OSError, UnicodeDecodeError, where=where),
        open(os.path.expanduser(path), encoding='utf-8-sig') as file,
    ):
        return file.read()


def encode(text, where):
    """text -> ids; UserError, led by `where`, if there are none, or it has characters that the model does not know."""
    with user_errors(ValueError, where=f'{where}: '):
        ids = tokenizer.encode(text, special=True)
        if not len(ids):
            raise ValueError('a prompt must have at least one token; a line end will do')
        check_known(ids.tolist(), n_ids, tokenizer)
        return ids.tolist()


def make_sample(prompt, *key):
    """A Sample that continues the ids, with random numbers of its own for every key."""
    return Sample(prompt, (seed, *key), tokenizer, stop, None if ignore_eos else tokenizer.end_of_text)


if 'start' not in config.given and spec['kind'] == 'char' and start not in spec['chars']:
    start = spec['chars'][0]  # a vocabulary without a line end: begin with some character that it has
kind, colon, paths = start.partition(':')
if colon and kind in ('FILE', 'FILES'):
    places = [path.strip() for path in paths.split(',')] if kind == 'FILES' else [paths]
    prompts = [read_text(path) for path in places]
elif colon and kind == 'LINES':
    numbered = [(f'{paths}, line {n}', line) for n, line in enumerate(read_text(paths).split('\n'), 1) if line]
    if not numbered:
        raise UserError(f'--start={start}: the file has no lines with anything in them')
    places, prompts = zip(*numbered)
else:
    places, prompts = [f'--start={one_line(start, 40)}'], [start]
encoded = [encode(prompt, place) for place, prompt in zip(places, prompts)]
if interactive and len(prompts) > 1:
    raise UserError(f'--interactive=True: continues one prompt, not {len(prompts)}')

# --- layout and compilation -------------------------------------------------------------------------------------------
batch_size = 1 if interactive else min(batch_size, num_samples * len(prompts))
model.eval().to(device)
if quantize or not (
    compile and device.type == 'cpu'
):  # the compiler does not take packed layers, and is slower on a CPU
    pack(model, device, dtype, quantize)
keep_memory(device)
context = None  # what is compiled for is one batch of one size, kept from the first text to the last
if compile:
    with autocast(device, dtype):
        context = Context(model, batch_size, model.config.block_size, static=True)

    def trial():  # of one token at a time, as more are read by what is not compiled; of two, as the second is recorded on CUDA
        with autocast(device, dtype):
            for _ in generate(
                model, [Sample(encoded[0][-1:]) for _ in range(batch_size)], 2, sampling, context=context, static=True
            ):
                pass

    if not compile_or_stay_eager(model, trial, **decoding_options(device)):
        context = None


def draw(samples, **options):
    """generate() for new samples, as many as there are; where the batch has a fixed size, it is filled up."""
    if context is None:
        return generate(model, samples, max_new_tokens, sampling, **options)
    context.forget()
    filling = [Sample(samples[0].prompt) for _ in range(batch_size - len(samples))]
    return generate(model, [*samples, *filling], max_new_tokens, sampling, context=context, static=True, **options)


# --- text -------------------------------------------------------------------------------------------------------------
def write(samples):
    """Draw the samples in one batch and print them in their order, the first that is not finished as it grows."""
    shown, at = 0, 0  # characters of samples[at] that have been printed

    def show():
        nonlocal shown, at
        while at < len(samples):
            sample = samples[at]
            if not (stream or sample.finish_reason):
                return
            text, end = sample.prompt_text + sample.text, len(sample.prompt_text) + sample.settled()
            print(text[shown:end], end='', flush=stream)
            shown = end
            if not sample.finish_reason:
                return
            print('\n---------------', flush=True)
            shown, at = 0, at + 1

    for _ in draw(samples):
        show()
        if at == len(samples):
            break  # what is left is filling
    for sample in samples:
        sample.finish('length')  # when there was nothing to draw
    show()


def write_json(samples, prompts):
    """Draw the samples in one batch and print a JSON object for each."""
    from json import dumps

    ascii_only = 'utf' not in (sys.stdout.encoding or '').lower()  # in a code page, what it lacks is written as \\uXXXX
    for _ in draw(samples, log_probs=True):
        if all(sample.finish_reason for sample in samples):
            break
    for sample, prompt in zip(samples, prompts):
        sample.finish('length')
        print(
            dumps(
                {
                    'prompt': prompt,
                    'text': sample.text,
                    'token_ids': sample.ids,
                    'log_probs': sample.log_probs,
                    'finish_reason': sample.finish_reason,
                },
                ensure_ascii=ascii_only,
            ),
            flush=True,
        )


def converse():
    """Ask for text, continue it, and so on, in one growing context."""
    print(
        'What you type is continued where it stands; \\n in it is a line end, an empty line lets the model go on.\n'
        'Ctrl-C stops an answer, Ctrl-D ends.'
    )
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() line editing and history)
    conversation, unread, turn = context or Context(model, 1, model.config.block_size), [], 0
    conversation.forget()
    typed = prompts[0] if 'start' in config.given else None
    while True:
        if typed is None:
            try:
                typed = input('> ').replace('\\n', '\n')
            except KeyboardInterrupt:
                print('\n(Ctrl-D ends)')
                continue
            except EOFError:
                return print()
        try:
            ids = unread + (encode(typed, 'this cannot be continued') if typed else [])
        except UserError as error:
            print(error, file=sys.stderr)
            typed = None
            continue
        if ids:
            sample = make_sample(ids, turn)
            answer(sample, conversation)
            unread = [token for token in sample.ids[-1:] if token != tokenizer.end_of_text] if sample.ids else ids
            turn += 1
        typed = None


def answer(sample, conversation):
    """Print the sample as it grows, until it is finished or Ctrl-C is pressed."""
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    shown = 0
    try:
        for _ in generate(
            model, [sample], max_new_tokens, sampling, context=conversation, static=conversation.cache.static
        ):
            if interrupted:
                sample.finish('interrupted')
            print(sample.text[shown : sample.settled()], end='', flush=True)
            shown = sample.settled()
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)


with autocast(device, dtype):
    if interactive:
        converse()
    else:
        jobs = ((prompt, make_sample(ids, i)) for prompt, ids in zip(prompts, encoded) for i in range(num_samples))
        while batch := list(itertools.islice(jobs, batch_size)):
            texts, samples = zip(*batch)
            write_json(samples, texts) if json else write(samples)
