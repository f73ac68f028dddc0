# The validation loss of config/train_shakespeare_char_cpu.py in a tenth of its time, with a model of the same size.
# BENCHMARKS.md has what each part brings, and how to go on to 1.57 in the time that the other takes.
import torch

out_dir = 'out-speedrun-cpu'
eval_interval = 28
eval_iters = 0  # the whole validation split
log_interval = 10

dataset = 'shakespeare_char'
data_order = 'shuffle'
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

# the model: what made it learn faster, and nothing that did not
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
muon_momentum = 0.7  # so short a run has no time for a longer memory; 0.95 for more than a thousand updates
learning_rate = 0.03  # of the embedding and the gains
weight_decay = 0.0
grad_clip = 0.0
max_iters = 140
lr_decay_iters = 140
cooldown_iters = 112
warmup_iters = 5
min_lr = 0.0

device = 'cpu'
dtype = (
    'bfloat16' if getattr(torch.cpu, '_is_avx512_bf16_supported', bool)() else 'float32'
)  # where the processor multiplies it
compile = True
