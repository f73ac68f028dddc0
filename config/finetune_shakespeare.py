# GPT-2 fine-tuned on Tiny Shakespeare in BPE. gpt2-xl wants a large GPU; --init_from=gpt2 trains anywhere.
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 20
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # save only when the validation loss has improved: it soon overfits

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration; 301,966 in the text: 9 iterations per epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
