# What ./quickstart.sh trains: a character GPT of a size that the device trains in two minutes or less.
import torch

eval_interval = 250
log_interval = 50
eval_iters = 20
gradient_accumulation_steps = 1
data_order = 'shuffle'
beta2 = 0.99
warmup_iters = 100

if torch.cuda.is_available():  # 10.65M parameters
    n_layer, n_head, n_embd, block_size, batch_size, dropout = 6, 6, 384, 256, 64, 0.2
    learning_rate, min_lr, max_iters = 1e-3, 1e-4, 2500
elif torch.backends.mps.is_available():  # 2.7M
    n_layer, n_head, n_embd, block_size, batch_size, dropout = 6, 6, 192, 128, 32, 0.1
    learning_rate, min_lr, max_iters = 1e-3, 1e-4, 1500
else:  # 0.80M
    n_layer, n_head, n_embd, block_size, batch_size, dropout = 4, 4, 128, 64, 12, 0.0
    learning_rate, min_lr, max_iters = 4e-3, 1e-4, 1500
lr_decay_iters = max_iters
compile = torch.cuda.is_available()  # elsewhere it takes longer than it saves in so short a run
