"""Energy and carbon accounting for long-context prefill, dense against sparse.

A map, from the bottom up (a module imports only from its own floor or below):

0. ``kernels``: Triton kernels, their torch CPU path and float64 oracles
1. ``results``, ``workload``, ``errors``: plain data
2. ``stats``, ``render``: readers of results; neither torch nor NVML
3. ``methods``, ``meters``, ``carbon``: prefill methods; energy readings; gCO2e
4. ``model``: the only place that imports transformers
5. ``bench``, ``worker``: the measuring loop and the process that runs a model
6. ``cli``: the ``green-bench`` command
"""

__version__ = "0.1.0"
