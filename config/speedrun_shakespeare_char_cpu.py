# config/train_shakespeare_char_cpu.py's validation loss in a tenth of its time. What each part of it brings: BENCHMARKS.md
import torch

out_dir = 'out-speedrun-cpu'
eval_interval = 50
eval_iters = 0  # the whole validation split
log_interval = 10

dataset = 'shakespeare_char'
data_order = 'shuffle'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
bias = False
pos = 'rope'
norm = 'rmsnorm'
mlp = 'relu2'
qk_norm = True
zero_init = True

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.8  # so short a run has no time for a longer memory
learning_rate = 0.02  # of the embedding and the gains
weight_decay = 0.0
grad_clip = 0.0
max_iters = 240
lr_decay_iters = max_iters
warmup_iters = 10
cooldown_iters = int(0.8 * max_iters)
min_lr = 0.0

device = 'cpu'
dtype = 'bfloat16' if getattr(torch.cpu, '_is_avx512_bf16_supported', bool)() else 'float32'  # where the processor multiplies it
compile = True
