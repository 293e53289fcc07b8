import gzip
import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from sinkd.readers import DataOptions, load
from sinkd.tasks import TASKS

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")


def put(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def tsv(path, header, *rows):
    return put(path, *(["\t".join(header)] if header else []), *("\t".join(map(str, row)) for row in rows))


def jsonl(path, *rows):
    return put(path, *(json.dumps(row) for row in rows))


def read(path, seed=0, **options):
    return load(DataOptions(data=str(path), **options), seed)


def training(splits):
    """The official training part, put together again."""
    parts = [(e.ids[i], e.first[i], e.labels[i]) for e in (splits.train, splits.validation) for i in range(len(e))]
    return [(text, label) for _, text, label in sorted(parts)]


@pytest.fixture
def own(tmp_path):
    """100 texts of three classes, in a file of one's own."""
    return tsv(tmp_path / "own.tsv", ["text", "label"], *((f"text {i}", "abc"[i % 3]) for i in range(100)))


@REAL
class TestRealData:
    @pytest.mark.parametrize(
        ("name", "train", "validation", "test", "classes"),
        [
            ("sst2", 66349, 1000, 872, 2),
            ("cola", 7696, 855, 1043, 2),
            ("rte", 2241, 249, 277, 2),
            ("cb", 225, 25, 56, 3),
            ("copa", 360, 40, 100, 2),
            ("mrpc", 3668, 408, 1725, 2),
            ("banking77", 9003, 1000, 3080, 77),
            ("clinc150", 15000, 3000, 4500, 150),
        ],
    )
    def test_every_row_of_the_published_files_is_read(self, name, train, validation, test, classes):
        splits = read(name)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (train, validation, test)
        assert set(splits.train.labels) == set(range(classes))
        assert len(splits.train.task.labels) == classes
        assert splits.train.task.name == name
        assert splits.unlabelled is None

    def test_labels_mean_what_they_say(self):
        assert Counter(read("sst2").test.labels)[1] == 444
        rte = read("rte").test
        assert rte.first[0].startswith("Dana Reeve")
        assert rte.second[0] == "Christopher Reeve had an accident."
        assert rte.task.labels[rte.labels[0]] == "not_entailment"
        banking = read("banking77").test
        assert banking.task.labels[banking.labels[0]] == "card_arrival"
        copa = read("copa").test
        assert copa.second[:2] == ["effect", "effect"]
        assert copa.choices[0][copa.labels[0]] == "Water flowed from the spout."

    def test_quotation_marks_are_text(self):
        texts = [text for text, _ in training(read("mrpc"))]
        assert (
            texts[0]
            == 'Amrozi accused his brother, whom he called "the witness", of deliberately distorting his evidence.'
        )


class TestOfficialFolders:
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_cola_has_no_header_but_in_its_test_file(self, tmp_path, end):
        rows = [f"gj04\t{i % 2}\t\tSentence {i}." for i in range(20)]
        put(tmp_path / "CoLA" / "train.tsv", *rows, end=end)
        put(tmp_path / "CoLA" / "dev.tsv", 'gj04\t0\t*\t"Odd, it.', end=end)
        put(tmp_path / "CoLA" / "test.tsv", "index\tsentence", "0\tWho?", "1\tHim.", end=end)
        splits = read(tmp_path / "CoLA")
        assert training(splits) == [(f"Sentence {i}.", i % 2) for i in range(20)]
        assert (splits.test.first, splits.test.labels) == (['"Odd, it.'], [0])
        assert (splits.unlabelled.first, splits.unlabelled.labels, splits.unlabelled.ids) == (
            ["Who?", "Him."],
            None,
            [0, 1],
        )
        assert splits.train.task is TASKS["cola"]

    @pytest.mark.parametrize(
        ("folder", "header", "row", "label", "expected"),
        [
            ("SST-2", ["sentence", "label"], ["{} "], "1", 1),
            ("RTE", ["index", "sentence1", "sentence2", "label"], ["{i}", "{}", "two"], "not_entailment", 1),
            ("QNLI", ["index", "question", "sentence", "label"], ["{i}", "{}", "two"], "entailment", 0),
            ("WNLI", ["index", "sentence1", "sentence2", "label"], ["{i}", "{}", "two"], "1", 1),
            (
                "QQP",
                ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                ["{i}", "1", "2", "{}", "two"],
                "1",
                1,
            ),
        ],
    )
    def test_tab_separated_tasks(self, tmp_path, folder, header, row, label, expected):
        root = tmp_path / folder

        def lines(n, *tail):
            return [[field.format(f'"text {i}', i=i) for field in row] + list(tail) for i in range(n)]

        other = {"1": "0", "not_entailment": "entailment", "entailment": "not_entailment"}[label]
        tsv(root / "train.tsv", header, *lines(9, label), *lines(9, other))
        tsv(root / "dev.tsv", header, *lines(3, label))
        tsv(root / "test.tsv", header[:-1], *lines(2))
        splits = read(root)
        assert splits.test.first == ['"text 0', '"text 1', '"text 2']
        assert splits.test.second == (["two"] * 3 if splits.test.task.pair else None)
        assert splits.test.labels == [expected] * 3
        assert (splits.unlabelled.first, splits.unlabelled.labels) == (['"text 0', '"text 1'], None)

    def test_mrpc_from_either_layout(self, tmp_path):
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        rows = [[i % 2, 1, 2, f'One "{i}', f"Two {i}"] for i in range(20)]
        for folder, names in (
            ("a/MRPC", ("train.tsv", "dev.tsv")),
            ("b/MRPC", ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")),
        ):
            for name in names:
                path = tsv(tmp_path / folder / name, header, *rows)
                path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        a, b = read(tmp_path / "a" / "MRPC"), read(tmp_path / "b" / "MRPC")
        assert a == b
        assert (a.test.first[3], a.test.second[3], a.test.labels[3]) == ('One "3', "Two 3", 1)

    def test_mnli_keeps_its_mismatched_sets_apart(self, tmp_path):
        columns = ["index", "genre", "sentence1", "sentence2"]
        names = TASKS["mnli"].labels
        rows = [[i, "fiction", f"p{i}", f"h{i}", "neutral", names[i % 3]] for i in range(30)]
        tsv(tmp_path / "train.tsv", [*columns, "label1", "gold_label"], *rows)
        for name, genre in (("matched", "m"), ("mismatched", "x")):
            tsv(
                tmp_path / f"dev_{name}.tsv",
                [*columns, "label1", "gold_label"],
                [5, genre, genre, "h", names[2], names[1]],
            )
            tsv(tmp_path / f"test_{name}.tsv", columns, [9, genre, "t" + genre, "h"])
        splits = read(tmp_path, task="mnli")
        assert training(splits) == [(f"p{i}", i % 3) for i in range(30)]
        assert (splits.test.first, splits.test.labels) == (["m"], [1])
        assert (splits.unlabelled.first, splits.unlabelled.ids) == (["tm"], [9])
        assert list(splits.extra) == ["mismatched", "test_mismatched"]
        assert (splits.extra["mismatched"].first, splits.extra["mismatched"].labels) == (["x"], [1])
        assert (splits.extra["test_mismatched"].first, splits.extra["test_mismatched"].labels) == (["tx"], None)

    def test_stsb_is_regression(self, tmp_path):
        header = ["index", "genre", "sentence1", "sentence2", "score"]
        tsv(tmp_path / "STS-B" / "train.tsv", header, *([i, "news", f"a{i}", "b", i / 4] for i in range(20)))
        tsv(tmp_path / "STS-B" / "dev.tsv", header, [0, "news", "a", "b", "5.000"])
        splits = read(tmp_path / "STS-B")
        assert training(splits) == [(f"a{i}", i / 4) for i in range(20)]
        assert splits.test.labels == [5.0]

    def test_superglue(self, tmp_path):
        def write(task, *rows):
            jsonl(tmp_path / task / "train.jsonl", *(rows * 10))
            jsonl(tmp_path / task / "val.jsonl", *rows)
            jsonl(tmp_path / task / "test.jsonl", *({k: v for k, v in row.items() if k != "label"} for row in rows))
            return read(tmp_path / task)

        boolq = write("BoolQ", {"question": "is it", "passage": "It is.", "idx": 4, "label": True},
                      {"question": "was it", "passage": "It was not.", "idx": 7, "label": False})  # fmt: skip
        assert (boolq.test.first, boolq.test.second) == (["is it", "was it"], ["It is.", "It was not."])
        assert (boolq.test.labels, boolq.test.ids, boolq.unlabelled.ids) == ([1, 0], [4, 7], [4, 7])
        cb = write("CB", *({"premise": "p", "hypothesis": "h", "label": name} for name in ("neutral", "contradiction")))
        assert cb.test.labels == [2, 1]
        wic = write(
            "WiC",
            *({"word": "bed", "sentence1": "A bed.", "sentence2": "River bed.", "label": y} for y in (False, True)),
        )
        assert (wic.test.first[0], wic.test.second[0], wic.test.labels) == ("bed: A bed.", "River bed.", [0, 1])
        copa = write(
            "COPA", *({"premise": "p", "question": "cause", "choice1": "a", "choice2": "b", "label": y} for y in (0, 1))
        )
        assert (copa.test.second, copa.test.choices, copa.test.labels) == (["cause"] * 2, [("a", "b")] * 2, [0, 1])
        assert copa.unlabelled.labels is None
        with pytest.raises(ValueError, match="record, multirc, wsc are left out"):
            read(tmp_path / "CB", task="ReCoRD")

    def test_official_intent_lists(self, tmp_path):
        content = {
            "train": [["a", "x"], ["b", "y"]],
            "val": [["c", "y"]],
            "test": [["d", "x"]],
            "oos_test": [["e", "oos"]],
        }
        (tmp_path / "data_full.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
        splits = read("clinc150", data_dir=str(tmp_path))
        assert [(p.first, p.labels) for p in (splits.train, splits.validation, splits.test)] == [
            (["a", "b"], [0, 1]), (["c"], [1]), (["d"], [0])
        ]  # fmt: skip
        (tmp_path / "data_full.json.gz").write_bytes(gzip.compress(b'{"train": [["a"]]}'))
        with pytest.raises(ValueError, match=r"data_full.json.gz: not CLINC150's lists"):
            read("clinc150", data_dir=str(tmp_path))

    def test_folder_of_a_task_is_found_by_name(self, tmp_path, monkeypatch):
        tsv(tmp_path / "glue" / "SST-2" / "train.tsv", ["sentence", "label"], *((f"t{i}", i % 2) for i in range(20)))
        tsv(tmp_path / "glue" / "SST-2" / "dev.tsv", ["sentence", "label"], ("d", 1))
        by_folder = read(tmp_path / "glue" / "SST-2")
        assert read("sst2", data_dir=str(tmp_path / "glue")) == by_folder
        assert read(tmp_path / "glue", task="sst2") == by_folder
        monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
        (tmp_path / "glue").rename(tmp_path / "sinkd")
        (tmp_path / "sinkd" / "SST-2").rename(tmp_path / "sinkd" / "sst2")
        assert read("sst2") == by_folder

    def test_rows_of_a_wrong_length_are_errors_but_in_qqp(self, tmp_path, caplog):
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        good = [[i, 1, 2, f"q{i}", "" if i == 3 else "r", i % 2] for i in range(20)]
        tsv(tmp_path / "QQP" / "train.tsv", header, *good[:10], [1, "broken"], *good[10:], ["x"] * 9)
        tsv(tmp_path / "QQP" / "dev.tsv", header, good[0])
        with caplog.at_level(logging.WARNING):
            splits = read(tmp_path / "QQP")
        assert len(splits.train) + len(splits.validation) == 20
        assert "QQP/train.tsv: left out 2 rows with a wrong number of fields" in caplog.text.replace("\\", "/")
        tsv(tmp_path / "SST-2" / "train.tsv", ["sentence", "label"], ("a", 1), ("b", 0, "c"))
        tsv(tmp_path / "SST-2" / "dev.tsv", ["sentence", "label"], ("a", 1))
        with pytest.raises(ValueError, match=r"train.tsv, line 3: 3 fields, expected 2"):
            read(tmp_path / "SST-2")

    def test_errors_name_what_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.delenv("PAPERCORE_DATA", raising=False)
        with pytest.raises(ValueError, match="set PAPERCORE_DATA, or give --data_dir"):
            read("sst2")
        with pytest.raises(FileNotFoundError, match=r"not the files of sst2; expected train_part1.tsv"):
            read("sst2", data_dir=str(tmp_path))
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
            read("sst2", data_dir=str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="name its task by --task, one of cola"):
            read(tmp_path)
        with pytest.raises(
            ValueError, match=r"data 'imdb' is no folder, .jsonl, .csv or .tsv file, nor one of sample, cola"
        ):
            read("imdb")
        tsv(tmp_path / "RTE" / "train.tsv", ["a", "b"], (1, 2))
        tsv(tmp_path / "RTE" / "dev.tsv", ["a", "b"], (1, 2))
        with pytest.raises(ValueError, match=r"train.tsv: no pair of text columns for rte; it has a, b"):
            read(tmp_path / "RTE")
        tsv(tmp_path / "SST-2" / "train.tsv", ["sentence", "label"], ("a", 1), ("b", 2))
        tsv(tmp_path / "SST-2" / "dev.tsv", ["sentence", "label"], ("a", 1))
        with pytest.raises(
            ValueError, match=r"train.tsv, line 3: label '2' is not among those of sst2: negative, positive"
        ):
            read(tmp_path / "SST-2")


class TestFilesOfOnesOwn:
    def test_formats_agree(self, tmp_path):
        rows = [(f"text, {i}", "no" if i % 3 else "yes") for i in range(30)]
        a = tsv(tmp_path / "x.tsv", ["text", "label"], *rows)
        b = put(tmp_path / "x.csv", "text,label", *(f'"{text}",{label}' for text, label in rows), end="\r\n")
        c = jsonl(tmp_path / "x.jsonl", *({"text": text, "label": label} for text, label in rows))
        d = tmp_path / "x.jsonl.gz"
        d.write_bytes(gzip.compress(c.read_bytes()))
        first, *others = (read(path) for path in (a, b, c, d))
        assert all(splits == first for splits in others)
        assert first.train.task.labels == ("no", "yes")
        assert first.train.task.name == "x"

    def test_parts_are_disjoint_stratified_and_follow_the_seed(self, own):
        splits, again, other = read(own), read(own), read(own, seed=1)
        assert splits == again != other
        parts = (splits.train, splits.validation, splits.test)
        assert [len(p) for p in parts] == [72, 8, 20]
        assert sorted(i for p in parts for i in p.ids) == list(range(100))
        assert max(Counter(splits.test.labels).values()) - min(Counter(splits.test.labels).values()) <= 1
        assert all(
            f"text {i}" == text and i % 3 == y
            for p in parts
            for i, text, y in zip(p.ids, p.first, p.labels, strict=True)
        )

    def test_a_class_of_one_row_is_trained_on(self, tmp_path):
        path = tsv(tmp_path / "x.tsv", ["text", "label"], *((f"t{i}", "a") for i in range(30)), ("rare", "b"))
        assert all("rare" in read(path, seed=seed).train.first for seed in range(10))

    def test_whole_numbers_sort_as_such(self, tmp_path):
        rows = [{"text": f"t{i}", "label": i % 12 - 1} for i in range(60)]
        assert read(jsonl(tmp_path / "x.jsonl", *rows)).train.task.labels == tuple(map(str, range(-1, 11)))

    def test_pairs_and_columns_by_name(self, tmp_path):
        path = put(tmp_path / "x.csv", "q,a,kind", *(f"q{i},a{i},{i % 2}" for i in range(20)))
        splits = read(path, text="q", text_pair="a", label="kind")
        assert splits.train.task.pair
        assert all(q[1:] == a[1:] for q, a in zip(splits.train.first, splits.train.second, strict=True))

    def test_a_known_task_lends_labels_metrics_and_columns(self, tmp_path):
        rows = [{"premise": f"p{i}", "hypothesis": "h", "label": TASKS["cb"].labels[i % 3]} for i in range(20)]
        splits = read(jsonl(tmp_path / "x.jsonl", *rows), task="cb")
        assert splits.train.task is TASKS["cb"]
        assert splits.train.second[0] == "h"
        with pytest.raises(ValueError, match="cb has pairs of texts; give the second one's column by --text_pair"):
            read(tmp_path / "x.jsonl", task="cb", text="premise")

    def test_regression_when_said(self, tmp_path):
        path = tsv(tmp_path / "x.tsv", ["text", "label"], *((f"t{i}", i / 7) for i in range(1100)))
        splits = read(path, task="regression")
        assert splits.train.task.labels is None
        assert splits.train.labels[0] == float(splits.train.first[0][1:]) / 7
        with pytest.raises(ValueError, match="column 'label' has 1100 different numbers; say --task regression"):
            read(path)
        with pytest.raises(ValueError, match=r"x.tsv, line 3: column 'label' is 'nan', not a finite number"):
            read(tsv(tmp_path / "x.tsv", ["text", "label"], ("a", 1.5), ("b", "nan")), task="regression")

    def test_a_test_file_shares_the_training_labels(self, own, tmp_path):
        test = tsv(tmp_path / "test.tsv", ["label", "text"], ("c", "one"), ("a", "two"))
        splits = read(own, test_data=str(test))
        assert (splits.test.first, splits.test.labels) == (["one", "two"], [2, 0])
        assert len(splits.train) + len(splits.validation) == 100
        tsv(test, ["label", "text"], ("c", "one"), ("z", "two"))
        with pytest.raises(
            ValueError, match=r"test.tsv, line 3: label 'z' is not among those of the training data: a, b, c"
        ):
            read(own, test_data=str(test))

    def test_fewer_rows_are_a_part_of_more(self, own):
        everything, ten, five = read(own), read(own, max_train=10, max_test=4), read(own, max_train=5)
        assert (len(ten.train), len(ten.test), len(five.train)) == (10, 4, 5)
        assert set(five.train.ids) < set(ten.train.ids) < set(everything.train.ids)
        assert set(ten.test.ids) < set(everything.test.ids)
        assert ten.validation == everything.validation
        with pytest.raises(ValueError, match="max_train must be at least 1, got 0"):
            read(own, max_train=0)

    def test_validation_is_a_tenth_and_at_most_a_thousand(self, tmp_path):
        path = tsv(tmp_path / "x.tsv", ["text", "label"], *((f"t{i}", i % 2) for i in range(20_000)))
        splits = read(path)
        assert (len(splits.test), len(splits.validation)) == (4000, 1000)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.tsv", b"text\tlabel\na\t1\n \t0\n", "x.tsv, line 3: column 'text' is empty"),
            ("x.tsv", b"text\tlabel\na\t\n", "x.tsv, line 2: column 'label' is empty"),
            ("x.tsv", b"body\tlabel\na\t1\nb\t0\n", "x.tsv: column 'text' is missing; it has body, label"),
            ("x.csv", b"text,kind\na,1\n", "x.csv: column 'label' is missing; it has text, kind"),
            ("x.tsv", b"text\tlabel\n", "x.tsv: no rows"),
            ("x.csv", b"", "x.csv: no rows"),
            ("x.jsonl", b"\n", "x.jsonl: no rows"),
            ("x.tsv", b"text\tlabel\na\t1\n\xe4\t0\n", r"x.tsv, line 3: not UTF-8 \(byte 0xe4\)"),
            ("x.tsv", b'text\tlabel\n"a\tb"\t1\n', "x.tsv, line 2: 3 fields, expected 2 .quotation marks"),
            ("x.csv", b"text,label\na,1\nb\n", "x.csv, line 3: 1 fields, expected 2"),
            ("x.csv", b'text,label\n"a,1\n', "x.csv, line 2: unexpected end of data"),
            ("x.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "x.jsonl, line 2: not JSON"),
            ("x.jsonl", b"[1]\n", "x.jsonl, line 1: a list where an object was expected"),
            (
                "x.jsonl",
                b'{"text": 3, "label": 1}\n{"text": 3, "label": 0}\n',
                "x.jsonl, line 1: column 'text' is a int",
            ),
            ("x.jsonl", b'{"text": "a", "label": null}\n', "x.jsonl, line 1: column 'label' is empty"),
            ("x.tsv", b"text\tlabel\na\t1\nb\t1\n", "x.tsv: every row has the label '1'; a classifier needs two"),
            ("x.tsv", b"text\tlabel\na\t1\nb\t0\n", "2 rows of 2 classes are too few to hold any out"),
            ("x.csv.gz", b"\x1f\x8bno", "x.csv.gz: damaged gzip file"),
        ],
    )
    def test_wrong_files_end_in_one_line(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_missing_files_and_unknown_tasks(self, own, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none.csv: no such file"):
            read(tmp_path / "none.csv")
        with pytest.raises(ValueError, match=r"a .txt file; expected .tsv, .csv, .jsonl"):
            read(own, test_data="x.txt")
        with pytest.raises(ValueError, match="task 'nli' is unknown: choose from regression, cola"):
            read(own, task="nli")


def test_the_sample_is_the_default():
    splits = load(DataOptions(max_test=50), 0)
    assert splits.train.task.name == "sample"
    assert len(splits.test) == 50
    assert not set(splits.train.ids) & set(splits.validation.ids)


@pytest.mark.parametrize(
    ("data", "name"),
    [("sample", "sample"), ("/a/b/own.csv.gz", "own"), ("hub:me/set:x y", "set-x-y"), ("SST-2", "SST-2")],
)
def test_names_are_fit_for_folders(data, name):
    assert DataOptions(data=data).name == name


class TestHub:
    @pytest.fixture(autouse=True)
    def datasets(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
        return datasets

    def save(self, datasets, path, features=None, **parts):
        made = {name: datasets.Dataset.from_dict(columns, features=features) for name, columns in parts.items()}
        datasets.DatasetDict(made).save_to_disk(path)
        return f"hub:{path}"

    def test_known_task_goes_by_label_names_and_its_test_labels_are_secret(self, datasets, tmp_path):
        features = datasets.Features({
            "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "idx": datasets.Value("int32"),
            "label": datasets.ClassLabel(names=["not_entailment", "entailment"]),
        })  # fmt: skip

        def part(n, label):
            return {"sentence1": [f"s{i}" for i in range(n)], "sentence2": ["h"] * n, "idx": list(range(n)),
                    "label": [i % 2 if label is None else label for i in range(n)]}  # fmt: skip

        data = self.save(
            datasets, tmp_path / "rte", features, train=part(20, None), validation=part(3, 1), test=part(2, -1)
        )
        splits = read(data)
        assert splits.train.task is TASKS["rte"]
        assert training(splits)[1] == ("s1", 0)  # entailment, which the file calls 1
        assert (splits.test.labels, splits.test.second) == ([0] * 3, ["h"] * 3)
        assert (splits.unlabelled.first, splits.unlabelled.labels, splits.unlabelled.ids) == (
            ["s0", "s1"],
            None,
            [0, 1],
        )

    def test_other_sets_keep_their_own_parts_and_label_names(self, datasets, tmp_path, caplog):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
        )
        parts = {
            name: {"text": [f"{name} {i}" for i in range(4)], "label": [0, 1, 0, 1]}
            for name in ("train", "validation", "test")
        }
        parts["train"]["label"] = [0, 1, -1, 1]
        with caplog.at_level(logging.WARNING):
            splits = read(self.save(datasets, tmp_path / "mine", features, **parts))
        assert splits.train.task.labels == ("pos", "neg")
        assert splits.train.first == ["train 0", "train 1", "train 3"]
        assert "train: left out 1 rows without a label" in caplog.text
        assert (splits.validation.first[0], splits.test.first[0]) == ("validation 0", "test 0")

    def test_minus_one_may_be_a_label(self, datasets, tmp_path):
        columns = {"text": [f"t{i}" for i in range(30)], "label": [i % 3 - 1 for i in range(30)]}
        assert read(self.save(datasets, tmp_path / "mine", train=columns)).train.task.labels == ("-1", "0", "1")

    def test_mnli(self, datasets, tmp_path):
        columns = {"premise": ["p"] * 12, "hypothesis": ["h"] * 12, "label": [0, 1, 2] * 4, "idx": list(range(12))}
        secret = columns | {"label": [-1] * 12}
        parts = {"train": columns, "validation_matched": columns, "validation_mismatched": columns, "test_matched": secret, "test_mismatched": secret}  # fmt: skip  # noqa: E501
        splits = read(self.save(datasets, tmp_path / "mnli", **parts))
        assert splits.test.labels == [0, 1, 2] * 4
        assert splits.unlabelled.labels is None
        assert {name: part.labels is None for name, part in splits.extra.items()} == {
            "mismatched": False,
            "test_mismatched": True,
        }

    def test_a_folder_of_files_and_a_single_saved_set(self, datasets, tmp_path):
        columns = {"text": [f"t{i}" for i in range(30)], "label": ["a", "b"] * 15}
        (tmp_path / "files").mkdir()
        made = datasets.Dataset.from_dict(columns)
        made.to_csv(tmp_path / "files" / "train.csv")
        made.save_to_disk(tmp_path / "saved")
        splits = read(f"hub:{tmp_path / 'files'}")
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (22, 2, 6)
        assert training(read(f"hub:{tmp_path / 'saved'}")) == training(splits)

    def test_errors(self, datasets, tmp_path, monkeypatch):
        data = self.save(datasets, tmp_path / "mine", test={"text": ["a"], "label": [0]})
        with pytest.raises(ValueError, match="no split 'train'; it has test"):
            read(data)
        data = self.save(datasets, tmp_path / "other", train={"body": ["a", "b"], "label": [0, 1]})
        with pytest.raises(ValueError, match="other, train: column 'text' is missing; it has body, label"):
            read(data)
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "sinkd\[hub\]"'):
            read(data)
