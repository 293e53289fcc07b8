import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peg import data as module
from peg.data import FEATURES, RetrievalData, load_rows, read_beir, read_corpus, read_rows, training_rows, write_rows

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")
CORPUS = [
    {"_id": "d1", "title": "Title", "text": "of it"},
    {"_id": 2, "text": "two"},
    {"_id": "d3", "title": "", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "one?", "metadata": {}}, {"_id": 7, "text": "seven?"}, {"_id": "q9", "text": "nine?"}]
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\t2\t0", "7\td3\t1"]
ROW = {"query": "one?", "pos": ["a", "b"], "neg": ["c"], "pos_ids": ["1", "2"], "neg_ids": ["3"], "source": "rows"}


def put(path: Path, *lines: str | dict, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + end for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def beir(tmp_path):
    """Write a BEIR folder, in which some files are others."""

    def write(gz="", end="\n", **files):
        files = {"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS} | files
        put(tmp_path / f"corpus.jsonl{gz}", *files["corpus"], end=end)
        put(tmp_path / f"queries.jsonl{gz}", *files["queries"], end=end)
        put(tmp_path / "qrels" / f"test.tsv{gz}", *files["qrels"], end=end)
        return tmp_path

    return write


@pytest.fixture
def load(tmp_path):
    def load(path, source=None):
        return load_rows(path, source, cache_dir=tmp_path / "cache")

    return load


@REAL
@pytest.mark.parametrize(
    ("name", "split", "queries", "documents", "relevant", "empty"),
    [
        ("medquad", "train", 12598, 15809, 13768, []),
        ("medquad", "dev", 747, 15809, 788, []),
        ("medquad", "test", 1634, 15809, 1803, []),
        ("cmrc2018", "dev", 3219, 1104, 3219, []),
        ("cmrc2018", "trial", 1000, 1104, 1000, []),
        ("drcd", "dev", 3524, 2000, 3524, []),
        ("drcd", "test", 3493, 2000, 3493, []),
        ("cranfield", "test", 225, 1400, 1612, ["471", "995"]),
    ],
)
def test_real_folders_are_read_whole(name, split, queries, documents, relevant, empty):
    data = read_beir(Path(os.environ["PAPERCORE_DATA"]) / "peg" / name, split)
    assert (len(data.queries), len(data.corpus)) == (queries, documents)
    assert sum(gain > 0 for gains in data.qrels.values() for gain in gains.values()) == relevant
    assert [id for id, text in data.corpus.items() if not text] == empty
    if name == "cranfield":
        gains = [gain for judged in data.qrels.values() for gain in judged.values()]
        assert (len(gains), set(gains)) == (1837, {0, 1, 2, 3, 4})
        assert data.corpus["1"].startswith("experimental investigation of the aerodynamics")


@REAL
def test_real_training_rows_know_every_right_answer(load, tmp_path):
    data = read_beir(Path(os.environ["PAPERCORE_DATA"]) / "peg" / "medquad", "dev")
    first = next(iter(data.queries))
    rows = training_rows(data, {first: ["a00001"]}, "medquad")
    assert len(rows) == 747
    assert sum(map(len, rows["pos"])) == 788
    assert rows[0]["query"] == data.queries[first]
    assert rows[0]["neg"] == [data.corpus["a00001"]]
    write_rows(tmp_path / "rows.jsonl.gz", rows)
    again = load(tmp_path / "rows.jsonl.gz")
    assert again.to_list() == rows.to_list()


class TestBeir:
    @pytest.mark.parametrize(("gz", "end"), [("", "\n"), (".gz", "\n"), ("", "\r\n")])
    def test_ids_texts_and_gains(self, beir, gz, end):
        data = read_beir(beir(gz, end), "test")
        assert data == RetrievalData(
            queries={"q1": "one?", "7": "seven?"},  # not q9, which this split does not judge
            corpus={"d1": "Title of it", "2": "two", "d3": ""},
            qrels={"q1": {"d1": 2, "2": 0}, "7": {"d3": 1}},
        )
        assert read_corpus(beir()) == data.corpus

    def test_a_header_is_not_needed_and_a_repeated_line_is_no_harm(self, beir):
        assert read_beir(beir(qrels=[QRELS[1], *QRELS[1:]]), "test") == read_beir(beir(), "test")

    def test_blank_lines_and_a_byte_order_mark_are_passed_over(self, beir):
        folder = beir(queries=["\ufeff" + json.dumps(QUERIES[0]), "", *QUERIES[1:]], qrels=[*QRELS, ""])
        assert len(read_beir(folder, "test").queries) == 2

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"corpus": []}, "corpus.jsonl: no lines"),
            ({"queries": []}, "queries.jsonl: no lines"),
            ({"qrels": QRELS[:1]}, "test.tsv: no judgements"),
            ({"corpus": [*CORPUS, "{"]}, "corpus.jsonl, line 4: not JSON: "),
            ({"corpus": [*CORPUS, "[1]"]}, "corpus.jsonl, line 4: a list where an object was expected"),
            ({"corpus": [*CORPUS, CORPUS[0]]}, "corpus.jsonl, line 4: _id d1 occurs twice"),
            ({"corpus": [{"text": "a"}]}, "corpus.jsonl, line 1: _id is None, not a text or a whole number"),
            ({"corpus": [{"_id": 1.5, "text": "a"}]}, "corpus.jsonl, line 1: _id is 1.5"),
            ({"corpus": [{"_id": "1"}]}, "corpus.jsonl, line 1: text and title must be texts"),
            ({"corpus": [{"_id": "1", "title": 3, "text": "a"}]}, "corpus.jsonl, line 1: text and title must be texts"),
            ({"queries": [*QUERIES[:1], {"_id": 7, "text": " "}]}, "queries.jsonl, line 2: query 7 is empty"),
            ({"queries": [*QUERIES, QUERIES[0]]}, "queries.jsonl, line 4: _id q1 occurs twice"),
            ({"queries": ['{"_id": 1, "text": "\\ud800"}']}, "queries.jsonl, line 1: half of a surrogate pair"),
            ({"qrels": [*QRELS, "q1 d1 1"]}, "test.tsv, line 5: 1 fields, not query id, document id and gain"),
            ({"qrels": [*QRELS, "7\td1\t-1"]}, "test.tsv, line 5: the gain is '-1', not a whole number of at least 0"),
            ({"qrels": [*QRELS, "7\td1\t0.5"]}, "test.tsv, line 5: the gain is '0.5'"),
            ({"qrels": [*QRELS, "q1\td1\t1"]}, "test.tsv, line 5: query q1 and document d1 have another gain above"),
            ({"qrels": [*QRELS, "q1\tx\t1"]}, "test.tsv: qrels name 1 document that the corpus lacks: x"),
            ({"qrels": [*QRELS, "x\td1\t1"]}, "test.tsv: qrels name 1 query that the queries lack: x"),
            (
                {"qrels": [f"q1\tx{i}\t1" for i in range(6)]},
                "qrels name 6 documents that the corpus lacks: x0, x1, x2, x3, x4, ...",
            ),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, beir, files, message):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            read_beir(beir(**files), "test")
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_missing_files_are_named_and_so_are_the_splits_there_are(self, beir, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder; BEIR folders hold"):
            read_beir(tmp_path / "nowhere", "test")
        with pytest.raises(FileNotFoundError, match=r"no qrels/dev.tsv; it has the splits none"):
            read_beir(tmp_path, "dev")
        folder = beir()
        put(folder / "qrels" / "a.tsv.gz", *QRELS)
        with pytest.raises(FileNotFoundError, match=r"no qrels/dev.tsv; it has the splits a, test"):
            read_beir(folder, "dev")
        (folder / "corpus.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match=r"no corpus.jsonl or corpus.jsonl.gz"):
            read_beir(folder, "test")

    def test_damaged_bytes_are_said_to_be_such(self, beir):
        folder = beir()
        (folder / "corpus.jsonl").write_bytes(json.dumps(CORPUS[0]).encode() + b"\n\xff\n")
        with pytest.raises(ValueError, match=r"corpus.jsonl, line 2: not UTF-8 \(byte 0xff\)"):
            read_beir(folder, "test")
        (folder / "corpus.jsonl").rename(folder / "corpus.jsonl.gz")
        with pytest.raises(ValueError, match=r"corpus.jsonl.gz: damaged gzip file"):
            read_beir(folder, "test")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (({"q": "a"}, {}, {}), "the corpus is empty"),
        (({}, {"d": "a"}, {}), "there are no queries"),
        (({"q": "a"}, {"d": "a"}, {"q": {"e": 0}}), "1 document that the corpus lacks: e"),
        (({"q": "a"}, {"d": "a"}, {"r": {"d": 1}}), "1 query that the queries lack: r"),
    ],
)
def test_data_made_by_hand_are_checked_alike(parts, message):
    with pytest.raises(ValueError, match=message):
        RetrievalData(*parts)


