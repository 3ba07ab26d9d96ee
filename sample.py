"""Writes text with a model that train.py has trained.

    python sample.py --start="To be, or not to be"
    python sample.py --out_dir=out/shakespeare_cpu --start=FILE:prompt.txt --num_samples=4
    python sample.py --interactive=True --temperature=0.7 --top_p=0.9
    python sample.py --start="Once upon a time" --max_new_tokens=30 --explain=page.html
"""

import base64
import codecs
import json
import math
import re
import sys
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from config import at_least, configure, one_of, require, stop_on_error
from model import (ACTIVATION_NAMES, ASSUMED, EOT, GPT, LETTERS, PRETRAINED, PRODUCTS, TRANSPOSED,
                   BPETokenizer, KVCache, Unfilled, atomic_write, check_finite, encode_prompt,
                   fastest, filter_logits, load_checkpoint, next_logits, pick_device, pick_dtype,
                   run_file, stream, tried, unescape, use_product)

# Model
init_from = "resume"     # a run; or gpt2 (-medium, -large, -xl), a folder, a .pt file
cache_dir = "data/pretrained"  # where gpt2... are kept, once downloaded
export = ""              # a folder to write for transformers, instead of text
out_dir = ""             # folder of a run; empty: that of the newest under out/
checkpoint = "best.pt"   # which file of it: best.pt, last.pt, step_1000.pt; or a path
device = "auto"          # auto, cpu, cuda, cuda:1, mps
dtype = "auto"           # of the weights: float32, bfloat16, float16, int8 (CPU); auto: the fastest
compile = "auto"         # auto and false: no; true: torch.compile, which begins slowly
# Text
start = ""               # \n is a line end; or FILE:prompt.txt; empty: as the run's samples
interactive = False      # read prompt after prompt from the terminal
num_samples = 1          # written side by side, as one batch; one alone is printed as it comes
max_new_tokens = 500     # at most: the end of a text ends a sample, too
stop_at = ""             # a string that ends a sample, and is left out; \n is a line end
seed = 1337              # the same seed, settings and type, the same text; sample n: seed + n
# How the next token is sampled, in this order
repetition_penalty = 1.0  # above 1 makes tokens that stand in the text already less likely
no_repeat_ngram = 0      # as many tokens never come twice in the same order; 0: they may
temperature = 0.8        # 0: always the likeliest token; 1: as the model learned; above: wilder
top_k = 0                # among this many likeliest tokens; 0: among all
top_p = 1.0              # among the fewest whose probabilities add up to this; 1: among all
min_p = 0.0              # an adaptive p: among those with this share of the largest; 0: all
typical_p = 1.0          # among those about as surprising as expected that add up to this; 1: all
# Beam search, without chance and with none of the above
num_beams = 1            # texts kept side by side; 1: sample
length_penalty = 1.0     # above 0 favours longer texts, below 0 shorter ones
# Pictures
attention = ""           # a .png, .svg or .pdf to draw: what each token of the text attends to
explain = ""             # an .html page to write: what each token of the text does in the model
settings = configure(globals())
stop_at = unescape(stop_at)
FILTERS = ("repetition_penalty", "no_repeat_ngram", "temperature", "top_k", "top_p", "min_p",
           "typical_p")  # in the order of filter_logits()

def main():
    check_settings()
    with stop_on_error(2):
        device = pick_device(settings["device"])
    with stop_on_error():
        source = init_from
        if init_from == "resume":
            source = find_checkpoint()
        saved = load_checkpoint(source, device, cache_dir)
        model, tokenizer = saved["model"], saved["tokenizer"]
        if export:
            write_pretrained(model, tokenizer, Path(export))
            return print(f"{source} as {export}, for AutoModelForCausalLM.from_pretrained")
    # Each token reads all weights from memory: half the bytes are faster, if there are many.
    with stop_on_error(2):
        set_dtype(model, dtype, device, max(num_samples, num_beams))
    words = cache(partial(training_words, saved))
    read_token = None
    if compile.lower() == "true":
        read_token = tried("torch.compile", partial(compile_reading, model, device))
    run = saved.get("settings", {})
    encode = partial(encode_prompt, tokenizer, document_rows=run.get("document_rows", False))
    if interactive:
        print(f"{source}, an empty line or Ctrl-D ends", file=sys.stderr)
        with stop_on_error():
            for line in prompts():
                try:
                    ids = encode(unescape(line)).to(device)
                except (ValueError, OSError) as error:  # of this prompt alone
                    print(error, file=sys.stderr)
                    continue
                write(model, tokenizer, ids, read_token, words)
        return
    with stop_on_error(2):
        ids = encode(unescape(start))
    if not start:
        with suppress(ValueError, OSError):  # the run's may be a file that is gone
            ids = encode(unescape(run.get("start", "")))
    print(f"{source}:", file=sys.stderr)
    first = ids.shape[1]  # of the tokens that are written
    with stop_on_error():
        ids = write(model, tokenizer, ids.to(device), read_token, words)
        if attention or explain:  # in float32, whatever was the fastest
            model = load_checkpoint(source, "cpu", cache_dir)["model"]
        if explain:
            write_page(explain, model, tokenizer, ids, first, source)
    if attention:
        plot_attention(model, tokenizer, ids, f"{source}: who (down) attends to whom (across)")

