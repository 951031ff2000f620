"""Quality of the models: recall, perplexity against length, text, and speed, in one report.

    python -m benchmarks.quality                     # every part, then benchmarks/QUALITY.md
    python -m benchmarks.quality mqar --quick        # one small part, written to build/quality
"""
