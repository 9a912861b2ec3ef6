"""A Drafter writes the text that plain `generate` writes, in fewer passes, whatever the model, the
prompt and the settings; or it refuses by name."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    WatermarkingConfig,
)

from builders.drafters import drafter_of, few_words_model
from builders.families import FAMILIES, model_of
from builders.tiny import LLAMA
from caft_plugin import ConfigError, Drafter
from caft_plugin.caft.heads import replay
from caft_plugin.caft.heads_folder import save_heads
from caft_plugin.drafting import decoding
from caft_plugin.drafting.pace import Pace
from caft_plugin.drafting.pass_notes import noted_pass
from caft_plugin.drafting.rotary import Border, borders

pytestmark = pytest.mark.newest

RECURRENT = (
    "RecurrentGemma",
    "Mamba",
    "Mamba2",
    "Jamba",
    "Bamba",
    "FalconH1",
    "GraniteMoeHybrid",
    "Qwen3Next",
)
NEW = 24  # tokens


def prompt(length=9, vocab_size=24, seed=1, padding=0):
    ids = torch.randint(
        min(3, vocab_size - 1),
        vocab_size,
        (1, length),
        generator=torch.Generator().manual_seed(seed),
    )
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def written(model, inputs, seed=5, **settings):
    torch.manual_seed(seed)
    usual = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    return model.generate(**{**usual, **inputs, **settings})


@pytest.fixture
def tiny_model():
    return few_words_model()


GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.5, "top_k": 8}


@contextlib.contextmanager
def all_guesses():
    """While this is open: of each round, how long the text was and what each head guessed, sent or
    not."""
    rounds, guess = [], decoding._Side.propose

    def noting(side, notes, wrong, came, most):
        sent = guess(side, notes, wrong, came, most)
        rounds.append((len(came), list(side.open[-1].tokens)))
        return sent

    decoding._Side.propose = noting
    try:
        yield rounds
    finally:
        decoding._Side.propose = guess


def guesses_without_a_cache(drafter, ids):
    """What the heads guess behind the last but one token of `ids`, everything computed anew."""
    trunk = drafter.trunk
    with torch.no_grad(), noted_pass(trunk, eager=False) as last:
        trunk.model(input_ids=ids[:, :-1], use_cache=False)
        call, source = last.read_by(drafter.config.head_input)
        at = torch.tensor([source.shape[1] - 1])
        hidden = torch.cat([replay(layer, source, call, at) for layer in drafter.heads.layers])
        if drafter.config.head_norm:
            hidden = trunk.norm(hidden)
        return trunk.logits(hidden).argmax(-1).tolist()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in RECURRENT])
def test_the_same_text_in_every_family(family):
    model = model_of(family)
    drafter = drafter_of(model, num_draft=4)
    for inputs in (prompt(), prompt(padding=3)):
        for how in (GREEDY, SAMPLED):
            assert torch.equal(
                written(model, inputs, custom_generate=drafter, **how),
                written(model, inputs, **how),
            )
            assert drafter.last.tokens == NEW and drafter.last.passes <= NEW


class AnyPace(Pace):
    """Sends as many guesses as chance has it, and never gives up."""

    def __init__(self, num_heads):
        super().__init__(num_heads)
        self.random = random.Random(0)

    def how_many(self, probabilities, most):
        return self.random.randint(0, min(most, len(probabilities)))

    def worth_it(self):
        return True


@pytest.mark.parametrize("how", ["all guesses", "as chance has it"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in RECURRENT])
def test_guesses_are_those_of_heads_without_a_cache(family, how):
    """Also of heads that were not asked for some rounds and read what they missed."""
    model = model_of(family)
    drafter = drafter_of(model, num_draft=4 if how == "all guesses" else None)
    drafter.pace = AnyPace(4)
    inputs = prompt()
    with all_guesses() as rounds:
        text = written(model, inputs, custom_generate=drafter, **SAMPLED)
    length = inputs["input_ids"].shape[1]
    assert len(rounds) > 5
    for came, guesses in rounds:
        length += came
        assert guesses == guesses_without_a_cache(drafter, text[:, :length])[: len(guesses)]
    asked = {len(guesses) for _, guesses in rounds[:-5]}  # at the end of the text fewer are needed
    assert asked == {4} if how == "all guesses" else len(asked) > 1, (asked, rounds)


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_are_refused(family):
    model = model_of(family)
    drafter = drafter_of(model)
    with pytest.raises(
        ConfigError, match=rf"{type(model).__name__} has recurrent layers|needs a DynamicCache"
    ):
        written(model, prompt(), custom_generate=drafter)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("head_input", ["penultimate", "final"])
@pytest.mark.parametrize("head_norm", [True, False])
def test_both_wirings(tiny_model, head_input, head_norm):
    drafter = drafter_of(tiny_model, head_input=head_input, head_norm=head_norm, num_draft=4)
    with all_guesses() as rounds:
        text = written(tiny_model, prompt(), custom_generate=drafter, **GREEDY)
    assert torch.equal(text, written(tiny_model, prompt(), **GREEDY))
    length = 9
    for came, guesses in rounds:
        length += came
        assert guesses == guesses_without_a_cache(drafter, text[:, :length])[: len(guesses)]
    assert max(len(guesses) for _, guesses in rounds) == 4


def test_with_an_adapter(tiny_model):
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    drafter = drafter_of(model, num_draft=4)
    for how in (GREEDY, SAMPLED):
        text = written(model, prompt(), custom_generate=drafter, **how)
        assert drafter.last.passes < NEW
        assert torch.equal(text, written(model, prompt(), **how))
        assert torch.equal(
            text, written(model.base_model.model, prompt(), custom_generate=drafter, **how)
        )


def test_over_four_bit_weights(tmp_path):
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 64, "vocab_size": 24})).save_pretrained(
        tmp_path
    )
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bit, dtype=torch.float32
    )
    drafter = drafter_of(model, num_draft=4)
    for how in (GREEDY, SAMPLED):
        text = written(model, prompt(), custom_generate=drafter, **how)
        assert drafter.last.passes < NEW
        assert torch.equal(text, written(model, prompt(), **how))


def test_from_a_folder_and_what_does_not_fit_it(tiny_model, tmp_path):
    given = drafter_of(tiny_model, num_draft=4)
    save_heads(tmp_path, given.heads, given.trunk, given.config, resumable=False)
    loaded = Drafter.from_pretrained(tiny_model, tmp_path, num_draft=4)
    texts = [
        written(tiny_model, prompt(), custom_generate=drafter, **GREEDY)
        for drafter in (given, loaded)
    ]
    assert torch.equal(*texts)
    assert given.last == loaded.last and given.last.passes < NEW
    assert not any(parameter.requires_grad for parameter in loaded.heads.parameters())
    other = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 64, "vocab_size": 24}))
    with pytest.raises(
        ConfigError,
        match="^heads: .* was made for hidden_size 32 .* but this model has hidden_size 64",
    ):
        Drafter.from_pretrained(other, tmp_path)
    with pytest.raises(
        ConfigError, match=r"^heads: got './nowhere', which is not a folder. It accepts [^;]*$"
    ):
        Drafter.from_pretrained(tiny_model, "./nowhere")
    with pytest.raises(ConfigError, match="num_draft: got 5, but it accepts"):
        Drafter.from_pretrained(tiny_model, tmp_path, num_draft=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'confidence'"):
        Drafter.from_pretrained(tiny_model, tmp_path, confidence=0.5)


def test_the_model_is_plain_afterwards(tiny_model):
    drafter = drafter_of(tiny_model, num_draft=4)
    before = {name: type(module) for name, module in tiny_model.named_modules()}
    written(tiny_model, prompt(), custom_generate=drafter)
    with pytest.raises(ZeroDivisionError):
        written(
            tiny_model,
            prompt(),
            custom_generate=drafter,
            stopping_criteria=[lambda ids, scores: 1 / 0],
        )
    assert {name: type(module) for name, module in tiny_model.named_modules()} == before
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in tiny_model.modules()
    )


class NoTokenTwice(LogitsProcessor):
    """Looks back, and changes its scores in place."""

    def __call__(self, ids, scores):
        scores[:, ids[0, -6:]] = -1000.0
        return scores


SETTINGS = {
    "end token": {"eos_token_id": [7, 14, 21]},
    "least tokens": {"eos_token_id": list(range(24)), "min_new_tokens": 5},
    "max_length": {"max_length": 20, "max_new_tokens": None},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "no repeats": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
    "forbidden": {"suppress_tokens": list(range(10)), "bad_words_ids": [[11], [12, 13]]},
    "own processor": {"logits_processor": LogitsProcessorList([NoTokenTwice()])},
    "own criteria": {"stopping_criteria": [lambda ids, scores: torch.tensor([ids.shape[1] >= 17])]},
    "top_p": {"do_sample": True, "top_p": 0.7, "temperature": 0.3},
    "guidance": {"guidance_scale": 1.5},
    "guidance, sampled": {"guidance_scale": 2.0, **SAMPLED},
    "negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": torch.full((1, 5), 7)},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda batch, ids: [3 + len(ids) % 7, 11, 12]},
    "watermark": {"watermarking_config": WatermarkingConfig(greenlist_ratio=0.3, bias=4.0)},
    "positions": {"position_ids": torch.arange(20, 29)[None]},
    "sampled, end token": {**SAMPLED, "eos_token_id": [5, 10, 15]},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_generate(tiny_model, case):
    drafter = drafter_of(tiny_model, num_draft=4)
    for seed in range(5):
        settings = {**GREEDY, **SETTINGS[case]}
        plain = written(tiny_model, prompt(seed=seed), **settings)
        assert torch.equal(
            written(tiny_model, prompt(seed=seed), custom_generate=drafter, **settings), plain
        )
        assert drafter.last.tokens == plain.shape[1] - 9


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_scores_logits_and_cache_are_returned(tiny_model, how):
    drafter = drafter_of(tiny_model, num_draft=4)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **how}
    ours = written(tiny_model, prompt(), custom_generate=drafter, **wanted)
    plain = written(tiny_model, prompt(), **wanted)
    assert type(ours) is type(plain) and ours.keys() == plain.keys()
    assert torch.equal(ours.sequences, plain.sequences) and drafter.last.passes < NEW
    for key in ("scores", "logits"):
        assert len(ours[key]) == len(plain[key]) == NEW
        for mine, theirs in zip(ours[key], plain[key], strict=True):
            # passes of several tokens round otherwise
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    caches = [
        next(value for value in output.values() if hasattr(value, "get_seq_length"))
        for output in (ours, plain)
    ]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 9 + NEW - 1


def test_a_returned_cache_goes_on_without_the_drafter():
    model = model_of("Gemma3Text")  # sliding windows
    drafter = drafter_of(model, num_draft=4)
    texts = []
    for settings in ({}, {"custom_generate": drafter}):
        begun = written(model, prompt(), return_dict_in_generate=True, **GREEDY, **settings)
        name, cache = next(
            (n, value) for n, value in begun.items() if hasattr(value, "get_seq_length")
        )
        mask = torch.ones_like(begun.sequences)
        texts.append(
            written(
                model, {"input_ids": begun.sequences, "attention_mask": mask, name: cache}, **GREEDY
            )
        )
    assert torch.equal(*texts)


class Streamer:
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("argument", ["streamer", "text_streamer"])
def test_a_streamer(tiny_model, argument):
    plain, ours = Streamer(), Streamer()
    written(tiny_model, prompt(), streamer=plain, **GREEDY)
    drafter = drafter_of(tiny_model, num_draft=4)
    written(tiny_model, prompt(), custom_generate=drafter, **{argument: ours}, **GREEDY)
    assert ours.seen == plain.seen and len(ours.seen) == NEW + 1
    assert ours.ended == plain.ended == 1
    seen_by_ours = ours.seen
    ours.seen = []
    drafter.generate(
        tiny_model, **prompt(), max_new_tokens=NEW, eos_token_id=None, streamer=ours, **GREEDY
    )
    assert ours.seen == seen_by_ours


def test_stop_strings(tiny_model):
    """`generate` needs the tokenizer for them, and drops it before a callable."""
    letters = {"<pad>": 0, "</s>": 1, **{chr(ord("a") + i): i + 2 for i in range(22)}}
    model = Tokenizer(BPE(letters, []))
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")
    drafter = drafter_of(tiny_model, num_draft=4)
    whole = written(tiny_model, prompt(), **GREEDY)
    stop = {"stop_strings": [tokenizer.decode(whole[0, 14:15])]}
    in_a_config = {
        "generation_config": GenerationConfig(**stop, max_new_tokens=NEW, pad_token_id=0)
    }
    for settings in ({**stop, **GREEDY}, in_a_config):
        plain = written(tiny_model, prompt(), tokenizer=tokenizer, **settings)
        assert torch.equal(
            written(tiny_model, prompt(), tokenizer=tokenizer, custom_generate=drafter, **settings),
            plain,
        )
        assert plain.shape[1] < whole.shape[1] and drafter.last.tokens == plain.shape[1] - 9


def test_who_asks_for_the_signature_outside_of_generate(tiny_model):
    assert "num_draft" in inspect.signature(Drafter).parameters
    assert "input_ids" in inspect.signature(drafter_of(tiny_model)).parameters


def test_a_pass_sees_its_own_calls_alone(tiny_model):
    """A logits processor that calls the model, as guidance does, changes no draft token."""

    class CallsTheModel(LogitsProcessor):
        def __call__(self, ids, scores):
            tiny_model(input_ids=ids.flip(1))
            return scores

    runs = []
    for processors in ([], [CallsTheModel()]):
        drafter = drafter_of(tiny_model, num_draft=4)
        with all_guesses() as rounds:
            text = written(
                tiny_model,
                prompt(),
                custom_generate=drafter,
                logits_processor=LogitsProcessorList(processors),
                **GREEDY,
            )
        runs.append((text.tolist(), rounds, drafter.last))
    assert runs[0] == runs[1] and runs[0][2].passes < NEW


@pytest.mark.parametrize("num_draft", [4, None])
@pytest.mark.parametrize(
    "who", ["own drafters", "own drafters, the same heads", "one drafter", "one drafts"]
)
def test_texts_in_threads(tiny_model, who, num_draft):
    first = drafter_of(tiny_model, num_draft=num_draft)
    drafters = {
        "own drafters": [first, *(drafter_of(tiny_model, num_draft=num_draft) for _ in range(3))],
        "own drafters, the same heads": [
            Drafter(tiny_model, first.heads, first.config, num_draft=num_draft) for _ in range(4)
        ],
        "one drafter": [first] * 4,
        "one drafts": [first, None, None, None],
    }[who]
    before = {name: type(module) for name, module in tiny_model.named_modules()}
    alone = [
        written(tiny_model, prompt(seed=seed), custom_generate=None, **GREEDY) for seed in range(4)
    ]
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **GREEDY}

    def write(seed):
        text = tiny_model.generate(**prompt(seed=seed), custom_generate=drafters[seed], **settings)
        return text, drafters[seed] and drafters[seed].last.tokens

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                for plain, (text, tokens) in zip(alone, pool.map(write, range(4)), strict=True):
                    assert torch.equal(text, plain) and tokens in (None, NEW)
    finally:
        sys.setswitchinterval(interval)
    assert {name: type(module) for name, module in tiny_model.named_modules()} == before
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in tiny_model.modules()
    )


def test_last_is_of_the_thread_that_asks(tiny_model):
    drafter = drafter_of(tiny_model, num_draft=2)
    assert drafter.last.tokens == 0
    other = threading.Thread(
        target=lambda: written(tiny_model, prompt(), max_new_tokens=7, custom_generate=drafter)
    )
    other.start(), other.join()
    assert drafter.last.tokens == 7
    written(tiny_model, prompt(), max_new_tokens=5, custom_generate=drafter)
    assert drafter.last.tokens == 5


def test_what_is_printed(tiny_model):
    drafter = drafter_of(tiny_model, num_heads=2, num_draft=2)
    assert repr(drafter) == "<Drafter for LlamaForCausalLM: 2 heads, draft tokens: 2 in every step>"
    assert "draft tokens: chosen in every step" in repr(drafter_of(tiny_model))
    written(tiny_model, prompt(), max_new_tokens=7, custom_generate=drafter)
    last = drafter.last
    by_head = f"{last.accepted[0]} of {last.drafted[0]}, {last.accepted[1]} of {last.drafted[1]}"
    assert (
        repr(last)
        == f"<7 tokens in {last.passes} forward passes, draft tokens accepted by head: {by_head}>"
    )


COMPILED = {
    "forward": lambda model: setattr(
        model, "forward", torch.compile(model.forward, backend="eager", dynamic=True)
    ),
    "decoder's forward": lambda model: setattr(
        model.model, "forward", torch.compile(model.model.forward, backend="eager", dynamic=True)
    ),
    "compile()": lambda model: model.compile(backend="eager", dynamic=True),
    "last layer": lambda model: model.model.layers[-1].compile(backend="eager", dynamic=True),
    "norm and unembedding": lambda model: [
        part.compile(backend="eager", dynamic=True) for part in (model.model.norm, model.lm_head)
    ],
}


@pytest.mark.parametrize("head_input", ["penultimate", "final"])
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model(tiny_model, compiled, head_input):
    torch._dynamo.reset()
    plain = written(tiny_model, prompt(), **GREEDY)
    drafter = drafter_of(tiny_model, head_input=head_input, num_draft=4)
    COMPILED[compiled](tiny_model)
    for more in ({}, {"custom_generate": drafter}, {}, {"custom_generate": drafter}):
        assert torch.equal(written(tiny_model, prompt(), **GREEDY, **more), plain)
        assert torch._dynamo.eval_frame._stance.stance == "default"
    assert drafter.last.passes < NEW


def test_a_forward_that_goes_round_the_layers_is_refused(tiny_model):
    drafter = drafter_of(tiny_model, num_draft=4)
    tiny_model.forward = copy.deepcopy(tiny_model).forward
    with pytest.raises(
        ConfigError,
        match=r"without calling its last decoder layer \(LlamaDecoderLayer\).*torch.compile",
    ):
        written(tiny_model, prompt(), custom_generate=drafter)


def two_adapters(**saved):
    config = LoraConfig(r=4, target_modules="all-linear", **saved)
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 24})), config, adapter_name="a"
    )
    model.add_adapter("b", config)
    model.set_adapter("a")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "modules_to_save" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


CHANGES = {
    "merged": lambda model: model.merge_and_unload(),
    "unloaded": lambda model: model.unload(),
    "other adapter": lambda model: model.set_adapter("b") or model,
    "deleted": lambda model: model.delete_adapter("a") or model.set_adapter("b") or model,
    "another norm": lambda model: (
        setattr(
            model.base_model.model.model, "norm", copy.deepcopy(model.base_model.model.model.norm)
        )
        or model
    ),
    "doubled": lambda model: model.double(),
}


@pytest.mark.parametrize("head_input", ["penultimate", "final"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("saved", ["norm", "lm_head"])
def test_a_model_that_is_changed_after_the_drafter_was_made(saved, change, head_input):
    model = two_adapters(modules_to_save=[saved]).eval()
    drafter = drafter_of(model, head_input=head_input, num_draft=4)
    model = CHANGES[change](model)
    plain = written(model, prompt(), **GREEDY)
    assert torch.equal(written(model, prompt(), custom_generate=drafter, **GREEDY), plain)
    assert sum(drafter.last.drafted) > 0


def test_a_copy_made_in_the_middle_of_a_pass_is_plain(tiny_model):
    copies = []
    handle = tiny_model.model.layers[-1].register_forward_hook(
        lambda layer, *_: copies.append(copy.deepcopy(layer))
    )
    written(
        tiny_model, prompt(), custom_generate=drafter_of(tiny_model, num_draft=4), max_new_tokens=4
    )
    handle.remove()
    assert copies and {type(layer) for layer in copies} == {type(tiny_model.model.layers[-1])}


@pytest.mark.parametrize(
    "adapter", [None, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head", "norm"]}]
)
def test_hooks_of_the_user_see_the_models_own_passes_alone(tiny_model, adapter):
    model = tiny_model
    if adapter:
        model = get_peft_model(
            tiny_model, LoraConfig(r=4, **{"target_modules": ["q_proj"], **adapter})
        )
    drafter = drafter_of(model, num_draft=4)
    base = drafter.model
    watched = [*base.lm_head.modules(), *base.model.norm.modules(), base.model.layers[-1], base]
    seen = {}
    for module in watched:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.setdefault(module, []).append(
                args[0].shape if args else None
            ),
            with_kwargs=True,
        )
    written(model, prompt(), custom_generate=drafter, **GREEDY)
    assert drafter.last.passes < NEW
    called = {module: shapes for module, shapes in seen.items() if shapes}
    assert {base, base.model.layers[-1]} < set(called)
    for shapes in called.values():
        assert len(shapes) == drafter.last.passes
        assert all(shape is None or (len(shape) == 3 and shape[0] == 1) for shape in shapes)


def test_token_types():
    """Plain `generate` gives each new token the last one's type."""
    config = GPT2Config(
        vocab_size=24, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config)
    drafter = drafter_of(model, num_draft=4)
    inputs = {**prompt(), "token_type_ids": torch.arange(1, 10)[None]}
    plain = written(model, inputs, **GREEDY)
    assert torch.equal(written(model, inputs, custom_generate=drafter, **GREEDY), plain)
    assert max(length for length, passes in enumerate(drafter.last.lengths, 1) if passes) > 2


