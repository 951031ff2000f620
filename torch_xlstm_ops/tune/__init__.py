"""The tuner: search for the fastest plan of a call on this machine, and keep every trial.

`space` has the plans, `measure` and `bench` time one, `samplers` propose the next, `search` runs the search, `study`
stores it so that it can be resumed, `records`, `report` and `plots` write the results, and `ablate` changes one setting
at a time. `publish` stores the result in `torch_xlstm_ops.config.tuned_plans`, which ``schedule="auto"`` reads.
"""
