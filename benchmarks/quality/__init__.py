"""What the models still can: recall, perplexity against length, text, and speed; one report of all four.

    python -m benchmarks.quality                     # every part, then benchmarks/QUALITY.md
    python -m benchmarks.quality mqar --quick        # one part in small, written under build/quality
"""
