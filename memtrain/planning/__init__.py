"""``memtrain plan``: from options to a forecast, and from a forecast to what is printed and written.

``request`` reads the options, ``jobs`` makes a job of them (the one module that needs torch), ``answer`` says
what is to be said in plain records, ``terminal`` and ``machine_readable`` print those, ``runnable`` writes what
to run the plan with.
"""
