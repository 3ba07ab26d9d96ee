"""Trains a GPT on a dataset that a prepare script has made.

    python train.py config/shakespeare_cpu.py
    python train.py config/shakespeare_cpu.py --n_layer=6 --out_dir=out/deeper
    torchrun --nproc_per_node=2 train.py config/shakespeare_small.py

Writes out/<run>/best.pt, last.pt, metrics.csv and loss.png; python sample.py then writes text.
"""

import ctypes
import errno
import gc
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from config import (SIGNALS, at_least, catch_signals, configure, dataset_name,
                    declared_settings, one_of, require, stop_on_error)
from model import (EOT, GPT, PRETRAINED, CudaGraph, GPTConfig, KVCache, atomic_write,
                   encode_prompt, load_checkpoint, pick_device, pick_dtype, reading, run_file,
                   save_checkpoint, show_progress, tokenizer_from, tried, unescape, use_product)

# Run
out_dir = ""                 # where the run is kept; empty: out/<dataset>
init_from = "scratch"        # or resume, gpt2 (-medium, -large, -xl), a folder, a .pt file
checkpoint = ""              # of a run to resume; empty: last.pt, with eval_only best.pt
cache_dir = "data/pretrained"  # where gpt2... are kept, once downloaded
eval_only = False            # evaluate every split, also by position in the context, and stop
summary = False              # show each tensor, each shape and the memory, and stop
overwrite = False            # a new run may replace the one in out_dir
# Length
max_iters = 5000             # steps
max_epochs = 0.0             # passes over the training tokens; > 0 replaces max_iters
max_minutes = 0.0            # of the run, evaluations included; > 0 replaces both
patience = 0                 # evaluations without a better val loss that stop it; 0: never
# Data
seed = 1337                  # of the weights, batches and dropout
dataset = "shakespeare_char"  # folder under data/
batch_size = 64              # sequences per forward pass
block_size = 256             # longest context, tokens
document_rows = False        # train on documents, padded, as evaluations do; False: on windows
gradient_accumulation_steps = 1  # batches per step, shared by the processes
# Model
n_layer = 6
n_head = 6
n_embd = 384
n_inner = 0                  # width of the MLP; 0: 4 * n_embd
bias = True                  # in Linear and LayerNorm
qkv_bias = True              # in the query, key and value projection; needs bias
positions = "learned"        # learned or sinusoidal
scale_embedding = False      # token embeddings * sqrt(n_embd), for sinusoidal positions
activation = "gelu"          # gelu (GPT-2's), gelu_erf (the exact one) or relu
norm = "pre"                 # pre or post
tied = True                  # the output layer shares the token embedding's matrix
vocab_multiple = 1           # pads the vocabulary to a multiple of it: 64 makes GPUs faster
fused = True                 # fused kernels; False: the formulas of attention, LayerNorm, GELU
# Regularization
dropout = 0.2
attn_dropout = True          # of the attention weights, too; False is faster on a CPU
label_smoothing = 0.0        # in the training loss, never in evaluation
layerdrop = 0.0              # chance to skip a block in training
# Optimizer
optimizer = "adamw"          # adamw, adamw_scratch (written out below) or muon
learning_rate = 1e-3
weight_decay = 0.1           # on matrices only
beta1 = 0.9
beta2 = 0.99
momentum = 0.95              # Muon's
grad_clip = 1.0              # largest gradient norm; 0: no clipping
# Schedule
warmup_iters = 100           # steps of linear warm-up
decay_lr = True              # False: learning_rate stays as it is after the warm-up
lr_schedule = "cosine"       # shape of the decay: cosine or linear
lr_decay_iters = 0           # steps after which min_lr is reached; 0: all
min_lr = 1e-4
# Evaluation and log
eval_interval = 250          # steps; 0: only at the end
eval_epochs = 0.0            # passes over the training tokens; > 0 replaces eval_interval
eval_iters = 0               # batches per split; 0: all of val and as many rows of train
log_interval = 10            # steps; 0: only with an evaluation
sample_interval = 0          # steps between samples of the model's text; 0: none
start = ""                   # what those samples continue; FILE:prompt.txt reads a file
save_interval = 0            # steps between saves of last.pt, besides those of evaluations
snapshot_interval = 0        # steps between kept copies step_N.pt; 0: none
log_grad_norms = False       # each layer's, and update / weight: grad_norms.csv, maps in loss.png
profile = 0                  # steps to trace, after three of warm-up: trace.json.gz, a table
plot = True                  # loss.png at each evaluation, where matplotlib is installed
wandb_log = False            # the log's figures to Weights & Biases, too
wandb_project = "gpt2"
wandb_run_name = ""          # empty: the name of the run's folder
# Machine
device = "auto"              # auto, cpu, cuda, cuda:1, mps
dtype = "auto"               # auto, float32, bfloat16, float16 (CUDA); with eval_only int8 (CPU)
compile = "auto"             # auto (on CUDA), true or false: torch.compile
cuda_graph = True            # on CUDA launch a batch's kernels at once; one process, no layerdrop
deterministic = False        # on CUDA, too, the same run gives the same bits, slower
settings = configure(globals())
dataset = settings["dataset"] = dataset_name(dataset)

# A resumed run may change these; with any other it would be another run.
FREE_ON_RESUME = {name for name, setting in declared_settings(__file__).items()
                  if setting.section in ("Run", "Length", "Evaluation and log", "Machine")}

