"""The version of act-export."""

__version__ = "0.1.0"
