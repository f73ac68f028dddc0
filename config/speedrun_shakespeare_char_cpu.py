# Reach the validation loss of config/train_shakespeare_char_cpu.py in a fifth of its time; the model has the same size.
# docs/LOG.md tells what each part contributes, and how to reach 1.57 in the time that the other recipe takes.
import torch

out_dir = 'out-speedrun-cpu'
eval_interval = 140
eval_iters = 10  # evaluation is to take 5% of the time; `python evaluate.py` takes the whole validation split
log_interval = 10

dataset = 'shakespeare_char'
data_order = 'shuffle'
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

# model: only what made it learn faster
n_layer = 4
n_head = 2
n_embd = 128
dropout = 0.0
bias = False
pos = 'rope'
mlp = 'relu2'
qk_norm = True

optimizer = 'muon'
muon_learning_rate = 0.03
muon_momentum = 0.7  # so short a run cannot average for longer; 0.95 for more than a thousand iterations
learning_rate = 0.03  # of the embedding and the normalization weights
weight_decay = 0.0
grad_clip = 0.0
max_iters = 140
lr_decay_iters = 140
cooldown_iters = 112
warmup_iters = 5
min_lr = 0.0

device = 'cpu'
_has_bfloat16 = getattr(torch.cpu, '_is_avx512_bf16_supported', bool)()  # instructions that multiply it
dtype = 'bfloat16' if _has_bfloat16 else 'float32'
