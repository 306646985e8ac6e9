"""LLaVA-1.5 under the module paths its users know, with points where vision tokens can be merged, chosen or dropped.

Importing the package loads nothing else; the model side is imported from :mod:`llava.model`.
"""

__mustdrop_hosts__ = "llava.model.hosted"
"""Where reducers find hook points for transformers' own classes, see `mustdrop.hosts`."""