# torchrun starts world_size processes and tells each of them its rank. Each takes
# every world_size-th batch of a step, from its rank on; rank 0 prints and writes.
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def main(cleanup):
    # ---- the machine ----
    run_dir = Path(out_dir or f"out/{dataset}")
    check_settings(run_dir)
    with stop_on_error(2):
        device = join_processes(pick_device(settings["device"]))  # hides the setting
    keep_memory()
    spare_compiler()
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    KVCache.graphs = cuda_graph  # of samples
    if deterministic and device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_cudnn_sdp(False)  # two kernels of attention are not
        torch.backends.cuda.enable_mem_efficient_sdp(False)

    # ---- the data ----
    meta, tokenizer, data, rows = load_dataset(Path("data", dataset))
    guesses = baselines(data["train"].tokens, data["val"].tokens, tokenizer.vocab_size)
    print("loss of val by counts of train: " + ", ".join(
        f"{name} {loss:.4f}" for name, loss in guesses.items()))
    if floor := meta["splits"]["val"].get("nats_per_token"):
        guesses["entropy of the text"] = floor
    checksums = {split: zlib.crc32(part.tokens) for split, part in data.items()}
    # Ids that pad the vocabulary stand in no text: the model learns that they are unlikely.
    padded = math.ceil(tokenizer.vocab_size / vocab_multiple) * vocab_multiple
    shape = {name: settings[name] for name in GPTConfig.__annotations__ if name in settings}
    with stop_on_error(2):
        config = GPTConfig(vocab_size=padded, **shape)
        require_memory(config, device)
        prompt = (encode_prompt(tokenizer, unescape(start), document_rows)
                  if sample_interval else None)

    # ---- the model, raw: of a run, new, or with the weights of others ----
    # With weights and moments, all that a resumed run needs: batches and dropout follow from step.
    progress = dict(step=0, seconds=0.0, best_step=0, best_loss=math.inf, best_train=math.nan,
                    best_accuracy=math.nan, stale=0, skipped=0)
    source, states, saved = init_from, [], {}
    if init_from == "resume":
        source = run_file(run_dir, checkpoint or ("best.pt" if eval_only else "last.pt"))
        saved = load_model(source, tokenizer, device)
        raw = saved["model"]
        progress, states = training_state(saved, source, progress, checksums)
    elif init_from == "scratch":
        torch.manual_seed(random_seed("weights"))
        raw = GPT(config).to(device)
    else:  # in its own sizes, with this run's dropout and the like
        changes = {name: settings[name] for name in (
            "block_size", "dropout", "attn_dropout", "label_smoothing", "layerdrop", "fused")}
        raw = load_model(source, tokenizer, device, **changes)["model"]
        require_memory(raw.config, device)
    print(f"model: {raw.num_params():,} parameters, vocabulary of {raw.config.vocab_size:,}, "
          f"{raw.flops_per_token() / 1e6:,.1f} MFLOPs to train on a token")
    # Mixed precision: products in amp, weights in float32.
    amp = choose_dtype(raw, saved, device)
    autocast = torch.autocast(device.type, amp, enabled=amp != torch.float32)
    if summary:
        return print_modules(raw, autocast, rows, device)
    if eval_only:
        return report(autocast(raw.eval().forward), data, meta, device, run_dir, source)

    # ---- the optimizers, and the model compiled and shared by the processes ----
    parameters = list(raw.train().parameters())
    optimizers = make_optimizers(raw)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    stateful = [*optimizers, scaler]
    if init_from == "resume":
        restore(stateful, states, source)
    compile_blocks(raw, autocast, rows, device)
    model = raw  # DDP may wrap model; raw is evaluated and saved
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(raw, gradient_as_bucket_view=True,
                                                    find_unused_parameters=layerdrop > 0)
    forward = autocast(model.forward)

    def add_gradients(x, y, parts):
        """Adds the gradients of share = loss / parts; parts: the step's targets / this batch's.
        The shares of a step's batches add up to its mean loss. Returns share."""
        if gradient_accumulation_steps == 1:
            raw.zero_grad()  # none to add to: a graph that only writes is faster
        share = forward(x, y)[1] / parts
        scaler.scale(share * world_size).backward()  # DDP divides by world_size
        return share.detach()

    graphed = device.type == "cuda" and cuda_graph and world_size == 1 and not layerdrop
    if graphed:
        batch = read_rows(rows, row_spans(rows, 0, 0), device)
        add_gradients(*batch, 1.0)  # what is wrong with it shows here, with a traceback
        with stop_on_error(), reading("this model as a graph", ", try --cuda_graph=False"):
            add_gradients = CudaGraph(add_gradients, *batch, torch.ones((), device=device))

    # ---- the run ----
    step_rows = batch_size * gradient_accumulation_steps
    step_tokens = step_rows * rows.targets  # without padding
    steps_per_epoch = rows.number / step_rows
    first, steps = progress["step"], math.ceil(max_epochs * steps_per_epoch) or max_iters
    evaluate_every = max(1, round(eval_epochs * steps_per_epoch)) if eval_epochs else eval_interval
    require(not 0 < patience <= progress["stale"], f"{source} stopped early, raise --patience")
    each_step, each_evaluation = time_a_step(add_gradients, rows, data["val"], device)
    raw.zero_grad(set_to_none=not graphed)
    if max_minutes:
        left = 60 * max_minutes - progress["seconds"] - each_evaluation * (first == 0)
        steps = max(1, first + steps_in(left, each_step, each_evaluation, evaluate_every, device))
    require(first < steps or not first, f"{source} has {first} steps, raise --max_iters, "
            "--max_epochs or --max_minutes")
    require(not profile or steps - first >= 3 + profile,
            f"--profile={profile} needs {3 + profile} steps, raise --max_iters, "
            "--max_epochs or --max_minutes")
    print(f"{optimizer} on {device} in {str(amp)[6:]}: {steps:,} steps of "
          f"{step_tokens:,.0f} tokens, {steps / steps_per_epoch:.2f} epochs, to {run_dir}"
          + f", {world_size} processes" * (world_size > 1))
    evaluations = (steps - first) / (evaluate_every or max(1, steps)) + (first == 0)
    minutes = ((steps - first) * each_step + evaluations * each_evaluation) / 60
    moments = 8 * raw.num_params() * (first == 0)  # AdamW's, not there yet in a new run
    print(f"about {minutes:,.1f} min and {(peak_memory(device) + moments) / 1e9:.1f} GB here")
    replaced = open_run(run_dir, first) if rank == 0 else set()
    signals, stopped_by = cleanup.enter_context(catch_signals()), 0
    profiler = start_profiler(run_dir, device, signals)
    began = time.perf_counter() - progress["seconds"]  # as if the run had never been interrupted
    if first == 0:
        log({"step": 0, **losses(raw, autocast, data, device)}, run_dir, guesses, signals)
        each_evaluation = time.perf_counter() - began
    intervals = (log_interval or 10, evaluate_every, save_interval, sample_interval,
                 snapshot_interval)
    last_sync, clock = first, time.perf_counter()
    stepping = 0.0  # seconds, in steps alone

    for step in itertools.count(first) if steps > first else ():  # max_minutes moves the end
        # ---- one step ----
        done, lr = step + 1, learning_rate_at(step, steps)
        # A GPU works on behind Python until a number is read from it: only where one is needed.
        sync = (device.type == "cpu" or scaler.is_enabled() or done >= steps
                or any(every(interval, done) for interval in intervals)
                or world_size == 1 and signals)
        loss = torch.zeros((), device=device)
        spans = [row_spans(rows, step, i) for i in range(gradient_accumulation_steps)]
        counts = [sum(end - begin for begin, end in part) for part in spans]  # of targets
        for micro in range(rank, gradient_accumulation_steps, world_size):
            x, y = read_rows(rows, spans[micro], device)
            if dropout or layerdrop:  # else nothing is random, and seeding costs time
                torch.manual_seed(random_seed("dropout", step, micro))
            last = micro + world_size >= gradient_accumulation_steps
            # backward() adds up micro-steps, DDP averages processes (at the last; with layerdrop
            # at each, as the last may skip a block). We want the mean over the step's targets.
            model.require_backward_grad_sync = last or layerdrop > 0
            loss += add_gradients(x, y, sum(counts) / counts[micro])

        # Undo float16's scale, then clip: scale the gradients down to a norm of grad_clip.
        for opt in optimizers:
            scaler.unscale_(opt)
        watched = log_grad_norms and every(log_interval, done)
        by_layer = norms_by_layer(raw, [p.grad for p in parameters]) if watched else {}
        before = [p.detach().clone() for p in parameters] if watched else []
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if grad_clip:  # times min(1, grad_clip / total)
            nn.utils.clip_grads_with_norm_(parameters, grad_clip, total)
        grad_norm = total.item() if sync else math.nan  # unread
        overflow = scaler.is_enabled() and not math.isfinite(grad_norm)

        # Update; but where float16 gradients overflow no optimizer steps, and the scale sinks.
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
            if not overflow:
                opt.step()
        if gradient_accumulation_steps > 1:
            raw.zero_grad(set_to_none=not graphed)  # a graph adds to the same tensors
        scaler.update()
        progress["skipped"] += overflow
        if watched:
            by_layer |= update_sizes(raw, before)
        if profiler:
            profiler.step()
        if not sync:
            continue

        # ---- what follows only looks, and saves ----
        # What all processes must know of each: the loss, and who has received which signal.
        loss, *stops = summed(device, loss.item(), *(number in signals for number in SIGNALS))
        require_finite(done, loss=loss, gradient=0.0 if overflow else grad_norm)
        now = time.perf_counter()
        step_time = (now - clock) / (done - last_sync)  # seconds
        stepping += now - clock
        if max_minutes:  # count again what fits into the rest: the schedule ends with the time
            left = 60 * max_minutes - (now - began) - each_evaluation * every(evaluate_every, done)
            steps = done + steps_in(left, stepping / (done - first), each_evaluation,
                                    evaluate_every, device)
        row = {"step": done, "loss": loss, "lr": lr, "norm": grad_norm,
               "ms": 1000 * step_time, "tok/s": step_tokens / step_time,
               "elapsed": now - began, "eta": (now - began) * (steps / done - 1)}
        names = []  # of the checkpoints that are due
        if every(evaluate_every, done) or done >= steps:
            row |= losses(raw, autocast, data, device)
            each_evaluation = time.perf_counter() - now
            progress["stale"] += 1
            if row["val"] < progress["best_loss"]:
                progress |= {"best_step": done, "stale": 0, "best_loss": row["val"],
                             "best_train": row["train"], "best_accuracy": row["accuracy"]}
                names.append("best.pt")
        if every(log_interval, done) or "val" in row:
            log(row, run_dir, guesses, signals, by_layer)
        if every(sample_interval, done) and rank == 0:
            with stop_on_error():
                write_sample(raw, tokenizer, prompt.to(device), done, run_dir, signals)
        if every(snapshot_interval, done):
            names.append(f"step_{done}.pt")
        stopped_by = next((number for number, seen in zip(SIGNALS, stops) if seen), 0)
        leaving = done >= steps or stopped_by or 0 < patience <= progress["stale"]
        if names or leaving or "val" in row or every(save_interval, done):
            require_finite(done, val=row.get("val", 0.0),
                           weights=nn.utils.get_total_norm(parameters).item())
            progress |= {"step": done, "seconds": time.perf_counter() - began}
            names.append("last.pt")  # after best.pt, on which its progress counts
            for name in names if rank == 0 else ():
                save_checkpoint(run_dir / name, raw, tokenizer, settings=settings,
                                progress=progress, checksums=checksums, dtype=str(amp)[6:],
                                states=[part.state_dict() for part in stateful])
            for path in replaced - {run_dir / name for name in names}:
                path.unlink(missing_ok=True)  # another run's, kept until this one had its own
            replaced = set()
        if leaving:
            break
        last_sync, clock = done, time.perf_counter()
    if profiler:
        profiler.stop()

    print_result(progress, step_tokens, meta["splits"]["val"], guesses, run_dir, raw, device)
    if stopped_by:
        print("to go on, give the same command with --init_from=resume")
        return 128 + stopped_by

