from __future__ import annotations

import pytest
from pydantic import ValidationError

from caft_plugin import CAFTConfig, ConfigError


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("num_heads", 0, "at least 1"),
        ("num_heads", -1, "at least 1"),
        ("num_heads", "four", "a whole number"),
        ("num_heads", True, "a whole number"),
        ("num_heads", 2.5, "a whole number"),
        ("beta", -0.01, "at least 0"),
        ("beta", float("inf"), "a number"),
        ("beta", float("nan"), "a number"),
        ("alpha", 1.01, "at most 1"),
        ("alpha", 0, "above 0"),
        ("schedule", "rsin", "one of rsine, sine, linear, constant"),
        ("train_heads", "all", "one of auto, full, lora, frozen"),
        ("head_input", "last", "one of penultimate, final"),
        ("head_norm", "perhaps", "true or false"),
        ("fused_loss", "perhaps", "it accepts true or false."),
        ("fused_loss", 2, "it accepts true or false."),
        ("heads", "", "a string"),
        ("heads", 7, "a string"),
    ],
)
def test_bad_value(key, value, takes):
    with pytest.raises(ConfigError) as caught:
        CAFTConfig(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"caft.{key}: got {value!r}")
    assert takes in message


@pytest.mark.parametrize(
    ("value", "read"),
    [(True, True), ("on", True), ("true", True), (False, False), ("off", False), ("auto", "auto")],
)
def test_fused_loss_reads_its_former_values(value, read):
    config = CAFTConfig(fused_loss=value)
    assert config.fused_loss == read
    assert CAFTConfig.read(config.model_dump()) == config  # as Axolotl passes it on


def test_unknown_key_names_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"caft.betta: unknown setting. Accepted settings: num_heads, .*head_norm"
    ):
        CAFTConfig(betta=0.1)


def test_every_error_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        CAFTConfig(num_heads=0, alpha=2)
    assert len(str(caught.value).splitlines()) == 2


def test_numbers_as_yaml_writes_them():
    # YAML 1.1 reads 1e-2 as a text
    assert CAFTConfig(beta="1e-2", num_heads="2").beta == 0.01


@pytest.mark.parametrize("block", [3, "on", ["num_heads"], True])
def test_block_has_to_be_a_mapping(block):
    with pytest.raises(ConfigError, match="accepts settings by name"):
        CAFTConfig.read(block)


def test_bare_block_is_all_defaults():
    assert (
        CAFTConfig.read(None)
        == CAFTConfig()
        == CAFTConfig.read({})
        == CAFTConfig.read(CAFTConfig())
    )


def test_frozen():
    with pytest.raises(ValidationError):
        CAFTConfig().beta = 1