def check_settings():
    at_least(0, settings, "temperature", "top_k", "no_repeat_ngram", "max_new_tokens", "seed")
    at_least(1, settings, "num_samples", "num_beams")
    one_of(settings, "dtype", "auto", "float32", "bfloat16", "float16", "int8")
    if not (init_from and Path(init_from).exists()):
        one_of(settings, "init_from", "resume", *PRETRAINED, "an existing .pt or folder")
    require(init_from == "resume" or not out_dir, f"--init_from={init_from} and --out_dir={out_dir}"
            f" are two models: give --init_from=resume, or --out_dir= without a value")
    one_of(settings | {"compile": compile.lower()}, "compile", "auto", "true", "false")
    for name in ("top_p", "typical_p"):
        require(0 < settings[name] <= 1, f"--{name} must be above 0 and at most 1, which keeps all")
    require(0 <= min_p < 1, "--min_p must be from 0, which keeps all, to below 1")
    require(seed < 2 ** 63, "--seed must be below 2 ** 63")
    require(abs(length_penalty) <= 50, "--length_penalty must be from -50 to 50")
    require(repetition_penalty > 0, "--repetition_penalty must be above 0; 1 is none")
    require(1 in (num_beams, num_samples), "--num_beams finds one text, leave --num_samples at 1")
    for name, ends in {"attention": (".png", ".svg", ".pdf"), "explain": (".html",)}.items():
        if path := settings[name]:
            require(not interactive and not export and num_samples == 1,
                    f"--{name} shows one text, without --interactive, --export, --num_samples")
            require(path.endswith(ends), f"--{name} must be a file with the end "
                    f"{' or '.join(ends)}, not {path!r}")
    require(not attention or find_spec("matplotlib"), "--attention needs pip install matplotlib")

def find_checkpoint():
    """The file of the run in out_dir, else of the newest under out/."""
    runs = [out_dir] if out_dir or "/" in checkpoint else {
        path.parent for path in Path("out").rglob("*.pt")}
    paths = [path for run in runs if (path := run_file(run, checkpoint)).exists()]
    require(paths, f"no {checkpoint} under {out_dir or 'out'}/ yet, train a model first or give "
            f"its --out_dir", 1)
    return max(paths, key=lambda path: path.stat().st_mtime)

@torch.no_grad()
def set_dtype(model, name, device, rows):
    """Gives the weights the number type of a setting. On a CPU auto is the product by which
    matrices of the model, up to 100 MB, are the fastest for a token of each row."""
    if device.type != "cpu" and name != "int8":
        return model.to(getattr(torch, pick_dtype(name, device, {})))
    linears, size = [], 0
    for module in model.h.modules():
        if isinstance(module, nn.Linear) and size < 1e8:
            linears.append(module)
            size += module.weight.nbytes

    def trial(product):
        dtype, linear, _ = PRODUCTS[product]
        layers = [linear(deepcopy(module).to(dtype)) for module in linears]
        inputs = [torch.ones(rows, module.in_features, dtype=dtype) for module in linears]
        return lambda: [layer(x) for layer, x in zip(layers, inputs)]

    if name == "auto":
        name = "float32"
        if size > 1e7:  # what is smaller stays at hand
            half = ["float16"] * ("fbgemm" in torch.backends.quantized.supported_engines)
            name = fastest({product: trial(product) for product in (name, *half, "bfloat16")})
    use_product(model, name)

def compile_reading(model, device):
    """model.hidden compiled for one token at a time."""
    hidden = torch.compile(model.hidden, dynamic=True)
    ids = torch.zeros(max(num_samples, num_beams), 2, dtype=torch.long, device=device)
    list(stream(model, ids, 2, read_token=hidden))  # which is called, and compiles, at the second
    return hidden

