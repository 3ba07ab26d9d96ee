"""TinyStories in 4096 byte-pair tokens of its own, 4 layers of 256: 4,273,664 parameters.

A lunch break on two CPU cores; an hour of a GPU affords --n_layer=8 --n_embd=512 --batch_size=64
--learning_rate=3e-3 --max_iters=20000 (not measured).

Data: python prepare_tinystories.py config/tinystories_bpe.py
Result: with 11,953 stories to learn from and 6,456 others to predict, val loss 1.9769 after 3,500
steps and 24 min, 0.7182 bits per character, on two cores of an Intel Xeon with AMX, 2026-11-21.
"""

out_dir = "out/tinystories_bpe"
dataset = "tinystories_bpe"
tokenizer = "bpe"
vocab_size = 4096
val_fraction = 0.05
start = ""

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
activation = "relu"
dropout = 0.0

optimizer = "muon"
batch_size = 16
learning_rate = 6e-3
beta2 = 0.95
warmup_iters = 50
lr_schedule = "linear"
min_lr = 0.0
max_iters = 3500
eval_interval = 500
eval_iters = 50   # the whole dataset's val split would take longer than the training
