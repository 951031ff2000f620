"""How an sLSTM sequence runs: in blocks of steps, replayed as CUDA graphs."""
