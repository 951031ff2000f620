"""The mathematics as pure functions of tensors: no operator, no device, no schedule."""
