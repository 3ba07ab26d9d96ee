"""The model against its formulas, other implementations and known numbers."""

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import (ACTIVATIONS, GPT, Dropout, GPTConfig, attention, cross_entropy,
                   fused_attention, layer_norm, sinusoids)

SMALL = dict(block_size=16, vocab_size=65, n_layer=3, n_head=4, n_embd=32)


def small(seed=0, **options):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SMALL | options))


def ids(B=2, T=16, seed=0):
    return torch.randint(65, (B, T), generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- sizes ----

@pytest.mark.parametrize("qkv_bias, parameters", [(True, 124_439_808), (False, 124_412_160)])
def test_gpt2_has_its_published_number_of_parameters(qkv_bias, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(qkv_bias=qkv_bias)).num_params() == parameters


def test_untied_head_is_one_matrix_more_and_a_sinusoidal_table_is_not_trained():
    assert small(tied=False).num_params() - small().num_params() == 65 * 32
    assert small().num_params() - small(positions="sinusoidal").num_params() == 16 * 32


@pytest.mark.parametrize("options", [{}, {"tied": False, "n_inner": 48, "bias": False}])
def test_flops_per_token_are_what_torch_counts(options):
    """The oracle is torch's counter, which sees each product that runs, forward and backward."""
    model = small(fused=False, **options)
    with FlopCounterMode(display=False) as counter:
        model(ids(), ids(seed=1))[1].backward()
    assert counter.get_total_flops() == model.flops_per_token() * ids().numel()


# ---- the formulas against the fused kernels ----

@pytest.mark.parametrize("norm, activation, bias", list(product(
    ("pre", "post"), ("gelu", "relu"), (True, False))))
def test_written_out_and_fused_agree_in_values_and_gradients(norm, activation, bias):
    """The formulas are the oracle, as a paper prints them; torch's kernels, which train, must agree
    with them in each logit and each gradient."""
    fused = small(norm=norm, activation=activation, bias=bias)
    written = small(norm=norm, activation=activation, bias=bias, fused=False)
    for model in (fused, written):
        model.logits, loss = model(ids(), ids(seed=1))
        loss.backward()
    assert relative(written.logits, fused.logits) < 1e-5
    for (name, a), b in zip(written.named_parameters(), fused.parameters()):
        if not name.endswith("c_attn.bias"):  # a key's bias has gradient 0 but for rounding
            assert relative(a.grad, b.grad) < 1e-5, name


def test_each_formula_is_torchs():
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    for formula, kernel in ACTIVATIONS.values():
        torch.testing.assert_close(formula(x), kernel(x))
    torch.testing.assert_close(layer_norm(x, (32,), weight, bias),
                               F.layer_norm(x, (32,), weight, bias))
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(attention(q, k, v), fused_attention(q, k, v, Dropout(0.0)))


def test_attentions_mask_counts_from_the_lower_right_corner():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(q[:, :, -3:], k, v), attention(q, k, v)[:, :, -3:])


def test_bfloat16_attention_is_close_to_float32():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    half = fused_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), Dropout(0.0)).float()
    assert (half - attention(q, k, v)).abs().max() < 0.05


def test_sinusoids_are_the_papers():
    table = sinusoids(7, 6)
    for t, i in product(range(7), range(3)):
        angle = t / 10000 ** (2 * i / 6)
        assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_of_elements_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    zeros = y == 0
    assert torch.equal(x.grad, y) and y.dtype == dtype
    assert zeros.float().mean().item() == pytest.approx(p, abs=0.002)
    assert y[~zeros].float().unique().tolist() == [pytest.approx(1 / (1 - p), rel=0.01)]
    both = (zeros[:, 1:] & zeros[:, :-1]).float().mean().item()
    assert both == pytest.approx(p * p, abs=0.002)  # neighbours do not know of each other
    torch.manual_seed(0)
    assert torch.equal(Dropout(p)(x), y) and not torch.equal(Dropout(p)(x), y)


