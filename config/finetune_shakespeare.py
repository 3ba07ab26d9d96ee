"""GPT-2, 124,439,808 parameters, fine-tuned on Tiny Shakespeare in its own tokens.

Data: python prepare_shakespeare.py --tokenizer=gpt2
Result: not measured, it wants OpenAI's weights (0.5 GB, fetched from the Hugging Face Hub).
"""

out_dir = "out/finetune_shakespeare"
dataset = "shakespeare_gpt2"
tokenizer = "gpt2"
init_from = "gpt2"
start = "\n"

n_layer, n_head, n_embd = 12, 12, 768  # gpt2's: the weights have the last word

# 300 steps of 8,192 tokens: 8 epochs, and a rate that never warms up or decays.
block_size = 1024
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 300
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
dropout = 0.1
eval_interval = 50
log_interval = 1
