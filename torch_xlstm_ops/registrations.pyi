"""Effects only: importing it registers the operators."""

from typing import Any

# The Dynamo backend, which nothing imports before it is asked for.
dynamo: Any
dynamo_rules: Any
inline: Any
mlstm: Any  # for the tuner, whose winners change routes
