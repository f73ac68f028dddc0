# SmolLM2-135M on conversations, all of its weights; tuned over three seeds (docs/finetuning.md). First the data:
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct  # or a folder, or a .gguf file
#   python data/chat/prepare.py --input=python --tokenizer=$MODEL --block_size=512
out_dir = 'out-chat'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'chat/python'
data_order = 'shuffle'
mask_documents = True  # conversations share windows, but do not see each other

eval_interval = 40
eval_iters = 3
log_interval = 5
always_save_checkpoint = False

# 2 windows x 512 tokens = 1,024 tokens per iteration, 3 minutes on two CPU cores
block_size = 512
batch_size = 2
gradient_accumulation_steps = 1
max_iters = 40

learning_rate = 3e-4
warmup_iters = 4
lr_decay_iters = 40
cooldown_iters = 36  # linear decay to 0
min_lr = 0.0
weight_decay = 0.0
