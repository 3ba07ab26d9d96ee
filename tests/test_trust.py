"""What a run survives: other processes, signals, kills, a full disk, damaged and hostile files,
nonsense in its settings. pytest -m slow repeats what is random more often."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, one_sentence
from test_train import metrics, same, weights

from config import declared_settings
from model import load_checkpoint

LONG = ("--max_iters=120", "--save_interval=4", "--eval_interval=30", "--dropout=0.1")


def slow(*values):
    """Parameters of a test for -m slow alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def often(few, many):
    """Few repetitions of a test by default, many with -m slow."""
    return pytest.mark.parametrize("count", [few, slow(many)])


def start(*arguments, processes=1):
    """train.py in processes of its own, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen(
        [sys.executable, REPO / "train.py", *TINY, *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                          "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port)}) for rank in range(processes)]


def finish(runs):
    """[(exit status, output)] of what start started."""
    return [(run.wait(timeout=60), run.stdout.read()) for run in runs]


def once_running(runs):
    """Waits until a first checkpoint is there, and a random moment more."""
    while not Path("out/tiny/last.pt").exists():
        assert all(run.poll() is None for run in runs), finish(runs)
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))


def steps():
    return [int(row["step"]) for row in metrics()]


# ---- many processes ----

@pytest.mark.parametrize("options", [[], slow(["--layerdrop=0.4"])])
def test_two_processes_take_the_steps_of_one(train, options):
    """One process with the same 8 batches is the oracle of two that share them. First moments show
    each gradient of the first step, where a factor of two would hide in AdamW's update."""
    options = ["--gradient_accumulation_steps=8", "--dropout=0.1", "--max_iters=10",
               "--snapshot_interval=1", *options]
    train(*options, "--out_dir=out/one")
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           REPO / "train.py", *TINY, *options, "--out_dir=out/two"]
    done = subprocess.run(two, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("best val loss") == 1, done.stderr
    looking = ["--init_from=resume", "--eval_only=True"]
    done = subprocess.run([*two, *looking], capture_output=True, text=True, timeout=60)
    table = train(*options, *looking, "--out_dir=out/two").out
    assert done.returncode == 0 and done.stdout == table, done.stderr
    one, two = (moments(f"out/{run}/step_1.pt") for run in ("one", "two"))
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(one, two))
    for column in ("loss", "val", "norm"):
        one, two = ([float(row[column] or 0) for row in metrics(f"out/{run}")]
                    for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-5) and len(one) == 11


def moments(path):
    """AdamW's first moments after a step, a tenth of the clipped gradients, but for the key biases:
    in theory these have none."""
    found = []
    for p in load_checkpoint(path)["states"][0]["state"].values():
        m = p["exp_avg"]
        found += [m] if m.shape != (48,) else [m[:16], m[32:]]
    return found


def test_two_processes_agree_when_the_minutes_are_over(verse):
    """Each has a clock of its own; were one to stop alone, the other would wait for it."""
    runs = start("--max_minutes=0.03", "--gradient_accumulation_steps=2", processes=2)
    assert [status for status, _ in finish(runs)] == [0, 0]
    last = metrics()[-1]
    assert int(last["step"]) > 6 and last["val"] and float(last["lr"]) < 2e-4


