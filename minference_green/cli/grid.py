"""Where the electricity comes from: the options several commands share."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from minference_green.bench import Grid

Country = Annotated[str, typer.Option(help="ISO code of the grid, such as FRA.")]
Region = Annotated[str, typer.Option(help="Region of the country, such as california.")]
Cloud = Annotated[str, typer.Option(help="provider:region, such as gcp:us-central1.")]
Intensity = Annotated[float | None, typer.Option(help="Your own factor in gCO2e per kWh.")]
IntensitySource = Annotated[str, typer.Option(help="Where --intensity comes from.")]
Pue = Annotated[float, typer.Option(help="Power usage effectiveness, 1 or more.")]
Embodied = Annotated[
    float | None,
    typer.Option(
        help="Grams of CO2e per second of making the hardware reserved; default: per GPU."
    ),
]
EmbodiedSource = Annotated[str, typer.Option(help="Where --embodied comes from.")]


def located(
    *,
    country: str,
    region: str,
    cloud: str,
    intensity: float | None,
    intensity_source: str,
    pue: float,
    embodied: float | None,
    embodied_source: str,
) -> "Grid":
    """The place these options mean; an unknown one is refused before anything is loaded."""
    from minference_green.bench import Grid
    from minference_green.carbon import terms

    grid = Grid(
        country=country or None,
        region=region or None,
        cloud=cloud or None,
        intensity=intensity,
        intensity_source=intensity_source or None,
        pue=pue,
        embodied_g_per_second=embodied,
        embodied_source=embodied_source or None,
    )
    terms(**grid.model_dump())
    return grid
