"""Placement of attention on a mesh: who holds which tokens, who sends what to whom.

This package knows jax and the attention function it is handed, never `dilax`.
"""