def test_the_batches_of_a_step_must_be_shared_evenly(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_sentence(train("--gradient_accumulation_steps=3"), 2, "a multiple of the 2 processes")


# ---- interruptions ----

@often(1, 50)
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(train, count):
    train(*LONG, "--out_dir=out/whole")
    for _ in range(count):
        shutil.rmtree("out/tiny", ignore_errors=True)
        runs = start(*LONG)
        once_running(runs)
        runs[0].kill()
        assert finish(runs)[0][0] == -signal.SIGKILL
        assert train(*LONG, "--init_from=resume").status == 0
        assert same(weights(), weights(run="out/whole"))
        assert same(weights("best.pt"), weights("best.pt", "out/whole"))
        assert steps() == list(range(121))


@pytest.mark.parametrize("processes, count", [(2, 1), slow(1, 20), slow(2, 20)])
def test_a_signal_ends_all_processes_after_the_step_and_the_run_goes_on(verse, processes, count):
    options = [*LONG, f"--gradient_accumulation_steps={processes}"]
    finish(start(*options, "--out_dir=out/whole", processes=processes))
    for _ in range(count):
        shutil.rmtree("out/tiny", ignore_errors=True)
        runs = start(*options, processes=processes)
        once_running(runs)
        number = random.choice((signal.SIGINT, signal.SIGTERM))
        random.choice(runs).send_signal(number)
        ended = finish(runs)
        assert [status for status, _ in ended] == [128 + number] * processes, ended
        assert "--init_from=resume" in ended[0][1] and "Traceback" not in str(ended)
        assert load_checkpoint("out/tiny/last.pt")["progress"]["step"] == steps()[-1] < 120
        finish(start(*options, "--init_from=resume", processes=processes))
        assert same(weights(), weights(run="out/whole")) and steps() == list(range(121))


# ---- files ----

def test_a_full_disk_stops_with_a_sentence_and_keeps_what_was_saved(train):
    train("--max_iters=3", "--lr_decay_iters=6")
    files = {path: path.read_bytes() for path in Path("out/tiny").glob("*.pt")}
    size, hard = len(files[Path("out/tiny/last.pt")]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in (size // 2, size - 100, 400):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            result = train("--init_from=resume", "--lr_decay_iters=6", "--save_interval=1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        one_sentence(result, 1, "cannot be written ([Errno 27] File too large", "make room")
        assert {path: path.read_bytes() for path in Path("out/tiny").glob("*.pt*")} == files
    assert train("--init_from=resume", "--lr_decay_iters=6").status == 0
    assert steps() == list(range(7))


@often(15, 200)
def test_a_flipped_byte_is_found_or_does_no_harm(train, count):
    train()
    whole = weights()
    train("--max_iters=3", "--lr_decay_iters=6")
    good = Path("out/tiny/last.pt").read_bytes()
    refused = 0
    for at in random.sample(range(len(good)), count):
        bad = bytearray(good)
        bad[at] ^= 1 << random.randrange(8)
        Path("out/tiny/last.pt").write_bytes(bad)
        result = train("--init_from=resume", "--lr_decay_iters=6")
        if result.status:
            one_sentence(result, 1, "out/tiny/last.pt", "--checkpoint=best.pt")
            refused += 1
        else:
            assert same(weights(), whole), at
    assert refused > count / 2


def test_a_member_that_claims_to_be_a_folder_is_damage(train):
    """No CRC covers the attributes, by which torch would read no bytes of a tensor at all."""
    train("--max_iters=3", "--lr_decay_iters=6")
    good = Path("out/tiny/last.pt").read_bytes()
    members = [match.start() for match in re.finditer(b"PK\x01\x02", good)]
    assert len(members) > 50
    for at in members:
        bad = bytearray(good)
        bad[at + 38] ^= 0x10
        Path("out/tiny/last.pt").write_bytes(bad)
        with pytest.raises(ValueError, match="last.pt cannot be used: it is damaged"):
            load_checkpoint("out/tiny/last.pt")


def test_from_a_damaged_last_the_way_back_is_another_checkpoint(train):
    train("--lr_decay_iters=9", "--snapshot_interval=2")
    whole = weights()
    Path("out/tiny/last.pt").write_bytes(b"")
    one_sentence(train("--init_from=resume", "--lr_decay_iters=9"), 1,
                 "--checkpoint=best.pt or step_2.pt or step_4.pt or step_6.pt")
    assert train("--init_from=resume", "--lr_decay_iters=9", "--checkpoint=step_2.pt").status == 0
    assert same(weights(), whole) and steps() == list(range(7))


def test_a_run_is_replaced_only_on_request(train):
    train("--snapshot_interval=4", "--sample_interval=3")
    files = {path: path.read_bytes() for path in Path("out/tiny").iterdir()}
    one_sentence(train("--overwrite=False"), 2, "out/tiny holds a run",
                 "--init_from=resume", "--overwrite=True", "--out_dir")
    assert {path: path.read_bytes() for path in Path("out/tiny").iterdir()} == files
    assert train("--overwrite=True", "--max_iters=1").status == 0
    assert sorted(path.name for path in Path("out/tiny").iterdir()) == [
        "best.pt", "last.pt", "metrics.csv"]


@pytest.mark.parametrize("cut", [b"3,1.2", b"3,1.\xff\xfe\n", b"\n", b"step\n"])
def test_a_row_that_a_kill_has_cut_is_written_anew(train, cut):
    train("--max_iters=3", "--lr_decay_iters=6")
    with open("out/tiny/metrics.csv", "ab") as file:
        file.write(cut)
    train("--init_from=resume", "--lr_decay_iters=6")
    assert steps() == list(range(7))


@pytest.mark.parametrize("kept", [0, 1])
def test_tables_without_a_row_are_gone_on_with(train, kept):
    pytest.importorskip("matplotlib")
    options = ["--log_grad_norms=True", "--log_interval=3", "--lr_decay_iters=6"]
    train(*options, "--max_iters=3")
    for path in (Path("out/tiny/metrics.csv"), Path("out/tiny/grad_norms.csv")):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    assert train(*options, "--init_from=resume", "--plot=True", "--max_iters=4").status == 0
    assert train(*options, "--init_from=resume", "--plot=True").status == 0
    assert Path("out/tiny/loss.png").exists()


def test_a_second_signal_kills_whichever_it_is(train, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: [
        signal.raise_signal(number) for number in (signal.SIGTERM, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(signal, "SIG_DFL", signal.default_int_handler)  # what can be caught
        train()


# ---- numbers ----

def test_steps_that_the_scaler_skips_are_counted_and_not_fatal(train, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler",
                        lambda device, enabled: real(device, init_scale=2.0 ** 127))
    result = train("--max_iters=12", "--eval_interval=6")
    skipped = load_checkpoint("out/tiny/last.pt")["progress"]["skipped"]
    assert result.status == 0 and 0 < skipped < 12 and f"{skipped} steps skipped" in result.out


# ---- hostile files ----

def changed(path, change):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


@pytest.mark.parametrize("change", [
    lambda saved: saved["config"].update(n_layer=10 ** 9),
    lambda saved: saved["config"].update(n_embd=2 ** 40),
    lambda saved: saved["config"].update(block_size=10 ** 15),
    lambda saved: saved["config"].update(n_layer="2"),
    lambda saved: saved["config"].update(harm=1),
    lambda saved: saved["model"].update({"wte.weight": torch.zeros(1, 1).expand(10 ** 6, 10 ** 6)}),
    lambda saved: saved["model"].update({"wte.weight": torch.zeros(1, 1).expand(26, 16)}),
    lambda saved: saved["model"].update({"wte.weight": "x"}),
    lambda saved: saved.update(model=[]), lambda saved: saved.update(tokenizer={"kind": "gpt9"}),
    lambda saved: saved.update(tokenizer={"kind": "char", "vocabulary": 3}),
    lambda saved: saved.update(tokenizer={"kind": "bpe", "tokens": ["a\u1234"]}),
    lambda saved: saved.update(tokenizer={"kind": "byte"}),
    lambda saved: saved.update(progress={"step": "many"}), lambda saved: saved.pop("settings"),
    lambda saved: saved["progress"].clear(), lambda saved: saved.update(settings=[1]),
    lambda saved: saved["states"][0]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda saved: saved.update(states=[7]), lambda saved: saved.update(states="x"),
    lambda saved: saved["states"].clear(),
])
def test_a_hostile_checkpoint_is_refused(train, change):
    train("--max_iters=3", "--decay_lr=False")
    changed("out/tiny/last.pt", change)
    one_sentence(train("--init_from=resume", "--decay_lr=False"), 1, "out/tiny/last.pt")


def test_a_zip_bomb_is_no_checkpoint(train):
    train()
    with zipfile.ZipFile("out/tiny/last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    one_sentence(train("--init_from=resume"), 1, "out/tiny/last.pt cannot be used: it is damaged")


@pytest.mark.parametrize("name, value", [
    ("dtype", "O"), ("dtype", "float64"), ("dtype", "uint32"), ("dtype", 7), ("splits", []),
    ("splits", {"train": 1, "val": 1}), ("splits", {"../../x": {"tokens": 1}}),
    ("tokenizer", {"kind": "char", "vocabulary": "ab"}),
    ("tokenizer", None), ("tokenizer", {"kind": "char", "vocabulary": "x" * 9}),
])
def test_a_hostile_meta_json_is_refused(train, name, value):
    meta = json.loads(Path("data/verse/meta.json").read_text())
    Path("data/verse/meta.json").write_text(json.dumps(meta | {name: value}))
    one_sentence(train(), 1, "data/verse")


@pytest.mark.parametrize("value", ["x", None, [1]])
def test_counts_that_cannot_be_are_refused(train, value):
    meta = json.loads(Path("data/verse/meta.json").read_text())
    meta["splits"]["val"]["characters"] = value
    Path("data/verse/meta.json").write_text(json.dumps(meta))
    one_sentence(train(), 1, "data/verse")


# ---- nonsense in settings ----

NONSENSE = ["", " ", "0", "-1", "1", "2", "3", "7", "64", "0.5", "-0.5", "1e-3", "1e9", "1e400",
            "nan", "inf", "-inf", "1_000", "0x10", "True", "false", "None", "[]", "x", "é", "\n",
            "9" * 5000, "10" * 9, "FILE:", "FILE:nope", "FILE:/", "../..", "adamw", "muon", "relu",
            "post", "sinusoidal", "bfloat16", "float16", "a b", "'", "\"", "{}", "%s", "--", "="]
FILES = ["n_layer = 2\nn_layer += {}", "{} = 1", "n_embd = {}", "raise ValueError({!r})", "(" * 300,
         "import os\nseed = {}", "def f(:", "import sys; sys.exit({!r})", "seed = [{!r}]", "\0",
         "dropout = {!r}", "bias = {!r}", "max_iters = object()", "start = {!r}", "1 / 0"]
PLACES = {"dataset", "out_dir", "init_from", "checkpoint"}  # what is not there is no wrong setting
LONG_TO_TAKE = {"max_iters", "max_epochs", "max_minutes", "gradient_accumulation_steps", "compile",
                "n_layer"}


@often(40, 2000)
def test_nonsense_is_refused_in_a_sentence(train, run, count):
    names = [name for name in declared_settings(REPO / "train.py") if name not in LONG_TO_TAKE]
    train()
    wrong = []
    for _ in range(count):
        arguments = []
        for _ in range(random.choice([1, 1, 2, 3])):
            value, kind = random.choice(NONSENSE), random.random()
            if kind < 0.8:
                arguments.append(f"--{random.choice(names)}={value}")
            elif kind < 0.9:
                text = random.choice(FILES)
                Path("x.py").write_text(text.replace("{}", value).replace("{!r}", repr(value)))
                arguments.append("x.py")
            else:
                arguments.append(random.choice([value, f"--{value}", f"--{value}={value}"]))
        try:
            result = train("--max_iters=0", *arguments)
        except Exception as error:  # would be a traceback
            wrong.append((arguments, error))
            continue
        allowed = (0, 1, 2) if any(place in str(arguments) for place in PLACES) else (0, 2)
        if result.status not in allowed or result.err.count("\n") > 1 or len(result.err) > 1000:
            wrong.append((arguments, result))
    assert not wrong
