"""Decides per block, tensor class and token range: a ``model.Problem`` in, a ``plan.RangePlan`` out.

Start at ``solve.solve``. ``model`` and ``machine`` hold the words of the input; ``choices``, ``states``,
``schedule`` and ``ledger`` say once what can be decided, what it costs in time and in bytes; ``program``
gives that to HiGHS (``search``, ``diffuse``), ``simulate`` replays it without a solver. ``baselines`` are the
rules of others, ``infeasible`` explains where nothing fits. ``check`` and the modules called ``*_check``
share no code with any of them but the words.
"""
