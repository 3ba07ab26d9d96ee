"""Fixtures: every test works in a folder of its own, and scripts run as `python script ...` would,
but inside this process, which saves importing torch again each time."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)  # models this small are faster so, and much faster on a busy machine

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die.\n"


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train.py", "--max_iters=3") -> its exit status and what it printed."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # scripts set these, tests restore
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(status, *capsys.readouterr())
    return run


@pytest.fixture
def verse(run):
    """A small character dataset, data/verse: 3,999 characters to train on and 445 of val."""
    Path("verse.txt").write_text((VERSE * 60)[:4444])
    assert run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse").status == 0


TINY = ("--dataset=verse --out_dir=out/tiny --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 "
        "--batch_size=4 --max_iters=6 --warmup_iters=2 --eval_interval=3 --eval_iters=2 "
        "--log_interval=1 --device=cpu").split()


@pytest.fixture
def train(run, verse):
    """train("--seed=2") -> a few steps of a tiny model on data/verse, into out/tiny."""
    return lambda *arguments: run("train.py", *TINY, *arguments)


@pytest.fixture
def tiny_shakespeare():
    """The real text, where it is at hand."""
    for path in (REPO / "data/tinyshakespeare.txt", REPO / "../shared/data/tinyshakespeare.txt"):
        if path.is_file():
            return os.path.realpath(path)
    pytest.skip("python prepare_shakespeare.py downloads the text")


def one_sentence(result, status, *words):
    """A refusal: one line on stderr with these words in it, this status, no traceback."""
    assert result.status == status, result
    assert result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
    for word in words:
        assert word in result.err, result.err
