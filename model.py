"""GPT-2 in one file, to be read from the top: the network, then how it writes text. Below a
line that says so stand files, tokenizers and speed.

    text -> ids (B, T) -> embeddings (B, T, C) -> n_layer x Block -> (B, T, C) -> logits (B, T, V)

B batch, T tokens, S tokens seen so far (T, or more with a cache), C channels (n_embd), H heads,
D channels of a head (C / H), V vocabulary. Modules are named as GPT-2's weights are:

    wte, wpe          embeddings: of the tokens, of the positions
    h                 the blocks, in each: ln_1, attn, ln_2, mlp
    ln_1, ln_2, ln_f  LayerNorm before attention, before the MLP, after the last block
    c_attn, c_proj    linear layers of attention: to queries, keys and values; back to C
    c_fc, c_proj      linear layers of the MLP: up to 4C channels; back to C
    lm_head           the output layer: to a logit for each token of the vocabulary

Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
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
    n_inner: int = 0               # width of the MLP; 0: 4 * n_embd
    dropout: float = 0.0
    attn_dropout: bool = True      # of the attention weights, too
    bias: bool = True              # in Linear and LayerNorm; False is a little faster
    qkv_bias: bool = True          # in the query, key and value projection; needs bias
    positions: str = "learned"     # or sinusoidal
    scale_embedding: bool = False  # token embeddings * sqrt(n_embd), for sinusoidal positions
    activation: str = "gelu"       # GPT-2's tanh form, gelu_erf (the exact one) or relu
    norm: str = "pre"              # LayerNorm before attention and MLP, or post: after their sums
    tied: bool = True              # the output layer shares the token embedding's matrix
    fused: bool = True             # torch's fused kernels; False: the formulas below
    label_smoothing: float = 0.0   # in the training loss, never in evaluation
    layerdrop: float = 0.0         # chance to skip a block in training (Fan et al. 2019)

    def __post_init__(self):
        check_config(self)

# ---- the formulas; torch's fused kernels compute the same, faster ----

def layer_norm(x, shape, weight, bias=None, eps=1e-5):
    """Gives each token's channels mean 0 and variance 1, then scales and shifts them (Ba et
    al. 2016). shape goes unused: the arguments are those of F.layer_norm."""
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    return x if bias is None else x + bias

def gelu(x):
    """GPT-2's form of x Phi(x), Phi(x) = P(N(0, 1) <= x) (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

def causal_mask(q, k):
    """(T, S): 0 where one of T tokens, the last of S, may look, else -inf: e^-inf = 0."""
    T, S = q.shape[2], k.shape[2]
    return q.new_full((T, S), -math.inf).triu(S - T + 1)

def attention_weights(q, k, mask=None):
    """softmax(Q K^T / sqrt(D) + mask): how much each of T tokens, the last of S, looks at each
    of S (Vaswani et al. 2017). (B, H, T, D) and (B, H, S, D) -> (B, H, T, S)."""
    mask = causal_mask(q, k) if mask is None else mask
    return (q @ k.mT / math.sqrt(q.shape[3]) + mask).softmax(dim=-1)  # a sum of D products grows so

def attention(q, k, v, dropout=nn.Identity(), mask=None):
    """softmax(Q K^T / sqrt(D) + mask) V: for each token a mean of the values, by its weights.
    (B, H, T, D) and twice (B, H, S, D) -> (B, H, T, D)."""
    return dropout(attention_weights(q, k, mask)) @ v

def sinusoids(T, C):
    """The (T, C) positions of Vaswani et al. 2017, section 3.5: sin(t / 10000^(i / C)) in the
    even columns i, the cosine beside it in i + 1."""
    angles = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, C, 2) / C)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :C]

ACTIVATIONS = {  # name: (formula, fused kernel)
    "gelu": (gelu, partial(F.gelu, approximate="tanh")),
    "gelu_erf": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    "relu": (torch.relu, torch.relu),
}
CHOICES = {"positions": ("learned", "sinusoidal"), "norm": ("pre", "post"),
           "activation": ACTIVATIONS}

# ---- the network; Dropout is torch's, made faster near the end of this file ----

class LayerNorm(nn.Module):
    """Keeps each token's numbers in one range: (x - mean) / std * weight + bias."""
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))  # one gain for each channel
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.normalize = F.layer_norm if config.fused else layer_norm

    def forward(self, x):
        return self.normalize(x, self.weight.shape, self.weight, self.bias)

class CausalSelfAttention(nn.Module):
    """Where tokens learn from each other: each takes a mean of the values of the tokens up to
    it, weighted by how well their keys fit its query. H heads do so, each in D channels."""
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout * config.attn_dropout)  # of weights (T, S)
        self.resid_dropout = Dropout(config.dropout)         # of c_proj's output
        self.n_head, self.layer = config.n_head, layer
        self.attention = fused_attention if config.fused else attention

    def forward(self, x, cache=None, maps=None):
        B, T, C = x.shape

        # Queries, keys and values of all heads in one product, then head by head.
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, H, T, D) each

        # When text is written, the cache holds the keys and values of earlier tokens.
        if cache is not None:
            k, v = cache.append(self.layer, k, v)            # (B, H, S, D)
        mask = None if cache is None else cache.mask         # None: the causal one
        if maps is not None:
            maps.append(attention_weights(q, k, mask))       # (B, H, T, S), for a picture

        y = self.attention(q, k, v, self.attn_dropout, mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)               # the heads side by side again
        return self.resid_dropout(self.c_proj(y))            # c_proj mixes them

class MLP(nn.Module):
    """Where each token is worked on by itself: c_proj(activation(c_fc(x)))."""
    def __init__(self, config):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd          # as GPT-2, room for more features
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation][config.fused]  # of a pair, 0 or 1

    def forward(self, x):
        x = self.activation(self.c_fc(x))                    # (B, T, 4C)
        return self.dropout(self.c_proj(x))                  # (B, T, C)

class Block(nn.Module):
    """Attention, then the MLP. Each adds its output to x, the residual stream, which leads
    from the embeddings to lm_head and gives the gradient a way back past every layer."""
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.pre_norm = config.norm == "pre"

    def forward(self, x, cache=None, maps=None):
        if self.pre_norm:                                    # GPT-2
            x = x + self.attn(self.ln_1(x), cache, maps)
            x = x + self.mlp(self.ln_2(x))
        else:                                                # GPT-1 and the first Transformer
            x = self.ln_1(x + self.attn(x, cache, maps))
            x = self.ln_2(x + self.mlp(x))
        return x

