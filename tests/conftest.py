"""Fixtures: every test works in a folder of its own, and scripts run as `python script ...` would,
but inside this process, which saves importing torch again each time."""

import inspect
import os
import runpy
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)  # models this small are faster so, and much faster on a busy machine

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from config import SIGNALS  # noqa: E402
from model import GPT, BPETokenizer, GPTConfig  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: many repetitions of what is random, run by -m slow")
    config.addinivalue_line("markers", "gpu: what needs a CUDA GPU")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if "slow" not in item.keywords]


VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die.\n"


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train.py", "--max_iters=3") -> its exit status and what it printed."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # scripts set these, tests restore
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except (OSError, RuntimeError) as error:  # as Python itself would
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        finally:
            torch.compiler.set_stance("default")
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(status, *capsys.readouterr())
    return run


@pytest.fixture
def verse(run):
    """A small character dataset, data/verse: 3,999 characters to train on and 445 of val."""
    Path("verse.txt").write_text((VERSE * 60)[:4444])
    assert run("prepare_shakespeare.py", "--source=verse.txt", "--dataset=verse").status == 0


@pytest.fixture
def gpt2():
    try:
        return BPETokenizer({"kind": "gpt2"})
    except OSError:
        pytest.skip("GPT-2's tokenizer is not at hand and cannot be downloaded")


@pytest.fixture
def transformers_twins():
    """(ours, theirs): a GPT and transformers' GPT2LMHeadModel with the same random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=65, n_positions=16, n_embd=32, n_layer=3, n_head=4)).eval()
    ours = GPT(GPTConfig(16, 65, 3, 4, 32)).eval()
    weights = {name.removeprefix("transformer."): w for name, w in theirs.state_dict().items()}
    transposed = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    ours.load_state_dict({name: w.T if name.endswith(transposed) else w
                          for name, w in weights.items() if not name.endswith(".attn.bias")})
    return ours, theirs


TINY = ("--dataset=verse --out_dir=out/tiny --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 "
        "--batch_size=4 --max_iters=6 --warmup_iters=2 --eval_interval=3 --eval_iters=2 "
        "--log_interval=1 --device=cpu --dtype=float32 --plot=False --overwrite=True").split()


@pytest.fixture
def train(run, verse):
    """train("--seed=2") -> a few steps of a tiny model on data/verse, into out/tiny."""
    return lambda *arguments: run("train.py", *TINY, *arguments)


class Replayed:
    """Stands in for model.CudaGraph where there is no GPU: what it records it calls."""
    def __init__(self, function, *inputs):
        self.function, self.inputs, self.calls = function, [x.clone() for x in inputs], 0
        for _ in range(4):
            function(*self.inputs)
        self.model = inspect.getclosurevars(function).nonlocals.get("raw")
        self.gradients = self.places()

    def places(self):
        """Of the gradients of a model that is trained."""
        return self.model and [id(p.grad) for p in self.model.parameters() if p.grad is not None]

    def __call__(self, *inputs):
        assert self.places() == self.gradients, "a replay would write to other memory"
        self.calls += 1
        for mine, new in zip(self.inputs, inputs):
            mine.copy_(new) if torch.is_tensor(new) else mine.fill_(new)
        output = self.function(*self.inputs)
        self.gradients = self.places()
        return output


@pytest.fixture
def serve():
    """serve(body, answer, answer, ...) -> a url whose requests are answered in turn, the last for
    ever. An answer is a status, or "whole", "cut" (half of what it promised), "wrong", "no ranges",
    "stall" (half, then nothing for a second).
    With sha256 it first redirects, and states that hash, as the Hugging Face Hub does.
    serve.seen lists the (answer, Range) of each request."""
    servers = []

    def start(body, *answers, sha256=""):
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if sha256 and not self.path.startswith("/blob"):
                    return self.reply(302, b"", {"Location": "/blob", "X-Linked-Etag":
                                                 f'"{sha256}"'})
                answer = left.pop(0) if len(left) > 1 else left[0]
                span = self.headers.get("Range")
                start.seen.append((answer, span))
                first, _, last = (span or "bytes=0-")[6:].partition("-")
                first, end = int(first), min(len(body), int(last or len(body)) + 1)
                if isinstance(answer, int):
                    return self.reply(answer, b"", {})
                if first >= len(body):
                    return self.reply(416, b"", {})
                whole = b"?" * len(body) if answer == "wrong" else body
                if span and answer != "no ranges":
                    spans = {"Content-Range": f"bytes {first}-{end - 1}/{len(body)}"}
                    return self.reply(206, whole[first:end], spans, answer in ("cut", "stall"))
                self.reply(200, whole, {}, answer in ("cut", "stall"))
                time.sleep(answer == "stall")

            def reply(self, status, data, headers, cut=False):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) // 2] if cut else data)

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


@pytest.fixture
def tiny_shakespeare():
    """The real text, where it is at hand."""
    for path in (REPO / "data/tinyshakespeare.txt", REPO / "../shared/data/tinyshakespeare.txt"):
        if path.is_file():
            return os.path.realpath(path)
    pytest.skip("python prepare_shakespeare.py downloads the text")


def one_sentence(result, status, *words):
    """A refusal: one line on stderr with these words in it, this status, no traceback."""
    assert result.status == status, result
    assert result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
    for word in words:
        assert word in result.err, result.err
