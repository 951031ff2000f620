"""How the operators run: checks, plans, kernels and results; `registrations` gives them to the dispatcher."""