class GPT(nn.Module):
    """Predicts each next token: logits, loss = GPT(GPTConfig())(ids, targets)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a row (C,) for each token
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # and one for each position
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # The last post-norm block has normalized its output already.
        self.ln_f = LayerNorm(config) if config.norm == "pre" else nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight            # one matrix for in and out
        self.init_weights()

    def forward(self, ids, targets=None):
        """(B, T) ids -> logits (B, T, V) and, with targets (B, T), the mean loss in nats per
        token. A target of -1 does not count."""
        states = self.hidden(ids)
        return (self.lm_head(states), None) if targets is None else self.score(states, targets)

    def score(self, states, targets):
        """states (B, T, C) of hidden(), targets (B, T) -> logits (B, T, V), mean loss.
        Compiled, only the loss has a gradient: that of the logits would be gigabytes of 0."""
        logits = self.lm_head(states)                        # (B, T, V): scores of each next token
        smoothing = self.config.label_smoothing * self.training  # 0 in evaluation
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), smoothing)
        return logits.detach() if torch.compiler.is_compiling() else logits, loss

    def hidden(self, ids, cache=None, maps=None, states=None):
        """(B, T) ids -> (B, T, C), what lm_head reads. With a cache, ids follow the tokens in
        it, and join them. The list maps receives the attention weights of each layer, states
        the residual stream (B, T, C) before the first block and after each."""
        past, T = (0 if cache is None else cache.length), ids.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit a context of "
                             f"{self.config.block_size}, crop them to the last block_size")

        x = self.wte(ids)                                    # (B, T, C): what each token is
        if self.config.scale_embedding:                      # or sinusoids would drown it
            x = x * math.sqrt(self.config.n_embd)
        places = torch.arange(T, device=ids.device) if cache is None else cache.places(T)
        x = x + self.wpe(places)                             # and where it stands
        x = self.drop(x)
        layerdrop = self.config.layerdrop * self.training
        for block in self.h:
            if states is not None:
                states.append(x)
            if layerdrop == 0 or torch.rand(()) >= layerdrop:
                x = block(x, cache, maps)                    # (B, T, C)
        if states is not None:
            states.append(x)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)                                  # (B, T, C)

    @torch.no_grad()
    def init_weights(self):
        """Matrices are normal with std 0.02; the 2 n_layer c_proj, whose outputs the residual
        stream adds up, with 0.02 / sqrt(2 n_layer); biases 0; sinusoids fixed. An untrained loss
        is then about ln(vocab_size) + 0.0002 n_embd; more of a tied model with scaled embeddings,
        or post-norm and learned positions: it repeats the last token."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        small = 0.02 / math.sqrt(2 * self.config.n_layer)    # summed, they vary as one of 0.02
        for block in self.h:
            nn.init.normal_(block.attn.c_proj.weight, std=small)
            nn.init.normal_(block.mlp.c_proj.weight, std=small)
        if self.config.positions == "sinusoidal":
            self.wpe.weight.copy_(sinusoids(*self.wpe.weight.shape)).requires_grad_(False)

    def num_params(self):
        """The number of trained parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def flops_per_token(self):
        """Operations to train on one token, forward (1/3) and backward (2/3), at full context:
        6 per matrix weight, 12 C T per layer for attention (PaLM, appendix B)."""
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, **options):
        """(B, T) ids -> these and up to max_new_tokens more, by stream(); eval() first."""
        return torch.cat((ids, *stream(self, ids, max_new_tokens, temperature=temperature,
                                       top_k=top_k, **options)), dim=1)

# ---- writing text ----

class KVCache:
    """The keys and values of the tokens a model has read, so that it reads each new one alone:
    (2, B, H, block_size, D) for each layer, of the type and on the device of like."""
    mask = None    # or one to use instead of causal_mask()
    graphs = True  # use a CudaGraph on a GPU, as token_reader() does
    def __init__(self, config, rows, like):
        shape = 2, rows, config.n_head, config.block_size, config.n_embd // config.n_head
        self.layers = [like.new_empty(shape) for _ in range(config.n_layer)]
        self.length = 0  # tokens in it; GPT.hidden() adds those all layers have got
        self.first = 0   # where in the text the first of them stands
        self.graph = None  # that CudaGraph, once recorded

    def places(self, T):
        """(T,): where in the context the next T tokens go."""
        return torch.arange(self.length, self.length + T, device=self.layers[0].device)

    def append(self, layer, k, v):
        """Stores a layer's new k and v, (B, H, T, D). Returns all, (B, H, S, D) each."""
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

