"""The compiled functions that schedules call: each is a function of `maths`, compiled for the arguments it meets."""
