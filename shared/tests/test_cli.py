import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

import pytest
from papercore.lab.cli import App, flag, parse
from transformers import TrainingArguments


@dataclass
class Options:
    """Flags of every kind."""

    name: str = flag("a name")
    width: int = flag("in metres, 100 % of it", 3)
    share: float | None = flag("0 to 1", None)
    sizes: list[int] = flag("one for each", [1, 2])
    loud: bool = flag("or not", False)
    nested: list | str | None = flag("JSON", None)
    only: list[str] | None = flag("names", None)


@dataclass
class Engine(TrainingArguments):
    strength: float = flag("of the loss", 0.5)
    learning_rate: float = flag("the paper's", 0.25)
    output_dir: str | None = flag("folder", None)


@dataclass
class Files:
    table: str = flag("a file", positional=True)
    rest: list[str] = flag("more files", [], positional=True)
    depth: int = flag("how deep", 1)


@dataclass
class Optional:
    where: str = flag("a folder", "here", positional=True)


def verb(options: Options) -> None:
    if options.name == "bug":
        raise KeyError("a bug")
    if options.name == "bad":
        raise ValueError("data.csv, row 3:\n  no number")
    if options.name == "gone":
        raise FileNotFoundError("data.csv: no such file")
    if options.name == "stop":
        raise KeyboardInterrupt
    print(f"{options.name} {options.width}")


def train(options: Options, engine: Engine) -> None:
    print(f"{options.width} {engine.strength}")


def read(files: Files) -> None: ...


def look(options: Optional) -> None: ...


def plain() -> None:
    print("plain")


@pytest.fixture
def app():
    app = App("papercore", help="a test")
    for function in (verb, train, read, look, plain):
        app.command(function.__name__, f"{__name__}:{function.__name__}", help=f"does {function.__name__}")
    return app


class TestFlags:
    def test_are_the_fields_of_the_dataclass(self):
        words = ["--name", "a", "--width", "5", "--share", "0.25", "--loud", "true", "--nested", "[1]"]
        (options,) = parse(verb, [*words, "--sizes", "7", "8", "9"])
        assert options == Options("a", 5, 0.25, [7, 8, 9], True, "[1]")

    def test_have_the_defaults_of_the_dataclass(self):
        (options,) = parse(verb, ["--name", "a"])
        assert options == Options("a")
        assert options.sizes == [1, 2]

    def test_the_word_none_unsets_an_optional_flag(self):
        assert parse(verb, ["--name", "a", "--share", "none", "--nested", "none", "--only", "none"]) == [Options("a")]
        assert parse(verb, ["--name", "none"]) == [Options("none")]

    def test_defaults_are_not_shared_between_objects(self):
        Options("a").sizes.append(3)
        assert Options("b").sizes == [1, 2]

    def test_several_dataclasses_are_filled_from_one_line(self, tmp_path):
        options, engine = parse(
            train, ["--strength", "2", "--name", "a", "--output_dir", str(tmp_path), "--weight_decay", "0.5"]
        )
        assert options.name == "a"
        assert engine.strength == 2
        assert engine.learning_rate == 0.25
        assert engine.weight_decay == 0.5

    def test_a_dataclass_can_be_parsed_twice(self):
        for _ in range(2):
            (files,) = parse(read, ["a.csv", "--depth", "2"])
            assert files == Files("a.csv", [], 2)

    def test_positional_fields_take_the_words_without_a_flag(self):
        assert parse(read, ["a.csv", "b.csv", "c.csv", "--depth", "4"]) == [Files("a.csv", ["b.csv", "c.csv"], 4)]
        assert parse(look, []) == [Optional("here")]
        assert parse(look, ["there"]) == [Optional("there")]
        with pytest.raises(ValueError, match="the following arguments are required: table"):
            parse(read, [], "tool read")

    def test_a_required_flag_is_asked_for(self):
        with pytest.raises(ValueError, match=r"the following arguments are required: --name \(see tool verb --help\)"):
            parse(verb, [], "tool verb")

    def test_an_unknown_flag_is_told_with_the_nearest(self):
        with pytest.raises(ValueError, match=r"no flag '--widht'; did you mean '--width'\? \(see tool verb --help\)"):
            parse(verb, ["--name", "a", "--widht", "3"], "tool verb")
        with pytest.raises(ValueError, match=r"no flag '--zzz' \(see"):
            parse(verb, ["--name", "a", "--zzz", "3"], "tool verb")

    def test_flags_are_not_abbreviated(self):
        with pytest.raises(ValueError, match="no flag '--wid'; did you mean '--width'"):
            parse(verb, ["--name", "a", "--wid", "3"])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--width three", "--width: invalid int value: 'three'"),
            ("--share half", "--share: invalid float value: 'half'"),
            ("--sizes 1 x", "--sizes: invalid int value: 'x'"),
            ("--loud perhaps", "--loud: .*perhaps"),
            ("--width", "--width: expected one argument"),
            ("stray", "no flag 'stray'"),
        ],
    )
    def test_a_value_of_the_wrong_type_names_its_flag(self, words, message):
        with pytest.raises(ValueError, match=message):
            parse(verb, ["--name", "a", *words.split()])