@torch.inference_mode()
def next_logits(model, ids, cache, read_token=None):
    """(B, T) ids -> (B, V) float logits of the token after them. Reads what the cache lacks of
    ids: mostly one token, by read_token (a compiled model.hidden), if given."""
    T, block_size = ids.shape[1], model.config.block_size
    if T - cache.first > block_size:
        # The text has outgrown the context: read its last block_size tokens. In a stream (the
        # cache is not empty) only half as many, so that block_size / 2 more find room.
        kept = max(1, block_size // 2) if cache.length else block_size
        cache.first, cache.length = T - kept, 0
    new = ids[:, cache.first + cache.length:]
    read = model.hidden
    if new.shape[1] == 1:
        read = token_reader(read_token or read, new, cache)
    states = read(new, cache)                                # (B, new tokens, C)
    return model.lm_head(states[:, -1]).float()

def check_finite(logits):
    """Raises ValueError where a logit is NaN or the largest infinite."""
    check(logits.amax().isfinite(), "the model's logits are not finite, try --dtype=float32")

@torch.no_grad()
def stream(model, ids, max_new_tokens, generators=None, eot=None, vocab_size=None,
           read_token=None, **filters):
    """Yields the ids (B, 1) that continue ids (B, T), up to max_new_tokens times: samples of
    filter_logits(**filters) below vocab_size, row i by generators[i], if given. A row that has
    written eot, the end of a text, repeats it; the stream ends when all have. In eval mode."""
    cache = KVCache(model.config, len(ids), model.wpe.weight)
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = next_logits(model, ids, cache, read_token)
        new = sample_ids(filter_logits(logits[:, :vocab_size], ids, **filters), generators)
        check_finite(logits)  # last, as it waits for a GPU, which has all its work by now
        if eot is not None:
            new = new.masked_fill(ended, eot)
            ended |= new == eot
        yield new
        if ended.all():
            return
        ids = torch.cat((ids, new), dim=1)

def filter_logits(logits, seen=None, repetition_penalty=1.0, no_repeat_ngram=0, temperature=1.0,
                  top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """(B, V) logits -> (B, V), -inf for ids that must not be sampled; seen (B, T) is the text.
    Example: of the probabilities (0.5, 0.3, 0.2) top_p=0.6 keeps the first two."""
    if repetition_penalty != 1:  # makes ids that were seen less likely (Keskar et al. 2019)
        old = logits.gather(1, seen)
        old = torch.where(old < 0, old * repetition_penalty, old / repetition_penalty)
        logits = logits.scatter(1, seen, old.nan_to_num())  # not infinite
    if 0 < no_repeat_ngram <= seen.shape[1]:  # bars what would repeat n ids (Paulus et al. 2018)
        spans = seen.unfold(1, no_repeat_ngram, 1)                       # (B, T - n + 1, n)
        again = (spans[:, :, :-1] == spans[:, -1:, 1:]).all(dim=-1)      # those that begin so
        limits = torch.where(again, -math.inf, math.inf).type_as(logits)
        barred = logits.scatter_reduce(1, spans[:, :, -1], limits, "amin")
        left = barred.amax(dim=-1, keepdim=True) > -math.inf
        logits = torch.where(left, barred, logits)
    if temperature > 0:          # above 1 evens the probabilities out, below 1 sharpens them
        logits = logits - logits.amax(dim=-1, keepdim=True)  # so that the likeliest stays finite
        logits = logits / max(temperature, 1e-30)
    else:                        # the likeliest alone
        top_k = 1
    if top_k:                    # keeps exactly the k likeliest
        kept, ids = logits.topk(min(top_k, logits.shape[1]))
        logits = torch.full_like(logits, -math.inf).scatter(1, ids, kept)
    if top_p < 1:                # the fewest that together reach p (Holtzman et al. 2020)
        logits = keep_fewest(logits, top_p, cost=-logits)
    if min_p > 0:                # those with this share of the largest (Nguyen et al. 2024)
        probs = logits.softmax(dim=-1)
        least = min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, -math.inf)
    if typical_p < 1:            # those about as surprising as expected (Meister et al. 2023)
        surprise = -logits.log_softmax(dim=-1)
        entropy = (surprise * logits.softmax(dim=-1)).nansum(dim=-1, keepdim=True)
        logits = keep_fewest(logits, typical_p, cost=(surprise - entropy).abs())
    return logits

def keep_fewest(logits, p, cost):
    """(B, V) logits -> (B, V), -inf but for the fewest ids, the cheapest first, whose
    probabilities add up to p; cost (B, V)."""
    ids = cost.argsort(dim=-1)
    probs = logits.softmax(dim=-1).gather(1, ids)
    beyond = probs.cumsum(dim=-1) - probs >= p  # the cheaper ones are enough
    beyond[:, 0] = False
    return logits.masked_fill(beyond.scatter(1, ids, beyond), -math.inf)  # by id

def sample_ids(logits, generators=None):
    """(B, V) logits -> (B, 1) ids, sampled from their softmax: a uniform random number of each
    row's generator points at one of the probabilities laid end to end."""
    numbers = [torch.rand(1, generator=g) for g in generators or [None] * len(logits)]
    ends = logits.softmax(dim=-1).cumsum(dim=-1)
    points = torch.stack(numbers).to(logits.device) * ends[:, -1:] * (1 - 1e-6)  # < last end
    return torch.searchsorted(ends, points, right=True)  # right: never at a probability of 0

# ======== You have read GPT-2. What follows is files, text and speed. ========

# ---- checkpoints ----

def check(condition, sentence):
    """Raises ValueError, of one sentence with the remedy, unless the condition holds."""
    if not condition:
        raise ValueError(sentence)

def check_config(c):
    """Raises ValueError where no model can have the shape of a GPTConfig."""
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        check(getattr(c, name) >= 1, f"{name} must be at least 1")
    for name in ("dropout", "label_smoothing", "layerdrop"):
        check(0 <= getattr(c, name) < 1, f"{name} must be from 0 to below 1")
    for name, choices in CHOICES.items():
        check(getattr(c, name) in choices,
              f"{name} must be {' or '.join(choices)}, not {getattr(c, name)}")
    check(c.n_embd % c.n_head == 0, "n_embd must be a multiple of n_head")
    check(c.n_inner >= 0, "n_inner must be a width, or 0 for 4 * n_embd")
    check(not c.scale_embedding or c.positions == "sinusoidal",
          "scale_embedding goes with --positions=sinusoidal")

@contextmanager
def reading(path, remedy=""):
    """Turns whatever a wrong file causes inside into a ValueError of one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, FileNotFoundError, LookupError, TypeError, RuntimeError,
            ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())[:300]
        raise ValueError(f"{path} cannot be used: {reason}{remedy}") from error

@contextmanager
def atomic_write(path):
    """A binary file to write to; path is replaced only once it is whole and on disk."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save may turn the one into the other
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} cannot be written ({reason})") from reason
    finally:
        temporary.unlink(missing_ok=True)

def save_checkpoint(path, model, tokenizer, **training):
    """Writes a model, its tokenizer and its training state, of tensors and plain values."""
    with atomic_write(path) as file:
        torch.save({"config": asdict(model.config), "tokenizer": tokenizer.spec,
                    "model": model.state_dict(), **training}, file)

def run_file(run_dir, name):
    """The path of a run's checkpoint, or name itself where it has a folder. last.pt stands in
    for best.pt until the first evaluation has written that."""
    path = Path(name) if "/" in name else Path(run_dir, name)
    last = path.with_name("last.pt")
    return last if path.name == "best.pt" and last.exists() and not path.exists() else path

