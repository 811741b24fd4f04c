"""The command line of quest_eval: exit codes, and errors of one sentence."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_eval import command_line


def test_the_demo_ends_with_one_sentence_and_a_status(capsys, tmp_path):
    code = command_line.main(["demo", "--text", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("quest-eval: --text ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["transformers", "rich", "matplotlib"])
def test_a_missing_package_is_named_with_what_to_install(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.console", None)
    assert command_line.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install ./eval" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["run"], ["demo", "--device", "tpu"], ["demo", "--page-size", "12"]]
)
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(arguments)
    assert error.value.code == 2
    assert "usage: quest-eval" in capsys.readouterr().err


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "quest_eval", "--help"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: quest-eval")
