"""How the embedded model is made: ``python -m training.embedded``. Not part of the package."""