def test_a_prompt_of_embeddings(tiny_model):
    drafter = drafter_of(tiny_model, num_draft=4)
    embeds = tiny_model.get_input_embeddings()(prompt()["input_ids"])
    for inputs in (
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "input_ids": prompt()["input_ids"]},
    ):
        plain = written(tiny_model, inputs, **GREEDY)
        assert torch.equal(written(tiny_model, inputs, custom_generate=drafter, **GREEDY), plain)
        assert drafter.last.passes < drafter.last.tokens == NEW


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 20,
}
PHI = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 20,
    "rope_parameters": LONG,
}
PHI |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROTARY = {
    "dynamic": lambda sizes: LlamaForCausalLM(
        LlamaConfig(**{**sizes, "max_position_embeddings": 20, "rope_parameters": DYNAMIC})
    ),
    "longrope": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=LONG)),
    "of one kind of layers": lambda sizes: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**sizes, "max_position_embeddings": 20},
            head_dim=8,
            sliding_window=6,
            layer_types=LAYER_TYPES,
            rope_parameters={
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        )
    ),
    "Phi-3": lambda sizes: Phi3ForCausalLM(Phi3Config(**{**sizes, **PHI})),
    "Phi-3, sliding": lambda sizes: Phi3ForCausalLM(
        Phi3Config(**{**sizes, **PHI}, sliding_window=7)
    ),
    "Phi-3.5-MoE": lambda sizes: PhimoeForCausalLM(
        PhimoeConfig(
            **{
                **sizes,
                **PHI,
                "rope_parameters": {**LONG, "short_mscale": 1.0, "long_mscale": 1.6},
            },
            num_local_experts=4,
        )
    ),
}


