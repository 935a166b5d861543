"""`python -m tandem.cli`, for processes that `tandem up` starts."""

from tandem.cli.app import main

if __name__ == "__main__":
    main()
