"""Public benchmarks through lm-evaluation-harness (the package lm_eval): our models as one of its language models.

lm_eval brings the tasks: it asks for log-likelihoods of continuations and for generated texts, and turns the answers
into scores. What is asked is what its own model 'hf' computes for the same weights: which tokens a text becomes, what
is cut from the left, where a text ends. How it is computed is ours: requests are batched by tokens, tokens that several
requests have in common are read once, only scored positions get logits, and all ranks share the work.

    suite = Benchmarks('lambada_openai,core', model, spec, ranks, device, dtype)
    for name, scores in suite.run():
        ...              {'metrics': {'acc': {'value': 0.33, 'stderr': 0.03}, …}, 'n': 300, 'shots': 0, 'version': 1.0}
"""

import difflib
import glob
import importlib
import io
import logging
import math
import os
import random
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partialmethod

import numpy as np
import torch

os.environ.setdefault('DISABLE_MULTIPROC', '1')  # lm_eval would fork this process, threads and all, for standard errors
from common.errors import UserError, one_line, user_errors

ROOT = os.path.dirname(os.path.abspath(__file__))

with user_errors(ImportError, where='benchmarks need the package lm_eval: pip install lm_eval; '):
    # lm_eval imports a package called evaluate, in whose place it would find evaluate.py
    ours, sys.path[:] = sys.path[:], [path for path in sys.path if os.path.abspath(path) != ROOT]
    importlib.import_module('evaluate')
    sys.path[:] = ours
    import datasets
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

from chat import ChatTemplate
from common.device import autocast, uncompiled
from common.distributed import Ranks
from formats.eval_bundle import read_bundle
from generation import KVCache, Sample, Sampling, generate
from model import MAX_LOGITS
from tokenizer import load_tokenizer, text_vocab_size

SEED = 1234  # lm_eval's, of few-shot examples
BOOTSTRAP = 1000  # resamplings for the standard errors that have no formula, such as that of a perplexity
MAX_GEN_TOKS = 256  # tokens to generate where a task does not say how many
MIN_SHARED = 16  # tokens that all requests of a batch begin with, to be worth a pass of their own
SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


class Interrupted(Exception):
    """A signal asks this process to end."""


# --- tasks ------------------------------------------------------------------------------------------------------------


