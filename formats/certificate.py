"""Does another program compute what our model computes? The proof that export.py asks of everything it writes.

Each class below is another program that opens an exported model:
    logits(ids)         ids (T,) int64 -> (T, V) float32, of every position
    greedy(ids, n)      the n most likely tokens after ids, one by one -> list
    encode(text), decode(ids)   by its own tokenizer, if has_tokenizer
    name                the program and its version, for the record
    tolerance           how far its logits may be off by rounding: root mean square, as a share of our logits' spread
"""

import atexit
import ctypes
import functools
import importlib.metadata
import math
import os
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from common.errors import UserError, one_line, user_errors
from generation import Sample, Sampling, generate
from model import GPT, GPTConfig
from pretrained import NANOGPT_FIELDS

GREEDY_TOKENS = 50  # compared at most
MIXED_TEXT = "Ünïcödé, it's 12345 漢字 😀\n\n\ttabs  and   spaces<|endoftext|> https://a.b/c_d?e=1\r\n"


class Transformers:
    """A folder opened by AutoModelForCausalLM and AutoTokenizer, in float32."""

    tolerance = 1e-4  # float32, summed in another order

    def __init__(self, folder: str, has_tokenizer: bool, remote_code: bool = False):
        transformers = import_transformers()
        options = {'local_files_only': True, 'trust_remote_code': remote_code}
        self.name, self.has_tokenizer = f'transformers {transformers.__version__}', has_tokenizer
        auto = transformers.AutoModelForCausalLM
        self.model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
        self.model.eval()
        wrong = [*report['unexpected_keys'], *report['missing_keys'], *report['mismatched_keys']]
        if wrong:
            raise UserError(f'{folder}: transformers finds {wrong[0]} missing, unexpected or misshapen')
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options) if has_tokenizer else None

    @torch.no_grad()
    def logits(self, ids):
        return self.model(ids[None]).logits[0]

    @torch.no_grad()
    def greedy(self, ids, n):
        ends = {'eos_token_id': None, 'pad_token_id': 0}
        idx = torch.tensor([ids])
        lengths = {'max_new_tokens': n, 'max_length': None}
        new = self.model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, **lengths, **ends)
        return new[0, len(ids) :].tolist()

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def import_transformers():
    """transformers, quiet. UserError if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise UserError('the comparison needs the package transformers: pip install transformers') from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class LlamaCpp:
    """A GGUF file opened by llama.cpp, through llama-cpp-python."""

    def __init__(self, path: str, n_tokens: int, dtype: str):
        """n_tokens: of the longest text. dtype: of the weights. ImportError without llama-cpp-python."""
        os.environ.setdefault('GGML_NO_BACKTRACE', '1')  # where it aborts, it would start a debugger
        import llama_cpp

        self.name = f'llama.cpp, by llama-cpp-python {llama_cpp.__version__}'
        # with float32 weights it rounds GELU alone, otherwise all that it multiplies them with
        self.tolerance = {'float32': 3e-3, 'float16': 1e-2, 'q8_0': 0.1}[dtype]
        exact = {'type_k': llama_cpp.GGML_TYPE_F32, 'type_v': llama_cpp.GGML_TYPE_F32, 'flash_attn': False}
        sizes = dict.fromkeys(('n_ctx', 'n_batch', 'n_ubatch'), n_tokens)
        sizes.update(dict.fromkeys(('n_threads', 'n_threads_batch'), torch.get_num_threads()))
        llama_cpp.llama_log_set(silent_log(), ctypes.c_void_p(0))
        refused = user_errors(ValueError, where='llama.cpp cannot open what was written: ')
        with plain_weights(llama_cpp.llama_cpp), refused:
            self.llm = llama_cpp.Llama(path, logits_all=True, verbose=False, n_gpu_layers=0, **sizes, **exact)
        atexit.register(self.llm.close)  # at its own end, the library complains
        self.has_tokenizer = self.llm.metadata.get('tokenizer.ggml.model', 'no_vocab') not in ('no_vocab', 'none')

    def logits(self, ids):
        self.llm.reset()
        self.llm.eval(ids.tolist())
        return torch.from_numpy(self.llm.scores[: len(ids)].copy())

    def greedy(self, ids, n):
        self.llm.reset()
        new = []
        for _ in range(n):
            self.llm.eval(new[-1:] or ids)
            new.append(int(self.llm.scores[self.llm.n_tokens - 1].argmax()))
        return new

    def encode(self, text):
        return self.llm.tokenize(text.encode('utf-8', 'surrogatepass'), add_bos=False, special=True)

    def decode(self, ids):
        return self.llm.detokenize(ids, special=True).decode('utf-8', 'replace')


@functools.cache
def silent_log():
    """A function of C that takes llama.cpp's messages and drops them; kept, as llama.cpp calls it until the end."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


