"""Fine-tuning of language models on little data: Hugging Face's Trainer under Hydra.

- `tasks`: what the tasks of Model Balancing are: columns, classes, scores;
- `published`: the numbers of that paper: learning rates, batches, strengths of the sigmoid map;
- `reading`: a split of a task, from files or the hub;
- `draw`, `data`: what is trained on, what chooses the best epoch and what is tested, by the seed;
- `encoding`, `heads`, `spans`: from examples to the inputs of a network, and from its outputs to scores;
- `network`: a trained model from a folder, whole or with LoRA;
- `records`: the curves in `metrics.csv`;
- `checks`: settings of the Trainer that would spoil the choice of the best epoch;
- `building`: the parts of a run, from settings;
- `run`: one run from settings to summary.
"""