class Benchmarks:
    """Tasks by name, loaded, and the model to judge."""

    def __init__(
        self, tasks, model, spec, ranks, device, dtype, path='', limit=0, shots=-1, chat=False, batch_tokens=0, key=''
    ):
        """tasks: names of tasks, groups or tags of lm_eval or in `path`, with commas between; 'core' is ours.
        model: a GPT on the device, perhaps sharded. spec: its tokenizer's. dtype: of products.
        path: a folder of YAML files with tasks of one's own; for 'core' the folder of the evaluation bundle.
        limit: examples per task; 0: all. shots: examples before a question; -1: as the task says.
        chat: requests as conversations. batch_tokens: see HarnessModel. key: how the script calls `tasks`.

        UserError for an unknown task, one whose data are missing, or a model without a tokenizer.
        """
        for name in ('lm_eval', 'datasets'):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is one line of ours
        datasets.disable_progress_bars()
        if hasattr(model, 'unshard'):  # a sharded model is computed by all ranks together: each answers all requests
            ranks = Ranks()
        self.lm = HarnessModel(model, spec, ranks, device, dtype, batch_tokens)
        self.limit, self.shots, self.chat, self.key = limit or None, shots, chat, key or 'tasks'
        if chat:
            self.lm.template = ChatTemplate(spec)
        if not tasks.strip(','):
            raise UserError(f'--{self.key}=: needs a name, such as lambada_openai')
        with contained(device):
            self.tasks = self.load([name for name in tasks.split(',') if name], path)

    def load(self, names, path):
        """Tasks by name -> {name: what evaluator.evaluate takes, or for 'core' a list of that}."""
        if path and not os.path.isdir(path):
            raise UserError(f'{path}: there is no such folder, in which to look for tasks')
        others = [name for name in dict.fromkeys(names) if name != 'core']
        manager = TaskManager(include_path=path, include_defaults=False) if path else None
        if others and not (manager and all(map(manager.match_tasks, ([name] for name in others)))):
            manager = TaskManager(include_path=path or None)  # an index of 14,000 tasks, which takes a while
        found = {}
        for name in dict.fromkeys(names):
            if name == 'core':
                if self.chat or self.shots >= 0:
                    raise UserError('--tasks=core: its bundle says how to ask; leave out --chat= and --num_fewshot=')
                parts = [CoreTask(part, self.lm, self.limit) for part in read_bundle(path)]
                found[name] = [{'tasks': {part.config.task: part}, 'groups': {}} for part in parts]
                continue
            matches = manager.match_tasks([name])
            if not matches:
                nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
                hint = f'the nearest is {nearest[0]}' if nearest else f'{path} has no tasks'
                raise UserError(f'--{self.key}={name}: unknown task; {unreadable(path) or hint}')
            for match in matches:
                try:
                    found[match] = manager.load([match])
                except Exception as error:  # of lm_eval, datasets, or the code of a task
                    reason = one_line(f'{type(error).__name__}: {error}')
                    raise UserError(
                        f'--{self.key}={match}: its description or its data cannot be loaded: {reason}'
                    ) from error
                self.check(match, found[match]['tasks'].values())
        return found

    def check(self, name, tasks):
        """Refuse what this model cannot do. Set the number of examples before a question, as lm_eval does."""
        for task in tasks:
            if getattr(task, 'MULTIMODAL', False) or getattr(task, 'UNSAFE_CODE', False):
                what = 'needs pictures or sound' if getattr(task, 'MULTIMODAL', False) else 'runs what a model wrote'
                raise UserError(f'--{self.key}={name}: {task.task_name} {what}, which is not supported')
            metrics = getattr(task, '_metric_fn_list', {})  # None for one that lm_eval does not find
            unknown = [metric for metric, function in metrics.items() if function is None]
            if unknown and task.get_config('process_results') is None:
                raise UserError(f'--{self.key}={name}: neither lm_eval nor evaluate has the metric {unknown[0]!r}')
            fixed = task.get_config('num_fewshot')
            if fixed is None or self.shots >= 0 and fixed != 0:  # 0 in a task's description means never
                task.set_config(key='num_fewshot', value=max(self.shots, 0))

    def run(self, interrupted=lambda: False, bootstrap=BOOTSTRAP, progress=False):
        """Yields (name, scores) of each task when it is done, all ranks the same. A collective: every rank calls it.

        scores: {'metrics': {'acc': {'value': …, 'stderr': …}, …}, 'n': examples, 'shots': examples before a question,
        'version': of the task}, None where something is not known.
        interrupted: called after each batch; True, on all ranks, raises Interrupted.
        The model's mode and all random states are the same afterwards.
        """
        self.lm.interrupted = interrupted
        self.lm.progress = progress and self.lm.ranks.is_main
        for name, loaded in self.tasks.items():
            if name != 'core':
                yield from self.evaluate(loaded, bootstrap).items()
                continue
            centered = []
            for part in loaded:
                for label, scores in self.evaluate(part, bootstrap).items():
                    centered.append(scores['metrics']['centered']['value'])
                    yield label, {**scores, 'shots': part['tasks'][label].part.shots}
            mean = {'value': sum(centered) / len(centered), 'stderr': None}
            yield 'core', {'metrics': {'centered': mean}, 'n': len(centered), 'shots': None, 'version': None}

    def record(self, interrupted=lambda: False) -> dict:
        """The scores as entries for a run's log, {'lambada_openai/acc': …}; of what is done, if interrupted."""
        entries = {}
        try:
            for name, scores in self.run(interrupted, bootstrap=0):
                entries |= log_entries(name, scores)
        except Interrupted:
            pass
        return entries

    def evaluate(self, loaded, bootstrap):
        """Ask and score -> {name of a task or group: scores}."""
        options = {'limit': self.limit, 'bootstrap_iters': bootstrap, 'log_samples': False}
        options |= {'apply_chat_template': self.chat, 'fewshot_as_multiturn': self.chat}
        with contained(self.lm.device), self.lm.ready():
            for task in loaded['tasks'].values():
                task.set_fewshot_seed(seed=SEED)
            with user_errors(ImportError, where='a task needs a package that is not installed: '):
                result = evaluator.evaluate(self.lm, loaded, **options)
        return {name: self.scores(name, result) for name in result['results']}

    @staticmethod
    def scores(name, result):
        """What lm_eval found for a task or group, as run() describes it."""
        values, metrics = result['results'][name], {}
        for key, value in values.items():
            metric, comma, filtered = key.partition(',')  # such as 'acc,none', 'exact_match,strict-match'
            if comma and not metric.endswith('_stderr') and isinstance(value, (int, float)):
                stderr = values.get(f'{metric}_stderr,{filtered}')
                label = metric if filtered == 'none' else key
                metrics[label] = {'value': finite(value), 'stderr': finite(stderr)}
        about = {'n': values.get('sample_len'), 'shots': result['n-shot'].get(name)}
        version = result['versions'].get(name)
        return {'metrics': metrics, **about, 'version': version if isinstance(version, (int, float)) else None}


