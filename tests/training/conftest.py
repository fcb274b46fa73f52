"""Makes ``training`` importable.

The repository root stays off the path: it holds kernels, a name that belongs to Hugging Face.
"""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "training"

if "training" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "training", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["training"] = module
    spec.loader.exec_module(module)