def prompts():
    """Lines typed at the terminal, until one is empty or it is closed."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input().removeprefix("\ufeff").removesuffix("\r")
        except (EOFError, RuntimeError):  # RuntimeError: stdin was closed from the start
            return
        if not line:
            return
        yield line

# ---- writing ----

def write(model, tokenizer, ids, read_token=None, words=set):
    """Prints ids (1, T) and what follows, num_samples times, and on stderr how fast that was, how
    the texts ended and which of their words words() has. Returns the ids of the first."""
    prompt = tokenizer.decode(ids[0].tolist()).removeprefix(EOT)
    shared = {"eot": tokenizer.eot, "vocab_size": tokenizer.vocab_size, "read_token": read_token}
    began = time.perf_counter()
    if num_beams > 1:
        new = beam_search(model, ids, max_new_tokens, num_beams, length_penalty, **shared)
        new = new[0, ids.shape[1]:, None, None]
    else:
        generators = [torch.Generator().manual_seed(seed + row) for row in range(num_samples)]
        new = stream(model, ids.repeat(num_samples, 1), max_new_tokens, generators, **shared,
                     **{name: settings[name] for name in FILTERS})
    texts = [Text(tokenizer) for _ in range(num_samples)]
    print_texts(new, texts, prompt)
    tokens, seconds = sum(len(text.ids) for text in texts), time.perf_counter() - began
    print(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.1f} tokens/s",
          *statistics(texts, prompt, words), sep="\n", file=sys.stderr)
    return ids[0].tolist() + texts[0].ids

def print_texts(new, texts, prompt):
    """Prints (B, 1) ids, one after another: one text as it comes, several once all have ended."""
    alone = len(texts) == 1
    print(prompt if alone else "", end="", flush=True)
    for ids in new:
        for text, token in zip(texts, ids[:, 0].tolist()):
            more = text.append(token)
        if alone:
            print(more, end="", flush=True)
        if all(text.ended for text in texts):
            break
    rest = [text.append() for text in texts]
    print(rest[0] if alone else "\n----\n".join(prompt + text.shown for text in texts))

class Text:
    """A text that comes token by token, each decoded once, up to its end or to stop_at."""
    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""
        self.ended, self.end = False, ""  # end: what ended it, if it ended by itself
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = ""  # what may become stop_at

    def append(self, token=None):
        """Takes the next token, or None after the last. Returns what can be shown now: no
        character whose bytes have not all come, and no beginning of stop_at."""
        if self.ended:
            return ""
        self.ids += [] if token is None else [token]
        self.ended = token in (None, self.tokenizer.eot)
        self.end = " " if self.ended and token is not None else ""
        new = b"" if self.ended else self.tokenizer.token(token)
        text = self.rest + self.decoder.decode(new, final=self.ended)
        if stop_at and stop_at in text:
            self.ended, self.end, text = True, stop_at, text[:text.index(stop_at)]
        ends = [n for n in range(1, len(stop_at)) if text.endswith(stop_at[:n]) and not self.ended]
        shown = len(text) - max(ends, default=0)
        self.rest, text = text[shown:], text[:shown]
        self.shown += text
        return text

# A whole word, its apostrophes, too; but not the last of a text, which may be cut.
WORD = re.compile(r"(?<![^\W_])(?<![^\W_]['’])[^\W_]+(?:['’][^\W_]+)*(?=[^\w'’]|['’]\W)")

def training_words(saved):
    """The words, in lower case, of the first 5 million tokens that a model was trained on; none
    where its dataset is not here."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        folder = Path("data", saved["settings"]["dataset"])
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["tokenizer"] == saved["tokenizer"].spec:
            ids = np.fromfile(folder / "train.bin", meta["dtype"], 5_000_000)
            return set(WORD.findall(saved["tokenizer"].decode(ids).lower()))
    return set()

def statistics(texts, prompt, known):
    """Yields sentences about texts: how many ended by themselves and, of several, how many pairs
    of words are distinct and which share of the words is among those of known()."""
    lengths = [len(text.ids) for text in texts if text.end]
    if len(texts) == 1:
        if lengths:
            yield "it ended by itself"
        return
    if stop_at or texts[0].tokenizer.eot is not None:
        yield (f"{len(lengths)} of {len(texts)} ended by themselves"
               + (f", after {np.mean(lengths):,.0f} tokens on average" if lengths else ""))
    before = len(prompt.lower())
    rows = [WORD.findall((prompt + text.shown + text.end).lower(), before) for text in texts]
    pairs = [pair for row in rows for pair in zip(row, row[1:])]
    words = [word for row in rows for word in row]  # but one that the prompt begins, or cut off
    if pairs:
        yield f"{len(set(pairs)) / len(pairs):.1%} of {len(pairs):,} pairs of words are distinct"
    if words and known():
        share = sum(word in known() for word in words) / len(words)
        yield f"{share:.1%} of {len(words):,} words stand in the first 5M tokens of training"
    elif words:
        yield "the training text is not here, to look up words in"

