"""Generation: the cache against none, filters, greedy and beam search against transformers', draws
that are each row's own."""

import math

import pytest
import torch
from conftest import Replayed

from model import (GPT, GPTConfig, KVCache, TokenGraph, filter_logits, next_logits, sample_ids,
                   stream)
from sample import beam_search


def lively(**options):
    """A small model with weights 8 times those it starts with, so that its predictions vary."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=16, vocab_size=65, n_layer=3, n_head=4, n_embd=32)
                          | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and p.requires_grad:
                p *= 8
    return model


def ids(*shape):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(1))


def seeded(rows, seed=0):
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


# ---- the cache ----

@pytest.mark.parametrize("changes", [{}, {"fused": False}, {"positions": "sinusoidal"},
                                     {"block_size": 2}, {"block_size": 1}])
def test_a_token_graph_writes_the_same_text(changes, monkeypatch):
    """All of a GPU's way but the recording: places are tensors, the cache has one shape."""
    monkeypatch.setattr("model.CudaGraph", Replayed)
    model, prompt = lively(**changes), ids(3, 5)
    expected = [new.tolist() for new in stream(model, prompt, 40, temperature=0)]
    monkeypatch.setattr("model.token_reader", lambda hidden, ids, cache: graph(hidden, ids, cache))
    graphs = []

    def graph(hidden, ids, cache):
        for kv in cache.layers if not graphs else ():
            kv[:, :, :, cache.length:] = math.nan  # what empty memory may hold
        graphs.extend([] if graphs else [TokenGraph(hidden, ids, cache)])
        return graphs[0]

    assert [new.tolist() for new in stream(model, prompt, 40, temperature=0)] == expected
    assert graphs[0].graph.calls >= (35 if model.config.block_size == 16 else 1)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("fused", [True, False])
def test_cached_logits_are_those_of_the_tokens_in_sight(positions, norm, fused):
    """The oracle has no cache: forward() on the same tokens, which must give the same logits at
    every length, also where the text has outgrown the context."""
    model = lively(positions=positions, norm=norm, fused=fused)
    idx, cache = ids(3, 48), KVCache(model.config, 3, model.wte.weight)
    with torch.no_grad():
        for T in range(1, 49):
            logits = next_logits(model, idx[:, :T], cache)
            expected = model(idx[:, cache.first:T])[0][:, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            assert min(T, 8) <= T - cache.first <= 16


@pytest.mark.parametrize("first", [1, 5, 16, 17, 40])
def test_a_prompt_is_read_at_once_and_each_token_after_it_alone(first, monkeypatch):
    model, read = lively(), []
    monkeypatch.setattr(model, "hidden", lambda new, cache, real=model.hidden:
                        read.append(new.shape[1]) or real(new, cache))
    assert model.generate(ids(2, first), 100).shape == (2, first + 100)
    assert read[0] == min(first, 16) and set(read[1:]) <= {1, 8}
    assert read.count(8) <= 1 + 100 / 8  # past block_size half of it again, every 8 tokens


def test_the_cache_is_as_wide_as_the_weights():
    model = lively().bfloat16()
    assert KVCache(model.config, 2, model.wpe.weight).layers[0].dtype == torch.bfloat16


# ---- filters ----

def kept(logits):
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


@pytest.mark.parametrize("filters", [
    {"temperature": 0.7}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.6}, {"top_p": 0.01},
    {"min_p": 0.1}, {"typical_p": 0.3}, {"typical_p": 0.9}, {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2}, {"no_repeat_ngram": 13}, {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.3, "no_repeat_ngram": 3, "temperature": 1.4, "top_k": 40,
     "typical_p": 0.9}])
def test_filters_are_those_of_transformers(filters):
    """The oracle is transformers, written by others: it must keep the same tokens, with the same
    probabilities."""
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(20, 65, generator=torch.Generator().manual_seed(0))
    seen = ids(20, 12) % 4  # so that some pairs come twice
    make = {"repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
            "no_repeat_ngram": transformers.NoRepeatNGramLogitsProcessor,
            "temperature": transformers.TemperatureLogitsWarper,
            "top_k": transformers.TopKLogitsWarper, "top_p": transformers.TopPLogitsWarper,
            "min_p": transformers.MinPLogitsWarper, "typical_p": transformers.TypicalLogitsWarper}
    expected = logits.clone()
    for name in make:
        if name in filters:
            expected = make[name](filters[name])(seen, expected)
    found = filter_logits(logits, seen, **filters)
    assert kept(found) == kept(expected)
    torch.testing.assert_close(found.log_softmax(dim=-1), expected.log_softmax(dim=-1))


def test_exactly_k_are_kept_even_among_equals():
    assert [len(row) for row in kept(filter_logits(torch.zeros(4, 65), top_k=3))] == [3] * 4
    assert [len(row) for row in kept(filter_logits(torch.zeros(4, 65), temperature=0))] == [1] * 4


