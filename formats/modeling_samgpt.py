"""Our GPT as a model of the transformers library, for shapes that no family of its own computes.

export.py --remote_code=True copies this file beside the weights, with model.py and what that imports, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs the very model that was trained.
"""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from model import GPT, GPTConfig


class SAMgptConfig(PretrainedConfig):
    """config.json: `gpt` holds the fields of GPTConfig."""

    model_type = 'samgpt'
    keys_to_ignore_at_inference = ['past_key_values']

    def __init__(self, gpt: dict | None = None, **others):
        self.gpt = gpt or {}
        shape = GPTConfig(**self.gpt)
        self.vocab_size, self.max_position_embeddings = shape.vocab_size, shape.block_size
        self.hidden_size, self.num_hidden_layers = shape.n_embd, shape.n_layer
        self.num_attention_heads, self.num_key_value_heads = shape.n_head, shape.kv_heads
        others['tie_word_embeddings'] = shape.tie_weights
        others['use_cache'] = False  # each new token reads the whole text again: slow for long ones, but always right
        super().__init__(**others)


class SAMgptForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids in, logits out, as transformers expects them."""

    config_class = SAMgptConfig
    base_model_prefix = 'gpt'
    _no_split_modules = ['Block']
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def _init_weights(self, module):
        """GPT initializes itself."""

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def set_input_embeddings(self, value):
        self.gpt.transformer.wte = value

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def set_output_embeddings(self, value):
        self.gpt.lm_head = value

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {'input_ids': input_ids, 'attention_mask': attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """input_ids (B, T) -> logits (B, T, V), and with labels (B, T), -100 where there is none, the mean loss of each
        position's successor. ValueError for padding, which this model does not know, and for T > block_size."""
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError('SAMgpt reads no padding: give sequences of one length, or one at a time')
        logits, loss = self.gpt.logits(self.gpt.hidden(input_ids)), None
        if labels is not None:
            targets = torch.where(labels[:, 1:] < 0, -1, labels[:, 1:])
            loss = self.gpt.summed_loss(logits[:, :-1], targets) / (targets >= 0).sum().clamp_min(1)
        return CausalLMOutput(loss=loss, logits=logits)
