"""``python -m resvit_export`` is ``resvit-export``."""

from resvit_export.cli.main import main

if __name__ == "__main__":
    main()
