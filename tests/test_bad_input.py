"""Property-based: config blocks and heads folders that are wrong in many ways. Each ends in a
ConfigError that says where and what to do, soon and in little memory, and nothing on disk has
changed."""

from __future__ import annotations

import ast
import contextlib
import datetime
import json
import math
import os
import pickle
import re
import resource
import shutil
import string
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from builders.paths import ROOT
from builders.tiny import LLAMA
from caft_plugin import CAFTConfig, ConfigError
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import (
    HeadsFolder,
    load_checkpoint,
    read_fingerprint,
    resolve_wiring,
    save_heads,
)
from caft_plugin.caft.heads_record import (
    FINGERPRINT,
    FOLDER,
    LORA,
    METRICS,
    RECORD,
    WEIGHTS,
    locate_heads,
)
from caft_plugin.config import Block, MEAPConfig, MTPConfig, PretrainConfig, kinds_of
from caft_plugin.model.trunk import find_trunk
from caft_plugin.tools.inspect_heads import describe

BLOCKS: list[type[Block]] = [CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig]

# The slowest example takes a quarter of a second on a busy core; 20 are for a machine that has
# other work to do.
SETTINGS = settings(
    deadline=datetime.timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
MEGABYTE = 1 << 20


@contextlib.contextmanager
def little_memory():
    """Refuses what raises the highest amount of memory that this process has held by 100 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < 100 * MEGABYTE, f"{grown / MEGABYTE:.0f} MB more"


def check_message(error, start, length=2000):
    message = str(error.value)
    assert message.startswith(start), message
    assert len(message) < length
    assert all(line.isprintable() for line in message.split("\n")), message


# -- config blocks ---------------------------------------------------------------------------------

huge = st.sampled_from([10**30, -(10**30), 2**63, 2**31])
texts = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["", "\ud800", "\x1b[2J", "a" * 10**6, "9" * 5000]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | huge
    | st.floats()
    | texts
    | st.dates()
    | st.sampled_from([(), [[]] * 1000, [0] * 10**5])
)
# What YAML can hold
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
words = re.compile(r"\s*(t|f|true|false|y|n|yes|no|on|off|auto)\s*", re.IGNORECASE)


def bounds(field):
    return {
        name: getattr(mark, name)
        for mark in field.metadata
        for name in ("ge", "gt", "le", "lt", "min_length")
        if hasattr(mark, name)
    }


def within(number, limits):
    return (
        number >= limits.get("ge", -math.inf)
        and number > limits.get("gt", -math.inf)
        and number <= limits.get("le", math.inf)
        and number < limits.get("lt", math.inf)
    )


def may_be_right(field, value):
    """Whether a key could be meant to take this value, asked independently of pydantic and rather
    too often."""
    kinds, limits = kinds_of(field), bounds(field)
    if value is None:
        return field.default is None
    if any(isinstance(choice, str) for choice in kinds) or not isinstance(kinds[0], type):
        return isinstance(value, str)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int | float):
        whole = value == int(value)
        number = (int in kinds and whole) or float in kinds
        return (number and within(value, limits)) or (bool in kinds and value in (0, 1))
    if isinstance(value, str):
        digits = any(c in string.digits or c.isdigit() for c in value)
        return (
            str in kinds
            or (digits and len(value) < 4000)
            or bool(bool in kinds and words.fullmatch(value))
        )
    return False


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.block)
@SETTINGS
@given(data=st.data())
def test_a_wrong_value_is_named(block, data):
    key = data.draw(st.sampled_from(sorted(block.model_fields)))
    field = block.model_fields[key]
    value = data.draw(values)
    choices = [choice for kind in kinds_of(field) for choice in getattr(kind, "__args__", ())]
    assume(
        value not in choices
        if choices and isinstance(value, str)
        else not may_be_right(field, value)
    )
    with little_memory(), pytest.raises(ConfigError) as error:
        block.read({key: value})
    check_message(error, f"{block.block}.{key}: got ")
    assert "but it accepts " in str(error.value)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.block)
@SETTINGS
@given(
    key=st.none()
    | st.booleans()
    | st.integers()
    | huge
    | st.floats()
    | texts
    | st.dates()
    | st.just("self"),
    value=values,
)
def test_an_unknown_key_is_named(block, key, value):
    assume(key not in block.model_fields)
    with little_memory(), pytest.raises(ConfigError) as error:
        block.read({key: value})
    check_message(error, f"{block.block}.")
    assert "unknown setting. Accepted settings: " in str(error.value)
    if isinstance(key, str) and key.isidentifier() and len(key) < 100:
        assert f"{block.block}.{key}: " in str(error.value)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.block)
@SETTINGS
@given(value=values)
def test_what_is_no_block_is_named(block, value):
    assume(value is not None and not isinstance(value, dict))
    with little_memory(), pytest.raises(ConfigError) as error:
        block.read(value)
    check_message(error, f"{block.block}: got ")
    assert "accepts settings by name" in str(error.value)


@pytest.mark.parametrize(
    "block", [{"num_heads": 10**5000}, {10**5000: 1}, 10**5000], ids=["value", "key", "block"]
)
def test_numbers_longer_than_python_writes(block):
    with pytest.raises(ConfigError, match="an? int too long to be shown") as error:
        CAFTConfig.read(block)
    check_message(error, "caft")


# -- heads folders ---------------------------------------------------------------------------------


def make_heads(model, **changes):
    config = resolve_wiring(CAFTConfig(num_heads=2, **changes), None)
    trunk = find_trunk(model)
    heads = build_heads(model, trunk, config, seed=0)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    return heads, trunk, config


class Sound:
    """The folder of a run, in it that of a checkpoint whose heads have LoRA, and heads to load them
    into."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.model = LlamaForCausalLM(LlamaConfig(**LLAMA))
        self.full, self.lora = make_heads(self.model), make_heads(self.model, train_heads="lora")
        save_heads(folder, *self.full, resumable=False)
        save_heads(folder / "checkpoint-1", *self.lora, resumable=True)

    def load(self, folder):
        """As a run does that starts from the heads in this folder."""
        heads, trunk, config = self.full
        opened = HeadsFolder.open(folder)
        opened.refuse_other_model(config, self.model.config)
        opened.load_into(heads, trunk.layer_class)
        return heads.layers.state_dict()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Sound(tmp_path_factory.mktemp("sound"))


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def content(folder):
    """Everything below a folder: files with what they hold, links with where they lead, other
    things by their kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode & 0o170000
        what = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        found[str(path.relative_to(folder))] = (kind, what)
    return found


def raw(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


WEIGHT_DAMAGE = (
    "cut, longer, bytes, header, dropped, extra, shape, type, pickle, enormous, renumbered, linked,"
    " looping, "
)
WEIGHT_DAMAGE = (WEIGHT_DAMAGE + "dangling, a folder, a pipe, gone, empty").split(", ")
RECORD_DAMAGE = (
    "cut, bytes, value, value, value, JSON, dropped, extra, twice, deep, long, digits, utf-16,"
    " linked".split(", ")
)


def damage_tensors(draw, file, outside):
    """Makes a safetensors file another one that is no heads file, or not the heads of this
    model."""
    whole = file.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(WEIGHT_DAMAGE))
    match how:
        case "cut":
            file.write_bytes(whole[: draw(st.integers(0, len(whole) - 1))])
        case "longer":
            file.write_bytes(whole + draw(st.binary(min_size=1, max_size=64)))
        case "bytes":
            file.write_bytes(draw(st.binary(max_size=200)))
        case "header":
            text = draw(
                st.text(max_size=50)
                | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps)
            )
            file.write_bytes(raw(text.encode("utf-8", "surrogatepass"), whole))
        case "dropped":
            gone = draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1))
            save_file({n: t for n, t in tensors.items() if n not in gone}, file)
        case "extra":
            new = draw(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
                | st.sampled_from(["2.x", "0.x", "9" * 5000 + ".x"])
            )
            assume(new not in tensors and new != "__metadata__")
            save_file({**tensors, new: torch.ones(1)}, file)
        case "shape":
            shape = draw(st.lists(st.integers(0, 40), max_size=4))
            assume(tuple(shape) != tuple(tensors[name].shape))
            save_file({**tensors, name: torch.zeros(shape)}, file)
        case "type":
            save_file(
                {
                    **tensors,
                    name: torch.zeros(tensors[name].shape).to(draw(st.sampled_from(DTYPES))),
                },
                file,
            )
        case "pickle":
            held = draw(st.sampled_from([Malice(outside / "executed"), tensors]))
            torch.save(held, file) if draw(st.booleans()) else file.write_bytes(pickle.dumps(held))
        case "enormous":
            shape = draw(
                st.lists(
                    st.sampled_from([2**62, 2**40, 10**12, 2**64, 10**30, 1]),
                    min_size=1,
                    max_size=4,
                )
            )
            assume(shape != [1] * len(shape))
            end = draw(st.sampled_from([4, 2**40, 2**62, 2**64]))
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
            header = raw(json.dumps({name: entry}).encode(), b"\0\0\0\0")
            if draw(st.booleans()):  # or the header itself says that it is enormous
                header = struct.pack("<Q", draw(st.integers(10**9, 2**64 - 1))) + header[8:]
            file.write_bytes(header)
        case "renumbered":
            save_file(
                {
                    n.replace("1.", draw(st.sampled_from(["2.", "7.", "01.", "-1.", "1_."])), 1): t
                    for n, t in tensors.items()
                },
                file,
            )
        case "linked":
            shutil.copy(file, outside / "elsewhere")
            file.unlink()
            file.symlink_to(
                draw(
                    st.sampled_from(
                        [
                            outside / "elsewhere",
                            Path(os.path.relpath(outside / "elsewhere", file.parent)),
                        ]
                    )
                )
            )
        case "looping":
            file.unlink()
            file.symlink_to(file.name)
        case "dangling":
            file.unlink()
            file.symlink_to("nowhere")
        case "a folder":
            file.unlink()
            file.mkdir()
        case "a pipe":
            file.unlink()
            os.mkfifo(file)
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | huge | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


def damage_record(draw, file, outside):
    """Makes config.json one that no heads of this model have."""
    whole = file.read_text()
    record = json.loads(whole)
    key = draw(st.sampled_from(sorted(record)))
    how = draw(st.sampled_from(RECORD_DAMAGE))
    match how:
        case "cut":
            file.write_text(whole[: draw(st.integers(0, len(whole) - 3))])
        case "bytes":
            file.write_bytes(draw(st.binary(max_size=100)))
        case "value":
            value = draw(json_values)
            assume(type(value) is not type(record[key]) or value != record[key])
            # these are only shown
            assume(not (key in ("model_type", "base_model") and isinstance(value, str)))
            # and this: heads hold none
            assume(not (key == "vocab_size" and isinstance(value, int) and value > 0))
            assume(
                not (
                    key in ("head_input", "head_norm") and value in ("final", "penultimate", False)
                )
            )
            file.write_text(json.dumps({**record, key: value}))
        case "JSON":
            file.write_text(json.dumps(draw(json_values)))
        case "dropped":
            assume(key != "format_version")
            file.write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        case "extra":
            new = draw(st.text(max_size=10) | st.just("k" * 10**4))
            assume(new not in record)
            file.write_text(json.dumps({**record, new: 1}))
        case "twice":
            file.write_text(
                whole.replace("{", f"{{{json.dumps(key)}: {json.dumps(record[key])},", 1)
            )
        case "deep":
            opening = draw(st.sampled_from(["[", '{"num_heads":']))
            file.write_text(opening * draw(st.sampled_from([500, 20_000])))
        case "long":
            file.write_text(whole + " " * 200_000)
        case "digits":
            sign = draw(st.sampled_from(["", "-", "0.", "1e"]))
            file.write_text(json.dumps({**record, key: 12345}).replace("12345", sign + "9" * 5000))
        case "utf-16":
            file.write_bytes(whole.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"]))))
        case "linked":
            shutil.copy(file, outside / "elsewhere")
            file.unlink()
            file.symlink_to(outside / "elsewhere")


@contextlib.contextmanager
def damaged_copy(sound, damage, name, data):
    """A copy of sound folders with one damaged file; afterwards nothing in it has changed and
    nothing was executed."""
    with tempfile.TemporaryDirectory() as temporary:
        outside, run = Path(temporary) / "outside", Path(temporary) / "run"
        outside.mkdir()
        shutil.copytree(sound.folder, run)
        damage(data.draw, run / name, outside)
        before = content(run)
        with little_memory():
            yield run
        assert content(run) == before
        assert not (outside / "executed").exists()


def inspect(folder):
    """`caft inspect` ends in a text or an error of ours too, if less is wrong for it."""
    try:
        text = describe(folder)
    except ConfigError as error:
        text = str(error)
    assert text and len(text) < 3000 and all(line.isprintable() for line in text.split("\n"))


@settings(SETTINGS, max_examples=250)
@given(data=st.data())
def test_damaged_weights(sound, data):
    with damaged_copy(sound, damage_tensors, f"{FOLDER}/{WEIGHTS}", data) as run:
        with pytest.raises(ConfigError) as error:
            sound.load(run)
        check_message(error, "caft.heads: ")
        inspect(run / FOLDER)


@settings(SETTINGS, max_examples=200)
@given(data=st.data())
def test_damaged_record(sound, data):
    with damaged_copy(sound, damage_record, f"{FOLDER}/{RECORD}", data) as run:
        with pytest.raises(ConfigError) as error:
            sound.load(run / FOLDER)
        check_message(error, "caft.")
        inspect(run / FOLDER)


@SETTINGS
@given(data=st.data())
def test_damaged_fingerprint(sound, data):
    """It is advice: passed over, or refused where it is a link out of the folder; never an error of
    another kind."""
    with damaged_copy(sound, damage_tensors, f"{FOLDER}/{FINGERPRINT}", data) as run:
        try:
            found = read_fingerprint(run / FOLDER)
        except ConfigError as error:
            assert f"has no readable {FINGERPRINT}" in str(error)
        else:
            assert found is None or found.verdict(sound.full[0].origin) in ("own", "base", "other")


@pytest.mark.parametrize("name", [WEIGHTS, LORA])
@SETTINGS
@given(data=st.data())
def test_damaged_checkpoint(sound, name, data):
    with damaged_copy(sound, damage_tensors, f"checkpoint-1/{FOLDER}/{name}", data) as run:
        with pytest.raises(ConfigError) as error:
            load_checkpoint(run / "checkpoint-1", sound.lora[0], sound.lora[2])
        check_message(error, "caft.")


@SETTINGS
@given(data=st.data())
def test_one_flipped_bit_is_found_or_changes_no_more_than_a_number(sound, data):
    """A number in a tensor cannot be known to be wrong; anything else can."""
    whole = (sound.folder / FOLDER / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    position, bit = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        shutil.copytree(sound.folder, run)
        (run / FOLDER / WEIGHTS).write_bytes(flipped)
        with little_memory():
            try:
                loaded = sound.load(run)
            except ConfigError as error:
                assert str(error).startswith("caft.heads: ")
                return
        expected = load_file(sound.folder / FOLDER / WEIGHTS)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


# -- what is fine ----------------------------------------------------------------------------------


def test_the_sound_folder_loads(sound):
    loaded = sound.load(sound.folder)
    expected = load_file(sound.folder / FOLDER / WEIGHTS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    load_checkpoint(sound.folder / "checkpoint-1", sound.lora[0], sound.lora[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_point_types_are_converted(sound, tmp_path, dtype):
    shutil.copytree(sound.folder, tmp_path / "run")
    file = tmp_path / "run" / FOLDER / WEIGHTS
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    loaded = sound.load(tmp_path / "run")
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].float())


@pytest.mark.parametrize("below", ["", f"{FOLDER}/"])
def test_a_folder_of_the_hubs_cache_loads(sound, tmp_path, below):
    """There each file is a link to ../../blobs; one that leads further is refused."""
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    folder = snapshot / below
    folder.mkdir(parents=True), blobs.mkdir()
    for number, name in enumerate([WEIGHTS, RECORD]):
        shutil.copy(sound.folder / FOLDER / name, blobs / str(number))
        (folder / name).symlink_to(os.path.relpath(blobs / str(number), folder))
    sound.load(snapshot)
    assert "LlamaDecoderLayer" in describe(locate_heads(str(snapshot)))
    (folder / WEIGHTS).unlink()
    shutil.copy(sound.folder / FOLDER / WEIGHTS, tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError, match=r"has no readable heads.safetensors \(a link out of the folder\)"
    ):
        sound.load(snapshot)


def test_figures_that_are_no_file_are_refused(sound, tmp_path):
    shutil.copytree(sound.folder / FOLDER, tmp_path / "heads")
    os.mkfifo(tmp_path / "heads" / METRICS)
    with pytest.raises(ConfigError, match=r"has no readable metrics.json \(not a regular file\)"):
        describe(tmp_path / "heads")


# -- code of others --------------------------------------------------------------------------------


def test_code_in_a_model_folder_is_never_executed(tiny_model, tmp_path):
    from caft_plugin.model.loading import Source

    tiny_model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(
        ConfigError, match="whose config could not be read: .* only if trust_remote_code is set"
    ):
        Source.of(str(tmp_path / "model"))
    assert not (tmp_path / "executed").exists()


def test_every_place_that_loads_says_whether_it_trusts():
    """Left out, transformers asks on the terminal; here it is False, or what the user wrote in the
    Axolotl YAML."""
    seen = set()
    for file in sorted((ROOT / "caft_plugin").rglob("*.py")):
        place = file.relative_to(ROOT / "caft_plugin").as_posix()
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            # what these read holds no code
            codeless = ast.unparse(call.func).startswith(
                ("Drafter.", "PeftModel.", "GenerationConfig.")
            )
            if call.func.attr in ("from_pretrained", "from_config") and not codeless:
                assert named.get("trust_remote_code") in ("False", "trust_remote_code"), (
                    file.name,
                    call.lineno,
                )
                seen.add(place)
            if ast.unparse(call.func) == "torch.load":
                assert named.get("weights_only") == "True", (file.name, call.lineno)
                seen.add("torch.load")
    assert seen == {
        "model/loading.py",
        "axolotl/loading.py",
        "meap/base_model.py",
        "torch.load",
    }
