"""`python -m act_export` is `act-export`."""

from act_export.commands.main import main

if __name__ == "__main__":
    main()
