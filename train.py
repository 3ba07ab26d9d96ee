"""Trains a GPT on a dataset that a prepare script has made.

    python train.py config/shakespeare_cpu.py
    python train.py config/shakespeare_cpu.py --n_layer=6 --out_dir=out/deeper
    python train.py config/shakespeare_cpu.py --init_from=resume --max_iters=4000
    torchrun --nproc_per_node=2 train.py config/shakespeare_small.py

Writes out/<run>/best.pt, last.pt, metrics.csv and loss.png; python sample.py then shows what it
learned.
"""

import csv
import ctypes
import gc
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from config import configure, stop, stop_on_error
from model import (EOT, GPT, GPTConfig, atomic_write, check_source, compiled, encode_prompt,
                   evaluating, load_checkpoint, load_pretrained, pick_device, save_checkpoint,
                   show_progress, token_dtype, tokenizer_from)

# Run
out_dir = ""                 # where the run is kept; empty: out/<dataset>
init_from = "scratch"        # or resume (a run), gpt2 (-medium, -large, -xl), a folder, a .pt file
checkpoint = ""              # which file of a run to resume; empty: last.pt, best.pt to evaluate
cache_dir = "data/pretrained"  # where gpt2... are kept, once downloaded
eval_only = False            # evaluate every split, also by position in the context, and stop
overwrite = False            # a new run may replace the one in out_dir
seed = 1337
# Data
dataset = "shakespeare_char"  # folder under data/
batch_size = 64              # sequences per forward pass
block_size = 256             # longest context, tokens
document_rows = False        # rows are stories, cut or padded; False: windows of the stream
gradient_accumulation_steps = 1  # batches per step, shared by the processes where there are many
# Model
n_layer = 6
n_head = 6
n_embd = 384
n_inner = 0                  # feed-forward width; 0: 4 * n_embd
bias = True                  # in Linear and LayerNorm
qkv_bias = True              # in the query, key and value projection; needs bias
positions = "learned"        # learned or sinusoidal
scale_embedding = False      # token embeddings * sqrt(n_embd), made for sinusoidal positions
activation = "gelu"          # gelu (GPT-2's), gelu_erf (the exact one) or relu
norm = "pre"                 # pre or post
tied = True                  # the output layer shares the token embedding's matrix
vocab_multiple = 1           # of which the vocabulary is made a multiple: 64 makes GPUs faster
fused = True                 # fused kernels; False: attention, LayerNorm, GELU as their formulas
# Regularization
dropout = 0.2
label_smoothing = 0.0        # in the training loss, never in evaluation
layerdrop = 0.0              # chance to skip a block in training
# Optimizer
optimizer = "adamw"          # adamw, adamw_scratch (written out below) or muon
learning_rate = 1e-3
weight_decay = 0.1           # on matrices only
beta1 = 0.9
beta2 = 0.99
momentum = 0.95              # Muon's
grad_clip = 1.0              # largest gradient norm; 0: any
# Schedule
max_iters = 5000             # steps
max_epochs = 0.0             # passes over the training tokens; > 0 replaces max_iters
warmup_iters = 100           # steps of linear warm-up
decay_lr = True              # False: learning_rate stays as it is after the warm-up
lr_schedule = "cosine"       # shape of the decay: cosine or linear
lr_decay_iters = 0           # step at which min_lr is reached; 0: the last
min_lr = 1e-4
patience = 0                 # stop after this many evaluations without a better val loss; 0: never
# Evaluation, logging, snapshots
eval_interval = 250          # steps; 0: only at the end
eval_epochs = 0.0            # passes over the training tokens; > 0 replaces eval_interval
eval_iters = 0               # batches per split; 0: all of val and as many windows of train
log_interval = 10            # steps; 0: only with an evaluation
sample_interval = 0          # steps between samples of the model's text; 0: none
start = "\n"                 # what those samples continue; FILE:prompt.txt reads a file
save_interval = 0            # steps between saves of last.pt, besides those after an evaluation
snapshot_interval = 0        # steps between kept copies step_N.pt; 0: none
log_grad_norms = False       # each layer's, too: grad_norms.csv, a heat map in loss.png
profile = 0                  # steps to trace after three that warm up: trace.json.gz and a table
plot = True                  # loss.png at each evaluation, where matplotlib is installed
wandb_log = False            # the log's figures to Weights & Biases, too
wandb_project = "gpt2"
wandb_run_name = ""          # empty: the name of the run's folder
# Machine
device = "auto"              # auto, cpu, cuda, cuda:1, mps
dtype = "auto"               # auto, float32, bfloat16 or float16 (CUDA only)
compile = "auto"             # auto (on CUDA), true or false: torch.compile
settings = configure(globals())

# A resumed run may change these; with any other it would be another run.
FREE_ON_RESUME = {
    "out_dir", "init_from", "cache_dir", "checkpoint", "eval_only", "overwrite", "max_iters",
    "max_epochs", "patience", "eval_interval", "eval_epochs", "eval_iters", "log_interval",
    "sample_interval", "start", "save_interval", "snapshot_interval", "log_grad_norms", "profile",
    "plot", "wandb_log", "wandb_project", "wandb_run_name", "device", "dtype", "compile"}

# torchrun starts world_size processes and tells each of them its rank. One takes every
# world_size-th batch of a step, from its rank on; rank 0 prints and writes.
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STOPPING = (signal.SIGINT, signal.SIGTERM)


