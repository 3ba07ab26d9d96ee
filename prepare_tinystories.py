"""Makes data/tinystories_char (or _byte, _gpt2, _bpe) from TinyStories or any file of stories.

    python prepare_tinystories.py                                # all of TinyStories, 1.9 GB
    python prepare_tinystories.py --max_stories=50000            # downloads no more than that
    python prepare_tinystories.py --source=stories.txt --tokenizer=bpe
    python prepare_tinystories.py --source=grammar               # synthetic stories, no download

A story ends at <|endoftext|> or with its file. TinyStories: R. Eldan, Y. Li, arXiv:2305.07759.
"""

import hashlib
import json
import math
import os
import random
import shlex
import shutil
from array import array
from contextlib import suppress
from functools import partial
from itertools import compress
from pathlib import Path
from string import Formatter

import numpy as np

from config import at_least, config_file, configure, dataset_name, require, stop_on_error
from model import EOT, CharTokenizer, atomic_write, download, plain, sha256_of, show_progress
from prepare_shakespeare import (check_splits, check_tokenizer, content_of, is_complete,
                                 known_tokenizer, learn_tokenizer, write_dataset)

# Stories
source = "tinystories"   # tinystories, tinystories_v2, grammar, a file or folder: .txt, .jsonl
max_stories = 0          # take the first so many; 0: all, of grammar 20,000
fraction = 1.0           # share of these that is used, chosen at random
# Splits, by whole stories
val_fraction = 0.1       # of the stories used, chosen at random
test_fraction = 0.0
val_source = ""          # official: the dataset's validation file; a FILE; empty: val_fraction
seed = 1337              # of every random choice
# Tokenizer
tokenizer = "char"       # char, byte, gpt2; bpe: learned from the stories; or a checkpoint's
vocab_size = 4096        # of bpe: 256 bytes, end of text, and what is learned
bpe_sample = 50_000_000  # characters, the first of the training stories, that bpe learns from
# Machine
workers = 0              # threads that encode; 0: one for each core, at most 16
chunk_size = 1_000_000   # characters that one of them encodes at a time
hub = "https://huggingface.co"  # or a mirror of it
# Output
dataset = ""             # folder under data/; empty: tinystories_ or grammar_<tokenizer>
settings = configure(globals())