class TestConfig:
    @pytest.fixture
    def write(self, tmp_path):
        def write(text):
            path = tmp_path / "c.yaml"
            path.write_text(text)
            return str(path)

        return write

    def test_a_file_gives_flags(self, write):
        path = write("name: from file\nwidth: 7\nshare: 2.5e-1\nsizes: [4, 5]\nloud: true\n")
        assert parse(verb, ["--config", path]) == [Options("from file", 7, 0.25, [4, 5], True)]
        assert parse(verb, [f"--config={path}"]) == [Options("from file", 7, 0.25, [4, 5], True)]

    def test_flags_override_the_file_wherever_they_stand(self, write):
        path = write("name: from file\nwidth: 7\nsizes: [4, 5]\n")
        expected = [Options("given", 7, sizes=[9])]
        assert parse(verb, ["--name", "given", "--sizes", "9", "--config", path]) == expected
        assert parse(verb, [f"--config={path}", "--name", "given", "--sizes", "9"]) == expected

    def test_nested_lists_and_mappings_become_json(self, write):
        (options,) = parse(verb, ["--config", write('name: a\nnested: [{filters: [3, 4], fusion: "early"}, {}]\n')])
        assert options.nested == '[{"filters": [3, 4], "fusion": "early"}, {}]'

    def test_null_is_none_where_there_may_be_none(self, write):
        assert parse(verb, ["--config", write("name: a\nshare: null\nnested:\nonly: null\n")]) == [Options("a")]
        with pytest.raises(ValueError, match="--width: invalid int value: 'none'"):
            parse(verb, ["--config", write("name: a\nwidth: null\n")])

    def test_negative_numbers_and_words_with_dashes_are_values(self, write):
        (options,) = parse(verb, ["--config", write("name: --width\nshare: -0.5\nsizes: [-1, 2]\n")])
        assert options == Options("--width", share=-0.5, sizes=[-1, 2])

    def test_an_empty_file_gives_nothing(self, write):
        assert parse(verb, ["--name", "a", "--config", write("")]) == [Options("a")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("name: a\nwidht: 3\n", "c.yaml: no flag 'widht'; did you mean 'width'"),
            ("name: a\n7: 3\n", "c.yaml: no flag 7"),
            ("name: a\nwidth: three\n", "--width: invalid int value: 'three'"),
            ("name: a\nwidth: [1, 2]\n", "no flag '2'|--width"),
            ("- name\n- a\n", "c.yaml: expected 'flag: value' lines, found a list"),
            ("name: [a\n", "c.yaml: not readable as YAML"),
        ],
    )
    def test_what_is_wrong_in_a_file_is_named(self, write, text, message):
        with pytest.raises(ValueError, match=message):
            parse(verb, ["--config", write(text)])

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
            parse(verb, ["--name", "a", "--config", str(tmp_path / "none.yaml")])

    def test_config_without_a_file_is_refused(self):
        with pytest.raises(ValueError, match="--config: expected one argument"):
            parse(verb, ["--name", "a", "--config"])


