"""Models that tests of this room share."""

from sharp_models import gemma2, gpt_oss, llama, mistral  # noqa: F401, fixtures
