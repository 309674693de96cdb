"""An IPython kernel whose every socket is encrypted and whose every client is known."""

__version__ = "0.1.0"
