"""Settings: what wins, what type it keeps, and what a mistake is told."""

import runpy
import sys
from pathlib import Path

import pytest
from conftest import REPO, one_sentence

SCRIPT = '''"""A script for the test."""
import math
from config import configure

# Size
width = 64        # channels
rate = 1e-3       # per step
# Text
start = "a # b"   # the prompt
fast = True
half = width / 2
def helper(): pass
settings = configure(globals())
if __name__ == "__main__":
    print(width, rate, repr(start), fast)
'''
SIBLING = 'from config import configure\ntop_k = 5\nsettings = configure(globals())\n'


@pytest.fixture
def script(monkeypatch, capsys, workdir):
    Path("script.py").write_text(SCRIPT)
    Path("sibling.py").write_text(SIBLING)

    def script(*arguments):
        monkeypatch.setattr("sys.argv", ["script.py", *arguments])
        try:
            runpy.run_path(str(workdir / "script.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return type("Result", (), {"status": status, "out": captured.out, "err": captured.err})
    return script


def config(**lines):
    Path("x.py").write_text("\n".join(f"{name} = {value}" for name, value in lines.items()))
    return "x.py"


def test_rightmost_wins(script):
    assert script(config(width=2), "--width=3").out.startswith("3 ")
    assert script("--width=3", config(width=2)).out.startswith("2 ")


def test_text_takes_the_type_of_the_default(script):
    assert script("--start=123", "--rate=1", "--fast=FALSE").out == "64 1.0 '123' False\n"
    assert script("--start=a=b").out == "64 0.001 'a=b' True\n"
    assert script("--start=").out == "64 0.001 '' True\n"


def test_a_config_file_may_calculate_import_and_set_other_scripts_names(script):
    Path("x.py").write_text("import math\n_half = 8\nwidth = 2 * _half\nrate = 1\ntop_k = 3\n")
    assert script("x.py").out == "16 1.0 'a # b' True\n"


@pytest.mark.parametrize("arguments, words", [
    (["--widths=3"], ["--widths is not a setting of script.py", "did you mean width?"]),
    (["--zzz=3"], ["--zzz is not a setting", "--help"]),
    (["--top_k=3"], ["--top_k is not a setting of script.py"]),
    (["--math=3"], ["--math is not a setting"]),
    (["--helper=3"], ["--helper is not a setting"]),
    (["--half=3"], ["--half is not a setting"]),
    (["--width=3.5"], ["--width must be of type int, like 64, not '3.5'"]),
    (["--rate=fast"], ["--rate must be of type float, like 0.001, not 'fast'"]),
    (["--rate=nan"], ["--rate must be of type float"]),
    (["--fast=1"], ["--fast must be of type bool, like True, not '1'"]),
    (["--width", "3"], ["--width is not understood", "--name=value"]),
    (["width=3"], ["settings are written --name=value"]),
    (["nope.py"], ["nope.py: no such config file"]),
])
def test_a_mistake_is_named_with_its_remedy(script, arguments, words):
    one_sentence(script(*arguments), 2, *words)


@pytest.mark.parametrize("text, words", [
    ("widht = 3", ["x.py: widht is not a setting of any script, did you mean width?"]),
    ("width = 3.5", ["x.py: width must be of type int, like 64, not 3.5"]),
    ("width = True", ["x.py: width must be of type int"]),
    ("top_k = 'many'", ["x.py: top_k must be of type int, like 5, not 'many'"]),
    ("width = ", ["x.py cannot be read", "SyntaxError", "line 1"]),
    ("width = 1 / 0", ["x.py cannot be read", "ZeroDivisionError"]),
    ("exit()", ["x.py cannot be read", "SystemExit"]),
    ("width = 3\0", ["x.py cannot be read"]),
])
def test_a_mistake_in_a_config_file_is_named(script, text, words):
    Path("x.py").write_text(text)
    one_sentence(script("x.py"), 2, *words)


def test_help_shows_sections_comments_and_the_values_in_force(script):
    out = script(config(width=7), "--help").out
    assert out.startswith("A script for the test.\n\nSize\n")
    assert "--width=7" in out and "channels" in out and "Text" in out and "--start='a # b'" in out
    assert "math" not in out and "half" not in out


def test_an_imported_script_keeps_its_defaults_and_does_nothing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--width=3", "nope.py"])
    Path("script.py").write_text(SCRIPT)
    names = runpy.run_path(str(Path("script.py").absolute()), run_name="script")
    assert names["width"] == 64 and names["settings"]["rate"] == 1e-3


def test_an_interrupt_leaves_without_a_traceback_and_a_bug_with_one(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    script()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert "a bug" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(path.name for path in REPO.glob("*.py")
                                          if path.name != "model.py"))
def test_every_setting_of_every_script_is_in_its_help(run, script):
    result = run(script, "--help")
    settings = runpy.run_path(str(REPO / script), run_name="imported")["settings"]
    assert result.status == 0 and len(settings) > 4
    for name, value in settings.items():
        assert f"  --{name}={value!r}" in result.out
