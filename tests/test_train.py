"""Training: batches, evaluation, optimizers, schedule, checkpoints, and what stops a run."""

import copy
import csv
import gzip
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, VERSE, Replayed, one_sentence

import model
import train as script
from model import GPT, CharTokenizer, Dropout, GPTConfig, load_checkpoint, save_checkpoint


@pytest.fixture
def small(monkeypatch):
    """train.py's functions with small sizes in its settings."""
    for name, value in dict(block_size=8, batch_size=4, gradient_accumulation_steps=2).items():
        monkeypatch.setattr(script, name, value)
    script.epoch_order.cache_clear()
    yield script
    script.epoch_order.cache_clear()


def weights(name="last.pt", run="out/tiny"):
    return load_checkpoint(f"{run}/{name}")["model"].state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def metrics(run="out/tiny", name="metrics.csv"):
    with open(f"{run}/{name}", newline="") as file:
        return list(csv.DictReader(file))


# ---- batches ----

def test_each_token_is_a_target_once_an_epoch(small):
    rows = small.Windows(np.arange(1000, dtype=np.uint16))
    phases = set()
    for epoch in range(3):
        phase, order = small.epoch_order(rows, epoch)
        x, y = small.read_rows(rows, [rows.span(int(row), phase) for row in order], "cpu")
        targets = y.flatten().sort().values
        assert len(order) == rows.number and (targets.diff() == 1).all()
        assert torch.equal(x + 1, y) and len(rows.tokens) - len(targets) < 2 * 8
        phases.add(phase)
    assert len(phases) > 1


@pytest.mark.parametrize("n_tokens", [9, 10, 15, 16, 17, 24, 25])
def test_windows_fit_into_the_shortest_datasets(small, n_tokens):
    rows = small.Windows(np.arange(n_tokens))
    for epoch in range(20):
        phase, order = small.epoch_order(rows, epoch)
        assert len(order) >= 1 and phase + 8 * order.max() + 9 <= n_tokens


def batch(script, rows, step, micro):
    return script.read_rows(rows, script.row_spans(rows, step, micro), "cpu")


def test_a_batch_follows_from_its_step_alone(small):
    rows = small.Windows(np.arange(200, dtype=np.uint16))
    x, y = batch(small, rows, 5, 1)
    for step in range(4):
        batch(small, rows, step, 0)
    again, _ = batch(small, rows, 5, 1)
    assert torch.equal(x, again) and torch.equal(x + 1, y) and x.shape == (4, 8)


def test_micro_steps_are_the_parts_of_one_larger_batch(small, monkeypatch):
    rows = small.Windows(np.arange(200, dtype=np.uint16))
    parts = torch.cat([batch(small, rows, 3, micro)[0] for micro in range(2)])
    monkeypatch.setattr(small, "batch_size", 8)
    monkeypatch.setattr(small, "gradient_accumulation_steps", 1)
    assert torch.equal(parts, batch(small, rows, 3, 0)[0])


EOT = 9
FLAT = np.array([9, 1, 2, 3, 9, 4, 9, *range(10, 22), 9, 5, 6, 9], dtype=np.uint16)  # 4 documents


def test_a_document_is_rows_from_the_eot_before_it_the_last_padded(small):
    rows = small.Documents(FLAT, EOT)
    assert (rows.documents, rows.number) == (4, 5)
    x, y = small.read_rows(rows, [rows.span(row) for row in range(5)], "cpu")
    assert y.tolist() == [[1, 2, 3, 9, -1, -1, -1, -1], [4, 9, -1, -1, -1, -1, -1, -1],
                          [*range(10, 18)], [*range(18, 22), 9, -1, -1, -1],
                          [5, 6, 9, -1, -1, -1, -1, -1]]
    assert x[:, 0].tolist() == [9, 9, 9, 17, 9] and x.min() >= 0
    assert torch.equal(x[:, 1:][y[:, :-1] >= 0], y[:, :-1][y[:, :-1] >= 0])


@pytest.mark.parametrize("tokens", [[9, 9, 1, 9, 9, 2, 3], [1, 2, 9], [9, 1], [1, 9] * 40,
                                    [*range(10, 27)], [*range(10, 26), 9]])
def test_each_token_but_the_first_is_a_target_once_in_whatever_documents(small, tokens):
    tokens = np.array(tokens, dtype=np.uint16)
    rows = small.Documents(tokens, EOT)
    y = small.read_rows(rows, [rows.span(row) for row in range(rows.number)], "cpu")[1]
    assert y[y >= 0].tolist() == tokens[1:].tolist() and (y[:, 0] >= 0).all()


def test_each_row_of_the_documents_is_read_once_an_epoch(small, monkeypatch):
    monkeypatch.setattr(small, "batch_size", 5)
    rows = small.Documents(FLAT, EOT)
    for epoch in range(3):
        _, y = batch(small, rows, epoch // 2, epoch % 2)
        assert sorted(y[:, 0].tolist()) == [1, 4, 5, 10, 18]


def test_padding_counts_neither_in_loss_nor_in_accuracy(small):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 2, 2, 16)).eval()
    loss, correct, counted = 0.0, 0, 0
    for document in ([9, 1, 2, 3, 9], [9, 4, 9], [9, *range(10, 18)], [*range(17, 22), 9],
                     [9, 5, 6, 9]):
        logits = model(torch.tensor([document[:-1]]))[0][0].double().log_softmax(dim=-1)
        for t, token in enumerate(document[1:]):
            loss -= logits[t, token].item()
            correct += logits[t].argmax().item() == token
            counted += 1
    rows = small.Documents(FLAT, EOT)
    found = small.evaluate(model, rows)
    assert found == pytest.approx((loss / counted, correct / counted), abs=1e-6)
    sums = small.evaluate_positions(model, rows).sum(dim=1).tolist()
    assert sums == pytest.approx([loss, correct, counted], abs=1e-5)


def test_random_seeds_differ_in_purpose_and_step_only():
    assert script.random_seed("a", 1) == script.random_seed("a", 1)
    seeds = {script.random_seed(p, s, m) for p in "ab" for s in range(9) for m in range(9)}
    assert len(seeds) == 2 * 9 * 9


# ---- evaluation ----

