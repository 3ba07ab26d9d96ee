"""TinyStories in GPT-2's tokens, after a published model: 6 post-norm layers of 512 with sinusoidal
positions, 44,645,888 parameters. The training is ours, for an hour of two cores.

Data: python prepare_tinystories.py config/tinystories_gpt2.py
Result: test perplexity 10.16 with 11,953 stories, in 96 s of an H100 shared with nine such runs.
"""

out_dir = "out/tinystories_gpt2"
dataset = "tinystories_gpt2"
tokenizer = "gpt2"
max_stories = 12000  # 10 MB
val_fraction = 0.2
test_fraction = 0.1
start = ""
document_rows = True

n_layer = 6
n_head = 8
n_embd = 512
block_size = 256
positions = "sinusoidal"
scale_embedding = True  # else positions hide the tokens
norm = "post"
dropout = 0.0  # few stories are read twice

optimizer = "muon"
batch_size = 16
learning_rate = 4e-3
momentum = 0.9
beta2 = 0.95
weight_decay = 0.01
warmup_iters = 30
lr_schedule = "linear"
min_lr = 0.0
max_epochs = 1.2
eval_epochs = 0.4
eval_iters = 12  # the whole val split would take minutes
sample_interval = 200
patience = 3    # for a larger --max_epochs: here are three evaluations