def check_settings(run_dir):
    """Stops at the first value that cannot work, before anything is loaded or written; of the
    model's settings GPTConfig knows."""
    one_of(settings, "optimizer", *OPTIMIZERS)
    one_of(settings, "lr_schedule", *SCHEDULES)
    if not os.path.exists(init_from):
        one_of(settings, "init_from", "scratch", "resume", *PRETRAINED, "an existing .pt or folder")
    one_of(settings, "dtype", "auto", "float32", "bfloat16", "float16", "int8")
    require(dtype != "int8" or eval_only, "--dtype=int8 cannot train, give --eval_only=True, too")
    one_of(settings | {"compile": compile.lower()}, "compile", "auto", "true", "false")
    at_least(0, settings, *(name for name in settings if not isinstance(settings[name], str)))
    at_least(1, settings, "batch_size", "block_size", "vocab_multiple",
             "gradient_accumulation_steps")
    require(max(beta1, beta2, momentum) < 1, "--beta1, --beta2 and --momentum must be below 1")
    require(eval_only or gradient_accumulation_steps % world_size == 0,
            f"--gradient_accumulation_steps must be a multiple of the {world_size} processes")
    require(not wandb_log or find_spec("wandb"), "--wandb_log=True needs pip install wandb")
    new = init_from != "resume" and not eval_only and not summary
    require(not eval_only or init_from != "scratch", "--eval_only=True needs --init_from=resume, "
            "or another trained model")
    require(not decay_lr or min_lr <= learning_rate, "--min_lr must not be above --learning_rate")
    require(overwrite or not new or not any(run_dir.glob("*.pt")), f"{run_dir} holds a run: give "
            f"--init_from=resume, --overwrite=True or another --out_dir")
    begin, last = run_file(run_dir, checkpoint or "last.pt"), run_dir / "last.pt"
    back = init_from == "resume" and any(run_dir.glob("*.pt")) and begin.resolve() != last.resolve()
    require(overwrite or eval_only or summary or not back, f"--checkpoint={checkpoint} goes back: "
            f"what the run saved later is replaced only with --overwrite=True; copy it if need be")
    if rank == 0 and plot and not find_spec("matplotlib"):
        print("no pictures without matplotlib: pip install matplotlib, or --plot=False")

def require_memory(config, device):
    """Stops where weights, gradients and moments (16 bytes a parameter) and the logits of a
    batch and their gradients (8 bytes each) cannot fit, before anything is allocated."""
    C, width = config.n_embd, config.n_inner or 4 * config.n_embd
    parameters = C * (config.vocab_size + block_size + config.n_layer * (4 * C + 2 * width))
    needed, there = 16 * parameters + 8 * batch_size * block_size * config.vocab_size, math.inf
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # Windows does not say
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(needed <= there, f"this model and batch need over {needed / 1e9:,.0f} GB, {device} has "
            f"{there / 1e9:,.0f}: make --n_layer, --n_embd or --batch_size smaller")

# ---- data ----

