# As config/finetune_text.py, but an adapter of rank 16 beside the weights (docs/finetuning.md#lora).
from config.finetune_text import *  # noqa: F403

out_dir = 'out-text-lora'
lora_rank = 16
lora_alpha = 32
learning_rate = 3e-3