def main():
    run_dir = Path(out_dir or f"out/{dataset}")
    check_settings(run_dir)
    with stop_on_error(2):
        target = join_processes(pick_device(device))
    keep_memory()
    amp = pick_dtype(target)
    autocast = torch.autocast(target.type, amp, enabled=amp != torch.float32)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it

    meta, tokenizer, data = load_dataset(Path("data") / dataset)
    shape = {field.name for field in fields(GPTConfig)} & settings.keys()
    with stop_on_error(2):
        # Ids that no text has are learned to be unlikely, and never drawn.
        padded = math.ceil(tokenizer.vocab_size / vocab_multiple) * vocab_multiple
        config = GPTConfig(vocab_size=padded, **{n: settings[n] for n in shape})
        prompt = encode_prompt(tokenizer, start) if sample_interval else None
    require_memory(config, target)

    # With the weights and the optimizers' state this is all that a resumed run needs to be the
    # same run: batches and random numbers follow from the step.
    progress = {"step": 0, "seconds": 0.0, "best_step": 0, "best_loss": math.inf, "stale": 0,
                "skipped": 0}
    begin = run_dir / (checkpoint or ("best.pt" if eval_only else "last.pt"))
    if init_from == "resume":
        saved = load_run(begin, tokenizer, target, progress)
        raw, progress, states = saved["model"].train(), saved["progress"], saved["states"]
    elif init_from == "scratch":
        torch.manual_seed(random_seed("weights"))
        raw, states = GPT(config).to(target), []
    else:
        raw, states = load_weights(tokenizer).to(target).train(), []
    print(f"model: {raw.num_params():,} parameters, vocabulary of {config.vocab_size:,}, "
          f"{raw.flops_per_token() / 1e6:,.1f} MFLOPs to train on a token")
    if eval_only:
        source = begin if init_from == "resume" else init_from
        return report(autocast(raw.eval().forward), data, meta["splits"], target, run_dir, source)

    parameters = list(raw.parameters())
    optimizers = make_optimizers(raw)
    scaler = torch.amp.GradScaler(target.type, enabled=amp == torch.float16)
    stateful = [*optimizers, scaler]
    if init_from == "resume":
        restore(stateful, states, begin)
    example = batch(data["train"], 0, 0, target)
    raw.forward = compiled(raw.forward, compile.lower(), target, lambda forward:
                           autocast(forward)(*example)[1].backward())
    raw.zero_grad()
    model = distribute(raw)
    forward = autocast(model.forward)

    rows = batch_size * gradient_accumulation_steps
    steps_per_epoch = data["train"].per_epoch / rows
    steps = math.ceil(max_epochs * steps_per_epoch) if max_epochs else max_iters
    evaluate_every = max(1, round(eval_epochs * steps_per_epoch)) if eval_epochs else eval_interval
    print(f"{optimizer} on {target} in {str(amp)[6:]}: {steps:,} steps of {rows * block_size:,} "
          f"tokens, {steps / steps_per_epoch:.2f} epochs, to {run_dir}"
          + (f", {world_size} processes" if world_size > 1 else ""))
    first = progress["step"]
    if first and first >= steps:
        stop(f"{begin} has {first} steps already, give a larger --max_iters", 2)
    if 0 < profile and steps - first < 3 + profile:
        stop(f"--profile={profile} needs {3 + profile} steps, give a larger --max_iters", 2)
    metrics = open_metrics(run_dir, first, meta["splits"]["val"].get("nats_per_token"), raw)
    signals = catch_signals()
    began = time.time() - progress["seconds"]  # as if the run had never been interrupted
    if first == 0:
        log(metrics, {"step": 0, **losses(raw, forward, data, target)})

    stopped_by = 0  # the signal
    for step in profiled(range(first, steps), run_dir, target):
        done, step_began = step + 1, time.time()
        lr = learning_rate_at(step, steps)
        loss = torch.zeros((), device=target)
        for micro in range(rank, gradient_accumulation_steps, world_size):
            x, y = batch(data["train"], step, micro, target)
            if dropout or layerdrop:  # else nothing is random, and this 2% of the smallest step
                torch.manual_seed(random_seed("dropout", step, micro))
            last = micro + world_size >= gradient_accumulation_steps
            model.require_backward_grad_sync = last or layerdrop > 0
            part = forward(x, y)[1] / gradient_accumulation_steps
            scaler.scale(part * world_size).backward()  # the processes' gradients are averaged
            loss += part.detach()
        for one in optimizers:
            scaler.unscale_(one)
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = total.item()
        layers = layer_norms(raw) if log_grad_norms and every(log_interval, done) else {}
        if 0 < grad_clip < norm:  # clip_grad_norm_ would multiply by 1 where there is none to clip
            nn.utils.clip_grads_with_norm_(parameters, grad_clip, total)
        loss, *stops = summed(target, loss.item(), *(number in signals for number in STOPPING))
        stopped_by = next((number for number, seen in zip(STOPPING, stops) if seen), 0)
        # A float16 step whose gradient overflows is skipped by the scaler, which then scales less.
        require_finite(done, loss=loss, gradient=0.0 if scaler.is_enabled() else norm)
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = lr
            scaler.step(one)
            one.zero_grad()
        scale = scaler.get_scale()
        scaler.update()
        progress["skipped"] += scaler.get_scale() < scale

        now = time.time()
        row = {"step": done, "loss": loss, "lr": lr, "norm": norm, "ms": 1000 * (now - step_began),
               "tok/s": rows * block_size / (now - step_began), "elapsed": now - began,
               "eta": (now - began) * (steps / done - 1), "layers": layers}
        names = []  # of the checkpoints due
        if every(evaluate_every, done) or done == steps:
            row |= losses(raw, forward, data, target)
            progress["stale"] += 1
            if row["val"] < progress["best_loss"]:
                progress |= {"best_loss": row["val"], "best_step": done, "stale": 0}
                names.append("best.pt")
        if every(log_interval, done) or "val" in row:
            log(metrics, row)
        if every(sample_interval, done):
            write_sample(raw, tokenizer, prompt.to(target), done, run_dir / "samples.txt")
        if every(snapshot_interval, done):
            names.append(f"step_{done}.pt")
        leaving = done == steps or stopped_by or 0 < patience <= progress["stale"]
        if names or leaving or "val" in row or every(save_interval, done):
            require_finite(done, val=row.get("val", 0.0),
                           weights=nn.utils.get_total_norm(parameters).item())
            progress |= {"step": done, "seconds": time.time() - began}
            names.append("last.pt")  # last: killed in between, a resumed run writes the others anew
            save_run(run_dir, names, raw, tokenizer, progress, stateful)
        if leaving:
            break

    print_summary(progress, rows, meta["splits"]["val"], run_dir, raw, target)
    if stopped_by:
        print("to go on, give the same command with --init_from=resume")
        return 128 + stopped_by


