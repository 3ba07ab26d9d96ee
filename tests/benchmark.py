"""Measures, side by side in one run, what the comments in the code claim about speed.

    python tests/benchmark.py dtype        a training step in float32 and in bfloat16
    python tests/benchmark.py attention    the same in bfloat16, with either attention
    python tests/benchmark.py kernels      dropout, cross-entropy and Muon against torch's own, the
                                           activations against each other
    python tests/benchmark.py train PATH   whole steps of train.py against those of nanoGPT's (a
                                           checkout at PATH): the same sizes, data and dropout, each
                                           in a process of its own, on the CPU
    python tests/benchmark.py speedrun PATH data/shakespeare_char
                                           nanoGPT's recipe for a CPU against ours for the same
                                           sizes with ReLU: whole processes, exact val losses
    python tests/benchmark.py sample PATH  writing text with 124M random weights, against nanoGPT (a
                                           checkout at PATH) and, where installed, transformers,
                                           CTranslate2 and llama.cpp (llama-cpp-python and gguf)
    python tests/benchmark.py levers       steps of train.py on a GPU, one setting changed at a time
    python tests/benchmark.py encode FILE  encoding a file of stories: characters against a list
                                           comprehension, GPT-2's tokens on all cores against
                                           tiktoken on one, and learning 4096 tokens from it
    python tests/benchmark.py trust        what a step of shakespeare_char's model pays for runs
                                           that can be stopped, killed and resumed
    python tests/benchmark.py around       what is not the model: batches, the log, evaluations
    python tests/benchmark.py counts       baselines() of 100 million tokens: seconds, memory
    python tests/benchmark.py curves data/shakespeare_char
                                           the loss curves of bfloat16 against float32's
    python tests/benchmark.py padding out/tinystories_gpt2
                                           perplexity of a run on story rows: of real tokens, and
                                           with padding counted

train, speedrun and sample take --device=cuda. Every row alternates its candidates and gives
medians; a line of JSON beside it says the same to programs, the first names the machine. Let
nothing else run meanwhile.
"""

import csv
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train as script  # noqa: E402
from model import (ACTIVATIONS, EOT, GPT, BPETokenizer, CharTokenizer, Dropout,  # noqa: E402
                   GPTConfig, cross_entropy, fused_attention, load_checkpoint, save_checkpoint)
from prepare_shakespeare import learn_tokenizer, write_dataset  # noqa: E402
from prepare_tinystories import read_stories  # noqa: E402
from sample import set_dtype, write_pretrained  # noqa: E402


DEVICE = "cpu"


def race(label, candidates, rounds=15):
    """Prints the median milliseconds of each {name: function} and their ratio to the first."""
    times = {name: [] for name in candidates}
    for turn in range(rounds + 2):  # the first two turns warm up
        for name, candidate in candidates.items():
            began = time.perf_counter()
            candidate()
            times[name] += [1000 * (time.perf_counter() - began)] if turn > 1 else []
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    record(label, ms=medians)
    print(f"{label:32}" + "".join(f"{name} {ms:9.2f} ms  x{first / ms:5.2f}   "
                                  for name, ms in medians.items()), flush=True)
    return medians


def record(label, **figures):
    """A line of JSON, with 4 digits."""
    text = json.dumps({"row": label, "time": time.strftime("%Y-%m-%d %H:%M")} | figures)
    print(json.dumps(json.loads(text, parse_float=lambda digits: float(f"{float(digits):.4g}"))),
          flush=True)


