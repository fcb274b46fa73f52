"""Where electricity's grams of CO2e per kWh come from, and what making a GPU costs.

The factors are codecarbon's tables, read as files of the installed package: it is never
imported, so nothing here touches the network, writes a file or reads a configuration. This
is the only door to them. The arithmetic with joules is in ``grams``.
"""

import csv
import difflib
import hashlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from minference_green.errors import UsageError
from minference_green.results import CarbonTerms, EmissionFactor

_PACKAGE = "codecarbon"
_COUNTRIES = "data/private_infra/global_energy_mix.json"
_WORLD = "data/private_infra/carbon_intensity_per_source.json"
_USA = "data/private_infra/2023/usa_emissions.json"
_CANADA = "data/private_infra/2023/canada_energy_mix.json"
_CHINA = "data/private_infra/2023/china_provincial_emissions.json"
_NORDIC = "data/private_infra/nordic_emissions.json"
_CLOUD = "data/cloud/impact.csv"
CPU_POWER = "data/hardware/cpu_power.csv"

_G_PER_KWH_OF_LB_PER_MWH = 0.45359237

_CANADA_G_PER_KWH = {"coal": 995.725971, "petroleum": 816.6885263, "naturalGas": 743.8415916}
"""What codecarbon multiplies Canada's mix by (github.com/responsibleproblemsolving/energy-usage);
everything else counts as zero at the plant."""

_NORDIC_ZONES = {"SWE": "SE", "NOR": "NO", "FIN": "FI"}
_REGIONAL = ("USA", "CAN", "CHN", *_NORDIC_ZONES)

EMBODIED_G_PER_SECOND = (273.0 + 5700.0 / 8) * 1000 / (3 * 365 * 86400)
"""Per GPU: 273 kg for the GPU, an eighth of a 5700 kg server, over three years: 0.0104."""

_EMBODIED_SOURCE = (
    "default per GPU: EcoLogits' 273 kg per GPU + 1/8 of a 5700 kg server over 3 years, "
    "good within a factor of 2"
)

_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class Table:
    """One file of codecarbon, with what proves which one it was."""

    file: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def source(self) -> str:
        """Package, version and file, in words."""
        return f"{_PACKAGE} {metadata.version(_PACKAGE)}, {self.file}"

    def json(self) -> dict[str, Any]:
        """The content as a JSON object; raises ``UsageError`` if it is none."""
        data = self._parse(json.loads)
        if not isinstance(data, dict):
            raise _damaged(self, "no JSON object")
        return data

    def entries(self, under: str | None = None) -> dict[str, dict[str, Any]]:
        """The places in the content by name, or in what it holds ``under`` a key."""
        found = self.json() if under is None else self.json().get(under)
        if not isinstance(found, dict) or not all(isinstance(e, dict) for e in found.values()):
            raise _damaged(self, "not a record per place")
        return found

    def rows(self) -> list[dict[str, str]]:
        """The content as CSV rows by column; raises ``UsageError`` if it is none."""
        return self._parse(
            lambda raw: list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig")), strict=True))
        )

    def _parse(self, parser: Callable[[bytes], _Parsed]) -> _Parsed:
        try:
            return parser(self.content)
        except (ValueError, csv.Error) as error:
            raise _damaged(self, str(error)) from error


