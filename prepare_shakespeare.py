"""Makes data/shakespeare_char (or _byte, _gpt2) from Tiny Shakespeare or from any UTF-8 text.

    python prepare_shakespeare.py
    python prepare_shakespeare.py --tokenizer=gpt2
    python prepare_shakespeare.py --source=novel.txt --dataset=novel
"""

import json
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import config_file, configure, stop, stop_on_error
from model import (CharTokenizer, atomic_write, download, read_text, sha256_of, token_dtype,
                   tokenizer_from)

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
            download(URLS, path, "pass a copy with --source=FILE", SHA256)
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
        write_dataset(folder, {name: [[part]] for name, part in splits.items()}, made, made_by)
    config = config_file("config/shakespeare_cpu.py")
    print(f"next: python train.py {config} --dataset={folder.name}")


def is_complete(folder, made_by):
    """Whether folder holds a dataset made with just these settings."""
    try:
        return json.loads((folder / "meta.json").read_text())["made_by"] == made_by
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_dataset(folder, splits, tokenizer, made_by, end="", workers=1, nats=None, **read):
    """Writes split.bin (flat token ids) for {split: iterable of lists of documents}, end before the
    first document and after each, then meta.json: what made them, what was read, the tokenizer, and
    the counts of each split, with its entropy where nats, {split: total}, is known. A list is
    encoded by one of several threads. Without meta.json nothing counts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    local = threading.local()

    def encode(documents):
        if not hasattr(local, "tokenizer"):  # tiktoken's threads would wait for one another
            local.tokenizer = tokenizer_from(tokenizer.spec)
        text = "".join(document + end for document in documents)
        ids = local.tokenizer.encode(text).astype(dtype, copy=False)
        marks = len(documents) * len(end)
        return ids, {"tokens": len(ids), "documents": len(documents),
                     "characters": len(text) - marks, "bytes": len(text.encode()) - marks}

    meta = {"made_by": made_by, "read": read, "tokenizer": tokenizer.spec, "dtype": dtype.name,
            "splits": {}}
    for split, batches in splits.items():
        counts = {"tokens": 0, "documents": 0, "characters": 0, "bytes": 0}
        with atomic_write(folder / f"{split}.bin") as file:
            first = tokenizer.encode(end).astype(dtype)
            file.write(first.tobytes())
            counts["tokens"] += len(first)
            for ids, more in map_in_order(encode, batches, workers):
                file.write(ids.tobytes())
                counts = {name: count + more[name] for name, count in counts.items()}
        if nats:  # all but the first token are predicted
            counts["nats_per_token"] = nats[split] / (counts["tokens"] - 1)
            counts["nats_per_character"] = nats[split] / counts["characters"]
        meta["splits"][split] = {"file": f"{split}.bin"} | counts
        print(f"{folder}/{split}.bin: {counts['tokens']:,} tokens, "
              f"{counts['documents']:,} documents, {counts['characters']:,} characters")
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    print(f"{folder}/meta.json: vocabulary of {tokenizer.vocab_size:,}")


def map_in_order(function, items, workers):
    """map(function, items) on threads, of which none gets far ahead of the result that is due."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


if __name__ == "__main__":
    main()
