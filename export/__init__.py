"""dsd-export: makes a model directory, which all engines read, from a training checkpoint."""