def test_evaluation_is_the_token_by_token_sum(small):
    """The oracle is the definition: one token at a time, in float64, -log p of the token that came.
    A batched evaluation that skips, repeats or shifts a token gets another sum."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 2, 2, 16)).eval()
    tokens = torch.randint(50, (100,)).numpy().astype(np.uint16)
    sums = torch.zeros(3, 8, dtype=torch.float64)
    in_float64 = copy.deepcopy(model).double()
    for t in range(1, 100):
        first, position = (t - 1) // 8 * 8, (t - 1) % 8
        logits = in_float64(torch.tensor([tokens[first:t].tolist()]))[0][0, -1]
        nats = -logits.log_softmax(dim=-1)[tokens[t]].item()
        sums[:, position] += torch.tensor([nats, logits.argmax().item() == tokens[t], 1])
    rows = small.Documents(tokens, -1)
    expected = (sums[0].sum().item() / 99, sums[1].sum().item() / 99)
    assert small.evaluate(model, rows) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(small.evaluate_positions(model, rows), sums, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_does_not_depend_on_the_batch_size(small, monkeypatch, batch_size):
    model = GPT(GPTConfig(8, 50, 1, 1, 8)).eval()
    rows = small.Documents(np.arange(90, dtype=np.uint16) % 50, -1)
    expected = small.evaluate(model, rows)
    monkeypatch.setattr(small, "batch_size", batch_size)
    assert small.evaluate(model, rows) == pytest.approx(expected, abs=1e-6)


def test_a_capped_evaluation_is_spread_over_the_split(small):
    seen = []

    def model(x, y):
        seen.extend(x[:, 0].tolist())
        return torch.zeros(*x.shape, 50), torch.tensor(1.0)

    small.evaluate(model, small.Documents(np.arange(801, dtype=np.uint16), -1), max_batches=1)
    assert seen == [0, 264, 528, 792]


def test_bits_per_character_and_byte():
    counts = {"tokens": 50, "characters": 200, "bytes": 400}
    assert script.bits_per("characters", math.log(16), counts) == pytest.approx(1.0)
    assert script.bits_per("bytes", math.log(16), counts) == pytest.approx(0.5)


def test_eval_only_reports_every_split_of_the_best_checkpoint(run, verse):
    run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse", "--test_fraction=0.1")
    exact = (*TINY, "--eval_iters=0")
    run("train.py", *exact)
    out = run("train.py", *exact, "--init_from=resume", "--eval_only=True").out
    table = {row[0]: row for row in map(str.split, out.splitlines()) if len(row) == 7}
    assert list(table) == ["split", "train", "val", "test"]
    best = load_checkpoint("out/tiny/best.pt")["progress"]["best_loss"]
    assert float(table["val"][2]) == pytest.approx(best, abs=1e-4)
    for split in ("train", "val", "test"):
        _, _, loss, perplexity, bits, bits_of_a_byte, accuracy = table[split]
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)
        assert float(bits) == pytest.approx(float(loss) / math.log(2), rel=1e-3)
        assert bits_of_a_byte == bits  # all characters are ASCII
        assert 0 < float(accuracy[:-1]) < 100
    positions = {row[0]: list(map(float, row[1:])) for row in map(
        str.split, out.partition("position")[2].splitlines()[1:])}
    assert list(positions) == ["1", "2", "3-4", "5-8", "9-16"]
    number = {"1": 1, "2": 1, "3-4": 2, "5-8": 4, "9-16": 8}
    mean = sum(number[at] * losses[0] for at, losses in positions.items()) / 16
    assert mean == pytest.approx(float(table["train"][2]), abs=2e-4)  # 249 rows, all of them whole


def test_eval_only_draws_the_loss_by_position(run, verse):
    pytest.importorskip("matplotlib")
    run("train.py", *TINY)
    assert not Path("out/tiny/loss_by_position.png").exists()
    run("train.py", *TINY, "--init_from=resume", "--eval_only=True", "--plot=True")
    assert Path("out/tiny/loss_by_position.png").read_bytes()[:4] == b"\x89PNG"


def test_progress_is_for_terminals_only(small, monkeypatch, capsys):
    model, rows = GPT(GPTConfig(8, 50, 1, 1, 8)), small.Documents(np.arange(9000) % 50, -1)
    small.evaluate(model, rows)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    small.evaluate(model, rows)
    err = capsys.readouterr().err
    assert "\revaluating, row 0 of 1,125" in err and err.endswith("\r" + " " * 79 + "\r")


def test_the_last_lines_say_perplexity_accuracy_and_the_gap(train):
    """As the table of eval_only has them, which adds up tokens by position."""
    out = train("--eval_iters=0").out
    loss, perplexity, train_loss, gap, accuracy = re.search(
        r"best val loss (\S+) at step 6: perplexity (\S+), .+ in out/tiny/best.pt\n"
        r"train loss (\S+) there, a gap of (\S+); (\S+) of val's tokens", out).groups()
    table = train("--eval_iters=0", "--init_from=resume", "--eval_only=True").out
    val = next(line.split() for line in table.splitlines() if line.startswith("    val"))
    assert (loss, perplexity, accuracy) == (val[2], val[3], f"{float(val[6][:-1]):.1f}%")
    assert float(loss) - float(train_loss) == pytest.approx(float(gap), abs=1.1e-4)
    for row in metrics():
        if row["val"]:
            assert float(row["ppl"]) == pytest.approx(math.exp(float(row["val"])), rel=1e-4)


def test_a_loss_beyond_all_perplexity_is_no_error():
    assert script.perplexity(1.0) == math.e and script.perplexity(1000.0) == math.inf
    assert math.isnan(script.perplexity(math.nan))


def test_a_run_from_before_accuracy_was_kept_goes_on(train):
    pytest.importorskip("matplotlib")
    options = ["--lr_decay_iters=6", "--log_grad_norms=True", "--plot=True"]
    train(*options, "--max_iters=3")
    for name in ("best.pt", "last.pt"):
        saved = torch.load(f"out/tiny/{name}", weights_only=True)
        del saved["progress"]["best_train"], saved["progress"]["best_accuracy"]
        saved["progress"]["best_loss"] = 0.1  # never reached again
        torch.save(saved, f"out/tiny/{name}")
    path = Path("out/tiny/grad_norms.csv")
    rows = path.read_text().splitlines()
    path.write_text("".join(row.rsplit(",", 5)[0] + "\n" for row in rows))
    done = train(*options, "--init_from=resume")
    assert done.status == 0 and "nan" not in done.out
    assert list(metrics(name="grad_norms.csv")[5]) == ["step", *LAYERS]
    assert train(*options, "--init_from=resume", "--eval_only=True").status == 0


def test_where_nothing_moves_there_is_no_map_but_a_picture(train):
    pytest.importorskip("matplotlib")
    assert train("--plot=True", "--log_grad_norms=True", "--learning_rate=0", "--min_lr=0",
                 "--max_iters=2").status == 0
    assert Path("out/tiny/loss.png").exists()


def test_a_run_goes_on_with_the_columns_of_a_table_that_has_fewer(train):
    pytest.importorskip("matplotlib")
    train("--max_iters=3", "--lr_decay_iters=6")
    path = Path("out/tiny/metrics.csv")
    rows = [row.split(",") for row in path.read_text().splitlines()]
    at = rows[0].index("ppl")
    path.write_text("".join(",".join(row[:at] + row[at + 1:]) + "\n" for row in rows))
    train("--init_from=resume", "--lr_decay_iters=6", "--plot=True")
    assert [row["step"] for row in metrics()] == list("0123456") and "ppl" not in metrics()[0]
    assert float(metrics()[6]["val"]) > 0 and Path("out/tiny/loss.png").exists()


def test_a_table_without_its_head_is_told(train):
    train("--max_iters=3", "--lr_decay_iters=6")
    path = Path("out/tiny/metrics.csv")
    rows = path.read_text().splitlines(keepends=True)[1:]
    path.write_text("".join(rows))
    one_sentence(train("--init_from=resume", "--lr_decay_iters=6"), 1, "out/tiny/metrics.csv")
    assert path.read_text() == "".join(rows)


# ---- what counts alone can do ----

def counted_by_hand(train, val, V):
    singles, firsts = Counter(train), Counter(train[:-1])
    pairs = Counter(zip(train, train[1:]))
    steps = list(zip(val, val[1:]))
    unigram = [(singles[b] + 1) / (len(train) + V) for a, b in steps]
    bigram = [(pairs[a, b] + 1) / (firsts[a] + V) for a, b in steps]
    return {"uniform": math.log(V), "unigram": -math.fsum(map(math.log, unigram)) / len(steps),
            "bigram": -math.fsum(map(math.log, bigram)) / len(steps)}


@pytest.mark.parametrize("V, dtype", [(2, np.uint16), (65, np.uint16), (4096, np.uint16),
                                      (50_257, np.uint16), (65_536, np.uint16),
                                      (100_000, np.uint32)])
def test_the_loss_of_counts_is_that_of_a_count_by_hand(V, dtype):
    """Some pairs of val never stand in train, and the last token of train follows one alone."""
    rng = np.random.default_rng(V)
    train, val = (np.minimum(rng.zipf(1.3, size) - 1, V - 1).astype(dtype)
                  for size in (20_000, 3_000))
    train[-1] = val[7] = V - 1
    expected = counted_by_hand(train.tolist(), val.tolist(), V)
    for size in (2 ** 23, 777):  # at once, and in parts
        assert script.baselines(train, val, V, size) == pytest.approx(expected, abs=1e-9)


def test_the_loss_of_counts_of_shakespeare_is_that_of_a_count_by_hand(tiny_shakespeare):
    text = Path(tiny_shakespeare).read_text()
    ids = CharTokenizer("".join(sorted(set(text)))).encode(text).astype(np.uint16)
    train, val = np.split(ids, [9 * len(ids) // 10])
    expected = counted_by_hand(train.tolist(), val.tolist(), 65)
    assert script.baselines(train, val, 65) == pytest.approx(expected, abs=1e-9)
    assert 2.4 < expected["bigram"] < 2.5


def test_a_run_shows_what_counts_would_do_and_says_if_it_does_no_better(train):
    pytest.importorskip("matplotlib")
    out = train("--plot=True").out
    names = dict(re.findall(r"(uniform|unigram|bigram) (\d\.\d{4})", out))
    assert list(names) == ["uniform", "unigram", "bigram"]
    assert f"a bigram, which looks one token back, has {names['bigram']}" in out  # steps are few


@pytest.mark.parametrize("loss, said", [(1.99, False), (2.01, True)])
def test_only_a_run_that_ends_above_a_bigram_is_told_so(capsys, loss, said):
    progress = {"step": 10, "seconds": 2.0, "best_loss": loss, "best_train": 1.5, "stale": 0,
                "best_accuracy": 0.5, "skipped": 0, "best_step": 10}
    script.print_result(progress, 10 ** 6, {"tokens": 9, "characters": 9}, {"bigram": 2.0}, Path(),
                        GPT(GPTConfig(256, 65, 2, 2, 16)), torch.device("cpu"))
    assert ("a bigram, which" in capsys.readouterr().out) == said


# ---- a summary ----

def test_a_summary_shows_each_tensor_and_state_and_writes_nothing(train):
    result = train("--summary=True", "--out_dir=out/new", "--tied=False", "--overwrite=False")
    assert result.status == 0 and not Path("out/new").exists()
    vocab_size = len(set(VERSE))
    model = GPT(GPTConfig(16, vocab_size, 2, 2, 16, tied=False))
    rows = [line.rsplit(")", 1) for line in result.out.splitlines() if line.startswith("    ")]
    shown = {left.split("(")[0].strip(): (left.split("(")[1], right.split()) for left, right in rows}
    assert shown.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        shape, (count, share) = shown[name]
        assert shape.rstrip(",") == ", ".join(map(str, p.shape)) and int(count.replace(",", "")) == \
            p.numel() and share == f"{p.numel() / model.num_params():.2%}"
    states = dict(re.findall(r"^(\S+) +\((.+)\)$", result.out, re.MULTILINE))
    assert states["wte"] == states["h.1"] == states["h.0.attn"] == "4, 16, 16"
    assert states["h.0.mlp.c_fc"] == "4, 16, 64" and states["lm_head"] == f"4, 16, {vocab_size}"
    assert f"{model.flops_per_token() / 1e6:,.1f} MFLOPs to train on a token" in result.out
    assert f"weights take {4e-6 * model.num_params():.3g} MB" in result.out


def test_a_summary_goes_through_each_block_as_in_training(train, monkeypatch):
    kept, real = set(), Dropout.forward

    def forward(self, x):
        kept.add(id(self) if self.training else None)
        return real(self, x)
    monkeypatch.setattr(Dropout, "forward", forward)
    assert train("--summary=True", "--layerdrop=0.99", "--dropout=0.1").status == 0
    assert len(kept) == 1 + 2 * 3 and None not in kept


def test_a_summary_counts_a_tied_matrix_once_and_leaves_a_run_as_it_is(train):
    train()
    before = {path: path.read_bytes() for path in Path("out/tiny").iterdir()}
    assert train("--summary=True", "--init_from=resume", "--eval_only=True").status == 0
    out = train("--summary=True", "--overwrite=False").out
    counts = [int(number.replace(",", "")) for number in re.findall(r"\) +([\d,]+) +\S+%", out)]
    assert f"model: {sum(counts):,} parameters" in out
    assert before == {path: path.read_bytes() for path in Path("out/tiny").iterdir()}


# ---- optimizers and schedule ----

def test_adamw_from_first_principles_is_torchs():
    """torch's AdamW is the oracle of ours: 20 steps on the same gradients."""
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(5)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    optimizers = script.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, theirs, start):
        assert (a - b).abs().max() < 1e-6 and (a - c).abs().max() > 0.01


