"""DSD: one vision transformer that encodes, denoises and decodes images, and the parts that serve it.

Importing this package imports neither torch nor a web framework; see the README for the layout.
"""

__version__ = "0.1.0"
