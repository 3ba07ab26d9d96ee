"""Writes text with a model that train.py has trained.

    python sample.py --start="To be, or not to be"
    python sample.py --out_dir=out/shakespeare_cpu --start=FILE:prompt.txt --num_samples=4
    python sample.py --interactive=True --temperature=0.7 --top_p=0.9
    python sample.py --start="Once upon a time" --max_new_tokens=12 --attention=maps.png
"""

import sys
import time
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from config import configure, stop, stop_on_error
from model import (EOT, AttentionMaps, atomic_write, check_source, compiled, encode_prompt,
                   evaluating, load_checkpoint, load_pretrained, pick_device, write_pretrained)

# Model
init_from = "resume"     # a run; or gpt2 (-medium, -large, -xl), a folder, a .pt file
cache_dir = "data/pretrained"  # where gpt2... are kept, once downloaded
export = ""              # a folder to write for transformers, instead of text
out_dir = ""             # folder of a run; empty: that of the newest best.pt under out/
checkpoint = "best.pt"   # which file of it: best.pt, last.pt, step_1000.pt
device = "auto"          # auto, cpu, cuda, cuda:1, mps
dtype = "auto"           # of the weights: float32, bfloat16, float16 (CUDA); auto: the fastest
compile = "auto"         # auto (on CUDA), true or false: torch.compile, which begins slowly
# Text
start = ""               # or FILE:prompt.txt; empty: as the run's samples; the context sees its end
interactive = False      # read prompt after prompt from the terminal
num_samples = 1          # drawn side by side, as one batch; one alone is printed as it comes
max_new_tokens = 500     # at most: the end of a text ends a sample, too
stop_at = ""             # a string that ends a sample, and is left out
seed = 1337              # the same seed and settings, the same text; sample n draws by seed + n
# How the next token is drawn, in this order
repetition_penalty = 1.0  # above 1 makes tokens that stand in the text already less likely
temperature = 0.8        # 0: always the likeliest token; 1: as the model learned it; above: wilder
top_k = 0                # draw among this many likeliest tokens; 0, or the vocabulary: among all
top_p = 1.0              # among the fewest whose probabilities add up to this; 1: among all
min_p = 0.0              # among those with this share of the likeliest one's probability; 0: all
# Beam search, without draws and with none of the above
num_beams = 1            # texts kept side by side; 1: draw
length_penalty = 1.0     # above 0 favours longer texts, below 0 shorter ones
# Pictures
attention = ""           # a .png, .svg or .pdf to draw: what each token of the text attends to
settings = configure(globals())


def main():
    check_settings()
    with stop_on_error(2):
        target = pick_device(device)
    path, saved = init_from, {}
    with stop_on_error():
        if init_from == "resume":
            path = Path(out_dir or newest_run()) / checkpoint
            saved = load_checkpoint(path, target)
            model, tokenizer = saved["model"], saved["tokenizer"]
        else:
            model, tokenizer = load_pretrained(init_from, cache_dir)
        if export:
            write_pretrained(model, tokenizer, Path(export))
            return print(f"{path} as {export}, for AutoModelForCausalLM.from_pretrained")
    model.to(target, pick_dtype(model, target))
    model.step = compiled(model.step, compile.lower(), target, partial(trial, model), dynamic=True)
    if interactive:
        print(f"{path}, an empty line or Ctrl-D ends", file=sys.stderr)
        for line in prompts():
            try:
                idx = encode_prompt(tokenizer, line).to(target)
            except (ValueError, OSError) as error:  # of this prompt alone
                print(error, file=sys.stderr)
                continue
            write(model, tokenizer, idx)
        return
    with stop_on_error(2):
        begin = start or saved.get("settings", {}).get("start", "")
        idx = encode_prompt(tokenizer, begin).to(target)
    print(f"{path}:", file=sys.stderr)
    ids = write(model, tokenizer, idx)
    if attention:
        draw_attention(model, tokenizer, ids, f"{path}: attention of each token (down) to those up "
                                              f"to it (across)")


def check_settings():
    with stop_on_error(2):
        check_source(init_from, "resume")
    for name in ("temperature", "top_k", "max_new_tokens", "seed"):
        if settings[name] < 0:
            stop(f"--{name} must not be negative, not {settings[name]}", 2)
    for name in ("num_samples", "num_beams"):
        if settings[name] < 1:
            stop(f"--{name} must be at least 1, not {settings[name]}", 2)
    if not 0 < top_p <= 1:
        stop(f"--top_p must be above 0 and at most 1, which keeps all, not {top_p}", 2)
    if not 0 <= min_p < 1:
        stop(f"--min_p must be from 0, which keeps all, to below 1, not {min_p}", 2)
    if seed >= 2 ** 63:
        stop("--seed must be below 2 ** 63", 2)
    if repetition_penalty <= 0:
        stop(f"--repetition_penalty must be above 0, not {repetition_penalty}; 1 is none", 2)
    if num_beams > 1 and num_samples > 1:
        stop("--num_beams finds one text, leave --num_samples at 1", 2)
    if attention and (interactive or export or num_samples > 1):
        stop("--attention draws one text, without --interactive, --export and --num_samples", 2)
    if attention and not attention.endswith((".png", ".svg", ".pdf")):
        stop(f"--attention must be a file like maps.png, .svg or .pdf, not {attention!r}", 2)
    if attention and not find_spec("matplotlib"):
        stop("--attention needs the package matplotlib: pip install matplotlib", 2)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        stop(f"--dtype must be auto, float32, bfloat16 or float16, not {dtype!r}", 2)
    if compile.lower() not in ("auto", "true", "false"):
        stop(f"--compile must be auto, true or false, not {compile!r}", 2)