# ---- settings, machine, interruptions ----

def check_settings(run_dir):
    """Stops at the first value that cannot work, before anything is loaded or written."""
    with stop_on_error(2):
        check_source(init_from, "scratch", "resume")
    for name, choices in {"lr_schedule": ("cosine", "linear"),
                          "optimizer": ("adamw", "adamw_scratch", "muon"),
                          "dtype": ("auto", "float32", "bfloat16", "float16"),
                          "compile": ("auto", "true", "false")}.items():
        value = settings[name].lower() if name == "compile" else settings[name]
        if value not in choices:
            stop(f"--{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}", 2)
    for name in ("batch_size", "block_size", "gradient_accumulation_steps", "vocab_multiple"):
        if settings[name] < 1:
            stop(f"--{name} must be at least 1, not {settings[name]}", 2)
    for name, value in settings.items():
        if not isinstance(value, str) and value < 0:
            stop(f"--{name} must not be negative, not {value}", 2)
    if max(beta1, beta2, momentum) >= 1:
        stop("--beta1, --beta2 and --momentum must be below 1", 2)
    if gradient_accumulation_steps % world_size:
        stop(f"--gradient_accumulation_steps must be a multiple of the {world_size} processes, "
             f"not {gradient_accumulation_steps}", 2)
    if wandb_log and not find_spec("wandb"):
        stop("--wandb_log=True needs the package wandb: pip install wandb, or leave it out", 2)
    if init_from != "resume" and not (eval_only or overwrite) and any(run_dir.glob("*.pt")):
        stop(f"{run_dir} holds a run already, go on with it by --init_from=resume, replace it by "
             f"--overwrite=True or give another --out_dir", 2)


def require_memory(config, target):
    """Stops where not even the weights, their gradients and moments, and the logits of a batch
    with theirs fit: 16 bytes a parameter, 8 a logit."""
    C, width = config.n_embd, config.n_inner or 4 * config.n_embd
    parameters = C * (config.vocab_size + block_size + config.n_layer * (4 * C + 2 * width))
    needed = 16 * parameters + 8 * batch_size * block_size * config.vocab_size
    if target.type == "cuda":
        there = torch.cuda.get_device_properties(target).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = math.inf  # Windows does not say
    if needed > there:
        stop(f"this model and batch need over {needed / 1e9:,.0f} GB, {target} has "
             f"{there / 1e9:,.0f}: make --n_layer, --n_embd or --batch_size smaller", 2)


def pick_dtype(target):
    """What matrices are multiplied in. auto: bfloat16 on GPUs (float16 before Ampere) and, for
    models wide enough to gain, on CPUs that multiply it in hardware; else float32."""
    if dtype == "float16" and target.type != "cuda":
        print(f"float16 needs a CUDA GPU, on {target} dtype is chosen as auto")
    elif dtype != "auto":
        return getattr(torch, dtype)
    if target.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    # On two AMX cores a step of 4 x 64 took 9 ms in float32 and 11 in bfloat16, of 4 x 128 28 and
    # 22, of 6 x 384 618 and 247 (tests/benchmark.py dtype).
    if target.type == "cpu" and (n_embd < 128 or not torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return torch.bfloat16


def keep_memory():
    """Has glibc keep the memory that is freed. It would return large blocks to the kernel, which
    clears them again page by page: a step of 6 x 384 took 2.8 s on two cores, and 1.9 s so."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)   # M_MMAP_MAX: no block apart from the heap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is never returned


def catch_signals():
    """A list that the first SIGINT or SIGTERM lands in, to stop after the step; the next kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)

    for each in STOPPING:
        signal.signal(each, receive)
    return received


# ---- many processes ----

def join_processes(target):
    """Meets the other processes, if there are any; returns the device of this one."""
    if world_size == 1:
        return target
    if target.type == "mps":
        stop("many processes need CUDA or --device=cpu", 2)
    if target.type == "cuda":
        target = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(target)
    if rank:
        sys.stdout = open(os.devnull, "w")
    distributed.init_process_group("nccl" if target.type == "cuda" else "gloo")
    return target


def distribute(raw):
    """raw, its gradients averaged over the processes during backward."""
    if world_size == 1:
        return raw
    device_ids = [raw.wte.weight.device] if raw.wte.weight.is_cuda else None
    return nn.parallel.DistributedDataParallel(raw, device_ids, gradient_as_bucket_view=True,
                                               find_unused_parameters=layerdrop > 0)


def summed(target, *values):
    """Each of the numbers, summed over the processes."""
    if world_size == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=target)
    distributed.all_reduce(sums)
    return sums.tolist()


