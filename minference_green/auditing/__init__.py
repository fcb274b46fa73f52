"""What sparse prefill loses, and of which kinds of information.

``plan`` says what is asked, ``audit`` is the parent that owns meters and file, ``worker`` the
process that holds the model, ``ask`` puts the questions to it, ``score`` judges its answers.
"""
