"""act-export generate: continues a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
import typer.core

from act_export.commands.console import (
    note,
)
from act_export.commands.options import (
    DeviceOption,
    FileArgument,
    PortableOption,
    RequestOption,
    TokenizerOption,
    TrustOption,
)
from act_export.commands.printing import printable
from act_export.errors import needs_extras


def generate_command(
    file: FileArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue, or with --chat the user's message.")
    ],
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="64; it may end before.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens, as the model's generation_config.json says.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens at this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up this much.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    ignore_generation_config: Annotated[
        bool, typer.Option("--ignore-generation-config", help="Leave out the penalties etc. that it asks for.")
    ] = False,
    calibration: RequestOption = None,
    portable: PortableOption = False,
    device: DeviceOption = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generates text, streaming it: greedily, or with --sample or --temperature by drawing tokens."""
    from act_export.runtime import Session
    from act_export.runtime.request import DEFAULT
    from act_export.runtime.text import generation_of_options, load_generation_settings, load_tokenizer, stream_text

    sampling, options = generation_of_options(sample, temperature, top_k, top_p, seed)
    if options and not sampling.temperature:
        note(f"{', '.join(options)}: no effect without --sample or --temperature")
    given = None
    if tokenizer is not None:  # refused before the model is opened
        with needs_extras("a tokenizer"):
            from act_export.checkpoint.tokenizer import load_tokenizer_of

            given = load_tokenizer_of(tokenizer, trust_remote_code=trust_remote_code)
    chosen = DEFAULT if calibration is None else calibration
    with Session.open(file, native=not portable, device=device or "cpu", calibration=chosen) as session:
        text_tokenizer = given if given is not None else load_tokenizer(session, trust_remote_code=trust_remote_code)
        settings = load_generation_settings(session, text_tokenizer, ignored=ignore_generation_config, note=note)
        pieces = stream_text(
            session,
            text_tokenizer,
            prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            settings=settings.but(**options),
            note=note,
        )
        for piece in pieces:
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print()
