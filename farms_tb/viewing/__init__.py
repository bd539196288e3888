"""Pictures and pages of a run, drawn from what it logged and from its checkpoints."""