def test_muon_is_torchs():
    """torch's Muon is the oracle, with the scale that makes an update as large as AdamW's. For
    torch, queries, keys and values are three matrices."""
    def parts(p):
        return p.split(16) if p.shape == (48, 16) else (p,)

    torch.manual_seed(0)
    shapes = [(16, 64), (48, 16), (64, 16), (16, 16)]
    start = [torch.randn(shape) for shape in 5 * shapes + [(48, 16)]]  # more than go together
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [[part.clone().requires_grad_() for part in parts(p)] for p in start]
    optimizers = (script.Muon(ours, 0.02, 0.9, 0.1),
                  torch.optim.Muon(sum(theirs, []), lr=0.02, momentum=0.9, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw"))
    for _ in range(5):
        for a, b in zip(ours[:-1], theirs):  # the last has no gradient, as in a skipped block
            a.grad = torch.randn_like(a)
            for part, grad in zip(b, parts(a.grad)):
                part.grad = grad.clone()
        for one in optimizers:
            one.step()
    for a, b, c in zip(ours[:-1], theirs, start):
        assert (a - torch.cat(b)).abs().max() < 2e-3  # bfloat16 inside
        assert (a - c).abs().max() > 0.02
    assert torch.equal(ours[-1], start[-1])


@pytest.mark.parametrize("kind", ["adamw", "adamw_scratch", "muon"])
def test_only_matrices_decay_and_every_parameter_has_one_optimizer(monkeypatch, kind):
    monkeypatch.setattr(script, "optimizer", kind)
    model = GPT(GPTConfig(8, 50, 2, 2, 16, positions="sinusoidal"))
    groups = [g for one in script.make_optimizers(model) for g in one.param_groups]
    seen = [p for g in groups for p in g["params"]]
    assert len(seen) == len(set(seen)) == sum(p.requires_grad for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() == 2)


def test_a_padded_vocabulary_trains_and_is_never_drawn(train, run):
    result = train("--vocab_multiple=64", "--sample_interval=3")
    assert result.status == 0 and "vocabulary of 64" in result.out
    saved = load_checkpoint("out/tiny/best.pt")
    vocab_size = saved["tokenizer"].vocab_size
    assert vocab_size < 64 == len(saved["model"].wte.weight)
    with torch.no_grad():  # as bad as can be: the ids added are the likeliest
        saved["model"].wte.weight[vocab_size:] = 100 * saved["model"].wte.weight[:1]
    save_checkpoint("out/tiny/best.pt", saved["model"], saved["tokenizer"])
    assert len(run("sample.py", "--start=From", "--max_new_tokens=50").out) >= 50


def test_mfu_is_held_against_the_gpu_by_name(monkeypatch, capsys):
    raw = GPT(GPTConfig(256, 65, 2, 2, 16))
    progress = {"step": 10, "seconds": 2.0, "best_loss": 1.0, "stale": 0, "skipped": 0,
                "best_step": 0}
    monkeypatch.setattr(script, "peak_memory", lambda target: 0)
    for name, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12,
                       "NVIDIA L4": 121e12, "NVIDIA L40S": 0, "Some GPU": 0}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda target, name=name: name)
        script.print_result(progress, 10 ** 8, {}, {}, Path(), raw, torch.device("cuda"))
        share = peak and raw.flops_per_token() * 10 ** 9 / 2 / peak
        expected = f"{share:.1%}" if peak else "n/a"
        assert f"MFU {expected}," in capsys.readouterr().out


