"""Decides: profile, machine and budget in, plan out. Start at ``solve.make_plan``; the words stand in
``actions``, ``profile``, ``machine`` and ``plan``; ``check.check`` says whether a plan may be trusted.
"""
