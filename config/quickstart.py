"""Synthetic stories of known entropy, learned in a minute on two CPU cores: 569,984 parameters.

Data: python prepare_tinystories.py --source=grammar --tokenizer=bpe
Result: val loss 0.3839, 3.3% above the entropy of 0.3716, after 45 s of two EPYC cores. One run
in six also learns to name the place again where the story ends, and has 0.375: 0.8% above it.
"""

out_dir = "out/quickstart"
dataset = "grammar_bpe"
source = "grammar"
tokenizer = "bpe"
start = ""  # a story begins where the one before ended

# A row is one whole story, so nothing that a word depends on is out of sight.
document_rows = True
block_size = 144
batch_size = 16

n_layer = 2
n_head = 2
n_embd = 128
activation = "relu"
dropout = 0.0

optimizer = "muon"
learning_rate = 8e-3
beta2 = 0.95
warmup_iters = 20
lr_schedule = "linear"
min_lr = 0.0
max_iters = 1000
eval_interval = 250
log_interval = 50
