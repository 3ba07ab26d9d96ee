"""What only a CUDA GPU can show; skipped where there is none. pytest -m gpu runs nothing else."""

import pytest
import torch
from conftest import one_sentence
from test_train import same, weights

from model import GPT, GPTConfig, KVCache, next_logits, stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="needs a CUDA GPU")]
GPU = ("--device=cuda", "--dropout=0.1", "--max_iters=12", "--log_interval=4")


def relative(a, b):
    return ((a.double().cpu() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype, compiled, most", [
    ("float32", False, 1e-5), ("bfloat16", False, 2e-2), ("bfloat16", True, 2e-2),
    ("float16", False, 3e-3), ("float16", True, 2e-2)])
def test_logits_and_gradients_are_those_of_float64(dtype, compiled, most):
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=97, n_layer=2, n_head=2, n_embd=64)
    exact = GPT(GPTConfig(**shape, fused=False)).double()
    x, y = torch.randint(97, (2, 4, 64))
    y[0, :7] = -1
    logits, loss = exact(x, y)
    loss.backward()

    model = GPT(GPTConfig(**shape)).cuda()
    model.load_state_dict({name: w.float() for name, w in exact.state_dict().items()})
    if compiled:
        for block in model.h:
            block.compile()
        model.score = torch.compile(model.score)
    with torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32"):
        found, mean = model(x.cuda(), y.cuda())
    (1024 * mean).backward()
    assert relative(found, logits) < most and abs(mean.item() - loss.item()) < most
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        if not name.endswith("c_attn.bias"):  # a key's has no gradient at all
            assert relative(p.grad / 1024, q.grad) < most, name


@pytest.mark.parametrize("options", [
    ["--dtype=bfloat16", "--compile=false"], ["--dtype=bfloat16"],
    ["--dtype=float16", "--optimizer=muon", "--gradient_accumulation_steps=2"]])
def test_a_deterministic_run_gives_the_same_bits_and_goes_on_from_any_step(train, options):
    options = [*GPU, *options, "--deterministic=True", "--save_interval=6", "--lr_decay_iters=12",
               "--sample_interval=6"]
    train(*options, "--out_dir=out/a")
    train(*options, "--out_dir=out/b", "--max_iters=6")
    result = train(*options, "--out_dir=out/b", "--init_from=resume", "--overwrite=False")
    torch.use_deterministic_algorithms(False)
    assert result.status == 0
    assert same(weights(run="out/a"), weights(run="out/b"))


def test_a_run_goes_from_gpu_to_cpu_and_back(train):
    options = ["--dropout=0.0", "--dtype=float32", "--lr_decay_iters=9"]
    train(*options, "--max_iters=9", "--out_dir=out/cpu")
    for device, steps in (("cuda", 3), ("cpu", 6), ("cuda", 9)):
        result = train(*options, f"--device={device}", f"--max_iters={steps}", "--out_dir=out/both",
                       f"--init_from={'scratch' if steps == 3 else 'resume'}")
        assert result.status == 0
    for name, w in weights(run="out/cpu").items():
        torch.testing.assert_close(weights(run="out/both")[name], w, rtol=1e-2, atol=1e-3)


def test_float16_skips_the_steps_that_overflow(train, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler",
                        lambda device, enabled: real(device, init_scale=2.0 ** 40, enabled=enabled))
    result = train(*GPU, "--dtype=float16", "--max_iters=40")
    assert result.status == 0 and "steps skipped" in result.out


@pytest.mark.parametrize("changes", [{}, {"fused": False}, {"norm": "post", "n_layer": 3}])
def test_a_graph_reads_what_a_growing_cache_reads(changes):
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=64)
    config = GPTConfig(**shape | changes)
    model = GPT(config).cuda().eval()
    ids = torch.randint(97, (3, 5), device="cuda")
    texts = list(stream(model, ids, 30, top_k=1))    # twice past the context
    cache, growing = KVCache(config, 3, model.wpe.weight), ids
    for new in texts:
        growing = torch.cat((growing, next_logits(model, growing, cache).argmax(1)[:, None]), 1)
        assert torch.equal(growing[:, -1:], new)


def test_a_graph_trains_as_python_does(train):
    options = [*GPU, "--dtype=bfloat16", "--compile=false", "--deterministic=True"]
    for accumulated in (1, 3):
        for graph in (True, False):
            train(*options, f"--gradient_accumulation_steps={accumulated}",
                  f"--out_dir=out/{graph}", f"--cuda_graph={graph}")
        assert same(weights(run="out/True"), weights(run="out/False"))
    torch.use_deterministic_algorithms(False)


def test_what_a_graph_cannot_record_is_said_or_runs_without_one(train, run, monkeypatch):
    monkeypatch.setattr(KVCache, "graphs", True)
    real = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, *others: real(
        self, ids.clamp(max=ids.max().item()), *others))
    options = [*GPU, "--compile=false", "--sample_interval=4"]
    assert train(*options, "--cuda_graph=False").status == 0
    KVCache.graphs = True  # as in a process of its own
    result = run("sample.py", "--max_new_tokens=9", "--device=cuda")
    assert result.status == 0 and "a CUDA graph does not work here" in result.err
    one_sentence(train(*options), 1, "try --cuda_graph=False")


def test_a_profile_lists_the_kernels(train):
    result = train(*GPU, "--profile=3", "--dtype=bfloat16")
    assert result.status == 0 and "Self CUDA time total" in result.out


def test_more_logits_than_an_int32_counts():
    rows = 2 ** 31 // 2 ** 16 + 100
    model = GPT(GPTConfig(block_size=1024, vocab_size=2 ** 16, n_layer=1, n_head=1, n_embd=16))
    model, ids = model.cuda(), torch.randint(2 ** 16, (rows // 1024 + 1, 1024), device="cuda")
    targets = torch.full_like(ids, -1)
    targets[-1] = ids[-1].roll(-1)                           # of the logits past 2 ** 31 alone
    for score in (model.score, torch.compile(model.score)):
        model.score = score
        with torch.autocast("cuda", torch.bfloat16):
            loss, alone = model(ids, targets)[1], model(ids[-1:], targets[-1:])[1]
        assert abs(loss.item() - 11.09) < 0.1                # ln 65,536
        expected = torch.autograd.grad(alone, model.ln_f.weight)[0]
        torch.testing.assert_close(torch.autograd.grad(loss, model.ln_f.weight)[0], expected,
                                   rtol=0.05, atol=1e-4)


def test_too_little_memory_is_said(train):
    one_sentence(train(*GPU, "--n_embd=65536", "--n_layer=48", "--n_head=512"), 2, "cuda:0 has")
