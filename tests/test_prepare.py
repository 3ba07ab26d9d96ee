"""Text to token files: counts that are known, what a bad source is told, downloads that break."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import one_sentence

import prepare_shakespeare
from model import (ByteTokenizer, CharTokenizer, GPT2Tokenizer, atomic_write, encode_prompt,
                   tokenizer_from)
from prepare_shakespeare import download, write_dataset


def meta(folder):
    return json.loads(Path(folder, "meta.json").read_text())


@pytest.fixture
def gpt2():
    try:
        return GPT2Tokenizer()
    except OSError:
        pytest.skip("GPT-2's tokenizer is not at hand and cannot be downloaded")


# ---- tokenizers ----

STRANGE = "Ünïcode, 漢字, emoji 👩‍🚀 and\r\ncontrol \x07 characters"


def test_char_ids_are_the_positions_in_the_sorted_vocabulary():
    tokenizer = CharTokenizer("".join(sorted(set(STRANGE))))
    stoi = {c: i for i, c in enumerate(sorted(set(STRANGE)))}
    assert tokenizer.encode(STRANGE).tolist() == [stoi[c] for c in STRANGE]
    assert tokenizer.encode("").tolist() == []


def test_tokenizers_give_back_the_text_and_are_built_again_from_their_spec(gpt2):
    for tokenizer in (CharTokenizer("".join(sorted(set(STRANGE)))), ByteTokenizer(), gpt2):
        again = tokenizer_from(json.loads(json.dumps(tokenizer.spec)))
        ids = again.encode(STRANGE)
        assert tokenizer.decode(ids.tolist()) == STRANGE and max(ids) < again.vocab_size


def test_gpt2_reads_end_of_text_as_its_token(gpt2):
    assert gpt2.encode("a<|endoftext|>").tolist() == [64, 50256]
    assert encode_prompt(gpt2, "").tolist() == [[50256]]


@pytest.mark.parametrize("text", ["cab!", "cab\ud800", "cab" + chr(0x10FFFF)])
def test_an_unknown_character_is_named_with_its_place(text):
    with pytest.raises(ValueError, match=r"character 4 of the text.*--tokenizer=byte"):
        CharTokenizer("abc").encode(text)


@pytest.mark.parametrize("spec", [None, {}, {"kind": "magic"}, {"kind": "char"}, {"kind": []},
                                  {"kind": "char", "vocabulary": "ba"},
                                  {"kind": "char", "vocabulary": ""},
                                  {"kind": "char", "vocabulary": ["a"]}])
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


def test_a_dataset_cut_short_is_not_taken_for_whole(workdir):
    class Broken(ByteTokenizer):
        def encode(self, text):
            if text == "break":
                raise KeyboardInterrupt
            return super().encode(text)

    folder = Path("data/x")
    write_dataset(folder, {"train": ["abc"], "val": ["abc"]}, ByteTokenizer(), {})
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, {"train": ["abcdef"], "val": ["a", "break"]}, Broken(), {})
    assert not Path(folder, "meta.json").exists() and not list(folder.glob("*.tmp"))


def test_a_file_is_replaced_whole_or_not_at_all(workdir):
    Path("x").write_bytes(b"before")
    with pytest.raises(OSError), atomic_write("x") as file:
        file.write(b"half")
        raise OSError("disk full")
    assert Path("x").read_bytes() == b"before" and [p.name for p in workdir.iterdir()] == ["x"]


@pytest.mark.parametrize("data, arguments, status, words", [
    (b"abc\xff", [], 1, ["t.txt is not UTF-8 at byte 3"]),
    (b"", [], 1, ["t.txt is empty"]),
    (b"a", [], 1, ["1 characters are too few for a train split"]),
    (b"abc" * 9, ["--source=nope.txt"], 1, ["nope.txt: no such file"]),
    (b"abc" * 9, ["--tokenizer=word"], 2, ["--tokenizer must be char, byte or gpt2"]),
    (b"abc" * 9, ["--val_fraction=1.0"], 2, ["--val_fraction must be from 0 to below 1"]),
    (b"abc" * 9, ["--val_fraction=0.5", "--test_fraction=0.5"], 2, ["something to train on"]),
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
def server():
    """server(answer, answer, ...) -> a url whose requests are answered in turn, the last for ever.
    An answer is a status, or "whole", "cut" (half of what it promised), "wrong", "no ranges"."""
    servers = []

    def start(*answers):
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer = left.pop(0) if len(left) > 1 else left[0]
                start.seen.append((answer, self.headers.get("Range")))
                body = b"?" * len(BODY) if answer == "wrong" else BODY
                offset = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                if isinstance(answer, int):
                    self.send_response(answer)
                    self.end_headers()
                    return
                if offset >= len(body):
                    self.send_response(416)
                    self.end_headers()
                    return
                if offset and answer != "no ranges":
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {offset}-{len(body)-1}/{len(body)}")
                    body = body[offset:]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if answer == "cut" else body)

            def log_message(self, *_):
                pass

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(httpd)
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{httpd.server_port}/x.txt"

    start.seen = []
    yield start
    for httpd in servers:
        httpd.shutdown()
        httpd.server_close()


def fetched(*urls):
    download(urls, Path("data/x.txt"), SHA, "pass a copy", wait=0.01, timeout=5)
    return Path("data/x.txt").read_bytes() == BODY


@pytest.mark.parametrize("answers", [
    ["whole"], [503, "whole"], ["cut", "whole"], ["cut", "cut", "whole"],
    ["cut", "no ranges"], ["wrong", "whole"], ["cut", "wrong", "whole"], [429, "cut", "whole"]])
def test_a_download_recovers(server, answers):
    assert fetched(server(*answers))
    assert not Path("data/x.txt.part").exists()


def test_a_cut_download_goes_on_where_it_stopped(server):
    assert fetched(server("cut", "whole"))
    (first, whole), (second, rest) = server.seen
    assert (first, whole, second) == ("cut", None, "whole")
    assert 0 < int(rest[6:-1]) <= len(BODY) // 2


def test_the_next_url_is_asked_at_once(server):
    assert fetched(server(404), server("whole"))
    assert [answer for answer, _ in server.seen] == [404, "whole"]


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
        raise prepare_shakespeare.requests.ConnectionError
    monkeypatch.setattr("requests.get", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    one_sentence(run("prepare_shakespeare.py"), 1, "could not be downloaded", "--source=FILE")
