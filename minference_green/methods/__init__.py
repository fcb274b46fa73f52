"""Prefill methods: estimate, build an index, attend."""
