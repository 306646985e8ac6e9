"""LLaVA-1.5 under the module paths its users know, with points where vision tokens can be merged, chosen or dropped.

Importing the package loads nothing else; the model side is imported from :mod:`llava.model`.
"""

from mustdrop.hosts import register_hosts

register_hosts("llava.model.hosted")
