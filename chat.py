"""Chat templates: a conversation to the text, and the tokens, that a model was fine-tuned on.

A template is a Jinja program that comes with a model, in its tokenizer's spec:
    {'chat_template': '{% for message in messages %}…', 'special_tokens': {'bos_token': '<s>', 'eos_token': '</s>'}, …}
It is rendered as transformers does, whose apply_chat_template defines what it may use:
https://huggingface.co/docs/transformers/chat_templating_writing

Anyone may have written it, so it runs within the limits below, in Jinja's sandbox, which opens no files and shows
nothing of Python's inside. It may take long, though: Ctrl-C ends it.
"""

import functools
import json
import os
import re
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata

import numpy as np

from common.errors import UserError, one_line
from tokenizer import MAX_TEMPLATE

MAX_TEXT = 2**22  # characters of a rendered conversation
MAX_MEMORY = 2**27  # bytes that rendering may take, on Linux
ANSWER = 'an answer that no template holds'  # to find out what a template writes before and after one
QUESTION = [{'role': 'user', 'content': 'a question'}]


class ChatTemplate:
    """The chat template in a tokenizer's spec."""

    def __init__(self, spec: dict):
        """UserError if the spec has no template, if it is none, or if the package jinja2 is missing or too old."""
        source, special_tokens = spec.get('chat_template'), spec.get('special_tokens') or {}
        if not source:
            raise UserError(
                'the model has no chat template, as it was not fine-tuned for conversations: choose one that was '
                '(often called Instruct or Chat), or let it continue text with --interactive=True'
            )
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
            raise UserError(f"the model's chat template must be a text of at most {MAX_TEMPLATE:,} characters")
        if not isinstance(special_tokens, dict) or not all(isinstance(text, str) for text in special_tokens.values()):
            raise UserError("the model's special_tokens must map names to texts, such as 'eos_token' to '</s>'")
        self.special_tokens = special_tokens
        self.environment = make_environment()
        self.ending = functools.cache(self.find_ending)
        with template_errors(), limited_memory(MAX_MEMORY):
            self.template = self.environment.from_string(source)

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as text.

        messages: {'role': 'system' | 'user' | 'assistant', 'content': text} each. add_generation_prompt: end with what
        comes before an answer. UserError if the template refuses the conversation, fails, or exceeds the limits.
        """
        return self.render_with_spans(messages, add_generation_prompt)[0]

    def render_with_spans(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[str, list[tuple]]:
        """A conversation -> its text, and the (start, end) of what the template marks as the assistant's by
        {% generation %}, which few do. Errors as in render()."""
        environment = self.environment
        environment.written, environment.spans, pieces = 0, [], []
        variables = {
            **self.special_tokens,
            'messages': messages,
            'add_generation_prompt': add_generation_prompt,
            'tools': None,
            'documents': None,
        }
        with template_errors(), limited_memory(MAX_MEMORY):
            for piece in self.template.generate(variables):
                pieces.append(piece)
                environment.written += len(piece)
                if environment.written > MAX_TEXT:
                    raise ValueError(f'it writes more than {MAX_TEXT:,} characters')
            text = ''.join(pieces)
            if not all(text.startswith(marked, start) for start, marked in environment.spans):
                raise ValueError('what it marks by {% generation %} is in a block whose text it writes elsewhere')
            return text, [(start, start + len(marked)) for start, marked in environment.spans]

    def encode(self, messages: list[dict], tokenizer, add_generation_prompt: bool = True) -> list[int]:
        """A conversation as ids, special tokens as tokens. The template writes the one that starts a text, if the model
        wants it. Errors as in render(); ValueError if the tokenizer lacks a character."""
        return tokenizer.encode(self.render(messages, add_generation_prompt), special=True).tolist()

    def encode_supervised(self, messages: list[dict], tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """A conversation for training -> its ids, those of encode(), and which of them to learn, bool, (T,) each.

        Learned are the assistant's turns as answer_spans() finds them; a token that is partly outside of them is not.
        Errors as in answer_spans(); ValueError if the tokenizer lacks a character.
        """
        text, spans = self.answer_spans(messages, tokenizer)
        ids, starts, ends = tokenizer.encode_with_offsets(text)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            mask |= (start <= starts) & (starts < end) & (ends <= end)
        return ids, mask

    def answer_spans(self, messages: list[dict], tokenizer) -> tuple[str, list[tuple]]:
        """A conversation -> its text, and the (start, end) of each turn of the assistant in it: what a model has to
        write after the prompt, up to and with the token that ends the turn, if the template writes one.

        These are what the template marks by {% generation %}. Other templates tell by what they write: a turn starts
        where the prompt for it ends, and ends where the text starts that is the same after any other answer.
        UserError as in render(), and if the template does not show in this way where a turn is.
        """
        text, spans = self.render_with_spans(messages)
        if self.environment.has_marks:
            self.check_marks(messages, [text[start:end] for start, end in spans])
            return text, spans
        for k, message in enumerate(messages):
            if message['role'] != 'assistant':
                continue
            prompt = self.render(messages[:k], add_generation_prompt=True)
            other = [*messages[:k], {**message, 'content': ANSWER}, *messages[k + 1 :]]
            before, found, after = self.render(other, add_generation_prompt=False).partition(ANSWER)
            is_shown = found and ANSWER not in after and before.startswith(prompt)
            if not is_shown or not text.startswith(prompt) or not text[len(prompt) :].endswith(after):
                raise UserError(
                    f'message {k + 1}: the chat template does not write the conversation before this answer as it '
                    'writes the prompt for it, or not the answer as it is: mark answers in the template by '
                    '{% generation %}, or split the conversation into some with one answer'
                )
            header = before[len(prompt) :]
            if header.strip() and not self.has_prompt:
                raise UserError(
                    f'the chat template ignores add_generation_prompt, so {one_line(repr(header), 60)} would count as '
                    'the answer: mark answers in the template by {% generation %}'
                )
            ending = self.ending(tokenizer, is_last=k == len(messages) - 1)[0]
            end = len(text) - len(after) + (len(ending) if after.startswith(ending) else 0)
            spans.append((len(prompt), end))
        return text, spans

    @staticmethod
    def check_marks(messages, marked):
        """UserError unless what a template marks, texts, can be the answers: one each, and not another's message."""
        answers = [message['content'] for message in messages if message['role'] == 'assistant']
        others = [message['content'] for message in messages if message['role'] != 'assistant' and message['content']]
        wrong = any(
            answer.strip() not in text and any(other in text for other in others)
            for answer, text in zip(answers, marked)
        )
        if len(marked) != len(answers) or wrong:
            raise UserError(
                f'the chat template marks {len(marked)} texts by {{% generation %}}, which are not the '
                f'{len(answers)} answers: it must mark those, each by itself'
            )

    @functools.cached_property
    def has_prompt(self) -> bool:
        """Does the template write anything before an answer when it is asked to?"""
        return self.render(QUESTION, add_generation_prompt=True) != self.render(QUESTION, add_generation_prompt=False)

    def find_ending(self, tokenizer, is_last: bool) -> tuple[str, int | None]:
        """What the template writes after an answer, up to and with the first special token, and the id of that: at the
        end of the turn or, unless the answer is_last, at the start of the next. '' and None for no such token."""
        messages = [*QUESTION, {'role': 'assistant', 'content': ANSWER}]
        messages += [] if is_last else [{'role': 'user', 'content': 'another'}]
        _, answered, after = self.render(messages, add_generation_prompt=False).rpartition(ANSWER)
        end = tokenizer.end_of_text
        texts = {} if end is None else {end: tokenizer.decode([end])}
        texts.update(getattr(tokenizer, 'special', {}))
        places = [(after.find(text), -len(text), id) for id, text in texts.items() if answered and text in after]
        if not places:
            return '', None
        at, length, id = min(places)
        return after[: at - length], id

    def end_of_turn(self, tokenizer) -> set[int]:
        """The ids that end an answer: the first special token that the template writes after one, be it at its end or
        at the start of the next turn, and the one that ends a text. Errors as in render()."""
        return {self.ending(tokenizer, is_last=False)[1], tokenizer.end_of_text} - {None}


