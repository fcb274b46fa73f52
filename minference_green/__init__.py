"""Energy and carbon accounting for long-context prefill, dense against sparse.

A map, from the bottom up (a module imports only from its own floor or below):

0. ``kernels``: Triton kernels, their torch CPU path and float64 oracles
1. ``journal``, ``results``, ``ledger``, ``workload``, ``errors``: plain data and its files;
   ``corpus``: texts with known facts
2. ``stats``, ``verdict``, ``retention``, ``findings``, ``render``: readers of results; neither
   torch nor NVML; ``answers``, ``groups``, ``counts``, ``clustered``,
   ``permutation``, ``detectable``: the statistics of audits
3. ``methods``, ``meters``, ``carbon``: prefill methods; energy readings; gCO2e;
   ``faithfulness``: what a method's attention and output lost
4. ``model``: the only place that imports transformers
5. ``bench``: the measuring loop; ``worker``, ``task``, ``cell``, ``decide``, ``observe``,
   ``breakdown``: the process that runs a model; ``check``, ``doctor``, ``command``: other jobs
   that measure; ``auditing``: what a method loses, and of what
6. ``api``, ``cli``: the exported functions and the ``green-bench`` command
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference_green.api import audit, measure, run
    from minference_green.verdict import compare

__all__ = ["__version__", "audit", "compare", "measure", "run"]

__version__ = "0.1.0"

_EXPORTS = {
    "audit": "minference_green.api",
    "compare": "minference_green.verdict",
    "measure": "minference_green.api",
    "run": "minference_green.api",
}


def __getattr__(name: str) -> Any:
    """Load an exported function when it is first asked for: importing the package stays light."""
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'minference_green' has no attribute {name!r}")
