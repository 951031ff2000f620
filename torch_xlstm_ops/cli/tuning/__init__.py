"""`xlstm-ops tune`: from the flags to searches and their winners."""
