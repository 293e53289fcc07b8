import pytest
from sinkd.metrics import METRICS
from sinkd.tasks import TASKS, Examples, Task, generic, task_name


def test_every_known_task_has_metrics_that_exist():
    assert len(TASKS) == 13
    for name, task in TASKS.items():
        assert task.name == name
        assert task.metrics
        assert set(task.metrics) <= set(METRICS)
        assert task.labels is None or len(set(task.labels)) == len(task.labels) >= 2


def test_the_metrics_that_decide_are_those_of_the_papers_code():
    decide = {name: task.metrics[0] for name, task in TASKS.items() if task.metrics[0] != "accuracy"}
    assert decide == {"cola": "matthews", "mrpc": "f1", "stsb": "spearman"}
    assert TASKS["cb"].metrics == ("accuracy", "macro_f1")
    assert [name for name, task in TASKS.items() if task.labels is None] == ["stsb"]


@pytest.mark.parametrize(
    ("written", "short"),
    [
        ("SST-2", "sst2"),
        ("STS-B", "stsb"),
        ("WiC", "wic"),
        ("MNLI", "mnli"),
        ("banking77", "banking77"),
        ("imdb", None),
    ],
)
def test_names_as_folders_write_them(written, short):
    assert task_name(written) == short


@pytest.mark.parametrize("name", ["record", "MultiRC", "WSC"])
def test_tasks_left_out_are_said_to_be(name):
    with pytest.raises(ValueError, match=f"{name}: record, multirc, wsc are left out.*choose from cola"):
        task_name(name)


class TestExamples:
    def test_select_takes_every_list(self):
        choices = [("a", "b"), ("c", "d"), ("e", "f")]
        examples = Examples(TASKS["copa"], ["p", "q", "r"], ["cause"] * 3, [0, 1, 1], [7, 8, 9], choices)
        part = examples.select([2, 0])
        assert len(part) == 2
        assert part == Examples(TASKS["copa"], ["r", "p"], ["cause"] * 2, [1, 0], [9, 7], [("e", "f"), ("a", "b")])

    def test_select_keeps_what_is_not_there(self):
        part = Examples(TASKS["sst2"], ["a", "b"], None, None, [0, 1]).select([1])
        assert (part.second, part.labels, part.choices) == (None, None, None)

    @pytest.mark.parametrize("column", ["second", "labels", "ids", "choices"])
    def test_lists_of_unequal_length_are_refused(self, column):
        columns = {"second": ["x", "y"], "labels": [0, 1], "ids": [0, 1], "choices": [("a",), ("b",)]}
        columns[column] = columns[column][:1]
        with pytest.raises(ValueError, match=f"rte: first has 2 rows, {column} has 1"):
            Examples(TASKS["rte"], ["a", "b"], **columns)


def test_generic_tasks_are_scored_by_what_they_are():
    assert generic("x", ("a", "b")) == Task("x", ("a", "b"), ("accuracy", "macro_f1"), False)
    assert generic("x", None, pair=True) == Task("x", None, ("spearman", "pearson"), True)
