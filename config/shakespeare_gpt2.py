"""Tiny Shakespeare in GPT-2's tokens, 302 thousand of them: 7,234,432 parameters.

Data: python prepare_shakespeare.py --tokenizer=gpt2
Result: val loss 4.9599, 2.3133 bits per character, after 12 min of two Xeon cores with AMX.
"""

out_dir = "out/shakespeare_gpt2"
dataset = "shakespeare_gpt2"
tokenizer = "gpt2"
start = "\n"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 16
dropout = 0.2

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
max_iters = 1000
eval_interval = 100
patience = 3
