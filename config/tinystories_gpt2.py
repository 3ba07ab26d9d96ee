"""TinyStories in GPT-2's tokens, after a published model: 6 post-norm layers of 512 with sinusoidal
positions, 44,645,888 parameters.

Data: python prepare_tinystories.py config/tinystories_gpt2.py
Result: not measured.
"""

out_dir = "out/tinystories_gpt2"
dataset = "tinystories_gpt2"
tokenizer = "gpt2"
val_fraction = 0.2
test_fraction = 0.1
start = ""
document_rows = True

n_layer = 6
n_head = 8
n_embd = 512
n_inner = 2048
block_size = 256
positions = "sinusoidal"
norm = "post"
activation = "gelu"
dropout = 0.1
tied = True

batch_size = 4
gradient_accumulation_steps = 8
learning_rate = 2e-4
min_lr = 2e-5
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.01
warmup_iters = 500
max_epochs = 10.0
eval_epochs = 1.0
patience = 3
dtype = "auto"  # mixed precision wherever that is faster