def pick_dtype(model, target):
    """What the weights are read in, which takes most of the time: half as many bytes, where the
    model is large enough to gain and the machine multiplies bfloat16. float16 is for CUDA, as in
    train.py, whose configs ask for it: elsewhere it means auto."""
    if dtype != "auto" and (dtype != "float16" or target.type == "cuda"):
        return getattr(torch, dtype)
    fast = (torch.cuda.is_bf16_supported(False) if target.type == "cuda" else
            target.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast and model.num_params() > 10e6 else torch.float32


def trial(model, step):
    """Writes two tokens to as many rows as will be written, the second one by step."""
    model.step, rows = step, max(num_samples, num_beams)
    model.generate(torch.zeros(rows, 2, dtype=torch.long, device=model.wte.weight.device), 2)


def prompts():
    """Lines typed at the terminal, until one is empty or it is closed."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().removesuffix("\n")
        if not line:
            return
        yield line


def write(model, tokenizer, idx):
    """Prints idx, (1, T), and what follows it, num_samples times. Returns the ids of the first."""
    prompt = tokenizer.decode(idx[0].tolist()).removeprefix(EOT)
    limits = {"eot": tokenizer.eot, "vocab_size": tokenizer.vocab_size}
    if num_beams > 1:
        out = model.beam_search(idx, max_new_tokens, num_beams, length_penalty, **limits)
        print(prompt + ended(tokenizer.decode(out[0, idx.shape[1]:].tolist()))[0])
        return out[0].tolist()
    generators = [torch.Generator().manual_seed(seed + row) for row in range(num_samples)]
    stream = model.stream(idx.repeat(num_samples, 1), max_new_tokens, generators, **limits,
                          repetition_penalty=repetition_penalty, temperature=temperature,
                          top_k=top_k, top_p=top_p, min_p=min_p)
    rows, texts, printed = [[] for _ in generators], [""] * num_samples, 0
    began = time.perf_counter()
    if num_samples == 1:
        print(prompt, end="", flush=True)
    for ids in stream:
        for row, token in zip(rows, ids[:, 0].tolist()):
            row.append(token)
        texts, done = zip(*(ended(tokenizer.decode(row)) for row in rows))
        if num_samples == 1:
            shown = settled(texts[0])
            print(shown[printed:], end="", flush=True)
            printed = max(printed, len(shown))
        if all(done):
            break
    if num_samples == 1:
        print(texts[0][printed:])
    else:
        print("\n----\n".join(prompt + text for text in texts))
    tokens, took = sum(map(len, rows)), time.perf_counter() - began
    print(f"{tokens:,} tokens in {took:.1f} s: {tokens / took:,.1f} tokens/s", file=sys.stderr)
    return idx[0].tolist() + rows[0]


def ended(text):
    """(text before its end, whether it has ended): at the end of a text or at stop_at."""
    ends = [text.find(mark) for mark in (EOT, stop_at) if mark and mark in text]
    return text[:min(ends, default=None)], bool(ends)


def settled(text):
    """The part of a growing text that can be shown: without a character whose bytes have not all
    come, and without what may become stop_at."""
    text = text.rstrip("\ufffd")
    for length in range(min(len(stop_at), len(text)), 0, -1):
        if text.endswith(stop_at[:length]):
            return text[:-length]
    return text


def draw_attention(model, tokenizer, ids, title):
    """Draws the weights of each layer (down) and head (across) on the last block_size of ids, with
    the tokens beside them where there is room. They are computed in float32."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    ids, maps = ids[-model.config.block_size:], AttentionMaps()
    with evaluating(model), torch.inference_mode():
        model.float().hidden(torch.tensor([ids], device=model.wte.weight.device), maps)
    layers, heads, T = len(maps.layers), model.config.n_head, len(ids)
    side = min(3.0, 7 / heads)  # of a map, inches
    figure = Figure(figsize=(8, 1.8 + side * layers), dpi=100, layout="compressed")
    grid = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            image = axes.imshow(maps.layers[layer][0, head].numpy(force=True), cmap="Blues",
                                norm=PowerNorm(0.5, 0, 1))  # the root, which shows small ones, too
            axes.set_title(f"head {head}" if layer == 0 else "", fontsize=8)
            axes.set_ylabel(f"layer {layer}" if head == 0 else "", fontsize=8)
            axes.tick_params(labelsize=7)
    if T <= 10 * side:  # a line of the smallest letters that can be read takes a tenth of an inch
        labels = [tokenizer.decode([i])[:12].replace("\n", "\\n").replace(" ", "·")
                  .replace("$", "\\$") for i in ids]
        grid[0, 0].set(xticks=range(T), xticklabels=labels, yticks=range(T), yticklabels=labels)
        for axes in grid[-1]:
            axes.tick_params("x", rotation=90)
    figure.colorbar(image, ax=grid, label="attention weight", location="bottom",
                    shrink=0.5, aspect=40)
    figure.suptitle(title, fontsize=10)
    with (stop_on_error(), warnings.catch_warnings(), atomic_write(Path(attention)) as file):
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks
        figure.savefig(file, format=attention[-3:])


def newest_run():
    """The folder of the best.pt written last."""
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        stop("no best.pt under out/ yet, train a model first or give its --out_dir")
    return found[-1].parent


if __name__ == "__main__":
    main()
