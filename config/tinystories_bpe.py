"""TinyStories in 4096 byte-pair tokens of its own, 4 layers of 256: 4,273,664 parameters.

Data: python prepare_tinystories.py config/tinystories_bpe.py
Result: with --source=FILE of 11,953 stories, which are read four times, and --val_source=FILE of
6,456 others, 0.6914 bits per character of those, after 19 min of two EPYC cores.
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
momentum = 0.9
beta2 = 0.95
weight_decay = 0.3  # the stories are read four times: 0.1 and 0.5 end higher
warmup_iters = 50
lr_schedule = "linear"
min_lr = 0.0
max_iters = 2400
eval_interval = 800
sample_interval = 800
eval_iters = 20   # the whole dataset's val split would take longer than the training