def load_dataset(folder):
    """(meta.json, tokenizer, {split: Documents} to evaluate on, rows to train on) of what a prepare
    script wrote."""
    require(os.path.isfile(folder / "meta.json"), f"{folder}: no such dataset, its config's "
            f"docstring says how to prepare it, or prepare_shakespeare.py --source=FILE", 1)
    data = {}
    with stop_on_error(), reading(folder, ", delete it and prepare it again"):
        meta = json.loads((folder / "meta.json").read_bytes())
        tokenizer = tokenizer_from(meta["tokenizer"])
        for split, counts in meta["splits"].items():
            tokens = np.memmap(folder / f"{split}.bin", meta["dtype"], "r")
            if len(tokens) != counts["tokens"] or tokens.max() >= tokenizer.vocab_size:
                raise ValueError(f"{split}.bin is not what meta.json says")
            require(len(tokens) > 1, f"{folder}/{split}.bin: one token is too few", 1)
            data[split] = rows = Documents(tokens, -1 if tokenizer.eot is None else tokenizer.eot)
            line = f"{split}: {len(tokens):,} tokens, {counts['characters']:,} characters"
            if rows.documents > 1:  # as many rows: each fits into the context
                line += f", {rows.documents:,} documents in {rows.number:,} rows"
            if "nats_per_token" in counts:
                line += f", entropy {counts['nats_per_token']:.4f}: no honest loss is lower"
            print(line)
    require("val" in data, f"{folder} has no val split, prepare it with --val_fraction=0.1", 1)
    train = data["train"]
    require(train.documents > 1 or not document_rows, f"{folder} is one document: write {EOT} "
            f"behind each and use prepare_tinystories.py, or give --document_rows=False")
    require(len(train.tokens) > block_size or document_rows, f"{folder}/train.bin: "
            f"{len(train.tokens):,} tokens are too few for --block_size={block_size}")
    return meta, tokenizer, data, train if document_rows else Windows(train.tokens)

