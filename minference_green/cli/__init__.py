"""The ``green-bench`` command: each verb parses, calls one function, prints."""
