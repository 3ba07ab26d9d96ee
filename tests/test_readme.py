"""Every command in README.md and every config is one that works."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import REPO

from model import GPT, GPTConfig

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted({line.split("#")[0].strip() for block in BLOCKS
                   for line in block.splitlines() if re.search("python |torchrun ", line)})
CONFIGS = sorted(path.name for path in (REPO / "config").glob("[!_]*.py"))
VOCABULARY = {"shakespeare_char": 65, "shakespeare_gpt2": 50257, "grammar_bpe": 1209,
              "tinystories_char": 91, "tinystories_gpt2": 50257, "tinystories_slice_gpt2": 50257,
              "tinystories_bpe": 4096}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood(run, monkeypatch, command):
    monkeypatch.chdir(REPO)
    for part in command.split("&&"):
        before, py, after = part.partition(".py")
        if py:
            script = before.split()[-1] + py
            assert (REPO / script).is_file()
            if "/" not in script:
                assert run(script, *shlex.split(after), "--help").status == 0, part


def test_the_pictures_of_the_readme_are_there_and_small():
    pictures = re.findall(r"!\[.+\]\((.+)\)", README)
    assert len(pictures) == 2 and all((REPO / path).stat().st_size < 100_000 for path in pictures)


def test_ci_runs_the_quick_start_and_the_tests_word_for_word():
    start, tests, *_ = [block.strip() for block in BLOCKS]
    ci = (REPO / ".ci/run").read_text().splitlines()
    assert start in ci and "config/quickstart.py" in start and "--source=grammar" in start
    assert tests in ci and "pytest" in tests


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_serves_every_script_and_has_the_parameters_it_states(run, monkeypatch, name):
    monkeypatch.chdir(REPO)
    for script in ("train.py", "sample.py", "prepare_shakespeare.py", "prepare_tinystories.py"):
        assert run(script, f"config/{name}", "--help").status == 0
    values = dict(re.findall(r"--(\w+)=(\S+)", run("train.py", f"config/{name}", "--help").out))
    values = {key: eval(value) for key, value in values.items() if key in GPTConfig.__annotations__}
    stated = int(re.search(r"([\d,]+) parameters", (REPO / "config" / name).read_text())[1]
                 .replace(",", ""))
    dataset = re.search(r'dataset = "(\w+)"', (REPO / "config" / name).read_text())[1]
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=VOCABULARY[dataset], **values))
    assert model.num_params() == stated


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_takes_two_steps(run, name):
    """Of its own optimizer, schedule and options, in a narrower model on less text."""
    config = REPO / "config" / name
    Path("stories.txt").write_text("Once upon a time, there was a dog.\n<|endoftext|>\n" * 99)
    assert run("prepare_tinystories.py", config, "--source=stories.txt", "--dataset=tiny",
               "--tokenizer=byte", "--fraction=1.0").status == 0
    result = run("train.py", config, "--dataset=tiny", "--out_dir=out/tiny", "--max_iters=2",
                 "--max_epochs=0", "--batch_size=2", "--block_size=32", "--n_layer=2", "--n_inner=0",
                 "--n_head=2", "--n_embd=16", "--init_from=scratch", "--device=cpu", "--plot=False")
    assert result.status == 0 and "best val loss" in result.out
    assert run("sample.py", config, "--out_dir=out/tiny", "--max_new_tokens=3", "--init_from=resume",
               "--device=cpu").status == 0
