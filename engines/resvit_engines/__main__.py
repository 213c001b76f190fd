"""``python -m resvit_engines``: the command ``resvit-engine`` where its script is not on the path."""

from resvit_engines.cli.main import main

if __name__ == "__main__":
    main()
