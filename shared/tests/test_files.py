import json
from pathlib import Path

import pytest
from papercore.lab.files import write_json, write_text


def test_text_is_written_whole_and_folders_are_made(tmp_path):
    path = write_text(tmp_path / "a" / "b" / "t.txt", "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["t.txt"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "t.txt", "old")

    def interrupted(self, text, encoding):
        with self.open("w") as stream:
            stream.write(text[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new text")
    assert path.read_text() == "old"


def test_json_is_indented_and_words_what_it_does_not_know(tmp_path):
    path = write_json(str(tmp_path / "v.json"), {"folder": Path("a"), "values": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"folder": "a", "values": [1, 2.5, None]}
    assert path.read_text().startswith('{\n  "folder"')
    assert path.read_text().endswith("}\n")
