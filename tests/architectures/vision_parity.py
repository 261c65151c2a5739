"""The table of vision-language models: text towers proven on tiny random models, with images where they take them.

    .venv/bin/python tests/architectures/vision_parity.py [--only qwen2_vl]

Text: the exported tower, calibrated, against PyTorch in every case of `act-export verify`. Images: two prompts with an
image each, the shorter one padded, and six tokens after them, against the whole model; see `tiny_vision`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tiny models are

from architectures import CALIBRATION
from tiny_vision import CONFIGURATIONS, compare_with_whole, tiny_whole, tower_checkpoint

from act_export.checkpoint.text_tower import IMAGES_AS_EMBEDDINGS
from act_export.export import build_model
from act_export.export.embedding import write_embedding
from act_export.onnx_file.inspect import inspect_file
from act_export.runtime import Session
from act_export.verify.parity.job import verify_file

LARGEST_DIFFERENCE = 1e-4  # of a logit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CONFIGURATIONS)
    only = parser.parse_args().only
    print("| family | text, native | text, portable | images, native | images, portable | nodes |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = max(row(family) for family in ([only] if only else CONFIGURATIONS))
    return int(worst > LARGEST_DIFFERENCE)


def row(family: str) -> float:
    """Prints a family's differences and returns the largest."""
    whole = tiny_whole(family)
    checkpoint = tower_checkpoint(whole)
    sees = family in IMAGES_AS_EMBEDDINGS
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        build_model(checkpoint, CALIBRATION, path, inputs_embeds=sees)
        if sees:
            write_embedding(checkpoint, path.parent / "embedding.onnx")
        report = verify_file(path, checkpoint, CALIBRATION)
        found = [engine.max_difference for engine in report.engines]
        for native in (True, False) if sees else ():
            with Session.open(path, native=native) as session:
                compared = compare_with_whole(whole, checkpoint.model, session, CALIBRATION)
                found.append(max(compared.prompt, compared.decode))
        figures = [f"{difference:.1e}" for difference in found] + ["text alone"] * (4 - len(found))
        print(f"| {family} | {' | '.join(figures)} | {inspect_file(path).nodes} |", flush=True)
    return max(found)


if __name__ == "__main__":
    sys.exit(main())