@torch.no_grad()
def beam_search(model, ids, max_new_tokens, num_beams, length_penalty=1.0, eot=None,
                vocab_size=None, read_token=None):
    """(1, T) ids -> these and the continuation with the largest log-probability / length **
    length_penalty among those that num_beams partial texts, kept at each length, lead to."""
    cache = KVCache(model.config, num_beams, model.wpe.weight)
    rows = ids.repeat(num_beams, 1)
    scores = torch.full((num_beams, 1), -math.inf, device=ids.device)
    scores[0] = 0.0  # all rows are the same yet
    finished = []    # (score, row), the best num_beams
    for length in range(1, max_new_tokens + 1):
        # The best ways to go on from any row by any token: twice as many, as half may end.
        logits = next_logits(model, rows, cache, read_token)
        check_finite(logits)
        logits = logits[:, :vocab_size]
        totals = scores + logits.log_softmax(dim=-1)                             # (beams, V)
        best, places = totals.flatten().topk(min(2 * num_beams, totals.numel()))
        source, token = places // totals.shape[1], places % totals.shape[1]
        rows = torch.cat((rows[source], token[:, None]), dim=1)
        ended = token == (-1 if eot is None else eot)
        if length == max_new_tokens:
            ended[:] = True

        finished += [(best[i].item() / length ** length_penalty, rows[i])
                     for i in range(min(num_beams, len(best))) if ended[i]]
        finished = sorted(finished, key=lambda pair: -pair[0])[:num_beams]
        alive = (~ended).nonzero()[:num_beams, 0]
        if len(alive) < num_beams or (len(finished) == num_beams and finished[-1][0] >=
                                      best[alive[0]].item() / length ** length_penalty):
            break  # as transformers does; a longer text may win where the penalty is above 0
        rows, scores = rows[alive], best[alive, None]
        for kv in cache.layers:  # each row goes on from what its source has read
            kv[:, :, :, :cache.length] = kv[:, source[alive], :, :cache.length]
    return finished[0][1][None] if finished else ids

# ---- pictures ----

def plot_attention(model, tokenizer, ids, title):
    """Draws the weights of each layer (down) and head (across) on the last block_size of ids,
    with the tokens beside them where there is room."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    ids, maps = ids[-model.config.block_size:], []
    with torch.inference_mode():
        model.hidden(torch.tensor([ids]), maps=maps)
    layers, heads, T = len(maps), model.config.n_head, len(ids)
    side = min(3.0, 7 / heads)  # of a map, inches
    figure = Figure(figsize=(8, 1.8 + side * layers), dpi=100, layout="compressed")
    grid = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for layer, row in enumerate(grid):
        row[0].set_ylabel(f"layer {layer + 1}", fontsize=8)
        for head, axes in enumerate(row):
            image = axes.imshow(maps[layer][0, head].numpy(force=True), cmap="Blues",
                                norm=PowerNorm(0.5, 0, 1))  # the root, which shows small ones
            axes.tick_params(labelsize=7)
    for head, axes in enumerate(grid[0]):
        axes.set_title(f"head {head + 1}", fontsize=8)
    if T <= 10 * side:  # the smallest letters that can be read are a tenth of an inch high
        labels = [tokenizer.decode([i])[:12].replace("\n", "\\n").replace(" ", "·")
                  .replace("$", "\\$") for i in ids]
        grid[0, 0].set(xticks=range(T), xticklabels=labels, yticks=range(T), yticklabels=labels)
        for axes in grid[-1]:
            axes.tick_params("x", rotation=90)
    figure.colorbar(image, ax=grid, label="attention weight", location="bottom",
                    shrink=0.5, aspect=40)
    figure.suptitle(title, fontsize=10)
    with stop_on_error(), warnings.catch_warnings(), atomic_write(attention) as file:
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks
        figure.savefig(file, format=attention[-3:])

# ---- export, as transformers keeps a GPT-2 ----

def write_pretrained(model, tokenizer, folder):
    """Writes config.json, model.safetensors and, of byte-pair tokens, tokenizer.json, as
    transformers' AutoModelForCausalLM and AutoTokenizer load them. A bias that the model lacks
    is written as zeros. Raises ValueError for what a GPT2Config cannot say."""
    c = model.config
    if c.norm != "pre" or c.positions != "learned":
        raise ValueError("transformers' GPT-2 has neither norm=post nor positions=sinusoidal")
    with torch.device("meta"), Unfilled():
        expected = GPT(replace(c, bias=True, qkv_bias=True)).state_dict()
    activation = next(name for name, ours in ACTIVATION_NAMES.items() if ours == c.activation)
    ours, weights = model.state_dict(), {}
    for name, empty in expected.items():
        w = ours[name].float().cpu() if name in ours else torch.zeros(empty.shape)
        weights[f"transformer.{name}"] = w.T if name.endswith(TRANSPOSED) else w
    for name in ("transformer.wte.weight", "transformer.lm_head.weight"):
        weights[name] = weights[name][:tokenizer.vocab_size]  # without padding
    head = weights.pop("transformer.lm_head.weight")
    if not c.tied:
        weights["lm_head.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", weights, tokenizer.spec)
    files = {"config.json": ASSUMED | {
        "architectures": ["GPT2LMHeadModel"], "activation_function": activation,
        "n_positions": c.block_size, "vocab_size": len(head), "n_layer": c.n_layer,
        "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_inner or None,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout * c.attn_dropout,
        "tie_word_embeddings": c.tied, "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot,
        "n_ctx": c.block_size},  # of converters to other programs
        "generation_config.json": {"max_length": c.block_size, "bos_token_id": tokenizer.eot,
                                   "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}}
    if isinstance(tokenizer, BPETokenizer):
        eot = tokenizer.decode([] if tokenizer.eot is None else [tokenizer.eot]) or None
        files["tokenizer.json"] = tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size,
            "bos_token": eot, "eos_token": eot, "unk_token": eot, "pad_token": eot,
            "clean_up_tokenization_spaces": False}
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                 "model.safetensors.index.json"):
        if name not in files:
            (folder / name).unlink(missing_ok=True)  # another model's

def write_safetensors(path, weights, spec):
    """Writes {name: tensor} as float32, in order of names, and a tokenizer's spec."""
    header, end = {"__metadata__": {"format": "pt", "tokenizer": json.dumps(spec)}}, 0
    for name, w in sorted(weights.items()):
        header[name] = {"dtype": "F32", "shape": list(w.shape),
                        "data_offsets": [end, end + 4 * w.numel()]}
        end += 4 * w.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, w in sorted(weights.items()):
            file.write(w.contiguous().numpy().data)

