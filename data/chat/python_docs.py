"""Conversations that every Python can make: questions about its standard library, answered by its docstrings.

The files are parsed, never imported. Each function, class and module is asked about once, and no two answers say the
same, so that no answer of the validation split is in the training split. They differ a little between Python versions.
"""

import ast
import glob
import os
import sysconfig
from collections.abc import Iterator

from data.worker import document_hash

STDLIB = sysconfig.get_paths()['stdlib']
NOT_LIBRARY = 'test site-packages dist-packages idlelib lib2to3 pydoc_data turtledemo'.split()  # folders to skip
SHORTEST, LONGEST = 25, 330  # characters of what an answer takes from a docstring
SIGNATURE = 80  # characters, at most: arguments of a longer one are left out
SYSTEM = "You answer questions about Python's standard library in a sentence or two."
VERBS = set(
    """add append apply build call change check close compare compute convert copy count create decode delete determine
    disable emit enable encode escape execute extract fill find format generate get handle initialize insert install
    iterate join list load locate log make match merge move normalize open parse perform print process quote raise read
    register remove rename replace report reset run save scan search select send set shift show skip sort split start
    stop store test transform translate unquote update validate wait walk wrap write""".split()
)


def conversations() -> Iterator[list[dict]]:
    """Yield conversations of one to three questions, some with a system message, in an order that is always the same.

    A list of {'role': 'system' | 'user' | 'assistant', 'content': text} each.
    """
    paths = glob.glob(os.path.join(STDLIB, '*.py')) + glob.glob(os.path.join(STDLIB, '[a-z]*', '*.py'))
    said = set()
    for path in sorted(paths):
        names = os.path.relpath(path, STDLIB).removesuffix('.py').removesuffix(os.sep + '__init__').split(os.sep)
        if names[0] in NOT_LIBRARY or any(name.startswith('_') or not name.isidentifier() for name in names):
            continue
        turns = []
        for question, name, saying in turns_about('.'.join(names), parse(path)):
            if saying not in said:
                said.add(saying)
                turns.append((question, f'`{name}`: {saying}'))
        while turns:
            number = document_hash(turns[0][1])
            n = (1, 1, 1, 1, 1, 2, 2, 3)[number % 8]
            messages = [{'role': 'system', 'content': SYSTEM}] if number // 8 % 4 == 0 else []
            for question, answer in turns[:n]:
                messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
            yield messages
            turns = turns[n:]


def parse(path):
    """Parse a Python file -> its syntax tree, an empty one if that fails."""
    try:
        with open(path, encoding='utf-8') as file:
            return ast.parse(file.read())
    except (OSError, ValueError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])


def turns_about(module, tree):
    """Yield (question, name in the answer, what is said) about a module, its public classes, functions and methods."""
    saying = first_sentences(tree)
    if saying:
        yield choose(module, 'What is the module {0} for?', 'What does the module `{0}` contain?'), module, saying
    for node in tree.body:
        yield from turns_about_one(module, module, node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield from turns_about_one(module, f'{module}.{node.name}', inner)


def turns_about_one(module, scope, node):
    """The same about a class or a function in a scope; nothing if it is private or its docstring says too little."""
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'):
        return
    name, saying = f'{scope}.{node.name}', first_sentences(node)
    if not saying:
        return
    if isinstance(node, ast.ClassDef):
        yield choose(name, 'What is {0}?', 'What is the class `{0}` for?', 'Explain {0}.'), name, saying
        return
    for_any = ('What does {0} do?', 'What is `{0}` for?', 'How do I use {0}?', 'Explain {0}.')
    verb, _, rest = saying.partition(' ')
    if verb.lower() in VERBS and len(saying) < 100 and '. ' not in saying and ';' not in saying:
        for_any += (f'How do I {verb.lower()} {rest[:-1]} with {module}?'.replace('{', '{{').replace('}', '}}'),) * 4
    arguments = ast.unparse(node.args)
    first, _, rest = arguments.partition(', ')
    if first in ('self', 'cls'):
        arguments = rest
    signature = f'{name}({arguments})'
    yield choose(name, *for_any), signature if len(signature) <= SIGNATURE else f'{name}(...)', saying


def choose(name, *forms):
    """One of several forms of a question about a name, always the same one."""
    return forms[document_hash(name) % len(forms)].format(name)


def first_sentences(node):
    """The first paragraph of a node's docstring on one line, cut after a sentence where it is long; '' if it has none
    that is prose."""
    text = (ast.get_docstring(node) or '').split('\n\n')[0]
    text = ' '.join(text.split())
    if len(text) > LONGEST:
        text = text[: text.rfind('. ', 0, LONGEST) + 1]
    if not text.endswith('.'):
        text += '' if text.endswith((':', ',')) else '.'
    is_prose = text.isascii() and text[:1].isupper() and '->' not in text and '>>>' not in text and text.endswith('.')
    return text if is_prose and SHORTEST <= len(text) <= LONGEST else ''