def test_top_p_keeps_the_fewest_that_reach_it_and_min_p_a_share_of_the_largest():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, expected in ((0.0, {0}), (0.3, {0}), (0.41, {0, 1}), (0.69, {0, 1}), (0.75, {0, 1, 2})):
        assert kept(filter_logits(logits, top_p=top_p)) == [expected]
    for min_p, expected in ((0.0, {0, 1, 2, 3}), (0.3, {0, 1, 2}), (0.6, {0, 1}), (0.9, {0})):
        assert kept(filter_logits(logits, min_p=min_p)) == [expected]


def test_typical_p_may_leave_out_the_likeliest():
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()  # entropy 1.33; surprises 0.92, 1.61
    assert kept(filter_logits(logits, typical_p=0.5)) == [{1, 2, 3}]
    assert kept(filter_logits(logits, typical_p=0.7)) == [{0, 1, 2, 3}]


def test_no_three_tokens_come_twice_in_the_same_order():
    model, prompt = lively(), ids(4, 9)
    for n in (1, 2, 3):
        text = model.generate(prompt, 50, generators=seeded(4), temperature=0.3, no_repeat_ngram=n)
        for row in text.tolist():
            spans = list(zip(*(row[i:] for i in range(n))))
            new = spans[9 - n + 1:]
            assert len(set(new)) == len(new) == 50 and not set(new) & set(spans[:9 - n + 1])


def test_where_each_token_would_repeat_all_may_come():
    logits, seen = torch.zeros(2, 3), torch.tensor([[0, 1, 2, 0], [0, 1, 1, 0]])
    assert kept(filter_logits(logits, seen, no_repeat_ngram=1)) == [{0, 1, 2}, {2}]


# ---- draws ----

def test_draws_follow_the_probabilities():
    """The oracle is the softmax: of 50,000 draws each token gets its probability to 0.01, which is
    more than five standard deviations of the likeliest."""
    logits = torch.randn(1, 65, generator=torch.Generator().manual_seed(0))
    logits[0, ::2] = -math.inf
    drawn = sample_ids(logits.expand(50_000, -1), [torch.Generator().manual_seed(0)] * 50_000)
    found = torch.bincount(drawn[:, 0], minlength=65) / 50_000
    assert (found - logits[0].softmax(dim=-1)).abs().max() < 0.01 and found[::2].sum() == 0


def test_each_row_draws_from_numbers_of_its_own():
    model = lively()
    rows = model.generate(ids(1, 4).repeat(3, 1), 40, generators=seeded(3), top_k=20)
    assert len(set(map(str, rows.tolist()))) == 3
    for row, generator in zip(rows, seeded(3)):
        alone = model.generate(ids(1, 4), 40, generators=[generator], top_k=20)
        assert torch.equal(row, alone[0])


def test_generation_ends_each_row_at_its_end_of_text():
    model, prompt = lively(), ids(50, 1)
    free = model.generate(prompt, 60, generators=seeded(50))
    rows = model.generate(prompt, 60, generators=seeded(50), eot=4)
    ends = []
    for row, same in zip(rows, free):
        at = (row[1:] == 4).nonzero()
        end = 1 + at[0].item() if len(at) else len(row)
        assert torch.equal(row[:end], same[:end]) and (row[end:] == 4).all()
        ends.append(end)
    assert len(set(ends)) > 5
    first = model.generate(prompt[:1], 1, temperature=0)[0, 1].item()
    assert model.generate(prompt[:1], 60, temperature=0, eot=first).shape == (1, 2)


def test_no_id_beyond_the_tokenizers_appears():
    assert lively().generate(ids(20, 1) % 10, 40, temperature=9.0, vocab_size=10).max() == 9
    assert beam_search(lively(), ids(1, 1) % 10, 40, 3, vocab_size=10).max() <= 9


# ---- against transformers ----

def test_greedy_text_is_that_of_transformers(transformers_twins):
    ours, theirs = transformers_twins
    expected = theirs.generate(ids(2, 4), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids(2, 4), 12, temperature=0), expected)


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("ends", [False, True])
def test_beam_search_is_that_of_transformers(transformers_twins, beams, penalty, ends):
    """transformers' beam search is the oracle. Sharpened weights and an end of text that is likely
    make beams end early, so that the length penalty decides."""
    ours, theirs = transformers_twins
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p *= 3 if p.dim() == 2 else 1
    lengths = set()
    for prompt in ids(4, 4).split(1):
        likely = ours.generate(prompt, 5, temperature=0)[0, -1].item()
        eot = likely if ends else None
        expected = theirs.generate(prompt, max_new_tokens=11, do_sample=False, num_beams=beams,
                                   length_penalty=penalty, eos_token_id=eot, pad_token_id=0)
        found = beam_search(ours, prompt, 11, beams, penalty, eot)
        assert found.tolist() == expected.tolist()
        lengths.add(expected.shape[1])
    assert lengths == {15} if not ends else min(lengths) < 15 or penalty > 0


def test_one_beam_is_greedy_and_the_rows_may_slide():
    model = lively()
    assert torch.equal(beam_search(model, ids(1, 4), 40, 1),
                       model.generate(ids(1, 4), 40, temperature=0))
    assert beam_search(model, ids(1, 4), 40, 3).shape == (1, 44)
