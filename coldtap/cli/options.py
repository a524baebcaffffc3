"""Options that several commands share, as Typer annotations: each means, and says, the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]

# Of a backbone.
Checkpoint = Annotated[
    Path | None, typer.Option(help="Local weights instead of the pretrained ones: safetensors or a state dict.")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="No trained weights at all: for measurements.")]
InputSize = Annotated[int | None, typer.Option(help="Side of the input in pixels. Default: the model's.")]

# Of its quantisation.
QuantisableModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A timm model name (ViT, DeiT or ResNet), or coldtap/vit-reference.")
]
Scheme = Annotated[str, typer.Option(help="Bits of weights and activations: w8a8, w6a6, w4a8 or w4a4.")]
Ranges = Annotated[str, typer.Option(help="How ranges are chosen: least-squares or percentile.")]
Reparameterise = Annotated[
    bool,
    typer.Option(
        "--reparameterise/--no-reparameterise", help="Give the channels behind a layer norm one range first (RepQ-ViT)."
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=SCHEME",
        help="Other bits, or float, for layers of that name, such as 'blocks.0.*=w8a8'; repeat it. The first layer has "
        "w8a8 unless one matches it.",
    ),
]
Target = Annotated[str, typer.Option(help="What a site should give: local (float on the quantised stream) or true.")]
