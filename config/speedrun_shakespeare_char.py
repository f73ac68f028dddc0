# For one GPU: reach 1.47, the validation loss of config/train_shakespeare_char.py, by what made the CPU speedrun fast.
# The model has the same size, 10.6M parameters. The settings come from the CPU and have yet to be tuned on a GPU:
#   python tools/compare.py --baseline=config/train_shakespeare_char.py \
#       --contender=config/speedrun_shakespeare_char.py --target=1.47
out_dir = 'out-speedrun-char'
eval_interval = 50
eval_iters = 0  # the whole validation split
log_interval = 10
always_save_checkpoint = False

dataset = 'shakespeare_char'
data_order = 'shuffle'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False
pos = 'rope'
mlp = 'relu2'
qk_norm = True
vocab_multiple = 64

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.95
learning_rate = 0.01  # of the embedding and the normalization weights
weight_decay = 0.0
grad_clip = 0.0
max_iters = 500
lr_decay_iters = 500
cooldown_iters = 400
warmup_iters = 10
min_lr = 0.0
