"""Generated Metal, proven on Linux."""
