"""jaxkd: distil then align, or align then distil?"""

__version__ = "0.6.0"