def machine():
    """The first row: the processor, what it has for bfloat16, and its product of 4096 in each type,
    in TFLOP/s; returns these."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", info)
    speeds = {}
    for kind in ("float32", "bfloat16"):
        a, seconds = torch.randn(4096, 4096).to(getattr(torch, kind)), []
        for _ in range(4):
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
        speeds[kind] = 2 * 4096 ** 3 / statistics.median(seconds[1:]) / 1e12
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    record("machine", processor=name[1] if name else platform.processor(), **gpu,
           flags=re.findall(r"\b(?:amx_bf16|avx512_bf16|avx512f|avx2)\b", info.partition("\n\n")[0]),
           threads=torch.get_num_threads(), torch=torch.__version__, tflops=speeds)
    return speeds


def step(model, rows, dtype, attention=fused_attention, keep=False):
    """Forward and backward on random tokens with this attention; keep keeps the gradients."""
    for block in model.h:
        block.attn.attention = attention
    x, y = torch.randint(model.config.vocab_size, (2, rows, model.config.block_size))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(x, y)[1]
    loss.backward()
    if not keep:
        model.zero_grad()


def dtype():
    for layers, heads, width, context, rows in ((4, 4, 64, 32, 16), (4, 4, 128, 64, 12),
                                                (4, 4, 128, 64, 48), (4, 4, 256, 64, 24),
                                                (2, 8, 256, 128, 32), (6, 6, 384, 256, 8)):
        model = GPT(GPTConfig(context, 65, layers, heads, width))
        race(f"{layers} x {width}, {rows} rows of {context}", {
            "float32": lambda: step(model, rows, torch.float32),
            "bfloat16": lambda: step(model, rows, torch.bfloat16)})


def attention_kernels():
    def kernel(q, k, v, dropout, mask):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout.p, is_causal=True)

    for layers, heads, width, context, rows in ((4, 4, 128, 64, 24), (2, 8, 256, 128, 32),
                                                (6, 6, 384, 256, 8), (4, 4, 256, 512, 4),
                                                (2, 12, 768, 1024, 1)):
        model = GPT(GPTConfig(context, 65, layers, heads, width))
        race(f"{layers} x {width}, {rows} rows of {context}", {
            "kernel": lambda: step(model, rows, torch.bfloat16, kernel),
            "ours": lambda: step(model, rows, torch.bfloat16)})


def kernels():
    """Forward and backward of what model.py does in another way than torch on a CPU."""
    x = torch.randn(12_500_000).bfloat16().requires_grad_()
    logits = torch.randn(1024, 50257).bfloat16().requires_grad_()
    targets = torch.randint(50257, (1024,))
    race("dropout of 12.5 million", {
        "torch": lambda: torch.autograd.grad(F.dropout(x, 0.2), x, x),
        "ours": lambda: torch.autograd.grad(Dropout(0.2)(x), x, x)})
    for logits in (logits, logits.detach().float().requires_grad_()):
        race(f"cross-entropy, 1024 x 50,257, {logits.element_size()} bytes", {
            "torch": lambda: torch.autograd.grad(F.cross_entropy(logits.float(), targets), logits),
            "ours": lambda: torch.autograd.grad(cross_entropy(logits, targets), logits)})
    hidden = [torch.randn(shape, requires_grad=True) for shape in
              [(384, 128), (128, 128), (512, 128), (128, 512)] * 4]
    apart = [part.detach().requires_grad_() for p in hidden for part in p.split(128)
             if p.shape == (384, 128)] + [p for p in hidden if p.shape != (384, 128)]
    for p in hidden + apart:
        p.grad = torch.randn_like(p)
    race("muon, 4 x 128", {"torch": torch.optim.Muon(apart, adjust_lr_fn="match_rms_adamw").step,
                           "ours": script.Muon(hidden, 1e-3, 0.95, 0.1).step})
    inner = torch.randn(2048, 512).bfloat16().requires_grad_()
    race("2048 x 512 of an MLP", {
        name: partial(lambda f: torch.autograd.grad(f(inner), inner, inner), function)
        for name, (_, function) in ACTIVATIONS.items()})


def load_peer(nanogpt):
    spec = importlib.util.spec_from_file_location("nanogpt", Path(nanogpt) / "model.py")
    sys.modules["nanogpt"] = peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    peer.print = lambda *_: None  # its models announce themselves
    return peer


WRITERS = {  # who writes text, what must be installed for it
    "ours auto": (), "ours float32": (), "ours float16": (), "ours int8": (), "nanoGPT": (),
    "transformers": ("transformers",),
    "CTranslate2 float32": ("ctranslate2", "transformers"),
    "CTranslate2 int8": ("ctranslate2", "transformers"),
    "llama.cpp F32": ("llama_cpp", "gguf"), "llama.cpp F16": ("llama_cpp", "gguf"),
    "llama.cpp BF16": ("llama_cpp", "gguf"), "llama.cpp Q8_0": ("llama_cpp", "gguf")}


def writer(name, nanogpt, export, device):
    """A function of a list of prompts' ids and a number of tokens, with 124M random weights."""
    who, _, kind = name.partition(" ")
    tensor, half = partial(torch.tensor, device=device), {"cuda": torch.bfloat16}.get(device)
    if who == "ours":
        model = load_checkpoint(export, device)["model"]
        set_dtype(model, kind, torch.device(device), rows=1)
        return lambda rows, n: model.generate(tensor(rows), n, top_k=200)
    if who == "nanoGPT":
        peer = load_peer(nanogpt)
        model = peer.GPT(peer.GPTConfig()).eval().to(device, half)
        return lambda rows, n: model.generate(tensor(rows), n, top_k=200)
    if who == "transformers":
        import transformers
        transformers.logging.set_verbosity_error()
        model = transformers.GPT2LMHeadModel.from_pretrained(export).eval().to(device, half)
        return lambda rows, n: model.generate(
            tensor(rows), attention_mask=torch.ones(len(rows), 16, device=device), do_sample=True,
            top_k=200, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
    if who == "CTranslate2":
        import ctranslate2
        converter = ctranslate2.converters.TransformersConverter(export)
        converter.convert(f"{export}/{kind}", quantization=kind)
        model = ctranslate2.Generator(f"{export}/{kind}", intra_threads=torch.get_num_threads())
        tokens = json.loads(Path(export, "tokenizer.json").read_text())["model"]["vocab"]
        tokens = sorted(tokens, key=tokens.get)
        return lambda rows, n: model.generate_batch(
            [[tokens[i] for i in row] for row in rows], max_length=n, min_length=n,
            sampling_topk=200, include_prompt_in_result=False)
    import llama_cpp
    write_gguf(f"{export}/{kind}.gguf", load_checkpoint(export)["model"], kind)
    model = llama_cpp.Llama(f"{export}/{kind}.gguf", n_ctx=1024, verbose=False,
                            n_threads=torch.get_num_threads())
    return lambda rows, n: [*itertools.islice(
        model.generate(rows[0], top_k=200, top_p=1.0, min_p=0.0), n)]


def write_gguf(path, model, kind):
    """A model of learned positions as llama.cpp reads it, without its tokenizer."""
    import gguf
    c, file = model.config, gguf.GGUFWriter(path, "gpt2")
    for name, value in (("tokenizer_model", "no_vocab"), ("vocab_size", c.vocab_size),
                        ("context_length", c.block_size), ("embedding_length", c.n_embd),
                        ("feed_forward_length", 4 * c.n_embd), ("block_count", c.n_layer),
                        ("head_count", c.n_head), ("layer_norm_eps", 1e-5)):
        getattr(file, f"add_{name}")(value)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
             "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
             "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for name, w in model.state_dict().items():
        layer, module, part = re.fullmatch(r"(?:h\.(\d+)\.)?(.*)\.(\w+)", name).groups()
        if module in names:  # lm_head is token_embd
            kept = gguf.GGMLQuantizationType[kind if w.dim() == 2 and module != "wpe" else "F32"]
            file.add_tensor((f"blk.{layer}." if layer else "") + f"{names[module]}.{part}",
                            gguf.quants.quantize(w.numpy(), kept), raw_dtype=kept)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def serve(pipe, *which):
    """Writes what it is asked for in a process of its own, where no other's threads spin."""
    with torch.no_grad(), suppress(EOFError):  # at the end of the other's pipe
        write = writer(*which)
        while True:
            task = pipe.recv()
            began = time.perf_counter()
            write(*task)
            pipe.send(time.perf_counter() - began)


def sample(nanogpt="", only=""):
    """Tokens per second, medians of interleaved turns, and the time to read the weights once."""
    machine()
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    block, seconds = torch.ones(124_439_808, device=DEVICE, dtype=kind), []
    for _ in range(20):
        began = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - began)
    floor = statistics.median(seconds)
    print(f"reading the {block.nbytes / 1e6:.0f} MB of {kind} takes {1000 * floor:.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_pretrained(GPT(GPTConfig()), BPETokenizer({"kind": "gpt2"}), Path(folder))
        pipes = {}
        for name, packages in WRITERS.items():
            there = all(map(importlib.util.find_spec, packages))
            if (only in name and there and (nanogpt or name != "nanoGPT")
                    and (DEVICE == "cpu" or name in ("ours auto", "nanoGPT", "transformers"))):
                pipes[name], theirs = multiprocessing.Pipe()
                multiprocessing.get_context("spawn").Process(
                    target=serve, args=(theirs, name, nanogpt, folder, DEVICE), daemon=True).start()
                pipes[name].send(([[0] * 16], 5))  # warms up
                pipes[name].recv()
        for batch, tokens, turns in ((1, 200, 5), (8, 200, 2), (1, 900, 1)):
            rows, rates = torch.randint(50257, (batch, 16)).tolist(), {}
            for _ in range(turns):
                for name, pipe in pipes.items():
                    if batch == 1 or "llama" not in name:  # which takes one
                        pipe.send((rows, tokens))
                        rates.setdefault(name, []).append(batch * tokens / pipe.recv())
            medians = {name: statistics.median(values) for name, values in rates.items()}
            record(f"{batch} x 16 + {tokens} tokens", tokens_per_s=medians, floor_ms=1000 * floor)
            print(f"{batch} x 16 + {tokens} tokens")
            first = next(iter(medians.values()))
            for name, rate in medians.items():
                print(f"{name:>20}{rate:9.1f} tok/s  x{first / rate:5.2f}", flush=True)


def encode(path):
    stories = list(filter(None, read_stories([Path(path)])))
    texts = ["".join(stories[i:i + 1000]) for i in range(0, len(stories), 1000)]
    label = f"{sum(map(len, texts)) / 1e6:.1f} MB of stories"
    tokenizer = CharTokenizer("".join(sorted(set("".join(texts)))))
    stoi = {c: i for i, c in enumerate(tokenizer.spec["vocabulary"])}
    race(label, {"comprehension": lambda: [[stoi[c] for c in text] for text in texts],
                 "encode": lambda: [tokenizer.encode(text) for text in texts]})

    gpt2 = BPETokenizer({"kind": "gpt2"})

    def ordinary():
        return [gpt2.encoding.encode_ordinary(story) for story in stories]

    def write():
        with redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
            write_dataset(folder, {"train": stories}, gpt2, EOT, os.cpu_count())

    race(label, {"encode_ordinary": ordinary, "write_dataset": write}, rounds=5)
    race(label, {"learn_tokenizer": lambda: learn_tokenizer(stories, 4096)}, rounds=3)


def trust(rows=8, every=250):
    """Beside the step itself: seeds for its dropout, what all processes agree on, the finite checks
    and, every so many steps, writing last.pt."""
    tokenizer = CharTokenizer("".join(map(chr, range(65))))
    model = GPT(GPTConfig(256, 65, 6, 6, 384, dropout=0.2))
    parameters, optimizers = list(model.parameters()), script.make_optimizers(model)

    def step_whole():
        step(model, rows, torch.bfloat16, keep=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizers[0].step()
        model.zero_grad()

    def guard():
        torch.manual_seed(script.random_seed("dropout", 1, 0))
        loss, *_ = script.summed("cpu", 1.0, False, False)
        script.require_finite(1, loss=loss, gradient=1.0)

    def save():
        script.require_finite(1, weights=torch.nn.utils.get_total_norm(parameters).item())
        save_checkpoint(Path(folder, "last.pt"), model, tokenizer,
                        states=[optimizer.state_dict() for optimizer in optimizers])

    with tempfile.TemporaryDirectory() as folder:
        medians = race(f"6 x 384, {rows} rows of 256", {"a step": step_whole, "guarding it": guard,
                                                        "a save": save})
    cost = medians["guarding it"] + medians["a save"] / every
    print(f"with a save every {every} steps {cost / medians['a step']:.2%} of a step")


def around():
    """What is not the model: batches and the log at the smallest size; between 500 steps of
    shakespeare_char's, 20 lines of metrics, a picture of 60 of them, and evaluating all of a val
    split of Tiny Shakespeare's size, and as much of train."""
    ids = np.random.default_rng(0).integers(0, 65, 111_540).astype(np.uint16)
    script.block_size, script.batch_size = 32, 16
    rows, model = script.Windows(ids), GPT(GPTConfig(32, 65, 4, 4, 64))
    parameters, optimizers = list(model.parameters()), script.make_optimizers(model)
    line = dict.fromkeys(script.COLUMNS, 1.0) | {"step": 1}
    del line["val"]  # else it would draw

    def step_whole():
        step(model, 16, torch.float32, keep=True)
        torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def batch():
        script.read_rows(rows, script.row_spans(rows, 1, 0), "cpu")
        script.learning_rate_at(200, 5000)
        loss, *_ = script.summed("cpu", 1.0, False, False)
        script.require_finite(1, loss=loss, gradient=1.0)

    def log():
        with redirect_stdout(quiet):
            script.log(line, Path(folder), None, [])

    with open(os.devnull, "w", buffering=1) as quiet, tempfile.TemporaryDirectory() as folder:
        medians = race("4 x 64, 16 rows of 32", {"a step": step_whole, "a batch": batch,
                                                 "a line": log}, rounds=300)
    cost = medians["a batch"] + medians["a line"] / 10
    print(f"with a line every 10 steps {cost / (medians['a step'] + cost):.1%} of all")

    script.block_size, script.batch_size = 256, 16
    model = GPT(GPTConfig(256, 65, 6, 6, 384, dropout=0.1))
    autocast = torch.autocast("cpu", torch.bfloat16)
    data = dict.fromkeys(("train", "val"), script.Documents(ids, -1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.csv")
        for done in range(60):
            script.append_row(path, script.COLUMNS, line | {"step": done, "val": 1.0})
        medians = race("6 x 384, 16 rows of 256", {
            "a step": lambda: step(model, 16, torch.bfloat16),
            "a line": lambda: script.append_row(path, script.COLUMNS, line),
            "a picture": lambda: script.plot_curves(Path(folder), {}),
            "an evaluation": lambda: script.losses(model, autocast, data, "cpu")}, rounds=5)
    steps, metrics = 500 * medians["a step"], 20 * medians["a line"] + medians["a picture"]
    whole = steps + metrics + medians["an evaluation"]
    print(f"with one every 500 steps evaluations are {medians['an evaluation'] / whole:.1%} of all, "
          f"metrics and pictures {metrics / whole:.2%}")


def counts():
    """Seconds and memory that baselines() takes in a process of its own, with the pages of the file
    it reads: 100 million tokens to count and 1 or 5 of val, as frequent as words are."""
    def measure(path, vocab_size, val, queue):
        tokens = np.memmap(path, np.uint16, "r")
        before, began = script.peak_memory(torch.device("cpu")), time.perf_counter()
        script.baselines(tokens[:-val], tokens[-val:], vocab_size)
        took = time.perf_counter() - began
        queue.put((took, (script.peak_memory(torch.device("cpu")) - before) / 1e6))

    fork = multiprocessing.get_context("fork")
    for vocab_size, val in itertools.product((65, 4096, 50257), (1_000_000, 5_000_000)):
        with tempfile.NamedTemporaryFile() as file:
            chances = 1 / np.arange(1, vocab_size + 1)
            part = np.random.default_rng(0).choice(vocab_size, 10_000_000, p=chances / chances.sum())
            for seed in range(11):
                np.random.default_rng(seed).permutation(part.astype(np.uint16)).tofile(file)
            file.flush()
            queue = fork.Queue()
            process = fork.Process(target=measure, args=(file.name, vocab_size, val, queue))
            process.start()
            took, memory = queue.get()
            process.join()
        print(f"{vocab_size:,} kinds, {val:,} of val: {took:.2f} s, {memory:,.0f} MB")
        record("counts", vocab_size=vocab_size, val=val, seconds=took, megabytes=memory)


def curves(data):
    """The training loss of 300 steps of 4 x 128, same batches, in bfloat16 against float32: the
    largest difference of a mean over 10 steps, and that of the exact val loss at the end."""
    for seed in (1, 2, 3):
        losses, vals = [], []
        for kind in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(data, Path(folder, "data/shakespeare_char"))
                subprocess.run([sys.executable, Path(script.__file__), *BOTH, f"--seed={seed}",
                                f"--dtype={kind}", "--batch_size=24", "--max_iters=300",
                                "--eval_interval=0", "--log_interval=1"], cwd=folder, check=True,
                               stdout=subprocess.DEVNULL)
                with open(Path(folder, "out/shakespeare_char/metrics.csv")) as file:
                    rows = list(csv.DictReader(file))
            losses.append(np.array([float(row["loss"]) for row in rows[1:]])
                          .reshape(30, 10).mean(axis=1))
            vals.append(float(rows[-1]["val"]))
        apart = np.abs(losses[1] / losses[0] - 1).max()
        print(f"seed {seed}: {apart:.2%} apart at most, val {vals[0]:.4f} and {vals[1]:.4f}, "
              f"{abs(vals[1] / vals[0] - 1):.2%} apart", flush=True)


def padding(run, steps="40"):
    """Perplexity on the test split of real tokens alone, and of all that fill its rows, by a run's
    best model, and by the same after a few steps whose loss counts padding, too."""
    saved = load_checkpoint(Path(run, "best.pt"))
    vars(script).update(saved["settings"])
    _, tokenizer, data, _ = script.load_dataset(Path("data") / script.dataset)
    model, real = saved["model"], script.read_rows
    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)

    def padded(*arguments):
        x, y = real(*arguments)
        return x, y.masked_fill(y < 0, tokenizer.eot)

    def report(when):
        found = []
        for script.read_rows in (real, padded):
            found.append(np.exp(script.evaluate(forward, data["test"])[0]))
        print(f"perplexity {when}: {found[0]:.2f} of real tokens, {found[1]:.2f} with padding",
              flush=True)

    report("as trained")
    torch.manual_seed(0)  # of dropout; read_rows is still the padded one
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-4)  # as published
    for number in range(int(steps)):
        rows = data["train"]
        x, y = script.read_rows(rows, script.row_spans(rows, number, 0), "cpu")
        forward(x, y)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    report(f"after {steps} steps that count padding")


SIZES = [  # label, steps, vocabulary, settings of both
    ("4 x 64, 95 characters", 400, 95, dict(
        n_layer=4, n_head=4, n_embd=64, block_size=32, batch_size=16, dropout=0.0)),
    ("2 x 256, dropout 0.1", 40, 65, dict(
        n_layer=2, n_head=8, n_embd=256, block_size=128, batch_size=32, dropout=0.1)),
    ("6 x 384", 8, 65, dict(
        n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.0)),
    ("6 x 384, dropout 0.2", 8, 65, dict(
        n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2)),
    ("6 x 512, 50,257 tokens, dropout 0.1", 8, 50257, dict(
        n_layer=6, n_head=8, n_embd=512, block_size=256, batch_size=4, dropout=0.1)),
    ("12 x 768, 50,257 tokens", 8, 50257, dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=1, dropout=0.0))]


CUDA_SIZES = [  # label, steps, vocabulary, settings of both
    ("6 x 384", 700, 65, dict(
        n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.0)),
    ("6 x 384, dropout 0.2", 700, 65, dict(
        n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2)),
    ("12 x 768, 50,304 tokens", 140, 50304, dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32, dropout=0.0))]


