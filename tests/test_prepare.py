"""Text to token files: counts that are known, what a bad source is told, downloads that break."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import one_sentence

from model import (BPETokenizer, ByteTokenizer, CharTokenizer, atomic_write, download,
                   encode_prompt, tokenizer_from)
from prepare_shakespeare import write_dataset


def meta(folder):
    return json.loads(Path(folder, "meta.json").read_text())


# ---- tokenizers ----

STRANGE = "Ünïcode, 漢字, emoji 👩‍🚀 and\r\ncontrol \x07 characters"


@pytest.mark.parametrize("text", [
    STRANGE, "plain", "漢字" * 9000, "?", "é?", "".join(map(chr, range(32, 1000))) * 20])
def test_char_ids_are_those_of_a_list_comprehension(text):
    vocabulary = "".join(sorted(set(text)))
    assert CharTokenizer(vocabulary).encode(text).tolist() == [vocabulary.index(c) for c in text]
    assert CharTokenizer(vocabulary).encode("").tolist() == []


OWN = {"kind": "bpe", "tokens": [" t", "he", " the", "\u00f0\u009f"]}


def test_tokenizers_give_back_the_text_and_are_built_again_from_their_spec(gpt2):
    for tokenizer in (CharTokenizer("".join(sorted(set(STRANGE)))), ByteTokenizer(), gpt2,
                      BPETokenizer(OWN)):
        again = tokenizer_from(json.loads(json.dumps(tokenizer.spec)))
        ids = again.encode(STRANGE)
        assert tokenizer.decode(ids.tolist()) == STRANGE and max(ids) < again.vocab_size


def test_end_of_text_is_one_token_and_comes_back_as_text(gpt2):
    for tokenizer, eot in ((gpt2, 50256), (BPETokenizer(OWN), 260), (ByteTokenizer(), 255),
                           (CharTokenizer("\3ab"), 0)):
        ids = tokenizer.encode("a<|endoftext|>b<|endoftext|>").tolist()
        assert ids[1] == ids[3] == eot == tokenizer.eot and len(ids) == 4
        assert tokenizer.decode(ids) == "a<|endoftext|>b<|endoftext|>"
        assert encode_prompt(tokenizer, "").tolist() == [[eot]]
        ab = tokenizer.encode("ab").tolist()  # a row of a document begins with eot
        for text in ("ab", "<|endoftext|>ab"):
            assert encode_prompt(tokenizer, text, document_rows=True).tolist() == [[eot, *ab]]
        assert encode_prompt(tokenizer, "ab").tolist() == [ab]
    assert CharTokenizer("ab").eot is None


@pytest.mark.parametrize("text", ["cab!", "cab?", "cab\ud800", "cab" + chr(0x10FFFF)])
def test_an_unknown_character_is_named_with_its_place(text):
    with pytest.raises(ValueError, match=r"character 4 of the text.*--tokenizer=byte"):
        CharTokenizer("abc").encode(text)


@pytest.mark.parametrize("spec", [None, {}, {"kind": "magic"}, {"kind": "char"}, {"kind": []},
                                  {"kind": "char", "vocabulary": "ba"},
                                  {"kind": "char", "vocabulary": ""},
                                  {"kind": "char", "vocabulary": ["a"]}, {"kind": "bpe"},
                                  {"kind": "bpe", "tokens": "the"},
                                  {"kind": "bpe", "tokens": [" t", " t"]},
                                  {"kind": "bpe", "tokens": ["\u2019"]}])
def test_a_spec_that_describes_no_tokenizer_is_refused(spec):
    with pytest.raises(ValueError):
        tokenizer_from(spec)


# ---- datasets ----

@pytest.mark.parametrize("tokenizer, vocabulary, train, val", [
    ("char", 65, 1_003_854, 111_540), ("gpt2", 50257, 301_966, 36_059),
    ("byte", 256, 1_003_854, 111_540)])
def test_tiny_shakespeare_has_its_known_counts(run, tiny_shakespeare, request, tokenizer,
                                               vocabulary, train, val):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    run("prepare_shakespeare.py", f"--source={tiny_shakespeare}", f"--tokenizer={tokenizer}")
    folder = Path(f"data/shakespeare_{tokenizer}")
    splits = meta(folder)["splits"]
    assert (splits["train"]["tokens"], splits["val"]["tokens"]) == (train, val)
    assert tokenizer_from(meta(folder)["tokenizer"]).vocab_size == vocabulary
    assert Path(folder, "val.bin").stat().st_size == 2 * val


def test_the_files_hold_the_text_in_order(run):
    text = STRANGE * 20
    Path("t.txt").write_text(text, newline="")
    run("prepare_shakespeare.py", "--source=t.txt", "--dataset=t", "--val_fraction=0.2",
        "--test_fraction=0.1")
    tokenizer = tokenizer_from(meta("data/t")["tokenizer"])
    parts = [tokenizer.decode(np.fromfile(f"data/t/{split}.bin", np.uint16))
             for split in ("train", "val", "test")]
    text = text.replace("\r\n", "\n")  # as all text is read
    assert "".join(parts) == text
    for part, split in zip(parts, ("train", "val", "test")):
        counts = meta("data/t")["splits"][split]
        assert counts["characters"] == counts["tokens"] == len(part)
        assert counts["bytes"] == len(part.encode())
    assert [round(len(part) / len(text), 2) for part in parts] == [0.7, 0.2, 0.1]


def test_the_same_settings_leave_a_dataset_alone_and_others_make_it_anew(run, verse):
    before = Path("data/verse/meta.json").stat().st_mtime_ns
    again = run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse")
    assert "there already" in again.out
    assert Path("data/verse/meta.json").stat().st_mtime_ns == before
    run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse", "--tokenizer=byte")
    assert meta("data/verse")["tokenizer"] == {"kind": "byte"}


def test_a_dataset_cut_short_leaves_the_one_before(workdir):
    def broken():
        yield "a"
        raise KeyboardInterrupt

    folder = Path("data/x")
    write_dataset(folder, {"train": ["abc"], "val": ["abc"]}, ByteTokenizer())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, {"train": ["abcdef"], "val": broken()}, ByteTokenizer())
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_whole_or_not_at_all(workdir):
    Path("x").write_bytes(b"before")
    with pytest.raises(OSError), atomic_write("x") as file:
        file.write(b"half")
        raise OSError("disk full")
    assert Path("x").read_bytes() == b"before" and [p.name for p in workdir.iterdir()] == ["x"]


@pytest.mark.parametrize("data, arguments, status, words", [
    (b"abc\xff", [], 1, ["t.txt is not UTF-8 at byte 3"]),
    (b"", [], 1, ["t.txt: 0 characters are too few for a train split"]),
    (b"a", [], 1, ["1 characters are too few for a train split"]),
    (b"abc" * 9, ["--source=nope.txt"], 1, ["nope.txt: no such file"]),
    (b"abc" * 9, ["--tokenizer=word"], 2, ["--tokenizer must be char, byte, gpt2, bpe or a checkpoint"]),
    (b"abc" * 9, ["--val_fraction=1.0"], 2, ["must be 0 or above and leave some to train on"]),
    (b"abc" * 9, ["--val_fraction=0.5", "--test_fraction=0.5"], 2, ["leave some to train on"]),
    (b"abc" * 9, ["--dataset=../x"], 2, ["--dataset must be the plain name"]),
])
def test_a_bad_source_is_told_what_to_do(run, data, arguments, status, words):
    Path("t.txt").write_bytes(data)
    one_sentence(run("prepare_shakespeare.py", "--source=t.txt", *arguments), status, *words)
    assert not list(Path().glob("data/*/meta.json"))


# ---- downloads, from a server on this machine ----

BODY = bytes(range(256)) * 1000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(serve):
    """server(answer, ...) -> the url of a server that answers so, with BODY."""
    return lambda *answers: serve(BODY, *answers)


def fetched(*urls):
    download(urls, Path("data/x.txt"), "pass a copy", SHA, wait=0.01, timeout=5)
    return Path("data/x.txt").read_bytes() == BODY


@pytest.mark.parametrize("answers", [
    ["whole"], [503, "whole"], ["cut", "whole"], ["cut", "cut", "whole"],
    ["cut", "no ranges"], ["wrong", "whole"], ["cut", "wrong", "whole"], [429, "cut", "whole"]])
def test_a_download_recovers(server, answers):
    assert fetched(server(*answers))
    assert not Path("data/x.txt.part").exists()


def test_a_cut_download_goes_on_where_it_stopped(server, serve):
    assert fetched(server("cut", "whole"))
    (first, whole), (second, rest) = serve.seen
    assert (first, whole, second) == ("cut", "bytes=0-", "whole")
    assert 0 < int(rest[6:-1]) <= len(BODY) // 2


def test_a_download_that_stalls_is_taken_up_again(server):
    url = server("stall", "whole")
    download((url,), Path("x.txt"), "pass a copy", SHA, wait=0.01, timeout=0.2)
    assert Path("x.txt").read_bytes() == BODY


def test_the_next_url_is_asked_at_once(server, serve):
    assert fetched(server(404), server("whole"))
    assert [answer for answer, _ in serve.seen] == [404, "whole"]


def test_a_try_that_brings_something_is_not_counted(server):
    url = server(*["cut"] * 4, "whole")
    download((url,), Path("x.txt"), "pass a copy", SHA, tries=2, wait=0.01)
    assert Path("x.txt").read_bytes() == BODY


def test_what_the_server_says_of_the_files_hash_is_held_against_it(serve):
    url = serve(BODY, "wrong", "cut", "whole", sha256=SHA)
    path = download((url,), Path("data/x.txt"), "pass a copy", wait=0.01)
    assert path.read_bytes() == BODY
    with pytest.raises(OSError, match="another size or sha256.*pass a copy"):
        download((serve(BODY, "whole", sha256="0" * 64),), Path("y.txt"), "pass a copy", wait=0.01)
    assert not Path("y.txt").exists() and not Path("y.txt.part").stat().st_size


def test_a_limit_fetches_no_more_than_it_and_the_rest_can_follow(server, serve):
    url = server("whole")
    part = download((url,), Path("x.txt"), "pass a copy", limit=1000)
    assert part.name == "x.txt.part" and part.read_bytes() == BODY[:1000]
    assert download((url,), Path("x.txt"), "pass a copy", limit=900) == part  # enough already
    assert len(serve.seen) == 1
    assert download((url,), Path("x.txt"), "pass a copy", limit=10 ** 9).read_bytes() == BODY
    assert [span for _, span in serve.seen] == ["bytes=0-999", "bytes=1000-999999999"]


def test_a_whole_part_file_is_taken_without_asking_again(server):
    Path("data").mkdir()
    Path("data/x.txt.part").write_bytes(BODY)
    assert fetched(server("whole"))


@pytest.mark.parametrize("answer, word", [(404, "404"), (500, "500"), ("wrong", "sha256")])
def test_a_failed_download_is_one_sentence_and_leaves_no_dataset(
        run, server, monkeypatch, answer, word):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match=f"x.txt could not be downloaded .*{word}.*pass a copy"):
        fetched(server(answer))
    assert not Path("data/x.txt").exists()


def test_without_a_network_the_script_says_how_to_go_on(run, monkeypatch):
    def refuse(*_, **__):
        raise requests.ConnectionError
    monkeypatch.setattr("requests.get", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    one_sentence(run("prepare_shakespeare.py"), 1, "could not be downloaded", "--source=FILE")
