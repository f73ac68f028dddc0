"""Look at a data set of conversations before training on it: what is learned, and does the text look as the model's do?

python data/chat/audit.py conversations
python data/chat/audit.py conversations --show=8 | less

Learned text is green on a terminal, elsewhere it is [[in brackets]]. Exit status 2 if nothing is learned, or if the
template, here or in transformers, does not give the tokens that are stored.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import numpy as np

from chat import ChatTemplate
from common.errors import UserError, user_errors, warn
from configurator import configure, require
from data.chat.conversations import messages_of
from dataloader import CHECKED_AT_ONCE, DataSet
from tokenizer import load_tokenizer

name = ''  # the data set in data/chat; --name= may be omitted
show = 3  # conversations to show, of the few that meta.json keeps
config = configure(globals(), bare='name')

require(config, 'show', '0 or more', lambda v: v >= 0)
if not name:
    raise UserError('which data set? python data/chat/audit.py NAME, a folder in data/chat')
data = DataSet(f'chat/{os.path.basename(os.path.normpath(name))}')
meta = data.meta
numbers, kinds = ('window', 'truncated', 'empty', 'skipped'), {'examples': list, 'conversations': dict}
sound = all(type(meta.get(key)) is int for key in numbers) and all(type(meta.get(k)) is t for k, t in kinds.items())
if not sound:
    raise UserError(f'{data.path} is not a data set of conversations: make one with data/chat/prepare.py')
window = meta['window']
template = ChatTemplate(data.tokenizer)
with user_errors(ValueError, where=f'{data.path}/meta: '):
    tokenizer = load_tokenizer(data.tokenizer)
ends = sorted(template.end_of_turn(tokenizer))


# --- shares -----------------------------------------------------------------------------------------------------------

splits = {}
for split in ('train', 'val'):
    tokens = data.tokens(split, mask_documents=True)
    if tokens.mask is None or tokens.documents is None:
        raise UserError(f'{tokens.name}: no mask or no list of documents lies beside it: prepare the data again')
    mask, lengths = tokens.mask[0 : len(tokens)] != 0, np.diff(tokens.documents, append=len(tokens))
    n_learned = np.add.reduceat(mask, tokens.documents, dtype=np.int64)  # tokens of each document
    padding = lengths[n_learned == 0].sum()  # prepare.py leaves conversations without answers out
    answers = ended = blank = 0
    step = max(1, CHECKED_AT_ONCE // window) * window  # no answer continues in the next window
    for at in range(0, len(tokens), step):
        ids, marks = tokens[at : min(at + step, len(tokens))], mask[at : at + step]
        first, last = marks & ~np.append(False, marks[:-1]), marks & ~np.append(marks[1:], False)  # tokens of answers
        is_end = np.isin(ids, ends)
        answers, ended = answers + last.sum(), ended + (last & is_end).sum()
        blank += (first & last & is_end).sum()
    print(
        f'{split}: {np.count_nonzero(n_learned):,} conversations, {len(tokens):,} tokens in windows of {window:,}: '
        f'{n_learned.sum() / len(tokens):.1%} are learned, {padding / len(tokens):.1%} are padding'
    )
    print(f'  {answers:,} answers, {blank:,} of them empty; {ended / answers:.1%} with the end of the turn')
    if not ended:
        warn(f'{split}: no answer ends with a token that ends a turn, so the model does not learn to stop')
    splits[split] = tokens, mask
n_read = sum(meta['conversations'].values()) + meta['empty'] + meta['skipped']
truncated, empty, skipped = (f'{meta[key]:,} ({meta[key] / n_read:.1%})' for key in ('truncated', 'empty', 'skipped'))
print(
    f'of all conversations {truncated} are cut at the end of a window; {empty} without an answer and {skipped} '
    'unreadable ones were left out'
)


# --- examples ---------------------------------------------------------------------------------------------------------


def colored(ids, marks):
    """Text in which the learned tokens are marked."""
    before, after = ('\033[32m', '\033[0m') if sys.stdout.isatty() else ('[[', ']]')
    text = ''
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(marks)) + 1):
        piece = tokenizer.decode(ids[part].tolist())
        text += f'{before}{piece}{after}' if marks[part[0]] else piece
    return text


def transformers_tokenizer():
    """The tokenizer as transformers makes it, None where that is not installed."""
    try:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    spec = data.tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec['json']),
        chat_template=spec['chat_template'],
        **spec.get('special_tokens', {}),
    )


def examples():
    """Yield (split, offset, messages) of those in meta.json. UserError if they are not what prepare.py writes."""
    with user_errors(KeyError, TypeError, ValueError, where=f'{data.path}/meta.json: its examples: '):
        for example in meta['examples']:
            split, at, messages = example['split'], example['at'], example['messages']
            if split not in splits or type(at) is not int or not 0 <= at < len(splits[split][0]):
                raise ValueError('they are not in the data')
            yield split, at, messages_of({'messages': messages})


theirs, different = transformers_tokenizer(), []
for n, (split, at, messages) in enumerate(examples()):
    ids, learned = template.encode_supervised(messages, tokenizer)
    ids, learned = ids[:window], learned[:window]
    tokens, mask = splits[split]
    stored, marks = tokens[at : min(at + len(ids), len(tokens))], mask[at : at + len(ids)]
    learned[:1] = False
    if not np.array_equal(stored, ids) or not np.array_equal(marks, learned):
        different.append(f'{split} at {at}: the template gives other tokens')
    if theirs and theirs.apply_chat_template(messages, return_dict=False)[:window] != stored.tolist():
        different.append(f'{split} at {at}: transformers gives other tokens')
    if n < show:
        print(f'\n{split} at {at:,}:\n{colored(stored, marks)}')
if different:
    raise UserError(
        f'{data.path}, {different[0]} ({len(different)} such): prepare the data again (a template that writes the date '
        'gives other tokens every day, and so does a damaged mask)'
    )
checked = 'and in transformers' if theirs else '(transformers, which is not installed, might give others)'
print(f'\n{len(meta["examples"])} conversations encoded again give the stored tokens, here {checked}')
