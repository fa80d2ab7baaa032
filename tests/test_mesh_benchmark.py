"""The benchmarks of a mesh at tiny sizes: what they check, and what they leave out."""

import jax
import jax.numpy as jnp

from benchmarks import mesh, plans
from sharding.messages import MESSAGES, SILENT


def test_rows_equal_the_oracle_and_only_without_messages_they_do_not():
    (case,) = (mesh.tiny(case) for case in mesh.CASES if case.name == "dense-zigzag")
    run = mesh.Run(case, 32, 2, "xla", jnp.float32)
    arrays = run.arrays(3)
    out, silent = (jax.jit(run.forward(m))(*arrays) for m in (MESSAGES, SILENT))
    assert mesh.worst_error(run, out, False) < 1e-5
    assert mesh.worst_error(run, silent, False) > 1e-2
    programs = [jax.jit(run.forward(m)).lower(*arrays).as_text() for m in (MESSAGES, SILENT)]
    assert ["collective_permute" in text for text in programs] == [True, False]


def test_a_row_of_the_table_of_plans():
    cells = plans.row("geometric to T", "1 M", 64).split(" | ")
    assert cells[1:4] == ["1 M", "64", "contiguous"]
    assert "all_to_all" in cells[4]