def tokenizer_json(tokenizer):
    """A byte-pair tokenizer as Hugging Face's tokenizers keep one: bytes as printable
    characters, and the pairs that are merged, where tiktoken has ranks."""
    def letters_of(token):
        return "".join(LETTERS[byte] for byte in token)

    ranks, merges = tokenizer.ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # by the pairs that came before it, it is down to its own pair
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([letters_of(part) for part in parts])
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = {"type": "Split", "pattern": {"Regex": tokenizer.pieces}, "behavior": "Isolated",
           "invert": False}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False, "special": True}
                             for text, i in tokenizer.special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                cut, bytes_only | {"use_regex": False}]},
            "post_processor": None, "decoder": bytes_only | {"use_regex": False},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {letters_of(token): int(tokenizer.ids[rank])
                                for token, rank in ranks.items()} | tokenizer.special,
                      "merges": merges}}

# ---- a page that shows what a text does in the model ----

def write_page(path, model, tokenizer, ids, first, source):
    """Writes a page, of one file, about ids, those from first on written by the model."""
    kept = min(len(ids), model.config.block_size, 256)  # weights are kept * kept / 2 a head
    past, ids = ids[:-kept], ids[-kept:]
    numbers = explanation(model, tokenizer, ids, max(0, first - len(past)), past)
    numbers["title"] = f"What a text does in {source}"
    numbers["title"] += f": its last {kept} tokens, read anew" * bool(past)
    with suppress(OSError, ValueError, LookupError), warnings.catch_warnings(action="ignore"):
        log = Path(source).with_name("metrics.csv")
        rows = np.genfromtxt(log, delimiter=",", names=True, ndmin=1, invalid_raise=False)
        curve = {name: significant(rows[name][1:]) for name in ("step", "loss", "val")}  # from 1
        if Path(source).suffix == ".pt" and any(curve["loss"]):  # a run's, and not a stranger's
            numbers["curve"] = curve
    text = json.dumps(numbers).replace("<", "\\u003c")  # in a script no text may end it
    with atomic_write(path) as file:
        file.write(PAGE.replace("NUMBERS", text).encode())