def load_checkpoint(source, device="cpu", cache_dir="", **changes):
    """{"model": GPT in eval mode, "tokenizer": ..., and what else is in it} of a .pt file, ours
    or nanoGPT's; a folder with GPT-2's two files; or gpt2..., fetched from the Hugging Face Hub
    to cache_dir once. changes replace values of the config. Raises ValueError or OSError."""
    path, remedy = Path(source), ""
    if source in PRETRAINED:
        path, remedy = Path(cache_dir, source), ", remove it to fetch it again"
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        for name in GPT2_FILES:
            if not (path / name).is_file():
                download([f"{hub}/openai-community/{source}/resolve/main/{name}"], path / name,
                         "give --init_from=FOLDER with config.json and model.safetensors")
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint, python train.py makes one")
    elif path.suffix == ".pt":
        others = sorted(p.name for p in path.parent.glob("*.pt") if p != path)
        remedy = f", try --checkpoint={' or '.join(others)}" if others else ", train again"
    with reading(path, remedy):
        check(path.suffix not in (".safetensors", ".bin"), "give the folder that it lies in")
        read = read_gpt2 if path.is_dir() else read_pt
        config, weights, spec, saved = read(path)
    with reading(path):
        check(changes.get("block_size", 0) <= config.block_size,
              f"its context is {config.block_size} tokens, give no larger --block_size")
    with reading(path, remedy):
        model, tokenizer = build(config, weights, spec, **changes)
    return saved | {"model": model.to(device), "tokenizer": tokenizer}

def build(config, weights, spec, **changes):
    """(GPT in eval mode, tokenizer) of a GPTConfig with changes, {name: tensor} and a
    tokenizer's spec. Raises ValueError or RuntimeError where they do not fit together."""
    check(config.n_layer <= len(weights), "it has fewer weights than layers")
    check(all(w.nbytes <= w.untyped_storage().nbytes() for w in weights.values()),
          "its weights are views of fewer numbers")  # a copy could take all memory
    tokenizer = tokenizer_from(spec)
    check(tokenizer.vocab_size <= config.vocab_size, f"it has {config.vocab_size:,} tokens, "
          f"its tokenizer, {spec['kind']}, has {tokenizer.vocab_size:,}")
    config = replace(config, **changes)
    weights = {name.removeprefix("_orig_mod.").removeprefix("transformer."):
               w.float().contiguous() for name, w in weights.items()
               if not name.endswith(".attn.bias")}  # a causal mask
    weights["wpe.weight"] = weights["wpe.weight"][:config.block_size]
    if config.tied:
        weights["lm_head.weight"] = weights["wte.weight"]
    with torch.device("meta"), Unfilled():  # takes no memory
        model = GPT(config)
    model.load_state_dict(weights, assign=True)  # a copy would take the memory twice
    if config.tied:
        model.lm_head.weight = model.wte.weight  # assign has made them two
    return model.eval(), tokenizer

class Unfilled(torch.overrides.TorchFunctionMode):
    """Leaves weights as they are, which nn.init would fill: without memory there is nothing to
    fill, but torch would take a second to import torch.compile's modules for it."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **(kwargs or {}))

def read_pt(path):
    """(GPTConfig, weights, tokenizer's spec, all it holds) of a checkpoint, ours or nanoGPT's.
    Nothing in it can run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load ignores checksums, and takes a member with attributes for a folder.
            attributes = [info.external_attr for info in archive.infolist()]
            check(not archive.testzip() and not any(attributes), "checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # it may be whole
    except Exception as error:  # a damaged file has no one exception
        raise ValueError(f"it is damaged or no checkpoint ({type(error).__name__})") from error
    if "model_args" not in saved:
        return GPTConfig(**saved["config"]), saved["model"], saved["tokenizer"], saved

    shape = {name: value for name, value in saved["model_args"].items()
             if name in GPTConfig.__annotations__}
    config = GPTConfig(**shape, activation="gelu_erf")       # nanoGPT's
    spec = {"kind": "gpt2"}
    if config.vocab_size < 50257:
        folder = Path("data", saved["config"]["dataset"])
        check((folder / "meta.json").is_file(),
              f"it does not hold its characters, prepare {folder} here first")
        spec = json.loads(read_text(folder / "meta.json"))["tokenizer"]
    return config, saved["model"], spec, {}

# ---- the weights of others ----

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_FILES = ("config.json", "model.safetensors")
# These matrices GPT-2 keeps as (in, out), torch.nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "mlp.c_fc.weight")
ACTIVATION_NAMES = {  # transformers': ours
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf",
    "gelu_accurate": "gelu", "gelu_python_tanh": "gelu", "gelu_python": "gelu_erf",
    "relu": "relu"}
# What else a GPT2Config may say, and the value for which the formulas above are right.
ASSUMED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
           "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16}

def read_gpt2(folder):
    """(GPTConfig, weights, tokenizer's spec, {}) of a folder with GPT-2's two files, or with
    shards of the second."""
    check((folder / "config.json").is_file(), "it has no config.json")
    theirs = json.loads(read_text(folder / "config.json"))
    if "n_ctx" in theirs:  # its name in older files
        theirs = {"n_positions": theirs["n_ctx"]} | theirs
    for name, value in ASSUMED.items():
        check(theirs.get(name, value) == value,
              f"its {name} is {theirs.get(name)!r}, only {value!r} is GPT-2's")
    activation = theirs.get("activation_function", "gelu_new")
    config = GPTConfig(
        theirs["n_positions"], theirs["vocab_size"], theirs["n_layer"], theirs["n_head"],
        theirs["n_embd"], theirs.get("n_inner") or 0, theirs.get("resid_pdrop", 0.1),
        activation=ACTIVATION_NAMES.get(activation, activation),
        tied=theirs.get("tie_word_embeddings", True))
    shards, weights, spec = {"model.safetensors"}, {}, None
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        shards = set(json.loads(read_text(index))["weight_map"].values())
    for shard in sorted(shards):
        check((folder / shard).is_file(), f"it has no {shard}, save the model again with "
              f"transformers' save_pretrained(folder, safe_serialization=True)")
        part, metadata = read_safetensors(folder / shard)
        weights |= part
        spec = json.loads(metadata.get("tokenizer", "null"))  # as sample.py exports it
    for name in weights:
        if name.endswith(TRANSPOSED):
            weights[name] = weights[name].T.contiguous()
    return config, weights, read_tokenizer(folder, theirs) if spec is None else spec, {}

def parse_tokenizer_json(saved):
    """(vocabulary, merges, special tokens, pattern that cuts text) of a tokenizer.json that is a
    byte-level BPE like GPT-2's. Raises ValueError for any other."""
    model, added, pieces = saved["model"], saved.get("added_tokens") or [], r50k_pat_str
    no_bpe = "its tokenizer.json is no byte-level BPE like GPT-2's"
    plain_only = [(model, ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                           "byte_fallback")), (saved, ("normalizer",))]
    plain_only += [(token, ("lstrip", "rstrip", "single_word")) for token in added]
    odd = [name for part, names in plain_only for name in names if part.get(name)]
    check(not odd, f"{no_bpe}, which has no {', '.join(odd)}")
    check(model.get("type", "BPE") == "BPE", no_bpe)
    steps = saved["pre_tokenizer"] or {}
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False} as last]:
            check(last.get("use_regex", True), f"{no_bpe}: its tokens cross words")
        case [{"type": "Split", "pattern": {"Regex": pieces}, "behavior": "Isolated",
               "invert": False}, {"type": "ByteLevel", "add_prefix_space": False,
                                  "use_regex": False}]:
            pass
        case _:
            raise ValueError(no_bpe)
    return model["vocab"], model["merges"], {t["content"]: t["id"] for t in added}, pieces

