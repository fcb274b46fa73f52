"""Emission factors: known values, their provenance, and nothing guessed."""

import socket

import pytest

from minference_green import carbon
from minference_green.errors import UsageError


@pytest.mark.parametrize(
    ("place", "grams"),
    [
        ({"country": "FRA"}, 56.039),
        ({"country": "usa"}, 369.473),
        ({"country": "DEU"}, 380.95),
        ({"country": "SWE", "region": "se3"}, 27.0),
        ({"country": "USA", "region": "california"}, 179.06),
        ({"country": "USA", "region": "CA"}, 179.06),
        ({"country": "USA", "region": "Virginia"}, 244.76),
        ({"country": "USA", "region": "new_york"}, None),
        ({"country": "CAN", "region": "quebec"}, 3.94),
        ({"country": "CAN", "region": "British Columbia"}, None),
        ({"country": "CHN", "region": "beijing"}, 555.4),
        ({"country": "CHN", "region": "CN-BJ"}, 555.4),
        ({"country": "CHN", "region": "inner-mongolia"}, None),
        ({"country": "NOR", "region": "NO1"}, None),
        ({"cloud": "gcp:us-central1"}, 430.0),
        ({"cloud": "GCP:us-central1"}, 430.0),
        ({}, 475.0),
    ],
)
def test_known_places_have_their_factor_with_its_provenance(place, grams):
    """Values of codecarbon 3.3.2; the US table is in pounds per MWh."""
    found = carbon.factor(**place)
    if grams is not None:
        assert found.g_per_kwh == pytest.approx(grams, abs=0.005)
    assert 0 < found.g_per_kwh < 1500
    assert found.kind == "average"
    assert len(found.sha256) == 64
    assert found.file.startswith("data/")
    assert found.file in found.source
    assert "codecarbon 3.3" in found.source


@pytest.mark.parametrize(
    ("place", "year", "boundary"),
    [
        ({"country": "FRA"}, 2023, "lifecycle"),
        ({"country": "SWE", "region": "SE1"}, 2025, "lifecycle"),
        ({"country": "USA", "region": "TX"}, 2023, "CO2e at the plant"),
        ({"country": "CAN", "region": "ontario"}, None, "CO2 at the plant"),
        ({"country": "CHN", "region": "hebei"}, 2023, "CO2 only"),
        ({}, 2018, "CO2 only"),
    ],
)
def test_year_and_boundary_are_those_of_the_table(place, year, boundary):
    found = carbon.factor(**place)
    assert (found.year, found.boundary) == (year, boundary)


def test_only_the_world_average_is_assumed():
    assert carbon.factor().assumed
    assert carbon.factor(country="", region=None, cloud="").assumed
    assert not carbon.factor(country="FRA").assumed


def test_a_value_of_the_users_own_keeps_its_source():
    found = carbon.factor(intensity=0.0, intensity_source="our wind farm, 2025 contract")
    assert (found.g_per_kwh, found.kind) == (0.0, "user supplied")
    assert found.source == "our wind farm, 2025 contract"
    assert not found.assumed


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"country": "FRX"}, r"FRA \(France\)"),
        ({"country": "FR"}, r"FRA \(France\)"),
        ({"country": "France"}, r"FRA \(France\)"),
        ({"country": "EU"}, "alpha-3"),
        ({"country": "QQQ"}, "QQQ"),
        ({"country": "USA", "region": "californa"}, "california"),
        ({"country": "USA", "region": "ZZ"}, "alabama"),
        ({"country": "USA", "region": "_source"}, "no region of USA"),
        ({"country": "CAN", "region": "quebek"}, "quebec"),
        ({"country": "CHN", "region": "tibet"}, "no region of CHN"),
        ({"country": "SWE", "region": "NO1"}, "no region of SWE"),
        ({"country": "FRA", "region": "bretagne"}, "no regional factors for FRA"),
        ({"country": "XXX", "region": "california"}, "XXX is no country"),
        ({"region": "california"}, "--country"),
        ({"cloud": "gcp"}, "provider:region"),
        ({"cloud": "gcp:us-centrall"}, "gcp:us-central1"),
        ({"cloud": "aws:eu-north-9"}, "gcp"),
        ({"country": "FRA", "cloud": "gcp:us-central1"}, "one location"),
        ({"country": "FRA", "intensity": 5.0, "intensity_source": "x"}, "one location"),
        ({"intensity": 5.0}, "--intensity-source"),
        ({"intensity_source": "x"}, "needs --intensity"),
        ({"intensity": -1.0, "intensity_source": "x"}, "-1"),
        ({"intensity": float("nan"), "intensity_source": "x"}, "nan"),
        ({"intensity": float("inf"), "intensity_source": "x"}, "inf"),
    ],
)
def test_what_is_not_known_is_refused_with_a_hint_and_never_averaged(place, words):
    with pytest.raises(UsageError, match=words):
        carbon.factor(**place)


