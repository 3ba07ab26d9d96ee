"""GPT-2 in one file: the model, text generation, checkpoints, weights of others, tokenizers.

Shapes: B batch, T tokens (query positions), S source positions (keys and values, S = T without a
cache), C channels (n_embd), H heads, D head size (C / H), V vocabulary.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners. Every module carries the
name it has in OpenAI's weights, so that those map one to one.
"""

import hashlib
import json
import math
import os
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2's smallest, 124,439,808 parameters."""
    block_size: int = 1024         # longest context, tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int = 0               # feed-forward width; 0: 4 * n_embd
    dropout: float = 0.0
    bias: bool = True              # in Linear and LayerNorm; False is a little faster
    qkv_bias: bool = True          # in the query, key and value projection; needs bias
    positions: str = "learned"     # or sinusoidal
    scale_embedding: bool = False  # token embeddings * sqrt(n_embd), made for sinusoidal positions
    activation: str = "gelu"       # GPT-2's tanh form, gelu_erf (the exact one) or relu
    norm: str = "pre"              # LayerNorm before each sublayer, or post: after its residual sum
    tied: bool = True              # the output layer shares the token embedding's matrix
    fused: bool = True             # fused kernels; False: the same from the formulas below
    label_smoothing: float = 0.0   # in the training loss, never in evaluation
    layerdrop: float = 0.0         # chance to skip a block in training (Fan et al. 2019)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, "
                             f"{self.n_embd} is not one of {self.n_head}")
        if self.scale_embedding and self.positions != "sinusoidal":
            raise ValueError("scale_embedding goes with --positions=sinusoidal")
        if self.n_inner < 0:
            raise ValueError(f"n_inner must be a width, or 0 for 4 * n_embd, not {self.n_inner}")
        for name in ("dropout", "label_smoothing", "layerdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        for name, choices in {"positions": ("learned", "sinusoidal"), "norm": ("pre", "post"),
                              "activation": ("gelu", "gelu_erf", "relu")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, "
                                 f"not {getattr(self, name)!r}")


# ---- the formulas, and the fused kernels that compute the same ----

def attention_weights(q, k):
    """softmax(Q K^T / sqrt(D)), causal: q (B, H, T, D), k (B, H, S, D) -> (B * H, T, S). Vaswani et
    al. 2017, equation 1. The mask counts from the lower right corner: the last query sees every
    key, so that the T newest of S positions run the same lines."""
    T, D, S = *q.shape[2:], k.shape[2]
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D))  # mask + Q K^T / sqrt(D), at once
    return scores.softmax(dim=-1)


def attention(q, k, v, dropout=0.0):
    """Their product with V: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D)."""
    weights = drop(attention_weights(q, k), dropout)
    return (weights @ v.flatten(0, 1)).view(q.shape)


def fused_attention(q, k, v, dropout=0.0):
    """The same in one kernel that never holds (T, S) weights (Dao et al. 2022), where T = S or the
    one query sees all."""
    T, S = q.shape[-2], k.shape[-2]
    slow = q.device.type == "cpu" and T == S and (
        dropout > 0 or q.dtype == torch.bfloat16 and S <= 512)  # tests/benchmark.py attention
    if slow or T not in (1, S):
        return attention(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)


def layer_norm(x, shape, weight, bias=None, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016).
    Takes what F.layer_norm takes; shape is implied by weight."""
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    return x if bias is None else x + bias


def gelu(x):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), GPT-2's form (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def gelu_erf(x):
    """x Phi(x), of which gelu is an approximation: nanoGPT's."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


fused_gelu = partial(F.gelu, approximate="tanh")