def on_a_gpu(folder, command):
    """Milliseconds of a step of a program that waits for the GPU in every twentieth, where it
    logs: from the third line of its log to the last but one. And seconds to the first."""
    began, stamps = time.perf_counter(), []
    with subprocess.Popen([sys.executable, *command, "--log_interval=20"], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}) as run:
        for line in run.stdout:
            if found := re.match(r"(?:iter | +)([\d,]+):? ", line):
                stamps.append((int(found[1].replace(",", "")), time.perf_counter() - began))
    assert run.returncode == 0, command
    (first, since), (last, until) = stamps[2], stamps[-2]
    return 1000 * (until - since) / (last - first), stamps[0][1]


def make_dataset(folder, vocabulary):
    """data/x of random characters in folder, for both programs."""
    characters = "".join(chr(0x10000 + i) for i in range(vocabulary))
    text = "".join(random.Random(0).choices(characters, k=200_000))
    with redirect_stdout(None):
        write_dataset(Path(folder, "data/x"), {"train": [text], "val": [text]},
                      CharTokenizer(characters))
    Path(folder, "data/x/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))


RUN = ["--bias=False", "--dataset=x", "--eval_iters=1"]
OURS_ALONE = ["--overwrite=True", "--plot=False", "--eval_interval=0"]


def cases(table, only, folder, nanogpt=""):
    """For each size whose label has only in it: label, vocabulary, sizes and the settings of both
    programs, whose data is then in folder, as are nanoGPT's scripts."""
    for name in ("train.py", "model.py", "configurator.py") if nanogpt else ():
        shutil.copy(Path(nanogpt) / name, folder)
    for label, steps, vocabulary, sizes in table:
        if only in label:
            make_dataset(folder, vocabulary)
            given = [f"--{name}={value}" for name, value in sizes.items()]
            yield label, vocabulary, sizes, [*RUN, *given, f"--max_iters={steps}"]


def train_on_a_gpu(nanogpt, only="", turns="1"):
    repo = Path(script.__file__).parent
    machine()
    with tempfile.TemporaryDirectory() as folder:
        for label, _, sizes, given in cases(CUDA_SIZES, only, folder, nanogpt):
            given += ["--device=cuda", "--dtype=bfloat16"]
            times = {"nanoGPT": [], "ours": []}
            for _ in range(int(turns)):
                times["nanoGPT"].append(on_a_gpu(folder, [
                    "train.py", *given, "--compile=True", "--gradient_accumulation_steps=1",
                    f"--eval_interval={10 ** 9}"]))
                times["ours"].append(on_a_gpu(folder, [repo / "train.py", *given, *OURS_ALONE]))
            report_ms(label, times, sizes["batch_size"] * sizes["block_size"])


def report_ms(label, times, tokens):
    """A table of {name: [(ms of a step, seconds to the first)]}, medians."""
    medians = {name: [statistics.median(values) for values in zip(*pairs)]
               for name, pairs in times.items()}
    record(label, ms_and_start=medians)
    print(label)
    first = next(iter(medians.values()))[0]
    for name, (ms, start) in medians.items():
        print(f"{name:>28}{ms:9.2f} ms  x{first / ms:5.2f}{1000 * tokens / ms:12,.0f} tok/s, "
              f"the first after {start:.1f} s", flush=True)


def levers():
    """Steps of train.py on a GPU as they come, and with one setting changed at a time."""
    repo, changes = Path(script.__file__).parent, [
        "", "--cuda_graph=False", "--compile=false", "--deterministic=True", "--optimizer=muon"]
    with tempfile.TemporaryDirectory() as folder:
        for label, _, sizes, given in cases(CUDA_SIZES[1:], "", folder):
            given += [*OURS_ALONE, "--device=cuda", "--dtype=bfloat16"]
            times = {change or "as it comes": [on_a_gpu(folder, [
                repo / "train.py", *given, *change.split()])] for change in changes}
            report_ms(label, times, sizes["batch_size"] * sizes["block_size"])


def train(nanogpt, only="", turns="3"):
    """Medians over all steps but the first three of each process, and the largest peak memory."""
    if DEVICE == "cuda":
        return train_on_a_gpu(nanogpt, only, turns)
    ceiling = 1e12 * max(machine().values())
    repo = Path(script.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for label, vocabulary, sizes, given in cases(SIZES, only, folder, nanogpt):
            given += ["--device=cpu", "--log_interval=1"]
            commands = {
                "nanoGPT": ["train.py", *given, "--compile=False",
                            "--gradient_accumulation_steps=1", f"--eval_interval={10 ** 9}"],
                "ours": [repo / "train.py", *given, *OURS_ALONE]}
            if not sizes["dropout"]:  # with dropout it takes longer
                commands["compiled"] = [*commands["ours"], "--compile=true"]
            times, peaks = {name: [] for name in commands}, dict.fromkeys(commands, 0)
            for _ in range(int(turns)):
                for name, command in commands.items():
                    run = subprocess.Popen([sys.executable, *command], cwd=folder, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                    out = run.stdout.read()
                    _, status, usage = os.wait4(run.pid, 0)
                    assert status == 0, out
                    metrics = Path(folder, "out/x/metrics.csv")
                    found = (re.findall(r"time ([\d.]+)ms", out) if name == "nanoGPT" else
                             [row["ms"] for row in csv.DictReader(metrics.open())])
                    times[name] += [float(ms) for ms in found if ms][3:]
                    peaks[name] = max(peaks[name], 1024 * usage.ru_maxrss)
            with torch.device("meta"):
                shape = {name: sizes[name] for name in sizes if name != "batch_size"}
                flops = GPT(GPTConfig(vocab_size=vocabulary, **shape)).flops_per_token()
            record(label, ms={name: statistics.median(ms) for name, ms in times.items()}, peak=peaks)
            print(label)
            for name, values in times.items():
                ms = statistics.median(values)
                tokens = sizes["batch_size"] * sizes["block_size"] * 1000 / ms
                print(f"{name:>10}{ms:11,.2f} ms  x{statistics.median(times['nanoGPT']) / ms:5.2f}"
                      f"{tokens:10,.0f} tok/s{flops * tokens / ceiling:6.0%} of the product"
                      f"{peaks[name] / 1e6:8,.0f} MB", flush=True)


BOTH = ["--device=cpu", "--dataset=shakespeare_char", "--n_layer=4", "--n_head=4", "--n_embd=128",
        "--block_size=64", "--bias=False", "--dropout=0.0"]
THEIRS = ["--compile=False", "--batch_size=12", "--gradient_accumulation_steps=1",
          "--max_iters=2000", "--lr_decay_iters=2000", "--warmup_iters=100", "--learning_rate=1e-3",
          "--min_lr=1e-4", "--beta2=0.99", "--eval_interval=250", "--eval_iters=20",
          "--always_save_checkpoint=False"]
OURS = ["--optimizer=muon", "--activation=relu", "--beta1=0.85", "--beta2=0.95",
        "--lr_schedule=linear", "--min_lr=0.0", "--eval_interval=0", "--eval_iters=1",
        "--plot=False", "--overwrite=True"]
# To a loss as good as theirs, and the best in as much time:
SHORT = ["--learning_rate=2.8e-2", "--momentum=0.8", "--weight_decay=0.0", "--warmup_iters=5",
         "--batch_size=32", "--max_iters=190"]
LONG = ["--learning_rate=1e-2", "--momentum=0.85", "--weight_decay=0.2", "--warmup_iters=50",
        "--batch_size=40"]


def prepare_race(folder, nanogpt, data, seed=1337):
    """Tiny Shakespeare and nanoGPT's scripts, with this seed, in folder."""
    shutil.copytree(data, Path(folder, "data/shakespeare_char"), dirs_exist_ok=True)
    characters = json.loads(Path(data, "meta.json").read_text())["tokenizer"]["vocabulary"]
    Path(folder, "data/shakespeare_char/meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(characters)}))
    for name in ("model.py", "configurator.py", "train.py"):
        source = Path(nanogpt, name).read_text()
        Path(folder, name).write_text(source.replace("1337", str(seed)))


def speedrun_on_a_gpu(nanogpt, data, seeds="1"):
    """Seconds of whole processes and the best val loss: nanoGPT's recipe for a GPU, exactly
    evaluated by us, and config/shakespeare_gpu.py."""
    repo = Path(script.__file__).parent
    theirs = ["train.py", "--compile=True", "--dtype=bfloat16", "--gradient_accumulation_steps=1",
              "--batch_size=64", "--block_size=256", "--n_layer=6", "--n_head=6", "--n_embd=384",
              "--dropout=0.2", "--learning_rate=1e-3", "--min_lr=1e-4", "--beta2=0.99",
              "--warmup_iters=100", "--max_iters=5000", "--lr_decay_iters=5000", "--bias=False",
              "--eval_interval=250", "--eval_iters=200", "--always_save_checkpoint=False",
              "--dataset=shakespeare_char", "--device=cuda"]
    ours = [repo / "train.py", repo / "config/shakespeare_gpu.py", "--device=cuda",
            "--overwrite=True", "--plot=False"]
    for seed in range(1, int(seeds) + 1):
        with tempfile.TemporaryDirectory() as folder:
            prepare_race(folder, nanogpt, data, seed)
            for name, command in (("ours", [*ours, f"--seed={seed}"]), ("nanoGPT", theirs)):
                began = time.perf_counter()
                run = partial(subprocess.run, cwd=folder, check=True, capture_output=True, text=True)
                out = run([sys.executable, *command]).stdout
                took = time.perf_counter() - began
                if name == "nanoGPT":
                    out = run([sys.executable, *ours[:3], "--init_from=out/ckpt.pt",
                               "--eval_only=True", "--plot=False"]).stdout
                found = re.findall(r"(?:best val loss|^ +val +[\d,]+) +([\d.]+)", out, re.MULTILINE)
                record(f"speedrun, seed {seed}", who=name, seconds=took, val=found[0])


def speedrun(nanogpt, data, seeds="3"):
    """Seconds of whole processes and the exact val loss of what they leave: nanoGPT's recipe for a
    CPU, ours to as good a loss, and ours in the time that theirs has just taken."""
    if DEVICE == "cuda":
        return speedrun_on_a_gpu(nanogpt, data, seeds)
    repo, peer, found = Path(script.__file__).parent, load_peer(nanogpt), []
    script.block_size, script.batch_size = 64, 32
    rows = script.Documents(np.fromfile(Path(data, "val.bin"), np.uint16), -1)
    with tempfile.TemporaryDirectory() as folder:
        def seconds(*command):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command, *BOTH], cwd=folder, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return time.perf_counter() - began

        def ours(seed, *recipe):
            took = seconds(repo / "train.py", *OURS, *recipe, f"--seed={seed}")
            saved = load_checkpoint(Path(folder, "out/shakespeare_char/last.pt"))
            loss = script.evaluate(saved["model"], rows)[0]
            return took, loss, saved["progress"]

        for seed in range(1, int(seeds) + 1):
            prepare_race(folder, nanogpt, data, seed)
            theirs = seconds("train.py", *THEIRS)
            saved = torch.load(Path(folder, "out/ckpt.pt"), weights_only=True)
            model = peer.GPT(peer.GPTConfig(**saved["model_args"])).eval()
            model.load_state_dict(saved["model"])
            their_loss = script.evaluate(lambda x, y: model(x, y.contiguous()), rows)[0]
            short, short_loss, run = ours(seed, *SHORT)
            minutes = (0.995 * theirs - (short - run["seconds"])) / 60  # less Python's start
            long, long_loss, run = ours(seed, *LONG, f"--max_minutes={minutes}")
            found.append((theirs / short, their_loss, short_loss, long_loss))
            print(f"seed {seed}: nanoGPT 2000 steps {theirs:5.1f} s val {their_loss:.4f}   "
                  f"ours {short:5.1f} s val {short_loss:.4f}  x{theirs / short:.2f}   "
                  f"{run['step']} steps {long:5.1f} s val {long_loss:.4f}", flush=True)
    print("medians: x{:.2f}, val {:.4f}, {:.4f} and {:.4f}".format(
        *map(statistics.median, zip(*found))))


if __name__ == "__main__":
    wanted = {"around": around, "attention": attention_kernels, "counts": counts, "curves": curves,
              "dtype": dtype, "encode": encode, "kernels": kernels, "levers": levers, "padding": padding,
              "sample": sample, "speedrun": speedrun, "train": train, "trust": trust}
    if "--device=cuda" in sys.argv or "levers" in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != "--device=cuda"]
        DEVICE = "cuda"
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA GPU here")
    if len(sys.argv) < 2 or sys.argv[1] not in wanted:
        sys.exit(__doc__)
    if sys.argv[1] not in ("train", "sample"):  # these begin with it
        machine()
    script.keep_memory()
    wanted[sys.argv[1]](*sys.argv[2:])
