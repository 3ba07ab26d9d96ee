"""Makes data/shakespeare_char (or _byte, _gpt2, _bpe) from Tiny Shakespeare or any UTF-8 text.

    python prepare_shakespeare.py
    python prepare_shakespeare.py --tokenizer=gpt2
    python prepare_shakespeare.py --source=novel.txt --dataset=novel
"""

import hashlib
import heapq
import json
import shlex
import threading
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken: re with the properties of Unicode

from config import config_file, configure, dataset_name, one_of, require, stop_on_error
from model import (PIECES, CharTokenizer, atomic_write, download, load_checkpoint, read_text,
                   sha256_of, show_progress, tokenizer_from)

# Text
source = ""           # a UTF-8 text file; empty: Tiny Shakespeare (1.1 MB), fetched to data/
tokenizer = "char"    # char, byte, gpt2; bpe: learned from the training text; or a checkpoint's
vocab_size = 4096     # of bpe: 256 bytes, end of text, and what is learned
val_fraction = 0.1    # of the characters, taken after those of train
test_fraction = 0.0   # of the characters, taken from the end
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
    check_splits(settings)
    check_tokenizer(settings)
    folder = Path("data", dataset_name(dataset) or f"shakespeare_{Path(tokenizer).name}")
    path = Path(source or "data/tinyshakespeare.txt")
    require(not path.is_dir(), f"{path} is a folder: give a file, or prepare_tinystories.py, which "
            f"takes folders of stories")
    with stop_on_error():
        if not source and sha256_of(path) != SHA256:
            download(URLS, path, "pass a copy with --source=FILE", SHA256)
        text = read_text(path)  # once: it may be a pipe
        made_by = {"source": source or URLS[0], "tokenizer": tokenizer + content_of(tokenizer),
                   "sha256": hashlib.sha256(text.encode()).hexdigest(),
                   "val_fraction": val_fraction, "test_fraction": test_fraction}
        if tokenizer == "bpe":
            made_by["vocab_size"] = vocab_size
        if is_complete(folder, made_by):
            return
        # One cut for each split, as nanoGPT makes them: train is text[:int(0.9 * len(text))].
        shares = {"train": 1 - val_fraction - test_fraction, "val": val_fraction,
                  "test": test_fraction}
        cuts = [int(len(text) * share) for share in (0, shares["train"], 1 - test_fraction, 1)]
        splits = {name: [text[a:b]] for name, a, b in zip(shares, cuts, cuts[1:]) if shares[name]}
        for name in splits:
            require(splits[name] != [""],
                    f"{path}: {len(text)} characters are too few for a {name} split", 1)
        if tokenizer == "char":
            encoder = CharTokenizer("".join(sorted(set(text))))
        elif tokenizer == "bpe":
            encoder = learn_tokenizer(splits["train"], vocab_size)
        else:
            encoder = known_tokenizer(tokenizer)
        write_dataset(folder, splits, encoder, made_by=made_by)
    config = config_file(f"config/shakespeare_{'gpt2' if tokenizer == 'gpt2' else 'cpu'}.py")
    print(f"next: python train.py {config} --dataset={shlex.quote(folder.name)}")

def check_splits(settings):
    """Stops where the settings leave nothing to train on, or name a folder elsewhere."""
    val, test = settings["val_fraction"], settings["test_fraction"]
    require(val >= 0 and test >= 0 and val + test < 1,
            "--val_fraction and --test_fraction must be 0 or above and leave some to train on")
    name = dataset_name(settings["dataset"])
    require(Path(name).name == name != "..",
            "--dataset must be the plain name of a folder under data/")

KINDS = "char", "byte", "gpt2", "bpe"

def check_tokenizer(settings):
    if not Path(settings["tokenizer"]).exists():
        one_of(settings, "tokenizer", *KINDS, "a checkpoint or GPT-2 folder")
    require(settings["tokenizer"] != "bpe" or 257 <= settings["vocab_size"] <= 2 ** 16,
            f"--vocab_size must be from 257 to 65536, not {settings['vocab_size']}")

def content_of(tokenizer):
    """A digest of the checkpoint or folder that the setting names, which may change; or ""."""
    return "" if tokenizer in KINDS else sha256_of(Path(tokenizer))

def known_tokenizer(name):
    """The tokenizer of a kind that learns nothing, or of a checkpoint, ours or another GPT-2's."""
    if name in ("byte", "gpt2"):
        return tokenizer_from({"kind": name})
    return load_checkpoint(name)["tokenizer"]