# --- the sandbox ------------------------------------------------------------------------------------------------------


def make_environment():
    """Jinja's sandbox with what chat templates expect. UserError if jinja2 is missing, or has known ways out."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError as error:
        raise UserError('chat templates need the package jinja2: pip install jinja2') from error
    version = metadata.version('jinja2')
    if [int(number) for number in re.findall(r'\d+', version)[:3]] < [3, 1, 6]:
        raise UserError(
            f'chat templates need jinja2 3.1.6 or later, as {version} does not contain hostile ones: '
            'pip install -U jinja2'
        )

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(['**'])

        def call_binop(self, context, operator, left, right):
            raise jinja2.exceptions.SecurityError('powers are not allowed, as they may be too large to compute')

    class Generation(ext.Extension):
        """{% generation %} … {% endgeneration %} writes what is in it, and notes where that is."""

        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            self.environment.has_marks = True
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return nodes.CallBlock(self.call_method('note'), [], [], body).set_lineno(line)

        def note(self, caller):
            text = caller()
            self.environment.spans.append((self.environment.written, text))
            return text

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, which would let a template define methods that Python calls."""

        def __init__(*args, **attributes):  # so that an attribute may be called self
            self, values = args[0], dict(*args[1:], **attributes)
            jinja2.utils.Namespace.__init__(self)
            for name, value in values.items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith('_'):
                raise jinja2.exceptions.SecurityError(f'a namespace may not have the attribute {name}')
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.has_marks = False  # set by {% generation %}
    environment.filters['tojson'] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        namespace=Namespace,
        dict=lambda *args, **items: dict(*args, **items),  # without the methods of the type
    )
    return environment


@contextmanager
def template_errors():
    """Whatever goes wrong in a template is one line."""
    try:
        yield
    except MemoryError:
        raise UserError(f"the model's chat template fails: it takes more than {MAX_MEMORY >> 20} MB") from None
    except Exception as error:  # a template can raise anything
        text = one_line(str(error) or type(error).__name__)
        raise UserError(f"the model's chat template fails, or refuses this conversation: {text}") from None


@contextmanager
def limited_memory(spare: int):
    """Within the block, on Linux, taking more than `spare` bytes raises MemoryError. Elsewhere there is no limit."""
    try:
        with open('/proc/self/statm') as file:
            used = int(file.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (min({used + spare, soft} - {resource.RLIM_INFINITY}), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
