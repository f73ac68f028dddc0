# The loss of OpenAI's GPT-2 on a data set, nothing trained. Any data set in GPT-2 BPE: --dataset=shakespeare
batch_size = 8
eval_iters = 500  # batches: more make the estimate more exact
eval_only = True
wandb_log = False
init_from = 'gpt2'
