"""`python -m flashcore` is the `flashcore` command."""

from flashcore.cli import main

if __name__ == "__main__":
    main()
