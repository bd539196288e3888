"""The callbacks of Lightning and Hugging Face: when to measure, and what to log where.

- `lightning`, `huggingface`: the callbacks; each translates the events of its trainer.
- `session`: what the callbacks have in common, over all runs of one callback.
- `measured_run`: the measurements of one run. `run`: a run as a trainer describes it.
- `schedule`: when to measure. `cost`: a warning where that takes too long.
- `metrics`: what is logged of a measurement. `sinks`: how each logger takes it.
- `handover`: results of training in child processes.
- `wandb_workspace`: a W&B workspace with the layers in order of depth.
"""
