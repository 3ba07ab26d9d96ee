"""What loss.backward() does in one block, derived by hand: a lesson to be read, held to autograd.

d_x is the gradient of the loss by x, of x's shape. Three rules do most of it:

    y = x W^T + b   ->   d_x = d_y W,  d_W = d_y^T x,  d_b = d_y, summed over the tokens
    y = f(x)        ->   d_x = d_y f'(x), for each number by itself
    x goes two ways ->   d_x is the sum of what comes back from both
"""

import math

import pytest
import torch

from model import Block, GPTConfig

T, C, H = 5, 8, 2
D = C // H
a, c = math.sqrt(2 / math.pi), 0.044715


def heads(x):
    return x.view(T, H, D).transpose(0, 1)         # (T, C) -> (H, T, D)


def side_by_side(x):
    return x.transpose(0, 1).reshape(T, C)         # and back


def standardize(x):
    std = (x.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (x - x.mean(dim=1, keepdim=True)) / std, std


def layer_norm_back(d_y, x, std, weight):
    """Of y = x * weight + bias, x standardized. Mean and std depend on x, too: what would move
    them is taken out of the gradient."""
    d_x = d_y * weight
    return (d_x - d_x.mean(dim=1, keepdim=True) - x * (d_x * x).mean(dim=1, keepdim=True)) / std


@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_of_a_block_derived_by_hand_are_autograds(seed):
    torch.manual_seed(seed)
    block = Block(GPTConfig(T, 65, 1, H, C), 0).double()
    for p in block.parameters():
        torch.nn.init.normal_(p)
    w = {name: p.detach() for name, p in block.named_parameters()}
    x, d_out = torch.randn(2, T, C, dtype=torch.float64)

    # ---- forward, as Block does: x + attention, then x + MLP ----
    x_1, std_1 = standardize(x)
    n_1 = x_1 * w["ln_1.weight"] + w["ln_1.bias"]
    qkv = n_1 @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]      # (T, 3C)
    q, k, v = map(heads, qkv.split(C, dim=1))                          # (H, T, D)
    mask = torch.full((T, T), -math.inf).triu(1)
    A = (q @ k.mT / math.sqrt(D) + mask).softmax(dim=-1)               # (H, T, T)
    y = side_by_side(A @ v)                                            # (T, C)
    r = x + y @ w["attn.c_proj.weight"].T + w["attn.c_proj.bias"]
    x_2, std_2 = standardize(r)
    n_2 = x_2 * w["ln_2.weight"] + w["ln_2.bias"]
    h = n_2 @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]              # (T, 4C)
    t = torch.tanh(a * (h + c * h ** 3))
    g = 0.5 * h * (1 + t)                                              # GELU
    out = r + g @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]

    # ---- backward, from the last line to the first ----
    d = {"mlp.c_proj.weight": d_out.T @ g, "mlp.c_proj.bias": d_out.sum(dim=0)}
    d_g = d_out @ w["mlp.c_proj.weight"]
    d_h = d_g * 0.5 * (1 + t + h * (1 - t ** 2) * a * (1 + 3 * c * h ** 2))  # tanh' = 1 - tanh^2
    d |= {"mlp.c_fc.weight": d_h.T @ n_2, "mlp.c_fc.bias": d_h.sum(dim=0)}
    d_n_2 = d_h @ w["mlp.c_fc.weight"]
    d |= {"ln_2.weight": (d_n_2 * x_2).sum(dim=0), "ln_2.bias": d_n_2.sum(dim=0)}
    d_r = d_out + layer_norm_back(d_n_2, x_2, std_2, w["ln_2.weight"])  # past the MLP, and through

    d |= {"attn.c_proj.weight": d_r.T @ y, "attn.c_proj.bias": d_r.sum(dim=0)}
    d_y = heads(d_r @ w["attn.c_proj.weight"])
    d_A, d_v = d_y @ v.mT, A.mT @ d_y
    d_scores = A * (d_A - (A * d_A).sum(dim=-1, keepdim=True))         # softmax: its sum stays 1
    d_q, d_k = d_scores @ k / math.sqrt(D), d_scores.mT @ q / math.sqrt(D)
    d_qkv = torch.cat([side_by_side(part) for part in (d_q, d_k, d_v)], dim=1)
    d |= {"attn.c_attn.weight": d_qkv.T @ n_1, "attn.c_attn.bias": d_qkv.sum(dim=0)}
    d_n_1 = d_qkv @ w["attn.c_attn.weight"]
    d |= {"ln_1.weight": (d_n_1 * x_1).sum(dim=0), "ln_1.bias": d_n_1.sum(dim=0)}
    d_x = d_r + layer_norm_back(d_n_1, x_1, std_1, w["ln_1.weight"])

    # ---- autograd ----
    x.requires_grad_()
    expected = block(x[None])[0]
    expected.backward(d_out)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d_x, x.grad, rtol=1e-9, atol=1e-9)
    assert d.keys() == w.keys()
    for name, p in block.named_parameters():
        torch.testing.assert_close(d[name], p.grad, rtol=1e-9, atol=1e-9)