def require_finite(step, **values):
    """Stops a run whose numbers overflow, before they can replace a good checkpoint."""
    for name, value in values.items():
        if not math.isfinite(value):
            stop(f"step {step}: {name} is {value}, try a lower --learning_rate or --dtype=float32; "
                 f"the checkpoints of the run are as they were")


def every(interval, step):
    return interval > 0 and step % interval == 0


# ---- data ----

def load_dataset(folder):
    """(meta.json, tokenizer, {split: Windows or Documents}) of what a prepare script wrote."""
    text, *more = folder.name.split("_")
    made = {"shakespeare": "shakespeare.py", "tinystories": "tinystories.py",
            "grammar": "tinystories.py --source=grammar"}.get(text)
    if made and more and more[-1] in ("char", "byte", "gpt2", "bpe"):
        made += f" --tokenizer={more[-1]}" + f" --dataset={folder.name}" * (len(more) > 1)
    else:
        made = f"shakespeare.py --source=FILE --dataset={folder.name}"
    remedy = f"make it with python prepare_{made}"
    if not os.path.isfile(folder / "meta.json"):
        stop(f"{folder}: no such dataset, {remedy}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokenizer = tokenizer_from(meta["tokenizer"])
        kind = np.dtype(token_dtype(tokenizer.vocab_size))
        if meta["dtype"] != kind.name:
            raise ValueError(f"its dtype is not {kind}")
        data = {split: np.asarray(np.memmap(folder / f"{split}.bin", kind, "r"))
                for split in meta["splits"]}  # a memmap's own indexing takes three times as long
        for split, tokens in data.items():
            counts = meta["splits"][split]
            if len(tokens) != counts["tokens"]:
                raise ValueError(f"{split}.bin is not as long as meta.json says")
            for unit in ("characters", "bytes"):
                if type(counts[unit]) is not int or counts[unit] < 1:
                    raise ValueError(f"{split} cannot have {counts[unit]} {unit}")
    except ConnectionError as error:  # GPT-2's tokenizer is downloaded
        stop(str(error))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        stop(f"{folder} is damaged ({error}), delete it and {remedy}")
    if not {"train", "val"} <= data.keys():
        stop(f"{folder} has no val split, prepare it with a --val_fraction above 0")
    if document_rows and tokenizer.eot is None:
        stop(f"--document_rows=True needs an end of text after each document, which {folder} does "
             f"not have, prepare it with prepare_tinystories.py", 2)
    for split, tokens in data.items():
        if tokens.max(initial=0) >= tokenizer.vocab_size:
            stop(f"{folder}/{split}.bin has ids outside its vocabulary, delete it and {remedy}")
        data[split] = Documents(tokens, tokenizer.eot) if document_rows else Windows(tokens)
        if data[split].per_epoch < 1 or data[split].phases < 1:
            stop(f"{folder}/{split}.bin: {len(tokens):,} tokens are too few for a block_size of "
                 f"{block_size}, use a longer text or a smaller --block_size", 2)
        counts = meta["splits"][split]
        line = f"{split}: {len(tokens):,} tokens, {counts['characters']:,} characters"
        if document_rows:
            line += f", {data[split].number:,} stories, {data[split].cut:,} of them cut"
        if data[split].cut:
            counts.pop("nats_per_token", None)  # of whole stories; their beginnings have another
        if "nats_per_token" in counts:
            line += f", entropy {counts['nats_per_token']:.4f}: no honest loss is lower"
        print(line)
    return meta, tokenizer, data


class Windows:
    """The rows of a split of (N,) ids: windows of block_size tokens and the one after."""
    cut = 0

    def __init__(self, tokens):
        self.tokens = tokens
        self.number = math.ceil((len(tokens) - 1) / block_size)     # side by side, the last shorter
        self.phases = min(block_size, len(tokens) - block_size)     # where an epoch's may begin
        self.per_epoch = (len(tokens) - self.phases) // block_size  # that fit wherever they do

    def span(self, row, phase=0):
        """Where rows (B,) begin, and where their last targets are."""
        first = phase + block_size * row
        return first, np.minimum(first + block_size, len(self.tokens) - 1)


class Documents:
    """The rows of a split: its documents, cut at block_size, each with the end of the one before,
    from which its first token is predicted."""
    phases = 1

    def __init__(self, tokens, eot):
        self.tokens = tokens
        self.ends = np.concatenate([at + np.flatnonzero(tokens[at:at + 2 ** 24] == eot)
                                    for at in range(0, len(tokens) + 1, 2 ** 24)])
        self.number = self.per_epoch = len(self.ends) - 1
        self.cut = int((np.diff(self.ends) > block_size).sum())

    def span(self, row, phase=0):
        first = self.ends[row]
        return first, np.minimum(first + block_size, self.ends[row + 1])


def read_rows(rows, first, last, target):
    """Inputs x and targets y, (B, T) each, from the (B,) places of the first input and the last
    target; behind these x repeats it and y is -1, which no loss counts."""
    at, last = first[:, None] + np.arange(block_size + 1), last[:, None]
    ids = rows.tokens[np.minimum(at, last)].astype(np.int64)
    x, y = ids[:, :-1], np.where(at > last, -1, ids)[:, 1:]
    return torch.from_numpy(x).to(target), torch.from_numpy(y).to(target)


def random_seed(purpose, *indices):
    """64 random bits that follow from (seed, purpose, indices) alone, never from history."""
    sequence = np.random.SeedSequence([seed, *purpose.encode(), *indices])
    return int(sequence.generate_state(1, np.uint64)[0])


@lru_cache(maxsize=2)  # a batch may hold the end of one epoch and the start of the next
def epoch_order(rows, epoch):
    """The phase of an epoch and the order of its rows, 4 bytes each: windows lie side by side from
    a random first one, so that each token is a target once, but for fewer than two windows at the
    two ends."""
    generator = np.random.default_rng(random_seed("epoch", epoch))
    phase = int(generator.integers(rows.phases))
    order = np.arange(rows.per_epoch, dtype=np.uint32)
    generator.shuffle(order)
    return phase, order


def batch(rows, step, micro, target="cpu"):
    """Inputs x and targets y, (B, T) each: rows of the endless sequence of epochs that follow from
    (seed, step, micro) alone. Rank r of N takes the micro-steps r, r + N, ... of each step."""
    number = (step * gradient_accumulation_steps + micro) * batch_size
    end, spans = number + batch_size, []
    while number < end:
        epoch, at = divmod(number, rows.per_epoch)
        phase, order = epoch_order(rows, epoch)
        some = order[at:at + end - number]  # of this epoch
        spans.append(rows.span(some.astype(int), phase))
        number += len(some)
    return read_rows(rows, *map(np.concatenate, zip(*spans)), target)


# ---- optimizers and schedule ----

def make_optimizers(model):
    """Decay on matrices (embeddings too), none on biases and gains. Muon takes the hidden matrices
    (Jordan et al. 2024), its updates scaled to AdamW's size: one learning_rate serves both."""
    adamw = AdamW if optimizer == "adamw_scratch" else partial(torch.optim.AdamW, fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in model.h.parameters() if p.dim() == 2] if optimizer == "muon" else []
    taken = set(hidden)
    groups = [{"params": [p for p in trained if p.dim() >= 2 and p not in taken],
               "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [adamw(groups, lr=learning_rate, betas=(beta1, beta2))]
    if hidden:
        optimizers.append(Muon(hidden, learning_rate, momentum, weight_decay))
    return optimizers


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), written out."""

    def __init__(self, params, lr, betas, eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                t, m, v = state["t"], state["m"], state["v"]
                m.copy_(beta1 * m + (1 - beta1) * p.grad)       # mean of the gradient
                v.copy_(beta2 * v + (1 - beta2) * p.grad ** 2)  # mean of its square
                m_hat = m / (1 - beta1 ** t)                    # both started at zero: unbias
                v_hat = v / (1 - beta2 ** t)
                p *= 1 - group["lr"] * group["weight_decay"]    # beside the gradient, not in it
                p -= group["lr"] * m_hat / (v_hat.sqrt() + group["eps"])


class Muon(torch.optim.Optimizer):
    """Momentum, turned into the nearest matrix whose singular values are all about 1 (Jordan et al.
    2024), as large as AdamW's updates are (Liu et al. 2025). Matrices of one shape go together, in
    half of the time that torch.optim.Muon takes for one after another."""

    def __init__(self, params, lr, momentum, weight_decay=0.0):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, {"params": []})["params"].append(p)
        super().__init__(shapes.values(), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
            means = [self.state[p]["m"] for p in params]
            grads = torch.stack([p.grad for p in params])  # (N, rows, columns)
            m = torch.stack(means).lerp_(grads, 1 - group["momentum"])
            torch._foreach_copy_(means, list(m))
            update = orthogonal(grads.lerp_(m, group["momentum"]))  # Nesterov's, one step ahead
            size = 0.2 * math.sqrt(max(params[0].shape))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update), alpha=-group["lr"] * size)


def orthogonal(x):
    """(N, rows, columns) -> the same with singular values of about 1: five steps of a polynomial,
    a s + b s^3 + c s^5 of each, whose coefficients Jordan et al. chose to lift small ones fast."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = (x.mT if x.shape[1] > x.shape[2] else x).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        yy = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(yy, yy, yy, beta=b, alpha=c), y, beta=a)
    return (y.mT if x.shape[1] > x.shape[2] else y).type_as(x)


def learning_rate_at(step, steps):
    """Linear warm-up to learning_rate, then a cosine or a line down to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    progress = min(1.0, (step - warmup_iters) / max(1, (lr_decay_iters or steps) - warmup_iters))
    left = 1 - progress if lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + left * (learning_rate - min_lr)


# ---- evaluation ----

def eval_batches(rows, target, max_batches):
    """This process's share of the batches of a whole split, in which each token is predicted once;
    max_batches > 0 takes as many batches of rows, evenly spread."""
    count = min(rows.number, max_batches * batch_size or rows.number)
    chosen = np.linspace(0, rows.number - 1, count).round().astype(int)
    together = max(batch_size, 2048 // block_size)  # fewer tokens at a time take longer
    batches = np.split(chosen, range(together, count, together))[rank::world_size]
    for done, some in enumerate(batches, 1):
        if rank == 0:
            show_progress(f"evaluating, batch {done:,} of {len(batches):,}"
                          if done < len(batches) else "")
        yield read_rows(rows, *rows.span(some), target)


@torch.no_grad()
def evaluate(model, rows, target="cpu", max_batches=0):
    """Mean nats per token of a split."""
    loss = counted = 0
    for x, y in eval_batches(rows, target, max_batches):
        n = (y >= 0).sum().item()
        loss += model(x, y)[1].item() * n
        counted += n
    loss, counted = summed(target, loss, counted)
    return loss / counted


def losses(raw, model, data, target):
    """{"train", "val"} losses in nats per token, exact on val, on as many rows of train."""
    cap = eval_iters or math.ceil(data["val"].number / batch_size)
    with evaluating(raw):
        return {"train": evaluate(model, data["train"], target, cap),
                "val": evaluate(model, data["val"], target, eval_iters)}


@torch.no_grad()
def evaluate_positions(model, rows, target="cpu", max_batches=0):
    """(3, block_size) sums over a split, by the position in its rows: nats, tokens of which the
    likeliest was right, tokens."""
    sums = torch.zeros(3, block_size, dtype=torch.float64)
    for x, y in eval_batches(rows, target, max_batches):
        logits = model(x)[0]
        nats = [F.cross_entropy(row.float(), wanted, ignore_index=-1, reduction="none")
                for row, wanted in zip(logits, y)]  # a row at a time: the floats of all are many
        right = logits.max(dim=-1).indices == y     # on a CPU a third of argmax's time
        sums += torch.stack((torch.stack(nats), right, y >= 0)).sum(dim=1).cpu()
    return torch.tensor(summed(target, *sums.flatten().tolist()), dtype=sums.dtype).view(3, -1)


def bits_per(unit, loss, counts):
    """Nats per token -> bits per one of the split's characters, which compares across tokenizers,
    or bytes."""
    return loss * counts["tokens"] / counts[unit] / math.log(2)


def report(model, data, splits, target, run_dir, source):
    """The tables of eval_only: every split, whole unless eval_iters caps it, and its loss by the
    position in the context, whose curve goes to loss_by_position.png."""
    found = {split: evaluate_positions(model, rows, target, eval_iters)
             for split, rows in data.items()}
    print("  split        tokens     loss  perplexity  bits/char  bits/byte  accuracy")
    for split, sums in found.items():
        nats, right, tokens = sums.sum(dim=1).tolist()
        bits = [bits_per(unit, nats / tokens, splits[split]) for unit in ("characters", "bytes")]
        print(f"{split:>7}{tokens:>14,.0f}{nats / tokens:>9.4f}{math.exp(nats / tokens):>12.3f}"
              f"{bits[0]:>11.4f}{bits[1]:>11.4f}{right / tokens:>10.2%}")
    print("   position" + "".join(f"{split:>9}" for split in found))
    first = 0
    while first < block_size:
        last = min(2 * first or 1, block_size)  # 1, 2, 3-4, 5-8, ...
        parts = [sums[:, first:last].sum(dim=1) for sums in found.values()]
        print(f"{f'{first + 1}-{last}' if last > first + 1 else last:>11}"
              + "".join(f"{nats / tokens:>9.4f}" for nats, _, tokens in parts))
        first = last
    if rank == 0 and can_draw():
        run_dir.mkdir(parents=True, exist_ok=True)
        draw_positions(run_dir / "loss_by_position.png", source, found)


# ---- what a run writes ----

COLUMNS = {  # name: (width, format)
    "step": (8, ",d"), "loss": (9, ".4f"), "train": (9, ".4f"), "val": (9, ".4f"),
    "lr": (10, ".2e"), "norm": (8, ".3f"), "ms": (9, ".1f"), "tok/s": (11, ",.0f"),
    "elapsed": (9, ",.0f"), "eta": (9, ",.0f")}  # the last two in seconds


@contextmanager
def writing(path):
    """Stops with a sentence where path cannot be written, on a full disk say."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save may turn the one into the other
        reasons = (getattr(e, "strerror", None) for e in (error, error.__context__))
        reason = next(filter(None, reasons), type(error).__name__)
        stop(f"{path} cannot be written ({reason}), make room and go on with --init_from=resume: "
             f"what was saved before is whole")


def open_metrics(run_dir, step, floor, raw):
    """Functions that keep a row: in metrics.csv, grad_norms.csv, loss.png, drawn from both,
    and wandb. A new run removes what another has left."""
    print("".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items()))
    if rank:
        return []
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if init_from != "resume":
            for pattern in ("last.pt", "best.pt", "step_*.pt", "metrics.csv", "grad_norms.csv",
                            "loss.png", "loss_by_position.png", "trace.json.gz", "samples.txt"):
                for old in run_dir.glob(pattern):
                    old.unlink()
    keepers = [open_table(run_dir / "metrics.csv", COLUMNS, step)]
    if log_grad_norms:
        layers = open_table(run_dir / "grad_norms.csv", ["step", *layer_norms(raw)], step)
        keepers.append(lambda row: row.get("layers") and layers(row | row["layers"]))
    if can_draw():
        keepers.append(lambda row: math.isfinite(row.get("val", math.nan))
                       and draw_curves(run_dir, floor))
    if wandb_log:
        import wandb
        board = wandb.init(project=wandb_project, name=wandb_run_name or run_dir.name,
                           config=settings)
        keepers.append(lambda row: board.log(row, step=row["step"]))
    return keepers


def open_table(path, columns, step):
    """A function that appends a row, {column: value}, to a csv file, behind the rows up to step
    that it has already."""
    with writing(path):
        rows = path.read_text("utf-8", "replace").splitlines()[1:] if path.exists() else []
        rows = [row for row in rows if row.count(",") == len(columns) - 1  # else cut by a kill
                and int(row.partition(",")[0]) <= step]
        with atomic_write(path) as file:
            file.write("\n".join([",".join(columns), *rows, ""]).encode())
        file = open(path, "a", newline="", encoding="utf-8", buffering=1)  # a line at a time
    table = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")

    def keep(row):
        with writing(path):
            table.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                            for name, value in row.items()})
    return keep


