"""Fused kernels: one subject a file, its plain-torch reference beside it.

Each module has, in this order: the reference (at most some twenty lines, the oracle of the tests), the Triton
kernel, one public call that runs the kernel on CUDA and a vectorised torch path on a CPU, and ``SPECS``: what
``aot`` compiles ahead of time. Importing a module does not import Triton (``lazy``).
"""
