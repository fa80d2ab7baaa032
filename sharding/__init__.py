"""Placement of attention on a mesh; nothing is here yet. Everything in `dilax` runs on one device."""
