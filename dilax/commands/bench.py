"""`dilax bench`."""

import dataclasses
import json
from pathlib import Path

from dilax import bench
from dilax.commands.output import check_output


@dataclasses.dataclass(frozen=True)
class Bench(bench.BenchConfig):
    """Time the implementations on this machine, beside dense attention."""

    json: Path | None = None
    """Also write the table to this file, as JSON."""

    def run(self) -> None:
        """Print the table, and write it if asked to."""
        _run(self, self.json)


def _run(config: bench.BenchConfig, path: Path | None) -> None:
    check_output("json", path)
    machine = bench.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    header = f"{'length':>9}  {'attention':<18}{'work':<18}{'ms':>12}{'tokens/s':>14}"
    print(header, "-" * len(header), sep="\n")
    rows = []
    for row in bench.measure(config):
        rows.append(row)
        named = f"{row.length:>9}  {row.name:<18}{row.work:<18}"
        if row.seconds is None:
            print(f"{named}  not run: {row.reason}")
        else:
            print(f"{named}{row.seconds * 1e3:>12,.2f}{row.tokens_per_second:>14,.0f}", flush=True)
    if path is not None:
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(bench.BenchConfig)}
        table = {
            "machine": machine,
            "settings": settings,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        path.write_text(json.dumps(table, indent=2) + "\n")
        print(f"wrote {path}")
