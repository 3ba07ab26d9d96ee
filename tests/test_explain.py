"""The page of --explain: its numbers against float64, what it refuses, what hostile text does to it,
and that a browser shows it."""

import base64
import json
import math
import re
import shutil
import subprocess
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_sentence

from model import (GPT, BPETokenizer, ByteTokenizer, CharTokenizer, GPTConfig, causal_mask,
                   load_checkpoint, save_checkpoint)

NAUGHTY = '</script><script>alert(1)</script> "\' <b>&amp; \u2028 \u202e\u05d0\u05d1 \U0001f600!'


def numbers(path="page.html"):
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1])


def attention_of(page):
    """(L, H, T, T) weights out of the page."""
    T, L, H = len(page["tokens"]), len(page["sizes"]), page["heads"]
    weights = np.zeros((L, H, T, T))
    weights[:, :, *np.tril_indices(T)] = np.frombuffer(
        base64.b64decode(page["attention"]), "<f4").reshape(L, H, -1)
    return weights


@pytest.fixture
def lively(run):
    """lively(tokenizer, **changes) -> out/lively/best.pt of a small model with large weights."""
    def lively(tokenizer, **changes):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**dict(block_size=24, vocab_size=tokenizer.vocab_size, n_layer=3,
                                     n_head=2, n_embd=16) | changes)).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, mean=float(p.dim() == 1) / 2, std=0.3)
        Path("out/lively").mkdir(parents=True)
        save_checkpoint("out/lively/best.pt", model, tokenizer)
        return model
    return lively


@pytest.fixture
def explain(run):
    def explain(*arguments):
        result = run("sample.py", "--out_dir=out/lively", "--device=cpu", "--explain=page.html",
                     *arguments)
        assert result.status == 0, result
        return numbers()
    return explain


@pytest.mark.parametrize("changes", [{}, {"norm": "post", "positions": "sinusoidal"},
                                     {"tied": False, "bias": False, "activation": "relu"}])
def test_the_numbers_of_the_page_are_those_of_float64(lively, explain, changes):
    """The oracle reads the text again in float64, block by block, by the formulas."""
    model = deepcopy(lively(CharTokenizer("abcdefghijklmnop"), **changes)).double()
    page = explain("--start=abacab", "--max_new_tokens=14")
    T, c = 20, model.config
    assert page["first"] == 6 and len(page["tokens"]) == T and page["ids"][:6] == [0, 1, 0, 2, 0, 1]
    ids = torch.tensor([page["ids"]])
    close = lambda found, expected: torch.testing.assert_close(  # noqa: E731
        torch.tensor(found, dtype=torch.float64), expected, rtol=1e-4, atol=1e-9)
    with torch.no_grad():
        x = model.wte(ids) + model.wpe.weight[:T]
        maps = []
        for block, sizes, lens in zip(model.h, page["sizes"], page["lens"], strict=True):
            pre = c.norm == "pre"
            qkv = block.attn.c_attn(block.ln_1(x) if pre else x).split(16, dim=2)
            q, k, v = (part.view(1, T, 2, 8).transpose(1, 2) for part in qkv)
            maps.append((q @ k.mT / math.sqrt(8) + causal_mask(q, k)).softmax(dim=-1))
            attended = block.attn.c_proj((maps[-1] @ v).transpose(1, 2).reshape(1, T, 16))
            x = x + attended if pre else block.ln_1(x + attended)
            added = block.mlp(block.ln_2(x) if pre else x)
            x = x + added if pre else block.ln_2(x + added)
            for found, part in zip(sizes, (x, attended, added), strict=True):
                close(found, part[0].norm(dim=1))
            logits = model.lm_head(model.ln_f(x))[0]
            probs = logits.softmax(dim=1)
            close(lens["p"], probs.amax(dim=1))
            assert lens["token"] == ["abcdefghijklmnop"[i] for i in probs.argmax(dim=1)]
            place = logits.argsort(dim=1, descending=True)
            ranks = [place[t].tolist().index(page["ids"][t + 1]) + 1 for t in range(T - 1)]
            assert lens["rank"] == ranks
        close(attention_of(page).tolist(), torch.cat(maps))
        np.testing.assert_allclose(attention_of(page).sum(axis=3), 1, atol=1e-5)
        p_next = probs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        close(page["surprise"], -p_next.log2())
        close(page["entropy"], -(probs * probs.log2()).sum(dim=1))
        assert page["rank"] == ranks
        for t in range(T):
            close(page["p"][t], probs[t].sort(descending=True).values[:10])
            assert page["top_ids"][t] == place[t][:10].tolist()
    counts = {name: count for name, _, count in page["parts"]}
    everything = sum(p.numel() for p in model.parameters())
    assert sum(counts.values()) == everything and page["parts"][-1][1] == [1, T, 16]


