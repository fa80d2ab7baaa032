"""`dilax generate`."""

import dataclasses
import os
import sys

from dilax.generate import generate
from dilax.training import load_model


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a text with a model that `dilax train --checkpoint-dir` trained."""

    checkpoint_dir: str
    """What dilax train was given."""
    prompt: str = ""
    """The beginning of the text."""
    max_new_tokens: int = 256
    """How many bytes at most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable byte every time."""
    top_k: int | None = None
    """Sample among the k most probable bytes only."""
    seed: int = 0
    """Of the random choices."""
    step: int | None = None
    """Which checkpoint; None for the latest."""

    def run(self) -> None:
        """Print the prompt and what follows."""
        model, _ = load_model(self.checkpoint_dir, self.step)
        prompt = os.fsencode(self.prompt)  # any bytes may come from a shell
        text = generate(
            model,
            prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )
        coding = sys.stdout.encoding or "utf-8"
        shown = (prompt + text).decode(errors="replace")
        print(shown.encode(coding, errors="replace").decode(coding))
