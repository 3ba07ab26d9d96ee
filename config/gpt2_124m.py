"""GPT-2's smallest size without the bias of query, key and value: 124,412,160 parameters
(--qkv_bias=True makes it OpenAI's 124,439,808).

Data: python prepare_shakespeare.py --tokenizer=gpt2, or any dataset in GPT-2's tokens.
Result: not measured yet, this one wants a GPU.
"""

out_dir = "out/gpt2_124m"
dataset = "shakespeare_gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
qkv_bias = False
dropout = 0.1

batch_size = 4
gradient_accumulation_steps = 8  # 32,768 tokens a step
learning_rate = 6e-4
min_lr = 6e-5
beta2 = 0.95
warmup_iters = 100
max_iters = 2000
eval_interval = 100
