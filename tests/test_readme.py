"""Every command in README.md and every config is one that works."""

import ast
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

import model
import train
from model import GPT, GPTConfig

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted({line.split(" #")[0].strip() for block in BLOCKS
                   for line in block.splitlines() if re.search("python |torchrun ", line)})
CONFIGS = sorted(path.name for path in (REPO / "config").glob("[!_]*.py"))
VOCABULARY = {"shakespeare_char": 65, "shakespeare_gpt2": 50257, "grammar_bpe": 1207,
              "tinystories_char": 91, "tinystories_gpt2": 50257,
              "tinystories_published": 50257, "tinystories_slice_gpt2": 50257,
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
    ci = (REPO / ".ci/run").read_text().splitlines()
    start = [line.split(" #")[0].strip() for line in BLOCKS[0].splitlines()]
    assert len(start) == 4 and set(start) < set(ci)
    tests, = [command for command in COMMANDS if "pytest -q" in command]
    assert tests in ci


def test_the_words_of_the_readme_are_places_in_the_code():
    rows = re.findall(r"^\| .+ \| .+ \| `([\w.]+)`(?:: (.+))? \|$", README.partition("</details>")[0],
                      re.MULTILINE)
    assert len(rows) == 22
    modules = {"model": model, "train": train}
    for place, names in rows:
        first, _, rest = place.partition(".")
        found = modules.get(first) or getattr(model, first)
        found = getattr(found, rest) if rest else found
        for name in filter(None, names.split(", ")):
            assert re.search(rf"\b{name}\b", inspect.getsource(found)), (place, name)


def test_the_readme_is_short_and_says_where_the_network_ends_and_how_many_lines_there_are():
    seen = re.sub("<details>.*?</details>", "", README, flags=re.DOTALL)  # the rest is folded
    assert len(seen.splitlines()) <= 265
    assert max(map(len, "".join(re.findall("```.*?```", README, re.DOTALL)).splitlines())) <= 100
    tree = ast.parse((REPO / "model.py").read_text())
    gpt = next(node for node in tree.body if getattr(node, "name", "") == "GPT")
    assert f"`model.py`, lines 1 to {gpt.end_lineno}: the network" in README
    scripts = [*REPO.glob("*.py"), REPO / "config/__init__.py"]
    total = sum(len(path.read_text().splitlines()) for path in scripts)
    assert f"about {50 * round(total / 50):,} lines in all" in README and len(scripts) == 6


# ---- the recipes, each applied to a copy ----

@pytest.fixture
def copy(run, workdir, monkeypatch):
    """copy("train.py", "--max_iters=2") -> its result, run in a copy of the scripts, here, with the
    copy's own modules."""
    for path in REPO.glob("*.py"):
        shutil.copy(path, workdir)
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.delitem(sys.modules, "config")
    shutil.copytree(REPO / "config", workdir / "config")
    monkeypatch.syspath_prepend(workdir)

    def copy(script, *arguments):
        result = run(workdir / script, *arguments)
        assert result.status == 0, result
        return result.out
    return copy


STEPS = ("--max_iters=2 --eval_iters=1 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 "
         "--block_size=16 --document_rows=False --device=cpu --plot=False").split()
SAME_WITH_A_CACHE = """
import torch
from model import GPT, FixedCache, GPTConfig, KVCache
torch.manual_seed(0)
model = GPT(GPTConfig(16, 65, 2, 2, 16, positions="rotary")).eval()
for block in model.h:
    torch.nn.init.normal_(block.attn.c_attn.weight)
ids, cache = torch.randint(65, (3, 16)), KVCache(model.config, 3, model.wte.weight)
with torch.no_grad():
    one_by_one = [model.hidden(ids[:, t:t + 1], cache) for t in range(16)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), model.hidden(ids))
    fixed = FixedCache(KVCache(model.config, 3, model.wte.weight))  # of a CUDA graph
    one_by_one = [model.hidden(ids[:, t:t + 1], fixed.at(torch.tensor([t]))) for t in range(16)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), model.hidden(ids))
    moved = model.hidden(ids.roll(1, dims=1))  # the same neighbours, one place on
assert (moved[:, 2] - model.hidden(ids)[:, 1]).abs().max() > 1e-3
q, k = torch.randn(2, 1, 1, 1, 8)
from model import rotate
apart = [(rotate(q, t + 3) * rotate(k, t)).sum() for t in torch.tensor([[0], [1], [40]])]
torch.testing.assert_close(apart[0], apart[1]), torch.testing.assert_close(apart[0], apart[2])
"""


def test_the_recipe_of_a_position_encoding_works_as_printed(copy):
    """The oracles are exact: a token read alone behind a cache must be what it is in the whole
    text, and a rotated query times a rotated key depends on their distance alone."""
    diff, = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    Path("change.diff").write_text(diff)
    subprocess.run(["git", "apply", "change.diff"], check=True)
    added = [line for line in diff.splitlines() if re.match(r"\+[^+]", line)]
    assert 10 < len(added) <= 20
    Path("check.py").write_text(SAME_WITH_A_CACHE)
    copy("check.py")
    copy("prepare_tinystories.py", "--source=grammar", "--max_stories=50", "--dataset=tales")
    copy("train.py", "--dataset=tales", "--positions=rotary", *STEPS)
    copy("sample.py", "--max_new_tokens=40")


def test_the_recipe_of_an_optimizer_works_as_printed(copy):
    row, = re.findall(r'`("nadam": .*)`', README)
    code = Path("train.py").read_text()
    Path("train.py").write_text(code.replace("OPTIMIZERS = {", f"OPTIMIZERS = {{\n    {row}", 1))
    copy("prepare_tinystories.py", "--source=grammar", "--max_stories=50", "--dataset=tales")
    assert "nadam on cpu" in copy("train.py", "--dataset=tales", "--optimizer=nadam", *STEPS)


def test_the_recipe_of_a_dataset_works_as_printed(copy):
    recipe, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(recipe.splitlines()) <= 10
    Path("prepare_sums.py").write_text(recipe)
    copy("prepare_sums.py")
    command = re.search(r"`python (train.py config/quickstart.py --dataset=sums.*?)`", README,
                        re.DOTALL)[1].split()
    copy(*command, *STEPS)
    assert copy("sample.py", "--start=17+25=", "--max_new_tokens=3").startswith("17+25=")


# ---- the configs ----

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
    for script in ("prepare_shakespeare.py", "prepare_tinystories.py"):  # what its name says
        kind, = re.findall(r"--tokenizer='(\w+)", run(script, f"config/{name}", "--help").out)
        assert dataset.endswith((f"_{kind}", "_published"))
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
