"""Characters of Tiny Shakespeare on a GPU: the loss that nanoGPT states, 1.4697, as soon as
possible, with 10,770,816 parameters.

Data: python prepare_shakespeare.py
Result: val loss 1.4696 with --seed=1, the whole process in 26 s of one H100, by a Muon that took
c_attn whole; nanoGPT's recipe for a GPU came to 1.4681 in 164 s.
"""

out_dir = "out/shakespeare_gpu"
dataset = "shakespeare_char"
start = "\n"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 16
dropout = 0.1

optimizer = "muon"
learning_rate = 5e-3
momentum = 0.9
beta2 = 0.95
warmup_iters = 20
lr_schedule = "linear"
min_lr = 0.0
max_iters = 1400
eval_interval = 350
log_interval = 50
compile = False  # takes as long as the run
