"""The command line: `tandem up | router | prefill | decode | doctor`."""

from tandem.cli.app import main

__all__ = ["main"]
