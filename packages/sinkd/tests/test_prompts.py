import pytest
from sinkd.prompts import TEMPLATES, Prompt, Prompted, prompt_for, render
from sinkd.tasks import TASKS, Examples, generic

COPA = Examples(
    TASKS["copa"], ["It rained.", "He fell."], ["effect", "cause"], [0, 1], [0, 1], [("wet", "dry"), ("he ran", "ice")]
)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.labels is not None])
def test_every_known_task_can_be_asked(name):
    task = TASKS[name]
    second = ["TWO"] if task.pair else None
    choices = [("left", "right")] if name == "copa" else None
    examples = Examples(task, ["ONE {braces}"], second, [1], [0], choices)
    (prompted,) = render(examples, prompt_for(task))
    assert name in TEMPLATES
    assert "ONE {braces}" in prompted.source
    assert ("TWO" in prompted.source) == task.pair
    assert not prompted.source.endswith(" ")
    assert len(set(prompted.choices)) == len(task.labels)
    assert prompted.target == prompted.choices[1]


def test_answers_follow_the_order_of_the_labels():
    answers = {
        name: dict(zip(TASKS[name].labels, TEMPLATES[name][1], strict=True)) for name in ("cb", "mnli", "rte", "wnli")
    }
    assert answers["cb"] == answers["mnli"] == {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
    assert answers["rte"] == answers["wnli"] == {"entailment": "yes", "not_entailment": "no"}


def test_copa_has_each_rows_own_answers():
    assert render(COPA, prompt_for(COPA.task)) == [
        Prompted("It rained.\nWhat was the effect of this?\n- wet\n- dry\nAnswer:", " wet", (" wet", " dry"), 0),
        Prompted("He fell.\nWhat was the cause of this?\n- he ran\n- ice\nAnswer:", " ice", (" he ran", " ice"), 1),
    ]


def test_other_tasks_answer_with_label_names():
    task = generic("bank", ("lost_card", "top_up"))
    assert prompt_for(task).choices == ("lost card", "top up")
    assert prompt_for(generic("x", ("a_b", "a b"))).choices == ("a_b", "a b")  # no two answers alike
    pair = Examples(generic("p", ("a", "b"), pair=True), ["x"], ["y"], [0], [0])
    assert render(pair, prompt_for(pair.task))[0].source == "x\ny\nLabel:"


def test_a_template_of_ones_own_keeps_the_tasks_answers():
    prompt = prompt_for(TASKS["sst2"], r"Review: {first}\n{{{choice1} or {choice2}}}?")
    (prompted,) = render(Examples(TASKS["sst2"], ["good"], None, None, [5]), prompt)
    assert prompted == Prompted("Review: good\n{no or yes}?", None, (" no", " yes"), None)


@pytest.mark.parametrize("name", ["text", "choice3", "first.upper", "choice0", "", "0"])
def test_unknown_placeholders_are_named(name):
    with pytest.raises(
        ValueError, match=rf"unknown placeholder \{{{name}\}}; there are .*\{{choice1\}} to \{{choice2\}}"
    ):
        prompt_for(TASKS["rte"], f"{{first}} {{{name}}}")


def test_broken_templates_are_refused():
    with pytest.raises(ValueError, match=r"template '\{first': .*for braces"):
        Prompt("{first", ("a", "b"))
    with pytest.raises(ValueError, match="has neither"):
        Prompt("Yes or no?", ("a", "b"))


def test_second_of_single_texts_is_unknown():
    with pytest.raises(ValueError, match=r"\{second\} is unknown; sst2 has first, choice1, choice2"):
        render(Examples(TASKS["sst2"], ["a"], None, [0], [0]), Prompt("{first} {second}", ("a", "b")))


def test_a_rows_missing_choice_is_unknown():
    with pytest.raises(ValueError, match=r"\{choice3\} is unknown; copa has"):
        render(COPA, Prompt("{first} {choice3}", ()))


def test_answers_must_match_the_labels():
    with pytest.raises(ValueError, match="the prompt has 2 choices, cb has 3 labels"):
        render(Examples(TASKS["cb"], ["a"], ["b"], [0], [0]), Prompt("{first}", ("yes", "no")))
    with pytest.raises(ValueError, match="the prompt has 0 choices, sst2 has 2 labels"):
        render(Examples(TASKS["sst2"], ["a"], None, [0], [0]), Prompt("{first}", ()))


def test_regression_has_no_answers():
    with pytest.raises(ValueError, match="stsb is a regression task: language models need answers; use an encoder"):
        prompt_for(TASKS["stsb"])
    with pytest.raises(ValueError, match="use an encoder"):
        render(Examples(TASKS["stsb"], ["a"], ["b"], [0.5], [0]), Prompt("{first}", ("a", "b")))