def read_tokenizer(folder, theirs):
    """The spec of the byte-level BPE beside a GPT-2's weights, in tokenizer.json or in vocab.json
    and merges.txt; of GPT-2's own where its config has so many tokens and there is neither."""
    def read(name):
        return json.loads(read_text(folder / name)) if (folder / name).is_file() else {}

    if saved := read("tokenizer.json"):
        vocabulary, merges, special, pieces = parse_tokenizer_json(saved)
    elif (vocabulary := read("vocab.json")) and (folder / "merges.txt").is_file():
        merges = [line for line in read_text(folder / "merges.txt").splitlines()
                  if line and not line.startswith("#version")]
        special, pieces = read("added_tokens.json"), r50k_pat_str
        check(not read("tokenizer_config.json").get("add_prefix_space"), "its tokenizer is no "
              "byte-level BPE like GPT-2's, which puts no blank before a text (add_prefix_space)")
    else:
        check(50257 <= theirs["vocab_size"] <= 50304, "its tokens are not GPT-2's, and it has no "
              "tokenizer.json beside the weights, nor vocab.json and merges.txt")
        return {"kind": "gpt2"}

    names = [*LETTERS, *("".join(pair.split(" ") if isinstance(pair, str) else pair)
                         for pair in merges)]
    names = list(dict.fromkeys(names))                       # tokens in the order of their merges
    known = {*names, *special}
    special |= {name: i for name, i in vocabulary.items() if name not in known}
    check(set(LETTERS) <= vocabulary.keys(), "its tokens lack some of the 256 bytes")
    tokens = [bytes(map(LETTERS.index, name)) for name in names]
    ids = [vocabulary[name] for name in names]
    if (len(tokens) == 50256 and [*special] == [EOT] and pieces == r50k_pat_str
            and dict(zip(tokens, ids)) == BPETokenizer({"kind": "gpt2"}).ranks):
        return {"kind": "gpt2"}
    eot = theirs.get("eos_token_id")
    eot = eot[0] if isinstance(eot, list) and eot else eot
    eot = eot if eot in {*ids, *special.values()} else special.get(EOT)
    return {"kind": "bpe", "tokens": [token.decode("latin-1") for token in tokens[256:]],
            "pieces": pieces, "ids": ids, "special": special, "eot": eot}

def read_safetensors(path):
    """({name: tensor}, metadata) of a file: 8 bytes, the length of a JSON header; the header;
    the numbers, one tensor after another. Raises ValueError where it is not just that."""
    weights, end, size = {}, 0, path.stat().st_size
    damaged = f"{path.name} is damaged, fetch it again: "
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check(length <= min(size, 2 ** 27), damaged + "its header does not end")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            check(first == end <= last <= size, damaged + f"{name} overlaps or leaves a gap")
            raw, end = torch.empty(last - first, dtype=torch.uint8), last
            file.readinto(raw.numpy())
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # a mask, which some versions keep among the weights
            w = weights[name] = raw.view(FLOATS[entry["dtype"]]).view(entry["shape"])
            check(torch.stack(w.aminmax()).isfinite().all(), damaged + f"{name} is not finite")
    check(8 + length + end == size, damaged + "it is cut short or goes on")
    return weights, metadata

# ---- tokenizers: encode(text) -> ids, decode(ids) -> text, token(id) -> its bytes,
# vocab_size, eot, spec (JSON) ----

EOT = "<|endoftext|>"  # how text writes eot, the id that ends a story
# Text is cut into these pieces, and no byte-pair token of our own spans two: a word with the
# blank before it, a digit, a run of punctuation or of line ends, any other blank. A word is of
# letters, marks and joiners, by which three engines cut alike: regex, tiktoken and transformers.
WORD = r"[\p{L}\p{M}\u200c\u200d]+"
PIECES = rf" ?{WORD}(?:'{WORD})*| ?\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}\u200c\u200d]+|\n+|\s"

class CharTokenizer:
    """One id for each character of vocabulary, a sorted string: of "abc" "cab" is [2, 0, 1].
    U+0003, which ASCII calls end of text, is eot where the vocabulary has it."""
    def __init__(self, vocabulary):
        check(vocabulary and list(vocabulary) == sorted(set(vocabulary)),
              "a character vocabulary must be one sorted string without repeats")
        self.spec = {"kind": "char", "vocabulary": vocabulary}
        self.vocab_size = len(vocabulary)
        self.eot = vocabulary.index("\3") if "\3" in vocabulary else None
        self.id_of = np.full(0x110000, -1, np.int32)  # by code point; -1: unknown
        self.id_of[[ord(character) for character in vocabulary]] = range(self.vocab_size)

    def encode(self, text):
        if self.eot is not None:
            text = text.replace(EOT, "\3")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self.id_of[codes]
        if ids.min(initial=0) < 0:
            i = int(ids.argmin())
            raise ValueError(f"{text[i]!r} (U+{codes[i]:04X}, character {i + 1} of the text) "
                             f"is not among the vocabulary's {self.vocab_size}, leave it out or "
                             f"use data prepared with --tokenizer=byte")
        return ids

    def decode(self, ids):
        return "".join(self.spec["vocabulary"][i] for i in ids).replace("\3", EOT)

    def token(self, i):
        return self.spec["vocabulary"][i].encode()

