"""A model or a file becomes named stacks of matrices `(K, R, C)`, the first step of the method.

Two ways lead in. Of a model, `layers` finds the modules that hold matrices, and `matrices` has one rule a layer
type. Of a file or a state dict, `files` lists the tensors (by `safetensors_files`, `gguf_files`, or `torch_files`
with `pickles` and `pickled_objects`; `config` reads what lies next to them), and `stored_layers` tells by name and
shape which layer each one is. Both end in the layouts of `stacks`, and share `values` (is this a weight that can
be measured?) and `names` (what is it called?), so that a file gives the rows of the model that it was saved from.

`adapters` and `adapter_files` merge what PEFT trains onto the weights below, as products of `low_rank` (with
`norms`); `blocks` says which layers form a block of the network.
"""
