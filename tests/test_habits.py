"""What users of such programs do: pipes, notebooks, files of other editors, models of others, closed
terminals, other folders. Each test has more members of its kind than the one that was reported."""

import io
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import REPO, TINY, VERSE, one_sentence
from test_stories import naive_bpe
from test_train import metrics, same, weights

import sample as sample_script
from model import (EOT, GPT, PIECES, BPETokenizer, ByteTokenizer, CharTokenizer, GPTConfig,
                   encode_prompt, load_checkpoint, read_text, read_tokenizer, unescape)
from prepare_shakespeare import learn_bpe, learn_tokenizer
from prepare_tinystories import read_stories
from sample import write_pretrained

SCRIPTS = ["हिन्दी में कहानी", "สวัสดีชาวโลก", "مَرْحَبًا بالعالم", "👩‍💻 ❤️‍🔥", "naïve cafe\u0301", "x² ½ Ⅷ ①",
           "한국어 漢字かな", "he said: 'don't'_ok_", "a\u200cb\u200dc", "tab\tand\u00a0blank\r", EOT]


def gpt2_model(vocab_size, **options):
    torch.manual_seed(0)
    return GPT(GPTConfig(16, vocab_size, 1, 2, 16, **options)).eval()


# ---- tokens ----

def test_three_engines_cut_every_character_alike():
    """The oracles are tiktoken, which encodes, and Hugging Face's tokenizers, which run what we
    export: on each character of Unicode both must cut where regex does, which learns."""
    tokenizers = pytest.importorskip("tokenizers")
    characters = [c for c in map(chr, range(sys.maxunicode + 1))
                  if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    text = "".join(f"a{c} {c}{c}" for c in characters)
    pieces = regex.findall(PIECES, text)
    assert len(characters) > 140_000 and "".join(pieces) == text
    pre = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    assert [piece for piece, _ in pre.pre_tokenize_str(text)] == pieces
    tokens = sorted({piece.encode() for piece in pieces} | {bytes([i]) for i in range(256)})
    whole = tiktoken.Encoding("whole", pat_str=PIECES, special_tokens={},
                              mergeable_ranks={token: i for i, token in enumerate(tokens)})
    assert [tokens[i].decode() for i in whole.encode_to_numpy(text)] == pieces


@pytest.mark.parametrize("word", ["हिन्दी", " नमस्ते", "தமிழ்", "cafe\u0301", "می\u200cخواهم"])
def test_a_word_with_marks_is_one_piece(word):
    assert regex.findall(PIECES, word) == [word]


def test_english_is_cut_as_ever():
    text = "It's 1984, isn't  it?\n\n\"Rock'n'roll_\" -- O'Neil paid $3.50 (twice).\t"
    assert regex.findall(PIECES, text) == [
        "It's", " 1", "9", "8", "4", ",", " isn't", " ", " it", "?", "\n\n", '"', "Rock'n'roll", '_"',
        " --", " O'Neil", " paid", " $", "3", ".", "5", "0", " (", "twice", ").", "\t"]


def test_tokens_of_many_scripts_are_those_of_the_exported_tokenizer():
    transformers = pytest.importorskip("transformers")
    text = " ".join(SCRIPTS) * 9
    tokenizer = learn_tokenizer([text], 700)
    write_pretrained(gpt2_model(tokenizer.vocab_size), tokenizer, Path("ours"))
    theirs = transformers.AutoTokenizer.from_pretrained("ours")
    assert len(tokenizer.encode(text)) < len(text) / 3
    for one in (*SCRIPTS, text, *text.split()):
        assert theirs.encode(one, add_special_tokens=False) == tokenizer.encode(one).tolist()
        assert tokenizer.decode(tokenizer.encode(one)) == one


@pytest.mark.parametrize("letters", ["ACGT", "ab", "これは長い"])
def test_bpe_learns_from_one_line_at_the_cost_of_many(monkeypatch, letters):
    """Counted, not timed: how often a count changes must not grow with the length of a piece."""
    changes = []

    class Counted(Counter):
        def __setitem__(self, key, value):
            changes.append(key)
            super().__setitem__(key, value)
    monkeypatch.setattr("prepare_shakespeare.Counter", Counted)
    line, costs = "".join(random.Random(0).choices(letters, k=30_000)), []
    for pieces in ({line: 1}, Counter(line[i:i + 60] for i in range(0, len(line), 60))):
        del changes[:]
        assert len(learn_bpe(pieces, 200)) == 200
        costs.append(len(changes))
    assert costs[0] < 3 * costs[1]
    assert learn_bpe({line[:500]: 1, line[500:900]: 2}, 20) == naive_bpe(
        {line[:500]: 1, line[500:900]: 2}, 20)


# ---- models of others ----

def foreign_bpe(tokenizers, kind):
    """A byte-level BPE with ids of its own, saved to theirs/ as other programs do."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", EOT, "<user>"] if kind != "no end" else ["<pad>", "</s>"]
    bpe.train_from_iterator([VERSE, *SCRIPTS[:-1]] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    Path("theirs").mkdir(exist_ok=True)
    if kind == "vocab.json":
        bpe.model.save("theirs")
    else:
        bpe.save("theirs/tokenizer.json")
    return bpe


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json", "no end"])
def test_somebody_elses_gpt2_is_read_with_its_own_tokens(run, kind):
    tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    bpe = foreign_bpe(tokenizers, kind)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=bpe.get_vocab_size(), n_positions=32, n_embd=16, n_layer=1, n_head=2,
        eos_token_id=1)).save_pretrained("theirs")
    tokenizer = load_checkpoint("theirs")["tokenizer"]
    for text in (VERSE, *SCRIPTS[:-1]):
        assert tokenizer.encode(text).tolist() == bpe.encode(text).ids
        assert tokenizer.decode(bpe.encode(text).ids) == text
    assert tokenizer.eot == 1 and tokenizer.vocab_size == bpe.get_vocab_size()
    done = run("sample.py", "--init_from=theirs", "--start=From", "--max_new_tokens=9")
    assert done.status == 0 and done.out.startswith("From"), done
    done = run("sample.py", "--init_from=theirs", "--export=again")
    assert done.status == 0, done
    again = transformers.AutoTokenizer.from_pretrained("again")
    assert again.encode(VERSE, add_special_tokens=False) == bpe.encode(VERSE).ids


def test_our_export_saved_again_by_transformers_keeps_its_tokens(run):
    transformers = pytest.importorskip("transformers")
    tokenizer = learn_tokenizer([VERSE * 9], 300)
    write_pretrained(gpt2_model(tokenizer.vocab_size), tokenizer, Path("ours"))
    for part in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        part.from_pretrained("ours").save_pretrained("again")
    again = load_checkpoint("again")["tokenizer"]
    assert again.encode(VERSE).tolist() == tokenizer.encode(VERSE).tolist()
    assert again.eot == tokenizer.eot


@pytest.mark.parametrize("change", [
    {"model": {"type": "WordPiece", "vocab": {"a": 0}}}, {"model": {"type": "Unigram", "vocab": []}},
    {"pre_tokenizer": {"type": "Metaspace"}}, {"pre_tokenizer": None},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    {"normalizer": {"type": "NFC"}}])
def test_tokens_that_are_not_byte_level_bpe_are_refused(run, change):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = foreign_bpe(tokenizers, "tokenizer.json")
    write_pretrained(gpt2_model(bpe.get_vocab_size()), ByteTokenizer(), Path("ours"))
    Path("theirs/config.json").write_bytes(Path("ours/config.json").read_bytes())
    saved = json.loads(Path("theirs/tokenizer.json").read_text())
    Path("theirs/tokenizer.json").write_text(json.dumps(saved | change))
    raw = Path("ours/model.safetensors").read_bytes()
    without = raw.replace(b'"tokenizer"', b'"forgotten"')
    Path("theirs/model.safetensors").write_bytes(without)
    one_sentence(run("sample.py", "--init_from=theirs"), 1, "theirs cannot be used",
                 "byte-level BPE")


@pytest.mark.parametrize("kind", ["added_tokens.json", "gpt2 and more"])
def test_added_tokens_are_not_lost(kind, gpt2):
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "added_tokens.json":
        bpe = foreign_bpe(tokenizers, "vocab.json")
        Path("theirs/added_tokens.json").write_text(json.dumps({"<bot>": bpe.get_vocab_size()}))
    else:
        write_pretrained(gpt2_model(50257), gpt2, Path("theirs"))
        bpe = tokenizers.Tokenizer.from_file("theirs/tokenizer.json")
    bpe.add_special_tokens(["<bot>"])
    if kind != "added_tokens.json":
        bpe.save("theirs/tokenizer.json")
    spec = read_tokenizer(Path("theirs"), {"vocab_size": bpe.get_vocab_size()})
    tokenizer = BPETokenizer(spec)
    assert tokenizer.encode("a<bot>b").tolist() == bpe.encode("a<bot>b").ids
    assert bpe.token_to_id("<bot>") in tokenizer.encode("a<bot>b")


@pytest.mark.parametrize("eos, expected", [(2, 2), ([2, 1], 2), (50256, 1), (None, 1)])
def test_the_end_of_text_is_one_of_its_ids(eos, expected):
    foreign_bpe(pytest.importorskip("tokenizers"), "tokenizer.json")
    assert read_tokenizer(Path("theirs"), {"eos_token_id": eos})["eot"] == expected


def test_gpt2s_own_tokens_beside_the_weights_are_known_as_such(gpt2):
    write_pretrained(gpt2_model(50257), gpt2, Path("ours"))
    assert read_tokenizer(Path("ours"), {"vocab_size": 50257}) == {"kind": "gpt2"}


def test_a_model_of_others_writes_and_is_trained_on_with_its_tokens(run, verse):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = foreign_bpe(tokenizers, "tokenizer.json")
    write_pretrained(gpt2_model(bpe.get_vocab_size()), ByteTokenizer(), Path("ours"))
    tokenizer = BPETokenizer(read_tokenizer(Path("theirs"), {}))
    write_pretrained(gpt2_model(bpe.get_vocab_size()), tokenizer, Path("ours"))
    assert run("sample.py", "--init_from=ours", "--max_new_tokens=3").status == 0
    one_sentence(run("train.py", *TINY, "--init_from=ours"), 1, "--tokenizer=ours")
    assert run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse",
               "--tokenizer=ours").status == 0
    assert run("train.py", *TINY, "--init_from=ours", "--block_size=8").status == 0


def test_padding_of_the_vocabulary_is_not_exported(train, run):
    train("--vocab_multiple=64")
    assert run("sample.py", "--export=ours").status == 0
    config = json.loads(Path("ours/config.json").read_text())
    saved = load_checkpoint("ours")
    assert config["vocab_size"] == saved["tokenizer"].vocab_size < 64
    ids = torch.randint(config["vocab_size"], (2, 8))
    with torch.no_grad():
        whole = load_checkpoint("out/tiny/best.pt")["model"](ids)[0]
        torch.testing.assert_close(saved["model"](ids)[0], whole[..., :config["vocab_size"]])


@pytest.mark.parametrize("name, ours", [("gelu_pytorch_tanh", "gelu"), ("gelu_fast", "gelu"),
                                        ("gelu_python", "gelu_erf"), ("gelu_new", "gelu"),
                                        ("gelu_accurate", "gelu"), ("gelu_python_tanh", "gelu")])
def test_activations_have_many_names(name, ours):
    pytest.importorskip("transformers")
    from transformers.activations import ACT2FN

    from model import ACTIVATION_NAMES, ACTIVATIONS
    x = torch.linspace(-5, 5, 101)
    assert ACTIVATION_NAMES[name] == ours
    torch.testing.assert_close(ACTIVATIONS[ours][1](x), ACT2FN[name](x), atol=1e-6, rtol=1e-5)


def test_shards_and_older_names_are_read_and_bin_files_refused(run):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    theirs.save_pretrained("parts", max_shard_size="1MB")
    assert len(list(Path("parts").glob("*.safetensors"))) > 1
    config = json.loads(Path("parts/config.json").read_text())
    config["n_ctx"] = config.pop("n_positions")
    Path("parts/config.json").write_text(json.dumps(config))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours = load_checkpoint("parts")["model"](ids)[0]
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    for path in Path("parts").glob("*.safetensors*"):
        path.unlink()
    Path("parts/pytorch_model.bin").write_bytes(b"PK")
    one_sentence(run("sample.py", "--init_from=parts"), 1, "it has no model.safetensors",
                 "safe_serialization=True")


def test_an_export_behaves_as_gpt2_of_the_hub():
    transformers = pytest.importorskip("transformers")
    tokenizer = learn_tokenizer([VERSE * 9], 300)
    write_pretrained(gpt2_model(tokenizer.vocab_size), tokenizer, Path("ours"))
    config = json.loads(Path("ours/config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 16
    about = json.loads(Path("ours/tokenizer_config.json").read_text())
    assert about["unk_token"] == about["eos_token"] == about["bos_token"] == EOT
    pipe = transformers.pipeline("text-generation", model="ours")
    assert pipe("From")[0]["generated_text"].startswith("From")
    model = transformers.AutoModelForCausalLM.from_pretrained("ours")
    batch = pipe.tokenizer(["From", "From fairest"], padding=True, return_tensors="pt")
    assert model.generate(**batch, do_sample=False).shape[1] <= 16
    generation = json.loads(Path("ours/generation_config.json").read_text())
    assert generation["max_length"] == 16
    assert generation["eos_token_id"] == generation["pad_token_id"] == tokenizer.eot


# ---- text as it comes ----

@pytest.mark.parametrize("raw, text", [
    (b"\xef\xbb\xbfHello", "Hello"), (b"\xef\xbb\xbfa\r\nb\r\n", "a\nb\n"), (b"a\rb", "a\rb"),
    (b"x\xef\xbb\xbfy", "x\ufeffy")])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_text(raw, text):
    Path("t.txt").write_bytes(raw)
    assert read_text("t.txt") == text
    assert encode_prompt(ByteTokenizer(), "FILE:t.txt").tolist() == [list(text.encode())]
    assert list(read_stories([Path("t.txt")])) == [text.strip()]


def test_stories_of_a_folder_come_from_all_its_texts(run):
    mark = "\ufeff"
    Path("d/inner").mkdir(parents=True)
    Path("d/a.TXT").write_text(f"{mark}one\r\ntwo\n{EOT}\nthree", newline="", encoding="utf-8")
    Path("d/inner/b.txt").write_text(f"{mark}four", encoding="utf-8")
    Path("d/c.jsonl").write_text(f'{mark}{{"text": "five\\r\\nfive"}}\n{{"text": "six", "id": 3}}\n',
                                 encoding="utf-8")
    Path("d/d.md").write_text("seven")
    done = run("prepare_tinystories.py", "--source=d", "--dataset=x", "--val_fraction=0")
    assert done.status == 0 and "3 .txt and .jsonl files, 1 others left out" in done.out
    tokenizer = CharTokenizer(json.loads(Path("data/x/meta.json").read_text())["tokenizer"]
                              ["vocabulary"])
    text = tokenizer.decode(np.fromfile("data/x/train.bin", np.uint16))
    assert text.split(EOT)[1:-1] == ["one\ntwo", "three", "five\nfive", "six", "four"]


@pytest.mark.parametrize("line", [b'{"story": "x"}', b"[1]", b"no json", b'{"text": 3}',
                                  b'{"text": "caf\xe9"}', b'{"text": "a \\ud83d b"}'])
def test_a_line_of_jsonl_without_a_text_is_named(run, line):
    Path("s.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line)
    one_sentence(run("prepare_tinystories.py", "--source=s.jsonl"), 1, "s.jsonl, line 3", '"text"')


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_byte_order_mark_is_one_at_the_start_alone(size):
    Path("s.txt").write_text(f"\ufeffa{EOT}\ufeffb{EOT}c", encoding="utf-8")
    assert list(read_stories([Path("s.txt")], size)) == ["a", "\ufeffb", "c"]


def piped(name, text):
    """A pipe with this text in it, as <(...) makes one."""
    if not Path(name).exists():
        os.mkfifo(name)
    threading.Thread(target=lambda: Path(name).write_text(text), daemon=True).start()
    return f"--source={name}"


@pytest.mark.parametrize("script", ["prepare_shakespeare.py", "prepare_tinystories.py"])
def test_a_pipe_is_read_and_another_text_in_it_noticed(run, script):
    for text in ("first " * 40, "other " * 40):
        stories = f"{EOT}".join([text] * 9)
        done = run(script, piped("pipe", stories), "--tokenizer=byte", "--dataset=p")
        assert done.status == 0 and "is there already" not in done.out, done
        ids = np.fromfile("data/p/train.bin", np.uint16)
        assert text.strip() in ByteTokenizer().decode(ids)


def test_one_long_text_is_shown_the_other_script(run):
    Path("novel.txt").write_text(VERSE * 99)
    one_sentence(run("prepare_tinystories.py", "--source=novel.txt"), 1, EOT,
                 "prepare_shakespeare.py")


def test_any_text_can_have_tokens_of_its_own(run):
    Path("v.txt").write_text(VERSE * 99)
    options = ["--source=v.txt", "--tokenizer=bpe", "--dataset=v"]
    assert run("prepare_shakespeare.py", *options, "--vocab_size=300").status == 0
    meta = json.loads(Path("data/v/meta.json").read_text())
    tokenizer = BPETokenizer(meta["tokenizer"])
    assert 257 < tokenizer.vocab_size <= 300
    assert (VERSE * 99).startswith(tokenizer.decode(np.fromfile("data/v/train.bin", np.uint16)))
    assert "is there already" in run("prepare_shakespeare.py", *options, "--vocab_size=300").out
    assert "is there already" not in run("prepare_shakespeare.py", *options, "--vocab_size=280").out
    one_sentence(run("prepare_shakespeare.py", *options, "--vocab_size=9"), 2, "from 257 to 65536")


def test_a_dataset_in_the_tokens_of_a_model_trained_anew_is_made_anew(run, verse):
    prepare = ["prepare_shakespeare.py", "--source=verse.txt", "--dataset=again"]
    for kind in ("char", "byte"):
        run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse", f"--tokenizer={kind}")
        run("train.py", *TINY)
        made = run(*prepare, "--tokenizer=out/tiny/best.pt").out
        assert json.loads(Path("data/again/meta.json").read_text())["tokenizer"]["kind"] == kind
    assert "data/again holds another text or other settings, to be replaced" in made
    assert "is there already" in run(*prepare, "--tokenizer=out/tiny/best.pt").out


# ---- prompts ----

def test_escapes_are_understood_in_start_and_stop_at(train, run):
    assert unescape(r"a\n\tb\\n\q") == "a\n\tb\\n\\q" and unescape("a\r\nb") == "a\nb"
    assert unescape(r"FILE:C:\temp\new.txt") == r"FILE:C:\temp\new.txt"
    train()
    sample = ["sample.py", "--device=cpu", "--max_new_tokens=200"]
    assert run(*sample, r"--start=From\nThat").out.startswith("From\nThat")
    stopped = run(*sample, "--start=From", r"--stop_at=\n").out
    assert stopped == run(*sample, "--start=From", "--stop_at=\n").out and stopped.count("\n") == 1
    assert train(r"--start=\n", "--sample_interval=3").status == 0


@pytest.mark.parametrize("start", ["", "FILE:gone.txt", "é"])
def test_without_a_prompt_text_begins_with_what_the_vocabulary_has(run, start):
    Path("dna.txt").write_text("ACGT" * 999)
    assert run("prepare_shakespeare.py", "--source=dna.txt", "--dataset=verse").status == 0
    assert run("train.py", *TINY, "--sample_interval=3").status == 0
    saved = torch.load("out/tiny/best.pt", weights_only=True)
    saved["settings"]["start"] = start or "\n"
    torch.save(saved, "out/tiny/best.pt")
    done = run("sample.py", "--device=cpu", "--max_new_tokens=5")
    assert done.status == 0 and done.out.startswith("A") and len(done.out) == 7


# ---- from logits to ids ----

@pytest.mark.parametrize("options", [
    {"temperature": 1e-38}, {"temperature": 5e-324}, {"temperature": 1e38},
    {"repetition_penalty": 1e-38}, {"repetition_penalty": 1e38}, {"repetition_penalty": 5e-324},
    {"top_p": 1e-46}, {"top_p": 1e-300, "temperature": 0.5}, {"temperature": 1e-30, "top_p": 0.9},
    {"temperature": 1e-38, "min_p": 0.5, "top_k": 3}])
def test_any_temperature_and_penalty_give_ids_of_the_vocabulary(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 65, 1, 2, 32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 8
    ids = torch.randint(65, (4, 8))
    out = model.generate(ids, 20, **options)
    assert out.shape == (4, 28) and 0 <= out.min() and out.max() < 65
    if options == {"temperature": 5e-324}:
        assert torch.equal(out, model.generate(ids, 20, temperature=0))


@pytest.mark.parametrize("options", [[], ["--temperature=0"], ["--num_beams=2"], ["--top_p=0.5"]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_computes_no_numbers_ends_with_a_sentence(train, run, options, value):
    train()
    saved = torch.load("out/tiny/best.pt", weights_only=True)
    saved["model"]["ln_f.weight"].fill_(value)
    torch.save(saved, "out/tiny/best.pt")
    done = run("sample.py", "--device=cpu", "--start=From", *options)
    assert done.status == 1 and "not finite" in done.err and "Traceback" not in done.err


def test_a_long_text_is_decoded_once(monkeypatch):
    text, decoded = sample_script.Text(tokenizer := ByteTokenizer()), []
    monkeypatch.setattr(ByteTokenizer, "token", lambda self, i: decoded.append(i) or bytes([i]))
    shown = "".join(text.append(i) for i in tokenizer.encode("é漢👩‍💻" * 300).tolist())
    assert shown == "é漢👩‍💻" * 300 and len(decoded) == len(shown.encode())


@pytest.mark.parametrize("raw", [b"\xc3", b"\xc3(", b"\xf0\x9f\x98", b"\x80\x80\x80\x80\xf0\x9f\x98\x80a"])
def test_bytes_that_are_no_text_are_shown_as_when_decoded_whole(raw):
    text = sample_script.Text(ByteTokenizer())
    shown = "".join(text.append(i) for i in raw) + text.append()
    assert shown == raw.decode("utf-8", "replace")


# ---- notebooks, terminals, signals ----

class Stream:
    """What a notebook has for stdout: no file, no terminal, and no method that is not needed."""
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [Stream, io.StringIO])
def test_scripts_run_where_output_is_no_file(verse, run, monkeypatch, stream):
    for script, *arguments in (["train.py", *TINY, "--eval_interval=1"],
                               ["prepare_tinystories.py", "--source=grammar", "--max_stories=30"],
                               ["prepare_shakespeare.py", "--source=verse.txt", "--dataset=y"],
                               ["sample.py", "--max_new_tokens=3"],
                               ["train.py", "--help"]):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stream())
            patch.setattr("sys.stderr", stream())
            assert run(script, *arguments).status == 0


def test_a_run_in_a_thread_catches_no_signals(train):
    assert train().status == 0  # leaves its arguments in sys.argv
    statuses = []

    def again():
        try:
            runpy.run_path(str(REPO / "train.py"), run_name="__main__")
        except SystemExit as stop:
            statuses.append(stop.code)
    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert statuses == [None]


def test_signals_are_as_before_after_a_run_and_ignored_ones_stay_so(train, monkeypatch):
    received = []
    monkeypatch.setattr(signal, "signal", lambda number, handler, real=signal.signal:
                        received.append((number, handler)) or real(number, handler))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    del received[:]
    try:
        assert train().status == 0
        assert signal.SIGHUP not in [number for number, _ in received[:2]]
        last = dict(received[:4])
        assert last[signal.SIGINT] is signal.default_int_handler
        assert last[signal.SIGTERM] == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_closed_terminal_saves_the_run(train, monkeypatch):
    real = torch.nn.utils.get_total_norm

    def hung_up(*given):  # twice, as a shell passes it on, and nothing can be printed any more
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        return real(*given)
    monkeypatch.setattr("torch.nn.utils.get_total_norm", hung_up)
    monkeypatch.setattr("sys.stdout", Stream())
    monkeypatch.setattr("sys.stderr", Stream())
    assert train("--eval_interval=0").status == 128 + signal.SIGHUP
    assert load_checkpoint("out/tiny/last.pt")["progress"]["step"] == 1


def test_a_terminal_that_is_really_closed_saves_the_run(verse):
    """A shell on a terminal of its own, which is closed while the run writes to it."""
    pty = pytest.importorskip("pty")
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(REPO / "train.py"), *TINY,
                                  "--max_iters=100000", "--save_interval=50"])
    seen, deadline = b"", time.time() + 60
    while b" 60 " not in seen and time.time() < deadline:
        seen += os.read(master, 10000)
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    progress = load_checkpoint("out/tiny/last.pt")["progress"]
    assert progress["step"] == int(Path("out/tiny/metrics.csv").read_text().splitlines()[-1]
                                   .split(",")[0]) >= 60


@pytest.mark.parametrize("options, status", [
    (["--log_interval=1"], signal.SIGTERM), (["--sample_interval=1"], signal.SIGTERM),
    (["--log_interval=1"], signal.SIGINT)])
def test_a_run_whose_output_nobody_reads_any_more_is_saved(verse, options, status):
    """As by `| head`, or by Ctrl-C in `| tee`, which ends tee, too."""
    command = [sys.executable, REPO / "train.py", *TINY, "--max_iters=100000",
               "--eval_interval=0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while not regex.search(rb"step 9 |^ +9 ", run.stdout.readline()):
            assert run.poll() is None
        run.stdout.close()
        if status == signal.SIGINT:
            run.send_signal(status)
        assert run.wait(timeout=60) == 128 + status and run.stderr.read() == b""
    assert load_checkpoint("out/tiny/last.pt")["progress"]["step"] >= 9


# ---- resuming ----

def test_going_back_to_an_earlier_checkpoint_is_asked_for(train):
    train("--snapshot_interval=2", "--max_iters=6", "--lr_decay_iters=9")
    back = ["--init_from=resume", "--checkpoint=step_2.pt", "--lr_decay_iters=9", "--max_iters=4"]
    one_sentence(train(*back, "--overwrite=False"), 2, "--checkpoint=step_2.pt goes back",
                 "--overwrite=True")
    assert load_checkpoint("out/tiny/last.pt")["progress"]["step"] == 6
    assert train(*back, "--overwrite=False", "--eval_only=True").status == 0
    assert train(*back).status == 0
    assert load_checkpoint("out/tiny/last.pt")["progress"]["step"] == 4
    fork = [*back, "--overwrite=False", "--out_dir=out/fork", "--checkpoint=out/tiny/last.pt"]
    assert train(*fork, "--max_iters=5").status == 0  # nothing is there to be replaced
    one_sentence(train(*fork, "--max_iters=6"), 2, "out/tiny/last.pt goes back")


@pytest.mark.parametrize("begin", [[], ["--init_from=out/tiny/best.pt"],
                                   ["--init_from=out/tiny/mine.pt"]])
def test_an_overwritten_run_stays_until_there_is_another(train, begin):
    train("--snapshot_interval=2")
    before, mine = weights("best.pt"), Path("out/tiny/mine.pt")
    mine.write_bytes(Path("out/tiny/best.pt").read_bytes())
    failed = train(*begin, "--learning_rate=1e25", "--grad_clip=0", "--warmup_iters=0")
    one_sentence(failed, 1, "its checkpoints are as they were")
    assert same(weights("best.pt"), before) and Path("out/tiny/step_4.pt").exists()
    assert train(*begin, "--eval_interval=0", "--seed=2").status == 0
    kept = sorted(path.name for path in Path("out/tiny").glob("*.pt"))
    assert kept == ["best.pt", "last.pt", "mine.pt"]
    assert not same(weights("best.pt"), before)


def test_a_run_is_evaluated_in_other_batches(train):
    train("--gradient_accumulation_steps=2")
    look = ["--init_from=resume", "--eval_only=True", "--eval_iters=0"]
    assert train(*look).out == train(*look, "--batch_size=2", "--learning_rate=1.0").out
    one_sentence(train(*look, "--block_size=8"), 2, "--block_size=16")


def test_a_run_is_not_resumed_on_another_text(train, run):
    train("--max_iters=3", "--lr_decay_iters=6")
    resume = ["--init_from=resume", "--lr_decay_iters=6"]
    verse = Path("verse.txt").read_text()
    prepare = ["prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse"]
    for other in (verse[::-1], verse[:-1], verse[10:] + verse[:10]):
        Path("verse.txt").write_text(other)
        assert run(*prepare).status == 0
        one_sentence(train(*resume), 2, "another text than data/verse", "--init_from=out/tiny")
    Path("verse.txt").write_text(verse)
    assert run(*prepare).status == 0 and train(*resume).status == 0


def test_a_run_that_stopped_early_takes_no_further_step(train):
    stop = ["--patience=1", "--learning_rate=1.0", "--eval_interval=1", "--max_iters=40"]
    assert "stopped after" in train(*stop).out
    before = weights()
    one_sentence(train(*stop, "--init_from=resume"), 2, "stopped early", "--patience")
    assert same(weights(), before)


def test_a_change_that_is_refused_names_the_way(train):
    train()
    for change in ("--learning_rate=0.1", "--dropout=0.1", "--batch_size=2"):
        one_sentence(train("--init_from=resume", change), 2, "--init_from=out/tiny/last.pt")


def test_before_its_first_evaluation_a_run_can_write_and_be_evaluated(train, run):
    train("--max_iters=3")
    Path("out/tiny/best.pt").unlink()
    for options in ([], ["--out_dir=out/tiny"]):
        done = run("sample.py", "--max_new_tokens=3", *options)
        assert done.status == 0 and "out/tiny/last.pt" in done.err
    assert train("--max_iters=3", "--init_from=resume", "--eval_only=True").status == 0


# ---- the steps of many ----

def test_float16_skips_a_step_of_all_optimizers_or_of_none(train, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: real(
        device, init_scale=2.0 ** 10))
    for name in ("lm_head.weight", "h.0.mlp.c_fc.weight"):  # AdamW's, and Muon's
        def overflow(self, *given, backward=torch.Tensor.backward):
            backward(self, *given)
            model = monkeypatch.model
            model.get_parameter(name).grad[0, 0] = math.inf
        with monkeypatch.context() as patch:
            patch.setattr(GPT, "init_weights", lambda self, init=GPT.init_weights: (
                setattr(monkeypatch, "model", self), init(self)))
            patch.setattr(torch.Tensor, "backward", overflow)
            train("--optimizer=muon", "--max_iters=2", "--eval_interval=0", "--snapshot_interval=1")
        first, second = (weights(f"step_{step}.pt") for step in (1, 2))
        assert same(first, second)
        assert load_checkpoint("out/tiny/last.pt")["progress"]["skipped"] == 2


def test_float16_survives_a_step_without_a_block(train, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: real(device))
    assert train("--optimizer=muon", "--layerdrop=0.9", "--max_iters=12").status == 0


def test_a_document_weighs_the_same_in_any_arrangement(run):
    Path("s.txt").write_text(EOT.join(VERSE[:5 + 7 * i % 80] for i in range(40)))
    run("prepare_tinystories.py", "--source=s.txt", "--dataset=verse", "--tokenizer=byte")
    rows = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        assert run("train.py", *TINY, "--document_rows=True", "--dropout=0", f"--batch_size={batch_size}",
                   f"--gradient_accumulation_steps={accumulation}").status == 0
        rows.append([(float(row["loss"]), float(row["norm"])) for row in metrics()[1:]])
    for other in rows[1:]:
        assert np.array(other) == pytest.approx(np.array(rows[0]), rel=2e-5)


# ---- places ----

def test_a_config_is_found_from_another_folder(verse, run):
    done = run("train.py", "config/shakespeare_cpu.py", *TINY)
    assert done.status == 0 and not Path("config").exists()
    one_sentence(run("train.py", "config/nope.py"), 2, "no such config file")


@pytest.mark.parametrize("name", ["data/verse", "data/verse/", "verse/", "./data/verse", "data//verse"])
def test_a_dataset_may_be_named_as_a_shell_completes_it(train, name):
    assert train(f"--dataset={name}").status == 0
    assert train("--init_from=resume", "--max_iters=7", "--lr_decay_iters=6").status in (0, 2)


def test_home_and_nested_folders_are_found(train, run, monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert train("--out_dir=~/run").status == 0 and Path("home/run/best.pt").is_file()
    assert train("--out_dir=out/a/b").status == 0
    assert "out/a/b/best.pt" in run("sample.py", "--max_new_tokens=2").err
    Path("c.py").write_text('init_from = "~/run/best.pt"\n')
    for options in (["--out_dir=~/run"], ["--checkpoint=home/run/last.pt"],
                    ["--init_from=~/run/best.pt"], ["c.py"],
                    ["--checkpoint=~/run/last.pt"], ["--init_from=home/run/last.pt"]):
        done = run("sample.py", "--max_new_tokens=2", *options)
        assert done.status == 0 and "/run/" in done.err, done
    resumed = train("--init_from=resume", "--checkpoint=out/a/b/last.pt", "--out_dir=out/a/b",
                    "--max_iters=7", "--lr_decay_iters=6", "--eval_only=True")
    assert resumed.status in (0, 2) and "out/a/b/out" not in resumed.err


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_compile_may_be_a_bool_in_a_config(train, run, script):
    Path("c.py").write_text("compile = False\n")
    assert train("c.py").status == 0 and run("sample.py", "c.py").status == 0
    Path("c.py").write_text("dtype = True\n")
    one_sentence(run(script, "c.py"), 2, "--dtype must be auto", "not 'True'")


@pytest.mark.parametrize("name, script, arguments", [
    ("verse.txt", "prepare_shakespeare.py", ["--source=verse.txt", "--dataset=z"]),
    ("verse.txt", "prepare_tinystories.py", ["--source=verse.txt", "--dataset=z"]),
    ("verse.txt", "sample.py", ["--start=FILE:verse.txt"]),
    ("best.pt", "sample.py", []), ("meta.json", "train.py", TINY),
    ("last.pt", "train.py", [*TINY, "--init_from=resume", "--max_iters=7"])])
def test_a_file_that_may_not_be_read_is_not_called_damaged(train, run, monkeypatch, name, script,
                                                           arguments):
    train()
    real, error = io.open, PermissionError(13, "Permission denied", name)

    def closed(path, *rest, **options):
        if Path(str(path)).name == name:
            raise error
        return real(path, *rest, **options)
    monkeypatch.setattr("io.open", closed)
    monkeypatch.setattr("builtins.open", closed)
    done = run(script, *arguments)
    assert done.status in (1, 2) and "Permission denied" in done.err and "may use" in done.err
    assert "damaged" not in done.err and "make room" not in done.err
    assert done.err.count("\n") == 1, done.err


def test_a_folder_that_may_not_be_written_is_no_full_disk(train, monkeypatch):
    def closed(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "mkdir", closed)
    one_sentence(train("--out_dir=out/new"), 1, "Permission denied", "choose another")
    assert REPO.is_dir()


# ---- datasets and folders that are there already ----

def test_what_cannot_be_prepared_leaves_the_dataset_that_is_there(train, run):
    train()
    before = {path: path.read_bytes() for path in Path("data/verse").iterdir()}
    Path("odd.txt").write_text(VERSE * 20 + "the w\u00f6rd of val is not known")
    prepare = ["prepare_shakespeare.py", "--source=odd.txt", "--dataset=verse"]
    one_sentence(run(*prepare, "--tokenizer=out/tiny/best.pt"), 1, "is not among the vocabulary")
    assert before == {path: path.read_bytes() for path in Path("data/verse").iterdir()}


def test_a_dataset_that_lacks_a_file_is_made_again(verse, run):
    prepare = ["prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse"]
    before = Path("data/verse/train.bin").read_bytes()
    for harm in (Path.unlink, lambda path: path.write_bytes(before[:-2])):
        harm(Path("data/verse/train.bin"))
        assert run(*prepare).status == 0 and Path("data/verse/train.bin").read_bytes() == before
    assert "is there already" in run(*prepare).out
    one_sentence(run(*prepare[:2], "--dataset=.."), 2, "plain name")
    made = run(*prepare[:2], "--dataset=my verse").out
    assert made.endswith("--dataset='my verse'\n")


def test_another_tokenizer_in_the_same_folder_makes_another_dataset(verse, run):
    Path("stories.txt").write_text(f"{EOT}\n".join([VERSE] * 40))
    for script, source in (("prepare_shakespeare.py", "verse.txt"),
                           ("prepare_tinystories.py", "stories.txt")):
        for kind in (CharTokenizer("\3" + "".join(sorted(set(VERSE)))), ByteTokenizer()):
            write_pretrained(gpt2_model(256), kind, Path("exported"))
            made = run(script, f"--source={source}", "--tokenizer=exported", "--dataset=new")
            assert made.status == 0 and "is there already" not in made.out
            spec = json.loads(Path("data/new/meta.json").read_text())["tokenizer"]
            assert spec["kind"] == kind.spec["kind"]


def test_an_export_replaces_what_another_model_left_in_the_folder(workdir):
    folder = Path("exported")
    write_pretrained(gpt2_model(300), BPETokenizer({"kind": "bpe", "tokens": []}), folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"wte": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = gpt2_model(256)
    write_pretrained(model, ByteTokenizer(), folder)
    assert not (folder / "tokenizer.json").exists()
    assert same(load_checkpoint(folder)["model"].state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["stories.ndjson", "stories.txt", "stories.jsonl"])
def test_json_lines_are_known_by_what_they_are(workdir, name):
    """So they may come from a pipe, which has no name."""
    lines = [json.dumps({"text": f"Story {i}.\nEnd.{EOT}"}) + "\n" for i in range(3)]
    Path(name).write_text("".join(lines))
    assert [*read_stories([Path(name)])] == [f"Story {i}.\nEnd." for i in range(3)]


def test_stories_need_a_tokenizer_that_can_end_them(train, run):
    train()
    Path("stories.txt").write_text(f"{EOT}\n".join([VERSE] * 40))
    one_sentence(run("prepare_tinystories.py", "--source=stories.txt",
                     "--tokenizer=out/tiny/best.pt"), 2, f"it has no {EOT}")