HUB_FILES = {"tinystories": ("TinyStories-train.txt", "TinyStories-valid.txt"),
             "tinystories_v2": ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")}
LONGEST = 16_000_000     # bytes; what is longer is no story

def main():
    check_settings()
    kind = "grammar" if source == "grammar" else "tinystories"
    folder = Path("data", dataset_name(dataset) or f"{kind}_{Path(tokenizer).name}")
    paths, val_paths, nats = [], [], {}
    with stop_on_error():
        if source not in (*HUB_FILES, "grammar"):
            paths = text_files("source", source)
        if val_source not in ("", "official"):
            val_paths = text_files("val_source", val_source)
        made_by = {name: value for name, value in settings.items()
                   if name not in ("workers", "chunk_size", "hub", "dataset")}
        # Of what is not a download; a checkpoint may have been trained anew.
        made_by["sha256"] = sha256_of_all(paths + val_paths, content_of(tokenizer))
        if is_complete(folder, made_by):
            return
        if source in HUB_FILES:
            paths = [from_hub(HUB_FILES[source][0], max_stories)]
        if val_source == "official":
            val_paths = [from_hub(HUB_FILES[source][1])]
        if source == "grammar":
            paths = [Path("data/grammar.txt")]
            nats = write_grammar(paths[0], max_stories or 20_000)
        read = survey(paths, max_stories)
        if source in HUB_FILES:
            read["sha256"] = sha256_of_all(paths + val_paths)

        chosen = assign_splits(read["stories"])  # {split: which of the stories are in it}
        splits = {split: partial(stories_of, paths, which) for split, which in chosen.items()}
        if val_paths:
            count = survey(val_paths)["stories"]
            splits["val"] = partial(stories_of, val_paths, np.ones(count, bool))
        encoder = make_tokenizer(splits)
        require(encoder.eot is not None, f"--tokenizer={tokenizer} cannot end a story, it has no "
                f"{EOT}: give char, byte, gpt2, bpe or a checkpoint that learned stories")
        stories = {split: read_split() for split, read_split in splits.items()}
        threads = workers or min(16, os.cpu_count())
        if source == "grammar":
            nats = {split: nats[which].sum() for split, which in chosen.items()}
        write_dataset(folder, stories, encoder, EOT, threads, chunk_size, nats, made_by=made_by,
                      read=read)
    usual = f"tinystories_{encoder.spec['kind'].replace('byte', 'char')}"
    config = config_file(f"config/{'quickstart' if source == 'grammar' else usual}.py")
    print(f"next: python train.py {config} --dataset={shlex.quote(folder.name)}")

def check_settings():
    at_least(0, settings, "max_stories", "workers", "seed")
    at_least(1, settings, "chunk_size", "bpe_sample")
    check_splits(settings)
    require(0 < fraction <= 1, f"--fraction must be above 0 and at most 1, not {fraction}")
    check_tokenizer(settings)
    require(val_source != "official" or source in HUB_FILES,
            "--val_source=official goes with --source=tinystories or tinystories_v2")
    require(not val_source or source != "grammar",
            "--source=grammar makes its own validation stories, leave --val_source out")

# ---- where stories come from ----

def text_files(name, path):
    """The file at path, or the .txt and .jsonl files in the folder there, in the order of
    their names. What can be read only once, a pipe, is copied to data/ first."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not any(
            part.startswith(".") for part in file.relative_to(path).parts))
        files = [file for file in inside if file.suffix.lower() in (".txt", ".jsonl")]
        print(f"{path}: {len(files)} .txt and .jsonl files, {len(inside) - len(files)} others "
              f"left out")
    else:
        files = [path] * path.exists()
    require(files, f"--{name}={path}: no such file, nor a folder of .txt or .jsonl files")
    if not files[0].is_file():
        Path("data").mkdir(exist_ok=True)
        files = [Path("data", f"piped_{name}.txt")]
        with open(path, "rb") as pipe, atomic_write(files[0]) as copy:
            shutil.copyfileobj(pipe, copy)
    return files

def sha256_of_all(paths, more=""):
    """One hexadecimal digest of the files, or of the grammar where that is the source, and more."""
    digest = hashlib.sha256(repr(GRAMMAR).encode() if source == "grammar" else b"")
    for path in paths:
        digest.update(bytes.fromhex(sha256_of(path)))
    digest.update(bytes.fromhex(more))
    return digest.hexdigest()

def from_hub(name, wanted=0):
    """The path of a file of roneneldan/TinyStories under data/. With wanted > 0 the download
    ends where so many stories have come."""
    path = Path("data") / name
    url = f"{hub}/datasets/roneneldan/TinyStories/resolve/main/{name}"
    limit = 500 * wanted  # too low a guess; what has come tells their mean length
    if not path.exists():
        print(f"downloading {url}")
    while not path.exists():
        part = download((url,), path, "pass stories of your own with --source=FILE, or "
                        "synthetic ones with --source=grammar", limit=limit)
        if part != path:
            have = sum(map(bool, read_stories([part], tail=False)))
            if have >= wanted:
                return part
            limit = int(1.02 * part.stat().st_size * wanted / max(have, 1)) + 10_000
    return path

def read_stories(paths, size=1_000_000, tail=True):
    """Yields the stories of files, stripped and some of them empty, from size bytes at a time.
    With tail, what follows the last EOT is a story, too. Of .jsonl each line's "text" is one.
    Raises OSError or ValueError."""
    for path in paths:
        if path.suffix.lower() == ".jsonl" or begins_with_json(path):
            yield from json_stories(path)
            continue
        with open(path, "rb") as file:
            rest, length = b"", path.stat().st_size
            while block := file.read(size):
                text, mark, rest = (rest + block).rpartition(EOT.encode())
                if len(rest) > LONGEST:
                    raise ValueError(f"{path} has {len(rest):,} bytes without an {EOT}, "
                                     f"write one behind each story, or prepare a long text "
                                     f"with prepare_shakespeare.py")
                if mark:
                    yield from split_stories(text, path, file.tell() - len(rest + mark + text))
                show_progress(f"{path.name}: {file.tell() / 1e6:,.0f} of {length / 1e6:,.0f} MB")
            show_progress("")
            if tail and rest.strip():
                yield from split_stories(rest, path, length - len(rest))

def begins_with_json(path):
    """Whether the first line of a file is JSON with a "text", whatever its name, as of a pipe."""
    with open(path, "rb") as file, suppress(ValueError, RecursionError):
        first = json.loads(file.readline(LONGEST))
        return isinstance(first, dict) and "text" in first
    return False

def json_stories(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = plain(json.loads(line)["text"])
                text.encode()  # half of a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {number}, is no JSON like {{"text": "..."}} in '
                                 f"UTF-8, remove it or write a .txt, {EOT} behind each") from None
            yield from (story.strip() for story in text.removesuffix(EOT).split(EOT))

def split_stories(raw, path, place):
    try:
        text = raw.decode().replace("\r\n", "\n")
        text = text.removeprefix("\ufeff") if place == 0 else text
        return [story.strip() for story in text.split(EOT)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {place + error.start}, convert it first, "
                         f"as iconv does") from None

def survey(paths, most=0):
    """How many stories there are, most at most, how many were empty (these are left out) and
    how many repeat an earlier one (these are kept)."""
    hashes, empty = array("q"), 0  # 8 bytes a story
    for story in read_stories(paths, chunk_size):
        if most and len(hashes) == most:
            break
        if story:
            hashes.append(hash(story))
        else:
            empty += 1
    if not hashes:
        raise ValueError(f"{paths[0]} holds no stories, give another file")
    repeated = len(hashes) - len(np.unique(hashes))
    print(f"{len(hashes):,} stories, {repeated:,} of them repeated; {empty:,} empty left out")
    return {"stories": len(hashes), "empty": empty, "repeated": repeated}

def assign_splits(count):
    """{split: (count,) booleans, which of the stories are in it}, for those with a share."""
    order = np.arange(count, dtype=np.uint32)
    np.random.default_rng(seed).shuffle(order)
    used = round(fraction * count)
    shares = {"val": 0 if val_source else val_fraction, "test": test_fraction}
    sizes = {split: round(share * used) for split, share in shares.items() if share}
    sizes = {"train": used - sum(sizes.values())} | sizes
    chosen, first = {}, 0
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(f"{count:,} stories are too few for a {split} split: write {EOT} "
                             f"behind each, or prepare a long text with prepare_shakespeare.py")
        chosen[split] = np.zeros(count, bool)
        chosen[split][order[first:first + size]] = True
        first += size
    return chosen

def stories_of(paths, wanted):
    """The stories, none empty, for which wanted, an array of booleans, is true."""
    return compress(filter(None, read_stories(paths, chunk_size)), wanted)

# ---- tokenizers that learn from the stories ----

def make_tokenizer(splits):
    """The tokenizer of the settings, given {split: function that reads its stories}."""
    if tokenizer == "char":
        return CharTokenizer("".join(sorted({"\3"} | characters_of(splits))))
    if tokenizer == "bpe":
        return learn_tokenizer(splits["train"](), vocab_size, bpe_sample)
    return known_tokenizer(tokenizer)

def characters_of(splits):
    """The set of characters in all splits. Only what is not ASCII, or new, costs time."""
    characters, seen = set(), b""
    for read_split in splits.values():
        for story in read_split():
            if new := story.encode().translate(None, seen):
                characters |= set(new.decode())
                seen = "".join(filter(str.isascii, characters)).encode()
    if "\3" in characters:
        raise ValueError("the stories hold U+0003, which char keeps for end of text, remove it "
                         "or use --tokenizer=byte")
    return characters

# ---- synthetic stories whose entropy is known ----

# {rule: its options, all equally likely}. {:rule} writes an option of that rule, {name:rule}
# also remembers it, {name} repeats it; he, him and his follow the hero. No option of a rule
# begins with another one, up to the first choice inside it, so a story can have been written in
# one way only and its probability is the product of its choices'.
GRAMMAR = {rule: options.split("|") for rule, options in {
    "story": "{:opening}{:hero}{He} was {:trait} and loved to {hobby:hobby}.\nOne {:weather} "
        "{:time}, {name} took {his} {colour:colour} {thing:thing} to the {place:place}. "
        "{:sight}\n{:problem}\n{:thanks}{:evening}{:lesson}",

    "opening": "Once upon a time, there lived |Long ago, there lived |In a small village, "
        "there lived |Far away, by the sea, there lived |At the edge of a forest, there "
        "lived |High on a green hill, there lived |Beside a wide river, there lived |Not so "
        "long ago, there lived ",
    "hero": "a girl named {name:girl}. |a boy named {name:boy}. |a little {:animal} named "
        "{name:pet}. ",
    "girl": "Lily|Mia|Anna|Sue|Rosie|Ella|Nora|Zoe|Ruby|Ivy|Clara|Jane",
    "boy": "Tom|Ben|Max|Sam|Leo|Jack|Finn|Oscar|Noah|Hugo|Pete|Will",
    "pet": "Pip|Coco|Bramble|Dot|Moss|Hazel|Nutmeg|Biscuit|Fern|Toffee|Button|Acorn",
    "animal": "fox|rabbit|bear|duck|mouse|frog|hedgehog|squirrel|kitten|puppy|goose|lamb",
    "trait": "kind|brave|shy|curious|clever|cheerful|quiet|gentle|funny|careful|proud|busy",
    "hobby": "sing|climb|paint|dance|explore|build towers|tell jokes|bake|collect shells|"
        "look at the stars|listen to music|jump in puddles",
    "weather": "sunny|windy|rainy|cold|warm|cloudy|foggy|bright|quiet|frosty",
    "time": "morning|afternoon|day|evening",
    "colour": "red|blue|green|yellow|purple|silver|golden|pink|white|brown",
    "thing": "ball|kite|hat|boat|drum|cup|doll|bell|lamp|scarf|wagon|flute|mirror|ring",
    "place": "park|forest|beach|market|river|farm|hill|bridge|garden|meadow|lake|castle",

    "sight": "At the {place} {he} saw {:number} {:creatures} {:doing}.|"
        "The {colour} {thing} looked {:look} at the {place}.|"
        "On the way {he} met {:somebody}, who {:greeting}.|"
        "It smelled of {:smell}, and {name} {:joy}.",
    "number": "two|three|four|five|six|seven",
    "creatures": "birds|butterflies|snails|bees|lizards|crabs",
    "doing": "playing|resting|hiding|sleeping|in a row|under a leaf",
    "look": "lovely|small|strange|new|perfect|wonderful",
    "somebody": "a postman|two sisters|the king|an uncle|a singer|a knight",
    "greeting": "waved|smiled|said hello|was in a hurry|told a joke|bowed",
    "smell": "flowers|bread|rain|apples|honey|smoke",
    "joy": "laughed|danced about|felt happy|took a deep breath|began to hum",

    "problem": "Then the {colour} {thing} was gone! {name} looked {:near} and {:far} but "
        'could not find it. {:helper}"I saw it {:spot}," said the {helper}. And there it '
        "was.|"
        "But the {colour} {thing} got stuck {:stuck}. {name} tried to {:try}, and it did not "
        "help. {:helper}The {helper} {:reach} and got the {thing} down.|"
        "Oh no! {name} tripped over {:obstacle} and the {thing} broke. {He} {:cry}. "
        "{:helper}The {helper} mended the {colour} {thing} with {:tool}.|"
        "Soon it grew dark, and {name} did not know the way home. {He} heard {:noise} and "
        "{:fear}. {:helper}The {helper} {:guide} until they saw {:landmark}.|"
        "After a while {he} was hungry, but {he} had only {:snack}. {:helper}The {helper} "
        "had {:food}, and {name} gave the {helper} a turn with the {colour} {thing}.|"
        "Suddenly {:storm}. {name} hid {:shelter} and held the {thing} tight. "
        '{:helper}"{:comfort}," said the {helper}, and soon it was over.|'
        "A {:mood} child sat there alone and {:wish}. {name} thought of the {thing}. "
        '{:helper}"Give and you will be {:reward}," said the {helper}. So {he} gave it away.',
    "helper": "An old {helper:job} came along. |Just then a {helper:job} came by. |Luckily, "
        "a {helper:job} heard {him}. ",
    "job": "turtle|crow|goat|dog|horse|cat|farmer|baker|sailor|gardener|hunter|miller",
    "near": "under the bench|behind a bush|in the grass|beside the path",
    "far": "up the road|down by the well|at the gate|near the wall",
    "spot": "in the pond|on the roof|inside a hollow log|under your feet|by the fence",
    "stuck": "in a tall tree|on the roof|between two rocks|over a door|at the top",
    "try": "climb up|shake it|throw a stone|push with a stick|blow very hard",
    "reach": "fetched a ladder|jumped high|used a long rope|called a friend",
    "obstacle": "a root|the step|a loose brick|some stones|an empty box",
    "cry": "cried|sat down and sighed|did not know what to do|felt very sorry",
    "tool": "glue|a piece of string|two nails|some tape|needle and thread",
    "noise": "an owl|the wind|footsteps|a howl|something in the leaves",
    "fear": "shivered|wanted to cry|held the {thing} tight|stood very still",
    "guide": "lit a lantern|led the way|walked ahead|took {his} hand",
    "landmark": "the village|the old mill|a lit window|the church",
    "snack": "a dry crust|one nut|some water|half a carrot",
    "food": "warm soup|a big cake|berries|cheese and bread|plenty of plums",
    "storm": "it began to rain|thunder rolled|a cold wind blew|snow fell",
    "shelter": "in a cave|under a cart|below the stairs|behind a wall",
    "comfort": "Do not be afraid|Stay close to me|Clouds always pass|Let us sing",
    "mood": "sad|lonely|poor|tired",
    "wish": "wished for a friend|had nothing to play with|looked at the ground",
    "reward": "happy rich in friends|loved|glad|proud of it",

    "thanks": "Gladly {name} thanked the {helper} {:thankful}. |"
        '"Thank you, {:praise} {helper}!" said {name}. |'
        "The {helper} only smiled. ",
    "thankful": "with a hug|again and again|and bowed|politely",
    "praise": "dear|good|kind|clever",
    "evening": "That night {name} {:night}. |"
        "At home {he} {:home}. |"
        "In the evening {he} wanted to {hobby}, and so {he} did. ",
    "night": "slept very well|dreamed of the {place}|told the moon about it|was too happy to "
        "sleep",
    "home": "ate a big supper|told everything|put the {colour} things away|fell asleep at "
        "once",
    "lesson": "And {name} never went to the {place} alone again.|"
        "From that day on, {he} {:habit}.|"
        "The {helper} and {name} stayed friends for ever.",
    "habit": "was always careful|helped everyone|shared everything|was never afraid|looked "
        "twice",
}.items()}
HEROES = {"girl": "she her her", "boy": "he him his", "pet": "it it its"}

def write_story(rng, grammar=GRAMMAR, rule="story", said=None):
    """(text, nats): what rule writes, and -ln of the probability of the choices made."""
    said = {} if said is None else said
    options = grammar[rule]
    text, nats = "", math.log(len(options))
    for literal, name, choice, _ in Formatter().parse(rng.choice(options)):
        text += literal
        if choice:
            said[name], more = write_story(rng, grammar, choice, said)
            nats += more
            if choice in HEROES:
                he, him, his = HEROES[choice].split()
                said |= {"he": he, "He": he.capitalize(), "him": him, "his": his}
        if name is not None:
            text += said[name]
    return text, nats

def write_grammar(path, count):
    """Writes count stories to path; returns the nats of each, (count,)."""
    rng = random.Random(seed)
    nats = np.empty(count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        for i in range(count):
            text, nats[i] = write_story(rng)
            file.write(f"{text}\n{EOT}\n".encode())
    return nats

if __name__ == "__main__":
    main()
