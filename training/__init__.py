"""dsd-train: configuration, data, losses, training loop and metrics."""