@torch.inference_mode()
def explanation(model, tokenizer, ids, first, past):
    """Plain values for the page, from a model on a CPU, for each of T ids, which follow past: what
    it expects next, the surprise of what came, in bits; and after each layer what lm_head makes
    of the state (the logit lens), norms, attention weights (triangles of float32 in base64)."""
    x, maps, states, lens, sizes = torch.tensor([ids]), [], [], [], []
    model.hidden(x, maps=maps, states=states)
    T, came = len(ids), x[0, 1:]
    for block, before, after in zip(model.h, states, states[1:]):
        logits = model.lm_head(model.ln_f(after))[0, :, :tokenizer.vocab_size].double()  # (T, V)
        probs = logits.softmax(dim=-1)
        right = logits[:-1].gather(1, came[:, None])
        ranks = (logits[:-1] > right).sum(dim=1) + 1
        best = probs.max(dim=-1)
        lens.append({"token": [shown(tokenizer, i) for i in best.indices.tolist()],
                     "p": significant(best.values), "rank": ranks.tolist()})
        attended = block.attn(block.ln_1(before) if block.pre_norm else before)
        between = before + attended if block.pre_norm else block.ln_1(before + attended)
        added = block.mlp(block.ln_2(between) if block.pre_norm else between)
        sizes.append([significant(part[0].norm(dim=-1)) for part in (after, attended, added)])
    check_finite(logits)
    nats = -logits.log_softmax(dim=-1)  # those of the last layer are the model's own
    top, seen = probs.topk(min(10, probs.shape[1])), torch.tensor([past + ids])
    struck = [struck_out(logits[t:t + 1], seen[:, :len(past) + t + 1])[top.indices[t]].tolist()
              if t + 1 >= first and num_beams == 1 else [] for t in range(T)]
    triangle = torch.cat(maps)[:, :, *torch.tril_indices(T, T)]              # (L, H, ...)
    L, tied = len(model.h), model.config.tied
    parts = [("wte", model.wte, 1), ("wpe", model.wpe, 1)]
    parts += [(f"{L} x {name}", part, L) for name, part in model.h[0].named_children()]
    parts += [("ln_f", model.ln_f, 1), ("lm_head", model.lm_head, not tied)]
    return {
        "tokens": [shown(tokenizer, i) for i in ids], "first": first, "filters": FILTERS,
        "surprise": significant(nats[:-1].gather(1, came[:, None])[:, 0] / math.log(2)),
        "entropy": significant((probs * nats).nansum(dim=-1) / math.log(2)),
        "top": [[shown(tokenizer, i) for i in row] for row in top.indices.tolist()],
        "p": [significant(row) for row in top.values], "rank": ranks.tolist(), "struck": struck,
        "ids": ids, "top_ids": top.indices.tolist(), "lens": lens, "sizes": sizes,
        "heads": model.config.n_head,
        "attention": base64.b64encode(triangle.numpy().tobytes()).decode(),
        "parts": [[name, [1, *(logits if name == "lm_head" else after[0]).shape],
                   n * sum(p.numel() for p in part.parameters())] for name, part, n in parts]}

def struck_out(logits, seen):
    """(1, V) logits -> (V,) numbers of the filter that strikes out each token, from 1; 0: none."""
    by = torch.zeros(logits.shape[1], dtype=torch.long)
    for n in range(len(FILTERS), 0, -1):  # all of them, then without the last, and so on
        options = {name: settings[name] for name in FILTERS[:n]}
        by[filter_logits(logits, seen, **options)[0] == -math.inf] = n
    return by

def significant(values):
    """Numbers with six digits; what is not finite, which JSON lacks, is None."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]

def shown(tokenizer, i):
    """A token's text, with a visible sign for what has none: a line end, half a character."""
    text = tokenizer.token(i).decode("utf-8", "backslashreplace").replace("\n", "\u23ce")
    text = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text)
    return EOT if i == tokenizer.eot else text

