"""Stories: read and split without loss, encoded alike by any number of threads, downloaded in part;
the byte-pair trainer against a naive one; a grammar that writes nothing in two ways."""

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, one_sentence

import prepare_tinystories
from model import EOT, tokenizer_from
from prepare_shakespeare import learn_bpe
from prepare_tinystories import GRAMMAR, read_stories, write_story

WORDS = "Once a cat saw the small dog run to that old tree ‘why?’ said Tom’s mum\n".split(" ")
STORIES = [" ".join(random.Random(i).choices(WORDS, k=5 + i % 30)).strip() for i in range(200)]


@pytest.fixture
def prepare(run):
    """prepare("--tokenizer=byte") -> data/x from the 200 stories of stories.txt."""
    Path("stories.txt").write_text(f"\n{EOT}\n".join(STORIES) + f"\n{EOT}\n", encoding="utf-8")
    return lambda *arguments: run("prepare_tinystories.py", "--source=stories.txt", "--dataset=x",
                                  *arguments)


def meta(folder="data/x"):
    return json.loads(Path(folder, "meta.json").read_text())


def stories_in(split, folder="data/x"):
    """The stories of a split, decoded; each split begins and ends with the end of a story."""
    about = meta(folder)
    tokenizer = tokenizer_from(about["tokenizer"])
    text = tokenizer.decode(np.fromfile(f"{folder}/{split}.bin", about["dtype"]))
    assert text.startswith(EOT) and text.endswith(EOT)
    return text.split(EOT)[1:-1]


