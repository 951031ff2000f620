"""One adapter for each package whose models we run: how such a model is called, and where it keeps its state.

An adapter decides by what is there, a parameter or an attribute, and never by a version number.
"""

from pathlib import Path

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"  # a small xLSTM and its tokenizer, in a Hugging Face directory
