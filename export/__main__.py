"""Entry point of dsd-export, also as `python -m export`."""

import sys


def main() -> None:
    try:
        from export.main import main as export_main
    except ImportError as error:
        sys.exit(f"dsd-export: a package for export is missing ({error}): pip install '.[export]'")
    except KeyboardInterrupt:
        sys.exit("dsd-export: stopped; no partial files are left")
    export_main()


if __name__ == "__main__":
    main()