@pytest.mark.parametrize("rope", ROTARY)
def test_a_text_over_the_border_of_a_rotary_embedding(rope):
    """Draft tokens are sent only where they change no frequency: the border is at 20 tokens."""
    model = ROTARY[rope]({**LLAMA, "vocab_size": 24, "initializer_range": 0.2})
    beyond = rope not in ("dynamic", "of one kind of layers")
    assert borders(model) == [Border(20, beyond)]
    for inputs in (prompt(), prompt(padding=5), prompt(18), prompt(24) if beyond else prompt(19)):
        drafter = drafter_of(model, num_draft=4)
        settings = {"max_new_tokens": 30, **GREEDY}
        plain = written(model, inputs, **settings)
        assert torch.equal(written(model, inputs, custom_generate=drafter, **settings), plain)


def test_where_drafts_stay_on():
    assert Border(20, beyond=False).room(17) == 3 and Border(20, beyond=False).room(20) == 0
    assert Border(20, beyond=False).room(21) == 0 and Border(20, beyond=True).room(21) == float(
        "inf"
    )
    for static in (
        {"rope_type": "default"},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "linear", "factor": 2.0},
    ):
        config = LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 10000.0, **static})
        assert borders(LlamaForCausalLM(config)) == []
    model = ROTARY["longrope"]({**LLAMA, "vocab_size": 24})
    drafter = drafter_of(model, num_draft=4)
    written(model, prompt(24), custom_generate=drafter, **GREEDY)
    assert sum(drafter.last.drafted) > 0


