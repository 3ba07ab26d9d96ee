"""Makes data/shakespeare_char (or _byte, _gpt2) from Tiny Shakespeare or from any UTF-8 text.

    python prepare_shakespeare.py
    python prepare_shakespeare.py --tokenizer=gpt2
    python prepare_shakespeare.py --source=novel.txt --dataset=novel
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import requests

from config import configure, stop, stop_on_error
from model import CharTokenizer, atomic_write, read_text, token_dtype, tokenizer_from

# Text
source = ""           # a UTF-8 text file; empty: Tiny Shakespeare (1.1 MB), fetched to data/
tokenizer = "char"    # char, byte or gpt2
val_fraction = 0.1    # of the characters, taken from the end
test_fraction = 0.0   # of the characters, taken after those of val
# Output
dataset = ""          # folder under data/; empty: shakespeare_<tokenizer>
settings = configure(globals())

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/ng-video-lecture/master/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)


def main():
    if tokenizer not in ("char", "byte", "gpt2"):
        stop(f"--tokenizer must be char, byte or gpt2, not {tokenizer!r}", 2)
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= settings[name] < 1:
            stop(f"--{name} must be from 0 to below 1, not {settings[name]}", 2)
    if val_fraction + test_fraction >= 1:
        stop("--val_fraction and --test_fraction must leave something to train on", 2)
    if Path(dataset).name != dataset:
        stop(f"--dataset must be the plain name of a folder under data/, not {dataset!r}", 2)
    folder = Path("data") / (dataset or f"shakespeare_{tokenizer}")

    path = Path(source or "data/tinyshakespeare.txt")
    if not source and sha256_of(path) != SHA256:
        with stop_on_error():
            download(URLS, path, SHA256, remedy="pass a copy with --source=FILE")
    made_by = {"source": source or URLS[0], "sha256": sha256_of(path), "tokenizer": tokenizer,
               "val_fraction": val_fraction, "test_fraction": test_fraction}
    if is_complete(folder, made_by):
        print(f"{folder} is there already, made from the same text with the same settings")
        return

    with stop_on_error():
        text = read_text(path)
    if not text:
        stop(f"{path} is empty, give it some text")
    # One cut for each split, as nanoGPT makes them: train is text[:int(0.9 * len(text))].
    shares = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    cuts = [0, int(len(text) * shares["train"]), int(len(text) * (1 - test_fraction)), len(text)]
    splits = {name: text[a:b] for name, a, b in zip(shares, cuts, cuts[1:]) if shares[name]}
    for name, part in splits.items():
        if not part:
            stop(f"{path}: {len(text)} characters are too few for a {name} split")
    with stop_on_error():
        made = (CharTokenizer("".join(sorted(set(text)))) if tokenizer == "char"
                else tokenizer_from({"kind": tokenizer}))
        write_dataset(folder, {name: [part] for name, part in splits.items()}, made, made_by)
    print(f"next: python train.py config/shakespeare_cpu.py --dataset={folder.name}")


def sha256_of(path):
    """Hexadecimal digest of a file, "" where there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(urls, path, sha256, remedy, tries=4, wait=1.0, timeout=20):
    """Fetches the file with this sha256 from the first of urls that serves it, to path. A broken
    transfer goes on where it stopped, under path.part; failed rounds are tried again after wait,
    2 * wait, ... seconds. Raises OSError with what each url answered, and the remedy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    answers = {}
    for attempt in range(tries):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        for url in urls:
            try:
                fetch(url, part, timeout)
            except requests.RequestException as error:
                failed = error.response is None
                answers[url] = type(error).__name__ if failed else error.response.status_code
                continue
            if sha256_of(part) == sha256:
                os.replace(part, path)
                return
            answers[url] = "a file with another sha256"
            part.unlink()
    raise OSError(f"{path.name} could not be downloaded ("
                  + "; ".join(f"{url}: {answer}" for url, answer in answers.items())
                  + f"), try again or {remedy}")


def fetch(url, part, timeout):
    """Appends to part what it still lacks of url; a server that cannot resume sends the whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if have and answer.status_code == 416:  # nothing lies beyond what we have
            return
        answer.raise_for_status()
        resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        total = int(answer.headers.get("Content-Length", 0)) + have * resumed
        with open(part, "ab" if resumed else "wb") as file:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                if sys.stderr.isatty():
                    print(f"\r{part.stem}: {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB",
                          end="\n" if file.tell() == total else "", file=sys.stderr)


def is_complete(folder, made_by):
    """Whether folder holds a dataset made with just these settings."""
    try:
        return json.loads((folder / "meta.json").read_text())["made_by"] == made_by
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_dataset(folder, splits, tokenizer, made_by):
    """Writes split.bin (flat token ids) for {split: iterable of documents}, then meta.json: what
    made them, the tokenizer, and the counts of each split. Without meta.json nothing counts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    meta = {"made_by": made_by, "tokenizer": tokenizer.spec, "dtype": dtype.name, "splits": {}}
    for split, documents in splits.items():
        counts = {"file": f"{split}.bin", "tokens": 0, "documents": 0, "characters": 0, "bytes": 0}
        with atomic_write(folder / counts["file"]) as file:
            for text in documents:
                ids = tokenizer.encode(text)
                file.write(ids.astype(dtype).tobytes())
                counts["tokens"] += len(ids)
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode("utf-8"))
        meta["splits"][split] = counts
        print(f"{folder}/{split}.bin: {counts['tokens']:,} tokens, "
              f"{counts['characters']:,} characters")
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    print(f"{folder}/meta.json: vocabulary of {tokenizer.vocab_size:,}")


if __name__ == "__main__":
    main()
