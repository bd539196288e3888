"""Records become the learning-rate ratio of each layer, and ratios become the optimizer's step.

To read in this order:

- `measured_model`: the layers of a model and their measurements;
- `ratio_maps`: alphas, or effects and their errors -> ratios;
- `report_ratios`: the record of each layer -> its ratio;
- `selection`: what the patterns of an option name;
- `assignment`: which layers take part, which parameter follows which layer; `norms`: whom a norm follows;
- `targets`: what a ratio scales, learning rate or weight decay;
- `layerwise_step`: the step with one learning rate for each ratio; `split_groups`: the param groups that it sees;
  `foreach_update`: the same update for a group as a whole;
- `optimizer_checks`, `lr_probe`, `first_steps` and `unseen_steps`: what is refused;
- `optimizers`: the steps of all optimizers of a model; `step_groups`: what they step with;
- `balancer`: `LayerBalancer`, all of these together;
- `state`: what a checkpoint holds of it;
- `ratio_warnings` and `verdict_warnings`: what a user should know of ratios and layers;
- `loop`: `TempBalance`, for a plain PyTorch loop.
"""
