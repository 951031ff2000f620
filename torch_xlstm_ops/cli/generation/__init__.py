"""`xlstm-ops generate`: from the flags to text, progress and statistics."""
