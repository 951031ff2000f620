"""`xlstm-ops check`: the operators, their test inputs, and the recurrences that they must equal."""
