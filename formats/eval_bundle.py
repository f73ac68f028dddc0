"""The evaluation bundle of CORE: 22 tasks as files, and the prompts that they become.

CORE is the mean of 22 accuracies, each centered so that guessing gives 0 and perfection 1 (Li et al. 2024,
"DataComp-LM", https://arxiv.org/abs/2406.11794). The bundle is what nanochat ranks its models by: a folder with
core.yaml (tasks, kinds, numbers of examples before a question), eval_meta_data.csv (accuracies of guessing) and
eval_data/ (a JSON object per line). Its files are read as data.
"""

import csv
import json
import os
import random
from dataclasses import dataclass

from common.errors import UserError, user_errors

URL = 'https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip'
KINDS = ('multiple_choice', 'schema', 'language_modeling')
MAX_FILE = 2**30  # bytes; the largest has some 30 MB


@dataclass
class Part:
    """One of the tasks."""

    label: str
    path: str  # of its items
    kind: str  # one of KINDS
    shots: int  # examples before a question
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing

    def items(self, limit: int | None = None, start: str = '') -> list[dict]:
        """The questions as prompts: {'contexts': texts, 'continuations': texts, 'gold': number of the right one}, one
        pair each for 'language_modeling'. limit: the first so many, of nanochat's order. start: what comes before each.

        The examples before a question are the same as nanochat's. UserError if the file is missing or damaged.
        """
        with user_errors(OSError, ValueError, KeyError, TypeError, IndexError, where=f'{self.path}: '):
            data = [json.loads(line) for line in read_text(self.path).splitlines() if line.strip()]
            random.Random(1337).shuffle(data)
            return [self.prompts(data, n, start) for n in range(len(data))[:limit]]

    def prompts(self, data, n, start):
        """Question n of `data` as items() gives it."""
        others = [i for i in range(len(data)) if i != n]
        examples = [data[i] for i in random.Random(1234 + n).sample(others, self.shots)] if self.shots else []
        item, between = data[n], self.delimiter
        before = start + ''.join(self.solved(example) + '\n\n' for example in examples)
        if self.kind == 'multiple_choice':
            contexts, continuations = [before + item['query']] * len(item['choices']), item['choices']
        elif self.kind == 'schema':
            contexts, continuations = [before + option for option in item['context_options']], [item['continuation']]
            continuations *= len(contexts)
        else:
            contexts, continuations = [before + item['context'].strip()], [item['continuation']]
        contexts = [context + between for context in contexts]
        return {'contexts': contexts, 'continuations': continuations, 'gold': item.get('gold', 0)}

    def solved(self, example):
        """A question with its answer."""
        if self.kind == 'multiple_choice':
            return example['query'] + self.delimiter + example['choices'][example['gold']]
        if self.kind == 'schema':
            return example['context_options'][example['gold']] + self.delimiter + example['continuation']
        return example['context'].strip() + self.delimiter + example['continuation']


def read_bundle(folder: str) -> list[Part]:
    """The tasks of a bundle. UserError if it is missing or damaged."""
    import yaml

    path = os.path.join(folder, 'core.yaml')
    if not folder or not os.path.exists(path):
        where = f'{folder} is not it' if folder else 'none is given'
        raise UserError(
            f'--tasks=core: needs the evaluation bundle, unpacked, as --task_path=; {where}; it is at {URL}'
        )
    parts = []
    kinds = OSError, ValueError, KeyError, IndexError, TypeError, yaml.YAMLError
    with user_errors(*kinds, where=f'{folder} is damaged: '):
        rows = csv.DictReader(read_text(os.path.join(folder, 'eval_meta_data.csv')).splitlines())
        baselines = {row['Eval Task']: float(row['Random baseline']) / 100 for row in rows}
        for task in yaml.safe_load(read_text(path))['icl_tasks']:
            if task['icl_task_type'] not in KINDS:
                raise ValueError(f'the kind of {task["label"]} is {task["icl_task_type"]!r}')
            if not 0 <= baselines[task['label']] < 1:
                raise ValueError(f'the accuracy of guessing in {task["label"]} is {baselines[task["label"]]}')
            parts.append(
                Part(
                    task['label'],
                    os.path.join(folder, 'eval_data', task['dataset_uri']),
                    task['icl_task_type'],
                    int(task['num_fewshot'][0]),
                    task.get('continuation_delimiter', ' '),
                    baselines[task['label']],
                )
            )
    return parts


def read_text(path):
    """The content of a UTF-8 file of the bundle."""
    if os.path.getsize(path) > MAX_FILE:
        raise ValueError(f'{path} is larger than {MAX_FILE >> 20} MB')
    with open(path, encoding='utf-8') as file:
        return file.read()