def drop(x, p):
    """Dropout: elements are zero by chance p, the others divided by 1 - p (Srivastava et al. 2014).
    torch's own draws one number after another on a CPU, half of a step. Here each element has as
    many random bits as its own, and they turn into its factor where they are."""
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    size = x.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    values = 2 ** (8 * size)
    zeros = min(round(p * values), values - 1)
    bits = torch.empty(x.numel() * size // 8 + 1, dtype=torch.int64).random_(-2 ** 63, None)
    bits = bits.view(integer)[:x.numel()].view(x.shape)
    factor = torch.tensor(values / (values - zeros), dtype=x.dtype)
    return x * bits.ge_(zeros - values // 2).mul_(factor.view(integer)).view(x.dtype)


def cross_entropy(logits, targets, smoothing=0.0):
    """The mean of -log softmax(logits)[target] in nats, float, over the targets (N,) that are not
    -1; logits (N, V)."""
    if (logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and not smoothing
            and not torch.compiler.is_compiling()):
        return SlicedCrossEntropy.apply(logits, targets)
    return F.cross_entropy(logits.float(), targets, ignore_index=-1, label_smoothing=smoothing)


class SlicedCrossEntropy(torch.autograd.Function):
    """The same in slices that stay in a CPU's cache, where all of GPT-2's logits as floats, and
    again for their gradient, took twice as long and 0.4 GB for 1024 tokens."""

    @staticmethod
    def slices(logits, *others):
        """A few rows of logits at a time, as floats in the same place, with those of others."""
        rows = max(1, 2 ** 19 // logits.shape[1])
        floats = torch.empty(rows, logits.shape[1])
        for part, *rest in zip(*(t.split(rows) for t in (logits, *others))):
            yield floats[:len(part)].copy_(part), *rest

    @staticmethod
    def forward(ctx, logits, targets):
        log_sums = torch.empty(len(logits), 1)
        for x, log_sum in SlicedCrossEntropy.slices(logits, log_sums):
            largest = x.amax(dim=1, keepdim=True)
            log_sum.copy_(x.sub_(largest).exp_().sum(dim=1, keepdim=True).log_().add_(largest))
        counted = targets[:, None] >= 0
        targets, weights = targets[:, None].clamp(min=0), counted / counted.sum()
        ctx.save_for_backward(logits, log_sums, targets, weights)
        return ((log_sums - logits.gather(1, targets)) * weights).sum()

    @staticmethod
    def backward(ctx, d_loss):
        """softmax(logits), less 1 at the target, over the number of targets."""
        logits, log_sums, targets, weights = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        for x, log_sum, target, weight, d_x in SlicedCrossEntropy.slices(
                logits, log_sums, targets, weights * d_loss, d_logits):
            d_x.copy_(x.sub_(log_sum).exp_().mul_(weight).scatter_add_(1, target, -weight))
        return d_logits, None


def sinusoids(T, C):
    """(T, C) table: sin(t / 10000^(i / C)) in even columns i, the cosine beside it in i + 1.
    Vaswani et al. 2017, section 3.5."""
    angles = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, C, 2) / C)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :C]


# ---- the model ----

class Linear(nn.Linear):
    def forward(self, x):
        """One row of bfloat16, as in writing token by token, takes 0.7 of the time so on a CPU."""
        if (x.numel() == self.in_features and x.dtype == torch.bfloat16 and x.device.type == "cpu"
                and not torch.is_grad_enabled()):
            x, shape = x.flatten(), (*x.shape[:-1], self.out_features)
            y = torch.mv(self.weight, x).view(shape)
            return y if self.bias is None else y.add_(self.bias)
        return super().forward(x)


class Dropout(nn.Dropout):
    def forward(self, x):
        return drop(x, self.p if self.training else 0.0)


class LayerNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.normalize = F.layer_norm if config.fused else layer_norm

    def forward(self, x):
        return self.normalize(x, self.weight.shape, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_attn = Linear(C, 3 * C, bias=config.bias and config.qkv_bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attend = fused_attention if config.fused else attention

    def forward(self, x, remember=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)    # (B, H, T, D) each
        if remember:
            k, v = remember(q, k, v)            # (B, H, S, D): behind those of earlier tokens
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)
        self.activation = {"gelu": fused_gelu if config.fused else gelu,
                           "gelu_erf": F.gelu if config.fused else gelu_erf,
                           "relu": torch.relu}[config.activation]

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))  # (B, T, C), 4C inside


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.pre_norm = config.norm == "pre"

    def forward(self, x, remember=None):
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x), remember)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, remember))
        return self.ln_2(x + self.mlp(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # The last post-norm block has already normalized what it returns.
        self.ln_f = LayerNorm(config) if config.norm == "pre" else nn.Identity()
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self.embedding_scale = math.sqrt(config.n_embd) if config.scale_embedding else 1.0
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) and zero biases; the projections that end in the residual stream are smaller
        by sqrt(2 n_layer), the number of terms summed there, which keeps the sum's variance.

        Logits of a normalized state then have variance 0.0004 n_embd, so the untrained loss is
        about 0.0002 n_embd above ln(vocab_size). A tied model adds to that where its state still
        resembles the embedding of the token just read, which it then predicts again: with scaled
        embeddings, and in wide post-norm models of few tokens."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
        if self.config.positions == "sinusoidal":
            self.wpe.weight.copy_(sinusoids(*self.wpe.weight.shape)).requires_grad_(False)

    def hidden(self, idx, cache=None):
        """(B, T) ids -> (B, T, C), normalized: what the output layer reads. With a cache, idx
        follows the tokens in it, and joins them."""
        start, T = (cache.length if cache else 0), idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit a context of {self.config.block_size}"
                             f", crop them to the last block_size")
        x = self.drop(self.wte(idx) * self.embedding_scale + self.wpe.weight[start:start + T])
        layerdrop = self.config.layerdrop if self.training else 0.0
        for layer, block in enumerate(self.h):
            if layerdrop and torch.rand(()) < layerdrop:
                continue
            x = block(x, partial(cache.append, layer) if cache else None)
        if cache:
            cache.length += T
        return self.ln_f(x)

    step = hidden  # of one token: all that writing repeats, and what sample.py compiles

    def forward(self, idx, targets=None):
        """(B, T) ids -> logits (B, T, V) and, with targets (B, T), the mean loss in nats per token.
        A target of -1 is not counted."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        smoothing = self.config.label_smoothing if self.training else 0.0
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten(), smoothing)

    def num_params(self):
        """Trained parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def flops_per_token(self):
        """Floating point operations to train on one token, forward (1/3) and backward (2/3), at
        full context: 6 per matrix weight, 12 C T per layer for attention (PaLM, appendix B)."""
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    # ---- generation ----

    @torch.inference_mode()
    def next_logits(self, idx, cache):
        """(B, T) ids -> (B, V) float logits of the token after them. Only what the cache has not
        seen of idx is computed: one token a call. Where block_size tokens are in it and more come,
        the last half of block_size is read anew, so that a token sees at least that many before
        it, and the work for each stays the same; a first idx is cropped to block_size."""
        room = self.config.block_size
        if idx.shape[1] - cache.start > room:
            cache.start = idx.shape[1] - (max(1, room // 2) if cache.length else room)
            cache.length = 0
        new = idx[:, cache.start + cache.length:]
        read = self.step if new.shape[1] == 1 else self.hidden
        return self.lm_head(read(new, cache)[:, -1]).float()

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, generators=None, eot=None, vocab_size=None, **filters):
        """Yields (B, 1) ids that continue (B, T) ids, up to max_new_tokens times, drawn by
        filter_logits(**filters), each row from its own of generators (torch's own without). A row
        that has written eot goes on with it; where all have, the stream ends. No id is vocab_size
        or above."""
        cache = KVCache(self.config, len(idx), self.wte.weight)
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        with evaluating(self):
            for _ in range(max_new_tokens):
                logits = self.next_logits(idx, cache)[:, :vocab_size]
                ids = draw(filter_logits(logits, idx, **filters), generators)
                if eot is not None:
                    ids = ids.masked_fill(ended, eot)
                    ended |= ids == eot
                yield ids
                if ended.all():
                    return
                idx = torch.cat((idx, ids), dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """(B, T) ids and up to max_new_tokens more, all at once; options are those of stream."""
        options |= {"temperature": temperature, "top_k": top_k or 0}
        return torch.cat((idx, *self.stream(idx, max_new_tokens, **options)), dim=1)

    @torch.no_grad()
    def beam_search(self, idx, max_new_tokens, num_beams, length_penalty=1.0, eot=None,
                    vocab_size=None):
        """(1, T) ids and what follows them with the largest log-probability divided by its length
        to the power of length_penalty, among what num_beams partial texts at a time lead to."""
        cache = KVCache(self.config, num_beams, self.wte.weight)
        rows = idx.repeat(num_beams, 1)
        scores = torch.full((num_beams, 1), -math.inf, device=idx.device)
        scores[0] = 0.0  # all rows are the same yet
        done = []        # (score, row) of the best num_beams that have ended
        for length in range(1, max_new_tokens + 1):
            with evaluating(self):
                logits = self.next_logits(rows, cache)[:, :vocab_size]
            total = scores + logits.log_softmax(dim=-1)                              # (beams, V)
            best, at = total.flatten().topk(min(2 * num_beams, total.numel()))
            source, token = at // total.shape[1], at % total.shape[1]
            found = torch.cat((rows[source], token[:, None]), dim=1)
            going = token != (-1 if eot is None else eot)
            if length == max_new_tokens:
                going[:] = False
            done += [(best[i].item() / length ** length_penalty, found[i])
                     for i in range(min(num_beams, len(best))) if not going[i]]
            done = sorted(done, key=lambda pair: -pair[0])[:num_beams]
            keep = going.nonzero()[:num_beams, 0]
            if len(keep) < num_beams or (len(done) == num_beams and done[-1][0] >=
                                         best[keep[0]].item() / length ** length_penalty):
                break
            rows, scores = found[keep], best[keep, None]
            cache.reorder(source[keep])
        return done[0][1][None] if done else idx


@contextmanager
def evaluating(model):
    """Without dropout inside; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class KVCache:
    """Keys and values of the tokens a model has read, two (B, H, block_size, D) for each layer, in
    the type and on the device of like. start: where in its text the first of them stands."""

    def __init__(self, config, rows, like):
        shape = rows, config.n_head, config.block_size, config.n_embd // config.n_head
        self.layers = [(like.new_empty(shape), like.new_empty(shape))
                       for _ in range(config.n_layer)]
        self.start = self.length = 0

    def append(self, layer, q, k, v):
        """Writes a layer's new k and v, (B, H, T, D); returns all there are, (B, H, S, D)."""
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def reorder(self, rows):
        """Row i goes on from what row rows[i] has read."""
        for kept in chain.from_iterable(self.layers):
            kept[:, :, :self.length] = kept[rows, :, :self.length]


class AttentionMaps:
    """In the place of a cache: keeps no token, but the weights of each layer, (B, H, T, T), which
    the kernel that is used may never hold."""

    def __init__(self):
        self.layers, self.length = [], 0

    def append(self, layer, q, k, v):
        self.layers.append(attention_weights(q, k).unflatten(0, q.shape[:2]))
        return k, v


def filter_logits(logits, seen=None, repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0,
                  min_p=0.0):
    """(B, V) logits -> (B, V), -inf for what must not be drawn, in this order: ids in seen (B, T)
    made less likely (Keskar et al. 2019); temperature, 0 keeps only the likeliest; exactly the
    top_k likeliest (0: all); the fewest whose probabilities reach top_p (Holtzman et al. 2020);
    those with at least min_p times the largest probability (Nguyen et al. 2024)."""
    if repetition_penalty != 1:
        old = logits.gather(1, seen)
        old = torch.where(old < 0, old * repetition_penalty, old / repetition_penalty)
        logits = logits.scatter(1, seen, old)
    top_k = min(top_k, logits.shape[1]) if temperature else 1
    logits = logits / (temperature or 1.0)
    if top_k:
        kept, ids = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, ids, kept)
    if top_p < 1:
        probs, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what comes before it is enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, ids, beyond), -math.inf)
    if min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)
    return logits


