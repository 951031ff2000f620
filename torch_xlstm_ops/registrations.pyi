"""Effects only: importing it registers the operators."""