def test_the_numbers_are_in_float32_whatever_wrote_the_text(lively, explain):
    lively(CharTokenizer("abcdefgh"))
    exact = explain("--start=abc", "--max_new_tokens=0", "--dtype=float32")
    for dtype in ("bfloat16", "int8"):
        assert explain("--start=abc", "--max_new_tokens=0", f"--dtype={dtype}") == exact


def test_what_the_filters_struck_out_is_marked(lively, explain):
    """Of ten tokens top_k=4 leaves four and min_p those above its share; a prompt was not sampled."""
    lively(CharTokenizer("abcdefghij"))
    page = explain("--start=abab", "--max_new_tokens=8", "--top_k=4", "--min_p=0.3")
    names = [None, *page["filters"]]
    assert page["struck"][:3] == [[], [], []] and all(len(row) == 10 for row in page["struck"][3:])
    for p, struck in zip(page["p"][3:], page["struck"][3:]):
        logits = [math.log(share) / 0.8 for share in p]  # temperature is 0.8
        for place, number in enumerate(struck):
            small = math.exp(logits[place] - logits[0]) < 0.3
            assert names[number] == ("top_k" if place >= 4 else "min_p" if small else None)
    assert {number for row in page["struck"] for number in row} > {0}
    page = explain("--start=abab", "--max_new_tokens=2", "--temperature=0")
    assert [names[number] for number in page["struck"][4]] == [None, *["temperature"] * 9]
    assert explain("--start=abab", "--max_new_tokens=2", "--num_beams=2")["struck"] == [[]] * 6


def test_what_left_the_page_still_counts_for_what_is_struck_out(lively, explain):
    """Of a text longer than the context no_repeat_ngram=1 bars every token that the whole text has."""
    lively(CharTokenizer("".join(map(chr, range(97, 177)))))
    page = explain("--start=abcdefghij", "--max_new_tokens=50", "--no_repeat_ngram=1")
    assert len(page["tokens"]) == 24 and page["first"] == 0
    number = 1 + page["filters"].index("no_repeat_ngram")
    pairs = [pair for row in zip(page["top_ids"], page["struck"]) for pair in zip(*row)]
    assert {struck for i, struck in pairs if i < 10} == {number}  # the ten of the prompt
    assert 0 in {struck for i, struck in pairs}


def test_of_a_long_text_the_page_shows_what_the_context_holds(lively, explain):
    lively(CharTokenizer("abcdefgh"))
    page = explain("--start=abcdefghabcdefgh", "--max_new_tokens=20")
    assert len(page["tokens"]) == 24 and page["first"] == 24 - 20
    assert explain("--start=a", "--max_new_tokens=40")["first"] == 0
    alone = explain("--start=a", "--max_new_tokens=0")  # one token: nothing came after it
    assert alone["tokens"] == ["a"] and alone["surprise"] == alone["rank"] == []
    assert len(alone["top"]) == 1 and alone["first"] == 1


def test_a_run_with_a_table_has_its_curve_on_the_page(run, train):
    train()
    run("sample.py", "--out_dir=out/tiny", "--max_new_tokens=3", "--explain=page.html")
    curve = numbers()["curve"]
    assert curve["step"] == [1, 2, 3, 4, 5, 6] and len(curve["loss"]) == 6
    best = load_checkpoint("out/tiny/best.pt")["progress"]["best_loss"]
    assert min(v for v in curve["val"] if v is not None) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("table", [b"", b"step,loss,val\n", b"step\n1\n2\n", b"a,b\n1,2\n3,4\n",
                                   b"step,loss,val\n0,,4\n1,nan,\n", b"\xff\x00\xfe" * 9])
def test_a_table_without_a_curve_is_left_out(lively, explain, table):
    lively(CharTokenizer("abc"))
    Path("out/lively/metrics.csv").write_bytes(table)
    assert "curve" not in explain("--start=a", "--max_new_tokens=2")


def test_a_row_that_was_cut_is_left_out_of_the_curve(lively, explain):
    lively(CharTokenizer("abc"))
    Path("out/lively/metrics.csv").write_text("step,loss,val\n0,,4\n1,3,\n2,2,2\n3,1")
    assert explain("--start=a", "--max_new_tokens=2")["curve"] == {
        "step": [1, 2], "loss": [3, 2], "val": [None, 2]}


def test_a_folders_model_has_no_curve_of_a_strangers(lively, run):
    lively(BPETokenizer({"kind": "bpe", "tokens": []}))
    assert run("sample.py", "--out_dir=out/lively", "--export=exported").status == 0
    Path("metrics.csv").write_text("step,loss,val\n0,,4\n1,3,3\n2,2,2\n")
    for source in ("exported", "exported/../exported"):
        assert run("sample.py", f"--init_from={source}", "--start=a", "--max_new_tokens=2",
                   "--explain=page.html").status == 0
        assert "curve" not in numbers()


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