PAGE = r"""<!DOCTYPE html><html lang="en">
<meta charset="utf-8"><title>What a text does in the model</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: light-dark(#1a1a1a, #eee); --line: light-dark(#ccc, #555);
  --paper: light-dark(#fff, #181818); --surprise: #d55e00; --weight: #1f83c9; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
main { display: grid; gap: 0 2rem; grid: auto / repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
section { min-width: 0; overflow-x: auto; } .wide { grid-column: 1 / -1; }
.scroll { overflow: auto; max-height: 30rem; } table { border-collapse: collapse; font-size: 85%; }
th, td { padding: .1rem .5rem; text-align: right; white-space: pre; unicode-bidi: isolate; }
th:first-child, td:first-child { text-align: left; }
.lens th:first-child { position: sticky; left: 0; background: var(--paper); }
#text { position: sticky; top: 0; z-index: 1; max-height: 40vh; overflow: auto; padding: .5rem;
  border: 1px solid var(--line); background: var(--paper); line-height: 2; }
#text span { padding: .2em 0; white-space: pre-wrap; unicode-bidi: isolate; cursor: pointer; }
#text span.written { border-bottom: 2px dotted var(--line); }
[aria-selected=true], .chosen { outline: 2px solid var(--ink); outline-offset: -2px; }
.scale { display: inline-block; width: 8rem; height: .8rem; vertical-align: middle;
  background: linear-gradient(to right, transparent, var(--tint)); border: 1px solid var(--line); }
.bar { min-width: 6rem; background: linear-gradient(var(--weight), var(--weight)) no-repeat;
  background-position: 0 90%; background-size: var(--size) 3px; }
.came { font-weight: bold; } .struck { text-decoration: line-through; opacity: .7; }
#maps { display: grid; gap: 3px; }
#maps button { padding: 0; border: 2px solid var(--line); background: none; }
#maps button[aria-pressed=true] { border-color: var(--ink); }
canvas { display: block; width: 100%; image-rendering: pixelated; }
svg { width: 100%; max-width: 30rem; fill: none; stroke-width: 1.5; }
</style>
<h1></h1>
<p>Point at a token, tap it or use the arrow keys. The model wrote those with a dotted line.</p>
<div id="text" role="listbox" aria-label="The text, token by token" tabindex="0"></div>
<p id="legend" aria-live="polite"></p>
<main>
  <section><h2>What it expected next</h2><p id="expected" aria-live="polite"></p>
    <table id="top"></table></section>
  <section><h2>What it would expect after each layer</h2>
    <div class="scroll"><table id="layers"></table></div></section>
  <section class="wide"><h2>The same for all: the likeliest next token, rank of what came</h2>
    <div class="scroll"><table class="lens" id="lens"></table></div></section>
  <section><h2>Attention: who looks at whom</h2><p>A row is a layer, a column a head; each token
    (down) looks at those up to it (across), by the root of its weight. Open a map to see more.</p>
    <div class="scroll"><div id="maps"></div></div><canvas id="map" width="0"></canvas></section>
  <section><h2>Sizes: norm of the stream, and of what is added to it</h2>
    <div class="scroll"><table id="sizes"></table></div>
    <h2>Shapes and parameters</h2><table id="parts"></table>
    <div id="curve"></div></section>
</main>
<script type="application/json" id="numbers">NUMBERS</script>
<script>
const page = JSON.parse(document.getElementById("numbers").textContent)
const tokens = page.tokens, T = tokens.length, L = page.sizes.length, H = page.heads
const letters = atob(page.attention), bytes = new Uint8Array(letters.length)
for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i)
const floats = new Float32Array(bytes.buffer)
const weight = (map, t, s) =>    // how much place t looks at s; a map is a triangle
  s > t ? 0 : floats[(map * T * (T + 1) + t * (t + 1)) / 2 + s]
const named = map => `layer ${Math.floor(map / H) + 1}, head ${map % H + 1}`
let chosen = Math.max(0, page.first - 1), clicked = chosen, open = -1    // places; a map, if any
const $ = id => document.getElementById(id)
function make(tag, text, attributes = {}) {
  const element = document.createElement(tag)
  element.textContent = text    // never read as HTML
  for (const name in attributes) element.setAttribute(name, attributes[name])
  return element
}
function fill(table, head, rows) {    // rows of [cells, attributes]; a cell: text or element
  table.replaceChildren(...[[head, {}], ...rows].map(([cells, attributes], i) => {
    const row = make("tr", "", attributes)
    row.append(...cells.map((cell, j) => cell instanceof Node ? cell :
      make(i && j ? "td" : "th", cell, {scope: i ? "row" : "col"})))
    return row
  }))
}
const quoted = text => "\u2068«" + text.replaceAll(" ", "·") + "»\u2069"    // a blank is seen
const short = v => v.toPrecision(3), percent = p => short(100 * p) + "%"
const bar = (text, share) => make("td", text, {class: "bar", style: `--size: ${100 * share}%`})
const tint = (color, share) =>    // never so strong that letters are hard to read
  `color-mix(in srgb, ${color} ${Math.round(70 * Math.min(1, share))}%, transparent)`
$("text").append(...tokens.map((token, t) => {    // its own surprise and rank stand at t - 1
  const span = make("span", token.replaceAll("\u23ce", "\u23ce\n"), {role: "option", id: "t" + t,
    "aria-label": `${t + 1}: ${quoted(token)}` +
      (t ? `, ${short(page.surprise[t - 1])} bits, rank ${page.rank[t - 1]}` : "")})
  if (t >= page.first) span.className = "written"
  span.onpointerover = () => choose(t)
  span.onclick = () => choose(clicked = t)
  return span
}))
$("text").onpointerleave = () => choose(clicked)
function color() {    // the text by surprise, or by the weights of the map that is open
  const value = t => open >= 0 ? weight(open, chosen, t) : t ? page.surprise[t - 1] : 0
  const most = Math.max(open >= 0 ? 0 : 1, ...tokens.map((_, t) => value(t)))
  const hue = open >= 0 ? "var(--weight)" : "var(--surprise)"
  tokens.forEach((_, t) => $("t" + t).style.background = tint(hue, value(t) / most))
  $("legend").replaceChildren(open >= 0 ? `${named(open)}: weights of ${quoted(tokens[chosen])}, 0 `
    : "surprise, 0 ", make("span", "", {class: "scale", style: `--tint: ${tint(hue, 1)}`}),
    open >= 0 ? ` to ${percent(most)}` : ` to ${short(most)} bits`)
}
function choose(t) {
  $("t" + chosen).removeAttribute("aria-selected")
  chosen = t
  $("t" + t).setAttribute("aria-selected", "true")
  $("t" + t).scrollIntoView({block: "nearest"})
  $("text").setAttribute("aria-activedescendant", "t" + t)
  const came = tokens[t + 1], struck = page.struck[t]
  $("expected").textContent = `After ${quoted(tokens[t])}: entropy ${short(page.entropy[t])} bits` +
    (came ? `; ${quoted(came)} came, rank ${page.rank[t]}, ${short(page.surprise[t])} bits` : "")
  fill($("top"), ["token", "probability", ""], page.top[t].map((token, i) => {
    const fate = page.top_ids[t][i] === page.ids[t + 1] ? "came" : struck[i] ? "struck" : ""
    return [[quoted(token), bar(percent(page.p[t][i]), page.p[t][i]),
      fate === "struck" ? "out by " + page.filters[struck[i] - 1] : fate], {class: fate}]
  }))
  fill($("layers"), ["layer", "likeliest", "probability", "rank"],
    page.lens.map((layer, i) => [[i + 1, quoted(layer.token[t]),
      bar(percent(layer.p[t]), layer.p[t]), layer.rank[t] ?? ""], {}]))
  const most = Math.max(...page.sizes.flat().map(row => row[t]))
  fill($("sizes"), ["layer", "stream", "attention adds", "MLP adds"], page.sizes.map((parts, i) =>
    [[i + 1, ...parts.map(row => bar(short(row[t]), row[t] / most))], {}]))
  for (const cell of document.querySelectorAll(".lens .chosen")) cell.classList.remove("chosen")
  for (const row of $("lens").rows) row.cells[t + 1].classList.add("chosen")
  $("lens").parentNode.scrollLeft = $("lens").rows[0].cells[t + 1].offsetLeft - 200
  color()
}
fill($("lens"), ["layer", ...tokens.map(quoted)], page.lens.map((layer, i) => [[i + 1,
  ...tokens.map((_, t) => make("td", `${quoted(layer.token[t])} ${layer.rank[t] ?? ""}`,
    {style: `background: ${tint("var(--weight)", layer.p[t])}`}))], {}]))
fill($("parts"), ["part", "shape after it", "parameters"], page.parts.map(
  ([name, shape, count]) => [[name, shape.join(" x "), count.toLocaleString("en")], {}]))
document.querySelector("h1").textContent = document.title = page.title
$("maps").style.gridTemplateColumns = `repeat(${H}, minmax(2rem, 9rem))`
for (let map = 0; map < L * H; map++) {
  const button = make("button", "", {"aria-pressed": "false", "aria-label": named(map)})
  const canvas = make("canvas", "", {width: T, height: T}), image = new ImageData(T, T)
  for (let t = 0; t < T; t++) for (let s = 0; s <= t; s++)
    image.data.set([31, 131, 201, 255 * Math.sqrt(weight(map, t, s))], 4 * (t * T + s))
  canvas.getContext("2d").putImageData(image, 0, 0)
  button.onclick = () => show(open === map ? -1 : map)
  $("maps").appendChild(button).append(canvas)
}
function show(map) {
  open = map
  Array.from($("maps").children).forEach((each, i) => each.setAttribute("aria-pressed", i === map))
  $("map").width = $("map").height = map < 0 ? 0 : T
  if (map >= 0) $("map").getContext("2d").drawImage($("maps").children[map].firstChild, 0, 0)
  color()
}
document.onkeydown = event => {
  const ends = event.target.id === "text" ? {Home: 0, End: T - 1} : {}
  const to = {ArrowLeft: clicked - 1, ArrowRight: clicked + 1, ...ends}[event.key]
  if (event.key === "Escape") show(-1)
  if (to === undefined || event.altKey || event.ctrlKey || event.metaKey
      || event.target.className === "scroll") return    // they are the browser's
  event.preventDefault()
  choose(clicked = Math.max(0, Math.min(T - 1, to)))
}
if (page.curve) {    // loss of the training batches, and of val
  const {step, loss, val} = page.curve, all = [...loss, ...val].filter(v => v != null)
  const low = Math.min(...all), high = Math.max(...all), last = step.at(-1) || 1
  const place = (v, i) => [400 * step[i] / last, 125 - 120 * (v - low) / (high - low || 1)]
  const line = (values, color) => `<polyline stroke="${color}" points="` +
    values.map((v, i) => v == null ? "" : place(v, i)).join(" ") + `"/>`
  $("curve").innerHTML = `<h2>Loss of the run</h2>    <!-- numbers alone -->
    <svg viewBox="0 0 400 130" role="img" aria-label="loss by step">
    ${line(loss, "#999")}${line(val, "var(--weight)")}</svg>
    <p>of batches (grey) and of val (blue), ${short(high)} to ${short(low)} in ${last} steps</p>`
}
choose(chosen)
</script>
"""

if __name__ == "__main__":
    main()
