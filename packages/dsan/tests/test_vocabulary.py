from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import pytest
from dsan.vocabulary import Vocabulary, builtin_words, read_words


def test_words_numbers_and_codes_in_all_cases() -> None:
    vocabulary = Vocabulary(["sign", "street"])
    texts = [vocabulary.draw(Random(i)) for i in range(3000)]
    assert texts == [vocabulary.draw(Random(i)) for i in range(3000)]

    def share(keep: list[bool]) -> float:
        return sum(keep) / len(texts)

    assert share([t.lower() in ("sign", "street") for t in texts]) == pytest.approx(0.72 * 0.87, abs=0.03)
    assert share([t.isdigit() for t in texts]) == pytest.approx(0.14 * 0.87, abs=0.02)
    assert share([not t.isalnum() for t in texts]) == pytest.approx(0.13 + 0.04 * 0.87 * 0.8, abs=0.03)
    assert {"SIGN", "Sign", "sign"} <= set(texts)
    assert all(texts)


def test_short_words_come_more_often_than_a_dictionary_has_them() -> None:
    words = ["ab"] + ["x" * 8] * 64
    texts = [Vocabulary(words).draw(Random(i)).lower() for i in range(3000)]
    assert texts.count("ab") == pytest.approx(texts.count("x" * 8), rel=0.2)


def test_builtin_words_never_change() -> None:
    words = builtin_words()
    assert words == builtin_words()
    assert len(words) > 2000
    assert all(w.isascii() and w.islower() for w in words)


def test_files_of_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\nthrée\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four\nfive\n"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.gz").write_bytes(b"not packed")
    assert read_words(tmp_path / "a.txt") == ["one", "two", "thrée"]
    assert read_words(tmp_path / "b.txt.gz") == ["four", "five"]
    with pytest.raises(ValueError, match=r"empty\.txt: no words"):
        read_words(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"bad\.gz: not a text"):
        read_words(tmp_path / "bad.gz")
    with pytest.raises(ValueError, match="list of words is empty"):
        Vocabulary([])
