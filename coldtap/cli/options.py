"""Options that several commands share, as Typer annotations: each means, and says, the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

# Of what a command reads.
CompleteStore = Annotated[Path, typer.Argument(metavar="STORE", help="A complete store.")]
FinishedRun = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")]

RunAdaptor = Annotated[
    str | None,
    typer.Option(
        "--adaptor",
        metavar="MODULE:NAME",
        help="The run's adaptor, where it is none of coldtap's own: no file says which code is imported.",
    ),
]

FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Read files that are links, as hub caches, DVC and git-annex lay them out. Links to folders are never "
        "followed.",
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]

Format = Annotated[str, typer.Option("--format", help="onnx.")]

# Of a store that is written.
Tier = Annotated[str, typer.Option(help="float32, float16, bfloat16, or int8: codes with a bounded error.")]
Layout = Annotated[
    str | None, typer.Option(help="Of int8: compact (zstd; the default) or fast (twice the speed, a third larger).")
]
MaxError = Annotated[
    float | None, typer.Option(help="Of int8, instead: largest error of a value, in deviations of its channel.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the forecast of bytes and time, write nothing.")]

# Of a training.
Epochs = Annotated[int, typer.Option(help="Passes over the train split.")]
BatchSize = Annotated[int, typer.Option(help="Samples per step.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices; biases and norms have none.")]

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