class ByteTokenizer:
    """The 256 bytes of UTF-8: any text, nothing to learn. eot is 255, no byte of UTF-8."""
    spec, vocab_size, eot = {"kind": "byte"}, 256, 255

    def encode(self, text):
        raw = text.encode("utf-8", "surrogateescape").replace(EOT.encode(), b"\xff")
        return np.frombuffer(raw, np.uint8)

    def decode(self, ids):
        raw = np.asarray(ids, dtype=np.uint8).tobytes()
        return raw.replace(b"\xff", EOT.encode()).decode("utf-8", "replace")

    def token(self, i):
        return bytes([i])

# How GPT-2's files write each of the 256 bytes: as itself where that can be seen.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = "".join(chr(b if b in SEEN else 256 + sum(i not in SEEN for i in range(b)))
                  for b in range(256))

class BPETokenizer:
    """Byte-pair tokens (Sennrich et al. 2016), run by tiktoken. Of kind gpt2: its 50,257. Of kind
    bpe: the 256 bytes, spec["tokens"] (Latin-1, as learned), then EOT; or, where others learned
    them, with their "ids", "special" {text: id}, "eot" and the regex "pieces"."""
    def __init__(self, spec):
        if spec["kind"] == "gpt2":
            try:
                gpt2 = tiktoken.get_encoding("gpt2")
            except OSError as error:  # requests' errors are OSErrors
                raise ConnectionError("GPT-2's tokenizer could not be downloaded, connect or "
                                      "set TIKTOKEN_CACHE_DIR to a folder with it") from error
            self.pieces, self.ranks = r50k_pat_str, gpt2._mergeable_ranks
        else:
            tokens = [bytes([i]) for i in range(256)]
            tokens += [token.encode("latin-1") for token in spec["tokens"]]
            self.ranks = {token: rank for rank, token in enumerate(tokens)}
            self.pieces = spec.get("pieces", PIECES)
            check(len(self.ranks) == len(tokens), "a byte-pair vocabulary must repeat no token")
        count = len(self.ranks)
        self.special = spec.get("special", {EOT: count})
        ids = [*spec.get("ids", range(count)), *self.special.values()]
        check(len(set(ids)) == len(ids), "a byte-pair vocabulary must repeat no id")
        self.ids, self.rank_of = np.array(ids, np.uint32), {i: rank for rank, i in enumerate(ids)}
        self.spec, self.vocab_size = spec, max(ids) + 1
        self.eot = spec.get("eot", self.special.get(EOT))
        # Our own instance: threads would wait for each other in the one that tiktoken shares.
        self.encoding = tiktoken.Encoding(
            spec["kind"], pat_str=self.pieces, mergeable_ranks=self.ranks,
            special_tokens={text: count + i for i, text in enumerate(self.special)})

    def encode(self, text):
        return self.ids[self.encoding.encode_to_numpy(text, allowed_special="all")]

    def decode(self, ids):
        return b"".join(map(self.token, ids)).decode("utf-8", "replace")

    def token(self, i):
        rank = self.rank_of.get(int(i))  # None: an id that others' vocabularies leave out
        return b"" if rank is None else self.encoding.decode_single_token_bytes(rank)

def tokenizer_from(spec):
    """The tokenizer of a spec, which a dataset's meta.json and a checkpoint hold."""
    match spec:
        case {"kind": "char", "vocabulary": str(vocabulary)}:
            return CharTokenizer(vocabulary)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"} | {"kind": "bpe", "tokens": [*_]}:
            return BPETokenizer(spec)
    raise ValueError("a tokenizer's spec must be of kind char, byte, gpt2 or bpe")

def read_text(path):
    """The text of a UTF-8 file, without a byte-order mark and with \\n for \\r\\n. Raises
    OSError or ValueError."""
    try:
        return plain(Path(path).expanduser().read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, give the path of a text") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}, convert it first, "
                         f"as iconv does") from None

def plain(text):
    return text.removeprefix("\ufeff").replace("\r\n", "\n")

def unescape(text):
    """A prompt with the line ends, tabs and backslashes that a shell's user writes as \\n, \\t
    and \\\\; a FILE: stays as it is."""
    if text.startswith("FILE:"):
        return text
    text = plain(text)
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)

def encode_prompt(tokenizer, start, document_rows=False):
    """(1, T) ids of a prompt, or of the file that FILE:path names. An empty one begins a text:
    with eot, a line end, or the first of the vocabulary; with document_rows any begins with eot,
    as documents do in training. Raises OSError or ValueError."""
    text = read_text(start[5:]) if start.startswith("FILE:") else start
    if tokenizer.eot is not None and (not text or document_rows):
        return torch.tensor([[tokenizer.eot, *tokenizer.encode(text.removeprefix(EOT)).tolist()]])
    if not text:
        known = tokenizer.spec.get("vocabulary", "\n")
        text = "\n" if "\n" in known else known[0]
    return torch.tensor([tokenizer.encode(text).tolist()])

# ---- the machine ----

def pick_device(name):
    """The torch.device of a setting; auto: CUDA, else MPS, else the CPU. Raises ValueError."""
    if name == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        name = best.type if best and best.type in ("cuda", "mps") else "cpu"
    try:
        check(torch.device(name).type in ("cpu", "cuda", "mps"), name)
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"device {name!r} cannot be used here, try auto or cpu") from error

def pick_dtype(name, device, trials):
    """The number type of a setting. auto: bfloat16 on a GPU, or float16 where it has none; on
    a CPU the fastest of trials. float16 off CUDA means auto."""
    if name not in ("auto", "float16") or name == "float16" and device.type == "cuda":
        return name
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return fastest(trials) if device.type == "cpu" else "bfloat16"

