"""Characters of Tiny Shakespeare, the sizes of nanoGPT's GPU run: 10,770,816 parameters.

Data: python prepare_shakespeare.py
Result: not measured yet, this one wants a GPU.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
start = "\n"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 5000
eval_interval = 250
