"""`dilax tune`."""

import dataclasses

from dilax import tune


@dataclasses.dataclass(frozen=True)
class Tune(tune.TuneConfig):
    """Search the tile sizes of the kernels on this machine's GPU, and check each."""

    def run(self) -> None:
        """Print each trial, then what each kernel should use."""
        trials = []
        for trial in tune.tune(self):
            if not trials:
                print(trial.HEADER, "-" * len(trial.HEADER), sep="\n")
            trials.append(trial)
            print(trial.line(), flush=True)
        for kernel in self.kernels:
            print(tune.verdict(kernel, trials))