@contextmanager
def plain_weights(bindings):
    """Within this, llama.cpp leaves weights as they are in the file. Rearranged for AMX, they end the process on some
    machines that announce these instructions and refuse them; llama_cpp.Llama has no option for it."""
    defaults = bindings.llama_model_default_params
    parameters = defaults()
    parameters.use_extra_bufts = False
    bindings.llama_model_default_params = lambda: parameters
    try:
        yield
    finally:
        bindings.llama_model_default_params = defaults


class Ourselves:
    """A GPT made from a file, in place of a program that is not at hand; `name` says what was checked."""

    has_tokenizer, tolerance = False, 1e-5

    def __init__(self, model, name: str):
        self.model, self.name = model.eval(), name

    def logits(self, ids):
        return our_logits(self.model, ids)

    def greedy(self, ids, n):
        return our_greedy(self.model, ids, n)


class NanoGPT(Ourselves):
    """nanoGPT's ckpt.pt, opened by the steps of nanoGPT's sample.py: torch.load, a GPT of model_args alone, its weights
    without exception."""

    def __init__(self, path: str):
        checkpoint = torch.load(path, weights_only=True)
        model = GPT(GPTConfig(**{name: checkpoint['model_args'][name] for name in NANOGPT_FIELDS}))
        model.load_state_dict(checkpoint['model'])
        super().__init__(model, "nanoGPT's steps: torch.load, model_args, all weights")
        self.tolerance = 3e-2 if 'mlp' in checkpoint else self.tolerance


class GgufReader(Ourselves):
    """A GGUF file whose tensors the package gguf reads: equal to what our own reader makes of them."""

    def __init__(self, path: str, model):
        """model: a GPT that read_gguf_model made of the file."""
        import gguf

        from common.gguf_file import read_gguf, read_tensor

        ours = read_gguf(path)
        for tensor in gguf.GGUFReader(path).tensors:
            theirs = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            mine = torch.empty_like(theirs)
            read_tensor(ours, tensor.name, mine)
            if not torch.equal(mine, theirs):
                raise UserError(f'{path}: the package gguf reads other numbers in {tensor.name}')
        super().__init__(model, f'the package gguf {importlib.metadata.version("gguf")}: equal tensors')


@torch.no_grad()
def our_logits(model, ids):
    """ids (T,) -> logits (T, V), float32."""
    return model(ids[None], ids[None])[0][0].float()


def our_greedy(model, ids, n):
    sample = Sample(ids)
    for _ in generate(model, [sample], n, Sampling(temperature=0)):
        pass
    return sample.ids