def with_a_cache(model):
    output = model(**prompt(), use_cache=True)
    name, cache = next(
        (n, value) for n, value in output.items() if hasattr(value, "get_seq_length")
    )
    return {name: cache}


def static_cache(model):
    (name,) = with_a_cache(model)
    return {name: StaticCache(config=model.config, max_cache_len=64)}


REFUSED = {
    "batch": ({"input_ids": torch.full((2, 5), 7)}, "got a batch of 2 texts, but it accepts 1"),
    "several": ({"num_return_sequences": 2, "do_sample": True}, "got a batch of 2 texts"),
    "beams": (
        {"num_beams": 2},
        "got a batch of 2 texts|got beam_search, but it accepts greedy search and sampling",
    ),
    "assistant": (
        lambda model: {"assistant_model": LlamaForCausalLM(model.config)},
        r"got assistant_model \(LlamaForCausalLM\), but the heads propose the draft tokens",
    ),
    "synced": ({"synced_gpus": True}, "got synced_gpus .* forward passes in every process"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "got assisted_generation, but it accepts"),
    "no cache": (
        {"use_cache": False},
        r"needs a DynamicCache, .* the cache is none \(use_cache=False\)",
    ),
    "static": (
        {"cache_implementation": "static"},
        "needs a DynamicCache, which can be cropped, but the cache is StaticCache",
    ),
    "own static": (static_cache, "but the cache is StaticCache"),
    "begun": (with_a_cache, "the cache already has the prompt"),
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states is not supported with drafting",
    ),
    "chunks": ({"prefill_chunk_size": 4}, "prefill_chunk_size is not supported with drafting"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tiny_model, case):
    drafter = drafter_of(tiny_model)
    settings, message = REFUSED[case]
    inputs = {**prompt(), **(settings(tiny_model) if callable(settings) else settings)}
    if case == "batch":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ConfigError, match=message):
        written(tiny_model, inputs, custom_generate=drafter)


