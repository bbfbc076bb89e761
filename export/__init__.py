"""dsd-export: from a training checkpoint to a model directory that every engine reads."""