def fastest(trials, seconds=0.4):
    """The fastest of {name: function}, the first in doubt, and says so. They take turns and
    the least time of each counts, so that what else the machine does decides nothing."""
    if len(trials) == 1:
        return next(iter(trials))
    least, turns = dict.fromkeys(trials, math.inf), 0
    end = time.perf_counter() + seconds
    while turns < 3 or turns < 30 and time.perf_counter() < end:
        for name, trial in trials.items():
            if turns == 0 or least[name] < max(0.1, 3 * min(least.values())):  # else hopeless
                began = time.perf_counter()
                trial()
                least[name] = min(least[name], time.perf_counter() - began)
        turns += 1
    first, *others = least
    best = min(others, key=least.get, default=first)
    best = best if least[best] < 0.95 * least[first] else first
    took = ", ".join(f"{name} takes {least[name] / least[first]:.2f}" for name in others)
    print(f"{best}: {took} of {first}'s time here", file=sys.stderr)
    return best

def tried(what, attempt):
    """The result of attempt(), which makes something faster; None where it does not work."""
    try:
        return attempt()
    except torch.OutOfMemoryError:
        raise  # config/ says what helps
    except RuntimeError as error:  # what torch.compile's errors have in common, and CUDA's
        print(f"{what} does not work here ({type(error).__name__}), going on without it",
              file=sys.stderr)

def show_progress(text):
    """Replaces the text shown before, where stderr is a terminal; "" clears it."""
    if getattr(sys.stderr, "isatty", bool)():  # what stands for it may lack the method
        with suppress(OSError):  # a terminal may be closed
            print(f"\r{text:<79.79}", end="\r", file=sys.stderr, flush=True)