def test_speed_counts_no_padding(train, run):
    Path("short.txt").write_text("".join(f"Story {i} is short.\n{model.EOT}\n" for i in range(100)))
    run("prepare_tinystories.py", "--source=short.txt", "--tokenizer=byte", "--dataset=short")
    counts = json.loads(Path("data/short/meta.json").read_text())["splits"]["train"]
    result = train("--dataset=short", "--document_rows=True", "--block_size=64")
    tokens = 4 * (counts["tokens"] - 1) / counts["documents"]
    assert f" steps of {tokens:.0f} tokens" in result.out and tokens < 4 * 20
    for row in metrics()[1:]:
        assert float(row["tok/s"]) * float(row["ms"]) / 1000 == pytest.approx(tokens, rel=1e-3)


def test_an_evaluation_draws_the_curves(train):
    pytest.importorskip("matplotlib")
    assert train("--plot=True").status == 0
    picture = Path("out/tiny/loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(picture[16:20]) == 800
    train("--init_from=resume", "--plot=True", "--max_iters=9", "--eval_interval=9")
    assert Path("out/tiny/loss.png").read_bytes() != picture
    train()
    assert not Path("out/tiny/loss.png").exists()  # it was of the run that this one replaces


def test_the_curves_fill_the_picture_and_what_lies_beyond_is_in_the_legend(train, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, real = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **options: (
        drawn.append(self), real(self, *args, **options)))
    train("--plot=True", "--learning_rate=0.02")
    top = drawn[-1].axes[0]
    val = [float(row["val"]) for row in metrics() if row["val"]][1:]
    assert 0.9 * min(val) < top.get_ylim()[0] < min(val) < max(val) < top.get_ylim()[1]
    names = " ".join(text.get_text() for text in top.get_legend().get_texts())
    assert re.search(r"uniform: 3\.\d+ unigram: .* bigram: ", names)


def test_an_evaluation_that_is_not_finite_is_a_sentence_not_a_picture(train, monkeypatch):
    pytest.importorskip("matplotlib")
    forward = GPT.forward

    def broken(self, *arguments):
        logits, loss = forward(self, *arguments)
        return logits, loss if self.training else loss * math.nan
    monkeypatch.setattr(GPT, "forward", broken)
    one_sentence(train("--plot=True"), 1, "step 3: val is nan")


LAYERS = ["wte", "wpe", "h.0", "h.1", "ln_f"]


def test_gradient_norms_by_layer_add_up_and_go_on_where_a_run_does(train):
    train("--log_grad_norms=True", "--max_iters=3", "--lr_decay_iters=6")
    train("--log_grad_norms=True", "--init_from=resume", "--lr_decay_iters=6")
    rows = metrics(name="grad_norms.csv")
    assert list(rows[0]) == ["step", *LAYERS, *(f"update/{layer}" for layer in LAYERS)]
    assert [row["step"] for row in rows] == list("123456")
    for row, whole in zip(rows, metrics()[1:], strict=True):
        whole_norm = float(whole["norm"])
        assert math.hypot(*(float(row[layer]) for layer in LAYERS)) == pytest.approx(
            whole_norm, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_is_measured_against_the_weights_before_it(train, optimizer):
    train("--log_grad_norms=True", "--snapshot_interval=1", f"--optimizer={optimizer}")
    rows = metrics(name="grad_norms.csv")
    for step in range(2, 7):
        before, after = weights(f"step_{step - 1}.pt"), weights(f"step_{step}.pt")
        for layer in LAYERS:
            names = [name for name in before if name.startswith(layer + ".")]
            moved = math.hypot(*((after[name] - before[name]).norm().item() for name in names))
            size = math.hypot(*(before[name].norm().item() for name in names))
            assert float(rows[step - 1][f"update/{layer}"]) == pytest.approx(moved / size, rel=1e-3)


@pytest.mark.parametrize("options", [["--layerdrop=0.5"], ["--max_iters=1"]])
def test_gradient_norms_are_drawn_below_the_curves(train, options):
    pytest.importorskip("matplotlib")
    assert train("--plot=True", "--log_grad_norms=True", *options).status == 0
    assert int.from_bytes(Path("out/tiny/loss.png").read_bytes()[20:24]) == 1200


def test_a_profile_is_a_trace_and_a_table(train):
    result = train("--profile=3")
    assert result.status == 0
    with gzip.open("out/tiny/trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 3


def test_a_run_that_stops_early_keeps_its_profile(train):
    result = train("--profile=50", "--max_iters=60", "--eval_interval=3", "--patience=1",
                   "--learning_rate=1.0")
    assert result.status == 0 and "stopped after 1 evaluations" in result.out
    assert Path("out/tiny/trace.json.gz").stat().st_size > 1000
    assert "aten::addmm " in result.out and "Self CPU time total" in result.out


def test_without_matplotlib_one_line_says_so(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = train("--plot=True")
    assert result.status == 0 and result.out.count("pip install matplotlib") == 1
    assert not Path("out/tiny/loss.png").exists()


def test_the_schedule_warms_up_and_lands_on_min_lr(monkeypatch):
    for name, value in dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10).items():
        monkeypatch.setattr(script, name, value)
    rates = [script.learning_rate_at(step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    monkeypatch.setattr(script, "lr_schedule", "linear")
    assert script.learning_rate_at(35, 110) == pytest.approx(0.775)
    monkeypatch.setattr(script, "decay_lr", False)
    assert script.learning_rate_at(110, 110) == 1.0


# ---- a whole run ----

def test_a_model_learns_what_can_be_learned(train):
    result = train("--max_iters=250", "--learning_rate=0.01", "--eval_interval=0", "--n_embd=32")
    rows = metrics()
    assert float(rows[0]["val"]) > 3 and float(rows[-1]["val"]) < 1.0, result.out


@pytest.mark.parametrize("options", [
    [], ["--optimizer=adamw_scratch"], ["--optimizer=muon", "--dtype=bfloat16"],
    ["--layerdrop=0.3"],
    ["--gradient_accumulation_steps=3", "--label_smoothing=0.1"]])
def test_three_steps_and_three_more_are_six(train, options):
    """The uninterrupted run is the oracle: all weights and figures must be its own, bit for bit."""
    options = ["--dropout=0.3", "--lr_decay_iters=6", "--snapshot_interval=3", *options]
    train(*options)
    whole, rows = weights(), metrics()
    train(*options, "--max_iters=3")
    result = train(*options, "--init_from=resume")
    assert result.status == 0 and same(weights(), whole)
    timed = ("ms", "tok/s", "elapsed", "eta")
    for row in (plain := rows + metrics()):
        for name in timed:
            row.pop(name)
    assert plain[:len(rows)] == plain[len(rows):]
    assert [row["step"] for row in rows] == list("0123456")


def test_killed_between_two_checkpoints_a_run_still_ends_the_same(train, monkeypatch):
    train()
    whole, best = weights(), weights("best.pt")
    written = []

    def killed(path, *rest, save=model.save_checkpoint, **more):
        written.append(path.name)
        if len(written) == 4:  # the second of the two files of step 6
            raise KeyboardInterrupt
        save(path, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "save_checkpoint", killed)
        train()
    train("--init_from=resume")
    assert written == ["best.pt", "last.pt"] * 2
    assert same(weights(), whole) and same(weights("best.pt"), best)


@pytest.mark.parametrize("options", [["--eval_interval=1"], ["--eval_interval=0"],
                                     ["--sample_interval=2"], ["--log_interval=0"],
                                     ["--eval_iters=0"], ["--snapshot_interval=1"],
                                     ["--profile=2"], ["--log_grad_norms=True"]])
def test_looking_does_not_change_the_weights(train, options):
    train("--dropout=0.3")
    before = weights()
    train("--dropout=0.3", *options)
    assert same(weights(), before)


def test_another_seed_is_another_run(train):
    train()
    before = weights()
    train("--seed=1")
    assert not same(weights(), before)


def test_best_is_the_lowest_not_the_latest_and_patience_stops(train):
    train("--learning_rate=0.5", "--grad_clip=0", "--warmup_iters=0", "--decay_lr=False",
          "--eval_interval=1", "--max_iters=60", "--patience=3", "--n_embd=32")
    val = {int(row["step"]): float(row["val"]) for row in metrics()[1:]}
    best = load_checkpoint("out/tiny/best.pt")["progress"]
    assert best["best_step"] == min(val, key=val.get) < max(val) == best["best_step"] + 3 < 60


def test_epochs_are_a_way_to_say_steps(train):
    result = train("--max_epochs=0.25", "--eval_interval=0")
    windows = (3999 - 16) // 16
    assert f" {math.ceil(windows / 4 / 4)} steps" in result.out


def test_samples_and_snapshots_are_kept(train):
    result = train("--sample_interval=3", "--snapshot_interval=4", "--start=From ")
    text = Path("out/tiny/samples.txt").read_text()
    assert text.count("\nFrom ") == 2 and "---- step 6" in text and "---- a sample" in result.out
    assert sorted(p.name for p in Path("out/tiny").iterdir()) == [
        "best.pt", "last.pt", "metrics.csv", "samples.txt", "step_4.pt"]
    assert load_checkpoint("out/tiny/step_4.pt")["progress"]["step"] == 4


@pytest.mark.parametrize("options", [
    ["--positions=sinusoidal", "--scale_embedding=True", "--norm=post", "--activation=relu"],
    ["--tied=False", "--bias=False", "--fused=False", "--n_inner=24"],
    ["--dtype=bfloat16", "--qkv_bias=False"], ["--dtype=float16"]])
def test_every_option_trains(train, options):
    result = train(*options)
    assert result.status == 0, result.err
    assert float(metrics()[-1]["val"]) < float(metrics()[0]["val"])


def test_one_compiled_graph_serves_all_blocks_in_training_alone(train, monkeypatch):
    """The oracle is the uncompiled run: the graphs run as torch traced them, uncompiled, so the
    weights must be the same bit for bit."""
    options = "--n_layer=3", "--dropout=0.0", "--sample_interval=2"
    train(*options)
    plain, graphs = weights(), []
    torch.compiler.reset()
    monkeypatch.setattr("torch.compile", partial(
        torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    assert train(*options, "--compile=true").status == 0
    assert len(graphs) == 1 and same(weights(), plain)


COMPILES_NOTHING = """
import contextlib, runpy, sys
sys.path.insert(0, {repo!r})

def run(script, *arguments):
    sys.argv = [script, *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path({repo!r} + "/" + script, run_name="__main__")
    assert "torch._dynamo" not in sys.modules, sys.argv

for optimizer in ("adamw_scratch", "adamw", "muon"):
    settings = [*{tiny}, "--optimizer=" + optimizer, "--gradient_accumulation_steps=2"]
    run("train.py", *settings)
    run("train.py", *settings, "--init_from=resume", "--max_iters=9", "--sample_interval=3")
run("sample.py", "--out_dir=out/tiny", "--max_new_tokens=3", "--device=cpu")
"""


def test_what_compiles_nothing_does_not_import_the_compiler(verse):
    """It takes a second to import, which each start would wait for."""
    code = COMPILES_NOTHING.format(repo=str(REPO), tiny=TINY)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("9 steps in") == 3


def test_where_torch_compile_fails_the_run_goes_on_and_says_so(train, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=broken))
    result = train("--compile=true")
    assert result.status == 0 and "torch.compile does not work here" in result.err


# ---- what stops a run before it harms ----

@pytest.mark.parametrize("arguments, status, words", [
    (["--dataset=nope"], 1, ["data/nope: no such dataset", "prepare_shakespeare.py"]),
    ([f"--dataset={'9' * 5000}"], 1, ["data/999"]),
    (["--block_size=4000"], 2, ["3,999 tokens are too few for --block_size=4000"]),
    (["--n_embd=15"], 2, ["n_embd must be a multiple of n_head"]),
    (["--dropout=1.5"], 2, ["dropout must be"]),
    (["--batch_size=0"], 2, ["--batch_size must be at least 1"]),
    (["--max_iters=-1"], 2, ["--max_iters must be at least 0"]),
    (["--optimizer=sgd"], 2, ["--optimizer must be adamw, adamw_scratch or muon, not 'sgd'"]),
    (["--device=tpu9"], 2, ["device 'tpu9' cannot be used here"]),
    (["--init_from=gpt9"], 2, ["--init_from must be scratch, resume, gpt2,", "not 'gpt9'"]),
    (["--init_from=resume"], 1, ["out/tiny/last.pt: no such checkpoint"]),
    (["--profile=10"], 2, ["--profile=10 needs 13 steps, raise --max_iters"]),
    (["--sample_interval=1", "--start=é"], 2, ["'é'", "--tokenizer=byte"]),
    (["--learning_rate=1e-5"], 2, ["--min_lr must not be above --learning_rate"]),
    (["--eval_only=True"], 2, ["--eval_only=True needs --init_from=resume"]),
])
def test_a_run_that_cannot_work_says_why(train, arguments, status, words):
    one_sentence(train(*arguments), status, *words)
    assert not Path("out").exists()


@pytest.mark.parametrize("harm, words", [
    (lambda f: (f / "meta.json").write_text("{"), ["data/verse cannot be used", "prepare it again"]),
    (lambda f: (f / "meta.json").write_text("[]"), ["data/verse cannot be used", "prepare it again"]),
    (lambda f: (f / "train.bin").unlink(), ["data/verse cannot be used", "prepare it again"]),
    (lambda f: (f / "train.bin").write_bytes(b"\0" * 100), ["train.bin is not what meta.json says"]),
    (lambda f: (f / "val.bin").write_bytes(b"\xff" * 890), ["val.bin is not what meta.json says"]),
])
def test_a_damaged_dataset_is_named(train, harm, words):
    harm(Path("data/verse"))
    one_sentence(train(), 1, *words)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("harm", [
    lambda p: p.write_bytes(p.read_bytes()[:1000]), lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(b"hello " * 99), lambda p: p.write_bytes(pickle.dumps(Payload())),
    lambda p: torch.save(Payload(), p), lambda p: torch.save({"weights": torch.ones(3)}, p),
    lambda p: torch.save([1, 2], p), lambda p: torch.save(
        {"model": {}, "config": {"n_layer": "x"}, "tokenizer": {"kind": "byte"}}, p)])
def test_a_file_that_is_no_checkpoint_is_refused_and_never_run(train, run, harm):
    train()
    last, best = Path("out/tiny/last.pt"), Path("out/tiny/best.pt")
    harm(last)
    before = last.read_bytes()
    one_sentence(train("--init_from=resume"), 1, "out/tiny/last.pt")
    one_sentence(run("sample.py", "--out_dir=out/tiny", "--checkpoint=last.pt"), 1, "last.pt")
    assert not Path("harmed").exists() and last.read_bytes() == before and best.exists()


@pytest.mark.parametrize("change, status, words", [
    (["--n_layer=3"], 2, ["trained with --n_layer=2"]),
    (["--learning_rate=1", "--seed=5"], 2, ["--seed=1337", "--learning_rate=0.001"]),
    (["--dataset=other"], 1, ["reads other tokens than data/other"]),
    ([], 2, ["has 6 steps, raise --max_iters"]),
])
def test_a_checkpoint_that_does_not_fit_is_not_resumed(train, run, change, status, words):
    train()
    before = Path("out/tiny/last.pt").read_bytes()
    Path("other.txt").write_text("abc" * 300)
    run("prepare_shakespeare.py", "--source=other.txt", "--dataset=other")
    one_sentence(train("--init_from=resume", *change), status, *words)
    assert Path("out/tiny/last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_file(train):
    train("--max_iters=3", "--decay_lr=False")
    saved = torch.load("out/tiny/last.pt", weights_only=True)
    saved["model"]["wte.weight"].fill_(math.nan)
    torch.save(saved, "out/tiny/last.pt")
    before = Path("out/tiny/last.pt").read_bytes()
    one_sentence(train("--init_from=resume", "--decay_lr=False"), 1, "step 4: loss is nan",
                 "--learning_rate")
    assert Path("out/tiny/last.pt").read_bytes() == before


@pytest.mark.parametrize("options", [["--eval_interval=1"], ["--snapshot_interval=1"]])
def test_weights_that_overflow_are_not_saved(train, options):
    one_sentence(train("--learning_rate=1e38", "--warmup_iters=0", *options), 1, "step 1: ")
    assert not list(Path("out/tiny").glob("*.pt"))


def test_a_split_of_one_token_has_nothing_to_predict(run):
    Path("s.txt").write_text("abcdefghij")
    run("prepare_shakespeare.py", "--source=s.txt", "--dataset=s")
    one_sentence(run("train.py", *TINY, "--dataset=s", "--block_size=4"), 1,
                 "data/s/val.bin: one token is too few")


# ---- stories ----

@pytest.fixture
def tell(run):
    """tell("--seed=2") -> some steps of a tiny model on 200 synthetic stories, to out/tell."""
    run("prepare_tinystories.py", "--source=grammar", "--max_stories=200", "--tokenizer=bpe",
        "--vocab_size=500", "--dataset=tales")
    return lambda *arguments: run(
        "train.py", "--dataset=tales", "--out_dir=out/tell", "--overwrite=True",
        "--document_rows=True", "--dtype=float32", "--n_layer=1", "--n_head=2", "--n_embd=32",
        "--batch_size=10", "--dropout=0.0", "--block_size=256", "--warmup_iters=0",
        "--learning_rate=0.02", "--max_iters=54", "--eval_epochs=1.5", "--log_interval=0",
        "--device=cpu", "--start=", *arguments)


def test_no_model_gets_below_the_entropy_of_the_grammar_and_the_run_says_how_close(tell):
    """The grammar's entropy is known exactly and no model of the text can have a lower loss, so a
    leak of targets into inputs or a wrong mean would show as a loss below it."""
    done = tell()
    floor = json.loads(Path("data/tales/meta.json").read_text())["splits"]["val"]["nats_per_token"]
    found = [float(row["val"]) for row in metrics("out/tell")]
    assert len(found) == 3 and 2 * floor < found[0] and floor < found[-1] < found[1] < found[0]
    assert f"20 documents in 20 rows, entropy {floor:.4f}: no honest loss is lower" in done.out
    assert f"entropy is {floor:.4f}, the loss {found[-1] / floor - 1:.1%} above" in done.out
    pairs = float(re.search(r"bigram (\S+)", done.out)[1])
    assert (found[-1] > pairs) == ("a bigram, which" in done.out)


def test_evaluation_reads_documents_whatever_rows_are_trained_on(tell):
    """So that losses of the two ways to train compare: untrained they have the same one."""
    found = []
    for rows in (True, False):
        tell("--max_iters=1", "--block_size=32", f"--document_rows={rows}")
        found.append([[row[name] for name in ("train", "val")] for row in metrics("out/tell")])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_evaluations_by_the_epoch(tell):
    tell("--max_iters=40")
    assert [row["step"] for row in metrics("out/tell")] == ["0", "27", "40"]  # 1.5 * 180 / 10


def test_a_prompt_begins_a_story_where_rows_are_stories(tell, run):
    """As each row did in training: behind eot, which is not shown."""
    tell("--max_iters=2", "--sample_interval=2", "--start=Once upon")
    assert Path("out/tell/samples.txt").read_text().startswith("---- step 2 ----\nOnce upon")
    written = run("sample.py", "--out_dir=out/tell", "--start=Once upon", "--max_new_tokens=3",
                  "--explain=page.html").out
    page = Path("page.html").read_text()
    assert written.startswith("Once upon") and '"tokens": ["\\u003c|endoftext|>"' in page


def test_story_rows_resume_as_they_would_have_gone_on(tell):
    tell("--max_iters=6", "--lr_decay_iters=6")
    whole = weights(run="out/tell")
    tell("--max_iters=3", "--lr_decay_iters=6")
    tell("--max_iters=6", "--lr_decay_iters=6", "--init_from=resume")
    assert same(whole, weights(run="out/tell"))
    one_sentence(tell("--init_from=resume", "--max_iters=9", "--document_rows=False"), 2,
                 "--document_rows=True")


def test_samples_of_a_story_model_end_with_the_story(tell, run):
    tell("--sample_interval=54")
    assert "<|endoftext|>" not in Path("out/tell/samples.txt").read_text()
    told = run("sample.py", "--out_dir=out/tell", "--num_samples=3").out.split("\n----\n")
    assert "<|endoftext|>" not in str(told) and len(told) == 3 == len(set(map(len, told)))


def test_story_rows_need_ends_of_stories(train):
    one_sentence(train("--document_rows=True"), 2, "data/verse is one document", "<|endoftext|>",
                 "prepare_tinystories.py", "--document_rows=False")


# ---- time and memory ----

@pytest.mark.parametrize("first, then", [(0.9, 0.9), (2.0, 0.5), (0.5, 2.0)])
def test_the_schedule_of_minutes_ends_with_them_however_fast_the_machine(
        train, monkeypatch, first, then):
    """By a clock that a micro-step and an evaluation put on: the steps that fit can be counted."""
    clock, micro_steps = [1000.0], iter([first] * 10)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    real = GPT.forward

    def slow(self, *given):
        clock[0] += next(micro_steps, then) if self.training else 0.25
        return real(self, *given)
    monkeypatch.setattr(GPT, "forward", slow)
    options = ["--max_minutes=1", "--eval_interval=10", "--eval_iters=2", "--max_iters=1"]
    assert train(*options).status == 0
    rows = metrics()
    assert 54 <= float(rows[-1]["elapsed"]) <= 60 and rows[-1]["val"]
    rates = [float(row["lr"]) for row in rows[1:]]
    assert min(rates) == rates[-1] < 0.2 * max(rates)
    one_sentence(train(*options, "--init_from=resume"), 2, "--max_minutes")
    assert train("--max_minutes=2", *options[1:], "--init_from=resume").status == 0
    assert 114 <= float(metrics()[-1]["elapsed"]) <= 120


def test_a_run_says_what_it_will_take_and_what_cannot_fit_is_refused(train):
    assert re.search(r"about [\d.]+ min and [\d.]+ GB here", train().out)
    for huge in ("--batch_size=99999999999999", "--n_embd=2000000", "--n_layer=1000000000"):
        one_sentence(train(huge), 2, "GB, cpu has", "smaller")


def test_auto_is_what_is_faster_here_and_stays_with_the_run(train, monkeypatch):
    for name, least in (("bfloat16", "float32"), ("float32", "bfloat16")):
        def autocast(device, dtype, enabled=True, real=torch.autocast):
            time.sleep(0.01 * (str(dtype)[6:] == least))
            return real(device, dtype, enabled=enabled)
        with monkeypatch.context() as patch:
            patch.setattr("torch.autocast", autocast)
            done = train("--dtype=auto", "--max_iters=3", "--lr_decay_iters=6")
        assert f" on cpu in {name}: " in done.out and "of float32's time here" in done.err
        assert load_checkpoint("out/tiny/last.pt")["dtype"] == name
        again = train("--dtype=auto", "--lr_decay_iters=6", "--init_from=resume")
        assert f" on cpu in {name}: " in again.out and "time here" not in again.err
        assert "time here" not in train("--dtype=auto", "--init_from=resume", "--eval_only=True",
                                        "--max_iters=7", "--lr_decay_iters=6").err


@pytest.mark.parametrize("options", [["--dropout=0.1"], ["--gradient_accumulation_steps=2"]])
def test_a_device_that_is_rarely_read_from_trains_the_same(run, train, monkeypatch, options):
    """The loop of a GPU, on a CPU: a batch is a graph, numbers are read in every third step."""
    given = ["--log_interval=3", "--eval_interval=6", "--max_iters=12", "--grad_clip=0.3", *options]
    every_step = train(*given)
    expected = torch.load("out/tiny/last.pt", weights_only=True)
    code = (REPO / "train.py").read_text().replace('device.type == "cpu" or scaler', "scaler")
    Path("train.py").write_text(code.replace('device.type == "cuda" and cuda_graph', "cuda_graph"))
    monkeypatch.setattr(model, "CudaGraph", Replayed)
    synced = []
    real = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr("torch.nn.utils.clip_grads_with_norm_",
                        lambda *arguments: synced.append(0) or real(*arguments))
    monkeypatch.setattr("conftest.REPO", Path())
    rarely = train(*given)
    assert len(synced) >= 8  # unread, a norm is clipped, by 1 where it is small

    def figures(result):  # without ms, tokens/s and seconds
        return [line[:53] for line in result.out.splitlines() if re.match(r" +\d+ ", line)]

    assert len(figures(rarely)) == 5 and figures(rarely) == figures(every_step)
    torch.testing.assert_close(torch.load("out/tiny/last.pt", weights_only=True)["model"],
                               expected["model"], rtol=0, atol=0)
    one_sentence(train(*given, "--learning_rate=1e30", "--grad_clip=0.0", "--warmup_iters=0"), 1,
                 "step 3: loss is nan")


def test_more_processes_than_gpus_and_too_little_memory_are_said(monkeypatch, capsys):
    monkeypatch.setattr(script, "world_size", 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        script.join_processes(torch.device("cuda"))
    assert stop.value.code == 2 and "has 2 GPUs, start as many" in capsys.readouterr().err

    def attempt():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # torch.compile works: going on would not help
        model.tried("torch.compile", attempt)
