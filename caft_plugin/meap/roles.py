"""Tokens that have a role, given by the chat template, the tokenizer, the base model's config or the user's settings.

None of them is masked, and none is taken as the mask token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

# Keys of a model's or a generation config that give a token a role. A list of end tokens is `eos_token_id` too.
ROLE_KEY = re.compile(r"(?!mask_token)\w+_token_ids?")
# Keys of a model's config that name the tokens in whose place images, video or sound go, or that stand around them.
PLACEHOLDER_KEY = re.compile(
    r".*(image|img|video|vision|visual|media|audio|speech|[be]o[iav])\w*_(token_ids?|token_index)"
)
MARKUP = re.compile(r"<\S+>")  # an added token that looks like this stands for no text
MARK = re.compile(r"[<\[]\S*\w\S*[>\]]")  # any token that looks like this has a role where a template contains it


@dataclasses.dataclass(frozen=True)
class Said:
    """What the user's settings say of tokens: the texts of those that end a turn, and of others that are added to the
    tokenizer; and chat templates beside the tokenizer's."""

    ends: Sequence[str] = ()
    added: Sequence[str] = ()
    templates: Sequence[str] = ()


NOTHING_SAID = Said()


@dataclasses.dataclass(frozen=True)
class Roles:
    """Ids of tokens: `given` a role; `listed`, which only the user may choose as the mask; `special`, marked so by the
    tokenizer, with or without a role; and `markup`, others that stand for no text."""

    given: frozenset[int]
    listed: frozenset[int]
    special: frozenset[int]
    markup: frozenset[int]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, in_configs: Collection[int] = (), said: Said = NOTHING_SAID
    ) -> Roles:
        """Return the roles in a tokenizer and its chat template, in the base model's configs (`role_ids`) and in the
        user's settings."""
        mask, unknown = tokenizer.mask_token_id, tokenizer.unk_token_id
        vocabulary = tokenizer.get_vocab()
        named = {
            vocabulary.get(str(token))
            for key, token in tokenizer.special_tokens_map.items()
            if key not in ("mask_token", "unk_token") and not isinstance(token, (list, tuple))
        }
        template = "".join([str(tokenizer.chat_template or ""), *said.templates])
        added = {id_: token.content.strip() for id_, token in tokenizer.added_tokens_decoder.items()}
        marks = {id_: text for text, id_ in vocabulary.items() if MARK.fullmatch(text)}
        in_template = {id_ for id_, text in (marks | added).items() if text and text in template}
        given = {*named, *in_template, *in_configs, *_ids_of(said.ends, tokenizer)} - {unknown}
        listed = {*_ids_of(said.added, tokenizer), unknown} - {mask}
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        markup = {id_ for id_, text in added.items() if MARKUP.fullmatch(text)}
        sets = given, listed, special.union(tokenizer.all_special_ids), markup
        return cls(*(frozenset(id_ for id_ in ids if id_ is not None) for ids in sets))

    @property
    def never_masked(self) -> frozenset[int]:
        return self.given | self.listed | self.special | self.markup

    @property
    def never_chosen(self) -> frozenset[int]:
        """Those that `mask_token: auto` passes over."""
        return self.given | self.listed


def _ids_of(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            yield ids[0]


def role_ids(*configs: PretrainedConfig | GenerationConfig | None) -> frozenset[int]:
    """Ids to which a base model's configs, parts of them included, give a role."""
    return _ids_under(ROLE_KEY, [config.to_dict() for config in configs if config is not None])


def placeholder_ids(config: PretrainedConfig) -> frozenset[int]:
    """Ids that a model's config gives to images, video and sound, those of its parts included."""
    return _ids_under(PLACEHOLDER_KEY, [config.to_dict()])


def _ids_under(key: re.Pattern[str], parts: list[Mapping]) -> frozenset[int]:
    found: set[int] = set()
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, Mapping):
                parts.append(value)
            elif isinstance(name, str) and key.fullmatch(name):
                found.update(id_ for id_ in (value if isinstance(value, list) else [value]) if isinstance(id_, int))
    return frozenset(found)
