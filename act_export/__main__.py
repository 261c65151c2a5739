"""`python -m act_export` is `act-export`."""

from act_export.cli import main

if __name__ == "__main__":
    main()
