import pytest
from dsan import CTCCharset
from dsan.charset import required_frames


def test_usual_labels():
    charset = CTCCharset()
    assert len(charset) == 36
    assert charset.normalize(" Hello, World\t2! ") == "helloworld2"
    assert charset.normalize("ÀÉ½ﬁ") == "ae12fi"  # accents and compatible forms are taken apart
    assert charset.normalize("日本 --") == ""


def test_what_the_charset_has_is_kept_whole():
    charset = CTCCharset("éeÉ日")
    assert charset.normalize("É e\u0301 日x") == "Éé日"  # composed first; no lower case, as it knows upper


def test_round_trip():
    charset = CTCCharset()
    targets, lengths = charset.encode(["abba", "", "7"])
    assert lengths.tolist() == [4, 0, 1]
    assert charset.decode(targets[:4].tolist()) == "abba"
    assert targets.min() > charset.blank


@pytest.mark.parametrize(
    ("characters", "message"), [("", "is empty"), ("abca", "has 'a' twice"), ("a b", "has white space")]
)
def test_bad_charsets(characters, message):
    with pytest.raises(ValueError, match=message):
        CTCCharset(characters)


def test_foreign_character_is_named():
    with pytest.raises(ValueError, match="'a-b' has '-', which the charset lacks"):
        CTCCharset().encode(["ab", "a-b"])


def test_frames():
    assert [required_frames(w) for w in ("", "a", "aa", "bookkeeper")] == [0, 1, 3, 13]
