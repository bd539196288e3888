"""Measure and balance a language model in Hugging Face's Trainer: python examples/hugging_face.py.

Needs pip install "farms-tb[transformers]".
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from farms_tb import FARMSTrainerCallback

if __name__ == "__main__":
    torch.manual_seed(0)
    tiny = GPT2Config(
        n_layer=2, n_embd=64, n_head=2, n_positions=32, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(tiny)
    texts = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(100, (64, 32))]

    balancer = FARMSTrainerCallback(every_n_steps=8)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, num_train_epochs=2, report_to="none", save_strategy="no")
        Trainer(model, arguments, train_dataset=texts, callbacks=[balancer]).train()

    print(balancer.report)
    for name, ratio in balancer.ratios.items():
        print(f"{name}: learning rate {ratio:.2f} times the base rate")
