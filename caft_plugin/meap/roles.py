"""Tokens with a role in the chat template, the tokenizer, the base model's config or the user's
settings.

They are never masked, and never used as the mask token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

# Keys of a model's or a generation config that give a token a role. `eos_token_id` may be a list.
ROLE_KEY = re.compile(r"(?!mask_token)\w+_token_ids?")
# Keys of a model's config for the tokens that are replaced by, or enclose, images, video or sound.
PLACEHOLDER_KEY = re.compile(
    r".*(image|img|video|vision|visual|media|audio|speech|[be]o[iav])\w*_(token_ids?|token_index)"
)
MARKUP = re.compile(r"<\S+>")  # an added token of this form is not text
# a token of this form has a role if a template contains it
MARK = re.compile(r"[<\[]\S*\w\S*[>\]]")


@dataclasses.dataclass(frozen=True)
class Said:
    """The user's settings of tokens.

    `ends` are the texts of tokens that end a turn, `added` those of other tokens added to the
    tokenizer, `templates` chat templates in addition to the tokenizer's.
    """

    ends: Sequence[str] = ()
    added: Sequence[str] = ()
    templates: Sequence[str] = ()


NOTHING_SAID = Said()


@dataclasses.dataclass(frozen=True)
class Roles:
    """Ids of tokens that are not ordinary text.

    `given` have a role; `listed` may be the mask token only by the user's choice; `special` are
    marked special in the tokenizer, with or without a role; `markup` are other tokens that are not
    text.
    """

    given: frozenset[int]
    listed: frozenset[int]
    special: frozenset[int]
    markup: frozenset[int]

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        in_configs: Collection[int] = (),
        said: Said = NOTHING_SAID,
    ) -> Roles:
        """Return the roles from a tokenizer and its chat template, the base model's configs and the
        user's settings.

        Args:
            tokenizer: the model's tokenizer.
            in_configs: ids from the configs (`role_ids`).
            said: the user's settings of tokens.
        """
        mask = tokenizer.mask_token_id
        unknown = tokenizer.unk_token_id
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        given = {
            *_named_ids(tokenizer, vocabulary),
            *_ids_in_templates(tokenizer, vocabulary, said.templates),
            *in_configs,
            *_ids_of(said.ends, tokenizer),
        }
        listed = {*_ids_of(said.added, tokenizer), unknown}
        special = {id_ for id_, token in added.items() if token.special}
        markup = {id_ for id_, token in added.items() if MARKUP.fullmatch(token.content.strip())}
        # The unknown token may be chosen by name; a mask token that the user lists stays the first
        # choice of `auto`.
        return cls(
            given=_known(given - {unknown}),
            listed=_known(listed - {mask}),
            special=_known(special.union(tokenizer.all_special_ids)),
            markup=_known(markup),
        )

    @property
    def never_masked(self) -> frozenset[int]:
        return self.given | self.listed | self.special | self.markup

    @property
    def never_chosen(self) -> frozenset[int]:
        """Ids that `mask_token: auto` skips."""
        return self.given | self.listed


def _known(ids: Iterable[int | None]) -> frozenset[int]:
    return frozenset(id_ for id_ in ids if id_ is not None)


def _named_ids(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]
) -> Iterator[int | None]:
    """Yield the ids of the tokenizer's own special tokens: bos, eos, pad and so on."""
    for key, token in tokenizer.special_tokens_map.items():
        # a list holds additional ones, which have no role of their own
        if key not in ("mask_token", "unk_token") and not isinstance(token, (list, tuple)):
            yield vocabulary.get(str(token))


def _ids_in_templates(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Mapping[str, int],
    templates: Sequence[str],
) -> Iterator[int]:
    """Yield the ids of added tokens, and of tokens like <this> or [this], in the chat templates."""
    template = "".join([str(tokenizer.chat_template or ""), *templates])
    texts = {id_: text for text, id_ in vocabulary.items() if MARK.fullmatch(text)}
    for id_, token in tokenizer.added_tokens_decoder.items():
        texts[id_] = token.content.strip()
    for id_, text in texts.items():
        if text and text in template:
            yield id_


def _ids_of(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            yield ids[0]


def role_ids(*configs: PretrainedConfig | GenerationConfig | None) -> frozenset[int]:
    """Return the ids with a role in a base model's configs, including nested ones."""
    return _ids_under(ROLE_KEY, [config.to_dict() for config in configs if config is not None])


def placeholder_ids(config: PretrainedConfig) -> frozenset[int]:
    """Return the ids that a model's config, including nested ones, uses for images, video and
    sound."""
    return _ids_under(PLACEHOLDER_KEY, [config.to_dict()])


def _ids_under(key: re.Pattern[str], parts: list[Mapping]) -> frozenset[int]:
    found: set[int] = set()
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, Mapping):
                parts.append(value)
            elif isinstance(name, str) and key.fullmatch(name):
                ids = value if isinstance(value, list) else [value]
                found.update(id_ for id_ in ids if isinstance(id_, int))
    return frozenset(found)