def download(urls, path, remedy, sha256="", limit=0, tries=4, wait=1.0, timeout=20):
    """Fetches a file to path from the first of urls that serves it whole; returns path. A cut
    transfer leaves path.part, which the next continues; with limit, that many bytes are enough,
    and it returns path.part. Raises OSError after tries rounds in a row without a byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    answers, failures = {}, 0
    while failures < tries:
        time.sleep(wait * (2 ** failures - 1))
        before = part.stat().st_size
        for url in urls:
            if 0 < limit <= part.stat().st_size:
                return part
            try:
                answers[url] = fetch(url, part, sha256, limit, timeout)
            except requests.RequestException as error:
                answers[url] = getattr(error.response, "status_code", type(error).__name__)
            if answers[url] == "whole":
                os.replace(part, path)
                return path
        failures = 0 if part.stat().st_size > before else failures + 1
    raise OSError(f"{path.name} could not be downloaded ({answers}), try again or {remedy}")

def fetch(url, part, sha256, limit, timeout):
    """Appends to part what it lacks of url, up to limit bytes. Returns "whole" or what is
    wrong: the size, or the sha256 (if "", the one that the Hugging Face Hub states)."""
    have = total = part.stat().st_size
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-{limit - 1 if limit else ''}"}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        tags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in answer.history]
        sha256 = sha256 or next((tag for tag in tags if len(tag) == 64), "")
        if answer.status_code != 416:  # which says that nothing lies beyond what we have
            answer.raise_for_status()
            length = answer.headers.get("Content-Length", "0")
            span, _, size = answer.headers.get("Content-Range", "/" + length).partition("/")
            total = int(size.replace("*", "0"))
            resumes = span.startswith(f"bytes {have}-")  # else the server sends the whole
            with open(part, "ab" if resumes else "wb") as file:
                for chunk in answer.iter_content(1 << 14):
                    file.write(chunk)
                    have = file.tell()
                    show_progress(f"{part.stem}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB")
                    if 0 < limit <= have:
                        break
            show_progress("")
    if have < total or 0 < limit <= have != total:
        return f"{have:,} of {total:,} bytes"
    if have > total > 0 or sha256 not in ("", sha256_of(part)):
        part.write_bytes(b"")
        return "a file of another size or sha256"
    return "whole"

def sha256_of(path):
    """Hexadecimal digest of a file, or of those in a folder, "" where there is none."""
    if path.is_dir():
        return hashlib.sha256("".join(map(sha256_of, sorted(path.iterdir()))).encode()).hexdigest()
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

# ---- the same on a CPU, faster: each figure here is one of tests/benchmark.py ----

def fused_attention(q, k, v, dropout, mask=None):
    """attention() by a kernel that never holds the (T, S) weights (Dao et al. 2022). Where that
    is slow, on a CPU, or wrong, for 1 < T < S, one product of all heads adds the mask itself."""
    B, H, T, D = q.shape
    S, p = k.shape[2], dropout.p * dropout.training
    slow = q.device.type == "cpu" and (p > 0 or q.dtype == torch.bfloat16 and S <= 512)
    if mask is None and (T == 1 or T == S and not slow):  # is_causal: the T are the first of S
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
    mask = causal_mask(q, k) if mask is None else mask
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * H, T or S, D)
    weights = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D)).softmax(dim=-1)
    return (dropout(weights) @ v).view(B, H, T, D)

class Dropout(nn.Dropout):
    """nn.Dropout: zero by chance p, else divided by 1 - p (Srivastava et al. 2014). On a CPU
    random numbers take half of a step; here bits are drawn, and made into factors in place."""
    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        size = x.element_size()
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        values = 2 ** (8 * size)
        zeros = min(round(self.p * values), values - 1)  # of all values, so many become 0
        bits = torch.empty(x.numel() * size // 8 + 1, dtype=torch.int64)
        bits = bits.random_(-2 ** 63, None).view(integer)[:x.numel()].view(x.shape)
        keep = bits.ge_(zeros - values // 2)             # 0 or 1
        factor = torch.tensor(values / (values - zeros), dtype=x.dtype)
        return x * keep.mul_(factor.view(integer)).view(x.dtype)  # the bits of 0.0 or factor

def cross_entropy(logits, targets, smoothing=0.0):
    """The mean of -log softmax(logits)[target] in nats, float, over the targets (N,) that are
    not -1; logits (N, V)."""
    large = logits.numel() > 2 ** 18 and logits.dtype in (torch.float32, torch.bfloat16)
    if (large and logits.device.type == "cpu" and not smoothing
            and not torch.compiler.is_compiling()):
        return SlicedCrossEntropy.apply(logits, targets)
    return F.cross_entropy(logits.float(), targets, ignore_index=-1, label_smoothing=smoothing)

class SlicedCrossEntropy(torch.autograd.Function):
    """cross_entropy() and its gradient at once, in slices that stay in a CPU's cache: 0.3 to
    1.0 of torch's time where they are many, and 0.4 GB less for 1024 of GPT-2's tokens."""
    @staticmethod
    def forward(ctx, logits, targets):
        rows = max(1, 2 ** 19 // logits.shape[1])            # 2 MB of floats
        weights = (targets >= 0) / (targets >= 0).sum()
        columns = targets.clamp(min=0)[:, None], weights[:, None]
        loss, gradient = torch.zeros(()), torch.empty_like(logits)
        in_place = ctx.needs_input_grad[0] and logits.dtype == torch.float32
        for part, y, w, d_part in zip(*(t.split(rows) for t in (logits, *columns, gradient))):
            x = (d_part if in_place else torch.empty(part.shape)).copy_(part)
            largest = x.amax(dim=1, keepdim=True)
            x.sub_(largest).exp_()                           # softmax is this over its sum
            total = x.sum(dim=1, keepdim=True)
            loss += (w * (total.log() + largest - part.gather(1, y))).sum()
            if ctx.needs_input_grad[0]:
                d_part.copy_(x.mul_(w / total).scatter_add_(1, y, -w))  # less 1 at the target
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        gradient, = ctx.saved_tensors
        return gradient if d_loss == 1 else gradient.mul_(d_loss), None

# ---- on a GPU: all kernels at once, which Python launches slower than they run ----

class CudaGraph:
    """A function of tensors of fixed shapes on a GPU, recorded once and then replayed: its kernels
    read and write the same memory again, and no Python runs. It may not wait for a number."""
    def __init__(self, function, *inputs):
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        with (torch.cuda.device(inputs[0].device),
              torch.cuda.stream(torch.cuda.current_stream())):  # which a failure leaves as it was
            with torch.cuda.stream(torch.cuda.Stream()):  # what cuBLAS sets up at its first use
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                for _ in range(3):
                    function(*self.inputs)
            torch.cuda.synchronize()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            before = generator.clone_state()
            try:  # thread_local: other threads, like NCCL's, may go on
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.output = function(*self.inputs)
            except Exception:  # which leaves the generator as if still recorded
                generator.graphsafe_set_state(before)
                raise

    def __call__(self, *inputs):
        for mine, new in zip(self.inputs, inputs):
            mine.copy_(new, non_blocking=True) if torch.is_tensor(new) else mine.fill_(new)
        self.graph.replay()
        return self.output

def token_reader(hidden, ids, cache):
    """The function that reads one token of each row into the cache: hidden itself, or on a GPU
    a graph of it, recorded at the first call."""
    if ids.is_cuda and KVCache.graphs and cache.graph is None:
        cache.graph = tried("a CUDA graph", lambda: TokenGraph(hidden, ids, cache))
        KVCache.graphs = cache.graph is not None
    return cache.graph or hidden

class TokenGraph:
    """hidden() of one token of each row, (B, 1) and a KVCache -> (B, 1, C), as a CudaGraph."""
    def __init__(self, hidden, ids, cache):
        fixed, place = FixedCache(cache), torch.tensor([cache.length], device=ids.device)
        self.graph = CudaGraph(lambda ids, place: hidden(ids, fixed.at(place)), ids, place)

    def __call__(self, ids, cache):
        states = self.graph(ids, cache.length)
        cache.length += 1
        return states

class FixedCache(KVCache):
    """Lends a KVCache's memory to a graph, in shapes that never change: a tensor says where the
    next token goes; what lies after it, not yet written, is masked."""
    def __init__(self, cache):
        self.layers = cache.layers
        for kv in self.layers:
            kv[:, :, :, cache.length:] = 0  # masked, but what is not finite would get through

    def at(self, place):
        """This cache, whose next token goes to place (1,)."""
        kv = self.layers[0]
        after = torch.arange(kv.shape[3], device=kv.device) > place
        self.mask = kv.new_zeros(1, kv.shape[3]).masked_fill(after, -math.inf)
        self.place, self.length = place, 0  # hidden() adds to it, TokenGraph keeps the count
        return self

    def places(self, T):
        return self.place

    def append(self, layer, k, v):
        self.layers[layer].index_copy_(3, self.place, torch.stack((k, v)))
        return self.layers[layer]

# ---- products for writing on a CPU, where each token reads all matrices from memory ----

def use_product(model, name):
    """Lets the linear layers of a model on a CPU, in eval mode, multiply as one of PRODUCTS
    does, in place. Raises ValueError where torch cannot."""
    check(model.wpe.weight.device.type == "cpu", f"--dtype={name} is for --device=cpu here")
    dtype, linear, embedding = PRODUCTS[name]
    model.to(dtype)
    with reading(f"--dtype={name}", ", try float32"), warnings.catch_warnings(action="ignore"):
        for module in [*model.modules()]:
            for child in [key for key, m in module.named_children() if type(m) is nn.Linear]:
                setattr(module, child, linear(getattr(module, child)))
        model.wte = embedding(model.wte)

class Float16Linear(nn.Module):
    """nn.Linear whose weights are float16, by FBGEMM, which adds up in float32."""
    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

class Int8Linear(nn.Module):
    """nn.Linear of int8. Its input is rounded as it comes, to 7 bits: so no sum overflows."""
    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack(int8_rows(linear.weight), linear.bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)

class Int8Embedding(nn.Module):
    """nn.Embedding whose rows are int8 until they are read."""
    def __init__(self, embedding):
        super().__init__()
        rows = int8_rows(embedding.weight)
        self.numbers, self.scales = rows.int_repr(), rows.q_per_channel_scales().float()

    def forward(self, ids):
        return self.numbers[ids] * self.scales[ids, None]

def int8_rows(w):
    """Rounds each row of a matrix to whole numbers from -127 to 127 times a scale of its own."""
    scales = w.abs().amax(dim=1).clamp(min=1e-9) / 127
    return torch.quantize_per_channel(w, scales, torch.zeros(len(w)).long(), 0, torch.qint8)

PRODUCTS = {  # dtype: (type of what else there is, what takes the place of nn.Linear, of wte)
    "float32": (torch.float32, nn.Module.float, nn.Module.float),
    "float16": (torch.float32, Float16Linear, nn.Module.half),
    "bfloat16": (torch.bfloat16, nn.Module.bfloat16, nn.Module.bfloat16),
    "int8": (torch.float32, Int8Linear, Int8Embedding),
}
