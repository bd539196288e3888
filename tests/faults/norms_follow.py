"""Norms must follow the layer that feeds them, in the architectures that people train.

GPT-2's Conv1D tells its width by a name of its own, and Llama's RMSNorm is none of torch's norms. Right: with
the default `norms="follow"` some norm of each model has the ratio of another layer. Second inputs: Mistral and
T5.
"""

import warnings

import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from farms_tb import TempBalance

transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")
torch.manual_seed(0)
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"n_layer": 3, "n_embd": 64, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
MODELS = (
    BertForMaskedLM(BertConfig(vocab_size=100, **WIDTHS)),
    GPT2LMHeadModel(GPT2Config(vocab_size=100, **GPT2)),
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **WIDTHS)),
    MistralForCausalLM(MistralConfig(vocab_size=100, num_key_value_heads=2, **WIDTHS)),
    T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4)),
)

for model in MODELS:
    balancer = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), assign_func="tb_linear_map")
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    ratios = balancer.parameter_ratios()
    followed = {n for n in norms for p, ratio in ratios.items() if p.startswith(f"{n}.") and ratio != 1}
    print(f"{type(model).__name__}: {len(followed)} of {len(norms)} norms follow a layer whose ratio is not 1")
    assert followed, type(model).__name__