class TestHelp:
    def help(self, function, capsys, flag="--help"):
        with pytest.raises(SystemExit) as exit:
            parse(function, [flag], f"tool {function.__name__}", "does something")
        assert exit.value.code == 0
        return capsys.readouterr().out

    def test_shows_each_flag_with_its_type_help_and_default(self, capsys):
        text = " ".join(self.help(verb, capsys).split())
        assert "usage: tool verb [--flag value ...]" in text
        assert "--name str a name" in text
        assert "--width int in metres, 100 % of it [3]" in text
        assert "--share float 0 to 1" in text
        assert "--sizes int ... one for each [1 2]" in text
        assert "--loud true|false or not [False]" in text

    def test_shows_positional_words_in_the_usage(self, capsys):
        assert "usage: tool read table rest [--flag value ...]" in self.help(read, capsys)

    def test_hides_the_engines_other_flags(self, capsys):
        text = self.help(train, capsys)
        for shown in ("--strength", "--learning_rate", "--num_train_epochs", "--bf16", "--seed", "--name"):
            assert shown in text
        for hidden in ("--adam_beta1", "--fsdp", "--hub_token"):
            assert hidden not in text

    def test_help_all_shows_them(self, capsys):
        self.help(train, capsys)  # hiding is not for good
        text = self.help(train, capsys, "--help_all")
        for shown in ("--strength", "--learning_rate", "--adam_beta1", "--fsdp", "--hub_token"):
            assert shown in text


class TestApp:
    def test_runs_a_verb(self, app, capsys):
        assert app(["verb", "--name", "a", "--width", "4"]) == 0
        assert app(["plain"]) == 0
        assert capsys.readouterr().out == "a 4\nplain\n"

    @pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
    def test_lists_its_verbs(self, app, capsys, argv):
        assert app(argv) == 0
        out = capsys.readouterr().out
        assert out.startswith("papercore: a test\n")
        for name in ("verb", "train", "read", "plain"):
            assert f"  {name} " in out
            assert f"does {name}" in out

    def test_tells_its_version(self, app, capsys):
        assert app(["--version"]) == 0
        assert capsys.readouterr().out == f"papercore {version('papercore')}\n"

    def test_takes_its_words_from_the_command_line(self, app, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["papercore", "plain"])
        assert app() == 0
        assert capsys.readouterr().out == "plain\n"

    @pytest.mark.parametrize(
        ("argv", "line"),
        [
            (["vreb"], "papercore: no verb 'vreb'; did you mean 'verb'?; the verbs are verb, train, read, look, plain"),
            (["verb", "--name", "bad"], "papercore: data.csv, row 3: no number"),
            (["verb", "--name", "gone"], "papercore: data.csv: no such file"),
            (
                ["verb", "--nmae", "a"],
                "papercore: the following arguments are required: --name (see papercore verb --help)",
            ),
            (["plain", "extra"], "papercore: no flag 'extra' (see papercore plain --help)"),
        ],
    )
    def test_wrong_input_is_one_line_and_exit_code_2(self, app, capsys, argv, line):
        assert app(argv) == 2
        captured = capsys.readouterr()
        assert captured.err == f"{line}\n"
        assert captured.out == ""

    @pytest.mark.parametrize("argv", [["--debug", "verb", "--name", "bad"], ["verb", "--name", "bad", "--debug"]])
    def test_debug_shows_the_traceback(self, app, capsys, argv):
        assert app(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert "ValueError: data.csv, row 3" in err

    def test_interruption_is_exit_code_130(self, app, capsys):
        assert app(["verb", "--name", "stop"]) == 130
        assert capsys.readouterr().err == "papercore: interrupted; the same command goes on from what is saved\n"

    def test_a_bug_is_not_taken_for_wrong_input(self, app):
        with pytest.raises(KeyError):
            app(["verb", "--name", "bug"])


@pytest.mark.parametrize("module", ["papercore.lab.__main__", "eclstm.cli"])
def test_help_imports_neither_torch_nor_transformers(module):
    program = (
        f"import sys; from {module} import app; assert app(['--help']) == 0; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'scipy', 'matplotlib', 'optuna') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "reproduce" in out
