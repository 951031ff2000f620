"""Draw operator calls and compare each with the float64 recurrence: `python -m tests.fuzz --calls 10000 --seed 0`."""
