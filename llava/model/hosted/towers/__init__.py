"""Loops over the blocks of stock vision towers."""
