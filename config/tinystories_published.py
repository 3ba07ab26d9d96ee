"""The model of tinystories_gpt2.py, 6 layers of 512 and 44,645,888 parameters, by the recipe that
was published for it: AdamW, a cosine, up to 10 epochs of 189,000 stories.

Data: python prepare_tinystories.py config/tinystories_published.py
Result: not measured on its 270,000 stories.
"""

out_dir = "out/tinystories_published"
dataset = "tinystories_published"
tokenizer = "gpt2"
max_stories = 270000
val_fraction = 0.2
test_fraction = 0.1
start = "Once upon a time"
document_rows = True

n_layer = 6
n_head = 8
n_embd = 512
block_size = 256
positions = "sinusoidal"
scale_embedding = True
norm = "post"
dropout = 0.1

# A step had 8 batches of 4 rows on a GPU; on a CPU of 2: --batch_size=2.
batch_size = 4
gradient_accumulation_steps = 8
learning_rate = 2e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.01
warmup_iters = 500
min_lr = 0.0
max_epochs = 10.0
eval_epochs = 1.0
patience = 3    # epochs, as each ends with an evaluation
sample_interval = 2000
