"""python -m training: what dsd-train runs, for torchrun."""

from training.train import main

main()