def finite(value):
    """A finite number, or None: JSON has no others, and lm_eval says 'N/A' where there is no standard error."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def log_entries(name: str, scores: dict) -> dict:
    """Scores as entries of a record in a run's log, such as {'lambada_openai/acc': 0.33}."""
    return {f'{name}/{metric}': found['value'] for metric, found in scores['metrics'].items()}


@contextmanager
def contained(device):
    """Within the block lm_eval's seeds hold, and its progress bars and prints are not shown. Afterwards all random
    states are as before."""
    states, initialize = (random.getstate(), np.random.get_state()), tqdm.__init__
    tqdm.__init__ = partialmethod(initialize, disable=True)  # unless a bar says otherwise, as ours does
    try:
        with torch.random.fork_rng([device] if device.type == 'cuda' else []), redirect_stdout(io.StringIO()):
            random.seed(0)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        tqdm.__init__ = initialize
        random.setstate(states[0])
        np.random.set_state(states[1])


def unreadable(folder: str) -> str:
    """What is wrong with the first YAML file in a folder that is not YAML, of which lm_eval says nothing; '' if all
    are."""
    import yaml

    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '**', '*.yaml'), recursive=True)) if folder else ():
        try:
            with open(path, encoding='utf-8') as file:
                if yaml.compose(file) is None:
                    return f'{path} is empty'
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f'{path} cannot be read: {one_line(str(error), 150)}'
    return ''


class CoreTask(ConfigurableTask):
    """A part of CORE (Li et al. 2024, "DataComp-LM", section 3.5) as a task of lm_eval."""

    def __init__(self, part, lm, limit):
        """part: a formats.eval_bundle.Part. lm: the HarnessModel."""
        self.part, self.lm = part, lm
        mean = {'aggregation': 'mean', 'higher_is_better': True}
        items = part.items(limit, lm.start_text)
        super().__init__(
            config={
                'task': f'core/{part.label}',
                'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(items)},
                'test_split': 'test',
                'output_type': 'loglikelihood',
                'doc_to_text': lambda item: '',  # the prompts are complete, examples and all
                'doc_to_target': lambda item: '',
                'metric_list': [{'metric': 'acc', **mean}, {'metric': 'centered', **mean}],
                'process_results': self.score,
                'num_fewshot': 0,
            }
        )

    def construct_requests(self, doc, ctx, **keywords):
        pairs = enumerate(self.pairs(doc))
        return [Instance('loglikelihood', doc, pair, i, keywords['metadata']) for i, pair in pairs]

    def pairs(self, doc):
        """(ids before, ids that are scored) of each prompt, cut where nanochat cuts them (its core_eval.py): scored is
        what follows the tokens that all prompts begin with, in a schema those that all of them end with; of a single
        prompt, what follows its context. A prompt of more than block_size tokens loses its beginning."""
        texts = zip(doc['contexts'], doc['continuations'])
        rows = [tuple(self.lm.tok_encode(context + continuation, False)) for context, continuation in texts]
        if self.part.kind == 'schema':
            n = len(os.path.commonprefix([row[::-1] for row in rows]))
            starts = [len(row) - n for row in rows]
        elif self.part.kind == 'multiple_choice':
            starts = [len(os.path.commonprefix(rows))] * len(rows)
        else:
            starts = [len(self.lm.tok_encode(doc['contexts'][0].rstrip(), False))]
        starts = [min(start, len(row) - 1) for start, row in zip(starts, rows)]  # something is scored in any case
        dropped = [max(0, len(row) - self.lm.max_length) for row in rows]
        return [(row[n:start], row[max(n, start) :]) for row, start, n in zip(rows, starts, dropped)]

    def score(self, doc, answers):
        """Right if the continuation is what greedy decoding gives; of several, if its mean over tokens is highest."""
        if len(answers) == 1:
            right = answers[0][1]
        else:
            means = [total / len(scored) for (total, _), (_, scored) in zip(answers, self.pairs(doc))]
            right = means.index(max(means)) == doc['gold']
        return {'acc': float(right), 'centered': (right - self.part.baseline) / (1 - self.part.baseline)}


