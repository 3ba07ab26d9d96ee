"""Weights in and out: transformers' GPT-2, safetensors that are damaged, nanoGPT's checkpoints."""

import hashlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, one_sentence
from torch import nn
from torch.nn import functional as F

from model import (EOT, GPT, BPETokenizer, ByteTokenizer, CharTokenizer, GPTConfig,
                   load_checkpoint, read_safetensors)
from sample import write_pretrained

SHAPES = [dict(), dict(n_inner=48),
          dict(n_layer=1, n_head=1, n_embd=16, activation_function="relu"),
          dict(n_positions=70, activation_function="gelu", tie_word_embeddings=False)]
WORDS = ["hello", "wörld", "it's", "they'll", "I'D", "2026", "３", "x_y", "__", "…", "!?!", "😀",
         "👨‍👩‍👧", "🇩🇪", "漢字", "かな", "한국어", "नमस्ते", "سلام", "שלום", "e\u0301", "\u200d", "\u200b",
         "\x00", "\x07", "\x1b[0m", "\u0085", "\ufeff", "\u2028", "½", "ª", "ß", "Ⅳ", "①", EOT]
BLANKS = ["", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000"]


def texts(count):
    """Texts of emoji, other scripts, control characters and runs of blanks."""
    draw = random.Random(0)
    return ["".join(draw.choice(WORDS) + draw.choice(BLANKS) for _ in range(draw.randrange(1, 30)))
            for _ in range(count)]


@pytest.fixture
def twin():
    """twin(n_inner=48) -> transformers' GPT2LMHeadModel with random weights, saved to twin/."""
    transformers = pytest.importorskip("transformers")

    def twin(**options):
        torch.manual_seed(0)
        shape = dict(vocab_size=50257, n_positions=64, n_embd=32, n_layer=3, n_head=4) | options
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        model.save_pretrained("twin")
        return model
    return twin


def load(source, **changes):
    """(GPT, tokenizer)."""
    saved = load_checkpoint(source, **changes)
    return saved["model"], saved["tokenizer"]


def random_model(**options):
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**shape | options)).eval()


# ---- transformers ----