# One token that would end a script.
ENDING = BPETokenizer({"kind": "bpe", "pieces": r"</script>|[\s\S]",
                       "tokens": ["</script>"[:n] for n in range(2, 10)]})


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ENDING])
def test_hostile_text_adds_no_tag_and_each_token_can_be_seen(lively, explain, tokenizer):
    lively(tokenizer, block_size=80)
    explain("--start=plain", "--max_new_tokens=0")
    plain = Tags(Path("page.html").read_text(encoding="utf-8")).tags
    page = explain(f"--start={NAUGHTY}\n", "--max_new_tokens=0")
    assert Tags(Path("page.html").read_text(encoding="utf-8")).tags == plain
    assert "".join(page["tokens"]).startswith(NAUGHTY[:33])
    assert ("</script>" in page["tokens"]) == (tokenizer is ENDING)
    assert all(token and token.isprintable() for token in page["tokens"])
    assert page["tokens"][-1] == "\u23ce" and "\\xf0" in page["tokens"]
    assert not [value for tag, given in plain for name, value in given.items()
                if name in ("src", "href")]  # one file
    assert not re.search("https?:|import|fetch|eval", Path("page.html").read_text().split("<script")[2])


def test_end_of_text_is_shown_as_such(lively, explain):
    lively(CharTokenizer("\3ab"))
    assert explain("--start=", "--max_new_tokens=0")["tokens"] == ["<|endoftext|>"]


@pytest.mark.parametrize("arguments, words", [
    (["--explain=x.txt"], ["--explain must be a file with the end .html"]),
    (["--explain=x.html", "--num_samples=2"], ["--explain shows one text"]),
    (["--explain=x.html", "--interactive=True"], ["--explain shows one text"]),
])
def test_what_cannot_be_a_page_is_refused(run, arguments, words):
    one_sentence(run("sample.py", *arguments), 2, *words)


def test_a_page_that_cannot_be_written_is_a_sentence(lively, run):
    lively(CharTokenizer("ab"))
    result = run("sample.py", "--out_dir=out/lively", "--start=a", "--max_new_tokens=2",
                 "--explain=nowhere/page.html")
    assert result.status == 1 and "Traceback" not in result.err and "cannot be written" in result.err


# ---- a browser ----

CHECK = """<script>
const seen = {errors: [], tokens: document.querySelectorAll("#text span").length}
onerror = message => seen.errors.push(message)
const now = () => [document.querySelector("[aria-selected=true]").id, $("expected").textContent]
seen.first = now()
$("t2").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}))
seen.pointed = now()
$("t2").click()
$("t9").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}))
$("text").dispatchEvent(new PointerEvent("pointerleave"))
seen.kept = now()
const press = (key, options = {}) => $("text").dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, ...options}))
press("ArrowRight")
seen.right = now()
press("ArrowRight", {altKey: true})
seen.back = now()
press("Home")
seen.home = now()
$("maps").children[1].click()
seen.open = [$("legend").textContent, document.querySelectorAll("[aria-pressed=true]").length]
press("Escape")
seen.closed = [$("legend").textContent, document.querySelectorAll("[aria-pressed=true]").length]
seen.rows = ["top", "layers", "lens", "sizes", "parts"].map(id => $(id).rows.length)
document.body.replaceChildren(make("pre", "SEEN" + JSON.stringify(seen) + "NEES"))
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_a_browser_shows_the_page_and_selects_by_mouse_and_key(lively, explain):
    lively(ByteTokenizer(), block_size=80)
    page = explain(f"--start={NAUGHTY}\n", "--max_new_tokens=4", "--top_k=3")
    text = Path("page.html").read_text(encoding="utf-8")
    Path("check.html").write_text(text + CHECK, encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={Path('profile').resolve()}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", Path("check.html").resolve().as_uri()],
        capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search("SEEN(.*)NEES", done.stdout, re.DOTALL)[1].replace("&amp;", "&")
                      .replace("&lt;", "<").replace("&gt;", ">"))
    T = len(page["tokens"])
    assert seen["errors"] == [] and seen["tokens"] == T
    assert [seen[name][0] for name in ("first", "pointed", "kept", "right", "back", "home")] == [
        f"t{page['first'] - 1}", "t2", "t2", "t3", "t3", "t0"]
    rank, bits = page["rank"][2], page["surprise"][2]
    for shown in (seen["pointed"], seen["open"]):
        shown[:] = [str(text).replace("\u2068", "").replace("\u2069", "") for text in shown]
    assert f"After «s»: entropy {page['entropy'][2]:#.3g} bits" in seen["pointed"][1]
    assert f"«c» came, rank {rank}, {bits:#.3g} bits" in seen["pointed"][1]
    assert seen["open"] == ["layer 1, head 2: weights of «<», 0  to 100%", "1"]  # the first token
    assert seen["closed"][0].startswith("surprise, 0 ") and seen["closed"][1] == 0
    assert seen["rows"] == [11, 4, 4, 4, 9]
