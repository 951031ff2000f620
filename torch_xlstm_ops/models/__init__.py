"""One adapter for each package whose models we run: what such a model is called by, and where it keeps its state.

An adapter decides by what is there, a parameter or an attribute, and never by a version number.
"""
