# SmolLM2-135M on Tiny Shakespeare, all of its weights; tuned over three seeds (docs/finetuning.md). First the data:
#   python data/shakespeare_char/prepare.py
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct  # or a folder, or a .gguf file
#   python data/text/prepare.py data/shakespeare_char/input.txt --name=shakespeare --tokenizer=$MODEL
out_dir = 'out-text'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'text/shakespeare'
data_order = 'shuffle'

eval_interval = 40
eval_iters = 3
log_interval = 5
always_save_checkpoint = False

# 4 sequences x 256 tokens = 1,024 tokens per iteration, 3 minutes on two CPU cores
block_size = 256
batch_size = 4
gradient_accumulation_steps = 1
max_iters = 40

learning_rate = 2e-4
warmup_iters = 4
lr_decay_iters = 40
cooldown_iters = 36  # linear decay to 0
min_lr = 0.0
weight_decay = 0.0
