"""sample.py: which model it takes, that a seed fixes the text, and what a bad prompt is told."""

import os
from pathlib import Path

import pytest
from conftest import one_sentence


@pytest.fixture
def sample(run, train):
    train()
    return lambda *arguments: run("sample.py", "--max_new_tokens=40", "--device=cpu", *arguments)


def test_without_arguments_it_takes_the_newest_best_and_says_which(sample, train):
    train("--out_dir=out/newer")
    os.utime("out/tiny/best.pt", (1, 1))
    result = sample()
    assert result.status == 0 and "out/newer/best.pt" in result.err
    assert len(result.out) == len("\n") + 40 + len("\n")
    os.utime("out/newer/best.pt", (0, 0))
    assert "out/tiny/best.pt" in sample().err


def test_a_trained_model_needs_no_dataset(sample):
    Path("data").rename("elsewhere")
    assert sample().status == 0


def test_the_seed_fixes_the_text(sample):
    first = sample("--seed=3", "--num_samples=3").out
    assert first == sample("--seed=3", "--num_samples=3").out != sample("--num_samples=3").out
    texts = first.split("\n----\n")
    assert len(set(texts)) == 3 and all(text.startswith("\n") for text in texts)


def test_temperature_zero_ignores_the_seed(sample):
    assert sample("--temperature=0", "--seed=1").out == sample("--temperature=0", "--seed=2").out
    assert sample("--temperature=0").out == sample("--top_k=1").out


def test_a_prompt_may_come_from_a_file_and_be_longer_than_the_context(sample):
    Path("prompt.txt").write_text("From fairest creatures we desire")
    assert sample("--start=FILE:prompt.txt").out.startswith("From fairest creatures we desire")


def test_a_config_file_of_the_run_serves_both_scripts(run, train, workdir):
    Path("x.py").write_text('out_dir = "out/x"\nstart = "From"\nmax_iters = 3\ntop_k = 2\n')
    train("x.py", "--out_dir=out/x")
    assert run("sample.py", "x.py", "--device=cpu").out.startswith("From")


@pytest.mark.parametrize("arguments, status, words", [
    (["--start=é"], 2, ["'é' (U+00E9, character 1 of the text)", "--tokenizer=byte"]),
    (["--start=FILE:empty.txt"], 2, ["--start is empty"]),
    (["--start=FILE:nope.txt"], 2, ["nope.txt: no such file"]),
    (["--start=FILE:latin.txt"], 2, ["latin.txt is not UTF-8 at byte 0"]),
    (["--temperature=-1"], 2, ["--temperature must not be negative"]),
    (["--num_samples=0"], 2, ["--num_samples must be at least 1"]),
    (["--out_dir=out/nope"], 1, ["out/nope/best.pt: no such checkpoint"]),
])
def test_a_bad_prompt_or_setting_is_told_what_to_do(sample, arguments, status, words):
    Path("latin.txt").write_bytes(b"\xe9")
    Path("empty.txt").write_bytes(b"")
    one_sentence(sample(*arguments), status, *words)


def test_before_any_training_it_says_what_to_do(run):
    one_sentence(run("sample.py"), 1, "no best.pt under out/")
