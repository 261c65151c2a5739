"""What a search is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from act_export.calibration.file import DEFAULT_BETA, DEFAULT_THRESHOLD, Calibration, CalibrationError
from act_export.calibration.recipes import FORMER_RANKINGS
from act_export.errors import ActExportError, shown
from act_export.tasks import Generation, Questions, Splits

METHODS = ("act", "gamma", "fit")
PRECISIONS = ("auto", "own")
GOALS = ("accuracy", "beyond-remedy")
RANKINGS = ("gradient", "gradient+confirm", "exhaustive")
HEAD_COUNTS = (1, 3, 10, 20, 40, 80)
BATCH_TOKENS = 2048
_MOST_HEADS = 1_000_000
_RANGES = (
    ("confirm", 1, _MOST_HEADS),
    ("batch_tokens", 1, 2**40),
    ("random_draws", 0, 10_000),
    ("fit_steps", 1, 1000),
    ("fit_l2", 0, 1000),
    ("fit_l1", 0, 1),
)


@dataclass(frozen=True)
class SearchTask:
    """One task's questions to search on.

    Attributes:
        name: What to call them.
        splits: To rank heads, to choose how many, and to report what that gains.
        length_normalized: Compare choices by log-likelihood per token.
        generation: How answers are generated and compared; None where there are choices.
        questions: How they are put. With its seed random heads are drawn too.
    """

    name: str
    splits: Splits
    length_normalized: bool = False
    generation: Generation | None = None
    questions: Questions = field(default_factory=Questions)

    def __post_init__(self) -> None:
        """Raises ActExportError for questions that every answer would be right to."""
        if self.generation is None:
            for example in (*self.splits.rank, *self.splits.choose, *self.splits.report):
                if len(example.choices) < 2:
                    raise ActExportError(
                        f"{self.name} has a question with fewer than two choices "
                        f"({example.where or example.prompt}); it needs them, or generation settings"
                    )


def check_goal(goal: str, tasks: Sequence[SearchTask]) -> None:
    """Refuses a goal that makes no sense for a task.

    Raises:
        ActExportError: Naming the task.
    """
    generated = [task.name for task in tasks if task.generation is not None]
    if generated and goal != "accuracy":
        raise ActExportError(
            f"the goal is {goal}, but answers to {generated[0]} are generated, and there is no remedy that sets a lean "
            f"right in such; pass --goal accuracy"
        )


@dataclass(frozen=True)
class Threshold:
    """What a later sink is: a threshold of the sink score, and its mode, as in `act_export.Calibration`."""

    value: float = DEFAULT_THRESHOLD["absolute"]
    mode: str = "absolute"


def thresholds_of(values: Sequence[float], modes: str | None) -> tuple[Threshold, ...]:
    """Thresholds to try.

    Args:
        values: None for each mode's default.
        modes: "absolute", "relative", or both by comma; None for absolute.

    Raises:
        CalibrationError: For another mode, or for values of two modes: they mean different things.
    """
    names = [mode.strip() for mode in (modes or "absolute").split(",")]
    unknown = [name for name in names if name not in DEFAULT_THRESHOLD]
    if unknown:
        raise CalibrationError(f"threshold_mode is {unknown[0]!r}; it must be {' or '.join(DEFAULT_THRESHOLD)}")
    if values and len(names) > 1:
        raise CalibrationError(
            f"the thresholds {', '.join(f'{value:g}' for value in values)} can't be of two modes at once; leave them "
            f"out to try each mode's default"
        )
    return tuple(Threshold(value, mode) for mode in names for value in values or (DEFAULT_THRESHOLD[mode],))


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        methods: What is tried, all in one decision: "act" weakens the later sinks of the first heads, the paper's way;
            "gamma" sets the initial token's strength of the first heads; "fit" both strengths of all heads.
        ranking: How "act" ranks heads: "gradient", "exhaustive" or "gradient+confirm".
        betas: Of "act", to try. Each alone; and each below 1 together with each above, every head taking what suits it.
        gammas: Of "gamma", to try: every head takes the one or its inverse, whichever suits it.
        thresholds: To try.
        head_counts: Numbers of heads to try.
        fit_steps: Of "fit", to try: strengths after so many gradient steps.
        fit_l2: Of "fit", to try: how strongly strengths are drawn back to 1.
        fit_l1: Of "fit": strengths whose derivative is below this share of the largest stay at 1; 0 moves all.
        confirm: How many of the heads that the gradient ranks first "gradient+confirm" measures exactly, for each beta.
        batch_tokens: Positions that run together at the most, which bounds memory; see
            `act_export.tasks.batching.positions_of`. One example alone may have more.
        gradient_checkpointing: A third of the memory for ranking, for a third more time.
        random_draws: How often as many random heads are measured instead, as a control.
        precision: "own" searches in the model's own; "auto" in bfloat16 where that is faster, see
            `act_export.search.precision`.
        goal: "accuracy" of the model as it is; or "beyond-remedy", what calibration adds for a program that puts an
            offset on each answer anyway: heads are ranked, strengths fitted and candidates chosen by how well they tell
            answers apart, whatever the model leans to and however sure it is.
    """

    methods: tuple[str, ...] = ("act", "fit")
    ranking: str = "gradient"
    betas: tuple[float, ...] = (DEFAULT_BETA,)
    gammas: tuple[float, ...] = (0.6,)
    thresholds: tuple[Threshold, ...] = (Threshold(),)
    head_counts: tuple[int, ...] = HEAD_COUNTS
    fit_steps: tuple[int, ...] = (2, 3, 5)
    fit_l2: tuple[float, ...] = (1e-4,)
    fit_l1: float = 0.0
    confirm: int = 40
    batch_tokens: int = BATCH_TOKENS
    gradient_checkpointing: bool = False
    random_draws: int = 1
    precision: str = "auto"
    goal: str = "accuracy"

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            CalibrationError: For a beta or threshold that no calibration may have.
            ActExportError: For any other value, naming it.
        """
        unknown = next((name for name in self.methods if name not in METHODS), None)
        if unknown is not None:
            ranking = FORMER_RANKINGS.get(unknown, unknown)
            advice = f"--ranking {ranking} is how heads are ranked; " if ranking in RANKINGS else ""
            raise ActExportError(f"there is no method {unknown!r}; {advice}methods are {', '.join(METHODS)}")
        if self.ranking in FORMER_RANKINGS:
            now = FORMER_RANKINGS[self.ranking]
            raise ActExportError(f"the ranking {self.ranking!r} is called {now} now; pass --ranking {now}")
        if self.ranking not in RANKINGS:
            raise ActExportError(f"there is no ranking {self.ranking!r}; it must be {', '.join(RANKINGS)}")
        if self.precision not in PRECISIONS:
            raise ActExportError(f"precision is {self.precision!r}; it must be {' or '.join(PRECISIONS)}")
        if self.goal not in GOALS:
            raise ActExportError(f"the goal is {self.goal!r}; it must be {' or '.join(GOALS)}")
        for name in ("methods", "betas", "gammas", "thresholds", "head_counts", "fit_steps", "fit_l2"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ActExportError(f"{name} are {values}; name at least one, and none twice")
        for beta in self.betas:
            Calibration({}, beta)
            if beta == 1:
                raise CalibrationError(
                    "beta is 1, which changes nothing; below 1 weakens later sinks, above 1 strengthens"
                )
        for gamma in self.gammas:
            Calibration({}, gamma=gamma)
            if gamma == 1:
                raise CalibrationError("gamma is 1, which changes nothing; 0.5 halves the initial token or doubles it")
        for threshold in self.thresholds:
            Calibration({}, threshold=threshold.value, threshold_mode=threshold.mode)
        for name, least, most in _RANGES:
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not least <= value <= most:
                    bound = f"at least {least}" if value < least else f"at most {most}"
                    raise ActExportError(f"{name} is {value}; it must be {bound}")
        if not all(1 <= count <= _MOST_HEADS for count in self.head_counts):
            raise ActExportError(
                f"the numbers of heads are {shown(self.head_counts)}; each must be at least 1 and at most {_MOST_HEADS}"
            )