class TestTrainingRows:
    DATA = RetrievalData(
        {"q": "one?", "r": "two?"}, {"a": "A", "b": "B", "c": "C"}, {"q": {"a": 1, "b": 3, "c": 0}, "r": {"c": 1}}
    )

    def test_a_row_for_each_query_with_all_its_positives(self):
        rows = training_rows(self.DATA, {"q": ["c"]}, "toy")
        assert rows.features == FEATURES
        assert rows.to_list() == [
            {
                "query": "one?",
                "pos": ["A", "B"],
                "neg": ["C"],
                "pos_ids": ["a", "b"],
                "neg_ids": ["c"],
                "source": "toy",
            },
            {"query": "two?", "pos": ["C"], "neg": [], "pos_ids": ["c"], "neg_ids": [], "source": "toy"},
        ]
        assert training_rows(self.DATA)["neg"][:] == [[], []]

    def test_a_query_without_a_positive_is_an_error_that_names_it(self):
        queries = {f"q{i}": "text" for i in range(7)}
        data = RetrievalData(queries, {"d": "text"}, {"q0": {"d": 1}, "q1": {"d": 0}})
        with pytest.raises(ValueError, match=r"on for 6 of 7 queries: q1, q2, q3, q4, q5, \.\.\.$"):
            training_rows(data)

    def test_an_unknown_negative_is_an_error_that_names_it(self):
        with pytest.raises(ValueError, match="the corpus lacks 1 of the negatives: x"):
            training_rows(self.DATA, {"q": ["x"]})


