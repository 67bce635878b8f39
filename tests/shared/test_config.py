"""Configuration: parsed once, and a bad value names its variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import ConfigError, Reader, Settings


def test_defaults_need_no_variable() -> None:
    """An empty environment gives the documented defaults."""
    settings = Settings.load({})

    assert settings.bus.url == "nats://127.0.0.1:4222"
    assert settings.cache_dir == Path("~/.cache/deepflow").expanduser()
    assert settings.grace_s == settings.bus.grace_s == 30.0


def test_the_cache_lives_under_a_given_home() -> None:
    """With only DEEPFLOW_HOME set, what can be rebuilt lives under it too."""
    assert Settings.load({"DEEPFLOW_HOME": "/x"}).cache_dir == Path("/x/cache")
    assert Settings.load({"DEEPFLOW_HOME": "/x", "DEEPFLOW_CACHE": "/y"}).cache_dir == Path("/y")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEEPFLOW_METRICS_PORT", "http"),
        ("DEEPFLOW_METRICS_PORT", "65536"),
        ("DEEPFLOW_GRACE_S", "nan"),
        ("DEEPFLOW_GRACE_S", "-1"),
        ("DEEPFLOW_GRACE_S", "soon"),
        ("DEEPFLOW_LOG_LEVEL", "chatty"),
        ("DEEPFLOW_NATS_PASSWORD_FILE", "/does/not/exist"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    """The error says which variable is wrong."""
    with pytest.raises(ConfigError, match=name):
        Settings.load({name: value})


@pytest.mark.parametrize(("raw", "value"), [("1", True), ("off", False), ("Yes", True), ("", True)])
def test_flags(raw: str, value: bool) -> None:
    """Flags are read from the usual words; empty means the default."""
    assert Reader({"X": raw}).flag("X", True) is value


def test_a_wrong_flag_is_refused() -> None:
    """Anything else is an error."""
    with pytest.raises(ConfigError, match="X"):
        Reader({"X": "perhaps"}).flag("X", True)


def test_the_password_is_read_from_a_file_and_never_shown(tmp_path: Path) -> None:
    """A password file is read without its newline, and the password is in no repr."""
    (tmp_path / "p").write_text("hunter2\n")
    settings = Settings.load({"DEEPFLOW_NATS_PASSWORD_FILE": str(tmp_path / "p")})

    assert settings.bus.password == "hunter2"
    assert "hunter2" not in repr(settings)
