# Reach 1.47, the validation loss of config/train_shakespeare_char.py, in 2.0 of its 82 million tokens: the model has
# the same size, 10.6M parameters. docs/LOG.md tells what it took on two CPU cores.
out_dir = 'out-speedrun-char'
eval_interval = 120
eval_iters = 0  # the whole validation split
log_interval = 10
always_save_checkpoint = False

dataset = 'shakespeare_char'
data_order = 'shuffle'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0  # in two epochs the validation loss falls to the end
bias = False
pos = 'rope'
mlp = 'relu2'
qk_norm = True
vocab_multiple = 64

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.9
learning_rate = 0.01  # of the embedding and the normalization weights
weight_decay = 0.0
grad_clip = 0.0
max_iters = 480
lr_decay_iters = 480
cooldown_iters = 384
warmup_iters = 10
min_lr = 0.0