def log(metrics, row):
    """One line on the terminal and in each of metrics; what a row lacks stays blank."""
    print("".join(f"{row[name]:{width}{form}}" if name in row else " " * width
                  for name, (width, form) in COLUMNS.items()), flush=True)
    for keep in metrics:
        keep(row)


def write_sample(raw, tokenizer, ids, step, path, length=200):
    """Prints how the model goes on from ids (1, T), and appends it to path."""
    if rank:
        return
    generator = torch.Generator().manual_seed(random_seed("sample", step))
    out = raw.generate(ids, length, generators=[generator], eot=tokenizer.eot,
                       vocab_size=tokenizer.vocab_size)
    text = tokenizer.decode(out[0].tolist()).replace(EOT, "")
    with writing(path), open(path, "a", encoding="utf-8") as file:
        print(f"---- step {step} ----\n{text}", file=file)
    print(f"---- a sample at step {step} ----\n{text}\n----")


def save_run(run_dir, names, raw, tokenizer, progress, stateful):
    """Writes all that resuming needs, once under each name."""
    for name in names if rank == 0 else ():
        with writing(run_dir / name):
            save_checkpoint(run_dir / name, raw, tokenizer, settings=settings, progress=progress,
                            states=[part.state_dict() for part in stateful])


def load_weights(tokenizer):
    """The GPT that init_from names, cropped to block_size; its sizes are its own, dropout and the
    like are this run's."""
    own = ("block_size", "dropout", "label_smoothing", "layerdrop", "fused")
    with stop_on_error():
        model, theirs = load_pretrained(init_from, cache_dir, **{n: settings[n] for n in own})
    if theirs.spec != tokenizer.spec:
        stop(f"{init_from} reads other tokens than data/{dataset}, prepare data with the "
             f"tokenizer {theirs.spec['kind']}, and the same text where it is char")
    return model


