"""Characters of TinyStories, 4 layers of 64, after a published classroom model (loss 1.25): with 91
characters 207,936 parameters. As that did it reads 3/4 of 211,971 stories.

Data: python prepare_tinystories.py config/tinystories_char.py
Result: val loss 1.1357 with 8,965 of 11,953 stories, after 150 s of two Xeon cores with AMX.
"""

out_dir = "out/tinystories_char"
dataset = "tinystories_char"
tokenizer = "char"
max_stories = 211971
fraction = 0.75
val_fraction = 0.1
start = ""

n_layer = 4
n_head = 4
n_embd = 64
block_size = 32
activation = "relu"
dropout = 0.0

batch_size = 16
learning_rate = 1e-3
max_iters = 10000
eval_interval = 5000
eval_iters = 500  # the whole dataset's val split would take longer than the training
log_interval = 500
sample_interval = 5000
