"""``memtrain plan``: from options to a forecast, and from a forecast to what is printed and written.

``parsing`` reads the options into a ``request``, ``jobs`` makes jobs of it (and alone needs torch), and
``answer`` plans and gathers what is to be said. ``terminal``, ``sweep_table``, ``machine_readable``, ``page``
and ``frontier`` say it, ``targets`` writes what to run the plan with; ``command`` does these in order.
"""
