"""GPT-2's smallest size without the bias of query, key and value, 124,412,160 parameters, after a
published run of 1.1 million tokens. --qkv_bias=True makes it OpenAI's 124,439,808.

Data: python prepare_tinystories.py config/gpt2_124m.py
Result: val loss 3.4696 after 1.1 million tokens of 11,953 stories, in 71 s of an H100 shared with
five such runs; two EPYC cores take 10 s a step. AdamW with a rate of 1e-3 ends at 3.8995.
"""

out_dir = "out/gpt2_124m"
dataset = "tinystories_slice_gpt2"
tokenizer = "gpt2"
max_stories = 12000  # 10 MB
val_fraction = 0.02
start = "Once upon a time"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
qkv_bias = False
dropout = 0.0  # no token is read twice

# 1.1 million tokens are few: a small batch makes many steps, though each pays for all of Muon.
batch_size = 2
optimizer = "muon"
learning_rate = 2e-3
beta2 = 0.95
warmup_iters = 40
lr_schedule = "linear"
min_lr = 0.0
max_iters = 537
eval_interval = 179
sample_interval = 179
