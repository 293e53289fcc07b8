"""Tasks as texts for language models: a template for the question, a few words for the answers.

The answer is chosen by rank classification: the likeliest of the choices (section 4). The templates are our own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter
from typing import NamedTuple

from sinkd.tasks import Examples, Task

YES_NO = ("no", "yes")
FOLLOWS = "{first}\nDoes it follow that the next sentence is true?\n{second}\nAnswer:"
SAME = "{first}\n{second}\nDo these two sentences say the same?\nAnswer:"
# A template, and an answer for each label in the task's order; COPA's answers are each row's own.
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cola": ("{first}\nIs this sentence grammatical?\nAnswer:", YES_NO),
    "sst2": ("{first}\nDid the reviewer like the film?\nAnswer:", YES_NO),
    "mrpc": (SAME, YES_NO),
    "qqp": ("{first}\n{second}\nDo these two questions ask the same?\nAnswer:", YES_NO),
    "mnli": (FOLLOWS, ("yes", "maybe", "no")),
    "qnli": ("{first}\n{second}\nDoes the text answer the question?\nAnswer:", ("yes", "no")),
    "rte": (FOLLOWS, ("yes", "no")),
    "wnli": (FOLLOWS, YES_NO),
    "boolq": ("{second}\nQuestion: {first}?\nAnswer:", YES_NO),
    "cb": (FOLLOWS, ("yes", "no", "maybe")),
    "copa": ("{first}\nWhat was the {second} of this?\n- {choice1}\n- {choice2}\nAnswer:", ()),
    "wic": ("{first}\n{second}\nIs the word meant in the same sense in both sentences?\nAnswer:", YES_NO),
}


class Prompted(NamedTuple):
    """One example as text: ``source + target`` is what a decoder reads; no end-of-text token is meant to stand between them.

    ``target`` and ``choices`` begin with the blank that parts them from the source. ``target`` is ``choices[label]``; both are
    None for an example without a label.
    """

    source: str
    target: str | None
    choices: tuple[str, ...]
    label: int | None


@dataclass(frozen=True)
class Prompt:
    """A template and its answers.

    Args:
        template: text with {first}, {second}, {choice1}, {choice2}, ...; {{ and }} stand for braces.
        choices: the answer for each label, in order; empty if each row has its own.

    Raises:
        ValueError: for another placeholder (naming it), or a template without one.

    >>> Prompt("{first} Good?", ("no", "yes")).template
    '{first} Good?'
    """

    template: str
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise ValueError(f"template {self.template!r}: {error}; write {{{{ and }}}} for braces") from None
        allowed = [f"choice{i}" for i in range(1, len(self.choices) + 1)]
        for name in names:
            known = re.fullmatch(r"choice[1-9]\d*", name) if not self.choices else name in allowed
            if name not in ("first", "second") and not known:
                raise ValueError(
                    f"template {self.template!r}: unknown placeholder {{{name}}}; there are {{first}}, {{second}}, "
                    f"{{choice1}} to {{choice{len(self.choices) or 'N'}}}"
                )
        if not {"first", "second"} & set(names):
            raise ValueError(
                f"template {self.template!r} has neither {{first}} nor {{second}}: every prompt would be the same"
            )


def prompt_for(task: Task, template: str | None = None) -> Prompt:
    r"""The task's prompt, or ``template`` with its answers; for a task without one of its own, label names as answers.

    A backslash and an n, which is what a command line hands over, stand for a new line.

    Raises:
        ValueError: for a regression task or an unknown placeholder.

    >>> from sinkd.tasks import generic
    >>> prompt_for(generic("bank", ("lost_card", "top_up")))
    Prompt(template='{first}\nLabel:', choices=('lost card', 'top up'))
    """
    if task.labels is None:
        raise ValueError(f"{task.name} is a regression task: language models need answers; use an encoder")
    default, choices = TEMPLATES.get(task.name, ("{first}\n{second}\nLabel:" if task.pair else "{first}\nLabel:", None))
    if choices is None:
        choices = tuple(label.replace("_", " ") for label in task.labels)
        if len(set(choices)) < len(choices):
            choices = task.labels
    return Prompt(default if template is None else template.replace(r"\n", "\n"), choices)


def render(examples: Examples, prompt: Prompt) -> list[Prompted]:
    """Each example as a prompt.

    Raises:
        ValueError: if the answers are neither the prompt's nor the rows' own, or do not match the labels in number.

    >>> from sinkd.tasks import TASKS, Examples
    >>> render(Examples(TASKS["sst2"], ["a joy"], None, [1], [0]), Prompt("{first} Good?", ("no", "yes")))
    [Prompted(source='a joy Good?', target=' yes', choices=(' no', ' yes'), label=1)]
    """
    labels = examples.task.labels
    if labels is None:
        raise ValueError(f"{examples.task.name} is a regression task: language models need answers; use an encoder")
    rows = []
    for i, first in enumerate(examples.first):
        choices = prompt.choices or (examples.choices[i] if examples.choices is not None else ())
        if len(choices) != len(labels):
            raise ValueError(
                f"the prompt has {len(choices)} choices, {examples.task.name} has {len(labels)} labels: give one for each"
            )
        fields = {"first": first, **{f"choice{n}": choice for n, choice in enumerate(choices, 1)}}
        if examples.second is not None:
            fields["second"] = examples.second[i]
        try:
            source = prompt.template.format(**fields)
        except KeyError as error:
            raise ValueError(
                f"template {prompt.template!r}: {{{error.args[0]}}} is unknown; {examples.task.name} has {', '.join(fields)}"
            ) from None
        answers = tuple(f" {choice}" for choice in choices)
        label = None if examples.labels is None else int(examples.labels[i])
        rows.append(Prompted(source, None if label is None else answers[label], answers, label))
    return rows