def table(file: str) -> Table:
    """A file of the installed codecarbon, by its path in the package.

    Raises ``UsageError`` if the package or the file is missing.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"{_PACKAGE} is not installed, and its tables of emission factors with it; "
            'install it with pip install "codecarbon>=3.3,<3.4", or give --intensity and '
            "--intensity-source"
        )
    try:
        return Table(file, (Path(spec.origin).parent / file).read_bytes())
    except OSError as error:
        raise UsageError(
            f"{file} of {_PACKAGE} cannot be read ({error.strerror}); "
            f'install it again: pip install --force-reinstall "codecarbon>=3.3,<3.4"'
        ) from error


def terms(
    *,
    country: str | None = None,
    region: str | None = None,
    cloud: str | None = None,
    intensity: float | None = None,
    intensity_source: str | None = None,
    pue: float = 1.0,
    gpus: int = 0,
    embodied_g_per_second: float | None = None,
    embodied_source: str | None = None,
) -> CarbonTerms:
    """What turns joules and seconds into grams; location as for :func:`factor`.

    ``pue`` is the data centre's power usage effectiveness, at least 1. Embodied emissions are
    ``embodied_g_per_second`` for everything reserved, with ``embodied_source``, or a default
    per GPU. Raises ``UsageError`` naming the value that cannot be used.
    """
    if not (math.isfinite(pue) and pue >= 1):
        raise UsageError(f"PUE is total over IT energy, so at least 1; got {pue}")
    if embodied_g_per_second is None:
        rate = gpus * EMBODIED_G_PER_SECOND
        source = _EMBODIED_SOURCE if gpus else "not counted: no default without a GPU"
    else:
        rate, source = embodied_g_per_second, embodied_source or ""
        if not (math.isfinite(rate) and rate >= 0):
            raise UsageError(f"embodied emissions must be 0 or more grams per second, got {rate}")
        if not source:
            raise UsageError("embodied emissions need their source: give --embodied-source")
    return CarbonTerms(
        factor=factor(
            country=country,
            region=region,
            cloud=cloud,
            intensity=intensity,
            intensity_source=intensity_source,
        ),
        pue=pue,
        embodied_g_per_second=rate,
        embodied_source=source,
    )


def factor(
    *,
    country: str | None = None,
    region: str | None = None,
    cloud: str | None = None,
    intensity: float | None = None,
    intensity_source: str | None = None,
) -> EmissionFactor:
    """Grams of CO2e per kWh of one place, with where the number comes from.

    ``country`` is an ISO 3166-1 alpha-3 code (FRA), ``region`` a US state, Canadian or
    Chinese province (name or code) or Nordic bidding zone (SE3) of it, ``cloud`` is
    ``provider:region``, ``intensity`` a value of the user's own with its source. Without any
    of them: the world average, marked ``assumed``. Nothing is guessed: an unknown code
    raises ``UsageError`` with close matches, as do two locations at once.
    """
    given = [
        name
        for name, value in (("country", country), ("cloud", cloud), ("intensity", intensity))
        if value not in (None, "")
    ]
    if len(given) > 1:
        raise UsageError(f"give one location, not --{' and --'.join(given)} together")
    if region and not country:
        raise UsageError(f"--region {region} needs its --country ({', '.join(_REGIONAL)})")
    if intensity_source and intensity is None:
        raise UsageError(f"--intensity-source {intensity_source!r} needs --intensity")
    if intensity is not None:
        return _user_supplied(intensity, intensity_source)
    if cloud:
        return _cloud(cloud)
    if country:
        code = country.strip().upper()
        return _region(code, region.strip()) if region else _country(code)
    return _world()


def places(*, cloud: bool = False) -> list[EmissionFactor]:
    """Every country, or every cloud region, that has a factor, by name.

    A country whose entry holds no number is left out, as :func:`factor` refuses it.
    """
    if cloud:
        regions = [f"{r.get('provider')}:{r.get('region')}" for r in table(_CLOUD).rows()]
        return [_cloud(region) for region in sorted(regions)]
    countries = table(_COUNTRIES).entries()
    known = (c for c in countries if countries[c].get("carbon_intensity") is not None)
    return [_country(code) for code in sorted(known)]


def _user_supplied(intensity: float, source: str | None) -> EmissionFactor:
    if not (math.isfinite(intensity) and intensity >= 0):
        raise UsageError(f"--intensity must be 0 or more grams of CO2e per kWh, got {intensity}")
    if not source:
        raise UsageError(f"--intensity {intensity:g} needs its source: --intensity-source TEXT")
    return EmissionFactor(
        g_per_kwh=intensity,
        location="given by the user",
        year=None,
        kind="user supplied",
        boundary="as the source says",
        source=source,
    )


def _world() -> EmissionFactor:
    of = table(_WORLD)
    data = of.json()
    return _factor(
        of,
        _value(of, data, "world_average"),
        location="world average",
        # The IEA's status report of March 2019 gives the average of 2018.
        year=2018,
        boundary="CO2 only",
        detail=str(data.get("world_average_source", "")),
        assumed=True,
    )


def _country(code: str) -> EmissionFactor:
    of = table(_COUNTRIES)
    countries = of.entries()
    entry = _known_country(code, countries)
    return _factor(
        of,
        _value(of, entry, "carbon_intensity"),
        location=f"{code} ({entry.get('country_name', code)})",
        year=int(_value(of, entry, "year")),
        boundary="lifecycle",
    )


def _known_country(code: str, countries: Mapping[str, dict[str, Any]]) -> Mapping[str, Any]:
    if code in countries:
        return countries[code]
    names = {str(c.get("country_name", "")).upper(): k for k, c in countries.items()}
    near = [names[n] for n in difflib.get_close_matches(code, names, 2, 0.8)]
    near += difflib.get_close_matches(code, countries, 3, 0.6)
    hints = [f"{k} ({countries[k]['country_name']})" for k in dict.fromkeys(near)]
    raise UsageError(
        f"{code} is no country of the table; give an ISO 3166-1 alpha-3 code"
        + (f", perhaps {', '.join(hints)}" if hints else " such as FRA or USA")
    )


def _region(code: str, region: str) -> EmissionFactor:
    _known_country(code, table(_COUNTRIES).entries())
    match code:
        case "USA":
            return _usa(region)
        case "CAN":
            return _canada(region)
        case "CHN":
            return _china(region)
        case "SWE" | "NOR" | "FIN":
            return _nordic(code, region)
    raise UsageError(
        f"there are no regional factors for {code}, so --region {region} says nothing; "
        f"regions are known for {', '.join(_REGIONAL)}"
    )


def _usa(region: str) -> EmissionFactor:
    of = table(_USA)
    states = {k: v for k, v in of.entries().items() if not k.startswith("_")}
    names = {name: name for name in states}
    names |= {str(v.get("regionCode", "")).lower(): name for name, v in states.items()}
    name = _known_region(region, names, "USA")
    return _factor(
        of,
        _value(of, states[name], "emissions") * _G_PER_KWH_OF_LB_PER_MWH,
        location=f"USA/{name}",
        year=2023,
        boundary="CO2e at the plant",
        detail="EPA eGRID2023",
    )


def _canada(region: str) -> EmissionFactor:
    of = table(_CANADA)
    provinces = of.entries()
    name = _known_region(region, {p: p for p in provinces}, "CAN")
    mix = provinces[name]
    total = _value(of, mix, "total")
    if total <= 0:
        raise _damaged(of, f"the mix of {name} has no total")
    grams = sum(_value(of, mix, fuel) * g for fuel, g in _CANADA_G_PER_KWH.items()) / total
    return _factor(
        of,
        grams,
        location=f"CAN/{name}",
        year=None,
        boundary="CO2 at the plant",
        detail="generation mix x per-fuel factors",
    )


def _china(region: str) -> EmissionFactor:
    of = table(_CHINA)
    provinces = of.entries("data")
    names = {code.lower(): code for code in provinces}
    names |= {code.lower().removeprefix("cn-"): code for code in provinces}
    names |= {name: code for code, p in provinces.items() for name in p.get("names", ())}
    code = _known_region(region, names, "CHN")
    return _factor(
        of,
        _value(of, provinces[code], "emission_factor"),
        location=f"CHN/{str(provinces[code].get('description', code)).lower()}",
        year=int(_value(of, provinces[code], "year")),
        boundary="CO2 only",
        detail="Ministry of Ecology and Environment of China, announcement 2025 No. 47",
    )


def _nordic(country: str, region: str) -> EmissionFactor:
    of = table(_NORDIC)
    zones = of.entries("data")
    own = {z.lower(): z for z in zones if z.startswith(_NORDIC_ZONES[country])}
    zone = _known_region(region, own, country)
    return _factor(
        of,
        _value(of, zones[zone], "emission_factor"),
        location=f"{country}/{zone.lower()}",
        year=int(_value(of, zones[zone], "year")),
        boundary="lifecycle",
        detail="generation mix x per-source factors",
    )


def _cloud(cloud: str) -> EmissionFactor:
    of = table(_CLOUD)
    wanted = cloud.strip().lower()
    if ":" not in wanted:
        raise UsageError(f"--cloud {cloud} is not provider:region, such as gcp:us-central1")
    regions = {f"{row.get('provider')}:{row.get('region')}": row for row in of.rows()}
    if wanted not in regions:
        near = difflib.get_close_matches(wanted, regions, 3, 0.7)
        providers = sorted({name.partition(":")[0] for name in regions})
        raise UsageError(
            f"--cloud {cloud} is not in the table, which holds {', '.join(providers)}; "
            + (f"perhaps {', '.join(near)}" if near else "give --country instead")
        )
    row = regions[wanted]
    return _factor(
        of,
        _value(of, row, "impact"),
        location=f"{wanted} ({row.get('city') or row.get('country_name')})",
        year=None,
        boundary="CO2e as the provider publishes it",
        detail=str(row.get("source", "")),
    )


def _known_region(region: str, names: Mapping[str, str], country: str) -> str:
    """The table's own name of a region, by any of its ``names`` (lower case)."""
    wanted = re.sub(r"[\s_-]+", " ", region.strip().lower())
    spellings = {re.sub(r"[\s_-]+", " ", name): own for name, own in names.items()}
    if wanted in spellings:
        return spellings[wanted]
    near = difflib.get_close_matches(wanted, spellings, 3, 0.7)
    every = sorted(set(names.values()))
    raise UsageError(
        f"{region} is no region of {country} in the table; "
        + (f"perhaps {', '.join(near)}" if near else f"it has {_listed(every)}")
    )


def _factor(
    of: Table,
    g_per_kwh: float,
    *,
    location: str,
    year: int | None,
    boundary: str,
    detail: str = "",
    assumed: bool = False,
) -> EmissionFactor:
    if g_per_kwh < 0:
        raise _damaged(of, f"{location} has {g_per_kwh} g/kWh")
    return EmissionFactor(
        g_per_kwh=g_per_kwh,
        location=location,
        year=year,
        kind="average",
        boundary=boundary,
        source=of.source + (f" ({detail})" if detail else ""),
        file=of.file,
        sha256=of.sha256,
        assumed=assumed,
    )


def _value(of: Table, entry: Mapping[str, Any], key: str) -> float:
    """A finite number of a table; anything else means that the table is damaged."""
    try:
        value = float(entry[key])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(of, f"no number for {key}") from error
    if not math.isfinite(value):
        raise _damaged(of, f"{key} is {value}")
    return value


def _damaged(of: Table, what: str) -> UsageError:
    return UsageError(
        f"{of.source} is damaged or of another version ({what}); "
        f'install it again: pip install --force-reinstall "codecarbon>=3.3,<3.4"'
    )


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:12]) + (f" and {len(every) - 12} more" if len(every) > 12 else "")
