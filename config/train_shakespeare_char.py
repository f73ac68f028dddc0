# A character GPT of 10.65M parameters on Tiny Shakespeare: minutes on one GPU.
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: save only when the validation loss has improved, and at the end

wandb_log = False  # or --wandb_log=True
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
data_order = 'shuffle'  # the text is small and read many times: read every part equally often
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models tolerate more
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration: average over more iterations
warmup_iters = 100