def load_run(path, tokenizer, target, progress):
    """The checkpoint at path, if its settings and tokenizer are this run's."""
    with stop_on_error():
        saved = load_checkpoint(path, target)
    try:
        kinds = {name: type(value) for name, value in saved["progress"].items()}
        if kinds != {name: type(value) for name, value in progress.items()} or (
                min(saved["progress"].values()) < 0):
            raise ValueError
        saved["settings"].items(), saved["states"]
    except (KeyError, AttributeError, ValueError):
        stop(f"{path} holds a model but not the state of its training, train from scratch")
    if saved["tokenizer"].spec != tokenizer.spec:
        stop(f"{path} was trained with another tokenizer than that of data/{dataset}, "
             f"give the dataset it was trained on")
    changed = [f"--{name}={value}" for name, value in saved["settings"].items()
               if name not in FREE_ON_RESUME and settings.get(name) != value]
    if changed:
        stop(f"{path} was trained with {' '.join(changed)}, resume it with the same "
             f"or train anew in another --out_dir", 2)
    return saved


def restore(stateful, states, path):
    """Gives the optimizers and the scaler the states they were saved in; what their settings are
    is this run's to say."""
    try:
        for part, state in zip(stateful, states, strict=True):
            own = part.state_dict()
            if "param_groups" in own:
                state = {"state": state["state"], "param_groups": own["param_groups"]}
            if state:  # a scaler's is empty unless it was a float16 run
                part.load_state_dict(state)
            for p, kept in getattr(part, "state", {}).items():
                for value in kept.values():
                    if torch.is_tensor(value) and value.shape not in (p.shape, ()):
                        raise ValueError("its state is that of other weights")
    except (KeyError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        stop(f"{path} does not hold the state of this run's optimizer ({error}), train again")


# Operations per second that a GPU states for bfloat16 (T4: float16), without sparsity.
PEAKS = {"T4": 65e12, "A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12}


def print_summary(progress, rows, counts, run_dir, raw, target):
    done, seconds, loss = progress["step"], progress["seconds"], progress["best_loss"]
    speed = done * rows * block_size / max(seconds, 1e-9)  # tokens/s
    gpu = torch.cuda.get_device_name(target) if target.type == "cuda" else ""
    peak = next((peak for name, peak in PEAKS.items() if name in gpu), 0) * world_size
    mfu = f"{raw.flops_per_token() * speed / peak:.1%}" if peak else "n/a"
    if 0 < patience <= progress["stale"]:
        print(f"stopped early, after {progress['stale']} evaluations without a better val loss")
    if progress["best_step"]:
        print(f"best val loss {loss:.4f} at step {progress['best_step']:,}: perplexity "
              f"{math.exp(loss):.3f}, {bits_per('characters', loss, counts):.4f} bits per "
              f"character, in {run_dir}/best.pt")
        if floor := counts.get("nats_per_token"):
            print(f"the text's own entropy is {floor:.4f}, the loss "
                  f"{loss / floor - 1:.1%} above it")
    if progress["skipped"]:
        print(f"{progress['skipped']:,} steps skipped, whose float16 gradients overflowed")
    print(f"{done:,} steps in {seconds:,.1f} s, evaluations included: {speed:,.0f} tokens/s, "
          f"MFU {mfu}, peak memory {peak_memory(target) / 1e6:,.0f} MB")


def peak_memory(target):
    """Bytes: of the GPU where one is used, else of the whole process."""
    if target.type == "cuda":
        return torch.cuda.max_memory_allocated(target)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)


# ---- looking closer: norms, pictures, a profile ----

def layer_norms(raw):
    """{layer: norm of its gradient}, 0 where it has none; the squares add up to that of all."""
    layers = {}
    for name, p in raw.named_parameters():
        layers.setdefault(re.match(r"h\.\d+|\w+", name)[0], []).append(p.grad)
    return {layer: nn.utils.get_total_norm([g for g in grads if g is not None]).item()
            for layer, grads in layers.items()}


def can_draw():
    """Whether pictures are wanted and possible; where they are only wanted it says so."""
    found = find_spec("matplotlib")
    if plot and not found:
        print("no pictures without matplotlib: pip install matplotlib, or --plot=False")
    return plot and found


def read_table(path):
    """The rows of a csv file, {column: text} each; none where there is no file."""
    with open(path if path.exists() else os.devnull, newline="") as file:
        return list(csv.DictReader(file))


def draw_curves(run_dir, floor=None):
    """Draws loss.png: losses, perplexity on the right, the best step and the text's own entropy
    (floor) where it is known; learning rate and gradient norm; each layer's where they are kept."""
    from matplotlib.figure import Figure
    rows, norms = (read_table(run_dir / name) for name in ("metrics.csv", "grad_norms.csv"))
    rows = rows[len(rows) > 2:]  # step 0, which says ln(vocabulary), would flatten the rest
    figure = Figure(figsize=(8, 9 if norms else 6), dpi=100, layout="constrained")
    panels = figure.subplots(3 if norms else 2, sharex=True,
                             height_ratios=(2, 1, 1.4) if norms else (2, 1))
    top, bottom, right = *panels[:2], panels[1].twinx()
    for axes, name, label, style in (  # colours that the colour-blind tell apart, too
            (top, "loss", "training batches", dict(color="#999999", linewidth=0.7)),
            (top, "train", "train", dict(color="#0072B2", marker=".")),
            (top, "val", "validation", dict(color="#D55E00", marker=".")),
            (bottom, "lr", "learning rate", dict(color="#009E73")),
            (right, "norm", "gradient norm", dict(color="#CC79A7", linewidth=0.7))):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points) if points else ([], []), label=label, **style)
    vals = [(float(row["val"]), int(row["step"])) for row in rows if row["val"]]
    loss, best = min(vals)
    top.plot(best, loss, "*", color="black", markersize=12, label=f"best: {loss:.4f} at {best:,}")
    if floor:
        top.axhline(floor, color="black", linestyle=":", label=f"entropy of the text: {floor:.4f}")
    highest = 1.1 * max(vals)[0] if len(vals) > 1 else None  # the first batches lie far above
    top.set(title=f"{run_dir}: loss", ylabel="nats per token", ylim=(None, highest))
    perplexity = top.secondary_yaxis("right")
    perplexity.set_ylabel("perplexity")
    perplexity.yaxis.set_major_formatter(lambda loss, _: f"{math.exp(min(loss, 99)):,.4g}")
    top.legend()
    bottom.set_ylabel("learning rate")
    right.set_ylabel("gradient norm")
    bottom.legend(handles=[*bottom.lines, *right.lines], loc="lower center", ncols=2,
                  bbox_to_anchor=(0.5, 1))
    if norms:
        layers = [name for name in norms[0] if name != "step"]
        heat = panels[2].pcolormesh([int(row["step"]) for row in norms], layers,
                                    [[float(row[name]) for row in norms] for name in layers],
                                    norm="log", cmap="viridis")  # what is not finite stays blank
        panels[2].tick_params("y", labelsize=7)
        figure.colorbar(heat, ax=panels[2], label="gradient norm by layer", location="bottom",
                        shrink=0.5, aspect=40)
    panels[-1].set_xlabel("step")
    save_figure(figure, run_dir / "loss.png")


