"""What the study trains: methods x learning rates x seeds, and all its other numbers.

The time on two cores, a process on each. Measured, in seconds of one process:
    start of a seed (reward, SFT, pairs)     143
    a run: 240 updates, 12 measurements       42    (57 beside other work)
    5 starts on 2 processes: 3 rounds        430
    12 settings x 7 rates x 5 seeds / 2     8820
    together                                9250    2.6 hours
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from config import Config


class Setting(NamedTuple):
    """A method with its own numbers; with a learning rate and a seed it is a run."""

    method: str  # DPO, TDPO1 or TDPO2
    alpha: float  # of TDPO2; DPO is TDPO2 with 0
    beta: float

    @property
    def variant(self) -> str:
        return "tdpo1" if self.method == "TDPO1" else "tdpo2"


class RunKey(NamedTuple):
    setting: Setting
    learning_rate: float
    seed: int


BETA = 0.1
DPO = Setting("DPO", 0.0, BETA)
TDPO1 = Setting("TDPO1", 1.0, BETA)
TDPO2 = tuple(Setting("TDPO2", alpha, BETA) for alpha in (0.1, 0.3, 0.5, 0.7))
DPO_OTHER_BETAS = tuple(Setting("DPO", 0.0, beta) for beta in (0.05, 0.2, 0.5, 1.0, 2.0))
TDPO2_OTHER_BETAS = (Setting("TDPO2", 0.5, 0.5),)


@dataclass(frozen=True)
class Plan:
    config: Config  # its beta, alpha and learning_rates are the demo's own and not used
    settings: tuple[Setting, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    measured_pairs: int  # training pairs on which SeqKL is measured, and as many held-out ones

    def runs(self) -> Iterator[RunKey]:
        """Seed by seed, so that a study that ends early has a few whole seeds, not many parts."""
        for seed in self.seeds:
            for setting in self.settings:
                for learning_rate in self.learning_rates:
                    yield RunKey(setting, learning_rate, seed)

    def config_of(self, seed: int) -> Config:
        return replace(self.config, seed=seed)

    def evaluate_at(self) -> list[int]:
        """Steps, denser at the beginning, where reward and KL change fastest."""
        steps, points = self.config.steps, self.config.evaluations
        return sorted({max(1, round(steps * ((i + 1) / points) ** 2)) for i in range(points)})

    def conditions(self) -> dict[str, Any]:
        """What all runs of one file of results must have in common."""
        own = {"seed", "learning_rates", "alpha", "beta"}
        common = {name: value for name, value in asdict(self.config).items() if name not in own}
        return {**common, "measured_pairs": self.measured_pairs}


FULL = Plan(
    config=replace(Config(), steps=240, evaluations=12),
    settings=(DPO, TDPO1, *TDPO2, *DPO_OTHER_BETAS, *TDPO2_OTHER_BETAS),
    learning_rates=(2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
    seeds=(0, 1, 2, 3, 4),
    measured_pairs=128,
)

QUICK = Plan(
    config=replace(
        Config(),
        reviews=1500,
        width=64,
        layers=1,
        vocabulary_size=512,
        sft_sentences=512,
        sft_epochs=1,
        pair_prompts=64,
        smallest_gap=0.05,
        steps=6,
        batch_size=8,
        evaluations=3,
        evaluation_prompts=32,
    ),
    settings=(DPO, TDPO2[2]),
    learning_rates=(5e-4,),
    seeds=(0, 1),
    measured_pairs=8,
)