def test_another_model_and_training_mode_are_refused(tiny_model):
    drafter = drafter_of(tiny_model)
    other = LlamaForCausalLM(tiny_model.config).eval()
    with pytest.raises(
        ConfigError,
        match=r"called by LlamaForCausalLM, but made for another model \(LlamaForCausalLM\)",
    ):
        written(other, prompt(), custom_generate=drafter)
    tiny_model.train()
    with pytest.raises(ConfigError, match=r"the model is in training mode, .* Call model.eval\(\)"):
        written(tiny_model, prompt(), custom_generate=drafter)


def test_heads_that_are_not_asked_for_long_are_out(tiny_model, monkeypatch):
    """What they have not read is let go, so that a long text takes no more memory."""
    monkeypatch.setattr(decoding, "LONGEST_LAG", 5)
    drafter = drafter_of(tiny_model, num_draft=2)
    sides, start = [], decoding._Side.__init__
    monkeypatch.setattr(
        decoding._Side, "__init__", lambda side, *a: sides.append(side) or start(side, *a)
    )
    plain = written(tiny_model, prompt(), **SAMPLED)
    assert torch.equal(written(tiny_model, prompt(), custom_generate=drafter, **SAMPLED), plain)
    assert len(sides[0].unread) == 2 and max(map(len, sides[0].unread)) <= 3  # of its last rounds
    heads_left = {}  # by number of passes that the last two heads have not read
    for length in range(2, 16):
        written(tiny_model, prompt(), custom_generate=drafter, max_new_tokens=length, **SAMPLED)
        heads_left[drafter.last.passes - 1] = len(sides[-1].unread)
    assert {5, 6} <= heads_left.keys()
    assert all(left == (4 if passes <= 5 else 2) for passes, left in heads_left.items())


