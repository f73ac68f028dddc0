# What ./quickstart.sh trains: a character GPT that the device can train in about a minute, by the recipe that won
# the speedruns (docs/LOG.md).
import torch

eval_interval = 250
log_interval = 25
eval_iters = 20
gradient_accumulation_steps = 1
data_order = 'shuffle'

pos = 'rope'
mlp = 'relu2'
qk_norm = True
optimizer = 'muon'
learning_rate = 0.02
beta2 = 0.95
weight_decay = 0.0
warmup_iters = 10
min_lr = 0.0

if torch.cuda.is_available():  # 10.6M parameters
    n_layer, n_head, n_embd, block_size, batch_size, dropout, max_iters = 6, 6, 384, 256, 64, 0.2, 1000
elif torch.backends.mps.is_available():  # 2.7M
    n_layer, n_head, n_embd, block_size, batch_size, dropout, max_iters = 6, 6, 192, 128, 32, 0.1, 1000
else:  # 0.80M
    n_layer, n_head, n_embd, block_size, batch_size, dropout, max_iters = 4, 2, 128, 64, 24, 0.0, 1000
lr_decay_iters = max_iters
cooldown_iters = int(0.8 * max_iters)