def test_dropout_without_a_chance_is_nothing():
    x = torch.randn(3, 5)
    assert torch.equal(Dropout(0.0)(x), x) and torch.equal(Dropout(0.5).eval()(x), x)


def test_dropout_of_nearly_everything_divides_by_no_zero():
    assert Dropout(1 - 1e-9)(torch.ones(1000)).isfinite().all()


def test_dropout_compiles_whole():
    compiled = torch.compile(Dropout(0.5), backend="eager", fullgraph=True)
    zeros = (compiled(torch.ones(1000)) == 0).float().mean().item()
    assert zeros == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 1 / 128), (torch.float32, 1e-5)])
@pytest.mark.parametrize("N, V", [(20, 70_000), (5000, 65), (3, 600_000)])
def test_cross_entropy_in_slices_is_torchs_on_doubles(N, V, dtype, digits):
    torch.manual_seed(0)
    logits = (5 * torch.randn(N, V)).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[1], targets[2] = -1, logits[2].argmax()  # not counted, nearly certain
    found, expected = cross_entropy(logits, targets), F.cross_entropy(
        logits.double(), targets, ignore_index=-1)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, = torch.autograd.grad(-3 * found, logits)
    theirs, = torch.autograd.grad(-3 * expected, logits)
    assert "SlicedCrossEntropy" in type(found.grad_fn).__name__
    assert (ours.float() - theirs.float()).abs().max() <= theirs.abs().max() * digits
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1.3 * digits,
                               atol=1e-6 * theirs.abs().max().item())
    assert not ours[1].any()
    assert cross_entropy(logits.detach(), targets) == found  # as in an evaluation


# ---- behaviour ----

@pytest.mark.parametrize("norm, positions, fused", list(product(
    ("pre", "post"), ("learned", "sinusoidal"), (True, False))))
def test_no_gradient_flows_from_a_later_token(norm, positions, fused):
    """The gradient is the oracle: it reaches every input that an output depends on, whichever way
    the mask is made, and must stop at the output's own token."""
    model = small(norm=norm, positions=positions, fused=fused)
    seen = {}
    model.drop.register_forward_hook(lambda m, i, x: seen.update(x=x.retain_grad() or x))
    logits, _ = model(ids(B=1))
    logits[0, 9].square().sum().backward()
    reached = seen["x"].grad[0].abs().sum(dim=-1) > 0
    assert reached.tolist() == [True] * 10 + [False] * 6


@pytest.mark.parametrize("norm, positions, fused", list(product(
    ("pre", "post"), ("learned", "sinusoidal"), (True, False))))
def test_attention_maps_are_the_softmax_in_float64(norm, positions, fused):
    """From the queries and keys of the same weights in float64, sharpened as training does."""
    model = small(norm=norm, positions=positions, fused=fused).eval()
    for block in model.h:
        block.attn.c_attn.weight.data *= 15
    maps = []
    model.hidden(ids(), maps=maps)
    found, H = [], model.config.n_head
    for block in model.double().h:
        block.attn.c_attn.register_forward_hook(lambda module, x, qkv: found.append(qkv))
    model(ids())
    assert len(maps) == len(found) == 3
    for weights, qkv in zip(maps, found):
        q, k, _ = (x.view(2, 16, H, -1).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5
        exps = torch.tril(scores.exp())
        assert (weights - exps / exps.sum(dim=-1, keepdim=True)).abs().max() < 1e-5
        assert weights.max() > 0.5 and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, H, 16))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_states_are_the_stream_before_the_first_block_and_after_each(norm):
    model, states = small(norm=norm).eval(), []
    final = model.hidden(ids(), states=states)
    assert len(states) == 4
    torch.testing.assert_close(states[0], model.wte(ids()) + model.wpe.weight[:16])
    for block, before, after in zip(model.h, states, states[1:]):
        assert torch.equal(block(before), after)
    assert torch.equal(model.ln_f(states[-1]), final)