def is_complete(folder, made_by):
    """Whether folder holds a dataset made with just these settings; says what it holds."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        size = np.dtype(meta["dtype"]).itemsize
        complete = meta["made_by"] == made_by and all(
            (folder / f"{split}.bin").stat().st_size == size * counts["tokens"]
            for split, counts in meta["splits"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    same = "is there already, made from the same text with the same settings"
    print(folder, same if complete else "holds another text or other settings, to be replaced")
    return complete

def write_dataset(folder, splits, tokenizer, end="", workers=1, chunk_size=1_000_000, nats={},
                  **more):
    """Writes split.bin, flat token ids, for {split: iterable of texts}, with end before the
    first text and after each; last meta.json, with more: it marks them whole. Threads encode
    about chunk_size characters at a time. nats: {split: -ln p of all its texts}, where known."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32)
    local = threading.local()

    def encode(texts):
        if not hasattr(local, "tokenizer"):  # tiktoken's threads would wait for one another
            local.tokenizer = tokenizer_from(tokenizer.spec)
        text = "".join(text + end for text in texts)
        ids = local.tokenizer.encode(text).astype(dtype)
        ends = len(texts) * len(end)
        return ids, (len(ids), len(texts), len(text) - ends, len(text.encode()) - ends)

    meta = {"tokenizer": tokenizer.spec, "dtype": dtype.name, "splits": {}} | more
    with ExitStack() as files:  # which replace the old ones together, at its end
        for split, texts in splits.items():
            first = tokenizer.encode(end).astype(dtype)
            totals = np.array((len(first), 0, 0, 0))
            file = files.enter_context(atomic_write(folder / f"{split}.bin"))
            file.write(first.tobytes())
            for ids, counts in map_in_order(encode, chunks(texts, chunk_size), workers):
                file.write(ids.tobytes())
                totals += counts
            file.flush()
            counts = dict(zip(("tokens", "documents", "characters", "bytes"), totals.tolist()))
            if split in nats:
                counts["nats_per_token"] = nats[split] / (counts["tokens"] - 1)  # first: no target
                counts["nats_per_character"] = nats[split] / counts["characters"]
            meta["splits"][split] = {"file": f"{split}.bin"} | counts
            print(f"{folder}/{split}.bin: {counts['tokens']:,} tokens, "
                  f"{counts['documents']:,} documents, {counts['characters']:,} characters")
        (folder / "meta.json").unlink(missing_ok=True)  # from here on the old is not whole
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    print(f"{folder}/meta.json: vocabulary of {tokenizer.vocab_size:,}")

def chunks(texts, size):
    """Lists of texts that have about size characters together."""
    chunk, length = [], 0
    for text in texts:
        chunk.append(text)
        length += len(text)
        if length >= size:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk

def map_in_order(function, items, workers):
    """map(function, items) on threads, none of which gets far ahead of the result due."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

# ---- byte pairs learned from a text ----

def learn_tokenizer(texts, vocab_size, most=50_000_000):
    """A BPETokenizer learned from the first `most` characters of the texts."""
    counts = Counter()  # {piece: how often it occurs}
    for text in texts:
        counts.update(regex.findall(PIECES, text[:most]))
        most -= len(text)
        if most <= 0:
            break
    tokens = [token.decode("latin-1") for token in learn_bpe(counts, vocab_size - 257)]
    return tokenizer_from({"kind": "bpe", "tokens": tokens})

def learn_bpe(counts, merges):
    """Tokens in the order learned: starting from bytes, the two neighbours that meet most
    often in {piece: count} become one token, up to merges times (Sennrich et al. 2016). Ties
    go to the smallest bytes. learn_bpe({"banana": 1, "ban": 2}, 2) is [b"an", b"ban"]."""
    # For each byte of all pieces: the token that begins there, how often its piece occurs, and
    # where the token before it and the one after it begin; -1: there is none.
    tokens_at, times, before, after = [], array("i"), array("i"), array("i")
    for piece, count in counts.items():
        raw, first = piece.encode(), len(times)
        tokens_at += [bytes([byte]) for byte in raw]
        times.extend([count] * len(raw))
        before.extend([-1, *range(first, first + len(raw) - 1)])
        after.extend([*range(first + 1, first + len(raw)), -1])

    met = Counter()  # {token that two neighbours would make: how often they meet}
    where = defaultdict(partial(array, "i"))  # {that token: where the first of the two begins}
    changed = set()  # those whose count has changed

    def count_pair(i, sign):
        if i >= 0 and after[i] >= 0:
            token = tokens_at[i] + tokens_at[after[i]]
            met[token] += sign * times[i]
            changed.add(token)
            if sign > 0:
                where[token].append(i)

    for i in range(len(times)):
        count_pair(i, 1)
    heap, learned = [], []
    while len(learned) < merges:
        for token in changed:
            heapq.heappush(heap, (-met[token], token))
        changed.clear()
        while heap and -heap[0][0] != met[heap[0][1]]:
            heapq.heappop(heap)  # its count has changed since, and it was pushed again
        if not heap or -heap[0][0] < 2:
            break  # what was met once is no pattern
        token = heapq.heappop(heap)[1]
        learned.append(token)
        show_progress(f"learning tokens: {len(learned):,} of {merges:,}")
        for i in sorted(where.pop(token)):
            j = after[i]
            if j < 0 or tokens_at[i] + tokens_at[j] != token:
                continue  # one of the two belongs to another token by now
            for k in (before[i], i, j):
                count_pair(k, -1)
            tokens_at[i], after[i], after[j] = token, after[j], -1
            if after[i] >= 0:
                before[after[i]] = i
            for k in (before[i], i):
                count_pair(k, 1)
        changed.discard(token)
    show_progress("")
    return learned

if __name__ == "__main__":
    main()
