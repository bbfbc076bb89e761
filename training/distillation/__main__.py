"""dsd-distill as `python -m training.distillation`, for torchrun."""

from training.distillation.main import main

if __name__ == "__main__":
    main()
