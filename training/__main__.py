"""Entry points of dsd-train, also as `python -m training` for torchrun, of dsd-distill and of dsd-eval."""

import sys


def main() -> None:
    try:
        from training.train import main as train_main
    except ImportError as error:
        sys.exit(f"dsd-train: a package for training is missing ({error}): pip install '.[train]'")
    train_main()


def distill() -> None:
    """dsd-distill."""
    try:
        from training.distillation.main import main as distill_main
    except ImportError as error:
        sys.exit(f"dsd-distill: a package for training is missing ({error}): pip install '.[train]'")
    distill_main()


def evaluate() -> None:
    """dsd-eval."""
    try:
        from training.evaluation.main import main as evaluate_main
    except ImportError as error:
        sys.exit(f"dsd-eval: a package for evaluation is missing ({error}): pip install '.[train]'")
    evaluate_main()


if __name__ == "__main__":
    main()