def draw(logits, generators=None):
    """(B, V) logits -> (B, 1) ids by their softmax: where a uniform random number, one from each
    row's generator, falls among the probabilities laid end to end."""
    numbers = [torch.rand(1, generator=g) for g in generators or [None] * len(logits)]
    ends = logits.softmax(dim=-1).cumsum(dim=-1)
    at = torch.stack(numbers).to(logits.device) * ends[:, -1:] * (1 - 1e-6)  # before the last end
    return torch.searchsorted(ends, at, right=True)


# ---- checkpoints ----

@contextmanager
def atomic_write(path):
    """A binary file to write; path is replaced once it is whole and on disk, and only then."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, tokenizer, **training):
    """Writes the model, its tokenizer and the state of training (tensors and plain values)."""
    with atomic_write(path) as file:
        torch.save({"config": asdict(model.config), "tokenizer": tokenizer.spec,
                    "model": model.state_dict(), **training}, file)


def model_from(config, weights):
    """A GPT with these weights, {name: tensor}. Raises ValueError where they are not what config
    asks for, before it takes the memory that config asks for."""
    if config.n_layer > len(weights):
        raise ValueError("it has fewer weights than layers")
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: w.shape for name, w in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        w = weights.get(name)
        if w is None or w.shape != expected.get(name) or not w.is_contiguous():
            raise ValueError(f"its weights are not those of its config: {name} is "
                             + ("missing" if w is None else f"of shape {tuple(w.shape)}"
                                if name in expected else "not among them"))
    # Assigned, not copied, which would take the memory twice.
    model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    if config.tied:
        model.lm_head.weight = model.wte.weight
    return model


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote, "model" a GPT on device in eval mode, "tokenizer" a tokenizer.
    Raises ValueError or OSError; nothing in the file can run code."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint, python train.py makes one")
    others = sorted(other.name for other in path.parent.glob("*.pt") if other != path)
    remedy = f"try --checkpoint={' or '.join(others)}" if others else "train again"
    try:
        checkpoint = read_archive(path, device)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a checkpoint of train.py, {remedy} "
                         f"({error})") from error
    try:
        tokenizer = tokenizer_from(checkpoint["tokenizer"])
        config = GPTConfig(**checkpoint["config"])
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError("its tokenizer has more tokens than its model")
        model = model_from(config, checkpoint["model"]).to(device).eval()
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold a model of this project, {remedy} "
                         f"({type(error).__name__}: {reason})") from error
    return checkpoint | {"model": model, "tokenizer": tokenizer}


def read_archive(path, device="cpu"):
    """What torch.save wrote of tensors and plain values. Raises ValueError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load skips the CRC of each member, and takes one with attributes for a folder.
            if archive.testzip() or any(info.external_attr for info in archive.infolist()):
                raise ValueError
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # there is no one exception for a file that is damaged
        raise ValueError(type(error).__name__) from error


# ---- weights in and out, as transformers, the Hugging Face Hub and nanoGPT keep them ----

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Parameters have GPT-2's names; these matrices it keeps as (in, out), torch.nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}  # transformers' names
# What else a GPT2Config may say, and what it must be for the formulas to be ours.
ASSUMED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
           "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
