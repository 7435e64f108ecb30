"""`python -m tinker_sync` is the `tinker-sync` command."""

from tinker_sync.cli import main

if __name__ == "__main__":
    main()