def files(folder="data/x"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---- stories and splits ----

def test_the_next_command_keeps_the_config_that_was_given(prepare, run):
    Path("mine.py").write_text("tokenizer = 'byte'")
    assert prepare("mine.py").out.endswith("next: python train.py mine.py --dataset=x\n")
    other = prepare("--tokenizer=byte", "--val_fraction=0.2")
    assert other.out.endswith("next: python train.py config/tinystories_char.py --dataset=x\n")
    run("train.py", *TINY, "--dataset=x")
    assert "config/tinystories_char.py" in prepare("--tokenizer=out/tiny/best.pt").out


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_each_story_is_whole_in_one_split(prepare, tokenizer):
    prepare(f"--tokenizer={tokenizer}", "--vocab_size=300", "--test_fraction=0.25")
    splits = {name: stories_in(name) for name in ("train", "val", "test")}
    assert {name: len(some) for name, some in splits.items()} == {"train": 130, "val": 20,
                                                                  "test": 50}
    assert Counter(sum(splits.values(), [])) == Counter(STORIES)
    for name, some in splits.items():
        counts = meta()["splits"][name]
        assert counts["documents"] == len(some)
        assert counts["characters"] == sum(map(len, some))
        assert counts["bytes"] == sum(len(story.encode()) for story in some)
        assert counts["tokens"] == Path(f"data/x/{name}.bin").stat().st_size // 2


def test_empty_stories_are_dropped_and_repeated_ones_counted(run):
    Path("s.txt").write_text(f"a b{EOT}\n{EOT} \n {EOT}a b\n{EOT}c{EOT}\nd\n")
    made = run("prepare_tinystories.py", "--source=s.txt", "--dataset=x", "--val_fraction=0.25")
    assert meta()["read"] == {"stories": 4, "empty": 2, "repeated": 1}
    assert "4 stories, 1 of them repeated; 2 empty left out" in made.out
    assert sorted(stories_in("train") + stories_in("val")) == ["a b", "a b", "c", "d"]


def test_the_first_stories_and_a_share_of_them(prepare):
    prepare("--max_stories=100", "--fraction=0.75", "--val_fraction=0.2")
    train, val = stories_in("train"), stories_in("val")
    assert (len(train), len(val)) == (60, 15) and set(train + val) <= set(STORIES[:100])
    prepare("--max_stories=100", "--fraction=0.75", "--val_fraction=0.2", "--seed=2")
    assert len(stories_in("val")) == 15 and stories_in("val") != val


def test_a_folder_is_read_file_by_file_and_val_can_have_a_file_of_its_own(run):
    Path("texts").mkdir()
    for name, text in {"b": f"two{EOT}three", "a": "one", "c": f"four\n{EOT}\n"}.items():
        Path(f"texts/{name}.txt").write_text(text)
    Path("val.txt").write_text(f"five{EOT}six")
    assert list(filter(None, read_stories(sorted(Path("texts").iterdir()), 1000))) == [
        "one", "two", "three", "four"]
    run("prepare_tinystories.py", "--source=texts", "--val_source=val.txt", "--dataset=x")
    assert stories_in("train") == ["one", "two", "three", "four"]
    assert stories_in("val") == ["five", "six"]
    assert set("onesix") <= set(meta()["tokenizer"]["vocabulary"])


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "bpe"])
def test_threads_and_chunks_change_no_byte(prepare, tokenizer, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    made = []
    for workers, size in ((1, 10 ** 6), (3, 1000), (2, 7)):
        arguments = f"--tokenizer={tokenizer}", "--vocab_size=300", f"--workers={workers}"
        assert prepare(*arguments, f"--chunk_size={size}").status == 0
        made.append(files())
        Path("data/x/meta.json").unlink()
    assert made[0] == made[1] == made[2] and len(made[0]) == 3


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_any_moment_it_finishes_with_the_same_bytes(prepare, monkeypatch, call):
    arguments = "--tokenizer=bpe", "--vocab_size=300", "--test_fraction=0.1"
    prepare(*arguments)
    whole, real = files(), getattr(os, call)
    for moment in range(4):  # train, val, test, meta
        Path("data/x/meta.json").unlink()
        left = [None] * moment

        def kill(*args):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return real(*args)

        monkeypatch.setattr(os, call, kill)
        with pytest.raises(KeyboardInterrupt):
            prepare(*arguments)
        assert not Path("data/x/meta.json").exists()
        monkeypatch.setattr(os, call, real)
        assert prepare(*arguments).status == 0 and files() == whole
    assert "there already" in prepare(*arguments).out


@pytest.mark.parametrize("data, arguments, status, words", [
    (f"a{EOT}b\xff", [], 1, ["s.txt is not UTF-8 at byte 15", "convert it"]),
    ("", [], 1, ["s.txt holds no stories"]),
    (f" {EOT}\n", [], 1, ["s.txt holds no stories"]),
    (f"a{EOT}b", [], 1, ["2 stories are too few for a val split"]),
    (f"a{EOT}b\3", ["--val_fraction=0.5"], 1, ["U+0003", "--tokenizer=byte"]),
    ("a", ["--source=nope"], 2, ["--source=nope: no such file, nor a folder of .txt or .jsonl files"]),
    ("a", ["--val_source=nope"], 2, ["--val_source=nope"]),
    ("a", ["--val_source=official"], 2, ["goes with --source=tinystories"]),
    ("a", ["--source=grammar", "--val_source=s.txt"], 2, ["leave --val_source out"]),
    ("a", ["--tokenizer=word"], 2, ["must be char, byte, gpt2, bpe or a checkpoint"]),
    ("a", ["--tokenizer=bpe", "--vocab_size=256"], 2, ["from 257 to 65536"]),
    ("a", ["--fraction=0.0"], 2, ["--fraction must be above 0"]),
    ("a", ["--val_fraction=-0.1"], 2, ["must be 0 or above"]),
    ("a", ["--val_fraction=0.6", "--test_fraction=0.4"], 2, ["leave some to train on"]),
    ("a", ["--chunk_size=0"], 2, ["--chunk_size must be at least 1"]),
    ("a", ["--max_stories=-1"], 2, ["--max_stories must be at least 0"]),
    ("a", ["--dataset=../x"], 2, ["plain name"])])
def test_a_bad_source_or_setting_is_told_what_to_do(run, data, arguments, status, words):
    Path("s.txt").write_bytes(data.encode("latin-1"))
    one = run("prepare_tinystories.py", "--source=s.txt", *arguments)
    one_sentence(one, status, *words)
    assert not list(Path().glob("data/*/meta.json"))


def test_a_file_without_ends_of_stories_is_not_read_into_memory(monkeypatch):
    monkeypatch.setattr(prepare_tinystories, "LONGEST", 10_000)
    Path("s.txt").write_text("word " * 10_000)
    with pytest.raises(ValueError, match="bytes without an <.endoftext.>, write one behind each"):
        list(read_stories([Path("s.txt")], 1000))


# ---- downloads ----

BODY = f"\n{EOT}\n".join(f"{i} " + "word " * 150 for i in range(3000)).encode()


@pytest.fixture
def hub(run, serve, monkeypatch):
    """hub(answer, ..., arguments) prepares data/x from a server that answers so."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def prepare(*answers, arguments=(), **headers):
        url = serve(BODY, *answers, **headers).removesuffix("/x.txt")
        return run("prepare_tinystories.py", "--tokenizer=byte", "--dataset=x", f"--hub={url}",
                   *arguments)
    return prepare


def test_a_slice_costs_a_slice_of_the_traffic_and_the_next_one_goes_on(hub, serve):
    assert hub("whole", arguments=["--max_stories=300"]).status == 0
    slice = Path("data/TinyStories-train.txt.part")
    assert len(BODY) * 0.1 < slice.stat().st_size < len(BODY) * 0.12
    numbers = sorted(int(s.split()[0]) for s in stories_in("train") + stories_in("val"))
    assert numbers == list(range(300))
    requests, have = len(serve.seen), slice.stat().st_size
    assert "there already" in hub("whole", arguments=["--max_stories=300"]).out
    assert hub("whole", arguments=["--max_stories=200"]).status == 0 and requests == len(serve.seen)
    assert hub("whole").status == 0
    assert serve.seen[requests][1] == f"bytes={have}-"
    assert Path("data/TinyStories-train.txt").read_bytes() == BODY and not slice.exists()


@pytest.mark.parametrize("answers", [["whole"], ["cut", "whole"], [503, "whole"],
                                     ["cut", "no ranges"], ["cut", 503, "cut", "wrong", "whole"]])
def test_a_broken_server_is_recovered_from(hub, answers):
    assert hub(*answers, sha256=hashlib.sha256(BODY).hexdigest()).status == 0
    assert meta()["read"]["stories"] == 3000
    assert Path("data/TinyStories-train.txt").read_bytes() == BODY


@pytest.mark.parametrize("answer, word", [(404, "404"), (503, "503"), ("wrong", "sha256")])
def test_a_download_that_fails_is_one_sentence(hub, answer, word):
    failed = hub(answer, sha256="0" * 64)
    one_sentence(failed, 1, "could not be downloaded", word, "--source=grammar")
    assert not Path("data/x").exists() and not Path("data/TinyStories-train.txt").exists()


def test_the_official_validation_file_is_the_val_split(hub):
    assert hub("whole", arguments=["--val_source=official", "--source=tinystories_v2",
                                   "--max_stories=50"]).status == 0
    assert len(stories_in("train")) == 50 and len(stories_in("val")) == 3000
    assert Path("data/TinyStoriesV2-GPT4-valid.txt").exists()


# ---- byte pairs ----

def naive_bpe(counts, merges):
    """The same by counting everything anew for each token."""
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in counts.items()]
    tokens = []
    for _ in range(merges):
        met = Counter()
        for word, count in words:
            for pair in zip(word, word[1:]):
                met[b"".join(pair)] += count
        best = min(met, key=lambda pair: (-met[pair], pair), default=None)
        if best is None or met[best] < 2:
            break
        tokens.append(best)
        words = [(apply(word, best), count) for word, count in words]
    return tokens


def apply(word, token):
    merged, i = [], 0
    while i < len(word):
        two = b"".join(word[i:i + 2])
        merged.append(two if two == token and i + 1 < len(word) else word[i])
        i += 2 if two == token and i + 1 < len(word) else 1
    return merged


def test_the_trainer_learns_what_a_naive_one_does():
    """naive_bpe() is the oracle: it recounts every pair for each token, as the algorithm is defined,
    and is too slow for anything else."""
    assert learn_bpe({"banana": 1, "ban": 2}, 2) == [b"an", b"ban"]
    for seed in range(30):
        rng = random.Random(seed)
        pieces = Counter("".join(rng.choices("aab ’", k=rng.randint(1, 9))) for _ in range(40))
        assert learn_bpe(pieces, 30) == naive_bpe(pieces, 30)


def test_tiktoken_merges_the_pieces_as_the_trainer_did(prepare):
    prepare("--tokenizer=bpe", "--vocab_size=400")
    tokenizer = tokenizer_from(meta()["tokenizer"])
    tokens = [token.encode("latin-1") for token in tokenizer.spec["tokens"]]
    rank = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + tokens)}
    assert tokenizer.vocab_size == 257 + len(tokens) and 20 < len(tokens) < 143  # all there is
    for piece in Counter(f" {word}" for word in WORDS if word.isalpha()):
        word = [bytes([b]) for b in piece.encode()]
        while pairs := {a + b for a, b in zip(word, word[1:])} & rank.keys():
            word = apply(word, min(pairs, key=rank.get))
        assert tokenizer.encode(piece).tolist() == [rank[token] for token in word]


# ---- the grammar ----

@pytest.mark.parametrize("rule", GRAMMAR)
def test_no_option_of_a_rule_begins_with_another(rule):
    """So each choice can be read off the text, from left to right: up to the first choice inside
    them two options differ at a letter of their own, not at a slot that repeats what was said."""
    heads = [re.split(r"\{\w*:", option)[0] for option in GRAMMAR[rule]]
    for i, one in enumerate(heads):
        for other in heads[:i]:
            same = os.path.commonprefix([one, other])
            assert len(same) < min(len(one), len(other)), (one, other)
            next_two = one[len(same)] + other[len(same)]
            assert same.count("{") == same.count("}") and "{" not in next_two


class Plan:
    """Stands for a random.Random whose choices are planned; notes how many options each had."""
    def __init__(self, plan):
        self.plan, self.sizes = plan, []

    def choice(self, options):
        at = len(self.sizes)
        self.sizes.append(len(options))
        return options[self.plan[at] if at < len(self.plan) else 0]


def derivations(grammar):
    """Every (text, nats) that the grammar can write."""
    plan = []
    while True:
        rng = Plan(plan)
        yield write_story(rng, grammar)
        plan = plan + [0] * (len(rng.sizes) - len(plan))
        while plan and plan[-1] + 1 == rng.sizes[len(plan) - 1]:
            plan.pop()
        if not plan:
            return
        plan[-1] += 1


@pytest.mark.parametrize("seed", range(8))
def test_no_two_derivations_write_the_same_story_and_all_add_up_to_one(seed):
    """Then -log p of a derivation is -log p of its text, and their mean the entropy. Enumerating all
    that a small part of the grammar can write proves both at once."""
    rng = random.Random(seed)
    some = {rule: rng.sample(options, min(len(options), 2 if rng.random() < 0.15 else 1))
            for rule, options in GRAMMAR.items()}
    some["problem"] = rng.sample(GRAMMAR["problem"], 4)
    written = list(derivations(some))
    assert 8 <= len(written) == len({text for text, _ in written})
    assert math.fsum(math.exp(-nats) for _, nats in written) == pytest.approx(1)


def test_a_story_costs_the_logarithms_of_its_choices_and_keeps_its_names():
    for seed in range(50):
        rng = random.Random(seed)
        text, nats = write_story(rng)
        replay = Plan([])
        replay.choice = partial(noting, random.Random(seed), replay.sizes)
        assert write_story(replay) == (text, nats)
        assert nats == pytest.approx(sum(map(math.log, replay.sizes)))
        he = {"girl": "She", "boy": "He", "little": "It"}[
            text.partition(" there lived a ")[2].split()[0]]
        name = text.partition(" named ")[2].partition(".")[0]
        assert text.count(name) >= 2 and f" {he} was " in text
        assert not {"She", "He", "It"} - {he} & set(text.replace("It smelled", "").split())


def noting(rng, sizes, options):
    sizes.append(len(options))
    return rng.choice(options)


def test_the_entropy_in_meta_is_that_of_the_stories(run):
    run("prepare_tinystories.py", "--source=grammar", "--max_stories=300", "--dataset=x")
    rng = random.Random(1337)
    nats = dict(write_story(rng) for _ in range(300))
    for split, counts in meta()["splits"].items():
        total = math.fsum(nats[story] for story in stories_in(split))
        assert counts["nats_per_token"] == pytest.approx(total / (counts["tokens"] - 1))
        assert counts["nats_per_character"] == pytest.approx(total / counts["characters"])
    assert "nats" not in str(meta("data/x")["read"])