def test_nothing_is_drafted_behind_the_last_token(tiny_model):
    drafter = drafter_of(tiny_model, num_draft=4)
    widths = []

    def note(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape[1])

    handle = tiny_model.register_forward_pre_hook(note, with_kwargs=True)
    for tokens, expected in ((1, [9]), (2, [9, 1])):
        written(tiny_model, prompt(9), custom_generate=drafter, max_new_tokens=tokens, **GREEDY)
        assert widths == expected
        widths.clear()
    written(tiny_model, prompt(9), custom_generate=drafter, max_new_tokens=3, **GREEDY)
    handle.remove()
    assert widths[1] == 2 and drafter.last.drafted == [1, 0, 0, 0]


def test_fewer_guesses_and_none(tiny_model):
    plain = written(tiny_model, prompt(), **GREEDY)
    for most in range(5):
        drafter = drafter_of(tiny_model, num_draft=most)
        assert torch.equal(written(tiny_model, prompt(), custom_generate=drafter, **GREEDY), plain)
        assert sum(drafter.last.drafted[most:]) == 0 and (sum(drafter.last.drafted) > 0) == (
            most > 0
        )
        if most == 0:
            assert drafter.last.passes == NEW and drafter.last.tokens_per_pass == 1.0


@hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
@hypothesis.given(st.data())
def test_any_model_prompt_and_settings(data):
    """300 cases: the text is that of plain `generate`."""
    draw = data.draw
    heads = draw(st.sampled_from([2, 4]))
    config = LlamaConfig(
        vocab_size=draw(st.sampled_from([5, 17, 64])),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([1, heads])),
        initializer_range=draw(st.sampled_from([0.02, 0.3])),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(draw(st.integers(0, 2**20)))
    model = LlamaForCausalLM(config)
    num_heads = draw(st.integers(1, 5))
    drafter = drafter_of(
        model,
        num_heads=num_heads,
        head_input=draw(st.sampled_from(["penultimate", "final"])),
        head_norm=draw(st.booleans()),
        num_draft=draw(st.none() | st.integers(0, num_heads)),
    )
    length = draw(st.integers(1, 20))
    seed, padding = draw(st.integers(0, 1000)), draw(st.integers(0, length - 1))
    inputs = prompt(length, vocab_size=config.vocab_size, seed=seed, padding=padding)
    how = draw(
        st.sampled_from(
            [GREEDY, SAMPLED, {"do_sample": True}, {"do_sample": False, "repetition_penalty": 1.3}]
        )
    )
    ends = draw(st.none() | st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=3))
    settings = {**how, "eos_token_id": ends, "max_new_tokens": draw(st.integers(1, 30))}
    plain = written(model, inputs, **settings)
    assert torch.equal(written(model, inputs, custom_generate=drafter, **settings), plain)
    assert drafter.last.tokens == plain.shape[1] - length
