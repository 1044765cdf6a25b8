"""``memtrain plan``: from options to a forecast, and from a forecast to what is printed and written.

``request`` reads the options, ``jobs`` makes jobs of them (and alone needs torch), ``answer`` plans and
gathers what is to be said, ``terminal``, ``machine_readable``, ``page`` and ``frontier`` say it, ``targets``
writes what to run the plan with. ``command`` does these in order.
"""
