"""dsd-train, also as python -m training for torchrun."""

import sys


def main() -> None:
    try:
        from training.train import main as train_main
    except ImportError as error:
        sys.exit(f"dsd-train: a package for training is missing ({error}): pip install 'dsd-serve[train]'")
    train_main()


if __name__ == "__main__":
    main()