GPT2_FILES = ("config.json", "model.safetensors")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_source(name, *others):
    """Raises ValueError where name is none of others and nothing that load_pretrained takes."""
    if name not in (*others, *PRETRAINED) and not os.path.exists(name):
        raise ValueError(f"--init_from must be {', '.join((*others, *PRETRAINED))}, a .pt file, or "
                         f"a folder with config.json and model.safetensors, not {name!r}")


def load_pretrained(source, cache_dir, **changes):
    """(GPT in eval mode, tokenizer): gpt2, gpt2-medium, ... from the Hugging Face Hub by way of
    cache_dir, a folder as write_pretrained makes it, or a .pt file of ours or nanoGPT's. changes
    replace what its config says, block_size by one no larger. Raises ValueError or OSError."""
    folder = Path(cache_dir, source) if source in PRETRAINED else Path(source)
    if source in PRETRAINED:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        for name in GPT2_FILES:
            if not (folder / name).is_file():
                download([f"{hub}/openai-community/{source}/resolve/main/{name}"], folder / name,
                         "give --init_from=FOLDER with config.json and model.safetensors")
    read = read_pt if folder.suffix == ".pt" else read_gpt2
    try:
        config, weights, spec = read(folder)
        if changes.get("block_size", 0) > config.block_size:
            raise ValueError(f"its context is {config.block_size} tokens, give --block_size="
                             f"{config.block_size} or less")
        config = replace(config, **changes)
        weights["wpe.weight"] = weights["wpe.weight"][:config.block_size]
        model, tokenizer = model_from(config, weights).eval(), tokenizer_from(spec)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"it has {config.vocab_size:,} tokens, and its tokenizer, "
                             f"{spec['kind']}, {tokenizer.vocab_size:,}")
        return model, tokenizer
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        again = ", remove it to fetch it again" if source in PRETRAINED else ""
        raise ValueError(f"{folder} cannot be used: {reason}{again}") from error


def read_gpt2(folder):
    """(GPTConfig, weights, tokenizer's spec) of a folder with config.json and model.safetensors."""
    for name in GPT2_FILES:
        if not (folder / name).is_file():
            raise ValueError(f"it has no {name}")
    found = json.loads(read_text(folder / "config.json"))
    for name, value in ASSUMED.items():
        if found.get(name, value) != value:
            raise ValueError(f"its {name} is {found[name]!r}, only {value!r} is GPT-2's")
    activation = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    config = GPTConfig(
        found["n_positions"], found["vocab_size"], found["n_layer"], found["n_head"],
        found["n_embd"], found.get("n_inner") or 0, found.get("resid_pdrop", 0.1),
        activation=activation[found.get("activation_function", "gelu_new")],
        tied=found.get("tie_word_embeddings", True))
    weights = {}
    for name, w, spec in read_safetensors(folder / "model.safetensors"):
        name = name.removeprefix("transformer.")
        if name in weights:
            raise ValueError(f"it has {name} twice")
        w = w.T if name.endswith(TRANSPOSED) else w
        weights[name] = torch.empty(w.shape).copy_(w)
    if config.tied:
        weights["lm_head.weight"] = weights["wte.weight"]
    return config, weights, spec


def read_safetensors(path):
    """Yields (name, tensor until the next, tokenizer's spec): 8 bytes of length, a JSON header so
    long, the numbers it tells of. It is checked before the first, and that each is finite."""
    def need(true, what):
        if not true:
            raise ValueError(f"{path.name} is damaged or made otherwise ({what}), fetch it again")

    with open(path, "rb") as file:
        begin, size = 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size
        need(8 < begin <= min(size, 2 ** 27), "its header does not end")
        header = json.loads(file.read(begin - 8))
        spec = json.loads(header.pop("__metadata__", {}).get("tokenizer", '{"kind": "gpt2"}'))
        end, entries = 0, []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            need(first == end <= last, f"{name} overlaps another or leaves a gap")
            end = last
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # masks, which some versions keep among the weights
            kind, shape = FLOATS.get(entry["dtype"]), entry["shape"]
            need(kind, f"{name} is of type {entry['dtype']}")
            need(shape and all(type(n) is int and n > 0 for n in shape), f"{name} has no shape")
            need(last - first == math.prod(shape) * kind.itemsize, f"{name} has not its size")
            entries.append((name, kind, shape, first))
        need(begin + end == size, "it is cut short or goes on")
        sizes = [math.prod(shape) * kind.itemsize for _, kind, shape, _ in entries]
        place = torch.empty(max(sizes, default=0), dtype=torch.uint8)  # of one after another
        for (name, kind, shape, first), n in zip(entries, sizes):
            file.seek(begin + first)
            file.readinto(place[:n].numpy())
            w = place[:n].view(kind).view(shape)
            need(torch.stack(w.aminmax()).isfinite().all(), f"{name} is not finite")
            yield name, w, spec


