"""Placement of attention on a mesh: nothing is here yet, `dilax` runs on one device.

This package knows jax and the attention function it is handed, never `dilax`.
"""
