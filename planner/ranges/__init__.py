"""Decides per block, tensor class and token range: a ``model.Problem`` in, a ``plan.RangePlan`` out.

Start at ``solve.solve``. ``model`` holds the words of the input; ``choices``, ``states``, ``schedule`` and
``ledger`` say once what can be decided, what it costs in time and in bytes; ``program`` gives that to HiGHS,
``simulate`` replays it without a solver, and ``check`` shares no code with either.
"""