class Documents:
    """The rows of a split of (N,) ids: each document, from the eot before it, in pieces of
    block_size inputs, their targets one further. A split without eot is one document."""
    phases = 1  # documents have one beginning
    def __init__(self, tokens, eot):
        self.tokens = tokens
        eots = [i + np.flatnonzero(tokens[i:i + 2 ** 24] == eot)
                for i in range(0, len(tokens), 2 ** 24)]
        self.ends = np.unique(np.concatenate([[0], *eots, [len(tokens) - 1]]))
        self.documents = len(self.ends) - 1
        pieces = -(-np.diff(self.ends) // block_size)  # rounded up
        self.first_rows = np.append(0, pieces.cumsum())
        self.number = int(self.first_rows[-1])
        self.targets = (len(tokens) - 1) / self.number  # of a row, in the mean

    def span(self, row, phase=0):
        """Places of a row's first input and last target, or of (N,) rows'; with block_size 8 and
        eot at 0, 5 and 15 these are (0, 5), (5, 13), (13, 15)."""
        i = self.first_rows.searchsorted(row, "right") - 1
        first = self.ends[i] + block_size * (row - self.first_rows[i])
        return first, np.minimum(first + block_size, self.ends[i + 1])

class Windows:
    """The rows of a stream of (N,) ids: windows of block_size inputs, side by side, which fill a
    batch without padding. In each epoch the first begins at another phase, so that cuts move."""
    def __init__(self, tokens):
        self.tokens = tokens
        self.phases = min(block_size, len(tokens) - block_size)
        self.number = (len(tokens) - self.phases) // block_size  # that fit in any phase
        self.targets = block_size

    def span(self, row, phase=0):
        first = phase + block_size * row
        return first, first + block_size

def read_rows(rows, spans, device):
    """Inputs x and targets y, (B, T) each, of rows with these spans. A short row is padded: x
    repeats its last token, y is -1, which no loss counts."""
    first, last = np.transpose(spans)[:, :, None]            # (B, 1) each
    places = first + np.arange(block_size + 1)               # (B, T + 1)
    ids = rows.tokens[np.minimum(places, last)].astype(np.int64)
    x, y = ids[:, :-1], np.where(places > last, -1, ids)[:, 1:]
    pair = torch.from_numpy(x), torch.from_numpy(y)
    if torch.device(device).type == "cuda":  # out of pinned memory while Python goes on
        return [ids.pin_memory().to(device, non_blocking=True) for ids in pair]
    return [ids.to(device) for ids in pair]

def baselines(train, val, vocab_size, size=2 ** 23):
    """{name: mean nats per token of val} of guesses by counts: all V tokens alike; each by its
    share of train; by its share behind the token before it. A count is one more, so that none
    is 0. (N,) ids, at most 100 million of train and 5 million of val, size at a time."""
    train, val = train[:100_000_000], val[:5_000_000]
    dtype = np.uint32 if vocab_size <= 2 ** 16 else np.uint64  # a pair (a, b) is a * V + b
    pairs, times = np.unique(val[:-1].astype(dtype) * vocab_size + val[1:], return_counts=True)
    n_a, n_ab = np.zeros(vocab_size, int), np.zeros(len(pairs), int)
    for i in range(0, len(train) - 1, size):
        ids = train[i:i + size + 1]
        n_a += np.bincount(ids[:-1], minlength=vocab_size)
        found = ids[:-1].astype(dtype) * vocab_size
        found += ids[1:]
        found.sort()                                  # what is equal stands side by side
        n_ab += found.searchsorted(pairs, "right") - found.searchsorted(pairs, "left")
    a, b = pairs // vocab_size, pairs % vocab_size
    n_b = n_a[b] + (b == train[-1])                   # behind which no token comes
    return {"uniform": math.log(vocab_size),
            "unigram": np.average(np.log((len(train) + vocab_size) / (n_b + 1)), weights=times),
            "bigram": np.average(np.log((n_a[a] + vocab_size) / (n_ab + 1)), weights=times)}

def random_seed(purpose, *indices):
    """64 random bits that follow from (seed, purpose, indices) alone, never from history."""
    sequence = np.random.SeedSequence([seed, *purpose.encode(), *indices])
    return int(sequence.generate_state(1, np.uint64)[0])

@lru_cache(maxsize=2)  # a batch may hold the end of one epoch and the start of the next
def epoch_order(rows, epoch):
    """Phase and random order of an epoch's rows: each token a target once, but at the ends."""
    generator = np.random.default_rng(random_seed("epoch", epoch))
    phase = int(generator.integers(rows.phases))
    return phase, generator.permutation(np.arange(rows.number, dtype=np.uint32))

def row_spans(rows, step, micro):
    """The places of a batch's rows in endless epochs, which follow from (seed, step, micro)."""
    first, spans = (step * gradient_accumulation_steps + micro) * batch_size, []
    for number in range(first, first + batch_size):
        epoch, i = divmod(number, rows.number)
        phase, order = epoch_order(rows, epoch)
        spans.append(rows.span(int(order[i]), phase))
    return spans

# ---- optimizers and schedule ----

def make_optimizers(model):
    """One optimizer for all parameters or, where OPTIMIZERS names a second, that for the
    matrices of blocks. Weight decay is for matrices (embeddings too), not for biases and gains."""
    first, second = OPTIMIZERS[optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = dict.fromkeys(p for p in model.h.parameters() if p.dim() == 2 and second)
    groups = [{"params": [p for p in trained if p.dim() >= 2 and p not in hidden],
               "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [first(groups, lr=learning_rate, betas=(beta1, beta2))]
    if second:
        optimizers.append(second(hidden, learning_rate, momentum, weight_decay))
    return optimizers

class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), written out.
    Each weight moves by about lr, less where its gradients disagree."""
    def __init__(self, params, lr, betas, eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                t, m, v = state["t"], state["m"], state["v"]
                m.copy_(beta1 * m + (1 - beta1) * p.grad)       # mean of the gradient
                v.copy_(beta2 * v + (1 - beta2) * p.grad ** 2)  # mean of its square
                m_hat = m / (1 - beta1 ** t)                    # both started at zero: unbias
                v_hat = v / (1 - beta2 ** t)
                p *= 1 - lr * group["weight_decay"]             # beside the gradient, not in it
                p -= lr * m_hat / (v_hat.sqrt() + group["eps"])

class Muon(torch.optim.Optimizer):
    """Steps along the momentum, its singular values all set to about 1 (Jordan et al. 2024),
    as large as AdamW's (Liu et al. 2025): one learning rate serves both. Matrices of one shape
    go together, in 0.5 of torch.optim.Muon's time."""
    def __init__(self, params, lr, momentum, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                shapes.setdefault(matrices(p)[0].shape, []).append(p)
            for same in shapes.values():
                for i in range(0, len(same), 8):  # all at once would take more memory
                    self.update(same[i:i + 8], group)

    def update(self, params, group):
        """Updates parameters whose matrices have one shape."""
        lr, beta = group["lr"], group["momentum"]
        means = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(means, grads, 1 - beta)        # each beta m + (1 - beta) g
        ahead = torch._foreach_lerp(grads, means, beta)     # Nesterov's: one step ahead
        g = torch.stack([m for a in ahead for m in matrices(a)])  # (N, rows, columns)
        size = 0.2 * math.sqrt(g.shape[2])                  # root mean square as AdamW's, 0.2
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_([m for p in params for m in matrices(p)],
                            orthogonal(g).unbind(), alpha=-lr * size)

def matrices(p):
    """Views of what Muon takes for one matrix each, (rows, columns) with rows <= columns, where
    the products are smallest. Of 3 C rows and C columns it is three: in c_attn together, the
    values, whose gradients are the largest, would take most from queries and keys."""
    rows, columns = p.shape
    if rows == 3 * columns:
        return p.chunk(3)
    return [p.mT if rows > columns else p]

def orthogonal(g):
    """(N, rows, columns) -> the same with singular values of about 1, by five steps of
    a s + b s^3 + c s^5 of each s, with coefficients that Jordan et al. chose."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = g.bfloat16()
    if g.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        X = F.normalize(g.flatten(1)).view_as(g).half()  # which has no room for small numbers
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)           # a X + B X
    return X.type_as(g)

OPTIMIZERS = {  # name: (for all parameters, None), or (for most, for matrices of the blocks)
    "adamw": (partial(torch.optim.AdamW, fused=True), None),
    "adamw_scratch": (AdamW, None),
    "muon": (partial(torch.optim.AdamW, fused=True), Muon),
}
SCHEDULES = {"cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
             "linear": lambda part: 1 - part}  # from 1 to 0

def learning_rate_at(step, steps):
    """Linear warm-up to learning_rate, then lr_schedule's way down to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    part = (step - warmup_iters) / max(1, (lr_decay_iters or steps) - warmup_iters)
    return min_lr + SCHEDULES[lr_schedule](min(1.0, part)) * (learning_rate - min_lr)

# ---- evaluation ----

@contextmanager
def eager():
    """Leaves torch.compile's graphs aside: another would be compiled for the other shapes."""
    compiles = "torch._dynamo" in sys.modules  # a second to import, so only where it is used
    with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        yield

def eval_batches(rows, device, max_batches):
    """Yields this process's share of a split's batches, in which each token is predicted once;
    max_batches > 0: of max_batches * batch_size rows alone, evenly spread. Rows of like length
    stand together, as a batch is as wide as its longest."""
    count = min(rows.number, max_batches * batch_size or rows.number)
    numbers = np.linspace(0, rows.number - 1, count).round().astype(int)
    spans = np.stack(rows.span(numbers), axis=1)                 # (N, 2)
    spans = spans[(spans[:, 0] - spans[:, 1]).argsort(kind="stable")]  # the longest first
    size = max(batch_size, 2048 // block_size)  # fewer tokens at a time take longer
    for first in range(rank * size, count, world_size * size):
        if rank == 0:
            show_progress(f"evaluating, row {first:,} of {count:,}")
        x, y = read_rows(rows, spans[first:first + size], device)
        longest = (y >= 0).sum(dim=1).max()
        yield x[:, :longest], y[:, :longest]
    show_progress("")

@torch.no_grad()
def evaluate(forward, rows, device="cpu", max_batches=0):
    """Mean nats per token of a split, and the share of its tokens that were the likeliest."""
    nats = right = counted = 0
    for x, y in eval_batches(rows, device, max_batches):
        logits, loss = forward(x, y)
        n = (y >= 0).sum().item()
        nats, counted = nats + loss.item() * n, counted + n
        right += (logits.max(dim=-1).indices == y).sum().item()  # argmax takes longer
    nats, right, counted = summed(device, nats, right, counted)
    return nats / counted, right / counted

@eager()
def losses(raw, autocast, data, device):
    """{"train", "val"} losses in nats per token, of eval_iters batches or of all of val, and
    val's perplexity, "ppl", and "accuracy"."""
    forward = autocast(raw.eval().forward)
    most = {"train": eval_iters or math.ceil(data["val"].number / batch_size), "val": eval_iters}
    (train, _), (val, accuracy) = (evaluate(forward, data[split], device, number)
                                   for split, number in most.items())
    raw.train()
    return {"train": train, "val": val, "ppl": perplexity(val), "accuracy": accuracy}

def perplexity(loss):
    """How many equally likely tokens would be as hard to guess."""
    return math.inf if loss >= 700 else math.exp(loss)

def bits_per(unit, loss, counts):
    """Nats per token -> bits per one of a split's characters, or bytes."""
    return loss * counts["tokens"] / counts[unit] / math.log(2)

# ---- checkpoints ----

def load_model(path, tokenizer, device, **changes):
    """load_checkpoint(), which must read the tokens of this run's dataset."""
    with stop_on_error():
        saved = load_checkpoint(path, device, cache_dir, **changes)
    spec = saved["tokenizer"].spec
    require(spec == tokenizer.spec, f"{path} reads other tokens than data/{dataset}, prepare it "
            f"with --tokenizer={spec['kind'] if spec['kind'] in ('byte', 'gpt2') else path}", 1)
    return saved

BEGIN_ANEW = "begin with its weights: --init_from={} and another --out_dir"

def training_state(saved, path, progress, checksums):
    """(progress, optimizers' states) of a checkpoint, if its settings and data are this run's."""
    with stop_on_error(), reading(path, ", it holds no state of a training, train anew"):
        kept = {"best_train": math.nan, "best_accuracy": math.nan} | saved["progress"]
        progress = {name: type(value)(kept[name]) for name, value in progress.items()}
        free = {*settings} - {"dataset", "block_size"} if eval_only else FREE_ON_RESUME
        changed = [f"--{name}={value}" for name, value in saved["settings"].items()
                   if name not in free and settings.get(name) != value]
        anew = "or " + BEGIN_ANEW.format(path)
        require(not changed, f"{path} was trained with {' '.join(changed)}, resume it with "
                f"the same {anew}")
        require(checksums | saved.get("checksums", {}) == checksums, f"{path} was trained on "
                f"another text than data/{dataset} holds now, prepare that again {anew}")
        return progress, saved["states"]

def restore(stateful, states, path):
    """Puts the optimizers and the scaler into their saved states."""
    advice = ", it holds no state of this run's optimizer, " + BEGIN_ANEW.format(path)
    with stop_on_error(), reading(path, advice):
        for part, state in zip(stateful, states, strict=True):
            if state:  # a scaler has one in float16 only
                part.load_state_dict(state)
            for p, moments in getattr(part, "state", {}).items():
                shapes = {m.shape for m in moments.values() if torch.is_tensor(m)}
                if not shapes <= {p.shape, torch.Size()}:  # a fused step would read past the end
                    raise ValueError("its moments are those of other weights")

# ---- what a run writes ----

COLUMNS = {  # name: (width, format)
    "step": (8, ",d"), "loss": (9, ".4f"), "train": (9, ".4f"), "val": (9, ".4f"),
    "ppl": (10, ",.5g"), "lr": (10, ".2e"), "norm": (8, ".3f"), "ms": (9, ".1f"),
    "tok/s": (10, ",.0f"), "elapsed": (9, ",.0f"), "eta": (9, ",.0f")}  # the last two in seconds
FILES = ("last.pt", "best.pt", "step_*.pt", "metrics.csv", "grad_norms.csv", "loss.png",
         "loss_by_position.png", "trace.json.gz", "samples.txt", "wandb.txt")

def open_run(run_dir, step):
    """Prints the head of the log. A new run removes what another has left in its folder, but for
    its checkpoints, which it returns; a resumed one keeps the rows of its tables up to step."""
    print("".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items()))
    run_dir.mkdir(parents=True, exist_ok=True)
    there = [path for pattern in FILES for path in run_dir.glob(pattern)]
    for path in there:
        if init_from != "resume" and path.suffix != ".pt":
            path.unlink()
        elif path.suffix == ".csv" and path.stat().st_size:
            head, *lines = path.read_text(errors="replace").splitlines(keepends=True)
            require(head.startswith("step,"), f"{path} does not begin with the names of its "
                    f"columns, move it away to go on without its rows", 1)
            lines = [line for line in lines  # a kill may have cut one
                     if re.match(r"\d+,[^\ufffd]*\n$", line) and int(line.split(",")[0]) <= step]
            with atomic_write(path) as file:
                file.write("".join((head, *lines)).encode())
    if wandb_log:
        import wandb
        path = run_dir / "wandb.txt"  # its id, by which a resumed run goes on in the same one
        known = path.read_text() if path.is_file() else None
        run = wandb.init(project=wandb_project, name=wandb_run_name or run_dir.name, id=known,
                         config=settings, resume="allow")
        path.write_text(run.id)
    return {path for path in there if path.suffix == ".pt" and init_from != "resume"}

def say(text, signals):
    """Prints; where nobody reads any more, nowhere. A closed pipe, as of tee or head, makes the
    run save and end; a closed terminal sends SIGHUP itself."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            signals.append(signal.SIGTERM)

def log(row, run_dir, guesses, signals, by_layer={}):
    """Shows a row and keeps it in metrics.csv, grad_norms.csv (by_layer), loss.png and wandb."""
    say("".join(f"{row[name]:{width}{form}}" if name in row else " " * width
                for name, (width, form) in COLUMNS.items()), signals)
    if rank:
        return
    append_row(run_dir / "metrics.csv", COLUMNS, row)
    if by_layer:
        append_row(run_dir / "grad_norms.csv", ["step", *by_layer], row | by_layer)
    if plot and find_spec("matplotlib") and math.isfinite(row.get("val", math.nan)):
        plot_curves(run_dir, guesses)
    if wandb_log:
        import wandb
        wandb.log(row | by_layer, step=row["step"])

def append_row(path, columns, row):
    """Appends a row to a csv file, in the columns of its head, or in these if it has none yet;
    what the row lacks stays blank."""
    with open(path, "a+") as file:
        file.seek(0)
        head = file.readline().strip()
        columns = head.split(",") if head else columns
        values = [row.get(name, "") for name in columns]
        if not head:
            print(*columns, sep=",", file=file)
        print(*(f"{v:.6g}" if type(v) is float else v for v in values), sep=",", file=file)

@eager()
def write_sample(raw, tokenizer, ids, step, run_dir, signals):
    """Prints how the model goes on from ids (1, T), and appends it to samples.txt."""
    strict = deterministic and ids.is_cuda
    if strict:
        torch.use_deterministic_algorithms(False)  # there is none for cumsum
    generator = torch.Generator().manual_seed(random_seed("sample", step))
    ids = raw.eval().generate(ids, 200, generators=[generator], eot=tokenizer.eot,
                              vocab_size=tokenizer.vocab_size)
    raw.train()
    if strict:
        torch.use_deterministic_algorithms(True)
    text = tokenizer.decode(ids[0].tolist()).replace(EOT, "")
    with open(run_dir / "samples.txt", "a", encoding="utf-8") as file:
        print(f"---- step {step} ----\n{text}", file=file)
    say(f"---- a sample at step {step} ----\n{text}\n----", signals)

# Operations per second that a GPU states for bfloat16 (T4, V100: float16), without sparsity.
PEAKS = {"T4": 65e12, "V100": 125e12, "L4": 121e12, "A100": 312e12, "H100 PCIe": 756e12,
         "H100 80GB HBM3": 989e12, "H200": 989e12, "B200": 2250e12}

def print_result(progress, step_tokens, counts, guesses, run_dir, raw, device):
    """The last lines of a run: its best loss beside that of counts and the text's own entropy,
    its speed, its share of the GPU's peak (MFU)."""
    done, seconds, loss = progress["step"], progress["seconds"], progress["best_loss"]
    speed = done * step_tokens / max(seconds, 1e-9)  # tokens/s
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    flops = raw.flops_per_token() * speed / world_size
    mfu = next((f"{flops / peak:.1%}" for name, peak in PEAKS.items()
                if re.search(rf"\b{name}\b", gpu)), "n/a")
    if 0 < patience <= progress["stale"]:
        print(f"stopped after {progress['stale']} evaluations without a better val loss")
    if progress["best_step"]:
        print(f"best val loss {loss:.4f} at step {progress['best_step']:,}: perplexity "
              f"{perplexity(loss):.3f}, {bits_per('characters', loss, counts):.4f} bits per "
              f"character, in {run_dir}/best.pt")
        train_loss, accuracy = progress["best_train"], progress["best_accuracy"]
        if math.isfinite(accuracy):
            print(f"train loss {train_loss:.4f} there, a gap of {loss - train_loss:.4f}; "
                  f"{accuracy:.1%} of val's tokens were the likeliest")
        if floor := counts.get("nats_per_token"):
            print(f"the text's entropy is {floor:.4f}, the loss {loss / floor - 1:.1%} above it")
        if loss > guesses["bigram"]:
            print(f"a bigram, which looks one token back, has {guesses['bigram']:.4f}: train "
                  f"longer, or try another --learning_rate")
    if progress["skipped"]:
        print(f"{progress['skipped']:,} steps skipped, whose float16 gradients overflowed")
    print(f"{done:,} steps in {seconds:,.1f} s, evaluations included: {speed:,.0f} tokens/s, "
          f"MFU {mfu}, peak memory {peak_memory(device) / 1e6:,.0f} MB")

def plot_curves(run_dir, guesses):
    """Draws loss.png: losses, with those of guesses beside them; learning rate, gradient norm;
    and by layer gradient norm and update / weight."""
    from matplotlib.figure import Figure
    paths = [path for path in (run_dir / "metrics.csv", run_dir / "grad_norms.csv")
             if path.is_file() and path.read_text().count("\n") > 1]  # a head and rows
    rows, *norms = [np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)
                    for path in paths]
    rows = rows[1:] if len(rows) > 2 else rows  # step 0 would flatten the rest
    figure = Figure(figsize=(8, 6 * len(paths)), dpi=100, layout="constrained")
    top, bottom, *maps = figure.subplots(2 * len(paths), sharex=True,
                                         height_ratios=(2, 1, 1.4, 1.4)[:2 * len(paths)])
    for axes, name, label, color, marker in (  # colours that the colour-blind tell apart, too
            (top, "loss", "training batches", "#999999", ""),
            (top, "train", "train", "#0072B2", "."), (top, "val", "validation", "#D55E00", "."),
            (bottom, "lr", "learning rate", "#009E73", ""),
            (bottom.twinx(), "norm", "gradient norm", "#CC79A7", "")):
        known = rows[np.isfinite(rows[name])]
        axes.plot(known["step"], known[name], label=label, color=color, marker=marker, lw=1)
        axes.set_ylabel(label, color=color)
    best = rows[np.nanargmin(rows["val"])]
    top.plot(best["step"], best["val"], "k*", markersize=12,
             label=f"best: {best['val']:.4f} at {best['step']:,.0f}")
    for (name, loss), style in zip(guesses.items(), ("-", "--", "-.", ":")):
        top.axhline(loss, color="k", linestyle=style, lw=0.6, label=f"{name}: {loss:.4f}")
    low = min(np.nanmin(rows["train"]), np.nanmin(rows["val"]),
              guesses.get("entropy of the text", math.inf))
    top.set_ylim(0.95 * low, 1.1 * np.nanmax(rows["val"]))  # others may lie far from these
    right = top.secondary_yaxis("right", ylabel="perplexity")
    right.yaxis.set_major_formatter(lambda loss, _: f"{perplexity(loss):,.4g}")
    top.set(title=f"{run_dir}: loss by step", ylabel="nats per token")
    top.yaxis.label.set_color("k")
    top.legend()
    for axes, label, ratio in zip(maps, ("gradient norm", "update / weight"), (False, True)):
        names = [name for name in norms[0].dtype.names[1:] if name.startswith("update/") == ratio]
        layers = [name.removeprefix("update/") for name in names]
        sizes = np.array([norms[0][name] for name in names])
        if ((sizes > 0) & np.isfinite(sizes)).any():  # an older table may lack them, and none move
            heat = axes.pcolormesh(norms[0]["step"], layers, sizes, norm="log")
            figure.colorbar(heat, ax=axes, label=f"{label} by layer", location="bottom")
    with atomic_write(run_dir / "loss.png") as file:
        figure.savefig(file, format="png")

# ---- processes and machine ----

def join_processes(device):
    """Meets the other processes, if there are any; returns the device of this one."""
    if world_size == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        require(device.index < torch.cuda.device_count(),
                f"this machine has {torch.cuda.device_count()} GPUs, start as many processes")
        torch.cuda.set_device(device)
    if rank:
        sys.stdout = open(os.devnull, "w")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device

def summed(device, *values):
    """Each of the numbers, summed over the processes."""
    if world_size == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()

def require_finite(step, **values):
    """Stops a run whose numbers overflow, before they can replace a good checkpoint."""
    for name, value in values.items():
        require(math.isfinite(value), f"step {step}: {name} is {value}, try a lower "
                f"--learning_rate or --dtype=float32; its checkpoints are as they were", 1)

def every(interval, step):
    return interval > 0 and step % interval == 0

def compile_blocks(raw, autocast, rows, device):
    """Puts the blocks through torch.compile, one graph for all, if wanted and if it works; on a
    GPU the loss, too, whose many passes over the logits become two."""
    def attempt():
        for block in raw.h:
            block.compile()
        if device.type == "cuda":
            raw.score = torch.compile(raw.score)
        autocast(raw.forward)(*read_rows(rows, row_spans(rows, 0, 0), device))[1].backward()
        return raw
    wanted = compile.lower() == "true" or compile.lower() == "auto" and device.type == "cuda"
    if wanted and not tried("torch.compile", attempt):
        torch.compiler.set_stance("force_eager")
    raw.zero_grad()  # those of the attempt, which may have failed half way

def time_a_step(add_gradients, rows, val, device):
    """Seconds of a step and of an evaluation, by the second of two micro-steps on a batch. An
    evaluation goes forward alone, which is a third of the work, over val and as much of train."""
    for _ in range(2):
        began = time.perf_counter()
        x, y = read_rows(rows, row_spans(rows, 0, 0), device)
        add_gradients(x, y, 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        micro = (time.perf_counter() - began) / world_size
    batches = 2 * (eval_iters or val.number / batch_size)
    share = val.targets / block_size  # of a row, the rest is padding
    return micro * gradient_accumulation_steps, micro / 3 * batches * share

def steps_in(seconds, each_step, each_evaluation, evaluate_every, device):
    """How many steps fit, with their evaluations and that of the last: the same in all processes,
    whose times differ."""
    each = each_step + (each_evaluation / evaluate_every if evaluate_every else 0)
    fit, = summed(device, max(0.0, (seconds - each_evaluation) / each))
    return int(fit / world_size)

def choose_dtype(raw, saved, device):
    """The torch.dtype of products. auto is a resumed run's own; else on a GPU bfloat16 or float16,
    on a CPU the fastest for a block, forward and backward, or with eval_only float32."""
    if dtype == "int8":
        with stop_on_error(2), torch.no_grad():
            use_product(raw, dtype)
        return torch.float32  # of the rest
    rows = max(1, min(batch_size, 8192 // block_size))
    x = torch.randn(rows, block_size, raw.config.n_embd, generator=torch.Generator())

    def trial(name):
        with torch.autocast("cpu", getattr(torch, name), enabled=name != "float32"):
            raw.h[0](x).square().mean().backward()

    names = ["float32"] if eval_only else ["float32", "bfloat16"]
    wanted = saved.get("dtype", "auto") if dtype == "auto" else dtype
    choice = [pick_dtype(wanted, device, {name: partial(trial, name) for name in names})]
    raw.zero_grad()
    if world_size > 1 and device.type == "cpu":
        distributed.broadcast_object_list(choice)  # of rank 0, for all
    return getattr(torch, choice[0])

def keep_memory():
    """Makes glibc keep freed memory. It would return large blocks to the kernel, which clears
    them again page by page: a step of 6 layers of 384 channels took 2.8 s, with this 1.9 s."""
    with suppress(OSError, AttributeError, TypeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no block apart from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is never returned

def spare_compiler():
    """Lets torch's optimizers go without torch.compile's modules, which they would import only to
    stay out of a compiled graph: a start takes 1 s less, and 70 MB."""
    Optimizer, AdamW = torch.optim.Optimizer, torch.optim.AdamW
    for name in ("add_param_group", "load_state_dict", "state_dict"):
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    AdamW.step = torch.no_grad()(inspect.unwrap(AdamW.step))

def peak_memory(device):
    """Bytes: reserved on the GPU where one is used, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if not find_spec("resource"):  # Windows
        return math.nan
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

# ---- looking closer: gradient norms, loss by position, a profile ----

def norms_by_layer(raw, tensors):
    """{layer: norm} of a tensor for each parameter, such as its gradient; None counts as 0. The
    squares add up to that of all."""
    layers = {}
    for (name, _), tensor in zip(raw.named_parameters(), tensors):
        layers.setdefault(re.match(r"h\.\d+|\w+", name)[0], []).append(tensor)
    return {layer: nn.utils.get_total_norm([t for t in part if t is not None]).item()
            for layer, part in layers.items()}

@torch.no_grad()
def update_sizes(raw, before):
    """{"update/layer": norm of its last update / norm of its weights before}; uses up before."""
    weights = norms_by_layer(raw, before)
    updates = norms_by_layer(raw, [old.sub_(p) for p, old in zip(raw.parameters(), before)])
    return {f"update/{layer}": updates[layer] / max(weights[layer], 1e-30) for layer in weights}

def print_modules(raw, autocast, rows, device):
    """The table of --summary=True: each module once it has done its work, with the shape of what
    it gives for a batch, and its tensors; then memory."""
    total, seen = raw.num_params(), set()

    def show(name, module, _, output):
        print(f"{name:<32}{str(tuple(output.shape)):>20}")
        for tensor, p in module.named_parameters(name, recurse=False):
            count = p.numel() * p.requires_grad * (p not in seen)  # 0: fixed, or tied to another
            seen.add(p)
            print(f"    {tensor:<28}{str(tuple(p.shape)):>20}{count:>14,}{count / total:>9.2%}")

    print(f"{'module, and its tensors':<32}{'shape':>20}{'parameters':>14}{'share':>9}")
    raw.train().config.layerdrop = 0.0  # each block, and what dropout keeps
    for name, module in raw.named_modules():
        if any(True for _ in module.parameters()):
            module.register_forward_hook(partial(show, name))
    autocast(raw.forward)(*read_rows(rows, row_spans(rows, 0, 0), device))[1].backward()
    print(f"weights take {4e-6 * total:,.3g} MB, gradients as much, moments up to twice as much; "
          f"the peak with a batch, before moments, is {peak_memory(device) / 1e6:,.0f} MB")

@torch.no_grad()
def evaluate_positions(forward, rows, device="cpu", max_batches=0):
    """(3, block_size) sums by position in a split's rows: nats, right guesses, tokens."""
    sums = torch.zeros(3, block_size, dtype=torch.float64)
    for x, y in eval_batches(rows, device, max_batches):
        logits = forward(x)[0]
        nats = [F.cross_entropy(row.float(), targets, ignore_index=-1, reduction="none")
                for row, targets in zip(logits, y)]  # a row at a time: floats of all are many
        right = logits.max(dim=-1).indices == y      # argmax takes longer
        sums[:, :x.size(1)] += torch.stack((torch.stack(nats), right, y >= 0)).sum(dim=1).cpu()
    return torch.tensor(summed(device, *sums.flatten().tolist()), dtype=sums.dtype).view(3, -1)

def report(forward, data, meta, device, run_dir, source):
    """Prints the tables of eval_only, by split and by position; draws loss_by_position.png."""
    sums = {split: evaluate_positions(forward, rows, device, eval_iters)
            for split, rows in data.items()}
    print("  split        tokens     loss  perplexity  bits/char  bits/byte  accuracy")
    for split in sums:
        nats, right, tokens = sums[split].sum(dim=1).tolist()
        loss, units = nats / tokens, ("characters", "bytes")
        bits = [bits_per(unit, loss, meta["splits"][split]) for unit in units]
        print(f"{split:>7}{tokens:>14,.0f}{loss:>9.4f}{perplexity(loss):>12.3f}{bits[0]:>11.4f}"
              f"{bits[1]:>11.4f}{right / tokens:>10.2%}")
    print("   position" + "".join(f"{split:>9}" for split in sums))
    edges = [0, *(2 ** i for i in range((block_size - 1).bit_length())), block_size]
    for first, last in zip(edges, edges[1:]):
        label = f"{first + 1}-{last}".removeprefix(f"{last}-")  # 1, 2, 3-4, 5-8, ...
        parts = [table[:, first:last].sum(dim=1).tolist() for table in sums.values()]
        print(f"{label:>11}" + "".join(f"{nats / tokens:>9.4f}" if tokens else " " * 9
                                       for nats, _, tokens in parts))
    if rank == 0 and plot and find_spec("matplotlib"):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
        axes = figure.subplots()
        for split, (nats, _, tokens) in sums.items():
            axes.plot(range(1, block_size + 1), nats / tokens, label=split)
        axes.set(title=f"{source}: loss by position", ylabel="nats per token", xscale="log",
                 xlabel="tokens in the context, the one just read included")
        axes.legend()
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "loss_by_position.png") as file:
            figure.savefig(file, format="png")

def start_profiler(run_dir, device, signals):
    """torch's profiler, if wanted. It writes trace.json.gz, for ui.perfetto.dev, and a table."""
    def finish(profiler):
        path = run_dir / "trace.json.gz"
        profiler.export_chrome_trace(f"{path}.tmp.gz")  # by this name it is compressed
        os.replace(f"{path}.tmp.gz", path)
        kind = "CUDA" if device.type == "cuda" else "CPU"  # kernels, or operations
        rows = profiler.key_averages()
        rows[:] = [row for row in rows
                   if row.device_type.name == kind and not row.is_user_annotation]
        say(rows.table(sort_by=f"self_{kind.lower()}_time_total", row_limit=15), signals)
    if profile and rank == 0:
        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=2, active=profile, repeat=1),
            on_trace_ready=finish, profile_memory=True)
        profiler.start()
        return profiler

if __name__ == "__main__":
    with ExitStack() as cleanup:
        status = main(cleanup)
    if world_size > 1:  # else one run in six aborts at exit, the group's threads still there
        gc.collect()    # what is left of DDP, which holds the group
        distributed.destroy_process_group()
    sys.exit(status)