@pytest.mark.parametrize("options", SHAPES)
def test_transformers_weights_give_its_logits_and_text(twin, gpt2, options):
    """The oracle is transformers' GPT-2: from the same weights come its logits and its text."""
    theirs = twin(**options)
    ours, tokenizer = load("twin")
    idx = torch.randint(50257, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    expected = theirs.generate(idx[:1], max_new_tokens=50, do_sample=False, pad_token_id=0,
                               eos_token_id=None)
    assert torch.equal(ours.generate(idx[:1], 50, temperature=0), expected)
    assert tokenizer.spec == {"kind": "gpt2"}


@pytest.mark.parametrize("options", [
    {}, {"n_inner": 40}, {"bias": False}, {"qkv_bias": False, "activation": "relu"},
    {"tied": False, "activation": "gelu_erf"}])
def test_transformers_loads_what_we_write(options):
    transformers = pytest.importorskip("transformers")
    ours = random_model(vocab_size=256, **options)
    write_pretrained(ours, ByteTokenizer(), Path("ours"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("ours").eval()
    idx = torch.randint(256, (2, 64))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    assert theirs.config.eos_token_id == 255


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_its_tokenizer_gives_our_ids(gpt2, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = gpt2
    if kind == "bpe":
        learned = [" t", "he", " the", "in", "ing", "\u00c3\u00b6", "11", "\n\n", "  ", "!?"]
        tokenizer = BPETokenizer({"kind": "bpe", "tokens": learned})
    write_pretrained(random_model(vocab_size=tokenizer.vocab_size), tokenizer, Path("ours"))
    theirs = transformers.AutoTokenizer.from_pretrained("ours")
    for text in texts(100):
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)


def test_what_we_write_we_load_and_write_the_same(gpt2):
    for folder, tokenizer in {"gpt2": gpt2, "char": CharTokenizer("abc")}.items():
        first, second = Path(folder, "first"), Path(folder, "second")
        model = random_model(vocab_size=tokenizer.vocab_size, bias=False, dropout=0.1)
        write_pretrained(model, tokenizer, first)
        write_pretrained(*load(first), second)
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


@pytest.mark.parametrize("options", [{"norm": "post"}, {"positions": "sinusoidal"}])
def test_what_a_gpt2config_cannot_say_is_refused(train, run, options):
    train(*(f"--{name}={value}" for name, value in options.items()))
    one_sentence(run("sample.py", "--export=there"), 1, "transformers' GPT-2 has neither")
    assert not Path("there").exists()


def test_a_run_is_exported_by_sample(train, run):
    train()
    result = run("sample.py", "--export=there")
    assert result.status == 0 and "out/tiny/best.pt as there" in result.out
    said = run("sample.py", "--init_from=there", "--start=From", "--max_new_tokens=20")
    assert said.out == run("sample.py", "--start=From", "--max_new_tokens=20").out


def test_memory_stays_near_the_weights(tmp_path):
    """100 MB of weights, loaded in a process of its own."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 10000, 4, 8, 640))
    write_pretrained(model, SimpleNamespace(spec={"kind": "byte"}, eot=None, vocab_size=10000),
                     Path("big"))
    size = Path("big/model.safetensors").stat().st_size
    code = (f"import resource, sys; sys.path.insert(0, {str(REPO)!r}); import model, torch\n"
            "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); loaded = model.load_checkpoint('big'); print(peak() - before)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 1.2 * size


# ---- damage ----

def damaged(change):
    """The safetensors file of a small model, its header changed by change(header), in ours/."""
    write_pretrained(random_model(vocab_size=256), ByteTokenizer(), Path("ours"))
    path = Path("ours/model.safetensors")
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:end]), raw[end:]
    body = change(header, bytearray(body)) or body
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


WTE = "transformer.wte.weight"


@pytest.mark.parametrize("change, words", [
    (lambda h, b: h[WTE].update(data_offsets=[0, 16 * 256 * 4]), "overlaps"),
    (lambda h, b: h[WTE].update(data_offsets=[10 ** 12, 10 ** 12 + 16384]), "overlaps"),
    (lambda h, b: h[WTE].update(data_offsets=[-4, 16380]), "overlaps"),
    (lambda h, b: h[WTE].update(data_offsets="no"), "cannot be used"),
    (lambda h, b: h[WTE].update(dtype="I32"), "'I32' is missing"),
    (lambda h, b: h[WTE].update(dtype="F16"), "invalid for input of size"),
    (lambda h, b: h[WTE].update(shape=[256, 15]), "invalid for input of size"),
    (lambda h, b: h[WTE].update(shape=[-256, -16]), "cannot be used"),
    (lambda h, b: h[WTE].update(shape=[16, 256]), "size mismatch for wte.weight"),
    (lambda h, b: h.update(other=h.pop(WTE)), "'wte.weight' is missing"),
    (lambda h, b: h.update({"transformer.ln_f.gain": h.pop("transformer.ln_f.weight")}),
     "Missing key(s) in state_dict: \"ln_f.weight\""),
    (lambda h, b: h.pop("transformer.ln_f.weight").clear(), "overlaps"),
    (lambda h, b: b + b"1234", "cut short or goes on"),
    (lambda h, b: b[:-4], "cut short or goes on"),
    (lambda h, b: b[:400] + np.float32(math.nan).tobytes() + b[404:], "not finite"),
    (lambda h, b: h.update(__metadata__={"tokenizer": "[]"}), "tokenizer's spec")])
def test_damaged_weights_are_one_sentence(run, change, words):
    damaged(change)
    one_sentence(run("sample.py", "--init_from=ours"), 1, "ours cannot be used", words)


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 8, b"\xff" * 7 + b"\x7f" + b"{}",
                                 (2).to_bytes(8, "little") + b"{}",
                                 (2).to_bytes(8, "little") + b"[]",
                                 (10 ** 5).to_bytes(8, "little") + b"[" * 10 ** 5])
def test_a_header_that_is_none_is_one_sentence(run, raw):
    damaged(lambda header, body: None)
    Path("ours/model.safetensors").write_bytes(raw)
    one_sentence(run("sample.py", "--init_from=ours"), 1, "ours cannot be used")


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"layer_norm_epsilon": 1e-6}, "epsilon"),
    ({"activation_function": "swish"}, "not swish"), ({"n_layer": 10 ** 9}, "fewer"),
    ({"n_layer": "two"}, "cannot be used"), ({"n_embd": 10 ** 6}, "size mismatch"),
    ({"n_head": 3}, "multiple of n_head"), ({"n_positions": None}, "cannot be used")])
def test_a_config_that_is_not_gpt2s_is_one_sentence(run, change, words):
    damaged(lambda header, body: None)
    path = Path("ours/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    one_sentence(run("sample.py", "--init_from=ours"), 1, "ours cannot be used", words)


def test_every_precision_is_read():
    w = torch.randn(3, 5)
    for name, kind in {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.items():
        raw = w.to(kind).view(torch.uint8).numpy().tobytes()
        header = json.dumps({"x": {"dtype": name, "shape": [3, 5],
                                   "data_offsets": [0, len(raw)]}}).encode()
        Path("x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
        weights, metadata = read_safetensors(Path("x.safetensors"))
        assert metadata == {} and torch.equal(weights.pop("x"), w.to(kind)) and not weights


# ---- the Hub ----

@pytest.fixture
def hub(serve, monkeypatch):
    """hub(answer, ...) -> the bytes of a small model.safetensors that a local Hub serves as gpt2,
    whose config.json is in the cache already."""
    def hub(*answers):
        write_pretrained(random_model(vocab_size=256), ByteTokenizer(), Path("cache/gpt2"))
        path = Path("cache/gpt2/model.safetensors")
        body = path.read_bytes()
        path.unlink()
        url = serve(body, *answers, sha256=hashlib.sha256(body).hexdigest())
        monkeypatch.setenv("HF_ENDPOINT", url.rpartition("/")[0])
        return body
    return hub


@pytest.mark.parametrize("answers", [["whole"], ["cut", "whole"], [503, "whole"],
                                     ["wrong", "whole"]])
def test_weights_are_downloaded_once_and_checked(hub, serve, run, answers, monkeypatch):
    body = hub(*answers)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    sample = ("sample.py", "--init_from=gpt2", "--cache_dir=cache", "--start=x",
              "--max_new_tokens=3")
    assert run(*sample).status == 0
    assert Path("cache/gpt2/model.safetensors").read_bytes() == body
    seen = len(serve.seen)
    assert run(*sample).status == 0 and len(serve.seen) == seen


def test_a_hub_that_serves_something_else_is_one_sentence(hub, run, monkeypatch):
    hub("wrong")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    one_sentence(run("sample.py", "--init_from=gpt2", "--cache_dir=cache"), 1,
                 "model.safetensors could not be downloaded", "another size or sha256")
    assert not Path("cache/gpt2/model.safetensors").exists()


def test_a_cache_that_is_damaged_is_named(hub, run):
    hub("whole")
    Path("cache/gpt2/config.json").write_text("<html>")
    one_sentence(run("sample.py", "--init_from=gpt2", "--cache_dir=cache"), 1,
                 "cache/gpt2 cannot be used", "remove it to fetch it again")


def test_a_model_of_fewer_tokens_than_gpt2s_is_refused(gpt2, run):
    damaged(lambda header, body: header.update(__metadata__={"format": "pt"}))
    one_sentence(run("sample.py", "--init_from=ours"), 1, "its tokens are not GPT-2's",
                 "tokenizer.json")


# ---- training from weights ----

@pytest.fixture
def weights(train):
    """ours/, the model of a few steps on data/verse."""
    train()
    saved = load_checkpoint("out/tiny/best.pt")
    write_pretrained(saved["model"], saved["tokenizer"], Path("ours"))
    return saved


def test_training_begins_with_the_weights(train, weights):
    began = train("--init_from=ours", "--eval_iters=0")
    assert began.status == 0, began.err
    rows = Path("out/tiny/metrics.csv").read_text().splitlines()
    found = float(rows[1].split(",")[3])
    evaluated = train("--init_from=ours", "--eval_only=True", "--eval_iters=0").out
    assert f"{found:.4f}" in evaluated
    assert train("--init_from=resume", "--max_iters=8").status == 0


def test_training_begins_with_another_runs_checkpoint(train, weights):
    Path("ours.pt").write_bytes(Path("out/tiny/best.pt").read_bytes())
    exact = ("--eval_only=True", "--eval_iters=0")
    assert train("--init_from=ours.pt", *exact).out == train("--init_from=ours", *exact).out


def test_a_context_is_cropped_never_stretched(train, weights):
    assert train("--init_from=ours", "--block_size=8").status == 0
    cropped, _ = load("ours", block_size=8)
    idx = torch.randint(20, (1, 8))
    assert torch.allclose(cropped(idx)[0], weights["model"](idx)[0], atol=1e-6)
    one_sentence(train("--init_from=ours", "--block_size=17"), 1, "give no larger --block_size")
    train("--max_iters=2")
    larger = train("--init_from=out/tiny/best.pt", "--block_size=17", "--eval_only=True")
    one_sentence(larger, 1, "give no larger --block_size")
    assert "--checkpoint" not in larger.err


def test_weights_with_other_tokens_are_refused(train, weights, gpt2):
    write_pretrained(random_model(), gpt2, Path("other"))
    one_sentence(train("--init_from=other"), 1, "other reads other tokens than data/verse")


def test_a_run_from_weights_does_not_replace_another(run, weights):
    arguments = [a for a in TINY if a != "--overwrite=True"]
    one_sentence(run("train.py", *arguments, "--init_from=ours"), 2, "holds a run: give --init_from=resume")


# ---- nanoGPT ----

class NanoBlock(nn.Module):
    """nanoGPT's block from its parameters' names: exact GELU, LayerNorm whose bias is optional."""

    def __init__(self, C, H, bias):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias=bias),
                                   "c_proj": nn.Linear(C, C, bias=bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=bias),
                                  "c_proj": nn.Linear(4 * C, C, bias=bias)})
        self.H = H

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.H, -1)).transpose(1, 2)
                   for t in self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


@pytest.fixture(params=[False, True])
def nano(request, verse):
    """A function of ids -> logits, whose weights ckpt.pt holds as nanoGPT saves them."""
    vocabulary = json.loads(Path("data/verse/meta.json").read_text())["tokenizer"]["vocabulary"]
    V, T, C, H, bias = len(vocabulary), 16, 32, 4, request.param
    torch.manual_seed(0)
    model = nn.ModuleDict({"transformer": nn.ModuleDict({
        "wte": nn.Embedding(V, C), "wpe": nn.Embedding(T, C),
        "h": nn.ModuleList(NanoBlock(C, H, bias) for _ in range(2)),
        "ln_f": nn.LayerNorm(C, bias=bias)}), "lm_head": nn.Linear(C, V, bias=False)})
    model["lm_head"].weight = model["transformer"]["wte"].weight
    torch.save({"model": {f"_orig_mod.{n}": w for n, w in model.state_dict().items()},
                "optimizer": {"state": {}}, "iter_num": 7, "best_val_loss": torch.tensor(2.0),
                "model_args": dict(n_layer=2, n_head=H, n_embd=C, block_size=T, bias=bias,
                                   vocab_size=V, dropout=0.0),
                "config": {"dataset": "verse"}}, "ckpt.pt")

    def logits(idx):
        t = model["transformer"]
        x = t["wte"](idx) + t["wpe"](torch.arange(idx.shape[1]))
        for block in t["h"]:
            x = block(x)
        return model["lm_head"](t["ln_f"](x))
    return logits


def test_a_nanogpt_checkpoint_computes_what_it_did(nano, run, train):
    model, tokenizer = load("ckpt.pt")
    idx = torch.randint(tokenizer.vocab_size, (3, 16))
    theirs = F.cross_entropy(nano(idx).flatten(0, 1), idx.roll(-1, 1).flatten())
    assert model(idx, idx.roll(-1, 1))[1].item() == pytest.approx(theirs.item(), abs=1e-5)
    assert run("sample.py", "--init_from=ckpt.pt", "--start=From", "--max_new_tokens=5").status == 0
    assert train("--init_from=ckpt.pt").status == 0
    assert train("--init_from=resume", "--max_iters=8").status == 0


def test_a_nanogpt_checkpoint_without_its_characters_or_whole_is_one_sentence(nano, run):
    Path("data/verse/meta.json").unlink()
    one_sentence(run("sample.py", "--init_from=ckpt.pt"), 1, "prepare data/verse here first")
    Path("ckpt.pt").write_bytes(Path("ckpt.pt").read_bytes()[:-100])
    one_sentence(run("sample.py", "--init_from=ckpt.pt"), 1, "ckpt.pt cannot be used")


# ---- wandb ----

def test_wandb_gets_the_figures_of_metrics_csv(train, monkeypatch):
    rows, ids = [], []
    fake = SimpleNamespace(init=lambda **options: ids.append(options["id"]) or SimpleNamespace(
        id="abc"), __spec__=SimpleNamespace(), log=lambda row, step: rows.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train("--wandb_log=True", "--max_iters=3", "--lr_decay_iters=6").status == 0
    assert train("--wandb_log=True", "--lr_decay_iters=6", "--init_from=resume").status == 0
    assert ids == [None, "abc"]  # a resumed run goes on in the same one
    lines = Path("out/tiny/metrics.csv").read_text().splitlines()[1:]
    assert [step for step, _ in rows] == [int(line.split(",")[0]) for line in lines]
    assert float(lines[-1].split(",")[3]) == pytest.approx(rows[-1][1]["val"], rel=1e-5)


def test_wandb_without_the_package_is_one_sentence(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    one_sentence(train("--wandb_log=True"), 2, "pip install wandb")
