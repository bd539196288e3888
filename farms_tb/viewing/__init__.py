"""Pictures and pages of a run, drawn from what it logged and from its checkpoints.

- `history`: the curves of a run as plain data, which live logging shares.
- `run_files`, `metrics_csv`, `saved_state`: the files of one run, its curves, the state in a checkpoint.
- `run_folder`: all of that together, with the last checkpoint measured.
- `run_settings`: settings and scores of a run, as text to show; `several_runs`: several runs, read to be compared.
- `densities`: what is computed for showing alone; `diagnosis`, `words`: what a report means, in sentences.
- `names`: names of layers and runs, made safe to show.
- `plots`: pictures for papers; `page`: one HTML page to look through.
"""
