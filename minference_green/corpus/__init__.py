"""Texts with known facts: what an audit asks about, and what the embedded model is trained on.

``draws`` supplies the randomness, ``kinds`` the values, ``language`` the sentences, ``filler``
the text between them. ``recipe`` says what a text asks, ``ledger`` keeps its values apart,
``haystack`` puts all together and knows where each fact stands. The same seed gives the same
bytes on every Python version and machine.
"""