class TestRows:
    def test_flag_embedding_files(self, load, tmp_path):
        lines = [
            {"query": "one?", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [0.9], "prompt": "x"},
            {"query": "two?", "pos": ["a", "b"], "pos_ids": [1, "x"]},
            {"query": "three?", "pos": ["a"], "neg": None, "source": "own"},
        ]
        rows = load(put(tmp_path / "web.v2.jsonl.gz", *lines))
        assert rows.features == FEATURES
        assert rows["neg"][:] == [["b", "c"], [], []]
        assert rows["pos_ids"][:] == [[], ["1", "x"], []]
        assert rows["source"][:] == ["web.v2", "web.v2", "own"]
        assert set(load(tmp_path / "web.v2.jsonl.gz", "said")["source"]) == {"said"}

    @pytest.mark.parametrize(
        "row",
        [
            {"anchor": "q", "positive": "p", "negative": "n"},
            {"question": "q", "answer": "p", "negative": ["n"]},
            {"query": "q", "pos": "p", "neg": "n"},
            {"anchor": "q", "positive": ["p"], "negative_1": "n", "negative_2": None},
        ],
    )
    def test_other_names_of_the_columns(self, load, tmp_path, row):
        expected = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_ids": [], "neg_ids": [], "source": "it"}
        assert load(put(tmp_path / "it.jsonl", row)).to_list() == [expected]
        datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "it")
        assert load(tmp_path / "it").to_list() == [expected]

    def test_a_folder_has_a_source_for_each_file(self, load, tmp_path):
        for name in ("b.jsonl", "a.json.gz", "notes.txt"):
            put(tmp_path / "all" / name, {"query": name, "pos": ["p"]})
        assert load(tmp_path / "all")["source"][:] == ["a", "b"]
        assert load(tmp_path / "all", "one")["source"][:] == ["one", "one"]

    def test_saved_and_hub_data_sets_are_read_from_their_split_train(self, load, tmp_path, monkeypatch):
        parts = datasets.DatasetDict(
            {name: datasets.Dataset.from_list([{"query": name, "pos": ["p"]}]) for name in ("train", "dev")}
        )
        parts.save_to_disk(tmp_path / "saved")
        assert load(tmp_path / "saved")["query"][:] == ["train"]
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or parts)
        rows = load("hub:some/name:pair")
        assert (rows["query"][:], rows["source"][:]) == (["train"], ["some/name"])
        assert set(asked) == {("some/name", "pair")}
        del parts["train"]
        with pytest.raises(ValueError, match="hub:x: no split train; it has dev"):
            load("hub:x")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON: "),
            ("3", "a int where an object was expected"),
            ({"pos": ["a"]}, "no query (nor anchor or question); it has pos"),
            ({"query": "q", "neg": ["a"]}, "no pos (nor positive or answer); it has query, neg"),
            ({"query": 3, "pos": ["a"]}, "query is a int, not a text"),
            ({"query": None, "pos": ["a"]}, "query is a NoneType, not a text"),
            ({"query": "q", "pos": ["a", 3]}, "pos holds a int, not a text"),
            ({"query": "q", "pos": []}, "pos has no text"),
            ({"query": "q", "positive": None}, "positive has no text"),
            ({"query": "q", "pos": ["a"], "neg": [["b"]]}, "neg holds a list, not a text"),
            ({"query": "q", "pos": ["a"], "pos_ids": ["1", "2"]}, "2 pos_ids for 1 texts in pos"),
            ({"query": "q", "pos": ["a"], "neg": ["b", "c"], "neg_ids": [1]}, "1 neg_ids for 2 texts in neg"),
            ({"query": "q", "pos": ["a"], "pos_ids": [1.5]}, "pos_ids holds a float, not a text"),
            ({"query": " ", "pos": ["a"]}, "query is empty or has an empty text; peg clean removes those"),
            ({"query": "q", "pos": ["a", ""]}, "pos is empty or has an empty text"),
            ({"query": "q", "pos": ["a"], "neg": [""]}, "neg is empty or has an empty text"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, load, tmp_path, line, message):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            load(put(tmp_path / "rows.jsonl", ROW, "", line))
        assert f"rows.jsonl, line 3: {message}" in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_a_wrong_row_of_a_saved_data_set_is_named_by_its_number(self, load, tmp_path):
        datasets.Dataset.from_dict({"query": ["q", ""], "pos": ["a", "b"]}).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match="saved, row 2: query is empty"):
            load(tmp_path / "saved")

    def test_missing_or_unfit_files(self, load, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file or folder; data sets of the Hub are called hub:NAME"):
            load(tmp_path / "rows.jsonl")
        with pytest.raises(ValueError, match=r"rows.csv: not a .jsonl or .json file"):
            load(put(tmp_path / "rows.csv", "a,b"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"a folder without .jsonl or .json files"):
            load(tmp_path / "empty")
        with pytest.raises(ValueError, match=r"none.jsonl: no rows"):
            load(put(tmp_path / "none.jsonl", ""))

    def test_rows_come_one_by_one_and_may_have_empty_texts(self, tmp_path):
        rows = read_rows(put(tmp_path / "rows.jsonl", {"query": "", "pos": [""]}, "broken"))
        assert next(rows)["query"] == ""
        with pytest.raises(ValueError, match="line 2: not JSON"):
            next(rows)

    def test_only_a_changed_file_is_read_again(self, load, tmp_path, monkeypatch):
        path = put(tmp_path / "rows.jsonl", ROW)
        assert load(path).to_list() == [ROW]
        with monkeypatch.context() as patch:
            patch.setattr(module, "_objects", lambda path: pytest.fail("read again"))
            assert load(path).to_list() == [ROW]
        put(path, ROW | {"query": "two?"})  # of the same size
        os.utime(path, (0, 0))
        assert load(path)["query"][:] == ["two?"]
        put(path, ROW, ROW)
        os.utime(path, (0, 0))
        assert len(load(path)) == 2
        assert (tmp_path / "cache").is_dir()


class TestWriting:
    texts = st.lists(st.text().filter(str.strip), max_size=3)

    @given(
        st.lists(st.tuples(st.text(), st.text(), texts), max_size=4), st.sampled_from(["rows.jsonl", "rows.jsonl.gz"])
    )
    def test_what_is_written_is_read(self, tmp_path_factory, rows, name):
        path = tmp_path_factory.mktemp("written") / name
        rows = [ROW | {"query": q, "pos": [p], "neg": neg, "pos_ids": [], "neg_ids": []} for q, p, neg in rows]
        write_rows(path, rows)
        assert list(read_rows(path)) == rows
        assert path.read_bytes()[:2] == b"\x1f\x8b" or name == "rows.jsonl"

    def test_the_same_rows_give_the_same_bytes_at_any_time(self, tmp_path, monkeypatch):
        for time, name in enumerate(("a.jsonl.gz", "b.jsonl.gz")):
            monkeypatch.setattr(gzip.time, "time", lambda time=time: 1000 * time)
            write_rows(tmp_path / "new" / name, [ROW])
        assert (tmp_path / "new" / "a.jsonl.gz").read_bytes() == (tmp_path / "new" / "b.jsonl.gz").read_bytes()

    def test_an_interrupted_file_leaves_the_old_one(self, tmp_path):
        def broken():
            yield ROW
            raise KeyboardInterrupt

        write_rows(tmp_path / "rows.jsonl", [ROW, ROW])
        with pytest.raises(KeyboardInterrupt):
            write_rows(tmp_path / "rows.jsonl", broken())
        assert len(list(read_rows(tmp_path / "rows.jsonl"))) == 2
        assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
