"""Text that every machine with Python has, one id a character: the language manual and the standard library's docstrings.

The files are parsed, never imported. Their text differs a little from one version of Python to the next.
"""

import ast
import glob
import hashlib
import os
import sys
import sysconfig

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # by name: HERE/../.. is elsewhere if data/ is a link
from common.errors import UserError
from configurator import configure
from data.pipeline import write_dataset
from data.sources import Documents

configure(globals())
STDLIB = sysconfig.get_paths()['stdlib']


def parse(path):
    """The syntax tree of a Python file; an empty one if it cannot be parsed."""
    try:
        with open(path, encoding='utf-8') as file:
            return ast.parse(file.read())
    except (OSError, ValueError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])


def manual():
    """The topics of pydoc's copy of the language reference, in alphabetical order."""
    for node in parse(os.path.join(STDLIB, 'pydoc_data', 'topics.py')).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from (topics[name] for name in sorted(topics))


def docstrings():
    """The docstrings of modules, classes and functions in the standard library's top two levels, in the order of their paths."""
    paths = glob.glob(os.path.join(STDLIB, '*.py')) + glob.glob(os.path.join(STDLIB, '[a-z]*', '*.py'))
    for path in sorted(paths):
        if os.path.basename(os.path.dirname(path)) not in (
            'test',
            'site-packages',
            'dist-packages',
            'idlelib',
            'lib2to3',
            'pydoc_data',
        ):
            for node in ast.walk(parse(path)):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    yield ast.get_docstring(node) or ''


documents = [text.strip() + '\n' for text in (*manual(), *docstrings()) if text.isascii() and len(text) > 200]
if not documents:
    raise UserError(f'there is no Python text in {STDLIB}: this Python has neither its manual nor its sources')
documents.sort(
    key=lambda text: hashlib.sha256(text.encode()).digest()
)  # a fixed shuffle: manual and docstrings in both splits
write_dataset(HERE, Documents(documents, val_fraction=0.1), 'char')