def compare(model, written, theirs, ids: torch.Tensor, tokenizer=None) -> dict:
    """Compare a model with what another program computes -> the certificate, a dict of plain data.

    model: the GPT that is exported. written: a GPT with its weights rounded as they were written, or the same one.
    theirs: one of the classes above. ids: (n, T) int64, text. tokenizer: ours, or None.
    'problem' in the result says what is different beyond rounding, '' if nothing is.
    """
    windows, T = ids.shape
    losses, largest, error, spread = [0.0, 0.0], 0.0, 0.0, 0.0
    for window in ids:
        here, there = our_logits(written, window), theirs.logits(window).float()
        if here.shape != there.shape:
            raise UserError(f'{theirs.name} gives logits of shape {tuple(there.shape)}, not {tuple(here.shape)}')
        largest = max(largest, (here - there).abs().max().item())
        error += (here - there).pow(2).mean().item() / windows
        spread += here.var().item() / windows
        for n, logits in enumerate((our_logits(model, window), there)):
            losses[n] += F.cross_entropy(logits[:-1], window[1:]).item() / windows
    prompt = ids[0, : max(1, min(16, T // 4))].tolist()
    n = min(GREEDY_TOKENS, T - len(prompt))
    greedy = [our_greedy(written, prompt, n), theirs.greedy(prompt, n)]
    equal = next((i for i, (a, b) in enumerate(zip(*greedy)) if a != b), n)
    result = {
        'compared_with': theirs.name,
        'tokens': ids.numel(),
        'window': T,
        'logits_standard_deviation': math.sqrt(spread),
        'logits_largest_difference': largest,
        'logits_root_mean_square_difference': math.sqrt(error),
        'tolerance': theirs.tolerance,
        'loss_here': losses[0],
        'loss_there': losses[1],
        'greedy_tokens': n,
        'greedy_tokens_equal': equal,
        'tokenizer_equal': None,
    }
    problems = []
    if not error <= theirs.tolerance**2 * max(spread, 1e-12):  # nor NaN
        size = f'{math.sqrt(error):.3g} (root mean square), up to {largest:.3g}'
        problems.append(f'its logits differ by {size}, while those here have a spread of {math.sqrt(spread):.3g}')
    if equal < n:
        best = our_logits(written, torch.tensor(prompt + greedy[0][:equal]))[-1]
        if (best[greedy[0][equal]] - best[greedy[1][equal]]).item() > 2 * largest:  # no near tie
            problems.append(f'it generates another token after {equal}')
    if tokenizer and theirs.has_tokenizer:
        difference = tokenizer_difference(tokenizer, theirs, ids)
        result['tokenizer_equal'] = not difference
        problems += [difference] * bool(difference)
    return {**result, 'problem': '; '.join(problems)}


def tokenizer_difference(tokenizer, theirs, ids):
    """Where our tokenizer and another program's differ on texts of ids (n, T), and on all kinds of characters: '' if
    nowhere. Special tokens in a text are tokens."""
    texts = [tokenizer.decode(window.tolist()) for window in ids]
    pairs = [(texts[0], theirs.decode(ids[0].tolist()))]
    for text in (*texts, MIXED_TEXT):
        try:
            ours = tokenizer.encode(text, special=True).tolist()
        except ValueError:  # a vocabulary of characters that lacks some
            continue
        pairs.append((ours, list(theirs.encode(text))))
    for ours, other in pairs:
        if ours != other:
            at = next((i for i, (a, b) in enumerate(zip(ours, other)) if a != b), min(len(ours), len(other)))
            pieces = ' and '.join(one_line(repr(side[at : at + 20]), 60) for side in (ours, other))
            return f'its tokenizer differs at {at}: {pieces}'
    return ''


def check_written(model, written, dtype: str):
    """UserError unless a GPT that was read back from a file is the one that went into it: the same shape, and weights
    that are off by no more than the type in which matrices were stored, dtype, rounds: 'float32', 'float16', 'q8_0'."""
    shape = 'n_layer n_head n_embd block_size vocab_size kv_heads head_dim mlp_dim pos norm norm_eps qk_norm'
    rope = ('rope_base', 'rope_scaling') if model.config.pos == 'rope' else ()
    for name in (*shape.split(), 'tie_weights', *rope):
        ours, theirs = (getattr(config, name) for config in (model.config, written.config))
        if ours != theirs and not (isinstance(ours, float) and math.isclose(ours, theirs, rel_tol=1e-6)):
            raise UserError(f'nothing was exported: what was written has {name}={theirs!r} in place of {ours!r}')
    before = dict(model.named_parameters())
    for name, after in written.named_parameters():
        fill = torch.ones_like if name.endswith('norm.weight') else torch.zeros_like  # gains, biases that we lack
        weight = before.pop(name, None)
        weight = fill(after) if weight is None else weight
        gap = (weight - after).abs().max().item()
        largest = weight.abs().max().item()
        # half a step of 8 bits for the largest of a block and of its scale's 11 bits; half a step of float16
        allowed = {'float32': 0, 'float16': largest / 2**11, 'q8_0': largest / 200}[dtype] + 1e-7 * (dtype != 'float32')
        if not gap <= (allowed if weight.dim() > 1 else 0):
            raise UserError(f'nothing was exported: {name} was written with an error of {gap:.3g}')
    if before:
        raise UserError(f'nothing was exported: {min(before)} was not written')


def certificate_lines(certificate: dict) -> list[str]:
    """A certificate for people."""
    tokenizer = {None: 'not compared', True: 'equal ids and text', False: 'different'}[certificate['tokenizer_equal']]
    equal, n = certificate['greedy_tokens_equal'], certificate['greedy_tokens']
    largest, spread = certificate['logits_largest_difference'], certificate['logits_standard_deviation']
    error, allowed = certificate['logits_root_mean_square_difference'], certificate['tolerance']
    return [
        f'agrees with       {certificate["compared_with"]}',
        f'on                {certificate["tokens"]:,} tokens of {certificate["text"]}',
        f'logits            differ by {error:.2g} (root mean square; {largest:.2g} at most); spread {spread:.3g}:',
        f'                  by {error / max(spread, 1e-12):.1g} of it, where rounding may be {allowed:.1g}',
        f'loss              {certificate["loss_here"]:.5f} here, {certificate["loss_there"]:.5f} there',
        f'greedy decoding   {"all" if equal == n else f"the first {equal}"} of {n} tokens equal',
        f'tokenizer         {tokenizer}',
    ]