def read_pt(path):
    """The same of a checkpoint of ours, or of nanoGPT's, whose GELU is the exact one."""
    saved = read_archive(path)
    if "model_args" not in saved:
        return GPTConfig(**saved["config"]), saved["model"], saved["tokenizer"]
    args, text = saved["model_args"], Path("data", saved["config"]["dataset"], "meta.json")
    config = GPTConfig(activation="gelu_erf", **{name: args[name] for name in (
        "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")})
    spec = {"kind": "gpt2"}  # of 50,257 tokens, which nanoGPT rounds up
    if config.vocab_size < 50257:
        if not text.is_file():
            raise ValueError(f"it does not hold its characters, prepare {text.parent} here first")
        spec = json.loads(read_text(text))["tokenizer"]
    weights = {name.removeprefix("_orig_mod.").removeprefix("transformer."): w.float()
               for name, w in saved["model"].items() if not name.endswith(".attn.bias")}
    return config, weights, spec


def write_pretrained(model, tokenizer, folder):
    """Writes config.json, model.safetensors and, of byte-pair tokens, tokenizer.json, as
    transformers' AutoModelForCausalLM and AutoTokenizer load them. Raises ValueError for what a
    GPT2Config cannot say. Biases that the model has not are written as zeros."""
    c = model.config
    if c.norm != "pre" or c.positions != "learned":
        raise ValueError("transformers' GPT-2 has neither norm=post nor positions=sinusoidal")
    with torch.device("meta"):
        names = GPT(replace(c, bias=True, qkv_bias=True)).state_dict()
    own, weights = model.state_dict(), {}
    for name, expected in names.items():
        w = own[name].float().cpu() if name in own else torch.zeros(expected.shape)
        weights[f"transformer.{name}"] = w.T if name.endswith(TRANSPOSED) else w
    head = weights.pop("transformer.lm_head.weight")
    if not c.tied:
        weights["lm_head.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", weights, tokenizer.spec)
    settings = ASSUMED | {
        "architectures": ["GPT2LMHeadModel"], "activation_function": ACTIVATIONS[c.activation],
        "n_positions": c.block_size, "vocab_size": c.vocab_size, "n_layer": c.n_layer,
        "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_inner or None,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "tie_word_embeddings": c.tied, "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    files = {"config.json": settings}
    if isinstance(tokenizer, BPETokenizer):
        files["tokenizer.json"] = tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size,
            "bos_token": EOT, "eos_token": EOT, "clean_up_tokenization_spaces": False}
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())


def write_safetensors(path, weights, spec):
    """Writes {name: tensor} as float32, in the order of their names, and a tokenizer's spec."""
    header, end = {"__metadata__": {"format": "pt", "tokenizer": json.dumps(spec)}}, 0
    for name, w in sorted(weights.items()):
        header[name] = {"dtype": "F32", "shape": list(w.shape),
                        "data_offsets": [end, end + 4 * w.numel()]}
        end += 4 * w.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, w in sorted(weights.items()):
            file.write(w.contiguous().numpy().data)


# ---- downloads ----

def sha256_of(path):
    """Hexadecimal digest of a file, "" where there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(urls, path, remedy, sha256="", limit=0, tries=4, wait=1.0, timeout=20):
    """Fetches a file to path from the first of urls that serves it whole, with this sha256 (or the
    one the Hugging Face Hub states in X-Linked-Etag). A broken transfer goes on where it stopped,
    at path.part; after tries rounds that brought nothing, wait, 2 * wait, ... seconds apart, raises
    OSError with what each url answered, and the remedy. With limit, that many bytes are enough and
    stay at path.part. Returns the path of what there is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if 0 < limit <= size_of(part):
        return part
    answers, failures = {}, 0
    while failures < tries:
        if answers:
            time.sleep(wait * 2 ** max(0, failures - 1))
        before = size_of(part)
        for url in urls:
            try:
                total, stated = fetch(url, part, limit, timeout)
            except requests.RequestException as error:
                failed = error.response is None
                answers[url] = type(error).__name__ if failed else error.response.status_code
                continue
            have = size_of(part)
            if 0 < limit <= have != total:
                return part
            if have < total:
                answers[url] = f"{have:,} of {total:,} bytes"
                continue
            if have == (total or have) and (sha256 or stated) in ("", sha256_of(part)):
                os.replace(part, path)
                return path
            answers[url] = "a file of another size or sha256"
            part.unlink()
        failures = 0 if size_of(part) > before else failures + 1
    raise OSError(f"{path.name} could not be downloaded ("
                  + "; ".join(f"{url}: {answer}" for url, answer in answers.items())
                  + f"), try again or {remedy}")


