"""The benchmarks of a mesh at tiny sizes: what they check, and what they leave out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks import billion, exposed, mesh, plans, program
from sharding.messages import MESSAGES, SILENT


def test_rows_equal_the_oracle_and_only_without_messages_they_do_not():
    (case,) = (mesh.tiny(case) for case in mesh.CASES if case.name == "dense-zigzag")
    run = mesh.Run(case, 32, 2, "xla", jnp.float32)
    arrays = run.arrays(3)
    out, silent = (jax.jit(run.program(False, m))(*arrays) for m in (MESSAGES, SILENT))
    assert mesh.worst_error(run, out, False) < 1e-5
    assert mesh.worst_error(run, silent, False) > 1e-2
    programs = [jax.jit(run.program(False, m)).lower(*arrays).as_text() for m in (MESSAGES, SILENT)]
    assert ["collective_permute" in text for text in programs] == [True, False]


def test_on_two_axes_gradients_come_back_and_their_sums_say_so():
    (case,) = (mesh.tiny(case) for case in mesh.CASES if case.name == "dense-two-level")
    run = mesh.Run(dataclasses.replace(case, method="ring"), 64, 4, "xla", jnp.float32)
    assert run.sizes == (2, 2)
    arrays = run.arrays(4)
    programs = [jax.jit(run.program(True, m)).lower(*arrays) for m in (MESSAGES, SILENT)]
    # Keys and values in both passes, their gradients in the second, all in float32.
    assert [program.received(x.as_text()) for x in programs] == [3 * run.plan.bytes, 0]
    dq, dk, dv = programs[0].compile()(*arrays)
    assert mesh.worst_error(run, dq, gradient=True) < 1e-5
    assert mesh.sums_error(run, (dq, dk, dv)) < 1e-5
    for lost in ((dq, dk.at[:, :16].set(0), dv), (dq, dk, dv.at[:, :16].set(0))):
        assert mesh.sums_error(run, lost) > 1e-2


def test_billion_in_pieces_equals_the_oracle(monkeypatch):
    monkeypatch.setattr(billion, "RATES", (1, 4))
    run = dataclasses.replace(billion.run_of(4 * 8192, 8, 2, "xla"), dtype=jnp.float32)
    result = billion.program(run, backward=True)(*run.arrays(4))
    assert mesh.worst_error(run, result[0], gradient=True) < 1e-5
    assert mesh.sums_error(run, result[:3]) < 1e-5


_PROFILE = """
planes { name: "/device:GPU:0"
  lines { name: "Stream #1(Compute)" events { metadata_id: 1 duration_ps: 4000000000 } }
  lines { name: "Stream #2" events { metadata_id: 2 offset_ps: 3000000000 duration_ps: 3000000000 }
    events { metadata_id: 2 offset_ps: 7000000000 duration_ps: 1000000000 } }
  event_metadata { key: 1 value { id: 1 name: "attention" } }
  event_metadata { key: 2 value { id: 2 name: "ncclDevKernel_SendRecv" } } }
"""


@pytest.mark.filterwarnings("ignore:builtin type event_stats")  # of JAX's own reader
def test_exposed_is_the_time_of_messages_with_nothing_beside_them():
    found = exposed.exposed_of(ProfileData.from_text_proto(_PROFILE))
    assert found == pytest.approx({"messages": 4, "exposed": 3, "idle": 1})


def test_a_row_of_the_table_of_plans():
    cells = plans.row("geometric to T", "1 M", 64).split(" | ")
    assert cells[1:4] == ["1 M", "64", "zigzag"]
    assert "all_to_all" in cells[4]
