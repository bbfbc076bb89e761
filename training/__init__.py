"""dsd-train: configuration, data, losses, the loop and its measurements."""