@pytest.mark.parametrize("norm, positions, activation, tied, bias, qkv_bias", list(product(
    ("pre", "post"), ("learned", "sinusoidal"), ("gelu", "relu"), (True, False), (True, False),
    (True, False))))
def test_an_untrained_model_is_as_good_as_guessing(norm, positions, activation, tied, bias,
                                                   qkv_bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 65, 4, 4, 128, norm=norm, positions=positions, activation=activation,
                          tied=tied, bias=bias, qkv_bias=qkv_bias))
    tokens = ids(8, 65)
    assert abs(model(tokens[:, :-1], tokens[:, 1:])[1].item() - math.log(65)) < 0.3


def test_a_wide_tied_model_with_scaled_embeddings_starts_by_repeating_the_last_token():
    """Why its untrained loss is above ln(vocabulary): a token's own embedding is so large a part
    of the hidden state that the shared matrix finds it there."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 65, 6, 6, 384, positions="sinusoidal", scale_embedding=True))
    tokens = ids(8, 65)
    logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() > math.log(65) + 0.3
    assert (logits.argmax(dim=-1) == tokens[:, :-1]).float().mean() > 0.9


def test_the_initial_weights_are_gpt2s():
    model = small(n_embd=128, n_layer=8)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert p.unique().tolist() == [1.0 if "ln_" in name and "weight" in name else 0.0]


def test_targets_of_minus_one_do_not_count():
    model, x, y = small(), ids(1), ids(1, seed=1)
    masked = torch.where(torch.arange(16) < 5, y, -1)
    torch.testing.assert_close(model(x, masked)[1], model(x[:, :5], y[:, :5])[1])


def test_label_smoothing_and_layerdrop_act_in_training_only():
    plain, x, y = small(), ids(), ids(seed=1)
    for option in ({"label_smoothing": 0.2}, {"layerdrop": 0.9}):
        model = small(**option)
        torch.testing.assert_close(model.eval()(x, y)[1], plain(x, y)[1])
        torch.manual_seed(0)
        assert model.train()(x, y)[1] != plain(x, y)[1]


def test_layerdrop_skips_its_share_of_the_blocks():
    model, calls = small(layerdrop=0.25), []
    for block in model.h:
        block.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    for _ in range(400):
        model(ids(1, 1))
    assert len(calls) / 1200 == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("wanted", [True, False])
def test_attn_dropout_is_that_of_the_attention_weights(wanted):
    model, x = small(dropout=0.5, attn_dropout=wanted), ids()
    for module in [model.drop, *(part for block in model.h
                                 for part in (block.attn.resid_dropout, block.mlp.dropout))]:
        module.eval()
    in_training = model(x)[0]
    assert torch.equal(in_training, model.eval()(x)[0]) != wanted


def test_dropout_zeroes_in_training_only():
    model, x = small(dropout=0.5), ids()
    torch.testing.assert_close(model.eval()(x)[0], small()(x)[0])
    assert not torch.equal(model.train()(x)[0], model(x)[0])


@pytest.mark.parametrize("wrong, words", [
    ({"n_embd": 30}, "multiple of n_head"), ({"n_layer": 0}, "n_layer must be at least 1"),
    ({"dropout": 1.0}, "dropout"), ({"norm": "middle"}, "norm must be pre or post"),
    ({"positions": "rotary"}, "positions must be"), ({"activation": "silu"}, "activation"),
    ({"n_inner": -1}, "n_inner"), ({"scale_embedding": True}, "--positions=sinusoidal"),
])
def test_a_shape_that_cannot_work_says_why(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SMALL | wrong)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit a context of 16"):
        small()(ids(1, 17))


def test_transformers_gpt2_gives_the_same_logits(transformers_twins):
    ours, theirs = transformers_twins
    torch.testing.assert_close(ours(ids())[0], theirs(ids()).logits, rtol=1e-4, atol=1e-5)
