"""The tuner: it searches the plans of a call for the fastest on this machine, and keeps every trial.

`space` says which plans there are, `measure` and `bench` what one is worth, `samplers` in which order to try them,
`study` runs the search and survives being killed, `records`, `report` and `plots` tell what happened, `ablate` changes
one setting at a time. The winner goes to `torch_xlstm_ops.config.tuned_plans`, where ``schedule="auto"`` looks.
"""
