"""dsd-train, dsd-distill and dsd-eval: configuration, data, losses, training loop and metrics."""
