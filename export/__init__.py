"""dsd-export: makes a model directory, which every engine reads, from a training checkpoint."""
