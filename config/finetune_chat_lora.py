# As config/finetune_chat.py, but an adapter of rank 16 beside the weights (docs/finetuning.md#lora).
from config.finetune_chat import *  # noqa: F403

out_dir = 'out-chat-lora'
lora_rank = 16
lora_alpha = 32
learning_rate = 3e-3