def fetch(url, part, limit, timeout):
    """Appends to part what it still lacks of url, up to limit bytes; a server that cannot resume
    sends the whole. Returns the file's size and sha256, as far as the server states them."""
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have or limit:
        headers["Range"] = f"bytes={have}-{limit - 1 if limit else ''}"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        stated = [one.headers.get("X-Linked-Etag", "").strip('"') for one in answer.history]
        sha256 = next((tag for tag in stated if len(tag) == 64), "")
        if have and answer.status_code == 416:  # nothing lies beyond what we have
            return have, sha256
        answer.raise_for_status()
        span, _, total = answer.headers.get("Content-Range", "").partition("/")
        total = int(total if total.isdigit() else answer.headers.get("Content-Length", 0))
        with open(part, "ab" if span.startswith(f"bytes {have}-") else "wb") as file:
            for chunk in answer.iter_content(1 << 14):
                file.write(chunk)
                show_progress(f"{part.stem}: {file.tell() / 1e6:,.1f} of {total / 1e6:,.1f} MB")
                if 0 < limit <= file.tell():
                    break
            show_progress("")
    return total, sha256


def size_of(path):
    return path.stat().st_size if path.exists() else 0


# ---- the machine ----

def show_progress(text):
    """Puts text in the place of the one before, where stderr is a terminal; "" clears it."""
    if sys.stderr.isatty():
        print(f"\r{text:<79.79}", end="" if text else "\r", file=sys.stderr, flush=True)


def pick_device(name):
    """The torch device of a setting; auto: CUDA, else MPS, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(found.type if found and found.type in ("cuda", "mps") else "cpu")
    try:
        if torch.device(name).type in ("cpu", "cuda", "mps"):
            return torch.empty(0, device=name).device
        raise RuntimeError
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here, try auto or cpu") from error


def compiled(function, wanted, device, trial, **options):
    """torch.compile(function) where wanted, auto (on CUDA) or true, and where trial, called with
    it, succeeds; else function."""
    if not {"auto": device.type == "cuda", "true": True, "false": False}[wanted]:
        return function
    try:
        faster = torch.compile(function, **options)
        trial(faster)
        return faster
    except RuntimeError as error:  # what torch.compile's errors have in common
        print(f"torch.compile does not work here ({type(error).__name__}), going on without it",
              file=sys.stderr)
        return function


# ---- tokenizers: encode(text) -> ids, decode(ids) -> text, vocab_size, eot, spec (plain JSON) ----

EOT = "<|endoftext|>"  # how text writes eot, the id that ends a story

# What a byte-pair token of our own never reaches across: a word with the blank before it, a digit,
# a run of punctuation, one of line ends, any other blank.
PIECES = r" ?[^\W\d_]+(?:'[^\W\d_]+)*| ?\d| ?(?:[^\s\w]|_)+|\n+|\s"


def token_dtype(vocab_size):
    """The narrowest type that ids are stored in."""
    return np.uint16 if vocab_size <= 2 ** 16 else np.uint32


class CharTokenizer:
    """One id for each character of vocabulary, a sorted string. If that holds U+0003, which ASCII
    calls end of text, it is eot."""

    def __init__(self, vocabulary):
        if not vocabulary or list(vocabulary) != sorted(set(vocabulary)):
            raise ValueError("a character vocabulary must be one sorted string without repeats")
        self.spec = {"kind": "char", "vocabulary": vocabulary}
        self.vocab_size = len(vocabulary)
        self.ids = {character: i for i, character in enumerate(vocabulary)}
        self.eot = self.ids.get("\3")
        # Sorted, ASCII comes first: its ids fit in a byte, and 255 is free to say unknown.
        self.ascii = bytes(self.ids.get(chr(i), 255) for i in range(128)).ljust(256, b"\xff")

    def encode(self, text):
        """ASCII goes through a translation table, far faster than a list comprehension; the other
        characters are looked up one by one."""
        if self.eot is not None:
            text = text.replace(EOT, "\3")
        narrow, doubt = self.vocab_size <= 256, False
        ids = np.empty(len(text), np.uint8 if narrow else token_dtype(self.vocab_size))
        view = memoryview(ids)
        for at in range(0, len(text), 8192):  # what stays in the cache
            some = text[at:at + 8192]
            plain = some.encode("ascii", "replace")  # any other character becomes a "?"
            known = plain.translate(self.ascii)
            doubt |= b"\xff" in known  # an unknown character, or an unknown "?"
            known = known if narrow else np.frombuffer(known, np.uint8).astype(ids.dtype)
            view[at:at + len(known)] = known
            mark = -1 if some.isascii() else plain.find(b"?")
            while mark >= 0:
                view[at + mark] = self.ids.get(some[mark], 0)
                doubt |= some[mark] not in self.ids
                mark = plain.find(b"?", mark + 1)
        unknown = (i for i, character in enumerate(text) if character not in self.ids)
        if doubt and (at := next(unknown, None)) is not None:
            raise ValueError(f"{text[at]!r} (U+{ord(text[at]):04X}, character {at + 1} of the "
                             f"text) is not among the vocabulary's {self.vocab_size} characters, "
                             f"leave it out or use data prepared with --tokenizer=byte")
        return ids

    def decode(self, ids):
        return "".join(self.spec["vocabulary"][i] for i in ids).replace("\3", EOT)


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text, no vocabulary to learn. eot is 255, no byte of UTF-8."""
    eot = 255
    vocab_size = 256
    spec = {"kind": "byte"}

    def encode(self, text):
        raw = text.encode("utf-8", "surrogateescape").replace(EOT.encode(), b"\xff")
        return np.frombuffer(raw, np.uint8)

    def decode(self, ids):
        raw = np.asarray(ids, dtype=np.uint8).tobytes()
        return raw.replace(b"\xff", EOT.encode()).decode("utf-8", "replace")


