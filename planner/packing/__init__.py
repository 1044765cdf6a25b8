"""The parts of ``addresses.pack``: the grid of sections, the greedy passes, and the exact search.

Nothing here knows of names, capacities in bytes or alignment: ``addresses`` translates.
"""
