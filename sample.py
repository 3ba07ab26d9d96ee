"""Writes text with a model that train.py has trained.

    python sample.py --start="To be, or not to be"
    python sample.py --out_dir=out/shakespeare_cpu --start=FILE:prompt.txt --num_samples=4
"""

import sys
from pathlib import Path

import torch

from config import configure, stop, stop_on_error
from model import decode_generated, encode_prompt, load_checkpoint, pick_device

# Model
out_dir = ""             # folder of a run; empty: that of the newest best.pt under out/
checkpoint = "best.pt"   # which file of it: best.pt, last.pt, step_1000.pt
device = "auto"          # auto, cpu, cuda, cuda:1, mps
# Text
start = ""               # what to continue, or FILE:prompt.txt; empty: as the run's own samples do
num_samples = 1          # drawn side by side, as one batch
max_new_tokens = 500     # at most: the end of a text ends a sample, too
temperature = 0.8        # 0: always the likeliest token; 1: as the model learned it; above: wilder
top_k = 0                # draw among this many likeliest tokens; 0: among all
seed = 1337              # the same seed and settings write the same text
settings = configure(globals())


def main():
    for name in ("temperature", "top_k", "max_new_tokens", "seed"):
        if settings[name] < 0:
            stop(f"--{name} must not be negative, not {settings[name]}", 2)
    if num_samples < 1:
        stop(f"--num_samples must be at least 1, not {num_samples}", 2)
    with stop_on_error(2):
        target = pick_device(device)
    path = Path(out_dir or newest_run()) / checkpoint
    with stop_on_error():
        saved = load_checkpoint(path, target)
    model, tokenizer = saved["model"], saved["tokenizer"]
    with stop_on_error(2):
        begin = start or saved.get("settings", {}).get("start", "")
        idx = encode_prompt(tokenizer, begin).to(target)
    print(f"{path}:", file=sys.stderr)

    generator = torch.Generator(target).manual_seed(seed)
    out = model.generate(idx.repeat(num_samples, 1), max_new_tokens, temperature, top_k, generator,
                         tokenizer.eot)
    for number, ids in enumerate(out.tolist()):
        print("" if number == 0 else "\n----\n", decode_generated(tokenizer, ids), sep="")


def newest_run():
    """The folder of the best.pt written last."""
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        stop("no best.pt under out/ yet, train a model first or give its --out_dir")
    return found[-1].parent


if __name__ == "__main__":
    main()