def draw_positions(path, source, found):
    """Draws the mean loss at each position of the context, of {split: evaluate_positions()}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (split, (nats, _, tokens)), color in zip(found.items(), ("#0072B2", "#D55E00", "#009E73")):
        axes.plot(range(1, len(nats) + 1), (nats / tokens).numpy(), label=split, color=color)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title=f"{source}: loss by position", ylabel="nats per token",
             xlabel="tokens in the context, the one just read included")
    axes.legend()
    save_figure(figure, path)


def save_figure(figure, path):
    with writing(path), atomic_write(path) as file:
        figure.savefig(file, format="png")


def profiled(steps, run_dir, target):
    """steps, of which torch.profiler traces --profile after three that warm up: trace.json.gz is
    for ui.perfetto.dev, and a table lists what took most of their time."""
    if not profile or rank:
        yield from steps
        return
    gpu = target.type == "cuda"
    took, memory = (f"self_{'device' if gpu else 'cpu'}_{what}"
                    for what in ("time_total", "memory_usage"))

    def ready(watcher):
        path = run_dir / "trace.json.gz"
        with writing(path):
            watcher.export_chrome_trace(f"{path}.tmp.gz")  # by this name it is compressed
            os.replace(f"{path}.tmp.gz", path)
        rows = [(getattr(o, took) / 1000 / profile, o.count / profile,
                 getattr(o, memory) / 1e6 / profile, o.key.replace("ProfilerStep*", "Python"))
                for o in watcher.key_averages()]
        whole = sum(ms for ms, *_ in rows)
        print(f"{'ms':>9}{'share':>8}{'calls':>8}{'MB':>11}  of a step; {profile} of them: {path}")
        for ms, calls, megabytes, name in sorted(rows, reverse=True)[:15]:
            print(f"{ms:>9,.2f}{ms / whole:>8.1%}{calls:>8,.0f}{megabytes:>11,.1f}  {name:.60}")

    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
            + gpu * [torch.profiler.ProfilerActivity.CUDA],
            schedule=torch.profiler.schedule(wait=1, warmup=2, active=profile, repeat=1),
            on_trace_ready=ready, profile_memory=True) as watcher:
        for step in steps:
            yield step
            watcher.step()


if __name__ == "__main__":
    status = main()
    if world_size > 1:  # else one run in six aborts at exit, the group's threads still there
        gc.collect()    # what is left of DDP, which holds the group
        distributed.destroy_process_group()
    sys.exit(status)
