"""Characters of Tiny Shakespeare, with 6 million tokens in the sizes of nanoGPT's GPU run, which
states 1.4697 after 82 million: 10,770,816 parameters.

Data: python prepare_shakespeare.py
Result: val loss 1.4568 after 1,500 steps and 20 min, 2.1017 bits per character (1.4528 and 1.4640
with seeds 1 and 2, 18 min each), on two cores of an AMD EPYC with AVX512-BF16, 2026-11-25. 1,100
steps end at 1.4975, 2,400 with dropout 0.2 at 1.4574, 2026-11-26.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
start = "\n"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256

# The loss first has to leave 2.5, that of bigrams, which takes more steps with dropout and more
# tokens in larger batches. Dropout 0.2 with weight_decay 0.5 was 0.08 behind at step 1,000.
batch_size = 16
dropout = 0.1

optimizer = "muon"
learning_rate = 5e-3
momentum = 0.9
beta2 = 0.95
warmup_iters = 20
lr_schedule = "linear"
min_lr = 0.0
max_iters = 1500
eval_interval = 500
log_interval = 25
