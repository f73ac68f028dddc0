# Evaluate OpenAI's GPT-2, without training it, on any data set in GPT-2 BPE: --dataset=shakespeare
batch_size = 8
eval_iters = 500  # batches; more give a more exact estimate
eval_only = True
wandb_log = False
init_from = 'gpt2-large'
