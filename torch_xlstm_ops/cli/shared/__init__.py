"""What several commands share: loading a model, options, errors as one line, tables."""