# --- the model --------------------------------------------------------------------------------------------------------


class HarnessModel(TemplateLM):
    """A GPT as lm_eval sees it: texts in, log-likelihoods and texts out."""

    def __init__(self, model, spec, ranks, device, dtype, batch_tokens=0):
        """See Benchmarks. batch_tokens: most tokens per batch, padding included; 0: what suits the device.
        lm_eval itself sees a single rank."""
        super().__init__()
        if not spec:
            raise UserError('the model comes with no tokenizer, so it cannot be given the text of a benchmark')
        with user_errors(ValueError, where="the model's tokenizer: "):
            self.tokenizer = load_tokenizer(spec)
        if text_vocab_size(spec) > model.config.vocab_size:
            sizes = f'{text_vocab_size(spec)} ids, the model {model.config.vocab_size}'
            raise UserError(f'the tokenizer has {sizes}: they do not belong together')
        self.model, self.ranks, self._device, self.dtype = model, ranks, device, dtype
        self.batch_tokens = batch_tokens or (2048 if device.type == 'cpu' else 16384)  # a CPU's caches are small
        self.max_length = model.config.block_size
        self.interrupted, self.progress, self.template = lambda: False, False, None
        bos = (spec.get('special_tokens') or {}).get('bos_token')
        ids = self.tokenizer.encode(bos, special=True).tolist() if bos else []
        self.start = ids[0] if len(ids) == 1 else self.tokenizer.end_of_text  # the id before a text that has no context
        self.start_text = '' if self.start is None else self.tokenizer.decode([self.start])
        self.ends = {self.tokenizer.end_of_text} - {None}
        if spec.get('chat_template'):
            with suppress(UserError):  # one that fails is no obstacle to tasks without conversations
                self.ends |= ChatTemplate(spec).end_of_turn(self.tokenizer)

    @contextmanager
    def ready(self):
        """Within the block the model can be called as it is here; its mode is restored afterwards."""
        was_training, sharded = self.model.training, hasattr(self.model, 'unshard')
        self.model.eval()
        try:
            if sharded:
                self.model.unshard()  # embedding and head; its own call would do that, layers do it themselves
            with torch.inference_mode(), autocast(self.device, self.dtype), uncompiled():
                yield
        finally:
            self.model.train(was_training)
            if sharded:
                self.model.reshard()

    # what lm_eval calls, under its names

    @property
    def eot_token_id(self):
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self):
        if self.start is None:
            raise UserError("the model's tokenizer has no token that starts or ends a text, which this task needs")
        return self.start

    @property
    def tokenizer_name(self):
        return ''  # only names caches of requests, of which we make none

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Text -> ids, special tokens as tokens, after the ids that start every text unless the text has them."""
        with user_errors(ValueError, where="the model's tokenizer: "):
            ids = self.tokenizer.encode(string, special=True).tolist()
        starts = add_special_tokens or add_special_tokens is None and not self.begins(string)
        return [*self.tokenizer.prefix, *ids] if starts else ids

    def _encode_pair(self, context, continuation):
        """lm_eval's, but for what is ids already, as CoreTask asks."""
        if isinstance(context, tuple):
            return list(context), list(continuation)
        return super()._encode_pair(context, continuation)

    def begins(self, string):
        """Does a text begin with the token that starts a text?"""
        return bool(self.start_text) and string.startswith(self.start_text)

    def tok_decode(self, ids):
        """Ids -> text without special tokens."""
        special = {self.tokenizer.end_of_text, *getattr(self.tokenizer, 'special', ())}
        return self.tokenizer.decode([id for id in ids if id not in special])

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """A conversation as text; without a prompt for the answer it ends where its last message ends."""
        text, last = self.template.render(messages, add_generation_prompt), messages[-1]['content']
        if add_generation_prompt:
            return text
        at = text.rfind(last.strip())
        if at < 0:
            raise UserError("the model's chat template changes what an answer begins with, so it cannot be continued")
        kept = last.lstrip()  # a template may strip the white space at its end
        return text[: at + len(kept if text.startswith(kept, at) else last.strip())]

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-likelihoods of whole texts, in windows of block_size."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += total
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """(anything, ids of a context, ids of a continuation) each -> (log-likelihood of the continuation, whether it
        is what greedy decoding gives) each."""
        # What the model reads is everything but the last token. Requests that agree in it are one row; rows that agree
        # before the first scored token are one group, and stay together.
        rows = {}  # tokens of a row: the requests that it answers
        for i, (_, context, continuation) in enumerate(requests):
            if not context or len(continuation) > self.max_length:
                what = f'{len(continuation)} tokens to score, the model {self.max_length} positions'
                raise UserError(f'a request has {what if context else "no tokens before those to score"}')
            if continuation:
                row = tuple((context + continuation)[-(self.max_length + 1) : -1])
                rows.setdefault(row, []).append((i, continuation))
        groups = {}
        for row, asked in rows.items():
            scored = max(len(continuation) for _, continuation in asked)
            groups.setdefault(row[: len(row) - scored], []).append(row)
        ordered = sorted(groups.items(), key=lambda item: (-max(map(len, item[1])), item[0]))
        pairs = [(head, row) for head, group in ordered for row in sorted(group)]
        batches = in_batches(pairs, lambda pair: len(pair[1]), self.batch_tokens)
        answers = self.share(batches, lambda batch: self.score_rows(batch, rows))
        return [answers.get(i, (0.0, True)) for i in range(len(requests))]  # nothing to score is certain

    def score_rows(self, batch, rows):
        """A batch of (what a row shares with others of its group, row) -> {request: its answer}."""
        hidden, first = self.read(batch)  # (B, T, C)
        T, places, targets, spans = hidden.size(1), [], [], []
        for r, (_, row) in enumerate(batch):
            for i, continuation in rows[row]:
                end = r * T + len(row) - first[r]
                spans.append((i, len(targets), len(targets) + len(continuation)))
                places += range(end - len(continuation), end)
                targets += continuation
        x = hidden.flatten(0, 1)[torch.tensor(places, device=self.device)]  # (N, C), of N scored tokens
        at_once = max(1, MAX_LOGITS // self.model.config.vocab_size)
        log_probs, greedy = [], []
        targets = torch.tensor(targets, device=self.device)
        for part, y in zip(x.split(at_once), targets.split(at_once)):
            logits = self.model.logits(part).float()
            log_probs += (logits.gather(-1, y[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)).tolist()
            greedy += (logits.argmax(dim=-1) == y).tolist()
        return {i: (sum(log_probs[start:end]), all(greedy[start:end])) for i, start, end in spans}

    def read(self, batch):
        """A batch as score_rows takes it -> the final hidden states of the ends of its rows (B, T, C), padded at the
        end, and the position at which each row's begin. What rows have in common is read once, where that is less."""
        heads, rows = list(dict.fromkeys(head for head, _ in batch)), [row for _, row in batch]
        common = os.path.commonprefix(heads)
        longest_head, longest_row = max(map(len, heads)), max(map(len, rows))
        tail = max(len(row) - len(head) for head, row in batch)
        cache, known = None, len(common) if len(common) >= MIN_SHARED and len(rows) > 1 else 0
        if known:
            cache = self.extend(None, [None], [common])[1]
        parents, first = [0] * len(rows), [known] * len(rows)
        fewer = len(heads) * (longest_head - known) + len(rows) * tail < len(rows) * (longest_row - known)
        if fewer and longest_head + tail <= self.max_length:  # else padding would lie beyond the last position
            cache = self.extend(cache, [0] * len(heads), [head[known:] for head in heads])[1]
            number = {head: n for n, head in enumerate(heads)}
            parents, first = [number[head] for head, _ in batch], [len(head) for head, _ in batch]
        if not cache:
            return self.model.hidden(self.padded(rows)), first
        return self.extend(cache, parents, [row[start:] for row, start in zip(rows, first)])[0], first

    def extend(self, cache, parents, pieces):
        """Read pieces[r] after row parents[r] of a cache, or at the start without one -> hidden states, new cache."""
        lengths = [cache.lengths[parent] if cache else 0 for parent in parents]
        columns = max(lengths) + max(map(len, pieces))
        new = KVCache(self.model.config, len(pieces), columns, self.device, self.cache_dtype())
        if cache:
            new.put(list(range(len(pieces))), cache, parents)
        idx = self.padded(pieces)
        new.extend(idx.size(1))
        hidden = self.model.hidden(idx, cache=new)
        new.lengths = [length + len(piece) for length, piece in zip(lengths, pieces)]
        return hidden, new

    def padded(self, rows):
        """Tuples of ids -> (B, T), zeros at the ends."""
        width = max(map(len, rows))
        return torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=self.device)

    def cache_dtype(self):
        """Of keys and values."""
        return self.dtype if self.dtype != torch.float32 else self.model.transformer.wte.weight.dtype

    def generate_until(self, requests, disable_tqdm=False):
        """The texts that continue the contexts, up to the first of the texts in `until`."""
        groups = {}  # requests of the same settings
        for i, request in enumerate(requests):
            context, options = request.args
            groups.setdefault(repr(options), (options, []))[1].append((i, self.tok_encode(context)))
        answers = {}
        for options, asked in groups.values():
            answers |= self.generate_alike(asked, *self.generation_settings(options))
        return [answers[i] for i in range(len(requests))]

    def generate_alike(self, asked, sampling, until, n):
        """(request, ids) each -> {request: text}, all of the same settings."""
        longest = self.max_length - n
        rows = [(i, ids[-longest:] or [self.prefix_token_id]) for i, ids in asked]
        rows.sort(key=lambda row: (-len(row[1]), row))
        batches = in_batches(rows, lambda row: len(row[1]) + n, self.batch_tokens)
        return self.share(batches, lambda batch: self.generate_texts(batch, sampling, until, n))

    def generation_settings(self, options):
        """A task's generation_kwargs -> Sampling, texts that end an answer, most tokens."""
        settings = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        n, until, sampled = settings.pop('max_gen_toks'), settings.pop('until'), settings.pop('do_sample')
        eos = self.tokenizer.end_of_text
        until = handle_stop_sequences(until, None if eos is None else self.tokenizer.decode([eos]))
        if settings.get('num_beams') == 1:  # that is, none
            del settings['num_beams']
        unknown = [key for key in settings if key not in SAMPLING]
        if unknown:
            raise UserError(f'a task generates with {unknown[0]}={settings[unknown[0]]!r}, which is not supported')
        if not 0 < n < self.max_length:
            raise UserError(f'a task generates up to {n} tokens, the model has only {self.max_length} positions')
        if sampled:
            settings.setdefault('top_k', 50)  # the default of transformers
        else:
            settings['temperature'] = 0.0
        n_ids = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        with user_errors(ValueError, TypeError, where="a task's generation_kwargs: "):
            return Sampling(**settings, vocab_size=n_ids), [text for text in until if text], n

    def generate_texts(self, batch, sampling, until, n):
        """A batch of (request, ids) -> {request: text}."""
        samples = [Sample(ids, (SEED, i), self.tokenizer, until, self.ends) for i, ids in batch]
        for _ in generate(self.model, samples, n, sampling):
            if self.ranks.world_size == 1 and self.interrupted():
                raise Interrupted
        texts = {}
        for (i, _), sample in zip(batch, samples):
            texts[i] = self.tok_decode(sample.ids)
            for text in until:
                texts[i] = texts[i].split(text)[0]
        return texts

    def share(self, batches, compute):
        """Call compute for every batch on one of the ranks -> its dicts merged, on all ranks. A collective."""
        world_size, mine = self.ranks.world_size, {}
        bar = tqdm(total=sum(map(len, batches)), leave=False, disable=None if self.progress else True)
        for first in range(0, len(batches), world_size):
            for batch in batches[first + self.ranks.rank :][:1]:
                mine |= compute(batch)
            bar.update(sum(map(len, batches[first : first + world_size])))
            if self.interrupted():
                raise Interrupted
        bar.close()
        merged = {}
        for answers in self.ranks.gather(mine):
            merged |= answers
        return merged


def in_batches(items, length, limit) -> list[list]:
    """Cut a list, longest items first, into batches of at most `limit` tokens, padded; at least one item each."""
    batches, longest = [], 0
    for item in items:
        longest = max(longest, length(item))
        if not batches or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
            longest = length(item)
        batches[-1].append(item)
    return batches