def test_every_country_and_cloud_of_the_tables_has_a_usable_factor():
    for code in carbon.table("data/private_infra/global_energy_mix.json").json():
        found = carbon.factor(country=code)
        assert 0 <= found.g_per_kwh < 1500, code
        assert found.year is not None
    for row in carbon.table("data/cloud/impact.csv").rows():
        assert carbon.factor(cloud=f"{row['provider']}:{row['region']}").g_per_kwh > 0


def test_it_says_what_codecarbon_itself_would_say():
    """Its own code on the same places; ours differs only in what it refuses."""
    pytest.importorskip("codecarbon")
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    theirs = Emissions(DataSource())
    for country, region in (
        ("FRA", None),
        ("POL", None),
        ("USA", "texas"),
        ("CAN", "alberta"),
        ("CHN", "hebei"),
        ("NOR", "no4"),
    ):
        geo = GeoMetadata(country_iso_code=country, country_name=country, region=region)
        kilograms = theirs.get_private_infra_emissions(Energy.from_energy(kWh=1), geo)
        ours = carbon.factor(country=country, region=region).g_per_kwh
        assert ours == pytest.approx(kilograms * 1000, rel=1e-6)


def test_nothing_touches_the_network_or_writes_a_file(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # A configuration of codecarbon's, which must not be read.
    (tmp_path / ".codecarbon.config").write_text("[codecarbon]\ncountry_iso_code = FRA\n")
    assert carbon.terms().factor.g_per_kwh == 475.0
    carbon.factor(country="USA", region="california")
    assert [p.name for p in tmp_path.iterdir()] == [".codecarbon.config"]


def test_codecarbon_itself_is_never_imported():
    import subprocess
    import sys

    code = (
        "import sys; from minference_green import carbon; carbon.factor(country='FRA');"
        "print(sorted({'codecarbon', 'pandas', 'torch'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A codecarbon of our own making; returns a function that writes one of its files."""
    root = tmp_path / "codecarbon"

    def write(file, content):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)

    write("__init__.py", b"")
    spec = type("Spec", (), {"origin": str(root / "__init__.py")})
    monkeypatch.setattr(carbon.importlib.util, "find_spec", lambda name: spec)
    return write


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"FRA": {"country_name": "France", "year": 2023}}',
        b'{"FRA": {"country_name": "France", "year": 2023, "carbon_intensity": null}}',
        b'{"FRA": {"country_name": "France", "year": 2023, "carbon_intensity": NaN}}',
        b'{"FRA": {"country_name": "France", "year": 2023, "carbon_intensity": -4}}',
        b'{"FRA": 56.0}',
    ],
)
def test_a_damaged_table_is_refused_and_not_read_as_something(package, content):
    package("data/private_infra/global_energy_mix.json", content)
    with pytest.raises(UsageError, match="damaged"):
        carbon.factor(country="FRA")


def test_a_table_that_is_not_there_is_refused_with_the_file(package):
    with pytest.raises(UsageError, match="global_energy_mix"):
        carbon.factor(country="FRA")


def test_a_cloud_table_without_its_columns_is_refused(package):
    package("data/cloud/impact.csv", b"provider,region\ngcp,us-central1\n")
    with pytest.raises(UsageError, match="damaged"):
        carbon.factor(cloud="gcp:us-central1")


def test_without_codecarbon_the_way_on_is_named(monkeypatch):
    monkeypatch.setattr(carbon.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--intensity"):
        carbon.terms()
    own = carbon.terms(intensity=50.0, intensity_source="contract")
    assert own.factor.g_per_kwh == 50.0


def test_terms_carry_pue_and_the_default_embodied_rate_per_gpu():
    """EcoLogits: 273 kg per GPU and an eighth of 5700 kg over three years: 0.0104 g/s."""
    found = carbon.terms(country="FRA", pue=1.2, gpus=4)
    assert found.pue == 1.2
    assert found.embodied_g_per_second == pytest.approx(4 * 0.0104, rel=0.005)
    assert "EcoLogits" in found.embodied_source
    assert "factor of 2" in found.embodied_source


def test_without_a_gpu_embodied_is_not_counted_and_says_so():
    found = carbon.terms(country="FRA")
    assert found.embodied_g_per_second == 0.0
    assert "not counted" in found.embodied_source


def test_an_embodied_rate_of_the_users_own_keeps_its_source():
    found = carbon.terms(embodied_g_per_second=0.02, embodied_source="vendor's sheet")
    assert (found.embodied_g_per_second, found.embodied_source) == (0.02, "vendor's sheet")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pue": 0.9}, "0.9"),
        ({"pue": float("nan")}, "nan"),
        ({"embodied_g_per_second": -0.1, "embodied_source": "x"}, "-0.1"),
        ({"embodied_g_per_second": 0.1}, "--embodied-source"),
    ],
)
def test_terms_that_cannot_be_are_refused_with_the_value(values, words):
    with pytest.raises(UsageError, match=words):
        carbon.terms(**values)
