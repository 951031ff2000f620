"""One module per command of `xlstm-ops`: `HELP`, `add_flags(parser)` and `execute(parsed)`, the exit status."""