class BPETokenizer:
    """Byte-pair tokens (Sennrich et al. 2016), run by tiktoken: GPT-2's 50,257, which it downloads
    once, or our own, of which spec lists what prepare_tinystories.py has learned."""

    def __init__(self, spec):
        self.spec = spec
        self.encoding = gpt2_encoding() if spec["kind"] == "gpt2" else own_encoding(spec["tokens"])
        self.eot = self.encoding.eot_token
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        return self.encoding.encode_to_numpy(text, allowed_special="all")

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])


def gpt2_encoding():
    """A tiktoken.Encoding to itself: those that get_encoding hands out share their scratch space,
    which threads then queue for."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' errors are OSErrors
        raise ConnectionError(f"GPT-2's tokenizer could not be downloaded, connect once or let "
                              f"TIKTOKEN_CACHE_DIR name a folder that holds it "
                              f"({type(error).__name__})") from error
    return tiktoken.Encoding("gpt2", pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                             special_tokens=gpt2._special_tokens)


def own_encoding(tokens):
    """The 256 bytes, then tokens in the order they were learned, each a string that stands for its
    bytes in Latin-1, then EOT."""
    known = [bytes([i]) for i in range(256)] + [token.encode("latin-1") for token in tokens]
    if len(set(known)) < len(known):
        raise ValueError("a byte-pair vocabulary must not repeat a token")
    return tiktoken.Encoding("bpe", pat_str=PIECES, special_tokens={EOT: len(known)},
                             mergeable_ranks={token: rank for rank, token in enumerate(known)})


def tokenizer_json(tokenizer):
    """A byte-pair tokenizer in the form of Hugging Face's tokenizers, which writes bytes as
    printable characters and lists the pairs that are merged, where tiktoken has ranks."""
    ranks = tokenizer.encoding._mergeable_ranks
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def shown(token):
        return "".join(letters[b] for b in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # by the pairs that came before it, it is down to its own pair
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            at = pairs.index(min(pairs))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([*map(shown, parts)])
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    gpt2 = tokenizer.spec["kind"] == "gpt2"
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated",
             "invert": False}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [{"id": tokenizer.eot, "content": EOT, "single_word": False,
                              "lstrip": False, "rstrip": False, "normalized": False,
                              "special": True}],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                *([] if gpt2 else [split]), bytes_only | {"use_regex": gpt2}]},
            "post_processor": None, "decoder": bytes_only | {"use_regex": False},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {shown(t): r for t, r in ranks.items()} | {EOT: tokenizer.eot},
                      "merges": merges}}


def tokenizer_from(spec):
    """The tokenizer that wrote spec, as a dataset's meta.json and a checkpoint hold it."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "char" and isinstance(spec.get("vocabulary"), str):
        return CharTokenizer(spec["vocabulary"])
    if kind == "byte":
        return ByteTokenizer()
    tokens = spec.get("tokens") if kind == "bpe" else None
    if kind == "gpt2" or isinstance(tokens, list) and all(isinstance(t, str) for t in tokens):
        return BPETokenizer(spec)
    raise ValueError("a tokenizer's spec must be of kind char (with its vocabulary), byte, gpt2 "
                     "or bpe (with its tokens)")


def read_text(path):
    """The text of a UTF-8 file. Raises OSError or ValueError."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, give the path of a UTF-8 text") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}, convert it first, "
                         f"as iconv does") from None


def encode_prompt(tokenizer, start):
    """(1, T) ids to go on from: of start, or of the file that FILE:path names. An empty text begins
    at end-of-text, where the tokenizer has one. Raises OSError or ValueError."""
    text = read_text(start[5:]) if start.startswith("FILE:") else start
    ids = tokenizer.encode(text).tolist() or ([] if tokenizer.eot is None else [tokenizer.eot])
    if not ids:
        raise ValueError("--start is empty, give at least one character to go on from")
    return torch.tensor([ids])
